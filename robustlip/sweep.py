"""A grid of recipes, trained one after the other: which model is how accurate at which proved bound. Stopped and started again, it goes on.

A grid file names a base recipe and what to change in it:

    name = "caps"
    base = "../recipes/digits-mlp-lipschitz.toml"    # beside this file
    [set]                                            # in every run
    run.steps = 300
    [grid]                                           # every combination
    constraint.w_max = [0.5, 1.0, 2.0]
    seed = [0, 1]
    [[run]]                                          # optional: each of these tables, combined with the grid
    optimizer.lr = 0.05
    [[run]]
    base = "../recipes/digits-mlp-baseline.toml"     # another recipe for this one

Each run has a folder of its own, named by the SHA-256 of its whole recipe: a run is finished when its row is there, half done when only its
training state is, and another order of the grid, or a longer one, trains nothing twice.
"""

from __future__ import annotations

import itertools
import math
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from robustlip.errors import BadInput, DataUnavailable, RobustlipError, first_line
from robustlip.figures import figure, upward
from robustlip.files import TOML_LIMIT, atomic, read_limited, read_toml, strictly, write_json, write_text
from robustlip.hashing import weights_sha256
from robustlip.locks import sole_writer
from robustlip.training import Recipe, identity, load_recipe
from robustlip.training.state import make_folder

MAX_RUNS = 10_000
PENDING, PARTIAL, FINISHED, FAILED = "pending", "partial", "finished", "failed"
_TOLD = {"name": "run", "description": "", "paper": "", "caveats": ""}  # said of a recipe, not part of what is computed

Advance = Callable[[str, int, int], None]


class Grid(BaseModel):
    """A grid file. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=100)
    title: str = ""
    base: str
    set: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, Any] = Field(default_factory=dict)
    run: list[dict[str, Any]] = Field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One recipe of a grid. varied: what distinguishes it, by dotted key. sha256: of everything in the recipe that is computed."""

    recipe: Recipe
    varied: Mapping[str, Any]
    sha256: str


@dataclass(frozen=True)
class Row:
    """What is known of one run. accuracy in [0, 1] and loss in nats on the test split, bounds of `lipschitz_bound`, seconds of training.

    published: the formula of Newhouse et al. 2025 on these weights, ∞-RMS, None where it does not apply (why_not). steps: taken so far.
    """

    name: str
    varied: Mapping[str, Any]
    recipe_sha256: str
    status: str = PENDING
    accuracy: float | None = None
    loss: float | None = None
    bound_rms: float | None = None
    bound_l2: float | None = None
    published: float | None = None
    why_not: str = ""
    seconds: float | None = None
    steps: int = 0
    of_steps: int = 0
    parameters: int | None = None
    weights_sha256: str = ""
    note: str = ""


@dataclass
class Sweep:
    """A grid, where its files lie, and a row for each run in the order of the grid."""

    grid: Grid
    folder: Path
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False

    @property
    def partial(self) -> bool:
        return any(row.status != FINISHED for row in self.rows)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.status == FAILED]

    @property
    def keys(self) -> list[str]:
        """The dotted keys that vary, in the order of the file."""
        return list(dict.fromkeys(key for row in self.rows for key in row.varied))

    def document(self) -> dict[str, Any]:
        return {"name": self.grid.name, "base": self.grid.base, "partial": self.partial, "keys": self.keys, "runs": [asdict(r) for r in self.rows]}


# ------------------------------------------------------------------------------------------------ the grid


def load_grid(path: str | Path) -> tuple[Grid, list[Run]]:
    """A grid file and its runs, every recipe checked and every model built once (without memory). Raises BadInput with file, key and remedy."""
    path = Path(path)
    try:
        grid = strictly(Grid, read_toml(path, "a grid"))
    except ValidationError as error:
        raise BadInput(f"expected a valid grid in {path.name}, got {_first(error)}; correct or remove that key") from None
    read = cache(load_recipe)  # once for all the runs of a base
    read(path.parent / grid.base)  # also where no run uses it
    runs = [_run(read(_base(grid, varied, path)), fixed, varied, path.name) for fixed, varied in _combinations(grid, path.name)]
    twice = next((a for a, b in itertools.pairwise(sorted(runs, key=lambda run: run.sha256)) if a.sha256 == b.sha256), None)
    if twice is not None:
        raise BadInput(f"expected different runs in {path.name}, got one twice ({_told(twice.varied)}); remove the repetition")
    return grid, runs


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"'{'.'.join(str(part) for part in first['loc'])}': {first['msg']}"


