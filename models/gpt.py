"""The paper's character GPT: token ids → next-token logits, from blocks whose Lipschitz constant can be enforced."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

from robustlip.errors import BadInput
from robustlip.layers import NextTokenChain, Residual
from robustlip.models.blocks import lipschitz_blocks


class GPT(NextTokenChain):
    """What all GPTs share: how many token ids there are, and what is known of them.

    vocabulary: the characters of ids 0, 1, …; asking a model of subwords for it raises BadInput, so that no text is encoded by guessing.
    """

    _characters: str | None = None

    @property  # type: ignore[override]
    def vocabulary(self) -> str | None:
        if self._characters is None:
            raise BadInput(
                f"expected a model whose tokens are characters, got one of {self[0].num_embeddings} subword tokens; "
                f"encode text with its tokenizer and give token ids"
            )
        return self._characters

    @vocabulary.setter
    def vocabulary(self, characters: str | None) -> None:
        self._characters = characters


def size_of(vocabulary: str | None, vocabulary_size: int | None) -> int:
    """The number of token ids. Raises BadInput unless exactly one of the two says it."""
    if (vocabulary is None) == (vocabulary_size is None):
        got = "neither" if vocabulary is None else "both"
        raise BadInput(f"expected vocabulary (characters) or vocabulary_size (of subword tokens), got {got}; give one of them")
    if vocabulary is not None:
        return len(vocabulary)
    if type(vocabulary_size) is not int or vocabulary_size < 2:
        raise BadInput(f"expected a vocabulary_size of at least 2, got {vocabulary_size!r}; give the number of the tokenizer's ids or more")
    return vocabulary_size


def said_of(vocabulary: str | None, vocabulary_size: int | None) -> dict[str, str | int]:
    """The key of a configuration that says it."""
    return {"vocabulary": vocabulary} if vocabulary is not None else {"vocabulary_size": int(vocabulary_size or 0)}


class LipschitzGPT(GPT):
    """Token ids (N, T) → logits (N, T, vocabulary_size). Newhouse et al. 2025: RoPE, 1/d attention, output 1/3, convex residuals, no norm, no bias.

    vocabulary: the characters of ids 0, 1, …; or vocabulary_size: how many ids a tokenizer of subwords has, or more (rounded up for speed).
    attention_scale s: logits are s·q·k/d (the paper: 1). alpha: residual weight, 1/(2·blocks) unless given.
    distance_bias: 0 is the paper's model; M > 0 adds a learned bias by distance to the logits, free in the bound; distance_peaks: see Attention.
    activation 'maxmin' and mlp_alpha 1 make MLPs that keep norms, so that little of a small bound is lost (see lipschitz_blocks).
    mlp_hidden: width of the MLPs, 4·width unless given. A matrix that narrows drops a part of every change, which a bound cannot know.
    The rest are options of the published code: gelu 'erf' or 'tanh' (what it runs), norm in front of each branch ('none', 'tanh',
    'rmsnorm', 'layernorm'; see blocks.substitute), final_scale: logits are final_scale·head(x), and as much enters the bound.
    Its embedding and unembedding are two tables, not tied, and unscaled; their variants differ in training only.
    """

    def __init__(
        self,
        vocabulary: str | None = None,
        width: int = 256,
        heads: int = 4,
        blocks: int = 3,
        *,
        attention_scale: float = 1.0,
        alpha: float | None = None,
        distance_bias: int = 0,
        gelu: str = "erf",
        norm: str = "none",
        activation: str = "gelu",
        mlp_alpha: float | None = None,
        distance_peaks: float = 0.0,
        mlp_hidden: int | None = None,
        final_scale: float = 1.0,
        vocabulary_size: int | None = None,
    ) -> None:
        size = size_of(vocabulary, vocabulary_size)
        if not (math.isfinite(final_scale) and final_scale > 0):
            raise BadInput(f"expected a final scale above 0, got {final_scale}; the paper uses 1")
        layers: OrderedDict[str, nn.Module] = OrderedDict(embed_tokens=nn.Embedding(size, width))
        layers.update(
            lipschitz_blocks(
                width, heads, blocks, scale=attention_scale, causal=True, alpha=alpha, distance_bias=distance_bias, gelu=gelu, norm=norm,
                activation=activation, mlp_alpha=mlp_alpha, distance_peaks=distance_peaks, hidden=mlp_hidden,
            )
        )
        if final_scale != 1.0:
            # In front of the head, which is linear: margins are read off the rows of a last Linear.
            layers["scale"] = Residual(nn.Identity(), skip=final_scale, weight=0.0)
        layers["head"] = nn.Linear(width, size, bias=False)
        super().__init__(layers)
        self.vocabulary = vocabulary
        self.config = {"kind": "lipschitz-gpt", **said_of(vocabulary, vocabulary_size), "width": width, "heads": heads, "blocks": blocks}
        self.config |= {"attention_scale": attention_scale, "distance_bias": distance_bias} | ({} if alpha is None else {"alpha": alpha})
        # Keys of these only where they differ: the configurations of models made before they existed stay as they were.
        chosen = {"gelu": (gelu, "erf"), "norm": (norm, "none"), "final_scale": (final_scale, 1.0)}
        chosen |= {"activation": (activation, "gelu"), "mlp_alpha": (mlp_alpha, None), "distance_peaks": (distance_peaks, 0.0)}
        chosen |= {"mlp_hidden": (mlp_hidden, None)}
        self.config |= {key: value for key, (value, default) in chosen.items() if value != default}
