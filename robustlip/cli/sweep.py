"""`robustlip sweep`: train a grid of recipes one after the other. Exit codes: 0 done, 1 a run failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from robustlip.cli.batches import end_interrupted
from robustlip.cli.options import DataDir, Device, Json
from robustlip.errors import RobustlipError


def sweep(
    grid: Annotated[Path, typer.Argument(metavar="GRID", help="a grid file (TOML): a base recipe and lists of changes")],
    out_folder: Annotated[Optional[Path], typer.Option("--out", help="folder of the sweep  [default: runs/NAME]")] = None,
    limit: Annotated[Optional[int], typer.Option("--limit", min=0, help="train at most this many runs now; 0 shows finished runs only")] = None,
    json: Json = None, device: Device = None, data_dir: DataDir = None,
) -> None:  # fmt: skip
    """Train every recipe of a grid and plot accuracy against the proved bound. Run it again to resume a stopped sweep."""
    from robustlip.cli.console import Out, Progress, choose_device
    from robustlip.sweep import draw, load_grid, run_sweep, table

    out = Out(json, grid)
    wanted, runs = load_grid(grid)
    folder = out_folder or Path("runs") / wanted.name
    where = choose_device(device, out)
    with Progress() as progress:
        done = run_sweep(wanted, runs, folder, device=where, data_dir=data_dir, limit=limit, advance=progress)
    pictures = draw(done)
    out.json({"sweep": str(folder), **done.document(), "plots": [str(path) for path in pictures]})
    headings, rows = table(done)
    title = f"{wanted.title or wanted.name}: accuracy and bound{'  (PARTIAL)' if done.partial else ''}"
    out.table(title, headings, rows, left=headings.index("Status") + 1)
    out.say(f"results: {folder / 'results.json'}\ntables:  {folder / 'table.md'} (also .csv)")
    if pictures:
        out.say(f"plot:    {pictures[0]} (also .svg)")
    left = sum(row.status != "finished" for row in done.rows)
    end_interrupted(done.interrupted, f"interrupted with {left} of {len(done.rows)} runs to go; run the command again to resume")
    if done.failed:
        raise RobustlipError(f"{len(done.failed)} of {len(done.rows)} runs failed; first {done.failed[0].name}: {done.failed[0].note}")
