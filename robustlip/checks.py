"""The one check that everything which takes a model from outside makes of its weights."""

from __future__ import annotations

import torch
from torch import nn

from robustlip.errors import BadInput


def check_finite_weights(model: nn.Module, of: str = "") -> None:
    """Raises BadInput when a parameter or buffer holds NaN or infinity. of: the file or model to name in the sentence."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            where = f"{name} of {of}" if of else name
            raise BadInput(f"expected finite weights, got NaN or infinity in {where}; train the model again or load another checkpoint")
