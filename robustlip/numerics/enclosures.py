"""Matrix inequalities proved in float64, for certificates from semidefinite programs. The multipliers may come from any solver.

An `Enclosure` is a set of matrices: a midpoint and a radius for each entry (Rump 1999). Products enlarge the radius by their rounding error, so the
enclosure of a computed matrix contains the exact matrix. Two facts give matrix inequalities:

`dominating`: a symmetric A in the enclosure satisfies |A − mid| ≤ rad, hence mid + diag(Σ_j rad_ij) ⪰ A, because a symmetric matrix whose diagonal
entries are at least the sum of the absolute values of the rest of their rows is positive semidefinite (Gershgorin).

`proved_positive`: for any d > 0, N_s = diag(d)·N·diag(d) and any triangular L, N_s = LLᵀ + sI + (N_s − sI − LLᵀ) ⪰ s − ‖N_s − sI − LLᵀ‖, and
the norm of a symmetric matrix is at most its largest row sum of absolute values. L is a Cholesky factor of N_s − sI; the proof holds for any L.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustlip.numerics.rounding import TINY, U64, gamma

_TINY = TINY[torch.float64]


@dataclass(frozen=True)
class Enclosure:
    """All matrices A with |A − mid| ≤ rad for each entry. mid, rad: float64 (m, n) on the CPU; rad = None means radius 0."""

    mid: Tensor
    rad: Tensor | None = None

    @property
    def mT(self) -> Enclosure:
        return Enclosure(self.mid.mT, None if self.rad is None else self.rad.mT)

    def radius(self) -> Tensor:
        return torch.zeros_like(self.mid) if self.rad is None else self.rad

    def scaled(self, factor: float) -> Enclosure:
        """factor·A, rounded outward."""
        mid = self.mid * factor
        return Enclosure(mid, (self.radius() * abs(factor) + mid.abs() * (2 * U64)) * (1 + 8 * U64) + _TINY)

    def times_rows(self, factor: Tensor) -> Enclosure:
        """diag(factor)·A, rounded outward; factor (m,) exact."""
        mid = factor[:, None] * self.mid
        return Enclosure(mid, (self.radius() * factor.abs()[:, None] + mid.abs() * (2 * U64)) * (1 + 8 * U64) + _TINY)

    def minus(self, other: Enclosure) -> Enclosure:
        """A − B, rounded outward."""
        mid = self.mid - other.mid
        return Enclosure(mid, (self.radius() + other.radius() + mid.abs() * (2 * U64)) * (1 + 8 * U64))

    def plus(self, other: Enclosure) -> Enclosure:
        return self.minus(Enclosure(-other.mid, other.rad))


def product(a: Enclosure, b: Enclosure) -> Enclosure:
    """An enclosure of AB for all A in a and B in b. Uses |fl(AB) − AB| ≤ γ_k|A||B| for any order of summation, and both radii."""
    k = a.mid.shape[1]
    size_a, size_b = a.mid.abs(), b.mid.abs()
    rad = gamma(k + 2, U64) * (size_a @ size_b)
    if b.rad is not None:
        rad = rad + size_a @ b.rad
    if a.rad is not None:
        rad = rad + a.rad @ (size_b if b.rad is None else size_b + b.rad)
    # All terms are ≥ 0, so the relative error of their sums is at most γ. The error of underflow is added.
    return Enclosure(a.mid @ b.mid, rad * (1 + gamma(2 * k + 16, U64)) + (2 * k + 4) * _TINY)


@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix with s entries per row: row i has coefficient[i, t] in column index[i, t], with an error of at most error[i, t].

    index: int64 (r, s), the columns of a row are distinct; coefficient, error: float64 (r, s). width: the number of columns.
    """

    index: Tensor
    coefficient: Tensor
    error: Tensor
    width: int

    def apply(self, x: Enclosure) -> Enclosure:
        """An enclosure of MX, for M this matrix and X in the enclosure x (width, n)."""
        size = (self.coefficient.abs()[..., None] * x.mid.abs()[self.index]).sum(1)
        mid = (self.coefficient[..., None] * x.mid[self.index]).sum(1)
        terms = self.index.shape[1]
        rad = gamma(terms + 2, U64) * size
        if bool((self.error > 0).any()):
            rad = rad + (self.error[..., None] * (x.mid.abs() + x.radius())[self.index]).sum(1)
        if x.rad is not None:
            rad = rad + (self.coefficient.abs()[..., None] * x.rad[self.index]).sum(1)
        return Enclosure(mid, rad * (1 + gamma(2 * terms + 16, U64)) + (2 * terms + 4) * _TINY)

    def dense(self) -> Enclosure:
        """This matrix as a dense enclosure (r, width)."""
        zeros = torch.zeros(len(self.index), self.width, dtype=torch.float64)
        return Enclosure(zeros.scatter(1, self.index, self.coefficient), zeros.scatter(1, self.index, self.error))


