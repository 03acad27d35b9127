"""The paper's character GPT: token ids → next-token logits, from blocks whose Lipschitz constant can be enforced."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

from robustlip.errors import BadInput
from robustlip.layers import NextTokenChain, Residual
from robustlip.models.blocks import lipschitz_blocks


class LipschitzGPT(NextTokenChain):
    """Token ids (N, T) → logits (N, T, vocabulary_size). Newhouse et al. 2025: RoPE, 1/d attention, output 1/3, convex residuals, no norm, no bias.

    attention_scale s: logits are s·q·k/d (the paper: 1). alpha: residual weight, 1/(2·blocks) unless given.
    distance_bias: 0 is the paper's model; M > 0 adds a learned bias by distance to the logits, free in the bound (see Attention).
    The rest are options of the published code: gelu 'erf' or 'tanh' (what it runs), norm in front of each branch ('none', 'tanh',
    'rmsnorm', 'layernorm'; see blocks.substitute), final_scale: logits are final_scale·head(x), and as much enters the bound.
    Its embedding and unembedding are two tables, not tied, and unscaled; their variants differ in training only.
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
        gelu: str = "erf",
        norm: str = "none",
        final_scale: float = 1.0,
    ) -> None:
        size = len(vocabulary)
        if not (math.isfinite(final_scale) and final_scale > 0):
            raise BadInput(f"expected a final scale above 0, got {final_scale}; the paper uses 1")
        layers: OrderedDict[str, nn.Module] = OrderedDict(embed_tokens=nn.Embedding(size, width))
        layers.update(
            lipschitz_blocks(width, heads, blocks, scale=attention_scale, causal=True, alpha=alpha, distance_bias=distance_bias, gelu=gelu, norm=norm)
        )
        if final_scale != 1.0:
            # In front of the head, which is linear: margins are read off the rows of a last Linear.
            layers["scale"] = Residual(nn.Identity(), skip=final_scale, weight=0.0)
        layers["head"] = nn.Linear(width, size, bias=False)
        super().__init__(layers)
        self.vocabulary = vocabulary
        self.config = {"kind": "lipschitz-gpt", "vocabulary": vocabulary, "width": width, "heads": heads, "blocks": blocks}
        self.config |= {"attention_scale": attention_scale, "distance_bias": distance_bias} | ({} if alpha is None else {"alpha": alpha})
        # Keys of these only where they differ: the configurations of models made before they existed stay as they were.
        chosen = {"gelu": (gelu, "erf"), "norm": (norm, "none"), "final_scale": (final_scale, 1.0)}
        self.config |= {key: value for key, (value, default) in chosen.items() if value != default}
