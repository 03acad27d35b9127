"""`robustlip certify`: certified radii by one method, or a table that compares all methods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperCommand

from robustlip.cli.batches import batches, end, gather, open_samples
from robustlip.cli.options import (
    BatchSize,
    Clip,
    Context,
    DataDir,
    DataSpec,
    Device,
    ImageColumn,
    Json,
    LabelColumn,
    Limit,
    Model,
    Seed,
    Subset,
    TextColumn,
    ThreatName,
)
from robustlip.errors import BadInput, UnsupportedLayer

if TYPE_CHECKING:
    from robustlip.certificates import Certificate
    from robustlip.cli.console import Out
    from robustlip.comparison import Comparison
    from robustlip.data import Dataset
    from robustlip.threats import Threat

ALL = "all"


class CertifyCommand(TyperCommand):
    """Lists the methods below the options; they are imported only when the help is printed."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from robustlip.certifiers import methods

        with formatter.section("Methods"):
            rows = [("best", "for each sample the largest radius of all methods that apply"), (ALL, "compare them in a table; no certificate")]
            formatter.write_dl(rows + [(name, method.description) for name, method in methods().items()])


def certify(
    model: Model, data: DataSpec, threat: ThreatName = "l2",
    radius: Annotated[Optional[float], typer.Option("--radius", help="report the certified accuracy at this radius")] = None,
    method: Annotated[str, typer.Option("--method", help="best, all, or one of those below")] = "best",
    slow: Annotated[bool, typer.Option("--slow", help="with --method all: also methods that take minutes")] = False,
    no_attack: Annotated[bool, typer.Option("--no-attack", help="with --method all: do not run the attack")] = False,
    dtype: Annotated[Optional[str], typer.Option("--dtype", help="arithmetic to certify: float32, …, real  [default: the model's]")] = None,
    json: Json = None, device: Device = None, batch_size: BatchSize = 256, limit: Limit = None, seed: Seed = 0, data_dir: DataDir = None,
    context: Context = None, subset: Subset = None, image_column: ImageColumn = None, label_column: LabelColumn = None,
    text_column: TextColumn = None, clip: Clip = None,
) -> None:  # fmt: skip
    """Prove a radius for each sample within which the prediction cannot change."""
    from collections import Counter

    import numpy as np

    from robustlip.certificates import concatenate
    from robustlip.certifiers import certify as prove
    from robustlip.cli.console import Out, Progress, choose_device, radius_summary
    from robustlip.hashing import weights_sha256
    from robustlip.threats import parse_clip, parse_threat, units_and_box

    if method == "smoothing":
        raise BadInput("expected a method that proves radii of the model, got 'smoothing', which does not; use robustlip smooth MODEL --sigma S")
    if method != ALL and (slow or no_attack):
        raise BadInput(f"expected --slow and --no-attack with --method {ALL}, got method {method!r}; leave them out")
    out = Out(json, model, data)
    ball = parse_threat(threat, radius, parse_clip(clip, threat))
    where = choose_device(device, out)
    chain, samples = open_samples(model, data, where, context, data_dir, limit, seed, (subset, image_column, label_column, text_column))
    if method == ALL:
        _compare(out, model, chain, samples, ball, dtype, slow, not no_attack, where, batch_size, seed)
        return
    with Progress() as progress, attackable():
        parts, stopped = gather(
            prove(chain, x, y, ball, method=method, dtype=dtype, index=index)
            for x, y, index in batches(samples, batch_size, where, progress, f"{model} · {ball.name}")
        )
    certificate = concatenate(parts)
    if json is not None:
        from robustlip.certificate_file import from_certificate

        kind = where.partition(":")[0]
        file = from_certificate(
            certificate, samples, spec=data, model=model, limit=limit, seed=seed, context=context, device=kind, batch_size=batch_size
        )
        out.json(file.document())
    correct = np.asarray(certificate.prediction) == np.asarray(certificate.label)
    rows = [("samples", str(len(certificate))), ("clean accuracy (%)", f"{100 * correct.mean():.1f}")]
    rows += [("certified (%)", f"{100 * certificate.certified_accuracy(radius):.1f} at radius {radius:g}")] if radius else []
    rows += radius_summary(certificate.radius, correct)
    rows += [("units", units_and_box(ball)), ("method", f"{certificate.method}, covers {certificate.dtype}")]
    if method == "best":
        winners = Counter(filter(None, certificate.methods)).most_common()
        rows += [("radii proved by", ", ".join(f"{name} ({count})" for name, count in winners) or "no method: all radii are 0")]
    rows += [("not certified because", text) for text in _why_not(certificate)]
    own = certificate.weights_sha256 if dtype is None else weights_sha256(chain)
    rows += [("weights", own)]
    # A gate compares this hash with the deployed model, in the dtype in which the model is deployed.
    rows += [(f"as {certificate.dtype}", certificate.weights_sha256)] if certificate.weights_sha256 != own else []
    rows += [("data", samples.note)] if samples.note else []
    out.table(f"{model}: certified against {ball.name}", ["", "radii: over correctly classified samples"], rows)
    end(stopped, len(certificate), len(samples.index))


