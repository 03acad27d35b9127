"""The facts of every registered elementwise operation, each tested by an attack."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import mpmath
import pytest
import torch
from curves import ACTIVATIONS
from formulas import ELEMENTWISE as FORMULAS
from torch import Tensor, nn

import robustlip
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Clamp, ScaledGELU
from robustlip.numerics.arithmetic import Arithmetic
from robustlip.ops import Elementwise, elementwise_layers, elementwise_of, is_elementwise, register_elementwise
from robustlip.ops.elementwise import RELU, kinks, ulps
from robustlip.ops.piecewise import parameter_error

# How to make a layer of each class; a registered class without a line here is made without arguments.
MADE: dict[str, nn.Module] = {
    "gelu": nn.GELU(), "gelu-tanh": nn.GELU("tanh"), "scaled-gelu": ScaledGELU(), "scaled-gelu-half": ScaledGELU(0.5),
    "scaled-gelu-tanh": ScaledGELU(3.0, "tanh"),
    "leaky": nn.LeakyReLU(0.01), "leaky-falls": nn.LeakyReLU(-0.5), "leaky-steep": nn.LeakyReLU(2.0), "leaky-identity": nn.LeakyReLU(1.0),
    "leaky-relu": nn.LeakyReLU(0.0), "leaky-tiny": nn.LeakyReLU(1e-9), "leaky-falls-steep": nn.LeakyReLU(-3.3),
    "prelu": nn.PReLU(), "prelu-falls": nn.PReLU(init=-0.7), "prelu-equal": nn.PReLU(6, init=0.3),
    "elu": nn.ELU(), "elu-gentle": nn.ELU(0.3), "elu-steep": nn.ELU(2.5), "elu-falls": nn.ELU(-1.5), "elu-relu": nn.ELU(0.0),
    "celu": nn.CELU(), "celu-sharp": nn.CELU(0.1), "celu-wide": nn.CELU(3.0),
    "softplus": nn.Softplus(), "softplus-sharp": nn.Softplus(4.0), "softplus-wide": nn.Softplus(0.4), "softplus-jumps": nn.Softplus(1.0, 2.0),
    "softplus-jumps-early": nn.Softplus(2.0, -1.0), "softplus-late": nn.Softplus(1.0, 80.0), "softplus-overflows": nn.Softplus(1.0, 1000.0),
    "hardtanh": nn.Hardtanh(), "hardtanh-odd": nn.Hardtanh(-0.3, 2.7), "hardtanh-above": nn.Hardtanh(0.1, 0.9),
    "hardtanh-below": nn.Hardtanh(-7.1, -2.3),
    "clamp": Clamp(-0.7, 1.9), "clamp-low": Clamp(low=0.3), "clamp-high": Clamp(high=1 / 3), "clamp-relu": Clamp(low=0.0),
    "threshold": nn.Threshold(0.3, 0.3), "softshrink": nn.Softshrink(), "softshrink-wide": nn.Softshrink(2.3), "softshrink-0": nn.Softshrink(0.0),
    "hardshrink": nn.Hardshrink(0.0), **FORMULAS,
}  # fmt: skip
MADE |= {kind.__name__.lower(): kind() for kind in elementwise_layers() if kind not in {type(layer) for layer in MADE.values()}}

GRID = torch.cat([torch.linspace(-60, 60, 2_000_001, dtype=torch.float64), torch.tensor([-1e300, -1e155, -1e30, 0.0, 1e30, 1e155, 1e300])])


def grid(facts: Elementwise | None = None) -> Tensor:
    """Numbers of all sizes, and both sides of each kink."""
    near = [k.place + side for k in (facts.kinks if facts else ()) for side in (-1e-9, 1e-9)]
    return torch.cat([GRID[(GRID.abs() < 1e200)], torch.tensor(near, dtype=torch.float64)])


def smooth_points(facts: Elementwise, z: Tensor) -> Tensor:
    """Which of the points are no kinks."""
    there = torch.ones_like(z, dtype=torch.bool)
    for kink in facts.kinks:
        there &= (z - kink.place).abs() > 1e-10
    return there


def per_number(layer: nn.Module, z: Tensor) -> Tensor:
    """The layer in z's dtype at each number of z (n,)."""
    layer = copy.deepcopy(layer).to(z.dtype)
    return layer(z[:, None].expand(-1, 6))[:, 0] if type(layer) is nn.PReLU else layer(z)


