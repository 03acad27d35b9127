"""Verifies that a certificate file belongs to a model and to certain rows, and that its radii can be recomputed.

    verification = verify(file, model, load_rows(file.data, data_dir, model.vocabulary))
    verification.exit_code          # 0 verified; 1 stale or not reproduced; 3 claims more than can be proved

The comparison, in this order: weights (their SHA-256 in the covered dtype), architecture, version of the rules, rows (index, SHA-256,
label). If one differs, the certificate is *stale*: it belongs to another model or other data, and nothing is recomputed. Then the radii: the same
method in the same dtype on the same rows; every claimed radius has to be at most the radius proved here. A smaller claim is accepted.

Tolerance. The recomputed radius r is proved for every machine: its rounding allowance covers every order of summation. A claim above r is
therefore true only if the other machine computed larger margins, within rounding. Logits from two BLAS
libraries, devices or batch sizes differ by about 10⁻⁷ to 10⁻⁶ of their size in float32, and a radius is a margin divided by a constant, so
radii from margins of at least a thousandth of the logits agree to 10⁻³ (measured: to 3·10⁻⁶ between batch sizes 1, 7 and 256 on the zoo's
digits models in float32; a smaller margin may not be reproduced elsewhere, although its certificate is true). There are four cases for a claim c:

- c ≤ r·(1 + 10⁻⁹): reproduced (10⁻⁹: float64 arithmetic of the formula itself).
- c ≤ r·(1 + 10⁻³): reproduced within rounding; reported, but a gate uses min(c, r).
- c ≤ r + 0.05·(r₀ − r), where r₀ is the radius in real arithmetic: the same if c ≤ 1.05·r; otherwise not verified. r₀ − r is the loss by the
  worst case of rounding; processors with the same torch build choose other kernels, and their logits differ by a small part of that
  worst case. So such a claim may be true. If nothing is proved here (r = 0), no claim is verified.
- above: not reproduced. It is reported as *unsound*, except if torch or the type of device differs from the one that wrote the file and c is at
  most the radius in real arithmetic, which no valid allowance lets a claim exceed. Then rounding of the other build can explain the claim (margins
  close to the allowance, and the 8 or 11 bits of bfloat16 and float16). It counts as not verified; certifying here decides it.

Margins in bfloat16 and float16 can change by more than 10⁻³ with the batch size, and radii of searches by several percent. So rows are certified in
batches of the size in the file, unless the caller gives another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import robustlip.certifiers as certifiers
from robustlip import plugins
from robustlip.certificate_file import CertificateFile, DataSource, row_hashes
from robustlip.certificates import Certificate, concatenate
from robustlip.certifiers import chains
from robustlip.certifiers.methods import SLOW, check_method
from robustlip.data import Dataset, load_data
from robustlip.data.lengths import counted
from robustlip.data.load import FILES, chosen, is_text, parse_spec
from robustlip.data.subwords import Subwords
from robustlip.errors import BadInput
from robustlip.limits import VERIFIED_AT_ONCE, VERIFIED_ROWS, VERIFIED_SECONDS, number
from robustlip.numerics.rounding import NAMES, evaluated_in
from robustlip.threats import Threat

BATCH = 256
ARITHMETIC = 1e-9
ROUNDING = 1e-3
# Methods that search for multipliers, and the largest relative difference between two searches (3 % was observed), rounded up.
SEARCHED, SEARCH_SPREAD = ("sdp", "lipsdp", "complete"), 0.05
SHARE = 0.05

Advance = Callable[[int, int], None]
# The methods that are recomputed by default: all that take seconds.
FAST_METHODS = ("best", *(name for name in certifiers.METHODS if name not in SLOW))


@dataclass(frozen=True)
class Budget:
    """Limits of the cost of a recomputation; they are set by the caller, never by the certificate file.

    methods: allowed methods. max_samples: rows of one file. max_seconds: for one file, estimated from its first batches.
    batch_size: samples per batch; None: as in the file, at most VERIFIED_AT_ONCE.
    """

    methods: tuple[str, ...] = FAST_METHODS
    max_samples: int = VERIFIED_ROWS
    max_seconds: float = VERIFIED_SECONDS
    batch_size: int | None = None

    def refusal(self, file: CertificateFile) -> str:
        """Why the file exceeds the limits, in one sentence, or ''. Raises BadInput for an unknown method."""
        check_method(file.method)
        if file.method not in self.methods:
            allowed = ", ".join(self.methods)
            return f"expected a certificate by a method that is allowed here ({allowed}), got {file.method!r}; allow it, or certify by another"
        rows = max(len(file.samples), file.data.requested, file.data.limit or 0)
        if rows > self.max_samples:
            return f"expected a certificate of at most {self.max_samples} samples, got one that asks for {number(rows)}; allow more with max_samples"
        if self.batch_size is None and (file.batch_size or 1) > VERIFIED_AT_ONCE:
            return f"expected at most {VERIFIED_AT_ONCE} samples at once, got {number(file.batch_size)} in the certificate; give a batch_size"
        return ""


class BudgetExceeded(BadInput):
    """A recomputation would take longer than its budget."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during certification. proof: the certificate of the first `done` of `total` rows; None if done is 0."""

    def __init__(self, parts: Sequence[Certificate], total: int) -> None:
        self.proof = concatenate(parts) if parts else None
        self.done, self.total = 0 if self.proof is None else len(self.proof), total
        super().__init__(f"interrupted after {self.done} of {total} samples")


