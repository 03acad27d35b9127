"""Interval and linear bounds of a network on a ball around a point: IBP (Gowal et al. 2018) and CROWN (Zhang et al. 2018), batched.

CROWN carries a lower bound Σ Λ_l z_l + c of the rows asked for from their stage back to the input: Λ_l W_l on h_{l−1}, then on z_{l−1} through the
curve's lines, the lower one where a coefficient is positive and the upper one where it is negative. At the input ⟨Λ, x'⟩ ≥ ⟨Λ, x⟩ − ε‖Λ‖_*.

Rounding: computed coefficients are coefficients like any others; what a step loses is |(fl(ΛW) − ΛW)h| ≤ γ‖Λ‖₂‖W‖_F‖h‖₂ and alike for
every other product, with ‖h‖₂ and ‖z‖₂ bounded over the ball by `Network.sizes`. The sum of these is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from robustlip.domains.lines.dense import Network
from robustlip.domains.lines.relaxations import Relu
from robustlip.domains.lines.stages import Affine, Stage
from robustlip.geometry import dual_length
from robustlip.numerics.rounding import U64, gamma, norm_up, up
from robustlip.threats import l2_factor

# Samples are taken so many at a time that the rows of all of them are at most this many numbers: what a processor's cache holds.
CHUNK = 2**21
# Numbers of the rows of all rivals of some samples (512 MiB).
RIVALS = 2**26
# Rows of a stage are many where this many times theirs would not be taken at once.
MANY = 8


@dataclass(frozen=True)
class Ball:
    """All x' with ‖x' − x‖ ≤ radius in the norm 'l1', 'l2' or 'linf'. x (N, n), radius (N,), float64."""

    x: Tensor
    radius: Tensor
    norm: str

    def dual(self, rows: Tensor) -> Tensor:
        """max ⟨row, δ⟩ over ‖δ‖ ≤ 1, rounded up: the dual norm over the last dimension. Squares below 1e-300 may vanish: 1e-140 covers them."""
        return dual_length(rows, self.norm, rows.dim() - 1) * (1 + gamma(rows.shape[-1] + 8, U64)) + 1e-140

    def spread(self, rows: Tensor) -> Tensor:
        """How far each ⟨row, x'⟩ (N, r) can be below ⟨row, x⟩; rows (N or 1, r, n)."""
        return self.radius[:, None] * self.dual(rows) * (1 + 8 * U64)

    def first(self, stage: Affine) -> Tensor:
        """How far each number of Wx' (N, m) can be from that of Wx."""
        reach = self.dual(stage.weight) if isinstance(stage, Stage) else stage.row_norms(self.norm)
        return self.radius[:, None] * reach * (1 + 8 * U64)

    @property
    def largest(self) -> Tensor:
        """|x'_i| ≤ this (N, n)."""
        return (self.x.abs() + self.radius[:, None]) * (1 + 4 * U64)

    def part(self, index: slice) -> Ball:
        return Ball(self.x[index], self.radius[index], self.norm)

    @property
    def reach(self) -> Tensor:
        """‖δ‖₂ ≤ this (N,)."""
        return up(self.radius * l2_factor(self.norm, self.x.shape[-1]))

    @property
    def size(self) -> Tensor:
        """‖x'‖₂ ≤ this (N,)."""
        return up(norm_up(self.x) + self.reach)


@dataclass(frozen=True)
class Cuboid:
    """All x' with |x'_i − x_i| ≤ half_i, a distance for each number. x, half (N, n), float64."""

    x: Tensor
    half: Tensor

    def spread(self, rows: Tensor) -> Tensor:
        """As of Ball."""
        return (rows.abs() @ self.half[..., None])[..., 0] * (1 + gamma(rows.shape[-1] + 8, U64)) + 1e-140

    def first(self, stage: Affine) -> Tensor:
        """As of Ball."""
        return stage.absolute(self.half) * (1 + 2 * gamma(stage.terms + 8, U64)) + 1e-140

    @property
    def largest(self) -> Tensor:
        """|x'_i| ≤ this (N, n)."""
        return (self.x.abs() + self.half) * (1 + 4 * U64)

    def part(self, index: slice) -> Cuboid:
        return Cuboid(self.x[index], self.half[index])

    @property
    def reach(self) -> Tensor:
        """‖δ‖₂ ≤ this (N,)."""
        return norm_up(self.half)

    @property
    def size(self) -> Tensor:
        """‖x'‖₂ ≤ this (N,)."""
        return up(norm_up(self.x) + self.reach)


