"""Parts of the certifiers compared with exact arithmetic, where only rounding or a worst case between two grid points matters.

Final radii hide such parts: what rounding takes of them is 10⁻¹⁵. Here every number is a fraction, so a bound that is short by one unit in the
last place is false.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import mpmath
import pytest
import torch
from curves import CURVES, DIGITS
from torch import Tensor, nn

from robustlip.certifiers import certify
from robustlip.certifiers.constants import constants_of
from robustlip.certifiers.sequence import sequence_radii
from robustlip.domains.expansion.local import Reference
from robustlip.domains.lines import crown_radii, ibp_radii, local_lipschitz_radii
from robustlip.domains.lines.crown import (
    Ball,
    Boxes,
    activation_range,
    first_box,
    interval_boxes,
    interval_margins,
    interval_step,
    linear_boxes,
    linear_margins,
)  # fmt: skip
from robustlip.domains.lines.dense import Network
from robustlip.domains.lines.radii import Problem
from robustlip.domains.lines.relaxations import Relu, Smooth, activation_of
from robustlip.domains.lines.secants import gains, lipschitz_margins
from robustlip.domains.lines.stages import DenseStage
from robustlip.domains.norms import Context, State, rule_for
from robustlip.domains.norms.bound import GlobalBound
from robustlip.domains.quadratic import constants as sdp_constants
from robustlip.domains.quadratic import constraints as sdp_quadratic
from robustlip.domains.quadratic import eclipse, lipsdp, sdp_radii
from robustlip.domains.quadratic import layers as sdp_network
from robustlip.domains.quadratic.lagrangian import Dual, Instances, Multipliers, Scales, form_of, proved_offset
from robustlip.domains.quadratic.multipliers import _simple_bounds
from robustlip.domains.quadratic.program import is_proved, program_of
from robustlip.domains.quadratic.propagation import row_gains
from robustlip.layers import Chain, Normalize, ScaledGELU, as_chain
from robustlip.models import LipschitzGPT
from robustlip.numerics.enclosures import Enclosure, SparseRows
from robustlip.threats import EmbeddingBall, InputBall

NORMS = ("l2", "linf", "l1")


def exact(t: Tensor) -> list[Fraction]:
    return [Fraction(v) for v in t.double().flatten().tolist()]


def wide(*shape: int, seed: int, spread: float = 6.0) -> Tensor:
    """Numbers of both signs over several orders of magnitude, whose sums round."""
    generator = torch.Generator().manual_seed(seed)
    size = 2 ** (spread * torch.randn(*shape, generator=generator, dtype=torch.float64))
    return size * torch.randn(*shape, generator=generator, dtype=torch.float64)


def stage(weight: Tensor, bias: Tensor, curve=None, linear: Tensor | None = None) -> DenseStage:
    """An affine map without rounding errors."""
    linear = torch.zeros(len(weight), dtype=torch.bool) if linear is None else linear
    return DenseStage(weight, bias, 0.0, 0.0, curve, linear, float(weight.norm()) * (1 + 1e-12), float(bias.norm()) * (1 + 1e-12))


def affine(s: DenseStage, h: list[Fraction]) -> list[Fraction]:
    bias = exact(s.bias)
    return [sum((Fraction(w) * v for w, v in zip(row, h, strict=True)), bias[i]) for i, row in enumerate(s.weight.tolist())]


def run(network: Network, x: Tensor) -> list[list[Fraction]]:
    """Pre-activations of every stage at x (n,), logits last, for relu."""
    h, out = exact(x), []
    for s in network.stages:
        out.append(affine(s, h))
        h = [v if keep else max(v, Fraction(0)) for v, keep in zip(out[-1], s.linear.tolist(), strict=True)]
    return out


def relu_network(widths: list[int], seed: int, spread: float = 1.0) -> Network:
    stages = []
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        some = torch.arange(m) % 5 == 4  # neurons that pass by the activation
        weight, bias = wide(m, n, seed=10 * seed + i, spread=spread), wide(m, seed=10 * seed + i + 500, spread=spread)
        stages.append(stage(weight, bias, None if last else CURVES["relu"], torch.ones(m, dtype=torch.bool) if last else some))
    return Network(tuple(stages))


def worst(row: list[float], low: list[float], high: list[float], bias: Fraction, sign: int) -> Fraction:
    """The extreme of row·h + bias over a box: sign 1 for the largest."""
    ends = ((Fraction(w) * (Fraction(b) if (w > 0) == (sign > 0) else Fraction(a))) for w, a, b in zip(row, low, high, strict=True))
    return sum(ends, bias)


# ---- intervals and lines


@pytest.mark.parametrize("kind", ["points", "boxes", "biases", "one bias"])
def test_interval_steps_hold_in_exact_arithmetic(kind) -> None:
    """Bounds of Wh + b over a box: of points only rounding is left, of small weights on large biases only that of the last sum."""
    for seed in range(40):
        s = stage(wide(8, 6, seed=seed), wide(8, seed=seed + 1000))
        if "bias" in kind:
            s = stage(wide(8, 6, seed=seed, spread=0.1) * 1e-6, wide(8, seed=seed + 1000, spread=0.1))
        middle, half = wide(1, 6, seed=seed + 2000, spread=2.0), wide(1, 6, seed=seed + 3000, spread=2.0).abs() * (kind == "boxes")
        low, high = middle - half, middle + half
        below, above = interval_step(s, low, high)
        for i, row in enumerate(s.weight.tolist()):
            bias = Fraction(float(s.bias[i]))
            assert Fraction(float(below[0, i])) <= worst(row, low[0].tolist(), high[0].tolist(), bias, -1)
            assert Fraction(float(above[0, i])) >= worst(row, low[0].tolist(), high[0].tolist(), bias, 1)


@pytest.mark.parametrize("norm", NORMS)
def test_first_boxes_hold_in_exact_arithmetic(norm) -> None:
    """Over an ℓ2, ℓ∞ or ℓ1 ball: the extreme is radius times the dual norm, attained, and rounding is of the point and of the norm."""
    for seed in range(60):
        s = stage(wide(6, 5, seed=seed), wide(6, seed=seed + 1000))
        for radius in (0.0, 0.7):
            x = wide(1, 5, seed=seed + 2000, spread=2.0)
            low, high = first_box(s, Ball(x, torch.tensor([radius], dtype=torch.float64), norm))
            centre = affine(s, exact(x))
            for i, row in enumerate(s.weight.tolist()):
                sizes = [abs(Fraction(w)) for w in row]
                room = min(Fraction(float(high[0, i])) - centre[i], centre[i] - Fraction(float(low[0, i])))
                assert room >= 0
                reached = {"linf": sum(sizes), "l1": max(sizes)}
                if norm == "l2":
                    assert room**2 >= Fraction(radius) ** 2 * sum(w * w for w in sizes)
                else:
                    assert room >= Fraction(radius) * reached[norm]


@pytest.mark.parametrize("norm", NORMS)
def test_dual_norms_and_reach_of_balls(norm) -> None:
    for seed in range(200):
        row = wide(1, 7, seed=seed)
        ball = Ball(torch.zeros(1, 7, dtype=torch.float64), torch.ones(1, dtype=torch.float64), norm)
        found, sizes = Fraction(float(ball.dual(row)[0])), [abs(v) for v in exact(row)]
        assert found**2 >= sum(v * v for v in sizes) if norm == "l2" else found >= (sum(sizes) if norm == "linf" else max(sizes))
        assert Fraction(float(ball.l2_radius[0])) ** 2 >= (7 if norm == "linf" else 1)


def test_neurons_that_pass_by_an_activation_keep_their_sign() -> None:
    s = stage(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), CURVES["relu"], torch.tensor([True, False]))
    low, high = activation_range(s, torch.tensor([[-2.0, -2.0]], dtype=torch.float64), torch.tensor([[-1.0, -1.0]], dtype=torch.float64))
    assert low.tolist() == [[-2.0, 0.0]] and high.tolist() == [[-1.0, 0.0]]


def gains_of(network: Network, ball: Ball) -> list[float]:
    return gains(network, ball.norm, Context(torch.float64, {}), nn.Identity())


BOUNDS = {
    "interval": lambda net, ball, y: interval_margins(net, ball, interval_boxes(net, ball), y),
    "crown": lambda net, ball, y: linear_margins(net, ball, linear_boxes(net, ball), y),
    "local": lambda net, ball, y: lipschitz_margins(net, ball, linear_boxes(net, ball), y, gains_of(net, ball))[0],
}


def margins_of(logits: list[Fraction], label: int) -> list[Fraction]:
    return [logits[label] - v for v in logits]


@pytest.mark.parametrize("method", BOUNDS)
def test_margins_at_a_point_hold_in_exact_arithmetic(method) -> None:
    """On a ball of radius 0 a bound is the margin itself less what rounding may take."""
    for seed in range(25):
        network = relu_network([5, 8, 7, 3], seed, spread=2.0)
        x = wide(4, 5, seed=seed + 7000, spread=1.0)
        y = torch.arange(4) % 3
        ball = Ball(x, torch.zeros(4, dtype=torch.float64), "l2")
        found = BOUNDS[method](network, ball, y)
        for i in range(4):
            truth = margins_of(run(network, x[i])[-1], int(y[i]))
            for j in range(3):
                if j != y[i]:
                    assert Fraction(float(found[i, j])) <= truth[j], (seed, i, j)


def test_margins_from_boxes_of_points_hold_in_exact_arithmetic() -> None:
    """Activations that are known to the last bit: what the joined rows of the head round is left."""
    for seed in range(40):
        network = relu_network([4, 8, 3], seed, spread=2.0)
        z = wide(3, 8, seed=seed + 9000, spread=1.0).abs()
        y = torch.arange(3)
        ball = Ball(torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), "l2")
        found = interval_margins(network, ball, Boxes((z,), (z,)), y)
        for i, j in product(range(3), range(3)):
            if i != j:
                assert Fraction(float(found[i, j])) <= margins_of(affine(network.stages[1], exact(z[i])), i)[j], (seed, i, j)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", BOUNDS)
def test_margins_on_balls_hold_at_their_extreme_points(method, norm) -> None:
    """Layers of very different gains, balls that neurons cross in: corners, and where the margin's gradient points, step by step."""
    torch.manual_seed(1)
    gain = {0: 0.2, 1: 6.0, 2: 1.5}
    for seed in range(12):
        network = relu_network([4, 7, 6, 3], seed, spread=0.3)
        stages = [replace(s, weight=gain[i] * s.weight, magnitude=gain[i] * s.magnitude, bias=0.2 * s.bias) for i, s in enumerate(network.stages)]
        network = Network(tuple(stages))
        x = torch.randn(3, 4, dtype=torch.float64)
        y = network.forward(x)[-1].argmax(-1)
        for radius in (0.05, 0.5, 2.0):
            ball = Ball(x, torch.full((3,), radius, dtype=torch.float64), norm)
            found = BOUNDS[method](network, ball, y)
            boxes = linear_boxes(network, ball)
            axes = torch.eye(4, dtype=torch.float64)[:, None].expand(4, 3, 4)
            delta = torch.cat([torch.randn(400, 3, 4, dtype=torch.float64), torch.randn(200, 3, 4, dtype=torch.float64).sign(), axes, -axes])
            for _ in range(12):
                order = {"l2": 2.0, "linf": math.inf, "l1": 1.0}[norm]
                delta = delta / torch.linalg.vector_norm(delta, ord=order, dim=-1, keepdim=True).clamp_min(1e-30) * radius
                point = (x + delta).requires_grad_()
                z = network.forward(point)
                margin = z[-1].gather(-1, y.expand(len(delta), 3)[..., None]) - z[-1]
                for low, high, layer in zip(boxes.low, boxes.high, z[:-1], strict=True):
                    assert bool(((layer >= low - 1e-9) & (layer <= high + 1e-9)).all())
                assert bool((margin >= found - 1e-9).all()), (seed, radius)
                (g,) = torch.autograd.grad(margin.amin(-1).where(torch.arange(len(delta))[:, None] % 2 == 0, margin.sum(-1)).sum(), point)
                step = {"l2": g, "linf": g.sign(), "l1": torch.zeros_like(g).scatter(-1, g.abs().argmax(-1, keepdim=True), 1.0) * g.sign()}[norm]
                size = torch.linalg.vector_norm(step, ord=order, dim=-1, keepdim=True).clamp_min(1e-30)
                delta = 0.5 * delta - 0.5 * radius * step / size


