"""Interval and linear bounds of a network on a set of inputs: IBP (Gowal et al. 2018) and CROWN (Zhang et al. 2018), batched.

CROWN propagates a lower bound Σ Λ_l z_l + c from a stage back to the input: to coefficients Λ_l W_l of h_{l−1}, then to coefficients of z_{l−1}
through the activation's lines, the lower line for a positive coefficient and the upper line for a negative one.
At the input ⟨Λ, x'⟩ ≥ ⟨Λ, x⟩ − ε‖Λ‖_*.

Rounding: any computed coefficients give a bound, so only the error |(fl(ΛW) − ΛW)h| ≤ γ‖Λ‖₂‖W‖_F‖h‖₂ of each step counts, and similar errors of the
other products. ‖h‖₂ and ‖z‖₂ are bounded by `Network.norm_bounds`. The sum of these errors is subtracted.
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
from robustlip.domains.lines.stages import DenseStage, Stage
from robustlip.domains.norms import Context
from robustlip.geometry import dual_length
from robustlip.numerics.rounding import U64, gamma, norm_up, up
from robustlip.threats import l2_factor

# The largest number of entries of the coefficient rows of one batch of samples: what fits a processor's cache.
ROW_ENTRIES = 2**21
# The largest number of entries of the rows of all rivals of some samples (512 MiB). A rival is a class other than the label.
RIVAL_ENTRIES = 2**26
# A stage has many rows if they fill more than 1/MANY_CHUNKS of ROW_ENTRIES.
MANY_CHUNKS = 8


@dataclass(frozen=True)
class Ball:
    """All x' with ‖x' − x‖ ≤ radius in the norm 'l1', 'l2' or 'linf'. x (N, n), radius (N,), float64."""

    x: Tensor
    radius: Tensor
    norm: str

    def dual(self, rows: Tensor) -> Tensor:
        """max ⟨row, δ⟩ over ‖δ‖ ≤ 1, rounded up: the dual norm over the last dimension. Squares below 1e-300 may underflow; 1e-140 covers them."""
        return dual_length(rows, self.norm, rows.dim() - 1) * (1 + gamma(rows.shape[-1] + 8, U64)) + 1e-140

    def largest_decrease(self, rows: Tensor) -> Tensor:
        """The largest decrease of each ⟨row, x'⟩ (N, r) from ⟨row, x⟩, for rows (N or 1, r, n)."""
        return self.radius[:, None] * self.dual(rows) * (1 + 8 * U64)

    def first_stage_change(self, stage: Stage) -> Tensor:
        """The largest change of each entry of Wx' (N, m) from Wx."""
        reach = self.dual(stage.weight) if isinstance(stage, DenseStage) else stage.row_norms(self.norm)
        return self.radius[:, None] * reach * (1 + 8 * U64)

    @property
    def magnitudes(self) -> Tensor:
        """|x'_i| ≤ this (N, n)."""
        return (self.x.abs() + self.radius[:, None]) * (1 + 4 * U64)

    def part(self, index: slice) -> Ball:
        return Ball(self.x[index], self.radius[index], self.norm)

    def repeated(self, count: int) -> Ball:
        """The one ball, `count` times."""
        return Ball(self.x.expand(count, -1), self.radius.expand(count), self.norm)

    @property
    def l2_radius(self) -> Tensor:
        """‖δ‖₂ ≤ this (N,)."""
        return up(self.radius * l2_factor(self.norm, self.x.shape[-1]))

    @property
    def l2_norm(self) -> Tensor:
        """‖x'‖₂ ≤ this (N,)."""
        return up(norm_up(self.x) + self.l2_radius)


