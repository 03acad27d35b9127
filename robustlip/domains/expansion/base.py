"""A layer at its clean activations: what a change in front of it does behind it, to first order exactly, the rest bounded.

docs/theory.md, sections 7 and 8.

Two trajectories are compared. The *reference*: the activations X_l of the clean input as this module computed them in float64. And any
*executed* one: X'_l of a perturbed input, rounded as the covered dtype rounds. With `radius` ≥ ‖X'_t − X_t‖₂ for each token t in front of a
layer F, its expansion bounds the radius behind it. And with J its Jacobian at the reference,

    X'_{l+1} − X_{l+1} = J_l (X'_l − X_l) + R_l,

where R_l holds everything else: the curvature of F, the rounding that execution makes in F, and the error that float64 made in the reference.
For adjoints g^l = J_lᵀg^{l+1} a linear function of the last activations moves by ⟨g⁰, δ⟩ + Σ_l⟨g^{l+1}, R_l⟩ exactly, so |⟨g^{l+1}, R_l⟩| is all
that has to be bounded: by a sum of products of *weights*, which depend on the adjoint alone, and *bounds*, which depend on the radius alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from robustlip.domains.norms import Context, rule_for
from robustlip.errors import UnsupportedLayer
from robustlip.numerics.rounding import U64, chunk_numbers, gamma, up
from robustlip.numerics.spectral import largest_eigenvalue_bound
from robustlip.ops import elementwise_layers
from robustlip.ops.moves import moving_layers
from robustlip.ops.normalization import NORMALIZATIONS

# Of an adjoint that float64 computed: its error, as a fraction of the layer's gain (norms of all that was multiplied, nothing cancelled).
# γ_n of a matrix product is n·2⁻⁵³ and a Frobenius norm at most √n spectral ones: 2⁻³⁰ covers widths up to 2¹⁴ many times over.
ADJOINT_SLACK = 2.0**-30


@dataclass(frozen=True)
class Scope:
    """What holds while a chain is expanded, in front of the next layer.

    context: arithmetic and constants, without a radius of weights: that one is in the `Ball`, for it changes from one `advance` to the next.
    space: the norm of the radius. whole: the shape (C, H, W) or (T, D) of a sample that is still one vector of all its numbers, (N, 1, n);
    None where bounds are by token.
    """

    context: Context
    space: str = "l2"
    whole: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.context.weight_radius is not None:
            raise AssertionError("expected a context without a radius of weights, got one that an expansion would not read; put it into the Ball")

    def both(self, rounding: Callable[[Context], Tensor]) -> Tensor:
        """Rounding in the covered dtype plus rounding of the float64 reference, by the same formula."""
        return rounding(self.context) + rounding(replace(self.context, dtype=torch.float64))

    @property
    def unit(self) -> float:
        return self.context.unit + U64

    @property
    def tiny(self) -> float:
        return self.context.tiny + 2.0**-1022

    @property
    def flushed(self) -> float:
        return self.context.flushed + 2.0**-1022

    def gamma(self, n: float) -> float:
        return self.context.gamma(n) + gamma(n, U64)

    def infinite_if_flushed(self, radius: Tensor, by: float) -> Tensor:
        """The radius, infinite where a processor may take what was divided by for zero."""
        return self.context.infinite_if_flushed(radius, by)

    def infinite_if_overflow(self, radius: Tensor, largest: Tensor) -> Tensor:
        """The radius, infinite where an intermediate value could overflow the covered dtype."""
        return self.context.infinite_if_overflow(radius, largest)

    def weight_change(self, ball: Ball, sigma: float) -> Tensor | float:
        """‖E‖ of a matrix with σ(W) ≤ sigma, of shape (…, N, 1) where it is not 0: radii by token broadcast against it."""
        if ball.weight_radius is None:
            return 0.0
        change = replace(self.context, weight_radius=ball.weight_radius).weight_change(sigma)
        assert isinstance(change, Tensor)
        return change.unsqueeze(-1)


@dataclass(frozen=True)
class Functionals:
    """Linear functionals of the change Δ in front of a single token's layer: bounds of ⟨c, Δ⟩ make its own bounds smaller.

    vectors: the c (A, N, D). sizes: ≥ |⟨c, Δ⟩| (A, N), None while nobody bounded them.
    """

    vectors: Tensor
    sizes: Tensor | None = None


@dataclass(frozen=True)
class Split:
    """The change in front of a single token's layer as Mδ + E: ‖δ‖ ≤ epsilon, ‖E‖ ≤ beyond, both (…, N, 1). Its `way` knows M."""

    epsilon: Tensor
    beyond: Tensor


