"""LayerNorm and RMSNorm of single tokens: y = γ·c/s + β, c = Px, s² = ‖c‖²/D + eps, P centring (LayerNorm) or the identity.

`WrittenNorm` runs them as a model wrote them: without β, perhaps with D − 1 in the place of D (m below), or with s = ‖c‖/√m + eps.

Batch norm in eval mode is affine: y = g·x + (β − g·mean) by channel, g = γ/sqrt(var + eps) of the running statistics.

docs/theory.md, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers.formulas import WrittenNorm
from robustlip.numerics.arithmetic import RoundingModel
from robustlip.numerics.rounding import TINY, U64, gamma, norm_up, up
from robustlip.ops.convolution import image_shape
from robustlip.ops.elementwise import FUNCTION_ULPS
from robustlip.ops.formulas import norm_facts

# ‖d²y[u, u]‖ ≤ ‖γ‖_∞·C‖u‖²/(√D s²), C = 2/√3 = 1.1547005… rounded up.
CURVATURE = 1.15471
# The same of s = ‖c‖/√m + eps: 2, at c = 0 and u along c.
CURVATURE_OUTSIDE = 2.0

Normalization = nn.LayerNorm | nn.RMSNorm | WrittenNorm


def normalized(layer: Normalization, state_width: int | None = None) -> tuple[int, float]:
    """(width D of the tokens that are normalised, eps). Raises UnsupportedLayer for layers that no constant here is proved for."""
    name = type(layer).__name__
    if isinstance(layer, WrittenNorm):
        if state_width not in (None, layer.width):
            raise BadInput(f"expected tokens of width {layer.width} in front of {name}, got {state_width}; match them")
        return layer.width, float(norm_facts(layer).eps)
    if type(layer) not in (nn.LayerNorm, nn.RMSNorm):
        raise UnsupportedLayer(f"expected LayerNorm or RMSNorm, got {name}; replace it or add a rule")
    if len(layer.normalized_shape) != 1:
        raise UnsupportedLayer(f"expected {name} over the last dimension, got {tuple(layer.normalized_shape)}; normalise tokens one by one")
    if layer.eps is None:
        raise UnsupportedLayer(f"expected {name} with its eps stated, got None, which stands for another number in every dtype; give eps=1e-6, say")
    if not layer.eps > 0:
        raise UnsupportedLayer(f"expected {name} with eps above 0, got {layer.eps}: it is not Lipschitz without; give eps=1e-6, say")
    width = layer.normalized_shape[0]
    if state_width not in (None, width):
        raise BadInput(f"expected tokens of width {width} in front of {name}, got {state_width}; match them")
    return width, float(layer.eps)


def centres(layer: Normalization) -> bool:
    """Whether the mean of a token is taken off before it is divided."""
    return norm_facts(layer).centred if isinstance(layer, WrittenNorm) else isinstance(layer, nn.LayerNorm)


def divided_by(layer: Normalization) -> tuple[int, bool]:
    """(m, whether eps stands outside of the root): what a token's numbers are divided by, √(‖c‖²/m + eps) or ‖c‖/√m + eps."""
    if isinstance(layer, WrittenNorm):
        facts = norm_facts(layer)
        return facts.count, facts.outside
    return normalized(layer)[0], False


def largest_gain(layer: Normalization) -> float:
    """‖γ‖_∞."""
    return 1.0 if layer.weight is None else float(layer.weight.detach().abs().amax())


def largest_shift(layer: Normalization) -> float:
    """‖β‖₂, rounded up; 0 without one."""
    bias = layer.bias if isinstance(layer, nn.LayerNorm) else None
    return 0.0 if bias is None else float(norm_up(bias.detach(), 0))


def least_size(layer: Normalization) -> float:
    """s ≥ this of every token: √eps, or eps where it stands outside of the root."""
    eps = normalized(layer)[1]
    return eps if divided_by(layer)[1] else math.sqrt(eps)


def curvature(layer: Normalization) -> float:
    """C of ‖d²y[u, u]‖ ≤ ‖γ‖_∞·C‖u‖²/(√m s²)."""
    return CURVATURE_OUTSIDE if divided_by(layer)[1] else CURVATURE


