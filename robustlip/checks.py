"""What everything that takes a model from outside checks: its weights, and that it takes the inputs it is given."""

from __future__ import annotations

import torch
from torch import nn

from robustlip.errors import BadInput, RobustlipError, first_line
from robustlip.modes import in_eval_mode


def check_weights_are_there(model: nn.Module, of: str = "") -> None:
    """Raises BadInput for what no command can read: weights that are lazy, on the meta device, complex, or packed by a quantised module."""
    where = f" in {of}" if of else ""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise BadInput(f"expected weights, got a lazy model whose {name} has no shape yet{where}; run it once on a batch of data first")
        if tensor.is_meta:
            raise BadInput(f"expected weights with values, got {name} on the meta device{where}; load the weights first")
        if tensor.is_complex():
            raise BadInput(f"expected real weights, got {name} of {tensor.dtype}{where}; write the model with real and imaginary parts apart")
    packed = [(name, type(value).__name__) for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]
    if packed:
        name, kind = packed[0]
        raise BadInput(f"expected weights that are tensors, got {name} of type {kind}{where}, as quantised modules pack them; use it before that")


def check_finite_weights(model: nn.Module, of: str = "") -> None:
    """Raises BadInput when a parameter or buffer holds NaN or infinity. of: the file or model to name in the sentence.

    −inf in a buffer of a mask hides a token: of the layers that say so, and of other people's modules.
    """
    masks = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, _ in module.named_buffers(recurse=False)
        if name in getattr(type(module), "may_hide", ()) or not type(module).__module__.startswith(("torch.", "robustlip."))
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        where = f"{name} of {of}" if of else name
        try:
            finite = not tensor.is_floating_point() or bool((tensor < torch.inf if name in masks else torch.isfinite(tensor)).all())
        except (RuntimeError, ValueError, TypeError) as error:  # of tensor subclasses, which implement what they please
            kind = type(tensor).__name__
            raise BadInput(f"expected weights that can be read, got {kind} as {where} ({first_line(error)}); convert it to plain tensors") from None
        if not finite:
            raise BadInput(f"expected finite weights, got NaN or infinity in {where}; train the model again or load another checkpoint")


@torch.no_grad()
def check_fit(model: nn.Module, x: torch.Tensor, remedy: str = "use the data that it was trained for") -> torch.Tensor:
    """What the model answers to the first of x (N, …), in eval mode. Raises BadInput when it cannot take inputs of this shape and kind."""
    like = next((p for p in model.parameters() if p.is_floating_point()), x)
    first = x[:1].to(like.device, like.dtype if x.is_floating_point() else x.dtype, copy=True)  # a layer in place may write over it
    try:
        with in_eval_mode(model):
            return model(first)  # type: ignore[no-any-return]
    except (RuntimeError, IndexError, ValueError, TypeError, ArithmeticError) as error:
        if isinstance(error, RobustlipError | torch.OutOfMemoryError):
            raise
        raise BadInput(
            f"expected a model that takes samples of shape {tuple(x.shape[1:])} ({str(x.dtype).removeprefix('torch.')}), "
            f"got an error of it ({first_line(error)}); {remedy}"
        ) from None


def check_logits(logits: torch.Tensor, count: int) -> None:
    """Raises BadInput unless there is one row of logits for each of `count` samples: of scores by token nobody says which is meant."""
    if logits.dim() != 2 or logits.shape[0] != count or logits.shape[1] < 2:
        raise BadInput(f"expected logits ({count}, C) with C of at least 2, got {tuple(logits.shape)}; check the model's last layer")


def check_is_logit(answers: torch.Tensor) -> None:
    """Raises BadInput for one number a sample that may as well be a probability: its decision would be at ½, not at 0."""
    values = answers.detach()
    if len(values) and bool(((values >= 0) & (values <= 1)).all()):
        raise BadInput(
            f"expected one logit a sample, of class 1 where it is above 0, got numbers in [0, 1] alone ({float(values.flatten()[0]):.3g} first), as "
            f"probabilities are; return the logit in front of the sigmoid, or end an nn.Sequential with nn.Sigmoid"
        )
