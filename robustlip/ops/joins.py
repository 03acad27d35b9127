"""Execution errors of joins of branches and of averages. docs/theory.md, section 3."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustlip.errors import BadInput
from robustlip.layers import Clamp, Constant, Maximum, Minimum, Shift
from robustlip.numerics.arithmetic import RoundingModel
from robustlip.numerics.rounding import norm_up


def weighted_sum_error(scalars: Sequence[float], norms: Sequence[Tensor], width: int, arithmetic: RoundingModel) -> tuple[Tensor, Tensor]:
    """Bounds (‖fl(y) − y‖₂, ‖y‖₂) for y = Σ_i a_i·u_i with ‖u_i‖₂ ≤ norms[i], |a_i| = scalars[i], and `width` entries.

    In every term the scalar, the product and the sums round: k terms with k + 2 roundings each.
    """
    norm = sum((a * n for a, n in zip(scalars, norms, strict=True)), start=0 * norms[0])
    terms, root = len(norms), math.sqrt(width)
    fresh = (terms + 2) * arithmetic.unit * norm + (terms + 1) * root * arithmetic.tiny
    for a, n in zip(scalars, norms, strict=True):
        fresh = fresh + (root * a + n) * arithmetic.flushed  # subnormal operands
    return fresh, norm


def product_error(norm: Tensor, first: Tensor, second: Tensor, width: int, arithmetic: RoundingModel) -> Tensor:
    """‖fl(a∘b) − a∘b‖₂ for executed ‖a∘b‖₂ ≤ norm, ‖a‖₂ ≤ first, ‖b‖₂ ≤ second, and `width` entries: one rounding each."""
    # Products may underflow, and a processor may flush a or b to zero.
    return 2 * arithmetic.unit * norm + math.sqrt(width) * arithmetic.tiny + (first + second) * arithmetic.flushed


def spread_over(shape: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How often each entry of a product's second factor is used. Shapes of samples: (C, H, W), (T, D) or (n,).

    Raises BadInput for shapes that torch would broadcast differently, or not at all.
    """
    if shape == other:
        return 1
    if len(shape) == 3 and other == (shape[0], 1, 1):
        return shape[1] * shape[2]
    raise BadInput(
        f"expected branches of Product that put out one shape, or (C, 1, 1) after the second of images, got {shape} and {other}; match them"
    )


def bounded_by(layer: Maximum) -> tuple[nn.Module, nn.Sequential] | None:
    """Of the maximum or minimum of a branch and a constant c: that branch, and what follows it. None for two branches of another kind.

    max(a, c) = c + relu(a − c), min(a, c) = c + min(a − c, 0): the same function in exact arithmetic, of which bounds are tighter than of any two
    branches. What its sums round is more than the maximum itself, which is exact.
    """
    held = [branch for branch in layer.branches if type(branch) is Constant]
    if len(held) != 1:
        return None
    (c,), (other,) = held, [branch for branch in layer.branches if branch is not held[0]]
    bend = Clamp(None, 0.0) if type(layer) is Minimum else nn.ReLU()
    return other, nn.Sequential(Shift(c.value, subtract=True), bend, Shift(c.value))


def root_of_squares(norms: Sequence[Tensor]) -> Tensor:
    """‖(u_1, u_2, …)‖₂ of concatenated vectors with ‖u_i‖₂ ≤ norms[i], rounded up."""
    return norm_up(torch.stack(list(norms), -1))


def mean_error(norm: Tensor, tokens: int, width: int, arithmetic: RoundingModel) -> Tensor:
    """‖fl(y) − y‖₂ for y = mean_t x_t with ‖x_t‖₂ ≤ norm: a sum of T terms and one division round at most T times."""
    return arithmetic.gamma(tokens + 1) * norm + math.sqrt(width) * arithmetic.tiny * tokens
