"""Spectral norms: guaranteed upper bounds for certificates, and one lower estimate for reports. docs/theory.md, section 2.

Power iteration converges from below, so no certificate may use its result as a bound.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from robustlip.errors import BadInput
from robustlip.numerics.rounding import TINY, U64, gamma, norm_up, up

# Above this size Gram iteration takes minutes, so that a second and a third attempt at a Cholesky factor of tI − S is faster.
_WIDE = 512


def _scaled(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(A, e) with W = A·2^e for each matrix, the largest |entry| of A in [½, 1): float64 products of A neither overflow nor underflow."""
    if weight.dim() < 2:
        raise BadInput(f"expected matrices (..., m, n), got shape {tuple(weight.shape)}; reshape the weight to a matrix")
    a = weight.detach().to(torch.float64)
    largest = torch.maximum(a.amax((-2, -1), keepdim=True), -a.amin((-2, -1), keepdim=True))
    if not bool(torch.isfinite(largest).all()):
        raise BadInput("expected finite weights, got NaN or infinity; retrain or repair the weights")
    _, exponent = torch.frexp(largest)
    # Two factors, because 2^-e itself can overflow for subnormal matrices.
    half = -exponent // 2
    one = torch.ones(exponent.shape, dtype=a.dtype, device=a.device)
    return a * torch.ldexp(one, half) * torch.ldexp(one, -exponent - half), exponent[..., 0, 0]


def _unscaled(norm: Tensor, exponent: Tensor) -> Tensor:
    half = exponent // 2
    return up(torch.ldexp(torch.ldexp(norm, half), exponent - half))


def _gram(a: Tensor) -> tuple[Tensor, Tensor]:
    """(G, error): the smaller of AᵀA and AAᵀ, and a bound of ‖fl(G) − G‖_F (underflow included)."""
    m, n = a.shape[-2:]
    gram = a.mT @ a if n <= m else a @ a.mT
    frobenius2 = a.square().sum((-2, -1)) * (1 + gamma(m * n + 2, U64))
    return gram, frobenius2 * gamma(max(m, n) + 2, U64) + m * n * max(m, n) * TINY[torch.float64]


def spectral_norm_bound(weight: Tensor) -> Tensor:
    """σ ≥ ‖W‖₂ for each matrix of `weight` (..., m, n): float64 (...), guaranteed, with a relative error of about 10⁻¹¹.

    Uses an eigendecomposition of the smaller Gram matrix and its residual: λ_max(G) ≤ max(Λ)·(1 + ‖QᵀQ − I‖_F) + ‖G − QΛQᵀ‖_F holds for any Q and Λ
    that an eigensolver returns. The rounding error of every product is added. Works for any dtype and scale (zero and subnormal matrices too).
    Raises BadInput for NaN, infinity or fewer than 2 dimensions.
    """
    a, exponent = _scaled(weight)
    gram, gram_error = _gram(a)
    gram = (gram + gram.mT) / 2  # eigh reads one triangle only; the symmetric part is at least as close to the true Gram matrix
    n = gram.shape[-1]
    values, q = torch.linalg.eigh(gram)
    top = values.amax(-1).clamp_min(0)
    q_frobenius2 = q.square().sum((-2, -1)) * (1 + gamma(n * n + 2, U64))
    eye = torch.eye(n, dtype=torch.float64, device=gram.device)
    defect = torch.linalg.matrix_norm(q.mT @ q - eye) * (1 + gamma(n * n + 2, U64)) + q_frobenius2 * gamma(n + 3, U64) + n * U64
    largest = values.abs().amax(-1)
    residual = torch.linalg.matrix_norm(gram - (q * values.unsqueeze(-2)) @ q.mT) * (1 + gamma(n * n + 2, U64))
    residual = residual + q_frobenius2 * largest * gamma(n + 4, U64) + torch.linalg.matrix_norm(gram) * 4 * U64
    total = top * (1 + defect) + residual + gram_error
    return _unscaled(up(total).sqrt(), exponent) * (a.abs().amax((-2, -1)) > 0)


