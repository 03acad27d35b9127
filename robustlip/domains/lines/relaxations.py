"""Relaxations of activations: bounds of an elementwise function φ on an interval [l, u]. All in float64, rounded outward.

- `value_range`: bounds of the values φ(z). Smooth activations are increasing, or decrease to one minimum and increase from there (GELU, SiLU), so
  the maximum is at an end of the interval, and the minimum at an end or at the global minimum. Piecewise linear activations: the extreme values are
  at the ends and the breakpoints.
- `lines`: linear bounds s z + t_lower ≤ φ(z) ≤ s' z + t_upper. ReLU: the chord above, 0 or z below. Piecewise linear activations: for a given slope s
  the intercept is an extreme value of φ − s z, at an end or a breakpoint. The upper line is the one that is lowest at the middle of [l, u]; it
  supports the concave envelope there. The edges of the envelope are secants of two corners (ends or breakpoints), so only secant slopes are tried.
  This line has the least area. Smooth activations: both lines have the slope s of the chord, and the intercepts are the extreme values of
  ψ = φ − s z on a grid that contains all kinks. Between neighbours at distance w, ψ differs from its chord by at most sup|φ''| w²/8.
- `secant_slopes`: bounds a ≤ (φ(z) − φ(z₀))/(z − z₀) ≤ b for all z ≠ z₀ in [l, u] and all z₀ in a second interval. ReLU: in closed form, e.g. the
  secant from z₀ > 0 to −d' has slope z₀/(z₀ + d'). Piecewise linear activations: a secant between two pieces is monotone in both of its ends, so the
  extreme slopes are at ends and breakpoints; within one piece it is the slope of the piece. Smooth activations: the extreme values of φ' on a grid,
  where φ' changes by at most sup|φ''| w/2 within half a cell, and the two one-sided slopes at each kink.
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

POINTS = 33  # number of points of a grid over an interval

Lines = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PartnerLines:
    """Additional terms of the lines of a product: slope·z_p(n) is added to both lines of entry n. slope (…, m); the partners p (m,) are distinct."""

    slope: Tensor
    partner: Tensor

    def backward(self, rows: Tensor, linear: Tensor) -> Tensor:
        """From coefficients (…, r, m) of the activation's outputs to those that these terms add to the coefficients of its inputs."""
        each = rows * torch.where(linear, 0.0, self.slope).unsqueeze(-2)
        return torch.zeros_like(each).index_add(-1, self.partner, each)


