"""The program that torch.export recorded for a module, as nodes that depend on the input. Everything else is folded into constants.

Operations are not decomposed: linear layers, convolutions and normalisations stay single nodes, so the recorded program is the one that runs.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from robustlip.errors import BadInput, UnsupportedLayer, first_line

# An upper limit of the number of operations, above that of any supported model.
LARGEST_PROGRAM = 50_000
# Operations whose result has its own memory. The result of any other operation is assumed to share memory with its arguments.
_FRESH = frozenset(
    "linear conv1d conv2d conv3d convolution batch_norm layer_norm group_norm instance_norm relu gelu silu tanh sigmoid elu celu selu leaky_relu "
    "prelu softplus hardtanh hardswish hardsigmoid relu6 mish log_sigmoid abs clamp clamp_min clamp_max neg add sub mul div rsub cat stack maximum "
    "minimum max min matmul bmm mm addmm scaled_dot_product_attention softmax log_softmax mean sum max_pool2d avg_pool2d adaptive_avg_pool2d "
    "embedding rsqrt sqrt pow sort clone".split()
)


@dataclass(frozen=True, eq=False)
class Node:
    """One operation on values that depend on the input.

    op: the operation's name in torch ('conv2d', 'add'), '' for the input. arguments: by their names in torch's schema. An argument is a Node if it
    depends on the input, a Tensor if it is a constant of the model, a list of those, or a plain Python value. shape: without the batch dimension.
    path: the submodule that calls it. dtype: of the result. target: the operation. merged: whether the batch dimension and the next one are merged
    into one, as a view does for a matrix product; `shape` contains the next dimension separately. refusal: '' if the first dimension is the batch
    dimension and no other one is; otherwise the error message, which applies unless the nodes around it are recognised together as attention.
    """

    op: str
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    path: str
    name: str
    dtype: torch.dtype | None = None
    target: Any = None
    merged: bool = False
    refusal: str = ""

    @property
    def inputs(self) -> list[Node]:
        """The arguments that depend on the input, in order, with repetitions."""
        return list(_nodes(self.arguments.values()))

    def where(self) -> str:
        """Name and place of the operation, for messages."""
        return f"{self.op or 'the input'} of {self.path or 'the model itself'}"


def _nodes(values: Any) -> Iterator[Node]:
    for value in values:
        if isinstance(value, Node):
            yield value
        elif isinstance(value, list | tuple):
            yield from _nodes(value)


@dataclass
class Program:
    """The nodes from input to output. computes_weights: whether a matrix of the module, or a value computed from one, is used other than as the
    matrix of a layer."""

    input: Node
    output: Node
    nodes: list[Node]
    computes_weights: bool = False


def recorded(module: nn.Module, example: Tensor) -> Program:
    """The program that the module runs on inputs like `example` (N ≥ 2, …), for any number of samples N.

    Raises UnsupportedLayer if torch.export cannot record the module, if it mixes samples, if it changes its own buffers, or if an in-place operation
    overwrites a value that is read again.
    """
    exported, twin = _export(module, example)
    signature = exported.graph_signature
    if signature.buffers_to_mutate:
        names = ", ".join(sorted(signature.buffers_to_mutate.values())[:3])
        raise UnsupportedLayer(
            f"expected a model that does not change its own weights and buffers, got one that changes {names} in eval mode; {FREEZE}"
        )
    outputs = [spec for spec in signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    inputs = [spec for spec in signature.input_specs if spec.kind.name == "USER_INPUT"]
    if len(outputs) != 1 or len(inputs) != 1:
        raise UnsupportedLayer(
            f"expected a model from one tensor to one tensor, got {len(inputs)} inputs and {len(outputs)} outputs; wrap it in one"
        )
    graph = list(exported.graph_module.graph.nodes)
    twins = dict.fromkeys(graph) if twin is None else _paired(graph, list(twin.graph_module.graph.nodes))
    if len(graph) > LARGEST_PROGRAM:
        raise UnsupportedLayer(f"expected a program of at most {LARGEST_PROGRAM} operations, got {len(graph)}; use a smaller model")
    _check_in_place(graph)
    reader = _Reader(exported, module, inputs[0].arg.name, twins)
    with torch.no_grad():
        for node in graph:
            reader.read(node)
    assert reader.input is not None
    if not isinstance(reader.output, Node):
        raise UnsupportedLayer("expected a model whose output depends on its input, got a constant; check its forward")
    return Program(reader.input, reader.output, needed(reader.output), reader.computes_weights)


def check_apart(program: Program) -> None:
    """Check that every value has one batch dimension and one dtype, and that no operation on merged dimensions can mix samples.

    A node that reads a value with merged dimensions has to treat every row separately: an elementwise operation, a product with a matrix, a view.
    Raises UnsupportedLayer otherwise.
    """
    dtype = program.output.dtype
    for node in program.nodes:
        if node.refusal:
            raise UnsupportedLayer(node.refusal)
        if node.dtype not in (None, dtype):
            raise UnsupportedLayer(f"expected a model that computes in one dtype, {dtype}, got {node.where()} in {node.dtype}; cast the model")
        if any(read.merged for read in node.inputs) and node.op not in _ROWWISE:
            raise UnsupportedLayer(
                f"expected operations on separate samples, got {node.where()}, which reads samples and tokens merged into one dimension; "
                f"keep them separate"
            )
    if program.output.merged or program.input.refusal:
        raise UnsupportedLayer(program.input.refusal or "expected one row of outputs per sample, got samples and tokens merged; keep them separate")


def needed(output: Node) -> list[Node]:
    """The nodes that the output depends on, in topological order, without the program's input."""
    found: dict[Node, None] = {}
    stack = [(output, False)]
    while stack:
        node, done = stack.pop()
        if node in found or not node.op:
            continue
        if done:
            found[node] = None
        else:
            stack.append((node, True))
            stack += [(read, False) for read in reversed(node.inputs)]
    return list(found)


