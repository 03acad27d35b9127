"""Floating-point arithmetic: bounds of the rounding error of one operation in a dtype. docs/theory.md, section 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robustlip.numerics.rounding import FLUSHED, TINY, UNIT, gamma


class RoundingModel(Protocol):
    """The constants from which error bounds are computed: those of one dtype, or sums over two dtypes (`domains.expansion.base.Scope`)."""

    @property
    def unit(self) -> float: ...

    @property
    def tiny(self) -> float: ...

    @property
    def flushed(self) -> float: ...

    def gamma(self, n: float) -> float: ...


@dataclass(frozen=True)
class Arithmetic:
    """The rounding constants of a dtype: float64, float32, bfloat16 or float16."""

    dtype: torch.dtype

    @property
    def unit(self) -> float:
        """Unit roundoff u."""
        return UNIT[self.dtype]

    @property
    def tiny(self) -> float:
        """The largest absolute error of one underflow."""
        return TINY[self.dtype]

    @property
    def flushed(self) -> float:
        """The largest operand that a processor may replace by zero (flush to zero)."""
        return FLUSHED[self.dtype]

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return torch.finfo(self.dtype).max

    @property
    def largest_scalar(self) -> float:
        """The largest number inside an elementwise kernel: such kernels compute half precision in float32."""
        return torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).max

    @property
    def smallest_divisor(self) -> float:
        """A processor may replace smaller divisors by zero. Scalars of half precision kernels are float32."""
        return TINY[torch.float64 if self.dtype == torch.float64 else torch.float32]

    def gamma(self, n: float) -> float:
        """γ_n: a bound of the relative error of n roundings in any order."""
        return gamma(n, self.unit)

    def infinite_if_flushed(self, bound: Tensor, by: float) -> Tensor:
        """`bound`, or infinity where a processor may replace the divisor `by` by zero."""
        return bound if abs(by) >= self.smallest_divisor else torch.full_like(bound, math.inf)

    def infinite_if_overflow(self, bound: Tensor, largest: Tensor) -> Tensor:
        """`bound`, or infinity where the largest intermediate value could overflow."""
        overflow = ~(largest < self.largest / 4)
        return torch.where(overflow, torch.full_like(bound, math.inf), bound) if bool(overflow.any()) else bound
