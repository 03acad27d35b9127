"""What the execution of a layer is off by, number by number. docs/theory.md, sections 1 and 9.

A bound of norms (‖fl(y) − y‖₂ for ‖x‖₂ ≤ norm, x of n numbers) is a bound of every single number with n = 1, so elementwise layers, constants, sums
and products ask the functions that the bounds of norms ask. Sums of products have |A||x| in the place of ‖A‖‖x‖.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.layers import Normalize, Scale, Shift
from robustlip.numerics.arithmetic import Arithmetic
from robustlip.numerics.rounding import norm_up
from robustlip.ops.affine import standardize_error
from robustlip.ops.constants import scale_error, scale_gain, shifted
from robustlip.ops.convolution import CONVOLUTIONS, MEANS, TRANSPOSED, check_algorithm
from robustlip.ops.elementwise import Elementwise
from robustlip.ops.joins import product_error, weighted_sum_error
from robustlip.ops.maps import LinearMap, ScaleMap
from robustlip.ops.normalization import BATCH_NORMS, batch_errors
from robustlip.ops.resampling import UPSAMPLES, Resampling, average_of

# (|x| ≤ this (N, n), float64; the arithmetic) → |fl(y) − y| ≤ this (N, m), y the layer's exact output on the executed x.
Errors = Callable[[Tensor, Arithmetic], Tensor]


def is_bounded(layer: nn.Module) -> bool:
    """Whether `errors_of` knows the class of the linear layer."""
    return type(layer) in _LINEAR


def errors_of(layer: nn.Module, op: LinearMap) -> Errors | None:
    """The executed errors of a linear layer whose map is `op`; None where nothing rounds."""
    return _LINEAR[type(layer)](layer, op)


def elementwise_errors(facts: Elementwise, size: Tensor, arithmetic: Arithmetic) -> Tensor:
    """|fl(φ(z)) − φ(z)| for |z| ≤ size, number by number; infinite where execution may overflow."""
    return facts.error(size, 1.0, arithmetic)


def sorting_errors(size: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Of the larger and the smaller of two numbers: nothing rounds, but subnormals may count for zero, or not be told apart."""
    return torch.full_like(size, 2 * arithmetic.flushed)


def product_errors(first: Tensor, second: Tensor, arithmetic: Arithmetic) -> Tensor:
    """|fl(ab) − ab| for |a| ≤ first, |b| ≤ second."""
    return arithmetic.infinite_if_overflow(product_error(first * second, first, second, 1, arithmetic), first * second)


def sum_errors(scalars: list[float], terms: list[Tensor], arithmetic: Arithmetic) -> Tensor:
    """|fl(y) − y| of y = Σ_i a_i·u_i, |u_i| ≤ terms[i], |a_i| = scalars[i]."""
    fresh, size = weighted_sum_error(scalars, terms, 1, arithmetic)
    return arithmetic.infinite_if_overflow(fresh, size)


def constant_errors(value: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Of float64 constants that execution rounds to its dtype; zeros stay."""
    return torch.where(value != 0, arithmetic.unit * value.abs() + arithmetic.tiny + arithmetic.flushed, 0.0)


def _products(op: LinearMap, read: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Of sums of products and a bias, in any order: γ of all roundings times the sum of their sizes; products and subnormal operands may vanish.

    The sum may begin with the bias, as torch's own kernels do: every partial sum rounds at its size.
    """
    size = op.apply(read, absolute=True)
    size = (size if op.bias is None else size + op.bias.abs()) * (1 + 1e-9)
    ones = op.apply(torch.ones_like(read[:1]), absolute=True)
    small = (op.terms + 2) * arithmetic.tiny + arithmetic.flushed * (ones + read.sum(-1, keepdim=True) + 1) * (1 + 1e-9)
    return arithmetic.infinite_if_overflow(arithmetic.gamma(op.terms + 3) * size + small, size)


def _sums(layer: nn.Module, op: LinearMap) -> Errors:
    if type(layer) in (*CONVOLUTIONS, *TRANSPOSED):
        check_algorithm(layer)
    return lambda read, arithmetic: _products(op, read, arithmetic)


def _averages(layer: Any, op: LinearMap) -> Errors | None:
    """Of means of windows as of sums, but that a window is summed before it is divided. Of interpolation, whose weights round, by norms."""
    average = average_of(layer, op.shape)
    if not isinstance(average, Resampling):
        size = average.size

        def means(read: Tensor, arithmetic: Arithmetic) -> Tensor:
            mean = op.apply(read, absolute=True) * (1 + 1e-9)
            return arithmetic.infinite_if_overflow(arithmetic.gamma(size + 3) * mean + 2 * arithmetic.tiny, size * mean)

        return means
    if average.copies:
        return None

    def resampled(read: Tensor, arithmetic: Arithmetic) -> Tensor:
        norm = norm_up(read)[:, None]
        return arithmetic.infinite_if_overflow(average.error(norm, arithmetic), average.largest(norm)).expand(-1, op.outputs)

    return resampled


def _scale(layer: Scale, op: LinearMap) -> Errors:
    smallest, gain = scale_gain(layer)[1], _factors(op) * (1 + 1e-14)

    def scaled(read: Tensor, arithmetic: Arithmetic) -> Tensor:
        return arithmetic.infinite_if_flushed(arithmetic.infinite_if_overflow(scale_error(read, gain, 1, arithmetic), gain * read), smallest)

    return scaled


def _factors(op: LinearMap) -> Tensor:
    assert isinstance(op, ScaleMap)
    return op.weight.abs()


def _shift(layer: Shift, op: LinearMap) -> Errors:
    assert op.bias is not None
    size = op.bias.abs()

    def moved(read: Tensor, arithmetic: Arithmetic) -> Tensor:
        return arithmetic.infinite_if_overflow(*shifted(read, size, 1, arithmetic))

    return moved


def _normalize(layer: Normalize, op: LinearMap) -> Errors:
    assert op.bias is not None
    gain, offset = _factors(op) * (1 + 1e-14), op.bias.abs() * (1 + 1e-14)
    smallest = float(layer.std.double().abs().min())  # type: ignore[operator]

    def standardized(read: Tensor, arithmetic: Arithmetic) -> Tensor:
        size = gain * read + offset
        # The difference is there before it is divided.
        fresh = arithmetic.infinite_if_overflow(standardize_error(size, gain, 1, arithmetic), size * (1 + 1 / gain))
        return arithmetic.infinite_if_flushed(fresh, smallest)

    return standardized


def _batch(layer: Any, op: LinearMap) -> Errors:
    return lambda read, arithmetic: batch_errors(layer, read.reshape(-1, *op.shape), arithmetic).reshape(read.shape)


def _nothing(layer: nn.Module, op: LinearMap) -> None:
    return None


_LINEAR: dict[type, Callable[[Any, LinearMap], Errors | None]] = {
    **dict.fromkeys((nn.Linear, *CONVOLUTIONS, *TRANSPOSED), _sums), **dict.fromkeys((*MEANS, *UPSAMPLES), _averages), Scale: _scale, Shift: _shift,
    Normalize: _normalize, **dict.fromkeys(BATCH_NORMS, _batch), nn.ZeroPad2d: _nothing,
}  # fmt: skip
