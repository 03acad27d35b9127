"""Operations that rearrange entries: norms grow only by copies. docs/theory.md, section 3; facts are in robustlip.ops.moves."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from robustlip.domains.norms.state import Context, Rule, State, register_family
from robustlip.ops.moves import Moves, growth, is_move, moves_of


def cached_moves(layer: nn.Module, whole: tuple[int, ...] | None, tokens: int, width: int, context: Context) -> Moves:
    """`moves_of`, cached."""
    key = f"moves-{whole}-{tokens}-{width}-{layer}"
    return context.constant(layer, key, lambda: moves_of(layer, whole, tokens, width))  # type: ignore[no-any-return]


@register_family(is_move)
class MoveRule(Rule):
    """Bounds stay by token if each output token is made of one input token; if tokens are mixed, a sample is bounded as one vector."""

    def step(self, layer: nn.Module, state: State, context: Context) -> State:
        m = cached_moves(layer, state.whole, state.tokens, state.width, context)
        by_token = m.tokens if state.whole is None and len(m.shape) == 2 else None
        if by_token is not None:
            copies, size, apart, many = by_token.copies, m.token_size, by_token.apart, 1
            tokens, width, whole = len(by_token.owner), m.out[-1], None
        else:
            # One vector, or all tokens that are read together.
            many = len(m.read) if state.whole is None and len(m.shape) == 2 else 1
            copies, size, apart = m.copies, m.size, False
            tokens, width = (m.out[0], m.outputs // m.out[0]) if m.by_token else (1, m.outputs)
            whole = m.out if len(m.out) > 1 and not m.by_token else None
        root = growth(copies, "l2") * growth(many, "l2")
        lost = m.rounding_error(size, width, context)
        after = replace(
            state,
            norm=_with_constants(root * state.norm, size, apart) + lost,
            change=growth(copies, state.space) * growth(many, state.space) * state.change,
            rounding=root * state.rounding + lost,
            tokens=tokens,
            width=width,
            whole=whole,
        )
        return context.guard_overflow(after)


def _with_constants(norm: Tensor, size: float, apart: bool) -> Tensor:
    """≥ the norm of a vector of norm ≤ `norm` and constants of norm ≤ size together; apart: they are never in the same token."""
    if not size:
        return norm
    return norm.clamp_min(size) if apart else torch.hypot(norm, torch.full_like(norm, size)) * (1 + 1e-15)