def test_forward_errors_and_sizes_hold_in_exact_arithmetic() -> None:
    for seed in range(25):
        network = relu_network([5, 8, 7, 3], seed, spread=2.0)
        x = wide(1, 5, seed=seed + 7000, spread=1.0)
        norm = x.norm(dim=-1) * (1 + 1e-12)
        truth = run(network, x[0])
        for z, t, error, size in zip(network.forward(x), truth, network.forward_errors(norm), network.norm_bounds(norm)[1:], strict=True):
            assert sum((a - b) ** 2 for a, b in zip(exact(z), t, strict=True)) <= Fraction(float(error[0])) ** 2
            assert sum(v * v for v in t) <= Fraction(float(size[0])) ** 2


def test_sizes_see_what_activations_add() -> None:
    """sigmoid(0) is ½: a vector of them is not small because its input is."""
    m = 400
    first = stage(torch.zeros(m, 2, dtype=torch.float64), torch.zeros(m, dtype=torch.float64), CURVES["sigmoid"])
    head = stage(torch.ones(1, m, dtype=torch.float64), torch.full((1,), 3.0, dtype=torch.float64), None, torch.ones(1, dtype=torch.bool))
    network = Network((first, head))
    x = torch.zeros(1, 2, dtype=torch.float64)
    assert float(network.norm_bounds(torch.zeros(1, dtype=torch.float64))[-1][0]) >= float(network.forward(x)[-1].abs()) == m / 2 + 3


