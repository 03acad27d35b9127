"""method='dual': the exact first-order change of the margin, with remainders bounded and weighted by adjoints. docs/theory.md, section 8.

    margin' − margin = ⟨g⁰, δ⟩ + Σ_l ⟨g^{l+1}, R_l⟩        (robustlip.domains.expansion.base)

The first term is at most ε times a dual norm of the gradient g⁰. The other terms are small where the network is nearly linear on the ball. No product
of all layers' norms occurs, so the bound does not deteriorate with depth. Rivals are processed a few at a time, in the order of their local bounds.
A rival is skipped only if its local bound at the claimed radius proves that it cannot win.

If only the last token of a causal model is perturbed, the other tokens change by rounding alone. The network is then one of single tokens
(`expansion.attention.AttentionRow`), which makes hundreds of rivals at once affordable, and exact Jacobians for the radii (`expansion.jacobian`).
For large vocabularies the Jacobian J of the hidden state h also excludes rivals: if e bounds the nonlinear part of Δh,
⟨u_y − u_j, Δh⟩ ≥ −ε‖Jᵀ(u_y − u_j)‖ − ‖u_y − u_j‖e.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from robustlip.domains.expansion import JacobianChain, JointBound, Term, decrease, selected, underflow_error
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

# RIVALS: rivals whose adjoints are computed at once. Of single tokens all rivals at once if there are at most ALL_RIVALS, else SINGLE_TOKEN_RIVALS,
# if their adjoints have at most STORED_NUMBERS entries. MOST_RIVALS, MOST_SINGLE_TOKEN_RIVALS: the most rivals of a sample that get adjoints, for
# networks of many tokens and of single tokens; the others are bounded by norms.
RIVALS, ALL_RIVALS, SINGLE_TOKEN_RIVALS, STORED_NUMBERS = 4, 512, 128, 2**26
MOST_RIVALS, MOST_SINGLE_TOKEN_RIVALS = 512, 8192
# Rivals that get quadratic forms: FORMS where forms gain a few percent, KINK_FORMS where they gain factors. A term gets a form only if it uses more
# than the fraction WORTHWHILE of the margin.
FORMS, KINK_FORMS, WORTHWHILE = 3, 4, 0.05
# For each further search with quadratic forms: (factor of the radius found so far up to which the forms are valid, tolerance of that radius). A
# second search gains 1 %.
Extensions = tuple[tuple[float, float], ...]
EXTENSIONS: Extensions = ((1.25, 0.02),)
# For kinks, whose bounds without forms are weak.
KINK_EXTENSIONS: Extensions = ((4.0, 0.05), (2.0, 0.05), (1.25, 0.02))


def dual_why_not(model: Chain, threat: Threat) -> str:
    """'' where the method applies, else one sentence with the reason."""
    if isinstance(threat, WeightBall):
        return "method 'dual' has no first order in the weights yet"
    return local_why_not(model, threat).replace("'local'", "'dual'")


def first_order(g: Tensor, threat: Threat) -> Tensor:
    """The largest ⟨g, δ⟩ over the threat's unit ball, for g (A, N, T, D): (A, N), rounded up."""
    return up(largest(g, threat, keep=2) * (1 + 1e-12))


