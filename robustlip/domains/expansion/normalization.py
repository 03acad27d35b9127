"""LayerNorm, RMSNorm, GroupNorm and InstanceNorm on the ball around each group, where their gain is far below its global bound. docs/theory.md,
section 3.

y = γ·c/s (+ β), c = Px, s² = ‖c‖²/D + eps, where P is the centring or the identity (RMSNorm). On the ball ‖c‖ ≥ ‖c₀‖ − r, so s ≥ s_min, and there
    ‖dy‖ ≤ ‖γ‖_∞‖dc‖/s_min,      ‖d²y[u, u]‖ ≤ ‖γ‖_∞ · C‖u‖²/(√D s_min²),  C = 2/√3.
The second derivative of c/s is −[2(c·u)u + c‖u‖²]/(D s³) + 3c(c·u)²/(D² s⁵). With θ = ‖c‖/(√D s) ≤ 1 and u = (u_∥, u_⊥) along and across c, its part
along c is −θ(3(1 − θ²)u_∥² + u_⊥²) and its part across c is −2θ u_∥u_⊥, both over √D s². The largest norm over θ in [0, 1] and unit vectors u is 2/√3
(at θ = 1, u_⊥² = 2/3); tests/test_local.py checks it on a grid.

`WrittenNorm` may have m = D − 1 instead of D, and s = ‖c‖/√m + eps. Then d(c/s) = (I − ccᵀ/(√m‖c‖s))/s·dc. With θ = ‖c‖/(√m s) ≤ 1 the second
derivative is −(2(1 − θ)u_∥² + u_⊥²) along c and −2u_∥u_⊥ across it, both over √m s²; its norm is at most √(1 + 6u_∥² − 3u_∥⁴) ≤ 2. At c = 0 the first
derivative is continuous and the second is not, but the bound of the remainder does not need that.

If a vector has several groups, each changes by at most r, and Σ_g‖Δ_g‖² ≤ r². So ‖dy‖ ≤ max_g(‖γ_g‖_∞/s_min,g)·r. With curvatures k_g the remainder
R_g is at most ½k_g‖Δ_g‖²; the remainders of all groups have norm √Σ_g(½k_g‖Δ_g‖²)² ≤ ½max_g k_g·r², and with an adjoint ω they give
Σ_g‖ω_g‖½k_g‖Δ_g‖² ≤ max_g‖ω_g‖·½max_g k_g·r².
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustlip.domains.expansion.base import ADJOINT_SLACK, Ball, Expansion, OutputBounds, Scope, Term, register_family, token_norms
from robustlip.numerics.arithmetic import RoundingModel
from robustlip.numerics.rounding import U64, gamma, norm_up, up
from robustlip.ops.normalization import (
    Groups,
    Normalization,
    centres,
    curvature,
    divided_by,
    gains,
    is_normalization,
    largest_gain,
    largest_shift,
    least_size,
    local_lipschitz,
    normalization_error,
    normalized,
    spread,
)


def _together(sizes: Tensor) -> Tensor:
    """≥ the norm of groups side by side, sizes (…, G) of each."""
    return sizes[..., 0] if sizes.shape[-1] == 1 else norm_up(sizes)


@register_family(is_normalization, keeps="images")
class NormalizationExpansion(Expansion):
    """Tensors by group are (N, T, G), of a group's numbers (N, T, G, D)."""

    by_token = ("clean", "input", "norm", "centred", "inverse", "bend", "at_centre", "slack")

    def __init__(self, layer: Normalization, clean: Tensor, scope: Scope) -> None:
        self.scope, self.layer, self.whole = scope, layer, scope.whole
        self.groups = groups = normalized(layer, scope.whole, *clean.shape[1:])
        self.one = Groups(1, groups.width, groups.eps)
        self.count, self.outside = divided_by(layer, groups)
        self.centres = centres(layer)
        self.largest = scope.context.constant(layer, "scale", lambda: largest_gain(layer))
        self.gains = gains(layer, groups)
        bias = getattr(layer, "bias", None)
        self.shift = largest_shift(layer, groups)
        self.input = clean = clean.unflatten(-1, (groups.count, groups.width))
        self.norm = norm_up(clean)
        self.gamma = torch.ones((), dtype=torch.float64, device=clean.device) if layer.weight is None else spread(layer, layer.weight, groups)
        self.centred = clean - clean.mean(-1, keepdim=True) if self.centres else clean
        size = self.centred.square().mean(-1, keepdim=True) * (groups.width / self.count)
        self.inverse = 1 / (size.sqrt() + groups.eps) if self.outside else torch.rsqrt(size + groups.eps)
        # The Jacobian of c/s is (I − bend·ccᵀ/m)/s.
        self.bend = self.inverse / size.sqrt().clamp_min(1e-300) if self.outside else self.inverse.square()
        out = self.gamma * self.centred * self.inverse
        self.clean = (out if bias is None else out + spread(layer, bias, groups)).flatten(-2)
        self.at_centre = local_lipschitz(layer, clean, 0.0, groups)
        # The float64 error of c is γ‖x‖, and that of the Jacobian its curvature times this; it only matters if s is tiny.
        off = 2 * curvature(layer) * gamma(2 * groups.width + 16, U64) * self.norm * self.inverse[..., 0] / math.sqrt(self.count) * self.centres
        self.slack = 4 * ADJOINT_SLACK + torch.where(off < ADJOINT_SLACK, 0.0, off)

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        radius = ball.radius
        each = radius.unsqueeze(-1)
        gain = local_lipschitz(self.layer, self.input, each, self.groups)  # ‖γ‖_∞/s_min
        root = math.sqrt(self.count) * (1 + 1e-15)
        norm = self.largest * root + self.shift  # of each group
        inverse = torch.nan_to_num(gain / self.gains, nan=math.inf) if self.largest else torch.full_like(gain, math.inf)
        inverse = inverse.clamp_max(1 / least_size(self.layer) * (1 + 1e-12))  # 1/s_min

        def one(arithmetic: RoundingModel) -> Tensor:
            return normalization_error(self.layer, self.one, self.norm + each, norm, inverse, arithmetic)

        # The largest of the sum of squares and the output.
        largest = (self.norm + each).square().clamp_min(norm).amax(-1)
        fresh = self.scope.infinite_if_overflow(_together(up(self.scope.both(one))), largest)
        curve = (0.5 * curvature(self.layer) / math.sqrt(self.count) * gain * inverse * each.square()).amax(-1)
        bounds: list[Term] = [up(curve), fresh, radius.amax(-1, keepdim=True)] if remainder else []
        most = torch.full_like(radius, 2 * self.largest * root * math.sqrt(self.groups.count))
        moved = torch.minimum(up(gain.amax(-1) * radius), most) + fresh
        return OutputBounds(moved, up(self.at_centre.amax(-1) * ball.error + curve) + fresh, bounds)

    def lipschitz(self) -> Tensor | float:
        return 4 * self.at_centre.amax((-1, -2))

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        norms = token_norms(g)
        grouped = g.unflatten(-1, (self.groups.count, self.groups.width))
        each = token_norms(grouped)
        slack = (self.slack * self.at_centre * each).flatten(-2).sum(-1, keepdim=True)
        inner = self.gamma * grouped
        # The Jacobian is symmetric. For a token of 0, c·cᵀ is 0.
        inner = self.inverse * (inner - self.centred * (self.centred * inner).sum(-1, keepdim=True) * self.bend / self.count)
        if self.centres:
            inner = inner - inner.mean(-1, keepdim=True)
        return inner.flatten(-2), [each.amax(-1), norms, slack]
