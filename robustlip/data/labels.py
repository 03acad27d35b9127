"""The labels of a table: integers from 0, or strings that are numbered."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from robustlip.data.tables import Table, is_text
from robustlip.errors import BadInput

if TYPE_CHECKING:
    import pyarrow as pa


def label_columns(table: Table) -> list[str]:
    """The columns that can be the label column."""
    return [column for column in table.types if column in ("label", "labels") or table.features.get(column, {}).get("_type") == "ClassLabel"]


def declared_names(table: Table, label: str) -> tuple[str, ...] | None:
    """The class names in the hub's metadata, in the order of the labels; None if there are none."""
    feature = table.features.get(label, {})
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    if names is None:
        return None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names) or len(set(names)) != len(names):
        raise BadInput(f"expected distinct class names in the column {label!r} of {table.name}, got others; write the file's metadata again")
    return tuple(names)


def integer_labels(chunks: Iterable[pa.Array], name: str) -> Tensor:
    """Labels as int64 (N,). Only integers are accepted: a float, a boolean or a missing label would have to be guessed."""
    import pyarrow as pa
    import pyarrow.types as t

    parts: list[np.ndarray] = []
    start = 0
    for chunk in chunks:
        if t.is_dictionary(chunk.type):
            chunk = chunk.dictionary_decode()
        row: int | None = None
        if chunk.null_count:
            row = int(np.flatnonzero(chunk.is_null().to_numpy(zero_copy_only=False))[0])
        elif not t.is_integer(chunk.type):
            row = 0
        if row is None:
            try:
                parts.append(chunk.cast(pa.int64()).to_numpy(zero_copy_only=False))
            except pa.ArrowInvalid:  # above 2⁶³ − 1
                row = int(np.argmax(chunk.to_numpy(zero_copy_only=False)))
        if row is not None:
            value = str(chunk[row].as_py())[:60] if t.is_primitive(chunk.type) or chunk.null_count else str(chunk.type)[:60]
            raise BadInput(f"expected integers as labels of {name}, got {value} in row {start + row}; store labels as integers from 0")
        start += len(chunk)
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))


def named_labels(
    table: Table, label: str, names: tuple[str, ...] | None, others: Callable[[], Iterable[Table]]
) -> tuple[Tensor, tuple[str, ...]]:
    """String labels as int64 (N,), and the names of classes 0, 1, …: the declared ones, or else all that occur, sorted."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def distinct(of: Table) -> set[str]:
        found: set[str] = set()
        start = 0
        for chunk in of.chunks(label):
            if chunk.null_count:
                row = start + int(np.flatnonzero(chunk.is_null().to_numpy(zero_copy_only=False))[0])
                raise BadInput(f"expected a class name as label of {of.name}, got none in row {row}; add it or drop the row")
            found.update(pc.unique(chunk).to_pylist())
            start += len(chunk)
        return found

    here = distinct(table)
    if names is None:
        for other in others():
            if label in other.types and is_text(other.types[label]):
                here |= distinct(other)
        names = tuple(sorted(here))
    elif unknown := sorted(here - set(names)):
        raise BadInput(f"expected labels of {table.name} among its {len(names)} declared classes, got {unknown[0][:60]!r}; correct that label")
    order = pa.array(names, pa.large_string())
    parts = [pc.index_in(_plain(chunk), order).to_numpy(zero_copy_only=False) for chunk in table.chunks(label)]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)), names


def _plain(chunk: pa.Array) -> pa.Array:
    import pyarrow as pa
    import pyarrow.types as t

    return (chunk.dictionary_decode() if t.is_dictionary(chunk.type) else chunk).cast(pa.large_string())
