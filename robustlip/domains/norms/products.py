"""Branches of one input, multiplied with each other, or the larger of them taken. docs/theory.md, section 3."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from robustlip.domains.norms.joins import branches_behind
from robustlip.domains.norms.state import Context, Rule, State, register
from robustlip.errors import BadInput
from robustlip.layers import Maximum, Minimum, Product
from robustlip.ops import elementwise_of, is_elementwise
from robustlip.ops.joins import product_error, root_of_squares, spread_over


def peak(branch: nn.Module, behind: State) -> Tensor:
    """≥ every number after a branch in exact arithmetic: at most the ℓ2 norm, and the bound of a function that ends it (a sigmoid's 1)."""
    while type(branch) is nn.Sequential and len(branch):
        branch = branch[-1]
    if not is_elementwise(branch):
        return behind.norm
    facts = elementwise_of(branch)
    return behind.norm.clamp_max(facts.bounded / facts.divisor)


def shape_behind(state: State) -> tuple[int, ...]:
    """Of a sample: (C, H, W) of an image, (T, D) of tokens."""
    return state.whole or (state.tokens, state.width)


@register(Product)
class ProductRule(Rule):
    """a'b' − ab = a'(b' − b) + (a' − a)b: the change of one branch counts with the largest number of the other.

    ‖u∘v‖₂ ≤ ‖u‖_∞‖v‖₂, and ‖·‖_∞ ≤ ‖·‖₂ where nothing better is known. A v that is repeated s times: ‖u∘v‖₂ ≤ min(‖u‖₂, √s‖u‖_∞)‖v‖₂. On all
    inputs a product has no Lipschitz constant; on the domain, where ‖a‖ and ‖b‖ are bounded by `norm`, it has this one.
    """

    def step(self, layer: Product, state: State, context: Context) -> State:
        (a, b), _ = branches_behind(layer, state, context)
        spread = spread_over(shape_behind(a), shape_behind(b))
        root = math.sqrt(spread) * (1 + 1e-15)
        first, second = (peak(branch, behind) for branch, behind in zip(layer.branches, (a, b), strict=True))
        # The same of what is executed.
        first_run, second_run = torch.minimum(a.norm, first + a.rounding), torch.minimum(b.norm, second + b.rounding)
        reach, reach_run = torch.minimum(a.norm, root * first), torch.minimum(a.norm, root * first_run)
        norm = torch.minimum(a.norm * second_run, reach_run * b.norm)
        fresh = product_error(norm, a.norm, root * b.norm, a.width, context)
        change = reach * b.change + second * a.change
        rounding = reach_run * b.rounding + second * a.rounding + fresh
        return context.finite(replace(a, norm=norm + fresh, change=change, rounding=rounding))


@register(Maximum, Minimum)
class MaximumRule(Rule):
    """|max(a', b') − max(a, b)| ≤ max(|a' − a|, |b' − b|) for each entry, so ‖·‖₂ is at most that of the concatenation. Nothing is computed."""

    def step(self, layer: Maximum, state: State, context: Context) -> State:
        (a, b), _ = branches_behind(layer, state, context)
        if shape_behind(a) != shape_behind(b):
            got = [shape_behind(a), shape_behind(b)]
            raise BadInput(f"expected branches of {type(layer).__name__} that put out one shape, got {got}; match the widths")
        rounding = root_of_squares([a.rounding, b.rounding]) + 2 * a.width**0.5 * context.flushed  # subnormals may be taken for zero
        return replace(a, norm=root_of_squares([a.norm, b.norm]), change=root_of_squares([a.change, b.change]), rounding=rounding)
