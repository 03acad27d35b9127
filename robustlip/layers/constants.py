"""Multiplication by constants and addition of constants: one for all numbers, one a channel, or a table; a constant sample.

Channels are dimension 1 of images (N, C, H, W), the last dimension of anything else. A table has two dimensions or more, which are spread over the
last ones of a sample as torch spreads them, and never make it larger.
"""

from __future__ import annotations

import torch
from torch import nn

from robustlip.errors import BadInput
from robustlip.layers.sorting import channel_dimension


class _Constant(nn.Module):
    """value: (1,), (C,) or a table; a buffer that shares memory with the tensor passed in."""

    value: torch.Tensor

    def __init__(self, value: float | list[float] | torch.Tensor) -> None:
        super().__init__()
        held = torch.atleast_1d(torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.get_default_dtype()))
        while held.dim() > 2 and len(held) == 1:
            held = held[0]  # one row for all samples
        if not held.numel() or not held.is_floating_point() or not bool(torch.isfinite(held).all()):
            raise BadInput(f"expected finite numbers in {type(self).__name__}, got {tuple(held.shape)}, {held.dtype}; give those")
        self.register_buffer("value", held.detach())

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """The constant in a shape that torch broadcasts over x."""
        if self.value.dim() > 1:
            check_spread(self, tuple(x.shape[1:]))
            return self.value
        dim = channel_dimension(x)
        channels = x.shape[dim]
        if len(self.value) not in (1, channels):
            raise BadInput(f"expected {channels} channels or one number in {type(self).__name__}, got {len(self.value)}; match them")
        return self.value.view((-1, 1, 1) if dim == 1 else (-1,))


def _size(value: torch.Tensor) -> str:
    return str(len(value)) if value.dim() == 1 else "×".join(map(str, value.shape))


def check_spread(layer: _Constant, shape: tuple[int, ...]) -> None:
    """Raises BadInput unless the layer's table broadcasts to samples of that shape without enlarging them."""
    table = tuple(layer.value.shape)
    table = table[1:] if len(table) == len(shape) + 1 and table[0] == 1 else table  # one row for all samples
    if len(table) > len(shape) or any(a not in (1, b) for a, b in zip(reversed(table), reversed(shape), strict=False)):
        raise BadInput(f"expected a table that fits samples of shape {shape} in {type(layer).__name__}, got {table}; match them")


class Scale(_Constant):
    """x·value, or x/value with `divide` (value is nowhere 0)."""

    def __init__(self, value: float | list[float] | torch.Tensor, *, divide: bool = False) -> None:
        super().__init__(value)
        self.divide = bool(divide)
        if self.divide and not bool((self.value != 0).all()):
            raise BadInput("expected a divisor other than 0 in every channel, got 0; leave such channels out")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.spread(x) if self.divide else x * self.spread(x)

    def extra_repr(self) -> str:
        return f"{_size(self.value)}, divide={self.divide}"


class Shift(_Constant):
    """x + value, or x − value with `subtract`."""

    def __init__(self, value: float | list[float] | torch.Tensor, *, subtract: bool = False) -> None:
        super().__init__(value)
        self.subtract = bool(subtract)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.spread(x) if self.subtract else x + self.spread(x)

    def extra_repr(self) -> str:
        return f"{_size(self.value)}, subtract={self.subtract}"


class Constant(nn.Module):
    """The same sample whatever the input, (N, …) → (N, *value.shape): a branch of a join.

    value: a buffer that shares its memory with the tensor that is given, its numbers of one sample.
    """

    value: torch.Tensor

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        if not value.dim() or not value.numel() or not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise BadInput(f"expected finite numbers of one sample in Constant, got {tuple(value.shape)}, {value.dtype}; give those")
        self.register_buffer("value", value.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value.expand(len(x), *self.value.shape)

    def extra_repr(self) -> str:
        return "×".join(map(str, self.value.shape))
