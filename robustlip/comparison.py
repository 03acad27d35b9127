"""All certifiers over the same samples, next to one attack: what each proves, what it costs, how near it comes to what is possible.

For choosing a method and for tables; it is no certificate, and its document is not one that `robustlip verify` takes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlip.attacks import Attack
from robustlip.attacks.base import box_of
from robustlip.certificates import Certificate
from robustlip.certifiers import METHODS, certify
from robustlip.errors import BadInput, CertificateViolation, UnsupportedLayer
from robustlip.layers import Chain
from robustlip.numerics.rounding import dtype_of
from robustlip.threats import Threat

# Minutes for the first batch of a model.
SLOW = ("lipsdp",)

Batches = Callable[[str], Iterable[tuple[Tensor, Tensor, Any]]]


@dataclass(frozen=True)
class Comparison:
    """Radii by method, of N samples under one threat.

    radius: name → float64 (N,), in the units of the threat, in the order in which the methods ran. seconds: name → time of that pass; constants
    that an earlier pass computed for the same weights are not computed again. left_out: name → one sentence why it did not run.
    label, prediction: int64 (N,). attacked: float64 (N,), inf where the attack found nothing; None without an attack.
    failed: bool (N,), samples with logits that are not finite (see `Observation`): they count as not withstanding the attack.
    """

    threat: Threat
    dtype: str
    weights_sha256: str
    label: np.ndarray
    prediction: np.ndarray
    radius: dict[str, np.ndarray]
    seconds: dict[str, float]
    left_out: dict[str, str]
    attack: str = ""
    attacked: np.ndarray | None = None
    attack_seconds: float = 0.0
    failed: np.ndarray | None = None
    attack_settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def correct(self) -> np.ndarray:
        return np.asarray(self.prediction == self.label)

    @property
    def best(self) -> np.ndarray:
        """The largest radius of any method that ran, per sample (N,)."""
        return np.maximum.reduce(list(self.radius.values()))

    def wins(self) -> dict[str, int]:
        """On how many samples each method gave the largest radius; the first in order where several did."""
        names, table = list(self.radius), np.stack(list(self.radius.values()))
        first = table.argmax(0)[table.max(0) > 0]
        return {name: int(np.sum(first == i)) for i, name in enumerate(names)}

    def radii(self) -> tuple[float, ...]:
        """Where certified accuracy is shown: the requested radius, else the quartiles of `best` to two digits; none where nothing is proved."""
        if self.threat.radius is not None:
            return (self.threat.radius,)
        if not self.correct.any():
            return ()
        quartiles = np.quantile(self.best[self.correct], (0.25, 0.5, 0.75))
        return tuple(dict.fromkeys(float(f"{q:.2g}") for q in quartiles if q > 0))

    def fraction(self, radius: np.ndarray) -> float | None:
        """Median of certified / attacked over correctly classified samples that the attack broke; None without any."""
        if self.attacked is None:
            return None
        broken = self.correct & np.isfinite(self.attacked) & (self.attacked > 0)
        return float(np.median(radius[broken] / self.attacked[broken])) if broken.any() else None

    def median(self, radius: np.ndarray) -> float | None:
        return float(np.median(radius[self.correct])) if self.correct.any() else None

    def row(self, name: str, radius: np.ndarray, seconds: float) -> dict[str, Any]:
        """One line of the table, as plain JSON types. The attack's accuracies are those that withstood it."""
        counted = self.correct & ~self.failed if radius is self.attacked and self.failed is not None else self.correct
        accuracy = {f"{r:g}": float(np.mean(counted & (radius >= r) & (radius > 0))) for r in self.radii()}
        median = self.median(radius)
        finite = median if median is None or np.isfinite(median) else None
        return {"method": name, "median_radius": finite, "accuracy": accuracy, "fraction_of_attack": self.fraction(radius), "seconds": seconds}

    def to_json_dict(self) -> dict[str, Any]:
        wins = self.wins()
        rows = [self.row(name, r, self.seconds[name]) | {"what": METHODS[name].what, "largest_on": wins[name]} for name, r in self.radius.items()]
        attack = None
        if self.attacked is not None:
            attack = {key: value for key, value in self.row(self.attack, self.attacked, self.attack_seconds).items() if key != "fraction_of_attack"}
            attack["settings"] = dict(self.attack_settings)
            attack["not_finite"] = 0 if self.failed is None else int(self.failed.sum())
        return {
            "kind": "comparison of methods", "certificate": False,
            "note": "not a certificate file: robustlip verify does not take it; certify with one method, or best, to write one",
            "threat": self.threat.name, "units": self.threat.units, "clip": box_of(self.threat),
            "requested_radius": self.threat.radius, "dtype": self.dtype,
            "weights_sha256": self.weights_sha256, "samples": len(self.label), "correct": int(self.correct.sum()),
            "clean_accuracy": float(np.mean(self.correct)), "methods": rows,
            "best_of_these": self.row("best of these", self.best, sum(self.seconds.values())),
            "attack": attack, "left_out": self.left_out,
        }  # fmt: skip


