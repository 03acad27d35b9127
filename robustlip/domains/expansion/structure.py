"""Layers that rearrange entries or average tokens, and chains of layers. All are linear, so their adjoints are exact."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

from robustlip.domains.expansion.base import (
    ADJOINT_SLACK,
    Ball,
    Expansion,
    Functionals,
    OutputBounds,
    Scope,
    SplitChange,
    Term,
    entry_of,
    expand,
    register,
    rows_of,
    token_norms,
)
from robustlip.domains.expansion.convolution import Scaled
from robustlip.domains.expansion.elementwise import ElementwiseExpansion
from robustlip.domains.expansion.linear import AffineStep, Composed
from robustlip.domains.expansion.neurons import Neurons
from robustlip.domains.expansion.sorting import REFLECTIONS, ReflectionExpansion
from robustlip.domains.norms.elementwise import DROPOUTS
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.geometry import length
from robustlip.layers import AddPositions, MeanTokens, Normalize, Patchify, Sum
from robustlip.numerics.rounding import norm_up, up
from robustlip.ops import is_elementwise
from robustlip.ops.affine import shift_error, standardize_error
from robustlip.ops.convolution import CONVOLUTIONS, TRANSPOSED, for_signals
from robustlip.ops.joins import mean_error
from robustlip.ops.normalization import BATCH_NORMS, is_normalization, stays_whole
from robustlip.threats import l2_factor


def _bending(layer: nn.Module | None) -> type[Neurons] | None:
    """The expansion of a function of single entries together with the affine layer before it; None for other layers."""
    if layer is None:
        return None
    return ElementwiseExpansion if is_elementwise(layer) else ReflectionExpansion if type(layer) in REFLECTIONS else None


def _may_stay(layer: nn.Module, whole: tuple[int, ...]) -> bool:
    """Whether a layer with keeps='images' accepts samples of that shape as one vector: images, and for some layers also signals and volumes."""
    if is_normalization(layer):
        return stays_whole(layer, whole)  # type: ignore[arg-type]
    return len(whole) == 3 or (isinstance(layer, Sum) and (len(whole) > 3 or for_signals(layer)))


class ToL2(Expansion):
    """A change of the norm: ‖·‖₂ ≤ √D‖·‖_∞ and ‖·‖₂ ≤ ‖·‖₁. The activations stay the same."""

    def __init__(self, clean: Tensor, space: str) -> None:
        self.clean = clean
        self.factor = l2_factor(space, clean.shape[-1])

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        return OutputBounds(ball.radius * self.factor, ball.error, [])

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        return g, []


class Same(Expansion):
    """The identity."""

    def __init__(self, clean: Tensor, scope: Scope) -> None:
        self.clean, self.space, self.whole = clean, scope.space, scope.whole

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        return OutputBounds(ball.radius, ball.error, [])

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        return g, []


@register(nn.Identity, *DROPOUTS, any_space=True, keeps="any")
def _identity(layer: nn.Module, clean: Tensor, scope: Scope) -> Expansion:
    if type(layer) not in (nn.Identity, *DROPOUTS):
        raise UnsupportedLayer(f"expected a layer that is the identity in eval mode, got {type(layer).__name__}; use method='global'")
    if layer.training and getattr(layer, "p", 0.0) > 0:
        raise BadInput(f"expected {type(layer).__name__} in eval mode, got it in train mode, where it is random; call model.eval()")
    return Same(clean, scope)


def shape_of(part: Expansion) -> tuple[int, ...]:
    """The shape of a sample after this part: (C, H, W) of an image, or (T, D)."""
    return part.whole or tuple(part.clean.shape[1:])


class ChainExpansion(Expansion):
    """Layers in series. An affine layer and the function of single entries after it are expanded together.

    input_map_error: the float64 error of the input map of each layer per unit of ε (N,); None before `with_input_map`.
    """

    input_map_error: Tensor | None = None

    def __init__(self, layers: Iterable[nn.Module], clean: Tensor, scope: Scope) -> None:
        self.parts: list[Expansion] = []
        layers, i = list(layers), 0
        space, whole = scope.space, scope.whole
        while i < len(layers):
            layer, following = layers[i], layers[i + 1] if i + 1 < len(layers) else None
            entry = entry_of(layer)
            stays = entry is not None and (entry.keeps == "any" or (entry.keeps == "images" and whole is not None and _may_stay(layer, whole)))
            if entry is not None and whole is not None and not stays:
                if len(whole) != 2:
                    raise BadInput(
                        f"expected vectors or tokens before {type(layer).__name__}, got samples of shape {whole}; "
                        f"put Flatten or Patchify before it"
                    )
                self.parts.append(ToTokens(clean, whole, space))
                clean, whole = self.parts[-1].clean, None
            if space != "l2" and entry is not None and not entry.any_space:
                self.parts.append(ToL2(clean, space))
                space = "l2"
            here = Scope(scope.context, space, whole)
            part = expand(layer, clean, here)
            # An affine layer, a batch norm after it and an elementwise function or reflection after that are expanded together.
            if type(layer) in (nn.Linear, *CONVOLUTIONS, *TRANSPOSED) and isinstance(part, AffineStep):
                after = Scope(scope.context, "l2", part.whole)
                if type(following) in BATCH_NORMS:
                    scale = expand(following, part.clean, after)  # type: ignore[arg-type]
                    assert isinstance(scale, Scaled)
                    part = Composed(part, scale, scale.factors)
                    i += 1
                    following = layers[i + 1] if i + 1 < len(layers) else None
                bends = _bending(following)
                if following is not None and bends is not None:
                    expand(following, part.clean[:1], after)  # refuses hooks and unsupported classes
                    part = bends(following, clean, here, part)
                    i += 1
            self.parts.append(part)
            clean, space, whole = part.clean, part.space, part.whole
            i += 1
        self.clean, self.space, self.whole = clean, space, whole

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        bounds: list[Term] = []
        for part in self.parts:
            after = part.advance(ball, remainder)
            bounds += after.bounds
            ball = Ball(after.radius, after.error, ball.weight_radius, self._split_behind(ball.split))
        return OutputBounds(ball.radius, ball.error, bounds)

    def _split_behind(self, split: SplitChange | None) -> SplitChange | None:
        """The split of the change before the next part, from that before this part."""
        if split is None or self.input_map_error is None:
            return split
        return SplitChange(split.epsilon, split.rest + self.input_map_error.unsqueeze(-1) * split.epsilon)

    @property
    def uses_input_map(self) -> bool:
        return any(part.uses_input_map for part in self.parts)

    def with_input_map(self, m: Tensor, before: Tensor) -> Self:
        parts, input_map_error = list(self.parts), None
        for i, part in enumerate(self.parts):
            parts[i] = part.with_input_map(m, before)
            if not any(later.uses_input_map for later in self.parts[i + 1 :]):
                break
            # The float64 error of J·M is measured relative to M, and the largest so far counts: J may nearly annihilate M.
            lost = 2.0**-34 * torch.linalg.matrix_norm(m)
            input_map_error = lost if input_map_error is None else torch.maximum(input_map_error, lost)
            m, before = part.jacobian() @ m, before * part.lipschitz()
        return self.replaced(parts=parts, input_map_error=input_map_error)

    def functionals(self) -> Functionals | None:
        return self.parts[0].functionals() if self.parts else None

    def then(self, part: Expansion) -> ChainExpansion:
        """This chain followed by one more part."""
        return self.replaced(parts=[*self.parts, part], clean=part.clean, space=part.space, whole=part.whole)

    def lipschitz(self) -> Tensor | float:
        gain: Tensor | float = 1.0
        for part in self.parts:
            gain = gain * part.lipschitz()
        return gain

    def at_rows(self, sample: Tensor, position: Tensor, rounding_radii: Tensor) -> Self:
        parts: list[Expansion] = []
        for part in self.parts:
            if parts:
                rounding_radii = self.parts[len(parts) - 1].advance(Ball.of(rounding_radii), remainder=False).radius
            parts.append(part.at_rows(sample, position, rounding_radii))
        return self.replaced(parts=parts, clean=rows_of(self.clean, sample, position))

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        groups: list[list[Term]] = []
        for part in reversed(self.parts):
            g, weights = part.adjoint(g, two_sided)
            groups.append(weights)
        return g, [w for group in reversed(groups) for w in group]


@register(nn.Sequential, any_space=True, keeps="any")
def _sequential(layer: nn.Sequential, clean: Tensor, scope: Scope) -> Expansion:
    return ChainExpansion(layer, clean, scope)


@register(AddPositions)
class AddPositionsExpansion(Expansion):
    """x_t + p_t: the sum rounds once."""

    by_token = ("clean", "norm")

    def __init__(self, layer: AddPositions, clean: Tensor, scope: Scope) -> None:
        self.scope = scope
        if layer.positions.dim() != 2 or layer.positions.shape[1] != clean.shape[-1]:
            raise BadInput(f"expected positions of width {clean.shape[-1]}, got {tuple(layer.positions.shape)}; match the tokens' width")
        self.clean = clean + layer.positions.detach().double()[: clean.shape[1]]
        self.norm = norm_up(self.clean)

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        norm = self.norm + ball.radius
        fresh = self.scope.infinite_if_overflow(up(shift_error(norm, self.clean.shape[-1], self.scope)), norm)
        return OutputBounds(ball.radius + fresh, ball.error + fresh, [fresh] if remainder else [])

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        return g, [token_norms(g)]


@register(MeanTokens)
class MeanTokensExpansion(Expansion):
    """The mean of the tokens; it changes by at most the mean of their radii."""

    def __init__(self, layer: MeanTokens, clean: Tensor, scope: Scope) -> None:
        self.scope, self.tokens = scope, clean.shape[1]
        self.norm = norm_up(clean)
        self.clean = clean.mean(1, keepdim=True)

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        radius = ball.radius
        largest = (self.norm + radius).amax(-1, keepdim=True)
        fresh = self.scope.infinite_if_overflow(up(mean_error(largest, self.tokens, self.clean.shape[-1], self.scope)), largest * self.tokens)
        bounds: list[Term] = [fresh, radius.amax(-1, keepdim=True)] if remainder else []
        return OutputBounds(up(radius.mean(-1, keepdim=True)) + fresh, up(ball.error.mean(-1, keepdim=True)) + fresh, bounds)

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        norms = token_norms(g)
        return (g / self.tokens).expand(*g.shape[:-2], self.tokens, g.shape[-1]), [norms, ADJOINT_SLACK * norms]


@register(nn.Flatten, any_space=True, keeps="any")
class FlattenExpansion(Expansion):
    """All entries of a sample become one vector. The radius is the norm of the tokens' radii."""

    def __init__(self, layer: nn.Flatten, clean: Tensor, scope: Scope) -> None:
        if layer.start_dim != 1 or layer.end_dim != -1:
            raise BadInput(f"expected Flatten(1, -1), got Flatten({layer.start_dim}, {layer.end_dim}); flatten all but the batch")
        self.space, self.shape = scope.space, clean.shape[1:]
        self.clean = clean.flatten(1).unsqueeze(1)

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        joined = up(length(ball.radius, self.space, ball.radius.dim() - 1).unsqueeze(-1) * (1 + 1e-12))
        return OutputBounds(joined, up(torch.linalg.vector_norm(ball.error, dim=-1, keepdim=True) * (1 + 1e-12)), [])

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        return g.squeeze(-2).unflatten(-1, self.shape), []


