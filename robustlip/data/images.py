"""Images as tensors in [0, 1]: tables with an image and a label column, and the digits of scikit-learn.

Conversion of pixels v: 8 bits v/255, 16-bit greyscale v/65535, one bit 0 or 1, palettes to their colours. An alpha channel is dropped if it is
completely opaque. Images are rotated according to their EXIF orientation, as the `datasets` library does; of an animation the first frame is used.
Everything else (CMYK, transparency, 16-bit colour, floats) is refused.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from robustlip.data.dataset import Dataset, as_index, check_labels, choose_rows
from robustlip.data.labels import declared_names, integer_labels, label_columns, named_labels
from robustlip.data.tables import Table, holds_bytes, is_bytes, is_text, pick
from robustlip.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# The shape (C, H, W) and the number of classes of data sets with a known name.
KNOWN: dict[str, tuple[tuple[int, int, int], int]] = {"mnist": ((1, 28, 28), 10), "cifar10": ((3, 32, 32), 10)}
DIGITS_TRAIN = 1437  # of 1797: four fifths
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no other decoder is started
MAX_PIXELS = 2**26  # per image
MAX_VALUES = 2**28  # pixels × channels of all images that are loaded: 1 GiB as float32
MAX_EXTRA, MAX_BYTES_A_PIXEL = 2**22, 16  # a limit of the bytes of one encoded image: MAX_EXTRA, plus MAX_BYTES_A_PIXEL per pixel
MAX_SCANS = 200  # per JPEG
MAX_SCANNED = 2**32  # scans × pixels, summed over all images that are loaded
MAX_PROSE = 2**20  # decompressed bytes of the text chunks of a PNG
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "I;16": 1, "I;16B": 1, "I;16L": 1, "I": 1, "P": 3, "RGB": 3, "RGBA": 3}
_DEEP = ("I;16", "I;16B", "I;16L", "I")  # modes that have 16 bits; see _deep
_FORMAT_NAMES = "PNG, JPEG, WebP, BMP, GIF or TIFF"


def load_digits_split(split: str, limit: int | None, seed: int) -> Dataset:
    """The 1797 scanned digits of scikit-learn (UCI, 8 × 8, 16 grey levels), divided by 16: x (N, 1, 8, 8).

    scikit-learn does not define a split. Here: rows in the order RandomState(0).permutation(1797); 'train' is the first 1437, 'test' the
    other 360, each in ascending order. `index` is the row in that split. Raises BadInput for another split.
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


def table_to_dataset(
    table: Table,
    name: str,
    split: str,
    limit: int | None,
    seed: int,
    note: str = "",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    others: Callable[[], Iterable[Table]] = tuple,
) -> Dataset:
    """Decodes a table with one image and one label column: x (N, C, H, W) in [0, 1]; the top of this file defines the conversion.

    Labels are checked in every row, images in the rows that `limit` selects. The number of classes is that of the known name, or else the number
    of classes that the table declares, or else the largest label plus one. String labels are numbered in the order of code points, over this split
    and `others`, the other splits of the same set; their names are kept.
    Raises BadInput for missing or ambiguous columns, labels that are not integers in range, images that cannot be decoded, have
    an unsupported mode, differ in size, or have more than MAX_VALUES numbers in total.
    """
    label = pick(table, label_column, label_columns(table), "label", "--label-column")
    image = pick(table, image_column, _image_columns(table), "image", "--image-column")
    if not (is_bytes(table.types[image]) or holds_bytes(table.types[image])):
        raise BadInput(
            f"expected PNG bytes in the column {image!r} of {name}, got {str(table.types[image])[:100]}; store a struct with bytes, as the hub does"
        )
    if table.rows == 0:
        raise BadInput(f"expected at least one row in {name}, got none; give a file with samples")
    shape, classes = KNOWN.get(name, (None, None))
    names = declared_names(table, label)
    if is_text(table.types[label]):
        labels, names = named_labels(table, label, names, others)
    else:
        labels = integer_labels(table.chunks(label), name)
    declared = len(names) if names is not None else table.features.get(label, {}).get("num_classes")
    if classes is None:
        classes = declared if isinstance(declared, int) and not isinstance(declared, bool) and declared > 0 else int(labels.max()) + 1
    elif names is not None and len(names) != classes:
        raise BadInput(f"expected the {classes} classes of {name}, got the names of {len(names)}; store labels as integers from 0")
    check_labels(labels, classes, name)
    rows = choose_rows(len(labels), limit, seed)
    x = _pixels(zip(rows.tolist(), table.cells(image, rows), strict=True), len(rows), name, shape, table.features.get(image, {}).get("mode"))
    return Dataset(name, split, "image", x, labels[torch.from_numpy(rows)], as_index(rows), classes, None, note, names)


