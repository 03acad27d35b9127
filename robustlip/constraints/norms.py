"""Norms for training: fast, in the dtype of the weights, without proof."""

from __future__ import annotations

import torch
from torch import Tensor


def fast_norm_bound(matrix: Tensor, iterations: int = 8) -> Tensor:
    """An upper bound of ‖M‖₂ for matrices (..., m, n) in their own dtype, for training: Gram iteration (Delattre et al. 2023).

    Exceeds the norm by a factor of at most n^(1/2^(iterations + 2)), 0.6 % for n = 512. Increased by 10⁻⁵ for float32 rounding, which is a margin
    and not a proof: certificates use robustlip.numerics.spectral instead.
    """
    # Scaled to a largest entry of 1, so that squares of trained weights do not underflow and powers do not overflow.
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
    """MMᵀ of matrices (..., m, n), or MᵀM if that is smaller: it has σ² on the left or on the right singular vectors."""
    return matrix.mT @ matrix if matrix.shape[-2] > matrix.shape[-1] else matrix @ matrix.mT


def times(factor: Tensor, matrix: Tensor) -> Tensor:
    """A function of gram_of(M) times M, on the side on which gram_of was computed."""
    return matrix @ factor if matrix.shape[-2] > matrix.shape[-1] else factor @ matrix


def fixed_vectors(count: int, like: Tensor) -> Tensor:
    """`count` unit vectors as rows (..., count, n) for matrices (..., m, n), always the same for the same shape: starting vectors without state.

    Entries cos(i²·c) with c/π irrational: trained weights are in practice never orthogonal to all of them.
    """
    n = like.shape[-1]
    index = torch.arange(1, n * count + 1, dtype=torch.float64, device=like.device)
    start = torch.cos(index.square() * 0.7548776662466927).reshape(count, n)
    return unit(start).to(like.dtype).expand(*like.shape[:-2], count, n)


def largest_entry(values: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """The largest |entry| over dims, which are kept; 1 if all are 0, so that one can divide by it."""
    largest = values.abs().amax(dims, keepdim=True)
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def unit(rows: Tensor) -> Tensor:
    """Rows scaled to length 1; rows of zeros stay zeros."""
    return _unit_and_length(rows)[0]


def _unit_and_length(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(rows of length 1 (..., n), their lengths (..., 1)), without underflow or overflow of squares."""
    largest = largest_entry(rows, -1)
    rows = rows / largest
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / length.clamp_min(torch.finfo(rows.dtype).tiny), length * largest


def top_singular(matrix: Tensor, iterations: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """(u, σ, v): power iteration for the largest singular value of (..., m, n); u (..., m, 1), σ = uᵀMv (..., 1, 1), v (..., n, 1).

    σ is a lower estimate until it has converged; it must not be used as a bound.
    """
    # Vectors are rows on the left: batched products with a column on the right are ten times slower on a CPU.
    v = fixed_vectors(1, matrix)
    for _ in range(iterations):
        v = unit(unit(v @ matrix.mT) @ matrix)
    u, length = _unit_and_length(v @ matrix.mT)
    return u.mT, length, v.mT


def probe(matrix: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """(norms, next block): one step of subspace iteration for (K, m, n) from orthonormal rows (K, 2, n).

    norms (K,) = the larger ‖Mv‖ of the two rows v: a *lower* bound of ‖M‖₂ up to rounding, so a value above a cap is a certain violation.
    """
    mapped = block @ matrix.mT
    mapped, length = _unit_and_length(mapped)
    norms = length[..., 0].amax(-1)
    back = mapped @ matrix
    start = fixed_vectors(1, matrix)
    first, second = back[..., :1, :], unit(back[..., 1:, :])
    # A zero matrix gives no first row, and a matrix of rank one no second; any other row can be used.
    first = unit(torch.where((first == 0).all(-1, keepdim=True), start, first))
    second = second - first * (first * second).sum(-1, keepdim=True)
    lost = torch.linalg.vector_norm(second, dim=-1, keepdim=True) < 1e-5
    return norms, torch.cat([first, unit(torch.where(lost, start, second))], -2)
