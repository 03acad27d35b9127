"""Elementwise functions, with or without the affine layer before them.

Slopes hold on the intervals that neurons can reach. If −κ⁻_n ≤ f'' ≤ κ⁺_n there, the remainder of the function and its adjoint ω satisfy −Σ_n ω_n R_n
≤ ½ Σ_n c_n Δz_n² ≤ ½ min(max_n c_n·‖Δz‖², Σ_n c_n|Δz_n|², (√λ·r + √max c·e)²),   λ ≥ λ_max(Wᵀdiag(c)W), c_n = κ⁺_n max(−ω_n, 0) + κ⁻_n max(ω_n, 0).
See robustlip.domains.expansion.base.CurvatureTerm. A kink at distance a_n from the clean z_n, where f' jumps by j, adds j(|Δz_n| − a_n)⁺ to R_n on
the side of the kink and nothing on the other side: f'' is a measure, and R_n = ∫(z + Δ − t)f''(dt).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustlip.domains.expansion.base import Ball, CurvatureTerm, Expansion, OutputBounds, Scope, Term, register_family, token_norms
from robustlip.domains.expansion.crossing import KinkTerm
from robustlip.domains.expansion.linear import AffineStep
from robustlip.domains.expansion.neurons import Neurons
from robustlip.numerics.rounding import norm_up, up
from robustlip.ops import elementwise_of, is_elementwise
from robustlip.ops.elementwise import Kink


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


class ElementwiseExpansion(Neurons):
    """f(z) for z = Wx + b, or for z = x without an affine layer (every entry then changes by at most the token's ℓ2 radius)."""

    by_token = (*Neurons.by_token, "slope", "derivative", "at")

    def __init__(self, layer: nn.Module, clean: Tensor, scope: Scope, affine: AffineStep | None = None) -> None:
        super().__init__(layer, clean, scope, affine)
        self.reading = None if affine is None else affine.matrix
        self.rows = torch.ones(1, dtype=clean.dtype, device=clean.device) if affine is None else affine.rows
        z = self.clean
        self.facts = facts = elementwise_of(layer)
        self.clean = facts.value(z) / facts.divisor
        self.derivative = facts.derivative(z) / facts.divisor
        self.steepest = facts.steepest / facts.divisor
        # The float64 error of f' is a few units of its largest absolute value.
        self.slope = self.derivative.abs() + 2.0**-45 * max(1.0, self.steepest)
        self.distance = z.abs()
        self.curvature = facts.curvature / facts.divisor
        self.kinks, self.jumps = facts.kinks, [kink.jump / facts.divisor for kink in facts.kinks]
        self.at = z if any(kink.place != 0 for kink in self.kinks) else self.distance  # z itself, where kinks need it

    def _curvatures(self, each: Tensor) -> tuple[Tensor, Tensor]:
        """(κ⁺, κ⁻) (…, N, T, n) with −½κ⁻Δ² ≤ f(z + Δ) − f(z) − f'(z)Δ ≤ ½κ⁺Δ² for |Δ| ≤ each."""
        top = self.curvature
        if self.facts.local_curvature is None:
            return torch.full_like(each, top), torch.full_like(each, top)
        scale = top / self.facts.curvature * (1 + 1e-7)

        def sized(kappa: Tensor) -> Tensor:
            return (kappa.clamp_min(0.0) * scale + 1e-15 * max(1.0, top)).clamp_max(top)

        convex, concave = self.facts.local_curvature(self.distance, each)
        return sized(convex), sized(concave)

    def _away(self, kink: Kink) -> Tensor:
        """|z − place|, rounded down."""
        return self.distance if kink.place == 0 else (self.at - kink.place).abs() * (1 - 2.0**-50)

    def _rounding(self, norm: Tensor) -> Tensor:
        """‖fl(f(z)) − f(z)‖ for executed ‖z‖ ≤ norm, plus that of the float64 reference."""
        root = math.sqrt(self.clean.shape[-1]) * (1 + 1e-15)
        return up(self.scope.both(lambda arithmetic: self.facts.error(norm, root, arithmetic)))

    def lipschitz(self) -> Tensor | float:
        return self.steepest * self.sigma

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        each, whole, fresh = self.reached(ball)
        # Between the clean point, or a reachable kink, and another point, f' changes by at most the bound of f'' times the distance.
        slope = self.slope if self.curvature else self.derivative.abs()
        for kink in self.kinks:
            slope = torch.where(each >= self._away(kink), slope.clamp_min(kink.steepest / self.facts.divisor), slope)
        if self.curvature:
            slope = (slope + self.curvature * each).clamp_max(self.steepest)
        after = torch.minimum(slope.amax(-1) * whole, norm_up(slope * each))
        rounding = self._rounding(self.z_norm + whole)
        after = up(after * (1 + 1e-12)) + rounding
        if not remainder:
            return OutputBounds(after, ball.error, [])
        curved, bounds = self._bend(ball.radius, each, whole, fresh)
        steepest = self.slope.amax(-1)
        error = up((steepest * (self.sigma * ball.error + fresh) + curved) * (1 + 1e-12)) + rounding
        return OutputBounds(after, error, [*bounds, fresh, rounding, ball.radius.amax(-1, keepdim=True)])

    def _bend(self, radius: Tensor, each: Tensor, whole: Tensor, fresh: Tensor) -> tuple[Tensor, list[Term]]:
        """(the norm of f(z + Δz) − f(z) − f'(z)∘Δz (…, N, T), its bounds by neuron). each, whole: of Δz; fresh: of what is not WΔx."""
        bent, bounds = self._kinked(each, whole)
        if not self.curvature:
            return bent, bounds
        convex, concave = self._curvatures(each)
        matrix = self.affine.matrix if self.affine is not None and self.scope.space == "l2" else None
        kappa = torch.maximum(convex, concave)
        curved = 0.5 * torch.minimum((kappa * each).amax(-1) * whole, norm_up(kappa * each.square()))
        if self.affine is not None and self.affine.quartic is not None:
            # ‖Δz∘Δz‖ of Δz = WΔx + e, e no longer than `fresh`.
            squares = self.affine.quartic * radius.square() + fresh * (2 * whole + fresh)
            curved = torch.minimum(curved, 0.5 * kappa.amax(-1) * squares)
        return curved + bent if self.kinks else curved, [*bounds, CurvatureTerm(convex, concave, each, whole, matrix, radius, fresh)]

    def _kinked(self, each: Tensor, whole: Tensor) -> tuple[Tensor, list[Term]]:
        """(the norm of all kink terms (…, N, T), the bound of each kink)."""
        if self.together:
            groups = [KinkTerm(None, self._away(kink), each, whole) for kink in self.kinks]
            return sum((_times(g.norm(), abs(j)) for g, j in zip(groups, self.jumps, strict=True)), start=torch.zeros_like(whole)), [*groups]
        crossing = [(each - self._away(kink)).clamp_min(0.0) for kink in self.kinks]
        # Upward and downward jumps of a neuron cancel partly, so the larger of the two sums is a bound.
        signed = [[_times(c, abs(j)) for c, j in zip(crossing, self.jumps, strict=True) if (j > 0) == rises] for rises in (True, False)]
        sums = [sum(part[1:], start=part[0]) for part in signed if part]
        bent = torch.zeros_like(whole) if not sums else norm_up(sums[0] if len(sums) == 1 else torch.maximum(*sums))
        return bent, [c.flatten(-2) for c in crossing]

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        size = g.abs()
        inner = g * self.derivative
        norms, inner_norms = token_norms(g), token_norms(inner)
        tail: list[Term] = [inner_norms, norms, self.adjoint_slack(self.steepest) * norms.sum(-1, keepdim=True)]
        weights: list[Term] = []
        for jump in self.jumps:
            # Where f' jumps up, f is above its tangent, and only a negative adjoint lets this lower the margin.
            falling = _times(size if two_sided else (-g if jump > 0 else g).clamp_min(0.0), abs(jump))
            weights.append(KinkTerm(falling) if self.together else falling.flatten(-2))
        if self.curvature:
            weights.append(CurvatureTerm(size, size) if two_sided else CurvatureTerm((size - g) / 2, (size + g) / 2))
        return self.back(inner), [*weights, *tail]


@register_family(is_elementwise)
def _elementwise_alone(layer: nn.Module, clean: Tensor, scope: Scope) -> Expansion:
    return ElementwiseExpansion(layer, clean, scope)
