"""Adversarial weights: searches weights within an architecture's constraint that maximise its sensitivity. They refute formulas, not models.

Random weights do not reveal false bounds: their heads have similar norms and their logits hardly change. docs/theory.md, section 5.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlip.errors import BadInput
from robustlip.layers import Attention, Chain, NextTokenChain, Normalize, Residual, ScaledGELU
from robustlip.numerics.spectral import spectral_norm_bound

# Above this width a step normalises by warm-started power iteration; returned weights are always normalised by an exact SVD.
_EXACT_WIDTH = 128
_NAMES = ("query", "key", "value", "output")


@dataclass(frozen=True)
class WorstAttention:
    """An attention layer (float64), tokens x (1, T, D) in the domain, and the sensitivity found at x.

    sensitivity: ‖Jδ‖ at one output token for the best δ with ‖δ_t‖₂ ≤ 1 for all t, so a lower estimate of the layer's Lipschitz constant in
    the per-token ℓ2 norm (the same in ∞-RMS, because input and output have the same width). direction: that δ (1, T, D).
    """

    layer: Attention
    x: Tensor
    direction: Tensor
    sensitivity: float


class _Capped:
    """A stack of raw matrices (B, m, n), differentiably scaled to spectral norms `cap` (B,)."""

    def __init__(self, raw: Tensor, cap: Tensor) -> None:
        self.raw, self.cap = raw, cap
        self.right = torch.ones(*raw.shape[:-2], raw.shape[-1], 1, dtype=raw.dtype, device=raw.device)

    def matrix(self, exact: bool) -> Tensor:
        """(B·m, n)."""
        if exact:
            sigma = torch.linalg.matrix_norm(self.raw, 2)
        else:
            with torch.no_grad():
                for _ in range(10):
                    self.right = nn.functional.normalize(self.raw.mT @ (self.raw @ self.right), dim=-2)
            # With the right singular vector constant, the gradient of ‖Wv‖ is uvᵀ, which is that of σ(W).
            sigma = (self.raw @ self.right).norm(dim=(-2, -1))
        return (self.raw * (self.cap / sigma)[:, None, None]).flatten(0, 1)


def worst_attention(
    width: int,
    heads: int,
    tokens: int,
    *,
    scale: float = 1.0,
    causal: bool = True,
    domain: float | None = None,
    caps: float = 1.0,
    per_head: bool = False,
    steps: int = 400,
    starts: int = 1,
    seed: int = 0,
) -> WorstAttention:
    """Gradient ascent on all four matrices and the tokens together. Each matrix has spectral norm `caps` (with per_head, the slices of
    query, key and value have caps/√H), each token ‖x_t‖₂ ≤ domain (default √width: RMS norm 1).

    The objective is Σ_t ‖J_{i,t}ᵀu‖₂ for an output direction u at the last token i: exactly ‖Jδ‖ along u for the best δ with tokens of norm 1.
    """
    layer = Attention(width, heads, scale=scale, causal=causal)
    norms = {name: torch.full((1,), caps, dtype=torch.float64) for name in _NAMES}
    if per_head:
        norms |= {name: torch.full((heads,), caps / heads**0.5, dtype=torch.float64) for name in _NAMES[:3]}
    return _ascend(layer, norms, tokens, width**0.5 if domain is None else domain, steps, starts, seed)


def worst_attention_like(
    layer: Attention, *, domain: float, tokens: int = 3, per_head: bool = False, steps: int = 300, starts: int = 1, seed: int = 0
) -> WorstAttention:
    """The worst weights for a given layer: with its shape, scale, mask and positions, and the present spectral norm of each matrix
    (with per_head, of each head's slice of query, key and value). Tokens have ‖x_t‖₂ ≤ domain.
    """
    if not layer.is_papers:
        raise BadInput(f"expected attention in the paper's form for its worst weights, got {layer.extra_repr()}; audit the weights as they are")
    norms = {}
    for name in _NAMES:
        weight = layer.matrices()[name].detach().double().cpu()
        parts = weight.unflatten(0, (layer.heads, -1)) if per_head and name != "output" else weight[None]
        norms[name] = torch.linalg.matrix_norm(parts, 2)
    return _ascend(layer, norms, tokens, domain, steps, starts, seed)


def _ascend(template: Attention, norms: dict[str, Tensor], tokens: int, domain: float, steps: int, starts: int, seed: int) -> WorstAttention:
    width = template.width
    best: WorstAttention | None = None
    for start in range(starts):
        generator = torch.Generator().manual_seed(seed + start)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: B023 (used at once)

        layer = copy.deepcopy(template).cpu().double().requires_grad_(False)
        raw = {name: _Capped(draw(len(norms[name]), width // len(norms[name]), width), norms[name]) for name in _NAMES}
        tokens_raw, u_raw = draw(1, tokens, width), draw(width)

        def weights(exact: bool) -> dict[str, Tensor]:
            return {f"{name}.weight": capped.matrix(exact or width <= _EXACT_WIDTH) for name, capped in raw.items()}  # noqa: B023

        def jacobian_rows(exact: bool = False) -> tuple[Tensor, Tensor]:
            norm = tokens_raw.norm(dim=-1, keepdim=True)  # noqa: B023
            x = tokens_raw * (domain / norm).clamp_max(1.0)  # noqa: B023
            out = torch.func.functional_call(layer, weights(exact), (x,))  # noqa: B023
            u = u_raw / u_raw.norm()  # noqa: B023
            (g,) = torch.autograd.grad((out[0, -1] * u).sum(), x, create_graph=True)
            return x, g

        optimizer = torch.optim.Adam([*(capped.raw for capped in raw.values()), tokens_raw, u_raw], lr=0.05)
        # The flash kernels have no second derivative; the plain kernel has.
        with torch.enable_grad(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = 0.05 * (1 - step / steps) + 1e-3
                _, g = jacobian_rows()
                optimizer.zero_grad()
                (-g.norm(dim=-1).sum()).backward()
                optimizer.step()
            x, g = jacobian_rows(exact=True)
        value = float(g.detach().norm(dim=-1).sum())
        if best is None or value > best.sensitivity:
            layer.load_state_dict({k: v.detach() for k, v in weights(exact=True).items()}, strict=False)
            direction = (g / g.norm(dim=-1, keepdim=True).clamp_min(1e-300)).detach()
            best = WorstAttention(layer, x.detach(), direction, value)
    assert best is not None
    return best


def steepest_gelu(approximate: str) -> float:
    """The point at which GELU's slope is largest: √2 for the erf form (gelu'' = φ(z)(2 − z²)), by bisection for the tanh form."""
    if approximate == "none":
        return math.sqrt(2.0)
    low, high = 1.0, 2.0
    for _ in range(60):
        middle = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(nn.functional.gelu(middle, approximate="tanh"), middle, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, middle)
        low, high = ((low + high) / 2, high) if float(curvature) > 0 else (low, (low + high) / 2)
    return (low + high) / 2


def worst_mlp(layers: nn.Sequential, domain: float | None = None) -> tuple[nn.Sequential, Tensor]:
    """The most sensitive weights of a chain of Linear and elementwise layers in which each matrix keeps its spectral norm, and the input (n,)
    at which they are: W = σ·e₁e₁ᵀ in every layer, so that no norm is lost between layers, and biases (free, if there are any) that put every
    activation at its steepest point. float64. domain: ‖x‖₂ ≤ domain, None for all inputs; without a bias, x does this for the first one.

    Raises BadInput for layers of other kinds.
    """
    worst = copy.deepcopy(layers).cpu().double().requires_grad_(False)
    linear = [m for m in worst if type(m) is nn.Linear]
    if not linear:
        raise BadInput("expected at least one Linear layer, got none; there are no weights to choose")
    value: float | None = None  # the only nonzero coordinate, after each layer
    x = torch.zeros(linear[0].in_features, dtype=torch.float64)
    for i, layer in enumerate(worst):
        if type(layer) is nn.Linear:
            sigma = float(spectral_norm_bound(layer.weight)) * (1 - 1e-9)
            layer.weight.zero_()
            layer.weight[0, 0] = sigma
            wanted = _steepest(worst[i + 1]) if i + 1 < len(worst) else 0.0
            if value is None:  # x itself
                value = wanted / sigma if sigma > 0 and layer.bias is None else 0.0
                if domain is not None:
                    value = min(value, domain)
                x[0] = value
            value *= sigma
            if layer.bias is not None:
                layer.bias.zero_()
                layer.bias[0] = wanted - value
                value = wanted
        elif type(layer) in (nn.ReLU, nn.Tanh, nn.GELU, ScaledGELU) and value is not None:
            value = float(layer(torch.tensor(value, dtype=torch.float64)))
        elif type(layer) not in (nn.Flatten, nn.Identity, Normalize) or value is not None:
            raise BadInput(f"expected Linear and elementwise layers in an MLP, got {type(layer).__name__}; its worst weights are not known")
        elif type(layer) is Normalize:
            raise BadInput("expected an MLP without a Normalize layer, got one with it; audit it without --worst-weights")
    return worst, x


def _steepest(layer: nn.Module) -> float:
    if type(layer) in (nn.GELU, ScaledGELU):
        return steepest_gelu(layer.approximate)  # type: ignore[arg-type]
    if type(layer) is nn.ReLU:
        return 1.0
    if type(layer) in (nn.Linear, nn.Tanh, nn.Flatten, nn.Identity):
        return 0.0
    raise BadInput(f"expected Linear and elementwise layers in an MLP, got {type(layer).__name__}; its worst weights are not known")


def newhouse_counterexample(*, width: int = 16, heads: int = 4, tokens: int = 3, steps: int = 250, seed: int = 0) -> Chain:
    """A one-block transformer for which the published constant (formula newhouse2025) is too small by more than 2.5 times. docs/theory.md, section 5.

    Embedding (width tokens of RMS norm ≤ 1) → paper's attention, all four matrices of spectral norm 1, as a residual with skip 0 and weight 1
    (α = 1) → head. The head is orthogonal, so logits change exactly as the attention's output does, and the published constant of the whole model
    is that of the layer: (1/3)(1 + 2) = 1.00. The weights are not stored: this function runs the ascent of `worst_attention` (a few seconds, the same
    result each time). The first `tokens` rows of the embedding are the tokens found, so token ids 0, 1, 2 … show the violation.
    float32, as models are. `robustlip audit robustlip.attacks.worst_weights:newhouse_counterexample --formula newhouse2025` exits with 3.
    """
    worst = worst_attention(width, heads, tokens, steps=steps, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(width, width, generator=generator, dtype=torch.float64)
    table = table * (0.9 * width**0.5 / table.norm(dim=-1, keepdim=True))
    table[:tokens] = worst.x[0] * (1 - 1e-6)  # so that float32 does not round a token out of the domain
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    embedding, head = nn.Embedding(width, width), nn.Linear(width, width, bias=False)
    attention = Attention(width, heads)
    with torch.no_grad():
        embedding.weight.copy_(table)
        head.weight.copy_(rotation)
        attention.load_state_dict(worst.layer.state_dict())
    model = NextTokenChain(OrderedDict(embed_tokens=embedding, attn0=Residual.convex(attention, 1.0), head=head))
    model.vocabulary = "".join(chr(ord("a") + i) for i in range(width))
    return model.eval()
