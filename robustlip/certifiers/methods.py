"""The table of certification methods, and 'best': the largest radius of all methods for each sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustlip.domains.expansion.dual import dual_radii, dual_why_not
from robustlip.domains.expansion.local import local_radii, local_why_not
from robustlip.domains.lines import complete_radii, complete_why_not, crown_radii, ibp_radii, linear_why_not, local_lipschitz_radii
from robustlip.domains.norms import Context
from robustlip.domains.norms.bound import global_radii
from robustlip.domains.quadratic import eclipse_radii, eclipse_why_not, lipsdp_radii, lipsdp_why_not, sdp_radii, sdp_why_not
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Chain
from robustlip.plugins import added
from robustlip.threats import Threat

Radii = Callable[[Chain, Tensor, Tensor, Tensor, Threat, Context], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Method:
    """A certification method.

    radii: (model, x, y, logits, threat, context) → (radius (N,), Lipschitz constant from the input to the last hidden state (N,), NaN where the
    method has none) of one batch, float64 on the CPU.
    why_not: (model, threat) → '' where the method applies, else one sentence with the reason. description: one line for tables and help.
    in_best: whether 'best' tries the method. decides: whether 'best' tries it for a requested radius, on samples that no other method proved.
    """

    radii: Radii
    why_not: Callable[[Chain, Threat], str]
    description: str
    in_best: bool = True
    decides: bool = False


def _without_constant(radii: Radii) -> Radii:
    """Report NaN: this method's constant is not the one from the input to the last hidden state."""

    def call(model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context) -> tuple[Tensor, Tensor]:
        radius, _ = radii(model, x, y, logits, threat, context)
        return radius, torch.full_like(radius, torch.nan)

    return call


# The built-in methods, in the order in which 'best' tries them: cheap methods first, because they often prove a requested radius.
METHODS: dict[str, Method] = {
    "global": Method(global_radii, lambda model, threat: "", "products of layerwise Lipschitz bounds, one for each rival class"),
    "local": Method(local_radii, local_why_not, "Lipschitz bounds around the clean activations"),
    "eclipse": Method(_without_constant(eclipse_radii), eclipse_why_not, "ECLipsE: Lipschitz constants of logit pairs, layer by layer"),
    "dual": Method(dual_radii, dual_why_not, "exact first-order term, remainders weighted by adjoints"),
    # Never above 'crown' except by rounding, so 'best' does not try it.
    "ibp": Method(ibp_radii, linear_why_not, "interval bound propagation", in_best=False),
    "crown": Method(crown_radii, linear_why_not, "CROWN: linear bounds propagated backward"),
    "local-lipschitz": Method(local_lipschitz_radii, linear_why_not, "Lipschitz bounds from the slopes of the activations on the ball"),
    "sdp": Method(sdp_radii, sdp_why_not, "Lagrange dual of the exact ReLU network, multipliers for each sample"),
    # The first batch of a model takes minutes, and 'sdp' proves larger radii on every sample of the zoo.
    "lipsdp": Method(_without_constant(lipsdp_radii), lipsdp_why_not, "LipSDP: Lipschitz constants of logit pairs", in_best=False),
    # Seconds to minutes a sample.
    "complete": Method(complete_radii, complete_why_not, "CROWN with optimised lines, then branch and bound over ReLUs", in_best=False, decides=True),
}


# Methods that take minutes for the first batch of a model, or seconds to minutes a sample.
SLOW = ("lipsdp", "complete")


def methods() -> dict[str, Method]:
    """METHODS, then the methods of other packages (`robustlip.plugins`). 'best' tries those last, if their `in_best` is set."""
    return {**METHODS, **added("robustlip.methods", METHODS, lambda value: isinstance(value, Method), "a robustlip.certifiers.methods.Method")}


def check_method(name: str) -> None:
    """Raises BadInput unless `name` is 'best' or a key of `methods()`."""
    if name != "best" and name not in methods():
        raise BadInput(f"expected a method among best, {', '.join(methods())}, got {name!r}; name one of them")


def radii_of_method(
    name: str, chain: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context
) -> tuple[Tensor, Tensor, list[str]]:
    """(radius (N,), Lipschitz constant (N,), name of the method that proved each radius). Raises UnsupportedLayer where the method does not apply."""
    if name != "best":
        method = methods()[name]
        if reason := method.why_not(chain, threat):
            raise UnsupportedLayer(f"expected a model and threat that method {name!r} covers: {reason.rstrip('.')}; use method='best'")
        if context.final_error and name not in METHODS:
            raise UnsupportedLayer(f"expected logits for the method {name!r} of a plugin, got one that ends with {chain.final}; return its logits")
        radius, constant = method.radii(chain, x, y, logits, threat, context)
        return radius, constant, [name] * len(y)
    return _best(chain, x, y, logits, threat, context)


def _best(chain: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context) -> tuple[Tensor, Tensor, list[str]]:
    """The largest radius of any method for each sample. If threat.radius is set, samples for which it is proved go to no further method."""
    asked = threat.radius is not None
    names = [name for name, m in methods().items() if (m.in_best or (m.decides and asked)) and not m.why_not(chain, threat)]
    names = [name for name in names if name in METHODS or not context.final_error]
    radius, constant = METHODS[names[0]].radii(chain, x, y, logits, threat, context)
    winner = [names[0]] * len(y)
    right = ((logits.argmax(-1) == y) & torch.isfinite(logits).all(-1)).cpu()
    wanted = torch.inf if threat.radius is None else threat.radius
    for name in names[1:]:
        part = (right & (radius < wanted)).nonzero()[:, 0]
        if len(part) == 0:
            break
        at = part.to(y.device)
        clean = {layer: (by_token, norm[part]) for layer, (by_token, norm) in context.clean.items()}
        try:
            found, its_constant = methods()[name].radii(chain, x[at], y[at], logits[at], threat, replace(context, clean=clean))
        except (BadInput, UnsupportedLayer):
            continue  # some methods refuse a size only when they run; the other methods' proofs remain valid
        found = found.nan_to_num(0.0)
        better = found > radius[part]
        radius[part] = torch.where(better, found, radius[part])
        constant[part] = torch.where(better & ~its_constant.isnan(), its_constant, constant[part])
        for i in part[better].tolist():
            winner[i] = name
    return radius, constant, winner
