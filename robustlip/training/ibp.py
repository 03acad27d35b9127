"""Training of MLPs with interval bounds, the certified alternative to Lipschitz constraints. Gowal et al. 2018; Shi et al. 2021.

An interval around a point is (centre c, radius r ≥ 0) per coordinate. Linear: c ← Wc + b, r ← |W|r, and from the input ball r_j = ε‖w_j‖₁ (linf)
or ε‖w_j‖₂ (l2), the dual norm. A monotone activation maps the two ends. The last layer is merged with the difference of two logits, so
the worst margin is m_j = (w_y − w_j)·c + b_y − b_j − |w_y − w_j|·r. The loss is the cross entropy of logits −m_j (own label: 0).

Shi et al. make a short ramp of ε sufficient by three measures: initial weights with standard deviation √(2π)/fan_in, which keep the mean radius
constant (a linear layer and a ReLU have mean gain 1); a penalty if the mean radius still grows by more than 1/τ; and a penalty
if most ReLUs are all active or all inactive. Batch normalisation, which they add, is not used: MLPs here have none.

Bounds in this file use the arithmetic of training. Certificates come from robustlip.certify, never from this file.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.errors import BadInput
from robustlip.layers import Chain, Normalize
from robustlip.training.objective import cross_entropy, radius_at
from robustlip.training.recipe import LossPart
from robustlip.training.reparametrize import linears_of, plain_type

_MONOTONE = (nn.ReLU, nn.Tanh, nn.Identity)


@torch.no_grad()
def ibp_initialize(model: Chain) -> None:
    """Weights with standard deviation √(2π)/fan_in and biases 0: E|w| = 2/fan_in, so a linear layer doubles the radius and a ReLU halves it."""
    for linear in linears_of(model):
        nn.init.normal_(linear.weight, std=math.sqrt(2 * math.pi) / linear.in_features)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def interval_margins(model: Chain, x: Tensor, y: Tensor, epsilon: float, norm: str) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """(margins, pre-activations) of an MLP over the balls around x (N, …) of labels y (N,), in raw input units.

    margins (N, C): a lower bound of f_y − f_j on the ball, 0 at j = y. pre-activations: (centre, radius), each (N, n), before
    every activation. norm: 'linf' or 'l2'. Raises BadInput for a layer other than Flatten, Normalize, Linear, ReLU and Tanh.
    """
    layers = list(model)
    head = layers[-1]
    if not isinstance(head, nn.Linear) or plain_type(head) is not nn.Linear:
        raise BadInput("expected an MLP that ends with a Linear layer, got another; train it with loss kind 'cross-entropy'")
    centre, scale, radius = x, torch.ones_like(x), None
    seen = []
    for layer in layers[:-1]:
        kind = plain_type(layer)
        if kind is nn.Flatten:
            centre, scale = layer(centre), layer(scale)
            radius = None if radius is None else layer(radius)
        elif kind is Normalize and radius is None:
            centre, scale = layer(centre), layer(scale) - layer(torch.zeros_like(scale))
        elif isinstance(layer, nn.Linear) and kind is nn.Linear:
            centre, radius = layer(centre), _spread(layer.weight, scale, radius, epsilon, norm)
        elif kind in _MONOTONE and radius is not None:
            seen.append((centre, radius))
            low, high = layer(centre - radius), layer(centre + radius)
            centre, radius = (high + low) / 2, (high - low) / 2
        else:
            raise BadInput(f"expected Flatten, Normalize, Linear, ReLU and Tanh layers for interval bounds, got {layer}; use activation = 'relu'")
    difference = head.weight[y][:, None, :] - head.weight[None, :, :]  # (N, C, n)
    middle = (difference @ centre[:, :, None])[..., 0]
    if head.bias is not None:
        middle = middle + head.bias[y][:, None] - head.bias[None, :]
    return middle - _spread_each(difference, scale, radius, epsilon, norm), seen


def _spread(weight: Tensor, scale: Tensor, radius: Tensor | None, epsilon: float, norm: str) -> Tensor:
    """(N, m): the radius of Wx. radius None: x is the input, in the ball, with coordinates scaled by scale (N, n)."""
    if radius is not None:
        return radius @ weight.abs().mT
    if norm == "linf":
        return epsilon * scale @ weight.abs().mT
    return epsilon * _root(scale.square() @ weight.square().mT)


def _spread_each(rows: Tensor, scale: Tensor, radius: Tensor | None, epsilon: float, norm: str) -> Tensor:
    """The same for separate rows (N, C, n) per sample: (N, C)."""
    if radius is not None:
        return (rows.abs() @ radius[:, :, None])[..., 0]
    if norm == "linf":
        return epsilon * (rows.abs() @ scale[:, :, None])[..., 0]
    return epsilon * _root((rows.square() @ scale.square()[:, :, None])[..., 0])


def _root(x: Tensor) -> Tensor:
    """√x with a finite gradient at 0 (the row of the label itself), increased by at most 10⁻¹⁰."""
    return (x + 1e-20).sqrt()


def _regularizer(seen: list[tuple[Tensor, Tensor]], first: float, tolerance: float) -> Tensor:
    """Shi et al. 2021, section 3: tightness and ReLU balance, averaged over the layers. first: mean radius of the input."""
    total = seen[0][0].new_zeros(())
    for centre, radius in seen:
        total = total + F.relu(tolerance - first / radius.mean().clamp_min(1e-12)) / tolerance
        active, inactive = (centre - radius > 0), (centre + radius < 0)
        spread = (centre - centre.mean()).square()
        pairs = (((centre * active).mean(), -(centre * inactive).mean()), ((spread * active).sum(), (spread * inactive).sum()))
        for a, b in pairs:
            # Without active or without inactive neurons the ratio is undefined, and its gradient would be NaN.
            if float(a.detach()) > 0 and float(b.detach()) > 0:
                ratio = torch.minimum(a / b, b / a)
                total = total + F.relu(tolerance - ratio) / tolerance
    return total / len(seen)


def ibp_loss(model: Chain, x: Tensor, y: Tensor, loss: LossPart, step: int) -> Tensor:
    """The training loss of a step: robust cross entropy at this step's ε, plus λ(1 − ε/epsilon) times the regularisers."""
    assert loss.epsilon is not None
    epsilon = radius_at(loss, step)
    margins, seen = interval_margins(model, x, y, epsilon, loss.norm)
    robust = cross_entropy(-margins, y, loss)
    weight = loss.regularizer * (1 - epsilon / loss.epsilon)
    if weight == 0 or not seen:
        return robust
    # The half-width of the box that the first layer maps to the same mean radius, at initialisation: E|w|·n·h = ε·√(E w²·n) gives h = ε·√(π/(2n)).
    first = epsilon if loss.norm == "linf" else epsilon * math.sqrt(math.pi / (2 * x[0].numel()))
    return robust + weight * _regularizer(seen, first, loss.tolerance)


@torch.no_grad()
def verified_accuracy(model: Chain, x: Tensor, y: Tensor, loss: LossPart) -> Tensor:
    """(N,) booleans: whether interval bounds in training arithmetic keep the label on the whole ball. For progress output, not a certificate."""
    assert loss.epsilon is not None
    margins, _ = interval_margins(model, x, y, loss.epsilon, loss.norm)
    others = torch.ones_like(margins, dtype=torch.bool).scatter(1, y[:, None], False)
    return (margins > 0).logical_or(~others).all(1)
