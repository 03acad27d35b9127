"""Layers expanded at clean activations; one file per kind of layer, as in robustlip.domains.norms; importing this package registers all."""

from robustlip.domains.expansion import (  # noqa: F401
    attention,
    constants,
    convolution,
    elementwise,
    joins,
    linear,
    moves,
    normalization,
    products,
    sorting,
    structure,
)
from robustlip.domains.expansion.base import (
    Ball,
    Behind,
    Curved,
    Expansion,
    Functionals,
    Group,
    Pair,
    Scope,
    Split,
    expand,
    loss,
    picked,
    register,
    token_norms,
    unsupported,
    vanished,
)
from robustlip.domains.expansion.jacobian import JacobianChain
from robustlip.domains.expansion.structure import ChainExpansion, ToL2

__all__ = [
    "Ball", "Behind", "ChainExpansion", "Curved", "Expansion", "Functionals", "Group", "JacobianChain", "Pair", "Scope", "Split", "ToL2", "expand",
    "loss", "picked", "register", "token_norms", "unsupported", "vanished",
]  # fmt: skip