def gram_iteration_bound(weight: Tensor, iterations: int = 10) -> Tensor:
    """σ ≥ ‖W‖₂ for each matrix of `weight` (..., m, n): float64 (...), guaranteed, from matrix products only (fast on a GPU).

    Gram iteration (Delattre et al. 2023): σ ≤ ‖(AᵀA)^(2^k)‖_F^(1/2^(k+1)), too large by a factor of at most n^(1/2^(k+2)).
    The rounding error of each squaring G ← GᵀG/‖·‖_F is added when the result is scaled back: σ(G_i)² ≤ s_i·σ(G_{i+1}) + γ_n‖G_i‖_F².
    Raises BadInput as `spectral_norm_bound`, and for fewer than one iteration.
    """
    if iterations < 1:
        raise BadInput(f"expected at least one Gram iteration, got {iterations}; 10 is within 0.02 % for n = 1000")
    a, exponent = _scaled(weight)
    gram, gram_error = _gram(a)
    n = gram.shape[-1]
    loss = gamma(n + 4, U64)

    def normalised(g: Tensor) -> tuple[Tensor, Tensor]:
        size = torch.linalg.matrix_norm(g, keepdim=True)
        size = torch.where(size > 0, size, torch.ones_like(size))
        return g / size, size[..., 0, 0]

    scales = []
    gram, size = normalised(gram)
    scales.append(size)
    for _ in range(iterations):
        gram, size = normalised(gram.mT @ gram)
        scales.append(size)
    # ‖G_k‖_F, which is 1 up to rounding, bounds σ(G_k). Every factor below is enlarged by more than its rounding error.
    slack = 1 + gamma(n * n + 8, U64)
    sigma = torch.linalg.matrix_norm(gram) * slack
    for size in reversed(scales[1:]):
        sigma = (sigma * size * slack + loss * slack).sqrt()
    total = sigma * scales[0] * slack + gram_error
    return _unscaled(up(total).sqrt(), exponent) * (a.abs().amax((-2, -1)) > 0)


def largest_eigenvalue_bound(symmetric: Tensor) -> Tensor:
    """λ ≥ λ_max(S) for each symmetric positive semidefinite matrix S of `symmetric` (..., n, n): float64 (...), guaranteed, mostly ≤ 3 % too large.

    t is slightly above the estimate of power iteration, and L a Cholesky factor of tI − S. λ_max(S) ≤ t + ‖tI − S − LLᵀ‖_F holds for any L; the
    rounding error of every product is added. Where the factorisation fails, Gram iteration is used. Much faster than an eigensolver. Any scale.
    Raises BadInput for NaN and infinity.
    """
    scaled, exponent = _scaled(symmetric)
    return _unscaled(_largest_eigenvalue(scaled), exponent)


def _largest_eigenvalue(scaled: Tensor, above: float = 1.02) -> Tensor:
    """`largest_eigenvalue_bound` of scaled matrices: finite entries of absolute value up to about 1, whose squares do not overflow."""
    s = (scaled + scaled.mT) / 2
    n = s.shape[-1]
    generator = torch.Generator(device="cpu").manual_seed(0)
    v = torch.randn(n, 1, generator=generator, dtype=torch.float64).to(s.device).expand(*s.shape[:-2], n, 1)
    for _ in range(24 if n <= _WIDE else 64):
        v = s @ torch.nn.functional.normalize(v, dim=-2, eps=1e-300)
    t = above * torch.linalg.vector_norm(v, dim=(-2, -1))
    shifted = -s
    shifted.diagonal(dim1=-2, dim2=-1).add_(t.unsqueeze(-1))
    factor, info = torch.linalg.cholesky_ex(shifted)
    factor = torch.where((info == 0)[..., None, None], factor.nan_to_num(), 0.0)
    size2 = factor.square().sum((-2, -1)) * (1 + gamma(n * n + 2, U64))
    left = torch.linalg.matrix_norm(shifted - factor @ factor.mT) * (1 + gamma(n * n + 4, U64))
    # Errors: one rounding of each diagonal entry by the shift, γ_n|L||L|ᵀ in the product, one rounding each in the difference and in the mean.
    rounded = gamma(n + 4, U64) * size2 + 4 * U64 * (n * t + torch.linalg.matrix_norm(s)) + 2 * n * n * n * TINY[torch.float64]
    found = up((t + left + rounded) * (1 + 1e-13))
    failed = info != 0
    if bool(failed.any()) and n > _WIDE and above < 1.5:
        found = found.masked_scatter(failed, _largest_eigenvalue(s[failed], 1.08 if above < 1.08 else 1.5))
    elif bool(failed.any()):
        found = found.masked_scatter(failed, gram_iteration_bound(s[failed], 4) + 4 * U64 * torch.linalg.matrix_norm(s[failed]))
    return found


