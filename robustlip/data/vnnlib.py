"""VNN-LIB properties: boxes of inputs X_i, and conditions on outputs Y_j under which the property is violated. Sizes in files are bounded.

    (declare-const X_0 Real) … (declare-const Y_0 Real) …
    (assert (<= X_0 0.5)) (assert (>= X_0 0.25)) … (assert (or (and (>= Y_1 Y_0)) (and (>= Y_2 Y_0))))

The assertions together say when the property is violated. They are expanded into cases, any one of which suffices: a box of inputs, and linear
functions of the outputs that are all at most 0. Numbers are exact fractions.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from robustlip.data.dataset import Dataset, as_index, choose_rows
from robustlip.errors import BadInput
from robustlip.files import is_file, read_limited, unzipped
from robustlip.names import shown

# Endings of file names of properties, and of lists of properties.
BOXES = (".vnnlib", ".vnnlib.gz", ".csv")
LARGEST = 2**27  # bytes of a property file
LONGEST_TOKEN = 100
DEEPEST = 30
MOST_CASES = 2_000
MOST_VARIABLES = 2**22
MOST_INSTANCES = 10_000
LARGEST_NUMBER = 10**300

_TOKEN = re.compile(r"[()]|[^\s()]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_VARIABLE = re.compile(r"([XY])_(\d{1,8})")


@dataclass(frozen=True)
class Row:
    """Σ weights[j]·Y_j + constant ≤ 0."""

    weights: dict[int, Fraction]
    constant: Fraction


@dataclass(frozen=True)
class Case:
    """Bounds of inputs that hold in this case in addition to those of the property, and rows that all have to hold."""

    low: dict[int, Fraction]
    high: dict[int, Fraction]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Property:
    """Violated if an input within low ≤ X ≤ high satisfies a case. inputs, outputs: their numbers."""

    name: str
    low: tuple[Fraction | None, ...]
    high: tuple[Fraction | None, ...]
    outputs: int
    cases: tuple[Case, ...]

    @property
    def inputs(self) -> int:
        return len(self.low)

    def box(self, case: Case) -> tuple[list[Fraction], list[Fraction]]:
        """The bounds of every input in a case. Raises BadInput if one is missing."""
        found: tuple[list[Fraction], list[Fraction]] = ([], [])
        for own, special, out, side in ((self.low, case.low, found[0], max), (self.high, case.high, found[1], min)):
            for i, value in enumerate(own):
                both = [v for v in (value, special.get(i)) if v is not None]
                if not both:
                    raise BadInput(f"expected bounds of every input, got {self.name} without one of X_{i}; add it")
                out.append(side(both))
        for i, (low, high) in enumerate(zip(*found, strict=True)):
            if low > high:
                raise BadInput(f"expected X_{i} from a smaller to a larger number, got {float(low):g} to {float(high):g} in {self.name}; correct it")
        return found

    @property
    def label(self) -> int | None:
        """The class that the property requires; None for other properties: every case is one Y_j ≥ Y_label, and every other class has a case."""
        found: dict[int, set[int]] = {}
        for case in self.cases:
            if case.low or case.high or len(case.rows) != 1:
                return None
            (row,) = case.rows
            up = [j for j, w in row.weights.items() if w == 1]
            down = [j for j, w in row.weights.items() if w == -1]
            if row.constant or len(row.weights) != 2 or len(up) != 1 or len(down) != 1:
                return None
            found.setdefault(up[0], set()).add(down[0])
        if len(found) != 1:
            return None
        ((label, rivals),) = found.items()
        return label if rivals == set(range(self.outputs)) - {label} else None


@dataclass(frozen=True)
class Instance:
    """A line of instances.csv: network, property, seconds."""

    network: Path
    property: Path
    seconds: float


def read_property(path: Path) -> Property:
    """The property of a .vnnlib or .vnnlib.gz file. Raises BadInput for anything else."""
    return _Reader(path.name).read(_text(path, "a VNN-LIB property", LARGEST))


def read_instances(folder: Path) -> list[Instance]:
    """The lines of the instances.csv of a folder (or of that file): network, property, seconds. Files may be compressed (.gz)."""
    path = folder if folder.suffix == ".csv" else folder / "instances.csv"
    found: list[Instance] = []
    try:
        for line in csv.reader(io.StringIO(_text(path, "a list of instances", 2**24))):
            if not line or not any(map(str.strip, line)):
                continue
            if len(line) < 2 or len(found) >= MOST_INSTANCES:
                got = shown(str(line), 80)
                raise BadInput(f"expected lines NETWORK,PROPERTY,SECONDS, at most {MOST_INSTANCES}, in {path.name}, got {got}; correct it")
            network, prop = (_beside(path.parent, part.strip(), path.name) for part in line[:2])
            found.append(Instance(network, prop, _seconds(line[2].strip() if len(line) > 2 else "", path.name)))
    except csv.Error as error:
        raise BadInput(f"expected a list of instances, got {path.name}, which is not CSV ({error}); correct it") from None
    if not found:
        raise BadInput(f"expected at least one instance, got none in {path.name}; write lines NETWORK,PROPERTY,SECONDS")
    return found


def _seconds(text: str, name: str) -> float:
    if text and not _NUMBER.fullmatch(text[:LONGEST_TOKEN]):
        raise BadInput(f"expected seconds as a number in {name}, got {shown(text, 40)!r}; correct it")
    value = float(text) if text else 0.0
    return value if 0 < value < 1e6 else 0.0


def _beside(folder: Path, text: str, name: str) -> Path:
    """The file that a line names; it has to lie within the folder."""
    path = Path(text)
    if not text or path.is_absolute() or ".." in path.parts or "\0" in text or len(text) > 1000:
        raise BadInput(f"expected files below the folder of {name}, got {shown(text, 80)!r}; move it there")
    for found in (folder / path, folder / f"{text}.gz"):
        if is_file(found):
            return found
    return folder / path


def _text(path: Path, what: str, limit: int) -> str:
    data = read_limited(path, what, limit, "give a smaller one")
    data = unzipped(data, path.name, limit) if path.suffix == ".gz" else data
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"expected {what} in UTF-8, got {path.name}, which is not; save it as text") from None


def boxes_as_samples(path: Path, limit: int | None = None, seed: int = 0) -> Dataset:
    """Properties that require a class in a box, as samples: x (N, n) float64, y the class.

    path: a .vnnlib file, or an instances.csv, each property of which is used once. x is the centre of the linf ball that was clipped to give the box,
    if the box has that form, and otherwise the centre of the box. The note states linf radii around x that contain the boxes: a property holds if
    x is certified for that radius. limit, seed: as in `load_data`. Raises BadInput for other properties.
    """
    files = list(dict.fromkeys(i.property for i in read_instances(path))) if path.suffix == ".csv" else [path]
    chosen = choose_rows(len(files), limit, seed)
    points, labels, radii, classes = [], [], [], set()
    for i in chosen:
        prop = read_property(files[i])
        if prop.label is None:
            raise BadInput(f"expected a property that requires a class in a box, got another in {prop.name}; use robustlip vnncomp")
        point, radius = _centre(*prop.box(prop.cases[0]))
        points.append(point)
        labels.append(prop.label)
        radii.append(radius)
        classes.add((prop.inputs, prop.outputs))
    if len(classes) > 1:
        raise BadInput(f"expected properties of one network, got {sorted(classes)[:3]} inputs and outputs in {path.name}; use one list per network")
    within = f"{max(radii)!r}" if min(radii) == max(radii) else f"{min(radii)!r} to {max(radii)!r}"  # in full: a shorter text could be smaller
    return Dataset(
        path.name.partition(".")[0], "all", "image", torch.tensor(points, dtype=torch.float64), torch.tensor(labels), as_index(chosen),
        classes.pop()[1], note=f"boxes within linf {within}",
    )  # fmt: skip


def _centre(low: list[Fraction], high: list[Fraction]) -> tuple[list[float], float]:
    """(a point of a box, the linf distance from it to the farthest point of the box, rounded up)."""
    reach = max(h - l for l, h in zip(low, high, strict=True)) / 2
    least, most = min(low), max(high)

    def place(l: Fraction, h: Fraction) -> float:
        short = reach - (h - l) / 2  # the part that was clipped
        if short * 10**9 > reach and (l == least) != (h == most):
            return float(h - reach if l == least else l + reach)
        return float((l + h) / 2)

    point = [place(l, h) for l, h in zip(low, high, strict=True)]
    far = max(max(h - Fraction(p), Fraction(p) - l) for p, l, h in zip(point, low, high, strict=True))
    return point, math.nextafter(float(far), math.inf)


Linear = tuple[dict[str, Fraction], Fraction]  # weights by variable, constant


class _Reader:
    def __init__(self, name: str) -> None:
        self.name = name
        self.variables = {"X": 0, "Y": 0}
        self.declared: set[str] = set()

    def bad(self, got: str, remedy: str = "correct the file") -> BadInput:
        return BadInput(f"expected a VNN-LIB property, got {self.name} with {got}; {remedy}")

    def read(self, text: str) -> Property:
        low: dict[int, Fraction] = {}
        high: dict[int, Fraction] = {}
        cases: list[Case] = [Case({}, {}, ())]
        for command in self._commands(text):
            head = command[0] if command else None
            if head in ("declare-const", "declare-fun"):
                self._declare(command)
            elif head == "assert" and len(command) == 2:
                found = self._cases(command[1])
                if len(found) == 1 and not found[0].rows:  # bounds that hold for the whole property
                    _tighter(low, found[0].low, max)
                    _tighter(high, found[0].high, min)
                    continue
                if len(cases) * len(found) > MOST_CASES:
                    raise self.bad(f"more than {MOST_CASES} cases", "split it into several properties")
                cases = [_both(a, b) for a in cases for b in found]
            else:
                raise self.bad(f"the command {shown(str(head), 40)!r}", "use declare-const and assert")
        count = self.variables
        if not count["X"] or not count["Y"] or not any(case.rows for case in cases):
            raise self.bad("no inputs, no outputs, or no assertion about outputs", "declare X_i and Y_j and assert what the outputs are")
        if len(self.declared) != count["X"] + count["Y"]:
            raise self.bad("gaps between the numbers of its variables", "declare X_0, X_1, … and Y_0, Y_1, …")
        both = [tuple(side.get(i) for i in range(count["X"])) for side in (low, high)]
        return Property(self.name, both[0], both[1], count["Y"], tuple(cases))

    def _commands(self, text: str) -> Iterator[list[Any]]:
        stack: list[list[Any]] = []
        for line in io.StringIO(text):
            for match in _TOKEN.finditer(line.partition(";")[0]):
                token = match[0]
                if token == "(":
                    if len(stack) > DEEPEST:
                        raise self.bad(f"more than {DEEPEST} nested brackets")
                    stack.append([])
                elif token == ")":
                    if not stack:
                        raise self.bad("a closing bracket without an opening one")
                    done = stack.pop()
                    if not stack:
                        yield done
                    else:
                        stack[-1].append(done)
                elif not stack or len(token) > LONGEST_TOKEN:
                    raise self.bad(f"{shown(token, 40)!r} where a bracket was expected, or a word of {len(token)} characters")
                else:
                    stack[-1].append(token)
        if stack:
            raise self.bad("a bracket that is not closed")

    def _declare(self, command: list[Any]) -> None:
        kind = command[-1] if len(command) == (3 if command[0] == "declare-const" else 4) else None
        name = _VARIABLE.fullmatch(command[1]) if len(command) > 1 and isinstance(command[1], str) else None
        if kind != "Real" or name is None or command[1] in self.declared or int(name[2]) >= MOST_VARIABLES:
            raise self.bad(f"a declaration of {shown(str(command[1:]), 60)}", "declare each X_i and Y_j once, as Real")
        self.declared.add(command[1])
        self.variables[name[1]] = max(self.variables[name[1]], int(name[2]) + 1)

    def _cases(self, expression: Any) -> list[Case]:
        """The cases of an expression, any one of which suffices."""
        head = expression[0] if isinstance(expression, list) and expression else None
        if head == "or":
            found = [case for part in expression[1:] for case in self._cases(part)]
        elif head == "and":
            found = [Case({}, {}, ())]
            for part in expression[1:]:
                parts = self._cases(part)
                if len(found) * len(parts) > MOST_CASES:
                    raise self.bad(f"more than {MOST_CASES} cases", "split it into several properties")
                found = [_both(a, b) for a in found for b in parts] if len(parts) > 1 or len(found) > 1 else [_into(found[0], parts[0])]
        elif head in ("<=", ">=") and len(expression) == 3:
            return [self._comparison(head, expression[1], expression[2])]
        else:
            raise self.bad(f"the expression {shown(str(expression), 60)}", "use and, or, <= and >=")
        if not found or len(found) > MOST_CASES:
            raise self.bad(f"an {head} without arguments, or more than {MOST_CASES} cases")
        return found

    def _comparison(self, sign: str, left: Any, right: Any) -> Case:
        (weights, constant), (other, shift) = self._linear(left), self._linear(right)
        total = {name: weights.get(name, Fraction(0)) - other.get(name, Fraction(0)) for name in (*weights, *other)}
        total, constant = {name: w for name, w in total.items() if w}, constant - shift
        if sign == ">=":
            total, constant = {name: -w for name, w in total.items()}, -constant
        if any(abs(value) > LARGEST_NUMBER for value in (*total.values(), constant)):
            raise self.bad("a number above 1e300", "use smaller ones")
        kinds = {name[0] for name in total}
        if kinds == {"Y"}:
            return Case({}, {}, (Row({int(name[2:]): w for name, w in total.items()}, constant),))
        if kinds == {"X"} and len(total) == 1:
            ((name, w),) = total.items()
            bound, i = -constant / w, int(name[2:])
            if abs(bound) > LARGEST_NUMBER:
                raise self.bad("a number above 1e300", "use smaller ones")
            return Case({}, {i: bound}, ()) if w > 0 else Case({i: bound}, {}, ())
        raise self.bad(f"a comparison of {shown(', '.join(total) or 'numbers', 60)}", "compare one input with a number, or outputs with each other")

    def _linear(self, expression: Any) -> Linear:
        if isinstance(expression, str):
            if _VARIABLE.fullmatch(expression):
                if expression not in self.declared:
                    raise self.bad(f"{expression}, which is not declared")
                return {expression: Fraction(1)}, Fraction(0)
            if not _NUMBER.fullmatch(expression):
                raise self.bad(f"{shown(expression, 40)!r} where a number was expected")
            return {}, Fraction(expression)
        head, parts = (expression[0], expression[1:]) if expression else (None, [])
        terms = [self._linear(part) for part in parts]
        if head == "*" and len(terms) == 2 and any(not weights for weights, _ in terms):
            (_, factor), (weights, constant) = terms if not terms[0][0] else terms[::-1]
            return {name: factor * w for name, w in weights.items()}, factor * constant
        if head in ("+", "-") and terms:
            signs = [1] + [1 if head == "+" else -1] * (len(terms) - 1) if head == "+" or len(terms) > 1 else [-1]
            total: dict[str, Fraction] = {}
            for s, (weights, _) in zip(signs, terms, strict=True):
                for name, w in weights.items():
                    total[name] = total.get(name, Fraction(0)) + s * w
            return total, sum((s * c for s, (_, c) in zip(signs, terms, strict=True)), Fraction(0))
        raise self.bad(f"{shown(str(expression), 60)} where a linear expression was expected", "use +, -, and * by a number")


def _tighter(into: dict[int, Fraction], new: dict[int, Fraction], side: Any) -> None:
    for i, value in new.items():
        into[i] = side(into[i], value) if i in into else value


def _into(a: Case, b: Case) -> Case:
    """The conjunction of two cases; the first one is changed in place."""
    _tighter(a.low, b.low, max)
    _tighter(a.high, b.high, min)
    return Case(a.low, a.high, a.rows + b.rows)


def _both(a: Case, b: Case) -> Case:
    return _into(Case(dict(a.low), dict(a.high), a.rows), b)
