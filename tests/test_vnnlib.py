"""VNN-LIB properties: reading files, proofs on boxes of inputs, and results that are not contradicted."""

from __future__ import annotations

import os
import random
import re
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import robustlip
from robustlip.certifiers import boxes
from robustlip.certifiers.boxes import outputs_hold, widened_by_rounding
from robustlip.data.vnnlib import read_instances, read_property
from robustlip.domains.lines import outputs
from robustlip.domains.lines.crown import Tunable
from robustlip.domains.lines.outputs import ExecutedNetwork, crown_lower_bounds, holds, input_box
from robustlip.domains.norms import Context
from robustlip.errors import BadInput
from robustlip.layers import Chain, Shift, as_chain
from robustlip.vnncomp import decide

DECLARED = "(declare-const X_0 Real)\n(declare-const X_1 Real)\n(declare-const Y_0 Real)\n(declare-const Y_1 Real)\n(declare-const Y_2 Real)\n"
BOX = "(assert (>= X_0 -1)) (assert (<= X_0 0.1)) ; a comment (\n(assert (and (>= X_1 2e-1) (<= X_1 .3)))\n"
ROBUST = "(assert (or (and (>= Y_0 Y_1))(and (>= Y_2 Y_1))))"


def written(text: str, folder: Path, name: str = "p.vnnlib") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# ---- files


def test_a_property_is_what_the_file_says(tmp_path) -> None:
    prop = read_property(written(DECLARED + BOX + ROBUST, tmp_path))
    assert prop.box(prop.cases[0]) == ([Fraction(-1), Fraction(1, 5)], [Fraction(1, 10), Fraction(3, 10)])
    assert prop.label == 1 and len(prop.cases) == 2 and prop.outputs == 3
    cases = "(assert (or (and (>= X_0 0) (<= X_0 1) (<= Y_0 2.5) (>= (+ Y_1 (* 2 Y_2)) 3)) (<= (- X_1) 0)))"
    text = DECLARED + cases + "(assert (<= X_1 1)) (assert (<= Y_0 Y_1))"
    prop = read_property(written(text, tmp_path))
    first, second = prop.cases
    assert first.low == {0: 0} and first.high == {0: 1} and second.low == {1: 0} and prop.high == (None, 1) and prop.label is None
    assert [(row.weights, row.constant) for row in first.rows] == [
        ({0: 1}, Fraction(-5, 2)), ({1: -1, 2: -2}, 3), ({0: 1, 1: -1}, 0),
    ]  # fmt: skip
    with pytest.raises(BadInput, match="without one of X_1"):
        prop.box(first)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no inputs"),
        (DECLARED + BOX, "no assertion about outputs"),
        (DECLARED + BOX + "(assert (< Y_0 1))", "the expression"),
        (DECLARED + BOX + "(assert (not (<= Y_0 1)))", "the expression"),
        (DECLARED + BOX + "(assert (<= X_0 Y_0))", "a comparison of X_0, Y_0"),
        (DECLARED + BOX + "(assert (<= (+ X_0 X_1) 1))", "a comparison of X_0, X_1"),
        (DECLARED + BOX + "(assert (<= (* Y_0 Y_1) 1))", "linear expression"),
        (DECLARED + BOX + "(assert (<= Y_7 1))", "not declared"),
        (DECLARED + BOX + "(assert (<= Y_0 1e9999))", "a number was expected"),
        (DECLARED + BOX + "(assert (<= Y_0 1e999))", "above 1e300"),
        (DECLARED + BOX + "(assert (<= (* 1e-200 X_0) 1e200))", "above 1e300"),
        (DECLARED + BOX + "(assert (<= Y_0 nan))", "a number was expected"),
        (DECLARED + BOX + "(assert (<= 1 2))", "a comparison of numbers"),
        (DECLARED + "(declare-const X_5 Real)" + BOX + ROBUST, "gaps"),
        (DECLARED + "(declare-const X_0 Real)", "a declaration"),
        ("(declare-const X_99999999 Real)", "a declaration"),
        ("(declare-const x Int)", "a declaration"),
        ("(vnnlib-version <2.0>)", "the command"),
        (DECLARED + "(" * 100, "nested"),
        (DECLARED + "(assert (<= Y_0 1)", "not closed"),
        (DECLARED + ")", "without an opening one"),
        (DECLARED + "(assert " + "1" * 200 + ")", "a word of 200"),
        (DECLARED + BOX + "(assert (or (<= Y_0 1) (<= Y_1 1)))" * 12, "more than 2000 cases"),
        (DECLARED + BOX + "(assert (>= X_0 0.5))" + ROBUST, "from a smaller to a larger"),
        (DECLARED + BOX + "(assert (or))" + ROBUST, "without arguments"),
    ],
)  # fmt: skip
def test_what_is_no_property_is_refused(text, words, tmp_path) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        prop = read_property(written(text, tmp_path))
        prop.box(prop.cases[0])
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def test_changed_properties_end_in_one_sentence(tmp_path) -> None:
    rng, text = random.Random(0), DECLARED + BOX + ROBUST
    for _ in range(400):
        changed = list(text[: rng.randrange(len(text))] if rng.random() < 0.2 else text)
        for _ in range(rng.choice((1, 2, 9))):
            if changed:
                changed[rng.randrange(len(changed))] = rng.choice("()<>=-+*. XY019e\0é;\n")
        try:
            prop = read_property(written("".join(changed), tmp_path))
            prop.box(prop.cases[0])
        except BadInput as error:
            assert ";" in str(error)


