"""Tables of records: one row per model × threat, or one row per model. Markdown, CSV, LaTeX and HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from robustlip.errors import BadInput
from robustlip.eval.results import Record, to_frame
from robustlip.eval.suite import Suite
from robustlip.threats import WeightBall

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

# Explanations of the notes of `robustlip.data`.
_NOTES = {"shipped page": "the page of text in robustlip, because the data set itself was not found", "subset": "a subset of it"}
FORMATS = ("md", "csv", "latex", "html")
DASH = "–"
LEGEND = (
    "Accuracies are fractions of all samples, in percent; certified ≤ true ≤ attacked. Medians are over correctly classified samples; "
    "‘none’ means that no attack succeeded at any distance tried. Certified/attacked is the median of the per-sample ratios "
    "where an attack succeeded; 1 would be exact. Weight sensitivity is the change of the logits (l2) per unit of the radius "
    "of the weight change, median over the samples of its own row in the full table."
)


def summarise(records: Sequence[Record], suite: Suite) -> pd.DataFrame:
    """One row per model × threat, in the order of the suite; accuracies in [0, 1], radii in the units of the threat.

    Columns …_1, …_2, … belong to the table radii of that threat, ascending. Attacked accuracy counts a sample if no attack
    succeeded at that radius or below; certified accuracy counts it if that radius is proved.
    """
    import numpy as np
    import pandas as pd

    from robustlip.attacks import by_name

    frame = to_frame(records)
    rows: list[dict[str, Any]] = []
    for pair in suite.pairs:
        for threat in pair.threats:
            for role, model in pair.members():
                part = frame[(frame["model"] == model) & (frame["threat"] == threat.name) & (frame["pair"] == pair.name)]
                if part.empty:
                    continue
                first = part.iloc[0]
                correct = (part["prediction"] == part["label"]).to_numpy()
                row: dict[str, Any] = {
                    "model": model, "pair": pair.name, "role": role, "threat": threat.name, "norm": first["norm"], "units": first["units"],
                    "samples": len(part), "correct": int(correct.sum()), "clean_accuracy": float(correct.mean()),
                }  # fmt: skip
                if threat.radii:
                    certified, attacked = part["certified_radius"].to_numpy(), part["attacked_radius"].to_numpy()
                    failed = (part["failure"] != "").to_numpy()
                    row["not_finite"] = int(failed.sum())
                    for k, radius in enumerate(threat.radii, start=1):
                        row[f"radius_{k}"] = radius
                        row[f"certified_accuracy_{k}"] = float(np.mean(correct & (certified >= radius)))
                        row[f"attacked_accuracy_{k}"] = float(np.mean(correct & (attacked > radius) & ~failed))
                    row["median_certified_radius"] = _median(certified[correct])
                    row["median_attacked_radius"] = _median(attacked[correct & ~failed])
                    broken = correct & np.isfinite(attacked) & (attacked > 0)
                    row["median_ratio"] = _median(certified[broken] / attacked[broken])
                    row["attack_succeeded"] = int(broken.sum())
                if isinstance(threat.threat(), WeightBall):
                    row["certified_sensitivity"] = _median(part["certified_sensitivity"].to_numpy())
                    row["observed_sensitivity"] = _median(part["observed_sensitivity"].to_numpy())
                    row["sensitivity_radius"] = threat.sensitivity_radius
                row |= {
                    "data": f"{first['data']}:{first['split']}", "data_note": first["data_note"], "method": first["method"], "dtype": first["dtype"],
                    "attacks": ", ".join(a.name for a in threat.attacks) if threat.radii else "sensitivity",
                    "attack_settings": "; ".join(by_name(a.name, **a.options).described for a in threat.attacks) if threat.radii else "",
                    "weights_sha256": first["weights_sha256"], "seed": int(first["seed"]), "partial": bool(part["partial"].any()),
                    "seconds": float(part["seconds"].sum()),
                }  # fmt: skip
                row["not_certified"] = _refusals(part)
                rows.append(row)
    return pd.DataFrame(rows)


def _refusals(part: pd.DataFrame) -> str:
    """Why no sample of this part was certified, if the model itself was refused; else ''."""
    refused = part[(part["method"] == "") & (part["reason"] != "")]
    return " / ".join(dict.fromkeys(refused["reason"]))


def compact(summary: pd.DataFrame) -> pd.DataFrame:
    """One row per model: its first threat with table radii, and the first weight sensitivity that was measured."""
    import pandas as pd

    rows = []
    for model in dict.fromkeys(summary["model"]):
        part = summary[summary["model"] == model]
        with_radii = part[part["radius_1"].notna()] if "radius_1" in part else part.iloc[:0]
        row = (with_radii if len(with_radii) else part).iloc[0].to_dict()
        if "certified_sensitivity" in part:
            measured = part[part["certified_sensitivity"].notna()]
            if len(measured):
                for name in ("certified_sensitivity", "observed_sensitivity", "sensitivity_radius"):
                    row[name] = measured.iloc[0][name]
                row["sensitivity_units"] = measured.iloc[0]["units"]
        row["partial"] = bool(part["partial"].any())
        rows.append(row)
    return pd.DataFrame(rows)


def _median(values: np.ndarray) -> float:
    import numpy as np

    if not len(values):
        return math.nan
    # As in pandas: if half of the values are infinite, so is the median.
    return float(np.median(values))


def radii_count(summary: pd.DataFrame) -> int:
    """The largest number of table radii of a threat."""
    return max((int(c.rpartition("_")[2]) for c in summary.columns if c.startswith("radius_")), default=0)


def number(value: Any, infinite: str = "∞") -> str:
    """Three significant digits; 3.2e-14 for very small numbers; ∞ (or `infinite`), 0, and – for a missing value."""
    if value is None or value != value:
        return DASH
    value = float(value)
    if math.isinf(value):
        return infinite if value > 0 else f"-{infinite}"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 9_999.5:
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def percent(value: Any) -> str:
    """A fraction in percent with one decimal, without the sign, which is in the heading."""
    return DASH if value is None or value != value else f"{100 * value:.1f}"


def display(summary: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) as text, the same for every format. Units are in the headings or next to the threat."""
    count = radii_count(summary)
    headings = ["Model", "Threat", "n", "Clean acc. (%)"]
    headings += [f"r{k}: certified / attacked acc. (%)" for k in range(1, count + 1)]
    headings += ["Median certified radius", "Median attacked radius", "Certified/ attacked"]
    headings += ["Weight sensitivity certified / observed"]
    rows = []
    for row in summary.to_dict("records"):
        cells = [str(row["model"]), str(row["threat"]), f"{row['samples']}{'*' if row['partial'] else ''}", percent(row["clean_accuracy"])]
        for k in range(1, count + 1):
            radius = row.get(f"radius_{k}")
            both = f"{percent(row.get(f'certified_accuracy_{k}'))} / {percent(row.get(f'attacked_accuracy_{k}'))}"
            cells.append(DASH if radius is None or radius != radius else f"{_short(radius)}: {both}")
        cells += [number(row.get("median_certified_radius")), number(row.get("median_attacked_radius"), "none"), number(row.get("median_ratio"))]
        certified, observed = row.get("certified_sensitivity"), row.get("observed_sensitivity")
        cells.append(DASH if certified is None or certified != certified else f"{number(certified)} / {number(observed)}")
        rows.append(cells)
    if all(row[-1] == DASH for row in rows):
        headings, rows = headings[:-1], [row[:-1] for row in rows]
    return headings, rows


