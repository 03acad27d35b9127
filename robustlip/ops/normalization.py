"""Normalisation of groups of entries: y = γ·c/s + β, c = Px, s² = ‖c‖²/D + eps, x the D entries of a group, P the centring or the identity.

LayerNorm and RMSNorm: a group is a token, or the last dimensions of a sample. GroupNorm: a group is some channels with all their positions;
InstanceNorm without running statistics: one channel. `WrittenNorm` executes LayerNorm or RMSNorm as a model writes them: without β, perhaps with D −
1 instead of D (m below), or with s = ‖c‖/√m + eps.

Batch norm in eval mode is affine: y = g·x + (β − g·mean) by channel, g = γ/sqrt(var + eps) of the running statistics.

docs/theory.md, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers.formulas import WrittenNorm
from robustlip.numerics.arithmetic import Arithmetic, RoundingModel
from robustlip.numerics.rounding import TINY, U64, gamma, norm_up, up
from robustlip.ops.convolution import image_shape
from robustlip.ops.elementwise import FUNCTION_ULPS
from robustlip.ops.formulas import norm_facts

# ‖d²y[u, u]‖ ≤ ‖γ‖_∞·C‖u‖²/(√D s²), C = 2/√3 = 1.1547005… rounded up.
CURVATURE = 1.15471
# The same constant for s = ‖c‖/√m + eps: 2, at c = 0 and u along c.
CURVATURE_OUTSIDE = 2.0

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Groups over the last dimensions of a sample, and groups of channels. Instance norms with running statistics are affine and not among these.
OF_TOKENS, OF_CHANNELS = (nn.LayerNorm, nn.RMSNorm, WrittenNorm), (nn.GroupNorm, *INSTANCE_NORMS)
NORMALIZATIONS = (*OF_TOKENS, *OF_CHANNELS)
Normalization = Union[nn.LayerNorm, nn.RMSNorm, WrittenNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d]


def is_normalization(layer: nn.Module) -> bool:
    """Whether the layer divides entries by their own norm. (Instance norms with running statistics divide by those; captures have batch norms
    instead.)"""
    if isinstance(layer, INSTANCE_NORMS):
        return type(layer) in INSTANCE_NORMS and layer.running_mean is None and layer.running_var is None
    return type(layer) in (*OF_TOKENS, nn.GroupNorm)


@dataclass(frozen=True)
class Groups:
    """A vector that is normalised as `count` consecutive groups of `width` entries each."""

    count: int
    width: int
    eps: float

    @property
    def numbers(self) -> int:
        return self.count * self.width


def own_shape(layer: Normalization) -> tuple[int, ...]:
    """The last dimensions that LayerNorm, RMSNorm and WrittenNorm normalise together."""
    if isinstance(layer, WrittenNorm):
        return (layer.width,)
    assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
    return tuple(layer.normalized_shape)


def stays_whole(layer: Normalization, whole: tuple[int, ...]) -> bool:
    """Whether a sample that is bounded as one vector may stay one before the layer: not where each token (T, D) is normalised separately."""
    return len(whole) != 2 or type(layer) in OF_CHANNELS or len(own_shape(layer)) > 1


def check_normalization(layer: Normalization) -> float:
    """eps of the layer. Raises UnsupportedLayer for layers whose constants are not proved here."""
    name = type(layer).__name__
    if isinstance(layer, WrittenNorm):
        return float(norm_facts(layer).eps)
    if not is_normalization(layer):
        raise UnsupportedLayer(f"expected LayerNorm, RMSNorm, GroupNorm or InstanceNorm without statistics, got {name}; replace it or add a rule")
    if layer.eps is None:
        raise UnsupportedLayer(f"expected {name} with its eps stated, got None, which stands for another number in every dtype; give eps=1e-6, say")
    if not layer.eps > 0:
        raise UnsupportedLayer(f"expected {name} with eps above 0, got {layer.eps}: it is not Lipschitz without; give eps=1e-6, say")
    return float(layer.eps)


def normalized(layer: Normalization, whole: tuple[int, ...] | None, tokens: int, width: int) -> Groups:
    """The groups of one vector: of a sample of shape `whole`, or, if that is None, of one of `tokens` tokens of that width.

    Raises BadInput for shapes that the layer does not accept, UnsupportedLayer as `check_normalization`, and where groups extend over several tokens.
    """
    eps, name, shape = check_normalization(layer), type(layer).__name__, whole or (width,)
    if type(layer) not in OF_CHANNELS:
        own = own_shape(layer)
        if whole is None and len(own) > 1:
            raise UnsupportedLayer(f"expected {name} over the last dimension of tokens, got {own}; normalise tokens one by one")
        if shape[-len(own) :] != own:
            got = shape[-1] if len(own) == 1 else shape
            wanted = f"tokens of width {own[0]}" if len(own) == 1 else f"samples that end in {own}"
            raise BadInput(f"expected {wanted} before {name}, got {got}; match them")
        return Groups(math.prod(shape[: -len(own)]), math.prod(own), eps)
    if whole is None and tokens != 1:
        raise UnsupportedLayer(f"expected vectors, signals or images before {name}, got tokens, which it would mix; use LayerNorm")
    if isinstance(layer, nn.GroupNorm):
        channels, count = layer.num_channels, layer.num_groups
    else:
        assert isinstance(layer, INSTANCE_NORMS)
        shape = image_shape(layer, whole)
        # Without a gain torch accepts any number of channels.
        channels = count = layer.num_features if layer.affine else shape[0]
    if shape[0] != channels:
        raise BadInput(f"expected {channels} channels before {name}, got {shape[0]}; match them")
    return Groups(count, math.prod(shape) // count, eps)


def centres(layer: Normalization) -> bool:
    """Whether the mean of a group is subtracted."""
    return norm_facts(layer).centred if isinstance(layer, WrittenNorm) else not isinstance(layer, nn.RMSNorm)


def divided_by(layer: Normalization, groups: Groups) -> tuple[int, bool]:
    """(m, whether eps is added outside the root): the divisor is √(‖c‖²/m + eps), or ‖c‖/√m + eps."""
    if isinstance(layer, WrittenNorm):
        facts = norm_facts(layer)
        return facts.count, facts.outside
    return groups.width, False


def largest_gain(layer: Normalization) -> float:
    """‖γ‖_∞."""
    return 1.0 if layer.weight is None else float(layer.weight.detach().abs().amax())


def spread(layer: Normalization, constant: Tensor, groups: Groups) -> Tensor:
    """γ or β for each entry (count, width), float64."""
    constant = constant.detach().double().flatten()
    if type(layer) in OF_CHANNELS:  # one per channel, repeated over its positions
        return constant.repeat_interleave(groups.numbers // len(constant)).view(groups.count, groups.width)
    return constant.expand(groups.count, groups.width)


def gains(layer: Normalization, groups: Groups) -> Tensor | float:
    """‖γ‖_∞ of each group (count,), or one number if all groups have the same γ."""
    if type(layer) in OF_TOKENS or layer.weight is None:
        return largest_gain(layer)
    return layer.weight.detach().double().abs().unflatten(0, (groups.count, -1)).amax(-1)


def largest_shift(layer: Normalization, groups: Groups) -> float:
    """‖β‖₂ of all groups together, rounded up; 0 without β."""
    bias = getattr(layer, "bias", None)
    if bias is None:
        return 0.0
    often = groups.numbers // bias.numel()
    return float(norm_up(bias.detach().flatten(), 0)) * (1.0 if often == 1 else math.sqrt(often) * (1 + 1e-15))


def least_size(layer: Normalization) -> float:
    """s ≥ this for every group: √eps, or eps if it is added outside the root."""
    eps = check_normalization(layer)
    return eps if isinstance(layer, WrittenNorm) and norm_facts(layer).outside else math.sqrt(eps)


def curvature(layer: Normalization) -> float:
    """The constant C in ‖d²y[u, u]‖ ≤ ‖γ‖_∞·C‖u‖²/(√m s²)."""
    return CURVATURE_OUTSIDE if isinstance(layer, WrittenNorm) and norm_facts(layer).outside else CURVATURE


def local_lipschitz(layer: Normalization, x: Tensor, radius: Tensor | float, groups: Groups) -> Tensor:
    """A Lipschitz constant (…), float64, of the layer on the ℓ2 balls of `radius` (…) around the groups x (…, D).

    x: (…, count, D) where gains differ between groups. The Jacobian at x' is γ(I − ccᵀ/(m s²))/s·P with c = Px', s² = ‖c‖²/m + eps, of norm at most
    ‖γ‖_∞/s, and ‖Px'‖ ≥ ‖Px‖ − r on the ball, which is convex. With s = ‖c‖/√m + eps it is (I − ccᵀ/(√m‖c‖s))/s. The constant is that of exact
    arithmetic.
    """
    check_normalization(layer)
    width, eps = groups.width, groups.eps
    if x.shape[-1] != width:
        raise BadInput(f"expected groups of {width} numbers in {type(layer).__name__}, got {x.shape[-1]}; match them")
    count, outside = divided_by(layer, groups)
    x = x.detach().double()
    centred = x - x.mean(-1, keepdim=True) if centres(layer) else x
    # The error of the computed ‖Px‖ is γ_{D+4} of itself and, through the mean, of ‖x‖.
    size = torch.linalg.vector_norm(centred, dim=-1) * (1 - 2 * gamma(width + 8, U64)) - 2 * gamma(width + 8, U64) * norm_up(x)
    least = ((size - radius) * (1 - 8 * U64)).clamp_min(0.0)
    if outside:
        return up(gains(layer, groups) / (least / math.sqrt(count) * (1 - 8 * U64) + eps * (1 - 8 * U64)))
    return up(gains(layer, groups) / (least.square() / count * (1 - 8 * U64) + eps * (1 - 8 * U64)).sqrt())


def normalization_error(
    layer: Normalization, groups: Groups, norm: Tensor, out_norm: Tensor | float, inverse: Tensor | float, arithmetic: RoundingModel
) -> Tensor:
    """‖fl(y) − y‖₂ of these groups together for ‖x‖₂ ≤ norm, ‖y‖₂ ≤ out_norm and 1/s ≤ inverse of each; infinite where no bound holds.

    Mean: γ_D‖x‖. Variance by Welford's or a two-pass formula, as torch computes it: an error of at most D·u·(v + |μ|√v) (Chan, Golub and LeVeque
    1983), so a relative error of 1/s of ½D·u(1 + |μ|√v/s²), doubled here, where |μ| ≤ ‖x‖/√D and √v/s² ≤ min(1/s, 1/(2√eps)). RMSNorm subtracts no
    mean. GroupNorm of channels-last images computes Σx²/D − μ̂²: with q² = ‖x‖²/D ≥ μ² the error is γ_{D+2}q² + 2γ_{D+2}q² + 4uq² ≤ 4γ_{D+8}q², so
    the relative error of 1/s is 4γ_{D+8}q²/s² as long as that is below ½; 4γ_{D+8} ≤ 2g. Both kernels are covered.
    """
    if isinstance(layer, WrittenNorm):
        return _written_error(layer, groups, norm, out_norm, inverse, arithmetic)
    width, eps = groups.width, groups.eps
    centred = centres(layer)
    root = math.sqrt(width)
    g = arithmetic.gamma(2 * width + 16)
    # Squares that underflow (torch sums them in float32 at least) change s² by a relative tiny/eps.
    relative = g + 2 * TINY[torch.float32] / eps + 0 * norm
    if centred:
        inverse = torch.as_tensor(inverse, dtype=norm.dtype, device=norm.device)
        relative = relative + g * (norm / root) * inverse.clamp_max(1 / (2 * math.sqrt(eps)))
    if type(layer) in OF_CHANNELS:
        relative = relative + 2 * g * (norm / root * inverse).square()
    # The first-order form is valid while the relative error of the variance is small; beyond that there is no bound.
    relative = torch.where(relative < 0.5, relative, torch.full_like(relative, math.inf))
    gain = largest_gain(layer) * inverse
    centring = g * norm * gain * (1 + relative) if centred else 0 * norm
    every = math.sqrt(groups.numbers)
    lost = 4 * every * arithmetic.tiny * (1 + out_norm)
    lost = lost + 2 * every * (gain + (1 + norm) / math.sqrt(eps)) * arithmetic.flushed  # subnormal x, γ
    # 0·inf is NaN: no bound.
    return (centring + (relative + 8 * arithmetic.unit) * out_norm + lost).nan_to_num(math.inf, math.inf)


def _written_error(
    layer: WrittenNorm, groups: Groups, norm: Tensor, out_norm: Tensor | float, inverse: Tensor | float, arithmetic: RoundingModel
) -> Tensor:
    """`normalization_error` of an expression that is executed operation by operation, in any order that `norm_of` recognises.

    The error of the mean is γ_D‖x‖/√D and that of the difference u, so ‖ĉ − c‖ ≤ E = g‖x‖, g = γ_{D+8}. Squares, their sum, the quotient and eps (its
    value and the sum) round to γ_{D+3} of s²; the root halves that and rounds; ĉ instead of c changes s by at most E/√m. A kernel that computes the
    variance has an error of ½D·u(1 + |μ|√v/s²), as above, |μ| ≤ ‖x‖/√m. Squares that underflow change s² by 4·tiny, and s by 2√tiny if eps is outside
    the root. Together the relative error of s is ρ = g(1 + ‖x‖/(√m s)) plus underflow as long as that is below 0.3; that of its inverse is ρ/(1 − ρ),
    plus k·u for a kernel of rsqrt or pow (k = FUNCTION_ULPS). So the error of y = γĉ/ŝ is ‖γ‖_∞E/ŝ, plus that fraction of ‖y‖, plus the roundings of
    two products.
    """
    width, eps = groups.width, groups.eps
    count, outside = divided_by(layer, groups)
    root, inverse = math.sqrt(groups.numbers), torch.as_tensor(inverse, dtype=norm.dtype, device=norm.device)
    g = arithmetic.gamma(width + 8)
    vanished = 4 * math.sqrt(arithmetic.tiny) / eps if outside else 4 * arithmetic.tiny / eps
    relative = g + g * (norm / math.sqrt(count)) * inverse * centres(layer) + vanished
    relative = torch.where(relative < 0.3, relative / (1 - relative), torch.full_like(relative, math.inf))
    relative = relative + FUNCTION_ULPS * arithmetic.unit * (1 + relative)
    gain = largest_gain(layer) * inverse
    moved = (g * norm * centres(layer) + 2 * root * (arithmetic.tiny + arithmetic.flushed)) * gain * (1 + relative)
    lost = 4 * root * arithmetic.tiny * (1 + inverse + gain + out_norm) + 2 * root * inverse * (1 + norm) * arithmetic.flushed  # a subnormal gain
    return (moved + (relative + 4 * arithmetic.unit * (1 + relative)) * out_norm + lost).nan_to_num(math.inf, math.inf)


def _batch_error(norm: Tensor, reach: Tensor, gain: Tensor, mean: Tensor, variance: Tensor, width: int, arithmetic: RoundingModel) -> Tensor:
    """‖fl(y) − y‖₂ of batch norm for ‖x‖₂ ≤ norm, ‖g∘x‖₂ + ‖β‖₂ + ‖g·mean‖₂ ≤ reach, x with `width` entries.

    A few roundings each of γ/sqrt(var + eps), g·x, g·mean and the sums, in any order; a tiny var + eps may itself have an error of `tiny`.
    """
    relative = arithmetic.gamma(16) + 2 * arithmetic.tiny / variance
    relative = torch.where(relative < 1, relative, torch.full_like(relative, math.inf))
    fresh = relative * reach + 4 * math.sqrt(width) * arithmetic.tiny * (1 + gain) * (1 + mean + norm)
    fresh = fresh + math.sqrt(width) * (norm + mean) / variance.sqrt() * arithmetic.flushed  # a subnormal γ
    return torch.where(fresh.isnan(), torch.full_like(fresh, math.inf), fresh)


def batch_errors(layer: BatchNorm, read: Tensor, arithmetic: Arithmetic) -> Tensor:
    """|fl(y) − y| (N, C, …) for each entry, |x| ≤ read (N, C, …), float64; infinite where no bound holds or the execution may overflow."""
    check_batch(layer)
    assert layer.running_mean is not None and layer.running_var is not None
    view = (-1, *[1] * (read.dim() - 2))
    mean, variance = (t.to(read.device).double().view(view) for t in (layer.running_mean.abs(), layer.running_var.double() + layer.eps))
    gain = up(1 / variance.sqrt())
    gain = gain if layer.weight is None else gain * layer.weight.detach().double().abs().view(view)
    beta = 0.0 if layer.bias is None else layer.bias.detach().double().abs().view(view)
    fresh = _batch_error(read, gain * (read + mean) + beta, gain, mean, variance, 1, arithmetic)
    return arithmetic.infinite_if_overflow(fresh, (read + mean) * (1 + gain) / variance.clamp_max(1.0).sqrt() + beta)


BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def check_batch(layer: BatchNorm) -> None:
    """Raises BadInput in train mode and UnsupportedLayer without running statistics: samples would influence each other."""
    name = type(layer).__name__
    if layer.training:
        raise BadInput(f"expected {name} in eval mode, got it in train mode, where samples change each other; call model.eval()")
    if layer.running_mean is None or layer.running_var is None:
        raise UnsupportedLayer(f"expected {name} with running statistics, got none: samples change each other; track them")


def batch_positions(layer: BatchNorm, whole: tuple[int, ...] | None, tokens: int, width: int) -> int:
    """The number of entries of a channel: those of an image, or 1 for a vector. Raises BadInput for samples that the layer does not accept."""
    if not isinstance(layer, nn.BatchNorm1d):
        whole = image_shape(layer, whole)
    elif (whole is None and tokens != 1) or (whole is not None and len(whole) != 2):
        raise BadInput("expected vectors (N, n) before BatchNorm1d, got tokens or images; put Flatten in front, or use LayerNorm for tokens")
    channels, positions = (width, 1) if whole is None else (whole[0], math.prod(whole[1:]))
    if layer.num_features != channels:
        raise BadInput(f"expected {channels} channels in BatchNorm, got {layer.num_features}; match them")
    return positions


@dataclass(frozen=True)
class BatchScale:
    """The constants of a batch norm. gain: max|g|; shift: ‖β‖ + ‖g·mean‖ over channels; mean: max|mean|, all rounded up.

    variance: the smallest var + eps, rounded down.
    """

    gain: float
    shift: float
    mean: float
    variance: float

    @classmethod
    def of(cls, layer: BatchNorm) -> BatchScale:
        """Raises as `check_batch` does, and BadInput for variances that are not above 0."""
        check_batch(layer)
        assert layer.running_mean is not None and layer.running_var is not None
        variance = layer.running_var.double() + layer.eps
        if not bool((variance > 0).all()):
            raise BadInput(f"expected running variances + eps above 0, got {float(variance.min())}; retrain the layer")
        gains = up(1 / variance.sqrt()) if layer.weight is None else up(layer.weight.detach().double().abs() / variance.sqrt())
        shift = norm_up(gains * layer.running_mean.double().abs(), 0)
        beta = 0.0 if layer.bias is None else float(norm_up(layer.bias.detach(), 0))
        return cls(float(gains.amax()), float(up(shift)) + beta, float(layer.running_mean.abs().amax()), float(variance.min()) * (1 - 1e-12))

    def output_norm(self, norm: Tensor, positions: int) -> Tensor:
        """≥ ‖y‖₂ and the norms of all terms of its sum, for ‖x‖₂ ≤ norm."""
        return self.gain * norm + self.shift * math.sqrt(positions) * (1 + 1e-12)

    def error(self, norm: Tensor, positions: int, width: int, arithmetic: RoundingModel) -> Tensor:
        """‖fl(y) − y‖₂ for ‖x‖₂ ≤ norm, x with `width` entries, `positions` per channel; infinite where no bound holds."""
        gain, mean, variance = (torch.tensor(n, dtype=torch.float64, device=norm.device) for n in (self.gain, self.mean, self.variance))
        return _batch_error(norm, self.output_norm(norm, positions), gain, mean, variance, width, arithmetic)

    def largest(self, norm: Tensor) -> Tensor:
        """≥ every intermediate value."""
        return (norm + self.mean) * (1 + self.gain) / math.sqrt(min(1.0, self.variance))
