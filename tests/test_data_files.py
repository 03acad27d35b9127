"""Data files: which files form a split, the values of pixels and labels, and hostile files."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFile

import robustlip
from robustlip.data import Dataset, images, load_data, load_tokens, tables, text
from robustlip.errors import BadInput


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBUSTLIP_DATA", raising=False)


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def grey(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    return encoded(Image.new("L", size, value))


def put(path: Path, first: int = 0, count: int = 2, **columns: object) -> Path:
    """A parquet file of `count` images of the grey levels first, first + 1, … with labels 0, 1, 0, 1, …"""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": [{"bytes": grey(first + i), "path": None} for i in range(count)], "label": [i % 2 for i in range(count)], **columns}
    pq.write_table(pa.table(rows), path)
    return path


def levels(data: Dataset) -> list[int]:
    return (data.x[:, 0, 0, 0] * 255).round().int().tolist()


def refused(spec: object, **options: object) -> str:
    with pytest.raises(BadInput) as error:
        load_data(spec, **options)  # type: ignore[arg-type]
    message = str(error.value)
    assert message.startswith("expected ") and ", got " in message and "; " in message and "\n" not in message and len(message) < 1000, message
    return message


# ---- a path is a path

ODD = ["run [12]", "a*", "b?c", "{x,y}", "with space", "ünï", "a,b", "hash#", "per%20cent", "colon:test", "::", "!(x)", "~", "'\"", "hf:", "a::b"]


@pytest.mark.parametrize("odd", ODD)
def test_every_character_of_a_path_is_literal(tmp_path: Path, odd: str) -> None:
    """Decoys stand where a pattern would look."""
    for i, decoy in enumerate(("run 1", "run 2", "aa", "bxc", "x", "y", "with")):
        put(tmp_path / decoy / "x.parquet", 100 + i)
        put(tmp_path / decoy / "set" / "test.parquet", 100 + i)
    path = put(tmp_path / odd / "x.parquet", 7)
    assert levels(load_data(str(path))) == [7, 8]
    put(tmp_path / odd / "set" / "test.parquet", 9)
    assert levels(load_data("set", data_dir=tmp_path / odd)) == [9, 10]
    named = put(tmp_path / "names" / f"{odd}.parquet", 11)
    assert levels(load_data(str(named))) == [11, 12]
    words = tmp_path / odd / "words.txt"
    words.write_text("ab" * 100)
    assert load_data(str(words), context=4).vocabulary == "ab"


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "loop.parquet").symlink_to(tmp_path / "loop.parquet")
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "nowhere")
    for name in ("folder.parquet", "loop.parquet", "gone.parquet", "x\0.parquet", "y" * 5000 + ".parquet", "*.parquet"):
        refused(str(tmp_path / name))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.parquet")
        refused(str(tmp_path / "pipe.parquet"))


# ---- a split is the hub's naming, whole

HASH, OTHER = "b42a775f407cee45", "0123456789abcdef"


@pytest.mark.parametrize(
    "files",
    [
        ["test.parquet"],
        ["data/test.parquet"],
        ["test-00000-of-00001.parquet"],
        [f"data/test-00000-of-00002-{HASH}.parquet", f"data/test-00001-of-00002-{OTHER}.parquet"],  # a hash is of one file
        ["default/test/0000.parquet", "default/test/0001.parquet"],
        ["test/0000.parquet"],
        ["only/test-00000-of-00001.parquet"],
        ["default/test.parquet", "other/test.parquet"],
    ],
)
def test_the_layouts_of_the_hub(tmp_path: Path, files: list[str]) -> None:
    """With files beside them that are none of the split."""
    wanted = []
    for i, name in enumerate(files):
        put(tmp_path / "mine" / name, 10 * i)
        wanted += [10 * i, 10 * i + 1] if not name.startswith("other/") else []
    folder = (tmp_path / "mine" / files[0]).parent
    beside = folder if "0000.parquet" not in files[0] else folder.parent
    for name in (
        "test-old.parquet", "test-1.parquet", "test2.parquet", "test.parquet.bak", "test-00000-of-00001-copy.parquet", "mytest.parquet",
        "Test.parquet",
        "test-old-00000-of-00001.parquet", "train.parquet", "partial-test/0000.parquet", ".hidden/test.parquet", "test (1).parquet",
    ):  # fmt: skip
        put(beside / name, 200)
    assert levels(load_data("mine:test", data_dir=tmp_path)) == wanted


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["test-00000-of-00002.parquet"], "copy the missing"),
        ([f"test-00001-of-00002-{HASH}.parquet"], "copy the missing"),
        (["test-00000-of-00002.parquet", "test-00002-of-00002.parquet"], "copy the missing"),
        ([f"test-00000-of-00001-{HASH}.parquet", f"test-00000-of-00001-{OTHER}.parquet"], "twice"),
        (["test-00000-of-00001.parquet", "test-00000-of-00002.parquet", "test-00001-of-00002.parquet"], "of 1 and of 2"),
        (["test-00000-of-00002.parquet", f"test-00001-of-00002-{HASH}.parquet"], "with or without a hash"),
        (["test.parquet", "test-00000-of-00001.parquet"], "one copy"),
        (["test.parquet", "data/test.parquet"], "one copy"),
        (["test.parquet", "test/0000.parquet"], "one copy"),
        (["test/0000.parquet", "test/0002.parquet"], "none with 0001"),
        (["test/0001.parquet"], "none with 0000"),
        (["a/test.parquet", "b/test.parquet"], "(a, b)"),
        (["a/test/0000.parquet", "b/test-00000-of-00001.parquet"], "(a, b)"),
        (["test.parquet", "noisy/test.parquet"], "(the folder itself), noisy"),
        (["test-old.parquet"], "name one of them"),
        (["test-0-of-1.parquet"], "name one of them"),
        (["train.parquet", "valid.parquet"], "among train, valid, got 'test'"),
    ],
)
def test_a_split_that_is_not_whole_or_not_one(tmp_path: Path, files: list[str], words: str) -> None:
    for i, name in enumerate(files):
        put(tmp_path / "mine" / name, 10 * i)
    assert words in refused("mine:test", data_dir=tmp_path)


def test_a_configuration_is_chosen_by_name(tmp_path: Path) -> None:
    for i, name in enumerate(("a/test.parquet", "b/test/0000.parquet", "c/d/data/test-00000-of-00001.parquet")):
        put(tmp_path / "mine" / name, 10 * i)
    for i, subset in enumerate(("a", "b", "c/d")):
        assert levels(load_data("mine:test", data_dir=tmp_path, subset=subset)) == [10 * i, 10 * i + 1]
    assert "among a, b, c/d" in refused("mine:test", data_dir=tmp_path, subset="e")
    refused("mine:train", data_dir=tmp_path, subset="a")


def test_folders_that_link_to_themselves_are_entered_once(tmp_path: Path) -> None:
    put(tmp_path / "mine" / "test.parquet")
    (tmp_path / "mine" / "again").symlink_to(tmp_path / "mine")
    (tmp_path / "mine" / "up").symlink_to(tmp_path)
    (tmp_path / "mine" / "dir.parquet").mkdir()
    (tmp_path / "mine" / "circle").symlink_to(tmp_path / "mine" / "circle")
    assert len(load_data("mine:test", data_dir=tmp_path)) == 2


def test_files_of_one_split_have_the_same_columns(tmp_path: Path) -> None:
    put(tmp_path / "mine/test-00000-of-00002.parquet")
    put(tmp_path / "mine/test-00001-of-00002.parquet", label=["a", "b"])
    assert "others in test-00001" in refused("mine", data_dir=tmp_path)


# ---- pixels


def table_of(path: Path, cells: list[bytes]) -> str:
    pq.write_table(pa.table({"image": [{"bytes": cell, "path": None} for cell in cells], "label": [i % 2 for i in range(len(cells))]}), path)
    return str(path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_orientation_is_that_of_datasets(tmp_path: Path, form: str, mode: str, orientation: int | None) -> None:
    shape = (6, 9) if mode == "L" else (6, 9, 3)
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8))
    exif = picture.getexif()
    if orientation is not None:
        exif[0x0112] = orientation
    path = table_of(tmp_path / "x.parquet", [encoded(picture, form, exif=exif)] * 2)
    theirs = np.asarray(datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path)).cast_column("image", datasets.Image())[0]["image"])
    ours = load_data(path).x[0].numpy()
    ours = (ours * 255).round().astype(np.uint8)
    theirs = theirs[None] if theirs.ndim == 2 else theirs.transpose(2, 0, 1)
    assert ours.shape == theirs.shape and np.array_equal(ours, theirs)


def test_modes_have_a_rule_each(tmp_path: Path) -> None:
    """Compared with Pillow's own arrays, if these contain the values of the file."""
    draw = np.random.RandomState(1)
    small = draw.randint(0, 256, (5, 4), dtype=np.uint8)
    deep = draw.randint(0, 2**16, (5, 4)).astype(np.uint16)
    colour = draw.randint(0, 256, (5, 4, 3), dtype=np.uint8)
    opaque = np.concatenate([colour, np.full((5, 4, 1), 255, np.uint8)], axis=2)
    cases = {
        "L": (Image.fromarray(small), small / 255),
        "1": (Image.fromarray(small > 99), (small > 99) * 1.0),
        "16": (Image.fromarray(deep), deep / 65535),
        "RGB": (Image.fromarray(colour), colour / 255),
        "RGBA": (Image.fromarray(opaque), colour / 255),
        "LA": (Image.fromarray(small).convert("LA"), small / 255),
        "P": (Image.fromarray(colour).quantize(16), np.asarray(Image.fromarray(colour).quantize(16).convert("RGB")) / 255),
    }
    for name, (picture, wanted) in cases.items():
        for form in ("PNG", "TIFF"):
            x = load_data(table_of(tmp_path / "x.parquet", [encoded(picture, form)])).x[0].double().numpy()
            wanted_chw = wanted[None] if wanted.ndim == 2 else wanted.transpose(2, 0, 1)
            assert x.shape == wanted_chw.shape and np.abs(x - wanted_chw).max() < 1e-6, (name, form)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_modes_without_a_rule_are_refused(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (1, 2, 3, 255))
    clear.putpixel((1, 1), (1, 2, 3, 254))
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette(list(range(30)))
    cases = {
        "RGBA": encoded(clear),
        "LA": encoded(clear.convert("LA")),
        "palette with a clear colour": encoded(palette, transparency=3),
        "grey with a clear colour": encoded(Image.new("L", (4, 4), 3), transparency=3),
        "gif with a clear colour": encoded(palette, "GIF", transparency=3),
        "CMYK": encoded(Image.new("CMYK", (4, 4)), "JPEG"),
        "CMYK tiff": encoded(Image.new("CMYK", (4, 4)), "TIFF"),
        "F": encoded(Image.new("F", (4, 4)), "TIFF"),
        "I": encoded(Image.new("I", (4, 4)), "TIFF"),
        "LAB": encoded(Image.new("LAB", (4, 4)), "TIFF"),
        "YCbCr": encoded(Image.new("YCbCr", (4, 4)), "TIFF"),
        "colour of 16 bits": raw_png(4, 4, 16, 2, (b"\0" + b"\x12\x34" * 12) * 4),
        "colour and alpha of 16 bits": raw_png(4, 4, 16, 6, (b"\0" + b"\xff\xff" * 16) * 4),
        "grey and alpha of 16 bits": raw_png(4, 4, 16, 4, (b"\0" + b"\xff\xff" * 8) * 4),
        "white is zero, 16 bits": encoded(Image.fromarray(np.zeros((4, 4), np.uint16)), "TIFF", tiffinfo={262: 0}),
    }
    for name, cell in cases.items():
        message = refused(table_of(tmp_path / "x.parquet", [cell]))
        assert "grey (L) or RGB" in message, (name, message)


