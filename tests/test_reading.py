"""Reading files does not change random states, and does not treat a byte-order mark as text."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run

import robustlip
from robustlip.checkpoints import load_into
from robustlip.data import load_text_or_page, load_tokens
from robustlip.errors import BadInput
from robustlip.importing.logs import read_log
from robustlip.models import zoo
from robustlip.models.build import build

BOM = b"\xef\xbb\xbf"
ROOT = Path(__file__).parent.parent
MODEL = str(zoo.FOLDER / "digits-mlp-lipschitz.safetensors")


def drawing() -> torch.nn.Module:
    """A user's module that draws and seeds as it likes."""
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


def failing() -> None:
    drawing()
    raise ValueError("no model")


def states() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), np.random.get_state()[2:], random.getstate()  # type: ignore[index]


@pytest.mark.parametrize(
    "call",
    [
        lambda: robustlip.load("digits-mlp-lipschitz"),
        lambda: robustlip.load(MODEL),
        lambda: load_into(Path(MODEL), build),
        lambda: robustlip.load("model_of_test_reading:drawing"),
        lambda: robustlip.load("model_of_test_reading:failing"),
        lambda: robustlip.load("no-such-model"),
        lambda: robustlip.load_data("digits:test", limit=7, seed=3),
        lambda: robustlip.load_data("page", limit=7, seed=3),
        lambda: robustlip.load_data("digits:no"),
        lambda: load_text_or_page("nowhere.txt"),
        lambda: load_tokens("page"),
    ],
)
def test_no_random_state_moves(call: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(__file__, tmp_path / "model_of_test_reading.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = states()
    try:
        call()
    except BadInput:
        pass
    assert states() == before


def test_a_model_that_is_loaded_between_two_draws_changes_nothing() -> None:
    torch.manual_seed(0)
    first = torch.rand(3)
    torch.manual_seed(0)
    robustlip.load("digits-mlp-lipschitz")
    assert torch.equal(first, torch.rand(3))


SUITE = """name = "s"\n[[pair]]\nname = "p"\ndata = "digits:test"\nlimit = 2\nlipschitz = "digits-mlp-lipschitz"
[[pair.threat]]\nname = "l2"\nradii = [0.1]\nmethod = "global"\nattacks = [{name = "pgd"}]\n"""
RECIPE = """name = "r"\n[data]\nname = "digits"\n[model]\nkind = "mlp"\nwidths = [64, 4, 10]\n[optimizer]\nlr = 0.01\n[run]\nsteps = 1\nbatch = 4\n"""
GRID = """name = "g"\nbase = "recipe.toml"\n[grid]\noptimizer.lr = [0.01]\n"""


@pytest.mark.slow
def test_a_byte_order_mark_in_toml_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Policy, suite, recipe, grid: all of which Windows editors save with one."""
    monkeypatch.chdir(tmp_path)
    policy = (ROOT / "docs/examples/policy-digits.toml").read_text(encoding="utf-8")
    for name, text in {"policy": policy, "suite": SUITE, "recipe": RECIPE, "grid": GRID}.items():
        Path(f"{name}.toml").write_bytes(BOM + text.encode())
    for arguments in (
        ("gate", "digits-mlp-lipschitz", "--policy", "policy.toml"), ("eval", "suite.toml", "--out", "e"), ("train", "recipe.toml", "--out", "t"),
        ("sweep", "grid.toml", "--out", "s"),
    ):  # fmt: skip
        assert run(*arguments) in (0, 1), capsys.readouterr().err
        assert run("train", "recipe.toml", "--out", "t") == 0
    for made in [*Path("e").glob("*.json"), *Path("s").rglob("row.json"), *Path("t").glob("*.toml")]:
        made.write_bytes(BOM + made.read_bytes())
    assert run("table", "e") == 0 and run("sweep", "grid.toml", "--out", "s") == 0, capsys.readouterr().err


def test_a_byte_order_mark_in_json_cards_and_text_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits-mlp-lipschitz.toml", "digits-mlp-lipschitz.safetensors"):
        shutil.copy(zoo.FOLDER / name, name)
    monkeypatch.setattr(zoo, "FOLDER", tmp_path)
    card = Path("digits-mlp-lipschitz.toml")
    plain = zoo.card("digits-mlp-lipschitz")
    card.write_bytes(BOM + card.read_bytes())
    assert zoo.card("digits-mlp-lipschitz") == plain
    assert run("certify", "digits-mlp-lipschitz", "--data", "digits:test", "--limit", 2, "--method", "global", "--json", "c.json") == 0
    Path("c.json").write_bytes(BOM + Path("c.json").read_bytes())
    assert run("verify", "c.json", "--model", "digits-mlp-lipschitz") == 0
    Path("log.json").write_bytes(BOM + b"[]")
    with pytest.raises(BadInput, match="parameters and results"):
        read_log(Path("log.json"))
    Path("words.txt").write_bytes(BOM + b"words and words " * 40)
    Path("plain.txt").write_bytes(b"words and words " * 40)
    with_mark, without = robustlip.load_data("words.txt", context=4), robustlip.load_data("plain.txt", context=4)
    assert torch.equal(with_mark.x, without.x) and with_mark.vocabulary == without.vocabulary