def _short(radius: float) -> str:
    return f"{radius:g}"


def terminal(summary: pd.DataFrame, title: str) -> str:
    """The table as plain text: a block per pair and threat, with the radii in its heading. At most 120 columns for two radii."""
    count = radii_count(summary)
    top = ["", "", "clean"] + [text for k in range(1, count + 1) for text in (f"acc. at r{k} (%)", "")]
    top += ["median radius", "", "cert./", "weight sensitivity", ""]
    under = ["", "n", "acc. (%)"] + ["certif.", "attack."] * count + ["certif.", "attack.", "attack.", "certif.", "observed"]
    blocks: dict[tuple[str, str], list[list[str]]] = {}
    for row in summary.to_dict("records"):
        radii = [f"r{k} = {row[f'radius_{k}']:g}" for k in range(1, count + 1) if row.get(f"radius_{k}") == row.get(f"radius_{k}")]
        heading = f"{row['threat']}{', ' if radii else ''}{', '.join(radii)} ({row['units']})"
        cells = ["  " + str(row["model"]), f"{row['samples']}{'*' if row['partial'] else ''}", percent(row["clean_accuracy"])]
        for k in range(1, count + 1):
            cells += [percent(row.get(f"certified_accuracy_{k}")), percent(row.get(f"attacked_accuracy_{k}"))]
        cells += [number(row.get("median_certified_radius")), number(row.get("median_attacked_radius"), "none"), number(row.get("median_ratio"))]
        cells += [number(row.get("certified_sensitivity")), number(row.get("observed_sensitivity"))]
        blocks.setdefault((row["pair"], heading), []).append(cells)
    rows = [cells for block in blocks.values() for cells in block]
    widths = [max(len(cells[i]) for cells in [under, *rows]) for i in range(len(under))]
    # A heading over two columns needs their joint width.
    for i, text in enumerate(top):
        paired = i + 1 < len(top) and text and not top[i + 1] and i > 1
        available = widths[i] + (2 + widths[i + 1] if paired else 0)
        widths[i] += max(0, len(text) - available)

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(cells)).rstrip()

    head, i = [], 0
    while i < len(top):
        paired = i + 1 < len(top) and bool(top[i]) and not top[i + 1] and i > 1
        head.append(top[i].rjust(widths[i] + (2 + widths[i + 1] if paired else 0)))
        i += 2 if paired else 1
    lines = [title, "", "  ".join(head).rstrip(), line(under)]
    lines.append("─" * max(len(text) for text in [lines[2], lines[3]]))
    for (_, heading), block in blocks.items():
        lines += [heading, *map(line, block)]
    return "\n".join(lines) + "\n"


