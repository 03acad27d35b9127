"""All certifiers on the same samples, with one attack: the radii and the time of each method, and how close they come to the attack.

For choosing a method and for tables. The result is not a certificate, and `robustlip verify` does not accept it.
"""

from __future__ import annotations

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
from robustlip.certifiers import certify, methods
from robustlip.certifiers.chains import cast
from robustlip.certifiers.methods import SLOW
from robustlip.errors import BadInput, CertificateViolation, UnsupportedLayer, first_line
from robustlip.layers import Chain
from robustlip.numerics.rounding import evaluated_in
from robustlip.threats import Threat

INTERRUPTED = "interrupted"

Batches = Callable[[str], Iterable[tuple[Tensor, Tensor, Any]]]


@dataclass(frozen=True)
class Comparison:
    """Radii of N samples under one threat, by method.

    radius: name → float64 (N,), in the units of the threat, in the order in which the methods ran. seconds: name → time of that pass; constants
    that an earlier pass computed for the same weights are not computed again. left_out: name → one sentence that says why it did not run.
    label, prediction: int64 (N,). attacked: float64 (N,), inf if the attack found nothing; None without an attack.
    failed: bool (N,), samples with logits that are not finite (see `Observation`): they do not count as robust under attack.
    stopped: '', or why the comparison ended early ('interrupted', or an error message); the finished part is valid.
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
    stopped: str = ""

    @property
    def correct(self) -> np.ndarray:
        return np.asarray(self.prediction == self.label)

    @property
    def best(self) -> np.ndarray:
        """The largest radius of all methods that ran, per sample (N,)."""
        return np.maximum.reduce(list(self.radius.values()))

    def wins(self) -> dict[str, int]:
        """The number of samples on which each method has the largest radius; ties count for the method that ran first."""
        names, table = list(self.radius), np.stack(list(self.radius.values()))
        first = table.argmax(0)[table.max(0) > 0]
        return {name: int(np.sum(first == i)) for i, name in enumerate(names)}

    def radii(self) -> tuple[float, ...]:
        """The radii at which certified accuracy is shown: the requested radius, or the quartiles of `best` to two digits; () if nothing is proved."""
        if self.threat.radius is not None:
            return (self.threat.radius,)
        if not self.correct.any():
            return ()
        quartiles = np.quantile(self.best[self.correct], (0.25, 0.5, 0.75))
        return tuple(dict.fromkeys(float(f"{q:.2g}") for q in quartiles if q > 0))

    def fraction(self, radius: np.ndarray) -> float | None:
        """Median of certified / attacked radius over correctly classified samples that the attack broke; None without any."""
        if self.attacked is None:
            return None
        broken = self.correct & np.isfinite(self.attacked) & (self.attacked > 0)
        return float(np.median(radius[broken] / self.attacked[broken])) if broken.any() else None

    def median(self, radius: np.ndarray) -> float | None:
        return float(np.median(radius[self.correct])) if self.correct.any() else None

    def row(self, name: str, radius: np.ndarray, seconds: float) -> dict[str, Any]:
        """One row of the table, as plain JSON types. For the attack, accuracy is the share that is robust under it."""
        counted = self.correct & ~self.failed if radius is self.attacked and self.failed is not None else self.correct
        accuracy = {f"{r:g}": float(np.mean(counted & (radius >= r) & (radius > 0))) for r in self.radii()}
        median = self.median(radius)
        finite = median if median is None or np.isfinite(median) else None
        return {"method": name, "median_radius": finite, "accuracy": accuracy, "fraction_of_attack": self.fraction(radius), "seconds": seconds}

    def to_json_dict(self) -> dict[str, Any]:
        wins = self.wins()
        what = {name: methods()[name].description for name in self.radius}
        rows = [self.row(name, r, self.seconds[name]) | {"what": what[name], "largest_on": wins[name]} for name, r in self.radius.items()]
        attack = None
        if self.attacked is not None:
            attack = {key: value for key, value in self.row(self.attack, self.attacked, self.attack_seconds).items() if key != "fraction_of_attack"}
            attack["settings"] = dict(self.attack_settings)
            attack["not_finite"] = 0 if self.failed is None else int(self.failed.sum())
        return {
            "kind": "comparison of methods", "certificate": False, "partial": bool(self.stopped), "stopped": self.stopped or None,
            "interrupted": self.stopped == INTERRUPTED,
            "note": "not a certificate file: robustlip verify does not accept it; certify with one method, or best, to write one",
            "threat": self.threat.name, "units": self.threat.units, "clip": box_of(self.threat),
            "requested_radius": self.threat.radius, "dtype": self.dtype,
            "weights_sha256": self.weights_sha256, "samples": len(self.label), "correct": int(self.correct.sum()),
            "clean_accuracy": float(np.mean(self.correct)), "methods": rows,
            "best_of_these": self.row("best of these", self.best, sum(self.seconds.values())),
            "attack": attack, "left_out": self.left_out,
        }  # fmt: skip


def compare(
    chain: Chain, batches: Batches, threat: Threat, *, dtype: str | None = None, slow: bool = False, attack: Attack | None = None, seed: int = 0,
    kept: Callable[[Comparison], None] | None = None,
) -> Comparison:  # fmt: skip
    """Run every method that applies, then the attack once.

    batches: label → the same (x, y, index) each time, on the model's device. slow: also run SLOW methods. attack: one that needs no radius.
    kept: called with the finished part, if there is one, before an exception or Ctrl-C is passed on. If that happens during the first method,
    the samples are those that it finished; a later method that did not finish is left out.
    Raises BadInput or UnsupportedLayer if no method applies, CertificateViolation if the attack succeeds inside the radius of any method.
    """
    running = _Running(threat)
    try:
        return _run(running, chain, batches, dtype, slow, attack, seed)
    except BaseException as error:
        done = running.comparison(INTERRUPTED if isinstance(error, KeyboardInterrupt) else f"stopped by an error: {first_line(error)}")
        if kept is not None and done is not None:
            kept(done)
        raise


@dataclass
class _Running:
    """The finished part. now: the name of the running method or attack. parts: the certificates or observations that it has finished."""

    threat: Threat
    radius: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    certificates: list[Certificate] = field(default_factory=list)
    now: str = ""
    parts: list[Any] = field(default_factory=list)
    started: float = 0.0
    attacked: dict[str, Any] = field(default_factory=dict)

    def start(self, name: str) -> None:
        self.now, self.parts, self.started = name, [], time.perf_counter()

    def finish(self) -> None:
        """Called when the running method has certified all samples."""
        self.seconds[self.now] = time.perf_counter() - self.started
        self.radius[self.now] = np.concatenate([c.radius for c in self.parts])
        self.certificates = self.certificates or self.parts
        self.now = ""

    def comparison(self, stopped: str = "") -> Comparison | None:
        """The finished part; None if no sample is finished."""
        if stopped and self.now:
            if not self.certificates and self.parts:
                self.finish()
            else:
                count, every = sum(len(part) for part in self.parts), sum(len(c) for c in self.certificates)
                self.left_out[self.now] = f"{stopped} after {count} of {every} samples"
        if not self.certificates:
            return None
        first = self.certificates[0]
        label, prediction = (np.concatenate([getattr(c, column) for c in self.certificates]) for column in ("label", "prediction"))
        return Comparison(
            self.threat, first.dtype, first.weights_sha256, label, prediction, self.radius, self.seconds, self.left_out, stopped=stopped,
            **self.attacked,
        )  # fmt: skip


def _run(
    running: _Running, chain: Chain, batches: Batches, dtype: str | None, slow: bool, attack: Attack | None, seed: int
) -> Comparison:
    free = replace(running.threat, radius=None)
    for name, method in methods().items():
        if reason := method.why_not(chain, free):
            running.left_out[name] = reason
        elif name in SLOW and not slow:
            running.left_out[name] = "takes minutes; run it with --slow"
        else:
            running.start(name)
            try:
                for x, y, index in batches(name):
                    running.parts.append(certify(chain, x, y, free, name, dtype=dtype, index=index))
            except (BadInput, UnsupportedLayer) as error:
                if not running.certificates:
                    raise  # the first method applies to every model and threat, so its refusal is an error of the input
                running.left_out[name], running.now = str(error), ""
                continue
            running.finish()
    if attack is not None:
        # The attack runs in the covered arithmetic; float64 replaces exact arithmetic.
        attacked = chain if dtype is None else cast(chain, evaluated_in(dtype))
        generator = torch.Generator().manual_seed(seed)
        running.start(f"attack {attack.name}")
        try:
            for x, y, index in batches(attack.name):
                running.parts.append(attack(attacked, x, y, free, generator=generator, index=index))
            running.attacked = {
                "attack": attack.name, "attacked": np.concatenate([o.radius for o in running.parts]),
                "attack_seconds": time.perf_counter() - running.started,
                "failed": np.concatenate([o.failed for o in running.parts]), "attack_settings": attack.settings,
            }  # fmt: skip
            running.now = ""
        finally:
            # What an interrupted attack has refuted counts.
            if dtype != "real" and running.parts:
                _check(running.radius, np.concatenate([o.radius for o in running.parts]))
    done = running.comparison()
    assert done is not None
    return done


def _check(radius: Mapping[str, np.ndarray], nearest: np.ndarray) -> None:
    """Raises CertificateViolation if the attack succeeds at a smaller distance than the radius of any method on any sample."""
    for name, proved in radius.items():
        wrong = (~(proved[: len(nearest)] <= nearest)).nonzero()[0]
        if len(wrong):
            i = int(wrong[0])
            raise CertificateViolation(
                f"expected every certificate to hold, got method {name!r} with radius {proved[i]!r} at sample {i} where the attack succeeded at "
                f"{nearest[i]!r}, {len(wrong)} such samples; this is a soundness bug: please report it"
            )