def compare(
    chain: Chain, batches: Batches, threat: Threat, *, dtype: str | None = None, slow: bool = False, attack: Attack | None = None, seed: int = 0
) -> Comparison:
    """Runs every method that applies, then the attack once.

    batches: label → the same (x, y, index) every time, on the model's device. slow: run SLOW too. attack: one that needs no radius.
    Raises BadInput or UnsupportedLayer for what no method takes, CertificateViolation where the attack succeeds inside any method's radius.
    """
    free = replace(threat, radius=None)
    radius: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    certificates: list[Certificate] = []
    for name, method in METHODS.items():
        if reason := method.applies(chain, free):
            left_out[name] = reason
        elif name in SLOW and not slow:
            left_out[name] = "takes minutes; --slow runs it too"
        else:
            start = time.perf_counter()
            try:
                found = [certify(chain, x, y, free, name, dtype=dtype, index=index) for x, y, index in batches(name)]
            except (BadInput, UnsupportedLayer) as error:
                if not certificates:
                    raise  # the first method takes every model and threat: what it refuses is the input's fault
                left_out[name] = str(error)
                continue
            seconds[name] = time.perf_counter() - start
            radius[name] = np.concatenate([c.radius for c in found])
            certificates = certificates or found
    done = Comparison(
        threat, certificates[0].dtype, certificates[0].weights_sha256,
        np.concatenate([c.label for c in certificates]), np.concatenate([c.prediction for c in certificates]), radius, seconds, left_out,
    )  # fmt: skip
    if attack is None:
        return done
    # What is attacked is the arithmetic that is covered; float64 stands in for exact arithmetic.
    attacked = chain if dtype is None else copy.deepcopy(chain).to(torch.float64 if dtype == "real" else dtype_of(dtype))
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    observations = [attack(attacked, x, y, free, generator=generator, index=index) for x, y, index in batches(attack.name)]
    nearest = np.concatenate([o.radius for o in observations])
    failed = np.concatenate([o.failed for o in observations])
    spent = time.perf_counter() - start
    done = replace(done, attack=attack.name, attacked=nearest, attack_seconds=spent, failed=failed, attack_settings=attack.settings)
    if dtype != "real":
        _check(done, nearest)
    return done


def _check(done: Comparison, nearest: np.ndarray) -> None:
    for name, proved in done.radius.items():
        wrong = (~(proved <= nearest)).nonzero()[0]
        if len(wrong):
            i = int(wrong[0])
            raise CertificateViolation(
                f"expected every certificate to hold, got method {name!r} with radius {proved[i]!r} at sample {i} where the attack succeeded at "
                f"{nearest[i]!r}, {len(wrong)} such samples; this is a soundness bug: please report it"
            )
