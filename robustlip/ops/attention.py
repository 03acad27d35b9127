"""Attention, head by head: what execution loses in each of its steps. docs/theory.md, section 3.

x_t → q, k, v of width d → rotation → logits s·q·k/d + bias → softmax → weighted sum. All kernels that a certificate covers compute these steps, in
any order of summation; a blockwise softmax calls exp once more per block of at least 16 keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustlip.numerics.arithmetic import Rounds
from robustlip.ops.elementwise import FUNCTION_ULPS


def projection_error(frobenius: Tensor, norm: Tensor, width: int, head_width: int, arithmetic: Rounds) -> Tensor:
    """‖fl(W_h x) − W_h x‖₂ of one head's queries, keys or values, for ‖W_h‖_F ≤ frobenius, ‖x‖₂ ≤ norm, W_h (head_width, width)."""
    root = math.sqrt(head_width)
    error = arithmetic.gamma(width) * frobenius * norm + width * root * arithmetic.tiny
    return error + math.sqrt(width) * (frobenius + root * norm) * arithmetic.flushed  # subnormal inputs and weights


def rotation_error(norm: Tensor, head_width: int, arithmetic: Rounds) -> Tensor:
    """‖fl(Rx) − Rx‖₂ of a rotated query or key: cos and sin are rounded once, each number is a difference of two products, at most 6u of ‖x‖₂."""
    return 6 * arithmetic.unit * norm + 4 * head_width * arithmetic.tiny


def logit_error(logit: Tensor, query: Tensor, key: Tensor, scale: float, head_width: int, arithmetic: Rounds) -> Tensor:
    """|fl(s·q·k/d) − s·q·k/d| for |s·q·k/d| ≤ logit, ‖q‖₂ ≤ query, ‖k‖₂ ≤ key, scale = s/d.

    Kernels may scale queries and keys by √scale each first, and what vanishes there is multiplied by the other.
    """
    error = arithmetic.gamma(head_width + 6) * logit + (head_width + 4) * arithmetic.tiny * (1 + scale)
    return error + math.sqrt(head_width * scale) * arithmetic.tiny * (query + key)


def shifted(error: Tensor, logit: Tensor, bias: float, arithmetic: Rounds) -> Tensor:
    """The error of a logit once the bias (|bias| ≤ bias) was added and the row's maximum subtracted: both round at the size of the logits."""
    return error + 3 * arithmetic.unit * (2 * (logit + bias) + error)


def mixing_error(length: int, arithmetic: Rounds) -> float:
    """Relative error of Σ_j softmax_j v_j from exp on: exp (once more per block), the sum, the division, the weighted sum of `length` values."""
    return arithmetic.gamma(2 * length + FUNCTION_ULPS * (2 + length // 16))


def mixing_underflow(length: int, value: Tensor, arithmetic: Rounds) -> Tensor:
    """What underflow takes from that sum, for ‖v_j‖₂ ≤ value."""
    return 2 * length * arithmetic.tiny * (value + 1)


def scaled_error(lost: Tensor, scale: float, norm: Tensor, width: int, arithmetic: Rounds) -> Tensor:
    """The error of scale·y, `width` numbers, for ‖y‖₂ ≤ norm and |scale|·(the error of y) ≤ lost: the product and the scalar round."""
    by, root = abs(scale), math.sqrt(width)
    lost = lost + 3 * arithmetic.unit * (by * norm + lost) + root * arithmetic.tiny
    return lost + (by * root + norm) * arithmetic.flushed


def largest_in_kernel(projected: Tensor, value: Tensor, scale: float, tokens: int, dtype: torch.dtype) -> Tensor:
    """The largest number that a kernel may hold beside the logits. projected: of queries, keys and values; value: of values; scale: of the logits.

    Rotations add two products; queries and keys may be multiplied by √scale each; a blockwise softmax sums e^(S_j − max)·v_j over all tokens
    before it divides. Sums of float16 numbers are float32, of which so many do not overflow.
    """
    turned = max(2.0, math.sqrt(scale)) * projected
    return turned if dtype == torch.float16 else torch.maximum(turned, tokens * value)
