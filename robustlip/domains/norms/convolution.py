"""Convolution and pooling of images. docs/theory.md, sections 1, 2 and 3.

All are the same three maps in a row. Padding copies numbers: with a number copied at most m times, ‖pad(x)‖₂ ≤ √m‖x‖₂. Windows copy numbers:
with a number read by at most c windows and taps (padding included), ‖patches(x)‖_F ≤ √c‖x‖₂. Then a matrix, a mean or a maximum acts on each
window. c is a product over the two dimensions, so it is counted along each.

A convolution W without stride, on images already padded to (P, Q), is a part of the rows of the circular one on the torus (P, Q), since no window
wraps; a stride deletes rows. So its operator norm is at most that of the circular convolution, max over frequencies of a norm of an out×in matrix
(Sedghi, Gupta & Long 2019), and also at most √c·‖W as (out, in·kh·kw)‖₂. The second holds for a perturbation E of that matrix as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.domains.norms.state import Context, Rule, State, register
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.numerics.rounding import norm_up
from robustlip.numerics.spectral import spectral_norm_bound, symbol_bound

Pair = tuple[int, int]


def pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


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
        source = torch.arange(1, size + 1, dtype=torch.float64)[None, None]  # 0 is padding
        if left or right:
            source = F.pad(source, (left, right), mode={"zeros": "constant"}.get(mode, mode))
        source = source[0, 0].long()
        padded = len(source)
        positions = (padded - dilation * (kernel - 1) - 1) // stride + 1
        if positions < 1:
            raise BadInput(f"expected images at least as large as the kernel, got {size} pixels for one of {kernel}; use larger images")
        taken = source[torch.arange(positions)[:, None] * stride + torch.arange(kernel) * dilation]

        def most(index: Tensor) -> int:
            counts = torch.bincount(index.flatten(), minlength=size + 1)[1:]
            return int(counts.max())

        return cls(positions, most(taken), most(source), padded)


def image_shape(layer: nn.Module, state: State) -> tuple[int, int, int]:
    """(C, H, W) of the images in front of the layer. Raises BadInput where the state does not know them."""
    if state.whole is None or len(state.whole) != 3:
        name = type(layer).__name__
        raise BadInput(f"expected images (N, C, H, W) in front of {name}, got vectors or tokens; put it in front of Flatten and Patchify")
    return state.whole[0], state.whole[1], state.whole[2]


@dataclass(frozen=True)
class Convolution:
    """Guaranteed constants of one Conv2d on images of one size."""

    gain: float  # ℓ2 → ℓ2, of the weights as they are
    from_linf: float
    from_l1: float
    matrix: float  # ‖W as (out, in·kh·kw)‖₂, which a relative WeightBall is measured by
    reach: float  # √c: what a perturbation's matrix norm is multiplied by
    frobenius: float  # of one group, the largest
    bias: float
    terms: int
    out: tuple[int, int, int]

    @classmethod
    def of(cls, layer: nn.Conv2d, shape: tuple[int, int, int]) -> Convolution:
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
        bias = 0.0 if layer.bias is None else float(norm_up(layer.bias.detach(), 0)) * math.sqrt(positions) * (1 + 1e-15)
        return cls(
            gain=gain,
            from_linf=min(by_rows, gain * math.sqrt(math.prod(shape)) * (1 + 1e-15)),
            from_l1=min(column, gain),
            matrix=float(spectral_norm_bound(weight.flatten(1))),
            reach=reach,
            frobenius=float(norm_up(grouped.flatten(1)).amax()),
            bias=bias,
            terms=weight[0].numel(),
            out=(weight.shape[0], rows.positions, columns.positions),
        )


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


@register(nn.Conv2d)
class Conv2dRule(Rule):
    """y = W*x + b on images; see the module's text. Any stride, dilation, groups and padding mode."""

    def step(self, layer: nn.Conv2d, state: State, context: Context) -> State:
        shape = image_shape(layer, state)
        check_algorithm(layer)
        key = f"convolution-{shape}-{layer.stride}-{layer.padding}-{layer.dilation}-{layer.groups}-{layer.padding_mode}"
        c: Convolution = context.constant(layer, key, lambda: Convolution.of(layer, shape))
        gain = {"linf": c.from_linf, "l1": c.from_l1, "l2": c.gain}[state.space]
        perturbed = context.weight_change(c.matrix) * c.reach
        # |W| as a convolution has norm at most √c·‖W‖_F; a perturbed matrix E adds √rank·‖E‖₂ to that.
        rank = math.sqrt(min(c.out[0] // layer.groups, c.terms))
        frobenius = c.reach * c.frobenius + rank * perturbed
        norm = (c.gain + perturbed) * state.norm + c.bias
        width = math.prod(c.out)
        fresh = context.gamma(c.terms) * frobenius * state.norm + (c.terms + frobenius * math.sqrt(c.terms)) * math.sqrt(width) * context.tiny
        fresh = fresh + math.sqrt(c.terms) * math.sqrt(width) * state.norm * context.flushed  # subnormal weights
        if layer.bias is not None:
            fresh = fresh + 2 * context.unit * (norm + fresh)
        behind = replace(
            state,
            norm=norm + fresh,
            change=gain * state.change + perturbed * state.norm,
            rounding=(c.gain + perturbed) * state.rounding + fresh,
            space="l2",
            width=width,
            whole=c.out,
        )
        return context.finite(behind, frobenius * state.norm + c.bias)


def pooled(layer: nn.AvgPool2d | nn.MaxPool2d, state: State) -> tuple[int, int, tuple[int, int, int]]:
    """(c: how many windows read one number at most, numbers in a window, shape behind)."""
    shape = image_shape(layer, state)
    if layer.ceil_mode:
        raise UnsupportedLayer(f"expected {type(layer).__name__} with ceil_mode=False, got True; pad the images instead")
    kernel, stride, padding = pair(layer.kernel_size), pair(layer.stride), pair(layer.padding)
    dilation = pair(getattr(layer, "dilation", 1))
    if dilation != (1, 1) and padding != (0, 0):
        name = type(layer).__name__
        raise UnsupportedLayer(f"expected {name} with dilation or padding, not both, got both: a window may see only padding; drop one")
    rows, columns = (Windows.along(shape[1 + i], kernel[i], stride[i], dilation[i], padding[i], padding[i]) for i in (0, 1))
    return rows.reads * columns.reads, kernel[0] * kernel[1], (shape[0], rows.positions, columns.positions)


@register(nn.AvgPool2d)
class AvgPool2dRule(Rule):
    """Each window's mean, padding counted as 0: |mean|² ≤ Σ|x|²/n, and each number is read c times, so √(c/n) in ℓ2, c/n in ℓ1, 1 in ℓ∞."""

    def step(self, layer: nn.AvgPool2d, state: State, context: Context) -> State:
        if layer.divisor_override is not None or (not layer.count_include_pad and pair(layer.padding) != (0, 0)):
            raise UnsupportedLayer("expected AvgPool2d that divides by its kernel's size, got another divisor; leave the options at their defaults")
        reads, size, out = pooled(layer, state)
        return averaged(state, context, reads, size, out)


@register(nn.AdaptiveAvgPool2d)
class AdaptiveAvgPool2dRule(Rule):
    """The mean of each channel: one window."""

    def step(self, layer: nn.AdaptiveAvgPool2d, state: State, context: Context) -> State:
        channels, height, width = image_shape(layer, state)
        if layer.output_size not in (1, (1, 1), [1, 1]):
            raise UnsupportedLayer(f"expected AdaptiveAvgPool2d(1), got output_size {layer.output_size}; use AvgPool2d for other sizes")
        return averaged(state, context, 1, height * width, (channels, 1, 1))


def averaged(state: State, context: Context, reads: int, size: int, out: tuple[int, int, int]) -> State:
    """Means of windows of `size` numbers, each number read at most `reads` times."""
    two = math.sqrt(reads / size) * (1 + 1e-15)
    gain = {"l2": two, "l1": reads / size * (1 + 1e-15), "linf": 1.0}[state.space]
    width = math.prod(out)
    fresh = context.gamma(size + 2) * two * state.norm + 2 * math.sqrt(width) * context.tiny
    behind = replace(
        state, norm=two * state.norm + fresh, change=gain * state.change, rounding=two * state.rounding + fresh, width=width, whole=out
    )
    return context.finite(behind, math.sqrt(size) * state.norm)  # the sum of a window, before it is divided


@register(nn.MaxPool2d)
class MaxPool2dRule(Rule):
    """|max x' − max x| ≤ max|x' − x| over each window, each number is read c times: √c in ℓ2, c in ℓ1, 1 in ℓ∞. Padding is never the maximum."""

    def step(self, layer: nn.MaxPool2d, state: State, context: Context) -> State:
        if layer.return_indices:
            raise UnsupportedLayer("expected MaxPool2d that returns its maxima only, got return_indices=True; leave it at False")
        reads, _, out = pooled(layer, state)
        root = math.sqrt(reads) * (1 + 1e-15)
        gain = {"l2": root, "l1": float(reads), "linf": 1.0}[state.space]
        return replace(
            state, norm=root * state.norm, change=gain * state.change, width=math.prod(out), whole=out,
            rounding=root * state.rounding + 2 * math.sqrt(math.prod(out)) * context.flushed,  # subnormals count for zero, or are not told apart
        )  # fmt: skip
