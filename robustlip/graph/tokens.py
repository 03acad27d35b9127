"""Programs that take token ids: the operations that compute embeddings become one layer before all others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robustlip.errors import UnsupportedLayer
from robustlip.graph.operations import is_identity, refuse, source_of
from robustlip.graph.program import Node, PerBatchSize, Program, dominators, needed, rewritten
from robustlip.layers import Lookup

# Elementwise operations, which do not mix samples; and operations along a dimension, which must not be the batch dimension.
_BY_NUMBER = frozenset(
    "ne eq lt le gt ge add sub mul abs clamp clamp_min clamp_max neg to type_as _to_copy where masked_fill bitwise_not logical_not bitwise_and "
    "logical_and bitwise_or logical_or __and__ __or__ embedding contiguous clone dropout expand expand_as zeros_like ones_like".split()
)
_ALONG = frozenset("cumsum gather".split())


def with_embedding(program: Program) -> Program:
    """The program of token ids, starting with one node, 'embedding' or 'lookup', that computes (N, T, D); any other program is returned unchanged.

    The embedding is the first floating-point value that lies on every path to the output. Raises UnsupportedLayer if there is none.
    """
    if program.input.dtype is None or program.input.dtype.is_floating_point:
        return program
    above = dominators(program)
    first, node = None, program.output
    while node is not program.input:
        if node.dtype is not None and node.dtype.is_floating_point:
            first = node
        node = above[node]
    if first is None or first.refusal or first.merged or len(first.shape) != 2:
        raise UnsupportedLayer("expected a model that first computes an embedding of each token id, (N, T, D), got another; embed them first")
    ids = first.arguments.get("indices")
    while isinstance(ids, Node) and ids is not program.input and is_identity(ids):
        ids = source_of(ids)
    if first.op == "embedding" and ids is program.input:
        made = replace(first, arguments={**first.arguments, "indices": program.input})
    else:
        made = replace(first, op="lookup", arguments={"self": program.input, "layer": _lookup(program.input, first)})
    return rewritten(program, {first: made})


def with_chosen_token(program: Program) -> tuple[Program, frozenset[int]]:
    """(the program in which x[arange(N), k] is x[:, k] where k is one place for all texts without certain ids; these ids).

    Classifiers read the last token that is not padding, say argmax((ids != pad)·arange(T)). In a text without that id `ids != pad` is True
    everywhere: then k is a constant. Whoever runs the program has to refuse texts with such an id.
    """
    replaced: dict[Node, Node] = {}
    without: set[int] = set()
    for node in program.nodes:
        indices = node.arguments.get("indices")
        source = source_of(node)
        if node.op != "index" or source is None or not isinstance(indices, list) or not 1 <= len(indices) <= 2:
            continue
        if not (isinstance(indices[0], PerBatchSize) and indices[0].counts):
            continue
        if len(indices) == 1:
            replaced[node] = replace(node, op="alias", arguments={"self": source})
            continue
        place = _place(indices[1], program.input, without)
        if place is not None and len(source.shape) >= 2 and -source.shape[0] <= place < source.shape[0]:
            replaced[node] = replace(node, op="select", arguments={"self": source, "dim": 1, "index": place})
    return (rewritten(program, replaced), frozenset(without)) if replaced else (program, frozenset())


# Operations that compute each number of a result from the numbers at its place, and those that reduce a dimension.
_PLACES = frozenset("to _to_copy type_as mul add sub remainder contiguous clone".split())
_REDUCED = frozenset("argmax sum".split())


def _place(index: Any, ids: Node, without: set[int]) -> int | None:
    """The value of an index (N,) in all texts without certain ids, which are added to `without`; None if it is not proved to be one value."""
    found: set[int] = set()

    def value(part: Any) -> Any:
        if isinstance(part, list):
            return [value(p) for p in part]
        return of(part) if isinstance(part, Node) else part

    def of(node: Node) -> Tensor:
        a = node.arguments
        if node.op in ("ne", "eq") and a["self"] is ids:
            if not isinstance(a["other"], int) and not (isinstance(a["other"], Tensor) and a["other"].numel() == 1):
                raise _Unclear
            found.add(int(a["other"]))
            return torch.full((2, *ids.shape), node.op == "ne")
        if node.op in _REDUCED and isinstance(a["dim"], int | list):
            dims = a["dim"] if isinstance(a["dim"], list) else [a["dim"]]
            if not dims or any(d % (len(node.inputs[0].shape) + 1) == 0 for d in dims):
                raise _Unclear
        elif node.op not in _PLACES:
            raise _Unclear
        return node.target(**{name: value(argument) for name, argument in a.items()})  # type: ignore[no-any-return]

    try:
        places = of(index) if isinstance(index, Node) else index
    except (_Unclear, RuntimeError, TypeError):
        return None
    if not isinstance(places, Tensor) or places.is_floating_point() or places.dim() > 1 or len(places.unique()) != 1:
        return None
    without |= found
    return int(places.unique())


class _Unclear(Exception):
    """A choice that may differ from text to text."""


def _lookup(start: Node, end: Node) -> Lookup:
    """The layer that computes `end` from token ids by the recorded operations."""
    places: dict[Node, int] = {start: 0}
    tensors: list[Tensor] = []
    steps: list[tuple[str, str, Any]] = []

    def written(value: Any) -> Any:
        if isinstance(value, Node):
            return {"value": places[value]}
        if isinstance(value, Tensor):
            tensors.append(value)
            return {"tensor": len(tensors) - 1}
        if isinstance(value, PerBatchSize):
            if any(number != n for n, number in value.values.items()):
                raise refuse(end, "it reads a multiple of the number of samples")
            return {"samples": None}
        if isinstance(value, list):
            return [written(part) for part in value]
        return value

    for node in needed(end):
        rank = len(node.shape) + 1
        along = node.op in _ALONG and node.arguments["dim"] % rank != 0
        if node.refusal or node.merged or not (node.op in _BY_NUMBER or along) or node.target is None:
            raise refuse(node, "it is not supported between token ids and their embeddings")
        if node.op == "dropout" and node.arguments["train"]:
            raise refuse(node, "it uses random numbers")
        table = node.arguments.get("self")
        written_as = {key: written(value) for key, value in node.arguments.items()}
        if node.op == "gather" and isinstance(table, Tensor):
            if len(table) != 1:
                raise refuse(node, "it reads a different row of a table for each sample of the batch")
            written_as["self"] = {"rows": written_as["self"]["tensor"]}  # gather does not broadcast
        steps.append((node.target._schema.name.split("::")[1], node.target._overloadname, written_as))
        places[node] = len(places)
    made = Lookup(steps, tensors, int(end.shape[-1]))
    if not made.num_embeddings:
        raise refuse(end, "no table is indexed by the token ids themselves, so the number of ids is unknown")
    return made
