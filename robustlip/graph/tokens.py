"""Programs that take token ids: the operations that compute embeddings become one layer before all others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