def rewritten(program: Program, replaced: Mapping[Node, Node] | None = None, change: Callable[[Node], Node] = lambda node: node) -> Program:
    """The program rebuilt in topological order: each node is replaced by its entry in `replaced`, if any, and then by `change` of the result."""
    now: dict[Node, Node] = {program.input: program.input}

    def inside(value: Any) -> Any:
        if isinstance(value, Node):
            return now[value]
        return [inside(part) for part in value] if isinstance(value, list) else value

    for node in program.nodes:
        made = (replaced or {}).get(node, node)
        now[node] = change(replace(made, arguments={name: inside(value) for name, value in made.arguments.items()}))
    output = now[program.output]
    return Program(program.input, output, needed(output), program.computes_weights)


def dominators(program: Program) -> dict[Node, Node]:
    """The immediate dominator of each node: the last value on every path from the input to the node (Cooper, Harvey & Kennedy 2001)."""
    order = {program.input: 0, **{node: i for i, node in enumerate(program.nodes, 1)}}
    above: dict[Node, Node] = {}
    for node in program.nodes:  # topological order, so one pass is enough
        common: Node | None = None
        for read in dict.fromkeys(node.inputs):
            other = read
            while common is not None and common is not other:
                if order[common] > order[other]:
                    common = above[common]
                else:
                    other = above[other]
            common = other
        assert common is not None
        above[node] = common
    return above


