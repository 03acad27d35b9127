"""Signals, images and volumes: convolutions and means as linear maps with adjoints, batch norm, max pooling. docs/theory.md, sections 7 and 8.

A sample is one vector of all its entries (N, 1, n); its shape, (C, H, W) for images, is in the scope. Convolutions, means and batch norm are affine,
so their adjoints are exact. Constants and execution errors are those of domains.norms. A maximum is convex and is expanded at its largest entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.domains.expansion.base import ADJOINT_SLACK, Ball, Expansion, OutputBounds, Scope, Term, register, token_norms
from robustlip.domains.expansion.crossing import KinkTerm
from robustlip.domains.expansion.linear import AffineStep
from robustlip.domains.norms.convolution import check_weights, convolution_of
from robustlip.errors import UnsupportedLayer
from robustlip.numerics.rounding import U64, norm_up, up
from robustlip.ops.convolution import (
    CONVOLUTIONS,
    MAXIMA,
    MEANS,
    TRANSPOSED,
    Conv,
    Convolution,
    Maximum,
    Mean,
    Transposed,
    along,
    dimensions,
    image_shape,
    maxima_error,
    pooled,
)
from robustlip.ops.maps import ConvolutionMap, LinearMap, ScaleMap, map_of
from robustlip.ops.normalization import BATCH_NORMS, BatchNorm, BatchScale, batch_positions, check_batch
from robustlip.ops.resampling import UPSAMPLES, average_of
from robustlip.threats import l2_factor


class MapStep(AffineStep):
    """An affine layer by its linear map. Subclasses provide the constants and the execution error."""

    by_token: ClassVar[tuple[str, ...]] = ("clean", "norm")

    def __init__(
        self, layer: nn.Module, clean: Tensor, scope: Scope, shape: tuple[int, ...], make: Callable[[], LinearMap] | None = None
    ) -> None:
        """make: makes the map, if it is not that of the layer on samples of that shape."""
        self.scope = scope
        self.map: LinearMap = scope.context.constant(layer, f"map-{shape}-{layer}", make or (lambda: map_of(layer, shape)))
        self.rows = scope.context.constant(layer, f"rows-{shape}-{scope.space}-{layer}", lambda: self.map.row_norms(scope.space).to(clean.device))
        self.norm, self.factor = norm_up(clean), l2_factor(scope.space, clean.shape[-1])
        self.clean = self.map.affine(clean)
        self.whole = self.map.out if len(self.map.out) > 1 else None

    def execution_error(self, norm: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
        """(≥ ‖executed − exact‖₂ of Ax + b, with the error of the reference, ≥ every intermediate value) for executed ‖x‖₂ ≤ norm."""
        raise NotImplementedError

    def parts(self, ball: Ball) -> tuple[Tensor, Tensor]:
        fresh, largest = self.execution_error(self.norm + self.factor * ball.radius, ball)
        # After the layer an ℓ1 norm may be √n times the ℓ2 norm; an ℓ∞ norm is never larger.
        spread = math.sqrt(self.map.outputs) * (1 + 1e-15) if self.space == "l1" else 1.0
        return up(self.gain * ball.radius), self.scope.infinite_if_overflow(up(fresh * spread), largest)

    def back(self, g: Tensor) -> Tensor:
        return self.map.adjoint(g)

    def adjoint_slack(self) -> float:
        """The value of `slack`: |fl(Aᵀg) − Aᵀg| ≤ loss·|A|ᵀ|g| for each entry, and 32u for the entrywise functions after the layer."""
        return (self.map.adjoint_loss * self.frobenius * self.factor + 32 * U64 * self.gain) * (1 + 1e-9)


@register(*CONVOLUTIONS, *TRANSPOSED, any_space=True, keeps="any")
class ConvolutionExpansion(MapStep):
    """W*x + b for any stride, dilation, groups and padding mode."""

    def __init__(self, layer: Conv | Transposed, clean: Tensor, scope: Scope) -> None:
        self.layer = layer
        self.constants: Convolution = convolution_of(layer, scope.whole, scope.context)
        super().__init__(layer, clean, scope, image_shape(layer, scope.whole))
        c = self.constants
        self.sigma, self.gain, self.frobenius = c.gain, c.gain_from(scope.space), c.window_gain * c.frobenius
        self.slack = self.adjoint_slack()

    def execution_error(self, norm: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
        c = self.constants
        check_weights(self.layer, ball.weight_radius is not None)
        perturbed = self.scope.weight_change(ball, c.matrix) * c.window_gain
        return self.scope.both(lambda arithmetic: c.error(norm, perturbed, arithmetic)) + perturbed * norm, c.largest(norm, perturbed)

    def pair_rows(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        m = self.map
        if not isinstance(m, ConvolutionMap):
            return super().pair_rows(a, b, v)
        places = math.prod(m.out[1:])
        together = m.weight.shape[0] // m.groups
        channels_a, channels_b, by = a[::places] // places, b[::places] // places, v[::places]
        if bool((channels_a // together != channels_b // together).any()):  # pairs across two groups read different channels
            return super().pair_rows(a, b, v)
        first, second = (by[:, i].view(-1, *[1] * (m.weight.dim() - 1)) for i in (0, 1))
        mixed = first * m.weight[channels_a] + second * m.weight[channels_b]
        # One filter per pair. Row norms do not depend on which channels it reads.
        rows = replace(m, weight=mixed, out=(len(mixed), *m.out[1:]), shape=(mixed.shape[1], *m.shape[1:]), groups=1).row_norms(self.scope.space)
        sizes = v[:, 0].abs() * self.rows[a] + v[:, 1].abs() * self.rows[b]
        return up(rows + 2.0**-45 * sizes)  # for filters that nearly cancel


@register(*MEANS, *UPSAMPLES, any_space=True, keeps="any")
class AverageExpansion(MapStep):
    """The mean of each window of each channel (padding counts as 0), of adaptive windows, and interpolation."""

    def __init__(self, layer: Mean | nn.Upsample, clean: Tensor, scope: Scope) -> None:
        self.average = average_of(layer, scope.whole)
        assert scope.whole is not None
        super().__init__(layer, clean, scope, scope.whole)
        self.space = scope.space
        self.sigma, self.gain, self.frobenius = self.average.gain, self.average.gain_in(scope.space), self.average.gain
        self.slack = self.adjoint_slack()

    def execution_error(self, norm: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
        return self.scope.both(lambda arithmetic: self.average.error(norm, arithmetic)), self.average.largest(norm)


@register(*BATCH_NORMS, any_space=True, keeps="any")
class Scaled(MapStep):
    """Batch norm in eval mode: g·x + (β − g·mean) by channel."""

    def __init__(self, layer: BatchNorm, clean: Tensor, scope: Scope) -> None:
        check_batch(layer)
        self.positions = batch_positions(layer, scope.whole, clean.shape[1], clean.shape[-1])
        self.scale: BatchScale = scope.context.constant(layer, f"batch-{layer.eps}", lambda: BatchScale.of(layer))
        super().__init__(layer, clean, scope, scope.whole or tuple(clean.shape[-1:]))
        assert isinstance(self.map, ScaleMap)
        self.factors, self.space = self.map.weight, scope.space
        self.sigma = self.gain = self.frobenius = self.scale.gain
        self.slack = self.adjoint_slack()

    def execution_error(self, norm: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
        width = self.map.outputs
        return self.scope.both(lambda arithmetic: self.scale.error(norm, self.positions, width, arithmetic)), self.scale.largest(norm)


@register(*MAXIMA, when=lambda layer: not layer.return_indices, keeps="any")
class MaximaExpansion(Expansion):
    """The largest entry of each window W; padding is never the largest.

    With i the position of the largest entry at the reference and a its distance to the second largest, max(x + Δ) − x_i − Δ_i lies between 0 and
    (max_j(Δ_j − Δ_i) − a)⁺, and |Δ_j − Δ_i| ≤ √2‖Δ_W‖. These are kinks of entries that change by at most √2r each and by √(2c)r together, where c
    windows read one entry.
    """

    def __init__(self, layer: Maximum, clean: Tensor, scope: Scope) -> None:
        if type(layer) not in MAXIMA:
            raise UnsupportedLayer(f"expected MaxPool2d, MaxPool1d or MaxPool3d, got {type(layer).__name__}; use method='global'")
        count = dimensions(layer)
        self.scope, self.shape = scope, image_shape(layer, scope.whole)
        reads, size, out = pooled(layer, self.shape)
        self.whole, self.root = out, math.sqrt(reads) * (1 + 1e-15)
        images = clean.reshape(-1, *self.shape)
        kernel, stride, padding, dilation = (along(v, count) for v in (layer.kernel_size, layer.stride, layer.padding, layer.dilation))
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[count - 1]
        largest, place = pool(images, kernel, stride, padding, dilation, return_indices=True)
        first = torch.arange(out[0], device=clean.device).view(-1, *[1] * count) * math.prod(self.shape[1:])
        self.place = (place + first).reshape(len(clean), 1, -1)  # among all entries
        self.clean = largest.reshape(len(clean), 1, -1)
        patches = F.pad(images, [n for around in reversed(padding) for n in (around, around)], value=-math.inf)
        for i in range(count):
            patches = patches.unfold(2 + i, dilation[i] * (kernel[i] - 1) + 1, stride[i])[..., :: dilation[i]]
        two = patches.flatten(-count).topk(min(2, size), dim=-1).values  # (N, C, windows, entries of one)
        gap = two[..., 0] - two[..., 1] if size > 1 else torch.full_like(two[..., 0], math.inf)
        self.near = (gap * (1 - 4 * U64)).reshape(len(clean), 1, -1)

    def lipschitz(self) -> Tensor | float:
        return self.root

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        radius = ball.radius
        fresh = torch.full_like(radius, self.scope_error())
        after = up(self.root * radius) + fresh
        if not remainder:
            return OutputBounds(after, ball.error, [])
        each = (math.sqrt(2) * (1 + 1e-15) * radius).unsqueeze(-1).expand(*radius.shape, self.near.shape[-1])
        kinks = KinkTerm(None, self.near, each, math.sqrt(2) * self.root * (1 + 1e-15) * radius)
        return OutputBounds(after, up(self.root * ball.error + kinks.norm()) + fresh, [kinks, fresh, radius.amax(-1, keepdim=True)])

    def scope_error(self) -> float:
        assert self.whole is not None
        return maxima_error(self.whole, self.scope) * (1 + 1e-12)

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        back = g.new_zeros(*g.shape[:-1], math.prod(self.shape)).scatter_add(-1, self.place.expand(g.shape), g)
        falling = g.abs() if two_sided else (-g).clamp_min(0.0)
        norms = token_norms(g)
        return back, [KinkTerm(falling), norms, ADJOINT_SLACK * self.root * norms.sum(-1, keepdim=True)]
