"""The largest radius at which a bounded change still fits, for many samples at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# No certificate claims more: a model that ignores its input is robust at every radius, and JSON knows no infinity.
LARGEST = 1e100
# Width of the bracket at which a search ends, relative.
TOLERANCE = 5e-4


def largest_radius(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, *, tolerance: float = TOLERANCE, steps: int = 40
) -> tuple[Tensor, Tensor]:
    """(radius, change): for each sample the largest ε found with change(ε) < room(ε), and the change there; 0 where there is none.

    evaluate(ε (N,)) → (change (N,), room (N,)), float64: change(ε)/ε must not fall and room(ε) must not grow with ε. What is returned was
    evaluated as feasible, so soundness does not rest on these two properties, only the quality of the answer does.
    start: small positive ε (N,), at which the growth per ε is read off first. Stops when the bracket is within `tolerance`.
    """

    def guess(epsilon: Tensor) -> Tensor:
        """Where change would meet room if both went on as at ε: above the answer from a feasible ε, below it from an infeasible one."""
        change, room = evaluate(epsilon)
        ratio = (room / change).clamp_min(0.0)
        return torch.where(change > 0, epsilon * ratio, torch.full_like(epsilon, LARGEST)).nan_to_num(0.0, LARGEST, 0.0).clamp_max(LARGEST)

    low = torch.zeros_like(start)
    low_change = torch.zeros_like(start)
    high = guess(start)
    # Where change is proportional to ε, the first trial is feasible and within the tolerance: two evaluations in all.
    trial = high * (1 - 0.8 * tolerance)
    for _ in range(steps):
        trial = torch.where(trial > 0, trial, high / 2)
        live = (high > 0) & (low < high * (1 - tolerance))
        if not bool(live.any()):
            break
        change, room = evaluate(trial)
        # NaN compares false, so an overflow anywhere means infeasible.
        feasible = live & (change < room)
        low, low_change = torch.where(feasible, trial, low), torch.where(feasible, change, low_change)
        infeasible = live & ~feasible
        ratio = (trial * room / change).nan_to_num(0.0, LARGEST, 0.0).clamp(0.0, LARGEST)
        high = torch.where(infeasible, torch.minimum(high, trial), torch.where(feasible, torch.minimum(high, ratio * (1 + 1e-9)), high))
        # Secant from the failed side when it lands inside the bracket, bisection (geometric, once low is known) otherwise.
        secant = torch.where(infeasible, ratio * (1 - 1e-9), torch.zeros_like(ratio))
        middle = torch.where(low > 0, (low * high).sqrt(), high / 2)
        trial = torch.where((secant > low) & (secant < high), secant, middle)
    return low, low_change
