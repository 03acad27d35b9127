"""The search for the worst pair of inputs: power iteration on the Jacobian, then ascent on the input and on the finite difference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlip.attacks.audit.measure import Map, measure
from robustlip.errors import RobustlipError
from robustlip.geometry import safe_divide


@dataclass(frozen=True)
class Steps:
    """Lengths of the search, and a progress callback advance(what, done, total)."""

    power: int
    ascent: int
    advance: Callable[[str, int, int], None]


def unit_tokens(x: Tensor) -> Tensor:
    """Scales every token to ℓ2 norm 1 (0 stays 0): the steepest direction of norm 1 along x."""
    return safe_divide(x, x.norm(dim=-1, keepdim=True))


def _best_output(y: Tensor) -> Tensor:
    """y (S, U, V) → the unit vector along its largest token, 0 elsewhere: the steepest output functional in the largest token norm."""
    size = y.norm(dim=-1)
    top = torch.zeros_like(size).scatter(1, size.argmax(1, keepdim=True), 1.0)
    return unit_tokens(y) * top.unsqueeze(-1)


def _pull(f: Map, x: Tensor, u: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """(x with gradients enabled, Jᵀu)."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad((f(x) * u).sum(), x, create_graph=create_graph, allow_unused=True)
    return x, torch.zeros_like(x) if g is None else g


def _push(f: Map, x: Tensor, v: Tensor) -> Tensor:
    """Jv."""
    return torch.func.jvp(f, (x.detach(),), (v,))[1].detach()


class _BestPairs:
    """The best pair of every starting point so far."""

    def __init__(self, f: Map, starts: Tensor) -> None:
        self.f, self.best = f, torch.full((len(starts),), -1.0, dtype=torch.float64, device=starts.device)
        self.a, self.b = starts.clone(), starts.clone()

    def offer(self, a: Tensor, b: Tensor, *, floor: float) -> None:
        """Keeps the better pairs among a, b (S, T, D). floor: assumed relative rounding error of the change, against noise of tiny steps."""
        with torch.no_grad():
            change = (self.f(b) - self.f(a)).norm(dim=-1).amax(-1)
            distance = (b - a).norm(dim=-1).amax(-1)
            found = safe_divide(change - floor, distance)
            better = (found > self.best) & self.f.inside(a) & self.f.inside(b)
            self.best = torch.where(better, found, self.best)
            where = better[:, None, None]
            self.a, self.b = torch.where(where, a, self.a), torch.where(where, b, self.b)


def _pair(f: Map, x: Tensor, v: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """x ± length·v/2, with x first moved away from the boundary by that length; v: tokens of norm ≤ 1, length (S, 1, 1)."""
    middle = f.project(x, length / 2)
    return f.project(middle - length / 2 * v), f.project(middle + length / 2 * v)


def _search(
    f: Map, starts: Tensor, size: float, steps: Steps, generator: torch.Generator, direction: Tensor | None = None
) -> _BestPairs:
    """Power iteration at every starting point (S, T, D), ascent of the Jacobian's norm over x, then of finite differences. size: of an input."""

    power_steps, ascent_steps = steps.power, steps.ascent

    def random_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)

    x = f.project(starts)
    v = unit_tokens(random_like(x) if direction is None else direction)
    best_pairs = _BestPairs(f, x)
    with torch.no_grad():
        floor = 1e-14 * float(f(x).norm(dim=-1).amax(-1).median())

    def lengths(*relative: float) -> list[Tensor]:
        return [torch.full((len(x), 1, 1), size * r, dtype=torch.float64, device=x.device) for r in relative]

    def offer(x: Tensor, v: Tensor) -> None:
        for length in lengths(1e-5, 1e-4, 1e-2, 0.3):
            best_pairs.offer(*_pair(f, x, v, length), floor=floor)

    def iterate(x: Tensor, v: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            v = unit_tokens(_pull(f, x, _best_output(_push(f, x, v)))[1])
        return v

    v = iterate(x, v, power_steps)
    offer(x, v)
    # Ascent over x: φ(x) = Σ_t ‖(Jᵀu)_t‖ = max_v ⟨u, Jv⟩ over tokens of norm 1; u is the best output for the best v so far.
    rate = 0.1 * size / math.sqrt(x.shape[-1])
    moving = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=rate)
    best, best_x, best_v = torch.zeros(len(x), dtype=torch.float64, device=x.device), x.clone(), v.clone()
    for step in range(ascent_steps):
        steps.advance("ascent of the Jacobian", step, ascent_steps)
        optimizer.param_groups[0]["lr"] = rate * (1 - 0.95 * step / ascent_steps)
        u = _best_output(_push(f, moving, v))
        inner, g = _pull(f, moving, u, create_graph=True)
        v = unit_tokens(g.detach())
        value = g.norm(dim=-1).sum(-1)
        better = value.detach() > best
        best = torch.where(better, value.detach(), best)
        best_x = torch.where(better[:, None, None], inner.detach(), best_x)
        best_v = torch.where(better[:, None, None], v, best_v)
        slope = torch.autograd.grad(value.sum(), inner, allow_unused=True)[0] if g.requires_grad else None
        if slope is None or not bool((slope != 0).any()):
            break  # piecewise linear: the Jacobian does not depend on x locally; the finite differences below do
        moving.grad = -torch.nan_to_num(slope)
        optimizer.step()
        with torch.no_grad():
            moving.copy_(f.project(moving))
    best_v = iterate(best_x, best_v, power_steps)
    offer(best_x, best_v)
    # Ascent of ‖f(x + hw/2) − f(x − hw/2)‖ over x and w (‖w_t‖ ≤ 1), with a length h per starting point.
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
            best_pairs.offer(a.detach(), b.detach(), floor=floor)
        for point, gradient in zip(points, gradients, strict=True):
            point.grad = torch.zeros_like(point) if gradient is None else -torch.nan_to_num(gradient)
        optimizer.step()
        with torch.no_grad():
            points[0].copy_(f.project(points[0]))
            points[1].copy_(points[1] / points[1].norm(dim=-1, keepdim=True).clamp_min(1.0))
    middle = (best_pairs.a + best_pairs.b) / 2
    offer(middle, iterate(middle, unit_tokens(best_pairs.b - best_pairs.a), power_steps))
    return best_pairs


def find_pair(
    f: Map, starts: Tensor, size: float, steps: Steps, generator: torch.Generator, direction: Tensor | None = None
) -> tuple[Tensor, Tensor, float, float, float, float, str]:
    """(x, x', found, change, distance, rounding, kind of rounding) of the best pair that `_search` finds."""
    # The flash kernels have neither a second derivative nor a forward mode; the plain kernel has both.
    with torch.inference_mode(False), torch.enable_grad(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        best_pairs = _search(f, starts, size, steps, generator, direction)
        which, found, change, distance, rounding, kind = measure(f, best_pairs.a, best_pairs.b)
    if not math.isfinite(change):
        raise RobustlipError("expected finite outputs, got NaN or infinity inside the domain; find the layer that overflows")
    return best_pairs.a[which].cpu(), best_pairs.b[which].cpu(), found, change, distance, rounding, kind
