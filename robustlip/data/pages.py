"""Counts what a parquet file contains, from its footer and the page headers of its columns, before pyarrow parses or decompresses anything.

Both the footer and the page headers state the size of a column, and a hostile file states two different sizes. Decoders allocate the memory that the
page headers state. Both are encoded in Thrift's compact protocol (Apache Parquet, parquet.thrift); anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

MAX_FOOTER = 2**25  # bytes
MAX_ITEMS = 5_000_000  # numbers, strings and structures in the footer
MAX_STRUCTS = 1_000_000  # structures in the footer
MAX_COLUMNS = 10_000  # nodes of the schema
MAX_GROUPS = 20_000  # row groups
MAX_CHUNKS = 100_000  # columns, summed over all row groups
MAX_DEPTH = 32  # depth of the schema
MAX_PAGE_HEADER = 2**20
MAX_PAGES = 300_000  # per column and row group
MAX_PAGE = 2**27  # decompressed bytes of one page, or …
MAX_PAGE_EXPANSION = 4  # … this many times its size in the file
MAX_DICTIONARY = 2**22  # values
_NESTED = 16  # depth of nested structures
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_DATA, _INDEX, _DICTIONARY, _DATA_V2 = range(4)
_PARTS = {_DATA: [5], _DICTIONARY: [7], _DATA_V2: [8]}  # the field of a page header that describes each kind of page
_DELTA_LENGTH, _DELTA_BYTES = 6, 7  # numbers of encodings


class Malformed(Exception):
    """A file is refused: the reason and the remedy. The caller adds the name of the file."""

    def __init__(self, reason: str, remedy: str = "copy it again") -> None:
        super().__init__(reason)
        self.remedy = remedy


class Truncated(Malformed):
    """The data ends within a structure."""


class Compact:
    """A reader of Thrift's compact protocol with limits on the number of entries and structures."""

    def __init__(self, data: bytes, items: int = MAX_ITEMS, structs: int = MAX_STRUCTS) -> None:
        self.data, self.at, self.items, self.structs = data, 0, items, structs

    def byte(self) -> int:
        if self.at >= len(self.data):
            raise Truncated("it ends too early")
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise Malformed("a number in it is too long")

    def integer(self, limit: int = 2**31) -> int:
        """An integer below the limit in absolute value; decoders would drop the higher bits of a larger one."""
        value = self.varint()
        if value >= 2 * limit:
            raise Malformed("a number in it is too large")
        return (value >> 1) ^ -(value & 1)

    def pass_over(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise Truncated("it ends too early")
        self.at += count

    def count(self) -> tuple[int, int]:
        """(kind of the elements, number of elements) of a list. Every element takes at least one byte."""
        head = self.byte()
        size = head >> 4 if head >> 4 != 15 else self.varint()
        if size > len(self.data) - self.at:
            raise Truncated("it ends too early")
        return head & 15, size

    def fields(self, read: Callable[[int, int], bool], depth: int = 0) -> None:
        """Reads one structure: read(number, kind) reads a field and returns True, or returns False and the field is skipped."""
        self.structs -= 1
        if self.structs < 0 or depth > _NESTED:
            raise Malformed("its structures are too many or too deep")
        number = 0
        while head := self.byte():
            self.items -= 1
            if self.items < 0:
                raise Malformed(f"it has more than {MAX_ITEMS} entries", "write it in larger row groups")
            number = number + (head >> 4) if head >> 4 else self.integer(2**15)
            if not 0 <= number < 2**15:
                raise Malformed("one of its fields has no number")
            if not read(number, head & 15):
                self.skip(head & 15, depth)

    def skip(self, kind: int, depth: int, element: bool = False) -> None:
        if kind in (_TRUE, _FALSE):
            self.pass_over(int(element))
        elif kind == _BYTE:
            self.pass_over(1)
        elif kind in (_I16, _I32, _I64):
            self.varint()
        elif kind == _DOUBLE:
            self.pass_over(8)
        elif kind == _BINARY:
            self.pass_over(self.varint())
        elif kind == _STRUCT:
            self.fields(_nothing, depth + 1)
        elif kind in (_LIST, _SET):
            inner, size = self.count()
            self.items -= size
            if self.items < 0 or depth > _NESTED:
                raise Malformed("its lists are too long or too deep")
            for _ in range(size):
                self.skip(inner, depth + 1, True)
        else:
            raise Malformed(f"it has a field of kind {kind}, which parquet does not use")


def _nothing(number: int, kind: int) -> bool:
    return False


def check_footer(file: IO[bytes]) -> None:
    """Counts the entries of the footer of a parquet file before it is parsed. Raises Malformed above the limits of this module."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    if size < 12 or tail[4:] != b"PAR1":
        raise Malformed("it does not end like a parquet file")
    length = int.from_bytes(tail[:4], "little")
    if length > size - 12:
        raise Malformed("its footer is longer than the file")
    if length > MAX_FOOTER:
        raise Malformed(f"its footer has more than {MAX_FOOTER} bytes", "write it in larger row groups")
    file.seek(size - 8 - length)
    reader = Compact(file.read(length))
    nodes: list[int] = []
    groups = chunks = 0

    def of_element(number: int, kind: int) -> bool:
        if number != 5:
            return False
        if kind != _I32:
            raise Malformed("its schema is invalid")
        nodes[-1] = reader.integer()
        return True

    def of_group(number: int, kind: int) -> bool:
        nonlocal chunks
        if number != 1:
            return False
        chunks += _listed(reader, kind)
        if chunks > MAX_CHUNKS:
            raise Malformed(f"it has more than {MAX_CHUNKS} columns, summed over row groups", "write it in larger row groups")
        return False

    def of_file(number: int, kind: int) -> bool:
        nonlocal groups
        if number == 2:
            size = _listed(reader, kind)
            if nodes or size > MAX_COLUMNS:
                raise Malformed(f"it has more than {MAX_COLUMNS} columns", "drop those that are not needed")
            reader.count()
            for _ in range(size):
                nodes.append(0)
                reader.fields(of_element, 1)
            return True
        if number == 4:
            size = _listed(reader, kind)
            groups += size
            if groups > MAX_GROUPS:
                raise Malformed(f"it has more than {MAX_GROUPS} row groups", "write it in larger ones")
            reader.count()
            for _ in range(size):
                reader.fields(of_group, 1)
            return True
        return False

    try:
        reader.fields(of_file)
    except Truncated:
        raise Malformed("its footer ends too early") from None
    open_: list[int] = []  # number of children that still have to come, per level
    for at, children in enumerate(nodes):
        if children < 0 or (at and not open_) or len(open_) > MAX_DEPTH:
            raise Malformed("its schema is not a tree, or too deep")
        if open_:
            open_[-1] -= 1
        if children:
            open_.append(children)
        while open_ and not open_[-1]:
            open_.pop()
    if open_ or not nodes:
        raise Malformed("its schema is incomplete")


def _listed(reader: Compact, kind: int) -> int:
    """The number of structures in the list that begins here; the reader's position does not change."""
    if kind != _LIST:
        raise Malformed("its footer is invalid")
    at = reader.at
    inner, size = reader.count()
    reader.at = at
    if size and inner != _STRUCT:
        raise Malformed("its footer is invalid")
    return size


@dataclass(frozen=True)
class Pages:
    """unpacked: decompressed bytes of all pages of a column in a row group. dictionary: those of the dictionary pages."""

    unpacked: int
    dictionary: int


def count_pages(file: IO[bytes], start: int, length: int, values: int, budget: int) -> Pages:
    """Counts the pages that hold the `values` of a column in a row group, from their headers; nothing is decompressed.

    start, length: their position in the file. budget: the limit of decompressed bytes. Raises Malformed if the pages do not contain exactly `values`
    values within the length, above the budget, and for encodings whose decoders allocate memory that no header states.
    """
    size = file.seek(0, 2)
    if start < 4 or length < 0 or start + length > size:
        raise Malformed("a column lies outside the file")
    at, end = start, start + length
    seen = unpacked = dictionary = 0
    for count in range(MAX_PAGES + 1):
        if seen >= values:
            break
        if count == MAX_PAGES:
            raise Malformed(f"a column has more than {MAX_PAGES} pages in a row group", "write it with larger pages")
        header, head = _header(file, at, end)
        at += head + header.packed
        if header.packed < 0 or header.unpacked < 0 or at > end:
            raise Malformed("a page lies outside its column")
        if header.unpacked > max(MAX_PAGE, MAX_PAGE_EXPANSION * header.packed):
            raise Malformed(f"a page of {header.packed} bytes decompresses to {header.unpacked}", "write it in smaller row groups")
        unpacked += header.unpacked
        if unpacked > budget:
            raise Malformed(f"a column decompresses to more than {budget} bytes in a row group", "write it in smaller row groups")
        if header.kind in (_DATA, _DATA_V2):
            if header.values < 0 or header.values > values - seen:
                raise Malformed("its pages do not have as many values as it has rows")
            if header.encoding in (_DELTA_LENGTH, _DELTA_BYTES):
                raise Malformed("a column uses a delta encoding of byte strings", "write it plain or with a dictionary")
            seen += header.values
        elif header.kind == _DICTIONARY:
            if dictionary or not 0 <= header.values <= min(MAX_DICTIONARY, header.unpacked):
                raise Malformed("a column has two dictionaries, or one with too many values", "write it without dictionaries")
            dictionary = header.unpacked
    return Pages(unpacked, dictionary)


@dataclass
class _Header:
    kind: int = -1
    unpacked: int = -1
    packed: int = -1
    values: int = -1
    encoding: int = -1


def _header(file: IO[bytes], at: int, end: int) -> tuple[_Header, int]:
    """The header of the page at `at`, and its length."""
    window = 512
    while True:
        file.seek(at)
        data = file.read(min(window, end - at))
        reader, header = Compact(data, 10_000, 1_000), _Header()
        parts: list[int] = []

        def of_page(number: int, kind: int, reader: Compact = reader, header: _Header = header, parts: list[int] = parts) -> bool:
            if number in (1, 2, 3):
                if kind != _I32:
                    raise Malformed("the header of a page is invalid")
                setattr(header, ("kind", "unpacked", "packed")[number - 1], reader.integer())
                return True
            if number in (5, 7, 8):  # data, dictionary, data in version 2
                if kind != _STRUCT or parts:
                    raise Malformed("the header of a page is invalid")
                parts.append(number)
                encoding = 4 if number == 8 else 2

                def of_data(inner: int, kind: int) -> bool:
                    if inner not in (1, encoding):
                        return False
                    if kind != _I32:
                        raise Malformed("the header of a page is invalid")
                    setattr(header, "values" if inner == 1 else "encoding", reader.integer())
                    return True

                reader.fields(of_data, 1)
                return True
            return False

        try:
            reader.fields(of_page)
        except Truncated:
            if len(data) < end - at and window < MAX_PAGE_HEADER:
                window *= 8
                continue
            raise Malformed("the header of a page ends too early") from None
        if parts != _PARTS.get(header.kind, parts):
            raise Malformed("the header of a page does not describe its kind of page")
        return header, reader.at
