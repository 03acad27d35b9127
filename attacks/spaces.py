"""Spaces of perturbations: norm, steepest directions and projection of each threat, so that one PGD serves all threats.

A space contains the clean points of all samples, the norm of the threat, its steepest directions and its projection. All methods
are batched over the N samples of the space; radii are tensors (N,), so that a search for smallest radii is one batch.
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

# Points are moved this far inside the ball (relative), so that a norm summed in any order in float64 stays within it.
INSIDE = 1e-12


HALVES = (torch.float16, torch.bfloat16)


def next_toward(point: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """The neighbour of each `point` in the direction of `goal`, in their dtype (finite or infinite, not NaN); the point itself if they are equal.

    Not every device has torch.nextafter for half precision. The bits of such numbers, read as sign and magnitude, are ordered like the numbers: ±0,
    then subnormals, normal numbers, and infinity after the largest.
    """
    if point.dtype not in HALVES:
        return torch.nextafter(point, goal)
    bits = point.view(torch.int16).to(torch.int32)
    order = torch.where(bits < 0, -(bits & 0x7FFF), bits)
    order = order + (goal > point).to(torch.int32) - (goal < point).to(torch.int32)
    bits = torch.where(order < 0, 0x8000 - order, order)  # sign bit and magnitude
    moved = torch.where(bits > 0x7FFF, bits - 0x10000, bits).to(torch.int16).view(point.dtype)
    return torch.where(goal == point, point, moved)


def _beyond(clean: torch.Tensor, point: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Whether |point − clean| > limit ≥ 0, exactly, for clean and point of the same dtype and a float64 limit."""
    a, b = point.double(), -clean.double()
    change = a + b
    part = change - a
    lost = (a - (change - part)) + (b - part)  # Knuth's TwoSum: a + b = change + lost
    size = change.abs()
    return (size > limit) | ((size == limit) & (lost * change.sign() > 0))


