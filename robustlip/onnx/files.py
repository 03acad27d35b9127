"""Reads an ONNX file as data: nodes, constants, input and output. Files are not trusted: every size is checked before it is used; no code is run."""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlip.errors import BadInput, first_line
from robustlip.files import read_limited, unzipped
from robustlip.names import shown
from robustlip.onnx.wire import check_wire

LARGEST_FILE = 2**31 - 1  # bytes, the limit of protocol buffers
LARGEST_DATA = 2**33  # bytes of all tensors of a network, external data included
MOST_NODES = 20_000
LONGEST_NAME = 2**12
LARGEST_RANK = 8
# The newest supported opset; `operations` handles the changes in each.
OPSETS = (1, 28)

# For each TensorProto.DataType: numpy's dtype in the file, and the field with the numbers if raw_data is absent.
_DTYPES: dict[int, tuple[str, str]] = {
    1: ("<f4", "float_data"), 2: ("u1", "int32_data"), 3: ("i1", "int32_data"), 5: ("<i2", "int32_data"), 6: ("<i4", "int32_data"),
    7: ("<i8", "int64_data"), 9: ("?", "int32_data"), 10: ("<f2", "int32_data"), 11: ("<f8", "double_data"),
}  # fmt: skip
TORCH = {1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16,
         11: torch.float64}  # fmt: skip


@dataclass
class Node:
    """One operation of a graph. attributes: numbers, texts, tensors and lists of them. used_attributes: those that were read.

    opset: of the file; it determines the version of the operation.
    """

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    opset: int
    used_attributes: set[str] = field(default_factory=set)

    @property
    def where(self) -> str:
        """Name and place of the operation, for messages."""
        return f"{shown(self.op, 60)} (node {shown(self.name or '/'.join(self.outputs), 80)!r})"

    def refuse(self, why: str, remedy: str = "export the network without it") -> BadInput:
        return BadInput(f"expected supported ONNX operations, got {self.where}: {why}; {remedy}")

    def has(self, name: str) -> bool:
        return name in self.attributes

    def get(self, name: str, kind: type, default: Any) -> Any:
        """An attribute of that kind; list means a list of integers."""
        self.used_attributes.add(name)
        if name not in self.attributes:
            return default
        value = self.attributes[name]
        if kind is list:
            if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
                raise self.refuse(f"its attribute {name} is not a list of integers", "correct the file")
        elif not isinstance(value, kind) or isinstance(value, bool):
            raise self.refuse(f"its attribute {name} is {type(value).__name__}, not {kind.__name__}", "correct the file")
        return value

    def int(self, name: str, default: Any = None) -> Any:
        return self.get(name, int, default)

    def float(self, name: str, default: Any = None) -> Any:
        return self.get(name, float, default)

    def ints(self, name: str, default: Any = None) -> Any:
        return self.get(name, list, default)

    def text(self, name: str, default: str = "") -> str:
        return str(self.get(name, str, default))


@dataclass
class Graph:
    """input: the name of the input, its shape (None for a dimension with a name or without a size), and its dtype. constants: by name."""

    nodes: list[Node]
    constants: dict[str, Tensor]
    input: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    output: str


def read_graph(path: Path) -> Graph:
    """The graph of a .onnx or .onnx.gz file. Raises BadInput for any other content."""
    try:
        import onnx
    except ImportError:
        raise BadInput("expected the package onnx to read ONNX files, got none; pip install 'robustlip[onnx]'") from None
    data = _bytes_of(path)
    check_wire(data, path.name)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's implementations have no common base class of DecodeError
        raise BadInput(f"expected an ONNX file, got {path.name}, which does not parse ({first_line(error, 80)}); export the network again") from None
    del data
    return _Reader(path).graph(model)