def notes(summary: pd.DataFrame, partial: bool) -> list[str]:
    """The lines below a table: units, data, what is partial, explanations."""
    lines = []
    if partial or bool(summary["partial"].any()):
        lines.append("PARTIAL RUN: fewer samples (*) or fewer models and threats than the suite requests.")
    for threat, units in dict(zip(summary["threat"], summary["units"], strict=True)).items():
        lines.append(f"Radii of {threat}: {units}{_certifiers(summary[summary['threat'] == threat])}.")
    refused: dict[tuple[str, str], list[str]] = {}
    for model, threat, why in zip(summary["model"], summary["threat"], summary["not_certified"], strict=True):
        if why:
            refused.setdefault((model, why), []).append(threat)
    lines += [f"{model} is certified 0 % against {', '.join(threats)}, because: {why}." for (model, why), threats in refused.items()]
    for threat, attacks in dict.fromkeys(zip(summary["threat"], summary["attack_settings"], strict=True)):
        if attacks:
            lines.append(f"Attacks of {threat}: {attacks}.")
    if "not_finite" in summary and (count := int(summary["not_finite"].fillna(0).sum())):
        lines.append(f"{count} samples have logits that are not finite at a point that an attack found: they count neither as robust nor as broken.")
    for data, note in dict.fromkeys(zip(summary["data"], summary["data_note"], strict=True)):
        lines.append(f"Data {data}{f': {_NOTES.get(note, note)}' if note else ''}.")
    return [*lines, LEGEND]