def _image_columns(table: Table) -> list[str]:
    """Columns with images: those that the hub's metadata declare, or else those with bytes."""
    kinds = {column: table.features.get(column, {}).get("_type") for column in table.types}
    found = [
        column for column, kind in table.types.items()
        if kinds[column] == "Image" or (kinds[column] is None and holds_bytes(kind)) or column in ("image", "img")
    ]  # fmt: skip
    return found or [column for column, kind in table.types.items() if is_bytes(kind)]


# ---- pixels


def _pixels(cells: Iterable[tuple[int, Any]], count: int, name: str, shape: tuple[int, int, int] | None, mode: str | None) -> Tensor:
    """float32 (N, C, H, W) in [0, 1] from `count` (row, encoded image), all of one shape (C, H, W). Sizes are checked before anything is decoded."""
    x: Tensor | None = None
    scanned = 0
    with _strictly():
        for i, (row, cell) in enumerate(cells):
            with _opened(cell, row, name) as picture:
                _check_size(picture, count, row, name, shape)
                scanned += _scans(picture, cell, row, name) * picture.size[0] * picture.size[1]
                if scanned > MAX_SCANNED:
                    raise BadInput(f"expected JPEG images with few scans in {name}, got too many scans up to row {row}; encode them again")
                pixels = _decoded(picture, row, name)  # (C, H, W) in [0, 1]
            if mode is not None:  # the hub's library converts images to this mode
                if mode not in ("L", "RGB") or (mode == "L" and len(pixels) == 3):
                    raise BadInput(f"expected images of {name} in mode {mode!r}, as in its metadata, got another in row {row}; convert them")
                pixels = np.repeat(pixels, 3, axis=0) if mode == "RGB" and len(pixels) == 1 else pixels
            found = (pixels.shape[0], pixels.shape[1], pixels.shape[2])
            shape = shape or found
            if found != shape:
                raise BadInput(
                    f"expected images of {name} with (channels, height, width) {tuple(shape)}, got {found} in row {row}; resize it or drop it"
                )
            x = torch.empty((count, *shape), dtype=torch.float32) if x is None else x
            x[i] = torch.from_numpy(pixels)
    assert x is not None  # an empty table was refused before
    return x


def _check_size(picture: Picture, count: int, row: int, name: str, shape: tuple[int, int, int] | None) -> None:
    """Checks the header, before memory is allocated: one image within MAX_PIXELS, all images within MAX_VALUES, and the size of the first image."""
    width, height = picture.size
    channels = _CHANNELS.get(picture.mode)
    if channels is None:
        raise BadInput(f"expected grey (L) or RGB images in {name}, got mode {picture.mode} in row {row}; convert it")
    if shape is not None and sorted((width, height)) != sorted(shape[1:]):  # rotated or not
        raise BadInput(
            f"expected images of {name} with (channels, height, width) {tuple(shape)}, got {(channels, height, width)} in row {row}; "
            f"resize it or drop it"
        )
    if width * height > MAX_PIXELS:
        raise BadInput(f"expected images of at most {MAX_PIXELS} pixels in {name}, got {width} × {height} in row {row}; make it smaller or drop it")
    if (total := count * width * height * channels) > MAX_VALUES:
        raise BadInput(
            f"expected at most {MAX_VALUES} numbers in all images of {name}, got {total} ({count} images of {width} × {height} × {channels}); "
            f"take fewer with --limit"
        )


def _scans(picture: Picture, cell: bytes, row: int, name: str) -> int:
    """The number of passes of a JPEG decoder over all pixels; 1 for other formats. Raises BadInput for too many bytes or scans."""
    most = MAX_EXTRA + MAX_BYTES_A_PIXEL * picture.size[0] * picture.size[1]
    if len(cell) > most:
        raise BadInput(f"expected at most {most} bytes for an image of its size in {name}, got {len(cell)} in row {row}; write it again")
    if cell[:2] != b"\xff\xd8":
        return 1
    # In the data of a scan 0xFF is followed by another byte; elsewhere, as in a colour profile, the pair occurs by chance once in 65,536 bytes.
    scans = cell.count(b"\xff\xda")
    if scans > MAX_SCANS + len(cell) // 2**15:
        raise BadInput(f"expected a JPEG of at most {MAX_SCANS} scans in {name}, got {scans} in row {row}; write it again")
    return max(1, scans)


