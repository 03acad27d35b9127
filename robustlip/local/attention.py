"""Attention on balls around the clean tokens, head by head. MATH.md sections 6 and 7, with the adjoint inside the head.

Clean q, k, v (rotated), logits S, p = softmax(S), o = pv; a change of the tokens changes logit ij by η_ij, of which a shift common to row i does
nothing. With Δq, Δk, Δv ≤ ρ (norms) and centred keys k_j − k̄_i, k̄_i = Σ_j p_ij k_j,
    |η_ij − shift_i| ≤ b_ij = s(‖q_i‖ρk_j + ρq_i‖k_j − k̄_i‖ + ρq_iρk_j)/d + rounding,
so p' lies between p^L_ij and p^U_ij (MATH.md section 6), |p' − p| ≤ dev, and ‖o'_i − o_i‖ ≤ Σ_j dev_ij‖v_j − o_i‖ + min(Σ_j p^U_ijρv_j, max_jρv_j).

Remainder. With γ_i the adjoint of o_i and ω_ij = ⟨γ_i, v_j − o_i⟩, where Σ_j p_ijω_ij = 0, exactly
    ⟨γ_i, o'_i − o_i⟩ = Σ_j (p'_ij − p_ij)⟨γ_i, v'_j − v_j⟩ + Σ_j p_ij⟨γ_i, v'_j − v_j⟩ + Σ_j (p'_ij − p_ij)ω_ij.
The first sum is at most Σ_j dev_ij‖W_vᵀγ_i‖r_j, the second is linear. In the third, on the path p^τ = softmax(S + τη) the second derivative is
Σ_j p^τ_j((η_j − η̄)² − Var)ω_ij, so beyond Σ_j p_jη_jω_ij it is at most Σ_j [½p^U_j(b_j + b̄)² + ½V·dev_j]|ω_ij| with b̄ = min(Σp^Ub, max b) and V = Σp^Ub²
(Σ_j p^τ_jω_ij = Σ_j (p^τ_j − p_j)ω_ij), and in Σ_j p_jη_jω_ij the part that is not linear, sΔq_i·Δk_j/d and rounding, is bounded by its norm.
Against MATH.md section 7 this has |⟨γ_i, v_j − o_i⟩| in the place of ‖γ_i‖‖W_o‖‖v_j − o_i‖, and the mean of the bilinear part drops out.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from robustlip.errors import BadInput
from robustlip.layers import Attention
from robustlip.layers.attention import rotary
from robustlip.local.base import ADJOINT_SLACK, Expansion, Scope, register, token_norms
from robustlip.rounding import norm_up, up
from robustlip.rules import Context
from robustlip.rules.attention import Heads, check_projections, join_heads
from robustlip.rules.elementwise import FUNCTION_ULPS

# Beyond it softmax weights are only known to lie between 0 and 1, and exponentials stay finite.
_LARGEST_LOGIT_CHANGE = 50.0
# What subtracting nearly equal float64 numbers of size 1 can lose, many times over.
_CANCEL = 2.0**-44


def _inverse_rotary(x: Tensor) -> Tensor:
    """The transpose of `rotary`: the rotation by the negative angles."""
    half = x.shape[-1] // 2
    flipped = rotary(torch.cat([x[..., half:], x[..., :half]], -1))
    return torch.cat([flipped[..., half:], flipped[..., :half]], -1)


@register(Attention)
class AttentionExpansion(Expansion):
    def __init__(self, layer: Attention, clean: Tensor, scope: Scope) -> None:
        check_projections(layer)
        if clean.shape[-1] != layer.width:
            raise BadInput(f"expected tokens of width {layer.width} in front of Attention, got {clean.shape[-1]}; match them")
        self.layer, self.scope = layer, scope
        self.heads: Heads = scope.context.constant(layer, "heads", lambda: Heads.of(layer))
        self.length = clean.shape[1]
        self.s = abs(layer.scale) / layer.head_width
        self.factor = layer.output_scale
        device = clean.device
        self.sigma = {n: getattr(self.heads, n).to(device) for n in ("query", "key", "value", "output")}
        self.frobenius = {n: f.to(device) for n, f in self.heads.frobenius.items()}
        self.matrices = {n: getattr(layer, n).weight.detach().double() for n in ("query", "key", "value", "output")}
        q, k, v = (layer.split(clean @ self.matrices[n].T) for n in ("query", "key", "value"))
        if layer.rope:
            q, k = rotary(q), rotary(k)
        self.q, self.k, self.v = q, k, v  # (N, H, T, d)
        logits = (layer.scale / layer.head_width) * (q @ k.mT)
        position = torch.arange(self.length, device=device)
        self.seen = (position[:, None] >= position[None, :]) if layer.causal else torch.ones(self.length, self.length, dtype=torch.bool, device=device)
        bias = None if layer.distance_bias is None else layer.distance_bias.detach().double()
        if bias is not None:
            distance = (position[:, None] - position[None, :]).abs().clamp_max(bias.shape[1] - 1)
            logits = logits + bias[:, distance]
        self.p = logits.masked_fill(~self.seen, -torch.inf).softmax(-1)  # (N, H, T, T)
        self.o = self.p @ v
        self.clean = (self.o.transpose(1, 2).flatten(-2) @ self.matrices["output"].T) * layer.output_scale

        self.norm = norm_up(clean)
        self.nq, self.nk, self.nv = norm_up(q), norm_up(k), norm_up(v)  # (N, H, T)
        self.key_distance = self._distances(k, self.p @ k, self.nk)  # ‖k_j − k̄_i‖ (N, H, T, T)
        self.value_distance = self._distances(v, self.o, self.nv)
        self.top_value = self._top(self.nv)  # largest ‖v_j‖ that token i sees (N, H, T)
        self.top_key, self.top_query = self.nk.amax((-1, -2)), self.nq.amax((-1, -2))

    def _distances(self, x: Tensor, centre: Tensor, norm: Tensor) -> Tensor:
        """‖x_j − c_i‖ (N, H, i, j) rounded up, without a tensor of all differences."""
        size = norm.square()
        squares = size.unsqueeze(-2) + centre.square().sum(-1).unsqueeze(-1) - 2 * (centre @ x.mT)
        lost = _CANCEL * x.shape[-1] * (size.unsqueeze(-2) + size.amax(-1, keepdim=True).unsqueeze(-1))
        return (squares + lost).clamp_min(0.0).sqrt()

    def _top(self, x: Tensor) -> Tensor:
        """max over the keys that each query sees of x (…, N, H, T)."""
        return x.cummax(-1).values if self.layer.causal else x.amax(-1, keepdim=True).expand_as(x)

    def _weight_changes(self) -> dict[str, Tensor | float]:
        """‖E‖ of each matrix, (…, N, 1, 1) against (…, N, H, T)."""
        out: dict[str, Tensor | float] = {}
        for name in self.matrices:
            change = self.scope.context.weight_change(self.heads.whole[name])
            out[name] = change[..., None, None] if isinstance(change, Tensor) else change
        return out

    def advance(self, radius: Tensor, bounds: list[Tensor]) -> Tensor:
        layer, u, tiny = self.layer, self.scope.unit, self.scope.tiny
        d, width, length = layer.head_width, layer.width, self.length
        e = self._weight_changes()
        r = radius.unsqueeze(-2)  # (…, N, 1, T) against heads
        norm = self.norm.unsqueeze(-2) + r

        def gamma(n: float) -> float:
            return self.scope.context.gamma(n) + replace(self.scope.context, dtype=torch.float64).gamma(n)

        def column(values: Tensor) -> Tensor:
            return values.unsqueeze(-1)  # (H,) → (H, 1) against tokens

        def projected(name: str, clean: Tensor) -> tuple[Tensor, Tensor]:
            """(σ r, the rest) for queries, keys or values (…, N, H, T): the first is W_hΔx, the second rounding and weight changes."""
            sigma, change = column(self.sigma[name]), e[name]
            frobenius = column(self.frobenius[name]) + math.sqrt(d) * change
            fresh = gamma(width) * frobenius * norm + width * math.sqrt(d) * tiny + change * norm
            moved = sigma * r
            if layer.rope and name != "value":
                # cos and sin are rounded once, each coordinate is a difference of two products: at most 6u of the vector's norm.
                fresh = fresh + 6 * u * (clean + moved + fresh) + 4 * d * tiny
            return up(moved), up(fresh)

        q_moved, q_fresh = projected("query", self.nq)
        k_moved, k_fresh = projected("key", self.nk)
        v_moved, v_fresh = projected("value", self.nv)
        rho_q, rho_k, rho_v = q_moved + q_fresh, k_moved + k_fresh, v_moved + v_fresh
        q_size, k_size = self.nq + rho_q, self.nk + rho_k

        # Rounding of logits: the product, its scaling (kernels may scale q and k by √s each), the bias, subtracting the row's maximum.
        top_k = self._top(k_size)
        logit = self.s * q_size * top_k
        rounding = gamma(d + 6) * logit + (d + 4) * tiny * (1 + self.s) + math.sqrt(d * self.s) * tiny * (q_size + top_k)
        rounding = up(rounding + 3 * u * (2 * (logit + self.heads.bias) + rounding))  # (…, N, H, T)

        def pairs(query: Tensor, key: Tensor) -> Tensor:
            """query_i·key_j (…, N, H, T, T)."""
            return query.unsqueeze(-1) * key.unsqueeze(-2)

        b = self.s * (pairs(self.nq, rho_k) + rho_q.unsqueeze(-1) * self.key_distance + pairs(rho_q, rho_k)) + rounding.unsqueeze(-1)
        b = torch.where(self.seen, b * (1 + 1e-12), torch.zeros((), dtype=b.dtype, device=b.device))
        top_b = b.amax(-1, keepdim=True)
        # Where a change could be huge (or overflowed), the weights may be anything: b enters remainders as it is, exponentials clamped.
        lost = ~(top_b <= _LARGEST_LOGIT_CHANGE)
        grow = b.clamp_max(_LARGEST_LOGIT_CHANGE).exp()
        high, low = self.p * grow, self.p / grow
        upper = high / (high + (low.sum(-1, keepdim=True) - low).clamp_min(0.0) + 1e-300)
        lower = low / (low + (high.sum(-1, keepdim=True) - high).clamp_min(0.0) + 1e-300)
        # Lost digits of the two differences: a few 2⁻⁵³ of sums near 1, against p itself.
        upper = torch.where(lost & self.seen, torch.ones_like(upper), (upper * (1 + _CANCEL)).clamp_max(1.0))
        lower = torch.where(lost, torch.zeros_like(lower), lower * (1 - _CANCEL))
        dev = torch.maximum(upper - self.p, self.p - lower).clamp_min(0.0) + _CANCEL * self.p

        mixed = torch.minimum((upper @ rho_v.unsqueeze(-1)).squeeze(-1), self._top(rho_v))
        value_size = self.top_value + self._top(rho_v)
        # After exp: its own rounding (once more per block of a blockwise softmax), the sum, the division, the weighted sum.
        after = gamma(2 * length + FUNCTION_ULPS * (2 + length // 16)) * 3 * value_size + 2 * length * tiny * (value_size + 1)
        head = up((dev * self.value_distance).sum(-1) * (1 + 1e-12) + mixed * (1 + 1e-12)) + after  # (…, N, H, T)

        by_token = head.transpose(-1, -2)  # (…, N, T, H)
        e_o = e["output"]
        e_o = e_o.squeeze(-1) if isinstance(e_o, Tensor) else e_o  # (…, N, 1) against tokens
        columns = self.sigma["output"] + (e_o.unsqueeze(-1) if isinstance(e_o, Tensor) else e_o)
        moved = abs(self.factor) * join_heads(columns, self.heads.whole["output"] + e_o, by_token)
        mixed_size = norm_up((self.top_value + head).transpose(-1, -2))
        fresh = self.scope.both(lambda context: self.heads.output_matrix.rounding(mixed_size, e_o, context))
        fresh = abs(self.factor) * (fresh + e_o * mixed_size)
        size = abs(self.factor) * (self.heads.whole["output"] + e_o) * mixed_size
        fresh = fresh + 3 * u * (size + fresh) + math.sqrt(width) * tiny
        sums = torch.stack([(column(self.frobenius[n]) + math.sqrt(d) * e[n]) * norm for n in ("query", "key", "value")]).amax((0, -2))
        largest = torch.stack(
            [
                (q_size * top_k).amax(-2) * (self.s + 1) + self.heads.bias,
                2 * sums,
                mixed_size * (self.heads.output_matrix.frobenius + math.sqrt(width) * e_o),
            ]
        ).amax(0)
        fresh = self.scope.fits(up(fresh), largest)

        mean_b = torch.minimum((upper * b).sum(-1, keepdim=True), top_b)
        variance = (upper * b * b).sum(-1, keepdim=True)
        bilinear = self.s * (
            q_fresh.unsqueeze(-1) * self.key_distance + pairs(self.nq, k_fresh) + pairs(rho_q, rho_k)
        ) + rounding.unsqueeze(-1)
        second = 0.5 * upper * (b + mean_b).square() + 0.5 * variance * dev + self.p * bilinear
        crossed = (dev * r.unsqueeze(-2)).sum(-1)
        v_rounding = (upper @ v_fresh.unsqueeze(-1)).squeeze(-1)
        bounds += [
            up(second * (1 + 1e-12)).flatten(-3),
            up(crossed * (1 + 1e-12)).flatten(-2),
            (up(v_rounding * (1 + 1e-12)) + after).flatten(-2),
            fresh,
            radius.amax(-1, keepdim=True),
        ]
        return up(moved) + fresh

    def adjoint(self, g: Tensor) -> tuple[Tensor, list[Tensor]]:
        layer, s = self.layer, self.layer.scale / self.layer.head_width
        outer = self.layer.split((self.factor * g) @ self.matrices["output"])  # γ (A, N, H, T, d)
        # ω_ij = ⟨γ_i, v_j − o_i⟩, and what its cancellation may have lost.
        omega = outer @ self.v.mT - (outer * self.o).sum(-1, keepdim=True)
        size = token_norms(outer)
        lost = _CANCEL * layer.head_width * size * 2 * self.top_value
        weights = omega.abs() + lost.unsqueeze(-1)
        ds = self.p * omega
        dq, dk, dv = s * (ds @ self.k), s * (ds.mT @ self.q), self.p.mT @ outer
        if layer.rope:
            dq, dk = _inverse_rotary(dq), _inverse_rotary(dk)
        join = {n: x.transpose(-2, -3).flatten(-2) for n, x in (("query", dq), ("key", dk), ("value", dv))}
        back = sum((join[n] @ self.matrices[n] for n in join), start=torch.zeros_like(g))
        by_head = self.matrices["value"].unflatten(0, (layer.heads, -1))  # (H, d, D)
        crossed = token_norms(outer @ by_head)
        gram = self.s * (self.sigma["query"] * self.top_key[:, None] + self.sigma["key"] * self.top_query[:, None])
        gain = abs(self.factor) * self.heads.whole["output"] * (self.sigma["value"] + 4 * self.top_value.amax(-1) * gram).sum(-1)  # (N,)
        norms = token_norms(g)
        slack = ADJOINT_SLACK * gain[:, None] * norms.sum(-1, keepdim=True)
        return back, [weights.flatten(-3), crossed.flatten(-2), size.flatten(-2), norms, slack]
