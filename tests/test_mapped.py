"""Intervals and CROWN with linear maps instead of matrices, compared with the dense network, exact fractions and attacks."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from test_convnets import BENT, LINEAR, SHAPE, balanced, drawn, exact_radii, headed, points
from torch import Tensor, nn

import robustlip
from robustlip.attacks import MinimumRadius
from robustlip.domains.lines import crown as crown_module
from robustlip.domains.lines import dense as network_module
from robustlip.domains.lines import stages as stages_module
from robustlip.domains.lines.crown import Ball, Boxes, backward, first_box, interval_boxes, interval_step, linear_boxes
from robustlip.domains.lines.dense import network_of
from robustlip.domains.lines.stages import DenseStage, MapStage
from robustlip.domains.norms import Context
from robustlip.errors import UnsupportedLayer
from robustlip.layers import GroupSort, MaxMin, Residual, as_chain
from robustlip.ops.maps import Mixing, PartialMap, ScaleMap, Series, map_of
from robustlip.threats import InputBall

NETS = {
    **{name: BENT[name] for name in ("relu", "gelu-norm", "maxmin", "resnet", "concatenate", "vectors")},
    **{f"linear {name}": LINEAR[name] for name in ("stride", "same", "circular", "norm", "average", "joins")},
    "sorted": lambda: headed(
        nn.Conv2d(2, 6, 3), GroupSort(2), Residual(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), MaxMin()), skip=0.5, weight=-1.0)
    ),
}  # fmt: skip


@pytest.fixture
def mapped(monkeypatch) -> None:
    """Every stage of images is a map, however small."""
    monkeypatch.setattr(stages_module, "SMALL_MATRIX", 0)


def network(model: nn.Module, *, dense: bool = False) -> network_module.Network:
    return network_of(as_chain(model).double(), SHAPE, Context(torch.float64, {}), dense=dense)


@pytest.mark.parametrize("name", NETS)
def test_stages_of_maps_are_the_model_and_the_dense_ones(name, mapped) -> None:
    model, x = drawn(NETS[name]()).double(), points().double()
    here, there = network(model), network(model, dense=True)
    assert any(isinstance(s, MapStage) for s in here.stages) and not here.dense and there.dense
    torch.testing.assert_close(here.forward(x.flatten(1))[-1], model(x), rtol=1e-10, atol=1e-10)
    for a, b in zip(here.stages, there.stages, strict=True):
        assert (a.inputs, a.outputs) == (b.inputs, b.outputs)
        rows = torch.randn(3, 5, a.outputs, dtype=torch.float64)
        torch.testing.assert_close(a.backward(rows), b.backward(rows), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a.rows(torch.arange(a.outputs)), b.weight, rtol=1e-9, atol=1e-9)
        h = torch.rand(4, a.inputs, dtype=torch.float64)
        assert bool((a.absolute(h) >= b.absolute(h) * (1 - 1e-12)).all())
        for norm in ("l2", "linf", "l1"):
            assert bool((a.row_norms(norm) >= b.row_norms(norm) * (1 - 1e-9)).all())
        assert a.magnitude >= float(torch.linalg.matrix_norm(b.weight.abs(), 2)) * (1 - 1e-9)
        if isinstance(a, MapStage) and len(a.map.maps) == 1:
            assert a.magnitude <= b.magnitude * (1 + 1e-9)  # no larger than Frobenius
        if isinstance(a, MapStage):
            scaled = any(isinstance(m, ScaleMap) for m in a.map.maps)
            assert a.weight_error >= (2.0**-51 * float(torch.linalg.matrix_norm(b.weight, 2)) if scaled else 0.0)
            assert a.bias_error > 0 or not any(m.bias is not None for m in a.map.maps[1:])
            assert float((a.bias - b.bias).norm()) <= a.bias_error + b.bias_error
        assert a.weight_error <= 1e-13 * (1 + a.magnitude) and a.bias_error <= 1e-13 * (1 + a.shift + a.magnitude)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("name", NETS)
def test_radii_are_those_of_the_dense_network(name, norm, monkeypatch) -> None:
    x, ball = points(8), InputBall(norm)
    model = balanced(drawn(NETS[name](), 3), points())
    y = model(x).argmax(-1)
    monkeypatch.setattr(stages_module, "SMALL_MATRIX", 10**9)
    dense = {method: robustlip.certify(model, x, y, ball, method).radius for method in ("ibp", "crown")}
    monkeypatch.setattr(stages_module, "SMALL_MATRIX", 0)
    again = balanced(drawn(NETS[name](), 3), points())  # constants of the other are remembered
    found = {method: robustlip.certify(again, x, y, ball, method).radius for method in ("ibp", "crown")}
    slack = 2e-2 if "circular" in name else 1e-5  # a padding that copies numbers leaves |A| a bound
    assert np.allclose(found["ibp"], dense["ibp"], rtol=slack, atol=0)
    assert np.allclose(found["crown"], dense["crown"], rtol=slack, atol=0)
    # Where rows are many, those of relu that cannot bend are left out: the intervals behind begin wider.
    monkeypatch.setattr(crown_module, "MANY_CHUNKS", 10**9)
    fewer = robustlip.certify(again, x, y, ball, "crown").radius
    assert (fewer <= found["crown"] * (1 + 1e-3)).all() and (fewer >= 0.8 * found["crown"]).all()
    broken = MinimumRadius(steps=4, descent=60)(model, x, y, ball).radius
    assert (found["crown"] > 0).all() and (found["crown"] <= broken).all() and (found["ibp"] <= broken).all()


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_convnets_have_their_exact_radius_by_crown(name, norm, mapped) -> None:
    model, x = drawn(LINEAR[name]()).double(), points().double()
    y = model(x).argmax(-1)
    exact = exact_radii(model, x, y, norm)[0].amin(-1).numpy()
    radius = robustlip.certify(model, x, y, InputBall(norm), "crown").radius
    assert (radius <= exact).all() and (radius >= exact * (1 - 1.1e-2)).all()


@pytest.mark.parametrize("name", ["relu", "gelu-norm", "maxmin", "resnet"])
def test_boxes_hold_every_activation(name, mapped) -> None:
    model, x = drawn(NETS[name](), 3, 1.5).double(), points(6).double()
    net = network(model)
    for norm in ("l2", "linf"):
        ball = Ball(x.flatten(1), torch.full((6,), 0.05 if norm == "linf" else 0.3, dtype=torch.float64), norm)
        wide, narrow = interval_boxes(net, ball), linear_boxes(net, ball)
        g = torch.Generator().manual_seed(4)
        for _ in range(60):
            delta = torch.randn(6, 60, generator=g, dtype=torch.float64)
            delta = delta.sign() * 0.05 if norm == "linf" else 0.3 * torch.nn.functional.normalize(delta, dim=-1)
            for z, a, b in zip(net.forward(ball.x + delta), narrow.low, narrow.high, strict=False):
                assert bool(((z >= a - 1e-12) & (z <= b + 1e-12)).all())
        for a, b, c, d in zip(wide.low, narrow.low, narrow.high, wide.high, strict=True):
            assert bool(((a <= b + 1e-12) & (c <= d + 1e-12)).all())


def fractions(t: Tensor) -> list[Fraction]:
    return [Fraction(float(v)) for v in t.flatten()]


def test_bounds_at_a_point_hold_what_float64_loses(mapped) -> None:
    """Radius 0, numbers that nearly cancel: the remaining bound is rounding error, compared in fractions."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1, stride=2).double().requires_grad_(False)
    net = network(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)))
    stage = net.stages[0]
    assert isinstance(stage, MapStage)
    matrix = [fractions(row) for row in stage.rows(torch.arange(27))]  # of unit vectors: exact
    bias = fractions(conv.bias[:, None].expand(3, 9))
    x = torch.randn(3, 60, dtype=torch.float64) * 10
    ball = Ball(x, torch.zeros(3, dtype=torch.float64), "linf")
    exact = [[sum((a * b for a, b in zip(row, fractions(p), strict=True)), c) for row, c in zip(matrix, bias, strict=True)] for p in x]
    computed, errors = stage.forward(x), net.forward_errors(ball.l2_norm)[0]
    low, high = first_box(stage, ball)
    below, above = interval_step(stage, x, x)
    rows = torch.randn(1, 4, 27, dtype=torch.float64)
    least = backward(net, ball, Boxes((), ()), 0, rows)
    rounded = 0
    for n in range(3):
        off = [abs(Fraction(float(z)) - e) for z, e in zip(computed[n], exact[n], strict=True)]
        rounded += sum(o > 0 for o in off)
        assert sum(o * o for o in off) <= Fraction(float(errors[n])) ** 2
        for e, *bounds in zip(exact[n], low[n], high[n], below[n], above[n], strict=True):
            a, b, c, d = (Fraction(float(v)) for v in bounds)
            assert a <= e <= b and c <= e <= d
        for r in range(4):
            assert Fraction(float(least[n, r])) <= sum(a * b for a, b in zip(fractions(rows[0, r]), exact[n], strict=True))
    assert rounded > 20


