"""Convolutions and pools of images: windows, guaranteed constants, what execution loses. docs/theory.md, sections 1, 2 and 3.

All are the same three maps in a row. Padding copies numbers: with a number copied at most m times, ‖pad(x)‖₂ ≤ √m‖x‖₂. Windows copy numbers:
with a number read by at most c windows and taps (padding included), ‖patches(x)‖_F ≤ √c‖x‖₂. Then a matrix, a mean or a maximum acts on each
window. c is a product over the two dimensions, so it is counted along each.

A convolution W without stride, on images already padded to (P, Q), is a part of the rows of the circular one on the torus (P, Q), since no window
wraps; a stride deletes rows. So its operator norm is at most that of the circular convolution, max over frequencies of a norm of an out×in matrix
(Sedghi, Gupta & Long 2019), and also at most √c·‖W as (out, in·kh·kw)‖₂. The second holds for a perturbation E of that matrix as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.numerics.arithmetic import Rounds
from robustlip.numerics.rounding import norm_up
from robustlip.numerics.spectral import spectral_norm_bound, symbol_bound
from robustlip.ops.affine import offset_error

Pair = tuple[int, int]
Shape = tuple[int, int, int]


def pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def padded_from(size: int, before: int, behind: int, mode: str = "zeros") -> Tensor:
    """Which of `size` pixels each pixel of the padded row is a copy of, counted from 1; 0 is padding. mode: as in nn.Conv2d."""
    source = torch.arange(1, size + 1, dtype=torch.float64)[None, None]
    if before or behind:
        source = F.pad(source, (before, behind), mode={"zeros": "constant"}.get(mode, mode))
    return source[0, 0].long()


@dataclass(frozen=True)
class Windows:
    """How windows slide along one dimension. positions: how many; reads, copies: how often one number is read by windows, or copied by padding."""

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
    """(C, H, W) of the images in front of the layer. Raises BadInput where samples are none, or nothing is known of their shape (None)."""
    if whole is None or len(whole) != 3:
        name = type(layer).__name__
        raise BadInput(f"expected images (N, C, H, W) in front of {name}, got vectors or tokens; put it in front of Flatten and Patchify")
    return whole[0], whole[1], whole[2]


@dataclass(frozen=True)
class Convolution:
    """Guaranteed constants of one Conv2d on images of one size."""

    gain: float  # ℓ2 → ℓ2, of the weights as they are
    from_linf: float
    from_l1: float
    matrix: float  # ‖W as (out, in·kh·kw)‖₂, which a relative WeightBall is measured by
    reach: float  # √c: what a perturbation's matrix norm is multiplied by
    frobenius: float  # of one group, the largest
    bias: float | None  # ℓ2 norm of what is added, None where nothing is
    terms: int
    rank: float  # √rank of the matrix of one group
    out: Shape

    @classmethod
    def of(cls, layer: nn.Conv2d, shape: Shape) -> Convolution:
        weight = layer.weight.detach()
        groups, (kh, kw) = layer.groups, weight.shape[2:]
        dilation, stride = pair(layer.dilation), pair(layer.stride)
        (top, bottom), (left, right) = (sides(layer, i, weight.shape[2 + i]) for i in (0, 1))
        mode = layer.padding_mode
        rows = Windows.along(shape[1], kh, stride[0], dilation[0], top, bottom, mode)
        columns = Windows.along(shape[2], kw, stride[1], dilation[1], left, right, mode)
        reach = math.sqrt(rows.reads * columns.reads) * (1 + 1e-15)
        copies = rows.copies * columns.copies
        grouped = weight.unflatten(0, (groups, -1))  # (G, out/G, in/G, kh, kw): groups act on channels of their own
        matrices = spectral_norm_bound(grouped.flatten(2))
        symbols = [float(symbol_bound(w, (rows.padded, columns.padded), dilation)) * math.sqrt(copies) for w in grouped]
        circular = max(symbols) * (1 + 1e-15)
        if mode == "circular" and all(
            padded - d * (k - 1) <= size
            for padded, d, k, size in zip((rows.padded, columns.padded), dilation, (kh, kw), shape[1:], strict=True)
        ):
            # No more outputs than pixels: they are rows of the circular convolution of the image itself, each at most once.
            circular = max(float(symbol_bound(w, (shape[1], shape[2]), dilation)) for w in grouped)
        gain = min(circular, float(matrices.amax()) * reach)
        positions = rows.positions * columns.positions
        sums = norm_up(weight.double().abs().flatten(1).sum(-1), 0)  # |W| on pixels of size 1, padded by 0 or copies
        by_rows = float(sums) * math.sqrt(positions) * (1 + 1e-12)
        # A unit input at one pixel, copied at most `copies` times; each copy meets every tap at most once.
        column = float(norm_up(grouped.movedim(2, 1).flatten(2)).amax()) * copies
        bias = None if layer.bias is None else float(norm_up(layer.bias.detach(), 0)) * math.sqrt(positions) * (1 + 1e-15)
        return cls(
            gain=gain,
            from_linf=min(by_rows, gain * math.sqrt(math.prod(shape)) * (1 + 1e-15)),
            from_l1=min(column, gain),
            matrix=float(spectral_norm_bound(weight.flatten(1))),
            reach=reach,
            frobenius=float(norm_up(grouped.flatten(1)).amax()),
            bias=bias,
            terms=weight[0].numel(),
            rank=math.sqrt(min(weight.shape[0] // groups, weight[0].numel())),
            out=(weight.shape[0], rows.positions, columns.positions),
        )

    @property
    def shift(self) -> float:
        """‖bias‖₂ of all that is added, 0 without one."""
        return 0.0 if self.bias is None else self.bias

    def gain_from(self, space: str) -> float:
        """‖Ax‖₂ ≤ this·‖x‖, the norm of x that of the space: 'l1', 'l2' or 'linf'."""
        return {"linf": self.from_linf, "l1": self.from_l1, "l2": self.gain}[space]

    def perturbed_frobenius(self, change: Tensor | float) -> Tensor | float:
        """≥ the norm of |W + E| as a convolution, for a convolution E of norm at most `change`: √c(‖W‖_F + √rank‖E as a matrix‖₂)."""
        return self.reach * self.frobenius + self.rank * change

    def largest(self, norm: Tensor, change: Tensor | float) -> Tensor:
        """≥ every partial sum of every number behind, for ‖x‖₂ ≤ norm."""
        return self.perturbed_frobenius(change) * norm + self.shift

    def error(self, norm: Tensor, change: Tensor | float, arithmetic: Rounds) -> Tensor:
        """‖fl((W + E)*x + b) − ((W + E)*x + b)‖₂ for executed ‖x‖₂ ≤ norm and a convolution E of norm at most `change`.

        γ_n|W + E|*|x| in any order of summation, underflow of products and subnormal operands, and the sum with the bias.
        """
        frobenius, width = self.perturbed_frobenius(change), math.prod(self.out)
        lost = (self.terms + frobenius * math.sqrt(self.terms)) * math.sqrt(width) * arithmetic.tiny  # products that vanish
        fresh = arithmetic.gamma(self.terms) * frobenius * norm + lost
        fresh = fresh + math.sqrt(self.terms) * math.sqrt(width) * norm * arithmetic.flushed  # subnormal weights
        if self.bias is not None:
            fresh = fresh + offset_error(self.bias, frobenius * norm, self.terms, width, arithmetic)
        return fresh


def sides(layer: nn.Conv2d, i: int, kernel: int) -> Pair:
    """(before, after): how much dimension i of the images is padded; torch puts the odd one of 'same' behind."""
    if layer.padding == "same":
        total = pair(layer.dilation)[i] * (kernel - 1)
        return total // 2, total - total // 2
    before = 0 if isinstance(layer.padding, str) else pair(layer.padding)[i]  # 'valid'
    return before, before


def check_algorithm(layer: nn.Conv2d) -> None:
    """Raises UnsupportedLayer where torch may choose Winograd or FFT, whose rounding no rule here bounds."""
    if layer.weight.device.type == "cuda" and torch.backends.cudnn.enabled:
        raise UnsupportedLayer(
            "expected convolutions that sum products, got cuDNN, which may choose Winograd or FFT or TF32, whose rounding has no proved bound; "
            "run it inside robustlip.execution.covered('cuda'), as certify does"
        )
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    nnpack = torch.backends.nnpack.is_available() and torch._C._get_nnpack_enabled()
    if layer.weight.device.type == "cpu" and not onednn and nnpack:
        raise UnsupportedLayer(
            "expected convolutions that sum products, got NNPACK without oneDNN, which may choose Winograd; "
            "run it inside robustlip.execution.covered('cpu'), as certify does"
        )


def pooled(layer: nn.AvgPool2d | nn.MaxPool2d, shape: Shape) -> tuple[int, int, Shape]:
    """(c: how many windows read one number at most, numbers in a window, shape behind).

    Raises UnsupportedLayer where windows may see only padding.
    """
    if layer.ceil_mode:
        raise UnsupportedLayer(f"expected {type(layer).__name__} with ceil_mode=False, got True; pad the images instead")
    kernel, stride, padding = pair(layer.kernel_size), pair(layer.stride), pair(layer.padding)
    dilation = pair(getattr(layer, "dilation", 1))
    if dilation != (1, 1) and padding != (0, 0):
        name = type(layer).__name__
        raise UnsupportedLayer(f"expected {name} with dilation or padding, not both, got both: a window may see only padding; drop one")
    rows, columns = (Windows.along(shape[1 + i], kernel[i], stride[i], dilation[i], padding[i], padding[i]) for i in (0, 1))
    return rows.reads * columns.reads, kernel[0] * kernel[1], (shape[0], rows.positions, columns.positions)


@dataclass(frozen=True)
class Average:
    """Means of windows of `size` numbers, each number read at most `reads` times: |mean|² ≤ Σ|x|²/n, so √(c/n) in ℓ2, c/n in ℓ1, 1 in ℓ∞."""

    reads: int
    size: int
    out: Shape

    @classmethod
    def of(cls, layer: nn.AvgPool2d | nn.AdaptiveAvgPool2d, shape: Shape) -> Average:
        """Raises UnsupportedLayer for options that other windows come of."""
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            if layer.output_size not in (1, (1, 1), [1, 1]):
                raise UnsupportedLayer(f"expected AdaptiveAvgPool2d(1), got output_size {layer.output_size}; use AvgPool2d for other sizes")
            return cls(1, shape[1] * shape[2], (shape[0], 1, 1))
        if layer.divisor_override is not None or (not layer.count_include_pad and pair(layer.padding) != (0, 0)):
            raise UnsupportedLayer("expected AvgPool2d that divides by its kernel's size, got another divisor; leave the options at their defaults")
        return cls(*pooled(layer, shape))

    @property
    def gain(self) -> float:
        """‖means‖₂ ≤ this·‖x‖₂."""
        return math.sqrt(self.reads / self.size) * (1 + 1e-15)

    def gain_in(self, space: str) -> float:
        """The same with both norms those of the space."""
        return {"l2": self.gain, "l1": self.reads / self.size * (1 + 1e-15), "linf": 1.0}[space]

    def largest(self, norm: Tensor) -> Tensor:
        """≥ the sum of every window, before it is divided, for ‖x‖₂ ≤ norm."""
        return math.sqrt(self.size) * norm

    def error(self, norm: Tensor, arithmetic: Rounds) -> Tensor:
        """‖fl(means) − means‖₂ for ‖x‖₂ ≤ norm: a sum and a division a window."""
        return arithmetic.gamma(self.size + 2) * self.gain * norm + 2 * math.sqrt(math.prod(self.out)) * arithmetic.tiny


def maxima_error(out: Shape, arithmetic: Rounds) -> float:
    """‖executed − exact‖₂ of maxima of windows: subnormals count for zero, or are not told apart. Nothing else rounds."""
    return 2 * math.sqrt(math.prod(out)) * arithmetic.flushed
