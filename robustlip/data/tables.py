"""Tables of one split: parquet files, or tables of the hub's library. Rows are read when they are needed, and counted before they are read.

Files are not trusted. The sizes that a file states (rows, columns, bytes, and the sizes of every page to decompress) are read first and
checked; then row group after row group is read, with the requested columns only. Paths are literal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np

from robustlip.data.pages import Malformed, Pages, check_footer, count_pages
from robustlip.errors import BadInput, first_line

if TYPE_CHECKING:
    import pyarrow as pa

MAX_ROWS = 10_000_000  # per split
MAX_EXPANSION = 20  # limits of a decompressed column: this many times its size in the file (encoded images do not compress further),
MAX_COLUMN = 2**28  # … or this many bytes per row group,
MAX_UNPACKED = 2**31  # … or this many bytes per file
MAX_FEATURES = 2**22  # bytes of the hub's description of columns
_CELLS, _VALUES = 256, 65_536  # rows that are read at once: of images or texts, and of labels
_COPIED = 2**32  # bytes of dictionary values that are copied for one row group, once per batch of rows
_DENSE = 2**26  # bytes of fixed-width values that are in memory at once


class Table(Protocol):
    """name: for messages. types: column → pyarrow's type. features: column → the hub's metadata about it. rows: their number."""

    name: str
    types: dict[str, pa.DataType]
    features: dict[str, dict[str, Any]]
    rows: int

    def chunks(self, column: str) -> Iterator[pa.Array]:
        """All values of a column in order."""
        ...

    def cells(self, column: str, rows: np.ndarray) -> Iterator[Any]:
        """The values of ascending rows: for a struct with bytes only these (a path in it is never opened), otherwise Python objects."""
        ...


class Parquet:
    """The parquet files of one split, in order. Raises BadInput for unreadable files, files with different columns, and too many rows."""

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self.name, self.files = name, list(files)
        self._groups: list[tuple[Path, int, int]] = []  # file, row group in it, rows
        self._footers: dict[Path, Any] = {}  # pyarrow's FileMetaData; read once, so that the checked footer is the one in use
        self._places: dict[tuple[Path, str], int] = {}  # the index of the leaf column
        self._counted: dict[tuple[Path, str], dict[int, tuple[Pages, int]]] = {}  # row group → its pages, and their bytes in the file
        self.rows = 0
        for at, path in enumerate(self.files):
            with _opened(path) as file, _explained(path):
                self._footers[path] = file.metadata
                types = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
                features = _features(file.schema_arrow.metadata, name)
                counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
                claimed, names = file.metadata.num_rows, file.schema_arrow.names
            if min(counts, default=0) < 0 or sum(counts) != claimed:
                raise _unreadable(path, "its row groups do not have as many rows as the file")
            if len(set(names)) != len(names):
                raise _unreadable(path, "two columns have the same name")
            self.rows += claimed
            if self.rows > MAX_ROWS:
                raise BadInput(f"expected at most {MAX_ROWS} rows in {name}, got {self.rows} or more; split it (--limit draws from all its rows)")
            if at == 0:
                self.types, self.features = types, features
            elif (types, features) != (self.types, self.features):
                raise BadInput(f"expected the columns of {self.files[0].name} in all files of {name}, got others in {path.name}; write them again")
            self._groups += [(path, group, rows) for group, rows in enumerate(counts)]

    def chunks(self, column: str) -> Iterator[pa.Array]:
        for path, group, rows in self._groups:
            if rows:
                yield from self._read(path, group, column, _VALUES)

    def cells(self, column: str, rows: np.ndarray) -> Iterator[Any]:
        first = 0
        for path, group, count in self._groups:
            wanted = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + count)] - first
            first += count
            start = 0
            if not len(wanted):
                continue
            for chunk in self._read(path, group, column, _CELLS):
                here = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, start + len(chunk))] - start
                start += len(chunk)
                yield from _values(chunk, here)
                if start > wanted[-1]:
                    break

    def _read(self, path: Path, group: int, column: str, size: int) -> Iterator[pa.Array]:
        """The column of one row group, in batches; a repeated text or image is stored once."""
        leaf = _leaf(column, self.types[column])
        footer = self._footers[path]
        with _explained(path), open(path, "rb") as stream:
            place = self._place(path, column, leaf)
            part, rows = footer.row_group(group).column(place), footer.row_group(group).num_rows
            limit = max(MAX_COLUMN, MAX_EXPANSION * min(part.total_compressed_size, path.stat().st_size))
            width = max(1, footer.schema.column(place).length) if part.physical_type == "FIXED_LEN_BYTE_ARRAY" else 0
            if (most := max(part.total_uncompressed_size, rows * width)) > limit:
                raise BadInput(
                    f"expected at most {limit} bytes in a row group of the column {column!r} of {self.name}, got {most}; "
                    f"write the file in smaller row groups"
                )
            pages = self._pages(stream, path, leaf, group, part, rows, limit)
            size = min(size, max(1, _DENSE // width)) if width else max(size, -(-rows * pages.dictionary // _COPIED))
            repeated = [leaf] if part.physical_type == "BYTE_ARRAY" else []
        with _opened(path, repeated, footer) as file:
            batches = file.iter_batches(batch_size=size, row_groups=[group], columns=[leaf], use_threads=False)
            while True:
                with _explained(path):
                    batch = next(batches, None)
                    if batch is None:
                        return
                    values = batch.column(column)
                    values.validate(full=True)  # for example that text is UTF-8
                yield values

    def _place(self, path: Path, column: str, leaf: str) -> int:
        """The index of the only leaf column that pyarrow reads for this name. Raises BadInput for lists and structures."""
        if (path, leaf) not in self._places:
            schema = self._footers[path].schema
            leaves = [schema.column(at) for at in range(len(schema))]
            found = [at for at, one in enumerate(leaves) if one.path == leaf or one.path.startswith(f"{leaf}.")]
            if len(found) != 1 or leaves[found[0]].path != leaf or leaves[found[0]].max_repetition_level:
                raise BadInput(
                    f"expected single values in the column {column!r} of {self.name}, got {str(self.types[column])[:100]}; name another column"
                )
            self._places[path, leaf] = found[0]
        return self._places[path, leaf]

    def _pages(self, stream: IO[bytes], path: Path, leaf: str, group: int, part: Any, rows: int, limit: int) -> Pages:
        """The page counts of a column in a row group. Checks that they contain its rows, and that their sum stays within the limits of a file."""
        counted = self._counted.setdefault((path, leaf), {})
        if group not in counted:
            start, dictionary = part.data_page_offset, part.dictionary_page_offset
            if dictionary is not None and 0 < dictionary < start:
                start = dictionary
            if part.num_values != rows:
                raise Malformed("a column does not have as many values as rows")
            counted[group] = count_pages(stream, start, part.total_compressed_size, rows, limit), part.total_compressed_size
            size = path.stat().st_size
            if sum(packed for _, packed in counted.values()) > size:
                raise Malformed("its row groups overlap")
            if (total := sum(pages.unpacked for pages, _ in counted.values())) > max(MAX_UNPACKED, MAX_EXPANSION * size):
                raise Malformed(f"a column decompresses to {total} bytes or more", "write it in several files")
        return counted[group][0]


class HubTable:
    """A `datasets.Dataset`, whose Arrow table is a memory-mapped file."""

    def __init__(self, data: Any, name: str) -> None:
        self.name = name
        self._table: pa.Table = data.with_format("arrow")[:] if len(data) else data.features.arrow_schema.empty_table()
        self.features = {column: kind for column, kind in data.features.to_dict().items() if isinstance(kind, dict)}
        self.types = dict(zip(self._table.schema.names, self._table.schema.types, strict=True))
        self.rows = self._table.num_rows
        if self.rows > MAX_ROWS:
            raise BadInput(f"expected at most {MAX_ROWS} rows in {name}, got {self.rows}; use a smaller split")

    def chunks(self, column: str) -> Iterator[pa.Array]:
        yield from self._table.column(column).chunks

    def cells(self, column: str, rows: np.ndarray) -> Iterator[Any]:
        start = 0
        for chunk in self.chunks(column):
            here = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + len(chunk))] - start
            start += len(chunk)
            yield from _values(chunk, here)


def is_bytes(kind: pa.DataType) -> bool:
    """Whether values are bytes of any width, dictionary-encoded or not."""
    import pyarrow.types as t

    if t.is_dictionary(kind):
        kind = kind.value_type
    return bool(t.is_binary(kind) or t.is_large_binary(kind) or t.is_binary_view(kind) or t.is_fixed_size_binary(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether values are strings of any width, dictionary-encoded or not."""
    import pyarrow.types as t

    if t.is_dictionary(kind):
        kind = kind.value_type
    return bool(t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind))


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether values are structs with a field 'bytes' of bytes: the form in which the hub stores images."""
    import pyarrow.types as t

    return bool(t.is_struct(kind)) and kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)


def pick(table: Table, chosen: str | None, candidates: Iterable[str], what: str, option: str) -> str:
    """The chosen column, or the only candidate. Raises BadInput, with a list of the columns, if the choice is missing or ambiguous."""
    listed = ", ".join(table.types)[:500]
    if chosen is not None:
        if chosen not in table.types:
            raise BadInput(f"expected a column {chosen!r} in {table.name}, got the columns {listed}; name one of them with {option}")
        return chosen
    found = list(dict.fromkeys(candidates))
    if len(found) == 1:
        return found[0]
    got = f"{len(found)} ({', '.join(found)[:200]}) among" if found else "none among"
    raise BadInput(f"expected one {what} column in {table.name}, got {got} the columns {listed}; name it with {option}")


def _leaf(column: str, kind: pa.DataType) -> str:
    return f"{column}.bytes" if holds_bytes(kind) else column


def _values(chunk: pa.Array, rows: np.ndarray) -> Iterator[Any]:
    """Rows of a chunk as Python objects, one at a time."""
    for row in rows.tolist():
        value = chunk[row].as_py()
        yield value.get("bytes") if isinstance(value, dict) else value


def _features(metadata: Mapping[bytes, bytes] | None, name: str) -> dict[str, dict[str, Any]]:
    """The description of the columns that the `datasets` library wrote; {} without one."""
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    if len(text) > MAX_FEATURES:
        raise BadInput(f"expected at most {MAX_FEATURES} bytes of the hub's description of columns in {name}, got {len(text)}; write the file again")
    try:
        features = json.loads(text.decode("utf-8-sig"))["info"]["features"]
        return {str(column): kind for column, kind in features.items() if isinstance(kind, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadInput(f"expected the hub's description of columns in {name}, got invalid metadata; write the file again") from None


@contextmanager
def _opened(path: Path, repeated: Sequence[str] = (), footer: Any = None) -> Iterator[Any]:
    """Opens a parquet file. footer: the footer that was read and checked before."""
    import pyarrow.parquet as pq

    with _explained(path):
        stream = open(path, "rb")
    with stream:
        with _explained(path):
            if footer is None:
                check_footer(stream)
                stream.seek(0)
            file = pq.ParquetFile(stream, metadata=footer, read_dictionary=list(repeated))
        yield file


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Converts errors inside the block to BadInput: pyarrow's own errors, and Python errors that pyarrow raises."""
    try:
        yield
    except (BadInput, GeneratorExit):
        raise
    except Malformed as error:
        raise _unreadable(path, str(error), error.remedy) from None
    except Exception as error:
        raise _unreadable(path, first_line(error, 120)) from None


def _unreadable(path: Path, reason: str, remedy: str = "copy it again") -> BadInput:
    return BadInput(f"expected a complete parquet file, got {str(path)[:200]!r} that cannot be read ({reason}); {remedy}")