@dataclass(frozen=True)
class Rivals:
    """The adjoints of some rivals of every sample: first-order terms and weights, independent of the radius.

    linear: (A, N), the largest first-order change per unit of ε. weights: (A, N, ·), in the order of the bounds. margin: (N, A).
    """

    linear: Tensor
    weights: list[Term]
    margin: Tensor

    @classmethod
    def of(cls, reference: Reference, y: Tensor, rivals: Tensor) -> Rivals:
        """rivals: (A, N) class numbers; the label itself where a sample has no further rival."""
        if reference.rows is None:
            eye = torch.eye(reference.margin.shape[1], dtype=torch.float64, device=y.device)
            eye = eye[:, -reference.body.clean.shape[-1] :]  # for one logit z the logits are (0, z)
            direction = eye[y] - eye[rivals]
        else:
            direction = reference.rows[y] - reference.rows[rivals]  # (A, N, D)
        tokens = reference.body.clean.shape[1]
        g = torch.zeros(*rivals.shape, tokens, direction.shape[-1], dtype=torch.float64, device=y.device)
        g[:, :, reference.row] = direction
        g, weights = reference.body.adjoint(g)
        return cls(first_order(g, reference.threat), weights, reference.margin.gather(1, rivals.T))

    def numbers(self) -> int:
        """The number of stored entries."""
        kept = [[w] if isinstance(w, Tensor) else [t for t in vars(w).values() if isinstance(t, Tensor)] for w in self.weights]
        return sum(t.numel() for tensors in kept for t in tensors)

    @property
    def forms_gain_factors(self) -> bool:
        """Whether quadratic forms improve some term by factors."""
        return any(isinstance(weight, JointBound) and weight.forms_gain_factors for weight in self.weights)

    def decreases(self, reference: Reference, epsilon: Tensor) -> Tensor:
        """Bounds (N, A) of the decrease of each of these margins at ε (N,)."""
        after = reference.bounds_at(epsilon)
        hidden = after.radius[..., reference.row]
        total = decrease(self.linear * epsilon, self.weights, after.bounds)
        # The head's rows are exact and their difference is rounded once per entry; 2⁻⁵⁰ times the rows times the change bounds this error.
        total = total + 2.0**-50 * 2 * reference.largest_row * hidden + 2 * reference.logit_error(hidden, epsilon)
        return up((total + underflow_error(after.bounds, epsilon + hidden)).T * (1 + 1e-9))

    def contested(self, reference: Reference, epsilon: Tensor) -> Rivals:
        """The rivals not yet excluded at ε (N,), the same number for each sample. The others cannot win at ε, and so not within any smaller ε."""
        spare = torch.nan_to_num(self.margin - self.decreases(reference, epsilon), nan=-torch.inf)  # (N, A)
        most = max(1, int((~(spare > 0)).sum(-1).max()))
        chosen = spare.topk(most, dim=-1, largest=False).indices.T
        return Rivals(self.linear.gather(0, chosen), selected(self.weights, chosen), self.margin.gather(1, chosen.T))

    def with_forms(self, reference: Reference, epsilon: Tensor) -> Rivals:
        """These rivals, with quadratic forms valid up to ε (N,) for the few rivals that are closest to winning there."""
        bounds = reference.bounds_at(epsilon).bounds
        spare = torch.nan_to_num(self.margin.T - decrease(self.linear * epsilon, self.weights, bounds), nan=-torch.inf)
        count = KINK_FORMS if self.forms_gain_factors else FORMS
        chosen = spare.topk(min(count, len(spare)), dim=0, largest=False).indices

        def sharpened(weight: Term, bound: Term) -> Term:
            if not isinstance(weight, JointBound) or not isinstance(bound, JointBound) or bound.matrix is None:
                return weight
            share = (weight.contract(bound) / self.margin.T).gather(0, chosen)
            return weight.with_forms(bound, chosen, reference.row, share > WORTHWHILE)

        return replace(self, weights=[sharpened(weight, bound) for weight, bound in zip(self.weights, bounds, strict=True)])


# Layers that act on each token separately, and containers, whose layers are checked one by one. All other layers may mix tokens.
_BY_TOKEN = (
    nn.Embedding, AddPositions, nn.Linear, WrittenNorm, Normalize, Residual, Sum, Concatenate, Channels, Scale,
    Shift, Product, Maximum, Minimum, nn.Sequential, nn.Identity,
    *DROPOUTS, *REFLECTIONS,
)  # fmt: skip


def is_causal(model: Chain) -> bool:
    """Whether the logits of each token depend only on the tokens up to it: attention has to be causal, all other layers act by token."""
    layers = [m for layer in model for m in layer.modules()]

    def alone(m: nn.Module) -> bool:
        if type(m) in (nn.LayerNorm, nn.RMSNorm):
            return len(m.normalized_shape) == 1  # type: ignore[arg-type]
        return type(m) in _BY_TOKEN or is_elementwise(m)

    return model.position is not None and all(m.looks_back if type(m) is Attention else alone(m) for m in layers)


def only_last_token_moves(model: Chain, threat: Threat, tokens: int) -> bool:
    """Whether the threat perturbs only the last token of a causal model that is read at this token; the other tokens then change by rounding only."""
    last = isinstance(threat, EmbeddingBall) and threat.positions(tokens) == [tokens - 1] and model.position in (-1, tokens - 1)
    return last and is_causal(model)


