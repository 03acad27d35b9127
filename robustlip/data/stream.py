"""Text that does not fit into memory: documents read one after the other, as one endless stream of tokens with random access.

The stream consists of the documents after the first `held_out`, in the order of their files, each followed by its end token; after the last one
it starts again. Token i is always the same, so a batch can be a function of the step. A reading position is a small dictionary
(`state_at`), from which reading continues without reading earlier documents.
"""

from __future__ import annotations

import copy
import gzip
import io
import itertools
import json
from codecs import BOM_UTF8
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustlip.data.folders import local_copies, splits_of, walk
from robustlip.data.hub import quiet, stream_from_hub
from robustlip.data.tables import Parquet, is_text
from robustlip.data.tokenizers import Tokenizer
from robustlip.errors import BadInput, DataUnavailable, first_line
from robustlip.files import is_file, is_folder

GROUP = 64  # documents that are tokenised in one call
_CHECKED = 16  # tokens that are compared to recognise a document
_READERS = {".parquet": "parquet", ".jsonl": "json", ".jsonl.gz": "json", ".jsonl.zst": "json"}
_DEPTH = 8  # depth of subfolders that are searched
_USUAL = {"train", "test", "validation", "valid", "val", "dev"}  # names of splits: a file with such a name belongs to that split only
MAX_LINE = 2**26  # bytes of one line of a .jsonl file


def local_files(name: str, subset: str | None, data_dir: str | Path | None, split: str | None = None) -> tuple[list[Path], str] | None:
    """(files sorted by path, note) of a local data set; None if there is none. Paths are literal.

    name: a .parquet or .jsonl[.gz, .zst] file, a folder, or the name of a folder in data_dir or ROBUSTLIP_DATA. subset: a subfolder.
    split: if the files are named by splits (see `folders`), the complete files of this split; otherwise all files.
    Raises BadInput for a path that does not exist and for a folder without such files.
    """
    path = Path(name)
    if _kind(path) is not None:
        if not is_file(path):
            raise BadInput(f"expected a file at {name[:200]!r}, got none there; correct the path")
        return [path], ""
    folders = [(path, "")] if is_folder(path) else local_copies(name, data_dir)
    for folder, note in folders:
        inside = folder / subset if subset else folder
        found = [(names, file) for names, file in walk(inside, _DEPTH) if _kind(file) is not None] if is_folder(inside) else []
        kinds = {_kind(file) for _, file in found}
        if len(kinds) > 1:
            raise BadInput(f"expected parquet files or jsonl files in {str(inside)!r}, got both; name a folder with one kind")
        if split is not None and any(_names_a_split(names, file) for names, file in found):
            splits = splits_of(inside, None, split, tuple(_READERS))
            if split not in splits:
                raise BadInput(f"expected a split among {', '.join(sorted(splits))[:200]} in {str(inside)!r}, got {split!r}; name one of them")
            return splits[split].files(f"split {split!r}"), note
        if found:
            return [file for _, file in found], note
    if is_folder(path):
        raise BadInput(f"expected .parquet or .jsonl files in {str(path / (subset or ''))!r}, got none; name a folder that has them")
    return None


def _names_a_split(names: tuple[str, ...], file: Path) -> bool:
    stem = file.name[: -len(_ending(file))]
    return "-of-" in stem or stem in _USUAL or (names[-1:] != () and names[-1] in _USUAL and len(stem) == 4 and stem.isdigit())


def _ending(path: Path) -> str:
    return next((ending for ending in _READERS if path.name.endswith(ending)), "")


def _kind(path: Path) -> str | None:
    return _READERS.get(_ending(path))


