"""Grids of recipes: which runs they define, that resuming changes nothing, and the contents of table and plot."""

from __future__ import annotations

import csv as csv_reader
import json
import math
from pathlib import Path

import pytest

import robustlip.training
from robustlip.certifiers import lipschitz_bound
from robustlip.cli import main
from robustlip.errors import BadInput, DataUnavailable
from robustlip.figures import upward
from robustlip.models.zoo import load
from robustlip.sweep import FAILED, FINISHED, PARTIAL, PENDING, Row, Sweep, draw, load_grid, markdown, run_sweep
from robustlip.sweep.picture import _labels

RECIPE = """
name = "tiny"
description = "A tiny MLP."
[model]
kind = "mlp"
widths = [64, 8, 10]
[data]
name = "digits"
[optimizer]
name = "muon"
lr = 0.05
[constraint]
method = "spectral-normalize"
w_max = 1.0
[constraint.overrides]
"linear1.weight" = 0.5
[run]
steps = 12
batch = 16
evaluate_every = 6
checkpoint_every = 4
"""
GRID = """
name = "caps"
title = "By cap"
base = "tiny.toml"
[grid]
constraint.w_max = [0.5, 2.0]
"""


def grid_file(folder: Path, text: str = GRID, recipe: str = RECIPE) -> Path:
    (folder / "tiny.toml").write_text(recipe)
    (folder / "grid.toml").write_text(text)
    return folder / "grid.toml"


def sweep(path: Path, out: Path, **options) -> Sweep:
    grid, runs = load_grid(path)
    return run_sweep(grid, runs, out, **options)


def run(*arguments) -> int:
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


# ------------------------------------------------------------------------------------------------ the grid


def test_a_grid_is_every_combination(tmp_path) -> None:
    text = """
name = "g"
base = "tiny.toml"
[set]
run.steps = 5
constraint.overrides = {}
[grid]
constraint.w_max = [0.5, 2.0]
model.widths = [[64, 8, 10], [64, 4, 10]]
[[run]]
seed = 1
[[run]]
optimizer.lr = 0.1
constraint.method = "none"
"""
    _, runs = load_grid(grid_file(tmp_path, text))
    assert len(runs) == 8 and len({r.sha256 for r in runs}) == 8 and len({r.recipe.name for r in runs}) == 8
    assert all(r.recipe.run.steps == 5 and r.recipe.constraint.overrides == {} for r in runs)
    assert runs[1].varied == {"seed": 1, "constraint.w_max": 0.5, "model.widths": [64, 4, 10]} and runs[1].recipe.model["widths"] == [64, 4, 10]
    assert runs[7].recipe.optimizer.lr == 0.1 and runs[7].recipe.constraint.method == "none" and runs[7].recipe.seed == 0


def test_keys_with_dots_in_them(tmp_path) -> None:
    text = GRID + 'constraint.overrides."linear1.weight" = [0.25, 0.5]\n'
    _, runs = load_grid(grid_file(tmp_path, text))
    assert [r.recipe.constraint.overrides["linear1.weight"] for r in runs] == [0.25, 0.5, 0.25, 0.5]
    assert 'constraint.overrides."linear1.weight"' in runs[0].varied


def test_names_follow_the_contents_alone(tmp_path) -> None:
    _, before = load_grid(grid_file(tmp_path))
    other = GRID.replace("[0.5, 2.0]", "[2.0, 4.0, 0.5]").replace("By cap", "Another title")
    _, after = load_grid(grid_file(tmp_path, other, RECIPE.replace("A tiny MLP.", "Told otherwise.")))
    assert {r.recipe.name for r in before} < {r.recipe.name for r in after}
    _, changed = load_grid(grid_file(tmp_path, GRID, RECIPE.replace("batch = 16", "batch = 17")))
    assert {r.recipe.name for r in before}.isdisjoint({r.recipe.name for r in changed})


