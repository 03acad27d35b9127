"""The paper's character GPT: token ids → next-token logits, with blocks whose Lipschitz constant can be constrained."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

from robustlip.errors import BadInput
from robustlip.layers import NextTokenChain, Residual
from robustlip.models.blocks import lipschitz_blocks


class GPT(NextTokenChain):
    """Base of all GPTs: the number of token ids, and the characters if there are any.

    vocabulary: the characters of ids 0, 1, …; for a model with subword tokens reading it raises BadInput, so that text is not encoded wrongly.
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
    """The number of token ids. Raises BadInput unless exactly one of the two is given."""
    if (vocabulary is None) == (vocabulary_size is None):
        got = "neither" if vocabulary is None else "both"
        raise BadInput(f"expected vocabulary (characters) or vocabulary_size (of subword tokens), got {got}; give one of them")
    if vocabulary is not None:
        return len(vocabulary)
    if type(vocabulary_size) is not int or vocabulary_size < 2:
        raise BadInput(f"expected a vocabulary_size of at least 2, got {vocabulary_size!r}; give the number of the tokenizer's ids or more")
    return vocabulary_size


def vocabulary_key(vocabulary: str | None, vocabulary_size: int | None) -> dict[str, str | int]:
    """The key and value of a configuration for the vocabulary."""
    return {"vocabulary": vocabulary} if vocabulary is not None else {"vocabulary_size": int(vocabulary_size or 0)}


class LipschitzGPT(GPT):
    """Token ids (N, T) → logits (N, T, vocabulary_size). Newhouse et al. 2025: RoPE, 1/d attention, output 1/3, convex residuals, no norm, no bias.

    vocabulary: the characters of ids 0, 1, …; or vocabulary_size: the number of ids of a subword tokenizer, or more (rounded up for speed).
    attention_scale s: logits are s·q·k/d (the paper: 1). alpha: residual weight, default 1/(2·blocks).
    distance_bias: 0 is the paper's model; M > 0 adds a learned bias by distance to the logits, which does not increase the bound; distance_peaks: see
    Attention. activation 'maxmin' and mlp_alpha 1 make MLPs that preserve norms, so that little of a small bound is lost (see lipschitz_blocks).
    mlp_hidden: width of the MLPs, default 4·width. A matrix with fewer outputs than inputs removes a part of every change, which norms do not show.
    The others are options of the published code: gelu 'erf' or 'tanh' (the form it uses), norm before each branch ('none', 'tanh',
    'rmsnorm', 'layernorm'; see blocks.substitute), final_scale: logits are final_scale·head(x), a factor of the bound too.
    Embedding and unembedding are separate tables without scales; the paper's variants of them differ in training only.
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
            # Before the head, which is linear, because margins are computed from the rows of a last Linear layer.
            layers["scale"] = Residual(nn.Identity(), skip=final_scale, weight=0.0)
        layers["head"] = nn.Linear(width, size, bias=False)
        super().__init__(layers)
        self.vocabulary = vocabulary
        self.config = {"kind": "lipschitz-gpt", **vocabulary_key(vocabulary, vocabulary_size), "width": width, "heads": heads, "blocks": blocks}
        self.config |= {"attention_scale": attention_scale, "distance_bias": distance_bias} | ({} if alpha is None else {"alpha": alpha})
        # These keys only if they differ from the default, so that the configurations of older models do not change.
        chosen = {"gelu": (gelu, "erf"), "norm": (norm, "none"), "final_scale": (final_scale, 1.0)}
        chosen |= {"activation": (activation, "gelu"), "mlp_alpha": (mlp_alpha, None), "distance_peaks": (distance_peaks, 0.0)}
        chosen |= {"mlp_hidden": (mlp_hidden, None)}
        self.config |= {key: value for key, (value, default) in chosen.items() if value != default}
