"""Joins of branches and averages. docs/theory.md, section 3."""

from __future__ import annotations

import math

from torch import Tensor

from robustlip.numerics.arithmetic import Rounds


def weighted_sum_error(scalars: tuple[float, float], first: Tensor, second: Tensor, width: int, arithmetic: Rounds) -> tuple[Tensor, Tensor]:
    """(‖fl(y) − y‖₂, ‖y‖₂) at most, for y = a·u + b·v with ‖u‖₂ ≤ first, ‖v‖₂ ≤ second, (|a|, |b|) = scalars, of `width` numbers.

    The two scalars, two products and the sum round once each.
    """
    a, b = scalars
    norm = a * first + b * second
    root = math.sqrt(width)
    fresh = 4 * arithmetic.unit * norm + 3 * root * arithmetic.tiny
    return fresh + (root * (a + b) + first + second) * arithmetic.flushed, norm  # subnormal operands


def mean_error(norm: Tensor, tokens: int, width: int, arithmetic: Rounds) -> Tensor:
    """‖fl(y) − y‖₂ of y = mean_t x_t, for ‖x_t‖₂ ≤ norm: a sum of T numbers and one division round at most T times."""
    return arithmetic.gamma(tokens + 1) * norm + math.sqrt(width) * arithmetic.tiny * tokens
