"""One function per ONNX operation, for all its versions: the steps that compute it, for a value of one sample (`builder`).

Arguments are values that depend on the input, constants (tensors) or None. An attribute or an output that a function does not support is
refused; nothing is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Union

import torch
from torch import Tensor

from robustlip.errors import BadInput
from robustlip.names import shown
from robustlip.onnx.builder import FUNCTIONS, LARGEST_VALUE, MOST_FOLDED, Builder, Ref, Value, is_vector, plain, run
from robustlip.onnx.files import LARGEST_RANK, TORCH, Graph, Node

Argument = Union[Value, Tensor, None]
Made = Union[Value, Tensor]
OPERATIONS: dict[str, Callable[[Builder, Node, list[Argument]], Any]] = {}
# Operations that only move numbers: it is known which numbers of their result are the batch size.
_MOVES = ("Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Identity", "Reshape", "Split", "Flatten", "Cast")
# Constant expressions that are computed when a file is read. Apart from products, each reads every number once.
_FOLDED = (
    *_MOVES, "Shape", "Size", "Where", "Expand", "Tile", "Transpose", "Pad", "Clip", "MatMul", "Gemm", "Softmax", "Dropout",
    *"Add Sub Mul Div Pow Max Min Sum Equal Less Greater LessOrEqual GreaterOrEqual And Or Not".split(),
    *"ReduceMean ReduceSum ReduceMax ReduceMin ReduceL2 Relu Sigmoid Tanh Abs Neg Exp Log Sqrt Reciprocal Sin Cos Floor Ceil Round Sign Erf".split(),
)  # fmt: skip
# Operations that may read a shape whose first entry is the batch size.
_SHAPES = ("Reshape", "Expand", "ConstantOfShape")


def onnx(*names: str) -> Callable[[Any], Any]:
    """Function decorator: the function converts the ONNX operations of these names."""

    def add(function: Any) -> Any:
        for name in names:
            OPERATIONS[name] = function
        return function

    return add


class Reading:
    """Converts the nodes of a graph in order. values: by name."""

    def __init__(self, builder: Builder, graph: Graph) -> None:
        self.builder, self.graph = builder, graph
        self.values: dict[str, Made] = {}
        self.folded = 0
        # By name of a constant: which of its numbers are the batch size, if that has a name in the file.
        self.sizes: dict[str, Tensor] = {}
        self.makers = {name: node for node in graph.nodes for name in node.outputs if name}

    def run(self, shape: tuple[int, ...]) -> Made:
        self.values.update(self.graph.constants)
        self.values[self.graph.input] = self.builder.input(shape)
        composed = Composed(self)
        for node in self.graph.nodes:
            for name in node.inputs:
                if name and name not in self.values:
                    raise node.refuse(f"it reads {shown(name, 60)!r}, which no earlier node computes", "correct the file")
            if node.op not in OPERATIONS:
                raise node.refuse("it is not supported", "use other operations")
            made = composed.read(node)
            if made is None:
                made = self.node(node)
            found = list(made) if isinstance(made, list | tuple) else [made]
            if any(name and i >= len(found) for i, name in enumerate(node.outputs)):
                raise node.refuse("it has outputs that are not supported")
            if unread := sorted(set(node.attributes) - node.used_attributes - {"consumed_inputs"}):
                raise node.refuse(f"its attribute {shown(unread[0], 60)} is not supported")
            for name, value in zip(node.outputs, found, strict=False):
                if name in self.values:
                    raise node.refuse(f"its output {shown(name, 60)!r} exists already", "correct the file")
                if name:
                    self.values[name] = value
        if self.graph.output not in self.values:
            raise BadInput(f"expected a node that computes the output, got none for {shown(self.graph.output, 60)!r}; correct the file")
        return self.values[self.graph.output]

    def node(self, node: Node) -> Any:
        arguments: list[Argument] = [self.values[name] if name else None for name in node.inputs]
        read = OPERATIONS[node.op]
        dependent = any(isinstance(argument, Value) for argument in arguments)
        self._sizes(node, dependent)
        if dependent or node.op in ("Constant", "ConstantOfShape", "Range", "Size"):
            return read(self.builder, node, arguments)
        return self._constant(node, arguments)

    def _constant(self, node: Node, arguments: list[Argument]) -> Any:
        """The result of a node whose arguments are all constants: its steps, run now on one row."""
        if not arguments or not isinstance(arguments[0], Tensor):
            raise node.refuse("it has no input", "correct the file")
        if node.op not in _FOLDED:
            raise node.refuse("its arguments are all constants", "simplify the graph, so that constants are computed")
        first = arguments[0]
        self._afford(node, first.numel())
        builder = Builder(first.shape, first.dtype)
        builder.layouts = [tuple(first.shape)]
        made = OPERATIONS[node.op](builder, node, [Value(Ref(0), tuple(first.shape), tuple(first.shape)), *arguments[1:]])
        found = list(made) if isinstance(made, list | tuple) else [made]
        for layout in builder.layouts[1:]:
            self._afford(node, math.prod(layout))
        for step in builder.steps:
            if step.function in ("matmul", "linear"):
                self._afford(node, 8 * first.numel())  # each number is read many times
        with torch.no_grad():
            values = run(builder.steps, first[None], builder.tensor)
        out = [v if isinstance(v, Tensor) else values[v.ref.index][0].reshape(v.shape) for v in found]  # type: ignore[index]
        return out if isinstance(made, list | tuple) else out[0]

    def _afford(self, node: Node, numbers: int) -> None:
        self.folded += numbers
        if self.folded > MOST_FOLDED:
            raise node.refuse(f"constant expressions would compute more than {MOST_FOLDED} numbers", "simplify the graph")

    def _sizes(self, node: Node, dependent: bool) -> None:
        """Tracks which numbers are the batch size; raises BadInput if one is used other than as the first entry of a shape."""
        if not self.builder.named:
            return
        if node.op == "Shape" and isinstance(value := self.values[node.inputs[0]], Value):
            mask = torch.zeros(len(value.shape), dtype=torch.int64)
            mask[0] = 1
            start, end, _ = slice(node.attributes.get("start", 0), node.attributes.get("end"), 1).indices(len(value.shape))
            self.sizes[node.outputs[0]] = mask[start:end]
            return
        touched = [name for name in node.inputs if name in self.sizes]
        if not touched:
            return
        why = "the number of samples is used other than as the first entry of a shape"
        if not dependent and node.op == "Shape":  # its numbers do not matter, only how many there are
            return
        if not dependent and node.op == "Equal" and len(touched) == 1:  # as exporters write it: where a size is -1
            other = self.values[next(name for name in node.inputs if name != touched[0])]
            if isinstance(other, Tensor) and bool((other < 0).all()):
                return
        if not dependent and node.op == "Where" and node.inputs[0] not in touched:
            condition: Any = self.values[node.inputs[0]]
            marked: list[Any] = [self.values[name] for name in node.inputs[1:]]
            first, second = (
                self.sizes.get(name, torch.zeros_like(v, dtype=torch.int64)) for name, v in zip(node.inputs[1:], marked, strict=True)
            )
            self.sizes[node.outputs[0]] = torch.where(condition, first, second)
            return
        if node.op in _SHAPES and touched == [node.inputs[-1]]:
            if not bool(self.sizes[touched[0]].flatten()[1:].any()):
                return
        elif not dependent and node.op in _MOVES and node.inputs[0]:
            marks: list[Argument] = [
                self.sizes.get(name, torch.zeros_like(v, dtype=torch.int64) if i == 0 or node.op == "Concat" else v)
                if name and isinstance(v := self.values[name], Tensor) else None for i, name in enumerate(node.inputs)
            ]  # fmt: skip
            if not any(name in self.sizes for name in node.inputs[1:] if node.op != "Concat"):
                made = self._constant(node, marks)
                for name, mask in zip(node.outputs, made if isinstance(made, list) else [made], strict=False):
                    if bool(mask.any()):
                        self.sizes[name] = mask
                return
        raise node.refuse(why, "keep samples separate")


class Composed:
    """Recognises groups of nodes that form one operation: GELU written with erf, SiLU written with a sigmoid."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    def read(self, node: Node) -> Value | None:
        """The value of the last node of such a group, computed by that operation; None for any other node."""
        if node.op != "Mul" or len(node.inputs) != 2:
            return None
        found = self._gelu(node) or self._silu(node)
        if found is None:
            return None
        function, x = found
        return self.reading.builder.same(node, x, function)

    def _maker(self, name: str, *ops: str) -> Node | None:
        made = self.reading.makers.get(name)
        return made if made is not None and made.op in ops else None

    def _number(self, name: str, wanted: float) -> bool:
        value = self.reading.values.get(name)
        return isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point() and abs(float(value) - wanted) <= 1e-6 * abs(wanted)

    def _other(self, node: Node, wanted: float) -> str | None:
        """The name of the other term of a node that multiplies by, or adds, a certain number."""
        if len(node.inputs) != 2:
            return None
        a, b = node.inputs
        return a if self._number(b, wanted) else b if self._number(a, wanted) else None

    def _factors(self, name: str) -> list[str]:
        """The factors of a value, through up to three nested products."""
        node = self._maker(name, "Mul")
        if node is None:
            return [name]
        found: list[str] = []
        for part in node.inputs:
            inner = self._maker(part, "Mul")
            found += inner.inputs if inner is not None and len(inner.inputs) == 2 else [part]
        return found

    def _gelu(self, node: Node) -> tuple[str, Value] | None:
        factors = self._factors(node.outputs[0])
        halves = [f for f in factors if self._number(f, 0.5)]
        rest = [f for f in factors if f not in halves]
        if len(factors) != 3 or len(halves) != 1 or len(rest) != 2:
            return None
        for x, sum_ in (rest, rest[::-1]):
            add = self._maker(sum_, "Add")
            erf = None if add is None else self._maker(self._other(add, 1.0) or "", "Erf")
            inner = None if erf is None else self._maker(erf.inputs[0], "Div", "Mul")
            if inner is None or len(inner.inputs) != 2:
                continue
            scaled = self._other(inner, 2**-0.5) if inner.op == "Mul" else inner.inputs[0] if self._number(inner.inputs[1], 2**0.5) else None
            value = self.reading.values.get(x)
            if scaled == x and isinstance(value, Value):
                return "gelu", value
        return None

    def _silu(self, node: Node) -> tuple[str, Value] | None:
        for x, gate in (node.inputs, node.inputs[::-1]):
            sigmoid = self._maker(gate, "Sigmoid")
            value = self.reading.values.get(x)
            if sigmoid is not None and sigmoid.inputs[0] == x and isinstance(value, Value):
                return "silu", value
        return None


