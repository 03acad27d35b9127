"""Values of a graph and the torch operations that compute them.

The file describes one sample: in its shapes the batch dimension is 1. At run time a batch of N samples is a tensor (N, …), one sample per row,
with the numbers of a row in the same order as in the file. Each operation is written for rows, so samples cannot be mixed. If a shape in the
file begins with 1, a row does not have that dimension.

An operation that only changes the shape creates no step: the numbers get the new shape when another operation needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.errors import BadInput
from robustlip.onnx.files import LARGEST_RANK, Node

# The largest number of elements of one value of one sample (512 MiB in float32).
LARGEST_VALUE = 2**27
# The largest number of elements that constant expressions may compute in total.
MOST_FOLDED = 2**28
# The largest number of steps of a program.
MOST_STEPS = 50_000
# Attributes of the module, which cannot be names of tensors.
_OWN = ("steps", "output", "input_shape", "last", "training")


@dataclass(frozen=True)
class Ref:
    """The result of a step: 0 is the input, i + 1 the result of step i."""

    index: int


@dataclass(frozen=True)
class TensorRef:
    """A parameter or buffer of the module, by name."""

    name: str


@dataclass(frozen=True)
class Value:
    """A value that depends on the input. shape: in the file, for one sample. layout: shape of a row at run time; same numbers, same order."""

    ref: Ref
    shape: tuple[int, ...]
    layout: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One call: FUNCTIONS[function](*arguments, **options); each Ref or TensorRef in the arguments stands for a tensor."""

    function: str
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        def text(value: Any) -> str:
            return f"%{value.index}" if isinstance(value, Ref) else value.name if isinstance(value, TensorRef) else repr(value)

        parts = [", ".join(map(text, value)) if isinstance(value, tuple) else text(value) for value in self.arguments]
        return f"{self.function}({', '.join(parts + [f'{key}={value!r}' for key, value in self.options.items()])})"


