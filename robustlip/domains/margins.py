"""Margins over all rivals, and the head that they are read from. docs/theory.md, section 4."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustlip.layers import Chain


def head_of(model: Chain) -> nn.Linear | None:
    """The last layer when it is Linear, so that rivals can be compared pair by pair."""
    last = model[len(model) - 1]
    return last if type(last) is nn.Linear else None


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """m[i, j] = logits[i, y_i] − logits[i, j] in float64 (N, C), exact for float32 logits and rounded once for float64; m[i, y_i] = +inf."""
    logits = logits.to(torch.float64)
    m = logits.gather(1, y[:, None]) - logits
    return m.scatter(1, y[:, None], torch.inf)
