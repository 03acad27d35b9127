"""The search for the multipliers of `lagrangian`, and the radii of method 'sdp'."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlip.domains.lines.crown import RIVAL_ENTRIES, Ball, Boxes, linear_boxes, linear_margins, vanished
from robustlip.domains.lines.dense import Network, is_affine, why_not
from robustlip.domains.lines.radii import Problem
from robustlip.domains.lines.secants import executed_losses, gains
from robustlip.domains.margins import margins
from robustlip.domains.norms import Context
from robustlip.domains.quadratic.lagrangian import Dual, Form, Instances, Multipliers, Scales, form_of, proved_offset, radius_of
from robustlip.errors import BadInput
from robustlip.layers import Chain, GroupSort, MaxMin
from robustlip.numerics.rounding import U64, down, norm_up, up
from robustlip.threats import Threat

# The most rows of a form that is factorised; beyond, one factorisation takes a second.
LARGEST_FORM = 1600
# The most entries of the forms of one batch of samples, and the most pairs of sample and rival whose forms are factorised at once.
FORMS = 2**22
PAIRS = 128
# The search. FIRST: radius of the first boxes as a fraction of the first-order radius, at which attacks succeed. ENOUGH: a search ends at this
# fraction of the boxes' radius. RETRY: below this fraction a sample is searched again with tighter boxes. Soundness does not depend on these numbers.
FIRST, ENOUGH, RETRY = 0.93, 0.995, 0.95
# The number of random vectors that estimate the barrier's gradient, the barrier's weight relative to margins, the most strengthenings of a start.
PROBES, BARRIER, STRENGTHENINGS = 8, 0.2, 8
# Layers that consist of ReLU; all other layers of a network have to be affine.
_RELU_LAYERS = (nn.ReLU, MaxMin, GroupSort)


def start(it: Instances) -> tuple[Multipliers, Scales]:
    """Closed-form multipliers: relu(z) ≤ (z + μ)²/(4μ) where activity lowers the margin, the clean slope elsewhere, λ slightly above the balanced
    value."""
    end = it.layers[-1]
    a = it.weights
    tiny = 1e-9 * a.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    scale = a.abs() + tiny
    on = (end.clean > 0).to(a.dtype)
    mu = torch.maximum(end.clean.abs(), end.move).clamp_min(1e-30)
    c = torch.where(a < 0, a / 2, a * on) * end.valid
    kappa = torch.where(a < 0, a / (4 * mu), 0 * a) * end.valid
    last = torch.stack([c / scale, kappa * end.width / scale], 1)
    pull = it.fixed + (c[:, None] @ end.rows)[:, 0]
    inner: list[Tensor] = []
    scales: list[Tensor] = []
    for layer in reversed(it.layers[:-1]):
        p = pull[:, layer.block] * layer.valid
        typical = p.abs().sum(-1, keepdim=True) / layer.valid.sum(-1, keepdim=True).clamp_min(1)
        scale = torch.maximum(p.abs(), 0.6 * typical) + 1e-30
        on = (layer.clean > 0).to(a.dtype)
        mu = torch.maximum(layer.clean.abs(), 0.1 * layer.move).clamp_min(1e-30)
        stiff = scale / mu
        helps = p.clamp_min(0.0)
        zero = torch.zeros_like(p)
        q = torch.stack([-helps * on, helps, zero, -stiff, stiff], 1)
        unit = torch.stack([torch.ones_like(p)] * 2 + [layer.width] * 3, 1) / scale[:, None]
        inner.insert(0, q * unit * layer.valid[:, None])
        scales.insert(0, scale)
        # The coefficients of the layer before: those of these neurons times the slope of their relaxation.
        slope = torch.where(p < 0, ((layer.clean + mu) / (2 * mu)).clamp(0, 1), on)
        e = layer.rows.shape[-1]
        pull = pull[:, :e] + ((p * slope)[:, None] @ layer.rows)[:, 0]
    return _with_input_multipliers(it, last, inner, Scales(end.valid * (a.abs() + tiny), scales, torch.zeros(0)))


def _with_input_multipliers(it: Instances, last: Tensor, inner: list[Tensor], scales: Scales) -> tuple[Multipliers, Scales]:
    g = it.gradient
    size = torch.linalg.vector_norm(g, dim=-1, keepdim=True).clamp_min(1e-30)
    per = size / (2 * it.radius[:, None].clamp_min(1e-30))
    split = torch.zeros_like(g)
    if it.norm == "linf":
        own = (g.abs() + 0.5 * g.abs().mean(-1, keepdim=True)) / (2 * it.radius[:, None])
        log_lambda = (1.2 * own / per).clamp_min(1e-30).log()
    else:
        log_lambda = torch.full_like(size, math.log(2.0))
    scale = per
    if it.norm == "l1":
        split = g / scale
    return Multipliers(last, inner, log_lambda, split), Scales(scales.last, scales.inner, scale)


def strengthen(m: Multipliers) -> Multipliers:
    """Larger λ and h² terms, for instances whose form is not definite."""
    inner = [torch.cat([q[:, :3], 1.6 * q[:, 3:]], 1) for q in m.inner]
    return Multipliers(m.last, inner, m.log_lambda + 0.4, m.split)


def relative(absolute: Multipliers, it: Instances, scales: Scales) -> Multipliers:
    """From absolute multipliers to relative ones, as `Dual` takes them; absolute.log_lambda holds λ itself."""
    end = it.layers[-1]
    last = absolute.last * torch.stack([torch.ones_like(end.width), end.width], 1) / scales.last.clamp_min(1e-30)[:, None]
    inner = []
    for layer, q, scale in zip(it.layers, absolute.inner, scales.inner, strict=False):
        inner.append(q * torch.stack([torch.ones_like(layer.width)] * 2 + [layer.width] * 3, 1) / scale[:, None])
    return Multipliers(last, inner, (absolute.log_lambda / scales.gradient).clamp_min(1e-30).log(), absolute.split / scales.gradient)


def value(dual: Dual) -> tuple[Tensor, Tensor, Tensor]:
    """(A (B,), −inf where M is not definite; the minimiser v* (B, d); the Cholesky factor of M). Not proved, for the search."""
    matrix, linear, constant = dual.form()
    factor, failed = torch.linalg.cholesky_ex(matrix)
    half = torch.linalg.solve_triangular(factor, linear[..., None], upper=False)
    point = -torch.linalg.solve_triangular(factor.mT, half, upper=True)[..., 0]
    total = dual.minima() + constant - half.square().sum((-2, -1))
    return torch.where((failed == 0) & total.isfinite(), total, torch.full_like(total, -torch.inf)), point, factor


class Search:
    """Multipliers of pairs of a sample and a rival for the boxes of one ball, in float32, and the radii that they appear to prove.

    floor (N, C): radii that other bounds prove for each rival. The pairs are those whose floor is below the radius of the ball.
    """

    def __init__(self, form: Form, ball: Ball, margin: Tensor, floor: Tensor) -> None:
        self.form, self.ball, self.radii = form.to(torch.float32), ball, floor.to(torch.float32)
        self.limit = ball.radius.to(torch.float32)
        self.order = torch.arange(len(margin), device=margin.device)
        self.sample, self.rival = (self.radii < self.limit[:, None]).nonzero().unbind(1)
        self.pair = torch.full(floor.shape, -1, device=floor.device)
        self.pair[self.sample, self.rival] = torch.arange(len(self.sample), device=floor.device)
        self.margin = margin[self.sample, self.rival].to(torch.float32)

    def instances(self, pairs: Tensor, form: Form | None = None) -> Instances:
        return Instances.of(form or self.form, self.sample[pairs], self.rival[pairs], self.ball)

    def begin(self, known: tuple[Multipliers, Tensor] | None) -> None:
        """Closed-form multipliers, or those in `known` (absolute) for the pairs that it has; strengthened where the form is not definite."""
        parts = []
        for pairs in torch.arange(len(self.sample), device=self.sample.device).split(PAIRS):
            it = self.instances(pairs)
            m, scale = start(it)
            if known is not None:
                former = relative(known[0].take(pairs), it, scale)
                there = known[1][pairs]
                chosen = zip(former.tensors(), m.tensors(), strict=True)
                m = Multipliers.of([torch.where(there.view(-1, *[1] * (t.dim() - 1)), old, t) for old, t in chosen])
            dual = Dual(it, m, scale)
            offset = value(dual)[0]
            for _ in range(STRENGTHENINGS):
                bad = (offset == -torch.inf).nonzero()[:, 0]
                if not len(bad):
                    break
                stiffer = strengthen(m.take(bad))
                for t, new in zip(m.tensors(), stiffer.tensors(), strict=True):
                    t[bad] = new
                offset[bad] = value(Dual(self.instances(pairs[bad]), stiffer, scale.take(bad)))[0]
            dual = Dual(it, m, scale)
            found = radius_of(offset, dual.split_cost(), dual.total_lambda(), it.radius)
            at = (self.sample[pairs], self.rival[pairs])
            self.radii[at] = torch.maximum(self.radii[at], found)
            parts.append((m.tensors(), [scale.last, *scale.inner, scale.gradient]))
        self.multipliers = [torch.cat(tensors) for tensors in zip(*(m for m, _ in parts), strict=True)]
        scales = [torch.cat(tensors) for tensors in zip(*(s for _, s in parts), strict=True)]
        self.scales = Scales(scales[0], scales[1:-1], scales[-1])

    def absolute(self) -> Multipliers:
        """The absolute multipliers of all pairs, with λ instead of its logarithm."""
        parts = []
        for pairs in torch.arange(len(self.sample), device=self.sample.device).split(PAIRS):
            dual = Dual(self.instances(pairs), Multipliers.of([t[pairs] for t in self.multipliers]), self.scales.take(pairs))
            parts.append([torch.stack([dual.c, dual.kappa], 1), *dual.q, dual.lam, dual.split])
        return Multipliers.of([torch.cat(tensors) for tensors in zip(*parts, strict=True)])

    def subset(self, samples: Tensor) -> Search:
        """The same search for some of its samples (n,), renumbered; the multipliers are shared."""
        part = copy.copy(self)
        part.pair, part.order = self.pair[samples], samples
        return part

    def ascend(self, steps: int, rate: float) -> None:
        """Adam on the multipliers of each sample's binding rival. A step to an indefinite form is undone and shortened."""
        if not len(self.sample):
            return
        now, sure = ([t.clone() for t in self.multipliers] for _ in range(2))
        first, second = ([torch.zeros_like(t) for t in self.multipliers] for _ in range(2))
        count, pace = torch.zeros_like(self.margin), torch.full_like(self.margin, rate)
        # A probe has one entry per neuron, so that those of a pair do not depend on the batch.
        generator = torch.Generator(device=self.margin.device).manual_seed(0)
        for _ in range(steps):
            noise = torch.randn(self.form.variables, PROBES, generator=generator, dtype=self.margin.dtype, device=self.margin.device)
            smallest, rival = self.radii.min(1)
            live = (smallest < ENOUGH * self.limit).nonzero()[:, 0]
            if not len(live):
                break
            p = self.pair[live, rival[live]]
            it = self.instances(p)
            leaves = [t[p].requires_grad_() for t in now]
            with torch.enable_grad():
                dual = Dual(it, Multipliers.of(leaves), self.scales.take(p))
                with torch.no_grad():
                    offset, point, factor = value(dual)
                    good = offset > -torch.inf
                    found = radius_of(offset, dual.split_cost(), dual.total_lambda(), it.radius)
                    better = good & (found > self.radii[live, rival[live]])
                    probe = torch.linalg.solve_triangular(factor.mT, noise[self.form.variable_of[self.sample[p]]], upper=True)
                    aim = torch.minimum(it.radius, torch.maximum(found, 0.5 * it.radius) * 1.03)
                    barrier = self.margin[p] * BARRIER * 0.93 ** count[p] / it.used_entries
                gain = dual.at(point[..., None])[:, 0] + dual.minima() - dual.split_cost() * aim - dual.total_lambda() * aim.square()
                gain = gain + barrier * dual.curvature(probe).mean(-1)
                gradients = torch.autograd.grad((torch.where(good, gain, torch.zeros_like(gain)) / self.margin[p]).sum(), leaves)
            count[p] += good.to(count.dtype)
            pacing = pace[p]
            pace[p] = torch.where(good, (pacing * 1.05).clamp_max(rate), pacing * 0.4)
            self.radii[live, rival[live]] = torch.where(better, found, self.radii[live, rival[live]])
            for k, (moved, gradient) in enumerate(zip(leaves, gradients, strict=True)):
                shape = (-1, *[1] * (moved.dim() - 1))
                ok, leaf, gradient = good.view(shape), moved.detach(), gradient.nan_to_num(0.0)
                self.multipliers[k][p] = torch.where(better.view(shape), leaf, self.multipliers[k][p])
                sure[k][p] = torch.where(ok, leaf, sure[k][p])
                first[k][p] = torch.where(ok, 0.8 * first[k][p] + 0.2 * gradient, 0.3 * first[k][p])
                second[k][p] = torch.where(ok, 0.95 * second[k][p] + 0.05 * gradient.square(), second[k][p])
                t = count[p].clamp_min(1).view(shape)
                move = (first[k][p] / (1 - 0.8**t)) / ((second[k][p] / (1 - 0.95**t)).sqrt() + 1e-9)
                now[k][p] = sure[k][p] + torch.where(good, pacing, 0.4 * pacing).view(shape) * move


