"""Files that are written whole or not at all, and JSON that every parser accepts."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from robustlip.errors import BadInput

_INFINITY = "\u241einfinity\u241e"


def json_text(value: Any) -> str:
    """Indented JSON. Infinity becomes 1e999, which strict parsers accept and read as infinity; NaN becomes null."""

    def plain(v: Any) -> Any:
        if isinstance(v, dict):
            return {str(k): plain(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [plain(x) for x in v]
        if hasattr(v, "tolist"):  # numpy scalars and arrays
            return plain(v.tolist())
        if isinstance(v, float) and math.isnan(v):
            return None
        if isinstance(v, float) and math.isinf(v):
            return _INFINITY if v > 0 else "-" + _INFINITY
        return v

    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    return text.replace(f'"{_INFINITY}"', "1e999").replace(f'"-{_INFINITY}"', "-1e999") + "\n"


def write_json(path: Path, value: Any) -> None:
    """`json_text` to a file, at once."""
    write_text(path, json_text(value))


class atomic:
    """`with atomic(path) as temporary:` writes `temporary`, which becomes `path` only when the block ends well.

    The contents are on the disk before the name is, and the name when the block is left: a power failure leaves the old file or the new one.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=self.path.suffix)
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.temporary.unlink(missing_ok=True)
            return
        try:
            # mkstemp makes the file private, as some writers do with theirs; results are as readable as anything else the user writes.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(self.temporary, 0o666 & ~mask)
            with open(self.temporary, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(self.temporary, self.path)
        except OSError:
            self.temporary.unlink(missing_ok=True)
            raise
        _sync_folder(self.path.parent)


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system can: Windows opens no folders, and some network file systems refuse."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file at once. Raises BadInput when the place cannot be written."""
    try:
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"expected a place to write, got {path} ({error.strerror or error}); name another path") from error
