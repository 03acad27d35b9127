"""Adversarial training of transformers in embedding space: the loss at the embeddings that one gradient step found worst.

Every token moves by ε·(largest norm of the embedding table) along its own gradient, all at once: the fast gradient method of Goodfellow et
al. 2015 in ℓ2, on embeddings as Miyato et al. 2017 did, the whole training loss being that of the moved point (Madry et al. 2018 with one step).
The radius is relative because a longer table has longer radii for nothing.

A certified radius is about the margin over the gradient's norm, less what the bounds lose (docs/tightness.md); caps bound the gradient from above
for all inputs, this lowers it where the data is. It promises nothing: certificates come from robustlip.certify.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustlip.constraints.norms import unit
from robustlip.layers import Chain
from robustlip.training.objective import cross_entropy, radius_at
from robustlip.training.recipe import LossPart


def worst_embeddings(model: Chain, embeddings: Tensor, y: Tensor, radius: Tensor | float, loss: LossPart) -> Tensor:
    """Embeddings (N, T, D), each token at most `radius` (ℓ2) away, to first order those of the largest loss for labels y; without gradient.

    A token whose gradient is 0 stays where it is.
    """
    point = embeddings.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model.from_embeddings(point), y, loss), point)
    # Whatever its scale: squares of what a saturated softmax leaves vanish in float32, and a norm of 0 would make a step without end.
    return (point + radius * unit(gradient)).detach()


def adversarial_loss(model: Chain, x: Tensor, y: Tensor, loss: LossPart, step: int) -> Tensor:
    """The training loss of a step: token ids x (N, T), labels y (N, T). Plain for `start` steps, then with a radius that grows over `ramp`."""
    if step < loss.start:
        return cross_entropy(model(x), y, loss)
    embeddings = model.embed(x)
    # The layers as a list: a slice of a model makes another model.
    table = next(layer.weight for layer in list(model)[: model.embedding_depth] if isinstance(layer, nn.Embedding))
    radius = radius_at(loss, step) * torch.linalg.vector_norm(table.detach(), dim=-1).amax()
    # The step is a constant, so gradients reach the table through the embeddings that it is added to.
    change = worst_embeddings(model, embeddings, y, radius, loss) - embeddings.detach()
    return cross_entropy(model.from_embeddings(embeddings + change), y, loss)
