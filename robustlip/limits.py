"""The largest sizes that a file may ask for. Far above honest use (the paper's largest model has 145 million parameters), and low enough that a
file of a few hundred bytes cannot keep a machine busy for days before anybody notices."""

from __future__ import annotations

from typing import Any

# Of models: recipes, and the configurations in model files.
MODEL: dict[str, int] = {
    "blocks": 1_000, "width": 2**20, "mlp_hidden": 2**22, "heads": 2**12, "vocabulary_size": 2**24, "distance_bias": 2**20, "patch": 2**12,
    "classes": 2**24,
}  # fmt: skip
LAYERS = 10_000  # entries of widths
WIDTH = 2**20  # of one of them
SIDE = 2**16  # of an image
PARAMETERS = 10**11
TENSORS = 100_000  # of one file

# Of training.
STEPS = 10**9
BATCH = 2**20
CONTEXT = 2**20
ROWS = 10**9  # of data that are asked for

# Of evaluation.
RADII = 1_000  # of one threat
PAIRS = 1_000
THREATS = 100  # of one pair or policy
ATTACKS = 100  # of one threat
SEARCH = 10**6  # starts and steps of the search for the most sensitive direction, and options of attacks

# Of verification, where a policy or the command line says nothing else.
VERIFIED_ROWS = 100_000
VERIFIED_SECONDS = 3_600.0
VERIFIED_AT_ONCE = 4_096


def number(value: Any) -> str:
    """A number for a message: in full, or its size where it has too many digits."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return f"a number of {len(str(abs(value))) if abs(value) < 10**4000 else 'thousands of'} digits"
    return repr(value)[:60]
