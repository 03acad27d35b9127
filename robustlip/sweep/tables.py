"""The tables of a sweep: markdown for reading, CSV for programs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from robustlip.figures import figure, upward
from robustlip.sweep.rows import FINISHED, PARTIAL, Row, Sweep

_COLUMNS = ("Status", "Accuracy (%)", "Loss", "Proved, ∞-RMS", "Proved, ℓ2", "Published formula, ∞-RMS", "Seconds")
LEGEND = (
    "Accuracy and loss on the test split (for a partial run: at its last step). Proved: a Lipschitz constant to the logits that holds for these "
    "weights, from embeddings (transformers) or inputs; ∞-RMS is the paper's norm. Published formula: what Newhouse et al. 2025 compute for the "
    "same weights, which is not a bound. Scaling the logits scales every constant and no accuracy: compare with the loss, or by radii."
)


_COLUMNS_OF_KEYS = 3
_END = re.compile(r'"[^"]*"|[^."]+')  # the parts of a dotted key, which may be quoted


def _cells(row: Row, keys: Sequence[str]) -> list[str]:
    status = f"{row.status} ({row.steps} of {row.of_steps} steps)" if row.status == PARTIAL else row.status
    accuracy = None if row.accuracy is None else 100 * row.accuracy
    shown = [figure(accuracy), figure(row.loss), upward(row.bound_rms), upward(row.bound_l2), figure(row.published)]
    return [*_settings(row, keys), status, *shown, figure(row.seconds, 3)]


def _settings(row: Row, keys: Sequence[str]) -> list[str]:
    """The varied keys, one column each; if there are more than a few, one text with shortened names, as far as they are unambiguous."""
    if len(keys) <= _COLUMNS_OF_KEYS:
        return [str(row.varied.get(key, "–")) for key in keys]
    ends = [_END.findall(key)[-1] for key in keys]
    short = {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}
    return [", ".join(f"{short[key]} = {row.varied[key]}" for key in keys if key in row.varied) or "the base recipe"]


def table(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text, in the order of the grid."""
    keys = list(sweep.keys) if len(sweep.keys) <= _COLUMNS_OF_KEYS else ["settings"]
    return [*keys, *_COLUMNS], [_cells(row, sweep.keys) for row in sweep.rows]


def markdown(sweep: Sweep) -> str:
    """The table with its title, its legend and the failed runs."""
    headings, rows = table(sweep)
    lines = [f"# {sweep.grid.title or sweep.grid.name}{' (PARTIAL)' if sweep.partial else ''}", ""]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (headings, ["---"] * len(headings), *rows)]
    lines += ["", LEGEND, *(f"{row.name} failed: {row.note}" for row in sweep.failed)]
    notes = sorted({row.note for row in sweep.rows if row.note and row.status == FINISHED})
    return "\n".join(lines + [f"Data: {note}." for note in notes]) + "\n"


def csv(sweep: Sweep) -> str:
    """Full precision, one line per run, each with the column `partial`."""
    import csv as writer
    import io

    fields = ("status", "accuracy", "loss", "bound_rms", "bound_l2", "published", "seconds", "steps", "parameters", "name", "weights_sha256")
    text = io.StringIO()
    lines = writer.writer(text, lineterminator="\n")
    lines.writerow([*sweep.keys, *fields, "partial"])
    for row in sweep.rows:
        lines.writerow([*(row.varied.get(key, "") for key in sweep.keys), *(getattr(row, name) for name in fields), sweep.partial])
    return text.getvalue()