def test_a_palette_whose_clear_colour_is_not_used_is_opaque(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette(list(range(30)))
    cell = encoded(palette, transparency=7)
    assert load_data(table_of(tmp_path / "x.parquet", [cell])).x.shape == (1, 3, 4, 4)


# ---- labels and columns


def named(path: Path, labels: list, kind: object, **columns: object) -> str:
    rows = {"image": [Image.new("L", (4, 4), i) for i in range(len(labels))], "label": labels, **columns}
    features = datasets.Features({"image": datasets.Image(), "label": kind, **{c: datasets.Value("int64") for c in columns}})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


def test_names_of_classes_are_kept(tmp_path: Path) -> None:
    data = load_data(named(tmp_path / "a.parquet", [2, 0], datasets.ClassLabel(names=["cat", "dog", "eel"])))
    assert (data.names, data.classes, data.y.tolist()) == (("cat", "dog", "eel"), 3, [2, 0])
    data = load_data(named(tmp_path / "b.parquet", ["eel", "cat", "eel"], datasets.Value("string")))
    assert (data.names, data.classes, data.y.tolist()) == (("cat", "eel"), 2, [1, 0, 1])
    assert load_data(named(tmp_path / "b.parquet", ["eel", "cat", "eel"], datasets.Value("string")), limit=1).names == ("cat", "eel")
    assert load_data("digits").names is None


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_strings_of_every_kind(tmp_path: Path, kind: pa.DataType) -> None:
    path = put(tmp_path / "x.parquet", count=3, label=pa.array(["b", "a", "b"]).cast(kind))
    assert load_data(str(path)).y.tolist() == [1, 0, 1]


def test_strings_have_the_same_number_in_every_split(tmp_path: Path) -> None:
    """The test split has no 'a': numbered by itself, 'b' would be 0."""
    put(tmp_path / "mine/train.parquet", count=3, label=["a", "b", "c"])
    put(tmp_path / "mine/test.parquet", count=2, label=["b", "c"])
    test = load_data("mine:test", data_dir=tmp_path)
    assert test.y.tolist() == [1, 2] and test.names == load_data("mine:train", data_dir=tmp_path).names == ("a", "b", "c")


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint8(), pa.uint64(), pa.int16()])
def test_whole_numbers_of_every_kind(tmp_path: Path, kind: pa.DataType) -> None:
    path = put(tmp_path / "x.parquet", count=3, label=pa.array([2, 0, 1]).cast(kind))
    assert load_data(str(path)).y.tolist() == [2, 0, 1]


