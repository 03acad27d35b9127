"""Text that does not fit in memory: documents read one after the other, as one endless stream of tokens that any position can be asked of.

The stream is the documents behind the first `held_out`, in the order of their files, each with its end token, and again from the start when
they are over. Token i of it is the same whenever it is asked for, so a batch can be a function of the step; where reading stands is a small
dictionary (`state_at`), and reading goes on from it without the documents before.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustlip.data.folders import local_copies
from robustlip.data.hub import quiet, stream_from_hub
from robustlip.data.tokenizers import Tokenizer
from robustlip.errors import BadInput, DataUnavailable, first_line

GROUP = 64  # documents that are tokenised at once
_CHECKED = 16  # tokens by which a position recognises its document
_READERS = {".parquet": "parquet", ".jsonl": "json", ".jsonl.gz": "json", ".jsonl.zst": "json"}


def local_files(name: str, subset: str | None, data_dir: str | Path | None) -> tuple[list[Path], str] | None:
    """(files in order of their path, note) of a data set that lies here; None when it does not.

    name: a .parquet or .jsonl[.gz, .zst] file, a folder, or a name that data_dir or ROBUSTLIP_DATA has a folder for. subset: a folder in there.
    Raises BadInput for a path that does not exist and for a folder without such files.
    """
    path = Path(name)
    if _kind(path) is not None:
        if not path.is_file():
            raise BadInput(f"expected a file at {name!r}, got none there; correct the path")
        return [path], ""
    folders = [(path, "")] if path.is_dir() else local_copies(name, data_dir)
    for folder, note in folders:
        inside = folder / subset if subset else folder
        found = sorted(file for file in inside.rglob("*") if _kind(file) is not None) if inside.is_dir() else []
        kinds = {_kind(file) for file in found}
        if len(kinds) > 1:
            raise BadInput(f"expected parquet files or jsonl files in {str(inside)!r}, got both; name a folder with one kind")
        if found:
            return found, note
    if path.is_dir():
        raise BadInput(f"expected .parquet or .jsonl files in {str(path / (subset or ''))!r}, got none; name a folder that has them")
    return None


def _kind(path: Path) -> str | None:
    return next((reader for ending, reader in _READERS.items() if path.name.endswith(ending)), None)


class Documents:
    """The documents of one split, one after the other, by `datasets` in streaming mode.

    name, subset, data_dir: see `local_files`; what lies nowhere here is read from the hub (subset: its configuration). column: of the text.
    note: what a table must say of the source. Raises DataUnavailable and BadInput as `load_data` does.
    """

    def __init__(
        self, name: str, subset: str | None = None, *, split: str = "train", column: str = "text", data_dir: str | Path | None = None
    ) -> None:
        self.name, self.column = name, column
        local = local_files(name, subset, data_dir)
        if local is None:
            self.note = ""
            self._data: Any = stream_from_hub(name, subset, split)
        else:
            from datasets import load_dataset

            files, self.note = local
            reader = str(_kind(files[0]))
            try:
                with quiet():
                    self._data = load_dataset(reader, data_files={"rows": [str(file) for file in files]}, split="rows", streaming=True)
            except Exception as error:  # of pyarrow, of a decompressor, or of datasets itself
                raise BadInput(
                    f"expected {reader} files that datasets reads in {name}, got an error ({first_line(error)}); check the files"
                ) from error
        columns = self._data.column_names
        if columns is not None:
            if column not in columns:
                raise BadInput(f"expected a column {column!r} in {name}, got {', '.join(columns)}; name one of them as text_column")
            self._data = self._data.select_columns([column])
        self._start: Any = self._data.state_dict()
        self._at = self._start
        self._rows: Iterator[Any] | None = None

    def seek(self, state: Any | None) -> None:
        """Go to where `state` was read, or to the first document for None."""
        # Kept here: datasets itself says where it stands only once it has read a row.
        self._at = self._start if state is None else state
        self._rows = None

    def state(self) -> Any:
        """Where the next document is: plain numbers and strings."""
        return self._at

    def next(self) -> str | None:
        """The next document, None behind the last.

        Raises BadInput for a row without text and for a position of something else, DataUnavailable when reading fails.
        """
        try:
            if self._rows is None:
                self._rows = self._reopened()
            row = next(self._rows, None)
            self._at = self._data.state_dict()  # a copy
        except BadInput:
            raise
        except Exception as error:  # of the file system, of pyarrow, or of whichever HTTP client datasets uses
            raise DataUnavailable(
                f"expected the next document of {self.name}, got an error ({type(error).__name__}: {str(error)[:100]}); "
                f"start again when it can be read, a run goes on from its last state"
            ) from error
        if row is None:
            return None
        text = row.get(self.column)
        if not isinstance(text, str):
            raise BadInput(f"expected text in the column {self.column!r} of {self.name}, got {type(text).__name__}; name another text_column")
        return text


    def _reopened(self) -> Iterator[Any]:
        """Rows from the position on, the first of them read. Raises BadInput for a position of something else."""
        try:
            with quiet():
                self._data.load_state_dict(copy.deepcopy(self._at))
                rows = iter(self._data)
                first = next(rows, None)
        except (LookupError, TypeError, AttributeError) as error:  # it indexes into what it is given
            raise BadInput(
                f"expected a position in {self.name}, got one of other files or another version of datasets ({type(error).__name__}); "
                f"restore them, or start again in another folder"
            ) from None
        return rows if first is None else itertools.chain([first], rows)


@dataclass(frozen=True)
class _Piece:
    """One tokenised document. first: index of its first token in the stream. document: its number in the source, from 0. state: in front of it."""

    first: int
    document: int
    epoch: int
    state: Any
    ids: np.ndarray

    @property
    def end(self) -> int:
        return self.first + len(self.ids)


class TokenStream:
    """Documents as the endless stream of tokens that the top of this file describes.

    make: opens the source, anew at every call. held_out: documents at its start that are not in the stream but in `held_out_tokens`.
    """

    def __init__(self, make: Callable[[], Documents], tokenizer: Tokenizer, held_out: int) -> None:
        self._make, self.tokenizer, self.held_out = make, tokenizer, held_out
        self._documents = make()
        self.note = self._documents.note
        self._rewind()

    def held_out_tokens(self) -> np.ndarray:
        """int32 (T,): the first `held_out` documents. Raises BadInput when there are not more than those."""
        documents, texts = self._make(), list[str]()
        while len(texts) < self.held_out:
            texts.append(self._text(documents.next()))
        self._text(documents.next())
        return np.concatenate(self.tokenizer.encode(texts))

    def window(self, start: int, count: int) -> np.ndarray:
        """int32 (count,): tokens start … start + count − 1 of the stream, start ≥ 0, count ≥ 1. Ascending starts are read once."""
        if start < (self._pieces[0].first if self._pieces else self._front):
            self._rewind()
        self._forget(start)
        while self._front < start + count:
            self._read()
            self._forget(start)
        joined = np.concatenate([piece.ids for piece in self._pieces])
        at = start - self._pieces[0].first
        return joined[at : at + count]

    def state_at(self, start: int) -> dict[str, Any]:
        """Where token `start` is, as JSON: of the last window, or the first token behind it. See `restore`."""
        piece = next((piece for piece in self._pieces if piece.first <= start < piece.end), None)
        if piece is None:
            self.window(start, 1)
            piece = self._pieces[0]
        told: dict[str, Any] = {"token": piece.first, "document": piece.document, "offset": start - piece.first, "epoch": piece.epoch}
        return told | {"begins": piece.ids[:_CHECKED].tolist(), "reader": piece.state}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state_at`. Raises BadInput when the document there is another than the one that it names."""
        self._documents.seek(state["reader"])
        self._pieces: deque[_Piece] = deque()
        self._front, self._document, self._epoch = int(state["token"]), int(state["document"]), int(state["epoch"])
        self._read(1)
        if self._pieces[0].document != state["document"] or self._pieces[0].ids[:_CHECKED].tolist() != state["begins"]:
            raise BadInput(
                f"expected document {state['document']} of {self._documents.name} as it was when the run was saved, got another; "
                f"restore the files, or start again in another folder"
            )

    def _forget(self, start: int) -> None:
        while self._pieces and self._pieces[0].end <= start:
            self._pieces.popleft()

    def _rewind(self) -> None:
        self._documents.seek(None)
        self._pieces = deque()
        self._front = self._document = self._epoch = 0

    def _read(self, most: int = GROUP) -> None:
        """Tokenise the next documents, at most so many and at least one."""
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
            self._pieces.append(_Piece(self._front, document, epoch, state, ids))
            self._front += len(ids)

    def _text(self, text: str | None) -> str:
        if text is None:
            raise BadInput(
                f"expected more than {self.held_out} documents in {self._documents.name}, got no more; lower held_out or name more files"
            )
        return text
