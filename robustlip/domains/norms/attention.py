"""Attention, head by head. docs/theory.md, section 3.

For one head on a path through the domain, with logits s·q·k/d + constant:
    dp_ij = p_ij (η_ij − η̄_i),   |η_ij| ≤ s(‖dq_i‖‖k_j‖ + ‖q_i‖‖dk_j‖)/d,   Σ_j p_j|η_j − η̄| ≤ max|η|.
If ‖x_t‖ ≤ a everywhere on the path and tokens change by r,  Σ_j|p'_ij − p_ij| ≤ min(2, 2·s σ_q σ_k a r/d), and from
    o'_i − o_i = Σ_j p'_ij (v'_j − v_j) + Σ_j (p'_ij − p_ij) v_j,   ‖o'_i − o_i‖ ≤ σ_v r + σ_v a·min(2, 2·s σ_q σ_k a r/d).
A bias by distance and a mask are constants and cancel. Rotary positions are orthogonal and change no norm. The published formula uses norms of the
stacked matrices instead; see docs/theory.md, section 5.

Biases of queries and keys enlarge the factor of a change: |η_ij| ≤ c(‖dq_i‖(σ_k a + κ) + (σ_q a + ‖b_q‖)‖dk_j‖), with c instead of s/d. κ is ‖b_k‖
where keys are rotated and 0 otherwise: dq_i·b_k is the same for all keys of a row, and a common shift of a row changes no weight. b_v does not change
Σ_j (p'_ij − p_ij) v_j either, since both p sum to 1. Rotation tables that are not orthogonal, ‖Rx‖ ≤ ρ‖x‖, are part of σ_q, σ_k and biases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robustlip.domains.norms.state import Context, Rule, State, register, rule_for
from robustlip.errors import UnsupportedLayer
from robustlip.layers import Attention
from robustlip.numerics.arithmetic import RoundingModel
from robustlip.numerics.rounding import norm_up
from robustlip.numerics.spectral import spectral_norm_bound
from robustlip.ops.affine import Matrix, offset_error
from robustlip.ops.attention import (
    largest_in_kernel,
    logit_error,
    mixing_error,
    mixing_underflow,
    projection_error,
    rotation_error,
    scaled_error,
    shifted,
    table_error,
)


@dataclass(frozen=True)
class PerturbedNorms:
    """σ of the matrix that a weight threat changes, by name, computed when first needed.

    Query, key and value share the matrix of a joined projection.
    """

    layer: Attention
    store: dict[str, float]

    def __getitem__(self, name: str) -> float:
        if name not in self.store:
            holders = self.layer.holders()
            sigma = float(spectral_norm_bound(holders[name].weight))
            self.store.update({n: sigma for n, linear in holders.items() if linear is holders[name]})
        return self.store[name]


@dataclass(frozen=True)
class Heads:
    """Guaranteed norms of the matrices, as a whole and for each query head (tensors (H,)); shared keys and values are repeated for each head.

    perturbed_sigma: σ of the matrix that a weight threat changes, by name. offsets: norms of the biases of query, key and value by head, None without
    biases; offset: that of the output. bias: the largest absolute value added to a visible logit; depth: how far below 0 a mask puts hidden logits.
    turn: as in `Attention.turn`; the norms and biases of queries and keys include it. output_matrix: None without an output projection, whose norms
    are 1.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    whole: float
    perturbed_sigma: PerturbedNorms
    frobenius: dict[str, Tensor]
    output_matrix: Matrix | None
    offsets: dict[str, Tensor | None]
    offset: float | None
    bias: float
    depth: float
    turn: float

    @classmethod
    def of(cls, layer: Attention) -> Heads:
        if layer.mask is not None:
            layer.seen(layer.mask.shape[-1])  # refuses queries that see no key
        matrices, offsets = layer.matrices(), layer.offsets()
        slices = {n: matrices[n].detach().unflatten(0, (-1, layer.head_width)) for n in ("query", "key", "value")}
        matrix = None
        if layer.output is not None:
            slices["output"] = matrices["output"].detach().unflatten(1, (layer.heads, -1)).movedim(1, 0)
            matrix = Matrix.of(matrices["output"])
        # States are on the CPU, where a few numbers per sample take less time than GPU kernel launches.
        sigma = {n: spectral_norm_bound(w).cpu() for n, w in slices.items()}
        frobenius = {n: norm_up(w, (-2, -1)).cpu() for n, w in slices.items()}
        if layer.output is None:
            sigma["output"] = torch.ones(layer.heads, dtype=torch.float64)
        last, turn = offsets.pop("output", None), layer.turn()
        norms = {n: norm_up(b.detach().unflatten(0, (-1, layer.head_width))).cpu() for n, b in offsets.items() if b is not None}
        for of in (sigma, frobenius, norms):
            of.update({n: layer.spread(of[n], 0) for n in ("key", "value") if n in of})
        if turn != 1.0:
            for of in (sigma, norms):
                of.update({n: of[n] * turn for n in ("query", "key") if n in of})
        return cls(
            **sigma,
            whole=1.0 if matrix is None else matrix.sigma,
            perturbed_sigma=PerturbedNorms(layer, {} if matrix is None else {"output": matrix.sigma}),
            frobenius=frobenius,
            output_matrix=matrix,
            offsets={n: norms.get(n) for n in ("query", "key", "value")},
            offset=None if last is None else float(norm_up(last.detach(), 0)),
            bias=_largest_added(layer),
            depth=layer.depth(),
            turn=turn,
        )

    @property
    def is_shifted(self) -> bool:
        """Whether queries or keys have a bias."""
        return self.offsets["query"] is not None or self.offsets["key"] is not None

    def plus(self, name: str, size: Tensor) -> Tensor:
        """size (…, H) plus the norm of that bias."""
        offset = self.offsets[name]
        return size if offset is None else size + offset

    def turned(self, size: Tensor) -> Tensor:
        """size·ρ: the norm of queries or keys after their rotation."""
        return size if self.turn == 1.0 else size * self.turn

    def projected_error(self, name: str, change: Tensor | float, norm: Tensor, layer: Attention, arithmetic: RoundingModel) -> Tensor:
        """‖fl((W_h + E)x + b_h) − ((W_h + E)x + b_h)‖₂ by head (…, H), for ‖x‖₂ ≤ norm (…, 1), ‖E‖₂ ≤ change."""
        frobenius = self.frobenius[name] + math.sqrt(layer.head_width) * change
        error = projection_error(frobenius, norm, layer.width, layer.head_width, arithmetic)
        offset = self.offsets[name]
        if offset is None:
            return error
        return error + offset_error(offset, frobenius * norm, layer.width, layer.head_width, arithmetic)

    def output_error(self, norm: Tensor, change: Tensor | float, arithmetic: RoundingModel) -> Tensor:
        """‖fl((W_o + E)x + b_o) − ((W_o + E)x + b_o)‖₂ for ‖x‖₂ ≤ norm, ‖E‖₂ ≤ change; 0 without an output projection."""
        matrix = self.output_matrix
        if matrix is None:
            return torch.zeros_like(norm)
        return matrix.error(self.offset, norm, change, arithmetic)

    def output_sums(self, mixed: Tensor, change: Tensor | float, layer: Attention) -> Tensor:
        """≥ every partial sum of every output entry, for mixed values of norm ≤ mixed."""
        if self.output_matrix is None:
            return mixed
        sums = mixed * (self.output_matrix.frobenius + math.sqrt(layer.width) * change)
        return sums if self.offset is None else sums + self.offset


