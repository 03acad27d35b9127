"""The contract of every attack: whatever it returns is projected, cast, measured again and judged again.

In the spirit of foolbox (Rauber et al. 2017): `Attack.__call__` is final, subclasses only propose perturbations in `_run`.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import numpy as np
import torch
from torch import nn

from robustlip.attacks.spaces import Space, space_of
from robustlip.checks import check_finite_weights, check_fit, check_logits
from robustlip.errors import BadInput, RobustlipError
from robustlip.layers import as_chain
from robustlip.threats import InputBall, Threat


@dataclass(frozen=True)
class Observation:
    """What an attack found, sample by sample: an upper bound on each robust radius.

    index, label, prediction (clean), adversarial_prediction: int64 (N,).
    success: bool (N,), the model as executed predicts another class than the label at the adversarial point (True with
    distance 0 where the clean point is misclassified already).
    distance: float64 (N,), the norm of the returned perturbation in the threat's norm and units, measured in float64 on the
    point cast to the model's dtype. radius: float64 (N,), the smallest distance at which this attack succeeded: inf where it
    never did, 0 where the clean point is misclassified.
    adversarial: inputs or embeddings (N, …) in the model's dtype; for weight threats a dict, name → float64 changes (G, …) of
    that matrix. group: int64 (N,), the row of `adversarial` that belongs to each sample.
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

    def __len__(self) -> int:
        return len(self.index)

    @property
    def status(self) -> tuple[str, ...]:
        """Per sample: 'misclassified' (at the clean point), 'broken' or 'withstood'."""
        clean = self.prediction == self.label
        return tuple("misclassified" if not c else "broken" if s else "withstood" for c, s in zip(clean, self.success, strict=True))

    def robust_accuracy(self) -> float:
        """The fraction of samples that are classified correctly and withstood the attack."""
        return float(np.mean(~self.success)) if len(self) else float("nan")

    def to_json_dict(self) -> dict[str, Any]:
        """Plain JSON types only; an infinite radius is null."""
        rows = zip(self.index, self.label, self.prediction, self.radius, self.status, strict=True)
        return {
            "threat": self.threat.name,
            "norm": self.threat.norm,
            "dtype": self.dtype,
            "attack": self.attack,
            "seed": self.seed,
            "weights_sha256": self.weights_sha256,
            "samples": [
                {"index": int(i), "label": int(y), "prediction": int(p), "radius": float(r) if math.isfinite(r) else None, "status": s}
                for i, y, p, r, s in rows
            ],
        }


class Proposal(NamedTuple):
    """Perturbations shared by several samples: delta (G, …), group int64 (N,)."""

    delta: torch.Tensor
    group: torch.Tensor


