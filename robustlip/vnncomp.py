"""Decides whether a network satisfies a VNN-LIB property, with the results of VNN-COMP. docs/onnx.md.

A point X of the property's box is rounded to float64 and then to the network's dtype, and torch runs the network on it. `unsat`: no point of the
box violates the property; the proof covers the rounding errors of that program. `sat`: the printed point violates it, as this program computes it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.attacks.regions import search
from robustlip.certifiers.boxes import outputs_hold
from robustlip.data.vnnlib import Case, Property, read_property
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.execution import covered_kernels
from robustlip.modes import in_eval_mode

HOLDS, VIOLATED, UNKNOWN, TIMEOUT = "unsat", "sat", "unknown", "timeout"
# Fractions of the time limit: the first attack may take the first one; the last attack begins at the second one.
FIRST, LAST = 0.2, 0.8
DEFAULT_SECONDS = 300.0


@dataclass(frozen=True)
class Answer:
    """verdict: 'unsat', 'sat', 'unknown' or 'timeout'. x, y: a counterexample as decimal texts. why: an explanation."""

    verdict: str
    seconds: float
    x: tuple[str, ...] = ()
    y: tuple[str, ...] = ()
    why: str = ""

    def text(self) -> str:
        """The result in the format of VNN-COMP: one word, and after `sat` the counterexample."""
        if self.verdict != VIOLATED:
            return f"{self.verdict}\n"
        lines = [f"(X_{i} {v})" for i, v in enumerate(self.x)] + [f"(Y_{i} {v})" for i, v in enumerate(self.y)]
        return "sat\n(" + "\n".join(lines) + ")\n"


@dataclass
class _Judge:
    """The network as it runs, and a property of it."""

    model: nn.Module
    shape: tuple[int, ...]
    property: Property
    dtype: torch.dtype
    cache: dict[int, tuple[list[Fraction], list[Fraction]]] = field(default_factory=dict)

    def box(self, case: Case) -> tuple[list[Fraction], list[Fraction]]:
        key = id(case) if case.low or case.high else 0
        if key not in self.cache:
            self.cache[key] = self.property.box(case)
        return self.cache[key]

    def boxes(self) -> dict[tuple[Any, ...], list[Case]]:
        """The cases, grouped by equal boxes."""
        found: dict[tuple[Any, ...], list[Case]] = {}
        for case in self.property.cases:
            found.setdefault((tuple(sorted(case.low.items())), tuple(sorted(case.high.items()))), []).append(case)
        return found

    def outputs(self, x: Tensor) -> Tensor:
        return self.model(x.reshape(len(x), *self.shape)).flatten(1)  # type: ignore[no-any-return]

    def rows(self, case: Case) -> tuple[Tensor, Tensor]:
        """Rows and offsets of a case: rows·Y ≤ offsets, in float64."""
        weights = torch.zeros(len(case.rows), self.property.outputs, dtype=torch.float64)
        for i, row in enumerate(case.rows):
            for j, w in row.weights.items():
                weights[i, j] = float(w)
        return weights, torch.tensor([-float(row.constant) for row in case.rows], dtype=torch.float64)

    @torch.no_grad()
    def example(self, case: Case, point: Tensor) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """(X, Y) as texts if the point, projected into the box and read back from its text, violates the property; else None."""
        low, high = self.box(case)
        texts = []
        for value, least, most in zip(point.double().tolist(), low, high, strict=True):
            text = repr(value)
            if not least <= Fraction(text) <= most:
                text = _decimal(least if Fraction(text) < least else most)
                if not least <= Fraction(text) <= most:
                    return None
            texts.append(text)
        x = torch.tensor([[float(t) for t in texts]], dtype=torch.float64).to(self.dtype)
        y = self.outputs(x)[0].double().tolist()
        if not all(v == v and abs(v) != float("inf") for v in y):
            return None
        exact = [Fraction(v) for v in y]
        for row in case.rows:
            if sum((w * exact[j] for j, w in row.weights.items()), row.constant) > 0:
                return None
        return tuple(texts), tuple(repr(v) for v in y)


def _decimal(value: Fraction) -> str:
    """The decimal text of a fraction if it has one, else of the nearest float64."""
    digits = value.denominator
    for prime in (2, 5):
        while digits % prime == 0:
            digits //= prime
    if digits != 1 or value.denominator > 10**60:
        return repr(float(value))
    places = 0
    while value.denominator != 1 and places < 400:
        value, places = value * 10, places + 1
    return f"{value.numerator}e-{places}" if places else str(value.numerator)


def outward(values: list[Fraction], up: bool) -> Tensor:
    """The nearest float64 numbers outside the interval bounds."""
    found = torch.tensor([float(v) for v in values], dtype=torch.float64)
    toward = torch.full_like(found, torch.inf if up else -torch.inf)
    wrong = torch.tensor([(Fraction(f) < v) if up else (Fraction(f) > v) for f, v in zip(found.tolist(), values, strict=True)])
    return torch.where(wrong, torch.nextafter(found, toward), found)


def decide(model: nn.Module, prop: Property, seconds: float = DEFAULT_SECONDS, *, seed: int = 0) -> Answer:
    """Whether the network satisfies the property. model: `robustlip.load` of an .onnx file, or any module with an `input_shape`.

    Raises BadInput if the numbers of inputs and outputs differ, or if bounds of inputs are missing.
    """
    start = time.monotonic()
    shape = getattr(model, "input_shape", None)
    first = next((t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()), None)
    if shape is None or first is None:
        raise BadInput("expected a network with an input_shape, got one without; give an .onnx file")
    count = int(torch.Size(shape).numel())
    with in_eval_mode(model), covered_kernels(first.device.type):
        with torch.no_grad():
            outputs = model(torch.zeros(1, *shape, dtype=first.dtype)).numel()
        if (prop.inputs, prop.outputs) != (count, outputs):
            raise BadInput(
                f"expected a property of {count} inputs and {outputs} outputs, those of the network, got {prop.inputs} and {prop.outputs} in "
                f"{prop.name}; give the property of this network"
            )
        judge = _Judge(model, tuple(shape), prop, first.dtype)
        for case in prop.cases:
            judge.box(case)  # refused before anything is computed
        generator = torch.Generator().manual_seed(seed)
        if found := _attacked(judge, generator, start + FIRST * seconds, rounds=1):
            return Answer(VIOLATED, time.monotonic() - start, *found)
        why, ended = "", False
        try:
            done, ended = _proved(judge, start + LAST * seconds)
            if done:
                return Answer(HOLDS, time.monotonic() - start)
        except BadInput as error:  # the network cannot be certified, but it can be attacked
            why = str(error)
        if found := _attacked(judge, generator, start + seconds, rounds=50):
            return Answer(VIOLATED, time.monotonic() - start, *found)
    took = time.monotonic() - start
    return Answer(TIMEOUT if took >= seconds or ended else UNKNOWN, took, why=why)


def _attacked(judge: _Judge, generator: torch.Generator, until: float, rounds: int) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """A counterexample, if one is found: in each round all cases of a box are searched together, then each one separately."""
    boxes = list(judge.boxes().values())
    for turn in range(rounds):
        tries = boxes + [[case] for cases in boxes if len(cases) > 1 for case in cases]
        for cases in tries:
            low, high = judge.box(cases[0])
            groups = [tuple(t.to(judge.dtype) for t in judge.rows(case)) for case in cases]
            # Within the box in the network's dtype, if the dtype has a number in it.
            least, most = (outward(b, up).to(judge.dtype) for b, up in ((low, False), (high, True)))
            many: dict[str, int] = {"restarts": 8, "steps": 40} if turn == 0 else {"restarts": 24, "steps": 150}
            point = search(judge.outputs, least, most, groups, generator=generator, until=until, **many)  # type: ignore[arg-type]
            for case in cases if point is not None else ():
                if found := judge.example(case, point):  # type: ignore[arg-type]
                    return found
            if time.monotonic() > until:
                return None
    return None


def _proved(judge: _Judge, until: float) -> tuple[bool, bool]:
    """(proved that no point satisfies any case, whether the time or the size limit ended the search)."""
    for cases in judge.boxes().values():
        low, high = judge.box(cases[0])
        groups = []
        for case in cases:
            rows, offsets = judge.rows(case)
            exact = all(Fraction(float(w)) == w for row in case.rows for w in (*row.weights.values(), row.constant))
            if not exact:  # rounding of the file's numbers to float64; the change is smaller than this, for logits of any size that is proved
                offsets = offsets + 2.0**-50 * offsets.abs() + 1e-300
                if any(Fraction(float(w)) != w for row in case.rows for w in row.weights.values()):
                    raise UnsupportedLayer("expected weights of outputs that are exact in float64, got others; write the property with integers")
            groups.append((rows, offsets))
        done, ended = outputs_hold(judge.model, outward(low, False), outward(high, True), groups, judge.shape, until)
        if not done:
            return False, ended
    return True, False


def decide_files(network: Path, prop: Path, seconds: float = DEFAULT_SECONDS, *, seed: int = 0, model: nn.Module | None = None) -> Answer:
    """`decide` for an .onnx and a .vnnlib file."""
    from robustlip.models.zoo import load

    found = read_property(prop)
    return decide(load(network) if model is None else model, found, seconds, seed=seed)
