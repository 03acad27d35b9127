"""Every recipe and grid of the repository can be run: it is valid, its model can be built, and a small version of the large one trains."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch

from robustlip.checkpoints import load_into
from robustlip.constraints import METHODS, targets_of
from robustlip.data import load_data
from robustlip.models.build import build
from robustlip.models.zoo import card, names
from robustlip.sweep import load_grid
from robustlip.training import Recipe, load_recipe, train
from robustlip.training.optimizers import make_optimizers

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
GRIDS = sorted(path for path in (FOLDER / "grid").glob("*.toml") if isinstance(tomllib.loads(path.read_text(encoding="utf-8")).get("base"), str))


def on_meta(recipe: Recipe) -> torch.nn.Module:
    """The model without memory."""
    config = dict(recipe.model)
    if "gpt" in str(config["kind"]) and "vocabulary_size" not in config:
        config.setdefault("vocabulary", "ab")
    with torch.device("meta"):
        return build(config)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_complete(path: Path) -> None:
    """Named like their files, described, with a model, optimisers and a constraint that fit together."""
    recipe = load_recipe(path)
    assert recipe.name == path.stem and recipe.description.endswith(".") and recipe.caveats.endswith(".")
    model = on_meta(recipe)
    rates = [group["lr"] for optimizer in make_optimizers(recipe, model) for group in optimizer.param_groups]
    taken = sum(p.numel() for o in make_optimizers(recipe, model) for g in o.param_groups for p in g["params"])
    assert taken == sum(p.numel() for p in model.parameters()) and min(rates) > 0
    part = recipe.constraint
    # A pattern that matches no weight is refused here.
    if part.method != "none":
        assert targets_of(model, part.w_max, per_head=part.per_head, overrides=dict(part.overrides), rows=part.rows)


@pytest.mark.parametrize("name", names())
def test_models_of_the_zoo_have_their_recipe_here(name: str) -> None:
    """Of the same model, data and seed; a recipe may be improved after the model shipped, and then the card has the one that it was."""
    recipe, known = load_recipe(FOLDER / f"{name}.toml"), card(name)
    assert recipe.seed == known["seed"] and recipe.data.name == known["data"]
    assert recipe.model["kind"] == known["recipe"]["model"]["kind"]


def test_the_grids_are_there() -> None:
    assert {path.stem for path in GRIDS} >= {"shakespeare", "constraints-gpt"}


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_grids_are_valid(path: Path) -> None:
    grid, runs = load_grid(path)
    assert grid.name == path.stem and len(runs) > 1 and all(on_meta(run.recipe) is not None for run in runs)


def test_the_shakespeare_grid_is_the_published_sweep_and_ours() -> None:
    runs = [run.recipe for run in load_grid(FOLDER / "grid" / "shakespeare.toml")[1]]
    published, ours, robust = runs[:-2], runs[-2], runs[-1]
    assert [r.constraint.w_max for r in published] == [1.0, 1.2, 2.0, 2.6, 2.8]
    assert all(r.optimizer.lr == 9.0 and not r.constraint.per_head and r.constraint.method == "spectral-normalize" for r in published)
    assert ours.constraint.per_head and ours.model["distance_bias"] == 64 and ours.optimizer.name == "muon" and ours.optimizer.earlier_layers == 1
    # The tables of tokens: rows of norm 1 in the published runs, by Muon and under a cap of the whole in ours.
    assert all(r.optimizer.unembedding_inflation == 16 and r.constraint.rows == ("head.weight",) for r in published)
    assert ours.optimizer.unembedding_inflation is None and not ours.constraint.rows
    assert robust.loss.kind == "adversarial" and robust.loss.start == 1000
    assert {(r.run.steps, r.run.batch, r.data.context) for r in runs} == {(2000, 64, 256)}
    # 2.39M parameters, with the 65 characters of the text.
    with torch.device("meta"):
        assert sum(p.numel() for p in build(published[0].model | {"vocabulary": "".join(map(chr, range(65)))}).parameters()) == 2_392_576


def test_the_gpt_grid_has_every_method_under_both_optimisers() -> None:
    runs = [run.recipe for run in load_grid(FOLDER / "grid" / "constraints-gpt.toml")[1]]
    assert {(r.constraint.method, r.optimizer.name) for r in runs} == {(m, o) for m in ("none", *METHODS) for o in ("muon", "adamw")}


def test_the_145m_model_has_its_size() -> None:
    """85M in the blocks as the paper's shape gives them, and two tables of 50,304 × 768."""
    recipe = load_recipe(FOLDER / "newhouse-145m.toml")
    model = on_meta(recipe)
    tables = 2 * 50_304 * 768
    assert sum(p.numel() for p in model.parameters()) == 12 * (4 + 8) * 768**2 + tables == 162_201_600
    assert model.attn0.branch.head_width == 128 and len(model) == 26
    assert (recipe.run.steps, recipe.run.dtype, recipe.run.compile, recipe.optimizer.polynomial) == (6200, "bfloat16", True, "145m-script")
    assert recipe.data.subset == "sample-10BT" and recipe.data.tokenizer == "gpt2" and recipe.data.context == 1024