@dataclass(frozen=True)
class InputBox:
    """All x' with |x'_i − x_i| ≤ half_i, a half-width for each entry. x, half (N, n), float64."""

    x: Tensor
    half: Tensor

    def largest_decrease(self, rows: Tensor) -> Tensor:
        """As of Ball."""
        return (rows.abs() @ self.half[..., None])[..., 0] * (1 + gamma(rows.shape[-1] + 8, U64)) + 1e-140

    def first_stage_change(self, stage: Stage) -> Tensor:
        """As of Ball."""
        return stage.absolute(self.half) * (1 + 2 * gamma(stage.terms + 8, U64)) + 1e-140

    @property
    def magnitudes(self) -> Tensor:
        """|x'_i| ≤ this (N, n)."""
        return (self.x.abs() + self.half) * (1 + 4 * U64)

    def part(self, index: slice) -> InputBox:
        return InputBox(self.x[index], self.half[index])

    def repeated(self, count: int) -> InputBox:
        """The one box, `count` times."""
        return InputBox(self.x.expand(count, -1), self.half.expand(count, -1))

    @property
    def l2_radius(self) -> Tensor:
        """‖δ‖₂ ≤ this (N,)."""
        return norm_up(self.half)

    @property
    def l2_norm(self) -> Tensor:
        """‖x'‖₂ ≤ this (N,)."""
        return up(norm_up(self.x) + self.l2_radius)


InputSet = Ball | InputBox


@dataclass(frozen=True)
class Tunable:
    """Free variables of a CROWN bound; every choice gives a valid bound. One entry for each hidden stage, None for the default.

    alpha: slopes in [0, 1] (N, m) of the lower line of each ReLU that crosses 0. beta: multipliers ≥ 0 (N, m) of the constraints side·z ≥ 0, with
    side (N, m) in {−1, 0, 1}. seen: a list that is filled with the amount (N, m) by which the upper line of each ReLU lowers the bound.
    """

    alpha: list[Tensor | None]
    beta: list[Tensor | None]
    side: list[Tensor]
    seen: list[Tensor] | None = None


@dataclass(frozen=True)
class Boxes:
    """Boxes of all hidden stages: low ≤ z_l ≤ high on the whole set of inputs, each (N, m_l).

    error: for each stage, a bound (N, m_l) of |executed z − (Wh + b)| for the executed h; empty where the bounds are those of exact arithmetic.
    """

    low: tuple[Tensor, ...]
    high: tuple[Tensor, ...]
    error: tuple[Tensor, ...] = ()

    def part(self, index: slice) -> Boxes:
        low, high, error = (tuple(t[index] for t in part) for part in (self.low, self.high, self.error))
        return Boxes(low, high, error)


def norms_from_boxes(network: Network, boxes: Boxes) -> list[Tensor]:
    """Upper bounds (N,) of ‖z_1‖₂, ‖z_2‖₂, … from the boxes; an empty list where the crude bounds of `norm_bounds` are good enough."""
    if not network.has_products:
        return []
    return [norm_up(torch.maximum(low.abs(), high.abs())) for low, high in zip(boxes.low, boxes.high, strict=True)]


