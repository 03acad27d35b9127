"""Unconstrained baselines of the same shapes, with LayerNorm and 1/√d attention in the transformers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from robustlip.layers import Chain, MeanTokens
from robustlip.models.blocks import layernorm_blocks
from robustlip.models.classifier import patch_embedding
from robustlip.models.gpt import GPT, size_of, vocabulary_key
from robustlip.models.mlp import LipschitzMLP


class BaselineMLP(LipschitzMLP):
    """The same layers as LipschitzMLP; only the training differs, which has no constraint."""


class BaselineGPT(GPT):
    """A pre-norm GPT as in GPT-2, with rotary positions: token ids (N, T) → logits (N, T, vocabulary_size). vocabulary: as LipschitzGPT."""

    def __init__(
        self, vocabulary: str | None = None, width: int = 256, heads: int = 4, blocks: int = 3, *, vocabulary_size: int | None = None
    ) -> None:
        size = size_of(vocabulary, vocabulary_size)
        layers: OrderedDict[str, nn.Module] = OrderedDict(embed_tokens=nn.Embedding(size, width))
        layers.update(layernorm_blocks(width, heads, blocks, causal=True))
        layers["head"] = nn.Linear(width, size, bias=False)
        super().__init__(layers)
        self.vocabulary = vocabulary
        self.config = {"kind": "baseline-gpt", **vocabulary_key(vocabulary, vocabulary_size), "width": width, "heads": heads, "blocks": blocks}


class BaselineTransformer(Chain):
    """A pre-norm patch transformer (ViT-like, mean pooling): images (N, C, H, W) in [0, 1] → logits (N, classes)."""

    embedding_depth = 3

    def __init__(self, image: Sequence[int], patch: int, classes: int, width: int = 64, heads: int = 4, blocks: int = 2) -> None:
        layers = patch_embedding(image, patch, width)
        layers.update(layernorm_blocks(width, heads, blocks, causal=False))
        layers["mean"] = MeanTokens()
        layers["head"] = nn.Linear(width, classes, bias=True)
        super().__init__(layers)
        self.config = {"kind": "baseline-transformer", "image": list(image), "patch": patch, "classes": classes, "width": width}
        self.config |= {"heads": heads, "blocks": blocks}
