"""Facts of operations: bounds of values, slopes, curvature and executed rounding errors; one file per family. All domains of bounds use these."""

from robustlip.ops import formulas, piecewise, smooth  # noqa: F401  (each registers its functions)
from robustlip.ops.elementwise import Elementwise, elementwise_layers, elementwise_of, is_elementwise, register_elementwise

__all__ = ["Elementwise", "elementwise_layers", "elementwise_of", "is_elementwise", "register_elementwise"]
