"""Guaranteed spectral norms compared with torch.linalg.matrix_norm(W, 2), which is neither a bound nor batched by shape.

    python benchmarks/spectral.py [--json FILE]

Targets: at most 2 times on a CPU; on a GPU, where Gram iteration is used, at least 5 times faster. Medians, alternating, same process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from reporting import finish

from robustlip.numerics.spectral import gram_iteration_bound, spectral_norm_bound, spectral_norm_estimate

SHAPES = [(256, 256), (1024, 256), (768, 3072), (12, 64, 768)]


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = (lambda w: gram_iteration_bound(w, 12)) if device == "cuda" else spectral_norm_bound
    rows = []
    for shape in SHAPES:
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)
        runs = {"bound": lambda: ours(weight), "torch": lambda: torch.linalg.matrix_norm(weight, 2)}  # noqa: B023 (run at once)
        for run in runs.values():
            run()
        times = {name: statistics.median(seconds(run, device) for _ in range(arguments.repeats)) for name, run in runs.items()}
        bound, truth = ours(weight).cpu(), torch.linalg.matrix_norm(weight.double(), 2).cpu()
        over, gap = float((bound / truth - 1).max()), float((1 - spectral_norm_estimate(weight).cpu() / bound).max())
        rows.append({"shape": shape, **{f"{k}_s": v for k, v in times.items()}, "ratio": times["bound"] / times["torch"], "over": over, "gap": gap})
        print(
            f"{shape!s:<16} bound {times['bound'] * 1e3:8.2f} ms  torch {times['torch'] * 1e3:8.2f} ms  ratio {rows[-1]['ratio']:.2f}  "
            f"above the truth by {over:.1e}, power iteration below the bound by {gap:.1e}"
        )
    finish(rows, arguments.json, device=device)


if __name__ == "__main__":
    main()