# ---- helper functions


def count(node: Node, args: Sequence[Argument], least: int, most: int) -> None:
    if not least <= len(args) <= most:
        raise node.refuse(f"it has {len(args)} inputs, not {least} to {most}", "correct the file")


def dependent(node: Node, args: Sequence[Argument], at: int = 0) -> Value:
    value = args[at] if at < len(args) else None
    if not isinstance(value, Value):
        raise node.refuse("its first argument does not depend on the network's input, but another one does")
    return value


def constant(node: Node, args: Sequence[Argument], at: int, what: str) -> Tensor | None:
    value = args[at] if at < len(args) else None
    if isinstance(value, Value):
        raise node.refuse(f"its {what} depends on the input")
    return value


def needs(node: Node, args: Sequence[Argument], at: int, what: str) -> Tensor:
    value = constant(node, args, at, what)
    if value is None:
        raise node.refuse(f"it has no {what}", "correct the file")
    return value


def integers(node: Node, args: Sequence[Argument], at: int, what: str) -> list[int] | None:
    """The integers of an argument that has to be constant."""
    value = constant(node, args, at, what)
    if value is None:
        return None
    if value.is_floating_point() or value.dtype == torch.bool or value.dim() > 1 or value.numel() > 2**12:
        raise node.refuse(f"its {what} is not a list of integers", "correct the file")
    return [int(v) for v in value.reshape(-1)]


def integers_of(node: Node, args: Sequence[Argument], at: int, name: str) -> list[int] | None:
    """Integers that are an attribute in old opsets and an argument in new ones."""
    return integers(node, args, at, name) if at < len(args) else node.ints(name)


def number(node: Node, args: Sequence[Argument], at: int, what: str) -> float | None:
    value = constant(node, args, at, what)
    if value is None:
        return None
    if value.numel() != 1:
        raise node.refuse(f"its {what} is not a number", "correct the file")
    return float(value)


def axis_of(node: Node, axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise node.refuse(f"its axis is {axis} of {rank}", "correct the file")
    return axis % rank


def checked_axis(node: Node, value: Value, axis: int) -> int:
    """The axis of a value; it must not be the batch dimension."""
    axis = axis_of(node, axis, len(value.shape))
    if axis == 0 and value.shape[0] == 1:
        raise node.refuse("it acts along the first dimension, the batch dimension, and would mix samples", "keep samples separate")
    return axis


def broadcast_shape(node: Node, *shapes: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*[tuple(s) for s in shapes]))
    except RuntimeError:
        raise node.refuse(f"the shapes {[tuple(s) for s in shapes]} do not agree", "correct the file") from None


def reshaped(b: Builder, node: Node, value: Value, shape: Sequence[int]) -> Value:
    """The same numbers in the same order, in another shape."""
    shape = tuple(shape)
    if math.prod(shape) != math.prod(value.shape) or any(n < 1 for n in shape) or len(shape) > LARGEST_RANK:
        raise node.refuse(f"it reshapes {value.shape} to {shape}", "correct the file")
    return b.checked(node, Value(value.ref, shape, value.layout))


def with_constant(b: Builder, node: Node, value: Value, c: Tensor, name: str) -> tuple[Ref, Any, tuple[int, ...]]:
    """(the value, a constant that torch broadcasts to it, the shape of the result in the file)."""
    c = c.to(b.dtypes[value.ref.index]) if c.is_floating_point() and b.dtypes[value.ref.index].is_floating_point else c
    shape = broadcast_shape(node, value.shape, c.shape)
    if math.prod(shape) > LARGEST_VALUE:
        raise node.refuse(f"its result has the shape {shape}, more than {LARGEST_VALUE} numbers", "use a smaller network")
    if c.numel() == 1:
        ref = value.ref if shape == value.shape or math.prod(shape) == math.prod(value.shape) else b.as_rows(value, plain(shape))
        return ref, b.add_tensor(c.reshape(()), name), shape
    if shape != value.shape:  # the value is broadcast
        padded = (1,) * (len(shape) - len(value.shape)) + value.shape
        full = c.reshape((1,) * (len(shape) - c.dim()) + tuple(c.shape))
        return b.as_rows(value, plain(padded) if shape[0] == 1 else padded), b.add_tensor(full, name), shape
    lead = value.shape[:1] == (1,)
    c = c.reshape(c.shape[1:]) if lead and c.dim() == len(value.shape) else c
    if value.layout != plain(value.shape):
        if is_vector(value.shape) or len(value.layout) == 1:
            c = c.expand(plain(value.shape)).reshape(value.layout)
        else:
            return b.as_rows(value, plain(value.shape)), b.add_tensor(c, name), shape
    # Leading ones have no effect; without them a constant per channel is recognised.
    while c.dim() > 1 and c.shape[0] == 1:
        c = c[0]
    return value.ref, b.add_tensor(c, name), shape


