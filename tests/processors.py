"""Changes the behaviour of this processor to one that other processors have, e.g. subnormal numbers treated as zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn


@contextmanager
def flushing() -> Iterator[None]:
    """Subnormal numbers count for zero, as operands and as results."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def flushed(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output where the processor takes subnormal numbers for zero."""
    with flushing(), torch.no_grad():
        return layer(x)
