"""Formatting of numbers in tables."""

from __future__ import annotations

import decimal
import math


def figure(value: float | None, digits: int = 4) -> str:
    """A number for a table; '–' for None."""
    return "–" if value is None else f"{value:.{digits}g}"


def upward(value: float | None, digits: int = 4) -> str:
    """An upper bound for a table, rounded up so that the shown number is still a bound; '–' for None."""
    if value is None or not math.isfinite(value):
        return figure(value, digits)
    rounded = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING).create_decimal_from_float(value)
    return f"{rounded:g}" if 1e-4 <= abs(value) < 10**digits or value == 0 else f"{rounded:.{digits - 1}e}"
