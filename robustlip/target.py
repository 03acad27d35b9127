"""The interface of a model for attacks and smoothing: any nn.Module as it is executed, and its logits.

The module itself is called, with its hooks, wrappers, compiled or scripted code; no layer is rewritten. Every call gets a copy of the
point, so that an in-place layer cannot overwrite our tensors or the caller's.
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

# Endings of the class names of causal language models in Hugging Face.
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_REMEDY = "return a tensor (N, C), a tuple that begins with it and has no other matrix of N rows, or an output with 'logits'"


class Target:
    """An nn.Module in eval mode, raw inputs → logits (N, C).

    logits: the output itself, if it is a tensor (N, C); its `logits` (Hugging Face) or its key 'logits'; or the first element of a tuple, if no other
    element is a matrix with one row per sample. A binary model may return one number z per sample; its logits are (0, z), so class 1 is predicted
    if z > 0. Models of the next token (a Chain whose task says so, a module with task = 'next-token', or a causal
    language model of Hugging Face) return (N, T, V), and the last position is the prediction; their sequences must not be padded.
    position: for scores by token, the token whose scores are used; callers that go through all tokens pass it.
    sample_by_sample: samples influence each other in this model, so each is evaluated separately (see `compare_batches`).
    Raises BadInput if the model is not a module, and for weights without values.
    """

    def __init__(self, model: nn.Module, position: int | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise BadInput(f"expected a model that is an nn.Module, got {type(model).__name__}; wrap it in a module with a forward")
        check_values(model)
        self.module, self.source = model, inner(model)
        name = type(self.source).__name__
        self.next_token = getattr(self.source, "task", None) == "next-token" or name.endswith(_CAUSAL)
        self.position = position if position is not None else -1 if self.next_token else None
        if self.position is None and isinstance(self.source, Chain):
            self.position = self.source.position
        self.input_range: tuple[float, float] | None = getattr(self.source, "input_range", None)
        self.sample_by_sample = False
        self.one_logit = ""  # for a model with one number per sample: 'z' (a logit) or 'p' (a probability); '' while unknown

    # ---- its weights

    def first(self) -> Tensor | None:
        """Its first floating-point parameter or buffer: inputs are converted to its dtype and device."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return next((tensor for tensor in tensors if tensor.is_floating_point()), None)

    @property
    def kind(self) -> str:
        """The type of the device that it is on: 'cpu', 'cuda', …"""
        first = self.first()
        return "cpu" if first is None else first.device.type

    def dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of its weights; that of x if it has none."""
        first = self.first()
        return x.dtype if first is None else first.dtype

    def device(self, x: Tensor) -> torch.device:
        """The device of its weights; that of x if it has none."""
        first = self.first()
        return x.device if first is None else first.device

    # ---- its outputs

    def scores(self, x: Tensor) -> Tensor:
        """Raw inputs (N, …) → the logits (N, C) of the prediction. Texts of the same length are run together, without padding."""
        groups = by_length(x)
        return in_order([self._one_by_one(lambda part: self.module(part), part) for _, part in groups], groups)

    def scores_with(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The logits (N, C) of inputs x with other weights, given by the parameter names of `source`."""
        return self._one_by_one(lambda part: functional_call(self.source, dict(weights), (part,)), x)

    def embed(self, x: Tensor) -> Tensor:
        """Raw inputs → embeddings (N, T, D). Raises BadInput if the model does not accept embeddings as inputs."""
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

    def scores_by_token(self, x: Tensor, embedded: bool = False) -> Tensor:
        """Token ids (N, T), or embeddings (N, T, D) in their place, → the logits (N, T, C) of every token. Raises BadInput for another answer."""
        if embedded and isinstance(self.source, Chain):
            answer = self.source.from_embeddings(x.clone())
        else:
            answer = self.module(inputs_embeds=x.clone()) if embedded else self.module(x.clone())
        logits = logits_of(answer, len(x))
        if logits.dim() != 3 or logits.shape[:2] != x.shape[:2] or not logits.is_floating_point():
            raise BadInput(f"expected logits {(*x.shape[:2], 'C')} for labels by token, got {tuple(logits.shape)}; give one label a sample")
        return torch.cat([torch.zeros_like(logits), logits], -1) if logits.shape[-1] == 1 else logits

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
        if self.sample_by_sample and len(x) > 1:
            return torch.cat([self._read(call(x[i : i + 1].clone()), 1) for i in range(len(x))])
        return self._read(call(x.clone()), len(x))

    def _read(self, answer: Any, count: int) -> Tensor:
        logits = logits_of(answer, count)
        if not logits.is_floating_point():
            raise BadInput(f"expected logits that are floating-point numbers, got {logits.dtype}; return the scores, not the class")
        if self.position is not None and logits.dim() == 3:
            logits = logits[:, self.position]
        if logits.shape in ((count,), (count, 1)):
            logits = two_logits(self._one_logit(logits))
        if logits.dim() == 3:
            raise BadInput(
                f"expected logits ({count}, C), got {tuple(logits.shape)}, scores per token; "
                f"set task = 'next-token' on the model if the last position is the prediction, return one row per sample, or give labels (N, T)"
            )
        check_logits(logits, count)
        return logits

    def _one_logit(self, answer: Tensor) -> Tensor:
        """One number per sample → z, positive for class 1; z = p − ½ for a probability p after a sigmoid. Raises BadInput if it may be either."""
        ends = self.source
        while isinstance(ends, nn.Sequential) and len(ends):
            ends = ends[len(ends) - 1]
        if not self.one_logit and type(ends) in (nn.Linear, nn.Sigmoid):
            self.one_logit = "z" if type(ends) is nn.Linear else "p"
        if not self.one_logit:
            check_is_logit(answer)
            self.one_logit = "z"
        return answer - 0.5 if self.one_logit == "p" else answer

    # ---- checks before an attack

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
    def compare_batches(self, x: Tensor) -> Tensor:
        """The logits of x (N, …). Sets `sample_by_sample` if the logits of a sample depend on the other samples of its batch by more than rounding.

        It compares the batch, its first sample alone, and the first half in reversed order (a single sample: together with another one).
        Raises BadInput for a model that returns different outputs for the same inputs.
        """
        self.sample_by_sample = any(isinstance(m, _BatchNorm) and m.running_mean is None for m in self.module.modules())
        logits = self.scores(x)
        if self.sample_by_sample:
            return logits
        rows = torch.arange(len(x), device=x.device)
        tried = [rows[:1], rows[: (len(x) + 1) // 2].flip(0)] if len(x) > 1 else []
        same = all(_close(self.scores(x[part]), logits[part.to(logits.device)]) for part in tried)
        if len(x) == 1:
            try:
                same = _close(self.scores(torch.cat([x, x * 0.5 if x.is_floating_point() else x.flip(1)]))[:1], logits)
            except (RuntimeError, ValueError, IndexError):  # e.g. a model traced with one sample
                same = False
        if not same:
            if not _close(self.scores(x), logits):
                raise BadInput(
                    "expected a model that gives the same logits for the same inputs in eval mode, got different ones the second time; "
                    "remove the randomness from its forward"
                )
            self.sample_by_sample = True
            logits = self.scores(x)
        return logits

    def check_embedding(self, x: Tensor) -> None:
        """Raises BadInput unless the model computes the same logits from its embeddings: otherwise the attack would attack another function."""
        if not _close(self.scores_from_embeddings(self.embed(x[:2])), self.scores(x[:2])):
            raise BadInput(
                f"expected a model that computes the same logits from its embeddings, got others from {type(self.source).__name__}; "
                f"its forward also uses the token ids in another way: use an input threat, or a model without hooks or an overridden forward"
            )


def inner(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and DataParallel; parameter names refer to it."""
    while True:
        inside = getattr(model, "_orig_mod", None)
        if inside is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inside = model.module
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def check_values(model: nn.Module) -> None:
    """Raises BadInput for weights with which an attack cannot compute: lazy, on the meta device, or made under inference_mode."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor) or tensor.is_meta:
            raise BadInput(f"expected weights with values, got {name} without (lazy, or on the meta device); run the model once or load its weights")
        if tensor.is_inference():
            raise BadInput(f"expected weights that allow gradients, got {name} made under torch.inference_mode; build the model outside of it")


def logits_of(answer: Any, count: int) -> Tensor:
    """The logits in the output of a model for `count` samples, by the rule of `Target`. Raises BadInput if the output is ambiguous."""
    if isinstance(answer, Tensor):
        return answer
    found = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(answer, tuple | list) and answer and isinstance(answer[0], Tensor):
        rivals = [part for part in answer[1:] if isinstance(part, Tensor) and part.dim() == 2 and len(part) == count]
        if not rivals:
            return answer[0]
        raise BadInput(f"expected an output with unambiguous logits, got a tuple with {1 + len(rivals)} matrices; {_REMEDY}")
    got = f"a dictionary of {', '.join(map(str, list(answer)[:5]))}" if isinstance(answer, Mapping) else type(answer).__name__
    raise BadInput(f"expected logits from the model, got {got}; {_REMEDY}")


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two computations of the same logits (N, C) differ only by rounding, √eps of the largest logit per sample; NaN equals NaN."""
    slack = torch.finfo(a.dtype).eps ** 0.5 * torch.maximum(a.abs(), b.abs()).double().amax(1)
    unusable = ~torch.isfinite(a).all(1) & ~torch.isfinite(b).all(1)
    return bool((((a.double() - b.double()).abs().amax(1) <= slack) | unusable).all())
