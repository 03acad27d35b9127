"""Soft cap: two cubics that reduce the singular values to the cap, as little as the step requires."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from torch import Tensor

from robustlip.constraints.method import Guarantee, Method, StepTaken
from robustlip.constraints.norms import fast_norm_bound
from robustlip.errors import BadInput

# How far a matrix may exceed the cap: a soft cap exists up to about 1.33 times the cap (soft_cap_coupling refuses more).
_LARGEST_EXCESS = 0.25
# Measured excesses are rounded up to multiples of this, so that few couplings have to be computed.
_GRID = 1 / 256


@lru_cache(maxsize=1024)
def soft_cap_coupling(w_max: float, update_norm: float, decay: float = 0.0) -> float:
    """The strength a of the soft cap that maps every singular value ≤ w_max·|1 − decay| + update_norm to at most w_max.

    Newhouse et al. 2025, appendix on soft cap: a is the smallest non-negative real root of −k⁹a⁴ + 3k⁷a³ − 3k⁵a² + (k − w_max) = 0,
    k = w_max·|1 − decay| + update_norm. Raises BadInput if the update is too large for w_max, so that some value in [0, k] would
    be mapped above it.
    """
    k = w_max * abs(1 - decay) + update_norm
    if k <= w_max:
        return 0.0
    roots = np.roots([-(k**9), 3 * k**7, -3 * k**5, 0.0, k - w_max])
    real = sorted(float(r.real) for r in roots if abs(r.imag) < 1e-9 * max(1.0, abs(r)) and r.real >= 0)
    # The root determines the image of k only. The guarantee concerns all of [0, k], and fails for updates that are large relative to the cap.
    values = np.linspace(0, k, 513)
    image = values - real[0] * values**3 if real else values
    image = image + real[0] * image**3 if real else values
    if not (np.abs(image) <= w_max * (1 + 1e-9)).all():
        raise BadInput(
            f"expected an update small enough for a soft cap at {w_max}, got one with norm {update_norm:.4g}; lower the learning rate or raise w_max"
        )
    return real[0]


def soft_cap(matrix: Tensor, strength: float | Tensor) -> Tensor:
    """p₂(p₁(M)) with p₁: σ → σ − aσ³ and p₂: σ → σ + aσ³ on the singular values of M (..., m, n). strength: a, or one for each (..., 1, 1)."""
    m, n = matrix.shape[-2:]
    if max(m, n) >= 2 * min(m, n):
        return _wide(matrix, strength) if m <= n else _wide(matrix.mT, strength).mT

    def cubic(x: Tensor, a: float | Tensor) -> Tensor:
        cube = x @ x.mT @ x if m <= n else x @ (x.mT @ x)
        return cube.mul_(a).add_(x)  # in place: at this size a pass over memory costs as much as a product

    return cubic(cubic(matrix, -strength), strength)


def _wide(x: Tensor, strength: float | Tensor) -> Tensor:
    """The same with m×m products: p₁(M) = (1 − E)M with E = aMMᵀ, and p₂ of that is (1 + F)(1 − E)M with F = (1 − E)E(1 − E)."""
    e = (x @ x.mT).mul_(strength)
    squared = e @ e
    f = (squared @ e).add_(e).sub_(squared, alpha=2)  # all are polynomials of one matrix and commute
    # M is added after the product, so that the unchanged part is not rounded.
    return ((f - e).sub_(f @ e) @ x).add_(x)


class SoftCap(Method):
    """p₂∘p₁ with the strength from the coupling. Hard.

    If the optimiser states its update norm (robustlip.muon.Muon), the strength follows from it, as in the paper, and the guarantee holds
    by induction. Otherwise (AdamW) the norm after the step is bounded from above, and the strength is the one that this
    norm requires, 0 within the cap; a matrix that exceeds the cap by more than a quarter is first divided down to that.
    """

    name = "soft-cap"
    guarantee = Guarantee(1.0)

    def __call__(self, stack: Tensor, cap: Tensor, step: StepTaken) -> Tensor:
        if step.update is not None:
            rows = zip(step.w_max, step.update, step.decay, strict=True)
            strengths = [soft_cap_coupling(w, update, decay) for w, update, decay in rows]
        else:
            excess = fast_norm_bound(stack) / cap[:, 0, 0] - 1
            over = ((1 + excess) / (1 + _LARGEST_EXCESS)).clamp_min(1.0)
            stack = stack / over[:, None, None]
            steps = [math.ceil(min(e, _LARGEST_EXCESS) / _GRID) if e > 0 else 0 for e in excess.tolist()]
            # The coupling scales as 1/w², so one grid of couplings for w = 1 serves all caps.
            strengths = [soft_cap_coupling(1.0, n * _GRID) / w**2 for n, w in zip(steps, step.w_max, strict=True)]
        return soft_cap(stack, stack.new_tensor(strengths)[:, None, None])
