"""Guaranteed spectral norms: never below the exact norm, and close to it, for matrices of every size and shape."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustlip.errors import BadInput
from robustlip.numerics.spectral import (
    gram_iteration_bound,
    infinity_to_two_bound,
    largest_eigenvalue_bound,
    one_to_two_bound,
    quartic_bound,
    spectral_norm_bound,
    spectral_norm_estimate,
    spectral_norm_quick,
)

BOUNDS = [spectral_norm_bound, lambda w: gram_iteration_bound(w, 12), spectral_norm_quick]


def closeness(bound, of_the_others: float) -> float:
    return 0.04 if bound is spectral_norm_quick else of_the_others


def exact_norm(weight: torch.Tensor) -> mpmath.mpf:
    """σ in 60 digits, by mpmath: shares nothing with the code under test."""
    with mpmath.workdps(60):
        return max(mpmath.svd_r(mpmath.matrix(weight.double().tolist()), compute_uv=False))


@pytest.mark.parametrize("bound", BOUNDS)
@given(seed=st.integers(0, 10**6), m=st.integers(1, 6), n=st.integers(1, 6), exponent=st.integers(-300, 300))
@settings(max_examples=40, deadline=None)
def test_bound_is_never_below_the_exact_norm(bound, seed, m, n, exponent) -> None:
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10.0**exponent
    with mpmath.workdps(60):
        truth = exact_norm(weight)
        got = mpmath.mpf(float(bound(weight)))
        assert got >= truth
        assert got <= truth * (1 + mpmath.mpf(closeness(bound, 5e-3)))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("gap", [0.0, 1e-14, 1e-9, 1e-3])
def test_clustered_singular_values(bound, gap) -> None:
    """Where power iteration never arrives: σ₁ and σ₂ equal or nearly so, in a matrix with known norm."""
    q, _ = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64))
    p, _ = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64))
    values = torch.full((50,), 1.0 - gap, dtype=torch.float64)
    values[0] = 1.0
    weight = q * values @ p
    assert float(bound(weight)) >= 1 - 1e-14
    assert float(bound(weight)) <= 1 + closeness(bound, 1e-3)


@pytest.mark.parametrize("bound", BOUNDS)
def test_batches_shapes_and_dtypes(bound) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(2, 3, 20, 30).to(dtype)
        truth = torch.linalg.matrix_norm(weight.double(), 2)
        got = bound(weight)
        assert got.dtype == torch.float64 and got.shape == (2, 3)
        assert bool((got >= truth * (1 - 1e-14)).all() and (got <= truth * (1 + closeness(bound, 1e-3))).all())


@pytest.mark.parametrize("bound", BOUNDS)
def test_extreme_matrices(bound) -> None:
    assert float(bound(torch.zeros(3, 4))) == 0.0
    assert bool(torch.isfinite(bound(torch.full((3, 4), 1e30))))
    for scale in (1e-45, 1e-30, 1e30):
        weight = torch.full((3, 4), scale, dtype=torch.float32)  # 1e-45 is subnormal: stored as 1.4e-45
        truth = float(weight.double()[0, 0]) * 12**0.5
        assert truth <= float(bound(weight)) <= truth * (1 + closeness(bound, 1e-3))
    u, v = torch.randn(40, 1, dtype=torch.float64), torch.randn(1, 30, dtype=torch.float64)
    assert float(bound(u @ v)) >= float(u.norm() * v.norm()) * (1 - 1e-13)


def test_power_iteration_is_below_and_says_so() -> None:
    weight = torch.diag(torch.tensor([1.0, 0.9999, 0.9998] + [0.5] * 40, dtype=torch.float64))
    assert float(spectral_norm_estimate(weight, 20)) < 1.0 - 1e-7 < float(spectral_norm_bound(weight))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_refused(value) -> None:
    weight = torch.eye(3)
    weight[1, 2] = value
    for bound in BOUNDS:
        with pytest.raises(BadInput, match="finite"):
            bound(weight)


@given(seed=st.integers(0, 10**6), m=st.integers(1, 5), n=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_input_norms_against_all_vertices(seed, m, n) -> None:
    """‖W‖_{∞→2} and ‖W‖_{1→2} are attained at vertices of the cube and the cross-polytope: enumerate them."""
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    signs = torch.tensor(np.array(np.meshgrid(*[[-1.0, 1.0]] * n)).reshape(n, -1))
    cube = float((weight @ signs).norm(dim=0).max())
    assert cube <= float(infinity_to_two_bound(weight)) <= cube * (np.pi / 2) * n**0.5
    columns = float(weight.norm(dim=0).max())
    assert columns <= float(one_to_two_bound(weight)) <= columns * (1 + 1e-9)


def largest_squares(weight: torch.Tensor) -> float:
    """‖(Wx)∘(Wx)‖ by gradient ascent over unit x, from every row and from random starts."""
    generator = torch.Generator().manual_seed(1)
    n = weight.shape[1]
    start = torch.cat([weight, torch.randn(32, n, generator=generator, dtype=torch.float64)])
    x = torch.nn.functional.normalize(start + 1e-9, dim=-1)
    for _ in range(200):
        # A step of power iteration on the gradient 4Wᵀ(Wx)³ cannot lower a convex function of x on the sphere.
        x = torch.nn.functional.normalize((x @ weight.T) ** 3 @ weight + 1e-12 * x, dim=-1)
    return float((x @ weight.T).square().norm(dim=-1).amax())


QUARTIC = {
    "random": (torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0.55),
    "wide": (torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0.7),
    "orthonormal": (torch.eye(8, dtype=torch.float64), 0.9),
    "all rows alike": (torch.ones(50, 5, dtype=torch.float64), 0.99),
    "one row": (torch.tensor([[3.0, 4.0]], dtype=torch.float64), 0.99),
    "one large row": (torch.cat([torch.full((1, 6), 10.0), 0.1 * torch.ones(20, 6)]).double(), 0.9),
    "rank two": (torch.randn(30, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64) @ torch.eye(2, 9, dtype=torch.float64), 0.5),
}


@pytest.mark.parametrize("name", QUARTIC)
@pytest.mark.parametrize("exponent", [0, -140, 120])
def test_quartic_bound_is_never_below_what_ascent_finds(name, exponent) -> None:
    weight, close = QUARTIC[name]
    found = largest_squares(weight)
    bound = quartic_bound(weight * 10.0**exponent) * 10.0 ** (-2 * exponent)
    assert found <= bound * (1 + 1e-9)
    assert bound * close <= found
    largest_row = float(weight.norm(dim=-1).amax())
    assert bound <= largest_row * float(torch.linalg.matrix_norm(weight, 2)) * (1 + 1e-9)


def test_quartic_bound_of_zero_and_of_what_squares_to_nothing() -> None:
    assert quartic_bound(torch.zeros(3, 4)) == 0.0
    assert quartic_bound(torch.full((3, 4), 1e-200, dtype=torch.float64)) > 0.0


SPREADS = {
    "decaying": lambda n: torch.logspace(0, -9, n, dtype=torch.float64),
    "flat": lambda n: torch.ones(n, dtype=torch.float64),
    "two alike": lambda n: torch.cat([torch.tensor([1.0, 1.0 - 1e-9], dtype=torch.float64), torch.full((n - 2,), 0.1, dtype=torch.float64)]),
    "one": lambda n: torch.nn.functional.one_hot(torch.tensor(3), n).double(),
}


@pytest.mark.parametrize("exponent", [-900, -536, 0, 900])
@pytest.mark.parametrize("name", SPREADS)
def test_the_largest_eigenvalue_is_bounded_from_above_and_closely(name, exponent) -> None:
    torch.manual_seed(2)
    n = 12
    q, _ = torch.linalg.qr(torch.randn(5, n, n, dtype=torch.float64))
    symmetric = torch.ldexp((q * SPREADS[name](n)) @ q.mT, torch.tensor(exponent))
    found = largest_eigenvalue_bound(symmetric)
    for matrix, value in zip(symmetric, found, strict=True):
        with mpmath.workdps(40):
            exact = max(mpmath.eigsy(mpmath.matrix(((matrix + matrix.mT) / 2).tolist()), eigvals_only=True))
        assert exact <= value.item() <= 1.03 * exact


def test_the_largest_eigenvalue_stands_where_power_iteration_is_wrong(monkeypatch) -> None:
    """It begins in the eigenspace of a small eigenvalue, so the factorisation fails in some of the batch, and what it left over counts."""
    small = torch.diag(torch.tensor([1.0, 1.0, 8.0, 1.0], dtype=torch.float64))
    fine = torch.diag(torch.tensor([2.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    blind = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64).unsqueeze(-1)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: blind)
    found = largest_eigenvalue_bound(torch.stack([small, fine, small, torch.zeros_like(fine)]))
    assert (found[[0, 2]] >= 8.0).all() and (found[[0, 2]] <= 8.8).all() and 2.0 <= found[1] <= 2.06 and 0.0 <= found[3] < 1e-290
    # A factor that is not one: whatever it is, the residual makes up for it.
    wrong = torch.zeros_like(fine)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: (wrong.expand_as(a), torch.zeros(a.shape[:-2], dtype=torch.int32)))
    assert (largest_eigenvalue_bound(torch.stack([small, fine])) >= torch.tensor([8.0, 2.0])).all()


def test_matrices_that_overflowed_have_no_largest_eigenvalue() -> None:
    with pytest.raises(BadInput, match="NaN or infinity"):
        largest_eigenvalue_bound(torch.full((2, 2), float("inf"), dtype=torch.float64))


@pytest.mark.parametrize("lowest", [0.0, 0.9, 0.999])
def test_wide_matrices_of_flat_spectra_have_bounds_within_a_few_percent(lowest: float) -> None:
    """Power iteration stays below the top there, and a factor of tI − S is tried with larger t: never below the truth, whatever was tried."""
    generator = torch.Generator().manual_seed(0)
    n = 600
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    values = torch.linspace(lowest, 1.0, n, dtype=torch.float64)
    values[0] = 1.25 if lowest == 0.0 else 1.0
    symmetric = (q * values) @ q.T
    for scale in (1.0, 1e-200):
        bound = float(largest_eigenvalue_bound(symmetric * scale)) / scale
        assert float(values.amax()) * (1 - 1e-12) <= bound <= 1.09 * float(values.amax())