# ---- curves between the points of their grids


def derivative(name: str, z: Tensor) -> Tensor:
    curve = CURVES[name]
    assert isinstance(curve, Smooth)
    return curve.derivative(z)


SMOOTH = [name for name, curve in CURVES.items() if isinstance(curve, Smooth)]


@pytest.mark.parametrize("name", SMOOTH)
def test_slopes_and_lines_hold_between_the_points_of_a_grid(name) -> None:
    """Cells of every width, laid so that extremes of the slope, and of the function less its chord, fall between two points of the grid."""
    curve = CURVES[name]
    generator = torch.Generator().manual_seed(0)
    count = 600
    width = 10 ** (4 * torch.rand(count, generator=generator, dtype=torch.float64) - 2)  # of a cell, up to 100
    place = 3 * torch.randn(count, generator=generator, dtype=torch.float64)
    low = place - 32 * width * torch.rand(count, generator=generator, dtype=torch.float64)
    high = low + 32 * width
    # Narrow intervals too, of a few cells around a place where the function bends most.
    z = low + (high - low) * torch.linspace(0, 1, 1601, dtype=torch.float64)[:, None]
    z = torch.cat([z, low + (high - low).clamp_max(8.0) * torch.linspace(0, 1, 401, dtype=torch.float64)[:, None],
                   place.clamp(low, high) + torch.linspace(-1, 1, 201, dtype=torch.float64)[:, None]]).clamp(low, high)  # fmt: skip
    least, most = curve.secant_slopes((low, low), low, high)
    found = derivative(name, z)
    assert bool((found.amax(0) <= most + 1e-12).all()) and bool((found.amin(0) >= least - 1e-12).all())
    s, t, upper, above = curve.lines(low, high)
    value = curve.value(z)
    scale = 1e-13 * (1 + value.abs().amax(0) + (s * z).abs().amax(0))
    assert bool((s * z + t <= value + scale).all()) and bool((upper * z + above >= value - scale).all())
    below, top = curve.value_range(low, high)
    assert bool((below <= value + scale).all()) and bool((top >= value - scale).all())


