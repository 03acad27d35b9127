"""The zoo as it ships: cards, weights, bounds and certificates belong together, on a fresh clone and without a network."""

from __future__ import annotations

import pytest
import torch

from robustlip.certificate_file import read
from robustlip.certifiers import lipschitz_bound
from robustlip.data import load_data
from robustlip.hashing import weights_sha256
from robustlip.models.zoo import FOLDER, card, load, names
from robustlip.training import Recipe
from robustlip.verification import load_rows, verify

CERTIFICATES = sorted((FOLDER / "certificates").glob("*.json"))


def test_the_six_models_are_there() -> None:
    families = ("digits-mlp", "digits-transformer", "shakespeare-gpt")
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


@pytest.mark.parametrize("name", [n for n in names() if n.startswith("digits")])
def test_the_accuracy_on_the_card_is_the_accuracy(name) -> None:
    data = load_data("digits:test")
    accuracy = float((load(name).scores(data.x).argmax(-1) == data.y).float().mean())
    assert accuracy == pytest.approx(card(name)["val_accuracy"], abs=1e-6)


def test_every_model_has_a_certificate_file() -> None:
    assert {path.name.split(".")[0] for path in CERTIFICATES} >= set(names())


@pytest.mark.parametrize("path", CERTIFICATES, ids=lambda path: path.stem)
def test_certificates_verify_from_their_files(path) -> None:
    file = read(path)
    model = load(path.name.split(".")[0])
    result = verify(file, model, load_rows(file.data, None, model.vocabulary))
    assert result.exit_code == 0, result.findings
