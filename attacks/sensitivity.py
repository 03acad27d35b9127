"""Observed sensitivity: the largest observed change of the logits per unit of a threat. A lower estimate of a Lipschitz constant."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from robustlip.attacks.base import space_of
from robustlip.attacks.spaces import Space
from robustlip.attacks.weight_space import WeightSpace
from robustlip.checks import check_fit
from robustlip.errors import BadInput, RobustlipError, first_line
from robustlip.execution import covered_kernels
from robustlip.geometry import per_sample, safe_divide
from robustlip.modes import in_eval_mode, random_state_kept
from robustlip.samples import as_samples, as_threat
from robustlip.target import Target
from robustlip.threats import Threat


@dataclass(frozen=True)
class Sensitivity:
    """The largest ratio ‖f(x + δ) − f(x)‖₂/‖δ‖ found around each sample; f: the logits of the prediction.

    ratio: float64 (N,), per unit of the threat (per-token balls: of max_t‖δ_t‖; relative weight balls: per unit of σ(W)).
    change: float64 (N,), ‖f(x + δ) − f(x)‖₂. distance: float64 (N,), ‖δ‖ in the norm of the threat, ≤ its radius.
    witness: the δ themselves, float64 (N, …) (rows of flattened weight changes for weight threats).
    Everything is measured in float64 on a float64 copy of the model, so float32 rounding cannot inflate it. The true constants are ≥ ratio.
    """

    threat: Threat
    ratio: np.ndarray
    change: np.ndarray
    distance: np.ndarray
    witness: torch.Tensor

    @property
    def largest(self) -> float:
        return float(self.ratio.max())


def observed_sensitivity(
    model: nn.Module,
    x: Any,
    threat: Threat | str,
    *,
    starts: int = 3,
    power_steps: int = 15,
    ascent_steps: int = 15,
    generator: torch.Generator | None = None,
) -> Sensitivity:
    """Searches the most sensitive direction at each x (N, …), first at the point, then over finite steps within the radius.

    starts: number of random initial directions. power_steps: steps of the nonlinear power iteration v ← steepest(Jᵀ J v) (Boyd 1974,
    for the threat's norm). ascent_steps: steps of ascent on the finite difference, at the threat's radius and at a tenth of it;
    with radius=None only small steps (10⁻⁴ of the size of x, or of σ(W)) are used.
    model: any nn.Module (see `robustlip.target`); it is copied and not changed. x, threat: as in `robustlip.samples`.
    Raises BadInput for starts < 1 and for inputs that the threat's space refuses.
    """
    if starts < 1 or power_steps < 1 or ascent_steps < 0:
        raise BadInput(
            f"expected starts and power_steps of at least 1 and ascent_steps of at least 0, got {(starts, power_steps, ascent_steps)}; raise them"
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    x, threat = as_samples(x)[0], as_threat(threat)
    x = x.double() if x.is_floating_point() else x
    target = Target(_double(model))
    with random_state_kept(), in_eval_mode(target.module), covered_kernels(target.kind), torch.enable_grad():
        x = x.clone()
        target.check_inputs(x)
        check_fit(target.module, x)
        target.compare_batches(x)
        space = space_of(target, x, threat)
        parts = [
            _search(space.take(rows), threat.radius, starts, power_steps, ascent_steps, generator)
            for rows in torch.arange(len(x), device=x.device).split(space.chunk)
        ]
    ratio, change, distance, witness = (torch.cat(columns) for columns in zip(*parts, strict=True))
    if not bool(torch.isfinite(ratio).all()):
        where = int((~torch.isfinite(ratio)).nonzero()[0])
        raise RobustlipError(f"expected finite logits, got NaN or infinity around sample {where}; find the layer that overflows")
    return Sensitivity(threat, ratio.cpu().numpy(), change.cpu().numpy(), distance.cpu().numpy(), witness)


def _double(model: nn.Module) -> nn.Module:
    """A copy of the model in float64, without gradients for its weights."""
    try:
        with torch.no_grad():  # otherwise parameters of a copied or cast scripted module are not leaves
            copied = copy.deepcopy(model).double()
        for parameter in copied.parameters():
            parameter.requires_grad_(False)
        return copied
    except Exception as error:  # a user's module may raise anything
        raise BadInput(f"expected a model that can be copied into float64, got {first_line(error)}; remove the part that cannot be copied") from None


def _search(
    space: Space, radius: float | None, starts: int, power_steps: int, ascent_steps: int, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Per sample: ratio, change, distance, witness."""
    one = torch.ones(len(space), dtype=torch.float64, device=space.clean.device)
    with torch.no_grad():
        base = space.logits(space.clean)
    tiny = one * (1e-4 * _size(space) if radius is None else min(1e-4 * _size(space), radius))
    zero = torch.zeros_like(one)
    best: tuple[torch.Tensor, ...] = (zero, zero, zero, torch.zeros_like(space.clean))

    def consider(best: tuple[torch.Tensor, ...], delta: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            point, distance = space.finalize(delta, None if radius is None else one * radius)
            change = torch.linalg.vector_norm(space.logits(point) - base, dim=1)
            ratio = safe_divide(change, distance)
            better = ~(ratio <= best[0])  # NaN is kept, and reported by the caller
            new = (ratio, change, distance, point - space.clean)
            return tuple(torch.where(per_sample(better, b), a, b) for a, b in zip(new, best, strict=True))

    for _ in range(starts):
        v = space.random(one, generator)
        v = v * per_sample(safe_divide(one, space.measure(v)), v)
        for _ in range(power_steps):
            v = space.direction(_pull(space, v, tiny))
        best = consider(best, per_sample(tiny, v) * v)
        if radius is None or ascent_steps == 0:
            continue
        for length in (one * radius, one * (radius / 10)):
            delta = longest = per_sample(length, v) * v
            most = torch.zeros_like(one)
            for step in range(ascent_steps):
                point = (space.clean + delta).requires_grad_()
                moved = torch.linalg.vector_norm(space.logits(point) - base, dim=1)
                grad = torch.nan_to_num(torch.autograd.grad(moved.sum(), point)[0])
                with torch.no_grad():
                    further = moved > most
                    longest = torch.where(per_sample(further, delta), delta, longest)
                    most = torch.where(further, moved, most)
                    delta = space.advance(delta, grad, length, 2 / (step + 3))
            best = consider(consider(best, delta), longest)
    return best


def _pull(space: Space, v: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Jᵀ J v per sample; J v by a central difference in float64, because not every layer supports forward mode."""
    step = per_sample(length, v) * v
    with torch.no_grad():
        jv = space.logits(space.clean + step) - space.logits(space.clean - step)
    point = space.clean.detach().clone().requires_grad_()
    return torch.autograd.grad((space.logits(point) * jv).sum(), point)[0]


def _size(space: Space) -> float:
    """A typical size of the perturbed values; for weights, in units of the threat, it is 1."""
    return 1.0 if isinstance(space, WeightSpace) else max(float(space.measure(space.clean).median()), 1e-3)
