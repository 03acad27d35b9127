"""What torch.export recorded of a module, as nodes that depend on the input; everything else is folded into constants.

Operations are not decomposed: a linear layer, a convolution, a normalisation stay whole, and the program that is recorded is the one that runs.
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

# More nodes than a model of this kind has.
LARGEST_PROGRAM = 50_000
# Operations whose result has memory of its own. Every other one is taken for one whose result may share memory with its arguments.
_FRESH = frozenset(
    "linear conv1d conv2d conv3d convolution batch_norm layer_norm group_norm instance_norm relu gelu silu tanh sigmoid elu celu selu leaky_relu "
    "prelu softplus hardtanh hardswish hardsigmoid relu6 mish log_sigmoid abs clamp clamp_min clamp_max neg add sub mul div rsub cat stack maximum "
    "minimum max min matmul bmm mm addmm scaled_dot_product_attention softmax log_softmax mean sum max_pool2d avg_pool2d adaptive_avg_pool2d "
    "embedding rsqrt sqrt pow sort clone".split()
)


@dataclass(frozen=True, eq=False)
class Node:
    """One operation on values that depend on the input.

    op: its name in torch ('conv2d', 'add'), '' for the input itself. arguments: by the names of torch's schema; a Node where the value depends on
    the input, a Tensor where it is a constant of the model, lists of those, or plain Python values. shape: without the dimension of the samples.
    path: where in the module it is called. dtype: of its value. target: the operation itself. merged: whether samples and the dimension behind them
    are one, as a view makes them for a matrix product; `shape` has that dimension by itself. stray: why the value is refused unless what reads it
    is understood as a whole (attention), '' where it has samples along its first dimension alone.
    """

    op: str
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    path: str
    name: str
    dtype: torch.dtype | None = None
    target: Any = None
    merged: bool = False
    stray: str = ""

    @property
    def inputs(self) -> list[Node]:
        """The arguments that depend on the input, in order, with repetitions."""
        return list(_nodes(self.arguments.values()))

    def where(self) -> str:
        """For messages: what it is and where."""
        return f"{self.op or 'the input'} of {self.path or 'the model itself'}"


def _nodes(values: Any) -> Iterator[Node]:
    for value in values:
        if isinstance(value, Node):
            yield value
        elif isinstance(value, list | tuple):
            yield from _nodes(value)


@dataclass
class Program:
    """input → output; every node between them. computes_weights: whether a matrix of the module, or what is computed of it, is read elsewhere than as
    the matrix of a layer."""

    input: Node
    output: Node
    nodes: list[Node]
    computes_weights: bool = False


def recorded(module: nn.Module, example: Tensor) -> Program:
    """The program that the module runs on inputs like `example` (N ≥ 2, …), for any number of samples.

    Raises UnsupportedLayer where torch.export cannot record one, where samples are mixed, where the module changes its own buffers, or where an
    operation in place writes over what is read again.
    """
    exported, twin = _export(module, example)
    signature = exported.graph_signature
    if signature.buffers_to_mutate:
        names = ", ".join(sorted(signature.buffers_to_mutate.values())[:3])
        raise UnsupportedLayer(
            f"expected a model that leaves its own weights and buffers as they are, got one that changes {names} in eval mode; {FREEZE}"
        )
    outputs = [spec for spec in signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    inputs = [spec for spec in signature.input_specs if spec.kind.name == "USER_INPUT"]
    if len(outputs) != 1 or len(inputs) != 1:
        raise UnsupportedLayer(
            f"expected a model from one tensor to one tensor, got {len(inputs)} inputs and {len(outputs)} outputs; wrap it in such a module"
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
    """Raises UnsupportedLayer for a value in which samples are not apart, for an operation on merged samples that may mix them, for another dtype.

    A node that reads merged samples has to treat each row by itself: an elementwise operation, a product with a matrix, a view.
    """
    dtype = program.output.dtype
    for node in program.nodes:
        if node.stray:
            raise UnsupportedLayer(node.stray)
        if node.dtype not in (None, dtype):
            raise UnsupportedLayer(f"expected a model that computes in one dtype, {dtype}, got {node.where()} in {node.dtype}; cast the model")
        if any(read.merged for read in node.inputs) and node.op not in _ROWWISE:
            raise UnsupportedLayer(
                f"expected samples along the first dimension alone, got {node.where()}, which reads samples and tokens in one dimension; "
                f"keep them apart"
            )
    if program.output.merged or program.input.stray:
        raise UnsupportedLayer(program.input.stray or "expected one row of outputs for each sample, got samples and tokens in one; keep them apart")


def needed(output: Node) -> list[Node]:
    """The nodes that the output depends on, inputs before what reads them, the program's input left out."""
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


