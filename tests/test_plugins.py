"""Other packages add methods, attacks and data sets by entry points; invalid ones are refused."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import run
from torch import nn

import robustlip
from robustlip import plugins
from robustlip.attacks import by_name
from robustlip.attacks.pgd import PGD
from robustlip.certifiers import METHODS, certify
from robustlip.certifiers.methods import Method
from robustlip.data import Dataset, load_data
from robustlip.errors import BadInput
from robustlip.threats import InputBall


@pytest.fixture
def install(monkeypatch):
    """install(group, {name: object}): as if a package with these entry points were there."""

    def put(group: str, points: dict) -> None:
        monkeypatch.setattr(plugins, "plugins", lambda asked: dict(points) if asked == group else {})

    return put


def half(*given):
    """A method of another package: half of what `global` proves."""
    radius, constant = METHODS["global"].radii(*given)
    return radius / 2, constant


def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(5, 6)
    return model, x, model(x).argmax(-1)


@pytest.mark.parametrize("in_best", [True, False])
def test_a_method_by_name_and_in_best(install, in_best) -> None:
    install("robustlip.methods", {"half": Method(half, lambda model, threat: "", "half of global", in_best)})
    model, x, y = task()
    whole, halved, best = (certify(model, x, y, InputBall("l2"), name) for name in ("global", "half", "best"))
    assert (halved.radius == pytest.approx(whole.radius / 2, rel=1e-12)) and set(halved.methods) == {"half"}
    assert (best.radius >= whole.radius).all()


def test_a_method_that_proves_most_wins_best(install) -> None:
    def seven(model, x, y, *rest):
        return torch.full((len(y),), 7.0).double(), torch.zeros(len(y)).double()

    install("robustlip.methods", {"seven": Method(seven, lambda *_: "", "seven")})
    model, x, y = task()
    assert set(certify(model, x, y, InputBall("l2")).methods) == {"seven"}


def test_a_method_that_does_not_apply_says_why(install) -> None:
    install("robustlip.methods", {"half": Method(half, lambda model, threat: "it is Sunday", "half of global")})
    model, x, y = task()
    with pytest.raises(BadInput, match="it is Sunday"):
        certify(model, x, y, InputBall("l2"), "half")


def test_an_attack_by_name(install) -> None:
    install("robustlip.attacks", {"mild": lambda **options: PGD(steps=1, **options), "odd": lambda **options: 3})
    model, x, y = task()
    assert by_name("mild", restarts=2)(model, x, y, InputBall("l2", 0.1)).distance.max() <= 0.1
    with pytest.raises(BadInput, match="options that the attack 'mild' has"):
        by_name("mild", colour=1)
    with pytest.raises(BadInput, match=r"entry point 'odd' to return a robustlip.attacks.base.Attack, got int"):
        by_name("odd")
    with pytest.raises(BadInput, match="autoattack, mild, odd"):
        by_name("unknown")


def rings(split, data_dir) -> Dataset:
    x = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(len(split)))
    return Dataset("rings", split, "image", x, torch.arange(50) % 10, torch.arange(50), 10)


def test_a_data_set_by_name(install) -> None:
    install("robustlip.data", {"rings": rings, "odd": lambda split, data_dir: [1, 2]})
    data, again, train = load_data("rings", limit=7, seed=3), load_data("rings:test", limit=7, seed=3), load_data("rings:train")
    assert len(data) == 7 and torch.equal(data.x, again.x) and len(train) == 50 and train.split == "train"
    assert torch.equal(data.x, rings("test", None).x[data.index])
    with pytest.raises(BadInput, match=r"entry point 'odd' to return a robustlip.data.Dataset, got list"):
        load_data("odd")
    with pytest.raises(BadInput, match="no label_column for the data set of another package"):
        load_data("rings", label_column="y")


def test_the_command_line_knows_all_three(install, tmp_path, monkeypatch) -> None:
    every = {
        "robustlip.methods": {"half": Method(half, lambda model, threat: "", "half of global")},
        "robustlip.attacks": {"mild": lambda **options: PGD(steps=1, **options)},
        "robustlip.data": {"rings": rings},
    }
    monkeypatch.setattr(plugins, "plugins", lambda group: every.get(group, {}))
    done = run("certify", "digits-mlp-lipschitz", "--data", "rings", "--limit", "4", "--method", "half", "--json", str(tmp_path / "c.json"))
    assert done == 0
    assert "rings" in json.dumps(json.loads((tmp_path / "c.json").read_text())["data"])
    assert run("attack", "digits-mlp-lipschitz", "--data", "rings", "--limit", "4", "--attack", "mild", "--radius", "0.1") == 0


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("global", Method(half, lambda *_: "", "x"), "new names in robustlip.methods, got 'global'"),
        ("best", Method(half, lambda *_: "", "x"), "new names in robustlip.methods, got 'best'"),
        ("Half life", Method(half, lambda *_: "", "x"), "lower-case letters, digits, - and _"),
        ("half", half, "a robustlip.certifiers.methods.Method as the entry point 'half' of robustlip.methods, got function"),
    ],
)
def test_what_a_package_may_not_add(install, name, value, says) -> None:
    install("robustlip.methods", {name: value})
    model, x, y = task()
    with pytest.raises(BadInput, match=says):
        robustlip.certify(model, x, y, InputBall("l2"))
