"""The runs of a sweep: a grid file, and the recipes that result from its base."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from robustlip.errors import BadInput
from robustlip.files import read_toml, strictly
from robustlip.training import Recipe, identity, load_recipe

MAX_RUNS = 10_000
_DESCRIPTIVE = {"name": "run", "description": "", "paper": "", "caveats": ""}  # keys that describe a recipe and do not affect its result


class Grid(BaseModel):
    """A grid file. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=100)
    title: str = ""
    base: str
    set: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, Any] = Field(default_factory=dict)
    run: list[dict[str, Any]] = Field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One recipe of a grid. varied: its changes, by dotted key. sha256: of everything in the recipe that affects its result."""

    recipe: Recipe
    varied: Mapping[str, Any]
    sha256: str


def load_grid(path: str | Path) -> tuple[Grid, list[Run]]:
    """A grid file and its runs. Every recipe is checked, every model is built once, without memory. Raises BadInput with file, key and remedy."""
    path = Path(path)
    try:
        grid = strictly(Grid, read_toml(path, "a grid"))
    except ValidationError as error:
        raise BadInput(f"expected a valid grid in {path.name}, got {_first(error)}; correct or remove that key") from None
    read = cache(load_recipe)  # once per base recipe
    read(path.parent / grid.base)  # also if no run uses it
    runs = [_run(read(_base(grid, varied, path)), fixed, varied, path.name) for fixed, varied in _combinations(grid, path.name)]
    twice = next((a for a, b in itertools.pairwise(sorted(runs, key=lambda run: run.sha256)) if a.sha256 == b.sha256), None)
    if twice is not None:
        raise BadInput(f"expected distinct runs in {path.name}, got one twice ({described(twice.varied)}); remove the repetition")
    return grid, runs


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"'{'.'.join(str(part) for part in first['loc'])}': {first['msg']}"


def _leaves(table: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:  # an empty table is a value: it replaces the base's table
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(part if part.replace("_", "").replace("-", "").isalnum() else f'"{part}"' for part in path)


Changes = dict[tuple[str, ...], Any]
_BASE = ("base",)  # the only key of a run that is not a key of recipes


def _combinations(grid: Grid, file: str) -> Iterator[tuple[Changes, Changes]]:
    """(changes of every run, changes of this run)."""
    lists = dict(_leaves(grid.grid))
    for path, values in lists.items():
        if not isinstance(values, list) or not values:
            raise BadInput(
                f"expected a list of values for {_dotted(path)} in [grid] of {file}, got {str(values)[:60]!r}; put single values into [set]"
            )
    total = math.prod(len(values) for values in lists.values()) * max(1, len(grid.run))
    if total > MAX_RUNS:
        raise BadInput(f"expected at most {MAX_RUNS} runs in {file}, got {total}; shorten the lists")
    fixed = dict(_leaves(grid.set))
    for table in grid.run or [{}]:
        own = dict(_leaves(table))
        shared = [path for path in own if path in lists] + [path for path in (own | lists) if path in fixed]
        if shared:
            raise BadInput(f"expected {_dotted(shared[0])} in one table of {file}, got it in two; remove one")
        for values in itertools.product(*lists.values()):
            yield fixed, own | dict(zip(lists, values, strict=True))


def _base(grid: Grid, varied: Changes, path: Path) -> Path:
    name = varied.get(_BASE, grid.base)
    if not isinstance(name, str):
        raise BadInput(f"expected the name of a recipe file as base of a run in {path.name}, got {str(name)[:60]!r}; write it in quotes")
    return path.parent / name


def _run(base: Recipe, fixed: Changes, varied: Changes, file: str) -> Run:
    document: dict[str, Any] = base.model_dump(mode="json", exclude_none=True)
    for path, value in (fixed | {path: value for path, value in varied.items() if path != _BASE}).items():
        place = document
        for part in path[:-1]:
            if not isinstance(place.setdefault(part, {}), dict):
                raise BadInput(f"expected a table before {_dotted(path)} in {file}, got a value; write the key as the recipe has it")
            place = place[part]
        place[path[-1]] = value
    changes = {_dotted(path): value for path, value in varied.items()}
    try:
        recipe = strictly(Recipe, document)
    except ValidationError as error:
        raise BadInput(f"expected valid recipes from {file}, got {_first(error)} ({described(changes)}); correct that key") from None
    _check_model(recipe)
    sha256 = identity(recipe.model_copy(update=_DESCRIPTIVE))
    name = f"{base.name}-{sha256[:12]}"
    changed = f"{base.description} Changed: {described(changes)}." if changes else base.description
    return Run(recipe.model_copy(update={"name": name, "description": changed}), changes, sha256)


def _check_model(recipe: Recipe) -> None:
    """Builds the model on the meta device, so that an error in run 7 is reported before run 1 trains."""
    from robustlip.checkpoints import planned
    from robustlip.models.build import build

    config = dict(recipe.model)
    if "gpt" in str(config.get("kind")) and "vocabulary_size" not in config:
        config.setdefault("vocabulary", "ab")
    planned(build, config)


def described(varied: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in varied.items()) or "the base recipe"
