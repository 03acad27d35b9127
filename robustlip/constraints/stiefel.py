"""Projection onto the Stiefel manifold: all singular values equal."""

from __future__ import annotations

import torch
from torch import Tensor

from robustlip.constraints.method import Guarantee, Method, StepTaken
from robustlip.constraints.norms import gram_of, largest_entry, times
from robustlip.muon import orthogonalize, polynomial_named

# |1 − σ²| up to which the series is used: it then ends within 1.2 % under 1 (35/128·|1 − σ²|⁴ and higher terms), 0.06 % at half of it.
_NEAR = 0.42


class Stiefel(Method):
    """All σ → w_max. Hard up to the peak of the polynomial: 0 above for 'six-step', whose peak is under 1.

    polynomial: a key of robustlip.muon.POLYNOMIALS, which then maps after every step. None: 'six-step' for matrices that are not near
    yet, and for those that are, as they stay after small steps, the series of σ/√σ² around 1 (`near_orthogonal`), a quarter of the work.
    Singular values under about 10⁻³ of the Frobenius norm are not raised all the way.
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
        # The largest entry is 1: the Frobenius norm is finite, and not 0 unless the matrix is.
        return cap * orthogonalize(stack / largest_entry(stack, (-2, -1)), self.polynomial or "six-step")


def near_orthogonal(stack: Tensor, cap: Tensor) -> Tensor | None:
    """cap·UVᵀ of matrices (K, m, n) whose singular values are all near cap (K, 1, 1), from below; None where one of them is not.

    With E = 1 − MMᵀ/w² it is (1 + E/2 + 3E²/8 + 5E³/16)M, the series of 1/√(1 − E), cut off after an odd power: it is below the whole for
    σ < w (all terms are positive) and for σ > w (they alternate, the last kept is negative), so nothing ends above the cap.
    """
    error = gram_of(stack).div_(-cap * cap)
    error.diagonal(dim1=-2, dim2=-1).add_(1)
    square = error @ error
    if not bool((torch.linalg.matrix_norm(square @ square) <= _NEAR**4).all()):
        return None
    factor = torch.baddbmm(error / 2, square, error, alpha=5 / 16).add_(square, alpha=3 / 8)
    factor.diagonal(dim1=-2, dim2=-1).add_(1)
    return times(factor, stack)
