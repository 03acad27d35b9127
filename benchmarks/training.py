"""A constrained training step against the same step without a constraint, at the size of the paper's character GPT (2.4 million parameters).

    OMP_NUM_THREADS=1 python benchmarks/training.py [--json FILE] [--batch 8] [--repeats 9] [--methods soft-cap,…]

Forward, backward and Muon of 3 blocks × 256, 4 heads, context 256, on random tokens (times do not depend on them). The variants take turns, so
that a busy machine hits all of them. On a CPU seconds are of processor time, which other processes disturb less than wall-clock time; both ratios are
printed. Medians, and the median of the ratios within a turn. Target: at most 1.10 for soft cap and spectral normalisation.
Memory is the peak of a process of its own for each variant.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from reporting import finish
from torch import nn

from robustlip.constraints import METHODS, Constraint, targets_of
from robustlip.models import LipschitzGPT
from robustlip.muon import Muon

WIDTH, HEADS, BLOCKS, CONTEXT, CHARACTERS = 256, 4, 3, 256, 65


def stepper(method: str, batch: int, device: str) -> Callable[[], tuple[float, float, float]]:
    """A function that takes one training step: (seconds of all of it, of optimiser and constraint, on the clock)."""
    torch.manual_seed(0)
    model = LipschitzGPT("".join(map(chr, range(32, 32 + CHARACTERS))), WIDTH, HEADS, BLOCKS, distance_bias=64).to(device)
    matrices = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    rest = [p for p in model.parameters() if id(p) not in matrices]
    optimizers = [Muon(list(matrices.values()), lr=0.05), torch.optim.AdamW(rest, lr=1e-3)]
    constraint = Constraint(targets_of(model, 1.0, overrides={"mlp*": 2.0, "head.weight": 30.0}), method)
    constraint.project()
    constraint.attach(*optimizers)
    tokens = torch.randint(CHARACTERS, (batch, CONTEXT + 1), device=device)

    def now() -> tuple[float, float]:
        if device == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter()
        return (wall if device == "cuda" else time.process_time()), wall

    def step() -> tuple[float, float, float]:
        start = now()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        between = now()
        for optimizer in optimizers:
            optimizer.step()
        end = now()
        return end[0] - start[0], end[0] - between[0], end[1] - start[1]

    return step


def peak_megabytes(method: str, batch: int, device: str) -> float:
    """Peak resident memory of a process that takes three steps."""
    command = [sys.executable, __file__, "--peak", method, "--batch", str(batch), "--device", device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--methods", default=",".join(m for m in METHODS if m != "none"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        step = stepper(arguments.peak, arguments.batch, arguments.device)
        for _ in range(3):
            step()
        print(torch.cuda.max_memory_allocated() / 2**20 if arguments.device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        return
    methods = ["none", *arguments.methods.split(",")]
    steps = {method: stepper(method, arguments.batch, arguments.device) for method in methods}
    for step in steps.values():  # warm up
        step()
    turns = [{method: step() for method, step in steps.items()} for _ in range(arguments.repeats)]
    plain_peak = peak_megabytes("none", arguments.batch, arguments.device)
    rows = []
    for method in methods:
        peak = plain_peak if method == "none" else peak_megabytes(method, arguments.batch, arguments.device)
        rows.append({
            "method": method,
            "step_s": statistics.median(turn[method][0] for turn in turns),
            "optimizer_s": statistics.median(turn[method][1] for turn in turns),
            "ratio": statistics.median(turn[method][0] / turn["none"][0] for turn in turns),
            "wall_ratio": statistics.median(turn[method][2] / turn["none"][2] for turn in turns),
            "peak_mb": peak,
            "extra_mb": peak - plain_peak,
        })  # fmt: skip
    print("| method | step, ms | of which optimiser and constraint, ms | step / unconstrained | the same by the clock | peak memory above, MB |")
    print("|---|---:|---:|---:|---:|---:|")
    for r in rows:
        times = f"{r['step_s'] * 1e3:.0f} | {r['optimizer_s'] * 1e3:.0f} | {r['ratio']:.3f} | {r['wall_ratio']:.3f}"
        print(f"| {r['method']} | {times} | {r['extra_mb']:.0f} of {plain_peak:.0f} |")
    finish(rows, arguments.json, device=arguments.device, batch=arguments.batch, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
