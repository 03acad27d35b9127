"""LayerNorm and RMSNorm of single tokens: y = γ·c/s + β, c = Px, s² = ‖c‖²/D + eps, P centring (LayerNorm) or the identity.

docs/theory.md, section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.numerics.arithmetic import Rounds
from robustlip.numerics.rounding import TINY, U64, gamma, norm_up, up

# ‖d²y[u, u]‖ ≤ ‖γ‖_∞·C‖u‖²/(√D s²), C = 2/√3 = 1.1547005… rounded up.
CURVATURE = 1.15471


def normalized(layer: nn.LayerNorm | nn.RMSNorm, state_width: int | None = None) -> tuple[int, float]:
    """(width D of the tokens that are normalised, eps). Raises UnsupportedLayer for layers that no constant here is proved for."""
    name = type(layer).__name__
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


def largest_gain(layer: nn.LayerNorm | nn.RMSNorm) -> float:
    """‖γ‖_∞."""
    return 1.0 if layer.weight is None else float(layer.weight.detach().abs().amax())


def largest_shift(layer: nn.LayerNorm | nn.RMSNorm) -> float:
    """‖β‖₂, rounded up; 0 without one."""
    bias = layer.bias if isinstance(layer, nn.LayerNorm) else None
    return 0.0 if bias is None else float(norm_up(bias.detach(), 0))


def local_lipschitz(layer: nn.LayerNorm | nn.RMSNorm, x: Tensor, radius: Tensor | float) -> Tensor:
    """A Lipschitz constant (…), float64, of the layer on the ℓ2 balls of `radius` (…) around the tokens x (…, D): ‖f(x') − f(x)‖₂ ≤ it·‖x' − x‖₂.

    The Jacobian at x' is γ(I − ccᵀ/(D s²))/s·P with c = Px', s² = ‖c‖²/D + eps, of norm at most ‖γ‖_∞/s, and ‖Px'‖ ≥ ‖Px‖ − r on the
    ball, which is convex. Exact arithmetic; rounding comes on top.
    """
    width, eps = normalized(layer, x.shape[-1])
    x = x.detach().double()
    centred = x - x.mean(-1, keepdim=True) if isinstance(layer, nn.LayerNorm) else x
    # The computed ‖Px‖ is off by γ_{D+4} of itself and, through the mean, of ‖x‖.
    size = torch.linalg.vector_norm(centred, dim=-1) * (1 - 2 * gamma(width + 8, U64)) - 2 * gamma(width + 8, U64) * norm_up(x)
    least = ((size - radius) * (1 - 8 * U64)).clamp_min(0.0)
    return up(largest_gain(layer) / (least.square() / width * (1 - 8 * U64) + eps * (1 - 8 * U64)).sqrt())


def normalization_error(
    layer: nn.LayerNorm | nn.RMSNorm, norm: Tensor, behind: Tensor | float, inverse: Tensor | float, arithmetic: Rounds
) -> Tensor:
    """‖fl(y) − y‖₂ for ‖x‖₂ ≤ norm, ‖y‖₂ ≤ behind and 1/s ≤ inverse there; infinite where nothing is known.

    Mean: γ_D‖x‖. Variance by Welford's or a two-pass formula, as torch computes it: off by at most D·u·(v + |μ|√v) (Chan, Golub and LeVeque
    1983), so 1/s by a relative ½D·u(1 + |μ|√v/s²), twice that here, where |μ| ≤ ‖x‖/√D and √v/s² ≤ min(1/s, 1/(2√eps)). RMSNorm subtracts no mean.
    """
    width, eps = normalized(layer)
    centres = isinstance(layer, nn.LayerNorm)
    root = math.sqrt(width)
    g = arithmetic.gamma(2 * width + 16)
    # Squares that vanish (torch sums them in float32 at least) move s² by a tiny/eps.
    relative = g + 2 * TINY[torch.float32] / eps + 0 * norm
    if centres:
        inverse = torch.as_tensor(inverse, dtype=norm.dtype, device=norm.device)
        relative = relative + g * (norm / root) * inverse.clamp_max(1 / (2 * math.sqrt(eps)))
    # The first-order form holds while the variance keeps its size; beyond, its square root may be of anything.
    relative = torch.where(relative < 0.5, relative, torch.full_like(relative, math.inf))
    gain = largest_gain(layer) * inverse
    centring = g * norm * gain * (1 + relative) if centres else 0 * norm
    lost = 4 * root * arithmetic.tiny * (1 + behind)
    lost = lost + 2 * root * (gain + (1 + norm) / math.sqrt(eps)) * arithmetic.flushed  # subnormal x, γ
    # 0·inf is NaN: a bound that holds for no number.
    return (centring + (relative + 8 * arithmetic.unit) * behind + lost).nan_to_num(math.inf, math.inf)
