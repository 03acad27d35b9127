"""The contract of every attack: what it returns is projected, cast, measured again and classified again.

As in foolbox (Rauber et al. 2017), `Attack.__call__` is final; subclasses only propose perturbations in `_run`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, ClassVar, NamedTuple, final

import numpy as np
import torch
from torch import nn

from robustlip.attacks.spaces import EmbeddingSpace, InputSpace, Space, round_down
from robustlip.attacks.weight_space import WeightSpace
from robustlip.checks import check_finite_weights, check_fit
from robustlip.data.lengths import NO_LABEL, by_length, counted, labels_of
from robustlip.errors import BadInput, RobustlipError
from robustlip.execution import covered_kernels
from robustlip.geometry import length
from robustlip.modes import in_eval_mode, random_state_kept
from robustlip.samples import as_request
from robustlip.target import Target
from robustlip.threats import EmbeddingBall, InputBall, Threat, WeightBall

# How far the rounding of inputs to the model's dtype may move them, relative to the radius: the attack loses this part of its ball.
MOVED = 0.01
# Of labels by token, how many tokens of a text are attacked: those of the smallest margins.
FRAGILE = 4


@dataclass(frozen=True)
class Observation:
    """The result of an attack for each sample: an upper bound of each robust radius.

    index, label, prediction (clean), adversarial_prediction: int64 (N,).
    success: bool (N,), whether the model as executed predicts another class than the label at the adversarial point (True with
    distance 0 if the clean point is already misclassified).
    distance: float64 (N,), the norm of the returned perturbation in the threat's norm and units, measured in float64 on the
    point cast to the model's dtype, from the given point (0 if only that cast changed the point). radius:
    float64 (N,), the smallest distance at which this attack succeeded: inf if it never did, 0 if the clean point is misclassified.
    adversarial: inputs or embeddings (N, …) in the model's dtype; for weight threats a dict, name → float64 changes (G, …) of
    that matrix. group: int64 (N,), the row of `adversarial` that belongs to each sample.
    failure: one sentence per sample whose logits (at the clean point or at the point found) or whose perturbation are not finite; '' otherwise.
    Such a sample counts neither as broken nor as robust: no success, radius inf, and prediction −1 if the logits are not finite.
    settings: all options of the attack, defaults included (steps, restarts, losses, …), as plain JSON types; and the box of the threat.
    dtype: the arithmetic that was attacked. seed: of the generator. weights_sha256: as passed in.
    """

    threat: Threat
    attack: str
    seed: int
    dtype: str
    weights_sha256: str
    index: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    success: np.ndarray
    distance: np.ndarray
    radius: np.ndarray
    adversarial_prediction: np.ndarray
    adversarial: torch.Tensor | dict[str, torch.Tensor]
    group: np.ndarray
    settings: Mapping[str, Any] = field(default_factory=dict)
    failure: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.failure:
            object.__setattr__(self, "failure", ("",) * len(self.index))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def status(self) -> tuple[str, ...]:
        """Per sample: 'not finite' (see failure), 'misclassified' (at the clean point), 'broken' or 'withstood'."""
        samples = zip(self.failure, self.prediction == self.label, self.success, strict=True)
        return tuple("not finite" if f else "misclassified" if not c else "broken" if s else "withstood" for f, c, s in samples)

    @property
    def failed(self) -> np.ndarray:
        """bool (N,): the samples with a failure."""
        return np.array([bool(why) for why in self.failure], dtype=bool)

    def robust_accuracy(self) -> float:
        """The fraction of samples that are classified correctly and on which the attack did not succeed."""
        return float(np.mean(~self.success & ~self.failed)) if len(self) else float("nan")

    def to_json_dict(self) -> dict[str, Any]:
        """Plain JSON types; an infinite radius is null."""
        rows = zip(self.index, self.label, self.prediction, self.radius, self.status, self.failure, strict=True)
        return {
            "threat": self.threat.name,
            "norm": self.threat.norm,
            "clip": box_of(self.threat),
            "dtype": self.dtype,
            "attack": self.attack,
            "settings": dict(self.settings),
            "seed": self.seed,
            "weights_sha256": self.weights_sha256,
            "samples": [
                {"index": int(i), "label": int(y), "prediction": int(p), "radius": float(r) if math.isfinite(r) else None, "status": s}
                | ({"failure": f} if f else {})
                for i, y, p, r, s, f in rows
            ],
        }


def box_of(threat: Threat) -> list[float] | None:
    """[low, high] of an input threat with a box, for JSON; else None."""
    return None if threat.box is None else list(threat.box)


class Proposal(NamedTuple):
    """Perturbations shared by several samples: delta (G, …), group int64 (N,)."""

    delta: torch.Tensor
    group: torch.Tensor


class Attack(ABC):
    """Base of all attacks. A subclass sets `name`, may set `needs_radius`, and implements `_run`."""

    name: ClassVar[str]
    needs_radius: ClassVar[bool] = True

    @property
    def settings(self) -> dict[str, Any]:
        """All options of this attack, defaults included, as plain JSON types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()} if is_dataclass(self) else {}

    @property
    def described(self) -> str:
        """Its name and settings on one line, for tables."""
        options = ", ".join(f"{key} {_plain(value)}" for key, value in self.settings.items() if value is not None)
        return f"{self.name} ({options})" if options else self.name

    def check_threat(self, threat: Threat) -> None:  # noqa: B027  (most attacks take every threat)
        """Raises BadInput for a threat that this attack does not support for any model."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__:
            raise TypeError(f"{cls.__name__} overrides Attack.__call__, which is final; implement _run instead")

    @abstractmethod
    def _run(self, space: Space, labels: torch.Tensor, radius: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor | Proposal:
        """Propose perturbations for correctly classified samples.

        space: N samples. labels: int64 (N,). radius: (N,) in space.work, or None for attacks that search the radius.
        Returns delta (N, …) like space.clean, or a Proposal of shared ones. The result is checked by the caller.
        """

    @final
    def __call__(
        self,
        model: nn.Module,
        x: Any,
        y: Any = None,
        threat: Threat | str | None = None,
        *,
        generator: torch.Generator | None = None,
        index: Any = None,
        weights_sha256: str = "",
    ) -> Observation:
        """Attack the model at x (N, …) with labels y (N,).

        model: any nn.Module; the attacked function is the module as it is called, in eval mode (see `Target`). If samples influence each other, the
        model is evaluated sample by sample. It runs with the kernels that certificates cover (`robustlip.execution`).
        x, y, threat: see `robustlip.samples`; a loader may take the place of x and y, a name the place of a threat.
        Inputs are rounded to the model's dtype; distances and radii are measured from the given points.
        generator: source of all randomness (default: a new one with seed 0). index: N sample ids (default 0 … N − 1).
        The model's mode, weights, gradient flags and the global random states are restored, also after an error.
        Raises BadInput for models, labels, inputs, weights or radii that cannot be used, RobustlipError if the logits of all clean points are
        not finite. A single sample whose logits or perturbation are not finite is marked as a failure (see `Observation`).
        """
        x, y, threat = as_request(x, y, threat)
        if self.needs_radius and threat.radius is None:
            raise BadInput(
                f"expected a threat with a radius for the attack {self.name!r}, got radius=None; "
                f"give one ({threat.units}) or use the attack 'min', which searches for it"
            )
        self.check_threat(threat)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        groups, one = by_length(x), self._of_tokens if y.dim() == 2 else self._at
        if len(groups) == 1:
            return one(model, groups[0][1], labels_of(y, *groups[0]) if y.dim() == 2 else y, threat, generator, index, weights_sha256)
        if len(y) != len(x):
            raise BadInput(f"expected one label for each of {len(x)} samples, got labels of shape {tuple(y.shape)}; match them")
        ids = _check_index(index, len(x))
        parts = [one(model, part, labels_of(y, of, part), threat, generator, ids[of.cpu().numpy()], weights_sha256) for of, part in groups]
        return _together(parts, torch.cat([of for of, _ in groups]).argsort().cpu().numpy())

    def _of_tokens(
        self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, threat: Threat, generator: torch.Generator, index: Any, weights_sha256: str
    ) -> Observation:
        """`__call__` of texts of one length with a label for each token, y (N, T): a text is broken where any labelled token's prediction changes.

        Attacked are the tokens of the smallest margins, one after the other; the nearest point at which any token is wrong counts. label and
        predictions count the labelled tokens and those that are right.
        """
        if not isinstance(threat, EmbeddingBall):
            raise BadInput(f"expected an embedding threat for labels by token, got {threat.name}; use embedding-l2")
        asked, ids = y != NO_LABEL, _check_index(index, len(x))
        if y.shape != x.shape or not bool(asked.any(1).all()):
            raise BadInput(f"expected labels {tuple(x.shape)}, at least one a text, got {tuple(y.shape)}; give {NO_LABEL} to tokens without one")
        target, asked, y = Target(model), asked.to(x.device), y.to(x.device)

        @torch.no_grad()
        def judged(points: torch.Tensor, embedded: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """(which labelled tokens are right (N, T), their margins, which samples' logits are finite)."""
            with preserved(model), in_eval_mode(model), covered_kernels(target.kind):
                logits = target.scores_by_token(points, embedded).double()
            known = y.masked_fill(~asked, 0)
            _check_labels(known, logits.shape[-1])
            own = logits.gather(-1, known.unsqueeze(-1)).squeeze(-1)
            margin = own - logits.scatter(-1, known.unsqueeze(-1), -torch.inf).amax(-1)
            return asked & (logits.argmax(-1) == known), torch.where(asked, margin, torch.inf), _finite(logits)

        target.check_inputs(x)
        right, margin, answered = judged(x, False)
        with torch.no_grad():
            points = target.embed(x).detach().clone()
        radius = torch.full((len(x),), torch.inf, dtype=torch.float64)
        distance, failure = torch.zeros_like(radius), [""] * len(x)
        whole = (right == asked).all(1) & answered
        weakest = torch.zeros_like(asked).scatter(1, margin.argsort(1)[:, :FRAGILE], True) & asked & whole[:, None]
        for position in weakest.any(0).nonzero()[:, 0].tolist():
            rows = weakest[:, position].nonzero()[:, 0]
            part = self._at(model, x[rows], y[rows, position], threat, generator, ids[rows.cpu().numpy()], weights_sha256, position)
            assert isinstance(part.adversarial, torch.Tensor)
            for i, row in enumerate(rows.tolist()):
                failure[row] = failure[row] or part.failure[i]
                if part.radius[i] < radius[row] or (math.isinf(radius[row]) and part.distance[i] > distance[row]):
                    radius[row], distance[row] = float(part.radius[i]), float(part.distance[i])
                    points[row] = part.adversarial[int(part.group[i])]
        there, _, landed = judged(points, True)
        broken = ((there != asked).any(1) & whole & landed).cpu() | (~(right == asked).all(1) & answered).cpu()
        why = ("expected finite logits, got NaN or infinity; find the layer that overflows", "")
        return Observation(
            threat=threat, attack=self.name, seed=generator.initial_seed(), dtype=str(target.dtype(x)).removeprefix("torch."),
            weights_sha256=weights_sha256, index=ids, label=counted(y).cpu().numpy(),
            prediction=torch.where(answered, right.sum(1), -1).cpu().numpy(),
            success=broken.numpy(), distance=distance.numpy(), radius=torch.where(broken, distance, torch.inf).numpy(),
            adversarial_prediction=there.sum(1).cpu().numpy(), adversarial=points, group=np.arange(len(x)), settings=self.settings,
            failure=tuple(f or why[int(ok)] for f, ok in zip(failure, (answered & landed).tolist(), strict=True)),
        )  # fmt: skip

    def _at(
        self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, threat: Threat, generator: torch.Generator, index: Any, weights_sha256: str,
        position: int | None = None,
    ) -> Observation:  # fmt: skip
        """`__call__` of samples of one shape. position: the token that is judged, of models that answer with scores by token."""
        target = Target(model, position)
        with preserved(model), in_eval_mode(model), covered_kernels(target.kind):
            check_finite_weights(model)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            dtype = target.dtype(x)
            given, y = _check_samples(x, y, threat, dtype)
            x = given.to(dtype) if given.is_floating_point() else given
            target.check_inputs(x)
            check_fit(model, x)
            index = _check_index(index, len(x))
            logits = target.compare_batches(x)
            answered = _finite(logits)
            if not bool(answered.any()):
                raise RobustlipError(
                    f"expected finite logits at the clean points, got NaN or infinity for all of {len(x)} samples; find the layer that overflows"
                )
            _check_labels(y, logits.shape[1])
            prediction = torch.where(answered, logits.argmax(1), -1)
            space = space_of(target, x, threat)
            if isinstance(space, InputSpace) and given.dtype != dtype and not torch.equal(x.double(), given.double()):
                space.around(given)

            with torch.enable_grad():
                _check_gradient(space)
                delta, group = self._propose(space, y, prediction == y, threat.radius, generator)
            delta, proposed = _without_failures(delta, group)
            point, distance, adversarial_logits, group = self._evaluate(space, delta, group, threat.radius)
            landed = _finite(adversarial_logits)
            found = torch.where(landed, adversarial_logits.argmax(1), -1)
            success = (found != y) & answered & proposed & landed
            described = space.describe(point, model)

        def numpy(values: torch.Tensor) -> np.ndarray:
            return values.detach().cpu().numpy()

        return Observation(
            threat=threat,
            attack=self.name,
            seed=generator.initial_seed(),
            dtype=str(dtype).removeprefix("torch."),
            weights_sha256=weights_sha256,
            index=index,
            label=numpy(y),
            prediction=numpy(prediction),
            success=numpy(success),
            distance=numpy(distance),
            radius=np.where(numpy(success), numpy(distance), np.inf),
            adversarial_prediction=numpy(found),
            adversarial=described,
            group=numpy(group),
            settings=self.settings,
            failure=self._failures(numpy(answered), numpy(proposed), numpy(landed), numpy(distance)),
        )

    def _failures(self, answered: np.ndarray, proposed: np.ndarray, landed: np.ndarray, distance: np.ndarray) -> tuple[str, ...]:
        """One sentence for each sample with a value that is not finite, '' for the others."""

        def sentence(clean: bool, change: bool, there: bool, far: float) -> str:
            if not clean:
                return "expected finite logits at the clean point, got NaN or infinity; find the layer that overflows"
            if not change:
                return f"expected a finite perturbation from the attack {self.name!r}, got NaN or infinity; find the gradient that is not finite"
            if not there:
                return f"expected finite logits at the point found by the attack {self.name!r}, got NaN or infinity at distance {far:.6g}; " + (
                    "this is not a success: find the layer that overflows"
                )
            return ""

        return tuple(sentence(*row) for row in zip(answered, proposed, landed, distance, strict=True))

    def _chunk(self, space: Space) -> int:
        """The number of samples per call of `_run`."""
        return space.chunk

    def _propose(
        self, space: Space, y: torch.Tensor, correct: torch.Tensor, radius: float | None, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs `_run` on the correctly classified samples, in chunks that fit into memory → delta (G, …), group (N,)."""
        todo = correct.nonzero().flatten()
        deltas, groups = [space.zeros(1)], torch.zeros(len(y), dtype=torch.int64, device=y.device)
        rows = 1  # row 0: the clean point, for misclassified samples
        for part in todo.split(self._chunk(space)) if len(todo) else ():
            limit = None if radius is None else torch.full((len(part),), round_down(radius, space.work), dtype=space.work, device=y.device)
            result = self._run(space.take(part), y[part], limit, generator)
            if not isinstance(result, Proposal):
                result = Proposal(result, torch.arange(len(part), device=y.device))
            deltas.append(result.delta.detach())
            groups[part] = rows + result.group
            rows += len(result.delta)
        return torch.cat(deltas), groups

    def _evaluate(
        self, space: Space, delta: torch.Tensor, group: torch.Tensor, radius: float | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Moves the points into the ball, measures and classifies them again (see `Space.assess`)."""
        with torch.no_grad():
            return space.assess(delta, group, radius)


def _together(parts: list[Observation], order: np.ndarray) -> Observation:
    """Concatenates observations of texts of several lengths; sample i is sample order[i] of them. Embeddings are 0 after the end of a text."""
    first = parts[0]
    arrays = ("index", "label", "prediction", "success", "distance", "radius", "adversarial_prediction")
    joined: dict[str, Any] = {name: np.concatenate([getattr(p, name) for p in parts])[order] for name in arrays}
    joined["failure"] = tuple(np.array([why for p in parts for why in p.failure], dtype=object)[order])
    points: list[Any] = [p.adversarial for p in parts]
    if isinstance(first.adversarial, dict):
        rows = [len(next(iter(found.values()))) for found in points]
        starts = np.cumsum([0, *rows[:-1]])
        joined["adversarial"] = {name: torch.cat([found[name] for found in points]) for name in first.adversarial}
        joined["group"] = np.concatenate([p.group + start for p, start in zip(parts, starts, strict=True)])[order]
    else:
        longest = max(found.shape[1] for found in points)
        each = [torch.nn.functional.pad(found[p.group], (0, 0, 0, longest - found.shape[1])) for p, found in zip(parts, points, strict=True)]
        joined["adversarial"], joined["group"] = torch.cat(each)[order], np.arange(len(order))
    return replace(first, **joined)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_plain(part)}" for key, part in value.items()) + ")"
    return "/".join(map(_plain, value)) if isinstance(value, list | tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def _finite(values: torch.Tensor) -> torch.Tensor:
    """(N, …) → bool (N,)."""
    return torch.isfinite(values.flatten(1)).all(1)


def _without_failures(delta: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(delta (G, …) with 0 in place of perturbations that are not finite, whether the perturbation of each sample is finite (N,))."""
    finite = _finite(delta)
    return torch.where(finite.reshape(-1, *[1] * (delta.dim() - 1)), delta, 0.0), finite[group]


# ---- restoring the state


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restores parameters and buffers (bit by bit, and written only if they differ, so that graphs through them stay valid),
    their requires_grad flags and gradients, and the global random states."""
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    tensors = [(t, t.detach().clone()) for t in [*model.parameters(), *model.buffers()]]
    with random_state_kept():
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, saved in tensors:
                    if not _same_bits(tensor.detach(), saved):
                        tensor.detach().copy_(saved)
            for parameter, flag, grad in flags:
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)
                if parameter.grad is not grad:
                    parameter.grad = grad


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_floating_point():  # as integers: NaN equals itself, and 0 differs from -0
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        a, b = a.reshape(-1).view(whole), b.reshape(-1).view(whole)
    return torch.equal(a, b)


# ---- checks


def _check_samples(x: torch.Tensor, y: torch.Tensor, threat: Threat, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of x, in its given precision, and of y."""
    x, y = x.clone(), y.to(x.device, copy=True)
    if not x.is_floating_point():
        return x, y
    finite = torch.isfinite(x.flatten(1)).all(1)
    if not bool(finite.all()):
        raise BadInput(f"expected finite inputs, got NaN or infinity in sample {int((~finite).nonzero()[0])}; drop or correct it")
    if not isinstance(threat, InputBall):
        return x, y
    seen = x.to(dtype)
    if not bool(torch.isfinite(seen).all()):
        raise BadInput(f"expected inputs that {_name(dtype)} (the model's dtype) can hold, got values that overflow it; scale them")
    if threat.radius is not None:
        moved = float(length(seen.double() - x.double(), threat.norm).max())
        if moved > MOVED * threat.radius:
            raise BadInput(
                f"expected inputs that {_name(dtype)} (the model's dtype) can hold exactly, or with a rounding far below the radius "
                f"{threat.radius:g}, got {_name(x.dtype)} that it moves by {moved:.3g}; "
                f"convert them first, so that radii count from the point that the model sees"
            )
    if threat.clip is not None:
        low, high = float(seen.double().min()), float(seen.double().max())
        if low < threat.clip[0] or high > threat.clip[1]:
            raise BadInput(f"expected inputs within clip={threat.clip}, got values in [{low}, {high}]; clip them or widen the box")
    return x, y


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_gradient(space: Space) -> None:
    """Raises BadInput if no gradient reaches the perturbed values: a gradient attack would find nothing, and the model would look robust."""
    first = space.take(torch.zeros(1, dtype=torch.int64, device=space.clean.device))
    point = first.clean.detach().clone().requires_grad_()
    logits = first.logits(point)
    grad = torch.autograd.grad(logits.sum(), point, allow_unused=True)[0] if logits.requires_grad else None
    if grad is None:
        raise BadInput(
            "expected logits with a gradient to the perturbed values, got none: the forward is detached from them; "
            "remove no_grad, detach, argmax or conversion to numpy from the forward"
        )


def _check_index(index: Any, count: int) -> np.ndarray:
    ids = np.arange(count) if index is None else np.asarray(index.cpu() if isinstance(index, torch.Tensor) else index)
    if ids.shape != (count,) or not np.issubdtype(ids.dtype, np.integer):
        raise BadInput(f"expected {count} integer sample ids, got {ids.dtype} of shape {ids.shape}; give one per sample or none")
    return ids.astype(np.int64)


def _check_labels(y: torch.Tensor, classes: int) -> None:
    if bool(((y < 0) | (y >= classes)).any()):
        worst = int(y[(y < 0) | (y >= classes)][0])
        raise BadInput(f"expected labels in [0, {classes - 1}], got {worst}; the model has {classes} classes")


def space_of(model: Target, x: torch.Tensor, threat: Threat) -> Space:
    """The space of a threat around the inputs x (N, …). Raises BadInput if the threat does not apply to the model."""
    if isinstance(threat, InputBall):
        if not x.is_floating_point():
            raise BadInput(
                f"expected floating-point inputs for the threat {threat.name!r}, got {x.dtype}; "
                f"attack a token model with an embedding threat, e.g. embedding-l2"
            )
        return InputSpace(model, x, threat)
    if isinstance(threat, EmbeddingBall):
        with torch.no_grad():
            model.check_embedding(x)
            return EmbeddingSpace(model, model.embed(x), threat)
    if isinstance(threat, WeightBall):
        return WeightSpace(model, x, threat)
    raise BadInput(f"expected a threat InputBall, EmbeddingBall or WeightBall, got {type(threat).__name__}; see robustlip.threats")