class Attack(ABC):
    """Base of all attacks. A subclass sets `name`, may set `needs_radius`, and implements `_run`."""

    name: ClassVar[str]
    needs_radius: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__:
            raise TypeError(f"{cls.__name__} overrides Attack.__call__, which is final; implement _run instead")

    @abstractmethod
    def _run(self, space: Space, labels: torch.Tensor, radius: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor | Proposal:
        """Propose perturbations for correctly classified samples.

        space: N samples. labels: int64 (N,). radius: (N,) in the model's dtype, or None for attacks that search one.
        Returns delta (N, …) like space.clean, or a Proposal of shared ones. Nothing it returns is trusted.
        """

    @final
    def __call__(
        self,
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: Threat,
        *,
        generator: torch.Generator | None = None,
        index: Any = None,
        weights_sha256: str = "",
    ) -> Observation:
        """Attack the model at x (N, …) with labels y (N,), int64.

        generator: source of all randomness (default: a new one with seed 0). index: N sample ids (default 0 … N − 1).
        The model's mode, weights, gradient flags and the global random states come back as they were, also after an error.
        Raises BadInput for labels, inputs, weights or radii that cannot be used, RobustlipError when the attack proposes or
        the model answers something that is not finite.
        """
        if self.needs_radius and threat.radius is None:
            raise BadInput(
                f"expected a threat with a radius for the attack {self.name!r}, got radius=None; "
                f"give one ({threat.units}) or use the attack 'min', which searches it"
            )
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        with preserved(model), torch.inference_mode(False):
            check_finite_weights(model)
            chain = as_chain(model)
            chain.eval().requires_grad_(False)
            dtype = _dtype_of(chain, x)
            x, y = _check_samples(x, y, threat, dtype)
            chain.check_inputs(x)
            check_fit(chain, x)
            index = _check_index(index, len(x))
            with torch.no_grad():
                logits = chain.scores(x)
            _check_logits(logits, len(x), "the clean point", index)
            _check_labels(y, logits.shape[1])
            prediction = logits.argmax(1)
            space = space_of(chain, x, threat)

            with torch.enable_grad():
                delta, group = self._propose(space, y, prediction == y, threat.radius, generator)
            point, distance, adversarial_logits, group = self._land(space, delta, group, threat.radius, index)
            found = adversarial_logits.argmax(1)
            success = found != y
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
        )

    def _chunk(self, space: Space) -> int:
        """How many samples `_run` gets at once."""
        return space.chunk

    def _propose(
        self, space: Space, y: torch.Tensor, correct: torch.Tensor, radius: float | None, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs `_run` on the correctly classified samples, in chunks that fit in memory → delta (G, …), group (N,)."""
        todo = correct.nonzero().flatten()
        deltas, groups = [torch.zeros_like(space.clean[:1])], torch.zeros(len(y), dtype=torch.int64, device=y.device)
        rows = 1  # row 0: the clean point, for the samples that are misclassified there
        for part in todo.split(self._chunk(space)) if len(todo) else ():
            limit = None if radius is None else torch.full((len(part),), radius, dtype=space.clean.dtype, device=y.device)
            result = self._run(space.take(part), y[part], limit, generator)
            if not isinstance(result, Proposal):
                result = Proposal(result, torch.arange(len(part), device=y.device))
            deltas.append(result.delta.detach())
            groups[part] = rows + result.group
            rows += len(result.delta)
        return torch.cat(deltas), groups

    def _land(
        self, space: Space, delta: torch.Tensor, group: torch.Tensor, radius: float | None, index: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Checks finiteness, lands inside the ball, measures and judges again (see `Space.judged`)."""
        finite = torch.isfinite(delta.flatten(1)).all(1)[group]
        if not bool(finite.all()):
            raise RobustlipError(
                f"expected finite perturbations from the attack {self.name!r}, got NaN or infinity for "
                f"sample {index[int((~finite).nonzero()[0])]}; look for a layer whose gradient is not finite there"
            )
        with torch.no_grad():
            point, distance, logits, row = space.judged(delta, group, radius)
        _check_logits(logits, len(group), f"the point found by the attack {self.name!r}", index)
        return point, distance, logits, row


# ---- what comes back as it was


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restores training flags, requires_grad flags, parameters and buffers (bitwise) and the global random states."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    tensors = [(t, t.detach().clone()) for t in [*model.parameters(), *model.buffers()]]
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for tensor, saved in tensors:
                tensor.detach().copy_(saved)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


# ---- what is refused


def _dtype_of(model: nn.Module, x: torch.Tensor) -> torch.dtype:
    for tensor in model.parameters():
        if tensor.is_floating_point():
            return tensor.dtype
    return x.dtype


def _check_samples(x: torch.Tensor, y: torch.Tensor, threat: Threat, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(x, torch.Tensor) or x.dim() < 2 or len(x) == 0:
        got = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise BadInput(f"expected inputs as a tensor (N, …) of at least one sample, got {got}; add the batch dimension")
    if not isinstance(y, torch.Tensor) or y.shape != (len(x),) or y.is_floating_point() or y.dtype == torch.bool:
        got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
        raise BadInput(f"expected labels as an integer tensor ({len(x)},), got {got}; give one class number per sample")
    x, y = x.detach().clone(), y.detach().to(x.device, torch.int64, copy=True)
    if not x.is_floating_point():
        return x, y
    finite = torch.isfinite(x.flatten(1)).all(1)
    if not bool(finite.all()):
        raise BadInput(f"expected finite inputs, got NaN or infinity in sample {int((~finite).nonzero()[0])}; drop or repair it")
    if not torch.equal(x.to(dtype).to(x.dtype), x):
        raise BadInput(
            f"expected inputs that {str(dtype).removeprefix('torch.')} (the model's dtype) can hold exactly, got {x.dtype}; "
            f"convert them first, so that radii count from the point that the model sees"
        )
    if isinstance(threat, InputBall) and threat.clip is not None:
        low, high = float(x.double().min()), float(x.double().max())
        if low < threat.clip[0] or high > threat.clip[1]:
            raise BadInput(f"expected inputs within clip={threat.clip}, got values in [{low}, {high}]; clip them or widen the box")
    return x.to(dtype), y


def _check_index(index: Any, count: int) -> np.ndarray:
    ids = np.arange(count) if index is None else np.asarray(index.cpu() if isinstance(index, torch.Tensor) else index)
    if ids.shape != (count,) or not np.issubdtype(ids.dtype, np.integer):
        raise BadInput(f"expected {count} integer sample ids, got {ids.dtype} of shape {ids.shape}; give one per sample or none")
    return ids.astype(np.int64)


def _check_labels(y: torch.Tensor, classes: int) -> None:
    if bool(((y < 0) | (y >= classes)).any()):
        worst = int(y[(y < 0) | (y >= classes)][0])
        raise BadInput(f"expected labels in [0, {classes - 1}], got {worst}; the model has {classes} classes")


def _check_logits(logits: torch.Tensor, count: int, where: str, index: np.ndarray) -> None:
    check_logits(logits, count)
    finite = torch.isfinite(logits).all(1)
    if not bool(finite.all()):
        raise RobustlipError(
            f"expected finite logits at {where}, got NaN or infinity for sample {index[int((~finite).nonzero()[0])]}; "
            f"this is no success of the attack: find the layer that overflows"
        )
