"""Claims that can be audited: formulas that compute a Lipschitz constant of a model, with its norm and its domain.

A claim states ‖f(x') − f(x)‖ ≤ value·‖x' − x‖ for all x, x' in its domain. For transformers x is the embedding (T, D), with the largest
token norm, and the claim is about every output token; for other models x is the input as one vector. Only `ours` is proved. The others exist
so that `robustlip.attacks.audit` can try to refute them; code that certifies must not import this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robustlip.certifiers import lipschitz_bound
from robustlip.domains.norms import Context, State, run_rules
from robustlip.errors import BadInput
from robustlip.layers import (
    Abs,
    AddPositions,
    Attention,
    Chain,
    Clamp,
    GroupSort,
    Householder,
    MaxMin,
    MeanTokens,
    Normalize,
    Residual,
    ScaledGELU,
    as_chain,
)
from robustlip.numerics.spectral import spectral_norm_bound
from robustlip.ops import elementwise_of

UNITS = ("l2", "rms")
GELU_DIVISOR = 1.1289  # in the published code

# The seven mistakes of the published formula, docs/theory.md, section 5. The seventh concerns models with certain options.
MISTAKES = {
    1: "it takes norms of the whole W_q, W_k and W_v, although one head can have all of the norm and each head can attend to a different token",
    2: "it divides the MLP's constant by 1.1289 although the forward pass divides by it already",
    3: "1.1289 is below the largest slope of GELU (1.1289041 for erf, 1.1289931 for tanh)",
    4: "the attention scale multiplies the value term too, which is too small for scales below 1",
    5: "it takes the domain of clean embeddings, although a perturbed embedding can lie outside",
    6: "its norms come from logs of training or power iteration instead of the weights in use",
    7: "it ignores final_scale, the factor on the logits, and the substitutes for LayerNorm",
}


@dataclass(frozen=True)
class Claim:
    """A claimed Lipschitz constant.

    value: in `units`, 'l2' (per-token ℓ2 in, ℓ2 out) or 'rms' (∞-RMS in, RMS out; the paper's). domain: the largest token norm ‖x_t‖₂ (in ℓ2,
    for all units) for which it is claimed, None for all inputs. fan_in, fan_out: numbers per input and output token, for conversion.
    layers: (name, constant of that layer, in the same units).
    """

    formula: str
    value: float
    units: str
    domain: float | None
    fan_in: int
    fan_out: int
    layers: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.units not in UNITS:
            raise BadInput(f"expected units among {', '.join(UNITS)}, got {self.units!r}; name one of them")
        if not (math.isfinite(self.value) and self.value >= 0):
            raise BadInput(f"expected a claimed Lipschitz constant that is finite and at least 0, got {self.value}; there is nothing to audit")
        if self.domain is not None and not (math.isfinite(self.domain) and self.domain > 0):
            raise BadInput(f"expected a domain (largest token norm) above 0, got {self.domain}; give a positive number")

    def unit(self, units: str | None = None) -> float:
        """The factor from ℓ2 to `units` (the claim's own by default): √(fan_in/fan_out) for rms, 1 for l2."""
        return math.sqrt(self.fan_in / self.fan_out) if (units or self.units) == "rms" else 1.0

    def in_units(self, units: str) -> Claim:
        """The same claim converted to other units."""
        if units == self.units or units not in UNITS:
            return replace(self, units=units)
        factor = self.unit(units) / self.unit()
        return replace(self, units=units, value=self.value * factor)


def widths(chain: Chain) -> tuple[int, int]:
    """(numbers per token after the embedding, or of the whole input; numbers per output token), from the Linear layers."""
    linear = [m for layer in list(chain)[chain.embedding_depth :] for m in layer.modules() if type(m) is nn.Linear]
    if not linear:
        raise BadInput("expected a model with at least one Linear layer, got none; there is nothing to audit")
    return linear[0].in_features, linear[-1].out_features


def _sigma(weight: Tensor) -> float:
    return float(spectral_norm_bound(weight.detach()))


def _check_papers(layer: Attention, formula: str) -> None:
    """Raises BadInput for an attention layer to which the formula does not apply."""
    if not layer.is_papers:
        raise BadInput(f"expected attention in the paper's form for the formula {formula}, got {layer.extra_repr()}; audit with --formula ours")


def _mlp_of(layer: nn.Module) -> tuple[nn.Linear, ScaledGELU, nn.Linear] | None:
    """(W_in, GELU, W_out) of the paper's MLP, or None."""
    if type(layer) is nn.Sequential and [type(m) for m in layer] == [nn.Linear, ScaledGELU, nn.Linear]:
        return layer[0], layer[1], layer[2]  # type: ignore[return-value]
    return None


def _in_place_of_norm(layer: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """(substitute for LayerNorm, the module after it) in a branch of the published code, or None. Substitutes have no trained parameters."""
    if type(layer) is not nn.Sequential or len(layer) < 2:
        return None
    front, rest = layer[0], layer[1:]
    affine = getattr(front, "elementwise_affine", True)
    if type(front) is nn.Tanh or (type(front) in (nn.RMSNorm, nn.LayerNorm) and not affine and front.eps):
        return front, rest
    return None


def _after_substitute(front: nn.Module, norm: float) -> tuple[float, float]:
    """(Lipschitz constant in RMS, RMS norm of the output) of a norm substitute on tokens of RMS norm ≤ norm; it divides by √(mean x² + eps)."""
    if type(front) is nn.Tanh:
        return 1.0, min(norm, 1.0)
    eps = float(front.eps)  # type: ignore[arg-type]
    return 1 / math.sqrt(eps), min(norm / math.sqrt(eps), 1.0)


def newhouse_layer(layer: nn.Module, norm: float, repair: Collection[int] = ()) -> tuple[float, float]:
    """(constant, factor of growth of the norm) of an attention or MLP layer, or a residual of one, both in RMS, for tokens of RMS norm ≤ `norm`.

    repair: numbers of MISTAKES to correct (1, 2, 4 and 7 change the value); by default this is the published formula.
    Raises BadInput for any other layer.
    """
    if type(layer) is Residual and type(layer.branch) is nn.Identity:  # final_scale
        factor = abs(layer.skip + layer.weight) if 7 in repair else 1.0
        return factor, factor
    if type(layer) is Residual:
        constant, growth = newhouse_layer(layer.branch, norm, repair)
        skip, weight = abs(layer.skip), abs(layer.weight)
        return skip + weight * constant, skip + weight * growth
    if type(layer) is Attention:
        _check_papers(layer, "newhouse2025")
        q, k, v, o = (_sigma(layer.matrices()[name]) for name in ("query", "key", "value", "output"))
        third = abs(layer.output_scale)
        on_values, on_logits = (1.0, layer.scale) if 4 in repair else (layer.scale, layer.scale)
        if 1 in repair:
            stacks = (layer.matrices()[n].detach() for n in ("query", "key", "value"))
            heads = [spectral_norm_bound(stack.unflatten(0, (layer.heads, -1))) for stack in stacks]
            # In RMS the logits of one head are H·σ_q,h σ_k,h‖x‖²/D: section 4's a²/d = H·norm².
            each = heads[2] * (on_values + 2 * on_logits * heads[0] * heads[1] * layer.heads * norm**2)
            return third * o * float(each.square().sum().sqrt()), third * o * float(heads[2].square().sum().sqrt())
        return third * o * v * (on_values + 2 * on_logits * norm**2 * q * k), third * o * v
    substituted = _in_place_of_norm(layer)
    if substituted is not None:
        front, rest = substituted
        if 7 not in repair:
            return newhouse_layer(rest, norm, repair)
        own, after = _after_substitute(front, norm)
        constant, growth = newhouse_layer(rest, after, repair)
        return own * constant, growth * after / norm if norm else 0.0
    mlp = _mlp_of(layer)
    if type(layer) is nn.Sequential and len(layer) == 1:
        return newhouse_layer(layer[0], norm, repair)
    if mlp is not None:
        if mlp[1].divisor != GELU_DIVISOR:
            raise BadInput(f"expected GELU divided by {GELU_DIVISOR} for the formula newhouse2025, got {mlp[1].divisor}; audit with --formula ours")
        product = _sigma(mlp[0].weight) * _sigma(mlp[2].weight)
        return product if 2 in repair else product / GELU_DIVISOR, product / GELU_DIVISOR
    raise BadInput(
        f"expected attention and MLP layers of the paper (W_out·GELU(W_in x)/{GELU_DIVISOR}) for the formula newhouse2025, "
        f"got {type(layer).__name__}; audit with --formula product or ours"
    )


def newhouse2025(model: nn.Module, repair: Collection[int] = ()) -> Claim:
    """The published constant of a Lipschitz transformer from its embeddings to its logits (`calculate_lipschitz_constant` of the code of
    Newhouse et al. 2025), in ∞-RMS, on embeddings of RMS norm ≤ 1: L ← L(|skip| + |weight|Λ) over the residuals with
    Λ_att = s·σ_o σ_v(1 + 2σ_q σ_k a²)/3 and Λ_mlp = σ_out σ_in/1.1289, a ← a(|skip| + |weight|·growth), then the head.

    Of its mistakes (MISTAKES) it reproduces 1, 2, 3, 4, 5 and 7, but not 6: norms are computed from the weights in use. It also uses the residuals'
    own weights, while the published code uses 1/(2·blocks) for every value of its option residual_scale. Both favour the formula.
    The published product starts with the norm of the embedding, for one-hot inputs; claims here are about embeddings, so it starts with 1.
    Raises BadInput for a model to which it does not apply: no embedding, a learned LayerNorm, another activation, other kinds of layers.
    """
    chain = as_chain(model)
    if chain.embedding_depth == 0:
        raise BadInput("expected a transformer with an embedding for newhouse2025, got a model without one; audit it with --formula product or ours")
    constant, norm, rows = 1.0, 1.0, []
    body = list(chain.named_children())[chain.embedding_depth :]
    for i, (name, layer) in enumerate(body):
        if type(layer) is MeanTokens:
            continue
        if type(layer) is nn.Linear and i == len(body) - 1:
            own = _sigma(layer.weight) * math.sqrt(layer.in_features / layer.out_features)
            growth = own
        else:
            own, growth = newhouse_layer(layer, norm, repair)
        rows.append((name, own))
        constant, norm = constant * own, norm * growth
    fan_in, fan_out = widths(chain)
    return Claim("newhouse2025", constant, "rms", math.sqrt(fan_in), fan_in, fan_out, tuple(rows))


_TAKEN_AS_ONE = (
    nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.ReLU6, nn.Softshrink, Abs, Clamp, MaxMin, GroupSort, Householder, nn.Flatten, nn.Identity,
    nn.Dropout, MeanTokens, AddPositions,
)  # fmt: skip


def _product(layer: nn.Module) -> float:
    """The factor of one layer in a product of norms, in ℓ2."""
    if type(layer) is Residual:
        return abs(layer.skip) + abs(layer.weight) * _product(layer.branch)
    if type(layer) is nn.Sequential:
        return math.prod(_product(part) for part in layer)
    if type(layer) is nn.Linear:
        return _sigma(layer.weight)
    if type(layer) is Attention:
        _check_papers(layer, "product")
        matrices = layer.matrices()
        return abs(layer.output_scale) * _sigma(matrices["output"]) * _sigma(matrices["value"])
    if type(layer) is nn.LayerNorm:
        return 1.0 if layer.weight is None else float(layer.weight.detach().abs().amax())
    if type(layer) is Normalize:
        return 1 / float(layer.get_buffer("std").double().min())
    if type(layer) is ScaledGELU:
        return 1 / layer.divisor
    if type(layer) in (nn.LeakyReLU, nn.PReLU):
        return elementwise_of(layer).steepest
    if type(layer) in _TAKEN_AS_ONE:
        return 1.0
    raise BadInput(f"expected layers to which the formula product applies, got {type(layer).__name__}; audit with --formula ours or --claim")


def product(model: nn.Module) -> Claim:
    """The product of the spectral norms of the Linear layers, in ℓ2, as it is often stated for any network.

    It assumes that activations, also GELU, and LayerNorm's division have slope at most 1, that residuals add |skip| + |weight|·branch (true), and
    that attention only averages: σ(W_o)σ(W_v) with constant attention weights. True for ReLU and tanh MLPs on all inputs; false for GELU
    (1.1289), LayerNorm and attention. For transformers the domain is that of their own embeddings.
    """
    chain = as_chain(model)
    rows = [(name, _product(layer)) for name, layer in list(chain.named_children())[chain.embedding_depth :]]
    return Claim("product", math.prod(v for _, v in rows), "l2", own_domain(chain), *widths(chain), tuple(rows))


def published(model: Chain) -> tuple[float | None, str]:
    """The published formula for the weights in use, ∞-RMS, from embeddings (transformers) or inputs (MLPs); or None and the reason."""
    config = model.config or {}
    try:
        if model.embedding_depth:
            return newhouse2025(model).value, ""
        if config.get("kind") == "mlp" and config.get("activation") == "relu":
            return product(model).in_units("rms").value, ""
    except BadInput as error:
        return None, str(error)
    return None, "the published formula applies to transformers and to MLPs with ReLU"


def ours(model: nn.Module) -> Claim:
    """`robustlip.certifiers.lipschitz_bound`: proved, in ℓ2, on the domain of the model's own embeddings."""
    bound = lipschitz_bound(model)
    domain = bound["domain"]
    return Claim("ours", float(bound["l2"]), "l2", None if isinstance(domain, str) else domain, *widths(as_chain(model)))


def own_domain(chain: Chain) -> float | None:
    """The largest token norm of the model's own embeddings, None for a model without embeddings."""
    if chain.embedding_depth == 0:
        return None
    domain = lipschitz_bound(chain)["domain"]
    return None if isinstance(domain, str) else domain


def stated(model: nn.Module, value: float, units: str = "l2", domain: float | None = None) -> Claim:
    """A number given by the user. domain: the largest token norm (ℓ2) for which it is claimed; default for transformers: that of their embeddings."""
    chain = as_chain(model)
    return Claim("claim", value, units, own_domain(chain) if domain is None else domain, *widths(chain))


FORMULAS: dict[str, Callable[[nn.Module], Claim]] = {"newhouse2025": newhouse2025, "product": product, "ours": ours}


def claim_of(model: nn.Module, formula: str) -> Claim:
    """The claim of a formula by name. Raises BadInput for an unknown name and for a model to which the formula does not apply."""
    if formula not in FORMULAS:
        raise BadInput(f"expected a formula among {', '.join(FORMULAS)}, got {formula!r}; name one of them or give --claim")
    return FORMULAS[formula](model)


def layer_claim(layer: nn.Module, formula: str, domain: float) -> Claim:
    """The claim of a formula for one attention or MLP layer (N, T, D) → (N, T, D) on tokens of ℓ2 norm ≤ domain, in RMS."""
    linear = [m for m in layer.modules() if type(m) is nn.Linear]
    width = linear[0].in_features
    if formula == "newhouse2025":
        value = newhouse_layer(layer, domain / math.sqrt(width))[0]
    elif formula == "product":
        value = _product(layer)
    elif formula == "ours":
        step = torch.full((1,), 1e-100, dtype=torch.float64)
        norm = torch.full((1,), domain, dtype=torch.float64)
        state = run_rules([layer], State(norm, step, torch.zeros_like(step), "l2", 1, width), Context(dtype=torch.float64, store={}))
        value = float(state.change / step) * (1 + 1e-15)
    else:
        raise BadInput(f"expected a formula among {', '.join(FORMULAS)} for single layers, got {formula!r}; a number is for the whole model only")
    return Claim(formula, value, "rms", domain, width, linear[-1].out_features)


def norms_in_front(chain: Chain, formula: str) -> Iterable[tuple[str, nn.Module, float]]:
    """(name, attention or MLP layer without its residual, largest ℓ2 norm of its input tokens) for the layers of a transformer, as in the formula."""
    width = widths(chain)[0]
    root = math.sqrt(width)
    norm = root if formula == "newhouse2025" else own_domain(chain)
    assert norm is not None
    context = Context(dtype=torch.float64, store={})
    for name, layer in list(chain.named_children())[chain.embedding_depth :]:
        branch = layer.branch if type(layer) is Residual else layer
        if type(branch) is Attention or _mlp_of(branch) is not None:
            yield name, branch, norm
        if formula == "newhouse2025":
            if type(layer) not in (nn.Linear, MeanTokens):
                norm *= newhouse_layer(layer, norm / root)[1]
        else:
            state = State(torch.tensor([norm], dtype=torch.float64), *(torch.zeros(1, dtype=torch.float64),) * 2, "l2", 1, width)
            norm = float(run_rules([layer], state, context).norm)


def explain(model: nn.Module, claim: Claim) -> str:
    """One sentence: the assumption of the formula that most likely causes a violation."""
    if claim.formula == "newhouse2025":
        repaired = {i: newhouse2025(model, {i}).value for i in (1, 2, 4, 7)}
        worst = max(repaired, key=lambda i: repaired[i])
        uncorrected = newhouse2025(model).value
        if repaired[worst] <= uncorrected * (1 + 1e-9):
            return f"None of its mistakes alone lowers this value (docs/theory.md, section 5): {MISTAKES[5]}."
        instead = f"corrected, the formula gives {repaired[worst]:.4g} instead of {uncorrected:.4g} (RMS)"
        return f"Mistake {worst} of the published formula: {MISTAKES[worst]}; {instead}."
    if claim.formula == "product":
        kinds = {type(m) for m in model.modules()}
        if Attention in kinds:
            return "A product of spectral norms assumes constant attention weights; they depend on the input."
        if nn.LayerNorm in kinds:
            return "A product of spectral norms assumes that LayerNorm is 1-Lipschitz; it divides by a standard deviation that can be small."
        return "A product of spectral norms assumes that activations are 1-Lipschitz; GELU has slope up to 1.1289."
    if claim.formula == "ours":
        return "This bound is proved: a violation is a bug in robustlip; please report it with the witness."
    return "The pair of inputs in the witness refutes the claim."
