"""Activations that reflect pairs of channels: MaxMin, sorting in twos, Householder. With the Linear layer in front of them or alone.

Each pair z of channels has a unit vector v, and p = ⟨v, z⟩ becomes |p| while the rest of z stays: an isometry, linear as long as no p changes its
sign. From p to p + Δ the absolute value is above its tangent by R = |p + Δ| − sign(p)(p + Δ), which is 0 for |Δ| ≤ |p| and at most 2(|Δ| − |p|)
beyond, so only an adjoint ω = ⟨g, v⟩ < 0 lets it lower the margin: robustlip.domains.expansion.crossing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustlip.domains.expansion.base import Ball, Behind, Expansion, Pair, Scope, register, token_norms
from robustlip.domains.expansion.crossing import Crossing, Kinks
from robustlip.domains.expansion.linear import AffineStep
from robustlip.domains.expansion.neurons import Neurons
from robustlip.domains.norms import Context
from robustlip.errors import UnsupportedLayer
from robustlip.layers import GroupSort, Householder, MaxMin
from robustlip.numerics.rounding import norm_up, up
from robustlip.ops.maps import dual_norms

REFLECTIONS = (MaxMin, GroupSort, Householder)


def pairs_of(layer: nn.Module, width: int, like: Tensor, whole: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(numbers (n,), numbers (n,), v (n, 2)) of the pairs of a layer that reflects channels: `width` of them, or those of images (C, H, W)."""
    if whole is None:
        return _pairs(layer, width, like)
    if len(whole) != 3:
        name = type(layer).__name__
        raise UnsupportedLayer(f"expected vectors, tokens or images in front of {name}, got samples of shape {whole}; use method='global'")
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
        v = torch.tensor([-1.0, 1.0], dtype=like.dtype, device=like.device) / math.sqrt(2)  # ascending: the second is the larger
    else:
        a, b = number[: width // 2], number[width // 2 :]
        if isinstance(layer, Householder):
            half = layer.angle.detach().double() / 2
            return a, b, torch.stack([half.sin(), -half.cos()], -1)
        v = torch.tensor([1.0, -1.0], dtype=like.dtype, device=like.device) / math.sqrt(2)
    return a, b, v.expand(len(a), 2)


class ReflectionExpansion(Neurons):
    """(z + (|p| − p)v) pair by pair for z = Wx + b, or for z = x when there is no affine step in front."""

    by_token = (*Neurons.by_token, "flip", "unsure")

    def __init__(self, layer: nn.Module, clean: Tensor, scope: Scope, affine: AffineStep | None = None) -> None:
        super().__init__(layer, clean, scope, affine)
        z = self.clean
        self.a, self.b, self.v = pairs_of(layer, z.shape[-1], z, self.whole)
        p = self.read(z)
        self.distance = p.abs()
        self.flip = (p < 0).to(z.dtype)
        self.clean = self.reflect(z, -2 * p * self.flip)
        # p as float64 has it may have the other sign where it is next to 0: there the tangent is another, and R may be 2|p| more.
        self.unsure = 8 * 2.0**-53 * self.z_norm
        if affine is None:
            self.reading, self.rows = None, torch.ones(1, dtype=z.dtype, device=z.device)
        elif affine.matrix is None:
            self.reading, self.rows = None, affine.pair_rows(self.a, self.b, self.v)
        else:
            weight = affine.matrix
            self.reading = self.v[:, :1] * weight[self.a] + self.v[:, 1:] * weight[self.b]
            # Rows that nearly cancel are off by as much as what they were made of.
            sizes = dual_norms(weight[self.a], scope.space) + dual_norms(weight[self.b], scope.space)
            self.rows = up(dual_norms(self.reading, scope.space) + 2.0**-50 * sizes)

    def read(self, z: Tensor) -> Tensor:
        """p (…, n) of z (…, 2n)."""
        return self.v[:, 0] * z[..., self.a] + self.v[:, 1] * z[..., self.b]

    def reflect(self, z: Tensor, by: Tensor) -> Tensor:
        """z + by·v pair by pair."""
        out = z.clone()
        out[..., self.a] += by * self.v[:, 0]
        out[..., self.b] += by * self.v[:, 1]
        return out

    def _rounding(self, norm: Tensor) -> Tensor:
        """‖executed − exact‖ for executed ‖z‖ ≤ norm, and of the reference; as in rules.sorting."""
        root = math.sqrt(self.clean.shape[-1]) * (1 + 1e-15)

        def one(context: Context) -> Tensor:
            if isinstance(self.layer, Householder):
                return 32 * context.unit * norm + 8 * root * context.tiny * (1 + norm)
            return torch.zeros_like(norm) + 2 * root * context.flushed

        # The reference is not sorted but reflected, in all three.
        own = 32 * 2.0**-53 * norm + 8 * root * 2.0**-1022 * (1 + norm)
        return self.scope.infinite_if_overflow(up(one(self.scope.context) + own), 4 * norm)

    def lipschitz(self) -> Tensor | float:
        return self.sigma

    def advance(self, ball: Ball, remainder: bool = True) -> Behind:
        each, whole, fresh = self.reached(ball)
        rounding = self._rounding(self.z_norm + whole)
        behind = up(whole) + rounding
        if not remainder:
            return Behind(behind, ball.error, [])
        curved, bound = self._bend(ball.radius, each, whole, fresh)
        error = up((self.sigma * ball.error + fresh + curved) * (1 + 1e-12)) + rounding
        return Behind(behind, error, [bound, fresh, rounding, ball.radius.amax(-1, keepdim=True)])

    def _bend(self, radius: Tensor, each: Tensor, whole: Tensor, fresh: Tensor) -> tuple[Tensor, Pair]:
        """(‖R‖ (…, N, T) of all pairs together, the bound of each). each ≥ |Δp|, whole ≥ ‖Δp‖; fresh: of what is not linear in Δx."""
        near = (self.distance - self.unsure.unsqueeze(-1)).clamp_min(0.0)
        if self.together:
            kinks = Kinks(None, near, each, whole, height=2.0)
            return kinks.norm(), kinks
        matrix = self.reading if self.scope.space == "l2" else None
        if matrix is not None and self.affine is not None:
            fresh = up(fresh + 2.0**-49 * self.affine.frobenius * radius)  # of the matrix as float64 has it
        bound = Crossing(None, None, near, each, whole, matrix, radius, fresh)
        return torch.minimum(norm_up(bound.crossing), up(2 * bound.share * whole)), bound

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Pair]]:
        omega = self.read(g)
        inner = self.reflect(g, -2 * omega * self.flip)
        size, norms, inner_norms = omega.abs(), token_norms(g), token_norms(inner)
        falling = size if two_sided else (size - omega) / 2
        weights: list[Pair] = [Kinks(falling) if self.together else Crossing(falling), inner_norms, norms]
        weights.append(self.adjoint_slack(1.0) * norms.sum(-1, keepdim=True))
        return self.back(inner), weights


@register(*REFLECTIONS, when=lambda layer: getattr(layer, "group", 2) == 2, keeps="images")  # larger groups are sorted, not reflected
def _reflection_alone(layer: nn.Module, clean: Tensor, scope: Scope) -> Expansion:
    return ReflectionExpansion(layer, clean, scope)
