"""method='sdp': the Lagrange dual of the exact ReLU network on a ball, with all layers and the norm of the ball in one quadratic form.

The variables are v = (δ, h of the neurons that can cross 0, except in the last hidden layer). Every pre-activation is affine in v, z = Zv + z°, and
the margin is linear in the activations of the last hidden layer. Let [l, u] ∋ z be proved for every neuron. For any numbers c, κ, q (of any sign) and
λ ≥ 0,

    margin(x + δ) ≥ Σ_last [ c_n z_n + κ_n z_n² + min over [l, u] of (a_n relu(z) − c_n z − κ_n z²) ] + the neurons that cannot cross
                  − Σ_inner q_n(z_n, h_n) + Σ_inner min over z ∈ [l, u] of q_n(z, relu(z)) + λ(‖δ‖₂² − ε²)

on the ball, with q_n(z, h) = q₁z + q₂h + q₃z² + q₄h² + q₅zh: on the graph of ReLU each term is at most what it replaces. The right side is a
quadratic vᵀMv + 2bᵀv + c. Where M is positive definite, its minimum over ALL v is c − bᵀM⁻¹b, which is the bound. This is the dual of the
semidefinite relaxation (Raghunathan, Steinhardt & Liang 2018; Dathathri et al. 2020), restricted to the neurons that can cross, with interval
information in the minima. Unlike interval methods it uses ‖δ‖₂ and the correlation of neurons. ℓ∞ has Σλ_i(δ_i² − ε²). For ℓ1 (and any norm) a part s
of the first entries of b may be bounded by the dual norm, −ε‖s‖_*. As a function of ε the bound is A − ε‖s‖_* − Λε², so a set of multipliers gives
its radius in closed form. Any multipliers are sound. They start from a closed form that touches the graph of ReLU: for a_n < 0 and any μ > 0, relu(z)
≤ (z + μ)²/(4μ), with μ = max(|z°|, typical change of z). Adam with a log-barrier improves them. Its gradients need no factorisation beyond that of
the value: ∂(min f)/∂θ = ∂f(v*)/∂θ, and ∂logdet M/∂θ is estimated by quadratic forms at L⁻ᵀξ, ξ ~ N(0, I).

Rounding of the final value. For ANY matrix L and vector w, M = LLᵀ + E gives vᵀMv + 2bᵀv ≥ −‖w‖² − 2‖b − Lw‖‖v‖ − ‖E‖_F‖v‖². With L and w from a
Cholesky factorisation the last two terms are tiny, and ‖v‖ is bounded on the domain (‖δ‖₂ ≤ its ℓ2 radius, 0 ≤ h ≤ u). So neither the factorisation
nor the solver is trusted. The error of the coefficients is γ_K times the sum of the absolute values of the monomials that they belong to.
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
    """The neurons of one hidden layer that can cross 0, padded to k per sample: z = rows·v + clean in [low, high]; all (N, k), rows (N, k, d)."""

    index: Tensor
    valid: Tensor
    rows: Tensor
    clean: Tensor
    low: Tensor
    high: Tensor
    size: Tensor  # ≥ |z|, from absolute values of all terms, for rounding errors
    move: Tensor  # ε times the norm of the neuron's gradient at the clean point
    block: slice  # the positions of its h in v; empty for the last layer

    def take(self, i: Tensor) -> Layer:
        return replace(self, index=self.index[i], **{name: getattr(self, name)[i] for name in _NUMBERS})

    def to(self, dtype: torch.dtype) -> Layer:
        return replace(self, **{name: getattr(self, name).to(dtype) for name in _NUMBERS})

    @property
    def width(self) -> Tensor:
        return (self.high - self.low).clamp_min(1e-30)


@dataclass(frozen=True)
class Form:
    """The part of the Lagrangian that does not depend on the multipliers, for samples (N,) and all rivals (N, C)."""

    layers: tuple[Layer, ...]
    weights: Tensor  # a (N, C, k) of the last layer's neurons that can cross
    fixed: Tensor  # coefficients of v from neurons that cannot cross (N, C, d)
    constant: Tensor  # (N, C)
    absolute: Tensor  # (N, C): the sum of absolute values in `fixed`·v + constant
    gradient: Tensor  # of the margins at the clean point (N, C, n)
    norm_bound: Tensor  # ‖v‖₂ ≤ this (N,)
    operations: int
    variable_of: Tensor  # the number of the input or inner neuron of each entry of v (N, d)
    variables: int  # the number of inputs and inner neurons

    def to(self, dtype: torch.dtype) -> Form:
        layers = tuple(layer.to(dtype) for layer in self.layers)
        names = ("weights", "fixed", "constant", "absolute", "gradient", "norm_bound")
        return replace(self, layers=layers, **{name: getattr(self, name).to(dtype) for name in names})


def _selected(t: Tensor, index: Tensor) -> Tensor:
    return t.gather(1, index) if t.dim() == 2 else t.gather(1, index[..., None].expand(-1, -1, t.shape[-1]))


def form_of(network: Network, ball: Ball, boxes: Boxes, y: Tensor) -> Form:
    """The form of the network on the ball, with boxes of all neurons. Raises UnsupportedLayer for activations other than ReLU."""
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
    variable_of, variables = [torch.arange(inputs, device=x.device).expand(n, -1)], inputs
    for i, stage in enumerate(stages):
        low, high = boxes.low[i], boxes.high[i]
        size = torch.maximum(size @ stage.weight.abs().mT + stage.bias.abs(), torch.maximum(low.abs(), high.abs()))
        crossing = (low < 0) & (high > 0) & ~stage.linear
        active = ((low >= 0) | stage.linear) & ~crossing
        k = max(1, int(crossing.sum(-1).max()))
        # In the order of neurons, so that the result does not depend on the batch.
        index = crossing.int().argsort(dim=-1, descending=True, stable=True)[:, :k]
        valid = crossing.gather(1, index)
        last = i == len(stages) - 1
        move = torch.linalg.vector_norm(jacobian, dim=-1) * ball.l2_radius[:, None]
        r, *numbers = (_selected(t, index) * (valid if t.dim() == 2 else valid[..., None]) for t in (rows, centre, low, high, size, move))
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
        variable_of.append(variables + index)
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
    weights = _selected(a.mT, layers[-1].index).mT * layers[-1].valid[:, None]
    norm_bound = up(reach2).sqrt() * (1 + 1e-12)
    return Form(tuple(layers), weights, fixed, constant, absolute, gradient, norm_bound, operations, torch.cat(variable_of, 1), variables)



@dataclass(frozen=True)
class Instances:
    """Pairs (B,) of a sample and a rival, with the entries of `Form` that they need."""

    layers: tuple[Layer, ...]
    weights: Tensor  # (B, k)
    fixed: Tensor  # (B, d)
    constant: Tensor
    absolute: Tensor
    gradient: Tensor  # (B, n)
    norm_bound: Tensor
    radius: Tensor  # the ε of the boxes (B,)
    norm: str
    operations: int
    negative_weights: Tensor  # (B, k'), indices of neurons of the last layer with negative weight; only these have a κ
    negative_rows: Tensor  # their rows (B, k', d)

    @property
    def used_entries(self) -> Tensor:
        """The number of entries of v that are not padding (B,)."""
        return self.gradient.shape[-1] + sum((layer.valid.sum(-1) for layer in self.layers[:-1]), start=torch.zeros_like(self.constant))

    @classmethod
    def of(cls, form: Form, sample: Tensor, rival: Tensor, ball: Ball) -> Instances:
        weights, fixed, constant, absolute, gradient = (
            t[sample, rival] for t in (form.weights, form.fixed, form.constant, form.absolute, form.gradient)
        )
        radius = ball.radius[sample].to(form.norm_bound.dtype)
        layers = tuple(layer.take(sample) for layer in form.layers)
        negative = weights < 0
        negative_weights = negative.to(torch.uint8).topk(max(1, int(negative.sum(-1).max())), dim=-1).indices
        negative_rows = _selected(layers[-1].rows, negative_weights)
        return cls(
            layers, weights, fixed, constant, absolute, gradient, form.norm_bound[sample], radius, ball.norm, form.operations,
            negative_weights, negative_rows,
        )  # fmt: skip


@dataclass
class Multipliers:
    """Multipliers relative to the scales of their instance, all (B, …): last (2, k): c, κ; inner (5, k) per layer; log λ (1 or n); split (n)."""

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


def box_minimum(linear: Tensor, square: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The minimum of linear·z + square·z² over z ∈ [low, high], up to rounding."""
    ends = torch.minimum(low * (linear + square * low), high * (linear + square * high))
    safe = torch.where(square > 0, square, torch.ones_like(square))
    vertex = -linear / (2 * safe)
    inside = (square > 0) & (vertex > low) & (vertex < high)
    return torch.where(inside, torch.minimum(ends, -linear.square() / (4 * safe)), ends)


