"""What is linear between two activations: one float64 matrix, or of large images a map that is never written as one. docs/theory.md, section 9."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustlip.domains.lines.relaxations import Curve
from robustlip.errors import UnsupportedLayer
from robustlip.numerics.rounding import U64, gamma, norm_up, up
from robustlip.ops.maps import LinearMap, MatrixMap, Mixing, OnPart, Series, dual_norms

# Dense matrices of a layer: at most this many numbers (128 MiB).
LARGEST_MATRIX = 2**24
# Maps: at most this many numbers of all their rows, which are written a few at a time (512 MiB).
LARGEST_MAP = 2**26
# Stages of images with more weights than this are maps: below, a matrix is as fast and its rows are known one by one.
SMALL_MATRIX = 2**15


@dataclass(frozen=True)
class Plan:
    """One stage before it is made: maps one after the other, the activation behind them. of_images: whether a map of images is among them."""

    inputs: int
    outputs: int
    steps: tuple[LinearMap, ...]
    curve: Curve | None
    linear: Tensor
    of_images: bool


class Affine:
    """z = Wh + b, and the curve behind it (None behind the last).

    weight: W (m, n), of a stage that is a matrix. bias (m,), float64. weight_error, bias_error: ℓ2 bounds of what rounding made of W and b. linear
    (m,) bool: neurons that the activation leaves as they are. magnitude: ≥ the ℓ2 norm of |W|; shift: ≥ ‖b‖₂.
    """

    weight: Tensor
    bias: Tensor
    weight_error: float
    bias_error: float
    curve: Curve | None
    linear: Tensor
    magnitude: float
    shift: float

    @property
    def slope(self) -> float:
        return 1.0 if self.curve is None else max(1.0, self.curve.lipschitz)

    @property
    def outputs(self) -> int:
        return len(self.bias)


    @property
    def inputs(self) -> int:
        raise NotImplementedError

    @property
    def terms(self) -> int:
        """|fl(Wh) − Wh| ≤ γ(terms)·|W||h|, as `forward` and `absolute` compute."""
        raise NotImplementedError

    @property
    def roundings(self) -> int:
        """At least terms, and |fl(ΛW) − ΛW| ≤ γ(roundings)·|Λ||W|, as `backward` computes; also of a sum of m numbers."""
        raise NotImplementedError

    def forward(self, h: Tensor) -> Tensor:
        """Wh + b (N, m) of h (N, n)."""
        raise NotImplementedError

    def absolute(self, h: Tensor) -> Tensor:
        """|W|h (N, m) of h ≥ 0 (N, n)."""
        raise NotImplementedError

    def backward(self, rows: Tensor) -> Tensor:
        """ΛW (…, r, n) of rows Λ (…, r, m)."""
        raise NotImplementedError

    def rows(self, which: Tensor) -> Tensor:
        """Rows of W (r, n), as `backward` computes them of unit vectors."""
        raise NotImplementedError

    def row_norms(self, norm: str) -> Tensor:
        """(m,) ≥ how far each number of Wh goes for ‖h‖ ≤ 1 in 'l1', 'l2' or 'linf', short of γ(terms)·|W||h|."""
        raise NotImplementedError


@dataclass(frozen=True)
class Stage(Affine):
    """A stage by its matrix (m, n), float64. weight_error: also of the Frobenius norm; magnitude: ≥ ‖W‖_F."""

    weight: Tensor
    bias: Tensor
    weight_error: float
    bias_error: float
    curve: Curve | None
    linear: Tensor
    magnitude: float
    shift: float

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def terms(self) -> int:
        return self.weight.shape[1]

    @property
    def roundings(self) -> int:
        return sum(self.weight.shape)

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight.mT + self.bias

    def absolute(self, h: Tensor) -> Tensor:
        return h @ self.weight.abs().mT

    def backward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight

    def rows(self, which: Tensor) -> Tensor:
        return self.weight[which]

    def row_norms(self, norm: str) -> Tensor:
        return dual_norms(self.weight, norm)


@dataclass(frozen=True)
class MapStage(Affine):
    """A stage by a map of images. exact: whether `absolute` of the map is |W|; where it is more and W small enough, W's sizes are written for it."""

    bias: Tensor
    weight_error: float
    bias_error: float
    curve: Curve | None
    linear: Tensor
    magnitude: float
    shift: float
    map: Series
    exact: bool
    known: dict[str, Tensor] = field(default_factory=dict)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        raise UnsupportedLayer("expected a stage that is a matrix, got a map of images; ask for a dense network")

    @property
    def inputs(self) -> int:
        return self.map.inputs

    @property
    def terms(self) -> int:
        return self.map.terms

    @property
    def roundings(self) -> int:
        return self.map.inputs + self.map.outputs + self.map.terms + self.map.adjoint_terms

    def forward(self, h: Tensor) -> Tensor:
        return self.map.apply(h) + self.bias

    def absolute(self, h: Tensor) -> Tensor:
        if self.exact or self.map.inputs * self.map.outputs > LARGEST_MATRIX:
            return self.map.apply(h, absolute=True)
        if "sizes" not in self.known:
            every = torch.arange(self.outputs, device=self.bias.device)
            off = 2 * gamma(self.roundings, U64) * self.map.adjoint(torch.nn.functional.one_hot(every).double(), absolute=True)
            # More than |W|, and than the product below can lose of it.
            self.known["sizes"] = (self.rows(every).abs() + off) * (1 + 2 * gamma(self.roundings, U64))
        return h @ self.known["sizes"].mT

    def rows(self, which: Tensor) -> Tensor:
        """See Affine; remembered while all of them are few numbers."""
        if self.map.inputs * self.map.outputs > LARGEST_MATRIX:
            return self.map.adjoint(torch.nn.functional.one_hot(which, self.outputs).double())
        if "rows" not in self.known:
            parts = torch.eye(self.outputs, dtype=torch.float64, device=self.bias.device).split(max(1, SMALL_MATRIX // self.outputs))
            self.known["rows"] = torch.cat([self.map.adjoint(part) for part in parts])
        return self.known["rows"][which]

    def backward(self, rows: Tensor) -> Tensor:
        return self.map.adjoint(rows)

    def row_norms(self, norm: str) -> Tensor:
        if norm not in self.known:
            parts = []
            for some in torch.arange(self.outputs, device=self.bias.device).split(max(1, LARGEST_MATRIX // max(self.inputs, self.outputs) // 4)):
                off = self.map.adjoint(torch.nn.functional.one_hot(some, self.outputs).double(), absolute=True)
                parts.append(up(dual_norms(self.rows(some), norm) + 2 * gamma(self.roundings, U64) * dual_norms(off, norm)))
            self.known[norm] = torch.cat(parts)
        return self.known[norm]


def stage_of(plan: Plan, device: torch.device, dense: bool) -> Affine:
    """The stage as a matrix, or, unless `dense`, as a map where it is one of large images."""
    if dense or not plan.of_images or plan.inputs * plan.outputs <= SMALL_MATRIX:
        return dense_stage(plan, device)
    return map_stage(plan, device)


def _small(m: int, n: int, most: int = 0) -> None:
    most = most or LARGEST_MATRIX
    if m * n > most:
        raise UnsupportedLayer(f"expected layers of at most {most} weights as dense matrices, got {m}×{n}; use method 'dual' or 'global'")


def dense_stage(plan: Plan, device: torch.device) -> Stage:
    """All maps multiplied out, bounds of the rounding of each entry carried along. Raises UnsupportedLayer where a matrix is too large."""
    _small(plan.inputs, plan.inputs)
    matrix = torch.eye(plan.inputs, dtype=torch.float64, device=device)
    vector = torch.zeros(plan.inputs, dtype=torch.float64, device=device)
    matrix_error, vector_error = torch.zeros_like(matrix), torch.zeros_like(vector)
    for i, step in enumerate(plan.steps):
        _small(step.outputs, plan.inputs)
        if isinstance(step, Mixing):
            mixing = step.dense()
            loss = gamma(mixing.shape[1] + 2, U64)
            size = mixing.abs()
            matrix_error = size @ (matrix_error + loss * matrix.abs()) * (1 + 1e-9)
            vector_error = size @ (vector_error + loss * vector.abs()) * (1 + 1e-9)
            matrix, vector = mixing @ matrix, mixing @ vector
            continue
        op, h = (step.inner, step.held) if isinstance(step, OnPart) else (step, 0)
        exact = op.weight if i == 0 and h == 0 and isinstance(op, MatrixMap) else None  # W·I is W
        plain = exact is not None
        loss = 0.0 if plain else op.loss

        def through(rows: Tensor, absolute: bool, op: LinearMap = op) -> Tensor:
            return op.apply(rows.mT, absolute).mT

        made = through(matrix[h:], False) if exact is None else exact.clone()
        # Whatever the order of summation: each entry is off by γ of the sum of absolute values, and carries on what its rows were off by.
        made_error = torch.zeros_like(made) if plain else through(loss * matrix[h:].abs() + matrix_error[h:], True) * (1 + 1e-9)
        moved, moved_error = _moved(op, vector[h:], vector_error[h:], loss, not plain)
        matrix, matrix_error = torch.cat([matrix[:h], made]), torch.cat([matrix_error[:h], made_error])
        vector, vector_error = torch.cat([vector[:h], moved]), torch.cat([vector_error[:h], moved_error])

    def size_of(t: Tensor) -> float:
        return float(norm_up(t.flatten(), 0)) if bool((t != 0).any()) else 0.0

    wrong, off = size_of(matrix_error), size_of(vector_error)
    return Stage(matrix, vector, wrong, off, plan.curve, plan.linear, size_of(matrix), size_of(vector))


def _moved(op: LinearMap, vector: Tensor, error: Tensor, loss: float, rounds: bool) -> tuple[Tensor, Tensor]:
    """(A·vector + b, a bound of its error), for a vector that is off by `error`. rounds: whether the sum does."""
    zero = torch.zeros(op.outputs, dtype=torch.float64, device=vector.device)
    added, added_error = (zero if t is None else t for t in (op.bias, op.bias_error))
    moved, moved_error = op.apply(vector), op.apply(loss * vector.abs() + error, True)
    return moved + added, (moved_error + added_error + 2 * U64 * (moved.abs() + added.abs()) * rounds) * (1 + 1e-9)


def map_stage(plan: Plan, device: torch.device) -> MapStage:
    """All maps one after the other; only what leads to the bias is computed. Raises UnsupportedLayer where there are too many rows to write."""
    for step in plan.steps:
        _small(step.outputs, plan.inputs, LARGEST_MAP)
    vector = torch.zeros(plan.inputs, dtype=torch.float64, device=device)
    error = torch.zeros_like(vector)
    for step in plan.steps:
        op, h = (step.inner, step.held) if isinstance(step, OnPart) else (step, 0)
        moved, off = _moved(op, vector[h:], error[h:], op.loss, True)
        vector, error = torch.cat([vector[:h], moved]), torch.cat([error[:h], off])
    steps = Series.of(plan.steps)
    magnitude = steps.magnitude()
    mixed = sum(not isinstance(step, Mixing) for step in plan.steps)
    return MapStage(
        vector, magnitude * steps.relative * (1 + 1e-9), float(norm_up(error, 0)), plan.curve, plan.linear, magnitude, float(norm_up(vector, 0)),
        steps, mixed <= 1 and all(step.terms <= 1 for step in plan.steps if isinstance(step, Mixing)),
    )  # fmt: skip
