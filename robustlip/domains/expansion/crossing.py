"""Kink terms of a margin: Σ_n ω⁻_n R_n for entries p_n that change by Δp = WΔ + e and pass |·|, where 0 ≤ R_n ≤ 2(|Δp_n| − a_n)⁺.

a_n is the distance of p_n from its kink at the reference, and ω⁻_n = max(−ω_n, 0), because only an adjoint ω_n < 0 lets R_n lower the margin.
Three bounds are used. Entry by entry: R_n ≤ 2(each_n − a_n)⁺ with |Δp_n| ≤ each_n. Jointly, since (t − a)⁺/t increases with t:
    Σ ω⁻_n R_n ≤ 2‖ω⁻‖·max_n (1 − a_n/each_n)⁺·‖Δp‖,
with the norm of ω⁻ over the entries that can reach their kink. By a quadratic form: for any τ_n ≥ 2a_n the mean inequality gives
2(t − a_n)⁺ ≤ t²/τ_n + τ_n − 2a_n, hence
    Σ ω⁻_n R_n ≤ (√λ‖Δ‖ + √max c‖e‖)² + Σ ω⁻_n(τ_n − 2a_n),      λ ≥ λ_max(Wᵀdiag(c)W), c_n = ω⁻_n/τ_n.
Every such τ is sound. Good values come from a few Frank-Wolfe steps for the concave problem max_P Σ ω⁻_n·2(r√(w_nᵀPw_n) − a_n)⁺ over P ≽ 0 of trace
1: τ_n = max(2a_n, r√(w_nᵀPw_n)).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from robustlip.domains.expansion.base import JointBound
from robustlip.numerics.rounding import U64, chunk_numbers, gamma, norm_up, up
from robustlip.numerics.spectral import largest_eigenvalue_bound

# Frank-Wolfe steps, and power iterations in each.
STEPS, POWERS = 6, 4
# Far above the underflow error of a product or a square.
SEEN = 2.0**-900
# The most tokens of an adjoint that get forms, and the smallest fraction of the whole decrease that a token needs for a form.
TOKENS, LITTLE = 6, 0.02


@dataclass(frozen=True)
class KinkTerm(JointBound):
    """Kinks of many entries without a matrix: 0 ≤ R_n ≤ height·(|Δp_n| − a_n)⁺ with |Δp_n| ≤ each_n and ‖Δp‖ ≤ whole.

    Entry by entry Σ ω⁻_n R_n ≤ height·Σ ω⁻_n(each_n − a_n)⁺. Jointly, since (t − a)⁺ ≤ (1 − a/e)⁺t for t ≤ e, height·‖ω⁻∘(1 − a/each)⁺‖·whole.
    As a weight: falling = ω⁻ (A, N, T, n), or |ω| where both signs count. As a bound: near = a and each (N, T, n), whole (N, T).
    """

    falling: Tensor | None = None
    near: Tensor | None = None
    each: Tensor | None = None
    whole: Tensor | None = None
    height: float = 1.0

    @cached_property
    def crossing(self) -> Tensor:
        """As a bound: ≥ R_n (N, T, n), entry by entry."""
        assert self.near is not None and self.each is not None
        return self.height * (1 + 1e-12) * (self.each - self.near).clamp_min(0.0)

    @cached_property
    def share(self) -> Tensor:
        """For a bound: ≥ (1 − a_n/each_n)⁺ (N, T, n)."""
        assert self.near is not None and self.each is not None
        # If the radius is not finite, the bound is not either. The term 4u covers the rounding of the quotient.
        return (1 + 4 * U64 - self.near / self.each.clamp_min(1e-300)).nan_to_num(1.0, 1.0).clamp_min(0.0) * (1 + 1e-12)

    def norm(self) -> Tensor:
        """For a bound: ≥ ‖R‖₂ (N, T)."""
        assert self.whole is not None
        return torch.minimum(norm_up(self.crossing), up(self.height * self.share.amax(-1) * self.whole))

    def selected(self, chosen: Tensor) -> KinkTerm:
        assert self.falling is not None
        pick = chosen[..., None, None].expand(*chosen.shape, *self.falling.shape[2:])
        return KinkTerm(self.falling.gather(0, pick))

    def contract(self, bound: KinkTerm) -> Tensor:
        assert self.falling is not None and bound.whole is not None
        crossing, share, together = bound.crossing, bound.share, bound.height * bound.whole
        parts = []
        count = max(1, chunk_numbers(crossing) // max(1, self.falling[:1].numel()))
        for falling in self.falling.split(count):
            parts.append(torch.minimum((falling * crossing).sum(-1), norm_up(falling * share) * together))
        return (1 + 1e-12) * torch.cat(parts).sum(-1)


@dataclass(frozen=True)
class KinkForms:
    """Quadratic forms of some adjoints: Σ ω⁻_n R_n ≤ (√λ‖Δ‖ + √peak‖e‖)² + constant at a token, each (A, N, T); λ is infinite without a form."""

    largest: Tensor
    peak: Tensor
    constant: Tensor


@dataclass(frozen=True)
class MatrixKinkTerm(JointBound):
    """Kinks of many entries, with the matrix of the Linear layer before them where there is one.

    As a weight: falling = ω⁻ (A, N, T, n), or |ω| where both signs count. As a bound: near = a and each (N, T, n), whole ≥ ‖Δp‖ (N, T). After a
    Linear layer and a change bounded in ℓ2 also its W (n, D), `rows`, with Δp = WΔ + e, `moved` ≥ ‖Δ‖₂ and `fresh` ≥ ‖e‖₂ (N, T).
    """

    forms_gain_factors: ClassVar[bool] = True

    falling: Tensor | None = None
    forms: KinkForms | None = None
    near: Tensor | None = None
    each: Tensor | None = None
    whole: Tensor | None = None
    rows: Tensor | None = None
    moved: Tensor | None = None
    fresh: Tensor | None = None

    @property
    def matrix(self) -> Tensor | None:
        return self.rows

    @cached_property
    def crossing(self) -> Tensor:
        """As a bound: ≥ R_n (N, T, n), entry by entry."""
        assert self.near is not None and self.each is not None
        return 2 * (1 + 1e-12) * (self.each - self.near).clamp_min(0.0)

    @cached_property
    def share(self) -> Tensor:
        """For a bound: ≥ max_n (1 − a_n/each_n)⁺ (N, T)."""
        assert self.near is not None and self.each is not None
        # If the radius is not finite, the bound is not either.
        return (1 - self.near / self.each.clamp_min(1e-300)).nan_to_num(1.0, 1.0).clamp_min(0.0).amax(-1) * (1 + 1e-12)

    def selected(self, chosen: Tensor) -> MatrixKinkTerm:
        assert self.falling is not None
        pick = chosen[..., None, None].expand(*chosen.shape, *self.falling.shape[2:])
        return MatrixKinkTerm(self.falling.gather(0, pick))

    def by_token(self, bound: MatrixKinkTerm) -> Tensor:
        """The decrease at each token (A, N, T)."""
        assert self.falling is not None and bound.whole is not None
        crossing = bound.crossing
        reached = (crossing > 0).to(crossing.dtype)
        together = 2 * bound.share * bound.whole
        parts = []
        count = max(1, chunk_numbers(crossing) // max(1, self.falling[:1].numel()))
        for falling in self.falling.split(count):
            single = (falling * crossing).sum(-1)
            parts.append(torch.minimum(single, norm_up(falling * reached) * together))
        found = torch.cat(parts)
        if self.forms is None:
            return found
        assert bound.moved is not None and bound.fresh is not None
        by_form = (self.forms.largest.sqrt() * bound.moved + self.forms.peak.sqrt() * bound.fresh).square() + self.forms.constant
        return torch.fmin(found, by_form)

    def contract(self, bound: MatrixKinkTerm) -> Tensor:
        return (1 + 1e-12) * self.by_token(bound).sum(-1)

    def with_forms(self, bound: MatrixKinkTerm, chosen: Tensor, token: int, worth: Tensor | None = None) -> MatrixKinkTerm:
        """See JointBound. Forms are made at the few tokens with the largest decrease; they are valid for any bound."""
        assert self.falling is not None and bound.near is not None and bound.rows is not None and bound.moved is not None
        lost = replace(self, forms=None).by_token(bound)
        values = lost.gather(0, chosen.unsqueeze(-1).expand(*chosen.shape, lost.shape[-1]))  # (K, N, T)
        most, tokens = values.topk(min(TOKENS, values.shape[-1]), dim=-1)
        wanted = torch.isfinite(most) & (most > LITTLE * values.sum(-1, keepdim=True))
        if worth is not None:
            wanted = wanted & worth.unsqueeze(-1)
        k, n, which = wanted.nonzero(as_tuple=True)
        a, t = chosen[k, n], tokens[k, n, which]
        largest = torch.full_like(lost, torch.inf)
        peak, constant = torch.zeros_like(lost), torch.zeros_like(lost)
        w = bound.rows
        for at in torch.arange(len(a), device=a.device).split(max(1, 16 * chunk_numbers(w) // w.numel())):
            i, j, l = a[at], n[at], t[at]
            largest[i, j, l], peak[i, j, l], constant[i, j, l] = _forms(self.falling[i, j, l], bound.near[j, l], bound.moved[j, l], w)
        return replace(self, forms=KinkForms(largest, peak, constant))


def _forms(weight: Tensor, near: Tensor, radius: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(λ, max c, constant) (M,) for ω⁻ and a (M, n), r (M,) and W (n, D): τ by Frank-Wolfe, then a bound λ for this τ.

    λ is that of Wᵀdiag(c)W, or, where it is smaller, of diag(√c)WWᵀdiag(√c), which has the same largest eigenvalue.
    """
    squares = w.square().sum(-1)
    wide = w.shape[0] < w.shape[1]
    gram = w @ w.mT if wide else None
    spread = (squares / w.shape[1]).expand_as(near)  # w_nᵀPw_n for P = 1/D
    v = torch.randn(min(w.shape), 1, generator=torch.Generator().manual_seed(0), dtype=w.dtype).to(w.device).expand(len(near), -1, 1)
    least = 1e-9 * (radius.unsqueeze(-1) * squares.amax().sqrt() + near.amax(-1, keepdim=True)) + 1e-150

    def balanced(spread: Tensor) -> Tensor:
        return torch.maximum(torch.maximum(2 * near, radius.unsqueeze(-1) * spread.sqrt()), least)

    def leading(c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(an approximation of the leading eigenvector, (w_n·u)² (M, n) for the unit vector u that belongs to it)."""
        root = c.sqrt().unsqueeze(-1)
        for _ in range(POWERS):
            v = root * (gram @ (root * v)) if gram is not None else w.mT @ (c.unsqueeze(-1) * (w @ v))
            v = torch.nn.functional.normalize(v, dim=-2, eps=1e-300)
        if gram is None:
            return v, (w @ v).squeeze(-1).square()
        moved = gram @ (root * v)  # W of u·‖Wᵀ√c v‖
        return v, moved.squeeze(-1).square() / (v * root * moved).sum((-2, -1)).clamp_min(1e-300).unsqueeze(-1)

    for step in range(STEPS):
        v, along = leading(weight / balanced(spread), v)
        spread = spread + 2 / (step + 3) * (along - spread)
    tau = balanced(spread)
    c = weight / tau * (1 + 1e-12)
    if gram is None:
        product = w.mT @ (c.unsqueeze(-1) * w)
    else:
        root = c.sqrt().unsqueeze(-1)
        product = root * gram * root.mT
    # Underflow in c or in squares of rows may be amplified by later factors: such entries get no form.
    fits = torch.isfinite(product).all(-1).all(-1) & ((c >= SEEN) | (weight == 0)).all(-1) & ((squares >= SEEN) | (w == 0).all(-1)).all()
    # The float64 error of the product is at most γ|W|ᵀdiag(c)|W|, or γ√c_i‖w_i‖·√c_j‖w_j‖; the norm of both is at most Σ_n c_n‖w_n‖².
    lost = gamma(max(w.shape) + 8, U64) * (c @ squares) + w.numel() * 2.0**-1022
    found = up(largest_eigenvalue_bound(torch.where(fits[:, None, None], product, 0.0)) + 2 * lost)
    constant = up((weight * (tau - 2 * near)).sum(-1) * (1 + 1e-12))
    return torch.where(fits, found, torch.inf), c.amax(-1), constant
