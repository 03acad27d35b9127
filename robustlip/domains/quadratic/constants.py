"""Lipschitz constants of a network for each pair of logits, and radii from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlip.domains.margins import margins
from robustlip.domains.norms import Context
from robustlip.domains.norms.bound import GlobalBound, layers_after_threat
from robustlip.domains.quadratic.layers import ConstraintNetwork, pair_rows
from robustlip.domains.quadratic.propagation import row_gains, whole_gain
from robustlip.errors import BadInput
from robustlip.layers import Chain
from robustlip.numerics.rounding import up
from robustlip.numerics.spectral import spectral_norm_bound
from robustlip.threats import InputBall, Threat, l2_factor


@dataclass(frozen=True)
class Constants:
    """Guaranteed ℓ2 Lipschitz constants in exact arithmetic, rounded up.

    pairs: (C, C) symmetric: |m_yj(x') − m_yj(x)| ≤ pairs[y, j]·‖x' − x‖₂ for the margin of logit y over j; 1 on the diagonal, which is not used.
    whole: ‖f(x') − f(x)‖₂ ≤ whole·‖x' − x‖₂ for all logits f.
    """

    pairs: Tensor
    whole: float

    def smaller_of_both(self, other: Constants) -> Constants:
        """The smaller of two bounds, entry by entry. A pair of logits changes by at most √2 times the change of all logits."""
        whole = min(self.whole, other.whole)
        limit = torch.full_like(self.pairs, whole * math.sqrt(2) * (1 + 1e-15))
        return Constants(torch.minimum(torch.minimum(self.pairs, other.pairs), limit).fill_diagonal_(1.0), whole)


def constants_at(network: ConstraintNetwork, x: Tensor | None, proved: bool) -> Constants:
    """The constants that follow from δδᵀ ⪯ ‖x' − x‖²·X before the head; infinite where this is not proved."""
    classes = len(network.head.mid)
    pairs = torch.full((classes, classes), math.inf, dtype=torch.float64).fill_diagonal_(1.0)
    if not proved:
        return Constants(pairs, math.inf)
    rows, first, second = pair_rows(network.head)
    gains = row_gains(rows, x).nan_to_num(math.inf, math.inf)
    pairs[first, second] = pairs[second, first] = gains
    found = Constants(pairs, whole_gain(network.head, x))
    return found.smaller_of_both(found)


def product_of_norms(network: ConstraintNetwork) -> Constants:
    """The product ‖u_y − u_j‖·Π σ(W)·slope: for comparison, and an upper limit of what the methods here return."""
    gain = torch.ones((), dtype=torch.float64)
    for weight, constraint in network.stages:
        slope = (constraint.keep.coefficient[:, 0].abs() + constraint.write.coefficient[:, 0].abs()).amax()
        # Elementwise activations have one coefficient m + r per row. Sorting and reflecting layers mix rows and keep ℓ2 norms.
        factor = slope if constraint.keep.index.shape[1] == 1 else torch.ones_like(slope)
        radius = 0.0 if weight.rad is None else torch.linalg.matrix_norm(weight.rad) * (1 + 1e-9)
        gain = up(gain * (spectral_norm_bound(weight.mid) + radius) * factor)
    return constants_at(network, torch.eye(network.head.mid.shape[1], dtype=torch.float64) * up(gain.square()), True)


def constant_radii(
    constants: Constants, model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context
) -> tuple[Tensor, Tensor]:
    """(radius (N,), ℓ2 Lipschitz constant of the binding rival (N,)), float64 on the CPU. Radius 0 and NaN where the margin is too small.

    Rival j cannot win while pairs[y, j]·‖δ‖₂ < m_j − 2‖u_y − u_j‖·rounding − 4·single. The executed clean and perturbed logits each have the rounding
    error before the head and that of a single logit, both bounded at the radius in question. ‖δ‖₂ ≤ √n‖δ‖_∞ and ‖δ‖₂ ≤ ‖δ‖₁.
    """
    from robustlip.domains.search import largest_radius

    assert isinstance(threat, InputBall)
    layers, inside, norm = layers_after_threat(model, x, threat)
    size = inside.shape[1:].numel()
    first = next(layer for layer in layers if isinstance(layer, torch.nn.Linear))
    if first.in_features != size:
        shape = tuple(inside.shape[1:])
        raise BadInput(f"expected samples of {first.in_features} numbers before the first Linear layer, got {shape}; flatten them")
    growth = l2_factor(threat.norm, size)
    y = y.cpu()
    bound = GlobalBound(model, layers, inside, norm, threat, y, context)
    margin = margins(logits.detach().cpu(), y) - context.final_error
    table, heads = constants.pairs[y], bound.pairs("l2")
    # Equal rows would give a division by 0; a larger constant is still a bound.
    table = table.clamp_min(max(1e-9 * float(constants.pairs[torch.isfinite(constants.pairs)].amax()), 1e-300))

    def allowed(radius: Tensor) -> Tensor:
        """(N, C): the largest ‖δ‖₂ at which rival j cannot win, rounding errors taken at `radius`."""
        state, _, single = bound.at(radius)
        lost = up(2 * heads * state.rounding[:, None] + 4 * single[:, None])
        return ((margin * (1 - 1e-12) - lost) / table * (1 - 1e-15)).scatter(1, y[:, None], torch.inf)

    def evaluate(radius: Tensor) -> tuple[Tensor, Tensor]:
        return up(radius * growth), allowed(radius).amin(-1)

    radius, _ = largest_radius(evaluate, 1e-9 * norm.clamp_min(1e-3))
    radius = torch.where(margin.amin(-1) > 0, radius, torch.zeros_like(radius)).nan_to_num(0.0)
    binding = table.gather(1, allowed(radius).argmin(-1, keepdim=True))[:, 0]
    return radius, torch.where(radius > 0, binding, torch.full_like(radius, torch.nan))
