"""A patch-token transformer that classifies images with the paper's blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from robustlip.layers import AddPositions, Chain, MeanTokens, Patchify
from robustlip.models.blocks import lipschitz_blocks


def patch_embedding(image: Sequence[int], patch: int, width: int) -> OrderedDict[str, nn.Module]:
    """Images (N, C, H, W) → tokens (N, (H/p)(W/p), width): patches, a linear map, learned positions. Three layers."""
    channels, height, breadth = image
    tokens = (height // patch) * (breadth // patch)
    return OrderedDict(
        patches=Patchify(patch),
        embed_patches=nn.Linear(channels * patch * patch, width, bias=False),
        positions=AddPositions(tokens, width),
    )


class LipschitzTransformer(Chain):
    """Images (N, C, H, W) in [0, 1] → logits (N, classes). Every patch is a token, and the last layer reads the mean of the tokens."""

    embedding_depth = 3

    def __init__(
        self,
        image: Sequence[int],
        patch: int,
        classes: int,
        width: int = 64,
        heads: int = 4,
        blocks: int = 2,
        *,
        attention_scale: float = 1.0,
        alpha: float | None = None,
    ) -> None:
        layers = patch_embedding(image, patch, width)
        layers.update(lipschitz_blocks(width, heads, blocks, scale=attention_scale, causal=False, alpha=alpha))
        layers["mean"] = MeanTokens()
        layers["head"] = nn.Linear(width, classes, bias=True)
        super().__init__(layers)
        self.config = {"kind": "lipschitz-transformer", "image": list(image), "patch": patch, "classes": classes, "width": width}
        self.config |= {"heads": heads, "blocks": blocks, "attention_scale": attention_scale} | ({} if alpha is None else {"alpha": alpha})
