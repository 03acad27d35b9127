"""A chain of layers as matrices and curves: z_l = W_l h_{l−1} + b_l, h_l = φ_l(z_l), with h_0 the input as one vector and logits z_{L+1}.

Everything linear between two activations becomes one dense float64 matrix. What cannot be written that way exactly (a product of matrices, a
division by std) is off by at most `weight_error` and `bias_error`, and `Network.drift` says how far that moves the logits. So certifiers
prove bounds of the network of float64 matrices, and subtract the drift for the network that the layers describe.

Numbers that only pass by an activation (the skip of a Residual, the pairs of MaxMin) are neurons with φ = identity. MaxMin and GroupSort(2) are
max(a, b) = b + relu(a − b) and min(a, b) = a − relu(a − b).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.domains.lines.relaxations import RELU, Curve, Relu, curve_of
from robustlip.domains.norms import Context
from robustlip.domains.norms.elementwise import DROPOUTS
from robustlip.errors import UnsupportedLayer
from robustlip.layers import Chain, Channels, Concatenate, GroupSort, MaxMin, Residual, Sum
from robustlip.numerics.rounding import U64, gamma, norm_up, up
from robustlip.ops import is_elementwise
from robustlip.ops.elementwise import FUNCTION_ULPS
from robustlip.ops.maps import MatrixMap, is_linear, map_of, unmapped
from robustlip.threats import InputBall, Threat

# Dense matrices of a layer: at most this many numbers (128 MiB).
LARGEST_MATRIX = 2**24


@dataclass(frozen=True)
class Stage:
    """One affine map and the activation behind it (None behind the last).

    weight (m, n), bias (m,), float64. weight_error, bias_error: Frobenius and ℓ2 bounds of what rounding made of them.
    linear (m,) bool: neurons that the activation leaves as they are.
    """

    weight: Tensor
    bias: Tensor
    weight_error: float
    bias_error: float
    curve: Curve | None
    linear: Tensor
    frobenius: float
    shift: float

    @property
    def slope(self) -> float:
        return 1.0 if self.curve is None else max(1.0, self.curve.lipschitz)


@dataclass(frozen=True)
class Network:
    stages: tuple[Stage, ...]

    @property
    def hidden(self) -> tuple[Stage, ...]:
        return self.stages[:-1]

    @property
    def piecewise_linear(self) -> bool:
        """Whether every activation is ReLU, which is what 'sdp' knows."""
        return all(isinstance(s.curve, Relu) for s in self.hidden)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Pre-activations of every stage, logits last, for inputs (N, n), in float64."""
        out = []
        for stage in self.stages:
            out.append(x @ stage.weight.mT + stage.bias)
            if stage.curve is not None:
                x = torch.where(stage.linear, out[-1], stage.curve.value(out[-1]))
        return out

    def sizes(self, norm: Tensor) -> list[Tensor]:
        """[‖h_0‖₂, ‖z_1‖₂, ‖z_2‖₂, …] ≤ these (N,), for inputs of ‖x‖₂ ≤ norm (N,): crude, they only scale rounding errors."""
        found = [norm]
        for i, stage in enumerate(self.stages):
            before = found[-1]
            if i:
                previous = self.stages[i - 1]
                assert previous.curve is not None
                before = previous.slope * before + abs(previous.curve.at_zero) * math.sqrt(len(previous.bias))
            found.append(up((stage.frobenius + stage.weight_error) * before + stage.shift + stage.bias_error))
        return found

    def drift(self, norm: Tensor) -> Tensor:
        """‖logits of the layers − logits of these matrices‖₂ ≤ this (N,), at every input of ‖x‖₂ ≤ norm (N,), in exact arithmetic."""
        return self._apart(norm, 0.0)[-1]

    def forward_errors(self, norm: Tensor) -> list[Tensor]:
        """‖z_l as `forward` computes it − z_l of these matrices‖₂ ≤ these (N,), for every stage, at inputs of ‖x‖₂ ≤ norm (N,)."""
        return self._apart(norm, U64)

    def _apart(self, norm: Tensor, unit: float) -> list[Tensor]:
        """By stage, how far two programs of the network come apart in z: by the error of the matrices (unit = 0), or by rounding."""
        sizes, gap, found = self.sizes(norm), torch.zeros_like(norm), []
        for i, stage in enumerate(self.stages):
            before = sizes[0]
            if i:
                previous = self.stages[i - 1]
                assert previous.curve is not None
                before = previous.slope * sizes[i] + abs(previous.curve.at_zero) * math.sqrt(len(previous.bias))
                gap = previous.slope * gap + (2 * FUNCTION_ULPS + 16) * unit * (before + sizes[i])
            fresh = stage.weight_error * before + stage.bias_error
            if unit:
                fresh = gamma(stage.weight.shape[1] + 2, unit) * (stage.frobenius * before + stage.shift)
            gap = up((stage.frobenius + stage.weight_error) * gap + fresh)
            found.append(gap)
        return found


