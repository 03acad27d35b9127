"""A constrained training step compared with the paper's JAX code: the same 2.4M-parameter GPT, batch, optimiser and constraint, run alternately.

    OMP_NUM_THREADS=1 python benchmarks/published_code.py --code FOLDER --jax PYTHON [--batch 8] [--repeats 7] [--json FILE]

FOLDER: a checkout of the paper's repository (github Arongil/lipschitz-transformers); PYTHON: an interpreter with jax and numpy. Both sides are
pinned to one core; times are processor time, so other load has little effect. Steps use random tokens at context 256, float32, after
warm-up (JAX compiles in its first step). The published code normalises by power iteration, a lower estimate; ours divides by a guaranteed bound and
checks each step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from reporting import finish
from training import CHARACTER_GPT, stepper

CONSTRAINTS = {"spectral-normalize": "spec_normalize", "soft-cap": "soft_cap", "hard-cap": "hard_cap"}  # our name: published name


class Published:
    """The worker of one constraint: `step` asks for one step."""

    def __init__(self, python: str, code: str, constraint: str, batch: int) -> None:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        worker = Path(__file__).with_name("published_worker.py")
        self.process = subprocess.Popen(
            [python, str(worker), code, constraint, str(batch)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        self.parameters = int(self.answer())

    def answer(self) -> str:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"expected the published code to run, got:\n{self.process.stderr.read()[-2000:]}")
        return line

    def step(self) -> tuple[float, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        spent, clock = map(float, self.answer().split())
        return spent, clock

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", required=True)
    parser.add_argument("--jax", default=sys.executable)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--constraints", nargs="+", default=list(CONSTRAINTS), choices=list(CONSTRAINTS))
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # children inherit it
    torch.set_num_threads(1)
    rows = []
    for ours, theirs in CONSTRAINTS.items():
        if ours not in arguments.constraints:
            continue
        rival = Published(arguments.jax, arguments.code, theirs, arguments.batch)
        step = stepper(CHARACTER_GPT, ours, arguments.batch, "cpu")
        for _ in range(2):
            rival.step(), step()
        turns = [(rival.step(), step()) for _ in range(arguments.repeats)]
        rival.end()
        row = {
            "constraint": ours, "parameters": rival.parameters, "ours_s": statistics.median(mine[0] for _, mine in turns),
            "published_s": statistics.median(their[0] for their, _ in turns), "ratio": statistics.median(mine[0] / their[0] for their, mine in turns),
        }  # fmt: skip
        rows.append(row)
        print(f"{ours:<20} ours {row['ours_s']:.3f} s  published {row['published_s']:.3f} s  ours/published {row['ratio']:.2f}", flush=True)
    finish(rows, arguments.json, batch=arguments.batch, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
