"""Normalisation. docs/theory.md, section 3: the global constant of LayerNorm and RMSNorm is ‖γ‖_∞/√eps, however large that is; batch norm in eval
mode is affine."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from robustlip.domains.norms.state import Context, Rule, State, register
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.numerics.rounding import norm_up, up
from robustlip.ops.normalization import largest_gain, largest_shift, normalization_error, normalized


@register(nn.LayerNorm, nn.RMSNorm)
class NormalizationRule(Rule):
    """y = γ·c/s + β with c = Px, s = sqrt(‖c‖²/D + eps), P centring (LayerNorm) or the identity (RMSNorm, without β).

    The Jacobian in c is (I − ccᵀ/(D s²))/s, of norm at most 1/s ≤ 1/√eps, and ‖c/s‖ ≤ √D. Without β y(0) = 0, so ‖y‖ ≤ ‖γ‖_∞‖x‖/√eps too.
    """

    def step(self, layer: nn.LayerNorm | nn.RMSNorm, state: State, context: Context) -> State:
        state = state.by_token(layer).in_l2()
        width, eps = normalized(layer, state.width)
        scale = context.constant(layer, "scale", lambda: largest_gain(layer))
        shift = context.constant(layer, "shift", lambda: largest_shift(layer))
        gain = scale / math.sqrt(eps) * (1 + 1e-15)
        norm = torch.full_like(state.norm, scale * math.sqrt(width) * (1 + 1e-15)) + shift
        if isinstance(layer, nn.RMSNorm):
            norm = torch.minimum(gain * state.norm, norm)
        fresh = normalization_error(layer, state.norm, norm, 1 / math.sqrt(eps), context)
        behind = replace(state, norm=norm + fresh, change=gain * state.change, rounding=gain * state.rounding + fresh)
        return context.finite(behind, state.norm**2)


@register(nn.BatchNorm1d, nn.BatchNorm2d)
class BatchNormRule(Rule):
    """In eval mode y = g·x + (β − g·mean) by channel, g = γ/sqrt(var + eps) of the running statistics: gain max|g|, a constant shift."""

    def step(self, layer: nn.BatchNorm1d | nn.BatchNorm2d, state: State, context: Context) -> State:
        if layer.training:
            raise BadInput(f"expected {type(layer).__name__} in eval mode, got it in train mode, where samples change each other; call model.eval()")
        if layer.running_mean is None or layer.running_var is None:
            raise UnsupportedLayer(f"expected {type(layer).__name__} with running statistics, got none: samples change each other; track them")
        images = isinstance(layer, nn.BatchNorm2d)
        if images and (state.whole is None or len(state.whole) != 3):
            raise BadInput("expected images (N, C, H, W) in front of BatchNorm2d, got vectors or tokens; put it in front of Flatten and Patchify")
        if not images and (state.whole is not None or state.tokens != 1):
            raise BadInput("expected vectors (N, n) in front of BatchNorm1d, got tokens or images; put Flatten in front, or use LayerNorm for tokens")
        channels, positions = (state.whole[0], state.whole[1] * state.whole[2]) if images and state.whole else (state.width, 1)
        if layer.num_features != channels:
            raise BadInput(f"expected {channels} channels in BatchNorm, got {layer.num_features}; match them")

        mean_of, variance_of = layer.running_mean, layer.running_var

        def constants() -> tuple[float, float, float, float]:
            """(max|g|, ‖β‖ + ‖g·mean‖, max|mean|, smallest var + eps), rounded outward."""
            variance = variance_of.double() + layer.eps
            if not bool((variance > 0).all()):
                raise BadInput(f"expected running variances + eps above 0, got {float(variance.min())}; retrain the layer")
            gains = up(1 / variance.sqrt()) if layer.weight is None else up(layer.weight.detach().double().abs() / variance.sqrt())
            shift = norm_up(gains * mean_of.double().abs(), 0)
            beta = 0.0 if layer.bias is None else float(norm_up(layer.bias.detach(), 0))
            return float(gains.amax()), float(up(shift)) + beta, float(mean_of.abs().amax()), float(variance.min()) * (1 - 1e-12)

        gain, shift, mean, variance = context.constant(layer, f"batch-{layer.eps}", constants)
        reach = gain * state.norm + shift * math.sqrt(positions) * (1 + 1e-12)
        # A handful of roundings each of γ/sqrt(var + eps), g·x, g·mean and the sums, in any order; a tiny var + eps may itself be rounded by `tiny`.
        relative = context.gamma(16) + 2 * context.tiny / variance
        relative = relative if relative < 1 else math.inf
        fresh = relative * reach + 4 * math.sqrt(state.width) * context.tiny * (1 + gain) * (1 + mean + state.norm)
        fresh = fresh + math.sqrt(state.width) * (state.norm + mean) / math.sqrt(variance) * context.flushed  # a subnormal γ
        fresh = torch.where(fresh.isnan(), torch.full_like(fresh, math.inf), fresh)
        behind = replace(state, norm=reach + fresh, change=gain * state.change, rounding=gain * state.rounding + fresh)
        return context.finite(behind, (state.norm + mean) * (1 + gain) / math.sqrt(min(1.0, variance)))
