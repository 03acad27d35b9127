"""Elementwise layers. docs/theory.md, sections 1 and 3. Their gain is the same in ℓ1, ℓ2 and ℓ∞, so they keep the space of the change."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from robustlip.domains.norms.state import Context, Rule, State, register, register_family
from robustlip.errors import BadInput
from robustlip.layers import Normalize
from robustlip.numerics.rounding import norm_up
from robustlip.ops import elementwise_of, is_elementwise
from robustlip.ops.affine import standardize_error


@register_family(is_elementwise)
class ElementwiseRule(Rule):
    """‖φ(x') − φ(x)‖ ≤ sup|φ'|·‖x' − x‖ in every norm; ‖φ(x)‖ and the execution error come from the facts in robustlip.ops."""

    def step(self, layer: nn.Module, state: State, context: Context) -> State:
        facts = elementwise_of(layer)
        by, root = facts.divisor, state.width**0.5 * (1 + 1e-15)
        slope = facts.steepest / by
        fresh = facts.executed_error(state.norm, root, context)
        norm = facts.size(state.norm, root) / by + fresh
        after = replace(state, norm=norm, change=slope * state.change, rounding=slope * state.rounding + fresh)
        return context.guard_flush(context.guard_overflow(after, facts.largest_intermediate(state.norm)), by)


# All of these are the identity in eval mode.
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@register(*DROPOUTS)
class DropoutRule(Rule):
    """The identity, in eval mode or with p = 0. Raises BadInput in train mode, where the layer is random."""

    def step(self, layer: nn.Dropout, state: State, context: Context) -> State:
        if layer.training and layer.p > 0:
            raise BadInput(f"expected {type(layer).__name__} in eval mode, got it in train mode, where it is random; call model.eval()")
        return state


@register(Normalize)
class NormalizeRule(Rule):
    """(x − mean)/std by channel: gain 1/min std."""

    def step(self, layer: Normalize, state: State, context: Context) -> State:
        whole = state.whole or (state.width,)
        channels = whole[0] if len(whole) == 3 else whole[-1]
        mean, std = layer.mean, layer.std
        assert isinstance(mean, torch.Tensor) and isinstance(std, torch.Tensor)
        if not bool((std != 0).all()):
            raise BadInput(f"expected std other than 0 in {std.dtype}, got {std.tolist()}; use a wider dtype, or leave constant channels at 1")
        sizes = {mean.numel(), std.numel()} - {1}
        if sizes - {channels}:
            # Broadcasting would repeat a channel, and its change.
            raise BadInput(f"expected a mean and std for each of {channels} channels, or one for all, got {max(sizes)}; give as many as channels")
        smallest = context.constant(layer, "smallest", lambda: float(std.double().abs().min()))
        gain = 1 / smallest * (1 + 1e-15)
        # One mean per channel, subtracted from every entry of the channel: at most √entries·max|mean| in ℓ2.
        shift = context.constant(layer, "shift", lambda: float(norm_up(mean.abs().amax().expand(1), 0)))
        reach = state.norm + shift * state.width**0.5 * state.tokens**0.5
        fresh = standardize_error(gain * reach, gain, state.width, context)
        after = replace(
            state, norm=gain * reach + fresh, change=gain * state.change, rounding=gain * state.rounding + fresh
        )
        return context.guard_flush(context.guard_overflow(after, reach), smallest)  # the difference must not overflow before the division
