"""Joins of branches and averages. docs/theory.md, section 3."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from robustlip.numerics.arithmetic import Rounds
from robustlip.numerics.rounding import norm_up


def weighted_sum_error(scalars: Sequence[float], norms: Sequence[Tensor], width: int, arithmetic: Rounds) -> tuple[Tensor, Tensor]:
    """(‖fl(y) − y‖₂, ‖y‖₂) at most, for y = Σ_i a_i·u_i with ‖u_i‖₂ ≤ norms[i], |a_i| = scalars[i], of `width` numbers.

    In every term the scalar, the product and the sums round: k terms, k + 2 roundings each, with what they multiply to.
    """
    norm = sum((a * n for a, n in zip(scalars, norms, strict=True)), start=0 * norms[0])
    terms, root = len(norms), math.sqrt(width)
    fresh = (terms + 2) * arithmetic.unit * norm + (terms + 1) * root * arithmetic.tiny
    for a, n in zip(scalars, norms, strict=True):
        fresh = fresh + (root * a + n) * arithmetic.flushed  # subnormal operands
    return fresh, norm


def root_of_squares(norms: Sequence[Tensor]) -> Tensor:
    """‖(u_1, u_2, …)‖₂ of vectors side by side, ‖u_i‖₂ ≤ norms[i], rounded up."""
    return norm_up(torch.stack(list(norms), -1))


def mean_error(norm: Tensor, tokens: int, width: int, arithmetic: Rounds) -> Tensor:
    """‖fl(y) − y‖₂ of y = mean_t x_t, for ‖x_t‖₂ ≤ norm: a sum of T numbers and one division round at most T times."""
    return arithmetic.gamma(tokens + 1) * norm + math.sqrt(width) * arithmetic.tiny * tokens