def as_broadcast_rows(b: Builder, node: Node, values: Sequence[Value]) -> tuple[list[Ref], tuple[int, ...]]:
    """Values as rows that torch can broadcast with each other, and the shape of the result in the file."""
    shape = broadcast_shape(node, *[v.shape for v in values])
    if len({v.layout for v in values}) == 1 and len({v.shape for v in values}) == 1:
        return [v.ref for v in values], shape
    padded = [(1,) * (len(shape) - len(v.shape)) + v.shape for v in values]
    return [b.as_rows(v, p[1:] if shape[:1] == (1,) else p) for v, p in zip(values, padded, strict=True)], shape


# ---- operations with two terms

_TERMS = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow", "Max": "maximum", "Min": "minimum", "Sum": "add",
          "Equal": "eq", "Less": "lt", "Greater": "gt", "LessOrEqual": "le", "GreaterOrEqual": "ge", "And": "logical_and",
          "Or": "logical_or"}  # fmt: skip


def _broadcast_before_7(node: Node, args: list[Argument]) -> None:
    """Opsets below 7: the second term is broadcast only if the attribute `broadcast` says so, starting at an axis."""
    if node.opset >= 7 or node.op in ("Sum", "Max", "Min"):
        return
    axis, told_ = node.int("axis"), node.int("broadcast", 0)
    first, second = args[0], args[1]
    if first is None or second is None:
        return
    if tuple(first.shape) != tuple(second.shape) and not told_:
        raise node.refuse(f"its terms have shapes {tuple(first.shape)} and {tuple(second.shape)}, and broadcast is not set", "correct the file")
    if axis is not None and isinstance(second, Tensor) and tuple(first.shape) != tuple(second.shape):
        trailing = len(first.shape) - axis_of(node, axis, len(first.shape)) - second.dim()
        if trailing < 0:
            raise node.refuse("its axis does not fit the second term", "correct the file")
        args[1] = second.reshape(tuple(second.shape) + (1,) * trailing)


@onnx(*_TERMS)
def _two(b: Builder, node: Node, args: list[Argument]) -> Made:
    count(node, args, 1 if node.op in ("Sum", "Max", "Min") else 2, 64 if node.op in ("Sum", "Max", "Min") else 2)
    if len(args) == 2:
        _broadcast_before_7(node, args)
    total = args[0]
    for i, argument in enumerate(args[1:], 1):
        total = _pair(b, node, total, argument, node.inputs[i] if isinstance(argument, Tensor) else node.inputs[0])
    if total is None:
        raise node.refuse("a term is missing", "correct the file")
    return total


def _pair(b: Builder, node: Node, x: Argument, y: Argument, name: str) -> Made:
    if x is None or y is None:
        raise node.refuse("a term is missing", "correct the file")
    function = _TERMS[node.op]
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        if node.op in ("Sum", "Max", "Min"):
            return FUNCTIONS[function](x, y)
        raise node.refuse("its two constants were not evaluated", "correct the file")
    dtypes = [v.dtype if isinstance(v, Tensor) else b.dtypes[v.ref.index] for v in (x, y)]
    if dtypes[0] != dtypes[1] and node.op != "Pow":
        raise node.refuse(f"its terms are {dtypes[0]} and {dtypes[1]}", "correct the file")
    options: dict[str, Any] = {"rounding_mode": "trunc"} if node.op == "Div" and not dtypes[0].is_floating_point else {}
    if isinstance(x, Value) and isinstance(y, Value):
        refs_, shape = as_broadcast_rows(b, node, [x, y])
        return b.value(node, b.step(node, function, *refs_, **options), shape)
    if isinstance(x, Value) and isinstance(y, Tensor):
        if node.op == "Add" and (fused := _with_bias(b, node, x, y, name)):
            return fused
        if node.op == "Pow" and y.numel() == 1:
            power = float(y)
            return b.same(node, x, "pow", int(power) if power.is_integer() else power)
        ref, held, shape = with_constant(b, node, x, y, name)
        return b.value(node, b.step(node, function, ref, held, **options), shape)
    assert isinstance(x, Tensor) and isinstance(y, Value)
    if node.op == "Add" and (fused := _with_bias(b, node, y, x, name)):
        return fused
    ref, held, shape = with_constant(b, node, y, x, name)
    first, second = (ref, held) if node.op in ("Add", "Sum", "Mul", "Max", "Min") else (held, ref)
    return b.value(node, b.step(node, function, first, second, **options), shape)


def _with_bias(b: Builder, node: Node, x: Value, c: Tensor, name: str) -> Value | None:
    """A product and a constant that is added to all its rows, as one torch call if the product has no bias yet."""
    step = b.steps[x.ref.index - 1] if x.ref.index else None
    if step is None or step.function not in ("linear", "conv2d") or step.arguments[2] is not None:
        return None
    if broadcast_shape(node, x.shape, c.shape) != x.shape:
        return None
    layout = x.layout
    full = c.expand(x.shape).reshape(layout) if c.numel() != 1 else c.reshape(()).expand(layout)
    along = 0 if step.function == "conv2d" else len(layout) - 1
    rows = full.movedim(along, 0).reshape(layout[along], -1)
    if not bool((rows == rows[:, :1]).all()):
        return None
    held = b.add_tensor(rows[:, 0].to(b.dtypes[x.ref.index]), name, weight=True)
    ref = b.step(node, step.function, *step.arguments[:2], held, *step.arguments[3:], **step.options)
    return b.value(node, ref, x.shape)


@onnx("Mean")
def _mean_of(b: Builder, node: Node, args: list[Argument]) -> Made:
    raise node.refuse("the mean of several values is not supported", "write a sum and a product")


@onnx("Where")
def _where(b: Builder, node: Node, args: list[Argument]) -> Made:
    count(node, args, 3, 3)
    values = [v for v in args if isinstance(v, Value)]
    shape = broadcast_shape(node, *[v.shape for v in args if v is not None])
    lead = shape[:1] == (1,) or not shape
    parts: list[Any] = []
    for i, v in enumerate(args):
        if v is None:
            raise node.refuse("a term is missing", "correct the file")
        padded = (1,) * (len(shape) - len(v.shape)) + tuple(v.shape)
        rows = padded[1:] if lead else padded
        parts.append(b.as_rows(v, rows) if isinstance(v, Value) else b.add_tensor(v.reshape(rows), node.inputs[i]))
    if not values:
        raise node.refuse("it has no argument that depends on the input", "correct the file")
    return b.value(node, b.step(node, "where", *parts), shape)


# ---- elementwise

_PLAIN = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Softsign": "softsign", "HardSwish": "hardswish", "Mish": "mish", "Erf": "erf",
          "Abs": "abs", "Neg": "neg", "Exp": "exp", "Log": "log", "Sqrt": "sqrt", "Reciprocal": "reciprocal", "Sin": "sin", "Cos": "cos",
          "Floor": "floor", "Ceil": "ceil", "Round": "round", "Sign": "sign", "Not": "logical_not", "Softplus": "softplus"}  # fmt: skip


@onnx(*_PLAIN)
def _elementwise(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 1)
    return b.same(node, dependent(node, args), _PLAIN[node.op])


@onnx("LeakyRelu")
def _leaky(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 1)
    return b.same(node, dependent(node, args), "leaky_relu", node.float("alpha", 0.01))


@onnx("Elu", "Celu")
def _elu(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 1)
    return b.same(node, dependent(node, args), node.op.lower(), node.float("alpha", 1.0))


@onnx("Selu")
def _selu(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 1)
    new = node.opset >= 6
    alpha = node.float("alpha", 1.67326319217681884765625 if new else 1.6732)
    gamma = node.float("gamma", 1.05070102214813232421875 if new else 1.0507)
    if abs(alpha - 1.6732632423543772) > 1e-6 or abs(gamma - 1.0507009873554805) > 1e-6:
        raise node.refuse(f"its alpha and gamma are {alpha:g} and {gamma:g}, not SELU's", "write ELU and a product")
    return b.same(node, dependent(node, args), "selu")


