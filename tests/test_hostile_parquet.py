"""Parquet files and images that request far more memory than their size: they fail fast, with little memory. Valid files still load."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from robustlip.data import images, load_data, load_tokens, tables
from robustlip.data.pages import Compact, Malformed, check_footer, count_pages
from robustlip.errors import BadInput

SECONDS, BYTES = 20, 2 * 10**9
LOADS = """
import json, re, sys, time
from pathlib import Path
from robustlip.data import load_data
from robustlip.errors import BadInput
status = Path("/proc/self/status")  # its peak, for ru_maxrss counts the process that started this one
for line in sys.stdin:
    path, options = json.loads(line)
    start = time.monotonic()
    try:
        load_data(path, **options)
        said = "loaded"
    except BadInput as error:
        said = str(error)
    most = int(re.search("VmHWM:\\s+(\\d+)", status.read_text()).group(1)) * 1024 if status.is_file() else 0
    print(json.dumps([time.monotonic() - start, most, said]), flush=True)
"""


@pytest.fixture(scope="module")
def loader() -> Iterator[subprocess.Popen[str]]:
    """A separate process that loads a file, so that its memory can be measured and its crash does not end the tests."""
    with subprocess.Popen([sys.executable, "-c", LOADS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(autouse=True)
def _started(loader: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LOADER", loader)


LOADER: subprocess.Popen[str] | None = None


def ends(path: Path, **options: str) -> str:
    """The error message for the file, after little time and with little memory."""
    assert LOADER is not None and LOADER.stdin is not None and LOADER.stdout is not None
    LOADER.stdin.write(json.dumps([str(path), options]) + "\n")
    LOADER.stdin.flush()
    answer = LOADER.stdout.readline()
    assert answer, "the process died"
    seconds, most, said = json.loads(answer)
    assert seconds < SECONDS and most < BYTES, (seconds, most, said)
    return str(said)


def refused(path: Path, **options: str) -> str:
    said = ends(path, **options)
    assert said.startswith("expected ") and ", got " in said and "; " in said, said
    return said


# ---- Thrift's compact protocol, written


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def whole(value: int) -> bytes:
    return varint((value << 1) ^ (value >> 63))


def structure(*fields: tuple[int, int, bytes]) -> bytes:
    """(number, kind, content) in ascending order."""
    out, last = b"", 0
    for number, kind, content in fields:
        out += bytes([(number - last) << 4 | kind]) + content
        last = number
    return out + b"\0"


I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12


def text(value: str) -> bytes:
    return varint(len(value)) + value.encode()


def listed(kind: int, elements: list[bytes]) -> bytes:
    return (bytes([len(elements) << 4 | kind]) if len(elements) < 15 else bytes([0xF0 | kind]) + varint(len(elements))) + b"".join(elements)


def element(name: str, kind: int | None = None, children: int | None = None) -> bytes:
    fields = [] if kind is None else [(1, I32, whole(kind))]
    fields += [(3, I32, whole(0))] if kind is not None or children is not None else []
    return structure(*fields, (4, BINARY, text(name)), *([] if children is None else [(5, I32, whole(children))]))


def page(values: int, content: bytes, codec: str | None, unpacked: int | None = None, encoding: int = 0, kind: int = 0) -> bytes:
    packed = content if codec is None else pa.compress(content, codec=codec, asbytes=True)
    inner = structure((1, I32, whole(values)), (2, I32, whole(encoding)), *([(3, I32, whole(3)), (4, I32, whole(3))] if kind == 0 else []))
    header = structure(
        (1, I32, whole(kind)), (2, I32, whole(len(content) if unpacked is None else unpacked)), (3, I32, whole(len(packed))),
        ({0: 5, 2: 7}[kind], STRUCT, inner),
    )  # fmt: skip
    return header + packed


def column(kind: int, name: str, codec: int, values: int, at: int, packed: int, unpacked: int, dictionary: int | None = None) -> bytes:
    inner = structure(
        (1, I32, whole(kind)), (2, LIST, listed(I32, [whole(0)])), (3, LIST, listed(BINARY, [text(name)])), (4, I32, whole(codec)),
        (5, I64, whole(values)), (6, I64, whole(unpacked)), (7, I64, whole(packed)), (9, I64, whole(at)),
        *([] if dictionary is None else [(11, I64, whole(dictionary))]),
    )  # fmt: skip
    return structure((2, I64, whole(at)), (3, STRUCT, inner))


def group(columns: list[bytes], rows: int) -> bytes:
    return structure((1, LIST, listed(STRUCT, columns)), (2, I64, whole(1000)), (3, I64, whole(rows)))


def put(path: Path, body: bytes, schema: list[bytes], groups: list[bytes], rows: int) -> Path:
    footer = structure((1, I32, whole(2)), (2, LIST, listed(STRUCT, schema)), (3, I64, whole(rows)), (4, LIST, listed(STRUCT, groups)))
    path.write_bytes(b"PAR1" + body + footer + struct.pack("<I", len(footer)) + b"PAR1")
    return path


ZSTD, INT64, BYTE_ARRAY = 6, 2, 6
SCHEMA = [element("schema", children=2), element("image", BYTE_ARRAY), element("label", INT64)]


def two_columns(path: Path, image: list[bytes], rows: int, unpacked: int = 1000, dictionary: bool = False, groups: int = 1) -> Path:
    """A file with `rows` rows per group: labels 0, and the pages of `image`, for which the footer states the decompressed size."""
    labels = page(rows, b"\0" * (8 * rows), "zstd")
    first = len(image[0]) if dictionary else 0
    body = b"".join(image)
    chunk = column(BYTE_ARRAY, "image", ZSTD, rows, 4 + first, len(body), unpacked, 4 if dictionary else None)
    label = column(INT64, "label", ZSTD, rows, 4 + len(body), len(labels), 8 * rows)
    return put(path, body + labels, SCHEMA, [group([chunk, label], rows)] * groups, rows * groups)


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, 7).save(buffer, "PNG")
    return buffer.getvalue()


def plain(values: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def test_files_written_here_by_hand_are_parquet(tmp_path: Path) -> None:
    """So that the following files are refused for their contents and not for their format."""
    data = load_data(str(two_columns(tmp_path / "x.parquet", [page(3, plain([png()] * 3), "zstd")], 3)))
    assert data.x.shape == (3, 1, 8, 8)
    parts = [page(1, plain([png()]), "zstd", kind=2), page(3, b"\1\6\0", "zstd", encoding=8)]
    assert load_data(str(two_columns(tmp_path / "x.parquet", parts, 3, dictionary=True))).x.shape == (3, 1, 8, 8)


def test_a_footer_that_says_less_than_its_pages(tmp_path: Path) -> None:
    """1,000 bytes over a page of some kB that decompresses to 900 MB."""
    huge = plain([b"\0" * 900_000_000])
    path = two_columns(tmp_path / "x.parquet", [page(1, huge, "zstd")], 1)
    assert path.stat().st_size < 200_000
    assert "decompresses to 900000004" in refused(path)


def test_many_pages_that_unpack_to_much_together(tmp_path: Path) -> None:
    part = page(1, plain([b"\0" * 100_000_000]), "zstd")
    assert "decompresses to more than" in refused(two_columns(tmp_path / "x.parquet", [part] * 12, 12))


def test_a_dictionary_that_unpacks_to_much(tmp_path: Path) -> None:
    parts = [page(1, plain([b"\0" * 900_000_000]), "zstd", kind=2), page(3, b"\1\6\0", "zstd", encoding=8)]
    assert "decompresses to 900000004" in refused(two_columns(tmp_path / "x.parquet", parts, 3, dictionary=True))
    parts[0] = page(2**31 - 1, plain([png()]), "zstd", kind=2)
    assert "too many values" in refused(two_columns(tmp_path / "x.parquet", parts, 3, dictionary=True))


def test_row_groups_upon_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group is within its budget, and all of them are the same bytes."""
    monkeypatch.setattr(tables, "MAX_UNPACKED", 250_000_000)
    path = two_columns(tmp_path / "x.parquet", [page(1, plain([b"\0" * 100_000_000]), "zstd")], 1, groups=1000)
    table = tables.Parquet([path], "x")
    with pytest.raises(BadInput, match=r"decompresses to \d+ bytes or more"):
        for _ in table.cells("image", np.arange(1000)):
            pass
    path = two_columns(tmp_path / "x.parquet", [page(1, plain([np.random.RandomState(0).bytes(100_000)]), "zstd")], 1, groups=10)
    with pytest.raises(BadInput, match="overlap"):
        list(tables.Parquet([path], "x").cells("image", np.arange(10)))


