"""The policy or the command line limits the cost of verification; the certificate file cannot change the limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import robustlip.gate  # before prove is replaced: it takes the function by its name
import robustlip.verification as verification
from robustlip.cli import main

M = "digits-mlp-lipschitz"
POLICY = 'data = "digits:{split}"\nlimit = 3\ndtype = "float32"\nmin_samples = 1\nmin_clean_accuracy = 0.0\n{more}\n[[threat]]\nname = "l2"\n' \
    'radius = 1e-6\nmin_certified_accuracy = 0.0\n'  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.toml").write_text(POLICY.format(split="test", more=""))
    assert call("certify", M, "--data", "digits:test", "--limit", 3, "--method", "global", "--json", "c.json") == 0


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code or 0


def change(**keys: Any) -> None:
    made = json.loads(Path("c.json").read_text())
    made["data"].update(keys.pop("data", {}))
    Path("c.json").write_text(json.dumps({**made, **keys}))


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, *arguments: object) -> None:
    """Not verified, in one sentence, and nothing was proved again."""
    with monkeypatch.context() as patch:
        patch.setattr(verification, "prove", lambda *_, **__: pytest.fail("recomputed"))
        patch.setattr(robustlip.gate, "prove", verification.prove)
        assert call(*arguments) == 1
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


VERIFY = ("verify", "c.json", "--model", M)
GATE = ("gate", M, "--policy", "p.toml", "--certificate", "c.json")


@pytest.mark.parametrize(
    ("keys", "words", "option", "more"),
    [
        ({"method": "lipsdp"}, "a method that is allowed here", None, None),
        ({"batch_size": 10**9}, "samples at once", ("--batch-size", 3), "batch_size = 3"),
        ({}, "at most 2 samples", None, None),
    ],
)
def test_what_is_dearer_than_allowed_is_refused_first(capsys, monkeypatch, keys, words, option, more) -> None:
    change(**keys)
    few = not keys
    Path("p.toml").write_text(POLICY.format(split="test", more="max_samples = 2" if few else ""))
    refused(capsys, monkeypatch, words, *VERIFY, *(("--max-samples", 2) if few else ()))
    refused(capsys, monkeypatch, words, *GATE)
    if option is not None:
        assert call(*VERIFY, *option) == 0
        Path("p.toml").write_text(POLICY.format(split="test", more=more))
        assert call(*GATE) == 0


def test_methods_that_the_policy_allows(capsys, monkeypatch) -> None:
    Path("p.toml").write_text(POLICY.format(split="test", more='methods = ["crown"]'))
    refused(capsys, monkeypatch, "a method that is allowed here (crown), got 'global'", *GATE)
    refused(capsys, monkeypatch, "a method that is allowed here (crown), got 'global'", *VERIFY, "--allow", "crown")
    Path("p.toml").write_text(POLICY.format(split="test", more='methods = ["global"]'))
    assert call(*GATE) == 0 and call(*VERIFY, "--allow", "global") == 0
    Path("p.toml").write_text(POLICY.format(split="test", more='methods = ["hope"]'))
    assert call(*GATE) == 2


def test_a_slow_recomputation_is_stopped(capsys, monkeypatch) -> None:
    change(batch_size=1)
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(verification.time, "monotonic", lambda: float(next(clock)))
    assert call(*VERIFY, "--max-seconds", 50) == 1
    assert "at most 50 seconds" in capsys.readouterr().err
    Path("p.toml").write_text(POLICY.format(split="test", more="max_seconds = 50"))
    assert call(*GATE) == 1
    assert call(*VERIFY, "--max-seconds", 10**6) == 0


def test_training_data_are_said_in_the_verdict(capsys) -> None:
    Path("p.toml").write_text(POLICY.format(split="train", more=""))
    assert call("gate", M, "--policy", "p.toml") == 0
    assert "PASS ON TRAINING DATA:" in capsys.readouterr().out
