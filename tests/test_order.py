"""Expansions remember nothing: what they are asked twice, or in another order, they answer the same to the last bit.

Every expansion is asked all that it is ever asked, at several ε, before and after its adjoint, on its own and after everything else. What is known
of a change is passed to `advance`; a layer that knows the way to it, or single tokens, is another expansion, and the one it came from stays.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_local import CASES, D, T, case_of, expanded, gpt_blocks, nested, samples, tokens
from torch import Tensor, nn

from robustlip.domains.expansion import Ball, ChainExpansion, Expansion, JacobianChain, Scope, SplitChange, expand
from robustlip.domains.expansion.dual import Rivals, single_token_reference
from robustlip.domains.expansion.local import Reference, reference_of
from robustlip.domains.norms import Context
from robustlip.layers import MaxMin, MeanTokens
from robustlip.models import LipschitzGPT
from robustlip.ops.convolution import TRANSPOSED
from robustlip.ops.moves import is_move
from robustlip.threats import EmbeddingBall, Threat, WeightBall

FOLDER = Path(__file__).resolve().parents[1] / "robustlip" / "domains" / "expansion"
Question = Callable[[Any], object]


def bits(value: object) -> object:
    """All numbers inside, to the last bit: of tensors, what is made of them, and expansions with all that they hold."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: bits(inner) for key, inner in value.items() if key != "store"}  # the store keeps constants of the weights
    if isinstance(value, (tuple, list)):
        return [bits(inner) for inner in value]
    if isinstance(value, nn.Module):
        return bits(value.state_dict())
    if isinstance(value, Expansion):
        return type(value).__name__, bits(vars(value))
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, bits({f.name: getattr(value, f.name) for f in fields(value)})
    return repr(value) if isinstance(value, float) else value


def check(one: Any, asked: list[Question]) -> None:
    """Compares copies that get one call each with an object that gets all calls, in both orders: equal results, and the object does not change."""
    before = bits(one)
    alone = [bits(ask(copy.deepcopy(one))) for ask in asked]
    for order in (range(len(asked)), reversed(range(len(asked)))):
        for i in order:
            assert bits(asked[i](one)) == alone[i], i
    assert bits(one) == before


def balls(shape: tuple[int, ...]) -> list[Ball]:
    """At several ε, with weights that stay and with weights that move."""
    sizes = torch.linspace(0.5, 1.0, shape[0] * shape[1], dtype=torch.float64).view(shape)
    plain = [Ball.of(radius * sizes) for radius in (0.01, 1.0)]
    return plain + [replace(Ball.of(ball.radius, 0.1 * ball.radius[:, 0]), error=0.3 * ball.radius) for ball in plain]