Inputs = Ball | Cuboid


@dataclass(frozen=True)
class Choice:
    """What a search may choose of a bound, any values of which give one. By hidden stage, None for what is left as it is.

    alpha: slopes in [0, 1] (N, m) of the line below each relu that crosses 0. beta: multipliers ≥ 0 (N, m) of what is known of the sign of a number
    in front of an activation, side (N, m) in {−1, 0, 1}: side·z ≥ 0. seen: filled with what the line above each relu costs the bound (N, m).
    """

    alpha: list[Tensor | None]
    beta: list[Tensor | None]
    side: list[Tensor]
    seen: list[Tensor] | None = None


@dataclass(frozen=True)
class Boxes:
    """low ≤ z_l ≤ high on the whole ball, for every hidden stage, each (N, m_l).

    error: by stage, how far each number that is executed can be from Wh + b of the executed h (N, m_l); empty where bounds are of exact arithmetic.
    """

    low: tuple[Tensor, ...]
    high: tuple[Tensor, ...]
    error: tuple[Tensor, ...] = ()

    def part(self, index: slice) -> Boxes:
        low, high, error = (tuple(t[index] for t in part) for part in (self.low, self.high, self.error))
        return Boxes(low, high, error)


def known_sizes(network: Network, boxes: Boxes) -> list[Tensor]:
    """≥ ‖z_1‖₂, ‖z_2‖₂, … (N,) on the ball, of the stages that have boxes; none where crude sizes do."""
    if not network.multiplies:
        return []
    return [norm_up(torch.maximum(low.abs(), high.abs())) for low, high in zip(boxes.low, boxes.high, strict=True)]


