"""The box of valid inputs: it is given once, holds for every attack, and is stated with every result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from robustlip import cli
from robustlip.attacks import NAMES, by_name
from robustlip.errors import BadInput
from robustlip.threats import EmbeddingBall, InputBall, parse_clip, units_and_box

SHORT = ["--data", "digits:test", "--limit", "12", "--device", "cpu"]


def run(*arguments: str, code: int = 0) -> None:
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        assert (end.code or 0) == code, end.code


def attacked(folder: Path, *arguments: str) -> dict:
    run("attack", "digits-mlp-baseline", *SHORT, "--threat", "linf", "--radius", "0.08", "--json", str(folder / "a.json"), *arguments)
    return json.loads((folder / "a.json").read_text(encoding="utf-8"))


def test_a_box_is_read_and_said() -> None:
    assert parse_clip(None, "l2") is None and parse_clip("none", "weights-spectral") is None and parse_clip("-1,2.5", "linf") == (-1.0, 2.5)
    for text in ("0", "0,1,2", "a,b", "", "1,0", "nan,1", "0,inf"):
        with pytest.raises(BadInput, match=r"expected (--clip LOW,HIGH|clip=)"):
            parse_clip(text, "l2")
    with pytest.raises(BadInput, match="input threat"):
        parse_clip("0,1", "embedding-l2")
    assert units_and_box(InputBall("l2", None, (0.0, 1.0))).endswith("inputs within [0, 1]")
    assert units_and_box(InputBall("l2")).endswith("no box") and "box" not in units_and_box(EmbeddingBall())


def test_the_box_holds_for_pgd_and_is_recorded_with_every_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free, boxed = attacked(tmp_path, "--attack", "pgd"), attacked(tmp_path, "--attack", "pgd", "--clip", "0,1")
    assert free["clip"] is None and boxed["clip"] == [0.0, 1.0]
    assert boxed["settings"] == free["settings"] == json.loads(json.dumps(by_name("pgd").settings))
    assert free["settings"]["steps"] == 40 and free["settings"]["restarts"] == 3 and free["settings"]["losses"] == ["margin", "targeted", "ce"]
    count = [sum(s["status"] == "broken" for s in seen["samples"]) for seen in (free, boxed)]
    assert count[1] <= count[0]
    shown = capsys.readouterr().out
    assert "no box" in shown and "inputs within [0, 1]" in shown and "steps 40" in shown


def test_autoattack_asks_for_its_box(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchattacks")
    run("attack", "digits-mlp-baseline", *SHORT, "--threat", "linf", "--radius", "0.08", "--attack", "torchattacks-pgd", code=2)
    assert "give --clip 0,1" in capsys.readouterr().err
    seen = attacked(tmp_path, "--attack", "torchattacks-pgd", "--clip", "0,1")
    assert seen["clip"] == [0.0, 1.0] and seen["settings"]["steps"] == 40


def test_certificates_and_comparisons_name_the_box_and_radii_stay(tmp_path: Path) -> None:
    files = []
    for clip in ("none", "0,1"):
        run("certify", "digits-mlp-lipschitz", *SHORT, "--clip", clip, "--method", "global", "--json", str(tmp_path / "c.json"))
        files.append(json.loads((tmp_path / "c.json").read_text(encoding="utf-8")))
    assert files[0]["clip"] is None and files[1]["clip"] == [0.0, 1.0]
    assert [s["radius"] for s in files[0]["samples"]] == [s["radius"] for s in files[1]["samples"]]
    run("verify", str(tmp_path / "c.json"), "--model", "digits-mlp-lipschitz", "--data", "digits:test", "--device", "cpu")
    run("certify", "digits-mlp-lipschitz", *SHORT[:3], "4", "--clip", "0,1", "--method", "all", "--json", str(tmp_path / "all.json"))
    both = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert both["clip"] == [0.0, 1.0] and both["attack"]["settings"]["descent"] == 80 and both["attack"]["settings"]["attack"]["steps"] == 20


def test_a_suite_with_autoattack_and_no_box_is_refused_before_it_runs(tmp_path: Path) -> None:
    from robustlip.eval.suite import load_suite

    text = """name = "s"
seed = 0
[[pair]]
name = "p"
data = "digits"
lipschitz = "digits-mlp-lipschitz"
baseline = "digits-mlp-baseline"
limit = 5
[[pair.threat]]
name = "linf"
radii = [0.05]
attacks = [{ name = "autoattack" }]
"""
    (tmp_path / "s.toml").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match="box"):
        load_suite(str(tmp_path / "s.toml"))
    (tmp_path / "s.toml").write_text(text + "clip = [0, 1]\n", encoding="utf-8")
    assert load_suite(str(tmp_path / "s.toml")).pairs[0].threats[0].clip == (0.0, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_every_attack_says_its_settings(name: str) -> None:
    attack = by_name(name)
    assert attack.settings and json.loads(json.dumps(attack.settings)) and attack.described.startswith(attack.name + " (")
    assert np.all([key in attack.described for key, value in attack.settings.items() if value is not None])
