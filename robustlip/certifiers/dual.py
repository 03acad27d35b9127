"""method='dual': the margin's change to first order exactly, what is beyond it bounded and weighted by adjoints. MATH.md section 7.

    margin' − margin = ⟨g⁰, δ⟩ + Σ_l ⟨g^{l+1}, R_l⟩        (robustlip.local.base)

The first term is at most ε times a dual norm of the gradient g⁰; the others are small where the network is nearly linear on the ball. Nothing
multiplies norms of layers, so depth costs little. Rivals are taken a few at a time, nearest first by the local bound; one is left out only when the
local bound at the radius that is claimed proves it harmless.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustlip.certifiers.local import Reference, local_applies, reference_of, search
from robustlip.errors import UnsupportedLayer
from robustlip.layers import Chain
from robustlip.local import loss
from robustlip.rounding import up
from robustlip.rules import Context
from robustlip.threats import EmbeddingBall, InputBall, Threat, WeightBall

# Rivals whose adjoints are carried at once.
RIVALS = 4


def dual_applies(model: Chain, threat: Threat) -> str:
    """'' when the method covers the model and the threat, otherwise the sentence that says why not."""
    if isinstance(threat, WeightBall):
        return "method 'dual' has no first order in the weights yet"
    return local_applies(model, threat).replace("'local'", "'dual'")


def first_order(g: Tensor, threat: Threat) -> Tensor:
    """The largest ⟨g, δ⟩ over the unit ball of the threat: g (A, N, T, D) → (A, N), rounded up."""
    if isinstance(threat, InputBall):
        order = {"l2": 2.0, "linf": 1.0, "l1": torch.inf}[threat.norm]
        return up(torch.linalg.vector_norm(g.flatten(2), ord=order, dim=-1) * (1 + 1e-12))
    assert isinstance(threat, EmbeddingBall)
    chosen = g[..., threat.positions(g.shape[-2]), :]
    if threat.joint:
        return up(torch.linalg.vector_norm(chosen.flatten(2), dim=-1) * (1 + 1e-12))
    return up(torch.linalg.vector_norm(chosen, dim=-1).sum(-1) * (1 + 1e-12))


class Rivals:
    """The adjoints of some rivals of every sample: their first-order terms and weights, free of the radius."""

    def __init__(self, reference: Reference, y: Tensor, rivals: Tensor) -> None:
        """rivals: (A, N) class numbers; the label itself where a sample has no further rival."""
        self.rivals = rivals
        if reference.rows is None:
            eye = torch.eye(reference.margin.shape[1], dtype=torch.float64, device=y.device)
            direction = eye[y] - eye[rivals]
        else:
            direction = reference.rows[y] - reference.rows[rivals]  # (A, N, D)
        tokens = reference.body.clean.shape[1]
        g = torch.zeros(*rivals.shape, tokens, direction.shape[-1], dtype=torch.float64, device=y.device)
        g[:, :, reference.row] = direction
        g, self.weights = reference.body.adjoint(g)
        self.linear = first_order(g, reference.threat)
        self.margin = reference.margin.gather(1, rivals.T)  # (N, A)

    def losses(self, reference: Reference, epsilon: Tensor) -> Tensor:
        """What each of these margins can lose at ε (N,): (N, A)."""
        bounds: list[Tensor] = []
        hidden = reference.hidden(epsilon, bounds)
        total = self.linear * epsilon + loss(self.weights, bounds)
        # The head's rows are exact and their difference is rounded once per entry: 2⁻⁵⁰ of the row times the change covers that.
        total = total + 2.0**-50 * 2 * reference.largest_row * hidden + 2 * reference.single(hidden)
        return up(total.T * (1 + 1e-9))


def dual_radii(model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context) -> tuple[Tensor, Tensor]:
    """(radius (N,), NaN: the method has no Lipschitz constant), float64 on the CPU. Signature as global_radii."""
    if reason := dual_applies(model, threat):
        raise UnsupportedLayer(f"expected a model and threat that the method covers, got one where {reason}; use method='best'")
    reference = reference_of(model, x, y, threat, context)
    radius = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    todo = (reference.margin > 0).all(-1).nonzero()[:, 0]
    if len(todo) < len(y):
        if len(todo):
            radius[todo] = _radii(reference_of(model, x[todo], y[todo], threat, context), model, x[todo], y[todo], threat, context)
    else:
        radius = _radii(reference, model, x, y, threat, context)
    return radius.cpu(), torch.full_like(radius, torch.nan).cpu()


def _radii(reference: Reference, model: Chain, x: Tensor, y: Tensor, threat: Threat, context: Context) -> Tensor:
    classes = reference.margin.shape[1]
    order = (reference.margin / reference.pairs.clamp_min(1e-300)).argsort(-1)[:, : classes - 1]  # the label, at +inf, comes last
    start = 1e-6 * reference.start.abs().amax((-1, -2)).clamp_min(1e-3)
    count = min(RIVALS, classes - 1)
    done = torch.zeros_like(reference.margin, dtype=torch.bool).scatter(1, y[:, None], True)
    first = order[:, :count].T
    rivals = Rivals(reference, y, first)
    radius, _ = search(lambda epsilon: rivals.losses(reference, epsilon), rivals.margin, start)
    done.scatter_(1, first.T, True)
    while True:
        hidden = reference.hidden(radius, [])
        harmless = up(reference.pairs * hidden.unsqueeze(-1)) + 2 * reference.single(hidden).unsqueeze(-1) < reference.margin
        open_ = ~harmless & ~done & (radius > 0)[:, None]
        if not bool(open_.any()):
            return radius
        samples = open_.any(-1).nonzero()[:, 0]
        part = reference if len(samples) == len(y) else reference_of(model, x[samples], y[samples], threat, context)
        # The nearest open rivals of each; where fewer are open, one that is done already fills the place and changes nothing.
        rank = torch.where(open_[samples], reference.margin[samples] / reference.pairs[samples].clamp_min(1e-300), torch.inf)
        more = rank.argsort(-1)[:, :count].T
        found = Rivals(part, y[samples], more)
        before = radius[samples]
        losses = found.losses(part, before)
        kept = ((losses < found.margin) | ~open_[samples].gather(1, more.T)).all(-1)
        if not bool(kept.all()):
            shorter, _ = search(lambda epsilon: found.losses(part, epsilon), found.margin, start[samples])
            radius[samples] = torch.where(kept, before, torch.minimum(before, shorter))
        done[samples] = done[samples].scatter(1, more.T, True)
