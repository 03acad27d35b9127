"""Products, maxima and minima of two branches. docs/theory.md, section 3."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from robustlip.domains.norms.joins import branch_states
from robustlip.domains.norms.state import Context, Rule, State, register
from robustlip.errors import BadInput
from robustlip.layers import Maximum, Minimum, Product
from robustlip.ops import elementwise_of, is_elementwise
from robustlip.ops.joins import product_error, root_of_squares, spread_over


def largest_entry(branch: nn.Module, after: State) -> Tensor:
    """≥ every entry after a branch in exact arithmetic: the ℓ2 norm, or the bound of a bounded function at its end (1 for a sigmoid)."""
    while type(branch) is nn.Sequential and len(branch):
        branch = branch[-1]
    if not is_elementwise(branch):
        return after.norm
    facts = elementwise_of(branch)
    return after.norm.clamp_max(facts.bounded / facts.divisor)


def shape_after(state: State) -> tuple[int, ...]:
    """The shape of a sample: (C, H, W) of an image, (T, D) of tokens."""
    return state.whole or (state.tokens, state.width)


@register(Product)
class ProductRule(Rule):
    """a'b' − ab = a'(b' − b) + (a' − a)b: the change of one branch times the largest entry of the other.

    ‖u∘v‖₂ ≤ ‖u‖_∞‖v‖₂, and ‖·‖_∞ ≤ ‖·‖₂ where no sharper bound is known. For a v that is repeated s times, ‖u∘v‖₂ ≤ min(‖u‖₂, √s‖u‖_∞)‖v‖₂. A product
    has no Lipschitz constant on all inputs; on the domain, where `norm` bounds ‖a‖ and ‖b‖, it has this one.
    """

    def step(self, layer: Product, state: State, context: Context) -> State:
        (a, b), _ = branch_states(layer, state, context)
        spread = spread_over(shape_after(a), shape_after(b))
        root = math.sqrt(spread) * (1 + 1e-15)
        first, second = (largest_entry(branch, after) for branch, after in zip(layer.branches, (a, b), strict=True))
        # The same bounds for executed values.
        first_run, second_run = torch.minimum(a.norm, first + a.rounding), torch.minimum(b.norm, second + b.rounding)
        reach, reach_run = torch.minimum(a.norm, root * first), torch.minimum(a.norm, root * first_run)
        norm = torch.minimum(a.norm * second_run, reach_run * b.norm)
        fresh = product_error(norm, a.norm, root * b.norm, a.width, context)
        change = reach * b.change + second * a.change
        rounding = reach_run * b.rounding + second * a.rounding + fresh
        return context.guard_overflow(replace(a, norm=norm + fresh, change=change, rounding=rounding))


@register(Maximum, Minimum)
class MaximumRule(Rule):
    """|max(a', b') − max(a, b)| ≤ max(|a' − a|, |b' − b|) for each entry, so ‖·‖₂ is at most that of the concatenation. Nothing is computed."""

    def step(self, layer: Maximum, state: State, context: Context) -> State:
        (a, b), _ = branch_states(layer, state, context)
        if shape_after(a) != shape_after(b):
            got = [shape_after(a), shape_after(b)]
            raise BadInput(f"expected branches of {type(layer).__name__} that put out one shape, got {got}; match the widths")
        rounding = root_of_squares([a.rounding, b.rounding]) + 2 * a.width**0.5 * context.flushed  # subnormals may be flushed to zero
        return replace(a, norm=root_of_squares([a.norm, b.norm]), change=root_of_squares([a.change, b.change]), rounding=rounding)
