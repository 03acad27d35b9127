"""Radii of a single token through exact Jacobians: ‖J_{l−1}…J_0‖ε and what remainders add, in the place of a product of norms.

docs/theory.md, section 8.

With one token moving, a layer's Jacobian is one D×D block, and all blocks and their products are affordable. The change in front of part l is
    Δ_l = M_{l←0}δ + Σ_{k<l} M_{l←k+1}R_k,      M_{l←k} = J_{l−1}…J_k,
so ‖Δ_l‖ ≤ ‖M_{l←0}‖ε + Σ_k ‖M_{l←k+1}‖‖R_k‖.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robustlip.domains.expansion.base import Ball, Behind, Expansion, Functionals, Pair, Split, bounded, token_norms
from robustlip.domains.expansion.structure import ChainExpansion
from robustlip.numerics.rounding import up
from robustlip.numerics.spectral import spectral_norm_quick

# Error of a Jacobian block that float64 computed, as a fraction of a bound of its norm with nothing cancelled: γ_n with Frobenius norms is n²·2⁻⁵³ of
# spectral ones. This covers n ≤ 2⁹; wider blocks get more.
_BLOCK_ERROR = 2.0**-34


class JacobianChain(ChainExpansion):
    """A chain at single tokens (N, 1, D) whose radii are the smaller of the layer by layer ones and those through exact Jacobians."""

    way: Tensor | None = None  # M_{l←0} of the last l, as float64 has it; None where that is the identity
    way_gain: Tensor | float = 1.0  # ≥ its norm, nothing cancelled

    def __init__(self, chain: ChainExpansion) -> None:
        self.__dict__.update(chain.__dict__)
        self.parts = list(chain.parts)
        count, device = len(chain.clean), chain.clean.device
        blocks: list[Tensor] = []  # M_{l+1←k} for the last l: (N, D', D_k)
        self.norms: list[list[Tensor]] = []  # norms[l][k] ≥ ‖M_{l+1←k}‖ (N,), but for the last l
        gains: list[Tensor] = []
        self.lost = [torch.zeros(count, dtype=torch.float64, device=device)]  # error of the computed M_{l←0} in front of each part
        # Of each part: its functionals, their first-order norms at the start, and the weights of what the parts on the way add.
        self.questions: list[tuple[Functionals, Tensor, list[Pair]] | None] = []
        for l, part in enumerate(chain.parts):
            asked = part.functionals() if l else None
            self.questions.append(None if asked is None else (asked, *self._pulled_back(asked.vectors, chain.parts[:l])))
            size = part.clean.shape[-1]
            way = blocks[0] if blocks else torch.eye(size, dtype=torch.float64, device=device).expand(count, size, size)
            self.parts[l] = part.with_way(way, torch.ones(count, dtype=torch.float64, device=device))
            gain = part.lipschitz() * torch.ones(count, dtype=torch.float64, device=device)
            if l == len(chain.parts) - 1:
                self.last_gain = gain.unsqueeze(-1)
                self.way, self.way_gain = (blocks[0], gains[0]) if blocks else (None, 1.0)
                break  # of what is behind the last part only its rounding in the head is read: its exact Jacobian would buy nothing
            jacobian = part.jacobian()
            blocks = [jacobian @ m for m in blocks] + [jacobian]
            gains = [g * gain for g in gains] + [gain]
            stacked = torch.stack(blocks, 1)  # (N, l + 1, D', D): all parts of a chain of residuals have one width
            norm = spectral_norm_quick(stacked)
            wide = max(1.0, (size / 2**9) ** 2)
            error = _BLOCK_ERROR * wide * len(blocks) * torch.stack(gains, 1)
            self.lost.append(error[:, 0])
            self.norms.append(list(up(norm + error).unbind(1)))

    @staticmethod
    def _pulled_back(vectors: Tensor, parts: list[Expansion]) -> tuple[Tensor, list[Pair]]:
        """Vectors (A, N, D) in front of a part → their first-order norms at the start and the weights of what the parts on the way add."""
        g, groups = vectors.unsqueeze(2), []
        for part in reversed(parts):
            g, weights = part.adjoint(g, two_sided=True)
            groups.append(weights)
        return token_norms(g)[..., 0], [w for group in reversed(groups) for w in group]

    def end_to_end(self) -> tuple[Tensor, Tensor]:
        """(the Jacobian of all parts (N, D', D₀) as float64 has it, ≥ the norm of its error (N,))."""
        last = self.parts[-1].jacobian()
        wide = max(1.0, (last.shape[-1] / 2**9) ** 2)
        lost = up(_BLOCK_ERROR * wide * len(self.parts) * self.way_gain * self.last_gain.squeeze(-1))
        return last if self.way is None else last @ self.way, lost

    def advance(self, ball: Ball, remainder: bool = True) -> Behind:
        # What is not linear is needed even where it is not asked for.
        first = radius = ball.radius
        zero = torch.zeros_like(radius)
        remainders: list[Tensor] = []
        beyond = zero
        bounds: list[Pair] = []
        for l, (part, lost, question) in enumerate(zip(self.parts, self.lost, self.questions, strict=True)):
            functionals = None
            if question is not None:
                asked, norms, weights = question
                functionals = replace(asked, sizes=bounded(norms * first[:, 0], weights, bounds, first[:, 0]))
            split = Split(first, beyond + lost.unsqueeze(-1) * first)
            behind = part.advance(Ball(radius, zero, ball.weight_radius, split, functionals))
            radius = behind.radius
            bounds += behind.bounds
            if l == len(self.norms):
                break
            remainders.append(behind.error)
            beyond = behind.error  # M_{l+1←l+1} is the identity
            for k in range(len(remainders) - 1):
                beyond = beyond + self.norms[l][k + 1].unsqueeze(-1) * remainders[k]
            radius = torch.minimum(radius, up(self.norms[l][0].unsqueeze(-1) * first + beyond))
        return Behind(radius, up(ball.error + self.last_gain * beyond + behind.error), bounds if remainder else [])
