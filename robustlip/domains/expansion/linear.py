"""Linear layers and embeddings, token by token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.domains.expansion.base import ADJOINT_SLACK, Ball, Expansion, OutputBounds, Scope, Term, register, token_norms
from robustlip.errors import UnsupportedLayer
from robustlip.layers import Lookup
from robustlip.numerics.rounding import norm_up, up
from robustlip.numerics.spectral import infinity_to_two_bound, one_to_two_bound, quartic_bound
from robustlip.ops.affine import Matrix
from robustlip.ops.maps import dual_norms
from robustlip.threats import l2_factor


@dataclass(frozen=True)
class LinearConstants:
    """Norms of one weight matrix (fan_out, fan_in), rounded up. rows: (fan_out,) dual norms of its rows for a change in `space`."""

    weight: Tensor
    bias: Tensor | None
    matrix: Matrix
    gain: float
    rows: Tensor
    bias_norm: float

    @classmethod
    def of(cls, layer: nn.Linear, space: str, matrix: Matrix) -> LinearConstants:
        weight = layer.weight.detach().double()
        if space == "linf":
            gain = float(infinity_to_two_bound(weight))
        else:
            gain = float(one_to_two_bound(weight)) if space == "l1" else matrix.sigma
        bias = None if layer.bias is None else layer.bias.detach().double()
        return cls(weight, bias, matrix, gain, dual_norms(weight, space), 0.0 if bias is None else float(norm_up(bias, 0)))


class AffineStep(Expansion):
    """z = Ax + b, by itself or with functions of single entries after it. Subclasses set these attributes, `clean` (z) and `whole`.

    sigma: ≥ ‖A‖₂. gain: ≥ ‖A‖ from the norm of the radius to the norm after the layer. frobenius: ≥ the norm of |A|. rows: (m,) dual norms of the
    rows of A.
    matrix: (m, n), if it is stored. quartic: ≥ ‖(Ax)∘(Ax)‖₂ for ‖x‖₂ ≤ 1, if known. slack: ≥ |⟨error, Δ⟩| for the float64 error of Aᵀg, ‖g‖₂ ≤ 1 and
    ‖Δ‖ ≤ 1.
    """

    scope: Scope
    sigma: float
    gain: float
    frobenius: float
    rows: Tensor
    slack: float
    matrix: Tensor | None = None

    @property
    def quartic(self) -> float | None:
        return None

    def parts(self, ball: Ball) -> tuple[Tensor, Tensor]:
        """(gain·r, fresh) (…, N, T): z changes by at most their sum. The first bounds AΔx, the second rounding errors and weight changes."""
        raise NotImplementedError

    def back(self, g: Tensor) -> Tensor:
        """Aᵀg."""
        raise NotImplementedError

    def pair_rows(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        """(k,) dual norms of v₁·row_a + v₂·row_b, for indices a, b (k,) and v (k, 2)."""
        return up(v[:, 0].abs() * self.rows[a] + v[:, 1].abs() * self.rows[b])

    def lipschitz(self) -> Tensor | float:
        return self.sigma

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        moved, fresh = self.parts(ball)
        bounds: list[Term] = [fresh, ball.radius.amax(-1, keepdim=True)] if remainder else []
        return OutputBounds(moved + fresh, up(self.sigma * ball.error) + fresh, bounds)

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        norms = token_norms(g)
        return self.back(g), [norms, self.slack * norms.sum(-1, keepdim=True)]


@register(nn.Linear, any_space=True)
class Affine(AffineStep):
    """z = Wx + b for each token."""

    by_token = ("clean", "norm")
    constants: LinearConstants

    def __init__(self, layer: nn.Linear, clean: Tensor, scope: Scope) -> None:
        self.scope = scope
        matrix: Matrix = scope.context.constant(layer, "matrix", lambda: Matrix.of(layer.weight))
        self.layer = layer
        self.constants = c = scope.context.constant(layer, f"local-{scope.space}", lambda: LinearConstants.of(layer, scope.space, matrix))
        self.sigma, self.gain, self.frobenius, self.rows = c.matrix.sigma, c.gain, c.matrix.frobenius, c.rows
        self.matrix, self.slack = c.weight, ADJOINT_SLACK * c.gain
        self.norm = norm_up(clean)
        self.clean = F.linear(clean, c.weight, c.bias)
        self._space_factor = l2_factor(scope.space, clean.shape[-1])

    def parts(self, ball: Ball) -> tuple[Tensor, Tensor]:
        c, radius = self.constants, ball.radius
        perturbed = self.scope.weight_change(ball, c.matrix.sigma)
        norm = self.norm + self._space_factor * radius
        bias = None if c.bias is None else c.bias_norm
        fresh = self.scope.both(lambda arithmetic: c.matrix.error(bias, norm, perturbed, arithmetic)) + perturbed * norm
        largest = c.matrix.largest(norm, perturbed) + c.bias_norm
        return up(c.gain * radius), self.scope.infinite_if_overflow(up(fresh), largest)

    @property
    def quartic(self) -> float | None:
        # Only used before activations; for a wide layer it costs more than all else.
        if self.scope.space != "l2":
            return None
        return self.scope.context.constant(self.layer, "quartic", lambda: quartic_bound(self.constants.weight))  # type: ignore[no-any-return]

    def back(self, g: Tensor) -> Tensor:
        return g @ self.constants.weight


class Composed(AffineStep):
    """The composition A₂A₁ of two affine layers, where A₂ is a factor for each entry. The matrices are not multiplied."""

    def __init__(self, first: AffineStep, second: AffineStep, factors: Tensor) -> None:
        """factors: (m,) of the second layer, in float64."""
        self.scope, self.first, self.second, self.factors = first.scope, first, second, factors
        self.clean, self.whole = second.clean, second.whole
        self.sigma, self.gain = second.sigma * first.sigma * (1 + 1e-15), second.sigma * first.gain * (1 + 1e-15)
        self.frobenius = second.sigma * first.frobenius * (1 + 1e-15)
        self.rows = up(second.rows * first.rows)
        self.slack = (second.sigma * first.slack + second.slack * first.gain) * (1 + 1e-9)

    def parts(self, ball: Ball) -> tuple[Tensor, Tensor]:
        moved, fresh = self.first.parts(ball)
        return up(self.second.sigma * moved), up(self.second.sigma * fresh) + self.second.parts(replace(ball, radius=moved + fresh))[1]

    def back(self, g: Tensor) -> Tensor:
        return self.first.back(self.second.back(g))

    def pair_rows(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        # The float64 factors have a relative error below 2⁻⁴⁵.
        sizes = v[:, 0].abs() * self.rows[a] + v[:, 1].abs() * self.rows[b]
        return up(self.first.pair_rows(a, b, v * torch.stack([self.factors[a], self.factors[b]], -1)) + 2.0**-45 * sizes)

    def at_rows(self, sample: Tensor, position: Tensor, rounding_radii: Tensor) -> Expansion:
        between = self.first.advance(Ball.of(rounding_radii), remainder=False).radius
        first, second = self.first.at_rows(sample, position, rounding_radii), self.second.at_rows(sample, position, between)
        return super().at_rows(sample, position, rounding_radii).replaced(first=first, second=second)


@register(nn.Embedding)
class EmbeddingExpansion(Expansion):
    """A row of the table for each token id (N, T). Only weight changes change it, by at most ‖E‖₂."""

    def __init__(self, layer: nn.Embedding, ids: Tensor, scope: Scope) -> None:
        if layer.max_norm is not None:
            raise UnsupportedLayer("expected Embedding without max_norm, got one that rewrites its weights in forward; rescale the rows once")
        self.scope = scope
        self.matrix: Matrix = scope.context.constant(layer, "matrix", lambda: Matrix.of(layer.weight))
        self.clean = layer.weight.detach().double()[ids]

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        moved = torch.zeros_like(ball.radius) + self.scope.weight_change(ball, self.matrix.sigma)
        return OutputBounds(up(moved), moved, [])

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        return g.new_zeros(*g.shape[:-1], 1), []


@register(Lookup)
def lookup(layer: nn.Module, ids: Tensor, scope: Scope) -> Expansion:
    """Recorded operations on token ids. A ball of embeddings starts after this layer, so no change passes through it."""
    raise UnsupportedLayer(
        "expected a threat to the embeddings of a model that computes them of token ids by several tables, got one to its weights; "
        "use an embedding threat"
    )
