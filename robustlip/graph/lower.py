"""A program as layers in series, with joins where several values computed from the same value are combined.

A node that reads several values is a join of branches. The branches begin at its immediate dominator: the last value that lies on every path from
the input to the node (Cooper, Harvey & Kennedy 2001). A value after the dominator that two branches share is computed in both of them.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from robustlip.errors import UnsupportedLayer
from robustlip.graph.operations import JOINS, is_channel, layer_of, power_of_two, refuse
from robustlip.graph.program import Node, Program, dominators
from robustlip.layers import Concatenate, Constant, Maximum, Minimum, PrependToken, Product, Residual, Sum

# Branches that share many values are written out once each; more layers than this are refused.
MOST_LAYERS = 20_000
# Elementwise operations of two values that commute bit by bit.
_PAIRS = {"mul": Product, "multiply": Product, "maximum": Maximum, "max": Maximum, "fmax": Maximum, "minimum": Minimum, "min": Minimum,
          "fmin": Minimum}  # fmt: skip
# The largest depth of nested branches: a deeper nesting exceeds Python's recursion limit.
DEEPEST = 50


def lowered(program: Program) -> OrderedDict[str, nn.Module]:
    """The layers that compute the program, in series, named after its nodes. Raises UnsupportedLayer for an operation without a layer."""
    return _Lowering(program).series(program.output, program.input)


class _Lowering:
    def __init__(self, program: Program) -> None:
        self.made = self.depth = 0
        self.dominator = dominators(program)

    def series(self, sink: Node, source: Node) -> OrderedDict[str, nn.Module]:
        """The layers from `source`, which is computed already, to `sink`."""
        found: list[tuple[str, nn.Module]] = []
        node = sink
        while node is not source:
            layer, before = self._layer(node)
            self.made += 1
            if self.made > MOST_LAYERS:
                raise UnsupportedLayer(f"expected at most {MOST_LAYERS} layers, got more once branches are written out; use fewer joins")
            found.append((node.name, layer))
            node = before
        return OrderedDict(reversed(found))

    def branch(self, sink: Node, source: Node) -> nn.Module:
        self.depth += 1
        if self.depth > DEEPEST:
            raise UnsupportedLayer(f"expected at most {DEEPEST} nested branches, got more; add in another order, or attack the model")
        layers = self.series(sink, source)
        self.depth -= 1
        if not layers:
            return nn.Identity()
        return next(iter(layers.values())) if len(layers) == 1 else nn.Sequential(layers)

    def _layer(self, node: Node) -> tuple[nn.Module, Node]:
        """(the layer of a node, the node before it)."""
        if node.op in JOINS and (len(node.inputs) > 1 or node.op == "cat"):
            return self._join(node)
        return layer_of(node), node.inputs[0]

    def _join(self, node: Node) -> tuple[nn.Module, Node]:
        source = self.dominator[node]
        if node.op == "cat":
            parts, dim = node.arguments["tensors"], int(node.arguments["dim"])
            rank = len(node.shape) + 1
            if rank == 3 and dim % rank == 1 and isinstance(parts[-1], Node) and all(isinstance(part, Tensor) for part in parts[:-1]):
                rows = [_one_row(node, part) for part in parts[:-1]]
                return PrependToken(rows[0] if len(rows) == 1 else torch.cat(rows, 1)), parts[-1]
            if not is_channel(dim, rank):
                raise refuse(node, f"it concatenates along dimension {dim % rank} of {rank}; supported is the channel dimension")
            return Concatenate(*(self.branch(part, source) if isinstance(part, Node) else _constant(node, part) for part in parts)), source
        first, second = node.arguments["self"], node.arguments["other"]
        if node.op in _PAIRS:
            return self._pair(node, first, second, source), source
        alpha = node.arguments["alpha"]
        if not power_of_two(alpha):
            raise refuse(node, f"it multiplies the second term by alpha={alpha}, no power of 2")
        if first.shape != second.shape:
            raise refuse(node, f"its terms have shapes {first.shape} and {second.shape}, and one of them is broadcast")
        if node.op == "add" and alpha == 1 and source in (first, second):
            # Addition commutes bit by bit.
            return Residual(self.branch(second if source is first else first, source)), source
        sign = float(alpha) if node.op == "add" else -float(alpha)
        return Sum(self.branch(first, source), self.branch(second, source), weights=(1.0, sign)), source

    def _pair(self, node: Node, first: Node, second: Node, source: Node) -> nn.Module:
        kind, shapes = _PAIRS[node.op], [first.shape, second.shape]
        if kind is Product and len(node.shape) == 3:
            if first.shape == (node.shape[0], 1, 1):
                first, second = second, first
            shapes = [first.shape, node.shape if second.shape == (node.shape[0], 1, 1) else second.shape]
        if any(shape != node.shape for shape in shapes):
            raise refuse(node, f"its factors have shapes {first.shape} and {second.shape}, and one of them is broadcast other than over pixels")
        return kind(self.branch(first, source), self.branch(second, source))


def _constant(node: Node, constant: Tensor) -> Constant:
    """A constant part of a concatenation. Raises UnsupportedLayer if it differs between samples, or has another dtype."""
    rank = len(node.shape) + 1
    if constant.dim() != rank or constant.dtype != node.dtype or not torch.equal(constant, constant[:1].expand_as(constant)):
        raise refuse(node, "it concatenates a constant that differs between samples, or of another dtype")
    return Constant(constant[0])


def _one_row(node: Node, constant: Tensor) -> Tensor:
    """A constant that is the same for every sample, (…, k, D), as (1, k, D). Raises UnsupportedLayer if it differs between samples."""
    rows = constant if constant.dim() == 3 else constant.unsqueeze(0)
    if rows.dim() != 3 or not torch.equal(rows, rows[:1].expand_as(rows)):
        raise refuse(node, "it concatenates a constant that differs between samples")
    return rows[:1]
