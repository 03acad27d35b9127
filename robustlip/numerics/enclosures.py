"""Matrix inequalities, proved in float64: what every certificate of this package rests on, whatever guessed the multipliers.

A `Ball` is a matrix known up to an entrywise radius; products carry the radius along with all rounding (Rump 1999, midpoint and radius), so
a matrix that was computed encloses the one that was meant. Two facts make inequalities of them:

`dominating`: for symmetric A in the ball, |A − mid| ≤ rad gives mid + diag(Σ_j rad_ij) ⪰ A, as a symmetric matrix whose diagonal is at least
the sum of the sizes of the rest of its row is positive semidefinite (Gershgorin).

`proved_positive`: with any d > 0 and N_s = diag(d)·N·diag(d), any triangular L gives N_s = LLᵀ + sI + (N_s − sI − LLᵀ) ⪰ s − ‖N_s − sI − LLᵀ‖,
and the norm of a symmetric matrix is at most its largest row sum of sizes. L comes from a Cholesky factorisation of N_s − sI; nothing is
assumed of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustlip.numerics.rounding import TINY, U64, gamma

_TINY = TINY[torch.float64]


@dataclass(frozen=True)
class Ball:
    """All matrices A with |A − mid| ≤ rad, entry by entry. mid, rad: float64 (m, n) on the CPU; rad None: mid alone."""

    mid: Tensor
    rad: Tensor | None = None

    @property
    def mT(self) -> Ball:
        return Ball(self.mid.mT, None if self.rad is None else self.rad.mT)

    def radius(self) -> Tensor:
        return torch.zeros_like(self.mid) if self.rad is None else self.rad

    def scaled(self, factor: float) -> Ball:
        """factor·A, rounded outward."""
        mid = self.mid * factor
        return Ball(mid, (self.radius() * abs(factor) + mid.abs() * (2 * U64)) * (1 + 8 * U64) + _TINY)

    def times_rows(self, factor: Tensor) -> Ball:
        """diag(factor)·A, rounded outward; factor (m,) exact."""
        mid = factor[:, None] * self.mid
        return Ball(mid, (self.radius() * factor.abs()[:, None] + mid.abs() * (2 * U64)) * (1 + 8 * U64) + _TINY)

    def minus(self, other: Ball) -> Ball:
        """A − B, rounded outward."""
        mid = self.mid - other.mid
        return Ball(mid, (self.radius() + other.radius() + mid.abs() * (2 * U64)) * (1 + 8 * U64))

    def plus(self, other: Ball) -> Ball:
        return self.minus(Ball(-other.mid, other.rad))


def product(a: Ball, b: Ball) -> Ball:
    """Encloses AB for all A, B in the two balls: |fl(ab) − ab| ≤ γ_k|a||b| in any order of summation, and the radii of both."""
    k = a.mid.shape[1]
    size_a, size_b = a.mid.abs(), b.mid.abs()
    rad = gamma(k + 2, U64) * (size_a @ size_b)
    if b.rad is not None:
        rad = rad + size_a @ b.rad
    if a.rad is not None:
        rad = rad + a.rad @ (size_b if b.rad is None else size_b + b.rad)
    # All terms are ≥ 0, so their own sums are off by a relative γ; what underflow loses is added.
    return Ball(a.mid @ b.mid, rad * (1 + gamma(2 * k + 16, U64)) + (2 * k + 4) * _TINY)


@dataclass(frozen=True)
class Rows:
    """A matrix with s entries a row: row i has coefficient[i, t] in column index[i, t], each within error[i, t] of the one that is meant.

    index: int64 (r, s), columns of a row distinct; coefficient, error: float64 (r, s). width: the number of columns.
    """

    index: Tensor
    coefficient: Tensor
    error: Tensor
    width: int

    def apply(self, x: Ball) -> Ball:
        """Encloses MX, for M this matrix and X in the ball (width, n)."""
        size = (self.coefficient.abs()[..., None] * x.mid.abs()[self.index]).sum(1)
        mid = (self.coefficient[..., None] * x.mid[self.index]).sum(1)
        terms = self.index.shape[1]
        rad = gamma(terms + 2, U64) * size
        if bool((self.error > 0).any()):
            rad = rad + (self.error[..., None] * (x.mid.abs() + x.radius())[self.index]).sum(1)
        if x.rad is not None:
            rad = rad + (self.coefficient.abs()[..., None] * x.rad[self.index]).sum(1)
        return Ball(mid, rad * (1 + gamma(2 * terms + 16, U64)) + (2 * terms + 4) * _TINY)

    def dense(self) -> Ball:
        """This matrix in full, (r, width)."""
        zeros = torch.zeros(len(self.index), self.width, dtype=torch.float64)
        return Ball(zeros.scatter(1, self.index, self.coefficient), zeros.scatter(1, self.index, self.error))


def sandwich(left: Rows, x: Ball, right: Rows) -> Ball:
    """Encloses left·X·rightᵀ."""
    return left.apply(right.apply(x.mT).mT)


def dominating(ball: Ball) -> Tensor:
    """A symmetric float64 matrix X with X ⪰ A for every symmetric A in the ball (n, n)."""
    mid = (ball.mid + ball.mid.mT) / 2
    # A lies within rad of mid and, being symmetric, within radᵀ of midᵀ; the mean rounds once.
    rad = (ball.radius() + ball.radius().mT) / 2 + mid.abs() * (2 * U64) + _TINY
    rows = rad.sum(1) * (1 + gamma(len(rad) + 8, U64))
    diagonal = mid.diagonal()
    raised = torch.nextafter((diagonal + rows) * (1 + 4 * U64 * torch.sign(diagonal + rows)), torch.full_like(rows, torch.inf))
    return mid.diagonal_scatter(raised)


def proved_positive(ball: Ball) -> bool:
    """True only if every symmetric matrix in the ball (n, n) is positive semidefinite. Source: the module's docstring; Rump 2006 for the idea."""
    n = len(ball.mid)
    mid = (ball.mid + ball.mid.mT) / 2
    rad = (ball.radius() + ball.radius().mT) / 2 + mid.abs() * (2 * U64) + _TINY
    diagonal = mid.diagonal()
    if not bool(torch.isfinite(mid).all() & torch.isfinite(rad).all() & (diagonal > 0).all()):
        return False
    d = diagonal.rsqrt()
    if not bool((d.amin() > 2.0**-200) & (d.amax() < 2.0**200)):
        return False
    # Two products round by 2u; what underflows in the first is enlarged by at most 2²⁰⁰ in the second.
    scaled, spread = mid * d[:, None] * d, rad * d[:, None] * d * (1 + 8 * U64)
    spread = spread + scaled.abs() * (4 * U64) + 2.0**-800
    spread_norm = float(spread.sum(1).amax()) * (1 + gamma(n + 8, U64))
    # The diagonal is 1: rows of L have a norm of about 1, and rounding costs a few n·γ_n.
    shift = spread_norm + 8 * n * gamma(n + 8, U64)
    if not shift < 0.25:
        return False
    shifted = scaled.diagonal_scatter(scaled.diagonal() - shift)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if bool(failed.any()) or not bool(torch.isfinite(factor).all()):
        return False
    residual = shifted - factor @ factor.mT
    largest = float(factor.square().sum(1).amax()) * (1 + gamma(n + 8, U64))
    # |fl(LLᵀ) − LLᵀ|_ij ≤ γ_n‖l_i‖‖l_j‖ ≤ γ_n·largest; the subtraction rounds by u of its result, and that of the shift by u of 2.
    norm = float(residual.abs().sum(1).amax()) * (1 + gamma(n + 8, U64)) + n * (gamma(n + 4, U64) * largest + n * _TINY) + 8 * U64
    return norm + spread_norm < shift
