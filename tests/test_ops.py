"""The facts of every elementwise operation, each attacked: a new operation is checked by being registered."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from robustlip.errors import BadInput
from robustlip.layers import ScaledGELU
from robustlip.numerics.arithmetic import Arithmetic
from robustlip.ops import Elementwise, elementwise_layers, elementwise_of, is_elementwise, register_elementwise
from robustlip.ops.elementwise import RELU, ulps

# How to make a layer of each class; a registered class without a line here is made without arguments.
MADE: dict[str, nn.Module] = {
    "gelu": nn.GELU(), "gelu-tanh": nn.GELU("tanh"), "scaled-gelu": ScaledGELU(), "scaled-gelu-half": ScaledGELU(0.5),
    "scaled-gelu-tanh": ScaledGELU(3.0, "tanh"),
} | {kind.__name__.lower(): kind() for kind in elementwise_layers() if kind not in (nn.GELU, ScaledGELU)}  # fmt: skip

GRID = torch.cat([torch.linspace(-60, 60, 2_000_001, dtype=torch.float64), torch.tensor([-1e300, -1e155, -1e30, 0.0, 1e30, 1e155, 1e300])])


def grid() -> Tensor:
    return GRID[(GRID.abs() < 1e200)]


@pytest.fixture(params=MADE, ids=str)
def layer(request) -> nn.Module:
    return MADE[request.param]


@pytest.fixture
def facts(layer) -> Elementwise:
    return elementwise_of(layer)


def test_value_is_the_layer(layer, facts) -> None:
    z = torch.linspace(-30, 30, 10_001, dtype=torch.float64)
    assert torch.equal(facts.value(z) / facts.divisor, layer(z))


def test_derivative_is_that_of_the_value(facts) -> None:
    z = torch.linspace(-30, 30, 10_001, dtype=torch.float64).requires_grad_()
    slope = torch.autograd.grad(facts.value(z).sum(), z)[0]
    assert (slope - facts.derivative(z.detach())).abs().max() < 1e-13


def test_slopes_hold_and_are_sharp(facts) -> None:
    slope = facts.derivative(grid())
    assert bool(torch.isfinite(slope).all())
    low, high = facts.slope
    assert low - 1e-15 <= float(slope.min()) and float(slope.max()) <= high + 1e-15
    # Sharp to 1e-6, so that a bound that became looser by mistake is seen.
    assert float(slope.max()) >= high - 1e-6 and float(slope.min()) <= low + 1e-6


def test_curvature_holds_and_is_sharp(facts) -> None:
    if facts.curvature is None:
        assert facts.slope == (0.0, 1.0) and set(facts.derivative(grid()).tolist()) == {0.0, 1.0}
        return
    z = torch.linspace(-30, 30, 600_001, dtype=torch.float64).requires_grad_()
    bend = torch.autograd.grad(facts.derivative(z).sum(), z)[0]
    assert float(bend.abs().max()) <= facts.curvature <= float(bend.abs().max()) * (1 + 1e-6)


def test_growth_value_at_zero_and_bound_hold(facts) -> None:
    z = grid()
    value = facts.value(z)
    assert float(facts.value(torch.zeros(1, dtype=torch.float64))) == facts.at_zero
    growth = facts.steepest if facts.growth is None else facts.growth
    assert bool(((value - facts.at_zero).abs() <= growth * z.abs() * (1 + 1e-15) + 1e-15).all())
    assert bool((value.abs() <= facts.bounded).all())
    for count in (1, 7):
        x = 3 * torch.randn(500, count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
        root = math.sqrt(count) * (1 + 1e-15)
        assert bool((facts.value(x).norm(dim=-1) <= facts.size(x.norm(dim=-1), root) * (1 + 1e-14)).all())


def test_the_minimum_is_where_it_is_said(facts) -> None:
    z = torch.linspace(-30, 30, 6_000_001, dtype=torch.float64)
    value = facts.value(z)
    if facts.lowest is None:
        assert bool((value.diff() >= -1e-15).all())
        return
    place, least = facts.lowest
    assert least <= float(value.min()) <= least + 1e-6
    assert abs(float(z[value.argmin()]) - place) < 1e-3
    at = int(value.argmin())
    assert bool((value[: at + 1].diff() <= 1e-15).all()) and bool((value[at:].diff() >= -1e-15).all())


def test_bend_bounds_what_is_beyond_the_tangent(facts) -> None:
    if facts.bend is None:
        return
    g = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(4000, 1, dtype=torch.float64, generator=g)
    reach = 10 ** (4 * torch.rand(4000, 1, dtype=torch.float64, generator=g) - 3)
    step = reach * torch.linspace(-1, 1, 41, dtype=torch.float64)
    rest = facts.value(z + step) - facts.value(z) - facts.derivative(z) * step
    convex, concave = (k.clamp_min(0) for k in facts.bend(z.abs(), reach))
    assert bool((rest <= 0.5 * convex * step**2 + 1e-14).all()) and bool((rest >= -0.5 * concave * step**2 - 1e-14).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_executed_errors_hold(layer, facts, dtype) -> None:
    arithmetic = Arithmetic(dtype)
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(4000, 6, generator=g, dtype=torch.float64) * 10 ** (6 * torch.rand(4000, 1, generator=g, dtype=torch.float64) - 3)).to(dtype)
    x = x[torch.isfinite(x).all(-1)]
    exact, made = layer(x.double()), layer(x).double()
    norm = x.double().norm(dim=-1)
    bound = facts.error(norm, math.sqrt(6) * (1 + 1e-15), arithmetic)
    assert bool(((made - exact).norm(dim=-1) <= bound).all())
    # Not larger than a thousand units in the last place of what comes in, so that a bound that says nothing is seen.
    inside = torch.isfinite(bound) & (norm > 1e-2)
    assert bool((bound[inside] <= 1000 * arithmetic.unit * (norm[inside] + 1) * max(1.0, 1 / abs(facts.divisor))).all())


def test_overflow_and_divisors_that_count_for_zero_have_no_error_bound() -> None:
    huge = torch.tensor([1e38], dtype=torch.float64)
    for layer in (nn.GELU("tanh"), ScaledGELU(1e-3), ScaledGELU(1e-39)):
        assert bool(torch.isinf(elementwise_of(layer).error(huge, 1.0, Arithmetic(torch.float32))))
    assert bool(torch.isfinite(elementwise_of(nn.ReLU()).error(huge / 10, 1.0, Arithmetic(torch.float32))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slope": (0.0, math.inf)}, "slope="), ({"slope": (1.0, 0.0)}, "slope="), ({"slope": (-0.5, 1.0), "curvature": 1.0}, "lowest"),
        ({"slope": (0.2, 1.0)}, "piecewise linear"), ({"divisor": 0.0}, "divisor"), ({"divisor": -1.0}, "divisor"),
    ],
)  # fmt: skip
def test_facts_that_contradict_themselves_are_refused(change, message) -> None:
    made = {"value": torch.relu, "derivative": torch.sign, "slope": (0.0, 1.0), "curvature": None, "executed": ulps(1)} | change
    with pytest.raises(BadInput, match=message):
        Elementwise(**made)


def test_a_class_has_its_facts_once_and_subclasses_have_none() -> None:
    class Other(nn.ReLU):
        pass

    assert is_elementwise(nn.ReLU()) and not is_elementwise(Other())
    with pytest.raises(BadInput, match="has some"):
        register_elementwise(nn.ReLU, lambda layer: RELU)
