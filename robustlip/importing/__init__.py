"""Checkpoints and logs of the published code of Newhouse et al. 2025 (arXiv 2507.13338), read as data; no code from them is run."""

from robustlip.importing.checkpoint import Checkpoint, read_checkpoint
from robustlip.importing.convert import Converted, convert
from robustlip.importing.logs import FORMULAS, Log, read_log

__all__ = ["FORMULAS", "Checkpoint", "Converted", "Log", "convert", "read_checkpoint", "read_log"]
