"""The affine part between two activations: a dense float64 matrix, or for large images a matrix-free linear map. docs/theory.md, section 9."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustlip.domains.lines.relaxations import Activation
from robustlip.domains.norms import Context
from robustlip.errors import UnsupportedLayer
from robustlip.numerics.rounding import U64, gamma, norm_up, up
from robustlip.ops.maps import LinearMap, MatrixMap, Mixing, PartialMap, Series, dual_norms

# (magnitudes (N, n), context) → bounds (N, m) of |executed − exact|, float64, as in robustlip.ops.executed.
Errors = Callable[[Tensor, Context], Tensor]

# The largest number of entries of a dense matrix (128 MiB).
LARGEST_MATRIX = 2**24
# The largest number of entries of all rows of a matrix-free map, which are computed in chunks (512 MiB).
LARGEST_MAP = 2**26
# Image stages with more weights than this stay matrix-free. Below it a matrix is as fast, and its row errors are sharper.
SMALL_MATRIX = 2**15


@dataclass(frozen=True)
class Step:
    """One linear map of a stage, and what its execution is off by, number by number: (|x| (N, n), context) → (N, m). None: nothing rounds."""

    map: LinearMap
    errors: Errors | None = None


@dataclass(frozen=True)
class Plan:
    """The description of a stage: a sequence of linear maps, then an activation. of_images: whether one of the maps acts on images."""

    inputs: int
    outputs: int
    steps: tuple[Step, ...]
    activation: Activation | None
    linear: Tensor
    of_images: bool
    executed: Errors | None

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        return tuple(step.map for step in self.steps)


class Stage:
    """An affine map z = Wh + b and the activation after it (None after the last stage).

    weight: W (m, n), if the stage is a matrix. bias: (m,) float64. weight_error, bias_error: bounds of the ℓ2 norms of the errors with which W and b
    were computed. linear: (m,) bool, entries that the activation leaves unchanged. magnitude: ≥ the ℓ2 norm of |W|. shift: ≥ ‖b‖₂.
    steps: the maps whose product is W, as they are executed. executed: the errors of executing the activation, (|z|, context) → (N, m).
    """

    weight: Tensor
    bias: Tensor
    weight_error: float
    bias_error: float
    activation: Activation | None
    linear: Tensor
    magnitude: float
    shift: float
    steps: tuple[Step, ...]
    executed: Errors | None

    def executed_errors(self, h: Tensor, off: Tensor | float, context: Context) -> Tensor:
        """|z' − (Wh + b)| ≤ this (N, m), z' executed on h', for exact |h| ≤ `h` (N, n) and |h' − h| ≤ off: of all steps together."""
        error = h.new_zeros(h.shape) + off
        own = self.weight_error * norm_up(h)[:, None] + self.bias_error
        for step in self.steps:
            read = (h + error) * (1 + 1e-9)
            h, error = step.map.sizes(h), step.map.apply(error, absolute=True)
            error = (error if step.errors is None else error + step.errors(read, context)) * (1 + 1e-9)
        return (error + own) * (1 + 1e-9)

    @property
    def slope(self) -> float:
        return 1.0 if self.activation is None else max(1.0, self.activation.lipschitz)

    @property
    def outputs(self) -> int:
        return len(self.bias)


    @property
    def inputs(self) -> int:
        raise NotImplementedError

    @property
    def terms(self) -> int:
        """|fl(Wh) − Wh| ≤ γ(terms)·|W||h| for the results of `forward` and `absolute`."""
        raise NotImplementedError

    @property
    def roundings(self) -> int:
        """At least `terms`.

        |fl(ΛW) − ΛW| ≤ γ(roundings)·|Λ||W| for the result of `backward`; γ(roundings) also bounds the error of a sum of m numbers.
        """
        raise NotImplementedError

    def forward(self, h: Tensor) -> Tensor:
        """Wh + b (N, m) for h (N, n)."""
        raise NotImplementedError

    def absolute(self, h: Tensor) -> Tensor:
        """|W|h (N, m), or more, for h ≥ 0 (N, n)."""
        raise NotImplementedError

    def backward(self, rows: Tensor) -> Tensor:
        """ΛW (…, r, n) for rows Λ (…, r, m)."""
        raise NotImplementedError

    def rows(self, which: Tensor) -> Tensor:
        """Rows `which` of W (r, n), computed as `backward` of unit vectors."""
        raise NotImplementedError

    def row_norms(self, norm: str) -> Tensor:
        """(m,) ≥ the largest change of each entry of Wh for ‖h‖ ≤ 1 in 'l1', 'l2' or 'linf', except for the error γ(terms)·|W||h|."""
        raise NotImplementedError


@dataclass(frozen=True)
class DenseStage(Stage):
    """A stage with a float64 matrix (m, n). weight_error also bounds the Frobenius norm of the matrix error; magnitude ≥ ‖W‖_F."""

    weight: Tensor
    bias: Tensor
    weight_error: float
    bias_error: float
    activation: Activation | None
    linear: Tensor
    magnitude: float
    shift: float
    steps: tuple[Step, ...] = ()
    executed: Errors | None = None

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
class MapStage(Stage):
    """A matrix-free stage. exact: whether `map.apply(…, absolute=True)` is |W|h and not only a bound; if not, |W| is computed where it is small
    enough."""

    bias: Tensor
    weight_error: float
    bias_error: float
    activation: Activation | None
    linear: Tensor
    magnitude: float
    shift: float
    steps: tuple[Step, ...]
    executed: Errors | None
    map: Series
    exact: bool
    cache: dict[str, Tensor] = field(default_factory=dict)

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
        if "sizes" not in self.cache:
            every = torch.arange(self.outputs, device=self.bias.device)
            off = 2 * gamma(self.roundings, U64) * self.map.adjoint(torch.nn.functional.one_hot(every).double(), absolute=True)
            # An upper bound of |W|, enlarged by the rounding error of the product below.
            self.cache["sizes"] = (self.rows(every).abs() + off) * (1 + 2 * gamma(self.roundings, U64))
        return h @ self.cache["sizes"].mT

    def rows(self, which: Tensor) -> Tensor:
        """See Stage. The rows are cached if the matrix is small enough."""
        if self.map.inputs * self.map.outputs > LARGEST_MATRIX:
            return self.map.adjoint(torch.nn.functional.one_hot(which, self.outputs).double())
        if "rows" not in self.cache:
            parts = torch.eye(self.outputs, dtype=torch.float64, device=self.bias.device).split(max(1, SMALL_MATRIX // self.outputs))
            self.cache["rows"] = torch.cat([self.map.adjoint(part) for part in parts])
        return self.cache["rows"][which]

    def backward(self, rows: Tensor) -> Tensor:
        return self.map.adjoint(rows)

    def row_norms(self, norm: str) -> Tensor:
        if norm not in self.cache:
            parts = []
            for some in torch.arange(self.outputs, device=self.bias.device).split(max(1, LARGEST_MATRIX // max(self.inputs, self.outputs) // 4)):
                off = self.map.adjoint(torch.nn.functional.one_hot(some, self.outputs).double(), absolute=True)
                parts.append(up(dual_norms(self.rows(some), norm) + 2 * gamma(self.roundings, U64) * dual_norms(off, norm)))
            self.cache[norm] = torch.cat(parts)
        return self.cache[norm]


def stage_of(plan: Plan, device: torch.device, dense: bool) -> Stage:
    """The stage of a plan: a matrix, or, unless `dense`, matrix-free if it acts on large images."""
    if dense or not plan.of_images or plan.inputs * plan.outputs <= SMALL_MATRIX:
        return dense_stage(plan, device)
    return map_stage(plan, device)


def _check_size(m: int, n: int, most: int = 0) -> None:
    most = most or LARGEST_MATRIX
    if m * n > most:
        raise UnsupportedLayer(f"expected layers of at most {most} weights as dense matrices, got {m}×{n}; use method 'dual' or 'global'")


def dense_stage(plan: Plan, device: torch.device) -> DenseStage:
    """The product of all maps as one matrix, with a bound of each entry's rounding error. Raises UnsupportedLayer where a matrix is too large."""
    _check_size(plan.inputs, plan.inputs)
    matrix = torch.eye(plan.inputs, dtype=torch.float64, device=device)
    vector = torch.zeros(plan.inputs, dtype=torch.float64, device=device)
    matrix_error, vector_error = torch.zeros_like(matrix), torch.zeros_like(vector)
    for i, step in enumerate(plan.maps):
        _check_size(step.outputs, plan.inputs)
        if isinstance(step, Mixing):
            mixing = step.dense()
            loss = gamma(mixing.shape[1] + 2, U64)
            size = mixing.abs()
            matrix_error = size @ (matrix_error + loss * matrix.abs()) * (1 + 1e-9)
            vector_error = size @ (vector_error + loss * vector.abs()) * (1 + 1e-9)
            matrix, vector = mixing @ matrix, mixing @ vector
            continue
        op, h = (step.inner, step.unchanged) if isinstance(step, PartialMap) else (step, 0)
        exact = op.weight if i == 0 and h == 0 and isinstance(op, MatrixMap) else None  # W·I = W without rounding
        plain = exact is not None
        loss = 0.0 if plain else op.loss

        def through(rows: Tensor, absolute: bool, op: LinearMap = op) -> Tensor:
            return op.apply(rows.mT, absolute).mT

        made = through(matrix[h:], False) if exact is None else exact.clone()
        # For any order of summation the error of an entry is at most γ times the sum of absolute values, plus the propagated error of its factors.
        made_error = torch.zeros_like(made) if plain else through(loss * matrix[h:].abs() + matrix_error[h:], True) * (1 + 1e-9)
        moved, moved_error = _apply_to_vector(op, vector[h:], vector_error[h:], loss, not plain)
        matrix, matrix_error = torch.cat([matrix[:h], made]), torch.cat([matrix_error[:h], made_error])
        vector, vector_error = torch.cat([vector[:h], moved]), torch.cat([vector_error[:h], moved_error])

    def size_of(t: Tensor) -> float:
        return float(norm_up(t.flatten(), 0)) if bool((t != 0).any()) else 0.0

    wrong, off = size_of(matrix_error), size_of(vector_error)
    return DenseStage(matrix, vector, wrong, off, plan.activation, plan.linear, size_of(matrix), size_of(vector), plan.steps, plan.executed)


