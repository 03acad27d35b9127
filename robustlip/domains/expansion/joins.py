"""Joins of branches with one input. Adjoints are sums, radii follow from the triangle inequality, nonlinear parts are bounded branch by branch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from robustlip.domains.expansion.base import ADJOINT_SLACK, Ball, Expansion, Functionals, OutputBounds, Scope, Term, register, token_norms
from robustlip.domains.expansion.structure import ChainExpansion, ToTokens, shape_of
from robustlip.domains.norms import Context, State
from robustlip.domains.norms.joins import constant_of, executed
from robustlip.errors import BadInput
from robustlip.layers import Channels, Concatenate, Residual, Sum
from robustlip.layers.joins import Branching
from robustlip.numerics.arithmetic import RoundingModel
from robustlip.numerics.rounding import norm_up, up
from robustlip.ops.joins import root_of_squares, weighted_sum_error


class Branches(Expansion):
    """Several chains with the same input. Their bounds and weights are concatenated in the order of the branches."""

    by_token: ClassVar[tuple[str, ...]] = ("clean",)

    def __init__(self, layer: Branching, clean: Tensor, scope: Scope) -> None:
        self.scope = scope
        self.branches = [ChainExpansion([branch], clean, scope) for branch in layer.branches]

    @property
    def uses_input_map(self) -> bool:
        return any(branch.uses_input_map for branch in self.branches)

    def with_input_map(self, m: Tensor, before: Tensor) -> Self:
        return self.replaced(branches=[branch.with_input_map(m, before) for branch in self.branches])

    def at_rows(self, sample: Tensor, position: Tensor, rounding_radii: Tensor) -> Expansion:
        part = super().at_rows(sample, position, rounding_radii)
        return part.replaced(branches=[branch.at_rows(sample, position, rounding_radii) for branch in self.branches])

    def advanced(self, ball: Ball, remainder: bool) -> tuple[list[Tensor], list[Tensor], list[Term]]:
        """(radii, errors) after the branches, each (…, N, T), and the bounds of all branches."""
        after = [branch.advance(ball, remainder) for branch in self.branches]
        return [b.radius for b in after], [b.error for b in after], [bound for b in after for bound in b.bounds]


@register(Sum, keeps="images")
class SumExpansion(Branches):
    """Σ_i w_i f_i(x) for each token."""

    by_token = ("clean", "norms", "norm")

    def __init__(self, layer: Sum, clean: Tensor, scope: Scope) -> None:
        super().__init__(layer, clean, scope)
        self.whole = self.branches[0].whole
        if len(shapes := {shape_of(branch) for branch in self.branches}) > 1:
            raise BadInput(f"expected branches that put out one shape, got {sorted(shapes)}; match the widths")
        self.weights = layer.weights
        self.layer, self.norm = layer, norm_up(clean)
        self.before = State(self.norm, self.norm, self.norm, "l2", clean.shape[1], clean.shape[2], scope.whole)
        self.constant = constant_of(layer, self.before, scope.context)
        self.norms = torch.stack([norm_up(branch.clean) for branch in self.branches], -1)  # (N, T, k)
        self.clean = sum((w * b.clean for w, b in zip(self.weights, self.branches, strict=True)), start=torch.zeros_like(self.branches[0].clean))

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        radii, errors, bounds = self.advanced(ball, remainder)
        sizes = [abs(w) for w in self.weights]
        reached = [self.norms[..., i] + r for i, r in enumerate(radii)]
        fresh, norm = weighted_sum_error(sizes, reached, self.clean.shape[-1], self.scope)
        fresh = self.scope.infinite_if_overflow(up(fresh), norm)
        if remainder:
            bounds += [fresh, ball.radius.amax(-1, keepdim=True)]

        def total(values: list[Tensor]) -> Tensor:
            return up(sum((w * v for w, v in zip(sizes, values, strict=True)), start=torch.zeros_like(values[0])))

        radius = total(radii) + fresh
        if self.constant < math.inf and ball.weight_radius is None:
            # Chosen by sample, not by radius: the smaller of both would grow more slowly than ε, and the search of radii extrapolates.
            less = (torch.as_tensor(self.lipschitz(), dtype=radius.dtype, device=radius.device) > self.constant).expand(len(self.clean))
            radius = torch.where(less.unsqueeze(-1), self._together(ball), radius)
        return OutputBounds(radius, total(errors) + fresh, bounds)

    def _together(self, ball: Ball) -> Tensor:
        """The radius from a constant of the whole sum (`robustlip.ops.residual`) and its rounding error, that of the reference included."""
        norm = self.norm + ball.radius

        def one(arithmetic: RoundingModel) -> Tensor:
            assert isinstance(arithmetic, Context)
            return executed(self.layer, replace(self.before, norm=norm), arithmetic)[0]

        return up(self.constant * ball.radius) + up(self.scope.both(one))

    def lipschitz(self) -> Tensor | float:
        return sum((abs(w) * b.lipschitz() for w, b in zip(self.weights, self.branches, strict=True)), start=0.0)  # type: ignore[misc]

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        through: Tensor | None = None
        weights: list[Term] = []
        for w, branch in zip(self.weights, self.branches, strict=True):
            back, its = branch.adjoint(w * g, two_sided)
            through = back if through is None else through + back
            weights += its
        norms = token_norms(g)
        assert through is not None
        return through, [*weights, norms, ADJOINT_SLACK * sum(abs(w) for w in self.weights) * norms.sum(-1, keepdim=True)]


@register(Residual, keeps="images")
class ResidualExpansion(SumExpansion):
    """skip·x + weight·f(x). The input change of f's first layer is that of x, so functionals of this layer are useful."""

    def functionals(self) -> Functionals | None:
        return self.branches[1].functionals()


