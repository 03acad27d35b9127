"""LayerNorm and RMSNorm on the ball around a token, where they are far from their worst point. docs/theory.md, section 3.

y = γ·c/s (+ β), c = Px, s² = ‖c‖²/D + eps, P centring (LayerNorm) or the identity. On the ball ‖c‖ ≥ ‖c₀‖ − r, so s ≥ s_min, and there
    ‖dy‖ ≤ ‖γ‖_∞‖dc‖/s_min,      ‖d²y[u, u]‖ ≤ ‖γ‖_∞ · C‖u‖²/(√D s_min²),  C = 2/√3.
Second derivative of c/s: −[2(c·u)u + c‖u‖²]/(D s³) + 3c(c·u)²/(D² s⁵). With θ = ‖c‖/(√D s) ≤ 1 and u = (u_∥, u_⊥) along and across c its part
along c is −θ(3(1 − θ²)u_∥² + u_⊥²), across c it is −2θ u_∥u_⊥, both over √D s². The largest norm over θ in [0, 1] and unit u is 2/√3 (θ = 1,
u_⊥² = 2/3); tests/test_local.py checks it on a grid.

`WrittenNorm` may have m = D − 1 in the place of D, and s = ‖c‖/√m + eps. Then d(c/s) = (I − ccᵀ/(√m‖c‖s))/s·dc, and with θ = ‖c‖/(√m s) ≤ 1 the
second derivative is −(2(1 − θ)u_∥² + u_⊥²) along c and −2u_∥u_⊥ across it, both over √m s²: its norm is at most √(1 + 6u_∥² − 3u_∥⁴) ≤ 2. At
c = 0 the first derivative is continuous and the second is not, which a bound of the remainder does not need.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustlip.domains.expansion.base import ADJOINT_SLACK, Ball, Behind, Expansion, Pair, Scope, register, token_norms
from robustlip.layers.formulas import WrittenNorm
from robustlip.numerics.arithmetic import RoundingModel
from robustlip.numerics.rounding import U64, gamma, norm_up, up
from robustlip.ops.normalization import (
    Normalization,
    centres,
    curvature,
    divided_by,
    largest_gain,
    largest_shift,
    least_size,
    local_lipschitz,
    normalization_error,
    normalized,
)


@register(nn.LayerNorm, nn.RMSNorm, WrittenNorm)
class NormalizationExpansion(Expansion):
    by_token = ("clean", "input", "norm", "centred", "inverse", "bend", "at_centre", "slack")

    def __init__(self, layer: Normalization, clean: Tensor, scope: Scope) -> None:
        self.scope, self.layer = scope, layer
        self.width, self.eps = normalized(layer, clean.shape[-1])
        self.count, self.outside = divided_by(layer)
        self.centres = centres(layer)
        self.largest = scope.context.constant(layer, "scale", lambda: largest_gain(layer))
        bias = layer.bias if isinstance(layer, nn.LayerNorm) else None
        weight = layer.weight
        self.shift = largest_shift(layer)
        self.input, self.norm = clean, norm_up(clean)
        self.gamma = torch.ones(self.width, dtype=torch.float64, device=clean.device) if weight is None else weight.detach().double()
        self.centred = clean - clean.mean(-1, keepdim=True) if self.centres else clean
        spread = self.centred.square().mean(-1, keepdim=True) * (self.width / self.count)
        self.inverse = 1 / (spread.sqrt() + self.eps) if self.outside else torch.rsqrt(spread + self.eps)
        # The Jacobian of c/s is (I − bend·ccᵀ/m)/s.
        self.bend = self.inverse / spread.sqrt().clamp_min(1e-300) if self.outside else self.inverse.square()
        self.clean = self.gamma * self.centred * self.inverse
        if bias is not None:
            self.clean = self.clean + bias.detach().double()
        self.at_centre = local_lipschitz(layer, clean, 0.0)
        # A c that float64 made of a mean is off by γ‖x‖, and the Jacobian by its curvature times that: seen beside a tiny s alone.
        off = 2 * curvature(layer) * gamma(2 * self.width + 16, U64) * self.norm * self.inverse[..., 0] / math.sqrt(self.count) * self.centres
        self.slack = 4 * ADJOINT_SLACK + torch.where(off < ADJOINT_SLACK, 0.0, off)

    def advance(self, ball: Ball, remainder: bool = True) -> Behind:
        radius = ball.radius
        gain = local_lipschitz(self.layer, self.input, radius)  # ‖γ‖_∞/s_min
        root = math.sqrt(self.count) * (1 + 1e-15)
        norm = self.largest * root + self.shift
        inverse = gain / self.largest if self.largest else torch.full_like(gain, 1 / least_size(self.layer))  # 1/s_min

        def one(arithmetic: RoundingModel) -> Tensor:
            return normalization_error(self.layer, self.norm + radius, norm, inverse, arithmetic)

        # The sum of squares, and what comes out.
        fresh = self.scope.infinite_if_overflow(up(self.scope.both(one)), (self.norm + radius).square().clamp_min(norm))
        curve = 0.5 * curvature(self.layer) / math.sqrt(self.count) * gain * inverse * radius.square()
        bounds: list[Pair] = [up(curve), fresh, radius.amax(-1, keepdim=True)] if remainder else []
        moved = torch.minimum(up(gain * radius), torch.full_like(radius, 2 * self.largest * root)) + fresh
        return Behind(moved, up(self.at_centre * ball.error + curve) + fresh, bounds)

    def lipschitz(self) -> Tensor | float:
        return 4 * self.at_centre.amax(-1)

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Pair]]:
        norms = token_norms(g)
        slack = (self.slack * self.at_centre * norms).sum(-1, keepdim=True)
        inner = self.gamma * g
        # Symmetric. A token of 0 has no direction, and c·cᵀ is 0 then.
        inner = self.inverse * (inner - self.centred * (self.centred * inner).sum(-1, keepdim=True) * self.bend / self.count)
        if self.centres:
            inner = inner - inner.mean(-1, keepdim=True)
        return inner, [norms, norms, slack]
