"""The common part of elementwise functions and reflections, with or without the affine layer before them.

An affine layer and the function after it are expanded together, which is tighter than separately. After z = Wx + b (a convolution included), an entry
p_n = ⟨c_n, x⟩ + const changes by at most ‖c_n‖·r + e (e: rounding error), and z as a whole by at most σ(W)·r + e.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from robustlip.domains.expansion.base import ADJOINT_SLACK, Ball, Expansion, Scope
from robustlip.domains.expansion.linear import AffineStep
from robustlip.numerics.rounding import norm_up, up
from robustlip.numerics.spectral import spectral_norm_quick


@dataclass(frozen=True)
class NeuronInputMap:
    """The linear map M from the perturbation to z = Wx + b: rows ≥ ‖c_nM‖ (N, n), gain ≥ ‖WM‖ (N,); before as in `Expansion.with_input_map`."""

    rows: Tensor
    gain: Tensor
    before: Tensor


class Neurons(Expansion):
    """Functions of entries p (N, T, n) of each token, linear in z = Wx + b, or in z = x where no affine layer is before them (`affine` None).

    reading: (n, D), the vectors c_n in float64, None where they are not stored. rows: ≥ their dual norms in the scope's space. Subclasses set both,
    `clean` and `z_norm`.
    """

    by_token: ClassVar[tuple[str, ...]] = ("clean", "z_norm", "distance")
    affine: AffineStep | None
    reading: Tensor | None
    rows: Tensor
    z_norm: Tensor
    distance: Tensor
    input_map: NeuronInputMap | None = None

    def __init__(self, layer: nn.Module, clean: Tensor, scope: Scope, affine: AffineStep | None) -> None:
        self.scope, self.layer, self.whole = scope, layer, scope.whole if affine is None else affine.whole
        self.affine = affine
        self.clean = clean if self.affine is None else self.affine.clean  # z; the subclass replaces it by its output
        self.z_norm = norm_up(self.clean)

    @property
    def uses_input_map(self) -> bool:
        return True

    @property
    def together(self) -> bool:
        """Whether kinks are also bounded jointly (`KinkTerm`), which the many entries of images need."""
        return (self.whole is not None and len(self.whole) == 3) or (self.affine is not None and self.affine.matrix is None)

    def adjoint_slack(self, steepest: float) -> float:
        """The float64 error of the adjoint through slopes up to `steepest` and through Aᵀ, per unit of the adjoint and of the radius."""
        return ADJOINT_SLACK * steepest if self.affine is None else self.affine.slack * steepest

    def back(self, inner: Tensor) -> Tensor:
        """From the adjoint at z to that at x."""
        return inner if self.affine is None else self.affine.back(inner)

    @property
    def sigma(self) -> float:
        """σ(W); 1 without an affine layer."""
        return 1.0 if self.affine is None else self.affine.sigma

    @property
    def gain(self) -> float:
        """As sigma, for changes in the scope's norm."""
        return 1.0 if self.affine is None else self.affine.gain

    def with_input_map(self, m: Tensor, before: Tensor) -> Self:
        if self.affine is None or self.affine.matrix is None or self.reading is None:
            return self
        weight = self.affine.matrix
        z = weight @ m  # (N, n, D₀)
        p = z if self.reading is weight else self.reading @ m
        lost = 2.0**-34 * torch.linalg.matrix_norm(weight) * torch.linalg.matrix_norm(m)
        return self.replaced(input_map=NeuronInputMap(up(norm_up(p) + lost.unsqueeze(-1)), up(spectral_norm_quick(z) + lost), before))

    def at_rows(self, sample: Tensor, position: Tensor, rounding_radii: Tensor) -> Expansion:
        part = super().at_rows(sample, position, rounding_radii)
        return part if self.affine is None else part.replaced(affine=self.affine.at_rows(sample, position, rounding_radii))

    def reached(self, ball: Ball) -> tuple[Tensor, Tensor, Tensor]:
        """(≥ |Δp_n| (…, N, T, n), ≥ ‖Δz‖ (…, N, T), the part of both that is not linear in the change of x (…, N, T))."""
        radius, input_map = ball.radius, self.input_map
        if self.affine is None:
            moved, fresh = radius, torch.zeros_like(radius)
        else:
            moved, fresh = self.affine.parts(ball)
        each = self.rows * radius.unsqueeze(-1) * (1 + 1e-12)
        if input_map is not None and ball.split is not None and self.affine is not None:
            epsilon, rest = ball.split.epsilon, ball.rest(input_map.before)
            each = torch.minimum(each, up(input_map.rows.unsqueeze(-2) * epsilon.unsqueeze(-1) + self.rows * rest.unsqueeze(-1)))
            moved = torch.minimum(moved, up(input_map.gain.unsqueeze(-1) * epsilon + self.affine.gain * rest))
        whole = moved + fresh
        return torch.minimum(each + fresh.unsqueeze(-1), whole.unsqueeze(-1)), whole, fresh
