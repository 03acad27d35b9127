"""Convolution and pooling of signals, images and volumes. docs/theory.md, section 3; constants are in robustlip.ops.convolution."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from robustlip.domains.norms.state import Context, Rule, State, register
from robustlip.errors import UnsupportedLayer
from robustlip.ops.convolution import (
    CONVOLUTIONS,
    MAXIMA,
    MEANS,
    TRANSPOSED,
    Conv,
    Convolution,
    Maximum,
    Mean,
    Transposed,
    check_algorithm,
    image_shape,
    maxima_error,
    pooled,
)
from robustlip.ops.resampling import UPSAMPLES, average_of


def check_weights(layer: nn.Module, moves: bool) -> None:
    """Raises UnsupportedLayer where the weights of a transposed convolution may change."""
    if moves and type(layer) in TRANSPOSED:
        name = type(layer).__name__
        raise UnsupportedLayer(f"expected weights of Linear, Embedding, Conv and attention under a weight threat, got {name}; use another threat")


def convolution_of(layer: Conv | Transposed, whole: tuple[int, ...] | None, context: Context) -> Convolution:
    """The constants of the layer on images of that shape, cached. Raises UnsupportedLayer where torch may use another algorithm."""
    shape = image_shape(layer, whole)
    check_algorithm(layer)
    check_weights(layer, context.weight_radius is not None)
    if isinstance(layer, TRANSPOSED):
        key = f"convolution-{shape}-{layer}"
        return context.constant(layer, key, lambda: Convolution.transposed(layer, shape))  # type: ignore[no-any-return]
    key = f"convolution-{shape}-{layer.stride}-{layer.padding}-{layer.dilation}-{layer.groups}-{layer.padding_mode}"
    return context.constant(layer, key, lambda: Convolution.of(layer, shape))  # type: ignore[no-any-return]


@register(*CONVOLUTIONS, *TRANSPOSED)
class ConvolutionRule(Rule):
    """y = W*x + b on images, or the transposed convolution. Any stride, dilation, groups and padding mode."""

    def step(self, layer: Conv | Transposed, state: State, context: Context) -> State:
        c = convolution_of(layer, state.whole, context)
        perturbed = context.weight_change(c.matrix) * c.window_gain  # 0 for transposed convolutions: check_weights refuses weight threats
        fresh = c.error(state.norm, perturbed, context)
        after = replace(
            state,
            norm=(c.gain + perturbed) * state.norm + c.shift + fresh,
            change=c.gain_from(state.space) * state.change + perturbed * state.norm,
            rounding=(c.gain + perturbed) * state.rounding + fresh,
            space="l2",
            width=math.prod(c.out),
            whole=c.out,
        )
        return context.guard_overflow(after, c.largest(state.norm, perturbed))


@register(*MEANS, *UPSAMPLES)
class AveragePoolRule(Rule):
    """The mean of each window of each channel (padding counts as 0), of adaptive windows, and interpolation."""

    def step(self, layer: Mean | nn.Upsample, state: State, context: Context) -> State:
        average = average_of(layer, state.whole)
        fresh = average.error(state.norm, context)
        after = replace(
            state,
            norm=average.gain * state.norm + fresh,
            change=average.gain_in(state.space) * state.change,
            rounding=average.gain * state.rounding + fresh,
            width=math.prod(average.out),
            whole=average.out,
        )
        return context.guard_overflow(after, average.largest(state.norm))


@register(*MAXIMA)
class MaximumRule(Rule):
    """|max x' − max x| ≤ max|x' − x| over each window. If c windows read an entry, the gain is √c in ℓ2, c in ℓ1, 1 in ℓ∞.

    Padding is never the maximum.
    """

    def step(self, layer: Maximum, state: State, context: Context) -> State:
        if layer.return_indices:
            raise UnsupportedLayer(f"expected {type(layer).__name__} that returns its maxima only, got return_indices=True; leave it at False")
        reads, _, out = pooled(layer, image_shape(layer, state.whole))
        root = math.sqrt(reads) * (1 + 1e-15)
        gain = {"l2": root, "l1": float(reads), "linf": 1.0}[state.space]
        return replace(
            state, norm=root * state.norm, change=gain * state.change, width=math.prod(out), whole=out,
            rounding=root * state.rounding + maxima_error(out, context),
        )  # fmt: skip
