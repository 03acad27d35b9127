"""The residual blocks of the GPTs and the patch classifiers, constrained and unconstrained."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

from robustlip.errors import BadInput
from robustlip.layers import Attention, MaxMin, Residual, ScaledGELU

ACTIVATIONS = ("gelu", "maxmin")
GELU_FORMS = {"erf": "none", "tanh": "tanh"}  # our name: torch's name
NORM_EPS = 1e-5  # in the published code


def substitute(norm: str, width: int) -> nn.Module:
    """The substitutes for LayerNorm in the published code (its option layernorm_substitute), on tokens (…, width), without trained parameters.

    'tanh': elementwise, does not increase the bound. 'rmsnorm', 'layernorm': with eps 1e-5, so a factor of 316 for tokens that may be near 0.
    """
    if norm == "tanh":
        return nn.Tanh()
    if norm == "rmsnorm":
        return nn.RMSNorm(width, eps=NORM_EPS, elementwise_affine=False)
    if norm == "layernorm":
        return nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
    raise BadInput(f"expected a norm among none, tanh, rmsnorm, layernorm, got {norm!r}; name one of them")


def lipschitz_blocks(
    width: int,
    heads: int,
    blocks: int,
    *,
    scale: float,
    causal: bool,
    alpha: float | None = None,
    hidden: int | None = None,
    distance_bias: int = 0,
    gelu: str = "erf",
    norm: str = "none",
    activation: str = "gelu",
    mlp_alpha: float | None = None,
    distance_peaks: float = 0.0,
) -> OrderedDict[str, nn.Module]:
    """`blocks` pairs of convex residuals (Newhouse et al. 2025, section 3): attention/3, then W_out·gelu(W_in x)/1.1289. No norm, no bias.

    alpha: residual weight, default 1/(2·blocks) (one over the number of residual connections).
    distance_bias, distance_peaks: see Attention, 0 for the paper's model. hidden: MLP width, default 4·width.
    activation: 'gelu', or 'maxmin' in place of gelu/1.1289, which preserves norms. mlp_alpha: residual weight of the MLPs, default alpha.
    gelu: 'erf', or 'tanh', the form in the published code. norm: what precedes each branch, see `substitute`.
    """
    if gelu not in GELU_FORMS:
        raise BadInput(f"expected a GELU among {', '.join(GELU_FORMS)}, got {gelu!r}; name one of them")
    if activation not in ACTIVATIONS:
        raise BadInput(f"expected an activation among {', '.join(ACTIVATIONS)}, got {activation!r}; name one of them")
    if blocks < 1:
        raise BadInput(f"expected at least one block, got {blocks}; give blocks >= 1")
    alpha = 1 / (2 * blocks) if alpha is None else alpha
    hidden = 4 * width if hidden is None else hidden
    if type(hidden) is not int or hidden < 1 or (activation == "maxmin" and hidden % 2):
        raise BadInput(f"expected an MLP width of at least 1, even for maxmin, which takes pairs, got {hidden!r}; give one")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(blocks):
        attention: nn.Module = Attention(width, heads, scale=scale, causal=causal, distance_bias=distance_bias, distance_peaks=distance_peaks)
        act = MaxMin() if activation == "maxmin" else ScaledGELU(approximate=GELU_FORMS[gelu])
        parts = OrderedDict[str, nn.Module](up=nn.Linear(width, hidden, bias=False), act=act)
        parts["down"] = nn.Linear(hidden, width, bias=False)
        if norm != "none":
            attention = nn.Sequential(OrderedDict(norm=substitute(norm, width), attention=attention))
            parts = OrderedDict(norm=substitute(norm, width)) | parts
        layers[f"attn{i}"] = Residual.convex(attention, alpha)
        layers[f"mlp{i}"] = Residual.convex(nn.Sequential(parts), alpha if mlp_alpha is None else mlp_alpha)
    return layers


def layernorm_blocks(width: int, heads: int, blocks: int, *, causal: bool, hidden: int | None = None) -> OrderedDict[str, nn.Module]:
    """`blocks` pre-norm blocks as in GPT-2: x + attn(LN(x)) with 1/√d logits, then x + W_out·gelu(W_in LN(x)); a last LayerNorm."""
    if blocks < 1:
        raise BadInput(f"expected at least one block, got {blocks}; give blocks >= 1")
    hidden = 4 * width if hidden is None else hidden
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(blocks):
        attention = Attention(width, heads, scale=math.sqrt(width // heads), causal=causal, output_scale=1.0)
        layers[f"attn{i}"] = Residual(nn.Sequential(OrderedDict(norm=nn.LayerNorm(width), attention=attention)))
        mlp = nn.Sequential(
            OrderedDict(
                norm=nn.LayerNorm(width),
                up=nn.Linear(width, hidden, bias=False),
                act=nn.GELU(),
                down=nn.Linear(hidden, width, bias=False),
            )
        )
        layers[f"mlp{i}"] = Residual(mlp)
    layers["norm"] = nn.LayerNorm(width)
    return layers
