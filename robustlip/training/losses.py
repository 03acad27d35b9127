"""Training on certified margins: the loss of the logits that a Lipschitz bound guarantees.

With L ≥ the ℓ2 Lipschitz constant from the raw input to the last hidden state and rows u of the last layer, f_y − f_j falls by at most
ε·L·‖u_y − u_j‖₂ in the ℓ2 ball of radius ε (docs/theory.md, section 4). So the worst margin is m_j = f_y − f_j − ε·L·‖u_y − u_j‖₂, and the loss is
the cross entropy of logits −s·m_j (0 for the label itself). ε = 0 gives plain cross entropy. Margins count relative to the radius that they certify,
so scaling the logits does not help, and a sample whose margin is far above ε adds almost nothing to the loss.

L is the product of the layers' constants, and gradients flow through it: an unconstrained model can reduce it; in a constrained one it is bounded
by the caps. Spectral norms are estimated by power iteration (from below), at a tenth of the cost of a bound. Sources: Tsuzuku et al. 2018
(Lipschitz-margin training), Leino et al. 2021 and Hu et al. 2023 (one bound per class).

Bounds in this file use the arithmetic of training. Certificates come from robustlip.certify, never from this file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustlip.constraints.norms import top_singular
from robustlip.errors import BadInput
from robustlip.layers import Chain, GroupSort, Householder, MaxMin, Normalize
from robustlip.training.objective import cross_entropy, radius_at
from robustlip.training.recipe import LossPart
from robustlip.training.reparametrize import plain_type

# Layers with slopes of at most 1, and layers that only move numbers.
_ONE = (nn.Flatten, nn.Identity, nn.ReLU, nn.Tanh, MaxMin, GroupSort, Householder)


def lipschitz_margins(model: Chain, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """(N, C): f_y − f_j at x (N, …), labels y (N,), minus its largest decrease in the ℓ2 ball of radius epsilon (raw input units); 0 at j = y.

    Raises BadInput for a model that does not end with a Linear layer, or has layers other than Flatten, Normalize, Linear, ReLU, Tanh, MaxMin,
    GroupSort and Householder.
    """
    layers = list(model)
    head = layers[-1]
    if not isinstance(head, nn.Linear) or plain_type(head) is not nn.Linear:
        raise BadInput("expected an MLP that ends with a Linear layer, got another; train it with loss kind 'cross-entropy'")
    logits = model(x)
    rows = head.weight
    # Distances of rows from their products: (C, C). The root has a finite gradient at 0 (the label itself) and is increased by at most 10⁻¹⁰.
    difference = rows[:, None, :] - rows[None, :, :]
    distance = (difference.square().sum(-1) + 1e-20).sqrt()
    decrease = epsilon * body_constant(layers[:-1], rows) * distance[y]
    margins = logits.gather(1, y[:, None]) - logits - decrease
    return margins.scatter(1, y[:, None], 0.0)


def body_constant(layers: list[nn.Module], like: Tensor) -> Tensor:
    """The product of the layers' ℓ2 Lipschitz constants with estimated norms: a differentiable scalar, dtype of `like`. Raises BadInput as above."""
    constant = like.new_ones(())
    for layer in layers:
        if isinstance(layer, nn.Linear) and plain_type(layer) is nn.Linear:
            constant = constant * _spectral_norm(layer.weight)
        elif isinstance(layer, Normalize) and type(layer) is Normalize:
            constant = constant / layer.std.min()
        elif type(layer) not in _ONE:
            raise BadInput(
                f"expected Flatten, Normalize, Linear, ReLU, Tanh, MaxMin, GroupSort and Householder layers for certified margins, got {layer}; "
                f"use activation = 'relu' or 'maxmin'"
            )
    return constant


def _spectral_norm(weight: Tensor) -> Tensor:
    """σ = uᵀWv with constant u and v, so that its gradient is uvᵀ, the gradient of σ."""
    with torch.no_grad():
        u, _, v = top_singular(weight)
    return (u.mT @ weight @ v).squeeze()


def margin_loss(model: Chain, x: Tensor, y: Tensor, loss: LossPart, step: int) -> Tensor:
    """The training loss of a step: cross entropy of −logit_scale·m_j at this step's ε, which grows over `ramp` steps after `start`."""
    margins = lipschitz_margins(model, x, y, radius_at(loss, step))
    return cross_entropy(-margins, y, loss)
