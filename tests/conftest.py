"""Fixtures that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# No test depends on the network: a test that wants the hub says so by replacing it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """One thread (two workers share the machine), one seed and no width of a terminal; the generator comes back as it was."""
    torch.set_num_threads(1)
    os.environ.pop("COLUMNS", None)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with seed 0, for what is drawn inside a test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def real_data() -> Path:
    """The folder of real data; the test is skipped where there is none."""
    folder = os.environ.get("ROBUSTLIP_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set ROBUSTLIP_DATA to a folder with mnist_subset, cifar10_subset and tiny_shakespeare")
    return Path(folder)
