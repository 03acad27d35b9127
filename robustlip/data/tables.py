"""Tables of one split: parquet files, or what the hub's library brought. Rows are read as they are needed, and never before they are counted.

A file from outside is hostile. What it says of itself (rows, columns, sizes) is read first and bounded; then one row group after the other, of
the columns that are asked for. A path is opened as it is spelled, whatever characters it has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from robustlip.errors import BadInput, first_line

if TYPE_CHECKING:
    import pyarrow as pa

MAX_ROWS = 10_000_000  # of a split
MAX_EXPANSION = 20  # a column may take so many times its size in the file, for encoded images do not compress,
MAX_COLUMN = 2**28  # … or so many bytes a row group
_CELLS, _VALUES = 256, 65_536  # rows read at once: of images or texts, and of labels


class Table(Protocol):
    """name: what messages call it. types: column → pyarrow's type. features: column → what the hub's metadata says of it. rows: how many."""

    name: str
    types: dict[str, pa.DataType]
    features: dict[str, dict[str, Any]]
    rows: int

    def chunks(self, column: str) -> Iterator[pa.Array]:
        """All values of a column in order."""
        ...

    def cells(self, column: str, rows: np.ndarray) -> Iterator[Any]:
        """The values of ascending rows: of a struct with bytes those alone (a path in it is never followed), else as Python has them."""
        ...


class Parquet:
    """The parquet files of one split, in order. Raises BadInput for what cannot be read, has other columns than the first, or too many rows."""

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self.name, self.files = name, list(files)
        self._groups: list[tuple[Path, int, int]] = []  # file, row group in it, rows
        self.rows = 0
        for at, path in enumerate(self.files):
            with _opened(path) as file, _explained(path):
                types = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
                features = _features(file.schema_arrow.metadata, name)
                counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
                claimed, names = file.metadata.num_rows, file.schema_arrow.names
            if min(counts, default=0) < 0 or sum(counts) != claimed:
                raise _unreadable(path, "its row groups do not add up to its rows")
            if len(set(names)) != len(names):
                raise _unreadable(path, "two columns have one name")
            self.rows += claimed
            if self.rows > MAX_ROWS:
                raise BadInput(f"expected at most {MAX_ROWS} rows in {name}, got {self.rows} or more; cut the file, --limit draws from all its rows")
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
        """The column of one row group, in batches; texts and images that repeat are held once."""
        leaf = _leaf(column, self.types[column])
        with _opened(path) as file, _explained(path):
            part = next((c for c in map(file.metadata.row_group(group).column, range(file.metadata.num_columns)) if c.path_in_schema == leaf), None)
            if part is None:
                raise BadInput(f"expected single values in the column {column!r} of {self.name}, got {self.types[column]}; name another column")
            limit = max(MAX_COLUMN, MAX_EXPANSION * min(part.total_compressed_size, path.stat().st_size))
            if part.total_uncompressed_size > limit:
                raise BadInput(
                    f"expected at most {limit} bytes in a row group of the column {column!r} of {self.name}, got {part.total_uncompressed_size}; "
                    f"write the file in smaller row groups"
                )
            repeated = [leaf] if part.physical_type == "BYTE_ARRAY" else []
        with _opened(path, repeated) as file:
            batches = file.iter_batches(batch_size=size, row_groups=[group], columns=[leaf], use_threads=False)
            while True:
                with _explained(path):
                    batch = next(batches, None)
                    if batch is None:
                        return
                    values = batch.column(column)
                    values.validate(full=True)  # that text is UTF-8, for one
                yield values


class Held:
    """A `datasets.Dataset`, whose Arrow table lies in a file that the system maps into memory."""

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
    """Bytes of any width, in a dictionary or not."""
    import pyarrow.types as t

    if t.is_dictionary(kind):
        kind = kind.value_type
    return bool(t.is_binary(kind) or t.is_large_binary(kind) or t.is_binary_view(kind) or t.is_fixed_size_binary(kind))


def is_text(kind: pa.DataType) -> bool:
    """Strings of any width, in a dictionary or not."""
    import pyarrow.types as t

    if t.is_dictionary(kind):
        kind = kind.value_type
    return bool(t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind))


def holds_bytes(kind: pa.DataType) -> bool:
    """A struct with a field 'bytes' of bytes: how the hub stores images."""
    import pyarrow.types as t

    return bool(t.is_struct(kind)) and kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)


def pick(table: Table, chosen: str | None, candidates: Iterable[str], what: str, option: str) -> str:
    """The column that was chosen, or the only candidate. Raises BadInput, with the columns there are, for one that is not there and for several."""
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
    """Rows of a chunk as Python has them, one at a time."""
    for row in rows.tolist():
        value = chunk[row].as_py()
        yield value.get("bytes") if isinstance(value, dict) else value


def _features(metadata: Mapping[bytes, bytes] | None, name: str) -> dict[str, dict[str, Any]]:
    """What the `datasets` library wrote about the columns. {} where it did not."""
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text.decode("utf-8-sig"))["info"]["features"]
        return {str(column): kind for column, kind in features.items() if isinstance(kind, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadInput(f"expected the hub's description of columns in {name}, got metadata that are none; write the file again") from None


@contextmanager
def _opened(path: Path, repeated: Sequence[str] = ()) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with _explained(path):
        stream = open(path, "rb")
    with stream:
        with _explained(path):
            file = pq.ParquetFile(stream, read_dictionary=list(repeated))
        yield file


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """pyarrow has errors of its own, and raises Python's too."""
    try:
        yield
    except (BadInput, GeneratorExit):
        raise
    except Exception as error:
        raise _unreadable(path, first_line(error, 120)) from None


def _unreadable(path: Path, reason: str) -> BadInput:
    return BadInput(f"expected a whole parquet file, got {str(path)[:200]!r} that cannot be read ({reason}); copy it again")
