"""Decay of all singular values, or of the largest one."""

from __future__ import annotations

import math

from torch import Tensor

from robustlip.constraints.method import Guarantee, Method, StepTaken
from robustlip.constraints.norms import top_singular


class WeightDecay(Method):
    """σ → (1 − λη)σ, all singular values, η the learning rate in use. strength: λ.

    Guarantees nothing by itself. With an optimiser whose step has norm at most pη (Muon: p is the peak of its polynomial) all norms
    stay at most max(initial, p/λ), with every schedule: (1 − λη)(p/λ + pη) < p/λ. For one of H heads the bound is √H times that. w_max is not used.
    """

    name = "weight-decay"
    guarantee = Guarantee(math.inf)

    def __init__(self, strength: float = 0.1) -> None:
        self.strength = strength

    def __call__(self, stack: Tensor, cap: Tensor, step: StepTaken) -> Tensor:
        return stack * (1 - self.strength * stack.new_tensor(step.rate)[:, None, None])


class SpectralWeightDecay(Method):
    """σ₁ → (1 − λ)σ₁ at each step, only the largest singular value. strength: λ. No guarantee; w_max is not used.

    Source: Newhouse et al. 2025, section 3. Power iteration finds the direction.
    """

    name = "spectral-weight-decay"
    guarantee = Guarantee(math.inf)

    def __init__(self, strength: float = 0.1) -> None:
        self.strength = strength

    def __call__(self, stack: Tensor, cap: Tensor, step: StepTaken) -> Tensor:
        u, sigma, v = top_singular(stack)
        return stack - (self.strength * sigma * u) @ v.mT
