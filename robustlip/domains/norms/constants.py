"""Multiplication by constants, addition of constants, zeros around images. They act entry by entry, so their gains are those of ℓ1, ℓ2 and ℓ∞."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from robustlip.domains.norms.state import Context, Rule, State, register
from robustlip.layers import Scale, Shift
from robustlip.ops.constants import check_channels, scale_error, scale_gain, shift_size, shifted, zero_sides
from robustlip.ops.convolution import image_shape


def sample_shape(state: State) -> tuple[int, ...]:
    """The shape of a sample as seen by a table of constants: (D,) for a single token (T = 1, D)."""
    return state.whole or ((state.tokens, state.width) if state.tokens > 1 else (state.width,))


@register(Scale)
class ScaleRule(Rule):
    """x·c or x/c: gain max|c| or 1/min|c|."""

    def step(self, layer: Scale, state: State, context: Context) -> State:
        check_channels(layer, sample_shape(state))
        gain, smallest = context.constant(layer, f"scale-{layer.divide}", lambda: scale_gain(layer))
        fresh = scale_error(state.norm, gain, state.width, context)
        after = replace(state, norm=gain * state.norm + fresh, change=gain * state.change, rounding=gain * state.rounding + fresh)
        return context.guard_flush(context.guard_overflow(after), smallest)


@register(Shift)
class ShiftRule(Rule):
    """x + c or x − c: gain 1."""

    def step(self, layer: Shift, state: State, context: Context) -> State:
        shape, by_token = sample_shape(state), state.whole is None
        check_channels(layer, shape)
        size = context.constant(layer, f"shift-{shape}-{by_token}", lambda: shift_size(layer, shape, by_token))
        fresh, reach = shifted(state.norm, size, state.width, context)
        return context.guard_overflow(replace(state, norm=reach + fresh, rounding=state.rounding + fresh))


@register(nn.ZeroPad2d)
class ZeroPad2dRule(Rule):
    """Zeros around images: gain 1."""

    def step(self, layer: nn.ZeroPad2d, state: State, context: Context) -> State:
        channels, height, width = image_shape(layer, state.whole)
        left, right, top, bottom = zero_sides(layer)
        whole = (channels, height + top + bottom, width + left + right)
        return replace(state, width=math.prod(whole), whole=whole)