@pytest.fixture(params=MADE, ids=str)
def layer(request) -> nn.Module:
    return MADE[request.param]


@pytest.fixture
def facts(layer) -> Elementwise:
    return elementwise_of(layer)


def test_value_is_the_layer(layer, facts) -> None:
    z = torch.linspace(-30, 30, 10_001, dtype=torch.float64)
    if type(layer) is nn.Softplus:  # whose kernel jumps
        assert bool(((facts.value(z) - layer(z)).abs() <= facts.error(z.abs(), 1.0, Arithmetic(torch.float64))).all())
    else:
        assert torch.equal(facts.value(z) / facts.divisor, per_number(layer, z))


def test_derivative_is_that_of_the_value(layer, facts) -> None:
    z = torch.linspace(-30, 30, 10_001, dtype=torch.float64).requires_grad_()
    slope, stated_slope = torch.autograd.grad(facts.value(z).sum(), z)[0], facts.derivative(z.detach())
    assert stated_slope.dtype == z.dtype
    # torch's backward of these two keeps float32 numbers, whatever the dtype; the test below asks for more digits.
    allowed = 2e-8 if type(layer) in (nn.CELU, nn.Hardsigmoid) else 1e-13
    assert (slope - stated_slope)[smooth_points(facts, z.detach())].abs().max() < allowed * max(1.0, facts.steepest)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives_are_those_of_forty_digits(name) -> None:
    layer, function = ACTIVATIONS[name]
    facts, arithmetic = elementwise_of(layer), Arithmetic(torch.float64)
    z = torch.cat([torch.linspace(-7.3, 6.9, 60, dtype=torch.float64), torch.tensor([-40.0, -1e-3, 1e-9, 1e-3, 33.0], dtype=torch.float64)])
    values, slopes, errors = facts.value(z), facts.derivative(z), facts.executed_error(z.abs(), 1.0, arithmetic)
    with mpmath.workdps(40):
        for at, value, slope, error in zip(*(t.tolist() for t in (z, values, slopes, errors)), strict=True):
            assert abs(function(mpmath.mpf(at)) - mpmath.mpf(value)) <= error + 1e-300
            assert abs(mpmath.diff(function, mpmath.mpf(at), h=mpmath.mpf(10) ** -15) - slope) < 1e-13 * max(1.0, facts.steepest)
    assert abs(function(mpmath.mpf(0)) - facts.at_zero) < 1e-15


def test_slopes_hold_and_are_sharp(facts) -> None:
    slope = facts.derivative(grid(facts))
    assert bool(torch.isfinite(slope).all())
    low, high = facts.slope
    assert low - 1e-15 <= float(slope.min()) and float(slope.max()) <= high + 1e-15
    # Sharp to 1e-6, so that a bound that became looser by mistake is seen.
    assert float(slope.max()) >= high - 1e-6 and float(slope.min()) <= low + 1e-6


def test_curvature_holds_and_is_sharp(facts) -> None:
    if facts.curvature == 0:
        away = grid(facts)
        pieces = {s for kink in facts.kinks for s in kink[1:]} or {facts.slope[0]}
        assert set(facts.derivative(away[smooth_points(facts, away)]).tolist()) == pieces
        return
    z = torch.cat([torch.linspace(-30, 30, 600_001, dtype=torch.float64), -torch.logspace(-12, 0, 200, dtype=torch.float64)]).requires_grad_()
    bend = torch.autograd.grad(facts.derivative(z).sum(), z)[0]
    assert float(bend.abs().max()) <= facts.curvature <= float(bend.abs().max()) * (1 + 1e-6)


def test_kinks_are_where_they_are_said(facts) -> None:
    for kink in facts.kinks:
        for side, slope in ((-1, kink.left), (1, kink.right)):
            z = torch.tensor(kink.place + side * 1e-9, dtype=torch.float64)
            assert abs(float(facts.derivative(z)) - slope) < 1e-8 * max(1.0, facts.curvature)
        at = float(facts.derivative(torch.tensor(kink.place, dtype=torch.float64)))
        assert min(kink.left, kink.right) <= at <= max(kink.left, kink.right)
        assert abs(Fraction(kink.jump)) >= abs(Fraction(kink.right) - Fraction(kink.left)) and kink.jump == pytest.approx(kink.right - kink.left)