def spectral_norm_quick(weight: Tensor) -> Tensor:
    """σ ≥ ‖W‖₂ for each matrix of `weight` (..., m, n): float64 (...), guaranteed, mostly at most 2 % too large, from `largest_eigenvalue_bound`."""
    a, exponent = _scaled(weight)
    gram, gram_error = _gram(a)
    return _unscaled(up(up(_largest_eigenvalue(gram) + gram_error).sqrt()), exponent) * (a.abs().amax((-2, -1)) > 0)


def spectral_norm_estimate(weight: Tensor, iterations: int = 100) -> Tensor:
    """A LOWER estimate of ‖W‖₂ by power iteration: float64 (...). For reports of the gap; never for a certificate."""
    a, exponent = _scaled(weight)
    generator = torch.Generator(device="cpu").manual_seed(0)
    v = torch.randn(a.shape[-1], 1, generator=generator, dtype=torch.float64).to(a.device).expand(*a.shape[:-2], -1, -1)
    for _ in range(iterations):
        v = torch.nn.functional.normalize(a.mT @ (a @ torch.nn.functional.normalize(v, dim=-2)), dim=-2)
    norm = torch.linalg.vector_norm(a @ v, dim=(-2, -1)) / torch.linalg.vector_norm(v, dim=(-2, -1)).clamp_min(1e-300)
    half = exponent // 2
    return torch.ldexp(torch.ldexp(norm, half), exponent - half)


def quartic_bound(weight: Tensor) -> float:
    """q ≥ max ‖(Wx)∘(Wx)‖₂ over ‖x‖₂ ≤ 1, for W (m, n) with rows w_i.

    (w_i·x)² = ⟨w_iw_iᵀ, xxᵀ⟩. For a unit vector x, xxᵀ = I/n + S, where S has trace 0 and ‖S‖_F ≤ 1. Only the traceless parts of w_iw_iᵀ contribute
    to ⟨w_iw_iᵀ, S⟩; their Gram matrix is G∘G − ssᵀ/n with G = WWᵀ and s_i = ‖w_i‖². Hence q = ‖s‖/n + sqrt(λ_max(G∘G − ssᵀ/n)). The bound
    max_i‖w_i‖·σ(W) also holds; the smaller of the two is returned.
    """
    a, exponent = _scaled(weight)
    gram = a @ a.mT
    size = norm_up(a).square()
    traceless = gram.square() - size[:, None] * size / a.shape[1]
    # The error of an entry of G is at most γ_n‖w_i‖‖w_j‖, that of its square slightly more than 2γ_n(‖w_i‖‖w_j‖)². All other rounding errors are far
    # below the slack that ‖S‖_F² = 1 − 1/n < 1 leaves.
    lost = up(8 * gamma(a.shape[1] + 4, U64) * norm_up(size, 0).square())
    # Both bounds are within a few percent; for wide layers Gram iteration takes five times as long.
    largest = largest_eigenvalue_bound if len(a) > 2 * _WIDE else partial(gram_iteration_bound, iterations=6)
    top = up(largest((traceless + traceless.mT) / 2) + lost).sqrt()
    plain = up(size.amax().sqrt() * spectral_norm_bound(a))
    bound = up(torch.minimum(up(norm_up(size, 0) / a.shape[1] + top), plain) * (1 + 1e-12))
    return float(_unscaled(bound, 2 * exponent).clamp_min(1e-300)) if bool(a.any()) else 0.0