class _Builder:
    """The affine map from the last activation to where we are: rows (held + current, n), and bounds of its rounding, entry by entry."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.stages: list[Stage] = []
        self.held = 0
        self._fresh(math.prod(shape))

    def _fresh(self, n: int) -> None:
        self._small(n, n)
        self.matrix = torch.eye(n, dtype=torch.float64, device=self.device)
        self.matrix_error = torch.zeros_like(self.matrix)
        self.vector = torch.zeros(n, dtype=torch.float64, device=self.device)
        self.vector_error = torch.zeros_like(self.vector)
        self.pristine = True

    def _small(self, m: int, n: int) -> None:
        if m * n > LARGEST_MATRIX:
            raise UnsupportedLayer(f"expected layers of at most {LARGEST_MATRIX} weights as dense matrices, got {m}×{n}; use 'global'")

    def _set(self, matrix: Tensor, matrix_error: Tensor, vector: Tensor, vector_error: Tensor) -> None:
        """New current rows; held ones stay."""
        h = self.held
        self.matrix, self.matrix_error = torch.cat([self.matrix[:h], matrix]), torch.cat([self.matrix_error[:h], matrix_error])
        self.vector, self.vector_error = torch.cat([self.vector[:h], vector]), torch.cat([self.vector_error[:h], vector_error])

    def linear(self, layer: nn.Module) -> None:
        op = map_of(layer, self.shape)
        self._small(op.outputs + self.held, self.matrix.shape[1])
        exact = op.weight if self.pristine and self.held == 0 and isinstance(op, MatrixMap) else None  # W·I is W
        plain = exact is not None
        loss = 0.0 if plain else op.loss
        h = self.held

        def through(rows: Tensor, absolute: bool) -> Tensor:
            return op.apply(rows.mT, absolute).mT

        matrix = through(self.matrix[h:], False) if exact is None else exact.clone()
        # Whatever the order of summation: each entry is off by γ of the sum of absolute values, and carries on what its rows were off by.
        matrix_error = torch.zeros_like(matrix) if plain else through(loss * self.matrix[h:].abs() + self.matrix_error[h:], True) * (1 + 1e-9)
        zero = torch.zeros(op.outputs, dtype=torch.float64, device=self.device)
        added, added_error = (zero if t is None else t for t in (op.bias, op.bias_error))
        moved = through(self.vector[h:, None], False)[:, 0]
        moved_error = through(loss * self.vector[h:, None].abs() + self.vector_error[h:, None], True)[:, 0]
        vector = moved + added
        vector_error = (moved_error + added_error + 2 * U64 * (moved.abs() + added.abs()) * (not plain)) * (1 + 1e-9)
        self._set(matrix, matrix_error, vector, vector_error)
        self.shape, self.pristine = op.out, False

    def combine(self, mixing: Tensor) -> None:
        """All rows ← mixing @ all rows, mixing of few small numbers a row."""
        self._small(mixing.shape[0], self.matrix.shape[1])
        loss = gamma(mixing.shape[1] + 2, U64)
        size = mixing.abs()
        self.matrix_error = size @ (self.matrix_error + loss * self.matrix.abs()) * (1 + 1e-9)
        self.vector_error = size @ (self.vector_error + loss * self.vector.abs()) * (1 + 1e-9)
        self.matrix, self.vector, self.pristine = mixing @ self.matrix, mixing @ self.vector, False

    def activation(self, curve: Curve, current: Tensor | None = None) -> None:
        """The stage ends here. current: which of the current rows the curve acts on, all unless given."""
        rows = len(self.matrix)
        linear = torch.ones(rows, dtype=torch.bool, device=self.device)
        linear[self.held :] = False if current is None else ~current
        self._close(curve, linear)
        self._fresh(rows)

    def _close(self, curve: Curve | None, linear: Tensor) -> None:
        def size(t: Tensor) -> float:
            return float(norm_up(t.flatten(), 0)) if bool((t != 0).any()) else 0.0

        wrong, off = size(self.matrix_error), size(self.vector_error)
        self.stages.append(Stage(self.matrix, self.vector, wrong, off, curve, linear, size(self.matrix), size(self.vector)))

    def sort(self, layer: nn.Module) -> None:
        """Pairs (a, b) → (max, min) in the layer's order, by a stage of (a − b, a, b) and the identity on the last two."""
        images = len(self.shape) == 3
        channels = self.shape[0] if images else self.shape[-1]
        if type(layer) not in (MaxMin, GroupSort) or (isinstance(layer, GroupSort) and layer.group != 2):
            raise UnsupportedLayer(f"expected a layer that sorts pairs, got {layer}; use method 'global'")
        if channels % 2 or len(self.shape) == 2:
            raise UnsupportedLayer(f"expected an even number of channels in front of {type(layer).__name__}, got {self.shape}; change the width")
        index = torch.arange(math.prod(self.shape), device=self.device).reshape(self.shape)
        if isinstance(layer, MaxMin):
            a, b = (part.reshape(-1) for part in index.chunk(2, 0))
            high, low = a, b  # where the maximum and the minimum go
        else:
            a, b = (index.unflatten(0, (-1, 2))[:, i].reshape(-1) for i in (0, 1))
            high, low = b, a
        n, half = index.numel(), len(a)
        h, eye = self.held, torch.eye(index.numel(), dtype=torch.float64, device=self.device)
        spread = torch.zeros(h + half + n, h + n, dtype=torch.float64, device=self.device)
        spread[:h, :h] = torch.eye(h, dtype=torch.float64, device=self.device)
        spread[h : h + half, h:] = eye[a] - eye[b]
        spread[h + half :, h:] = eye
        self.combine(spread)
        self.activation(RELU, torch.arange(half + n, device=self.device) < half)
        gather = torch.zeros(h + n, h + half + n, dtype=torch.float64, device=self.device)
        gather[:h, :h] = torch.eye(h, dtype=torch.float64, device=self.device)
        pairs = torch.eye(half, dtype=torch.float64, device=self.device)
        gather[h + high, h : h + half], gather[h + low, h : h + half] = pairs, -pairs
        gather[h + high, h + half + b] = 1.0
        gather[h + low, h + half + a] = 1.0
        self.combine(gather)

    def residual(self, layer: Residual) -> None:
        h, n, shape = self.held, len(self.matrix) - self.held, self.shape
        eye = torch.eye(h + n, dtype=torch.float64, device=self.device)
        self.combine(torch.cat([eye, eye[h:]]))
        self.held = h + n
        self.layers([layer.branch])
        if self.shape != shape:
            raise UnsupportedLayer(f"expected a residual branch that keeps the shape {shape}, got {self.shape}; match the widths")
        join = torch.zeros(h + n, h + 2 * n, dtype=torch.float64, device=self.device)
        join[:h, :h] = eye[:h, :h]
        join[h:, h : h + n] = layer.skip * eye[h:, h:]
        join[h:, h + n :] = layer.weight * eye[h:, h:]
        self.combine(join)
        self.held = h

    def join(self, layer: Sum | Concatenate) -> None:
        """Branches one after the other. Rows: held ones, what finished branches put out, the input while another branch will read it, the branch."""
        h, n, shape = self.held, len(self.matrix) - self.held, self.shape
        shapes: list[tuple[int, ...]] = []
        done = 0  # rows of finished branches
        for i, branch in enumerate(layer.branches):
            eye = torch.eye(len(self.matrix), dtype=torch.float64, device=self.device)
            finished, source = eye[: h + done], eye[h + done : h + done + n]
            put = eye[h + done + n :]  # what the branch before put out, none in front of the first
            again = i + 1 < len(layer.branches)
            self.combine(torch.cat([finished, put, *([source, source] if again else [source])]))
            done += len(put)
            self.held, self.shape = h + done + n * again, shape
            self.layers([branch])
            shapes.append(self.shape)
        eye = torch.eye(len(self.matrix), dtype=torch.float64, device=self.device)
        outs = eye[h:].split([math.prod(s) for s in shapes])
        if isinstance(layer, Sum):
            if len(set(shapes)) > 1:
                raise UnsupportedLayer(f"expected branches that put out one shape, got {sorted(set(shapes))}; match the widths")
            joined = sum((w * out for w, out in zip(layer.weights, outs, strict=True)), start=torch.zeros_like(outs[0]))
            self.shape = shapes[0]
        else:
            if len({s[1:] for s in shapes}) > 1 or any(len(s) == 2 for s in shapes):
                raise UnsupportedLayer(f"expected images or vectors that differ in channels alone, got {shapes}; match the other dimensions")
            joined = torch.cat(outs)
            self.shape = (sum(s[0] for s in shapes), *shapes[0][1:])
        self.combine(torch.cat([eye[:h], joined]))
        self.held = h

    def channels(self, layer: Channels) -> None:
        if len(self.shape) == 2 or layer.stop > self.shape[0]:
            raise UnsupportedLayer(f"expected at least {layer.stop} channels of images or vectors, got {self.shape}; change the slice")
        h, inner = self.held, math.prod(self.shape[1:])
        eye = torch.eye(len(self.matrix), dtype=torch.float64, device=self.device)
        self.combine(torch.cat([eye[:h], eye[h + layer.start * inner : h + layer.stop * inner]]))
        self.shape = (layer.stop - layer.start, *self.shape[1:])

    def layers(self, layers: Iterable[nn.Module]) -> None:
        for layer in layers:
            if is_linear(layer):
                self.linear(layer)
            elif is_elementwise(layer):
                self.activation(curve_of(layer))
            elif type(layer) in _STEPS:
                _STEPS[type(layer)](self, layer)
            else:
                raise UnsupportedLayer(f"expected layers that have a linear map or a curve, got {type(layer).__name__}; use method 'global'")

    def flatten(self, layer: nn.Flatten) -> None:
        self.shape = (math.prod(self.shape),)

    def nothing(self, layer: nn.Module) -> None:
        """The identity in eval mode."""

    def done(self) -> Network:
        self._close(None, torch.ones(len(self.matrix), dtype=torch.bool, device=self.device))
        return Network(tuple(self.stages))