def test_lengths_of_strings_that_only_a_decoder_sees(tmp_path: Path) -> None:
    """Differences of byte strings: one block of 2^31 lengths of no bits, or prefixes of a long string again and again."""
    for encoding in (6, 7):
        block = varint(2**31 - 128) + varint(4) + varint(2**31 - 1) + whole(0) + whole(0) + b"\0" * 4
        assert "delta encoding of byte strings" in refused(two_columns(tmp_path / "x.parquet", [page(5, block * 2, "zstd", encoding=encoding)], 5))


def test_pages_and_rows_that_do_not_add_up(tmp_path: Path) -> None:
    one = page(1, plain([png()]), "zstd")
    for parts, rows in (([one] * 2, 3), ([page(2**31 - 1, plain([png()]), "zstd")], 3), ([page(-1, plain([png()]), "zstd"), one], 1)):
        refused(two_columns(tmp_path / "x.parquet", parts, rows))
    header = structure(
        (1, I32, whole(0)), (2, I32, whole(10)), (3, I32, whole(10)), (7, STRUCT, structure((1, I32, whole(3)), (2, I32, whole(0))))
    )  # fmt: skip
    assert "its kind of page" in refused(two_columns(tmp_path / "x.parquet", [header + b"\0" * 10], 3))
    wide = structure((1, I32, whole(0)), (2, I32, varint(2**33)), (3, I32, whole(1)), (5, STRUCT, structure((1, I32, whole(3)), (2, I32, whole(0)))))
    assert "too large" in refused(two_columns(tmp_path / "x.parquet", [wide + b"\0" * 10], 3))


