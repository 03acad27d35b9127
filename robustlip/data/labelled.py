"""Texts with one class each: tables (.csv, .tsv, parquet) with a text and a label column, encoded by the model's tokenizer. And sentences with one
class for each word: .conll files.

Every text is encoded separately: with the tokenizer's tokens for its beginning and end, without padding (`robustlip.data.lengths`).
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
from robustlip.data.labels import declared_names, integer_labels, label_columns, named_labels
from robustlip.data.lengths import NO_LABEL, joined
from robustlip.data.subwords import Subwords
from robustlip.data.tables import MAX_ROWS, Table, is_text, pick
from robustlip.data.text import MAX_TEXT, encode, read_text
from robustlip.errors import BadInput, first_line
from robustlip.files import read_limited

if TYPE_CHECKING:
    import pyarrow as pa

TEXT_COLUMNS = ("text", "sentence")
MAX_TOKENS = 2**27  # number of texts × tokens of the longest text
MAX_COLUMNS = 1_000


def is_separated(name: str, text_column: str | None = None) -> bool:
    """Whether a name is a .tsv file, or a .csv file whose first line names a text column. Other .csv files list properties (VNN-LIB)."""
    if not name.endswith(".csv"):
        return name.endswith(".tsv")
    try:
        with open(name, encoding="utf-8-sig", newline="") as file:
            head = next(csv.reader([file.readline(2**16)]), [])
    except (OSError, ValueError, csv.Error):
        return False
    return bool({*TEXT_COLUMNS, text_column} & {*head})


class Separated:
    """A .csv file (commas, quotes as in RFC 4180) or .tsv file (tabs, no quotes) in UTF-8 with column names in the first line; see `tables.Table`."""

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
            raise BadInput(f"expected lines with {kind} in {path.name!r}, got others ({first_line(error)}); write it again") from None
        head, rows = (lines[0], [line for line in lines[1:] if line]) if lines else ([], [])
        if not 0 < len(head) <= MAX_COLUMNS or len(set(head)) != len(head):
            raise BadInput(f"expected a first line of distinct column names in {path.name!r}, got {str(head)[:100]}; add one")
        if len(rows) > MAX_ROWS:
            raise BadInput(f"expected at most {MAX_ROWS} rows in {self.name}, got {len(rows)}; split the file")
        odd = next((i for i, row in enumerate(rows) if len(row) != len(head)), None)
        if odd is not None:
            raise BadInput(f"expected {len(head)} cells in each row of {self.name}, got {len(rows[odd])} in row {odd}; quote cells with a separator")
        self._columns = {name: [row[at] for row in rows] for at, name in enumerate(head)}
        self.types: dict[str, pa.DataType] = dict.fromkeys(head, pa.string())
        self.features: dict[str, dict[str, Any]] = {}
        self.rows = len(rows)

    def count(self, column: str) -> None:
        """Read a column as integers if all its cells are integers."""
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
    """Encodes a table with one text and one label column: x int64 (N, T), filled with NO_TOKEN after shorter texts, y int64 (N,).

    vocabulary: the model's tokenizer, or its characters. context: maximum number of tokens per text; longer texts are truncated as the tokenizer does
    it; None: no limit. Labels are integers, or names that the table's hub metadata or the model's classes number.
    Raises BadInput for a model without a vocabulary, missing or ambiguous columns, a text without tokens, and label names without a number.
    """
    if vocabulary is None:
        raise BadInput(f"expected a model with a tokenizer for the texts of {name}, got none; use hf:FOLDER with a tokenizer.json")
    check_context(context)
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
            raise BadInput(f"expected integer labels of {name}, or class names in config.json, got other names; number them from 0")
        labels, _ = named_labels(table, label, names, tuple)
    else:
        labels = integer_labels(table.chunks(label), name)
    classes = int(labels.max()) + 1 if names is None else len(names)
    check_labels(labels, classes, name)
    rows = choose_rows(len(labels), limit, seed)
    texts, characters = [], 0
    for row, text in zip(rows.tolist(), table.cells(column, rows), strict=True):
        if not isinstance(text, str):
            raise BadInput(f"expected text in row {row} of {name}, got none; add it or drop the row")
        characters += len(text)
        if characters > MAX_TEXT:
            raise BadInput(f"expected at most {MAX_TEXT} characters in {name}, got more; use --limit")
        ids = vocabulary.whole(text, context) if isinstance(vocabulary, Subwords) else encode(text, vocabulary, name)[:context]
        if not len(ids):
            raise BadInput(f"expected at least one token in every text of {name}, got none in row {row}; drop that row")
        texts.append(ids)
    if len(texts) * max(map(len, texts)) > MAX_TOKENS:
        raise BadInput(f"expected at most {MAX_TOKENS} tokens (texts × longest text) in {name}, got more; use --context")
    return Dataset(
        name, split, "text", joined(texts), labels[torch.from_numpy(rows)], as_index(rows), classes, vocabulary, note, names
    )  # fmt: skip


def labelled_words(path: Path, limit: int | None, seed: int, vocabulary: str | Subwords | None, context: int | None) -> Dataset:
    """The sentences of a .conll file with a label for each word: x int64 (N, T), NO_TOKEN behind the end, y int64 (N, T), else NO_LABEL.

    A line holds a word first and its label last, with blanks or tabs between; an empty line ends a sentence; lines of -DOCSTART- are left out. The
    first token of a word has its label. vocabulary, context: as in `labelled_texts`. Labels are the names of the model's classes, or their numbers.
    """
    name = path.stem
    if not isinstance(vocabulary, Subwords):
        raise BadInput(f"expected a model with a tokenizer for the words of {name}, got none; use hf:FOLDER with a tokenizer.json")
    check_context(context)
    sentences = _sentences(path)
    rows = choose_rows(len(sentences), limit, seed)
    known = {tag: i for i, tag in enumerate(vocabulary.classes or ())}
    texts, labels = [], []
    for row in rows.tolist():
        words, tags = zip(*sentences[row], strict=True)
        ids, begins = vocabulary.of_words(list(words), context)
        texts.append(ids)
        labels.append(torch.tensor([NO_LABEL if word is None else _number(tags[word], known, row, name) for word in begins]))
        if not bool((labels[-1] != NO_LABEL).any()):
            raise BadInput(f"expected a word in every sentence of {name} within the context, got none in sentence {row}; raise the context")
    x = joined(texts)
    if x.numel() > MAX_TOKENS:
        raise BadInput(f"expected texts of at most {MAX_TOKENS} tokens in all, the longest for each, in {name}, got more; give a --context")
    y = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=NO_LABEL)
    classes = len(vocabulary.classes) if vocabulary.classes else int(y.max()) + 1
    return Dataset(name, "all", "text", x, y, as_index(rows), classes, vocabulary, "", vocabulary.classes)


def _number(tag: str, known: dict[str, int], row: int, name: str) -> int:
    if tag in known:
        return known[tag]
    if tag.isascii() and tag.isdigit() and len(tag) < 10:
        return int(tag)
    raise BadInput(f"expected labels of {name} among the model's classes ({', '.join(known)[:200]}), got {tag[:60]!r} in sentence {row}; correct it")


def _sentences(path: Path) -> list[list[tuple[str, str]]]:
    """(word, label) of each word, sentence by sentence."""
    found: list[list[tuple[str, str]]] = [[]]
    for at, line in enumerate(read_text(path).split("\n")):
        cells = line.split()
        if not cells or cells[0] == "-DOCSTART-":
            found += [[]] if found[-1] else []
        elif len(cells) < 2:
            raise BadInput(f"expected a word and its label in each line of {path.name!r}, got {line[:60]!r} in line {at + 1}; add the label")
        else:
            found[-1].append((cells[0], cells[-1]))
    found = [sentence for sentence in found if sentence]
    if not found:
        raise BadInput(f"expected at least one sentence in {path.name!r}, got none; give a file with words and labels")
    return found


def check_context(context: int | None) -> None:
    """Raises BadInput for a number of tokens that is none."""
    if context is not None and (isinstance(context, bool) or not isinstance(context, int) or context < 1):
        raise BadInput(f"expected a context of at least 1 token, got {context!r}; give a positive integer")
