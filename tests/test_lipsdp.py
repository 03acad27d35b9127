"""LipSDP and ECLipsE against brute force over all slopes and permutations, attacks on constants by points and by weights, and false constraints."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections import OrderedDict
from dataclasses import replace
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from robustlip.attacks import by_name
from robustlip.certifiers import METHODS, certify
from robustlip.domains.norms import Context
from robustlip.domains.quadratic import (
    Constants,
    eclipse_constants,
    eclipse_radii,
    eclipse_why_not,
    lipsdp_constants,
    lipsdp_radii,
    lipsdp_why_not,
    network_of,
    product_of_norms,
)
from robustlip.domains.quadratic.constraints import QuadraticConstraint, constraint_of, elementwise
from robustlip.domains.quadratic.eclipse import fast_multipliers
from robustlip.domains.quadratic.layers import ConstraintNetwork, pair_rows
from robustlip.domains.quadratic.newton import minimise
from robustlip.domains.quadratic.program import Program, is_proved, least_proved, program_of
from robustlip.domains.quadratic.propagation import row_gains, through_activation, through_linear
from robustlip.errors import BadInput
from robustlip.layers import Chain, GroupSort, Householder, MaxMin, NextTokenChain, Normalize, ScaledGELU
from robustlip.models import LipschitzGPT, LipschitzMLP
from robustlip.numerics.enclosures import Enclosure, SparseRows, dominating, product, proved_positive, sandwich
from robustlip.threats import EmbeddingBall, InputBall, parse_threat


def householder(width: int) -> Householder:
    layer = Householder(width)
    with torch.no_grad():
        layer.angle.uniform_(-6, 6)
    return layer


ACTIVATIONS = {
    "relu": lambda width: nn.ReLU(), "tanh": lambda width: nn.Tanh(), "sigmoid": lambda width: nn.Sigmoid(), "gelu": lambda width: nn.GELU(),
    "gelu-tanh": lambda width: nn.GELU("tanh"), "scaled-gelu": lambda width: ScaledGELU(2.0), "silu": lambda width: nn.SiLU(),
    "leaky": lambda width: nn.LeakyReLU(-0.5), "leaky-steep": lambda width: nn.LeakyReLU(2.0), "identity": lambda width: nn.LeakyReLU(1.0),
    "hardswish": lambda width: nn.Hardswish(), "selu": lambda width: nn.SELU(),
    "maxmin": lambda width: MaxMin(), "groupsort2": lambda width: GroupSort(2), "groupsort3": lambda width: GroupSort(3),
    "groupsort6": lambda width: GroupSort(6), "householder": householder,
}  # fmt: skip
SORTING = ("maxmin", "groupsort2", "groupsort3", "groupsort6", "householder")


def mlp(widths: list[int], kind: str, seed: int = 0, gain: float = 1.5) -> Chain:
    torch.manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        if i:
            layers[f"act{i}"] = ACTIVATIONS[kind](fan_in)
        layers[f"linear{i}"] = nn.Linear(fan_in, fan_out)
    model = Chain(layers).double().eval()
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(gain)
    return model


def upper_pairs(table: torch.Tensor) -> torch.Tensor:
    return table[tuple(torch.triu_indices(len(table), len(table), 1))]


# ---- floating point: what is called proved is true


@pytest.mark.parametrize("shape", [(3, 5, 4), (1, 40, 1), (7, 1, 2)])
def test_products_of_balls_enclose_exact_products(shape) -> None:
    m, k, n = shape
    scale = 10.0 ** torch.randint(-8, 8, (m, k)).double()
    a, b = Enclosure(torch.randn(m, k).double() * scale, torch.rand(m, k).double() * 1e-10), Enclosure(torch.randn(k, n).double())
    result = product(a, b)
    turned = product(b.mT, a.mT)  # the radius may stand on either side
    assert bool(((turned.mid.mT - result.mid).abs() <= result.rad).all())
    torch.testing.assert_close(turned.rad.mT, result.rad, rtol=1e-9, atol=0.0)
    for signs in (-1, 0, 1):
        both = zip(a.mid.tolist(), a.rad.tolist(), strict=True)
        exact_a = [[Fraction(v) + signs * Fraction(r) for v, r in zip(*rows, strict=True)] for rows in both]
        exact_b = [[Fraction(v) for v in row] for row in b.mid.tolist()]
        for i in range(m):
            for j in range(n):
                true = sum((exact_a[i][t] * exact_b[t][j] for t in range(k)), Fraction(0))
                assert abs(true - Fraction(float(result.mid[i, j]))) <= Fraction(float(result.rad[i, j]))
    assert bool((result.rad <= 1e-9 * (a.mid.abs() @ b.mid.abs() + 1) + a.rad @ b.mid.abs() * 1.01).all())


def test_rows_are_the_matrices_they_stand_for() -> None:
    for kind in ACTIVATIONS:
        constraint = constraint_of(ACTIVATIONS[kind](12), 12)
        x = Enclosure(torch.randn(12, 5).double())
        for rows in (constraint.keep, constraint.read):
            dense = rows.dense()
            assert bool(((rows.apply(x).mid - dense.mid @ x.mid).abs() <= rows.apply(x).rad + 1e-14).all())
        square = Enclosure(torch.randn(12, 12).double())
        both = constraint.read.dense().mid @ square.mid @ constraint.keep.dense().mid.mT
        torch.testing.assert_close(sandwich(constraint.read, square, constraint.keep).mid, both, rtol=1e-12, atol=1e-13)


def test_dominating_matrices_dominate() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        mid, rad = torch.randn(6, 6).double(), torch.rand(6, 6).double() * 0.3
        mid = mid + mid.mT
        top = dominating(Enclosure(mid, rad))
        assert bool((top == top.mT).all())
        for _ in range(20):
            shift = (torch.rand(6, 6).double() * 2 - 1) * rad
            shift = torch.minimum(shift.abs(), shift.mT.abs()) * torch.sign(torch.randn(6, 6).double())
            member = mid + torch.tril(shift) + torch.tril(shift, -1).mT
            assert torch.linalg.eigvalsh(top - member)[0] >= 0


@pytest.mark.parametrize("size", [1, 3, 40, 200])
def test_positive_means_positive(size) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        q, _ = torch.linalg.qr(torch.randn(size, size).double())
        stretch = torch.diag(10.0 ** torch.randint(-6, 6, (size,)).double())
        for smallest, expected in ((1e-6, True), (-1e-6, False), (-1e-9, False), (-1.0, False)):
            values = torch.linspace(1, 2, size, dtype=torch.float64)
            values[0] = smallest
            plain = (q * values) @ q.mT
            assert proved_positive(Enclosure((plain + plain.mT) / 2)) is expected
            matrix = stretch @ plain @ stretch  # scaling rows and columns changes no sign
            assert proved_positive(Enclosure((matrix + matrix.mT) / 2)) in ((expected,) if not expected else (True, False))
    assert not proved_positive(Enclosure(torch.full((2, 2), torch.nan, dtype=torch.float64)))
    assert not proved_positive(Enclosure(torch.eye(3, dtype=torch.float64), torch.full((3, 3), 0.5, dtype=torch.float64)))
    assert not proved_positive(Enclosure(torch.zeros(2, 2, dtype=torch.float64)))


def test_radii_of_balls_are_not_forgotten() -> None:
    """[[1, 1 − 1e-7], …] is positive; with entries uncertain by 1e-6, or by just enough, it need not be."""
    for size in (2, 30):
        q, _ = torch.linalg.qr(torch.randn(size, size).double())
        values = torch.ones(size, dtype=torch.float64)
        values[0] = 1e-5
        matrix = (q * values) @ q.mT
        matrix = (matrix + matrix.mT) / 2
        corner = torch.outer(q[:, 0], q[:, 0])
        assert proved_positive(Enclosure(matrix))
        assert not proved_positive(Enclosure(matrix, 1.01e-5 * corner.abs()))  # the member matrix − 1.01e-5·corner is not positive
    mid = torch.tensor([[1.0, 1 - 1e-7], [1 - 1e-7, 1.0]], dtype=torch.float64)
    assert proved_positive(Enclosure(mid))
    assert not proved_positive(Enclosure(mid, torch.full((2, 2), 1e-6, dtype=torch.float64)))


# ---- the constraints of activations, attacked by pairs of points


def broken_by(constraint: QuadraticConstraint, layer: nn.Module, width: int, steps: int = 100, pairs: int = 64) -> float:
    """The largest relative excess of (QC) that gradient ascent over pairs of points finds: ‖w_g‖² − ‖(Ev)_g‖², and what Dv + Rw misses of δ."""
    keep, read, write = (rows.dense().mid for rows in (constraint.keep, constraint.read, constraint.write))
    inverse = torch.linalg.pinv(write)
    groups = torch.nn.functional.one_hot(constraint.group).double()
    torch.manual_seed(1)
    x = (torch.randn(pairs, width).double() * 2).requires_grad_()
    step = (torch.randn(pairs, width).double() * torch.logspace(-2, 0.5, pairs, dtype=torch.float64)[:, None]).requires_grad_()
    optimizer = torch.optim.Adam([x, step], lr=0.05)
    worst = -math.inf
    for _ in range(steps):
        size = step.norm(dim=-1, keepdim=True)
        v, delta = step / size, (layer(x + step) - layer(x)) / size
        w = (delta - v @ keep.mT) @ inverse.mT
        missed = (delta - v @ keep.mT - w @ write.mT).norm(dim=-1)
        excess = ((w.square() - (v @ read.mT).square()) @ groups).amax(-1)
        score = torch.maximum(excess, missed)
        worst = max(worst, float(score.detach().max()))
        optimizer.zero_grad()
        (-score.sum()).backward()
        optimizer.step()
    return worst


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_constraints_hold_for_optimised_pairs_of_points(kind) -> None:
    layer = ACTIVATIONS[kind](12).double()
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert broken_by(constraint_of(layer, 12), layer, 12) <= 1e-9


def rotated(constraint: QuadraticConstraint) -> QuadraticConstraint:
    """Multipliers that couple two neurons, as those of LipSDP-ConstraintNetwork do: |w| ≤ |z| claimed of (z₁ ± z₂)/√2 instead of z₁ and z₂. False."""
    width = constraint.keep.width
    index = torch.arange(width).view(-1, 2).repeat_interleave(2, 0)
    turn = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64).repeat(width // 2, 1) / 2**0.5
    reach = constraint.write.coefficient[:, :1]
    error = torch.zeros_like(turn)
    return replace(constraint, read=SparseRows(index, turn, error, width), write=SparseRows(index, turn * reach, error, width))


FALSE = {
    "relu's for maxmin": (elementwise(0.5, 0.5, 12), MaxMin()),
    "relu's for gelu": (elementwise(0.5, 0.5, 12), nn.GELU()),
    "coupled neurons": (rotated(elementwise(0.5, 0.5, 12)), nn.ReLU()),
    "maxmin's for groupsort": (constraint_of(MaxMin(), 12), GroupSort(2)),
    "half of the slope": (elementwise(0.25, 0.25, 12), nn.Tanh()),
    "another angle": (constraint_of(householder(12), 12), MaxMin()),
}


@pytest.mark.parametrize("name", FALSE)
def test_false_constraints_are_found_out(name) -> None:
    constraint, layer = FALSE[name]
    assert broken_by(constraint, layer, 12) > 0.01


# ---- constants against every slope and every permutation


def jacobians(layer: nn.Module, width: int) -> list[torch.Tensor]:
    """All extreme Jacobians of an activation: the constraint allows each, so LipSDP's constant is at least the gain of every choice."""
    if isinstance(layer, (MaxMin, Householder)):
        half = width // 2
        angle = layer.angle.detach().double() if isinstance(layer, Householder) else torch.full((half,), torch.pi / 2, dtype=torch.float64)
        out = []
        for choice in itertools.product((0, 1), repeat=half):
            j = torch.eye(width, dtype=torch.float64)
            for i, reflected in enumerate(choice):
                u = torch.tensor([math.sin(angle[i] / 2), -math.cos(angle[i] / 2)], dtype=torch.float64)
                place = torch.tensor([i, i + half])
                j[place[:, None], place] -= 2 * reflected * torch.outer(u, u)
            out.append(j)
        return out
    if isinstance(layer, GroupSort):
        out = []
        orders = list(itertools.permutations(range(layer.group)))
        for choice in itertools.product(orders, repeat=width // layer.group):
            order = [layer.group * g + p for g, permutation in enumerate(choice) for p in permutation]
            out.append(torch.eye(width, dtype=torch.float64)[order])
        return out
    points = torch.linspace(-6, 6, 20001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(layer(points).sum(), points)
    ends = (float(slope.min()), float(slope.max()))
    return [torch.diag(torch.tensor(choice, dtype=torch.float64)) for choice in itertools.product(ends, repeat=width)]


def brute_force(model: Chain) -> Constants:
    """The largest gains over all choices of extreme Jacobians in all layers: a lower bound of what LipSDP may claim."""
    products = [torch.eye(model[0].in_features, dtype=torch.float64)[None]]
    for layer in model:
        if isinstance(layer, nn.Linear):
            products = [layer.weight.detach().double() @ p for p in products]
        else:
            table = torch.stack(jacobians(layer, products[0].shape[-2]))
            products = [(table[:, None] @ p[None]).flatten(0, 1) for p in products]
    whole = torch.cat(products)
    pairs = torch.linalg.vector_norm(whole[:, :, None] - whole[:, None], dim=-1).amax(0)
    return Constants(pairs, float(torch.linalg.matrix_norm(whole, 2).max()))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_constants_cover_all_slopes_and_permutations(kind) -> None:
    tightest = 0.0
    for seed, widths in enumerate([[4, 6, 3], [3, 6, 6, 3]]):
        if kind == "groupsort6" and len(widths) == 4:
            widths = [3, 6, 3]  # 720 orders a layer
        model = mlp(widths, kind, seed)
        below = brute_force(model)
        network = network_of(model)
        found = lipsdp_constants(network)
        for claimed in (found, eclipse_constants(network), product_of_norms(network)):
            assert bool((upper_pairs(claimed.pairs) >= upper_pairs(below.pairs)).all())
            assert claimed.whole >= below.whole
        tightest = max(tightest, float((upper_pairs(below.pairs) / upper_pairs(found.pairs)).max()), below.whole / found.whole)
    assert tightest > 0.9  # a bound of twice the truth would hide an error of twice


@pytest.mark.parametrize("kind", ["relu", "gelu", "maxmin", "groupsort3", "householder"])
def test_constants_are_ordered(kind) -> None:
    for seed in range(3):
        network = network_of(mlp([5, 12, 12, 6, 4], kind, seed))
        lipsdp, eclipse, norms = lipsdp_constants(network), eclipse_constants(network), product_of_norms(network)
        assert lipsdp.whole <= eclipse.whole <= norms.whole
        for tighter, looser in ((lipsdp, eclipse), (eclipse, norms)):
            assert bool((tighter.pairs <= looser.pairs).all())
        assert lipsdp.whole < 0.95 * norms.whole and eclipse.whole < 0.98 * norms.whole
        for found in (lipsdp, eclipse):
            assert bool((upper_pairs(found.pairs) <= 2**0.5 * found.whole * (1 + 1e-12)).all())
        weights = [np.linalg.svd(w.mid.numpy(), compute_uv=False)[0] for w in (*(w for w, _ in network.stages), network.head)]
        slope = {"gelu": 1.1289041**3}.get(kind, 1.0)
        assert norms.whole == pytest.approx(float(np.prod(weights)) * slope, rel=1e-6)


def test_eclipse_alone_is_at_most_the_product_of_norms() -> None:
    """Not by taking the smaller of both: the closed form itself, up to its 1e-6."""
    for kind in ACTIVATIONS:
        network = network_of(mlp([5, 12, 12, 12, 4], kind, 1))
        _, x, proved = fast_multipliers(network)
        assert proved and x is not None
        rows, first, second = pair_rows(network.head)
        assert bool((row_gains(rows, x) <= product_of_norms(network).pairs[first, second] * (1 + 1e-5)).all() or kind in SORTING)
        head = network.head.mid
        assert float(torch.linalg.eigvalsh(head @ x @ head.mT)[-1]) ** 0.5 <= product_of_norms(network).whole * (1 + 1e-5)


# ---- constants attacked by points, and by weights


def steepest(model: Chain, starts: int = 32, steps: int = 60) -> tuple[torch.Tensor, float]:
    """(largest |m_ij(x) − m_ij(x')|/‖x − x'‖ seen (C, C), largest ‖J‖ seen) by ascent on both points, from near and far."""
    x = torch.randn(starts, model[0].in_features, dtype=torch.float64).requires_grad_()
    step = (torch.randn_like(x) * torch.logspace(-4, 0.5, starts, dtype=torch.float64)[:, None]).requires_grad_()
    optimizer = torch.optim.Adam([x, step], lr=0.03)
    pairs, whole = torch.zeros(model[-1].out_features, model[-1].out_features, dtype=torch.float64), 0.0
    for _ in range(steps):
        delta = (model(x + step) - model(x)) / step.norm(dim=-1, keepdim=True)
        slopes = (delta[:, :, None] - delta[:, None]).abs()
        pairs = torch.maximum(pairs, slopes.detach().amax(0))
        whole = max(whole, float(delta.detach().norm(dim=-1).max()))
        optimizer.zero_grad()
        (-(slopes.square().sum() + delta.square().sum())).backward()
        optimizer.step()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda p: model(p[None])[0]))(x.detach()).detach()
    return pairs, max(whole, float(torch.linalg.matrix_norm(jacobian, 2).max()))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_no_pair_of_points_is_steeper_than_the_constants(kind) -> None:
    for seed, widths in enumerate([[4, 12, 3], [4, 12, 12, 3]]):
        model = mlp(widths, kind, seed, gain=2.0)
        found = lipsdp_constants(network_of(model))
        pairs, whole = steepest(model)
        assert bool((upper_pairs(pairs) <= upper_pairs(found.pairs) * (1 + 1e-9)).all()) and whole <= found.whole * (1 + 1e-9)


