"""The JSON logs of the published code, and the Lipschitz constant that it computes from the norms in them.

A log contains `parameters` (the run's options) and `results`: for each matrix, by its name (q0, mlp_in1, embed …), a list `weight_norm` over the
steps. That is σ·√(fan_in/fan_out) of a matrix (RMS→RMS), for the embedding the largest RMS norm of a token's vector, and for an
unembedding trained with use_unembed the largest RMS norm of a row, which is not an operator norm. The constant is computed from the last
entries, which may belong to other weights than those saved: mistake 6 of attacks/formulas.py. Neither formula
includes final_scale, residual_scale or a substitute for LayerNorm, and both count blocks in the order of their names, while the model applies
the last named block first (see `convert`).
Source: utils.py and (until July 2025) experiment/train.py of the code of arXiv 2507.13338.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustlip.errors import BadInput
from robustlip.files import read_json

MAX_LOG = 256 * 2**20  # bytes; a log with an entry for each of 2,000 steps has a few
MAX_NORM = 1e30  # products of all norms of a deep model may still overflow; the formula is then infinite
GELU_DIVISOR = 1.1289
MAX_BLOCKS = 1024


@dataclass(frozen=True)
class Log:
    """Results of a run. norms: the last weight_norm of each matrix, by name. claimed: its own Lipschitz constant, None without one.

    accuracy, loss: the last validation results, in [0, 1] and nats, None without one.
    """

    parameters: Mapping[str, Any]
    norms: Mapping[str, float]
    claimed: float | None
    accuracy: float | None
    loss: float | None


def count(parameters: Mapping[str, Any], key: str, most: int = MAX_BLOCKS) -> int:
    """An integer of at least 1 from the options of a run. Raises BadInput for anything else."""
    value = parameters.get(key)
    if type(value) is not int or not 1 <= value <= most:
        raise BadInput(f"expected {key} between 1 and {most} in the file's options, got {str(value)[:40]!r}; it does not come from the paper's code")
    return value


def real(parameters: Mapping[str, Any], key: str, default: float = 1.0) -> float:
    """A finite number above 0 from the options of a run. Raises BadInput for anything else."""
    value = parameters.get(key, default)
    if type(value) not in (int, float) or not 0 < value <= MAX_NORM:
        raise BadInput(f"expected {key} above 0 in the file's options, got {str(value)[:40]!r}; no other value is supported")
    return float(value)


def log_of(parameters: Any, results: Any) -> Log:
    """A log from its two parts. Raises BadInput if they are not tables, or if a norm is not a finite number of at least 0."""
    if not isinstance(parameters, dict) or not isinstance(results, dict) or not all(isinstance(key, str) for key in (*parameters, *results)):
        raise BadInput("expected tables of parameters and results, got something else; give a log or checkpoint of the paper's code")
    norms = {}
    for name, entry in results.items():
        if isinstance(entry, dict) and "weight_norm" in entry:
            norms[name] = _last(entry["weight_norm"], f"weight_norm of {name[:40]!r}")
    claimed = results.get("lipschitz_constant")
    accuracy, loss = (_figure(results.get(key), key) for key in ("accuracies", "val_losses"))
    return Log(parameters, norms, None if claimed is None else _last([claimed], "lipschitz_constant"), accuracy, loss)


def _figure(values: Any, of: str) -> float | None:
    """The last validation result; None if there is none, or none that is finite: the loss of a run that diverged is NaN."""
    if values is None or values == []:
        return None
    if isinstance(values, list) and type(values[-1]) is float and not math.isfinite(values[-1]):
        return None
    return _last(values, of)


def _last(values: Any, of: str) -> float:
    value: Any = values[-1] if isinstance(values, list) and values else None
    if type(value) not in (int, float) or not abs(value) <= MAX_NORM or value < 0:
        raise BadInput(f"expected a list of numbers from 0 to {MAX_NORM:g} as {of}, got {str(value)[:60]}; the log is not usable")
    return float(value)


def read_log(path: Path) -> Log:
    """Reads a JSON log. Raises BadInput if it is missing, too large, not JSON or of another format."""
    document = read_json(path, "a JSON log", MAX_LOG, "it is not one of the paper's")
    if not isinstance(document, dict) or "parameters" not in document or "results" not in document:
        raise BadInput(f"expected parameters and results in {path.name}, got neither or one; it is not a log of the paper's code")
    return log_of(document["parameters"], document["results"])


# ------------------------------------------------------------------------------------------------ the formulas


def _norm(log: Log, name: str) -> float:
    if name not in log.norms:
        raise BadInput(f"expected the norm of {name} in the log, got {', '.join(log.norms)[:80] or 'none'}; it is not complete")
    return log.norms[name]


def _mlp(log: Log) -> float:
    """The product of three matrices, for every value of num_blocks."""
    return math.prod(_norm(log, name) for name in ("mlp_in", "mlp_0", "mlp_out"))


def newhouse_june(log: Log) -> float:
    """The constant as published (since 12 June 2025), ∞-RMS, for one-hot characters: docs/theory.md, section 5, with its mistakes."""
    if log.parameters.get("data") == "cifar":
        return _mlp(log)
    blocks, scale = count(log.parameters, "num_blocks"), real(log.parameters, "softmax_scale")
    alpha = 1 / (2 * blocks)
    total, size = _norm(log, "embed"), 1.0
    for i in range(blocks):
        q, k, v, w, up, down = (_norm(log, f"{name}{i}") for name in ("q", "k", "v", "w", "mlp_in", "mlp_out"))
        values, mlp = w * v / 3, down * up / GELU_DIVISOR
        total *= 1 - alpha + alpha * values * (1 + 2 * size * size * q * k) * scale
        total *= 1 - alpha + alpha * mlp
        size *= (1 - alpha + alpha * values) * (1 - alpha + alpha * mlp)
    return total * _norm(log, "out")


def newhouse_may(log: Log) -> float:
    """The formula of the code when the released checkpoints were made (May 2025): L ← (1−α)L + αΛ, without the factor L in the second term, with
    Λ_att = σ_q σ_k σ_v σ_o and Λ_mlp = σ_in σ_out."""
    if log.parameters.get("data") == "cifar":
        return _mlp(log)
    blocks = count(log.parameters, "num_blocks")
    alpha = 1 / (2 * blocks)
    total = _norm(log, "embed")
    for i in range(blocks):
        for names in (("q", "k", "v", "w"), ("mlp_in", "mlp_out")):
            total = (1 - alpha) * total + alpha * math.prod(_norm(log, f"{name}{i}") for name in names)
    return total * _norm(log, "out")


FORMULAS: dict[str, Callable[[Log], float]] = {"published": newhouse_june, "published before June 2025": newhouse_may}
AGREEMENT = 1e-4  # relative; the code works in float32


def explained(log: Log) -> str | None:
    """Which formula gives the log's own constant; None if there is no constant or it comes from another formula."""
    if log.claimed is None:
        return None
    values = {name: formula(log) for name, formula in FORMULAS.items()}
    return next((name for name, value in values.items() if math.isclose(value, log.claimed, rel_tol=AGREEMENT)), None)
