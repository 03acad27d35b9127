"""method='local': radii carried through the clean activations of the sample. docs/theory.md, section 7.

Every bound is taken where the sample is, not over the whole domain: slopes of activations on the interval that each neuron can reach, softmax
weights that can only move so far, layer norms on the ball around each token. The perturbation and the rounding of execution travel together in
one radius, so rounding is amplified by local constants too, not by the global ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustlip.domains.expansion import Ball, Behind, ChainExpansion, Scope, ToL2, unsupported
from robustlip.domains.margins import Distances, head_of, margins
from robustlip.domains.norms import Context
from robustlip.domains.norms.bound import entry
from robustlip.domains.search import TOLERANCE, largest_radius
from robustlip.errors import UnsupportedLayer
from robustlip.layers import Chain, two_logits
from robustlip.numerics.rounding import norm_up, up
from robustlip.ops.affine import Matrix, row_error
from robustlip.threats import EmbeddingBall, Threat, WeightBall


def local_why_not(model: Chain, threat: Threat) -> str:
    """'' when every layer behind the threat has a local expansion, otherwise the sentence that says which has none."""
    inner = [m for layer in model for m in layer.modules() if not isinstance(m, Chain)]
    # Matrices inside attention and residual branches are found by modules() too; what attention reads itself is expanded with it.
    names = sorted({unsupported(m) for m in inner if unsupported(m)})
    if names:
        return f"method 'local' has no expansion of {', '.join(names)}"
    return ""


@dataclass(frozen=True)
class Reference:
    """A batch at its float64 reference: the expansion of all layers in front of the head, and what the head adds.

    rows: (C, D) of the head, None for a model without one (its last activations are the logits). margin: (N, C) of the reference logits,
    +inf for the label itself. pairs: ‖u_y − u_j‖₂ (N, C), rounded up.
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
        """ε (…, N) → radii in front of the first layer (…, N, T)."""
        tokens = self.start.shape[1]
        if isinstance(self.threat, WeightBall):
            return torch.zeros(*epsilon.shape, tokens, dtype=epsilon.dtype, device=epsilon.device)
        if isinstance(self.threat, EmbeddingBall):
            where = torch.zeros(tokens, dtype=epsilon.dtype, device=epsilon.device)
            where[self.threat.positions(tokens)] = 1.0
            return epsilon.unsqueeze(-1) * where
        return epsilon.unsqueeze(-1).expand(*epsilon.shape, tokens)

    def weight_radius(self, epsilon: Tensor) -> Tensor | None:
        """The radius of a weight threat at ε (…, N), None where weights stay as they are."""
        return epsilon if isinstance(self.threat, WeightBall) else None

    def behind(self, epsilon: Tensor, remainder: bool = True) -> Behind:
        """What ε (…, N) does in front of the head, with the bounds of all layers on the way."""
        return self.body.advance(Ball.of(self.first_radius(epsilon), self.weight_radius(epsilon)), remainder)

    def hidden(self, epsilon: Tensor) -> Tensor:
        """The radius in front of the head, of the token that is read (…, N)."""
        return self.behind(epsilon, remainder=False).radius[..., self.row]

    def head_change(self, epsilon: Tensor) -> Tensor | float:
        """‖E‖₂ of the head under a weight threat at ε (…, N)."""
        return replace(self.context, weight_radius=self.weight_radius(epsilon)).weight_change(self.head_sigma)

    def by_norms(self, hidden: Tensor, epsilon: Tensor) -> Tensor:
        """What any margin (N, C) can lose at ε (N,) for a hidden state within `hidden` of the reference, weights as they are."""
        return up(self.pairs * hidden.unsqueeze(-1)) + 2 * self.single(hidden, epsilon).unsqueeze(-1)

    def single(self, hidden: Tensor, epsilon: Tensor) -> Tensor:
        """What executing the head can lose on one logit (…, N) at ε, for a hidden state within `hidden` of the reference."""
        if self.rows is None:
            return torch.zeros_like(hidden)
        width, row, reach = self.rows.shape[1], self.largest_row + self.head_change(epsilon), self.hidden_norm + hidden
        scope = Scope(self.context)
        lost = scope.both(lambda arithmetic: row_error(row, self.largest_bias, reach, width, arithmetic))
        return scope.infinite_if_overflow(up(lost), row * reach + self.largest_bias)