def _rounding(*parts: Tensor) -> Tensor:
    """More than the rounding error of a short formula with these terms."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + part.abs()
    return (2 * FUNCTION_ULPS + 16) * U64 * total + 1e-300


@dataclass(frozen=True)
class Activation:
    """An elementwise function φ, applied to z (…, m). lipschitz ≥ sup|φ'|; at_zero = φ(0). Bounds are for low ≤ z ≤ high, tensors (…, m)."""

    lipschitz: float
    at_zero: float

    def value(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def value_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        """(s_lower, t_lower, s_upper, t_upper), each (…, m): s_lower z + t_lower ≤ φ(z) ≤ s_upper z + t_upper."""
        raise NotImplementedError

    def secant_slopes(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b), each (…, m): a ≤ (φ(z) − φ(z₀))/(z − z₀) ≤ b for every z₀ in the interval `centre`."""
        raise NotImplementedError

    def output_norm(self, size: Tensor, count: int) -> Tensor:
        """‖h‖₂ ≤ this for ‖z‖₂ ≤ size; z has `count` entries, some of which may pass unchanged."""
        return max(1.0, self.lipschitz) * size + abs(self.at_zero) * math.sqrt(count)

    def output_change(self, gap: Tensor, size: Tensor) -> Tensor:
        """‖h' − h‖₂ ≤ this for ‖z' − z‖₂ ≤ gap and ‖z‖₂ ≤ size."""
        return max(1.0, self.lipschitz) * gap

    def partner_lines(self, low: Tensor, high: Tensor) -> PartnerLines | None:
        """The terms of the lines in the entry's partner, None for a function of a single entry."""
        return None

    def partner_slopes(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
        """As `secant_slopes`, with respect to the entry's partner; None for a function of a single entry."""
        return None


@dataclass(frozen=True)
class Relu(Activation):
    def value(self, z: Tensor) -> Tensor:
        return z.clamp_min(0.0)

    def value_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low.clamp_min(0.0), high.clamp_min(0.0)

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        zero, one = torch.zeros_like(low), torch.ones_like(low)
        crossing = (low < 0) & (high > 0)
        chord = torch.where(crossing, high / (high - low).clamp_min(1e-300), (low >= 0).double())
        # The intercept is valid at both ends, so a rounded slope still gives a line above both. By convexity it is above ReLU in between.
        top = torch.where(crossing, torch.maximum(-chord * low, high - chord * high) + 4 * U64 * (high - low), zero)
        below = torch.where(crossing, (high > -low).double(), chord)
        return below * one, zero, chord, top

    def secant_slopes(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        # From z₀ > 0 the smallest slope is that of the longest secant to the left; from z₀ ≤ 0 the largest slope is that of the longest secant to the
        # right.
        first, last = centre
        one, zero = torch.ones_like(low), torch.zeros_like(low)
        up = torch.where(last > 0, one, (high.clamp_min(0.0) / (high - last).clamp_min(1e-300)).clamp(0, 1))
        left = torch.where(low < 0, (first / (first - low).clamp_min(1e-300)).clamp(0, 1), one)
        down = torch.where(first > 0, left, zero)
        return (down * (1 - 8 * U64)).clamp_min(0.0), (up * (1 + 8 * U64)).clamp_max(1.0)


@dataclass(frozen=True)
class PiecewiseLinear(Activation):
    """A continuous piecewise linear function: slope piece_slopes[i] between breakpoints[i − 1] and breakpoints[i]; breakpoints increase."""

    function: Callable[[Tensor], Tensor]
    breakpoints: tuple[float, ...]
    piece_slopes: tuple[float, ...]

    def value(self, z: Tensor) -> Tensor:
        return self.function(z)

    def _corners(self, low: Tensor, high: Tensor) -> list[Tensor]:
        """The ends of the interval and its breakpoints; a breakpoint outside of it is replaced by the nearer end."""
        return [low, *(low.clamp_min(place).minimum(high) for place in self.breakpoints), high]

    def _secant(self, a: Tensor, b: Tensor) -> Tensor:
        """(φ(b) − φ(a))/(b − a), as the mean of the slopes in between; NaN where a = b. The error is a few units of the largest slope."""
        ends = (-torch.inf, *self.breakpoints, torch.inf)
        total = torch.zeros_like(a)
        for slope, start, stop in zip(self.piece_slopes, ends[:-1], ends[1:], strict=True):
            total = total + slope * (b.clamp(start, stop) - a.clamp(start, stop))
        return total / (b - a)

    def value_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        values = self.value(torch.stack(self._corners(low, high)))
        slack = _rounding(values[0], values[-1], low, high)
        return values.amin(0) - slack, values.amax(0) + slack

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        corners = torch.stack(self._corners(low, high))
        values, middle, size = self.value(corners), (low + high) / 2, torch.maximum(low.abs(), high.abs())
        secant_slopes = torch.stack([self._secant(a, b) for a, b in combinations(corners, 2)])
        # Two equal corners have no secant; a line of any slope is valid there.
        secant_slopes = torch.where(torch.isfinite(secant_slopes), secant_slopes, torch.full_like(secant_slopes, self.piece_slopes[0]))
        rest = values - secant_slopes.unsqueeze(1) * corners
        slack = _rounding(values.abs().amax(0), secant_slopes * size, size)
        bottom, top = rest.amin(1) - slack, rest.amax(1) + slack
        lower, upper = (secant_slopes * middle + bottom).argmax(0, keepdim=True), (secant_slopes * middle + top).argmin(0, keepdim=True)
        return secant_slopes.gather(0, lower)[0], bottom.gather(0, lower)[0], secant_slopes.gather(0, upper)[0], top.gather(0, upper)[0]

    def secant_slopes(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        first, last = centre
        least, most = torch.full_like(low, torch.inf), torch.full_like(low, -torch.inf)
        ends = (-torch.inf, *self.breakpoints, torch.inf)
        for slope, start, stop in zip(self.piece_slopes, ends[:-1], ends[1:], strict=True):
            both = (low <= stop) & (high >= start) & (first <= stop) & (last >= start)
            least, most = torch.where(both, least.clamp_max(slope), least), torch.where(both, most.clamp_min(slope), most)
        for z in self._corners(low, high):
            for z0 in self._corners(first, last):
                secant = self._secant(z0, z)
                least, most = torch.fmin(least, secant), torch.fmax(most, secant)
        slack = 16 * len(ends) * U64 * self.lipschitz
        return (least - slack).clamp_min(-self.lipschitz), (most + slack).clamp_max(self.lipschitz)


@dataclass(frozen=True)
class Smooth(Activation):
    """A smooth function, but for kinks.

    curvature ≥ sup|φ''| between kinks. lowest: (place, value) of the global minimum, the value rounded down; None for increasing functions.
    kinks: (place, slope on the left, slope on the right).
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    curvature: float
    lowest: tuple[float, float] | None
    kinks: tuple[tuple[float, float, float], ...] = ()

    def value(self, z: Tensor) -> Tensor:
        return self.function(z)

    def value_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.value(low), self.value(high)
        least = torch.minimum(a, b)
        if self.lowest is not None:
            place, value = self.lowest
            holds = (low <= place + 1e-3) & (high >= place - 1e-3)
            least = torch.where(holds, torch.full_like(least, value), least)
        slack = _rounding(a, b, low, high)
        return least - slack, torch.maximum(a, b) + slack

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Grid points (≥ POINTS, …) from low to high with all kinks, and the distance of neighbours, rounded up."""
        share = torch.linspace(0, 1, POINTS, dtype=low.dtype, device=low.device).view(-1, *[1] * low.dim())
        width = (high - low).clamp_min(0.0)
        grid = torch.minimum(low + share * width, high)
        grid[-1] = high
        if self.kinks:
            breakpoints = torch.tensor([place for place, _, _ in self.kinks], dtype=low.dtype, device=low.device).view(-1, *[1] * low.dim())
            grid = torch.cat([torch.minimum(torch.maximum(breakpoints, low), high), grid])
        return grid, width / (POINTS - 1) * (1 + 1e-9) + 8 * U64 * (low.abs() + high.abs())

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        grid, width = self._grid(low, high)
        values = self.value(grid)
        span = high - low
        chord = torch.where(span > 1e-12, (values[-1] - values[-POINTS]) / span.clamp_min(1e-12), self.derivative(low))
        chord = chord.clamp(-self.lipschitz, self.lipschitz)
        rest = values - chord * grid
        # |ψ − chord of ψ| ≤ sup|φ''| w²/8 between neighbours. It is also at most half a cell times the largest slope of ψ, 2·lipschitz.
        sag = torch.minimum(self.curvature * width.square() / 8, self.lipschitz * width)
        slack = _rounding(values.abs().amax(0), chord * low, chord * high, low, high) + sag
        return chord, rest.amin(0) - slack, chord, rest.amax(0) + slack

    def secant_slopes(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        grid, width = self._grid(torch.minimum(low, centre[0]), torch.maximum(high, centre[1]))
        values = self.derivative(grid)
        least, most = values.amin(0), values.amax(0)
        for place, left, right in self.kinks:
            inside = (grid[-POINTS] <= place) & (grid[-1] >= place)
            least = torch.where(inside, least.clamp_max(min(left, right)), least)
            most = torch.where(inside, most.clamp_min(max(left, right)), most)
        slack = self.curvature * width / 2 + 1e-12 * max(1.0, self.lipschitz / 32)  # the second term bounds the float64 error of φ'
        return (least - slack).clamp_min(-self.lipschitz), (most + slack).clamp_max(self.lipschitz)


@dataclass(frozen=True)
class Products(Activation):
    """Products z_n·z_p(n). The partner p(n) ≠ n is an entry that passes unchanged, or p(n) = n, a square. docs/theory.md, section 9.

    On a box with midpoints m and half-widths w, the mean of McCormick's two lower (upper) planes is z_n m_p + z_p m_n − m_n m_p ∓ w_n w_p. Its slopes
    are the gradient at the midpoint, where both planes have the same distance from the product. A square lies between its tangent at the midpoint and
    its chord, which are parallel. Secants: z_n z_p − z⁰_n z⁰_p = ½(z_p + z⁰_p)(z_n − z⁰_n) + ½(z_n + z⁰_n)(z_p − z⁰_p).
    """

    partner: Tensor

    @property
    def _same(self) -> Tensor:
        return self.partner == torch.arange(len(self.partner), device=self.partner.device)

    def value(self, z: Tensor) -> Tensor:
        return z * z[..., self.partner]

    def value_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        other_low, other_high = low[..., self.partner], high[..., self.partner]
        corners = torch.stack([low * other_low, low * other_high, high * other_low, high * other_high])
        size = torch.maximum(low.abs(), high.abs()) * torch.maximum(other_low.abs(), other_high.abs())
        least, slack = corners.amin(0), _rounding(size)
        positive = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(corners[0], corners[3]))
        return torch.where(self._same, positive, least) - slack, corners.amax(0) + slack

    def _middle(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """(midpoints, half-widths around the computed midpoints)."""
        middle = (low + high) / 2
        return middle, torch.maximum(high - middle, middle - low).clamp_min(0.0) * (1 + 8 * U64)

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        middle, half = self._middle(low, high)
        other, wide = middle[..., self.partner], half[..., self.partner]
        slope = torch.where(self._same, 2 * middle, other)
        gap, size = half * wide, (middle.abs() + half) * (other.abs() + wide)
        slack = _rounding(size)
        return slope, -middle * other - torch.where(self._same, 0.0, gap) - slack, slope, -middle * other + gap + slack

    def partner_lines(self, low: Tensor, high: Tensor) -> PartnerLines | None:
        middle, _ = self._middle(low, high)
        return PartnerLines(torch.where(self._same, 0.0, middle), self.partner)

    def secant_slopes(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        first, last = centre
        a, b = first + low, last + high
        least, most = torch.where(self._same, a, a[..., self.partner] / 2), torch.where(self._same, b, b[..., self.partner] / 2)
        slack = 4 * U64 * (a.abs() + b.abs() + a.abs()[..., self.partner] + b.abs()[..., self.partner])
        return least - slack, most + slack

    def partner_slopes(self, centre: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
        first, last = centre
        a, b = torch.where(self._same, 0.0, (first + low) / 2), torch.where(self._same, 0.0, (last + high) / 2)
        slack = 4 * U64 * (a.abs() + b.abs())
        return a - slack, b + slack

    def output_norm(self, size: Tensor, count: int) -> Tensor:
        # Σ(z_n z_p)² ≤ ‖z‖⁴.
        return size + size.square()

    def output_change(self, gap: Tensor, size: Tensor) -> Tensor:
        return (1 + 2 * size + gap) * gap


RELU = Relu(1.0, 0.0)


def activation_of(layer: nn.Module) -> Activation:
    """The relaxation of an elementwise layer. Raises UnsupportedLayer for any other layer."""
    facts = elementwise_of(layer)
    by, breakpoints = facts.divisor, tuple(kink.place for kink in facts.kinks)
    if by == 1.0 and facts.curvature == 0:
        piece_slopes = (*[kink.left for kink in facts.kinks], facts.kinks[-1].right) if facts.kinks else (facts.slope[0],)
        return RELU if (breakpoints, piece_slopes, facts.at_zero) == ((0.0,), (0.0, 1.0), 0.0) else PiecewiseLinear(
            facts.steepest, facts.at_zero, facts.value, breakpoints, piece_slopes
        )  # fmt: skip
    if by == 1.0:
        return Smooth(facts.steepest, facts.at_zero, facts.value, facts.derivative, facts.curvature, facts.lowest, facts.kinks)
    more = (1 + 1e-12) / by  # covers the rounding of the quotients
    lowest = None if facts.lowest is None else (facts.lowest[0], facts.lowest[1] / by * (1 + 1e-12))
    return Smooth(
        facts.steepest * more, facts.at_zero / by, lambda z: facts.value(z) / by, lambda z: facts.derivative(z) / by,
        facts.curvature * more, lowest, tuple((kink.place, kink.left / by, kink.right / by) for kink in facts.kinks),
    )  # fmt: skip
