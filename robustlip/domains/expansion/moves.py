"""Operations that rearrange entries: linear, with adjoints that send each entry back to its place. docs/theory.md, sections 3, 7 and 8."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustlip.domains.expansion.base import ADJOINT_SLACK, Ball, Expansion, OutputBounds, Scope, Term, register_family, token_norms
from robustlip.domains.norms.moves import cached_moves
from robustlip.geometry import length
from robustlip.numerics.rounding import up
from robustlip.ops.moves import growth, is_move


@register_family(is_move, any_space=True)
class MovesExpansion(Expansion):
    """Bounds stay by token if each output token is made of one input token; if tokens are mixed, all entries of a sample form one vector."""

    def __init__(self, layer: nn.Module, clean: Tensor, scope: Scope) -> None:
        tokens, width = clean.shape[1:]
        m = self.moves = cached_moves(layer, scope.whole, tokens, width, scope.context)
        self.scope, self.space, self.tokens, self.width = scope, scope.space, tokens, width
        self.by_tokens = m.tokens if scope.whole is None and len(m.shape) == 2 else None
        after = len(self.by_tokens.owner) if self.by_tokens is not None else m.out[0] if m.by_token else 1
        self.whole = m.out if len(m.out) > 1 and self.by_tokens is None and not m.by_token else None
        self.source = m.source.to(clean.device)
        self.moved = self.source >= 0
        taken = clean.flatten(1)[:, self.source.clamp_min(0)]
        self.clean = torch.where(self.moved, taken, m.fixed.to(clean.device)).unflatten(-1, (after, -1))
        self.copies = m.copies if self.by_tokens is None else self.by_tokens.copies
        self.rounding_error = 0.0
        if m.rounds:
            size, count = (m.size, m.outputs) if self.by_tokens is None else (m.token_size, m.out[-1])
            self.rounding_error = m.rounding_error(size, count, scope) * (math.sqrt(count) * (1 + 1e-15) if scope.space == "l1" else 1.0)

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        in_space, in_l2 = growth(self.copies, self.space), growth(self.copies, "l2")
        if self.by_tokens is not None:
            owner = self.by_tokens.owner.to(ball.radius.device)
            radius, error = (torch.where(owner >= 0, r[..., owner.clamp_min(0)], 0.0) for r in (ball.radius, ball.error))
        elif self.tokens == 1:
            radius, error = ball.radius, ball.error
        else:
            read = self.moves.read.to(ball.radius.device)
            radius = length(ball.radius[..., read], self.space, ball.radius.dim() - 1).unsqueeze(-1) * (1 + 1e-12)
            error = torch.linalg.vector_norm(ball.error[..., read], dim=-1, keepdim=True) * (1 + 1e-12)
        if self.copies != 1 or self.tokens > 1:
            radius, error = up(radius * in_space), up(error * in_l2)
        if self.by_tokens is None and self.moves.by_token:
            radius, error = (r.expand(*r.shape[:-1], self.clean.shape[1]) for r in (radius, error))
        fresh = torch.full_like(radius, self.rounding_error)
        bounds: list[Term] = [fresh, ball.radius.amax(-1, keepdim=True)] if remainder else []
        return OutputBounds(radius + fresh, error + fresh, bounds)

    def lipschitz(self) -> Tensor | float:
        return growth(self.moves.copies, "l2") * math.sqrt(self.tokens)

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        flat = g.flatten(-2)[..., self.moved]
        back = g.new_zeros(*g.shape[:-2], self.tokens * self.width)
        if self.moves.copies > 1:
            back.index_add_(-1, self.source[self.moved], flat)
        else:
            back[..., self.source[self.moved]] = flat
        norms = token_norms(g)
        # The sum over copies rounds; an entry with one copy does not.
        slack = ADJOINT_SLACK * self.moves.copies if self.moves.copies > 1 else 0.0
        factor = slack * math.sqrt(self.width) if self.space == "linf" else slack
        return back.unflatten(-1, (self.tokens, self.width)), [norms, factor * norms.sum(-1, keepdim=True)]
