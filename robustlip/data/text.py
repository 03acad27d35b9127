"""Text: characters to token ids, splits of a text, windows with the token that follows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustlip.data.dataset import Dataset, as_index, choose_rows
from robustlip.data.subwords import Subwords
from robustlip.errors import BadInput
from robustlip.files import read_limited

# The 65 characters of tiny_shakespeare, sorted: ids 0 to 64.
CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SHAKESPEARE_LENGTH = 1_115_394
CONTEXT = 64
TRAIN_SHARE = 0.9  # nanoGPT, data/shakespeare_char/prepare.py
_ENCODED = 2**22  # characters per part
HELD_OUT = ("validation", "test")
MAX_TEXT = 2**27  # bytes of a file, or characters of a table: a text is in memory as a whole
PAGE_NOTE = "shipped page"


@dataclass(frozen=True)
class Text:
    """A text in two parts: train for training, held_out for validation and test."""

    name: str
    train: str
    held_out: str
    note: str = ""

    def part(self, split: str) -> str:
        """Raises BadInput for a split other than train, validation and test (the last two are the same text)."""
        if split == "train" and self.train:
            return self.train
        if split in HELD_OUT:
            return self.held_out
        names = ", ".join((*(["train"] if self.train else []), *HELD_OUT))
        raise BadInput(f"expected a split of {self.name} among {names}, got {split!r}; name one of them")

    @property
    def vocabulary(self) -> str:
        """The distinct characters of both parts, sorted."""
        return "".join(sorted(set(self.train) | set(self.held_out)))


def cut(name: str, text: str, note: str = "") -> Text:
    """Splits a text: the first 90 % for training, the rest held out, as nanoGPT splits tiny_shakespeare."""
    at = int(len(text) * TRAIN_SHARE)
    return Text(name, text[:at], text[at:], note)


def shakespeare_note(text: Text) -> str:
    """A note if the text is not the complete tiny_shakespeare, because results on another text are not comparable."""
    length = len(text.train) + len(text.held_out)
    return "" if length == SHAKESPEARE_LENGTH else f"{length} of {SHAKESPEARE_LENGTH} characters"


def read_text(path: Path) -> str:
    """The content of a UTF-8 file; all line ends become newlines. Raises BadInput for another encoding or an empty file."""
    content = read_limited(path, "a text file", MAX_TEXT, "cut it, or train with streaming = true")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise BadInput(f"expected UTF-8 text, got byte {byte:#04x} at {error.start} of {str(path)!r}; save it as UTF-8") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text:
        raise BadInput(f"expected text, got the empty file {str(path)!r}; name another file")
    return text


@cache
def page() -> Text:
    """The page of text that is part of robustlip: an original dialogue in the 65 characters, all of it held out (no model is trained on it)."""
    return Text("page", "", files("robustlip").joinpath("page.txt").read_text(encoding="utf-8"), PAGE_NOTE)


def encode(text: str, vocabulary: str | Subwords, name: str = "the text") -> Tensor:
    """Token ids int64 (T,): the position of each character in `vocabulary`, or the ids of its tokenizer.

    Raises BadInput for a character outside it, and for a vocabulary that is empty or repeats a character.
    """
    if isinstance(vocabulary, Subwords):
        return vocabulary.encode(text)
    if not vocabulary or len(set(vocabulary)) != len(vocabulary):
        raise BadInput(f"expected a vocabulary of distinct characters, got {vocabulary!r}; give the one that the model was trained with")
    known = np.frombuffer(vocabulary.encode("utf-32-le"), dtype=np.uint32)
    order = np.argsort(known)
    ids = np.empty(len(text), dtype=np.int64)
    for start in range(0, len(text), _ENCODED):  # in parts: intermediate results need five times the memory of the ids
        points = np.frombuffer(text[start : start + _ENCODED].encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        part = ids[start : start + _ENCODED]
        part[:] = order[np.searchsorted(known[order], points).clip(max=len(known) - 1)]
        wrong = np.flatnonzero(known[part] != points)
        if not len(wrong):
            continue
        first = start + int(wrong[0])
        raise BadInput(
            f"expected {name} in the {len(vocabulary)} characters of the vocabulary, got {text[first]!r} at position {first}; "
            f"replace that character or use a model whose vocabulary has it"
        )
    return torch.from_numpy(ids)


def decode(ids: Tensor, vocabulary: str | Subwords) -> str:
    """The text of token ids int64 (T,): the inverse of `encode`."""
    if isinstance(vocabulary, Subwords):
        return vocabulary.decode(ids)
    return "".join(vocabulary[i] for i in ids.tolist())


def windows(text: Text, split: str, vocabulary: str | Subwords | None, context: int | None, limit: int | None, seed: int) -> Dataset:
    """Windows of `context` tokens (64 for None) that do not overlap, each labelled with the token that follows it.

    x: int64 (N, context), y: int64 (N,), index: offset of the window in the split. `limit` selects a random subset of the
    windows drawn with `seed`, in text order. Raises BadInput for a split shorter than one window and its label.
    """
    context = CONTEXT if context is None else context
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise BadInput(f"expected a context of at least 1 token, got {context!r}; give a positive integer")
    vocabulary = text.vocabulary if vocabulary is None else vocabulary
    ids = encode(text.part(split), vocabulary, text.name)
    count = (len(ids) - 1) // context
    if count < 1:
        unit = "tokens" if isinstance(vocabulary, Subwords) else "characters"
        raise BadInput(f"expected at least {context + 1} {unit} in {text.name}:{split}, got {len(ids)}; give a longer text or a smaller context")
    offsets = choose_rows(count, limit, seed) * context
    x = ids.unfold(0, context, context)[:count][torch.from_numpy(offsets // context)].clone()  # (N, context)
    y = ids[torch.from_numpy(offsets + context)]
    return Dataset(text.name, split, "text", x, y, as_index(offsets), len(vocabulary), vocabulary, text.note)
