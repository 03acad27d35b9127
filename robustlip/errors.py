"""All errors that users see, and the exit code of each.

Every message has three parts: what was expected, what was received, and the remedy.
"""

from __future__ import annotations


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's message, cut to `limit` characters, for use in another message; its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0][:limit]


class RobustlipError(Exception):
    """Base of all errors that robustlip raises on purpose."""

    exit_code = 1


class BadInput(RobustlipError, ValueError):
    """Input that cannot be used: file, recipe, weights, labels, radius, name. Exit code 2."""

    exit_code = 2


class UnsupportedLayer(BadInput):
    """A layer without a proved rule. There is no default constant (docs/theory.md, section 3)."""


class DataUnavailable(BadInput):
    """A data set that is neither on the hub (no network) nor in a local folder."""


class CertificateViolation(RobustlipError):
    """An attack succeeded inside a certified radius: a soundness bug. Exit code 3; never caught."""

    exit_code = 3
