"""The largest sizes that a file may request. They are far above legitimate use (the paper's largest model has 145 million parameters), and low enough
that a file of a few hundred bytes cannot occupy a machine for days."""

from __future__ import annotations

from typing import Any

# Limits of models: recipes, and configurations in model files.
MODEL: dict[str, int] = {
    "blocks": 1_000, "width": 2**20, "mlp_hidden": 2**22, "heads": 2**12, "vocabulary_size": 2**24, "distance_bias": 2**20, "patch": 2**12,
    "classes": 2**24,
}  # fmt: skip
LAYERS = 10_000  # number of layer widths
WIDTH = 2**20  # of one layer
SIDE = 2**16  # of an image
PARAMETERS = 10**11
TENSORS = 100_000  # per file

# Limits of training.
STEPS = 10**9
BATCH = 2**20
CONTEXT = 2**20
ROWS = 10**9  # rows that may be requested

# Limits of evaluation.
RADII = 1_000  # per threat
PAIRS = 1_000
THREATS = 100  # per pair or policy
ATTACKS = 100  # per threat
SEARCH = 10**6  # starts and steps of the search for the most sensitive direction, and options of attacks

# Default limits of verification.
VERIFIED_ROWS = 100_000
VERIFIED_SECONDS = 3_600.0
VERIFIED_AT_ONCE = 4_096


def number(value: Any) -> str:
    """A number for a message: in full, or its number of digits if that is large."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return f"a number of {len(str(abs(value))) if abs(value) < 10**4000 else 'thousands of'} digits"
    return repr(value)[:60]
