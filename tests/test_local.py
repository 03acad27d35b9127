"""The contract of every expansion, and the methods 'local' and 'dual', which use them.

A new expansion adds one line to CASES and inherits all of the contract: the radius, the nonlinear part and the dual-weighted loss that it promises
are never exceeded, by perturbations that gradient ascent chose, on radii from tiny to huge, in exact arithmetic and as executed.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from attention_forms import FORMS, form
from formulas import ELEMENTWISE as FORMULAS
from formulas import NORMS
from processors import flushing
from torch import Tensor, nn

from robustlip.attacks.minnorm import MinimumRadius
from robustlip.attacks.pgd import PGD
from robustlip.attacks.worst_weights import worst_attention
from robustlip.certifiers import certify
from robustlip.domains.expansion import Ball, ChainExpansion, CurvatureTerm, Expansion, JacobianChain, Scope, decrease, expand
from robustlip.domains.expansion import base as local_base
from robustlip.domains.expansion.attention import SoftmaxBall, sums_of_others
from robustlip.domains.expansion.crossing import TOKENS, MatrixKinkTerm
from robustlip.domains.expansion.dual import EXTENSIONS, Rivals, _largest_radii, first_order, is_causal, single_token_radii, single_token_reference
from robustlip.domains.expansion.elementwise import ElementwiseExpansion
from robustlip.domains.expansion.local import reference_of, search
from robustlip.domains.norms import Context
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import (
    Abs,
    AddPositions,
    Attention,
    Chain,
    Channels,
    Clamp,
    Concatenate,
    Constant,
    Flip,
    Lookup,
    Maximum,
    MaxMin,
    MeanTokens,
    Minimum,
    NextTokenChain,
    Normalize,
    Patchify,
    Permute,
    PrependToken,
    Product,
    Residual,
    Scale,
    ScaledGELU,
    Select,
    SelectToken,
    Shift,
    Slice,
    Sum,
    Tokens,
    View,
)
from robustlip.layers.sorting import GroupSort, Householder
from robustlip.models import BaselineGPT, LipschitzGPT, LipschitzMLP, LipschitzTransformer
from robustlip.ops import elementwise_layers, elementwise_of
from robustlip.ops.elementwise import GELU_THIRD
from robustlip.ops.moves import moving_layers
from robustlip.ops.normalization import CURVATURE, NORMALIZATIONS
from robustlip.threats import EmbeddingBall, InputBall, WeightBall, parse_threat

D, T, H = 8, 3, 4


def scaled(layer: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(factor)
    return layer


def attention(gain: float = 2.0, **options) -> Attention:
    return scaled(Attention(D, H, **options), gain)


def attention_of(width: int) -> Attention:
    return scaled(Attention(width, 2, causal=False), 2.0)


def drawn(layer: nn.Module, low: float = -2.0, high: float = 2.0) -> nn.Module:
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(low, high)
    return layer


def gpt_blocks(normalised: bool = True, activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    def norm() -> list[nn.Module]:
        return [drawn(nn.LayerNorm(D, eps=1e-3))] if normalised else []

    mlp = nn.Sequential(*norm(), nn.Linear(D, 12), activation(), nn.Linear(12, D))
    return nn.Sequential(Residual(nn.Sequential(*norm(), attention())), Residual(mlp, skip=0.7, weight=-0.6), Residual(attention(rope=False)))


@dataclass(frozen=True)
class Case:
    """One layer or chain; shape of a sample; the norm of the radius; size: of the clean input; whole: bounded as one vector."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (T, D)
    space: str = "l2"
    size: float = 1.0
    whole: bool = False


def vector(build: Callable[[], nn.Module], space: str = "l2", n: int = D) -> Case:
    return Case(build, (n,), space, whole=True)


def fused(activation: Callable[[], nn.Module], gain: float = 2.0, width: int = 11) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(scaled(nn.Linear(D, width), gain), activation())


def normed(layer: nn.Module) -> nn.Module:
    """A batch norm with statistics of its own."""
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(-2, 2)
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.05, 4)
    return layer.eval()


def cancelling(first: nn.Module, last: nn.Module, f: nn.Module) -> Residual:
    """x + G f(Hx + b) with G next to −ΛHᵀ."""
    with torch.no_grad():
        scale = 0.3 * torch.rand(len(first.weight)) + 0.1
        last.weight.copy_(-scale * first.weight.T if first.weight.dim() == 2 else -scale.view(-1, 1, 1, 1) * first.weight)
        last.weight += 0.001 * torch.randn_like(last.weight)
    return Residual(nn.Sequential(first, f, last))


def image(build: Callable[[], nn.Module], space: str = "l2", shape: tuple[int, ...] = (4, 5, 4)) -> Case:
    return Case(build, shape, space, whole=True)


def signal(build: Callable[[], nn.Module], space: str = "l2") -> Case:
    return Case(build, (4, 7), space, whole=True)


VOLUME = (2, 3, 4, 3)


# Paddings one after the other, (norm of the radius, shape of a sample).
PADS = [
    ([lambda: nn.ConstantPad1d((2, -1), 0.37), lambda: nn.ReflectionPad1d(2), lambda: nn.ReplicationPad1d(1), lambda: nn.CircularPad1d(3),
      lambda: nn.ZeroPad1d(1)], "l2", (3, 5)),
    ([lambda: nn.ConstantPad2d(1, -0.7), lambda: nn.ReflectionPad2d((1, 0, 1, 2)), lambda: nn.ReplicationPad2d(1), lambda: nn.CircularPad2d(1)],
     "l1", (2, 3, 4)),
    ([lambda: nn.ConstantPad3d(1, 1.3), lambda: nn.ReflectionPad3d(1), lambda: nn.ReplicationPad3d((1, 0, 0, 2, 0, 0)), lambda: nn.CircularPad3d(1),
      lambda: nn.ZeroPad3d(1), lambda: nn.Conv3d(1, 2, 3, 2)], "linf", (1, 2, 2, 2)),
]  # fmt: skip


def convolved(*behind: Callable[[], nn.Module], gain: float = 2.0, **options) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(scaled(nn.Conv2d(4, 6, 3, **{"padding": 1, **options}), gain), *(make() for make in behind))


def resnet() -> nn.Module:
    inner = nn.Sequential(scaled(nn.Conv2d(4, 6, 3, padding=1), 2), normed(nn.BatchNorm2d(6)), nn.ReLU(), nn.Conv2d(6, 5, 1))
    return nn.Sequential(Sum(inner, nn.Conv2d(4, 5, 1), weights=(0.7, -1.2)), nn.ReLU(), Residual(nn.Conv2d(5, 5, 3, padding=1), skip=0.5))


