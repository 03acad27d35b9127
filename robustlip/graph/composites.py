"""Functions written in several plain operations, found and replaced by one node: GELU and similar, RMSNorm, LayerNorm (`robustlip.layers.formulas`).

Only functions with proved bounds for the whole function are replaced. Bounds of the single operations would be products of bounds of branches,
which are much looser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from robustlip.graph.program import Node
from robustlip.layers.formulas import MOST_OPERATIONS, WEIGHT, Expression, X
from robustlip.ops.formulas import facts_of, norm_of, operations

# How many predecessors of a node are searched; all supported functions have fewer nodes.
MOST_NODES = 24
# A product can only be the end of a supported function if one of these operations precedes it.
_CHARACTERISTIC = frozenset("tanh erf sigmoid relu6 hardtanh clamp mean sum var std".split())
_UNARY = frozenset("neg square tanh erf sigmoid relu relu6 rsqrt sqrt reciprocal".split())


def composite(node: Node) -> Node:
    """A node of its own for a product or quotient that ends a supported function; any other node is returned unchanged."""
    if node.op not in ("mul", "multiply", "div", "true_divide") or not node.inputs:
        return node
    seen = _predecessors(node)
    if not any(before.op in _CHARACTERISTIC for before in seen):
        return node
    for source in seen:
        if source.shape != node.shape or not source.shape:
            continue
        weights: list[Tensor] = []
        expression = expressed(node, source, weights)
        if expression is None:
            continue
        if facts_of(expression) is not None:
            return replace(node, op="formula", arguments={"self": source, "expression": expression})
        found = norm_of(expression, source.shape[-1])
        if found is not None and found.eps > 0 and found.count > 0:
            weight = weights[0].reshape(-1) if weights else None
            return replace(node, op="written_norm", arguments={"self": source, "expression": expression, "weight": weight})
    return node


def gated(node: Node) -> Node:
    """glu: one half of a value times the sigmoid of the other half, as torch computes it in float32 and float64."""
    source = node.arguments.get("self")
    if node.op != "glu" or not isinstance(source, Node):
        return node
    dim = int(node.arguments["dim"]) % (len(source.shape) + 1)
    if dim == 0 or source.shape[dim - 1] % 2:
        return node
    half = source.shape[dim - 1] // 2
    parts = [
        replace(node, op="narrow", name=f"{node.name}_{i}", arguments={"self": source, "dim": dim, "start": i * half, "length": half})
        for i in (0, 1)
    ]
    gate = replace(node, op="sigmoid", name=f"{node.name}_gate", arguments={"self": parts[1]})
    return replace(node, op="mul", arguments={"self": parts[0], "other": gate})


def _predecessors(node: Node) -> list[Node]:
    """The nodes before a node, nearest first, at most MOST_NODES of them."""
    found: dict[Node, None] = {}
    waiting = [node]
    while waiting and len(found) < MOST_NODES:
        for before in waiting.pop(0).inputs:
            if before not in found:
                found[before] = None
                waiting.append(before)
    return list(found)


def expressed(node: Node, source: Node, weights: list[Tensor]) -> Expression | None:
    """A node as an expression of an earlier one; None if it contains another operation. A gain in the expression is appended to `weights`."""
    made: dict[Node, Expression | None] = {source: X}

    def of(part: Any) -> Expression | None:
        if isinstance(part, Node):
            if part not in made:
                made[part] = None  # not known yet
                if len(made) <= MOST_NODES:
                    made[part] = _operation(part, of)
            return made[part]
        if isinstance(part, Tensor):
            width = source.shape[-1]
            if weights or part.shape[-1:] != (width,) or part.numel() != width or part.dtype != node.dtype:
                return None
            weights.append(part)
            return WEIGHT
        return part if isinstance(part, int | float) and not isinstance(part, bool) else None

    found = of(node)
    # Nodes that are read twice occur twice in the expression.
    return found if isinstance(found, tuple) and operations(found, MOST_OPERATIONS) <= MOST_OPERATIONS else None


def _operation(node: Node, of: Callable[[Any], Expression | None]) -> Expression | None:
    a, op = node.arguments, {"multiply": "mul", "true_divide": "div", "subtract": "sub"}.get(node.op, node.op)
    plain = a.get("alpha", 1) == 1 and a.get("rounding_mode") is None
    parts: tuple[Expression | None, ...]
    if op in ("add", "sub", "mul", "div", "rsub") and plain:
        parts = of(a["self"]), of(a["other"])
        if op == "rsub":
            op, parts = "sub", parts[::-1]
    elif op == "pow":
        parts = of(a["self"]), of(a["exponent"])
    elif op in _UNARY:
        parts = (of(a["self"]),)
    elif op in ("hardtanh", "clamp"):
        low, high = (a["min_val"], a["max_val"]) if op == "hardtanh" else (a["min"], a["max"])
        op, parts = "clamp", (of(a["self"]), of(low), of(high))
    elif op in ("mean", "sum", "var", "std") and a.get("keepdim") and a.get("dtype") is None and _last(node):
        parts = (of(a["self"]),)
        if op in ("var", "std"):
            parts += (_correction(a),)
    else:
        return None
    return None if any(part is None for part in parts) else (op, *parts)


def _last(node: Node) -> bool:
    """Whether a node acts along the last dimension only."""
    dims, source = node.arguments.get("dim"), node.arguments["self"]
    if not isinstance(source, Node) or (not dims and dims != 0):
        return False
    rank = len(source.shape) + 1
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)] == [rank - 1]


def _correction(arguments: dict[str, Any]) -> int | None:
    if "unbiased" in arguments:
        return int(arguments["unbiased"])
    given = arguments.get("correction")
    given = 1 if given is None else given
    return int(given) if given in (0, 1) and not isinstance(given, Tensor) else None

