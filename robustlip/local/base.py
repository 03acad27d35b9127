"""A layer at its clean activations: what a change in front of it does behind it, to first order exactly, the rest bounded. MATH.md sections 6, 7.

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustlip.errors import UnsupportedLayer
from robustlip.rounding import U64
from robustlip.rules import Context, rule_for

# Of an adjoint that float64 computed: its error, as a fraction of the layer's gain (norms of all that was multiplied, nothing cancelled).
# γ_n of a matrix product is n·2⁻⁵³ and a Frobenius norm at most √n spectral ones: 2⁻³⁰ covers widths up to 2¹⁴ many times over.
ADJOINT_SLACK = 2.0**-30


@dataclass(frozen=True)
class Scope:
    """What holds while a chain is expanded, in front of the next layer.

    context: arithmetic and constants. space: the norm of the radius. whole: the shape (C, H, W) or (T, D) of a sample that is still one
    vector of all its numbers, (N, 1, n); None where bounds are by token.
    """

    context: Context
    space: str = "l2"
    whole: tuple[int, ...] | None = None

    def both(self, rounding: Callable[[Context], Tensor]) -> Tensor:
        """Rounding in the covered dtype plus rounding of the float64 reference, by the same formula."""
        return rounding(self.context) + rounding(replace(self.context, dtype=torch.float64))

    @property
    def unit(self) -> float:
        return self.context.unit + U64

    @property
    def tiny(self) -> float:
        return self.context.tiny + 2.0**-1022

    def fits(self, radius: Tensor, largest: Tensor) -> Tensor:
        """The radius, infinite where an intermediate value could overflow the covered dtype."""
        overflow = ~(largest < torch.finfo(self.context.dtype).max / 4)
        return torch.where(overflow, torch.full_like(radius, torch.inf), radius) if bool(overflow.any()) else radius


@dataclass(frozen=True)
class Either:
    """Two bounds of the same remainder, each against its weights, (A, N, H, J) and (N, H, J): the smaller sum over J counts, head by head."""

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Curved:
    """½Σ_n |ω_n|κ_nΔz_n² of neurons z = Wx + b, κ_n ≥ |f''| where z_n can be. As a weight: |ω| (A, N, n) of tokens of one sample in a row.

    As a bound: κ (N, n), `each` ≥ |Δz_n| (N, n) and `whole` ≥ ‖Δz‖₂ (N, 1).
    """

    kappa: Tensor
    each: Tensor | None = None
    whole: Tensor | None = None

    def meet(self, bound: Curved) -> Tensor:
        assert bound.each is not None and bound.whole is not None
        steepest = (self.kappa * bound.kappa).amax(-1) * bound.whole.square()[:, 0]
        return 0.5 * torch.minimum(steepest, torch.einsum("anm,nm->an", self.kappa, bound.kappa * bound.each.square()))


Pair = Tensor | Either | Curved


class Expansion:
    """One layer at the reference activations (N, T, D), float64.

    clean: the reference behind the layer (N, T', D'). space, whole: of the radius behind it, as in Scope.
    Radii have shape (…, N, T), adjoints (A, N, T, D): any number of radii and of adjoints at once.
    """

    clean: Tensor
    space: str = "l2"
    whole: tuple[int, ...] | None = None
    # Names of the tensors (N, T, …) that `at_rows` picks tokens from.
    by_token: ClassVar[tuple[str, ...]] = ("clean",)
    shaped: ClassVar[bool] = False

    def advance(self, radius: Tensor, error: Tensor, bounds: list[Pair]) -> tuple[Tensor, Tensor]:
        """(radius, error) behind the layer, each (…, N, T'); appends its bounds (…, N, ·), flat behind N, in a fixed order.

        error ≥ the ℓ2 norm, token by token, of what is not linear in the change at the point where error was last 0.
        """
        raise NotImplementedError

    def adjoint(self, g: Tensor) -> tuple[Tensor, list[Pair]]:
        """(Jᵀg (A, N, T, D), the weights (A, N, ·) of g in the order of the bounds)."""
        raise NotImplementedError

    def lipschitz(self) -> Tensor | float:
        """≥ ‖J‖ at the reference for changes of all tokens by at most 1 each, (N,) or one number, with nothing cancelled inside."""
        return 1.0

    def learn_way(self, m: Tensor, before: Tensor) -> None:
        """Tell a single token's layer the linear way to it: Δ = Mδ + E with ‖δ‖ ≤ ε, m = M (N, D, D₀).

        before: ≥ the norm of what leads from where `given` counts E to here (N,). Only layers with `shaped` make use of it.
        """

    def given(self, epsilon: Tensor, beyond: Tensor) -> None:
        """ε and ‖E‖ (…, N, 1) for the next `advance`."""

    def jacobian(self) -> Tensor:
        """J of a single token's layer (N, D', D), by its adjoints of all unit vectors."""
        size, count = self.clean.shape[-1], len(self.clean)
        basis = torch.eye(size, dtype=torch.float64, device=self.clean.device)[:, None, None, :].expand(size, count, 1, size)
        return self.adjoint(basis)[0].squeeze(2).transpose(0, 1)  # rows Jᵀe_i

    def at_rows(self, sample: Tensor, position: Tensor) -> Expansion:
        """The same layer at single tokens: M new samples of one token each, sample[m] and position[m] (M,) saying which.

        Tokens behind attention depend on others; robustlip.local.attention says what becomes of those.
        """
        part = copy.copy(self)
        for name in self.by_token:
            setattr(part, name, rows_of(getattr(self, name), sample, position))
        return part


def rows_of(x: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """(N, T, …) → (M, 1, …)."""
    return x[sample, position].unsqueeze(1)


Expand = Callable[[Any, Tensor, Scope], Expansion]
_EXPANSIONS: dict[type, Expand] = {}


def register(*layers: type) -> Callable[[Expand], Expand]:
    """Class or function decorator: this makes the expansion of exactly these layer classes, from (layer, clean (N, T, D), scope)."""

    def add(make: Expand) -> Expand:
        for layer in layers:
            _EXPANSIONS[layer] = make
        return make

    return add


def unsupported(layer: nn.Module) -> str:
    """'' when the layer itself can be expanded, otherwise its class name."""
    return "" if type(layer) in _EXPANSIONS else type(layer).__name__


def expand(layer: nn.Module, clean: Tensor, scope: Scope) -> Expansion:
    """The expansion of one layer. Raises UnsupportedLayer for a class without one, or one that has no rule, or carries hooks."""
    rule_for(layer)
    make = _EXPANSIONS.get(type(layer))
    if make is None:
        known = ", ".join(sorted(t.__name__ for t in _EXPANSIONS))
        raise UnsupportedLayer(
            f"expected layers with a local expansion ({known}), got {type(layer).__name__}; use method='global', or add an expansion"
        )
    return make(layer, clean, scope)


def token_norms(g: Tensor) -> Tensor:
    """‖g_t‖₂ of adjoints (A, N, T, D), rounded up: (A, N, T)."""
    return torch.linalg.vector_norm(g, dim=-1) * (1 + 2.0**-35)


def loss(first_order: Tensor, weights: list[Pair], bounds: list[Pair]) -> Tensor:
    """first_order (A, N) + Σ over all pairs, (A, N, ·) with (N, ·) → (A, N). 0·∞ is NaN, a radius that overflowed: infeasible either way."""
    total = first_order
    for w, b in zip(weights, bounds, strict=True):
        if isinstance(w, Either) and isinstance(b, Either):
            total = total + torch.minimum(torch.einsum("anhj,nhj->anh", w.first, b.first), torch.einsum("anhj,nhj->anh", w.second, b.second)).sum(-1)
        elif isinstance(w, Curved) and isinstance(b, Curved):
            total = total + w.meet(b)
        else:
            assert isinstance(w, Tensor) and isinstance(b, Tensor)
            total = total + torch.einsum("anm,nm->an", w, b)
    return total