def test_a_run_may_have_a_base_of_its_own(tmp_path) -> None:
    (tmp_path / "other.toml").write_text(RECIPE.replace('name = "tiny"', 'name = "other"').replace("lr = 0.05", "lr = 0.02"))
    text = GRID.replace("[grid]\nconstraint.w_max = [0.5, 2.0]", '[[run]]\nseed = 1\n[[run]]\nbase = "other.toml"\nseed = 1\n')
    mine, other = load_grid(grid_file(tmp_path, text))[1]
    assert (mine.recipe.optimizer.lr, other.recipe.optimizer.lr) == (0.05, 0.02) and mine.recipe.seed == other.recipe.seed == 1
    assert other.recipe.name.startswith("other-") and other.varied == {"base": "other.toml", "seed": 1}
    for wrong, sentence in (('"away.toml"', "away.toml"), ("3", "in quotes")):
        with pytest.raises(BadInput, match=sentence):
            load_grid(grid_file(tmp_path, text.replace('"other.toml"', wrong)))
    with pytest.raises(BadInput, match="base"):  # of all runs there is one already
        load_grid(grid_file(tmp_path, GRID.replace("[grid]", '[set]\nbase = "other.toml"\n[grid]')))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name = ", "TOML"),
        ('name = "g"', "base"),
        ('name = "g"\nbase = "nowhere.toml"', "cannot be read"),
        ('name = "Bad Name"\nbase = "tiny.toml"', "name"),
        (GRID + "[more]\nx = 1", "more"),
        (GRID.replace("[0.5, 2.0]", "0.5"), "list of values"),
        (GRID.replace("[0.5, 2.0]", "[]"), "list of values"),
        (GRID.replace("[0.5, 2.0]", "[0.5, 0.5]"), "twice"),
        (GRID.replace("[0.5, 2.0]", "[0.5, -1.0]"), "w_max"),
        (GRID.replace("w_max", "w_maximum"), "w_maximum"),
        (GRID.replace("constraint.w_max", '"constraint.w_max"'), "constraint.w_max"),
        (GRID + "model.wdith = [3]", "wdith"),
        (GRID + 'model.activation = ["relu", "nonsense"]', "activation"),
        (GRID + "model.widths.x = [3]", "table"),
        (GRID + "[set]\nconstraint.w_max = 3.0", "two"),
        (GRID + "[[run]]\nconstraint.w_max = 3.0", "two"),
        (GRID + "seed = [" + "1, " * 6000 + "2]", "at most"),
    ],
)
def test_bad_grids_get_a_sentence_before_anything_trains(text, sentence, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(robustlip.training, "train", lambda *a, **k: pytest.fail("trained"))
    assert run("sweep", grid_file(tmp_path, text), "--out", tmp_path / "o", "--device", "cpu") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("robustlip: expected ") and sentence in lines[0]
    assert not (tmp_path / "o").exists()


# ------------------------------------------------------------------------------------------------ the runs


def test_figures_are_those_of_the_models(tmp_path) -> None:
    done = sweep(grid_file(tmp_path), tmp_path / "o")
    assert [row.status for row in done.rows] == [FINISHED, FINISHED] and not done.partial and done.keys == ["constraint.w_max"]
    document = json.loads((tmp_path / "o" / "results.json").read_text())
    assert document["partial"] is False and len(document["runs"]) == 2
    for row, kept in zip(done.rows, document["runs"], strict=True):
        model = load(tmp_path / "o" / row.name / f"{row.name}.safetensors")
        bound = lipschitz_bound(model)
        assert (row.bound_rms, row.bound_l2) == (bound["rms"], bound["l2"]) and kept["bound_l2"] == bound["l2"]
        # An MLP's published constant is a product of norms: the same, but for their upper bounds and rounding.
        assert row.published is not None and row.published == pytest.approx(row.bound_rms, rel=1e-4)
        assert row.steps == row.of_steps == 12 and row.seconds is not None and 0 <= (row.accuracy or -1) <= 1
    assert (done.rows[0].bound_rms or 9) < (done.rows[1].bound_rms or 0)
    lines = list(csv_reader.DictReader((tmp_path / "o" / "table.csv").open()))
    assert [float(line["bound_rms"]) for line in lines] == [row.bound_rms for row in done.rows] and lines[0]["partial"] == "False"


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch) -> None:
    first = sweep(grid_file(tmp_path), tmp_path / "o")
    trained = []
    real = robustlip.training.train
    monkeypatch.setattr(robustlip.training, "train", lambda recipe, *a, **k: trained.append(recipe.name) or real(recipe, *a, **k))
    again = sweep(tmp_path / "grid.toml", tmp_path / "o")
    assert not trained and again.rows == first.rows
    longer = sweep(grid_file(tmp_path, GRID.replace("[0.5, 2.0]", "[4.0, 2.0, 0.5]")), tmp_path / "o")
    assert len(trained) == 1 and [row.weights_sha256 for row in longer.rows[:0:-1]] == [row.weights_sha256 for row in first.rows]
    # A row of other contents, or a lost model, counts for nothing.
    (tmp_path / "o" / first.rows[0].name / f"{first.rows[0].name}.safetensors").unlink()
    sweep(grid_file(tmp_path), tmp_path / "o")
    assert trained[1:] == [first.rows[0].name]


