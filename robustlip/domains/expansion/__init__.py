"""First-order expansions of layers; one file for each kind of layer, as in robustlip.domains.norms. Importing this package registers them all."""

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
    CurvatureTerm,
    Expansion,
    Functionals,
    JointBound,
    OutputBounds,
    Scope,
    SplitChange,
    Term,
    decrease,
    expand,
    register,
    selected,
    token_norms,
    underflow_error,
    unsupported,
)
from robustlip.domains.expansion.jacobian import JacobianChain
from robustlip.domains.expansion.structure import ChainExpansion, ToL2

__all__ = [
    "Ball", "ChainExpansion", "CurvatureTerm", "Expansion", "Functionals", "JacobianChain", "JointBound", "OutputBounds", "Scope", "SplitChange",
    "Term", "ToL2", "decrease", "expand", "register", "selected", "token_norms", "underflow_error", "unsupported",
]  # fmt: skip
