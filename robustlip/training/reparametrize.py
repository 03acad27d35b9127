"""Reparametrised weights, the usual rivals of a constraint: trained through, then folded into plain weights for the certifiers.

Neither is a guarantee: both divide by a power iteration's estimate of σ, which is below the truth. The certifier measures what comes out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from robustlip.errors import UnsupportedLayer
from robustlip.layers import AddPositions, Attention

# Rows that are read, and numbers that are added to tokens and scores: no matrices.
_LEFT = (nn.Embedding, AddPositions, Attention)


class SigmaReparam(nn.Module):
    """W → (γ/σ(W))·W with one learned γ a matrix, 1 at first; σ = uᵀWv by one power iteration a training step. Source: Zhai et al. 2023."""

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, iterations: int = 15) -> None:
        super().__init__()
        self.gamma = nn.Parameter(weight.new_ones(()))
        self.register_buffer("u", F.normalize(torch.randn_like(weight[:, 0]), dim=0))
        self.register_buffer("v", F.normalize(torch.randn_like(weight[0]), dim=0))
        for _ in range(iterations):
            self._iterate(weight)

    @torch.no_grad()
    def _iterate(self, weight: Tensor) -> None:
        self.u.copy_(F.normalize(weight @ self.v, dim=0))
        self.v.copy_(F.normalize(weight.mT @ self.u, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            self._iterate(weight)
        # Clones: the next iteration writes into the buffers, and backward needs them as they were.
        return self.gamma / (self.u.clone() @ weight @ self.v.clone()) * weight


def plain_type(layer: nn.Module) -> type:
    """The class of a layer, without what a parametrisation of its weight made of it. A subclass is another layer."""
    return parametrize.type_before_parametrizations(layer)


def linears_of(model: nn.Module) -> list[nn.Linear]:
    """The Linear layers. Raises UnsupportedLayer for a layer with another kind of matrix, which would be left out unsaid."""
    found = []
    for module in model.modules():
        kind = plain_type(module)
        if isinstance(module, nn.Linear) and kind is nn.Linear:
            found.append(module)
        elif kind not in _LEFT and any(p.dim() > 1 for p in module.parameters(recurse=False)) and kind is not parametrize.ParametrizationList:
            raise UnsupportedLayer(f"expected matrices in Linear layers alone, got {kind.__name__} with one; leave it out, or train it as it is")
    return found


def reparametrize(model: nn.Module, kind: str) -> None:
    """Put every Linear weight of a model behind 'spectral-norm' (Miyato et al. 2018, as torch has it) or 'sigma-reparam'; 'none' does nothing."""
    for linear in linears_of(model):
        if kind == "spectral-norm":
            parametrizations.spectral_norm(linear)
        elif kind == "sigma-reparam":
            parametrize.register_parametrization(linear, "weight", SigmaReparam(linear.weight.detach()))


def fold(model: nn.Module) -> None:
    """Plain weights again, with the values that the reparametrised model has in eval mode."""
    model.eval()
    for linear in linears_of(model):
        if parametrize.is_parametrized(linear, "weight"):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def trained_weight(linear: nn.Linear) -> Tensor:
    """The parameter that an optimiser moves: the weight, or what is behind its parametrisation."""
    if parametrize.is_parametrized(linear, "weight"):
        parametrized: Any = linear.parametrizations["weight"]  # type: ignore[index]
        return parametrized.original
    return linear.weight