def hardest(kind: str, seed: int, steps: int = 100) -> Chain:
    """Weights and a point, optimised for a large local gain at a small product of norms: where bounds are nearly attained."""
    model = mlp([3, 6, 6, 2], kind, seed)
    x = torch.randn(8, 3, dtype=torch.float64).requires_grad_()
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    optimizer = torch.optim.Adam([*model.parameters(), x], lr=0.03)
    for _ in range(steps):
        jacobian = torch.func.vmap(torch.func.jacrev(lambda p: model(p[None])[0]))(x)
        # Frobenius instead of spectral: smooth where singular values meet, and 0 where all neurons are dead.
        gain = (jacobian.square().sum((-2, -1)).mean() + 1e-9).log() / 2 - sum(torch.linalg.matrix_norm(w, 2).log() for w in weights)
        optimizer.zero_grad()
        (-gain).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("kind", ["relu", "tanh", "gelu", "maxmin", "groupsort3", "householder"])
def test_adversarial_weights_do_not_break_the_constants(kind) -> None:
    for seed in range(2):
        model = hardest(kind, seed)
        network = network_of(model)
        pairs, whole = steepest(model)
        lipsdp, eclipse = lipsdp_constants(network), eclipse_constants(network)
        for found in (lipsdp, eclipse):
            assert whole <= found.whole * (1 + 1e-9)
            assert bool((upper_pairs(pairs) <= upper_pairs(found.pairs) * (1 + 1e-9)).all())
        assert whole > 0.6 * lipsdp.whole  # near enough to notice an error


