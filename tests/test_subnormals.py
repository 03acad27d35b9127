"""Processors may treat subnormal numbers as zero, as operands and as results: the rounding terms of every rule cover both."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from processors import flushed
from torch import nn

from robustlip.domains.expansion.base import Ball, Scope
from robustlip.domains.expansion.structure import ChainExpansion
from robustlip.domains.norms import Context, State, rule_for
from robustlip.errors import BadInput
from robustlip.layers import AddPositions, Attention, Clamp, GroupSort, Householder, MaxMin, MeanTokens, Normalize, Residual, ScaledGELU

SMALL = 1e-39  # subnormal in float32 and bfloat16


def diagonal(layer: nn.Linear, value: float) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.eye(*layer.weight.shape) * value)


def linear(value: float) -> nn.Linear:
    layer = nn.Linear(4, 4, bias=False)
    diagonal(layer, value)
    return layer


def attention(value: float, output: float, *, logits: float = 0.0, **options: float) -> Attention:
    layer = Attention(4, 1, rope=False, **{"output_scale": 1.0, **options})  # type: ignore[arg-type]
    for name, size in {"query": logits, "key": logits, "value": value, "output": output}.items():
        diagonal(getattr(layer, name), size)
    return layer


def normalising(kind: type[nn.LayerNorm] | type[nn.RMSNorm], gain: float, eps: float) -> nn.Module:
    layer = kind(4, eps=eps)
    nn.init.constant_(layer.weight, gain)
    return layer


def householder(angle: float) -> Householder:
    layer = Householder(4)
    nn.init.constant_(layer.angle, angle)
    return layer


def batchnorm(gain: float, variance: float, eps: float) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(4, eps=eps)
    nn.init.constant_(layer.weight, gain)
    assert layer.running_var is not None
    nn.init.constant_(layer.running_var, variance)
    return layer


def positions(value: float) -> AddPositions:
    layer = AddPositions(2, 4)
    nn.init.constant_(layer.positions, value)
    return layer


def biased(value: float) -> nn.Linear:
    layer = nn.Linear(4, 4)
    nn.init.eye_(layer.weight)
    nn.init.constant_(layer.bias, value)
    return layer


def convolution(value: float, bias: float | None = None) -> nn.Conv2d:
    layer = nn.Conv2d(1, 1, 1, bias=bias is not None)
    nn.init.constant_(layer.weight, value)
    if bias is not None:
        nn.init.constant_(layer.bias, bias)
    return layer


BIG, LIMIT = 2.0**100, 2.0**-126  # LIMIT: the smallest normal number
# name → (layer, the one number of the input that is not 0). In each a subnormal operand makes an ordinary number.
CASES: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "linear-input": (lambda: linear(BIG), SMALL),
    "linear-weight": (lambda: linear(SMALL), BIG),
    "attention-token": (lambda: attention(BIG, 1.0), SMALL),
    "attention-value": (lambda: attention(SMALL, 1.0), BIG),
    "attention-output": (lambda: attention(BIG, SMALL), 1.0),
    "attention-mixed": (lambda: attention(2.0**-64, BIG), 2.0**-64),
    "attention-factor": (lambda: attention(2.0**50, 2.0**50, output_scale=SMALL), 1.0),
    "attention-scale": (lambda: attention(1.0, 1.0, logits=1.0, scale=SMALL), 2.0**62),
    "residual-skip": (lambda: Residual(linear(2.0**-60), skip=SMALL, weight=0.0), BIG),
    "residual-weight": (lambda: Residual(linear(2.0**60), skip=0.0, weight=SMALL), 2.0**40),
    "residual-input": (lambda: Residual(linear(1.0), skip=BIG, weight=0.0), SMALL),
    "residual-branch": (lambda: Residual(linear(1.0), skip=0.0, weight=BIG), SMALL),
    "layernorm-input": (lambda: normalising(nn.LayerNorm, 1.0, 1e-24), SMALL),
    "rmsnorm-input": (lambda: normalising(nn.RMSNorm, 1.0, 1e-24), SMALL),
    "layernorm-eps": (lambda: normalising(nn.LayerNorm, 1.0, SMALL), 1e-25),
    "rmsnorm-eps": (lambda: normalising(nn.RMSNorm, 1.0, SMALL), 1e-25),
    "vector-groupnorm-input": (lambda: normalising(lambda n, eps: nn.GroupNorm(2, n, eps), 1.0, 1e-24), SMALL),
    "vector-groupnorm-gain": (lambda: normalising(lambda n, eps: nn.GroupNorm(1, n, eps), SMALL, 1e-4), BIG),
    "image-instancenorm-input": (lambda: nn.InstanceNorm2d(1, 1e-24), SMALL),
    "gelu-input": (lambda: ScaledGELU(2.0**-100), SMALL),
    "gelu-divisor": (lambda: ScaledGELU(SMALL), 1e-20),
    "normalize-input": (lambda: Normalize([0.0], [2.0**-100]), SMALL),
    "normalize-mean": (lambda: Normalize([SMALL], [2.0**-100]), 1.0),
    "normalize-std": (lambda: Normalize([0.0], [SMALL]), 1e-20),
    "relu": (nn.ReLU, SMALL),
    "leaky-input": (lambda: nn.LeakyReLU(1e6), -SMALL),
    "leaky-slope": (lambda: nn.LeakyReLU(SMALL), -1e30),
    "elu-input": (lambda: nn.ELU(1e6), -SMALL),
    "elu-alpha": (lambda: nn.ELU(SMALL), -3.0),
    "celu-input": (lambda: nn.CELU(1e6), -1e-36),
    "softplus-sharp": (lambda: nn.Softplus(1e6), -1e-4),
    "softshrink": (lambda: nn.Softshrink(SMALL), 1.5 * SMALL),
    "clamp": (lambda: Clamp(-SMALL, 1.0), -1.0),
    "hardswish": (nn.Hardswish, SMALL),
    "mish": (nn.Mish, -80.0),
    "maxmin": (MaxMin, SMALL),
    "groupsort": (GroupSort, SMALL),
    "householder-input": (lambda: Householder(4), SMALL),
    "householder-angle": (lambda: householder(SMALL), BIG),
    "normalize-both": (lambda: Normalize([-0.98 * LIMIT], [2.0**-100]), 0.98 * LIMIT),
    "positions-both": (lambda: positions(0.98 * LIMIT), 0.98 * LIMIT),
    "linear-bias": (lambda: biased(0.98 * LIMIT), 0.98 * LIMIT),
    "groupsort-pair": (GroupSort, 0.98 * LIMIT),
    "image-maxpool": (lambda: nn.MaxPool2d(2), 0.98 * LIMIT),
    "positions": (lambda: AddPositions(2, 4), SMALL),
    "mean": (MeanTokens, SMALL),
    "vector-batchnorm-input": (lambda: batchnorm(1.0, 2.0**-80, 0.0), SMALL),
    "vector-batchnorm-gain": (lambda: batchnorm(SMALL, 2.0**-80, 0.0), 2.0**60),
    "vector-batchnorm-variance": (lambda: batchnorm(1.0, SMALL, SMALL), 1e-25),
    "image-conv-input": (lambda: convolution(BIG), SMALL),
    "image-conv-weight": (lambda: convolution(SMALL), BIG),
    "image-conv-bias": (lambda: convolution(2.0**-60, 0.98 * LIMIT), 0.98 * 2.0**-66),
}


def case(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(layer in float32, an input of one sample, how far its execution is from exact in ℓ2: of the token, or of the image)."""
    make, size = CASES[name]
    layer = make().eval()
    x = torch.zeros(*({"image": (1, 1, 2, 2), "vector": (1, 4)}.get(name.split("-")[0], (1, 2, 4))))
    x.flatten()[{"householder-angle": 2, "image-maxpool": 3}.get(name, 0)] = size
    if name == "groupsort-pair":
        x.flatten()[1] = -size  # equal, where both count for zero: they may stay in this order
    with torch.no_grad():
        exact = layer.double()(x.double())
        layer.float()
        found = flushed(layer, x)
        off = torch.maximum((found.double() - exact).abs(), (layer(x).double() - exact).abs()).nan_to_num(math.inf, math.inf)
    return layer, x, off.flatten().norm() if name.startswith("image") else off.norm(dim=-1).max()


