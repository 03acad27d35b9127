"""Multilayer perceptrons on flattened inputs."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import nn

from robustlip.errors import BadInput
from robustlip.layers import Chain, GroupSort, MaxMin, Normalize, ScaledGELU


def activation(name: str) -> nn.Module:
    """The activation layer of that name: relu, gelu, scaled-gelu (GELU/1.1289, as in the paper), tanh, maxmin, or groupsort (pairs)."""
    table = {"relu": nn.ReLU, "gelu": nn.GELU, "scaled-gelu": ScaledGELU, "tanh": nn.Tanh, "maxmin": MaxMin, "groupsort": GroupSort}
    if name not in table:
        raise BadInput(f"expected an activation among {', '.join(table)}, got {name!r}; name one of them")
    return table[name]()


class LipschitzMLP(Chain):
    """Inputs (N, …) with widths[0] numbers per sample → logits (N, widths[-1]).

    widths: input, hidden …, output. mean, std: normalisation inside the model, so that radii are in raw input units.
    The layers are ordinary; they are made Lipschitz by a constraint in training (robustlip.constraints).
    """

    def __init__(self, widths: list[int], activation_name: str = "relu", *, bias: bool = True, mean: float = 0.0, std: float = 1.0) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise BadInput(f"expected at least two widths above 0, got {widths}; give input, hidden and output widths")
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        if (mean, std) != (0.0, 1.0):
            layers["normalize"] = Normalize(mean, std)
        for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
            if i:
                layers[f"act{i}"] = activation(activation_name)
            layers[f"linear{i + 1}"] = nn.Linear(fan_in, fan_out, bias=bias)
        super().__init__(layers)
        self.config = {"kind": "mlp", "widths": list(widths), "activation": activation_name, "bias": bias, "mean": mean, "std": std}
