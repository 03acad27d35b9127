"""`robustlip report`: the HTML report of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from robustlip.cli.options import Json


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of an evaluation")],
    out_file: Annotated[Optional[Path], typer.Option("--out", help="file to write  [default: report.html in that folder]")] = None,
    json: Json = None,
) -> None:  # fmt: skip
    """Write the HTML report of an evaluation as one file."""
    from robustlip.cli.console import Out
    from robustlip.eval.report import write_report
    from robustlip.eval.results import check_soundness
    from robustlip.eval.runner import read_run

    out, done = Out(json), read_run(run)
    path = write_report(done, out_file)
    out.json({"run": str(run), "partial": done.partial, "report": str(path)})
    out.say(f"report: {path}")
    check_soundness(done.records, done.folder)
