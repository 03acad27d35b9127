"""A grid of recipes, trained one after the other: which model is how accurate at which proved bound. Stopped and started again, it goes on.

A grid file names a base recipe and what to change in it:

    name = "caps"
    base = "../recipes/digits-mlp-lipschitz.toml"    # beside this file
    [set]                                            # in every run
    run.steps = 300
    [grid]                                           # every combination
    constraint.w_max = [0.5, 1.0, 2.0]
    seed = [0, 1]
    [[run]]                                          # optional: each of these tables, combined with the grid
    optimizer.lr = 0.05
    [[run]]
    base = "../recipes/digits-mlp-baseline.toml"     # another recipe for this one

Each run has a folder of its own, named by the SHA-256 of its whole recipe: a run is finished when its row is there, half done when only its
training state is, and another order of the grid, or a longer one, trains nothing twice.
"""

from robustlip.sweep.grid import Grid, Run, load_grid
from robustlip.sweep.picture import draw
from robustlip.sweep.rows import FAILED, FINISHED, PARTIAL, PENDING, Row, Sweep
from robustlip.sweep.run import run_sweep
from robustlip.sweep.tables import csv, markdown, table

__all__ = [
    "FAILED", "FINISHED", "PARTIAL", "PENDING", "Grid", "Row", "Run", "Sweep", "csv", "draw", "load_grid", "markdown", "run_sweep", "table",
]  # fmt: skip