def test_the_145m_recipe_takes_steps_in_miniature(tmp_path: Path) -> None:
    """Its 12 blocks, optimisers, constraint and bfloat16 on bytes of a local file; compiling has tests of its own."""
    whole = load_recipe(FOLDER / "newhouse-145m.toml").model_dump()
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "To be, or not to be: that is the question. " * 3}) + "\n" for _ in range(12)))
    whole["model"] |= {"width": 24, "vocabulary_size": 257}
    whole["data"] |= {"name": str(text), "subset": None, "tokenizer": "bytes", "context": 8, "held_out": 2}
    whole["run"] |= {"steps": 2, "batch": 2, "compile": False}
    path = train(Recipe.model_validate(whole), tmp_path / "out")
    model = load_into(path, build)
    known = tomllib.loads(path.with_suffix(".toml").read_text())
    assert len(model) == 26 and known["largest_constrained_norm_rms"] <= 1 + 1e-4 and known["recipe"]["run"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("role", ["lipschitz", "baseline"])
def test_the_cifar_pair_is_the_robustness_figure(role: str) -> None:
    """The same MLP twice, on pixels in [0, 1], without biases: a product of norms is what the figure states."""
    recipe = load_recipe(FOLDER / f"cifar10-mlp-{role}.toml")
    assert recipe.model == {"kind": "mlp", "widths": [3072, 256, 256, 10], "activation": "relu", "bias": False}
    assert (recipe.run.steps, recipe.run.batch) == (2000, 512) and "subset" in recipe.caveats
    spec, cap = recipe.optimizer, recipe.constraint
    if role == "lipschitz":
        assert (spec.name, spec.lr, cap.method, cap.w_max) == ("muon", 0.231, "soft-cap", 3.0)
    else:
        assert (spec.name, spec.weight_decay, cap.method) == ("adamw", 0.1, "none")


def test_the_cifar_recipes_run_on_the_subset(real_data: Path, tmp_path: Path) -> None:
    """`cifar10` is found as cifar10_subset, pixels stay in [0, 1], and the card says subset."""
    data = load_data("cifar10:test", data_dir=real_data, limit=50)
    assert data.x.shape == (50, 3, 32, 32) and float(data.x.min()) >= 0 and 0.9 < float(data.x.max()) <= 1 and data.note == "subset"
    recipe = load_recipe(FOLDER / "cifar10-mlp-lipschitz.toml")
    short = recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": 3, "batch": 64})})
    path = train(short, tmp_path, data_dir=str(real_data))
    known = tomllib.loads(path.with_suffix(".toml").read_text())
    assert known["data_note"] == "subset" and known["bound"]["rms"] <= 27 * (1 + 1e-3)
    with torch.no_grad():
        assert load_into(path, build)(data.x).shape == (50, 10)