def _leaves(table: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:  # an empty table is a value: it takes the place of the base's
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(part if part.replace("_", "").replace("-", "").isalnum() else f'"{part}"' for part in path)


Changes = dict[tuple[str, ...], Any]
_BASE = ("base",)  # the only key of a run that is none of a recipe


def _combinations(grid: Grid, file: str) -> Iterator[tuple[Changes, Changes]]:
    """(what every run sets, what this run varies)."""
    lists = dict(_leaves(grid.grid))
    for path, values in lists.items():
        if not isinstance(values, list) or not values:
            raise BadInput(
                f"expected a list of values for {_dotted(path)} in [grid] of {file}, got {str(values)[:60]!r}; put single values into [set]"
            )
    total = math.prod(len(values) for values in lists.values()) * max(1, len(grid.run))
    if total > MAX_RUNS:
        raise BadInput(f"expected at most {MAX_RUNS} runs in {file}, got {total}; shorten the lists")
    fixed = dict(_leaves(grid.set))
    for table in grid.run or [{}]:
        own = dict(_leaves(table))
        shared = [path for path in own if path in lists] + [path for path in (own | lists) if path in fixed]
        if shared:
            raise BadInput(f"expected {_dotted(shared[0])} in one place of {file}, got it in two; remove one")
        for values in itertools.product(*lists.values()):
            yield fixed, own | dict(zip(lists, values, strict=True))


def _base(grid: Grid, varied: Changes, path: Path) -> Path:
    name = varied.get(_BASE, grid.base)
    if not isinstance(name, str):
        raise BadInput(f"expected the name of a recipe file as base of a run in {path.name}, got {str(name)[:60]!r}; write it in quotes")
    return path.parent / name


def _run(base: Recipe, fixed: Changes, varied: Changes, file: str) -> Run:
    document: dict[str, Any] = base.model_dump(mode="json", exclude_none=True)
    for path, value in (fixed | {path: value for path, value in varied.items() if path != _BASE}).items():
        place = document
        for part in path[:-1]:
            if not isinstance(place.setdefault(part, {}), dict):
                raise BadInput(f"expected a table in front of {_dotted(path)} in {file}, got a value; write the key as the recipe has it")
            place = place[part]
        place[path[-1]] = value
    told = {_dotted(path): value for path, value in varied.items()}
    try:
        recipe = strictly(Recipe, document)
    except ValidationError as error:
        raise BadInput(f"expected valid recipes from {file}, got {_first(error)} ({_told(told)}); correct that key") from None
    _check_model(recipe)
    sha256 = identity(recipe.model_copy(update=_TOLD))
    name = f"{base.name}-{sha256[:12]}"
    changed = f"{base.description} Changed: {_told(told)}." if told else base.description
    return Run(recipe.model_copy(update={"name": name, "description": changed}), told, sha256)


def _check_model(recipe: Recipe) -> None:
    """Builds the model on the device that has no memory: a key that run 7 does not know is said before run 1 trains."""
    from robustlip.checkpoints import planned
    from robustlip.models.build import build

    config = dict(recipe.model)
    if "gpt" in str(config.get("kind")) and "vocabulary_size" not in config:
        config.setdefault("vocabulary", "ab")
    planned(build, config)


def _told(varied: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in varied.items()) or "the base recipe"


# ------------------------------------------------------------------------------------------------ the runs


def run_sweep(
    grid: Grid,
    runs: Sequence[Run],
    folder: Path,
    *,
    device: str = "cpu",
    data_dir: str | None = None,
    limit: int | None = None,
    advance: Advance | None = None,
) -> Sweep:
    """Train what is not finished in `folder`, at most `limit` of it now, and write results.json and the tables after every run.

    advance(label, done, total) counts steps of the run.
    A run that training stops (a loss that is not finite, a cap that does not hold, no memory) is marked failed, and the next one starts.
    Raises BadInput for input that training cannot use.
    """
    make_folder(Path(folder))
    with sole_writer(Path(folder), "sweep"):
        sweep = Sweep(grid, Path(folder), [_known(run, Path(folder)) for run in runs])
        left = len(runs) if limit is None else limit
        try:
            for i, run in enumerate(runs):
                if sweep.rows[i].status == FINISHED or left <= 0:
                    continue
                left -= 1
                sweep.rows[i] = _train(run, sweep, f"{i + 1} of {len(runs)}", device, data_dir, advance)
                _write(sweep)
        except KeyboardInterrupt:
            sweep.interrupted = True
            sweep.rows = [_known(run, sweep.folder) if row.status in (PENDING, PARTIAL) else row for run, row in zip(runs, sweep.rows, strict=True)]
        _write(sweep)
        return sweep


def _check_proved(row: Row, place: Path) -> None:
    """What a table calls proved is computed from the weights that lie there. Raises BadInput where a row says something else of them."""
    from robustlip.certifiers import lipschitz_bound
    from robustlip.models.zoo import load

    model = load(place / f"{row.name}.safetensors")
    said = [row.weights_sha256 == weights_sha256(model), 0 <= (row.accuracy or 0.0) <= 1]
    bound = lipschitz_bound(model)
    for value, key in ((row.bound_rms, "rms"), (row.bound_l2, "l2")):
        said.append(value is not None and (value == bound[key] or math.isclose(value, float(bound[key]), rel_tol=1e-6)))
    if not all(said):
        raise BadInput(f"expected the row of the model beside it in {place / 'row.json'}, got other figures; remove that file to train it again")


def _known(run: Run, folder: Path) -> Row:
    """The row of a run as its folder has it."""
    from robustlip.checkpoints import load_tensors

    place = folder / run.recipe.name
    row = Row(run.recipe.name, dict(run.varied), run.sha256, of_steps=run.recipe.run.steps)
    if (place / "row.json").is_file() and (place / f"{run.recipe.name}.safetensors").is_file():
        try:
            text = read_limited(place / "row.json", "a row", TOML_LIMIT, "remove it").removeprefix(BOM_UTF8)
            kept = TypeAdapter(Row).validate_json(text, strict=True)
        except (ValueError, RecursionError):
            raise BadInput(f"expected a row that this version wrote in {place / 'row.json'}, got another; remove that file") from None
        if kept.recipe_sha256 == run.sha256 and kept.status == FINISHED:
            _check_proved(kept, place)
            return replace(kept, varied=dict(run.varied))
    state = place / f"{run.recipe.name}.state.safetensors"
    if not state.is_file():
        return row
    try:
        _, header = load_tensors(state)
    except BadInput as error:
        return replace(row, status=FAILED, note=first_line(error, 300))
    last = {key: value for entry in header.get("history", []) for key, value in entry.items()}
    return replace(
        row, status=PARTIAL, steps=int(header.get("step", 0)), seconds=header.get("seconds"), accuracy=last.get("accuracy"), loss=last.get("loss")
    )


def _train(run: Run, sweep: Sweep, which: str, device: str, data_dir: str | None, advance: Advance | None) -> Row:
    from robustlip.attacks import formulas
    from robustlip.models.zoo import load
    from robustlip.training import train

    place = sweep.folder / run.recipe.name

    def progress(step: int, steps: int, figures: dict[str, float]) -> None:
        if advance is not None:
            advance(f"{which}: {_told(run.varied)}", step, steps)

    try:
        path = train(run.recipe, place, device=device, data_dir=data_dir, progress=progress)
    except DataUnavailable:
        raise  # no other run has the data either
    except (RobustlipError, RuntimeError) as error:
        return replace(_known(run, sweep.folder), status=FAILED, note=first_line(error, 300))
    card = read_toml(path.with_suffix(".toml"), "a card")
    formula, why_not = formulas.published(load(path))
    row = Row(
        run.recipe.name, dict(run.varied), run.sha256, FINISHED, card["val_accuracy"], card["val_loss"], float(card["bound"]["rms"]),
        float(card["bound"]["l2"]), formula, why_not, card["train_seconds"], card["steps"], card["steps"], card["parameters"],
        card["weights_sha256"], card["data_note"],
    )  # fmt: skip
    write_json(place / "row.json", asdict(row))
    return row


def _write(sweep: Sweep) -> None:
    write_json(sweep.folder / "results.json", sweep.document())
    write_text(sweep.folder / "table.md", markdown(sweep))
    write_text(sweep.folder / "table.csv", csv(sweep))


# ------------------------------------------------------------------------------------------------ the table

_COLUMNS = ("Status", "Accuracy (%)", "Loss", "Proved, ∞-RMS", "Proved, ℓ2", "Published formula, ∞-RMS", "Seconds")
LEGEND = (
    "Accuracy and loss on the test split (of a partial run: where it stands). Proved: a Lipschitz constant to the logits that holds for these "
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
    """What is varied, a column each; of more than a few keys one text, each by the end of its name where that says which it is."""
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
    """The table with its title, legend and what went wrong."""
    headings, rows = table(sweep)
    lines = [f"# {sweep.grid.title or sweep.grid.name}{' (PARTIAL)' if sweep.partial else ''}", ""]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (headings, ["---"] * len(headings), *rows)]
    lines += ["", LEGEND, *(f"{row.name} failed: {row.note}" for row in sweep.failed)]
    notes = sorted({row.note for row in sweep.rows if row.note and row.status == FINISHED})
    return "\n".join(lines + [f"Data: {note}." for note in notes]) + "\n"


def csv(sweep: Sweep) -> str:
    """Full precision, one line a run, `partial` in every one."""
    import csv as writer
    import io

    fields = ("status", "accuracy", "loss", "bound_rms", "bound_l2", "published", "seconds", "steps", "parameters", "name", "weights_sha256")
    text = io.StringIO()
    lines = writer.writer(text, lineterminator="\n")
    lines.writerow([*sweep.keys, *fields, "partial"])
    for row in sweep.rows:
        lines.writerow([*(row.varied.get(key, "") for key in sweep.keys), *(getattr(row, name) for name in fields), sweep.partial])
    return text.getvalue()


# ------------------------------------------------------------------------------------------------ the picture

# Okabe and Ito's palette, as in eval/plots.py, and shapes for those who see no colour.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"))
_NARROW = 8  # between the ends of the axis
_LABELLED = 16  # points; more labels would cover each other
_LABEL_SIZE, _PLOT = 7.5, (340.0, 230.0)  # points: the letters, and what the data spans of the page


def draw(sweep: Sweep) -> list[Path]:
    """Accuracy against the proved bound (∞-RMS, logarithmic), hollow: the published formula of the same weights. PNG and SVG.

    Nothing ([]) when no finished run has a finite bound above 0.
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
            told = [(row.published, at) for row, at in zip(mine, accuracy, strict=True) if row.published and math.isfinite(row.published)]
            if told:
                x, y = zip(*told, strict=True)
                # Larger and behind, so that it is seen around a bound of the same value.
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
        if max(shown) < _NARROW * min(shown):  # labels at powers of ten would be too few, and those between them run into each other
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
    """(point, offset in points, text) of everything but the colour's key. Nothing when there are many.

    Points that are near and would be told the same share one label; another label goes to the first place that no label has taken.
    """
    if len(rows) > _LABELLED:
        return []
    places = [(math.log10(row.bound_rms or 1.0), 100 * (row.accuracy or 0.0)) for row in rows]
    spans = [max(max(axis) - min(axis), 1e-9) for axis in zip(*places, strict=True)]
    # Where the points come to stand, in points of the page, is near enough before the layout is known.
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
    """The key that colours stand for: the one with the fewest values above one, when something else varies along each colour."""
    counts = {key: len({str(row.varied.get(key)) for row in rows}) for key in keys}
    several = [key for key in keys if 2 <= counts[key] <= len(_STYLES)]
    return min(several, key=lambda key: counts[key]) if several and sum(count > 1 for count in counts.values()) > 1 else ""
