"""The training forward pass in bfloat16 and compiled: what is rounded, what is not, and no silent fallback."""

from __future__ import annotations

import math
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustlip.checkpoints import load_into, load_tensors
from robustlip.data import load_tokens
from robustlip.errors import BadInput
from robustlip.hashing import weights_sha256
from robustlip.layers import Chain, Residual
from robustlip.models import LipschitzGPT, LipschitzMLP
from robustlip.models.build import build
from robustlip.training import Recipe, train
from robustlip.training.compute import Forward
from robustlip.training.source import Source

compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler: torch.compile makes C++ on a CPU")


def recipe(**run: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"kind": "mlp", "widths": [64, 16, 10]},
            "data": {"name": "digits"},
            "optimizer": {"name": "muon", "lr": 0.05, "adamw_lr": 0.01},
            "constraint": {"method": "soft-cap", "w_max": 1.0, "overrides": {"linear1.weight": 0.5}},
            "loss": {"logit_scale": 10.0},
            "run": {"steps": 60, "batch": 64, "evaluate_every": 30, "checkpoint_every": 20} | run,
        }
    )


class Stop(Exception):
    pass


def test_a_run_in_bfloat16(tmp_path: Path) -> None:
    """The model learns, its caps hold, its state is float32, and the run differs from the one in float32; after an interruption it ends the same."""
    spec = recipe(dtype="bfloat16")
    path = train(spec, tmp_path / "whole")
    card = tomllib.loads(path.with_suffix(".toml").read_text())
    assert card["val_accuracy"] > 0.7 and card["largest_constrained_norm_rms"] <= 1 + 1e-4
    assert all(v <= 1 + 1e-4 for v in card["history"]["norm_over_cap"])
    state, _ = load_tensors(tmp_path / "whole" / "tiny.state.safetensors")
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}
    # Weights that use all of float32's digits: not bfloat16 numbers in a float32 file.
    weight = state["model.linear1.weight"]
    assert float((weight.bfloat16().float() == weight).float().mean()) < 0.1
    other = train(recipe(), tmp_path / "float32")
    assert weights_sha256(load_into(other, build)) != card["weights_sha256"]

    def interrupt(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 47:
            raise Stop

    with pytest.raises(Stop):
        train(spec, tmp_path / "parts", progress=interrupt)
    assert weights_sha256(load_into(train(spec, tmp_path / "parts"), build)) == card["weights_sha256"]


def test_figures_are_of_the_model_in_float32(tmp_path: Path) -> None:
    """The card of a bfloat16 run states what the loaded model does, to the last digits that float32 has."""
    spec = recipe(dtype="bfloat16", steps=20)
    path = train(spec, tmp_path)
    model, data = load_into(path, build), Source(spec, None)
    with torch.no_grad():
        loss = float(F.cross_entropy(model(data.test_x), data.test_y))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = float(F.cross_entropy(model(data.test_x).float(), data.test_y))
    stated = tomllib.loads(path.with_suffix(".toml").read_text())["val_loss"]
    assert stated == pytest.approx(loss, rel=1e-6) and abs(stated - rounded) > 10 * abs(stated - loss)


def test_what_is_rounded() -> None:
    """Products are in bfloat16, logits and gradients in float32, and the pass outside does not change."""
    model = LipschitzGPT("abcdefgh", 16, 2, 2, distance_bias=4)
    x = torch.randint(8, (4, 12))
    seen: list[torch.dtype] = []
    handle = model.mlp0.branch.up.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    logits = Forward(recipe(dtype="bfloat16"), model, x)(x)
    F.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()
    exact = model(x)
    handle.remove()
    assert seen == [torch.bfloat16, torch.float32] and logits.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())
    gap = float((logits - exact).detach().abs().max() / exact.detach().abs().max())
    assert 1e-6 < gap < 0.05
    assert torch.equal(Forward(recipe(), model, x)(x), exact)


