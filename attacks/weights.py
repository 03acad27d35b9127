"""Attacks on the weights: every matrix W becomes W + E with ‖E‖ ≤ radius (times σ(W) if relative), all matrices at once.

The spectral and the Frobenius ball have cheap linear maximisers (ε·UVᵀ of the gradient's SVD, ε·G/‖G‖), so the ascent is
Frank-Wolfe (Jaggi 2013): iterates are averages of points of the ball, and no projection is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from robustlip.attacks.base import Attack, Proposal
from robustlip.attacks.losses import excess, violation
from robustlip.attacks.pgd import PGD
from robustlip.attacks.spaces import Space
from robustlip.attacks.weight_space import WeightSpace
from robustlip.errors import BadInput

# The model size above which there is one perturbation per SHARE samples instead of one per sample.
LARGE, SHARE = 1 << 22, 32


@dataclass(frozen=True)
class WeightAttack(Attack):
    """Frank-Wolfe ascent on the weights within a WeightBall of a given radius.

    steps, restarts: as in PGD. groups: the number of perturbations among which the samples are divided, in order; None for one per sample, or one
    per 32 samples if the model has more than four million weights. A shared change counts for every sample that it breaks.
    Raises BadInput for other threats and for groups < 1.
    """

    steps: int = 40
    restarts: int = 2
    groups: int | None = None

    name: ClassVar[str] = "weights"

    def __post_init__(self) -> None:
        if self.groups is not None and self.groups < 1:
            raise BadInput(f"expected at least 1 group, got {self.groups}; leave it out for one per sample")
        PGD(self.steps, self.restarts)  # checks these options

    def _chunk(self, space: Space) -> int:
        return space.chunk if group_count(space, self.groups) is None else len(space)

    def _run(self, space: Space, labels: torch.Tensor, radius: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor | Proposal:
        if not isinstance(space, WeightSpace):
            raise BadInput(f"expected a weight threat for the attack 'weights', got {type(space).__name__}; use 'pgd' for it")
        assert radius is not None  # needs_radius
        groups = group_count(space, self.groups)
        if groups is None:
            return PGD(self.steps, self.restarts, losses=("margin", "targeted")).search(space, labels, radius, generator)[0]
        group = shares(len(labels), groups, labels.device)
        rows = [shared_ascent(space.take(m), labels[m], radius[0], self.steps) for m in members(group)]
        return Proposal(torch.stack(rows), group)


def group_count(space: Space, groups: int | None) -> int | None:
    """The number of shared perturbations, or None for one per sample."""
    if groups is None and isinstance(space, WeightSpace) and space.clean.shape[1] > LARGE:
        groups = -(-len(space) // SHARE)
    return None if groups is None or groups >= len(space) else groups


def shares(count: int, groups: int, device: torch.device) -> torch.Tensor:
    """The group of each of `count` samples: groups of equal size, in order."""
    return torch.arange(count, device=device) * groups // count


def members(group: torch.Tensor) -> list[torch.Tensor]:
    """The samples of each group that is not empty."""
    return [(group == g).nonzero().flatten() for g in group.unique()]


def shared_ascent(space: WeightSpace, labels: torch.Tensor, radius: torch.Tensor, steps: int) -> torch.Tensor:
    """One change (P,) for all samples of the space that breaks as many as possible.

    Increases the violations of samples that are not broken, each relative to its clean margin, so that easy samples are broken first.
    """
    row = space.zeros(1)
    best, most = row[0], -1
    with torch.no_grad():
        unit = violation(space.shared_logits(space.clean[0], space.x), labels).abs().clamp_min(1e-12)
    for step in range(steps + 1):
        point = space.cast_point(row).requires_grad_()
        logits = space.shared_logits(point[0], space.x)
        holds = excess(logits.detach(), labels) <= 0
        broken = int((~holds).sum())
        if broken > most:
            best, most = row[0], broken
        if broken == len(labels) or step == steps:
            break
        grad = space.gradient((violation(logits, labels) / unit)[holds], point)
        with torch.no_grad():
            row = space.advance(row, torch.nan_to_num(grad), radius[None], 2 / (step + 2))
    return best


def shared_ladder(space: WeightSpace, labels: torch.Tensor, groups: int, guess: torch.Tensor, cap: float, steps: int, rungs: int = 12) -> Proposal:
    """Shared changes at `rungs` radii around the first-order guesses (N,); each sample gets the smallest one that breaks it."""
    low, high = float(guess.min()) / 2, min(4 * float(guess.max()), cap)
    radii = torch.logspace(0, 1, rungs, base=max(high / low, 1.0), device=labels.device, dtype=torch.float64) * min(low, high)
    share = shares(len(labels), groups, labels.device)
    rows: list[torch.Tensor] = []
    group = torch.full_like(labels, -1)
    for radius in radii.to(space.work):  # smallest first
        for m in members(share):
            todo = m[group[m] < 0]
            if len(todo) == 0:
                continue
            row = shared_ascent(space.take(todo), labels[todo], radius, steps)
            with torch.no_grad():
                logits = space.shared_logits(space.cast_point(row[None])[0], space.x[todo])
            group[todo[excess(logits, labels[todo]) > 0]] = len(rows)
            rows.append(row)
    group[group < 0] = len(rows) - 1
    return Proposal(torch.stack(rows), group)
