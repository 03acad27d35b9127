"""Convolutions and pooling of signals, images and volumes: windows, guaranteed constants, execution errors. docs/theory.md, sections 1, 2 and 3.

All are three maps in series. Padding copies entries: if an entry is copied at most m times, ‖pad(x)‖₂ ≤ √m‖x‖₂. Windows copy entries: if an entry is
read by at most c windows and taps (padding included), ‖patches(x)‖_F ≤ √c‖x‖₂. Then a matrix, a mean or a maximum acts on each window. c is a product
over the dimensions.

A convolution W with stride 1, on images padded to (P, Q), consists of rows of the circular convolution on the torus (P, Q), because no window wraps
around; a stride deletes rows. So its operator norm is at most that of the circular convolution, a maximum over frequencies of norms of out×in
matrices (Sedghi, Gupta & Long 2019), and also at most √c·‖W as (out, in·kh·kw)‖₂. The second bound also holds for a perturbation E of that matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.numerics.arithmetic import RoundingModel
from robustlip.numerics.rounding import norm_up
from robustlip.numerics.spectral import spectral_norm_bound, symbol_bound, symbol_work
from robustlip.ops.affine import offset_error

Pair = tuple[int, int]
Shape = tuple[int, ...]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MEANS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
GLOBAL_MEANS = MEANS[3:]
MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Mean = nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d | nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d
Maximum = nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d
# The names of samples by their number of dimensions after the channels.
SAMPLES = {1: "signals (N, C, L)", 2: "images (N, C, H, W)", 3: "volumes (N, C, D, H, W)"}


def for_signals(layer: nn.Module) -> bool:
    """Whether the layer, or one inside it, is for signals (N, C, L), whose samples have as many dimensions as tokens."""
    return any(type(m) in (CONVOLUTIONS[0], TRANSPOSED[0], *MEANS[::3], MAXIMA[0]) for m in layer.modules())


def dimensions(layer: nn.Module) -> int:
    """The number of dimensions after the channels of a torch layer: 2 for Conv2d."""
    return int(type(layer).__name__[-2])


def along(value: Any, count: int) -> tuple[int, ...]:
    """An option of a layer as one number for each of `count` dimensions."""
    return (value,) * count if isinstance(value, int) else tuple(value) * count if len(value) == 1 else tuple(value)


def pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def padded_from(size: int, before: int, after: int, mode: str = "zeros") -> Tensor:
    """The pixel, counted from 1, that each entry of the padded row is a copy of; 0 for padding. mode: as in nn.Conv2d."""
    source = torch.arange(1, size + 1, dtype=torch.float64)[None, None]
    if before or after:
        source = F.pad(source, (before, after), mode={"zeros": "constant"}.get(mode, mode))
    return source[0, 0].long()


@dataclass(frozen=True)
class Windows:
    """Windows along one dimension. positions: their number; reads, copies: how often an entry is read by windows, or copied by padding, at most.

    padded: the padded size.
    """

    positions: int
    reads: int
    copies: int
    padded: int

    @classmethod
    def along(cls, size: int, kernel: int, stride: int, dilation: int, left: int, right: int, mode: str = "zeros") -> Windows:
        """mode: as in nn.Conv2d. Raises BadInput when no window fits."""
        source = padded_from(size, left, right, mode)
        padded = len(source)
        positions = (padded - dilation * (kernel - 1) - 1) // stride + 1
        if positions < 1:
            raise BadInput(f"expected images at least as large as the kernel, got {size} pixels for one of {kernel}; use larger images")
        taken = source[torch.arange(positions)[:, None] * stride + torch.arange(kernel) * dilation]

        def most(index: Tensor) -> int:
            counts = torch.bincount(index.flatten(), minlength=size + 1)[1:]
            return int(counts.max())

        return cls(positions, most(taken), most(source), padded)


def image_shape(layer: nn.Module, whole: tuple[int, ...] | None) -> Shape:
    """(C, H, W) of the images before the layer, (C, L) of signals, (C, D, H, W) of volumes.

    Raises BadInput where the samples are of another kind, or where their shape is not known (None).
    """
    count = dimensions(layer)
    if whole is None or len(whole) != count + 1:
        name, got = type(layer).__name__, "vectors or tokens" if whole is None or len(whole) < 3 else f"samples of shape {whole}"
        raise BadInput(f"expected {SAMPLES[count]} before {name}, got {got}; put it before Flatten and Patchify")
    return whole


@dataclass(frozen=True)
class Convolution:
    """Guaranteed constants of a convolution on samples of one size."""

    gain: float  # ℓ2 → ℓ2, of the unperturbed weights
    from_linf: float
    from_l1: float
    matrix: float  # ‖W as (out, in·kh·kw)‖₂, the unit of a relative WeightBall
    window_gain: float  # √c: ‖E as a convolution‖ ≤ window_gain·‖E as a matrix‖₂
    frobenius: float  # the largest of all groups
    bias: float | None  # ℓ2 norm of the added bias, None without one
    terms: int
    rank: float  # √rank of the matrix of one group
    out: Shape

    @classmethod
    def of(cls, layer: Conv, shape: Shape) -> Convolution:
        weight = layer.weight.detach()
        groups, kernel, mode = layer.groups, weight.shape[2:], layer.padding_mode
        windows = windows_of(layer, shape)
        dilation, padded = along(layer.dilation, len(kernel)), tuple(w.padded for w in windows)
        window_gain = math.sqrt(math.prod(w.reads for w in windows)) * (1 + 1e-15)
        copies = math.prod(w.copies for w in windows)
        grouped = weight.unflatten(0, (groups, -1))  # (G, out/G, in/G, kh, kw): groups act on channels of their own
        matrices = spectral_norm_bound(grouped.flatten(2))
        gain = float(matrices.amax()) * window_gain
        if len(kernel) < 3 or symbol_work(grouped[0], padded) * groups <= LARGEST_SYMBOL:
            symbols = [float(symbol_bound(w, padded, dilation)) * math.sqrt(copies) for w in grouped]
            circular = max(symbols) * (1 + 1e-15)
            if mode == "circular" and all(p - d * (k - 1) <= size for p, d, k, size in zip(padded, dilation, kernel, shape[1:], strict=True)):
                # At most as many outputs as pixels: they are distinct rows of the circular convolution of the unpadded image.
                circular = max(float(symbol_bound(w, shape[1:], dilation)) for w in grouped)
            gain = min(circular, gain)
        positions = math.prod(w.positions for w in windows)
        sums = norm_up(weight.double().abs().flatten(1).sum(-1), 0)  # |W| on pixels of absolute value 1, padded by zeros or copies
        by_rows = float(sums) * math.sqrt(positions) * (1 + 1e-12)
        # A unit input at one pixel, copied at most `copies` times; each copy meets every tap at most once.
        column = float(norm_up(grouped.movedim(2, 1).flatten(2)).amax()) * copies
        bias = None if layer.bias is None else float(norm_up(layer.bias.detach(), 0)) * math.sqrt(positions) * (1 + 1e-15)
        return cls(
            gain=gain,
            from_linf=min(by_rows, gain * math.sqrt(math.prod(shape)) * (1 + 1e-15)),
            from_l1=min(column, gain),
            matrix=float(spectral_norm_bound(weight.flatten(1))),
            window_gain=window_gain,
            frobenius=float(norm_up(grouped.flatten(1)).amax()),
            bias=bias,
            terms=weight[0].numel(),
            rank=math.sqrt(min(weight.shape[0] // groups, weight[0].numel())),
            out=(weight.shape[0], *(w.positions for w in windows)),
        )

    @classmethod
    def transposed(cls, layer: Transposed, shape: Shape) -> Convolution:
        """A transposed convolution A: the adjoint of a convolution B with the same norms of B and |B|. B's inputs are A's outputs."""
        weight, groups, count = layer.weight.detach(), layer.groups, dimensions(layer)
        out = transposed_out(layer, shape)
        kernel, stride, dilation, padding = (
            along(value, count) for value in (layer.kernel_size, layer.stride, layer.dilation, layer.padding)
        )
        make: Any = CONVOLUTIONS[count - 1]
        back = make(out[0], weight.shape[0], kernel, stride, padding, dilation, groups, bias=False, device="meta")
        back.weight = nn.Parameter(weight, requires_grad=False)
        inner = cls.of(back, out)
        sums = norm_up(weight.double().abs().unflatten(0, (groups, -1)).sum((1, *range(3, 3 + count))).flatten(), 0)  # |A|·1
        positions = math.prod(out[1:])
        return cls(
            gain=inner.gain,
            from_linf=min(float(sums) * math.sqrt(positions) * (1 + 1e-12), inner.gain * math.sqrt(math.prod(shape)) * (1 + 1e-15)),
            from_l1=min(float(norm_up(weight.flatten(1)).amax()), inner.gain),  # one input entry meets every tap at most once
            matrix=math.nan,
            window_gain=inner.window_gain,
            frobenius=inner.frobenius,
            bias=None if layer.bias is None else float(norm_up(layer.bias.detach(), 0)) * math.sqrt(positions) * (1 + 1e-15),
            terms=weight.shape[0] // groups * math.prod(kernel),
            rank=0.0,
            out=out,
        )

    @property
    def shift(self) -> float:
        """‖bias‖₂ over all outputs, 0 without a bias."""
        return 0.0 if self.bias is None else self.bias

    def gain_from(self, space: str) -> float:
        """‖Ax‖₂ ≤ this·‖x‖ with ‖x‖ in the norm of the space: 'l1', 'l2' or 'linf'."""
        return {"linf": self.from_linf, "l1": self.from_l1, "l2": self.gain}[space]

    def perturbed_frobenius(self, change: Tensor | float) -> Tensor | float:
        """≥ the norm of |W + E| as a convolution, for a convolution E of norm at most `change`: √c(‖W‖_F + √rank‖E as a matrix‖₂)."""
        return self.window_gain * self.frobenius + self.rank * change

    def largest(self, norm: Tensor, change: Tensor | float) -> Tensor:
        """≥ every partial sum of every output entry, for ‖x‖₂ ≤ norm."""
        return self.perturbed_frobenius(change) * norm + self.shift

    def error(self, norm: Tensor, change: Tensor | float, arithmetic: RoundingModel) -> Tensor:
        """‖fl((W + E)*x + b) − ((W + E)*x + b)‖₂ for executed ‖x‖₂ ≤ norm and a convolution E of norm at most `change`.

        γ_n|W + E|*|x| in any order of summation, underflow of products and subnormal operands, and the sum with the bias.
        """
        frobenius, width = self.perturbed_frobenius(change), math.prod(self.out)
        lost = (self.terms + frobenius * math.sqrt(self.terms)) * math.sqrt(width) * arithmetic.tiny  # products that underflow
        fresh = arithmetic.gamma(self.terms) * frobenius * norm + lost
        fresh = fresh + math.sqrt(self.terms) * math.sqrt(width) * norm * arithmetic.flushed  # subnormal weights
        if self.bias is not None:
            fresh = fresh + offset_error(self.bias, frobenius * norm, self.terms, width, arithmetic)
        return fresh


def transposed_out(layer: Transposed, shape: Shape) -> Shape:
    """The shape after a transposed convolution."""
    count = dimensions(layer)
    if shape[0] != layer.weight.shape[0]:
        raise BadInput(f"expected {layer.weight.shape[0]} channels before {type(layer).__name__}, got {shape[0]}; match them")
    options = (along(value, count) for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_padding))
    sizes = [(n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, s, p, d, more in zip(shape[1:], *options, strict=True)]
    if min(sizes) < 1:
        raise BadInput(f"expected larger samples before {type(layer).__name__}, got {shape}, of which nothing is left; pad less")
    return (layer.out_channels, *sizes)


# The most multiplications for the bound of a volume's convolution over all frequencies.
LARGEST_SYMBOL = 2**40


def windows_of(layer: Conv, shape: Shape) -> list[Windows]:
    """The windows of a convolution along each dimension after the channels."""
    count = dimensions(layer)
    kernel, stride, dilation = layer.weight.shape[2:], along(layer.stride, count), along(layer.dilation, count)
    return [Windows.along(shape[1 + i], kernel[i], stride[i], dilation[i], *sides(layer, i, kernel[i]), layer.padding_mode) for i in range(count)]


def sides(layer: Conv, i: int, kernel: int) -> Pair:
    """(before, after): the padding of dimension i; for 'same' torch puts the odd entry after."""
    count = dimensions(layer)
    if layer.padding == "same":
        total = along(layer.dilation, count)[i] * (kernel - 1)
        return total // 2, total - total // 2
    before = 0 if isinstance(layer.padding, str) else along(layer.padding, count)[i]  # 'valid'
    return before, before


def check_algorithm(layer: nn.Module) -> None:
    """Raises UnsupportedLayer where torch may use Winograd or FFT algorithms, whose rounding is not bounded here."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.device.type == "cuda" and torch.backends.cudnn.enabled:
        raise UnsupportedLayer(
            "expected convolutions that sum products, got cuDNN, which may choose Winograd or FFT or TF32, whose rounding has no proved bound; "
            "run it inside robustlip.execution.covered_kernels('cuda'), as certify does"
        )
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    nnpack = torch.backends.nnpack.is_available() and torch._C._get_nnpack_enabled()
    if weight.device.type == "cpu" and not onednn and nnpack:
        raise UnsupportedLayer(
            "expected convolutions that sum products, got NNPACK without oneDNN, which may choose Winograd; "
            "run it inside robustlip.execution.covered_kernels('cpu'), as certify does"
        )


