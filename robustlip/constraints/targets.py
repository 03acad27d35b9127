"""The constrained weights and their units: whole matrices, attention heads, rows of embeddings."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlip.errors import BadInput
from robustlip.layers import AddPositions, Attention
from robustlip.numerics.rounding import UNIT
from robustlip.numerics.spectral import spectral_norm_bound


@dataclass(frozen=True)
class Target:
    """One constrained weight, seen as a stack of `slices` matrices (or as rows with separate norms).

    axis: 0 stacks rows (query, key, value by head), 1 stacks columns (output by head). rows: True caps each row's RMS norm
    (the tokens of an embedding). w_max: the cap of the RMS→RMS norm of a slice (RMS norm of a row).
    """

    name: str
    weight: nn.Parameter
    w_max: float
    slices: int = 1
    axis: int = 0
    rows: bool = False

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise BadInput(f"expected a matrix under a constraint, got {self.name} of shape {tuple(self.weight.shape)}; leave convolutions free")
        if not 0 < self.w_max < math.inf:
            raise BadInput(f"expected w_max above 0, got {self.w_max} for {self.name}; give a positive cap")
        if self.axis not in (0, 1) or self.slices < 1 or self.weight.shape[self.axis] % self.slices:
            raise BadInput(
                f"expected slices that divide axis 0 or 1 of {self.name}, got {self.slices} of axis {self.axis} of {tuple(self.weight.shape)}; "
                f"use the number of heads"
            )

    def split(self, weight: Tensor) -> Tensor:
        """(fan_out, fan_in) → (slices, m, n)."""
        if self.axis == 0:
            return weight.unflatten(0, (self.slices, -1))
        return weight.unflatten(1, (self.slices, -1)).movedim(1, 0)

    def join(self, stack: Tensor) -> Tensor:
        return stack.flatten(0, 1) if self.axis == 0 else stack.movedim(0, 1).flatten(1)

    def shape(self) -> tuple[int, int]:
        """(m, n) of one slice."""
        fan_out, fan_in = self.weight.shape
        return (fan_out // self.slices, fan_in) if self.axis == 0 else (fan_out, fan_in // self.slices)

    def rms_scale(self) -> float:
        """sqrt(fan_in/fan_out) of one slice: ‖W‖ times this is its RMS→RMS norm. For rows: 1/sqrt(width)."""
        m, n = self.shape()
        return 1 / math.sqrt(n) if self.rows else math.sqrt(n / m)

    def rounding(self) -> float:
        """The tolerated relative excess over a guaranteed cap by rounding of a step: 10⁻⁴ plus 2 + √min(m, n) units of the dtype.

        A margin, not a proof. Storing alone changes each entry by up to u, and the norm by up to u times the Frobenius norm.
        """
        return 1e-4 + UNIT[self.weight.dtype] * (2 + math.sqrt(min(self.shape())))

    def cost(self) -> float:
        """Multiplications of one product WWᵀ per slice: proportional to the cost of its map and its measurement."""
        m, n = self.shape()
        return float(self.slices * m * n * min(m, n))

    @torch.no_grad()
    def measured(self, whole: Tensor | None = None) -> float:
        """A guaranteed upper bound of the largest constrained norm, in RMS units. whole: the weight (fan_out, fan_in), if `weight` is a shard."""
        weight = self.weight if whole is None else whole
        if self.rows:
            return float(torch.linalg.vector_norm(weight.double(), dim=-1).max()) * self.rms_scale() * (1 + 1e-12)
        return float(spectral_norm_bound(self.split(weight)).max()) * self.rms_scale() * (1 + 1e-12)


def targets_of(
    model: nn.Module,
    w_max: float,
    *,
    per_head: bool = True,
    overrides: dict[str, float] | None = None,
    rows: Iterable[str] = (),
    free: Iterable[str] = (),
) -> list[Target]:
    """Every weight matrix of a model as a Target: attention per head, embeddings and position tables per row, Linear and others as whole matrices.

    overrides: {pattern: w_max}; the last pattern that matches a weight's name is used ('head.weight', 'attn*.query.weight').
    rows: patterns of matrices whose rows are capped instead of the whole matrix, for an unembedding ('head.weight'): a margin
    changes by ‖u_y − u_j‖, at most twice the longest row.
    free: patterns of weights without a constraint. Weights of other layers (convolutions, torch's own attention, reparametrised ones) cannot be
    constrained here, so they have to be listed there.
    Raises BadInput for a pattern without a match, a w_max ≤ 0, a weight shared by two kinds of layers, and one that would be left unconstrained.
    """
    overrides = overrides or {}
    by_row, left = tuple(rows), tuple(free)
    used: set[str] = set()
    targets: list[Target] = []
    row_tables = {id(m.weight) for m in model.modules() if type(m) is nn.Embedding}
    row_tables |= {id(m.positions) for m in model.modules() if type(m) is AddPositions}
    by_head: dict[int, tuple[int, int]] = {}
    for module in model.modules():
        if isinstance(module, Attention) and per_head:
            for name, linear in module.projections().items():
                if name != "output":
                    by_head[id(linear.weight)] = (linear.out_features // module.head_width, 0)
    linears = {id(m.weight) for m in model.modules() if type(m) is nn.Linear}
    # Tables that are added to scores, not multiplied.
    added = {id(m.distance_bias) for m in model.modules() if type(m) is Attention}
    for name, parameter in model.named_parameters():
        if spared := {pattern for pattern in left if fnmatch.fnmatch(name, pattern)}:
            used |= spared
            continue
        if id(parameter) in row_tables & linears:
            raise BadInput(f"expected weights that belong to one layer each, got {name}, an embedding table shared with a Linear layer; untie them")
        if id(parameter) not in row_tables | linears:
            if parameter.dim() > 1 and id(parameter) not in added:
                raise BadInput(
                    f"expected matrices of Linear and Embedding layers, got {name} of shape {tuple(parameter.shape)}, which would be unconstrained; "
                    f"replace its layer, or name it in free"
                )
            continue
        limit = w_max
        for pattern, value in overrides.items():
            if fnmatch.fnmatch(name, pattern):
                limit = value
                used.add(pattern)
        matching = {pattern for pattern in by_row if fnmatch.fnmatch(name, pattern)}
        used |= matching
        if matching or id(parameter) in row_tables:
            targets.append(Target(name, parameter, limit, rows=True))
        else:
            slices, axis = by_head.get(id(parameter), (1, 0))
            targets.append(Target(name, parameter, limit, slices, axis))
    if missing := set(overrides).union(by_row, left) - used:
        raise BadInput(f"expected override patterns that match a weight, got {sorted(missing)}; the weights are {[t.name for t in targets]}")
    return targets
