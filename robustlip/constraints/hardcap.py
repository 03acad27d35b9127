"""Hard cap: min(w_max, σ), by the published polynomials, or exactly by the matrix sign function."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from robustlip.constraints.method import Guarantee, Method, StepTaken
from robustlip.constraints.norms import fast_norm_bound, gram_of, times
from robustlip.muon import POLYNOMIALS, even_part, odd_quintics, orthogonalize

# Odd quintics that together approximate min(1, x) on [0, 3] from above and below, at most 1.0109 (docs/theory.md, section 12).
_QUINTICS = (
    (0.805032, 0.206361, -0.019763),
    (0.649867, 0.162935, -0.011150),
    (1.810259, -0.200265, 0.008251),
    (1.004384, -0.183490, 0.014413),
)
_QUINTIC_DOMAIN, _QUINTIC_PEAK = 3.0, 1.0109

# Cubic steps t(3 − t²)/2. After Muon's six steps they map signs from [0.9955, 0.9994] to 1 within 10⁻¹⁶, and their slope near 0 is large enough for
# an overshoot of 1.2·10⁻⁵; five steps map t from [√½, 1] to 1 within 10⁻¹².
_POLISH, _FROM_ROOT_HALF = 4, 5
_MSIGN_OVERSHOOT = 2e-5


def hard_cap_polynomial(matrix: Tensor, cap: Tensor | float = 1.0) -> Tensor:
    """The published polynomials, ≈ min(w, σ) for singular values of (..., m, n) in [0, 3w], at most 1.0109 w. cap: w, one or (..., 1, 1)."""
    m, n = matrix.shape[-2:]
    if max(m, n) >= 2 * min(m, n):
        return times(_even_factor(gram_of(matrix).div_(cap * cap)), matrix)
    x = (matrix.mT if m > n else matrix) / cap
    x = cap * odd_quintics(x.reshape(-1, *x.shape[-2:]).contiguous(), _QUINTICS).reshape(x.shape)
    return x.mT if m > n else x


def _even_factor(gram: Tensor) -> Tensor:
    """P with P·X = the quintics of X, from G = XXᵀ (..., m, m): all are polynomials of G and commute, so X is used twice, not eight times.

    Their slopes are below 2, so the loss by squaring small singular values (an absolute unit of the dtype) stays that small: 10⁻⁶ in float32.
    """
    square = gram.reshape(-1, *gram.shape[-2:])
    factors = list[Tensor]()
    for a, b, c in _QUINTICS:
        if factors:
            square = factors[-1] @ square @ factors[-1]
        factors.append(even_part(square, b, c))
        factors[-1].diagonal(dim1=-2, dim2=-1).add_(a)
    return reduce(torch.matmul, factors).reshape(gram.shape)


def hard_cap_msign(matrix: Tensor, cap: Tensor) -> Tensor:
    """min(w, σ) = ½[(w + σ) − |w − σ|] on the singular values of (K, m, n); cap: w, (K, 1, 1). Source: Su 2025; Cesista 2025.

    In units of w, with s = sign(1 − σ) = sign(1 − σ²), it is ½[(1 − s)·1 + (1 + s)σ]. The sign is that of the symmetric matrix I − MMᵀ, and 1
    is replaced by t = the singular values of msign(M), which matter only if σ > 1. Signs and t are polynomials with values in [0, 1]: below
    the cap the result is a mean of σ and at most 1, so never above 1; above the cap it exceeds 1 by at most ½(1 − |s|)(σ − 1), below 2·10⁻⁵ for
    σ ≤ √2. Matrices with larger σ are capped repeatedly; each round removes at least a third of the excess.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix) / cap
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    while True:
        bound = fast_norm_bound(x, 4)[:, None, None]
        gram = x @ x.mT
        # The largest |1 − σ²|: 1 at σ = 0, bound² − 1 at the other end.
        signs = _sign((eye - gram) / (bound.square() - 1).clamp_min(1.0))
        near = bool((bound <= 1.41).all())
        if near or not bool(torch.isfinite(bound).all()):
            x = 0.5 * ((eye - signs) @ _inverse_roots(gram) + eye + signs) @ x
            return cap * (x.mT if tall else x)
        x = 0.5 * ((eye - signs) @ _polished(orthogonalize(x)) + (eye + signs) @ x)


def _spectrum(matrix: Tensor, cap: Tensor) -> tuple[Tensor, Tensor]:
    """(λ = σ²/w² (K, k), ascending; singular vectors (K, k, k) on the side of gram_of) of matrices (K, m, n). cap: w, (K, 1, 1).

    One decomposition in place of a dozen products or more: faster on a CPU, slower on a GPU. An eigenvalue is known to a unit of the largest.
    Values that are not finite give NaN, because eigh would raise an error without the name of the weight.
    """
    gram = gram_of(matrix).div_(cap * cap)
    if not bool(torch.isfinite(gram).all()):
        return torch.full_like(gram[..., 0], torch.nan), torch.full_like(gram, torch.nan)
    values, vectors = torch.linalg.eigh(gram)
    return values, vectors


