"""Extensions by other packages, through entry points.

    [project.entry-points."robustlip.ops"]        # called once, with no arguments: it registers operations (robustlip.ops.register_elementwise)
    softsign = "their_package.robustness:register"

    [project.entry-points."robustlip.methods"]    # name = a robustlip.certifiers.methods.Method
    [project.entry-points."robustlip.attacks"]    # name = a callable of options that returns a robustlip.attacks.base.Attack
    [project.entry-points."robustlip.data"]       # name = a callable (split, data_dir) that returns the whole split as a Dataset

Loading an entry point imports its package, so its code runs in this process and is trusted as robustlip's own code is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from robustlip.errors import BadInput, first_line

# The characters of a name, which is typed on a command line and written into certificates and tables.
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


@functools.cache
def _points(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group; packages are searched once per process."""
    return tuple(entry_points(group=group))


@functools.cache
def plugins(group: str) -> dict[str, Any]:
    """{name: object} for the entry points of a group. Raises BadInput if one cannot be loaded, and for two with the same name."""
    found: dict[str, Any] = {}
    for point in _points(group):
        owner = point.dist.name if point.dist is not None else "a package"
        if point.name in found:
            raise BadInput(f"expected one entry point {point.name!r} of {group}, got another one of {owner}; uninstall one of the two packages")
        try:
            found[point.name] = point.load()
        except Exception as error:
            raise BadInput(
                f"expected the entry point {point.name!r} of {group} in {owner} to load, got {type(error).__name__}: {first_line(error)}; "
                f"correct or uninstall {owner}"
            ) from error
    return found


def versions() -> dict[str, str]:
    """{package: version} of the packages that add operations or methods, because certificates depend on their proofs too."""
    points = [*_points("robustlip.ops"), *_points("robustlip.methods")]
    return {point.dist.name: point.dist.version for point in points if point.dist is not None}


def added(group: str, ours: Iterable[str], check: Callable[[Any], bool], what: str) -> dict[str, Any]:
    """`plugins(group)`, checked against our own names. Raises BadInput for a name that is in use or invalid, and for an object that `check` refuses.

    what: the object that is expected, for the message.
    """
    found, taken = plugins(group), {*ours, "best"}
    for name, value in found.items():
        if not _NAME.fullmatch(name):
            raise BadInput(f"expected lower-case letters, digits, - and _ in the names of {group}, got {name[:80]!r}; rename that entry point")
        if name in taken:
            raise BadInput(f"expected new names in {group}, got {name!r}, which robustlip uses itself; rename that entry point")
        if not check(value):
            raise BadInput(f"expected {what} as the entry point {name!r} of {group}, got {type(value).__name__}; correct that package")
    return found
