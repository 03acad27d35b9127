"""Projected gradient ascent with restarts, for every threat (Madry et al. 2018; for l1 and weights: Frank-Wolfe steps)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from robustlip.attacks.base import Attack
from robustlip.attacks.losses import cross_entropy, excess, rivals_by_logit, targeted, violation
from robustlip.attacks.spaces import Space
from robustlip.errors import BadInput
from robustlip.geometry import per_sample, safe_divide

LOSSES = ("margin", "targeted", "ce")
SCHEDULES = ("cosine", "linear", "constant")
# Broken samples are removed from the batch at every PRUNE-th step: often enough to save work, rarely enough not to synchronise a GPU.
PRUNE = 8


@dataclass(frozen=True)
class PGD(Attack):
    """Steepest ascent of a loss inside the ball of the threat.

    steps ≥ 1 per restart; restarts ≥ 1: the first starts at the clean point, with a first step along the gradient to
    the boundary; the others start at random points of the ball. size: first step length in radii; schedule: its decay to 0.
    momentum in [0, 1): heavy ball on gradients normalised in the dual norm. losses: the losses of the restarts, in turn: 'margin'
    (largest other logit), 'targeted' (the class with the k-th largest logit at the clean point, another one in each turn), 'ce'.
    Broken samples leave the search. Raises BadInput for options outside these ranges.
    """

    steps: int = 40
    restarts: int = 3
    size: float = 1.0
    schedule: str = "cosine"
    momentum: float = 0.0
    losses: tuple[str, ...] = LOSSES

    name: ClassVar[str] = "pgd"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise BadInput(f"expected steps and restarts of at least 1, got {self.steps} and {self.restarts}; raise them")
        if not (self.size > 0 and 0 <= self.momentum < 1):
            raise BadInput(f"expected size above 0 and momentum in [0, 1), got {self.size} and {self.momentum}; change them")
        if self.schedule not in SCHEDULES:
            raise BadInput(f"expected a schedule among {', '.join(SCHEDULES)}, got {self.schedule!r}; name one of them")
        if not self.losses or any(loss not in LOSSES for loss in self.losses):
            raise BadInput(f"expected losses among {', '.join(LOSSES)}, got {self.losses}; name at least one of them")

    def _run(self, space: Space, labels: torch.Tensor, radius: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
        assert radius is not None  # needs_radius
        return self.search(space, labels, radius, generator)[0]

    def search(
        self,
        space: Space,
        labels: torch.Tensor,
        radius: torch.Tensor,
        generator: torch.Generator,
        start: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best perturbation within radius (N,) of each sample, and its excess (N,), which is above 0 if the sample is broken.

        start (N, …): starting point of the first restart instead of the clean point; that restart then takes smaller steps.
        """
        best = space.zeros()
        value = torch.full((len(space),), -torch.inf, dtype=space.work, device=labels.device)
        rivals = labels[:, None]
        if "targeted" in self.losses[: self.restarts]:
            with torch.no_grad():
                rivals = rivals_by_logit(space.logits(space.clean), labels, self.restarts)
        for restart in range(self.restarts):
            active = (value <= 0).nonzero().flatten()
            if len(active) == 0:
                break
            part, limit = space.take(active), radius[active]
            first = restart == 0
            if first and start is not None:
                delta = part.project(start[active].to(space.work), limit)
            else:
                delta = part.zeros() if first else part.random(limit, generator)
            turn, loss = restart // len(self.losses), self.losses[restart % len(self.losses)]
            # With several losses in turn, 'targeted' begins with the third class, because 'margin' attacked the second one.
            rank = min(turn + ("margin" in self.losses), rivals.shape[1] - 1)
            size = self.size * (0.3 if first and start is not None else 1.0)
            found, reached = self._climb(part, labels[active], limit, delta, loss, rivals[active, rank], size)
            better = reached > value[active]
            best[active] = torch.where(per_sample(better, found), found, best[active])
            value[active] = torch.where(better, reached, value[active])
        return best, value

    def _rate(self, step: int) -> float:
        done = step / self.steps
        return {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[self.schedule]

    def _climb(
        self,
        space: Space,
        labels: torch.Tensor,
        radius: torch.Tensor,
        delta: torch.Tensor,
        loss: str,
        targets: torch.Tensor,
        size: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One restart from delta (N, …) → the best perturbation and its excess, per sample.

        A gradient that is not finite makes the later points of its sample NaN, which are never better, so earlier results are kept.
        """
        kept, worth = delta.clone(), torch.full_like(radius, -torch.inf)
        alive = torch.arange(len(space), device=labels.device)  # rows that are still attacked
        best, value = delta, worth.clone()
        inertia = torch.zeros_like(delta) if self.momentum else None
        for step in range(self.steps + 1):
            last = step == self.steps
            point = space.at(delta, radius).requires_grad_(not last)
            logits = space.logits(point)
            reached = excess(logits.detach(), labels)
            better = reached > value
            value = torch.where(better, reached, value)
            best = torch.where(per_sample(better, delta), delta, best)
            if last:
                break
            grad = space.gradient(objective(loss, logits, labels, targets), point)
            if step % PRUNE == PRUNE - 1:
                keep = (value <= 0).nonzero().flatten()
                if len(keep) == 0:
                    break
                if len(keep) <= 0.75 * len(alive):
                    kept[alive], worth[alive] = best, value
                    space, alive, labels, targets, radius = space.take(keep), alive[keep], labels[keep], targets[keep], radius[keep]
                    delta, grad, best, value = delta[keep], grad[keep], best[keep], value[keep]
                    inertia = inertia[keep] if inertia is not None else None
            with torch.no_grad():
                if inertia is not None:
                    inertia = self.momentum * inertia + safe_divide(grad, per_sample(space.dual(grad), grad))
                    grad = inertia
                delta = space.advance(delta, grad, radius, size * self._rate(step))
        kept[alive], worth[alive] = best, value
        return kept, worth


def objective(loss: str, logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The named loss per sample (N,), to be maximised."""
    if loss == "margin":
        return violation(logits, labels)
    return targeted(logits, labels, targets) if loss == "targeted" else cross_entropy(logits, labels)
