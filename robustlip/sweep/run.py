"""Runs a sweep: finished runs are skipped, and results and tables are written after every run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from robustlip.errors import DataUnavailable, RobustlipError, first_line
from robustlip.files import read_toml, write_json, write_text
from robustlip.locks import sole_writer
from robustlip.sweep.grid import Grid, Run, described
from robustlip.sweep.rows import FAILED, FINISHED, PARTIAL, PENDING, Row, Sweep, known_row
from robustlip.sweep.tables import csv, markdown
from robustlip.training.state import make_folder

Advance = Callable[[str, int, int], None]


def run_sweep(
    grid: Grid,
    runs: Sequence[Run],
    folder: Path,
    *,
    device: str = "cpu",
    data_dir: str | None = None,
    limit: int | None = None,
    advance: Advance | None = None,
) -> Sweep:
    """Train the runs in `folder` that are not finished, at most `limit` of them, and write results.json and the tables after every run.

    advance(label, done, total) counts steps of the run.
    If training stops (a loss that is not finite, a violated cap, no memory), the run is marked failed, and the next one starts.
    Raises BadInput for input that training cannot use.
    """
    make_folder(Path(folder))
    with sole_writer(Path(folder), "sweep"):
        sweep = Sweep(grid, Path(folder), [known_row(run, Path(folder)) for run in runs])
        left = len(runs) if limit is None else limit
        try:
            for i, run in enumerate(runs):
                if sweep.rows[i].status == FINISHED or left <= 0:
                    continue
                left -= 1
                sweep.rows[i] = _train(run, sweep, f"{i + 1} of {len(runs)}", device, data_dir, advance)
                _write(sweep)
        except KeyboardInterrupt:
            sweep.interrupted = True
            for i, run in enumerate(runs):
                if sweep.rows[i].status in (PENDING, PARTIAL):
                    sweep.rows[i] = known_row(run, sweep.folder)
        _write(sweep)
        return sweep


def _train(run: Run, sweep: Sweep, which: str, device: str, data_dir: str | None, advance: Advance | None) -> Row:
    from robustlip.attacks import formulas
    from robustlip.models.zoo import load
    from robustlip.training import train

    place = sweep.folder / run.recipe.name

    def progress(step: int, steps: int, figures: dict[str, float]) -> None:
        if advance is not None:
            advance(f"{which}: {described(run.varied)}", step, steps)

    try:
        path = train(run.recipe, place, device=device, data_dir=data_dir, progress=progress)
    except DataUnavailable:
        raise  # the data is missing for all runs
    except (RobustlipError, RuntimeError) as error:
        return replace(known_row(run, sweep.folder), status=FAILED, note=first_line(error, 300))
    card = read_toml(path.with_suffix(".toml"), "a card")
    formula, why_not = formulas.published(load(path))
    row = Row(
        run.recipe.name, dict(run.varied), run.sha256, FINISHED, card["val_accuracy"], card["val_loss"], float(card["bound"]["rms"]),
        float(card["bound"]["l2"]), formula, why_not, card["train_seconds"], card["steps"], card["steps"], card["parameters"],
        card["weights_sha256"], card["data_note"],
    )  # fmt: skip
    write_json(place / "row.json", asdict(row))
    return row


def _write(sweep: Sweep) -> None:
    write_json(sweep.folder / "results.json", sweep.document())
    write_text(sweep.folder / "table.md", markdown(sweep))
    write_text(sweep.folder / "table.csv", csv(sweep))
