"""What the outputs can be on a box of inputs: lower bounds of linear functions of the executed logits; branch and bound where those are too low.

A box has a distance of its own for each number. The bounds are CROWN's (`crown`), of the numbers that are executed: what a layer's execution is off
by, number by number from the sizes that its inputs have in the box, is carried along (`Boxes.error`). For layers that this is not known of, bounds
are of exact arithmetic, and what norms say of execution is taken off at the end (`Executed.lost`).

Branch and bound (Bunel et al. 2018; Wang et al. 2021): a relu that crosses 0 is cut in two cases, z ≥ 0 and z ≤ 0, in each of which it is linear;
what is proved in all cases is proved. In each, slopes α of the lines below and multipliers β of the known signs are improved by gradient ascent: any
α in [0, 1] and β ≥ 0 give a bound, so none has to be trusted. docs/theory.md, section 9.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robustlip.domains.lines.crown import Boxes, Choice, Cuboid, _backward, interval_boxes, known_sizes, linear_boxes
from robustlip.domains.lines.dense import Network, network_of, why_not
from robustlip.domains.lines.relaxations import Relu
from robustlip.domains.norms import Context
from robustlip.domains.norms.bound import GlobalBound, entry
from robustlip.domains.norms.elementwise import DROPOUTS
from robustlip.errors import UnsupportedLayer
from robustlip.geometry import length
from robustlip.layers import Chain, Scale, Shift
from robustlip.numerics.rounding import U64, norm_up, up
from robustlip.ops.maps import LinearMap, map_of
from robustlip.threats import InputBall

# Cases that are bounded at once, and the most that wait.
BATCH = 96
MOST_CASES = 200_000
# Steps of gradient ascent: at the first case, at each of those that follow, and where no relu is left to cut.
FIRST_STEPS, STEPS, LAST_STEPS = 60, 15, 300


def cuboid(low: Tensor, high: Tensor) -> Cuboid:
    """The box low ≤ x ≤ high (N, n), float64, by its middle, rounded outward."""
    middle = low / 2 + high / 2
    half = torch.maximum(high - middle, middle - low).clamp_min(0.0)
    return Cuboid(middle, half * (1 + 4 * U64) + 2 * U64 * torch.maximum(low.abs(), high.abs()))


def maps_by_stage(model: Chain, shape: tuple[int, ...]) -> list[list[tuple[LinearMap, int]]] | None:
    """The layers of each stage as maps, with the numbers of products that one of their outputs sums as it is executed.

    None for a chain with other layers than these: there execution is bounded by norms. Between them only ReLU stands, which executes exactly.
    """
    stages: list[list[tuple[LinearMap, int]]] = [[]]
    waiting = list(model)
    while waiting:
        layer = waiting.pop(0)
        if type(layer) is nn.Sequential:
            waiting[:0] = list(layer)
        elif type(layer) is nn.ReLU:
            stages.append([])
        elif type(layer) is nn.Flatten:
            shape = (math.prod(shape),)
        elif type(layer) in (nn.Linear, nn.Conv2d, Shift) or (type(layer) is Scale and not layer.divide):
            op = map_of(layer, shape)
            terms = layer.weight[0].numel() if isinstance(layer, nn.Linear | nn.Conv2d) else 1
            stages[-1].append((op, terms))
            shape = op.out
        elif type(layer) not in (nn.Identity, *DROPOUTS):
            return None
    return stages


@dataclass
class Executed:
    """The network of stages of a model on samples of one shape, and what its execution can lose.

    model: checked and in the covered dtype. points: the middles of the boxes as the model takes them, in its dtype (N, …).
    """

    model: Chain
    network: Network
    points: Tensor
    context: Context
    maps: list[list[tuple[LinearMap, int]]] | None

    @staticmethod
    def of(model: Chain, points: Tensor, context: Context) -> Executed:
        if why := why_not(model, InputBall("l2")):
            raise UnsupportedLayer(f"expected a model that linear relaxations are proved for, but {why}; attack it")
        network = network_of(model, tuple(points.shape[1:]), context)
        maps = maps_by_stage(model, tuple(points.shape[1:]))
        return Executed(model, network, points, context, maps if maps is not None and len(maps) == len(network.stages) else None)

    def boxes(self, box: Cuboid) -> Boxes:
        """Bounds of all stages; with what execution loses number by number, where that is known."""
        return linear_boxes(self.network, box, None if self.maps is None else self._error)

    def _error(self, i: int, size: Tensor) -> Tensor:
        """How far each executed number of stage i can be from Wh + b (N, m), for executed h of |h| ≤ size (N, n).

        A sum of n products and a bias is off by γ_{n+3} of the sum of their sizes in any order; products and subnormal operands may vanish.
        """
        assert self.maps is not None
        stage, context = self.network.stages[i], self.context
        error = torch.zeros_like(size)
        own = stage.weight_error * norm_up(size)[:, None] + stage.bias_error
        for op, terms in self.maps[i]:
            read = size + error
            ones = op.apply(torch.ones_like(size[:1]), absolute=True)
            size = (op.apply(read, absolute=True) + (0.0 if op.bias is None else op.bias.abs())) * (1 + 1e-9)
            small = (terms + 2) * context.tiny + context.flushed * (ones + read.sum(-1, keepdim=True) + 1)
            error = (op.apply(error, absolute=True) + context.gamma(terms + 3) * size + small) * (1 + 1e-9)
            error = torch.where(size + error < context.largest / 4, error, torch.full_like(error, torch.inf))
        return error + own * (1 + 1e-9)

    def lost(self, box: Cuboid, rows: Tensor) -> Tensor:
        """What rows·logits (N, r) of the executed model can be below the bounds that `boxes` leads to, anywhere in the box: by norms."""
        if self.maps is not None:
            return torch.zeros(len(box.x), rows.shape[-2], dtype=torch.float64)
        threat = InputBall("l2")
        layers, inside, norm = entry(self.model, self.points, threat)
        bound = GlobalBound(self.model, layers, inside, norm, threat, torch.zeros(len(self.points), dtype=torch.int64), self.context)
        apart = length(self.points.double().flatten(1) - box.x, "l2")
        state, _, single = bound.at(up(up(apart) * (1 + 1e-9) + box.reach).cpu())
        size = norm_up(rows)
        factor = size
        if bound.head is not None:
            weight = bound.head.weight.detach().double()
            # Sums of as many products as the head has rows.
            factor = up(norm_up(rows @ weight) + norm_up(2.0**-40 * (rows.abs() @ weight.abs())))
        known = known_sizes(self.network, interval_boxes(self.network, box)) if self.network.multiplies else []  # see Problem.lost
        drift = self.network.drift(box.size, known)
        fine = torch.stack(self.network.sizes(box.size, known)).amax(0) < 1e60
        drift = torch.where(fine, drift + 1e-120, torch.full_like(drift, torch.inf))
        total = rows.abs().sum(-1) * (1 + 2.0**-40)
        return up(factor * state.rounding[:, None] + total * single[:, None] + size * (1 + 1e-15) * drift[:, None])


def plain_bounds(executed: Executed, box: Cuboid, rows: Tensor) -> Tensor:
    """Lower bounds (N, r) of rows·logits of the executed model on the boxes, by CROWN alone. rows (N or 1, r, C)."""
    rows = rows.expand(len(box.x), -1, -1)
    return _backward(executed.network, box, executed.boxes(box), len(executed.network.stages) - 1, rows) - executed.lost(box, rows)


@dataclass
class _Cases:
    """Cases of one box that wait: the row each is about, by stage bounds, known signs, slopes and multipliers that were found; what is proved."""

    row: Tensor
    low: list[Tensor]
    high: list[Tensor]
    side: list[Tensor]
    alpha: list[Tensor]
    beta: list[Tensor]
    bound: Tensor

    def take(self, index: Tensor) -> _Cases:
        low, high, side, alpha, beta = ([t[index] for t in part] for part in (self.low, self.high, self.side, self.alpha, self.beta))
        return _Cases(self.row[index], low, high, side, alpha, beta, self.bound[index])

    @staticmethod
    def joined(parts: list[_Cases]) -> _Cases:
        def each(name: str) -> list[Tensor]:
            return [torch.cat(ts) for ts in zip(*(getattr(part, name) for part in parts), strict=True)]

        low, high, side, alpha, beta = map(each, ("low", "high", "side", "alpha", "beta"))
        return _Cases(torch.cat([p.row for p in parts]), low, high, side, alpha, beta, torch.cat([p.bound for p in parts]))


def _ascend(
    network: Network, box: Cuboid, error: tuple[Tensor, ...], cases: _Cases, targets: Tensor, steps: int, until: float
) -> tuple[_Cases, list[Tensor]]:
    """(the cases with the best bounds and what gave them, what each relu costs); targets (N,): bounds above these are enough."""
    here = Cuboid(box.x.expand(len(cases.row), -1), box.half.expand(len(cases.row), -1))
    boxes, last = Boxes(tuple(cases.low), tuple(cases.high), tuple(e.expand(len(cases.row), -1) for e in error)), len(network.stages) - 1
    curves = [isinstance(stage.curve, Relu) for stage in network.hidden]
    split = [bool((side != 0).any()) for side in cases.side]
    alpha: list[Tensor] = [a.clone() for a in cases.alpha]
    beta = [b.clone() for b in cases.beta]
    best = torch.full_like(targets, -torch.inf)
    kept, seen = [t.clone() for t in (*alpha, *beta)], []
    tuned = [a.requires_grad_() for a, curve in zip(alpha, curves, strict=True) if curve]
    multipliers = [b.requires_grad_() for b, cut in zip(beta, split, strict=True) if cut]
    groups = [{"params": tuned, "lr": 0.1}] + ([{"params": multipliers, "lr": 0.05}] if multipliers else [])
    optimizer = torch.optim.Adam(groups, lr=0.1)
    for step in range(steps + 1):
        found: list[Tensor] = []
        slopes = [a if curve else None for a, curve in zip(alpha, curves, strict=True)]
        choice = Choice(slopes, [b if cut else None for b, cut in zip(beta, split, strict=True)], cases.side, found)
        with torch.enable_grad():
            value = _backward(network, here, boxes, last, cases.row[:, None], None, choice)[:, 0]
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
    found_ = kept[: len(alpha)], [t * (side != 0) for t, side in zip(kept[len(alpha) :], cases.side, strict=True)]
    return replace(cases, alpha=found_[0], beta=found_[1], bound=torch.maximum(best, cases.bound)), seen


@torch.no_grad()
def holds(executed: Executed, box: Cuboid, rows: Tensor, offsets: Tensor, until: float, most: int = MOST_CASES) -> tuple[Tensor, bool]:
    """(bool (r,): proved that row·logits > offset everywhere in the one box; whether the search ended for lack of time or room).

    rows (r, C), offsets (r,), float64. until: by time.monotonic().
    """
    network = executed.network
    lost = executed.lost(box, rows[None])[0]
    targets = offsets + lost + 2.0**-45 * (offsets.abs() + lost)  # more than the sum can lose
    boxes = executed.boxes(box)
    last = len(network.stages) - 1
    first = _backward(network, box, boxes, last, rows[None])[0]
    proved = first > targets
    if bool(proved.all()) or time.monotonic() > until:
        return proved, not bool(proved.all())
    curved = [isinstance(stage.curve, Relu) for stage in network.hidden]
    if not any(curved):
        return proved, False
    cut_short = False
    # The rival that is furthest from being proved decides most often: least first is last.
    for r in first.argsort(descending=True).tolist():
        if proved[r]:
            continue
        done, ended = _branch(network, box, boxes, rows[r], targets[r], curved, until, most)
        proved[r], cut_short = done, cut_short or ended
        if not done:
            break  # all have to be proved
    return proved, cut_short


def _branch(
    network: Network, box: Cuboid, boxes: Boxes, row: Tensor, target: Tensor, curved: list[bool], until: float, most: int
) -> tuple[bool, bool]:
    """(whether row·z > target in the whole box, whether time or room ended the search)."""
    low, high = list(boxes.low), list(boxes.high)
    alpha = [(h > -l).double() for l, h in zip(low, high, strict=True)]
    side, beta = ([torch.zeros_like(l) for l in low] for _ in range(2))
    waiting = _Cases(row[None], low, high, side, alpha, beta, torch.full((1,), -torch.inf, dtype=torch.float64))
    steps = FIRST_STEPS
    while len(waiting.row):
        if time.monotonic() > until or len(waiting.row) > most:
            return False, True
        order = waiting.bound.argsort()  # the furthest first
        cases, rest = waiting.take(order[:BATCH]), waiting.take(order[BATCH:])
        cases, seen = _ascend(network, box, boxes.error, cases, target.expand(len(cases.row)), steps, until)
        steps = STEPS
        open_ = ~(cases.bound > target)
        cases, seen = cases.take(open_), [s[open_] for s in seen]
        whole = _uncut(network, cases, curved)
        if bool(whole.any()):  # no relu is left to cut: all that is left is to find the multipliers
            last = cases.take(whole)
            last, _ = _ascend(network, box, boxes.error, last, target.expand(len(last.row)), LAST_STEPS, until)
            if not bool((last.bound > target).all()):
                return False, time.monotonic() > until
            cases, seen = cases.take(~whole), [s[~whole] for s in seen]
        waiting = _Cases.joined([*_cut(network, cases, seen, curved), rest])
    return True, False


def _crossing(network: Network, cases: _Cases, curved: list[bool]) -> list[Tensor]:
    stages = zip(network.hidden, cases.low, cases.high, curved, strict=True)
    return [(low < 0) & (high > 0) & ~stage.linear & curve for stage, low, high, curve in stages]


def _uncut(network: Network, cases: _Cases, curved: list[bool]) -> Tensor:
    """(N,) bool: cases in which no relu crosses 0."""
    return ~torch.cat(_crossing(network, cases, curved), 1).any(1)


def _cut(network: Network, cases: _Cases, seen: list[Tensor], curved: list[bool]) -> list[_Cases]:
    """Both cases of one relu each: the one whose line above costs the bound most."""
    crossings = _crossing(network, cases, curved)
    scores = [torch.where(crossing, cost + 1e-12, torch.full_like(cost, -1.0)) for crossing, cost in zip(crossings, seen, strict=True)]
    sizes = [s.shape[1] for s in scores]
    place = torch.cat(scores, 1).argmax(1)
    parts = []
    for sign in (1.0, -1.0):
        low, high, side, start = [t.clone() for t in cases.low], [t.clone() for t in cases.high], [t.clone() for t in cases.side], 0
        for i, size in enumerate(sizes):
            here = ((place >= start) & (place < start + size)).nonzero()[:, 0]
            column = place[here] - start
            side[i][here, column] = sign
            (low if sign > 0 else high)[i][here, column] = 0.0
            start += size
        parts.append(replace(cases, low=low, high=high, side=side))
    return parts
