"""The command line. Exit codes: 0 done, 1 a failed run, 2 bad input (one sentence on stderr), 3 a certificate that an attack refutes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar

import typer

from robustlip import __version__
from robustlip.cli_methods import ALL, CertifyCommand
from robustlip.errors import BadInput, RobustlipError, UnsupportedLayer
from robustlip.foreign import errors_of

# torch, pandas, rich and all of ours that need them are imported where they are used: `robustlip --help` must not wait for them.
if TYPE_CHECKING:
    from robustlip.certificates import Certificate
    from robustlip.comparison import Comparison
    from robustlip.console import Out
    from robustlip.data import Dataset
    from robustlip.eval.runner import Run
    from robustlip.threats import Threat

Part = TypeVar("Part")

app = typer.Typer(
    help="Certified and observed robustness of Lipschitz-constrained networks, side by side.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
zoo_app = typer.Typer(help="The models that come with robustlip.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(zoo_app, name="zoo")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a zoo name, a .safetensors file of ours, or package.module:callable")]
DataSpec = Annotated[str, typer.Option("--data", help="digits, mnist, cifar10, tiny_shakespeare, a hub name or a file, each with :split")]
ThreatName = Annotated[str, typer.Option("--threat", help="l1, l2, linf, embedding-l2[@positions], weights-spectral, …")]
Clip = Annotated[
    Optional[str],
    typer.Option("--clip", metavar="LOW,HIGH|none", help="input threats: perturbed inputs stay in this box, for every attack alike  [default: none]"),
]
Json = Annotated[Optional[str], typer.Option("--json", metavar="FILE", help="write JSON to FILE; to stdout for - or no FILE")]
Device = Annotated[Optional[str], typer.Option("--device", help="cpu, cuda, cuda:1, …  [default: the GPU if there is one]")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="samples at once")]
Limit = Annotated[Optional[int], typer.Option("--limit", min=1, help="at most so many samples")]
Seed = Annotated[int, typer.Option("--seed", help="of everything random: which samples, where attacks start")]
DataDir = Annotated[Optional[str], typer.Option("--data-dir", help="folder of data sets in the hub's parquet layout  [default: $ROBUSTLIP_DATA]")]
Subset = Annotated[Optional[str], typer.Option("--subset", help="the configuration of the data, where it has several")]
ImageColumn = Annotated[Optional[str], typer.Option("--image-column", help="of --data  [default: the one of images]")]
LabelColumn = Annotated[Optional[str], typer.Option("--label-column", help="of --data  [default: the one of labels]")]
TextColumn = Annotated[Optional[str], typer.Option("--text-column", help="of --data, which is text then")]
Context = Annotated[Optional[int], typer.Option("--context", min=1, help="text only: tokens per sample")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Errors of ours, and of a module that an argument names, end in one sentence and their exit code; any other keeps its
    traceback."""
    whole = _whole(sys.argv[1:] if arguments is None else arguments)
    try:
        with errors_of(*whole):
            app(args=whole, prog_name="robustlip")
    except RobustlipError as error:
        print(f"robustlip: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _whole(arguments: Sequence[str]) -> list[str]:
    """`--json` without a file, at the end or before another option, means stdout."""
    whole: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        whole.append(argument)
        if argument == "--json" and following != "-" and following.startswith("-"):
            whole.append("-")
    return whole


def _version(asked: bool) -> None:
    if asked:
        print(f"robustlip {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="folder of the run")] = Path("runs/demo"), json: Json = None, device: Device = None,
    batch_size: BatchSize = 256, limit: Limit = None, seed: Annotated[Optional[int], typer.Option("--seed")] = None, data_dir: DataDir = None,
) -> None:  # fmt: skip
    """The whole story on the embedded data: certify and attack the zoo, print the table, write the report."""
    _evaluate("demo", out, json, device, batch_size, limit, seed, data_dir)


@app.command("eval")
def evaluate(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="a suite file (TOML) or the name of a bundled suite")],
    out: Annotated[Optional[Path], typer.Option("--out", help="folder of the run  [default: runs/NAME]")] = None, json: Json = None,
    device: Device = None, batch_size: BatchSize = 256, limit: Limit = None,
    seed: Annotated[Optional[int], typer.Option("--seed", help="instead of the suite's")] = None, data_dir: DataDir = None,
) -> None:  # fmt: skip
    """Evaluate every model of a suite. Started again, it goes on where it was stopped."""
    _evaluate(suite, out, json, device, batch_size, limit, seed, data_dir)


