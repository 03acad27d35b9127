"""Builders of attention layers as other models have them, with random numbers such that a missing term changes the result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustlip.layers import Attention

WIDTH, HEADS = 8, 4


def tables(length: int, width: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin (1, T, d) as Hugging Face makes them, times a factor."""
    frequency = 100.0 ** (-torch.arange(0, width, 2) / width)
    angle = (torch.arange(length)[:, None] * frequency).repeat(1, 2)[None]
    return factor * angle.cos(), factor * angle.sin()


def band(length: int, heads: int = 1) -> Tensor:
    """Numbers for the logits of near tokens, far from 0, and −inf or the least float32 number for those that are not seen: (1, H, T, T)."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    numbers = 16 + torch.sin(torch.arange(heads * length * length)).view(1, heads, length, length)
    return numbers.masked_fill(distance > 1, torch.finfo(torch.float32).min).masked_fill(distance < -1, -torch.inf)


def holes(length: int) -> Tensor:
    """Bools (T, T): every token attends to the first one, to itself, and to every second token before and after it."""
    seen = (torch.arange(length)[:, None] + torch.arange(length)) % 2 == 0
    seen[:, 0] = True
    return seen


ALL = (True, True, True, True)
# name → a builder for so many tokens.
FORMS: dict[str, Callable[[int], Attention]] = {
    "biases": lambda length: Attention(WIDTH, HEADS, biases=ALL, output_scale=-0.7),
    "shared": lambda length: Attention(
        WIDTH, HEADS, key_heads=2, head_width=6, logit_scale=0.7, causal=True, angles=tables(length, 6, 1.002), biases=(True, True, False, False),
        output_scale=1.0,
    ),
    "joined": lambda length: Attention(
        WIDTH, HEADS, rope=False, joined=True, biases=ALL, mask=band(length, HEADS), logit_scale=2**-0.5, output_scale=1.0
    ),
    "divide": lambda length: Attention(
        WIDTH, 2, key_heads=1, joined=True, biases=(True, False, False, False), explicit="divide", divisor=2.0, mask=band(length), output_scale=1.0
    ),
    "query": lambda length: Attention(
        WIDTH, 3, head_width=5, rope=False, explicit="query", logit_scale=0.6, mask=holes(length), mask_fill=True, output=False,
        biases=(True, True, True, False),
    ),
    "logits": lambda length: Attention(
        WIDTH, HEADS, rope=False, explicit="logits", logit_scale=1.5, mask=holes(length).tril(), output_scale=1.0, biases=ALL
    ),
}  # fmt: skip


def form(name: str, length: int, gain: float, bias: float) -> Attention:
    """That form with its matrices times `gain` and its biases times `bias` more."""
    layer = FORMS[name](length)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(gain if parameter.dim() > 1 else gain * bias)
    return layer
