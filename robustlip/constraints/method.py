"""The interface of constraint methods: a map of stacked matrices, and its guarantee."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guarantee:
    """What holds after every step, in exact arithmetic: largest singular value ≤ factor·w_max. inf: no guarantee.

    factor − 1 is the overshoot. Rounding comes in addition (`Target.rounding`); `Constraint.measured` gives proved bounds.
    """

    factor: float

    @property
    def kind(self) -> Literal["hard", "overshoot", "none"]:
        return "hard" if self.factor <= 1 else "overshoot" if math.isfinite(self.factor) else "none"

    def __str__(self) -> str:
        return {"hard": "hard", "overshoot": f"up to overshoot {self.factor - 1:.2g}", "none": "none"}[self.kind]


@dataclass(frozen=True)
class StepTaken:
    """Facts about the optimiser step before the map, for each of the K matrices of a stack.

    w_max: the caps in full precision. update: RMS→RMS norms that the optimiser states as bounds of its update, None if
    it states none.
    decay: λη of the optimiser's own decoupled weight decay. rate: the learning rates.
    """

    w_max: tuple[float, ...]
    update: tuple[float, ...] | None
    decay: tuple[float, ...]
    rate: tuple[float, ...]


class Method(ABC):
    """A map of RMS-scaled matrices (K, m, n) → (K, m, n), run after each optimiser step (by `map_stack`).

    cap: (K, 1, 1), the w_max of each matrix in the dtype of the stack. A subclass states in its docstring and in `guarantee` what holds if
    the matrices were within their caps before the step; `Constraint.project` brings the initial ones within.
    """

    name: ClassVar[str]
    guarantee: Guarantee

    @abstractmethod
    def __call__(self, stack: Tensor, cap: Tensor, step: StepTaken) -> Tensor: ...


def map_stack(method: Method, stack: Tensor, cap: Tensor, step: StepTaken) -> Tensor:
    """The method applied to the stack; in units of the caps if these are so far from 1 that squares of weights underflow or overflow in float32."""
    if all(1e-9 <= w <= 1e9 for w in step.w_max):
        return method(stack, cap, step)
    update = None if step.update is None else tuple(u / w for u, w in zip(step.update, step.w_max, strict=True))
    ones = replace(step, w_max=(1.0,) * len(step.w_max), update=update)
    return cap * method(stack / cap, torch.ones_like(cap), ones)
