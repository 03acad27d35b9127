"""`robustlip table`: the robustness table of an evaluation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from robustlip.cli.options import Json


def table(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of an evaluation")],
    form: Annotated[str, typer.Option("--format", help="md, csv, latex or html")] = "md",
    one_row: Annotated[bool, typer.Option("--compact", help="one row per model")] = False,
    json: Json = None,
) -> None:  # fmt: skip
    """Print the robustness table of an evaluation."""
    from robustlip.cli.console import STDOUT, Out
    from robustlip.eval import tables
    from robustlip.eval.results import check_soundness
    from robustlip.eval.runner import read_run

    out, done = Out(json), read_run(run)
    summary = tables.summarise(done.records, done.suite)
    text = tables.render(summary, form, partial=done.partial, title=done.suite.title or done.suite.name, one_row_per_model=one_row)
    rows = tables.compact(summary) if one_row else summary
    out.json({"run": str(run), "partial": done.partial, "rows": rows.to_dict("records")})
    if json != STDOUT:
        sys.stdout.write(text)
    check_soundness(done.records, done.folder)
