"""method='local': bounds of the change propagated through the clean activations of each sample. docs/theory.md, section 7.

Every bound holds near the sample, not on the whole domain: slopes of activations on the interval that each neuron can reach, softmax weights within
their range, layer norms on the ball around each token. One radius bounds the perturbation and the rounding error together, so that local constants
amplify the rounding error too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustlip.domains.expansion import Ball, ChainExpansion, OutputBounds, Scope, ToL2, unsupported
from robustlip.domains.margins import Distances, head_of, margins
from robustlip.domains.norms import Context
from robustlip.domains.norms.bound import layers_after_threat
from robustlip.domains.search import TOLERANCE, largest_radius
from robustlip.errors import UnsupportedLayer
from robustlip.layers import Chain, two_logits
from robustlip.numerics.rounding import norm_up, up
from robustlip.ops.affine import Matrix, row_error
from robustlip.threats import EmbeddingBall, Threat, WeightBall


def local_why_not(model: Chain, threat: Threat) -> str:
    """'' where every layer after the threat has an expansion, else one sentence that names the layers without one."""
    inner = [m for layer in model for m in layer.modules() if not isinstance(m, Chain)]
    # modules() also lists the matrices inside attention, which the expansion of attention includes.
    names = sorted({unsupported(m) for m in inner if unsupported(m)})
    if names:
        return f"method 'local' has no expansion of {', '.join(names)}"
    return ""


@dataclass(frozen=True)
class Reference:
    """A batch with the expansion of all layers before the head at the float64 reference, and constants of the head.

    rows, bias: of the head (C, D) and (C,); None for a model whose last layer is not Linear (its last activations are the logits). margin: (N, C) of
    the reference logits, +inf for the label itself. pairs: ‖u_y − u_j‖₂ (N, C), rounded up. row: the token that the head reads. hidden_norm: (N,).
    """

    body: ChainExpansion
    start: Tensor
    rows: Tensor | None
    bias: Tensor | None
    margin: Tensor
    pairs: Tensor
    row: int
    hidden_norm: Tensor
    largest_row: float
    largest_bias: float
    head_sigma: float
    context: Context
    threat: Threat

    def first_radius(self, epsilon: Tensor) -> Tensor:
        """Radii before the first layer (…, N, T) for ε (…, N)."""
        tokens = self.start.shape[1]
        if isinstance(self.threat, WeightBall):
            return torch.zeros(*epsilon.shape, tokens, dtype=epsilon.dtype, device=epsilon.device)
        if isinstance(self.threat, EmbeddingBall):
            where = torch.zeros(tokens, dtype=epsilon.dtype, device=epsilon.device)
            where[self.threat.positions(tokens)] = 1.0
            return epsilon.unsqueeze(-1) * where
        return epsilon.unsqueeze(-1).expand(*epsilon.shape, tokens)

    def weight_radius(self, epsilon: Tensor) -> Tensor | None:
        """The weight radius at ε (…, N) under a weight threat, None otherwise."""
        return epsilon if isinstance(self.threat, WeightBall) else None

    def bounds_at(self, epsilon: Tensor, remainder: bool = True) -> OutputBounds:
        """The bounds of the change before the head at ε (…, N), with the bounds of all layers."""
        return self.body.advance(Ball.of(self.first_radius(epsilon), self.weight_radius(epsilon)), remainder)

    def hidden(self, epsilon: Tensor) -> Tensor:
        """A bound (…, N) of the change of the last hidden state, that of the token that the head reads."""
        return self.bounds_at(epsilon, remainder=False).radius[..., self.row]

    def head_change(self, epsilon: Tensor) -> Tensor | float:
        """‖E‖₂ of the head under a weight threat at ε (…, N)."""
        return replace(self.context, weight_radius=self.weight_radius(epsilon)).weight_change(self.head_sigma)

    def by_norms(self, hidden: Tensor, epsilon: Tensor) -> Tensor:
        """A bound (N, C) of the decrease of each margin at ε (N,), for a hidden state within `hidden` of the reference and unchanged weights."""
        return up(self.pairs * hidden.unsqueeze(-1)) + 2 * self.logit_error(hidden, epsilon).unsqueeze(-1)

    def logit_error(self, hidden: Tensor, epsilon: Tensor) -> Tensor:
        """A bound (…, N) of the execution error of one logit in the head at ε, for a hidden state within `hidden` of the reference."""
        if self.rows is None:
            return torch.zeros_like(hidden)
        width, row, reach = self.rows.shape[1], self.largest_row + self.head_change(epsilon), self.hidden_norm + hidden
        scope = Scope(self.context)
        lost = scope.both(lambda arithmetic: row_error(row, self.largest_bias, reach, width, arithmetic))
        return scope.infinite_if_overflow(up(lost), row * reach + self.largest_bias)


def double_copy(model: Chain, context: Context) -> Chain:
    """A copy of the model in float64 (which represents its weights exactly), cached as long as the weights do not change."""

    def make() -> Chain:
        twin = copy.deepcopy(model).double()
        context.share_constants(model, twin)
        return twin

    return context.constant(model, "double", make)  # type: ignore[no-any-return]


def distances_of(model: Chain, context: Context) -> Distances:
    """The ℓ2 distances of the head's rows, shared with method 'global'."""
    head = head_of(model)
    assert head is not None
    return context.constant(head, "distances-l2", lambda: Distances(head.weight.detach(), "l2"))  # type: ignore[no-any-return]


