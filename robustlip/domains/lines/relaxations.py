"""Elementwise activations: what of them is proved on an interval. All float64, all rounded outward.

For a curve φ on [l, u]:
- `band`: l' ≤ φ ≤ u'. ReLU, tanh, sigmoid rise; GELU and SiLU fall to one minimum and rise from there, so their maximum is at an end, and
  their minimum at an end too, or the global one where the interval may hold its place.
- `lines`: s z + t_lower ≤ φ(z) ≤ s' z + t_upper. ReLU: the chord above, 0 or z below. Smooth curves: one slope s for both, that of the chord, and
  the extremes of ψ = φ − s z from a grid: between neighbours at distance w, ψ differs from its chord by at most sup|φ''| w²/8.
- `slopes`: a ≤ (φ(z) − φ(z₀))/(z − z₀) ≤ b for all z ≠ z₀ in the interval and all z₀ in one of its own. ReLU: a secant from z₀ > 0 to −d'
  is z₀/(z₀ + d'), and so on; smooth curves: the extremes of φ', from a grid of φ', which changes by at most sup|φ''| w/2 within half a cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlip.numerics.rounding import U64
from robustlip.ops import elementwise_of
from robustlip.ops.elementwise import FUNCTION_ULPS

POINTS = 33  # of a grid over an interval

Lines = tuple[Tensor, Tensor, Tensor, Tensor]


def _rounding(*parts: Tensor) -> Tensor:
    """More than a short formula with these terms can have lost."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + part.abs()
    return (2 * FUNCTION_ULPS + 16) * U64 * total + 1e-300


@dataclass(frozen=True)
class Curve:
    """lipschitz ≥ sup|φ'|, at_zero = φ(0)."""

    lipschitz: float
    at_zero: float

    def value(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def band(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        """(s_lower, t_lower, s_upper, t_upper)."""
        raise NotImplementedError

    def slopes(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of the secants from z₀ in the interval `centre`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Relu(Curve):
    def value(self, z: Tensor) -> Tensor:
        return z.clamp_min(0.0)

    def band(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low.clamp_min(0.0), high.clamp_min(0.0)

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        zero, one = torch.zeros_like(low), torch.ones_like(low)
        crossing = (low < 0) & (high > 0)
        chord = torch.where(crossing, high / (high - low).clamp_min(1e-300), (low >= 0).double())
        # The intercept by both ends, so that a rounded slope still makes a line above both: convexity does the rest.
        top = torch.where(crossing, torch.maximum(-chord * low, high - chord * high) + 4 * U64 * (high - low), zero)
        below = torch.where(crossing, (high > -low).double(), chord)
        return below * one, zero, chord, top

    def slopes(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        # From z₀ > 0 the flattest secant is the longest one to the left; from z₀ ≤ 0 the steepest is the longest one to the right.
        first, last = centre
        one, zero = torch.ones_like(low), torch.zeros_like(low)
        up = torch.where(last > 0, one, (high.clamp_min(0.0) / (high - last).clamp_min(1e-300)).clamp(0, 1))
        left = torch.where(low < 0, (first / (first - low).clamp_min(1e-300)).clamp(0, 1), one)
        down = torch.where(first > 0, left, zero)
        return (down * (1 - 8 * U64)).clamp_min(0.0), (up * (1 + 8 * U64)).clamp_max(1.0)


@dataclass(frozen=True)
class Smooth(Curve):
    """curvature ≥ sup|φ''|; lowest: (place, value) of the global minimum, each rounded outward by `slack`, or None for rising curves."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    curvature: float
    lowest: tuple[float, float] | None

    def value(self, z: Tensor) -> Tensor:
        return self.function(z)

    def band(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.value(low), self.value(high)
        least = torch.minimum(a, b)
        if self.lowest is not None:
            place, value = self.lowest
            holds = (low <= place + 1e-3) & (high >= place - 1e-3)
            least = torch.where(holds, torch.full_like(least, value), least)
        slack = _rounding(a, b, low, high)
        return least - slack, torch.maximum(a, b) + slack

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Points (POINTS, …) from low to high, and the distance of neighbours, rounded up."""
        share = torch.linspace(0, 1, POINTS, dtype=low.dtype, device=low.device).view(-1, *[1] * low.dim())
        width = (high - low).clamp_min(0.0)
        grid = torch.minimum(low + share * width, high)
        grid[-1] = high
        return grid, width / (POINTS - 1) * (1 + 1e-9) + 8 * U64 * (low.abs() + high.abs())

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        grid, width = self._grid(low, high)
        values = self.value(grid)
        span = high - low
        chord = torch.where(span > 1e-12, (values[-1] - values[0]) / span.clamp_min(1e-12), self.derivative(low))
        chord = chord.clamp(-self.lipschitz, self.lipschitz)
        rest = values - chord * grid
        # |ψ − chord of ψ| ≤ sup|φ''| w²/8 between neighbours; never more than what a slope of at most 2·lipschitz can reach in half a cell.
        sag = torch.minimum(self.curvature * width.square() / 8, self.lipschitz * width)
        slack = _rounding(values.abs().amax(0), chord * low, chord * high, low, high) + sag
        return chord, rest.amin(0) - slack, chord, rest.amax(0) + slack

    def slopes(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        grid, width = self._grid(torch.minimum(low, centre[0]), torch.maximum(high, centre[1]))
        values = self.derivative(grid)
        slack = self.curvature * width / 2 + 1e-12
        return (values.amin(0) - slack).clamp_min(-self.lipschitz), (values.amax(0) + slack).clamp_max(self.lipschitz)


RELU = Relu(1.0, 0.0)


def curve_of(layer: nn.Module) -> Curve:
    """The curve of an elementwise layer. Raises UnsupportedLayer for any other."""
    facts = elementwise_of(layer)
    if facts.curvature is None:
        return RELU
    by = facts.divisor
    if by == 1.0:
        return Smooth(facts.steepest, facts.at_zero, facts.value, facts.derivative, facts.curvature, facts.lowest)
    more = (1 + 1e-12) / by  # the quotients round
    lowest = None if facts.lowest is None else (facts.lowest[0], facts.lowest[1] / by * (1 + 1e-12))
    return Smooth(
        facts.steepest * more, facts.at_zero / by, lambda z: facts.value(z) / by, lambda z: facts.derivative(z) / by,
        facts.curvature * more, lowest,
    )  # fmt: skip
