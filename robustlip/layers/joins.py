"""Joins of branches with one input: sum, concatenation, product, maximum, minimum; and slices of channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from robustlip.errors import BadInput
from robustlip.layers.sorting import channel_dimension


class Branching(nn.Module):
    """Branches with the same input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        if len(branches) < 1:
            raise BadInput(f"expected at least one branch in {type(self).__name__}, got none; name what it joins")
        for i, branch in enumerate(branches):
            self.add_module(f"branch{i}", branch)

    def check_in_place(self) -> None:
        """Raises BadInput for an in-place layer in a branch: the next branch would read what it wrote."""
        if any(getattr(module, "inplace", False) is True for module in self.modules()):
            name = type(self).__name__
            raise BadInput(f"expected branches of {name} out of place, got a layer with inplace=True, whose input others read; leave inplace out")

    @property
    def branches(self) -> tuple[nn.Module, ...]:
        return tuple(module for module in self._modules.values() if module is not None)


class Sum(Branching):
    """x → Σ_i weight_i·branch_i(x); all branches put out the same shape. `Residual` is the sum of x and one branch.

    weights: one number a branch, 1 for all unless given.
    """

    def __init__(self, *branches: nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__(*branches)
        self.weights = tuple(float(w) for w in (weights if weights is not None else [1.0] * len(branches)))
        if len(self.weights) != len(branches):
            raise BadInput(f"expected a weight for each of {len(branches)} branches, got {len(self.weights)}; give as many")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.check_in_place()
        parts = [weight * branch(x) for weight, branch in zip(self.weights, self.branches, strict=True)]
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) > 1:  # torch would broadcast
            raise BadInput(f"expected branches that put out one shape, got {sorted(shapes)}; match the widths")
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


class Concatenate(Branching):
    """x → (branch_1(x), branch_2(x), …) concatenated: along channels of images (N, C, H, W), along the last dimension otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.check_in_place()
        parts = [branch(x) for branch in self.branches]
        return torch.cat(parts, dim=channel_dimension(parts[0]))


class _Two(Branching):
    """Two branches, joined entry by entry."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__(first, second)

    def both(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.check_in_place()
        first, second = self.branches
        return first(x), second(x)


class Product(_Two):
    """x → a(x)·b(x), entry by entry, e.g. gates. Both have one shape, or b has one value per channel, (N, C, 1, 1) against (N, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.both(x)
        if a.shape != b.shape and not (a.dim() == 4 and b.shape == (*a.shape[:2], 1, 1)):  # torch would broadcast
            raise BadInput(
                f"expected branches of Product that put out one shape, or (N, C, 1, 1) after the second of images, got {tuple(a.shape)} and "
                f"{tuple(b.shape)}; match them"
            )
        return a * b


class Maximum(_Two):
    """x → max(a(x), b(x)), entry by entry; both have one shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.maximum(*self.both(x))

    def both(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = super().both(x)
        if a.shape != b.shape:  # torch would broadcast
            raise BadInput(
                f"expected branches of {type(self).__name__} that put out one shape, got {tuple(a.shape)} and {tuple(b.shape)}; match the widths"
            )
        return a, b


class Minimum(Maximum):
    """x → min(a(x), b(x)), entry by entry; both have one shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.minimum(*self.both(x))


class Channels(nn.Module):
    """The channels start … stop − 1: along C for images (N, C, H, W), along the last dimension otherwise. 0 ≤ start < stop."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        if not 0 <= start < stop:
            raise BadInput(f"expected channels from start to stop with 0 <= start < stop, got {start} and {stop}; order them")
        self.start, self.stop = int(start), int(stop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dim = channel_dimension(x)
        if self.stop > x.shape[dim]:
            raise BadInput(f"expected at least {self.stop} channels, got {x.shape[dim]} in {tuple(x.shape)}; change the slice")
        return x.narrow(dim, self.start, self.stop - self.start)

    def extra_repr(self) -> str:
        return f"{self.start}, {self.stop}"