@dataclass(frozen=True)
class Ball:
    """What is known of the change in front of a layer, for one ε.

    radius: ≥ its norm, token by token (…, N, T). error: ≥ the ℓ2 norm, token by token, of what is not linear in the change at the point where
    error was last 0. weight_radius: of a weight threat (…, N), None where weights stay as they are.
    split, functionals: of single tokens, where more than a radius is known; both count from where error was last 0.
    """

    radius: Tensor
    error: Tensor
    weight_radius: Tensor | None = None
    split: Split | None = None
    functionals: Functionals | None = None

    @classmethod
    def of(cls, radius: Tensor, weight_radius: Tensor | None = None) -> Ball:
        """The ball at the point from which changes are counted: nothing there is an error."""
        return cls(radius, torch.zeros_like(radius), weight_radius)

    def stray(self, before: Tensor) -> Tensor:
        """≥ the norm of what is not Mδ here (…, N, 1). before: ≥ the norm of what leads from where `split` counts E to here (N,)."""
        assert self.split is not None
        return before.unsqueeze(-1) * self.split.beyond + self.error


class Group:
    """A weight, or a bound, of many numbers at once that are bounded better together than one by one.

    far: whether the forms that `formed` makes gain factors, not percents.
    """

    far: ClassVar[bool] = False

    @property
    def matrix(self) -> Tensor | None:
        """As a bound: what the numbers are of the change in front, where that is known; then `formed` has a use."""
        return None

    def picked(self, chosen: Tensor) -> Group:
        """As a weight: the adjoints `chosen` (K, N) alone."""
        raise NotImplementedError

    def meet(self, bound: Any) -> Tensor:
        """As a weight: what it loses to a bound of its class, (A, N)."""
        raise NotImplementedError

    def formed(self, bound: Any, chosen: Tensor, token: int, worth: Tensor | None = None) -> Group:
        """As a weight: with the quadratic forms of the adjoints `chosen` (K, N) at a token, for bounds up to this one, which has a matrix.

        worth: (K, N), which of them to make; all unless given.
        """
        return self


@dataclass(frozen=True)
class Either(Group):
    """Two bounds of the same remainder, of which the smaller counts, head by head.

    As a bound: what `against` < 0 and the size of ω meet, both (N, H, J), or `whole` (N, H, J), which meets the size of ω alone.
    As a weight: against = max(−ω, 0) (A, N, H, J), or the size of ω again where both signs count, and the size of ω.
    """

    against: Tensor
    size: Tensor
    whole: Tensor | None = None

    def picked(self, chosen: Tensor) -> Either:
        """As a weight: the adjoints `chosen` (K, N) alone."""
        pick = chosen[..., None, None].expand(*chosen.shape, *self.size.shape[2:])
        size = self.size.gather(0, pick)
        return Either(size if self.against is self.size else self.against.gather(0, pick), size)

    def meet(self, bound: Either) -> Tensor:
        assert bound.whole is not None

        def sum_of(w: Tensor, b: Tensor) -> Tensor:
            return torch.einsum("anhj,nhj->anh", w, b)

        if self.against is self.size:
            first = sum_of(self.size, bound.against + bound.size)
        else:
            first = sum_of(self.against, bound.against) + sum_of(self.size, bound.size)
        return torch.minimum(first, sum_of(self.size, bound.whole)).sum(-1)


@dataclass(frozen=True)
class Forms:
    """Quadratic forms of adjoints at one token, λ ≥ λ_max(Wᵀdiag(c)W): ½Σ_n c_n(w_n·Δ + e_n)² ≤ ½(√λ‖Δ‖ + √max c ‖e‖)².

    token: which. convex, concave: (N, n) curvatures that c = κ⁺·max(−ω, 0) + κ⁻·max(ω, 0) was made of; the forms hold where the curvatures of a
    bound are no larger. largest: λ, peak: max_n c_n, both (A, N), λ infinite for an adjoint that was not asked for.
    """

    token: int
    convex: Tensor
    concave: Tensor
    largest: Tensor
    peak: Tensor


