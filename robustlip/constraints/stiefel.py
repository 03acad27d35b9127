"""Projection onto the Stiefel manifold: all singular values equal."""

from __future__ import annotations

from torch import Tensor

from robustlip.constraints.method import Guarantee, Method, StepTaken
from robustlip.muon import orthogonalize, polynomial_named


class Stiefel(Method):
    """All σ → w_max, through Muon's polynomials. Hard up to the peak of the polynomial: 0 above for 'six-step', whose peak is under 1.

    Singular values under about 10⁻³ of the Frobenius norm are not raised all the way. polynomial: a key of robustlip.muon.POLYNOMIALS.
    """

    name = "stiefel"

    def __init__(self, polynomial: str = "six-step") -> None:
        self.polynomial = polynomial
        self.guarantee = Guarantee(max(1.0, polynomial_named(polynomial).peak))

    def __call__(self, stack: Tensor, cap: Tensor, step: StepTaken) -> Tensor:
        return cap * orthogonalize(stack, self.polynomial)
