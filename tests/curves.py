"""The relaxations of the activations that come with robustlip, by name."""

from __future__ import annotations

from torch import nn

from robustlip.domains.lines.relaxations import curve_of

CURVES = {
    name: curve_of(layer)
    for name, layer in {
        "relu": nn.ReLU(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "silu": nn.SiLU(), "gelu-none": nn.GELU(), "gelu-tanh": nn.GELU("tanh"),
    }.items()
}  # fmt: skip
