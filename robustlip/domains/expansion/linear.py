"""Linear layers and embeddings, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.domains.expansion.base import ADJOINT_SLACK, Expansion, Pair, Scope, register, token_norms
from robustlip.errors import UnsupportedLayer
from robustlip.numerics.rounding import norm_up, up
from robustlip.numerics.spectral import infinity_to_two_bound, one_to_two_bound, quartic_bound
from robustlip.ops.affine import Matrix
from robustlip.threats import l2_factor


def dual_norms(rows: Tensor, space: str) -> Tensor:
    """(n,) ≥ how far ⟨w_n, Δ⟩ can go for ‖Δ‖ ≤ 1 in `space`: rows (n, D), float64."""
    if space == "linf":
        return up(rows.abs().sum(-1) * (1 + 1e-12))
    return rows.abs().amax(-1) if space == "l1" else norm_up(rows)


@dataclass(frozen=True)
class LinearConstants:
    """Norms of one weight matrix (fan_out, fan_in), rounded up. rows: (fan_out,) dual norms of its rows for a change in `space`."""

    weight: Tensor
    bias: Tensor | None
    matrix: Matrix
    gain: float
    rows: Tensor
    bias_norm: float
    quartic: float | None

    @classmethod
    def of(cls, layer: nn.Linear, space: str) -> LinearConstants:
        weight = layer.weight.detach().double()
        matrix = Matrix.of(layer.weight)
        if space == "linf":
            gain = float(infinity_to_two_bound(weight))
        else:
            gain = float(one_to_two_bound(weight)) if space == "l1" else matrix.sigma
        bias = None if layer.bias is None else layer.bias.detach().double()
        quartic = quartic_bound(weight) if space == "l2" else None
        return cls(weight, bias, matrix, gain, dual_norms(weight, space), 0.0 if bias is None else float(norm_up(bias, 0)), quartic)


def weight_change(scope: Scope, sigma: float) -> Tensor | float:
    """‖E‖ of one matrix, of shape (…, N, 1) where it is not 0: radii by token broadcast against it."""
    change = scope.context.weight_change(sigma)
    return change.unsqueeze(-1) if isinstance(change, Tensor) else change


class Affine(Expansion):
    """z = Wx + b by token."""

    by_token = ("clean", "norm")

    def __init__(self, layer: nn.Linear, clean: Tensor, scope: Scope) -> None:
        self.scope = scope
        self.constants: LinearConstants = scope.context.constant(layer, f"local-{scope.space}", lambda: LinearConstants.of(layer, scope.space))
        self.norm = norm_up(clean)
        self.clean = F.linear(clean, self.constants.weight, self.constants.bias)
        self._space_factor = l2_factor(scope.space, clean.shape[-1])

    def lipschitz(self) -> Tensor | float:
        return self.constants.matrix.sigma

    def parts(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """(σ(W)·r, everything else) (…, N, T): the change of z is at most their sum. The first is WΔx, the second rounding and weight changes."""
        c = self.constants
        perturbed = weight_change(self.scope, c.matrix.sigma)
        norm = self.norm + self._space_factor * radius
        bias = None if c.bias is None else c.bias_norm
        fresh = self.scope.both(lambda arithmetic: c.matrix.error(bias, norm, perturbed, arithmetic)) + perturbed * norm
        largest = c.matrix.largest(norm, perturbed) + c.bias_norm
        return up(c.gain * radius), self.scope.fits(up(fresh), largest)


@register(nn.Embedding)
class EmbeddingExpansion(Expansion):
    """A row of the table for each token id (N, T): only weight changes move it, by at most ‖E‖₂."""

    def __init__(self, layer: nn.Embedding, ids: Tensor, scope: Scope) -> None:
        if layer.max_norm is not None:
            raise UnsupportedLayer("expected Embedding without max_norm, got one that rewrites its weights in forward; rescale the rows once")
        self.scope = scope
        self.matrix: Matrix = scope.context.constant(layer, "matrix", lambda: Matrix.of(layer.weight))
        self.clean = layer.weight.detach().double()[ids]

    def advance(self, radius: Tensor, error: Tensor, bounds: list[Pair] | None) -> tuple[Tensor, Tensor]:
        moved = torch.zeros_like(radius) + weight_change(self.scope, self.matrix.sigma)
        return up(moved), moved

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Pair]]:
        return g.new_zeros(*g.shape[:-1], 1), []


@register(nn.Linear)
class LinearExpansion(Affine):
    """Linear alone."""

    def advance(self, radius: Tensor, error: Tensor, bounds: list[Pair] | None) -> tuple[Tensor, Tensor]:
        moved, fresh = self.parts(radius)
        if bounds is not None:
            bounds += [fresh, radius.amax(-1, keepdim=True)]
        return moved + fresh, up(self.constants.matrix.sigma * error) + fresh

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Pair]]:
        norms = token_norms(g)
        slack = ADJOINT_SLACK * self.constants.gain * norms.sum(-1, keepdim=True)
        return g @ self.constants.weight, [norms, slack]
