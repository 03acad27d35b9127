"""`robustlip eval`: a suite of models, threats and attacks. Exit code 130 after Ctrl-C; finished results are kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from robustlip.cli.batches import end_interrupted
from robustlip.cli.options import BatchSize, DataDir, Device, Json, Limit

if TYPE_CHECKING:
    from robustlip.cli.console import Out
    from robustlip.eval.runner import Run


def evaluate(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="a suite file (TOML) or the name of a bundled suite")],
    out: Annotated[Optional[Path], typer.Option("--out", help="folder of the run  [default: runs/NAME]")] = None, json: Json = None,
    device: Device = None, batch_size: BatchSize = 256, limit: Limit = None,
    seed: Annotated[Optional[int], typer.Option("--seed", help="instead of the seed in the suite")] = None, data_dir: DataDir = None,
) -> None:  # fmt: skip
    """Evaluate every model of a suite. Run it again to resume a stopped evaluation."""
    run_and_show(suite, out, json, device, batch_size, limit, seed, data_dir)


def run_and_show(
    suite_name: str, folder: Path | None, json: str | None, device: str | None, batch_size: int, limit: int | None, seed: int | None,
    data_dir: str | None,
) -> None:  # fmt: skip
    from robustlip.cli.console import Out, Progress, choose_device
    from robustlip.eval.runner import Settings, interrupted_sentence, run_suite
    from robustlip.eval.suite import load_suite

    out = Out(json, suite_name)
    suite = load_suite(suite_name)
    folder = folder or Path("runs") / suite.name
    settings = Settings(choose_device(device, out), batch_size, limit, seed, data_dir)
    with Progress() as progress:
        done = run_suite(suite, folder, settings, advance=progress, say=out.say)
    try:
        if done.records:
            _show(done, out)
    finally:
        # A plot that fails must not hide that a certificate is false.
        done.raise_errors()
    end_interrupted(done.interrupted, interrupted_sentence(done))


def _show(run: Run, out: Out) -> None:
    """Print the tables and the JSON, write the files of the run, and print their paths."""
    from robustlip.eval import tables
    from robustlip.eval.report import write_report
    from robustlip.files import write_text

    summary = tables.summarise(run.records, run.suite)
    title = run.suite.title or run.suite.name
    for form, name in (("md", "table.md"), ("csv", "table.csv"), ("latex", "table.tex"), ("html", "table.html")):
        write_text(run.folder / name, tables.render(summary, form, partial=run.partial, title=title))
    out.json({"run": str(run.folder), "partial": run.partial, "rows": summary.to_dict("records"), "errors": run.manifest["errors"]})
    overview = tables.compact(summary)
    partial = "  (PARTIAL RUN)" if run.partial else ""
    out.say(f"\n{tables.terminal(overview, f'{title}: one row per model{partial}')}")
    if len(summary) > len(overview):
        out.say(tables.terminal(summary, f"Every threat{partial}"))
    for note in tables.notes(summary, run.partial):
        out.console().print(note, markup=False)
    report = write_report(run)
    out.say(f"report: {report}\ntables: {run.folder / 'table.md'} (also .csv, .tex, .html)")
