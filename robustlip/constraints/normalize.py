"""Spectral normalisation: division of the whole matrix by max(1, σ/w_max)."""

from __future__ import annotations

from torch import Tensor

from robustlip.constraints.method import Guarantee, Method, StepTaken
from robustlip.constraints.norms import fast_norm_bound


class SpectralNormalize(Method):
    """M / max(1, σ/w_max), σ an upper bound of the norm (Gram iteration). Hard, after any step of any optimiser."""

    name = "spectral-normalize"
    guarantee = Guarantee(1.0)

    def __call__(self, stack: Tensor, cap: Tensor, step: StepTaken) -> Tensor:
        excess = (fast_norm_bound(stack) / cap[:, 0, 0]).clamp_min(1.0)
        return stack / excess[..., None, None]