def test_instances_stay_in_their_folder(tmp_path) -> None:
    written("", tmp_path, "a.onnx")
    written("", tmp_path, "p.vnnlib.gz")
    found = read_instances(written("a.onnx,p.vnnlib,12\n\na.onnx,q.vnnlib\n", tmp_path, "instances.csv").parent)
    assert [(i.network.name, i.property.name, i.seconds) for i in found] == [("a.onnx", "p.vnnlib.gz", 12.0), ("a.onnx", "q.vnnlib", 0.0)]
    for line in ("../a.onnx,p.vnnlib,1", "/a.onnx,p.vnnlib,1", "a.onnx", "a.onnx,p.vnnlib,soon", "a\0,p,1", ""):
        written(line, tmp_path, "instances.csv")
        with pytest.raises(BadInput):
            read_instances(tmp_path)


def test_properties_of_a_winning_class_are_samples(tmp_path) -> None:
    def box(bounds: list[tuple[str, str]], label: int) -> str:
        lines = "".join(f"(assert (>= X_{i} {low}))(assert (<= X_{i} {high}))" for i, (low, high) in enumerate(bounds))
        return DECLARED + lines + "(assert (or" + "".join(f"(and (>= Y_{j} Y_{label}))" for j in range(3) if j != label) + "))"

    written(box([("0", "0.25"), ("0.4", "0.8")], 1), tmp_path, "a.vnnlib")  # 0.05 and 0.6, within 0.2, clipped at 0
    written(box([("0.1", "0.3"), ("0.5", "0.7")], 2), tmp_path, "b.vnnlib")
    data = robustlip.load_data(str(tmp_path / "a.vnnlib"))
    assert data.x.tolist() == [[pytest.approx(0.05), 0.6]] and data.y.tolist() == [1] and data.classes == 3
    assert data.note.startswith("boxes within linf 0.2") and 0.2 <= float(data.note.split()[-1]) < 0.2 + 1e-9
    listed = written("n.onnx,a.vnnlib,1\nn.onnx,b.vnnlib,1\nm.onnx,b.vnnlib,1\n", tmp_path, "instances.csv")
    data = robustlip.load_data(str(listed))
    assert data.x.shape == (2, 2) and data.y.tolist() == [1, 2] and " to 0.2" in data.note
    # A certificate of that radius is of the whole box.
    model = network(2, 8, 3)
    low, high = (torch.tensor([[0.0, 0.4], [0.1, 0.5]]), torch.tensor([[0.25, 0.8], [0.3, 0.7]]))
    assert bool(((data.x - low).abs() <= 0.2 + 1e-7).all() and ((data.x - high).abs() <= 0.2 + 1e-7).all())
    assert robustlip.certify(model, data.x, model(data.x.float()).argmax(1), "linf", "crown").radius.min() > 0
    written(DECLARED + BOX + "(assert (>= Y_0 1))", tmp_path, "c.vnnlib")
    wrong = ((tmp_path / "c.vnnlib", "requires a class"), (f"{tmp_path / 'a.vnnlib'}:test", "without a split"), (tmp_path / "d.vnnlib", "none there"))
    for spec, words in wrong:
        with pytest.raises(BadInput, match=words):
            robustlip.load_data(str(spec))


