"""Where an attack moves: one small geometry per threat, so that one PGD serves them all.

A space knows the clean point of every sample, the norm of the threat, its steepest directions and its projection. All methods
are batched over the N samples of the space; radii are tensors (N,), so that a search for the smallest radius is one batch.
Norms and radii are in the units of the threat (see `robustlip.threats`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from robustlip.geometry import dual_length, length, per_sample, project, safe_divide, steepest, within
from robustlip.target import Target
from robustlip.threats import EmbeddingBall, InputBall

# Landing aims this far inside the ball (relative), so that a norm summed in any order in float64 stays within it.
INSIDE = 1e-12


HALVES = (torch.float16, torch.bfloat16)


def next_toward(point: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """The neighbour of each `point` on the side of `goal`, in their dtype (finite or infinite, not NaN); the point itself where they are equal.

    Half precisions have no torch.nextafter on every device. Their bits, read as sign and magnitude, are ordered as the numbers are, with ±0 at 0,
    subnormals between it and the normal numbers, and infinity after the largest.
    """
    if point.dtype not in HALVES:
        return torch.nextafter(point, goal)
    bits = point.view(torch.int16).to(torch.int32)
    order = torch.where(bits < 0, -(bits & 0x7FFF), bits)
    order = order + (goal > point).to(torch.int32) - (goal < point).to(torch.int32)
    bits = torch.where(order < 0, 0x8000 - order, order)  # the sign bit and the modulus
    moved = torch.where(bits > 0x7FFF, bits - 0x10000, bits).to(torch.int16).view(point.dtype)
    return torch.where(goal == point, point, moved)


def _beyond(clean: torch.Tensor, point: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Whether |point − clean| > limit ≥ 0, exactly, for clean and point of one dtype and a float64 limit."""
    a, b = point.double(), -clean.double()
    change = a + b
    part = change - a
    lost = (a - (change - part)) + (b - part)  # Knuth's TwoSum: a + b = change + lost
    size = change.abs()
    return (size > limit) | ((size == limit) & (lost * change.sign() > 0))


