"""Attention on balls around the clean tokens, head by head. docs/theory.md, sections 7 and 8, with the adjoint inside the head.

q, k, v are the clean (rotated) queries, keys and values, S the logits, p = softmax(S), o = pv. A change of the tokens changes logit ij by η_ij; a
common shift of row i has no effect. With norms Δq, Δk, Δv ≤ ρ and centred keys k_j − k̄_i, k̄_i = Σ_j p_ij k_j, |η_ij − shift_i| ≤ b_ij = s(‖q_i‖ρk_j
+ ρq_i‖k_j − k̄_i‖ + ρq_iρk_j)/d + rounding, so p' lies between p^L_ij and p^U_ij (docs/theory.md, section 7), |p' − p| ≤ dev, and ‖o'_i − o_i‖ ≤ Σ_j
dev_ij‖v_j − o_i‖ + min(Σ_j p^U_ijρv_j, max_jρv_j).

Remainder. With γ_i the adjoint of o_i and ω_ij = ⟨γ_i, v_j − o_i⟩, so that Σ_j p_ijω_ij = 0, exactly
    ⟨γ_i, o'_i − o_i⟩ = Σ_j (p'_ij − p_ij)⟨γ_i, v'_j − v_j⟩ + Σ_j p_ij⟨γ_i, v'_j − v_j⟩ + Σ_j (p'_ij − p_ij)ω_ij.
The first sum is at most Σ_j dev_ij‖W_vᵀγ_i‖r_j, the second is linear. For the third, the second derivative on the path p^τ = softmax(S + τη) is
Σ_j p^τ_j((η_j − η̄)² − Var)ω_ij, which `SoftmaxBall.second_order` integrates. The square lowers the margin only where ω_ij < 0, the variance for both
signs (Σ_j p^τ_jω_ij = Σ_j (p^τ_j − p_j)ω_ij). In Σ_j p_jη_jω_ij the nonlinear part, sΔq_i·Δk_j/d and rounding, is bounded by its norm.
With the adjoint outside the head the bound would have ‖γ_i‖‖W_o‖‖v_j − o_i‖ instead of |⟨γ_i, v_j − o_i⟩|, and the mean of the bilinear part would
remain.

Biases are part of the clean q, k, v. They only enter norms and rounding errors; biases that are equal for all keys of a row leave centred keys and
values unchanged. Masks and angle tables are constants: p_ij = 0 where a mask hides j from i. If several query heads share a key head, keys and values
are repeated, and their adjoints summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from robustlip.domains.expansion.base import (
    ADJOINT_SLACK,
    Ball,
    Expansion,
    Functionals,
    OutputBounds,
    Scope,
    SmallerOf,
    Term,
    register,
    rows_of,
    token_norms,
)
from robustlip.domains.norms.attention import Heads, check_projections, join_heads, turn_error
from robustlip.errors import BadInput
from robustlip.layers import Attention
from robustlip.numerics.rounding import norm_up, up
from robustlip.numerics.spectral import spectral_norm_bound, spectral_norm_quick
from robustlip.ops.affine import offset_error
from robustlip.ops.attention import (
    largest_in_kernel,
    logit_error,
    mixing_error,
    mixing_underflow,
    projection_error,
    scaled_error,
    shifted,
    within_mask,
)

# For larger logit changes softmax weights are only bounded by 0 and 1, so that exponentials stay finite.
_LARGEST_LOGIT_CHANGE = 50.0
# Above this value the moments of e^{τx}, computed by parts, lose at most nine digits.
_SMALLEST_GROWTH = 0.05
# The number of keys of a head whose logit changes are bounded by adjoints of their own.
ASKED_KEYS = 16


def cancellation_error(length: int) -> float:
    """A bound of the cancellation error of a difference of float64 numbers of size 1, each a sum over `length` tokens, with a factor of four to
    spare."""
    return 2.0**-44 * max(1.0, length / 2**7)


def times(x: Tensor, y: Tensor) -> Tensor:
    """x (A, N, H, R, m) @ y (N, H, m, n). torch would copy y for every adjoint; here the adjoints become further rows of x."""
    rows = x.permute(1, 2, 0, 3, 4)
    return (rows.flatten(2, 3) @ y).unflatten(2, rows.shape[2:4]).permute(2, 0, 1, 3, 4)


def by_heads(x: Tensor, y: Tensor) -> Tensor:
    """x (A, N, H, R, m) @ y (H, m, n), in the same way as `times`."""
    rows = x.permute(2, 0, 1, 3, 4)
    return (rows.flatten(1, 3) @ y).unflatten(1, rows.shape[1:4]).permute(1, 2, 0, 3, 4)


def sums_of_others(x: Tensor) -> Tensor:
    """Σ_{m≠j} x_m for every j, x ≥ 0. The largest entry is never subtracted from a sum that contains it, which could cancel everything."""
    largest, at = x.max(-1, keepdim=True)
    rest = x.scatter(-1, at, 0.0).sum(-1, keepdim=True)
    return (rest + (largest - x)).scatter(-1, at, rest)


class SoftmaxBall:
    """Bounds of softmax weights p (…, R, T) whose logits change by η with |η_j| ≤ b_j and |Σ_j p_jη_j| ≤ μ = Σ_j p_j·other_j. seen: the attention
    mask.

    upper, dev: p'_j ≤ upper_j and |p'_j − p_j| ≤ dev_j, also on the whole path p^τ = softmax(S + τη).
    """

    def __init__(self, p: Tensor, b: Tensor, other: Tensor, seen: Tensor) -> None:
        self.p, self.b = p, b
        lost = cancellation_error(p.shape[-1])
        # Where the change may be huge (or overflowed), the weights may be anything. Remainders then use b itself, exponentials a clamped b.
        self.unbounded = ~(b.amax(-1, keepdim=True) <= _LARGEST_LOGIT_CHANGE)
        clamped = b.clamp_max(_LARGEST_LOGIT_CHANGE)
        grow = clamped.exp()
        high, low = p * grow, p / grow
        upper = high / (high + sums_of_others(low) + 1e-300)
        lower = low / (low + sums_of_others(high) + 1e-300)
        # Z = Σ_j p_j e^{η_j} ≥ e^{−μ} (Jensen); e^x ≤ 1 + x + (e^|x| − 1 − |x|) gives an upper bound of Z.
        self.shift = (p * other).sum(-1, keepdim=True)
        total = 1 + self.shift + (p * (torch.expm1(clamped) - b).clamp_min(0.0)).sum(-1, keepdim=True)
        upper = torch.minimum(upper, high * self.shift.clamp_max(_LARGEST_LOGIT_CHANGE).exp())
        lower = torch.maximum(lower, low / total * (1 - lost))
        # The cancellation error of the two differences: a few 2⁻⁵³ of sums near 1, relative to p itself.
        self.upper = torch.where(self.unbounded & seen, torch.ones_like(upper), (upper * (1 + lost)).clamp_max(1.0))
        lower = torch.where(self.unbounded, torch.zeros_like(lower), lower * (1 - lost))
        self.dev = torch.maximum(self.upper - p, p - lower).clamp_min(0.0) + lost * p

    def second_order(self) -> tuple[Tensor, Tensor]:
        """(c, c'): −Σ_j(c_j·max(−ω_j, 0) + c'_j|ω_j|) ≤ Σ_j (p'_j − p_j − p_j(η_j − Σ_k p_kη_k))ω_j for any ω with Σ_j p_jω_j = 0.

        The right side is ∫(1 − τ)Σ_j p^τ_j((η_j − η̄^τ)² − Var^τ)ω_j dτ. With x = b + μ, p^τ_j ≤ p_j e^{τx_j}, and η̄ has the derivative Var: |η̄^τ|
        ≤ μ + τV, V = Σ_j b_j²∫p_j e^{τx_j}dτ;        |p^τ_j − p_j| ≤ τ·∫p_j e^{τx_j}(b_j + μ + τV)dτ (averages of increasing functions over [0, τ]
        are at most those over [0, 1]). The moments are exact; no integrand is replaced by its end value.
        """
        p, b, upper = self.p, self.b, self.upper
        x = (b + self.shift).clamp(_SMALLEST_GROWTH, 2 * _LARGEST_LOGIT_CHANGE)  # μ is at most the largest b of the row
        # J_k = ∫τᵏe^{τx}dτ over [0, 1] by parts: stable for x ≥ _SMALLEST_GROWTH, and increasing in x.
        grown = x.exp()
        j0 = torch.expm1(x) / x
        j1 = (grown - j0) / x
        j2 = (grown - 2 * j1) / x
        j3 = (grown - 3 * j2) / x
        turn = torch.minimum(p * (j1 - j2), upper / 6)  # ≥ ∫(1 − τ)τ p^τ dτ
        reach, square = torch.minimum(p * j0, upper), b.square()
        speed = (reach * square).sum(-1, keepdim=True)
        start = b + self.shift
        spread = torch.minimum(p * (j0 - j1), upper / 2) * start.square()
        spread = spread + speed * (2 * turn * start + torch.minimum(p * (j2 - j3), upper / 12) * speed)
        variance = (turn * square).sum(-1, keepdim=True) * (reach * start + torch.minimum(p * j1, upper / 2) * speed)
        # Bounds that hold for any p^τ ≤ upper; in unbounded rows, where x was clamped, they are the only valid ones.
        plain = 0.5 * upper * (b + b.amax(-1, keepdim=True)).square()
        loose = 0.5 * (upper * square).sum(-1, keepdim=True) * self.dev
        spread = torch.where(self.unbounded, plain, torch.minimum(spread, plain))
        variance = torch.where(self.unbounded, loose, torch.minimum(variance, loose))
        return spread * (1 + 1e-8), variance * (1 + 1e-8)


@register(Attention)
class AttentionExpansion(Expansion):
    def __init__(self, layer: Attention, clean: Tensor, scope: Scope) -> None:
        check_projections(layer)
        if clean.shape[-1] != layer.width:
            raise BadInput(f"expected tokens of width {layer.width} before Attention, got {clean.shape[-1]}; match them")
        layer.check_length(clean.shape[1])
        self.layer, self.scope = layer, scope
        self.heads: Heads = scope.context.constant(layer, "heads", lambda: Heads.of(layer))
        self.length = clean.shape[1]
        self.s = abs(layer.logit_scale)
        self.factor = layer.output_scale
        device = clean.device
        self.sigma = {n: getattr(self.heads, n).to(device) for n in ("query", "key", "value", "output")}
        self.frobenius = {n: f.to(device) for n, f in self.heads.frobenius.items()}
        self.offsets = {n: None if norm is None else norm.to(device) for n, norm in self.heads.offsets.items()}
        self.matrices = {n: matrix.detach().double() for n, matrix in layer.matrices().items()}
        offsets = {n: None if offset is None else offset.detach().double() for n, offset in layer.offsets().items()}

        def affine(name: str, x: Tensor) -> Tensor:
            offset = offsets[name]
            return x @ self.matrices[name].T if offset is None else x @ self.matrices[name].T + offset

        q, k, v = (layer.split(affine(n, clean)) for n in ("query", "key", "value"))
        self.position = torch.arange(self.length, device=device)
        q, k = layer.turned(q), layer.spread(layer.turned(k))
        v = layer.spread(v)
        self.q, self.k, self.v = q, k, v  # (N, H, T, d)
        logits = layer.logit_scale * (q @ k.mT)
        self.seen = layer.seen(self.length)  # (T, T), or (H, T, T)
        self.order = "causal" if torch.equal(self.seen, torch.ones_like(self.seen).tril()) else "all" if bool(self.seen.all()) else ""
        added = layer.added(self.length)
        if added is not None:
            logits = logits + added.detach().double()
        self.p = logits.masked_fill(~self.seen, -torch.inf).softmax(-1)  # (N, H, T, T)
        self.o = self.p @ v
        joined = self.o.transpose(1, 2).flatten(-2)
        self.clean = (joined if layer.output is None else affine("output", joined)) * layer.output_scale

        self.norm = norm_up(clean)
        self.nq, self.nk, self.nv = norm_up(q), norm_up(k), norm_up(v)  # (N, H, T)
        self.key_distance = self._distances(k, self.p @ k, self.nk)  # ‖k_j − k̄_i‖ (N, H, T, T)
        self.value_distance = self._distances(v, self.o, self.nv)
        self.top_value = self._top(self.nv)  # largest ‖v_j‖ among the keys that query i sees (N, H, T)
        self.key_norm = self.norm
        # ≥ ‖J‖ of one output token for changes of every token by at most 1, a product of norms (N, 1).
        logits = 2 * self.s * (self.sigma["query"] * self.nk.amax(-1) + self.sigma["key"] * self.nq.amax(-1))
        by_head = self.sigma["value"] + self.top_value.amax(-1) * logits
        self.gain = up(abs(self.factor) * (self.sigma["output"] * by_head).sum(-1, keepdim=True))

    def _distances(self, x: Tensor, centre: Tensor, norm: Tensor) -> Tensor:
        """‖x_j − c_i‖ (N, H, i, j), rounded up, without a tensor of all differences."""
        size = norm.square()
        squares = size.unsqueeze(-2) + centre.square().sum(-1).unsqueeze(-1) - 2 * (centre @ x.mT)
        lost = cancellation_error(self.length) * x.shape[-1] * (size.unsqueeze(-2) + size.amax(-1, keepdim=True).unsqueeze(-1))
        return (squares + lost).clamp_min(0.0).sqrt()

    def _top(self, x: Tensor) -> Tensor:
        """The maximum of x (…, N, H, T keys) over the keys that each query sees: (…, N, H, T)."""
        if self.order == "causal":
            return x.cummax(-1).values
        if self.order == "all":
            return x.amax(-1, keepdim=True).expand_as(x)
        return torch.where(self.seen, x.unsqueeze(-2), torch.zeros((), dtype=x.dtype, device=x.device)).amax(-1)

    def _key_radii(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """(radii of keys that may change, radii of keys whose change counts as remainder), by key, (…, N, 1, T)."""
        return radius.unsqueeze(-2), torch.zeros_like(radius).unsqueeze(-2)

    def _by_query(self, moved: Tensor, ball: Ball) -> Tensor:
        """A bound of s·Δq_i·(k_j − k̄_i)/d (…, N, H, R, T) for the linear part of Δq. moved: σ_q r (…, N, H, R)."""
        return self.s * moved.unsqueeze(-1) * self.key_distance

    def _by_key(self, moved: Tensor, radius: Tensor) -> Tensor:
        """A bound of s·q_i·Δk_j/d (…, N, H, R, T) for the linear part of Δk. moved: σ_k r (…, N, H, T); radius (…, N, 1, T)."""
        return self.s * self.nq.unsqueeze(-1) * moved.unsqueeze(-2)

    def _moved(self, name: str, moved: Tensor, ball: Ball) -> Tensor:
        """`moved` = σr, or a sharper bound from the input map (…, N, H, ·)."""
        return moved

    def _both(self, product: Tensor, radius: Tensor) -> Tensor:
        """A bound of s·Δq_i·Δk_j/d (…, N, H, R, T) for the linear parts, given the product of their norms."""
        return product

    def _weight_changes(self, ball: Ball) -> dict[str, Tensor | float]:
        """‖E‖ of each matrix, (…, N, 1, 1), which broadcasts against (…, N, H, T)."""
        out: dict[str, Tensor | float] = {}
        for name in self.matrices:
            change = 0.0 if ball.weight_radius is None else self.scope.weight_change(ball, self.heads.perturbed_sigma[name])
            out[name] = change.unsqueeze(-1) if isinstance(change, Tensor) else change
        return out

    def lipschitz(self) -> Tensor | float:
        return self.gain[:, 0]

    def at_rows(self, sample: Tensor, position: Tensor, rounding_radii: Tensor) -> Expansion:
        return AttentionRow(self, sample, position, rounding_radii)

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        layer, radius = self.layer, ball.radius
        d, width, length = layer.head_width, layer.width, self.length
        e = self._weight_changes(ball)
        # Queries are the tokens of this expansion, (…, N, 1, R); keys are all tokens, (…, N, 1, T).
        r_q = radius.unsqueeze(-2)
        r_k, background = self._key_radii(radius)
        norm_q, norm_k = self.norm.unsqueeze(-2) + r_q, self.key_norm.unsqueeze(-2) + r_k + background

        def column(values: Tensor) -> Tensor:
            return values.unsqueeze(-1)  # (H,) → (H, 1) against tokens

        def projected(name: str, clean: Tensor, r: Tensor, norm: Tensor, other: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
            """(σr, fresh) for queries, keys or values (…, N, H, ·): the first bounds W_hΔx, the second rounding, weight changes and background."""
            sigma, change = column(self.sigma[name]), e[name]
            frobenius = column(self.frobenius[name]) + math.sqrt(d) * change
            fresh = projection_error(frobenius, norm, width, d, self.scope) + change * norm + sigma * other
            offset = self.offsets[name]
            if offset is not None:
                fresh = fresh + offset_error(column(offset), frobenius * norm, width, d, self.scope)
            moved = self._moved(name, sigma * r, ball)
            if layer.turns and name != "value":
                fresh = self.heads.turned(fresh)
                fresh = fresh + turn_error(layer, clean + moved + fresh, self.scope)
            return up(moved), up(fresh)

        q_moved, q_fresh = projected("query", self.nq, r_q, norm_q)
        k_moved, k_fresh = projected("key", self.nk, r_k, norm_k, background)
        v_moved, v_fresh = projected("value", self.nv, r_k, norm_k, background)
        rho_q, rho_k, rho_v = q_moved + q_fresh, k_moved + k_fresh, v_moved + v_fresh
        q_size, k_size = self.nq + rho_q, self.nk + rho_k

        top_k = self._top(k_size)
        logit = self.s * q_size * top_k
        lost = logit_error(logit, q_size, top_k, self.s, d, self.scope, layer.explicit)
        rounding = up(shifted(lost, logit, self.heads.bias, self.scope))  # (…, N, H, T)

        def pairs(query: Tensor, key: Tensor) -> Tensor:
            """query_i·key_j (…, N, H, T, T)."""
            return query.unsqueeze(-1) * key.unsqueeze(-2)

        # The change of logit ij, apart from a shift of row i: through the query (centred), through the key, and the nonlinear part.
        by_query = self._by_query(q_moved, ball)
        by_key = self._by_key(k_moved, r_k)
        both = self._both(self.s * pairs(q_moved, k_moved), radius)
        bilinear = self.s * (
            q_fresh.unsqueeze(-1) * self.key_distance + pairs(self.nq, k_fresh) + pairs(q_moved, k_fresh) + pairs(q_fresh, rho_k)
        ) + both + rounding.unsqueeze(-1)
        zero = torch.zeros((), dtype=radius.dtype, device=radius.device)
        other = torch.where(self.seen, (by_key + bilinear) * (1 + 1e-12), zero)
        b = other + torch.where(self.seen, by_query * (1 + 1e-12), zero)
        softmax = SoftmaxBall(self.p, b, other, self.seen)
        upper, dev = softmax.upper, softmax.dev

        mixed = torch.minimum((upper @ rho_v.unsqueeze(-1)).squeeze(-1), self._top(rho_v))
        value_size = self.top_value + self._top(rho_v)
        after = mixing_error(length, self.scope) * 3 * value_size + mixing_underflow(length, value_size, d, self.scope)
        head = up((dev * self.value_distance).sum(-1) * (1 + 1e-12) + mixed * (1 + 1e-12)) + after  # (…, N, H, T)

        by_token = head.transpose(-1, -2)  # (…, N, T, H)
        e_o = e.get("output", 0.0)
        e_o = e_o.squeeze(-1) if isinstance(e_o, Tensor) else e_o  # (…, N, 1) against tokens
        columns = self.sigma["output"] + (e_o.unsqueeze(-1) if isinstance(e_o, Tensor) else e_o)
        whole = self.heads.whole + e_o
        moved = abs(self.factor) * join_heads(columns, whole, by_token)
        mixed_size = norm_up((self.top_value + head).transpose(-1, -2))
        fresh = e_o * mixed_size
        if layer.output is not None:
            fresh = self.scope.both(lambda context: self.heads.output_error(mixed_size, e_o, context)) + fresh
        fresh = abs(self.factor) * fresh
        if layer.output is not None or self.factor != 1.0:
            size = whole * mixed_size if self.heads.offset is None else whole * mixed_size + self.heads.offset
            fresh = scaled_error(fresh, self.factor, size, layer.out_width, self.scope)

        def sums(name: str, norm: Tensor) -> Tensor:
            """Bounds of the partial sums of queries, keys or values."""
            size, offset = (column(self.frobenius[name]) + math.sqrt(d) * e[name]) * norm, self.offsets[name]
            return self._reach(size if offset is None else size + column(offset), by_query=name == "query")

        queries, keys, values = sums("query", norm_q), sums("key", norm_k), sums("value", norm_k)
        within = largest_in_kernel(
            torch.maximum(queries, torch.maximum(keys, values)), values, self.s, length, self.scope.context.dtype, layer.explicit
        )
        largest = torch.stack(
            [
                within_mask((q_size * top_k).amax(-2) * (self.s + 1) + self.heads.bias, self.heads.depth),
                within,
                self.heads.output_sums(mixed_size, e_o, layer) * max(1.0, abs(self.factor)),
            ]
        ).amax(0)
        # A scale that is flushed to zero turns masked logits into NaN.
        fresh = self.scope.infinite_if_flushed(self.scope.infinite_if_overflow(up(fresh), largest), self.s)
        if not remainder:
            return OutputBounds(up(moved) + fresh, ball.error, [])

        spread, variance = softmax.second_order()
        curved = spread + variance
        # The nonlinear part is also at most the whole change plus its first order: Σ_j (|p' − p|_j + p_jb_j)|ω_j|. It does not grow like b².
        anything = dev + self.p * b
        rest = self.p * bilinear
        crossed = (dev * r_k.unsqueeze(-2)).sum(-1)
        v_rounding = (upper @ v_fresh.unsqueeze(-1)).squeeze(-1)
        bounds: list[Term] = [
            SmallerOf(spread.flatten(-2), variance.flatten(-2), up(anything * (1 + 1e-12)).flatten(-2)),
            up(rest * (1 + 1e-12)).flatten(-3),
            up(crossed * (1 + 1e-12)).flatten(-2),
            (up(v_rounding * (1 + 1e-12)) + after).flatten(-2),
            fresh,
            radius.amax(-1, keepdim=True),
        ]
        bent = torch.minimum((curved * self.value_distance).sum(-1), (anything * self.value_distance).sum(-1))
        nonlinear = bent + (rest * self.value_distance).sum(-1) + (dev * v_moved.unsqueeze(-2)).sum(-1) + v_rounding + after
        outer = abs(self.factor) * join_heads(columns, whole, up(nonlinear * (1 + 1e-12)).transpose(-1, -2))
        return OutputBounds(up(moved) + fresh, up(outer + self.gain * ball.error.amax(-1, keepdim=True)) + fresh, bounds)

    def _reach(self, sizes: Tensor, by_query: bool = False) -> Tensor:
        """The largest of sizes (…, N, H, T) over heads, and over the keys that a query sees, for each token of this expansion."""
        return (sizes if by_query else self._top(sizes)).amax(-2)

    def _back(self, ds: Tensor, outer: Tensor) -> Tensor:
        """From adjoints of the logits (A, N, H, R, T) and of the mixed values (A, N, H, R, d) to those of the tokens (A, N, R, D)."""
        s = self.layer.logit_scale
        dq, dk, dv = s * times(ds, self.k), s * times(ds.mT, self.q), times(outer.mT, self.p).mT
        return self._join(dq, dk, dv, self.position)

    def _join(self, dq: Tensor, dk: Tensor, dv: Tensor, position: Tensor) -> Tensor:
        dq, dk = (self.layer.turned(x, position, back=True) for x in (dq, self._summed_over_shared(dk)))
        parts = (("query", dq), ("key", dk), ("value", self._summed_over_shared(dv)))
        return sum(x.transpose(-2, -3).flatten(-2) @ self.matrices[n] for n, x in parts)  # type: ignore[return-value]

    def _summed_over_shared(self, x: Tensor) -> Tensor:
        """Adjoints of keys or values (…, H, R, d), summed over the query heads that share them (…, Hk, R, d)."""
        shared = self.layer.key_heads
        return x if shared == self.layer.heads else x.unflatten(-3, (shared, -1)).sum(-3)

    def _by_head(self, name: str) -> Tensor:
        """The matrix of query, key or value for each query head (H, d, D)."""
        by_head = self.matrices[name].unflatten(0, (-1, self.layer.head_width))
        return by_head if name == "query" else self.layer.spread(by_head, 0)

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        layer = self.layer
        outer = self.factor * g
        outer = layer.split(outer if layer.output is None else outer @ self.matrices["output"])  # γ (A, N, H, T, d)
        # ω_ij = ⟨γ_i, v_j − o_i⟩, and a bound of its cancellation error.
        omega = times(outer, self.v.mT) - (outer * self.o).sum(-1, keepdim=True)
        size = token_norms(outer)
        lost = cancellation_error(self.length) * layer.head_width * size * 2 * self.top_value
        weights = omega.abs() + lost.unsqueeze(-1)
        back = self._back(self.p * omega, outer)
        crossed = token_norms(by_heads(outer, self._by_head("value")))
        norms = token_norms(g)
        slack = 4 * ADJOINT_SLACK * self.gain * norms.sum(-1, keepdim=True)
        # Σ_j p^τ_j(η_j − η̄)²ω_j lowers the margin only where ω_j < 0.
        against = (lost.unsqueeze(-1) - omega).clamp_min(0.0)
        sizes = weights.flatten(-2)
        either = SmallerOf(sizes if two_sided else against.flatten(-2), sizes)
        return back, [either, weights.flatten(-3), crossed.flatten(-2), size.flatten(-2), norms, slack]


def _query_key_form(query: Tensor, key: Tensor, turn: float) -> Tensor:
    """‖½(W_qᵀRᵀRW_k + W_kᵀRᵀRW_q)‖₂ for each head (H,), rounded up, for any R with ‖RᵀR − I‖₂ ≤ turn² − 1; query, key (H, d, D)."""
    form = query.mT @ key
    size = torch.linalg.matrix_norm(query) * torch.linalg.matrix_norm(key)
    norm = spectral_norm_bound if form.shape[-1] <= 512 else spectral_norm_quick  # an eigensolver takes seconds per layer there
    return up(norm((form + form.mT) / 2) + (2.0**-40 + (turn**2 - 1)) * size)


@dataclass(frozen=True)
class HeadInputMap:
    """The linear map M from the perturbation to attention's input, for each head.

    gain: ≥ ‖W_hM‖ of queries, keys and values, each (M, H, 1). rows: ≥ ‖s·(k_j − k̄)ᵀW_qM‖ (M, H, 1, T). before: as in `Expansion.with_input_map`.
    """

    gain: dict[str, Tensor]
    rows: Tensor
    before: Tensor


@dataclass(frozen=True)
class Logits(Functionals):
    """The logit changes caused by the query's change, apart from a common shift, for the `keys`; `lost`: float64 error of the vectors, both (M, H,
    J)."""

    keys: Tensor = field(kw_only=True)
    lost: Tensor = field(kw_only=True)


class AttentionRow(AttentionExpansion):
    """Attention of single tokens that change, among keys that do not: one query and one key of each sample change, the other keys only round.

    background: (M, T), the radii of all tokens without a perturbation. All effects of the other tokens count as remainder.
    """

    input_map: HeadInputMap | None = None

    @property
    def uses_input_map(self) -> bool:
        return True

    def __init__(self, full: AttentionExpansion, sample: Tensor, position: Tensor, rounding_radii: Tensor) -> None:
        self.__dict__.update(full.__dict__)
        self.key_norm, self.background = full.norm[sample], rounding_radii[sample]
        for name in ("clean", "norm"):
            setattr(self, name, rows_of(getattr(full, name), sample, position))
        for name in ("q", "p", "o", "nq", "key_distance", "value_distance", "top_value"):
            setattr(self, name, getattr(full, name)[sample, :, position].unsqueeze(2))
        for name in ("k", "v", "nk", "nv", "gain"):
            setattr(self, name, getattr(full, name)[sample])
        self.mine = torch.arange(full.length, device=sample.device) == position[:, None]  # (M, T)
        seen = full.seen[..., position, :]  # (M, T), or (H, M, T)
        self.seen, self.position = (seen if seen.dim() == 2 else seen.transpose(0, 1)).reshape(len(sample), -1, 1, full.length), position
        # A single query can afford the exact norms ‖s·W_qᵀRᵀ(k_j − k̄)‖ and ‖s·W_kᵀRᵀq‖ instead of products of norms.
        mean = self.p @ self.k
        centred = self.k - mean
        centred, query = (full.layer.turned(x, position[:, None, None], back=True) for x in (centred, self.q))
        self.by_head = {n: self._by_head(n) for n in ("query", "key", "value")}  # (H, d, D)
        query_heads, key_heads, turn = self.by_head["query"], self.by_head["key"], self.heads.turn
        self.own = full.scope.context.constant(full.layer, "own-form", lambda: _query_key_form(query_heads, key_heads, turn)).to(position.device)
        # ‖xW‖ = ‖xRᵀ‖ for W = RᵀQᵀ, up to the error of the QR decomposition: (T, d) entries instead of (T, D).
        self.centred = centred
        lost = 2.0**-30 * torch.linalg.matrix_norm(self.by_head["query"])[:, None]
        triangle = torch.linalg.qr(self.by_head["query"].mT).R
        self.query_rows = (self.s * up(norm_up(centred @ triangle.mT) + lost * (norm_up(centred) + self.nk))).unsqueeze(2)
        summed = max(full.layer.width, full.layer.head_width)
        self.key_row = self.s * (norm_up(query @ self.by_head["key"]) + cancellation_error(1) * summed * self.nq * self.sigma["key"][:, None])

    def _top(self, x: Tensor) -> Tensor:
        return torch.where(self.seen.squeeze(-2), x, torch.zeros((), dtype=x.dtype, device=x.device)).amax(-1, keepdim=True)

    def _key_radii(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        zero = torch.zeros((), dtype=radius.dtype, device=radius.device)
        return torch.where(self.mine, radius, zero).unsqueeze(-2), torch.where(self.mine, zero, self.background).unsqueeze(-2)

    def _by_query(self, moved: Tensor, ball: Ball) -> Tensor:
        bound = torch.minimum(super()._by_query(moved, ball), ball.radius[..., None, None] * self.query_rows)
        asked = ball.functionals
        if asked is not None and asked.sizes is not None:
            assert isinstance(asked, Logits)
            direct = asked.sizes.unflatten(0, (self.layer.heads, -1)).permute(2, 0, 1)  # (M, H, J)
            direct = up(direct + asked.lost * ball.radius.unsqueeze(-2))
            known = torch.full_like(bound, torch.inf).scatter(-1, asked.keys.unsqueeze(2), direct.unsqueeze(2))
            bound = torch.minimum(bound, known)
        if self.input_map is None or ball.split is None:
            return bound
        epsilon, rest = ball.split.epsilon, ball.rest(self.input_map.before)
        return torch.minimum(bound, up(self.input_map.rows * epsilon[..., None, None] + self.query_rows * rest[..., None, None]))

    def with_input_map(self, m: Tensor, before: Tensor) -> Self:
        gain, size = {}, torch.linalg.matrix_norm(m)[:, None]
        for name, matrix in self.by_head.items():
            z = matrix @ m.unsqueeze(1)  # (M, H, d, D₀)
            through = spectral_norm_quick(z) + 2.0**-34 * self.frobenius[name] * size
            gain[name] = up(through if name == "value" else self.heads.turned(through)).unsqueeze(-1)
        forms = self.s * (self.centred @ (self.by_head["query"] @ m.unsqueeze(1)))  # (M, H, T, D₀)
        lost = 2.0**-30 * self.s * size * torch.linalg.matrix_norm(self.by_head["query"])  # (M, H)
        rows = up(norm_up(forms) + lost.unsqueeze(-1) * (norm_up(self.centred) + self.nk)).unsqueeze(2)
        return self.replaced(input_map=HeadInputMap(gain, rows, before))

    def functionals(self) -> Logits:
        # Logit ij, apart from a shift of row i, changes by s·W_qᵀRᵀ(k_j − k̄)·Δx_i. The chosen keys are those with the largest influence on the
        # remainder.
        influence = (self.p * self.value_distance * self.query_rows.square()).squeeze(2)
        asked = influence.topk(min(ASKED_KEYS, influence.shape[-1])).indices  # (M, H, J)
        keys = self.centred.gather(2, asked.unsqueeze(-1).expand(-1, -1, -1, self.centred.shape[-1]))
        size = torch.linalg.matrix_norm(self.by_head["query"])
        lost = 2.0**-30 * self.s * size[:, None] * (norm_up(keys) + self.nk.gather(2, asked))
        return Logits((self.s * (keys @ self.by_head["query"])).flatten(1, 2).transpose(0, 1), keys=asked, lost=lost)

    def _moved(self, name: str, moved: Tensor, ball: Ball) -> Tensor:
        if self.input_map is None or ball.split is None:
            return moved
        epsilon, rest = ball.split.epsilon, ball.rest(self.input_map.before)
        through = up(self.input_map.gain[name] * epsilon.unsqueeze(-1) + self.sigma[name][:, None] * rest.unsqueeze(-1))
        return torch.minimum(moved, through if name == "query" else torch.where(self.mine[:, None, :], through, moved))

    def _by_key(self, moved: Tensor, radius: Tensor) -> Tensor:
        return torch.minimum(super()._by_key(moved, radius), (self.key_row.unsqueeze(-1) * radius.unsqueeze(-2)))

    def _both(self, product: Tensor, radius: Tensor) -> Tensor:
        # Query and key of one token change together: Δq·Δk = ΔᵀW_qᵀW_kΔ, a quadratic form of which only the symmetric part counts.
        own = self.s * self.own[:, None, None] * radius.square()[..., None, None]  # (…, M, 1) → (…, M, H, 1, 1)
        return torch.where(self.mine[:, None, None, :], torch.minimum(product, own), product)

    def _reach(self, sizes: Tensor, by_query: bool = False) -> Tensor:
        return sizes.amax(-2) if by_query else sizes.amax((-1, -2)).unsqueeze(-1)

    def _back(self, ds: Tensor, outer: Tensor) -> Tensor:
        s = self.layer.logit_scale
        where = self.mine[:, None, None, :].expand(-1, self.p.shape[1], 1, -1)
        mine = torch.where(where, ds, torch.zeros((), dtype=ds.dtype, device=ds.device)).sum(-1, keepdim=True)  # (A, M, H, 1, 1)
        weight = torch.where(where, self.p, torch.zeros((), dtype=ds.dtype, device=ds.device)).sum(-1, keepdim=True)
        return self._join(s * times(ds, self.k), s * mine * self.q, weight * outer, self.position[:, None, None])