def _apply_to_vector(op: LinearMap, vector: Tensor, error: Tensor, loss: float, rounds: bool) -> tuple[Tensor, Tensor]:
    """(A·vector + b, a bound of its error), for a vector with a known bound of its error. rounds: whether the final sum rounds."""
    zero = torch.zeros(op.outputs, dtype=torch.float64, device=vector.device)
    added, added_error = (zero if t is None else t for t in (op.bias, op.bias_error))
    moved, moved_error = op.apply(vector), op.apply(loss * vector.abs() + error, True)
    return moved + added, (moved_error + added_error + 2 * U64 * (moved.abs() + added.abs()) * rounds) * (1 + 1e-9)


def map_stage(plan: Plan, device: torch.device) -> MapStage:
    """The maps in series, matrix-free; only the bias is computed. Raises UnsupportedLayer where the matrix would have too many entries."""
    for step in plan.maps:
        _check_size(step.outputs, plan.inputs, LARGEST_MAP)
    vector = torch.zeros(plan.inputs, dtype=torch.float64, device=device)
    error = torch.zeros_like(vector)
    for step in plan.maps:
        op, h = (step.inner, step.unchanged) if isinstance(step, PartialMap) else (step, 0)
        moved, off = _apply_to_vector(op, vector[h:], error[h:], op.loss, True)
        vector, error = torch.cat([vector[:h], moved]), torch.cat([error[:h], off])
    steps = Series.of(plan.maps)
    magnitude = steps.magnitude()
    mixed = sum(not isinstance(step, Mixing) for step in plan.maps)
    return MapStage(
        vector, magnitude * steps.relative * (1 + 1e-9), float(norm_up(error, 0)), plan.activation, plan.linear, magnitude, float(norm_up(vector, 0)),
        plan.steps, plan.executed, steps, mixed <= 1 and all(step.terms <= 1 for step in plan.maps if isinstance(step, Mixing)),
    )  # fmt: skip