def clean_gradients(network: Network, x: Tensor, y: Tensor) -> Tensor:
    """The gradients of all margins at the clean points (N, C, n)."""
    clean = network.forward(x)
    head = network.stages[-1].weight
    rows = head[y][:, None] - head
    for z, stage in zip(reversed(clean[:-1]), reversed(network.hidden), strict=True):
        rows = (rows * ((z > 0) | stage.linear).double()[:, None]) @ stage.weight
    return rows


def sdp_radii(
    model: Chain, x: Tensor, y: Tensor, logits: Tensor, threat: Threat, context: Context, steps: int = 40, rounds: int = 2, rate: float = 0.1
) -> tuple[Tensor, Tensor]:
    """(radius (N,), NaN (N,)), float64 on the CPU, from the Lagrange dual of the exact ReLU network.

    steps: of the search for multipliers of each sample's binding rival, in each of `rounds` rounds; each round computes new boxes. rate: step size.
    Raises BadInput where the method does not apply or the form is too large.
    """
    problem = Problem(model, x, y, logits, threat, context)
    if why := sdp_why_not(model, threat) or _too_large(problem.network):
        raise BadInput(f"expected a model and threat that quadratic duals are proved for, but {why}; use method 'crown'")
    radius = torch.zeros_like(problem.norm)
    todo = problem.correct.nonzero()[:, 0]
    widths = [s.weight.shape[0] for s in problem.network.hidden]
    d = problem.x.shape[1] + sum(widths[:-1])
    gradients = len(problem.network.stages[-1].bias) * max(s.inputs for s in problem.network.stages)
    for part in todo.split(max(1, min(FORMS // (d * max(widths)), RIVAL_ENTRIES // gradients))) if len(todo) else ():
        radius[part] = _radii(problem, part, steps, rounds, rate)
    return radius, torch.full_like(radius, torch.nan)


def _radii(problem: Problem, part: Tensor, steps: int, rounds: int, rate: float) -> Tensor:
    network, device = problem.network, problem.x.device
    x, y = problem.x[part.to(device)], problem.y[part.to(device)]
    # The margins of the float64 matrices: the last bits of executed margins depend on the batch, and the search would amplify the difference.
    margin = margins(network.forward(x)[-1], y).clamp_min(1e-30)
    norm = problem.threat.norm  # type: ignore[union-attr]
    unit = Ball(x, torch.ones(len(x), dtype=torch.float64, device=device), norm)
    limit = (margin / unit.dual(clean_gradients(network, x, y)).clamp_min(1e-30)).amin(-1).clamp_max(1e6)
    best = torch.zeros_like(limit)
    share = torch.full_like(limit, FIRST)
    rows = torch.arange(len(x), device=device)
    old: Search | None = None
    for turn in range(rounds):
        ball = Ball(x[rows], limit[rows] * share, norm)
        boxes = linear_boxes(network, ball, problem.context)
        form = form_of(network, ball, boxes, y[rows])
        plain = _simple_bounds(problem, ball, boxes, y[rows])
        search = Search(form, ball, margin[rows], plain.radius(ball))
        if len(search.sample):
            search.begin(None if old is None else _transferred(old, search))
            search.ascend(steps, rate)
        best[rows] = torch.maximum(best[rows], _proved(search, form, plain))
        reached = search.radii.amin(1).double() / limit[rows]
        # Samples far inside their boxes are searched again with tighter boxes, those that reached the boxes' radius with wider ones.
        filled = reached >= ENOUGH * share
        again = ((reached < RETRY * share) | filled).nonzero()[:, 0]
        if not len(again):
            break
        wider = share * (1.06 if turn == 0 else 1.6)
        old = search.subset(again)
        rows, share = rows[again], torch.where(filled, wider, (reached * 1.05).clamp_min(0.1 * FIRST))[again]
    return best.cpu()


@dataclass(frozen=True)
class SimpleBounds:
    """Bounds without multipliers for each rival (N, C): the margin is at least offset − cost·ε. proved: whether CROWN proves it up to the boxes' ε.

    error: the execution error of the margins at the boxes' ε.
    """

    offset: Tensor
    cost: Tensor
    proved: Tensor
    error: Tensor

    def radius(self, ball: Ball) -> Tensor:
        free = radius_of(self.offset, self.cost, torch.zeros_like(self.cost), ball.radius[:, None])
        return torch.where(self.proved, ball.radius[:, None], free)


def _simple_bounds(problem: Problem, ball: Ball, boxes: Boxes, y: Tensor) -> SimpleBounds:
    network = problem.network
    # Errors of execution are bounded on the boxes: that covers all smaller balls.
    behind = vanished(network, ball, boxes)[:, None] + problem.context.final_error
    lost = up(executed_losses(network, ball, boxes, y) + behind)
    logits = network.forward(ball.x)[-1]
    own = y[:, None]
    error = 2 * network.forward_errors(ball.l2_norm)[-1][:, None] + 4 * U64 * logits.abs()
    margin = logits.gather(1, own) - logits - error - error.gather(1, own) - lost
    gain = gains(network, ball.norm, problem.context, problem.model)
    head = network.stages[-1].weight
    rows = norm_up(head[y][:, None] - head) + 4 * U64 * network.stages[-1].magnitude
    cost = up(rows * math.prod(gain[:-1]) * math.prod(s.slope for s in network.hidden) * (1 + 1e-12))
    held = linear_margins(network, ball, boxes, y) - up(behind) > 0
    return SimpleBounds(margin.scatter(1, own, torch.inf), cost.scatter(1, own, 0.0), held.scatter(1, own, True), lost)


def _transferred(old: Search, new: Search) -> tuple[Multipliers, Tensor] | None:
    """(absolute multipliers of the old pairs and neurons for the new ones, 0 for new neurons; which pairs are old), None without old pairs."""
    source = old.pair[new.sample, new.rival]
    if not bool((source >= 0).any()):
        return None
    behind = old.order[new.sample]
    absolute = old.absolute().take(source.clamp_min(0))
    found = []
    befores, afters = [old.form.layers[-1], *old.form.layers[:-1]], [new.form.layers[-1], *new.form.layers[:-1]]
    for tensor, before, after in zip([absolute.last, *absolute.inner], befores, afters, strict=True):
        size = max(int(before.index.max()), int(after.index.max())) + 1
        whole = torch.zeros(*tensor.shape[:2], size, dtype=tensor.dtype, device=tensor.device)
        there, here = before.index[behind], after.index[new.sample]
        whole.scatter_(2, there[:, None].expand_as(tensor), tensor * before.valid[behind][:, None])
        found.append(whole.gather(2, here[:, None].expand(-1, tensor.shape[1], -1)))
    return Multipliers(found[0], found[1:], absolute.log_lambda, absolute.split), source >= 0


def _proved(search: Search, form: Form, plain: SimpleBounds) -> Tensor:
    """The radii (N,) proved for every rival, all rounding errors included, for the multipliers as they are, in float64."""
    ball = search.ball
    offset, cost = plain.offset.clone(), plain.cost.clone()
    total = torch.zeros_like(cost)
    radius = plain.radius(ball)
    pieces = torch.arange(len(search.sample), device=ball.x.device).split(PAIRS) if len(search.sample) else ()
    for pairs in pieces:
        m = Multipliers.of([t[pairs].double() for t in search.multipliers])
        scales = search.scales.take(pairs)
        scales = Scales(scales.last.double(), [t.double() for t in scales.inner], scales.gradient.double())
        dual = Dual(search.instances(pairs, form), m, scales)
        at = (search.sample[pairs], search.rival[pairs])
        parts = proved_offset(dual) - plain.error[at], dual.split_cost() * (1 + 1e-12), dual.total_lambda() * (1 + 1e-12)
        found = radius_of(*parts, ball.radius[search.sample[pairs]])
        better = found > radius[at]
        radius[at] = torch.where(better, found, radius[at])
        for whole, new in zip((offset, cost, total), parts, strict=True):
            whole[at] = torch.where(better, new, whole[at])
    smallest = down(radius.amin(1) * (1 - 1e-9))
    step = smallest[:, None]
    feasible = plain.proved | (offset - (cost + total * step) * step * (1 + 1e-12) > 0)
    return torch.where(feasible.all(1), smallest, torch.zeros_like(smallest))


def _too_large(network: Network) -> str:
    rows = network.stages[0].weight.shape[1] + sum(s.weight.shape[0] for s in network.hidden[:-1])
    if rows > LARGEST_FORM:
        return f"its form has {rows} rows, above {LARGEST_FORM}"
    gradients = len(network.stages[-1].bias) * max(s.inputs for s in network.stages)
    return f"gradients of all its logits have {gradients} numbers a sample, above {RIVAL_ENTRIES // 4}" if gradients > RIVAL_ENTRIES // 4 else ""


def sdp_why_not(model: nn.Module, threat: Threat) -> str:
    """'' where 'sdp' applies (sizes are checked later), else one sentence with the reason."""
    assert isinstance(model, Chain)
    if why := why_not(model, threat):
        return why
    layers = [m for layer in model for m in layer.modules()]
    if names := [type(m).__name__ for m in layers if type(m) not in _RELU_LAYERS and not is_affine(m)]:
        return f"{names[0]} is no ReLU and no sorting of pairs, which is all that this method bounds"
    if not any(type(m) in _RELU_LAYERS for m in layers):
        return "the model has no hidden layer"
    return ""
