"""Linear layers as matrix-free maps y = Ax + b of one sample's entries: A, Aᵀ and |A| as functions. docs/theory.md, section 3.

Each layer class has one entry in a table (`register_map`); `map_of` makes its map for samples of one shape. All maps are in float64. For any order of
summation the error of Ax is at most γ|A||x|, with γ of `terms` plus `relative`, and that of Aᵀg at most γ|A|ᵀ|g|, with γ of `adjoint_terms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from robustlip.errors import UnsupportedLayer
from robustlip.layers import Normalize, Scale, Shift
from robustlip.numerics.rounding import U64, gamma, norm_up, up
from robustlip.ops.constants import check_channels, zero_sides
from robustlip.ops.convolution import (
    CONVOLUTIONS,
    GLOBAL_MEANS,
    MEANS,
    SAMPLES,
    TRANSPOSED,
    Average,
    Conv,
    Mean,
    Pair,
    Transposed,
    along,
    dimensions,
    image_shape,
    padded_from,
    sides,
    transposed_out,
    windows_of,
)
from robustlip.ops.normalization import BATCH_NORMS, BatchNorm, check_batch
from robustlip.ops.resampling import UPSAMPLES, Resampling, average_of, other_mode

Sample = tuple[int, ...]


@dataclass(frozen=True)
class LinearMap:
    """A and b for samples of `shape`, all float64.

    out: the shape after. terms, adjoint_terms: the most products summed in one entry of Ax and of Aᵀg (other roundings counted in). relative: the
    relative error of the entries of A. bias: (m,) or None; bias_error: (m,), or None for an exact bias.
    """

    shape: Sample
    out: Sample
    terms: int
    adjoint_terms: int
    relative: float = 0.0
    bias: Tensor | None = None
    bias_error: Tensor | None = None

    @property
    def inputs(self) -> int:
        return math.prod(self.shape)

    @property
    def outputs(self) -> int:
        return math.prod(self.out)

    @property
    def loss(self) -> float:
        """|fl(Ax) − Ax| ≤ loss·|A||x| for each entry."""
        return gamma(self.terms + 2, U64) + self.relative * 1.01

    @property
    def adjoint_loss(self) -> float:
        """|fl(Aᵀg) − Aᵀg| ≤ adjoint_loss·|A|ᵀ|g| for each entry."""
        return gamma(self.adjoint_terms + 2, U64) + self.relative * 1.01

    def apply(self, x: Tensor, absolute: bool = False) -> Tensor:
        """Ax (…, m) for x (…, n), without b. absolute: at least |A|x for x ≥ 0, and equal to it if padding copies no entries."""
        raise NotImplementedError

    def adjoint(self, g: Tensor, absolute: bool = False) -> Tensor:
        """Aᵀg (…, n) for g (…, m). absolute: at least |A|ᵀg for g ≥ 0."""
        raise NotImplementedError

    def row_norms(self, norm: str) -> Tensor:
        """(m,) ≥ the largest change of each entry of Ax for ‖x‖ ≤ 1 in 'l1', 'l2' or 'linf': the dual norms of the rows of A."""
        raise NotImplementedError

    def magnitude(self) -> float:
        """≥ the ℓ2 norm of |A|, hence of A: the root of its largest row sum times its largest column sum (Schur)."""
        x, g = (torch.ones(n, dtype=torch.float64, device=self.device) for n in (self.inputs, self.outputs))
        rows, columns = self.apply(x, absolute=True), self.adjoint(g, absolute=True)
        return float(up((rows.amax() * columns.amax() * (1 + self.loss + self.adjoint_loss)).sqrt()))

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return torch.device("cpu")

    def affine(self, x: Tensor) -> Tensor:
        """Ax + b."""
        y = self.apply(x)
        return y if self.bias is None else y + self.bias

    def sizes(self, x: Tensor) -> Tensor:
        """≥ |Ax' + b| for |x'| ≤ x, number by number."""
        y = self.apply(x, absolute=True)
        return (y if self.bias is None else y + self.bias.abs()) * (1 + self.loss + 1e-12)


@dataclass(frozen=True, kw_only=True)
class MatrixMap(LinearMap):
    """A matrix (m, n)."""

    weight: Tensor

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def apply(self, x: Tensor, absolute: bool = False) -> Tensor:
        return x @ (self.weight.abs() if absolute else self.weight).mT

    def adjoint(self, g: Tensor, absolute: bool = False) -> Tensor:
        return g @ (self.weight.abs() if absolute else self.weight)

    def row_norms(self, norm: str) -> Tensor:
        return dual_norms(self.weight, norm)


@dataclass(frozen=True, kw_only=True)
class ScaleMap(LinearMap):
    """One factor for each entry."""

    weight: Tensor

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def apply(self, x: Tensor, absolute: bool = False) -> Tensor:
        return x * (self.weight.abs() if absolute else self.weight)

    def adjoint(self, g: Tensor, absolute: bool = False) -> Tensor:
        return self.apply(g, absolute)

    def row_norms(self, norm: str) -> Tensor:
        return up(self.weight.abs() * (1 + self.relative))


@dataclass(frozen=True, kw_only=True)
class ConvolutionMap(LinearMap):
    """Pads, then sums weight (out, in/groups, kh, kw) over windows. padding: (before, after) of rows and of columns; mode: as in nn.Conv2d.

    copies: how often padding copies one number at most. Signals and volumes alike, with one number or three in the place of two.
    """

    weight: Tensor
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[Pair, ...]
    mode: str
    copies: int

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def _convolved(self, images: Tensor, weight: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.padding) - 1]
        if self.mode == "zeros" and all(before == after for before, after in self.padding):
            return convolve(images, weight, None, self.stride, tuple(before for before, _ in self.padding), self.dilation, self.groups)
        around = [n for both in reversed(self.padding) for n in both]
        padded = F.pad(images, around, mode={"zeros": "constant"}.get(self.mode, self.mode))
        return convolve(padded, weight, None, self.stride, 0, self.dilation, self.groups)

    def apply(self, x: Tensor, absolute: bool = False) -> Tensor:
        images = x.reshape(-1, *self.shape)
        return self._convolved(images, self.weight.abs() if absolute else self.weight).reshape(*x.shape[:-1], self.outputs)

    def adjoint(self, g: Tensor, absolute: bool = False) -> Tensor:
        weight = self.weight.abs() if absolute else self.weight
        size = [self.shape[1 + i] + sum(both) for i, both in enumerate(self.padding)]  # the size of the padded images
        images = g.reshape(-1, *self.out)
        back = (conv1d_input, conv2d_input, conv3d_input)[len(size) - 1]
        spread = back((len(images), self.shape[0], *size), weight, images, self.stride, 0, self.dilation, self.groups)
        return self._unpadded(spread).reshape(*g.shape[:-1], self.inputs)

    def _unpadded(self, padded: Tensor) -> Tensor:
        """The adjoint of padding: entries of the padding are dropped, copies are added to the entry they come from."""
        for i, (before, after) in enumerate(self.padding):
            dim, size = 2 + i, self.shape[1 + i]
            if self.mode == "zeros" or (before, after) == (0, 0):
                padded = padded.narrow(dim, before, size)
                continue
            source = padded_from(size, before, after, self.mode).to(padded.device) - 1
            shape = list(padded.shape)
            shape[dim] = size
            padded = padded.new_zeros(shape).index_add(dim, source, padded)
        return padded

    def row_norms(self, norm: str) -> Tensor:
        if norm == "l1":
            each = self.weight.abs().flatten(1).amax(-1) * self.copies
            return up(each.view(-1, *[1] * len(self.padding)).expand(self.out).reshape(-1))
        ones = torch.ones(1, *self.shape, dtype=torch.float64, device=self.weight.device)
        if norm == "linf":
            return up(self._convolved(ones, self.weight.abs()).reshape(-1) * (1 + self.loss))
        largest = self.weight.abs().amax()
        scale = torch.where(largest > 0, largest, torch.ones_like(largest))  # so that squares of small weights do not underflow
        squares = self._convolved(ones, (self.weight / scale).square()).reshape(-1)
        # A pixel that a window reads k ≤ copies times contributes (Σ w)² ≤ kΣ w².
        return up((self.copies * squares * (1 + self.loss + 8 * U64)).sqrt() * scale + 2.0**-500 * scale)


@dataclass(frozen=True, kw_only=True)
class TransposedMap(LinearMap):
    """The adjoint of a convolution: weight (in, out/groups, kh, kw), options as in nn.ConvTranspose2d, one number for each dimension."""

    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    more: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def _spread(self, images: Tensor, weight: Tensor) -> Tensor:
        spread = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(self.stride) - 1]
        return spread(images, weight, None, self.stride, self.padding, self.more, self.groups, self.dilation)

    def apply(self, x: Tensor, absolute: bool = False) -> Tensor:
        images = x.reshape(-1, *self.shape)
        return self._spread(images, self.weight.abs() if absolute else self.weight).reshape(*x.shape[:-1], self.outputs)

    def adjoint(self, g: Tensor, absolute: bool = False) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]
        weight = self.weight.abs() if absolute else self.weight
        x = convolve(g.reshape(-1, *self.out), weight, None, self.stride, self.padding, self.dilation, self.groups)
        for i, n in enumerate(self.shape[1:]):  # more than the stride at the end would add windows
            x = x.narrow(2 + i, 0, n)
        return x.reshape(*g.shape[:-1], self.inputs)

    def row_norms(self, norm: str) -> Tensor:
        grouped = self.weight.abs().unflatten(0, (self.groups, -1))  # an output entry meets each input entry in one tap at most
        if norm == "l1":
            return up(grouped.amax((1, *range(3, grouped.dim()))).view(-1, *[1] * len(self.stride)).expand(self.out).reshape(-1))
        ones = torch.ones(1, *self.shape, dtype=torch.float64, device=self.weight.device)
        if norm == "linf":
            return up(self._spread(ones, self.weight.abs()).reshape(-1) * (1 + self.loss))
        largest = self.weight.abs().amax()
        scale = torch.where(largest > 0, largest, torch.ones_like(largest))  # so that squares of small weights do not underflow
        squares = self._spread(ones, (self.weight / scale).square()).reshape(-1)
        return up((squares * (1 + self.loss + 8 * U64)).sqrt() * scale + 2.0**-500 * scale)


@dataclass(frozen=True, kw_only=True)
class AverageMap(LinearMap):
    """Means of windows of each channel; padding counts as 0."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def apply(self, x: Tensor, absolute: bool = False) -> Tensor:
        mean = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(self.kernel) - 1]
        return mean(x.reshape(-1, *self.shape), self.kernel, self.stride, self.padding).reshape(*x.shape[:-1], self.outputs)

    def adjoint(self, g: Tensor, absolute: bool = False) -> Tensor:
        weight = torch.full((1, 1, *self.kernel), 1 / math.prod(self.kernel), dtype=torch.float64, device=g.device)
        images = g.reshape(-1, 1, *self.out[1:])
        size = [n + 2 * around for n, around in zip(self.shape[1:], self.padding, strict=True)]
        back = (conv1d_input, conv2d_input, conv3d_input)[len(size) - 1]
        spread = back((len(images), 1, *size), weight, images, self.stride)
        for i, around in enumerate(self.padding):
            spread = spread.narrow(2 + i, around, self.shape[1 + i])
        return spread.reshape(*g.shape[:-1], self.inputs)

    def row_norms(self, norm: str) -> Tensor:
        size = math.prod(self.kernel)
        each = {"linf": 1.0, "l2": size**-0.5, "l1": 1 / size}[norm]
        return torch.full((self.outputs,), each * (1 + 1e-15), dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class ResamplingMap(LinearMap):
    """A matrix (o, n) along each dimension after the channels, entries ≥ 0."""

    matrices: tuple[Tensor, ...]

    def apply(self, x: Tensor, absolute: bool = False) -> Tensor:
        return self._along(x.reshape(-1, *self.shape), False).reshape(*x.shape[:-1], self.outputs)

    def adjoint(self, g: Tensor, absolute: bool = False) -> Tensor:
        return self._along(g.reshape(-1, *self.out), True).reshape(*g.shape[:-1], self.inputs)

    def _along(self, x: Tensor, back: bool) -> Tensor:
        for i, p in enumerate(self.matrices):
            p = p.to(x.device)
            x = (x.movedim(2 + i, -1) @ (p if back else p.mT)).movedim(-1, 2 + i)
        return x

    def row_norms(self, norm: str) -> Tensor:
        sizes = torch.ones(1, dtype=torch.float64)
        for p in self.matrices:
            sizes = (sizes[:, None] * dual_norms(p, norm)).flatten()
        return up(sizes * (1 + self.relative)).repeat(self.out[0])


@dataclass(frozen=True, kw_only=True)
class Mixing(LinearMap):
    """A sparse map: y_i = Σ_j factor_ij·x[index_ij], index and factor (m, k) with small k."""

    index: Tensor
    factor: Tensor

    @classmethod
    def of(cls, inputs: int, *terms: tuple[Tensor, float | Tensor]) -> Mixing:
        """The sum of terms (index (m,), factor) of `inputs` entries."""
        index = torch.stack([i for i, _ in terms], -1)
        factor = torch.stack([torch.zeros(len(i), dtype=torch.float64, device=i.device) + f for i, f in terms], -1)
        used = torch.bincount(index[factor != 0], minlength=1)
        return cls((inputs,), (len(index),), index.shape[1], int(used.amax()) if len(used) else 1, index=index, factor=factor)

    @property
    def device(self) -> torch.device:
        return self.factor.device

    def dense(self) -> Tensor:
        """The matrix (m, n)."""
        matrix = torch.zeros(self.outputs, self.inputs, dtype=torch.float64, device=self.device)
        return matrix.index_put((torch.arange(self.outputs, device=self.device)[:, None], self.index), self.factor, accumulate=True)

    def apply(self, x: Tensor, absolute: bool = False) -> Tensor:
        factor = self.factor.abs() if absolute else self.factor
        y = x[..., self.index[:, 0]] * factor[:, 0]
        for j in range(1, factor.shape[1]):
            y = y + x[..., self.index[:, j]] * factor[:, j]
        return y

    def adjoint(self, g: Tensor, absolute: bool = False) -> Tensor:
        factor = self.factor.abs() if absolute else self.factor
        x = g.new_zeros(*g.shape[:-1], self.inputs)
        for j in range(factor.shape[1]):
            x = x.index_add(-1, self.index[:, j], g * factor[:, j])
        return x


@dataclass(frozen=True, kw_only=True)
class PartialMap(LinearMap):
    """(x₁, x₂) → (x₁, Ax₂): the first `unchanged` entries stay. Its bias is that of A."""

    inner: LinearMap
    unchanged: int

    @classmethod
    def of(cls, inner: LinearMap, unchanged: int) -> LinearMap:
        if unchanged == 0:
            return inner
        shape, out = (unchanged + inner.inputs,), (unchanged + inner.outputs,)
        return cls(shape, out, inner.terms, inner.adjoint_terms, inner.relative, inner=inner, unchanged=unchanged)

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def apply(self, x: Tensor, absolute: bool = False) -> Tensor:
        return torch.cat([x[..., : self.unchanged], self.inner.apply(x[..., self.unchanged :], absolute)], -1)

    def adjoint(self, g: Tensor, absolute: bool = False) -> Tensor:
        return torch.cat([g[..., : self.unchanged], self.inner.adjoint(g[..., self.unchanged :], absolute)], -1)

    def sizes(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., : self.unchanged], self.inner.sizes(x[..., self.unchanged :])], -1)


