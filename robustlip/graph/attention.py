"""Finds self-attention in a program, and replaces it by one node from the tokens x to the attention output.

    q, k, v = moved(linear(x)), …      logits = scale·q kᵀ + mask      o = softmax(logits) v      y = linear(moved(o))

The moving operations (split, view, transpose, …) are not interpreted one by one. They are run on the indices of numbers, and the result says which
row of which matrix each number of q, k, v is. This is valid for any values, because these operations only move numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robustlip.graph.operations import is_identity, own, source_of
from robustlip.graph.program import TRIED, Node, Program, at, rewritten
from robustlip.layers import Attention

# Operations that neither move nor change numbers, if `is_identity` confirms it.
_COPIES = frozenset("dropout to type_as _to_copy contiguous clone alias detach".split())
# These, and operations that move or repeat numbers.
_MOVES = frozenset(
    "view reshape _unsafe_view flatten unflatten unsqueeze squeeze transpose swapaxes permute movedim moveaxis t numpy_T mT expand expand_as "
    "repeat repeat_interleave select slice narrow chunk split split_with_sizes unbind getitem".split()
) | _COPIES  # fmt: skip
# The batch size for which indices are computed.
_SAMPLES = TRIED[0]


def with_attention(program: Program) -> Program:
    """The program with each supported self-attention replaced by a node 'attention'; unsupported ones stay as recorded."""
    finder = _Finder(program)
    replaced = dict(pair for node in program.nodes if (pair := finder.of(node)) is not None)
    return rewritten(program, replaced) if replaced else program


@dataclass
class _Heads:
    """Queries, keys or values: head h of a token is the `width` outputs of a linear node from first + (h // group)·width on. group: how many
    consecutive heads share the same outputs."""

    linear: Node
    source: Node
    first: int
    heads: int
    group: int
    width: int
    angles: tuple[Tensor, Tensor] | None = None


class _NotAttention(Exception):
    """The nodes are not a supported attention."""


class _Finder:
    def __init__(self, program: Program) -> None:
        self.users: dict[Node, list[Node]] = {}
        for node in program.nodes:
            for read in dict.fromkeys(node.inputs):
                self.users.setdefault(read, []).append(node)
        self.output = program.output

    def of(self, node: Node) -> tuple[Node, Node] | None:
        """(the node to replace, the attention node); None if `node` is not attention or not a supported one."""
        try:
            if node.op == "scaled_dot_product_attention":
                return self._fused(node)
            if node.op in ("matmul", "bmm") and _softmax_of(node.arguments.get("self")) is not None:
                return self._explicit(node)
        except _NotAttention:
            return None
        return None

    def _fused(self, node: Node) -> tuple[Node, Node]:
        a = node.arguments
        if a["dropout_p"] or isinstance(a["attn_mask"], Node):
            raise _NotAttention
        q, k, v = (_heads(a[name]) for name in ("query", "key", "value"))
        scale = q.width**-0.5 if a["scale"] is None else float(a["scale"])
        return self._made(node, q, k, v, {"logit_scale": scale, "mask": _mask(a["attn_mask"]), "causal": bool(a["is_causal"])})

    def _explicit(self, node: Node) -> tuple[Node, Node]:
        softmax = _softmax_of(node.arguments["self"])
        assert softmax is not None
        if softmax.arguments["dim"] not in (-1, 3) or softmax.arguments.get("dtype") not in (None, node.dtype):
            raise _NotAttention
        how: dict[str, Any] = {"explicit": "logits", "logit_scale": 1.0, "causal": False}
        logits = _before_copies(softmax.arguments["self"])
        if logits.op == "masked_fill" and isinstance(logits.arguments["mask"], Tensor) and not isinstance(logits.arguments["value"], Node):
            if float(logits.arguments["value"]) > -1e30:
                raise _NotAttention
            hidden = _mask(logits.arguments["mask"])
            assert hidden is not None
            how |= {"mask": ~hidden.bool(), "mask_fill": True}
            logits = _before_copies(logits.arguments["self"])
        elif logits.op == "add" and isinstance(logits.arguments["other"], Tensor) and logits.arguments["alpha"] == 1:
            how["mask"] = _mask(logits.arguments["other"])
            logits = _before_copies(logits.arguments["self"])
        if logits.arguments.get("rounding_mode") is not None:
            raise _NotAttention
        if logits.op in ("mul", "div") and not isinstance(logits.arguments["other"], Node):
            number = float(logits.arguments["other"])
            how |= {"logit_scale": number} if logits.op == "mul" else {"explicit": "divide", "divisor": number, "logit_scale": None}
            logits = _before_copies(logits.arguments["self"])
        if logits.op not in ("matmul", "bmm"):
            raise _NotAttention
        query = logits.arguments["self"]
        scaled = _before_copies(query)
        plain = how["explicit"] == "logits" and how["logit_scale"] == 1.0
        if plain and scaled.op in ("mul", "div") and scaled.arguments.get("rounding_mode") is None:
            by = scaled.arguments["other"]
            if not isinstance(by, Node | Tensor):
                how |= {"explicit": "query", **({"logit_scale": float(by)} if scaled.op == "mul" else {"logit_scale": None, "divisor": float(by)})}
                query = scaled.arguments["self"]
        key, value = (n.arguments.get("other", n.arguments.get("mat2")) for n in (logits, node))
        return self._made(node, _heads(query), _heads(key, across=True), _heads(value), how)

    def _made(self, node: Node, q: _Heads, k: _Heads, v: _Heads, how: dict[str, Any]) -> tuple[Node, Node]:
        x = q.source
        same = k.source is x and v.source is x and not x.refusal and not x.merged and len(x.shape) == 2
        shapes = q.group == 1 and k.heads == v.heads == q.heads and k.group == v.group and q.width == k.width == v.width
        if not (same and shapes) or (q.angles is None) != (k.angles is None) or v.angles is not None:
            raise _NotAttention
        if q.angles is not None and k.angles is not None:
            if not all(torch.equal(a, b) for a, b in zip(q.angles, k.angles, strict=True)):
                raise _NotAttention
            how["angles"] = q.angles
        heads, key_heads, d = q.heads, k.heads // k.group, q.width
        rows = {"query": heads * d, "key": key_heads * d, "value": key_heads * d}
        joined = q.linear is k.linear is v.linear
        starts = (0, heads * d, (heads + key_heads) * d) if joined else (0, 0, 0)
        parts = {"projection": q.linear} if joined else {"query": q.linear, "key": k.linear, "value": v.linear}
        sizes = [sum(rows.values())] if joined else list(rows.values())
        weights = {name: _weights(linear) for name, linear in parts.items()}
        if (q.first, k.first, v.first) != starts or [len(weight) for weight, _ in weights.values()] != sizes:
            raise _NotAttention
        end, projection = self._end(node, heads, d, x)
        if projection is not None:
            weights["output"] = _weights(projection)
        biased = [name in weights and weights[name][1] is not None for name in ("query", "key", "value", "output")]
        if joined:
            biased[0] = weights["projection"][1] is not None
        width = x.shape[-1]
        layer = Attention(
            width, heads, head_width=d, key_heads=key_heads, biases=tuple(biased), joined=joined, output=projection is not None, output_scale=1.0,
            rope=False, **how,
        )  # fmt: skip
        for name, (weight, bias) in weights.items():
            linear = getattr(layer, name)
            linear.register_parameter("weight", own(weight))
            if bias is not None:
                linear.register_parameter("bias", own(bias))
        return end, replace(end, op="attention", arguments={"self": x, "layer": layer}, refusal="", merged=False)

    def _end(self, node: Node, heads: int, width: int, x: Node) -> tuple[Node, Node | None]:
        """(the node that holds the attention output or its projection as tokens (N, T, ·), the projection)."""
        length, here = x.shape[0], node
        inner = heads * width
        tokens = torch.arange(_SAMPLES * length).view(_SAMPLES, 1, length, 1)
        place = tokens * inner + torch.arange(heads).view(-1, 1, 1) * width + torch.arange(width)
        if node.op == "bmm":
            raise _NotAttention
        plain: Node | None = None
        projection: Node | None = None
        size = inner
        while True:
            if not here.refusal and not here.merged and torch.equal(place, torch.arange(_SAMPLES * length * size).view(_SAMPLES, length, size)):
                if projection is not None:
                    return here, projection
                plain = here
            users = self.users.get(here, [])
            if len(users) != 1 or here is self.output:
                break
            user = users[0]
            if user.op in _MOVES:
                made = _run(user, {here: place})
                if not isinstance(made, Tensor):
                    break
                place, here = made, user
            elif user.op in ("linear", "addmm") and projection is None:
                weight, _ = _weights(user)
                rows = place[..., :1] // inner
                if weight.shape[1] != inner or not torch.equal(place, rows * inner + torch.arange(inner)):
                    break
                projection, size, here = user, len(weight), user
                place = rows * size + torch.arange(size)
            else:
                break
        if plain is None:
            raise _NotAttention
        return plain, None


def _softmax_of(value: Any) -> Node | None:
    found = _before_copies(value) if isinstance(value, Node) else None
    return found if found is not None and found.op in ("softmax", "_softmax") else None


def _before_copies(node: Any) -> Node:
    """The value before operations that neither move nor change numbers in eval mode."""
    while isinstance(node, Node) and node.op in _COPIES:
        node = _argument_of(node)
    if not isinstance(node, Node):
        raise _NotAttention
    return node


def _argument_of(node: Node) -> Node:
    """The argument of a moving operation. Raises _NotAttention for several arguments, a cast to another dtype and random numbers."""
    source = source_of(node)
    if source is None or (len(node.inputs) != 1 and node.op != "type_as") or (node.op in _COPIES and not is_identity(node)):
        raise _NotAttention
    return source


def _mask(mask: Tensor | None) -> Tensor | None:
    """A constant mask as (T, T) or (H, T, T)."""
    while mask is not None and mask.dim() > 2 and len(mask) == 1:
        mask = mask[0]
    if mask is not None and mask.dim() not in (2, 3):
        raise _NotAttention
    return mask


def _weights(node: Node) -> tuple[Tensor, Tensor | None]:
    """(weight (out, in), bias) of a linear node. Raises _NotAttention if its matrix depends on the input."""
    a = node.arguments
    if node.op == "linear":
        weight, bias = a["weight"], a["bias"]
    else:
        if a["alpha"] != 1 or a["beta"] != 1:
            raise _NotAttention
        weight, bias = a["mat2"], a["self"]
        weight = weight.t() if isinstance(weight, Tensor) else weight
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)) or (bias is not None and bias.dim() != 1):
        raise _NotAttention
    return weight, bias


def _origin(node: Node) -> Node:
    """The value that a sequence of moving operations starts from."""
    while node.op in _MOVES:
        node = _argument_of(node)
    return node


def _run(node: Node, known: dict[Node, Any]) -> Any:
    """The value of a node for given values of other nodes, computed by torch's own operations."""
    memory = dict(known)

    def value(part: Any) -> Any:
        if isinstance(part, Node):
            if part not in memory:
                memory[part] = compute(part)
            return memory[part]
        return [value(p) for p in part] if isinstance(part, list) else at(part, _SAMPLES)

    def compute(this: Node) -> Any:
        if this.op in _COPIES:
            made = value(_argument_of(this))
            return made.contiguous() if this.op in ("contiguous", "clone") else made  # a later view requires it
        if this.op == "getitem":
            return value(this.arguments["self"])[this.arguments["index"]]
        return this.target(**{name: value(a) for name, a in this.arguments.items()})

    try:
        return value(node)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise _NotAttention from error


def _heads(node: Any, across: bool = False) -> _Heads:
    """The rows of a linear node's output that form the queries, keys or values (N, H, T, d); across: they are transposed, (N, H, d, T)."""
    if not isinstance(node, Node):
        raise _NotAttention
    top = _turned(node)
    linear = _origin(node if top is None else top.terms[0])
    if linear.op not in ("linear", "addmm"):
        raise _NotAttention
    read = linear.arguments["input" if linear.op == "linear" else "mat1"]
    if not isinstance(read, Node):
        raise _NotAttention
    x = read
    while x.op in _MOVES and (x.refusal or x.merged or len(x.shape) != 2):
        x = _argument_of(x)
    if x.refusal or x.merged or len(x.shape) != 2:
        raise _NotAttention
    length, width = x.shape
    rows = torch.arange(_SAMPLES * length).view(_SAMPLES, length, 1) * width + torch.arange(width)
    moved = _run(read, {x: rows})
    token = moved[..., :1] // width
    if moved.shape[-1] != width or not torch.equal(moved, token * width + torch.arange(width)):
        raise _NotAttention
    size = len(_weights(linear)[0])
    places = token * size + torch.arange(size)
    known = {linear: places}
    if top is None:
        place, angles = _run(node, known), None
    else:
        place, angles = _turned_places(node, top, known)
    if across:
        place = place.mT
    if place.dim() != 4 or place.shape[0] != _SAMPLES or place.shape[2] != length:
        raise _NotAttention
    heads, d = place.shape[1], place.shape[3]
    starts = place[0, :, 0, 0]
    first = int(starts[0])
    group = int((starts == first).sum())
    expected = first + (torch.arange(heads) // group) * d
    tokens = torch.arange(_SAMPLES * length).view(_SAMPLES, 1, length, 1) * size
    if not torch.equal(place, tokens + expected.view(-1, 1, 1) + torch.arange(d)) or heads % group:
        raise _NotAttention
    return _Heads(linear, x, first, heads, group, d, angles)


# ---- rotary positions


@dataclass
class _Turn:
    """x·cos + (−x₂, x₁)·sin, as one expression or for each half: its last node `top`, the terms, and the two tables."""

    top: Node
    terms: tuple[Node, Node]
    cos: Tensor
    sin: Tensor
    by_halves: bool

    def places(self, known: dict[Node, Tensor]) -> Tensor:
        """The indices of x at which `top` has its rotation. Raises _NotAttention unless the terms are x and (−x₂, x₁), or x₁ and x₂."""
        first, second = (_run(term, known) for term in self.terms)
        if self.by_halves:
            return torch.cat([first, second], -1)
        # Indices start at 1, so that a changed sign is visible.
        turned = _run(self.terms[1], {self.terms[0]: first + 1})
        half = first.shape[-1] // 2
        if first.shape[-1] % 2 or not torch.equal(turned, torch.cat([-(first[..., half:] + 1), first[..., :half] + 1], -1)):
            raise _NotAttention
        return first


def _turned(node: Node) -> _Turn | None:
    """The rotation whose result moving operations carry to `node`, if there is one."""
    top = _origin(node)
    if top.op == "add" and top.arguments["alpha"] == 1:
        for first, second in (("self", "other"), ("other", "self")):
            (x, cos), (halves, sin) = (_factors(top.arguments[name]) for name in (first, second))
            if x is not None and halves is not None and halves.op == "cat" and x.op != "cat":
                return _Turn(top, (x, halves), cos, sin, False)
    if top.op == "cat" and len(top.arguments["tensors"]) == 2 and top.arguments["dim"] in (-1, 3):
        low, high = top.arguments["tensors"]
        if not (isinstance(low, Node) and isinstance(high, Node) and (low.op, high.op) == ("sub", "add")):
            return None
        if low.arguments["alpha"] != 1 or high.arguments["alpha"] != 1:
            return None
        (a, cos), (b, sin) = (_factors(low.arguments[name]) for name in ("self", "other"))
        terms = [_factors(high.arguments[name]) for name in ("self", "other")]
        if a is None or b is None or {term for term, _ in terms} != {a, b}:
            return None
        tables = dict(terms)
        return _Turn(top, (a, b), torch.cat([cos, tables[b]], -1), torch.cat([sin, tables[a]], -1), True)
    return None


def _factors(node: Any) -> tuple[Node | None, Any]:
    """(x, c) for x·c with a constant tensor c; (None, None) for anything else."""
    if not isinstance(node, Node) or node.op != "mul":
        return None, None
    a, b = node.arguments["self"], node.arguments["other"]
    if isinstance(a, Node) and isinstance(b, Tensor):
        return a, b
    return (b, a) if isinstance(b, Node) and isinstance(a, Tensor) else (None, None)


def _turned_places(node: Node, turn: _Turn, known: dict[Node, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(indices of x at `node`, the tables (T, d) there). Raises _NotAttention if heads or halves do not stay together."""
    place = turn.places(known)
    try:
        tables = [table.detach().expand(place.shape) for table in (turn.cos, turn.sin)]
    except RuntimeError as error:
        raise _NotAttention from error
    d = place.shape[-1]
    half = torch.arange(d).expand(place.shape)  # the position of a number in its head: it must be the same after the moves
    there, inside, *tables = (_run(node, {turn.top: value}) for value in (place, half, *tables))
    if d % 2 or there.dim() != 4 or not torch.equal(inside, torch.arange(d).expand(inside.shape)):
        raise _NotAttention
    found = []
    for table in tables:
        first = table[0, 0]
        if table.shape != there.shape or not torch.equal(table, first.expand_as(table)):
            raise _NotAttention
        found.append(first.clone())
    return there, (found[0], found[1])
