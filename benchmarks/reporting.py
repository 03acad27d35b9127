"""Output that all benchmarks share: the machine, and the rows as JSON."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from robustlip import __version__
from robustlip.files import write_text


def machine(**more: Any) -> dict[str, Any]:
    """Versions, threads and processor, and other facts that affect the measurement."""
    found = {"threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(), "robustlip": __version__}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {**found, "processor": platform.machine(), **gpu, **more}


def finish(rows: Any, path: str | Path | None, **more: Any) -> None:
    """Print the machine; write {"rows", "machine"} to `path` if given. more: further entries about the machine or the run."""
    here = machine(**more)
    print(here)
    if path:
        write_text(Path(path), json.dumps({"rows": rows, "machine": here}, indent=1))
