"""Searches a point of a box at which given linear functions of the outputs are all ≤ 0: PGD with signed gradients (Madry et al. 2018)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def starts(low: Tensor, high: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, n) points: the centre of the ball that was clipped to the box, the centre of the box, two corners, random corners and points."""
    place = torch.rand(count, len(low), generator=generator, dtype=torch.float64)
    place[::2] = place[::2].round()
    place[1:4] = torch.tensor([[0.5], [0.0], [1.0]], dtype=torch.float64)[: max(0, count - 1)]
    x = low + (high - low) * place.to(low)
    reach = (high - low).max() / 2
    x[0] = torch.where(low <= low.min(), high - reach, torch.where(high >= high.max(), low + reach, low / 2 + high / 2))
    return torch.minimum(torch.maximum(x, low), high)


def search(
    outputs: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, groups: Sequence[tuple[Tensor, Tensor]], *,
    generator: torch.Generator, until: float, restarts: int = 8, steps: int = 60,
) -> Tensor | None:  # fmt: skip
    """x (n,) in [low, high] with rows·y ≤ offsets in every row of some group, as `outputs` computes it in its own dtype; None if none was found.

    outputs: points (N, n) → y (N, C). low, high (n,), rows (r, C), offsets (r,), all in the dtype of the points. until: a time.monotonic() deadline.
    The caller has to check the result again.
    """
    x = starts(low, high, restarts, generator)
    half = (high - low) / 2
    for step in range(steps + 1):
        point = x.clone().requires_grad_()
        with torch.enable_grad():
            y = outputs(point)
            worst = torch.stack([(y @ rows.mT - offsets).amax(-1) for rows, offsets in groups]).amin(0)
            hit = (worst.detach() <= 0).nonzero()[:, 0]
            if len(hit):
                return x[hit[0]]
            if step == steps or time.monotonic() > until:
                return None
            (gradient,) = torch.autograd.grad(worst.sum(), point)
        rate = (1 + math.cos(math.pi * step / steps)) / 2
        x = torch.minimum(torch.maximum(x - rate * half * gradient.sign(), low), high)
    return None