@dataclass(frozen=True, kw_only=True)
class Series(LinearMap):
    """A_k…A_1, applied one after the other. Its |A| is |A_k|…|A_1|, which is at least |A_k…A_1|."""

    maps: tuple[LinearMap, ...]

    @classmethod
    def of(cls, maps: tuple[LinearMap, ...]) -> Series:
        def roundings(counts: list[int]) -> int:
            return sum(n + 2 for n in counts)

        relative = math.expm1(sum(math.log1p(m.relative) for m in maps)) * (1 + 1e-9)
        terms, back = roundings([m.terms for m in maps]), roundings([m.adjoint_terms for m in maps])
        return cls(maps[0].shape, maps[-1].out, terms, back, relative, maps=maps)

    @property
    def device(self) -> torch.device:
        return next((m.device for m in self.maps if m.device.type != "cpu"), torch.device("cpu"))  # means have no tensors of their own

    def apply(self, x: Tensor, absolute: bool = False) -> Tensor:
        for m in self.maps:
            x = m.apply(x, absolute)
        return x

    def adjoint(self, g: Tensor, absolute: bool = False) -> Tensor:
        for m in reversed(self.maps):
            g = m.adjoint(g, absolute)
        return g

    def magnitude(self) -> float:
        return min(super().magnitude(), math.prod(m.magnitude() for m in self.maps) * (1 + 1e-12))


