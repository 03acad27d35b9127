"""Layers expanded at clean activations; one file per kind of layer, as in robustlip.rules."""

from robustlip.local import attention, elementwise, joins, linear, normalization, sorting, structure  # noqa: F401  (each registers its expansions)
from robustlip.local.base import Curved, Expansion, Group, Pair, Scope, expand, loss, picked, register, token_norms, unsupported, vanished
from robustlip.local.jacobian import JacobianChain
from robustlip.local.structure import ChainExpansion, ToL2

__all__ = [
    "ChainExpansion", "Curved", "Expansion", "Group", "JacobianChain", "Pair", "Scope", "ToL2", "expand", "loss", "picked", "register", "token_norms",
    "unsupported", "vanished",
]  # fmt: skip
