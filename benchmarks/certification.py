"""Global certification of a batch against its plain forward pass, constants cached. Target: at most 1.5 times.

    python benchmarks/certification.py [--json FILE]

Both run in one process on the same tensors, in the model's own dtype; medians of repeated runs, alternating. The last column is the time to certify
the executed float32 program with rounding, relative to exact arithmetic (evaluated in float64) for the same weights.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from reporting import finish

from robustlip.certifiers import certify
from robustlip.models import LipschitzGPT, LipschitzMLP, LipschitzTransformer
from robustlip.threats import parse_threat

CASES = {
    "mlp 64-256-256-10, batch 1024": (lambda: LipschitzMLP([64, 256, 256, 10]), lambda: torch.rand(1024, 1, 8, 8), "l2"),
    "mlp 64-256-256-10, batch 4096": (lambda: LipschitzMLP([64, 256, 256, 10]), lambda: torch.rand(4096, 1, 8, 8), "l2"),
    "mlp 3072-1024-1024-10, batch 1024": (lambda: LipschitzMLP([3072, 1024, 1024, 10]), lambda: torch.rand(1024, 3, 32, 32), "linf"),
    "patch transformer 64x2, batch 256": (lambda: LipschitzTransformer((1, 8, 8), 2, 10), lambda: torch.rand(256, 1, 8, 8), "embedding-l2"),
    "gpt 256x3, context 256, batch 8": (
        lambda: LipschitzGPT("".join(map(chr, range(32, 97))), 256, 4, 3, distance_bias=64),
        lambda: torch.randint(65, (8, 256)),
        "embedding-l2",
    ),
}


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, repeats: int) -> dict[str, object]:
    build, draw, threat_name = CASES[name]
    torch.manual_seed(0)
    model, x = build().eval(), draw()
    with torch.no_grad():
        y = model.scores(x).argmax(-1)
    threat = parse_threat(threat_name)

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def certified() -> None:
        certify(model, x, y, threat, "global", batch_size=len(x))

    ideal, wide = copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x

    def in_exact_arithmetic() -> None:
        certify(ideal, wide, y, threat, "global", dtype="real", batch_size=len(x))

    runs = (forward, certified, in_exact_arithmetic)
    for run in runs:  # warm up, and fill the cache of constants
        run()
    times = [[seconds(run) for run in runs] for _ in range(repeats)]
    plain, proved, real = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "case": name, "threat": threat_name, "forward_s": plain, "certify_s": proved, "ratio": proved / plain,
        "real_s": real, "ratio_to_real": proved / real,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    rows = [measure(name, arguments.repeats) for name in CASES]
    for row in rows:
        times = f"forward {row['forward_s'] * 1e3:8.2f} ms  certify {row['certify_s'] * 1e3:8.2f} ms"
        print(f"{row['case']:<38} {row['threat']:<14} {times}  ratio {row['ratio']:.2f}  to exact arithmetic {row['ratio_to_real']:.2f}")
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
