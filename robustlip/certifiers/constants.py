"""The guaranteed constants of a model, computed once for given weights."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from robustlip.checks import check_finite_weights
from robustlip.hashing import architecture_sha256, weights_sha256

_STORES: weakref.WeakKeyDictionary[nn.Module, tuple[str, dict[tuple[int, str], Any]]] = weakref.WeakKeyDictionary()


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
        check_finite_weights(model)
        known = (state, {})
        _STORES[model] = known
    return sha, known[1]
