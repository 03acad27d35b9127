"""The zoo: cards, weights, bounds and certificates agree, in a fresh clone and without a network."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from robustlip.certificate_file import read
from robustlip.certifiers import lipschitz_bound
from robustlip.cli import main
from robustlip.data import load_data
from robustlip.errors import BadInput, DataUnavailable
from robustlip.hashing import weights_sha256
from robustlip.models import zoo
from robustlip.models.zoo import FOLDER, card, load, names
from robustlip.training import Recipe
from robustlip.verification import load_rows, verify

CERTIFICATES = sorted((FOLDER / "certificates").glob("*.json"))


def test_the_eight_models_are_there() -> None:
    families = ("cifar10-mlp", "digits-mlp", "digits-transformer", "shakespeare-gpt")
    assert set(names()) >= {f"{family}-{role}" for family in families for role in ("lipschitz", "baseline")}


@pytest.mark.parametrize("name", names())
def test_card_and_weights_agree(name) -> None:
    model, known = load(name), card(name)
    assert known["weights_sha256"] == weights_sha256(model)
    assert known["parameters"] == sum(p.numel() for p in model.parameters())
    assert known["bound"]["l2"] == pytest.approx(lipschitz_bound(model)["l2"], rel=1e-6)
    recipe = Recipe.model_validate({"name": name, "seed": known["seed"], **known["recipe"]})
    assert known["steps"] == recipe.run.steps
    assert not model.training and all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert (FOLDER / f"{name}.safetensors").stat().st_size < 12e6


@pytest.mark.parametrize("name", names())
def test_show_states_accuracy_and_the_bound_of_the_weights(name, capsys) -> None:
    """The keys that a script reads: as on the card, with the bound computed from the weights and not copied."""
    with pytest.raises(SystemExit) as end:
        main(["zoo", "show", name, "--json", "-"])
    assert not end.value.code
    shown, model = json.loads(capsys.readouterr().out), load(name)
    bound = lipschitz_bound(model)
    assert shown["val_accuracy"] == card(name)["val_accuracy"] and shown["bound"] == card(name)["bound"]
    assert shown["sound_bound"] == {"rms_inf": bound["rms"], "l2": bound["l2"], "domain": bound["domain"]}
    # The units: a constant per RMS of the inputs is one per ℓ2, times the root of inputs over outputs.
    fan_in = model[0].embedding_dim if model.task == "next-token" else next(m for m in model.modules() if type(m) is torch.nn.Linear).in_features
    if model.embedding_depth == 3:
        fan_in = model[1].out_features  # behind the patches' embedding
    fan_out = list(model)[-1].out_features
    assert bound["rms"] == pytest.approx(bound["l2"] * (fan_in / fan_out) ** 0.5, rel=1e-9)
    assert shown["sound_bound"]["domain"] == "all" if model.embedding_depth == 0 else shown["sound_bound"]["domain"] > 0


def test_a_card_with_another_bound_is_refused(tmp_path, monkeypatch) -> None:
    for kind in ("toml", "safetensors"):
        shutil.copyfile(FOLDER / f"digits-mlp-lipschitz.{kind}", tmp_path / f"digits-mlp-lipschitz.{kind}")
    monkeypatch.setattr(zoo, "FOLDER", tmp_path)
    assert zoo.sound_bound("digits-mlp-lipschitz")["domain"] == "all"
    path = tmp_path / "digits-mlp-lipschitz.toml"
    path.write_text(path.read_text(encoding="utf-8").replace("l2 = 1.0000", "l2 = 0.9999"), encoding="utf-8")
    with pytest.raises(BadInput, match=r"bound l2 = 1\.0.* got 0\.9999"):
        zoo.sound_bound("digits-mlp-lipschitz")


@pytest.mark.parametrize("name", [n for n in names() if n.startswith("digits")])
def test_the_accuracy_on_the_card_is_the_accuracy(name) -> None:
    data = load_data("digits:test")
    accuracy = float((load(name).scores(data.x).argmax(-1) == data.y).float().mean())
    assert accuracy == pytest.approx(card(name)["val_accuracy"], abs=1e-6)


def test_every_model_has_a_certificate_file() -> None:
    assert {path.name.split(".")[0] for path in CERTIFICATES} >= set(names())


@pytest.mark.parametrize("role", ["lipschitz", "baseline"])
@pytest.mark.parametrize("family", ["cifar10", "mnist"])
def test_the_accuracy_of_pairs_whose_data_does_not_ship(family, role, real_data) -> None:
    data = load_data(f"{family}:test", data_dir=real_data)
    known = card(f"{family}-mlp-{role}")
    if data.note != known["data_note"]:
        pytest.skip(f"needs the {known['data_note']} of {family} that the card is of")
    assert "subset" in known["caveats"]
    accuracy = float((load(known["name"]).scores(data.x).argmax(-1) == data.y).float().mean())
    assert accuracy == pytest.approx(known["val_accuracy"], abs=1e-6)


# Ten seconds each, of one kind: a GPT certified by `dual`. One of them runs every time.
SAME_KIND = tuple(f"shakespeare-gpt-{name}" for name in ("robust", "published", "per-head", "sound", "lipschitz-wide", "baseline"))
MARKED = [pytest.param(p, marks=pytest.mark.slow) if p.stem.startswith(SAME_KIND) else p for p in CERTIFICATES]


@pytest.mark.parametrize("path", MARKED, ids=lambda path: path.stem)
def test_certificates_verify_from_their_files(path) -> None:
    file = read(path)
    model = load(path.name.split(".")[0])
    try:
        rows = load_rows(file.data, None, model.vocabulary)
    except DataUnavailable:
        # Data that does not ship: that the file is of these weights is known all the same.
        assert file.data.spec.startswith(("cifar10", "mnist")) and file.weights_sha256 == weights_sha256(model)
        pytest.skip(f"needs {file.data.spec} ({file.data.note}) in ROBUSTLIP_DATA")
    if rows.note != file.data.note:
        pytest.skip(f"needs the {file.data.note} of {file.data.spec}, the data here is another")
    result = verify(file, model, rows)
    assert result.exit_code == 0, result.findings


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_callable_whose_weights_are_not_finite_is_refused(monkeypatch, value) -> None:
    """Files of robustlip are checked in the same way by `load` and by every command."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    monkeypatch.setitem(sys.modules, "spoiled_for_this_test", SimpleNamespace(model=model))
    assert load("spoiled_for_this_test:model") is not model
    model[2].bias.data[1] = float(value)
    with pytest.raises(BadInput, match="finite weights, got NaN or infinity"):
        load("spoiled_for_this_test:model")
