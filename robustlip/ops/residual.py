"""Sums of branches that cancel: y = βx + αG f(Hx + b), and sums of affine branches, such as x + conv(x). docs/theory.md, section 3.

The triangle inequality gives |β| + |α|‖G‖‖H‖ sup|f'|, which is 3 for an SLL block and 1 is true. Of two inputs the difference of f is S times that of
its arguments, S diagonal with entries in the slopes [lo, hi] of f, so the difference of y is (βI + αGSH) times that of x. For any diagonal Λ and
E = αGᵀ + ΛH, whatever the class of the block, αG = −HᵀΛ + Eᵀ and
    βI + αGSH = βI − HᵀΛSH + EᵀSH.
With h = max(hi, 0), l = max(−lo, 0), Λ = Λ⁺ − Λ⁻: −(lΛ⁺ + hΛ⁻) ≼ ΛS ≼ hΛ⁺ + lΛ⁻, so with P ≥ ‖√Λ⁺H‖², Q ≥ ‖√Λ⁻H‖² the symmetric part βI − HᵀΛSH
has its eigenvalues between β − hP − lQ and β + lP + hQ. The block's constant is the larger size of these two, plus sup|f'|·‖E‖‖H‖.
Λ is the least-squares fit row by row, λ_n = −α⟨g_n, h_n⟩/‖h_n‖², g_n and h_n the rows of Gᵀ and H. It is chosen; E is what it leaves, as it is.

Matrices, and convolutions as kernels: with stride 1 those of a convolution and of a transposed one alike, around their middle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.layers import Scale, Shift, Sum
from robustlip.numerics.rounding import U64, norm_up
from robustlip.numerics.spectral import spectral_norm_bound
from robustlip.ops import elementwise_of, is_elementwise
from robustlip.ops.convolution import CONVOLUTIONS, TRANSPOSED, Convolution, along, dimensions, transposed_out, windows_of

# Numbers of a kernel or matrix, at most: larger blocks have the triangle inequality.
LARGEST = 2**24
# Branches of which a fit leaves more than this fraction are none that cancel: weights drawn at random leave √(1 − 1/C).
CANCELS = 0.9
# What E may add to a constant by its Frobenius norm: more is worth a spectral one.
SMALL = 1e-6
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Kernel:
    """A linear map by a kernel (out, in, *k), float64, that slides over samples; k is () of a matrix.

    front: shape of samples in front, (in, *sizes). stride, padding: by dimension, 1 and the middle of the kernel where `centred`.
    off: each entry is off by at most this fraction of itself.
    """

    kernel: Tensor
    front: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    off: float = 0.0

    def norms(self, kernel: Tensor) -> tuple[float, float]:
        """(≥ the ℓ2 norm of the map with another kernel of this geometry, what a Frobenius norm of a kernel is multiplied by for one of its map)."""
        if kernel.dim() == 2:
            return float(spectral_norm_bound(kernel)), 1.0
        made: Any = CONVOLUTIONS[kernel.dim() - 3]
        layer = made(kernel.shape[1], kernel.shape[0], tuple(kernel.shape[2:]), self.stride, self.padding, bias=False, device="meta")
        layer.weight = nn.Parameter(kernel, requires_grad=False)
        found = Convolution.of(layer, self.front)
        return found.gain, found.window_gain

    def scaled(self, out: Tensor | None = None, front: Tensor | None = None) -> Kernel:
        """With factors by channel behind, or in front."""
        view = [1] * (self.kernel.dim() - 2)
        kernel = self.kernel
        kernel = kernel if out is None else kernel * out.view(-1, 1, *view)
        kernel = kernel if front is None else kernel * front.view(1, -1, *view)
        return replace(self, kernel=kernel, off=self.off + 4 * U64)

    def fits(self, other: Kernel) -> bool:
        return (self.kernel.shape, self.front, self.stride, self.padding) == (other.kernel.shape, other.front, other.stride, other.padding)


def together(layer: Sum, whole: tuple[int, ...] | None, width: int) -> float:
    """A Lipschitz constant in ℓ2 of a sum of branches on samples of shape `whole`, or on tokens of that width; infinite where this says nothing."""
    shape = whole or (width,)
    skip, linear, bent = 0.0, [], []
    for weight, branch in zip(layer.weights, layer.branches, strict=True):
        layers = _layers(branch)
        if not layers:
            skip += weight
        elif any(is_elementwise(part) for part in layers):
            bent.append((weight, layers))
        else:
            linear.append((weight, layers))
    if len(bent) == 1 and not linear:
        return _bent(skip, *bent[0], shape)
    return _linear(skip, linear, shape) if linear and not bent else math.inf


def _layers(branch: nn.Module) -> list[nn.Module]:
    """The layers of a branch one after the other; what changes nothing, or by a constant, is left out."""
    if type(branch) is nn.Sequential:
        return [part for inner in branch for part in _layers(inner)]
    changes = type(branch) not in (*_NOTHING, Shift) or (getattr(branch, "training", False) and getattr(branch, "p", 0.0) > 0)
    return [branch] if changes else []


def _factors(layer: Scale, shape: tuple[int, ...]) -> Tensor | None:
    """The factors of a Scale by channel (C,), None where places differ."""
    value = layer.value.detach().double()
    while value.dim() > len(shape):
        if len(value) != 1:
            return None
        value = value[0]
    channels = shape[0]
    if value.dim() == 1 and (len(value) == 1 or len(shape) in (1, 3)):
        found = value.expand(channels) if len(value) in (1, channels) else None
    else:
        sizes = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
        found = value.reshape(-1).expand(channels) if sizes[0] in (1, channels) and math.prod(sizes) == sizes[0] else None
    return None if found is None else 1 / found if layer.divide else found


def _kernel(layers: Sequence[nn.Module], shape: tuple[int, ...]) -> tuple[Kernel, tuple[int, ...]] | None:
    """(the map of one Linear layer or convolution and factors around it, the shape behind it), None for other layers."""
    found: Kernel | None = None
    front = torch.ones(shape[0], dtype=torch.float64)
    count = 0  # of factors in front
    for layer in layers:
        if type(layer) is Scale:
            factors = _factors(layer, shape)
            if factors is None:
                return None
            if found is None:
                front, count = front.to(factors.device) * factors, count + 1
            else:
                found = found.scaled(out=factors)
            continue
        if found is not None:
            return None
        made = _matrix(layer, shape) if isinstance(layer, nn.Linear) else _convolution(layer, shape)
        if made is None:
            return None
        found, shape = made
        if count:
            found = replace(found.scaled(front=front), off=4 * (count + 1) * U64)
    return None if found is None else (found, shape)


def _matrix(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Kernel, tuple[int, ...]] | None:
    if type(layer) is not nn.Linear or len(shape) != 1 or shape[0] != layer.in_features or layer.weight.numel() > LARGEST:
        return None
    return Kernel(layer.weight.detach().double(), shape), (layer.out_features,)


def _convolution(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Kernel, tuple[int, ...]] | None:
    """A convolution or a transposed one of stride 1, zeros around it, around its middle; a convolution of another stride as it is."""
    if not isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) or type(layer) not in (*CONVOLUTIONS, *TRANSPOSED) or layer.padding_mode != "zeros":
        return None
    count = dimensions(layer)
    if len(shape) != count + 1 or isinstance(layer.padding, str):
        return None
    stride, padding, dilation = (along(value, count) for value in (layer.stride, layer.padding, layer.dilation))
    turned = type(layer) in TRANSPOSED
    if layer.weight.numel() * layer.groups * math.prod(dilation) > LARGEST or (turned and any(n != 1 for n in stride)):
        return None
    if turned:
        out = transposed_out(layer, shape)  # type: ignore[arg-type]
    else:
        if layer.in_channels != shape[0]:
            return None
        out = (layer.out_channels, *(w.positions for w in windows_of(layer, shape)))  # type: ignore[arg-type]
    kernel = _full(layer.weight.detach().double(), layer.groups)
    if turned:
        # y[o, p] = Σ x[i, q]·w[i, o, p + pad − q·d…]: as a convolution, the kernel turned round, padded by what is left of it.
        kernel = kernel.transpose(0, 1).flip(list(range(2, 2 + count)))
        padding = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel.shape[2:], padding, strict=True))
    if any(n != 1 for n in dilation):
        wide = kernel.new_zeros(*kernel.shape[:2], *(d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[2:], strict=True)))
        wide[(slice(None), slice(None), *(slice(None, None, d) for d in dilation))] = kernel
        kernel = wide
    if all(n == 1 for n in stride):
        if out[1:] != shape[1:]:
            return None
        kernel = _centred(kernel, padding)
        padding = tuple(k // 2 for k in kernel.shape[2:])
    elif min(padding) < 0:
        return None
    return (Kernel(kernel, shape, stride, padding), out) if kernel.numel() <= LARGEST else None


def _full(weight: Tensor, groups: int) -> Tensor:
    """The weight of a convolution in groups, (out, in/groups, …) or transposed (in, out/groups, …), with zeros between groups."""
    if groups == 1:
        return weight
    whole = weight.new_zeros(weight.shape[0], weight.shape[1] * groups, *weight.shape[2:])
    for i, part in enumerate(weight.chunk(groups)):
        whole[i * len(part) : (i + 1) * len(part), i * weight.shape[1] : (i + 1) * weight.shape[1]] = part
    return whole


def _centred(kernel: Tensor, padding: tuple[int, ...], at_least: tuple[int, ...] = ()) -> Tensor:
    """The kernel with zeros around it, so that its middle reads the very place it writes. padding: how far it begins in front of that place."""
    reach = [max(p, k - 1 - p, m) for k, p, m in zip(kernel.shape[2:], padding, at_least or (0,) * len(padding), strict=True)]
    sides = [n for k, p, m in zip(kernel.shape[2:], padding, reach, strict=True) for n in (m - p, m - (k - 1 - p))]
    # The last dimension comes first.
    pairs = [sides[2 * i : 2 * i + 2] for i in reversed(range(len(reach)))]
    return F.pad(kernel, [n for pair in pairs for n in pair])


def _widened(kernels: list[Kernel]) -> list[Kernel]:
    """Centred kernels, as wide as the widest."""
    if kernels[0].kernel.dim() == 2 or any(n != 1 for k in kernels for n in k.stride):
        return kernels
    reach = tuple(max(sizes) for sizes in zip(*(k.padding for k in kernels), strict=True))
    return [replace(k, kernel=_centred(k.kernel, k.padding, reach), padding=reach) for k in kernels]


def _linear(skip: float, branches: list[tuple[float, list[nn.Module]]], shape: tuple[int, ...]) -> float:
    """Of βx + Σ_i α_i A_i x + const."""
    made = [_kernel(layers, shape) for _, layers in branches]
    known = [m for m in made if m is not None]
    if len(known) < len(made) or any(out != known[0][1] for _, out in known) or (skip and known[0][1] != shape):
        return math.inf
    kernels = _widened([kernel for kernel, _ in known])
    first = kernels[0]
    if any(not first.fits(k) for k in kernels) or (skip and any(n != 1 for n in first.stride)):
        return math.inf
    total, sizes = torch.zeros_like(first.kernel), torch.zeros_like(first.kernel)
    for (weight, _), k in zip(branches, kernels, strict=True):
        total, sizes = total + weight * k.kernel, sizes + abs(weight) * k.kernel.abs() * (1 + k.off / U64)
    if skip:
        middle: tuple[slice | int, ...] = (slice(None), slice(None), *(n // 2 for n in first.kernel.shape[2:]))
        eye = skip * torch.eye(shape[0], dtype=torch.float64, device=total.device)
        total[middle], sizes[middle] = total[middle] + eye, sizes[middle] + eye.abs()
    gain, reach = first.norms(total)
    lost = 4 * (len(branches) + 2) * U64 * reach * float(norm_up(sizes.flatten(), 0))
    return (gain + lost) * (1 + 1e-12)


def _bent(skip: float, weight: float, layers: list[nn.Module], shape: tuple[int, ...]) -> float:
    """Of βx + αG f(Hx + b), f one elementwise function."""
    at = [i for i, layer in enumerate(layers) if is_elementwise(layer)]
    if len(at) != 1:
        return math.inf
    before = _kernel(layers[: at[0]], shape)
    behind = None if before is None else _kernel(layers[at[0] + 1 :], before[1])
    if before is None or behind is None or behind[1] != shape:
        return math.inf
    inner = before[0]
    turned = _adjoint(behind[0], shape)
    if turned is None:
        return math.inf
    inner, turned = _widened([inner, turned])
    if not inner.fits(turned):
        return math.inf
    facts = elementwise_of(layers[at[0]])
    low, high = (slope / facts.divisor for slope in facts.slope)
    h, l, steepest = max(high, 0.0), max(-low, 0.0), facts.steepest / facts.divisor
    rows, others = inner.kernel, weight * turned.kernel  # (n, C, …) both
    each = tuple(range(1, rows.dim()))
    squares = rows.square().sum(each)
    fit = torch.where(squares > 0, -(rows * others).sum(each) / squares.clamp_min(1e-300), 0.0)
    fit = torch.where(fit.isfinite(), fit, 0.0).view(-1, *[1] * len(each))
    rest = others + fit * rows
    if not _quick(inner, rest) < CANCELS * _quick(inner, others):
        return math.inf
    off = max(inner.off, turned.off) + 8 * U64

    def norm(kernel: Tensor, size: Tensor) -> float:
        """≥ the norm of what the kernel stands for, each entry off by at most `off` of `size`."""
        gain, reach = inner.norms(kernel)
        return (gain + off * reach * float(norm_up(size.flatten(), 0))) * (1 + 1e-12)

    up = [norm(k, k) ** 2 * (1 + 1e-12) if bool((k != 0).any()) else 0.0 for k in (s.clamp_min(0.0).sqrt() * rows for s in (fit, -fit))]
    ends = skip - h * up[0] - l * up[1], skip + l * up[0] + h * up[1]
    size = others.abs() + (fit * rows).abs()
    left = _quick(inner, rest.abs() + off * size) * _quick(inner, rows * (1 + off))
    if left > SMALL:
        left = norm(rest, size) * norm(rows, rows)
    return (max(abs(end) for end in ends) + steepest * left) * (1 + 1e-12)


def _quick(geometry: Kernel, kernel: Tensor) -> float:
    """≥ the norm of the map with this kernel, by its Frobenius norm."""
    reach = 1.0
    if kernel.dim() > 2:
        reach = math.sqrt(math.prod(-(-k // s) for k, s in zip(kernel.shape[2:], geometry.stride, strict=True)))
    return reach * float(norm_up(kernel.flatten(), 0)) * (1 + 1e-12)


def _adjoint(kernel: Kernel, shape: tuple[int, ...]) -> Kernel | None:
    """The transposed map of a matrix or of a convolution of stride 1, whose samples in front have `shape`."""
    turned = kernel.kernel.transpose(0, 1)
    if turned.dim() == 2:
        return replace(kernel, kernel=turned, front=shape)
    if any(n != 1 for n in kernel.stride):
        return None
    return replace(kernel, kernel=turned.flip(list(range(2, turned.dim()))), front=shape)
