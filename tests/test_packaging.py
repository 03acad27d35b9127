"""The wheel contains the whole package and nothing else; a bare checkout runs with five dependencies.

An editable install hides a subpackage that is missing from `packages` in pyproject.toml, so everything here happens in
a copy of the tree and in processes that see only what was installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("attacks", "eval", "models")  # top-level in the tree, subpackages of robustlip in the wheel

# Imported where they are used, so that a machine without them can certify and attack.
HEAVY = (
    "datasets", "sklearn", "pydantic", "typer", "rich", "matplotlib", "jinja2", "PIL", "torchattacks", "pyarrow", "ray", "cvxpy", "flint", "tomli_w",
    "onnx",
)  # fmt: skip
CORE = ("robustlip.threats", "robustlip.layers", "robustlip.domains.norms", "robustlip.certifiers", "robustlip.attacks", "robustlip.models")


@cache  # one list for all tests: somebody may be editing the tree meanwhile
def tree_files() -> list[Path]:
    """Files that git tracks or would track, relative to the root: build litter is ignored, and so left out."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to tell sources from litter")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in listed.split("\0") if name and os.path.lexists(ROOT / name)]


def copy_tree(to: Path, *, links: bool) -> Path:
    for name in tree_files():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        if not (ROOT / name).is_symlink():
            shutil.copyfile(ROOT / name, to / name)
        elif links:
            (to / name).symlink_to(os.readlink(ROOT / name))
        else:
            # What git leaves on a system without symbolic links: a file that holds the target.
            (to / name).write_text(os.readlink(ROOT / name))
    return to


def build_wheel(tree: Path, to: Path) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(to)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    (wheel,) = to.glob("robustlip-*.whl")
    return wheel


def python(code: str, *, path: Path, cwd: Path, **variables: str) -> str:
    """Standard output of `code` in a process whose PYTHONPATH is `path` alone and whose folder is `cwd`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    environment |= {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(copy_tree(tmp_path_factory.mktemp("tree"), links=True), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in a scratch folder, on no other path."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    return target


def sources() -> dict[str, Path]:
    """What the package is made of: path inside the wheel → path in the tree."""
    inside = {}
    for path in tree_files():
        if (ROOT / path).is_symlink():
            continue
        if path.parts[0] == "robustlip":
            inside[path.as_posix()] = path
        elif path.parts[0] in FOLDERS:
            inside[f"robustlip/{path.as_posix()}"] = path
    return inside


def test_wheel_is_the_tree(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    modules = {name for name in names if ".dist-info/" not in name}
    # Equality both ways: no subpackage, suite, template or model left behind; nothing twice, no litter.
    data = (".md", ".gitkeep")  # notes for readers of the tree
    expected = {name for name in sources() if not name.endswith(data)}
    assert modules == expected


def test_wheel_has_one_top_level_name(installed: Path) -> None:
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} - {"bin", "__pycache__"}
    assert top == {"robustlip"}
    (metadata,) = installed.glob("*.dist-info")
    assert "robustlip = robustlip.__main__:run" in (metadata / "entry_points.txt").read_text()
    assert (metadata / "licenses" / "LICENSE").is_file() and "License-Expression: MIT" in (metadata / "METADATA").read_text()


def test_every_module_imports_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib, json, pkgutil, robustlip
found = {"robustlip": robustlip.__file__}
for module in pkgutil.walk_packages(robustlip.__path__, "robustlip."):
    if not module.name.endswith(".__main__"):  # importing it runs the command line
        found[module.name] = importlib.import_module(module.name).__file__
print(json.dumps(found))
"""
    found = json.loads(python(code, path=installed, cwd=tmp_path, MPLBACKEND="Agg"))
    # The file too: where the environment has an editable install, its finder would quietly fill a gap from the tree.
    assert all(Path(file).is_relative_to(installed) for file in found.values())
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in sources() if name.endswith(".py")}
    assert set(found) == {name for name in modules if not name.endswith(".__main__")}


def test_data_files_are_found_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = """
import robustlip.data
from importlib.resources import files
print(len(robustlip.data.load_data("page")), files("robustlip").joinpath("py.typed").is_file())
"""
    count, typed = python(code, path=installed, cwd=tmp_path).split()
    assert int(count) > 50 and typed == "True"


def test_import_is_cheap(installed: Path, tmp_path: Path) -> None:
    heavy = python("import sys, robustlip; print([n for n in ('torch', 'numpy', 'pandas') if n in sys.modules])", path=installed, cwd=tmp_path)
    assert heavy.strip() == "[]"


@pytest.mark.slow
def test_a_checkout_without_symbolic_links_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "wheel").mkdir()
    other = build_wheel(copy_tree(tmp_path / "tree", links=False), tmp_path / "wheel")
    assert sorted(zipfile.ZipFile(other).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_a_bare_checkout_runs_with_five_dependencies(tmp_path: Path) -> None:
    """GPU machines bring torch, numpy, pandas, safetensors and scipy, and may have no network for the rest."""
    code = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
for name in {CORE!r}:
    importlib.import_module(name)
import robustlip.data
assert len(robustlip.data.load_data("page")) > 50
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    assert python(code, path=ROOT, cwd=tmp_path).strip() == "[]"


def test_every_subpackage_is_listed() -> None:
    """Faster than the wheel, and it names the line to add."""
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"])
    present = {name.removesuffix("/__init__.py").replace("/", ".") for name in sources() if name.endswith("/__init__.py")}
    assert listed == present


def test_every_dependency_is_pinned() -> None:
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *extras["test"], *extras["lint"], *extras["audit"], *extras["torchattacks"]]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    assert {re.split(r"[<>=!~\[ ]", requirement)[0].lower() for requirement in named} <= pinned
