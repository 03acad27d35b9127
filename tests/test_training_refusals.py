"""Training refuses damaged or exchanged files, sizes that do not fit, and settings without effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from robustlip.checkpoints import load_tensors, save_tensors
from robustlip.errors import BadInput
from robustlip.models.build import build
from robustlip.training import Recipe, TrainingStopped, identity, train

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "model": {"kind": "mlp", "widths": [64, 12, 10]},
    "data": {"name": "digits"},
    "optimizer": {"name": "muon", "lr": 0.05, "adamw_lr": 0.01},
    "constraint": {"method": "soft-cap", "w_max": 1.0},
    "loss": {"logit_scale": 10.0},
    "run": {"steps": 4, "batch": 16, "evaluate_every": 4, "checkpoint_every": 2},
}
GPT: dict[str, Any] = {"kind": "lipschitz-gpt", "width": 8, "heads": 2, "blocks": 1}


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(RECIPE | changes)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The state of a run that was stopped at step 2 of 4."""

    def stop(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(recipe(), tmp_path, progress=stop)
    return tmp_path / "tiny.state.safetensors"


def test_one_flipped_bit_of_a_state_is_found(stopped: Path) -> None:
    raw = bytearray(stopped.read_bytes())
    raw[-5] ^= 1
    stopped.write_bytes(raw)
    with pytest.raises(BadInput, match="damaged"):
        train(recipe(), stopped.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 99}, "at most 4 steps"), ({"step": -1}, "got step -1"), ({"step": None}, "got step None"), ({"history": 3}, "with its history"),
        ({"history": [1]}, "with its history"), ({"seconds": "x"}, "and seconds"),
    ],
)
def test_a_state_whose_header_lies_is_refused(stopped: Path, change: dict[str, Any], message: str) -> None:
    tensors, header = load_tensors(stopped)
    save_tensors(stopped, tensors, {k: v for k, v in header.items() if k != "format"} | change)
    with pytest.raises(BadInput, match=message):
        train(recipe(), stopped.parent)


@pytest.mark.parametrize("lost", ["model.linear1.weight", "optimizer.0.0.momentum_buffer"])
@pytest.mark.parametrize("how", ["missing", "misshapen", "surplus"])
def test_a_state_with_other_tensors_is_refused(stopped: Path, lost: str, how: str) -> None:
    tensors, header = load_tensors(stopped)
    assert lost in tensors
    kept = {k: v for k, v in header.items() if k not in ("format", "tensors_sha256")}
    if how == "missing":
        del tensors[lost]
        kept["tensors_sha256"] = header["tensors_sha256"]
    elif how == "misshapen":
        tensors[lost] = tensors[lost][:-1]
    else:
        tensors[lost.replace(".0.0.", ".0.99.") + "x"] = tensors[lost]
    save_tensors(stopped, tensors, kept)
    with pytest.raises(BadInput, match=r"tensors of a training state|damaged"):
        train(recipe(), stopped.parent)