def _evaluate(
    suite_name: str, folder: Path | None, json: str | None, device: str | None, batch_size: int, limit: int | None, seed: int | None,
    data_dir: str | None,
) -> None:  # fmt: skip
    from robustlip.console import Out, Progress, choose_device
    from robustlip.eval.runner import Settings, interrupted_sentence, run_suite
    from robustlip.eval.suite import load_suite

    out = Out(json, suite_name)
    suite = load_suite(suite_name)
    folder = folder or Path("runs") / suite.name
    settings = Settings(choose_device(device, out), batch_size, limit, seed, data_dir)
    with Progress() as progress:
        run = run_suite(suite, folder, settings, advance=progress, say=out.say)
    try:
        if run.records:
            _show(run, out)
    finally:
        # A table that cannot be drawn must not hide that a certificate is wrong.
        run.raise_errors()
    if run.interrupted:
        print(f"robustlip: {interrupted_sentence(run)}", file=sys.stderr)
        raise typer.Exit(130)


def _show(run: Run, out: Out) -> None:
    """The tables in the terminal, the JSON, the files of the run and where they lie."""
    from robustlip.eval import tables
    from robustlip.eval.report import write_report
    from robustlip.files import write_text

    summary = tables.summarise(run.records, run.suite)
    title = run.suite.title or run.suite.name
    for form, name in (("md", "table.md"), ("csv", "table.csv"), ("latex", "table.tex"), ("html", "table.html")):
        write_text(run.folder / name, tables.render(summary, form, partial=run.partial, title=title))
    out.json({"run": str(run.folder), "partial": run.partial, "rows": summary.to_dict("records"), "errors": run.manifest["errors"]})
    overview = tables.compact(summary)
    partial = "  (PARTIAL RUN)" if run.partial else ""
    out.say(f"\n{tables.terminal(overview, f'{title}: one row per model{partial}')}")
    if len(summary) > len(overview):
        out.say(tables.terminal(summary, f"Every threat{partial}"))
    for note in tables.notes(summary, run.partial):
        out.console().print(note, markup=False)
    report = write_report(run)
    out.say(f"report: {report}\ntables: {run.folder / 'table.md'} (also .csv, .tex, .html)")


def _open(
    model: str, data: str, device: str, context: int | None, data_dir: str | None, limit: int | None, seed: int, columns: Sequence[str | None]
) -> tuple[Any, Dataset]:  # fmt: skip
    """A model and its samples; text is encoded with the vocabulary of the model. columns: the values of robustlip.data.load.OPTIONS."""
    from robustlip.data import load_data
    from robustlip.data.load import OPTIONS
    from robustlip.eval.runner import load_model

    chain = load_model(model, device)
    words = getattr(chain, "vocabulary", None)
    options: Any = dict(zip(OPTIONS, columns, strict=True))
    return chain, load_data(data, data_dir=data_dir, limit=limit, seed=seed, context=context, vocabulary=words, **options)


