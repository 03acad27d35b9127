"""The space of a weight threat: changes of all matrices, W + E with ‖E‖ ≤ radius (times σ(W) if relative)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustlip.attacks.spaces import INSIDE, Space
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.geometry import safe_divide
from robustlip.layers import AddPositions, Attention
from robustlip.numerics.spectral import spectral_norm_bound
from robustlip.target import Target
from robustlip.threats import WeightBall

BUDGET = 1 << 26  # numbers that copies of the weights per sample may have at once (float32: 256 MiB)

# Tables that are added, not multiplied.
_NO_MATRIX = ((AddPositions, "positions"), (Attention, "distance_bias"))
# Layers whose weight is a matrix; a convolution's weight is treated as (out, in·kernel).
MATRICES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def matrices_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weight matrices that a WeightBall perturbs, by parameter name; tied ones once.

    These are the matrices of MATRICES (each attention projection is one). Raises UnsupportedLayer for a parameter with two or more dimensions
    elsewhere, except tables of positions and attention's biases by distance, which are not matrices; and for scripted modules, whose weights cannot
    be replaced. Raises BadInput if there are none.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedLayer(
            f"expected a module whose weights can be replaced in a call, got a scripted or traced one ({type(model).__name__}); "
            f"give the module that it was made from"
        )
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or (type(module), name) in _NO_MATRIX or id(parameter) in seen:
                continue
            if not isinstance(module, MATRICES):
                raise UnsupportedLayer(
                    f"expected weight matrices in Linear, Embedding or convolution layers, got {prefix}.{name} of "
                    f"{type(module).__name__}; build the layer from those, remove parametrizations, or name it in robustlip.attacks.weight_space"
                )
            seen.add(id(parameter))
            found[f"{prefix}.{name}" if prefix else name] = parameter
    if not found:
        raise BadInput("expected a model with weight matrices, got none; a weight threat does not apply to it")
    return found


class WeightSpace(Space):
    """The changes of all weight matrices, flattened and concatenated into rows (N, P), one row per sample.

    A relative radius r means ‖E‖ ≤ r·σ(W) for each matrix, with σ(W) from a float64 SVD, rounded down; the norm of a row is the
    largest ‖E‖/σ(W) (or ‖E‖) over its matrices. A zero matrix cannot be changed relatively. For a compiled model or DataParallel the inner
    module is run, because its weights are replaced in each call. batched: whether its forward can be batched over weights; None: not tried yet.
    """

    batched: bool | None = None

    def __init__(self, model: Target, x: torch.Tensor, threat: WeightBall) -> None:
        matrices = matrices_of(model.source)
        if len({m.dtype for m in matrices.values()}) > 1:
            raise BadInput(f"expected weight matrices of one dtype, got {sorted({str(m.dtype) for m in matrices.values()})}; cast the model")
        self.names, self.shapes = list(matrices), [m.shape for m in matrices.values()]
        self.sizes = [m.numel() for m in matrices.values()]
        flat = torch.cat([m.detach().flatten() for m in matrices.values()])
        super().__init__(model, flat.expand(len(x), -1))
        self.x, self.norm = x, threat.norm
        sigma = [torch.linalg.matrix_norm(m.detach().double().flatten(1), ord=2) for m in matrices.values()]
        # (1 − INSIDE): an SVD is exact to a few ulps, and a smaller σ makes the reported distance larger, never smaller.
        self.scale = torch.stack(sigma) * (1 - INSIDE) if threat.relative else torch.ones_like(torch.stack(sigma))
        self.chunk = max(1, BUDGET // (12 * flat.numel()))

    def take(self, index: torch.Tensor) -> WeightSpace:
        part = copy.copy(self)
        part.x, part.clean = self.x[index], self.clean[:1].expand(len(index), -1)
        return part

    def split(self, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each matrix (G, m, n) of the rows (G, P), and its scale."""
        for part, shape, scale in zip(rows.split(self.sizes, dim=1), self.shapes, self.scale.to(rows.dtype), strict=True):
            yield part.reshape(len(rows), shape[0], -1), scale

    def named(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """One row (P,) as parameters by name."""
        return {n: part.view(s) for n, part, s in zip(self.names, row.split(self.sizes), self.shapes, strict=True)}

    def executed(self, point: torch.Tensor) -> torch.Tensor:
        def one(row: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.shared_logits(row, x[None])[0]

        # The plain kernel: the fused ones have no batching rule for vmap and would run sample by sample.
        with sdpa_kernel(SDPBackend.MATH):
            if self.batched is None:
                self.batched = self._takes_vmap(one, point)
            if self.batched:
                return vmap(one, randomness="different")(point, self.x)
            return torch.stack([one(row, x) for row, x in zip(point, self.x, strict=True)])

    def _takes_vmap(self, one: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], point: torch.Tensor) -> bool:
        """Whether the forward can be batched over weights: not if it depends on values or is compiled."""
        try:
            with torch.no_grad():
                vmap(one, randomness="different")(point[:1], self.x[:1])
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        return True

    def shared_logits(self, row: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The logits (N, C) of inputs x under one set of weights, a row (P,)."""
        return self.model.scores_with(self.named(row), x)

    def measure(self, delta: torch.Tensor) -> torch.Tensor:
        order = 2 if self.norm == "spectral" else "fro"
        norms = [relative(torch.linalg.matrix_norm(part, ord=order), scale) for part, scale in self.split(delta)]
        return torch.stack(norms).amax(0)

    def dual(self, grad: torch.Tensor) -> torch.Tensor:
        order = "nuc" if self.norm == "spectral" else "fro"
        return torch.stack([scale * torch.linalg.matrix_norm(part, ord=order) for part, scale in self.split(grad)]).sum(0)

    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        steps = []
        for part, scale in self.split(grad):
            if self.norm == "spectral":
                step = polar(part)
            else:
                step = safe_divide(part, torch.linalg.matrix_norm(part, keepdim=True))
            steps.append((scale * step).flatten(1))
        return torch.cat(steps, dim=1)

    def project(self, delta: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        return delta * safe_divide(radius, self.measure(delta)).clamp(max=1.0)[:, None]

    def advance(self, delta: torch.Tensor, grad: torch.Tensor, radius: torch.Tensor, rate: float) -> torch.Tensor:
        rate = min(rate, 1.0)
        return torch.lerp(delta, radius[:, None] * self.direction(grad), rate)

    def at(self, delta: torch.Tensor, radius: torch.Tensor | None = None) -> torch.Tensor:
        return (self.clean[:1] + delta).to(self.clean.dtype)

    def cast_point(self, delta: torch.Tensor) -> torch.Tensor:
        return (self.clean[:1].double() + delta.double()).to(self.clean.dtype)

    def finalize(self, delta: torch.Tensor, radius: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As in Space; the norm of each stored change (W + E as cast) − W is bounded from above by `spectral_norm_bound`."""
        delta, clean = delta.double(), self.clean[:1].double()
        point = self.cast_point(delta)
        distance = self._bound(point.double() - clean)
        if radius is None:
            return point, distance
        limit = radius.double() * (1 - INSIDE)
        for attempt in range(40):  # casting changes every entry by up to half an ulp of W, so one rescaling may not be enough
            outside = distance > limit
            if not bool(outside.any()):
                return point, distance
            factor = safe_divide(limit, distance) * (1 - 1e-9 * 2.0 ** min(attempt, 25))
            delta = torch.where(outside[:, None], delta * factor[:, None], delta)
            point = self.cast_point(delta)
            distance = self._bound(point.double() - clean)
        outside = distance > limit
        return torch.where(outside[:, None], self.clean[:1], point), torch.where(outside, 0.0, distance)

    def _bound(self, change: torch.Tensor) -> torch.Tensor:
        """An upper bound of the norm of float64 changes (G, P), up to float64 rounding."""
        norms = []
        for part, scale in self.split(change):
            size = spectral_norm_bound(part) if self.norm == "spectral" else torch.linalg.matrix_norm(part)
            norms.append(relative(size, scale))
        return torch.stack(norms).amax(0)

    def assess(self, delta: torch.Tensor, group: torch.Tensor, radius: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        limit = None if radius is None else torch.full((len(delta),), radius, dtype=torch.float64, device=delta.device)
        point, distance = self.finalize(delta, limit)
        # Each group is a separate model and is run as it would be deployed: by a plain forward pass, without vmap.
        answers = [(g, (group == g).nonzero().flatten()) for g in group.unique()]
        logits = torch.cat([self.shared_logits(point[g], self.x[rows]) for g, rows in answers])
        logits = logits[torch.cat([rows for _, rows in answers]).argsort()]
        return point, distance[group], logits, group

    def describe(self, point: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
        """The changes (G, …) in float64, by the parameter names of the caller's model.

        (W.double() + change).to(W.dtype) are the weights that were evaluated.
        """
        change = point.double() - self.clean[:1].double()
        own, theirs = dict(self.model.source.named_parameters()), {id(p): name for name, p in model.named_parameters()}
        names = [theirs[id(own[name])] for name in self.names]
        parts = zip(names, change.split(self.sizes, dim=1), self.shapes, strict=True)
        return {n: part.reshape(len(point), *s) for n, part, s in parts}


def relative(norm: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """norm (N,) in units of scale; infinite for a scale of 0, except for a norm of 0."""
    return torch.where(norm > 0, norm / scale, 0.0)


def polar(grad: torch.Tensor) -> torch.Tensor:
    """U Vᵀ of the SVD of each matrix (N, m, n), zero on its null space: the maximiser of ⟨grad, E⟩ over ‖E‖₂ ≤ 1.

    The gradient of one sample of T tokens has rank ≤ T, so a sketch of a few columns often spans it: the range finder of
    Halko, Martinsson & Tropp 2011, algorithm 4.1, is then exact, and the remaining SVD is small.
    """
    rows, columns = grad.shape[-2:]
    total = grad.square().sum((-2, -1))
    for rank in (1, 8):
        if 4 * rank > min(rows, columns):
            break
        probe = torch.randn(columns, rank, generator=torch.Generator().manual_seed(rank), dtype=torch.float32).to(grad)
        basis = torch.linalg.qr(grad @ probe).Q
        small = basis.mT @ grad
        if bool((total - small.square().sum((-2, -1)) <= 1e-4 * total).all()):
            return basis @ _polar(small)
    return _polar(grad)


def _polar(matrix: torch.Tensor) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u * (s > 1e-5 * s[..., :1])[..., None, :]) @ vh