def test_what_is_beyond_the_tangent_is_curvature_and_kinks(facts) -> None:
    """φ(z + Δ) − φ(z) − φ'(z)Δ, from points near kinks and far, against ±½·curvature·Δ² and jump·(|Δ| − distance)⁺ of each kink on the way."""
    places = [0.0, *[k.place for k in facts.kinks]]
    g = torch.Generator().manual_seed(0)
    near = [p + s * torch.randn(300, 1, dtype=torch.float64, generator=g) for p in places for s in (1e-3, 0.3, 4.0)]
    z = torch.cat([*near, torch.tensor([places], dtype=torch.float64).T])
    step = torch.cat([-torch.logspace(-4, 1.5, 60, dtype=torch.float64), torch.logspace(-4, 1.5, 60, dtype=torch.float64)])
    rest = facts.value(z + step) - facts.value(z) - facts.derivative(z) * step
    top, bottom = 0.5 * facts.curvature * step**2 + 0 * z, -0.5 * facts.curvature * step**2 + 0 * z
    for kink in facts.kinks:
        way = torch.where((kink.place - z) * step > 0, (step.abs() - (kink.place - z).abs()).clamp_min(0), torch.zeros_like(step + z))
        way = torch.where(kink.place == z, step.abs().expand_as(way), way)
        top, bottom = top + max(kink.jump, 0.0) * way, bottom + min(kink.jump, 0.0) * way
    noise = 1e-13 * max(1.0, facts.steepest) * (1 + step.abs() + z.abs())
    assert bool((rest <= top + noise).all()) and bool((rest >= bottom - noise).all())


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
    if facts.local_curvature is None:
        return
    g = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(4000, 1, dtype=torch.float64, generator=g)
    reach = 10 ** (4 * torch.rand(4000, 1, dtype=torch.float64, generator=g) - 3)
    step = reach * torch.linspace(-1, 1, 41, dtype=torch.float64)
    rest = facts.value(z + step) - facts.value(z) - facts.derivative(z) * step
    convex, concave = (k.clamp_min(0) for k in facts.local_curvature(z.abs(), reach))
    assert bool((rest <= 0.5 * convex * step**2 + 1e-14).all()) and bool((rest >= -0.5 * concave * step**2 - 1e-14).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_executed_errors_hold(layer, facts, dtype) -> None:
    arithmetic, layer = Arithmetic(dtype), copy.deepcopy(layer).to(dtype)
    facts = elementwise_of(layer)  # with parameters as that dtype has them
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(4000, 6, generator=g, dtype=torch.float64) * 10 ** (6 * torch.rand(4000, 1, generator=g, dtype=torch.float64) - 3)).to(dtype)
    x = x[torch.isfinite(x).all(-1)]
    exact, made = facts.value(x.double()) / facts.divisor, layer(x).double()
    norm = x.double().norm(dim=-1)
    bound = facts.error(norm, math.sqrt(6) * (1 + 1e-15), arithmetic)
    assert bool(((made - exact).norm(dim=-1) <= bound).all())
    # Not larger than a thousand units in the last place of what comes in, so that a bound that says nothing is seen.
    inside = torch.isfinite(bound) & (norm > 1e-2)
    jump = softplus_jump(layer) * math.sqrt(6) * 1.3 if type(layer) is nn.Softplus else 0.0
    allowed = 1000 * arithmetic.unit * (norm[inside] + 1) * max(1.0, 1 / abs(facts.divisor))
    assert bool(inside.any()) and bool((bound[inside] <= allowed + jump).all())


