"""The meaning of a data specification, and the three functions that load one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from robustlip.data import text as texts
from robustlip.data.dataset import Dataset, as_index, check_limit, choose_rows
from robustlip.data.folders import Split, local_copies, split_files, splits_of
from robustlip.data.hub import HUB_NAMES, from_hub
from robustlip.data.images import load_digits_split, table_to_dataset
from robustlip.data.labelled import Separated, is_separated, labelled_texts, labelled_words
from robustlip.data.subwords import Subwords
from robustlip.data.tables import HubTable, Parquet, Table, pick
from robustlip.data.tables import is_text as column_of_text
from robustlip.data.vnnlib import BOXES, boxes_as_samples
from robustlip.errors import BadInput, DataUnavailable
from robustlip.files import is_file
from robustlip.modes import random_state_kept
from robustlip.plugins import added

_FORMS = "digits, mnist, cifar10, tiny_shakespeare, page, a hub name (owner/name), or a .parquet, .txt, .tsv, .csv, .conll or .vnnlib file"
_ALIASES = {repository: name for name, repository in HUB_NAMES.items()}
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TEXTS = ("tiny_shakespeare", "page")
WORDS = ".conll"  # sentences with one class for each word
# Files with only one split.
FILES = (".parquet", ".tsv", WORDS, *BOXES)
OPTIONS = ("subset", "image_column", "label_column", "text_column")  # configuration and columns; certificates record them


@random_state_kept()
def load_data(
    spec: str,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    context: int | None = None,
    vocabulary: str | Subwords | None = None,
    subset: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
) -> Dataset:
    """Samples with labels: images or texts with their classes, or windows of text with the token that follows.

    spec: 'name' or 'name:split' (default split: 'test'). Names: digits, mnist, cifar10, tiny_shakespeare, page
    (text that is part of robustlip), a hub name 'owner/name' of an image data set, or a path: a .parquet file (one split, so
    no ':split') with an image and a label column, a .txt file (UTF-8, the first 90 % train, the rest test), a .csv or .tsv file of texts and their
    classes, a .conll file of words and their classes, or a .vnnlib file or an instances.csv of properties that require a class in a box
    (`robustlip.data.vnnlib.boxes_as_samples`).
    The data is searched in data_dir, then in the folder ROBUSTLIP_DATA, then on the hub.
    limit: maximum number of samples, a random subset drawn with `seed`, in the order of the source.
    context: tokens per window (default 64); for texts with classes the maximum number of tokens per text (default: all). vocabulary: the
    characters of ids 0, 1, … or the tokenizer of the model; by default the characters of the whole text. Both are for text only.
    subset: the configuration, if the set has several. image_column, label_column: names of the columns; needed if the usual ones
    (image, img; label, labels; those that the hub's metadata declare) are missing or ambiguous. text_column: reads the set as text,
    the concatenation of the rows of this column ('text' for tiny_shakespeare). text_column and label_column: each row is a text with a class.

    The global random states of torch, numpy and Python are not changed.
    Raises DataUnavailable if the set is in no folder and the hub cannot be reached, BadInput for everything else.
    """
    options = dict(zip(OPTIONS, (subset, image_column, label_column, text_column), strict=True))
    for option, value in options.items():
        if value is not None and (not isinstance(value, str) or not value):
            raise BadInput(f"expected a name as {option}, got {value!r}; give one, or none")
    given = {option: value for option, value in options.items() if value is not None}
    return replace(_load(spec, data_dir, limit, seed, context, vocabulary, options), options=given)


def chosen(source: Any) -> dict[str, str]:
    """The OPTIONS in a policy, in a pair of a suite or in the data of a certificate, as arguments of load_data."""
    return {option: value for option in OPTIONS if (value := getattr(source, option)) is not None}


def sources() -> dict[str, Callable[..., Dataset]]:
    """Data sets of other packages by name (`robustlip.plugins`): callables (split, data_dir) → all samples of that split."""
    return added("robustlip.data", (*HUB_NAMES, *_TEXTS, "digits"), callable, "a callable (split, data_dir) that returns a Dataset")


def _of_others(name: str, split: str, data_dir: str | Path | None, limit: int | None, seed: int) -> Dataset:
    data = sources()[name](split, data_dir)
    if not isinstance(data, Dataset):
        raise BadInput(f"expected the entry point {name!r} to return a robustlip.data.Dataset, got {type(data).__name__}; correct that package")
    rows = as_index(choose_rows(len(data), limit, seed))
    return replace(data, name=name, split=split, x=data.x[rows], y=data.y[rows], index=data.index[rows])


def _load(
    spec: str, data_dir: str | Path | None, limit: int | None, seed: int, context: int | None, vocabulary: str | Subwords | None,
    columns: Mapping[str, str | None],
) -> Dataset:  # fmt: skip
    subset, image_column, label_column, text_column = (columns[option] for option in OPTIONS)
    name, split = parse_spec(spec)
    check_limit(limit)
    if name in sources():
        _refuse_unused(name, columns, OPTIONS, "the data set of another package")
        return _of_others(name, split or "test", data_dir, limit, seed)
    if name.endswith(WORDS):
        _refuse_unused(name, columns, OPTIONS, "the words")
        return labelled_words(Path(name), limit, seed, vocabulary, context)
    if is_separated(name, text_column):
        _refuse_unused(name, columns, ("subset", "image_column"), "the texts")
        table: Table = Separated(Path(name))
        columns_of: Any = {"text_column": text_column, "label_column": label_column}
        return labelled_texts(table, Path(name).stem, "all", limit, seed, vocabulary, context, **columns_of)
    if text_column is not None and label_column is not None and not name.endswith(".txt") and name not in _TEXTS:
        _refuse_unused(name, columns, ("image_column", *(("subset",) if name.endswith(".parquet") else ())), "the texts")
        return _labelled(name, split, data_dir, limit, seed, vocabulary, context, subset, text_column, label_column)
    if is_text(name, text_column):
        _refuse_columns(name, columns)
        text = _text(name, data_dir, subset, text_column)
        default = texts.CHARACTERS if name == "page" else None
        return texts.windows(text, split or "test", vocabulary or default, context, limit, seed)
    if context is not None or vocabulary is not None:
        if context is not None:
            raise BadInput(f"expected no context for the images {name!r}, got {context}; leave it out")
        raise BadInput(f"expected text for a model of characters, got the images {name!r}; name a text, 'page' or 'tiny_shakespeare'")
    if name == "digits":
        _refuse_unused(name, columns, ("subset", "image_column", "label_column"), "the images")
        return load_digits_split(split or "test", limit, seed)
    if name.endswith(BOXES):
        _refuse_unused(name, columns, OPTIONS, "the properties")
        return boxes_as_samples(Path(name), limit, seed)
    if name.endswith(".parquet"):
        _refuse_unused(name, columns, ("subset",), "the file with one split")
        stem = Path(name).stem
        table = Parquet([Path(name)], stem)
        return table_to_dataset(table, stem, "all", limit, seed, image_column=image_column, label_column=label_column)
    return _images(name, split or "test", data_dir, limit, seed, subset, image_column, label_column)


def _refuse_unused(name: str, columns: Mapping[str, str | None], unused: tuple[str, ...], what: str) -> None:
    for option in unused:
        if columns[option] is not None:
            raise BadInput(f"expected no {option} for {what} {name!r}, got {columns[option]!r}; leave it out")


def _refuse_columns(name: str, columns: Mapping[str, str | None]) -> None:
    """Refuses options that text does not have."""
    _refuse_unused(name, columns, ("image_column", "label_column"), "the text")
    if name.endswith(".txt") or name == "page":
        _refuse_unused(name, columns, ("subset", "text_column"), "the text")
    elif name.endswith(".parquet"):
        _refuse_unused(name, columns, ("subset",), "the file with one split")


@random_state_kept()
def load_tokens(
    spec: str, *, data_dir: str | Path | None = None, vocabulary: str | None = None, subset: str | None = None, text_column: str | None = None
) -> tuple[Tensor, str, str]:
    """A whole split as one stream, for training a language model: token ids int64 (T,), vocabulary, note.

    spec, data_dir, vocabulary, subset, text_column and errors as in `load_data`; only names of texts are allowed.
    """
    name, split = parse_spec(spec)
    if not is_text(name, text_column):
        raise BadInput(f"expected a text (tiny_shakespeare, page or a .txt file), got {name!r}; name one of them")
    _refuse_columns(name, dict(zip(OPTIONS, (subset, None, None, text_column), strict=True)))
    text = _text(name, data_dir, subset, text_column)
    vocabulary = vocabulary or (texts.CHARACTERS if name == "page" else text.vocabulary)
    return texts.encode(text.part(split or "test"), vocabulary, text.name), vocabulary, text.note


def load_text_or_page(spec: str = "tiny_shakespeare", *, data_dir: str | Path | None = None, **options: Any) -> Dataset:
    """As `load_data`; if that text is not available, the page that is part of robustlip (note 'shipped page')."""
    try:
        return load_data(spec, data_dir=data_dir, **options)
    except DataUnavailable:
        return load_data("page", **{key: options[key] for key in ("limit", "seed", "context", "vocabulary") if key in options})


def parse_spec(spec: str) -> tuple[str, str | None]:
    """(name, split or None) of 'name[:split]'; a path is checked to exist. Raises BadInput for any other form."""
    if not isinstance(spec, str) or not spec.strip():
        raise BadInput(f"expected data ({_FORMS}), got {spec!r}; name one of them")
    name, colon, split = spec.rpartition(":")
    # A split is one word; the colon of a drive letter or of a folder's name is followed by more.
    if not colon or is_file(Path(spec)) or not split.isidentifier():
        name, split = spec, ""
        if colon and spec.endswith(":"):
            raise BadInput(f"expected a split after the colon, got {spec!r}; write e.g. {spec}test")
    name = _ALIASES.get(name, name)
    if name.endswith((".txt", *FILES)):
        if not is_file(Path(name)):
            raise BadInput(f"expected a file at {name[:200]!r}, got none there; correct the path")
        if split and not name.endswith(".txt"):
            raise BadInput(f"expected a file without a split (one file is one split), got {spec[:200]!r}; write {name[:200]!r}")
    elif not _NAME.fullmatch(name):
        raise BadInput(f"expected data ({_FORMS}), got {spec[:200]!r}; name one of them")
    return name, split or None


def is_text(name: str, text_column: str | None = None) -> bool:
    """Whether a name means text: the name of a text, or any name with a text column."""
    return name in _TEXTS or name.endswith((".txt", WORDS)) or text_column is not None or is_separated(name)


def _labelled(
    name: str, split: str | None, data_dir: str | Path | None, limit: int | None, seed: int, vocabulary: str | Subwords | None,
    context: int | None, subset: str | None, text: str, label: str,
) -> Dataset:  # fmt: skip
    """The texts and classes of a parquet file, or of one split of a data set."""
    of: Any = {"text_column": text, "label_column": label}
    if name.endswith(".parquet"):
        stem = Path(name).stem
        return labelled_texts(Parquet([Path(name)], stem), stem, "all", limit, seed, vocabulary, context, **of)
    split = split or "test"
    table, note = _of_split(name, split, data_dir, subset)
    return labelled_texts(table, name, split, limit, seed, vocabulary, context, note, **of)


def _of_split(name: str, split: str, data_dir: str | Path | None, subset: str | None) -> tuple[Table, str]:
    """The table of one split, of a local copy or of the hub, and the note for tables."""
    for folder, note in local_copies(name, data_dir):
        if split in (found := splits_of(folder, subset, split)):
            return Parquet(found[split].files(f"split {split!r}"), name), note
    if name not in HUB_NAMES and "/" not in name:
        raise BadInput(f"expected data ({_FORMS}), got {name!r}; name one of them")
    return HubTable(from_hub(name, split, subset), name), ""


def _images(
    name: str, split: str, data_dir: str | Path | None, limit: int | None, seed: int, subset: str | None, image: str | None, label: str | None
) -> Dataset:
    present: list[str] = []
    for folder, note in local_copies(name, data_dir):
        found = splits_of(folder, subset, split)
        if split in found:
            table = Parquet(found[split].files(f"split {split!r}"), name)

            def others(found: dict[str, Split] = found) -> Iterator[Table]:
                for other, files in found.items():
                    if other != split:
                        yield Parquet(files.files(f"split {other!r}"), name)

            return table_to_dataset(table, name, split, limit, seed, note, image_column=image, label_column=label, others=others)
        present += found
    if present:
        raise BadInput(f"expected a split of {name} among {', '.join(sorted(set(present)))[:300]}, got {split!r}; name one of them")
    if name not in HUB_NAMES and "/" not in name:
        raise BadInput(f"expected data ({_FORMS}), got {name!r}; name one of them")
    brought = HubTable(from_hub(name, split, subset), name)

    def on_hub() -> Iterator[Table]:
        yield from (HubTable(data, name) for data in from_hub(name, None, subset).values())

    return table_to_dataset(brought, name, split, limit, seed, image_column=image, label_column=label, others=on_hub)


def _text(name: str, data_dir: str | Path | None, subset: str | None = None, column: str | None = None) -> texts.Text:
    if name == "page":
        return texts.page()
    if name.endswith(".txt"):
        return texts.cut(Path(name).stem, texts.read_text(Path(name)))
    if name.endswith(".parquet"):
        return texts.cut(Path(name).stem, _rows(Parquet([Path(name)], Path(name).stem), column))
    known = name in _TEXTS
    for folder, note in local_copies(name, data_dir):
        if text := _local_text(name, folder, subset, column):
            return texts.Text(name, text.train, text.held_out, note or (texts.shakespeare_note(text) if known else ""))
    if not known and name not in HUB_NAMES and "/" not in name:
        raise BadInput(f"expected data ({_FORMS}), got {name!r}; name one of them")
    text = _join(name, {split: _rows(HubTable(table, name), column) for split, table in from_hub(name, None, subset).items()})
    return texts.Text(name, text.train, text.held_out, texts.shakespeare_note(text) if known else "")


def _local_text(name: str, folder: Path, subset: str | None, column: str | None) -> texts.Text | None:
    """input.txt, or train.txt with validation.txt or test.txt, or the hub's parquet files of those splits."""
    if column is None and subset is None and (folder / "input.txt").is_file():
        return texts.cut(name, texts.read_text(folder / "input.txt"))
    parts: dict[str, str] = {}
    for split in ("train", *texts.HELD_OUT):
        if column is None and subset is None and (folder / f"{split}.txt").is_file():
            parts[split] = texts.read_text(folder / f"{split}.txt")
        elif files := split_files(folder, split, subset):
            parts[split] = _rows(Parquet(files, name), column)
    return _join(name, parts) if parts else None


def _join(name: str, parts: dict[str, str]) -> texts.Text:
    """The hub stores the held-out text in two parts; both together, in order, are the 10 % that nanoGPT uses for validation."""
    held_out = "".join(parts.get(split, "") for split in texts.HELD_OUT)
    if not parts.get("train") or not held_out:
        raise BadInput(f"expected {name} with a train split and a test or validation split, got {', '.join(parts) or 'none'}; add the missing file")
    return texts.Text(name, parts["train"], held_out)


def _rows(table: Table, column: str | None) -> str:
    """The concatenation of the rows of a text column."""
    column = pick(table, column, [c for c in table.types if c == "text"], "text", "--text-column")
    if not column_of_text(table.types[column]):
        raise BadInput(f"expected text in the column {column!r} of {table.name}, got {str(table.types[column])[:100]}; name one by --text-column")
    parts: list[str] = []
    size = 0
    for row, value in enumerate(table.cells(column, np.arange(table.rows))):
        if value is None:
            raise BadInput(f"expected text in row {row} of {table.name}, got none; add it or drop the row")
        size += len(value)
        if size > texts.MAX_TEXT:
            raise BadInput(f"expected a text of at most {texts.MAX_TEXT} characters in {table.name}, got more; cut it or train with streaming = true")
        parts.append(value)
    return "".join(parts)
