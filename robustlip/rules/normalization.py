"""LayerNorm. MATH.md section 3: the global constant is ‖γ‖_∞/√eps, however large that is."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from robustlip.errors import UnsupportedLayer
from robustlip.rounding import norm_up
from robustlip.rules.base import Context, Rule, State, register


@register(nn.LayerNorm)
class LayerNormRule(Rule):
    """y = γ·c/s + β with c = Px, s = sqrt(‖c‖²/D + eps). Its Jacobian in c is (I − ccᵀ/(D s²))/s, of norm at most 1/s ≤ 1/√eps."""

    def step(self, layer: nn.LayerNorm, state: State, context: Context) -> State:
        if len(layer.normalized_shape) != 1:
            raise UnsupportedLayer(f"expected LayerNorm over the last dimension, got {tuple(layer.normalized_shape)}; normalise tokens one by one")
        state = state.by_token(layer).in_l2()
        width = layer.normalized_shape[0]
        scale = context.constant(layer, "scale", lambda: 1.0 if layer.weight is None else float(layer.weight.detach().abs().amax()))
        shift = context.constant(layer, "shift", lambda: 0.0 if layer.bias is None else float(norm_up(layer.bias.detach(), 0)))
        gain = scale / math.sqrt(layer.eps) * (1 + 1e-15)
        norm = state.norm * 0 + scale * math.sqrt(width) * (1 + 1e-15) + shift
        # Mean: γ_D‖x‖. Variance by Welford's or a two-pass formula, as torch computes it: off by at most D·u·(v + |μ|√v) (Chan, Golub and
        # LeVeque 1983), so 1/s by a relative ½D·u(1 + |μ|/(2√eps)) since √v/(v + eps) ≤ 1/(2√eps); twice that here, |μ| ≤ ‖x‖/√D.
        g = context.gamma(2 * width + 16)
        relative = g * (1 + state.norm / (2 * math.sqrt(width * layer.eps)))
        fresh = g * state.norm * gain * (1 + relative) + (relative + 8 * context.unit) * norm + math.sqrt(width) * context.tiny
        behind = replace(state, norm=norm + fresh, change=gain * state.change, rounding=gain * state.rounding + fresh)
        return context.finite(behind, state.norm**2)
