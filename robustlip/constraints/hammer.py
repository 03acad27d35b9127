"""The spectral hammer: sets the largest singular value and changes no other."""

from __future__ import annotations

import math

from torch import Tensor

from robustlip.constraints.method import Guarantee, Method, StepTaken
from robustlip.constraints.norms import top_singular


class SpectralHammer(Method):
    """σ₁ → w_max, one direction per step. No guarantee: a step may push several singular values above w_max, and only one is reduced.

    Source: Newhouse et al. 2025, section 3, who use it with AdamW, whose steps have low rank. Power iteration finds the direction.
    """

    name = "spectral-hammer"
    guarantee = Guarantee(math.inf)

    def __call__(self, stack: Tensor, cap: Tensor, step: StepTaken) -> Tensor:
        u, sigma, v = top_singular(stack)
        return stack + ((cap - sigma) * u) @ v.mT
