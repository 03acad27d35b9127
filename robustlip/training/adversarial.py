"""Adversarial training of transformers in embedding space: the loss after one gradient step on the embeddings.

Every token moves by ε·(largest norm of the embedding table) along its own gradient, all at once: the fast gradient method of Goodfellow et
al. 2015 in ℓ2, on embeddings as in Miyato et al. 2017; the training loss is only that of the perturbed point (Madry et al. 2018 with one step).
The radius is relative, because scaling the table scales all radii.

A certified radius is roughly the margin divided by the norm of its gradient, minus the looseness of the bounds (docs/tightness.md). Caps bound the
gradient for all inputs; this loss reduces it on the data. It guarantees nothing: certificates come from robustlip.certify.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustlip.constraints.norms import unit
from robustlip.layers import Chain
from robustlip.training.objective import cross_entropy, radius_at
from robustlip.training.recipe import LossPart


def worst_embeddings(model: Chain, embeddings: Tensor, y: Tensor, radius: Tensor | float, loss: LossPart) -> Tensor:
    """Embeddings (N, T, D) with each token moved by at most `radius` (ℓ2) to maximise the linearised loss for labels y; without gradient.

    A token whose gradient is 0 does not move.
    """
    point = embeddings.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model.from_embeddings(point), y, loss), point)
    # Scale-free: in a saturated softmax squares of gradients underflow in float32, and a norm of 0 would give an infinite step.
    return (point + radius * unit(gradient)).detach()


def adversarial_loss(model: Chain, x: Tensor, y: Tensor, loss: LossPart, step: int) -> Tensor:
    """The training loss of a step: token ids x (N, T), labels y (N, T). Plain for `start` steps; then the radius grows over `ramp` steps."""
    if step < loss.start:
        return cross_entropy(model(x), y, loss)
    embeddings = model.embed(x)
    # The layers as a list, because a slice of the model would be another model.
    table = next(layer.weight for layer in list(model)[: model.embedding_depth] if isinstance(layer, nn.Embedding))
    radius = radius_at(loss, step) * torch.linalg.vector_norm(table.detach(), dim=-1).amax()
    # The step is a constant; gradients reach the table through the embeddings to which it is added.
    change = worst_embeddings(model, embeddings, y, radius, loss) - embeddings.detach()
    return cross_entropy(model.from_embeddings(embeddings + change), y, loss)
