"""Runs a suite into a folder, with one parquet part per model and threat, so that finished parts are kept and never computed twice."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robustlip import __version__
from robustlip.certificates import ABSTAINED, MISCLASSIFIED
from robustlip.errors import BadInput, CertificateViolation, RobustlipError
from robustlip.eval.results import Record, check_soundness, read_metadata, read_records, write_records
from robustlip.eval.suite import PairSpec, SearchSpec, Suite, ThreatSpec, parse_suite
from robustlip.files import atomic, write_json
from robustlip.locks import sole_writer
from robustlip.threats import Threat, WeightBall, units_and_box, with_radius
from robustlip.user_errors import errors_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from robustlip.attacks.base import Observation
    from robustlip.certificates import Certificate
    from robustlip.data import Dataset

PARTS, MANIFEST, POINTS = "parts", "manifest.json", "contradictions"


@dataclass
class Run:
    """A finished or interrupted run. errors: (model, exception) of the models that failed; partial: some rows are missing."""

    folder: Path
    suite: Suite
    records: list[Record] = field(default_factory=list)
    errors: list[tuple[str, Exception]] = field(default_factory=list)
    partial: bool = False
    interrupted: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)

    def raise_errors(self) -> None:
        """Raise the errors of the run, a contradiction first. Call it after everything has been written."""
        for _, error in sorted(self.errors, key=lambda e: not isinstance(e[1], CertificateViolation)):
            raise error


@dataclass(frozen=True)
class Settings:
    """Settings of a run. device: a torch device name; limit: maximum number of samples per part; seed: replaces the suite's."""

    device: str = "cpu"
    batch_size: int = 256
    limit: int | None = None
    seed: int | None = None
    data_dir: str | None = None


