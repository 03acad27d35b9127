"""Activations that sort or reflect instead of squashing: they keep the ℓ2 norm, and their slope is 1 almost everywhere.

All act on channels: dimension 1 of images (N, C, H, W), the last dimension of anything else.
"""

from __future__ import annotations

import torch
from torch import nn

from robustlip.errors import BadInput


def channels_at(rank: int) -> int:
    """The dimension of channels of values of that rank: 1 of images (N, C, H, W), −1 of vectors (N, n) and tokens (N, T, D)."""
    return 1 if rank == 4 else -1


def channel_dimension(x: torch.Tensor) -> int:
    """`channels_at` of its rank."""
    return channels_at(x.dim())


def _check_divisible(x: torch.Tensor, group: int) -> int:
    dim = channel_dimension(x)
    if x.shape[dim] % group:
        raise BadInput(f"expected a number of channels divisible by {group}, got {x.shape[dim]} in {tuple(x.shape)}; change the width")
    return dim


class GroupSort(nn.Module):
    """Sorts each group of `group` neighbouring channels in ascending order; same shape. Source: Anil, Lucas & Grosse 2019, section 4.1."""

    def __init__(self, group: int = 2) -> None:
        super().__init__()
        if group < 1:
            raise BadInput(f"expected a group of at least 1 channel, got {group}; 2 is the usual one")
        self.group = int(group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dim = _check_divisible(x, self.group)
        # A negative dimension would name another one after unflatten.
        dim = dim % x.dim()
        return x.unflatten(dim, (-1, self.group)).sort(dim=dim + 1).values.flatten(dim, dim + 1)

    def extra_repr(self) -> str:
        return f"group={self.group}"


class MaxMin(nn.Module):
    """The channels' first half a and second half b → (max(a, b), min(a, b)); same shape. Source: Anil, Lucas & Grosse 2019."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, _check_divisible(x, 2))
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=channel_dimension(x))


class Householder(nn.Module):
    """Each pair z of channels (first half, second half) is kept where ⟨v, z⟩ ≥ 0 and reflected, z − 2⟨v, z⟩v, elsewhere; same shape.

    v = (sin ½θ, −cos ½θ), with one learned angle θ per pair (channels/2,); θ = π/2 to start with, which is MaxMin.
    Source: Singla, Singla & Feizi 2022, Improved deterministic l2 robustness, equation 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise BadInput(f"expected an even number of channels, got {channels}; pairs are reflected")
        self.angle = nn.Parameter(torch.full((channels // 2,), torch.pi / 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dim = channel_dimension(x)
        if x.shape[dim] != 2 * len(self.angle):
            raise BadInput(f"expected {2 * len(self.angle)} channels, got {x.shape[dim]} in {tuple(x.shape)}; build the layer for that width")
        # Sine and cosine in float64: rounded once into the dtype of x, they are off by half an ulp.
        half = self.angle.double() / 2
        shape = (-1, 1, 1) if dim == 1 else (-1,)
        sin, cos = half.sin().to(x.dtype).view(shape), half.cos().to(x.dtype).view(shape)
        a, b = x.chunk(2, dim)
        overshoot = 2 * torch.relu(b * cos - a * sin)
        return torch.cat([a + overshoot * sin, b - overshoot * cos], dim=dim)

    def extra_repr(self) -> str:
        return f"channels={2 * len(self.angle)}"
