"""Elementwise operations: facts of a function φ of one number. docs/theory.md, section 3.

The bounds of all domains (norm bounds, expansions, linear relaxations, quadratic constraints) follow from these facts, so a new operation needs only
its facts and one call of `register_elementwise`:

    facts = Elementwise(value=torch.atan, derivative=..., slope=(0.0, 1.0), curvature=0.6495191, executed=ulps(64))
    register_elementwise(MyAtan, lambda layer: facts)

tests/test_ops.py checks every registered operation: the extreme values of φ' and φ'', kinks, the minimum, the growth, and execution errors in each
dtype. This file has the class of facts and the facts of ReLU, tanh, the sigmoid, GELU and SiLU; piecewise.py (piecewise linear functions) and
smooth.py have others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers.activations import ScaledGELU
from robustlip.numerics.arithmetic import Arithmetic
from robustlip.plugins import plugins

# The largest error of torch's elementwise functions in any dtype, in units in the last place of |x| (not of the result). Its vectorised erf, tanh and
# exp have errors of 1 to 20 ulp (SLEEF and the flash kernel's exp_u20); 64 covers these and the products around them.
FUNCTION_ULPS = 64

Function = Callable[[Tensor], Tensor]
# (‖x‖₂ ≤ norm, √n for n entries, the arithmetic) → a bound of ‖fl(φ(x)) − φ(x)‖₂, without the rounding error of the divisor.
Executed = Callable[[Tensor, float, Arithmetic], Tensor]
# (|z|, reach) → (κ⁺, κ⁻) ≥ 0 with −½κ⁻Δ² ≤ φ(z + Δ) − φ(z) − φ'(z)Δ ≤ ½κ⁺Δ² for |Δ| ≤ reach, before the divisor.
LocalCurvature = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Kink(NamedTuple):
    """A jump of φ': its position, φ' on the left and φ' on the right of it."""

    place: float
    left: float
    right: float

    @property
    def jump(self) -> float:
        """right − left, rounded away from 0 unless both are integers."""
        exact = Fraction(self.right) - Fraction(self.left)
        return float(exact) if exact.denominator == 1 else float(exact) * (1 + 2.0**-50)

    @property
    def steepest(self) -> float:
        """The larger of |left| and |right|."""
        return max(abs(self.left), abs(self.right))


def kinks(*of: tuple[float, float, float]) -> tuple[Kink, ...]:
    """Kinks from triples (place, left, right); triples with left = right are left out."""
    return tuple(Kink(*kink) for kink in of if kink[1] != kink[2])