class _Files:
    """Documents of local files. A position is a file and a row in it; earlier rows are not read (.jsonl: read but not parsed)."""

    def __init__(self, files: list[Path], name: str, column: str) -> None:
        self.files, self.name, self.column = files, name, column
        if _kind(files[0]) == "parquet":
            self.columns = list(Parquet(files[:1], name).types)
        else:
            try:
                self.columns = list(next(self._lines(0, 0, whole=True), ((0, 0), {}))[1])
            except BadInput:
                raise
            except Exception as error:  # of the file system or of a decompressor
                raise BadInput(f"expected lines of JSON in {files[0].name}, got an error ({first_line(error, 100)}); check the file") from None

    def rows(self, state: Any) -> Iterator[tuple[Any, Any]]:
        """(position of the next document, document) from `state` on. Raises BadInput for a position in other data."""
        try:
            file, row = state["file"], state["row"]
            if not (type(file) is type(row) is int and 0 <= file < len(self.files) and row >= 0):
                raise ValueError
        except (LookupError, TypeError, ValueError):
            raise BadInput(
                f"expected a position in {self.name}, got one in other files or from another version of robustlip; restore them, or start again in "
                f"another folder"
            ) from None
        for at in range(file, len(self.files)):
            read = self._table if _kind(self.files[at]) == "parquet" else self._lines
            for (number, following), value in read(at, row if at == file else 0):
                yield {"file": number, "row": following}, value

    def _table(self, at: int, row: int) -> Iterator[tuple[tuple[int, int], Any]]:
        table = Parquet([self.files[at]], self.name)
        if self.column not in table.types or not is_text(table.types[self.column]):
            raise BadInput(f"expected text in the column {self.column!r} of {self.files[at].name}, got none; name another text_column")
        for i, value in enumerate(table.cells(self.column, np.arange(row, table.rows)), row):
            yield (at, i + 1), value

    def _lines(self, at: int, row: int, whole: bool = False) -> Iterator[tuple[tuple[int, int], Any]]:
        path = self.files[at]
        with _unpacked(path) as stream:
            number = 0
            while line := stream.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise BadInput(f"expected lines of at most {MAX_LINE} bytes in {path.name}, got a longer one ({number + 1}); cut that document")
                number += 1
                line = line.removeprefix(BOM_UTF8) if number == 1 else line
                if number <= row or not line.strip():
                    continue
                try:
                    document = json.loads(line.decode("utf-8"))
                    if not isinstance(document, dict):
                        raise ValueError("no object")
                except (ValueError, RecursionError) as error:
                    raise BadInput(
                        f"expected a JSON object in UTF-8 in line {number} of {path.name}, got something else ({first_line(error, 80)}); correct it"
                    ) from None
                yield (at, number), document if whole else document.get(self.column)


def _unpacked(path: Path) -> Any:
    """The bytes of a .jsonl file, decompressed while they are read."""
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if not path.name.endswith(".zst"):
        return open(path, "rb")
    try:
        import zstandard
    except ImportError:
        raise BadInput(f"expected the package zstandard for {path.name}, got no such package; install it, or decompress the file") from None
    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True, closefd=True))


class _Hub:
    """Documents of the hub, by `datasets` in streaming mode; a position is a state of that library."""

    def __init__(self, name: str, subset: str | None, split: str, column: str) -> None:
        self.name, self.column = name, column
        self._data: Any = stream_from_hub(name, subset, split)
        self.columns = self._data.column_names
        if self.columns is not None and column in self.columns:
            self._data = self._data.select_columns([column])
        self.start: Any = self._data.state_dict()

    def rows(self, state: Any) -> Iterator[tuple[Any, Any]]:
        try:
            with quiet():
                self._data.load_state_dict(copy.deepcopy(state))
                rows = iter(self._data)
                first = next(rows, None)
        except (LookupError, TypeError, AttributeError) as error:  # the library indexes into the state
            raise BadInput(
                f"expected a position in {self.name}, got one in other files or from another version of datasets ({type(error).__name__}); "
                f"restore them, or start again in another folder"
            ) from None
        # datasets knows its position only after it has read a row.
        for row in () if first is None else itertools.chain([first], rows):
            yield self._data.state_dict(), row.get(self.column)  # the state is a copy


class Documents:
    """The documents of one split, one after the other.

    name, subset, data_dir, split: see `local_files`; data that is not found locally is read from the hub (subset: its configuration). column: the
    text column. note: what tables have to show about the source. Raises DataUnavailable and BadInput as `load_data` does.
    """

    def __init__(
        self, name: str, subset: str | None = None, *, split: str = "train", column: str = "text", data_dir: str | Path | None = None
    ) -> None:
        self.name, self.column = name, column
        local = local_files(name, subset, data_dir, split)
        self._source: _Files | _Hub
        if local is None:
            self.note = ""
            self._source = _Hub(name, subset, split, column)
            self._start = self._source.start
        else:
            files, self.note = local
            self._source, self._start = _Files(files, name, column), {"file": 0, "row": 0}
        if self._source.columns is not None and column not in self._source.columns:
            raise BadInput(f"expected a column {column!r} in {name}, got {', '.join(self._source.columns)[:300] or 'none'}; name one as text_column")
        self._at: Any = self._start
        self._rows: Iterator[tuple[Any, Any]] | None = None

    def seek(self, state: Any | None) -> None:
        """Continue at the position `state`, or at the first document for None."""
        self._at = self._start if state is None else state
        self._rows = None

    def state(self) -> Any:
        """The position of the next document: plain numbers and strings."""
        return self._at

    def next(self) -> str | None:
        """The next document, None after the last.

        Raises BadInput for a row without text and for a position in other data, DataUnavailable if reading fails.
        """
        try:
            if self._rows is None:
                self._rows = self._source.rows(self._at)
            row = next(self._rows, None)
        except BadInput:
            raise
        except Exception as error:  # of the file system, of a decompressor, or of the HTTP client of datasets
            raise DataUnavailable(
                f"expected the next document of {self.name}, got an error ({type(error).__name__}: {str(error)[:100]}); "
                f"run again when it can be read; training resumes from its last state"
            ) from error
        if row is None:
            return None
        self._at, text = row
        if not isinstance(text, str):
            raise BadInput(f"expected text in the column {self.column!r} of {self.name}, got {type(text).__name__}; name another text_column")
        return text


