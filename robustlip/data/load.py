"""What a data specification means, and the three ways to load one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from robustlip.data import text as texts
from robustlip.data.dataset import Dataset, check_limit
from robustlip.data.folders import local_copies, split_files, splits_in
from robustlip.data.hub import HUB_NAMES, from_hub, from_parquet
from robustlip.data.images import load_digits_split, table_to_dataset
from robustlip.errors import BadInput, DataUnavailable
from robustlip.files import is_file
from robustlip.modes import undrawn

_FORMS = "digits, mnist, cifar10, tiny_shakespeare, page, a hub name (owner/name), or a path to a .parquet or .txt file"
_ALIASES = {repository: name for name, repository in HUB_NAMES.items()}
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TEXTS = ("tiny_shakespeare", "page")


@undrawn()
def load_data(
    spec: str,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    context: int | None = None,
    vocabulary: str | None = None,
) -> Dataset:
    """Samples with labels: images with their classes, or windows of text with the token that follows.

    spec: 'name' or 'name:split' (split 'test' where none is named). Names: digits, mnist, cifar10, tiny_shakespeare, page
    (text shipped with robustlip), a hub name 'owner/name' of an image data set, or a path: a .parquet file (one split, so
    no ':split') with an image and a label column, or a .txt file (UTF-8, first 90 % train, the rest test).
    Looked for in data_dir, then in the folder ROBUSTLIP_DATA, then on the hub.
    limit: at most so many samples, a random subset drawn by `seed` in the order of the source.
    context: tokens per window (64). vocabulary: the characters of ids 0, 1, …, as the model has them; default those of the
    whole text. Both are for text alone.

    Raises DataUnavailable when the set is in no folder and the hub is out of reach, BadInput for everything else.
    """
    name, split = parse_spec(spec)
    check_limit(limit)
    if is_text(name):
        text = _text(name, data_dir)
        default = texts.CHARACTERS if name == "page" else None
        return texts.windows(text, split or "test", vocabulary or default, context, limit, seed)
    if context is not None or vocabulary is not None:
        if context is not None:
            raise BadInput(f"expected no context for the images {name!r}, got {context}; leave it out")
        raise BadInput(f"expected a text for a model of characters, got the images {name!r}; name a text, 'page' or 'tiny_shakespeare'")
    if name == "digits":
        return load_digits_split(split or "test", limit, seed)
    if name.endswith(".parquet"):
        with from_parquet([name]) as table:
            return table_to_dataset(table, Path(name).stem, "all", limit, seed)
    return _images(name, split or "test", data_dir, limit, seed)


@undrawn()
def load_tokens(spec: str, *, data_dir: str | Path | None = None, vocabulary: str | None = None) -> tuple[Tensor, str, str]:
    """A whole split as one stream, for training a language model: token ids int64 (T,), vocabulary, note.

    spec, data_dir, vocabulary and errors as in `load_data`; the text names alone.
    """
    name, split = parse_spec(spec)
    if not is_text(name):
        raise BadInput(f"expected a text (tiny_shakespeare, page or a .txt file), got {name!r}; name one of them")
    text = _text(name, data_dir)
    vocabulary = vocabulary or (texts.CHARACTERS if name == "page" else text.vocabulary)
    return texts.encode(text.part(split or "test"), vocabulary, text.name), vocabulary, text.note


def load_text_or_page(
    spec: str = "tiny_shakespeare",
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    context: int | None = None,
    vocabulary: str | None = None,
) -> Dataset:
    """As `load_data`, or the page that robustlip ships (note 'shipped page') where that text cannot be had."""
    try:
        return load_data(spec, data_dir=data_dir, limit=limit, seed=seed, context=context, vocabulary=vocabulary)
    except DataUnavailable:
        return load_data("page", limit=limit, seed=seed, context=context, vocabulary=vocabulary)


def parse_spec(spec: str) -> tuple[str, str | None]:
    """(name, split or None) of 'name[:split]'; a path is checked to exist. Raises BadInput for what is none of the forms."""
    if not isinstance(spec, str) or not spec.strip():
        raise BadInput(f"expected data ({_FORMS}), got {spec!r}; name one of them")
    name, colon, split = spec.rpartition(":")
    # A split is one word: the colon of a drive letter or of a folder's name is followed by more.
    if not colon or is_file(Path(spec)) or not split.isidentifier():
        name, split = spec, ""
        if colon and spec.endswith(":"):
            raise BadInput(f"expected a split after the colon, got {spec!r}; write e.g. {spec}test")
    name = _ALIASES.get(name, name)
    if name.endswith((".parquet", ".txt")):
        if not is_file(Path(name)):
            raise BadInput(f"expected a file at {name!r}, got none there; correct the path")
        if split and name.endswith(".parquet"):
            raise BadInput(f"expected a parquet file without a split (one file is one split), got {spec!r}; write {name!r}")
    elif not _NAME.fullmatch(name):
        raise BadInput(f"expected data ({_FORMS}), got {spec!r}; name one of them")
    return name, split or None


def is_text(name: str) -> bool:
    return name in _TEXTS or name.endswith(".txt")


def _images(name: str, split: str, data_dir: str | Path | None, limit: int | None, seed: int) -> Dataset:
    present: list[str] = []
    for folder, note in local_copies(name, data_dir):
        if files := split_files(folder, split):
            with from_parquet([str(path) for path in files]) as table:
                return table_to_dataset(table, name, split, limit, seed, note)
        present += splits_in(folder)
    if present:
        raise BadInput(f"expected a split of {name} among {', '.join(sorted(set(present)))}, got {split!r}; name one of them")
    if name not in HUB_NAMES and "/" not in name:
        raise BadInput(f"expected data ({_FORMS}), got {name!r}; name one of them")
    return table_to_dataset(from_hub(name, split), name, split, limit, seed)


def _text(name: str, data_dir: str | Path | None) -> texts.Text:
    if name == "page":
        return texts.page()
    if name.endswith(".txt"):
        return texts.cut(Path(name).stem, texts.read_text(Path(name)))
    for folder, note in local_copies(name, data_dir):
        if text := _local_text(name, folder):
            return texts.Text(name, text.train, text.held_out, note or texts.shakespeare_note(text))
    text = _join(name, {split: _rows(table, name) for split, table in from_hub(name, None).items()})
    return texts.Text(name, text.train, text.held_out, texts.shakespeare_note(text))


def _local_text(name: str, folder: Path) -> texts.Text | None:
    """input.txt, or train.txt with validation.txt or test.txt, or the hub's parquet files of those splits."""
    if (folder / "input.txt").is_file():
        return texts.cut(name, texts.read_text(folder / "input.txt"))
    parts: dict[str, str] = {}
    for split in ("train", *texts.HELD_OUT):
        if (folder / f"{split}.txt").is_file():
            parts[split] = texts.read_text(folder / f"{split}.txt")
        elif files := split_files(folder, split):
            with from_parquet([str(path) for path in files]) as table:
                parts[split] = _rows(table, name)
    return _join(name, parts) if parts else None


def _join(name: str, parts: dict[str, str]) -> texts.Text:
    """The hub cuts what is held out in two; both halves, in order, are the 10 % that nanoGPT calls validation."""
    held_out = "".join(parts.get(split, "") for split in texts.HELD_OUT)
    if not parts.get("train") or not held_out:
        raise BadInput(f"expected {name} with a train split and a test or validation split, got {', '.join(parts) or 'none'}; add the missing file")
    return texts.Text(name, parts["train"], held_out)


def _rows(table: Any, name: str) -> str:
    if "text" not in table.features:
        raise BadInput(f"expected a column 'text' in {name}, got {', '.join(table.features)}; rename the column")
    return "".join(table["text"])
