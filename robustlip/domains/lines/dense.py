"""A chain of layers as affine stages and curves: z_l = W_l h_{l−1} + b_l, h_l = φ_l(z_l), with h_0 the input as one vector and logits z_{L+1}.

What is linear between two activations is one stage: a dense float64 matrix, or of large images a map that is never written as one
(robustlip.domains.lines.stages). What cannot be written exactly (a product of matrices, a division by std) is off by at most `weight_error` and
`bias_error`, and `Network.drift` says how far that moves the logits. So certifiers prove bounds of the network of stages, and subtract the drift for
the network that the layers describe.

Numbers that only pass by an activation (the skip of a Residual, the pairs of MaxMin) are neurons with φ = identity. MaxMin and GroupSort(2) are
max(a, b) = b + relu(a − b) and min(a, b) = a − relu(a − b).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.domains.lines.relaxations import RELU, Curve, Products, Relu, curve_of
from robustlip.domains.lines.stages import Affine, Plan, Stage, stage_of
from robustlip.domains.norms import Context
from robustlip.domains.norms.elementwise import DROPOUTS
from robustlip.errors import UnsupportedLayer
from robustlip.layers import Chain, Channels, Concatenate, GroupSort, Maximum, MaxMin, Minimum, Product, Residual, Sum
from robustlip.layers.joins import Branching
from robustlip.numerics.rounding import U64, gamma, norm_up, up
from robustlip.ops import is_elementwise
from robustlip.ops.elementwise import FUNCTION_ULPS
from robustlip.ops.joins import spread_over
from robustlip.ops.maps import (
    AverageMap,
    ConvolutionMap,
    LinearMap,
    Mixing,
    OnPart,
    ResamplingMap,
    ScaleMap,
    TransposedMap,
    is_linear,
    map_of,
    unmapped,
)
from robustlip.ops.moves import is_move, moves_of
from robustlip.threats import InputBall, Threat


@dataclass(frozen=True)
class Network:
    stages: tuple[Affine, ...]

    @property
    def hidden(self) -> tuple[Affine, ...]:
        return self.stages[:-1]

    @property
    def dense(self) -> bool:
        """Whether every stage is a matrix."""
        return all(isinstance(stage, Stage) for stage in self.stages)

    @property
    def piecewise_linear(self) -> bool:
        """Whether every activation is ReLU, which is what 'sdp' knows."""
        return all(isinstance(s.curve, Relu) for s in self.hidden)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Pre-activations of every stage, logits last, for inputs (N, n), in float64."""
        out = []
        for stage in self.stages:
            out.append(stage.forward(x))
            if stage.curve is not None:
                x = torch.where(stage.linear, out[-1], stage.curve.value(out[-1]))
        return out

    @property
    def multiplies(self) -> bool:
        """Whether numbers are multiplied with each other somewhere: sizes that know of no boxes are squared there, and say nothing soon."""
        return any(isinstance(s.curve, Products) for s in self.hidden)

    def sizes(self, norm: Tensor, known: Sequence[Tensor] = (), errors: Sequence[Tensor] = ()) -> list[Tensor]:
        """[‖h_0‖₂, ‖z_1‖₂, ‖z_2‖₂, …] ≤ these (N,), for inputs of ‖x‖₂ ≤ norm (N,): crude, they only scale rounding errors.

        known: ≥ ‖z_1‖₂, ‖z_2‖₂, … of the first stages (N,), where somebody has better ones, of the same inputs.
        errors: by stage from the first, what each number of z may be off by besides (N, m).
        """
        found = [norm]
        for i, stage in enumerate(self.stages):
            before = found[-1]
            if i:
                previous = self.stages[i - 1]
                assert previous.curve is not None
                before = previous.curve.behind(before, len(previous.bias))
            off = norm_up(errors[i]) if i < len(errors) else 0.0
            crude = up((stage.magnitude + stage.weight_error) * before + stage.shift + stage.bias_error + off)
            found.append(torch.minimum(crude, known[i]) if i < len(known) else crude)
        return found

    def drift(self, norm: Tensor, known: Sequence[Tensor] = ()) -> Tensor:
        """‖logits of the layers − logits of these matrices‖₂ ≤ this (N,), at every input of ‖x‖₂ ≤ norm (N,), in exact arithmetic.

        known: as in `sizes`.
        """
        return self._apart(norm, 0.0, known)[-1]

    def forward_errors(self, norm: Tensor, known: Sequence[Tensor] = ()) -> list[Tensor]:
        """‖z_l as `forward` computes it − z_l of these matrices‖₂ ≤ these (N,), for every stage, at inputs of ‖x‖₂ ≤ norm (N,)."""
        return self._apart(norm, U64, known)

    def _apart(self, norm: Tensor, unit: float, known: Sequence[Tensor]) -> list[Tensor]:
        """By stage, how far two programs of the network come apart in z: by the error of the matrices (unit = 0), or by rounding."""
        sizes, gap, found = self.sizes(norm, known), torch.zeros_like(norm), []
        for i, stage in enumerate(self.stages):
            before = sizes[0]
            if i:
                previous = self.stages[i - 1]
                assert previous.curve is not None
                # Sizes that are known are of these matrices, and not of the other program.
                before = previous.curve.behind(sizes[i] + gap if known else sizes[i], len(previous.bias))
                gap = previous.curve.apart(gap, sizes[i]) + (2 * FUNCTION_ULPS + 16) * unit * (before + sizes[i])
            fresh = stage.weight_error * before + stage.bias_error
            if unit:
                fresh = gamma(stage.terms + 2, unit) * (stage.magnitude * before + stage.shift)
            gap = up((stage.magnitude + stage.weight_error) * gap + fresh)
            found.append(gap)
        return found


