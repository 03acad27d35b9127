"""Expressions (`robustlip.layers.formulas`) that are functions with proved bounds: GELU in three forms, SiLU, Hardswish, RMSNorm and LayerNorm.

An expression is recognised for any order of its products and sums, if its constants are those of the function. It is executed as written, so the
execution error is that of the order with the most roundings. docs/theory.md, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robustlip.errors import UnsupportedLayer
from robustlip.layers.formulas import WEIGHT, Expression, Formula, WrittenNorm, X, written
from robustlip.numerics.arithmetic import Arithmetic
from robustlip.ops.elementwise import (
    FUNCTION_ULPS,
    GELU_CURVATURE,
    GELU_SLOPE,
    GELU_TANH,
    SILU,
    Elementwise,
    gelu_local_curvature,
    gelu_prime,
    gelu_tanh_prime,
    register_elementwise,
)
from robustlip.ops.smooth import HARDSWISH

# The proofs cover expressions of at most MOST operations, with constants between SMALLEST and LARGEST.
MOST, SMALLEST, LARGEST = 16, 1e-3, 1e3


def _number(part: Expression) -> bool:
    return isinstance(part, int | float)


def numbers(part: Expression) -> Iterator[float]:
    """All constants of an expression, those of exponents and bounds too."""
    if isinstance(part, tuple):
        for argument in part[1:]:
            yield from numbers(argument)
    elif _number(part):
        yield float(part)


def operations(part: Expression, most: int = 10**6) -> int:
    """The number of operations of an expression (repeated ones counted again); counting stops above `most`."""
    count = 0
    if isinstance(part, tuple):
        count = 1
        for argument in part[1:]:
            count += operations(argument, most - count) if count <= most else 0
    return count


def factors(part: Expression) -> tuple[float, list[Expression]]:
    """(number, parts): the factors of a product, in any order."""
    if _number(part):
        return float(part), []
    if not isinstance(part, tuple):
        return 1.0, [part]
    name, *arguments = part
    if name == "neg":
        number, parts = factors(arguments[0])
        return -number, parts
    if name == "mul":
        (a, first), (b, second) = factors(arguments[0]), factors(arguments[1])
        return a * b, first + second
    if name == "div" and _number(arguments[1]) and arguments[1]:
        number, parts = factors(arguments[0])
        return number / arguments[1], parts
    power = 2 if name == "square" else arguments[1] if name == "pow" else 0
    if power in (2, 3):
        number, parts = factors(arguments[0])
        return number ** int(power), parts * int(power)
    return 1.0, [part]


def terms(part: Expression) -> tuple[float, list[Expression]]:
    """(number, parts): the terms of a sum, in any order."""
    if _number(part):
        return float(part), []
    if isinstance(part, tuple) and part[0] == "add":
        (a, first), (b, second) = terms(part[1]), terms(part[2])
        return a + b, first + second
    return 0.0, [part]


def _cofactor_of_x(parts: list[Expression]) -> Expression | None:
    """f for the parts of x·f, else None."""
    if len(parts) != 2 or X not in parts:
        return None
    return parts[1] if parts[0] == X else parts[0]


def _scaled_x(part: Expression) -> float | None:
    """β for β·x, else None."""
    number, parts = factors(part)
    return number if parts == [X] else None


def _cubic(part: Expression) -> tuple[float, float] | None:
    """(c, a) for c·(x + a·x³) or c·x·(1 + a·x²), else None."""
    number, parts = factors(part)
    if len(parts) == 1:
        constant, summed = terms(parts[0])
        if constant != 0 or len(summed) != 2 or X not in summed:
            return None
        a, cubed = factors(summed[1] if summed[0] == X else summed[0])
        return (number, a) if cubed == [X, X, X] else None
    inner = _cofactor_of_x(parts)
    if inner is None:
        return None
    constant, summed = terms(inner)
    if constant != 1 or len(summed) != 1:
        return None
    a, squared = factors(summed[0])
    return (number, a) if squared == [X, X] else None


def _rounded(count: float) -> Callable[[Tensor, float, Arithmetic], Tensor]:
    """count·u·|x| plus fewer than 64 underflows of the result or of a factor of x. Where exp overflows, a sigmoid is 0 instead of 1/max, once."""

    def executed(norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
        lost = (count * arithmetic.unit + 1 / arithmetic.largest) * norm
        return lost + 64 * arithmetic.tiny * (root + norm)

    return executed


def _growth(part: Expression) -> tuple[float, float]:
    """(the largest factor of intermediate products relative to x and its powers, the sum of all added constants)."""
    if not isinstance(part, tuple):
        return 1.0, 0.0
    name, *arguments = part
    factor, added = 1.0, 0.0
    for i, argument in enumerate(arguments):
        if not _number(argument):
            more, its = _growth(argument)
            factor, added = factor * more, added + its
        elif name == "mul" and argument:
            factor *= max(1.0, abs(argument))
        elif name == "div" and argument:
            factor *= max(1.0, 1 / abs(argument)) if i else max(1.0, abs(argument))
        elif name in ("add", "sub"):
            added += abs(argument)
    return factor, added


def facts_of(expression: Expression) -> Elementwise | None:
    """The facts of the function that an expression is; None for an expression that is not recognised.

    Execution, for at most 16 operations, of which fewer than 10 are inside tanh, erf or the sigmoid, with at most two roundings each (its own and its
    constant's): the relative error of the inner product is ρ ≤ 20u to first order (the terms of its sums have one sign). tanh and erf are odd and
    concave above 0, so they change by at most ρ of themselves, and have an error of ku (k = FUNCTION_ULPS); 1 + T adds 2u: ½|x|(20 + k + 2)u·(1 +
    small). A sigmoid changes by at most ¼ρ and has an error of ku: |x|(5 + k)u. The error of relu6(x + 3) is 6u. Products outside add 12u|x|. The
    counts below include higher orders in 16 bits.
    """
    if operations(expression) > MOST or not all(SMALLEST <= abs(number) <= LARGEST for number in numbers(expression) if number):
        return None
    number, parts = factors(expression)
    gate = _cofactor_of_x(parts)
    if gate is None:
        return None
    constant, summed = terms(gate)
    found = None
    if number == 0.5 and constant == 1.0 and len(summed) == 1 and isinstance(summed[0], tuple) and len(summed[0]) == 2:
        found = _gelu(*summed[0])
    elif number == 1.0 and isinstance(gate, tuple) and gate[0] == "sigmoid":
        found = _silu(_scaled_x(gate[1]))
    elif abs(6 * number - 1) < 1e-15 and isinstance(gate, tuple):
        inner = gate[1]
        if gate[0] == "relu6" or (gate[0] == "clamp" and gate[2:] == (0, 6)):
            found = replace(HARDSWISH, executed=_rounded(24)) if terms(inner) == (3.0, [X]) else None
    if found is None:
        return None
    factor, added = _growth(expression)

    def largest(norm: Tensor) -> Tensor:
        # `fits` leaves factor for four times this, and 1 + erf is at most 2.
        return factor * (added + (norm if found.largest is None else found.largest(norm)))

    layer = Formula(expression)
    return replace(found, value=layer.forward, largest=largest)


def _gelu(function: str, inner: Expression) -> Elementwise | None:
    """x/2·(1 + function(inner))."""
    if function == "tanh":
        numbers_of = _cubic(inner)
        if numbers_of is None:
            return None
        c, a = numbers_of
        # A c with a relative error of 10⁻⁹ changes slopes by less than 3·10⁻⁹, which their rounding to seven digits covers.
        if abs(c / GELU_TANH[0] - 1) > 1e-9 or abs(a / GELU_TANH[1] - 1) > 1e-15:
            return None
        return Elementwise(
            value=torch.abs, derivative=lambda z: gelu_tanh_prime(z, c, a), slope=(1 - GELU_SLOPE["tanh"], GELU_SLOPE["tanh"]),
            curvature=GELU_CURVATURE, growth=1.0, lowest=(-0.7524614, -0.1700410), executed=_rounded(FUNCTION_ULPS + 16),
            largest=lambda norm: torch.maximum(norm, norm**3),
        )  # fmt: skip
    beta = _scaled_x(inner) if function == "erf" else None
    if beta is None or abs(beta * math.sqrt(2) - 1) > 1e-6:
        return None
    s = beta * math.sqrt(2)  # x/2·(1 + erf(βx)) = gelu(s·x)/s
    exact = abs(s - 1) < 1e-15
    return Elementwise(
        value=torch.abs, derivative=lambda z: gelu_prime(z if exact else s * z), slope=(1 - GELU_SLOPE["none"], GELU_SLOPE["none"]),
        curvature=GELU_CURVATURE if exact else GELU_CURVATURE * s * (1 + 1e-12), growth=1.0,
        lowest=(-0.7517916, -0.1699713 * max(1.0, (1 + 1e-12) / s)), local_curvature=gelu_local_curvature if exact else None,
        executed=_rounded(FUNCTION_ULPS + 16),
    )  # fmt: skip


def _silu(beta: float | None) -> Elementwise | None:
    """x·sigmoid(βx) = silu(βx)/β."""
    if beta is None or not 0.1 <= beta <= 10:
        return None
    assert SILU.lowest is not None
    place, least = SILU.lowest
    return replace(
        SILU, derivative=lambda z: SILU.derivative(beta * z), curvature=SILU.curvature * beta * (1 + 1e-12),
        lowest=(place / beta, least / beta * (1 + 1e-12)), executed=_rounded(FUNCTION_ULPS + 32),
    )  # fmt: skip


def _formula(layer: Formula) -> Elementwise:
    found = facts_of(layer.expression)
    if found is None:
        raise UnsupportedLayer(
            f"expected an expression that is GELU, SiLU or Hardswish written out, got {written(layer.expression)}; "
            f"register facts of a layer of its own"
        )
    return found


register_elementwise(Formula, _formula)


# ---- normalisations


@dataclass(frozen=True)
class Norm:
    """The divisor of an expression of a token's entries c (times a gain): √(‖c‖²/count + eps), or ‖c‖/√count + eps if `outside`.

    centred: whether c is x minus its mean.
    """

    centred: bool
    count: int
    eps: float
    outside: bool


def norm_of(expression: Expression, width: int) -> Norm | None:
    """The normalisation that an expression of tokens of that width is, None for other expressions."""
    if not isinstance(expression, tuple) or len(expression) != 3 or expression[0] not in ("mul", "div"):
        return None
    name, first, second = expression
    if name == "div":
        pairs = [(first, _root(second, width))]
    else:
        pairs = [(first, _inverse(second, width)), (second, _inverse(first, width))]
    for numerator, size in pairs:
        if isinstance(numerator, tuple) and numerator[0] == "mul" and WEIGHT in numerator[1:]:
            numerator = numerator[1] if numerator[2] == WEIGHT else numerator[2]
        centred = _centred(numerator)
        if size is not None and centred is not None and size.centred == centred:
            return size
    return None


def _centred(part: Expression) -> bool | None:
    if part == X:
        return False
    return True if part == ("sub", X, ("mean", X)) else None


def _spread(part: Expression, width: int) -> tuple[bool, int] | None:
    """(whether x is centred, the number by which the sum of squares is divided) of a mean square or variance."""
    if not isinstance(part, tuple):
        return None
    if part[0] == "var" and _centred(part[1]) is not None:
        return True, width - int(part[2])
    summed, count = (part[1], float(width)) if part[0] == "mean" else (None, 0.0)
    number, parts = factors(part)
    if len(parts) == 1 and isinstance(parts[0], tuple) and parts[0][0] == "sum":
        summed, count = parts[0][1], 1 / number if number else 0.0
    if not isinstance(summed, tuple) or abs(count - round(count)) > 1e-12 * count or count not in (width, width - 1):
        return None
    square = summed[0] == "square" or (summed[0] == "pow" and summed[2] == 2) or (summed[0] == "mul" and summed[1] == summed[2])
    centred = _centred(summed[1])
    return (centred, round(count)) if square and centred is not None else None


def _stable(part: Expression, width: int) -> Norm | None:
    """For v + eps."""
    constant, summed = terms(part)
    found = _spread(summed[0], width) if len(summed) == 1 else None
    return None if found is None else Norm(*found, constant, False)


def _root(part: Expression, width: int) -> Norm | None:
    """For √(v + eps), or √v + eps."""
    if not isinstance(part, tuple):
        return None
    if part[0] == "sqrt" or (part[0] == "pow" and part[2] == 0.5):
        return _stable(part[1], width)
    constant, summed = terms(part)
    if len(summed) != 1 or not isinstance(summed[0], tuple):
        return None
    inner: Any = summed[0]
    if inner[0] == "std" and _centred(inner[1]) is not None:
        return Norm(True, width - int(inner[2]), constant, True)
    found = _spread(inner[1], width) if inner[0] == "sqrt" else None
    return None if found is None else Norm(*found, constant, True)


def _inverse(part: Expression, width: int) -> Norm | None:
    """For 1/√(v + eps), or 1/(√v + eps)."""
    number, parts = factors(part)
    if number != 1.0 or len(parts) != 1 or not isinstance(parts[0], tuple):
        return None
    name, inner = parts[0][:2]
    if name == "rsqrt" or (name == "pow" and parts[0][2] == -0.5):
        return _stable(inner, width)
    if name == "div" and parts[0][1] == 1:
        return _root(parts[0][2], width)
    return _root(inner, width) if name == "reciprocal" else None


def norm_facts(layer: WrittenNorm) -> Norm:
    """The divisor of the layer. Raises UnsupportedLayer for an expression that is no normalisation, or has no eps above 0."""
    found = norm_of(layer.expression, layer.width)
    if found is None or found.count < 1:
        raise UnsupportedLayer(f"expected an expression that is RMSNorm or LayerNorm written out, got {written(layer.expression)}; use torch's")
    if not found.eps > 0:
        raise UnsupportedLayer(f"expected a normalisation with eps above 0, got {found.eps}: it is not Lipschitz without; give eps=1e-6, say")
    return found
