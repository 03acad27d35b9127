"""Piecewise linear functions of one number: LeakyReLU, PReLU, clamps, Hardsigmoid, |x|, soft thresholding. docs/theory.md, section 3.

Slopes and kinks follow from the formula, exact except for products; the curvature is 0. Each function states its execution error. A parameter reaches
the kernel rounded to the dtype (16-bit kernels may keep it in float32 and round the result); `parameter_error` bounds this error.
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


def parameter_error(value: float, arithmetic: Arithmetic) -> float:
    """The largest difference between a parameter and its value in a kernel of that dtype: 0 where the dtype represents it."""
    rounded = float(torch.tensor(value, dtype=torch.float64).to(arithmetic.dtype))
    return 0.0 if rounded == value else 1.01 * arithmetic.unit * abs(value) + arithmetic.tiny


def slopes(*pieces: float) -> tuple[float, float]:
    """(lower, upper) of φ'. If all slopes are nearly equal, upper is raised slightly, because quadratic constraints divide by the difference."""
    low, high = min(pieces), max(pieces)
    return low, max(high, low + 5e-7 * max(1.0, abs(low)))


def two_slopes(slope: float) -> Elementwise:
    """x above 0 and slope·x below, for any slope.

    Execution: x is exact above 0. Below, the slope, the product, and in 16 bits the result round: 3u|slope·x|. Flushing the slope to zero has an
    error below tiny·|x|, flushing x one below flushed·max(1, |slope|), an underflow one of tiny.
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
    """min(max(x, low), high), low < high, at least one of them finite.

    Execution: comparisons are exact, so only the rounding of the bounds counts; if 0 lies between the bounds, |x| is at least |bound| where it is
    clamped.
    """
    bounds = [b for b in (low, high) if math.isfinite(b)]

    def executed(norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
        lost = torch.full_like(norm, root * max(parameter_error(b, arithmetic) for b in bounds))
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
    """x above the threshold, `value` otherwise: continuous, a clamp from below, if both are equal."""
    threshold, value = parameter(layer, "threshold"), parameter(layer, "value")
    if threshold != value:
        raise UnsupportedLayer(f"expected a continuous function, got {layer}, which jumps at {threshold}; use Clamp, or one number for both")
    return clamped(threshold, math.inf, lambda z: F.threshold(z, threshold, threshold))


def _hardsigmoid(_: nn.Hardsigmoid) -> Elementwise:
    """min(max(x + 3, 0), 6)/6.

    Execution: a sum, a quotient or product with 1/6, and in 16 bits the result round: 4u of the result, at most 1/2 + |x|/6.
    """

    def executed(norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
        return 4.1 * arithmetic.unit * (root / 2 + norm / 6).clamp_max(root) + 2 * root * arithmetic.tiny

    sixth = 1 / 6  # in float64: below 1/6 by less than its rounding error, which `slope` adds
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
    """x shrunk by λ towards 0. Execution: λ (where |x| > λ), the difference, and in 16 bits the result round: 3u|x|."""
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
    """Continuous only for λ = 0, where it is the identity. (A flushed number stays or becomes 0.)"""
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
