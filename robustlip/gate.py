"""The gate: decides by a policy file whether a model may be deployed.

    policy = load_policy("policy.toml")
    report = gate(policy, model, policy_rows(policy, data_dir, model.vocabulary))
    report.exit_code                # 0 pass, 1 fail (or no usable certificate), 3 unsound

Only the policy decides. Every accuracy is a count over all rows of the policy's data, divided by their number, and the requirement is met
if it is ≥ the required accuracy. A sample counts as certified at a radius if it is classified correctly and a radius of at least that
size is proved. The Wilson bound in the report says what such a count implies for data of the same kind; it does not affect the decision.

Without certificate files the gate certifies. With them it first verifies each one (`robustlip.verification`) and uses the smaller of the
claimed and the recomputed radius. One partial, stale or unverifiable file fails the gate, even if other files are good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import nn

from robustlip.certificate_file import CertificateFile, Line, Strict, explain
from robustlip.certificates import Certificate
from robustlip.certifiers.chains import chain_of
from robustlip.certifiers.methods import check_method
from robustlip.checks import check_fit
from robustlip.data import Dataset, load_data
from robustlip.data.lengths import NO_LABEL, by_length, counted, in_order, labels_of
from robustlip.data.load import chosen, is_text, parse_spec
from robustlip.data.subwords import Subwords
from robustlip.errors import BadInput, RobustlipError, UnsupportedLayer
from robustlip.execution import covered_kernels
from robustlip.files import read_toml
from robustlip.geometry import length
from robustlip.limits import ROWS, VERIFIED_ROWS, VERIFIED_SECONDS
from robustlip.modes import in_eval_mode, random_state_kept
from robustlip.target import Target
from robustlip.threats import InputBall, Threat, parse_threat
from robustlip.verification import BATCH, FAST_METHODS, Advance, Budget, Interrupted, Verification, cast, is_training, prove, verify

CERTIFIED, ATTACKED = "certified", "attacked"
NOT_MEASURED = "interrupted"

Share = Annotated[float, Field(ge=0, le=1)]


class ThreatRequirement(Strict):
    """At least min_certified_accuracy of all rows have to be certified at `radius`, in the units of the threat.

    name: see `robustlip.threats.parse_threat`. clip: [low, high], the valid range of inputs. method: None accepts any method (the gate uses best).
    """

    name: Line
    radius: Annotated[float, Field(gt=0)]
    min_certified_accuracy: Share
    method: Line | None = None
    clip: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _known(self) -> ThreatRequirement:
        self.ball()
        return self

    def ball(self) -> Threat:
        return parse_threat(self.name, self.radius, None if self.clip is None else (self.clip[0], self.clip[1]))


class Policy(Strict):
    """What a model has to achieve, on which rows and in which arithmetic.

    data, limit, seed, context, subset and the columns: as in `robustlip.data.load_data`; paths are relative to the working directory of the gate.
    min_samples: with fewer rows the gate fails. min_clean_accuracy: share of rows that are classified correctly, in `dtype`.
    methods, max_samples, max_seconds, batch_size: limits for certificate files; more expensive files are refused before they are recomputed. methods:
    by default the fast methods and those that threats name. max_seconds: per file. batch_size: by default as in the file.
    require_attack: `attack` runs at every radius, and a success inside a certified radius is a soundness bug (exit code 3).
    """

    data: Line
    limit: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    context: Annotated[int, Field(ge=1)] | None = None
    subset: Line | None = None
    image_column: Line | None = None
    label_column: Line | None = None
    text_column: Line | None = None
    dtype: Literal["float64", "float32", "bfloat16", "float16", "real"]
    min_samples: Annotated[int, Field(ge=1)]
    min_clean_accuracy: Share
    require_attack: bool = False
    attack: Literal["min", "pgd"] = "min"
    methods: Annotated[list[Line], Field(min_length=1, max_length=50)] | None = None
    max_samples: Annotated[int, Field(ge=1, le=ROWS)] = VERIFIED_ROWS
    max_seconds: Annotated[float, Field(gt=0, le=1e9)] = VERIFIED_SECONDS
    batch_size: Annotated[int, Field(ge=1, le=ROWS)] | None = None
    threat: Annotated[list[ThreatRequirement], Field(min_length=1)]

    @model_validator(mode="after")
    def _attacked(self) -> Policy:
        if "attack" in self.model_fields_set and not self.require_attack:
            raise ValueError("expected require_attack = true beside attack, got an attack that would not run; add it, or leave attack out")
        return self

    @field_validator("methods")
    @classmethod
    def _methods(cls, methods: list[str] | None) -> list[str] | None:
        for name in methods or ():
            check_method(name)
        return methods

    def budget(self) -> Budget:
        """The limits for verifying one certificate file."""
        named = [threat.method for threat in self.threat if threat.method is not None]
        methods = tuple(dict.fromkeys((*FAST_METHODS, *named) if self.methods is None else self.methods))
        return Budget(methods, self.max_samples, self.max_seconds, self.batch_size)

    @field_validator("threat")
    @classmethod
    def _once(cls, threats: list[ThreatRequirement]) -> list[ThreatRequirement]:
        keys = [(t.name, t.radius, t.clip and tuple(t.clip)) for t in threats]
        if len(set(keys)) != len(keys):
            raise ValueError("expected each threat once at each radius, got one twice; keep the stricter one")
        return threats


@dataclass(frozen=True)
class Requirement:
    """One row of the table. got: None if nothing was measured. lower: Wilson bound (95 %, one-sided) of an accuracy, for information only."""

    what: str
    required: float
    got: float | None
    passed: bool
    lower: float | None = None
    remark: str = ""

    @property
    def slack(self) -> float:
        """How far the result is above (or, if negative, below) the requirement, relative to it; −∞ if nothing was measured."""
        if self.got is None:
            return -math.inf
        return (self.got - self.required) / self.required if self.required > 0 else self.got - self.required


@dataclass(frozen=True)
class GateReport:
    """requirements: in the order of the policy. refusals: certificate files that cannot be used, and why. violations: certified radii that an attack
    refuted. interrupted: by Ctrl-C; requirements that were not measured are not met.
    """

    requirements: tuple[Requirement, ...]
    refusals: tuple[str, ...] = ()
    violations: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    on_training_data: bool = False
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        if self.violations:
            return 3
        if self.interrupted:
            return 130
        passed = bool(self.requirements) and all(r.passed for r in self.requirements) and not self.refusals
        return 0 if passed else 1

    @property
    def verdict(self) -> str:
        return {0: "pass", 1: "fail", 3: "unsound", 130: "interrupted"}[self.exit_code] + (" on training data" if self.on_training_data else "")

    @property
    def worst(self) -> Requirement | None:
        """The requirement that is missed by the largest margin; if all are met, the accuracy with the smallest margin."""
        shares = [r for r in self.requirements if r.lower is not None or not r.passed]
        return min(shares, key=lambda r: (r.passed, r.slack), default=None)

    def sentence(self) -> str:
        """Why the gate does not pass, or which requirement is closest to failing."""
        if self.interrupted and not self.violations:
            left = sum(r.got is None for r in self.requirements)
            return f"interrupted: {left} of {len(self.requirements)} requirements were not measured, and so are not met; run the gate again"
        if self.violations or self.refusals:
            reasons = self.violations or self.refusals
            return reasons[0] + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")
        worst = self.worst
        if worst is None:
            return "no requirement was measured"
        got = "nothing" if worst.got is None else f"{worst.got:.6g}"
        remark = f" ({worst.remark})" if worst.remark else ""
        more = sum(not r.passed for r in self.requirements) - 1
        others = f"; {more} more {'is' if more == 1 else 'are'} not met" if more > 0 else ""
        return f"{'closest: ' if worst.passed else ''}{worst.what}: expected at least {worst.required:g}, got {got}{remark}{others}"

    def to_json_dict(self) -> dict[str, Any]:
        worst = self.worst
        return {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "interrupted": self.interrupted,
            "requirements": [asdict(r) for r in self.requirements],
            "worst": None if worst is None else worst.what,
            "refusals": list(self.refusals),
            "violations": list(self.violations),
            "notes": list(self.notes),
        }


def load_policy(path: str | Path) -> Policy:
    """The policy in a TOML file. Raises BadInput for anything else."""
    path = Path(path)
    raw = read_toml(path, "a policy")
    try:
        return Policy.model_validate(raw)
    except ValidationError as error:
        raise BadInput(explain(error, path.name, "correct the policy")) from None


def policy_rows(policy: Policy, data_dir: str | Path | None = None, vocabulary: str | Subwords | None = None) -> Dataset:
    """The rows of the policy. vocabulary: of the model. Raises BadInput and DataUnavailable as `load_data` does."""
    words = vocabulary if is_text(parse_spec(policy.data)[0], policy.text_column) else None
    options: Any = chosen(policy)
    return load_data(policy.data, data_dir=data_dir, limit=policy.limit, seed=policy.seed, context=policy.context, vocabulary=words, **options)


def gate(
    policy: Policy,
    model: nn.Module,
    data: Dataset,
    certificates: Sequence[tuple[str, CertificateFile]] | None = None,
    *,
    attack: Any = None,
    batch_size: int | None = None,
    advance: Advance | None = None,
) -> GateReport:
    """Check a model against a policy.

    data: from `policy_rows`. certificates: (name, file) pairs to verify and use; None: certify here; an empty list means no certificates.
    batch_size: samples per batch; None: as in each certificate, or 256.
    attack: an Attack (see robustlip.attacks); required exactly if the policy requires one.
    If the model cannot be certified as the policy requires, no sample counts as certified; the remark gives the reason.
    After Ctrl-C the report is `interrupted` and contains the finished measurements. Raises BadInput for data that the model does not accept.
    """
    if policy.require_attack and attack is None:
        raise BadInput(f"expected the attack {policy.attack!r} that the policy requires, got none; pass attack=")
    chain, refusal = _in_policy_dtype(model, policy.dtype, data.x)
    found = _Found()
    try:
        usable = _verified(found, policy, model, data, certificates or (), refusal, batch_size, advance)
        for at, wanted in enumerate(policy.threat):
            _measure(found, at, wanted, policy, chain, data, None if certificates is None else usable, attack, batch_size, advance)
    except KeyboardInterrupt:
        found.interrupted = True
    lines = list(found.lines.values())
    if found.interrupted:
        named = None if attack is None or not policy.require_attack else attack.name
        planned = [line for at, wanted in enumerate(policy.threat) for line in _planned(at, wanted, named)]
        lines = [found.lines.get(key) or Requirement(what, required, None, False, remark=NOT_MEASURED) for key, what, required in planned]
    if found.prediction is None:
        remark = NOT_MEASURED if found.interrupted else "no usable certificate"
        clean = Requirement("clean accuracy", policy.min_clean_accuracy, None, False, remark=remark)
    else:
        clean = _share("clean accuracy", policy.min_clean_accuracy, found.prediction == counted(data.y).numpy())
    count = Requirement("samples", policy.min_samples, len(data), len(data) >= policy.min_samples)
    notes = list(found.notes)
    if is_training(data):
        notes.append("the policy's rows are training data; results on other data may be worse")
    if data.note:
        notes.append(f"data: {data.note}")
    return GateReport(
        (count, clean, *lines), tuple(found.refusals), tuple(found.violations), tuple(notes), is_training(data), interrupted=found.interrupted
    )


@dataclass
class _Found:
    """Measurements so far. lines: by (number of the threat, kind of its row). prediction: (N,), in the order of the data."""

    lines: dict[tuple[int, str], Requirement] = field(default_factory=dict)
    prediction: np.ndarray | None = None
    refusals: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False


def _planned(at: int, wanted: ThreatRequirement, attack: str | None) -> list[tuple[tuple[int, str], str, float]]:
    """(key, name, required) for each row of the table that a threat has."""
    lines = [((at, CERTIFIED), f"certified accuracy against {wanted.name} at {wanted.radius:g}", wanted.min_certified_accuracy)]
    if attack is not None:
        lines.append(((at, ATTACKED), f"share that withstands {attack} inside its proved radius, {wanted.name}", 1.0))
    return lines


def _verified(
    found: _Found, policy: Policy, model: nn.Module, data: Dataset, certificates: Sequence[tuple[str, CertificateFile]], refusal: str,
    batch_size: int | None, advance: Advance | None,
) -> list[tuple[CertificateFile, Verification]]:  # fmt: skip
    """The verified files that can be used."""
    usable: list[tuple[CertificateFile, Verification]] = []
    for name, file in certificates:
        if refusal:
            found.refusals.append(f"{name}: {refusal}")
            continue
        try:
            checked = _usable(name, file, policy, model, data, batch_size, advance)
        except UnsupportedLayer as error:
            found.refusals.append(f"{name}: {error}")
            continue
        found.notes += [f"{name}: {note}" for note in checked.notes]
        if checked.exit_code == 0:
            usable.append((file, checked))
            # Every verified file has the same rows, model and dtype, hence the same predictions.
            found.prediction = _in_order(file, checked.prediction, data)
        else:
            (found.violations if checked.exit_code == 3 else found.refusals).append(f"{name}: {checked.sentence()}")
        if checked.interrupted:
            raise KeyboardInterrupt
    return usable


def _measure(
    found: _Found, at: int, wanted: ThreatRequirement, policy: Policy, chain: nn.Module, data: Dataset,
    usable: list[tuple[CertificateFile, Verification]] | None, attack: Any, batch_size: int | None, advance: Advance | None,
) -> None:  # fmt: skip
    """Measures the rows of one threat. usable: verified files; None: certify here."""
    ball, remark = wanted.ball(), ""
    (key, what, required), *after = _planned(at, wanted, None if attack is None or not policy.require_attack else attack.name)
    if usable is None:
        at_once = batch_size or policy.batch_size or BATCH
        try:
            proof, remark = _proof(chain, data, list(range(len(data))), ball, wanted.method or "best", policy.dtype, at_once, advance)
        except Interrupted as stopped:
            found.lines[key] = Requirement(what, required, None, False, remark=_so_far(stopped, data, wanted.radius))
            raise
        if proof is None:
            radius = np.zeros(len(data))
            found.prediction = _predictions(chain, data, batch_size or BATCH) if found.prediction is None else found.prediction
        else:
            radius, found.prediction = proof.radius, proof.prediction
    else:
        matching = [pair for pair in usable if _covers(pair[0], wanted)]
        if not matching:
            found.lines[key] = Requirement(what, required, None, False, remark="no usable certificate of this threat")
            return
        file, checked = max(matching, key=lambda pair: float(np.mean(_counted(pair[0], pair[1], data) >= wanted.radius)))
        radius = _counted(file, checked, data)
    assert found.prediction is not None
    right = found.prediction == counted(data.y).numpy()
    found.lines[key] = replace(_share(what, required, right & (radius >= wanted.radius)), remark=remark)
    for key, what, required in after:
        broken = _broken(attack, chain, data, ball, radius, policy.seed)
        found.lines[key] = Requirement(what, required, 1 - len(broken) / len(data), not broken)
        found.violations += broken


def _so_far(stopped: Interrupted, data: Dataset, radius: float) -> str:
    """The part of an interrupted certification that is finished."""
    if stopped.proof is None:
        return f"{NOT_MEASURED} after 0 of {stopped.total} samples"
    right = stopped.proof.prediction == counted(data.y).numpy()[: stopped.done]
    certified = int(np.sum(right & (stopped.proof.radius >= radius)))
    return f"{NOT_MEASURED} after {stopped.done} of {stopped.total} samples, {certified} of them certified"


def _in_policy_dtype(model: nn.Module, dtype: str, x: torch.Tensor) -> tuple[nn.Module, str]:
    """The model in the dtype of the policy, and the reason why it cannot be certified under any threat ('' if it can)."""
    converted = cast(model, dtype)
    try:
        chain_of(converted, x)
    except UnsupportedLayer as error:
        return converted, str(error)
    return converted, ""


def _proof(
    chain: nn.Module, data: Dataset, rows: list[int], ball: Threat, method: str, dtype: str, batch_size: int, advance: Advance | None
) -> tuple[Certificate | None, str]:
    """The certificate of all rows, or None and the reason why the model cannot be certified with this method."""
    check_method(method)
    try:
        return prove(chain, data, rows, ball, method, dtype, batch_size, advance), ""
    except BadInput as error:
        return None, str(error)


@torch.no_grad()
def _predictions(model: nn.Module, data: Dataset, batch_size: int) -> np.ndarray:
    """The predictions (N,) of a model that is not certified. Raises BadInput if it does not accept the data."""
    target = Target(model)
    found = []
    with random_state_kept(), covered_kernels(target.kind), in_eval_mode(model):
        for start in range(0, len(data), batch_size):
            groups, labels = by_length(data.x[start : start + batch_size]), data.y[start : start + batch_size]
            parts = []
            for rows, x in groups:
                x = x.to(target.device(x), target.dtype(x) if x.is_floating_point() else x.dtype)
                target.check_inputs(x)
                check_fit(model, x)
                if labels.dim() == 2:
                    y = labels_of(labels, rows, x).to(x.device)
                    parts.append(((target.scores_by_token(x).argmax(-1) == y) & (y != NO_LABEL)).sum(1).cpu())
                    continue
                logits = target.compare_batches(x)
                if int(data.y.max()) >= logits.shape[1]:
                    raise BadInput(f"expected labels in [0, {logits.shape[1] - 1}], got {int(data.y.max())}; use the model's own classes")
                parts.append(logits.argmax(1).cpu())
            found.append(in_order(parts, groups).numpy())
    return np.concatenate(found)


def wilson_lower(count: int, total: int, z: float = 1.6449) -> float:
    """Lower end of the one-sided Wilson interval of a proportion (95 % for z = 1.6449). Wilson 1927."""
    from scipy.special import ndtr
    from scipy.stats import binomtest

    return float(binomtest(count, total, alternative="greater").proportion_ci(float(ndtr(z)), method="wilson").low)


def _share(what: str, required: float, hits: np.ndarray) -> Requirement:
    count, total = int(hits.sum()), len(hits)
    # One correctly rounded division, so that 342 / 360 equals the float64 0.95.
    got = count / total
    return Requirement(what, required, got, got >= required, wilson_lower(count, total))


def _usable(
    name: str, file: CertificateFile, policy: Policy, model: nn.Module, data: Dataset, batch_size: int | None, advance: Advance | None
) -> Verification:
    """The verification of a file on the policy's rows; a file for another arithmetic is not recomputed."""
    from robustlip.verification import Finding

    if file.dtype != policy.dtype:
        sentence = f"expected a certificate that covers {policy.dtype}, got one that covers {file.dtype}; certify with --dtype {policy.dtype}"
        return Verification((Finding("dtype", sentence),))
    try:
        return verify(file, model, data, budget=policy.budget(), batch_size=batch_size, advance=advance)
    except UnsupportedLayer:
        raise
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None