class _Builder:
    """The steps from the last activation to where we are: maps of rows (held + current)."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.plans: list[Plan] = []
        self.held = 0
        self._fresh(math.prod(shape))

    def _fresh(self, n: int) -> None:
        self.inputs = self.rows = n
        self.steps: list[LinearMap] = []
        self.of_images = False

    def linear(self, layer: nn.Module) -> None:
        op = map_of(layer, self.shape)
        self.steps.append(OnPart.of(op, self.held))
        self.of_images = self.of_images or isinstance(op, (ConvolutionMap, TransposedMap, AverageMap, ResamplingMap))
        self.shape, self.rows = op.out, self.held + op.outputs

    def combine(self, *terms: tuple[Tensor, float | Tensor]) -> None:
        """All rows ← sums of few of them, as in `Mixing.of`."""
        mixing = Mixing.of(self.rows, *terms)
        self.steps.append(mixing)
        self.of_images = self.of_images or len(self.shape) == 3
        self.rows = mixing.outputs

    def _numbers(self, *bounds: int) -> Tensor:
        return torch.arange(*bounds, device=self.device)

    def activation(self, curve: Curve, current: Tensor | None = None) -> None:
        """The stage ends here. current: which of the current rows the curve acts on, all unless given."""
        linear = torch.ones(self.rows, dtype=torch.bool, device=self.device)
        linear[self.held :] = False if current is None else ~current
        self._close(curve, linear)
        self._fresh(self.rows)

    def _close(self, curve: Curve | None, linear: Tensor) -> None:
        self.plans.append(Plan(self.inputs, self.rows, tuple(self.steps), curve, linear, self.of_images))

    def sort(self, layer: nn.Module) -> None:
        """Pairs (a, b) → (max, min) in the layer's order, by a stage of (a − b, a, b) and the identity on the last two."""
        images = len(self.shape) == 3
        channels = self.shape[0] if images else self.shape[-1]
        if type(layer) not in (MaxMin, GroupSort) or (isinstance(layer, GroupSort) and layer.group != 2):
            raise UnsupportedLayer(f"expected a layer that sorts pairs, got {layer}; use method 'global'")
        if channels % 2 or len(self.shape) not in (1, 3):
            name = type(layer).__name__
            raise UnsupportedLayer(f"expected an even number of channels of images or vectors in front of {name}, got {self.shape}; change the width")
        index = self._numbers(math.prod(self.shape)).reshape(self.shape)
        if isinstance(layer, MaxMin):
            a, b = (part.reshape(-1) for part in index.chunk(2, 0))
            high, low = a, b  # where the maximum and the minimum go
        else:
            a, b = (index.unflatten(0, (-1, 2))[:, i].reshape(-1) for i in (0, 1))
            high, low = b, a
        n, half, h = index.numel(), len(a), self.held
        less = torch.zeros(h + half + n, dtype=torch.float64, device=self.device)
        less[h : h + half] = -1.0
        self.combine(
            (torch.cat([self._numbers(h), h + a, h + index.reshape(-1)]), 1.0), (torch.cat([self._numbers(h), h + b, h + index.reshape(-1)]), less)
        )
        self.activation(RELU, self._numbers(half + n) < half)
        # The maximum is b and what a is above it, the minimum a less that.
        first, second = self._numbers(h + n), self._numbers(h + n)
        sign = torch.zeros(h + n, dtype=torch.float64, device=self.device)
        first[h + high], first[h + low] = h + half + b, h + half + a
        second[h + high] = second[h + low] = h + self._numbers(half)
        sign[h + high], sign[h + low] = 1.0, -1.0
        self.combine((first, 1.0), (second, sign))

    def residual(self, layer: Residual) -> None:
        h, n, shape = self.held, self.rows - self.held, self.shape
        self.combine((torch.cat([self._numbers(h + n), self._numbers(h, h + n)]), 1.0))
        self.held = h + n
        self.layers([layer.branch])
        if self.shape != shape:
            raise UnsupportedLayer(f"expected a residual branch that keeps the shape {shape}, got {self.shape}; match the widths")
        own, other = torch.ones(h + n, dtype=torch.float64, device=self.device), torch.zeros(h + n, dtype=torch.float64, device=self.device)
        own[h:], other[h:] = layer.skip, layer.weight
        self.combine((self._numbers(h + n), own), (torch.cat([self._numbers(h), self._numbers(h + n, h + 2 * n)]), other))
        self.held = h

    def _side_by_side(self, layer: Branching) -> tuple[list[tuple[int, ...]], tuple[Tensor, ...]]:
        """(the shape behind each branch, its rows). All are held: `held` is what was held in front, and is put back by the caller.

        Branches one after the other. Rows: held ones, what finished branches put out, the input while another branch will read it, the branch.
        """
        h, n, shape = self.held, self.rows - self.held, self.shape
        shapes: list[tuple[int, ...]] = []
        done = 0  # rows of finished branches
        for i, branch in enumerate(layer.branches):
            finished, source = self._numbers(h + done), self._numbers(h + done, h + done + n)
            put = self._numbers(h + done + n, self.rows)  # what the branch before put out, none in front of the first
            again = i + 1 < len(layer.branches)
            self.combine((torch.cat([finished, put, *([source, source] if again else [source])]), 1.0))
            done += len(put)
            self.held, self.shape = h + done + n * again, shape
            self.layers([branch])
            shapes.append(self.shape)
        self.held = h
        return shapes, self._numbers(h, self.rows).split([math.prod(s) for s in shapes])

    def join(self, layer: Sum | Concatenate) -> None:
        h = self.held
        shapes, outs = self._side_by_side(layer)
        if isinstance(layer, Sum):
            if len(set(shapes)) > 1:
                raise UnsupportedLayer(f"expected branches that put out one shape, got {sorted(set(shapes))}; match the widths")
            kept = torch.zeros(h + len(outs[0]), dtype=torch.float64, device=self.device)
            kept[:h] = 1.0

            def term(i: int, weight: float, out: Tensor) -> tuple[Tensor, Tensor]:
                factor = kept.clone() if i == 0 else 0 * kept
                factor[h:] = weight
                return torch.cat([self._numbers(h), out]), factor

            self.shape = shapes[0]
            self.combine(*(term(i, w, out) for i, (w, out) in enumerate(zip(layer.weights, outs, strict=True))))
        else:
            if len({s[1:] for s in shapes}) > 1 or any(len(s) not in (1, 3) for s in shapes):
                raise UnsupportedLayer(f"expected images or vectors that differ in channels alone, got {shapes}; match the other dimensions")
            self.shape = (sum(s[0] for s in shapes), *shapes[0][1:])
            self.combine((torch.cat([self._numbers(h), *outs]), 1.0))

    def product(self, layer: Product) -> None:
        """A stage of (a, b), of which a becomes a∘b and b stays, and is left out behind it. Of a square one of them is enough."""
        h = self.held
        shapes, (first, second) = self._side_by_side(layer)
        second = second.repeat_interleave(spread_over(*shapes))
        n, square = len(first), all(type(branch) is nn.Identity for branch in layer.branches)
        self.combine((torch.cat([self._numbers(h), first] if square else [self._numbers(h), first, second]), 1.0))
        partner = self._numbers(self.rows)
        if not square:
            partner[h : h + n] = self._numbers(h + n, h + 2 * n)
        self.activation(Products(1.0, 0.0, partner), self._numbers(self.rows - h) < n)
        self.combine((self._numbers(h + n), 1.0))
        self.shape = shapes[0]

    def maximum(self, layer: Maximum) -> None:
        """One half of MaxMin of both branches side by side."""
        self.join(Concatenate(*layer.branches))
        self.sort(MaxMin())
        channels = self.shape[0]
        self.channels(Channels(channels // 2, channels) if type(layer) is Minimum else Channels(0, channels // 2))

    def channels(self, layer: Channels) -> None:
        if len(self.shape) not in (1, 3) or layer.stop > self.shape[0]:
            raise UnsupportedLayer(f"expected at least {layer.stop} channels of images or vectors, got {self.shape}; change the slice")
        h, inner = self.held, math.prod(self.shape[1:])
        self.combine((torch.cat([self._numbers(h), self._numbers(h + layer.start * inner, h + layer.stop * inner)]), 1.0))
        self.shape = (layer.stop - layer.start, *self.shape[1:])

    def move(self, layer: nn.Module) -> None:
        moves = moves_of(layer, self.shape, 1, math.prod(self.shape))
        h, source = self.held, moves.source.to(self.device)
        moved = (source >= 0).double()
        kept = torch.ones(h, dtype=torch.float64, device=self.device)
        self.combine((torch.cat([self._numbers(h), h + source.clamp_min(0)]), torch.cat([kept, moved])))
        if moves.size:
            m, fixed = moves.outputs, moves.fixed.to(self.device)
            self.steps.append(OnPart.of(ScaleMap((m,), (m,), 2, 2, bias=fixed, weight=torch.ones_like(fixed)), h))
        self.shape = moves.out

    def layers(self, layers: Iterable[nn.Module]) -> None:
        for layer in layers:
            if is_linear(layer):
                self.linear(layer)
            elif is_move(layer):
                self.move(layer)
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

    def done(self, dense: bool) -> Network:
        self._close(None, torch.ones(self.rows, dtype=torch.bool, device=self.device))
        return Network(tuple(stage_of(plan, self.device, dense) for plan in self.plans))


_SORTS, _JOINS, _PAIRS = (MaxMin, GroupSort), (Residual, Sum, Concatenate), (Product, Maximum, Minimum)
# What is neither linear by a map nor elementwise: how it is written.
_STEPS: dict[type, Callable[[_Builder, Any], None]] = {
    nn.Sequential: _Builder.layers, nn.Flatten: _Builder.flatten, **dict.fromkeys((nn.Identity, *DROPOUTS), _Builder.nothing),
    **dict.fromkeys(_SORTS, _Builder.sort), Residual: _Builder.residual, Sum: _Builder.join, Concatenate: _Builder.join, Channels: _Builder.channels,
    Product: _Builder.product, Maximum: _Builder.maximum, Minimum: _Builder.maximum,
}  # fmt: skip


def is_affine(layer: nn.Module) -> bool:
    """Whether the layer is affine by itself, or made of layers that are looked at by themselves."""
    return is_linear(layer) or is_move(layer) or (type(layer) in _STEPS and type(layer) not in (*_SORTS, *_PAIRS))


def _refused(layer: nn.Module) -> str:
    """'' where the layer itself has a map or a curve, whatever is inside of it, else what has none and with which options."""
    if is_elementwise(layer) or is_move(layer):
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
        if type(layer) in (nn.Sequential, *_JOINS, *_PAIRS):
            waiting[:0] = layer.branches if isinstance(layer, Branching) else layer.children()
    return ""


def network_of(model: Chain, shape: tuple[int, ...], context: Context, *, dense: bool = False) -> Network:
    """The model on samples of that shape, remembered as long as its weights stay the same. Raises UnsupportedLayer where there is none.

    dense: every stage a matrix, also those of large images.
    """

    def compute() -> Network:
        builder = _Builder(shape, next(model.parameters()).device)
        builder.layers(model)
        if math.prod(builder.shape) == 1:
            both = nn.Linear(1, 2, bias=False, device=builder.device, dtype=torch.float64).requires_grad_(False)
            both.weight.copy_(torch.tensor([[0.0], [1.0]]))
            builder.linear(both)  # the logits are 0 and z
        return builder.done(dense)

    return context.constant(model, f"network-{shape}-{dense}", compute)
