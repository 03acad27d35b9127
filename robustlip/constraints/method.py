"""What a constraint method is: a map of stacked matrices, and what it guarantees."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guarantee:
    """What holds after every step, in exact arithmetic: largest singular value ≤ factor·w_max. inf: nothing is promised.

    factor − 1 is the overshoot. Rounding comes on top (`Target.rounding`), and `Constraint.measured` is what anyone should believe.
    """

    factor: float

    @property
    def kind(self) -> Literal["hard", "overshoot", "none"]:
        return "hard" if self.factor <= 1 else "overshoot" if math.isfinite(self.factor) else "none"

    def __str__(self) -> str:
        return {"hard": "hard", "overshoot": f"up to overshoot {self.factor - 1:.2g}", "none": "none"}[self.kind]


@dataclass(frozen=True)
class StepTaken:
    """What is known of the optimiser step that the map follows, for each of the K matrices of a stack.

    w_max: the caps, as numbers with all their digits. update: RMS→RMS norms that the optimiser states as bounds of what it added, None where
    it states nothing.
    decay: λη of the optimiser's own decoupled weight decay. rate: the learning rates in use.
    """

    w_max: tuple[float, ...]
    update: tuple[float, ...] | None
    decay: tuple[float, ...]
    rate: tuple[float, ...]


class Method(ABC):
    """A map of RMS-scaled matrices (K, m, n) → (K, m, n), run after each optimiser step (by `map_stack`).

    cap: (K, 1, 1), the w_max of each in the dtype of the stack. A subclass states in its docstring and in `guarantee` what holds when
    the matrices were inside before the step; `Constraint.project` brings the initial ones inside.
    """

    name: ClassVar[str]
    guarantee: Guarantee

    @abstractmethod
    def __call__(self, stack: Tensor, cap: Tensor, step: StepTaken) -> Tensor: ...


def map_stack(method: Method, stack: Tensor, cap: Tensor, step: StepTaken) -> Tensor:
    """What the method makes of the stack. Under caps so far from 1 that squares of weights vanish or overflow in float32, in units of the caps."""
    if all(1e-9 <= w <= 1e9 for w in step.w_max):
        return method(stack, cap, step)
    update = None if step.update is None else tuple(u / w for u, w in zip(step.update, step.w_max, strict=True))
    ones = replace(step, w_max=(1.0,) * len(step.w_max), update=update)
    return cap * method(stack / cap, torch.ones_like(cap), ones)