# ---- proofs


def network(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Chain:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), nn.ReLU()]
        with torch.no_grad():
            for p in layers[-2].parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / n**0.5)
    return as_chain(nn.Sequential(*layers[:-1]).eval().to(dtype))


def program(model: Chain, box: Any, shape: tuple[int, ...]) -> ExecutedNetwork:
    dtype = next(model.parameters()).dtype
    return ExecutedNetwork.of(model, shape, Context(dtype=dtype, store={}))


@pytest.mark.parametrize("kind", ["dense", "images", "shifted", "tanh"])
def test_bounds_hold_for_what_is_executed_and_rounding_counts(kind) -> None:
    """In bfloat16, on boxes of a single point: there the bound consists of rounding only, and the executed value is often below the exact one."""
    torch.manual_seed(3)
    shape: tuple[int, ...] = (6,)
    model = network(6, 32, 24, 4, seed=1)
    if kind == "images":
        shape = (2, 5, 5)
        layers = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)
        model = as_chain(nn.Sequential(*layers))
    if kind == "shifted":
        model = as_chain(nn.Sequential(Shift(torch.randn(6)), *model))
    if kind == "tanh":
        model = as_chain(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    model = model.eval().to(torch.bfloat16)
    count, rows = int(np.prod(shape)), torch.cat([torch.eye(4), -torch.eye(4)]).double()
    x = torch.randn(200, count).bfloat16().double()
    below = 0
    for width in (0.0, 0.05):
        half = width * torch.rand(200, count).double()
        box = input_box(x - half, x + half)
        executed = program(model, box, shape)
        with torch.no_grad():
            lower = crown_lower_bounds(executed, box, rows[None])
            exact = model.double()(x.reshape(200, *shape)) @ rows.mT
            model.to(torch.bfloat16)
            for _ in range(20):
                point = (x + (2 * torch.rand_like(x) - 1) * half).bfloat16()
                inside = ((point.double() >= x - half) & (point.double() <= x + half)).all(1)
                value = model(point.reshape(200, *shape)).double() @ rows.mT
                assert bool((lower <= value)[inside].all())
                below += int((value < exact - 1e-6)[inside].sum()) if width == 0 else 0
            if width == 0:
                assert bool((lower > exact - (4.0 if kind != "tanh" else 40.0)).all())
    assert below > 100


def test_roundings_that_add_up_are_covered() -> None:
    """Twenty additions in bfloat16 that each round back to 1: the executed value is 8 below the exact sum, and a relu after it is active."""
    shifts = [Shift(torch.tensor([0.4 * 2.0**-7])) for _ in range(20)]
    behind, last = nn.Linear(1, 1), nn.Linear(1, 2)
    with torch.no_grad():
        for layer, weight, bias in ((behind, -1.0, 1.03125), (last, 1.0, 0.0)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
    model = as_chain(nn.Sequential(*shifts, behind, nn.ReLU(), last).eval().to(torch.bfloat16))
    rows, x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double(), torch.ones(1, 1).double()
    with torch.no_grad():
        assert float(model(x.bfloat16())[0, 0]) > 0.03  # 0 in exact arithmetic
        executed = program(model, input_box(x, x), (1,))
        assert bool((crown_lower_bounds(executed, input_box(x, x), rows[None]) <= model(x.bfloat16()).double() @ rows.mT).all())
        # Of a product of many numbers any order counts, one after the other and rounded each time too.
        layer = nn.Linear(100, 1, bias=False)
        layer.weight.fill_(1.0)
        model = as_chain(nn.Sequential(layer, nn.ReLU(), last).to(torch.bfloat16))
        x = torch.full((1, 100), 1.203125).double()
        total = torch.zeros((), dtype=torch.bfloat16)
        for number in x[0].bfloat16():
            total = total + number
        box = input_box(x, x)
        lower = crown_lower_bounds(program(model, box, (100,)), box, rows[None])[0, 1]
        assert float(lower) <= float(total) < float(x.sum()) - 1


@pytest.mark.parametrize("seed", range(2))
def test_branch_and_bound_comes_close_to_the_least_value_and_never_above(seed) -> None:
    model = network(3, 10, 8, 2, seed=seed)
    low, high = torch.tensor([-1.0, -0.3, 0.2]).double(), torch.tensor([1.0, 0.9, 0.2]).double()
    grid = torch.stack(torch.meshgrid(*[torch.linspace(float(a), float(b), 61) for a, b in zip(low, high, strict=True)], indexing="ij"), -1)
    rows = torch.tensor([[1.0, -1.0], [0.5, 1.0]]).double()
    with torch.no_grad():
        values = model.double()(grid.reshape(-1, 3).double()) @ rows.mT
        model.float()
    least, spread = values.amin(0), float(values.max() - values.min())
    box = input_box(low[None], high[None])
    executed = program(model, box, (3,))
    crown = crown_lower_bounds(executed, box, rows[None])[0]
    assert bool((crown < least - 0.03 * spread).any())  # CROWN alone is not enough
    proved, ended = holds(executed, box, rows, least - 0.05 * spread, time.monotonic() + 30)
    assert bool(proved.all()) and not ended
    for r in range(2):
        assert not bool(holds(executed, box, rows[r : r + 1], least[r : r + 1] + 1e-4 * spread, time.monotonic() + 0.5)[0].any())
    # The same by halving the box.
    for offset, wanted in ((-0.05, True), (1e-4, False)):
        groups = [(rows[:1], least[:1] + offset * spread), (rows, least + offset * spread)]
        assert outputs_hold(model, low, high, groups, (3,), time.monotonic() + (30 if wanted else 0.5))[0] is wanted
    mixed = [(rows[:1], least[:1] - 0.5 * spread), (rows[1:], least[1:] + 1e-4 * spread)]  # every group has to be proved
    assert not outputs_hold(model, low, high, mixed, (3,), time.monotonic() + 0.5)[0]


@pytest.mark.parametrize("seed", range(3))
def test_any_slopes_and_multipliers_give_a_bound_and_cases_are_the_whole_box(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = network(3, 10, 8, 2, seed=seed)
    low, high = torch.tensor([[-1.0, -0.3, 0.2]]).double(), torch.tensor([[1.0, 0.9, 0.7]]).double()
    points = low + (high - low) * torch.rand(5_000, 3, generator=generator, dtype=torch.float64)
    row = torch.randn(1, 2, generator=generator).double()
    box = input_box(low, high)
    executed = program(model, box, (3,))
    with torch.no_grad():
        boxes_, stages = executed.boxes(box), executed.network.forward(points)
        value = stages[-1] @ row[0]
        below = 0
        for _ in range(40):
            sides = [torch.randint(-1, 2, l.shape, generator=generator).double() for l in boxes_.low]
            sides = [side * (torch.rand(side.shape, generator=generator) < 0.3) for side in sides]
            chosen = [torch.rand(l.shape, generator=generator, dtype=torch.float64) for l in boxes_.low]
            chosen += [torch.rand(l.shape, generator=generator, dtype=torch.float64) for l in boxes_.low]
            bound = outputs._backward(executed.network, box, boxes_, 2, row[:, None], None, Tunable(chosen[:2], chosen[2:], sides))[0, 0]
            there = torch.stack([(side * z >= 0).all(1) for side, z in zip(sides, stages, strict=False)]).all(0)
            assert bool((value[there] >= bound).all())
            below += int((value < bound).sum())
        assert below > 0  # known signs say something
        cases = outputs._Subproblems(
            row, list(boxes_.low), list(boxes_.high), *([torch.zeros_like(l) for l in boxes_.low] for _ in range(3)),
            torch.full((1,), -1e9).double(),
        )  # fmt: skip
        for _ in range(4):
            until = time.monotonic() + 60
            cases, seen = outputs._ascend(executed.network, box, boxes_.error, cases, torch.full((len(cases.row),), 1e9).double(), 5, until)
            assert all(bool((b >= 0).all()) and bool((b[s == 0] == 0).all()) for b, s in zip(cases.beta, cases.side, strict=True))
            parts = outputs._split(executed.network, cases, seen, [True, True])
            cases = outputs._Subproblems.joined(parts)
            inside = [
                ((z[:, None] >= l - 1e-9) & (z[:, None] <= h + 1e-9)).all(-1) for z, l, h in zip(stages, cases.low, cases.high, strict=False)
            ]
            assert bool(torch.stack(inside).all(0).any(1).all())


def test_points_are_rounded_before_the_network_sees_them() -> None:
    """A step of 2²⁴ behind a box of one number that float32 does not hold: the point that runs is another one."""
    model = as_chain(nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2)).eval())
    x = torch.tensor([0.1], dtype=torch.float64)
    low, high = widened_by_rounding(x, x, torch.float32)
    assert float(low) <= float(x.float()) <= float(high)
    assert float(high - low) < 1e-7
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[0].weight[0], model[0].bias[0] = 2.0**24, -float(np.float32(2.0**24 * 0.1))
        model[2].weight[0, 0] = 1.0
    # In real arithmetic 2²⁴·0.1 − fl(…) is one number; behind the rounding of 0.1 it is another.
    value = float(model(x.float()[None])[0, 0].detach())
    rows = torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
    assert not outputs_hold(model, x, x, [(rows, torch.tensor([-value + 1e-3], dtype=torch.float64))], (1,), time.monotonic() + 2)[0]


def test_a_model_that_is_not_plain_is_refused() -> None:
    model = network(3, 4, 2)
    model[0].register_forward_hook(lambda *a: None)
    with pytest.raises(BadInput, match="hooks"):
        outputs_hold(model, torch.zeros(3).double(), torch.ones(3).double(), [], (3,), time.monotonic() + 1)
    assert boxes.MOST_HALVED >= 5  # ACAS Xu is halved


# ---- verdicts


def acas(folder: Path) -> Any:
    pytest.importorskip("onnx")
    from onnx_files import made

    nodes, weights = [("Sub", "x m", "s"), ("Flatten", "s", "h0")], {"m": np.zeros((1, 1, 1, 2), np.float32)}
    rng = np.random.RandomState(4)
    for i, (n, m) in enumerate([(2, 16), (16, 16), (16, 3)]):
        weights |= {f"w{i}": rng.randn(n, m).astype(np.float32) / np.float32(n**0.5), f"b{i}": rng.randn(m).astype(np.float32)}
        nodes += [("MatMul", f"h{i} w{i}", f"p{i}"), ("Add", f"p{i} b{i}", f"z{i}"), ("Relu", f"z{i}", f"h{i + 1}")]
    path = folder / "net.onnx"
    path.write_bytes(made(nodes[:-1], [1, 1, 1, 2], weights, opset=8).SerializeToString())
    return path


def grid_values(net: Any) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(-1, 0.1, 301), np.linspace(0.2, 0.3, 101))
    with torch.no_grad():
        return net(torch.from_numpy(np.stack([x, y], -1)).float().reshape(-1, 1, 1, 2)).double().numpy()