def round_nearest(clean: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """clean + delta in clean's dtype, rounded to nearest; the largest finite number instead of infinity."""
    point = (clean.double() + delta).to(clean.dtype)
    return torch.where(torch.isinf(point), next_toward(point, clean), point)


def round_toward(clean: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """clean + delta in clean's dtype, each coordinate rounded toward `clean`: no |coordinate change| exceeds |delta|.

    clean (N, …) in the model's dtype, delta (N, …) float64. Every norm used here is monotone in the absolute values of the coordinates,
    so a delta inside the ball gives a point inside the ball in every dtype. No coordinate loses more than an ulp.
    """
    point = round_nearest(clean, delta)
    return torch.where(_beyond(clean, point, delta.abs()), next_toward(point, clean), point)


def round_down(number: float, dtype: torch.dtype) -> float:
    """The largest number of that dtype that does not exceed this one."""
    value = torch.tensor(number, dtype=torch.float64).to(dtype)
    return float(value if float(value) <= number else next_toward(value, torch.full_like(value, -torch.inf)))


class Space(ABC):
    """The geometry of one threat around N samples.

    model: the attacked model, in eval mode. clean: (N, …), the unperturbed points in the model's dtype. chunk: samples to attack at once.
    work: the dtype of perturbations, norms and radii during a search: the model's, but float32 for a model in half precision, which is
    too coarse for steps and norms.
    """

    chunk: int = 1 << 30

    def __init__(self, model: Target, clean: torch.Tensor) -> None:
        self.model, self.clean = model, clean
        self.work = torch.float32 if clean.dtype in HALVES else clean.dtype

    def __len__(self) -> int:
        return len(self.clean)

    @abstractmethod
    def take(self, index: torch.Tensor) -> Space:
        """The space of the samples `index` (int64; repetitions are allowed)."""

    @abstractmethod
    def executed(self, point: torch.Tensor) -> torch.Tensor:
        """Points (N, …) → logits (N, C), in the dtype that the model returns."""

    def logits(self, point: torch.Tensor) -> torch.Tensor:
        """Points (N, …) → logits (N, C), in the dtype of the points, for a search."""
        return self.executed(point).to(point.dtype)

    def zeros(self, count: int | None = None) -> torch.Tensor:
        """Zero perturbations: (N, …) or (count, …) in the dtype of the search."""
        return torch.zeros(len(self) if count is None else count, *self.clean.shape[1:], dtype=self.work, device=self.clean.device)

    def at(self, delta: torch.Tensor, radius: torch.Tensor | None = None) -> torch.Tensor:
        """The point that a search evaluates, in the model's dtype. In half precision it is the final, rounded point: there rounding matters."""
        if self.work == self.clean.dtype:
            return (self.clean + delta).to(self.work)
        return self.cast_point(delta) if radius is None else self.finalize(delta, radius)[0]

    def gradient(self, values: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
        """The gradient (N, …) of the sum of values (N,) at the points that they were computed from, in the dtype of the search."""
        return torch.autograd.grad(values.sum(), point)[0].to(self.work)

    def moved(self, point: torch.Tensor) -> torch.Tensor:
        """The distance of points (N, …) from the clean ones, in the threat's norm: (N,) in the dtype of the search."""
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
        """A random perturbation inside the ball. It is drawn on the generator's device, so that CPU and GPU get the same one."""
        noise = torch.randn(self.clean.shape, generator=generator, device=generator.device, dtype=torch.float32)
        noise = noise.to(self.clean.device, self.work)
        return self.project(per_sample(safe_divide(radius, self.measure(noise)), noise) * noise, radius)

    def cast_point(self, delta: torch.Tensor) -> torch.Tensor:
        """The point in the model's dtype: rounded to nearest within the box. Rounding may make the distance larger than the norm of delta."""
        return self._back_into_box(round_nearest(self.clean, self._within_box(delta.double())))

    def finalize(self, delta: torch.Tensor, radius: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Project, round and measure again: delta (N, …), radius (N,) or None → point (N, …), distance (N,) float64.

        The distance is that of the rounded point and never exceeds the radius: if the nearest point of the dtype is outside the ball,
        coordinates are rounded toward the clean point, except those that fit into the ball.
        """
        delta = delta.double()
        if radius is not None:
            slack = safe_divide(radius.double() * (1 - INSIDE), self.measure(delta)).clamp(max=1.0)
            delta = delta * per_sample(slack, delta)
        point = self.cast_point(delta)
        distance = self.measure(point.double() - self.clean.double())
        if radius is None or not bool((distance > radius).any()):
            return point, distance
        inward = self._back_into_box(round_toward(self.clean, self._within_box(delta)))
        for choice in (self._nearest_in_ball(inward, point, delta, radius.double()), inward, self.clean):
            outside = distance > radius
            point = torch.where(per_sample(outside, point), choice, point)
            distance = torch.where(outside, self.measure(choice.double() - self.clean.double()), distance)
        return point, distance

    def _nearest_in_ball(self, inward: torch.Tensor, nearest: torch.Tensor, delta: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        """The points `inward`, with those coordinates of `nearest` that fit into the ball (the caller measures again)."""
        return inward

    def assess(self, delta: torch.Tensor, group: torch.Tensor, radius: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Finalize the perturbations delta (G, …), where sample i gets number group[i], and run the model again.

        Returns the points, their distances (N,) float64, the logits (N, C) there, and the row of each sample's point.
        """
        limit = None if radius is None else torch.full(group.shape, radius, dtype=torch.float64, device=group.device)
        point, distance = self.finalize(delta[group], limit)
        return point, distance, self.executed(point), torch.arange(len(group), device=group.device)

    def describe(self, point: torch.Tensor, model: nn.Module) -> Any:
        """The points in the form that an Observation stores."""
        return point

    def _within_box(self, delta: torch.Tensor) -> torch.Tensor:
        return delta

    def _back_into_box(self, point: torch.Tensor) -> torch.Tensor:
        return point


class InputSpace(Space):
    """Raw inputs x (N, …) in an l1, l2 or linf ball, within threat.clip if it is set."""

    given: torch.Tensor | None = None  # float64 (N, …), see `around`

    def __init__(self, model: Target, clean: torch.Tensor, threat: InputBall) -> None:
        super().__init__(model, clean)
        self.threat, self.norm, self.clip = threat, threat.norm, threat.clip

    def around(self, given: torch.Tensor) -> InputSpace:
        """The same space, with final distances measured from the given points (N, …), of which `clean` are the roundings."""
        self.given = given.double()
        return self

    def assess(self, delta: torch.Tensor, group: torch.Tensor, radius: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.given is None:
            return super().assess(delta, group, radius)
        moved = self.measure(self.clean.double() - self.given)
        # Inside the smaller ball around the rounded point, so also inside the ball around the given one.
        point, _ = self.finalize(delta[group], None if radius is None else (radius - moved * (1 + INSIDE)).clamp_min(0))
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
        # A Frank-Wolfe step (Jaggi 2013): the steepest l1 direction is one coordinate, but with a box several have to be used.
        rate = min(rate, 1.0)
        return (1 - rate) * delta + rate * self._fill(grad, radius)

    def _fill(self, grad: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        """The maximiser of ⟨grad, ·⟩ over the l1 ball and the box: the radius is used for the steepest coordinates first."""
        if self.clip is None:
            return per_sample(radius, grad) * self.direction(grad)
        low, high = self.clip
        slope, order = grad.flatten(1).abs().sort(dim=1, descending=True)
        sign = grad.flatten(1).sign().gather(1, order)
        clean = self.clean.flatten(1).gather(1, order)
        slack = torch.where(sign > 0, high - clean, clean - low) * (slope > 0)
        spent = torch.cumsum(slack, 1) - slack
        step = torch.minimum(slack, (radius[:, None] - spent).clamp_min(0)) * sign
        return torch.zeros_like(step).scatter(1, order, step).view_as(grad)

    def _within_box(self, delta: torch.Tensor) -> torch.Tensor:
        return within(delta, self.clean, self.clip)

    def _back_into_box(self, point: torch.Tensor) -> torch.Tensor:
        if self.clip is None:
            return point
        # If the dtype cannot represent the boundary, the nearest number may be outside: the last number inside is used.
        low, high = (-round_down(-self.clip[0], point.dtype), round_down(self.clip[1], point.dtype))
        return point.clamp(low, high)

    def _nearest_in_ball(self, inward: torch.Tensor, nearest: torch.Tensor, delta: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        if self.norm == "linf":
            return torch.where(_beyond(self.clean, nearest, per_sample(radius, delta)), inward, nearest)
        return nearest_in_ball(self.clean, inward, nearest, delta, radius, 1 if self.norm == "l1" else 2)


class EmbeddingSpace(Space):
    """Embeddings (N, T, D) of a transformer: each named token in its own l2 ball, or all together in one (joint)."""

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
        """(N, T, D) → l2 norms (N, T, 1) per token; if joint, (N, 1, 1) of all tokens."""
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

    def _nearest_in_ball(self, inward: torch.Tensor, nearest: torch.Tensor, delta: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        if self.joint:
            return nearest_in_ball(self.clean, inward, nearest, delta, radius, 2)
        clean, low, near, target = (t.flatten(0, 1) for t in (self.clean, inward, nearest, delta))
        return nearest_in_ball(clean, low, near, target, radius.repeat_interleave(delta.shape[1]), 2).view_as(inward)


def nearest_in_ball(
    clean: torch.Tensor, inward: torch.Tensor, nearest: torch.Tensor, delta: torch.Tensor, radius: torch.Tensor, power: int
) -> torch.Tensor:
    """inward (N, …), with as many coordinates of `nearest` as fit into the ball Σ|x − clean|^power ≤ radius^power, radius float64 (N,).

    Coordinates that exceed delta by the smallest fraction of their rounding step come first: they change the direction least.
    """
    clean, target = clean.double().flatten(1), delta.double().abs().flatten(1)
    near, low = (nearest.double().flatten(1) - clean).abs(), (inward.double().flatten(1) - clean).abs()
    cost = near**power - low**power
    order = safe_divide(near - target, near - low).argsort(1)
    slack = (radius * (1 - INSIDE)) ** power - (low**power).sum(1)
    fits = cost.gather(1, order).clamp_min(0).cumsum(1) <= slack[:, None]
    taken = torch.zeros_like(fits).scatter(1, order, fits).view_as(inward)
    return torch.where(taken, nearest, inward)