@pytest.mark.parametrize("name", [name for name in CURVES if name != "relu"])
def test_bands_of_points_hold_in_forty_digits(name) -> None:
    curve = CURVES[name]
    z = torch.cat([torch.linspace(-6, 6, 97, dtype=torch.float64), wide(60, seed=3, spread=2.0)])
    below, above = curve.value_range(z, z)
    with mpmath.workdps(40):
        for a, b, point in zip(below.tolist(), above.tolist(), z.tolist(), strict=True):
            assert mpmath.mpf(a) <= DIGITS[name](mpmath.mpf(point)) <= mpmath.mpf(b)


def test_chords_of_relu_hold_in_exact_arithmetic() -> None:
    relu = CURVES["relu"]
    assert isinstance(relu, Relu)
    low, high = -wide(3000, seed=1).abs(), wide(3000, seed=2).abs()
    s, t, upper, above = relu.lines(low, high)
    for a, b, *line in zip(*(exact(v) for v in (low, high, s, t, upper, above)), strict=True):
        lower, bottom, slope, top = line
        for z in (a, Fraction(0), b):
            assert lower * z + bottom <= max(z, Fraction(0)) <= slope * z + top


def test_secants_of_relu_from_centres_that_are_not_known_exactly() -> None:
    """Between any point of the interval and any point that the clean value may be."""
    relu = CURVES["relu"]
    generator = torch.Generator().manual_seed(0)
    low, first, last, high = torch.randn(4, 2000, generator=generator, dtype=torch.float64).sort(0).values
    least, most = relu.secant_slopes((first, last), low, high)
    for centre in (first, (first + last) / 2, last, torch.zeros_like(first).clamp(first, last)):
        for z in (low, high, torch.zeros_like(low).clamp(low, high), (low + high) / 2):
            there = (z - centre).abs() > 1e-6
            secant = ((z.clamp_min(0) - centre.clamp_min(0)) / (z - centre))[there]
            assert bool((secant <= most[there] + 1e-9).all()) and bool((secant >= least[there] - 1e-9).all())


def test_slopes_of_a_divided_curve_are_divided() -> None:
    for divisor in (0.5, 3.0):
        curve = activation_of(ScaledGELU(divisor))
        assert isinstance(curve, Smooth)
        z = torch.linspace(-3, 3, 601, dtype=torch.float64).requires_grad_()
        (slope,) = torch.autograd.grad(ScaledGELU(divisor)(z).sum(), z)
        for low, high in ((-3.0, 3.0), (0.5, 1.7), (-40.0, 3.0)):
            ends = torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64)
            a, b = curve.secant_slopes(ends, *ends)
            inside = slope[(z >= low) & (z <= high)]
            assert float(a) <= float(inside.min()) and float(b) >= float(inside.max())


# ---- the quadratic dual


def instances(seed: int, radius: float, norm: str = "l2") -> tuple[Network, Ball, Tensor, Instances]:
    network = relu_network([3, 6, 5, 3], seed, spread=0.5)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = network.forward(x)[-1].argmax(-1)
    ball = Ball(x, torch.full((4,), radius, dtype=torch.float64), norm)
    form = form_of(network, ball, linear_boxes(network, ball), y)
    return network, ball, y, Instances.of(form, torch.arange(4), (y + 1) % 3, ball)


