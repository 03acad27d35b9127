"""A chain as affine stages and activations: z_l = W_l h_{l−1} + b_l, h_l = φ_l(z_l), where h_0 is the input as one vector and z_{L+1} the logits.

The layers between two activations form one stage (robustlip.domains.lines.stages). Its matrix may have rounding errors (a product of matrices, a
division by std); `weight_error` and `bias_error` bound them. `Stage.executed_errors` bounds the difference between the executed entries and those of
the stage; bounds of the executed model take it as one more perturbation.

Entries that bypass an activation (the skip connection of a Residual, the pairs of MaxMin) are neurons with φ = identity. MaxMin and GroupSort(2) use
max(a, b) = b + relu(a − b) and min(a, b) = a − relu(a − b).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.domains.lines.relaxations import RELU, Activation, Products, Relu, activation_of
from robustlip.domains.lines.stages import DenseStage, Errors, Plan, Stage, Step, stage_of
from robustlip.domains.norms import Context, State
from robustlip.domains.norms.elementwise import DROPOUTS
from robustlip.domains.norms.state import apply_rule
from robustlip.errors import UnsupportedLayer
from robustlip.layers import Chain, Channels, Concatenate, GroupSort, Maximum, MaxMin, Minimum, Product, Residual, Sum
from robustlip.layers.joins import Branching
from robustlip.numerics.rounding import U64, gamma, norm_up, up
from robustlip.ops import elementwise_of, is_elementwise
from robustlip.ops.elementwise import FUNCTION_ULPS
from robustlip.ops.executed import constant_errors, elementwise_errors, errors_of, is_bounded, product_errors, sorting_errors, sum_errors
from robustlip.ops.joins import bounded_by, spread_over
from robustlip.ops.maps import (
    AverageMap,
    ConvolutionMap,
    LinearMap,
    Mixing,
    PartialMap,
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
    stages: tuple[Stage, ...]

    @property
    def hidden(self) -> tuple[Stage, ...]:
        return self.stages[:-1]

    @property
    def dense(self) -> bool:
        """Whether every stage is a matrix."""
        return all(isinstance(stage, DenseStage) for stage in self.stages)

    @property
    def piecewise_linear(self) -> bool:
        """Whether every activation is ReLU, as 'sdp' requires."""
        return all(isinstance(s.activation, Relu) for s in self.hidden)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Pre-activations of every stage, logits last, for inputs (N, n), in float64."""
        out = []
        for stage in self.stages:
            out.append(stage.forward(x))
            if stage.activation is not None:
                x = torch.where(stage.linear, out[-1], stage.activation.value(out[-1]))
        return out

    @property
    def has_products(self) -> bool:
        """Whether some activation multiplies entries. `norm_bounds` without boxes squares the norms there, so that they soon become useless."""
        return any(isinstance(s.activation, Products) for s in self.hidden)

    def norm_bounds(self, norm: Tensor, from_boxes: Sequence[Tensor] = (), errors: Sequence[Tensor] = ()) -> list[Tensor]:
        """Upper bounds (N,) of ‖h_0‖₂, ‖z_1‖₂, ‖z_2‖₂, … for inputs of ‖x‖₂ ≤ norm (N,). They are crude: they only scale rounding errors.

        from_boxes: sharper bounds of ‖z_1‖₂, ‖z_2‖₂, … (N,) for the first stages, if there are any. errors: for the first stages, bounds of
        additional errors of each entry of z (N, m).
        """
        found = [norm]
        for i, stage in enumerate(self.stages):
            before = found[-1]
            if i:
                previous = self.stages[i - 1]
                assert previous.activation is not None
                before = previous.activation.output_norm(before, len(previous.bias))
            off = norm_up(errors[i]) if i < len(errors) else 0.0
            crude = up((stage.magnitude + stage.weight_error) * before + stage.shift + stage.bias_error + off)
            found.append(torch.minimum(crude, from_boxes[i]) if i < len(from_boxes) else crude)
        return found

    def forward_errors(self, norm: Tensor, from_boxes: Sequence[Tensor] = ()) -> list[Tensor]:
        """‖z_l computed by `forward` − exact z_l of these matrices‖₂ ≤ these (N,), one for each stage, at inputs of ‖x‖₂ ≤ norm (N,).

        from_boxes: as in `norm_bounds`.
        """
        sizes, gap, found = self.norm_bounds(norm, from_boxes), torch.zeros_like(norm), []
        for i, stage in enumerate(self.stages):
            before = sizes[0]
            if i:
                previous = self.stages[i - 1]
                assert previous.activation is not None
                # Norms from boxes are those of the exact pass; the computed one differs by `gap`.
                before = previous.activation.output_norm(sizes[i] + gap if from_boxes else sizes[i], len(previous.bias))
                gap = previous.activation.output_change(gap, sizes[i]) + (2 * FUNCTION_ULPS + 16) * U64 * (before + sizes[i])
            fresh = gamma(stage.terms + 2, U64) * (stage.magnitude * before + stage.shift)
            gap = up((stage.magnitude + stage.weight_error) * gap + fresh)
            found.append(gap)
        return found