def pooled(layer: Mean | Maximum, shape: Shape) -> tuple[int, int, Shape]:
    """(c: how many windows read one entry at most, number of entries of a window, shape after).

    Raises UnsupportedLayer where a window may contain only padding.
    """
    if layer.ceil_mode:
        raise UnsupportedLayer(f"expected {type(layer).__name__} with ceil_mode=False, got True; pad the images instead")
    count = dimensions(layer)
    kernel, stride, padding, dilation = (along(getattr(layer, name, 1), count) for name in ("kernel_size", "stride", "padding", "dilation"))
    if any(d != 1 for d in dilation) and any(padding):
        name = type(layer).__name__
        raise UnsupportedLayer(f"expected {name} with dilation or padding, not both, got both: a window may see only padding; drop one")
    windows = [Windows.along(shape[1 + i], kernel[i], stride[i], dilation[i], padding[i], padding[i]) for i in range(count)]
    return math.prod(w.reads for w in windows), math.prod(kernel), (shape[0], *(w.positions for w in windows))


@dataclass(frozen=True)
class Average:
    """Means of windows of `size` entries, each read by c = `reads` at most: |mean|² ≤ Σ|x|²/n, so the gain is √(c/n) in ℓ2, c/n in ℓ1, 1 in ℓ∞."""

    reads: int
    size: int
    out: Shape

    @classmethod
    def of(cls, layer: Mean, shape: Shape) -> Average:
        """Raises UnsupportedLayer for options that change the windows or the divisor."""
        name = type(layer).__name__
        if isinstance(layer, GLOBAL_MEANS):
            if not is_global(layer):
                raise UnsupportedLayer(f"expected {name}(1), got output_size {layer.output_size}; use the map of other sizes")
            return cls(1, math.prod(shape[1:]), (shape[0], *[1] * len(shape[1:])))
        other = getattr(layer, "divisor_override", None) is not None
        if other or (not layer.count_include_pad and any(along(layer.padding, dimensions(layer)))):
            raise UnsupportedLayer(f"expected {name} that divides by its kernel's size, got another divisor; leave the options at their defaults")
        return cls(*pooled(layer, shape))

    @property
    def gain(self) -> float:
        """‖means‖₂ ≤ this·‖x‖₂."""
        return math.sqrt(self.reads / self.size) * (1 + 1e-15)

    def gain_in(self, space: str) -> float:
        """The gain with both norms in the space."""
        return {"l2": self.gain, "l1": self.reads / self.size * (1 + 1e-15), "linf": 1.0}[space]

    def largest(self, norm: Tensor) -> Tensor:
        """≥ the sum of every window before the division, for ‖x‖₂ ≤ norm."""
        return math.sqrt(self.size) * norm

    def error(self, norm: Tensor, arithmetic: RoundingModel) -> Tensor:
        """‖fl(means) − means‖₂ for ‖x‖₂ ≤ norm: a sum and a division per window."""
        return arithmetic.gamma(self.size + 2) * self.gain * norm + 2 * math.sqrt(math.prod(self.out)) * arithmetic.tiny


def is_global(layer: nn.Module) -> bool:
    """Whether an adaptive mean averages each channel as a whole."""
    size = layer.output_size
    return all(n == 1 for n in (size if isinstance(size, tuple | list) else (size,)))


def maxima_error(out: Shape, arithmetic: RoundingModel) -> float:
    """‖executed − exact‖₂ of maxima of windows: subnormals may be flushed to zero. Nothing else rounds."""
    return 2 * math.sqrt(math.prod(out)) * arithmetic.flushed
