"""The cache of a model's guaranteed constants, valid as long as its weights do not change."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from robustlip.checks import check_finite_weights
from robustlip.hashing import architecture_sha256, weights_sha256

_STORES: weakref.WeakKeyDictionary[nn.Module, tuple[str, dict[tuple[int, str], Any]]] = weakref.WeakKeyDictionary()


def constants_of(model: nn.Module) -> tuple[str, dict[tuple[int, str], Any]]:
    """(SHA-256 of the present weights, the dictionary of constants computed from them).

    The key is the content of the weights: version counters miss writes through `.data` and shared memory, and a stale constant would make a
    certificate false. Raises BadInput for weights that are not finite.
    """
    sha = weights_sha256(model)
    # Constants of the whole model also depend on scales and residual weights, which are part of the architecture's hash.
    state = sha + architecture_sha256(model)
    known = _STORES.get(model)
    if known is None or known[0] != state:
        check_finite_weights(model)
        known = (state, {})
        _STORES[model] = known
    return sha, known[1]