def single_token_reference(reference: Reference, sample: Tensor, position: Tensor, *, jacobians: bool = True) -> Reference:
    """The reference of M single tokens, each the last token of its prefix: token position[m] (M,) of sample sample[m]; the head reads this token.

    margin, pairs and hidden_norm are those of the batch's last tokens; a caller that reads other positions has to replace them.
    jacobians: whether radii also use exact Jacobian blocks, where all layers have one width.
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
    """(radius (N,), NaN (N,)), float64 on the CPU. Arguments as for global_radii. Raises UnsupportedLayer where the method does not apply."""
    if reason := dual_why_not(model, threat):
        raise UnsupportedLayer(f"expected a model and threat that the method covers, got one where {reason}; use method='best'")
    radius = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    todo = ((logits.argmax(-1) == y) & torch.isfinite(logits).all(-1)).nonzero()[:, 0]
    if len(todo):
        xs, ys = x[todo], y[todo]
        reference = reference_of(model, xs, ys, threat, context)
        if only_last_token_moves(model, threat, reference.start.shape[1]):
            last = torch.full_like(ys, reference.start.shape[1] - 1)

            def at_last(samples: Tensor) -> Reference:
                return single_token_reference(reference, samples, last[samples])

            found = single_token_radii(at_last(torch.arange(len(ys), device=y.device)), at_last, ys)
        else:
            found = _radii(reference, lambda samples: reference_of(model, xs[samples], ys[samples], threat, context), ys, RIVALS, MOST_RIVALS)
        radius[todo] = torch.where((reference.margin > 0).all(-1), found, 0.0)
    return radius.cpu(), torch.full_like(radius, torch.nan).cpu()


def _start(reference: Reference) -> Tensor:
    """The first radius of the search, far below any result."""
    return 1e-6 * reference.start.abs().amax((-1, -2)).clamp_min(1e-3)


def _largest_radii(reference: Reference, rivals: Rivals, start: Tensor, extensions: Extensions | None = None) -> Tensor:
    """The largest radii (N,) proved against these rivals; then searched again, further out, with quadratic forms of the rivals that limited them."""
    extensions = (KINK_EXTENSIONS if rivals.forms_gain_factors else EXTENSIONS) if extensions is None else extensions

    def longest(rivals: Rivals, limit: Tensor, start: Tensor, tolerance: float) -> Tensor:
        def decreases(epsilon: Tensor) -> Tensor:
            return torch.where((epsilon <= limit)[:, None], rivals.decreases(reference, epsilon), torch.inf)

        return search(decreases, rivals.margin, start, tolerance)[0]

    limit = torch.full_like(start, torch.inf)
    tolerances = [*(tolerance for _, tolerance in extensions), TOLERANCE]
    radius = longest(rivals, limit, start, tolerances[0])
    for (reach, _), tolerance in zip(extensions, tolerances[1:], strict=True):
        limit = torch.minimum(limit, reach * radius)
        rivals = rivals.contested(reference, limit).with_forms(reference, limit)
        radius = torch.maximum(radius, longest(rivals, limit, torch.where(radius > 0, radius, start), tolerance))
    return radius


def single_token_radii(reference: Reference, again: Callable[[Tensor], Reference], y: Tensor, *, use_forms: bool = True) -> Tensor:
    """Radii (N,) of single tokens: all rivals at once, or some at a time for large vocabularies. again: makes the reference of a subset of the
    samples."""
    order = reference.margin.argsort(-1)[:, :-1]  # the label, whose margin is +inf, comes last
    if order.shape[1] <= ALL_RIVALS:
        return _largest_radii(reference, Rivals.of(reference, y, order.T), _start(reference), None if use_forms else ())
    each = Rivals.of(reference, y, order[:, :1].T).numbers()
    count, most = max(RIVALS, min(SINGLE_TOKEN_RIVALS, STORED_NUMBERS // each)), MOST_SINGLE_TOKEN_RIVALS if use_forms else MOST_RIVALS
    return _radii(reference, again, y, count, most, use_forms)


@dataclass(frozen=True)
class RivalFilter:
    """Bounds that exclude rivals without adjoints: by norms, and for single tokens by the Jacobian. linear: (N, C) ≥ ‖Jᵀ(u_y − u_j)‖."""

    reference: Reference
    linear: Tensor | None

    @classmethod
    def of(cls, reference: Reference, y: Tensor) -> RivalFilter:
        body, rows = reference.body, reference.rows
        if not isinstance(body, JacobianChain) or rows is None or len(rows) <= ALL_RIVALS:
            return cls(reference, None)
        whole, lost = body.end_to_end()
        available = max(1, 8 * chunk_numbers(rows) // rows.shape[1])
        found = torch.empty_like(reference.margin)
        for i, jacobian in enumerate(whole):
            own, at = rows[y[i]] @ jacobian, 0
            for part in rows.split(available):
                found[i, at : at + len(part)] = norm_up(own - part @ jacobian)
                at += len(part)
        # The error of each product is at most γ‖u‖‖J‖_F, that of the difference is as small.
        rounded = 4 * gamma(rows.shape[1] + 4, U64) * reference.largest_row * torch.linalg.matrix_norm(whole)
        return cls(reference, up(found + reference.pairs * lost.unsqueeze(-1) + rounded.unsqueeze(-1)))

    def decreases(self, epsilon: Tensor) -> Tensor:
        """Bounds (N, C) of the decrease of each margin at ε (N,)."""
        reference = self.reference
        if self.linear is None:
            return reference.by_norms(reference.hidden(epsilon), epsilon)
        after = reference.bounds_at(epsilon)
        hidden, rest = after.radius[..., reference.row], after.error[..., reference.row]
        first = up(self.linear * epsilon.unsqueeze(-1) + reference.pairs * rest.unsqueeze(-1))
        return torch.fmin(reference.by_norms(hidden, epsilon), first + 2 * reference.logit_error(hidden, epsilon).unsqueeze(-1))

    def order(self) -> Tensor:
        """(N, C): the order in which rivals are processed, smallest first."""
        return self.reference.margin / (self.reference.pairs if self.linear is None else self.linear).clamp_min(1e-300)


def _radii(reference: Reference, again: Callable[[Tensor], Reference], y: Tensor, count: int, most: int, use_forms: bool = True) -> Tensor:
    """Radii (N,) from the adjoints of `count` rivals at a time, for about `most` rivals of a sample at most. again: as in single_token_radii."""
    classes = reference.margin.shape[1]
    rival_filter = RivalFilter.of(reference, y)
    nearest = rival_filter.order()
    start = _start(reference)
    count = min(count, classes - 1)
    # The label, whose margin is +inf, comes last.
    first = (nearest.argsort(-1)[:, :count] if classes <= ALL_RIVALS else nearest.topk(count, largest=False).indices).T
    done = torch.zeros_like(reference.margin, dtype=torch.bool).scatter(1, y[:, None], True).scatter(1, first.T, True)
    radius = _largest_radii(reference, Rivals.of(reference, y, first), start, None if use_forms else ())
    taken = count
    while True:
        open_ = ~(rival_filter.decreases(radius) < reference.margin) & ~done & (radius > 0)[:, None]
        if not bool(open_.any()):
            return radius
        if taken >= most:
            # Without adjoints the remaining rivals are excluded within a smaller ball.
            def lost(epsilon: Tensor, left: Tensor = open_) -> Tensor:
                return torch.where(left, rival_filter.decreases(epsilon), 0.0)

            smaller, _ = search(lost, reference.margin, start)
            return torch.where(open_.any(-1), torch.minimum(radius, smaller), radius)
        samples = open_.any(-1).nonzero()[:, 0]
        part = reference if len(samples) == len(y) else again(samples)
        # The nearest open rivals of each sample. Where fewer are open, a finished rival fills the place and changes nothing.
        rank = torch.where(open_[samples], nearest[samples], torch.inf)
        more = (rank.argsort(-1)[:, :count] if classes <= ALL_RIVALS else rank.topk(count, largest=False).indices).T
        taken += count
        settled = ~open_[samples].gather(1, more.T)
        found = Rivals.of(part, y[samples], more)
        before = radius[samples]
        kept = ((found.decreases(part, before) < found.margin) | settled).all(-1)
        if not bool(kept.all()) and use_forms:
            found = found.with_forms(part, before)
            kept = ((found.decreases(part, before) < found.margin) | settled).all(-1)
        if not bool(kept.all()):
            # A radius that was proved against the finished rivals is also proved for every smaller radius.
            shorter, _ = search(partial(found.decreases, part), found.margin, start[samples])
            radius = radius.index_put((samples,), torch.where(kept, before, torch.minimum(before, shorter)))
        done = done.index_put((samples,), done[samples].scatter(1, more.T, True))
