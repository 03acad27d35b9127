"""Losses of attacks, and the criterion of success during a search. Logits (N, C), labels (N,) → (N,)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from robustlip.attacks.spaces import HALVES


def wide(logits: torch.Tensor) -> torch.Tensor:
    """Logits of a model in half precision as float32, which represents them and nearly all of their differences exactly."""
    return logits.float() if logits.dtype in HALVES else logits


def violation(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """max_{j≠y} f_j − f_y: positive where the prediction is not the label."""
    logits = wide(logits)
    own = logits.gather(1, labels[:, None])
    rivals = logits.scatter(1, labels[:, None], -torch.inf)
    return rivals.amax(1) - own[:, 0]


def excess(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The violation minus an allowance for the rounding of the logits.

    Above 0 the sample is broken by more than rounding: another batch size or another machine sums in another order, and the success should
    be reproducible there. In float32 and float64, sums of hundreds of terms then differ by a few eps of the largest logit: the allowance is 8 eps.
    In half precision, products are summed in float32 and rounded once, so that another order rarely changes a logit, by at most one ulp: the
    allowance is one eps, which is one or two ulps, and still requires two ulps between logits near the largest one.
    """
    slack = 1 if logits.dtype in HALVES else 8
    return violation(logits, labels) - slack * torch.finfo(logits.dtype).eps * wide(logits).abs().amax(1)


def targeted(logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """f_target − f_y."""
    logits = wide(logits)
    return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None]))[:, 0]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross entropy of the logits, scaled to a spread of 8 per sample.

    So the direction of its gradient does not depend on the scale of the logits, and the gradient does not underflow in a saturated softmax.
    """
    logits = wide(logits)
    spread = (logits.amax(1) - logits.amin(1)).detach().clamp_min(torch.finfo(logits.dtype).tiny)
    return F.cross_entropy(logits * (8 / spread)[:, None], labels, reduction="none")


def rivals_by_logit(logits: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest logits other than the label's, the largest first: class numbers (N, min(count, C − 1)) int64."""
    count = min(count, logits.shape[1] - 1)
    return logits.scatter(1, labels[:, None], -torch.inf).topk(count, dim=1).indices
