"""What attacks and smoothing see of a model: any nn.Module as it is executed, and the logits that it answers with.

The module itself is called, with its hooks, wrappers, compiled or scripted code; nothing is rebuilt from its layers. Every call gets a copy of the
point, so that a layer that works in place writes over nothing of ours or of the caller's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from robustlip.checks import check_is_logit, check_logits
from robustlip.data.lengths import by_length, in_order
from robustlip.errors import BadInput
from robustlip.layers import Chain, two_logits

# What a causal language model of Hugging Face ends its class name with.
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_REMEDY = "return a tensor (N, C), a tuple that begins with it and holds no other matrix of N rows, or an output with 'logits'"


class Target:
    """An nn.Module in eval mode, raw inputs → logits (N, C).

    logits: the answer itself if it is a tensor, (N, C), or of a binary model one number z a sample, whose logits are (0, z): class 1 where z > 0;
    its `logits` (Hugging Face) or its key 'logits'; or the first of a tuple, where nothing else in it
    is a matrix with a row per sample. Models of the next token (a Chain whose task says so, or a module with task = 'next-token', or a causal
    language model of Hugging Face) answer (N, T, V), and the last position is the prediction; sequences then have no padding.
    alone: samples change each other in this model, so each is evaluated by itself (see `settle`).
    Raises BadInput for what is no module, and for weights that hold no values.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise BadInput(f"expected a model that is an nn.Module, got {type(model).__name__}; wrap it in a module with a forward")
        check_values(model)
        self.module, self.source = model, inner(model)
        name = type(self.source).__name__
        self.next_token = getattr(self.source, "task", None) == "next-token" or name.endswith(_CAUSAL)
        self.input_range: tuple[float, float] | None = getattr(self.source, "input_range", None)
        self.alone = False
        self.one_logit = ""  # of a model that answers one number a sample: 'z' or 'p', '' while nobody knows

    # ---- what it is made of

    def first(self) -> Tensor | None:
        """Its first floating-point parameter or buffer: the dtype and the device that inputs are brought to."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return next((tensor for tensor in tensors if tensor.is_floating_point()), None)

    @property
    def kind(self) -> str:
        """The kind of device that it is on: 'cpu', 'cuda', …"""
        first = self.first()
        return "cpu" if first is None else first.device.type

    def dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of its weights; of x where it has none."""
        first = self.first()
        return x.dtype if first is None else first.dtype

    def device(self, x: Tensor) -> torch.device:
        """Where its weights are; where x is, if it has none."""
        first = self.first()
        return x.device if first is None else first.device

    # ---- what it answers

    def scores(self, x: Tensor) -> Tensor:
        """Raw inputs (N, …) → the logits (N, C) of the prediction. Texts of several lengths are run without padding, those of one together."""
        groups = by_length(x)
        return in_order([self._one_by_one(lambda part: self.module(part), part) for _, part in groups], groups)

    def scores_with(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The logits (N, C) of inputs x with other weights, by the parameter names of `source`."""
        return self._one_by_one(lambda part: functional_call(self.source, dict(weights), (part,)), x)

    def embed(self, x: Tensor) -> Tensor:
        """Raw inputs → embeddings (N, T, D). Raises BadInput when the model has no embedding that can be given to it."""
        if isinstance(self.source, Chain):
            return self.source.embed(x.clone())
        table = self._table()
        if x.is_floating_point() or x.dim() != 2:
            raise BadInput(f"expected token ids, integers of shape (N, T), got {x.dtype} of shape {tuple(x.shape)}; encode the text first")
        return table(x.clone())  # type: ignore[no-any-return]

    def scores_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Embeddings (N, T, D) → the logits (N, C) of the prediction."""
        if isinstance(self.source, Chain):
            return self._one_by_one(self.source.from_embeddings, embeddings)
        return self._one_by_one(lambda part: self.module(inputs_embeds=part), embeddings)

    def _table(self) -> Callable[[Tensor], Tensor]:
        get = getattr(self.source, "get_input_embeddings", None)
        table = get() if callable(get) else None
        if not isinstance(table, nn.Module) or "inputs_embeds" not in inspect.signature(self.source.forward).parameters:
            raise BadInput(
                f"expected a model with an embedding (a Chain with embedding_depth, or get_input_embeddings() and a forward that takes "
                f"inputs_embeds), got {type(self.source).__name__}; use an input threat: l1, l2 or linf"
            )
        return table

    def _one_by_one(self, call: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        if self.alone and len(x) > 1:
            return torch.cat([self._read(call(x[i : i + 1].clone()), 1) for i in range(len(x))])
        return self._read(call(x.clone()), len(x))

    def _read(self, answer: Any, count: int) -> Tensor:
        logits = logits_of(answer, count)
        if not logits.is_floating_point():
            raise BadInput(f"expected logits that are floating-point numbers, got {logits.dtype}; return the scores, not the class")
        if self.next_token and logits.dim() == 3:
            logits = logits[:, -1]
        if logits.shape in ((count,), (count, 1)):
            logits = two_logits(self._one_logit(logits))
        if logits.dim() == 3:
            raise BadInput(
                f"expected logits ({count}, C), got {tuple(logits.shape)}, scores by token; "
                f"set task = 'next-token' on the model if the last position is the prediction, or return one row a sample"
            )
        check_logits(logits, count)
        return logits

    def _one_logit(self, answer: Tensor) -> Tensor:
        """One number a sample → z, which is above 0 for class 1: behind a sigmoid p − ½. Raises BadInput for what may be z or p."""
        ends = self.source
        while isinstance(ends, nn.Sequential) and len(ends):
            ends = ends[len(ends) - 1]
        if not self.one_logit and type(ends) in (nn.Linear, nn.Sigmoid):
            self.one_logit = "z" if type(ends) is nn.Linear else "p"
        if not self.one_logit:
            check_is_logit(answer)
            self.one_logit = "z"
        return answer - 0.5 if self.one_logit == "p" else answer

    # ---- what has to hold before it is attacked

    def check_inputs(self, x: Tensor) -> None:
        """Raises BadInput for raw inputs that cannot be evaluated."""
        if isinstance(self.source, Chain):
            self.source.check_inputs(x)
        padding = getattr(getattr(self.source, "config", None), "pad_token_id", None)
        if self.next_token and isinstance(padding, int) and not x.is_floating_point() and bool((x == padding).any()):
            raise BadInput(
                f"expected sequences without padding for a model of the next token, got the token {padding} (config.pad_token_id); "
                f"cut them to one length, or set config.pad_token_id = None where that token is text"
            )

    @torch.no_grad()
    def settle(self, x: Tensor) -> Tensor:
        """The logits of x (N, …), and from now on `alone` where a sample's logits change with the others of its batch by more than rounding.

        Compared are the batch, its first sample alone, and the first half in reversed order (of one sample: itself beside another).
        Raises BadInput for a model that answers the same inputs in different ways.
        """
        self.alone = any(isinstance(m, _BatchNorm) and m.running_mean is None for m in self.module.modules())
        logits = self.scores(x)
        if self.alone:
            return logits
        rows = torch.arange(len(x), device=x.device)
        tried = [rows[:1], rows[: (len(x) + 1) // 2].flip(0)] if len(x) > 1 else []
        same = all(_close(self.scores(x[part]), logits[part.to(logits.device)]) for part in tried)
        if len(x) == 1:
            try:
                same = _close(self.scores(torch.cat([x, x * 0.5 if x.is_floating_point() else x.flip(1)]))[:1], logits)
            except (RuntimeError, ValueError, IndexError):  # traced with one sample, say
                same = False
        if not same:
            if not _close(self.scores(x), logits):
                raise BadInput(
                    "expected a model that gives the same logits for the same inputs in eval mode, got others the second time; "
                    "take the randomness out of its forward"
                )
            self.alone = True
            logits = self.scores(x)
        return logits

    def check_embedding(self, x: Tensor) -> None:
        """Raises BadInput unless the model gives the same logits by way of its embeddings: what is attacked there has to be the model."""
        if not _close(self.scores_from_embeddings(self.embed(x[:2])), self.scores(x[:2])):
            raise BadInput(
                f"expected a model whose embeddings lead to its own logits, got others from {type(self.source).__name__}; "
                f"its forward does more than embed and go on: use an input threat, or build it without hooks or a forward of its own"
            )


def inner(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and DataParallel, whose names and attributes it has."""
    while True:
        inside = getattr(model, "_orig_mod", None)
        if inside is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inside = model.module
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def check_values(model: nn.Module) -> None:
    """Raises BadInput for weights that an attack cannot compute with: lazy, on the meta device, or made under inference_mode."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor) or tensor.is_meta:
            raise BadInput(f"expected weights with values, got {name} without (lazy, or on the meta device); run the model once or load its weights")
        if tensor.is_inference():
            raise BadInput(f"expected weights that gradients can pass, got {name} made under torch.inference_mode; make the model outside of it")


def logits_of(answer: Any, count: int) -> Tensor:
    """The logits in what a model answers to `count` samples, by the rule of `Target`. Raises BadInput where it is not plain which they are."""
    if isinstance(answer, Tensor):
        return answer
    found = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(answer, tuple | list) and answer and isinstance(answer[0], Tensor):
        rivals = [part for part in answer[1:] if isinstance(part, Tensor) and part.dim() == 2 and len(part) == count]
        if not rivals:
            return answer[0]
        raise BadInput(f"expected an answer in which the logits are plain to see, got a tuple with {1 + len(rivals)} matrices; {_REMEDY}")
    got = f"a dictionary of {', '.join(map(str, list(answer)[:5]))}" if isinstance(answer, Mapping) else type(answer).__name__
    raise BadInput(f"expected logits from the model, got {got}; {_REMEDY}")


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two computations of the same logits (N, C) differ by rounding only, √eps of the largest per sample; NaN agrees with NaN."""
    slack = torch.finfo(a.dtype).eps ** 0.5 * torch.maximum(a.abs(), b.abs()).double().amax(1)
    unusable = ~torch.isfinite(a).all(1) & ~torch.isfinite(b).all(1)
    return bool((((a.double() - b.double()).abs().amax(1) <= slack) | unusable).all())
