"""The clean forward pass, as executed, with the norms of what every layer put out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustlip.domains.norms import rule_for
from robustlip.layers import Chain, Residual
from robustlip.layers.joins import Branching
from robustlip.numerics.rounding import quick_norm_up
from robustlip.ops import is_elementwise


def traced_scores(model: Chain, x: Tensor) -> tuple[Tensor, dict[int, tuple[bool, Tensor]]]:
    """(logits (N, C) of the prediction, {id(layer): (by token?, norm (N,) float64 on the CPU, rounded up)}).

    Outputs (N, T, D) are measured by token, the largest of a sample kept; others as one vector. A layer that is used twice keeps the larger.
    """
    seen: dict[int, tuple[bool, Tensor]] = {}

    def record(layer: nn.Module, inputs: object, output: Tensor) -> None:
        by_token = output.dim() == 3
        norm = (quick_norm_up(output).amax(-1) if by_token else quick_norm_up(output.flatten(1))).cpu()
        if id(layer) in seen:
            before, other = seen[id(layer)]
            norm = torch.maximum(norm, other) if before == by_token else torch.full_like(norm, torch.inf)
        seen[id(layer)] = (by_token, norm)

    # The head's output is the logits, and layers inside attention have no states of their own.
    bounded = [m for m in _with_states(model) if m is not model[len(model) - 1]]
    handles = [layer.register_forward_hook(record) for layer in bounded]
    try:
        logits = model.scores(x)
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen


def _with_states(model: nn.Module) -> list[nn.Module]:
    """The layers behind which a rule's state is worth tightening: chains and residual branches are entered, attention is not."""
    found: list[nn.Module] = []
    children = list(model.children())
    for child, following in zip(children, [*children[1:], None], strict=True):
        rule_for(child)  # refuses unknown classes, and foreign hooks before ours are there
        if type(child) is nn.Flatten or (following is not None and is_elementwise(following)):
            continue  # the rule of an elementwise layer needs no norm in front of it that is not also known behind it
        found.append(child)
        if type(child) is Residual:
            # What the branch puts out is measured again with the residual, right behind it.
            found += _with_states(child.branch)[:-1] if type(child.branch) is nn.Sequential else []
        elif type(child) is nn.Sequential:
            found += _with_states(child)
        elif isinstance(child, Branching):
            found += [layer for branch in child.branches if type(branch) is nn.Sequential for layer in _with_states(branch)]
    return list(dict.fromkeys(found))