def test_weights_of_maps_are_not_written(mapped) -> None:
    net = network(drawn(NETS["relu"]()))
    assert isinstance(net.stages[0], MapStage) and isinstance(net.stages[-1], (DenseStage, MapStage))
    with pytest.raises(UnsupportedLayer, match="map of images"):
        _ = net.stages[0].weight


def test_networks_with_too_many_rows_are_refused(monkeypatch) -> None:
    model = drawn(NETS["relu"]())
    monkeypatch.setattr(stages_module, "LARGEST_MATRIX", 1000)
    monkeypatch.setattr(stages_module, "SMALL_MATRIX", 500)
    with pytest.raises(UnsupportedLayer, match="at most 1000 weights"):
        network(model, dense=True)
    monkeypatch.setattr(stages_module, "LARGEST_MAP", 2000)
    with pytest.raises(UnsupportedLayer, match="at most 2000 weights"):
        network(model)


def test_maps_larger_than_any_matrix_prove_the_same(monkeypatch) -> None:
    """If rows are not cached, they are computed on demand."""
    x = points(4)
    y = drawn(NETS["resnet"](), 3)(x).argmax(-1)
    found = []
    for limit in (2**24, 1):
        monkeypatch.setattr(stages_module, "SMALL_MATRIX", 0)
        monkeypatch.setattr(stages_module, "LARGEST_MATRIX", limit if limit > 1 else 600)
        found.append(robustlip.certify(drawn(NETS["relu"](), 3), x, y * 0 + drawn(NETS["relu"](), 3)(x).argmax(-1), InputBall("l2"), "crown").radius)
    assert np.allclose(*found, rtol=1e-6, atol=0) and (found[0] > 0).all()


