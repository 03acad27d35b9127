"""Multi-head attention of the paper: logits s·q·k/d, rotary positions, output times 1/3, no biases."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from robustlip.errors import BadInput


def rotary(x: torch.Tensor, base: float = 10_000.0, position: torch.Tensor | None = None) -> torch.Tensor:
    """Rotate pairs of coordinates of x (..., T, d) by angles that grow with the position: an orthogonal map of each token.

    position: 0, 1, … T − 1 unless given, (T,) or (…, T) against x; the transpose of the map is the one at −position.
    Source: Su et al. 2021, RoFormer, equation 34, in the half-split layout. d must be even.
    """
    width = x.shape[-1]
    if position is None:
        position = torch.arange(x.shape[-2], device=x.device)
    # Angles in float64, whatever x is: a float32 angle at position 255 would be wrong by 1e-5.
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width)
    angle = position.double().unsqueeze(-1) * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """x (N, T, D) → output_scale · W_o · concat_h softmax(scale · q_h k_hᵀ / d) v_h, of shape (N, T, D).

    width D, heads H, head width d = D/H (even when rotary). scale s: the paper has s = 1; s = √d is the usual 1/√d attention.
    causal: token i sees tokens j ≤ i only. output_scale: the paper's 1/3.
    distance_bias M > 0 adds a learned b[h, min(|i − j|, M − 1)] to the logits (Press et al. 2022, ALiBi, with its slopes as the start).
    It does not depend on the input, so heads can look at near tokens without any cost in the Lipschitz bound. 0 is the paper's layer.
    distance_peaks p > 0 starts it from −p·||i − j| − h − 1| instead, head h at the token h + 1 behind: heads that start at their own token stay.
    Source: Newhouse et al. 2025, section 3.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        scale: float = 1.0,
        causal: bool = True,
        rope: bool = True,
        output_scale: float = 1 / 3,
        distance_bias: int = 0,
        distance_peaks: float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise BadInput(f"expected a width divisible by the number of heads, got width {width} and {heads} heads; change one of them")
        if rope and (width // heads) % 2:
            raise BadInput(f"expected an even head width with rotary positions, got {width // heads}; use fewer heads or rope=False")
        if not scale > 0:
            raise BadInput(f"expected an attention scale above 0, got {scale}; the paper uses 1")
        if not (math.isfinite(distance_peaks) and distance_peaks >= 0) or (distance_peaks and not distance_bias):
            raise BadInput(f"expected distance_peaks of at least 0, with a distance_bias, got {distance_peaks}; 2 is sharp, 0 leaves the slopes")
        self.width, self.heads, self.head_width = width, heads, width // heads
        self.scale, self.causal, self.rope, self.output_scale = float(scale), causal, rope, float(output_scale)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.distance_bias: nn.Parameter | None = None
        if distance_bias:
            head, distance = torch.arange(heads, dtype=torch.float32)[:, None], torch.arange(distance_bias)
            self.distance_bias = nn.Parameter(-distance_peaks * (distance - head - 1).abs() if distance_peaks else -(2.0**-head) * distance)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, D) → (N, H, T, d)."""
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(-2, -3)

    def logit_bias(self, length: int) -> torch.Tensor | None:
        """What is added to the logits whatever the input: (H, T, T) with −inf where masked, or None when there is nothing but a causal mask."""
        if self.distance_bias is None:
            return None
        position = torch.arange(length, device=self.distance_bias.device)
        distance = position[:, None] - position[None, :]
        bias = self.distance_bias[:, distance.abs().clamp_max(self.distance_bias.shape[1] - 1)]
        return bias.masked_fill(distance < 0, -torch.inf) if self.causal else bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3:
            raise BadInput(f"expected tokens (N, T, D), got {tuple(x.shape)}: without a batch dimension samples would attend to each other; add it")
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        if self.rope:
            q, k = rotary(q), rotary(k)
        bias = self.logit_bias(x.shape[-2])
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=self.causal and bias is None, scale=self.scale / self.head_width
        )
        return self.output(mixed.transpose(-2, -3).flatten(-2)) * self.output_scale

    def extra_repr(self) -> str:
        # Exact numbers: this text is hashed into the certificate's architecture.
        distances = 0 if self.distance_bias is None else self.distance_bias.shape[1]
        return (
            f"width={self.width}, heads={self.heads}, scale={self.scale}, causal={self.causal}, rope={self.rope}, "
            f"output_scale={self.output_scale}, distance_bias={distances}"
        )