@dataclass(frozen=True)
class Elementwise:
    """The facts of y = φ(x)/divisor, applied to each entry. φ is continuous, and smooth between its kinks.

    value, derivative: φ and φ' for float64 tensors of any shape (and any other dtype); at a kink any slope between the left and the right one.
    slope: (lower, upper) bounds of φ', rounded outward. curvature: ≥ sup|φ''| between kinks, 0 if φ is piecewise linear. kinks: in increasing order.
    executed: a norm bound of the error of torch's kernel for finite x. at_zero: φ(0). bounded: sup|φ|, infinite by default.
    growth: |φ(x) − φ(0)| ≤ growth·|x|; by default sup|φ'|. lowest: (place, value) of the only minimum of a φ that decreases and then increases, place
    with an error of at most 10⁻³, value rounded down; None if φ is increasing. local_curvature: sharper bounds of φ'' near a point.
    largest: the largest intermediate value for |x| ≤ norm, if above norm. divisor: above 0. Raises BadInput for facts that contradict each other.
    """

    value: Function
    derivative: Function
    slope: tuple[float, float]
    curvature: float
    executed: Executed
    kinks: tuple[Kink, ...] = ()
    at_zero: float = 0.0
    growth: float | None = None
    bounded: float = math.inf
    lowest: tuple[float, float] | None = None
    local_curvature: LocalCurvature | None = None
    largest: Function | None = None
    divisor: float = 1.0

    def __post_init__(self) -> None:
        low, high = self.slope
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise BadInput(f"expected slope=(lower, upper), finite and in order, got {self.slope}; bound φ' on all numbers")
        if not (self.divisor > 0 and math.isfinite(self.divisor)):
            raise BadInput(f"expected a divisor above 0, got {self.divisor}; change the layer")
        if not (self.curvature >= 0 and math.isfinite(self.curvature)):
            raise BadInput(f"expected a finite curvature of at least 0 (0: piecewise linear), got {self.curvature}; bound |φ''| between kinks")
        if not all(map(math.isfinite, (n for kink in self.kinks for n in kink))) or any(a.place >= b.place for a, b in pairwise(self.kinks)):
            raise BadInput(f"expected kinks at finite places in order, got {self.kinks}; sort them")
        if not all(low <= s <= high for kink in self.kinks for s in kink[1:]):
            raise BadInput(f"expected slopes at kinks within slope={self.slope}, got {self.kinks}; bound φ' on all numbers")
        if self.curvature == 0 and any(a.right != b.left for a, b in pairwise(self.kinks)):
            raise BadInput(f"expected a piecewise linear φ of one slope between two kinks, got {self.kinks}; give both kinks the same")
        if self.lowest is None and low < 0:
            raise BadInput(f"expected `lowest` for a φ that falls somewhere (slope {low}), got none; give its only minimum")

    @property
    def steepest(self) -> float:
        """sup|φ'|, without the divisor."""
        return max(abs(self.slope[0]), abs(self.slope[1]))

    def size(self, norm: Tensor, root: float) -> Tensor:
        """‖φ(x)‖₂ ≤ this for n entries with ‖x‖₂ ≤ norm, root = √n; without the divisor."""
        growth = self.steepest if self.growth is None else self.growth
        if self.at_zero == 0.0 and growth == 1.0:
            size = norm
        else:
            size = root * abs(self.at_zero) + norm * growth
        return size if self.bounded == math.inf else size.clamp_max(root * self.bounded)

    def largest_intermediate(self, norm: Tensor) -> Tensor:
        """The largest intermediate value of the execution for |x| ≤ norm; without the divisor."""
        return norm if self.largest is None else self.largest(norm)

    def executed_error(self, norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
        """‖fl(y) − y‖₂ ≤ this for n entries with ‖x‖₂ ≤ norm, root ≥ √n, if nothing overflows (see `error`)."""
        lost = self.executed(norm, root, arithmetic)
        return lost if self.divisor == 1.0 else lost / self.divisor + root * arithmetic.tiny

    def error(self, norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
        """`executed_error`, or infinity where the execution may overflow or divide by a flushed number."""
        largest = torch.maximum(self.largest_intermediate(norm), self.size(norm, root) / self.divisor)
        return arithmetic.infinite_if_flushed(arithmetic.infinite_if_overflow(self.executed_error(norm, root, arithmetic), largest), self.divisor)


def exact(norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
    """The error of comparisons and selections: exact, but subnormal operands may be flushed to zero."""
    return torch.zeros_like(norm) + root * arithmetic.flushed


def ulps(count: float, underflows: int = 1) -> Executed:
    """The error of a function with at most `count` units in the last place of |x| and `underflows` underflows."""

    def executed(norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
        return count * arithmetic.unit * norm + underflows * root * arithmetic.tiny

    return executed


# ---- the operations


_ROOT2PI = math.sqrt(2 * math.pi)
_C, _A = math.sqrt(2 / math.pi), 0.044715

# sup |gelu'| and sup |silu'|, rounded up; sup |gelu''| = 2/√(2π) for both forms, at 0.
GELU_SLOPE = {"none": 1.1289042, "tanh": 1.1289932}
SILU_SLOPE = 1.0998394
GELU_CURVATURE = 0.7978846
# sup of |gelu'''|, φ(z)·z(z² − 4) for the normal density φ.
GELU_THIRD = 0.7787700
# −min gelu'', at z = 2, rounded up.
GELU_CONCAVE = 0.107982


# c and a of the tanh form, x/2·(1 + tanh(c·(x + a·x³))).
GELU_TANH = (_C, _A)


def gelu_prime(z: Tensor) -> Tensor:
    return torch.special.ndtr(z) + z * torch.exp(-0.5 * z * z) / _ROOT2PI


def gelu_tanh_prime(z: Tensor, c: float = _C, a: float = _A) -> Tensor:
    # Beyond ±20 tanh is ±1 in float64; clamping avoids an overflow of z².
    z = z.clamp(-20, 20)
    t = torch.tanh(c * (z + a * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * a * z * z)


def gelu_local_curvature(distance: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds (κ⁺, κ⁻) of gelu'' = φ(z)(2 − z²), an even function that decreases from z = 0, is 0 at √2, minimal at 2, and then increases to 0.

    −½κ⁻Δ² ≤ gelu(z + Δ) − gelu(z) − gelu'(z)Δ ≤ ½κ⁺Δ² for |Δ| ≤ reach, where the middle is ∫(1 − τ)gelu''(z + τΔ)dτ·Δ². Two bounds of gelu'' hold:
    its extreme value on the interval, and its value at z plus a third of sup|gelu'''| times `reach`.
    """

    def at(z: Tensor) -> Tensor:
        return torch.exp(-0.5 * z.square()) / _ROOT2PI * (2 - z.square())

    reach = reach * (1 + 1e-12)
    near, far = (distance - reach).clamp_min(0.0), distance + reach
    lowest = torch.where(near > 2, -at(near), torch.where(far < 2, -at(far), torch.full_like(far, GELU_CONCAVE)))
    here, drift = at(distance), GELU_THIRD / 3 * reach
    return torch.minimum(at(near), here + drift), torch.minimum(lowest, drift - here)


def _silu_prime(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _silu_executed(norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
    # Where exp(−x) overflows, the result is 0 instead of a number below |x|/max; this error is added once.
    lost = (FUNCTION_ULPS + 2) * arithmetic.unit * norm + norm / arithmetic.largest
    return lost + root * arithmetic.tiny * (1 + norm)


def _sigmoid_executed(norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
    # Relative to the result. Where exp(−x) overflows, the result is 0 instead of a number below 1/max; this error is added once.
    size = (root / 2 + norm / 4).clamp_max(root)
    return FUNCTION_ULPS * arithmetic.unit * size + root * (arithmetic.tiny + 1 / arithmetic.largest)


def _gelu(layer: nn.GELU | ScaledGELU) -> Elementwise:
    form = layer.approximate
    if form not in GELU_SLOPE:
        raise BadInput(f"expected approximate 'none' or 'tanh', got {form!r}; name one of them")
    plain = form == "none"
    return Elementwise(
        value=lambda z: F.gelu(z, approximate=form),
        derivative=gelu_prime if plain else gelu_tanh_prime,
        # Φ(x) + Φ(−x) = 1, so the slopes at x and −x sum to 1, and the smallest slope is 1 minus the largest. This also holds for the tanh form.
        slope=(1 - GELU_SLOPE[form], GELU_SLOPE[form]),
        curvature=GELU_CURVATURE,
        growth=1.0,  # |gelu x| ≤ |x|
        lowest=(-0.7517916, -0.1699713) if plain else (-0.7524614, -0.1700410),
        local_curvature=gelu_local_curvature if plain else None,
        executed=ulps(FUNCTION_ULPS + 2, underflows=2),  # x/2 and its product with 1 + erf or 1 + tanh
        # The tanh form computes x³.
        largest=None if plain else lambda norm: torch.maximum(norm, norm**3),
        divisor=layer.divisor if isinstance(layer, ScaledGELU) else 1.0,
    )


def parameter(layer: nn.Module, name: str, value: float | None = None, low: float = -1e6, high: float = 1e6) -> float:
    """A layer's parameter (its attribute `name` by default), checked to lie in [low, high]; the proofs cover up to 10⁶. Raises UnsupportedLayer."""
    value = float(getattr(layer, name)) if value is None else value
    if not low <= value <= high:
        raise UnsupportedLayer(f"expected {type(layer).__name__} with {name} from {low:g} to {high:g}, got {value}; change it")
    return value


_FACTS: dict[type[nn.Module], Callable[[Any], Elementwise]] = {}


def register_elementwise(layer: type[nn.Module], facts: Callable[[Any], Elementwise]) -> None:
    """Registers the facts of exactly this layer class (not of subclasses, whose forward may differ): `facts(layer)` returns an `Elementwise`.

    The bounds of all domains rest on these facts, so they have to be proved. Other packages register theirs by an entry point (`robustlip.plugins`).
    Raises BadInput for a class that has facts already.
    """
    if layer in _FACTS:
        raise BadInput(f"expected a layer class without facts, got {layer.__name__}, which has some; register another class")
    _FACTS[layer] = facts


@functools.cache
def _load_plugins() -> None:
    """Calls the entry points of 'robustlip.ops', once, when the first operation that is not built in is looked up."""
    for register in plugins("robustlip.ops").values():
        register()


def is_elementwise(layer: nn.Module) -> bool:
    """Whether the layer's class has registered facts."""
    if type(layer) in _FACTS:
        return True
    _load_plugins()
    return type(layer) in _FACTS


def elementwise_of(layer: nn.Module) -> Elementwise:
    """The facts of an elementwise layer. Raises UnsupportedLayer for any other."""
    if not is_elementwise(layer):
        known = ", ".join(sorted(kind.__name__ for kind in _FACTS))
        raise UnsupportedLayer(f"expected an elementwise layer whose facts are registered ({known}), got {type(layer).__name__}; register them")
    return _FACTS[type(layer)](layer)


def elementwise_layers() -> tuple[type[nn.Module], ...]:
    """The classes with facts, in order of registration."""
    _load_plugins()
    return tuple(_FACTS)


RELU = Elementwise(
    value=torch.relu, derivative=lambda z: (z > 0).to(z.dtype), slope=(0.0, 1.0), curvature=0.0, kinks=kinks((0.0, 0.0, 1.0)), executed=exact
)  # fmt: skip
TANH = Elementwise(
    value=torch.tanh, derivative=lambda z: 1 - torch.tanh(z).square(), slope=(0.0, 1.0), curvature=0.7698004, executed=ulps(FUNCTION_ULPS)
)  # fmt: skip
SIGMOID = Elementwise(
    value=torch.sigmoid, derivative=lambda z: torch.sigmoid(z) * torch.sigmoid(-z), slope=(0.0, 0.25), curvature=0.0962251,
    executed=_sigmoid_executed, at_zero=0.5, bounded=1.0,
)  # fmt: skip
SILU = Elementwise(
    value=F.silu, derivative=_silu_prime, slope=(1 - SILU_SLOPE, SILU_SLOPE), curvature=0.5000001, growth=1.0,
    lowest=(-1.2784645, -0.2784646), executed=_silu_executed,
)  # fmt: skip

register_elementwise(nn.ReLU, lambda layer: RELU)
register_elementwise(nn.Tanh, lambda layer: TANH)
register_elementwise(nn.Sigmoid, lambda layer: SIGMOID)
register_elementwise(nn.SiLU, lambda layer: SILU)
register_elementwise(nn.GELU, _gelu)
register_elementwise(ScaledGELU, _gelu)