def softplus_jump(layer: nn.Softplus) -> float:
    """By how much the kernel jumps, log(1 + exp(−threshold))/β."""
    return math.log1p(math.exp(-layer.threshold)) / layer.beta


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("beta", "threshold"), [(1.0, 20.0), (0.5, 2.0), (3.0, -1.0), (1.0, 0.0)])
def test_the_jump_of_softplus_is_counted_where_it_is_reached(beta, threshold, dtype) -> None:
    layer, arithmetic = nn.Softplus(beta, threshold), Arithmetic(dtype)
    facts = elementwise_of(layer)
    edge = torch.tensor([threshold / beta], dtype=torch.float64)
    for count in (1, 9):
        # Just above the threshold, all numbers.
        x = (edge + 1e-5).expand(count).to(dtype)
        lost = (layer(x).double() - facts.value(x.double())).norm()
        bound = float(facts.error(x.double().norm()[None], math.sqrt(count) * (1 + 1e-15), arithmetic))
        assert float(lost) <= bound
        assert float(lost) >= 0.99 * softplus_jump(layer) * math.sqrt(count) - 1e-6 * (dtype == torch.float32)
    if threshold > 0:  # and not below
        assert float(facts.error(0.9 * edge, 1.0, Arithmetic(torch.float64))) < 1e-12


