"""Constraint methods: the map of singular values, the guarantee on adversarial spectra, and the error if a guarantee fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from robustlip.constraints import (
    METHODS,
    Constraint,
    ConstraintViolation,
    Target,
    fast_norm_bound,
    hard_cap_msign,
    hard_cap_polynomial,
    make_method,
    soft_cap,
    soft_cap_coupling,
    targets_of,
    top_singular,
)
from robustlip.constraints.hardcap import _QUINTICS, hard_cap_eigh, hard_cap_polynomial_eigh
from robustlip.constraints.norms import fixed_vectors, probe
from robustlip.constraints.stiefel import near_orthogonal
from robustlip.errors import BadInput
from robustlip.models import LipschitzGPT
from robustlip.muon import POLYNOMIALS, Muon, RowMomentum
from robustlip.numerics.spectral import spectral_norm_bound

REAL = [name for name in METHODS if name != "none"]
PROMISING = [name for name in REAL if math.isfinite(make_method(name).guarantee.factor)]

SPECTRA = {
    "flat at the cap": lambda r: torch.ones(r),
    "one large": lambda r: torch.cat([torch.tensor([3.0]), torch.full((r - 1,), 1e-3)]),
    "rank one": lambda r: torch.cat([torch.tensor([2.0]), torch.zeros(r - 1)]),
    "two that tie": lambda r: torch.cat([torch.tensor([1.5, 1.5]), torch.full((r - 2,), 0.5)]),
    "a cluster around the cap": lambda r: 1 + 1e-3 * torch.linspace(-1, 1, r),
    "geometric": lambda r: 10.0 ** torch.linspace(0.5, -6, r),
    "zeros": lambda r: torch.zeros(r),
    "uniform": lambda r: torch.linspace(0, 1.2, r),
    "past √2": lambda r: torch.linspace(0, 2.8, r),
    "far out": lambda r: torch.linspace(0, 1e3, r),
    "tiny": lambda r: torch.full((r,), 1e-20),
}


def with_spectrum(values: torch.Tensor, m: int, n: int) -> torch.Tensor:
    """A float64 matrix (m, n) with these singular values and random directions."""
    u, _ = torch.linalg.qr(torch.randn(m, len(values), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))
    return (u * values.double()) @ v.mT


def singular(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(weight.detach().double())


def square(values: torch.Tensor, w_max: float = 1.0) -> Target:
    return Target("weight", nn.Parameter(with_spectrum(values, len(values), len(values)).float()), w_max)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("m", "n", "slices", "axis"), [(24, 40, 1, 0), (40, 24, 1, 0), (32, 24, 4, 0), (24, 32, 4, 1)])
@pytest.mark.parametrize("method", PROMISING)
def test_one_map_of_any_spectrum_keeps_the_guarantee(method, m, n, slices, axis, spectrum) -> None:
    """float32, measured with the guaranteed bound; nothing is known of the step, as under AdamW. Whole and by head."""
    rows, columns = (m // slices, n) if axis == 0 else (m, n // slices)
    parts = [with_spectrum(SPECTRA[spectrum](min(rows, columns)), rows, columns) * math.sqrt(rows / columns) * 0.7 for _ in range(slices)]
    target = Target("weight", nn.Parameter(torch.cat(parts, axis).float()), 0.7, slices, axis)
    constraint = Constraint([target], method)
    constraint.apply(target)
    assert constraint.check()["weight"] <= 0.7 * constraint.guarantee.factor * (1 + 2e-4)
    if not target.weight.any():
        assert spectrum in ("zeros", "tiny")


@pytest.mark.parametrize("name", ["muon", "adamw", "sgd"])
@pytest.mark.parametrize("method", REAL)
def test_every_method_attaches_to_every_optimiser(method, name) -> None:
    """One call; a model with heads, embeddings and an unembedding; gradients that push one head and one token. No guarantee, no error."""
    model = LipschitzGPT("abcdef", 16, 4, 1)
    constraint = Constraint(targets_of(model, 1.0, overrides={"head.weight": 3.0, "mlp*": 2.0}, rows=["head.weight"]), method)
    constraint.project()
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = {
        "muon": lambda: [Muon(matrices, lr=0.05), RowMomentum(rest, lr=1.0)],
        "adamw": lambda: [torch.optim.AdamW(model.parameters(), lr=0.3)],
        "sgd": lambda: [torch.optim.SGD(model.parameters(), lr=1e-3)],
    }[name]()
    constraint.attach(*optimizers)
    heads = model[1].branch.query.weight
    for _ in range(12):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (-model(torch.randint(6, (4, 8))).square().sum() - 1e3 * heads[:4].sum() - 1e3 * model[0].weight[2].sum()).backward()
        for optimizer in optimizers:
            optimizer.step()
        measured = constraint.check()  # raises where something is promised and does not hold
    for target in constraint.targets:
        if target.rows or method in PROMISING:
            assert measured[target.name] <= constraint.limit(target) < math.inf
    assert bool(torch.isfinite(model(torch.randint(6, (2, 8)))).all())


def test_guarantees_are_as_stated() -> None:
    kinds = {name: str(make_method(name).guarantee) for name in REAL}
    assert kinds == {
        "weight-decay": "none", "spectral-weight-decay": "none", "spectral-normalize": "hard", "stiefel": "hard", "spectral-hammer": "none",
        "soft-cap": "hard", "hard-cap": "up to overshoot 0.011", "hard-cap-msign": "up to overshoot 2e-05",
    }  # fmt: skip
    assert str(make_method("stiefel", polynomial="torch").guarantee) == "up to overshoot 0.2"
    assert Constraint([], "none").guarantee.kind == "none"
    for method in REAL:
        assert type(make_method(method)).__doc__


def test_published_hard_cap_overshoots_to_what_is_stated() -> None:
    """docs/theory.md, section 12: 1.0109 on [0, 3], in exact arithmetic; and the matrix version has that image."""
    x = np.linspace(0, 3, 10**6 + 1)
    for a, b, c in _QUINTICS:
        x = a * x + b * x**3 + c * x**5
    assert 1.0108 < x.max() <= make_method("hard-cap").guarantee.factor and x.min() >= 0
    target = square(torch.linspace(0, 3, 64))
    Constraint([target], "hard-cap").apply(target, update_norm=1.9)
    assert float(singular(target.weight).max()) == pytest.approx(1.0109, abs=2e-3)
    inside = square(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    Constraint([inside], "hard-cap").apply(inside, update_norm=0.1)
    assert torch.allclose(singular(inside.weight).flip(0), torch.tensor([0.0953, 0.2908, 0.4979, 0.7118, 0.9005]).double(), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (24, 48), (96, 24), (1, 7)])
def test_soft_cap_is_its_cubics_of_the_singular_values(shape, dtype) -> None:
    """Square and wide matrices are computed by different products; each matrix of a stack with its own strength."""
    sigma = torch.linspace(0, 1.3, min(shape)).double() if min(shape) > 1 else torch.tensor([1.2]).double()
    matrix = torch.stack([with_spectrum(sigma, *shape), with_spectrum(sigma / 2, *shape), with_spectrum(sigma, *shape)]).to(dtype)
    strength = torch.tensor([0.15, 0.3, 0.0], dtype=dtype)[:, None, None]
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    a = strength.double()[..., 0]
    s = s - a * s**3
    expected = u @ torch.diag_embed(s + a * s**3) @ v
    got = soft_cap(matrix, strength)
    torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    assert torch.equal(got[2], matrix[2])
    torch.testing.assert_close(soft_cap(matrix[0], 0.15), got[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (24, 48), (96, 24), (1, 7)])
def test_published_hard_cap_is_its_polynomial_of_the_singular_values(shape, dtype) -> None:
    """Square and wide matrices are computed by different products: both against the SVD, from 0 to the end of the domain."""
    count = min(shape)
    sigma = torch.linspace(0, 3, count).double() if count > 1 else torch.tensor([2.9]).double()
    matrix = torch.stack([with_spectrum(sigma, *shape), with_spectrum(sigma / 1e4, *shape)]).to(dtype)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    for a, b, c in _QUINTICS:
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag_embed(s) @ v
    cap = torch.tensor([0.25, 4.0], dtype=dtype)[:, None, None]
    maps = (hard_cap_polynomial(matrix), torch.stack([hard_cap_polynomial(one) for one in matrix]),
            hard_cap_polynomial(cap * matrix, cap) / cap, hard_cap_polynomial_eigh(cap * matrix, cap) / cap)  # fmt: skip
    for got in maps:
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=5e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24)])
def test_hard_cap_through_msign_is_the_clipped_svd(shape, spectrum) -> None:
    """½[(w + σ) − |w − σ|] compared with the definition, float64; 'far out' loses digits of values far below the largest."""
    w = 0.8
    matrix = with_spectrum(w * SPECTRA[spectrum](min(shape)), *shape)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    wanted = (u * s.clamp_max(w)) @ v
    cap = torch.tensor([[[w]]], dtype=torch.float64)
    got = hard_cap_msign(matrix[None], cap)[0]
    assert float(singular(got).max()) <= w * (1 + 2e-5)
    if spectrum != "far out":
        assert float(torch.linalg.matrix_norm(got - wanted, 2)) <= 1e-3 * w
    # By eigenvalues nothing is lost but digits, of what is far below the largest.
    assert float(torch.linalg.matrix_norm(hard_cap_eigh(matrix[None], cap)[0] - wanted, 2)) <= 1e-9 * w


def test_msign_overshoot_by_its_polynomial() -> None:
    """Scalar maps on a fine grid: the stated overshoot for σ ≤ √2 w, and no value under w leaves [σ, w]."""

    def sign(t: np.ndarray) -> np.ndarray:
        y = np.abs(t)
        for a, b, c in POLYNOMIALS["six-step"].steps:
            y = a * y + b * y**3 + c * y**5
        for _ in range(4):
            y = 1.5 * y - 0.5 * y**3
        return np.sign(t) * y

    def of_msign(sigma: np.ndarray) -> np.ndarray:
        t = sigma / 2**0.5
        for _ in range(5):
            t = 1.5 * t - 0.5 * t**3
        return t

    sigma = 1 + np.geomspace(1e-8, 2**0.5 - 1, 10**6)
    s, t = sign(1 - sigma**2), of_msign(sigma)
    assert abs(t - 1).max() < 1e-12 and 1e-6 < (0.5 * ((1 - s) * t + (1 + s) * sigma)).max() - 1 <= 2e-5
    sigma = np.linspace(0, 1, 10**6)
    s, t = sign(1 - sigma**2), of_msign(sigma)
    assert t.max() <= 1 + 1e-12
    capped = 0.5 * ((1 - s) * t + (1 + s) * sigma)
    assert capped.max() <= 1 + 1e-12 and (capped - sigma).min() >= -1e-12 and (capped - sigma).max() <= 2e-5


def test_the_maps_of_the_methods_without_a_guarantee() -> None:
    """docs/theory.md, section 12, first column: what happens to each singular value."""
    values = torch.tensor([3.0, 1.5, 0.5, 0.2])
    for method, rate, wanted in (
        (make_method("spectral-hammer"), 0.0, [1.5, 1.0, 0.5, 0.2]),
        (make_method("spectral-weight-decay", strength=0.25), 0.0, [2.25, 1.5, 0.5, 0.2]),
        (make_method("weight-decay", strength=0.5), 0.2, [2.7, 1.35, 0.45, 0.18]),
    ):
        target = square(values)
        constraint = Constraint([target], method)
        constraint.apply(target, rate=rate)
        assert torch.allclose(singular(target.weight), torch.tensor(wanted).double(), atol=1e-4), method.name
        assert constraint.limit(target) == math.inf and constraint.check()["weight"] > 1


@pytest.mark.parametrize("method", ["spectral-normalize", "hard-cap-msign", "soft-cap"])
def test_what_is_inside_its_cap_stays_as_it_is(method) -> None:
    """min(w_max, σ) and M / max(1, σ/w_max) are the identity there; soft cap is when the step left nothing to bend."""
    target = square(torch.linspace(0.05, 0.9, 12))
    before = target.weight.detach().clone()
    Constraint([target], method).apply(target)
    assert torch.allclose(target.weight, before, atol=2e-5)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("method", ["hard-cap", "hard-cap-msign"])
def test_hard_caps_of_a_cpu_and_of_a_gpu_say_the_same(method, spectrum) -> None:
    """float32: the guarantee of both implementations, with eigenvalues close together, at the cap, far above it or absent."""
    cap = torch.tensor([0.3, 5.0])[:, None, None]
    stack = cap * torch.stack([with_spectrum(SPECTRA[spectrum](24).clamp_max(3.0), 24, 40)] * 2).float()
    by_products, by_eigenvalues = {
        "hard-cap": (hard_cap_polynomial, hard_cap_polynomial_eigh),
        "hard-cap-msign": (hard_cap_msign, hard_cap_eigh),
    }[method]
    products, eigenvalues = by_products(stack, cap), by_eigenvalues(stack, cap)
    torch.testing.assert_close(products / cap, eigenvalues / cap, rtol=0.0, atol=1e-3)
    for mapped in (products, eigenvalues):
        assert float(spectral_norm_bound(mapped / cap).max()) <= make_method(method).guarantee.factor * (1 + 1e-5)


def test_values_that_are_not_finite_come_out_as_nan_and_stop_the_run() -> None:
    for method in ("hard-cap", "hard-cap-msign", "stiefel"):
        for bad in (math.nan, math.inf):
            target = square(torch.linspace(0.1, 0.9, 6))
            constraint = Constraint([target], method)
            optimizer = torch.optim.SGD([target.weight], lr=1.0)
            constraint.attach(optimizer)
            target.weight.grad = torch.full((6, 6), bad)
            with pytest.raises(ConstraintViolation, match="expected finite weights"):
                optimizer.step()
    # Finite weights whose squares are not: what cannot be mapped is not handed back as it was.
    huge = with_spectrum(torch.tensor([1.0, 1e25]), 4, 6).float()[None]
    assert bool(hard_cap_eigh(huge, torch.ones(1, 1, 1)).isnan().all())


@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24)])
def test_hard_cap_of_matrices_far_outside(shape) -> None:
    """Float32 knows an eigenvalue to a unit of the largest, so that next to σ = 10⁴ one of 3 could be any from 0 to 4: one map is not enough."""
    values = torch.cat([torch.linspace(0.2, 3.0, min(shape) - 2), torch.tensor([1e4, 3e3])])
    stack = with_spectrum(values, *shape).float()[None]
    for cap in (1.0, 0.01):
        mapped = hard_cap_eigh(stack * cap, torch.full((1, 1, 1), cap))
        assert float(singular(mapped[0]).max()) <= cap * (1 + 2e-5)


def test_hard_cap_of_a_cpu_leaves_what_is_inside_to_the_last_bit() -> None:
    inside, outside = (with_spectrum(torch.linspace(0.1, top, 24), 24, 40).float() for top in (0.99, 1.2))
    assert torch.equal(hard_cap_eigh(inside[None], torch.ones(1, 1, 1))[0], inside)
    both = hard_cap_eigh(torch.stack([inside, outside]), torch.ones(2, 1, 1))
    assert torch.equal(both[0], inside)
    assert float(singular(both[1]).max()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("m", "n"), [(24, 24), (24, 60), (60, 24)])
def test_matrices_near_orthogonal_become_so_and_never_more(m, n) -> None:
    """The series against its scalar map; below the cap at every σ for which it is used; no answer where one matrix of the stack is too far."""
    cap = torch.tensor([0.7, 3.0], dtype=torch.float64)[:, None, None]
    sigma = torch.linspace(0.87, 1.12, 24, dtype=torch.float64)
    got = near_orthogonal(cap * torch.stack([with_spectrum(sigma, m, n), with_spectrum(torch.ones(24).double(), m, n)]), cap)
    assert got is not None
    e = 1 - sigma**2
    wanted = sigma * (1 + e / 2 + 3 / 8 * e**2 + 5 / 16 * e**3)
    torch.testing.assert_close(singular(got[0] / 0.7), wanted.sort(descending=True).values, rtol=0.0, atol=1e-12)
    assert 1 - 2e-3 < float(wanted.min()) and float(wanted.max()) <= 1
    torch.testing.assert_close(singular(got[1] / 3.0), torch.ones(24).double(), rtol=0.0, atol=1e-12)
    far = torch.stack([with_spectrum(torch.ones(24).double(), m, n), with_spectrum(torch.cat([torch.ones(23), torch.tensor([0.5])]).double(), m, n)])
    assert near_orthogonal(cap * far, cap) is None and near_orthogonal(cap[:1] * far[:1], cap[:1]) is not None
    x = torch.linspace(1e-6, 2**0.5, 10**6, dtype=torch.float64)
    e = 1 - x**2
    image = x * (1 + e / 2 + 3 / 8 * e**2 + 5 / 16 * e**3)
    assert float(image.max()) <= 1 + 1e-15 and 1 - 0.012 <= float(image[e.abs() <= 0.42].min()) <= 1 - 0.01


def test_one_value_too_far_for_the_series_ends_it() -> None:
    """|1 − σ²| = 0.5 of one singular value: the series would leave it 2 % under the cap, where 1.2 % is promised."""
    values = torch.ones(24)
    values[0] = 0.5**0.5
    stack = with_spectrum(values, 24, 24)[None]
    assert near_orthogonal(stack, torch.ones(1, 1, 1, dtype=stack.dtype)) is None
    target = Target("weight", nn.Parameter(stack[0].clone()), 1.0)
    Constraint([target], "stiefel").apply(target)
    assert 0.988 <= float(singular(target.weight).min()) <= float(singular(target.weight).max()) <= 1.0


def test_stiefel_stays_at_its_cap_under_steps_of_any_size() -> None:
    """Small steps take the series, large ones the polynomial; a named polynomial always maps."""
    for lr in (0.02, 0.1, 0.5):
        target = square(torch.linspace(0.05, 1.0, 20), 0.7)
        constraint = Constraint([target], "stiefel")
        optimizer = Muon([target.weight], lr=lr)
        constraint.project()
        constraint.attach(optimizer)
        for _ in range(5):
            target.weight.grad = torch.randn(20, 20)
            optimizer.step()
            constraint.check()
        assert float(singular(target.weight).min()) >= 0.7 * 0.985
    target = square(torch.ones(20), 1.0)
    Constraint([target], make_method("stiefel", polynomial="six-step")).apply(target)
    assert float(singular(target.weight).max()) <= 0.9995
    target = square(torch.ones(20), 1.0)
    Constraint([target], "stiefel").apply(target)
    assert float(singular(target.weight).min()) >= 1 - 1e-5


@pytest.mark.parametrize("w_max", [1e-25, 1e-12, 1e12, 1e25])
@pytest.mark.parametrize("method", ["hard-cap", "hard-cap-msign", "stiefel", "spectral-normalize", "soft-cap"])
def test_caps_whose_squares_vanish_or_overflow(method, w_max) -> None:
    """The same map as under a cap of 1, float32: MMᵀ of such weights is 0 or infinite."""
    values = torch.linspace(0.1, 1.3, 12)
    plain, tiny = square(values), square(values)
    with torch.no_grad():
        tiny.weight.copy_((plain.weight.double() * w_max).float())
    tiny = Target("weight", tiny.weight, w_max)
    for target in (plain, tiny):
        constraint = Constraint([target], method)
        constraint.apply(target)
        constraint.check()
    torch.testing.assert_close(tiny.weight.double() / w_max, plain.weight.double(), rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("w_max", [1e-12, 1e12])
def test_steps_under_such_caps_are_in_units_of_them_too(w_max) -> None:
    """A stated update decides how far out the published hard cap looks: one of 6 caps has to be seen as 6, whatever the cap."""
    matrix = with_spectrum(torch.linspace(0.1, 7.0, 12), 12, 12)
    mapped = []
    for cap in (1.0, w_max):
        target = Target("weight", nn.Parameter((matrix * cap).float()), cap)
        Constraint([target], "hard-cap").apply(target, update_norm=6 * cap)
        mapped.append(target.weight.detach().double() / cap)
    torch.testing.assert_close(mapped[1], mapped[0], rtol=0.0, atol=2e-6)
    assert float(singular(mapped[1]).max()) <= 1.0109 * (1 + 1e-5)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_stiefel_of_sizes_whose_squares_overflow_or_vanish(size) -> None:
    target = square(torch.linspace(0.05, 1.0, 20) * size, 0.7)
    Constraint([target], "stiefel").apply(target)
    assert 0.7 * 0.99 <= float(singular(target.weight).min()) <= float(singular(target.weight).max()) <= 0.7


def test_stiefel_makes_all_singular_values_equal() -> None:
    target = square(torch.linspace(0.05, 2, 20), 0.7)
    Constraint([target], "stiefel").apply(target)
    values = singular(target.weight)
    assert float(values.max()) <= 0.7 and float(values.min()) >= 0.7 * 0.99


def test_weight_decay_under_muon_stays_at_its_equilibrium() -> None:
    """‖W‖ ≤ max(initial, peak/λ) at any schedule: (1 − λη)(p/λ + pη) < p/λ. Same-sign gradients, which is the worst."""
    target = square(torch.full((12,), 0.5))
    optimizer = Muon([target.weight], lr=0.3)
    Constraint([target], make_method("weight-decay", strength=0.5)).attach(optimizer)
    gradient = torch.randn(12, 12)
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 0.3 if step % 2 else 0.01
        target.weight.grad = gradient
        optimizer.step()
    assert 1.5 < float(singular(target.weight)[0]) <= POLYNOMIALS["six-step"].peak / 0.5 * (1 + 1e-5)


def test_soft_cap_without_a_stated_update_leaves_what_is_inside() -> None:
    inside = square(torch.linspace(0.1, 0.98, 8))
    before = inside.weight.detach().clone()
    Constraint([inside], "soft-cap").apply(inside)
    assert torch.equal(inside.weight, before)
    outside = square(torch.cat([torch.tensor([1.1]), torch.full((7,), 0.2)]))
    Constraint([outside], "soft-cap").apply(outside)
    values = singular(outside.weight)
    assert 0.97 < float(values[0]) <= 1 and torch.allclose(values[1:], torch.full((7,), 0.2).double(), atol=1e-3)
    with pytest.raises(BadInput, match="lower the learning rate"):
        soft_cap_coupling(1.0, 0.5)


def test_one_batch_maps_as_each_alone() -> None:
    """Same-shaped matrices are mapped in one stack: with caps and learning rates of their own."""
    torch.manual_seed(1)
    for method in REAL:
        weights = [nn.Parameter(torch.randn(8, 12)) for _ in range(3)]
        alone = [nn.Parameter(w.detach().clone()) for w in weights]
        targets = [Target(str(i), w, 1.0 + i) for i, w in enumerate(weights)]
        for target in targets:
            Constraint([target], "spectral-normalize").apply(target)
        for w, a in zip(weights, alone, strict=True):
            a.data.copy_(w.data)
        gradients = [torch.randn(8, 12) for _ in weights]
        together = torch.optim.SGD([{"params": [w], "lr": 0.1 * (i + 1)} for i, w in enumerate(weights)])
        Constraint(targets, method).attach(together)
        for w, g in zip(weights, gradients, strict=True):
            w.grad = g
        together.step()
        for i, (w, a, g) in enumerate(zip(weights, alone, gradients, strict=True)):
            single = torch.optim.SGD([a], lr=0.1 * (i + 1))
            Constraint([Target("a", a, 1.0 + i)], method).attach(single)
            a.grad = g
            single.step()
            assert torch.allclose(w, a, atol=1e-5), method


class Lying(torch.optim.SGD):
    """Moves ten times further than it states."""

    def update_norm(self, lr: float) -> float:
        return lr / 10


def test_a_broken_premise_is_an_error() -> None:
    """A step larger than stated, weights that were never projected, weights changed by hand: the step raises an error."""
    weight = nn.Parameter(torch.eye(6))
    optimizer = Lying([weight], lr=0.4)
    Constraint([Target("w", weight, 1.0)], "soft-cap").attach(optimizer)
    weight.grad = -torch.eye(6)
    with pytest.raises(ConstraintViolation, match="check the optimiser's update_norm"):
        optimizer.step()

    far = nn.Parameter(5 * torch.eye(6))
    optimizer = Muon([far], lr=0.05)
    constraint = Constraint([Target("w", far, 1.0)], "soft-cap")
    constraint.attach(optimizer)
    far.grad = torch.eye(6)
    with pytest.raises(ConstraintViolation, match="project"):
        optimizer.step()
    with pytest.raises(ConstraintViolation, match="at most"):
        constraint.check()
    constraint.project()
    for _ in range(5):
        optimizer.step()
    with torch.no_grad():
        far.add_(torch.outer(torch.randn(6), torch.randn(6)))  # one direction, by hand
    with pytest.raises(ConstraintViolation):
        for _ in range(3):
            optimizer.step()


@pytest.mark.parametrize("method", ["spectral-normalize", "soft-cap", "weight-decay"])
def test_weights_that_are_not_finite_are_an_error(method) -> None:
    weight = nn.Parameter(torch.eye(4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    Constraint([Target("w", weight, 1.0)], method).attach(optimizer)
    weight.grad = torch.full((4, 4), torch.nan)
    with pytest.raises(ConstraintViolation, match="lower the learning rate"):
        optimizer.step()


def test_the_probe_is_below_and_finds_a_new_direction() -> None:
    matrix = with_spectrum(torch.linspace(0.1, 1, 40), 40, 40).float()[None]
    block = fixed_vectors(2, matrix)
    for _ in range(60):
        norm, block = probe(matrix, block)
        assert float(norm) <= float(singular(matrix[0])[0]) * (1 + 1e-5)
    assert float(norm) > 0.97
    u, v = torch.randn(40, 1), torch.randn(40, 1)
    u, v = u / u.norm(), v / v.norm()
    risen = matrix + 1.5 * u @ v.mT
    for _ in range(8):
        norm, block = probe(risen, block)
    assert float(norm) > 1.4
    zero = torch.zeros(1, 5, 5)
    _, block = probe(zero, fixed_vectors(2, zero))
    assert float(probe(torch.eye(5)[None], block)[0]) > 0.99


def test_norms_for_training() -> None:
    for values in SPECTRA.values():
        matrix = with_spectrum(values(20), 20, 30)
        u, sigma, v = top_singular(matrix, 200)
        assert float(sigma) <= float(fast_norm_bound(matrix)) * (1 + 1e-6) + 1e-18
        assert float(u.norm()) == pytest.approx(1, abs=1e-6) or not float(sigma) > 1e-12
        assert float(v.norm()) == pytest.approx(1, abs=1e-6) or not float(sigma) > 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", PROMISING)
def test_other_dtypes(method, dtype) -> None:
    target = Target("w", nn.Parameter(with_spectrum(torch.linspace(0, 2, 16), 16, 16).to(dtype)), 1.0)
    constraint = Constraint([target], method)
    constraint.apply(target)
    assert target.weight.dtype == dtype and constraint.check()["w"] > 0.9


def test_whole_matrices_under_row_momentum_are_held_by_what_is_measured() -> None:
    """Rows of RMS norm lr give a matrix step of up to sqrt(fan_in)·lr: a step stated as lr would violate a soft cap."""
    weight = nn.Parameter(torch.eye(8))
    optimizer = RowMomentum([weight], lr=0.05, inflation=1e9)
    constraint = Constraint([Target("w", weight, 1.0)], "soft-cap")
    constraint.attach(optimizer)
    for _ in range(6):
        weight.grad = -torch.ones(8, 8)
        optimizer.step()
        assert constraint.check()["w"] <= 1.0001


def test_row_momentum_moves_rows_by_no_more_than_it_says() -> None:
    table = nn.Parameter(torch.zeros(4, 9))
    optimizer = RowMomentum([table], lr=0.2, inflation=16)
    table.grad = torch.stack([torch.full((9,), g) for g in (0.0, 1e-4, 5.0, 1e6)])
    optimizer.step()
    rms = table.detach().square().mean(-1).sqrt()
    # momentum 0.9: the mean after one step is a tenth of the gradient.
    assert torch.allclose(rms, torch.tensor([0.0, 16 * 1e-5 * 0.2, 0.2, 0.2]), atol=1e-7)
    with pytest.raises(BadInput, match="inflation"):
        RowMomentum([table], inflation=0.0)


def test_muon_batches_across_groups() -> None:
    """Learning rates by layer do not change what each matrix gets."""
    a, b = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6, 8))
    starts, gradients = (a.detach().clone(), b.detach().clone()), (torch.randn(6, 8), torch.randn(6, 8))
    optimizer = Muon([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.05}])
    a.grad, b.grad = gradients
    optimizer.step()
    for p, start, gradient, rate in ((a, starts[0], gradients[0], 0.1), (b, starts[1], gradients[1], 0.05)):
        alone = nn.Parameter(start.clone())
        single = Muon([alone], lr=rate)
        alone.grad = gradient
        single.step()
        assert torch.allclose(p, alone, atol=1e-6)


def test_options_that_a_method_does_not_have() -> None:
    for options, message in (
        ({"name": "wishful"}, "constraint method"),
        ({"name": "soft-cap", "strength": 0.1}, "no strength"),
        ({"name": "soft-cap", "polynomial": "torch"}, "no polynomial"),
    ):
        with pytest.raises(BadInput, match=message):
            make_method(**options)


def test_no_weight_is_left_out_unsaid() -> None:
    """Weights that nothing would hold, and tables that are a Linear layer's too, have to be named or corrected."""
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(BadInput, match="name it in free"):
        targets_of(conv, 1.0)
    assert [t.name for t in targets_of(conv, 1.0, free=["0.*"])] == ["2.weight"]
    with pytest.raises(BadInput, match="match a weight"):
        targets_of(conv, 1.0, free=["0.*", "nothing"])
    with pytest.raises(BadInput, match="in_proj_weight"):
        targets_of(nn.TransformerEncoderLayer(8, 2, 16), 1.0)
    with pytest.raises(BadInput, match="original"):
        targets_of(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))), 1.0)
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(BadInput, match="untie"):
        targets_of(tied, 1.0)