class _Builder:
    """Builds the stages of a network. The rows of the present stage are `saved` rows, kept for a later join, then the rows of the present value."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.plans: list[Plan] = []
        self.saved = 0
        self._start_stage(math.prod(shape))

    def _start_stage(self, n: int) -> None:
        self.inputs = self.rows = n
        self.steps: list[Step] = []
        self.of_images = False

    def linear(self, layer: nn.Module, exact: bool = False) -> None:
        """exact: a map of ours that the model does not execute."""
        op = map_of(layer, self.shape)
        self.steps.append(Step(PartialMap.of(op, self.saved), None if exact else self._of_all_rows(_errors_of(layer, op))))
        self.of_images = self.of_images or isinstance(op, (ConvolutionMap, TransposedMap, AverageMap, ResamplingMap))
        self.shape, self.rows = op.out, self.saved + op.outputs

    def _of_all_rows(self, errors: Errors | None) -> Errors | None:
        """The errors of all rows; those of saved rows are 0."""
        saved = self.saved
        if errors is None or not saved:
            return errors
        return lambda sizes, context: F.pad(errors(sizes[:, saved:], context), (saved, 0))

    def combine(self, *terms: tuple[Tensor, float | Tensor], errors: Errors | None = None) -> None:
        """Replaces all rows by sums of a few rows each, as in `Mixing.of`. errors: (N, rows) → (N, new rows), if the model executes such sums."""
        mixing = Mixing.of(self.rows, *terms)
        self.steps.append(Step(mixing, errors))
        self.of_images = self.of_images or len(self.shape) == 3
        self.rows = mixing.outputs

    def _indices(self, *bounds: int) -> Tensor:
        return torch.arange(*bounds, device=self.device)

    def activation(self, activation: Activation, current: Tensor | None = None, executed: Errors | None = None) -> None:
        """Ends the stage with an activation. current: bool, the rows of the present value to which it is applied (default all); others pass
        unchanged. executed: the errors of its execution."""
        linear = torch.ones(self.rows, dtype=torch.bool, device=self.device)
        linear[self.saved :] = False if current is None else ~current
        self._end_stage(activation, linear, executed)
        self._start_stage(self.rows)

    def _end_stage(self, activation: Activation | None, linear: Tensor, executed: Errors | None = None) -> None:
        self.plans.append(Plan(self.inputs, self.rows, tuple(self.steps), activation, linear, self.of_images, executed))

    def sort(self, layer: nn.Module) -> None:
        """Pairs (a, b) → (max, min) in the layer's order, by a stage with ReLU on a − b and the identity on a and b."""
        images = len(self.shape) == 3
        channels = self.shape[0] if images else self.shape[-1]
        if type(layer) not in (MaxMin, GroupSort) or (isinstance(layer, GroupSort) and layer.group != 2):
            raise UnsupportedLayer(f"expected a layer that sorts pairs, got {layer}; use method 'global'")
        if channels % 2 or len(self.shape) not in (1, 3):
            name = type(layer).__name__
            raise UnsupportedLayer(f"expected an even number of channels of images or vectors before {name}, got {self.shape}; change the width")
        index = self._indices(math.prod(self.shape)).reshape(self.shape)
        if isinstance(layer, MaxMin):
            a, b = (part.reshape(-1) for part in index.chunk(2, 0))
            high, low = a, b  # the places of the maximum and of the minimum
        else:
            a, b = (index.unflatten(0, (-1, 2))[:, i].reshape(-1) for i in (0, 1))
            high, low = b, a
        n, half, h = index.numel(), len(a), self.saved
        less = torch.zeros(h + half + n, dtype=torch.float64, device=self.device)
        less[h : h + half] = -1.0
        self.combine(
            (torch.cat([self._indices(h), h + a, h + index.reshape(-1)]), 1.0), (torch.cat([self._indices(h), h + b, h + index.reshape(-1)]), less)
        )
        self.activation(RELU, self._indices(half + n) < half)
        # The maximum is b + relu(a − b), the minimum a − relu(a − b).
        first, second = self._indices(h + n), self._indices(h + n)
        sign = torch.zeros(h + n, dtype=torch.float64, device=self.device)
        first[h + high], first[h + low] = h + half + b, h + half + a
        second[h + high] = second[h + low] = h + self._indices(half)
        sign[h + high], sign[h + low] = 1.0, -1.0
        self.combine((first, 1.0), (second, sign), errors=self._of_all_rows(lambda rows, context: sorting_errors(rows[:, -n:], context)))

    def residual(self, layer: Residual) -> None:
        h, n, shape = self.saved, self.rows - self.saved, self.shape
        self.combine((torch.cat([self._indices(h + n), self._indices(h, h + n)]), 1.0))
        self.saved = h + n
        self.layers([layer.branch])
        if self.shape != shape:
            raise UnsupportedLayer(f"expected a residual branch that keeps the shape {shape}, got {self.shape}; match the widths")
        own, other = torch.ones(h + n, dtype=torch.float64, device=self.device), torch.zeros(h + n, dtype=torch.float64, device=self.device)
        own[h:], other[h:] = layer.skip, layer.weight
        parts, self.saved = (self._indices(h, h + n), self._indices(h + n, h + 2 * n)), h
        errors = self._sum_errors(parts, [layer.skip, layer.weight])
        self.combine((self._indices(h + n), own), (torch.cat([self._indices(h), parts[1]]), other), errors=errors)

    def _sum_errors(self, parts: Sequence[Tensor], weights: Sequence[float]) -> Errors:
        """Of Σ weight·part, parts by their rows."""
        saved, scalars = self.saved, [abs(w) for w in weights]
        return lambda rows, context: F.pad(sum_errors(scalars, [rows[:, part] for part in parts], context), (saved, 0))

    def _apply_branches(self, layer: Branching) -> tuple[list[tuple[int, ...]], tuple[Tensor, ...]]:
        """(the output shape of each branch, the rows of each output). On return `saved` is as before; all outputs are rows of the present value.

        The branches are applied one after the other. The rows are then: saved rows, outputs of finished branches, the input (while another branch
        needs it), the present branch.
        """
        h, n, shape = self.saved, self.rows - self.saved, self.shape
        shapes: list[tuple[int, ...]] = []
        done = 0  # number of rows of finished branches
        for i, branch in enumerate(layer.branches):
            finished, source = self._indices(h + done), self._indices(h + done, h + done + n)
            put = self._indices(h + done + n, self.rows)  # the output of the previous branch; empty before the first
            again = i + 1 < len(layer.branches)
            self.combine((torch.cat([finished, put, *([source, source] if again else [source])]), 1.0))
            done += len(put)
            self.saved, self.shape = h + done + n * again, shape
            self.layers([branch])
            shapes.append(self.shape)
        self.saved = h
        return shapes, self._indices(h, self.rows).split([math.prod(s) for s in shapes])

    def join(self, layer: Sum | Concatenate) -> None:
        h = self.saved
        shapes, outs = self._apply_branches(layer)
        if isinstance(layer, Sum):
            if len(set(shapes)) > 1:
                raise UnsupportedLayer(f"expected branches that put out one shape, got {sorted(set(shapes))}; match the widths")
            kept = torch.zeros(h + len(outs[0]), dtype=torch.float64, device=self.device)
            kept[:h] = 1.0

            def term(i: int, weight: float, out: Tensor) -> tuple[Tensor, Tensor]:
                factor = kept.clone() if i == 0 else 0 * kept
                factor[h:] = weight
                return torch.cat([self._indices(h), out]), factor

            self.shape = shapes[0]
            terms = [term(i, w, out) for i, (w, out) in enumerate(zip(layer.weights, outs, strict=True))]
            self.combine(*terms, errors=self._sum_errors(outs, list(layer.weights)))
        else:
            if len({s[1:] for s in shapes}) > 1 or any(len(s) not in (1, 3) for s in shapes):
                raise UnsupportedLayer(f"expected images or vectors that differ in channels alone, got {shapes}; match the other dimensions")
            self.shape = (sum(s[0] for s in shapes), *shapes[0][1:])
            self.combine((torch.cat([self._indices(h), *outs]), 1.0))

    def product(self, layer: Product) -> None:
        """A stage with rows (a, b) and activation a∘b on a; b passes unchanged and is dropped afterwards. A square needs the rows of a only."""
        h = self.saved
        shapes, (first, second) = self._apply_branches(layer)
        second = second.repeat_interleave(spread_over(*shapes))
        n, square = len(first), all(type(branch) is nn.Identity for branch in layer.branches)
        self.combine((torch.cat([self._indices(h), first] if square else [self._indices(h), first, second]), 1.0))
        partner = self._indices(self.rows)
        if not square:
            partner[h : h + n] = self._indices(h + n, h + 2 * n)

        def executed(sizes: Tensor, context: Context) -> Tensor:
            errors = torch.zeros_like(sizes)
            errors[:, h : h + n] = product_errors(sizes[:, h : h + n], sizes[:, partner[h : h + n]], context)
            return errors

        self.activation(Products(1.0, 0.0, partner), self._indices(self.rows - h) < n, executed)
        self.combine((self._indices(h + n), 1.0))
        self.shape = shapes[0]

    def maximum(self, layer: Maximum) -> None:
        """The maximum (minimum) of two branches is the first (second) half of MaxMin of their concatenation."""
        bounded = bounded_by(layer)
        if bounded is not None:
            self.layers(bounded)
            return
        self.join(Concatenate(*layer.branches))
        self.sort(MaxMin())
        channels = self.shape[0]
        self.channels(Channels(channels // 2, channels) if type(layer) is Minimum else Channels(0, channels // 2))

    def channels(self, layer: Channels) -> None:
        if len(self.shape) not in (1, 3) or layer.stop > self.shape[0]:
            raise UnsupportedLayer(f"expected at least {layer.stop} channels of images or vectors, got {self.shape}; change the slice")
        h, inner = self.saved, math.prod(self.shape[1:])
        self.combine((torch.cat([self._indices(h), self._indices(h + layer.start * inner, h + layer.stop * inner)]), 1.0))
        self.shape = (layer.stop - layer.start, *self.shape[1:])

    def move(self, layer: nn.Module) -> None:
        moves = moves_of(layer, self.shape, 1, math.prod(self.shape))
        h, source = self.saved, moves.source.to(self.device)
        moved = (source >= 0).double()
        kept = torch.ones(h, dtype=torch.float64, device=self.device)
        self.combine((torch.cat([self._indices(h), h + source.clamp_min(0)]), torch.cat([kept, moved])))
        if moves.size:
            m, fixed = moves.outputs, moves.fixed.to(self.device)
            constants = PartialMap.of(ScaleMap((m,), (m,), 2, 2, bias=fixed, weight=torch.ones_like(fixed)), h)
            rounds = (lambda sizes, context: constant_errors(fixed, context).expand(len(sizes), -1)) if moves.rounds else None
            self.steps.append(Step(constants, self._of_all_rows(rounds)))
        self.shape = moves.out

    def layers(self, layers: Iterable[nn.Module]) -> None:
        for layer in layers:
            if is_linear(layer):
                self.linear(layer)
            elif is_move(layer):
                self.move(layer)
            elif is_elementwise(layer):
                self.activation(activation_of(layer), executed=self._of_all_rows(partial(elementwise_errors, elementwise_of(layer))))
            elif type(layer) in _STEPS:
                _STEPS[type(layer)](self, layer)
            else:
                raise UnsupportedLayer(f"expected linear maps, activations and joins of these, got {type(layer).__name__}; use method 'global'")

    def flatten(self, layer: nn.Flatten) -> None:
        self.shape = (math.prod(self.shape),)

    def identity(self, layer: nn.Module) -> None:
        """The identity in eval mode."""

    def network(self, dense: bool) -> Network:
        self._end_stage(None, torch.ones(self.rows, dtype=torch.bool, device=self.device))
        return Network(tuple(stage_of(plan, self.device, dense) for plan in self.plans))


def _errors_of(layer: nn.Module, op: LinearMap) -> Errors | None:
    """Number by number where robustlip.ops.executed knows the class; of others every number is bounded by what the layer's rule says of norms."""
    if is_bounded(layer):
        return errors_of(layer, op)
    shape = op.shape

    def by_norm(sizes: Tensor, context: Context) -> Tensor:
        norm = norm_up(sizes)
        zero = torch.zeros_like(norm)
        state = State(norm, zero, zero, "l2", 1, op.inputs, shape if len(shape) > 1 else None)
        return apply_rule(layer, state, context).rounding[:, None].expand(-1, op.outputs)

    return by_norm


_SORTS, _JOINS, _PAIRS = (MaxMin, GroupSort), (Residual, Sum, Concatenate), (Product, Maximum, Minimum)
# How layers that are neither linear maps nor elementwise are added.
_STEPS: dict[type, Callable[[_Builder, Any], None]] = {
    nn.Sequential: _Builder.layers, nn.Flatten: _Builder.flatten, **dict.fromkeys((nn.Identity, *DROPOUTS), _Builder.identity),
    **dict.fromkeys(_SORTS, _Builder.sort), Residual: _Builder.residual, Sum: _Builder.join, Concatenate: _Builder.join, Channels: _Builder.channels,
    Product: _Builder.product, Maximum: _Builder.maximum, Minimum: _Builder.maximum,
}  # fmt: skip


def is_affine(layer: nn.Module) -> bool:
    """Whether the layer is affine, or a container whose layers are checked one by one."""
    return is_linear(layer) or is_move(layer) or (type(layer) in _STEPS and type(layer) not in (*_SORTS, *_PAIRS))


def _why_not_layer(layer: nn.Module) -> str:
    """'' where the layer itself is supported, whatever its submodules are; else its name and the option that is not supported."""
    if is_elementwise(layer) or is_move(layer):
        return ""
    if type(layer) not in _STEPS:
        return unmapped(layer)
    if type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) != (1, -1):
        return f"{layer}, which does not flatten a whole sample,"
    return f"GroupSort({layer.group}), larger than 2," if type(layer) is GroupSort and layer.group != 2 else ""


def why_not(model: Chain, threat: Threat) -> str:
    """'' if the model can be written as stages and activations, else one sentence with the reason. Sizes are checked later."""
    if not isinstance(threat, InputBall):
        return f"the threat {threat.name} does not change the input as a vector"
    if model.task != "classification":
        return "the model predicts tokens, not classes of one vector"

    # Submodules of unsupported layers (such as the matrices of attention) are not layers of the chain and are not checked.
    waiting = list(model)
    while waiting:
        layer = waiting.pop(0)
        if why := _why_not_layer(layer):
            return f"{why} has no linear relaxation here"
        if type(layer) in (nn.Sequential, *_JOINS, *_PAIRS):
            waiting[:0] = layer.branches if isinstance(layer, Branching) else layer.children()
    return ""


def network_of(model: Chain, shape: tuple[int, ...], context: Context, *, dense: bool = False) -> Network:
    """The model as a network on samples of that shape (N excluded), cached as long as its weights do not change.

    dense: every stage is a matrix, also stages of large images. Raises UnsupportedLayer for layers and sizes that are not supported.
    """

    def compute() -> Network:
        builder = _Builder(shape, next(model.parameters()).device)
        builder.layers(model)
        if math.prod(builder.shape) == 1:
            both = nn.Linear(1, 2, bias=False, device=builder.device, dtype=torch.float64).requires_grad_(False)
            both.weight.copy_(torch.tensor([[0.0], [1.0]]))
            builder.linear(both, exact=True)  # the logits are (0, z)
        return builder.network(dense)

    return context.constant(model, f"network-{shape}-{dense}", compute)