def _certifiers(part: pd.DataFrame) -> str:
    """The methods that proved the radii of some rows, and the arithmetic; '' if nothing was certified."""
    pairs = dict.fromkeys(zip(part["method"], part["dtype"], strict=True))
    # A threat that was only measured has no covered arithmetic.
    methods = [f"{method} ({dtype})" for method, dtype in pairs if method and dtype]
    return f"; certified by {', '.join(methods)}" if methods else ""


def render(summary: pd.DataFrame, form: str, *, partial: bool = False, title: str = "", one_row_per_model: bool = False) -> str:
    """The table as text. form: 'md', 'csv' (raw numbers, one column each), 'latex' (booktabs) or 'html' (a fragment).

    Raises BadInput for another format.
    """
    if form not in _WRITERS:
        raise BadInput(f"expected a table format among {', '.join(FORMATS)}, got {form!r}; name one of them")
    table = compact(summary) if one_row_per_model else summary
    if form == "csv":
        return _csv(table, partial)
    headings, rows = display(table)
    return _WRITERS[form](headings, rows, notes(table, partial), title)


def _csv(table: pd.DataFrame, partial: bool) -> str:
    table = table.assign(partial=table["partial"] | partial)
    return table.to_csv(index=False, lineterminator="\n")


def _markdown(headings: list[str], rows: list[list[str]], below: list[str], title: str) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    align = ["---" if i < 2 else "---:" for i in range(len(headings))]
    top = [f"### {title}", ""] if title else []
    return "\n".join([*top, line(headings), f"| {' | '.join(align)} |", *map(line, rows), "", *[f"- {text}" for text in below], ""])


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "∞": r"$\infty$", "–": "--",
    "≤": r"$\leq$", "‖": r"$\Vert$", "σ": r"$\sigma$", "×": r"$\times$", "·": r"$\cdot$", "−": r"$-$", "‘": "`", "’": "'",
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Text with all special characters of LaTeX escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_cell(text: str) -> str:
    words = []
    for word in text.split(" "):
        mantissa, e, exponent = word.partition("e")
        try:  # 3.2e-14 is set as a power of ten
            is_power = bool(e) and math.isfinite(float(mantissa)) and str(int(exponent)) == exponent
        except ValueError:
            is_power = False
        words.append(rf"${mantissa}\times10^{{{exponent}}}$" if is_power else escape_latex(word))
    return " ".join(words)


def _latex(headings: list[str], rows: list[list[str]], below: list[str], title: str) -> str:
    top = " & ".join(rf"\shortstack{{{_broken(heading)}}}" for heading in headings)
    body = [" & ".join(map(_latex_cell, row)) + r" \\" for row in rows]
    caption = [rf"\caption{{{escape_latex(title)}}}"] if title else []
    columns = "r" * (len(headings) - 2)
    lines = ["% needs \\usepackage{booktabs,graphicx}", r"\begin{table}", r"\centering", *caption, r"\resizebox{\linewidth}{!}{%"]
    lines += [rf"\begin{{tabular}}{{ll{columns}}}", r"\toprule", top + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}}"]
    lines += [r"\par\footnotesize", *[escape_latex(text) + r"\par" for text in below], r"\end{table}", ""]
    return "\n".join(lines)


def _broken(heading: str) -> str:
    """A heading on two or three short lines."""
    lines: list[str] = [""]
    for word in heading.split():
        if lines[-1] and len(lines[-1]) + len(word) >= 12:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return r"\\".join(map(escape_latex, lines))


def _html(headings: list[str], rows: list[list[str]], below: list[str], title: str) -> str:
    head = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in headings)
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>' + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    caption = f"<caption>{html.escape(title)}</caption>" if title else ""
    under = "".join(f"<li>{html.escape(text)}</li>" for text in below)
    return f'<table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>\n<ul class="notes">{under}</ul>\n'


_WRITERS: dict[str, Callable[[list[str], list[list[str]], list[str], str], str]] = {
    "md": _markdown, "csv": lambda *_: "", "latex": _latex, "html": _html,
}  # fmt: skip
