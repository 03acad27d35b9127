"""Rewrites a program to fewer nodes with the same values: identities are removed, consecutive views become one, parts of a chunk become slices, and
several operations that form one of our layers become one node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from robustlip.graph.composites import composite, gated
from robustlip.graph.operations import channel_dimension, channel_slice, is_channel, is_identity, order_of, pads, source_of
from robustlip.graph.program import VIEWS, Node, Program, rewritten


def simplified(program: Program) -> Program:
    """The program rewritten node by node in topological order."""
    return rewritten(program, change=_simple)


def _simple(node: Node) -> Node:
    for rewrite in (_apart, _view, _product, _tokens, _part, _maxmin, _group_sort, _padded, _softsign, composite, gated):
        node = rewrite(node)
    source = source_of(node)
    return source if source is not None and is_identity(node) else node


def _apart(node: Node) -> Node:
    """Separates merged batch and token dimensions again: the nodes that read them treat each row separately (`check_apart`)."""
    return replace(node, op="view" if node.op in VIEWS else node.op, merged=False) if node.merged else node


def _product(node: Node) -> Node:
    """addmm and mm with a constant matrix, as the linear layer that runs with its transpose."""
    if node.op not in ("addmm", "mm"):
        return node
    a = node.arguments
    x, matrix, bias = (a["mat1"], a["mat2"], a["self"]) if node.op == "addmm" else (a["self"], a["mat2"], None)
    if isinstance(matrix, Node) or not isinstance(x, Node) or isinstance(bias, Node) or a.get("alpha", 1) != 1 or a.get("beta", 1) != 1:
        return node
    if bias is not None and bias.dim() != 1:
        return node
    source = source_of(x)
    if x.op in VIEWS and source is not None and source.shape and source.shape[-1] == x.shape[-1]:
        x = source  # a product treats each row separately: rows need not be merged
    return replace(node, op="linear", arguments={"input": x, "weight": matrix.t(), "bias": bias}, shape=(*x.shape[:-1], matrix.shape[1]))


def _view(node: Node) -> Node:
    """A view of a view as one view of the first value: both keep the order of a sample's numbers."""
    source = source_of(node)
    if node.op not in VIEWS or source is None or source.op not in VIEWS:
        return node
    return replace(node, op="view", arguments={"self": source_of(source)})


def _tokens(node: Node) -> Node:
    """Images (C, H, W) transposed to tokens (H·W, C): flatten(2).transpose(1, 2)."""
    places = source_of(node)
    image = None if places is None else source_of(places)
    if places is None or image is None or places.op not in VIEWS or len(places.shape) != 2 or len(image.shape) < 3:
        return node
    turned = order_of(node, 3) == (0, 2, 1) and places.shape[0] == image.shape[0]
    return replace(node, op="tokens", arguments={"self": image}) if turned else node


