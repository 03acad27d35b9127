"""A program with fewer nodes and the same values: what changes nothing is gone, views of views are one, parts of a chunk are slices, and operations
that together make a layer of ours are one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from robustlip.graph.operations import VIEWS, channel_slice, is_channel, is_identity, source_of
from robustlip.graph.program import Node, Program, needed

Rewrite = Callable[[Node], Node]


def simplified(program: Program) -> Program:
    """The program rewritten node by node, inputs first."""
    now: dict[Node, Node] = {program.input: program.input}

    def inside(value: Any) -> Any:
        if isinstance(value, Node):
            return now[value]
        return [inside(part) for part in value] if isinstance(value, list) else value

    for node in program.nodes:
        new = replace(node, arguments={name: inside(value) for name, value in node.arguments.items()})
        for rewrite in (_view, _part, _maxmin):
            new = rewrite(new)
        source = source_of(new)
        now[node] = source if source is not None and is_identity(new) else new
    output = now[program.output]
    return Program(program.input, output, needed(output))


def _view(node: Node) -> Node:
    """A view of a view is one of the first value: row by row, both keep the order of a sample's numbers."""
    source = source_of(node)
    if node.op not in VIEWS or source is None or source.op not in VIEWS:
        return node
    return replace(node, op="view", arguments={"self": source_of(source)})


def _part(node: Node) -> Node:
    """One of the parts that chunk and split make: a slice of what they cut."""
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
    """cat([max(a, b), min(a, b)]) of the two halves a, b of the channels of one value."""
    if node.op != "cat" or len(node.arguments["tensors"]) != 2 or not is_channel(int(node.arguments["dim"]), len(node.shape) + 1):
        return node
    high, low = node.arguments["tensors"]
    if not (isinstance(high, Node) and isinstance(low, Node) and high.op in ("max", "maximum") and low.op in ("min", "minimum")):
        return node
    pair, other = ([n.arguments.get("self"), n.arguments.get("other")] for n in (high, low))
    if pair not in (other, other[::-1]):
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
