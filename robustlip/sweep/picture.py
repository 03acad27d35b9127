"""The plot of a sweep: accuracy against the proved bound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from robustlip.files import atomic
from robustlip.sweep.rows import FINISHED, Row, Sweep

# The palette of Okabe and Ito, as in eval/plots.py, and marker shapes for readers who cannot distinguish colours.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"))
_NARROW = 8  # ratio of the ends of the axis
_LABELLED = 16  # points; more labels would overlap
_LABEL_SIZE, _PLOT = 7.5, (340.0, 230.0)  # in points: the letters, and the plot area


def draw(sweep: Sweep) -> list[Path]:
    """Plot accuracy against the proved bound (∞-RMS, logarithmic); hollow: the published formula for the same weights. PNG and SVG.

    Returns [] if no finished run has a finite bound above 0.
    """
    rows = [row for row in sweep.rows if row.status == FINISHED and row.bound_rms and math.isfinite(row.bound_rms) and row.accuracy is not None]
    if not rows:
        return []
    import matplotlib
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    matplotlib.use("Agg", force=True)
    import matplotlib.pyplot as plt

    group = _group(rows, sweep.keys)
    values = list(dict.fromkeys(str(row.varied.get(group)) for row in rows)) if group else [""]
    with plt.rc_context({"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "robustlip"}):
        figure_, axes = plt.subplots(figsize=(7.0, 4.6), layout="constrained")
        for value, (colour, marker) in zip(values, itertools.cycle(_STYLES)):
            mine = sorted((row for row in rows if not group or str(row.varied.get(group)) == value), key=lambda row: row.bound_rms or 0.0)
            accuracy = [100 * (row.accuracy or 0.0) for row in mine]
            label = f"{group} = {value}" if group else None
            axes.plot([row.bound_rms or 0.0 for row in mine], accuracy, color=colour, marker=marker, linewidth=1.2, markersize=6, label=label)
            published = [(row.published, at) for row, at in zip(mine, accuracy, strict=True) if row.published and math.isfinite(row.published)]
            if published:
                x, y = zip(*published, strict=True)
                # Larger and behind, so that it is visible around a bound with the same value.
                axes.plot(x, y, color=colour, marker=marker, markerfacecolor="none", linewidth=0.8, linestyle=":", markersize=11, zorder=1)
        axes.plot([], [], color="#444444", marker="o", linestyle="", markersize=6, label="filled: proved bound")
        if any(row.published for row in rows):
            axes.plot(
                [], [], color="#444444", marker="o", markerfacecolor="none", linestyle="", markersize=11, label="hollow: published formula (no bound)"
            )
        for (x_at, y_at), offset, text in _labels(rows, group):
            axes.annotate(text, (x_at, y_at), xytext=offset, textcoords="offset points", fontsize=_LABEL_SIZE, color="#444444")
        axes.set_xscale("log")
        shown = [value for row in rows for value in (row.bound_rms, row.published) if value]
        if max(shown) < _NARROW * min(shown):  # labels at powers of ten would be too few, and labels between them would overlap
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.14, y=0.14)
        axes.set_xlabel("Lipschitz constant to the logits, ∞-RMS")
        axes.set_ylabel("test accuracy (%)")
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        left = sum(row.status != FINISHED for row in sweep.rows)
        partial = f" (PARTIAL: {left} of {len(sweep.rows)} runs are missing)" if left else ""
        axes.set_title(f"{sweep.grid.title or sweep.grid.name}{partial}", loc="left", fontsize=11.5)
        figure_.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        paths = [sweep.folder / "accuracy-bound.png", sweep.folder / "accuracy-bound.svg"]
        for path, options in zip(paths, ({"dpi": 150}, {"metadata": {"Date": None}}), strict=True):
            with atomic(path) as temporary:
                figure_.savefig(temporary, **options)  # type: ignore[arg-type]
        plt.close(figure_)
    return paths


def _labels(rows: Sequence[Row], group: str) -> list[tuple[tuple[float, float], tuple[float, float], str]]:
    """(point, offset in points, text) for all labels except that of the colour. Empty if there are too many points.

    Nearby points with equal texts share one label; another label is put at the first position that does not overlap others.
    """
    if len(rows) > _LABELLED:
        return []
    places = [(math.log10(row.bound_rms or 1.0), 100 * (row.accuracy or 0.0)) for row in rows]
    spans = [max(max(axis) - min(axis), 1e-9) for axis in zip(*places, strict=True)]
    # The positions of the points on the page, approximately, because the layout is not known yet.
    at = [(_PLOT[0] * x / spans[0], _PLOT[1] * y / spans[1]) for x, y in places]
    out: list[tuple[tuple[float, float], tuple[float, float], str]] = []
    taken: list[tuple[float, float, str, tuple[float, float, float, float]]] = []
    for row, (across, upwards) in zip(rows, at, strict=True):
        text = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row.varied.items() if key != group)
        if not text or any(text == other and abs(x - across) < 50 and abs(y - upwards) < 25 for x, y, other, _ in taken):
            continue
        width = 0.6 * _LABEL_SIZE * len(text)
        for dx, dy in ((7, -12), (7, 6), (-7 - width, 6), (-7 - width, -12), (7, -22), (7, 16)):
            box = (across + dx, upwards + dy, across + dx + width, upwards + dy + _LABEL_SIZE)
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for *_, b in taken):
                break
        taken.append((across, upwards, text, box))
        out.append(((row.bound_rms or 1.0, 100 * (row.accuracy or 0.0)), (dx, dy), text))
    return out


def _group(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """The key shown by colour: the one with the fewest values above one, if another key varies too."""
    counts = {key: len({str(row.varied.get(key)) for row in rows}) for key in keys}
    several = [key for key in keys if 2 <= counts[key] <= len(_STYLES)]
    return min(several, key=lambda key: counts[key]) if several and sum(count > 1 for count in counts.values()) > 1 else ""