@register(Concatenate, keeps="images")
class ConcatenateExpansion(Branches):
    """(f_1(x), f_2(x), …) for each token. Nothing is computed, so nothing rounds."""

    def __init__(self, layer: Concatenate, clean: Tensor, scope: Scope) -> None:
        super().__init__(layer, clean, scope)
        # For anything but images torch concatenates the last dimension, token by token.
        self.branches = [b if b.whole is None or len(b.whole) == 3 else b.then(ToTokens(b.clean, b.whole, b.space)) for b in self.branches]
        shapes = [shape_of(branch) for branch in self.branches]
        if any(len(s) > 3 for s in shapes) or len({s[1:] if len(s) == 3 else s[:1] for s in shapes}) > 1:
            raise BadInput(f"expected branches that differ in channels only, got {shapes}; match the other dimensions")
        self.whole = None if self.branches[0].whole is None else (sum(s[0] for s in shapes), *shapes[0][1:])
        self.widths = [branch.clean.shape[-1] for branch in self.branches]
        self.clean = torch.cat([branch.clean for branch in self.branches], -1)

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        radii, errors, bounds = self.advanced(ball, remainder)
        return OutputBounds(root_of_squares(radii), root_of_squares(errors), bounds)

    def lipschitz(self) -> Tensor | float:
        return sum((branch.lipschitz() for branch in self.branches), start=0.0)  # type: ignore[misc]  # an upper bound of the root of the sum of squares

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        through: Tensor | None = None
        weights: list[Term] = []
        for part, branch in zip(g.split(self.widths, -1), self.branches, strict=True):
            back, its = branch.adjoint(part.contiguous(), two_sided)
            through = back if through is None else through + back
            weights += its
        assert through is not None
        return through, weights


@register(Channels, keeps="images")
class ChannelsExpansion(Expansion):
    """A slice of the entries of each token, or of the channels of an image."""

    def __init__(self, layer: Channels, clean: Tensor, scope: Scope) -> None:
        channels = clean.shape[-1] if scope.whole is None else scope.whole[0]
        if layer.stop > channels:
            raise BadInput(f"expected at least {layer.stop} channels before Channels, got {channels}; change the slice")
        self.before = clean.shape[-1]
        each = self.before // channels  # entries of a channel
        self.start = layer.start * each
        self.whole = None if scope.whole is None else (layer.stop - layer.start, *scope.whole[1:])
        self.clean = clean[..., self.start : layer.stop * each]

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        return OutputBounds(ball.radius, ball.error, [])

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        after = self.before - self.start - g.shape[-1]
        return torch.nn.functional.pad(g, (self.start, after)), []