def _largest_added(layer: Attention) -> float:
    if layer.distance_bias is not None:
        return float(layer.distance_bias.detach().abs().amax())
    added = None if layer.mask is None else layer.added(layer.mask.shape[-1])
    return 0.0 if added is None else float(added.double().abs().amax())


def turn_error(layer: Attention, norm: Tensor, arithmetic: RoundingModel) -> Tensor:
    """‖fl(Rx) − Rx‖₂ of a rotated query or key with ‖x‖₂ ≤ norm."""
    by_table = layer.cos is not None
    return (table_error if by_table else rotation_error)(norm, layer.head_width, arithmetic)


def join_heads(output: Tensor, whole: float | Tensor, per_head: Tensor) -> Tensor:
    """‖W_o·concat_h(u_h)‖ for ‖u_h‖ ≤ per_head (..., H): min(σ(W_o)·sqrt(Σ_h u_h²), Σ_h σ(W_o[:,h])·u_h)."""
    return torch.minimum(whole * norm_up(per_head), (output * per_head).sum(-1))


def check_projections(layer: Attention) -> None:
    """Raises UnsupportedLayer for projections that are not plain Linear layers: the rule uses their weights and biases only."""
    joined, d = layer.joined, layer.head_width
    rows = (layer.heads + 2 * layer.key_heads) * d if joined else layer.heads * d
    shapes = {"query": (rows, layer.width), "projection": (rows, layer.width), "output": (layer.width, layer.heads * d)}
    biases = dict(zip(("query", "key", "value", "output"), layer.biases, strict=True)) | {"projection": layer.biases[0]}
    for name, projection in layer.projections().items():
        shape = shapes.get(name, (layer.key_heads * d, layer.width))
        plain = isinstance(projection, nn.Linear) and type(projection) is nn.Linear and (projection.bias is not None) == biases[name]
        if not plain or tuple(layer.get_parameter(f"{name}.weight").shape) != shape:
            with_bias = "with a bias" if biases[name] else "without a bias"
            raise UnsupportedLayer(
                f"expected Attention's {name} to be Linear({shape[1]}, {shape[0]}) {with_bias}, got {projection}; leave it as it was built"
            )
        rule_for(projection)  # refuses hooks


