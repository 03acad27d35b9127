"""method='global': norm bounds of all layers, and a margin for each rival class. docs/theory.md, sections 1, 3 and 4.

A sample enters through its label, its margins and the norms of its clean activations (which shrink the domain of attention and the rounding errors),
so a batch takes little longer than its forward pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.domains.margins import Distances, head_of, margins
from robustlip.domains.norms import Context, State, run_rules
from robustlip.domains.search import largest_radius
from robustlip.errors import BadInput
from robustlip.layers import Chain
from robustlip.numerics.rounding import norm_up, quick_norm_up, up
from robustlip.ops.affine import Matrix, row_error
from robustlip.threats import EmbeddingBall, InputBall, Threat, WeightBall


def layers_after_threat(model: Chain, x: Tensor, threat: Threat) -> tuple[list[nn.Module], Tensor, Tensor]:
    """(the layers after the threat, their clean input, its largest token norm (N,) float64 on the CPU, rounded up).

    Raises BadInput for input threats to token ids.
    """
    if isinstance(threat, EmbeddingBall):
        inside = model.embed(x)
        threat.positions(inside.shape[1])
        layers = list(model)[model.embedding_depth :]
    elif isinstance(threat, InputBall) and model.position is not None:
        raise BadInput(f"expected an embedding or weight threat for token ids, got {threat.name}; use embedding-l2 or weights-spectral")
    else:
        inside, layers = x, list(model)
    if not inside.is_floating_point():
        rows = model[0].weight.detach()[inside] if isinstance(model[0], nn.Embedding) else inside
        return layers, inside, quick_norm_up(rows).amax(-1).cpu()
    norm = quick_norm_up(inside).amax(-1) if isinstance(threat, EmbeddingBall) else quick_norm_up(inside.flatten(1))
    return layers, inside, norm.cpu()


def first_state(inside: Tensor, norm: Tensor, threat: Threat, radius: Tensor) -> State:
    """The state before the first layer after the threat: its domain is the clean norm enlarged by the perturbation (docs/theory.md, section 1)."""
    shape = inside.shape[1:]
    if not inside.is_floating_point():
        tokens, width, whole = shape[-1], 1, None
    elif isinstance(threat, EmbeddingBall):
        tokens, width, whole = shape[0], shape[1], None
    elif len(shape):
        # One bound for all entries of a sample together, until a layer splits it.
        tokens, width, whole = 1, shape.numel(), tuple(shape) if len(shape) > 1 else None
    else:
        raise BadInput("expected samples that are vectors, token sequences or images, got single numbers; add a dimension")
    zero = torch.zeros_like(radius)
    if isinstance(threat, WeightBall):
        return State(norm, zero, zero, "l2", tokens, width, whole)
    # ‖Δ‖₂: √n·ε for ℓ∞, ε for ℓ1, ℓ2 and embedding balls (a token changes by at most the whole joint ball).
    state = State(norm, radius, zero, threat.space, tokens, width, whole)
    return replace(state, norm=up(norm + state.in_l2().change))


class GlobalBound:
    """The change of all margins of a batch as a function of the radius, for `largest_radius`."""

    def __init__(self, model: Chain, layers: list[nn.Module], inside: Tensor, norm: Tensor, threat: Threat, y: Tensor, context: Context) -> None:
        self.threat, self.norm, self.inside, self.context = threat, norm, inside, context
        self.head = head_of(model)
        self.layers = layers[:-1] if self.head is not None else layers
        self.y = y

    def _context(self, radius: Tensor) -> Context:
        return replace(self.context, weight_radius=radius) if isinstance(self.threat, WeightBall) else self.context

    def pairs(self, space: str) -> Tensor:
        """c[i, j] ≥ the dual norm of u_{y_i} − u_j (N, C): the largest change of the margin of sample i over j per unit change of the last hidden
        state."""
        head = self.head
        assert head is not None
        distances: Distances = self.context.constant(head, f"distances-{space}", lambda: Distances(head.weight.detach(), space))
        return distances.of(self.y).cpu()

    def at(self, radius: Tensor) -> tuple[State, Tensor, Tensor]:
        """(state before the head, additional change of each pair of logits, rounding error of one logit) at each radius (N,)."""
        context = self._context(radius)
        state = run_rules(self.layers, first_state(self.inside, self.norm, self.threat, radius), context)
        zero = torch.zeros_like(radius)
        head = self.head
        if head is None:
            return state.in_l2(), zero, zero
        matrix: Matrix = context.constant(head, "matrix", lambda: Matrix.of(head.weight))
        rows = context.constant(head, "rows", lambda: float(norm_up(head.weight.detach()).amax()))
        bias = context.constant(head, "largest-bias", lambda: 0.0 if head.bias is None else float(head.bias.detach().abs().amax()))
        perturbed = context.weight_change(matrix.sigma)
        # The change E of the head's weights changes a pair of logits by ‖(e_y − e_j)ᵀE h‖ ≤ √2‖E‖₂‖h‖.
        extra = 2**0.5 * (1 + 1e-15) * perturbed * state.norm + zero
        row = rows + perturbed
        single = row_error(row, bias, state.norm, matrix.fan_in, context)
        return state, extra, context.infinite_if_overflow(single, row * state.norm + bias)

    def allowed(self, margin: Tensor, space: str) -> tuple[Tensor, Tensor]:
        """(q, c), both (N,): all margins stay positive while change·c_j < m_j, that is change < q = min_j m_j/c_j; c is the smallest factor."""
        if self.head is None:
            factor = torch.full_like(margin, 2**0.5 * (1 + 1e-15))
        else:
            factor = self.pairs(space)
            # Equal rows would give a division by 0; a larger factor is still a bound.
            factor = torch.maximum(factor, 1e-9 * factor.amax(-1, keepdim=True).clamp_min(1e-300))
        return (margin / factor).amin(-1), factor.scatter(1, self.y[:, None], torch.inf).amin(-1)

    def space(self) -> str:
        """The norm in which the change of the last hidden state is bounded: the threat's norm, unless a layer mixed coordinates."""
        if self.head is None or self.threat.space == "l2":
            return "l2"
        one = torch.ones(1, dtype=torch.float64)
        state = first_state(self.inside, self.norm[:1], self.threat, one)
        return run_rules(self.layers, state, replace(self.context, clean={})).space

    def evaluator(self, margin: Tensor) -> Any:
        """evaluate(ε) → (change, allowed) for `largest_radius`; margin (N, C) of the executed clean forward pass."""
        space = self.space()
        quotient, smallest = self.allowed(margin, space)

        def evaluate(radius: Tensor) -> tuple[Tensor, Tensor]:
            state, extra, single = self.at(radius)
            # The clean and the perturbed logits are both executed, so each rounding error counts twice; a pair has two logits.
            # The rounding error is an ℓ2 bound, `change` one in `space`. Dividing by the smallest factor covers the pairs with a larger factor.
            l2_per_unit = 1.0 if space == "l2" else self.width_factor(space)
            lost = 2 * l2_per_unit * state.rounding + 4 * single / smallest
            return up(state.change + extra / smallest), quotient * (1 - 1e-12) - up(lost)

        return evaluate

    def width_factor(self, space: str) -> float:
        """The largest ratio of ‖·‖ in `space` to ‖·‖₂ on the hidden state: √n for ℓ1, 1 for ℓ∞."""
        return float(self.head.in_features) ** 0.5 * (1 + 1e-15) if space == "l1" and self.head is not None else 1.0


def global_radii(
    model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context
) -> tuple[Tensor, Tensor]:
    """(radius (N,), Lipschitz constant of the layers before the head on that ball (N,)), float64 on the CPU.

    x, y: samples and labels (N,); logits: executed (N, C). A radius is 0 where the margin is not positive or rounding errors alone exceed it.
    Source: docs/theory.md, sections 1, 3 and 4.
    """
    layers, inside, norm = layers_after_threat(model, x, threat)
    bound = GlobalBound(model, layers, inside, norm, threat, y.cpu(), context)
    margin = margins(logits.detach().cpu(), y.cpu()) - context.final_error
    evaluate = bound.evaluator(margin)
    scale = torch.ones_like(norm) if isinstance(threat, WeightBall) else norm.clamp_min(1e-3)
    radius, change = largest_radius(evaluate, 1e-9 * scale)
    correct = margin.amin(-1) > 0
    radius = torch.where(correct, radius, torch.zeros_like(radius))
    return radius, torch.where(radius > 0, change / radius, torch.full_like(radius, torch.nan))
