"""Errors in a user's module: a file that does not parse, an undefined name, a forward that fails. They become BadInput with file and line."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from robustlip.errors import BadInput, RobustlipError, first_line

_SYSTEM = ("robustlip", "torch", "importlib")


def place(error: BaseException, spec: str) -> str:
    """', FILE, line N' of an exception from the import or call of `spec`: the innermost line in its own files, or else in any but our files."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f", {error.filename}, line {error.lineno}"
    frames = [frame for frame in _frames(error.__traceback__) if not frame[0].startswith("<") and _top(frame[2]) not in _SYSTEM]
    frames = [frame for frame in frames if _is_of(frame, spec)] or frames
    return f", {frames[-1][0]}, line {frames[-1][1]}" if frames else ""


def described(error: BaseException) -> str:
    """'NameError (name x is not defined)', or only the type if the message is empty."""
    kind = type(error).__name__
    return kind if not str(error) else f"{kind} ({first_line(error)})"


@contextmanager
def errors_of(*specs: str) -> Iterator[None]:
    """Converts any exception that passed through the files of a 'package.module:callable' inside the block to BadInput, SystemExit too: a model must
    not end a gate with exit code 0. Errors of robustlip, interrupts and exceptions from elsewhere are not changed."""
    try:
        yield
    except (RobustlipError, KeyboardInterrupt):
        raise
    except BaseException as error:
        frames = list(_frames(error.__traceback__))
        guilty = next((spec for spec in specs if ":" in spec and any(_is_of(frame, spec) for frame in frames)), None)
        if guilty is None:
            raise
        raise BadInput(
            f"expected a model that runs, got {described(error)} from {guilty!r}{place(error, guilty)}; run it on such inputs to see why"
        ) from error


def _top(name: str) -> str:
    return name.partition(".")[0]


def _frames(at: TracebackType | None) -> Iterator[tuple[str, int, str]]:
    """(file, line, module) from the outermost call to the innermost."""
    while at is not None:
        yield at.tb_frame.f_code.co_filename, at.tb_lineno, str(at.tb_frame.f_globals.get("__name__", ""))
        at = at.tb_next


def _is_of(frame: tuple[str, int, str], spec: str) -> bool:
    """Whether the frame belongs to the package that `spec` names, or to a file in the same folder; for an installed package only the former."""
    package = _top(spec.partition(":")[0])
    module: Any = sys.modules.get(package)
    if module is None or package in _SYSTEM or _top(frame[2]) in _SYSTEM:
        return False
    if _top(frame[2]) == package:
        return True
    found = [*getattr(module, "__path__", ()), getattr(module, "__file__", None)]
    places = [Path(path).resolve().parent for path in found if path]
    file = Path(frame[0]).resolve()
    libraries = [Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")]
    if any(library in (file, *file.parents) for library in libraries):
        return False
    return any(place in file.parents for place in places if not any(library in (place, *place.parents) for library in libraries))
