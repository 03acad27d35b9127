"""Elementwise layers. MATH.md sections 3 and 9. Their gain holds in ℓ1, ℓ2 and ℓ∞ alike, so the space passes through."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from robustlip.errors import BadInput
from robustlip.layers import Normalize, ScaledGELU
from robustlip.rounding import norm_up
from robustlip.rules.base import Context, Rule, State, register

# sup |gelu'|, rounded up; tests/test_rules_contract.py finds both maxima anew in 50 digits.
GELU_SLOPE = {"none": 1.1289042, "tanh": 1.1289932}

# sup |silu'|, rounded up, found anew by the same test.
SILU_SLOPE = 1.0998394

# How many units in the last place (of |x|, not of the result) an elementwise function of torch may be off in any dtype. Its vectorised
# erf, tanh and exp are good to 1 to 20 ulp (SLEEF and the flash kernel's exp_u20); 64 leaves room for both and for the products around.
FUNCTION_ULPS = 64


@register(nn.ReLU)
class ReLURule(Rule):
    """|relu'| ≤ 1, relu(0) = 0, and comparing with 0 is exact in every dtype, but for subnormals."""

    def step(self, layer: nn.ReLU, state: State, context: Context) -> State:
        return replace(state, rounding=state.rounding + state.width**0.5 * context.flushed)


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
        divisor = abs(layer.divisor) if isinstance(layer, ScaledGELU) else 1.0
        slope = GELU_SLOPE[layer.approximate] / divisor
        fresh = (FUNCTION_ULPS + 2) * context.unit * state.norm / divisor + state.width**0.5 * context.tiny * (1 + 1 / divisor)
        # The tanh form cubes its argument: x³ must not overflow. finite() sees the cube where it is computed.
        cube = state.norm**3 if layer.approximate == "tanh" else state.norm
        behind = replace(state, norm=state.norm / divisor + fresh, change=slope * state.change, rounding=slope * state.rounding + fresh)
        return context.divided(context.finite(behind, cube), divisor)


@register(nn.Sigmoid)
class SigmoidRule(Rule):
    """|sigmoid'| ≤ 1/4, 0 < sigmoid < 1. Where exp(−x) overflows the result is 0 instead of less than 1/max: added once."""

    def step(self, layer: nn.Sigmoid, state: State, context: Context) -> State:
        root = state.width**0.5 * (1 + 1e-15)
        # sigmoid(0) = ½, so ‖y‖ is at most √n/2 + ‖x‖/4, and at most √n.
        norm = (root / 2 + state.norm / 4).clamp_max(root)
        fresh = FUNCTION_ULPS * context.unit * norm + root * (context.tiny + 1 / torch.finfo(context.dtype).max)
        return replace(state, norm=norm + fresh, change=state.change / 4, rounding=state.rounding / 4 + fresh)


@register(nn.SiLU)
class SiLURule(Rule):
    """|silu'| ≤ 1.0998…, |silu x| ≤ |x|. Where exp(−x) overflows the result is 0 instead of less than |x|/max: added once."""

    def step(self, layer: nn.SiLU, state: State, context: Context) -> State:
        fresh = (FUNCTION_ULPS + 2) * context.unit * state.norm + state.norm / torch.finfo(context.dtype).max
        fresh = fresh + state.width**0.5 * context.tiny * (1 + state.norm)
        behind = replace(state, norm=state.norm + fresh, change=SILU_SLOPE * state.change, rounding=SILU_SLOPE * state.rounding + fresh)
        return context.finite(behind)


# The identity in eval mode, every one of them.
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
            # Broadcasting would make one channel into several, each with its own share of the change.
            raise BadInput(f"expected a mean and std for each of {channels} channels, or one for all, got {max(sizes)}; give as many as channels")
        smallest = context.constant(layer, "smallest", lambda: float(std.double().abs().min()))
        gain = 1 / smallest * (1 + 1e-15)
        # One mean per channel, subtracted from every number of the channel: at most √(numbers)·max|mean| in ℓ2.
        shift = context.constant(layer, "shift", lambda: float(norm_up(mean.abs().amax().expand(1), 0)))
        reach = state.norm + shift * state.width**0.5 * state.tokens**0.5
        # x, mean and their difference may all be subnormal, and are divided.
        fresh = 4 * context.unit * gain * reach + state.width**0.5 * (context.tiny * (1 + gain) + 2 * gain * context.flushed)
        behind = replace(
            state, norm=gain * reach + fresh, change=gain * state.change, rounding=gain * state.rounding + fresh
        )
        return context.divided(context.finite(behind, reach), smallest)  # the difference, before it is divided
