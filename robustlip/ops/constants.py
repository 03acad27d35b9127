"""Multiplication and addition of constants: one constant, one per channel, or a table; zeros around images. docs/theory.md, section 3."""

from __future__ import annotations

import math

from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Scale, Shift
from robustlip.layers.constants import check_spread
from robustlip.numerics.arithmetic import RoundingModel
from robustlip.numerics.rounding import norm_up
from robustlip.ops.affine import shift_error


def check_channels(layer: Scale | Shift, shape: tuple[int, ...]) -> None:
    """Raises BadInput unless the layer has one constant, one per channel of samples (C, H, W), (T, D) or (n,), or a table that fits the samples."""
    if layer.value.dim() > 1:
        check_spread(layer, shape)
        return
    channels = shape[0] if len(shape) == 3 else shape[-1]
    if len(layer.value) not in (1, channels):
        raise BadInput(f"expected {channels} channels or one number in {type(layer).__name__}, got {len(layer.value)}; match them")


def scale_gain(layer: Scale) -> tuple[float, float]:
    """(the largest |factor|, rounded up; the smallest |divisor|, infinity if the layer multiplies). Raises BadInput for a divisor of 0."""
    size = layer.value.detach().double().abs()
    if not layer.divide:
        return float(size.amax()), math.inf
    smallest = float(size.amin())
    if not smallest > 0:
        raise BadInput("expected a divisor other than 0 in every channel, got 0; use a wider dtype, or leave such channels out")
    return 1 / smallest * (1 + 1e-15), smallest


def scale_error(norm: Tensor, gain: Tensor | float, width: int, arithmetic: RoundingModel) -> Tensor:
    """‖fl(x·c) − x·c‖₂ for ‖x‖₂ ≤ norm, |c| ≤ gain (or 1/|c|): one rounding per entry; products may underflow, x and c may be subnormal."""
    root = math.sqrt(width)
    return 2 * arithmetic.unit * gain * norm + root * (arithmetic.tiny * (1 + gain) + 2 * gain * arithmetic.flushed) + 2 * norm * arithmetic.flushed


def shift_size(layer: Shift, shape: tuple[int, ...], by_token: bool) -> float:
    """≥ the ℓ2 norm of the constant added to samples of that shape, or to each token (T, D): √n·max|c|; for a table its own norm."""
    value = layer.value.detach().double()
    if value.dim() == 1:
        return float(value.abs().amax()) * math.sqrt(shape[-1] if by_token else math.prod(shape)) * (1 + 1e-15)
    table = value.reshape(value.shape[-len(shape) :]).expand(shape)
    return float(norm_up(table).amax() if by_token else norm_up(table.flatten(), 0))


def shifted(norm: Tensor, size: Tensor | float, width: int, arithmetic: RoundingModel) -> tuple[Tensor, Tensor]:
    """Bounds (‖fl(x + c) − (x + c)‖₂, ‖x + c‖₂) for ‖x‖₂ ≤ norm and ‖c‖₂ ≤ size, with `width` entries."""
    reach = norm + size
    return shift_error(reach, width, arithmetic), reach


def zero_sides(layer: nn.ZeroPad2d) -> tuple[int, int, int, int]:
    """(left, right, top, bottom). Raises UnsupportedLayer for negative padding, which crops."""
    sides = tuple(int(n) for n in layer.padding)
    if len(sides) != 4 or min(sides) < 0:
        raise UnsupportedLayer(f"expected ZeroPad2d with four numbers of at least 0, got {sides}; cut images before the model")
    return sides[0], sides[1], sides[2], sides[3]
