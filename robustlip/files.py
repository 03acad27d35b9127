"""Files that are written atomically, and JSON that every parser accepts."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import tempfile
import tomllib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from robustlip.errors import BadInput, first_line
from robustlip.names import check_table

if TYPE_CHECKING:
    from pydantic import BaseModel

Kind = TypeVar("Kind", bound="BaseModel")

_INFINITY = "\u241einfinity\u241e"
_SURROGATES = re.compile("[\ud800-\udfff]")


TOML_LIMIT = 2**20  # bytes


def read_limited(path: Path, what: str, limit: int, remedy: str) -> bytes:
    """All bytes of a file. what: e.g. 'a policy file'. Raises BadInput if it cannot be read or has more than `limit` bytes."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise BadInput(f"expected {what}, got {str(path)[:200]!r}, which cannot be read ({first_line(error, 80)}); check the path") from None
    if len(data) > limit:
        raise BadInput(f"expected {what} of at most {limit} bytes, got {path.name} with more; {remedy}")
    return data


def unzipped(data: bytes, name: str, limit: int) -> bytes:
    """The bytes in a .gz file, at most `limit`. Raises BadInput."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            whole = stream.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"expected a gzip file, got {name}, which is not one ({first_line(error, 80)}); compress it again") from None
    if len(whole) > limit:
        raise BadInput(f"expected at most {limit} bytes in {name}, got more; split the file")
    return whole


def read_json(path: Path, what: str, limit: int, remedy: str) -> Any:
    """The content of a JSON file, in UTF-8 with or without a byte-order mark. Arguments as in `read_limited`. Raises BadInput."""
    data = read_limited(path, what, limit, remedy)
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise BadInput(f"expected {what}, got {path.name}, which is not JSON ({str(error)[:100]}); copy it again") from None


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The table of a TOML file, in UTF-8 with or without a byte-order mark. what: e.g. 'a policy'.

    Raises BadInput if it cannot be read or parsed.
    """
    text = read_limited(path, f"{what} file", TOML_LIMIT, f"name {what} file")
    try:
        table = tomllib.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, an integer with thousands of digits, nesting that is too deep
        raise BadInput(f"expected {what} in TOML, got {path.name}, which does not parse ({first_line(error, 120)}); correct it") from None
    check_table(table, f"{what} ({path.name})")
    return table


def strictly(kind: type[Kind], raw: Mapping[str, Any]) -> Kind:
    """Validates a table of TOML or JSON as a pydantic model. Strict: no true for 1, no "6" for 6. Raises pydantic's ValidationError."""
    # Through JSON, because in strict mode only JSON lists may become tuples.
    return kind.model_validate_json(json.dumps(raw, default=str), strict=True)


def is_file(path: Path) -> bool:
    """Path.is_file, and False for an invalid file name (too long, with a NUL)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Path.is_dir, and False for an invalid folder name."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


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
    text = text.replace(f'"{_INFINITY}"', "1e999").replace(f'"-{_INFINITY}"', "-1e999") + "\n"
    # Names of files that are not UTF-8 contain lone surrogates, which no encoding can represent.
    return _SURROGATES.sub(lambda found: ascii_json(found[0]), text)


def ascii_json(text: str) -> str:
    """JSON with every character outside ASCII escaped; such characters occur only in strings."""
    return "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in text)


def write_json(path: Path, value: Any) -> None:
    """Write `json_text` to a file, atomically."""
    write_text(path, json_text(value))


class atomic:
    """`with atomic(path) as temporary:` replaces `path` by `temporary` when the block ends without an exception.

    The contents are on disk before the name is changed, and the name before the block is left: after a power failure the old or the new file
    exists. A symbolic link is kept: the file that it names is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)

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
            # mkstemp creates private files, as some writers do; results get the permissions of any other new file.
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
    """Sync the names in a folder to disk, if the system can: Windows does not open folders, and some network file systems refuse."""
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
    """Write a text file atomically; an existing pipe or device is written to. Raises BadInput if the path cannot be written."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            with open(path, "w", encoding="utf-8") as stream:
                stream.write(text)
            return
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(f"expected a path that can be written, got {str(path)[:200]} ({first_line(error, 80)}); name another path") from error
