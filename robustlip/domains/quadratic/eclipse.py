"""method='eclipse': ECLipsE-Fast, one multiplier per layer in closed form. Xu & Sivaranjani 2024, ECLipsE, sections 3 and 4.

For each layer, with γ = λ_max(G), λ = γ(1 + m/r) makes the X of propagation.py at most slope²·γ·I for slopes in [m − r, m + r]: for an eigenvalue g
of G the smallest X is r²λ + m²λg/(λ − g), which increases with g and is least at g = γ for that λ. So no constant exceeds the product of norms. X
also keeps the directions in which G is small, which the product does not; the next layer and each pair of logits benefit. X depends on no sample and
no rival, so one pass serves all pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustlip.domains.norms import Context
from robustlip.domains.quadratic.constants import Constants, constant_radii, constants_at, product_of_norms
from robustlip.domains.quadratic.layers import ConstraintNetwork, network_of, why_not_chain
from robustlip.domains.quadratic.propagation import through_activation, through_linear
from robustlip.layers import Chain
from robustlip.threats import Threat

# The most neurons; for more, the inequalities of the widest layers take longer than minutes on one core.
LARGEST = 16384


def fast_multipliers(network: ConstraintNetwork, larger: float = 1.0) -> tuple[list[Tensor], Tensor | None, bool]:
    """(multipliers of each stage, X before the head, whether it is proved). larger: a factor of all λ, to stay away from where (LMI) becomes
    singular."""
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


def eclipse_constants(network: ConstraintNetwork) -> Constants:
    """The constants of ECLipsE-Fast, never larger than the product of norms."""
    _, x, proved = fast_multipliers(network)
    return constants_at(network, x, proved).smaller_of_both(product_of_norms(network))


def eclipse_why_not(model: Chain, threat: Threat) -> str:
    """'' where the method applies, else one sentence with the reason."""
    return why_not_chain(model, threat, "ECLipsE", LARGEST)


def eclipse_radii(model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context) -> tuple[Tensor, Tensor]:
    """(radius (N,), ℓ2 Lipschitz constant of the binding margin (N,)), float64 on the CPU; NaN for the second where the radius is 0."""
    constants = context.constant(model, "eclipse", lambda: eclipse_constants(network_of(model)))
    return constant_radii(constants, model, x, y, logits, threat, context)
