"""Rounding: unit roundoffs, error constants, and arithmetic that errs to the safe side. docs/theory.md, section 1.

Everything here is float64. A sum, product or root of finitely many float64 numbers is off by a relative 2⁻⁵³ an operation;
`up` and `down` move a result by more than any short formula can have lost, so formulas stay readable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustlip.errors import BadInput

U64 = 2.0**-53
SMALLEST = 2.0**-1074

# Unit roundoff u (round to nearest) of each dtype that a certificate can cover, and what underflow can lose: the smallest normal
# number where a processor may flush subnormals to zero, the smallest subnormal of float16, whose subnormals all processors keep.
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
TINY = {
    torch.float64: 2.0**-1022,
    torch.float32: 2.0**-126,
    torch.bfloat16: 2.0**-126,
    torch.float16: 2.0**-24,
}
# What taking a subnormal operand (an input or a weight) for zero can lose: nothing in float16.
FLUSHED = {dtype: 0.0 if dtype == torch.float16 else tiny for dtype, tiny in TINY.items()}
NAMES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Relative slack that `up` and `down` add: room for about 2¹³ float64 roundings, far more than any scalar formula here has.
_SLACK = 2.0**-40


def gamma(n: float, u: float) -> float:
    """γ_n = n·u/(1 − n·u), the relative error of n roundings in any order (Higham 2002, section 3.1); inf when n·u ≥ 1."""
    nu = n * u * (1 + 4 * U64)
    return nu / (1 - nu) * (1 + 8 * U64) if nu < 1 else math.inf


def up(x: Tensor) -> Tensor:
    """x ≥ 0 (float64) plus more than a short float64 formula can have lost: an upper bound of what it stands for."""
    return x * (1 + _SLACK) + SMALLEST


def down(x: Tensor) -> Tensor:
    """x (float64) less more than a short float64 formula can have lost, never below 0 for x ≥ 0."""
    return torch.where(x > 0, x * (1 - _SLACK), x * (1 + _SLACK))


def norm_up(x: Tensor, dims: int | tuple[int, ...] = -1) -> Tensor:
    """An upper bound (float64) of the ℓ2 norm of x over `dims`, x of any float dtype. Scaled, so that it cannot overflow or underflow to 0."""
    x = x.to(torch.float64)
    scale = x.abs().amax(dims, keepdim=True)
    scale = torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))
    size = math.prod(x.shape[d] for d in ((dims,) if isinstance(dims, int) else dims))
    total = (x / scale).square().sum(dims).sqrt() * (1 + gamma(size + 4, U64))
    return up(total * scale.amax(dims))


def quick_norm_up(x: Tensor) -> Tensor:
    """An upper bound (float64) of the ℓ2 norms over the last dimension, read once in float32 where x is no wider: for large activations."""
    if x.dtype == torch.float64:
        return norm_up(x)
    n = x.shape[-1]
    # Squares under 2⁻¹²⁶ may vanish; each entry lost that way is under 2⁻⁶³. Squares that overflow give inf, which is an upper bound.
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).to(torch.float64)
    return up(norm * (1 + gamma(n + 8, UNIT[torch.float32])) + n**0.5 * 2.0**-62)


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name that a certificate can cover. Raises BadInput for any other."""
    if name not in NAMES:
        raise BadInput(f"expected a dtype among {', '.join(NAMES)} or 'real', got {name!r}; name one of them")
    return NAMES[name]


def evaluated_in(arithmetic: str) -> torch.dtype:
    """The dtype that a certificate of this arithmetic is evaluated in: float64 for 'real', else its own. Raises BadInput as `dtype_of` does."""
    return torch.float64 if arithmetic == "real" else dtype_of(arithmetic)


def numbers_at_once(like: Tensor) -> int:
    """How many numbers a temporary tensor has: as many as fit a core's cache, or as a GPU holds easily."""
    return 2**17 if like.device.type == "cpu" else 2**26