@dataclass(frozen=True)
class Curved(Group):
    """½Σ_t Σ_n κ_n|ω_n|Δz_n² of neurons z = Wx + b at tokens t, where only curvature against the sign of ω_n lowers the margin.

    As a weight: `convex` the adjoints below 0, −ω, `concave` those above, ω (A, N, T, n); both the size of ω where both signs count. As a bound
    (N, T, n): how far the function can bend up and down, `each` ≥ |Δz_n| and `whole` ≥ ‖Δz‖₂ (N, T). Behind a Linear layer and a change in ℓ2
    also its W (n, D), `matrix`: Δz = WΔ + e, `moved` ≥ ‖Δ‖₂ and `fresh` ≥ ‖e‖₂ (N, T).
    """

    convex: Tensor
    concave: Tensor
    each: Tensor | None = None
    whole: Tensor | None = None
    matrix: Tensor | None = None
    moved: Tensor | None = None
    fresh: Tensor | None = None
    forms: Forms | None = None

    def picked(self, chosen: Tensor) -> Curved:
        """As a weight: the adjoints `chosen` (K, N), numbers of its own, alone."""
        pick = chosen[..., None, None].expand(*chosen.shape, *self.convex.shape[2:])
        convex = self.convex.gather(0, pick)
        return Curved(convex, convex if self.concave is self.convex else self.concave.gather(0, pick))

    def meet(self, bound: Curved) -> Tensor:
        assert bound.each is not None and bound.whole is not None
        squares, whole = bound.each.square(), bound.whole.square()
        both = torch.maximum(bound.convex, bound.concave) if self.convex is self.concave else None
        sums = []
        # A few adjoints at a time: on a processor, products that stay in its cache take a fraction of the time of those that do not.
        count = max(1, chunk_numbers(squares) // max(1, self.convex[:1].numel()))
        for convex, concave in zip(self.convex.split(count), self.concave.split(count), strict=True):
            bent = convex * bound.convex if both is None else convex * both
            if both is None:
                bent.addcmul_(concave, bound.concave)
            sums.append(torch.minimum(bent.amax(-1) * whole, bent.mul_(squares).sum(-1)))
        found = torch.cat(sums)  # (A, N, T)
        if self.forms is not None:
            assert bound.moved is not None and bound.fresh is not None
            f, at = self.forms, self.forms.token
            held = ((bound.convex[:, at] <= f.convex) & (bound.concave[:, at] <= f.concave)).all(-1)
            formed = (f.largest.sqrt() * bound.moved[:, at] + f.peak.sqrt() * bound.fresh[:, at]).square()
            found[..., at] = torch.where(held, torch.fmin(found[..., at], formed), found[..., at])
        return 0.5 * (1 + 1e-12) * found.sum(-1)

    def formed(self, bound: Curved, chosen: Tensor, token: int, worth: Tensor | None = None) -> Curved:
        """See Group: forms of the curvatures of `bound`."""
        assert bound.matrix is not None
        convex, concave = bound.convex[:, token], bound.concave[:, token]
        pick = chosen.unsqueeze(-1).expand(*chosen.shape, convex.shape[-1])
        c = self.convex[:, :, token].gather(0, pick) * convex + self.concave[:, :, token].gather(0, pick) * concave
        wanted = torch.isfinite(c).all(-1) if worth is None else torch.isfinite(c).all(-1) & worth
        w = bound.matrix
        # Wᵀdiag(c)W as float64 has it is off by at most γ of |W|ᵀdiag(c)|W|, whose Frobenius norm is at most Σ_n c_n‖w_n‖².
        lost = gamma(len(w) + 4, U64) * (c[wanted] @ w.square().sum(-1)) + w.numel() * 2.0**-1022
        count = max(1, 16 * chunk_numbers(w) // w.numel())
        values = []
        for part in c[wanted].split(count):
            product = w.mT @ (part.unsqueeze(-1) * w)
            fits = torch.isfinite(product).all(-1).all(-1)
            # What overflowed has no form.
            bounded = largest_eigenvalue_bound(torch.where(fits[:, None, None], product, 0.0))
            values.append(torch.where(fits, bounded, torch.inf))
        found = torch.full_like(c[..., 0], torch.inf)
        found[wanted] = up(torch.cat(values) + 2 * lost)
        largest = found.new_full(self.convex.shape[:2], torch.inf).scatter(0, chosen, found)
        peak = torch.zeros_like(largest).scatter(0, chosen, c.amax(-1))
        return replace(self, forms=Forms(token, convex, concave, largest, peak))


Pair = Tensor | Group


class Behind(NamedTuple):
    """Of the change behind a layer: radius and error as in Ball (…, N, T'), and the layer's bounds (…, N, ·), flat behind N, in a fixed order."""

    radius: Tensor
    error: Tensor
    bounds: list[Pair]


class Expansion:
    """One layer at the reference activations (N, T, D), float64. Nothing changes in it once it is made: what differs from ε to ε is passed.

    clean: the reference behind the layer (N, T', D'). space, whole: of the radius behind it, as in Scope.
    Radii have shape (…, N, T), adjoints (A, N, T, D): any number of radii and of adjoints at once.
    """

    clean: Tensor
    space: str = "l2"
    whole: tuple[int, ...] | None = None
    # Names of the tensors (N, T, …) that `at_rows` picks tokens from.
    by_token: ClassVar[tuple[str, ...]] = ("clean",)

    def replaced(self, **values: Any) -> Self:
        """A copy with other values of these attributes."""
        part = copy.copy(self)
        part.__dict__.update(values)
        return part

    @property
    def shaped(self) -> bool:
        """Whether this layer, or one inside it, makes use of the way to it."""
        return False

    def advance(self, ball: Ball, remainder: bool = True) -> Behind:
        """Bounds of the change behind the layer, given those in front of it.

        remainder: whether what is not linear is wanted; without it there are no bounds, and the error means nothing.
        """
        raise NotImplementedError

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Pair]]:
        """(Jᵀg (A, N, T, D), the weights (A, N, ·) of g in the order of the bounds).

        Weights and bounds together bound how far ⟨g, R⟩ falls below 0; with `two_sided` its size.
        """
        raise NotImplementedError

    def lipschitz(self) -> Tensor | float:
        """≥ ‖J‖ at the reference for changes of all tokens by at most 1 each, (N,) or one number, with nothing cancelled inside."""
        return 1.0

    def with_way(self, m: Tensor, before: Tensor) -> Self:
        """A single token's layer that knows the linear way to it: Δ = Mδ + E with ‖δ‖ ≤ ε, m = M (N, D, D₀). Only `shaped` ones make use of it.

        before: ≥ the norm of what leads from where `Ball.split` counts E to here (N,).
        """
        return self

    def functionals(self) -> Functionals | None:
        """Functionals of the change in front of a single token's layer that would sharpen `advance`, None where there are none."""
        return None

    def jacobian(self) -> Tensor:
        """J of a single token's layer (N, D', D), by its adjoints of all unit vectors."""
        size, count = self.clean.shape[-1], len(self.clean)
        basis = torch.eye(size, dtype=torch.float64, device=self.clean.device)[:, None, None, :].expand(size, count, 1, size)
        return self.adjoint(basis)[0].squeeze(2).transpose(0, 1)  # rows Jᵀe_i

    def at_rows(self, sample: Tensor, position: Tensor, arrived: Tensor) -> Expansion:
        """The same layer at single tokens: M new samples of one token each, sample[m] and position[m] (M,) saying which.

        arrived: the radii (N, T) in front of this layer with nothing perturbed, by rounding alone: the tokens that are not picked move by those.
        Tokens behind attention depend on others; robustlip.domains.expansion.attention says what becomes of those.
        """
        return self.replaced(**{name: rows_of(getattr(self, name), sample, position) for name in self.by_token})


