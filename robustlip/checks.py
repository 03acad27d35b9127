"""What everything that takes a model from outside checks: its weights, and that it takes the inputs it is given."""

from __future__ import annotations

import torch
from torch import nn

from robustlip.errors import BadInput, RobustlipError


def check_finite_weights(model: nn.Module, of: str = "") -> None:
    """Raises BadInput when a parameter or buffer holds NaN or infinity. of: the file or model to name in the sentence."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            where = f"{name} of {of}" if of else name
            raise BadInput(f"expected finite weights, got NaN or infinity in {where}; train the model again or load another checkpoint")


@torch.no_grad()
def check_fit(model: nn.Module, x: torch.Tensor) -> None:
    """Raises BadInput when the model cannot take inputs of this shape and kind: it is run on the first of x (N, …), in eval mode."""
    parameter = next(model.parameters())
    first = x[:1].to(parameter.device)
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        model(first.to(parameter.dtype) if first.is_floating_point() else first)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        if isinstance(error, RobustlipError | torch.OutOfMemoryError):
            raise
        raise BadInput(
            f"expected inputs that the model takes, got samples of shape {tuple(x.shape[1:])} ({str(x.dtype).removeprefix('torch.')}), "
            f"which it cannot ({str(error).splitlines()[0][:150]}); use the data that it was trained for"
        ) from None
    finally:
        for module, mode in modes:
            module.training = mode
