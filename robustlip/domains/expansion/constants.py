"""Multiplication by constants and addition of constants: affine, so adjoints are exact. Tables (T, D) are applied to each token."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from robustlip.domains.expansion.base import Ball, Expansion, Scope, register
from robustlip.domains.expansion.convolution import MapStep
from robustlip.layers import Scale, Shift
from robustlip.ops.constants import check_channels, scale_error, scale_gain, shift_size, shifted
from robustlip.ops.convolution import image_shape
from robustlip.ops.maps import LinearMap, ScaleMap, map_of


def sample_shape(clean: Tensor, scope: Scope) -> tuple[int, ...]:
    """The shape of a sample as seen by a table of constants: (D,) for a single token (T = 1, D)."""
    return scope.whole or tuple(clean.shape[1:] if clean.shape[1] > 1 else clean.shape[2:])


class ConstantStep(MapStep):
    """A constant, one constant per channel, or a table. gain: the largest |factor|."""

    def __init__(self, layer: Scale | Shift, clean: Tensor, scope: Scope, gain: float) -> None:
        shape, width = sample_shape(clean, scope), tuple(clean.shape[-1:])
        check_channels(layer, shape)

        def by_token() -> LinearMap:
            m = map_of(layer, shape)
            assert isinstance(m, ScaleMap)
            bias = None if m.bias is None else m.bias.reshape(shape)
            return replace(m, shape=width, out=width, weight=m.weight.reshape(shape), bias=bias)

        # A table (T, D) has different factors for each token.
        spread = scope.whole is None and layer.value.dim() > 1 and len(shape) > 1
        super().__init__(layer, clean, scope, scope.whole or width, by_token if spread else None)
        self.space, self.whole = scope.space, scope.whole
        self.sigma = self.gain = self.frobenius = gain
        self.slack = self.adjoint_slack()

    def at_rows(self, sample: Tensor, position: Tensor, rounding_radii: Tensor) -> Expansion:
        part, m = super().at_rows(sample, position, rounding_radii), self.map
        assert isinstance(m, ScaleMap)
        return part if m.weight.dim() == 1 else part.replaced(map=replace(m, weight=m.weight[position].unsqueeze(1), bias=None))


@register(Scale, any_space=True, keeps="any")
class ScaleExpansion(ConstantStep):
    """x·c or x/c."""

    def __init__(self, layer: Scale, clean: Tensor, scope: Scope) -> None:
        gain, self.smallest = scale_gain(layer)
        super().__init__(layer, clean, scope, gain)

    def execution_error(self, norm: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
        fresh = self.scope.both(lambda arithmetic: scale_error(norm, self.gain, self.map.outputs, arithmetic))
        return self.scope.infinite_if_flushed(fresh, self.smallest), self.gain * norm


@register(Shift, any_space=True, keeps="any")
class ShiftExpansion(ConstantStep):
    """x + c or x − c."""

    def __init__(self, layer: Shift, clean: Tensor, scope: Scope) -> None:
        shape = sample_shape(clean, scope)
        check_channels(layer, shape)
        self.size = shift_size(layer, shape, scope.whole is None)
        super().__init__(layer, clean, scope, 1.0)

    def execution_error(self, norm: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
        width = self.map.outputs
        fresh = self.scope.both(lambda arithmetic: shifted(norm, self.size, width, arithmetic)[0])
        return fresh, shifted(norm, self.size, width, self.scope.context)[1]


@register(nn.ZeroPad2d, any_space=True, keeps="any")
class ZeroPad2dExpansion(MapStep):
    """Zeros around images. Nothing is computed, so nothing rounds."""

    def __init__(self, layer: nn.ZeroPad2d, clean: Tensor, scope: Scope) -> None:
        super().__init__(layer, clean, scope, image_shape(layer, scope.whole))
        self.space = scope.space
        self.sigma = self.gain = self.frobenius = 1.0
        self.slack = self.adjoint_slack()

    def execution_error(self, norm: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(norm), norm
