"""Multiplication by constants and addition of constants: affine, so their adjoints are exact."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustlip.domains.expansion.base import Ball, Scope, register
from robustlip.domains.expansion.convolution import MapStep
from robustlip.layers import Scale, Shift
from robustlip.ops.constants import check_channels, scale_error, scale_gain, shift_size, shifted
from robustlip.ops.convolution import image_shape


class ConstantStep(MapStep):
    """One constant, or one a channel. gain: the largest |factor|."""

    def __init__(self, layer: Scale | Shift, clean: Tensor, scope: Scope, gain: float) -> None:
        shape = scope.whole or tuple(clean.shape[-1:])
        check_channels(layer, shape)
        super().__init__(layer, clean, scope, shape)
        self.space, self.whole = scope.space, scope.whole
        self.sigma = self.gain = self.frobenius = gain
        self.slack = self.adjoint_slack()


@register(Scale, any_space=True, keeps="any")
class ScaleExpansion(ConstantStep):
    """x·c or x/c."""

    def __init__(self, layer: Scale, clean: Tensor, scope: Scope) -> None:
        gain, self.smallest = scale_gain(layer)
        super().__init__(layer, clean, scope, gain)

    def lost(self, norm: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
        fresh = self.scope.both(lambda arithmetic: scale_error(norm, self.gain, self.map.outputs, arithmetic))
        return self.scope.divided(fresh, self.smallest), self.gain * norm


@register(Shift, any_space=True, keeps="any")
class ShiftExpansion(ConstantStep):
    """x + c or x − c."""

    def __init__(self, layer: Shift, clean: Tensor, scope: Scope) -> None:
        self.size = shift_size(layer)
        super().__init__(layer, clean, scope, 1.0)

    def lost(self, norm: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
        width = self.map.outputs
        fresh = self.scope.both(lambda arithmetic: shifted(norm, self.size, width, arithmetic)[0])
        return fresh, shifted(norm, self.size, width, self.scope.context)[1]


@register(nn.ZeroPad2d, any_space=True, keeps="any")
class ZeroPad2dExpansion(MapStep):
    """Zeros around images: nothing is computed."""

    def __init__(self, layer: nn.ZeroPad2d, clean: Tensor, scope: Scope) -> None:
        super().__init__(layer, clean, scope, image_shape(layer, scope.whole))
        self.space = scope.space
        self.sigma = self.gain = self.frobenius = 1.0
        self.slack = self.adjoint_slack()

    def lost(self, norm: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(norm), norm
