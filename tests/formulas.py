"""Functions written in plain operations: as layers of robustlip, and as a model's forward has them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlip.layers.formulas import WEIGHT, Formula, WrittenNorm, X, gelu_erf, gelu_new, gelu_quick, layer_norm, rms_norm

FAST = ("mul", ("mul", 0.5, X), ("add", 1.0, ("tanh", ("mul", ("mul", X, 0.7978845608), ("add", 1.0, ("mul", ("mul", 0.044715, X), X))))))
ROUGH = ("mul", X, ("mul", 0.5, ("add", 1, ("erf", ("mul", X, 0.70710678)))))
HARDSWISH = ("div", ("mul", X, ("relu6", ("add", X, 3))), 6)

ELEMENTWISE: dict[str, Formula] = {
    "gelu-new": gelu_new(), "gelu-fast": Formula(FAST), "gelu-erf": gelu_erf(), "gelu-erf-rough": Formula(ROUGH), "gelu-quick": gelu_quick(),
    "silu-written": Formula(("mul", X, ("sigmoid", X))), "hardswish-written": Formula(HARDSWISH),
    "hardswish-clamped": Formula(("mul", X, ("div", ("clamp", ("add", 3.0, X), 0, 6), 6.0))),
}  # fmt: skip

# As a model writes them, and the same as a layer.
WRITTEN: dict[str, tuple[Callable[[Tensor], Tensor], Formula]] = {
    "gelu-new": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))), ELEMENTWISE["gelu-new"],
    ),
    "gelu-new-cubed": (lambda x: x * 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))), ELEMENTWISE["gelu-new"]),
    "gelu-fast": (lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))), ELEMENTWISE["gelu-fast"]),
    "gelu-erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), ELEMENTWISE["gelu-erf"]),
    "gelu-erf-late": (lambda x: x * (torch.erf(x / math.sqrt(2.0)) + 1) / 2, ELEMENTWISE["gelu-erf"]),
    "gelu-quick": (lambda x: x * torch.sigmoid(1.702 * x), ELEMENTWISE["gelu-quick"]),
    "silu": (lambda x: torch.sigmoid(x) * x, ELEMENTWISE["silu-written"]),
    "hardswish": (lambda x: x * F.relu6(x + 3) / 6, ELEMENTWISE["hardswish-written"]),
}  # fmt: skip


def std_norm(width: int, eps: float, weight: Tensor) -> WrittenNorm:
    """γ·(x − mean)/(std + eps), std by D − 1."""
    return WrittenNorm(width, ("div", ("mul", WEIGHT, ("sub", X, ("mean", X))), ("add", ("std", X, 1), eps)), weight)


def var_norm(width: int, eps: float) -> WrittenNorm:
    """(x − mean)·(var + eps)^(−½), by a kernel that takes the variance, by D − 1."""
    return WrittenNorm(width, ("mul", ("sub", X, ("mean", X)), ("pow", ("add", ("var", X, 1), eps), -0.5)))


NORMS: dict[str, Callable[[int, float], WrittenNorm]] = {
    "written-rms": rms_norm, "written-layer": layer_norm, "written-var": var_norm,
    "written-std": lambda width, eps: std_norm(width, eps, torch.linspace(-2, 1.5, width)),
    "written-rms-outside": lambda width, eps: WrittenNorm(width, ("div", X, ("add", ("sqrt", ("mean", ("square", X))), eps))),
}  # fmt: skip
