"""Reparametrised weights, the usual alternative to constraints: used in training, then folded into plain weights for the certifiers.

Neither gives a guarantee: both divide by an estimate of σ from power iteration, which is a lower bound. The certifier measures the folded weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from robustlip.errors import UnsupportedLayer
from robustlip.layers import AddPositions, Attention

# Embedding tables, and tables that are added to tokens and scores: they are not matrices.
_LEFT = (nn.Embedding, AddPositions, Attention)


class SigmaReparam(nn.Module):
    """W → (γ/σ(W))·W with one learned γ per matrix, initially 1; σ = uᵀWv by one power iteration per training step. Source: Zhai et al. 2023."""

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
        # Clones, because the next iteration writes into the buffers, and backward needs their present values.
        return self.gamma / (self.u.clone() @ weight @ self.v.clone()) * weight


def plain_type(layer: nn.Module) -> type:
    """The class of a layer without the subclass that torch's parametrisation creates. Other subclasses count as other layers."""
    return parametrize.type_before_parametrizations(layer)


def linears_of(model: nn.Module) -> list[nn.Linear]:
    """The Linear layers. Raises UnsupportedLayer for a layer with another kind of matrix, which would not be reparametrised."""
    found = []
    for module in model.modules():
        kind = plain_type(module)
        if isinstance(module, nn.Linear) and kind is nn.Linear:
            found.append(module)
        elif kind not in _LEFT and any(p.dim() > 1 for p in module.parameters(recurse=False)) and kind is not parametrize.ParametrizationList:
            raise UnsupportedLayer(f"expected matrices in Linear layers only, got {kind.__name__} with one; remove that layer")
    return found


def reparametrize(model: nn.Module, kind: str) -> None:
    """Reparametrise every Linear weight by 'spectral-norm' (Miyato et al. 2018, as in torch) or 'sigma-reparam'; 'none' does nothing."""
    for linear in linears_of(model):
        if kind == "spectral-norm":
            parametrizations.spectral_norm(linear)
        elif kind == "sigma-reparam":
            parametrize.register_parametrization(linear, "weight", SigmaReparam(linear.weight.detach()))


def fold(model: nn.Module) -> None:
    """Replace the reparametrised weights by plain weights with the values that they have in eval mode."""
    model.eval()
    for linear in linears_of(model):
        if parametrize.is_parametrized(linear, "weight"):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def trained_weight(linear: nn.Linear) -> Tensor:
    """The trained parameter: the weight, or the original of its parametrisation."""
    if parametrize.is_parametrized(linear, "weight"):
        parametrized: Any = linear.parametrizations["weight"]  # type: ignore[index]
        return parametrized.original
    return linear.weight