def activation_lines(stage: Stage, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert stage.activation is not None
    lower, below, upper, above = stage.activation.lines(low, high)
    one, zero = torch.ones_like(low), torch.zeros_like(low)
    keep = stage.linear
    return torch.where(keep, one, lower), torch.where(keep, zero, below), torch.where(keep, one, upper), torch.where(keep, zero, above)


def interval_step(stage: Stage, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of z = Wh + b for low ≤ h ≤ high."""
    middle, half = (low + high) / 2, (high - low) / 2
    loss = gamma(stage.terms + 8, U64)
    size = middle.abs() + half
    centre = stage.forward(middle)
    spread = stage.absolute(half + 4 * loss * size) * (1 + loss) + 4 * loss * stage.bias.abs()
    return centre - spread, centre + spread


def first_box(stage: Stage, ball: InputSet) -> tuple[Tensor, Tensor]:
    """Bounds of z_1 on the set of inputs, exact up to rounding."""
    centre = stage.forward(ball.x)
    slack = gamma(stage.terms + 8, U64) * 2 * (stage.absolute(ball.x.abs()) + stage.bias.abs())
    spread = ball.first_stage_change(stage) + slack
    return centre - spread, centre + spread


def activation_range(stage: Stage, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of h for low ≤ z ≤ high."""
    assert stage.activation is not None
    below, above = stage.activation.value_range(low, high)
    return torch.where(stage.linear, low, below), torch.where(stage.linear, high, above)


def _executed(network: Network, ball: InputSet, lows: list[Tensor], highs: list[Tensor], context: Context) -> Tensor:
    """`Boxes.error` of the stage that follows those with the given boxes."""
    i = len(lows)
    if i == 0:
        return network.stages[0].executed_errors(ball.magnitudes, 0.0, context)
    previous = network.stages[i - 1]
    z = torch.maximum(lows[-1].abs(), highs[-1].abs())
    h = torch.maximum(*(t.abs() for t in activation_range(previous, lows[-1], highs[-1])))
    return network.stages[i].executed_errors(h, 0.0 if previous.executed is None else previous.executed(z, context), context)


def interval_boxes(network: Network, ball: InputSet, context: Context | None = None) -> Boxes:
    """Boxes by interval bound propagation; the first stage uses the norm of the ball. context: as in `linear_boxes`."""
    return _boxes(network, ball, context, lambda i, boxes, low, high: (low, high))


def _boxes(
    network: Network, ball: InputSet, context: Context | None, tighten: Callable[[int, Boxes, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Boxes:
    """Interval bounds stage by stage; `tighten` improves those of each stage: (stage, boxes of the stages before, low, high) → (low, high)."""
    lows: list[Tensor] = []
    highs: list[Tensor] = []
    errors: list[Tensor] = []
    for i, stage in enumerate(network.hidden):
        if i == 0:
            low, high = first_box(stage, ball)
        else:
            low, high = interval_step(stage, *activation_range(network.stages[i - 1], lows[-1], highs[-1]))
        if context is not None:
            errors.append(_executed(network, ball, lows, highs, context))
            low, high = low - errors[-1] * (1 + 1e-9), high + errors[-1] * (1 + 1e-9)
        if i:
            low, high = tighten(i, Boxes(tuple(lows), tuple(highs), tuple(errors)), low, high)
        lows.append(low)
        highs.append(high)
    if context is not None:
        errors.append(_executed(network, ball, lows, highs, context))
    return Boxes(tuple(lows), tuple(highs), tuple(errors))


def backward(network: Network, ball: InputSet, boxes: Boxes, stage: int, rows: Tensor) -> Tensor:
    """Lower bounds (N, r) of rows·z_stage on the set of inputs. rows (N or 1, r, m). Uses the boxes of all stages before it."""
    count = max(1, ROW_ENTRIES // (rows.shape[1] * max(s.inputs for s in network.stages[: stage + 1])))
    if count >= len(ball.x):
        return _backward(network, ball, boxes, stage, rows)
    parts = [slice(start, start + count) for start in range(0, len(ball.x), count)]
    return torch.cat([_backward(network, ball.part(p), boxes.part(p), stage, rows if len(rows) == 1 else rows[p]) for p in parts])


def _backward(
    network: Network, ball: InputSet, boxes: Boxes, stage: int, rows: Tensor, products: Tensor | None = None, choice: Tunable | None = None
) -> Tensor:
    """See `backward`. products: rows·W of the stage, if already computed. choice: free variables, for one row per sample."""
    sizes = network.norm_bounds(ball.l2_norm, norms_from_boxes(network, boxes), boxes.error)
    constant = slack = torch.zeros(len(ball.x), rows.shape[1], dtype=torch.float64, device=ball.x.device)
    for i in range(stage, -1, -1):
        here = network.stages[i]
        loss = gamma(here.roundings + 32, U64)
        previous = network.stages[i - 1] if i else None
        size = sizes[0]
        if previous is not None and previous.activation is not None:
            size = previous.activation.output_norm(sizes[i], here.inputs)
        constant = constant + rows @ here.bias
        slack = slack + 2 * loss * torch.linalg.vector_norm(rows, dim=-1) * (here.magnitude * size + here.shift)[:, None]
        if boxes.error:
            slack = slack + (rows.abs() @ boxes.error[i][..., None])[..., 0] * (1 + 1e-9)
        rows = here.backward(rows) if products is None or i < stage else products
        if previous is None:
            break
        lower, below, upper, above = activation_lines(previous, boxes.low[i - 1], boxes.high[i - 1])
        if choice is not None and (alpha := choice.alpha[i - 1]) is not None:
            crossing = (boxes.low[i - 1] < 0) & (boxes.high[i - 1] > 0) & ~previous.linear
            lower = torch.where(crossing, alpha, lower)
        if choice is not None and choice.seen is not None:
            choice.seen.insert(0, -(rows.clamp_max(0.0) * above[:, None])[:, 0])
        # Each coefficient is multiplied by the intercept of its own line.
        constant = constant + (rows.clamp_min(0.0) @ below[..., None] + rows.clamp_max(0.0) @ above[..., None])[..., 0]
        slope = torch.maximum(lower.abs(), upper.abs()).amax(-1, keepdim=True)
        assert previous.activation is not None
        cross = previous.activation.partner_lines(boxes.low[i - 1], boxes.high[i - 1])
        if cross is not None:
            slope = slope + cross.slope.abs().amax(-1, keepdim=True)
        offset = torch.linalg.vector_norm(torch.maximum(below.abs(), above.abs()), dim=-1, keepdim=True)
        slack = slack + 2 * loss * torch.linalg.vector_norm(rows, dim=-1) * (slope * sizes[i][:, None] + offset)
        added = 0.0 if cross is None else cross.backward(rows, previous.linear)
        rows = rows * torch.where(rows >= 0, lower[:, None], upper[:, None]) + added
        if choice is not None and (beta := choice.beta[i - 1]) is not None:  # side·z ≥ 0, so subtracting a multiple of it keeps a lower bound
            rows = rows - (beta * choice.side[i - 1])[:, None]
    value = (rows @ ball.x[..., None])[..., 0] + constant
    slack = slack + 4 * gamma(rows.shape[-1] + 32, U64) * (value.abs() + constant.abs() + torch.linalg.vector_norm(rows, dim=-1) * sizes[0][:, None])
    return value - ball.largest_decrease(rows) - slack


def _tighten_by_rows(network: Network, ball: InputSet, boxes: Boxes, i: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds low, high (N, m) of a stage with many rows, tightened by CROWN one sample and a few rows at a time.

    A ReLU that cannot cross 0 is linear, so tighter bounds are useless: its row is skipped if there are many rows.
    """
    stage = network.stages[i]
    low, high = low.clone(), high.clone()
    count = max(1, ROW_ENTRIES // max(s.inputs for s in network.stages[: i + 1]))
    for n in range(len(low)):
        wanted = (low[n] < 0) & (high[n] > 0)
        if stage.outputs <= count // MANY_CHUNKS or not isinstance(stage.activation, Relu):
            wanted = torch.ones_like(wanted)
        here = slice(n, n + 1)
        for rows in wanted.nonzero()[:, 0].split(count):
            unit, products = torch.nn.functional.one_hot(rows, stage.outputs).double()[None], stage.rows(rows)[None]
            low[n, rows] = torch.maximum(low[n, rows], _backward(network, ball.part(here), boxes.part(here), i, unit, products)[0])
            high[n, rows] = torch.minimum(high[n, rows], -_backward(network, ball.part(here), boxes.part(here), i, -unit, -products)[0])
    return low, high


def linear_boxes(network: Network, ball: InputSet, context: Context | None = None) -> Boxes:
    """Boxes by CROWN for every hidden stage, intersected with interval bounds from the stage before.

    context: of the executed program, whose errors the bounds cover (`Boxes.error`); None for bounds of exact arithmetic.
    """

    def tighten(i: int, boxes: Boxes, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if not network.dense:
            return _tighten_by_rows(network, ball, boxes, i, low, high)
        eye = torch.eye(network.stages[i].outputs, dtype=torch.float64, device=ball.x.device)[None]
        return torch.maximum(low, backward(network, ball, boxes, i, eye)), torch.minimum(high, -backward(network, ball, boxes, i, -eye))

    return _boxes(network, ball, context, tighten)


def vanished(network: Network, ball: InputSet, boxes: Boxes) -> Tensor:
    """(N,): what underflow in float64 can take from a bound of the last stage.

    It loses 2⁻¹⁰²² a product, times what follows: far less than 1e-120 while no bound of any size exceeds 1e60; infinite beyond.
    """
    known = [norm_up(torch.maximum(low.abs(), high.abs())) for low, high in zip(boxes.low, boxes.high, strict=True)]
    largest = torch.stack(network.norm_bounds(ball.l2_norm, known, boxes.error)).amax(0)
    return torch.where(largest < 1e60, torch.full_like(largest, 1e-120), torch.full_like(largest, torch.inf))


def rival_rows(y: Tensor, classes: int, which: Tensor | None = None) -> Tensor:
    """(N, r, C): e_y − e_j for the rivals j in `which` (r,), default all classes; the row of y itself is 0."""
    if which is None:
        eye = torch.eye(classes, dtype=torch.float64, device=y.device)
        return eye[y][:, None] - eye
    own, others = (torch.nn.functional.one_hot(t, classes).double() for t in (y, which))
    return own[:, None] - others


def by_rivals(network: Network, ball: Any, boxes: Boxes, y: Tensor, bound: Callable[[Any, Boxes, Tensor, Tensor | None], Tensor]) -> Tensor:
    """(N, C, …): bound(ball, boxes, y, which) (n, r, …) for all samples and rivals, computed in chunks of at most RIVAL_ENTRIES entries.

    which: the rivals (r,) of a chunk, None for all classes.
    """
    head = network.stages[-1]
    classes, widest = head.outputs, max(head.inputs, head.outputs)
    count, most = max(1, RIVAL_ENTRIES // (classes * widest)), max(1, RIVAL_ENTRIES // widest)
    if count >= len(y) and most >= classes:
        return bound(ball, boxes, y, None)
    every = torch.arange(classes, device=y.device).split(most)
    parts = [slice(start, start + count) for start in range(0, len(y), count)]
    return torch.cat([torch.cat([bound(ball.part(p), boxes.part(p), y[p], which) for which in every], 1) for p in parts])


def interval_margins(network: Network, ball: InputSet, boxes: Boxes, y: Tensor) -> Tensor:
    """Lower bounds (N, C) of all margins from the last boxes. The rows of the label and of the rival are subtracted first."""
    return by_rivals(network, ball, boxes, y, partial(_interval_margins, network))


def _interval_margins(network: Network, ball: InputSet, boxes: Boxes, y: Tensor, which: Tensor | None) -> Tensor:
    head = network.stages[-1]
    rows = rival_rows(y, len(head.bias), which)
    weight, bias = head.backward(rows), rows @ head.bias
    if not boxes.low:
        return backward(network, ball, boxes, len(network.stages) - 1, rows)
    low, high = activation_range(network.stages[-2], boxes.low[-1], boxes.high[-1])
    middle, half = (low + high) / 2, (high - low) / 2
    # The difference of two rows that were rounded once; twice |W| bounds both.
    loss = 8 * gamma((head.terms if isinstance(head, DenseStage) else head.roundings) + 16, U64)
    size = loss * (head.absolute(middle.abs() + half) + head.bias.abs())
    if boxes.error:
        size = size + boxes.error[-1] * (1 + 1e-9)
    slack = size.gather(1, y[:, None]) + (size if which is None else size[:, which])
    return torch.einsum("ncm,nm->nc", weight, middle) + bias - torch.einsum("ncm,nm->nc", weight.abs(), half) - slack


def linear_margins(network: Network, ball: InputSet, boxes: Boxes, y: Tensor) -> Tensor:
    """Lower bounds (N, C) of all margins: the larger of the CROWN and the interval bound."""

    def bound(ball: InputSet, boxes: Boxes, y: Tensor, which: Tensor | None) -> Tensor:
        lower = backward(network, ball, boxes, len(network.stages) - 1, rival_rows(y, len(network.stages[-1].bias), which))
        return torch.maximum(lower, _interval_margins(network, ball, boxes, y, which))

    return by_rivals(network, ball, boxes, y, bound)
