"""Intermediate values may overflow although the output is finite: every rule considers the largest number that its layer computes or stores."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustlip.certifiers import certify
from robustlip.domains.expansion.base import Ball, Scope
from robustlip.domains.expansion.structure import ChainExpansion
from robustlip.domains.norms import Context, State, rule_for
from robustlip.errors import BadInput
from robustlip.layers import AddPositions, Attention, GroupSort, Householder, MaxMin, MeanTokens, NextTokenChain, Normalize, Residual, ScaledGELU
from robustlip.threats import EmbeddingBall, InputBall, Threat


def linear(weight: float, bias: float = 0.0) -> nn.Linear:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4) * weight)
        layer.bias.fill_(bias)
    return layer


def attention(query: float, key: float, value: float, output: float, **options: float) -> Attention:
    layer = Attention(4, 1, rope=False, **{"output_scale": 1.0, "distance_bias": 2, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        for name, size in {"query": query, "key": key, "value": value, "output": output}.items():
            getattr(layer, name).weight.copy_(torch.eye(4) * size)
        if layer.distance_bias is not None:
            layer.distance_bias.zero_()
    return layer


def normalising(kind: type[nn.LayerNorm] | type[nn.RMSNorm], gain: float) -> nn.Module:
    layer = kind(4, eps=1e-3)
    nn.init.constant_(layer.weight, gain)
    return layer


def positions(value: float) -> AddPositions:
    layer = AddPositions(70, 4)
    nn.init.constant_(layer.positions, value)
    return layer


def batchnorm(gain: float, mean: float, variance: float) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(4)
    nn.init.constant_(layer.weight, gain)
    assert layer.running_var is not None and layer.running_mean is not None
    nn.init.constant_(layer.running_var, variance)
    nn.init.constant_(layer.running_mean, mean)
    return layer


# name → a layer of one number or more, and by how much it is multiplied. Sizes in units that make some product of them overflow, some not.
LAYERS: dict[str, Callable[[float, float], nn.Module]] = {
    "linear": linear,
    "attention": lambda a, b: attention(1.0, 1.0, a, b),
    "attention-values": lambda a, b: attention(0.0, 0.0, a, b, distance_bias=0),
    "attention-factor": lambda a, b: attention(0.0, 0.0, a, 1.0, output_scale=b),
    "attention-queries": lambda a, b: attention(a, 1 / a, 1.0, b),
    "attention-scale": lambda a, b: attention(a, 0.01 / a, 1e-10, 1.0, scale=b),
    "residual": lambda a, b: Residual(linear(a), skip=1.0, weight=b),
    "residual-skip": lambda a, b: Residual(linear(1.0), skip=a, weight=b),
    "layernorm": lambda a, b: normalising(nn.LayerNorm, a),
    "rmsnorm": lambda a, b: normalising(nn.RMSNorm, a),
    "gelu": lambda a, b: nn.GELU("tanh"),
    "scaled-gelu": lambda a, b: ScaledGELU(a),
    "silu": lambda a, b: nn.SiLU(),
    "leaky": lambda a, b: nn.LeakyReLU(min(a, 1e6)),
    "elu": lambda a, b: nn.ELU(min(a, 1e6)),
    "selu": lambda a, b: nn.SELU(),
    "softplus": lambda a, b: nn.Softplus(min(max(a, 1e-6), 1e6), 1000.0),
    "hardswish": lambda a, b: nn.Hardswish(),
    "mish": lambda a, b: nn.Mish(),
    "normalize": lambda a, b: Normalize([a], [b]),
    "maxmin": lambda a, b: MaxMin(),
    "groupsort": lambda a, b: GroupSort(4),
    "householder": lambda a, b: Householder(4),
    "mean": lambda a, b: MeanTokens(),
    "positions": lambda a, b: positions(a),
    "vector-batchnorm": lambda a, b: batchnorm(a, b, 1.0),
    "vector-batchnorm-variance": lambda a, b: batchnorm(1.0, a, b),
}
# What overflows on the way alone: the layer's parameters, its input, and how many tokens there are.
HIDDEN = {
    "hardswish": (1.0, 1.0, 1e38, 1),
    "normalize": (3e38, 1e10, -1e38, 1),
    "scaled-gelu": (0.01, 1.0, 1e37, 1),
    "layernorm": (3.3e38, 1.0, 1.0, 1),
    "rmsnorm": (3.3e38, 1.0, 1.0, 1),
    "attention-factor": (1.0, 1e20, 1e19, 1),
    "attention-values": (1.0, 1e-30, 6e36, 64),
    "attention-scale": (1e35, 1e30, 1e-10, 2),
    "mean": (1.0, 1.0, 1e37, 64),
    "residual": (1e30, 1e-30, 1e10, 1),
}


def bounds(layer: nn.Module, x: torch.Tensor, name: str, dtype: torch.dtype) -> list[float]:
    """Allowed for rounding: by the layer's rule (which may know norms alone), and by its expansion at the point itself."""
    norm = (x.double().flatten(1).norm(dim=-1) if name.startswith("vector") else x.double().norm(dim=-1).amax(-1)) * (1 + 1e-12)
    zero = torch.zeros_like(norm)
    context = Context(dtype, {})
    tokens = 1 if name.startswith("vector") else x.shape[1]
    after = rule_for(layer).step(layer, State(norm, zero, zero, "l2", tokens, 4, None), context)
    found = [float(after.rounding)]
    if not name.startswith("vector"):
        still = torch.zeros(1, tokens, dtype=torch.float64)
        expansion = ChainExpansion([layer.double()], x.double(), Scope(context))
        found.append(float(expansion.advance(Ball.of(still), remainder=False).radius.max()))
    return found


