"""The errors that a person meets, and the exit code that each one ends a command with.

Every message has three parts: what was expected, what was got, and what to do about it.
"""

from __future__ import annotations


def first_line(error: BaseException, limit: int = 200) -> str:
    """What somebody else's error says, for the middle of a sentence: its first line, cut, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:limit]


class RobustlipError(Exception):
    """Base of all errors that robustlip raises on purpose."""

    exit_code = 1


class BadInput(RobustlipError, ValueError):
    """Input that cannot be used: file, recipe, weights, labels, radius, name. Exit code 2."""

    exit_code = 2


class UnsupportedLayer(BadInput):
    """A layer for which no rule is proved. There is no default constant (docs/theory.md, section 3)."""


class DataUnavailable(BadInput):
    """A data set that is neither on the hub (no network) nor in a local folder."""


class CertificateViolation(RobustlipError):
    """An attack succeeded inside a certified radius: a soundness bug. Exit code 3, never swallowed."""

    exit_code = 3
