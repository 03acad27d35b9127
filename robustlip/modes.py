"""What comes back as it was: how layers are evaluated, and the global random states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undrawn() -> Iterator[None]:
    """Whatever is drawn inside, the global random states of torch (CPU and GPUs), numpy and Python come back behind, after an error too."""
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
    """Eval mode inside; every layer's own mode comes back behind."""
    modes = [(m, m.training) for m in model.modules() if hasattr(m, "training")]  # a frozen scripted module has none
    training = any(mode for _, mode in modes)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training and any(type(m).train is not nn.Module.train for m, _ in modes):
            model.train(modes[0][1])  # a train() of its own may keep more than the flag, e.g. merged weights
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and layers that work in place compute the same into memory of their own; every layer's own settings come back behind."""
    with in_eval_mode(model), out_of_place(model):
        yield


@contextmanager
def out_of_place(model: nn.Module) -> Iterator[None]:
    """Layers with `inplace=True` work out of place inside: they would overwrite what the caller passed, and what was measured in front of them."""
    inside = [m for m in model.modules() if getattr(m, "inplace", False) is True]
    for module in inside:
        module.inplace = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in inside:
            module.inplace = True  # type: ignore[assignment]
