"""Residual connections, convex (the paper) or plain: the sum of the input and one branch."""

from __future__ import annotations

import torch
from torch import nn

from robustlip.layers.joins import Sum

_SKIP = nn.Identity()


class Residual(Sum):
    """x → skip·x + weight·branch(x), same shape: a Sum whose first branch is the input.

    The paper: skip = 1 − α, weight = α; the usual residual: 1 and 1.

    Bounds treat it as that Sum. It has a class of its own because checkpoints name its parameters `branch.…`.
    """

    def __init__(self, branch: nn.Module, *, skip: float = 1.0, weight: float = 1.0) -> None:
        nn.Module.__init__(self)
        self.branch = branch
        self.skip, self.weight = float(skip), float(weight)

    @property
    def branches(self) -> tuple[nn.Module, ...]:
        return (_SKIP, self.branch)

    @property
    def weights(self) -> tuple[float, ...]:  # type: ignore[override]
        return (self.skip, self.weight)

    @classmethod
    def convex(cls, branch: nn.Module, alpha: float) -> Residual:
        """(1 − α)x + α·branch(x), Newhouse et al. 2025, equation 7."""
        return cls(branch, skip=1.0 - alpha, weight=alpha)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.skip * x + self.weight * self.branch(x)

    def extra_repr(self) -> str:
        return f"skip={self.skip}, weight={self.weight}"