@app.command(cls=CertifyCommand)
def certify(
    model: Model, data: DataSpec, threat: ThreatName = "l2",
    radius: Annotated[Optional[float], typer.Option("--radius", help="ask whether this radius holds, in the units of the threat")] = None,
    method: Annotated[str, typer.Option("--method", help="best, all, or one of those below")] = "best",
    slow: Annotated[bool, typer.Option("--slow", help="with --method all: also methods that take minutes")] = False,
    no_attack: Annotated[bool, typer.Option("--no-attack", help="with --method all: without the attack to compare with")] = False,
    dtype: Annotated[Optional[str], typer.Option("--dtype", help="arithmetic to cover: float32, …, real  [default: the model's]")] = None,
    json: Json = None, device: Device = None, batch_size: BatchSize = 256, limit: Limit = None, seed: Seed = 0, data_dir: DataDir = None,
    context: Context = None, subset: Subset = None, image_column: ImageColumn = None, label_column: LabelColumn = None,
    text_column: TextColumn = None, clip: Clip = None,
) -> None:  # fmt: skip
    """Prove for each sample a radius within which the prediction cannot change."""
    from collections import Counter

    import numpy as np

    from robustlip.certificates import concatenate
    from robustlip.certifiers import certify as prove
    from robustlip.console import Out, Progress, choose_device, radius_summary
    from robustlip.hashing import weights_sha256
    from robustlip.threats import parse_clip, parse_threat, units_and_box

    if method == "smoothing":
        raise BadInput("expected a method that proves radii of the model, got 'smoothing', which does not; use robustlip smooth MODEL --sigma S")
    if method != ALL and (slow or no_attack):
        raise BadInput(f"expected --slow and --no-attack with --method {ALL}, got method {method!r}; leave them out")
    out = Out(json, model, data)
    ball = parse_threat(threat, radius, parse_clip(clip, threat))
    where = choose_device(device, out)
    chain, samples = _open(model, data, where, context, data_dir, limit, seed, (subset, image_column, label_column, text_column))
    if method == ALL:
        _compare(out, model, chain, samples, ball, dtype, slow, not no_attack, where, batch_size, seed)
        return
    with Progress() as progress, _attackable():
        parts, stopped = gather(
            prove(chain, x, y, ball, method=method, dtype=dtype, index=index)
            for x, y, index in _batches(samples, batch_size, where, progress, f"{model} · {ball.name}")
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
    rows += [("proved robust (%)", f"{100 * certificate.certified_accuracy(radius):.1f} at radius {radius:g}")] if radius else []
    rows += radius_summary(certificate.radius, correct)
    rows += [("units", units_and_box(ball)), ("method", f"{certificate.method}, covers {certificate.dtype}")]
    if method == "best":
        winners = Counter(filter(None, certificate.methods)).most_common()
        rows += [("radii came from", ", ".join(f"{name} ({count})" for name, count in winners) or "no method: none is above 0")]
    rows += [("why not", text) for text in _why_not(certificate)]
    own = certificate.weights_sha256 if dtype is None else weights_sha256(chain)
    rows += [("weights", own)]
    # What a gate compares with the model that is deployed, in the dtype that it is deployed in.
    rows += [(f"as {certificate.dtype}", certificate.weights_sha256)] if certificate.weights_sha256 != own else []
    rows += [("data", samples.note)] if samples.note else []
    out.table(f"{model}: certified against {ball.name}", ["", "over correctly classified samples where it says radius"], rows)
    end(stopped, len(certificate), len(samples.index))


@contextmanager
def _attackable() -> Iterator[None]:
    """A model that cannot be certified can still be attacked: the sentence that refuses it says so."""
    try:
        yield
    except UnsupportedLayer as error:
        raise UnsupportedLayer(f"{error}; it can still be attacked: robustlip attack, eval and smooth take any module") from None


def gather(results: Iterable[Part]) -> tuple[list[Part], BaseException | None]:
    """The results of one batch after another, and what stopped them before the end: what was computed until then is shown (see `end`)."""
    parts: list[Part] = []
    try:
        for part in results:
            parts.append(part)
    except (KeyboardInterrupt, Exception) as stopped:
        if not parts:
            raise
        return parts, stopped
    return parts, None


def end(stopped: BaseException | None, done: int, total: int, by: str = "") -> None:
    """The end of a command whose batches were stopped, after all that was done has been shown. by: what had finished them, where several do."""
    if stopped is None:
        return
    cause = "interrupted" if isinstance(stopped, KeyboardInterrupt) else "stopped by an error"
    print(f"robustlip: {cause} after {done} of {total} samples{by}; what was found for them is above", file=sys.stderr)
    if isinstance(stopped, KeyboardInterrupt):
        raise typer.Exit(130)
    raise stopped


def _why_not(certificate: Certificate) -> list[str]:
    """The commonest reasons of samples that are classified correctly and not proved, with their numbers."""
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
    from robustlip.cli_methods import show
    from robustlip.comparison import compare
    from robustlip.console import Progress

    kept: list[Comparison] = []
    stopped: BaseException | None = None
    with Progress() as progress:

        def batches(label: str) -> Any:
            return _batches(samples, batch_size, where, progress, f"{model} · {ball.name} · {label}")

        method = by_name("min") if attack else None
        try:
            with _attackable():
                kept.append(compare(chain, batches, ball, dtype=dtype, slow=slow, attack=method, seed=seed, kept=kept.append))
        except (KeyboardInterrupt, Exception) as error:
            if not kept:
                raise
            stopped = error
    (done,) = kept
    about = {"model": model, "data": samples.name, "split": samples.split, "data_note": samples.note, "seed": seed}
    out.json({**about, **done.to_json_dict()})
    show(out, model, done)
    end(stopped, len(done.label), len(samples.index), f" by {len(done.radius)} method{'s' if len(done.radius) > 1 else ''}")


@app.command()
def attack(
    model: Model, data: DataSpec, threat: ThreatName = "l2",
    name: Annotated[str, typer.Option("--attack", help="pgd, min, weights, torchattacks-pgd, torchattacks-pgdl2, autoattack")] = "min",
    radius: Annotated[Optional[float], typer.Option("--radius", help="attack at this radius; 'min' searches for the smallest")] = None,
    json: Json = None, device: Device = None, batch_size: BatchSize = 256, limit: Limit = None, seed: Seed = 0, data_dir: DataDir = None,
    context: Context = None, subset: Subset = None, image_column: ImageColumn = None, label_column: LabelColumn = None,
    text_column: TextColumn = None, clip: Clip = None,
) -> None:  # fmt: skip
    """Look for each sample for a perturbation that changes the prediction."""
    import numpy as np
    import torch

    from robustlip.attacks import by_name
    from robustlip.console import Out, Progress, choose_device, radius_summary
    from robustlip.hashing import weights_sha256
    from robustlip.threats import parse_clip, parse_threat, units_and_box

    out = Out(json, model, data)
    ball, method = parse_threat(threat, radius, parse_clip(clip, threat)), by_name(name)
    where = choose_device(device, out)
    chain, samples = _open(model, data, where, context, data_dir, limit, seed, (subset, image_column, label_column, text_column))
    generator, weights = torch.Generator().manual_seed(seed), weights_sha256(chain)
    with Progress() as progress:
        observations, stopped = gather(
            method(chain, x, y, ball, generator=generator, index=index, weights_sha256=weights)
            for x, y, index in _batches(samples, batch_size, where, progress, f"{model} · {ball.name} · {name}")
        )
    described = observations[0].to_json_dict()
    described["samples"] = [row for o in observations for row in o.to_json_dict()["samples"]]
    about = {"model": model, "data": samples.name, "split": samples.split, "data_note": samples.note, "requested_radius": radius}
    out.json({**about, "partial": stopped is not None, **described})
    label, prediction, found = (np.concatenate([getattr(o, field) for o in observations]) for field in ("label", "prediction", "radius"))
    correct, failed = prediction == label, np.concatenate([o.failed for o in observations])
    why = [text for o in observations for text in o.failure if text]
    broken = correct & np.isfinite(found)
    rows = [("samples", str(len(label))), ("clean accuracy (%)", f"{100 * correct.mean():.1f}")]
    limit_text = f"within radius {radius:g}" if radius else "at any distance tried"
    rows += [("broken (%)", f"{100 * np.mean(broken):.1f} {limit_text}"), *radius_summary(found, correct & ~failed)]
    rows += [("not finite", f"{failed.sum()} samples, neither broken nor robust: {why[0]}")] if failed.any() else []
    rows += [("units", units_and_box(ball)), ("attack", method.described)] + ([("data", samples.note)] if samples.note else [])
    out.table(f"{model}: {name} against {ball.name}", ["", "over correctly classified samples where it says radius"], rows)
    end(stopped, len(label), len(samples.index))


def _batches(samples: Dataset, size: int, device: str, progress: Any, label: str) -> Any:
    """(x, y, index) on the device, `size` samples at a time."""
    import torch

    total = len(samples.index)
    if total == 0:
        raise BadInput("expected at least one sample, got none; choose another split or a larger --limit")
    for start in range(0, total, size):
        progress(label, start, total)
        part = slice(start, start + size)
        yield torch.as_tensor(samples.x[part]).to(device), torch.as_tensor(samples.y[part]).to(device), samples.index[part]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe file (TOML)")],
    out_folder: Annotated[Path, typer.Option("--out", help="folder of the model file, its card and its checkpoints")] = Path("runs/train"),
    resume: Annotated[bool, typer.Option(help="go on from the checkpoint in the folder")] = True,
    parallel: Annotated[str, typer.Option("--parallel", help="started by torchrun: ddp, or fsdp, which shards the weights")] = "ddp",
    json: Json = None, device: Device = None, data_dir: DataDir = None,
) -> None:  # fmt: skip
    """Train a model from a recipe; started again, it goes on from its checkpoint. By torchrun: in several processes."""
    import contextlib
    import io

    from robustlip.console import Out, Progress, choose_device
    from robustlip.files import read_toml
    from robustlip.parallel import launched
    from robustlip.training import load_recipe
    from robustlip.training import train as run

    rank, _, processes = launched()
    if rank:
        with contextlib.redirect_stdout(io.StringIO()):  # the first one speaks
            where = choose_device(device, Out())
            run(recipe, out_folder, device=where, data_dir=data_dir, resume=resume, parallel=parallel)
        return
    out = Out(json, recipe)
    parsed = load_recipe(recipe)
    where = choose_device(device, out)
    if processes > 1:
        out.say(f"{processes} processes ({parallel})")
    with Progress() as progress:

        def advance(step: int, steps: int, figures: dict[str, float]) -> None:
            shown = " ".join(f"{key} {value:.4g}" for key, value in figures.items())
            progress(f"{parsed.name} {shown}", step, steps)

        path = run(parsed, out_folder, device=where, data_dir=data_dir, progress=advance, resume=resume, parallel=parallel)
    card = path.with_suffix(".toml")
    out.json({"model": str(path), "card": read_toml(card, "a card") if card.is_file() else None})
    out.say(f"model: {path}\ncard:  {card}")


