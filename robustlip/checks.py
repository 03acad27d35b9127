"""Checks of models from callers: their weights, and whether they accept the given inputs."""

from __future__ import annotations

import torch
from torch import nn

from robustlip.errors import BadInput, RobustlipError, first_line
from robustlip.modes import in_eval_mode


def check_weights_are_there(model: nn.Module, of: str = "") -> None:
    """Raises BadInput for weights that no command can read: lazy, on the meta device, complex, or packed by a quantised module."""
    where = f" in {of}" if of else ""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise BadInput(f"expected weights, got a lazy model whose {name} has no shape yet{where}; run it once on a batch of data first")
        if tensor.is_meta:
            raise BadInput(f"expected weights with values, got {name} on the meta device{where}; load the weights first")
        if tensor.is_complex():
            raise BadInput(f"expected real weights, got {name} of {tensor.dtype}{where}; write the model with separate real and imaginary parts")
    packed = [(name, type(value).__name__) for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]
    if packed:
        name, kind = packed[0]
        raise BadInput(f"expected weights that are tensors, got {name} of type {kind}{where}, as in a quantised module; use it unquantised")


def check_finite_weights(model: nn.Module, of: str = "") -> None:
    """Raises BadInput if a parameter or buffer contains NaN or infinity. of: name of the file or model, for the message.

    −inf is allowed in a buffer that is an attention mask, where it hides a token: in layers that declare it, and in modules of other packages.
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
        except (RuntimeError, ValueError, TypeError) as error:  # raised by tensor subclasses
            kind = type(tensor).__name__
            raise BadInput(f"expected weights that can be read, got {kind} as {where} ({first_line(error)}); convert it to plain tensors") from None
        if not finite:
            raise BadInput(f"expected finite weights, got NaN or infinity in {where}; train the model again or load another checkpoint")


@torch.no_grad()
def check_fit(model: nn.Module, x: torch.Tensor, remedy: str = "use the data that it was trained for") -> torch.Tensor:
    """The output of the model for the first sample of x (N, …), in eval mode. Raises BadInput if it does not accept this shape and dtype."""
    like = next((p for p in model.parameters() if p.is_floating_point()), x)
    first = x[:1].to(like.device, like.dtype if x.is_floating_point() else x.dtype, copy=True)  # an in-place layer may overwrite it
    try:
        with in_eval_mode(model):
            return model(first)  # type: ignore[no-any-return]
    except (RuntimeError, IndexError, ValueError, TypeError, ArithmeticError) as error:
        if isinstance(error, RobustlipError | torch.OutOfMemoryError):
            raise
        raise BadInput(
            f"expected a model that takes samples of shape {tuple(x.shape[1:])} ({str(x.dtype).removeprefix('torch.')}), "
            f"got an error ({first_line(error)}); {remedy}"
        ) from None


def check_logits(logits: torch.Tensor, count: int) -> None:
    """Raises BadInput unless there is one row of logits per sample; for scores per token it is not known which ones are meant."""
    if logits.dim() != 2 or logits.shape[0] != count or logits.shape[1] < 2:
        raise BadInput(f"expected logits ({count}, C) with C of at least 2, got {tuple(logits.shape)}; check the model's last layer")


def check_is_logit(answers: torch.Tensor) -> None:
    """Raises BadInput for one number per sample that may be a probability: its decision would be at ½, not at 0."""
    values = answers.detach()
    if len(values) and bool(((values >= 0) & (values <= 1)).all()):
        raise BadInput(
            f"expected one logit per sample, positive for class 1, got numbers in [0, 1] only ({float(values.flatten()[0]):.3g} first), which may "
            f"be probabilities; return the logit before the sigmoid, or end an nn.Sequential with nn.Sigmoid"
        )