@pytest.mark.parametrize("form", ["a bound", "a robust label", "two rows", "a sum"])
def test_verdicts_are_those_of_a_grid(form, tmp_path) -> None:
    net = robustlip.load(acas(tmp_path))
    values = grid_values(net)
    spread = float(values.max() - values.min())
    for slack, wanted in ((0.03 * spread, "unsat"), (-0.03 * spread, "sat")):
        if form == "a bound":
            text = f"(assert (>= Y_0 {values[:, 0].max() + slack:.9f}))"
        elif form == "a sum":
            text = f"(assert (<= (+ Y_0 (* -2 Y_1)) {(values[:, 0] - 2 * values[:, 1]).min() - slack:.9f}))"
        elif form == "two rows":
            worst = np.minimum(values[:, 0] - values[:, 1], values[:, 0] - values[:, 2]).max()
            text = f"(assert (>= (- Y_0 Y_1) {worst + slack:.9f})) (assert (>= (- Y_0 Y_2) {worst + slack:.9f}))"
        else:
            label = int(values.mean(0).argmax())
            margins = {j: (values[:, j] - values[:, label]).max() for j in range(3) if j != label}
            text = "(assert (or" + "".join(f" (and (>= (- Y_{j} Y_{label}) {m + slack:.9f}))" for j, m in margins.items()) + "))"
        prop = read_property(written(DECLARED + BOX + text, tmp_path))
        answer = decide(net, prop, 20)
        assert answer.verdict == wanted
        if wanted == "sat":
            x = [Fraction(v) for v in answer.x]
            low, high = prop.box(prop.cases[0])
            assert all(a <= v <= b for a, v, b in zip(low, x, high, strict=True))
            y = net(torch.tensor([[float(v) for v in answer.x]], dtype=torch.float64).float())[0].detach()
            assert [repr(v) for v in y.double().tolist()] == list(answer.y)
            assert re.fullmatch(r"sat\n\(\(X_0 \S+\)\n\(X_1 \S+\)\n\(Y_0 \S+\)\n\(Y_1 \S+\)\n\(Y_2 \S+\)\)\n", answer.text())
            assert any(
                all(sum(w * Fraction(float(y[j])) for j, w in row.weights.items()) + row.constant <= 0 for row in case.rows) for case in prop.cases
            )