def multipliers(it: Instances, size: float, seed: int, heavy: float = 0.0) -> Dual:
    """Some multipliers; heavy: added to log λ."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return size * torch.randn(*shape, generator=generator, dtype=torch.float64)

    b = len(it.constant)
    inner = [draw(b, 5, layer.valid.shape[1]) for layer in it.layers[:-1]]
    for q in inner:
        q[:, 4] = 0.0
        q[:, 2] = -q[:, 2].abs()
        q[:, 3] = -q[:, 3].abs() - 1.0
    m = Multipliers(draw(b, 2, it.layers[-1].valid.shape[1]), inner, draw(b, 1) + heavy, torch.zeros_like(it.gradient))
    ones = [torch.ones_like(layer.valid) for layer in it.layers]
    return Dual(it, m, Scales(ones[-1], ones[:-1], torch.ones_like(it.gradient[:, :1])))


def test_offsets_hold_at_the_clean_point_in_exact_arithmetic() -> None:
    """With λ so large that only δ = 0 counts, and no neuron that can cross 0, the offset is the clean margin less what rounding may take."""
    seen = 0
    for seed in range(60):
        network, ball, y, it = instances(seed, 1e-30)
        offset = proved_offset(multipliers(it, 0.0, seed, heavy=92.0))
        for i in range(4):
            label = int(y[i])
            truth = margins_of(run(network, ball.x[i])[-1], label)[(label + 1) % 3]
            if float(offset[i]) > -math.inf:
                seen += 1
                assert Fraction(float(offset[i])) <= truth, (seed, i)
                assert float(offset[i]) >= float(truth) - 1e-9
    assert seen > 150


@pytest.mark.parametrize("spoil", ["nothing", "the factor", "the solution", "both"])
@pytest.mark.parametrize("radius", [0.3, 1.0])
def test_offsets_hold_whatever_the_factorisation_answers(spoil, radius, monkeypatch) -> None:
    """The quadratic part is at least the claimed minimum at every v of the domain, also for inaccurate factors and solutions."""
    factorise, solve = torch.linalg.cholesky_ex, torch.linalg.solve_triangular
    if spoil in ("the factor", "both"):
        monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: (1.05 * factorise(m)[0], factorise(m)[1]))
    if spoil in ("the solution", "both"):
        monkeypatch.setattr(torch.linalg, "solve_triangular", lambda *a, **k: 0.3 * solve(*a, **k))
    generator = torch.Generator().manual_seed(0)
    held = 0
    for seed in range(25):
        _, _, _, it = instances(seed, radius)
        dual = multipliers(it, 0.5, seed, heavy=1.0)
        offset = proved_offset(dual)
        d = it.fixed.shape[-1]
        v = torch.randn(4, d, 3000, generator=generator, dtype=torch.float64)
        matrix, linear, _ = dual.form()
        good = factorise(matrix)[1] == 0
        lowest = torch.zeros(4, d, 1, dtype=torch.float64)
        lowest[good] = -torch.linalg.solve(matrix[good], linear[good][..., None])
        v = torch.cat([v, lowest, -v[..., :1] * 0], -1)
        v = v * (it.norm_bound[:, None] / v.norm(dim=1)).clamp_max(1.0).nan_to_num(0.0)[:, None]
        least = dual.at(v).amin(-1) + dual.minima()
        assert bool((offset <= least + 1e-9 * (1 + least.abs()))[good].all()), seed
        held += int((offset > -math.inf).sum())
    assert held > 20


def test_the_domain_of_the_form_holds_every_point_of_the_ball() -> None:
    """‖v‖ for v = (δ, activations of the neurons that can cross 0) is at most `reach`, and each activation is at most its box."""
    for seed, norm in product(range(10), NORMS):
        network = relu_network([3, 6, 5, 3], seed, spread=0.5)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ball = Ball(x, torch.full((4,), 1.0, dtype=torch.float64), norm)
        form = form_of(network, ball, linear_boxes(network, ball), torch.zeros(4, dtype=torch.long))
        order = {"l2": 2.0, "linf": math.inf, "l1": 1.0}[norm]
        delta = torch.randn(500, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        delta = delta / torch.linalg.vector_norm(delta, ord=order, dim=-1, keepdim=True)
        if norm == "linf":
            delta = delta.sign()
        h = network.forward(x + delta)[0].clamp_min(0.0)
        layer = form.layers[0]
        inner = h.gather(-1, layer.index.expand(500, -1, -1)) * layer.valid
        size = torch.cat([delta, inner], -1).norm(dim=-1)
        assert bool((size <= form.norm_bound).all()) and float((size / form.norm_bound).max()) > 0.3


@pytest.mark.parametrize("norm", NORMS)
def test_plain_bounds_of_the_dual_hold_on_the_ball(norm) -> None:
    """offset − cost·ε is below every margin at distance ε: offset is the clean margin, cost a Lipschitz constant."""
    torch.manual_seed(0)
    model = as_chain(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double().requires_grad_(False))
    with torch.no_grad():
        model[0].weight.mul_(9.0)
        model[0].bias.fill_(30.0)  # all active: the network is linear, and its constant is nearly attained
        model[2].weight.copy_(torch.randn(3, 1, dtype=torch.float64) * torch.linalg.svd(model[0].weight)[0][:, 0])
    x = torch.randn(5, 4, dtype=torch.float64)
    logits = model(x)
    y = logits.argmax(-1)
    problem = Problem(model, x, y, logits, InputBall(norm), Context(torch.float64, constants_of(model)[1]))
    ball = Ball(x, torch.full((5,), 0.2, dtype=torch.float64), norm)
    boxes = linear_boxes(problem.network, ball, problem.context)
    plain = _simple_bounds(problem, ball, boxes, y)
    v = torch.linalg.svd(model[0].weight)[2][0]
    steps = torch.stack([v, -v]) if norm == "l2" else torch.cat([torch.eye(4, dtype=torch.float64), -torch.eye(4, dtype=torch.float64)])
    if norm == "linf":
        steps = torch.tensor(list(product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    moved = model(x + 0.2 * steps[:, None] * (1 - 1e-12))
    margin = (moved.gather(-1, y.expand(len(steps), 5)[..., None]) - moved).scatter(-1, y.expand(len(steps), 5)[..., None], math.inf)
    low = plain.offset - 0.2 * plain.cost
    assert bool((margin >= low).all())
    if norm == "l2":
        assert float((margin.amin(0) - low).where(margin.amin(0).isfinite(), torch.zeros(())).max()) < 1.0  # nearly attained


def test_nothing_that_rounding_may_take_is_certified_by_the_dual(monkeypatch) -> None:
    """What underflow may take is taken off every bound: of the multipliers, of the constants, and of lines."""
    torch.manual_seed(3)
    model = as_chain(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).double().requires_grad_(False))
    x = torch.randn(16, 6, dtype=torch.float64)
    logits = model(x)
    y = logits.argmax(-1)
    margin = (logits.gather(1, y[:, None]) - logits).double().scatter(1, y[:, None], math.inf).amin(1)
    middle = float(margin.median())
    for name in ("lines.radii", "quadratic.multipliers"):
        lost = lambda network, ball, boxes: torch.full((len(ball.x),), middle, dtype=torch.float64)  # noqa: E731
        monkeypatch.setattr(f"robustlip.domains.{name}.vanished", lost)
    for method in (ibp_radii, crown_radii, local_lipschitz_radii, sdp_radii):
        radius, _ = method(model, x, y, logits, InputBall("l2"), Context(torch.float64, constants_of(model)[1]))
        assert bool((radius[margin < middle * (1 - 1e-9)] == 0).all()) and bool((radius[margin > 1.2 * middle] > 0).all())
        # At the radius itself, towards the rival, that much of the margin is left.
        points = x.clone().requires_grad_()
        out = model(points)
        close = (out.gather(1, y[:, None]) - out).scatter(1, y[:, None], math.inf)
        (g,) = torch.autograd.grad(close.amin(1).sum(), points)
        step = radius[:, None] * g / g.norm(dim=-1, keepdim=True)
        after = model(points - step)
        left = (after.gather(1, y[:, None]) - after).scatter(1, y[:, None], math.inf).amin(1)
        assert bool((left >= middle - 1e-6)[radius > 0].all())


# ---- semidefinite programs


def test_gains_of_rows_hold_in_exact_arithmetic() -> None:
    """√(cᵀXc) for X = I and others, rounded up."""
    for seed in range(60):
        rows = wide(4, 6, seed=seed)
        root = wide(6, 6, seed=seed + 100, spread=1.0)
        for x in (None, root @ root.mT):
            found = row_gains(Enclosure(rows), None if x is None else (x + x.mT) / 2)
            table = [[Fraction(int(i == j)) for j in range(6)] for i in range(6)] if x is None else [exact(line) for line in (x + x.mT) / 2]
            for gain, row in zip(found.tolist(), rows, strict=True):
                c = exact(row)
                square = sum(c[i] * table[i][j] * c[j] for i in range(6) for j in range(6))
                assert Fraction(gain) ** 2 >= square


def test_gains_of_rows_that_cancel_hold_in_exact_arithmetic() -> None:
    """Rows nearly orthogonal to the only direction of X: cᵀXc consists of rounding error, which has to be counted."""
    for seed in range(80):
        v, c = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = torch.outer(v, v)
        c = c - v * (c @ v) / (v @ v)
        gain = float(row_gains(Enclosure(c[None]), x)[0])
        square = sum(a * b * e for (a, b), e in zip(product(exact(c), repeat=2), exact(x), strict=True))
        assert Fraction(gain) ** 2 >= square


def test_rows_of_pairs_enclose_differences_of_both_rows() -> None:
    head = Enclosure(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([[0.1] * 3, [0.2] * 3], dtype=torch.float64))
    rows, first, second = sdp_network.pair_rows(head)
    assert (first.tolist(), second.tolist()) == ([0], [1])
    assert bool((rows.radius() >= 0.1 + 0.2).all())


def test_errors_of_coefficients_count_at_the_size_of_what_they_meet() -> None:
    """A coefficient that is known to 0.1, on numbers that are known to 0.5: all products of the two are enclosed."""
    rows = SparseRows(torch.tensor([[1, 0]]), torch.tensor([[2.0, -1.0]], dtype=torch.float64), torch.tensor([[0.1, 0.3]], dtype=torch.float64), 2)
    ball = Enclosure(torch.tensor([[4.0], [-3.0]], dtype=torch.float64), torch.tensor([[0.5], [0.25]], dtype=torch.float64))
    found, dense = rows.apply(ball), rows.dense()
    for c, e, signs in product((0, 1), (0, 1), product((-1, 1), repeat=2)):
        coefficient = torch.tensor([2.0 + (0.1 if c else -0.1), -1.0 + (0.3 if e else -0.3)], dtype=torch.float64)
        numbers = ball.mid[:, 0] + torch.tensor(signs) * ball.radius()[:, 0]
        assert abs(float(coefficient[0] * numbers[1] + coefficient[1] * numbers[0] - found.mid)) <= float(found.radius()) * (1 + 1e-12)
    assert dense.radius().tolist() == [[0.3, 0.1]]


def test_radii_of_programs_are_not_forgotten() -> None:
    """Weights known up to an error: the matrix of the program encloses that of each of them, and the result holds for the largest."""
    middle, wrong = torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)
    relu = sdp_quadratic.elementwise(0.5, 0.5, 1)
    network = sdp_network.ConstraintNetwork(((Enclosure(middle, wrong), relu),), Enclosure(torch.ones(1, 1, dtype=torch.float64)))
    program = program_of(network, network.head)
    flat = torch.tensor([3.0], dtype=torch.float64)
    enclosed = program.enclosed(flat)
    for share in (-1.0, -0.3, 0.0, 0.6, 1.0):
        one = sdp_network.ConstraintNetwork(((Enclosure(middle + share * wrong), relu),), network.head)
        inside = program_of(one, one.head).matrix(0.0, flat)
        assert bool(((inside - enclosed.mid).abs() <= enclosed.radius() * (1 + 1e-12)).all())
    for rho in (1.0, 1.2, 2.0):  # 1.5² is the least
        assert not is_proved(program, rho, torch.tensor([2.0], dtype=torch.float64))


def test_what_is_not_proved_gives_no_constant(monkeypatch) -> None:
    """A step of ECLipsE that fails leaves the product of norms, and not the head alone."""
    torch.manual_seed(0)
    model = as_chain(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double().requires_grad_(False))
    with torch.no_grad():
        model[0].weight.mul_(20.0)
    network = sdp_network.network_of(model)
    product_of_norms = sdp_constants.product_of_norms(network)
    monkeypatch.setattr(eclipse, "through_activation", lambda *a: None)
    found = eclipse.eclipse_constants(network)
    assert torch.equal(found.pairs, product_of_norms.pairs) and found.whole == product_of_norms.whole
    assert bool(torch.isinf(sdp_constants.constants_at(network, torch.eye(6, dtype=torch.float64), False).pairs[0, 1]))


@pytest.mark.parametrize("part", ["hidden", "head"])
@pytest.mark.parametrize("method", [eclipse.eclipse_radii, lipsdp.lipsdp_radii], ids=["eclipse", "lipsdp"])
def test_the_clean_pass_rounds_and_the_perturbed_one_too(method, part, monkeypatch) -> None:
    """Each of two passes may be off by the rounding of the hidden state times ‖u_y − u_j‖, and by that of two logits."""
    torch.manual_seed(0)
    model = as_chain(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double().requires_grad_(False))
    x = torch.randn(30, 4, dtype=torch.float64)
    logits = model(x)
    y = logits.argmax(-1)
    margin = (logits[:, 0] - logits[:, 1]).abs()
    lost = float(margin.median())
    apart = float((model[2].weight[0] - model[2].weight[1]).norm())
    honest = GlobalBound.at

    def spoiled(self, radius):
        state, change, single = honest(self, radius)
        hidden, head = (lost / (2 * apart), 0.0) if part == "hidden" else (0.0, lost / 4)
        return replace(state, rounding=torch.full_like(state.rounding, hidden)), change, torch.full_like(single, head)

    monkeypatch.setattr(GlobalBound, "at", spoiled)
    radius, _ = method(model, x, y, logits, InputBall("l2"), Context(torch.float64, constants_of(model)[1]))
    assert bool((radius[margin < lost * (1 - 1e-9)] == 0).all()) and bool((radius[margin > 1.1 * lost] > 0).all())


def test_a_pair_of_logits_moves_by_root_two_of_all() -> None:
    """Logits that move against each other: the pair's constant is √2 times that of all, and no smaller."""
    head = Enclosure(torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    network = sdp_network.ConstraintNetwork((), head)
    found = sdp_constants.constants_at(network, None, True)
    delta = torch.tensor([1.0, -1.0], dtype=torch.float64) / math.sqrt(2)
    assert float(found.pairs[0, 1]) >= float(delta[0] - delta[1]) and found.whole >= 1.0


def test_a_network_in_front_of_which_numbers_are_divided() -> None:
    """Normalize per channel: the smallest std determines the bound of the next stage."""
    linear = nn.Linear(2, 3).double().requires_grad_(False)
    model = as_chain(nn.Sequential(Normalize([0.0, 0.0], [0.1, 2.0]).double(), linear, nn.ReLU(), nn.Linear(3, 2).double()))
    first = sdp_network.network_of(model).stages[0][0]
    truth = torch.linalg.matrix_norm(linear.weight / torch.tensor([0.1, 2.0], dtype=torch.float64), 2)
    assert float(torch.linalg.matrix_norm(first.mid, 2)) >= float(truth) * (1 - 1e-12)


# ---- sequences


def sequence_model() -> tuple[Chain, Tensor]:
    torch.manual_seed(1)
    model = LipschitzGPT("abcdefg", 16, 2, 2, distance_bias=3).eval().requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    ids = torch.randint(7, (12,))
    for i in range(11):
        ids[i + 1] = model(ids[None, : i + 1])[0, -1].argmax()
    return model, ids


@pytest.mark.parametrize("threat", [EmbeddingBall(), EmbeddingBall(tokens=(-1,))], ids=["all tokens", "last token"])
def test_two_logits_round_and_every_rival_counts(threat, monkeypatch) -> None:
    """A logit that executing the head may change by s: margins up to 2s prove nothing, of whichever rival."""
    model, ids = sequence_model()
    logits = model.double()(ids[None, :-1])[0]
    margin = (logits.gather(1, ids[1:, None]) - logits).scatter(1, ids[1:, None], math.inf)
    nearest = margin.amin(-1)
    s = 0.5 * float(nearest.median())  # 2s is the median
    monkeypatch.setattr(Reference, "logit_error", lambda self, hidden, epsilon: torch.full_like(hidden, s))
    radius, _ = sequence_radii(model, ids, threat)
    assert bool((radius[nearest < 2 * s * (1 - 1e-9)] == 0).all())
    assert bool((radius[nearest > 2.5 * s] > 0).any())
    # The margin that is left decides: the same sequence with nothing lost proves more.
    monkeypatch.setattr(Reference, "logit_error", lambda self, hidden, epsilon: torch.zeros_like(hidden))
    assert bool((sequence_radii(model, ids, threat)[0] >= radius).all())


@pytest.mark.parametrize("method", ["local", "dual"])
def test_two_logits_round_in_methods_of_expansions(method, monkeypatch) -> None:
    """As above, of single inputs: margins up to twice what one logit may be off by prove nothing."""
    torch.manual_seed(3)
    model = as_chain(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double().requires_grad_(False))
    x = torch.randn(20, 6, dtype=torch.float64)
    logits = model(x)
    y = logits.argmax(-1)
    margin = (logits.gather(1, y[:, None]) - logits).scatter(1, y[:, None], math.inf).amin(1)
    s = 0.5 * float(margin.median())
    monkeypatch.setattr(Reference, "logit_error", lambda self, hidden, epsilon: torch.full_like(hidden, s))
    radius = torch.as_tensor(certify(model, x, y, InputBall("l2"), method).radius)
    assert bool((radius[margin < 2 * s * (1 - 1e-9)] == 0).all()) and bool((radius[margin > 2.5 * s] > 0).any())


# ---- convolution


@pytest.mark.parametrize("mode", ["zeros", "circular", "replicate", "reflect"])
@pytest.mark.parametrize("stride", [1, 2])
def test_rounding_that_arrives_at_a_convolution_is_passed_on(mode, stride) -> None:
    """A rounding error before a convolution is treated like a change: after it, the bound is at least the convolution of the worst one."""
    torch.manual_seed(2)
    layer = nn.Conv2d(2, 3, 3, padding=1, stride=stride, padding_mode=mode).double().requires_grad_(False)
    n = 2 * 5 * 4
    basis = torch.eye(n, dtype=torch.float64).view(n, 2, 5, 4)
    matrix = (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).mT
    one = torch.ones(1, dtype=torch.float64)
    context = Context(torch.float64, {})
    quiet = rule_for(layer).step(layer, State(one, one, 0 * one, "l2", 1, n, (2, 5, 4)), context)
    loud = rule_for(layer).step(layer, State(one, one, one, "l2", 1, n, (2, 5, 4)), context)
    assert float(loud.rounding - quiet.rounding) >= float(torch.linalg.matrix_norm(matrix, 2)) * (1 - 1e-9)
    assert float(quiet.change) >= float(torch.linalg.matrix_norm(matrix, 2)) * (1 - 1e-9)


def test_rounding_of_a_perturbed_convolution_is_that_of_the_perturbed_weights() -> None:
    """A kernel of zeros whose perturbation is all there is: its products round too."""
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False).requires_grad_(False)
    with torch.no_grad():
        layer.weight.zero_()
    one = torch.ones(1, dtype=torch.float64)
    radius = torch.full((1,), 50.0, dtype=torch.float64)
    context = Context(torch.float16, {}, weight_radius=radius, relative=False)
    behind = rule_for(layer).step(layer, State(one, 0 * one, 0 * one, "l2", 1, 16, (1, 4, 4)), context)
    generator = torch.Generator().manual_seed(0)
    worst_error = 0.0
    for _ in range(200):
        kernel = torch.randn(1, 1, 3, 3, generator=generator)
        kernel = (kernel / kernel.norm() * 49.9).half()
        x = torch.randn(1, 1, 4, 4, generator=generator)
        x = (x / x.norm() * 0.99).half()
        got = nn.functional.conv2d(x, kernel, padding=1).double()
        truth = nn.functional.conv2d(x.double(), kernel.double(), padding=1)
        worst_error = max(worst_error, float((got - truth).norm()))
    assert 0 < worst_error <= float(behind.rounding)


def test_a_bias_of_a_convolution_is_added_at_every_position() -> None:
    layer = nn.Conv2d(1, 2, 3, padding=1).double().requires_grad_(False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([3.0, 4.0]))
    one = torch.ones(1, dtype=torch.float64)
    behind = rule_for(layer).step(layer, State(one, one, 0 * one, "l2", 1, 20, (1, 5, 4)), Context(torch.float64, {}))
    assert float(behind.norm) >= 5 * math.sqrt(20) * (1 - 1e-12)


def test_partial_sums_of_a_convolution_may_overflow() -> None:
    """Two products beyond float16's largest number that cancel: the sum is none, although the result would be small."""
    layer = nn.Conv2d(2, 1, 1, bias=False).half().requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([300.0, -300.0]).view(1, 2, 1, 1))
    x = torch.full((1, 2, 1, 1), 300.0).half()
    norm = x.double().flatten(1).norm(dim=1)
    small = torch.full_like(norm, 300.0 * 2**0.5)
    behind = rule_for(layer).step(layer, State(small, 0 * small, 0 * small, "l2", 1, 2, (2, 1, 1)), Context(torch.float16, {}))
    assert float(norm) <= float(small) * (1 + 1e-12) and float(behind.rounding) == math.inf