@pytest.mark.parametrize("name", CASES)
def test_rules_count_subnormal_operands(name: str) -> None:
    layer, x, off = case(name)
    norm = x.double().norm().reshape(1)
    zero = torch.zeros_like(norm)
    sizes = {"image": (1, 4, (1, 2, 2)), "vector": (1, 4, None)}.get(name.split("-")[0], (2, 4, None))
    state = State(norm, zero, zero, "l2", *sizes)
    try:
        after = rule_for(layer).step(layer, state, Context(torch.float32, {}))
    except BadInput:
        return  # refused: nothing is claimed
    assert off > 0
    assert float(after.rounding) >= float(off)


@pytest.mark.parametrize("name", CASES)
def test_expansions_count_subnormal_operands(name: str) -> None:
    layer, x, off = case(name)
    start, whole = (x.double(), None) if x.dim() == 3 else (x.double().flatten(1)[:, None], tuple(x.shape[1:]) if x.dim() == 4 else None)
    try:
        expansion = ChainExpansion([layer.double()], start, Scope(Context(torch.float32, {}), whole=whole))
    except BadInput:
        return
    zero = torch.zeros(1, start.shape[1], dtype=torch.float64)
    radius = expansion.advance(Ball.of(zero), remainder=False).radius
    assert float(radius.max()) >= float(off)