@app.command()
def table(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
    form: Annotated[str, typer.Option("--format", help="md, csv, latex or html")] = "md",
    one_row: Annotated[bool, typer.Option("--compact", help="one row per model")] = False,
    json: Json = None,
) -> None:  # fmt: skip
    """Print the robustness table of a run."""
    from robustlip.console import STDOUT, Out
    from robustlip.eval import tables
    from robustlip.eval.results import check_soundness
    from robustlip.eval.runner import read_run

    out, done = Out(json), read_run(run)
    summary = tables.summarise(done.records, done.suite)
    text = tables.render(summary, form, partial=done.partial, title=done.suite.title or done.suite.name, one_row_per_model=one_row)
    rows = tables.compact(summary) if one_row else summary
    out.json({"run": str(run), "partial": done.partial, "rows": rows.to_dict("records")})
    if json != STDOUT:
        sys.stdout.write(text)
    check_soundness(done.records, done.folder)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
    out_file: Annotated[Optional[Path], typer.Option("--out", help="where to write it  [default: report.html in the run]")] = None,
    json: Json = None,
) -> None:  # fmt: skip
    """Write the self-contained HTML page of a run."""
    from robustlip.console import Out
    from robustlip.eval.report import write_report
    from robustlip.eval.results import check_soundness
    from robustlip.eval.runner import read_run

    out, done = Out(json), read_run(run)
    path = write_report(done, out_file)
    out.json({"run": str(run), "partial": done.partial, "report": str(path)})
    out.say(f"report: {path}")
    check_soundness(done.records, done.folder)


