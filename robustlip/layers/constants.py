"""Multiplication by constants and addition of constants: one for all numbers, or one a channel.

Channels are dimension 1 of images (N, C, H, W), the last dimension of anything else.
"""

from __future__ import annotations

import torch
from torch import nn

from robustlip.errors import BadInput
from robustlip.layers.sorting import channel_dimension


class _Constant(nn.Module):
    """value: (1,) or (C,), a buffer."""

    value: torch.Tensor

    def __init__(self, value: float | list[float] | torch.Tensor) -> None:
        super().__init__()
        held = torch.atleast_1d(torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.get_default_dtype()))
        if held.dim() != 1 or not held.is_floating_point() or not bool(torch.isfinite(held).all()):
            raise BadInput(f"expected one finite number or one a channel in {type(self).__name__}, got {tuple(held.shape)}, {held.dtype}; give those")
        self.register_buffer("value", held.detach())

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """The constant in a shape that torch spreads over x."""
        dim = channel_dimension(x)
        channels = x.shape[dim]
        if len(self.value) not in (1, channels):
            raise BadInput(f"expected {channels} channels or one number in {type(self).__name__}, got {len(self.value)}; match them")
        return self.value.view((-1, 1, 1) if dim == 1 else (-1,))


class Scale(_Constant):
    """x·value; with divide x/value, whose value is nowhere 0."""

    def __init__(self, value: float | list[float] | torch.Tensor, *, divide: bool = False) -> None:
        super().__init__(value)
        self.divide = bool(divide)
        if self.divide and not bool((self.value != 0).all()):
            raise BadInput("expected a divisor other than 0 in every channel, got 0; leave such channels out")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.spread(x) if self.divide else x * self.spread(x)

    def extra_repr(self) -> str:
        return f"{len(self.value)}, divide={self.divide}"


class Shift(_Constant):
    """x + value; with subtract x − value."""

    def __init__(self, value: float | list[float] | torch.Tensor, *, subtract: bool = False) -> None:
        super().__init__(value)
        self.subtract = bool(subtract)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.spread(x) if self.subtract else x + self.spread(x)

    def extra_repr(self) -> str:
        return f"{len(self.value)}, subtract={self.subtract}"
