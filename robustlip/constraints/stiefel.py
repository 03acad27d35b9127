"""Projection onto the Stiefel manifold: all singular values equal."""

from __future__ import annotations

import torch
from torch import Tensor

from robustlip.constraints.method import Guarantee, Method, StepTaken
from robustlip.constraints.norms import gram_of, largest_entry, times
from robustlip.muon import orthogonalize, polynomial_named

# |1 − σ²| up to which the series is used: its result is at most 1.2 % below 1 (35/128·|1 − σ²|⁴ and higher terms), 0.06 % at half of it.
_NEAR = 0.42


class Stiefel(Method):
    """All σ → w_max. Hard up to the peak of the polynomial: no overshoot for 'six-step', whose peak is below 1.

    polynomial: a key of robustlip.muon.POLYNOMIALS, which is applied after every step. None: 'six-step' for matrices that are not nearly
    orthogonal; for those that are, as after small steps, the series of σ/√σ² around 1 (`near_orthogonal`), which costs a quarter.
    Singular values below about 10⁻³ of the Frobenius norm do not reach w_max in one step.
    """

    name = "stiefel"

    def __init__(self, polynomial: str | None = None) -> None:
        self.polynomial = polynomial
        self.guarantee = Guarantee(max(1.0, polynomial_named(polynomial or "six-step").peak))

    def __call__(self, stack: Tensor, cap: Tensor, step: StepTaken) -> Tensor:
        if self.polynomial is None:
            near = near_orthogonal(stack, cap)
            if near is not None:
                return near
        # Scaled to a largest entry of 1, so that the Frobenius norm is finite, and 0 only for a zero matrix.
        return cap * orthogonalize(stack / largest_entry(stack, (-2, -1)), self.polynomial or "six-step")


def near_orthogonal(stack: Tensor, cap: Tensor) -> Tensor | None:
    """cap·UVᵀ, approximated from below, of matrices (K, m, n) with all singular values near cap (K, 1, 1); None if one of them is not.

    With E = 1 − MMᵀ/w² it is (1 + E/2 + 3E²/8 + 5E³/16)M, the series of 1/√(1 − E) truncated after an odd power. It is below the full series for
    σ < w (all terms are positive) and for σ > w (they alternate, the last one kept is negative), so no result exceeds the cap.
    """
    error = gram_of(stack).div_(-cap * cap)
    error.diagonal(dim1=-2, dim2=-1).add_(1)
    square = error @ error
    if not bool((torch.linalg.matrix_norm(square @ square) <= _NEAR**4).all()):
        return None
    factor = torch.baddbmm(error / 2, square, error, alpha=5 / 16).add_(square, alpha=3 / 8)
    factor.diagonal(dim1=-2, dim2=-1).add_(1)
    return times(factor, stack)
