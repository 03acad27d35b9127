"""First-order expansions of layers at the clean activations: the linear term is exact, the remainder is bounded. docs/theory.md, sections 7 and 8.

Two trajectories are compared. The *reference*: the activations X_l of the clean input, computed by this module in float64. An *executed* trajectory:
activations X'_l of a perturbed input, rounded in the certified dtype. Given bounds ‖X'_t − X_t‖₂ ≤ radius for each token t before a layer F, the
expansion of F bounds the change after it. With J the Jacobian of F at the reference,

    X'_{l+1} − X_{l+1} = J_l (X'_l − X_l) + R_l,

where the remainder R_l contains the curvature of F, the rounding error of executing F and the float64 error of the reference. With adjoints g^l =
J_lᵀg^{l+1}, a linear function of the last activations changes by exactly ⟨g⁰, δ⟩ + Σ_l⟨g^{l+1}, R_l⟩, so only |⟨g^{l+1}, R_l⟩| has to be bounded. Its
bound is a sum of products of *weights*, which depend on the adjoint only, and *bounds*, which depend on the radius only.

In all files of this folder, `fresh` is the rounding error that a layer adds (and, for a weight threat, the effect of the change of its weights).
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

# The error of an adjoint computed in float64, relative to the layer's gain (a product of norms in which nothing cancels).
# γ_n of a matrix product is n·2⁻⁵³ and a Frobenius norm is at most √n spectral norms, so 2⁻³⁰ is enough for widths up to 2¹⁴.
ADJOINT_SLACK = 2.0**-30


@dataclass(frozen=True)
class Scope:
    """The state of the expansion before the next layer of a chain.

    context: arithmetic and constants, without a weight radius: that is part of the `Ball`, because it changes from one `advance` to the next.
    space: the norm of the radius. whole: the shape (C, H, W) or (T, D) of a sample that is bounded as one vector of all its entries, (N, 1, n);
    None where bounds are by token.
    """

    context: Context
    space: str = "l2"
    whole: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.context.weight_radius is not None:
            raise AssertionError("expected a context without a radius of weights, got one that an expansion would not read; put it into the Ball")

    def both(self, rounding: Callable[[Context], Tensor]) -> Tensor:
        """The rounding error in the certified dtype plus that of the float64 reference, by the same formula."""
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
        """`radius`, or infinity where a processor may replace the divisor `by` by zero."""
        return self.context.infinite_if_flushed(radius, by)

    def infinite_if_overflow(self, radius: Tensor, largest: Tensor) -> Tensor:
        """`radius`, or infinity where the largest intermediate value could overflow in the certified dtype."""
        return self.context.infinite_if_overflow(radius, largest)

    def weight_change(self, ball: Ball, sigma: float) -> Tensor | float:
        """‖E‖ of a matrix with σ(W) ≤ sigma, of shape (…, N, 1), or 0.0 without a weight threat; it broadcasts against radii by token."""
        if ball.weight_radius is None:
            return 0.0
        change = replace(self.context, weight_radius=ball.weight_radius).weight_change(sigma)
        assert isinstance(change, Tensor)
        return change.unsqueeze(-1)


@dataclass(frozen=True)
class Functionals:
    """Linear functionals of the change Δ before a layer of a single token. Bounds of ⟨c, Δ⟩ sharpen the layer's own bounds.

    vectors: the vectors c (A, N, D). sizes: ≥ |⟨c, Δ⟩| (A, N), None as long as they are not computed.
    """

    vectors: Tensor
    sizes: Tensor | None = None


@dataclass(frozen=True)
class SplitChange:
    """The change before a single token's layer as Mδ + E: ‖δ‖ ≤ epsilon, ‖E‖ ≤ rest, both (…, N, 1). `Expansion.with_input_map` takes M."""

    epsilon: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Ball:
    """Bounds of the change before a layer, for one ε.

    radius: ≥ the norm of the change of each token (…, N, T). error: ≥ the ℓ2 norm of its nonlinear part, by token, counted from the point where
    `error` was last 0. weight_radius: radius of a weight threat (…, N), None otherwise.
    split, functionals: sharper bounds for single tokens, counted from the same point.
    """

    radius: Tensor
    error: Tensor
    weight_radius: Tensor | None = None
    split: SplitChange | None = None
    functionals: Functionals | None = None

    @classmethod
    def of(cls, radius: Tensor, weight_radius: Tensor | None = None) -> Ball:
        """The ball at the point from which nonlinear parts are counted: its error is 0."""
        return cls(radius, torch.zeros_like(radius), weight_radius)

    def rest(self, before: Tensor) -> Tensor:
        """A bound of ‖Δ − Mδ‖ before this layer (…, N, 1). before: ≥ the norm of the linear map from where `split` was made to here (N,)."""
        assert self.split is not None
        return before.unsqueeze(-1) * self.split.rest + self.error


