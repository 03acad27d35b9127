"""Training: constraints hold after every step, interrupted runs end like uninterrupted ones, and files that lie are refused."""

from __future__ import annotations

import json
import tomllib

import pytest
import torch
from torch import nn

from robustlip.checkpoints import load_into, load_tensors, save_model, save_tensors, toml_text
from robustlip.constraints import Constraint, Target, fast_norm_bound, soft_cap, soft_cap_coupling, targets_of
from robustlip.errors import BadInput
from robustlip.hashing import weights_sha256
from robustlip.models import LipschitzGPT, LipschitzMLP
from robustlip.models.build import build
from robustlip.muon import POLYNOMIALS, Muon, orthogonalize
from robustlip.spectral import spectral_norm_bound
from robustlip.training import Recipe, load_recipe, train

RECIPE = {
    "name": "tiny",
    "seed": 3,
    "model": {"kind": "mlp", "widths": [64, 16, 10]},
    "data": {"name": "digits"},
    "optimizer": {"name": "muon", "lr": 0.05, "adamw_lr": 0.01},
    "constraint": {"method": "soft-cap", "w_max": 1.0, "overrides": {"linear1.weight": 0.5}},
    "loss": {"logit_scale": 10.0, "input_noise": 0.01},
    "run": {"steps": 40, "batch": 32, "evaluate_every": 20, "checkpoint_every": 10},
}


def recipe(**changes) -> Recipe:
    return Recipe.model_validate({**RECIPE, **changes})


@pytest.mark.parametrize(("w_max", "update", "strength"), [(6, 0.2, 0.0028525), (6, 0.1, 0.0020655), (2, 0.1, 0.0306098), (1, 0.05, 0.1224393)])
def test_soft_cap_coupling_and_what_it_promises(w_max, update, strength) -> None:
    """MATH.md section 10's vectors; and the map sends all of [0, w_max + update] into [0, w_max]."""
    a = soft_cap_coupling(w_max, update)
    assert a == pytest.approx(strength, rel=1e-4)
    values = torch.linspace(0, w_max + update, 2001, dtype=torch.float64)
    mapped = soft_cap(torch.diag(values), a).diagonal()
    assert float(mapped.max()) <= w_max * (1 + 1e-9) and float(mapped.min()) >= -1e-12
    assert soft_cap_coupling(w_max, 0.0) == 0.0


def test_soft_cap_refuses_an_update_it_cannot_absorb() -> None:
    with pytest.raises(BadInput, match="lower the learning rate"):
        soft_cap_coupling(1.0, 50.0)


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_orthogonalisation_stays_under_its_stated_peak(name) -> None:
    x = torch.linspace(0, 1, 10**6 + 1, dtype=torch.float64)[1:]
    for a, b, c in POLYNOMIALS[name].steps:
        x = a * x + b * x**3 + c * x**5
    assert POLYNOMIALS[name].peak - 2e-4 < float(x.max()) <= POLYNOMIALS[name].peak
    for shape in ((20, 30), (30, 20), (4, 12, 12)):
        out = orthogonalize(torch.randn(*shape, dtype=torch.float64), name)
        assert out.shape == shape and bool((torch.linalg.matrix_norm(out, 2) <= POLYNOMIALS[name].peak).all())
    assert float(orthogonalize(torch.zeros(3, 4), name).abs().max()) == 0.0


def test_muon_moves_by_no_more_than_it_states() -> None:
    layer = nn.Linear(12, 30, bias=False)
    optimizer = Muon(layer.parameters(), lr=0.3, polynomial="torch")
    for _ in range(5):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        layer(torch.randn(8, 12)).square().sum().backward()
        optimizer.step()
        step = torch.linalg.matrix_norm(layer.weight.detach() - before, 2) * (12 / 30) ** 0.5
        assert 0 < float(step) <= optimizer.update_norm(0.3) * (1 + 1e-5)


