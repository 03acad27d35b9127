"""Piecewise linear functions of one number: LeakyReLU, PReLU, clamps, Hardsigmoid, |x|, soft thresholding. docs/theory.md, section 3.

Slopes and kinks are read off the formula, so they are exact but for products; a curvature there is none. What execution loses is proved at each. A
parameter reaches the kernel rounded to the dtype (16-bit kernels may keep it in float32 and round the result): `stated` bounds what that loses.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.errors import UnsupportedLayer
from robustlip.layers.activations import Abs, Clamp
from robustlip.numerics.arithmetic import Arithmetic
from robustlip.ops.elementwise import Elementwise, exact, kinks, parameter, register_elementwise, ulps


def stated(value: float, arithmetic: Arithmetic) -> float:
    """How far a parameter may be from what the kernel of that dtype makes of it: 0 where the dtype holds it."""
    rounded = float(torch.tensor(value, dtype=torch.float64).to(arithmetic.dtype))
    return 0.0 if rounded == value else 1.01 * arithmetic.unit * abs(value) + arithmetic.tiny


def slopes(*pieces: float) -> tuple[float, float]:
    """(lower, upper) of φ'. Where all pieces have nearly one slope the upper one is a little more: quadratic constraints divide by the difference."""
    low, high = min(pieces), max(pieces)
    return low, max(high, low + 5e-7 * max(1.0, abs(low)))


