"""What other packages add to robustlip: entry points, so that none of our files has to know them.

    [project.entry-points."robustlip.ops"]        # called once, with no arguments: it registers operations (robustlip.ops.register_elementwise)
    softsign = "their_package.robustness:register"

    [project.entry-points."robustlip.methods"]    # name = a robustlip.certifiers.methods.Method
    [project.entry-points."robustlip.attacks"]    # name = a callable of options that gives a robustlip.attacks.Attack
    [project.entry-points."robustlip.data"]       # name = a callable (split, data_dir) that gives a robustlip.data.Dataset

An entry point is code that its package runs in this process, as any import of that package does; what it registers is trusted as our own files are.
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from typing import Any

from robustlip.errors import BadInput, first_line

GROUPS = ("robustlip.ops", "robustlip.methods", "robustlip.attacks", "robustlip.data")


@functools.cache
def plugins(group: str) -> dict[str, Any]:
    """{name: object} of the entry points of a group. Raises BadInput for one that cannot be loaded, and for two of one name."""
    found: dict[str, Any] = {}
    for point in entry_points(group=group):
        owner = point.dist.name if point.dist is not None else "a package"
        if point.name in found:
            raise BadInput(f"expected one entry point {point.name!r} of {group}, got another one of {owner}; uninstall one of the two packages")
        try:
            found[point.name] = point.load()
        except Exception as error:
            raise BadInput(
                f"expected the entry point {point.name!r} of {group} in {owner} to load, got {type(error).__name__}: {first_line(error)}; "
                f"mend or uninstall {owner}"
            ) from error
    return found
