"""method='global': the enforced bounds of the weights, followed layer by layer and rival by rival. docs/theory.md, sections 1, 3 and 4.

Of the sample enter its label, its margins and the norms of its clean activations (they shrink the domain on which attention is bounded, and
the rounding allowance), so a batch costs little more than its forward pass.
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


def entry(model: Chain, x: Tensor, threat: Threat) -> tuple[list[nn.Module], Tensor, Tensor]:
    """(layers after the threat, their clean input, its largest token norm (N,) float64 on the CPU, rounded up)."""
    if isinstance(threat, EmbeddingBall):
        inside = model.embed(x)
        threat.positions(inside.shape[1])
        layers = list(model)[model.embedding_depth :]
    elif isinstance(threat, InputBall) and model.task == "next-token":
        raise BadInput(f"expected an embedding or weight threat for token ids, got {threat.name}; use embedding-l2 or weights-spectral")
    else:
        inside, layers = x, list(model)
    if not inside.is_floating_point():
        rows = model[0].weight.detach()[inside] if isinstance(model[0], nn.Embedding) else inside
        return layers, inside, quick_norm_up(rows).amax(-1).cpu()
    norm = quick_norm_up(inside).amax(-1) if isinstance(threat, EmbeddingBall) else quick_norm_up(inside.flatten(1))
    return layers, inside, norm.cpu()


def first_state(inside: Tensor, norm: Tensor, threat: Threat, radius: Tensor) -> State:
    """Bounds before the first layer after the threat: the domain is the clean norm enlarged by the perturbation (docs/theory.md, section 1)."""
    shape = inside.shape[1:]
    if not inside.is_floating_point():
        tokens, width, whole = shape[-1], 1, None
    elif isinstance(threat, EmbeddingBall):
        tokens, width, whole = shape[0], shape[1], None
    elif len(shape):
        # One bound for all numbers of a sample together, whatever its shape, until a layer takes it apart.
        tokens, width, whole = 1, shape.numel(), tuple(shape) if len(shape) > 1 else None
    else:
        raise BadInput("expected samples that are vectors, token sequences or images, got single numbers; add a dimension")
    zero = torch.zeros_like(radius)
    if isinstance(threat, WeightBall):
        return State(norm, zero, zero, "l2", tokens, width, whole)
    # ‖Δ‖₂ in the units of the domain: √n·ε for ℓ∞, ε for ℓ1, ℓ2 and embedding balls (a token's share of a joint ball is at most the ball).
    state = State(norm, radius, zero, threat.space, tokens, width, whole)
    return replace(state, norm=up(norm + state.in_l2().change))


class GlobalBound:
    """The change of all margins as a function of the radius, for one batch: what `largest_radius` searches."""

    def __init__(self, model: Chain, layers: list[nn.Module], inside: Tensor, norm: Tensor, threat: Threat, y: Tensor, context: Context) -> None:
        self.threat, self.norm, self.inside, self.context = threat, norm, inside, context
        self.head = head_of(model)
        self.layers = layers[:-1] if self.head is not None else layers
        self.y = y

    def _context(self, radius: Tensor) -> Context:
        return replace(self.context, weight_radius=radius) if isinstance(self.threat, WeightBall) else self.context

    def pairs(self, space: str) -> Tensor:
        """c[i, j] ≥ the dual norm of u_{y_i} − u_j (N, C): how far the margin of sample i over j moves per unit of the last hidden state."""
        head = self.head
        assert head is not None
        distances: Distances = self.context.constant(head, f"distances-{space}", lambda: Distances(head.weight.detach(), space))
        return distances.of(self.y).cpu()

    def at(self, radius: Tensor) -> tuple[State, Tensor, Tensor]:
        """(state before the head, extra change per pair of logits, rounding per single logit) at each radius (N,)."""
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
        # The head's own perturbation moves a pair by ‖(e_y − e_j)ᵀE h‖ ≤ √2‖E‖₂‖h‖.
        extra = 2**0.5 * (1 + 1e-15) * perturbed * state.norm + zero
        row = rows + perturbed
        single = row_error(row, bias, state.norm, matrix.fan_in, context)
        return state, extra, context.infinite_if_overflow(single, row * state.norm + bias)

    def room(self, margin: Tensor, space: str) -> tuple[Tensor, Tensor]:
        """(q, c): margins are kept while change·c_j < m_j for all rivals, that is change < q = min_j m_j/c_j; c the smallest factor (N,)."""
        if self.head is None:
            factor = torch.full_like(margin, 2**0.5 * (1 + 1e-15))
        else:
            factor = self.pairs(space)
            # Rows that are equal up to rounding would divide by 0; a larger factor is still a bound.
            factor = torch.maximum(factor, 1e-9 * factor.amax(-1, keepdim=True).clamp_min(1e-300))
        return (margin / factor).amin(-1), factor.scatter(1, self.y[:, None], torch.inf).amin(-1)

    def space(self) -> str:
        """The norm in which the change of the last hidden state comes out: the threat's own, unless a layer mixed coordinates."""
        if self.head is None or self.threat.space == "l2":
            return "l2"
        one = torch.ones(1, dtype=torch.float64)
        state = first_state(self.inside, self.norm[:1], self.threat, one)
        return run_rules(self.layers, state, replace(self.context, clean={})).space

    def evaluator(self, margin: Tensor) -> Any:
        """evaluate(ε) → (change, room) for `largest_radius`; margin (N, C) of the executed clean forward pass."""
        space = self.space()
        quotient, smallest = self.room(margin, space)

        def evaluate(radius: Tensor) -> tuple[Tensor, Tensor]:
            state, extra, single = self.at(radius)
            # Both the clean and the perturbed logits are executed, so every rounding counts twice; a pair has two single logits.
            # Rounding is an ℓ2 bound, `change` one in `space`; dividing by the smallest factor covers the pairs with a larger one.
            l2_per_unit = 1.0 if space == "l2" else self.width_factor(space)
            lost = 2 * l2_per_unit * state.rounding + 4 * single / smallest
            return up(state.change + extra / smallest), quotient * (1 - 1e-12) - up(lost)

        return evaluate

    def width_factor(self, space: str) -> float:
        """How much larger ‖·‖ in `space` can be than ‖·‖₂ on the hidden state: √n for ℓ1, 1 for ℓ∞."""
        return float(self.head.in_features) ** 0.5 * (1 + 1e-15) if space == "l1" and self.head is not None else 1.0


def global_radii(
    model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context
) -> tuple[Tensor, Tensor]:
    """(radius (N,), Lipschitz bound of the part before the head at that radius (N,)), float64 on the CPU.

    logits: executed (N, C). A radius is 0 where the margin is not positive or rounding alone could close it.
    """
    layers, inside, norm = entry(model, x, threat)
    bound = GlobalBound(model, layers, inside, norm, threat, y.cpu(), context)
    margin = margins(logits.detach().cpu(), y.cpu()) - context.final_error
    evaluate = bound.evaluator(margin)
    scale = torch.ones_like(norm) if isinstance(threat, WeightBall) else norm.clamp_min(1e-3)
    radius, change = largest_radius(evaluate, 1e-9 * scale)
    correct = margin.amin(-1) > 0
    radius = torch.where(correct, radius, torch.zeros_like(radius))
    return radius, torch.where(radius > 0, change / radius, torch.full_like(radius, torch.nan))