@pytest.mark.parametrize("method", ["spectral-normalize", "soft-cap"])
def test_constraints_hold_after_every_step_and_by_head(method) -> None:
    """Steps far larger than the weights, on adversarial gradients: no head's slice leaves its cap, measured with the guaranteed bound."""
    model = LipschitzGPT("abcdef", 16, 4, 1)
    rate = 0.3 if method == "spectral-normalize" else 0.05
    constraint = Constraint(targets_of(model, 1.0, overrides={"head.weight": 3.0, "mlp*": 2.0}), method)
    constraint.project()
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [Muon(matrices, lr=rate), torch.optim.AdamW(rest, lr=1.0)]
    for optimizer in optimizers:
        constraint.attach(optimizer)
    heads = model[1].branch.query.weight
    for _ in range(30):
        for optimizer in optimizers:
            optimizer.zero_grad()
        tokens = torch.randint(6, (4, 8))
        (-model(tokens).square().sum() - 1e4 * heads[:4].sum()).backward()  # pushes the first head alone
        for optimizer in optimizers:
            optimizer.step()
        for target in constraint.targets:
            assert target.measured() <= target.w_max * (1 + 1e-4), target.name
    slices = spectral_norm_bound(heads.detach().unflatten(0, (4, 4))) * 2.0  # sqrt(16/4): RMS units
    assert float(slices.max()) <= 1 + 1e-4
    assert float(model[0].weight.detach().norm(dim=-1).max()) <= 4 * (1 + 1e-4)


def test_a_whole_matrix_cap_is_what_per_head_is_not() -> None:
    model = LipschitzGPT("abcdef", 16, 4, 1)
    whole = {t.name: t for t in targets_of(model, 1.0, per_head=False)}
    by_head = {t.name: t for t in targets_of(model, 1.0)}
    name = "attn0.branch.query.weight"
    assert (whole[name].slices, by_head[name].slices) == (1, 4)
    assert not any("distance_bias" in n for n in by_head)
    with pytest.raises(BadInput, match="match a weight"):
        targets_of(model, 1.0, overrides={"nothing*": 1.0})


def test_fast_norm_bound_is_above() -> None:
    for shape in ((64, 256), (256, 64), (3, 30, 30)):
        matrix = torch.randn(*shape)
        truth = torch.linalg.matrix_norm(matrix.double(), 2)
        assert bool((fast_norm_bound(matrix).double() >= truth).all() and (fast_norm_bound(matrix).double() <= 1.01 * truth).all())
    assert float(fast_norm_bound(torch.zeros(4, 4))) < 1e-6


def test_row_targets_cap_each_token() -> None:
    table = nn.Embedding(5, 8)
    with torch.no_grad():
        table.weight.mul_(100)
    target = Target("t", table.weight, 0.5, rows=True)
    Constraint([target], "soft-cap").apply(target)
    assert float((table.weight.detach().norm(dim=-1) / 8**0.5).max()) <= 0.5
    assert target.measured() == pytest.approx(0.5, rel=1e-4)


