"""Searches the smallest radius at which an attack succeeds, per sample, for comparison with certified radii."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from robustlip.attacks.base import Attack, Proposal
from robustlip.attacks.losses import excess, rivals_by_logit, targeted, violation
from robustlip.attacks.pgd import PGD
from robustlip.attacks.spaces import Space
from robustlip.attacks.weight_space import WeightSpace
from robustlip.attacks.weights import group_count, shared_ladder
from robustlip.errors import BadInput
from robustlip.geometry import per_sample

BELOW = 0.985  # fraction of the best radius at which the last attacks run


@dataclass(frozen=True)
class MinimumRadius(Attack):
    """A direct minimum-norm attack, then a search over radii with `attack`; every success is shortened along its line.

    attack: the PGD that runs at each radius. steps: number of radii per sample in the bisection (all samples in one batch, each with
    its own radius). descent: steps of the direct attack; 0 disables it. rivals: how many classes with the largest logits are
    ranked by first-order distance; the nearest `targets` of them are attacked as targets. groups: for weight threats, the number
    of shared perturbations (see WeightAttack), which are tried at a sequence of radii instead.
    polish: steps along the decision boundary from the best point, at the end; 0 disables them.
    rounds: at the very end, how many times `last`, with many random starts, runs slightly below the best radius while it succeeds; 0 disables it.
    A threat with a radius limits the search to that radius; without one it is unlimited.
    Sources: Pintor et al. 2021 (FMN: a radius that follows the boundary) and Rony et al. 2019 (DDN) for the direct attack.
    """

    attack: PGD = field(default_factory=lambda: PGD(steps=20, restarts=2, size=0.5))
    steps: int = 8
    descent: int = 80
    rivals: int = 10
    targets: int = 3
    groups: int | None = None
    polish: int = 30
    last: PGD = field(default_factory=lambda: PGD(steps=30, restarts=10, size=0.5))
    rounds: int = 4

    name: ClassVar[str] = "min"
    needs_radius: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 0 or self.descent < 0 or self.rivals < 1 or self.targets < 1:
            raise BadInput(
                f"expected steps and descent of at least 0, rivals and targets of at least 1, "
                f"got {self.steps}, {self.descent}, {self.rivals}, {self.targets}; raise them"
            )
        if self.polish < 0:
            raise BadInput(f"expected polish of at least 0, got {self.polish}; 0 disables it")
        if self.rounds < 0:
            raise BadInput(f"expected rounds of at least 0, got {self.rounds}; 0 disables the last attacks")
        if self.groups is not None and self.groups < 1:
            raise BadInput(f"expected at least 1 group, got {self.groups}; leave it out for one per sample")

    def _chunk(self, space: Space) -> int:
        return space.chunk if group_count(space, self.groups) is None else len(space)

    def _run(self, space: Space, labels: torch.Tensor, radius: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor | Proposal:
        cap = torch.full((len(space),), torch.inf, dtype=space.work, device=labels.device) if radius is None else radius
        groups = group_count(space, self.groups)
        if groups is not None and isinstance(space, WeightSpace):
            return shared_ladder(space, labels, groups, _shared_guess(space, labels), float(cap[0]), self.attack.steps)

        guess, targets = self._nearest_rivals(space, labels)
        guess = torch.minimum(guess, cap)
        best = space.zeros().double()  # exactly the changes of the points that were classified
        high = torch.full_like(cap, torch.inf)
        if self.descent and not isinstance(space, WeightSpace):
            best, high = self._descend_to(space, labels, targets, guess)
        best, high = self._grow(space, labels, guess, cap, best, high, generator)
        best, high = self._bisect(space, labels, best, high, generator)
        rows = (high < torch.inf).nonzero().flatten()
        best, high = self._polish(space, labels, rows, best, high)
        for _ in range(self.rounds):
            if len(rows) == 0 or isinstance(space, WeightSpace):
                break
            before = high
            best, high = self._try(space, labels, rows, BELOW * high, best, high, generator, warm=True, attack=self.last)
            rows = rows[high[rows] < before[rows]]  # samples that improved may improve again
            best, high = self._polish(space, labels, rows, best, high)
        return best

    def _polish(
        self, space: Space, labels: torch.Tensor, rows: torch.Tensor, best: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps along the decision boundary from the best points of `rows`; a result is kept if it is shorter."""
        if not self.polish or len(rows) == 0 or isinstance(space, WeightSpace):
            return best, high
        part = space.take(rows)
        nearer, reach = along_the_boundary(part, labels[rows], best[rows].to(space.work), high[rows], self.polish)
        shorter, length = self._keep(part, labels[rows], nearer, reach < high[rows], best[rows], high[rows])
        best, high = best.clone(), high.clone()
        best[rows], high[rows] = shorter, length
        return best, high

    # ---- starting radii

    def _nearest_rivals(self, space: Space, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest first-order distance of each sample (N,), and the `targets` classes that are nearest by it (N, t)."""
        with torch.no_grad():
            rivals = rivals_by_logit(space.logits(space.clean), labels, self.rivals)
        count = rivals.shape[1]
        pairs = torch.arange(len(space), device=labels.device).repeat_interleave(count)
        distance = first_order(space.take(pairs), labels[pairs], rivals.flatten()).view(-1, count)
        order = distance.argsort(1)
        nearest = distance.amin(1)
        # A vanishing gradient gives no distance: start with the size of the clean point.
        fallback = space.measure(space.clean.to(space.work)).clamp_min(1e-3)
        return torch.where(torch.isfinite(nearest), nearest, fallback), rivals.gather(1, order[:, : self.targets])

    def _descend_to(self, space: Space, labels: torch.Tensor, targets: torch.Tensor, guess: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The direct attack, untargeted and toward each target, all in one batch → best perturbation and distance (inf: none)."""
        count = targets.shape[1] + 1
        copies = torch.arange(len(space), device=labels.device).repeat_interleave(count)
        goals = torch.cat([torch.full_like(labels, -1)[:, None], targets], dim=1).flatten()
        delta, high = descend(space.take(copies), labels[copies], goals, guess[copies], self.descent)
        high, winner = high.view(-1, count).min(1)
        best = delta[torch.arange(len(space), device=labels.device) * count + winner]
        return self._keep(space, labels, best, high < torch.inf, torch.zeros_like(best, dtype=torch.float64), torch.full_like(high, torch.inf))

    def _grow(
        self,
        space: Space,
        labels: torch.Tensor,
        guess: torch.Tensor,
        cap: torch.Tensor,
        best: torch.Tensor,
        high: torch.Tensor,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Doubles the radius of samples that are not broken yet, from 1.1 times the first-order guess up to the cap."""
        radius = torch.minimum(1.1 * guess, cap)
        for _ in range(12):
            todo = ((high == torch.inf) & (radius <= cap)).nonzero().flatten()
            if len(todo) == 0:
                break
            best, high = self._try(space, labels, todo, radius, best, high, generator)
            radius = torch.where(radius < cap, torch.minimum(2 * radius, cap), torch.inf)
        return best, high

    def _bisect(
        self, space: Space, labels: torch.Tensor, best: torch.Tensor, high: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tries radii below the best so far: first slightly below (the direct attack is near the optimum), then bisection."""
        low = torch.zeros_like(high)
        for step in range(self.steps):
            todo = ((high < torch.inf) & (high > 1.002 * low)).nonzero().flatten()
            if len(todo) == 0:
                break
            radius = torch.where(low > 0, (low + high) / 2, 0.95 * high if step == 0 else 0.8 * high)
            before = high
            best, high = self._try(space, labels, todo, radius, best, high, generator, warm=step % 2 == 0)
            failed = torch.zeros_like(low, dtype=torch.bool)
            failed[todo] = high[todo] >= before[todo]
            low = torch.where(failed, radius, torch.minimum(low, high))
        return best, high

    def _try(
        self,
        space: Space,
        labels: torch.Tensor,
        todo: torch.Tensor,
        radius: torch.Tensor,
        best: torch.Tensor,
        high: torch.Tensor,
        generator: torch.Generator,
        warm: bool = False,
        attack: PGD | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attacks the samples `todo` at their radii and keeps shorter results. warm: start from the best so far, not from the clean point."""
        part = space.take(todo)
        start = best[todo] if warm else None
        delta, value = (attack or self.attack).search(part, labels[todo], radius[todo], generator, start)
        shorter, reach = self._keep(part, labels[todo], delta, value > 0, best[todo], high[todo])
        best, high = best.clone(), high.clone()
        best[todo], high[todo] = shorter, reach
        return best, high

    def _keep(
        self,
        space: Space,
        labels: torch.Tensor,
        delta: torch.Tensor,
        success: torch.Tensor,
        best: torch.Tensor,
        high: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shortens the successful perturbations and keeps those shorter than the best so far."""
        rows = success.nonzero().flatten()
        if len(rows) == 0:
            return best, high
        shorter, reach = shorten(space.take(rows), labels[rows], delta[rows])
        better = reach < high[rows]
        best, high = best.clone(), high.clone()
        best[rows] = torch.where(per_sample(better, shorter), shorter, best[rows])
        high[rows] = torch.where(better, reach, high[rows])
        return best, high


def first_order(space: Space, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """margin/‖gradient‖_dual for each target (N,): the distance at which the linearised model changes its prediction, in units of the radius."""
    point = space.clean.detach().clone().requires_grad_()
    gap = -targeted(space.logits(point), labels, targets)
    size = space.dual(torch.nan_to_num(space.gradient(gap, point)))
    return torch.where(size > 0, gap.detach() / size.clamp_min(torch.finfo(size.dtype).tiny), torch.inf)


def _shared_guess(space: WeightSpace, labels: torch.Tensor) -> torch.Tensor:
    """A first-order guess of the radius (N,) that needs no copy of the weights per sample: from the mean gradient of the batch."""
    point = space.clean[:1].detach().clone().requires_grad_()
    gap = -violation(space.shared_logits(point[0], space.x), labels)
    size = space.dual(space.gradient(gap / len(gap), point))
    return gap.detach() / size.clamp_min(torch.finfo(size.dtype).tiny)


def descend(space: Space, labels: torch.Tensor, targets: torch.Tensor, guess: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A direct minimum-norm attack: ascent of the loss with a radius per sample that follows the decision boundary.

    labels, targets (−1: the class with the largest other logit at each step), guess (N,) → the shortest successful perturbation and its norm (N,),
    inf if none was found. Step lengths decrease from the guess to a hundredth of it, so that the scale of the inputs does not matter.
    Source: Pintor et al. 2021, algorithm 1.
    """
    delta, best = space.zeros(), space.zeros()
    reach, radius = torch.full_like(guess, torch.inf), torch.full_like(guess, torch.inf)
    aimed = targets >= 0
    for step in range(steps):
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        point = space.at(delta).requires_grad_()
        logits = space.logits(point)
        loss = torch.where(aimed, targeted(logits, labels, targets.clamp_min(0)), violation(logits, labels))
        grad = torch.nan_to_num(space.gradient(loss, point))
        with torch.no_grad():
            broken = excess(logits, labels) > 0
            norm = space.moved(point.detach())
            shorter = broken & (norm < reach)
            best = torch.where(per_sample(shorter, delta), delta, best)
            reach = torch.where(shorter, norm, reach)
            shrink = 0.002 + 0.1 * cosine
            # Never broken: slightly more than the remaining linearised distance. Broken: inside the best radius. Otherwise: slightly outside.
            left = loss.abs() / space.dual(grad).clamp_min(torch.finfo(grad.dtype).tiny)
            ahead = torch.where(reach < torch.inf, radius, norm + left.clamp(max=1e3 * guess.amax())) * (1 + shrink)
            radius = torch.where(broken, torch.minimum(radius, norm) * (1 - shrink), torch.minimum(ahead, reach))
            delta = delta + per_sample((0.01 + 0.99 * cosine) * guess, delta) * space.direction(grad)
            delta = space.project(delta, radius)
    return best, reach


def along_the_boundary(
    space: Space, labels: torch.Tensor, delta: torch.Tensor, reach: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeated steps from broken points to the nearest point of the linearised decision boundary → the shortest broken point and its norm.

    Source: Croce & Hein 2020 (FAB), the step without its bias toward the clean point.
    """
    best = delta
    for step in range(steps):
        share = 0.5 * (1 - step / steps) + 0.02
        point = space.at(delta).requires_grad_()
        logits = space.logits(point)
        loss = violation(logits, labels)
        grad = torch.nan_to_num(space.gradient(loss, point))
        with torch.no_grad():
            norm = space.moved(point.detach())
            shorter = (excess(logits, labels) > 0) & (norm < reach)
            best = torch.where(per_sample(shorter, delta), delta, best)
            reach = torch.where(shorter, norm, reach)
            size = space.dual(grad)
            needed = ((grad * delta).flatten(1).sum(1) - loss) / size.clamp_min(torch.finfo(size.dtype).tiny)
            needed = torch.where(size > 0, needed.clamp_min(0) * 1.003, norm)
            goal = per_sample(torch.minimum(needed, 2 * reach), delta) * space.direction(grad)
            delta = space.project(torch.lerp(delta, goal, share), 1.05 * reach)
    return best, reach


@torch.no_grad()
def shorten(space: Space, labels: torch.Tensor, delta: torch.Tensor, steps: int = 18) -> tuple[torch.Tensor, torch.Tensor]:
    """The shortest broken point on the line from the clean point to each delta (N, …), by bisection with forward passes.

    Points are classified as the model's dtype represents them → their change (float64), and its norm (N,), inf if delta itself does not succeed.
    """
    outer = torch.ones(len(space), dtype=torch.float64, device=labels.device)
    inner = torch.zeros_like(outer)
    shortest = space.cast_point(delta)
    holds = excess(space.logits(shortest), labels) > 0
    for _ in range(steps):
        middle = (inner + outer) / 2
        point = space.cast_point(delta.double() * per_sample(middle, delta))
        broken = excess(space.logits(point), labels) > 0
        shortest = torch.where(per_sample(broken, point), point, shortest)
        outer, inner = torch.where(broken, middle, outer), torch.where(broken, inner, middle)
    change = shortest.double() - space.clean.double()
    return change, torch.where(holds, space.measure(change), torch.inf).to(space.work)