def lines_of(stage: Affine, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert stage.curve is not None
    lower, below, upper, above = stage.curve.lines(low, high)
    one, zero = torch.ones_like(low), torch.zeros_like(low)
    keep = stage.linear
    return torch.where(keep, one, lower), torch.where(keep, zero, below), torch.where(keep, one, upper), torch.where(keep, zero, above)


def interval_step(stage: Affine, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of z = W h + b for low ≤ h ≤ high."""
    middle, half = (low + high) / 2, (high - low) / 2
    loss = gamma(stage.terms + 8, U64)
    size = middle.abs() + half
    centre = stage.forward(middle)
    spread = stage.absolute(half + 4 * loss * size) * (1 + loss) + 4 * loss * stage.bias.abs()
    return centre - spread, centre + spread


def first_box(stage: Affine, ball: Inputs) -> tuple[Tensor, Tensor]:
    """Bounds of z_1 on the ball, exact up to rounding."""
    centre = stage.forward(ball.x)
    slack = gamma(stage.terms + 8, U64) * 2 * (stage.absolute(ball.x.abs()) + stage.bias.abs())
    spread = ball.first(stage) + slack
    return centre - spread, centre + spread


def band_of(stage: Affine, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of h for low ≤ z ≤ high."""
    assert stage.curve is not None
    below, above = stage.curve.band(low, high)
    return torch.where(stage.linear, low, below), torch.where(stage.linear, high, above)


def interval_boxes(network: Network, ball: Inputs) -> Boxes:
    """IBP; the first stage takes the ball's own norm."""
    lows: list[Tensor] = []
    highs: list[Tensor] = []
    for i, stage in enumerate(network.hidden):
        low, high = first_box(stage, ball) if i == 0 else interval_step(stage, *band_of(network.stages[i - 1], lows[-1], highs[-1]))
        lows.append(low)
        highs.append(high)
    return Boxes(tuple(lows), tuple(highs))


def backward(network: Network, ball: Inputs, boxes: Boxes, stage: int, rows: Tensor) -> Tensor:
    """Lower bounds (N, r) of rows·z_stage on the ball. rows (N or 1, r, m). Boxes of the stages in front are read."""
    count = max(1, CHUNK // (rows.shape[1] * max(s.inputs for s in network.stages[: stage + 1])))
    if count >= len(ball.x):
        return _backward(network, ball, boxes, stage, rows)
    parts = [slice(start, start + count) for start in range(0, len(ball.x), count)]
    return torch.cat([_backward(network, ball.part(p), boxes.part(p), stage, rows if len(rows) == 1 else rows[p]) for p in parts])


def _backward(
    network: Network, ball: Inputs, boxes: Boxes, stage: int, rows: Tensor, pulled: Tensor | None = None, choice: Choice | None = None
) -> Tensor:
    """See `backward`. pulled: the rows times W of the stage, where they are known. choice: of rows one a sample."""
    sizes = network.sizes(ball.size, known_sizes(network, boxes), boxes.error)
    constant = slack = torch.zeros(len(ball.x), rows.shape[1], dtype=torch.float64, device=ball.x.device)
    for i in range(stage, -1, -1):
        here = network.stages[i]
        loss = gamma(here.roundings + 32, U64)
        previous = network.stages[i - 1] if i else None
        size = sizes[0]
        if previous is not None and previous.curve is not None:
            size = previous.curve.behind(sizes[i], here.inputs)
        constant = constant + rows @ here.bias
        slack = slack + 2 * loss * torch.linalg.vector_norm(rows, dim=-1) * (here.magnitude * size + here.shift)[:, None]
        if boxes.error:
            slack = slack + (rows.abs() @ boxes.error[i][..., None])[..., 0] * (1 + 1e-9)
        rows = here.backward(rows) if pulled is None or i < stage else pulled
        if previous is None:
            break
        lower, below, upper, above = lines_of(previous, boxes.low[i - 1], boxes.high[i - 1])
        if choice is not None and (alpha := choice.alpha[i - 1]) is not None:
            crossing = (boxes.low[i - 1] < 0) & (boxes.high[i - 1] > 0) & ~previous.linear
            lower = torch.where(crossing, alpha, lower)
        if choice is not None and choice.seen is not None:
            choice.seen.insert(0, -(rows.clamp_max(0.0) * above[:, None])[:, 0])
        # Each coefficient meets the intercept of its own line.
        constant = constant + (rows.clamp_min(0.0) @ below[..., None] + rows.clamp_max(0.0) @ above[..., None])[..., 0]
        slope = torch.maximum(lower.abs(), upper.abs()).amax(-1, keepdim=True)
        assert previous.curve is not None
        cross = previous.curve.across(boxes.low[i - 1], boxes.high[i - 1])
        if cross is not None:
            slope = slope + cross.slope.abs().amax(-1, keepdim=True)
        offset = torch.linalg.vector_norm(torch.maximum(below.abs(), above.abs()), dim=-1, keepdim=True)
        slack = slack + 2 * loss * torch.linalg.vector_norm(rows, dim=-1) * (slope * sizes[i][:, None] + offset)
        added = 0.0 if cross is None else cross.added(rows, previous.linear)
        rows = rows * torch.where(rows >= 0, lower[:, None], upper[:, None]) + added
        if choice is not None and (beta := choice.beta[i - 1]) is not None:  # side·z ≥ 0, so less of it is less
            rows = rows - (beta * choice.side[i - 1])[:, None]
    value = (rows @ ball.x[..., None])[..., 0] + constant
    slack = slack + 4 * gamma(rows.shape[-1] + 32, U64) * (value.abs() + constant.abs() + torch.linalg.vector_norm(rows, dim=-1) * sizes[0][:, None])
    return value - ball.spread(rows) - slack


def _sharpened(network: Network, ball: Inputs, boxes: Boxes, i: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds low, high (N, m) of a stage of many numbers, made better by CROWN sample by sample and a few rows at a time.

    A relu that cannot cross 0 is linear, whatever its bounds: where rows are many, its row is left out.
    """
    stage = network.stages[i]
    low, high = low.clone(), high.clone()
    count = max(1, CHUNK // max(s.inputs for s in network.stages[: i + 1]))
    for n in range(len(low)):
        wanted = (low[n] < 0) & (high[n] > 0)
        if stage.outputs <= count // MANY or not isinstance(stage.curve, Relu):
            wanted = torch.ones_like(wanted)
        here = slice(n, n + 1)
        for rows in wanted.nonzero()[:, 0].split(count):
            unit, pulled = torch.nn.functional.one_hot(rows, stage.outputs).double()[None], stage.rows(rows)[None]
            low[n, rows] = torch.maximum(low[n, rows], _backward(network, ball.part(here), boxes.part(here), i, unit, pulled)[0])
            high[n, rows] = torch.minimum(high[n, rows], -_backward(network, ball.part(here), boxes.part(here), i, -unit, -pulled)[0])
    return low, high


def linear_boxes(network: Network, ball: Inputs, error: Callable[[int, Tensor], Tensor] | None = None) -> Boxes:
    """CROWN on every hidden stage, met with the intervals that follow from the stage in front.

    error: from a stage and a bound (N, n) of the sizes of what it reads to `Boxes.error` there, the last stage included.
    """
    lows: list[Tensor] = []
    highs: list[Tensor] = []
    errors: list[Tensor] = []

    def lost(i: int) -> None:
        if error is not None:
            size = torch.maximum(*(t.abs() for t in band_of(network.stages[i - 1], lows[-1], highs[-1]))) if i else ball.largest
            errors.append(error(i, size))

    for i, stage in enumerate(network.hidden):
        lost(i)
        if i == 0:
            low, high = first_box(stage, ball)
        else:
            low, high = interval_step(stage, *band_of(network.stages[i - 1], lows[-1], highs[-1]))
        if errors:
            low, high = low - errors[-1] * (1 + 1e-9), high + errors[-1] * (1 + 1e-9)
        if i:
            boxes = Boxes(tuple(lows), tuple(highs), tuple(errors))
            if network.dense:
                eye = torch.eye(len(stage.bias), dtype=torch.float64, device=ball.x.device)[None]
                low = torch.maximum(low, backward(network, ball, boxes, i, eye))
                high = torch.minimum(high, -backward(network, ball, boxes, i, -eye))
            else:
                low, high = _sharpened(network, ball, boxes, i, low, high)
        lows.append(low)
        highs.append(high)
    lost(len(network.hidden))
    return Boxes(tuple(lows), tuple(highs), tuple(errors))


def rival_rows(y: Tensor, classes: int, which: Tensor | None = None) -> Tensor:
    """(N, r, C): e_y − e_j for the rivals j in `which` (r,), all unless given; the row of y itself is 0."""
    if which is None:
        eye = torch.eye(classes, dtype=torch.float64, device=y.device)
        return eye[y][:, None] - eye
    own, others = (torch.nn.functional.one_hot(t, classes).double() for t in (y, which))
    return own[:, None] - others


def by_rivals(network: Network, ball: Any, boxes: Boxes, y: Tensor, bound: Callable[[Any, Boxes, Tensor, Tensor | None], Tensor]) -> Tensor:
    """(N, C, …) of bound(ball, boxes, y, which) (n, r, …), rivals `which` (r,) or all: as many samples and rivals at a time as RIVALS allows."""
    head = network.stages[-1]
    classes, widest = head.outputs, max(head.inputs, head.outputs)
    count, most = max(1, RIVALS // (classes * widest)), max(1, RIVALS // widest)
    if count >= len(y) and most >= classes:
        return bound(ball, boxes, y, None)
    every = torch.arange(classes, device=y.device).split(most)
    parts = [slice(start, start + count) for start in range(0, len(y), count)]
    return torch.cat([torch.cat([bound(ball.part(p), boxes.part(p), y[p], which) for which in every], 1) for p in parts])


def interval_margins(network: Network, ball: Inputs, boxes: Boxes, y: Tensor) -> Tensor:
    """Lower bounds (N, C) of all margins from the last boxes alone, the head joined with the rival."""
    return by_rivals(network, ball, boxes, y, partial(_interval, network))


def _interval(network: Network, ball: Inputs, boxes: Boxes, y: Tensor, which: Tensor | None) -> Tensor:
    head = network.stages[-1]
    rows = rival_rows(y, len(head.bias), which)
    weight, bias = head.backward(rows), rows @ head.bias
    if not boxes.low:
        return backward(network, ball, boxes, len(network.stages) - 1, rows)
    low, high = band_of(network.stages[-2], boxes.low[-1], boxes.high[-1])
    middle, half = (low + high) / 2, (high - low) / 2
    # The joined row is a difference of two that were rounded once: twice |W| bounds what both were.
    loss = 8 * gamma((head.terms if isinstance(head, Stage) else head.roundings) + 16, U64)
    size = head.absolute(middle.abs() + half) + head.bias.abs()
    slack = loss * (size.gather(1, y[:, None]) + (size if which is None else size[:, which]))
    return torch.einsum("ncm,nm->nc", weight, middle) + bias - torch.einsum("ncm,nm->nc", weight.abs(), half) - slack


def linear_margins(network: Network, ball: Inputs, boxes: Boxes, y: Tensor) -> Tensor:
    """Lower bounds (N, C) of all margins: the larger of CROWN's and the interval's."""

    def bound(ball: Inputs, boxes: Boxes, y: Tensor, which: Tensor | None) -> Tensor:
        lower = backward(network, ball, boxes, len(network.stages) - 1, rival_rows(y, len(network.stages[-1].bias), which))
        return torch.maximum(lower, _interval(network, ball, boxes, y, which))

    return by_rivals(network, ball, boxes, y, bound)
