"""ONNX files as modules: outputs agree with ONNX's reference evaluator, row by row; hostile files are refused."""

from __future__ import annotations

import gzip
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import robustlip
from robustlip.attacks import by_name
from robustlip.errors import BadInput, RobustlipError
from robustlip.onnx import read_onnx

onnx = pytest.importorskip("onnx")

from command_line import run  # noqa: E402
from onnx_files import made, mlp, normal  # noqa: E402

W = {"w": normal(12, 5), "c": normal(4, 3, 3, 3), "cb": normal(4), "g": normal(4), "v": np.abs(normal(4)) + 0.5}
INTS = np.int64

# By name: (nodes, shape of x, constants, opset). Each ends in a value of any shape.
GRAPHS: dict[str, tuple[list[Any], list[Any], dict[str, Any], int]] = {
    "Gemm, all options": (
        [("Gemm", "x w b", "y", {"alpha": 0.5, "beta": 2.0, "transB": 0})], [1, 12], {"w": W["w"], "b": normal(1, 5)}, 13,
    ),
    "MatMul, Add": ([("MatMul", "x w", "z"), ("Add", "b z", "y")], [1, 12], {"w": W["w"], "b": normal(5)}, 9),
    "MatMul from the left": (
        [("MatMul", "w x", "z"), ("Add", "z b", "a"), ("Relu", "a", "h"), ("Flatten", "h", "y", {"axis": 0})], [12, 1][:0] + [1, 12, 1],
        {"w": normal(5, 12), "b": normal(5, 1)}, 11,
    ),
    "MatMul of values": (
        [("Transpose", "x", "t", {"perm": [0, 2, 1]}), ("MatMul", "x t", "y")], [1, 3, 4], {}, 13,
    ),
    "Flatten-1": ([("Flatten", "x", "f"), ("Gemm", "f w b", "y")], [1, 3, 2, 2], {"w": W["w"], "b": normal(5)}, 8),
    "Flatten, negative": ([("Flatten", "x", "y", {"axis": -3})], [1, 3, 2, 2], {}, 13),
    "Flatten-9 at 2": ([("Flatten", "x", "y", {"axis": 2})], [1, 3, 2, 2], {}, 9),
    "Reshape with 0 and -1": ([("Reshape", "x s", "r"), ("Relu", "r", "y")], [1, 3, 4], {"s": np.array([0, -1, 2], INTS)}, 13),
    "Reshape with a leading 1": ([("Reshape", "x s", "r"), ("MatMul", "r w", "y")], [1, 3, 4], {"s": np.array([1, 12], INTS), "w": W["w"]}, 5),
    "Reshape and Transpose": (
        [("Reshape", "x s", "r"), ("Transpose", "r", "t", {"perm": [0, 2, 3, 1]}), ("Reshape", "t u", "y")], [1, 12],
        {"s": np.array([1, 3, 2, 2], INTS), "u": np.array([1, 12], INTS)}, 13,
    ),
    "without the batch dimension": (
        [("Squeeze", "x a", "s"), ("Sub", "s m", "z"), ("Transpose", "z", "t"), ("Unsqueeze", "t a", "y")], [1, 3, 4],
        {"a": np.array([0], INTS), "m": normal(3, 1)}, 13,
    ),
    "sequence first": (
        [("Transpose", "x", "t", {"perm": [1, 0, 2]}), ("MatMul", "t w", "z"), ("Transpose", "z", "y", {"perm": [1, 0, 2]})], [1, 3, 4],
        {"w": normal(4, 2)}, 13,
    ),
    "Conv, padded unevenly": ([("Conv", "x c cb", "y", {"pads": [0, 1, 1, 0], "strides": [2, 1]})], [1, 3, 6, 6], W, 11),
    "Conv, SAME_LOWER": ([("Conv", "x c", "y", {"auto_pad": "SAME_LOWER", "strides": [2, 2]})], [1, 3, 5, 5], W, 11),
    "Conv, dilated, and Add": (
        [("Conv", "x c", "z", {"dilations": [2, 1]}), ("Add", "z b", "y")], [1, 3, 6, 6], W | {"b": normal(1, 4, 1, 1)}, 11,
    ),
    "Conv1d": ([("Conv", "x c", "y", {"group": 2, "pads": [1, 1]})], [1, 4, 7], {"c": normal(6, 2, 3)}, 11),
    "ConvTranspose": ([("ConvTranspose", "x c", "y", {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]})], [1, 3, 4, 4],
                      {"c": normal(3, 2, 3, 3)}, 11),
    "BatchNormalization-15": (
        [("Conv", "x c", "z"), ("BatchNormalization", "z g cb m v", "y", {"epsilon": 1e-3})], [1, 3, 5, 5], W | {"m": normal(4)}, 15,
    ),
    "BatchNormalization of a vector": ([("BatchNormalization", "x g cb m v", "y")], [1, 4], W | {"m": normal(4)}, 15),
    "MaxPool, padded": ([("MaxPool", "x", "y", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]})], [1, 2, 7, 7], {}, 11),
    "MaxPool, uneven": ([("MaxPool", "x", "y", {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 1, 1]})], [1, 2, 5, 5], {}, 11),
    "MaxPool, ceil": ([("MaxPool", "x", "y", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1})], [1, 2, 5, 5], {}, 11),
    "AveragePool": ([("AveragePool", "x", "y", {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]})], [1, 2, 5, 5], {}, 11),
    "AveragePool, zeros counted": (
        [("AveragePool", "x", "y", {"kernel_shape": [3, 3], "pads": [1, 0, 1, 1], "count_include_pad": 1})], [1, 2, 5, 5], {}, 11,
    ),
    "GlobalAveragePool": ([("GlobalAveragePool", "x", "p"), ("Flatten", "p", "y")], [1, 3, 5, 5], {}, 11),
    "GlobalMaxPool": ([("GlobalMaxPool", "x", "y")], [1, 3, 5, 5], {}, 11),
    "Dropout-7": ([("Dropout", "x", "d", {"ratio": 0.3}), ("Relu", "d", "y")], [1, 4], {}, 7),
    "Dropout-13": ([("Dropout", "x r t", "y")], [1, 4], {"r": np.float32(0.3), "t": np.array(False)}, 13),
    "Slice-1": ([("Slice", "x", "y", {"axes": [1, 2], "starts": [1, -3], "ends": [3, 2**31]})], [1, 4, 5], {}, 8),
    "Slice, backwards": (
        [("Slice", "x s e a t", "y")], [1, 4, 5],
        {"s": np.array([-1, 0], INTS), "e": np.array([-9, 9], INTS), "a": np.array([2, 1], INTS), "t": np.array([-2, 3], INTS)}, 13,
    ),
    "Split": ([("Split", "x", "a b", {"axis": 1, "split": [1, 3]}), ("Sub", "b a", "y")], [1, 4, 2], {}, 11),
    "Split-18": ([("Split", "x", "a b c", {"axis": 2, "num_outputs": 3}), ("Concat", "c a b", "y", {"axis": 2})], [1, 2, 7], {}, 18),
    "Concat with a constant": ([("Concat", "k x", "y", {"axis": 1})], [1, 3, 2], {"k": normal(1, 1, 2)}, 13),
    "Concat of the first dimension": ([("Concat", "x x", "c", {"axis": 0}), ("ReduceMean", "c", "y", {"axes": [1], "keepdims": 0})], [1, 4], {}, 11),
    "Gather": ([("Gather", "x i", "g", {"axis": 1}), ("Relu", "g", "y")], [1, 4, 3], {"i": np.array(2, INTS)}, 13),
    "Gather of several": ([("Gather", "x i", "y", {"axis": -1})], [1, 4, 3], {"i": np.array([[2, 0], [1, 1]], INTS)}, 13),
    "Pad-2": ([("Pad", "x", "y", {"pads": [0, 0, 1, 0, 0, 0, 2, 1], "value": 0.5})], [1, 2, 3, 3], {}, 9),
    "Pad-18": ([("Pad", "x p v a", "y")], [1, 2, 3], {"p": np.array([1, 2], INTS), "v": np.float32(-1), "a": np.array([-1], INTS)}, 18),
    "Pad, reflected": ([("Pad", "x p", "y", {"mode": "reflect"})], [1, 2, 4, 4], {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1], INTS)}, 13),
    "constants that meet": (
        [("Mul", "x a", "m"), ("Sub", "b m", "s"), ("Div", "s c", "d"), ("Add", "d e", "y")], [1, 3, 2, 2],
        {"a": normal(3, 1, 1), "b": np.float32([0.3]), "c": np.float32(3), "e": normal(1, 3, 2, 2)}, 13,
    ),
    "a value that is repeated": ([("Add", "x k", "y")], [1, 3, 1], {"k": normal(1, 3, 4)}, 13),
    "values that meet": ([("ReduceMean", "x", "m", {"axes": [2]}), ("Sub", "x m", "d"), ("Mul", "d x", "y")], [1, 3, 4], {}, 13),
    "Max, Min, Sum": ([("Max", "x k", "a"), ("Min", "a z", "b"), ("Sum", "b x a", "y")], [1, 4], {"k": normal(4), "z": np.float32(0.2)}, 13),
    "Clip-6": ([("Clip", "x", "y", {"min": -0.5, "max": 0.4})], [1, 9], {}, 6),
    "Clip-13": ([("Clip", "x l", "y")], [1, 9], {"l": np.float32(-0.2)}, 13),
    "Pow": ([("Pow", "x p", "y")], [1, 9], {"p": np.float32(2)}, 13),
    "PRelu": ([("PRelu", "x s", "y")], [1, 3, 2, 2], {"s": normal(3, 1, 1)}, 13),
    "elementwise": (
        [("LeakyRelu", "x", "a", {"alpha": 0.2}), ("Elu", "a", "b", {"alpha": 1.5}), ("Softplus", "b", "c"), ("Tanh", "c", "d"),
         ("Sigmoid", "d", "e"),
         ("HardSigmoid", "e", "f"), ("Abs", "f", "g"), ("Neg", "g", "h"), ("Exp", "h", "i"), ("Sqrt", "i", "j"), ("Selu", "j", "k"),
         ("Softsign", "k", "y")],
        [1, 9], {}, 13,
    ),
    "GELU": (
        [("Div", "x r", "d"), ("Erf", "d", "e"), ("Add", "e o", "a"), ("Mul", "x a", "m"), ("Mul", "m h", "y")], [1, 9],
        {"r": np.float32(2**0.5), "o": np.float32(1), "h": np.float32(0.5)}, 13,
    ),
    "Gelu-20, tanh": ([("Gelu", "x", "y", {"approximate": "tanh"})], [1, 9], {}, 20),
    "SiLU": ([("Sigmoid", "x", "s"), ("Mul", "s x", "y")], [1, 9], {}, 13),
    "Softmax-13": ([("Softmax", "x", "y", {"axis": 1})], [1, 3, 4], {}, 13),
    "GroupNormalization-18": (
        [("GroupNormalization", "x g b", "y", {"epsilon": 1e-2, "num_groups": 2})], [1, 4, 3, 2], {"g": normal(2), "b": normal(2)}, 18,
    ),
    "GroupNormalization-21": (
        [("GroupNormalization", "x g b", "y", {"epsilon": 1e-2, "num_groups": 2})], [1, 4, 5], {"g": normal(4), "b": normal(4)}, 21,
    ),
    "LayerNormalization": ([("LayerNormalization", "x g b", "y", {"axis": -1, "epsilon": 1e-3})], [1, 3, 4], {"g": normal(4), "b": normal(4)}, 17),
    "InstanceNormalization": ([("InstanceNormalization", "x g b", "y")], [1, 3, 4, 4], {"g": normal(3), "b": normal(3)}, 13),
    "ReduceSum-13": ([("ReduceSum", "x a", "y", {"keepdims": 0})], [1, 3, 4], {"a": np.array([-1], INTS)}, 13),
    "ReduceMax, ReduceL2": ([("ReduceMax", "x", "m", {"axes": [2]}), ("ReduceL2", "m", "y", {"axes": [1], "keepdims": 0})], [1, 3, 4], {}, 13),
    "Where": ([("Greater", "x z", "c"), ("Where", "c x k", "y")], [1, 4], {"z": np.float32(0), "k": normal(4)}, 13),
    "Expand, Tile": ([("Expand", "x s", "e"), ("Tile", "e r", "y")], [1, 3, 1], {"s": np.array([1, 3, 4], INTS), "r": np.array([1, 2, 1], INTS)}, 13),
    "shapes computed": (
        [("Shape", "x", "s"), ("Gather", "s i", "n"), ("Unsqueeze", "n a", "u"), ("Concat", "u m", "t", {"axis": 0}), ("Reshape", "x t", "r"),
         ("ConstantOfShape", "q", "k"), ("Mul", "r k", "y")],
        [1, 3, 4], {"i": np.array(0, INTS), "a": np.array([0], INTS), "m": np.array([-1], INTS), "q": np.array([12], INTS)}, 13,
    ),
    "a constant for each of any number of samples": (
        [("Shape", "x", "s"), ("Gather", "s i", "n"), ("Unsqueeze", "n a", "u"), ("Concat", "u m", "t", {"axis": 0}), ("Equal", "t q", "e"),
         ("Where", "e o t", "w"), ("Expand", "k w", "z"), ("Concat", "z x", "y", {"axis": 1})],
        ["n", 3, 4], {"i": np.array(0, INTS), "a": np.array([0], INTS), "m": np.array([1, 4], INTS), "q": np.full(3, -1), "o": np.ones(3, INTS),
                      "k": normal(1, 1, 4)}, 13,
    ),
    "Cast, Identity, Constant": (
        [("Constant", "", "k", {"value_floats": [1.0, 2.0, 3.0, 4.0]}), ("Cast", "x", "a", {"to": 1}), ("Identity", "a", "b"), ("Mul", "b k", "y")],
        [1, 4], {}, 13,
    ),
}  # fmt: skip
GRAPHS["shapes computed, samples named"] = (*GRAPHS["shapes computed"][:1], ["n", 3, 4], *GRAPHS["shapes computed"][2:])


