"""Ctrl-C in gate, verify and certify --method all: the finished part is shown, marked partial, and does not pass; exit code 130."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import robustlip.certifiers as certifiers
import robustlip.comparison as comparison
from robustlip.attacks import MinimumRadius
from robustlip.cli import main
from robustlip.errors import RobustlipError

M = "digits-mlp-lipschitz"
POLICY = 'data = "digits:test"\nlimit = 6\ndtype = "float32"\nmin_samples = 1\nmin_clean_accuracy = 0.0\nbatch_size = 2\n{more}\n'
THREAT = '[[threat]]\nname = "l2"\nradius = {}\nmin_certified_accuracy = 0.0\nmethod = "global"\n'
GATE = ("gate", M, "--policy", "p.toml", "--json", "g.json")
ALL = ("certify", M, "--data", "digits:test", "--limit", 6, "--batch-size", 2, "--method", "all", "--json", "a.json")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("p.toml").write_text(POLICY.format(more="") + THREAT.format(1e-6) + THREAT.format(2e-6))
    return tmp_path


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


def stopped_after(monkeypatch: pytest.MonkeyPatch, batches: int, where: Any = certifiers, error: BaseException | None = None) -> None:
    """certify does so many batches, and then raises."""
    real, done = certifiers.certify, []

    def certify(*arguments: Any, **options: Any) -> Any:
        done.append(1)
        if len(done) == batches + 1:
            raise error or KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(where, "certify", certify)


def the_attack_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MinimumRadius, "_run", run)


def read(name: str) -> Any:
    return json.loads(Path(name).read_text())


CASES = [(0, 1, "after 0 of 6"), (2, 1, "after 4 of 6"), (3, 3, "after 0 of 6"), (4, 3, "after 2 of 6")]


@pytest.mark.parametrize(("batches", "measured", "told"), CASES)
def test_a_gate_that_certifies(monkeypatch, capsys, batches: int, measured: int, told: str) -> None:
    stopped_after(monkeypatch, batches)
    assert call(*GATE) == 130
    report, shown = read("g.json"), capsys.readouterr()
    lines = report["requirements"]
    assert report["interrupted"] and report["verdict"] == "interrupted" and len(lines) == 4
    # A share of 0 was asked for: what was not measured fails all the same.
    assert [line["passed"] for line in lines] == [line["got"] is not None for line in lines]
    assert sum(line["passed"] for line in lines) == measured
    assert told in shown.out and "INTERRUPTED" in shown.out and f"{4 - measured} of 4 requirements were not measured" in shown.err


def test_a_gate_in_its_attack_keeps_what_is_certified(monkeypatch, capsys) -> None:
    Path("p.toml").write_text(POLICY.format(more="require_attack = true") + THREAT.format(1e-6) + THREAT.format(2e-6))
    the_attack_stops(monkeypatch)
    assert call(*GATE) == 130
    lines = read("g.json")["requirements"]
    assert [line["got"] is not None for line in lines] == [True, True, True, False, False, False]
    assert [line["what"].split()[0] for line in lines[2:]] == ["certified", "share", "certified", "share"]
    assert not any(line["passed"] for line in lines[3:])


def certificate(name: str) -> None:
    assert call("certify", M, "--data", "digits:test", "--limit", 6, "--batch-size", 2, "--method", "global", "--json", name) == 0


def test_a_gate_in_its_second_file_keeps_the_first(monkeypatch, capsys) -> None:
    certificate("c.json")
    certificate("d.json")
    stopped_after(monkeypatch, 4)
    assert call(*GATE, "--certificate", "c.json", "--certificate", "d.json") == 130
    report = read("g.json")
    (refusal,) = report["refusals"]
    assert report["interrupted"] and "d.json: expected a recomputation of all 6 samples, got 2" in refusal
    assert [line["got"] is not None for line in report["requirements"]] == [True, True, False, False]


@pytest.mark.parametrize("batches", [0, 2])
def test_a_verification_is_not_verified_and_says_how_far_it_came(monkeypatch, capsys, batches: int) -> None:
    certificate("c.json")
    stopped_after(monkeypatch, batches)
    assert call("verify", "c.json", "--model", M, "--json", "v.json") == 130
    report, shown = read("v.json"), capsys.readouterr()
    assert report["interrupted"] and [f["kind"] for f in report["findings"]] == ["interrupted"] and report["exit_code"] == 130
    assert f"all 6 samples, got {2 * batches}: it was interrupted" in shown.err and "NOT VERIFIED" in shown.out


def test_a_false_claim_that_was_found_before_the_interruption_is_said(monkeypatch, capsys) -> None:
    certificate("c.json")
    made = read("c.json")
    row = next(i for i, sample in enumerate(made["samples"][:4]) if sample["status"] == "certified")
    made["samples"][row]["radius"] *= 3
    Path("c.json").write_text(json.dumps(made))
    stopped_after(monkeypatch, 2)
    assert call("verify", "c.json", "--model", M, "--json", "v.json") == 3
    assert {f["kind"] for f in read("v.json")["findings"]} == {"radius", "interrupted"}


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [(None, 130, "interrupted"), (RobustlipError("it failed"), 1, "stopped by an error"), (MemoryError("none left"), 1, "none left")],
)
@pytest.mark.parametrize(("batches", "methods", "samples"), [(2, 1, 4), (4, 1, 6)])
def test_all_methods(monkeypatch, capsys, error, code: int, told: str, batches: int, methods: int, samples: int) -> None:
    stopped_after(monkeypatch, batches, comparison, error)
    if isinstance(error, MemoryError):
        with pytest.raises(MemoryError):
            main([str(a) for a in ALL])
    else:
        assert call(*ALL) == code
    report, shown = read("a.json"), capsys.readouterr()
    assert report["partial"] and told in report["stopped"] and report["interrupted"] == (error is None)
    assert len(report["methods"]) == methods and report["samples"] == samples and report["attack"] is None
    assert "PARTIAL" in shown.out and "This table is partial" in shown.out and f"after {samples} of 6 samples by 1 method;" in shown.err
    if samples == 6:
        assert any(f"{told}" in reason and "after 2 of 6" in reason for reason in report["left_out"].values())


def test_all_methods_in_the_attack(monkeypatch, capsys) -> None:
    the_attack_stops(monkeypatch)
    assert call(*ALL) == 130
    report = read("a.json")
    assert report["partial"] and report["attack"] is None and len(report["methods"]) > 1 and "attack min" in report["left_out"]


def test_all_methods_before_anything_was_done(monkeypatch, capsys) -> None:
    stopped_after(monkeypatch, 0, comparison)
    assert call(*ALL) == 130
    assert not Path("a.json").exists()


def test_a_whole_table_is_not_partial(capsys) -> None:
    assert call(*ALL, "--no-attack") == 0
    report = read("a.json")
    assert not report["partial"] and not report["interrupted"] and "PARTIAL" not in capsys.readouterr().out


SLOW = """
import sys, time
import robustlip.certifiers as certifiers, robustlip.comparison as comparison
from robustlip.cli import main
real, done = certifiers.certify, []
def certify(*arguments, **options):
    done.append(1)
    if len(done) == 2:
        print("SECOND BATCH", flush=True)
        time.sleep(120)
    return real(*arguments, **options)
certifiers.certify = comparison.certify = certify
main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
@pytest.mark.parametrize(("arguments", "told"), [(GATE, "INTERRUPTED"), pytest.param(ALL, "PARTIAL", marks=pytest.mark.slow)])
def test_a_real_signal(arguments, told: str) -> None:
    source = str(Path(certifiers.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source, "PYTHONUTF8": "1"}
    command = [sys.executable, "-c", SLOW, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment,
        # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    seen = ""
    while "SECOND BATCH" not in seen:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        seen += line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert told in out and "Traceback" not in err
