"""method='sdp': the Lagrange dual of the exact ReLU network on a ball, all layers and the ball's own norm in one quadratic form.

Variables v = (δ, h of the neurons that can cross 0, except in the last hidden layer); every pre-activation is affine in v, z = Zv + z°. The margin is
linear in the last layer's activations. For any numbers c, κ, q (of any sign) and λ ≥ 0, with [l, u] ∋ z proved for every neuron:

    margin(x + δ) ≥ Σ_last [ c_n z_n + κ_n z_n² + min over [l, u] of (a_n relu(z) − c_n z − κ_n z²) ] + the neurons that cannot cross
                  − Σ_inner q_n(z_n, h_n) + Σ_inner min over z ∈ [l, u] of q_n(z, relu(z)) + λ(‖δ‖₂² − ε²)

on the ball, q_n(z, h) = q₁z + q₂h + q₃z² + q₄h² + q₅zh: each bracket is at most what it replaces, on the graph of relu. The right side is a
quadratic vᵀMv + 2bᵀv + c, and where M is positive definite its minimum over ALL v is c − bᵀM⁻¹b: the bound. This is the dual of the
semidefinite relaxation (Raghunathan, Steinhardt & Liang 2018; Dathathri et al. 2020), cut to the neurons that can cross, with interval
information in the minima. It keeps ‖δ‖₂ and the correlation of neurons, which boxes forget. ℓ∞: Σλ_i(δ_i² − ε²). ℓ1 (and any norm): a part s of
b's first entries may go to the dual norm, −ε‖s‖_*. As a function of ε alone the bound is A − ε‖s‖_* − Λε², so one set of multipliers gives its radius
in closed form. Any multipliers are sound. They start from a closed form that touches relu's graph where the neuron is: for a_n < 0 and any μ > 0,
relu(z) ≤ (z + μ)²/(4μ), with μ = max(|z°|, its typical move); and are improved by Adam with a log-barrier, whose gradients cost no
factorisation but that of the value: ∂(min f)/∂θ = ∂f(v*)/∂θ, and ∂logdet M/∂θ is estimated by quadratic forms at L⁻ᵀξ, ξ ~ N(0, I).

Rounding of the final value. For ANY matrix L and vector w, M = LLᵀ + E gives vᵀMv + 2bᵀv ≥ −‖w‖² − 2‖b − Lw‖‖v‖ − ‖E‖_F‖v‖²; with L, w
from a Cholesky factorisation the last two are tiny, and ‖v‖ is bounded on the domain (‖δ‖₂ ≤ its reach, 0 ≤ h ≤ u). So neither the
factorisation nor the solver is trusted. Coefficients are off by γ_K of the sum of the absolute values of the monomials that they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustlip.domains.lines.crown import Ball, Boxes
from robustlip.domains.lines.dense import Network
from robustlip.errors import UnsupportedLayer
from robustlip.numerics.rounding import U64, gamma, up

_NUMBERS = ("valid", "rows", "clean", "low", "high", "size", "move")


@dataclass(frozen=True)
class Layer:
    """The neurons of one hidden layer that can cross 0, padded to k per sample. z = rows·v + clean on [low, high]; all (N, k), rows (N, k, d)."""

    index: Tensor
    valid: Tensor
    rows: Tensor
    clean: Tensor
    low: Tensor
    high: Tensor
    size: Tensor  # |z| term by term, for rounding
    move: Tensor  # ε times the norm of the neuron's gradient at the clean point
    block: slice  # where its h stand in v; empty for the last layer

    def take(self, i: Tensor) -> Layer:
        return replace(self, index=self.index[i], **{name: getattr(self, name)[i] for name in _NUMBERS})

    def to(self, dtype: torch.dtype) -> Layer:
        return replace(self, **{name: getattr(self, name).to(dtype) for name in _NUMBERS})

    @property
    def width(self) -> Tensor:
        return (self.high - self.low).clamp_min(1e-30)


@dataclass(frozen=True)
class Form:
    """What does not depend on multipliers, for samples (N,) and all rivals (N, C)."""

    layers: tuple[Layer, ...]
    weights: Tensor  # a (N, C, k) of the last layer's crossing neurons
    fixed: Tensor  # coefficients of v from neurons that cannot cross (N, C, d)
    constant: Tensor  # (N, C)
    absolute: Tensor  # (N, C): the sum of absolute values in `fixed`·v + constant
    gradient: Tensor  # of the margins at the clean point (N, C, n)
    reach: Tensor  # ‖v‖₂ ≤ this (N,)
    operations: int
    places: Tensor  # which of all inputs and inner neurons each entry of v is (N, d)
    variables: int  # how many inputs and inner neurons there are

    def to(self, dtype: torch.dtype) -> Form:
        layers = tuple(layer.to(dtype) for layer in self.layers)
        names = ("weights", "fixed", "constant", "absolute", "gradient", "reach")
        return replace(self, layers=layers, **{name: getattr(self, name).to(dtype) for name in names})


def _picked(t: Tensor, index: Tensor) -> Tensor:
    return t.gather(1, index) if t.dim() == 2 else t.gather(1, index[..., None].expand(-1, -1, t.shape[-1]))


def form_of(network: Network, ball: Ball, boxes: Boxes, y: Tensor) -> Form:
    """The network on the ball, whose neurons stay in the boxes."""
    if not network.piecewise_linear:
        raise UnsupportedLayer("expected a network whose activations are all ReLU, or sort pairs, got another; use method 'crown'")
    n, inputs = ball.x.shape
    x = ball.x
    clean = network.forward(x)
    size = x.abs() + ball.radius[:, None]
    stages = network.hidden
    rows = stages[0].weight.expand(n, -1, -1)
    jacobian = rows
    centre = clean[0]
    layers, edge, reach2 = [], inputs, ball.l2_radius.square()
    places, variables = [torch.arange(inputs, device=x.device).expand(n, -1)], inputs
    for i, stage in enumerate(stages):
        low, high = boxes.low[i], boxes.high[i]
        size = torch.maximum(size @ stage.weight.abs().mT + stage.bias.abs(), torch.maximum(low.abs(), high.abs()))
        crossing = (low < 0) & (high > 0) & ~stage.linear
        active = ((low >= 0) | stage.linear) & ~crossing
        k = max(1, int(crossing.sum(-1).max()))
        # By number of neuron, whatever else is in the batch.
        index = crossing.int().argsort(dim=-1, descending=True, stable=True)[:, :k]
        valid = crossing.gather(1, index)
        last = i == len(stages) - 1
        move = torch.linalg.vector_norm(jacobian, dim=-1) * ball.l2_radius[:, None]
        r, *numbers = (_picked(t, index) * (valid if t.dim() == 2 else valid[..., None]) for t in (rows, centre, low, high, size, move))
        block = slice(edge, edge if last else edge + k)
        layers.append(Layer(index, valid.double(), r, numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], block))
        if last:
            break
        following = stages[i + 1]
        kept = active.double()
        reach2 = reach2 + (high.clamp_min(0.0) * crossing).square().sum(-1)
        rows = torch.cat([following.weight @ (kept[..., None] * rows), following.weight.mT[index].mT * valid[:, None]], -1)
        centre = (kept * centre) @ following.weight.mT + following.bias
        jacobian = following.weight @ (((clean[i] > 0) | stage.linear).double()[..., None] * jacobian)
        size = torch.where(active, size, high.clamp_min(0.0) * crossing)
        edge += k
        places.append(variables + index)
        variables += len(stage.bias)
    head = network.stages[-1]
    a = head.weight[y][:, None] - head.weight
    kept = active.double()
    fixed = (a * kept[:, None]) @ rows
    constant = ((a * kept[:, None]) @ centre[..., None])[..., 0] + head.bias[y][:, None] - head.bias
    absolute = ((a.abs() * kept[:, None]) @ size[..., None])[..., 0] + head.bias[y].abs()[:, None] + head.bias.abs()
    slope = ((clean[-2] > 0) | stages[-1].linear).double()
    gradient = (a * slope[:, None]) @ jacobian
    operations = sum(sum(s.weight.shape) + 8 for s in network.stages) + edge + 64
    weights = _picked(a.mT, layers[-1].index).mT * layers[-1].valid[:, None]
    reach = up(reach2).sqrt() * (1 + 1e-12)
    return Form(tuple(layers), weights, fixed, constant, absolute, gradient, reach, operations, torch.cat(places, 1), variables)



@dataclass(frozen=True)
class Instances:
    """Pairs of a sample and a rival (B,), each with everything of `Form` that it needs."""

    layers: tuple[Layer, ...]
    weights: Tensor  # (B, k)
    fixed: Tensor  # (B, d)
    constant: Tensor
    absolute: Tensor
    gradient: Tensor  # (B, n)
    reach: Tensor
    radius: Tensor  # the boxes' ε (B,)
    norm: str
    operations: int
    hurts: Tensor  # (B, k') places of the last layer's neurons of negative weight, the only ones with a κ; and their rows (B, k', d)
    bent: Tensor

    @property
    def moving(self) -> Tensor:
        """How many entries of v stand for something (B,): the padding depends on the batch."""
        return self.gradient.shape[-1] + sum((layer.valid.sum(-1) for layer in self.layers[:-1]), start=torch.zeros_like(self.constant))

    @classmethod
    def of(cls, form: Form, sample: Tensor, rival: Tensor, ball: Ball) -> Instances:
        weights, fixed, constant, absolute, gradient = (
            t[sample, rival] for t in (form.weights, form.fixed, form.constant, form.absolute, form.gradient)
        )
        radius = ball.radius[sample].to(form.reach.dtype)
        layers = tuple(layer.take(sample) for layer in form.layers)
        negative = weights < 0
        hurts = negative.to(torch.uint8).topk(max(1, int(negative.sum(-1).max())), dim=-1).indices
        bent = _picked(layers[-1].rows, hurts)
        return cls(
            layers, weights, fixed, constant, absolute, gradient, form.reach[sample], radius, ball.norm, form.operations, hurts, bent
        )  # fmt: skip


@dataclass
class Multipliers:
    """Relative to the scale of their instance, all (B, …): last (2, k): c, κ; inner (5, k) per layer; log λ (1 or n); split (n)."""

    last: Tensor
    inner: list[Tensor]
    log_lambda: Tensor
    split: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.last, *self.inner, self.log_lambda, self.split]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Multipliers:
        return cls(tensors[0], tensors[1:-2], tensors[-2], tensors[-1])

    def take(self, i: Tensor) -> Multipliers:
        return Multipliers.of([t[i] for t in self.tensors()])


def lowest(linear: Tensor, square: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """min of linear·z + square·z² over z ∈ [low, high], up to rounding."""
    ends = torch.minimum(low * (linear + square * low), high * (linear + square * high))
    safe = torch.where(square > 0, square, torch.ones_like(square))
    vertex = -linear / (2 * safe)
    inside = (square > 0) & (vertex > low) & (vertex < high)
    return torch.where(inside, torch.minimum(ends, -linear.square() / (4 * safe)), ends)


def lowest_on_relu(q: Tensor, layer: Layer) -> Tensor:
    """min over z ∈ [l, u] of q₁z + q₂h + q₃z² + q₄h² + q₅zh at h = relu(z); q (B, 5, k) → (B, k)."""
    z, h, zz, hh, zh = q.unbind(1)
    zero = torch.zeros_like(z)
    return torch.minimum(lowest(z, zz, layer.low, zero), lowest(z + h, zz + hh + zh, zero, layer.high))


@dataclass(frozen=True)
class Scales:
    """What multipliers are relative to: |a| of the last layer, the pull on each inner neuron, the gradient."""

    last: Tensor
    inner: list[Tensor]
    gradient: Tensor

    def take(self, i: Tensor) -> Scales:
        return Scales(self.last[i], [t[i] for t in self.inner], self.gradient[i])


class Dual:
    """The Lagrangian of instances at multipliers."""

    def __init__(self, it: Instances, m: Multipliers, scales: Scales) -> None:
        self.it = it
        end = it.layers[-1]
        self.c, kappa = (m.last * (scales.last * end.valid)[:, None]).unbind(1)
        self.kappa = kappa / end.width * (it.weights < 0)
        self.q = []
        for layer, q, scale in zip(it.layers, m.inner, scales.inner, strict=False):
            unit = (scale * layer.valid)[:, None] / torch.stack([torch.ones_like(layer.width)] * 2 + [layer.width] * 3, 1)
            self.q.append(q * unit)
        self.lam = m.log_lambda.exp() * scales.gradient
        self.split = m.split * scales.gradient

    def at(self, v: Tensor) -> Tensor:
        """The quadratic part's value, without constants that do not depend on v, at points v (B, d, r) → (B, r): linear and quadratic terms."""
        it, end = self.it, self.it.layers[-1]
        z = end.rows @ v + end.clean[..., None]
        value = ((self.c[..., None] + self.kappa[..., None] * z) * z).sum(1) + (it.fixed[..., None] * v).sum(1) + it.constant[:, None]
        for layer, q in zip(it.layers, self.q, strict=False):
            z = layer.rows @ v[:, : layer.rows.shape[-1]] + layer.clean[..., None]
            h = v[:, layer.block]
            a, b, zz, hh, zh = (t[..., None] for t in q.unbind(1))
            value = value - (a * z + b * h + zz * z * z + hh * h * h + zh * z * h).sum(1)
        delta = v[:, : self.split.shape[-1]]
        return value + (self.lam[..., None] * delta * delta).sum(1) - (self.split[..., None] * delta).sum(1)

    def curvature(self, v: Tensor) -> Tensor:
        """vᵀMv for each column of v (B, d, r) → (B, r)."""
        value = (self.kappa.gather(1, self.it.hurts)[..., None] * (self.it.bent @ v).square()).sum(1)
        for layer, q in zip(self.it.layers, self.q, strict=False):
            z, h = layer.rows @ v[:, : layer.rows.shape[-1]], v[:, layer.block]
            zz, hh, zh = (t[..., None] for t in q.unbind(1)[2:])
            value = value - (zz * z * z + hh * h * h + zh * z * h).sum(1)
        return value + (self.lam[..., None] * v[:, : self.split.shape[-1]].square()).sum(1)

    def minima(self) -> Tensor:
        """The sum of the minima over boxes (B,)."""
        it, end = self.it, self.it.layers[-1]
        last = torch.stack([-self.c, it.weights, -self.kappa, torch.zeros_like(self.c), torch.zeros_like(self.c)], 1)
        total = lowest_on_relu(last, end).sum(-1)
        for layer, q in zip(it.layers, self.q, strict=False):
            total = total + lowest_on_relu(q, layer).sum(-1)
        return total

    def total_lambda(self) -> Tensor:
        """Λ: what ε² is multiplied by."""
        return self.lam.sum(-1)

    def split_cost(self) -> Tensor:
        """‖s‖_* (B,)."""
        it = self.it
        return Ball(it.gradient, it.radius, it.norm).dual(self.split)

    def form(self) -> tuple[Tensor, Tensor, Tensor]:
        """(M (B, d, d), b (B, d), c (B,)): vᵀMv + 2bᵀv + c is `at`."""
        it, end = self.it, self.it.layers[-1]
        d, n = it.fixed.shape[-1], self.split.shape[-1]
        matrix = it.bent.mT @ (self.kappa.gather(1, it.hurts)[..., None] * it.bent)
        linear = it.fixed + ((self.c + 2 * self.kappa * end.clean)[:, None] @ end.rows)[:, 0]
        constant = it.constant + ((self.c + self.kappa * end.clean) * end.clean).sum(-1)
        diagonal = torch.zeros_like(linear)
        diagonal[:, :n] = self.lam
        linear = linear - torch.nn.functional.pad(self.split, (0, d - n))
        for layer, q in zip(it.layers, self.q, strict=False):
            a, b, zz, hh, zh = q.unbind(1)
            e = layer.rows.shape[-1]
            matrix[:, :e, :e] -= layer.rows.mT @ (zz[..., None] * layer.rows)
            cross = (zh[..., None] * layer.rows).mT / 2
            matrix[:, :e, layer.block] -= cross
            matrix[:, layer.block, :e] -= cross.mT
            diagonal[:, layer.block] = -hh + (1 - layer.valid)
            linear[:, :e] -= ((a + 2 * zz * layer.clean)[:, None] @ layer.rows)[:, 0]
            linear[:, layer.block] -= b + zh * layer.clean
            constant = constant - ((a + zz * layer.clean) * layer.clean).sum(-1)
        matrix.diagonal(dim1=-2, dim2=-1).add_(diagonal)
        return matrix, linear / 2, constant

    def absolute(self) -> Tensor:
        """The sum of the absolute values of all monomials on the domain (B,)."""
        it, end = self.it, self.it.layers[-1]
        size = end.size
        total = it.absolute + ((self.c.abs() + 2 * it.weights.abs() + self.kappa.abs() * size) * size).sum(-1)
        for layer, q in zip(it.layers, self.q, strict=False):
            a, b, zz, hh, zh = q.abs().unbind(1)
            size = layer.size
            total = total + (((a + b) + (zz + hh + zh) * size) * size).sum(-1)
        return total + (self.lam.sum(-1) * it.radius + self.split.abs().sum(-1)) * it.radius


