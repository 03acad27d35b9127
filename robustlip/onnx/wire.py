"""Counts the contents of an ONNX file before a library creates objects for them: a message of two bytes becomes an object of hundreds of bytes.

Protocol buffers are fields (number, wire type, value); nested messages are fields of wire type 2. All messages that can be repeated are
counted inside too; any other field counts as one.
"""

from __future__ import annotations

from robustlip.errors import BadInput

# The largest number of fields of a file; a node of a network has about twenty.
MOST_FIELDS = 1_000_000
# Packed integers count as one field per this many bytes: each integer takes eight bytes in memory.
PACKED = 64
# For each kind of message, the numbers of its fields that contain messages, and their kind (onnx.proto).
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "plain", 14: "plain"},
    "graph": {1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value", 14: "annotation", 15: "sparse", 16: "plain"},
    "node": {5: "attribute", 9: "plain", 10: "annotation"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 14: "type", 15: "type", 22: "sparse", 23: "sparse"},
    "tensor": {3: "plain", 13: "plain", 16: "plain"},
    "sparse": {1: "tensor", 2: "tensor"},
    "annotation": {2: "plain"},
    "value": {2: "type", 4: "plain"},
    "type": {1: "array", 4: "element", 5: "element", 8: "array", 9: "element"},
    "element": {1: "type", 2: "type"},
    "array": {2: "shape"},
    "shape": {1: "plain"},
    "plain": {},
}
_PACKED = {("attribute", 8), ("tensor", 1), ("tensor", 5), ("tensor", 7), ("tensor", 11)}
_DEEPEST = 12
_FOREIGN = {20: "a training program", 25: "local functions"}


def check_wire(data: bytes, name: str) -> None:
    """Raises BadInput for bytes that are not a message, or that have more fields than a network has. name: of the file."""
    fields = 0

    def varint(at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at
        raise EOFError

    def walk(at: int, end: int, kind: str, depth: int) -> None:
        nonlocal fields
        if depth > _DEEPEST:
            raise EOFError
        inside = _INSIDE[kind]
        while at < end:
            fields += 1
            if fields > MOST_FIELDS:
                raise BadInput(f"expected an ONNX file of at most {MOST_FIELDS} fields, got {name} with more; simplify the graph")
            key, at = varint(at, end)
            number, wire = key >> 3, key & 7
            if kind == "model" and number in _FOREIGN:
                raise BadInput(f"expected an ONNX network, got {name} with {_FOREIGN[number]}; export it without")
            if wire == 0:
                _, at = varint(at, end)
            elif wire in (1, 5):
                at += 8 if wire == 1 else 4
            elif wire == 2:
                size, at = varint(at, end)
                if at + size > end:
                    raise EOFError
                if number in inside:
                    walk(at, at + size, inside[number], depth + 1)
                elif (kind, number) in _PACKED:
                    fields += size // PACKED
                at += size
            else:
                raise EOFError
            if at > end:
                raise EOFError

    try:
        walk(0, len(data), "model", 0)
    except EOFError:
        raise BadInput(f"expected an ONNX file, got {name}, whose bytes are not a valid protocol buffer; export the network again") from None
