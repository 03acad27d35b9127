"""A model as a chain of layers with rules: the form that certifiers, attacks and trainers use."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.execution import check_plain


def two_logits(logits: torch.Tensor) -> torch.Tensor:
    """Logits (N, C) unchanged; a binary model's single logit z (N, 1) or (N,) becomes (0, z): class 1 where z > 0, with margin |z|."""
    if logits.dim() == 1:
        logits = logits.unsqueeze(1)
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.dim() == 2 and logits.shape[1] == 1 else logits


class Chain(nn.Sequential):
    """Layers in series."""

    embedding_depth: int = 0
    task: str = "classification"
    vocabulary: str | None = None
    config: dict[str, Any] | None = None
    input_range: tuple[float, float] | None = None
    computes_weights: bool = False
    final: str = ""
    # For logits (N, T, C): the token whose logits are the prediction. None for logits (N, C), and if every token has its own label (`reading`).
    _position: int | None = None
    # Token ids that a text must not contain: the padding of a classifier that reads the last token that is not padding.
    without: frozenset[int] = frozenset()

    def check_inputs(self, x: torch.Tensor) -> None:
        """Raises BadInput for raw inputs that cannot be evaluated. Not part of forward, because it reads values and waits for the device."""
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise BadInput("expected finite inputs, got NaN or infinity; clean the data")

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Raw inputs → embeddings (N, T, D). Raises BadInput if the model has no embedding."""
        if self.embedding_depth == 0:
            raise BadInput("expected a model with an embedding (a transformer), got one without; use an input threat: l1, l2 or linf")
        for layer in list(self)[: self.embedding_depth]:
            x = layer(x)
        return x

    def from_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, T, D) → logits: the rest of the forward pass."""
        for layer in list(self)[self.embedding_depth :]:
            embeddings = layer(embeddings)
        return embeddings

    @property
    def position(self) -> int | None:
        """For logits (N, T, C): the token whose logits are the prediction; of a next-token model the last one, unless stated."""
        return -1 if self._position is None and self.task == "next-token" else self._position

    def decide(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits (N, C) of the prediction: of the last position for next-token models; (0, z) for a single logit z."""
        if self.position is not None:
            logits = logits[:, self.position]
        elif self.task == "token-classification":
            raise BadInput("expected labels by token (N, T) for a classifier of tokens, got one a text; give them, −100 where there is none")
        if logits.dim() == 2 and logits.shape[1] == 1 and type(self[len(self) - 1]) is nn.Sigmoid:
            raise BadInput(
                "expected one logit, of class 1 where it is above 0, got the probability after a Sigmoid; leave it out, or give an nn.Sequential"
            )
        return two_logits(logits)

    @contextmanager
    def reading(self, position: int | None) -> Iterator[None]:
        """Within it the prediction is that of one token, of logits (N, T, C)."""
        before, self._position = self._position, position
        try:
            yield
        finally:
            self._position = before

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Raw inputs → the logits (N, C) of the prediction."""
        return self.decide(self(x))

    def scores_from_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, T, D) → the logits (N, C) of the prediction."""
        return self.decide(self.from_embeddings(embeddings))


class TokenChain(Chain):
    """A Chain of (Embedding or Lookup, blocks …, head) with token ids (N, T) as inputs and logits (N, C)."""

    embedding_depth = 1

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Token ids (N, T) → embeddings (N, T, D). Raises BadInput for other inputs than integers in range."""
        if x.dtype not in (torch.int64, torch.int32) or x.dim() != 2:
            raise BadInput(f"expected token ids, integers of shape (N, T), got {x.dtype} of shape {tuple(x.shape)}; encode the text first")
        return super().embed(x)

    def check_inputs(self, x: torch.Tensor) -> None:
        super().check_inputs(x)
        size = int(self[0].num_embeddings)  # type: ignore[arg-type]
        if x.numel() and not (0 <= int(x.min()) and int(x.max()) < size):
            raise BadInput(f"expected token ids in [0, {size - 1}], got {int(x.min())} to {int(x.max())}; use the model's own vocabulary")
        for padding in sorted(self.without):
            if bool((x == padding).any()):
                raise BadInput(
                    f"expected texts without the token {padding}, which the model takes for padding (config.pad_token_id), got one with it; pass "
                    f"texts of different lengths as they are, or with their attention_mask"
                )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.from_embeddings(self.embed(x))


class NextTokenChain(TokenChain):
    """A TokenChain whose logits are (N, T, V)."""

    task = "next-token"
    _position = -1


class OneTokenChain(TokenChain):
    """A TokenChain whose layers compute logits (N, T, C), of which those of one token classify the text."""

    def __init__(self, layers: OrderedDict[str, nn.Module], position: int) -> None:
        super().__init__(layers)
        self._position = int(position)

    def extra_repr(self) -> str:
        return f"position={self.position}"


class TokenLabelChain(TokenChain):
    """A TokenChain whose logits are (N, T, C), a label for each token."""

    task = "token-classification"


# A certificate speaks of the layers in their order; a subclass that overrides any of these could do something else between them.
_PLAIN = {
    "__call__": (nn.Module.__call__,),
    "forward": (nn.Sequential.forward, TokenChain.forward),
    "embed": (Chain.embed, TokenChain.embed),
    "from_embeddings": (Chain.from_embeddings,),
    "decide": (Chain.decide,),
    "scores": (Chain.scores,),
    "scores_from_embeddings": (Chain.scores_from_embeddings,),
}


_CHAINS: weakref.WeakKeyDictionary[nn.Module, Chain] = weakref.WeakKeyDictionary()


def as_chain(model: nn.Module) -> Chain:
    """The model itself if it is a Chain, or a Chain that shares the layers of an nn.Sequential.

    Raises UnsupportedLayer for any other module: its forward could do anything between its layers.
    """
    check_plain(model)
    if isinstance(model, Chain):
        for method, plain in _PLAIN.items():
            if getattr(type(model), method) not in plain or method in vars(model):
                raise UnsupportedLayer(
                    f"expected a Chain that runs its layers in order, got {type(model).__name__} with its own {method}(); "
                    f"put what it does into a layer that has a rule"
                )
        return model
    if type(model) is nn.Sequential:
        flat: list[tuple[str, nn.Module]] = []

        def walk(prefix: str, module: nn.Module) -> None:
            # Not named_children: it leaves out a layer that is used a second time.
            for name, child in module._modules.items():
                if child is None:
                    continue
                if type(child) is nn.Sequential:
                    check_plain(child)
                    walk(f"{prefix}{name}_", child)
                else:
                    flat.append((f"{prefix}{name}", child))

        walk("layer", model)
        # The same chain for the same layers: constants are remembered by chain, and a new one every time would compute them every time.
        chain = _CHAINS.get(model)
        if chain is None or len(chain) != len(flat) or any(a is not b for a, (_, b) in zip(chain._modules.values(), flat, strict=True)):
            chain = _CHAINS[model] = Chain(OrderedDict(flat))
        chain.training = model.training  # not train(): the layers are shared, and their modes are their own
        return chain
    raise UnsupportedLayer(
        f"expected a robustlip model or an nn.Sequential of known layers, got {type(model).__name__}; "
        f"build it as nn.Sequential or as robustlip.layers.Chain to certify it"
    )


def chain_or_module(model: nn.Module) -> nn.Module:
    """The model as a chain if it is one, as certificates name and hash it; any other module unchanged (it can be attacked, not certified)."""
    try:
        return as_chain(model)
    except UnsupportedLayer:
        return model