def test_optimisers_that_do_not_own_the_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    constraint = Constraint(targets_of(model, 1.0), "soft-cap")
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model)
    with pytest.raises(BadInput, match=r"got none with 1\.weight"):
        constraint.attach(first)
    constraint.attach(first, second)


def test_far_below_its_cap_the_published_hard_cap_shrinks_and_the_exact_one_does_not() -> None:
    """Documented as such: 0.951 is the product of the quintics' slopes at 0."""
    for method, slope in (("hard-cap", 0.951204), ("hard-cap-msign", 1.0)):
        weight = nn.Parameter(torch.eye(6, dtype=torch.float64) * 1e-3)
        target = Target("w", weight, 1.0)
        Constraint([target], method).apply(target, update_norm=0.0)
        torch.testing.assert_close(singular(weight), torch.full((6,), slope * 1e-3, dtype=torch.float64), rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("decay", [1.0, 1.5, 1.99])
def test_soft_cap_under_a_decay_that_turns_the_weights_round(decay) -> None:
    """λη between 1 and 2 maps σ to −(λη − 1)σ, whose absolute value is |1 − λη|σ."""
    weight = nn.Parameter(torch.eye(6))
    optimizer = Muon([weight], lr=0.1, weight_decay=decay / 0.1)
    constraint = Constraint([Target("w", weight, 1.0)], "soft-cap")
    constraint.attach(optimizer)
    for _ in range(4):
        weight.grad = weight.detach().sign() * torch.eye(6)  # the step goes where the decay has sent the weight
        optimizer.step()
        constraint.check()


def test_steps_in_bfloat16_are_as_large_as_stated() -> None:
    """Products in 16 bits exceed the polynomial's peak."""
    torch.manual_seed(0)
    for size in (16, 128, 256):
        weight = nn.Parameter(torch.zeros(size, size))
        optimizer = Muon([weight], lr=1.0, dtype=torch.bfloat16)
        weight.grad = torch.randn(size, size)
        optimizer.step()
        assert float(singular(weight)[0]) <= optimizer.update_norm(1.0) * (1 + 1e-6)
    assert Muon([weight], lr=1.0).update_norm(1.0) == POLYNOMIALS["six-step"].peak


@pytest.mark.parametrize("exponent", [-36, -24, -13, -6, 0, 6, 12])
def test_norms_while_training_do_not_depend_on_the_scale(exponent) -> None:
    """float32 squares of small weights underflow, and powers of large ones overflow: neither may affect the bound, the probe or a map."""
    torch.manual_seed(0)
    matrix = torch.randn(2, 24, 16) * 10.0**exponent
    true = singular(matrix.double())[:, 0]
    assert bool((fast_norm_bound(matrix).double() >= true * (1 - 1e-6)).all())
    assert bool((fast_norm_bound(matrix).double() <= true * 1.02).all())
    block = fixed_vectors(2, matrix)
    for _ in range(30):
        norms, block = probe(matrix, block)
    assert bool((norms.double() <= true * (1 + 1e-5)).all()) and bool((norms.double() >= true * 0.9).all())
    lengths = torch.linalg.vector_norm(block, dim=-1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4)


@pytest.mark.parametrize("method", REAL)
def test_a_step_inside_of_autocast_is_mapped_in_full(method) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 12) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, inside in zip(layers, (False, True), strict=True):
        constraint = Constraint(targets_of(layer, 0.5), method)
        constraint.project()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        constraint.attach(optimizer)
        layer.weight.grad = torch.ones(12, 12)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            optimizer.step()
    assert torch.equal(layers[0].weight, layers[1].weight)


@pytest.mark.parametrize(
    ("shape", "slices", "axis", "w_max"),
    [((16, 4), 5, 0, 1.0), ((16, 4), 0, 0, 1.0), ((16, 4), 3, 1, 1.0), ((4, 4), 1, 0, -1.0), ((2, 1, 3, 3), 1, 0, 1.0)],
)
def test_targets_that_cannot_be_are_refused(shape, slices, axis, w_max) -> None:
    with pytest.raises(BadInput, match="expected"):
        Target("w", nn.Parameter(torch.zeros(shape)), w_max, slices, axis)


def test_polynomials_that_nobody_knows_are_refused() -> None:
    with pytest.raises(BadInput, match="expected a polynomial among"):
        make_method("stiefel", polynomial="x")
