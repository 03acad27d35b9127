"""Elementwise layers. MATH.md sections 3 and 9. Their gain holds in ℓ1, ℓ2 and ℓ∞ alike, so the space passes through."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from robustlip.layers import Normalize, ScaledGELU
from robustlip.rounding import norm_up
from robustlip.rules.base import Context, Rule, State, register

# sup |gelu'|, rounded up; tests/test_rules_contract.py finds both maxima anew in 50 digits.
GELU_SLOPE = {"none": 1.1289042, "tanh": 1.1289932}

# How many units in the last place (of |x|, not of the result) an elementwise function of torch may be off in any dtype. Its vectorised
# erf, tanh and exp are good to 1 to 20 ulp (SLEEF and the flash kernel's exp_u20); 64 leaves room for both and for the products around.
FUNCTION_ULPS = 64


@register(nn.ReLU)
class ReLURule(Rule):
    """|relu'| ≤ 1, relu(0) = 0, and comparing with 0 is exact in every dtype."""

    def step(self, layer: nn.ReLU, state: State, context: Context) -> State:
        return state


@register(nn.Tanh)
class TanhRule(Rule):
    """|tanh'| ≤ 1, |tanh x| ≤ |x|."""

    def step(self, layer: nn.Tanh, state: State, context: Context) -> State:
        fresh = FUNCTION_ULPS * context.unit * state.norm + state.width**0.5 * context.tiny
        return replace(state, norm=state.norm + fresh, rounding=state.rounding + fresh)


@register(nn.GELU, ScaledGELU)
class GELURule(Rule):
    """|gelu'| ≤ 1.1289…, by form; |gelu x| ≤ |x|; both divided by the layer's divisor, once."""

    def step(self, layer: nn.GELU | ScaledGELU, state: State, context: Context) -> State:
        divisor = layer.divisor if isinstance(layer, ScaledGELU) else 1.0
        slope = GELU_SLOPE[layer.approximate] / divisor
        fresh = (FUNCTION_ULPS + 2) * context.unit * state.norm / divisor + state.width**0.5 * context.tiny * (1 + 1 / divisor)
        # The tanh form cubes its argument: x³ must not overflow. finite() sees the cube where it is computed.
        cube = state.norm**3 if layer.approximate == "tanh" else state.norm
        behind = replace(state, norm=state.norm / divisor + fresh, change=slope * state.change, rounding=slope * state.rounding + fresh)
        return context.finite(behind, cube)


@register(Normalize)
class NormalizeRule(Rule):
    """(x − mean)/std by channel: gain 1/min std."""

    def step(self, layer: Normalize, state: State, context: Context) -> State:
        gain = context.constant(layer, "gain", lambda: 1 / float(layer.std.double().min()) * (1 + 1e-15))
        # One mean per channel, subtracted from every number of the channel: at most √(numbers)·max|mean| in ℓ2.
        shift = context.constant(layer, "shift", lambda: float(norm_up(layer.mean.abs().amax().expand(1), 0)))
        reach = state.norm + shift * state.width**0.5 * state.tokens**0.5
        fresh = 4 * context.unit * gain * reach + state.width**0.5 * context.tiny * (1 + gain)
        behind = replace(
            state, norm=gain * reach + fresh, change=gain * state.change, rounding=gain * state.rounding + fresh
        )
        return context.finite(behind)