@dataclass(frozen=True, kw_only=True)
class PadMap(LinearMap):
    """Zeros around images. sides: (left, right, top, bottom)."""

    sides: tuple[int, int, int, int]

    def apply(self, x: Tensor, absolute: bool = False) -> Tensor:
        return F.pad(x.reshape(-1, *self.shape), self.sides).reshape(*x.shape[:-1], self.outputs)

    def adjoint(self, g: Tensor, absolute: bool = False) -> Tensor:
        left, _, top, _ = self.sides
        images = g.reshape(-1, *self.out)[..., top : top + self.shape[1], left : left + self.shape[2]]
        return images.reshape(*g.shape[:-1], self.inputs)

    def row_norms(self, norm: str) -> Tensor:
        return self.apply(torch.ones(1, self.inputs, dtype=torch.float64))[0]


def dual_norms(rows: Tensor, norm: str) -> Tensor:
    """(m,) ≥ |⟨row, x⟩| for ‖x‖ ≤ 1 in the norm 'l1', 'l2' or 'linf'; rows (m, n), float64."""
    if norm == "linf":
        return up(rows.abs().sum(-1) * (1 + 1e-12))
    return rows.abs().amax(-1) if norm == "l1" else norm_up(rows)


# ---- the table


Make = Callable[[Any, Sample], LinearMap]
_MAPS: dict[type, tuple[Make, Callable[[Any], str]]] = {}


