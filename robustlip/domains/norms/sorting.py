"""Sorting and reflecting activations. docs/theory.md, section 3."""

from __future__ import annotations

from dataclasses import replace

from robustlip.domains.norms.state import Context, Rule, State, register
from robustlip.layers.sorting import GroupSort, Householder, MaxMin


@register(GroupSort, MaxMin)
class SortRule(Rule):
    """Sorting moves no two vectors apart in any ℓp norm (rearrangement inequality), keeps the norm, and rounds nothing.

    But for subnormals: they may count for zero, and be left in any order then.
    """

    def step(self, layer: GroupSort | MaxMin, state: State, context: Context) -> State:
        return replace(state, rounding=state.rounding + 2 * state.width**0.5 * context.flushed)


@register(Householder)
class HouseholderRule(Rule):
    """Per pair ⟨v, z⟩ becomes |⟨v, z⟩| and the rest stays, v a unit vector: 1-Lipschitz in ℓ2 and of the same norm.

    Rounding: sin and cos are off by 2u, so ⟨v, z⟩ by 6u‖z‖ and twice its product with v by (12 + 6 + 5)u‖z‖; the last sum adds u. 32u covers.
    """

    def step(self, layer: Householder, state: State, context: Context) -> State:
        state = state.in_l2()
        fresh = 32 * context.unit * state.norm + 8 * state.width**0.5 * context.tiny * (1 + state.norm)
        return context.finite(replace(state, norm=state.norm + fresh, rounding=state.rounding + fresh), 4 * state.norm)
