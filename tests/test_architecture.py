"""Which package may import which: only from lower layers, and never in a cycle (docs/architecture.md)."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The lowest layer first: a package imports from its own row and from earlier rows. Imports inside functions count too.
LAYERS = (
    ("errors",),
    ("names", "threats", "execution", "modes", "parallel", "plugins", "locks", "user_errors", "limits", "figures"),
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
LAYER = {package: i for i, layer in enumerate(LAYERS) for package in layer}
FOLDERS = {"robustlip": "robustlip", "attacks": "robustlip.attacks", "eval": "robustlip.eval", "models": "robustlip.models"}


def package_of(module: str) -> str:
    """The name that LAYERS uses: a package or file of robustlip, and for domains the subpackage."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[:1] == ["domains"] and len(parts) > 1 else parts[0] if parts else ""


@cache
def files() -> dict[str, Path]:
    """Every file of the package by its import name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.relative_to(ROOT / folder)
            if folder != "robustlip" or inner.parts[0] not in ("attacks", "eval", "models"):  # symbolic links to the folders above
                found[".".join([package, *inner.with_suffix("").parts]).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Everything that a file imports from robustlip, at any place: modules, and names as MODULE.NAME."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("robustlip"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("robustlip.")}
    return found


def dependencies() -> set[tuple[str, str, str]]:
    """(package, package that it imports, file)."""
    return {
        (package_of(module), there, str(path.relative_to(ROOT)))
        for module, path in files().items() for name in imports(path) if (there := package_of(name)) and there != package_of(module)
    }  # fmt: skip


def test_every_package_has_a_layer() -> None:
    packages = {a for a, _, _ in dependencies()} - {""}
    assert packages - LAYER.keys() == set()


def test_packages_import_from_lower_layers_only() -> None:
    known = {(a, b, where) for a, b, where in dependencies() if a in LAYER and b in LAYER}
    up = sorted((a, b, where) for a, b, where in known if LAYER[b] > LAYER[a])
    level = sorted((a, b, where) for a, b, where in known if LAYER[b] == LAYER[a])
    assert up == []
    both = {(a, b) for a, b, _ in level} & {(b, a) for a, b, _ in level}
    assert both == set(), "a cycle"


def test_no_files_import_each_other_in_a_cycle() -> None:
    """Within a package too. Names of the top level, robustlip.NAME, do not count: they are loaded when they are first used."""
    graph = {
        module: {there for name in imports(path) if (there := name if name in files() else name.rpartition(".")[0]) not in (module, "robustlip")}
        for module, path in files().items() if module != "robustlip"
    }  # fmt: skip
    assert graph["robustlip.cli"] >= {"robustlip.cli.certify", "robustlip.errors"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_every_verb_has_a_file_of_its_own() -> None:
    from robustlip.cli import app

    other = {"eval": "evaluate", "import": "import_"}  # names that Python uses itself
    at = {command.name: command.callback.__module__ for command in app.registered_commands}
    assert at == {verb: f"robustlip.cli.{other.get(verb, verb)}" for verb in at} and len(at) == 14
    between = {(a, b) for a in at.values() for b in at.values() if a != b and any(name.startswith(f"{b}.") for name in imports(files()[a]))}
    assert between == {("robustlip.cli.demo", "robustlip.cli.evaluate")}


@pytest.mark.parametrize("wrong", [("ops", "domains.norms"), ("domains.norms", "certifiers"), ("numerics", "layers"), ("certifiers", "attacks")])
def test_an_import_from_a_higher_layer_would_be_found(wrong) -> None:
    assert LAYER[wrong[1]] > LAYER[wrong[0]]
    assert wrong not in {(a, b) for a, b, _ in dependencies()}
