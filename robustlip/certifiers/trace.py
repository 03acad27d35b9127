"""The clean forward pass, as executed, with the norms of the layers' outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustlip.domains.norms import rule_for
from robustlip.layers import Chain, Residual
from robustlip.layers.joins import Branching
from robustlip.numerics.rounding import quick_norm_up
from robustlip.ops import is_elementwise


def scores_and_norms(model: Chain, x: Tensor) -> tuple[Tensor, dict[int, tuple[bool, Tensor]]]:
    """(logits (N, C) of the prediction, {id(layer): (by token?, norm (N,) float64 on the CPU, rounded up)}).

    For outputs (N, T, D) the norm is the largest token norm of the sample; other outputs are measured as one vector. A layer that is used twice gets
    the larger of its two norms.
    """
    seen: dict[int, tuple[bool, Tensor]] = {}

    def record(layer: nn.Module, inputs: object, output: Tensor) -> None:
        by_token = output.dim() == 3
        norm = (quick_norm_up(output).amax(-1) if by_token else quick_norm_up(output.flatten(1))).cpu()
        if id(layer) in seen:
            before, other = seen[id(layer)]
            norm = torch.maximum(norm, other) if before == by_token else torch.full_like(norm, torch.inf)
        seen[id(layer)] = (by_token, norm)

    # No hook on the last layer (its output is the logits) nor inside attention (its submodules have no states).
    bounded = [m for m in _with_states(model) if m is not model[len(model) - 1]]
    handles = [layer.register_forward_hook(record) for layer in bounded]
    try:
        logits = model.scores(x)
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen


def _with_states(model: nn.Module) -> list[nn.Module]:
    """The layers whose states the clean norms can tighten: layers of chains and of branches, but not the submodules of attention."""
    found: list[nn.Module] = []
    children = list(model.children())
    for child, following in zip(children, [*children[1:], None], strict=True):
        rule_for(child)  # refuses unsupported classes, and modules that have hooks already
        if type(child) is nn.Flatten or (following is not None and is_elementwise(following)):
            continue  # the norm after the elementwise layer is enough
        found.append(child)
        if type(child) is Residual:
            # The last layer of the branch is left out: the output of the residual is measured right after it.
            found += _with_states(child.branch)[:-1] if type(child.branch) is nn.Sequential else []
        elif type(child) is nn.Sequential:
            found += _with_states(child)
        elif isinstance(child, Branching):
            found += [layer for branch in child.branches if type(branch) is nn.Sequential for layer in _with_states(branch)]
    return list(dict.fromkeys(found))
