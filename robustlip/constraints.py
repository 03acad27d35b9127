"""Weight constraints that hold after every optimiser step. MATH.md section 10; Newhouse et al. 2025, section 3.

Each method maps the singular values of the RMS-scaled matrix M = W·sqrt(fan_in/fan_out). Heads of attention are constrained
one by one (`per_head`): the published cap of the stacked matrix lets one head hold all of the norm (MATH.md section 4).
What a method promises is stated here; a certificate never trusts it and measures the weights it is given.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from robustlip.errors import BadInput
from robustlip.layers import AddPositions, Attention
from robustlip.spectral import spectral_norm_bound

METHODS = ("none", "spectral-normalize", "soft-cap")


@dataclass(frozen=True)
class Target:
    """One weight under a constraint, seen as a stack of `slices` matrices (or as rows that each have their own norm).

    axis: 0 stacks rows (query, key, value by head), 1 stacks columns (output by head). rows: True caps each row's RMS norm
    (an embedding's tokens). w_max: the largest RMS→RMS norm of a slice (RMS norm of a row).
    """

    name: str
    weight: nn.Parameter
    w_max: float
    slices: int = 1
    axis: int = 0
    rows: bool = False

    def split(self, weight: Tensor) -> Tensor:
        """(fan_out, fan_in) → (slices, m, n)."""
        if self.axis == 0:
            return weight.unflatten(0, (self.slices, -1))
        return weight.unflatten(1, (self.slices, -1)).movedim(1, 0)

    def join(self, stack: Tensor) -> Tensor:
        return stack.flatten(0, 1) if self.axis == 0 else stack.movedim(0, 1).flatten(1)

    def rms_scale(self) -> float:
        """sqrt(fan_in/fan_out) of one slice: ‖W‖ times this is its RMS→RMS norm. For rows: 1/sqrt(width)."""
        m, n = self.split(self.weight).shape[-2:]
        return 1 / math.sqrt(n) if self.rows else math.sqrt(n / m)

    @torch.no_grad()
    def measured(self) -> float:
        """A guaranteed upper bound of the largest constrained norm, in RMS units."""
        if self.rows:
            return float(torch.linalg.vector_norm(self.weight.double(), dim=-1).max()) * self.rms_scale() * (1 + 1e-12)
        return float(spectral_norm_bound(self.split(self.weight)).max()) * self.rms_scale() * (1 + 1e-12)


@lru_cache(maxsize=256)
def soft_cap_coupling(w_max: float, update_norm: float, decay: float = 0.0) -> float:
    """The strength a of the soft cap that maps every singular value ≤ w_max(1 − decay) + update_norm to at most w_max.

    Newhouse et al. 2025, appendix on soft cap: a is the smallest non-negative real root of −k⁹a⁴ + 3k⁷a³ − 3k⁵a² + (k − w_max) = 0,
    k = w_max(1 − decay) + update_norm. Raises BadInput when the update is too large for w_max: some value in [0, k] would
    come out above it.
    """
    k = w_max * (1 - decay) + update_norm
    if k <= w_max:
        return 0.0
    roots = np.roots([-(k**9), 3 * k**7, -3 * k**5, 0.0, k - w_max])
    real = sorted(float(r.real) for r in roots if abs(r.imag) < 1e-9 * max(1.0, abs(r)) and r.real >= 0)
    # The root fixes the image of k alone. The promise is about all of [0, k], and fails for updates that are large against the cap.
    values = np.linspace(0, k, 513)
    image = values - real[0] * values**3 if real else values
    image = image + real[0] * image**3 if real else values
    if not (np.abs(image) <= w_max * (1 + 1e-9)).all():
        raise BadInput(
            f"expected an update small enough for a soft cap at {w_max}, got one of norm {update_norm:.4g}; lower the learning rate or raise w_max"
        )
    return real[0]


def soft_cap(matrix: Tensor, strength: float) -> Tensor:
    """p₂(p₁(M)) with p₁: σ → σ − aσ³ and p₂: σ → σ + aσ³ on the singular values of M (..., m, n)."""

    def cubic(x: Tensor, a: float) -> Tensor:
        return x + a * (x @ x.mT @ x) if x.shape[-2] <= x.shape[-1] else x + a * (x @ (x.mT @ x))

    return cubic(cubic(matrix, -strength), strength)


def fast_norm_bound(matrix: Tensor, iterations: int = 8) -> Tensor:
    """An upper bound of ‖M‖₂ of matrices (..., m, n) in their own dtype, for use while training: Gram iteration (Delattre et al. 2023).

    Over-estimates by at most n^(1/2^(iterations + 2)), 0.6 % for n = 512. Inflated by 10⁻⁵ for float32 rounding, which is a margin
    and not a proof: certificates use robustlip.spectral instead.
    """
    gram = matrix @ matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT @ matrix
    log_scale = torch.zeros(matrix.shape[:-2], dtype=torch.float64, device=matrix.device)
    for i in range(iterations + 1):
        size = torch.linalg.matrix_norm(gram).clamp_min(torch.finfo(gram.dtype).tiny)
        log_scale = log_scale + size.double().log() / 2**i
        gram = gram / size[..., None, None]
        if i < iterations:
            gram = gram @ gram
    return ((log_scale / 2).exp() * (1 + 1e-5)).to(matrix.dtype)


class Constraint:
    """A method and the weights it holds; `attach` makes an optimiser apply it after each of its steps.

    method: 'none', 'spectral-normalize' (hard: M/max(1, σ/w_max) with σ an upper bound) or 'soft-cap' (hard when the optimiser states its
    update norm: the strength follows from the learning rate in use). Rows are always normalised to RMS norm ≤ w_max.
    """

    def __init__(self, targets: Iterable[Target], method: str) -> None:
        if method not in METHODS:
            raise BadInput(f"expected a constraint method among {', '.join(METHODS)}, got {method!r}; name one of them")
        self.targets, self.method = list(targets), method

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply the constraint to this optimiser's weights after each step. Raises BadInput for soft-cap without a stated update norm."""
        # The number of the group, not the group: load_state_dict puts new dictionaries in their place.
        owned = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        mine = [(t, owned[id(t.weight)]) for t in self.targets if id(t.weight) in owned]
        if self.method == "none" or not mine:
            return
        if self.method == "soft-cap" and not hasattr(optimizer, "update_norm") and any(not t.rows for t, _ in mine):
            raise BadInput(
                f"expected an optimiser that states its update norm for soft-cap, got {type(optimizer).__name__}; "
                f"use robustlip.muon.Muon, or spectral-normalize"
            )

        @torch.no_grad()
        def after_step(opt: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            for target, number in mine:
                group = opt.param_groups[number]
                update = opt.update_norm(group["lr"]) if hasattr(opt, "update_norm") else None  # type: ignore[operator]
                self.apply(target, update, group["lr"] * group.get("weight_decay", 0.0))

        optimizer.register_step_post_hook(after_step)

    @torch.no_grad()
    def apply(self, target: Target, update_norm: float | None = None, decay: float = 0.0) -> None:
        """Map one weight in place. update_norm: RMS→RMS norm of the step just taken, of the whole matrix; decay: λη."""
        weight = target.weight
        if target.rows:
            norms = torch.linalg.vector_norm(weight, dim=-1, keepdim=True) * target.rms_scale()
            weight.div_((norms / target.w_max * (1 + 1e-6)).clamp_min(1.0))
            return
        scale = target.rms_scale()
        stack = target.split(weight) * scale
        if self.method == "spectral-normalize":
            excess = (fast_norm_bound(stack) / target.w_max).clamp_min(1.0)
            stack = stack / excess[..., None, None]
        else:
            fan_out, fan_in = weight.shape
            # The optimiser bounds the whole matrix; a slice has at most that norm, in its own RMS units.
            slice_norm = (update_norm or 0.0) * math.sqrt(fan_out / fan_in) * scale
            stack = soft_cap(stack, soft_cap_coupling(target.w_max, slice_norm, decay))
        weight.copy_(target.join(stack) / scale)

    @torch.no_grad()
    def project(self) -> None:
        """Bring every target inside once, by normalisation: for the initial weights, from which soft cap keeps its promise."""
        for target in self.targets:
            if self.method != "none":
                Constraint([target], "spectral-normalize").apply(target)

    def measured(self) -> dict[str, float]:
        """Guaranteed upper bounds of all constrained norms, RMS units."""
        return {t.name: t.measured() for t in self.targets}


def targets_of(model: nn.Module, w_max: float, *, per_head: bool = True, overrides: dict[str, float] | None = None) -> list[Target]:
    """Every weight matrix of a model as a Target: attention by head, embeddings and position tables by row, Linear and the rest whole.

    overrides: {pattern: w_max}; the last pattern that matches a weight's name wins ('head.weight', 'attn*.query.weight').
    Raises BadInput for a pattern that matches nothing, or a w_max ≤ 0.
    """
    overrides = overrides or {}
    used: set[str] = set()
    targets: list[Target] = []
    row_tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    row_tables |= {id(m.positions) for m in model.modules() if isinstance(m, AddPositions)}
    by_head: dict[int, tuple[int, int]] = {}
    for module in model.modules():
        if isinstance(module, Attention) and per_head:
            for linear in (module.query, module.key, module.value):
                by_head[id(linear.weight)] = (module.heads, 0)
    matrices = row_tables | {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in matrices:
            continue
        limit = w_max
        for pattern, value in overrides.items():
            if fnmatch.fnmatch(name, pattern):
                limit = value
                used.add(pattern)
        if not limit > 0:
            raise BadInput(f"expected w_max above 0, got {limit} for {name}; give a positive cap")
        slices, axis = by_head.get(id(parameter), (1, 0))
        targets.append(Target(name, parameter, limit, slices, axis, rows=id(parameter) in row_tables))
    if missing := set(overrides) - used:
        raise BadInput(f"expected override patterns that match a weight, got {sorted(missing)}; the weights are {[t.name for t in targets]}")
    return targets