FREEZE = "freeze them: remove the parametrization that iterates, e.g. by torch.nn.utils.parametrize.remove_parametrizations"
# Operations that may take the batch size as part of a shape.
_TAKES_SIZES = frozenset("view reshape _unsafe_view expand zeros ones new_zeros new_ones".split())
# Operations that change the shape of a sample and keep the order of its numbers.
VIEWS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze")
# Operations that may read merged dimensions: each of these treats every row separately.
_ROWWISE = frozenset((*VIEWS, "addmm", "mm", "linear", "relu", "gelu", "silu", "tanh", "sigmoid", "dropout", "to", "contiguous", "clone"))
# Arguments that are matrices of the module and are changed by a threat on weights.
_MATRIX_OF = ("linear", "embedding", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
# If the arguments of these operations repeat one row for every sample, the result does too, for every batch size.
_REPEATS = frozenset(
    "zeros ones full new_zeros new_ones new_full zeros_like ones_like full_like expand expand_as repeat view reshape _unsafe_view unsqueeze squeeze "
    "permute transpose contiguous clone to _to_copy type_as alias detach lift_fresh_copy ne eq lt le gt ge add sub rsub mul div neg abs clamp "
    "clamp_min clamp_max where masked_fill bitwise_not logical_not bitwise_and logical_and bitwise_or logical_or __and__ __or__ embedding cos sin "
    "gather cat stack slice matmul bmm getitem unbind cumsum diff".split()
)
# Checks that torch.export inserts; they compute nothing.
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size")
# Batch sizes for which constants that depend on the batch size are computed.
TRIED = (2, 5)
# Batch sizes that are unlikely to be another dimension of a model, for programs that contain theirs as a plain number. One of them is large.
_SIZES = (83, 1_009)


def _export(module: nn.Module, example: Tensor) -> tuple[torch.export.ExportedProgram, torch.export.ExportedProgram | None]:
    """(the program for any batch size, None); or the programs for two batch sizes, if the forward reads the batch size as a plain number."""
    if len(example) < 2:
        raise BadInput(f"expected an example of two or more samples, so that their number can vary, got {len(example)}; repeat the sample")
    batch = torch.export.Dim("batch", min=1)
    try:
        module(example.clone())  # caches (tables of positions) that the first call fills get real values, not those of the tracer
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=False), None
            except Exception as error:
                guard = _guarded(str(error))
                if guard:
                    raise UnsupportedLayer(
                        f"expected a model that runs the same operations for any number of samples, got one that runs others unless {guard}; "
                        f"remove the dependence on that number from its forward"
                    ) from error
                # Only the shape of this example matters.
                first, second = (torch.export.export(module, (example.new_empty(n, *example.shape[1:]),), strict=False) for n in _SIZES)
                return first, second
    except BadInput:
        raise
    except Exception as error:  # a user's module may raise anything under the tracer
        raise UnsupportedLayer(
            f"expected a model that torch.export can record for any number of samples, got {type(error).__name__}: {first_line(error)[:300]}; "
            f"it can be attacked; to certify it, remove from its forward what depends on values or on the number of samples"
        ) from error


def _guarded(message: str) -> str:
    """The condition on the batch size that torch.export reports, other than that it exceeds 1; '' if there is none."""
    guards = re.findall(r"satisfy the generated guard ([^\n]*)", message)
    plain = re.compile(r"[^<>=!]*(2 <= L\['x'\]\.size\(\)\[0\]|L\['x'\]\.size\(\)\[0\] != 1)\.?\s*")
    return next((guard for guard in guards if not plain.fullmatch(guard)), "")


