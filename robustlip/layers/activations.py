"""Elementwise layers that torch does not have."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from robustlip.errors import BadInput


class ScaledGELU(nn.Module):
    """GELU(x)/c, elementwise, any shape. The paper uses c = 1.1289 (section 3; the true supremum of gelu' is a little above).

    divisor: c > 0. approximate: 'none' (erf) or 'tanh', as in torch.
    """

    def __init__(self, divisor: float = 1.1289, approximate: str = "none") -> None:
        super().__init__()
        if not divisor > 0:
            raise BadInput(f"expected a GELU divisor above 0, got {divisor}; the paper uses 1.1289")
        if approximate not in ("none", "tanh"):
            raise BadInput(f"expected approximate 'none' or 'tanh', got {approximate!r}; name one of them")
        self.divisor, self.approximate = float(divisor), approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate=self.approximate) / self.divisor

    def extra_repr(self) -> str:
        return f"divisor={self.divisor}, approximate={self.approximate!r}"


class Abs(nn.Module):
    """|x|, elementwise, any shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs()


class Clamp(nn.Module):
    """min(max(x, low), high), elementwise, any shape. None means no bound on that side; at least one bound is required."""

    def __init__(self, low: float | None = None, high: float | None = None) -> None:
        super().__init__()
        self.low, self.high = (None if bound is None else float(bound) for bound in (low, high))
        bounds = [bound for bound in (self.low, self.high) if bound is not None]
        if not bounds or not all(math.isfinite(b) for b in bounds) or (len(bounds) == 2 and not bounds[0] < bounds[1]):
            raise BadInput(f"expected finite numbers low < high, or one of them and None, got low={low}, high={high}; change the bounds")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x, self.low, self.high)

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}"
