"""Weights chosen by an adversary: how sensitive can an architecture be made under its own constraint? Breaks formulas, not models.

Random weights hide unsound bounds: their heads share the norm evenly and their logits hardly move. MATH.md section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlip.layers import Attention


@dataclass(frozen=True)
class WorstAttention:
    """An attention layer (float64), tokens x (1, T, D) in the domain, and the sensitivity found at x.

    sensitivity: ‖Jδ‖ at one output token for the best δ with ‖δ_t‖₂ ≤ 1 for all t, so a lower estimate of the layer's Lipschitz constant in
    the per-token ℓ2 norm (the same number in ∞-RMS, as input and output are equally wide). direction: that δ (1, T, D).
    """

    layer: Attention
    x: Tensor
    direction: Tensor
    sensitivity: float


def _normalised(raw: Tensor, cap: float) -> Tensor:
    """raw scaled to spectral norm `cap`, differentiably."""
    return cap * raw / torch.linalg.matrix_norm(raw, 2)


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
    """Gradient ascent on all four matrices and the tokens together, each matrix held at spectral norm `caps` (with per_head, the slices of
    query, key and value at caps/√H each), each token at ‖x_t‖₂ ≤ domain (√width unless given: RMS norm 1).

    The objective is Σ_t ‖J_{i,t}ᵀu‖₂ for an output direction u at the last token i: exactly ‖Jδ‖ along u for the best per-token unit δ.
    """
    domain = width**0.5 if domain is None else domain
    best: WorstAttention | None = None
    for start in range(starts):
        generator = torch.Generator().manual_seed(seed + start)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: B023 (used at once)

        layer = Attention(width, heads, scale=scale, causal=causal).double().requires_grad_(False)
        names = ("query", "key", "value", "output")
        raw = {name: draw(width, width) for name in names}
        tokens_raw, u_raw = draw(1, tokens, width), draw(width)

        def weights() -> dict[str, Tensor]:
            out = {}
            for name, matrix in raw.items():  # noqa: B023
                if per_head and name != "output":
                    out[name] = torch.cat([_normalised(part, caps / heads**0.5) for part in matrix.chunk(heads)])
                else:
                    out[name] = _normalised(matrix, caps)
            return {f"{name}.weight": matrix for name, matrix in out.items()}

        def jacobian_rows() -> tuple[Tensor, Tensor]:
            norm = tokens_raw.norm(dim=-1, keepdim=True)  # noqa: B023
            x = tokens_raw * (domain / norm).clamp_max(1.0)  # noqa: B023
            if not x.requires_grad:
                x = x.requires_grad_()
            out = torch.func.functional_call(layer, weights(), (x,))  # noqa: B023
            u = u_raw / u_raw.norm()  # noqa: B023
            (g,) = torch.autograd.grad((out[0, -1] * u).sum(), x, create_graph=True)  # noqa: B023
            return x, g

        optimizer = torch.optim.Adam([*raw.values(), tokens_raw, u_raw], lr=0.05)
        # The flash kernels have no second derivative; the plain one does.
        with torch.enable_grad(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = 0.05 * (1 - step / steps) + 1e-3
                _, g = jacobian_rows()
                optimizer.zero_grad()
                (-g.norm(dim=-1).sum()).backward()
                optimizer.step()
            x, g = jacobian_rows()
        value = float(g.detach().norm(dim=-1).sum())
        if best is None or value > best.sensitivity:
            layer.load_state_dict({k: v.detach() for k, v in weights().items()})
            direction = (g / g.norm(dim=-1, keepdim=True).clamp_min(1e-300)).detach()
            best = WorstAttention(layer, x.detach(), direction, value)
    assert best is not None
    return best
