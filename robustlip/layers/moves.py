"""Layers that only rearrange the entries of a sample. Dimensions are counted as in torch; dimension 0 is that of the samples and stays."""

from __future__ import annotations

import torch
from torch import nn

from robustlip.errors import BadInput


def _inside(dim: int, rank: int, name: str) -> int:
    """The dimension counted from the front. Raises BadInput for the samples' dimension and for one that does not exist."""
    at = dim + rank if dim < 0 else dim
    if not 0 < at < rank:
        raise BadInput(f"expected {name} along a dimension from 1 to {rank - 1} of values of {rank} dimensions, got {dim}; leave samples apart")
    return at


class View(nn.Module):
    """Reshapes samples: (N, …) → (N, *shape), entries in the same order."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        if not shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
            raise BadInput(f"expected the shape of a sample, sizes of at least 1, got {shape}; leave the samples' dimension out")
        self.shape = tuple(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), *self.shape)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.shape))


class Permute(nn.Module):
    """Permutes dimensions, the samples' first: Permute(0, 2, 1) turns tokens (N, T, D) into (N, D, T)."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        if sorted(dims) != list(range(len(dims))) or dims[:1] != (0,):
            raise BadInput(f"expected an order of dimensions 0, 1, … that begins with 0, got {dims}; leave samples apart")
        self.dims = tuple(dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != len(self.dims):
            raise BadInput(f"expected values of {len(self.dims)} dimensions before Permute, got {tuple(x.shape)}; change the order")
        return x.permute(self.dims)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.dims))


class Select(nn.Module):
    """One index of a dimension, which is removed: x.select(dim, index)."""

    def __init__(self, dim: int, index: int) -> None:
        super().__init__()
        self.dim, self.index = int(dim), int(index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.select(_inside(self.dim, x.dim(), "Select"), self.index)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.index}"


class Slice(nn.Module):
    """The indices start, start + step, … below stop of a dimension. 0 ≤ start < stop."""

    def __init__(self, dim: int, start: int, stop: int, step: int = 1) -> None:
        super().__init__()
        if not 0 <= start < stop or step < 1:
            raise BadInput(f"expected 0 <= start < stop and a step of at least 1 in Slice, got {start}, {stop}, {step}; order them")
        self.dim, self.start, self.stop, self.step = int(dim), int(start), int(stop), int(step)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dim = _inside(self.dim, x.dim(), "Slice")
        if self.stop > x.shape[dim]:
            raise BadInput(f"expected at least {self.stop} places along dimension {dim}, got {x.shape[dim]} in {tuple(x.shape)}; change the slice")
        # No step where there is none: the very operation that a captured model runs.
        places = slice(self.start, self.stop, self.step)
        return x[(slice(None),) * dim + (places,)]

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.start}, {self.stop}, {self.step}"


class Flip(nn.Module):
    """Reverses some dimensions: x.flip(dims)."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = tuple(int(d) for d in dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip([_inside(d, x.dim(), "Flip") for d in self.dims])

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.dims))