@zoo_app.command("list")
def zoo_list(json: Json = None) -> None:
    """The models by name."""
    from robustlip.console import Out
    from robustlip.eval.tables import DASH, percent
    from robustlip.models import zoo

    out = Out(json)
    cards = {name: zoo.card(name) for name in zoo.names()}
    out.json({"models": [{"name": name, **card} for name, card in cards.items()]})
    wide = out.console().width >= 100
    rows = [
        [
            name,
            str(card.get("data", DASH)) + (f" ({card['data_note']})" if card.get("data_note") else ""),
            percent(card.get("val_accuracy")),
            str(card.get("parameters", DASH)),
            *([str(card.get("weights_sha256", DASH))[:12]] if wide else []),
        ]
        for name, card in cards.items()
    ]
    out.table("zoo", ["Model", "Data", "Validation\nacc. (%)", "Parameters", *(["Weights, SHA-256"] if wide else [])], rows)


@zoo_app.command("show")
def zoo_show(name: Annotated[str, typer.Argument(help="a zoo name")], json: Json = None) -> None:
    """The card of one model: recipe, data, accuracy, caveats, and its sound bound computed from the weights that ship."""
    from robustlip.console import Out
    from robustlip.models import zoo

    out = Out(json)
    card: dict[str, Any] = zoo.card(name)
    card |= {"sound_bound": zoo.sound_bound(name)}
    out.json({"name": name, **card})
    aside = ("name", "history", "bound", "constrained_norms_rms")
    shown = {key: value for key, value in card.items() if key not in aside and value != ""}
    if "history" in card:
        shown["history"] = "--json has it"
    out.table(name, ["", ""], _flat(shown))


def _flat(card: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in card.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", f"{value:.6g}" if type(value) is float else str(value)))
    return rows


import robustlip.cli_audit  # noqa: E402  (the verb audit; last, as the next)
import robustlip.cli_import  # noqa: E402  (the verb import)
import robustlip.cli_smooth  # noqa: E402  (the verb smooth)
import robustlip.cli_sweep  # noqa: E402  (the verb sweep)
import robustlip.cli_trust  # noqa: E402, F401  (the verbs verify and gate; last, because that file takes its options from this one)
