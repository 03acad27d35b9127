"""Calls the command line in this process."""

from __future__ import annotations

from robustlip import cli


def run(*arguments: object) -> int:
    """The exit code of `robustlip ARGUMENTS`; 1 where it ends with a sentence instead of a number."""
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0
