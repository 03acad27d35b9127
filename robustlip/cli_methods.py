"""`robustlip certify --method all`: every certifier over the same samples, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

if TYPE_CHECKING:
    from robustlip.comparison import Comparison
    from robustlip.console import Out

ALL = "all"


class CertifyCommand(TyperCommand):
    """Lists the methods below its options; they are imported only when the help is asked for."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from robustlip.certifiers import methods

        with formatter.section("Methods"):
            rows = [("best", "the largest radius of those that apply, sample by sample"), (ALL, "compare them in a table; no certificate")]
            formatter.write_dl(rows + [(name, method.what) for name, method in methods().items()])


def show(out: Out, model: str, done: Comparison) -> None:
    """The table, and below it what it leaves out."""
    import numpy as np

    from robustlip.eval.tables import DASH, number, percent

    radii, wins = done.radii(), done.wins()

    def cells(row: dict[str, Any], largest: str, radius: str) -> list[str]:
        accuracy = [percent(value) for value in row["accuracy"].values()]
        fraction = [] if done.attacked is None else [number(row["fraction_of_attack"])]
        return [row["method"], radius, *accuracy, *fraction, largest, number(row["seconds"])]

    rows = [cells(row := done.row(n, r, done.seconds[n]), str(wins[n]), number(row["median_radius"])) for n, r in done.radius.items()]
    best = done.row("best of these", done.best, sum(done.seconds.values()))
    rows.append(cells(best, str(sum(wins.values())), number(best["median_radius"])))
    if done.attacked is not None:
        observed = done.row(f"attack {done.attack!r}", done.attacked, done.attack_seconds) | {"fraction_of_attack": None}
        rows.append(cells(observed, DASH, number(done.median(done.attacked), "none")))
    headings = ["method", "median radius", *(f"acc. (%) at {r:g}" for r in radii)]
    headings += ([] if done.attacked is None else ["certified / attacked"]) + ["largest on", "seconds"]
    partial = "PARTIAL: " if done.stopped else ""
    out.table(f"{partial}{model}: methods against {done.threat.name}, the same {len(done.label)} samples", headings, rows, left=1)
    notes = [f"This table is partial: {done.stopped.rstrip('.')}."] if done.stopped else []
    notes += [f"{name} left out: {reason.rstrip('.')}." for name, reason in done.left_out.items()]
    right = int(np.sum(done.correct))
    at = "" if done.threat.radius is not None or not radii else ", shown at the quartiles of the best radii"
    notes.append(
        f"Radii ({done.threat.units}): medians over the {right} of {len(done.label)} samples that are classified correctly, covers {done.dtype}. "
        f"Accuracy: of all samples, proved at that radius{at}; of the attack, not broken within it."
    )
    notes.append("Largest on: samples on which no method proved more. Seconds: of this run, in this order; constants of the weights are shared.")
    notes.append("This table is no certificate: certify with one method, or best, and --json to write one.")
    for note in notes:
        out.console().print(note, markup=False)