@register(Attention)
class AttentionRule(Rule):
    """Multi-head attention in the ℓ2 norm of each token; the module's docstring has the derivation."""

    def step(self, layer: Attention, state: State, context: Context) -> State:
        state = state.by_token(layer).in_l2()
        check_projections(layer)
        layer.check_length(state.tokens)
        heads: Heads = context.constant(layer, "heads", lambda: Heads.of(layer))
        scale, d, factor = abs(layer.logit_scale), layer.head_width, abs(layer.output_scale)
        a, r = state.norm.unsqueeze(-1), state.change.unsqueeze(-1)  # (..., 1) against (H,)

        def perturbed(name: str) -> Tensor | float:
            change = 0.0 if context.weight_radius is None else context.weight_change(heads.perturbed_sigma[name])
            return change.unsqueeze(-1) if isinstance(change, Tensor) and change.dim() else change

        e_q, e_k, e_v = perturbed("query"), perturbed("key"), perturbed("value")
        e_o = 0.0 if layer.output is None else context.weight_change(heads.perturbed_sigma["output"])
        s_q, s_k, s_v = heads.query + e_q, heads.key + e_k, heads.value + e_v
        value_norm = s_v * a  # (..., H), without the bias
        mixed_norm = heads.plus("value", value_norm)
        # The additional factors of a change of a query and of a key, beyond s_k·a and s_q·a. A common shift of a row has no effect.
        on_query, on_key = heads.offsets["key"] if layer.turns else None, heads.offsets["query"]

        def head_change(r: Tensor, e_q: Tensor | float, e_k: Tensor | float, e_v: Tensor | float) -> Tensor:
            """‖o' − o‖ of each head (..., H) for token changes r and weight changes e."""
            logits = scale * (2 * s_q * s_k * a * r + (e_q * s_k + s_q * e_k) * a * a)
            if on_query is not None:
                logits = logits + scale * (s_q * r + e_q * a) * on_query
            if on_key is not None:
                logits = logits + scale * (s_k * r + e_k * a) * on_key
            return s_v * r + e_v * a + value_norm * logits.clamp_max(2.0)

        output_columns = heads.output + (e_o.unsqueeze(-1) if isinstance(e_o, Tensor) and e_o.dim() else e_o)
        whole = heads.whole + e_o
        mixed = norm_up(mixed_norm)
        change = join_heads(heads.output, heads.whole, head_change(r, e_q, e_k, e_v)) + e_o * mixed
        size = join_heads(output_columns, whole, mixed_norm)
        if heads.offset is not None:
            size = size + heads.offset
        norm = factor * size

        # The rounding error of this layer on executed inputs (whose norm `a` also bounds), and the error of earlier layers, amplified like a change.
        head_error = self._rounding(layer, heads, state, context, (s_q, s_k, s_v), (e_q, e_k, e_v))
        fresh = heads.output_error(mixed + norm_up(head_error), e_o, context)
        fresh = factor * (join_heads(output_columns, whole, head_error) + fresh)
        if layer.output is not None or factor != 1.0:
            fresh = scaled_error(fresh, factor, size, layer.out_width, context)
        passed = factor * join_heads(output_columns, whole, head_change(state.rounding.unsqueeze(-1), 0.0, 0.0, 0.0))
        after = replace(state, norm=norm + fresh, change=factor * change, rounding=passed + fresh, width=layer.out_width)
        product = s_q * s_k * a * a if not heads.is_shifted else heads.plus("query", s_q * a) * heads.plus("key", s_k * a)
        # If a mask hides keys by adding a number, logits of its size have a rounding error that is too large for any softmax.
        largest_logit = (scale + 1) * product.amax(-1) + heads.bias
        # Partial sums of queries, keys and values may overflow even where the logits are small.
        inner = (("query", e_q), ("key", e_k), ("value", e_v))
        projected = torch.stack([heads.plus(name, (heads.frobenius[name] + math.sqrt(d) * e) * a) for name, e in inner]).amax(-1)
        held = largest_in_kernel(projected.amax(0), projected[-1], scale, state.tokens, context.dtype, layer.explicit)
        mixed_sums = heads.output_sums(mixed, e_o, layer)
        # A scale that is flushed to zero turns masked logits into NaN.
        return context.guard_flush(context.guard_overflow(after, torch.stack([largest_logit, held, mixed_sums]).amax(0)), scale)

    def _rounding(
        self,
        layer: Attention,
        heads: Heads,
        state: State,
        context: Context,
        sigma: tuple[Tensor, Tensor, Tensor],
        perturbed: tuple[Tensor | float, Tensor | float, Tensor | float],
    ) -> Tensor:
        """‖fl(o_i) − o_i‖₂ of each head (..., H) for the executed input: products, rotation, logits, softmax, weighted sum."""
        d, length = layer.head_width, state.tokens
        scale = abs(layer.logit_scale)
        a = state.norm.unsqueeze(-1)

        def projected(i: int, name: str) -> tuple[Tensor, Tensor]:
            error = heads.projected_error(name, perturbed[i], a, layer, context)
            error = heads.turned(error) if name != "value" else error
            return heads.plus(name, sigma[i] * a) + error, error

        q, q_error = projected(0, "query")
        k, k_error = projected(1, "key")
        v, v_error = projected(2, "value")
        if layer.turns:
            turned = turn_error(layer, q, context), turn_error(layer, k, context)
            q_error, k_error, q, k = q_error + turned[0], k_error + turned[1], q + turned[0], k + turned[1]
        logit = scale * q * k
        passed = scale * (q_error * k + q * k_error + q_error * k_error)
        error = shifted(passed + logit_error(logit, q, k, scale, d, context, layer.explicit), logit, heads.bias, context)
        grown = torch.expm1(2 * error)
        relative = grown * (1 + 1e-12) + mixing_error(length, context) * (2 + grown)
        return relative * v + v_error + mixing_underflow(length, v, d, context)