class JointBound:
    """A weight, or a bound, for many entries that are bounded jointly, because this is sharper than entry by entry.

    forms_gain_factors: whether quadratic forms (`with_forms`) improve this term by factors and not only by a few percent.
    """

    forms_gain_factors: ClassVar[bool] = False

    @property
    def matrix(self) -> Tensor | None:
        """For a bound: the matrix that maps the layer's input change to these entries, if known; `with_forms` needs it."""
        return None

    def selected(self, chosen: Tensor) -> JointBound:
        """For a weight: the same weight for the adjoints `chosen` (K, N) only."""
        raise NotImplementedError

    def contract(self, bound: Any) -> Tensor:
        """For a weight: the largest decrease (A, N) of ⟨g, ·⟩ with a bound of the same class."""
        raise NotImplementedError

    def with_forms(self, bound: Any, chosen: Tensor, token: int, worth: Tensor | None = None) -> JointBound:
        """For a weight: the same weight with quadratic forms of the adjoints `chosen` (K, N) at a token, valid up to `bound`, which has a matrix.

        worth: (K, N) bool, which of these forms to compute; default all.
        """
        return self


@dataclass(frozen=True)
class SmallerOf(JointBound):
    """Two bounds of the same remainder; the smaller one counts, for each head.

    As a bound: `against` multiplies max(−ω, 0), `size` multiplies |ω|, both (N, H, J); alternatively `whole` (N, H, J) multiplies |ω| alone.
    As a weight: against = max(−ω, 0) (A, N, H, J), or |ω| where both signs count; size = |ω|.
    """

    against: Tensor
    size: Tensor
    whole: Tensor | None = None

    def selected(self, chosen: Tensor) -> SmallerOf:
        """See JointBound."""
        pick = chosen[..., None, None].expand(*chosen.shape, *self.size.shape[2:])
        size = self.size.gather(0, pick)
        return SmallerOf(size if self.against is self.size else self.against.gather(0, pick), size)

    def contract(self, bound: SmallerOf) -> Tensor:
        assert bound.whole is not None

        def sum_of(w: Tensor, b: Tensor) -> Tensor:
            return torch.einsum("anhj,nhj->anh", w, b)

        if self.against is self.size:
            first = sum_of(self.size, bound.against + bound.size)
        else:
            first = sum_of(self.against, bound.against) + sum_of(self.size, bound.size)
        return torch.minimum(first, sum_of(self.size, bound.whole)).sum(-1)


@dataclass(frozen=True)
class QuadraticForms:
    """Quadratic forms of adjoints at one token, λ ≥ λ_max(Wᵀdiag(c)W): ½Σ_n c_n(w_n·Δ + e_n)² ≤ ½(√λ‖Δ‖ + √max c ‖e‖)².

    token: its index. convex, concave: (N, n), the curvatures in c = κ⁺·max(−ω, 0) + κ⁻·max(ω, 0); the forms are valid where the curvatures of a bound
    are not larger. largest: λ, peak: max_n c_n, both (A, N); λ is infinite for an adjoint without a form.
    """

    token: int
    convex: Tensor
    concave: Tensor
    largest: Tensor
    peak: Tensor


