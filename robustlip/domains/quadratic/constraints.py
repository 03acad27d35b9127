"""Quadratic constraints of activations: the set of output differences for a given input difference of any two points.

An activation φ on ℝⁿ is described by matrices D (n, n), E (p, n), R (n, p) and groups of the p coordinates. For any two points, with v the difference
of inputs and δ the difference of outputs, there is a w ∈ ℝᵖ with

    δ = Dv + Rw,     ‖w_g‖ ≤ ‖(Ev)_g‖ for every group g.                                                                        (QC)

So Σ_g λ_g(‖(Ev)_g‖² − ‖w_g‖²) ≥ 0 for all multipliers λ ≥ 0: one multiplier per group, without coupling between groups. (The coupling of
LipSDP-Network in Fazlyab et al. 2019 is false for slope-restricted activations, Pauli et al. 2021; (QC) cannot express it.) Proofs:

- Elementwise with slopes in [α, β]: δ_i/v_i ∈ [α, β], so |δ_i − m v_i| ≤ r|v_i| with m = (α + β)/2, r = (β − α)/2; D = m, E = 1, R = r.
- MaxMin and GroupSort(2) on a pair (a, b): max + min = a + b, and max − min = |a − b| changes by at most the change of a − b. With z = v_a − v_b and
  w the change of |a − b|, the outputs are (v_a + v_b)/2 ± w/2 with |w| ≤ |z|.
- GroupSort(g): the sum of a group is kept, and sorting is 1-Lipschitz in ℓ2 (rearrangement inequality). With P = I − 11ᵀ/g:
  ‖Pδ‖² = ‖δ‖² − (1ᵀδ)²/g ≤ ‖v‖² − (1ᵀv)²/g = ‖Pv‖²; D = 11ᵀ/g, E = R = P, w = Pδ, one group for each sorted group.
- Householder on a pair z with unit vector u: ⟨u, z⟩ becomes |⟨u, z⟩| and the rest stays; D = I − uuᵀ, E = uᵀ, R = u.

These are in essence the constraints of Pauli et al. 2024 (sum kept, slope of the difference in [−1, 1]). MaxMin needs no more, because max − min is
an elementwise |·|.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.errors import UnsupportedLayer
from robustlip.layers import GroupSort, Householder, MaxMin
from robustlip.numerics.enclosures import SparseRows
from robustlip.numerics.rounding import U64
from robustlip.ops import elementwise_of, is_elementwise


@dataclass(frozen=True)
class QuadraticConstraint:
    """(QC) of the module's docstring. keep: D, read: E, write: R. group: int64 (p,), the multiplier of each coordinate.

    fast: if λ_g = fast·γ for all groups and γ ≥ λ_max(G) (input differences v with vvᵀ ⪯ sG), outputs satisfy δδᵀ ⪯ s·slope²·γI up to a relative
    1e-6: the closed form of ECLipsE-Fast.
    """

    keep: SparseRows
    read: SparseRows
    write: SparseRows
    group: Tensor
    fast: float

    @property
    def groups(self) -> int:
        return int(self.group.max()) + 1


# For sorting and reflecting layers the closed form holds only in the limit λ → γ, where Λ − EGEᵀ is singular.
_ABOVE = 1 + 1e-6


def slopes(layer: nn.Module) -> tuple[float, float] | None:
    """(m, r): every slope of an elementwise activation lies in [m − r, m + r], r rounded up; None for other layers."""
    if not is_elementwise(layer):
        return None
    facts = elementwise_of(layer)
    low, high = (Fraction(s) / Fraction(facts.divisor) for s in facts.slope)
    middle = float((low + high) / 2)
    exact = max(high - Fraction(middle), Fraction(middle) - low)
    reach = float(exact)
    return middle, reach if Fraction(reach) >= exact else math.nextafter(reach, math.inf)


def _rows(index: Tensor, coefficient: Tensor, width: int, error: float = 0.0) -> SparseRows:
    coefficient = coefficient.double().expand(index.shape).contiguous()
    return SparseRows(index, coefficient, torch.full_like(coefficient, error), width)


def elementwise(middle: float, reach: float, width: int) -> QuadraticConstraint:
    """Slopes in [middle − reach, middle + reach], reach > 0, on ℝ^width."""
    each = torch.arange(width)[:, None]
    keep, read, write = (_rows(each, torch.tensor(value), width) for value in (middle, 1.0, reach))
    return QuadraticConstraint(keep, read, write, torch.arange(width), max(1 + abs(middle) / reach, _ABOVE))


def _pairs(first: Tensor, second: Tensor) -> QuadraticConstraint:
    """Outputs mean ± half the absolute difference of a pair: MaxMin and GroupSort(2)."""
    count = len(first)
    width = 2 * count
    place = torch.empty(width, dtype=torch.int64)
    place[first] = place[second] = torch.arange(count)
    sign = torch.empty(width, dtype=torch.float64)
    sign[first], sign[second] = 0.5, -0.5
    both = torch.stack([first, second], 1)
    keep = _rows(both[place], torch.tensor(0.5), width)
    read = _rows(both, torch.tensor([1.0, -1.0]), width)
    return QuadraticConstraint(keep, read, _rows(place[:, None], sign[:, None], count), torch.arange(count), 2 * _ABOVE)


def _sorted(size: int, width: int) -> QuadraticConstraint:
    group = torch.arange(width) // size
    members = group[:, None] * size + torch.arange(size)
    mean = torch.full((width, size), 1.0 / size, dtype=torch.float64)
    centred = (members == torch.arange(width)[:, None]).double() - mean
    keep, centre = _rows(members, mean, width, 2 * U64), _rows(members, centred, width, 4 * U64)
    return QuadraticConstraint(keep, centre, centre, group, _ABOVE)


def _reflected(angle: Tensor) -> QuadraticConstraint:
    half = angle.detach().double().cpu() / 2
    sin, cos = half.sin(), half.cos()
    count = len(half)
    width = 2 * count
    place = torch.arange(width) % count
    both = torch.stack([torch.arange(count), torch.arange(count) + count], 1)
    unit = torch.stack([sin, -cos], 1)
    rest = torch.cat([torch.stack([cos * cos, sin * cos], 1), torch.stack([sin * cos, sin * sin], 1)])
    # The error of sine and cosine is below 2 ulp, that of their products below 8.
    keep, read = _rows(both[place], rest, width, 16 * U64), _rows(both, unit, width, 4 * U64)
    write = _rows(place[:, None], unit.mT.reshape(-1, 1), count, 4 * U64)
    return QuadraticConstraint(keep, read, write, torch.arange(count), _ABOVE)


def has_constraint(layer: nn.Module) -> bool:
    """Whether `constraint_of` has a proof for this layer."""
    return slopes(layer) is not None or type(layer) in (MaxMin, GroupSort, Householder)


def constraint_of(layer: Any, width: int) -> QuadraticConstraint | None:
    """The constraint of an activation on ℝ^width; None where it is the identity. Raises UnsupportedLayer for layers without one."""
    slope = slopes(layer)
    if slope is not None:
        return elementwise(*slope, width)
    if type(layer) is Householder:
        return _reflected(layer.angle)
    if type(layer) is MaxMin:
        return _pairs(torch.arange(width // 2), torch.arange(width // 2) + width // 2)
    if type(layer) is not GroupSort:
        raise UnsupportedLayer(f"expected an activation with a proved quadratic constraint, got {type(layer).__name__}; use method='global'")
    if layer.group == 1:
        return None
    return _pairs(torch.arange(0, width, 2), torch.arange(1, width, 2)) if layer.group == 2 else _sorted(layer.group, width)
