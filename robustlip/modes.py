"""Context managers that restore what they change: modes of layers, and the global random states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the global random states of torch (CPU and GPUs), numpy and Python after the block, also after an exception."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every layer has its own mode again."""
    modes = [(m, m.training) for m in model.modules() if hasattr(m, "training")]  # frozen scripted modules have no mode
    training = any(mode for _, mode in modes)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training and any(type(m).train is not nn.Module.train for m, _ in modes):
            model.train(modes[0][1])  # an overridden train() may change more than the flag, e.g. merge weights
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, with in-place layers run out of place; afterwards every layer has its own settings again."""
    with in_eval_mode(model), out_of_place(model):
        yield


@contextmanager
def out_of_place(model: nn.Module) -> Iterator[None]:
    """Runs layers with `inplace=True` out of place inside the block: they would overwrite the caller's tensors and intermediate values."""
    inside = [m for m in model.modules() if getattr(m, "inplace", False) is True]
    for module in inside:
        module.inplace = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in inside:
            module.inplace = True  # type: ignore[assignment]