def test_an_interrupted_sweep_says_so_and_goes_on_to_the_same_weights(tmp_path) -> None:
    whole = sweep(grid_file(tmp_path), tmp_path / "whole")

    def stop(label: str, step: int, steps: int) -> None:
        if label.startswith("2 of 2") and step == 10:
            raise KeyboardInterrupt

    cut = sweep(tmp_path / "grid.toml", tmp_path / "cut", advance=stop)
    assert cut.interrupted and cut.partial and [row.status for row in cut.rows] == [FINISHED, PARTIAL]
    assert cut.rows[1].steps == 8 and cut.rows[1].bound_rms is None and "8 of 12" in markdown(cut) and "PARTIAL" in markdown(cut)
    assert json.loads((tmp_path / "cut" / "results.json").read_text())["partial"] is True
    assert all(line["partial"] == "True" for line in csv_reader.DictReader((tmp_path / "cut" / "table.csv").open()))
    steps = []
    done = sweep(tmp_path / "grid.toml", tmp_path / "cut", advance=lambda label, step, of: steps.append(step))
    assert steps == [9, 10, 11, 12] and not done.partial
    assert [row.weights_sha256 for row in done.rows] == [row.weights_sha256 for row in whole.rows]


def test_a_run_that_diverges_is_marked_and_the_next_one_trains(tmp_path, capsys) -> None:
    text = 'name = "g"\nbase = "tiny.toml"\n[set]\nconstraint.method = "none"\nconstraint.overrides = {}\noptimizer.name = "adamw"\n'
    path = grid_file(tmp_path, text + "[grid]\noptimizer.lr = [1e30, 0.01]\n")
    done = sweep(path, tmp_path / "o")
    assert [row.status for row in done.rows] == [FAILED, FINISHED] and "finite" in done.rows[0].note and done.partial
    assert run("sweep", path, "--out", tmp_path / "o", "--device", "cpu") == 1
    told = capsys.readouterr()
    assert "1 of 2 runs failed" in told.err and "PARTIAL" in told.out


def test_a_broken_state_costs_one_run_and_missing_data_stops_all(tmp_path, capsys, monkeypatch) -> None:
    path = grid_file(tmp_path)
    first = load_grid(path)[1][0].recipe.name
    (tmp_path / "o" / first).mkdir(parents=True)
    (tmp_path / "o" / first / f"{first}.state.safetensors").write_bytes(b"cut")
    done = sweep(path, tmp_path / "o")
    assert [row.status for row in done.rows] == [FAILED, FINISHED] and "safetensors" in done.rows[0].note

    def away(*_, **__):
        raise DataUnavailable("expected the hub to answer, got nothing; name a folder with --data-dir")

    monkeypatch.setattr(robustlip.training, "train", away)
    assert run("sweep", path, "--out", tmp_path / "p", "--device", "cpu") == 2
    told = capsys.readouterr().err
    assert "--data-dir" in told and "runs failed" not in told


def test_transformers_have_the_published_formula_beside_the_bound(tmp_path) -> None:
    recipe = RECIPE.replace(
        'kind = "mlp"\nwidths = [64, 8, 10]',
        'kind = "lipschitz-transformer"\nimage = [1, 8, 8]\npatch = 4\nclasses = 10\nwidth = 8\nheads = 2\nblocks = 1',
    )
    recipe = recipe.replace('[constraint.overrides]\n"linear1.weight" = 0.5\n', "").replace("steps = 12", "steps = 2")
    done = sweep(grid_file(tmp_path, GRID, recipe), tmp_path / "o")
    for row in done.rows:
        assert row.published is not None and row.bound_rms is not None and row.published < row.bound_rms


# ------------------------------------------------------------------------------------------------ table and picture


@pytest.mark.parametrize("value", [0.08994999, 4.2353, 12345.678, 1e-9, 99999.5, 1.0, 0.3953, 2e30, 1 + 1e-15])
def test_bounds_are_shown_rounded_up(value) -> None:
    assert value <= float(upward(value)) <= value * 1.0011
    assert upward(None) == "–" and upward(math.inf) == "inf"


def test_the_picture(tmp_path) -> None:
    import matplotlib.image

    text = GRID + 'constraint.method = ["spectral-normalize", "none"]\nseed = [0, 1]\n'
    done = sweep(grid_file(tmp_path, text, RECIPE.replace("steps = 12", "steps = 3")), tmp_path / "o", limit=3)
    assert [row.status for row in done.rows].count(PENDING) == 5
    png, svg = draw(done)
    pixels = matplotlib.image.imread(png)
    assert pixels.shape[0] > 400 and len({tuple(p) for p in pixels.reshape(-1, pixels.shape[2]).round(2)}) > 20
    drawn = svg.read_text()
    # Letters are paths; their text stands in comments.
    for said in ("By cap (PARTIAL: 5 of 8 runs are missing)", "Lipschitz constant to the logits", "filled: proved bound", "hollow: published"):
        assert said in drawn
    nothing = Sweep(done.grid, tmp_path / "o", [row for row in done.rows if row.status == PENDING])
    assert draw(nothing) == []


