"""Reads pickles of plain data and numeric arrays without running any code that they name.

A pickle is a program for a stack machine, and `pickle.load` runs it: its author chooses which functions are
called. There are three barriers, each of which alone stops all known attacks:
1. `scan` interprets the whole program with kinds instead of values (this is text, this is a list …). It refuses every instruction that plain
   data does not need, every name except four of numpy's, and every call other than those with which numpy writes an array, an array's type or
   a number. Nothing is built or imported at this stage.
2. The unpickler resolves those names to substitutes in this file; numpy's own functions are never called with arguments from the file.
3. The result is checked: numbers, text, lists, tuples, dictionaries and numeric arrays, none of them twice, with limited nesting.

Sources: the specification in CPython's pickletools.py; numpy's ndarray.__reduce__ and dtype.__reduce__ (documented under __setstate__).
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import struct
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from robustlip.errors import BadInput

MAX_OPCODES = 16_000_000  # each number is one: seven times the paper's 2.4 million weights
MAX_CONTAINERS = 1_000_000  # a list costs 60 bytes of memory per byte of the file; a weight matrix has one per row
MAX_STACK = 10_000  # picklers write lists in portions of 1,000
MAX_DEPTH = 12
MAX_RANK = 8

_RECONSTRUCT, _NDARRAY, _DTYPE, _SCALAR = "_reconstruct", "ndarray", "dtype", "scalar"
# numpy 2 renamed numpy.core to numpy._core; both occur in files.
NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _DTYPE,
}


def _refuse(of: str, what: str) -> NoReturn:
    raise BadInput(
        f"expected plain numbers, text, lists, dictionaries and numeric arrays in {of}, got {what}; nothing of it was run, do not trust it"
    )


# ------------------------------------------------------------------------------------------------ first barrier


class _Abstract:
    """A value in the scan: its kind, and for text and names the value itself."""

    __slots__ = ("kind", "value")

    def __init__(self, kind: str, value: str = "") -> None:
        self.kind, self.value = kind, value


_MARK, _NUMBER, _BYTES, _TUPLE = (_Abstract(kind) for kind in ("mark", "number", "bytes", "tuple"))
_PUSH_NUMBER = {"BINFLOAT", "BININT", "BININT1", "BININT2", "NONE", "NEWTRUE", "NEWFALSE"}
_PUSH_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_PUSH_BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KEYS = ("number", "text")
_AGAIN = ("text", "bytes", "name", "dtype")  # may be fetched from the memo: they are immutable and contain no other values
_MAKES = {_RECONSTRUCT: "array unfinished", _DTYPE: "dtype unfinished", _SCALAR: "number"}


class _Scan:
    """The stack machine on kinds. One method per group of instructions."""

    def __init__(self, of: str) -> None:
        self.of = of
        self.stack: list[_Abstract] = []
        self.memo: list[_Abstract] = []
        self.containers = 0

    def run(self, data: bytes) -> None:
        count, end = 0, -1
        try:
            for opcode, argument, position in pickletools.genops(data):
                count += 1
                name = opcode.name
                if name in _PUSH_NUMBER:
                    self.stack.append(_NUMBER)
                elif name == "STOP":
                    end = position or 0
                else:
                    self.other(name, argument)
                if count > MAX_OPCODES or len(self.stack) > MAX_STACK or self.containers > MAX_CONTAINERS:
                    _refuse(self.of, f"more than {MAX_OPCODES} numbers, {MAX_CONTAINERS} lists or {MAX_STACK} open values")
        except BadInput:
            raise
        except (ValueError, IndexError, struct.error, OverflowError) as error:
            raise BadInput(f"expected a complete pickle in {self.of}, got a truncated or malformed one ({error}); copy the file again") from None
        if end != len(data) - 1:
            _refuse(self.of, "bytes after its end")
        if len(self.stack) != 1:
            _refuse(self.of, f"{len(self.stack)} values instead of one")

    def pop(self) -> _Abstract:
        if not self.stack or self.stack[-1] is _MARK:
            _refuse(self.of, "an instruction without its operand")
        return self.stack.pop()

    def to_mark(self) -> list[_Abstract]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                taken = self.stack[i + 1 :]
                del self.stack[i:]
                return taken
        _refuse(self.of, "the end of a list without its beginning")

    def target(self, kind: str) -> None:
        if not self.stack or self.stack[-1].kind != kind:
            _refuse(self.of, f"an instruction that fills a {kind} without one")

    def other(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSH_TEXT:
            stack.append(_Abstract("text", argument))
        elif name in _PUSH_BYTES:
            stack.append(_BYTES)
        elif name == "LONG1":
            if abs(argument) >= 2**63:
                _refuse(self.of, "an integer of more than 64 bits")
            stack.append(_NUMBER)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            self.containers += 1
            stack.append(_Abstract("list" if name == "EMPTY_LIST" else "dict"))
        elif name == "TUPLE" or name in _TUPLES:
            self.containers += 1
            for _ in self.to_mark() if name == "TUPLE" else range(_TUPLES[name]):
                if name != "TUPLE":
                    self.pop()
            stack.append(_TUPLE)
        elif name in ("APPEND", "APPENDS"):
            _ = self.pop() if name == "APPEND" else self.to_mark()
            self.target("list")
        elif name in ("SETITEM", "SETITEMS"):
            pairs = self.to_mark() if name == "SETITEMS" else [self.pop(), self.pop()][::-1]
            if len(pairs) % 2 or any(key.kind not in _KEYS for key in pairs[::2]):
                _refuse(self.of, "a dictionary whose keys are not text or numbers")
            self.target("dict")
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            # In order only, because the C unpickler allocates memory up to the index.
            if not stack or stack[-1] is _MARK or (name != "MEMOIZE" and argument != len(self.memo)):
                _refuse(self.of, "a memo that is not filled in order")
            self.memo.append(stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            if argument >= len(self.memo) or self.memo[argument].kind not in _AGAIN:
                _refuse(self.of, "a list, dictionary or array that is used twice or contains itself")
            stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self.named(name, argument)
        elif name == "REDUCE":
            arguments, called = self.pop(), self.pop()
            if called.kind != "name" or called.value not in _MAKES or arguments.kind != "tuple":
                _refuse(self.of, "a call of something that does not make an array")
            stack.append(_Abstract(_MAKES[called.value]))
        elif name == "BUILD":
            state, made = self.pop(), self.pop()
            if state.kind != "tuple" or not made.kind.endswith(" unfinished"):
                _refuse(self.of, "a state of something that is not an array or its type")
            made.kind = made.kind.removesuffix(" unfinished")
            stack.append(made)
        elif name not in ("PROTO", "FRAME"):
            _refuse(self.of, f"the pickle instruction {name}")

    def named(self, name: str, argument: Any) -> None:
        if name == "GLOBAL":
            module, _, attribute = str(argument).partition(" ")
        else:
            second, first = self.pop(), self.pop()
            if second.kind != "text" or first.kind != "text":
                _refuse(self.of, "a name that is not text")
            module, attribute = first.value, second.value
        if (module, attribute) not in NAMES:
            _refuse(self.of, f"the name {f'{module}.{attribute}'[:80]!r}")
        self.stack.append(_Abstract("name", NAMES[module, attribute]))


def scan(data: bytes, of: str) -> None:
    """Raises BadInput unless the pickle `data` contains only plain data and numpy arrays. Builds and runs nothing. of: its name for messages."""
    _Scan(of).run(data)


# ------------------------------------------------------------------------------------------------ second barrier

_ITEM = re.compile(r"b1|[iuf][248]|[iu]1|O[48]?")


def _whole(value: Any) -> bool:
    return type(value) is int


class _Type:
    """Substitute for a dtype: a numeric one, or 'O'."""

    __slots__ = ("code", "done")

    def __init__(self, *arguments: Any) -> None:
        if len(arguments) != 3 or type(arguments[0]) is not str or not _ITEM.fullmatch(arguments[0]):
            raise ValueError(f"an array of type {str(arguments[:1])[:60]}")
        self.code, self.done = arguments[0], False

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, size, alignment, flags): structured types have more.
        if self.done or type(state) is not tuple or len(state) != 8 or state[2:7] != (None, None, None, -1, -1):
            raise ValueError("an array type with fields, a shape or metadata")
        if not _whole(state[0]) or not _whole(state[7]) or type(state[1]) is not str or state[1] not in ("<", ">", "|", "="):
            raise ValueError("an array type of an unknown version")
        # Object types have flags; a numeric type must not.
        if not self.object and state[7] != 0:
            raise ValueError("a numeric array type with flags")
        self.code, self.done = ("O" if self.object else state[1] + self.code), True

    @property
    def object(self) -> bool:
        return self.code.startswith("O")


class _Array:
    """Substitute for an ndarray: checked bytes and a shape, or for 'O' a list."""

    __slots__ = ("data", "fortran", "shape", "type")

    def __init__(self, *arguments: Any) -> None:
        if len(arguments) != 3 or not isinstance(arguments[0], _Substitute) or arguments[0].name != _NDARRAY or arguments[1:] != ((0,), b"b"):
            raise ValueError("an array of an unknown class")
        self.data: Any = None

    def __setstate__(self, state: Any) -> None:
        if self.data is not None or type(state) is not tuple or len(state) != 5 or state[0] != 1:
            raise ValueError("an array of an unknown version")
        _, shape, kind, fortran, data = state
        if type(shape) is not tuple or len(shape) > MAX_RANK or not all(_whole(n) and 0 <= n < 2**31 for n in shape):
            raise ValueError("an array of an impossible shape")
        if not isinstance(kind, _Type) or not kind.done or type(fortran) is not bool:
            raise ValueError("an array without a type")
        count = math.prod(shape)
        if kind.object:
            if type(data) is not list or len(data) != count:
                raise ValueError(f"an array of shape {shape} with other data")
        elif type(data) is not bytes or len(data) != count * np.dtype(kind.code).itemsize:
            raise ValueError(f"an array of shape {shape} with other data")
        self.shape, self.type, self.fortran, self.data = shape, kind, fortran, data

    def numbers(self) -> np.ndarray:
        return np.frombuffer(self.data, np.dtype(self.type.code)).reshape(self.shape, order="F" if self.fortran else "C")


def _number(*arguments: Any) -> float | int | bool:
    """Substitute for numpy's scalar(dtype, bytes)."""
    kind, data = arguments if len(arguments) == 2 else (None, None)
    if not isinstance(kind, _Type) or not kind.done or kind.object or type(data) is not bytes or len(data) != np.dtype(kind.code).itemsize:
        raise ValueError("a number of an unknown type")
    return np.frombuffer(data, np.dtype(kind.code))[0].item()


