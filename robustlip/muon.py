"""Optimisers with a stated bound of their update: torch.optim.Muon, its orthogonalisation made selectable, and row momentum.

docs/theory.md, section 12.

torch's own always orthogonalises in bfloat16 with five fixed quintic steps. On processors without bfloat16 units that is hundreds of
times slower than float32, and a constraint needs to know how large an update can be; both are parameters here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustlip.errors import BadInput
from robustlip.numerics.rounding import UNIT
from robustlip.parallel import ALONE, World, local


@dataclass(frozen=True)
class Polynomial:
    """Odd quintics x → a·x + b·x³ + c·x⁵ applied in turn to the singular values; `peak` bounds their image of (0, 1] in exact arithmetic."""

    steps: tuple[tuple[float, float, float], ...]
    peak: float


def _over_1024(*rows: tuple[int, int, int]) -> tuple[tuple[float, float, float], ...]:
    return tuple((a / 1024, b / 1024, c / 1024) for a, b, c in rows)


POLYNOMIALS = {
    # peaks: the largest value on (0, 1], docs/theory.md, section 12, rounded up; tests recompute them on a fine grid.
    "six-step": Polynomial(
        _over_1024(
            (3955, -8306, 5008), (3735, -6681, 3463), (3799, -6499, 3211), (4019, -6385, 2906), (2677, -3029, 1162), (2172, -1833, 682)
        ),
        0.9994,
    ),
    "torch": Polynomial(((3.4445, -4.7750, 2.0315),) * 5, 1.2025),
    "145m-script": Polynomial(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        1.1452,
    ),
}


def polynomial_named(name: str) -> Polynomial:
    """Raises BadInput for a name that is not one of POLYNOMIALS."""
    if name not in POLYNOMIALS:
        raise BadInput(f"expected a polynomial among {', '.join(POLYNOMIALS)}, got {name!r}; name one of them")
    return POLYNOMIALS[name]


def orthogonalize(matrix: Tensor, polynomial: str = "six-step") -> Tensor:
    """The polynomial's approximation of the orthogonal factor UVᵀ of matrices (..., m, n), in their own dtype.

    Singular values come out in (0, peak]; matrices of zeros stay zeros. Source: Jordan 2024 (Muon), coefficients of the paper.
    """
    steps = polynomial_named(polynomial).steps
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    x = odd_quintics(x.reshape(-1, *x.shape[-2:]).contiguous(), steps).reshape(x.shape)
    return x.mT if tall else x


def odd_quintics(x: Tensor, steps: tuple[tuple[float, float, float], ...]) -> Tensor:
    """σ → aσ + bσ³ + cσ⁵ for each (a, b, c) in turn, on the singular values of (K, m, n), m ≤ n."""
    for a, b, c in steps:
        x = torch.baddbmm(x, even_part(x @ x.mT, b, c), x, beta=a)
    return x


def even_part(gram: Tensor, b: float, c: float) -> Tensor:
    """bG + cG² of G = XXᵀ (K, m, m): with aX added to its product with X, an odd quintic of X. Fused: fewer passes over memory."""
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)


class Muon(torch.optim.Muon):
    """torch.optim.Muon whose learning rate is the RMS→RMS norm of the update (up to the polynomial's peak).

    update of a (fan_out, fan_in) matrix: lr·sqrt(fan_out/fan_in)·orthogonalize(momentum). polynomial: a key of POLYNOMIALS.
    dtype: in which to orthogonalise; None for the parameter's own. Momentum, Nesterov and decoupled weight decay as in torch.
    `update_norm(lr)` bounds the RMS→RMS norm of one step in exact arithmetic; a constraint adds its own slack for rounding.
    world: the processes that share the orthogonalisations, each those of its own matrices; parameters may be DTensors that are sharded by rows.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        nesterov: bool = True,
        polynomial: str = "six-step",
        dtype: torch.dtype | None = None,
        world: World = ALONE,
    ) -> None:
        polynomial_named(polynomial)
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov)
        self.polynomial, self.compute_dtype, self.world = polynomial, dtype, world

    def update_norm(self, lr: float) -> float:
        return lr * POLYNOMIALS[self.polynomial].peak * self._slack

    @property
    def _slack(self) -> float:
        """For products in 16 bits, which reach a little beyond the peak: by 1 %, 5 units of the dtype, for six steps of 256×256 in bfloat16."""
        dtypes = {self.compute_dtype or p.dtype for group in self.param_groups for p in group["params"]}
        return 1 + max((16 * UNIT[dtype] for dtype in dtypes if dtype.itemsize < 4), default=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # One batched product for all matrices of a shape, whichever groups they are in, instead of one small product for each.
        together: dict[tuple[Any, ...], list[tuple[dict[str, Any], Tensor, Tensor, Tensor]]] = {}
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            buffers: list[Tensor] = []
            self._init_group(group, params, grads, buffers)
            for p, grad, buffer in zip(params, grads, buffers, strict=True):
                key = (tuple(p.shape), p.dtype, p.device, group["momentum"], group["nesterov"])
                together.setdefault(key, []).append((group, local(p), local(grad), local(buffer)))
        spreads = self.world.spread([[(shape, math.prod(shape) * min(shape))] * len(members) for (shape, *_), members in together.items()])
        for ((fan_out, fan_in), _, _, momentum, nesterov), members, spread in zip(together, together.values(), spreads, strict=True):
            for _, _, grad, buffer in members:
                buffer.lerp_(grad, 1 - momentum)
            directions = [grad.lerp(buffer, momentum) if nesterov else buffer for _, _, grad, buffer in members]
            whole = spread.collect(directions)
            if whole:
                stack = torch.stack(list(whole.values()))
                updates = orthogonalize(stack.to(self.compute_dtype or stack.dtype), self.polynomial).to(stack.dtype)
                whole = dict(zip(whole, updates, strict=True))
            for (group, p, _, _), update in zip(members, spread.deliver(whole, directions), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(fan_out / fan_in))
        return loss


class RowMomentum(torch.optim.Optimizer):
    """Momentum whose every row is divided to RMS norm 1 before the step, but multiplied by no more than `inflation`: for tables of tokens.

    row ← row − lr·m/max(1/inflation, rms(m)), m the running mean of the gradient (weight 1 − momentum for the newest). Tokens that a batch
    does not have keep small steps. Newhouse et al. 2025 inflate at most 16 times, embedding and unembedding alike. A row's step has an RMS norm of
    at most lr; of a whole matrix's nothing is stated (no `update_norm`), so constraints measure.
    """

    def __init__(self, params: Any, lr: float = 0.02, momentum: float = 0.9, inflation: float = 16.0) -> None:
        if not inflation > 0:
            raise BadInput(f"expected an inflation above 0, got {inflation}; the paper uses 16")
        super().__init__(params, {"lr": lr, "momentum": momentum, "inflation": inflation})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                # Shards are whole rows: each process steps with its own.
                mean = local(state["momentum_buffer"]).lerp_(local(p.grad), 1 - group["momentum"])
                rms = torch.linalg.vector_norm(mean, dim=-1, keepdim=True) / math.sqrt(p.shape[-1])
                local(p).sub_(mean / rms.clamp_min(1 / group["inflation"]), alpha=group["lr"])
        return loss