@pytest.mark.parametrize("name", ["coupled", "relu for maxmin"])
def test_a_false_constraint_gives_a_constant_that_points_refute(name) -> None:
    """The same programs, the same proof, a false premise: the checks above notice. So they would notice it in quadratic.py."""
    if name == "coupled":
        # Both neurons read the same input; their outputs are subtracted. Claimed to be coupled, they seem to move together.
        model = mlp([1, 2, 2], "relu")
        weights, head = torch.tensor([[1.0], [0.9]]), torch.tensor([[1.0, -1.0], [0.0, 0.0]])
        false = rotated(elementwise(0.5, 0.5, 2))
        with torch.no_grad():
            model[0].bias.copy_(torch.tensor([1.0, -1.0]))
    else:
        model = mlp([2, 2, 2], "maxmin")
        # max(a, b) moves with b where b is larger; ReLU's constraint lets it move with a alone.
        weights, head = torch.tensor([[0.1, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        false = elementwise(0.5, 0.5, 2)
    with torch.no_grad():
        model[0].weight.copy_(weights)
        model[2].weight.copy_(head)
    network = network_of(model)
    weight = network.stages[0][0]
    seen = steepest(model)[0][0, 1]
    assert seen <= lipsdp_constants(network).pairs[0, 1]
    wrong = ConstraintNetwork(((weight, false),), network.head)
    program = program_of(wrong, pair_rows(wrong.head)[0])
    flat = minimise(program, torch.full((program.groups,), 100.0, dtype=torch.float64)).multipliers
    assert math.sqrt(least_proved(program, flat)) < 0.9 * seen


# ---- the program and its proof


@pytest.mark.parametrize("kind", ["relu", "gelu"])
def test_the_matrix_of_the_textbook_agrees_about_every_multiplier(kind) -> None:
    """Fazlyab et al. 2019, theorem 2, two hidden layers, slopes in [α, β], multipliers T ≥ 0 on the diagonal: written down anew from there.

    2t(δ − αv)(βv − δ) = 2tr²(v² − w²) for δ = mv + rw, and the inverse of X/ρ takes λ to ρ/λ: t = ρ/(2r²λ). Then its matrix is negative
    semidefinite at the ρ that this λ gives here, and is not just below.
    """
    model = mlp([4, 6, 5, 3], kind, 5)
    network = network_of(model)
    rows = pair_rows(network.head)[0]
    program = program_of(network, Enclosure(rows.mid[:1], rows.rad[:1]))
    first, second, c = model[0].weight.detach(), model[2].weight.detach(), rows.mid[:1].mT
    low, high = {"relu": (0.0, 1.0), "gelu": (-0.1289042, 1.1289042)}[kind]
    start = program.join(fast_multipliers(network, 1.5)[0])
    for flat in (start, minimise(program, start).multipliers, start * (1 + torch.rand(11).double())):

        def largest(rho: float, flat: torch.Tensor = flat) -> float:
            t0, t1 = (torch.diag(rho / (2 * ((high - low) / 2) ** 2 * part)) for part in flat.split([5, 6])[::-1])
            corner = -rho * torch.eye(4, dtype=torch.float64) - 2 * low * high * first.mT @ t0 @ first
            middle = -2 * t0 - 2 * low * high * second.mT @ t1 @ second
            zero = torch.zeros(4, 5, dtype=torch.float64)
            top = torch.cat([corner, (low + high) * first.mT @ t0, zero], 1)
            centre = torch.cat([(low + high) * t0 @ first, middle, (low + high) * second.mT @ t1], 1)
            return float(torch.linalg.eigvalsh(torch.cat([top, centre, torch.cat([zero.mT, (low + high) * t1 @ second, c @ c.mT - 2 * t1], 1)]))[-1])

        rho = program.bound(flat)
        assert largest(rho * (1 + 1e-5)) < 0 < largest(rho * (1 - 1e-5))
        assert rho == pytest.approx(least_proved(program, flat), rel=1e-6)


def test_nothing_below_the_optimum_is_proved() -> None:
    for kind in ("relu", "maxmin", "groupsort3"):
        network = network_of(mlp([4, 12, 6, 3], kind, 2))
        program = program_of(network, network.head)
        start = program.join(fast_multipliers(network, 1.5)[0])
        solution = minimise(program, start, gap=1e-6)
        assert solution.gap < 1e-6
        for flat in (solution.multipliers, start, solution.multipliers * 1.1):
            value = program.bound(flat)
            assert not is_proved(program, value * (1 - 1e-6), flat)
            assert value == float("inf") or is_proved(program, value * (1 + 1e-3), flat)
        assert not is_proved(program, solution.value * 2, -solution.multipliers)
        assert not is_proved(program, solution.value * 2, solution.multipliers * torch.nan)


def test_no_multipliers_whatsoever_prove_less_than_is_true() -> None:
    """Whatever a solver returns: garbage, the optimum of another pair, multipliers of any size. The proof decides."""
    model = mlp([3, 6, 6, 3], "relu", 3)
    network, below = network_of(model), brute_force(model)
    rows, first, second = pair_rows(network.head)
    programs = [program_of(network, Enclosure(rows.mid[k : k + 1], rows.rad[k : k + 1])) for k in range(3)]
    start = programs[0].join(fast_multipliers(network, 1.5)[0])
    proved = 0
    for seed in range(30):
        torch.manual_seed(seed)
        for k, program in enumerate(programs):
            flat = start * torch.exp(torch.randn(program.groups).double() * (seed % 5)) * 10.0 ** (seed % 3)
            rho = least_proved(program, flat)
            assert math.sqrt(rho) >= below.pairs[first[k], second[k]]
            proved += math.isfinite(rho)
            x = None
            for (weight, constraint), part in zip(network.stages, flat.split([6, 6])[::-1], strict=True):
                x = through_activation(constraint, through_linear(weight, x), part)
                if x is None:
                    break
            if x is not None:
                assert bool((row_gains(rows, x) >= below.pairs[first, second]).all())
    assert proved > 20


def test_a_guess_that_is_too_small_is_not_believed(monkeypatch) -> None:
    """Plain float64 is inaccurate by a factor of two for ρ or for X: the result is proved in any case, or infinite."""
    network = network_of(mlp([4, 6, 6, 3], "gelu", 3))
    program = program_of(network, network.head)
    start = program.join(fast_multipliers(network, 1.5)[0])
    truth = program.bound(start)
    honest = Program.bound
    for lie in (0.5, 0.999, 1 - 1e-6):
        monkeypatch.setattr(Program, "bound", lambda self, flat, lie=lie: lie * honest(self, flat))
        assert least_proved(program, start) >= truth * (1 - 1e-12)
    monkeypatch.undo()
    assert least_proved(program, start) <= truth * (1 + 1e-6)
    weight, constraint = network.stages[0]
    g = through_linear(weight, None)
    flat = torch.full((constraint.groups,), 3 * constraint.fast * float(torch.linalg.eigvalsh(g)[-1]), dtype=torch.float64)
    proper = through_activation(constraint, g, flat)
    solve = torch.linalg.solve_triangular
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda *args, **options: 0.5 * solve(*args, **options))
    lied = through_activation(constraint, g, flat)
    assert proper is not None and (lied is None or torch.linalg.eigvalsh(lied - proper)[0] > -1e-9)


def test_a_cholesky_factor_that_is_wrong_proves_nothing(monkeypatch) -> None:
    """If LAPACK returns a wrong factor of a matrix that is not positive, its residual reveals it."""
    factorise = torch.linalg.cholesky_ex

    def wrong(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.eye(len(matrix), dtype=torch.float64), torch.zeros((), dtype=torch.int32)

    indefinite = torch.tensor([[1.0, 1.1], [1.1, 1.0]], dtype=torch.float64)
    assert not proved_positive(Enclosure(indefinite)) and factorise(indefinite)[1] > 0
    monkeypatch.setattr(torch.linalg, "cholesky_ex", wrong)
    assert not proved_positive(Enclosure(indefinite))
    # The factor of the nearest positive matrix: residual and radius are each below the shift, together they are not. 1.07 is in the ball.
    root = 0.935**0.5
    near = torch.tensor([[root, 0.0], [root, 0.0]], dtype=torch.float64)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: (near, torch.zeros((), dtype=torch.int32)))
    apart = 1 - torch.eye(2, dtype=torch.float64)
    assert not proved_positive(Enclosure(torch.eye(2, dtype=torch.float64) + 0.97 * apart, 0.1 * apart))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", wrong)
    # Not positive by very little, which only the residual knows.
    nearly = torch.eye(3, dtype=torch.float64) * 2.0**-30
    nearly[0, 1] = nearly[1, 0] = 2.0**-30 * (1 + 1e-12)
    assert not proved_positive(Enclosure(nearly))


def test_a_step_is_the_smallest_and_never_below_it() -> None:
    for kind in set(ACTIVATIONS) - {"groupsort6"}:  # too many orders
        model = mlp([4, 12, 3], kind, 4)
        ((weight, constraint),) = network_of(model).stages
        g = through_linear(weight, None)
        assert torch.linalg.eigvalsh(g - weight.mid @ weight.mid.mT)[0] >= 0
        flat = torch.full((constraint.groups,), 3 * constraint.fast * float(torch.linalg.eigvalsh(g)[-1]), dtype=torch.float64)
        x = through_activation(constraint, g, flat)
        extreme = jacobians(model[1], 12)
        for j in extreme[:: 1 + len(extreme) // 150]:
            assert torch.linalg.eigvalsh(x - j @ weight.mid @ weight.mid.mT @ j.mT)[0] > -1e-12


def test_exact_cases() -> None:
    """|a − b| through MaxMin, a single ReLU, and no activation at all: LipSDP is exact."""
    difference = mlp([4, 2, 2], "maxmin", 7)
    with torch.no_grad():
        difference[2].weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    rows = difference[0].weight.detach()
    assert float(lipsdp_constants(network_of(difference)).pairs[0, 1]) == pytest.approx(float((rows[0] - rows[1]).norm()), rel=2e-3)
    single = mlp([4, 1, 2], "relu", 7)
    head = single[2].weight.detach()
    gap = float((head[0] - head[1]).abs() * single[0].weight.detach().norm())
    assert float(lipsdp_constants(network_of(single)).pairs[0, 1]) == pytest.approx(gap, rel=2e-3)
    linear = Chain(OrderedDict(a=nn.Linear(5, 7), b=nn.Linear(7, 3), c=GroupSort(1), d=nn.Linear(3, 3))).double()
    matrix = linear.d.weight @ linear.b.weight @ linear.a.weight
    found = lipsdp_constants(network_of(linear))
    assert found.whole == pytest.approx(float(torch.linalg.matrix_norm(matrix.detach(), 2)), rel=1e-9)
    assert float(found.pairs[0, 2]) == pytest.approx(float((matrix[0] - matrix[2]).detach().norm()), rel=1e-9)


@pytest.mark.parametrize("kind", ["relu", "gelu", "maxmin", "groupsort3"])
def test_cvxpy_and_newton_agree(kind) -> None:
    pytest.importorskip("cvxpy", reason="needs cvxpy: pip install 'robustlip[sdp]'")
    network = network_of(mlp([4, 12, 6, 3], kind, 1))
    ours, theirs = lipsdp_constants(network), lipsdp_constants(network, solver="cvxpy")
    np.testing.assert_allclose(ours.pairs.numpy(), theirs.pairs.numpy(), rtol=5e-3)
    assert ours.whole == pytest.approx(theirs.whole, rel=5e-3)


@pytest.mark.parametrize("power", [-60, -20, 0, 20, 60])
def test_constants_scale_with_the_weights(power) -> None:
    model = mlp([4, 6, 6, 3], "relu", 0)
    before = lipsdp_constants(network_of(model))
    with torch.no_grad():
        model[0].weight.mul_(2.0**power)
        model[2].weight.mul_(2.0 ** -(power // 2))
    after = lipsdp_constants(network_of(model))
    factor = 2.0 ** (power - power // 2)
    assert after.whole / factor == pytest.approx(before.whole, rel=5e-3)
    np.testing.assert_allclose(upper_pairs(after.pairs).numpy() / factor, upper_pairs(before.pairs).numpy(), rtol=5e-3)


def test_dead_neurons_equal_rows_and_extreme_weights() -> None:
    model = mlp([4, 8, 8, 3], "relu", 0)
    with torch.no_grad():
        model[0].weight[2] = 0
        model[2].weight[:, 3] = 0
        model[4].weight[:, 5] = 0
        model[4].weight[1] = model[4].weight[0]
    found, below = lipsdp_constants(network_of(model)), steepest(model)
    assert bool((upper_pairs(below[0]) <= upper_pairs(found.pairs) + 1e-12).all()) and below[1] <= found.whole
    assert found.pairs[0, 1] < 1e-4 * found.whole and found.whole < 0.9 * product_of_norms(network_of(model)).whole
    for size in (0.0, 1e-200, 1e200):
        with torch.no_grad():
            model[2].weight.fill_(size)
        extreme = lipsdp_constants(network_of(model))
        norms = product_of_norms(network_of(model))
        assert extreme.whole <= norms.whole and (extreme.whole >= 1e-3 * size or size == 0)


def test_normalisation_and_layers_that_follow_each_other() -> None:
    plain = mlp([4, 6, 3], "relu", 0)
    scaled = Chain(OrderedDict(n=Normalize(0.5, 0.25), a=plain[0], b=nn.Dropout(0.5), c=plain[1], d=plain[2])).double().eval()
    assert lipsdp_constants(network_of(scaled)).whole == pytest.approx(4 * lipsdp_constants(network_of(plain)).whole, rel=1e-6)
    by_channel = Chain(OrderedDict(n=Normalize([0.5, 0.4], [0.25, 0.5]), f=nn.Flatten(), a=plain[0], c=plain[1], d=plain[2])).double().eval()
    assert lipsdp_constants(network_of(by_channel)).whole == pytest.approx(4 * lipsdp_constants(network_of(plain)).whole, rel=1e-6)
    torch.manual_seed(0)
    twice = Chain(OrderedDict(a=plain[0], b=nn.ReLU(), n=Normalize(0.0, 0.5), c=nn.Tanh(), d=nn.Linear(6, 5), e=nn.Linear(5, 3))).double()
    assert steepest(twice)[1] <= lipsdp_constants(network_of(twice)).whole


# ---- radii


@pytest.fixture
def methods() -> None:
    """Both methods are registered."""
    assert {"lipsdp", "eclipse"} <= set(METHODS)


@cache
def shared(widths: tuple[int, ...], kind: str, seed: int) -> Chain:
    """One model for all norms: its constants for l2 are cached with it. Tests must not change it."""
    return mlp(list(widths), kind, seed, gain=2.0).float().requires_grad_(False)


@pytest.mark.parametrize("kind", ["relu", "gelu", "maxmin", "householder"])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_no_attack_succeeds_inside_a_radius(kind, norm, methods) -> None:
    model = shared((6, 12, 12, 4), kind, 1)
    torch.manual_seed(1)
    x = torch.rand(16, 6)
    y = model(x).argmax(-1)
    threat = parse_threat(norm)
    radius = certify(model, x, y, threat, "lipsdp").radius
    assert (radius > 0).mean() > 0.8
    assert (radius <= by_name("min")(model, x, y, threat).radius).all()
    for i in range(0, len(x), 2):  # at 1.0 times each radius, not only near the boundary
        found = by_name("pgd", steps=20)(model, x[i : i + 1], y[i : i + 1], parse_threat(norm, float(radius[i])))
        assert not bool(np.asarray(found.success).any())
    eclipse, usual = certify(model, x, y, threat, "eclipse").radius, certify(model, x, y, threat, "global").radius
    assert (radius >= eclipse * (1 - 1e-3)).all()
    if norm == "l2":
        assert (eclipse >= usual * (1 - 1e-3)).all() and np.median(radius) > 1.1 * np.median(usual)


@pytest.mark.parametrize("method", ["lipsdp", "eclipse"])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_radii_are_margins_over_constants_less_rounding(method, norm, methods) -> None:
    model = shared((6, 8, 4), "relu", 2)
    torch.manual_seed(2)
    x = torch.rand(30, 6)
    logits = model(x).double()
    y = logits.argmax(-1)
    constants = (lipsdp_constants if method == "lipsdp" else eclipse_constants)(network_of(model))
    margin = logits.gather(1, y[:, None]) - logits
    ideal = (margin / constants.pairs[y]).scatter(1, y[:, None], torch.inf).amin(1).detach().numpy() / (6**0.5 if norm == "linf" else 1)
    radius = certify(model, x, y, InputBall(norm), method).radius
    assert (radius <= ideal).all() and (radius >= ideal * (1 - 1e-3) - 1e-4).all() and (radius > 0).all()
    real = certify(model, x, y, InputBall(norm), method, dtype="real").radius
    assert (radius < real).all()
    wrong = certify(model, x, (y + 1) % 4, InputBall(norm), method)
    assert (wrong.radius == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["lipsdp", "eclipse"])
def test_rounding_attack_breaks_the_real_radius_and_not_the_executed_one(dtype, method, methods) -> None:
    """As in test_certify.py: every ReLU is active, the constant is attained, and rounding alone decides."""
    generator = torch.Generator().manual_seed(0)
    broken = 0
    for _ in range(6):
        model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.ReLU(), nn.Linear(48, 2))
        nn.init.eye_(model[0].weight)
        with torch.no_grad():
            model[2].weight.abs_()
            model[2].weight[1].neg_()
        model = model.to(dtype).requires_grad_(False)
        x = torch.rand(64, 64, generator=generator).to(dtype)
        logits = copy.deepcopy(model).double()(x.double())
        model[-1].bias[0] -= (logits[:, 0] - logits[:, 1]).median().to(dtype)
        exact = copy.deepcopy(model).double()
        y = model(x).argmax(-1)
        real, executed = (torch.from_numpy(certify(model, x, y, InputBall("l2"), method, dtype=d).radius) for d in ("real", None))
        point = x.double().requires_grad_()
        logits = exact(point)
        (gradient,) = torch.autograd.grad((logits.gather(1, y[:, None]) * 2 - logits.sum(1, keepdim=True)).sum(), point)
        away = -gradient / gradient.norm(dim=-1, keepdim=True)
        for fraction in torch.linspace(0.3, 1.0, 15, dtype=torch.float64):
            moved = (x.double() + away * real[:, None] * fraction).to(dtype)
            distance = (moved.double() - x.double()).norm(dim=-1)
            flipped = model(moved).argmax(-1) != y
            broken += int((flipped & (distance <= real)).sum())
            assert not bool((flipped & (distance <= executed)).any())
    assert broken > 0


def test_linear_models_have_their_exact_radius(methods) -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.randn(50, 3, 4)
    y = model(x).argmax(-1)
    w = model[1].weight.detach().double()
    margin = model(x).double().gather(1, y[:, None]) - model(x).double()
    truth = (margin / (w[y][:, None] - w[None]).norm(dim=-1)).scatter(1, y[:, None], torch.inf).amin(1).detach().numpy()
    for method in ("lipsdp", "eclipse"):
        certificate = certify(model, x, y, InputBall("l2"), method)
        assert (certificate.radius <= truth * (1 + 1e-5)).all() and (certificate.radius >= truth * (1 - 1e-3) - 1e-4).all()


def test_constants_follow_the_weights(methods) -> None:
    model, x = mlp([6, 8, 4], "relu", 2, gain=2.0).float(), torch.rand(10, 6)
    y = model(x).argmax(-1)
    before = certify(model, x, y, InputBall("l2"), "lipsdp").radius
    for p in model.parameters():
        p.data.mul_(2.0)
    after = certify(model, x, y, InputBall("l2"), "lipsdp").radius
    fresh = mlp([6, 8, 4], "relu", 2, gain=2.0).float()
    fresh.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(after, certify(fresh, x, y, InputBall("l2"), "lipsdp").radius)
    assert (before != after).all()


# ---- what is refused


def test_what_the_methods_are_not_for() -> None:
    good, large = mlp([4, 6, 3], "relu"), LipschitzMLP([4, 9000, 9000, 2])
    for why_not in (lipsdp_why_not, eclipse_why_not):
        assert why_not(good, InputBall("l2")) == ""
        assert "embedding-l2" in why_not(good, EmbeddingBall())
        assert "begins with Embedding" in why_not(LipschitzGPT("abc", 8, 2, 1), InputBall("l2"))
        assert "ends with ReLU" in why_not(Chain(OrderedDict(a=nn.Linear(4, 4), b=nn.ReLU())), InputBall("l2"))
        assert "LayerNorm" in why_not(Chain(OrderedDict(a=nn.Linear(4, 4), b=nn.LayerNorm(4), c=nn.Linear(4, 2))), InputBall("l2"))
        assert "flattens" in why_not(Chain(OrderedDict(a=nn.Linear(4, 4), b=nn.Flatten(), c=nn.Linear(4, 2))), InputBall("l2"))
        between = Chain(OrderedDict(a=nn.Linear(4, 2), b=Normalize([0.0, 0.0], [1.0, 2.0]), c=nn.Linear(2, 2)))
        assert "by channel" in why_not(between, InputBall("l2"))
        assert "neurons" in why_not(large, InputBall("l2"))
        assert "begins with ReLU" in why_not(Chain(OrderedDict(a=nn.ReLU(), c=nn.Linear(2, 2))), InputBall("l2"))


def test_samples_that_are_not_vectors_are_refused(methods) -> None:
    """Tokens, each through the same MLP: the layers are known, the constants would be those of one token."""
    model = NextTokenChain(OrderedDict(a=nn.Linear(4, 6), b=nn.ReLU(), c=nn.Linear(6, 3)))
    model.embedding_depth = 0
    x = torch.rand(5, 2, 4)
    context = Context(dtype=torch.float32, store={})
    for radii in (lipsdp_radii, eclipse_radii):
        with pytest.raises(BadInput, match=r"before the first Linear|embedding or weight threat"):
            radii(model, x, torch.zeros(5, dtype=torch.int64), torch.rand(5, 3), InputBall("l2"), context)
        with pytest.raises(BadInput, match="samples of 4 numbers"):
            plain = Chain(OrderedDict(model.named_children()))
            radii(plain, x, torch.zeros(5, dtype=torch.int64), torch.rand(5, 3), InputBall("l2"), context)


def test_solvers_that_are_missing_or_unknown(monkeypatch) -> None:
    network = network_of(mlp([4, 6, 3], "relu"))
    with pytest.raises(BadInput, match="newton, cvxpy"):
        lipsdp_constants(network, solver="magic")
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(BadInput, match=r"pip install 'robustlip\[sdp\]'"):
        lipsdp_constants(network, solver="cvxpy")
    assert lipsdp_constants(network).whole < math.inf  # our own method needs no cvxpy