@onnx("HardSigmoid")
def _hard_sigmoid(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 1)
    alpha, beta, x = node.float("alpha", 0.2), node.float("beta", 0.5), dependent(node, args)
    if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5:
        return b.same(node, x, "hardsigmoid")
    like = b.dtypes[x.ref.index]
    x = b.same(node, x, "mul", b.add_tensor(torch.tensor(alpha, dtype=like), "alpha"))
    x = b.same(node, x, "add", b.add_tensor(torch.tensor(beta, dtype=like), "beta"))
    return b.same(node, x, "clamp", 0.0, 1.0)


@onnx("Gelu")
def _gelu(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 1)
    how = node.text("approximate", "none")
    if how not in ("none", "tanh"):
        raise node.refuse(f"its approximate is {shown(how, 30)!r}", "correct the file")
    return b.same(node, dependent(node, args), "gelu", approximate=how)


@onnx("Swish")
def _swish(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 1)
    if node.float("alpha", 1.0) != 1.0:
        raise node.refuse("its alpha is not 1")
    return b.same(node, dependent(node, args), "silu")


@onnx("PRelu")
def _prelu(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 2, 2)
    x, slope = dependent(node, args), needs(node, args, 1, "slope")
    if slope.numel() == 1:
        return b.same(node, x, "prelu", b.add_tensor(slope.reshape(1), node.inputs[1], weight=True))
    channels = x.shape[1] if len(x.shape) > 1 else 0
    by_channel = slope.dim() == 1 if node.opset < 7 else all(n == 1 for i, n in enumerate(((1,) * 9 + tuple(slope.shape))[-len(x.shape):]) if i != 1)
    if x.shape[0] != 1 or slope.numel() != channels or not by_channel:
        raise node.refuse(f"its slopes have the shape {tuple(slope.shape)}, neither one number nor one per channel of {x.shape}")
    return b.value(node, b.step(node, "prelu", b.as_rows(x, plain(x.shape)), b.add_tensor(slope.reshape(-1), node.inputs[1], weight=True)), x.shape)


@onnx("Clip")
def _clip(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 3)
    x = dependent(node, args)
    low, high = (number(node, args, 1, "min"), number(node, args, 2, "max")) if node.opset >= 11 else (node.float("min"), node.float("max"))
    low = None if low is not None and low <= torch.finfo(torch.float32).min else low
    high = None if high is not None and high >= torch.finfo(torch.float32).max else high
    return x if low is None and high is None else b.same(node, x, "clamp", low, high)


@onnx("Identity")
def _identity(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 1)
    return dependent(node, args)


@onnx("Dropout")
def _dropout(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 3)
    node.float("ratio")
    node.int("seed")
    training = number(node, args, 2, "training_mode") if node.opset >= 12 else node.opset < 7 and not node.int("is_test", 0)
    if training:
        raise node.refuse("it is in training mode, in which it uses random numbers", "export the network in eval mode")
    return dependent(node, args)


@onnx("Cast")
def _cast(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 1)
    x, to = dependent(node, args), node.attributes.get("to")
    node.used_attributes |= {"to", "saturate", "round_mode"}
    names = {"FLOAT": 1, "DOUBLE": 11, "INT64": 7, "INT32": 6, "BOOL": 9, "FLOAT16": 10}
    to = names.get(to, to) if isinstance(to, str) else to
    if to not in TORCH:
        raise node.refuse(f"it casts to ONNX's type {shown(str(to), 20)}")
    dtype, own = TORCH[to], b.dtypes[x.ref.index]
    if dtype == own:
        return x
    if x.ref.index == 0 and not b.steps and own != b.dtype:
        raise node.refuse(f"it casts {own} to {dtype}")
    return b.same(node, x, "to", dtype)


# ---- shapes


@onnx("Shape")
def _shape(b: Builder, node: Node, args: list[Argument]) -> Tensor:
    count(node, args, 1, 1)
    return torch.tensor(dependent(node, args).shape[node.int("start", 0) : node.int("end")], dtype=torch.int64)


@onnx("Size")
def _size(b: Builder, node: Node, args: list[Argument]) -> Tensor:
    value = args[0]
    if b.named or value is None:
        raise node.refuse("it counts samples too", "keep samples separate")
    return torch.tensor(math.prod(value.shape), dtype=torch.int64)


