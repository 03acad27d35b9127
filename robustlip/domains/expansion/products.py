"""Products, maxima and minima of two branches.

With a = a₀ + Δa and b = b₀ + Δb,   ab − a₀b₀ = b₀Δa + a₀Δb + ΔaΔb. The nonlinear part and an adjoint g give Σ_i g_iΔa_iΔb_i, of size at most
‖g‖_∞‖Δa‖₂‖Δb‖₂. So Jᵀg = J_aᵀ(g∘b₀) + J_bᵀ(g∘a₀), and the remainders of the branches are weighted by g∘b₀ and g∘a₀. If one entry of b multiplies a
whole channel of a, g∘a₀ is summed over the channel, and ‖g‖_∞ is replaced by the largest ‖·‖₂ of a channel of g:
Σ_c|Δb_c|Σ_p|g_cp||Δa_cp| ≤ Σ_c|Δb_c|‖g_c‖‖Δa_c‖.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustlip.domains.expansion.base import ADJOINT_SLACK, Ball, Expansion, OutputBounds, Scope, Term, expand, register, token_norms
from robustlip.domains.expansion.joins import Branches, ChannelsExpansion, ConcatenateExpansion
from robustlip.domains.expansion.linear import Affine, AffineStep
from robustlip.domains.expansion.sorting import ReflectionExpansion
from robustlip.domains.expansion.structure import ChainExpansion, ToL2, shape_of
from robustlip.errors import BadInput
from robustlip.layers import Channels, Concatenate, Maximum, MaxMin, Minimum, Product
from robustlip.numerics.arithmetic import RoundingModel
from robustlip.numerics.rounding import norm_up, up
from robustlip.numerics.spectral import infinity_to_two_bound, one_to_two_bound, spectral_norm_bound
from robustlip.ops.joins import bounded_by, product_error, root_of_squares, spread_over
from robustlip.threats import l2_factor


def channel_norms(x: Tensor, spread: int) -> Tensor:
    """The largest ‖·‖₂ of `spread` consecutive entries of x (…, n), rounded up; the largest |·| if spread is 1."""
    return x.abs().amax(-1) if spread == 1 else norm_up(x.unflatten(-1, (-1, spread))).amax(-1)


@register(Product, any_space=True, keeps="images")
class ProductExpansion(Branches):
    """a(x)∘b(x) for each token."""

    by_token = ("clean", "first", "second", "norms", "largest")

    def __init__(self, layer: Product, clean: Tensor, scope: Scope) -> None:
        super().__init__(layer, clean, scope)
        self.branches = [part if part.space == "l2" else part.then(ToL2(part.clean, part.space)) for part in self.branches]
        self.factor = l2_factor(scope.space, clean.shape[-1])
        a, b = self.branches
        self.spread = spread_over(shape_of(a), shape_of(b))
        self.whole = a.whole
        self.first, self.second = a.clean, b.clean  # a₀ (N, T, n), b₀ (N, T, n/spread)
        self.clean = a.clean * self._spread(b.clean)
        self.norms = torch.stack([norm_up(a.clean), math.sqrt(self.spread) * (1 + 1e-15) * norm_up(b.clean)], -1)  # (N, T, 2)
        # The factors of ‖Δa‖ and ‖Δb‖, (N, T, 2). Products in float64 round once.
        self.largest = torch.stack([b.clean.abs().amax(-1), channel_norms(a.clean, self.spread)], -1) * (1 + 1e-15)

    def _spread(self, b: Tensor) -> Tensor:
        return b if self.spread == 1 else b.repeat_interleave(self.spread, -1)

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        (r_a, r_b), (e_a, e_b), bounds = self.advanced(ball, remainder)
        by_a, by_b = self.largest.unbind(-1)
        bent = r_a * r_b
        reached = self.norms[..., 0] + r_a, self.norms[..., 1] + math.sqrt(self.spread) * (1 + 1e-15) * r_b
        norm = reached[0] * (by_a + r_b)

        def one(arithmetic: RoundingModel) -> Tensor:
            return product_error(norm, *reached, self.clean.shape[-1], arithmetic)

        fresh = self.scope.infinite_if_overflow(up(self.scope.both(one)), norm)
        if remainder:
            bounds += [up(bent), fresh, ball.radius.amax(-1, keepdim=True)]
        return OutputBounds(up(by_a * r_a + by_b * r_b + bent) + fresh, up(by_a * e_a + by_b * e_b + bent) + fresh, bounds)

    def _gains(self) -> Tensor:
        """≥ ‖J‖ of both branches together (N,)."""
        a, b = self.branches
        return self.largest[..., 0].amax(-1) * a.lipschitz() + self.largest[..., 1].amax(-1) * b.lipschitz()

    def lipschitz(self) -> Tensor | float:
        return self._gains() * (1 + 1e-12)

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        a, b = self.branches
        through, weights = a.adjoint(g * self._spread(self.second), two_sided)
        inner = g * self.first
        if self.spread != 1:
            inner = inner.unflatten(-1, (-1, self.spread)).sum(-1)
        back, more = b.adjoint(inner, two_sided)
        norms = token_norms(g)
        slack = ADJOINT_SLACK * self.factor * (1 + self._gains()) * norms.sum(-1)
        return through + back, [*weights, *more, channel_norms(g, self.spread) * (1 + 1e-15), norms, slack.unsqueeze(-1)]


class Stacked(AffineStep):
    """Two Linear layers with the same input, stacked."""

    by_token = ("clean",)

    def __init__(self, first: Affine, second: Affine, layer: nn.Module) -> None:
        self.scope, self.first, self.second, self.whole = first.scope, first, second, None
        space = self.scope.space

        def norms() -> tuple[Tensor, float, float]:
            matrix = torch.cat([first.constants.weight, second.constants.weight])
            gain = {"l2": spectral_norm_bound, "linf": infinity_to_two_bound, "l1": one_to_two_bound}[space](matrix)
            return matrix, float(spectral_norm_bound(matrix)), float(gain)

        self.matrix, self.sigma, self.gain = self.scope.context.constant(layer, f"stacked-{space}", norms)
        self.frobenius = math.hypot(first.frobenius, second.frobenius) * (1 + 1e-15)
        self.rows, self.slack = torch.cat([first.rows, second.rows]), first.slack + second.slack
        self.clean = torch.cat([first.clean, second.clean], -1)

    def parts(self, ball: Ball) -> tuple[Tensor, Tensor]:
        return up(self.gain * ball.radius), root_of_squares([self.first.parts(ball)[1], self.second.parts(ball)[1]])

    def back(self, g: Tensor) -> Tensor:
        width = self.first.clean.shape[-1]
        return self.first.back(g[..., :width]) + self.second.back(g[..., width:])

    def at_rows(self, sample: Tensor, position: Tensor, rounding_radii: Tensor) -> Expansion:
        first, second = (part.at_rows(sample, position, rounding_radii) for part in (self.first, self.second))
        return super().at_rows(sample, position, rounding_radii).replaced(first=first, second=second)


@register(Maximum, Minimum, any_space=True, keeps="images")
def _maximum(layer: Maximum, clean: Tensor, scope: Scope) -> Expansion:
    """The first (second) half of MaxMin of both branches' concatenation; two Linear layers are expanded together with it; a constant is a kink.

    The layers made here have no cached constants, but for those of a constant branch, which are cached themselves.
    """
    bounded = scope.context.constant(layer, "bounded", lambda: bounded_by(layer))
    if bounded is not None:
        return ChainExpansion(bounded, clean, scope)
    together = [expand(branch, clean, scope) for branch in layer.branches if type(branch) is nn.Linear]
    if len(together) == 2:
        first, second = together
        assert isinstance(first, Affine) and isinstance(second, Affine)
        _check_shapes(layer, first, second)
        parts: list[Expansion] = [ReflectionExpansion(MaxMin(), clean, scope, Stacked(first, second, layer))]
    else:
        here = Scope(scope.context, "l2", scope.whole)
        joined = ConcatenateExpansion(Concatenate(*layer.branches), clean, here)
        _check_shapes(layer, *joined.branches)
        parts = [ToL2(clean, scope.space)] if scope.space != "l2" else []
        parts += [joined, ReflectionExpansion(MaxMin(), joined.clean, Scope(scope.context, "l2", joined.whole))]
    last = parts[-1]
    channels = last.clean.shape[-1] if last.whole is None else last.whole[0]
    half = Channels(channels // 2, channels) if type(layer) is Minimum else Channels(0, channels // 2)
    parts.append(ChannelsExpansion(half, last.clean, Scope(scope.context, "l2", last.whole)))
    return ChainExpansion([], clean, scope).replaced(parts=parts, clean=parts[-1].clean, space="l2", whole=parts[-1].whole)


def _check_shapes(layer: Maximum, first: Expansion, second: Expansion) -> None:
    if shape_of(first) != shape_of(second):
        got = [shape_of(first), shape_of(second)]
        raise BadInput(f"expected branches of {type(layer).__name__} that put out one shape, got {got}; match the widths")
