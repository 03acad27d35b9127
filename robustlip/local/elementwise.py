"""Elementwise functions, with the Linear layer in front of them or alone.

Slopes hold on the intervals that neurons can reach, and with −κ⁻_n ≤ f'' ≤ κ⁺_n on them the remainder of the function meets its adjoint ω as
    −Σ_n ω_n R_n ≤ ½ Σ_n c_n Δz_n² ≤ ½ min(max_n c_n·‖Δz‖², Σ_n c_n|Δz_n|², (√λ·r + √max c·e)²),   λ ≥ λ_max(Wᵀdiag(c)W),
c_n = κ⁺_n max(−ω_n, 0) + κ⁻_n max(ω_n, 0). See robustlip.local.base.Curved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.errors import UnsupportedLayer
from robustlip.layers import ScaledGELU
from robustlip.local.base import ADJOINT_SLACK, Curved, Expansion, Pair, Scope, register, rows_of, token_norms
from robustlip.local.neurons import Neurons
from robustlip.rounding import norm_up, up
from robustlip.rules import Context
from robustlip.rules.elementwise import FUNCTION_ULPS, GELU_SLOPE, SILU_SLOPE


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
    kind = type(layer)
    if kind is nn.ReLU:
        return Elementwise(torch.relu(z), (z > 0).to(z.dtype), 1.0, None, 0.0)
    if isinstance(layer, (nn.GELU, ScaledGELU)) and kind in (nn.GELU, ScaledGELU):
        divisor = layer.divisor if isinstance(layer, ScaledGELU) else 1.0
        value = F.gelu(z, approximate=layer.approximate) / divisor
        steepest, curvature = GELU_SLOPE[layer.approximate] / divisor, 0.7978846 / divisor
        return Elementwise(value, _gelu_slope(z, layer.approximate) / divisor, steepest, curvature, (FUNCTION_ULPS + 2) / divisor)
    if kind is nn.Tanh:
        value = torch.tanh(z)
        return Elementwise(value, 1 - value * value, 1.0, 0.7698004, FUNCTION_ULPS)
    if kind is nn.Sigmoid:
        value = torch.sigmoid(z)
        return Elementwise(value, value * (1 - value), 0.25, 0.0962251, FUNCTION_ULPS, FUNCTION_ULPS)
    if kind is nn.SiLU:
        s = torch.sigmoid(z)
        return Elementwise(z * s, s * (1 + z * (1 - s)), SILU_SLOPE, 0.5000001, FUNCTION_ULPS + 2)
    raise UnsupportedLayer(f"expected an elementwise layer with proved derivatives, got {kind.__name__}; use method='global', or add an expansion")


ELEMENTWISE = (nn.ReLU, nn.GELU, ScaledGELU, nn.Tanh, nn.Sigmoid, nn.SiLU)


class ElementwiseExpansion(Neurons):
    """f(z) for z = Wx + b, or for z = x when there is no Linear in front (every number moves by at most the token's ℓ2 radius)."""

    by_token = (*Neurons.by_token, "slope")

    def __init__(self, layer: nn.Module, clean: Tensor, scope: Scope, linear: nn.Linear | None = None) -> None:
        super().__init__(layer, clean, scope, linear)
        self.reading = None if self.affine is None else self.affine.constants.weight
        self.rows = torch.ones(1, dtype=clean.dtype, device=clean.device) if self.affine is None else self.affine.constants.rows
        z = self.clean
        self.f = elementwise(layer, z)
        self.clean = self.f.value
        # f' as float64 gives it is off by a few units of a number near 1.
        self.slope = self.f.slope.abs() + 2.0**-45
        self.distance = z.abs()

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

        divisor = getattr(self.layer, "divisor", 1.0)
        cube = norm**3 if getattr(self.layer, "approximate", "") == "tanh" else norm
        return self.scope.divided(self.scope.fits(up(self.scope.both(one)), torch.maximum(cube, norm / abs(divisor))), divisor)

    def lipschitz(self) -> Tensor | float:
        return self.f.steepest * self.sigma

    def at_rows(self, sample: Tensor, position: Tensor) -> Self:
        part = super().at_rows(sample, position)
        part.f = replace(self.f, value=part.clean, slope=rows_of(self.f.slope, sample, position))
        return part

    def advance(self, radius: Tensor, error: Tensor, bounds: list[Pair] | None) -> tuple[Tensor, Tensor]:
        each, whole, fresh = self.reached(radius, error)
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
        return behind, up((steepest * (self.sigma * error + fresh) + curved) * (1 + 1e-12)) + rounding

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
        tail: list[Pair] = [inner_norms, norms, ADJOINT_SLACK * self.f.steepest * self.gain * norms.sum(-1, keepdim=True)]
        if self.f.curvature is None:
            # relu is convex, so what it adds to its tangent is never negative: only a negative adjoint lets it lower the margin.
            weights: list[Pair] = [(size if two_sided else (-g).clamp_min(0.0)).flatten(-2), *tail]
        else:
            weights = [Curved(size, size) if two_sided else Curved((size - g) / 2, (size + g) / 2), *tail]
        return inner if self.affine is None else inner @ self.affine.constants.weight, weights


@register(*ELEMENTWISE)
def _elementwise_alone(layer: nn.Module, clean: Tensor, scope: Scope) -> Expansion:
    return ElementwiseExpansion(layer, clean, scope)
