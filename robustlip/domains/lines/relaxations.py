"""Elementwise activations: what of them is proved on an interval. All float64, all rounded outward.

For a curve φ on [l, u]:
- `band`: l' ≤ φ ≤ u'. A curve rises, or falls to one minimum and rises from there (GELU, SiLU, |z|), so its maximum is at an end, and its minimum at
  an end too, or the global one where the interval may hold its place. Piecewise linear ones: the extremes of their corners.
- `lines`: s z + t_lower ≤ φ(z) ≤ s' z + t_upper. ReLU: the chord above, 0 or z below. Piecewise linear curves: for a given slope the intercept is an
  extreme of φ − s z at a corner or an end, and of all lines above φ the one that is least in the middle of [l, u] supports the concave envelope
  there, whose edges are secants of two corners: the best of those, which has the least area. Smooth curves: one slope s for both, that of the
  chord, and the extremes of ψ = φ − s z from a grid that holds all kinks: between neighbours at distance w, ψ differs from its chord by at most
  sup|φ''| w²/8.
- `slopes`: a ≤ (φ(z) − φ(z₀))/(z − z₀) ≤ b for all z ≠ z₀ in the interval and all z₀ in one of its own. ReLU: a secant from z₀ > 0 to −d'
  is z₀/(z₀ + d'), and so on. Piecewise linear curves: with z on one piece and z₀ on another a secant is monotone in each, so its extremes are at
  corners and ends; on one piece it is the piece's slope. Smooth curves: the extremes of φ', from a grid of φ', which changes by at most
  sup|φ''| w/2 within half a cell, and its two slopes at each kink.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from robustlip.numerics.rounding import U64
from robustlip.ops import elementwise_of
from robustlip.ops.elementwise import FUNCTION_ULPS

POINTS = 33  # of a grid over an interval

Lines = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Cross:
    """Beside the lines of a curve: slope·z_p(n) is added to both lines of number n. slope (…, m); partner p (m,), of different n different."""

    slope: Tensor
    partner: Tensor

    def added(self, rows: Tensor, linear: Tensor) -> Tensor:
        """Coefficients (…, r, m) of what is behind the curve → what they add to those in front, beside the curve's own lines."""
        each = rows * torch.where(linear, 0.0, self.slope).unsqueeze(-2)
        return torch.zeros_like(each).index_add(-1, self.partner, each)


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

    def behind(self, size: Tensor, count: int) -> Tensor:
        """‖h‖₂ ≤ this for ‖z‖₂ ≤ size, of `count` numbers, some of which the curve leaves as they are."""
        return max(1.0, self.lipschitz) * size + abs(self.at_zero) * math.sqrt(count)

    def apart(self, gap: Tensor, size: Tensor) -> Tensor:
        """‖h' − h‖₂ ≤ this for ‖z' − z‖₂ ≤ gap and ‖z‖₂ ≤ size."""
        return max(1.0, self.lipschitz) * gap

    def across(self, low: Tensor, high: Tensor) -> Cross | None:
        """What a number's lines have of the number that it is multiplied with, None where there is none."""
        return None

    def secants_across(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
        """As `slopes`, of the number that it is multiplied with, None where there is none."""
        return None


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
class Pieces(Curve):
    """Piecewise linear: slope pieces[i] between places[i − 1] and places[i]; places in order."""

    function: Callable[[Tensor], Tensor]
    places: tuple[float, ...]
    pieces: tuple[float, ...]

    def value(self, z: Tensor) -> Tensor:
        return self.function(z)

    def _corners(self, low: Tensor, high: Tensor) -> list[Tensor]:
        """The ends and the kinks between them; kinks elsewhere count as the end that is nearer."""
        return [low, *(low.clamp_min(place).minimum(high) for place in self.places), high]

    def _secant(self, a: Tensor, b: Tensor) -> Tensor:
        """(φ(b) − φ(a))/(b − a) as the mean of the slopes between, NaN where a = b: relative to the largest slope there off by a few units."""
        ends = (-torch.inf, *self.places, torch.inf)
        total = torch.zeros_like(a)
        for slope, start, stop in zip(self.pieces, ends[:-1], ends[1:], strict=True):
            total = total + slope * (b.clamp(start, stop) - a.clamp(start, stop))
        return total / (b - a)

    def band(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        values = self.value(torch.stack(self._corners(low, high)))
        slack = _rounding(values[0], values[-1], low, high)
        return values.amin(0) - slack, values.amax(0) + slack

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        corners = torch.stack(self._corners(low, high))
        values, middle, size = self.value(corners), (low + high) / 2, torch.maximum(low.abs(), high.abs())
        slopes = torch.stack([self._secant(a, b) for a, b in combinations(corners, 2)])
        # Between two corners that are one there is no secant; any slope makes a line.
        slopes = torch.where(torch.isfinite(slopes), slopes, torch.full_like(slopes, self.pieces[0]))
        rest = values - slopes.unsqueeze(1) * corners
        slack = _rounding(values.abs().amax(0), slopes * size, size)
        bottom, top = rest.amin(1) - slack, rest.amax(1) + slack
        lower, upper = (slopes * middle + bottom).argmax(0, keepdim=True), (slopes * middle + top).argmin(0, keepdim=True)
        return slopes.gather(0, lower)[0], bottom.gather(0, lower)[0], slopes.gather(0, upper)[0], top.gather(0, upper)[0]

    def slopes(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        first, last = centre
        least, most = torch.full_like(low, torch.inf), torch.full_like(low, -torch.inf)
        ends = (-torch.inf, *self.places, torch.inf)
        for slope, start, stop in zip(self.pieces, ends[:-1], ends[1:], strict=True):
            both = (low <= stop) & (high >= start) & (first <= stop) & (last >= start)
            least, most = torch.where(both, least.clamp_max(slope), least), torch.where(both, most.clamp_min(slope), most)
        for z in self._corners(low, high):
            for z0 in self._corners(first, last):
                secant = self._secant(z0, z)
                least, most = torch.fmin(least, secant), torch.fmax(most, secant)
        slack = 16 * len(ends) * U64 * self.lipschitz
        return (least - slack).clamp_min(-self.lipschitz), (most + slack).clamp_max(self.lipschitz)


@dataclass(frozen=True)
class Smooth(Curve):
    """curvature ≥ sup|φ''| between kinks; lowest: (place, value) of the global minimum, each rounded outward by `slack`, or None for rising curves.
    kinks: (place, slope to the left, slope to the right)."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    curvature: float
    lowest: tuple[float, float] | None
    kinks: tuple[tuple[float, float, float], ...] = ()

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
        if self.kinks:
            places = torch.tensor([place for place, _, _ in self.kinks], dtype=low.dtype, device=low.device).view(-1, *[1] * low.dim())
            grid = torch.cat([torch.minimum(torch.maximum(places, low), high), grid])
        return grid, width / (POINTS - 1) * (1 + 1e-9) + 8 * U64 * (low.abs() + high.abs())

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        grid, width = self._grid(low, high)
        values = self.value(grid)
        span = high - low
        chord = torch.where(span > 1e-12, (values[-1] - values[-POINTS]) / span.clamp_min(1e-12), self.derivative(low))
        chord = chord.clamp(-self.lipschitz, self.lipschitz)
        rest = values - chord * grid
        # |ψ − chord of ψ| ≤ sup|φ''| w²/8 between neighbours; never more than what a slope of at most 2·lipschitz can reach in half a cell.
        sag = torch.minimum(self.curvature * width.square() / 8, self.lipschitz * width)
        slack = _rounding(values.abs().amax(0), chord * low, chord * high, low, high) + sag
        return chord, rest.amin(0) - slack, chord, rest.amax(0) + slack

    def slopes(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        grid, width = self._grid(torch.minimum(low, centre[0]), torch.maximum(high, centre[1]))
        values = self.derivative(grid)
        least, most = values.amin(0), values.amax(0)
        for place, left, right in self.kinks:
            inside = (grid[-POINTS] <= place) & (grid[-1] >= place)
            least = torch.where(inside, least.clamp_max(min(left, right)), least)
            most = torch.where(inside, most.clamp_min(max(left, right)), most)
        slack = self.curvature * width / 2 + 1e-12 * max(1.0, self.lipschitz / 32)  # and what float64 makes of φ'
        return (least - slack).clamp_min(-self.lipschitz), (most + slack).clamp_max(self.lipschitz)


@dataclass(frozen=True)
class Products(Curve):
    """z_n·z_p(n), p(n) ≠ n a number that stays as it is behind the curve, or p(n) = n, a square. docs/theory.md, section 9.

    On a box, with middles m and half widths w, the mean of McCormick's two planes below (above) is z_n m_p + z_p m_n − m_n m_p ∓ w_n w_p: it has the
    gradient at the middle, and both planes have its gap there. A square lies between its tangent there and its chord, which are parallel.
    From a point z⁰ on, z_n z_p − z⁰_n z⁰_p = ½(z_p + z⁰_p)(z_n − z⁰_n) + ½(z_n + z⁰_n)(z_p − z⁰_p).
    """

    partner: Tensor

    @property
    def _same(self) -> Tensor:
        return self.partner == torch.arange(len(self.partner), device=self.partner.device)

    def value(self, z: Tensor) -> Tensor:
        return z * z[..., self.partner]

    def band(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        other_low, other_high = low[..., self.partner], high[..., self.partner]
        corners = torch.stack([low * other_low, low * other_high, high * other_low, high * other_high])
        size = torch.maximum(low.abs(), high.abs()) * torch.maximum(other_low.abs(), other_high.abs())
        least, slack = corners.amin(0), _rounding(size)
        positive = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(corners[0], corners[3]))
        return torch.where(self._same, positive, least) - slack, corners.amax(0) + slack

    def _middle(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """(middles, half widths around them as they were computed)."""
        middle = (low + high) / 2
        return middle, torch.maximum(high - middle, middle - low).clamp_min(0.0) * (1 + 8 * U64)

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        middle, half = self._middle(low, high)
        other, wide = middle[..., self.partner], half[..., self.partner]
        slope = torch.where(self._same, 2 * middle, other)
        gap, size = half * wide, (middle.abs() + half) * (other.abs() + wide)
        slack = _rounding(size)
        return slope, -middle * other - torch.where(self._same, 0.0, gap) - slack, slope, -middle * other + gap + slack

    def across(self, low: Tensor, high: Tensor) -> Cross | None:
        middle, _ = self._middle(low, high)
        return Cross(torch.where(self._same, 0.0, middle), self.partner)

    def slopes(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        first, last = centre
        a, b = first + low, last + high
        least, most = torch.where(self._same, a, a[..., self.partner] / 2), torch.where(self._same, b, b[..., self.partner] / 2)
        slack = 4 * U64 * (a.abs() + b.abs() + a.abs()[..., self.partner] + b.abs()[..., self.partner])
        return least - slack, most + slack

    def secants_across(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
        first, last = centre
        a, b = torch.where(self._same, 0.0, (first + low) / 2), torch.where(self._same, 0.0, (last + high) / 2)
        slack = 4 * U64 * (a.abs() + b.abs())
        return a - slack, b + slack

    def behind(self, size: Tensor, count: int) -> Tensor:
        # Σ(z_n z_p)² ≤ ‖z‖⁴.
        return size + size.square()

    def apart(self, gap: Tensor, size: Tensor) -> Tensor:
        return (1 + 2 * size + gap) * gap


RELU = Relu(1.0, 0.0)


def curve_of(layer: nn.Module) -> Curve:
    """The curve of an elementwise layer. Raises UnsupportedLayer for any other."""
    facts = elementwise_of(layer)
    by, places = facts.divisor, tuple(kink.place for kink in facts.kinks)
    if by == 1.0 and facts.curvature == 0:
        pieces = (*[kink.left for kink in facts.kinks], facts.kinks[-1].right) if facts.kinks else (facts.slope[0],)
        return RELU if (places, pieces, facts.at_zero) == ((0.0,), (0.0, 1.0), 0.0) else Pieces(
            facts.steepest, facts.at_zero, facts.value, places, pieces
        )  # fmt: skip
    if by == 1.0:
        return Smooth(facts.steepest, facts.at_zero, facts.value, facts.derivative, facts.curvature, facts.lowest, facts.kinks)
    more = (1 + 1e-12) / by  # the quotients round
    lowest = None if facts.lowest is None else (facts.lowest[0], facts.lowest[1] / by * (1 + 1e-12))
    return Smooth(
        facts.steepest * more, facts.at_zero / by, lambda z: facts.value(z) / by, lambda z: facts.derivative(z) / by,
        facts.curvature * more, lowest, tuple((kink.place, kink.left / by, kink.right / by) for kink in facts.kinks),
    )  # fmt: skip