def infinity_to_two_bound(weight: Tensor) -> Tensor:
    """c ≥ max ‖Wx‖₂ over ‖x‖_∞ ≤ 1, for W (m, n): float64 scalar.

    The smaller of √n·σ(W) and ‖ |W|·1 ‖₂, the ℓ2 norm of the rows' sums of absolute values.
    """
    a = weight.detach().to(torch.float64)
    m, n = a.shape
    # norm_up scales its argument: otherwise squares of weights below 1e-154 would underflow and the bound would be 0.
    by_rows = up(norm_up(a.abs().sum(-1)) * (1 + gamma(m + n + 4, U64)))
    return torch.minimum(by_rows, up(spectral_norm_bound(a) * math.sqrt(n)))


def one_to_two_bound(weight: Tensor) -> Tensor:
    """c ≥ max ‖Wx‖₂ over ‖x‖₁ ≤ 1, for W (m, n): the largest column norm. float64 scalar."""
    a = weight.detach().to(torch.float64)
    return norm_up(a, 0).amax()


def symbol_work(kernel: Tensor, torus: tuple[int, ...]) -> int:
    """About how many multiplications `symbol_bound` needs."""
    return math.prod(torus) // 2 * (2 * max(kernel.shape[:2])) ** 3 * 8


def symbol_bound(kernel: Tensor, torus: tuple[int, ...], dilation: tuple[int, ...] = (1, 1)) -> Tensor:
    """σ ≥ the operator norm of the circular convolution (stride 1) with `kernel` (out, in, kh, kw) on a torus (H, W): float64 scalar.

    Also for signals, kernels (out, in, k), and volumes, kernels (out, in, kd, kh, kw); the formulas below are those for images.

    The discrete Fourier transform is unitary and makes the convolution block diagonal, with one out×in matrix
    Σ_ab W[:, :, a, b]·exp(2πi(u·a·dh/H + v·b·dw/W)) for each frequency (u, v) of the torus (Sedghi, Gupta & Long 2019). The kernel is real, so the
    matrix of −(u, v) is the complex conjugate, and half of the v suffice. A complex matrix has the norm of its real embedding [[Re, −Im], [Im, Re]].
    """
    out, into, *sizes = kernel.shape
    flat, exponent = _scaled(kernel.flatten(1))
    taps, count = math.prod(sizes), len(sizes)
    device = kernel.device

    def turns(count: int, size: int, step: int, frequencies: int) -> Tensor:
        """(frequency·tap·step mod size)/size (frequencies, taps): the angle as a fraction of a full turn; the reduction mod size is exact."""
        frequency = torch.arange(frequencies, device=device)[:, None]
        return (frequency * torch.arange(count, device=device) * step % size).double() / size

    turn: Tensor | None = None
    for i in range(count):
        last = i == count - 1
        one = turns(sizes[i], torus[i], dilation[i], torus[i] // 2 + 1 if last else torus[i])
        shape = [1] * (2 * count)
        shape[i], shape[count + i] = one.shape
        turn = one.view(shape) if turn is None else turn + one.view(shape)
    assert turn is not None
    phases = (2 * math.pi * turn).reshape(-1, taps)
    # turn < 2 has an error of 4u (two divisions, one sum). The angle has an error of 25u from it, and of another 25u from π and the product; cos and
    # sin add one or two ulps. For volumes turn < 3 has an error of 8u (three divisions, two sums), which gives 51u and 38u.
    phase_error = (64 if count < 3 else 128) * U64
    rows = flat.reshape(out * into, taps)
    biggest = 2 * max(out, into)
    chunk = max(1, 2**24 // biggest**2)
    iterations = 10 if len(phases) * biggest**3 <= 2**36 else 6
    best = []
    for part in phases.split(chunk):
        real, imaginary = ((rows @ f(part).mT).mT.reshape(-1, out, into) for f in (torch.cos, torch.sin))
        embedded = torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], -2)
        best.append(gram_iteration_bound(embedded, iterations).amax())
    # The error of each real and imaginary part is at most (γ_taps + phase_error)·Σ_ab|W_ab|. √2 accounts for both parts, √taps is by Cauchy-Schwarz.
    relative = (gamma(taps + 2, U64) + phase_error) * (1 + 1e-9)
    error = relative * math.sqrt(2 * taps) * norm_up(flat.flatten(), 0) + out * into * taps * TINY[torch.float64]
    return _unscaled(up(torch.stack(best).amax() + error), exponent)