def reference_of(model: Chain, x: Tensor, y: Tensor, threat: Threat, context: Context) -> Reference:
    """The part of the computation that does not depend on the radius. x: inputs (N, …) in the certified dtype, y (N,), both on the model's device."""
    _, inside, _ = layers_after_threat(model, x, threat)
    twin = double_copy(model, context)
    layers = list(twin)[model.embedding_depth :] if isinstance(threat, EmbeddingBall) else list(twin)
    head = head_of(twin)
    space, whole = "l2", None
    if inside.is_floating_point():
        start = inside.double()
        if not isinstance(threat, EmbeddingBall):
            space = threat.space
            whole = tuple(start.shape[1:]) if start.dim() > 2 else None
            start = start.flatten(1).unsqueeze(1)
    else:
        start = inside
    body = ChainExpansion(layers[:-1] if head is not None else layers, start, Scope(context, space, whole))
    if body.space != "l2":
        # No layer mixed coordinates: the hidden state is the input, and the distances of the head's rows are in ℓ2.
        body = body.then(ToL2(body.clean, body.space))
    row = 0 if model.position is None else model.position
    last = body.clean[:, row]
    if head is None:
        rows = bias = None
        logits = two_logits(last)
        pairs = torch.full_like(logits, 2**0.5 * (1 + 1e-15))
        largest_row, largest_bias, sigma = 0.0, 0.0, 0.0
    else:
        rows, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        logits = head(last)
        pairs = distances_of(model, context).of(y).to(y.device)
        largest_row = context.constant(head, "largest-row", lambda: float(norm_up(rows).amax()))
        largest_bias = 0.0 if bias is None else float(bias.abs().amax())
        sigma = float(context.constant(head, "matrix", lambda: Matrix.of(head.weight)).sigma)
    margin = margins(logits, y) - context.final_error
    return Reference(body, start, rows, bias, margin, pairs, row, norm_up(last), largest_row, largest_bias, sigma, context, threat)


def search(decreases: Callable[[Tensor], Tensor], margin: Tensor, start: Tensor, tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor]:
    """(radius (N,), largest used fraction of a margin there): the largest ε found with decreases(ε) (N, C) < margin for all rivals.

    `largest_radius` needs a change that starts at 0, so the decrease at radius 0 (rounding errors alone) is subtracted from the margins first.
    Feasibility of ε is decided by the decreases themselves.
    """
    base = decreases(torch.zeros_like(start))
    available = margin - base

    def evaluate(epsilon: Tensor) -> tuple[Tensor, Tensor]:
        lost = decreases(epsilon)
        held = (lost < margin).all(-1)
        fraction = ((lost - base).clamp_min(0.0) / available.clamp_min(1e-300)).amax(-1)
        fraction = torch.where(held, fraction.clamp_max(1 - 1e-9), fraction.clamp_min(1.0))
        return fraction, torch.where((available > 0).all(-1), torch.ones_like(fraction), torch.zeros_like(fraction))

    return largest_radius(evaluate, start, tolerance=tolerance)


def local_radii(model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context) -> tuple[Tensor, Tensor]:
    """(radius (N,), Lipschitz constant to the last hidden state on that ball (N,)), float64 on the CPU. Arguments as for global_radii."""
    if reason := local_why_not(model, threat):
        raise UnsupportedLayer(f"expected a model that the method covers, got one where {reason}; use method='best'")
    weights = isinstance(threat, WeightBall)
    reference = reference_of(model, x, y, threat, context)
    scale = torch.ones_like(reference.hidden_norm) if weights or not reference.start.is_floating_point() else norm_up(reference.start).amax(-1)

    def decreases(epsilon: Tensor) -> Tensor:
        hidden = reference.hidden(epsilon)
        # The change E of the head's weights changes a margin by ‖(e_y − e_j)ᵀE h‖ ≤ √2‖E‖‖h‖.
        own = 2**0.5 * (1 + 1e-15) * reference.head_change(epsilon) * (reference.hidden_norm + hidden)
        return up(reference.pairs * hidden.unsqueeze(-1) + own.unsqueeze(-1)) + 2 * reference.logit_error(hidden, epsilon).unsqueeze(-1)

    radius, _ = search(decreases, reference.margin, 1e-6 * scale.clamp_min(1e-3))
    bound = torch.where(radius > 0, reference.hidden(radius) / radius, torch.full_like(radius, torch.nan))
    return radius.cpu(), bound.cpu()