@contextmanager
def _strictly() -> Iterator[None]:
    """Pillow's global settings inside the block: truncated images are errors, and warnings are not printed."""
    from PIL import ImageFile, PngImagePlugin

    lenient, prose = ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_MEMORY
    ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_MEMORY = False, min(prose, MAX_PROSE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_MEMORY = lenient, prose


@contextmanager
def _opened(cell: Any, row: int, name: str) -> Iterator[Picture]:
    """Opens an image and reads only its header. Errors of Pillow inside the block mean a broken image."""
    from io import BytesIO

    from PIL import Image

    if not isinstance(cell, bytes):
        raise BadInput(f"expected the bytes of an image in row {row} of {name}, got none; store the images in the file")
    if (size := _webp_size(cell)) is not None and size[0] * size[1] > MAX_PIXELS:  # its decoder allocates memory for all of it when it is opened
        raise BadInput(f"expected images of at most {MAX_PIXELS} pixels in {name}, got {size[0]} × {size[1]} in row {row}; shrink it or drop it")
    try:
        with Image.open(BytesIO(cell), formats=FORMATS) as picture:
            yield picture
    except BadInput:
        raise
    except Image.DecompressionBombError:
        raise BadInput(f"expected images of at most {MAX_PIXELS} pixels in {name}, got more in row {row}; make it smaller or drop it") from None
    except Exception:  # a decoder may raise anything on a broken file
        raise BadInput(
            f"expected an image ({_FORMAT_NAMES}) in row {row} of {name}, got {len(cell)} undecodable bytes; copy the file again or drop the row"
        ) from None


def _decoded(picture: Picture, row: int, name: str) -> np.ndarray:
    """float32 (C, H, W) in [0, 1], rotated as `datasets` does. Raises BadInput for an unsupported mode."""
    from PIL import ImageOps

    def refuse(got: str, remedy: str = "convert it") -> BadInput:
        return BadInput(f"expected grey (L) or RGB images in {name}, got {got} in row {row}; {remedy}")

    deep = _deep(picture)
    tags = getattr(picture, "tag_v2", {})  # for TIFF
    tile = (int(tags.get(322, 0)), int(tags.get(323, 0)))
    if tile[0] * tile[1] > MAX_PIXELS:
        raise BadInput(f"expected images of at most {MAX_PIXELS} pixels in {name}, got a tile of {tile[0]} × {tile[1]} in row {row}; write it again")
    if tags and any(kind != 1 for kind in np.atleast_1d(tags.get(339, 1))):
        raise refuse("a TIFF with signed or floating-point samples")
    if picture.mode == "I" and not deep:
        raise refuse("mode I with 32 bits")
    if deep and (picture.mode not in _DEEP or tags.get(262, 1) == 0):
        raise refuse("16 bits per channel, which Pillow reads as 8 bits or inverted", "convert it to 8 bits")
    picture.load()
    if picture.getexif().get(0x0112) is not None:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in _DEEP:
        values = np.asarray(picture).astype(np.float32)
        return values[None] / np.float32(65535.0)
    if picture.mode in ("LA", "RGBA") or "transparency" in picture.info:
        whole = picture.convert("RGBA")
        if whole.getchannel("A").getextrema() != (255, 255):
            raise refuse("transparency", "blend it with the background that the model was trained with")
        picture = whole.convert("RGB") if _CHANNELS[picture.mode] == 3 else picture.convert("L")
    elif picture.mode in ("1", "P"):
        picture = picture.convert({"1": "L", "P": "RGB"}[picture.mode])
    if picture.mode not in ("L", "RGB"):
        raise refuse(f"mode {picture.mode}")
    array = np.asarray(picture)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return array.astype(np.float32) / np.float32(255.0)


def _deep(picture: Picture) -> bool:
    """Whether the file has more than 8 bits per channel, which the mode alone does not say. Valid before the image is loaded."""
    if picture.format == "TIFF":
        return max((int(b) for b in np.atleast_1d(picture.tag_v2.get(258, 1))), default=1) > 8 and picture.mode != "F"  # type: ignore[attr-defined]
    raw = " ".join(str(tile[3]) for tile in getattr(picture, "tile", ()))
    return ";16" in raw or picture.mode.startswith("I;16")


def _webp_size(cell: bytes) -> tuple[int, int] | None:
    """(width, height) that the header of a WebP image states; None for another format."""
    if cell[:4] != b"RIFF" or cell[8:12] != b"WEBP" or len(cell) < 30:
        return None
    kind = cell[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(cell[24:27], "little"), 1 + int.from_bytes(cell[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(cell[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", cell[26:30])
    return width & 0x3FFF, height & 0x3FFF
