"""method='complete': CROWN with optimised lines, then branch and bound over the ReLUs. docs/theory.md, section 9.

A trial asks whether all margins of one sample are positive on a ball: CROWN, then CROWN with its free slopes optimised (Xu et al. 2021), then branch
and bound (Bunel et al. 2018; Wang et al. 2021) over ReLUs, and over the pairs of MaxMin, which are ReLUs of a difference. Every bound that counts is
evaluated in float64 with its own rounding subtracted and the execution error of the model included, so what is proved holds for the executed model.
With a requested radius, only that radius is tried. Without one, the trials begin at CROWN's radius and end where two of them are close.

The search is complete only without the limit of subproblems: a sample for which it runs out keeps the largest radius proved so far.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustlip.domains.lines.crown import Ball, rival_rows
from robustlip.domains.lines.dense import is_affine, why_not
from robustlip.domains.lines.outputs import ExecutedNetwork, holds
from robustlip.domains.lines.radii import Problem, crown_margins, search
from robustlip.domains.norms import Context
from robustlip.layers import Chain, GroupSort, Maximum, MaxMin, Minimum
from robustlip.threats import InputBall, Threat

# Subproblems that are bounded for one rival in one trial, at most: where one radius is asked for, and where the largest one is searched.
ASKED, SEARCHED = 512, 16
# Trials of one sample, at most; the first ones grow by this factor; two radii are close within this one.
TRIALS, GROWTH, CLOSE = 8, 1.25, 1.02

_SPLIT = (nn.ReLU, MaxMin, GroupSort, Maximum, Minimum)


def _proved(problem: Problem, n: int, radius: float, subproblems: int) -> bool:
    """Whether all margins of sample n are proved positive within the radius."""
    x, y = problem.x[n : n + 1], problem.y[n : n + 1]
    assert isinstance(problem.threat, InputBall)
    ball = Ball(x, torch.full((1,), radius, dtype=torch.float64, device=x.device), problem.threat.norm)
    classes = problem.network.stages[-1].outputs
    rows = rival_rows(y, classes)[0]
    rows = rows[torch.arange(classes, device=y.device) != y]
    offsets = torch.full((len(rows),), problem.context.final_error, dtype=torch.float64, device=x.device)
    proved, _ = holds(ExecutedNetwork(problem.network, problem.context), ball, rows, offsets, math.inf, total=subproblems)
    return bool(proved.all())


def complete_radii(
    model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context, subproblems: int | None = None
) -> tuple[Tensor, Tensor]:
    """(radius (N,), NaN (N,)), float64 on the CPU. With threat.radius set, a radius is that one or 0.

    subproblems: the limit for each rival and trial, by default ASKED or SEARCHED.
    """
    asked = threat.radius is not None
    limit = subproblems if subproblems is not None else ASKED if asked else SEARCHED
    problem = Problem(model, x, y, logits, threat, context, dense=False)
    correct = problem.correct
    if asked:
        wanted = torch.full_like(problem.norm, float(threat.radius or 0.0))
        own = problem.y.cpu()[:, None]
        margins = crown_margins(problem, wanted).cpu().scatter(1, own, torch.inf)
        done = (margins > context.final_error).all(-1) & correct
        for n in (correct & ~done).nonzero()[:, 0].tolist():
            done[n] = _proved(problem, n, float(wanted[n]), limit)
        radius = torch.where(done, wanted, torch.zeros_like(wanted))
    else:
        radius, _ = search(problem, crown_margins)
        for n in (correct & (radius > 0)).nonzero()[:, 0].tolist():
            best, refused = float(radius[n]), math.inf
            for _ in range(TRIALS):
                trial = math.sqrt(best * refused) if refused < math.inf else best * GROWTH
                if trial >= refused or refused < CLOSE * best:
                    break
                if _proved(problem, n, trial, limit):
                    best = trial
                else:
                    refused = trial
            radius[n] = best
    return radius, torch.full_like(radius, torch.nan)


def complete_why_not(model: nn.Module, threat: Threat) -> str:
    """'' where 'complete' applies, else one sentence with the reason."""
    assert isinstance(model, Chain)
    if why := why_not(model, threat):
        return why
    names = [type(m).__name__ for layer in model for m in layer.modules() if type(m) not in _SPLIT and not is_affine(m)]
    return f"{names[0]} is no ReLU and no sorting of pairs, which is all that this method splits" if names else ""
