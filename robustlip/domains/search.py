"""Search for the largest radius at which a bounded change stays below a limit, for many samples at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The largest certified radius: a model that ignores its input is robust at every radius, and JSON has no infinity.
LARGEST = 1e100
# The relative width of the bracket at which a search ends.
TOLERANCE = 5e-4


def largest_radius(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, *, tolerance: float = TOLERANCE, steps: int = 40
) -> tuple[Tensor, Tensor]:
    """(radius (N,), change (N,)): the largest ε found with change(ε) < allowed(ε), and the change there; 0 where there is none.

    evaluate: ε (N,) → (change (N,), allowed (N,)), float64. change(ε)/ε should not decrease and allowed(ε) should not increase with ε. The returned
    radius was evaluated as feasible, so it is sound without these two properties; they only make it close to the largest.
    start: small positive ε (N,), for the first estimate. steps: the most evaluations. Stops when the relative width of all brackets is at most
    `tolerance`.
    """

    def guess(epsilon: Tensor) -> Tensor:
        """The ε at which change = allowed if change were linear and allowed constant: above the result from a feasible ε, below it otherwise."""
        change, allowed = evaluate(epsilon)
        ratio = (allowed / change).clamp_min(0.0)
        return torch.where(change > 0, epsilon * ratio, torch.full_like(epsilon, LARGEST)).nan_to_num(0.0, LARGEST, 0.0).clamp_max(LARGEST)

    low = torch.zeros_like(start)
    low_change = torch.zeros_like(start)
    high = guess(start)
    # If change is proportional to ε, the first trial is feasible and within the tolerance: two evaluations in all.
    trial = high * (1 - 0.8 * tolerance)
    for _ in range(steps):
        trial = torch.where(trial > 0, trial, high / 2)
        live = (high > 0) & (low < high * (1 - tolerance))
        if not bool(live.any()):
            break
        change, allowed = evaluate(trial)
        # NaN compares false, so an overflow means infeasible.
        feasible = live & (change < allowed)
        low, low_change = torch.where(feasible, trial, low), torch.where(feasible, change, low_change)
        infeasible = live & ~feasible
        ratio = (trial * allowed / change).nan_to_num(0.0, LARGEST, 0.0).clamp(0.0, LARGEST)
        high = torch.where(infeasible, torch.minimum(high, trial), torch.where(feasible, torch.minimum(high, ratio * (1 + 1e-9)), high))
        # The secant of the infeasible trial if it is inside the bracket; otherwise bisection (geometric, once low > 0).
        secant = torch.where(infeasible, ratio * (1 - 1e-9), torch.zeros_like(ratio))
        middle = torch.where(low > 0, (low * high).sqrt(), high / 2)
        trial = torch.where((secant > low) & (secant < high), secant, middle)
    return low, low_change
