"""Means of adaptive windows, and interpolation: one matrix with entries ≥ 0 along each dimension after the channels. docs/theory.md, section 3.

A = P₁ ⊗ P₂ ⊗ …, so ‖A‖ is the product of the ‖P_d‖, each at most the root of its largest row sum times its largest column sum (Schur). Entries are
exact fractions, rounded once. Executed interpolation computes positions in float32 or wider, with an error of at most 4u(n + 1). The interpolant is
continuous and changes by at most this error times the four entries around the position, even if the position is rounded down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.numerics.arithmetic import RoundingModel
from robustlip.ops.convolution import GLOBAL_MEANS, Average, Mean, Shape, along, dimensions, image_shape, is_global

UPSAMPLES = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
LINEAR_MODES = {"linear": 1, "bilinear": 2, "trilinear": 3}
# The most positions along one dimension, before and after.
LARGEST_SIZE = 2**14


@dataclass(frozen=True)
class Resampling:
    """The matrices (o, n) of each dimension, float64. neighbours: next to how many positions an entry is, along each dimension, 0 if none is
    computed.

    out: the shape after. copies: whether entries are only copied.
    """

    matrices: tuple[Tensor, ...]
    out: Shape
    neighbours: tuple[int, ...]
    copies: bool

    @property
    def terms(self) -> int:
        """The most input entries of one output entry."""
        return math.prod(int((p != 0).sum(1).amax()) for p in self.matrices)

    def _gains(self, space: str) -> list[float]:
        found = []
        for p in self.matrices:
            rows, columns = float(p.sum(1).amax()) * (1 + 1e-12), float(p.sum(0).amax()) * (1 + 1e-12)
            found.append({"l2": math.sqrt(rows * columns), "l1": columns, "linf": rows}[space])
        return found

    @property
    def gain(self) -> float:
        """‖after‖₂ ≤ this·‖x‖₂."""
        return self.gain_in("l2")

    def gain_in(self, space: str) -> float:
        """The gain with both norms in the space."""
        return math.prod(self._gains(space)) * (1 + 1e-15)

    def largest(self, norm: Tensor) -> Tensor:
        """≥ every intermediate sum for ‖x‖₂ ≤ norm: a window is summed before it is divided."""
        return norm * (self.terms + 1)

    def error(self, norm: Tensor, arithmetic: RoundingModel) -> Tensor:
        """‖fl(y) − y‖₂ for ‖x‖₂ ≤ norm: errors of weights, products, sums and positions, and underflow."""
        if self.copies:
            return 0 * norm
        unit, gains = min(arithmetic.unit, 2.0**-24), self._gains("l2")
        off = [4 * unit * (p.shape[1] + 1) * math.sqrt(4 * n) for p, n in zip(self.matrices, self.neighbours, strict=True)]
        grown = math.prod(g + e for g, e in zip(gains, off, strict=True)) * (1 + 1e-12)
        relative = arithmetic.gamma(self.terms + 4 * len(gains) + 8) * grown + (grown - math.prod(gains) * (1 - 1e-12) if any(off) else 0.0)
        return relative * norm + 4 * self.terms * math.sqrt(math.prod(self.out)) * (arithmetic.tiny + arithmetic.flushed)


def average_of(layer: Mean | nn.Upsample, whole: Shape | None) -> Average | Resampling:
    """Facts of a mean of windows or of an interpolation. Raises BadInput and UnsupportedLayer for samples and options that are not supported."""
    if not isinstance(layer, nn.Upsample):
        shape = image_shape(layer, whole)
        if isinstance(layer, GLOBAL_MEANS) and not is_global(layer):
            size = layer.output_size
            wanted = along(size, dimensions(layer)) if size is not None else shape[1:]
            return _resampling(shape, [_windows(n, n if o is None else o) for n, o in zip(shape[1:], wanted, strict=True)], False)
        return Average.of(layer, shape)
    if why := other_mode(layer):
        raise UnsupportedLayer(f"expected Upsample by copies or lines, got {why}; use mode='nearest' or 'bilinear'")
    count = LINEAR_MODES.get(layer.mode)
    if whole is None or not 2 <= len(whole) <= 4 or count not in (None, len(whole) - 1):
        raise BadInput(f"expected signals, images or volumes for {type(layer).__name__} in mode {layer.mode!r}, got {whole}; use another mode")
    sizes = _output_sizes(layer, whole[1:])
    if layer.mode in LINEAR_MODES:
        return _resampling(whole, [_linear(n, o, bool(layer.align_corners)) for n, o in zip(whole[1:], sizes, strict=True)], False)
    return _resampling(whole, [(_copies(layer, n, o), 0) for n, o in zip(whole[1:], sizes, strict=True)], True)


def other_mode(layer: nn.Upsample) -> str:
    """'' for nearest and linear interpolation, else the mode."""
    return "" if layer.mode in (*LINEAR_MODES, "nearest", "nearest-exact") else f"mode {layer.mode!r}"


def _resampling(shape: Shape, parts: Sequence[tuple[Tensor, int]], copies: bool) -> Resampling:
    return Resampling(tuple(p for p, _ in parts), (shape[0], *(p.shape[0] for p, _ in parts)), tuple(n for _, n in parts), copies)


def _sized(n: int, o: Any) -> int:
    if isinstance(o, bool) or not isinstance(o, int) or not (0 < o <= LARGEST_SIZE and n <= LARGEST_SIZE):
        raise BadInput(f"expected sizes from 1 to {LARGEST_SIZE} in front and after, got {n} and {o}; use smaller samples")
    return o


def _output_sizes(layer: nn.Upsample, before: Shape) -> list[int]:
    if layer.size is not None:
        return [_sized(n, o) for n, o in zip(before, along(layer.size, len(before)), strict=True)]
    size = layer.scale_factor
    factors = [float(f) for f in (size if isinstance(size, tuple | list) else [size] * len(before))]  # type: ignore[arg-type]
    if len(factors) != len(before) or any(n * f != math.floor(n * f) for n, f in zip(before, factors, strict=True)):
        raise UnsupportedLayer(f"expected factors that make whole sizes of {before}, got {factors}; state the size")
    return [_sized(n, int(n * f)) for n, f in zip(before, factors, strict=True)]


def _windows(n: int, o: int) -> tuple[Tensor, int]:
    """Means of the entries ⌊i·n/o⌋, …, ⌈(i + 1)·n/o⌉ − 1."""
    matrix = torch.zeros(_sized(n, o), n, dtype=torch.float64)
    for i in range(o):
        start, stop = i * n // o, -(-(i + 1) * n // o)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix, 0


def _linear(n: int, o: int, corners: bool) -> tuple[Tensor, int]:
    """Linear interpolation between the two entries next to a position. corners: the first and last positions coincide (align_corners)."""
    matrix = torch.zeros(_sized(n, o), n, dtype=torch.float64)
    floors = []
    for i in range(o):
        if corners:
            place = Fraction(i * (n - 1), o - 1) if o > 1 else Fraction(0)
        else:
            place = max(Fraction(0), Fraction((2 * i + 1) * n, 2 * o) - Fraction(1, 2))
        low = min(int(place), n - 1)
        part = place - low
        matrix[i, low] += float(1 - part)
        matrix[i, min(low + 1, n - 1)] += float(part)
        floors.append(low)
    at = torch.tensor(floors)[:, None] - torch.arange(n)
    return matrix, int(((at >= -3) & (at <= 2)).sum(0).amax())


def _copies(layer: nn.Upsample, n: int, o: int) -> Tensor:
    """Nearest interpolation. Raises UnsupportedLayer where float32 or float64 rounds a position to another entry than the exact one."""
    exact = layer.mode == "nearest-exact"
    index = [min((2 * i + 1) * n // (2 * o) if exact else i * n // o, n - 1) for i in range(o)]
    options: dict[str, Any] = {"size": o}
    if layer.size is None:
        options = {"scale_factor": o / n, "recompute_scale_factor": layer.recompute_scale_factor}
    for dtype in (torch.float32, torch.float64):
        found = F.interpolate(torch.arange(n, dtype=dtype).view(1, 1, n), mode=layer.mode, **options)[0, 0]
        if found.tolist() != index:
            raise UnsupportedLayer(f"expected sizes whose places no dtype rounds, got {n} to {o} by {layer.mode!r}; use a power of two as factor")
    return F.one_hot(torch.tensor(index), n).double()