def _name_of(node: fx.Node) -> str:
    """'conv2d' for aten.conv2d.default, 'library::conv2d' for an operation of that name from another library."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:
        return "getitem" if node.target is operator.getitem else f"python::{getattr(node.target, '__name__', node.target)}"
    space = str(node.target.namespace)  # type: ignore[union-attr]
    return packet.__name__ if space == "aten" else f"{space}::{packet.__name__}"


def _writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operation writes into; list arguments are expanded."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    found = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            found += [part for part in (value if isinstance(value, list | tuple) else [value]) if isinstance(part, fx.Node)]
    return found


def _check_in_place(graph: list[fx.Node]) -> None:
    """Raises UnsupportedLayer if a value is read after an in-place operation may have overwritten it."""
    shares: dict[fx.Node, set[fx.Node]] = {}  # values that may share memory with the key; one common set for all of them
    stale: dict[fx.Node, fx.Node] = {}  # overwritten values, and the operation that did it
    for node in graph:
        for read in node.all_input_nodes:
            if read in stale:
                raise UnsupportedLayer(
                    f"expected in-place operations on values that are not read again, got {_name_of(stale[read])} of {_path(stale[read])}, "
                    f"whose argument is read by {_name_of(node)} of {_path(node)}; run it out of place (inplace=False, y = y + x)"
                )
        written = _writes(node)
        if any(value.op == "placeholder" and value.name.startswith(("p_", "b_", "c_")) for old in written for value in shares[old]):
            raise UnsupportedLayer(
                f"expected a model that does not change its own weights and buffers, got {_name_of(node)} of {_path(node)}, which writes into "
                f"them; {FREEZE}"
            )
        group = {node}
        fresh = node.op == "placeholder" or (_name_of(node) in _FRESH and not written)
        if not fresh:
            for read in node.all_input_nodes:
                group |= shares[read]
        for old in written:
            for value in shares[old]:
                stale[value] = node
        for value in group:
            shares[value] = group


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path.removeprefix("module.") for path, _ in stack.values() if path not in ("", "module") and path[0] != "_"]
    return paths[-1] if paths else "the model itself"


def _paired(graph: list[fx.Node], twin: list[fx.Node]) -> dict[fx.Node, fx.Node | None]:
    """Each node of the program for _SIZES[0] samples, with its node for _SIZES[1]. Raises UnsupportedLayer if they differ in more than the size."""

    def same(a: Any, b: Any, shapes: bool) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return pairs.get(a) is b
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):
            return len(a) == len(b) and all(same(*both, shapes) for both in zip(a, b, strict=True))
        return type(a) is type(b) and (a == b or (shapes and _multiple(a, b) is not None))

    pairs: dict[fx.Node, fx.Node | None] = {}
    for a, b in zip(graph, twin, strict=False):
        alike = a.op == b.op and a.target == b.target and a.kwargs.keys() == b.kwargs.keys()
        shapes = _name_of(a) in _TAKES_SIZES
        if not (alike and same(a.args, b.args, shapes) and all(same(a.kwargs[key], b.kwargs[key], shapes) for key in a.kwargs)):
            raise UnsupportedLayer(
                f"expected a model that runs the same operations for any number of samples, got {_name_of(a)} of {_path(a)}, which depends on it; "
                f"remove the dependence on that number from its forward"
            )
        pairs[a] = b
    if len(graph) != len(twin):
        raise UnsupportedLayer("expected the same operations for any number of samples, got more operations for some; keep samples separate")
    return pairs


class _Reader:
    """Converts fx nodes to Nodes and constants."""

    def __init__(self, exported: torch.export.ExportedProgram, module: nn.Module, user: str, twins: dict[fx.Node, fx.Node | None]) -> None:
        self.twins = twins
        self.values: dict[fx.Node, Any] = {}
        self.user = user
        self.input: Node | None = None
        self.output: Any = None
        self.constants: dict[str, Tensor] = {}
        own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
        for spec in exported.graph_signature.input_specs:
            if spec.kind.name == "USER_INPUT":
                continue
            # The module's own tensors, so that a change of its weights changes the Chain too.
            value = own.get(spec.target) if spec.target is not None else None
            value = exported.constants.get(spec.target) if value is None else value
            if not isinstance(value, Tensor):
                raise UnsupportedLayer(f"expected parameters, buffers and constant tensors, got {spec.target}; register it as a buffer")
            self.constants[spec.arg.name] = value
        self.batch: Any = None
        # The module's matrices, and the memory range of each.
        self.matrices = {id(value): value for value in module.parameters() if value.dim() > 1 and value.numel()}
        self.memory = [_memory(value) for value in self.matrices.values()]
        # Constants computed from the module's matrices, by id; the tensors are kept alive so that no other tensor gets the same id.
        self.derived: set[int] = set()
        self.kept: list[Any] = []
        self.computes_weights = False

    def read(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if node.name == self.user:
                self.batch = node.meta["val"].shape[0]
                shape, merged, refusal = self._shape(node, True)
                self.input = Node("", {}, shape, "", node.name, node.meta["val"].dtype, refusal=refusal or ("merged" if merged else ""))
                self.values[node] = self.input
            else:
                self.values[node] = self.constants[node.name]
        elif node.op == "output":
            self.output = self._argument(node.args[0][0])  # type: ignore[index]
        elif node.op == "get_attr":
            raise UnsupportedLayer(f"expected plain operations, got a branch that depends on values ({node.target}); remove it from the forward")
        elif _name_of(node) not in _CHECKS:
            self.values[node] = self._call(node)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.values[value]
        if isinstance(value, list | tuple):
            return [self._argument(part) for part in value]
        return value

    def _call(self, node: fx.Node) -> Any:
        size = self._size(node)
        if size is not None:
            return size
        args = [self._argument(value) for value in node.args]
        kwargs = {key: self._argument(value) for key, value in node.kwargs.items()}
        name, path = _name_of(node), _path(node)
        if self.twins[node] is not None and name in _TAKES_SIZES:
            args = [self._sizes(*pair) for pair in zip(args, self.twins[node].args, strict=True)]  # type: ignore[union-attr]
        if not list(_nodes([*args, *kwargs.values()])):
            return self._folded(node, args, kwargs)
        args = [self._for_all(a, node) for a in args]
        kwargs = {key: self._for_all(a, node) for key, a in kwargs.items()}
        flat = list(_flat([*args, *kwargs.values()]))
        if name not in _TAKES_SIZES and any(isinstance(a, PerBatchSize) and not (a.counts and name == "index") for a in flat):
            raise UnsupportedLayer(f"expected the number of samples in shapes only, got it in {name} of {path}; keep samples separate")
        if node.target is operator.getitem:
            arguments: dict[str, Any] = {"self": args[0], "index": args[1]}
        else:
            schema = node.target._schema.arguments  # type: ignore[union-attr]
            arguments = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
            for argument in schema:
                if argument.name not in arguments:
                    arguments[argument.name] = argument.default_value
        for key, value in arguments.items():
            plain = name in _MATRIX_OF and key == "weight" and id(value) in self.matrices
            if not plain and any(isinstance(part, Tensor) and self._of_matrix(part) for part in _flat([value])):
                self.computes_weights = True
        return self._node(node, name, arguments, path)

    def _size(self, node: fx.Node) -> Any:
        """A number computed from sizes: PerBatchSize or a plain number; None for any other value."""
        value = node.meta.get("val")
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, torch.SymInt) and isinstance(self.batch, torch.SymInt):
            size, batch = value.node.expr, self.batch.node.expr
            return PerBatchSize({n: int(size.subs(batch, n)) for n in TRIED}, bool(size.is_polynomial(batch)))
        return None

    def _sizes(self, value: Any, twin: Any) -> Any:
        """The same value with the batch size made explicit, if two programs contain two sizes."""
        if isinstance(value, list):
            return [self._sizes(*pair) for pair in zip(value, twin, strict=True)]
        times = _multiple(value, twin)
        return value if times is None else PerBatchSize({n: times * n for n in TRIED})

    def _folded(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The result of an operation on constants, per batch size if it depends on that; records whether a matrix of the module is among them."""
        flat = list(_flat([*args, *kwargs.values()]))
        read = [part for a in flat for part in (_flat(a.values.values()) if isinstance(a, PerBatchSize) else [a]) if isinstance(part, Tensor)]
        if any(isinstance(a, PerBatchSize) for a in flat):
            values = {n: node.target(*at(args, n), **{key: at(a, n) for key, a in kwargs.items()}) for n in TRIED}  # type: ignore[operator]
            made: Any = PerBatchSize(values, _repeats(_name_of(node), args, kwargs), _counts(node, args))
            parts = [part for part in _flat(made.values.values()) if isinstance(part, Tensor)]
        else:
            made = node.target(*args, **kwargs)  # type: ignore[operator]
            parts = [part for part in _flat([made]) if isinstance(part, Tensor)]
        if any(self._of_matrix(a) for a in read):
            self.derived |= {id(part) for part in parts if id(part) not in self.matrices}  # contiguous() may return its argument
        self.kept += parts
        return made

    def _of_matrix(self, value: Tensor) -> bool:
        """Whether a constant is a matrix of the module, shares memory with one, or was computed from one."""
        if id(value) in self.derived or id(value) in self.matrices:
            return True
        device, first, end = _memory(value)
        return any(device == where and first < stop and start < end for where, start, stop in self.memory)

    def _for_all(self, value: Any, node: fx.Node) -> Any:
        """A constant that an operation on samples reads: equal for every batch size, or one row if all rows are equal. Otherwise UnsupportedLayer."""
        if isinstance(value, list):
            return [self._for_all(part, node) for part in value]
        if not isinstance(value, PerBatchSize) or (value.repeats and not all(isinstance(part, Tensor) for part in value.values.values())):
            return value
        if value.counts and _name_of(node) == "index":  # a choice in each sample (`robustlip.graph.tokens`)
            return value
        row = _row(value.values) if value.repeats else None
        if row is None:
            raise UnsupportedLayer(
                f"expected constants that are the same for every sample, got {_name_of(node)} of {_path(node)}; register them as buffers"
            )
        if any(id(part) in self.derived for part in value.values.values()):
            self.derived.add(id(row))
        self.kept.append(row)
        return row

    def _node(self, node: fx.Node, name: str, arguments: dict[str, Any], path: str) -> Node:
        shape, merged, refusal = self._shape(node, name in _ROWWISE) if isinstance(node.meta["val"], Tensor) else ((), False, "")
        dtype = getattr(node.meta["val"], "dtype", None)
        name = name.removesuffix("_") if _writes(node) else name
        return Node(name, arguments, shape, path, node.name, dtype, node.target, merged, refusal)

    def _shape(self, node: fx.Node, may_merge: bool) -> tuple[tuple[int, ...], bool, str]:
        """(the shape of a value without the batch dimension, whether that is merged with the next one, the error message or '')."""
        value, twin = node.meta["val"], self.twins[node]
        first = value.shape[0] if value.dim() else None
        rest = value.shape[1:]
        if twin is None:
            times = _times(first, self.batch)
            apart = times is not None and all(isinstance(n, int) for n in rest)
        else:
            other = twin.meta["val"].shape
            times = _multiple(first, other[0]) if other else None
            apart = bool(times) and rest == other[1:]
        if apart and (times == 1 or may_merge):
            assert times is not None
            return (tuple(int(n) for n in rest), False, "") if times == 1 else ((times, *(int(n) for n in rest)), True, "")
        return (), False, (
            f"expected values whose first dimension is the number of samples, and no other, got {_name_of(node)} of {_path(node)} with shape "
            f"{tuple(map(str, value.shape))}; an operation that moves or mixes samples cannot be certified"
        )  # fmt: skip


