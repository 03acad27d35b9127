"""The HTML report of an evaluation as one file: tables, plots, explanations, and facts about the run."""

from __future__ import annotations

import base64
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustlip.eval import plots as plotting
from robustlip.eval import tables
from robustlip.eval.runner import Run
from robustlip.files import write_text

if TYPE_CHECKING:
    import pandas as pd

PAGE, PLOTS = "report.html", "plots"
_TEMPLATES = Path(__file__).resolve().parent / "templates"


def write_report(run: Run, path: Path | None = None) -> Path:
    """Draw the plots of a run and write its report (default: report.html in the run's folder); returns its path."""
    path = Path(path) if path else run.folder / PAGE
    write_text(path, page(run, plotting.draw(run.records, run.suite, run.folder / PLOTS)))
    return path


def page(run: Run, plots: list[plotting.Plot]) -> str:
    """The report as HTML. Images are data URIs; nothing is loaded from elsewhere."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    summary = tables.summarise(run.records, run.suite)
    overview = tables.compact(summary)
    return environment.get_template("report.html.j2").render(
        title=run.suite.title or run.suite.name,
        description=run.suite.description,
        warnings=_warnings(run),
        overview=_grid(overview),
        overview_notes=tables.notes(overview, run.partial),
        detail=_grid(summary),
        detail_notes=tables.notes(summary, run.partial)[:-1],  # the legend is below the first table
        plots=[{**asdict(plot), "source": _data_uri(plot.svg)} for plot in plots],
        models=_models(summary),
        caveats=_caveats(run),
        attacks=_attacks(run),
        facts=_facts(run),
    )


def _data_uri(svg: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode("ascii")


def _grid(summary: pd.DataFrame) -> dict[str, Any]:
    headings, rows = tables.display(summary)
    pairs, threats, roles = list(summary["pair"]), list(summary["threat"]), list(summary["role"])
    return {
        "headings": headings,
        "rows": [
            {"cells": cells, "role": roles[i], "first": i > 0 and (pairs[i], threats[i]) != (pairs[i - 1], threats[i - 1])}
            for i, cells in enumerate(rows)
        ],
    }


def _warnings(run: Run) -> list[str]:
    warnings = [
        f"CONTRADICTION: {record.contradiction()}. The certificate is false; do not use these numbers. Adversarial point: {record.adversarial}"
        for record in run.records
        if record.contradiction()
    ][:5]
    if run.partial:
        missing = len(run.manifest.get("missing", []))
        warnings.append("Partial run: " + (f"{missing} of its parts are missing." if missing else "fewer samples than the suite asks for."))
    return warnings + [f"{e['model']} failed: {e['message']}" for e in run.manifest.get("errors", []) if e["kind"] != "CertificateViolation"]


def _models(summary: pd.DataFrame) -> list[dict[str, Any]]:
    found = []
    for model in dict.fromkeys(summary["model"]):
        part = summary[summary["model"] == model]
        certificates = dict.fromkeys(" in ".join(filter(None, (row.method, row.dtype))) for row in part.itertuples())
        first = part.iloc[0]
        found.append(
            {
                "name": model,
                "role": first["role"],
                "data": f"{first['data']}{f' ({note})' if (note := first['data_note']) else ''}",
                "samples": int(part["samples"].max()),
                "certificates": ", ".join(filter(None, certificates)),
                "weights": first["weights_sha256"],
            }
        )
    return found


def _caveats(run: Run) -> list[tuple[str, str]]:
    caveats = []
    for model, card in run.manifest.get("cards", {}).items():
        text = card.get("caveats")
        if text:
            caveats.append((model, "; ".join(text) if isinstance(text, list) else str(text)))
    return caveats


def _attacks(run: Run) -> list[tuple[str, str]]:
    from robustlip.attacks import by_name

    listed = []
    for pair in run.suite.pairs:
        for threat in pair.threats:
            how = "; ".join(by_name(a.name, **a.options).described for a in threat.attacks) if threat.radii else ""
            if threat.sensitivity_radius is not None:
                how = "; ".join(filter(None, (how, f"sensitivity at radius {threat.sensitivity_radius:g}")))
            listed.append((f"{pair.name}, {threat.name}", how))
    return listed


def _facts(run: Run) -> list[tuple[str, str]]:
    machine = run.manifest.get("machine", {})
    versions = run.manifest.get("versions", {})
    return [
        ("Suite", run.suite.name),
        ("Seed", str(run.manifest.get("seed", run.suite.seed))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Machine", ", ".join(f"{name} {value}" for name, value in machine.items())),
        ("Time", f"{run.manifest.get('seconds', 0)} s for this run; rows kept from earlier runs cost nothing"),
        ("Rows", f"{len(run.records)} (one per sample, threat and model)"),
    ]