def test_a_network_of_which_nothing_is_proved_is_attacked(tmp_path) -> None:
    pytest.importorskip("onnx")
    from onnx_files import made

    nodes = [("Sin", "x", "s"), ("MatMul", "s w", "y")]
    path = tmp_path / "sin.onnx"
    path.write_bytes(made(nodes, [1, 2], {"w": np.ones((2, 3), np.float32)}).SerializeToString())
    net = robustlip.load(path)
    assert decide(net, read_property(written(DECLARED + BOX + "(assert (>= Y_0 0.39))", tmp_path)), 2).verdict == "sat"
    answer = decide(net, read_property(written(DECLARED + BOX + "(assert (>= Y_0 9))", tmp_path)), 0.5)
    assert answer.verdict == "timeout" and "sin" in answer.why
    with pytest.raises(BadInput, match="2 inputs and 3 outputs"):
        decide(net, read_property(written(DECLARED.replace("(declare-const Y_2 Real)", "") + BOX + "(assert (>= Y_0 9))", tmp_path)), 1)


def test_the_command_writes_the_competition_s_results(tmp_path, capsys) -> None:
    from command_line import run

    acas(tmp_path)
    written(DECLARED + BOX + "(assert (>= Y_0 1000))", tmp_path, "holds.vnnlib")
    written(DECLARED + BOX + "(assert (<= Y_0 1000))", tmp_path, "fails.vnnlib")
    written(DECLARED.replace("(declare-const Y_2 Real)", "") + BOX + "(assert (<= Y_0 1000))", tmp_path, "other.vnnlib")
    assert run("vnncomp", tmp_path / "net.onnx", tmp_path / "holds.vnnlib", tmp_path / "r.txt") == 0
    assert (tmp_path / "r.txt").read_text() == "unsat\n"
    written("net.onnx,holds.vnnlib,5\nnet.onnx,fails.vnnlib,5\nnet.onnx,other.vnnlib,5\n", tmp_path, "instances.csv")
    assert run("vnncomp", tmp_path, tmp_path / "results.csv") == 0
    lines = [line.rpartition(",")[0] for line in (tmp_path / "results.csv").read_text().splitlines()]
    assert lines == ["net.onnx,holds.vnnlib,unsat", "net.onnx,fails.vnnlib,sat", "net.onnx,other.vnnlib,error"]
    assert (tmp_path / "results.1.counterexample").read_text().startswith("sat\n((X_0 ")
    assert "3 outputs, those of the network, got 2 and 2" in capsys.readouterr().out
    for arguments in (("net.onnx",), ("net.onnx", "holds.vnnlib", "holds.vnnlib"), ("net.onnx", "fails.vnnlib", "r.txt", "--timeout", "-1")):
        assert run("vnncomp", *(tmp_path / a if "." in str(a) else a for a in arguments)) == 2