@contextmanager
def attackable() -> Iterator[None]:
    """Errors of the block say that a model that cannot be certified can still be attacked."""
    try:
        yield
    except UnsupportedLayer as error:
        raise UnsupportedLayer(f"{error}; it can still be attacked: robustlip attack, eval and smooth take any module") from None


def _why_not(certificate: Certificate) -> list[str]:
    """The most frequent reasons why correctly classified samples are not certified, with their counts."""
    from collections import Counter

    from robustlip.certificates import ABSTAINED

    samples = zip(certificate.status, certificate.reason, certificate.radius, strict=True)
    found = Counter(why if r == 0 else "proved for a smaller radius only" for status, why, r in samples if status == ABSTAINED)
    reasons = [f"{why} ({count})" for why, count in found.most_common()]
    return reasons[:3] + ([f"{len(reasons) - 3} other reasons (all with --json)"] if len(reasons) > 3 else [])


def _compare(
    out: Out, model: str, chain: Any, samples: Dataset, ball: Threat, dtype: str | None, slow: bool, attack: bool, where: str, batch_size: int,
    seed: int,
) -> None:  # fmt: skip
    from robustlip.attacks import by_name
    from robustlip.cli.console import Progress
    from robustlip.comparison import compare

    kept: list[Comparison] = []
    stopped: BaseException | None = None
    with Progress() as progress:

        def labelled(label: str) -> Any:
            return batches(samples, batch_size, where, progress, f"{model} · {ball.name} · {label}")

        method = by_name("min") if attack else None
        try:
            with attackable():
                kept.append(compare(chain, labelled, ball, dtype=dtype, slow=slow, attack=method, seed=seed, kept=kept.append))
        except (KeyboardInterrupt, Exception) as error:
            if not kept:
                raise
            stopped = error
    (done,) = kept
    about = {"model": model, "data": samples.name, "split": samples.split, "data_note": samples.note, "seed": seed}
    out.json({**about, **done.to_json_dict()})
    _show(out, model, done)
    end(stopped, len(done.label), len(samples.index), f" by {len(done.radius)} method{'s' if len(done.radius) > 1 else ''}")


def _show(out: Out, model: str, done: Comparison) -> None:
    """Print the table, and below it notes on what it does not contain."""
    import numpy as np

    from robustlip.eval.tables import DASH, number, percent

    radii, wins = done.radii(), done.wins()

    def cells(row: dict[str, Any], largest: str, radius: str) -> list[str]:
        accuracy = [percent(value) for value in row["accuracy"].values()]
        fraction = [] if done.attacked is None else [number(row["fraction_of_attack"])]
        return [row["method"], radius, *accuracy, *fraction, largest, number(row["seconds"])]

    rows = [cells(row := done.row(n, r, done.seconds[n]), str(wins[n]), number(row["median_radius"])) for n, r in done.radius.items()]
    best = done.row("best of these", done.best, sum(done.seconds.values()))
    rows.append(cells(best, str(sum(wins.values())), number(best["median_radius"])))
    if done.attacked is not None:
        observed = done.row(f"attack {done.attack!r}", done.attacked, done.attack_seconds) | {"fraction_of_attack": None}
        rows.append(cells(observed, DASH, number(done.median(done.attacked), "none")))
    headings = ["method", "median radius", *(f"acc. (%) at {r:g}" for r in radii)]
    headings += ([] if done.attacked is None else ["certified / attacked"]) + ["largest on", "seconds"]
    partial = "PARTIAL: " if done.stopped else ""
    out.table(f"{partial}{model}: methods against {done.threat.name}, the same {len(done.label)} samples", headings, rows, left=1)
    notes = [f"This table is partial: {done.stopped.rstrip('.')}."] if done.stopped else []
    notes += [f"{name} left out: {reason.rstrip('.')}." for name, reason in done.left_out.items()]
    right = int(np.sum(done.correct))
    at = "" if done.threat.radius is not None or not radii else ", shown at the quartiles of the best radii"
    notes.append(
        f"Radii ({done.threat.units}): medians over the {right} of {len(done.label)} samples that are classified correctly, covers {done.dtype}. "
        f"Accuracy: share of all samples that are certified at that radius{at}; for the attack, share not broken within it."
    )
    notes.append("Largest on: number of samples on which no method proved more. Seconds: in this order; constants of the weights are shared.")
    notes.append("This table is not a certificate. To write one, certify with one method or best, and with --json.")
    for note in notes:
        out.console().print(note, markup=False)