def register_map(*layers: type, refuses: Callable[[Any], str] = lambda layer: "") -> Callable[[Make], Make]:
    """Function decorator: makes the map of exactly these layer classes, from (layer, shape of a sample).

    refuses: '' where a layer of the class has a map, else its name with the unsupported options.
    """

    def add(make: Make) -> Make:
        for layer in layers:
            _MAPS[layer] = make, refuses
        return make

    return add


def mapped_layers() -> tuple[type, ...]:
    """The layer classes in the table."""
    return tuple(_MAPS)


def is_linear(layer: nn.Module) -> bool:
    """Whether the class of the layer is in the table."""
    return type(layer) in _MAPS


def unmapped(layer: nn.Module) -> str:
    """'' where the layer has a map, in any mode; else its class name, with its options where these are not supported."""
    return _MAPS[type(layer)][1](layer) if is_linear(layer) else type(layer).__name__


def map_of(layer: nn.Module, shape: Sample) -> LinearMap:
    """The map of the layer on samples of that shape. Raises UnsupportedLayer for unsupported classes and options, and for shapes that do not fit."""
    if why := unmapped(layer):
        raise UnsupportedLayer(f"expected a linear layer that has a map, got {why}; use method 'global'")
    return _MAPS[type(layer)][0](layer, tuple(shape))


