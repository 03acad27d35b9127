"""Layers expanded at clean activations; one file per kind of layer, as in robustlip.domains.norms."""

from robustlip.domains.expansion import attention, convolution, elementwise, joins, linear, normalization, sorting, structure  # noqa: F401  (each registers its expansions)
from robustlip.domains.expansion.base import Curved, Expansion, Group, Pair, Scope, expand, loss, picked, register, token_norms, unsupported, vanished
from robustlip.domains.expansion.jacobian import JacobianChain
from robustlip.domains.expansion.structure import ChainExpansion, ToL2

__all__ = [
    "ChainExpansion", "Curved", "Expansion", "Group", "JacobianChain", "Pair", "Scope", "ToL2", "expand", "loss", "picked", "register", "token_norms",
    "unsupported", "vanished",
]  # fmt: skip