def _timed(seconds: float, advance: Advance | None) -> Advance:
    """Wraps `advance`: raises BudgetExceeded as soon as the estimated total time exceeds the limit."""
    started = time.monotonic()

    def call(done: int, total: int) -> None:
        if advance is not None:
            advance(done, total)
        spent = time.monotonic() - started
        if done and spent > 1 and (estimate := spent / done * total) > seconds:
            message = f"got {done} of {total} samples in {spent:.0f}, about {estimate:.0f} in all"
            raise BudgetExceeded(f"expected a recomputation of at most {seconds:g} seconds, {message}; allow more with max_seconds")

    return call


@dataclass(frozen=True)
class Finding:
    """One difference, or why nothing was compared.

    kind: work, interrupted, weights, architecture, dtype, rules, data, row, label, prediction, radius, bound, partial.
    sample: its index, or None."""

    kind: str
    sentence: str
    sample: int | None = None
    unsound: bool = False


@dataclass(frozen=True, eq=False)
class Verification:
    """findings: empty exactly if the file is verified. notes: further information.

    radius, prediction: recomputed, in the order of the file's samples (N,); None if not everything was recomputed.
    interrupted: by Ctrl-C; the findings then say how many samples were recomputed, and what differs among them.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    radius: np.ndarray | None = field(default=None)
    prediction: np.ndarray | None = field(default=None)
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        return 3 if any(f.unsound for f in self.findings) else 130 if self.interrupted else 1 if self.findings else 0

    @property
    def verdict(self) -> str:
        return {0: "verified", 1: "not verified", 3: "unsound", 130: "not verified, interrupted"}[self.exit_code]

    def sentence(self) -> str:
        """All findings in one sentence; a long list is cut."""
        worst = sorted(self.findings, key=lambda f: not f.unsound)
        more = f"; and {len(worst) - 3} more" if len(worst) > 3 else ""
        return "; ".join(f.sentence for f in worst[:3]) + more

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "interrupted": self.interrupted,
            "findings": [{"kind": f.kind, "sample": f.sample, "unsound": f.unsound, "sentence": f.sentence} for f in self.findings],
            "notes": list(self.notes),
        }


def load_rows(
    source: DataSource, data_dir: str | Path | None = None, vocabulary: str | Subwords | None = None, *, spec: str | None = None
) -> Dataset:  # fmt: skip
    """Load the rows that a certificate names.

    A file is searched by its name in data_dir, then in the current folder. spec: another place of the data; the rows are checked by hash.
    vocabulary: of the model. Raises BadInput, DataUnavailable as `load_data` does.
    """
    where = spec or source.spec
    name, _, split = where.partition(":")
    if spec is None and data_dir is not None and name.endswith((".txt", *FILES)) and (Path(data_dir) / name).is_file():
        where = str(Path(data_dir) / name) + (f":{split}" if split else "")
    # Only texts need the vocabulary.
    words = vocabulary if is_text(parse_spec(where)[0], source.text_column) else None
    options: Any = chosen(source)
    return load_data(where, data_dir=data_dir, limit=source.limit, seed=source.seed, context=source.context, vocabulary=words, **options)


def is_training(data: Dataset) -> bool:
    """Whether the rows belong to a training split."""
    return data.split.startswith("train")


def cast(model: nn.Module, dtype: str) -> nn.Module:
    """The model in the dtype that a certificate covers: the model itself, or a copy in that dtype ('real': float64)."""
    return chains.cast(model, evaluated_in(dtype))


def prove(
    model: nn.Module, data: Dataset, rows: Sequence[int], threat: Threat, method: str, dtype: str, batch_size: int, advance: Advance | None = None
) -> Certificate:
    """The certificate of `rows` of the data, `batch_size` rows at a time, as `robustlip certify` makes it. model: already cast to dtype.

    Ctrl-C raises Interrupted, with the finished part.
    """
    parts: list[Certificate] = []
    chosen = torch.as_tensor(rows, dtype=torch.int64)
    try:
        for start in range(0, len(rows), batch_size):
            if advance is not None:
                advance(start, len(rows))
            part = chosen[start : start + batch_size]
            parts.append(certifiers.certify(model, data.x[part], data.y[part], threat, method, dtype=dtype, index=data.index[part]))
    except KeyboardInterrupt:
        raise Interrupted(parts, len(rows)) from None
    return concatenate(parts)


@torch.no_grad()
def verify(
    file: CertificateFile, model: nn.Module, data: Dataset, *, budget: Budget = Budget(), batch_size: int | None = None,
    advance: Advance | None = None,
) -> Verification:  # fmt: skip
    """Compare a certificate file with a model and with its rows, and recompute its radii. The top of this file defines the comparison.

    data: from `load_rows`. budget: limits of the cost; a file that exceeds them is not verified (finding 'work') and not recomputed.
    batch_size: samples per batch; None: as in the budget or the file, or 256. advance: called with (samples done, samples).
    After Ctrl-C the Verification is `interrupted` and not verified.
    Raises BadInput if the model cannot be certified by that method.
    """
    if refusal := replace(budget, batch_size=batch_size or budget.batch_size).refusal(file):
        return Verification((Finding("work", refusal),))
    chain = cast(model, file.dtype)
    notes = _notes(file, data)
    named = torch.as_tensor([at for at, i in enumerate(data.index.tolist()) if i in {sample.index for sample in file.samples}], dtype=torch.int64)
    stale = [*_model_differs(file, model, chain, data.x[named] if len(named) else data.x), *_rows_differ(file, data)]
    if file.partial:
        sentence = f"expected all {file.data.requested} samples that were requested, got {len(file.samples)}: the file is partial; certify all"
        stale.append(Finding("partial", sentence))
    if any(finding.kind != "partial" for finding in stale):
        return Verification(tuple(stale), notes)
    position = {i: at for at, i in enumerate(data.index.tolist())}
    rows = [position[sample.index] for sample in file.samples]
    at_once = batch_size or budget.batch_size or file.batch_size or BATCH
    try:
        proof = prove(chain, data, rows, file.ball(), file.method, file.dtype, at_once, _timed(budget.max_seconds, advance))
    except BudgetExceeded as error:
        return Verification((*stale, Finding("work", str(error))), notes)
    except Interrupted as stopped:
        message = f"expected a recomputation of all {stopped.total} samples, got {stopped.done}: it was interrupted"
        differ = _until(file, stopped, chain, data, rows)
        return Verification((*stale, *differ, Finding("interrupted", f"{message}; verify again")), notes, interrupted=True)
    radius, prediction = proof.radius, proof.prediction
    try:
        differ, close = _compare(file, radius, prediction, chain, data, rows)
    except KeyboardInterrupt:
        message = "expected a comparison of all claims with the recomputed radii, got an interruption"
        return Verification((*stale, Finding("interrupted", f"{message}; verify again")), notes, interrupted=True)
    differ += _bounds_differ(file, proof)
    if close:
        largest = max(excess for _, excess in close)
        notes += (f"{len(close)} of {len(rows)} radii are reproduced within rounding only: claims exceed them by up to a relative {largest:.1e}",)
    return Verification((*stale, *differ), notes, radius, prediction)


def _until(file: CertificateFile, stopped: Interrupted, chain: nn.Module, data: Dataset, rows: list[int]) -> list[Finding]:
    """Differences among the samples that were recomputed before an interruption."""
    if stopped.proof is None:
        return []
    part = file.model_copy(update={"samples": file.samples[: stopped.done]})
    try:
        return _compare(part, stopped.proof.radius, stopped.proof.prediction, chain, data, rows[: stopped.done])[0]
    except KeyboardInterrupt:  # a second Ctrl-C: the file is not verified in any case
        return []


def _model_differs(file: CertificateFile, model: nn.Module, chain: nn.Module, x: torch.Tensor) -> list[Finding]:
    found = []
    got, architecture = chains.identity_of(chain, x)
    if got != file.weights_sha256:
        other = next((name for name in NAMES if chains.identity_of(cast(model, name), x)[0] == file.weights_sha256), None)
        if other is None:
            sentence = f"expected weights with SHA-256 {file.weights_sha256[:12]}…, got {got[:12]}…: these are other weights; certify this model"
            found.append(Finding("weights", sentence))
        else:
            sentence = f"expected the dtype {other} of the certified weights, got {file.dtype}: the dtype was changed; certify in {file.dtype}"
            found.append(Finding("dtype", sentence))
    if architecture != file.architecture_sha256:
        hint = "" if _same_torch(file) else f" (torch {file.versions['torch']} wrote it and may print layers differently)"
        found.append(Finding("architecture", f"expected the architecture that was certified, got another{hint}; certify this model"))
    rules = certifiers.RULES_VERSION
    if file.versions["rules"] != rules:
        sentence = f"expected version {rules} of the rules, got a certificate of version {file.versions['rules']}; certify again with these rules"
        found.append(Finding("rules", sentence))
    return found


def _rows_differ(file: CertificateFile, data: Dataset) -> list[Finding]:
    found = []
    if len(data) != file.data.requested:
        sentence = (
            f"expected the {file.data.requested} rows of {file.data.spec}, got {len(data)}: the data source differs; use the one that was certified"
        )
        found.append(Finding("data", sentence))
    position = {i: at for at, i in enumerate(data.index.tolist())}
    present = [sample for sample in file.samples if sample.index in position]
    at = [position[sample.index] for sample in present]
    hashes = row_hashes(data.x[at], data.y[at]) if at else []
    labels = counted(data.y[at]).tolist() if at else []
    for sample in file.samples:
        if sample.index not in position:
            sentence = f"expected row {sample.index} among the rows of {file.data.spec}, got none; use the data, limit and seed that were certified"
            found.append(Finding("data", sentence, sample.index))
    for sample, sha, label in zip(present, hashes, labels, strict=True):
        if sha != sample.row_sha256:
            sentence = f"expected row {sample.index} with SHA-256 {sample.row_sha256[:12]}…, got {sha[:12]}…: that row was changed; certify this data"
            found.append(Finding("row", sentence, sample.index))
        elif label != sample.label:
            sentence = f"expected the label {label} of row {sample.index}, got {sample.label} in the file: it was altered; certify again"
            found.append(Finding("label", sentence, sample.index))
    return found


def _compare(
    file: CertificateFile, radius: np.ndarray, prediction: np.ndarray, chain: nn.Module, data: Dataset, rows: list[int]
) -> tuple[list[Finding], list[tuple[int, float]]]:
    """(differences, (index, relative excess) of claims that are reproduced within rounding)."""
    claims = np.array([sample.radius for sample in file.samples])
    # `not <=`, so that a NaN counts as not reproduced.
    beyond = ~(claims <= radius * (1 + ROUNDING))
    excusable = np.zeros(len(claims), dtype=bool)
    if beyond.any() and file.dtype not in ("real", "float64"):
        failing = [row for row, failed in zip(rows, beyond, strict=True) if failed]
        ideal = prove(cast(chain, "real"), data, failing, file.ball(), file.method, "real", BATCH).radius
        if not (_same_torch(file) and _device(chain) == file.device):
            excusable[beyond] = claims[beyond] <= ideal * (1 + ARITHMETIC)
        share = claims[beyond] <= radius[beyond] + SHARE * np.maximum(ideal - radius[beyond], 0.0)
        excusable[beyond] |= share
        beyond[beyond] = ~(share & (claims[beyond] <= radius[beyond] * (1 + SHARE)))
    # A search for multipliers ends at another point on another processor or in other batches: such a claim is not confirmed, but it may be true.
    # The file may name any method for a sample, so this counts only if the method of the whole file includes searches.
    searched = np.array([file.method in (*SEARCHED, "best") and sample.method in SEARCHED for sample in file.samples])
    elsewhere = beyond & searched & (claims <= radius * (1 + SEARCH_SPREAD))
    found, close = [], []
    columns = (radius.tolist(), prediction.tolist(), beyond.tolist(), (excusable | elsewhere).tolist(), elsewhere.tolist())
    for sample, r, p, failed, excused, by_search in zip(file.samples, *columns, strict=True):
        if failed:
            sentence = f"expected a radius of at most {r!r} for sample {sample.index} (recomputed), got the claim {sample.radius!r}"
            why = "it is not proved; do not rely on this file"
            if by_search:
                why = f"the search of method {sample.method!r} ended at another point here; certify again, or with a method that does not search"
            elif excused:
                why = f"rounding on the machine that made it (torch {file.versions['torch']}, {file.device}) can explain it; certify on this machine"
            found.append(Finding("radius", f"{sentence}; {why}", sample.index, unsound=not excused))
        elif p != sample.prediction:
            sentence = f"expected the prediction {p} for sample {sample.index} (recomputed), got {sample.prediction} in the file; certify again"
            found.append(Finding("prediction", sentence, sample.index))
        elif sample.radius > r * (1 + ARITHMETIC):
            close.append((sample.index, sample.radius / r - 1))
    return found, close


def _bounds_differ(file: CertificateFile, proof: Certificate) -> list[Finding]:
    """Lipschitz constants in the file that are not recomputed here, or are recomputed as larger."""
    found = []
    for name, stated in file.bound.items():
        got = proof.bound.get(name)
        close = 1 - (ROUNDING if name.startswith("model_") else SEARCH_SPREAD)
        fits = stated == got if isinstance(got, str) else isinstance(stated, float | int) and got is not None and stated >= got * close
        if not fits:
            sentence = f"expected the bound {name} to be {'absent' if got is None else got} (recomputed), got {stated}; do not rely on it"
            found.append(Finding("bound", sentence))
    return found


def _notes(file: CertificateFile, data: Dataset) -> tuple[str, ...]:
    from robustlip import __version__

    notes = []
    if is_training(data):
        notes.append("the rows are training data; results on other data may be worse")
    if data.note != file.data.note:
        notes.append(f"the note of the data is {data.note!r} now and was {file.data.note!r}; rows are compared by hash")
    for name, now in (("robustlip", __version__), ("torch", torch.__version__)):
        if file.versions[name] != str(now):
            notes.append(f"certified with {name} {file.versions[name]}, recomputed with {now}")
    added = plugins.versions()
    for name in sorted((added.keys() | file.versions.keys()) - {"robustlip", "torch", "rules"}):
        then, now = file.versions.get(name, "absent"), added.get(name, "absent")
        if then != now:
            notes.append(f"certified with the package {name} {then}, recomputed with it {now}")
    return tuple(notes)


def _same_torch(file: CertificateFile) -> bool:
    return file.versions["torch"] == str(torch.__version__)


def _device(chain: nn.Module) -> str:
    return next(chain.parameters()).device.type