@register_map(nn.Linear)
def _matrix(layer: nn.Linear, shape: Sample) -> LinearMap:
    weight = layer.weight.detach().double()
    if len(shape) != 1 or weight.shape[1] != shape[0]:
        raise UnsupportedLayer(f"expected vectors of {weight.shape[1]} numbers before {type(layer).__name__}, got {shape}; flatten first")
    bias = None if layer.bias is None else layer.bias.detach().double()
    return MatrixMap(shape, (weight.shape[0],), weight.shape[1], weight.shape[0], bias=bias, weight=weight)


def _images(layer: nn.Module, shape: Sample) -> Sample:
    if len(shape) != dimensions(layer) + 1:
        kind = SAMPLES[dimensions(layer)].replace("(N, ", "(")
        raise UnsupportedLayer(f"expected {kind} before {type(layer).__name__}, got samples of shape {shape}; flatten after it")
    return image_shape(layer, shape)


@register_map(*CONVOLUTIONS)
def _convolution(layer: Conv, shape: Sample) -> LinearMap:
    image, weight = _images(layer, shape), layer.weight.detach().double()
    if weight.shape[1] * layer.groups != image[0]:
        raise UnsupportedLayer(f"expected {weight.shape[1] * layer.groups} channels before {type(layer).__name__}, got {image[0]}; match them")
    count, windows = dimensions(layer), windows_of(layer, image)
    out = (weight.shape[0], *(w.positions for w in windows))
    reads, copies = math.prod(w.reads for w in windows), math.prod(w.copies for w in windows)
    return ConvolutionMap(
        shape, out, weight[0].numel(), weight.shape[0] // layer.groups * reads, bias=_spread(layer.bias, out), weight=weight,
        stride=along(layer.stride, count), dilation=along(layer.dilation, count), groups=layer.groups,
        padding=tuple(sides(layer, i, n) for i, n in enumerate(weight.shape[2:])), mode=layer.padding_mode, copies=copies,
    )  # fmt: skip