def rewritten(program: Program, exchanged: Mapping[Node, Node] | None = None, change: Callable[[Node], Node] = lambda node: node) -> Program:
    """The program with other nodes, inputs first: for a node of `exchanged` the one there, then what `change` makes of it with its new arguments."""
    now: dict[Node, Node] = {program.input: program.input}

    def inside(value: Any) -> Any:
        if isinstance(value, Node):
            return now[value]
        return [inside(part) for part in value] if isinstance(value, list) else value

    for node in program.nodes:
        made = (exchanged or {}).get(node, node)
        now[node] = change(replace(made, arguments={name: inside(value) for name, value in made.arguments.items()}))
    output = now[program.output]
    return Program(program.input, output, needed(output), program.computes_weights)


def dominators(program: Program) -> dict[Node, Node]:
    """By node, its immediate dominator: the last value that every way from the input to it goes through (Cooper, Harvey & Kennedy 2001)."""
    order = {program.input: 0, **{node: i for i, node in enumerate(program.nodes, 1)}}
    above: dict[Node, Node] = {}
    for node in program.nodes:  # inputs come before what reads them, so one pass is enough
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


FREEZE = "freeze them: remove what iterates, e.g. by torch.nn.utils.parametrize.remove_parametrizations"
# Operations that may take the number of samples, in a shape.
_TAKES_SIZES = frozenset("view reshape _unsafe_view expand zeros ones new_zeros new_ones".split())
# Operations that give a sample's numbers another shape and keep their order.
VIEWS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze")
# What may read samples that are merged with the dimension behind them: each of these treats every row by itself.
_ROWWISE = frozenset((*VIEWS, "addmm", "mm", "linear", "relu", "gelu", "silu", "tanh", "sigmoid", "dropout", "to", "contiguous", "clone"))
# Where a matrix of the module is one that a threat on the weights moves as such.
_MATRIX_OF = ("linear", "embedding", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
# Operations on constants that repeat one row for every sample, whose results do so too, whatever the number of samples.
_REPEATS = frozenset(
    "zeros ones full new_zeros new_ones new_full zeros_like ones_like full_like expand expand_as repeat view reshape _unsafe_view unsqueeze squeeze "
    "permute transpose contiguous clone to _to_copy type_as alias detach lift_fresh_copy ne eq lt le gt ge add sub rsub mul div neg abs clamp "
    "clamp_min clamp_max where masked_fill bitwise_not logical_not bitwise_and logical_and bitwise_or logical_or __and__ __or__ embedding cos sin "
    "gather cat stack slice matmul bmm getitem unbind cumsum diff".split()
)
# What torch records of checks that it made itself: they compute nothing.
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size")
# Numbers of samples by which constants are computed that depend on that number.
TRIED = (2, 5)
# Numbers of samples that no other dimension of a model is likely to have, for programs that hold theirs as a plain number, one of them large.
_SIZES = (83, 1_009)


def _export(module: nn.Module, example: Tensor) -> tuple[torch.export.ExportedProgram, torch.export.ExportedProgram | None]:
    """(the program for any number of samples, None); or the programs for two numbers of samples, where the forward reads it as a plain number."""
    if len(example) < 2:
        raise BadInput(f"expected an example of two or more samples, so that their number can vary, got {len(example)}; repeat the sample")
    batch = torch.export.Dim("batch", min=1)
    try:
        module(example.clone())  # what is made at a first call (tables of positions, caches) is made of numbers, not by the tracer
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=False), None
            except Exception as error:
                guard = _guarded(str(error))
                if guard:
                    raise UnsupportedLayer(
                        f"expected a model that runs the same operations for any number of samples, got one that runs others unless {guard}; "
                        f"take out of its forward what depends on that number"
                    ) from error
                # Their numbers are not read.
                first, second = (torch.export.export(module, (example.new_empty(n, *example.shape[1:]),), strict=False) for n in _SIZES)
                return first, second
    except BadInput:
        raise
    except Exception as error:  # whatever a module of somebody else raises under a tracer
        raise UnsupportedLayer(
            f"expected a model that torch.export can record for any number of samples, got {type(error).__name__}: {first_line(error)[:300]}; "
            f"it can be attacked; to certify it, take out of its forward what depends on values or on the number of samples"
        ) from error


