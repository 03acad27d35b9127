"""From multipliers to constants, layer by layer; each step is a matrix inequality that is proved before it is used.

The propagated quantity is a symmetric X with δδᵀ ⪯ ‖x' − x‖²·X for the difference δ of the activations at any two inputs; at the input X = I.

- Linear, v = Wδ: vvᵀ ⪯ ‖x' − x‖²·G for any G ⪰ WXWᵀ.
- Activation with the constraint δ = Dv + Rw, ‖w_g‖ ≤ ‖(Ev)_g‖ (constraints.py), multipliers λ > 0 and Λ = diag(λ_g): any X with

      N = [ Λ − EGEᵀ      EGDᵀ             ]
          [ DGEᵀ          X − DGDᵀ − RΛRᵀ  ]  ⪰ 0.                                                                                   (LMI)

  Proof. Let s = ‖x' − x‖². N decreases when G grows, and sG ⪰ vvᵀ, so for all b, a: s·bᵀΛb + s·aᵀ(X − RΛRᵀ)a ≥ (bᵀEv − aᵀDv)². There are matrices
  Φ_g with w_g = Φ_g(Ev)_g and ‖Φ_g‖ ≤ 1; take b_g = −Φ_gᵀ(Rᵀa)_g. Then bᵀEv = −aᵀRw and bᵀΛb ≤ aᵀRΛRᵀa, hence s·aᵀXa ≥ (aᵀRw + aᵀDv)² = (aᵀδ)².
- A row c of the head: (cᵀδ)² ≤ s·cᵀXc; for all logits together ‖Cδ‖² ≤ s·λ_max(CXCᵀ).

The smallest such X is X = RΛRᵀ + D(G + GEᵀ(Λ − EGEᵀ)⁻¹EG)Dᵀ. Minimising cᵀXc over the multipliers gives LipSDP (its dual, where Λ is the inverse of
the multipliers); multipliers that are fixed layer by layer give ECLipsE. In both cases only the inequality is trusted: the computed X is raised
slightly until the inequality is proved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustlip.domains.quadratic.constraints import QuadraticConstraint
from robustlip.numerics.enclosures import Enclosure, dominating, product, proved_positive, sandwich
from robustlip.numerics.rounding import TINY, U64, gamma, up
from robustlip.numerics.spectral import spectral_norm_bound

# Increases of X relative to its diagonal, tried in order until the inequality is proved.
_SLACKS = (1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def through_linear(weight: Enclosure, x: Tensor | None) -> Tensor:
    """G ⪰ WXWᵀ, symmetric float64; x = None means X = I."""
    left = weight if x is None else product(weight, Enclosure(x))
    return dominating(product(left, weight.mT))


def through_activation(constraint: QuadraticConstraint, g: Tensor, multipliers: Tensor) -> Tensor | None:
    """An X for which (LMI) is proved, nearly the smallest; None where none is proved. g: (n, n), exact. multipliers: λ (groups,), any positive
    values."""
    if not bool((multipliers > 0).all() & torch.isfinite(multipliers).all()):
        return None
    keep, read, write = constraint.keep, constraint.read, constraint.write
    seen = read.apply(Enclosure(g))  # EG
    corner, cross = read.apply(seen.mT), keep.apply(seen.mT).mT
    kept = sandwich(keep, Enclosure(g), keep)
    spread = torch.diag(multipliers[constraint.group])
    front = Enclosure(spread).minus(corner)
    factor, failed = torch.linalg.cholesky_ex(front.mid)
    if bool(failed):
        return None
    base = kept.plus(sandwich(write, Enclosure(spread), write))
    root = torch.linalg.solve_triangular(factor, cross.mid, upper=False)
    guess = base.mid + root.mT @ root
    guess = (guess + guess.mT) / 2
    diagonal = guess.diagonal()
    floor = diagonal.clamp_min(1e-12 * float(diagonal.amax()))
    for slack in _SLACKS:
        x = guess.diagonal_scatter(diagonal + slack * floor)
        if _holds(front, cross, base, x):
            return x
    return None


def _holds(front: Enclosure, cross: Enclosure, base: Enclosure, x: Tensor) -> bool:
    """Whether (LMI) is proved for this X: front encloses Λ − EGEᵀ, cross EGDᵀ, base DGDᵀ + RΛRᵀ."""
    behind = Enclosure(x).minus(base)
    blocks = [[front, cross], [cross.mT, behind]]
    mid = torch.cat([torch.cat([b.mid for b in row], 1) for row in blocks])
    rad = torch.cat([torch.cat([b.radius() for b in row], 1) for row in blocks])
    return proved_positive(Enclosure(mid, rad))


def row_gains(rows: Enclosure, x: Tensor | None) -> Tensor:
    """√(cᵀXc) for each row c (m, n), rounded up: (m,) float64."""
    left = rows if x is None else product(rows, Enclosure(x))
    size = rows.mid.abs()
    total = (left.mid * rows.mid).sum(1)
    lost = (left.radius() * (size + rows.radius()) + left.mid.abs() * rows.radius()).sum(1)
    lost = lost + gamma(size.shape[1] + 2, U64) * (left.mid.abs() * size).sum(1)
    square = total + lost * (1 + gamma(2 * size.shape[1] + 16, U64)) + size.shape[1] * TINY[torch.float64]
    return up(up(square.clamp_min(0)).sqrt())


def whole_gain(head: Enclosure, x: Tensor | None) -> float:
    """√λ_max(CXCᵀ), rounded up: the ℓ2 Lipschitz constant of all logits together."""
    y = through_linear(head, x)
    return float(up(up(spectral_norm_bound(y)).sqrt())) if bool(torch.isfinite(y).all()) else float("inf")