@onnx("Reshape")
def _reshape(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 2)
    x = dependent(node, args)
    shape = integers_of(node, args, 1, "shape")
    if shape is None or len(shape) > LARGEST_RANK:
        raise node.refuse("it has no shape, or one with too many dimensions", "correct the file")
    if not node.int("allowzero", 0):
        shape = [x.shape[i] if n == 0 and i < len(x.shape) else n for i, n in enumerate(shape)]
    if shape.count(-1) == 1:
        rest = math.prod(n for n in shape if n != -1)
        shape = [math.prod(x.shape) // rest if n == -1 and rest > 0 else n for n in shape]
    return reshaped(b, node, x, shape)


@onnx("Flatten")
def _flatten(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 1)
    x, axis = dependent(node, args), node.int("axis", 1)
    rank = len(x.shape)
    if not -rank <= axis <= rank:
        raise node.refuse(f"its axis is {axis} of {rank}", "correct the file")
    axis = axis + rank if axis < 0 else axis
    return reshaped(b, node, x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


@onnx("Squeeze")
def _squeeze(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 2)
    x, axes = dependent(node, args), integers_of(node, args, 1, "axes")
    rank = len(x.shape)
    chosen = {axis_of(node, a, rank) for a in axes} if axes is not None else {i for i, n in enumerate(x.shape) if n == 1}
    if any(x.shape[a] != 1 for a in chosen):
        raise node.refuse(f"it removes dimensions of {x.shape} that are not 1", "correct the file")
    if b.named and 0 in chosen:
        raise node.refuse("it removes the batch dimension", "keep samples along the first dimension")
    return reshaped(b, node, x, [n for i, n in enumerate(x.shape) if i not in chosen])


@onnx("Unsqueeze")
def _unsqueeze(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 2)
    x, axes = dependent(node, args), integers_of(node, args, 1, "axes")
    rank = len(x.shape) + len(axes or [])
    if not axes or rank > LARGEST_RANK:
        raise node.refuse("it has no axes, or too many", "correct the file")
    chosen = {axis_of(node, a, rank) for a in axes}
    if len(chosen) != len(axes) or (b.named and 0 in chosen):
        raise node.refuse("its axes occur twice, or before the batch dimension", "keep samples along the first dimension")
    rest = iter(x.shape)
    return reshaped(b, node, x, [1 if i in chosen else next(rest) for i in range(rank)])


@onnx("Transpose")
def _transpose(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 1)
    x = dependent(node, args)
    rank = len(x.shape)
    order = node.ints("perm") or list(range(rank))[::-1]
    if sorted(order) != list(range(rank)):
        raise node.refuse(f"its order is {order} of {rank} dimensions", "correct the file")
    if b.named and order[:1] != [0]:
        raise node.refuse("it moves the batch dimension", "keep samples along the first dimension")
    shape = tuple(x.shape[i] for i in order)
    long = [i for i in order if x.shape[i] != 1]
    if long == sorted(long):  # only dimensions of size 1 move
        return reshaped(b, node, x, shape)
    if x.shape[0] == 1 and order[0] == 0:
        return b.value(node, b.step(node, "permute", b.as_rows(x, x.shape[1:]), tuple(order)), shape)
    made = b.value(node, b.step(node, "permute", b.as_rows(x, x.shape), (0, *(i + 1 for i in order))), shape)
    return made


@onnx("Expand", "Tile")
def _expand(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 2, 3)
    x = dependent(node, args)
    wanted = integers(node, args, 1, "shape" if node.op == "Expand" else "repeats")
    if wanted is None or len(args) > 2:
        raise node.refuse("it has no shape, or it is of opset 1", "correct the file")
    if any(n < 1 for n in wanted) or len(wanted) > LARGEST_RANK or math.prod(wanted) > LARGEST_VALUE:
        raise node.refuse(f"its shape is {wanted[:9]}", "correct the file")
    if node.op == "Tile":
        if len(wanted) != len(x.shape):
            raise node.refuse(f"it has {len(wanted)} numbers for {len(x.shape)} dimensions", "correct the file")
        shape = tuple(n * k for n, k in zip(x.shape, wanted, strict=True))
        return x if shape == x.shape else b.value(node, b.step(node, "tile", b.as_rows(x, x.shape), (1, *wanted)), shape)
    shape = broadcast_shape(node, x.shape, wanted)
    if shape == x.shape:
        return x
    if math.prod(shape) > LARGEST_VALUE:
        raise node.refuse(f"its result has the shape {shape}, more than {LARGEST_VALUE} numbers", "use a smaller network")
    padded = (1,) * (len(shape) - len(x.shape)) + x.shape
    lead = shape[0] == 1
    ref = b.step(node, "expand", b.as_rows(x, padded[1:] if lead else padded), shape[1:] if lead else shape)
    return b.value(node, ref, shape)


@onnx("Concat")
def _concat(b: Builder, node: Node, args: list[Argument]) -> Made:
    count(node, args, 1, 2**12)
    shapes = [tuple(v.shape) for v in args if v is not None]
    if len(shapes) != len(args) or len({len(s) for s in shapes}) != 1 or not shapes[0]:
        raise node.refuse(f"it concatenates the shapes {shapes[:5]}", "correct the file")
    axis = axis_of(node, node.int("axis", 1 if node.opset < 4 else None) if node.opset < 4 or node.has("axis") else 0, len(shapes[0]))
    if b.named and axis == 0:
        raise node.refuse("it concatenates samples", "keep samples separate")
    if len({s[:axis] + s[axis + 1 :] for s in shapes}) != 1:
        raise node.refuse(f"it concatenates the shapes {shapes[:5]} along dimension {axis}", "correct the file")
    lead = axis > 0 and shapes[0][0] == 1
    parts: list[Any] = []
    for i, v in enumerate(args):
        rows = tuple(v.shape)[1:] if lead else tuple(v.shape)  # type: ignore[union-attr]
        if isinstance(v, Value):
            parts += [b.as_rows(v, rows), False]
        else:
            parts += [b.add_tensor(v.reshape(1, *rows), node.inputs[i]), True]  # type: ignore[union-attr]
    full = list(shapes[0])
    full[axis] = sum(s[axis] for s in shapes)
    return b.value(node, b.step(node, "joined", tuple(parts), axis if lead else axis + 1), full)


def cut(b: Builder, node: Node, x: Value, axis: int, start: int, length: int) -> Value:
    """A contiguous range of numbers along one axis."""
    if length == x.shape[axis] and start == 0:
        return x
    if length < 1:
        raise node.refuse(f"it selects nothing of {x.shape}", "correct the file")
    shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
    axis = checked_axis(node, x, axis)
    if len(x.layout) == 1 and x.shape[axis] == x.layout[0]:  # a vector, whatever dimensions of size 1 it has
        return b.value(node, b.step(node, "narrow", x.ref, 1, start, length), shape)
    ref, off = b.rows(x)
    return b.value(node, b.step(node, "narrow", ref, axis + off, start, length), shape)


def pick(b: Builder, node: Node, x: Value, axis: int, index: list[int]) -> Value:
    """The numbers at given indices along one axis."""
    if index == list(range(index[0], index[0] + len(index))):
        return cut(b, node, x, axis, index[0], len(index))
    axis = checked_axis(node, x, axis)
    ref, off = b.rows(x)
    held = b.add_tensor(torch.tensor(index, dtype=torch.int64), "index")
    return b.value(node, b.step(node, "index_select", ref, axis + off, held), (*x.shape[:axis], len(index), *x.shape[axis + 1 :]))


@onnx("Slice")
def _slice(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 5)
    x = dependent(node, args)
    new = node.opset >= 10
    starts, ends, axes = (integers(node, args, i, n) if new else node.ints(n) for i, n in ((1, "starts"), (2, "ends"), (3, "axes")))
    steps = integers(node, args, 4, "steps") if new else None
    if starts is None or ends is None or len(starts) != len(ends):
        raise node.refuse("its starts and ends do not agree", "correct the file")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if len(axes) != len(starts) or len(steps) != len(starts) or 0 in steps:
        raise node.refuse("its axes or steps do not agree", "correct the file")
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis_of(node, axis, len(x.shape))
        chosen = list(range(x.shape[axis]))[_slice_of(start, end, step, x.shape[axis])]
        if not chosen:
            raise node.refuse(f"it selects nothing of {x.shape}", "correct the file")
        x = pick(b, node, x, axis, chosen)
    return x


def _slice_of(start: int, end: int, step: int, size: int) -> slice:
    """ONNX's slice as a Python slice; the end differs for negative steps."""
    if step > 0:
        return slice(max(start + size, 0) if start < 0 else min(start, size), max(end + size, 0) if end < 0 else min(end, size), step)
    start = start + size if start < 0 else start
    end = end + size if end < 0 else end
    start, end = min(max(start, 0), size - 1), min(max(end, -1), size - 1)
    return slice(start, None if end < 0 else end, step)


@onnx("Split")
def _split(b: Builder, node: Node, args: list[Argument]) -> list[Value]:
    count(node, args, 1, 2)
    x, axis = dependent(node, args), node.int("axis", 0)
    axis = axis_of(node, axis, len(x.shape))
    sizes, parts = integers_of(node, args, 1, "split"), node.int("num_outputs", len(node.outputs))
    if sizes is None:
        if not 1 <= parts <= 2**12:
            raise node.refuse(f"it splits into {parts} parts", "correct the file")
        each = -(-x.shape[axis] // parts)
        sizes = [each] * (x.shape[axis] // each) + ([x.shape[axis] % each] if x.shape[axis] % each else [])
    if sum(sizes) != x.shape[axis] or any(n < 1 for n in sizes) or len(sizes) != len(node.outputs):
        raise node.refuse(f"it splits {x.shape[axis]} into {sizes[:9]} for {len(node.outputs)} outputs", "correct the file")
    return [cut(b, node, x, axis, sum(sizes[:i]), n) for i, n in enumerate(sizes)]


@onnx("Gather")
def _gather(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 2, 2)
    x, index = dependent(node, args), needs(node, args, 1, "indices")
    axis = axis_of(node, node.int("axis", 0), len(x.shape))
    size = x.shape[axis]
    if index.is_floating_point() or index.numel() < 1 or index.numel() > LARGEST_VALUE // max(1, math.prod(x.shape) // size):
        raise node.refuse("its indices are not integers, or too many", "correct the file")
    places = [int(i) for i in index.reshape(-1)]
    if any(not -size <= i < size for i in places):
        raise node.refuse(f"it has indices outside {size}", "correct the file")
    made = pick(b, node, x, axis, [i % size for i in places])
    if b.named and axis == 0 and index.dim() != 1:
        raise node.refuse("it removes the batch dimension", "keep samples along the first dimension")
    return reshaped(b, node, made, (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


@onnx("Pad")
def _pad(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 4)
    x, mode = dependent(node, args), node.text("mode", "constant")
    rank = len(x.shape)
    pads = integers(node, args, 1, "pads") if node.opset >= 11 else node.ints("pads" if node.opset >= 2 else "paddings")
    value = number(node, args, 2, "constant_value") if node.opset >= 11 else node.float("value", 0.0)
    axes = integers(node, args, 3, "axes")
    axes = list(range(rank)) if axes is None else [axis_of(node, a, rank) for a in axes]
    kind = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}.get(mode)
    if pads is None or len(pads) != 2 * len(axes) or kind is None or any(abs(p) > 2**20 for p in pads):
        raise node.refuse(f"its pads are {pads} and its mode {shown(mode, 30)!r}", "correct the file")
    sides = {a: (pads[i], pads[i + len(axes)]) for i, a in enumerate(axes)}
    return padded(b, node, x, sides, kind, value or 0.0)


def padded(b: Builder, node: Node, x: Value, sides: dict[int, tuple[int, int]], mode: str = "constant", value: float = 0.0) -> Value:
    """Padding before and after the axes."""
    sides = {axis: both_ for axis, both_ in sides.items() if both_ != (0, 0)}
    if not sides:
        return x
    for axis in sides:
        checked_axis(node, x, axis)
    shape = tuple(n + sum(sides.get(i, (0, 0))) for i, n in enumerate(x.shape))
    if math.prod(shape) > LARGEST_VALUE or min(shape) < 1:
        raise node.refuse(f"its result has the shape {shape}", "use a smaller network")
    first = min(sides)
    flat = [side for axis in range(len(x.shape) - 1, first - 1, -1) for side in sides.get(axis, (0, 0))]
    ref, _ = b.rows(x)
    return b.value(node, b.step(node, "pad", ref, tuple(flat), mode, *([value] if mode == "constant" else [])), shape)


# ---- constants


@onnx("Constant")
def _constant(b: Builder, node: Node, args: list[Argument]) -> Tensor:
    count(node, args, 0, 0)
    if len(node.attributes) != 1:
        raise node.refuse("it does not contain one constant", "correct the file")
    ((name, value),) = node.attributes.items()
    node.used_attributes.add(name)
    if name == "value" and isinstance(value, Tensor):
        return value
    if name in ("value_float", "value_floats") and isinstance(value, float | list):
        return torch.tensor(value, dtype=torch.float32)
    if name in ("value_int", "value_ints") and isinstance(value, int | list):
        return torch.tensor(value, dtype=torch.int64)
    raise node.refuse(f"its constant is {shown(name, 30)}", "write it as a tensor of numbers")


@onnx("ConstantOfShape")
def _constant_of_shape(b: Builder, node: Node, args: list[Argument]) -> Tensor:
    count(node, args, 1, 1)
    shape = integers(node, args, 0, "shape")
    value = node.attributes.get("value", torch.zeros(1))
    node.used_attributes.add("value")
    if shape is None or any(n < 0 for n in shape) or math.prod(shape) > LARGEST_VALUE // 8 or not isinstance(value, Tensor) or value.numel() != 1:
        raise node.refuse(f"its shape is {shape and shape[:9]}, or its value is not a number", "correct the file")
    return value.reshape([1] * len(shape)).expand(shape).clone()


@onnx("Range")
def _range(b: Builder, node: Node, args: list[Argument]) -> Tensor:
    count(node, args, 3, 3)
    start, limit, delta = (needs(node, args, i, "numbers") for i in range(3))
    if any(v.numel() != 1 or v.is_floating_point() for v in (start, limit, delta)):
        raise node.refuse("its numbers are not integers")
    found = range(int(start), int(limit), int(delta))
    if len(found) > 2**20:
        raise node.refuse(f"it has {len(found)} numbers", "correct the file")
    return torch.tensor(list(found), dtype=start.dtype)


# ---- products


@onnx("Gemm")
def _gemm(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 2, 3)
    alpha, beta, flip_a, flip_b = node.float("alpha", 1.0), node.float("beta", 1.0), node.int("transA", 0), node.int("transB", 0)
    node.int("broadcast")
    x, w = args[0], args[1]
    c = args[2] if len(args) > 2 else None
    if x is None or w is None or len(x.shape) != 2 or len(w.shape) != 2 or isinstance(c, Value):
        raise node.refuse("its terms are not matrices, or the term that it adds depends on the input")
    if isinstance(x, Tensor) and isinstance(w, Value):  # (A·B)ᵀ = Bᵀ·Aᵀ
        a = x.mT if flip_a else x
        value = _transposed(b, node, w, not flip_b)
        made = _rows_times(b, node, value, a, alpha, None, node.inputs[0])
        made = _transposed(b, node, made, True)
    elif isinstance(x, Value) and isinstance(w, Tensor):
        value = _transposed(b, node, x, bool(flip_a))
        weight = w if flip_b else w.mT
        bias = None
        if c is not None and broadcast_shape(node, c.shape, (value.shape[0], weight.shape[0])) == (value.shape[0], weight.shape[0]):
            rows = c.expand(value.shape[0], weight.shape[0])
            if bool((rows == rows[:1]).all()):
                bias, c = rows[0] * beta if beta != 1 else rows[0], None
        made = _rows_times(b, node, value, weight, alpha, bias, node.inputs[1], node.inputs[-1])
    elif isinstance(x, Value) and isinstance(w, Value):
        value, other = _transposed(b, node, x, bool(flip_a)), _transposed(b, node, w, bool(flip_b))
        made = _values_times(b, node, value, other)
        if alpha != 1:
            made = b.same(node, made, "mul", b.add_tensor(torch.tensor(alpha, dtype=b.dtypes[made.ref.index]), "alpha"))
    else:
        raise node.refuse("its two constants were not evaluated", "correct the file")
    if c is None:
        return made
    ref, held, shape = with_constant(b, node, made, c * beta if beta != 1 else c, node.inputs[2])
    if shape != made.shape:
        raise node.refuse(f"it adds {tuple(c.shape)} to {made.shape}", "correct the file")
    return b.value(node, b.step(node, "add", ref, held), shape)


def _transposed(b: Builder, node: Node, x: Value, flip: bool) -> Value:
    """A matrix with its two dimensions swapped."""
    if not flip:
        return x
    if b.named:
        raise node.refuse("it moves the batch dimension", "keep samples along the first dimension")
    if 1 in x.shape:
        return reshaped(b, node, x, x.shape[::-1])
    return b.value(node, b.step(node, "permute", b.as_rows(x, x.shape), (0, 2, 1)), x.shape[::-1])


def _rows_times(b: Builder, node: Node, x: Value, weight: Tensor, alpha: float, bias: Tensor | None, name: str, of_bias: str = "") -> Value:
    """x·Wᵀ + bias, W (m, k), for x (…, k)."""
    if not x.shape or x.shape[-1] != weight.shape[1]:
        raise node.refuse(f"it multiplies {x.shape} by {tuple(weight.mT.shape)}", "correct the file")
    like = b.dtypes[x.ref.index]
    if weight.dtype != like or not like.is_floating_point:
        raise node.refuse(f"it multiplies {like} by {weight.dtype}", "correct the file")
    held = b.add_tensor(weight * alpha if alpha != 1 else weight, name, weight=True)
    added = None if bias is None else b.add_tensor(bias.to(like), of_bias, weight=True)
    shape = (*x.shape[:-1], weight.shape[0])
    if is_vector(x.shape):
        return b.value(node, b.step(node, "linear", b.as_rows(x, (math.prod(x.shape),)), held, added), shape)
    ref, _ = b.rows(x)
    return b.value(node, b.step(node, "linear", ref, held, added), shape)


def _values_times(b: Builder, node: Node, x: Value, y: Value) -> Value:
    if len(x.shape) < 2 or len(y.shape) < 2 or x.shape[-1] != y.shape[-2]:
        raise node.refuse(f"it multiplies {x.shape} by {y.shape}", "correct the file")
    shape = (*broadcast_shape(node, x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])
    rank = len(shape)
    padded_ = [(1,) * (rank - len(v.shape)) + v.shape for v in (x, y)]
    if rank > 2 and shape[0] == 1:
        refs_ = [b.as_rows(v, p[1:]) for v, p in zip((x, y), padded_, strict=True)]
    else:
        refs_ = [b.as_rows(v, p) for v, p in zip((x, y), padded_, strict=True)]
    return b.value(node, b.step(node, "matmul", *refs_), shape)


@onnx("MatMul")
def _matmul(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 2, 2)
    x, w = args
    if isinstance(x, Value) and isinstance(w, Value):
        return _values_times(b, node, x, w)
    if isinstance(x, Value) and isinstance(w, Tensor):
        while w.dim() > 2 and w.shape[0] == 1 and w.dim() <= len(x.shape):
            w = w[0]
        if w.dim() == 1:
            made = _rows_times(b, node, x, w[None], 1.0, None, node.inputs[1])
            return reshaped(b, node, made, made.shape[:-1])
        if w.dim() == 2:
            return _rows_times(b, node, x, w.mT, 1.0, None, node.inputs[1])
        shape = (*broadcast_shape(node, x.shape[:-2], w.shape[:-2]), x.shape[-2] if len(x.shape) > 1 else 1, w.shape[-1])
        if len(x.shape) < 2 or len(shape) < 3:
            raise node.refuse(f"it multiplies {x.shape} by {tuple(w.shape)}")
        lead = shape[0] == 1
        padded_ = (1,) * (len(shape) - len(x.shape)) + x.shape
        held = b.add_tensor(w.reshape((1,) * (len(shape) - w.dim()) + tuple(w.shape))[0] if lead else w, node.inputs[1], weight=True)
        return b.value(node, b.step(node, "matmul", b.as_rows(x, padded_[1:] if lead else padded_), held), shape)
    if isinstance(x, Tensor) and isinstance(w, Value):
        y = w
        while x.dim() > 2 and x.shape[0] == 1 and x.dim() <= len(y.shape):
            x = x[0]
        if x.dim() == 2 and len(y.shape) >= 2 and y.shape[-1] == 1 and is_vector(y.shape):
            made = _rows_times(b, node, Value(y.ref, (*y.shape[:-2], y.shape[-2]), y.layout), x, 1.0, None, node.inputs[0])
            return reshaped(b, node, made, (*made.shape, 1))
        if x.dim() == 2 and len(y.shape) == 1:
            return _rows_times(b, node, y, x, 1.0, None, node.inputs[0])
        if x.dim() < 2 or len(y.shape) < 2 or x.shape[-1] != y.shape[-2]:
            raise node.refuse(f"it multiplies {tuple(x.shape)} by {y.shape}")
        shape = (*broadcast_shape(node, x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])
        lead = len(shape) > 2 and shape[0] == 1
        padded_ = (1,) * (len(shape) - len(y.shape)) + y.shape
        held = b.add_tensor(x.reshape((1,) * (len(shape) - x.dim()) + tuple(x.shape))[0] if lead else x, node.inputs[0], weight=True)
        return b.value(node, b.step(node, "matmul", held, b.as_rows(y, padded_[1:] if lead else padded_)), shape)
    raise node.refuse("its two constants were not evaluated", "correct the file")


# ---- windows


def _windows(node: Node, x: Value, kernel: Sequence[int]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """(strides, dilations, (padding before, padding after) per dimension) of convolutions and pools."""
    rank = len(kernel)
    if len(x.shape) != rank + 2 or x.shape[0] != 1:
        raise node.refuse(f"it acts on {x.shape}, not on one image with channels and {rank} dimensions")
    strides, dilations = node.ints("strides", [1] * rank), node.ints("dilations", [1] * rank)
    pads, auto = node.ints("pads"), node.text("auto_pad", "NOTSET")
    sizes = [*kernel, *strides, *dilations]
    if len(strides) != rank or len(dilations) != rank or any(not 1 <= n <= 2**20 for n in sizes):
        raise node.refuse(f"its kernel, strides and dilations are {list(kernel)}, {strides[:5]}, {dilations[:5]}", "correct the file")
    if auto in ("NOTSET", "VALID"):
        pads = pads if pads is not None and auto == "NOTSET" else [0] * (2 * rank)
        if len(pads) != 2 * rank or any(not 0 <= p <= 2**20 for p in pads):
            raise node.refuse(f"its pads are {pads[:9]}", "correct the file")
        return strides, dilations, list(zip(pads[:rank], pads[rank:], strict=True))
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        raise node.refuse(f"its auto_pad is {shown(auto, 30)!r}", "correct the file")
    found = []
    for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
        small = total // 2
        found.append((small, total - small) if auto == "SAME_UPPER" else (total - small, small))
    return strides, dilations, found


def _even(b: Builder, node: Node, x: Value, pads: list[tuple[int, int]], value: float = 0.0) -> tuple[Value, tuple[int, ...]]:
    """(the value, the padding for torch's operation): if the padding of two sides differs, the value is padded before."""
    if all(before == after for before, after in pads):
        return x, tuple(before for before, _ in pads)
    return padded(b, node, x, {i + 2: sides for i, sides in enumerate(pads)}, "constant", value), (0,) * len(pads)


@onnx("Conv", "ConvTranspose")
def _conv(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 2, 3)
    x, w, bias = dependent(node, args), needs(node, args, 1, "weights"), constant(node, args, 2, "bias")
    rank = w.dim() - 2
    if not 1 <= rank <= 3:
        raise node.refuse(f"its weights have the shape {tuple(w.shape)}")
    kernel, groups = node.ints("kernel_shape", list(w.shape[2:])), node.int("group", 1)
    if list(kernel) != list(w.shape[2:]):
        raise node.refuse(f"its kernel is {list(kernel)[:5]} and its weights {tuple(w.shape)}", "correct the file")
    strides, dilations, pads = _windows(node, x, kernel)
    held = b.add_tensor(w, node.inputs[1], weight=True, key=("conv", node.inputs[1]))
    added = None if bias is None else b.add_tensor(bias, node.inputs[2], weight=True)
    if node.op == "Conv":
        x, padding = _even(b, node, x, pads)
        ref = b.step(node, f"conv{rank}d", b.as_rows(x, x.shape[1:]), held, added, tuple(strides), padding, tuple(dilations), groups)
    else:
        more = node.ints("output_padding", [0] * rank)
        own_shape = node.ints("output_shape") is not None or node.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        if own_shape or any(p != q for p, q in pads) or rank > 2:
            raise node.refuse("its output_shape is set, or its padding differs between sides")
        padding = tuple(p for p, _ in pads)
        options = tuple(strides), padding, tuple(more), groups, tuple(dilations)
        ref = b.step(node, f"conv_transpose{rank}d", b.as_rows(x, x.shape[1:]), held, added, *options)
    return b.value(node, ref, (1, *b.layouts[ref.index]))


def _length(size: int, k: int, s: int, d: int, pads: tuple[int, int], ceil: bool) -> int:
    positions = size + sum(pads) - (k - 1) * d - 1
    if positions < 0:
        return 0
    n = (-(-positions // s) if ceil else positions // s) + 1
    # The last window has to begin within the input or the padding before it.
    return n - 1 if ceil and (n - 1) * s >= size + pads[0] else n


@onnx("MaxPool", "AveragePool")
def _pool(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 1)
    x, kernel = dependent(node, args), node.ints("kernel_shape", [])
    rank = len(kernel)
    if rank not in (1, 2):
        raise node.refuse(f"its kernel is {kernel[:5]}; supported are one and two dimensions")
    strides, dilations, pads = _windows(node, x, kernel)
    ceil = bool(node.int("ceil_mode", 0))
    if node.int("storage_order", 0):
        raise node.refuse("its storage_order is not 0")
    grown = [_length(n, k, s, d, p, ceil) for n, k, s, d, p in zip(x.shape[2:], kernel, strides, dilations, pads, strict=True)]
    plain_ = [_length(n, k, s, d, p, False) for n, k, s, d, p in zip(x.shape[2:], kernel, strides, dilations, pads, strict=True)]
    ceil = grown != plain_
    if min(grown) < 1:
        raise node.refuse(f"its result for {x.shape} is empty", "correct the file")
    shape = (*x.shape[:2], *grown)
    if node.op == "MaxPool":
        x, padding = _even(b, node, x, pads, float("-inf"))
        if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
            raise node.refuse(f"it pads {pads} around windows of {list(kernel)}")
        ref = b.step(node, f"max_pool{rank}d", b.as_rows(x, x.shape[1:]), tuple(kernel), tuple(strides), padding, tuple(dilations), ceil)
        return b.value(node, ref, shape)
    counted = bool(node.int("count_include_pad", 0))
    even = all(p == q for p, q in pads)
    if ceil or any(d != 1 for d in dilations) or (not even and not counted) or any(2 * max(p) > k for p, k in zip(pads, kernel, strict=True)):
        raise node.refuse("its windows are truncated, dilated or padded unevenly, so that their sizes differ")
    x, padding = _even(b, node, x, pads)
    ref = b.step(node, f"avg_pool{rank}d", b.as_rows(x, x.shape[1:]), tuple(kernel), tuple(strides), padding, False, counted)
    return b.value(node, ref, shape)


@onnx("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 1)
    x = dependent(node, args)
    rank = len(x.shape) - 2
    if rank not in (1, 2) or x.shape[0] != 1:
        raise node.refuse(f"it acts on {x.shape}, not on one image")
    row, shape = b.as_rows(x, x.shape[1:]), (*x.shape[:2], *[1] * rank)
    if node.op == "GlobalAveragePool":
        return b.value(node, b.step(node, f"adaptive_avg_pool{rank}d", row, 1), shape)
    return b.value(node, b.step(node, f"max_pool{rank}d", row, tuple(x.shape[2:])), shape)


# ---- normalisation


@onnx("BatchNormalization")
def _batch_norm(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 5, 5)
    x = dependent(node, args)
    gain, shift, mean, variance = (needs(node, args, i, "statistics") for i in range(1, 5))
    node.float("momentum")
    training = node.int("training_mode", 0) or (node.opset < 7 and not node.int("is_test", 0))
    if training or sum(map(bool, node.outputs)) > 1:
        raise node.refuse("it is in training mode, in which it mixes samples", "export the network in eval mode")
    if node.opset < 9 and node.int("spatial", 1) != 1:
        raise node.refuse("it is not spatial")
    if len(x.shape) < 2 or x.shape[0] != 1 or any(tuple(t.shape) != x.shape[1:2] for t in (gain, shift, mean, variance)):
        raise node.refuse(f"its statistics do not have the shape of {x.shape}", "correct the file")
    names = [b.add_tensor(t, n) for t, n in ((mean, node.inputs[3]), (variance, node.inputs[4]))]
    gains = [b.add_tensor(t, n, weight=True) for t, n in ((gain, node.inputs[1]), (shift, node.inputs[2]))]
    row = x.layout if len(x.layout) == 1 and x.shape[1] == x.layout[0] else x.shape[1:]
    return b.value(node, b.step(node, "batch_norm", b.as_rows(x, row), *names, *gains, False, 0.1, node.float("epsilon", 1e-5)), x.shape)


@onnx("InstanceNormalization")
def _instance_norm(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 3, 3)
    x = dependent(node, args)
    held = [b.add_tensor(needs(node, args, i, "scale"), node.inputs[i], weight=True) for i in (1, 2)]
    if len(x.shape) < 3 or x.shape[0] != 1:
        raise node.refuse(f"it acts on {x.shape}")
    return b.value(node, b.step(node, "instance_norm", b.as_rows(x, x.shape[1:]), None, None, *held, True, 0.1, node.float("epsilon", 1e-5)), x.shape)


@onnx("GroupNormalization")
def _group_norm(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 3, 3)
    x, groups = dependent(node, args), node.int("num_groups", 0)
    if node.int("stash_type", 1) != 1:
        raise node.refuse("its stash_type is not float")
    if len(x.shape) < 3 or x.shape[0] != 1 or groups < 1 or x.shape[1] % groups:
        raise node.refuse(f"it acts on {x.shape} in {groups} groups", "correct the file")
    held = []
    for i, name in ((1, "scale"), (2, "bias")):
        given = needs(node, args, i, name)
        if node.opset < 21 and tuple(given.shape) == (groups,):  # one per group, before version 21
            given = given.repeat_interleave(x.shape[1] // groups)
        elif tuple(given.shape) != (x.shape[1],):
            raise node.refuse(f"its {name} does not have the shape of {x.shape}", "correct the file")
        held.append(b.add_tensor(given, node.inputs[i], weight=True))
    return b.value(node, b.step(node, "group_norm", b.as_rows(x, x.shape[1:]), groups, *held, node.float("epsilon", 1e-5)), x.shape)


@onnx("LayerNormalization", "RMSNormalization")
def _layer_norm(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 2, 3 if node.op == "LayerNormalization" else 2)
    x, axis = dependent(node, args), node.int("axis", -1)
    if node.int("stash_type", 1) != 1:
        raise node.refuse("its stash_type is not float")
    axis = checked_axis(node, x, axis)
    gain, shift = needs(node, args, 1, "scale"), constant(node, args, 2, "bias")
    own = tuple(x.shape[axis:])
    if any(t is not None and tuple(t.shape) != own for t in (gain, shift)):
        raise node.refuse(f"its scale does not have the shape of {x.shape}", "correct the file")
    ref, _ = b.rows(x)
    held = b.add_tensor(gain, node.inputs[1], weight=True)
    if node.op == "RMSNormalization":
        return b.value(node, b.step(node, "rms_norm", ref, own, held, node.float("epsilon", 1e-5)), x.shape)
    added = None if shift is None else b.add_tensor(shift, node.inputs[2], weight=True)
    return b.value(node, b.step(node, "layer_norm", ref, own, held, added, node.float("epsilon", 1e-5)), x.shape)


@onnx("Softmax", "LogSoftmax")
def _softmax(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 1)
    x, function = dependent(node, args), "softmax" if node.op == "Softmax" else "log_softmax"
    axis = checked_axis(node, x, node.int("axis", -1 if node.opset >= 13 else 1)) if not is_vector(x.shape) or b.named else axis_of(
        node, node.int("axis", -1 if node.opset >= 13 else 1), len(x.shape)
    )  # fmt: skip
    trailing = math.prod(x.shape[axis:])
    if node.opset < 13 and trailing != x.shape[axis]:  # all dimensions from the axis on are one vector
        front = x.shape[:axis]
        row = (*plain(front), trailing) if front[:1] == (1,) or not front else (*front, trailing)
        return b.value(node, b.step(node, function, b.as_rows(x, row), -1), x.shape)
    if len(x.layout) == 1 and x.shape[axis] == x.layout[0]:
        return b.value(node, b.step(node, function, x.ref, 1), x.shape)
    if x.shape[axis] == 1:
        checked_axis(node, x, axis)
    ref, off = b.rows(x)
    return b.value(node, b.step(node, function, ref, axis + off), x.shape)


@onnx("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2")
def _reduce(b: Builder, node: Node, args: list[Argument]) -> Value:
    count(node, args, 1, 2)
    x, axes = dependent(node, args), integers_of(node, args, 1, "axes")
    keep, rank = bool(node.int("keepdims", 1)), len(x.shape)
    if not axes and node.int("noop_with_empty_axes", 0):
        return x
    chosen = sorted({checked_axis(node, x, a) for a in (axes or range(rank))})
    shape = [1 if i in chosen else n for i, n in enumerate(x.shape) if keep or i not in chosen]
    function = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "amax", "ReduceMin": "amin", "ReduceL2": "norm"}[node.op]
    ref, off = b.rows(x)
    dims = tuple(a + off for a in chosen)
    if function == "norm":
        return b.value(node, b.step(node, function, ref, 2, dims, keep), shape)
    return b.value(node, b.step(node, function, ref, dims, keep), shape)
