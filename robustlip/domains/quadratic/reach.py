"""From multipliers to constants: layer by layer, each step a matrix inequality that is proved before it is used.

What is carried is a symmetric X with δδᵀ ⪯ ‖x' − x‖²·X for the difference δ of the activations at any two inputs; at the input X = I.

- Linear, v = Wδ: vvᵀ ⪯ ‖x' − x‖²·G for any G ⪰ WXWᵀ.
- Activation with the constraint δ = Dv + Rw, ‖w_g‖ ≤ ‖(Ev)_g‖ (quadratic.py), multipliers λ > 0 and Λ = diag(λ_g): any X with

      N = [ Λ − EGEᵀ      EGDᵀ             ]
          [ DGEᵀ          X − DGDᵀ − RΛRᵀ  ]  ⪰ 0                                                                                    (LMI)

  will do. Proof. Let s = ‖x' − x‖². N falls when G grows and sG ⪰ vvᵀ, so for all b, a: s·bᵀΛb + s·aᵀ(X − RΛRᵀ)a ≥ (bᵀEv − aᵀDv)². There are matrices
  Φ_g with w_g = Φ_g(Ev)_g and ‖Φ_g‖ ≤ 1; take b_g = −Φ_gᵀ(Rᵀa)_g. Then bᵀEv = −aᵀRw and bᵀΛb ≤ aᵀRΛRᵀa, hence s·aᵀXa ≥ (aᵀRw + aᵀDv)² = (aᵀδ)².
- A row c of the head: (cᵀδ)² ≤ s·cᵀXc; for all logits together ‖Cδ‖² ≤ s·λ_max(CXCᵀ).

With the smallest such X, X = RΛRᵀ + D(G + GEᵀ(Λ − EGEᵀ)⁻¹EG)Dᵀ, minimising cᵀXc over the multipliers is LipSDP (its dual, Λ the inverse of the
multipliers there); fixed multipliers chosen layer by layer are ECLipsE. Either way only the inequality above is trusted: X is what it is
computed to be, raised a little, and a guess that fails is raised until it holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustlip.domains.quadratic.constraints import Quadratic
from robustlip.numerics.enclosures import Enclosure, dominating, product, proved_positive, sandwich
from robustlip.numerics.rounding import TINY, U64, gamma, up
from robustlip.numerics.spectral import spectral_norm_bound

# By how much of its diagonal X is raised, one after the other, until the inequality is proved.
_SLACKS = (1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def through_linear(weight: Enclosure, x: Tensor | None) -> Tensor:
    """G ⪰ WXWᵀ, symmetric float64; x None: X = I."""
    left = weight if x is None else product(weight, Enclosure(x))
    return dominating(product(left, weight.mT))


def through_activation(constraint: Quadratic, g: Tensor, multipliers: Tensor) -> Tensor | None:
    """An X for which (LMI) is proved, nearly the smallest; None where none was. g: (n, n) exact; multipliers: λ (groups,), a guess."""
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
    """√λ_max(CXCᵀ), rounded up: how far all logits together move in ℓ2 per unit of the input in ℓ2."""
    y = through_linear(head, x)
    return float(up(up(spectral_norm_bound(y)).sqrt())) if bool(torch.isfinite(y).all()) else float("inf")