def _guarded(said: str) -> str:
    """What torch.export says that the program asks of the number of samples, other than to be more than one; '' for nothing."""
    guards = re.findall(r"satisfy the generated guard ([^\n]*)", said)
    plain = re.compile(r"[^<>=!]*(2 <= L\['x'\]\.size\(\)\[0\]|L\['x'\]\.size\(\)\[0\] != 1)\.?\s*")
    return next((guard for guard in guards if not plain.fullmatch(guard)), "")


def _name_of(node: fx.Node) -> str:
    """'conv2d' of aten.conv2d.default, 'library::conv2d' of an operation of the same name that is not torch's."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:
        return "getitem" if node.target is operator.getitem else f"python::{getattr(node.target, '__name__', node.target)}"
    space = str(node.target.namespace)  # type: ignore[union-attr]
    return packet.__name__ if space == "aten" else f"{space}::{packet.__name__}"


def _writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operation writes into, and the parts of those that are lists."""
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
    """Raises UnsupportedLayer where something that may share memory with what was written over is read afterwards."""
    shares: dict[fx.Node, set[fx.Node]] = {}  # values that may share memory with this one; one set for all of them
    stale: dict[fx.Node, fx.Node] = {}  # values that were written over, and by which operation
    for node in graph:
        for read in node.all_input_nodes:
            if read in stale:
                raise UnsupportedLayer(
                    f"expected operations in place on values that nobody reads again, got {_name_of(stale[read])} of {_path(stale[read])}, "
                    f"whose argument is read by {_name_of(node)} of {_path(node)}; run it out of place (inplace=False, y = y + x)"
                )
        written = _writes(node)
        if any(value.op == "placeholder" and value.name.startswith(("p_", "b_", "c_")) for old in written for value in shares[old]):
            raise UnsupportedLayer(
                f"expected a model that leaves its own weights and buffers as they are, got {_name_of(node)} of {_path(node)}, which writes into "
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
    """By node of the program for _SIZES[0] samples, its node of the one for _SIZES[1]. Raises UnsupportedLayer unless they differ in that alone."""

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
                f"take out of its forward what depends on that number"
            )
        pairs[a] = b
    if len(graph) != len(twin):
        raise UnsupportedLayer("expected the same operations for any number of samples, got more of them for some; keep samples apart")
    return pairs


