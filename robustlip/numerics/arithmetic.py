"""The arithmetic of a floating-point type: what one operation can lose in it. docs/theory.md, section 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robustlip.numerics.rounding import FLUSHED, TINY, UNIT, gamma


class Rounds(Protocol):
    """What a bound of an executed error asks of an arithmetic; also of two at once, whose errors add (`domains.expansion.base.Scope`)."""

    @property
    def unit(self) -> float: ...

    @property
    def tiny(self) -> float: ...

    @property
    def flushed(self) -> float: ...

    def gamma(self, n: float) -> float: ...


@dataclass(frozen=True)
class Arithmetic:
    """dtype: float64, float32, bfloat16 or float16."""

    dtype: torch.dtype

    @property
    def unit(self) -> float:
        """Unit roundoff u."""
        return UNIT[self.dtype]

    @property
    def tiny(self) -> float:
        """The largest absolute loss of one underflow."""
        return TINY[self.dtype]

    @property
    def flushed(self) -> float:
        """The largest number that a processor may take for zero where it reads an operand."""
        return FLUSHED[self.dtype]

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return torch.finfo(self.dtype).max

    @property
    def scalars_largest(self) -> float:
        """The largest number inside a kernel that keeps to itself what it computes: half precision is computed in float32 there."""
        return torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).max

    @property
    def smallest_divisor(self) -> float:
        """What a processor may take for zero where it divides by it, as soon as it is smaller: scalars of half precision are float32's."""
        return TINY[torch.float64 if self.dtype == torch.float64 else torch.float32]

    def gamma(self, n: float) -> float:
        """The relative error of n roundings in any order."""
        return gamma(n, self.unit)

    def divides(self, bound: Tensor, by: float) -> Tensor:
        """A bound, infinite where a processor may take what was divided by for zero."""
        return bound if abs(by) >= self.smallest_divisor else torch.full_like(bound, math.inf)

    def fits(self, bound: Tensor, largest: Tensor) -> Tensor:
        """A bound, infinite where the largest number on the way to what it bounds could overflow."""
        overflow = ~(largest < self.largest / 4)
        return torch.where(overflow, torch.full_like(bound, math.inf), bound) if bool(overflow.any()) else bound
