"""`robustlip demo`: run the bundled suite and write its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from robustlip.cli.evaluate import run_and_show
from robustlip.cli.options import BatchSize, DataDir, Device, Json, Limit


def demo(
    out: Annotated[Path, typer.Option("--out", help="folder of the run")] = Path("runs/demo"), json: Json = None, device: Device = None,
    batch_size: BatchSize = 256, limit: Limit = None, seed: Annotated[Optional[int], typer.Option("--seed")] = None, data_dir: DataDir = None,
) -> None:  # fmt: skip
    """Certify and attack six models of the zoo on the embedded data, print the table, write the report."""
    run_and_show("demo", out, json, device, batch_size, limit, seed, data_dir)