def test_a_text_model_learns_in_bfloat16(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60, encoding="utf-8")
    changes = {
        "model": {"kind": "lipschitz-gpt", "width": 16, "heads": 2, "blocks": 1, "distance_bias": 4},
        "data": {"name": str(text), "context": 16},
        "constraint": {"method": "soft-cap", "w_max": 1.0, "overrides": {"head.weight": 8.0}},
        "run": {"steps": 60, "batch": 8, "dtype": "bfloat16"},
    }
    path = train(Recipe.model_validate(recipe().model_dump() | changes), tmp_path / "out")
    size = len(load_tokens(f"{text}:train")[1])
    card = tomllib.loads(path.with_suffix(".toml").read_text())
    assert card["val_loss"] < 0.8 * math.log(size) and card["largest_constrained_norm_rms"] <= 8 * (1 + 1e-4)


@compiler
@pytest.mark.slow
def test_a_compiled_run(tmp_path: Path) -> None:
    """One graph, the same function, and the run that uses it ends near the one that does not; the model itself stays plain."""
    model = LipschitzMLP([6, 9, 8, 3], "scaled-gelu")
    x = torch.randn(5, 6)
    forward = Forward(recipe(compile=True), model, x)
    assert all(p.grad is None for p in model.parameters())
    assert forward._run is not model and torch.allclose(forward(x), model(x), atol=1e-6)
    forward(x).square().sum().backward()
    compiled = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(compiled, model.parameters(), strict=True))
    plain, fast = (load_into(train(recipe(compile=c, steps=10), tmp_path / str(c)), build) for c in (False, True))
    assert set(fast.state_dict()) == set(plain.state_dict())
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain.state_dict().values(), fast.state_dict().values(), strict=True))


def test_blocks_are_compiled_one_by_one_and_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsdp needs: hooks of a block's call run outside of its graph, the rest of the model is no graph, and evaluation sees no graph at all."""
    ran: list[str] = []

    def compiled(function: Any, *, fullgraph: bool, dynamic: bool) -> Any:
        assert fullgraph and not dynamic
        return lambda x: ran.append("graph") or function(x)

    monkeypatch.setattr(torch, "compile", compiled)
    blocks = [Residual(nn.Linear(4, 4)), Residual(nn.Linear(4, 4))]
    model = Chain(nn.Linear(4, 4), *blocks, nn.Linear(4, 3))
    x = torch.randn(2, 4)
    plain = model(x)
    forward = Forward(recipe(compile=True), model, x, blocks)
    assert ran == ["graph"] * 2  # the trial, before a step
    blocks[0].register_forward_pre_hook(lambda *_: ran.append("hook"))
    ran.clear()
    assert torch.equal(forward(x), plain) and ran == ["hook", "graph", "graph"]
    ran.clear()
    model.eval()
    assert torch.equal(forward(x), plain) and ran == ["hook"]


class Breaks(nn.Module):
    """A layer that cannot be compiled as one graph, because its operations depend on a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_what_does_not_compile_is_said_and_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(BadInput, match=r"torch\.compile can compile here, got \w+ .*leave out run\.compile"):
        Forward(recipe(compile=True), Chain(nn.Linear(4, 3), Breaks()), x)
    real = torch.compile

    def without_a_compiler(graph: object, inputs: object) -> None:
        raise RuntimeError("no C++ compiler\nlong trace")

    monkeypatch.setattr(torch, "compile", lambda model, **options: real(model, backend=without_a_compiler, **options))
    with pytest.raises(BadInput, match=r"install a C\+\+ compiler") as error:
        train(recipe(compile=True), tmp_path / "out")
    assert "\n" not in str(error.value) and not [p for p in (tmp_path / "out").iterdir() if p.name != ".lock"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": {"steps": 1, "batch": 1, "dtype": "float16"}}, r"run\.dtype"),
        ({"loss": {"kind": "ibp", "epsilon": 0.1}, "run": {"steps": 1, "batch": 1, "dtype": "bfloat16"}}, "ibp"),
        ({"loss": {"kind": "ibp", "epsilon": 0.1}, "run": {"steps": 1, "batch": 1, "compile": True}}, "ibp"),
        ({"reparametrization": "spectral-norm", "constraint": {}, "run": {"steps": 1, "batch": 1, "compile": True}}, "its own state"),
    ],
)
def test_options_that_exclude_each_other(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(recipe().model_dump() | change)
