"""Attention, head by head. docs/theory.md, section 3.

For one head on a path through the domain, with logits s·q·k/d + constant:
    dp_ij = p_ij (η_ij − η̄_i),   |η_ij| ≤ s(‖dq_i‖‖k_j‖ + ‖q_i‖‖dk_j‖)/d,   Σ_j p_j|η_j − η̄| ≤ max|η|,
so with ‖x_t‖ ≤ a everywhere on the path and changes r of the tokens,  Σ_j|p'_ij − p_ij| ≤ min(2, 2·s σ_q σ_k a r/d), and from
    o'_i − o_i = Σ_j p'_ij (v'_j − v_j) + Σ_j (p'_ij − p_ij) v_j,   ‖o'_i − o_i‖ ≤ σ_v r + σ_v a·min(2, 2·s σ_q σ_k a r/d).
A bias by distance is a constant and drops out.
Rotary positions are orthogonal and change no norm. The published formula uses norms of the stacked matrices instead; see docs/theory.md, section 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robustlip.domains.norms.state import Context, Rule, State, register, rule_for
from robustlip.errors import UnsupportedLayer
from robustlip.layers import Attention
from robustlip.numerics.rounding import norm_up
from robustlip.numerics.spectral import spectral_norm_bound
from robustlip.ops.affine import Matrix
from robustlip.ops.attention import (
    largest_in_kernel,
    logit_error,
    mixing_error,
    mixing_underflow,
    projection_error,
    rotation_error,
    scaled_error,
    shifted,
)


@dataclass(frozen=True)
class Heads:
    """Guaranteed norms of the four matrices, whole and by head (tensors (H,))."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    whole: dict[str, float]
    frobenius: dict[str, Tensor]
    output_matrix: Matrix
    bias: float

    @classmethod
    def of(cls, layer: Attention) -> Heads:
        h = layer.heads
        slices = {n: getattr(layer, n).weight.detach().unflatten(0, (h, -1)) for n in ("query", "key", "value")}
        slices["output"] = layer.output.weight.detach().unflatten(1, (h, -1)).movedim(1, 0)
        # States live on the CPU, where a dozen numbers a sample cost less than launching kernels for them.
        sigma = {n: spectral_norm_bound(w).cpu() for n, w in slices.items()}
        bias = 0.0 if layer.distance_bias is None else float(layer.distance_bias.detach().abs().amax())
        return cls(
            **sigma,
            whole={n: float(spectral_norm_bound(getattr(layer, n).weight)) for n in slices},
            frobenius={n: norm_up(w, (-2, -1)).cpu() for n, w in slices.items()},
            output_matrix=Matrix.of(layer.output.weight),
            bias=bias,
        )


def join_heads(output: Tensor, whole: float | Tensor, per_head: Tensor) -> Tensor:
    """‖W_o·concat_h(u_h)‖ for ‖u_h‖ ≤ per_head (..., H): min(σ(W_o)·sqrt(Σ_h u_h²), Σ_h σ(W_o[:,h])·u_h)."""
    return torch.minimum(whole * norm_up(per_head), (output * per_head).sum(-1))


def check_projections(layer: Attention) -> None:
    """Raises UnsupportedLayer for projections that are not plain matrices: the rule reads their weights and nothing else."""
    for name in ("query", "key", "value", "output"):
        projection: nn.Module = getattr(layer, name)
        plain = isinstance(projection, nn.Linear) and type(projection) is nn.Linear and projection.bias is None
        if not plain or tuple(layer.get_parameter(f"{name}.weight").shape) != (layer.width, layer.width):
            raise UnsupportedLayer(
                f"expected Attention's {name} to be Linear({layer.width}, {layer.width}) without a bias, got {projection}; leave it as it was built"
            )
        rule_for(projection)  # refuses hooks