def _memory(value: Tensor) -> tuple[torch.device, int, int]:
    """(the device, the address of the first byte, the address after the last byte) of a tensor."""
    numbers = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    return value.device, value.data_ptr(), value.data_ptr() + numbers * value.element_size()


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


@dataclass(frozen=True, eq=False)
class PerBatchSize:
    """A constant that depends on the batch size: its values for the batch sizes `TRIED`.

    repeats: whether it is proved to follow the same pattern for every batch size: a polynomial in the size, or a tensor that repeats its rows.
    counts: whether it is 0, 1, …, N − 1 for every batch size N.
    """

    values: dict[int, Any]
    repeats: bool = True
    counts: bool = False


def at(value: Any, samples: int) -> Any:
    """The value of a constant for a batch size."""
    if isinstance(value, list):
        return [at(part, samples) for part in value]
    return value.values[samples] if isinstance(value, PerBatchSize) else value


def _counts(node: fx.Node, args: list[Any]) -> bool:
    """Whether an operation is arange(N), or arange(0, N) with step 1, for the batch size N."""
    if _name_of(node) != "arange" or not 1 <= len(args) <= 2 or (len(args) == 2 and args[0] != 0):
        return False
    size = args[-1]
    return isinstance(size, PerBatchSize) and size.repeats and all(value == n for n, value in size.values.items())


