"""Activations that reflect pairs of channels: MaxMin, GroupSort(2), Householder; with or without the affine layer before them.

Each pair z of channels has a unit vector v. The activation replaces p = ⟨v, z⟩ by |p| and keeps the rest of z: an isometry, which is linear as long
as no p changes its sign. From p to p + Δ the absolute value exceeds its tangent by R = |p + Δ| − sign(p)(p + Δ), which is 0 for |Δ| ≤ |p| and at most
2(|Δ| − |p|) otherwise. Only an adjoint ω = ⟨g, v⟩ < 0 lets it lower the margin: robustlip.domains.expansion.crossing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustlip.domains.expansion.base import Ball, Expansion, OutputBounds, Scope, Term, register, token_norms
from robustlip.domains.expansion.crossing import KinkTerm, MatrixKinkTerm
from robustlip.domains.expansion.linear import AffineStep
from robustlip.domains.expansion.neurons import Neurons
from robustlip.domains.norms import Context
from robustlip.errors import UnsupportedLayer
from robustlip.layers import GroupSort, Householder, MaxMin
from robustlip.numerics.rounding import norm_up, up
from robustlip.ops.maps import dual_norms

REFLECTIONS = (MaxMin, GroupSort, Householder)


def pairs_of(layer: nn.Module, width: int, like: Tensor, whole: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(indices (n,), indices (n,), v (n, 2)) of the pairs of a layer that reflects channels: of vectors of that width, or of images (C, H, W)."""
    if whole is None:
        return _pairs(layer, width, like)
    if len(whole) != 3:
        name = type(layer).__name__
        raise UnsupportedLayer(f"expected vectors, tokens or images before {name}, got samples of shape {whole}; use method='global'")
    a, b, v = _pairs(layer, whole[0], like)
    places = torch.arange(whole[1] * whole[2], device=like.device)
    a, b = ((channels[:, None] * len(places) + places).flatten() for channels in (a, b))
    return a, b, v.repeat_interleave(len(places), 0)


