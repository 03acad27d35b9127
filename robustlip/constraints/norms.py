"""Norms for use while training: fast, in the dtype of the weights, with no claim that a certificate could rest on."""

from __future__ import annotations

import torch
from torch import Tensor


def fast_norm_bound(matrix: Tensor, iterations: int = 8) -> Tensor:
    """An upper bound of ‖M‖₂ of matrices (..., m, n) in their own dtype, for use while training: Gram iteration (Delattre et al. 2023).

    Over-estimates by at most n^(1/2^(iterations + 2)), 0.6 % for n = 512. Inflated by 10⁻⁵ for float32 rounding, which is a margin
    and not a proof: certificates use robustlip.numerics.spectral instead.
    """
    # The largest entry is 1: squares of what training produces do not vanish, and powers of them do not overflow.
    largest = largest_entry(matrix, (-2, -1))
    matrix = matrix / largest
    gram = gram_of(matrix)
    log_scale = torch.zeros(matrix.shape[:-2], dtype=torch.float64, device=matrix.device)
    for i in range(iterations + 1):
        size = torch.linalg.matrix_norm(gram).clamp_min(torch.finfo(gram.dtype).tiny)
        log_scale = log_scale + size.double().log() / 2**i
        gram = gram / size[..., None, None]
        if i < iterations:
            gram = gram @ gram
    return ((log_scale / 2).exp() * (1 + 1e-5) * largest[..., 0, 0]).to(matrix.dtype)


def gram_of(matrix: Tensor) -> Tensor:
    """MMᵀ of matrices (..., m, n), or MᵀM where that is smaller: σ² on the left or on the right singular vectors."""
    return matrix.mT @ matrix if matrix.shape[-2] > matrix.shape[-1] else matrix @ matrix.mT


def times(factor: Tensor, matrix: Tensor) -> Tensor:
    """A function of gram_of(M) applied to M, from the side that it belongs to."""
    return matrix @ factor if matrix.shape[-2] > matrix.shape[-1] else factor @ matrix


def fixed_vectors(count: int, like: Tensor) -> Tensor:
    """`count` unit vectors as rows (..., count, n) for matrices (..., m, n), the same for the same shape: a start without any state.

    Entries cos(i²·c), c irrational to π: no weight that training produces is orthogonal to all of them.
    """
    n = like.shape[-1]
    index = torch.arange(1, n * count + 1, dtype=torch.float64, device=like.device)
    start = torch.cos(index.square() * 0.7548776662466927).reshape(count, n)
    return unit(start).to(like.dtype).expand(*like.shape[:-2], count, n)


def largest_entry(values: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """The largest |entry| over dims, which are kept; 1 where all are 0, so that it can divide."""
    largest = values.abs().amax(dims, keepdim=True)
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1, whatever their scale; rows of zeros stay zeros."""
    return _unit_and_length(rows)[0]


def _unit_and_length(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(rows of length 1 (..., n), what their lengths were (..., 1)): squares of tiny entries do not vanish, those of huge ones do not overflow."""
    largest = largest_entry(rows, -1)
    rows = rows / largest
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / length.clamp_min(torch.finfo(rows.dtype).tiny), length * largest


def top_singular(matrix: Tensor, iterations: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """(u, σ, v): power iteration for the largest singular value of (..., m, n); u (..., m, 1), σ = uᵀMv (..., 1, 1), v (..., n, 1).

    σ is below the truth until it has converged: an estimate, of which nothing may be certified.
    """
    # Vectors as rows on the left: batched products with a column on the right are ten times slower on a CPU.
    v = fixed_vectors(1, matrix)
    for _ in range(iterations):
        v = unit(unit(v @ matrix.mT) @ matrix)
    u, length = _unit_and_length(v @ matrix.mT)
    return u.mT, length, v.mT


def probe(matrix: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """(norms, next block): one step of subspace iteration for (K, m, n) from orthonormal rows (K, 2, n).

    norms (K,) = the larger ‖Mv‖ of the two rows v: a *lower* bound of ‖M‖₂ up to rounding, so one above a cap is a sure violation.
    """
    mapped = block @ matrix.mT
    mapped, length = _unit_and_length(mapped)
    norms = length[..., 0].amax(-1)
    back = mapped @ matrix
    start = fixed_vectors(1, matrix)
    first, second = back[..., :1, :], unit(back[..., 1:, :])
    # Zeros leave nothing for the first row, and a matrix of rank one nothing for the second: any row will do.
    first = unit(torch.where((first == 0).all(-1, keepdim=True), start, first))
    second = second - first * (first * second).sum(-1, keepdim=True)
    lost = torch.linalg.vector_norm(second, dim=-1, keepdim=True) < 1e-5
    return norms, torch.cat([first, unit(torch.where(lost, start, second))], -2)
