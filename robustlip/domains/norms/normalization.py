"""Normalisation. docs/theory.md, section 3: the global Lipschitz constant of LayerNorm, RMSNorm, GroupNorm and InstanceNorm is ‖γ‖_∞/√eps, which may
be large. Batch norm in eval mode is affine.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from robustlip.domains.norms.state import Context, Rule, State, register, register_family
from robustlip.ops.normalization import (
    BATCH_NORMS,
    BatchNorm,
    BatchScale,
    Normalization,
    batch_positions,
    centres,
    check_batch,
    divided_by,
    is_normalization,
    largest_gain,
    largest_shift,
    least_size,
    normalization_error,
    normalized,
    stays_whole,
)


@register_family(is_normalization)
class NormalizationRule(Rule):
    """y = γ·c/s + β for each group, with c = Px, s = sqrt(‖c‖²/D + eps), and P the centring, or the identity (RMSNorm, without β).

    The Jacobian in c is (I − ccᵀ/(D s²))/s, of norm at most 1/s ≤ 1/√eps, and ‖c/s‖ ≤ √D. Without β, y(0) = 0, so also ‖y‖ ≤ ‖γ‖_∞‖x‖/√eps.
    `WrittenNorm` may divide by √(‖c‖²/(D − 1) + eps), or by ‖c‖/√m + eps, where the norm of the Jacobian is at most 1/s ≤ 1/eps.
    For k groups the Jacobian is block-diagonal, and ‖y‖ ≤ ‖γ‖_∞√(k m) + ‖β‖.
    """

    def step(self, layer: Normalization, state: State, context: Context) -> State:
        whole = state.whole is not None and stays_whole(layer, state.whole)
        state = (state if whole else state.by_token(layer)).in_l2()
        groups = normalized(layer, state.whole, state.tokens, state.width)
        least, root = least_size(layer), math.sqrt(groups.count * divided_by(layer, groups)[0])
        scale = context.constant(layer, "scale", lambda: largest_gain(layer))
        shift = context.constant(layer, f"shift-{groups.numbers}", lambda: largest_shift(layer, groups))
        gain = scale / least * (1 + 1e-15)
        norm = torch.full_like(state.norm, scale * root * (1 + 1e-15)) + shift
        if not centres(layer):
            norm = torch.minimum(gain * state.norm, norm)
        fresh = normalization_error(layer, groups, state.norm, norm, 1 / least, context)
        after = replace(state, norm=norm + fresh, change=gain * state.change, rounding=gain * state.rounding + fresh)
        return context.guard_overflow(after, state.norm**2)


@register(*BATCH_NORMS)
class BatchNormRule(Rule):
    """In eval mode y = g·x + (β − g·mean) by channel with g = γ/sqrt(var + eps) of the running statistics: gain max|g| and a constant shift."""

    def step(self, layer: BatchNorm, state: State, context: Context) -> State:
        check_batch(layer)
        positions = batch_positions(layer, state.whole, state.tokens, state.width)
        scale: BatchScale = context.constant(layer, f"batch-{layer.eps}", lambda: BatchScale.of(layer))
        fresh = scale.error(state.norm, positions, state.width, context)
        reach, gain = scale.output_norm(state.norm, positions), scale.gain
        after = replace(state, norm=reach + fresh, change=gain * state.change, rounding=gain * state.rounding + fresh)
        return context.guard_overflow(after, scale.largest(state.norm))
