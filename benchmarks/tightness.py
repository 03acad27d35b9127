"""Tightness of certificates: the median of certified radius / smallest successful attack, by model, threat and method.

    python benchmarks/tightness.py --json tightness.json            # all rows; attacks are cached in --cache

Over correctly classified test samples. The attack is the package's strongest (`min`: direct minimum-norm descent, then PGD at decreasing radii). The
largest possible value is 1. The JSON is a list of {"model", "threat", "method", "median_ratio", "n", "seconds",
"forward_passes"}: the elapsed time of certification, and its processor time in units of plain forward passes of the same batches, measured between
the batches. Versions and threads are printed at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from reporting import machine

from robustlip.attacks.minnorm import MinimumRadius
from robustlip.certifiers import METHODS, certify
from robustlip.certifiers.samples import batches
from robustlip.data import load_data
from robustlip.errors import UnsupportedLayer
from robustlip.files import write_text
from robustlip.models import zoo
from robustlip.threats import Threat, parse_threat


@dataclass(frozen=True)
class Row:
    """One row of the table: samples are drawn until `samples` are classified correctly. context: tokens of a window."""

    model: str
    threat: str
    data: str
    context: int | None = None


ROWS = (
    Row("digits-mlp-lipschitz", "l2", "digits:test"),
    Row("digits-mlp-baseline", "l2", "digits:test"),
    Row("digits-transformer-lipschitz", "embedding-l2", "digits:test"),
    Row("digits-transformer-lipschitz", "l2", "digits:test"),
    Row("shakespeare-gpt-per-head", "embedding-l2@-1", "tiny_shakespeare:test", 64),
    Row("shakespeare-gpt-per-head", "embedding-l2", "tiny_shakespeare:test", 64),
    Row("shakespeare-gpt-published-2", "embedding-l2@-1", "tiny_shakespeare:test", 64),
    Row("shakespeare-gpt-baseline", "embedding-l2@-1", "tiny_shakespeare:test", 64),
    Row("shakespeare-gpt-lipschitz", "embedding-l2@-1", "tiny_shakespeare:test", 64),
    Row("shakespeare-gpt-lipschitz", "embedding-l2", "tiny_shakespeare:test", 64),
)


def right_samples(row: Row, count: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The model and `count` samples that it classifies correctly (fewer if the split has fewer)."""
    model = zoo.load(row.model)
    data = load_data(row.data, limit=6 * count if row.context else None, context=row.context, vocabulary=model.vocabulary)
    with torch.no_grad():
        right = torch.cat([model.scores(data.x[part]).argmax(-1) == data.y[part] for part in batches(len(data), 64)])
    keep = right.nonzero()[:count, 0]
    return model, data.x[keep], data.y[keep]


def attacked(row: Row, model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, threat: Threat, cache: Path) -> np.ndarray:
    """Radii of the attack (N,), cached by model, threat and number of samples."""
    path = cache / f"{row.model}.{threat.name}.{len(x)}.json"
    weights = zoo.card(row.model)["weights_sha256"]
    done: list[float] = []
    if path.exists() and (kept := json.loads(path.read_text()))["weights_sha256"] == weights:
        done = kept["radius"]
    for part in batches(len(x), 20):
        if part.stop <= len(done):
            continue
        done = done[: part.start] + MinimumRadius()(model, x[part], y[part], threat).radius.tolist()
        write_text(path, json.dumps({"weights_sha256": weights, "radius": done}))
        print(f"{row.model} {threat.name}: attacked {len(done)} of {len(x)}", flush=True)
    return np.array(done)


def processor_time(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


@torch.no_grad()
def forward(model: torch.nn.Module, x: torch.Tensor) -> None:
    model.scores(x)  # type: ignore[operator]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--cache", type=Path, default=Path("runs/tightness"))
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of the rows to run; default: all")
    parser.add_argument("--methods", nargs="*", help="methods to run; default: best and all others except lipsdp")
    parser.add_argument("--attack-only", action="store_true")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    methods = options.methods or [*(name for name in METHODS if name != "lipsdp"), "best"]
    found = []
    for number, row in enumerate(ROWS):
        if options.rows and number not in options.rows:
            continue
        model, x, y = right_samples(row, options.samples)
        threat = parse_threat(row.threat)
        reach = attacked(row, model, x, y, threat, options.cache)
        if options.attack_only:
            continue
        for method in methods:
            started, parts, spent, plain = time.perf_counter(), [], 0.0, 0.0
            try:
                for part in batches(len(x), 20):
                    spent += processor_time(lambda: parts.append(certify(model, x[part], y[part], threat, method).radius))  # noqa: B023 (run at once)
                    plain += min(processor_time(lambda: forward(model, x[part])) for _ in range(3))  # noqa: B023
            except UnsupportedLayer:
                continue
            seconds = time.perf_counter() - started
            radius = np.concatenate(parts)
            if (radius >= reach).any():
                raise SystemExit(f"violation: {row.model} {threat.name} {method}: a certified radius is not below a successful attack's")
            found.append(
                {
                    "model": row.model, "threat": threat.name, "method": method, "median_ratio": float(np.median(radius / reach)),
                    "n": len(x), "seconds": round(seconds, 2), "forward_passes": round(spent / plain, 1),
                }
            )  # fmt: skip
            line = "{model:32} {threat:18} {method:16} {median_ratio:.3f}  n={n}  {seconds} s, {forward_passes} forward passes"
            print(line.format(**found[-1]), flush=True)
            if options.json:
                write_text(options.json, json.dumps(found, indent=1))
    print(machine())


if __name__ == "__main__":
    main()