@dataclass(frozen=True)
class _Document:
    """A tokenised document. first: stream position of its first token. document: its number in the source, from 0. state: the position before."""

    first: int
    document: int
    epoch: int
    state: Any
    ids: np.ndarray

    @property
    def end(self) -> int:
        return self.first + len(self.ids)


class TokenStream:
    """Documents as the endless stream of tokens that the top of this file defines.

    make: opens the source; each call opens it again. held_out: the number of documents at its start that form `held_out_tokens`, not the stream.
    """

    def __init__(self, make: Callable[[], Documents], tokenizer: Tokenizer, held_out: int) -> None:
        self._make, self.tokenizer, self.held_out = make, tokenizer, held_out
        self._documents = make()
        self.note = self._documents.note
        self._rewind()

    def held_out_tokens(self) -> np.ndarray:
        """int32 (T,): the first `held_out` documents. Raises BadInput if there are no further documents."""
        documents, texts = self._make(), list[str]()
        while len(texts) < self.held_out:
            texts.append(self._text(documents.next()))
        self._text(documents.next())
        return np.concatenate(self.tokenizer.encode(texts))

    def window(self, start: int, count: int) -> np.ndarray:
        """int32 (count,): tokens start … start + count − 1 of the stream; start ≥ 0, count ≥ 1. Ascending starts read each document once."""
        if start < (self._tokenised[0].first if self._tokenised else self._front):
            self._rewind()
        self._forget(start)
        while self._front < start + count:
            self._read()
            self._forget(start)
        joined = np.concatenate([piece.ids for piece in self._tokenised])
        at = start - self._tokenised[0].first
        return joined[at : at + count]

    def state_at(self, start: int) -> dict[str, Any]:
        """The position of token `start`, as JSON; `start` lies in the last window or directly after it. See `restore`."""
        piece = next((piece for piece in self._tokenised if piece.first <= start < piece.end), None)
        if piece is None:
            self.window(start, 1)
            piece = self._tokenised[0]
        position: dict[str, Any] = {"token": piece.first, "document": piece.document, "offset": start - piece.first, "epoch": piece.epoch}
        return position | {"begins": piece.ids[:_CHECKED].tolist(), "reader": piece.state}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at a `state_at`. Raises BadInput if the document at that position has changed."""
        self._documents.seek(state["reader"])
        self._tokenised: deque[_Document] = deque()
        self._front, self._document, self._epoch = int(state["token"]), int(state["document"]), int(state["epoch"])
        self._read(1)
        if self._tokenised[0].document != state["document"] or self._tokenised[0].ids[:_CHECKED].tolist() != state["begins"]:
            raise BadInput(
                f"expected document {state['document']} of {self._documents.name} as it was when the run was saved, got another; "
                f"restore the files, or start again in another folder"
            )

    def _forget(self, start: int) -> None:
        while self._tokenised and self._tokenised[0].end <= start:
            self._tokenised.popleft()

    def _rewind(self) -> None:
        self._documents.seek(None)
        self._tokenised = deque()
        self._front = self._document = self._epoch = 0

    def _read(self, most: int = GROUP) -> None:
        """Tokenise the next documents: at least one, at most `most`."""
        found: list[tuple[int, int, Any, str]] = []
        while len(found) < most:
            state, text = self._documents.state(), self._documents.next()
            if text is None:
                if self._document <= self.held_out:
                    self._text(None)
                self._documents.seek(None)
                self._document, self._epoch = 0, self._epoch + 1
                continue
            if self._document >= self.held_out:
                found.append((self._document, self._epoch, state, text))
            self._document += 1
        for (document, epoch, state, _), ids in zip(found, self.tokenizer.encode([text for *_, text in found]), strict=True):
            self._tokenised.append(_Document(self._front, document, epoch, state, ids))
            self._front += len(ids)

    def _text(self, text: str | None) -> str:
        if text is None:
            raise BadInput(
                f"expected more than {self.held_out} documents in {self._documents.name}, got no more; lower held_out or name more files"
            )
        return text