def asked_of(expansion: Expansion, given: list[Ball]) -> list[Question]:
    g = torch.randn(2, *expansion.clean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first: list[Question] = [lambda e, ball=ball, remainder=remainder: e.advance(ball, remainder) for ball in given for remainder in (True, False)]
    return [*first, lambda e: e.adjoint(g), lambda e: e.adjoint(g, two_sided=True), lambda e: e.lipschitz()]


def asked_of_one(expansion: Expansion) -> list[Question]:
    """As asked_of, of single tokens: with what is known of the way, and of functionals, at one ε and not at another."""
    given = balls((len(expansion.clean), 1))
    for ball in list(given):
        known = replace(ball, split=SplitChange(ball.radius, 0.1 * ball.radius))
        asked = expansion.functionals()
        given.append(known)
        if asked is not None:
            given.append(replace(known, functionals=replace(asked, sizes=0.01 * asked.vectors.norm(dim=-1) * ball.radius[:, 0])))
    return [*asked_of(expansion, given), lambda e: e.functionals(), lambda e: e.jacobian()]


def kinds(expansion: Expansion) -> set[type]:
    """Classes of an expansion and of all inside it."""
    inner = [e for value in vars(expansion).values() for e in (value if isinstance(value, list) else [value]) if isinstance(e, Expansion)]
    return {type(expansion)}.union(*(kinds(e) for e in inner)) if inner else {type(expansion)}


def of_case(name: str) -> ChainExpansion:
    case, layer = case_of(name)
    return expanded(case, layer, samples(case, 4))


def of_table() -> Expansion:
    torch.manual_seed(0)
    return expand(nn.Embedding(5, D).double().requires_grad_(False), torch.arange(6).view(2, 3) % 5, Scope(Context(torch.float32, {})))


# name → chains of layers that act on tokens, all as wide as their input: single tokens go through exact Jacobians.
CHAINS: dict[str, Callable[[], list[nn.Module]]] = {
    "blocks": lambda: list(gpt_blocks()),
    "blocks-relu": lambda: list(gpt_blocks(False, nn.ReLU)),
    "blocks-maxmin": lambda: list(gpt_blocks(False, MaxMin)),
    **nested(),
}
BY_TOKEN = [
    name for name, case in CASES.items()
    if case.shape == (T, D) and not case.whole and not any(isinstance(m, (nn.Flatten, MeanTokens)) or is_move(m) for m in case.build().modules())
]  # fmt: skip


def single_tokens(full: ChainExpansion, rounding: float = 1e-6) -> ChainExpansion:
    count = len(full.clean)
    radii = torch.full(full.clean.shape[:2], rounding, dtype=torch.float64)
    return full.at_rows(torch.arange(count), torch.arange(count) % T, radii)


def with_input_map(rows: ChainExpansion) -> ChainExpansion:
    m = torch.randn(len(rows.clean), D, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return rows.with_input_map(m, torch.full((len(m),), 1.5, dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_expansions_answer_the_same_in_any_order(name) -> None:
    expansion, case = of_case(name), CASES[name]
    given = balls(tuple(tokens(case, samples(case, 4)).shape[:2]))
    if any(isinstance(m, TRANSPOSED) for m in case.build().modules()):  # their weights may not move
        given = [ball for ball in given if ball.weight_radius is None]
    check(expansion, asked_of(expansion, given))


def test_a_table_of_tokens_answers_the_same_in_any_order() -> None:
    check(of_table(), asked_of(of_table(), balls((2, 3))))


@pytest.mark.parametrize("name", BY_TOKEN)
def test_single_tokens_answer_the_same_in_any_order(name) -> None:
    rows = single_tokens(of_case(name))
    for one in (rows, with_input_map(rows)):
        check(one, asked_of_one(rows))


def chain_of(name: str) -> ChainExpansion:
    torch.manual_seed(1)
    layers = [layer.double().requires_grad_(False) for layer in CHAINS[name]()]
    x = torch.randn(4, T, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return ChainExpansion(layers, x, Scope(Context(torch.float64, {})))


@pytest.mark.parametrize("name", CHAINS)
def test_chains_through_jacobians_answer_the_same_in_any_order(name) -> None:
    through = JacobianChain(single_tokens(chain_of(name)))
    check(through, asked_of(through, balls((4, 1))))


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_made_of_an_expansion_leaves_it_as_it_was(name) -> None:
    """Single tokens, layers that know the way and chains through Jacobians share tensors with what they were made from."""
    full = chain_of(name)
    before = bits(full)
    rows = single_tokens(full)
    asked, wanted = asked_of_one(rows), bits(rows)
    answers = [bits(ask(rows)) for ask in asked]
    for ball in balls((4, T)):
        full.advance(ball)
        assert bits(single_tokens(full)) == wanted  # what arrived is an argument, not what the last walk saw
    told, through = with_input_map(rows), JacobianChain(rows)
    for ball in balls((4, 1)):
        through.advance(ball)
        told.advance(replace(ball, split=SplitChange(ball.radius, ball.radius)))
    assert bits(full) == before and bits(rows) == wanted
    assert [bits(ask(rows)) for ask in asked] == answers


def test_what_arrives_makes_a_difference() -> None:
    """Of the comparisons above: rounding of the other tokens is seen, and so is what a single token knows of its way."""
    full = chain_of("blocks")
    small, large = (single_tokens(full, rounding).advance(balls((4, 1))[0]).radius for rounding in (1e-6, 1e-2))
    assert (large > small)[:, 0].tolist() == [False, True, True, False]  # of a first token nobody else is seen
    ball = balls((4, 1))[1]
    told = with_input_map(single_tokens(full))
    known = replace(ball, split=SplitChange(0.01 * ball.radius, 0 * ball.radius))
    assert bool((told.advance(known).radius < told.advance(ball).radius).all())


THREATS = {
    "last token": EmbeddingBall(tokens=(-1,)), "all tokens": EmbeddingBall(), "weights": WeightBall("spectral"),
    "weights absolute": WeightBall("frobenius", relative=False),
}  # fmt: skip


def reference_at(threat: Threat) -> tuple[Reference, Tensor]:
    torch.manual_seed(0)
    model = LipschitzGPT("abcdefgh", 8, 2, 2).double().requires_grad_(False)
    x = torch.randint(8, (4, 3), generator=torch.Generator().manual_seed(0))
    y = model.scores(x).argmax(-1)
    relative = getattr(threat, "relative", True)
    reference = reference_of(model, x, y, threat, Context(torch.float64, {}, relative=relative))
    alone = threat == EmbeddingBall(tokens=(-1,))
    return (single_token_reference(reference, torch.arange(4), torch.full((4,), 2)) if alone else reference), y


@pytest.mark.parametrize("name", THREATS)
def test_references_answer_the_same_in_any_order(name) -> None:
    """ε is not stored: neither the radius of weights of the last pass nor bounds at that ε."""
    threat = THREATS[name]
    radii = [torch.linspace(0.5, 1.0, 4, dtype=torch.float64) * size for size in (0.01, 0.3, 0.0)]
    still = torch.ones(4, dtype=torch.float64)
    asked: list[Question] = []
    for epsilon in radii:
        asked += [
            lambda r, epsilon=epsilon: r.hidden(epsilon), lambda r, epsilon=epsilon: r.bounds_at(epsilon),
            lambda r, epsilon=epsilon: r.logit_error(still, epsilon), lambda r, epsilon=epsilon: r.head_change(epsilon),
        ]  # fmt: skip
    check(reference_at(threat)[0], asked)
    if isinstance(threat, WeightBall):
        moved = [reference_at(threat)[0].logit_error(still, epsilon) for epsilon in radii]
        assert bool((moved[0] < moved[1]).all()) and bool((moved[2] < moved[0]).all())


@pytest.mark.parametrize("name", ["last token", "all tokens"])
def test_rivals_answer_the_same_in_any_order(name) -> None:
    reference, y = reference_at(THREATS[name])
    others = reference.margin.argsort(-1)[:, :-1].T
    asked: list[Question] = []
    for size in (0.3, 1e-3, 3.0):
        epsilon = torch.full((4,), size, dtype=torch.float64)
        asked += [
            lambda r, epsilon=epsilon: r.decreases(reference, epsilon),
            lambda r, epsilon=epsilon: r.contested(reference, epsilon).decreases(reference, epsilon),
            lambda r, epsilon=epsilon: r.with_forms(reference, epsilon).decreases(reference, epsilon),
        ]  # fmt: skip
    check(Rivals.of(reference, y, others), asked)
    rivals, epsilon = Rivals.of(reference, y, others), torch.full((4,), 0.3, dtype=torch.float64)
    forms = [getattr(w, "forms", None) for w in rivals.with_forms(reference, epsilon).weights]
    assert any(form is not None for form in forms) and all(getattr(w, "forms", None) is None for w in rivals.weights)


def test_every_class_of_expansion_was_asked() -> None:
    asked = kinds(of_table()).union(*(kinds(of_case(name)) for name in CASES), *(kinds(single_tokens(of_case(name))) for name in BY_TOKEN))
    asked |= kinds(JacobianChain(single_tokens(chain_of("blocks"))))

    def below(kind: type) -> set[type]:
        return {kind}.union(*(below(inner) for inner in kind.__subclasses__()))

    those = {kind for kind in below(Expansion) if kind.__module__.startswith("robustlip.")}
    missing = {kind.__name__ for kind in those - asked if not kind.__subclasses__()}  # the others are what several share
    assert len(those) > 20 and not missing, missing


CHANGES = {"append", "extend", "insert", "pop", "clear", "update", "setdefault", "add", "remove", "sort", "reverse"}


def of_self(node: ast.expr) -> bool:
    """Whether an expression is self, or an attribute or entry of it."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "self"


def changes_of_self(function: ast.AST) -> list[int]:
    """Lines that write into self: attributes, entries, tensors and lists in it."""
    found = []
    for node in ast.walk(function):
        targets: list[ast.expr] = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = [inner for target in node.targets for inner in (target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target])]
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            in_place = name in CHANGES or (name.endswith("_") and not name.startswith("_"))
            targets = [node.func.value] if in_place and of_self(node.func.value) else []
            targets += node.args[:1] if name == "__setattr__" else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            targets = node.args[:1]
        found += [node.lineno for target in targets if of_self(target)]  # type: ignore[attr-defined]
    return found


def test_no_method_of_an_expansion_writes_into_it() -> None:
    """Of every class in the folder, whether a case has it or not: after __init__ nothing is assigned, and no function keeps a variable outside."""
    seen, writes = 0, []
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        writes += [f"{path.name}:{node.lineno}" for node in ast.walk(tree) if isinstance(node, (ast.Nonlocal, ast.Global))]
        for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for function in (node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name != "__init__"):
                seen += 1
                writes += [f"{path.name}:{line}" for line in changes_of_self(function)]
    assert seen > 50 and not writes
    said = ["self.a = x", "self.b[0] += x", "self.c.copy_(x)", "self.d.append(x)", "setattr(self, 'e', x)", "self.g, y = x", "del self.h.i"]
    assert all(changes_of_self(ast.parse(line)) == [1] for line in said) and not changes_of_self(ast.parse("other.a = self.b + x"))
