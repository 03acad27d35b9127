"""The state of every run: its row if it is finished, else its training state if it was stopped, else nothing."""

from __future__ import annotations

import math
from codecs import BOM_UTF8
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from robustlip.errors import BadInput, first_line
from robustlip.files import TOML_LIMIT, read_limited
from robustlip.hashing import weights_sha256
from robustlip.sweep.grid import Grid, Run

PENDING, PARTIAL, FINISHED, FAILED = "pending", "partial", "finished", "failed"


@dataclass(frozen=True)
class Row:
    """The result of one run. accuracy in [0, 1] and loss in nats on the test split, bounds from `lipschitz_bound`, seconds of training.

    published: the formula of Newhouse et al. 2025 for these weights, ∞-RMS, None if it does not apply (why_not). steps: done so far.
    """

    name: str
    varied: Mapping[str, Any]
    recipe_sha256: str
    status: str = PENDING
    accuracy: float | None = None
    loss: float | None = None
    bound_rms: float | None = None
    bound_l2: float | None = None
    published: float | None = None
    why_not: str = ""
    seconds: float | None = None
    steps: int = 0
    of_steps: int = 0
    parameters: int | None = None
    weights_sha256: str = ""
    note: str = ""


@dataclass
class Sweep:
    """A grid, its folder, and one row per run in the order of the grid."""

    grid: Grid
    folder: Path
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False

    @property
    def partial(self) -> bool:
        return any(row.status != FINISHED for row in self.rows)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.status == FAILED]

    @property
    def keys(self) -> list[str]:
        """The dotted keys that vary, in the order of the file."""
        return list(dict.fromkeys(key for row in self.rows for key in row.varied))

    def document(self) -> dict[str, Any]:
        return {"name": self.grid.name, "base": self.grid.base, "partial": self.partial, "keys": self.keys, "runs": [asdict(r) for r in self.rows]}


def known_row(run: Run, folder: Path) -> Row:
    """The row of a run, from its folder."""
    from robustlip.checkpoints import load_tensors

    place = folder / run.recipe.name
    row = Row(run.recipe.name, dict(run.varied), run.sha256, of_steps=run.recipe.run.steps)
    if (place / "row.json").is_file() and (place / f"{run.recipe.name}.safetensors").is_file():
        try:
            text = read_limited(place / "row.json", "a row", TOML_LIMIT, "remove it").removeprefix(BOM_UTF8)
            kept = TypeAdapter(Row).validate_json(text, strict=True)
        except (ValueError, RecursionError):
            raise BadInput(f"expected a row written by this version in {place / 'row.json'}, got another; remove that file") from None
        if kept.recipe_sha256 == run.sha256 and kept.status == FINISHED:
            _check_proved(kept, place)
            return replace(kept, varied=dict(run.varied))
    state = place / f"{run.recipe.name}.state.safetensors"
    if not state.is_file():
        return row
    try:
        _, header = load_tensors(state)
    except BadInput as error:
        return replace(row, status=FAILED, note=first_line(error, 300))
    last = {key: value for entry in header.get("history", []) for key, value in entry.items()}
    return replace(
        row, status=PARTIAL, steps=int(header.get("step", 0)), seconds=header.get("seconds"), accuracy=last.get("accuracy"), loss=last.get("loss")
    )


def _check_proved(row: Row, place: Path) -> None:
    """Compares the proved bounds in a row with those of the weights in its folder. Raises BadInput if they differ."""
    from robustlip.certifiers import lipschitz_bound
    from robustlip.models.zoo import load

    model = load(place / f"{row.name}.safetensors")
    agrees = [row.weights_sha256 == weights_sha256(model), 0 <= (row.accuracy or 0.0) <= 1]
    bound = lipschitz_bound(model)
    for value, key in ((row.bound_rms, "rms"), (row.bound_l2, "l2")):
        agrees.append(value is not None and (value == bound[key] or math.isclose(value, float(bound[key]), rel_tol=1e-6)))
    if not all(agrees):
        raise BadInput(f"expected the row of the model in its folder in {place / 'row.json'}, got other values; remove that file to train it again")