def overflows(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether one of torch's kernels returns values that are not finite for x."""
    found = False
    for backends in ([SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        for grad in (False, True):
            with sdpa_kernel(backends), torch.set_grad_enabled(grad):
                found = found or not bool(torch.isfinite(layer(x)).all())
    return found


def sample(name: str, size: float, tokens: int) -> torch.Tensor:
    if name.startswith("vector"):
        return torch.tensor([[size, -size, size / 2, 0.0]])
    x = torch.tensor([size, 0.0, 0.0, 0.0]) if "norm" in name.split("-")[0] else torch.tensor([size, size / 2, size / 3, size])
    return x.expand(1, tokens, 4).clone()


@pytest.mark.parametrize("name", HIDDEN)
def test_what_overflows_on_the_way_is_seen(name: str) -> None:
    first, second, size, tokens = HIDDEN[name]
    layer, x = LAYERS[name](first, second).eval(), sample(name, size, tokens)
    assert overflows(layer, x)
    assert bounds(layer, x, name, torch.float32) == [math.inf, math.inf]


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_bound_is_finite_where_execution_is_not(name: str, data: st.DataObject) -> None:
    dtype, most = data.draw(st.sampled_from([(torch.float32, 38.0), (torch.float16, 4.7), (torch.bfloat16, 38.0)]))
    first, second, size = (10.0 ** data.draw(st.floats(-most, most)) for _ in range(3))
    tokens = 1 if name.startswith("vector") else data.draw(st.sampled_from([1, 2, 64]))
    try:
        layer = LAYERS[name](first, second).eval().to(dtype)
        x = sample(name, size, tokens).to(dtype)
        assume(bool(torch.isfinite(x).all()) and all(bool(torch.isfinite(p).all()) for p in (*layer.parameters(), *layer.buffers())))
        overflowed = overflows(layer, x)
        allowed = bounds(layer, x, name, dtype)
    except BadInput:
        return  # refused: nothing is claimed
    if overflowed:
        # NaN is a bound that holds for no number either.
        assert all(not bound < math.inf for bound in allowed)


def head(weight: float, lead: float, width: int = 1) -> nn.Linear:
    """Label 1 leads by `lead`; both rows read the first number alone, the rival's row twice as much."""
    layer = nn.Linear(width, 2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, 0] = torch.tensor([weight, weight / 2])
        layer.bias.copy_(torch.tensor([0.0, lead]))
    return layer


def small_gain(kind: type[nn.Module]) -> nn.Sequential:
    layer = normalising(kind, 3e38)  # type: ignore[arg-type]
    return nn.Sequential(layer, head(1e-31, 1e10, 4))


def flash() -> NextTokenChain:
    layer = Attention(2, 1, rope=False, output_scale=1.0)
    model = NextTokenChain(OrderedDict(table=nn.Embedding(2, 2), attention=Residual(layer, skip=1e-25, weight=1.0), head=head(1e-4, 1e10, 2)))
    with torch.no_grad():
        for name, size in {"query": 0.0, "key": 0.0, "value": 1.0, "output": 1e-25}.items():
            getattr(layer, name).weight.copy_(size * torch.eye(2))
        model[0].weight.fill_(1e35)
    return model


CLAIMS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, torch.Tensor, Threat]] = {
    "pixels": (lambda: nn.Sequential(Normalize(128.0, 64.0), head(0.01, 1000.0)).half(),
               torch.tensor([[100.0]]).half(), torch.tensor([[-65504.0]]).half(), InputBall("l2")),
    "difference": (lambda: nn.Sequential(Normalize(-3e38, 1e10), head(1e-20, 1e10)), torch.tensor([[1e37]]), torch.tensor([[1e38]]), InputBall("l2")),
    "divisor": (lambda: nn.Sequential(ScaledGELU(0.1), head(0.01, 3000.0)).half(),
                torch.tensor([[10.0]]).half(), torch.tensor([[8000.0]]).half(), InputBall("l2")),
    "layernorm": (lambda: small_gain(nn.LayerNorm), torch.tensor([[1.0, 1.0, -1.0, -1.0]]), torch.tensor([[1.0, -0.7, -1.0, -1.0]]), InputBall("l2")),
    "rmsnorm": (lambda: small_gain(nn.RMSNorm), torch.tensor([[1.0, 1.0, -1.0, -1.0]]), torch.tensor([[2.0, 0.3, -0.3, -0.3]]), InputBall("l2")),
    "flash": (flash, torch.zeros(1, 64, dtype=torch.long), torch.tensor([6.1e36, 1e35]).expand(1, 64, 2), EmbeddingBall()),
}  # fmt: skip


@pytest.mark.parametrize("method", ["global", "local", "dual", "crown", "local-lipschitz", "eclipse", "best"])
@pytest.mark.parametrize("name", CLAIMS)
def test_no_radius_reaches_a_point_where_execution_overflows(name: str, method: str) -> None:
    make, x, point, threat = CLAIMS[name]
    model = make().eval()
    run = model if isinstance(threat, InputBall) else model.scores_from_embeddings  # type: ignore[operator]
    start = x if isinstance(threat, InputBall) else model.embed(x)  # type: ignore[operator]
    with torch.no_grad():
        assert bool(torch.isfinite(run(start)).all()) and not bool(torch.isfinite(run(point)).all())
        label = run(start).argmax(-1)
        distance = float((point.double() - start.double()).norm(dim=-1).max())
        try:
            certificate = certify(model, x, label, threat, method)
        except BadInput:
            return  # not of this method
    assert float(certificate.radius[0]) <= distance
