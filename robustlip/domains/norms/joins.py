"""Branches of one input, joined: bounds of each branch, by the triangle inequality for sums and as one longer vector for concatenations."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from robustlip.domains.norms.state import Context, Rule, State, apply_rule, register
from robustlip.errors import BadInput
from robustlip.layers import Channels, Concatenate, Residual, Sum
from robustlip.layers.joins import Branching
from robustlip.ops.convolution import for_signals
from robustlip.ops.joins import root_of_squares, weighted_sum_error


def branches_behind(layer: Branching, state: State, context: Context) -> tuple[list[State], State]:
    """(the state after each branch, the state in front): tokens by token, images as a whole, changes in ℓ2."""
    stays = state.whole is not None and (len(state.whole) == 3 or (isinstance(layer, Sum) and (len(state.whole) > 3 or for_signals(layer))))
    state = (state if stays else state.by_token(layer)).in_l2()
    behind = [apply_rule(branch, state, context) for branch in layer.branches]
    return [s.in_l2() for s in behind], state


@register(Sum, Residual)
class SumRule(Rule):
    """Σ_i w_i f_i(x): each bound is the weighted sum of the branches' bounds."""

    def step(self, layer: Sum, state: State, context: Context) -> State:
        behind, _ = branches_behind(layer, state, context)
        shapes = {(s.tokens, s.width, s.whole) for s in behind}
        if len(shapes) > 1:
            got = [s.whole or (s.tokens, s.width) for s in behind]
            raise BadInput(f"expected branches that put out one shape, got {got}; match the widths")
        sizes = [abs(w) for w in layer.weights]

        def total(values: list[Tensor]) -> Tensor:
            return sum((w * v for w, v in zip(sizes, values, strict=True)), start=0 * values[0])

        fresh, norm = weighted_sum_error(sizes, [s.norm for s in behind], behind[0].width, context)
        change, rounding = total([s.change for s in behind]), total([s.rounding for s in behind])
        return context.finite(replace(behind[0], norm=norm + fresh, change=change, rounding=rounding + fresh))


@register(Concatenate)
class ConcatenateRule(Rule):
    """(f_1(x), f_2(x), …): ‖·‖₂² adds over the branches; nothing is computed."""

    def step(self, layer: Concatenate, state: State, context: Context) -> State:
        behind, _ = branches_behind(layer, state, context)
        # Of anything but images torch joins the last dimension: of tokens, one by one.
        behind = [s if s.whole is None or len(s.whole) == 3 else s.by_token(layer) for s in behind]
        wholes = [s.whole for s in behind]
        if len({s.tokens for s in behind}) > 1 or len({w is None for w in wholes}) > 1 or len({w[1:] for w in wholes if w is not None}) > 1:
            got = [w or (s.tokens, s.width) for w, s in zip(wholes, behind, strict=True)]
            raise BadInput(f"expected branches that differ in channels alone, got {got}; match the other dimensions")
        whole = None if wholes[0] is None else (sum(w[0] for w in wholes if w is not None), *wholes[0][1:])
        return replace(
            behind[0],
            norm=root_of_squares([s.norm for s in behind]),
            change=root_of_squares([s.change for s in behind]),
            rounding=root_of_squares([s.rounding for s in behind]),
            width=sum(s.width for s in behind),
            whole=whole,
        )


@register(Channels)
class ChannelsRule(Rule):
    """A part of the numbers: no norm grows."""

    def step(self, layer: Channels, state: State, context: Context) -> State:
        if state.whole is None or len(state.whole) != 3:
            state = state.by_token(layer)
        channels = state.whole[0] if state.whole is not None else state.width
        if layer.stop > channels:
            raise BadInput(f"expected at least {layer.stop} channels before Channels, got {channels}; change the slice")
        kept = layer.stop - layer.start
        whole = None if state.whole is None else (kept, *state.whole[1:])
        return replace(state, width=state.width // channels * kept, whole=whole)
