"""The result of certification: what was proved, about which weights, in which arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from robustlip.hashing import joint_sha256
from robustlip.threats import Threat

CERTIFIED, ABSTAINED, MISCLASSIFIED = "certified", "abstained", "misclassified"


@dataclass(frozen=True)
class Certificate:
    """One certified radius per sample, and what it depends on.

    radius[i] > 0 proves: no perturbation within the threat at that radius changes prediction[i], and prediction[i] == label[i].
    index, label, prediction: int64 (N,); radius: float64 (N,), rounded down, in the units of the threat; status: N strings
    among certified, abstained, misclassified; reason: N strings, empty if certified. methods: N strings, the method that proved each
    radius ('best' runs several), empty if none did.
    dtype: the arithmetic that is covered: 'float32' etc. mean the model as executed in that dtype, 'real' means exact arithmetic only.
    bound: lipschitz_to_last_hidden, the largest constant used (from the input to the last hidden state, at the proved radius), and the
    model's own bound as `lipschitz_bound` computes it. versions: of robustlip, its rules, torch, and packages that add operations or methods.
    execution: the kernels with which the model runs, as `robustlip.execution` names them; other kernels (a compiled model,
    TF32, flash attention on CUDA) are not covered.
    programs: for texts, by number of tokens, the SHA-256 of the certified program; architecture_sha256 is the hash of all of them.
    """

    threat: Threat
    method: str
    dtype: str
    weights_sha256: str
    architecture_sha256: str
    index: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    radius: np.ndarray
    status: tuple[str, ...]
    reason: tuple[str, ...]
    methods: tuple[str, ...] = ()
    bound: dict[str, float | str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    execution: str = ""
    programs: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def certified_accuracy(self, radius: float) -> float:
        """The fraction of samples that are classified correctly and certified at `radius` (in the units of the threat)."""
        return float(np.mean(self.radius >= radius)) if len(self) else float("nan")


def concatenate(certificates: Sequence[Certificate]) -> Certificate:
    """Concatenates certificates of consecutive batches of one model under one threat. bound: the largest of each constant."""
    first = certificates[0]
    joined: dict[str, Any] = {name: np.concatenate([getattr(c, name) for c in certificates]) for name in ("index", "label", "prediction", "radius")}
    joined |= {name: tuple(word for c in certificates for word in getattr(c, name)) for name in ("status", "reason", "methods")}
    bound = {key: max(c.bound[key] for c in certificates if key in c.bound) for key in dict.fromkeys(k for c in certificates for k in c.bound)}
    programs = {length: sha for c in certificates for length, sha in c.programs.items()}
    architecture = joint_sha256(programs) if programs else first.architecture_sha256
    return replace(first, **joined, bound=bound, programs=programs, architecture_sha256=architecture)


def reordered(certificate: Certificate, order: np.ndarray) -> Certificate:
    """The same certificate with its samples in another order: sample i of the result is sample `order[i]`."""
    arrays: dict[str, Any] = {name: getattr(certificate, name)[order] for name in ("index", "label", "prediction", "radius")}
    words: dict[str, Any] = {}
    for name in ("status", "reason", "methods"):
        given = getattr(certificate, name)
        words[name] = tuple(given[i] for i in order.tolist()) if given else given
    return replace(certificate, **arrays, **words)