def _spread(bias: Tensor | None, out: Sample) -> Tensor | None:
    """One value per channel, repeated for each entry (n,)."""
    return None if bias is None else bias.detach().double().view(-1, *[1] * (len(out) - 1)).expand(out).reshape(-1)


@register_map(*TRANSPOSED)
def _transposed(layer: Transposed, shape: Sample) -> LinearMap:
    image, weight, count = _images(layer, shape), layer.weight.detach().double(), dimensions(layer)
    out, taps = transposed_out(layer, image), math.prod(weight.shape[2:])
    stride, padding, more, dilation = (along(value, count) for value in (layer.stride, layer.padding, layer.output_padding, layer.dilation))
    return TransposedMap(
        shape, out, weight.shape[0] // layer.groups * taps, weight.shape[1] * taps, bias=_spread(layer.bias, out), weight=weight, stride=stride,
        padding=padding, more=more, dilation=dilation, groups=layer.groups,
    )  # fmt: skip


def _other_mean(layer: Mean) -> str:
    if isinstance(layer, GLOBAL_MEANS):
        return ""
    try:
        Average.of(layer, (1, *along(layer.kernel_size, dimensions(layer))))
    except UnsupportedLayer:
        name, other = type(layer).__name__, getattr(layer, "divisor_override", None)
        return f"{name}(ceil_mode={layer.ceil_mode}, count_include_pad={layer.count_include_pad}, divisor_override={other})"
    return ""


@register_map(*MEANS, refuses=_other_mean)
def _average(layer: Mean, shape: Sample) -> LinearMap:
    image, count = _images(layer, shape), dimensions(layer)
    average = average_of(layer, image)
    if isinstance(average, Resampling):
        return _resampled(shape, average)
    terms, adjoint_terms = average.size + 2, average.reads + 2
    if isinstance(layer, GLOBAL_MEANS):
        return AverageMap(shape, average.out, terms, adjoint_terms, kernel=image[1:], stride=image[1:], padding=(0,) * count)
    kernel, stride, padding = (along(value, count) for value in (layer.kernel_size, layer.stride, layer.padding))
    return AverageMap(shape, average.out, terms, adjoint_terms, kernel=kernel, stride=stride, padding=padding)


