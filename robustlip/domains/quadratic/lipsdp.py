"""method='lipsdp': Lipschitz constants by semidefinite programming, one for the margin of each pair of logits.

Fazlyab et al. 2019 (LipSDP-Neuron: one multiplier per neuron), with the constraints of constraints.py for activations that are not elementwise (Pauli
et al. 2024). newton.py or cvxpy finds the multipliers; program.py proves the constant for any multipliers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustlip.domains.norms import Context
from robustlip.domains.quadratic.constants import Constants, constant_radii, constants_at
from robustlip.domains.quadratic.eclipse import eclipse_constants, fast_multipliers
from robustlip.domains.quadratic.layers import ConstraintNetwork, network_of, pair_rows, why_not_chain
from robustlip.domains.quadratic.newton import minimise
from robustlip.domains.quadratic.program import Program, least_proved, program_of
from robustlip.errors import BadInput
from robustlip.layers import Chain
from robustlip.numerics.enclosures import Enclosure
from robustlip.numerics.rounding import up
from robustlip.threats import Threat

SOLVERS = ("newton", "cvxpy")

# The most neurons; for more, one program takes longer than minutes on one core.
LARGEST = 2048

# The largest Σ over pairs of (size of the program)³ for which every pair gets a program: about ten minutes on one core. Above it, one program is
# solved for all logits.
_EFFORT = 3e10


def multipliers_for(program: Program, start: Tensor, solver: str = "newton") -> Tensor:
    """λ (groups,) for one program, not proved. start: λ strictly inside the program. Raises BadInput for an unknown or missing solver."""
    if solver == "newton":
        return minimise(program, start).multipliers
    if solver == "cvxpy":
        from robustlip.domains.quadratic.conic import solve

        return solve(program, start)
    raise BadInput(f"expected a solver among {', '.join(SOLVERS)}, got {solver!r}; name one of them")


def lipsdp_constants(network: ConstraintNetwork, *, solver: str = "newton", pairwise: bool | None = None) -> Constants:
    """Constants of all pairs of logits and of the whole network, never larger than those of ECLipsE and of the product of norms.

    pairwise: whether to solve one program per pair; None: only if that takes at most minutes. Raises BadInput as `multipliers_for`.
    """
    if solver not in SOLVERS:
        raise BadInput(f"expected a solver among {', '.join(SOLVERS)}, got {solver!r}; name one of them")
    if not network.stages:
        return constants_at(network, None, True)
    fallback = eclipse_constants(network)
    start, _, proved = fast_multipliers(network, 1.5)
    if not proved:
        return fallback
    rows, first, second = pair_rows(network.head)
    count, classes = len(first), len(network.head.mid)
    everything = program_of(
        network, Enclosure(torch.cat([rows.mid, network.head.mid]), torch.cat([rows.radius(), network.head.radius()]))
    )

    def constant(chosen: Tensor) -> float:
        program = everything.of_rows(chosen)
        rho = least_proved(program, multipliers_for(program, program.join(start), solver))
        return float(up(up(torch.tensor(rho, dtype=torch.float64)).sqrt()))

    pairs = torch.full_like(fallback.pairs, math.inf)
    if pairwise or (pairwise is None and count * (everything.size - count - classes + 1.0) ** 3 <= _EFFORT):
        for k in range(count):
            # The margin of equal rows does not change: the bound of ECLipsE is enough.
            if bool((rows.mid[k] != 0).any()):
                pairs[first[k], second[k]] = pairs[second[k], first[k]] = constant(torch.tensor([k]))
    whole = constant(torch.arange(count, count + classes))
    return Constants(pairs, whole).smaller_of_both(fallback)


def lipsdp_why_not(model: Chain, threat: Threat) -> str:
    """'' where the method applies, else one sentence with the reason."""
    return why_not_chain(model, threat, "LipSDP", LARGEST)


def lipsdp_radii(model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context) -> tuple[Tensor, Tensor]:
    """(radius (N,), ℓ2 Lipschitz constant of the binding margin (N,)), float64 on the CPU; NaN for the second where the radius is 0.

    The first batch for given weights solves the programs, about two seconds per pair for 64-256-256-10 on one core; the constants are cached.
    """
    constants = context.constant(model, "lipsdp", lambda: lipsdp_constants(network_of(model)))
    return constant_radii(constants, model, x, y, logits, threat, context)
