"""Linear layers and embeddings: (W + E)(x + Δ) − Wx = WΔ + E(x + Δ). docs/theory.md, sections 1 and 3."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from robustlip.domains.norms.state import Context, Rule, State, register
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Lookup
from robustlip.numerics.rounding import norm_up
from robustlip.numerics.spectral import infinity_to_two_bound, one_to_two_bound
from robustlip.ops.affine import Matrix


@register(nn.Linear)
class LinearRule(Rule):
    """y = Wx + b. Gains: σ(W) for ℓ2, ‖W‖_{∞→2} for ℓ∞, ‖W‖_{1→2} for ℓ1."""

    def step(self, layer: nn.Linear, state: State, context: Context) -> State:
        state = state.by_token(layer)
        if state.width != layer.weight.shape[1]:
            raise BadInput(f"expected {layer.weight.shape[1]} numbers before Linear, got {state.width}; match the widths")
        matrix: Matrix = context.constant(layer, "matrix", lambda: Matrix.of(layer.weight))
        bias = context.constant(layer, "bias", lambda: 0.0 if layer.bias is None else float(norm_up(layer.bias.detach(), 0)))
        if state.space == "linf":
            gain = context.constant(layer, "linf", lambda: float(infinity_to_two_bound(layer.weight)))
        elif state.space == "l1":
            gain = context.constant(layer, "l1", lambda: float(one_to_two_bound(layer.weight)))
        else:
            gain = matrix.sigma
        perturbed = context.weight_change(matrix.sigma)
        norm = (matrix.sigma + perturbed) * state.norm + bias
        fresh = matrix.error(None if layer.bias is None else bias, state.norm, perturbed, context)
        rounding = (matrix.sigma + perturbed) * state.rounding + fresh
        after = replace(
            state,
            norm=norm + fresh,
            change=gain * state.change + perturbed * state.norm,
            rounding=rounding,
            space="l2",
            width=layer.out_features,
        )
        return context.guard_overflow(after, matrix.largest(state.norm, perturbed) + bias)


@register(nn.Embedding)
class EmbeddingRule(Rule):
    """A row of the table for each token id. Only a change E of the table changes it, by ‖E's row‖₂ ≤ ‖E‖₂."""

    def step(self, layer: nn.Embedding, state: State, context: Context) -> State:
        if layer.max_norm is not None:
            raise UnsupportedLayer("expected Embedding without max_norm, got one that rewrites its weights in forward; rescale the rows once")
        matrix: Matrix = context.constant(layer, "matrix", lambda: Matrix.of(layer.weight))
        largest = context.constant(layer, "rows", lambda: float(norm_up(layer.weight.detach()).amax()))
        perturbed = context.weight_change(matrix.sigma) + torch.zeros_like(state.norm)
        # `norm` before an embedding is the largest norm of the used rows, if the caller knows it.
        norm = torch.minimum(state.norm, torch.full_like(state.norm, largest)) + perturbed
        after = replace(state, norm=norm, change=perturbed, rounding=torch.zeros_like(norm), space="l2", width=layer.embedding_dim)
        return context.guard_overflow(after)


@register(Lookup)
class LookupRule(Rule):
    """Recorded operations on token ids. A ball of embeddings starts after this layer, so it needs no bound."""

    def step(self, layer: Lookup, state: State, context: Context) -> State:
        raise UnsupportedLayer(
            "expected a threat to the embeddings of a model that computes them of token ids by several tables, got one to its weights; "
            "use an embedding threat"
        )