IMAGES = {
    "conv": image(lambda: nn.Conv2d(4, 6, 3, padding=1)), "conv-plain": image(lambda: nn.Conv2d(4, 3, 2, bias=False)),
    "conv-linf": image(lambda: nn.Conv2d(4, 6, 3, padding=1), "linf"), "conv-l1": image(lambda: nn.Conv2d(4, 6, 3, padding=1), "l1"),
    "conv-stride": image(lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0)), "linf"),
    "conv-same": image(lambda: nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(1, 2))), "conv-groups": image(lambda: nn.Conv2d(4, 6, 3, groups=2)),
    **{f"conv-{mode}": image(lambda mode=mode: nn.Conv2d(4, 3, 3, padding=2, padding_mode=mode)) for mode in ("circular", "reflect", "replicate")},
    "signal": signal(
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, stride=2), normed(nn.BatchNorm1d(6)), nn.ReLU(), nn.Conv1d(6, 3, 2), nn.GELU()), "linf"
    ),
    "signal-resnet": signal(lambda: nn.Sequential(
        Residual(nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.GELU(), nn.Conv1d(4, 4, 1))), Sum(nn.Conv1d(4, 3, 1), nn.Conv1d(4, 3, 1)), nn.ReLU())
    ),
    "signal-pools": signal(
        lambda: nn.Sequential(nn.AvgPool1d(2, 1), nn.ConvTranspose1d(4, 3, 3, 2, 1, 1), nn.Tanh(), nn.MaxPool1d(3, 2), nn.AdaptiveAvgPool1d(1)), "l1"
    ),
    "transposed": image(lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1, groups=1), "linf"),
    "transposed-relu": image(lambda: nn.Sequential(scaled(nn.ConvTranspose2d(4, 6, (2, 3), (2, 1), groups=2), 2), nn.ReLU(), nn.Conv2d(6, 2, 2))),
    "transposed-maxmin": image(lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, dilation=2), MaxMin()), "l1"),
    "volume": image(
        lambda: nn.Sequential(nn.Conv3d(2, 4, 2, padding=1), normed(nn.BatchNorm3d(4)), nn.GELU(), nn.MaxPool3d(2, 1)), "linf", VOLUME
    ),
    "adaptive": image(lambda: nn.Sequential(nn.AdaptiveAvgPool2d((3, 3)), nn.Conv2d(4, 2, 2), nn.ReLU()), "linf"),
    "upsampled": image(lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 2, 3), nn.GELU())),
    "upsampled-copies": image(lambda: nn.Sequential(nn.UpsamplingNearest2d(scale_factor=2), nn.UpsamplingBilinear2d((7, 9))), "l1"),
    "volume-means": image(lambda: nn.Sequential(nn.AvgPool3d(2, 1), nn.Conv3d(2, 3, 1)), "l1", VOLUME),
    "volume-resnet": image(lambda: nn.Sequential(
        Residual(nn.Sequential(nn.Conv3d(2, 2, 3, padding=1), nn.ReLU())), nn.ConvTranspose3d(2, 2, 2, 2), nn.AdaptiveAvgPool3d(1)), "l2", VOLUME
    ),
    "conv-relu": image(convolved(nn.ReLU)), "conv-relu-linf": image(convolved(nn.ReLU), "linf"), "conv-relu-l1": image(convolved(nn.ReLU), "l1"),
    "conv-gelu": image(convolved(nn.GELU)), "conv-tanh-linf": image(convolved(nn.Tanh), "linf"), "conv-silu-l1": image(convolved(nn.SiLU), "l1"),
    "conv-replicate-relu": image(convolved(nn.ReLU, padding=2, padding_mode="replicate")), "conv-stride-relu": image(convolved(nn.ReLU, stride=2)),
    "conv-leaky-falls": image(convolved(lambda: nn.LeakyReLU(-0.5))), "conv-hardtanh": image(convolved(nn.Hardtanh)),
    "conv-selu-linf": image(convolved(nn.SELU), "linf"), "conv-hardswish": image(convolved(nn.Hardswish, gain=6.0)),
    "conv-softshrink-l1": image(convolved(nn.Softshrink), "l1"), "conv-mish": image(convolved(nn.Mish)),
    "conv-maxmin": image(convolved(MaxMin)), "conv-maxmin-linf": image(convolved(MaxMin), "linf"), "conv-groupsort": image(convolved(GroupSort)),
    "conv-householder": image(convolved(lambda: drawn(Householder(6), -7, 7))), "conv-groups-maxmin": image(convolved(MaxMin, groups=2)),
    "conv-groups-groupsort": image(convolved(GroupSort, groups=2, padding=0)), "conv-maxmin-steep": image(convolved(MaxMin, gain=20.0)),
    "conv-norm": image(convolved(lambda: normed(nn.BatchNorm2d(6)))), "conv-norm-relu": image(convolved(lambda: normed(nn.BatchNorm2d(6)), nn.ReLU)),
    "conv-norm-gelu-linf": image(convolved(lambda: normed(nn.BatchNorm2d(6)), nn.GELU), "linf"),
    "conv-norm-maxmin": image(convolved(lambda: normed(nn.BatchNorm2d(6)), MaxMin)),
    "norm-image": image(lambda: normed(nn.BatchNorm2d(4))),
    "norm-image-linf": image(lambda: nn.Sequential(normed(nn.BatchNorm2d(4)), nn.Conv2d(4, 3, 2)), "linf"),
    "norm-image-l1": image(lambda: normed(nn.BatchNorm2d(4)), "l1"),
    "norm-vector": vector(lambda: normed(nn.BatchNorm1d(D))),
    "norm-vector-linf": vector(lambda: nn.Sequential(normed(nn.BatchNorm1d(D)), nn.Linear(D, 5)), "linf"),
    "linear-norm-relu": vector(lambda: nn.Sequential(scaled(nn.Linear(D, 11), 2.0), normed(nn.BatchNorm1d(11)), nn.ReLU())),
    "linear-norm-maxmin-l1": vector(lambda: nn.Sequential(scaled(nn.Linear(D, 12), 2.0), normed(nn.BatchNorm1d(12)), MaxMin()), "l1"),
    "average": image(lambda: nn.AvgPool2d(2)), "average-overlap": image(lambda: nn.AvgPool2d(3, 1, 1)),
    "average-linf": image(lambda: nn.Sequential(nn.AvgPool2d(2, 1), nn.Conv2d(4, 3, 2)), "linf"),
    "average-l1": image(lambda: nn.AvgPool2d(2, 1), "l1"), "average-all": image(lambda: nn.AdaptiveAvgPool2d(1)),
    "average-all-l1": image(lambda: nn.AdaptiveAvgPool2d(1), "l1"),
    "maxima": image(lambda: nn.MaxPool2d(2)), "maxima-overlap": image(lambda: nn.MaxPool2d(3, 1, 1)),
    "maxima-linf": image(lambda: nn.MaxPool2d(2, 1), "linf"),
    "maxima-dilated": image(lambda: nn.MaxPool2d(2, 1, dilation=2)), "maxima-one": image(lambda: nn.MaxPool2d(1)),
    "image-relu": image(nn.ReLU), "image-tanh": image(nn.Tanh, "linf"), "image-maxmin": image(MaxMin), "image-groupsort": image(GroupSort, "l1"),
    "image-householder": image(lambda: drawn(Householder(4), -7, 7)), "resnet": image(resnet),
    "image-concatenate": image(lambda: nn.Sequential(Concatenate(nn.Conv2d(4, 3, 3, padding=1), nn.ReLU()), nn.Conv2d(7, 3, 2), nn.GELU())),
    "image-channels": image(lambda: nn.Sequential(Channels(1, 3), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())),
    "convnet": image(
        lambda: nn.Sequential(
            Normalize([0.1, 0.4], [0.5, 0.2]), scaled(nn.Conv2d(2, 4, 3, padding=1), 2), nn.ReLU(), scaled(nn.Conv2d(4, 6, 3, stride=2), 2),
            nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(6, 3),
        ), "linf", (2, 5, 5),
    ),
}  # fmt: skip
IMAGE = (2, 4, 4)
CASES = {
    "linear": Case(lambda: nn.Linear(D, 5)),
    "linear-linf": vector(lambda: nn.Linear(D, 5), "linf"),
    "linear-l1": vector(lambda: nn.Linear(D, 5), "l1"),
    "relu": Case(nn.ReLU), "gelu": Case(nn.GELU), "gelu-tanh": Case(lambda: nn.GELU("tanh")), "scaled-gelu": Case(lambda: ScaledGELU(0.5)),
    "tanh": Case(nn.Tanh), "sigmoid": Case(nn.Sigmoid), "silu": Case(nn.SiLU),
    "leaky": Case(nn.LeakyReLU), "leaky-falls": Case(lambda: nn.LeakyReLU(-0.5)), "leaky-steep": Case(lambda: nn.LeakyReLU(2.0)),
    "prelu": Case(lambda: nn.PReLU(init=-0.7)), "abs": Case(Abs), "clamp": Case(lambda: Clamp(-0.7, 0.9)),
    "threshold": Case(lambda: nn.Threshold(0.3, 0.3)),
    "hardtanh": Case(nn.Hardtanh), "relu6": Case(nn.ReLU6, size=4.0), "hardsigmoid": Case(nn.Hardsigmoid, size=3.0),
    "softshrink": Case(nn.Softshrink),
    "hardshrink": Case(lambda: nn.Hardshrink(0.0)), "elu": Case(nn.ELU), "elu-steep": Case(lambda: nn.ELU(2.5)),
    "elu-falls": Case(lambda: nn.ELU(-1.5)),
    "celu": Case(lambda: nn.CELU(0.3)), "selu": Case(nn.SELU), "softplus": Case(lambda: nn.Softplus(3.0)), "logsigmoid": Case(nn.LogSigmoid),
    "softsign": Case(nn.Softsign), "tanhshrink": Case(nn.Tanhshrink), "mish": Case(nn.Mish), "hardswish": Case(nn.Hardswish, size=3.0),
    "linear-leaky": Case(fused(lambda: nn.LeakyReLU(-0.5))), "linear-hardtanh": Case(fused(nn.Hardtanh)),
    "linear-softshrink": Case(fused(nn.Softshrink)),
    "linear-elu": Case(fused(lambda: nn.ELU(2.5))), "linear-selu-linf": vector(fused(nn.SELU), "linf"), "linear-abs-l1": vector(fused(Abs), "l1"),
    "linear-hardswish": Case(fused(nn.Hardswish, 6.0)), "linear-softplus": Case(fused(nn.Softplus)), "linear-mish": Case(fused(nn.Mish)),
    "linear-relu": Case(fused(nn.ReLU)), "linear-gelu": Case(fused(nn.GELU)), "linear-gelu-tanh": Case(fused(lambda: nn.GELU("tanh"))),
    "linear-scaled-gelu": Case(fused(ScaledGELU)), "linear-tanh": Case(fused(nn.Tanh)), "linear-sigmoid": Case(fused(nn.Sigmoid)),
    "linear-silu": Case(fused(nn.SiLU)), "linear-gelu-steep": Case(fused(nn.GELU, 20.0)),
    "linear-relu-linf": vector(fused(nn.ReLU), "linf"), "linear-gelu-linf": vector(fused(nn.GELU), "linf"),
    "linear-tanh-l1": vector(fused(nn.Tanh), "l1"), "linear-relu-l1": vector(fused(nn.ReLU), "l1"),
    "tanh-linf": vector(nn.Tanh, "linf"), "relu-l1": vector(nn.ReLU, "l1"),
    "mlp": vector(lambda: nn.Sequential(nn.Linear(D, 12), nn.GELU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 6), nn.Tanh()), "linf"),
    "attention": Case(attention),
    "attention-bidirectional": Case(lambda: attention(causal=False)),
    "attention-no-rope": Case(lambda: attention(rope=False)),
    "attention-distance-bias": Case(lambda: attention(distance_bias=2, scale=2.0)),
    "attention-large-scale": Case(lambda: attention(4.0, scale=8.0, output_scale=-2.0)),
    "attention-one-head": Case(lambda: scaled(Attention(D, 1, causal=False), 2.0)),
    "attention-one-token": Case(attention, (1, D)),
    "attention-peaked": Case(lambda: attention(6.0, scale=8.0), size=3.0),
    "layernorm": Case(lambda: drawn(nn.LayerNorm(D, eps=1e-3))),
    "image-layernorm": image(lambda: drawn(nn.LayerNorm(4, eps=1e-2))), "image-rmsnorm": image(lambda: drawn(nn.RMSNorm((5, 4), eps=1e-2))),
    "image-layernorm-whole": image(lambda: drawn(nn.LayerNorm((4, 5, 4), eps=1e-2)), "linf"),
    "signal-layernorm-whole": signal(lambda: drawn(nn.LayerNorm((4, 7), eps=1e-2))),
    "groupnorm": image(lambda: drawn(nn.GroupNorm(2, 4, eps=1e-2))), "groupnorm-vector": vector(lambda: drawn(nn.GroupNorm(2, D, eps=1e-3))),
    "groupnorm-small": Case(lambda: nn.GroupNorm(4, 4, eps=1e-2, affine=False), (4, 5, 4), size=0.3, whole=True),
    "conv-groupnorm-gelu": image(convolved(lambda: drawn(nn.GroupNorm(3, 6, eps=1e-2)), nn.GELU), "linf"),
    "instancenorm": image(lambda: drawn(nn.InstanceNorm2d(4, eps=1e-2, affine=True))),
    "signal-instancenorm": signal(lambda: nn.Sequential(Residual(nn.Sequential(nn.InstanceNorm1d(4, eps=1e-2), nn.Conv1d(4, 4, 1))), nn.ReLU())),
    "volume-instancenorm": image(lambda: drawn(nn.InstanceNorm3d(2, eps=1e-2, affine=True)), "l2", VOLUME),
    "sum-uneven": Case(lambda: Sum(nn.Sequential(scaled(nn.Linear(D, 5), 9.0), nn.LeakyReLU(0.5)), scaled(nn.Linear(D, 5), 1e-3))),
    "cancelling": Case(lambda: cancelling(nn.Linear(D, 10), nn.Linear(10, D), nn.GELU())),
    "image-cancelling": image(lambda: nn.Sequential(
        cancelling(nn.Conv2d(4, 3, 3, padding=1), nn.ConvTranspose2d(3, 4, 3, padding=1), nn.ReLU()), nn.Conv2d(4, 2, 2)), "linf"
    ),
    "maximum-constant": Case(lambda: nn.Sequential(nn.Linear(D, 8), Maximum(nn.Identity(), Constant(torch.randn(T, 8))), nn.Linear(8, 3))),
    "image-minimum-constant": image(lambda: Minimum(Constant(torch.randn(4, 5, 4)), nn.Conv2d(4, 4, 3, padding=1)), "linf"),
    "concatenate-constant": vector(lambda: nn.Sequential(Concatenate(nn.Identity(), Constant(torch.randn(3))), nn.Linear(D + 3, 5)), "l1"),
    "image-concatenate-constant": image(lambda: nn.Sequential(Concatenate(Constant(torch.randn(2, 5, 4)), nn.ReLU()), nn.Conv2d(6, 2, 2))),
    "layernorm-plain": Case(lambda: nn.LayerNorm(D, eps=1e-2, elementwise_affine=False), size=0.3),
    **{name: Case(lambda name=name: NORMS[name](D, 1e-3), size=0.3) for name in NORMS},
    "linear-formula": Case(fused(lambda: FORMULAS["gelu-erf"])), "linear-gelu-new": Case(fused(lambda: FORMULAS["gelu-new"])),
    "rmsnorm": Case(lambda: drawn(nn.RMSNorm(D, eps=1e-3)), size=0.3),
    "residual-mlp": Case(lambda: Residual(nn.Sequential(nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D)), skip=-0.5, weight=1.5)),
    "sum": Case(lambda: Sum(nn.Linear(D, 5), nn.Sequential(nn.Linear(D, 9), nn.GELU(), nn.Linear(9, 5)), weights=(0.7, -1.5))),
    "sum-attention": Case(lambda: Sum(nn.Identity(), attention(), nn.Linear(D, D), weights=(1.0, 0.5, 2.0))),
    "sum-relu": vector(lambda: Sum(nn.Sequential(nn.Linear(D, 9), nn.ReLU(), nn.Linear(9, 5)), nn.Linear(D, 5)), "l1"),
    "concatenate": Case(lambda: Concatenate(nn.Linear(D, 5), nn.Identity(), nn.Sequential(nn.Linear(D, 3), nn.Tanh()))),
    "scale": Case(lambda: nn.Sequential(Scale(torch.linspace(-2, 3, D)), nn.Linear(D, 5), nn.GELU())),
    "scale-divide-linf": vector(lambda: nn.Sequential(Scale(-0.3, divide=True), nn.Linear(D, 5), nn.ReLU()), "linf"),
    "image-zeros": image(lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 3)), nn.Conv2d(4, 3, 3), nn.ReLU()), "linf"),
    "shift-l1": vector(lambda: nn.Sequential(Shift(torch.linspace(-2, 3, D)), nn.Linear(D, 5), nn.GELU()), "l1"),
    "image-scale": image(
        lambda: nn.Sequential(Shift([0.1, 0.2, 0.3, 0.4], subtract=True), Scale([0.5, 1.0, 2.0, -3.0], divide=True), nn.Conv2d(4, 3, 3))
    ),
    "select-token": Case(lambda: nn.Sequential(nn.Linear(D, 6), nn.GELU(), SelectToken(-1), nn.Linear(6, 2))),
    "select-token-whole": Case(lambda: nn.Sequential(SelectToken(1), nn.Linear(D, 5)), space="linf", whole=True),
    "prepend-token": Case(lambda: nn.Sequential(PrependToken(torch.randn(1, 2, D)), attention(causal=False), SelectToken())),
    "prepend-token-whole": Case(lambda: nn.Sequential(PrependToken(torch.randn(D)), nn.GELU()), space="l1", whole=True),
    "tokens-of-images": image(
        lambda: nn.Sequential(Tokens(), Shift(torch.randn(20, 4)), attention_of(4), nn.LayerNorm(4, eps=1e-3), SelectToken(3)), "linf"
    ),
    "tokens-turned": Case(lambda: nn.Sequential(Tokens(), nn.Linear(T, 5), nn.GELU())),
    "views": image(
        lambda: nn.Sequential(Permute(0, 2, 1, 3), View(10, 8), Slice(2, 1, 8, 3), nn.Conv1d(10, 4, 2), nn.GELU(), Select(2, 0)),
        "linf",
    ),
    "unflatten": vector(lambda: nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2)), "l1"),
    "mixed-tokens": Case(
        lambda: nn.Sequential(nn.Linear(D, 6), nn.GELU(), Slice(1, 1, 3), Flip(2), Permute(0, 2, 1), nn.Flatten(), nn.Linear(12, 3))
    ),
    "shuffles": image(lambda: nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(2), nn.Conv2d(4, 2, 2)), "l1"),
    **{f"pads-{i}": image(lambda pads=pads: nn.Sequential(*(pad() for pad in pads)), space, shape) for i, (pads, space, shape) in enumerate(PADS)},
    "shift-table": Case(lambda: nn.Sequential(Shift(torch.randn(1, T, D), subtract=True), nn.Linear(D, 5), nn.GELU())),
    "shift-table-whole": Case(lambda: nn.Sequential(Shift(torch.randn(T, D)), nn.Flatten(), nn.Linear(T * D, 5)), space="l1", whole=True),
    "scale-table": Case(lambda: nn.Sequential(Scale(torch.randn(T, D)), Scale(torch.rand(T, 1) + 0.2, divide=True), nn.Linear(D, 5), nn.GELU())),
    "image-tables": image(lambda: nn.Sequential(Shift(torch.randn(4, 5, 4)), Scale(torch.randn(1, 5, 1)), nn.Conv2d(4, 3, 3), nn.ReLU()), "linf"),
    "product": Case(lambda: Product(nn.Sequential(scaled(nn.Linear(D, 9), 2.0), nn.SiLU()), nn.Linear(D, 9))),
    "product-linf": vector(lambda: nn.Sequential(Product(nn.Linear(D, 9), fused(nn.Sigmoid, width=9)()), nn.Linear(9, 5)), "linf"),
    "product-square": Case(lambda: nn.Sequential(scaled(nn.Linear(D, 9), 2.0), nn.ReLU(), Product(nn.Identity(), nn.Identity()))),
    "product-square-l1": vector(lambda: Product(nn.Identity(), nn.Identity()), "l1"),
    "product-attention": Case(lambda: Residual(Product(attention(), nn.Linear(D, D)), skip=0.5, weight=-0.7)),
    "image-product": image(lambda: Product(nn.Conv2d(4, 3, 3, padding=1), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 3, 1))), "linf"),
    "image-product-gate": image(lambda: Product(nn.ReLU(), nn.Sequential(nn.AdaptiveAvgPool2d(1), scaled(nn.Conv2d(4, 4, 1), 3.0), nn.Sigmoid()))),
    "image-product-mean": image(lambda: Product(nn.Identity(), nn.AdaptiveAvgPool2d(1))),
    "maximum": Case(lambda: Maximum(scaled(nn.Linear(D, 9), 2.0), nn.Linear(D, 9))),
    "minimum-linf": vector(lambda: Minimum(nn.Linear(D, 9), nn.Linear(D, 9, bias=False)), "linf"),
    "maximum-mixed-linf": vector(lambda: Maximum(nn.Linear(D, 9), fused(nn.Tanh, width=9)()), "linf"),
    "image-minimum": image(lambda: Minimum(nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 3, 1))),
    "channels": Case(lambda: nn.Sequential(Channels(1, 4), nn.Linear(3, 5), nn.GELU())),
    "residual-identity": Case(lambda: Residual(nn.Identity(), skip=1 / 3, weight=0.7)),
    "residual-attention": Case(lambda: Residual(attention(), skip=0.5, weight=-1.5)),
    "flatten": Case(nn.Flatten), "flatten-linear": Case(lambda: nn.Sequential(nn.Flatten(), nn.Linear(T * D, 5), nn.ReLU())),
    "positions": Case(lambda: drawn(AddPositions(T, D))),
    "mean": Case(MeanTokens), "mean-linear": Case(lambda: nn.Sequential(nn.Linear(D, 6), nn.GELU(), MeanTokens(), nn.Linear(6, 2))),
    "identity": Case(nn.Identity), "dropout": Case(lambda: nn.Dropout(0.5).eval()),
    "dropouts": Case(lambda: nn.Sequential(nn.Dropout1d(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5), nn.Linear(D, 5)).eval()),
    "image-dropouts": Case(lambda: nn.Sequential(nn.Dropout2d(0.5), nn.Dropout3d(0.5), nn.Flatten(), nn.Linear(32, 6)).eval(), IMAGE, whole=True),
    "normalize-tokens": Case(lambda: Normalize([0.3] * D, [0.5, 2.0] * (D // 2))),
    "tokens-as-one": Case(lambda: nn.Sequential(Normalize([0.3] * D, [0.5, 2.0] * (D // 2)), nn.Linear(D, 6)), space="linf", whole=True),
    "image": Case(lambda: nn.Sequential(Normalize([0.1, 0.4], [0.5, 0.2]), nn.Flatten(), nn.Linear(32, 6), nn.ReLU()), IMAGE, "linf", whole=True),
    "image-l1": Case(lambda: nn.Sequential(Normalize([0.1, 0.4], [0.5, 0.2]), nn.Flatten(), nn.Linear(32, 6)), IMAGE, "l1", whole=True),
    "patches": Case(
        lambda: nn.Sequential(Normalize([0.1, 0.4], [0.5, 0.2]), Patchify(2), nn.Linear(8, D), drawn(AddPositions(4, D)), attention(causal=False)),
        IMAGE, "linf", whole=True,
    ),
    "patches-l2": Case(lambda: nn.Sequential(Patchify(2), nn.Linear(8, D), nn.GELU(), MeanTokens(), nn.Linear(D, 3)), IMAGE, whole=True),
    **IMAGES,
    "maxmin": Case(MaxMin), "groupsort": Case(GroupSort), "householder": Case(lambda: drawn(Householder(D), -7, 7)),
    "linear-maxmin": Case(fused(MaxMin, width=12)), "linear-maxmin-steep": Case(fused(MaxMin, 20.0, width=12)),
    "linear-groupsort": Case(fused(GroupSort, width=12)), "linear-householder": Case(fused(lambda: drawn(Householder(12), -7, 7), width=12)),
    "linear-maxmin-linf": vector(fused(MaxMin, width=12), "linf"), "linear-maxmin-l1": vector(fused(MaxMin, width=12), "l1"),
    "maxmin-linf": vector(MaxMin, "linf"),
    "mlp-maxmin": Case(lambda: nn.Sequential(scaled(nn.Linear(D, 32, bias=False), 3.0), MaxMin(), nn.Linear(32, D, bias=False))),
    "blocks-maxmin": Case(lambda: gpt_blocks(False, MaxMin)),
    "blocks": Case(gpt_blocks), "blocks-relu": Case(lambda: gpt_blocks(False, nn.ReLU)),
    **{f"attention-{name}": Case(lambda name=name: form(name, T, 2.0, 2.0)) for name in FORMS},
}  # fmt: skip

RADII = (1e-4, 1e-2, 0.3, 3.0, 100.0)


def case_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[Case, nn.Module]:
    torch.manual_seed(3)
    return CASES[name], CASES[name].build().to(dtype).requires_grad_(False).eval()


class Hardsigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 3).clamp(0, 6) / 6


class CELU(nn.Module):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.alpha * torch.expm1(x.clamp_max(0.0) / self.alpha))


def differentiable(layer: nn.Module) -> nn.Module:
    """The same function with derivatives in float64: torch's own of these two keep float32 numbers in whatever dtype."""
    if type(layer) is nn.Hardsigmoid:
        return Hardsigmoid()
    return CELU(layer.alpha) if type(layer) is nn.CELU else layer


def expanded(case: Case, layer: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64) -> ChainExpansion:
    """The layer (float64 copy) at x (N, …), as certifiers.local starts it."""
    twin = copy.deepcopy(layer).double()
    start = x.double().flatten(1).unsqueeze(1) if case.whole else x.double()
    whole = case.shape if case.whole and len(case.shape) > 1 else None
    return ChainExpansion([twin], start, Scope(Context(dtype, {}), case.space, whole))


def tokens(case: Case, x: Tensor) -> Tensor:
    """As expansions see samples: (N, T, D), or (N, 1, n)."""
    return x.flatten(1).unsqueeze(1) if case.whole else x


def seen(clean: Tensor, out: Tensor) -> Tensor:
    """An executed output in the shape of the expansion's."""
    return out.double().reshape(clean.shape)


def into(v: Tensor, radius: Tensor, space: str) -> Tensor:
    """v (N, T, D) onto the ball of each token's radius (N, T)."""
    if space == "linf":
        return v.clamp(-1, 1) * radius.unsqueeze(-1)
    order = 2 if space == "l2" else 1
    return v * (radius / torch.linalg.vector_norm(v, ord=order, dim=-1).clamp_min(1e-300)).unsqueeze(-1)


@dataclass
class Attacked:
    """Largest ratios of observed to bounded values, by radius: of the radius after the layer, of the nonlinear part, of the dual-weighted loss."""

    radius: Tensor
    error: Tensor
    loss: Tensor

    def largest(self) -> float:
        return float(torch.stack([self.radius, self.error, self.loss]).amax())


def attacked(expansion: Expansion, function: Callable[[Tensor], Tensor], x: Tensor, space: str = "l2", steps: int = 32) -> Attacked:
    """Gradient ascent on the three fractions at once, each by samples of its own. x (N, T, D) is what the expansion was made at, N a multiple
    of 3·RADII; function maps (N, T, D) to the true output. Adjoints are random first, then turned against the remainder that was found.
    """
    n = len(x)
    radius = torch.tensor(RADII, dtype=torch.float64).repeat(n // len(RADII))[:, None].expand(n, x.shape[1]).clone()
    wanted = (torch.arange(n) // len(RADII)) % 3
    behind, error, bounds = expansion.advance(Ball.of(radius))
    generator = torch.Generator().manual_seed(5)
    g = torch.randn(expansion.clean.shape, generator=generator, dtype=torch.float64)
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=0.2)
    found = torch.zeros(3, n, dtype=torch.float64)
    base = function(x)
    noise = 1e-13 * (behind + base.norm(dim=-1) + x.norm(dim=-1).amax(-1, keepdim=True))  # of this test's own float64 differences
    allowed = None
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        for step in range(steps):
            delta = into(v, radius, space)
            change = function(x + delta) - base
            _, pushed = torch.func.jvp(function, (x,), (delta,))
            rest = change - pushed
            if step in (steps // 2, steps - 8):
                turned = -rest.detach() / rest.detach().abs().amax((-1, -2), keepdim=True).clamp_min(1e-300)
                g = torch.where((torch.arange(n) % 2 == 0)[:, None, None], turned, g)
                allowed = None
            if allowed is None:
                allowed = decrease(torch.zeros(1, n, dtype=torch.float64), expansion.adjoint(g[None])[1], bounds)[0]
            fractions = torch.stack(
                [
                    (change.norm(dim=-1) / behind).amax(-1),
                    (rest.norm(dim=-1) / (error + noise)).amax(-1),
                    -(g * rest).sum((-1, -2)) / (allowed + (g.norm(dim=-1) * noise).sum(-1)),
                ]
            )
            found = torch.maximum(found, fractions.detach().nan_to_num(0.0))
            optimizer.zero_grad()
            (-fractions.gather(0, wanted[None]).sum()).backward()
            assert v.grad is not None
            v.grad.nan_to_num_(0.0)
            optimizer.step()
    by_radius = found.view(3, -1, len(RADII)).amax(1)
    return Attacked(*by_radius)


def samples(case: Case, count: int = 30) -> Tensor:
    x = torch.randn(count, *case.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64) * case.size
    x[: count // 3] *= 0.05  # near 0 as well, where activations bend and norms are small
    return x


@pytest.mark.parametrize("name", CASES)
def test_what_an_expansion_promises_is_never_exceeded(name) -> None:
    case, layer = case_of(name)
    x = samples(case)
    expansion = expanded(case, layer, x)
    layer = differentiable(layer)

    def function(v: Tensor) -> Tensor:
        return layer(v.reshape(len(v), *case.shape)).reshape(len(v), *expansion.clean.shape[1:])

    torch.testing.assert_close(function(tokens(case, x)), expansion.clean, rtol=1e-9, atol=1e-12)
    result = attacked(expansion, function, tokens(case, x), case.space)
    assert result.largest() <= 1 + 1e-9, result
    assert float(result.radius.amax()) > 0.05, result  # a bound that nothing comes near would hide a broken attack


def test_an_expansion_of_a_table_of_tokens() -> None:
    """Embedding: a radius before it does not change its rows; a change of its table changes them by ‖E‖."""
    torch.manual_seed(3)
    layer = nn.Embedding(11, D).double().requires_grad_(False)
    ids = torch.arange(6).view(2, 3)
    sigma = float(torch.linalg.matrix_norm(layer.weight, 2))
    for weight_radius, moved in ((None, 0.0), (torch.full((2,), 0.3, dtype=torch.float64), 0.3 * sigma)):
        expansion = expand(layer, ids, Scope(Context(torch.float32, {})))
        assert bool((expansion.clean == layer(ids)).all())
        radius = torch.full((2, 3), 7.0, dtype=torch.float64)
        behind, error, _ = expansion.advance(Ball.of(radius, weight_radius), remainder=False)
        assert bool((behind >= moved).all()) and bool((behind <= moved * (1 + 1e-9) + 1e-300).all())
        assert bool((error >= moved).all())  # nothing of it is linear in the ids
        assert not bool(expansion.adjoint(torch.randn(4, 2, 3, D, dtype=torch.float64))[0].any())


def test_a_lookup_has_no_expansion() -> None:
    with pytest.raises(UnsupportedLayer, match="embedding threat"):
        expand(Lookup([], [], 4), torch.zeros(1, 2, dtype=torch.int64), Scope(Context(torch.float64, {}), "l2", None))


# Expansions whose input is no vector of numbers: by a test of their own.
BY_HAND = {nn.Embedding: test_an_expansion_of_a_table_of_tokens, Lookup: test_a_lookup_has_no_expansion}


def test_every_expansion_has_a_case() -> None:
    covered = {type(m) for case in CASES.values() for m in case.build().modules()} | BY_HAND.keys()
    assert {kind.__name__ for kind in {*local_base._EXPANSIONS, *NORMALIZATIONS, *elementwise_layers(), *moving_layers()} - covered} == set()


@pytest.mark.parametrize("name", CASES)
def test_two_sided_weights_serve_both_signs(name) -> None:
    case, layer = case_of(name)
    x = samples(case, 3 * len(RADII))
    expansion = expanded(case, layer, x)
    radius = torch.tensor(RADII, dtype=torch.float64).repeat(3)[:, None].expand(len(x), tokens(case, x).shape[1])
    bounds = expansion.advance(Ball.of(radius)).bounds
    g = torch.randn(4, *expansion.clean.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    zero = torch.zeros(4, len(x), dtype=torch.float64)
    both = decrease(zero, expansion.adjoint(g, two_sided=True)[1], bounds)
    for one in (g, -g):
        alone = decrease(zero, expansion.adjoint(one)[1], bounds)
        assert not bool((both < alone * (1 - 1e-9)).any())


@pytest.mark.parametrize("name", CASES)
def test_adjoints_are_those_of_autograd(name) -> None:
    case, layer = case_of(name)
    x = samples(case, 6).requires_grad_()
    expansion = expanded(case, layer, x.detach())
    g = torch.randn(2, *expansion.clean.shape, dtype=torch.float64)
    found, _ = expansion.adjoint(g)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        out = seen(expansion.clean, differentiable(layer)(x))
        for i in range(2):
            (wanted,) = torch.autograd.grad(out, x, g[i], retain_graph=True)
            torch.testing.assert_close(found[i], tokens(case, wanted), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_rounding_as_executed_is_covered(name, dtype) -> None:
    """Perturbed inputs executed in the dtype against the float64 reference, from no perturbation (rounding alone) up."""
    case, layer = case_of(name, dtype)
    x = samples(case, 60).to(dtype)
    v = torch.randn(tokens(case, x).shape, dtype=torch.float64)
    start = torch.tensor([0.0, 1e-6, 1e-3, 0.1, 2.0], dtype=torch.float64).repeat(12)
    moved = (x.double() + into(v, start[:, None].expand(v.shape[:2]), case.space).reshape(x.shape)).to(dtype)
    order = {"l2": 2.0, "linf": torch.inf, "l1": 1.0}[case.space]
    delta = tokens(case, moved.double() - x.double())
    radius = torch.linalg.vector_norm(delta, ord=order, dim=-1) * (1 + 1e-12)
    expansion = expanded(case, layer, x, dtype)
    behind, error, bounds = expansion.advance(Ball.of(radius))
    change = seen(expansion.clean, executed(layer, moved)) - expansion.clean
    # NaN: a bound that overflowed, which no search takes for feasible.
    assert not bool((change.norm(dim=-1) > behind).any())
    twin = differentiable(copy.deepcopy(layer).double())
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        _, pushed = torch.func.jvp(lambda z: seen(expansion.clean, twin(z)), (x.double(),), (moved.double() - x.double(),))
    rest = change - pushed
    assert not bool((rest.norm(dim=-1) > error + 1e-12 * behind).any())
    for g in (-rest, torch.randn_like(rest)):
        allowed = decrease(torch.zeros(1, len(x), dtype=torch.float64), expansion.adjoint(g[None])[1], bounds)[0]
        assert not bool((-(g * rest).sum((-1, -2)) > allowed + 1e-12 * (g.norm(dim=-1) * behind).sum(-1)).any())
    if dtype == torch.float32:
        assert float(torch.isfinite(behind).double().mean()) > 0.9


def executed(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's own output. Skips where torch has no kernel of that dtype here."""
    try:
        return layer(x)
    except NotImplementedError as error:
        pytest.skip(str(error).splitlines()[0])


# ---- single tokens


def test_a_normalisation_over_several_dimensions_is_not_by_token() -> None:
    """A LayerNorm of all tokens together lets each of them move all others: no single token may be looked at by itself."""
    chains = [NextTokenChain(OrderedDict(e=nn.Embedding(5, D), n=nn.LayerNorm(shape), h=nn.Linear(D, 5))) for shape in (D, (T, D))]
    assert [is_causal(chain) for chain in chains] == [True, False]


@pytest.mark.parametrize("position", [1, 4])
@pytest.mark.parametrize("jacobian", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_single_tokens_agree_with_all_and_are_never_exceeded(position, jacobian, normalised) -> None:
    torch.manual_seed(1)
    blocks = gpt_blocks(normalised).double().requires_grad_(False)
    n, length = 30, 5
    x = torch.randn(n, length, D, dtype=torch.float64)
    x[:10] *= 0.1
    full = ChainExpansion(blocks, x, Scope(Context(torch.float64, {})))
    every = torch.arange(n)
    rows: ChainExpansion = full.at_rows(every, torch.full((n,), position), torch.zeros(n, length, dtype=torch.float64))
    rows = JacobianChain(rows) if jacobian else rows
    torch.testing.assert_close(rows.clean, full.clean[:, position : position + 1])
    g = torch.randn(2, n, 1, D, dtype=torch.float64)
    spread = torch.zeros(2, n, length, D, dtype=torch.float64)
    spread[:, :, position : position + 1] = g
    torch.testing.assert_close(rows.adjoint(g)[0], full.adjoint(spread)[0][:, :, position : position + 1], rtol=1e-9, atol=1e-9)

    def function(v: Tensor) -> Tensor:
        moved = torch.cat([x[:, :position], v, x[:, position + 1 :]], 1)
        return blocks(moved)[:, position : position + 1]

    result = attacked(rows, function, x[:, position : position + 1])
    assert result.largest() <= 1 + 1e-9, result
    assert float(result.radius.amax()) > 0.05
    for radius in RADII:
        alone, everyone = torch.full((n, 1), radius, dtype=torch.float64), torch.zeros(n, length, dtype=torch.float64)
        everyone[:, position] = radius
        mine, theirs = (e.advance(Ball.of(r)).radius for e, r in ((rows, alone), (full, everyone)))
        assert bool((mine[:, 0] <= theirs[:, position] * (1 + 1e-9)).all())


@pytest.mark.parametrize("name", ["shift-table", "scale-table"])
def test_single_tokens_read_their_own_row_of_a_table(name) -> None:
    case, layer = case_of(name)
    x = samples(case, 6)
    full, position = expanded(case, layer, x), torch.arange(6) % T
    rows = full.at_rows(torch.arange(6), position, torch.zeros(6, T, dtype=torch.float64))
    torch.testing.assert_close(rows.clean[:, 0], full.clean[torch.arange(6), position])
    g = torch.randn(2, 6, 1, 5, dtype=torch.float64)
    spread = torch.zeros(2, 6, T, 5, dtype=torch.float64)
    spread[:, torch.arange(6), position] = g[:, :, 0]
    torch.testing.assert_close(rows.adjoint(g)[0][:, :, 0], full.adjoint(spread)[0][:, torch.arange(6), position])


def nested() -> dict[str, Callable[[], list[nn.Module]]]:
    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))

    return {
        "sequence": lambda: [nn.Sequential(Residual(mlp()), Residual(Attention(D, 2)))],
        "residual": lambda: [Residual(nn.Sequential(Residual(mlp()), Residual(Attention(D, 2))))],
        "attention first": lambda: [nn.Sequential(Attention(D, 2), Residual(mlp()))],
        "twice": lambda: [nn.Sequential(nn.Linear(D, D), nn.Sequential(Attention(D, 2)))],
    }


@pytest.mark.parametrize("name", nested())
def test_attention_inside_other_chains_is_certified_for_single_tokens(name) -> None:
    torch.manual_seed(0)
    parts = {f"part{i}": m for i, m in enumerate(nested()[name]())}
    model = NextTokenChain(OrderedDict(embed_tokens=nn.Embedding(5, D), **parts, head=nn.Linear(D, 5)))
    model = model.eval().requires_grad_(False)
    x = torch.randint(5, (6, 4), generator=torch.Generator().manual_seed(1))
    y = model.scores(x).argmax(-1)
    threat = EmbeddingBall(tokens=(-1,))
    certificate = certify(model, x, y, threat, "dual")
    assert (certificate.radius > 0).all()
    reach = MinimumRadius()(model, x, y, threat).radius
    assert (certificate.radius < reach).all() and np.median(certificate.radius / reach) > 0.1


def test_a_remainder_reaches_all_layers_behind(monkeypatch) -> None:
    """Neurons that are dead at the clean point and alive nearby, then linear layers: what they carry is remainder, two and three layers on too."""
    kink = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D, bias=False)).double()
    with torch.no_grad():
        kink[0].weight.copy_(torch.eye(D))
        kink[0].bias.fill_(-1e-3)
        kink[2].weight.copy_(2 * torch.eye(D))
    linear_layers = [nn.Linear(D, D, bias=False).double() for _ in range(3)]
    for layer in linear_layers:
        nn.init.eye_(layer.weight)
    blocks = nn.Sequential(*(Residual(b) for b in (kink, *linear_layers))).requires_grad_(False)
    x = torch.zeros(1, 1, D, dtype=torch.float64)
    first = torch.zeros(1, dtype=torch.long)
    rows = JacobianChain(ChainExpansion(blocks, x, Scope(Context(torch.float64, {}))).at_rows(first, first, torch.zeros(1, 1, dtype=torch.float64)))
    arrived: list[Tensor] = []
    for part in rows.parts:
        monkeypatch.setattr(part, "advance", lambda ball, inner=part.advance: (arrived.append(ball.radius), inner(ball))[1])
    one = torch.ones(1, 1, dtype=torch.float64)
    rows.advance(Ball.of(one))
    moved, clean = x.clone(), x
    moved[..., 0] = 1.0
    for part, radius in zip(blocks, arrived, strict=True):
        true = float((moved - clean).norm())
        assert true * (1 - 1e-12) <= float(radius) <= 1.01 * true
        clean, moved = part(clean), part(moved)


@pytest.mark.parametrize(
    "activation",
    [
        nn.GELU(), ScaledGELU(0.7), nn.Tanh(), nn.ReLU(), MaxMin(), GroupSort(), Householder(D), nn.LeakyReLU(-0.5), nn.LeakyReLU(2.0), nn.Hardtanh(),
        nn.ELU(2.5), nn.SELU(), nn.Softshrink(),
    ],
)  # fmt: skip
def test_neurons_of_single_tokens_bend_one_way(activation) -> None:
    """Where every neuron has a curvature of its own, which counts with its sign: adjoints are turned against what was found."""
    torch.manual_seed(4)
    layers = nn.Sequential(nn.Linear(D, D), activation).double().requires_grad_(False)
    x = torch.randn(3 * len(RADII) * 2, 2, D, dtype=torch.float64) * 0.5
    full = ChainExpansion(layers, x, Scope(Context(torch.float64, {})))
    rows = full.at_rows(torch.arange(len(x)), torch.ones(len(x), dtype=torch.long), torch.zeros(len(x), 2, dtype=torch.float64))
    result = attacked(rows, layers, x[:, 1:])
    assert result.largest() <= 1 + 1e-9, result
    assert float(result.loss.amax()) > 0.25, result


def curved_pair(seed: int, adjoints: int = 6, samples: int = 3, tokens: int = 2, n: int = 20) -> tuple[CurvatureTerm, CurvatureTerm, Tensor]:
    """A weight, a bound with a matrix (n, D), and the adjoints ω (A, N, T, n) that the weight is of."""
    torch.manual_seed(seed)
    omega = torch.randn(adjoints, samples, tokens, n, dtype=torch.float64)
    matrix = torch.randn(n, D, dtype=torch.float64)
    moved, fresh = torch.rand(samples, tokens, dtype=torch.float64) + 0.1, 0.3 * torch.rand(samples, tokens, dtype=torch.float64)
    sigma = torch.linalg.matrix_norm(matrix, 2)
    convex, concave = torch.rand(2, samples, tokens, n, dtype=torch.float64)
    each = matrix.norm(dim=-1) * moved[..., None] + fresh[..., None]
    bound = CurvatureTerm(convex, concave, each, sigma * moved + fresh, matrix, moved, fresh)
    return CurvatureTerm((-omega).clamp_min(0), omega.clamp_min(0)), bound, omega


@pytest.mark.parametrize("token", [0, 1, -1])
@pytest.mark.parametrize("seed", range(4))
def test_quadratic_forms_hold_at_their_worst_change(seed, token) -> None:
    """Δ along the top eigenvector and e on the neuron that counts most, in every token at once: what is met is never less, and less than without."""
    weight, bound, omega = curved_pair(seed)
    chosen = torch.stack([torch.randperm(len(omega))[:2] for _ in range(omega.shape[1])], -1)
    formed = weight.with_forms(bound, chosen, token)
    plain, met = weight.contract(bound), formed.contract(bound)
    assert (met <= plain * (1 + 1e-12)).all() and (met.gather(0, chosen) < plain.gather(0, chosen)).all()
    rest = torch.ones_like(plain, dtype=torch.bool).scatter(0, chosen, False)
    assert torch.equal(met[rest], plain[rest])
    c = weight.convex * bound.convex + weight.concave * bound.concave
    vectors = torch.linalg.eigh(bound.matrix.mT @ (c.unsqueeze(-1) * bound.matrix)).eigenvectors[..., -1]  # (A, N, T, D)
    z = vectors @ bound.matrix.mT * bound.moved[..., None]
    peak = torch.nn.functional.one_hot(c.argmax(-1), c.shape[-1]).double() * bound.fresh[..., None]
    for change in (z, z + torch.sign(z) * peak, torch.nn.functional.normalize(z, dim=-1) * bound.fresh[..., None] + z):
        worst = 0.5 * (c * change.square()).sum((-1, -2))
        assert (worst <= met * (1 + 1e-12)).all()
    # One token, where the form is all there is: within its 3 %, so nothing is given away either.
    alone = CurvatureTerm(weight.convex[..., token, :].unsqueeze(-2), weight.concave[..., token, :].unsqueeze(-2))
    one = CurvatureTerm(*(t[:, token].unsqueeze(1) for t in (bound.convex, bound.concave, bound.each, bound.whole)), bound.matrix,
                 *(t[:, token].unsqueeze(1) for t in (bound.moved, 0 * bound.fresh)))  # fmt: skip
    exact = 0.5 * (c * z.square()).sum(-1)[..., token]
    single = alone.with_forms(one, chosen, 0).contract(one).gather(0, chosen)
    assert (single >= exact.gather(0, chosen)).all() and (single <= 1.03 * exact.gather(0, chosen)).all()
    # And with rounding as large as the change, where it hurts most.
    loud = replace(one, fresh=one.moved)
    here, at = c[..., token, :], z[..., token, :]
    hurt = at + torch.nn.functional.normalize(here * at, dim=-1) * loud.fresh
    exact = 0.5 * (here * hurt.square()).sum(-1)
    loud = replace(loud, each=torch.full_like(loud.each, 1e9), whole=torch.full_like(loud.whole, 1e9))
    assert (alone.with_forms(loud, chosen, 0).contract(loud).gather(0, chosen) >= exact.gather(0, chosen)).all()


def test_quadratic_forms_count_only_for_curvatures_they_were_made_of() -> None:
    """A neuron that can bend more, one way or the other, and the sample is met as without forms; others keep theirs. Infinity has no form."""
    weight, bound, _ = curved_pair(1, tokens=1)
    chosen = torch.zeros(1, 3, dtype=torch.int64)
    formed = weight.with_forms(bound, chosen, 0)
    for name in ("convex", "concave"):
        more = getattr(bound, name).clone()
        more[1, 0, 7] *= 1.0001
        wider = replace(bound, **{name: more})
        met, plain = formed.contract(wider), weight.contract(wider)
        assert torch.equal(met[:, 1], plain[:, 1]) and (met[0, [0, 2]] < plain[0, [0, 2]]).all()
    less = replace(bound, convex=bound.convex * 0.5, concave=bound.concave * 0.5)
    assert (formed.contract(less) <= formed.contract(bound)).all()
    endless = bound.convex.clone()
    endless[2, 0, :] = torch.inf
    broken = weight.with_forms(replace(bound, convex=endless), chosen, 0)
    assert torch.isinf(broken.forms.largest[0, 2]) and torch.isfinite(broken.forms.largest[0, :2]).all()
    huge = weight.with_forms(replace(bound, matrix=bound.matrix * 1e160), chosen, 0)
    assert torch.isinf(huge.forms.largest).all()


@pytest.mark.parametrize("seed", range(4))
def test_forms_of_kinks_hold_at_their_worst_change(seed) -> None:
    """Against Σω⁻2(|WΔ + e| − a)⁺ itself, by gradient ascent on Δ and e, at the radius that τ was chosen for, below it and beyond."""
    torch.manual_seed(seed)
    adjoints, count, tokens, n = 5, 3, 8, 24
    falling = (torch.randn(adjoints, count, tokens, n, dtype=torch.float64) * torch.rand(adjoints, count, tokens, 1)).clamp_min(0)
    rows = torch.randn(n, D, dtype=torch.float64) / math.sqrt(D)
    near = torch.rand(count, tokens, n, dtype=torch.float64) * torch.randint(2, (count, tokens, n))
    moved, fresh = torch.rand(count, tokens, dtype=torch.float64) + 0.1, 0.05 * torch.rand(count, tokens, dtype=torch.float64)
    sigma = torch.linalg.matrix_norm(rows, 2)

    def bound_at(factor: float) -> MatrixKinkTerm:
        each = rows.norm(dim=-1) * (factor * moved)[..., None] + fresh[..., None]
        return MatrixKinkTerm(None, None, near, each, sigma * factor * moved + fresh, rows, factor * moved, fresh)

    weight = MatrixKinkTerm(falling)
    chosen = torch.arange(3)[:, None].expand(3, count)
    sharp = weight.with_forms(bound_at(1.0), chosen, 0)
    assert sharp.forms is not None and not torch.isfinite(sharp.forms.largest[3:]).any()
    made = torch.isfinite(sharp.forms.largest[:3]).sum(-1)
    assert (made <= TOKENS).all() and (made > 2).all()  # not at the two that matter least
    for factor in (0.3, 1.0, 2.5):
        bound = bound_at(factor)
        plain, formed = weight.by_token(bound), sharp.by_token(bound)
        assert (formed <= plain).all() and (factor != 1.0 or float((formed[:3] / plain[:3]).median()) < 0.8)
        delta = torch.randn(adjoints, count, tokens, 1, D, dtype=torch.float64).repeat(1, 1, 1, 6, 1).requires_grad_()
        delta.data += torch.randn(delta.shape, dtype=torch.float64)
        e = torch.randn(adjoints, count, tokens, 6, n, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.Adam([delta, e], lr=0.1)
        for _ in range(60):
            p = into(delta, (factor * moved)[..., None], "l2") @ rows.mT + into(e, fresh[..., None], "l2")
            lost = (falling.unsqueeze(3) * 2 * (p.abs() - near.unsqueeze(2)).clamp_min(0)).sum(-1).amax(-1)
            assert (lost <= formed * (1 + 1e-9) + 1e-12).all()
            optimizer.zero_grad()
            (-lost.sum()).backward()
            optimizer.step()
        tight = (lost / formed)[:3][torch.isfinite(sharp.forms.largest[:3])]
        assert factor != 1.0 or float(tight.median()) > 0.6
    picked_out = sharp.selected(chosen)
    assert picked_out.falling is not None and torch.equal(picked_out.falling, falling[:3])


def test_rivals_that_are_set_aside_cannot_win_within_the_reach() -> None:
    """The contested ones are all that the full bounds leave open, in every sample; and what is proved afterwards stays below the reach."""
    torch.manual_seed(3)
    model = LipschitzGPT("abcdefghijkl", width=16, heads=2, blocks=2).double().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.mul_(4.0 if "up" in name else 1.0)  # neurons that bend enough for forms to be worth their while
    x = torch.randint(12, (9, 6))
    y = model.scores(x).argmax(-1)
    reference = reference_of(model, x, y, EmbeddingBall(tokens=(-1,)), Context(torch.float64, {}))

    def again(samples: Tensor) -> Any:
        return single_token_reference(reference, samples, torch.full_like(samples, 5))

    single = again(torch.arange(len(x)))
    order = single.margin.argsort(-1)[:, :-1]
    rivals = Rivals.of(single, y, order.T)
    radius = single_token_radii(single, again, y, use_forms=False)
    few = rivals.contested(single, 1.2 * radius)
    assert 1 <= few.margin.shape[1] < 11
    open_ = ~(rivals.decreases(single, 1.2 * radius) < rivals.margin)
    for n in range(len(x)):
        assert {float(m) for m in rivals.margin[n][open_[n]]} <= {float(m) for m in few.margin[n]}
    matched = (few.margin.unsqueeze(-1) == rivals.margin.unsqueeze(1)).double().argmax(-1)
    assert torch.allclose(few.decreases(single, radius), rivals.decreases(single, radius).gather(1, matched), rtol=1e-12)
    sharp = single_token_radii(single, again, y)
    reach = math.prod(factor for factor, _ in EXTENSIONS)
    # A first answer so rough that nobody is contested at the reach: it ends there all the same.
    begin = torch.full_like(radius, 1e-6)
    rough = search(lambda epsilon: rivals.decreases(single, epsilon), rivals.margin, begin, 0.5)[0]
    assert (rough < 0.95 * radius).any()
    assert (_largest_radii(single, rivals, begin, ((1.001, 0.5),)) <= 1.001 * rough * (1 + 1e-9)).all()
    assert (sharp >= radius * (1 - 0.04)).all() and (sharp <= reach * radius * (1 + 1e-9)).all() and (sharp > 1.02 * radius).any()


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU, MaxMin])
def test_what_single_tokens_know_of_the_layers_in_front_is_never_exceeded(activation, monkeypatch) -> None:
    """Radii through exact Jacobians, and |⟨c, Δ⟩| of the logits that a later attention follows back, by gradient ascent on the token that moves."""
    torch.manual_seed(2)
    blocks = gpt_blocks(False, activation).double().requires_grad_(False)
    blocks = nn.Sequential(*blocks, *gpt_blocks(False, activation).double().requires_grad_(False))
    kinds, each, length, position = 8, 6, 5, 4  # five radii and three sets of functionals, each attacked by samples of its own
    n = kinds * each
    x = torch.randn(each, length, D, dtype=torch.float64).repeat(kinds, 1, 1)
    x[::2] *= 0.2
    full = ChainExpansion(blocks, x, Scope(Context(torch.float64, {})))
    rows = JacobianChain(full.at_rows(torch.arange(n), torch.full((n,), position), torch.zeros(n, length, dtype=torch.float64)))
    functionals = {l: question[0].vectors for l, question in enumerate(rows.functionals_by_part) if question is not None}
    assert len(functionals) == 3
    arrived: dict[int, Tensor] = {}
    told: dict[int, Tensor] = {}
    for l, part in enumerate(rows.parts):

        def advance(ball, l=l, inner=part.advance):
            arrived[l] = ball.radius[:, 0]
            if ball.functionals is not None:
                told[l] = ball.functionals.sizes
            return inner(ball)

        monkeypatch.setattr(part, "advance", advance)

    def changes(v: Tensor) -> list[Tensor]:
        """Δ in front of every part."""
        clean, moved, found = x, torch.cat([x[:, :position], x[:, position:] + v], 1), []
        for part in blocks:
            found.append((moved - clean)[:, position])
            clean, moved = part(clean), part(moved)
        return found

    nearest = 0.0
    for radius in (*RADII, 0.5, 1.0):
        ball = torch.full((n, 1), radius, dtype=torch.float64)
        bounds = rows.advance(Ball.of(ball)).bounds
        for l, rows_of_l in functionals.items():
            weights = rows.functionals_by_part[l][2]  # type: ignore[index]
            for sign in (1.0, -1.0):  # each side alone, as the margin's own functional is bounded
                g, groups = sign * rows_of_l.unsqueeze(2), []
                for part in reversed(rows.parts[:l]):
                    g, found = part.adjoint(g)
                    groups.append(found)
                side = decrease(g.squeeze(2).norm(dim=-1) * radius, [w for group in reversed(groups) for w in group], bounds[: len(weights)])
                assert not bool((told[l] < side * (1 - 1e-9)).any())
        v = torch.randn(n, 1, D, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.Adam([v], lr=0.2)
        for _ in range(30):
            delta = changes(into(v, ball, "l2"))
            sizes = torch.stack([(delta[l].norm(dim=-1) - 1e-12) / arrived[l] for l in range(1, len(delta))])
            asked = torch.stack([((torch.einsum("and,nd->an", functionals[l], delta[l]).abs() - 1e-12) / told[l]).amax(0) for l in functionals])
            assert float(sizes.detach().amax()) <= 1 + 1e-9 and float(asked.detach().amax()) <= 1 + 1e-9
            nearest = max(nearest, float(torch.minimum(sizes.amax(), asked.amax()).detach()))
            optimizer.zero_grad()
            (-torch.cat([sizes, asked]).unflatten(1, (kinds, each)).diagonal(dim1=0, dim2=1).sum()).backward()
            optimizer.step()
    assert nearest > 0.5


@pytest.mark.parametrize("size", [0.01, 0.3, 1.0, 3.0, 20.0, 80.0])
def test_a_softmax_ball_holds_what_logits_within_it_do(size) -> None:
    """Changes of logits by gradient ascent: weights, their changes, and what is beyond first order, one-sided, for functionals of mean 0."""
    generator = torch.Generator().manual_seed(int(100 * size))
    n, t = 40, 6
    p = (3 * torch.randn(n, t, generator=generator, dtype=torch.float64)).softmax(-1)
    p[:8] = torch.tensor([1 - 5e-9, *[1e-9] * 5], dtype=torch.float64)  # saturated
    b = size * torch.rand(n, t, generator=generator, dtype=torch.float64)
    other = b * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    ball = SoftmaxBall(p, b, other, torch.ones(n, t, dtype=torch.bool))
    square, drawn = ball.second_order()
    omega = torch.randn(n, t, generator=generator, dtype=torch.float64)
    omega[::2] *= p[::2].rsqrt()  # rare keys that matter
    omega = omega - (p * omega).sum(-1, keepdim=True)
    allowed = (square * (-omega).clamp_min(0) + drawn * omega.abs()).sum(-1)
    mean = (p * other).sum(-1, keepdim=True)
    v = torch.randn(n, t, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=0.1)
    largest = torch.zeros(3, dtype=torch.float64)
    for step in range(120):
        eta = b * v.tanh()
        # Onto |Σ pη| ≤ μ by shrinking, which keeps |η| ≤ b.
        eta = eta * (mean / (p * eta).sum(-1, keepdim=True).abs().clamp_min(1e-300)).clamp_max(1.0)
        weights = (p.log() + eta).softmax(-1)
        rest = ((weights - p - p * (eta - (p * eta).sum(-1, keepdim=True))) * omega).sum(-1)
        noise = 1e-13 * omega.abs().amax(-1) * (1 + size)
        fractions = torch.stack([(weights / ball.upper).amax(-1), ((weights - p).abs() / ball.dev).amax(-1), -rest / (allowed + noise)])
        largest = torch.maximum(largest, fractions.detach().amax(-1))
        optimizer.zero_grad()
        (-fractions[step % 3].sum()).backward()
        optimizer.step()
    assert float(largest.amax()) <= 1 + 1e-9, largest
    assert float(largest[2]) > 0.3 or size > 1.0, largest


@pytest.mark.parametrize("size", [0.3, 2.0, 12.0, 400.0])
def test_squares_and_variances_along_the_path_are_bounded_key_by_key(size) -> None:
    """∫(1 − τ)p^τ_j(η_j − η̄)²dτ and ∫(1 − τ)Var|p^τ_j − p_j|dτ by quadrature, the change of the logits by gradient ascent for each key."""
    generator = torch.Generator().manual_seed(int(size * 10))
    t, tau = 5, (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    p = (2 * torch.randn(60, t, generator=generator, dtype=torch.float64)).softmax(-1)
    p[:20] = torch.tensor([1e-3, 1e-2, 0.3, 0.3, 0.389], dtype=torch.float64)
    p[20:30] = torch.tensor([1e-80, 1e-30, 1e-4, 0.4999, 0.5], dtype=torch.float64)
    p = p / p.sum(-1, keepdim=True)
    b = size * torch.rand(60, t, generator=generator, dtype=torch.float64)
    b[::3, 0] = 0.0  # a key that does not move while the mean does
    other = 0.2 * b
    square, drawn = SoftmaxBall(p, b, other, torch.ones(60, t, dtype=torch.bool)).second_order()
    mean = (p * other).sum(-1, keepdim=True)
    v = torch.randn(t, 60, t, generator=generator, dtype=torch.float64)  # for each key its own attack
    v[:, 1::2] = -3.0  # half of them from where that key takes all, which no gradient finds for a weight of 1e-80
    v[:, 1::2].diagonal(dim1=0, dim2=2).fill_(3.0)
    v.requires_grad_()
    optimizer = torch.optim.Adam([v], lr=0.1)
    largest = torch.zeros(2, dtype=torch.float64)
    for step in range(60):
        eta = b * v.tanh()
        eta = eta * (mean / (p * eta).sum(-1, keepdim=True).abs().clamp_min(1e-300)).clamp_max(1.0)
        path = (p.log() + tau[:, None, None, None] * eta).softmax(-1)  # (τ, t, 60, t)
        centred = eta - (path * eta).sum(-1, keepdim=True)
        spread = path * centred.square()
        variance = spread.sum(-1, keepdim=True)
        weight = (1 - tau)[:, None, None, None] / len(tau)
        sums = torch.stack([(weight * spread).sum(0), (weight * variance * (path - p).abs()).sum(0)])  # (2, t, 60, t)
        own = torch.diagonal(sums, dim1=1, dim2=3)  # (2, 60, t): key j under the attack of key j
        fractions = (own - 1e-13 * size**2) / torch.stack([square, drawn]).clamp_min(1e-300)
        # The midpoint rule is off by less than this where paths are steep.
        largest = torch.maximum(largest, fractions.detach().amax((1, 2)))
        optimizer.zero_grad()
        (-fractions[step % 2].clamp_max(10.0).sum()).backward()
        assert v.grad is not None
        v.grad.nan_to_num_(0.0)
        optimizer.step()
    assert float(largest.amax()) <= 1 + (1e-4 if size < 20 else 1e-2), largest
    assert float(largest.amin()) > 0.2 or size > 1, largest


def test_only_keys_against_the_margin_meet_the_square() -> None:
    torch.manual_seed(6)
    layer = Attention(D, H, scale=2.0).double().requires_grad_(False)
    x = torch.randn(4, T, D, dtype=torch.float64)
    expansion = expand(layer, x, Scope(Context(torch.float64, {})))
    g = torch.randn(3, 4, T, D, dtype=torch.float64)
    either = expansion.adjoint(g)[1][0]
    gamma = layer.split((layer.output_scale * g.flatten(0, 1)) @ layer.output.weight).unflatten(0, (3, 4))
    omega = torch.einsum("anhtd,nhtjd->anhtj", gamma, expansion.v.unsqueeze(2) - expansion.o.unsqueeze(3))
    torch.testing.assert_close(either.against, (-omega).clamp_min(0).flatten(-2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(either.size, omega.abs().flatten(-2), rtol=1e-9, atol=1e-9)
    two = expansion.adjoint(g, two_sided=True)[1][0]
    assert two.against is two.size and torch.equal(two.size, either.size)


def test_moments_along_the_path_are_those_of_quadrature() -> None:
    """One key that moves among many: in `second_order` its own terms, by Simpson's rule."""
    tau = torch.linspace(0, 1, 2001, dtype=torch.float64)
    simpson = torch.full_like(tau, 2.0)
    simpson[1::2], simpson[0], simpson[-1] = 4.0, 1.0, 1.0
    for b in (1e-3, 0.2, 1.0, 4.0):
        p = torch.tensor([[1e-6, 1 - 1e-6]], dtype=torch.float64)
        change = torch.tensor([[b, 0.0]], dtype=torch.float64)
        square, drawn = SoftmaxBall(p, change, 0 * change, torch.ones(1, 2, dtype=torch.bool)).second_order()
        wanted = float((simpson * (1 - tau) * (tau * b).exp()).sum() / 6000) * 1e-6 * b * b
        assert wanted <= float(square[0, 0]) <= wanted * 1.04 * (1 + 1e-4)
        assert float(drawn[0, 0]) <= 1e-5 * float(square[0, 0]) * (1 + b * math.exp(b)) ** 2


def test_a_single_token_through_normalize_keeps_its_own_size() -> None:
    """Rounding grows with the token that moves, not with another one."""
    layer = Normalize([0.3] * D, [0.01] * D).double()
    x = torch.randn(2, T, D, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)[:, None]
    full = expand(layer, x, Scope(Context(torch.float32, {})))
    radius = torch.full((2, T), 0.1, dtype=torch.float64)
    row = full.at_rows(torch.tensor([1, 0, 1]), torch.tensor([2, 0, 1]), 0 * radius)
    whole = full.advance(Ball.of(radius)).radius
    alone = row.advance(Ball.of(radius[:1, :1].expand(3, 1))).radius
    torch.testing.assert_close(alone[:, 0], whole[[1, 0, 1], [2, 0, 1]])
    assert float(layer(x).norm()) > 0 and float(torch.as_tensor(full.lipschitz())) >= 100.0


# ---- weights that an adversary chose


@pytest.mark.parametrize("causal", [True, False])
def test_worst_attention_weights_stay_inside(causal) -> None:
    worst = worst_attention(D, 2, T, scale=4.0, causal=causal, caps=2.0, steps=60)
    layer = worst.layer.requires_grad_(False)
    x = worst.x.detach().expand(30, T, D).clone()
    expansion = ChainExpansion([layer], x, Scope(Context(torch.float64, {})))
    result = attacked(expansion, layer, x)
    assert result.largest() <= 1 + 1e-9, result
    assert float(result.radius.amax()) > 0.2


EVOLVED = {
    "attention": lambda: attention(scale=2.0),
    "gelu": lambda: nn.Sequential(nn.Linear(D, 3), nn.GELU(), nn.Linear(3, 2)),
    "relu": lambda: nn.Sequential(nn.Linear(D, 3), nn.ReLU(), nn.Linear(3, 2)),
    "layernorm": lambda: nn.Sequential(drawn(nn.LayerNorm(D, eps=1e-2)), nn.Linear(D, 2)),
}


@pytest.mark.parametrize("name", EVOLVED)
def test_weights_evolved_toward_the_bounds_stay_inside(name) -> None:
    """A (1 + 1) search of weights and inputs for the largest fraction of any promise."""
    torch.manual_seed(2)
    layer = EVOLVED[name]().double().requires_grad_(False)
    x, best = torch.randn(1, T, D, dtype=torch.float64), 0.0
    for generation in range(15):
        child, y = copy.deepcopy(layer), x + 0.3 * torch.randn_like(x) * (generation > 0)
        for p in child.parameters():
            p += 0.2 * p.abs().mean() * torch.randn_like(p) * (generation > 0)
        many = y.expand(15, T, D).clone()
        result = attacked(ChainExpansion([child], many, Scope(Context(torch.float64, {}))), child, many, steps=12)
        assert result.largest() <= 1 + 1e-9, (generation, result)
        fitness = float((result.radius + result.error + result.loss).amax())
        if fitness > best:
            layer, x, best = child, y, fitness
    assert best > 0.3


# ---- constants


CURVATURES = {
    "gelu": (nn.GELU(), lambda z: z * (1 + mpmath.erf(z / mpmath.sqrt(2))) / 2, 0.0),
    "gelu-tanh": (
        nn.GELU("tanh"), lambda z: z * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3))) / 2, 0.0
    ),
    "tanh": (nn.Tanh(), mpmath.tanh, 0.66),
    "sigmoid": (nn.Sigmoid(), lambda z: 1 / (1 + mpmath.exp(-z)), 1.32),
    "silu": (nn.SiLU(), lambda z: z / (1 + mpmath.exp(-z)), 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", CURVATURES)
def test_curvatures_are_suprema(name) -> None:
    layer, function, near = CURVATURES[name]
    stated = elementwise_of(layer).curvature
    assert stated is not None
    with mpmath.workdps(50):
        grid = max(abs(mpmath.diff(function, mpmath.mpf(z) / 20, 2)) for z in range(-160, 161))
        top = abs(near) if near == 0.0 else mpmath.findroot(lambda z: mpmath.diff(function, z, 3), near)
        supremum = abs(mpmath.diff(function, top, 2))
    assert grid <= supremum * (1 + mpmath.mpf("1e-20"))
    assert supremum <= stated <= supremum * (1 + mpmath.mpf("1e-6"))


@pytest.mark.parametrize("divisor", [1.0, 0.5, 3.0])
def test_bending_where_a_neuron_can_be_is_bounded_both_ways(divisor) -> None:
    """f(z + Δ) − f(z) − f'(z)Δ against ±½κΔ², densely."""
    z = torch.linspace(-6, 6, 241, dtype=torch.float64)
    layer = ScaledGELU(divisor)
    expansion = expand(layer, z[None, None], Scope(Context(torch.float64, {})))
    assert isinstance(expansion, ElementwiseExpansion)
    for reach in (0.0, 1e-3, 0.1, 0.7, 2.0, 9.0):
        each = torch.full((1, 1, len(z)), reach, dtype=torch.float64)
        convex, concave = (k[0, 0] for k in expansion._curvatures(each))
        change = reach * torch.linspace(-1, 1, 401, dtype=torch.float64)
        rest = layer(z[:, None] + change) - expansion.clean[0, 0, :, None] - expansion.derivative[0, 0, :, None] * change
        assert bool((rest.amax(1) <= 0.5 * convex * reach**2 + 1e-14).all())
        assert bool((-rest.amin(1) <= 0.5 * concave * reach**2 + 1e-14).all())
        if 0 < reach < 0.5:  # and no more than twice what is there, where the function bends at all
            assert float((0.5 * convex * reach**2 - 2 * rest.amax(1).clamp_min(0.02 * reach**2 / divisor)).amax()) <= 0


def test_the_third_derivative_of_gelu_is_below_its_supremum() -> None:
    with mpmath.workdps(30):
        top = mpmath.sqrt((7 - mpmath.sqrt(33)) / 2)  # where −z⁴ + 7z² − 4 = 0
        supremum = abs(mpmath.diff(lambda z: z * mpmath.ncdf(z), top, 3))
    assert float(supremum) <= GELU_THIRD <= float(supremum) * (1 + 1e-5)


def test_the_curvature_of_normalisation_is_a_supremum() -> None:
    """Over θ in [0, 1] and unit (u_∥, u_⊥): θ·‖(3(1 − θ²)u_∥² + u_⊥², 2u_∥u_⊥)‖; and the formula itself against second derivatives."""
    theta, angle = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None], torch.linspace(0, math.pi / 2, 1001, dtype=torch.float64)
    along, across = angle.cos(), angle.sin()
    size = theta * torch.hypot(3 * (1 - theta**2) * along**2 + across**2, 2 * along * across)
    assert float(size.amax()) <= 2 / math.sqrt(3) + 1e-12 <= CURVATURE
    assert float(size.amax()) > 1.1546 and CURVATURE < 1.1548
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for _ in range(200):
        c, u = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        eps = float(torch.rand(1, generator=generator)) + 1e-3

        def along_line(t: Tensor, c: Tensor = c, u: Tensor = u, eps: float = eps) -> Tensor:
            v = c + t * u
            return v / (v.square().mean() + eps).sqrt()

        zero = torch.zeros((), dtype=torch.float64)
        first = lambda t: torch.func.jvp(along_line, (t,), (torch.ones_like(t),))[1]  # noqa: E731 (used at once)
        second = torch.func.jvp(first, (zero,), (torch.ones_like(zero),))[1]
        largest = max(largest, float(second.norm() * math.sqrt(5) * (c.square().mean() + eps) / u.square().sum()))
    assert 0.9 < largest <= CURVATURE


# ---- end to end


def tiny(kind: str, seed: int, gain: float = 2.0, dtype: torch.dtype = torch.float32) -> tuple[Chain, Tensor, Tensor]:
    """A small random model with weights large enough to matter, and samples that it predicts."""
    torch.manual_seed(seed)
    x: Tensor
    if kind.startswith("mlp"):
        model, x = LipschitzMLP([6, 12, 10 if kind == "mlp-maxmin" else 9, 4], kind.removeprefix("mlp-"), mean=0.5, std=0.4), torch.rand(6, 6)
    elif kind == "gpt":
        model, x = LipschitzGPT("abcdefg", 8, 2, 1, attention_scale=2.0, distance_bias=3), torch.randint(7, (5, 4))
    elif kind == "gpt-maxmin":
        options: dict[str, Any] = {"activation": "maxmin", "mlp_alpha": 0.8, "distance_bias": 3, "distance_peaks": 1.0}
        model, x = LipschitzGPT("abcdefg", 8, 2, 1, attention_scale=2.0, **options), torch.randint(7, (5, 4))
    elif kind == "gpt-baseline":
        model, x = BaselineGPT("abcdefg", 8, 2, 1), torch.randint(7, (5, 4))
    else:
        model, x = LipschitzTransformer((1, 4, 4), 2, 4, 8, 2, 1), torch.rand(5, 1, 4, 4)
    scaled(model, gain)
    model = model.to(dtype).eval()
    x = x.to(dtype) if x.is_floating_point() else x
    return model, x, model.scores(x).argmax(-1)


ATTACKED = [
    ("mlp-relu", "l2"), ("mlp-relu", "linf"), ("mlp-relu", "l1"), ("mlp-scaled-gelu", "l2"), ("mlp-scaled-gelu", "linf"), ("mlp-tanh", "l1"),
    ("mlp-tanh", "linf"), ("gpt", "embedding-l2"), ("gpt", "embedding-l2@-1"), ("gpt", "embedding-l2@1"), ("gpt", "embedding-l2@0,2"),
    ("gpt", "embedding-fro"), ("gpt", "embedding-fro@1,3"), ("gpt-baseline", "embedding-l2"), ("gpt-baseline", "embedding-l2@-1"),
    ("gpt-baseline", "embedding-fro"), ("transformer", "l2"), ("transformer", "linf"), ("transformer", "l1"), ("transformer", "embedding-l2@0,3"),
    ("transformer", "embedding-l2"), ("mlp-relu", "weights-spectral"), ("mlp-tanh", "weights-frobenius-absolute"), ("gpt", "weights-spectral"),
    ("gpt", "weights-frobenius"), ("transformer", "weights-spectral-absolute"), ("gpt-baseline", "weights-frobenius"),
    ("mlp-maxmin", "l2"), ("mlp-maxmin", "linf"), ("mlp-maxmin", "weights-spectral"), ("gpt-maxmin", "embedding-l2"),
    ("gpt-maxmin", "embedding-l2@-1"), ("gpt-maxmin", "embedding-l2@1"), ("gpt-maxmin", "embedding-fro"), ("gpt-maxmin", "weights-spectral"),
]  # fmt: skip

QUICK = MinimumRadius(attack=PGD(steps=8, restarts=1, size=0.5), steps=3, descent=40)


@pytest.mark.parametrize(("kind", "name"), ATTACKED)
def test_no_attack_succeeds_inside_a_certified_radius(kind, name) -> None:
    threat, near = parse_threat(name), []
    for seed, gain, dtype in ((0, 1.5, torch.float32), (1, 5.0, torch.float64)):
        model, x, y = tiny(kind, seed, gain, dtype)
        broken = QUICK(model, x, y, threat).radius
        for method in ("local",) if isinstance(threat, WeightBall) else ("local", "dual"):
            radius = certify(model, x, y, threat, method).radius
            assert bool((radius <= broken).all()), (method, seed, radius, broken)
            assert bool((radius > 0).any())
            near += (radius / broken).tolist()
    assert max(near) > (0.02 if kind == "gpt-baseline" else 0.1), max(near)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("kind", ["mlp-relu", "mlp-scaled-gelu", "mlp-tanh", "mlp-maxmin"])
def test_two_percent_more_is_broken_near_the_boundary(kind, norm) -> None:
    """Samples just beside the boundary, where a network is almost linear: nothing succeeds at the radius, nearly every sample falls 2 % beyond."""
    fallen, count = 0, 0
    for seed in range(3):
        model, x, y = tiny(kind, seed, 1.0, torch.float64)
        away = torch.rand(200, 6, dtype=torch.float64)
        other = away[[int((model.scores(away).argmax(-1) != label).nonzero()[0]) for label in y]]
        near, far = torch.zeros(len(x), 1, dtype=torch.float64), torch.ones(len(x), 1, dtype=torch.float64)
        for _ in range(30):
            middle = (near + far) / 2
            same = (model.scores(x + middle * (other - x)).argmax(-1) == y)[:, None]
            near, far = torch.where(same, middle, near), torch.where(same, far, middle)
        beside = (x + (near - 1e-4) * (other - x)).detach()
        right = model.scores(beside).argmax(-1) == y
        threat = InputBall(norm)  # type: ignore[arg-type]
        radius = certify(model, beside, y, threat, "dual").radius[right.numpy()]
        broken = MinimumRadius(attack=PGD(steps=20, restarts=1, size=0.5), steps=4, descent=60)(model, beside[right], y[right], threat).radius
        assert (broken >= radius).all()
        fallen, count = fallen + int((broken <= 1.02 * radius).sum()), count + len(radius)
    assert count > 9 and fallen > 0.6 * count, (fallen, count)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_models_have_their_exact_radius(norm, dtype) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).to(dtype)
    x = torch.randn(100, 3, 4).to(dtype)
    logits = model(x).double().detach()
    y = logits.argmax(-1)
    w = model[1].weight.detach().double()
    order = {"l2": 2, "linf": 1, "l1": torch.inf}[norm]
    ratio = (logits.gather(1, y[:, None]) - logits) / torch.linalg.vector_norm(w[y][:, None] - w[None], ord=order, dim=-1)
    truth = ratio.scatter(1, y[:, None], torch.inf).amin(1).numpy()
    for method in ("local", "dual") if norm == "l2" else ("dual",):
        radius = certify(model, x, y, InputBall(norm), method).radius
        assert (radius <= truth * (1 + 1e-5)).all()
        usual = truth > np.median(truth) / 2
        assert (radius[usual] >= truth[usual] * (1 - 2e-3)).all()


FIRST_ORDER = [("mlp-scaled-gelu", n) for n in ("l2", "linf", "l1")] + [
    ("gpt", n) for n in ("embedding-l2", "embedding-l2@-1", "embedding-l2@1", "embedding-fro", "embedding-fro@0,2")
] + [("mlp-maxmin", "l2"), ("mlp-maxmin", "linf"), ("gpt-maxmin", "embedding-l2"), ("gpt-maxmin", "embedding-l2@-1")]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), FIRST_ORDER)
def test_the_first_order_is_attained_and_the_rest_vanishes(kind, name) -> None:
    """A tiny step along the worst direction loses the first-order term, no step of that length loses more, and the loss says hardly more."""
    model, x, y = tiny(kind, 4, dtype=torch.float64)
    threat = parse_threat(name)
    reference = reference_of(model, x, y, threat, Context(torch.float64, {}))
    rivals = reference.margin.argsort(-1)[:, :1].T
    found = Rivals.of(reference, y, rivals)
    step = torch.full((len(y),), 1e-6, dtype=torch.float64)
    losses = found.decreases(reference, step)[:, 0]
    start = model.embed(x).double() if isinstance(threat, EmbeddingBall) else x

    def margin(v: Tensor) -> Tensor:
        out = model.scores_from_embeddings(v) if isinstance(threat, EmbeddingBall) else model.scores(v)
        return (out.gather(1, y[:, None]) - out.gather(1, rivals.T))[:, 0]

    point = start.detach().requires_grad_()
    (g,) = torch.autograd.grad(margin(point).sum(), point)
    if isinstance(threat, EmbeddingBall):
        mask = torch.zeros(g.shape[1])
        mask[threat.positions(g.shape[1])] = 1
        g = g * mask[:, None]
        worst = -g / (g.norm(dim=(-1, -2), keepdim=True) if threat.joint else g.norm(dim=-1, keepdim=True).clamp_min(1e-300))
    else:
        assert isinstance(threat, InputBall)
        only = torch.zeros_like(g).scatter(1, g.abs().argmax(-1, keepdim=True), 1.0)
        worst = -{"l2": g / g.norm(dim=-1, keepdim=True), "linf": g.sign(), "l1": g.sign() * only}[threat.norm]
    lost = (margin(start) - margin(start + 1e-6 * worst)).detach()
    assert bool((lost <= losses).all())
    torch.testing.assert_close(found.linear[0] * 1e-6, lost, rtol=1e-3, atol=0.0)
    assert bool((losses <= lost * 1.05 + 1e-11).all())


def test_first_order_takes_the_dual_norm() -> None:
    g = torch.tensor([[[[3.0, -4.0], [0.0, 12.0]]]], dtype=torch.float64)
    wanted = {"embedding-l2": 17.0, "embedding-fro": 13.0, "embedding-l2@0": 5.0, "embedding-fro@-1": 12.0, "l2": 13.0, "linf": 19.0, "l1": 12.0}
    for name, value in wanted.items():
        assert float(first_order(g, parse_threat(name))) == pytest.approx(value)


@pytest.mark.parametrize("method", ["local", "dual"])
def test_smaller_threats_have_larger_radii(method) -> None:
    for kind in ("gpt", "gpt-baseline"):
        model, x, y = tiny(kind, 0)
        radii = {n: certify(model, x, y, parse_threat(n), method).radius for n in
                 ("embedding-l2", "embedding-l2@1", "embedding-l2@-1", "embedding-l2@1,3", "embedding-fro", "embedding-fro@1,3")}  # fmt: skip
        for small, large in (
            ("embedding-l2@1", "embedding-l2@1,3"), ("embedding-l2@-1", "embedding-l2@1,3"), ("embedding-l2@1,3", "embedding-l2"),
            ("embedding-fro", "embedding-l2"), ("embedding-fro@1,3", "embedding-fro"), ("embedding-fro@1,3", "embedding-l2@1,3"),
        ):  # fmt: skip
            assert (radii[small] >= radii[large] * (1 - 2e-3)).all(), (kind, small, large)


def test_all_rivals_are_proved_not_only_the_nearest() -> None:
    """Nine rivals, more than are carried at once: eight look near by their rows, in a direction that hardly moves; the one left over binds."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 10)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([1e-3, 1.0, 1.0, 1.0])))
        model[0].bias.zero_()
        model[1].weight.zero_()
        model[1].bias.fill_(-1.0)
        model[1].bias[0] = 0.0
        model[1].weight[1:9, 0] = 10.0
        model[1].weight[9, 1] = 2.0
    x, y = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([0])
    assert float(certify(model, x, y, InputBall("l2"), "dual").radius[0]) == pytest.approx(0.5, rel=2e-3)
    assert float(certify(model, x, y, InputBall("l2"), "local").radius[0]) == pytest.approx(0.1, rel=2e-3)


@pytest.mark.parametrize("method", ["local", "dual"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "real"])
def test_every_dtype_is_covered_and_wider_ones_prove_more(method, dtype) -> None:
    model, x, y = tiny("mlp-tanh", 0)
    chain = copy.deepcopy(model).to({"real": torch.float64}.get(dtype) or getattr(torch, dtype))
    y = chain(x.to(next(chain.parameters()).dtype)).argmax(-1)
    certificate = certify(model, x, y, InputBall("l2"), method, dtype=dtype)
    exact = certify(model, x, y, InputBall("l2"), method, dtype="real")
    assert (certificate.radius <= exact.radius * (1 + 2e-2)).all()
    assert (certificate.radius[exact.radius > 0] >= 0).all()
    if dtype in ("float32", "float64"):
        assert np.median(certificate.radius / exact.radius) > 0.99


@pytest.mark.parametrize("method", ["local", "dual"])
def test_rounding_attacks_do_not_enter_16_bit_radii(method) -> None:
    """Margins of the size of rounding: points that the dtype has, along the gradient, at fractions of the radius that real numbers would prove."""
    for dtype in (torch.float16, torch.bfloat16):
        broken = 0
        for seed in range(12):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(64, 2)).to(dtype).requires_grad_(False)
            x = torch.rand(64, 64).to(dtype)
            logits = copy.deepcopy(model).double()(x.double())
            model[0].bias[0] -= (logits[:, 0] - logits[:, 1]).median().to(dtype)
            y = model(x).argmax(-1)
            executed, real = (torch.from_numpy(certify(model, x, y, InputBall("l2"), method, dtype=d).radius) for d in (None, "real"))
            w = model[0].weight.double()
            away = (w[1 - y] - w[y]) / (w[1] - w[0]).norm()
            for fraction in torch.linspace(0.3, 1.0, 8, dtype=torch.float64):
                moved = (x.double() + away * real[:, None] * fraction).to(dtype)
                distance = (moved.double() - x.double()).norm(dim=-1)
                flipped = model(moved).argmax(-1) != y
                broken += int((flipped & (distance <= real)).sum())
                assert not bool((flipped & (distance <= executed)).any())
        assert broken > 0


@pytest.mark.parametrize("method", ["local", "dual"])
def test_constant_models_ties_nan_and_overflow(method) -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([1.0, 0.0]))
    radius = certify(nn.Sequential(layer), torch.rand(2, 3), torch.tensor([0, 0]), InputBall("l2"), method).radius
    assert np.isfinite(radius).all() and (radius > 1e6).all()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2, 3))
        layer.bias.zero_()
    assert (certify(nn.Sequential(layer), torch.ones(2, 3), torch.tensor([0, 0]), InputBall("l2"), method).radius == 0).all()
    huge = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).half()
    with torch.no_grad():
        for p in huge.parameters():
            p.fill_(300.0)
    assert (certify(huge, torch.ones(1, 2).half() * 300, torch.tensor([0]), InputBall("l2"), method).radius == 0).all()
    model, x, y = tiny("mlp-relu", 0)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(BadInput, match="NaN"):
        certify(model, x, y, InputBall("l2"), method)
    with pytest.raises(UnsupportedLayer, match=r"GroupSort\(group=4\)"):
        certify(nn.Sequential(nn.Linear(4, 4), GroupSort(4), nn.Linear(4, 2)), torch.rand(1, 4), torch.tensor([0]), InputBall("l2"), method)


@pytest.mark.parametrize("method", ["local", "dual"])
def test_one_token_sequences(method) -> None:
    for kind in ("gpt", "gpt-baseline"):
        model, _, _ = tiny(kind, 0)
        x = torch.arange(7)[:, None]
        y = model.scores(x).argmax(-1)
        threat = EmbeddingBall()
        radius = certify(model, x, y, threat, method).radius
        assert (radius <= QUICK(model, x, y, threat).radius).all() and (radius > 0).any()


# ---- what was wrong once


def test_softmax_bounds_survive_cancellation() -> None:
    """One weight of 1 and the rest far below 2⁻⁵³: taking it off the sum of all would leave nothing of them."""
    x = torch.tensor([[3.5e19, 1e-17, 2e-17], [1e-17, 1.0, 0.0], [5.0, 5.0, 5.0]], dtype=torch.float64)
    wanted = torch.tensor([[3e-17, 3.5e19, 3.5e19], [1.0, 1e-17, 1.0], [10.0, 10.0, 10.0]], dtype=torch.float64)
    torch.testing.assert_close(sums_of_others(x), wanted, rtol=1e-12, atol=0.0)
    # The same inside attention: token 2 sees token 0 alone by 2⁻⁵⁶, and a change of key 0 by a logit of 45 turns it away from there. Values agree.
    layer = Attention(2, 1, causal=True, rope=False, scale=2.0, output_scale=1.0).double().requires_grad_(False)
    for name, rows in {"query": [[1.0, 0.0], [0, 0]], "key": [[1.0, 0], [0, 0]], "value": [[0, 0], [0, 1.0]], "output": [[0, 0], [0, 1.0]]}.items():
        getattr(layer, name).weight.copy_(torch.tensor(rows))
    x = torch.tensor([[[40.0, 0.0], [0.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    for r in (42.0, 47.0, 49.0):
        radius = torch.tensor([[r, 0.0, 0.0]], dtype=torch.float64)
        expansion = ChainExpansion([layer], x, Scope(Context(torch.float64, {})))
        _, error, bounds = expansion.advance(Ball.of(radius))
        delta = torch.zeros_like(x)
        delta[0, 0, 0], delta[0, 0, 1] = -0.95 * r, 0.3 * r  # the value that is turned away from is one that has moved
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            rest = layer(x + delta) - layer(x) - torch.func.jvp(layer, (x,), (delta,))[1]
        assert bool((rest.norm(dim=-1) <= error).all())
        allowed = decrease(torch.zeros(1, 1, dtype=torch.float64), expansion.adjoint(-rest[None])[1], bounds)
        assert float(rest.square().sum()) <= float(allowed)


@pytest.mark.parametrize("method", ["local", "dual", "best"])
def test_a_key_that_overflows_spoils_every_query_that_sees_it(method) -> None:
    """float16: a perturbed first token's key becomes inf while the query of the last one is tiny, and logits stay small."""
    model = NextTokenChain(OrderedDict(
        rows=nn.Embedding(2, 4), block=Residual(Attention(4, 1, rope=False, output_scale=1.0)), head=nn.Linear(4, 2),
    ))  # fmt: skip
    model.vocabulary = "ab"
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[0].weight.copy_(torch.tensor([[0.0, 0.0, 16.0, 0.0], [1.0, 0.0, 0.0, 1.0]]))
        layer = model[1].branch
        layer.key.weight[0, 2] = 2500.0
        layer.query.weight[0, 3] = 2.0**-13
        layer.value.weight[0, 0] = layer.output.weight[0, 0] = 2.0**-6
        model[2].weight[:, 0] = torch.tensor([1.0, -1.0])
    model.half()
    x, threat = torch.tensor([[0, 1]]), EmbeddingBall(tokens=(0,))
    radius = float(certify(model, x, torch.tensor([0]), threat, method).radius[0])
    start = model.embed(x)
    moved = start.clone()
    moved[0, 0, 2] += 16.0  # 2500·32 is more than float16 holds
    assert not bool(torch.isfinite(model.scores_from_embeddings(moved)).all())
    assert radius < 16.0


def test_small_divisors_enlarge_what_vanishes() -> None:
    x = torch.full((1, 1, 4), 2.0**-120)
    layer = ScaledGELU(2.0**-30)
    expansion = expand(copy.deepcopy(layer), x.double(), Scope(Context(torch.float32, {})))
    zero = torch.zeros(1, 1, dtype=torch.float64)
    rounding = float(expansion.advance(Ball.of(zero)).radius)
    assert rounding >= 4 * 2.0**-126 * 2.0**30  # the loss of one underflow, as the division sees it


@pytest.mark.parametrize("method", ["local", "dual", "best"])
def test_chains_of_changing_width_and_of_nothing(method) -> None:
    torch.manual_seed(0)
    wide = NextTokenChain(OrderedDict(
        rows=nn.Embedding(7, 8), up=nn.Linear(8, 12), bend=nn.GELU(), block=Residual(Attention(12, 2)), head=nn.Linear(12, 7),
    ))  # fmt: skip
    bare = NextTokenChain(OrderedDict(rows=nn.Embedding(7, 8), head=nn.Linear(8, 7)))
    x, threat = torch.randint(7, (4, 3)), EmbeddingBall(tokens=(-1,))
    for model in (wide, bare):
        model.vocabulary = "abcdefg"
        y = model.scores(x).argmax(-1)
        radius = certify(model, x, y, threat, method).radius
        assert (radius > 0).all() and (radius <= QUICK(model, x, y, threat).radius).all()


def test_single_token_references_read_the_moved_token() -> None:
    model, x, y = tiny("gpt", 0, dtype=torch.float64)
    reference = reference_of(model, x, y, EmbeddingBall(tokens=(-1,)), Context(torch.float64, {}))
    every = torch.arange(len(x))
    alone = single_token_reference(reference, every, torch.full_like(every, x.shape[1] - 1))
    rivals = reference.margin.argsort(-1)[:, :2].T
    one, all_of = Rivals.of(alone, y, rivals), Rivals.of(reference, y, rivals)
    torch.testing.assert_close(one.linear, all_of.linear, rtol=1e-9, atol=0.0)
    for radius in (1e-3, 0.1, 1.0):
        epsilon = torch.full((len(x),), radius, dtype=torch.float64)
        assert bool((one.decreases(alone, epsilon) <= all_of.decreases(reference, epsilon) * (1 + 1e-6)).all())


def reflected(w: float, r: float, omega: float, base: float, inputs: int = 1) -> tuple[nn.Sequential, Tensor]:
    """Two pairs at their kinks, against the label on both sides: its margin 4ωwr is used up at a distance of r, whatever the sizes of w and ω."""
    up_, head = nn.Linear(inputs, 4).double(), nn.Linear(4, 2).double()
    with torch.no_grad():
        up_.weight.zero_()
        up_.weight[:, 0] = torch.tensor([w, w, -w, -w], dtype=torch.float64)
        up_.bias.copy_(torch.tensor([0.0, base, 0.0, -base], dtype=torch.float64))
        head.weight.copy_(torch.tensor([[0.0] * 4, [omega, -omega, -omega, omega]], dtype=torch.float64))
        head.bias.copy_(torch.tensor([4 * omega * w * r, 2 * omega * base], dtype=torch.float64))
    return nn.Sequential(up_, MaxMin(), head).eval().requires_grad_(False), torch.zeros(1, inputs, dtype=torch.float64)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize(
    ("w", "r", "omega", "inputs"),
    [(0, 0, 0, 1), (420, 180, -478, 1), (400, 200, -478, 1), (-548, 200, 348, 4), (-540, 60, 480, 4), (300, 200, -513, 1), (260, 260, -513, 1)],
)
def test_kinks_of_any_size_keep_their_forms_true(w, r, omega, inputs, flush) -> None:
    """Adjoints and rows whose squares vanish got forms of nothing, once: four times the radius."""
    with flushing() if flush else nullcontext():
        model, x = reflected(2.0**w, 2.0**r, 2.0**omega, 2.0 ** (w + r + 8), inputs)
        for method in ("local", "dual"):
            radius = float(certify(model, x, torch.tensor([0]), InputBall("l2"), method).radius[0]) / 2.0**r
            assert radius <= 1 + 1e-9 and (radius > 0.99 or (w, r, omega) != (0, 0, 0))
