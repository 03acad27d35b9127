"""Attacks on models in half precision: points stay in the ball after rounding, and are as near as those in float32."""

from __future__ import annotations

import copy
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustlip.attacks import PGD, by_name
from robustlip.attacks.losses import excess, violation
from robustlip.attacks.spaces import EmbeddingSpace, InputSpace, next_toward, round_down, round_nearest, round_toward
from robustlip.layers import Chain, Patchify
from robustlip.models.zoo import load
from robustlip.threats import EmbeddingBall, InputBall

torch.set_num_threads(1)
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, torch.float64, *HALVES]


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a half precision, or for wider ones those around 0, powers of two, the largest and subnormal ones, and random ones."""
    if dtype in HALVES:
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        return every[torch.isfinite(every)]
    info, g = torch.finfo(dtype), torch.Generator().manual_seed(0)
    edge = torch.tensor([0.0, 1.0, 2.0, 0.5, info.tiny, info.max, info.tiny * info.eps, 3 * info.tiny * info.eps], dtype=dtype)
    middle = torch.randn(4000, generator=g, dtype=torch.float64).to(dtype) * 10.0 ** torch.randint(-30, 30, (4000,), generator=g).to(dtype)
    some = torch.cat([edge, torch.nextafter(edge, edge * 0), middle])
    return torch.cat([some, -some])


@pytest.mark.parametrize("dtype", HALVES)
def test_the_next_number_is_the_next_of_all(dtype: torch.dtype) -> None:
    ordered = numbers(dtype).double().unique()  # ±0 are one
    values = torch.cat([ordered, torch.tensor([torch.inf], dtype=torch.float64)]).to(dtype)
    up = next_toward(values[:-1], torch.full_like(values[:-1], torch.inf))
    assert torch.equal(up.double(), values[1:].double())
    down = next_toward(-values[:-1], torch.full_like(values[:-1], -torch.inf))
    assert torch.equal(down.double(), -values[1:].double())
    assert torch.equal(next_toward(values, values), values)
    back = next_toward(torch.full((1,), torch.inf, dtype=dtype), torch.zeros(1, dtype=dtype))
    assert float(back) == torch.finfo(dtype).max
    from_zero = next_toward(torch.tensor([0.0, -0.0, 0.0], dtype=dtype), torch.tensor([1.0, 1.0, -1.0], dtype=dtype))
    smallest = float(ordered[ordered > 0].min())
    assert from_zero.double().tolist() == [smallest, smallest, -smallest]
    if dtype == torch.bfloat16:  # where torch has it on this device
        some = values[:-1][::7]
        assert torch.equal(next_toward(some, torch.zeros_like(some)).double(), torch.nextafter(some, torch.zeros_like(some)).double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_inward_loses_less_than_a_step_and_never_goes_too_far(dtype: torch.dtype) -> None:
    clean = numbers(dtype)
    g = torch.Generator().manual_seed(1)
    clean = clean[torch.randint(len(clean), (60_000,), generator=g)]
    exponents = torch.randint(-12, 4, clean.shape, generator=g).double()
    delta = torch.randn(clean.shape, generator=g, dtype=torch.float64) * clean.double().abs().clamp_min(torch.finfo(dtype).tiny) * 2.0**exponents
    delta[::5] = -clean.double()[::5]  # exactly to 0
    delta[1::5] = delta[1::5] * 0
    delta[2::5] = -2.5 * clean.double()[2::5]  # through 0
    delta[3::50] = torch.finfo(torch.float64).max / 4  # beyond the largest number
    delta = torch.where(torch.isfinite(delta), delta, 0.0)
    point = round_toward(clean, delta)
    assert bool(torch.isfinite(point).all())
    further = torch.where(delta == 0, point, next_toward(point, torch.where(delta > 0, torch.inf, -torch.inf).to(dtype)))
    for c, d, p, f in zip(clean.tolist()[::6], delta.tolist()[::6], point.tolist()[::6], further.tolist()[::6], strict=True):
        change = Fraction(p) - Fraction(c)
        assert abs(change) <= abs(Fraction(d)) and change * Fraction(d) >= 0
        if np.isfinite(f) and f != p:
            # In the arithmetic of the norms: what is lost against exact sums is a rounding of float64.
            assert abs(Fraction(f) - Fraction(c)) > abs(Fraction(d)) * (1 - Fraction(2) ** -52) - Fraction(2) ** -1073


@pytest.mark.parametrize("dtype", HALVES)
@settings(max_examples=200, deadline=None)
@given(clean=st.floats(-60000, 60000), delta=st.floats(-1e5, 1e5))
def test_any_number_and_any_change(dtype: torch.dtype, clean: float, delta: float) -> None:
    c = torch.tensor([clean], dtype=torch.float64).to(dtype)
    p = round_toward(c, torch.tensor([delta], dtype=torch.float64))
    assert abs(Fraction(float(p)) - Fraction(float(c))) <= abs(Fraction(delta))
    n = round_nearest(c, torch.tensor([delta], dtype=torch.float64))
    assert bool(torch.isfinite(n)) and float((n.double() - p.double()).abs()) <= 2 * float((next_toward(p, n).double() - p.double()).abs())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_radius_is_rounded_down(dtype: torch.dtype) -> None:
    for radius in (0.4, 0.1, 1 / 3, 8 / 255, 1.0, 1e-3):
        below = round_down(radius, dtype)
        assert below <= radius and below >= radius * (1 - 2 * torch.finfo(dtype).eps)
        assert float(torch.tensor(below, dtype=torch.float64).to(dtype)) == below


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["l1", "l2", "linf", "token", "joint"])
@pytest.mark.parametrize("box", [None, (0.1, 0.7), (0.0, 1.0)], ids=str)
def test_landing_fills_the_ball_and_stays_in_it(dtype: torch.dtype, norm: str, box: tuple[float, float] | None) -> None:
    g = torch.Generator().manual_seed(0)
    shape = (40, 6, 16)
    clean = torch.rand(shape, generator=g, dtype=torch.float64).to(dtype)
    clean[::3, :, ::2] = 0.0 if box is None else box[0]
    if box is not None:
        clean = clean.clamp(*box)
        clean = torch.where(clean.double() < box[0], next_toward(clean, torch.ones_like(clean)), clean)
        clean = torch.where(clean.double() > box[1], next_toward(clean, torch.zeros_like(clean)), clean)
    if norm in ("token", "joint"):
        if box is not None:
            pytest.skip("embeddings have no box")
        space = EmbeddingSpace(Chain(nn.Identity()), clean, EmbeddingBall(joint=norm == "joint"))
    else:
        space = InputSpace(Chain(nn.Identity()), clean, InputBall(norm, clip=box))
    delta = torch.randn(shape, generator=g, dtype=torch.float64)
    for radius in (0.05, 0.4, 3.0):
        limit = torch.full((len(clean),), radius, dtype=torch.float64)
        wanted = space.project(delta * 10, limit)
        point, distance = space.finalize(wanted, limit)
        change = point.double() - clean.double()
        assert bool((distance <= radius).all()) and torch.equal(space.measure(change), distance)
        if box is not None:
            assert float(point.double().min()) >= box[0] and float(point.double().max()) <= box[1]
        if norm != "linf":  # what the projection left unused stays unused; of the rest an ulp of one coordinate is missing, not one of each
            step = float(torch.finfo(dtype).eps) * 2
            assert bool((distance >= space.measure(wanted) - step - 1e-9).all())


@pytest.fixture(scope="module")
def lipschitz() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    from robustlip.data import load_data

    data = load_data("digits:test", limit=80)
    return load("digits-mlp-lipschitz"), torch.as_tensor(data.x), torch.as_tensor(data.y)


@pytest.mark.parametrize("dtype", [HALVES[0], pytest.param(HALVES[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize(("norm", "radius"), [("l2", 0.4), ("linf", 0.06), ("l1", 1.0)])
def test_half_precision_is_attacked_as_well_as_float32(lipschitz: tuple, dtype: torch.dtype, norm: str, radius: float) -> None:
    model, x, y = lipschitz
    single = by_name("min", descent=40, steps=4)(model, x, y, InputBall(norm))
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    assert torch.equal(x.float(), lipschitz[1])
    half = by_name("min", descent=40, steps=4)(model, x, y, InputBall(norm))
    both = (single.prediction == single.label) & (half.prediction == half.label)
    assert half.success.all()
    ratio = half.radius[both] / single.radius[both]
    assert np.median(ratio) <= (1.02 if dtype == torch.bfloat16 else 1.005), np.median(ratio)
    assert abs(PGD(steps=20)(model, x, y, InputBall(norm, radius)).success.sum() - (single.radius <= radius).sum()) <= 4


def _reordered(model: nn.Module, seed: int) -> nn.Module:
    """The same function with its hidden units in another order: sums are taken in another order, as on another machine."""
    model = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for a, b in itertools.pairwise(linear):
        order = torch.randperm(a.out_features, generator=g)
        a.weight.data, a.bias.data, b.weight.data = a.weight.data[order], a.bias.data[order], b.weight.data[:, order]
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_evidence_survives_another_batch_and_another_order_of_sums(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10)).to(dtype).eval()
    x = torch.rand(60, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        y = model(x).argmax(1)
    seen = by_name("min", descent=30, steps=2)(model, x, y, InputBall("l2"))
    assert seen.success.all()
    points = seen.adversarial
    with torch.no_grad():
        runs = [torch.cat([model(p) for p in points.split(size)]) for size in (1, 7)]
        runs += [_reordered(model, seed)(points) for seed in range(8)]
    for logits in runs:
        assert bool((logits.argmax(1) != y).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_excess_asks_for_two_ulps_and_little_more(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    labels = torch.zeros(4, dtype=torch.int64)
    steps = torch.tensor([0.0, 1.0, 2.0, 20.0], dtype=torch.float64)
    logits = torch.stack([torch.ones(4, dtype=torch.float64), 1 + steps * eps, torch.zeros(4, dtype=torch.float64)], dim=1).to(dtype)
    assert violation(logits, labels).tolist() == [s * eps for s in steps.tolist()]
    assert (excess(logits, labels) > 0).tolist() == [False, False, dtype in HALVES, True]
    assert (excess(-logits.flip(1), torch.full_like(labels, 1)) > 0).tolist() == [True] * 4


def test_tokens_in_half_precision_are_filled_one_by_one() -> None:
    torch.manual_seed(0)
    model = Chain(Patchify(2), nn.Linear(4, 16), nn.Flatten(), nn.Linear(64, 5)).to(torch.bfloat16)
    model.embedding_depth = 2
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    with torch.no_grad():
        y = model(x).argmax(1)
        clean = model.embed(x)
    radius = 0.7 * float(np.median(by_name("min", rounds=0)(model, x, y, EmbeddingBall()).radius))
    seen = PGD(steps=5)(model, x, y, EmbeddingBall(radius))
    sizes = (seen.adversarial.double() - clean.double()).norm(dim=-1)
    assert not seen.success.all() and float(sizes.max()) <= radius
    assert float(sizes[~torch.as_tensor(seen.success)].min()) >= 0.98 * radius
