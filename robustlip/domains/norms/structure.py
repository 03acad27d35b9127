"""Layers that rearrange entries or average tokens, and chains of layers."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from robustlip.domains.norms.state import Context, Rule, State, register, run_rules
from robustlip.errors import BadInput
from robustlip.layers import AddPositions, MeanTokens, Patchify
from robustlip.numerics.rounding import norm_up
from robustlip.ops.affine import shift_error
from robustlip.ops.joins import mean_error


@register(nn.Identity)
class IdentityRule(Rule):
    def step(self, layer: nn.Identity, state: State, context: Context) -> State:
        return state


@register(nn.Sequential)
class SequentialRule(Rule):
    def step(self, layer: nn.Sequential, state: State, context: Context) -> State:
        return run_rules(layer, state, context)


@register(nn.Flatten)
class FlattenRule(Rule):
    """All tokens of a sample become one vector: bounds by token grow by √T in ℓ2, by T in ℓ1, and not at all in ℓ∞."""

    def step(self, layer: nn.Flatten, state: State, context: Context) -> State:
        if layer.start_dim != 1 or layer.end_dim != -1:
            raise BadInput(f"expected Flatten(1, -1), got Flatten({layer.start_dim}, {layer.end_dim}); flatten all but the batch")
        root = math.sqrt(state.tokens) * (1 + 1e-15)
        growth = {"l2": root, "l1": float(state.tokens), "linf": 1.0}[state.space]
        return replace(
            state,
            norm=state.norm * root,
            change=state.change * growth,
            rounding=state.rounding * root,
            tokens=1,
            width=state.tokens * state.width,
            whole=None,
        )


@register(Patchify)
class PatchifyRule(Rule):
    """Every pixel belongs to one token, so no token changes by more than the image."""

    def step(self, layer: Patchify, state: State, context: Context) -> State:
        if state.whole is None or len(state.whole) != 3:
            raise BadInput("expected images (N, C, H, W) before Patchify, got vectors or tokens; patchify first")
        channels, height, width = state.whole
        return replace(
            state, tokens=(height // layer.patch) * (width // layer.patch), width=channels * layer.patch**2, whole=None
        )


@register(AddPositions)
class AddPositionsRule(Rule):
    """Adds a constant to each token."""

    def step(self, layer: AddPositions, state: State, context: Context) -> State:
        state = state.by_token(layer)
        if layer.positions.dim() != 2 or layer.positions.shape[1] != state.width:
            raise BadInput(f"expected positions of width {state.width}, got {tuple(layer.positions.shape)}; match the tokens' width")
        largest = context.constant(layer, "rows", lambda: float(norm_up(layer.positions.detach()).amax()))
        norm = state.norm + largest
        fresh = shift_error(norm, state.width, context)
        return context.guard_overflow(replace(state, norm=norm + fresh, rounding=state.rounding + fresh))


@register(MeanTokens)
class MeanTokensRule(Rule):
    """‖mean_t Δ_t‖ ≤ max_t ‖Δ_t‖ in every norm."""

    def step(self, layer: MeanTokens, state: State, context: Context) -> State:
        state = state.by_token(layer)
        fresh = mean_error(state.norm, state.tokens, state.width, context)
        after = replace(state, norm=state.norm + fresh, rounding=state.rounding + fresh, tokens=1)
        return context.guard_overflow(after, state.norm * state.tokens)
