"""Two processes that write into one folder: the second is refused, and a killed process releases its lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from robustlip.cli import main
from robustlip.errors import BadInput
from robustlip.locks import LOCK, sole_writer

pytest.importorskip("fcntl")

HOLD = "import sys, time\nfrom pathlib import Path\nfrom robustlip.locks import sole_writer\nwith sole_writer(Path(sys.argv[1]), 'run'):\n    " \
    "print('held', flush=True)\n    time.sleep(600)\n"  # fmt: skip
RECIPE = 'name = "r"\n[model]\nkind = "mlp"\nwidths = [64, 4, 10]\n[data]\nname = "digits"\n[optimizer]\nlr = 0.01\n[run]\nsteps = 2\nbatch = 4\n'
SUITE = 'name = "s"\n[[pair]]\nname = "p"\ndata = "digits:test"\nlimit = 2\nlipschitz = "digits-mlp-lipschitz"\n[[pair.threat]]\nname = "l2"\n' \
    'radii = [0.01]\nmethod = "global"\nattacks = [{name = "pgd", options = {steps = 2}}]\n'  # fmt: skip
GRID = 'name = "g"\nbase = "recipe.toml"\n[grid]\noptimizer.lr = [0.01]\n'
VERBS = {
    "train": ("train", "recipe.toml", "--out", "out"), "sweep": ("sweep", "grid.toml", "--out", "out"),
    "eval": ("eval", "suite.toml", "--out", "out"),
}  # fmt: skip


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that writes to the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("verb", VERBS)
def test_the_second_writer_is_refused_until_the_first_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("recipe", RECIPE), ("suite", SUITE), ("grid", GRID)):
        Path(f"{name}.toml").write_text(text)
    Path("out").mkdir()
    first = holder(Path("out"))
    try:
        with pytest.raises(SystemExit) as caught:
            main(VERBS[verb])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert caught.value.code == 2 and said.startswith("robustlip: expected a folder that no other process writes to, got out")
        assert [path.name for path in Path("out").rglob("*.safetensors")] + list(Path("out").rglob("*.parquet")) == []
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert Path("out", LOCK).exists()
    with pytest.raises(SystemExit) as caught:
        main(VERBS[verb])
    assert not caught.value.code


def test_the_lock_ends_with_the_block(tmp_path: Path) -> None:
    with sole_writer(tmp_path, "run"):
        with pytest.raises(BadInput, match="no other process"), sole_writer(tmp_path, "run"):
            pass
    with pytest.raises(KeyError), sole_writer(tmp_path, "run"):
        raise KeyError
    with sole_writer(tmp_path, "run"):
        pass


def test_what_lies_in_the_place_of_the_lock_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    (tmp_path / LOCK).symlink_to("other")
    with pytest.raises(BadInput, match="cannot be opened"), sole_writer(tmp_path, "run"):
        pass
    assert (tmp_path / "other").read_text() == "kept"
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).mkdir()
    with pytest.raises(BadInput, match="cannot be opened"), sole_writer(tmp_path, "run"):
        pass