def _repeats(name: str, args: list[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation on constants that repeat their rows for every batch size gives a constant that does so too."""
    flat = list(_flat([*args, *kwargs.values()]))
    first: Any = args[0] if args else None
    second: Any = args[1] if len(args) > 1 else None
    if name == "mul" and any(isinstance(a, int) and a == 0 for a in flat):
        return True
    if name == "index":  # of a table with equal rows: the index does not matter
        rest = list(_flat([second[1:]]))
        repeats = not any(isinstance(a, PerBatchSize) and not a.repeats for a in rest)
        return isinstance(first, PerBatchSize) and first.repeats and _by_sample(first) and repeats
    if name not in _REPEATS or any(isinstance(a, PerBatchSize) and not a.repeats for a in flat):
        return False
    if name in ("full", "new_full", "full_like"):  # filled with a number that does not depend on the batch size
        return not any(isinstance(a, PerBatchSize) for a in _flat([args[2 if name == "new_full" else 1 :], list(kwargs.values())]))
    dims = {"slice": (1, 0), "gather": (1, 0), "cat": (1, 0), "cumsum": (1, 0), "diff": (2, -1), "unbind": (1, 0)}
    if name in dims:  # along a dimension that is not the batch dimension
        at_place, default = dims[name]
        dim = args[at_place] if len(args) > at_place else kwargs.get("dim", default)
        parts = first if name == "cat" else [first]
        fixed = isinstance(dim, int) and all(_fixed(part, dim) for part in parts)
        if name == "gather":
            return fixed and isinstance(first, PerBatchSize)
        if name == "slice":  # with fixed bounds, or of everything
            whole = args[2:4] in ([], [0], [None], [0, None], [None, None], [0, 2**63 - 1]) and args[4:] in ([], [1])
            return whole or (fixed and not any(isinstance(a, PerBatchSize) for a in args[1:]))
        return fixed
    if name in ("matmul", "bmm"):
        return _fixed(first, -1) and _fixed(second, -1) and (not isinstance(second, PerBatchSize) or _fixed(second, -2))
    return True


def _by_sample(value: PerBatchSize) -> bool:
    """Whether the first dimension of a constant, and no other, is the batch size."""
    shapes = {n: part.shape for n, part in value.values.items() if isinstance(part, Tensor)}
    return len({tuple(shape[1:]) for shape in shapes.values()}) == 1 and all(shape[:1] == (n,) for n, shape in shapes.items())


def _fixed(value: Any, dim: int) -> bool:
    """Whether the size of a constant along a dimension does not depend on the batch size."""
    if not isinstance(value, PerBatchSize):
        return True
    shapes = [part.shape for part in value.values.values() if isinstance(part, Tensor)]
    return bool(shapes) and all(-len(shape) <= dim < len(shape) and shape[dim] == shapes[0][dim] for shape in shapes)


def _row(values: dict[int, Tensor]) -> Tensor | None:
    """The constant for every batch size: itself, or its one row (1, …) if it repeats that row; None if neither."""
    found = list(values.values())
    if all(torch.equal(part, found[0]) for part in found):
        return found[0]
    row = found[0][:1]
    repeated = all(part.dim() and len(part) == n and torch.equal(part, row.expand_as(part)) for n, part in values.items() if part.dim() == row.dim())
    return row if repeated and all(part.dim() == row.dim() for part in found) else None


def _multiple(a: Any, b: Any) -> int | None:
    """The factor k if both numbers are k times the batch sizes _SIZES; None otherwise."""
    if type(a) is not int or type(b) is not int or not a or a % _SIZES[0] or a // _SIZES[0] * _SIZES[1] != b:
        return None
    return a // _SIZES[0]


def _times(size: Any, batch: Any) -> int | None:
    """The factor k if a size is k times the batch size for every batch size; None otherwise."""
    if not (isinstance(size, torch.SymInt) and isinstance(batch, torch.SymInt)):
        return None
    quotient = size.node.expr / batch.node.expr
    return int(quotient) if quotient.is_Integer else None