def _covers(file: CertificateFile, wanted: ThreatRequirement) -> bool:
    """Whether a certificate covers the requirement; a certificate of the whole ball covers the clipped one."""
    same = file.threat == wanted.name and file.clip in (None, wanted.clip)
    return same and wanted.method in (None, file.method)


def _counted(file: CertificateFile, checked: Verification, data: Dataset) -> np.ndarray:
    claimed = np.array([sample.radius for sample in file.samples])
    assert checked.radius is not None
    return _in_order(file, np.minimum(claimed, checked.radius), data)


def _in_order(file: CertificateFile, values: np.ndarray | None, data: Dataset) -> np.ndarray:
    """Reorders values from the order of the file's samples to the order of the data. A verified file contains every row of the data once."""
    assert values is not None
    at = {sample.index: i for i, sample in enumerate(file.samples)}
    return values[[at[i] for i in data.index.tolist()]]


def _broken(attack: Any, chain: nn.Module, data: Dataset, ball: Threat, radius: np.ndarray, seed: int) -> list[str]:
    """Messages for samples on which the attack succeeds inside the certified radius: none unless there is a soundness bug."""
    target, x = Target(chain), data.x
    where = target.device(x)
    moved = np.zeros(len(x))
    if x.is_floating_point() and x.dtype != target.dtype(x):
        seen = x.to(target.dtype(x))
        if isinstance(ball, InputBall):  # the attack starts from the cast point; radii are measured from the given one
            moved = length(seen.double() - x.double(), ball.norm).numpy()
        x = seen
    generator = torch.Generator().manual_seed(seed)
    observed = attack(chain, x.to(where), data.y.to(where), ball, generator=generator, index=data.index)
    # `not <=`, so that a NaN counts as a contradiction. Misclassified samples have radius 0 on both sides.
    wrong = np.flatnonzero(~(radius <= observed.radius + moved))
    unclear = np.flatnonzero(observed.failed & (radius > 0) & (observed.distance <= radius + moved))
    if len(unclear) and not len(wrong):
        first_one = int(unclear[0])
        raise RobustlipError(f"sample {int(data.index[first_one])} of {ball.name}, which a certificate covers: {observed.failure[first_one]}")
    return [
        f"expected no success inside the certified radius {radius[i]!r} of sample {int(data.index[i])} ({ball.name}), got {attack.name} at distance "
        f"{float(observed.radius[i])!r}; this is a soundness bug: report it and do not rely on these certificates"
        for i in wrong.tolist()
    ]
