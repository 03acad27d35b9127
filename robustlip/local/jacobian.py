"""Radii of a single token through exact Jacobians: ‖J_{l−1}…J_0‖ε and what remainders add, in the place of a product of norms. MATH.md section 7.

With one token moving, a layer's Jacobian is one D×D block, and all blocks and their products are affordable. The change in front of part l is
    Δ_l = M_{l←0}δ + Σ_{k<l} M_{l←k+1}R_k,      M_{l←k} = J_{l−1}…J_k,
so ‖Δ_l‖ ≤ ‖M_{l←0}‖ε + Σ_k ‖M_{l←k+1}‖‖R_k‖.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from robustlip.local.base import Pair
from robustlip.local.structure import ChainExpansion
from robustlip.rounding import up
from robustlip.spectral import gram_iteration_bound

# Error of a Jacobian block that float64 computed, as a fraction of a bound of its norm with nothing cancelled: γ_n with Frobenius norms is n²·2⁻⁵³ of
# spectral ones. This covers n ≤ 2⁹; wider blocks get more.
_BLOCK_ERROR = 2.0**-34


class JacobianChain(ChainExpansion):
    """A chain at single tokens (N, 1, D) whose radii are the smaller of the layer by layer ones and those through exact Jacobians."""

    def __init__(self, chain: ChainExpansion) -> None:
        self.__dict__.update(copy.copy(chain).__dict__)
        count, device = len(chain.clean), chain.clean.device
        blocks: list[Tensor] = []  # M_{l+1←k} for the last l: (N, D', D_k)
        self.norms: list[list[Tensor]] = []  # norms[l][k] ≥ ‖M_{l+1←k}‖ (N,)
        gains: list[Tensor] = []
        self.lost = [torch.zeros(count, dtype=torch.float64, device=device)]  # error of the computed M_{l←0} in front of each part
        for part in self.parts:
            size = part.clean.shape[-1]
            way = blocks[0] if blocks else torch.eye(size, dtype=torch.float64, device=device).expand(count, size, size)
            part.learn_way(way, torch.ones(count, dtype=torch.float64, device=device))
            jacobian = part.jacobian()
            gain = part.lipschitz() * torch.ones(count, dtype=torch.float64, device=device)
            blocks = [jacobian @ m for m in blocks] + [jacobian]
            gains = [g * gain for g in gains] + [gain]
            stacked = torch.stack(blocks, 1)  # (N, l + 1, D', D): all parts of a chain of residuals have one width
            norm = gram_iteration_bound(stacked, 4)
            wide = max(1.0, (size / 2**9) ** 2)
            error = _BLOCK_ERROR * wide * len(blocks) * torch.stack(gains, 1)
            self.lost.append(error[:, 0])
            self.norms.append(list(up(norm + error).unbind(1)))

    def advance(self, radius: Tensor, error: Tensor, bounds: list[Pair]) -> tuple[Tensor, Tensor]:
        first, zero = radius, torch.zeros_like(radius)
        remainders: list[Tensor] = []
        beyond = zero
        for part, norms, lost in zip(self.parts, self.norms, self.lost[:-1], strict=True):
            part.given(first, beyond + lost.unsqueeze(-1) * first)
            radius, remainder = part.advance(radius, zero, bounds)
            remainders.append(remainder)
            beyond = remainder  # M_{l+1←l+1} is the identity
            for k in range(len(remainders) - 1):
                beyond = beyond + norms[k + 1].unsqueeze(-1) * remainders[k]
            radius = torch.minimum(radius, up(norms[0].unsqueeze(-1) * first + beyond))
        return radius, up(error + beyond)