def test_a_run_does_not_go_on_with_another_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be. " * 60, encoding="utf-8")
    spec = recipe(model=GPT, data={"name": str(text), "context": 8})

    def stop(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(spec, tmp_path / "run", progress=stop)
    text.write_text("to be or nor to be. " * 60, encoding="utf-8")
    with pytest.raises(BadInput, match="training data of the saved run"):
        train(spec, tmp_path / "run")


def test_overrides_count_in_their_order() -> None:
    """The last matching pattern is used, so two orders are two recipes; a sorted order keeps its old identity."""
    first, second = ({"method": "soft-cap", "overrides": o} for o in ({"linear1*": 0.1, "*": 3.0}, {"*": 3.0, "linear1*": 0.1}))
    assert identity(recipe(constraint=first)) != identity(recipe(constraint=second))
    assert identity(recipe(constraint=second)) == identity(recipe(constraint={"method": "soft-cap", "overrides": dict(second["overrides"])}))


def test_a_file_in_the_place_of_the_folder_is_said_before_the_first_step(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.write_text("x", encoding="utf-8")
    steps: list[int] = []
    with pytest.raises(BadInput, match="expected a folder"):
        train(recipe(), place, progress=lambda step, *_: steps.append(step))
    assert not steps


def test_no_state_is_promised_where_there_is_none(tmp_path: Path) -> None:
    far = {"name": "adamw", "lr": 1e30}
    with pytest.raises(TrainingStopped, match="there is no state yet"):
        train(recipe(optimizer=far, constraint={"method": "none"}), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"kind": "mlp", "widths": [63, 10]}}, "model that takes samples of shape"),
        ({"model": {"kind": "mlp", "widths": [64, 5]}}, "'at least', 10"),
        ({"model": {"kind": ["mlp"]}}, "model kind among"),
        ({"model": {"kind": "mlp", "widths": [64, 0, 10]}}, "expected"),
        ({"model": {**GPT, "width": 0}, "data": {"name": "TEXT", "context": 8}}, "expected"),
        ({"model": {**GPT, "distance_bias": -2}, "data": {"name": "TEXT", "context": 8}}, "expected"),
        ({"model": {**GPT, "vocabulary": "to"}, "data": {"name": "TEXT", "context": 8}}, "model's last width|takes samples"),
        ({"model": GPT, "data": {"name": "TEXT", "context": 10_000}}, "in each split"),
        ({"model": {"kind": "mlp", "widths": [8, 4]}, "data": {"name": "TEXT", "context": 8}}, "expected"),
    ],
)
def test_sizes_that_do_not_fit_are_one_sentence(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be. " * 60, encoding="utf-8")
    change = {**change, "data": {**change["data"], "name": str(text)}} if "data" in change else change
    with pytest.raises(BadInput, match=message):
        train(recipe(**change), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"lr": 0.1, "betas": [2, 3]}}, "less than 1"),
        ({"optimizer": {"lr": 1e300}}, "less than or equal"),
        ({"optimizer": {"lr": float("inf")}}, "finite number"),
        ({"seed": 2**70}, "less than"),
        ({"seed": -1}, "greater than or equal"),
        ({"run": {"steps": 1, "batch": 10**12}}, "less than or equal"),
        ({"loss": {"start": 5}}, "need kind"),
        ({"loss": {"kind": "margin", "norm": "l2", "epsilon": 0.1, "tolerance": 0.1}}, "need kind 'ibp'"),
        ({"loss": {"kind": "margin", "norm": "l2", "epsilon": 0.1, "start": 4}}, "there are only 4 steps"),
        ({"model": GPT, "loss": {"input_noise": 0.1}}, "not token ids"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(**change)


def test_a_run_starts_from_a_model(tmp_path: Path) -> None:
    """Its weights, projected into the new caps, before the first step; the card names them; other weights are refused."""
    first = train(recipe(), tmp_path / "first")
    weights, header = load_tensors(first)
    rate, steps = {"name": "muon", "lr": 1e-9, "adamw_lr": 1e-9}, {"steps": 1, "batch": 16}
    spec = recipe(optimizer=rate, run={**steps, "start_from": str(first), "start_sha256": header["weights_sha256"]})
    second, _ = load_tensors(train(spec, tmp_path / "second"))
    assert all(torch.allclose(second[name], weights[name], atol=1e-5) for name in weights)
    assert header["weights_sha256"] in (tmp_path / "second" / "tiny.toml").read_text(encoding="utf-8")
    tight = {"method": "spectral-normalize", "w_max": 0.1}
    third, _ = load_tensors(train(recipe(optimizer=rate, constraint=tight, run={**steps, "start_from": str(first)}), tmp_path / "third"))
    assert float(torch.linalg.svdvals(third["linear1.weight"])[0]) <= 0.1 * (12 / 64) ** 0.5 * 1.001
    assert identity(recipe(run={**steps, "start_from": "a"})) != identity(recipe(run=steps))
    for change, message in (
        ({"run": {**steps, "start_from": str(first), "start_sha256": "0" * 64}}, "run.start_sha256"),
        ({"run": {**steps, "start_from": str(first)}, "model": {"kind": "mlp", "widths": [64, 13, 10]}}, "which has another"),
        ({"run": {**steps, "start_from": str(first)}, "model": {"kind": "mlp", "widths": [64, 12, 10], "activation": "tanh"}}, "which has another"),
        ({"run": {**steps, "start_from": "no-such-model"}}, "expected"),
        ({"run": {**steps, "start_from": "math:sqrt"}}, "save the model first"),
    ):
        with pytest.raises(BadInput, match=message):
            train(recipe(**change), tmp_path / "refused")
    with pytest.raises(ValidationError, match="needs start_from"):
        recipe(run={**steps, "start_sha256": "0" * 64})


def test_a_resumed_run_does_not_need_the_model_that_it_started_from(tmp_path: Path) -> None:
    first = train(recipe(), tmp_path / "first")
    spec = recipe(run={**RECIPE["run"], "start_from": str(first)})

    def stop(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 3:
            raise InterruptedError

    whole, _ = load_tensors(train(spec, tmp_path / "whole"))
    with pytest.raises(InterruptedError):
        train(spec, tmp_path / "parts", progress=stop)
    sha256 = load_tensors(first)[1]["weights_sha256"]
    first.unlink()
    parts, _ = load_tensors(train(spec, tmp_path / "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert f'start_weights_sha256 = "{sha256}"' in (tmp_path / "parts" / "tiny.toml").read_text(encoding="utf-8")


def test_a_checked_model_trains_as_before(tmp_path: Path) -> None:
    """The check runs the model once; no random number of the run is drawn for it."""
    train(recipe(), tmp_path / "a")
    torch.manual_seed(99)
    train(recipe(), tmp_path / "b")
    a, b = (load_tensors(tmp_path / name / "tiny.safetensors")[0] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"kind": "mlp", "widths": [4, 3], "colour": 1}, "got colour;"),
        ({"kind": "lipschitz-gpt", "vocabulary": "ab", "heads": 4.0}, "integer as heads"),
        ({"kind": "lipschitz-gpt", "vocabulary": "ab", "blocks": True}, "integer as blocks"),
        ({"kind": "mlp"}, "widths"),
        ({"kind": "mlp", "widths": "abc"}, "check the recipe"),
        ({"kind": "mlp", "widths": [4, 3.5]}, "check the recipe"),
        ({"kind": "elephant"}, "among mlp"),
    ],
)
def test_options_that_a_model_does_not_have_are_named(config, sentence) -> None:
    with pytest.raises(BadInput, match=sentence):
        build(config)