class _Reader:
    """fx nodes → Nodes and constants."""

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
            # The module's own tensors, so that a change of its weights is one of the chain's.
            value = own.get(spec.target) if spec.target is not None else None
            value = exported.constants.get(spec.target) if value is None else value
            if not isinstance(value, Tensor):
                raise UnsupportedLayer(f"expected parameters, buffers and constant tensors, got {spec.target}; register it as a buffer")
            self.constants[spec.arg.name] = value
        self.batch: Any = None
        # The module's matrices, and the memory that each of them is in.
        self.matrices = {id(value): value for value in module.parameters() if value.dim() > 1 and value.numel()}
        self.memory = [_memory(value) for value in self.matrices.values()]
        # By identity, and kept so that no other tensor gets the same: constants that are made of the module's matrices.
        self.derived: set[int] = set()
        self.kept: list[Any] = []
        self.computes_weights = False

    def read(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if node.name == self.user:
                self.batch = node.meta["val"].shape[0]
                shape, merged, stray = self._shape(node, True)
                self.input = Node("", {}, shape, "", node.name, node.meta["val"].dtype, stray=stray or ("merged" if merged else ""))
                self.values[node] = self.input
            else:
                self.values[node] = self.constants[node.name]
        elif node.op == "output":
            self.output = self._argument(node.args[0][0])  # type: ignore[index]
        elif node.op == "get_attr":
            raise UnsupportedLayer(f"expected plain operations, got a branch on values ({node.target}); take it out of the forward")
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
        if name not in _TAKES_SIZES and any(isinstance(a, Many) for a in flat):
            raise UnsupportedLayer(f"expected the number of samples in shapes alone, got it in {name} of {path}; keep samples apart")
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
        """A number that is one of sizes: by the number of samples, or plain; None for any other value."""
        value = node.meta.get("val")
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, torch.SymInt) and isinstance(self.batch, torch.SymInt):
            size, batch = value.node.expr, self.batch.node.expr
            return Many({n: int(size.subs(batch, n)) for n in TRIED}, bool(size.is_polynomial(batch)))
        return None

    def _sizes(self, value: Any, twin: Any) -> Any:
        """The same with the number of samples named, where two programs hold two numbers."""
        if isinstance(value, list):
            return [self._sizes(*pair) for pair in zip(value, twin, strict=True)]
        times = _multiple(value, twin)
        return value if times is None else Many({n: times * n for n in TRIED})

    def _folded(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """What an operation makes of constants, by the number of samples where that counts, and whether a matrix of the module is among them."""
        flat = list(_flat([*args, *kwargs.values()]))
        read = [part for a in flat for part in (_flat(a.values.values()) if isinstance(a, Many) else [a]) if isinstance(part, Tensor)]
        if any(isinstance(a, Many) for a in flat):
            values = {n: node.target(*at(args, n), **{key: at(a, n) for key, a in kwargs.items()}) for n in TRIED}  # type: ignore[operator]
            made: Any = Many(values, _repeats(_name_of(node), args, kwargs))
            parts = [part for part in _flat(made.values.values()) if isinstance(part, Tensor)]
        else:
            made = node.target(*args, **kwargs)  # type: ignore[operator]
            parts = [part for part in _flat([made]) if isinstance(part, Tensor)]
        if any(self._of_matrix(a) for a in read):
            self.derived |= {id(part) for part in parts if id(part) not in self.matrices}  # contiguous() may give itself
        self.kept += parts
        return made

    def _of_matrix(self, value: Tensor) -> bool:
        """Whether a constant is a matrix of the module, shares memory with one, or is computed of one."""
        if id(value) in self.derived or id(value) in self.matrices:
            return True
        device, first, end = _memory(value)
        return any(device == where and first < stop and start < end for where, start, stop in self.memory)

    def _for_all(self, value: Any, node: fx.Node) -> Any:
        """A constant that an operation on samples reads: the same for every number of samples, or one row where all rows are the same."""
        if isinstance(value, list):
            return [self._for_all(part, node) for part in value]
        if not isinstance(value, Many) or (value.repeats and not all(isinstance(part, Tensor) for part in value.values.values())):
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
        shape, merged, stray = self._shape(node, name in _ROWWISE) if isinstance(node.meta["val"], Tensor) else ((), False, "")
        dtype = getattr(node.meta["val"], "dtype", None)
        name = name.removesuffix("_") if _writes(node) else name
        return Node(name, arguments, shape, path, node.name, dtype, node.target, merged, stray)

    def _shape(self, node: fx.Node, may_merge: bool) -> tuple[tuple[int, ...], bool, str]:
        """(the shape of a value without samples, whether they are merged with its first dimension, why it is refused)."""
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
            f"expected values with samples along their first dimension alone, got {_name_of(node)} of {_path(node)} with shape "
            f"{tuple(map(str, value.shape))}; an operation that moves or mixes samples cannot be certified"
        )  # fmt: skip


def _memory(value: Tensor) -> tuple[torch.device, int, int]:
    """(the device, the first byte and the one behind the last) of a tensor of numbers."""
    numbers = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    return value.device, value.data_ptr(), value.data_ptr() + numbers * value.element_size()


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


@dataclass(frozen=True, eq=False)
class Many:
    """A constant that depends on the number of samples: its values for those of `TRIED`.

    repeats: whether it is known to do the same for any other number: a polynomial, or a tensor that repeats what it holds.
    """

    values: dict[int, Any]
    repeats: bool = True