@dataclass(frozen=True)
class CurvatureTerm(JointBound):
    """The curvature term ½Σ_t Σ_n κ_n|ω_n|Δz_n² of neurons z = Wx + b at tokens t. Only curvature against the sign of ω_n lowers the margin.

    As a weight: convex = max(−ω, 0), concave = max(ω, 0) (A, N, T, n); both are |ω| where both signs count. As a bound: convex, concave are the
    curvatures κ⁺, κ⁻ (N, T, n), `each` ≥ |Δz_n| and `whole` ≥ ‖Δz‖₂ (N, T). After a Linear layer and a change bounded in ℓ2 also W (n, D), `matrix`,
    with Δz = WΔ + e, `moved` ≥ ‖Δ‖₂ and `fresh` ≥ ‖e‖₂ (N, T).
    """

    convex: Tensor
    concave: Tensor
    each: Tensor | None = None
    whole: Tensor | None = None
    matrix: Tensor | None = None
    moved: Tensor | None = None
    fresh: Tensor | None = None
    forms: QuadraticForms | None = None

    def selected(self, chosen: Tensor) -> CurvatureTerm:
        """For a weight: the same weight for the adjoints `chosen` (K, N) only."""
        pick = chosen[..., None, None].expand(*chosen.shape, *self.convex.shape[2:])
        convex = self.convex.gather(0, pick)
        return CurvatureTerm(convex, convex if self.concave is self.convex else self.concave.gather(0, pick))

    def contract(self, bound: CurvatureTerm) -> Tensor:
        assert bound.each is not None and bound.whole is not None
        squares, whole = bound.each.square(), bound.whole.square()
        both = torch.maximum(bound.convex, bound.concave) if self.convex is self.concave else None
        sums = []
        # A few adjoints at a time: on a CPU, products that fit into the cache are several times as fast.
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
            by_form = (f.largest.sqrt() * bound.moved[:, at] + f.peak.sqrt() * bound.fresh[:, at]).square()
            found[..., at] = torch.where(held, torch.fmin(found[..., at], by_form), found[..., at])
        return 0.5 * (1 + 1e-12) * found.sum(-1)

    def with_forms(self, bound: CurvatureTerm, chosen: Tensor, token: int, worth: Tensor | None = None) -> CurvatureTerm:
        """See JointBound; the forms have the curvatures of `bound`."""
        assert bound.matrix is not None
        convex, concave = bound.convex[:, token], bound.concave[:, token]
        pick = chosen.unsqueeze(-1).expand(*chosen.shape, convex.shape[-1])
        c = self.convex[:, :, token].gather(0, pick) * convex + self.concave[:, :, token].gather(0, pick) * concave
        wanted = torch.isfinite(c).all(-1) if worth is None else torch.isfinite(c).all(-1) & worth
        w = bound.matrix
        # The float64 error of Wᵀdiag(c)W is at most γ|W|ᵀdiag(c)|W|, whose Frobenius norm is at most Σ_n c_n‖w_n‖².
        lost = gamma(len(w) + 4, U64) * (c[wanted] @ w.square().sum(-1)) + w.numel() * 2.0**-1022
        count = max(1, 16 * chunk_numbers(w) // w.numel())
        values = []
        for part in c[wanted].split(count):
            product = w.mT @ (part.unsqueeze(-1) * w)
            fits = torch.isfinite(product).all(-1).all(-1)
            # A product that overflowed has no form.
            eigenvalues = largest_eigenvalue_bound(torch.where(fits[:, None, None], product, 0.0))
            values.append(torch.where(fits, eigenvalues, torch.inf))
        found = torch.full_like(c[..., 0], torch.inf)
        found[wanted] = up(torch.cat(values) + 2 * lost)
        largest = found.new_full(self.convex.shape[:2], torch.inf).scatter(0, chosen, found)
        peak = torch.zeros_like(largest).scatter(0, chosen, c.amax(-1))
        return replace(self, forms=QuadraticForms(token, convex, concave, largest, peak))


Term = Tensor | JointBound


class OutputBounds(NamedTuple):
    """The result of `Expansion.advance`: radius and error after the layer as in Ball (…, N, T'), and the layer's bounds (…, N, ·) in order."""

    radius: Tensor
    error: Tensor
    bounds: list[Term]


class Expansion:
    """The expansion of one layer at the reference activations (N, T, D), float64. It is immutable: everything that depends on ε is an argument.

    clean: the reference after the layer (N, T', D'). space, whole: of the radius after the layer, as in Scope.
    Radii have shape (…, N, T), adjoints (A, N, T, D): several radii and several adjoints at once.
    """

    clean: Tensor
    space: str = "l2"
    whole: tuple[int, ...] | None = None
    # Names of the tensors (N, T, …) from which `at_rows` selects tokens.
    by_token: ClassVar[tuple[str, ...]] = ("clean",)

    def replaced(self, **values: Any) -> Self:
        """A copy with new values of these attributes."""
        part = copy.copy(self)
        part.__dict__.update(values)
        return part

    @property
    def uses_input_map(self) -> bool:
        """Whether this layer, or one inside it, uses the linear map from the perturbation to it (`with_input_map`)."""
        return False

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        """Bounds of the change after the layer, from bounds of the change before it.

        remainder: whether the nonlinear part is bounded; if not, there are no bounds and `error` is meaningless.
        """
        raise NotImplementedError

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        """(Jᵀg (A, N, T, D), the weights (A, N, ·) of g in the order of the bounds).

        Weights and bounds together bound the amount by which ⟨g, R⟩ falls below 0; with `two_sided` they bound |⟨g, R⟩|.
        """
        raise NotImplementedError

    def lipschitz(self) -> Tensor | float:
        """≥ ‖J‖ at the reference for changes of every token by at most 1, (N,) or one number; a product of norms, in which nothing cancels."""
        return 1.0

    def with_input_map(self, m: Tensor, before: Tensor) -> Self:
        """The expansion of a single token's layer with the linear map M from the perturbation δ: Δ = Mδ + E, ‖δ‖ ≤ ε, m = M (N, D, D₀).

        before: ≥ the norm of the linear map from the point where `Ball.split` was made to here (N,). Layers that do not use M return themselves.
        """
        return self

    def functionals(self) -> Functionals | None:
        """Functionals of the change before a single token's layer whose bounds would sharpen `advance`; None where there are none."""
        return None

    def jacobian(self) -> Tensor:
        """J of a single token's layer (N, D', D), from the adjoints of all unit vectors."""
        size, count = self.clean.shape[-1], len(self.clean)
        basis = torch.eye(size, dtype=torch.float64, device=self.clean.device)[:, None, None, :].expand(size, count, 1, size)
        return self.adjoint(basis)[0].squeeze(2).transpose(0, 1)  # rows Jᵀe_i

    def at_rows(self, sample: Tensor, position: Tensor, rounding_radii: Tensor) -> Expansion:
        """The same layer at M single tokens: token position[m] of sample sample[m] (M,) becomes a sample of one token.

        rounding_radii: radii (N, T) before this layer without a perturbation; the tokens that are not selected change by at most these, by rounding.
        Tokens after attention depend on other tokens; see robustlip.domains.expansion.attention.
        """
        return self.replaced(**{name: rows_of(getattr(self, name), sample, position) for name in self.by_token})


def rows_of(x: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """(N, T, …) → (M, 1, …)."""
    return x[sample, position].unsqueeze(1)


Expand = Callable[[Any, Tensor, Scope], Expansion]
Keeps = Literal["tokens", "images", "any"]


@dataclass(frozen=True)
class TableEntry:
    """An entry of the table of expansions.

    make: makes the expansion from (layer, clean, scope). when: whether a layer of this class is supported. any_space: whether the radius may be in
    the threat's norm; if not, it is converted to ℓ2. keeps: which samples may stay one vector of all their entries: none ('tokens'), images
    ('images') or all ('any'). A sample (T, D) that may not is split into tokens.
    """

    make: Expand
    when: Callable[[Any], bool] = lambda layer: True
    any_space: bool = False
    keeps: Keeps = "tokens"


_EXPANSIONS: dict[type, TableEntry] = {}


def register(
    *layers: type, when: Callable[[Any], bool] = lambda layer: True, any_space: bool = False, keeps: Keeps = "tokens"
) -> Callable[[Expand], Expand]:
    """Class or function decorator: makes the expansion of exactly these layer classes from (layer, clean (N, T, D), scope). See `TableEntry`."""

    def add(make: Expand) -> Expand:
        for layer in layers:
            _EXPANSIONS[layer] = TableEntry(make, when, any_space, keeps)
        return make

    return add


_FAMILIES: list[tuple[Callable[[nn.Module], bool], TableEntry]] = []


def register_family(belongs: Callable[[nn.Module], bool], *, any_space: bool = False, keeps: Keeps = "any") -> Callable[[Expand], Expand]:
    """Decorator: makes the expansion of all layers of a family of operations of `robustlip.ops`. See `TableEntry`."""

    def add(make: Expand) -> Expand:
        _FAMILIES.append((belongs, TableEntry(make, any_space=any_space, keeps=keeps)))
        return make

    return add


def entry_of(layer: nn.Module) -> TableEntry | None:
    """The table entry of the layer's class, whatever its options; None where there is none."""
    if type(layer) in _EXPANSIONS:
        return _EXPANSIONS[type(layer)]
    return next((entry for belongs, entry in _FAMILIES if belongs(layer)), None)


def unsupported(layer: nn.Module) -> str:
    """'' where the layer itself can be expanded, else its class name, with its options where these are not supported."""
    entry = entry_of(layer)
    if entry is None:
        return type(layer).__name__
    return "" if entry.when(layer) else str(layer)


def expand(layer: nn.Module, clean: Tensor, scope: Scope) -> Expansion:
    """The expansion of one layer. Raises UnsupportedLayer for a class without an expansion or rule, and for a layer with hooks."""
    rule_for(layer)
    entry, name = entry_of(layer), unsupported(layer)
    if entry is None or name:
        known = ", ".join(sorted(t.__name__ for t in (*_EXPANSIONS, *NORMALIZATIONS, *elementwise_layers(), *moving_layers())))
        raise UnsupportedLayer(f"expected layers with a local expansion ({known}), got {name}; use method='global', or add an expansion")
    return entry.make(layer, clean, scope)


def token_norms(g: Tensor) -> Tensor:
    """‖g_t‖₂ of adjoints (A, N, T, D), rounded up: (A, N, T)."""
    return torch.linalg.vector_norm(g, dim=-1) * (1 + 2.0**-35)


def selected(weights: list[Term], chosen: Tensor) -> list[Term]:
    """Weights (A, N, ·) of the adjoints `chosen` (K, N) only, for each sample."""
    return [w.gather(0, chosen.unsqueeze(-1).expand(*chosen.shape, w.shape[-1])) if isinstance(w, Tensor) else w.selected(chosen) for w in weights]


def decrease(first_order: Tensor, weights: Sequence[Term], bounds: Sequence[Term]) -> Tensor:
    """first_order (A, N) + Σ over all terms of weights (A, N, ·) times bounds (N, ·). NaN (0·∞ after an overflow) means infeasible."""
    total = first_order
    for w, b in zip(weights, bounds, strict=True):
        if isinstance(w, JointBound):
            total = total + w.contract(b)
        else:
            assert isinstance(b, Tensor)
            total = total + torch.einsum("anm,nm->an", w, b)
    return total


def decrease_bound(first_order: Tensor, weights: Sequence[Term], bounds: Sequence[Term], epsilon: Tensor) -> Tensor:
    """`decrease` with the rounding error of its own sums added; infinite instead of NaN. epsilon: (N,)."""
    total = decrease(first_order, weights, bounds) + underflow_error(bounds, epsilon)
    return torch.nan_to_num(up(total * (1 + 1e-9)), nan=torch.inf, posinf=torch.inf)


def underflow_error(bounds: Sequence[Term], size: Tensor) -> Tensor:
    """A bound of the underflow error of `decrease`, (N,): adjoints below 2⁻⁵¹¹ underflow when squared, products below 2⁻¹⁰²² always.

    size: ≥ ε (N,). Infinite where bounds exceed 2³⁰⁰: an underflow may be multiplied by the square of a bound, and 2⁻¹⁰²²b² ≤ 2⁻⁴⁸⁰b needs b ≤ 2⁵⁴².
    """
    all_of_it = 1 + size + sum((b.sum(-1) for b in bounds if isinstance(b, Tensor)), start=torch.zeros_like(size))
    return torch.where(all_of_it < 2.0**300, 2.0**-480 * all_of_it, torch.inf)
