"""Chains of Linear layers and activations, as the methods of this package use them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlip.domains.norms import rule_for
from robustlip.domains.norms.elementwise import DROPOUTS
from robustlip.domains.quadratic.constraints import QuadraticConstraint, constraint_of, has_constraint
from robustlip.layers import Chain, Normalize
from robustlip.numerics.enclosures import Enclosure, product
from robustlip.numerics.rounding import U64
from robustlip.threats import InputBall, Threat

# The most logits of which all pairs get a constant.
CLASSES = 512


@dataclass(frozen=True)
class ConstraintNetwork:
    """A network of Linear layers and activations with quadratic constraints.

    stages: pairs (W, constraint) in order: a difference δ of the activations before becomes v = Wδ, then a difference that the constraint allows.
    head: (C, n). The weights are exact; products of consecutive layers and divisions by a std are enclosed.
    """

    stages: tuple[tuple[Enclosure, QuadraticConstraint], ...]
    head: Enclosure

    @property
    def inputs(self) -> int:
        return int((self.stages[0][0] if self.stages else self.head).mid.shape[1])


def why_not_chain(model: Chain, threat: Threat, what: str, largest: int) -> str:
    """'' where `network_of` supports the model, else one sentence with the reason, which begins with `what`, the method's name. largest: most
    neurons."""
    if not isinstance(threat, InputBall):
        return f"{what} is for changes of the input (l1, l2, linf), this threat is {threat.name}"
    layers = list(model)
    if type(layers[-1]) is not nn.Linear:
        return f"{what} needs a Linear layer at the end, this model ends with {type(layers[-1]).__name__}"
    mixed, width = False, 0
    for layer in layers:
        if type(layer) is nn.Linear:
            mixed, width = True, width + layer.out_features
        elif type(layer) is nn.Flatten:
            if mixed:
                return f"{what} is for vectors, this model flattens after a Linear layer"
        elif type(layer) is Normalize:
            if mixed and layer.std.numel() > 1:
                return f"{what} knows Normalize by channel before the first Linear layer only"
        elif not mixed and type(layer) not in DROPOUTS:
            return f"{what} needs a Linear layer before all others, this model begins with {type(layer).__name__}"
        elif not has_constraint(layer) and type(layer) not in DROPOUTS:
            return f"{what} is for chains of Linear layers and activations, this one has {type(layer).__name__}"
    if width > largest:
        return f"{what} is for at most {largest} neurons, this model has {width}"
    if layers[-1].out_features > CLASSES:
        return f"{what} compares logits pair by pair, for at most {CLASSES} of them, this model has {layers[-1].out_features}"
    return ""


def _exact(layer: nn.Linear) -> Enclosure:
    return Enclosure(layer.weight.detach().double().cpu())


def network_of(model: Chain) -> ConstraintNetwork:
    """The network of a chain that `why_not_chain` accepts. Normalize by channel is replaced by its gain: ‖(x' − x)/std‖ ≤ ‖x' − x‖/min|std|."""
    stages: list[tuple[Enclosure, QuadraticConstraint]] = []
    linear: Enclosure | None = None
    width = 0
    gain = 1.0  # the gain of scalings before the next Linear layer
    for layer in model:
        rule_for(layer)  # refuses hooks, which can change what a layer computes
        if type(layer) is Normalize:
            gain = gain / float(layer.std.double().abs().min()) * (1 + 4 * U64)
        elif type(layer) is nn.Linear:
            weight = _exact(layer) if gain == 1.0 else _exact(layer).scaled(gain)
            gain = 1.0
            linear = weight if linear is None else product(weight, linear)
            width = layer.out_features
        elif type(layer) is not nn.Flatten and type(layer) not in DROPOUTS:
            constraint = constraint_of(layer, width)
            linear = Enclosure(torch.eye(width, dtype=torch.float64)) if linear is None else linear
            if gain != 1.0:
                linear, gain = linear.scaled(gain), 1.0
            if constraint is not None:
                stages.append((linear, constraint))
                linear = None
    assert linear is not None
    if len(linear.mid) == 1:  # the logits are (0, z)
        linear = Enclosure(torch.cat([torch.zeros_like(linear.mid), linear.mid]), torch.cat([torch.zeros_like(linear.mid), linear.radius()]))
    return ConstraintNetwork(tuple(stages), linear)


def pair_rows(head: Enclosure) -> tuple[Enclosure, Tensor, Tensor]:
    """(u_i − u_j for all pairs i < j of logits, i, j)."""
    first, second = torch.triu_indices(len(head.mid), len(head.mid), 1)
    radius = head.radius()
    return Enclosure(head.mid[first], radius[first]).minus(Enclosure(head.mid[second], radius[second])), first, second