class ToTokens(Expansion):
    """From one vector of all entries (T·D) to tokens; no token changes by more than the whole vector."""

    def __init__(self, clean: Tensor, whole: tuple[int, ...], space: str) -> None:
        if len(whole) != 2:
            raise BadInput(f"expected tokens (T, D) or images, got samples of shape {whole}; put Flatten or Patchify before it")
        self.clean, self.space = clean.unflatten(-1, whole).squeeze(1), space

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        shape = (*ball.radius.shape[:-1], self.clean.shape[1])
        return OutputBounds(ball.radius.expand(shape), ball.error.expand(shape), [])

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        return g.flatten(-2).unsqueeze(-2), []


@register(Patchify, any_space=True, keeps="any")
class PatchifyExpansion(Expansion):
    """From one vector of all pixels (C, H, W) to patches; no patch changes by more than the image."""

    def __init__(self, layer: Patchify, clean: Tensor, scope: Scope) -> None:
        if scope.whole is None or len(scope.whole) != 3:
            raise BadInput("expected images (N, C, H, W) before Patchify, got vectors or tokens; patchify first")
        self.shape, self.patch, self.space = scope.whole, layer.patch, scope.space
        self.clean = layer(clean.unflatten(-1, self.shape).squeeze(1))

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        shape = (*ball.radius.shape[:-1], self.clean.shape[1])
        return OutputBounds(ball.radius.expand(shape), ball.error.expand(shape), [])

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        (c, h, w), p = self.shape, self.patch
        grid = g.unflatten(-1, (c, p, p)).unflatten(-4, (h // p, w // p))  # (…, H/p, W/p, C, p, p)
        k = grid.dim()
        order = (*range(k - 5), k - 3, k - 5, k - 2, k - 4, k - 1)
        return grid.permute(order).reshape(*g.shape[:-2], 1, c * h * w), []


@register(Normalize, any_space=True, keeps="any")
class NormalizeExpansion(Expansion):
    """(x − mean)/std by channel. The gain is that of each channel; where all channels are bounded together, the largest."""

    by_token = ("clean", "reach")

    def __init__(self, layer: Normalize, clean: Tensor, scope: Scope) -> None:
        self.scope, self.space, self.whole = scope, scope.space, scope.whole
        shape = scope.whole or clean.shape[-1:]
        channels = shape[0] if len(shape) == 3 else shape[-1]
        mean, std = layer.mean.detach().double(), layer.std.detach().double()
        if not bool((std != 0).all()):
            raise BadInput(f"expected std other than 0 in {layer.std.dtype}, got {std.tolist()}; use a wider dtype, or leave constant channels at 1")
        if sizes := {mean.numel(), std.numel()} - {1, channels}:
            raise BadInput(f"expected a mean and std for each of {channels} channels, or one for all, got {max(sizes)}; give as many as channels")

        def spread(v: Tensor) -> Tensor:
            """From one value per channel to one per entry of the vector (D,)."""
            v = v.expand(channels)
            v = v.repeat_interleave(shape[1] * shape[2]) if len(shape) == 3 else v
            return v.repeat(shape[0]) if scope.whole is not None and len(shape) == 2 else v

        self.scale = 1 / spread(std)
        self.shift, self.smallest = spread(mean), float(std.abs().amin())
        self.gain = float(self.scale.abs().amax()) * (1 + 1e-15)
        self.clean = (clean - self.shift) * self.scale
        self.reach = norm_up(clean) + float(norm_up(self.shift, 0))
        self.factor = l2_factor(scope.space, clean.shape[-1])

    def advance(self, ball: Ball, remainder: bool = True) -> OutputBounds:
        radius = ball.radius
        reach = self.reach + self.factor * radius
        size = self.gain * reach
        root = math.sqrt(self.clean.shape[-1])
        # In ℓ1 and ℓ∞ the ℓ2 bound is used, times √n in ℓ1.
        fresh = standardize_error(size, self.gain, self.clean.shape[-1], self.scope)
        # The difference must not overflow before it is divided.
        fresh = self.scope.infinite_if_flushed(self.scope.infinite_if_overflow(up(fresh), torch.maximum(size, reach)), self.smallest)
        bounds: list[Term] = [fresh, radius.amax(-1, keepdim=True)] if remainder else []
        moved = up(self.gain * radius) + fresh * (root * (1 + 1e-15) if self.space == "l1" else 1.0)
        return OutputBounds(moved, up(self.gain * ball.error) + fresh, bounds)

    def lipschitz(self) -> Tensor | float:
        return self.gain

    def adjoint(self, g: Tensor, two_sided: bool = False) -> tuple[Tensor, list[Term]]:
        norms = token_norms(g)
        # In ℓ∞ a unit of radius changes a linear function by ‖g‖₁ ≤ √n‖g‖₂.
        return g * self.scale, [norms, ADJOINT_SLACK * self.gain * self.factor * norms.sum(-1, keepdim=True)]
