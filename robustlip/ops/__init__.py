"""What is true of an operation, each fact once; one file per family. Every domain of bounds reads these."""

from robustlip.ops import formulas, piecewise, smooth  # noqa: F401  (each registers its functions)
from robustlip.ops.elementwise import Elementwise, elementwise_layers, elementwise_of, is_elementwise, register_elementwise

__all__ = ["Elementwise", "elementwise_layers", "elementwise_of", "is_elementwise", "register_elementwise"]