def _pairs(layer: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    number = torch.arange(width, device=like.device)
    kind = type(layer)
    if kind not in REFLECTIONS or (isinstance(layer, GroupSort) and layer.group != 2):
        raise UnsupportedLayer(f"expected a layer that reflects pairs of channels, got {layer}; use method='global', or add an expansion")
    if kind is GroupSort:
        a, b = number[0::2], number[1::2]
        v = torch.tensor([-1.0, 1.0], dtype=like.dtype, device=like.device) / math.sqrt(2)  # ascending order: the second is the larger one
    else:
        a, b = number[: width // 2], number[width // 2 :]
        if isinstance(layer, Householder):
            half = layer.angle.detach().double() / 2
            return a, b, torch.stack([half.sin(), -half.cos()], -1)
        v = torch.tensor([1.0, -1.0], dtype=like.dtype, device=like.device) / math.sqrt(2)
    return a, b, v.expand(len(a), 2)


class ReflectionExpansion(Neurons):
    """z + (|p| − p)v for each pair, for z = Wx + b, or for z = x without an affine layer."""

    by_token = (*Neurons.by_token, "flip", "unsure")

    def __init__(self, layer: nn.Module, clean: Tensor, scope: Scope, affine: AffineStep | None = None) -> None:
        super().__init__(layer, clean, scope, affine)
        z = self.clean
        self.a, self.b, self.v = pairs_of(layer, z.shape[-1], z, self.whole)
        p = self.read(z)
        self.distance = p.abs()
        self.flip = (p < 0).to(z.dtype)
        self.clean = self.reflect(z, -2 * p * self.flip)
        # The float64 value of p may have the wrong sign near 0. Then the tangent is another one, and R may be larger by 2|p|.
        self.unsure = 8 * 2.0**-53 * self.z_norm
        if affine is None:
            self.reading, self.rows = None, torch.ones(1, dtype=z.dtype, device=z.device)
        elif affine.matrix is None:
            self.reading, self.rows = None, affine.pair_rows(self.a, self.b, self.v)
        else:
            weight = affine.matrix
            self.reading = self.v[:, :1] * weight[self.a] + self.v[:, 1:] * weight[self.b]
            # The error of a row is relative to its two summands, which may nearly cancel.
            sizes = dual_norms(weight[self.a], scope.space) + dual_norms(weight[self.b], scope.space)
            self.rows = up(dual_norms(self.reading, scope.space) + 2.0**-50 * sizes)

    def read(self, z: Tensor) -> Tensor:
        """p (…, n) for z (…, 2n)."""
        return self.v[:, 0] * z[..., self.a] + self.v[:, 1] * z[..., self.b]

    def reflect(self, z: Tensor, by: Tensor) -> Tensor:
        """z + by·v for each pair."""
        out = z.clone()
        out[..., self.a] += by * self.v[:, 0]
        out[..., self.b] += by * self.v[:, 1]
        return out

    def _rounding(self, norm: Tensor) -> Tensor:
        """‖executed − exact‖ for executed ‖z‖ ≤ norm, plus that of the reference; as in domains.norms.sorting."""
        root = math.sqrt(self.clean.shape[-1]) * (1 + 1e-15)

        def one(context: Context) -> Tensor:
            if isinstance(self.layer, Householder):
                return 32 * context.unit * norm + 8 * root * context.tiny * (1 + norm)
            return torch.zeros_like(norm) + 2 * root * context.flushed

        # The reference computes all three layers as reflections.
        own = 32 * 2.0**-53 * norm + 8 * root * 2.0**-1022 * (1 + norm)
        return self.scope.infinite_if_overflow(up(one(self.scope.context) + own), 4 * norm)

    def lipschitz(self) -> Tensor | float:
        return self.sigma

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        each, whole, fresh = self.reached(ball)
        rounding = self._rounding(self.z_norm + whole)
        after = up(whole) + rounding
        if not remainder:
            return OutputBounds(after, ball.error, [])
        curved, bound = self._bend(ball.radius, each, whole, fresh)
        error = up((self.sigma * ball.error + fresh + curved) * (1 + 1e-12)) + rounding
        return OutputBounds(after, error, [bound, fresh, rounding, ball.radius.amax(-1, keepdim=True)])

    def _bend(self, radius: Tensor, each: Tensor, whole: Tensor, fresh: Tensor) -> tuple[Tensor, Term]:
        """(‖R‖ (…, N, T) of all pairs, their joint bound). each ≥ |Δp|, whole ≥ ‖Δp‖; fresh: the part that is not linear in Δx."""
        near = (self.distance - self.unsure.unsqueeze(-1)).clamp_min(0.0)
        if self.together:
            kinks = KinkTerm(None, near, each, whole, height=2.0)
            return kinks.norm(), kinks
        matrix = self.reading if self.scope.space == "l2" else None
        if matrix is not None and self.affine is not None:
            fresh = up(fresh + 2.0**-49 * self.affine.frobenius * radius)  # the float64 error of the matrix
        bound = MatrixKinkTerm(None, None, near, each, whole, matrix, radius, fresh)
        return torch.minimum(norm_up(bound.crossing), up(2 * bound.share * whole)), bound

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        omega = self.read(g)
        inner = self.reflect(g, -2 * omega * self.flip)
        size, norms, inner_norms = omega.abs(), token_norms(g), token_norms(inner)
        falling = size if two_sided else (size - omega) / 2
        weights: list[Term] = [KinkTerm(falling) if self.together else MatrixKinkTerm(falling), inner_norms, norms]
        weights.append(self.adjoint_slack(1.0) * norms.sum(-1, keepdim=True))
        return self.back(inner), weights


@register(*REFLECTIONS, when=lambda layer: getattr(layer, "group", 2) == 2, keeps="images")  # larger groups are sorted, not reflected
def _reflection_alone(layer: nn.Module, clean: Tensor, scope: Scope) -> Expansion:
    return ReflectionExpansion(layer, clean, scope)
