"""Radii of a single token through exact Jacobians: ‖J_{l−1}…J_0‖ε and what remainders add, in the place of a product of norms.

docs/theory.md, section 8.

With one token moving, a layer's Jacobian is one D×D block, and all blocks and their products are affordable. The change in front of part l is
    Δ_l = M_{l←0}δ + Σ_{k<l} M_{l←k+1}R_k,      M_{l←k} = J_{l−1}…J_k,
so ‖Δ_l‖ ≤ ‖M_{l←0}‖ε + Σ_k ‖M_{l←k+1}‖‖R_k‖.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from robustlip.domains.expansion.base import Expansion, Pair, bounded, token_norms
from robustlip.domains.expansion.structure import ChainExpansion
from robustlip.numerics.rounding import up
from robustlip.numerics.spectral import spectral_norm_quick

# Error of a Jacobian block that float64 computed, as a fraction of a bound of its norm with nothing cancelled: γ_n with Frobenius norms is n²·2⁻⁵³ of
# spectral ones. This covers n ≤ 2⁹; wider blocks get more.
_BLOCK_ERROR = 2.0**-34


class JacobianChain(ChainExpansion):
    """A chain at single tokens (N, 1, D) whose radii are the smaller of the layer by layer ones and those through exact Jacobians."""

    def __init__(self, chain: ChainExpansion) -> None:
        self.__dict__.update(copy.copy(chain).__dict__)
        count, device = len(chain.clean), chain.clean.device
        blocks: list[Tensor] = []  # M_{l+1←k} for the last l: (N, D', D_k)
        self.norms: list[list[Tensor]] = []  # norms[l][k] ≥ ‖M_{l+1←k}‖ (N,), but for the last l
        gains: list[Tensor] = []
        self.lost = [torch.zeros(count, dtype=torch.float64, device=device)]  # error of the computed M_{l←0} in front of each part
        self.questions: list[tuple[Tensor, list[Pair]] | None] = []
        for l, part in enumerate(self.parts):
            asked = part.functionals() if l else None
            self.questions.append(None if asked is None else self._pulled_back(asked, self.parts[:l]))
            size = part.clean.shape[-1]
            way = blocks[0] if blocks else torch.eye(size, dtype=torch.float64, device=device).expand(count, size, size)
            part.learn_way(way, torch.ones(count, dtype=torch.float64, device=device))
            gain = part.lipschitz() * torch.ones(count, dtype=torch.float64, device=device)
            if l == len(self.parts) - 1:
                self.last_gain = gain.unsqueeze(-1)
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
    def _pulled_back(rows: Tensor, parts: list[Expansion]) -> tuple[Tensor, list[Pair]]:
        """Functionals (A, N, D) in front of a part → their first-order norms at the start and the weights of what the parts on the way add."""
        g, groups = rows.unsqueeze(2), []
        for part in reversed(parts):
            g, weights = part.adjoint(g, two_sided=True)
            groups.append(weights)
        return token_norms(g)[..., 0], [w for group in reversed(groups) for w in group]

    def advance(self, radius: Tensor, error: Tensor, bounds: list[Pair] | None) -> tuple[Tensor, Tensor]:
        first, zero = radius, torch.zeros_like(radius)
        remainders: list[Tensor] = []
        beyond = zero
        bounds = [] if bounds is None else bounds  # remainders are needed even where they are not asked for
        begin = len(bounds)
        for l, (part, lost, question) in enumerate(zip(self.parts, self.lost, self.questions, strict=True)):
            if question is not None:
                part.known(bounded(question[0] * first[:, 0], question[1], bounds[begin:], first[:, 0]))
            part.given(first, beyond + lost.unsqueeze(-1) * first)
            radius, remainder = part.advance(radius, zero, bounds)
            part.forget()  # parts are shared with the chain that this one was made from
            if l == len(self.norms):
                break
            remainders.append(remainder)
            beyond = remainder  # M_{l+1←l+1} is the identity
            for k in range(len(remainders) - 1):
                beyond = beyond + self.norms[l][k + 1].unsqueeze(-1) * remainders[k]
            radius = torch.minimum(radius, up(self.norms[l][0].unsqueeze(-1) * first + beyond))
        return radius, up(error + self.last_gain * beyond + remainder)
