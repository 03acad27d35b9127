"""The layers of robustlip models; `robustlip.domains.norms` has a rule for each, in files of the same names."""

from robustlip.layers.activations import Abs, Clamp, ScaledGELU
from robustlip.layers.attention import Attention
from robustlip.layers.chain import Chain, NextTokenChain, OneTokenChain, TokenChain, TokenLabelChain, as_chain, chain_or_module, two_logits
from robustlip.layers.constants import Constant, Scale, Shift
from robustlip.layers.formulas import Formula, WrittenNorm
from robustlip.layers.joins import Channels, Concatenate, Maximum, Minimum, Product, Sum
from robustlip.layers.moves import Flip, Permute, Select, Slice, View
from robustlip.layers.residual import Residual
from robustlip.layers.sorting import GroupSort, Householder, MaxMin
from robustlip.layers.tokens import AddPositions, Lookup, MeanTokens, Normalize, Patchify, PrependToken, SelectToken, Tokens

__all__ = [
    "Abs",
    "AddPositions",
    "Attention",
    "Chain",
    "Channels",
    "Clamp",
    "Concatenate",
    "Constant",
    "Flip",
    "Formula",
    "GroupSort",
    "Householder",
    "Lookup",
    "MaxMin",
    "Maximum",
    "MeanTokens",
    "Minimum",
    "NextTokenChain",
    "OneTokenChain",
    "Normalize",
    "Patchify",
    "Permute",
    "Product",
    "PrependToken",
    "Residual",
    "Scale",
    "ScaledGELU",
    "Select",
    "SelectToken",
    "Shift",
    "Slice",
    "Sum",
    "TokenChain",
    "TokenLabelChain",
    "Tokens",
    "View",
    "WrittenNorm",
    "as_chain",
    "chain_or_module",
    "two_logits",
]
