"""Residual connections, convex (the paper) or plain."""

from __future__ import annotations

import torch
from torch import nn


class Residual(nn.Module):
    """x → skip·x + weight·branch(x), same shape. The paper: skip = 1 − α, weight = α; the usual residual: 1 and 1."""

    def __init__(self, branch: nn.Module, *, skip: float = 1.0, weight: float = 1.0) -> None:
        super().__init__()
        self.branch = branch
        self.skip, self.weight = float(skip), float(weight)

    @classmethod
    def convex(cls, branch: nn.Module, alpha: float) -> Residual:
        """(1 − α)x + α·branch(x), Newhouse et al. 2025, equation 7."""
        return cls(branch, skip=1.0 - alpha, weight=alpha)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.skip * x + self.weight * self.branch(x)

    def extra_repr(self) -> str:
        return f"skip={self.skip}, weight={self.weight}"
