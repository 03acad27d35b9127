"""Files are written atomically, and are on disk before their names are."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from robustlip.checkpoints import load_tensors, save_tensors
from robustlip.errors import BadInput
from robustlip.files import atomic, write_text


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is put on the disk and renamed, in order: ('file', its contents), ('folder', its name), ('replace', the new name)."""
    seen: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        seen.append(("folder", path.name) if folder else ("file", path.read_bytes()[:5].decode("latin-1")))
        sync(handle)

    def rename(a: Path, b: Path) -> None:
        seen.append(("replace", Path(b).name))
        replace(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    return seen


linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to see what a handle is of")


@linux
def test_contents_then_name_then_folder(calls: list[tuple[str, str]], tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "whole")
    assert calls == [("file", "whole"), ("replace", "a.txt"), ("folder", tmp_path.name)]
    assert (tmp_path / "a.txt").read_text() == "whole" and os.listdir(tmp_path) == ["a.txt"]


@linux
def test_states_and_models_too(calls: list[tuple[str, str]], tmp_path: Path) -> None:
    import torch

    save_tensors(tmp_path / "s.safetensors", {"w": torch.ones(3)}, {"step": 1})
    assert [kind for kind, _ in calls] == ["file", "replace", "folder"]
    assert load_tensors(tmp_path / "s.safetensors")[1]["step"] == 1


def test_every_file_is_as_readable_as_the_user_wants(tmp_path: Path) -> None:
    """Files of weights too, which their library makes private."""
    import torch

    before = os.umask(0o022)
    try:
        write_text(tmp_path / "a.txt", "a")
        save_tensors(tmp_path / "s.safetensors", {"w": torch.ones(3)}, {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o644}


def test_contents_that_cannot_be_put_on_the_disk_replace_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk may be noticed at the last moment only."""
    write_text(tmp_path / "a.txt", "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="No space left"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_name_that_cannot_be_given_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(a: Path, b: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError), atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_system_that_does_not_sync_folders(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is there all the same, and no handle is left open."""
    real, opened, closed = getattr(os, call), [], []

    def refuse(what: object, *more: object) -> object:
        folder = what == tmp_path if call == "open" else stat.S_ISDIR(os.fstat(what).st_mode)  # type: ignore[arg-type]
        if folder:
            opened.append(what)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(what, *more)

    close = os.close
    monkeypatch.setattr(os, call, refuse)
    monkeypatch.setattr(os, "close", lambda handle: (closed.append(handle), close(handle)))
    write_text(tmp_path / "a.txt", "whole")
    assert len(opened) == 1 and (tmp_path / "a.txt").read_text() == "whole"
    assert call == "open" or opened[0] in closed