def test_whole_numbers_in_a_dictionary(tmp_path: Path) -> None:
    path = put(tmp_path / "x.parquet", count=3, label=pa.array([2, 0, 1]).dictionary_encode())
    assert load_data(str(path)).y.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (pa.array([0, None]), "got None in row 1"),
        (pa.array([0.0, 1.0]), "got 0.0 in row 0"),
        (pa.array([float("nan"), 1.0]), "got nan in row 0"),
        (pa.array([0, 2**63], pa.uint64()), "9223372036854775808 in row 1"),
        (pa.array([False, True]), "got False in row 0"),
        (pa.array([0, -1]), "got -1 in row 1"),
        (pa.array([[0], [1]]), "single values"),
        (pa.array([{"a": 0}, {"a": 1}]), "single values"),
        (pa.array([None, None], pa.null()), "in row 0"),
        (pa.array(["a", None]), "got none in row 1"),
        (pa.array([0, 1], pa.timestamp("s")), "integers"),
        (pa.array([b"\xff\xfe", b"a"]).view(pa.string()) if hasattr(pa.Array, "view") else pa.array([None]), "cannot be read"),
    ],
)
def test_labels_that_somebody_would_have_to_guess(tmp_path: Path, labels: pa.Array, words: str) -> None:
    assert words in refused(str(put(tmp_path / "x.parquet", label=labels)))


