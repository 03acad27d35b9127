"""Execution errors of matrices and tables: y = (W + E)x + b. docs/theory.md, section 3."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from robustlip.numerics.arithmetic import RoundingModel
from robustlip.numerics.rounding import norm_up
from robustlip.numerics.spectral import spectral_norm_bound


def offset_error(bias: Tensor | float, size: Tensor, terms: int, width: int, arithmetic: RoundingModel) -> Tensor:
    """The part of ‖fl(Ax + b) − (Ax + b)‖₂ that is due to the bias, for `width` entries of `terms` products each, ‖b‖₂ ≤ bias, ‖|A||x|‖₂ ≤ size.

    The sum may begin with the bias, as in torch's own kernels, so that every partial sum includes it: γ of terms + 1 for the whole sum, where Ax
    alone has γ of terms. A subnormal bias may be flushed to zero.
    """
    return arithmetic.gamma(terms + 2) * bias + 2 * arithmetic.unit * size + math.sqrt(width) * arithmetic.flushed


@dataclass(frozen=True)
class Matrix:
    """Guaranteed norms of a weight matrix (fan_out, fan_in), rounded up: spectral, Frobenius."""

    sigma: float
    frobenius: float
    fan_out: int
    fan_in: int

    @classmethod
    def of(cls, weight: Tensor) -> Matrix:
        return cls(float(spectral_norm_bound(weight)), float(norm_up(weight.detach().flatten(), 0)), *weight.shape)

    def largest(self, norm: Tensor, change: Tensor | float) -> Tensor:
        """≥ every partial sum of every entry of (W + E)x for ‖x‖₂ ≤ norm and ‖E‖₂ ≤ change: ‖W + E‖_F‖x‖₂."""
        return self.perturbed_frobenius(change) * norm

    def perturbed_frobenius(self, change: Tensor | float) -> Tensor | float:
        """‖W + E‖_F for ‖E‖₂ ≤ change."""
        return self.frobenius + math.sqrt(min(self.fan_out, self.fan_in)) * change

    def rounding(self, norm: Tensor, change: Tensor | float, arithmetic: RoundingModel) -> Tensor:
        """‖fl((W + E)x) − (W + E)x‖₂ ≤ γ_n‖W + E‖_F‖x‖₂ for ‖x‖₂ ≤ norm, ‖E‖₂ ≤ change, any order of summation; underflow added."""
        frobenius = self.perturbed_frobenius(change)
        # Products may underflow, and a processor may flush subnormal inputs and weights to zero.
        lost = (self.fan_in + frobenius * math.sqrt(self.fan_in)) * math.sqrt(self.fan_out) * arithmetic.tiny
        lost = lost + math.sqrt(self.fan_in * self.fan_out) * norm * arithmetic.flushed
        return arithmetic.gamma(self.fan_in) * frobenius * norm + lost

    def error(self, bias: float | None, norm: Tensor, change: Tensor | float, arithmetic: RoundingModel) -> Tensor:
        """‖fl((W + E)x + b) − ((W + E)x + b)‖₂ for executed ‖x‖₂ ≤ norm, ‖E‖₂ ≤ change. bias: ‖b‖₂, None without one."""
        fresh = self.rounding(norm, change, arithmetic)
        if bias is not None:
            fresh = fresh + offset_error(bias, self.largest(norm, change), self.fan_in, self.fan_out, arithmetic)
        return fresh


def row_error(row: Tensor | float, bias: float, norm: Tensor, width: int, arithmetic: RoundingModel) -> Tensor:
    """|fl(⟨w, x⟩ + b) − (⟨w, x⟩ + b)| for ‖w‖₂ ≤ row, |b| ≤ bias, ‖x‖₂ ≤ norm, and w with `width` entries."""
    size = row * norm + bias
    lost = (width + 2) * arithmetic.tiny + math.sqrt(width) * (row + norm) * arithmetic.flushed  # products, and subnormal operands
    return arithmetic.gamma(width + 1) * size + arithmetic.unit * size + lost


def shift_error(norm: Tensor, width: int, arithmetic: RoundingModel) -> Tensor:
    """‖fl(x + p) − (x + p)‖₂ for a constant p and ‖x + p‖₂ ≤ norm, x with `width` entries: one rounding; both terms may be subnormal."""
    return arithmetic.unit * norm + 2 * math.sqrt(width) * arithmetic.flushed


def standardize_error(size: Tensor, gain: Tensor | float, width: int, arithmetic: RoundingModel) -> Tensor:
    """‖fl(y) − y‖₂ for y = (x − mean)/std by channel, gain = 1/min|std|, ‖x‖₂ + ‖mean‖₂ ≤ size/gain, `width` entries.

    The error of each entry is at most 4u of its absolute value. x, mean and their difference may all be subnormal, and are divided.
    """
    root = math.sqrt(width)
    return 4 * arithmetic.unit * size + root * (arithmetic.tiny * (1 + gain) + 2 * gain * arithmetic.flushed)
