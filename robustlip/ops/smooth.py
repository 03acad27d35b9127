"""Smooth functions of one number, some with kinks: ELU, CELU, SELU, Softplus, LogSigmoid, Softsign, Tanhshrink, Mish, Hardswish.

Suprema of |φ'| and |φ''| are in closed form unless stated otherwise; tests/test_ops.py searches for larger values. k is FUNCTION_ULPS, the error of
torch's exp, expm1, log1p and tanh in units in the last place; u is the unit roundoff. 16-bit kernels compute in float32 or in the dtype itself; the
bounds hold for both.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.numerics.arithmetic import Arithmetic
from robustlip.ops.elementwise import FUNCTION_ULPS, Elementwise, Executed, kinks, parameter, register_elementwise, ulps

# inf and sup of mish', the position and value of its minimum, sup|mish''| at −0.0879; computed with 40 digits, rounded outward.
MISH_SLOPE = (-0.1125262, 1.0884982)
MISH_LOWEST = (-1.1924312, -0.3088435)
MISH_CURVATURE = 0.6442047
# The constants of torch; its kernel multiplies them.
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def _exponential(steepest: float, flat: float) -> Executed:
    """The execution error of scale·x above 0 and scale·α·expm1(x/flat) below, with slopes of at most `steepest`.

    Both factors are products of rounded parameters (3u). The error of x/flat is 3u, which changes expm1 by at most 3u of itself, since |t|eᵗ ≤ 1 − eᵗ
    for t ≤ 0; that of expm1 is ku, those of the product and of a 16-bit result 2u: together (k + 8)u of a result of at most steepest·|x|. Flushing x,
    the quotient, expm1 or the result has an error of at most (steepest·(2·flat + 2) + 1)·tiny, flushing a factor one of tiny·|x| +
    steepest·flat·tiny·|x|.
    """

    def executed(norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
        own = ((FUNCTION_ULPS + 8) * arithmetic.unit * steepest + (1 + steepest * flat) * arithmetic.tiny) * norm
        return own + root * arithmetic.tiny * (steepest * (2 * flat + 2) + 1)

    return executed


def _elu(layer: nn.ELU) -> Elementwise:
    """x above 0, α(eˣ − 1) below: slopes 1 and αeˣ, second derivative αeˣ, a kink at 0 unless α = 1. For α < 0 it first decreases."""
    alpha = parameter(layer, "alpha")
    size = max(1.0, abs(alpha))
    return Elementwise(
        value=lambda z: F.elu(z, alpha),
        derivative=lambda z: torch.where(z > 0, 1.0, alpha * z.clamp_max(0.0).exp()),
        slope=(min(alpha, 0.0), max(alpha, 1.0)),
        curvature=abs(alpha),
        kinks=kinks((0.0, alpha, 1.0)),
        growth=size,
        lowest=(0.0, 0.0) if alpha < 0 else None,
        executed=_exponential(size, 1.0),
    )


def _celu(layer: nn.CELU) -> Elementwise:
    """x above 0, α(exp(x/α) − 1) below: slopes 1 and exp(x/α), which meet at 0; second derivative at most 1/α."""
    alpha = parameter(layer, "alpha", low=1e-6)
    return Elementwise(
        value=lambda z: F.celu(z, alpha),
        derivative=lambda z: (z.clamp_max(0.0) / alpha).exp(),
        slope=(0.0, 1.0),
        curvature=math.nextafter(1 / alpha, math.inf),
        executed=_exponential(1.0, alpha),
    )


def _selu(_: nn.SELU) -> Elementwise:
    """scale·x above 0, scale·α(eˣ − 1) below: a kink at 0 from scale·α to scale. The product of the two float64 numbers is rounded up."""
    steep = math.nextafter(SELU_SCALE * SELU_ALPHA, math.inf)
    return Elementwise(
        value=F.selu,
        derivative=lambda z: torch.where(z > 0, SELU_SCALE, SELU_SCALE * SELU_ALPHA * z.clamp_max(0.0).exp()),
        slope=(0.0, steep),
        curvature=steep,
        kinks=kinks((0.0, steep, SELU_SCALE)),
        executed=_exponential(steep, 1.0),
    )


def _softplus(layer: nn.Softplus) -> Elementwise:
    """log(1 + exp(βx))/β: slope sigmoid(βx), second derivative β·σ(1 − σ) ≤ β/4. torch's kernel returns x where βx > threshold.

    Execution, with E = exp(βx): the error of βx is 2u|βx|, which changes log1p(exp(·)) by no more; that of E is ku, which changes it by at most
    1.2ku; that of log1p is ku(log 2 + |βx|); a quotient and a 16-bit result round. Divided by β: (k + 6)u|x| + (2k + 4)u/β. The jump at the
    threshold, at most log1p(exp(−threshold))/β, may occur 4u·threshold too early. Where exp overflows (thresholds of 88 and more in float32) the
    result is infinite.
    """
    beta, threshold = parameter(layer, "beta", low=1e-6), parameter(layer, "threshold")

    def executed(norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
        unit, tiny = arithmetic.unit, arithmetic.tiny
        early = threshold - 4.1 * unit * abs(threshold)
        reach = beta * norm * (1 + 3 * unit)
        own = (FUNCTION_ULPS + 6) * unit * norm + root * ((2 * FUNCTION_ULPS + 4) * unit / beta + (2 + 3 / beta) * tiny)
        jump = (max(-early, 0.0) + math.log1p(math.exp(-abs(early)))) / beta * (1 + 1e-12)
        lost = own + (reach >= early).to(own.dtype) * (root * jump)
        limit = math.log(arithmetic.largest_scalar) - 1
        overflows = reach.clamp_max(threshold + 4.1 * unit * abs(threshold)) > limit
        return torch.where(overflows, torch.full_like(lost, math.inf), lost)

    return Elementwise(
        value=lambda z: z.clamp_min(0.0) + torch.log1p(torch.exp(-beta * z.abs())) / beta,
        derivative=lambda z: torch.sigmoid(beta * z),
        slope=(0.0, 1.0),
        curvature=math.nextafter(beta / 4, math.inf),
        executed=executed,
        at_zero=math.log(2) / beta,
        growth=1.0,
    )


def _logsigmoid_executed(norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
    # min(0, x) − log1p(exp(−|x|)): the error of exp is ku, which changes log1p by at most ku/1.5; that of log1p, at most log 2, is ku log 2. The
    # difference and a 16-bit result round: 2u(|x| + log 2).
    return arithmetic.unit * (2.1 * norm + root * (1.4 * FUNCTION_ULPS + 2)) + 3 * root * arithmetic.tiny


def _mish_prime(z: Tensor) -> Tensor:
    t = torch.tanh(z.clamp_min(0.0) + torch.log1p(torch.exp(-z.abs())))
    return t + z * (1 - t * t) * torch.sigmoid(z)


def _mish_executed(norm: Tensor, root: float, arithmetic: Arithmetic) -> Tensor:
    # x·tanh(L), L = log1p(exp(x)): exp changes L by at most 1.2ku, the error of log1p is kuL, tanh' = 1/cosh² ≤ 1 with L/cosh²(L) ≤ 0.45, the error
    # of tanh is ku, those of the products 2u: (2.65k + 2)u|x|. Flushing exp or a product has an error below tiny·|x| + tiny. Where exp overflows,
    # tanh is 1, which is correct.
    return ((3 * FUNCTION_ULPS + 3) * arithmetic.unit + arithmetic.tiny) * norm + 2 * root * arithmetic.tiny


LOGSIGMOID = Elementwise(
    value=F.logsigmoid, derivative=lambda z: torch.sigmoid(-z), slope=(0.0, 1.0), curvature=0.25, executed=_logsigmoid_executed,
    at_zero=-math.log(2), growth=1.0,
)  # fmt: skip
# Slope 1/(1 + |x|)², second derivative ∓2/(1 + |x|)³. A sum and a quotient round.
SOFTSIGN = Elementwise(
    value=F.softsign, derivative=lambda z: (1 + z.abs()).square().reciprocal(), slope=(0.0, 1.0), curvature=2.0, executed=ulps(3, underflows=2),
    bounded=1.0,
)  # fmt: skip
# x − tanh x: slope tanh², second derivative 2·tanh·(1 − tanh²), that of −tanh. The error of tanh is ku|x|; its result and the difference round.
TANHSHRINK = Elementwise(
    value=F.tanhshrink, derivative=lambda z: torch.tanh(z).square(), slope=(0.0, 1.0), curvature=0.7698004,
    executed=ulps(FUNCTION_ULPS + 3, underflows=2), growth=1.0,
)  # fmt: skip
MISH = Elementwise(
    value=F.mish, derivative=_mish_prime, slope=MISH_SLOPE, curvature=MISH_CURVATURE, growth=1.0, lowest=MISH_LOWEST, executed=_mish_executed,
)  # fmt: skip
# x·min(max(x + 3, 0), 6)/6: slope x/3 + 1/2 between −3 and 3, where it jumps from 0 to −1/2 and from 3/2 to 1. A sum, a product, a quotient or
# product with 1/6, and a 16-bit result round: at most 5u|x|; the largest intermediate value is 6x.
HARDSWISH = Elementwise(
    value=F.hardswish, derivative=lambda z: torch.where(z <= -3, 0.0, torch.where(z >= 3, 1.0, z / 3 + 0.5)), slope=(-0.5, 1.5),
    curvature=math.nextafter(1 / 3, 1.0), kinks=kinks((-3.0, 0.0, -0.5), (3.0, 1.5, 1.0)), growth=1.0, lowest=(-1.5, -0.375),
    executed=ulps(5.2, underflows=4), largest=lambda norm: 6 * norm,
)  # fmt: skip

register_elementwise(nn.ELU, _elu)
register_elementwise(nn.CELU, _celu)
register_elementwise(nn.SELU, _selu)
register_elementwise(nn.Softplus, _softplus)
register_elementwise(nn.LogSigmoid, lambda layer: LOGSIGMOID)
register_elementwise(nn.Softsign, lambda layer: SOFTSIGN)
register_elementwise(nn.Tanhshrink, lambda layer: TANHSHRINK)
register_elementwise(nn.Mish, lambda layer: MISH)
register_elementwise(nn.Hardswish, lambda layer: HARDSWISH)
