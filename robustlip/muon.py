"""Optimisers with a proved bound of their update: torch.optim.Muon with a choice of orthogonalisation, and row momentum.

Bounds: docs/theory.md, section 12.

torch's Muon always orthogonalises in bfloat16 with five fixed quintic steps. On processors without bfloat16 units that is hundreds of
times slower than float32, and constraints need a bound of the update. Here both the polynomial and the dtype are parameters.
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
    """Odd quintics x → a·x + b·x³ + c·x⁵, applied in turn to the singular values; on (0, 1] the result is at most `peak` in exact arithmetic."""

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

    The singular values of the result lie in (0, peak]; zero matrices stay zero. Source: Jordan 2024 (Muon), coefficients of the paper.
    """
    steps = polynomial_named(polynomial).steps
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    x = odd_quintics(x.reshape(-1, *x.shape[-2:]).contiguous(), steps).reshape(x.shape)
    return x.mT if tall else x


def odd_quintics(x: Tensor, steps: tuple[tuple[float, float, float], ...]) -> Tensor:
    """σ → aσ + bσ³ + cσ⁵ for each (a, b, c) one after the other, on the singular values of (K, m, n), m ≤ n."""
    for a, b, c in steps:
        x = torch.baddbmm(x, even_part(x @ x.mT, b, c), x, beta=a)
    return x


def even_part(gram: Tensor, b: float, c: float) -> Tensor:
    """bG + cG² for G = XXᵀ (K, m, m): its product with X, plus aX, is an odd quintic of X. One fused operation, to save passes over memory."""
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)


class Muon(torch.optim.Muon):
    """torch.optim.Muon whose learning rate is the RMS→RMS norm of the update (up to the polynomial's peak).

    The update of a (fan_out, fan_in) matrix is lr·sqrt(fan_out/fan_in)·orthogonalize(momentum). polynomial: a key of POLYNOMIALS.
    dtype: of the orthogonalisation; None for the dtype of the parameter. Momentum, Nesterov and decoupled weight decay as in torch.
    `update_norm(lr)` bounds the RMS→RMS norm of one step in exact arithmetic; a constraint adds its own slack for rounding.
    world: the processes among which the orthogonalisations are distributed, matrix by matrix; parameters may be DTensors sharded by rows.
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
        """Slack for products in 16 bits, whose results exceed the peak by 1 %, 5 units of the dtype, for six steps of 256×256 in bfloat16."""
        dtypes = {self.compute_dtype or p.dtype for group in self.param_groups for p in group["params"]}
        return 1 + max((16 * UNIT[dtype] for dtype in dtypes if dtype.itemsize < 4), default=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # One batched product for all matrices of the same shape, in all parameter groups, instead of many small products.
        together: dict[tuple[Any, ...], list[tuple[dict[str, Any], Tensor, Tensor, Tensor]]] = {}
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            buffers: list[Tensor] = []
            self._init_group(group, params, grads, buffers)
            for p, grad, buffer in zip(params, grads, buffers, strict=True):
                key = (tuple(p.shape), p.dtype, p.device, group["momentum"], group["nesterov"])
                together.setdefault(key, []).append((group, local(p), local(grad), local(buffer)))
        assignments = self.world.assign([[(shape, math.prod(shape) * min(shape))] * len(members) for (shape, *_), members in together.items()])
        for ((fan_out, fan_in), _, _, momentum, nesterov), members, assignment in zip(together, together.values(), assignments, strict=True):
            for _, _, grad, buffer in members:
                buffer.lerp_(grad, 1 - momentum)
            directions = [grad.lerp(buffer, momentum) if nesterov else buffer for _, _, grad, buffer in members]
            whole = assignment.collect(directions)
            if whole:
                stack = torch.stack(list(whole.values()))
                updates = orthogonalize(stack.to(self.compute_dtype or stack.dtype), self.polynomial).to(stack.dtype)
                whole = dict(zip(whole, updates, strict=True))
            for (group, p, _, _), update in zip(members, assignment.distribute(whole, directions), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(fan_out / fan_in))
        return loss


class RowMomentum(torch.optim.Optimizer):
    """Momentum whose rows are normalised to RMS norm 1 before the step, with a factor of at most `inflation`: for embedding tables.

    row ← row − lr·m/max(1/inflation, rms(m)), where m is the running mean of the gradient (weight 1 − momentum for the newest). Rows of tokens
    that are not in the batch keep small steps. Newhouse et al. 2025 use a factor of at most 16 for embedding and unembedding. The RMS norm of a
    row's step is at most lr; no bound is known for the norm of the whole matrix (no `update_norm`), so constraints measure it.
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
                # Shards consist of whole rows, so each process updates its own.
                mean = local(state["momentum_buffer"]).lerp_(local(p.grad), 1 - group["momentum"])
                rms = torch.linalg.vector_norm(mean, dim=-1, keepdim=True) / math.sqrt(p.shape[-1])
                local(p).sub_(mean / rms.clamp_min(1 / group["inflation"]), alpha=group["lr"])
        return loss
