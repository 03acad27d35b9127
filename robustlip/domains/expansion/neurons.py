"""What functions of single neurons share, whether an affine step in front is expanded with them or not.

Together they are tighter than one after the other. Behind z = Wx + b, a convolution included, a number p_n = ⟨c_n, x⟩ + const that a function
bends moves by at most ‖c_n‖·r + e (e: rounding), and all of z together by σ(W)·r + e.
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
class NeuronWay:
    """Of the linear way M to z = Wx + b: rows ≥ ‖c_nM‖ (N, n), gain ≥ ‖WM‖ (N,); before as in `Expansion.with_way`."""

    rows: Tensor
    gain: Tensor
    before: Tensor


class Neurons(Expansion):
    """Numbers p (N, T, n) of each token, each bent by itself, of z = Wx + b, or of z = x where there is no affine step in front (`affine` None).

    reading: (n, D), the c_n as float64 has them, None where they are not written; rows: ≥ their dual norms in the scope's space. Subclasses set both,
    `clean` and `z_norm`.
    """

    by_token: ClassVar[tuple[str, ...]] = ("clean", "z_norm", "distance")
    affine: AffineStep | None
    reading: Tensor | None
    rows: Tensor
    z_norm: Tensor
    distance: Tensor
    way: NeuronWay | None = None

    def __init__(self, layer: nn.Module, clean: Tensor, scope: Scope, affine: AffineStep | None) -> None:
        self.scope, self.layer, self.whole = scope, layer, scope.whole if affine is None else affine.whole
        self.affine = affine
        self.clean = clean if self.affine is None else self.affine.clean  # z, until the subclass puts what is behind it there
        self.z_norm = norm_up(self.clean)

    @property
    def shaped(self) -> bool:
        return True

    @property
    def together(self) -> bool:
        """Whether kinks are bounded together too (`Kinks`), as the many numbers of images have to be."""
        return (self.whole is not None and len(self.whole) == 3) or (self.affine is not None and self.affine.matrix is None)

    def adjoint_slack(self, steepest: float) -> float:
        """Of a unit of the adjoint behind: what float64 loses on its way through slopes up to `steepest` and through Aᵀ, in units of the radius."""
        return ADJOINT_SLACK * steepest if self.affine is None else self.affine.slack * steepest

    def back(self, inner: Tensor) -> Tensor:
        """The adjoint in front of z → that in front of x."""
        return inner if self.affine is None else self.affine.back(inner)

    @property
    def sigma(self) -> float:
        """σ(W), 1 without."""
        return 1.0 if self.affine is None else self.affine.sigma

    @property
    def gain(self) -> float:
        """As sigma, for changes in the scope's norm."""
        return 1.0 if self.affine is None else self.affine.gain

    def with_way(self, m: Tensor, before: Tensor) -> Self:
        if self.affine is None or self.affine.matrix is None or self.reading is None:
            return self
        weight = self.affine.matrix
        z = weight @ m  # (N, n, D₀)
        p = z if self.reading is weight else self.reading @ m
        lost = 2.0**-34 * torch.linalg.matrix_norm(weight) * torch.linalg.matrix_norm(m)
        return self.replaced(way=NeuronWay(up(norm_up(p) + lost.unsqueeze(-1)), up(spectral_norm_quick(z) + lost), before))

    def at_rows(self, sample: Tensor, position: Tensor, arrived: Tensor) -> Expansion:
        part = super().at_rows(sample, position, arrived)
        return part if self.affine is None else part.replaced(affine=self.affine.at_rows(sample, position, arrived))

    def reached(self, ball: Ball) -> tuple[Tensor, Tensor, Tensor]:
        """(≥ |Δp_n| (…, N, T, n), ≥ ‖Δz‖ (…, N, T), of both what is not linear in the change of x)."""
        radius, way = ball.radius, self.way
        if self.affine is None:
            moved, fresh = radius, torch.zeros_like(radius)
        else:
            moved, fresh = self.affine.parts(ball)
        each = self.rows * radius.unsqueeze(-1) * (1 + 1e-12)
        if way is not None and ball.split is not None and self.affine is not None:
            epsilon, stray = ball.split.epsilon, ball.stray(way.before)
            each = torch.minimum(each, up(way.rows.unsqueeze(-2) * epsilon.unsqueeze(-1) + self.rows * stray.unsqueeze(-1)))
            moved = torch.minimum(moved, up(way.gain.unsqueeze(-1) * epsilon + self.affine.gain * stray))
        whole = moved + fresh
        return torch.minimum(each + fresh.unsqueeze(-1), whole.unsqueeze(-1)), whole, fresh
