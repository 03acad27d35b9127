"""`robustlip import`: convert a checkpoint of the published code, without running code from it, and compare its claimed bound with a proved one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from robustlip import __version__
from robustlip.cli.options import DataDir, ImageColumn, Json, LabelColumn, Limit, Subset, TextColumn
from robustlip.errors import BadInput
from robustlip.names import shown

if TYPE_CHECKING:
    from robustlip.cli.console import Out
    from robustlip.importing import Checkpoint, Converted, Log
    from robustlip.importing.measure import Measured

SOURCE = "Newhouse et al. 2025, arXiv 2507.13338"


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a checkpoint (.npz) or log (.json) of the published code")],
    out_folder: Annotated[Path, typer.Option("--out", help="folder of the model file and its card")] = Path("runs/import"),
    name: Annotated[Optional[str], typer.Option("--name", help="name of the model  [default: from the file name]")] = None,
    checkpoint: Annotated[Optional[int], typer.Option("--checkpoint", min=0, help="number in the file  [default: the last]")] = None,
    vocabulary: Annotated[Optional[Path], typer.Option("--vocabulary", help="text file with the characters of token ids 0, 1, …")] = None,
    data: Annotated[Optional[str], typer.Option("--data", help="also measure loss and accuracy, e.g. on tiny_shakespeare:test")] = None,
    json: Json = None, limit: Limit = None, data_dir: DataDir = None,
    subset: Subset = None, image_column: ImageColumn = None, label_column: LabelColumn = None, text_column: TextColumn = None,
) -> None:  # fmt: skip
    """Convert a published checkpoint to a model, without running code from it, and prove its bound; or recompute the bound of a log."""
    from robustlip.cli.console import Out, Progress
    from robustlip.importing import convert, read_checkpoint, read_log
    from robustlip.importing.measure import measure

    out = Out(json, file, vocabulary)
    if limit is not None and data is None:
        raise BadInput("expected --limit with --data, got it without, so that nothing is measured; name the data, or leave it out")
    options = {"subset": subset, "image_column": image_column, "label_column": label_column, "text_column": text_column}
    columns = {option: value for option, value in options.items() if value is not None}
    if columns and data is None:
        named = ", ".join(f"--{option.replace('_', '-')}" for option in columns)
        raise BadInput(f"expected {named} with --data, got it without, so that nothing is measured; name the data, or leave it out")
    if not file.is_file():
        raise BadInput(f"expected a checkpoint (.npz) or log (.json), got {file}, which does not exist; check the path")
    with file.open("rb") as stream:
        start = stream.read(4)
    if start[:2] != b"PK":
        if start.lstrip()[:1] != b"{":
            raise BadInput(f"expected a checkpoint (.npz) or log (.json), got {file.name}, which is neither; name a file of the published code")
        if data or vocabulary or name or checkpoint is not None:
            raise BadInput(
                "expected --data, --vocabulary, --name and --checkpoint with a checkpoint, got a log, which holds no weights; leave them out"
            )
        _show_log(file, read_log(file), out)
        return
    with Progress() as progress:
        progress(f"reading {file.name}", 0, 3)
        read = read_checkpoint(file, checkpoint)
        progress("building the model and its bound", 1, 3)
        made = convert(read, None if vocabulary is None else _characters(vocabulary))
        card = _card(file, read, made)
        progress(f"measuring on {data}" if data else "measuring", 2, 3)
        measured = measure(made.model, data, read.log.parameters, data_dir=data_dir, limit=limit, columns=columns) if data else None
    _save(file, name, out_folder, made, card, measured, out)


def _characters(path: Path) -> str:
    from robustlip.data.text import read_text

    if not path.is_file():
        raise BadInput(f"expected a text file with the characters of token ids, got {path}, which does not exist; check the path")
    return read_text(path)


def _formulas(log: Log) -> dict[str, float | str]:
    """The formula of the published code applied to the norms in the log, for each version of the code; or why it cannot be applied."""
    from robustlip.importing import FORMULAS

    values: dict[str, float | str] = {}
    for name, formula in FORMULAS.items():
        try:
            values[name] = formula(log)
        except BadInput as error:
            values[name] = str(error)
    return values


def _explained(log: Log, values: dict[str, float | str]) -> str:
    from robustlip.importing.logs import explained

    if log.claimed is None:
        return "the file claims no constant"
    if any(isinstance(value, str) for value in values.values()):
        return "the file does not contain the norms from which its constant was computed"
    which = explained(log)
    return f"the file's constant is the formula as {which}" if which else "the file's constant agrees with neither version of the formula"


def _show_log(file: Path, log: Log, out: Out) -> None:
    values = _formulas(log)
    explanation = _explained(log, values)
    document = {"file": file.name, "claimed": log.claimed, "formulas": values, "explained": explanation, "accuracy": log.accuracy, "loss": log.loss}
    out.json({**document, "norms": dict(log.norms), "proved": None})
    out.table(
        f"{file.name}: a log of the published code", ["", "Lipschitz constant, RMS, from one-hot characters or pixels"],
        _log_rows(log, values, explanation),
    )
    out.say("A log holds no weights: none of this is proved. Import the checkpoint for a proved bound.")


def _log_rows(log: Log, values: dict[str, float | str], explanation: str) -> list[tuple[str, str]]:
    from robustlip.figures import figure

    rows = [("claimed in the file", figure(log.claimed, 6))]
    rows += [(f"formula as {name}, norms of the log", f"{value:.6g}" if isinstance(value, float) else value) for name, value in values.items()]
    rows += [("conclusion", explanation)]
    rows += [(f"{key} in the file", f"{value:.4f}") for key, value in (("accuracy", log.accuracy), ("loss", log.loss)) if value is not None]
    return rows


def _card(file: Path, read: Checkpoint, made: Converted) -> dict[str, Any]:
    import torch

    from robustlip.attacks.formulas import published
    from robustlip.certifiers import lipschitz_bound
    from robustlip.hashing import weights_sha256

    log, bound = read.log, lipschitz_bound(made.model)
    weights_formula, why_not = published(made.model)
    embed = log.norms.get("embed", 1.0) if made.model.embedding_depth else 1.0
    claimed = log.claimed / embed if log.claimed is not None and embed > 0 else None
    notes = [*made.notes, *([f"members of the file that were not read: {', '.join(read.left_out)}"] if read.left_out else [])]
    return {
        "description": f"Imported from a checkpoint of the published code ({read.number + 1} of {read.count}).",
        "paper": SOURCE,
        "caveats": "; ".join(notes),
        "confirmed": made.confirmed,
        "source_file": shown(file.name),
        "source_sha256": read.sha256,
        "data": shown(str(log.parameters.get("data", ""))),
        "reported_accuracy": log.accuracy,
        "reported_loss": log.loss,
        "parameters": sum(p.numel() for p in made.model.parameters()),
        "weights_sha256": weights_sha256(made.model),
        "versions": {"robustlip": __version__, "torch": torch.__version__},
        "claim": {
            "claimed": log.claimed,
            "claimed_from_embeddings": claimed,
            "explained": _explained(log, _formulas(log)),
            "formula_of_logged_norms": {key: value for key, value in _formulas(log).items() if isinstance(value, float)},
            "formula_of_weights": weights_formula,
            "formula_of_weights_why_not": why_not or None,
            "proved_over_claimed": float(bound["rms"]) / claimed if claimed else None,
        },
        "options": {key: value for key, value in log.parameters.items() if _simple(key) and _simple(value)},
        "bound": bound,
    }


def _simple(value: Any) -> bool:
    return isinstance(value, (bool, float)) or (type(value) is int and abs(value) < 2**63) or (isinstance(value, str) and shown(value) == value)


def _same_source(card: Path, sha256: str) -> bool:
    """Whether the card belongs to the same checkpoint: then the import may overwrite the model."""
    from robustlip.files import read_toml

    try:
        return read_toml(card, "a card").get("source_sha256") == sha256
    except BadInput:
        return False


def _save(file: Path, name: str | None, folder: Path, made: Converted, card: dict[str, Any], measured: Measured | None, out: Out) -> None:
    from robustlip.checkpoints import save_model
    from robustlip.figures import figure, upward
    from robustlip.files import write_text
    from robustlip.toml import toml_text

    stem = name or "".join(c if (c.isalnum() and c.isascii()) or c in ".-_" else "-" for c in file.stem)
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", stem):
        raise BadInput(f"expected a name of letters, digits, dots and dashes, got {stem!r}; give --name")
    if measured is not None:
        card["measured"] = {"accuracy": measured.accuracy, "loss": measured.loss, "of": measured.of}
    path = folder / f"{stem}.safetensors"
    if path.exists() and not _same_source(path.with_suffix(".toml"), card["source_sha256"]):
        raise BadInput(f"expected a path without a model, or with the model of the same checkpoint, got {path}; choose another --name or --out")
    try:
        save_model(path, made.model)
    except OSError as error:
        raise BadInput(f"expected a path that can be written, got {path} ({error.strerror or error}); name another --out") from error
    card = {"name": stem, **card}
    write_text(path.with_suffix(".toml"), toml_text(card))
    out.json({"model": str(path), "card": card})
    claim, bound = card["claim"], card["bound"]

    rows = [
        ("claimed in the file", figure(claim["claimed"], 6)),
        *((f"formula as {key}, norms of the log", figure(value, 6)) for key, value in claim["formula_of_logged_norms"].items()),
        ("so", claim["explained"]),
        ("claimed, from the embeddings", figure(claim["claimed_from_embeddings"], 6)),
        ("formula as published, norms of the weights", figure(claim["formula_of_weights"], 6) + (f" ({claim['formula_of_weights_why_not']})"
                                                                                              if claim["formula_of_weights_why_not"] else "")),
        ("proved, RMS", upward(bound["rms"], 6)),
        ("proved, ℓ2", upward(bound["l2"], 6) + (f", token norms up to {bound['domain']:.6g}" if made.model.embedding_depth else "")),
        ("proved over claimed", figure(claim["proved_over_claimed"], 6)),
        ("order of the weights", made.confirmed),
        *(("note", note) for note in made.notes),
        *((f"{key} in the file", f"{card[f'reported_{key}']:.4f}") for key in ("accuracy", "loss") if card[f"reported_{key}"] is not None),
        *([("measured", f"accuracy {measured.accuracy:.4f}, loss {measured.loss:.4f} on {measured.of}")] if measured else []),
        ("weights", card["weights_sha256"]),
    ]  # fmt: skip
    out.table(f"{file.name}: imported", ["", "Lipschitz constant to the logits"], rows)
    out.say(f"model: {path}\ncard:  {path.with_suffix('.toml')}")
    if claim["proved_over_claimed"] and claim["proved_over_claimed"] > 1:
        out.say(f"The claim is not proved by robustlip; `robustlip audit {path} --formula newhouse2025 --worst-weights` tries to refute it.")