@register_map(*UPSAMPLES, refuses=other_mode)
def _upsample(layer: nn.Upsample, shape: Sample) -> LinearMap:
    average = average_of(layer, shape)
    assert isinstance(average, Resampling)
    return _resampled(shape, average)


def _resampled(shape: Sample, facts: Resampling) -> LinearMap:
    reads = math.prod(int((p != 0).sum(0).amax()) for p in facts.matrices)
    terms = max(facts.terms, sum(n + 2 for n in shape[1:])), max(reads, sum(n + 2 for n in facts.out[1:]))
    return ResamplingMap(shape, facts.out, *terms, 8 * U64, matrices=facts.matrices)


def _scale(
    layer: nn.Module, shape: Sample, gain: Tensor, shift: Tensor, relative: float, error: Tensor, channels_first: bool = False
) -> LinearMap:
    """gain·x + shift by channel. relative: relative error of the gain; error: that of the shift. channels_first: for samples of any rank."""
    if any(t.numel() not in (1, shape[0]) for t in (gain, shift)) or (len(shape) not in (1, 3) and not channels_first):
        raise UnsupportedLayer(f"expected a {type(layer).__name__} by channel of images or vectors, got samples of shape {shape}; flatten first")
    view = (-1, *[1] * (len(shape) - 1)) if channels_first or len(shape) == 3 else (-1,)
    by_number = [t.view(view).expand(shape).reshape(-1) for t in (gain, shift, error)]
    return ScaleMap(shape, shape, 2, 2, relative, by_number[1], by_number[2], weight=by_number[0])


def _constant(value: Tensor, shape: Sample) -> Tensor:
    """A constant, one per channel or a table, repeated for each entry (n,)."""
    if value.dim() > 1:
        return value.reshape(value.shape[-len(shape) :]).expand(shape).reshape(-1)
    view = (-1, 1, 1) if len(shape) == 3 and len(value) > 1 else (-1,)
    return value.view(view).expand(shape).reshape(-1)


@register_map(Scale)
def _factor(layer: Scale, shape: Sample) -> LinearMap:
    check_channels(layer, shape)
    value = layer.value.detach().double()
    factor = _constant(1 / value if layer.divide else value, shape)
    return ScaleMap(shape, shape, 2, 2, 4 * U64 * layer.divide, weight=factor)


@register_map(Shift)
def _shift(layer: Shift, shape: Sample) -> LinearMap:
    check_channels(layer, shape)
    value = _constant(layer.value.detach().double(), shape)
    return ScaleMap(shape, shape, 2, 2, bias=-value if layer.subtract else value, weight=torch.ones_like(value))


@register_map(nn.ZeroPad2d)
def _zeros(layer: nn.ZeroPad2d, shape: Sample) -> LinearMap:
    image = _images(layer, shape)
    sides = zero_sides(layer)
    return PadMap(shape, (image[0], image[1] + sides[2] + sides[3], image[2] + sides[0] + sides[1]), 1, 1, sides=sides)


@register_map(Normalize)
def _normalize(layer: Normalize, shape: Sample) -> LinearMap:
    std, mean = layer.std.detach().double(), layer.mean.detach().double()  # type: ignore[operator]
    gain, shift = 1 / std, -mean / std
    return _scale(layer, shape, gain, shift, 4 * U64, 4 * U64 * shift.abs())


@register_map(*BATCH_NORMS)
def _batch_norm(layer: BatchNorm, shape: Sample) -> LinearMap:
    check_batch(layer)
    assert layer.running_mean is not None and layer.running_var is not None
    gain = (layer.running_var.double() + layer.eps).rsqrt()
    gain = gain if layer.weight is None else gain * layer.weight.detach().double()
    moved = layer.running_mean.double() * gain
    beta = torch.zeros_like(moved) if layer.bias is None else layer.bias.detach().double()
    return _scale(layer, shape, gain, beta - moved, 16 * U64, 16 * U64 * (beta.abs() + moved.abs()), channels_first=True)
