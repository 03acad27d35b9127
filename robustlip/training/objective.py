"""Functions that several losses share: the cross entropy of a recipe, and the radius of a step."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from robustlip.training.recipe import LossPart


def cross_entropy(logits: Tensor, y: Tensor, loss: LossPart) -> Tensor:
    """Mean over all predictions of logits (…, V), labels y (…)."""
    return F.cross_entropy(loss.logit_scale * logits.flatten(0, -2), y.flatten(), label_smoothing=loss.label_smoothing)


def radius_at(loss: LossPart, step: int) -> float:
    """ε of a training step: near 0 for `start` steps, then growing over `ramp` steps to epsilon, in the first quarter with the fourth power.

    Its two parts, t⁴ and a tangent of it, meet with equal slopes, as in the ramp of Shi et al.
    """
    assert loss.epsilon is not None
    part = 1.0 if step >= loss.start + loss.ramp else max(0.0, (step + 1 - loss.start) / (loss.ramp + 1))
    bend = 0.25
    total = bend**4 + 4 * bend**3 * (1 - bend)
    shape = part**4 if part < bend else bend**4 + 4 * bend**3 * (part - bend)
    # Not 0, because the regularisers are ratios of radii.
    return loss.epsilon * max(shape / total, 1e-4)