def minimum_on_relu(q: Tensor, layer: Layer) -> Tensor:
    """The minimum over z ∈ [l, u] of q₁z + q₂h + q₃z² + q₄h² + q₅zh at h = relu(z), for q (B, 5, k): (B, k)."""
    z, h, zz, hh, zh = q.unbind(1)
    zero = torch.zeros_like(z)
    return torch.minimum(box_minimum(z, zz, layer.low, zero), box_minimum(z + h, zz + hh + zh, zero, layer.high))


@dataclass(frozen=True)
class Scales:
    """The scales of multipliers: |a| of the last layer, the coefficient of each inner neuron, the gradient."""

    last: Tensor
    inner: list[Tensor]
    gradient: Tensor

    def take(self, i: Tensor) -> Scales:
        return Scales(self.last[i], [t[i] for t in self.inner], self.gradient[i])


class Dual:
    """The Lagrangian of instances for given multipliers."""

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
        """The linear and quadratic terms, without constants that do not depend on v, at points v (B, d, r): (B, r)."""
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
        value = (self.kappa.gather(1, self.it.negative_weights)[..., None] * (self.it.negative_rows @ v).square()).sum(1)
        for layer, q in zip(self.it.layers, self.q, strict=False):
            z, h = layer.rows @ v[:, : layer.rows.shape[-1]], v[:, layer.block]
            zz, hh, zh = (t[..., None] for t in q.unbind(1)[2:])
            value = value - (zz * z * z + hh * h * h + zh * z * h).sum(1)
        return value + (self.lam[..., None] * v[:, : self.split.shape[-1]].square()).sum(1)

    def minima(self) -> Tensor:
        """The sum of the minima over the boxes (B,)."""
        it, end = self.it, self.it.layers[-1]
        last = torch.stack([-self.c, it.weights, -self.kappa, torch.zeros_like(self.c), torch.zeros_like(self.c)], 1)
        total = minimum_on_relu(last, end).sum(-1)
        for layer, q in zip(it.layers, self.q, strict=False):
            total = total + minimum_on_relu(q, layer).sum(-1)
        return total

    def total_lambda(self) -> Tensor:
        """Λ (B,): the coefficient of −ε²."""
        return self.lam.sum(-1)

    def split_cost(self) -> Tensor:
        """‖s‖_* (B,)."""
        it = self.it
        return Ball(it.gradient, it.radius, it.norm).dual(self.split)

    def form(self) -> tuple[Tensor, Tensor, Tensor]:
        """(M (B, d, d), b (B, d), c (B,)): vᵀMv + 2bᵀv + c is `at`."""
        it, end = self.it, self.it.layers[-1]
        d, n = it.fixed.shape[-1], self.split.shape[-1]
        matrix = it.negative_rows.mT @ (self.kappa.gather(1, it.negative_weights)[..., None] * it.negative_rows)
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
    """A (B,), rounded down: the margin is at least A − ε‖s‖_* − Λε² on the ball of every ε up to that of the boxes; −inf where M is not definite."""
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
    slack = 8 * gamma(it.operations, U64) * (dual.absolute() + constant.abs() + length.square())
    slack = slack + 2 * rest * it.norm_bound + defect * it.norm_bound.square()
    value = dual.minima() + constant - length.square() - slack * (1 + 1e-9)
    return torch.where((failed == 0) & value.isfinite(), value, torch.full_like(value, -torch.inf))