def _view(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.reshape(x.shape[0], *shape)


def _expand(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.expand(x.shape[0], *shape)


def _joined(parts: tuple[Tensor, ...], dim: int) -> Tensor:
    """Concatenates parts; a constant part, with one row, is repeated for every sample."""
    count = next(part.shape[0] for part, constant in zip(parts[::2], parts[1::2], strict=True) if not constant)
    return torch.cat([part.expand(count, *part.shape[1:]) if constant else part for part, constant in zip(parts[::2], parts[1::2], strict=True)], dim)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "view": _view, "expand": _expand, "joined": _joined, "flatten": torch.flatten, "permute": torch.permute, "narrow": torch.narrow,
    "select": torch.select, "index_select": torch.index_select, "tile": torch.tile,
    "linear": F.linear, "matmul": torch.matmul, "conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d,
    "conv_transpose1d": F.conv_transpose1d, "conv_transpose2d": F.conv_transpose2d, "pad": F.pad,
    "batch_norm": F.batch_norm, "instance_norm": F.instance_norm, "layer_norm": F.layer_norm, "group_norm": F.group_norm, "rms_norm": F.rms_norm,
    "max_pool1d": F.max_pool1d, "max_pool2d": F.max_pool2d, "avg_pool1d": F.avg_pool1d, "avg_pool2d": F.avg_pool2d,
    "adaptive_avg_pool1d": F.adaptive_avg_pool1d, "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow, "maximum": torch.maximum, "minimum": torch.minimum,
    "where": torch.where, "eq": torch.eq, "lt": torch.lt, "gt": torch.gt, "le": torch.le, "ge": torch.ge,
    "logical_not": torch.logical_not, "logical_and": torch.logical_and, "logical_or": torch.logical_or,
    "to": lambda x, dtype: x.to(dtype),
    "relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "leaky_relu": F.leaky_relu, "prelu": F.prelu, "elu": F.elu, "selu": F.selu,
    "celu": F.celu, "softplus": F.softplus, "softsign": F.softsign, "hardsigmoid": F.hardsigmoid, "hardswish": F.hardswish, "gelu": F.gelu,
    "silu": F.silu, "mish": F.mish, "clamp": torch.clamp, "softmax": F.softmax, "log_softmax": F.log_softmax,
    "abs": torch.abs, "neg": torch.neg, "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "reciprocal": torch.reciprocal, "sin": torch.sin,
    "cos": torch.cos, "floor": torch.floor, "ceil": torch.ceil, "round": torch.round, "sign": torch.sign, "erf": torch.erf,
    "mean": torch.mean, "sum": torch.sum, "amax": torch.amax, "amin": torch.amin, "norm": torch.linalg.vector_norm,
}  # fmt: skip


def run(steps: Sequence[Step], x: Tensor, held: Callable[[str], Tensor], last: Sequence[int] | None = None) -> list[Tensor | None]:
    """The input and the result of every step. last: the last step that reads each value; the value is freed after it."""
    values: list[Tensor | None] = [x]

    def put(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return values[argument.index]
        if isinstance(argument, TensorRef):
            return held(argument.name)
        return tuple(put(part) for part in argument) if isinstance(argument, tuple) else argument

    for i, step in enumerate(steps):
        values.append(FUNCTIONS[step.function](*map(put, step.arguments), **{key: put(value) for key, value in step.options.items()}))
        if last is not None:
            for read in refs(step):
                if last[read] == i:
                    values[read] = None
    return values


def parts_of(step: Step) -> list[Any]:
    """The arguments of a step, with tuples expanded."""
    found: list[Any] = []
    for value in [*step.arguments, *step.options.values()]:
        found += value if isinstance(value, tuple) else [value]
    return found


def refs(step: Step) -> list[int]:
    """The indices of the values that a step reads."""
    return [part.index for part in parts_of(step) if isinstance(part, Ref)]


def is_vector(shape: Sequence[int]) -> bool:
    """Whether at most one dimension differs from 1."""
    return sum(n != 1 for n in shape) <= 1


def plain(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a row: the file's shape without a leading 1."""
    return tuple(shape[1:]) if len(shape) and shape[0] == 1 else tuple(shape)


class Builder:
    """Collects steps and the tensors that they read.

    dtype: of the network. named: whether the batch dimension of the input has a name in the file, so that any batch size is allowed there; then
    operations along that dimension would mix samples, and are refused.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, named: bool = False) -> None:
        self.dtype, self.named = dtype, named
        self.steps: list[Step] = []
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.layouts: list[tuple[int, ...]] = [plain(shape)]
        self.dtypes: list[torch.dtype] = [dtype]
        self.views: dict[tuple[int, tuple[int, ...]], Ref] = {}
        self.kept: dict[tuple[Any, ...], TensorRef] = {}
        if math.prod(shape) > LARGEST_VALUE:
            raise BadInput(f"expected values of at most {LARGEST_VALUE} numbers per sample, got an input {tuple(shape)}; use a smaller one")

    def input(self, shape: Sequence[int]) -> Value:
        value = Value(Ref(0), tuple(shape), plain(shape))
        # A vector stays a vector, whatever dimensions of size 1 it has in the file.
        if is_vector(shape) and len(value.layout) != 1:
            ref = self.as_rows(value, (math.prod(shape),))
            return Value(ref, tuple(shape), (math.prod(shape),))
        return value

    # ---- steps

    def step(self, node: Node, function: str, *arguments: Any, **options: Any) -> Ref:
        """Adds a step. Its shape is computed on the meta device, so that a file cannot request more memory than is allowed."""
        if len(self.steps) >= MOST_STEPS:
            raise node.refuse(f"the network has more than {MOST_STEPS} steps", "simplify it")

        def put(argument: Any) -> Any:
            if isinstance(argument, Ref):
                return torch.empty(3, *self.layouts[argument.index], dtype=self.dtypes[argument.index], device="meta")
            if isinstance(argument, TensorRef):
                return self.tensor(argument.name).to("meta")
            return tuple(put(part) for part in argument) if isinstance(argument, tuple) else argument

        try:
            made = FUNCTIONS[function](*map(put, arguments), **{key: put(value) for key, value in options.items()})
        except Exception as error:  # torch may raise anything for the arguments in a file
            reason = (str(error).splitlines() or [""])[0][:160]
            raise node.refuse(f"torch cannot run it with these arguments ({type(error).__name__}: {reason})", "correct the file") from None
        if made.dim() < 1 or made.shape[0] != 3 or made.dim() > LARGEST_RANK + 2:
            raise node.refuse(f"its result does not have one row per sample ({function} to {tuple(made.shape[1:])})")
        if made[0].numel() > LARGEST_VALUE or 0 in made.shape:
            raise node.refuse(f"its result has {made[0].numel()} numbers per sample, not 1 to {LARGEST_VALUE}", "use a smaller network")
        self.steps.append(Step(function, arguments, options))
        self.layouts.append(tuple(made.shape[1:]))
        self.dtypes.append(made.dtype)
        return Ref(len(self.steps))

    def value(self, node: Node, ref: Ref, shape: Sequence[int]) -> Value:
        """The result of a step, with its shape in the file. Raises BadInput if the batch dimension was lost."""
        layout = self.layouts[ref.index]
        if math.prod(shape) != math.prod(layout) or len(shape) > LARGEST_RANK:
            raise node.refuse(f"its result has shape {layout}, not {tuple(shape)}", "correct the file")
        return self.checked(node, Value(ref, tuple(shape), layout))

    def checked(self, node: Node, value: Value) -> Value:
        if self.named and (not value.shape or value.shape[0] != 1):
            raise node.refuse(
                f"its result for one sample has shape {value.shape}, whose first dimension is not the batch dimension, so that it may mix samples",
                "keep samples along the first dimension",
            )
        return value

    def as_rows(self, value: Value, shape: Sequence[int]) -> Ref:
        """The value as rows of that shape."""
        shape = tuple(shape)
        if value.layout == shape:
            return value.ref
        key = value.ref.index, shape
        if key not in self.views:
            node = Node("Reshape", "", [], ["a value"], {}, 1)
            if len(shape) == 1 and value.layout:
                self.views[key] = self.step(node, "flatten", value.ref, 1)
            else:
                self.views[key] = self.step(node, "view", value.ref, shape)
        return self.views[key]

    def rows(self, value: Value) -> tuple[Ref, int]:
        """(the value in the shape of the file, the offset from an axis of the file to a dimension of the tensor)."""
        return self.as_rows(value, plain(value.shape)), 0 if value.shape[:1] == (1,) else 1

    def same(self, node: Node, value: Value, function: str, *arguments: Any, **options: Any) -> Value:
        """An elementwise step, in the present layout of the value."""
        return self.value(node, self.step(node, function, value.ref, *arguments, **options), value.shape)

    # ---- tensors of the module

    def tensor(self, name: str) -> Tensor:
        return self.parameters[name] if name in self.parameters else self.buffers[name]

    def add_tensor(self, tensor: Tensor, name: str, *, weight: bool = False, key: tuple[Any, ...] = ()) -> TensorRef:
        """A constant as a parameter (weight) or buffer. key: what it was computed from; constants with equal keys are stored once."""
        if key and key in self.kept:
            return self.kept[key]
        stem = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)[:60].strip("_") or "constant"
        stem = f"_{stem}" if stem[0].isdigit() or hasattr(nn.Module, stem) or stem in _OWN else stem
        chosen, i = stem, 1
        while chosen in self.parameters or chosen in self.buffers:
            chosen, i = f"{stem}_{i}", i + 1
        (self.parameters if weight else self.buffers)[chosen] = tensor.detach().clone().contiguous()
        if key:
            self.kept[key] = TensorRef(chosen)
        return TensorRef(chosen)


def needed(steps: Sequence[Step], output: Ref) -> tuple[list[Step], Ref]:
    """The steps that the output depends on, renumbered."""
    wanted = {output.index}
    for i in range(len(steps), 0, -1):
        if i in wanted:
            wanted |= set(refs(steps[i - 1]))
    order = {0: 0}
    kept: list[Step] = []

    def renumbered(value: Any) -> Any:
        if isinstance(value, Ref):
            return Ref(order[value.index])
        return tuple(renumbered(part) for part in value) if isinstance(value, tuple) else value

    for i, step in enumerate(steps, 1):
        if i in wanted:
            options = {key: renumbered(value) for key, value in step.options.items()}
            kept.append(Step(step.function, tuple(renumbered(value) for value in step.arguments), options))
            order[i] = len(kept)
    return kept, Ref(order[output.index])