def versions() -> dict[str, str]:
    """Versions of robustlip and of the packages that affect its numbers."""
    from robustlip.certifiers import RULES_VERSION

    found = {"robustlip": __version__, "rules": RULES_VERSION, "python": platform.python_version()}
    for package in ("torch", "numpy", "torchattacks"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: str) -> dict[str, Any]:
    """The machine of the run, without host names and paths."""
    import os

    import torch

    described = {"system": f"{platform.system()} {platform.machine()}", "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "device": device}
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def run_suite(
    suite: Suite,
    folder: Path,
    settings: Settings = Settings(),
    *,
    advance: Callable[[str, int, int], None] = lambda label, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Run:
    """Evaluate every model of the suite under every threat of its pair, into `folder`.

    advance(label, done, total) counts samples × threats. Parts of an earlier run are reused if weights,
    the part's own settings and versions agree. If a model fails, the others still run; see `Run.raise_errors`.
    """
    folder = Path(folder)
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"expected a folder to write the run to, got {folder} ({error.strerror or error}); name another with --out") from error
    with sole_writer(folder, "run"):
        return _run_parts(suite, folder, settings, advance, say)


def _run_parts(
    suite: Suite, folder: Path, settings: Settings, advance: Callable[[str, int, int], None], say: Callable[[str], None]
) -> Run:  # fmt: skip
    run = Run(folder, suite)
    work = [
        (pair, role, model, threat, _limit(pair, threat, settings))
        for pair in suite.pairs
        for role, model in pair.members()
        for threat in pair.threats
    ]
    for _, _, model, threat, limit in work:
        _refuse_to_shorten(folder / PARTS / _part_name(model, threat.name), threat, limit)
    total, done, failed, started = sum(limit for *_, limit in work), 0, set(), time.time()
    cards = _cards(suite)
    prepared: tuple[str, tuple[nn.Module, str, Dataset]] | None = None
    try:
        for pair, role, model, threat, limit in work:
            # Written before every part, so that a killed run leaves a manifest with its state, marked partial.
            _write_manifest(run, settings, cards, started, finished=False)
            label = f"{model} · {threat.name}"
            advance(label, done, total)
            done += limit
            if model in failed:
                continue
            try:
                with errors_of(model):
                    if prepared is None or prepared[0] != model:
                        prepared = None  # only one model in memory at a time
                        prepared = (model, _prepare(pair, model, suite, settings))
                    path = folder / PARTS / _part_name(model, threat.name)
                    records = _part(suite, pair, role, model, threat, limit, path, settings, prepared[1], folder, say)
                run.records += records
                check_soundness(records, folder)
            except CertificateViolation as error:
                run.errors.append((model, error))
                say(f"{model} · {threat.name}: CONTRADICTION, see the end; continuing with the rest")
            except Exception as error:  # kept, and raised by Run.raise_errors after the other models
                repeated = (model, str(error)) in [(name, str(earlier)) for name, earlier in run.errors]
                run.errors += [] if repeated else [(model, error)]
                if repeated or prepared is None or not isinstance(error, BadInput):  # otherwise only this threat is refused
                    failed.add(model)
                say(f"{model}: {error if isinstance(error, RobustlipError) else repr(error)}; continuing with the other models")
        advance("done", total, total)
    except KeyboardInterrupt:
        run.interrupted = True
    _write_manifest(run, settings, cards, started, finished=not run.interrupted)
    return run


def _write_manifest(run: Run, settings: Settings, cards: dict[str, Any], started: float, *, finished: bool) -> None:
    suite = run.suite
    wanted = {_part_name(model, threat.name) for pair in suite.pairs for _, model in pair.members() for threat in pair.threats}
    have = {_part_name(record.model, record.threat) for record in run.records}
    run.partial = not finished or have != wanted or any(record.partial for record in run.records)
    run.manifest = {
        "suite": suite.to_json_dict(),
        "versions": versions(),
        "machine": machine(settings.device),
        "seed": _seed(suite, settings),
        "limit": settings.limit,
        "partial": run.partial,
        "parts": sorted(have),
        "missing": sorted(wanted - have),
        "errors": [{"model": model, "kind": type(error).__name__, "message": str(error)} for model, error in run.errors],
        "seconds": round(time.time() - started, 2),
        "cards": cards,
    }
    write_json(run.folder / MANIFEST, run.manifest)


def read_run(folder: Path) -> Run:
    """The run in a folder; callers check its records for contradictions with `check_soundness`.

    Raises BadInput if the folder contains no run.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8-sig"))
        suite, parts = parse_suite(manifest["suite"], MANIFEST), _checked(manifest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"expected the folder of a run (with {MANIFEST}), got {str(folder)!r}; make one with `robustlip eval SUITE.toml --out {folder}`"
        ) from error
    run = Run(folder, suite, partial=bool(manifest.get("partial")), manifest=manifest)
    for part in parts:
        run.records += read_records(folder / PARTS / part)
    if not run.records:
        raise BadInput(f"expected results in {str(folder)!r}, got none; run `robustlip eval` again")
    known = {(pair.name, threat.name, model) for pair in suite.pairs for threat in pair.threats for _, model in pair.members()}
    if odd := {(record.pair, record.threat, record.model) for record in run.records} - known:
        raise BadInput(f"expected results of the suite in {folder / MANIFEST}, got some of {' · '.join(min(odd))}; run `robustlip eval` again")
    return run


def _checked(manifest: dict[str, Any]) -> list[str]:
    """The parts that a manifest names. Raises TypeError if an entry has an unexpected type."""
    parts, cards, errors, missing = manifest["parts"], manifest.get("cards", {}), manifest.get("errors", []), manifest.get("missing", [])
    fits = [
        isinstance(parts, list) and all(isinstance(part, str) and Path(part).name == part for part in parts),
        isinstance(cards, dict) and all(isinstance(card, dict) for card in cards.values()),
        isinstance(missing, list),
        isinstance(errors, list)
        and all(isinstance(e, dict) and all(isinstance(e.get(key), str) for key in ("model", "kind", "message")) for e in errors),
    ]
    if not all(fits):
        raise TypeError("a key of another kind")
    return list(parts)


def _seed(suite: Suite, settings: Settings) -> int:
    return suite.seed if settings.seed is None else settings.seed


def _limit(pair: PairSpec, threat: ThreatSpec, settings: Settings) -> int:
    return min(pair.limit, threat.limit or pair.limit, settings.limit or pair.limit)


def _part_name(model: str, threat: str) -> str:
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{model}--{threat}")[-100:]
    # The hash distinguishes names whose readable part is equal: a/b.safetensors and a_b.safetensors.
    return f"{readable}.{hashlib.sha256(f'{model}|{threat}'.encode()).hexdigest()[:8]}.parquet"


def _cards(suite: Suite) -> dict[str, Any]:
    from robustlip.models import zoo

    cards = {}
    for pair in suite.pairs:
        for _, model in pair.members():
            if model in zoo.names():
                try:
                    cards[model] = zoo.card(model)
                except RobustlipError:  # the model itself was refused with the same message
                    continue
    return cards


def _content(data: Dataset) -> str:
    """SHA-256 of the samples, because a file may change under the same name."""
    digest = hashlib.sha256(np.asarray(data.index).tobytes())
    for part in (data.x, data.y):
        digest.update(str(tuple(part.shape)).encode() + np.ascontiguousarray(part.cpu().numpy()).tobytes())
    return digest.hexdigest()


def _prepare(pair: PairSpec, model: str, suite: Suite, settings: Settings) -> tuple[nn.Module, str, Dataset]:
    """The model on its device, the hash of its weights, and as many samples as its largest threat needs."""
    from robustlip.data import load_data, load_text_or_page
    from robustlip.data.load import chosen
    from robustlip.hashing import weights_sha256
    from robustlip.models import zoo

    chain = zoo.load(model, device=settings.device)
    limit = max(_limit(pair, threat, settings) for threat in pair.threats)
    seed = _seed(suite, settings)
    loader = load_text_or_page if pair.page_fallback else load_data
    words = getattr(chain, "vocabulary", None)
    options: Any = chosen(pair)
    data = loader(pair.data, data_dir=settings.data_dir, limit=limit, seed=seed, context=pair.context, vocabulary=words, **options)
    return chain, weights_sha256(chain), data


@contextmanager
def _threads(chain: nn.Module) -> Iterator[None]:
    """One thread for models with fewer than four million weights: their products are too small to parallelise, and waiting threads on a busy
    machine made the demo five times slower."""
    import torch

    before = torch.get_num_threads()
    if sum(p.numel() for p in chain.parameters()) < 4_000_000:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _part(
    suite: Suite, pair: PairSpec, role: str, model: str, threat: ThreatSpec, limit: int, path: Path,
    settings: Settings, prepared: tuple[nn.Module, str, Dataset], folder: Path, say: Callable[[str], None],
) -> list[Record]:  # fmt: skip
    chain, weights, data = prepared
    seed = _seed(suite, settings)
    key = {
        "suite": suite.name,
        "pair": pair.model_dump(mode="json", exclude={"threats", "title", "lipschitz", "baseline"}),
        "threat": threat.model_dump(mode="json"),
        "model": model, "role": role, "limit": limit, "seed": seed, "device": settings.device, "weights_sha256": weights,
        "versions": versions(), "data_note": data.note, "samples": _content(data),
    }  # fmt: skip
    if read_metadata(path) == json.loads(json.dumps(key, default=str)):
        say(f"{model} · {threat.name}: kept from an earlier run of this folder")
        return read_records(path)
    records: list[Record] = []
    n = min(limit, len(data.index))
    for start in range(0, n, settings.batch_size):
        batch = slice(start, min(start + settings.batch_size, n))
        began = time.perf_counter()
        with _threads(chain):
            rows, points = _evaluate(chain, data, batch, threat, weights, settings, seed + start)
        seconds = (time.perf_counter() - began) / len(rows)
        for i, row in enumerate(rows):
            record = Record(
                suite=suite.name, model=model, pair=pair.name, role=role, data=data.name, data_note=data.note, split=data.split,
                threat=threat.name, norm=threat.threat().norm, units=units_and_box(threat.threat()), weights_sha256=weights,
                versions=json.dumps(versions()), seed=seed, partial=limit < min(pair.limit, threat.limit or pair.limit), seconds=seconds, **row,
            )  # fmt: skip
            if record.contradiction():
                record = Record(**{**record.__dict__, "adversarial": _save_point(folder, path.stem, data.x[start + i], points.get(i), record)})
            records.append(record)
    write_records(path, records, key)
    return records


def _refuse_to_shorten(path: Path, threat: ThreatSpec, limit: int) -> None:
    """Raises BadInput if a part with more samples exists, because they would be lost."""
    there = read_metadata(path) or {}
    had = there.get("limit")
    if isinstance(had, int) and had > limit and there.get("threat") == threat.model_dump(mode="json"):
        raise BadInput(
            f"expected at least the {had} samples that {path.parent.parent} has of {there.get('model')}, got a limit of {limit}; "
            f"leave --limit out to resume, or name another folder with --out"
        )


def _evaluate(
    chain: nn.Module, data: Dataset, batch: slice, threat: ThreatSpec, weights: str, settings: Settings, seed: int
) -> tuple[list[dict[str, Any]], dict[int, dict[str, torch.Tensor]]]:
    """One batch: the record fields that depend on the sample, and the nearest adversarial points."""
    import torch

    from robustlip.attacks import by_name
    from robustlip.data.lengths import counted
    from robustlip.target import Target

    x = torch.as_tensor(data.x[batch]).to(settings.device)
    y = torch.as_tensor(data.y[batch]).to(settings.device)
    index = np.asarray(data.index[batch], dtype=np.int64)
    ball = threat.threat()
    rows: list[dict[str, Any]] = [{"index": int(i), "label": int(label)} for i, label in zip(index, counted(y).tolist(), strict=True)]
    points: dict[int, dict[str, torch.Tensor]] = {}

    if threat.radii:
        certificate, refusal = _certified(chain, x, y, ball, threat, index)
        if certificate is None:  # attacked in any case
            for row in rows:
                row.update(certified_radius=0.0, status=ABSTAINED, reason=refusal)
        elif threat.dtype is None and certificate.weights_sha256 != weights:
            raise CertificateViolation(
                f"expected a certificate of weights {weights[:12]}, got one of {certificate.weights_sha256[:12]}; do not change weights during a run"
            )
        else:
            for i, row in enumerate(rows):
                row.update(
                    prediction=int(certificate.prediction[i]), certified_radius=float(certificate.radius[i]), status=certificate.status[i],
                    reason=certificate.reason[i], method=certificate.method, dtype=certificate.dtype,
                )  # fmt: skip
        nearest = np.full(len(rows), np.inf)
        found = [", ".join(a.name for a in threat.attacks)] * len(rows)
        failure = [""] * len(rows)
        for number, spec in enumerate(threat.attacks):
            attack = by_name(spec.name, **spec.options)
            # An attack that searches for the smallest radius runs once, one at a fixed radius at each radius of the table.
            for radius in threat.radii if attack.needs_radius else (None,):
                generator = _generator(seed + 1_000_003 * number)
                observation = attack(chain, x, y, with_radius(ball, radius), generator=generator, index=index, weights_sha256=weights)
                if not np.array_equal(observation.index, index) or np.isnan(observation.radius).any():
                    raise RuntimeError(f"attack {spec.name} returned other samples than it was given, or NaN as a distance")
                failure = [before or why for before, why in zip(failure, observation.failure, strict=True)]
                if certificate is None:
                    for row, prediction in zip(rows, observation.prediction.tolist(), strict=True):
                        row["prediction"] = prediction
                        row["status"] = MISCLASSIFIED if prediction != row["label"] else ABSTAINED
                for better in np.flatnonzero(observation.radius < nearest).tolist():
                    nearest[better], found[better] = observation.radius[better], spec.name
                    points[better] = _point(observation, better)
        for i, row in enumerate(rows):
            row.update(attacked_radius=float(nearest[i]), attack=found[i], attack_seed=seed, failure="" if np.isfinite(nearest[i]) else failure[i])
    else:
        with torch.no_grad():
            for row, prediction in zip(rows, Target(chain).scores(x).argmax(-1).tolist(), strict=True):
                row["prediction"] = prediction

    if isinstance(ball, WeightBall):
        assert threat.sensitivity_radius is not None
        measured, witness = _sensitivity(chain, x, replace(ball, radius=threat.sensitivity_radius), threat.search, seed)
        for i, row in enumerate(rows):
            if not measured[i]["observed_change"] <= measured[i]["certified_change"]:
                points[i] = {"change.flattened": witness[i]}
            row.update(measured[i], attack=row.get("attack") or "sensitivity", attack_seed=seed, method=row.get("method") or "global")
    return rows, points


def _certified(
    chain: nn.Module, x: torch.Tensor, y: torch.Tensor, ball: Threat, threat: ThreatSpec, index: np.ndarray
) -> tuple[Certificate | None, str]:
    """The certificate of a batch, or None and a sentence that says why this model cannot be certified in this way."""
    from robustlip.certifiers import certify
    from robustlip.certifiers.methods import check_method

    check_method(threat.method)
    try:
        return certify(chain, x, y, ball, method=threat.method, dtype=threat.dtype, index=index), ""
    except BadInput as error:  # for unsuitable samples the attack raises too
        return None, str(error)


def _generator(seed: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(seed)  # on the CPU for every device, so that attacks always start from the same points


def _point(observation: Observation, i: int) -> dict[str, torch.Tensor]:
    """The adversarial point of sample i: inputs or embeddings, or the change of each weight matrix. Stored until the check is done."""
    found = observation.adversarial
    if isinstance(found, dict):
        return {f"change.{name}": change[int(observation.group[i])] for name, change in found.items()}
    return {"adversarial": found[i]}


def _sensitivity(chain: nn.Module, x: torch.Tensor, ball: WeightBall, search: SearchSpec, seed: int) -> tuple[list[dict[str, float]], torch.Tensor]:
    """The sensitivity fields of each sample's record, and the weight changes that attain them."""
    import torch

    from robustlip.attacks import observed_sensitivity
    from robustlip.certifiers import weight_sensitivity_bound
    from robustlip.data.lengths import by_length

    if len(groups := by_length(x)) > 1:
        parts = [_sensitivity(chain, part, ball, search, seed) for _, part in groups]
        order = torch.cat([rows for rows, _ in groups]).argsort()
        fields = [row for rows, _ in parts for row in rows]
        return [fields[i] for i in order.tolist()], torch.cat([witness for _, witness in parts])[order]
    x = groups[0][1]
    radius = ball.radius
    assert radius is not None
    observed = observed_sensitivity(chain, x, ball, **search.model_dump(), generator=_generator(seed))
    # The search takes steps of these lengths: a change is compared with the bound at its own length, not at the whole radius.
    lengths = [*(r for r in (1e-4, radius / 10) if r < radius), radius]
    try:
        bounds = [np.asarray(weight_sensitivity_bound(chain, x, replace(ball, radius=r)), dtype=np.float64) for r in sorted(lengths)]
    except BadInput:  # no bound is proved for this model
        bounds = [np.full(len(x), np.inf) for _ in lengths]
    step = np.minimum(np.searchsorted(sorted(lengths), observed.distance), len(lengths) - 1)
    fields = [
        {
            "certified_sensitivity": float(bounds[-1][i]) / radius,
            "observed_sensitivity": float(observed.ratio[i]),
            "sensitivity_radius": radius,
            "certified_change": float(bounds[step[i]][i]),
            "observed_change": float(observed.change[i]),
        }
        for i in range(len(x))
    ]
    return fields, observed.witness


def _save_point(folder: Path, part: str, clean: Any, adversarial: dict[str, torch.Tensor] | None, record: Record) -> str:
    """Save a point that contradicts a certificate; returns the path relative to the run."""
    import torch
    from safetensors.torch import save_file

    relative = f"{POINTS}/{part}-sample{record.index}.safetensors"
    tensors = {"clean": torch.as_tensor(clean).detach().cpu().contiguous().clone()}
    tensors |= {name: tensor.detach().cpu().contiguous().clone() for name, tensor in (adversarial or {}).items()}
    about = {
        "model": record.model, "threat": record.threat, "index": str(record.index), "label": str(record.label),
        "prediction": str(record.prediction), "certified_radius": repr(record.certified_radius), "attacked_radius": repr(record.attacked_radius),
        "certified_change": repr(record.certified_change), "observed_change": repr(record.observed_change),
        "attack": record.attack, "seed": str(record.attack_seed), "weights_sha256": record.weights_sha256,
    }  # fmt: skip
    with atomic(folder / relative) as temporary:
        save_file(tensors, temporary, metadata=about)
    return relative


def interrupted_sentence(run: Run) -> str:
    """The message after Ctrl-C."""
    done, missing = len(run.manifest.get("parts", [])), len(run.manifest.get("missing", []))
    return f"interrupted: {done} parts are kept in {run.folder}, {missing} are missing; run the same command again to resume"