def radius_of(offset: Tensor, cost: Tensor, total: Tensor, limit: Tensor) -> Tensor:
    """The largest ε ≤ limit with offset − cost·ε − total·ε² ≥ 0, up to rounding; 0 where there is none."""
    root = (cost.square() + 4 * total * offset.clamp_min(0.0)).sqrt()
    return torch.where(offset > 0, torch.minimum(2 * offset / (cost + root).clamp_min(1e-30), limit), torch.zeros_like(offset))


def proved_offset(dual: Dual) -> Tensor:
    """A (B,), rounded down: the margin is at least A − ε‖s‖_* − Λε² on the ball of each ε up to the boxes'; −inf where M is not definite."""
    it = dual.it
    matrix, linear, constant = dual.form()
    matrix = matrix.tril() + matrix.tril(-1).mT
    factor, failed = torch.linalg.cholesky_ex(matrix)
    half = torch.linalg.solve_triangular(factor, linear[..., None], upper=False)
    d = matrix.shape[-1]
    loss = gamma(d + 8, U64)
    size2 = factor.square().sum((-2, -1)) * (1 + gamma(d * d + 2, U64))
    defect = torch.linalg.matrix_norm(matrix - factor @ factor.mT) * (1 + gamma(d * d + 2, U64))
    defect = defect + 2 * loss * (size2 + torch.linalg.matrix_norm(matrix))
    rest = torch.linalg.vector_norm(linear[..., None] - factor @ half, dim=(-2, -1)) * (1 + loss)
    length = torch.linalg.vector_norm(half, dim=(-2, -1)) * (1 + loss)
    rest = rest + 2 * loss * (torch.linalg.vector_norm(linear, dim=-1) + size2.sqrt() * length)
    slack = 8 * gamma(it.operations, U64) * (dual.absolute() + constant.abs() + length.square()) + 2 * rest * it.reach + defect * it.reach.square()
    value = dual.minima() + constant - length.square() - slack * (1 + 1e-9)
    return torch.where((failed == 0) & value.isfinite(), value, torch.full_like(value, -torch.inf))
