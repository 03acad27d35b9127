"""Plots of accuracy against radius: certified accuracy and accuracy under attack, for Lipschitz model and baseline on the same axes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustlip.eval.results import Record, to_frame
from robustlip.eval.suite import LIPSCHITZ, PairSpec, Suite, ThreatSpec
from robustlip.eval.tables import number
from robustlip.files import atomic

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

# The palette of Okabe and Ito: distinguishable with colour blindness, and by line style in black and white.
_COLOURS = {"lipschitz": "#0072B2", "baseline": "#D55E00"}
DECADES = 1e5  # largest ratio of the ends of a logarithmic axis
_NAMES = {"lipschitz": "Lipschitz", "baseline": "Baseline"}


@dataclass(frozen=True)
class Plot:
    """One plot on disk: PNG for slides, SVG for the report."""

    title: str
    description: str
    png: Path
    svg: Path


def draw(records: Sequence[Record], suite: Suite, folder: Path) -> list[Plot]:
    """One plot per pair and threat with radii, as PNG and SVG in `folder`."""
    import matplotlib

    matplotlib.use("Agg", force=True)

    frame = to_frame(records)
    plots = []
    for pair in suite.pairs:
        for threat in pair.threats:
            part = frame[(frame["pair"] == pair.name) & (frame["threat"] == threat.name) & frame["certified_radius"].notna()]
            if len(part):
                plots.append(_draw_one(part, pair, threat, Path(folder)))
    return plots


def _draw_one(part: pd.DataFrame, pair: PairSpec, threat: ThreatSpec, folder: Path) -> Plot:
    import matplotlib.pyplot as plt
    import numpy as np

    scales = part.loc[part["prediction"] == part["label"], ["certified_radius", "attacked_radius"]].to_numpy().ravel()
    scales = scales[np.isfinite(scales) & (scales > 0)]
    scales = np.concatenate([scales, np.asarray(threat.radii)])
    low, high = float(scales.min()), float(scales.max())
    # A baseline certified at 1e-9 would be invisible on a linear axis.
    logarithmic = high / float(np.quantile(scales, 0.02)) > 40
    # … but an axis down to 1e-14 would squeeze everything else to its right end: curves left of the axis are named in the legend instead.
    left, right = (max(low / 2, high / DECADES), high * 2) if logarithmic else (0.0, high * 1.08)
    beyond: list[str] = []

    with plt.rc_context({"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "robustlip"}):
        figure, axes = plt.subplots(figsize=(6.2, 4.1), layout="constrained")
        for role, model in pair.members():
            mine = part[part["model"] == model]
            if mine.empty:
                continue
            correct = (mine["prediction"] == mine["label"]).to_numpy()
            colour, name = _COLOURS[role], _NAMES[role]
            attacked = _curve(mine["attacked_radius"].to_numpy()[correct], len(mine), left, right)
            certified = _curve(mine["certified_radius"].to_numpy()[correct], len(mine), left, right)
            if certified[1].max() == 0 and correct.any():
                typical = float(np.median(mine["certified_radius"].to_numpy()[correct]))
                beyond.append(f"{name}: certified radii are left of the axis (median {number(typical)})" if typical else f"{name}: nothing certified")
            axes.plot(
                *attacked, color=colour, linestyle=(0, (5, 2)), linewidth=1.8, drawstyle="steps-post", label=f"{name}: under attack (upper bound)"
            )
            axes.plot(*certified, color=colour, linewidth=2.2, drawstyle="steps-post", label=f"{name}: certified (lower bound)")
        for radius in threat.radii:
            axes.axvline(radius, color="#666666", linewidth=0.8, linestyle=":")
        if logarithmic:
            axes.set_xscale("log")
        axes.set_xlim(left, right)
        axes.set_ylim(0, 102)
        axes.set_xlabel("\n".join([f"radius: {_units(threat)}", *beyond]))
        axes.set_ylabel("accuracy (% of samples)")
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_title(f"{pair.title or pair.name}, {threat.name}", loc="left", fontsize=11.5)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
        stem = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{pair.name}--{threat.name}")
        plot = Plot(f"{pair.title or pair.name}, {threat.name}", _describe(part, pair, threat), folder / f"{stem}.png", folder / f"{stem}.svg")
        for path, options in ((plot.png, {"dpi": 150}), (plot.svg, {"metadata": {"Date": None}})):
            with atomic(path) as temporary:
                figure.savefig(temporary, **options)  # type: ignore[arg-type]
        plt.close(figure)
    return plot


def _curve(radius: np.ndarray, samples: int, left: float, right: float) -> tuple[Any, Any]:
    """Accuracy in percent as a step function of the radius: the share of `samples` whose radius is larger."""
    import numpy as np

    steps = np.sort(radius[(radius > left) & (radius < right)])
    x = np.concatenate([[left], steps, [right]])
    # At a step itself the sample does not count any more; for the certified curve this differs at single points only.
    alive = np.array([np.sum(radius > at) for at in x[:-1]])
    return x, 100.0 * np.concatenate([alive, alive[-1:]]) / samples


def _units(threat: ThreatSpec) -> str:
    return str(threat.threat().units)


def _describe(part: pd.DataFrame, pair: PairSpec, threat: ThreatSpec) -> str:
    """A description of the plot for readers who cannot see it."""
    parts = []
    for role, model in pair.members():
        mine = part[part["model"] == model]
        if mine.empty:
            continue
        correct = mine["prediction"] == mine["label"]
        at = threat.radii[0]
        certified = 100 * (correct & (mine["certified_radius"] >= at)).mean()
        attacked = 100 * (correct & (mine["attacked_radius"] > at)).mean()
        who = "the Lipschitz model" if role == LIPSCHITZ else "the baseline"
        parts.append(f"{who} ({model}) at radius {at:g}: {certified:.1f} % certified, {attacked:.1f} % under attack")
    return "Accuracy against radius; " + "; ".join(parts) + ". Dotted: the radii of the table."
