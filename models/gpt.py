"""The paper's character GPT: token ids → next-token logits, from blocks whose Lipschitz constant can be enforced."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from robustlip.layers import NextTokenChain
from robustlip.models.blocks import lipschitz_blocks


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
