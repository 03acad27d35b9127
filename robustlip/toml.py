"""Writing TOML: cards and recipes. The standard library can only read it."""

from __future__ import annotations

from typing import Any

import tomli_w  # imported here, not in the function: without it training has to fail before the first step, not when it writes the card


def toml_text(data: dict[str, Any]) -> str:
    """A dictionary of strings, numbers, booleans, lists and tables as TOML; entries that are None are left out."""
    return tomli_w.dumps(_said(data))


def _said(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _said(entry) for key, entry in value.items() if entry is not None}
    return [_said(entry) for entry in value] if isinstance(value, list | tuple) else value
