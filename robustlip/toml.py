"""TOML that is written: cards and recipes. The standard library only reads it."""

from __future__ import annotations

from typing import Any

import tomli_w  # here and not where it is used: training without it has to fail before the first step, not at its card


def toml_text(data: dict[str, Any]) -> str:
    """A dictionary of strings, numbers, booleans, lists and tables as TOML. None is left out."""
    return tomli_w.dumps(_said(data))


def _said(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _said(entry) for key, entry in value.items() if entry is not None}
    return [_said(entry) for entry in value] if isinstance(value, list | tuple) else value