def test_labels_do_not_cover_each_other() -> None:
    """Nearby points with equal texts share a label; different labels do not overlap."""
    points = [(1.0, "a", 1.0, 0.9), (1.0, "b", 1.1, 0.91), (1.0, "c", 500.0, 0.9)]
    points += [(2.0, "a", 1.15, 0.9), (4.0, "a", 1.12, 0.9), (8.0, "a", 1000.0, 0.1)]
    rows = [
        Row(str(i), {"constraint.method": method, "constraint.w_max": cap}, "", FINISHED, accuracy=accuracy, bound_rms=bound)
        for i, (cap, method, bound, accuracy) in enumerate(points)
    ]
    labels = _labels(rows, "constraint.method")
    assert [text for *_, text in labels] == ["w_max 1.0", "w_max 1.0", "w_max 2.0", "w_max 4.0", "w_max 8.0"]
    near = [offset for (x, _), offset, _ in labels if x < 2]
    assert len(set(near)) == 3
    assert _labels(rows * 3, "constraint.method") == []


# ------------------------------------------------------------------------------------------------ the command


def test_the_command(tmp_path, capsys) -> None:
    path = grid_file(tmp_path, GRID, RECIPE.replace("steps = 12", "steps = 3"))
    assert run("sweep", path, "--out", tmp_path / "o", "--device", "cpu", "--limit", "1", "--json", "-") == 0
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert document["partial"] is True and [r["status"] for r in document["runs"]] == ["finished", "pending"] and "PARTIAL" in told.err
    assert run("sweep", path, "--out", tmp_path / "o", "--device", "cpu", "--json", tmp_path / "r.json") == 0
    told = capsys.readouterr()
    assert "PARTIAL" not in told.out and "accuracy-bound.png" in told.out
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["partial"] is False and all(Path(name).is_file() for name in document["plots"])
    assert {"results.json", "table.md", "table.csv"} <= {p.name for p in (tmp_path / "o").iterdir()}


def test_an_interrupted_command_ends_with_130(tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(robustlip.training, "train", interrupted)
    assert run("sweep", grid_file(tmp_path), "--out", tmp_path / "o", "--device", "cpu") == 130
    assert "2 of 2 runs to go" in capsys.readouterr().err
    assert json.loads((tmp_path / "o" / "results.json").read_text())["partial"] is True


def test_a_row_that_was_altered_is_refused(tmp_path) -> None:
    done = sweep(grid_file(tmp_path, GRID, RECIPE.replace("steps = 12", "steps = 2")), tmp_path / "o")
    (tmp_path / "o" / done.rows[0].name / "row.json").write_text("{")
    with pytest.raises(BadInput, match=r"row\.json"):
        sweep(tmp_path / "grid.toml", tmp_path / "o")


def test_a_recipe_with_a_vocabulary_of_its_own_size_can_be_swept(tmp_path) -> None:
    """Streamed text has no alphabet: its recipes state a size, and the check of the models must not add characters to it."""
    recipe = (Path(__file__).parent.parent / "recipes" / "small-gpt.toml").read_text()
    text = recipe.replace("[model]\n", "[model]\nvocabulary_size = 257\n") if "vocabulary_size" not in recipe else recipe
    (tmp_path / "tiny.toml").write_text(text)
    (tmp_path / "grid.toml").write_text(GRID)
    _, runs = load_grid(tmp_path / "grid.toml")
    assert len(runs) == 2 and all(r.recipe.model["vocabulary_size"] == 257 for r in runs)


def test_a_model_with_its_preprocessing_is_checked_without_memory(tmp_path: Path) -> None:
    """Grids build every model for its shapes alone; means and standard deviations are still looked at."""
    grid_file(tmp_path, recipe=RECIPE.replace("widths = [64, 8, 10]", "widths = [64, 8, 10]\nmean = 0.5\nstd = 0.25"))
    assert len(load_grid(tmp_path / "grid.toml")[1]) == 2
    grid_file(tmp_path, recipe=RECIPE.replace("widths = [64, 8, 10]", "widths = [64, 8, 10]\nmean = 0.5\nstd = 0.0"))
    with pytest.raises(BadInput, match="std above 0"):
        load_grid(tmp_path / "grid.toml")
