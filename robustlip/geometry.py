"""The geometry of a threat: the norm of a perturbation, the largest ⟨g, δ⟩, the steepest direction, the projection onto the ball.

A vector consists of all dimensions after the first `keep` (default 1): x (N, …) → (N,). Radii are (N,). Values are computed by torch in the dtype of
the input; certifiers round theirs up. `robustlip.threats` defines threats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustlip.errors import BadInput
from robustlip.threats import EmbeddingBall, InputBall, Threat, dual_order_of, order_of


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(N,) → (N, 1, …, 1), which broadcasts against `like` (N, …)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator/denominator, and 0 where the denominator is 0 (a gradient that vanishes gives no direction, not NaN)."""
    return torch.where(denominator > 0, numerator / denominator.clamp_min(torch.finfo(denominator.dtype).tiny), 0.0)


def _norm(x: Tensor, order: float, keep: int) -> Tensor:
    x = x.flatten(keep)
    if order == math.inf:  # vector_norm is an order of magnitude slower here
        return x.abs().amax(-1)
    return torch.linalg.vector_norm(x, ord=order, dim=-1)


def length(x: Tensor, norm: str, keep: int = 1) -> Tensor:
    """‖x‖ in 'l1', 'l2' or 'linf'."""
    return _norm(x, order_of(norm), keep)


def dual_length(g: Tensor, norm: str, keep: int = 1) -> Tensor:
    """The largest ⟨g, δ⟩ over ‖δ‖ ≤ 1 in 'l1', 'l2' or 'linf': the dual norm of g."""
    return _norm(g, dual_order_of(norm), keep)


def largest(g: Tensor, threat: Threat, keep: int = 1) -> Tensor:
    """The largest ⟨g, δ⟩ over the threat's ball of radius 1, boxes apart. g: (…, inputs) of an input ball, (…, T, D) of an embedding ball.

    Raises BadInput for a weight ball, whose matrices have norms of their own (`robustlip.attacks.weights`).
    """
    if isinstance(threat, InputBall):
        return dual_length(g, threat.norm, keep)
    if isinstance(threat, EmbeddingBall):
        chosen = g[..., threat.positions(g.shape[-2]), :]
        if threat.joint:
            return length(chosen, "l2", keep)
        return torch.linalg.vector_norm(chosen, dim=-1).sum(-1)
    raise BadInput(f"expected an input or embedding threat, got {threat.name}; ask robustlip.attacks for weight threats")


def steepest(g: Tensor, norm: str) -> Tensor:
    """The δ (N, …) of norm 1 with the largest ⟨g, δ⟩; 0 where g is 0."""
    if norm == "linf":
        return g.sign()
    if norm == "l2":
        size = _norm(g, 2, 1)
        return g * per_sample(safe_divide(torch.ones_like(size), size), g)
    flat = g.flatten(1)
    top = flat.abs().argmax(1, keepdim=True)
    return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign()).view_as(g)


def project(delta: Tensor, radius: Tensor, norm: str) -> Tensor:
    """The nearest point (in l2) of the ball ‖δ‖ ≤ radius: delta (N, …), radius (N,)."""
    if norm == "linf":
        r = per_sample(radius, delta)
        return torch.minimum(torch.maximum(delta, -r), r)  # three times as fast as clamp with tensors
    if norm == "l2":
        return delta * per_sample(safe_divide(radius, _norm(delta, 2, 1)).clamp(max=1.0), delta)
    return project_l1(delta, radius)


def project_l1(delta: Tensor, radius: Tensor) -> Tensor:
    """The nearest point (in l2) of the l1 ball: delta (N, …), radius (N,). Source: Duchi et al. 2008, figure 1."""
    flat = delta.flatten(1)
    size = flat.abs()
    ordered = size.sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - radius[:, None]
    count = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
    last = ((ordered - excess / count) > 0).sum(1, keepdim=True).clamp_min(1)
    threshold = excess.gather(1, last - 1) / last
    inside = size.sum(1, keepdim=True) <= radius[:, None]
    shrunk = flat.sign() * (size - threshold.clamp_min(0)).clamp_min(0)
    return torch.where(inside, flat, shrunk).view_as(delta)


def within(delta: Tensor, clean: Tensor, box: tuple[float, float] | None) -> Tensor:
    """δ clamped so that clean + δ stays in the box: exact in float64, and 0 where the clean point is on the border."""
    if box is None:
        return delta
    clean = clean.to(delta.dtype)
    return delta.clamp(box[0] - clean, box[1] - clean)
