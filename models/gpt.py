"""The paper's character GPT: token ids → next-token logits, from blocks whose Lipschitz constant can be enforced."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from robustlip.errors import BadInput
from robustlip.layers import Chain
from robustlip.models.blocks import lipschitz_blocks


class NextTokenChain(Chain):
    """A Chain of (embedding, blocks …, head) whose inputs are token ids (N, T) and whose logits are (N, T, V)."""

    embedding_depth = 1
    task = "next-token"

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in (torch.int64, torch.int32) or x.dim() != 2:
            raise BadInput(f"expected token ids, integers of shape (N, T), got {x.dtype} of shape {tuple(x.shape)}; encode the text first")
        size = self[0].num_embeddings
        if x.numel() and not (0 <= int(x.min()) and int(x.max()) < size):
            raise BadInput(f"expected token ids in [0, {size - 1}], got {int(x.min())} to {int(x.max())}; use the model's own vocabulary")
        return super().embed(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.from_embeddings(self.embed(x))


class LipschitzGPT(NextTokenChain):
    """Token ids (N, T) → logits (N, T, vocabulary_size). Newhouse et al. 2025: RoPE, 1/d attention, output 1/3, convex residuals, no norm, no bias.

    attention_scale s: logits are s·q·k/d (the paper: 1). alpha: residual weight, 1/(2·blocks) unless given.
    distance_bias: 0 is the paper's model; M > 0 adds a learned bias by distance to the logits, free in the bound (see Attention).
    """

    def __init__(
        self,
        vocabulary: str,
        width: int = 256,
        heads: int = 4,
        blocks: int = 3,
        *,
        attention_scale: float = 1.0,
        alpha: float | None = None,
        distance_bias: int = 0,
    ) -> None:
        size = len(vocabulary)
        layers: OrderedDict[str, nn.Module] = OrderedDict(embed_tokens=nn.Embedding(size, width))
        layers.update(lipschitz_blocks(width, heads, blocks, scale=attention_scale, causal=True, alpha=alpha, distance_bias=distance_bias))
        layers["head"] = nn.Linear(width, size, bias=False)
        super().__init__(layers)
        self.vocabulary = vocabulary
        self.config = {"kind": "lipschitz-gpt", "vocabulary": vocabulary, "width": width, "heads": heads, "blocks": blocks}
        self.config |= {"attention_scale": attention_scale, "distance_bias": distance_bias} | ({} if alpha is None else {"alpha": alpha})
