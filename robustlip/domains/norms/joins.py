"""Joins of branches with one input: the triangle inequality for sums, one longer vector for concatenations."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from robustlip.domains.norms.state import Context, Rule, State, apply_rule, register
from robustlip.errors import BadInput
from robustlip.layers import Channels, Concatenate, Residual, Sum
from robustlip.layers.joins import Branching
from robustlip.ops.convolution import for_signals
from robustlip.ops.joins import root_of_squares, weighted_sum_error
from robustlip.ops.residual import together


def branch_states(layer: Branching, state: State, context: Context) -> tuple[list[State], State]:
    """(the state after each branch, the state before them): tokens stay by token, images are one vector, changes are in ℓ2."""
    stays = state.whole is not None and (len(state.whole) == 3 or (isinstance(layer, Sum) and (len(state.whole) > 3 or for_signals(layer))))
    state = (state if stays else state.by_token(layer)).in_l2()
    after = [apply_rule(branch, state, context) for branch in layer.branches]
    return [s.in_l2() for s in after], state


def constant_of(layer: Sum, state: State, context: Context) -> float:
    """A cached Lipschitz constant of the whole sum; infinite if there is only the triangle inequality's, and under a weight threat."""
    if context.weight_radius is not None:
        return math.inf
    # As in `branch_states`: images as a whole, a matrix (T, D) of anything but signals by token.
    whole, width = state.whole, state.width
    if whole is not None and len(whole) == 2 and not for_signals(layer):
        width, whole = whole[1], None
    key = f"together-{whole or width}-{layer}"
    return context.constant(layer, key, lambda: together(layer, whole, width))  # type: ignore[no-any-return]


def executed(layer: Sum, state: State, context: Context) -> tuple[Tensor, Tensor]:
    """(≥ ‖fl(y) − y‖₂ for executed ‖x‖₂ ≤ state.norm, ≥ ‖y(0)‖₂) of the sum by itself."""
    zero, context = 0 * state.norm, replace(context, clean={})
    rule = SumRule()
    fresh = rule._apart(layer, replace(state, change=zero, rounding=zero), context).rounding
    return fresh, rule._apart(layer, replace(state, norm=zero, change=zero, rounding=zero), context).norm


@register(Sum, Residual)
class SumRule(Rule):
    """Σ_i w_i f_i(x): each bound is the weighted sum of the branches' bounds.

    Where branches cancel (`robustlip.ops.residual`) there is a constant L of the whole: changes and rounding errors before the sum count at most L
    times, the rounding of the sum itself is added, and ‖y‖ ≤ ‖y(0)‖ + L‖x‖. Clean norms inside the branches are of other states: not used there.
    """

    def step(self, layer: Sum, state: State, context: Context) -> State:
        after = self._apart(layer, state, context)
        constant = constant_of(layer, state, context)
        if constant == math.inf:
            return after
        fresh, at_zero = executed(layer, state, context)
        state = state.in_l2()
        return replace(
            after,
            norm=torch.minimum(after.norm, at_zero + constant * state.norm + fresh),
            change=torch.minimum(after.change, constant * state.change),
            rounding=torch.minimum(after.rounding, constant * state.rounding + fresh),
        )

    def _apart(self, layer: Sum, state: State, context: Context) -> State:
        after, _ = branch_states(layer, state, context)
        shapes = {(s.tokens, s.width, s.whole) for s in after}
        if len(shapes) > 1:
            got = [s.whole or (s.tokens, s.width) for s in after]
            raise BadInput(f"expected branches that put out one shape, got {got}; match the widths")
        sizes = [abs(w) for w in layer.weights]

        def total(values: list[Tensor]) -> Tensor:
            return sum((w * v for w, v in zip(sizes, values, strict=True)), start=0 * values[0])

        fresh, norm = weighted_sum_error(sizes, [s.norm for s in after], after[0].width, context)
        change, rounding = total([s.change for s in after]), total([s.rounding for s in after])
        return context.guard_overflow(replace(after[0], norm=norm + fresh, change=change, rounding=rounding + fresh))


@register(Concatenate)
class ConcatenateRule(Rule):
    """(f_1(x), f_2(x), …): ‖·‖₂² is the sum over the branches. Nothing is computed."""

    def step(self, layer: Concatenate, state: State, context: Context) -> State:
        after, _ = branch_states(layer, state, context)
        # For anything but images torch concatenates the last dimension, token by token.
        after = [s if s.whole is None or len(s.whole) == 3 else s.by_token(layer) for s in after]
        wholes = [s.whole for s in after]
        if len({s.tokens for s in after}) > 1 or len({w is None for w in wholes}) > 1 or len({w[1:] for w in wholes if w is not None}) > 1:
            got = [w or (s.tokens, s.width) for w, s in zip(wholes, after, strict=True)]
            raise BadInput(f"expected branches that differ in channels alone, got {got}; match the other dimensions")
        whole = None if wholes[0] is None else (sum(w[0] for w in wholes if w is not None), *wholes[0][1:])
        return replace(
            after[0],
            norm=root_of_squares([s.norm for s in after]),
            change=root_of_squares([s.change for s in after]),
            rounding=root_of_squares([s.rounding for s in after]),
            width=sum(s.width for s in after),
            whole=whole,
        )


@register(Channels)
class ChannelsRule(Rule):
    """A slice of the entries: no norm grows."""

    def step(self, layer: Channels, state: State, context: Context) -> State:
        if state.whole is None or len(state.whole) != 3:
            state = state.by_token(layer)
        channels = state.whole[0] if state.whole is not None else state.width
        if layer.stop > channels:
            raise BadInput(f"expected at least {layer.stop} channels before Channels, got {channels}; change the slice")
        kept = layer.stop - layer.start
        whole = None if state.whole is None else (kept, *state.whole[1:])
        return replace(state, width=state.width // channels * kept, whole=whole)