def local_lipschitz(layer: Normalization, x: Tensor, radius: Tensor | float) -> Tensor:
    """A Lipschitz constant (…), float64, of the layer on the ℓ2 balls of `radius` (…) around the tokens x (…, D): ‖f(x') − f(x)‖₂ ≤ it·‖x' − x‖₂.

    The Jacobian at x' is γ(I − ccᵀ/(m s²))/s·P with c = Px', s² = ‖c‖²/m + eps, of norm at most ‖γ‖_∞/s, and ‖Px'‖ ≥ ‖Px‖ − r on the
    ball, which is convex. With s = ‖c‖/√m + eps it is (I − ccᵀ/(√m‖c‖s))/s. Exact arithmetic; rounding comes on top.
    """
    width, eps = normalized(layer, x.shape[-1])
    count, outside = divided_by(layer)
    x = x.detach().double()
    centred = x - x.mean(-1, keepdim=True) if centres(layer) else x
    # The computed ‖Px‖ is off by γ_{D+4} of itself and, through the mean, of ‖x‖.
    size = torch.linalg.vector_norm(centred, dim=-1) * (1 - 2 * gamma(width + 8, U64)) - 2 * gamma(width + 8, U64) * norm_up(x)
    least = ((size - radius) * (1 - 8 * U64)).clamp_min(0.0)
    if outside:
        return up(largest_gain(layer) / (least / math.sqrt(count) * (1 - 8 * U64) + eps * (1 - 8 * U64)))
    return up(largest_gain(layer) / (least.square() / count * (1 - 8 * U64) + eps * (1 - 8 * U64)).sqrt())


def normalization_error(layer: Normalization, norm: Tensor, behind: Tensor | float, inverse: Tensor | float, arithmetic: RoundingModel) -> Tensor:
    """‖fl(y) − y‖₂ for ‖x‖₂ ≤ norm, ‖y‖₂ ≤ behind and 1/s ≤ inverse there; infinite where nothing is known.

    Mean: γ_D‖x‖. Variance by Welford's or a two-pass formula, as torch computes it: off by at most D·u·(v + |μ|√v) (Chan, Golub and LeVeque
    1983), so 1/s by a relative ½D·u(1 + |μ|√v/s²), twice that here, where |μ| ≤ ‖x‖/√D and √v/s² ≤ min(1/s, 1/(2√eps)). RMSNorm subtracts no mean.
    """
    if isinstance(layer, WrittenNorm):
        return _written_error(layer, norm, behind, inverse, arithmetic)
    width, eps = normalized(layer)
    centred = centres(layer)
    root = math.sqrt(width)
    g = arithmetic.gamma(2 * width + 16)
    # Squares that vanish (torch sums them in float32 at least) move s² by a tiny/eps.
    relative = g + 2 * TINY[torch.float32] / eps + 0 * norm
    if centred:
        inverse = torch.as_tensor(inverse, dtype=norm.dtype, device=norm.device)
        relative = relative + g * (norm / root) * inverse.clamp_max(1 / (2 * math.sqrt(eps)))
    # The first-order form holds while the variance keeps its size; beyond, its square root may be of anything.
    relative = torch.where(relative < 0.5, relative, torch.full_like(relative, math.inf))
    gain = largest_gain(layer) * inverse
    centring = g * norm * gain * (1 + relative) if centred else 0 * norm
    lost = 4 * root * arithmetic.tiny * (1 + behind)
    lost = lost + 2 * root * (gain + (1 + norm) / math.sqrt(eps)) * arithmetic.flushed  # subnormal x, γ
    # 0·inf is NaN: a bound that holds for no number.
    return (centring + (relative + 8 * arithmetic.unit) * behind + lost).nan_to_num(math.inf, math.inf)