def test_a_string_outside_the_declared_classes(tmp_path: Path) -> None:
    path = put(tmp_path / "x.parquet", label=["a", "b"])
    table = pq.read_table(path)
    info = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": %s}}}}'
    pq.write_table(table.replace_schema_metadata({b"huggingface": info % b'["b", "a"]'}), path)
    assert load_data(str(path)).y.tolist() == [1, 0]
    pq.write_table(table.replace_schema_metadata({b"huggingface": info % b'["b", "c"]'}), path)
    assert "got 'a'" in refused(str(path))
    for bad in (b'["b", "b"]', b"[1, 2]", b"[]", b'"ab"', b"[" * 5000):
        pq.write_table(table.replace_schema_metadata({b"huggingface": info % bad}), path)
        refused(str(path))


def test_columns_by_option_and_never_by_guess(tmp_path: Path) -> None:
    cells = [{"bytes": grey(i), "path": None} for i in (50, 51)]
    path = str(put(tmp_path / "x.parquet", img=cells, labels=[1, 1], mask=[b"x", b"y"]))
    message = refused(path)
    assert "label, labels" in message and "--label-column" in message
    message = refused(path, label_column="label")
    assert "image, img" in message and "mask" in message and "--image-column" in message
    assert levels(load_data(path, label_column="label", image_column="img")) == [50, 51]
    data = load_data(path, label_column="labels", image_column="image")
    assert levels(data) == [0, 1] and data.y.tolist() == [1, 1]
    assert "got the columns image, label, img, labels, mask" in refused(path, label_column="no", image_column="image")
    refused(path, label_column="label", image_column="labels")
    refused(path, label_column="label", image_column="")
    pq.write_table(pa.table({"picture": cells, "kind": [0, 1]}), path)
    assert "kind" in refused(path)
    assert levels(load_data(path, label_column="kind")) == [50, 51]
    for spec, option in (("digits", "image_column"), ("digits", "subset"), (path, "subset"), ("page", "text_column"), ("page", "label_column")):
        assert f"no {option}" in refused(spec, **{option: "image"})