def _part(node: Node) -> Node:
    """One of the parts that chunk and split return, as a slice of their argument."""
    whole = node.arguments.get("self")
    if node.op != "getitem" or not isinstance(whole, Node) or whole.op not in ("chunk", "split", "split_with_sizes"):
        return node
    a, source = whole.arguments, source_of(whole)
    assert source is not None
    rank = len(source.shape) + 1
    dim = int(a["dim"]) % rank
    if dim == 0:
        return node
    size = source.shape[dim - 1]
    if whole.op == "chunk":
        step = -(-size // int(a["chunks"]))
        sizes = [min(step, size - i) for i in range(0, size, step)]
    else:
        given: Any = a.get("split_sizes", a.get("split_size"))
        sizes = list(given) if isinstance(given, list) else [min(given, size - i) for i in range(0, size, given)]
    index = int(node.arguments["index"]) % len(sizes)
    return replace(node, op="narrow", arguments={"self": source, "dim": dim, "start": sum(sizes[:index]), "length": sizes[index]})


def _maxmin(node: Node) -> Node:
    """cat([max(a, b), min(a, b)]) of the two halves a, b of the channels of one value, as MaxMin."""
    if node.op != "cat" or len(node.arguments["tensors"]) != 2 or not is_channel(int(node.arguments["dim"]), len(node.shape) + 1):
        return node
    high, low = node.arguments["tensors"]
    if not (isinstance(high, Node) and isinstance(low, Node) and high.op in ("max", "maximum") and low.op in ("min", "minimum")):
        return node
    pair, other = ([n.arguments.get("self"), n.arguments.get("other")] for n in (high, low))
    if any(not isinstance(part, Node) for part in (*pair, *other)) or {id(part) for part in pair} != {id(part) for part in other}:
        return node
    cuts = [(source_of(part), channel_slice(part)) if isinstance(part, Node) else (None, None) for part in pair]
    whole = cuts[0][0]
    if whole is None or cuts[1][0] is not whole or None in (cuts[0][1], cuts[1][1]):
        return node
    channels = whole.shape[0] if len(whole.shape) == 3 else whole.shape[-1]
    halves = sorted(cut for _, cut in cuts if cut is not None)
    if channels % 2 or halves != [(0, channels // 2), (channels // 2, channels)]:
        return node
    return replace(node, op="maxmin", arguments={"self": whole})


def _group_sort(node: Node) -> Node:
    """Neighbouring channels that a view groups, sorted in each group, and ungrouped by a view, as GroupSort."""
    inner = source_of(node)
    if node.op not in VIEWS or inner is None:
        return node
    grouped = _sorted(inner)
    whole = None if grouped is None else source_of(grouped)
    if grouped is None or whole is None or grouped.op not in VIEWS or whole.shape != node.shape:
        return node
    at = channel_dimension(len(whole.shape) + 1) - 1
    group = grouped.shape[at + 1] if len(grouped.shape) > at + 1 else 0
    if not group or grouped.shape != (*whole.shape[:at], whole.shape[at] // group, group, *whole.shape[at + 1 :]):
        return node
    return replace(node, op="group_sort", arguments={"self": whole, "group": group})


def _sorted(node: Node) -> Node | None:
    """The value that a node sorts in ascending order along the groups after the channels: sort(v).values, or cat([min(v), max(v)]) for pairs."""
    if node.op == "getitem" and node.arguments["index"] == 0:
        sort = node.arguments["self"]
        if sort.op != "sort" or sort.arguments.get("descending"):
            return None
        return _along_groups(sort, sort.arguments["dim"])
    if node.op != "cat" or len(node.arguments["tensors"]) != 2:
        return None
    parts = node.arguments["tensors"]
    if any(not isinstance(part, Node) or part.op != "getitem" or part.arguments["index"] != 0 for part in parts):
        return None
    low, high = (part.arguments["self"] for part in parts)
    if (low.op, high.op) != ("min", "max") or not (low.arguments.get("keepdim") and high.arguments.get("keepdim")):
        return None
    grouped, dim = source_of(low), low.arguments["dim"]
    if grouped is None or source_of(high) is not grouped:
        return None
    rank = len(grouped.shape) + 1
    same = len({d % rank for d in (dim, high.arguments["dim"], node.arguments["dim"])}) == 1
    return _along_groups(low, dim) if same and grouped.shape[dim % rank - 1] == 2 else None


def _along_groups(node: Node, dim: int) -> Node | None:
    """The first argument of a node that acts along the dimension after the channels."""
    source = source_of(node)
    if source is None or len(source.shape) < 2:
        return None
    rank = len(source.shape) + 1
    return source if dim % rank == channel_dimension(rank - 1) % (rank - 1) + 1 else None


def _padded(node: Node) -> Node:
    """A convolution after a padding that copies numbers, as one convolution with a padding mode, as nn.Conv2d runs it."""
    pad = source_of(node)
    if node.op not in ("conv1d", "conv2d", "conv3d") or pad is None or pad.op != "pad" or pad.arguments["mode"] == "constant":
        return node
    sides, mode, source = pads(pad), pad.arguments["mode"], source_of(pad)
    padding = node.arguments["padding"]
    if sides is None or sides[::2] != sides[1::2] or min(sides) < 0 or any(padding if isinstance(padding, list) else [1]):
        return node
    return replace(node, arguments={**node.arguments, "input": source, "padding": list(sides[::-2]), "mode": mode})


def _softsign(node: Node) -> Node:
    """x/(|x| + 1), as torch computes softsign."""
    x, divisor = node.arguments.get("self"), node.arguments.get("other")
    if node.op != "div" or not isinstance(x, Node) or not isinstance(divisor, Node) or divisor.op != "add":
        return node
    one = divisor.arguments["other"]
    if isinstance(one, Tensor | Node) or one != 1:
        return node
    size = source_of(divisor)
    return replace(node, op="softsign", arguments={"self": x}) if size is not None and size.op == "abs" and source_of(size) is x else node
