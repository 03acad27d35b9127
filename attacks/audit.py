"""Audit: try to break a claimed Lipschitz constant, and keep the pair of inputs that comes closest.

    audit(model, newhouse2025(model)).verdict        # 'violated', or 'not refuted': nothing found that contradicts the claim

Everything is computed in float64 on a float64 copy of the model, in the norm of the claim: the largest token norm in and out (one token
for models without tokens). What is reported is never a derivative: it is ‖f(x') − f(x)‖/‖x' − x‖ of an actual pair inside the domain,
less what rounding can have added.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.attacks import formulas
from robustlip.attacks.formulas import Claim
from robustlip.attacks.worst_weights import worst_attention_like, worst_mlp
from robustlip.checkpoints import load_tensors, save_tensors
from robustlip.domains.norms import Context, State, run_rules
from robustlip.errors import BadInput, RobustlipError
from robustlip.geometry import safe_divide
from robustlip.hashing import architecture_sha256, weights_sha256
from robustlip.layers import Attention, Chain, ScaledGELU, as_chain
from robustlip.numerics.rounding import U64, gamma, norm_up
from robustlip.samples import as_samples

VIOLATED, HOLDS = "violated", "not refuted"
MOST_STARTS = 2**20  # in one batch
INSIDE = 1e-12  # relative margin to the border of the domain, so that norms summed in any order stay within it


@dataclass(frozen=True)
class Audit:
    """The pair of inputs that contradicts a claim most, or comes closest to it.

    claimed, found: Lipschitz constants in `units`; found is a lower bound of the true one, rounding subtracted. domain: largest token norm
    (ℓ2) of the claim, None for all inputs. x, x_prime: float64, embeddings (T, D) or one raw input. distance, change: ‖x' − x‖ and
    ‖f(x') − f(x)‖ in ℓ2. rounding: what was subtracted from `change`; 'proved' if the layers' rules prove it, else 'estimated' from float32.
    layers: (name, the claim's constant of that layer alone). why: one sentence on the formula's mistake, empty where the claim holds.
    """

    formula: str
    claimed: float
    found: float
    units: str
    domain: float | None
    space: str
    x: Tensor
    x_prime: Tensor
    distance: float
    change: float
    rounding: float
    rounding_kind: str
    starts: int
    seed: int
    weights_sha256: str
    architecture_sha256: str
    seconds: float = 0.0
    layers: tuple[tuple[str, float], ...] = ()
    why: str = ""
    worst: tuple[WorstLayer, ...] = field(default=())

    @property
    def ratio(self) -> float:
        """found/claimed: above 1 the claim is false."""
        return self.found / self.claimed if self.claimed > 0 else math.inf if self.found > 0 else 0.0

    @property
    def verdict(self) -> str:
        return VIOLATED if self.found > self.claimed else HOLDS

    @property
    def violated(self) -> bool:
        """Whether these weights, or the worst weights of the same norms, contradict the formula."""
        return self.verdict == VIOLATED or any(w.verdict == VIOLATED for w in self.worst)

    @property
    def norm(self) -> str:
        tokens = self.space == "embedding"
        if self.units == "rms":
            return "∞-RMS (largest token RMS) in and out" if tokens else "RMS in and out"
        return "largest token ℓ2 norm in and out" if tokens else "ℓ2 in and out"

    def to_json_dict(self) -> dict[str, Any]:
        """Everything but the inputs, which the witness file holds."""
        hidden = ("x", "x_prime", "worst", "layers")
        plain = {k: v for k, v in self.__dict__.items() if k not in hidden}
        plain |= {"ratio": self.ratio, "verdict": self.verdict, "norm": self.norm, "layers": [{"layer": n, "constant": c} for n, c in self.layers]}
        return plain | {"worst_weights": [w.to_json_dict() for w in self.worst]}


@dataclass(frozen=True)
class WorstLayer:
    """One layer with the weights that an adversary would choose under the layer's own norms (kept: which), against the same formula."""

    formula: str
    layer: str
    part: str
    kept: str
    claimed: float
    found: float
    units: str
    domain: float | None
    tokens: bool
    module: nn.Sequential
    x: Tensor
    x_prime: Tensor

    @property
    def ratio(self) -> float:
        return self.found / self.claimed if self.claimed > 0 else math.inf if self.found > 0 else 0.0

    @property
    def verdict(self) -> str:
        return VIOLATED if self.found > self.claimed else HOLDS

    def to_json_dict(self) -> dict[str, Any]:
        plain = {k: v for k, v in self.__dict__.items() if k not in ("module", "tokens", "x", "x_prime")}
        return plain | {"ratio": self.ratio, "verdict": self.verdict}


# ---------------------------------------------------------------------------------------------------------------- what is measured


class _Target:
    """A float64 map of batches of inputs (S, T, D) → (S, U, V), with its domain; vectors and images are one token, T = 1.

    shape: of one input as the layers want it. domain: ‖x_t‖₂ ≤ domain, None for everything; box: low ≤ every coordinate ≤ high, or None.
    """

    def __init__(
        self, layers: nn.Sequential, shape: tuple[int, ...], *, tokens: bool, domain: float | None, box: tuple[float, float] | None = None
    ) -> None:
        self.layers = layers.double().eval().requires_grad_(False)
        self.shape, self.tokens, self.domain, self.box = shape, tokens, domain, box
        self.single: nn.Sequential | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = self.layers(x.reshape(-1, *self.shape) if not self.tokens else x)
        return y if y.dim() == 3 and self.tokens else y.reshape(len(y), 1, -1)

    def project(self, x: Tensor, room: Tensor | float = 0.0) -> Tensor:
        """x (S, T, D) moved into the domain, `room` (S, 1, 1) away from its border."""
        if self.box is not None:
            x = x.clamp(*self.box)
        if self.domain is not None:
            limit = torch.as_tensor((self.domain - room) * (1 - INSIDE), dtype=x.dtype, device=x.device).clamp_min(0.0)
            x = x * safe_divide(limit, x.norm(dim=-1, keepdim=True)).clamp_max(1.0)
        return x

    def inside(self, x: Tensor) -> Tensor:
        """(S,) whether all of x (S, T, D) is in the domain, rounding of the norm included."""
        good = torch.isfinite(x).flatten(1).all(1)
        if self.box is not None:
            good &= ((x >= self.box[0]) & (x <= self.box[1])).flatten(1).all(1)
        if self.domain is not None:
            good &= (norm_up(x).amax(-1) <= self.domain * (1 + 1e-13)).to(x.device)
        return good

    def proved_rounding(self, norm: Tensor) -> Tensor | None:
        """‖executed − exact‖₂ (S,) of each output token for token norms ≤ norm (S,), by the rules; None where a layer has no rule."""
        layers = [m for m in self.layers]
        rows, width = (self.shape[0], self.shape[1]) if self.tokens else (1, math.prod(self.shape))
        zero = torch.zeros_like(norm)
        state = State(norm, zero, zero, "l2", rows, width, None if self.tokens or len(self.shape) == 1 else self.shape)
        try:
            return run_rules(layers, state, Context(dtype=torch.float64, store={})).rounding
        except BadInput:
            return None

    def estimated_rounding(self, x: Tensor) -> Tensor:
        """(S,) an estimate: the error of a float32 run, scaled to float64 and multiplied by 64."""
        if self.single is None:
            self.single = copy.deepcopy(self.layers).float()
        exact = self(x.float().double())
        y = self.single(x.float().reshape(-1, *self.shape) if not self.tokens else x.float()).double().reshape_as(exact)
        return 64 * 2.0**-29 * (y - exact).norm(dim=-1).amax(-1)

    def ratios(self, a: Tensor, b: Tensor, *, estimate: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pairs (S, T, D) → (found, change, distance, rounding), each (S,), ℓ2: found = (change − rounding)/distance, 0 outside the domain."""
        difference = self(b) - self(a)
        change = difference.norm(dim=-1).amax(-1)
        distance = (b - a).norm(dim=-1).amax(-1) * (1 + gamma(a.shape[-1] + 8, U64))
        if estimate:
            rounding = self.estimated_rounding(a) + self.estimated_rounding(b)
        else:
            proved = self.proved_rounding(torch.maximum(norm_up(a).amax(-1), norm_up(b).amax(-1)).cpu())
            rounding = 2 * proved.to(a.device) if proved is not None else torch.full_like(change, torch.inf)
        rounding = rounding + gamma(difference.shape[-1] + 8, U64) * change
        found = safe_divide((change - rounding).clamp_min(0.0), distance)
        good = self.inside(a) & self.inside(b) & torch.isfinite(found)
        return torch.where(good, found, 0.0), change, distance, rounding


@dataclass(frozen=True)
class Steps:
    """How long a search is, and whom it tells: advance(what, done, total)."""

    power: int
    ascent: int
    advance: Callable[[str, int, int], None]


def _unit(x: Tensor) -> Tensor:
    """Every token scaled to ℓ2 norm 1 (0 stays 0): the steepest per-token direction along x."""
    return safe_divide(x, x.norm(dim=-1, keepdim=True))


def _best_output(y: Tensor) -> Tensor:
    """y (S, U, V) → the unit vector along its largest token, 0 elsewhere: the steepest output functional in the largest token norm."""
    size = y.norm(dim=-1)
    top = torch.zeros_like(size).scatter(1, size.argmax(1, keepdim=True), 1.0)
    return _unit(y) * top.unsqueeze(-1)


def _pull(f: _Target, x: Tensor, u: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """(x with a gradient, Jᵀu)."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad((f(x) * u).sum(), x, create_graph=create_graph, allow_unused=True)
    return x, torch.zeros_like(x) if g is None else g


def _push(f: _Target, x: Tensor, v: Tensor) -> Tensor:
    """Jv."""
    return torch.func.jvp(f, (x.detach(),), (v,))[1].detach()


class _Keeper:
    """The best pair of every start so far."""

    def __init__(self, f: _Target, starts: Tensor) -> None:
        self.f, self.best = f, torch.full((len(starts),), -1.0, dtype=torch.float64, device=starts.device)
        self.a, self.b = starts.clone(), starts.clone()

    def offer(self, a: Tensor, b: Tensor, *, floor: float) -> None:
        """a, b (S, T, D). floor: relative rounding that is assumed of the change, so that tiny steps do not win by noise."""
        with torch.no_grad():
            change = (self.f(b) - self.f(a)).norm(dim=-1).amax(-1)
            distance = (b - a).norm(dim=-1).amax(-1)
            found = safe_divide(change - floor, distance)
            better = (found > self.best) & self.f.inside(a) & self.f.inside(b)
            self.best = torch.where(better, found, self.best)
            where = better[:, None, None]
            self.a, self.b = torch.where(where, a, self.a), torch.where(where, b, self.b)


def _pair(f: _Target, x: Tensor, v: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """x ± length·v/2 around an x that was moved away from the border by as much; v: tokens of norm ≤ 1, length (S, 1, 1)."""
    middle = f.project(x, length / 2)
    return f.project(middle - length / 2 * v), f.project(middle + length / 2 * v)


def _search(
    f: _Target, starts: Tensor, size: float, steps: Steps, generator: torch.Generator, direction: Tensor | None = None
) -> _Keeper:
    """Power iteration at every start (S, T, D), ascent of the Jacobian's norm on x, then ascent of finite differences. size: of an input."""

    power_steps, ascent_steps = steps.power, steps.ascent

    def random_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)

    x = f.project(starts)
    v = _unit(random_like(x) if direction is None else direction)
    keeper = _Keeper(f, x)
    with torch.no_grad():
        floor = 1e-14 * float(f(x).norm(dim=-1).amax(-1).median())

    def lengths(*relative: float) -> list[Tensor]:
        return [torch.full((len(x), 1, 1), size * r, dtype=torch.float64, device=x.device) for r in relative]

    def offer(x: Tensor, v: Tensor) -> None:
        for length in lengths(1e-5, 1e-4, 1e-2, 0.3):
            keeper.offer(*_pair(f, x, v, length), floor=floor)

    def iterate(x: Tensor, v: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            v = _unit(_pull(f, x, _best_output(_push(f, x, v)))[1])
        return v

    v = iterate(x, v, power_steps)
    offer(x, v)
    # Ascent on x: φ(x) = Σ_t ‖(Jᵀu)_t‖ = max_v ⟨u, Jv⟩ over tokens of norm 1, u the best output for the best v so far.
    rate = 0.1 * size / math.sqrt(x.shape[-1])
    moving = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=rate)
    best, best_x, best_v = torch.zeros(len(x), dtype=torch.float64, device=x.device), x.clone(), v.clone()
    for step in range(ascent_steps):
        steps.advance("ascent of the Jacobian", step, ascent_steps)
        optimizer.param_groups[0]["lr"] = rate * (1 - 0.95 * step / ascent_steps)
        u = _best_output(_push(f, moving, v))
        inner, g = _pull(f, moving, u, create_graph=True)
        v = _unit(g.detach())
        value = g.norm(dim=-1).sum(-1)
        better = value.detach() > best
        best = torch.where(better, value.detach(), best)
        best_x = torch.where(better[:, None, None], inner.detach(), best_x)
        best_v = torch.where(better[:, None, None], v, best_v)
        slope = torch.autograd.grad(value.sum(), inner, allow_unused=True)[0] if g.requires_grad else None
        if slope is None or not bool((slope != 0).any()):
            break  # piecewise linear: the Jacobian does not feel x, the finite differences below do
        moving.grad = -torch.nan_to_num(slope)
        optimizer.step()
        with torch.no_grad():
            moving.copy_(f.project(moving))
    best_v = iterate(best_x, best_v, power_steps)
    offer(best_x, best_v)
    # Ascent of ‖f(x + hw/2) − f(x − hw/2)‖ over x and w (‖w_t‖ ≤ 1), at a length h of each start's own.
    spread = torch.tensor([1e-2, 0.1, 0.5, 1.0], dtype=torch.float64, device=x.device)
    h = (size * spread[torch.arange(len(x), device=x.device) % len(spread)])[:, None, None]
    points = [best_x.clone().requires_grad_(), best_v.clone().requires_grad_()]
    optimizer = torch.optim.Adam([{"params": [points[0]], "lr": rate}, {"params": [points[1]], "lr": 0.1 / math.sqrt(x.shape[-1])}])
    for step in range(ascent_steps):
        steps.advance("ascent of finite differences", step, ascent_steps)
        a, b = _pair(f, points[0], points[1], h)
        change = (f(b) - f(a)).norm(dim=-1).amax(-1)
        gradients = torch.autograd.grad(change.sum(), points, allow_unused=True)
        if step % 5 == 0 or step == ascent_steps - 1:
            keeper.offer(a.detach(), b.detach(), floor=floor)
        for point, gradient in zip(points, gradients, strict=True):
            point.grad = torch.zeros_like(point) if gradient is None else -torch.nan_to_num(gradient)
        optimizer.step()
        with torch.no_grad():
            points[0].copy_(f.project(points[0]))
            points[1].copy_(points[1] / points[1].norm(dim=-1, keepdim=True).clamp_min(1.0))
    middle = (keeper.a + keeper.b) / 2
    offer(middle, iterate(middle, _unit(keeper.b - keeper.a), power_steps))
    return keeper


def _measure(f: _Target, a: Tensor, b: Tensor) -> tuple[int, float, float, float, float, str]:
    """(which pair, found, change, distance, rounding, its kind) of the best of the pairs, all in ℓ2."""
    with torch.no_grad():
        results = {"proved": f.ratios(a, b, estimate=False)}
        top = int(results["proved"][0].argmax())
        found, change, distance, rounding = (float(column[top]) for column in results["proved"])
        if rounding <= 1e-6 * change:
            return top, found, change, distance, rounding, "proved"
        # A guaranteed allowance of many layers can be larger than what it is subtracted from; then it says nothing.
        estimated = f.ratios(a, b, estimate=True)
        other = int(estimated[0].argmax())
        if float(estimated[0][other]) <= found:
            return top, found, change, distance, rounding, "proved"
        found, change, distance, rounding = (float(column[other]) for column in estimated)
        return other, found, change, distance, rounding, "estimated"


def _hunt(
    f: _Target, starts: Tensor, size: float, steps: Steps, generator: torch.Generator, direction: Tensor | None = None
) -> tuple[Tensor, Tensor, float, float, float, float, str]:
    """(x, x', found, change, distance, rounding, its kind) of the best pair that `_search` finds."""
    # Neither the flash kernels' second derivative nor their forward mode exists; the plain kernel has both.
    with torch.inference_mode(False), torch.enable_grad(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        keeper = _search(f, starts, size, steps, generator, direction)
        which, found, change, distance, rounding, kind = _measure(f, keeper.a, keeper.b)
    if not math.isfinite(change):
        raise RobustlipError("expected finite outputs, got NaN or infinity inside the domain; find the layer that overflows")
    return keeper.a[which].cpu(), keeper.b[which].cpu(), found, change, distance, rounding, kind


# ---------------------------------------------------------------------------------------------------------------- the audit


def _target(chain: Chain, domain: float | None, shape: tuple[int, ...], box: tuple[float, float] | None) -> _Target:
    double = as_chain(copy.deepcopy(chain))
    for module in double.modules():  # of the copy: its inputs are measured, and differentiated
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    layers = nn.Sequential(*list(double)[chain.embedding_depth :])
    return _Target(layers, shape, tokens=chain.embedding_depth > 0, domain=domain, box=box)


def _input_shape(chain: Chain, x: Tensor | None) -> tuple[int, ...]:
    if x is not None:
        return tuple(x.shape[1:])
    first = next((m for m in chain.modules() if type(m) is nn.Linear), None)
    if first is None:
        raise BadInput("expected a model with a Linear layer or samples x, got neither; give samples, which show the shape of an input")
    return (first.in_features,)


def _starts(
    chain: Chain, x: Tensor | None, domain: float | None, box: tuple[float, float] | None, starts: int, tokens: int, generator: torch.Generator
) -> tuple[Tensor, tuple[int, ...], float]:
    """(starting points (S, T, D) float64, shape of one input, size of an input). Half from the model's own inputs, half random, of several sizes."""
    device = next(chain.parameters()).device

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    if chain.embedding_depth:
        width = formulas.widths(chain)[0]
        first = chain[0]
        own: Tensor | None = None
        if x is not None:
            chain.check_inputs(x)
            own = chain.embed(x.to(device)).detach().double()
        elif isinstance(first, nn.Embedding):
            ids = torch.randint(first.num_embeddings, (starts, tokens), generator=generator)
            ids[0] = torch.arange(tokens) % first.num_embeddings
            own = first.weight.detach().double()[ids.to(device)]
        length = tokens if own is None else own.shape[1]
        size = domain if domain is not None else math.sqrt(width) if own is None else float(own.norm(dim=-1).max())
        random = _unit(noise(starts, length, width)) * size
        random[1::3] *= 0.3
        points = random if own is None else torch.cat([own[: (starts + 1) // 2], random])[: max(starts, 1)]
        return points, (length, width), size
    shape = _input_shape(chain, x)
    numbers = math.prod(shape)
    if box is not None:
        points = box[0] + (box[1] - box[0]) * torch.rand(starts, numbers, generator=generator, dtype=torch.float64).to(device)
        points[1::2] = (points[1::2] - (box[0] + box[1]) / 2) * 0.2 + (box[0] + box[1]) / 2
        size = (box[1] - box[0]) * math.sqrt(numbers) / 2
    else:
        points = noise(starts, numbers)
        points[1::3] *= 0.1
        points[2::3] *= 10.0
        size = math.sqrt(numbers)
    if x is not None:
        chain.check_inputs(x)
        points = torch.cat([x.to(device).double().flatten(1)[: (starts + 1) // 2], points])[:starts]
    return points[:, None], shape, size


def audit(
    model: nn.Module,
    claim: Claim,
    x: Any = None,
    *,
    starts: int = 32,
    tokens: int = 8,
    power_steps: int = 20,
    ascent_steps: int = 60,
    box: tuple[float, float] | None = None,
    worst_weights: bool = False,
    seed: int = 0,
    advance: Callable[[str, int, int], None] | None = None,
) -> Audit:
    """Looks for two inputs in the claim's domain between which the model moves by more than the claim allows.

    claim: of `robustlip.attacks.formulas`. x: raw inputs (N, …), in the forms of `robustlip.samples`, to start from besides random ones; without it
    sequences have `tokens` tokens.
    starts: searched in one batch. power_steps: of the iteration v ← steepest(Jᵀ steepest(J v)) by forward and reverse products. ascent_steps:
    of gradient ascent on the input, first of the Jacobian's norm and then of the finite difference. box: (low, high) for every coordinate
    of models without an embedding; None lets inputs range over everything, as claims without a domain do.
    worst_weights: also try the formula on weights of the same shapes and norms that an adversary chooses, layer by layer.
    advance(what, done, total) is called as it goes. The model is copied. Raises BadInput.
    """
    began = time.perf_counter()
    if starts < 1 or tokens < 1 or power_steps < 1 or ascent_steps < 0:
        given = (starts, tokens, power_steps, ascent_steps)
        raise BadInput(f"expected starts, tokens and power_steps of at least 1 and ascent_steps of at least 0, got {given}; raise them")
    if starts > MOST_STARTS or not 0 <= seed < 2**63:
        raise BadInput(f"expected at most {MOST_STARTS} starts and a seed from 0 to 2^63 - 1, got {starts} and {seed}; choose others")
    x = None if x is None else as_samples(x)[0]
    chain = as_chain(model)
    if box is not None and (chain.embedding_depth or not box[0] < box[1]):
        raise BadInput(f"expected box=(low, high) with low < high and a model without an embedding, got {box}; leave it out")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        points, shape, size = _starts(chain, x, claim.domain, box, starts, tokens, generator)
    f = _target(chain, claim.domain, shape, box)
    try:
        with torch.no_grad():
            f(f.project(points[:1]))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"expected inputs of the shape that the model takes, got {shape} ({reason}); give samples (--data)") from None
    steps = Steps(power_steps, ascent_steps, advance or (lambda what, done, total: None))
    a, b, found, change, distance, rounding, kind = _hunt(f, points, size, steps, generator)
    tokens_in = chain.embedding_depth > 0
    result = Audit(
        formula=claim.formula, claimed=claim.value, found=found * claim.unit(), units=claim.units, domain=claim.domain,
        space="embedding" if tokens_in else "input",
        x=a if tokens_in else a.reshape(shape), x_prime=b if tokens_in else b.reshape(shape),
        distance=distance, change=change, rounding=rounding, rounding_kind=kind, starts=len(points), seed=seed,
        weights_sha256=weights_sha256(chain), architecture_sha256=architecture_sha256(chain), layers=claim.layers,
    )  # fmt: skip
    if worst_weights:
        result = replace(result, worst=_worst(chain, claim, seed, steps))
    if result.violated:
        result = replace(result, why=formulas.explain(chain, claim))
    return replace(result, seconds=time.perf_counter() - began)


def _worst(chain: Chain, claim: Claim, seed: int, steps: Steps) -> tuple[WorstLayer, ...]:
    """Every different attention and MLP layer of a transformer, or the whole of an MLP, with its worst weights."""
    if claim.formula not in formulas.FORMULAS:
        raise BadInput("expected a formula with --worst-weights, got a number, which says nothing of other weights; give --formula")
    out: list[WorstLayer] = []
    if chain.embedding_depth == 0:
        module, x = worst_mlp(chain)
        model = as_chain(module)
        said = formulas.claim_of(model, claim.formula).in_units(claim.units)
        out.append(_worst_layer("model", "mlp", "every matrix's spectral norm", model, said, x[None, None], x.shape[0], seed, steps))
        return tuple(out)
    seen: set[tuple[Any, ...]] = set()
    for name, layer, domain in formulas.norms_in_front(chain, claim.formula):
        # Layers of one shape with the same norms have the same worst weights.
        key = (repr(layer), *(round(float(torch.linalg.matrix_norm(p.detach().double(), 2)), 3) for p in layer.parameters() if p.dim() == 2))
        if key in seen:
            continue
        seen.add(key)
        steps.advance(f"worst weights of {name}", 0, 1)
        if isinstance(layer, Attention):
            for per_head in (False, True) if claim.formula == "ours" else (False,):
                found = worst_attention_like(layer, domain=domain, per_head=per_head, tokens=max(3, min(layer.heads, 8)), seed=seed)
                kept = "every head's spectral norm" if per_head else "every matrix's spectral norm"
                said = formulas.layer_claim(found.layer, claim.formula, domain)
                module = nn.Sequential(found.layer)
                out.append(
                    _worst_layer(name, "attention", kept, module, said, found.x, found.x.shape[1:], seed, steps, found.direction)
                )
        else:
            assert isinstance(layer, nn.Sequential)
            module, x = worst_mlp(layer, domain)
            said = formulas.layer_claim(module, claim.formula, domain)
            out.append(
                _worst_layer(name, "mlp", "every matrix's spectral norm", module, said, x[None, None], (1, len(x)), seed, steps)
            )
    if not out:
        raise BadInput("expected attention or MLP layers as the paper has them for --worst-weights, got none; audit the weights as they are")
    return tuple(out)


def _worst_layer(
    name: str, part: str, kept: str, module: nn.Sequential, said: Claim, x: Tensor, shape: Any, seed: int, steps: Steps,
    direction: Tensor | None = None,
) -> WorstLayer:  # fmt: skip
    tokens = isinstance(shape, (tuple, torch.Size))
    f = _Target(copy.deepcopy(module), tuple(shape) if tokens else (shape,), tokens=tokens, domain=said.domain)
    generator = torch.Generator().manual_seed(seed)
    size = said.domain if said.domain is not None else 1.0
    if direction is None:
        direction = torch.zeros_like(x)
        direction[..., 0] = 1.0
    a, b, found, *_ = _hunt(f, x.double(), size, replace(steps, ascent=min(steps.ascent, 20)), generator, direction)
    return WorstLayer(said.formula, name, part, kept, said.value, found * said.unit(), said.units, said.domain, tokens, module, a, b)


# ---------------------------------------------------------------------------------------------------------------- witnesses


def save_witness(path: Path, result: Audit, box: tuple[float, float] | None = None) -> None:
    """The pair of inputs and what it is said to show, to a safetensors file that `recheck` reads."""
    header = {
        "kind": "audit-witness", "formula": result.formula, "claimed": result.claimed, "found": result.found, "units": result.units,
        "domain": result.domain, "space": result.space, "box": box, "weights_sha256": result.weights_sha256,
        "architecture_sha256": result.architecture_sha256, "starts": result.starts, "seed": result.seed,
    }  # fmt: skip
    save_tensors(path, {"x": result.x, "x_prime": result.x_prime}, header)


def recheck(path: Path, model: nn.Module) -> Audit:
    """Measures the pair in a witness file again, on this model, against the claim computed anew.

    Raises BadInput when the file is not a witness, is of other weights, leaves its domain, or does not show what its header says.
    """
    tensors, header = load_tensors(path)
    chain = as_chain(model)
    name = path.name
    if header.get("kind") != "audit-witness" or set(tensors) != {"x", "x_prime"} or tensors["x"].shape != tensors["x_prime"].shape:
        raise BadInput(f"expected a witness written by `robustlip audit`, got {name} with other contents; name the file that audit saved")
    mine = {"weights_sha256": weights_sha256(chain), "architecture_sha256": architecture_sha256(chain)}
    for what, value in mine.items():
        if header.get(what) != value:
            word = "weights" if what == "weights_sha256" else "architecture"
            raise BadInput(f"expected the witness's {word} {str(header.get(what))[:12]}…, got a model with {value[:12]}…; audit this model anew")
    try:
        formula, claimed, found = str(header["formula"]), float(header["claimed"]), float(header["found"])
        units, domain, box = str(header["units"]), header["domain"], header["box"]
        if not (formula.isprintable() and units.isprintable()):
            raise ValueError("formula: it holds control characters")
        domain = None if domain is None else float(domain)
        box = None if box is None else (float(box[0]), float(box[1]))
        starts, seed = int(header["starts"]), int(header["seed"])
        if formula in formulas.FORMULAS:
            claim = formulas.claim_of(chain, formula).in_units(units)
        else:
            claim = formulas.stated(chain, claimed, units, domain)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        if isinstance(error, RobustlipError):
            raise
        raise BadInput(f"expected a complete witness header in {name}, got one without a valid {error}; the file was altered") from None
    same = claim.domain == domain if domain is None or claim.domain is None else math.isclose(claim.domain, domain, rel_tol=1e-9)
    if not same or not math.isclose(claim.value, claimed, rel_tol=1e-9):
        raise BadInput(f"expected the claim {claim.value:.9g} that {formula} makes of this model, got {claimed:.9g} in {name}; the file was altered")
    a, b = tensors["x"].double(), tensors["x_prime"].double()
    tokens = chain.embedding_depth > 0
    shape = tuple(a.shape)
    device = next(chain.parameters()).device
    f = _target(chain, domain, shape, box)
    a, b = (t.to(device)[None] if tokens else t.to(device).reshape(1, 1, -1) for t in (a, b))
    if not bool(f.inside(a).all() and f.inside(b).all()):
        raise BadInput(f"expected two inputs inside the claim's domain, got others in {name}; the file was altered")
    try:
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            _, again, change, distance, rounding, kind = _measure(f, a, b)
    except RuntimeError as error:
        raise BadInput(f"expected inputs of the model's shape in {name}, got {shape} ({str(error).splitlines()[0]}); the file was altered") from None
    again *= claim.unit()
    if not math.isclose(again, found, rel_tol=1e-6):
        raise BadInput(f"expected a pair that shows {found:.6g}, got one that shows {again:.6g} in {name}; the file was altered")
    result = Audit(
        formula=formula, claimed=claim.value, found=again, units=units, domain=domain, space="embedding" if tokens else "input",
        x=tensors["x"], x_prime=tensors["x_prime"], distance=distance, change=change, rounding=rounding, rounding_kind=kind,
        starts=starts, seed=seed, layers=claim.layers,
        weights_sha256=mine["weights_sha256"], architecture_sha256=mine["architecture_sha256"],
    )  # fmt: skip
    return replace(result, why=formulas.explain(chain, claim)) if result.violated else result


def save_worst(path: Path, worst: WorstLayer) -> None:
    """The weights that an adversary chose for one layer, with the pair of inputs, to a safetensors file that `recheck_worst` reads."""
    # By number, as `recheck_worst` builds the layers again without the names they had in the model.
    weights = {f"module.{name}": value for name, value in nn.Sequential(*worst.module).state_dict().items()}
    header = {"kind": "audit-worst-weights", **worst.to_json_dict(), "tokens": worst.tokens, "layers": [_describe(layer) for layer in worst.module]}
    save_tensors(path, {"x": worst.x, "x_prime": worst.x_prime, **weights}, header)


def _describe(layer: nn.Module) -> dict[str, Any]:
    if type(layer) is Attention:
        distances = 0 if layer.distance_bias is None else layer.distance_bias.shape[1]
        keys = ("width", "heads", "scale", "causal", "rope", "output_scale")
        return {"type": "Attention", **{k: getattr(layer, k) for k in keys}, "distance_bias": distances}
    if type(layer) is nn.Linear:
        return {"type": "Linear", "in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
    if type(layer) is ScaledGELU:
        return {"type": "ScaledGELU", "divisor": layer.divisor, "approximate": layer.approximate}
    if type(layer) not in _BUILDERS.values():
        known = ", ".join(_BUILDERS)
        raise BadInput(f"expected layers that a file of worst weights can name ({known}), got {type(layer).__name__}; audit the weights as they are")
    return {"type": type(layer).__name__} | ({"approximate": layer.approximate} if isinstance(layer, nn.GELU) else {})


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "Attention": Attention, "Linear": nn.Linear, "ScaledGELU": ScaledGELU, "GELU": nn.GELU, "ReLU": nn.ReLU, "Tanh": nn.Tanh,
    "Flatten": nn.Flatten, "Identity": nn.Identity,
}  # fmt: skip


def recheck_worst(path: Path) -> WorstLayer:
    """Builds the layers of a worst-weights file, asks the formula about them again and measures the pair again.

    Raises BadInput when the file is not one, leaves its domain, or does not show what its header says.
    """
    tensors, header = load_tensors(path)
    name = path.name
    try:
        if header["kind"] != "audit-worst-weights":
            raise KeyError("kind")
        described = [dict(d) for d in header["layers"]]
        module = nn.Sequential(*(_BUILDERS[d.pop("type")](**d) for d in described)).double().eval()
        module.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")})
        formula, layer, part, kept = (str(header[k]) for k in ("formula", "layer", "part", "kept"))
        claimed, found, units, tokens = float(header["claimed"]), float(header["found"]), str(header["units"]), bool(header["tokens"])
        a, b = tensors["x"].double(), tensors["x_prime"].double()
        domain = None if header["domain"] is None else float(header["domain"])
        whole = not tokens or domain is None
        claim = (formulas.claim_of(module, formula) if whole else formulas.layer_claim(module, formula, domain or 0.0)).in_units(units)
        f = _Target(copy.deepcopy(module), tuple(a.shape) if tokens else (a.numel(),), tokens=tokens, domain=claim.domain)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            again = _measure(f, a[None], b[None])[1] * claim.unit()
    except BadInput:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise BadInput(f"expected a worst-weights file of `robustlip audit`, got {name} ({error}); name the file that audit saved") from None
    if not (math.isclose(claim.value, claimed, rel_tol=1e-9) and math.isclose(again, found, rel_tol=1e-6)):
        shown = f"{again:.6g} against a claim of {claim.value:.6g}"
        raise BadInput(f"expected a file that shows {found:.6g} against a claim of {claimed:.6g}, got {shown} in {name}; the file was altered")
    return WorstLayer(formula, layer, part, kept, claim.value, again, units, domain, tokens, module, a, b)
