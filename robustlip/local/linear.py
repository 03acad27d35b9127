"""Linear layers, and Linear followed by an elementwise function, expanded as one.

Together they are tighter than one after the other. Behind z = Wx + b each neuron moves by at most ‖w_n‖·r + e (e: rounding) and all of them together
by σ(W)·r + e, so slopes hold on intervals, and with −κ⁻_n ≤ f'' ≤ κ⁺_n on them the remainder of the function meets its adjoint ω as
    −Σ_n ω_n R_n ≤ ½ Σ_n c_n Δz_n² ≤ ½ min(max_n c_n·‖Δz‖², Σ_n c_n|Δz_n|², (√λ·r + √max c·e)²),   λ ≥ λ_max(Wᵀdiag(c)W),
c_n = κ⁺_n max(−ω_n, 0) + κ⁻_n max(ω_n, 0). See robustlip.local.base.Curved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.errors import UnsupportedLayer
from robustlip.layers import ScaledGELU
from robustlip.local.base import ADJOINT_SLACK, Curved, Expansion, Pair, Scope, register, rows_of, token_norms
from robustlip.rounding import norm_up, up
from robustlip.rules import Context
from robustlip.rules.elementwise import FUNCTION_ULPS, GELU_SLOPE, SILU_SLOPE
from robustlip.rules.linear import Matrix
from robustlip.spectral import infinity_to_two_bound, one_to_two_bound, quartic_bound, spectral_norm_quick


@dataclass(frozen=True)
class LinearConstants:
    """Norms of one weight matrix (fan_out, fan_in), rounded up. rows: (fan_out,) dual norms of its rows for a change in `space`."""

    weight: Tensor
    bias: Tensor | None
    matrix: Matrix
    gain: float
    rows: Tensor
    bias_norm: float
    quartic: float | None

    @classmethod
    def of(cls, layer: nn.Linear, space: str) -> LinearConstants:
        weight = layer.weight.detach().double()
        matrix = Matrix.of(layer.weight)
        if space == "linf":
            gain, rows = float(infinity_to_two_bound(weight)), up(weight.abs().sum(-1) * (1 + 1e-12))
        elif space == "l1":
            gain, rows = float(one_to_two_bound(weight)), weight.abs().amax(-1)
        else:
            gain, rows = matrix.sigma, norm_up(weight)
        bias = None if layer.bias is None else layer.bias.detach().double()
        quartic = quartic_bound(weight) if space == "l2" else None
        return cls(weight, bias, matrix, gain, rows, 0.0 if bias is None else float(norm_up(bias, 0)), quartic)

    def rounding(self, norm: Tensor, perturbed: Tensor | float, context: Context) -> Tensor:
        """‖executed − exact‖ of (W + E)x + b for executed ‖x‖ ≤ norm, ‖E‖ ≤ perturbed; as rules.linear.LinearRule."""
        fresh = self.matrix.rounding(norm, perturbed, context)
        if self.bias is not None:
            fresh = fresh + 2 * context.unit * ((self.matrix.sigma + perturbed) * norm + self.bias_norm + fresh)
        return fresh


def weight_change(scope: Scope, sigma: float) -> Tensor | float:
    """‖E‖ of one matrix, of shape (…, N, 1) where it is not 0: radii by token broadcast against it."""
    change = scope.context.weight_change(sigma)
    return change.unsqueeze(-1) if isinstance(change, Tensor) else change


class _Affine(Expansion):
    """z = Wx + b by token."""

    by_token = ("clean", "norm")

    def __init__(self, layer: nn.Linear, clean: Tensor, scope: Scope) -> None:
        self.scope = scope
        self.constants: LinearConstants = scope.context.constant(layer, f"local-{scope.space}", lambda: LinearConstants.of(layer, scope.space))
        self.norm = norm_up(clean)
        self.clean = F.linear(clean, self.constants.weight, self.constants.bias)
        self._space_factor = math.sqrt(clean.shape[-1]) * (1 + 1e-15) if scope.space == "linf" else 1.0

    def lipschitz(self) -> Tensor | float:
        return self.constants.matrix.sigma

    def parts(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """(σ(W)·r, everything else) (…, N, T): the change of z is at most their sum. The first is WΔx, the second rounding and weight changes."""
        c = self.constants
        perturbed = weight_change(self.scope, c.matrix.sigma)
        norm = self.norm + self._space_factor * radius
        fresh = self.scope.both(lambda context: c.rounding(norm, perturbed, context)) + perturbed * norm
        largest = (c.matrix.frobenius + math.sqrt(min(c.weight.shape)) * perturbed) * norm + c.bias_norm
        return up(c.gain * radius), self.scope.fits(up(fresh), largest)


@register(nn.Embedding)
class EmbeddingExpansion(Expansion):
    """A row of the table for each token id (N, T): only weight changes move it, by at most ‖E‖₂."""

    def __init__(self, layer: nn.Embedding, ids: Tensor, scope: Scope) -> None:
        if layer.max_norm is not None:
            raise UnsupportedLayer("expected Embedding without max_norm, got one that rewrites its weights in forward; rescale the rows once")
        self.scope = scope
        self.matrix: Matrix = scope.context.constant(layer, "matrix", lambda: Matrix.of(layer.weight))
        self.clean = layer.weight.detach().double()[ids]

    def advance(self, radius: Tensor, error: Tensor, bounds: list[Pair] | None) -> tuple[Tensor, Tensor]:
        moved = torch.zeros_like(radius) + weight_change(self.scope, self.matrix.sigma)
        return up(moved), moved

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Pair]]:
        return g.new_zeros(*g.shape[:-1], 1), []


@register(nn.Linear)
class LinearExpansion(_Affine):
    """Linear alone."""

    def advance(self, radius: Tensor, error: Tensor, bounds: list[Pair] | None) -> tuple[Tensor, Tensor]:
        moved, fresh = self.parts(radius)
        if bounds is not None:
            bounds += [fresh, radius.amax(-1, keepdim=True)]
        return moved + fresh, up(self.constants.matrix.sigma * error) + fresh

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Pair]]:
        norms = token_norms(g)
        slack = ADJOINT_SLACK * self.constants.gain * norms.sum(-1, keepdim=True)
        return g @ self.constants.weight, [norms, slack]


@dataclass(frozen=True)
class Elementwise:
    """A function f of single numbers at reference values z: first derivative there, bounds of the rest.

    value, slope: f(z), f'(z). steepest: sup|f'|. curvature: sup|f''|, or None for ReLU, which has none. ulps, absolute: |fl(f(z)) − f(z)| ≤
    ulps·u·|z|·scale + absolute (with u the unit and `tiny` added by the caller).
    """

    value: Tensor
    slope: Tensor
    steepest: float
    curvature: float | None
    ulps: float
    offset: float = 0.0


_SQRT_2PI = math.sqrt(2 * math.pi)
_GELU_THIRD = 0.7787700  # sup of the size of gelu's third derivative, φ(z)·z(z² − 4)


def _gelu_slope(z: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        c, k = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(c * (z + k * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * k * z * z)
    return torch.special.ndtr(z) + z * torch.exp(-0.5 * z * z) / _SQRT_2PI


def elementwise(layer: nn.Module, z: Tensor) -> Elementwise:
    """The function of an elementwise layer at z (float64). tests/test_local.py finds every supremum anew in 50 digits."""
    if isinstance(layer, nn.ReLU):
        return Elementwise(torch.relu(z), (z > 0).to(z.dtype), 1.0, None, 0.0)
    if isinstance(layer, (nn.GELU, ScaledGELU)):
        divisor = layer.divisor if isinstance(layer, ScaledGELU) else 1.0
        value = F.gelu(z, approximate=layer.approximate) / divisor
        steepest, curvature = GELU_SLOPE[layer.approximate] / divisor, 0.7978846 / divisor
        return Elementwise(value, _gelu_slope(z, layer.approximate) / divisor, steepest, curvature, (FUNCTION_ULPS + 2) / divisor)
    if isinstance(layer, nn.Tanh):
        value = torch.tanh(z)
        return Elementwise(value, 1 - value * value, 1.0, 0.7698004, FUNCTION_ULPS)
    if isinstance(layer, nn.Sigmoid):
        value = torch.sigmoid(z)
        return Elementwise(value, value * (1 - value), 0.25, 0.0962251, FUNCTION_ULPS, FUNCTION_ULPS)
    assert isinstance(layer, nn.SiLU)
    s = torch.sigmoid(z)
    return Elementwise(z * s, s * (1 + z * (1 - s)), SILU_SLOPE, 0.5000001, FUNCTION_ULPS + 2)


ELEMENTWISE = (nn.ReLU, nn.GELU, ScaledGELU, nn.Tanh, nn.Sigmoid, nn.SiLU)


class ElementwiseExpansion(Expansion):
    """f(z) for z = Wx + b, or for z = x when there is no Linear in front (`affine` None: every number moves by at most the token's ℓ2 radius)."""

    by_token = ("clean", "z_norm", "slope", "distance")
    # (‖w_nM‖ (N, n), ‖WM‖ (N,), before) and with ε and ‖E‖ in front, once `learn_way` and `given` have told.
    _shape: tuple[Tensor, Tensor, Tensor] | None = None
    way: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None

    def __init__(self, layer: nn.Module, clean: Tensor, scope: Scope, linear: nn.Linear | None = None) -> None:
        self.scope, self.layer, self.whole = scope, layer, None if linear is not None else scope.whole
        self.affine = None if linear is None else _Affine(linear, clean, scope)
        z = clean if self.affine is None else self.affine.clean
        self.f = elementwise(layer, z)
        self.clean, self.z_norm = self.f.value, norm_up(z)
        # f' as float64 gives it is off by a few units of a number near 1.
        self.slope = self.f.slope.abs() + 2.0**-45
        self.distance = z.abs()

    @property
    def shaped(self) -> bool:
        return True

    def forget(self) -> None:
        self.way = None

    def learn_way(self, m: Tensor, before: Tensor) -> None:
        if self.affine is not None:
            z = self.affine.constants.weight @ m  # (N, n, D₀)
            lost = 2.0**-34 * torch.linalg.matrix_norm(self.affine.constants.weight) * torch.linalg.matrix_norm(m)
            self._shape = (up(norm_up(z) + lost.unsqueeze(-1)), up(spectral_norm_quick(z) + lost), before)

    def given(self, epsilon: Tensor, beyond: Tensor) -> None:
        if self._shape is not None:
            rows, gain, before = self._shape
            self.way = (epsilon, beyond, rows, gain, before)

    def _curvatures(self, each: Tensor) -> tuple[Tensor, Tensor]:
        """(κ⁺, κ⁻) (…, N, T, n) with −½κ⁻Δ² ≤ f(z + Δ) − f(z) − f'(z)Δ ≤ ½κ⁺Δ² for |Δ| ≤ each.

        The middle is ∫(1 − τ)f''(z + τΔ)dτ·Δ², so f'' may be taken where it is largest on the interval, or at z with a third of the largest third
        derivative times `each` more. gelu'' = φ(z)(2 − z²) is even: it falls from z = 0 on, is 0 at √2, lowest at 2 with −0.107982, then rises to 0.
        """
        assert self.f.curvature is not None
        top = self.f.curvature
        if getattr(self.layer, "approximate", "tanh") != "none":
            return torch.full_like(each, top), torch.full_like(each, top)

        def at(z: Tensor) -> Tensor:
            return torch.exp(-0.5 * z.square()) / _SQRT_2PI * (2 - z.square())

        def sized(kappa: Tensor) -> Tensor:
            return (kappa.clamp_min(0.0) * (top / 0.7978846 * (1 + 1e-7)) + 1e-15 * max(1.0, top)).clamp_max(top)

        reach = each * (1 + 1e-12)
        near, far = (self.distance - reach).clamp_min(0.0), self.distance + reach
        lowest = torch.where(near > 2, -at(near), torch.where(far < 2, -at(far), torch.full_like(far, 0.107982)))
        here, drift = at(self.distance), _GELU_THIRD / 3 * reach
        return sized(torch.minimum(at(near), here + drift)), sized(torch.minimum(lowest, drift - here))

    def _rounding(self, norm: Tensor) -> Tensor:
        """‖fl(f(z)) − f(z)‖ for executed ‖z‖ ≤ norm."""
        root = math.sqrt(self.clean.shape[-1]) * (1 + 1e-15)

        def one(context: Context) -> Tensor:
            # exp(−x) may overflow to give 0 where the truth is below |x|/max; the tanh form cubes its argument.
            lost = root * context.tiny * (2 + norm) + (root + norm) / torch.finfo(context.dtype).max * 4
            lost = lost * (1 + 1 / getattr(self.layer, "divisor", 1.0))  # what vanished is divided too
            if self.f.ulps == 0.0:
                return torch.zeros_like(norm) + root * context.flushed
            return self.f.ulps * context.unit * norm + self.f.offset * context.unit * root + lost

        cube = norm**3 if getattr(self.layer, "approximate", "") == "tanh" else norm
        return self.scope.divided(self.scope.fits(up(self.scope.both(one)), cube), getattr(self.layer, "divisor", 1.0))

    def lipschitz(self) -> Tensor | float:
        return self.f.steepest * (1.0 if self.affine is None else self.affine.constants.matrix.sigma)

    def at_rows(self, sample: Tensor, position: Tensor) -> Expansion:
        part = super().at_rows(sample, position)
        assert isinstance(part, ElementwiseExpansion)
        part.affine = None if self.affine is None else self.affine.at_rows(sample, position)  # type: ignore[assignment]
        part.f = replace(self.f, value=part.clean, slope=rows_of(self.f.slope, sample, position))
        return part

    def advance(self, radius: Tensor, error: Tensor, bounds: list[Pair] | None) -> tuple[Tensor, Tensor]:
        if self.affine is None:
            moved, fresh, rows = radius, torch.zeros_like(radius), torch.ones(1, dtype=radius.dtype, device=radius.device)
        else:
            moved, fresh = self.affine.parts(radius)
            rows = self.affine.constants.rows
        each = rows * radius.unsqueeze(-1) * (1 + 1e-12)
        if self.way is not None and self.affine is not None:
            epsilon, beyond, way_rows, way_gain, before = self.way
            stray = before.unsqueeze(-1) * beyond + error
            each = torch.minimum(each, up(way_rows.unsqueeze(-2) * epsilon.unsqueeze(-1) + rows * stray.unsqueeze(-1)))
            moved = torch.minimum(moved, up(way_gain.unsqueeze(-1) * epsilon + self.affine.constants.gain * stray))
        whole = moved + fresh
        # Neuron by neuron, (…, N, T, n).
        each = torch.minimum(each + fresh.unsqueeze(-1), whole.unsqueeze(-1))
        if self.f.curvature is None:
            slope = ((self.f.slope > 0) | (each >= self.distance)).to(each.dtype)
        else:
            slope = (self.slope + self.f.curvature * each).clamp_max(self.f.steepest)
        behind = torch.minimum(slope.amax(-1) * whole, norm_up(slope * each))
        rounding = self._rounding(self.z_norm + whole)
        behind = up(behind * (1 + 1e-12)) + rounding
        if bounds is None:
            return behind, error
        curved = self._bend(radius, each, whole, fresh, bounds)
        bounds += [fresh, rounding, radius.amax(-1, keepdim=True)]
        steepest = self.slope.amax(-1)
        sigma = 1.0 if self.affine is None else self.affine.constants.matrix.sigma
        return behind, up((steepest * (sigma * error + fresh) + curved) * (1 + 1e-12)) + rounding

    def _bend(self, radius: Tensor, each: Tensor, whole: Tensor, fresh: Tensor, bounds: list[Pair]) -> Tensor:
        """The norm of f(z + Δz) − f(z) − f'(z)∘Δz (…, N, T), its bounds by neuron appended. each, whole: of Δz; fresh: of what is not WΔx."""
        if self.f.curvature is None:
            crossing = (each - self.distance).clamp_min(0.0)
            bounds.append(crossing.flatten(-2))
            return norm_up(crossing)
        convex, concave = self._curvatures(each)
        matrix = self.affine.constants.weight if self.affine is not None and self.scope.space == "l2" else None
        bounds.append(Curved(convex, concave, each, whole, matrix, radius, fresh))
        kappa = torch.maximum(convex, concave)
        curved = 0.5 * torch.minimum((kappa * each).amax(-1) * whole, norm_up(kappa * each.square()))
        if self.affine is not None and self.affine.constants.quartic is not None:
            # ‖Δz∘Δz‖ of Δz = WΔx + e, e no longer than `fresh`.
            squares = self.affine.constants.quartic * radius.square() + fresh * (2 * whole + fresh)
            curved = torch.minimum(curved, 0.5 * kappa.amax(-1) * squares)
        return curved

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Pair]]:
        size = g.abs()
        inner = g * self.f.slope
        norms, inner_norms = token_norms(g), token_norms(inner)
        gain = self.f.steepest if self.affine is None else self.f.steepest * self.affine.constants.gain
        tail: list[Pair] = [inner_norms, norms, ADJOINT_SLACK * gain * norms.sum(-1, keepdim=True)]
        if self.f.curvature is None:
            # relu is convex, so what it adds to its tangent is never negative: only a negative adjoint lets it lower the margin.
            weights: list[Pair] = [(size if two_sided else (-g).clamp_min(0.0)).flatten(-2), *tail]
        else:
            weights = [Curved(size, size) if two_sided else Curved((size - g) / 2, (size + g) / 2), *tail]
        return inner if self.affine is None else inner @ self.affine.constants.weight, weights


@register(*ELEMENTWISE)
def _elementwise_alone(layer: nn.Module, clean: Tensor, scope: Scope) -> Expansion:
    return ElementwiseExpansion(layer, clean, scope)