def sandwich(left: SparseRows, x: Enclosure, right: SparseRows) -> Enclosure:
    """An enclosure of left·X·rightᵀ for all X in x."""
    return left.apply(right.apply(x.mT).mT)


def dominating(ball: Enclosure) -> Tensor:
    """A symmetric float64 matrix X with X ⪰ A for every symmetric A in the enclosure (n, n)."""
    mid = (ball.mid + ball.mid.mT) / 2
    # A lies within rad of mid and, being symmetric, within radᵀ of midᵀ; the mean rounds once.
    rad = (ball.radius() + ball.radius().mT) / 2 + mid.abs() * (2 * U64) + _TINY
    rows = rad.sum(1) * (1 + gamma(len(rad) + 8, U64))
    diagonal = mid.diagonal()
    raised = torch.nextafter((diagonal + rows) * (1 + 4 * U64 * torch.sign(diagonal + rows)), torch.full_like(rows, torch.inf))
    return mid.diagonal_scatter(raised)


def proved_positive(ball: Enclosure) -> bool:
    """True only if every symmetric matrix in the enclosure (n, n) is positive semidefinite. Source: the module's docstring, after Rump 2006."""
    n = len(ball.mid)
    mid = (ball.mid + ball.mid.mT) / 2
    rad = (ball.radius() + ball.radius().mT) / 2 + mid.abs() * (2 * U64) + _TINY
    diagonal = mid.diagonal()
    if not bool(torch.isfinite(mid).all() & torch.isfinite(rad).all() & (diagonal > 0).all()):
        return False
    d = diagonal.rsqrt()
    if not bool((d.amin() > 2.0**-200) & (d.amax() < 2.0**200)):
        return False
    # The two products have a relative error of 2u; the second enlarges an underflow of the first by at most 2²⁰⁰.
    scaled, spread = mid * d[:, None] * d, rad * d[:, None] * d * (1 + 8 * U64)
    spread = spread + scaled.abs() * (4 * U64) + 2.0**-800
    spread_norm = float(spread.sum(1).amax()) * (1 + gamma(n + 8, U64))
    # The diagonal is 1, so rows of L have a norm of about 1, and the rounding error is a few n·γ_n.
    shift = spread_norm + 8 * n * gamma(n + 8, U64)
    if not shift < 0.25:
        return False
    shifted = scaled.diagonal_scatter(scaled.diagonal() - shift)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if bool(failed.any()) or not bool(torch.isfinite(factor).all()):
        return False
    residual = shifted - factor @ factor.mT
    largest = float(factor.square().sum(1).amax()) * (1 + gamma(n + 8, U64))
    # |fl(LLᵀ) − LLᵀ|_ij ≤ γ_n‖l_i‖‖l_j‖ ≤ γ_n·largest. The subtraction has an error of u times its result, the shift one of at most 2u.
    norm = float(residual.abs().sum(1).amax()) * (1 + gamma(n + 8, U64)) + n * (gamma(n + 4, U64) * largest + n * _TINY) + 8 * U64
    return norm + spread_norm < shift
