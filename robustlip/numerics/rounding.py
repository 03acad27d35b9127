"""Rounding: unit roundoffs, error constants, and directed rounding. docs/theory.md, section 1.

All computations here are in float64, where each operation has a relative error of at most 2⁻⁵³. `up` and `down` move a result by more than the
accumulated error of any short formula, so that formulas stay readable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustlip.errors import BadInput

U64 = 2.0**-53
SMALLEST = 2.0**-1074

# Unit roundoff u (round to nearest) of each dtype that a certificate can cover, and the largest error of an underflow: the smallest normal number,
# because a processor may flush subnormals to zero; in float16, whose subnormals no processor flushes, the smallest subnormal.
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
# The largest error of flushing a subnormal operand (an input or a weight) to zero; 0 in float16.
FLUSHED = {dtype: 0.0 if dtype == torch.float16 else tiny for dtype, tiny in TINY.items()}
NAMES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The relative slack of `up` and `down`: it covers about 2¹³ float64 roundings, far more than any formula here has.
_SLACK = 2.0**-40


def gamma(n: float, u: float) -> float:
    """γ_n = n·u/(1 − n·u), a bound of the relative error of n roundings in any order (Higham 2002, section 3.1); inf if n·u ≥ 1."""
    nu = n * u * (1 + 4 * U64)
    return nu / (1 - nu) * (1 + 8 * U64) if nu < 1 else math.inf


def up(x: Tensor) -> Tensor:
    """An upper bound of the exact value of a short formula, from its float64 result x ≥ 0."""
    return x * (1 + _SLACK) + SMALLEST


def down(x: Tensor) -> Tensor:
    """A lower bound of the exact value of a short formula, from its float64 result x; not below 0 for x ≥ 0."""
    return torch.where(x > 0, x * (1 - _SLACK), x * (1 + _SLACK))


def norm_up(x: Tensor, dims: int | tuple[int, ...] = -1) -> Tensor:
    """An upper bound (float64) of the ℓ2 norm of x over `dims`, for any float dtype. x is scaled first, so squares neither overflow nor vanish."""
    x = x.to(torch.float64)
    scale = x.abs().amax(dims, keepdim=True)
    scale = torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))
    size = math.prod(x.shape[d] for d in ((dims,) if isinstance(dims, int) else dims))
    total = (x / scale).square().sum(dims).sqrt() * (1 + gamma(size + 4, U64))
    return up(total * scale.amax(dims))


def quick_norm_up(x: Tensor) -> Tensor:
    """An upper bound (float64) of the ℓ2 norms over the last dimension. Unless x is float64, it is computed in float32, which is faster."""
    if x.dtype == torch.float64:
        return norm_up(x)
    n = x.shape[-1]
    # Squares below 2⁻¹²⁶ may be flushed to 0; such an entry is below 2⁻⁶³. Squares that overflow give inf, which is an upper bound.
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).to(torch.float64)
    return up(norm * (1 + gamma(n + 8, UNIT[torch.float32])) + n**0.5 * 2.0**-62)


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype with this name, among those that a certificate can cover. Raises BadInput for any other name."""
    if name not in NAMES:
        raise BadInput(f"expected a dtype among {', '.join(NAMES)} or 'real', got {name!r}; name one of them")
    return NAMES[name]


def evaluated_in(arithmetic: str) -> torch.dtype:
    """The dtype in which a certificate for this arithmetic is evaluated: float64 for 'real', else the named dtype. Raises BadInput as `dtype_of`."""
    return torch.float64 if arithmetic == "real" else dtype_of(arithmetic)


def chunk_numbers(like: Tensor) -> int:
    """How many entries a temporary tensor may have on the device of `like`: what fits the cache of a CPU core, more on a GPU."""
    return 2**17 if like.device.type == "cpu" else 2**26
