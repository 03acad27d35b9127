"""A checkpoint of the published code: an .npz whose members are Python objects.

Checked in the code of arXiv 2507.13338 (its whole public history): `args`, a dictionary of options; `results`, the contents of its logs;
`weights_checkpoint_0`, `weights_checkpoint_1` …, dictionaries from the position of a weight, 0, 1, …, to nested lists of numbers; and
`allow_pickle`, written by numpy versions that took this argument for an array. An older form with one member `weights` exists in its
history from 7 to 9 May 2025 only, when a bug disabled every scale of the model; it is refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustlip.errors import BadInput
from robustlip.importing.archive import members, read_object
from robustlip.importing.logs import Log, log_of

_WEIGHTS = "weights_checkpoint_"
MAX_WEIGHTS = 2 + 6 * 1024


@dataclass(frozen=True)
class Checkpoint:
    """weights: matrices (fan_out, fan_in) in the order of the model, float64 (embedding: (width, vocabulary)). log: the results of the run.

    number, count: index of the checkpoint, number of checkpoints. sha256: of the file. left_out: members that were not read.
    """

    log: Log
    weights: tuple[np.ndarray, ...]
    number: int
    count: int
    sha256: str
    left_out: tuple[str, ...]


def read_checkpoint(path: Path, number: int | None = None) -> Checkpoint:
    """Weights `number` (default: the last) of a checkpoint file. No code from the file is run. Raises BadInput for anything else."""
    names = members(path)
    if "args" not in names:
        raise BadInput(f"expected a checkpoint with args in {path.name}, got {', '.join(names[:8]) or 'no member'}; it is not of the paper's code")
    steps = sorted(int(n.removeprefix(_WEIGHTS)) for n in names if n.startswith(_WEIGHTS) and n.removeprefix(_WEIGHTS).isdecimal())
    if "weights" in names:
        raise BadInput(
            f"expected weights_checkpoint_0, … in {path.name}, got the older member weights, written when the published code ignored "
            f"every scale of the model (7 to 9 May 2025); save it again with later code"
        )
    if not steps:
        raise BadInput(f"expected weights_checkpoint_0, … in {path.name}, got {', '.join(names[:8])}; it has no weights")
    number = steps[-1] if number is None else number
    if number not in steps:
        raise BadInput(f"expected a checkpoint among {steps[:20]} of {path.name}, got {number}; name one of them")
    parameters = read_object(path, "args")
    results = read_object(path, "results") if "results" in names else {}
    weights = _matrices(read_object(path, f"{_WEIGHTS}{number}"), path.name)
    known = {"args", "results", "allow_pickle", *(f"{_WEIGHTS}{i}" for i in steps)}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Checkpoint(log_of(parameters, results), weights, number, len(steps), digest, tuple(sorted(set(names) - known)))


def _matrices(weights: Any, file: str) -> tuple[np.ndarray, ...]:
    """{0: rows, 1: rows, …} → matrices, float64, finite."""
    if not isinstance(weights, dict) or not 1 <= len(weights) <= MAX_WEIGHTS or any(type(key) is not int for key in weights):
        raise BadInput(f"expected weights by their position 0, 1, … in {file}, got something else; it is not a checkpoint of the paper's code")
    if sorted(weights) != list(range(len(weights))):
        raise BadInput(f"expected weights 0 to {len(weights) - 1} in {file}, got others; some are missing")
    return tuple(_matrix(weights[i], f"weight {i} of {file}") for i in range(len(weights)))


def _matrix(value: Any, of: str) -> np.ndarray:
    rows = value
    if isinstance(rows, np.ndarray):
        flat = rows.ndim == 2 and rows.dtype.kind in "fiu"
    else:
        # Every number is checked, because numpy would also read text as numbers.
        flat = isinstance(rows, list) and all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows) and bool(rows)
        flat = flat and all(type(number) is float or type(number) is int for row in rows for number in row)
    if not flat or not len(rows) or not len(rows[0]):
        raise BadInput(f"expected a matrix of numbers as {of}, got something else; it is not a checkpoint of the paper's code")
    try:
        matrix = np.array(rows, dtype=np.float64)
    except OverflowError:
        raise BadInput(f"expected finite numbers in {of}, got one beyond float64; it is not usable") from None
    if not np.isfinite(matrix).all():
        raise BadInput(f"expected finite numbers in {of}, got NaN or infinity; it is not usable")
    return matrix
