"""method='dual': the margin's change to first order exactly, what is beyond it bounded and weighted by adjoints. docs/theory.md, section 8.

    margin' − margin = ⟨g⁰, δ⟩ + Σ_l ⟨g^{l+1}, R_l⟩        (robustlip.domains.expansion.base)

The first term is at most ε times a dual norm of the gradient g⁰; the others are small where the network is nearly linear on the ball. Nothing
multiplies norms of layers, so depth costs little. Rivals are taken a few at a time, nearest first by the local bound; one is left out only when the
local bound at the radius that is claimed proves it harmless.

Where only the last token of a causal model moves, no other token does but by rounding: then the network is one of single tokens
(`expansion.attention.AttentionRow`), hundreds of rivals are affordable at once, and so are exact Jacobians for the radii (`expansion.jacobian`). They
also set rivals of large vocabularies aside: with J the Jacobian of the hidden state h and e ≥ ‖what is not linear in its change‖,
⟨u_y − u_j, Δh⟩ ≥ −ε‖Jᵀ(u_y − u_j)‖ − ‖u_y − u_j‖e.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from robustlip.domains.expansion import Group, JacobianChain, Pair, loss, picked, vanished
from robustlip.domains.expansion.local import Reference, local_why_not, reference_of, search
from robustlip.domains.expansion.sorting import REFLECTIONS
from robustlip.domains.norms import Context
from robustlip.domains.norms.elementwise import DROPOUTS
from robustlip.domains.search import TOLERANCE
from robustlip.errors import UnsupportedLayer
from robustlip.geometry import largest
from robustlip.layers import (
    AddPositions,
    Attention,
    Chain,
    Channels,
    Concatenate,
    Maximum,
    Minimum,
    Normalize,
    Product,
    Residual,
    Scale,
    Shift,
    Sum,
    WrittenNorm,
)
from robustlip.numerics.rounding import U64, chunk_numbers, gamma, norm_up, up
from robustlip.ops import is_elementwise
from robustlip.threats import EmbeddingBall, Threat, WeightBall

# Rivals whose adjoints are carried at once. Of single tokens all at once, where they are no more than EVERY; else ALONE, if ROOM has so many numbers
# of them. MOST: rivals of a sample that get adjoints at all, of networks of many tokens and of single ones: the rest is judged by norms.
RIVALS, EVERY, ALONE, ROOM = 4, 512, 128, 2**26
MOST, MOST_ALONE = 512, 8192
# Rivals whose quadratic forms are made, where forms gain percents and where they gain factors; what neurons have to take of a margin for that.
SHARPENED, SHARPENED_FAR, WORTH = 3, 4, 0.05
# How far beyond the radius that is known by then, and how well that is to be known (a bracket's width), round by round. A second round gains 1 %.
Reaches = tuple[tuple[float, float], ...]
REACHES: Reaches = ((1.25, 0.02),)
# Of kinks, whose bounds number by number say little.
FAR: Reaches = ((4.0, 0.05), (2.0, 0.05), (1.25, 0.02))


def dual_why_not(model: Chain, threat: Threat) -> str:
    """'' when the method covers the model and the threat, otherwise the sentence that says why not."""
    if isinstance(threat, WeightBall):
        return "method 'dual' has no first order in the weights yet"
    return local_why_not(model, threat).replace("'local'", "'dual'")


def first_order(g: Tensor, threat: Threat) -> Tensor:
    """The largest ⟨g, δ⟩ over the unit ball of the threat: g (A, N, T, D) → (A, N), rounded up."""
    return up(largest(g, threat, keep=2) * (1 + 1e-12))


@dataclass(frozen=True)
class Rivals:
    """The adjoints of some rivals of every sample: their first-order terms and weights, free of the radius.

    linear: (A, N) the largest first-order change per unit of ε. weights: (A, N, ·), in the order of the bounds. margin: (N, A).
    """

    linear: Tensor
    weights: list[Pair]
    margin: Tensor

    @classmethod
    def of(cls, reference: Reference, y: Tensor, rivals: Tensor) -> Rivals:
        """rivals: (A, N) class numbers; the label itself where a sample has no further rival."""
        if reference.rows is None:
            eye = torch.eye(reference.margin.shape[1], dtype=torch.float64, device=y.device)
            eye = eye[:, -reference.body.clean.shape[-1] :]  # of one logit z, the logits are 0 and z
            direction = eye[y] - eye[rivals]
        else:
            direction = reference.rows[y] - reference.rows[rivals]  # (A, N, D)
        tokens = reference.body.clean.shape[1]
        g = torch.zeros(*rivals.shape, tokens, direction.shape[-1], dtype=torch.float64, device=y.device)
        g[:, :, reference.row] = direction
        g, weights = reference.body.adjoint(g)
        return cls(first_order(g, reference.threat), weights, reference.margin.gather(1, rivals.T))

    def numbers(self) -> int:
        """How many it keeps."""
        kept = [[w] if isinstance(w, Tensor) else [t for t in vars(w).values() if isinstance(t, Tensor)] for w in self.weights]
        return sum(t.numel() for tensors in kept for t in tensors)

    @property
    def far(self) -> bool:
        """Whether forms gain factors here."""
        return any(isinstance(weight, Group) and weight.far for weight in self.weights)

    def losses(self, reference: Reference, epsilon: Tensor) -> Tensor:
        """What each of these margins can lose at ε (N,): (N, A)."""
        behind = reference.behind(epsilon)
        hidden = behind.radius[..., reference.row]
        total = loss(self.linear * epsilon, self.weights, behind.bounds)
        # The head's rows are exact and their difference is rounded once per entry: 2⁻⁵⁰ of the rows times the change covers that.
        total = total + 2.0**-50 * 2 * reference.largest_row * hidden + 2 * reference.single(hidden, epsilon)
        return up((total + vanished(behind.bounds, epsilon + hidden)).T * (1 + 1e-9))

    def contested(self, reference: Reference, epsilon: Tensor) -> Rivals:
        """The rivals not yet excluded at ε (N,), as many of each sample: the others lose there by what is proved, and so within every smaller ε."""
        spare = torch.nan_to_num(self.margin - self.losses(reference, epsilon), nan=-torch.inf)  # (N, A)
        most = max(1, int((~(spare > 0)).sum(-1).max()))
        chosen = spare.topk(most, dim=-1, largest=False).indices.T
        return Rivals(self.linear.gather(0, chosen), picked(self.weights, chosen), self.margin.gather(1, chosen.T))

    def sharpened(self, reference: Reference, epsilon: Tensor) -> Rivals:
        """With the quadratic forms of neurons at the token that is read, of the few that come nearest to winning at ε (N,), up to there."""
        bounds = reference.behind(epsilon).bounds
        spare = torch.nan_to_num(self.margin.T - loss(self.linear * epsilon, self.weights, bounds), nan=-torch.inf)
        count = SHARPENED_FAR if self.far else SHARPENED
        chosen = spare.topk(min(count, len(spare)), dim=0, largest=False).indices

        def formed(weight: Pair, bound: Pair) -> Pair:
            if not isinstance(weight, Group) or not isinstance(bound, Group) or bound.matrix is None:
                return weight
            share = (weight.meet(bound) / self.margin.T).gather(0, chosen)
            return weight.formed(bound, chosen, reference.row, share > WORTH)

        return replace(self, weights=[formed(weight, bound) for weight, bound in zip(self.weights, bounds, strict=True)])


# Token by token, or made of layers that are looked at by themselves. All others may mix tokens.
_BY_TOKEN = (
    nn.Embedding, AddPositions, nn.Linear, WrittenNorm, Normalize, Residual, Sum, Concatenate, Channels, Scale,
    Shift, Product, Maximum, Minimum, nn.Sequential, nn.Identity,
    *DROPOUTS, *REFLECTIONS,
)  # fmt: skip


def is_causal(model: Chain) -> bool:
    """Whether every logit of a next-token model depends on the tokens up to its own alone: attention has to be causal, other layers act by token."""
    layers = [m for layer in model for m in layer.modules()]

    def alone(m: nn.Module) -> bool:
        if type(m) in (nn.LayerNorm, nn.RMSNorm):
            return len(m.normalized_shape) == 1  # type: ignore[arg-type]
        return type(m) in _BY_TOKEN or is_elementwise(m)

    return model.task == "next-token" and all(m.looks_back if type(m) is Attention else alone(m) for m in layers)


def moves_alone(model: Chain, threat: Threat, tokens: int) -> bool:
    """Whether the threat is of the last token of a causal next-token model: then the other tokens move by rounding only."""
    return isinstance(threat, EmbeddingBall) and threat.positions(tokens) == [tokens - 1] and is_causal(model)


def at_positions(reference: Reference, sample: Tensor, position: Tensor, *, jacobians: bool = True) -> Reference:
    """The reference of M single tokens, each the last of its own prefix: sample[m] of the batch, position[m] (M,), reading there what follows.

    margin, pairs and hidden_norm are those of the batch's last tokens: a caller that reads other positions replaces what it uses of them.
    jacobians: whether radii between layers go through exact Jacobian blocks too, where the widths allow it.
    """
    still = reference.first_radius(torch.zeros(len(reference.start), dtype=torch.float64, device=reference.start.device))
    body = reference.body.at_rows(sample, position, still)
    if jacobians and body.parts and all(part.clean.shape[-1] == reference.start.shape[-1] for part in body.parts):
        body = JacobianChain(body)
    return replace(
        reference, body=body, start=reference.start[sample, position].unsqueeze(1), row=0, threat=EmbeddingBall(reference.threat.radius),
        margin=reference.margin[sample], pairs=reference.pairs[sample], hidden_norm=reference.hidden_norm[sample],
    )  # fmt: skip


def dual_radii(model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context) -> tuple[Tensor, Tensor]:
    """(radius (N,), NaN: the method has no Lipschitz constant), float64 on the CPU. Signature as global_radii."""
    if reason := dual_why_not(model, threat):
        raise UnsupportedLayer(f"expected a model and threat that the method covers, got one where {reason}; use method='best'")
    radius = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    todo = ((logits.argmax(-1) == y) & torch.isfinite(logits).all(-1)).nonzero()[:, 0]
    if len(todo):
        xs, ys = x[todo], y[todo]
        reference = reference_of(model, xs, ys, threat, context)
        if moves_alone(model, threat, reference.start.shape[1]):
            last = torch.full_like(ys, reference.start.shape[1] - 1)

            def at_last(samples: Tensor) -> Reference:
                return at_positions(reference, samples, last[samples])

            found = alone(at_last(torch.arange(len(ys), device=y.device)), at_last, ys)
        else:
            found = _radii(reference, lambda samples: reference_of(model, xs[samples], ys[samples], threat, context), ys, RIVALS, MOST)
        radius[todo] = torch.where((reference.margin > 0).all(-1), found, 0.0)
    return radius.cpu(), torch.full_like(radius, torch.nan).cpu()


def _start(reference: Reference) -> Tensor:
    """Where the search of radii begins: far below any answer."""
    return 1e-6 * reference.start.abs().amax((-1, -2)).clamp_min(1e-3)


def _longest(reference: Reference, rivals: Rivals, start: Tensor, reaches: Reaches | None = None) -> Tensor:
    """Radii (N,) at which these rivals lose, then again a reach further with the quadratic forms of those that stood in the way, reach by reach."""
    reaches = (FAR if rivals.far else REACHES) if reaches is None else reaches

    def longest(rivals: Rivals, limit: Tensor, start: Tensor, tolerance: float) -> Tensor:
        def losses(epsilon: Tensor) -> Tensor:
            return torch.where((epsilon <= limit)[:, None], rivals.losses(reference, epsilon), torch.inf)

        return search(losses, rivals.margin, start, tolerance)[0]

    limit = torch.full_like(start, torch.inf)
    tolerances = [*(tolerance for _, tolerance in reaches), TOLERANCE]
    radius = longest(rivals, limit, start, tolerances[0])
    for (reach, _), tolerance in zip(reaches, tolerances[1:], strict=True):
        limit = torch.minimum(limit, reach * radius)
        rivals = rivals.contested(reference, limit).sharpened(reference, limit)
        radius = torch.maximum(radius, longest(rivals, limit, torch.where(radius > 0, radius, start), tolerance))
    return radius


def alone(reference: Reference, again: Callable[[Tensor], Reference], y: Tensor, *, sharpen: bool = True) -> Tensor:
    """Radii (N,) of single tokens: all rivals at once, or of large vocabularies some. again: the reference of these samples alone."""
    order = reference.margin.argsort(-1)[:, :-1]  # the label, at +inf, comes last
    if order.shape[1] <= EVERY:
        return _longest(reference, Rivals.of(reference, y, order.T), _start(reference), None if sharpen else ())
    each = Rivals.of(reference, y, order[:, :1].T).numbers()
    return _radii(reference, again, y, max(RIVALS, min(ALONE, ROOM // each)), MOST_ALONE if sharpen else MOST, sharpen)


@dataclass(frozen=True)
class Aside:
    """What sets rivals aside without an adjoint: norms, and of single tokens their first order by the Jacobian. linear: (N, C) ≥ ‖Jᵀ(u_y − u_j)‖."""

    reference: Reference
    linear: Tensor | None

    @classmethod
    def of(cls, reference: Reference, y: Tensor) -> Aside:
        body, rows = reference.body, reference.rows
        if not isinstance(body, JacobianChain) or rows is None or len(rows) <= EVERY:
            return cls(reference, None)
        whole, lost = body.end_to_end()
        room = max(1, 8 * chunk_numbers(rows) // rows.shape[1])
        found = torch.empty_like(reference.margin)
        for i, jacobian in enumerate(whole):
            own, at = rows[y[i]] @ jacobian, 0
            for part in rows.split(room):
                found[i, at : at + len(part)] = norm_up(own - part @ jacobian)
                at += len(part)
        # Each product is off by γ of ‖u‖‖J‖_F, the difference once more by as little.
        rounded = 4 * gamma(rows.shape[1] + 4, U64) * reference.largest_row * torch.linalg.matrix_norm(whole)
        return cls(reference, up(found + reference.pairs * lost.unsqueeze(-1) + rounded.unsqueeze(-1)))

    def losses(self, epsilon: Tensor) -> Tensor:
        """What each margin can lose at ε (N,): (N, C)."""
        reference = self.reference
        if self.linear is None:
            return reference.by_norms(reference.hidden(epsilon), epsilon)
        behind = reference.behind(epsilon)
        hidden, beyond = behind.radius[..., reference.row], behind.error[..., reference.row]
        first = up(self.linear * epsilon.unsqueeze(-1) + reference.pairs * beyond.unsqueeze(-1))
        return torch.fmin(reference.by_norms(hidden, epsilon), first + 2 * reference.single(hidden, epsilon).unsqueeze(-1))

    def order(self) -> Tensor:
        """(N, C): what rivals are taken by, the nearest first."""
        return self.reference.margin / (self.reference.pairs if self.linear is None else self.linear).clamp_min(1e-300)


def _radii(reference: Reference, again: Callable[[Tensor], Reference], y: Tensor, count: int, most: int, sharpen: bool = True) -> Tensor:
    """Radii (N,) with the adjoints of `count` rivals at a time, at most about `most` of a sample. again: the reference of these samples alone."""
    classes = reference.margin.shape[1]
    aside = Aside.of(reference, y)
    nearest = aside.order()
    start = _start(reference)
    count = min(count, classes - 1)
    # The label, at +inf, comes last.
    first = (nearest.argsort(-1)[:, :count] if classes <= EVERY else nearest.topk(count, largest=False).indices).T
    done = torch.zeros_like(reference.margin, dtype=torch.bool).scatter(1, y[:, None], True).scatter(1, first.T, True)
    radius = _longest(reference, Rivals.of(reference, y, first), start, None if sharpen else ())
    taken = count
    while True:
        open_ = ~(aside.losses(radius) < reference.margin) & ~done & (radius > 0)[:, None]
        if not bool(open_.any()):
            return radius
        if taken >= most:
            # Norms alone hold within a smaller ball.
            def lost(epsilon: Tensor, left: Tensor = open_) -> Tensor:
                return torch.where(left, aside.losses(epsilon), 0.0)

            smaller, _ = search(lost, reference.margin, start)
            return torch.where(open_.any(-1), torch.minimum(radius, smaller), radius)
        samples = open_.any(-1).nonzero()[:, 0]
        part = reference if len(samples) == len(y) else again(samples)
        # The nearest open rivals of each; where fewer are open, one that is done already fills the place and changes nothing.
        rank = torch.where(open_[samples], nearest[samples], torch.inf)
        more = (rank.argsort(-1)[:, :count] if classes <= EVERY else rank.topk(count, largest=False).indices).T
        taken += count
        settled = ~open_[samples].gather(1, more.T)
        found = Rivals.of(part, y[samples], more)
        before = radius[samples]
        kept = ((found.losses(part, before) < found.margin) | settled).all(-1)
        if not bool(kept.all()) and sharpen:
            found = found.sharpened(part, before)
            kept = ((found.losses(part, before) < found.margin) | settled).all(-1)
        if not bool(kept.all()):
            # A ball that was proved against the rivals that are done holds every smaller one.
            shorter, _ = search(partial(found.losses, part), found.margin, start[samples])
            radius = radius.index_put((samples,), torch.where(kept, before, torch.minimum(before, shorter)))
        done = done.index_put((samples,), done[samples].scatter(1, more.T, True))