def two_slopes(slope: float) -> Elementwise:
    """x above 0 and slope·x below, for any slope.

    Executed: x is kept above 0. Below, the slope is rounded, the product is, and in 16 bits the result once more: 3u|slope·x| and a little. A slope
    that counts for zero loses less than tiny·|x|, an x that does less than flushed·max(1, |slope|), an underflow tiny.
    """
    size = max(1.0, abs(slope))

    def executed(norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
        own = (3.1 * arithmetic.unit * abs(slope) + arithmetic.tiny) * norm
        return own + root * (arithmetic.tiny + size * arithmetic.flushed)

    return Elementwise(
        value=lambda z: F.leaky_relu(z, slope),
        derivative=lambda z: torch.where(z > 0, torch.ones_like(z), torch.full_like(z, slope)),
        slope=slopes(slope, 1.0),
        curvature=0.0,
        kinks=kinks((0.0, slope, 1.0)),
        growth=size,
        lowest=(0.0, 0.0) if slope < 0 else None,
        executed=exact if slope == 0 else executed,
    )


def _leaky_relu(layer: nn.LeakyReLU) -> Elementwise:
    return two_slopes(parameter(layer, "negative_slope"))


def _prelu(layer: nn.PReLU) -> Elementwise:
    slopes = layer.weight.detach().double().unique()
    if len(slopes) != 1:
        got = f"{layer.weight.numel()} slopes, {len(slopes)} of them different"
        raise UnsupportedLayer(f"expected PReLU of one slope, got {got}: one a channel is not elementwise; use num_parameters=1")
    return two_slopes(parameter(layer, "weight", float(slopes)))


def clamped(low: float, high: float, value: Callable[[Tensor], Tensor]) -> Elementwise:
    """min(max(x, low), high), low < high, one of them finite.

    Executed: comparisons are exact, so only the rounding of the bounds counts, and where 0 lies between them a number that meets one is as large.
    """
    bounds = [b for b in (low, high) if math.isfinite(b)]

    def executed(norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
        lost = torch.full_like(norm, root * max(stated(b, arithmetic) for b in bounds))
        if low <= 0 <= high:
            lost = torch.minimum(lost, 1.03 * arithmetic.unit * norm + root * arithmetic.tiny)
        return lost + root * arithmetic.flushed

    return Elementwise(
        value=value,
        derivative=lambda z: ((z > low) & (z < high)).to(z.dtype),
        slope=(0.0, 1.0),
        curvature=0.0,
        kinks=kinks(*[(low, 0.0, 1.0)] * math.isfinite(low), *[(high, 1.0, 0.0)] * math.isfinite(high)),
        executed=executed,
        at_zero=min(max(0.0, low), high),
        bounded=max(map(abs, bounds)) if len(bounds) == 2 else math.inf,
    )


def _hardtanh(layer: nn.Hardtanh | nn.ReLU6) -> Elementwise:
    low, high = parameter(layer, "min_val"), parameter(layer, "max_val")
    if not low < high:
        raise UnsupportedLayer(f"expected {type(layer).__name__} with min_val below max_val, got {low} and {high}; a constant needs no layer")
    return clamped(low, high, lambda z: F.hardtanh(z, low, high))


def _clamp(layer: Clamp) -> Elementwise:
    low = -math.inf if layer.low is None else layer.low
    high = math.inf if layer.high is None else layer.high
    return clamped(low, high, lambda z: torch.clamp(z, layer.low, layer.high))


def _threshold(layer: nn.Threshold) -> Elementwise:
    """x above the threshold and `value` at most there: continuous, a clamp from below, where both are equal."""
    threshold, value = parameter(layer, "threshold"), parameter(layer, "value")
    if threshold != value:
        raise UnsupportedLayer(f"expected a continuous function, got {layer}, which jumps at {threshold}; use Clamp, or one number for both")
    return clamped(threshold, math.inf, lambda z: F.threshold(z, threshold, threshold))


def _hardsigmoid(_: nn.Hardsigmoid) -> Elementwise:
    """min(max(x + 3, 0), 6)/6. Executed: a sum, a quotient or a product with 1/6 rounded, in 16 bits the result: 4u of it, at most 1/2 + |x|/6."""

    def executed(norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
        return 4.1 * arithmetic.unit * (root / 2 + norm / 6).clamp_max(root) + 2 * root * arithmetic.tiny

    sixth = 1 / 6  # as float64 has it: below the true sixth by less than its rounding, which `slope` adds
    return Elementwise(
        value=F.hardsigmoid,
        derivative=lambda z: ((z > -3) & (z < 3)).to(z.dtype) * sixth,
        slope=(0.0, math.nextafter(sixth, 1.0)),
        curvature=0.0,
        kinks=kinks((-3.0, 0.0, sixth), (3.0, sixth, 0.0)),
        executed=executed,
        at_zero=0.5,
        bounded=1.0,
    )


ABS = Elementwise(
    value=torch.abs, derivative=torch.sign, slope=(-1.0, 1.0), curvature=0.0, kinks=kinks((0.0, -1.0, 1.0)), executed=exact, lowest=(0.0, 0.0)
)  # fmt: skip


def _softshrink(layer: nn.Softshrink) -> Elementwise:
    """x less λ, towards 0 and not beyond. Executed: λ is rounded (|x| > λ where that counts), the difference is, in 16 bits the result: 3u|x|."""
    size = parameter(layer, "lambd", low=0.0)
    return Elementwise(
        value=lambda z: F.softshrink(z, size),
        derivative=lambda z: ((z.abs() > size) | (size == 0)).to(z.dtype),
        slope=slopes(0.0, 1.0) if size > 0 else slopes(1.0),
        curvature=0.0,
        kinks=kinks((-size, 1.0, 0.0), (size, 0.0, 1.0)) if size > 0 else (),
        executed=ulps(3.2, underflows=3),
        growth=1.0,
    )


def _hardshrink(layer: nn.Hardshrink) -> Elementwise:
    """Continuous, and then the identity, at λ = 0 alone. (A number that counts for zero stays, or becomes 0.)"""
    size = parameter(layer, "lambd", low=0.0)
    if size > 0:
        raise UnsupportedLayer(f"expected a continuous function, got {layer}, which jumps at ±{size}; use Softshrink")
    return Elementwise(
        value=lambda z: F.hardshrink(z, 0.0), derivative=torch.ones_like, slope=slopes(1.0),
        curvature=0.0, executed=exact, growth=1.0,
    )  # fmt: skip


register_elementwise(nn.LeakyReLU, _leaky_relu)
register_elementwise(nn.PReLU, _prelu)
register_elementwise(nn.ReLU6, _hardtanh)
register_elementwise(nn.Hardtanh, _hardtanh)
register_elementwise(nn.Hardsigmoid, _hardsigmoid)
register_elementwise(nn.Threshold, _threshold)
register_elementwise(nn.Softshrink, _softshrink)
register_elementwise(nn.Hardshrink, _hardshrink)
register_elementwise(Abs, lambda layer: ABS)
register_elementwise(Clamp, _clamp)
