"""Images: tables with an image and a label column, and the scans inside scikit-learn, as tensors in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlip.data.dataset import Dataset, as_index, check_labels, choose_rows
from robustlip.errors import BadInput

# What the files of a known name must hold: (C, H, W) and the number of classes.
KNOWN: dict[str, tuple[tuple[int, int, int], int]] = {"mnist": ((1, 28, 28), 10), "cifar10": ((3, 32, 32), 10)}
DIGITS_TRAIN = 1437  # of 1797: four fifths
_CHANNELS = {"L": 1, "RGB": 3}
_CONVERT = {"1": "L", "P": "RGB"}  # lossless; every other mode loses something and is refused


def load_digits_split(split: str, limit: int | None, seed: int) -> Dataset:
    """The 1797 scanned digits of scikit-learn (UCI, 8 × 8, 16 grey levels), divided by 16: x (N, 1, 8, 8).

    scikit-learn has no split. Ours: rows in the order RandomState(0).permutation(1797); 'train' the first 1437, 'test' the
    other 360, each in ascending order. `index` counts rows of that split. Raises BadInput for another split.
    """
    if split not in ("train", "test"):
        raise BadInput(f"expected digits:train or digits:test, got the split {split!r}; name one of the two")
    from sklearn.datasets import load_digits

    source = load_digits()
    order = np.random.RandomState(0).permutation(len(source.target))
    part = np.sort(order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:])
    rows = choose_rows(len(part), limit, seed)
    x = torch.from_numpy((source.images[part[rows]] / 16.0).astype(np.float32))[:, None]  # (N, 1, 8, 8)
    y = torch.from_numpy(source.target[part[rows]].astype(np.int64))
    return Dataset("digits", split, "image", x, y, as_index(rows), classes=10)


def table_to_dataset(table: Any, name: str, split: str, limit: int | None, seed: int, note: str = "") -> Dataset:
    """A `datasets.Dataset` with one image and one label column, decoded: x (N, C, H, W) in [0, 1].

    Labels are checked in every row, images in the rows that `limit` keeps. Classes: those of the known name, else those
    the table declares, else the largest label plus one.
    Raises BadInput for missing columns, labels that are not whole numbers in range, images that cannot be decoded, have
    an unusual mode, or differ in size.
    """
    import datasets

    image, label = _columns(table, name)
    feature = table.features[label]
    labels = _labels(table[label], name)
    shape, classes = KNOWN.get(name, (None, None))
    if classes is None:
        classes = feature.num_classes if isinstance(feature, datasets.ClassLabel) else int(labels.max()) + 1
    check_labels(labels, classes, name)
    rows = choose_rows(len(labels), limit, seed)
    # Decoded here and not by the library, so that a broken image is reported with its row.
    cells = table.select_columns([image]).select(rows).cast_column(image, datasets.Image(decode=False))[image]
    x = _pixels(list(cells), rows, name, shape)
    return Dataset(name, split, "image", x, labels[torch.from_numpy(rows)], as_index(rows), classes, None, note)


def _columns(table: Any, name: str) -> tuple[str, str]:
    import datasets

    def pick(usual: tuple[str, ...], kind: type, what: str) -> str:
        for column in usual:
            if column in table.features:
                return column
        typed = [column for column, feature in table.features.items() if isinstance(feature, kind)]
        if len(typed) == 1:
            return typed[0]
        raise BadInput(f"expected one {what} column in {name} ({' or '.join(usual)}), got the columns {', '.join(table.features)}; rename the column")

    image = pick(("image", "img"), datasets.Image, "image")
    label = pick(("label", "labels"), datasets.ClassLabel, "label")
    feature = table.features[image]
    encoded = isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
    if not encoded and getattr(feature, "dtype", None) not in ("binary", "large_binary"):
        raise BadInput(f"expected PNG bytes in the column {image!r} of {name}, got {feature}; store images as the hub does: a struct with bytes")
    if len(table) == 0:
        raise BadInput(f"expected at least one row in {name}, got none; give a file with samples")
    return image, label


def _labels(values: Sequence[Any], name: str) -> Tensor:
    """int64 (N,). Whole numbers only: a float or a string is a label that somebody would have to guess."""
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
            raise BadInput(f"expected whole numbers as labels of {name}, got {value!r} in row {row}; store labels as integers from 0")
    return torch.tensor(list(values), dtype=torch.int64)


def _pixels(cells: list[Any], rows: np.ndarray, name: str, shape: tuple[int, int, int] | None) -> Tensor:
    """float32 (N, C, H, W) in [0, 1] from encoded images, all of one shape (C, H, W)."""
    x: Tensor | None = None
    for i, (row, cell) in enumerate(zip(rows.tolist(), cells, strict=True)):
        pixels = _decode(cell, row, name)  # (H, W) or (H, W, 3)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise BadInput(
                f"expected images of {name} with (channels, height, width) {tuple(shape)}, got {pixels.shape} in row {row}; "
                f"resize it or drop it"
            )
        if x is None:
            x = torch.empty((len(rows), *shape), dtype=torch.uint8)
        x[i] = torch.from_numpy(pixels.copy())
    assert x is not None  # _columns refuses an empty table
    return x.to(torch.float32) / 255.0


def _decode(cell: Any, row: int, name: str) -> np.ndarray:
    from io import BytesIO

    from PIL import Image

    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        raise BadInput(f"expected the bytes of an image in row {row} of {name}, got none; embed the images in the file")
    try:
        with Image.open(BytesIO(content)) as image:
            image.load()
            decoded = image.convert(_CONVERT[image.mode]) if image.mode in _CONVERT else image.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise BadInput(
            f"expected an image in row {row} of {name}, got {len(content)} bytes that do not decode; copy the file again or drop the row"
        ) from None
    if decoded.mode not in _CHANNELS:
        raise BadInput(f"expected grey (L) or RGB images in {name}, got mode {decoded.mode} in row {row}; convert it")
    return np.asarray(decoded)
