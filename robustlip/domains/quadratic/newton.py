"""A primal-dual interior-point method for the program of LipSDP, which uses the structure of M(ρ, λ). Its result is not trusted.

Minimise ρ over S = M(ρ, λ) ⪰ 0. The dual variable is a matrix P ⪰ 0 with tr(A_iP) = 0 for every multiplier and tr(P_cc) = 1; at the optimum PS = 0.
One step solves the linearised PS = μI (the HKM direction; Helmberg et al. 1996) with Mehrotra's corrector. The entries of its Schur complement are
tr(A_i P A_j S⁻¹). Since A_i = Σ_{r in group i}(B_rᵀB_r − U_rᵀU_r) has rank two per coordinate, each entry is a sum of four products of entries of
BPBᵀ, BPUᵀ, UPUᵀ and the same for S⁻¹: a few matrix products in all, for any number of multipliers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustlip.domains.quadratic.program import Program


@dataclass(frozen=True)
class Solution:
    """The result of `minimise`.

    multipliers: λ (groups,), strictly inside the program. value: the least ρ for them. gap: relative difference between value and a lower bound of
    the program's optimum (valid if the dual residual is 0); infinite if no step succeeded. steps: number of steps.
    """

    multipliers: Tensor
    value: float
    gap: float
    steps: int


def _pool(program: Program, table: Tensor) -> Tensor:
    """Sums over the coordinates of each group: (p, p) → (groups, groups), or (p,) → (groups,)."""
    if program.groups == len(program.group):
        return table
    for dim in range(table.dim()):
        shape = list(table.shape)
        shape[dim] = program.groups
        table = torch.zeros(shape, dtype=table.dtype).index_add(dim, program.group, table)
    return table


def _traces(program: Program, y: Tensor) -> Tensor:
    """tr(A_iY) for ρ and every multiplier, Y symmetric."""
    c = program.rows
    through = program.through(y).split([len(ball.mid) for ball in program.u])
    seen = torch.cat([(part[:, : ball.mid.shape[1]] * ball.mid).sum(1) for part, ball in zip(through, program.u, strict=True)])
    return torch.cat([y.diagonal()[:c].sum()[None], _pool(program, y.diagonal()[c:] - seen)])


def _schur(program: Program, p: Tensor, z: Tensor) -> Tensor:
    """tr(A_i P A_j Z) for all pairs, (1 + groups)²; P and Z symmetric."""
    c = program.rows
    up, uz = program.through(p), program.through(z)
    table = p[c:, c:] * z[c:, c:] + program.through(up.mT) * program.through(uz.mT)
    mixed = up[:, c:] * uz[:, c:]
    table = _pool(program, table - mixed - mixed.mT)
    side = _pool(program, (p[:c, c:] * z[:c, c:]).sum(0) - (up[:, :c] * uz[:, :c]).sum(1))
    corner = (p[:c, :c] * z[:c, :c]).sum()[None, None]
    return torch.cat([torch.cat([corner, side[None]], 1), torch.cat([side[:, None], table], 1)])


def _direction(program: Program, step: Tensor) -> Tensor:
    """Σ_i A_i·step_i: the change of M."""
    return program.matrix(float(step[0]), step[1:]) + program.q.mid


def _step_length(at: Tensor, step: Tensor) -> float:
    """A step length ≤ 1 at which at + length·step is positive definite, nearly the largest; 0 where none was found."""
    length = 1.0
    while length > 1e-7:
        if not bool(torch.linalg.cholesky_ex(at + length * step)[1]):
            return length if length == 1.0 else 0.9 * length
        length *= 0.8
    return 0.0


def minimise(program: Program, start: Tensor, *, gap: float = 5e-3, limit: int = 60) -> Solution:
    """Multipliers whose ρ is within a relative `gap` of the optimum, or the best after `limit` steps. start: λ strictly inside the program."""
    best, value = start, program.bound(start)
    if not 0 < value < float("inf"):
        return Solution(start, value, float("inf"), 0)
    size = program.size
    point = torch.cat([torch.tensor([2 * value], dtype=torch.float64), start])
    s = program.matrix(float(point[0]), point[1:])
    z = torch.cholesky_inverse(torch.linalg.cholesky(s))
    p = z / z.diagonal()[: program.rows].sum()
    goal = torch.zeros_like(point)
    goal[0] = 1.0
    found = float("inf")
    steps = 0
    while steps < limit:
        steps += 1
        mu = float((p * s).sum()) / size
        # Scaled by the multipliers, which span orders of magnitude.
        scaled = _schur(program, p, z) * point[:, None] * point
        scaled = scaled.diagonal_scatter(scaled.diagonal() * (1 + 1e-11))
        lower, failed = torch.linalg.cholesky_ex(scaled)
        if bool(failed):
            break

        def solve(right: Tensor, lower: Tensor = lower, point: Tensor = point) -> Tensor:
            return torch.cholesky_solve((right * point)[:, None], lower)[:, 0] * point

        def symmetric(matrix: Tensor) -> Tensor:
            return (matrix + matrix.mT) / 2

        ds = _direction(program, solve(-goal))
        dp = -p - symmetric(p @ ds @ z)
        ahead = float(((p + _step_length(p, dp) * dp) * (s + _step_length(s, ds) * ds)).sum()) / size
        target = mu * min(max(ahead / mu, 0.0) ** 2, 1.0)
        second = symmetric(dp @ ds @ z)
        dy = solve(target * _traces(program, z) - goal - _traces(program, second))
        ds = _direction(program, dy)
        dp = target * z - p - symmetric(p @ ds @ z) - second
        dual, primal = _step_length(p, dp), _step_length(s, ds)
        if primal == 0.0:
            break
        p, point = p + dual * dp, point + primal * dy
        s = program.matrix(float(point[0]), point[1:])
        factor, failed = torch.linalg.cholesky_ex(s)
        if bool(failed):
            break
        z = torch.cholesky_inverse(factor)
        now = program.bound(point[1:])
        if now < value and bool((point[1:] > 0).all()):
            best, value = point[1:], now
        residual = float(((_traces(program, p) - goal) * point).abs().amax()) / value
        found = (float((p * s).sum()) + value - float(point[0])) / value + residual
        if found < gap:
            break
    return Solution(best, value, found, steps)