def _not_called(*_: Any) -> NoReturn:
    raise ValueError("a call of a class")


class _Substitute:
    """A resolved name of the file: callable, and no attribute can be set."""

    __slots__ = ("name",)
    name: str

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "name", name)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise ValueError("a name that is given attributes")

    def __call__(self, *arguments: Any) -> Any:
        makers: dict[str, Callable[..., Any]] = {_RECONSTRUCT: _Array, _DTYPE: _Type, _SCALAR: _number}
        return makers.get(self.name, _not_called)(*arguments)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            raise ValueError(f"the name {f'{module}.{name}'[:80]!r}")
        return _Substitute(NAMES[module, name])

    def persistent_load(self, pid: Any) -> NoReturn:
        raise ValueError("a reference to something outside the file")


# ------------------------------------------------------------------------------------------------ third barrier


def load(data: bytes, of: str) -> Any:
    """The object that numpy saved in an array of shape () and type object: `np.save(file, {…})`. Raises BadInput for anything but plain data.

    Returns float, int, bool, str, None, and lists, tuples, dictionaries and numeric arrays (read-only) of them. of: its name for messages.
    """
    scan(data, of)
    try:
        top = _Unpickler(io.BytesIO(data)).load()
    except BadInput:
        raise
    except Exception as error:  # the file can cause any exception; all mean that it is refused
        _refuse(of, str(error)[:200] or type(error).__name__)
    if not isinstance(top, _Array) or top.data is None or not top.type.object or top.shape != ():
        _refuse(of, "something other than one object in an array of shape ()")
    return _plain(top.data[0], of, set(), 0)


def _plain(value: Any, of: str, seen: set[int], depth: int) -> Any:
    kind = type(value)
    if kind in (float, int, bool, str) or value is None:
        return value
    if kind is _Array and value.data is not None and not value.type.object:
        return value.numbers()
    if kind not in (list, tuple, dict):
        _refuse(of, "an array of objects inside another object" if kind is _Array else f"a value of kind {kind.__name__.strip('_')}")
    if depth >= MAX_DEPTH:
        _refuse(of, f"data nested more than {MAX_DEPTH} deep")
    if id(value) in seen and value != ():
        _refuse(of, "a list that is used twice or contains itself")
    seen.add(id(value))  # all values stay alive while the result does, so ids are unique
    if kind is dict:
        return {key: _plain(item, of, seen, depth + 1) for key, item in value.items()}
    if kind is list and all(type(item) is float for item in value):
        return value
    return kind(_plain(item, of, seen, depth + 1) for item in value)
