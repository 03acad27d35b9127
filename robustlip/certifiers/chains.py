"""The chain that is certified for a model: a Chain itself, an nn.Sequential of supported layers, or the capture of any other module."""

from __future__ import annotations

import copy
import hashlib
import weakref

import torch
from torch import Tensor, nn

from robustlip.data.lengths import by_length
from robustlip.domains.norms import rule_for
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.graph import capture
from robustlip.hashing import architecture_sha256, joint_sha256, weights_sha256
from robustlip.layers import Chain, Lookup, as_chain

# The last captures of each module by the shape of a sample, one for each length of texts. Their constants are cached with them, among these a copy of
# the weights in float64; so as many are kept as have so many weights in total.
_CAPTURED: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], Chain]] = weakref.WeakKeyDictionary()
_KEPT, _KEPT_WEIGHTS = 64, 2**27


def chain_of(model: nn.Module, x: Tensor) -> tuple[Chain, str | None]:
    """(the model as a chain, None), or (the capture of the module on inputs like x, SHA-256 of the module's weights).

    A module is captured at every call, because attributes, layers and tensors that are not hashed may have changed. If the captured program has not
    changed, the same Chain object is returned. For texts of different lengths it is the program for the longest.
    Raises UnsupportedLayer for a module that cannot be captured; for an nn.Sequential, with the reasons of both attempts.
    """
    if isinstance(model, Chain):
        return as_chain(model), None
    if type(model) is nn.Sequential:
        try:
            chain = as_chain(model)
            for layer in _inside(chain):
                rule_for(layer)
            if type(chain[len(chain) - 1]) is nn.Sigmoid:  # the capture leaves out the sigmoid of a single logit
                captured = _captured(model, x)
                return captured if captured[0].final else (chain, None)
            return chain, None
        except UnsupportedLayer as error:
            try:
                return _captured(model, x)
            except UnsupportedLayer as other:
                raise error from other
    return _captured(model, x)


def _captured(model: nn.Module, x: Tensor) -> tuple[Chain, str]:
    if not isinstance(model, nn.Module):
        raise BadInput(f"expected a model that is an nn.Module, got {type(model).__name__}; wrap it in a module with a forward")
    first = next((t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()), None)
    if first is None or not isinstance(x, Tensor) or not x.dim():
        raise UnsupportedLayer(f"expected a model with weights and inputs to capture it with, got {type(model).__name__} without; build a Chain")
    example = by_length(x)[-1][1][:2].to(first.device, first.dtype if x.is_floating_point() else x.dtype)
    kept = _CAPTURED.setdefault(model, {})
    shape = tuple(example.shape[1:])
    chain, known = capture(model, example), kept.pop(shape, None)
    if known is not None and known.computes_weights == chain.computes_weights and architecture_of(known, "") == architecture_of(chain, ""):
        # These attributes are not hashed: take their present values.
        known.input_range, known.final, known.embedding_depth = chain.input_range, chain.final, chain.embedding_depth
        known.without = chain.without
        chain = known
    kept[shape] = chain  # the last ones last
    while len(kept) > max(1, min(_KEPT, _KEPT_WEIGHTS // max(1, sum(p.numel() for p in chain.parameters())))):
        kept.pop(next(iter(kept)))
    return chain, weights_sha256(model)


def check_weights_of(chain: Chain, model: nn.Module) -> None:
    """Raises UnsupportedLayer unless the matrices of the capture are exactly those of the module: a weight threat changes the module's matrices."""
    own = {id(p) for p in model.parameters() if p.dim() > 1}
    used = {id(p) for p in chain.parameters() if p.dim() > 1}
    if own != used or chain.computes_weights or isinstance(chain[0], Lookup):
        raise UnsupportedLayer(
            f"expected a model whose layers use its own matrices as they are, for a weight threat, got {type(model).__name__}, which computes "
            f"with them or holds others; use an input threat"
        )


def identity_of(model: nn.Module, x: Tensor) -> tuple[str, str]:
    """(SHA-256 of the weights, SHA-256 of the architecture) as a certificate states them. For a captured model the second is that of its chain, for
    texts of different lengths that of one chain for each length."""
    programs: dict[int, str] = {}
    for _, part in by_length(x):
        chain, source = chain_of(model, part)
        programs[part.shape[1] if part.dim() > 1 else 0] = architecture_of(chain, source)
    return source or weights_sha256(chain), joint_sha256(programs)


def architecture_of(chain: Chain, source: str | None) -> str:
    """SHA-256 of the architecture. For a capture (source is not None) it includes the chain's tensors: the module may have computed them."""
    printed = architecture_sha256(chain)
    return printed if source is None else hashlib.sha256(f"{printed}\0{weights_sha256(chain)}".encode()).hexdigest()


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model in another dtype; the model itself if it already has this dtype."""
    if all(t.dtype == dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()):
        return model
    return copy.deepcopy(model).to(dtype)


def _inside(chain: nn.Module) -> list[nn.Module]:
    """The layers of a chain and of its branches, but not the submodules of a layer that has a rule (attention)."""
    found: list[nn.Module] = []
    for layer in chain.children():
        found.append(layer)
        if type(layer) is nn.Sequential or hasattr(layer, "branches"):
            found += _inside(layer)
    return found
