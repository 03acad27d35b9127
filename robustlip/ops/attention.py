"""Attention, head by head: the execution error of each of its steps. docs/theory.md, section 3.

x_t → q, k, v of width d → rotation → logits c·q·k + mask → softmax → weighted sum; c = s/d in the paper. All covered kernels compute these steps, in
any order of summation: torch's fused kernels (a blockwise softmax calls exp once more per block of at least 16 keys), and matmul, a product or
quotient, a mask, softmax, matmul ('logits', 'query' and 'divide' of `Attention`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustlip.numerics.arithmetic import RoundingModel
from robustlip.ops.elementwise import FUNCTION_ULPS


def projection_error(frobenius: Tensor, norm: Tensor, width: int, head_width: int, arithmetic: RoundingModel) -> Tensor:
    """‖fl(W_h x) − W_h x‖₂ for the queries, keys or values of one head, ‖W_h‖_F ≤ frobenius, ‖x‖₂ ≤ norm, W_h (head_width, width)."""
    root = math.sqrt(head_width)
    error = arithmetic.gamma(width) * frobenius * norm + width * root * arithmetic.tiny
    return error + math.sqrt(width) * (frobenius + root * norm) * arithmetic.flushed  # subnormal inputs and weights


def table_error(norm: Tensor, head_width: int, arithmetic: RoundingModel) -> Tensor:
    """‖fl(Rx) − Rx‖₂ of a query or key rotated by tables of cos and sin, ‖x‖₂ ≤ norm: `rotation_error`, and table entries that are flushed."""
    return rotation_error(norm, head_width, arithmetic) + 2 * (norm + math.sqrt(head_width)) * arithmetic.flushed


def rotation_error(norm: Tensor, head_width: int, arithmetic: RoundingModel) -> Tensor:
    """‖fl(Rx) − Rx‖₂ of a rotated query or key: cos and sin round once, and each entry is a difference of two products: at most 6u‖x‖₂."""
    return 6 * arithmetic.unit * norm + 4 * head_width * arithmetic.tiny


def logit_error(
    logit: Tensor, query: Tensor, key: Tensor, scale: float, head_width: int, arithmetic: RoundingModel, explicit: str | None = None
) -> Tensor:
    """|fl(c·q·k) − c·q·k| for |c·q·k| ≤ logit, ‖q‖₂ ≤ query, ‖k‖₂ ≤ key, c = scale.

    Fused kernels may scale queries and keys by √c each first, explicit ones queries by c; what vanishes there is multiplied by the other, and
    where products are scaled afterwards, a subnormal number that counts for zero costs c times the other. c, or what divides in its place (a
    processor may multiply by the reciprocal), is rounded, and the product with it.
    """
    error = arithmetic.gamma(head_width + 6) * logit + (head_width + 4) * arithmetic.tiny * (1 + scale)
    if explicit is not None:
        return error + 2 * math.sqrt(head_width) * max(1.0, scale) * arithmetic.tiny * (query + key)
    return error + math.sqrt(head_width * max(scale, scale**2)) * arithmetic.tiny * (query + key)


def shifted(error: Tensor, logit: Tensor, bias: float, arithmetic: RoundingModel) -> Tensor:
    """The error of a logit after the bias (|·| ≤ bias) is added and the row's maximum subtracted; both round at the size of the logits."""
    return error + 3 * arithmetic.unit * (2 * (logit + bias) + error)


def mixing_error(length: int, arithmetic: RoundingModel) -> float:
    """The relative error of Σ_j softmax_j v_j from exp on: exp (once more per block), the sum, the division, the weighted sum of `length` values."""
    return arithmetic.gamma(2 * length + FUNCTION_ULPS * (2 + length // 16))


def mixing_underflow(length: int, value: Tensor, head_width: int, arithmetic: RoundingModel) -> Tensor:
    """The underflow error of that sum for ‖v_j‖₂ ≤ value: of the weights, and of each of `head_width` products per token."""
    return 2 * length * arithmetic.tiny * (value + math.sqrt(head_width))


def scaled_error(lost: Tensor, scale: float, norm: Tensor, width: int, arithmetic: RoundingModel) -> Tensor:
    """The error of scale·y with `width` entries, for ‖y‖₂ ≤ norm and |scale|·(the error of y) ≤ lost: the product and the scalar round."""
    by, root = abs(scale), math.sqrt(width)
    lost = lost + 3 * arithmetic.unit * (by * norm + lost) + root * arithmetic.tiny
    return lost + (by * root + norm) * arithmetic.flushed


def largest_in_kernel(
    projected: Tensor, value: Tensor, scale: float, tokens: int, dtype: torch.dtype, explicit: str | None = None
) -> Tensor:
    """The largest intermediate value of a kernel other than the logits. projected: bounds queries, keys and values; value: values; scale: of the
    logits.

    Rotations add two products. Queries and keys may be multiplied by √scale each, or queries by scale. A blockwise softmax sums e^(S_j − max)·v_j
    over all tokens before it divides. Sums of float16 numbers are computed in float32, where so many terms do not overflow.
    """
    turned = max(2.0, {None: math.sqrt(scale), "query": scale}.get(explicit, 1.0)) * projected
    return turned if dtype == torch.float16 else torch.maximum(turned, tokens * value)


def within_mask(largest: Tensor, depth: float) -> Tensor:
    """The largest logit that a kernel computes, or infinity where keys hidden by a mask of `depth` below 0 might have a weight.

    The weight of a hidden key is at most e^(2·largest − depth); values below e^(−10⁴) are 0 in every dtype.
    """
    if depth == math.inf:
        return largest
    return torch.where(2 * largest + 1e4 < depth, largest, torch.inf)
