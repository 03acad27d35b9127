"""Who may import whom: arrows point down, and no room imports in a circle (docs/architecture.md)."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up; a room imports its own row and those in front of it, never a later one. Imports inside functions count too.
FLOORS = (
    ("errors",),
    ("names", "threats", "execution", "modes", "parallel", "plugins", "locks", "foreign", "limits", "figures"),
    ("files", "toml", "numerics", "geometry", "hashing", "checks", "certificates"),
    ("layers", "data", "muon"),
    ("graph", "ops", "target", "samples", "constraints", "checkpoints", "onnx", "pretrained"),
    ("domains.margins", "domains.search"),
    ("domains.norms",),
    ("domains.lines", "domains.expansion"),
    ("domains.quadratic",),
    ("certifiers",),
    ("models", "attacks", "certificate_file"),
    ("training", "verification", "comparison", "importing", "sweep", "vnncomp"),
    ("gate", "eval"),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}
FOLDERS = {"robustlip": "robustlip", "attacks": "robustlip.attacks", "eval": "robustlip.eval", "models": "robustlip.models"}


def room(module: str) -> str:
    """domains have a room each; any other package or file of robustlip is one."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[:1] == ["domains"] and len(parts) > 1 else parts[0] if parts else ""


@cache
def files() -> dict[str, Path]:
    """Every file of the package by its import name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.relative_to(ROOT / folder)
            if folder != "robustlip" or inner.parts[0] not in ("attacks", "eval", "models"):  # links to the folders above
                found[".".join([package, *inner.with_suffix("").parts]).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """What a file imports of robustlip, wherever it does: modules, and names as MODULE.NAME."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("robustlip"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("robustlip.")}
    return found


def arrows() -> set[tuple[str, str, str]]:
    """(room, room that it imports, file)."""
    return {
        (room(module), there, str(path.relative_to(ROOT)))
        for module, path in files().items() for name in imports(path) if (there := room(name)) and there != room(module)
    }  # fmt: skip


def test_every_room_has_a_floor() -> None:
    rooms = {a for a, _, _ in arrows()} - {""}
    assert rooms - FLOOR.keys() == set()


def test_arrows_point_down() -> None:
    known = {(a, b, where) for a, b, where in arrows() if a in FLOOR and b in FLOOR}
    up = sorted((a, b, where) for a, b, where in known if FLOOR[b] > FLOOR[a])
    level = sorted((a, b, where) for a, b, where in known if FLOOR[b] == FLOOR[a])
    assert up == []
    both = {(a, b) for a, b, _ in level} & {(b, a) for a, b, _ in level}
    assert both == set(), "a circle"


def test_no_file_imports_in_a_circle() -> None:
    """Within a room too. Not the package's own names, robustlip.NAME, which are loaded when they are first used."""
    graph = {
        module: {there for name in imports(path) if (there := name if name in files() else name.rpartition(".")[0]) not in (module, "robustlip")}
        for module, path in files().items() if module != "robustlip"
    }  # fmt: skip
    assert graph["robustlip.cli"] >= {"robustlip.cli.certify", "robustlip.errors"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_every_verb_has_a_file_of_its_own() -> None:
    from robustlip.cli import app

    other = {"eval": "evaluate", "import": "import_"}  # names that Python has taken
    at = {command.name: command.callback.__module__ for command in app.registered_commands}
    assert at == {verb: f"robustlip.cli.{other.get(verb, verb)}" for verb in at} and len(at) == 14
    between = {(a, b) for a in at.values() for b in at.values() if a != b and any(name.startswith(f"{b}.") for name in imports(files()[a]))}
    assert between == {("robustlip.cli.demo", "robustlip.cli.evaluate")}


@pytest.mark.parametrize("wrong", [("ops", "domains.norms"), ("domains.norms", "certifiers"), ("numerics", "layers"), ("certifiers", "attacks")])
def test_the_test_would_see_an_arrow_that_points_up(wrong) -> None:
    assert FLOOR[wrong[1]] > FLOOR[wrong[0]]
    assert wrong not in {(a, b) for a, b, _ in arrows()}