def mnistfc(row: Any, folder: Path) -> Path:
    """An instance as the competition's file of it."""
    lines = [f"(declare-const {v}_{i} Real)" for v, n in (("X", 784), ("Y", 10)) for i in range(n)]
    for i, value in enumerate(row.image):
        lines += [f"(assert (<= X_{i} {float(min(value + row.radius, 1.0))!r}))"]
        lines.append(f"(assert (>= X_{i} {float(max(value - row.radius, 0.0))!r}))")
    lines.append("(assert (or " + " ".join(f"(and (>= Y_{j} Y_{row.label}))" for j in range(10) if j != row.label) + "))")
    return written("\n".join(lines), folder)


CASES = [
    ("mnist-net_256x2", 2, 0.05), ("mnist-net_256x2", 0, 0.03), ("mnist-net_256x2", 0, 0.05), ("mnist-net_256x4", 10, 0.03),
    ("mnist-net_256x4", 2, 0.03),
]  # fmt: skip


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_known_verdict_of_vnn_comp_is_contradicted(everything, tmp_path) -> None:
    folder = Path(os.environ.get("ROBUSTLIP_DATA", "")) / "vnncomp2021_mnistfc"
    if "ROBUSTLIP_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("needs ROBUSTLIP_DATA with vnncomp2021_mnistfc")
    import pandas as pd

    pytest.importorskip("onnx")
    known = {"holds": ("unsat",), "violated": ("sat",), "disputed": ("sat", "unsat"), "open": ("sat", "unsat")}
    nets: dict[str, Any] = {}
    decided: list[tuple[str, str]] = []
    for row in pd.read_parquet(folder / "instances.parquet").itertuples():
        if not everything and (row.network, row.instance, row.radius) not in CASES:
            continue
        net = nets.setdefault(row.network, robustlip.load(folder / f"{row.network}.onnx") if row.network not in nets else None)
        answer = decide(net, read_property(mnistfc(row, tmp_path)), 3 if everything else 20)
        assert answer.verdict in (*known[row.verdict], "timeout", "unknown"), (row.network, row.instance, row.radius)
        decided.append((row.verdict, answer.verdict))
    if everything:
        assert sum(verdict == "sat" for _, verdict in decided) >= 16 and sum(verdict == "unsat" for _, verdict in decided) >= 14
    else:
        assert [verdict for _, verdict in decided] == ["unsat", "sat", "unsat", "sat", "unsat"]  # as the file has them: by network, radius, instance
