"""The guaranteed constants of a model, computed once for given weights."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from robustlip.errors import BadInput
from robustlip.hashing import architecture_sha256, weights_sha256

_STORES: weakref.WeakKeyDictionary[nn.Module, tuple[str, dict[tuple[int, str], Any]]] = weakref.WeakKeyDictionary()


def check_finite(model: nn.Module) -> None:
    """Raises BadInput for weights that are not finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BadInput(f"expected finite weights, got NaN or infinity in {name}; repair or retrain the model")


def constants_of(model: nn.Module) -> tuple[str, dict[tuple[int, str], Any]]:
    """(SHA-256 of the weights as they are now, the store of constants that belongs to them).

    Raises BadInput for weights that are not finite. Keyed by content: version counters miss writes through `.data` and shared memory, and a
    stale constant would be a false certificate.
    """
    sha = weights_sha256(model)
    # Constants of the whole model depend on scales and residual weights too, which the structure prints.
    state = sha + architecture_sha256(model)
    known = _STORES.get(model)
    if known is None or known[0] != state:
        check_finite(model)
        known = (state, {})
        _STORES[model] = known
    return sha, known[1]