def _written_error(layer: WrittenNorm, norm: Tensor, behind: Tensor | float, inverse: Tensor | float, arithmetic: RoundingModel) -> Tensor:
    """`normalization_error` of an expression that runs operation by operation, in any of the orders that `norm_of` knows.

    The mean is off by γ_D‖x‖/√D and the difference by u, so the computed ĉ by ‖e‖ ≤ E = g‖x‖, g = γ_{D+8}. Squares, their sum, the quotient, eps
    (its number and the sum) round to γ_{D+3} of s², the root halves that and rounds; ĉ in the place of c moves s by at most E/√m. A kernel that takes
    the variance itself loses ½D·u(1 + |μ|√v/s²), as above, |μ| ≤ ‖x‖/√m. Squares that vanish move s² by 4·tiny, outside s by 2√tiny. Together s is
    off by ρ = g(1 + ‖x‖/(√m s)) + what vanished while that is below 0.3, its inverse by ρ/(1 − ρ), and a kernel of rsqrt or pow by k·u
    (k = FUNCTION_ULPS). So y = γĉ/ŝ is off by ‖γ‖_∞E/ŝ, by that fraction of ‖y‖, and by the roundings of two products.
    """
    width, eps = normalized(layer)
    count, outside = divided_by(layer)
    root, inverse = math.sqrt(width), torch.as_tensor(inverse, dtype=norm.dtype, device=norm.device)
    g = arithmetic.gamma(width + 8)
    vanished = 4 * math.sqrt(arithmetic.tiny) / eps if outside else 4 * arithmetic.tiny / eps
    relative = g + g * (norm / math.sqrt(count)) * inverse * centres(layer) + vanished
    relative = torch.where(relative < 0.3, relative / (1 - relative), torch.full_like(relative, math.inf))
    relative = relative + FUNCTION_ULPS * arithmetic.unit * (1 + relative)
    gain = largest_gain(layer) * inverse
    moved = (g * norm * centres(layer) + 2 * root * (arithmetic.tiny + arithmetic.flushed)) * gain * (1 + relative)
    lost = 4 * root * arithmetic.tiny * (1 + inverse + gain + behind) + 2 * root * inverse * (1 + norm) * arithmetic.flushed  # a subnormal gain
    return (moved + (relative + 4 * arithmetic.unit * (1 + relative)) * behind + lost).nan_to_num(math.inf, math.inf)


BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def check_batch(layer: BatchNorm) -> None:
    """Raises where samples would change each other: BadInput in train mode, UnsupportedLayer without running statistics."""
    name = type(layer).__name__
    if layer.training:
        raise BadInput(f"expected {name} in eval mode, got it in train mode, where samples change each other; call model.eval()")
    if layer.running_mean is None or layer.running_var is None:
        raise UnsupportedLayer(f"expected {name} with running statistics, got none: samples change each other; track them")


def batch_positions(layer: BatchNorm, whole: tuple[int, ...] | None, tokens: int, width: int) -> int:
    """How many numbers a channel has: those of an image, or 1 of a vector. Raises BadInput for other samples than the layer is for."""
    if not isinstance(layer, nn.BatchNorm1d):
        whole = image_shape(layer, whole)
    elif (whole is None and tokens != 1) or (whole is not None and len(whole) != 2):
        raise BadInput("expected vectors (N, n) in front of BatchNorm1d, got tokens or images; put Flatten in front, or use LayerNorm for tokens")
    channels, positions = (width, 1) if whole is None else (whole[0], math.prod(whole[1:]))
    if layer.num_features != channels:
        raise BadInput(f"expected {channels} channels in BatchNorm, got {layer.num_features}; match them")
    return positions


@dataclass(frozen=True)
class BatchScale:
    """gain: max|g|; shift: ‖β‖ + ‖g·mean‖ over channels; mean: max|mean|, all rounded up; variance: the smallest var + eps, rounded down."""

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

    def reach(self, norm: Tensor, positions: int) -> Tensor:
        """‖y‖₂, and of all terms of its sum, for ‖x‖₂ ≤ norm."""
        return self.gain * norm + self.shift * math.sqrt(positions) * (1 + 1e-12)

    def error(self, norm: Tensor, positions: int, width: int, arithmetic: RoundingModel) -> Tensor:
        """‖fl(y) − y‖₂ for ‖x‖₂ ≤ norm, x of `width` numbers, `positions` a channel; infinite where nothing is known.

        A handful of roundings each of γ/sqrt(var + eps), g·x, g·mean and the sums, in any order; a tiny var + eps may itself be rounded by `tiny`.
        """
        relative = arithmetic.gamma(16) + 2 * arithmetic.tiny / self.variance
        relative = relative if relative < 1 else math.inf
        fresh = relative * self.reach(norm, positions) + 4 * math.sqrt(width) * arithmetic.tiny * (1 + self.gain) * (1 + self.mean + norm)
        fresh = fresh + math.sqrt(width) * (norm + self.mean) / math.sqrt(self.variance) * arithmetic.flushed  # a subnormal γ
        return torch.where(fresh.isnan(), torch.full_like(fresh, math.inf), fresh)

    def largest(self, norm: Tensor) -> Tensor:
        """≥ every number on the way."""
        return (norm + self.mean) * (1 + self.gain) / math.sqrt(min(1.0, self.variance))
