"""Small files that request much work are refused before that work begins."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from robustlip import limits
from robustlip.checkpoints import FORMAT, planned, save_model, tensors_of
from robustlip.errors import BadInput
from robustlip.eval.suite import parse_suite
from robustlip.files import strictly
from robustlip.models import build
from robustlip.models.zoo import load
from robustlip.training import Recipe, train

GPT: dict[str, Any] = {"kind": "lipschitz-gpt", "vocabulary_size": 10, "width": 4, "heads": 1, "blocks": 3}
CONFIGS: list[dict[str, Any]] = [
    GPT, {**GPT, "blocks": 1}, {**GPT, "blocks": 5, "distance_bias": 3, "norm": "layernorm", "final_scale": 2.0},
    {"kind": "baseline-gpt", "vocabulary": "abc", "width": 4, "heads": 1, "blocks": 4},
    {"kind": "mlp", "widths": [64, 10]}, {"kind": "mlp", "widths": [64, 3, 10]},
    {"kind": "mlp", "widths": [64, 3, 4, 5, 10], "bias": False, "mean": 0.5},
    {"kind": "lipschitz-transformer", "image": [1, 8, 8], "patch": 4, "classes": 10, "width": 8, "heads": 2, "blocks": 3},
    {"kind": "baseline-transformer", "image": [1, 8, 8], "patch": 4, "classes": 10, "width": 8, "heads": 2},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_the_count_without_building_is_the_count(config: dict[str, Any], tmp_path: Path) -> None:
    model = build(config)
    assert tensors_of(build, config) == len(model.state_dict())
    assert planned(build, config) == {name: tuple(value.shape) for name, value in model.state_dict().items()}
    save_model(tmp_path / "m.safetensors", model)
    load(tmp_path / "m.safetensors")


HUGE: list[dict[str, Any]] = [
    {**GPT, "blocks": 10**7},
    {**GPT, "blocks": 10**4000},
    {**GPT, "blocks": 900, "width": 2**18, "heads": 2**10},
    {**GPT, "width": 10**9},
    {**GPT, "width": 10**30},
    {**GPT, "heads": 10**30},
    {**GPT, "vocabulary_size": 10**15},
    {**GPT, "distance_bias": 10**15},
    {**GPT, "mlp_hidden": 10**15},
    {"kind": "baseline-gpt", "vocabulary_size": 10, "width": 4, "heads": 1, "blocks": 10**7},
    {"kind": "mlp", "widths": [1] * 10**6},
    {"kind": "mlp", "widths": [64, 10**9, 10]},
    {"kind": "mlp", "widths": [64, 2**20, 2**20, 2**20, 10]},
    {"kind": "mlp", "widths": [64, 10**30, 10]},
    {"kind": "mlp", "widths": [64, 10], "mean": [0.0] * 10**5},
    {"kind": "mlp", "widths": [64, 10], "mean": float("inf")},
    {"kind": "mlp", "widths": [64, 10], "std": float("nan")},
    {"kind": "lipschitz-transformer", "image": [1, 10**9, 10**9], "patch": 1, "classes": 10},
    {"kind": "lipschitz-transformer", "image": [1] * 10**6, "patch": 1, "classes": 10},
    {"kind": "lipschitz-transformer", "image": [1, 8, 8], "patch": 4, "classes": 10**12, "blocks": 10**8},
]


@pytest.mark.parametrize("config", HUGE, ids=lambda c: json.dumps(c)[:60])
def test_a_configuration_that_asks_for_much(config: dict[str, Any], tmp_path: Path) -> None:
    """From a file of one tensor, and from a recipe: a moment, and hardly any memory."""
    path = tmp_path / "m.safetensors"
    header = json.dumps({"format": FORMAT, "config": config, "weights_sha256": "0" * 64})
    save_file({"head.weight": torch.zeros(2, 2)}, path, metadata={"robustlip": header})
    started = time.process_time()
    with pytest.raises(BadInput):
        load(path)
    with pytest.raises(BadInput):
        planned(build, config)
    assert time.process_time() - started < 5


def test_a_file_of_very_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import robustlip.checkpoints

    monkeypatch.setattr(robustlip.checkpoints, "TENSORS", 3)
    save_model(tmp_path / "m.safetensors", build({"kind": "mlp", "widths": [64, 3, 10]}))
    with pytest.raises(BadInput, match="at most 3 tensors"):
        load(tmp_path / "m.safetensors")


def test_the_papers_largest_model_is_allowed() -> None:
    shapes = planned(build, {"kind": "lipschitz-gpt", "vocabulary_size": 50304, "width": 768, "heads": 6, "blocks": 12})
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) > 145e6 and limits.PARAMETERS > 100 * 145e6


RECIPE: dict[str, Any] = {
    "name": "r", "model": {"kind": "mlp", "widths": [64, 4, 10]}, "data": {"name": "digits"}, "optimizer": {"name": "adamw", "lr": 0.01},
    "run": {"steps": 10**7, "batch": 4},
}  # fmt: skip
SUITE: dict[str, Any] = {
    "name": "s",
    "pair": [{"name": "p", "data": "digits:test", "limit": 3, "lipschitz": "digits-mlp-lipschitz", "threat": [{"name": "l2", "radii": [0.1]}]}],
}


def changed(table: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(table))
    place, *keys = copy, *path.split(".")
    for key in keys[:-1]:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
    place[keys[-1]] = value
    return copy


@pytest.mark.parametrize(
    "key",
    (
        "run.steps run.batch run.evaluate_every run.checkpoint_every data.context data.held_out optimizer.warmup loss.start loss.ramp"
    ).split(),
)
@pytest.mark.parametrize("value", [2**40, 10**25])
def test_recipes_say_their_limits(key: str, value: int) -> None:
    strictly(Recipe, RECIPE)
    with pytest.raises(ValidationError, match="less than or equal to"):
        strictly(Recipe, changed(RECIPE, key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pair.0.limit", 10**12),
        ("pair.0.context", 10**12),
        ("pair.0.threat.0.limit", 10**12),
        ("pair.0.threat.0.radii", [i / 100 for i in range(1, 5000)]),
        ("pair.0.threat.0.search", {"starts": 10**12}),
        ("pair.0.threat.0.search", {"ascent_steps": 10**12}),
        ("pair.0.threat.0.attacks", [{"name": "pgd", "options": {"steps": 10**12}}]),
        ("pair.0.threat.0.attacks", [{"name": "pgd"}] * 5000),
        ("pair.0.threat", [{"name": "l2", "radii": [0.1]}] * 5000),
        ("seed", 2**70),
        ("seed", -1),
    ],
)
def test_suites_say_their_limits(key: str, value: Any) -> None:
    parse_suite(SUITE)
    with pytest.raises(BadInput, match=r"at most|less than|greater than"):
        parse_suite(changed(SUITE, key, value))


def test_a_recipe_of_too_large_a_model_is_refused_before_it_is_built(tmp_path: Path) -> None:
    started = time.process_time()
    for model in ({"kind": "mlp", "widths": [64, *([2**20] * 3), 10]}, {"kind": "mlp", "widths": [64] * 20_000}):
        with pytest.raises(BadInput, match="at most"):
            train(strictly(Recipe, changed(RECIPE, "model", model)), tmp_path)
    assert time.process_time() - started < 10