_SORTS, _JOINS = (MaxMin, GroupSort), (Residual, Sum, Concatenate)
# What is neither linear by a map nor elementwise: how it is written.
_STEPS: dict[type, Callable[[_Builder, Any], None]] = {
    nn.Sequential: _Builder.layers, nn.Flatten: _Builder.flatten, **dict.fromkeys((nn.Identity, *DROPOUTS), _Builder.nothing),
    **dict.fromkeys(_SORTS, _Builder.sort), Residual: _Builder.residual, Sum: _Builder.join, Concatenate: _Builder.join, Channels: _Builder.channels,
}  # fmt: skip


def is_affine(layer: nn.Module) -> bool:
    """Whether the layer is affine by itself, or made of layers that are looked at by themselves."""
    return is_linear(layer) or (type(layer) in _STEPS and type(layer) not in _SORTS)


def _refused(layer: nn.Module) -> str:
    """'' where the layer itself has a map or a curve, whatever is inside of it, else what has none and with which options."""
    if is_elementwise(layer):
        return ""
    if type(layer) not in _STEPS:
        return unmapped(layer)
    if type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) != (1, -1):
        return f"{layer}, which does not flatten a whole sample,"
    return f"GroupSort({layer.group}), larger than 2," if type(layer) is GroupSort and layer.group != 2 else ""


def why_not(model: Chain, threat: Threat) -> str:
    """One sentence on why the model cannot be written as matrices and curves, '' when it can (its size apart)."""
    if not isinstance(threat, InputBall):
        return f"the threat {threat.name} does not change the input as a vector"
    if model.task != "classification":
        return "the model predicts tokens, not classes of one vector"

    # Attention's own matrices, say, are no layers of the chain: what has no map is not looked into.
    waiting = list(model)
    while waiting:
        layer = waiting.pop(0)
        if why := _refused(layer):
            return f"{why} has no linear relaxation here"
        if type(layer) in (nn.Sequential, *_JOINS):
            waiting[:0] = layer.branches if isinstance(layer, (Sum, Concatenate)) else layer.children()
    return ""


def network_of(model: Chain, shape: tuple[int, ...], context: Context) -> Network:
    """The model on samples of that shape, remembered as long as its weights stay the same. Raises UnsupportedLayer where there is none."""

    def compute() -> Network:
        builder = _Builder(shape, next(model.parameters()).device)
        builder.layers(model)
        return builder.done()

    return context.constant(model, f"network-{shape}", compute)

