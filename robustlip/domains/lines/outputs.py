"""Bounds of the outputs on a box of inputs: lower bounds of linear functions of the executed logits, and branch and bound where these are too low.

A box has a half-width for each input. The bounds are CROWN bounds (`crown`) of the executed values: the execution error of each stage is bounded
entry by entry, from the range of its inputs, and added to the boxes (`Boxes.error`).

Branch and bound (Bunel et al. 2018; Wang et al. 2021): a ReLU that crosses 0 is split into two subproblems, z ≥ 0 and z ≤ 0, in each of which it is
linear. A property is proved if it is proved for all subproblems. In each, gradient ascent tightens the bound over the slopes α of the lower lines and
the multipliers β of the sign constraints. Every α in [0, 1] and β ≥ 0 gives a valid bound, so the ascent need not be trusted.
Source: docs/theory.md, section 9.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustlip.domains.lines.crown import Boxes, InputBox, InputSet, Tunable, _backward, linear_boxes, vanished
from robustlip.domains.lines.dense import Network, network_of, why_not
from robustlip.domains.lines.relaxations import Relu
from robustlip.domains.norms import Context
from robustlip.errors import UnsupportedLayer
from robustlip.layers import Chain
from robustlip.numerics.rounding import U64
from robustlip.threats import InputBall

# Subproblems bounded at once, and the most subproblems that may be left.
BATCH = 96
MOST_SUBPROBLEMS = 200_000
# Steps of gradient ascent: for the first subproblem, for later ones, and where no ReLU is left to split.
FIRST_STEPS, STEPS, LAST_STEPS = 60, 15, 300


def input_box(low: Tensor, high: Tensor) -> InputBox:
    """The box low ≤ x ≤ high (N, n), float64, as midpoint and half-widths, rounded outward."""
    middle = low / 2 + high / 2
    half = torch.maximum(high - middle, middle - low).clamp_min(0.0)
    return InputBox(middle, half * (1 + 4 * U64) + 2 * U64 * torch.maximum(low.abs(), high.abs()))


@dataclass
class ExecutedNetwork:
    """The network of stages of a model on samples of one shape, in the arithmetic of the context."""

    network: Network
    context: Context

    @staticmethod
    def of(model: Chain, shape: tuple[int, ...], context: Context) -> ExecutedNetwork:
        if why := why_not(model, InputBall("l2")):
            raise UnsupportedLayer(f"expected a model that linear relaxations are proved for, but {why}; attack it")
        return ExecutedNetwork(network_of(model, shape, context), context)

    def boxes(self, box: InputSet) -> Boxes:
        """Boxes of all stages, execution errors included."""
        return linear_boxes(self.network, box, self.context)


def crown_lower_bounds(executed: ExecutedNetwork, box: InputBox, rows: Tensor) -> Tensor:
    """Lower bounds (N, r) of rows·logits of the executed model on the boxes, by CROWN alone. rows (N or 1, r, C)."""
    network, boxes = executed.network, executed.boxes(box)
    bound = _backward(network, box, boxes, len(network.stages) - 1, rows.expand(len(box.x), -1, -1))
    return bound - vanished(network, box, boxes)[:, None]


@dataclass
class _Subproblems:
    """Open subproblems of one box: for each its row, the boxes of all stages, sign constraints, α, β and the best lower bound so far."""

    row: Tensor
    low: list[Tensor]
    high: list[Tensor]
    side: list[Tensor]
    alpha: list[Tensor]
    beta: list[Tensor]
    bound: Tensor

    def take(self, index: Tensor) -> _Subproblems:
        low, high, side, alpha, beta = ([t[index] for t in part] for part in (self.low, self.high, self.side, self.alpha, self.beta))
        return _Subproblems(self.row[index], low, high, side, alpha, beta, self.bound[index])

    @staticmethod
    def joined(parts: list[_Subproblems]) -> _Subproblems:
        def each(name: str) -> list[Tensor]:
            return [torch.cat(ts) for ts in zip(*(getattr(part, name) for part in parts), strict=True)]

        low, high, side, alpha, beta = map(each, ("low", "high", "side", "alpha", "beta"))
        return _Subproblems(torch.cat([p.row for p in parts]), low, high, side, alpha, beta, torch.cat([p.bound for p in parts]))


def _ascend(
    network: Network, box: InputSet, error: tuple[Tensor, ...], subproblems: _Subproblems, targets: Tensor, steps: int, until: float
) -> tuple[_Subproblems, list[Tensor]]:
    """(the subproblems with their best bounds and the α, β that gave them, the amount by which each ReLU lowers the bound).

    targets (N,): a subproblem with a bound above its target is proved. until: deadline by time.monotonic().
    """
    here = box.repeated(len(subproblems.row))
    boxes = Boxes(tuple(subproblems.low), tuple(subproblems.high), tuple(e.expand(len(subproblems.row), -1) for e in error))
    last = len(network.stages) - 1
    is_relu = [isinstance(stage.activation, Relu) for stage in network.hidden]
    split = [bool((side != 0).any()) for side in subproblems.side]
    alpha: list[Tensor] = [a.clone() for a in subproblems.alpha]
    beta = [b.clone() for b in subproblems.beta]
    best = torch.full_like(targets, -torch.inf)
    kept, seen = [t.clone() for t in (*alpha, *beta)], []
    tuned = [a.requires_grad_() for a, relu in zip(alpha, is_relu, strict=True) if relu]
    multipliers = [b.requires_grad_() for b, is_split in zip(beta, split, strict=True) if is_split]
    groups = [{"params": tuned, "lr": 0.1}] + ([{"params": multipliers, "lr": 0.05}] if multipliers else [])
    optimizer = torch.optim.Adam(groups, lr=0.1)
    for step in range(steps + 1):
        found: list[Tensor] = []
        alphas = [a if relu else None for a, relu in zip(alpha, is_relu, strict=True)]
        choice = Tunable(alphas, [b if is_split else None for b, is_split in zip(beta, split, strict=True)], subproblems.side, found)
        with torch.enable_grad():
            value = _backward(network, here, boxes, last, subproblems.row[:, None], None, choice)[:, 0]
        now = value.detach()
        better = now > best
        best = torch.where(better, now, best)
        for old, new in zip(kept, (*alpha, *beta), strict=True):
            old.copy_(torch.where(better[:, None], new.detach(), old))
        seen = [f.detach() for f in found]
        open_ = best <= targets
        if step == steps or not bool(open_.any()) or time.monotonic() > until:
            break
        optimizer.zero_grad()
        with torch.enable_grad():
            (-value[open_].sum()).backward()
        optimizer.step()
        with torch.no_grad():
            for a in tuned:
                a.clamp_(0.0, 1.0)
            for b in multipliers:
                b.clamp_(min=0.0)
        for group in optimizer.param_groups:
            group["lr"] *= 0.95
    found_ = kept[: len(alpha)], [t * (side != 0) for t, side in zip(kept[len(alpha) :], subproblems.side, strict=True)]
    return replace(subproblems, alpha=found_[0], beta=found_[1], bound=torch.maximum(best, subproblems.bound)), seen


@torch.no_grad()
def holds(
    executed: ExecutedNetwork, box: InputSet, rows: Tensor, offsets: Tensor, until: float, most: int = MOST_SUBPROBLEMS, total: float = math.inf
) -> tuple[Tensor, bool]:
    """(bool (r,): whether row·logits > offset is proved on the whole box, whether the search stopped at its limit of time or of subproblems).

    rows (r, C), offsets (r,), float64; the box (or ball) is a single one. until: deadline by time.monotonic(). most: open subproblems at once;
    total: subproblems that are bounded for one row. Stops at the first row that is not proved.
    """
    network = executed.network
    boxes = executed.boxes(box)
    lost = vanished(network, box, boxes)
    targets = offsets + lost + 2.0**-45 * (offsets.abs() + lost)  # more than the sum can lose
    last = len(network.stages) - 1
    first = _backward(network, box, boxes, last, rows[None])[0]
    proved = first > targets
    if bool(proved.all()) or time.monotonic() > until:
        return proved, not bool(proved.all())
    is_relu = [isinstance(stage.activation, Relu) for stage in network.hidden]
    if not any(is_relu):
        return proved, False
    cut_short = False
    # Rows in the order of decreasing bounds: easy rows first.
    for r in first.argsort(descending=True).tolist():
        if proved[r]:
            continue
        done, ended = _branch(network, box, boxes, rows[r], targets[r], is_relu, until, most, total)
        proved[r], cut_short = done, cut_short or ended
        if not done:
            break  # every row has to be proved
    return proved, cut_short


def _branch(
    network: Network, box: InputSet, boxes: Boxes, row: Tensor, target: Tensor, is_relu: list[bool], until: float, most: int, total: float
) -> tuple[bool, bool]:
    """(whether row·z > target is proved on the whole box, whether the search stopped at its limit of time or of subproblems)."""
    low, high = list(boxes.low), list(boxes.high)
    alpha = [(h > -l).double() for l, h in zip(low, high, strict=True)]
    side, beta = ([torch.zeros_like(l) for l in low] for _ in range(2))
    waiting = _Subproblems(row[None], low, high, side, alpha, beta, torch.full((1,), -torch.inf, dtype=torch.float64))
    steps = FIRST_STEPS
    while len(waiting.row):
        if time.monotonic() > until or len(waiting.row) > most:
            return False, True
        order = waiting.bound.argsort()  # the lowest bounds first
        subproblems, rest = waiting.take(order[:BATCH]), waiting.take(order[BATCH:])
        total -= len(subproblems.row)
        if total < 0:
            return False, True
        subproblems, seen = _ascend(network, box, boxes.error, subproblems, target.expand(len(subproblems.row)), steps, until)
        steps = STEPS
        open_ = ~(subproblems.bound > target)
        subproblems, seen = subproblems.take(open_), [s[open_] for s in seen]
        whole = _without_crossing(network, subproblems, is_relu)
        if bool(whole.any()):  # no ReLU is left to split; only the multipliers can still improve
            last = subproblems.take(whole)
            last, _ = _ascend(network, box, boxes.error, last, target.expand(len(last.row)), LAST_STEPS, until)
            if not bool((last.bound > target).all()):
                return False, time.monotonic() > until
            subproblems, seen = subproblems.take(~whole), [s[~whole] for s in seen]
        waiting = _Subproblems.joined([*_split(network, subproblems, seen, is_relu), rest])
    return True, False


def _crossing(network: Network, subproblems: _Subproblems, is_relu: list[bool]) -> list[Tensor]:
    stages = zip(network.hidden, subproblems.low, subproblems.high, is_relu, strict=True)
    return [(low < 0) & (high > 0) & ~stage.linear & relu for stage, low, high, relu in stages]


def _without_crossing(network: Network, subproblems: _Subproblems, is_relu: list[bool]) -> Tensor:
    """(N,) bool: subproblems in which no ReLU crosses 0."""
    return ~torch.cat(_crossing(network, subproblems, is_relu), 1).any(1)


def _split(network: Network, subproblems: _Subproblems, seen: list[Tensor], is_relu: list[bool]) -> list[_Subproblems]:
    """The two subproblems of one ReLU each: the ReLU whose upper line lowers the bound most."""
    crossings = _crossing(network, subproblems, is_relu)
    scores = [torch.where(crossing, cost + 1e-12, torch.full_like(cost, -1.0)) for crossing, cost in zip(crossings, seen, strict=True)]
    sizes = [s.shape[1] for s in scores]
    place = torch.cat(scores, 1).argmax(1)
    parts = []
    for sign in (1.0, -1.0):
        low, high, side, start = [t.clone() for t in subproblems.low], [t.clone() for t in subproblems.high], [t.clone() for t in subproblems.side], 0
        for i, size in enumerate(sizes):
            here = ((place >= start) & (place < start + size)).nonzero()[:, 0]
            column = place[here] - start
            side[i][here, column] = sign
            (low if sign > 0 else high)[i][here, column] = 0.0
            start += size
        parts.append(replace(subproblems, low=low, high=high, side=side))
    return parts