def test_series_of_maps_and_mixtures_have_their_adjoints() -> None:
    torch.manual_seed(0)
    inner = map_of(nn.Conv2d(2, 3, 2).double().requires_grad_(False), (2, 3, 3))
    mixing = Mixing.of(18, (torch.randint(18, (22,)), 0.5), (torch.randint(18, (22,)), torch.randn(22, dtype=torch.float64)))
    parts = (mixing, PartialMap.of(inner, 4), Mixing.of(16, (torch.arange(16).flip(0), -1.0)))
    series = Series.of(parts)
    matrix = series.apply(torch.eye(18, dtype=torch.float64)).mT
    torch.testing.assert_close(series.adjoint(torch.eye(16, dtype=torch.float64)), matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixing.apply(torch.eye(18, dtype=torch.float64)).mT, mixing.dense(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixing.adjoint(torch.eye(22, dtype=torch.float64)), mixing.dense(), rtol=1e-12, atol=1e-12)
    size = series.apply(torch.eye(18, dtype=torch.float64), absolute=True).mT
    assert bool((size >= matrix.abs() - 1e-12).all())
    torch.testing.assert_close(series.adjoint(torch.eye(16, dtype=torch.float64), absolute=True), size, rtol=1e-12, atol=1e-12)
    assert series.magnitude() >= float(torch.linalg.matrix_norm(size, 2))
    # Summands: products of one number are those of every map on its way, roundings beside them counted in.
    assert series.terms >= sum(part.terms for part in parts) and series.adjoint_terms >= sum(part.adjoint_terms for part in parts)
    assert mixing.adjoint_terms == int(torch.bincount(mixing.index[mixing.factor != 0], minlength=18).max())
