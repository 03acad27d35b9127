"""The certifiers by name, what each covers, and the best of them per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustlip.domains.expansion.dual import dual_applies, dual_radii
from robustlip.domains.expansion.local import local_applies, local_radii
from robustlip.domains.lines import crown_radii, ibp_radii, linear_applies, local_lipschitz_radii
from robustlip.domains.norms import Context
from robustlip.domains.norms.bound import global_radii
from robustlip.domains.quadratic import eclipse_applies, eclipse_radii, lipsdp_applies, lipsdp_radii, sdp_applies, sdp_radii
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Chain
from robustlip.plugins import added
from robustlip.threats import Threat

Radii = Callable[[Chain, Tensor, Tensor, Tensor, Threat, Context], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Method:
    """radii: (radius (N,), Lipschitz constant to the last hidden state (N,), NaN where the method has none) of one batch, float64 on the CPU.

    applies: '' where the method covers model and threat, else the sentence that says why not. in_best: whether 'best' tries it.
    what: one line for tables and help.
    """

    radii: Radii
    applies: Callable[[Chain, Threat], str]
    what: str
    in_best: bool = True


def _without_constant(radii: Radii) -> Radii:
    """Report NaN: this method's constant is not the one from the input to the last hidden state."""

    def call(model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context) -> tuple[Tensor, Tensor]:
        radius, _ = radii(model, x, y, logits, threat, context)
        return radius, torch.full_like(radius, torch.nan)

    return call


# Ours, in the order in which 'best' tries them: cheap ones first, so that a requested radius is often proved before the dear ones are asked.
METHODS: dict[str, Method] = {
    "global": Method(global_radii, lambda model, threat: "", "enforced bounds of the weights, rival by rival"),
    "local": Method(local_radii, local_applies, "radii through the clean activations"),
    "eclipse": Method(_without_constant(eclipse_radii), eclipse_applies, "ECLipsE: Lipschitz constants of logit pairs, layer by layer"),
    "dual": Method(dual_radii, dual_applies, "first order exact, remainders weighted by adjoints"),
    # Never above 'crown' beyond rounding, so 'best' need not try it.
    "ibp": Method(ibp_radii, linear_applies, "interval bound propagation", in_best=False),
    "crown": Method(crown_radii, linear_applies, "CROWN: linear bounds carried back"),
    "local-lipschitz": Method(local_lipschitz_radii, linear_applies, "slopes that activations have on the ball"),
    "sdp": Method(sdp_radii, sdp_applies, "Lagrange dual of the exact ReLU network, multipliers by sample"),
    # Minutes for the first batch of a model; 'sdp' beats it sample by sample on the zoo.
    "lipsdp": Method(_without_constant(lipsdp_radii), lipsdp_applies, "LipSDP: Lipschitz constants of logit pairs", in_best=False),
}


def methods() -> dict[str, Method]:
    """METHODS, and behind them those of other packages (`robustlip.plugins`): 'best' tries them last, where their `in_best` says so."""
    return {**METHODS, **added("robustlip.methods", METHODS, lambda value: isinstance(value, Method), "a robustlip.certifiers.methods.Method")}


def check_method(name: str) -> None:
    """Raises BadInput for anything but 'best' and the keys of `methods()`."""
    if name != "best" and name not in methods():
        raise BadInput(f"expected a method among best, {', '.join(methods())}, got {name!r}; name one of them")


def radii_by(
    name: str, chain: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context
) -> tuple[Tensor, Tensor, list[str]]:
    """(radius (N,), constant (N,), the method that proved each). Raises UnsupportedLayer where a named method does not apply."""
    if name != "best":
        method = methods()[name]
        if reason := method.applies(chain, threat):
            raise UnsupportedLayer(f"expected a model and threat that method {name!r} covers: {reason.rstrip('.')}; use method='best'")
        if context.behind and name not in METHODS:
            raise UnsupportedLayer(f"expected logits for the method {name!r} of a plugin, got one that ends with {chain.final}; return its logits")
        radius, constant = method.radii(chain, x, y, logits, threat, context)
        return radius, constant, [name] * len(y)
    return _best(chain, x, y, logits, threat, context)


def _best(chain: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context) -> tuple[Tensor, Tensor, list[str]]:
    """The largest radius of any method per sample. With threat.radius set, a sample that is proved for it is done."""
    names = [name for name, method in methods().items() if method.in_best and not method.applies(chain, threat)]
    names = [name for name in names if name in METHODS or not context.behind]
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
            continue  # sizes that a method refuses are known only once it looks; the other methods' proofs stand
        found = found.nan_to_num(0.0)
        better = found > radius[part]
        radius[part] = torch.where(better, found, radius[part])
        constant[part] = torch.where(better & ~its_constant.isnan(), its_constant, constant[part])
        for i in part[better].tolist():
            winner[i] = name
    return radius, constant, winner
