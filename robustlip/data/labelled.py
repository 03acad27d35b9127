"""Texts with a class each: tables (.csv, .tsv, parquet) of a text and a label column, encoded as the model's tokenizer encodes whole texts.

Every text is by itself: with the tokenizer's marks of beginning and end, without padding (`robustlip.data.lengths`).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from robustlip.data.dataset import Dataset, as_index, check_labels, choose_rows
from robustlip.data.labels import declared_names, label_columns, named_labels, whole_labels
from robustlip.data.lengths import joined
from robustlip.data.subwords import Subwords
from robustlip.data.tables import MAX_ROWS, Table, is_text, pick
from robustlip.data.text import MAX_TEXT, encode
from robustlip.errors import BadInput, first_line
from robustlip.files import read_limited

if TYPE_CHECKING:
    import pyarrow as pa

TEXT_COLUMNS = ("text", "sentence")
MAX_TOKENS = 2**27  # texts × tokens of the longest: what is held at once
MAX_COLUMNS = 1_000


def is_separated(name: str, text_column: str | None = None) -> bool:
    """Whether a name is of a .tsv file, or of a .csv file whose first line names a column of texts. Other .csv files list properties (VNN-LIB)."""
    if not name.endswith(".csv"):
        return name.endswith(".tsv")
    try:
        with open(name, encoding="utf-8-sig", newline="") as file:
            head = next(csv.reader([file.readline(2**16)]), [])
    except (OSError, ValueError, csv.Error):
        return False
    return bool({*TEXT_COLUMNS, text_column} & {*head})


class Separated:
    """A .csv file (comma, quotes as in RFC 4180) or .tsv file (tab, no quotes) in UTF-8, its first line the names of columns; see `tables.Table`."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.name = path.stem
        content = read_limited(path, "a table", MAX_TEXT, "cut it")
        tabs = path.name.endswith(".tsv")
        quoting: Any = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        try:
            text = io.StringIO(content.decode("utf-8-sig"), newline="")
            lines = list(csv.reader(text, delimiter="\t" if tabs else ",", quoting=quoting, strict=True))
        except UnicodeDecodeError as error:
            raise BadInput(f"expected UTF-8 text, got byte {content[error.start]:#04x} at {error.start} of {path.name!r}; save it as UTF-8") from None
        except csv.Error as error:
            kind = "tabs" if tabs else "commas and quotes"
            raise BadInput(f"expected lines of {kind} in {path.name!r}, got others ({first_line(error)}); write it again") from None
        head, rows = (lines[0], [line for line in lines[1:] if line]) if lines else ([], [])
        if not 0 < len(head) <= MAX_COLUMNS or len(set(head)) != len(head):
            raise BadInput(f"expected a first line of different names of columns in {path.name!r}, got {str(head)[:100]}; add one")
        if len(rows) > MAX_ROWS:
            raise BadInput(f"expected at most {MAX_ROWS} rows in {self.name}, got {len(rows)}; cut the file")
        odd = next((i for i, row in enumerate(rows) if len(row) != len(head)), None)
        if odd is not None:
            raise BadInput(f"expected {len(head)} cells in each row of {self.name}, got {len(rows[odd])} in row {odd}; quote what holds a separator")
        self._columns = {name: [row[at] for row in rows] for at, name in enumerate(head)}
        self.types: dict[str, pa.DataType] = dict.fromkeys(head, pa.string())
        self.features: dict[str, dict[str, Any]] = {}
        self.rows = len(rows)

    def count(self, column: str) -> None:
        """Take a column for whole numbers where all of its cells are."""
        import pyarrow as pa

        if all(re.fullmatch(r"-?[0-9]{1,18}", cell) for cell in self._columns[column]):
            self.types[column] = pa.int64()

    def chunks(self, column: str) -> Iterator[pa.Array]:
        import pyarrow as pa

        cells = self._columns[column]
        yield pa.array(cells, pa.string()) if is_text(self.types[column]) else pa.array([int(cell) for cell in cells], pa.int64())

    def cells(self, column: str, rows: np.ndarray) -> Iterator[Any]:
        for row in rows.tolist():
            yield self._columns[column][row]


def labelled_texts(
    table: Table, name: str, split: str, limit: int | None, seed: int, vocabulary: str | Subwords | None, context: int | None, note: str = "", *,
    text_column: str | None = None, label_column: str | None = None,
) -> Dataset:  # fmt: skip
    """A table with one text and one label column, encoded: x int64 (N, T), NO_TOKEN behind the end of shorter texts, y int64 (N,).

    vocabulary: the model's tokenizer, or its characters. context: at most so many tokens a text, the rest is cut off as tokenizers do it; None: all.
    Labels are whole numbers, or names that the hub's metadata of the table or the model's own classes number.
    Raises BadInput for a model without a vocabulary, missing or ambiguous columns, a text of no token, and labels that nothing numbers.
    """
    if vocabulary is None:
        raise BadInput(f"expected a model with a tokenizer for the texts of {name}, got none; use hf:FOLDER with a tokenizer.json")
    if context is not None and (isinstance(context, bool) or not isinstance(context, int) or context < 1):
        raise BadInput(f"expected a context of at least 1 token, got {context!r}; give a positive integer")
    label = pick(table, label_column, label_columns(table), "label", "--label-column")
    column = pick(table, text_column, [c for c in table.types if c in TEXT_COLUMNS], "text", "--text-column")
    if not is_text(table.types[column]):
        raise BadInput(f"expected text in the column {column!r} of {name}, got {str(table.types[column])[:100]}; name one by --text-column")
    if table.rows == 0:
        raise BadInput(f"expected at least one row in {name}, got none; give a file with samples")
    if isinstance(table, Separated):
        table.count(label)
    own = vocabulary.classes if isinstance(vocabulary, Subwords) else None
    names = declared_names(table, label) or own
    if is_text(table.types[label]):
        if names is None:
            raise BadInput(f"expected labels of {name} that are numbers, or names that the model's config.json has, got names; number them from 0")
        labels, _ = named_labels(table, label, names, tuple)
    else:
        labels = whole_labels(table.chunks(label), name)
    classes = int(labels.max()) + 1 if names is None else len(names)
    check_labels(labels, classes, name)
    rows = choose_rows(len(labels), limit, seed)
    texts, characters = [], 0
    for row, text in zip(rows.tolist(), table.cells(column, rows), strict=True):
        if not isinstance(text, str):
            raise BadInput(f"expected text in row {row} of {name}, got none; fill or drop it")
        characters += len(text)
        if characters > MAX_TEXT:
            raise BadInput(f"expected at most {MAX_TEXT} characters in {name}, got more; give a --limit")
        ids = vocabulary.whole(text, context) if isinstance(vocabulary, Subwords) else encode(text, vocabulary, name)[:context]
        if not len(ids):
            raise BadInput(f"expected at least one token in every text of {name}, got none in row {row}; drop that row")
        texts.append(ids)
    if len(texts) * max(map(len, texts)) > MAX_TOKENS:
        raise BadInput(f"expected texts of at most {MAX_TOKENS} tokens in all, the longest for each, in {name}, got more; give a --context")
    return Dataset(
        name, split, "text", joined(texts), labels[torch.from_numpy(rows)], as_index(rows), classes, vocabulary, note, names
    )  # fmt: skip