def hard_cap_eigh(matrix: Tensor, cap: Tensor) -> Tensor:
    """The same by eigenvalues. Matrices far above the cap are mapped again once their eigenvalues are near the cap's size."""
    far = True
    while far:
        values, vectors = _spectrum(matrix, cap)
        # Only the excess above the cap is subtracted, so that values below it are not even rounded. NaN counts as above.
        above = int((~(values <= 1)).sum(-1).max())
        below = values.shape[-1] - above
        top, values = vectors[..., below:], values[..., below:]
        excess = top * (1 - values.clamp_min(1.0).rsqrt())[..., None, :]
        matrix = matrix - (matrix @ excess @ top.mT if matrix.shape[-2] > matrix.shape[-1] else excess @ (top.mT @ matrix))
        far = bool((values > 4).any())
    return matrix


def hard_cap_polynomial_eigh(matrix: Tensor, cap: Tensor) -> Tensor:
    """hard_cap_polynomial by eigenvalues."""
    values, vectors = _spectrum(matrix, cap)
    x = root = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    for a, b, c in _QUINTICS:
        x = x * (a + (b + c * x.square()) * x.square())
    return times((vectors * (x / root)[..., None, :]) @ vectors.mT, matrix)


def _inverse_roots(gram: Tensor) -> Tensor:
    """t/σ for the eigenvalues σ² ≤ 2 of gram (K, m, m), with t from σ/√2 by cubic steps: msign(M) is this matrix times M for σ ≥ 1.

    It uses m×m matrices, where msign uses products with M. Rounding noise far below 1 grows by 2.25 per step, so σ must not be larger.
    """
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    roots, squares = eye / math.sqrt(2), gram / 2  # t/σ and t²
    for _ in range(_FROM_ROOT_HALF):
        factor = 1.5 * eye - 0.5 * squares
        roots, squares = roots @ factor, factor @ squares @ factor
    return roots


def _polished(x: Tensor) -> Tensor:
    for _ in range(_POLISH):
        x = torch.baddbmm(x, x @ x.mT, x, beta=1.5, alpha=-0.5)
    return x


def _sign(symmetric: Tensor) -> Tensor:
    """The matrix sign of symmetric (K, m, m) with eigenvalues in [−1, 1]. Odd polynomials keep eigenvalues in [−1, 1] and their signs."""
    # Not orthogonalize, which divides by the Frobenius norm, up to √m times more than needed; the slope near 0 would be too small.
    x = odd_quintics(symmetric, POLYNOMIALS["six-step"].steps)
    return _polished((x + x.mT) / 2)


class HardCap(Method):
    """≈ min(w_max, σ) by the published quintics. Hard up to an overshoot of 0.0109; values below w_max change by up to 5 %.

    The slope at 0 is 0.951, so values far below the cap lose 4.9 % at every step, as with a weight decay: with a cap that the steps cannot reach
    (about 20 step lengths) the weights collapse. HardCapMsign does not change such values.

    The polynomials are valid on [0, 3 w_max]. Matrices with larger norms are first divided down to that.
    """

    name = "hard-cap"
    guarantee = Guarantee(_QUINTIC_PEAK)

    def __call__(self, stack: Tensor, cap: Tensor, step: StepTaken) -> Tensor:
        if step.update is None or any(u > (_QUINTIC_DOMAIN - _QUINTIC_PEAK) * w for u, w in zip(step.update, step.w_max, strict=True)):
            stack = stack / (fast_norm_bound(stack, 4)[:, None, None] / cap / _QUINTIC_DOMAIN).clamp_min(1.0)
        return hard_cap_polynomial_eigh(stack, cap) if stack.device.type == "cpu" else hard_cap_polynomial(stack, cap)


class HardCapMsign(Method):
    """min(w_max, σ) by the matrix sign function: values below the cap do not change. Hard up to an overshoot of 2·10⁻⁵, after any step.

    On a CPU by eigenvalues, which take a quarter of the time there; on a GPU the matrix sign is faster.
    """

    name = "hard-cap-msign"
    guarantee = Guarantee(1 + _MSIGN_OVERSHOOT)

    def __call__(self, stack: Tensor, cap: Tensor, step: StepTaken) -> Tensor:
        return hard_cap_eigh(stack, cap) if stack.device.type == "cpu" else hard_cap_msign(stack, cap)