def double_copy(model: Chain, context: Context) -> Chain:
    """The model in float64, made once for given weights: the same numbers, since float64 holds all of them."""

    def make() -> Chain:
        twin = copy.deepcopy(model).double()
        context.twins(model, twin)
        return twin

    return context.constant(model, "double", make)  # type: ignore[no-any-return]


def distances_of(model: Chain, context: Context) -> Distances:
    """Of the rows of the head, in ℓ2: those of method 'global'."""
    head = head_of(model)
    assert head is not None
    return context.constant(head, "distances-l2", lambda: Distances(head.weight.detach(), "l2"))  # type: ignore[no-any-return]


def reference_of(model: Chain, x: Tensor, y: Tensor, threat: Threat, context: Context) -> Reference:
    """Everything of a batch that does not depend on the radius. x: inputs (N, …) in the covered dtype, y (N,), both on the model's device."""
    _, inside, _ = entry(model, x, threat)
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
        # No layer mixed coordinates: the hidden state is the input, and the head's rows are measured in ℓ2.
        body = body.then(ToL2(body.clean, body.space))
    row = -1 if model.task == "next-token" else 0
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


def search(losses: Callable[[Tensor], Tensor], margin: Tensor, start: Tensor, tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor]:
    """(radius (N,), the largest fraction of a margin lost there): the largest ε found at which losses(ε) (N, C) < margin for all rivals.

    The search wants a change that starts at 0: what is lost at radius 0, by rounding alone, is taken off the margins first. Whether an ε is
    feasible is decided by the losses themselves.
    """
    base = losses(torch.zeros_like(start))
    room = margin - base

    def evaluate(epsilon: Tensor) -> tuple[Tensor, Tensor]:
        lost = losses(epsilon)
        held = (lost < margin).all(-1)
        fraction = ((lost - base).clamp_min(0.0) / room.clamp_min(1e-300)).amax(-1)
        fraction = torch.where(held, fraction.clamp_max(1 - 1e-9), fraction.clamp_min(1.0))
        return fraction, torch.where((room > 0).all(-1), torch.ones_like(fraction), torch.zeros_like(fraction))

    return largest_radius(evaluate, start, tolerance=tolerance)


def local_radii(model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context) -> tuple[Tensor, Tensor]:
    """(radius (N,), Lipschitz bound to the last hidden state on that ball (N,)), float64 on the CPU. Signature as global_radii."""
    if reason := local_why_not(model, threat):
        raise UnsupportedLayer(f"expected a model that the method covers, got one where {reason}; use method='best'")
    weights = isinstance(threat, WeightBall)
    reference = reference_of(model, x, y, threat, context)
    scale = torch.ones_like(reference.hidden_norm) if weights or not reference.start.is_floating_point() else norm_up(reference.start).amax(-1)

    def losses(epsilon: Tensor) -> Tensor:
        hidden = reference.hidden(epsilon)
        # The head's own change moves a pair of logits by ‖(e_y − e_j)ᵀE h‖ ≤ √2‖E‖‖h‖.
        own = 2**0.5 * (1 + 1e-15) * reference.head_change(epsilon) * (reference.hidden_norm + hidden)
        return up(reference.pairs * hidden.unsqueeze(-1) + own.unsqueeze(-1)) + 2 * reference.single(hidden, epsilon).unsqueeze(-1)

    radius, _ = search(losses, reference.margin, 1e-6 * scale.clamp_min(1e-3))
    bound = torch.where(radius > 0, reference.hidden(radius) / radius, torch.full_like(radius, torch.nan))
    return radius.cpu(), bound.cpu()
