"""The semidefinite program of LipSDP in variables that make it small, and the proof that one of its points is feasible.

For a row c of the head (or several), numbers b_k for the coordinates of each activation k, and the adjoint a_K = cᵀ, aₖ₋₁ = Wₖᵀ(Dₖᵀaₖ + Eₖᵀbₖ), let

    M(ρ, λ) = ρ·I_c + Bᵀ diag(λ) B − Uᵀ diag(λ) U − Q,        U = rows Rₖᵀaₖ,  B = rows bₖ,  Q = a₀ᵀa₀,  as forms in (c, b).

If M(ρ, λ) ⪰ 0 and λ ≥ 0, then (cᵀδ)² ≤ ρ·‖x' − x‖² for the difference δ before the head at any two inputs. Proof. By (QC) of constraints.py there are
matrices Φ_g, ‖Φ_g‖ ≤ 1, with w_g = Φ_g(Ev)_g, so δₖ = (Dₖ + RₖΦₖEₖ)Wₖδₖ₋₁ with Φₖ = diag(Φ_g). Choose bₖ = ΦₖᵀRₖᵀaₖ. Then aₖ₋₁ᵀδₖ₋₁ = aₖᵀδₖ, hence
cᵀδ = a₀ᵀ(x' − x); and λ_g‖b_g‖² ≤ λ_g‖(Rᵀa)_g‖² for every group, so M ⪰ 0 gives ρ ≥ ‖a₀‖². The claim follows by Cauchy-Schwarz. For several rows C,
with any unit combination of them as c, ‖Cδ‖² ≤ ρ·‖x' − x‖².

This is the dual of LipSDP (with inverse multipliers). It is linear in ρ and λ, and its size is that of the activations only, since inputs enter
through W₁W₁ᵀ. U, Q and M are enclosures, so `is_proved` proves the inequality for the exact weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustlip.domains.quadratic.layers import ConstraintNetwork
from robustlip.numerics.enclosures import Enclosure, product, proved_positive


@dataclass(frozen=True)
class Program:
    """M(ρ, λ) of the module's docstring, for `rows` rows c.

    u: one matrix for each stage, last stage first, (p_k, n_k) for the first n_k of the variables (c, b_K, …, b_1); its other columns are 0.
    q: (size, size). group: int64 (p,), the multiplier of each coordinate in the order of b. sizes: multipliers of each stage, last stage first.
    """

    rows: int
    u: tuple[Enclosure, ...]
    q: Enclosure
    group: Tensor
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.q.mid)

    @property
    def groups(self) -> int:
        return sum(self.sizes)

    def of_rows(self, chosen: Tensor) -> Program:
        """The program for some of its rows c."""
        tail = torch.arange(self.rows, self.size)
        columns = torch.cat([chosen, tail])

        def take(ball: Enclosure, rows: Tensor | slice, kept: Tensor) -> Enclosure:
            return Enclosure(ball.mid[rows][:, kept], ball.radius()[rows][:, kept])

        u = tuple(take(ball, slice(None), columns[: len(chosen) + ball.mid.shape[1] - self.rows]) for ball in self.u)
        return Program(len(chosen), u, take(self.q, columns, columns), self.group, self.sizes)

    def join(self, multipliers: list[Tensor]) -> Tensor:
        """The vector λ (groups,) of multipliers that are listed by stage, first stage first."""
        return torch.cat(multipliers[::-1])

    def through(self, matrix: Tensor) -> Tensor:
        """U·matrix, for a matrix (size, n), in plain float64."""
        return torch.cat([ball.mid @ matrix[: ball.mid.shape[1]] for ball in self.u])

    def matrix(self, rho: float, flat: Tensor) -> Tensor:
        """M(ρ, λ) in plain float64, not proved."""
        m = -self.q.mid
        each = flat[self.group]
        for ball, weights in zip(self.u, each.split([len(ball.mid) for ball in self.u]), strict=True):
            n = ball.mid.shape[1]
            m[:n, :n] -= ball.mid.mT @ (weights[:, None] * ball.mid)
        diagonal = m.diagonal().clone()
        diagonal[: self.rows] += rho
        diagonal[self.rows :] += each
        return m.diagonal_scatter(diagonal)

    def bound(self, flat: Tensor) -> float:
        """The least ρ for this λ in plain float64, not proved; infinite outside the program."""
        m = self.matrix(0.0, flat)
        inner, failed = torch.linalg.cholesky_ex(m[self.rows :, self.rows :])
        if bool(failed) or not bool((flat > 0).all()):
            return float("inf")
        root = torch.linalg.solve_triangular(inner, m[self.rows :, : self.rows], upper=False)
        return float(torch.linalg.eigvalsh(root.mT @ root - m[: self.rows, : self.rows])[-1])

    def enclosed(self, flat: Tensor) -> Enclosure:
        """An enclosure of M(0, λ) for the exact weights."""
        size = self.size
        total = Enclosure(-self.q.mid, self.q.radius())
        each = flat[self.group]
        for ball, weights in zip(self.u, each.split([len(ball.mid) for ball in self.u]), strict=True):
            n = ball.mid.shape[1]
            square = product(ball.mT, ball.times_rows(weights))
            pad = (0, size - n, 0, size - n)
            total = total.minus(Enclosure(torch.nn.functional.pad(square.mid, pad), torch.nn.functional.pad(square.radius(), pad)))
        diagonal = torch.cat([torch.zeros(self.rows, dtype=torch.float64), each])
        return total.plus(Enclosure(torch.diag(diagonal)))


def is_proved(program: Program, rho: float, flat: Tensor, enclosed: Enclosure | None = None) -> bool:
    """True only if M(ρ, λ) ⪰ 0 is proved for the exact weights, this ρ and these λ: then √ρ is a Lipschitz constant of the rows."""
    if not bool((flat > 0).all() & torch.isfinite(flat).all()):
        return False
    at_zero = program.enclosed(flat) if enclosed is None else enclosed
    diagonal = torch.zeros(program.size, dtype=torch.float64)
    diagonal[: program.rows] = rho
    return proved_positive(at_zero.plus(Enclosure(torch.diag(diagonal))))


# Relative increases of ρ above its float64 value, tried in order until it is proved.
_RAISED = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)

# Relative increases of multipliers for each stage, tried in order: results of solvers may be slightly outside the program.
_REPAIRED = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def least_proved(program: Program, flat: Tensor) -> float:
    """Nearly the least ρ for which M(ρ, λ') ⪰ 0 is proved, with λ' a repaired λ; infinite where none is proved."""
    deep = len(program.sizes)
    stage = torch.cat([torch.full((size,), deep - k, dtype=torch.float64) for k, size in enumerate(program.sizes)])
    guesses = [flat * (1 + repair) ** stage for repair in _REPAIRED]
    bounds = torch.tensor([program.bound(guess) for guess in guesses])
    for k in bounds.argsort().tolist():
        if not 0 <= float(bounds[k]) < float("inf"):
            continue
        enclosed = program.enclosed(guesses[k])
        for raised in _RAISED:
            rho = float(bounds[k]) * (1 + raised) + 1e-300
            if is_proved(program, rho, guesses[k], enclosed):
                return rho
    return float("inf")


def program_of(network: ConstraintNetwork, rows: Enclosure) -> Program:
    """The program for all rows c (m, n) together. The network has at least one stage."""
    count = len(rows.mid)
    widths = [len(constraint.group) for _, constraint in network.stages]
    a = Enclosure(rows.mid.mT, None if rows.rad is None else rows.rad.mT)
    seen, groups, sizes = [], [], []
    known = 0
    q: Enclosure | None = None
    for i, (weight, constraint) in reversed(list(enumerate(network.stages))):
        seen.append(product(constraint.write.dense().mT, a))
        # h = Dᵀa + Eᵀb; the columns of b are new.
        read, kept = constraint.read.dense().mT, product(constraint.keep.dense().mT, a)
        h = Enclosure(torch.cat([kept.mid, read.mid], 1), torch.cat([kept.radius(), read.radius()], 1))
        groups.append(constraint.group + known)
        sizes.append(constraint.groups)
        known += constraint.groups
        if i == 0:
            q = product(product(h.mT, product(weight, weight.mT)), h)
        else:
            a = product(weight.mT, h)
    assert q is not None and len(q.mid) == count + sum(widths)
    return Program(count, tuple(seen), q, torch.cat(groups), tuple(sizes))
