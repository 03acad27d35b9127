"""Certified radii of networks of affine stages and activations: methods 'ibp', 'crown' and 'local-lipschitz'.

Each method gives a lower bound of every margin of the executed model on a ball. The execution error of each stage is a perturbation of its
pre-activations, bounded entry by entry (`Boxes.error`), and the bounds are those of the perturbed network; the difference between matrices and layers
is part of it. Only the perturbed pass has to be bounded; the clean margin is not used. docs/theory.md, section 9.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustlip.domains.lines.crown import Ball, interval_boxes, interval_margins, linear_boxes, linear_margins, vanished
from robustlip.domains.lines.dense import Network, network_of, why_not
from robustlip.domains.lines.secants import gains, lipschitz_margins
from robustlip.domains.margins import margins
from robustlip.domains.norms import Context
from robustlip.domains.norms.bound import GlobalBound, layers_after_threat
from robustlip.domains.search import LARGEST
from robustlip.errors import BadInput
from robustlip.layers import Chain
from robustlip.threats import InputBall, Threat


class Problem:
    """A batch: the network and the clean inputs in float64.

    dense: whether the method needs a matrix for every stage. Raises BadInput where the method does not apply.
    """

    def __init__(self, model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context, *, dense: bool = True) -> None:
        if why := why_not(model, threat):
            raise BadInput(f"expected a model and threat that linear relaxations are proved for, but {why}; use method 'global'")
        assert isinstance(threat, InputBall)
        self.model, self.threat, self.context = model, threat, context
        self.network: Network = network_of(model, tuple(x.shape[1:]), context, dense=dense)
        self.x, self.y = x.detach().double().flatten(1), y
        layers, inside, self.norm = layers_after_threat(model, x, threat)
        # Raises what the rules of norms raise.
        GlobalBound(model, layers, inside, self.norm, threat, y.cpu(), context).at(torch.zeros_like(self.norm))
        self.margin = margins(logits.detach().cpu(), y.cpu())
        self.correct = self.margin.amin(-1) > 0

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def ball(self, radius: Tensor) -> Ball:
        return Ball(self.x, radius.to(self.x.device), self.threat.norm)  # type: ignore[union-attr]

Margins = Callable[[Problem, Tensor], Tensor]


def search(problem: Problem, lower: Margins, steps: int = 14, tolerance: float = 4e-3) -> tuple[Tensor, Tensor]:
    """(radius (N,), NaN (N,)): the largest tried radius at which `lower` proves every margin of the executed model positive.

    The used fraction of the margin grows like a power of the radius; the last two trials give the exponent. The next trial aims slightly below a
    fraction of 1, or bisects the bracket if that value is outside of it. The returned radius was tried and proved.
    """
    own = problem.y.cpu()[:, None]
    best, high = torch.zeros_like(problem.norm), torch.full_like(problem.norm, torch.inf)
    trial, power = 0.01 * problem.norm.clamp_min(1e-3), torch.ones_like(problem.norm)
    before: tuple[Tensor, Tensor] | None = None
    live = problem.correct.clone()
    for _ in range(steps):
        value = lower(problem, trial).cpu()
        # The row of the label itself is 0 and no rival.
        feasible = (value.scatter(1, own, torch.inf) > problem.context.final_error).all(-1) & live
        used = ((problem.margin - value) / (problem.margin - problem.context.final_error).clamp_min(1e-300)).scatter(1, own, 0.0).amax(-1)
        used = used.nan_to_num(1e6).clamp(1e-12, 1e6)
        best = torch.where(feasible, torch.maximum(best, trial), best)
        high = torch.where(live & ~feasible, torch.minimum(high, trial), high)
        live = live & ~(feasible & (used > 1 - tolerance)) & (best < high * (1 - tolerance)) & (trial < LARGEST)
        if not bool(live.any()):
            break
        if before is not None:
            slope = (used / before[1]).log() / (trial / before[0]).log()
            power = torch.where(slope.isfinite(), slope.clamp(0.8, 8.0), power)
        before = trial, used
        aim = trial * ((1 - tolerance / 2) / used).log().div(power).clamp(-20, 20).exp()
        middle = torch.where(best > 0, (best * high).sqrt(), high / 2)
        outside = ~((aim > best) & (aim < high))
        aim = torch.where(outside, torch.where(high < torch.inf, middle, 2 * trial), aim)
        # Finished samples repeat their best radius, so that all values in the batch stay finite.
        trial = torch.where(live, aim.clamp_max(LARGEST), torch.where(best > 0, best, trial))
    return best, torch.full_like(best, torch.nan)


def _ibp(problem: Problem, radius: Tensor) -> Tensor:
    ball = problem.ball(radius)
    boxes = interval_boxes(problem.network, ball, problem.context)
    return interval_margins(problem.network, ball, boxes, problem.y) - vanished(problem.network, ball, boxes)[:, None]


def crown_margins(problem: Problem, radius: Tensor) -> Tensor:
    """Lower bounds (N, C) of the executed margins by CROWN at each radius (N,)."""
    ball = problem.ball(radius)
    boxes = linear_boxes(problem.network, ball, problem.context)
    return linear_margins(problem.network, ball, boxes, problem.y) - vanished(problem.network, ball, boxes)[:, None]


def _local_lipschitz(problem: Problem, radius: Tensor) -> Tensor:
    ball = problem.ball(radius)
    gain = gains(problem.network, ball.norm, problem.context, problem.model)
    boxes = linear_boxes(problem.network, ball, problem.context)
    return lipschitz_margins(problem.network, ball, boxes, problem.y, gain)[0] - vanished(problem.network, ball, boxes)[:, None]


def ibp_radii(model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context) -> tuple[Tensor, Tensor]:
    """(radius (N,), NaN (N,)), float64 on the CPU, by interval bound propagation."""
    return search(Problem(model, x, y, logits, threat, context, dense=False), _ibp)


def crown_radii(model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context) -> tuple[Tensor, Tensor]:
    """(radius (N,), NaN (N,)), float64 on the CPU, by CROWN."""
    return search(Problem(model, x, y, logits, threat, context, dense=False), crown_margins)


def local_lipschitz_radii(model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context) -> tuple[Tensor, Tensor]:
    """(radius (N,), NaN (N,)), float64 on the CPU, from local slopes of the activations (`secants`)."""
    return search(Problem(model, x, y, logits, threat, context), _local_lipschitz)


def linear_why_not(model: nn.Module, threat: Threat) -> str:
    """'' where 'ibp', 'crown' and 'local-lipschitz' apply, else one sentence with the reason."""
    assert isinstance(model, Chain)
    return why_not(model, threat)
