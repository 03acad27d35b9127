"""method='eclipse': ECLipsE-Fast, one multiplier a layer in closed form. Xu & Sivaranjani 2024, ECLipsE, sections 3 and 4.

Layer by layer: with γ = λ_max(G), λ = γ(1 + m/r) makes the X of reach.py at most slope²·γ·I for slopes in [m − r, m + r]: per eigenvalue g of G
the smallest X is r²λ + m²λg/(λ − g), which grows with g and at g = γ is least for that λ. So no constant exceeds the product of norms; but X
keeps the directions in which G is small, which the product forgets, and the next layer and each pair of logits see them. X needs no sample and no
rival, so all pairs cost one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustlip.domains.norms import Context
from robustlip.domains.quadratic.constants import Constants, constant_radii, constants_at, product_of_norms
from robustlip.domains.quadratic.layers import Network, network_of, refusal
from robustlip.domains.quadratic.reach import through_activation, through_linear
from robustlip.layers import Chain
from robustlip.threats import Threat

# Neurons, beyond which the inequalities of the widest layers take more than minutes on one core.
LARGEST = 16384


def fast_multipliers(network: Network, larger: float = 1.0) -> tuple[list[Tensor], Tensor | None, bool]:
    """(multipliers of each stage, X before the head, proved). larger: multiplies every λ, away from where (LMI) becomes singular."""
    x: Tensor | None = None
    found: list[Tensor] = []
    for weight, constraint in network.stages:
        g = through_linear(weight, x)
        if not bool(torch.isfinite(g).all()):
            return found, None, False
        top = float(torch.linalg.eigvalsh(g)[-1]) * (1 + 1e-9)
        found.append(torch.full((constraint.groups,), constraint.fast * larger * max(top, 1e-290), dtype=torch.float64))
        x = through_activation(constraint, g, found[-1])
        if x is None:
            return found, None, False
    return found, x, True


def eclipse_constants(network: Network) -> Constants:
    """ECLipsE-Fast, and never more than the product of norms."""
    _, x, proved = fast_multipliers(network)
    return constants_at(network, x, proved).and_also(product_of_norms(network))


def eclipse_why_not(model: Chain, threat: Threat) -> str:
    """'' or one sentence why the method cannot certify this model against this threat."""
    return refusal(model, threat, "ECLipsE", LARGEST)


def eclipse_radii(model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context) -> tuple[Tensor, Tensor]:
    """(radius (N,), ℓ2 constant of the margin that binds (N,)), float64 on the CPU; NaN for the second where the radius is 0."""
    constants = context.constant(model, "eclipse", lambda: eclipse_constants(network_of(model)))
    return constant_radii(constants, model, x, y, logits, threat, context)