@pytest.mark.parametrize("dtype", [None, "real"])
@pytest.mark.parametrize("method", ["global", "local", "dual", "ibp", "crown", "local-lipschitz", "eclipse", "lipsdp"])
def test_no_radius_reaches_across_the_jump_of_softplus(method, dtype) -> None:
    """The kernel falls from 1.31 to 1.00 where x passes 1, and the label with it; the smooth function keeps it from .84 on."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Softplus(1.0, 1.0), nn.Linear(1, 2)).double().eval()
    with torch.no_grad():
        for p, values in zip(model.parameters(), ([[1.0]], [0.0], [[1.0], [0.0]], [0.0, 1.2]), strict=True):
            p.copy_(torch.tensor(values))
    x = torch.tensor([[0.95], [0.2], [3.0]], dtype=torch.float64)
    assert model(x).argmax(-1).tolist() == [0, 1, 0] and model(torch.tensor([[1.01]], dtype=torch.float64)).argmax() == 1
    radius = robustlip.certify(model, x, torch.tensor([0, 1, 0]), robustlip.InputBall("l2"), method, dtype=dtype).radius
    assert radius[0] <= 0.05 and radius[1] <= 0.641 and 0 < radius[2] <= 1.8


def test_a_softplus_whose_exponential_overflows_has_no_error_bound() -> None:
    x, facts = torch.tensor([90.0]), elementwise_of(nn.Softplus(1.0, 1000.0))
    assert math.isinf(float(nn.Softplus(1.0, 1000.0)(x)))
    assert math.isinf(float(facts.error(x.double(), 1.0, Arithmetic(torch.float32))))
    assert float(facts.error(x.double(), 1.0, Arithmetic(torch.float64))) < 1e-11
    assert float(elementwise_of(nn.Softplus()).error(x.double(), 1.0, Arithmetic(torch.float16))) < 10  # which computes in float32


def test_rounded_parameters_are_counted() -> None:
    """Bounds of a clamp that a dtype does not hold move where no number is large: at 0, and where a bound is beyond 0."""
    for low, high in ((0.1, 0.9), (-0.9, -0.1), (-0.3, 0.7)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            layer = Clamp(low, high)
            facts, x = elementwise_of(layer), torch.tensor([-2.0, 0.0, 2.0], dtype=dtype)
            lost = (layer(x).double() - facts.value(x.double())).abs()
            assert bool((lost > 0).any()) and bool((lost <= facts.error(x.double().abs(), 1.0, Arithmetic(dtype))).all())
    half = Arithmetic(torch.bfloat16)
    assert parameter_error(0.75, half) == 0.0 and parameter_error(0.1, half) >= abs(float(torch.tensor(0.1).bfloat16()) - 0.1) > 0


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Hardshrink(0.5), "continuous function, got Hardshrink.0.5., which jumps at ±0.5; use Softshrink"),
        (nn.Threshold(0.1, 20.0), "continuous function, got Threshold.*, which jumps at 0.1; use Clamp"),
        (nn.LeakyReLU(math.nan), "negative_slope from"), (nn.LeakyReLU(1e9), "negative_slope from"), (nn.ELU(math.inf), "alpha from"),
        (nn.CELU(0.0), "alpha from"), (nn.CELU(-1.0), "alpha from"), (nn.Softplus(0.0), "beta from"), (nn.Softplus(-2.0), "beta from"),
        (nn.Softplus(1.0, math.nan), "threshold from"), (nn.Softshrink(-1.0), "lambd from"), (nn.PReLU(init=math.nan), "PReLU"),
    ],
    ids=str,
)  # fmt: skip
def test_functions_without_facts_are_refused(layer, message) -> None:
    with pytest.raises(UnsupportedLayer, match=message):
        elementwise_of(layer)


def test_prelu_of_different_slopes_is_refused() -> None:
    layer = nn.PReLU(3)
    assert elementwise_of(layer).slope == (0.25, 1.0)
    with torch.no_grad():
        layer.weight[1] = 0.5
    with pytest.raises(UnsupportedLayer, match="one slope, got 3 slopes, 2 of them different"):
        elementwise_of(layer)


@pytest.mark.parametrize("bounds", [(None, None), (1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (-math.inf, 1.0)])
def test_clamps_without_room_are_refused(bounds) -> None:
    with pytest.raises(BadInput, match="low < high"):
        Clamp(*bounds)
    if None not in bounds and bounds[0] >= bounds[1]:
        hardtanh = nn.Hardtanh()
        hardtanh.min_val, hardtanh.max_val = bounds
        with pytest.raises(UnsupportedLayer, match="min_val below max_val"):
            elementwise_of(hardtanh)


@pytest.mark.parametrize("kind", [nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Hardtanh, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.SiLU])
def test_in_place_and_out_of_place_have_one_certificate(kind) -> None:
    def model(inplace: bool) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(kind(inplace=inplace), nn.Linear(5, 9), kind(inplace=inplace), nn.Linear(9, 3)).eval()

    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    y, mine = model(False)(x).argmax(-1), x.clone()
    for method in ("global", "crown", "dual"):
        plain, within = (robustlip.certify(model(inplace), mine, y, robustlip.InputBall("l2"), method) for inplace in (False, True))
        assert (plain.radius == within.radius).all() and (plain.radius > 0).any() and plain.weights_sha256 == within.weights_sha256
        assert torch.equal(mine, x)


def test_overflow_and_divisors_that_count_for_zero_have_no_error_bound() -> None:
    huge = torch.tensor([1e38], dtype=torch.float64)
    for layer in (nn.GELU("tanh"), ScaledGELU(1e-3), ScaledGELU(1e-39)):
        assert bool(torch.isinf(elementwise_of(layer).error(huge, 1.0, Arithmetic(torch.float32))))
    seven = torch.tensor([7e37])  # of which the kernel makes 6x before it divides
    assert bool(torch.isinf(nn.Hardswish()(seven)).all())
    assert bool(torch.isinf(elementwise_of(nn.Hardswish()).error(seven.double(), 1.0, Arithmetic(torch.float32))))
    assert bool(torch.isfinite(elementwise_of(nn.ReLU()).error(huge / 10, 1.0, Arithmetic(torch.float32))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slope": (0.0, math.inf)}, "slope="), ({"slope": (1.0, 0.0)}, "slope="), ({"slope": (-0.5, 1.0), "curvature": 1.0}, "lowest"),
        ({"kinks": kinks((0.0, 0.0, 1.5))}, "slopes at kinks within"),
        ({"kinks": kinks((1.0, 0.0, 1.0), (0.0, 1.0, 0.5))}, "kinks at finite places in order"),
        ({"kinks": kinks((math.inf, 0.0, 1.0))}, "kinks at finite"),
        ({"kinks": kinks((0.0, 0.0, 1.0), (1.0, 0.5, 0.0))}, "one slope between two kinks"),
        ({"curvature": math.nan}, "finite curvature"), ({"curvature": -1.0}, "finite curvature"), ({"divisor": 0.0}, "divisor"),
        ({"divisor": -1.0}, "divisor"),
    ],
)  # fmt: skip
def test_facts_that_contradict_themselves_are_refused(change, message) -> None:
    made = {"value": torch.relu, "derivative": torch.sign, "slope": (0.0, 1.0), "curvature": 0.0, "executed": ulps(1)} | change
    with pytest.raises(BadInput, match=message):
        Elementwise(**made)


def test_a_class_has_its_facts_once_and_subclasses_have_none() -> None:
    class Other(nn.ReLU):
        pass

    assert is_elementwise(nn.ReLU()) and not is_elementwise(Other())
    with pytest.raises(BadInput, match="has some"):
        register_elementwise(nn.ReLU, lambda layer: RELU)
