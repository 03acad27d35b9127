"""Sorting and reflecting activations. docs/theory.md, section 3."""

from __future__ import annotations

from dataclasses import replace

from robustlip.domains.norms.state import Context, Rule, State, register
from robustlip.layers.sorting import GroupSort, Householder, MaxMin


@register(GroupSort, MaxMin)
class SortRule(Rule):
    """Sorting is 1-Lipschitz in every ℓp norm (rearrangement inequality), keeps the norm, and does not round.

    Subnormals may be compared as zero, so their order may be wrong.
    """

    def step(self, layer: GroupSort | MaxMin, state: State, context: Context) -> State:
        return replace(state, rounding=state.rounding + 2 * state.width**0.5 * context.flushed)


@register(Householder)
class HouseholderRule(Rule):
    """For each pair, ⟨v, z⟩ becomes |⟨v, z⟩| and the rest of z stays, v a unit vector: 1-Lipschitz in ℓ2, and the norm stays the same.

    Rounding: the errors of sin and cos are 2u, that of ⟨v, z⟩ 6u‖z‖, that of twice its product with v (12 + 6 + 5)u‖z‖, that of the last sum u: below
    32u.
    """

    def step(self, layer: Householder, state: State, context: Context) -> State:
        state = state.in_l2()
        fresh = 32 * context.unit * state.norm + 8 * state.width**0.5 * context.tiny * (1 + state.norm)
        return context.guard_overflow(replace(state, norm=state.norm + fresh, rounding=state.rounding + fresh), 4 * state.norm)