def _bytes_of(path: Path) -> bytes:
    data = read_limited(path, "an ONNX file", LARGEST_FILE, "store its weights as external data")
    if path.suffix != ".gz":
        return data
    return unzipped(data, path.name, LARGEST_FILE)


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.left = LARGEST_DATA

    def bad(self, got: str, remedy: str = "export the network again") -> BadInput:
        return BadInput(f"expected an ONNX network, got {self.path.name} with {got}; {remedy}")

    def name(self, text: Any) -> str:
        if not isinstance(text, str):  # text that is not UTF-8 is bytes here
            raise self.bad("a name that is not text")
        if len(text) > LONGEST_NAME:
            raise self.bad(f"a name of {len(text)} characters", "use shorter names")
        return text

    def graph(self, model: Any) -> Graph:
        opset = self._opset(model)
        graph = model.graph
        if graph.sparse_initializer:
            raise self.bad("sparse weights", "write them as plain tensors")
        if len(graph.node) > MOST_NODES:
            raise self.bad(f"{len(graph.node)} nodes, more than {MOST_NODES}", "simplify the graph")
        if not graph.node:
            raise self.bad("no nodes", "export a network")
        constants: dict[str, Tensor] = {}
        for tensor in graph.initializer:
            if not self.name(tensor.name) or tensor.name in constants:
                raise self.bad(f"two tensors named {shown(tensor.name, 60)!r}, or one without a name")
            constants[tensor.name] = self.tensor(tensor)
        inputs = [value for value in graph.input if self.name(value.name) not in constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise self.bad(f"{len(inputs)} inputs and {len(graph.output)} outputs", "export a network of one each")
        shape, dtype = self._kind(inputs[0])
        nodes = [self._node(node, opset) for node in graph.node]
        return Graph(nodes, constants, self.name(inputs[0].name), shape, dtype, self.name(graph.output[0].name))

    def _opset(self, model: Any) -> int:
        found = [entry.version for entry in model.opset_import if self.name(entry.domain) in ("", "ai.onnx")]
        if len(found) > 1 or (not found and model.ir_version >= 3):
            raise self.bad(f"{len(found)} versions of ONNX's operations (opset_import)")
        opset = int(found[0]) if found else 1
        if not OPSETS[0] <= opset <= OPSETS[1]:
            raise self.bad(f"opset {opset}", f"export it with one of {OPSETS[0]} to {OPSETS[1]}")
        return opset

    def _kind(self, value: Any) -> tuple[tuple[int | None, ...], torch.dtype]:
        if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
            raise self.bad(f"an input {shown(value.name, 60)!r} without a shape", "export it with the shape of its input")
        kind = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        if not 1 <= len(dims) <= LARGEST_RANK or any(d is not None and not -1 <= d < 2**31 for d in dims):
            raise self.bad(f"an input of the shape {dims[:9]}")
        if kind.elem_type not in (1, 11):
            raise self.bad(f"an input of ONNX's type {kind.elem_type}", "export it in float32 or float64")
        return tuple(None if d in (None, 0, -1) else int(d) for d in dims), TORCH[kind.elem_type]

    def _node(self, node: Any, opset: int) -> Node:
        inputs, outputs = ([self.name(n) for n in names] for names in (node.input, node.output))
        found = Node(self.name(node.op_type), self.name(node.name), inputs, outputs, {}, opset)
        if self.name(node.domain) not in ("", "ai.onnx"):
            raise found.refuse(f"it belongs to the domain {shown(node.domain, 60)!r}, not to ONNX")
        if not found.outputs or not found.outputs[0]:
            raise found.refuse("it has no output", "correct the file")
        for attribute in node.attribute:
            if self.name(attribute.name) in found.attributes:
                raise found.refuse(f"its attribute {shown(attribute.name, 60)} occurs twice", "correct the file")
            found.attributes[attribute.name] = self._attribute(found, attribute)
        return found

    def _attribute(self, node: Node, attribute: Any) -> Any:
        kind, name = attribute.type, shown(attribute.name, 60)
        if kind == 0:  # the first versions of the format do not state it
            kinds = ((1, "f"), (2, "i"), (3, "s"), (4, "t"), (6, "floats"), (7, "ints"), (8, "strings"))
            kind = next((k for k, held in kinds if (attribute.HasField(held) if k < 5 else len(getattr(attribute, held)))), 7)
        if attribute.ref_attr_name or kind not in (1, 2, 3, 4, 6, 7, 8):
            what = "contains a graph (a branch or a loop)" if kind in (5, 10) else "has a type that is not supported"
            raise node.refuse(f"its attribute {name} {what}")
        if kind == 1:
            return float(attribute.f)
        if kind == 2:
            return int(attribute.i)
        if kind == 4:
            return self.tensor(attribute.t)
        if kind == 6:
            return [float(value) for value in attribute.floats]
        if kind == 7:
            return [int(value) for value in attribute.ints]
        texts = [attribute.s] if kind == 3 else list(attribute.strings)
        if any(len(text) > LONGEST_NAME for text in texts):
            raise node.refuse(f"its attribute {name} is a text of more than {LONGEST_NAME} bytes")
        texts = [text.decode("utf-8", "replace") for text in texts]
        return texts[0] if kind == 3 else texts

    def tensor(self, tensor: Any) -> Tensor:
        """The tensor, after a check that its dimensions, type and bytes agree."""
        name = shown(self.name(tensor.name), 60) or "a constant"
        if tensor.data_type not in _DTYPES:
            raise self.bad(f"{name!r} in ONNX's type {tensor.data_type}", "export it in float32 or float64")
        dims = [int(d) for d in tensor.dims]
        if len(dims) > LARGEST_RANK or any(d < 0 for d in dims):
            raise self.bad(f"{name!r} of the shape {dims[:9]}")
        kind, held = _DTYPES[tensor.data_type]
        dtype = np.dtype(kind)
        count = math.prod(dims)
        self.left -= count * dtype.itemsize
        if self.left < 0:
            raise self.bad(f"tensors with more than {LARGEST_DATA} bytes in total ({name!r} among them)", "use a smaller network")
        if tensor.HasField("segment"):
            raise self.bad(f"{name!r} in segments")
        if tensor.data_location == 1:
            raw = self._beside(tensor, name, count * dtype.itemsize)
        elif tensor.HasField("raw_data"):
            raw = tensor.raw_data
        else:
            values = getattr(tensor, held)
            if len(values) != count:
                raise self.bad(f"{name!r} of the shape {dims} with {len(values)} numbers")
            if tensor.data_type == 10:  # float16 numbers stored as integers
                array = np.array([value & 0xFFFF for value in values], dtype="<u2").view("<f2")
            else:
                array = np.array(values, dtype=np.int64 if held in ("int32_data", "int64_data") else dtype).astype(dtype)
            return torch.from_numpy(array.reshape(dims))
        if len(raw) != count * dtype.itemsize:
            raise self.bad(f"{name!r} of the shape {dims} with {len(raw)} bytes")
        if dtype == np.dtype("?"):
            return torch.from_numpy(np.asarray(np.frombuffer(raw, dtype="u1").reshape(dims) != 0))
        return torch.from_numpy(np.frombuffer(raw, dtype=dtype).reshape(dims).copy())

    def _beside(self, tensor: Any, name: str, size: int) -> bytes:
        """The bytes of a tensor stored as external data: in a regular file in the folder of the network."""
        external = {self.name(entry.key): self.name(entry.value) for entry in tensor.external_data}
        location = external.get("location", "")
        plain = bool(location) and location not in (".", "..") and len(location) < 256 and not set(location) & set("/\\:\0")
        file = self.path.parent / location if plain else self.path
        try:
            offset, length = (int(external.get(key) or default) for key, default in (("offset", 0), ("length", size)))
        except ValueError:
            offset = length = -1
        if not plain or offset < 0 or length != size:
            raise self.bad(
                f"{name!r} in {shown(location, 80)!r} (offset {shown(external.get('offset', '0'), 30)}, "
                f"length {shown(external.get('length', ''), 30)}), not {size} bytes of a file in its folder", "store the weights in the file itself"
            )  # fmt: skip
        try:
            # Neither a link, whose target could be anywhere, nor a pipe, which may never end.
            handle = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            with os.fdopen(handle, "rb") as stream:
                info = os.fstat(stream.fileno())
                if not stat.S_ISREG(info.st_mode) or file.is_symlink() or offset + length > info.st_size:
                    raise OSError("not a regular file of that size")
                stream.seek(offset)
                raw = stream.read(length)
        except (OSError, ValueError, OverflowError) as error:
            why = first_line(error, 60)
            raise self.bad(f"{name!r} in {shown(location, 80)!r}, which is not a regular file in its folder with those bytes ({why})") from None
        return raw
