"""Small ONNX files for tests, made with onnx.helper."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

CONSTANTS = np.random.RandomState(0)


def made(nodes: list[tuple[Any, ...]], shape: list[Any], constants: dict[str, Any] | None = None, *, opset: int = 13) -> Any:
    """A model of nodes (op, inputs, outputs, attributes): from 'x' of that shape to the last node's first output."""
    from onnx import TensorProto, helper, numpy_helper

    protos = [helper.make_node(op, ins.split(), outs.split(), **(rest[0] if rest else {})) for op, ins, outs, *rest in nodes]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(
        protos, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1][2].split()[0], TensorProto.FLOAT, None)], weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def normal(*shape: int) -> np.ndarray:
    return CONSTANTS.standard_normal(shape).astype(np.float32) / np.float32(max(1, int(np.prod(shape[1:]))) ** 0.5)


def mlp(*widths: int, shape: list[Any] | None = None, opset: int = 13) -> Any:
    """Gemm and Relu alternately, after a Flatten."""
    nodes: list[tuple[Any, ...]] = [("Flatten", "x", "h0", {"axis": 1})]
    weights: dict[str, Any] = {}
    for i, (n, m) in enumerate(pairwise(widths)):
        weights |= {f"w{i}": normal(m, n), f"b{i}": normal(m)}
        nodes.append(("Gemm", f"h{i} w{i} b{i}", f"z{i}", {"transB": 1}))
        nodes.append(("Relu", f"z{i}", f"h{i + 1}"))
    return made(nodes[:-1], shape or [1, widths[0]], weights, opset=opset)
