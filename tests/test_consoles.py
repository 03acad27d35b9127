"""Consoles with encodings other than UTF-8: characters are replaced, without a traceback; JSON keeps its meaning."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from robustlip.__main__ import run
from robustlip.cli.console import _STANDS_FOR, Progress, never_fail_to_encode, print_json
from robustlip.files import ascii_json, json_text

SUITE = """name = "tiny"
title = "ℓ∞ → ≥ 0 · “small” — ₂ 中"
[[pair]]
name = "p"
data = "digits:test"
limit = 3
lipschitz = "digits-mlp-lipschitz"
[[pair.threat]]
name = "l2"
radii = [0.01]
method = "global"
attacks = [{name = "pgd", options = {steps = 2}}]
"""
POLICY = """data = "digits:test"
limit = 3
dtype = "float32"
min_samples = 1
min_clean_accuracy = 1.0
[[threat]]
name = "l2"
radius = 99.0
min_certified_accuracy = 1.0
method = "global"
"""
ENCODINGS = ["cp1252", "ascii", "utf-8"]
ROWS = ("--data", "digits:test", "--limit", 3)
M = "digits-mlp-lipschitz"
VERBS = {
    "help": ("certify", "--help"),
    "table": ("table", "made"),
    "html": ("table", "made", "--format", "html"),
    "report": ("report", "made"),
    "zoo": ("zoo", "list"),
    "card": ("zoo", "show", M),
    "certify": ("certify", M, *ROWS, "--method", "global"),
    "all": ("certify", M, *ROWS[:3], 1, "--method", "all", "--no-attack"),
    "gate": ("gate", M, "--policy", "policy.toml"),
    "refusal": ("certify", "∞→中.safetensors", *ROWS),
    "surrogate": ("certify", "\udcff.safetensors", *ROWS),
    "usage": ("certify", "--∞"),
    "eval": ("eval", "suite.toml", "--out", "made"),
}
JSON = {
    "table": ("table", "made", "--json", "-"), "card": ("zoo", "show", M, "--json"), "schema": ("verify", "--schema"),
    "eval": ("eval", "suite.toml", "--out", "made", "--json", "-"),
}  # fmt: skip


class Console:
    """Both streams of a process whose console has that encoding, strict as Python's stdout is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
        self.out, self.err, self.encoding = io.BytesIO(), io.BytesIO(), encoding
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(self.out, encoding=encoding, errors="strict"))
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(self.err, encoding=encoding, errors="strict"))

    def run(self, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["robustlip", *(str(a) for a in arguments)])
        code = 0
        try:
            run()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
        # typer takes ASCII for a console that is not set up, and writes its own texts in UTF-8.
        own = self.encoding == "ascii" and (code == 2 or "--help" in arguments)
        out, err = (stream.getvalue().decode("utf-8" if own else self.encoding) for stream in (self.out, self.err))
        return code, out, err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a suite, a policy and the run of the suite, made by a process whose console is ASCII."""
    folder = tmp_path_factory.mktemp("consoles")
    (folder / "suite.toml").write_text(SUITE, encoding="utf-8")
    (folder / "policy.toml").write_text(POLICY, encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-m", "robustlip", "eval", "suite.toml", "--out", "made"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout.isascii() and b"->" in done.stdout and b"Traceback" not in done.stderr, done.stderr
    return folder


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb(made: Path, monkeypatch: pytest.MonkeyPatch, verb: str, encoding: str) -> None:
    monkeypatch.chdir(made)
    code, out, err = Console(monkeypatch, encoding).run(monkeypatch, *VERBS[verb])
    assert code == {"gate": 1, "refusal": 2, "surrogate": 2, "usage": 2}.get(verb, 0) and "Traceback" not in err, (out, err)
    assert out or verb in ("refusal", "surrogate", "usage")
    if verb in ("refusal", "surrogate"):
        assert err.splitlines()[-1].startswith("robustlip: expected ")
    if verb == "table" and encoding == "ascii":
        assert "linf -> >= 0 - " in out and "∞" not in out


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("verb", JSON)
def test_json_on_stdout_is_the_same_json(made: Path, monkeypatch: pytest.MonkeyPatch, verb: str, encoding: str) -> None:
    monkeypatch.chdir(made)
    code, out, _ = Console(monkeypatch, encoding).run(monkeypatch, *JSON[verb])
    assert code == 0
    first = json.loads(out)
    with monkeypatch.context() as again:
        code, plain, _ = Console(again, "utf-8").run(again, *JSON[verb])
    assert first == json.loads(plain)


def test_the_bar_and_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown while something runs goes to stderr, in characters of its own."""
    console = Console(monkeypatch, "ascii")
    never_fail_to_encode(sys.stdout, sys.stderr)
    with Progress(delay=0.0) as progress:
        progress._show()
        progress("m · ∞ → 1", 1, 2)
    sys.stderr.flush()
    assert b"[1/2] m - inf -> 1" in console.err.getvalue()


def test_stand_ins_are_ascii() -> None:
    assert all(text.isascii() and text for text in _STANDS_FOR.values())


@pytest.mark.parametrize("text", ["∞", "\udcff", "\U0001f600", 'a"\\\n', "\x7f", "é"])
def test_json_of_any_text(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    value = {text: [text, 1.5, float("inf")]}
    for written in (json_text(value), ascii_json(json_text(value))):
        written.encode("utf-8")
        assert json.loads(written) == value
    assert ascii_json(json_text(value)).isascii()
    console = Console(monkeypatch, "ascii")
    print_json(value)
    assert json.loads(console.out.getvalue()) == value
