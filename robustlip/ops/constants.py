"""Multiplication by constants and addition of constants, one for all numbers or one a channel; zeros around images. docs/theory.md, section 3."""

from __future__ import annotations

import math

from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Scale, Shift
from robustlip.numerics.arithmetic import Rounds
from robustlip.ops.affine import shift_error


def check_channels(layer: Scale | Shift, shape: tuple[int, ...]) -> None:
    """Raises BadInput unless there is one constant, or one for each channel of samples (C, H, W), (T, D) or (n,): torch would spread another."""
    channels = shape[0] if len(shape) == 3 else shape[-1]
    if len(layer.value) not in (1, channels):
        raise BadInput(f"expected {channels} channels or one number in {type(layer).__name__}, got {len(layer.value)}; match them")


def scale_gain(layer: Scale) -> tuple[float, float]:
    """(the largest |factor|, rounded up; the smallest |divisor|, infinity for a product)."""
    size = layer.value.detach().double().abs()
    if not layer.divide:
        return float(size.amax()), math.inf
    smallest = float(size.amin())
    if not smallest > 0:
        raise BadInput("expected a divisor other than 0 in every channel, got 0; use a wider dtype, or leave such channels out")
    return 1 / smallest * (1 + 1e-15), smallest


def scale_error(norm: Tensor, gain: float, width: int, arithmetic: Rounds) -> Tensor:
    """‖fl(x·c) − x·c‖₂ for ‖x‖₂ ≤ norm, |c| ≤ gain (or 1/|c|): one rounding a number; products vanish, and x and c may be subnormal."""
    root = math.sqrt(width)
    return 2 * arithmetic.unit * gain * norm + root * (arithmetic.tiny * (1 + gain) + 2 * gain * arithmetic.flushed) + 2 * norm * arithmetic.flushed


def shift_size(layer: Shift) -> float:
    """max|c|."""
    return float(layer.value.detach().double().abs().amax())


def shifted(norm: Tensor, size: float, width: int, arithmetic: Rounds) -> tuple[Tensor, Tensor]:
    """(‖fl(x + c) − (x + c)‖₂, ‖x + c‖₂) at most, for ‖x‖₂ ≤ norm and |c| ≤ size in each of `width` numbers."""
    reach = norm + size * math.sqrt(width) * (1 + 1e-15)
    return shift_error(reach, width, arithmetic), reach


def zero_sides(layer: nn.ZeroPad2d) -> tuple[int, int, int, int]:
    """(left, right, top, bottom). Raises UnsupportedLayer for negative ones, which cut."""
    sides = tuple(int(n) for n in layer.padding)
    if len(sides) != 4 or min(sides) < 0:
        raise UnsupportedLayer(f"expected ZeroPad2d with four numbers of at least 0, got {sides}; cut images in front of the model")
    return sides[0], sides[1], sides[2], sides[3]