def at(value: Any, samples: int) -> Any:
    """A constant for so many samples."""
    if isinstance(value, list):
        return [at(part, samples) for part in value]
    return value.values[samples] if isinstance(value, Many) else value


def _repeats(name: str, args: list[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation on constants that depend on the number of samples makes one that repeats what it holds for any number of them."""
    flat = list(_flat([*args, *kwargs.values()]))
    first: Any = args[0] if args else None
    second: Any = args[1] if len(args) > 1 else None
    if name == "mul" and any(isinstance(a, int) and a == 0 for a in flat):
        return True
    if name == "index":  # of a table whose rows are the same: whichever row is taken
        rest = list(_flat([second[1:]]))
        return isinstance(first, Many) and first.repeats and _by_sample(first) and not any(isinstance(a, Many) and not a.repeats for a in rest)
    if name not in _REPEATS or any(isinstance(a, Many) and not a.repeats for a in flat):
        return False
    if name in ("full", "new_full", "full_like"):  # of a number that is not the one of samples
        return not any(isinstance(a, Many) for a in _flat([args[2 if name == "new_full" else 1 :], list(kwargs.values())]))
    dims = {"slice": (1, 0), "gather": (1, 0), "cat": (1, 0), "cumsum": (1, 0), "diff": (2, -1), "unbind": (1, 0)}
    if name in dims:  # along a dimension that the samples have no part in
        at_place, default = dims[name]
        dim = args[at_place] if len(args) > at_place else kwargs.get("dim", default)
        parts = first if name == "cat" else [first]
        fixed = isinstance(dim, int) and all(_fixed(part, dim) for part in parts)
        if name == "gather":
            return fixed and isinstance(first, Many)
        if name == "slice":  # of fixed places, or all of them
            whole = args[2:4] in ([], [0], [None], [0, None], [None, None], [0, 2**63 - 1]) and args[4:] in ([], [1])
            return whole or (fixed and not any(isinstance(a, Many) for a in args[1:]))
        return fixed
    if name in ("matmul", "bmm"):
        return _fixed(first, -1) and _fixed(second, -1) and (not isinstance(second, Many) or _fixed(second, -2))
    return True


def _by_sample(value: Many) -> bool:
    """Whether the first dimension of a constant, and no other, is of the number of samples."""
    shapes = {n: part.shape for n, part in value.values.items() if isinstance(part, Tensor)}
    return len({tuple(shape[1:]) for shape in shapes.values()}) == 1 and all(shape[:1] == (n,) for n, shape in shapes.items())


def _fixed(value: Any, dim: int) -> bool:
    """Whether a constant has one size along a dimension, whatever the number of samples."""
    if not isinstance(value, Many):
        return True
    shapes = [part.shape for part in value.values.values() if isinstance(part, Tensor)]
    return bool(shapes) and all(-len(shape) <= dim < len(shape) and shape[dim] == shapes[0][dim] for shape in shapes)


def _row(values: dict[int, Tensor]) -> Tensor | None:
    """What a constant is for any number of samples: itself, or its one row (1, …) where it repeats that; None where it is neither."""
    found = list(values.values())
    if all(torch.equal(part, found[0]) for part in found):
        return found[0]
    row = found[0][:1]
    repeated = all(part.dim() and len(part) == n and torch.equal(part, row.expand_as(part)) for n, part in values.items() if part.dim() == row.dim())
    return row if repeated and all(part.dim() == row.dim() for part in found) else None


def _multiple(a: Any, b: Any) -> int | None:
    """How many times the number of samples both numbers are, where two programs hold _SIZES; None for anything else."""
    if type(a) is not int or type(b) is not int or not a or a % _SIZES[0] or a // _SIZES[0] * _SIZES[1] != b:
        return None
    return a // _SIZES[0]


def _times(size: Any, batch: Any) -> int | None:
    """How many times the number of samples a size is, whatever that number is; None where it is something else."""
    if not (isinstance(size, torch.SymInt) and isinstance(batch, torch.SymInt)):
        return None
    quotient = size.node.expr / batch.node.expr
    return int(quotient) if quotient.is_Integer else None
