"""NPZ files: lists their members, and reads one member as plain data. The zip is checked before anything in it is decompressed."""

from __future__ import annotations

import re
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any

from robustlip.errors import BadInput
from robustlip.importing.pickles import load

MAX_FILE = 512 * 2**20  # bytes of the file
MAX_MEMBER = 160 * 2**20  # decompressed bytes of one member: 9 per weight, so 17 million weights
MAX_TOTAL = 2**30  # decompressed bytes of all members
MAX_MEMBERS = 256
MAX_DIRECTORY = 2**17  # bytes of the zip's central directory, which zipfile reads completely

_NAME = re.compile(r"[A-Za-z0-9_]{1,64}\.npy")
# The header that numpy writes for one object; headers are compared, not evaluated.
_HEADER = re.compile(r"\{'descr': '(\|O)', 'fortran_order': (?:True|False), 'shape': \(\), \} *\n")


def _listed(path: Path) -> dict[str, zipfile.ZipInfo]:
    if not path.is_file():
        raise BadInput(f"expected a checkpoint file, got {path}, which does not exist; check the path")
    if path.stat().st_size > MAX_FILE:
        raise BadInput(f"expected a checkpoint of at most {MAX_FILE} bytes, got {path.name} with {path.stat().st_size}; it is not one of the paper's")
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError, EOFError) as error:
        raise BadInput(f"expected a complete .npz file, got {path.name}, which is not a readable zip ({error}); copy it again") from None
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in entries[: MAX_MEMBERS + 1]:
        found[_name(entry, path)] = entry
    if len(found) != len(entries):
        raise BadInput(f"expected at most {MAX_MEMBERS} members with distinct names in {path.name}, got {len(entries)}; it is not one of the paper's")
    if sum(entry.file_size for entry in entries) > MAX_TOTAL:
        raise BadInput(f"expected at most {MAX_TOTAL} decompressed bytes in {path.name}, got more; it is not one of the paper's")
    return found


def _check_directory(path: Path) -> None:
    """The last 22 bytes of a zip state the size of its central directory (PKWARE's APPNOTE, 4.3.16). Comments and the 64-bit form are refused."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 42))
        tail = file.read()
    if len(tail) < 22 or tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0" or tail[:4] == b"PK\x06\x07":
        raise zipfile.BadZipFile("its end record is missing, has a comment or is of the 64-bit form")
    if int.from_bytes(tail[-10:-6], "little") > MAX_DIRECTORY:
        raise zipfile.BadZipFile(f"its central directory is larger than {MAX_DIRECTORY} bytes")


def _name(entry: zipfile.ZipInfo, path: Path) -> str:
    """The member's name without .npy. Raises BadInput for members that numpy would not have written."""
    wrong = ""
    if not _NAME.fullmatch(entry.orig_filename) or entry.filename != entry.orig_filename:
        wrong = f"the name {entry.orig_filename[:80]!r}"
    elif entry.flag_bits & 0x41:
        wrong = f"the encrypted member {entry.filename}"
    elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        wrong = f"compression {entry.compress_type} of {entry.filename}"
    elif stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        wrong = f"{entry.filename}, which is a link or a device"
    elif entry.file_size > MAX_MEMBER:
        wrong = f"{entry.filename} of {entry.file_size} bytes"
    if wrong:
        raise BadInput(f"expected the members that numpy writes in {path.name}, got {wrong}; do not trust the file")
    return entry.filename.removesuffix(".npy")


def members(path: Path) -> list[str]:
    """The names of the arrays in an .npz file, in its order. Raises BadInput for a file that is not a plain .npz."""
    return list(_listed(path))


def read_object(path: Path, name: str) -> Any:
    """The Python object saved under `name`, as plain data (see `pickles.load`). Raises BadInput for anything else."""
    entries = _listed(path)
    of = f"{name} of {path.name}"
    if name not in entries:
        raise BadInput(
            f"expected an array {name} in {path.name}, got {', '.join(list(entries)[:8]) or 'none'}; it is not one of the paper's checkpoints"
        )
    entry = entries[name]
    try:
        with zipfile.ZipFile(path) as archive, archive.open(entry) as file:
            data = file.read(entry.file_size)
            rest = file.read(1)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
        raise BadInput(f"expected {of} to decompress, got damaged data ({error}); copy the file again") from None
    if len(data) != entry.file_size or rest:
        raise BadInput(f"expected {entry.file_size} bytes in {of}, got others; copy the file again")
    return load(_body(data, of), of)


def _body(data: bytes, of: str) -> bytes:
    """The bytes after the header of an .npy file with one object. Raises BadInput for another header, which is compared, not evaluated."""
    version = data[6:8]
    width = {b"\x01\x00": 2, b"\x02\x00": 4, b"\x03\x00": 4}.get(version, 0)
    length = int.from_bytes(data[8 : 8 + width], "little")
    if data[:6] != b"\x93NUMPY" or not width or not 0 < length <= 1024:
        raise BadInput(f"expected an .npy header in {of}, got another; it is not one of the paper's checkpoints")
    header = data[8 + width : 8 + width + length].decode("latin-1")
    if not _HEADER.fullmatch(header):
        raise BadInput(
            f"expected one Python object in {of}, got an array with header {header.strip()[:100]!r}; it is not one of the paper's checkpoints"
        )
    return data[8 + width + length :]