def rows_of(x: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """(N, T, …) → (M, 1, …)."""
    return x[sample, position].unsqueeze(1)


Expand = Callable[[Any, Tensor, Scope], Expansion]
Keeps = Literal["tokens", "images", "any"]


@dataclass(frozen=True)
class Entry:
    """What the table says of a class of layers. make: its expansion; when: of which layers of the class.

    any_space: whether the radius may be in the threat's own norm, or is taken in ℓ2. keeps: which samples may stay one vector of all their numbers:
    none ('tokens'), images ('images') or all ('any'); a matrix (T, D) that may not is split into tokens.
    """

    make: Expand
    when: Callable[[Any], bool] = lambda layer: True
    any_space: bool = False
    keeps: Keeps = "tokens"


_EXPANSIONS: dict[type, Entry] = {}


def register(
    *layers: type, when: Callable[[Any], bool] = lambda layer: True, any_space: bool = False, keeps: Keeps = "tokens"
) -> Callable[[Expand], Expand]:
    """Class or function decorator: this makes the expansion of exactly these layer classes, from (layer, clean (N, T, D), scope). See `Entry`."""

    def add(make: Expand) -> Expand:
        for layer in layers:
            _EXPANSIONS[layer] = Entry(make, when, any_space, keeps)
        return make

    return add


_FAMILIES: list[tuple[Callable[[nn.Module], bool], Entry]] = []


def register_family(belongs: Callable[[nn.Module], bool], *, any_space: bool = False, keeps: Keeps = "any") -> Callable[[Expand], Expand]:
    """Decorator: this makes the expansion of all layers of a family of operations of which `robustlip.ops` holds the facts. See `Entry`."""

    def add(make: Expand) -> Expand:
        _FAMILIES.append((belongs, Entry(make, any_space=any_space, keeps=keeps)))
        return make

    return add


def entry_of(layer: nn.Module) -> Entry | None:
    """What the tables say of the layer's class, whatever its options; None where they say nothing."""
    if type(layer) in _EXPANSIONS:
        return _EXPANSIONS[type(layer)]
    return next((entry for belongs, entry in _FAMILIES if belongs(layer)), None)


def unsupported(layer: nn.Module) -> str:
    """'' when the layer itself can be expanded, otherwise its class name, with its options where those are what is not covered."""
    entry = entry_of(layer)
    if entry is None:
        return type(layer).__name__
    return "" if entry.when(layer) else str(layer)


def expand(layer: nn.Module, clean: Tensor, scope: Scope) -> Expansion:
    """The expansion of one layer. Raises UnsupportedLayer for a class without one, or one that has no rule, or carries hooks."""
    rule_for(layer)
    entry, name = entry_of(layer), unsupported(layer)
    if entry is None or name:
        known = ", ".join(sorted(t.__name__ for t in (*_EXPANSIONS, *NORMALIZATIONS, *elementwise_layers(), *moving_layers())))
        raise UnsupportedLayer(f"expected layers with a local expansion ({known}), got {name}; use method='global', or add an expansion")
    return entry.make(layer, clean, scope)


def token_norms(g: Tensor) -> Tensor:
    """‖g_t‖₂ of adjoints (A, N, T, D), rounded up: (A, N, T)."""
    return torch.linalg.vector_norm(g, dim=-1) * (1 + 2.0**-35)


def picked(weights: list[Pair], chosen: Tensor) -> list[Pair]:
    """Weights (A, N, ·) of the adjoints `chosen` (K, N) alone, sample by sample."""
    return [w.gather(0, chosen.unsqueeze(-1).expand(*chosen.shape, w.shape[-1])) if isinstance(w, Tensor) else w.picked(chosen) for w in weights]


def loss(first_order: Tensor, weights: Sequence[Pair], bounds: Sequence[Pair]) -> Tensor:
    """first_order (A, N) + Σ over all pairs, (A, N, ·) with (N, ·) → (A, N). 0·∞ is NaN, a radius that overflowed: infeasible either way."""
    total = first_order
    for w, b in zip(weights, bounds, strict=True):
        if isinstance(w, Group):
            total = total + w.meet(b)
        else:
            assert isinstance(b, Tensor)
            total = total + torch.einsum("anm,nm->an", w, b)
    return total


def bounded(first_order: Tensor, weights: Sequence[Pair], bounds: Sequence[Pair], epsilon: Tensor) -> Tensor:
    """`loss` with the rounding of its own sums added, infinite where it is not a number. epsilon: (N,)."""
    return torch.nan_to_num(up((loss(first_order, weights, bounds) + vanished(bounds, epsilon)) * (1 + 1e-9)), nan=torch.inf, posinf=torch.inf)


def vanished(bounds: Sequence[Pair], size: Tensor) -> Tensor:
    """More than underflow can take from `loss`, (N,): adjoints below 2⁻⁵¹¹ vanish when squared, products below 2⁻¹⁰²² altogether.

    size: ε, or more (N,).
    Infinite where bounds exceed 2³⁰⁰: what vanishes may be multiplied by a square of them, and 2⁻¹⁰²²b² ≤ 2⁻⁴⁸⁰b needs b ≤ 2⁵⁴².
    """
    all_of_it = 1 + size + sum((b.sum(-1) for b in bounds if isinstance(b, Tensor)), start=torch.zeros_like(size))
    return torch.where(all_of_it < 2.0**300, 2.0**-480 * all_of_it, torch.inf)