def saved(model: Any, folder: Path, name: str = "net.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def reference(model: Any, x: torch.Tensor) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model)
    return np.stack([np.asarray(evaluator.run(None, {"x": row[None].numpy()})[0]) for row in x])


@pytest.mark.parametrize("name", GRAPHS)
def test_a_file_computes_what_the_reference_evaluator_computes_row_by_row(name, tmp_path) -> None:
    nodes, shape, constants, opset = GRAPHS[name]
    model = made(nodes, shape, constants, opset=opset)
    net = read_onnx(saved(model, tmp_path))
    x = torch.randn(4, *shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = net(x)
        alone = torch.cat([net(x[i : i + 1]) for i in range(4)])
    wanted = reference(model, x).reshape(4, -1)
    assert y.shape[0] == 4
    np.testing.assert_allclose(y.flatten(1).numpy(), wanted, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(y, alone, rtol=1e-5, atol=1e-6)
    assert net.double()(x.double()).dtype == torch.float64


def test_forms_of_operations_that_the_reference_evaluator_does_not_know(tmp_path) -> None:
    """Softmax below opset 13 is over all that follows its axis; Add below 7 spreads from an axis on; BatchNormalization-7 and 9 are 15's."""
    x = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    k, v = normal(3), np.abs(normal(3)) + 0.5

    def net(nodes: list[Any], constants: dict[str, Any], opset: int) -> torch.Tensor:
        return read_onnx(saved(made(nodes, [1, 3, 2, 2], constants, opset=opset), tmp_path))(x).detach()

    torch.testing.assert_close(net([("Softmax", "x", "y")], {}, 11), x.flatten(1).softmax(1).view_as(x))
    torch.testing.assert_close(net([("Softmax", "x", "y", {"axis": 3})], {}, 11), x.softmax(3))
    torch.testing.assert_close(net([("Add", "x k", "y", {"broadcast": 1, "axis": 1})], {"k": k}, 6), x + torch.from_numpy(k)[:, None, None])
    torch.testing.assert_close(
        net([("BatchNormalization", "x k k k v", "y")], {"k": k, "v": v}, 7), net([("BatchNormalization", "x k k k v", "y")], {"k": k, "v": v}, 15)
    )
    with pytest.raises(BadInput, match="broadcast is not set"):
        net([("Add", "x k", "y")], {"k": normal(2)}, 6)


@pytest.mark.parametrize(
    ("nodes", "shape", "constants", "opset", "words"),
    [
        ([("ReduceMean", "x", "y", {"axes": [0]})], [1, 4], {}, 13, "would mix"),
        ([("ReduceMean", "x", "y", {"axes": [-2]})], ["n", 4], {}, 13, "would mix"),
        ([("ReduceSum", "x", "y")], ["n", 4], {}, 13, "would mix"),
        ([("Softmax", "x", "y", {"axis": 0})], ["n", 4], {}, 13, "would mix"),
        ([("Transpose", "x", "t"), ("MatMul", "x t", "y")], ["n", 4], {}, 13, "moves the batch dimension"),
        ([("Gemm", "x x", "y", {"transB": 1})], ["n", 4], {}, 13, "moves the batch dimension"),
        ([("Reshape", "x s", "y")], ["n", 4], {"s": np.array([-1, 2], INTS)}, 13, "is not the batch dimension"),
        ([("Concat", "x x", "y", {"axis": 0})], ["n", 4], {}, 13, "concatenates samples"),
        ([("Gather", "x i", "y")], ["n", 4], {"i": np.array(0, INTS)}, 13, "removes the batch dimension"),
        ([("Squeeze", "x", "y")], ["n", 4], {}, 13, "removes the batch dimension"),
        ([("Slice", "x", "y", {"axes": [0], "starts": [0], "ends": [-1]})], ["n", 4], {}, 9, "selects nothing"),
        ([("Shape", "x", "s"), ("Cast", "s", "f", {"to": 1}), ("ReduceMax", "f", "m", {"keepdims": 0}), ("Mul", "x m", "y")], ["n", 4], {}, 13,
         "number of samples"),
        ([("Shape", "x", "s"), ("Concat", "m s", "t", {"axis": 0}), ("Reshape", "x t", "y")], ["n", 4], {"m": np.array([1], INTS)}, 13,
         "number of samples"),
        ([("Shape", "x", "s"), ("Equal", "s q", "e"), ("Where", "e o s", "w"), ("Cast", "w", "f", {"to": 1}), ("Mul", "x f", "y")], ["n", 2],
         {"q": np.full(2, -1), "o": np.ones(2, INTS)}, 13, "number of samples"),
        ([("Shape", "x", "s"), ("Equal", "s q", "e"), ("Cast", "e", "f", {"to": 1}), ("Mul", "x f", "y")], ["n", 2], {"q": np.full(2, 7)}, 13,
         "number of samples"),
        ([("BatchNormalization", "x k k k k", "y", {"training_mode": 1})], [1, 4], {"k": normal(4)}, 15, "in training mode, in which it mixes"),
        ([("Dropout", "x r t", "y")], [1, 4], {"r": np.float32(0.5), "t": np.array(True)}, 13, "in training"),
        ([("NonZero", "x", "y")], [1, 4], {}, 13, r"NonZero \(node 'y'\): it is not supported"),
        ([("Relu", "x", "y", {"beta": 3})], [1, 4], {}, 13, "attribute beta is not supported"),
        ([("Relu", "z", "y")], [1, 4], {}, 13, "reads 'z'"),
        ([("Relu", "x", "y"), ("Abs", "x", "y")], [1, 4], {}, 13, "exists already"),
        ([("Expand", "x s", "y")], [1, 4], {"s": np.array([2**20, 2**20, 4], INTS)}, 13, "its shape is"),
        ([("Add", "x k", "a"), ("Add", "a l", "y")], [1, 1], {"k": normal(2**14, 1), "l": normal(1, 2**14)}, 13, "more than"),
        ([("ConstantOfShape", "s", "k"), ("Add", "x k", "y")], [1, 4], {"s": np.array([2**31, 2**31], INTS)}, 13, "its shape is"),
        ([("Pad", "x p", "y")], [1, 4], {"p": np.array([0, 0, 0, 2**40], INTS)}, 13, "pads"),
        ([("Relu", "x", "y")], [1, "height"], {}, 13, "of known shape except for the number of samples"),
        ([("Relu", "x", "y")], [8, 4], {}, 13, "batch 1"),
        ([("Cast", "x", "y", {"to": 11})], [1, 4], {}, 13, "in one dtype"),
        ([("Constant", "", "y", {"value_float": 1.0})], [1, 4], {}, 13, "got a constant"),
    ],
)  # fmt: skip
def test_what_is_not_known_or_mixes_samples_is_refused(nodes, shape, constants, opset, words, tmp_path) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        read_onnx(saved(made(nodes, shape, constants, opset=opset), tmp_path))
    assert type(caught.value).__mro__[1] is RobustlipError and "\n" not in str(caught.value) and "; " in str(caught.value)


# ---- networks: what comes in is certified and attacked


def lenet() -> Any:
    nodes = [
        ("Conv", "x c cb", "a"), ("Relu", "a", "b"), ("MaxPool", "b", "p", {"kernel_shape": [2, 2], "strides": [2, 2]}), ("Flatten", "p", "f"),
        ("Dropout", "f", "d"), ("Gemm", "d w b1", "h", {"transB": 1}), ("Relu", "h", "r"), ("Gemm", "r v b2", "y", {"transB": 1}),
    ]  # fmt: skip
    weights = {"c": normal(4, 1, 3, 3), "cb": normal(4), "w": normal(8, 36), "b1": normal(8), "v": normal(3, 8), "b2": normal(3)}
    return made(nodes, ["n", 1, 8, 8], weights, opset=8)


def residual() -> Any:
    nodes = [
        ("Conv", "x c cb", "a", {"pads": [1, 1, 1, 1]}), ("BatchNormalization", "a g cb m v", "n"), ("Relu", "n", "r"),
        ("Conv", "r d", "e", {"pads": [1, 1, 1, 1]}), ("Add", "e r", "s"), ("Concat", "s n", "k", {"axis": 1}), ("GlobalAveragePool", "k", "p"),
        ("Reshape", "p t", "f"), ("MatMul", "f w", "z"), ("Add", "z b", "y"),
    ]  # fmt: skip
    weights = {"c": normal(4, 1, 3, 3), "cb": normal(4), "g": normal(4), "m": normal(4), "v": np.abs(normal(4)) + 1, "d": normal(4, 4, 3, 3)}
    return made(nodes, [1, 1, 6, 6], weights | {"t": np.array([1, -1], INTS), "w": normal(8, 3), "b": normal(3)}, opset=15)


def acas() -> Any:
    """As the networks of ACAS Xu are written: an input of four dimensions, a mean that is taken off, MatMul and Add."""
    nodes = [("Sub", "x m", "s"), ("Flatten", "s", "h0")]
    weights = {"m": normal(1, 1, 1, 5)}
    for i, (n, m) in enumerate([(5, 12), (12, 12), (12, 5)]):
        weights |= {f"w{i}": normal(n, m), f"b{i}": normal(m)}
        nodes += [("MatMul", f"h{i} w{i}", f"p{i}"), ("Add", f"p{i} b{i}", f"z{i}"), ("Relu", f"z{i}", f"h{i + 1}")]
    return made(nodes[:-1], [1, 1, 1, 5], weights, opset=8)


NETS = {"mlp": lambda: mlp(6, 16, 3), "mlp, a column": lambda: mlp(6, 16, 3, shape=[1, 6, 1]), "lenet": lenet, "residual": residual, "acas": acas}


@pytest.mark.parametrize("name", NETS)
def test_a_network_from_a_file_is_certified_and_attacked(name, tmp_path) -> None:
    model = NETS[name]()
    net = robustlip.load(str(saved(model, tmp_path)))
    x = torch.randn(3, *net.input_shape, generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(net(x).detach().flatten(1).numpy(), reference(model, x).reshape(3, -1), rtol=1e-4, atol=1e-5)
    y = net(x).argmax(1)
    certificate = robustlip.certify(net, x, y, robustlip.InputBall("l2"), method="local")
    found = by_name("min")(net, x, y, robustlip.InputBall("l2"))
    assert (certificate.radius > 0).all() and (certificate.radius <= found.radius).all()
    assert set(net.state_dict()) >= {"w", "b"} or name not in ("residual",)


def test_a_product_and_what_is_added_are_one_layer(tmp_path) -> None:
    net = read_onnx(saved(acas(), tmp_path))
    chain = robustlip.capture(net, torch.randn(2, 1, 1, 5))
    assert [type(layer).__name__ for layer in chain] == ["Flatten", "Shift", "Linear", "ReLU", "Linear", "ReLU", "Linear"]


def test_samples_of_another_shape_come_in_where_that_means_one_thing(tmp_path) -> None:
    net = read_onnx(saved(lenet(), tmp_path))
    x = torch.randn(2, 1, 8, 8)
    for other in (x.flatten(1), x[:, 0], x.reshape(2, 8, 8, 1)):
        assert torch.equal(net(other), net(x))
    for shape in ((2, 2, 32), (2, 4, 16), (2, 63)):
        with pytest.raises(BadInput, match="reshape them"):
            net(torch.randn(shape))


def test_the_command_line_takes_a_file(tmp_path, monkeypatch, capsys) -> None:
    saved(mlp(64, 16, 10, shape=["n", 1, 8, 8]), tmp_path)
    packed = tmp_path / "net.onnx.gz"
    packed.write_bytes(gzip.compress((tmp_path / "net.onnx").read_bytes()))
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ("certify", "net.onnx", "--data", "digits:test", "--limit", "3", "--method", "global", "--json", "c.json"),
        ("verify", "c.json", "--model", "net.onnx.gz"),
        ("attack", "net.onnx", "--data", "digits:test", "--limit", "3", "--attack", "pgd", "--radius", "0.1"),
        ("audit", "net.onnx", "--steps", "2", "--starts", "2"),
    ):
        assert run(*arguments) == 0, arguments
    (tmp_path / "net.onnx").write_bytes(b"no network")
    capsys.readouterr()
    assert run("certify", "net.onnx", "--data", "digits:test") == 2
    assert "got net.onnx" in capsys.readouterr().err


# ---- hostile files


def test_weights_in_a_file_beside_it(tmp_path) -> None:
    model = mlp(6, 4, 3)
    whole = read_onnx(saved(model, tmp_path))
    inside = {t.name: t for t in model.graph.initializer}
    raw = inside["w0"].raw_data
    (tmp_path / "weights.bin").write_bytes(b"12345678" + raw)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights.bin").write_bytes(raw)
    os.symlink(tmp_path / "weights.bin", tmp_path / "link.bin")
    os.mkfifo(tmp_path / "pipe")

    def read(location: str, **more: Any) -> Any:
        from onnx import TensorProto

        tensor = inside["w0"]
        tensor.ClearField("raw_data")
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "8", "length": str(len(raw)), **more}.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)
        return read_onnx(saved(model, tmp_path / more.get("folder", ""), "net.onnx"))

    x = torch.randn(2, 6)
    assert torch.equal(read("weights.bin")(x), whole(x))
    for location, more in (
        ("../weights.bin", {}), (str(tmp_path / "weights.bin"), {}), ("sub/weights.bin", {"offset": "0"}), ("link.bin", {}),
        ("pipe", {"offset": "0"}), ("", {}), (".", {}), ("..", {}), ("none.bin", {}), ("weights.bin", {"offset": "9"}),
        ("weights.bin", {"offset": "-1"}),
        ("weights.bin", {"offset": "x"}), ("weights.bin", {"length": "4"}), ("weights.bin", {"offset": str(2**70)}), ("a\0b", {}),
    ):  # fmt: skip
        with pytest.raises(BadInput, match="in its folder"):
            read(location, **more)


def test_sizes_are_checked_before_anything_is_made(tmp_path) -> None:
    from onnx import TensorProto, helper

    def refused(change: Any, words: str) -> None:
        model = mlp(6, 4, 3)
        change(model)
        with pytest.raises(BadInput, match=words):
            read_onnx(saved(model, tmp_path))

    def dims(*sizes: int) -> Any:
        def change(model: Any) -> None:
            del model.graph.initializer[0].dims[:]
            model.graph.initializer[0].dims.extend(sizes)

        return change

    refused(dims(2**40, 2**20), "bytes in total")
    refused(dims(-4, -6), "of the shape")
    refused(dims(4, 7), "bytes")
    refused(dims(*[1] * 9), "of the shape")
    refused(lambda m: setattr(m.graph.initializer[0], "data_type", TensorProto.STRING), "type 8")
    refused(lambda m: setattr(m.graph.node[0], "name", "n" * 5000), "a name of 5000")
    refused(lambda m: m.graph.node.extend([helper.make_node("Relu", ["x"], [f"r{i}"]) for i in range(20_001)]), "nodes, more than")
    refused(lambda m: setattr(m.opset_import[0], "version", 99), "opset 99")
    refused(lambda m: m.graph.input.extend(list(m.graph.input)), "2 inputs")
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["q"])], "b", [], [helper.make_tensor_value_info("q", 1, [1])])
    refused(lambda m: m.graph.node.insert(0, helper.make_node("If", ["x"], ["i"], then_branch=branch, else_branch=branch)), "a branch or a loop")
    refused(lambda m: m.functions.extend([helper.make_function("d", "f", [], [], [], [])]), "local functions")
    refused(lambda m: m.graph.node.extend([helper.make_node("f", ["x"], ["i"], domain="d")]), "not to ONNX")
    # A message of two bytes becomes an object of hundreds: they are counted before.
    (tmp_path / "many.onnx").write_bytes(b"\x3a\x80\x9b\xee\x02" + b"\x0a\x00" * 3_000_000)
    with pytest.raises(BadInput, match="fields"):
        read_onnx(tmp_path / "many.onnx")
    (tmp_path / "bomb.onnx.gz").write_bytes(gzip.compress(b"\0" * 2**20))
    with pytest.raises(BadInput, match=r"does not parse|protocol buffer"):
        read_onnx(tmp_path / "bomb.onnx.gz")
    with pytest.raises(BadInput, match="gzip"):
        read_onnx(saved(mlp(6, 3), tmp_path, "plain.onnx.gz"))
    with pytest.raises(BadInput, match="cannot be read"):
        read_onnx(tmp_path / "none.onnx")
    with pytest.raises(BadInput, match="finite weights"):
        robustlip.load(str(saved(made([("Mul", "x k", "y")], [1, 2], {"k": np.float32([1, np.nan])}), tmp_path)))


def test_bytes_that_were_cut_or_changed_end_in_one_sentence(tmp_path) -> None:
    rng = random.Random(0)
    path = tmp_path / "net.onnx"
    read = 0
    for build in (lenet, residual, acas):
        data = build().SerializeToString()
        for i in range(130):
            changed = bytearray(data[: rng.randrange(len(data))] if i % 3 == 0 else data)
            for _ in range(rng.choice((0, 1, 3, 20))):
                # Most bytes are weights: aim at those before them too.
                if changed:
                    changed[rng.randrange(len(changed) if rng.random() < 0.5 else min(len(changed), 900))] = rng.randrange(256)
            path.write_bytes(changed)
            try:
                net = read_onnx(path)
            except BadInput as error:
                assert "\n" not in str(error) and "expected" in str(error) and ";" in str(error)
            else:
                read += 1
                assert isinstance(net(torch.zeros(2, *net.input_shape)), torch.Tensor)
    assert read > 20