class Stop(Exception):
    pass


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path) -> None:
    whole = train(recipe(), tmp_path / "whole")

    def interrupt(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 27:
            raise Stop

    with pytest.raises(Stop):
        train(recipe(), tmp_path / "parts", progress=interrupt)
    state, header = load_tensors(tmp_path / "parts" / "tiny.state.safetensors")
    assert header["step"] == 20 and any(k.startswith("optimizer.") for k in state)
    resumed = train(recipe(), tmp_path / "parts")
    assert weights_sha256(load_into(whole, build)) == weights_sha256(load_into(resumed, build))
    card = tomllib.loads(resumed.with_suffix(".toml").read_text())
    assert card["weights_sha256"] == weights_sha256(load_into(resumed, build))
    assert card["val_accuracy"] > 0.5 and card["largest_constrained_norm_rms"] <= 1 + 1e-4
    assert card["bound"]["l2"] <= 0.5 * 2.0 * (10 / 16) ** 0.5 * 1.01  # the caps, undone from RMS units: 0.5·√(16/64)⁻¹ and √(10/16)

    with pytest.raises(BadInput, match="another recipe"):
        train(recipe(seed=4), tmp_path / "parts")


def test_a_loss_that_is_not_finite_keeps_the_last_state(tmp_path) -> None:
    bad = recipe(optimizer={"name": "adamw", "lr": 1e30}, constraint={"method": "none"})
    with pytest.raises(RuntimeError, match="lower the learning rate"):
        train(bad, tmp_path)


def test_text_models_train(tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60, encoding="utf-8")
    spec = recipe(
        model={"kind": "lipschitz-gpt", "width": 16, "heads": 2, "blocks": 1, "distance_bias": 4},
        data={"name": str(text), "context": 16},
        constraint={"method": "soft-cap", "w_max": 1.0, "overrides": {"head.weight": 8.0}},
        run={"steps": 30, "batch": 8},
    )
    model = load_into(train(spec, tmp_path / "out"), build)
    assert model.vocabulary == "".join(sorted(set(text.read_text())))
    assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, len(model.vocabulary))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"run": {"steps": 0, "batch": 3}}, "run.steps"),
        ({"optimizer": {"name": "sgd", "lr": 1}}, "optimizer.name"),
        ({"constraint": {"method": "soft-cap", "w_max": -1}}, "constraint.w_max"),
    ],
)
def test_bad_recipes_name_the_key(tmp_path, change, message) -> None:
    path = tmp_path / "r.toml"
    path.write_text(toml_text({**RECIPE, **change}), encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        load_recipe(path)


def test_recipes_of_the_repository_are_valid() -> None:
    from pathlib import Path

    folder = Path(__file__).parent.parent / "recipes"
    assert len([load_recipe(path) for path in folder.glob("*.toml")]) >= 6


def test_bad_model_configurations(tmp_path) -> None:
    for config, message in (({"kind": "rnn"}, "model kind"), ({"kind": "mlp", "widths": [3, 2], "depth": 9}, "options")):
        with pytest.raises(BadInput, match=message):
            build(config)


def test_model_files_round_trip_and_lies_are_refused(tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    model = LipschitzMLP([4, 6, 3], "scaled-gelu", mean=0.5, std=0.25)
    save_model(path, model)
    again = load_into(path, build)
    assert repr(again) == repr(model) and weights_sha256(again) == weights_sha256(model) and not again.training

    raw = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BadInput, match="cannot be read"):
        load_into(tmp_path / "cut.safetensors", build)
    flipped = bytearray(raw)
    flipped[-1] ^= 1
    (tmp_path / "flip.safetensors").write_bytes(flipped)
    with pytest.raises(BadInput, match="SHA-256"):
        load_into(tmp_path / "flip.safetensors", build)
    with pytest.raises(BadInput, match="not there"):
        load_into(tmp_path / "none.safetensors", build)

    tensors, header = load_tensors(path)
    save_tensors(tmp_path / "surplus.safetensors", {**tensors, "more": torch.zeros(2)}, header)
    with pytest.raises(BadInput, match="more"):
        load_into(tmp_path / "surplus.safetensors", build)
    save_tensors(tmp_path / "nan.safetensors", {**tensors, "linear1.bias": torch.full((6,), torch.nan)}, header)
    with pytest.raises(BadInput, match="NaN"):
        load_into(tmp_path / "nan.safetensors", build)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "foreign.safetensors")
    with pytest.raises(BadInput, match="header"):
        load_into(tmp_path / "foreign.safetensors", build)


def test_toml_text_reads_back() -> None:
    data = {"a": 1, "b": 2.5, "c": True, "d": "quo\"te\n", "e": [1, 2], "f": {"x*": 1.0, "g": {"h": "ü"}}, "i": float("inf"), "none": None}
    assert tomllib.loads(toml_text(data)) == {k: v for k, v in data.items() if v is not None}
    assert json.dumps(tomllib.loads(toml_text({"t": {}})), sort_keys=True) == "{}"
