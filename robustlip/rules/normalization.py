"""Normalisation. MATH.md section 3: the global constant of LayerNorm and RMSNorm is ‖γ‖_∞/√eps, however large that is; batch norm in eval
mode is affine."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.rounding import TINY, U64, gamma, norm_up, up
from robustlip.rules.base import Context, Rule, State, register


def normalized(layer: nn.LayerNorm | nn.RMSNorm, state_width: int | None = None) -> tuple[int, float]:
    """(width D of the tokens that are normalised, eps). Raises UnsupportedLayer for layers that no constant here is proved for."""
    name = type(layer).__name__
    if type(layer) not in (nn.LayerNorm, nn.RMSNorm):
        raise UnsupportedLayer(f"expected LayerNorm or RMSNorm, got {name}; replace it or add a rule")
    if len(layer.normalized_shape) != 1:
        raise UnsupportedLayer(f"expected {name} over the last dimension, got {tuple(layer.normalized_shape)}; normalise tokens one by one")
    if layer.eps is None:
        raise UnsupportedLayer(f"expected {name} with its eps stated, got None, which stands for another number in every dtype; give eps=1e-6, say")
    if not layer.eps > 0:
        raise UnsupportedLayer(f"expected {name} with eps above 0, got {layer.eps}: it is not Lipschitz without; give eps=1e-6, say")
    width = layer.normalized_shape[0]
    if state_width not in (None, width):
        raise BadInput(f"expected tokens of width {width} in front of {name}, got {state_width}; match them")
    return width, float(layer.eps)


def largest_gain(layer: nn.LayerNorm | nn.RMSNorm) -> float:
    """‖γ‖_∞."""
    return 1.0 if layer.weight is None else float(layer.weight.detach().abs().amax())


def local_lipschitz(layer: nn.LayerNorm | nn.RMSNorm, x: Tensor, radius: Tensor | float) -> Tensor:
    """A Lipschitz constant (…), float64, of the layer on the ℓ2 balls of `radius` (…) around the tokens x (…, D): ‖f(x') − f(x)‖₂ ≤ it·‖x' − x‖₂.

    The Jacobian at x' is γ(I − ccᵀ/(D s²))/s·P with c = Px', s² = ‖c‖²/D + eps, of norm at most ‖γ‖_∞/s, and ‖Px'‖ ≥ ‖Px‖ − r on the
    ball, which is convex. P centres (LayerNorm) or is the identity (RMSNorm). MATH.md section 3. Exact arithmetic; rounding comes on top.
    """
    width, eps = normalized(layer, x.shape[-1])
    x = x.detach().double()
    centred = x - x.mean(-1, keepdim=True) if isinstance(layer, nn.LayerNorm) else x
    # The computed ‖Px‖ is off by γ_{D+4} of itself and, through the mean, of ‖x‖.
    size = torch.linalg.vector_norm(centred, dim=-1) * (1 - 2 * gamma(width + 8, U64)) - 2 * gamma(width + 8, U64) * norm_up(x)
    least = ((size - radius) * (1 - 8 * U64)).clamp_min(0.0)
    return up(largest_gain(layer) / (least.square() / width * (1 - 8 * U64) + eps * (1 - 8 * U64)).sqrt())


@register(nn.LayerNorm)
class LayerNormRule(Rule):
    """y = γ·c/s + β with c = Px, s = sqrt(‖c‖²/D + eps). Its Jacobian in c is (I − ccᵀ/(D s²))/s, of norm at most 1/s ≤ 1/√eps."""

    def step(self, layer: nn.LayerNorm, state: State, context: Context) -> State:
        state = state.by_token(layer).in_l2()
        width, eps = normalized(layer, state.width)
        scale = context.constant(layer, "scale", lambda: largest_gain(layer))
        shift = context.constant(layer, "shift", lambda: 0.0 if layer.bias is None else float(norm_up(layer.bias.detach(), 0)))
        gain = scale / math.sqrt(eps) * (1 + 1e-15)
        norm = state.norm * 0 + scale * math.sqrt(width) * (1 + 1e-15) + shift
        # Mean: γ_D‖x‖. Variance by Welford's or a two-pass formula, as torch computes it: off by at most D·u·(v + |μ|√v) (Chan, Golub and
        # LeVeque 1983), so 1/s by a relative ½D·u(1 + |μ|/(2√eps)) since √v/(v + eps) ≤ 1/(2√eps); twice that here, |μ| ≤ ‖x‖/√D.
        g = context.gamma(2 * width + 16)
        # Squares that vanish (torch sums them in float32 at least) move s² by a tiny/eps.
        relative = g * (1 + state.norm / (2 * math.sqrt(width * eps))) + 2 * TINY[torch.float32] / eps
        # The first-order form holds while the variance keeps its size; beyond, its square root may be of anything.
        relative = torch.where(relative < 1, relative, torch.full_like(relative, math.inf))
        fresh = g * state.norm * gain * (1 + relative) + (relative + 8 * context.unit) * norm + math.sqrt(width) * context.tiny
        fresh = fresh + 2 * math.sqrt(width) * (gain + 1 / math.sqrt(eps) + state.norm / math.sqrt(eps)) * context.flushed  # subnormal x, γ
        behind = replace(state, norm=norm + fresh, change=gain * state.change, rounding=gain * state.rounding + fresh)
        return context.finite(behind, state.norm**2)


@register(nn.RMSNorm)
class RMSNormRule(Rule):
    """y = γ·x/s, s = sqrt(‖x‖²/D + eps): as LayerNorm without the centring, so the variance is a sum of squares and nothing cancels."""

    def step(self, layer: nn.RMSNorm, state: State, context: Context) -> State:
        state = state.by_token(layer).in_l2()
        width, eps = normalized(layer, state.width)
        scale = context.constant(layer, "scale", lambda: largest_gain(layer))
        gain = scale / math.sqrt(eps) * (1 + 1e-15)
        norm = torch.minimum(gain * state.norm, torch.full_like(state.norm, scale * math.sqrt(width) * (1 + 1e-15)))
        # Every factor is off by a few u, the mean of squares by γ_D; squares that vanish as in LayerNorm.
        relative = context.gamma(2 * width + 16) + 2 * TINY[torch.float32] / eps
        if relative >= 1:
            relative = math.inf
        fresh = relative * norm + 4 * math.sqrt(width) * context.tiny * (1 + norm)
        fresh = fresh + 2 * math.sqrt(width) * (gain + state.norm / math.sqrt(eps)) * context.flushed  # subnormal x, γ
        fresh = torch.where(fresh.isnan(), torch.full_like(fresh, math.inf), fresh)
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