@register(Attention)
class AttentionRule(Rule):
    """Multi-head attention in the per-token ℓ2 norm; see the module's text for the derivation."""

    def step(self, layer: Attention, state: State, context: Context) -> State:
        state = state.by_token(layer).in_l2()
        check_projections(layer)
        heads: Heads = context.constant(layer, "heads", lambda: Heads.of(layer))
        scale, d, factor = abs(layer.scale) / layer.head_width, layer.head_width, abs(layer.output_scale)
        a, r = state.norm.unsqueeze(-1), state.change.unsqueeze(-1)  # (..., 1) against (H,)

        def perturbed(name: str) -> Tensor | float:
            change = context.weight_change(heads.whole[name])
            return change.unsqueeze(-1) if isinstance(change, Tensor) and change.dim() else change

        e_q, e_k, e_v = perturbed("query"), perturbed("key"), perturbed("value")
        e_o = context.weight_change(heads.whole["output"])
        s_q, s_k, s_v = heads.query + e_q, heads.key + e_k, heads.value + e_v
        value_norm = s_v * a  # (..., H)

        def head_change(r: Tensor, e_q: Tensor | float, e_k: Tensor | float, e_v: Tensor | float) -> Tensor:
            """‖o' − o‖ of each head (..., H) for token changes r and weight changes e."""
            logits = scale * (2 * s_q * s_k * a * r + (e_q * s_k + s_q * e_k) * a * a)
            return s_v * r + e_v * a + value_norm * logits.clamp_max(2.0)

        output_columns = heads.output + (e_o.unsqueeze(-1) if isinstance(e_o, Tensor) and e_o.dim() else e_o)
        whole = heads.whole["output"] + e_o
        mixed = norm_up(value_norm)
        change = join_heads(heads.output, heads.whole["output"], head_change(r, e_q, e_k, e_v)) + e_o * mixed
        norm = factor * join_heads(output_columns, whole, value_norm)

        # Rounding made here, on executed inputs (whose norm `a` bounds too), and rounding that arrives and is passed on like a change.
        head_error = self._rounding(layer, heads, state, context, (s_q, s_k, s_v), (e_q, e_k, e_v))
        fresh = heads.output_matrix.rounding(mixed + norm_up(head_error), e_o, context)
        fresh = factor * (join_heads(output_columns, whole, head_error) + fresh)
        fresh = scaled_error(fresh, factor, join_heads(output_columns, whole, value_norm), layer.width, context)
        passed = factor * join_heads(output_columns, whole, head_change(state.rounding.unsqueeze(-1), 0.0, 0.0, 0.0))
        behind = replace(state, norm=norm + fresh, change=factor * change, rounding=passed + fresh, width=layer.width)
        largest_logit = (scale + 1) * (s_q * s_k * a * a).amax(-1) + heads.bias
        # Partial sums of queries, keys and values: one that overflows is lost even where the logits are small.
        inner = (("query", e_q), ("key", e_k), ("value", e_v))
        projected = torch.stack([(heads.frobenius[name] + math.sqrt(d) * e) * a for name, e in inner]).amax(-1)
        held = largest_in_kernel(projected.amax(0), projected[-1], scale, state.tokens, context.dtype)
        mixed_sums = mixed * (heads.output_matrix.frobenius + math.sqrt(layer.width) * e_o)
        # A scale that counts for zero makes NaN of what is masked.
        return context.divided(context.finite(behind, torch.stack([largest_logit, held, mixed_sums]).amax(0)), scale)

    def _rounding(
        self,
        layer: Attention,
        heads: Heads,
        state: State,
        context: Context,
        sigma: tuple[Tensor, Tensor, Tensor],
        perturbed: tuple[Tensor | float, Tensor | float, Tensor | float],
    ) -> Tensor:
        """‖fl(o_i) − o_i‖₂ of each head (..., H), given the executed input: products, rotation, logits, softmax, weighted sum, in turn."""
        d, length = layer.head_width, state.tokens
        scale = abs(layer.scale) / d
        a = state.norm.unsqueeze(-1)

        def projected(i: int, name: str) -> tuple[Tensor, Tensor]:
            error = projection_error(heads.frobenius[name] + math.sqrt(d) * perturbed[i], a, layer.width, d, context)
            return sigma[i] * a + error, error

        q, q_error = projected(0, "query")
        k, k_error = projected(1, "key")
        v, v_error = projected(2, "value")
        if layer.rope:
            turned = rotation_error(q, d, context), rotation_error(k, d, context)
            q_error, k_error, q, k = q_error + turned[0], k_error + turned[1], q + turned[0], k + turned[1]
        logit = scale * q * k
        passed = scale * (q_error * k + q * k_error + q_error * k_error)
        error = shifted(passed + logit_error(logit, q, k, scale, d, context), logit, heads.bias, context)
        grown = torch.expm1(2 * error)
        relative = grown * (1 + 1e-12) + mixing_error(length, context) * (2 + grown)
        return relative * v + v_error + mixing_underflow(length, v, context)
