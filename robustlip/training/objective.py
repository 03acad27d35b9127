"""What the losses share: cross entropy as a recipe has it, and the radius of a step."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from robustlip.training.recipe import LossPart


def cross_entropy(logits: Tensor, y: Tensor, loss: LossPart) -> Tensor:
    """Mean over all predictions of logits (…, V), labels y (…)."""
    return F.cross_entropy(loss.logit_scale * logits.flatten(0, -2), y.flatten(), label_smoothing=loss.label_smoothing)


def radius_at(loss: LossPart, step: int) -> float:
    """ε of a training step: near 0 for `start` steps, then over `ramp` steps up to epsilon, the first quarter of them with the fourth power.

    The two pieces, t⁴ and its tangent, meet with equal slopes, as in the ramp that Shi et al. use.
    """
    assert loss.epsilon is not None
    part = 1.0 if step >= loss.start + loss.ramp else max(0.0, (step + 1 - loss.start) / (loss.ramp + 1))
    bend = 0.25
    total = bend**4 + 4 * bend**3 * (1 - bend)
    shape = part**4 if part < bend else bend**4 + 4 * bend**3 * (part - bend)
    # Not 0: the regularisers are ratios of radii.
    return loss.epsilon * max(shape / total, 1e-4)
