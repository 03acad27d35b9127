"""Functions that models write out in plain operations instead of calling one of torch: run in the very order in which they are written.

An expression is X (the input), a number, WEIGHT (a gain that stands in the middle), or (operation, argument, argument), nested:

    GELU_NEW = ("mul", ("mul", 0.5, X), ("add", 1.0, ("tanh", ("mul", 0.79788456, ("add", X, ("mul", 0.044715, ("pow", X, 3.0)))))))

Which expressions are known functions, and with which bounds, is in robustlip.ops.formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.errors import BadInput

X, WEIGHT = "x", "weight"
Expression = Any
# An expression is a handful of operations; more would only be slow to look at.
MOST_OPERATIONS = 40


def _clamp(x: Tensor, low: float, high: float) -> Tensor:
    return torch.clamp(x, low, high)


# Operation → (what it calls, how it is written). Those of several numbers take them after the tensor.
_CALLS: dict[str, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow, "square": torch.square, "neg": torch.neg,
    "tanh": torch.tanh, "erf": torch.erf, "sigmoid": torch.sigmoid, "relu": torch.relu, "relu6": F.relu6, "clamp": _clamp,
    "rsqrt": torch.rsqrt, "sqrt": torch.sqrt, "reciprocal": torch.reciprocal,
}  # fmt: skip
# Operations along the last dimension, which stays with one number.
_ALONG: dict[str, Callable[..., Tensor]] = {
    "mean": lambda x: x.mean(-1, keepdim=True),
    "sum": lambda x: x.sum(-1, keepdim=True),
    "var": lambda x, correction: x.var(-1, correction=correction, keepdim=True),
    "std": lambda x, correction: x.std(-1, correction=correction, keepdim=True),
}
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**"}


def evaluate(expression: Expression, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """The value of an expression at x, operations in their order; repeated parts are computed once."""
    made: dict[int, Tensor] = {}

    def value(part: Expression) -> Any:
        if not isinstance(part, tuple):
            return x if part == X else weight if part == WEIGHT else part
        if id(part) not in made:
            arguments = [value(argument) for argument in part[1:]]
            if part[0] in ("add", "mul", "sub") and not isinstance(arguments[0], Tensor):
                # torch's functions want the tensor in front; sums and products are the same, a difference is asked for the other way round.
                first, second = arguments
                made[id(part)] = torch.rsub(second, first) if part[0] == "sub" else _CALLS[part[0]](second, first)
            elif part[0] == "div" and not isinstance(arguments[0], Tensor):
                made[id(part)] = arguments[0] / arguments[1]
            else:
                made[id(part)] = (_CALLS.get(part[0]) or _ALONG[part[0]])(*arguments)
        return made[id(part)]

    found = value(expression)
    assert isinstance(found, Tensor)
    return found


def written(expression: Expression) -> str:
    """An expression as text, with exact constants."""
    if not isinstance(expression, tuple):
        return str(expression)
    name, *arguments = expression
    inner = [written(argument) for argument in arguments]
    if name in _SIGNS and len(inner) == 2:
        return f"({inner[0]} {_SIGNS[name]} {inner[1]})"
    return f"{name}({', '.join(inner)})"


def check(expression: Expression, along: bool = False, weight: bool = False) -> Expression:
    """The expression itself. Raises BadInput for what is none: unknown operations, numbers that are not finite, too many operations.

    along: whether operations along the last dimension may stand in it. weight: whether a gain may.
    """
    count = 0

    def look(part: Expression) -> None:
        nonlocal count
        count += 1
        if count > 4 * MOST_OPERATIONS:
            raise BadInput(f"expected an expression of at most {MOST_OPERATIONS} operations, got a longer one; write it in fewer")
        if isinstance(part, tuple) and part and part[0] in (*_CALLS, *(_ALONG if along else ())) and 2 <= len(part) <= 4:
            for argument in part[1:]:
                look(argument)
        elif not (part == X or (weight and part == WEIGHT) or (isinstance(part, int | float) and not isinstance(part, bool) and math.isfinite(part))):
            raise BadInput(f"expected an expression: 'x', a finite number, or (operation, arguments …), got {part!r}; see robustlip.layers.formulas")

    look(expression)
    if not isinstance(expression, tuple):
        raise BadInput(f"expected an expression with an operation, got {expression!r}; use nn.Identity, or no layer")
    return expression


class Formula(nn.Module):
    """An expression of each entry of x, any shape: GELU and similar functions, written out."""

    def __init__(self, expression: Expression) -> None:
        super().__init__()
        self.expression = check(expression)

    def forward(self, x: Tensor) -> Tensor:
        return evaluate(self.expression, x)

    def extra_repr(self) -> str:
        # Exact numbers: this text is hashed into the certificate's architecture.
        return written(self.expression)


class WrittenNorm(nn.Module):
    """An expression of each token (…, width) that divides it by its own size: RMSNorm and LayerNorm, written out.

    weight: (width,), where a gain is multiplied in before the end, None otherwise. Gains and biases after it are layers: `Scale`, `Shift`.
    """

    def __init__(self, width: int, expression: Expression, weight: Tensor | None = None) -> None:
        super().__init__()
        if width < 1 or (weight is not None and tuple(weight.shape) != (width,)):
            raise BadInput(f"expected a width of at least 1, and a weight of that width or None, got {width} and {weight}; give the tokens' own")
        self.width = int(width)
        self.expression = check(expression, along=True, weight=weight is not None)
        self.weight = weight if weight is None or isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.width:
            raise BadInput(f"expected tokens of width {self.width}, got {tuple(x.shape)}; match them")
        return evaluate(self.expression, x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.width}, {written(self.expression)}"


def gelu_new() -> Formula:
    """GPT-2's: 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), as torch.pow and torch.tanh compute it."""
    inner = ("mul", math.sqrt(2.0 / math.pi), ("add", X, ("mul", 0.044715, ("pow", X, 3.0))))
    return Formula(("mul", ("mul", 0.5, X), ("add", 1.0, ("tanh", inner))))


def gelu_erf() -> Formula:
    """x·0.5·(1 + erf(x/√2)), as torch.erf computes it."""
    return Formula(("mul", ("mul", X, 0.5), ("add", 1.0, ("erf", ("div", X, math.sqrt(2.0))))))


def gelu_quick() -> Formula:
    """x·sigmoid(1.702·x)."""
    return Formula(("mul", X, ("sigmoid", ("mul", 1.702, X))))


def rms_norm(width: int, eps: float) -> WrittenNorm:
    """Llama's RMSNorm before its gain: x·rsqrt(mean(x²) + eps)."""
    return WrittenNorm(width, ("mul", X, ("rsqrt", ("add", ("mean", ("pow", X, 2)), eps))))


def layer_norm(width: int, eps: float) -> WrittenNorm:
    """(x − mean)/√(mean((x − mean)²) + eps)."""
    centred = ("sub", X, ("mean", X))
    return WrittenNorm(width, ("div", centred, ("sqrt", ("add", ("mean", ("pow", centred, 2)), eps))))
