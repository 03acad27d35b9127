"""The activations of robustlip by name: layers, their values in high precision, and their relaxations."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
from formulas import ELEMENTWISE
from torch import nn

from robustlip.domains.lines.relaxations import activation_of
from robustlip.layers import Abs, Clamp


def _leaky(slope: float) -> Callable[[mpmath.mpf], mpmath.mpf]:
    return lambda z: z if z > 0 else z * mpmath.mpf(slope)


def _elu(alpha: float, scale: float = 1.0) -> Callable[[mpmath.mpf], mpmath.mpf]:
    return lambda z: mpmath.mpf(scale) * (z if z > 0 else mpmath.mpf(alpha) * mpmath.expm1(z))


def _clamp(low: float, high: float) -> Callable[[mpmath.mpf], mpmath.mpf]:
    return lambda z: min(max(z, mpmath.mpf(low)), mpmath.mpf(high))


def _softplus(beta: float) -> Callable[[mpmath.mpf], mpmath.mpf]:
    return lambda z: mpmath.log1p(mpmath.exp(beta * z)) / beta


def _shrunk(z: mpmath.mpf, size: float) -> mpmath.mpf:
    return z - size if z > size else z + size if z < -size else mpmath.mpf(0)


ACTIVATIONS: dict[str, tuple[nn.Module, Callable[[mpmath.mpf], mpmath.mpf]]] = {
    "relu": (nn.ReLU(), lambda z: max(z, mpmath.mpf(0))),
    "tanh": (nn.Tanh(), mpmath.tanh),
    "sigmoid": (nn.Sigmoid(), lambda z: 1 / (1 + mpmath.exp(-z))),
    "silu": (nn.SiLU(), lambda z: z / (1 + mpmath.exp(-z))),
    "gelu-none": (nn.GELU(), lambda z: z * mpmath.ncdf(z)),
    "gelu-tanh": (nn.GELU("tanh"), lambda z: z / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf(0.044715) * z**3)))),
    "leaky": (nn.LeakyReLU(0.01), _leaky(0.01)), "leaky-falls": (nn.LeakyReLU(-0.5), _leaky(-0.5)), "leaky-steep": (nn.LeakyReLU(2.0), _leaky(2.0)),
    "prelu": (nn.PReLU(), _leaky(0.25)), "abs": (Abs(), abs),
    "clamp": (Clamp(-0.7, 1.9), _clamp(-0.7, 1.9)), "clamp-low": (Clamp(low=0.3), _clamp(0.3, mpmath.inf)),
    "hardtanh": (nn.Hardtanh(), _clamp(-1.0, 1.0)), "relu6": (nn.ReLU6(), _clamp(0.0, 6.0)),
    "threshold": (nn.Threshold(-0.2, -0.2), _clamp(-0.2, mpmath.inf)),
    "hardsigmoid": (nn.Hardsigmoid(), lambda z: min(max(z + 3, mpmath.mpf(0)), mpmath.mpf(6)) / 6),
    "softshrink": (nn.Softshrink(), lambda z: _shrunk(z, 0.5)),
    "elu": (nn.ELU(), _elu(1.0)), "elu-steep": (nn.ELU(2.5), _elu(2.5)), "elu-falls": (nn.ELU(-1.5), _elu(-1.5)),
    "selu": (nn.SELU(), _elu(1.6732632423543772848170429916717, 1.0507009873554804934193349852946)),
    "celu": (nn.CELU(2.0), lambda z: z if z > 0 else 2 * mpmath.expm1(z / 2)),
    "celu-sharp": (nn.CELU(0.1), lambda z: z if z > 0 else mpmath.mpf(0.1) * mpmath.expm1(z / mpmath.mpf(0.1))),
    "softplus": (nn.Softplus(), _softplus(1.0)), "softplus-sharp": (nn.Softplus(4.0), _softplus(4.0)),
    "logsigmoid": (nn.LogSigmoid(), lambda z: -mpmath.log1p(mpmath.exp(-z))),
    "softsign": (nn.Softsign(), lambda z: z / (1 + abs(z))),
    "tanhshrink": (nn.Tanhshrink(), lambda z: z - mpmath.tanh(z)),
    "mish": (nn.Mish(), lambda z: z * mpmath.tanh(mpmath.log1p(mpmath.exp(z)))),
    "gelu-new": (
        ELEMENTWISE["gelu-new"],
        lambda z: z / 2 * (1 + mpmath.tanh(mpmath.mpf(0.7978845608028654) * (z + mpmath.mpf(0.044715) * z**3))),
    ),
    "gelu-erf": (ELEMENTWISE["gelu-erf"], lambda z: z / 2 * (1 + mpmath.erf(z / mpmath.mpf(1.4142135623730951)))),
    "gelu-quick": (ELEMENTWISE["gelu-quick"], lambda z: z / (1 + mpmath.exp(-mpmath.mpf(1.702) * z))),
    "hardswish": (nn.Hardswish(), lambda z: z * min(max(z + 3, mpmath.mpf(0)), mpmath.mpf(6)) / 6),
}  # fmt: skip

CURVES = {name: activation_of(layer) for name, (layer, _) in ACTIVATIONS.items()}
DIGITS = {name: function for name, (_, function) in ACTIVATIONS.items()}