def test_footers_without_measure(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    empty = group([], 0)
    assert "row groups" in refused(put(path, b"", SCHEMA, [empty] * 500_000, 0))
    many = [element("schema", children=100_000), *(element(f"c{i}", INT64) for i in range(100_000))]
    assert "columns" in refused(put(path, b"", many, [], 0))
    chunk = column(INT64, "label", ZSTD, 0, 4, 0, 0)
    assert "columns, summed over row groups" in refused(put(path, b"", SCHEMA, [group([chunk] * 1000, 0)] * 200, 0))
    deep = [*(element(f"d{i}", children=1) for i in range(9_000)), element("label", INT64)]
    assert "too deep" in refused(put(path, b"", deep, [], 0))
    for broken in ([element("schema", children=5), element("label", INT64)], [element("schema", children=1), *[element("label", INT64)] * 2]):
        assert "schema" in refused(put(path, b"", broken, [], 0))
    nested = b"\x1c" * 10_000_000  # structures in structures
    path.write_bytes(b"PAR1" + nested + struct.pack("<I", len(nested)) + b"PAR1")
    assert "too deep" in refused(path)
    flat = b"\x15\0" * 8_000_000  # numbers without end
    path.write_bytes(b"PAR1" + flat + struct.pack("<I", len(flat)) + b"PAR1")
    refused(path)
    path.write_bytes(b"PAR1" + b"\0" * (2**25 + 1) + struct.pack("<I", 2**25 + 1) + b"PAR1")
    assert "footer has more" in refused(path)


def test_a_long_dictionary_is_not_copied_for_every_few_rows(tmp_path: Path) -> None:
    """Ten million rows of a dictionary of 100 MB: a copy of it for each 256 rows would take hours."""
    rows = 2_000_000
    parts = [page(1, plain([b"\0" * 100_000_000]), "zstd", kind=2), page(rows, b"\1" + varint(rows << 1) + b"\0", "zstd", encoding=8)]
    path = two_columns(tmp_path / "x.parquet", parts, rows, dictionary=True)
    refused(path)
    refused(path, text_column="image")


def test_values_of_one_width_that_repeat(tmp_path: Path) -> None:
    """A dictionary of one value of 1 MB for 100,000 rows: 100 GB where they are held as values."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": pa.array([b"\0" * 2**20], pa.binary(2**20)), "label": [0]}), path)
    refused(path)  # a legal file, though no image
    fixed = structure((1, I32, whole(7)), (2, I32, whole(2**20)), (3, I32, whole(0)), (4, BINARY, text("image")))
    wide = [element("schema", children=2), fixed, SCHEMA[2]]
    rows = 100_000
    parts = [page(1, b"\0" * 2**20, "zstd", kind=2), page(rows, b"\1" + varint(rows << 1) + b"\0", "zstd", encoding=8)]
    labels, body = page(rows, b"\0" * (8 * rows), "zstd"), b"".join(parts)
    chunk = column(7, "image", ZSTD, rows, 4 + len(parts[0]), len(body), 1000, 4)
    label = column(INT64, "label", ZSTD, rows, 4 + len(body), len(labels), 8 * rows)
    assert "smaller row groups" in refused(put(path, body + labels, wide, [group([chunk, label], rows)], rows))


# ---- honest files


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_all_ways_of_writing_load(tmp_path: Path, codec: str, version: str) -> None:
    path = tmp_path / "x.parquet"
    draw = np.random.RandomState(0)
    cells = []
    for i in range(60):
        buffer = io.BytesIO()
        Image.fromarray(draw.randint(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None if i % 7 else f"{i}.png"})
    table = pa.table({"image": cells, "label": [i % 4 for i in range(60)], "text": [f"row {i % 5} " for i in range(60)]})
    expected = None
    for dictionary in (True, False):
        for size in (64, 2**20):
            for rows in (7, 1000):
                pq.write_table(
                    table, path, compression=codec, data_page_version=version, use_dictionary=dictionary, data_page_size=size, row_group_size=rows,
                    write_batch_size=3, dictionary_pagesize_limit=size, write_page_index=size == 64, write_page_checksum=rows == 7,
                )  # fmt: skip
                data = load_data(str(path))
                expected = data if expected is None else expected
                assert (data.x == expected.x).all() and (data.y == expected.y).all()
                spoken = load_data(str(path), text_column="text", context=8)
                assert len(spoken.y) > 0


def test_pages_are_counted_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["abcd" * 10] * 5000}), path, compression="none", use_dictionary=False, data_page_size=1000, write_batch_size=10)
    part = pq.read_metadata(path).row_group(0).column(0)
    with path.open("rb") as file:
        check_footer(file)
        counted = count_pages(file, part.data_page_offset, part.total_compressed_size, 5000, 10**9)
        assert 5000 * 44 <= counted.unpacked <= part.total_uncompressed_size and counted.dictionary == 0
        with pytest.raises(Malformed):
            count_pages(file, part.data_page_offset, part.total_compressed_size, 5001, 10**9)
        with pytest.raises(Malformed):
            count_pages(file, part.data_page_offset, part.total_compressed_size, 5000, counted.unpacked - 1)


def test_a_schema_with_lists_and_structures_beside(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    beside = [{"a": [{"b": [1, 2], "c": "x"}]}] * 4
    pq.write_table(pa.table({"image": [{"bytes": png(), "path": None}] * 4, "label": [0, 1, 2, 3], "beside": beside, "x.y": [1.0] * 4}), path)
    assert load_data(str(path)).y.tolist() == [0, 1, 2, 3]
    pq.write_table(pa.table({"image": [{"bytes": png()}] * 4, "label": [[1], [2], [3], [4]]}), path)
    with pytest.raises(BadInput, match="single values"):
        load_data(str(path))
    pq.write_table(pa.table({"image": [{"bytes": png()}] * 2, "image.bytes": [b"x"] * 2, "label": [0, 1]}), path)
    with pytest.raises(BadInput, match="single values"):
        load_data(str(path))


def test_random_bytes_are_refused_by_the_reader_itself() -> None:
    draw = np.random.RandomState(0)
    for _ in range(2000):
        reader = Compact(draw.bytes(200), 1000, 100)
        try:
            reader.fields(lambda number, kind: False)
        except Malformed:
            pass
        assert reader.at <= 200


# ---- images within the limit of pixels


def jpeg(scans: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A progressive JPEG whose last scan is there so many times more."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, size, dtype=np.uint8)).save(buffer, "JPEG", progressive=True)
    cell = buffer.getvalue()
    last = cell[cell.rindex(b"\xff\xda") : -2]
    return cell[:-2] + last * scans + b"\xff\xd9"


def stored(path: Path, cells: list[bytes]) -> Path:
    pq.write_table(pa.table({"image": cells, "label": [i % 2 for i in range(len(cells))]}), path)
    return path


def test_scans_of_a_jpeg_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    assert load_data(str(stored(path, [jpeg(0)] * 2))).x.shape == (2, 1, 64, 64)
    assert "at most 200 scans" in refused(stored(path, [jpeg(3000)]))
    monkeypatch.setattr(images, "MAX_SCANNED", 64 * 64 * 10)
    with pytest.raises(BadInput, match="up to row 1"):
        load_data(str(stored(path, [jpeg(0)] * 2)))


def test_bytes_of_an_image_are_bounded_by_its_pixels(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    assert load_data(str(stored(path, [png() + b"\0" * 2**20]))).x.shape == (1, 1, 8, 8)
    assert "for an image of its size" in refused(stored(path, [png() + b"\0" * 2**23]))


def test_texts_in_a_png_do_not_unpack_without_end(tmp_path: Path) -> None:
    from PIL import PngImagePlugin

    def written(of: int) -> bytes:
        texts, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
        for i in range(of):
            texts.add_text(f"k{i}", "x" * 500_000, zip=True)
        Image.new("L", (8, 8)).save(buffer, "PNG", pnginfo=texts)
        return buffer.getvalue()

    before = PngImagePlugin.MAX_TEXT_MEMORY
    assert load_data(str(stored(tmp_path / "x.parquet", [written(1)]))).x.shape == (1, 1, 8, 8)
    assert "undecodable" in refused(stored(tmp_path / "x.parquet", [written(20)]))
    assert PngImagePlugin.MAX_TEXT_MEMORY == before


# ---- columns of what has none


def test_a_text_without_columns_takes_none(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some text " * 30)
    for spec in ("page", str(tmp_path / "x.txt")):
        for option in ("text_column", "subset"):
            for load in (load_data, load_tokens):
                with pytest.raises(BadInput, match=f"expected no {option} for the text"):
                    load(spec, **{option: "nothing"})
    pq.write_table(pa.table({"text": ["some text "] * 30}), tmp_path / "x.parquet")
    for load in (load_data, load_tokens):
        with pytest.raises(BadInput, match="expected no subset"):
            load(str(tmp_path / "x.parquet"), subset="nothing", text_column="text")