def test_a_column_of_text_by_option(tmp_path: Path) -> None:
    path = tmp_path / "words.parquet"
    pq.write_table(pa.table({"text": ["ab" * 50] * 2, "body": ["cd" * 50] * 2}), path)
    assert load_data(str(path), text_column="body", context=4).vocabulary == "cd"
    assert "no" in refused(str(path), text_column="no")
    for split in ("train", "test"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        pq.write_table(pa.table({"body": [f"{split}ed words"] * 20}), tmp_path / "mine" / f"{split}.parquet")
    assert load_data("mine:test", data_dir=tmp_path, text_column="body", context=4).kind == "text"
    ids, vocabulary, _ = load_tokens("mine:train", data_dir=tmp_path, text_column="body")
    assert "".join(vocabulary[i] for i in ids[:13]) == "trained words"
    for rows in ([None, "a"], [b"\xff"], [1, 2]):
        pq.write_table(pa.table({"body": rows}), path)
        refused(str(path), text_column="body")


# ---- hostile files


def test_no_decoder_but_the_six(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    def never(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", never)
    picture = Image.new("RGB", (4, 4))
    cells = [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"]
    cells += [encoded(picture, form) for form in ("PPM", "TGA", "ICO", "PCX", "SGI", "EPS", "PDF", "DDS", "ICNS", "JPEG2000")]
    for cell in cells:
        assert "undecodable" in refused(table_of(tmp_path / "x.parquet", [cell]))
    for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        assert load_data(table_of(tmp_path / "x.parquet", [encoded(picture, form)])).x.shape == (1, 3, 4, 4)


def huge(form: str) -> bytes:
    """An image of a few bytes whose header states 13,000 × 13,000."""
    cell = bytearray(encoded(Image.new("L", (64, 64)), form, **({"lossless": True} if form == "WEBP" else {})))
    n = 13_000
    if form == "PNG":
        return raw_png(n, n, 8, 0, b"\0")
    if form == "GIF":
        cell[6:10] = struct.pack("<HH", n, n)
    if form == "BMP":
        cell[18:26] = struct.pack("<ii", n, n)
    if form == "WEBP":
        bits = int.from_bytes(cell[21:25], "little")
        cell[21:25] = (bits & ~0xFFFFFFF | (n - 1) | (n - 1) << 14).to_bytes(4, "little")
    if form == "TIFF":
        at = struct.unpack("<I", cell[4:8])[0]
        for i in range(struct.unpack("<H", cell[at : at + 2])[0]):
            entry = at + 2 + 12 * i
            if struct.unpack("<H", cell[entry : entry + 2])[0] in (256, 257):
                cell[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, n)
    if form == "JPEG":
        at = cell.index(b"\xff\xc0")
        cell[at + 5 : at + 9] = struct.pack(">HH", n, n)
    return bytes(cell)


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "WEBP", "TIFF", "JPEG"])
def test_an_image_of_many_pixels_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(images, "_decoded", never)
    assert f"at most {images.MAX_PIXELS} pixels" in refused(table_of(tmp_path / "x.parquet", [huge(form)] * 2))


def test_all_images_together_are_budgeted_before_the_first_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table_of(tmp_path / "x.parquet", [grey(i, (30, 40)) for i in range(10)])
    monkeypatch.setattr(images, "MAX_VALUES", 7 * 1200)
    assert "at most 8400 numbers" in refused(path) and "--limit" in refused(path)
    assert len(load_data(path, limit=7)) == 7
    monkeypatch.setattr(images, "_decoded", lambda *_: pytest.fail("it was decoded"))
    refused(path)


def test_sizes_that_differ_are_found_in_headers(tmp_path: Path) -> None:
    """A large one among small ones is never decoded."""
    path = table_of(tmp_path / "x.parquet", [grey(0), grey(1), encoded(Image.new("L", (6000, 6000)))])
    assert "got (1, 6000, 6000) in row 2" in refused(path)


def test_an_image_cut_off_is_refused_whatever_pillow_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encoded(Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64), dtype=np.uint8)))
    refused(table_of(tmp_path / "x.parquet", [whole[: len(whole) // 2]]))
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_random_bytes_and_broken_images_are_one_sentence(tmp_path: Path) -> None:
    draw = np.random.RandomState(0)
    for form in images.FORMATS:
        whole = encoded(Image.fromarray(draw.randint(0, 256, (16, 16), dtype=np.uint8)), form)
        for _ in range(15):
            broken = bytearray(whole)
            for at in draw.randint(0, min(len(broken), 200), 6):
                broken[at] = draw.randint(256)
            try:
                load_data(table_of(tmp_path / "x.parquet", [bytes(broken)]))
            except BadInput:
                pass


def test_a_path_in_a_cell_is_never_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(grey(99))
    path = tmp_path / "x.parquet"
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array([{"bytes": None, "path": str(secret)}] * 2, kind), "label": [0, 1]}), path)
    assert "store the images" in refused(str(path))
    pq.write_table(pa.table({"image": pa.array([{"bytes": grey(5), "path": str(secret)}] * 2, kind), "label": [0, 1]}), path)
    assert levels(load_data(str(path))) == [5, 5]
    pq.write_table(pa.table({"image": [str(secret)] * 2, "label": [0, 1]}), path)
    refused(str(path))
    pq.write_table(pa.table({"image": pa.array([None, None], kind), "label": [0, 1]}), path)
    refused(str(path))


def test_rows_are_counted_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(put(tmp_path / "x.parquet", count=20))
    monkeypatch.setattr(tables, "MAX_ROWS", 19)
    monkeypatch.setattr(tables.Parquet, "_read", lambda *_: pytest.fail("a row was read"))
    assert "at most 19 rows" in refused(path, limit=2)


def test_a_column_that_unpacks_without_end_is_refused_before(tmp_path: Path) -> None:
    """300 MB of one repeated byte in a few kB: images do not compress so well, so this is refused."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [b"\0" * 300_000_000], "label": [0]}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 2**20
    message = refused(str(path))
    assert "smaller row groups" in message


def test_a_value_that_repeats_is_held_once(tmp_path: Path) -> None:
    """A dictionary of one image of 3 MB for 5,000 rows: 15 GB as values."""
    path = tmp_path / "x.parquet"
    large = encoded(Image.fromarray(np.random.RandomState(0).randint(0, 256, (1000, 3000), dtype=np.uint8)))
    repeated = pa.DictionaryArray.from_arrays(pa.array(np.zeros(5000, np.int32)), pa.array([large]))
    pq.write_table(pa.table({"image": repeated, "label": np.zeros(5000, np.int64)}), path)
    before = pa.total_allocated_bytes()
    highest = []
    real = tables._values
    import unittest.mock

    with unittest.mock.patch.object(tables, "_values", lambda *a: highest.append(pa.total_allocated_bytes() - before) or real(*a)):
        assert load_data(str(path), limit=2).x.shape == (2, 1, 1000, 3000)
    assert max(highest) < 50_000_000


def test_limit_reads_only_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The selected rows are the same as in earlier versions: a permutation by the seed, in order."""
    path = tmp_path / "x.parquet"
    rows = {"image": [{"bytes": grey(i), "path": None} for i in range(200)], "label": list(range(200)), "other": ["x" * 100] * 200}
    pq.write_table(pa.table(rows), path, row_group_size=10)
    read: list[tuple[int, str]] = []
    real = tables.Parquet._read

    def noted(self: tables.Parquet, path: Path, group: int, column: str, size: int) -> object:
        read.append((group, column))
        return real(self, path, group, column, size)

    monkeypatch.setattr(tables.Parquet, "_read", noted)
    data = load_data(str(path), limit=3, seed=5)
    wanted = np.sort(np.random.RandomState(5).permutation(200)[:3])
    assert data.index.tolist() == data.y.tolist() == levels(data) == wanted.tolist()
    assert {group for group, column in read if column == "image"} == {int(i) // 10 for i in wanted}
    assert "other" not in {column for _, column in read}


@pytest.mark.parametrize(
    "content",
    [b"", b"PAR1", b"PAR1" + b"\xff" * 40 + b"PAR1", b"PARE" + b"\0" * 20 + b"PARE", b"\0" * 1000, b"PAR1\xff\xff\xff\x7fPAR1"],
)
def test_files_that_are_no_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    assert "copy it again" in refused(str(tmp_path / "x.parquet"))


def test_bytes_changed_anywhere_are_one_sentence_or_data(tmp_path: Path) -> None:
    path = put(tmp_path / "x.parquet", count=8)
    whole = path.read_bytes()
    draw = np.random.RandomState(0)
    for _ in range(120):
        broken = bytearray(whole)
        for at in draw.randint(0, len(broken), 3):
            broken[at] = draw.randint(256)
        path.write_bytes(bytes(broken))
        try:
            load_data(str(path))
        except BadInput as error:
            assert "\n" not in str(error)


def test_tables_without_rows_or_columns(tmp_path: Path) -> None:
    path = put(tmp_path / "x.parquet", count=2)
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    assert "at least one row" in refused(str(path))
    pq.write_table(pa.table({}), path)
    refused(str(path))


def test_texts_are_bounded_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_TEXT", 1000)
    path = tmp_path / "x.txt"
    path.write_text("a" * 1001)
    assert "at most 1000 bytes" in refused(str(path))
    path.write_bytes(b"ab\xff" * 50)
    assert "save it as UTF-8" in refused(str(path))
    path.write_bytes(b"a\0b" * 300)
    assert load_data(str(path), context=4).vocabulary == "\0ab"
    pq.write_table(pa.table({"text": ["a" * 501] * 2}), tmp_path / "x.parquet")
    assert "at most 1000 characters" in refused(str(tmp_path / "x.parquet"), text_column="text")


def test_loading_hostile_data_moves_no_random_state(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    refused(table_of(tmp_path / "x.parquet", [huge("PNG")] * 2))
    robustlip.load_data(table_of(tmp_path / "x.parquet", [grey(1)] * 2))
    assert torch.equal(before, torch.get_rng_state())
