"""Trains a grid of recipes one after the other, to compare accuracy with the proved bound. A stopped sweep can be resumed.

A grid file names a base recipe and what to change in it:

    name = "caps"
    base = "../recipes/digits-mlp-lipschitz.toml"    # relative to this file
    [set]                                            # in every run
    run.steps = 300
    [grid]                                           # every combination
    constraint.w_max = [0.5, 1.0, 2.0]
    seed = [0, 1]
    [[run]]                                          # optional: each of these tables, combined with the grid
    optimizer.lr = 0.05
    [[run]]
    base = "../recipes/digits-mlp-baseline.toml"     # another recipe for this one

Each run has its own folder, named by the SHA-256 of its whole recipe. A run with a row is finished, a run with only a training state is
resumed; reordering or extending the grid trains no run twice.
"""

from robustlip.sweep.grid import Grid, Run, load_grid
from robustlip.sweep.picture import draw
from robustlip.sweep.rows import FAILED, FINISHED, PARTIAL, PENDING, Row, Sweep
from robustlip.sweep.run import run_sweep
from robustlip.sweep.tables import csv, markdown, table

__all__ = [
    "FAILED", "FINISHED", "PARTIAL", "PENDING", "Grid", "Row", "Run", "Sweep", "csv", "draw", "load_grid", "markdown", "run_sweep", "table",
]  # fmt: skip
