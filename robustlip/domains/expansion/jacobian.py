"""Radii of a single token through exact Jacobians: ‖J_{l−1}…J_0‖ε plus the remainders, instead of a product of norms. docs/theory.md, section 8.

If one token changes, the Jacobian of a layer is one D×D block, and all blocks and their products can be computed. The change before part l is
    Δ_l = M_{l←0}δ + Σ_{k<l} M_{l←k+1}R_k,      M_{l←k} = J_{l−1}…J_k,
so ‖Δ_l‖ ≤ ‖M_{l←0}‖ε + Σ_k ‖M_{l←k+1}‖‖R_k‖.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robustlip.domains.expansion.base import Ball, Expansion, Functionals, OutputBounds, SplitChange, Term, decrease_bound, token_norms
from robustlip.domains.expansion.structure import ChainExpansion
from robustlip.numerics.rounding import up
from robustlip.numerics.spectral import spectral_norm_quick

# The float64 error of a Jacobian block, relative to a bound of its norm in which nothing cancels. With Frobenius norms γ_n is n²·2⁻⁵³ of spectral
# norms, so this covers n ≤ 2⁹; wider blocks get a larger value.
_BLOCK_ERROR = 2.0**-34


class JacobianChain(ChainExpansion):
    """A chain at single tokens (N, 1, D). Its radii are the smaller of the layer by layer bounds and the bounds through exact Jacobians."""

    input_map: Tensor | None = None  # M_{l←0} of the last l, computed in float64; None for the identity
    input_map_gain: Tensor | float = 1.0  # ≥ its norm, a product of norms

    def __init__(self, chain: ChainExpansion) -> None:
        self.__dict__.update(chain.__dict__)
        self.parts = list(chain.parts)
        count, device = len(chain.clean), chain.clean.device
        blocks: list[Tensor] = []  # M_{l+1←k} for the last l: (N, D', D_k)
        self.norms: list[list[Tensor]] = []  # norms[l][k] ≥ ‖M_{l+1←k}‖ (N,), but for the last l
        gains: list[Tensor] = []
        self.map_errors = [torch.zeros(count, dtype=torch.float64, device=device)]  # error of the computed M_{l←0} before each part
        # For each part: its functionals, their first-order norms at the start, and the weights of the remainders of the parts before it.
        self.functionals_by_part: list[tuple[Functionals, Tensor, list[Term]] | None] = []
        for l, part in enumerate(chain.parts):
            asked = part.functionals() if l else None
            self.functionals_by_part.append(None if asked is None else (asked, *self._propagated_back(asked.vectors, chain.parts[:l])))
            size = part.clean.shape[-1]
            input_map = blocks[0] if blocks else torch.eye(size, dtype=torch.float64, device=device).expand(count, size, size)
            self.parts[l] = part.with_input_map(input_map, torch.ones(count, dtype=torch.float64, device=device))
            gain = part.lipschitz() * torch.ones(count, dtype=torch.float64, device=device)
            if l == len(chain.parts) - 1:
                self.last_gain = gain.unsqueeze(-1)
                self.input_map, self.input_map_gain = (blocks[0], gains[0]) if blocks else (None, 1.0)
                break  # the Jacobian of the last part would only sharpen the rounding bound of the head
            jacobian = part.jacobian()
            blocks = [jacobian @ m for m in blocks] + [jacobian]
            gains = [g * gain for g in gains] + [gain]
            stacked = torch.stack(blocks, 1)  # (N, l + 1, D', D): all parts of a chain of residuals have one width
            norm = spectral_norm_quick(stacked)
            wide = max(1.0, (size / 2**9) ** 2)
            error = _BLOCK_ERROR * wide * len(blocks) * torch.stack(gains, 1)
            self.map_errors.append(error[:, 0])
            self.norms.append(list(up(norm + error).unbind(1)))

    @staticmethod
    def _propagated_back(vectors: Tensor, parts: list[Expansion]) -> tuple[Tensor, list[Term]]:
        """Vectors (A, N, D) before a part → their first-order norms at the start and the weights of the remainders of the parts before it."""
        g, groups = vectors.unsqueeze(2), []
        for part in reversed(parts):
            g, weights = part.adjoint(g, two_sided=True)
            groups.append(weights)
        return token_norms(g)[..., 0], [w for group in reversed(groups) for w in group]

    def end_to_end(self) -> tuple[Tensor, Tensor]:
        """(the Jacobian of all parts (N, D', D₀) computed in float64, a bound of its error (N,))."""
        last = self.parts[-1].jacobian()
        wide = max(1.0, (last.shape[-1] / 2**9) ** 2)
        lost = up(_BLOCK_ERROR * wide * len(self.parts) * self.input_map_gain * self.last_gain.squeeze(-1))
        return last if self.input_map is None else last @ self.input_map, lost

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        # The nonlinear part is needed for the radii even if the caller does not ask for it.
        first = radius = ball.radius
        zero = torch.zeros_like(radius)
        remainders: list[Tensor] = []
        rest = zero
        bounds: list[Term] = []
        for l, (part, lost, question) in enumerate(zip(self.parts, self.map_errors, self.functionals_by_part, strict=True)):
            functionals = None
            if question is not None:
                asked, norms, weights = question
                functionals = replace(asked, sizes=decrease_bound(norms * first[:, 0], weights, bounds, first[:, 0]))
            split = SplitChange(first, rest + lost.unsqueeze(-1) * first)
            after = part.advance(Ball(radius, zero, ball.weight_radius, split, functionals))
            radius = after.radius
            bounds += after.bounds
            if l == len(self.norms):
                break
            remainders.append(after.error)
            rest = after.error  # M_{l+1←l+1} is the identity
            for k in range(len(remainders) - 1):
                rest = rest + self.norms[l][k + 1].unsqueeze(-1) * remainders[k]
            radius = torch.minimum(radius, up(self.norms[l][0].unsqueeze(-1) * first + rest))
        return OutputBounds(radius, up(ball.error + self.last_gain * rest + after.error), bounds if remainder else [])