def round_nearest(clean: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """clean + delta in clean's dtype, rounded to nearest; a finite number also where that is beyond the largest one."""
    point = (clean.double() + delta).to(clean.dtype)
    return torch.where(torch.isinf(point), next_toward(point, clean), point)


def round_toward(clean: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """clean + delta in clean's dtype, each coordinate rounded toward `clean`: no |coordinate change| exceeds |delta|.

    clean (N, …) in the model's dtype, delta (N, …) float64. Every norm used here is monotone in the moduli of the coordinates,
    so a delta inside the ball lands inside the ball, whatever the dtype. No coordinate loses more than an ulp.
    """
    point = round_nearest(clean, delta)
    return torch.where(_beyond(clean, point, delta.abs()), next_toward(point, clean), point)


def round_down(number: float, dtype: torch.dtype) -> float:
    """The largest number of that dtype that is not above this one."""
    value = torch.tensor(number, dtype=torch.float64).to(dtype)
    return float(value if float(value) <= number else next_toward(value, torch.full_like(value, -torch.inf)))


class Space(ABC):
    """The geometry of one threat around N samples.

    model: what is attacked, in eval mode. clean: (N, …), the unperturbed points in the model's dtype. chunk: samples to attack at once.
    work: the dtype of perturbations, norms and radii during a search: the model's, but float32 for a model in half precision, whose own
    numbers are too coarse to step and to measure with.
    """

    chunk: int = 1 << 30

    def __init__(self, model: Target, clean: torch.Tensor) -> None:
        self.model, self.clean = model, clean
        self.work = torch.float32 if clean.dtype in HALVES else clean.dtype

    def __len__(self) -> int:
        return len(self.clean)

    @abstractmethod
    def take(self, index: torch.Tensor) -> Space:
        """The space of the samples `index` (int64; repeats are allowed)."""

    @abstractmethod
    def executed(self, point: torch.Tensor) -> torch.Tensor:
        """points (N, …) → logits (N, C), in the dtype in which the model gives them."""

    def logits(self, point: torch.Tensor) -> torch.Tensor:
        """points (N, …) → logits (N, C), in the dtype of the points, for a search."""
        return self.executed(point).to(point.dtype)

    def zeros(self, count: int | None = None) -> torch.Tensor:
        """No perturbation: (N, …) or (count, …) in the dtype of the search."""
        return torch.zeros(len(self) if count is None else count, *self.clean.shape[1:], dtype=self.work, device=self.clean.device)

    def at(self, delta: torch.Tensor, radius: torch.Tensor | None = None) -> torch.Tensor:
        """The point that a search looks at, in the model's dtype. In half precision it is the one that will be landed on: there rounding decides."""
        if self.work == self.clean.dtype:
            return (self.clean + delta).to(self.work)
        return self.place(delta) if radius is None else self.land(delta, radius)[0]

    def gradient(self, values: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
        """The gradient (N, …) of the sum of values (N,) at the points that they were computed from, in the dtype of the search."""
        return torch.autograd.grad(values.sum(), point)[0].to(self.work)

    def moved(self, point: torch.Tensor) -> torch.Tensor:
        """How far points (N, …) are from the clean ones, in the threat's norm: (N,) in the dtype of the search."""
        return self.measure(point.to(self.work) - self.clean.to(self.work))

    @abstractmethod
    def measure(self, delta: torch.Tensor) -> torch.Tensor:
        """The threat's norm of each perturbation, (N, …) → (N,)."""

    @abstractmethod
    def dual(self, grad: torch.Tensor) -> torch.Tensor:
        """The dual norm of each gradient, (N, …) → (N,): the first-order gain per unit of radius."""

    @abstractmethod
    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        """The perturbation of norm 1 with the largest inner product with the gradient (0 where the gradient is 0)."""

    @abstractmethod
    def project(self, delta: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        """A perturbation of norm ≤ radius (N,) near delta, within the clip box if there is one."""

    def advance(self, delta: torch.Tensor, grad: torch.Tensor, radius: torch.Tensor, rate: float) -> torch.Tensor:
        """One ascent step whose length is `rate` radii: steepest ascent and projection (Madry et al. 2018)."""
        return self.project(delta + per_sample(rate * radius, delta) * self.direction(grad), radius)

    def random(self, radius: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A random perturbation inside the ball. Drawn on the generator's device, so that CPU and GPU get the same one."""
        noise = torch.randn(self.clean.shape, generator=generator, device=generator.device, dtype=torch.float32)
        noise = noise.to(self.clean.device, self.work)
        return self.project(per_sample(safe_divide(radius, self.measure(noise)), noise) * noise, radius)

    def place(self, delta: torch.Tensor) -> torch.Tensor:
        """The point that the model will see: the nearest of its dtype within the box. Rounding may take it further away than delta is long."""
        return self._back_into_box(round_nearest(self.clean, self._within_box(delta.double())))

    def land(self, delta: torch.Tensor, radius: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Project, place and measure again: delta (N, …), radius (N,) or None → point (N, …), distance (N,) float64.

        The distance is that of the *cast* point, and never above the radius: where the nearest point of the dtype is outside the ball,
        coordinates are rounded toward the clean point, but those that there is room for.
        """
        delta = delta.double()
        if radius is not None:
            room = safe_divide(radius.double() * (1 - INSIDE), self.measure(delta)).clamp(max=1.0)
            delta = delta * per_sample(room, delta)
        point = self.place(delta)
        distance = self.measure(point.double() - self.clean.double())
        if radius is None or not bool((distance > radius).any()):
            return point, distance
        inward = self._back_into_box(round_toward(self.clean, self._within_box(delta)))
        for choice in (self._with_room(inward, point, delta, radius.double()), inward, self.clean):
            outside = distance > radius
            point = torch.where(per_sample(outside, point), choice, point)
            distance = torch.where(outside, self.measure(choice.double() - self.clean.double()), distance)
        return point, distance

    def _with_room(self, inward: torch.Tensor, nearest: torch.Tensor, delta: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        """The points `inward`, with the coordinates of `nearest` that the radius has room for (the caller measures again)."""
        return inward

    def judged(self, delta: torch.Tensor, group: torch.Tensor, radius: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Land the perturbations delta (G, …), of which sample i suffers number group[i], and run the model once more.

        Returns the points, their distances (N,) float64, the logits (N, C) there, and the row of each sample's point.
        """
        limit = None if radius is None else torch.full(group.shape, radius, dtype=torch.float64, device=group.device)
        point, distance = self.land(delta[group], limit)
        return point, distance, self.executed(point), torch.arange(len(group), device=group.device)

    def describe(self, point: torch.Tensor, model: nn.Module) -> Any:
        """The points as an Observation keeps them."""
        return point

    def _within_box(self, delta: torch.Tensor) -> torch.Tensor:
        return delta

    def _back_into_box(self, point: torch.Tensor) -> torch.Tensor:
        return point


class InputSpace(Space):
    """Raw inputs x (N, …) in an l1, l2 or linf ball, within threat.clip where it is set."""

    given: torch.Tensor | None = None  # float64 (N, …), see `around`

    def __init__(self, model: Target, clean: torch.Tensor, threat: InputBall) -> None:
        super().__init__(model, clean)
        self.threat, self.norm, self.clip = threat, threat.norm, threat.clip

    def around(self, given: torch.Tensor) -> InputSpace:
        """The same space, whose final distances count from the points that were given (N, …), of which `clean` are the roundings."""
        self.given = given.double()
        return self

    def judged(self, delta: torch.Tensor, group: torch.Tensor, radius: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.given is None:
            return super().judged(delta, group, radius)
        moved = self.measure(self.clean.double() - self.given)
        # Within the smaller ball around the rounded point, hence within the ball around the given one.
        point, _ = self.land(delta[group], None if radius is None else (radius - moved * (1 + INSIDE)).clamp_min(0))
        distance = self.measure(point.double() - self.given)
        unchanged = (point == self.clean).flatten(1).all(1)
        if radius is not None:
            unchanged |= distance > radius
        point = torch.where(per_sample(unchanged, point), self.clean, point)
        return point, torch.where(unchanged, 0.0, distance), self.executed(point), torch.arange(len(group), device=group.device)

    def take(self, index: torch.Tensor) -> InputSpace:
        return InputSpace(self.model, self.clean[index], self.threat)

    def executed(self, point: torch.Tensor) -> torch.Tensor:
        return self.model.scores(point)

    def measure(self, delta: torch.Tensor) -> torch.Tensor:
        return length(delta, self.norm)

    def dual(self, grad: torch.Tensor) -> torch.Tensor:
        return dual_length(grad, self.norm)

    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        return steepest(grad, self.norm)

    def project(self, delta: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        return self._within_box(project(delta, radius, self.norm))

    def advance(self, delta: torch.Tensor, grad: torch.Tensor, radius: torch.Tensor, rate: float) -> torch.Tensor:
        if self.norm == "l2":  # as in Space, in two passes over the data instead of four
            step = safe_divide(rate * radius, length(grad, "l2"))
            return self.project(torch.addcmul(delta, per_sample(step, delta), grad), radius)
        if self.norm == "linf":
            return self.project(torch.addcmul(delta, per_sample(rate * radius, delta), grad.sign()), radius)
        # A Frank-Wolfe step (Jaggi 2013): the steepest l1 direction is one coordinate, and with a box one has to fill several.
        rate = min(rate, 1.0)
        return (1 - rate) * delta + rate * self._fill(grad, radius)

    def _fill(self, grad: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        """The maximiser of ⟨grad, ·⟩ over the l1 ball and the box: spend the radius on the steepest coordinates first."""
        if self.clip is None:
            return per_sample(radius, grad) * self.direction(grad)
        low, high = self.clip
        slope, order = grad.flatten(1).abs().sort(dim=1, descending=True)
        sign = grad.flatten(1).sign().gather(1, order)
        clean = self.clean.flatten(1).gather(1, order)
        room = torch.where(sign > 0, high - clean, clean - low) * (slope > 0)
        spent = torch.cumsum(room, 1) - room
        step = torch.minimum(room, (radius[:, None] - spent).clamp_min(0)) * sign
        return torch.zeros_like(step).scatter(1, order, step).view_as(grad)

    def _within_box(self, delta: torch.Tensor) -> torch.Tensor:
        return within(delta, self.clean, self.clip)

    def _back_into_box(self, point: torch.Tensor) -> torch.Tensor:
        if self.clip is None:
            return point
        # Of a border that the dtype cannot hold, the nearest number may be outside: the last one inside is the border.
        low, high = (-round_down(-self.clip[0], point.dtype), round_down(self.clip[1], point.dtype))
        return point.clamp(low, high)

    def _with_room(self, inward: torch.Tensor, nearest: torch.Tensor, delta: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        if self.norm == "linf":
            return torch.where(_beyond(self.clean, nearest, per_sample(radius, delta)), inward, nearest)
        return spend_room(self.clean, inward, nearest, delta, radius, 1 if self.norm == "l1" else 2)


class EmbeddingSpace(Space):
    """Embeddings (N, T, D) of a transformer: the named tokens in l2 balls of their own, or all together in one (joint)."""

    def __init__(self, model: Target, clean: torch.Tensor, threat: EmbeddingBall) -> None:
        super().__init__(model, clean)
        self.threat, self.joint = threat, threat.joint
        self.mask = torch.zeros(clean.shape[1], 1, device=clean.device, dtype=torch.bool)
        self.mask[threat.positions(clean.shape[1])] = True

    def take(self, index: torch.Tensor) -> EmbeddingSpace:
        return EmbeddingSpace(self.model, self.clean[index], self.threat)

    def executed(self, point: torch.Tensor) -> torch.Tensor:
        return self.model.scores_from_embeddings(point)

    def _tokens(self, values: torch.Tensor) -> torch.Tensor:
        """(N, T, D) → l2 norms (N, T, 1), per token; or (N, 1, 1), of the whole, when joint."""
        dims = (-2, -1) if self.joint else -1
        return torch.linalg.vector_norm(values, dim=dims, keepdim=True)

    def measure(self, delta: torch.Tensor) -> torch.Tensor:
        return self._tokens(delta).flatten(1).amax(1)

    def dual(self, grad: torch.Tensor) -> torch.Tensor:
        return self._tokens(grad * self.mask).flatten(1).sum(1)

    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        grad = grad * self.mask
        return safe_divide(grad, self._tokens(grad))

    def project(self, delta: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        delta = delta * self.mask
        return delta * safe_divide(per_sample(radius, delta), self._tokens(delta)).clamp(max=1.0)

    def _within_box(self, delta: torch.Tensor) -> torch.Tensor:
        return delta * self.mask

    def _with_room(self, inward: torch.Tensor, nearest: torch.Tensor, delta: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        if self.joint:
            return spend_room(self.clean, inward, nearest, delta, radius, 2)
        clean, low, near, target = (t.flatten(0, 1) for t in (self.clean, inward, nearest, delta))
        return spend_room(clean, low, near, target, radius.repeat_interleave(delta.shape[1]), 2).view_as(inward)


def spend_room(
    clean: torch.Tensor, inward: torch.Tensor, nearest: torch.Tensor, delta: torch.Tensor, radius: torch.Tensor, power: int
) -> torch.Tensor:
    """inward (N, …), with as many coordinates of `nearest` as the ball Σ|x − clean|^power ≤ radius^power has room for, radius float64 (N,).

    Those that overshoot delta by the smallest part of their step come first: what is spent on them misses least of the direction.
    """
    clean, target = clean.double().flatten(1), delta.double().abs().flatten(1)
    near, low = (nearest.double().flatten(1) - clean).abs(), (inward.double().flatten(1) - clean).abs()
    cost = near**power - low**power
    order = safe_divide(near - target, near - low).argsort(1)
    room = (radius * (1 - INSIDE)) ** power - (low**power).sum(1)
    fits = cost.gather(1, order).clamp_min(0).cumsum(1) <= room[:, None]
    taken = torch.zeros_like(fits).scatter(1, order, fits).view_as(inward)
    return torch.where(taken, nearest, inward)
