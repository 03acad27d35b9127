"""`robustlip audit`: try to refute a claimed Lipschitz constant. Exit codes: 0 not refuted, 2 bad input, 3 violated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from robustlip.cli.batches import samples_for
from robustlip.cli.options import Context, DataDir, Device, ImageColumn, Json, LabelColumn, Model, Seed, Subset, TextColumn
from robustlip.errors import BadInput, CertificateViolation

if TYPE_CHECKING:
    from robustlip.attacks.audit import Audit
    from robustlip.cli.console import Out


def audit(
    model: Model,
    formula: Annotated[Optional[str], typer.Option("--formula", help="newhouse2025, product or ours  [default: ours]")] = None,
    claim: Annotated[Optional[float], typer.Option("--claim", help="a number instead of a formula, in --units")] = None,
    domain: Annotated[Optional[float], typer.Option("--domain", help="of --claim: largest token norm in --units  [default: the embedding]")] = None,
    units: Annotated[Optional[str], typer.Option("--units", help="l2 or rms  [default: rms for newhouse2025, else l2]")] = None,
    data: Annotated[Optional[str], typer.Option("--data", help="also start the search from these samples: a data set or file, with :split")] = None,
    limit: Annotated[Optional[int], typer.Option("--limit", min=1, help="maximum number of samples of --data  [default: 16]")] = None,
    worst_weights: Annotated[bool, typer.Option("--worst-weights", help="also try the formula on adversarial weights of the same norms")] = False,
    witness: Annotated[Optional[Path], typer.Option("--witness", help="only measure the pair of inputs in this file again")] = None,
    out_folder: Annotated[Path, typer.Option("--out", help="folder for the witness")] = Path("runs/audit"),
    starts: Annotated[int, typer.Option("--starts", min=1, help="number of starting points, searched in one batch")] = 32,
    steps: Annotated[int, typer.Option("--steps", min=1, help="steps of gradient ascent on the input")] = 60,
    tokens: Annotated[Optional[int], typer.Option("--tokens", min=1, help="length of sequences without --data  [default: 8]")] = None,
    json: Json = None, device: Device = None, seed: Seed = 0, data_dir: DataDir = None, context: Context = None, subset: Subset = None,
    image_column: ImageColumn = None, label_column: LabelColumn = None, text_column: TextColumn = None,
) -> None:  # fmt: skip
    """Try to refute a claimed Lipschitz constant: find two inputs whose outputs are further apart than it allows. Exit code 3 if found."""
    import torch

    from robustlip.attacks import formulas
    from robustlip.attacks.audit import audit as run
    from robustlip.attacks.audit import recheck, save_witness, save_worst
    from robustlip.cli.console import Out, Progress, choose_device
    from robustlip.data.lengths import by_length
    from robustlip.models.zoo import load

    out = Out(json, model, data, witness)
    _check(formula, claim, domain, units, witness, worst_weights)
    _check_lengths(data, limit, context, tokens)
    columns = (subset, image_column, label_column, text_column)
    if data is None and any(value is not None for value in columns):
        raise BadInput("expected --subset and the names of columns with --data, got them without; name the data")
    where = choose_device(device, out)
    given = load(model, device=where)
    x = torch.as_tensor(samples_for(given, data, context, data_dir, limit or 16, seed, columns).x) if data else None
    if x is not None and len(groups := by_length(x)) > 1:  # a claim is of one length
        rows, x = max(groups, key=lambda group: (len(group[0]), group[1].shape[1]))
        out.say(f"note: texts of several lengths; audited with the {len(rows)} of {x.shape[1]} tokens, the most frequent length")
    chain = _chain_of(given, x)
    if witness is not None:
        _show(model, recheck(witness, chain), [witness], out, "measured again")
        return
    if claim is not None:
        fan_in = formulas.widths(chain)[0]
        radius = domain if domain is None or units != "rms" else domain * fan_in**0.5
        statement = formulas.stated(chain, claim, units or "l2", radius)
    else:
        statement = formulas.claim_of(chain, formula or "ours")
        statement = statement.in_units(units) if units else statement
    with Progress() as progress:
        result = run(
            chain, statement, x, starts=starts, tokens=tokens or 8, ascent_steps=steps, worst_weights=worst_weights, seed=seed, advance=progress
        )
    # A different claim or seed gets another witness file, so that this one is not overwritten.
    stem = f"{_safe(model)}-{result.formula}" + ("" if claim is None else f"-{claim:g}") + (f"-seed{seed}" if seed else "")
    files = [out_folder / f"{stem}.safetensors"]
    save_witness(files[0], result)
    for w in result.worst:
        files.append(out_folder / f"{stem}-worst-{w.layer}{'-heads' if 'head' in w.kept else ''}.safetensors")
        save_worst(files[-1], w)
    if statement.formula == "newhouse2025":
        own = formulas.own_domain(chain)
        if own is not None and statement.domain is not None and own > statement.domain * (1 + 1e-6):
            out.say(f"note: the model's own embeddings have norms up to {own:.4g}, outside the domain of the claim, {statement.domain:.4g}")
    _show(model, result, files, out, "searched")


def _chain_of(model: Any, x: Any) -> Any:
    """The model as a Chain: the model itself, or its capture on inputs like x, or on inputs of the shape that the model declares."""
    import torch

    from robustlip.certifiers.chains import chain_of
    from robustlip.layers import as_chain

    if x is None and (shape := getattr(model, "input_shape", None)) is not None:
        x = torch.zeros(2, *shape)
    return as_chain(model) if x is None else chain_of(model, x)[0]


def _check(formula: str | None, claim: float | None, domain: float | None, units: str | None, witness: Path | None, worst_weights: bool) -> None:
    if units not in (None, "l2", "rms"):
        raise BadInput(f"expected units l2 or rms, got {units!r}; name one of them")
    if formula is not None and claim is not None:
        raise BadInput("expected --formula or --claim, got both; leave one out")
    if domain is not None and claim is None:
        raise BadInput("expected --domain with --claim only, got it with a formula, which has its own domain; leave it out")
    if worst_weights and claim is not None:
        raise BadInput("expected a formula with --worst-weights, got a number, which holds for these weights only; give --formula")
    if witness is not None and (formula, claim, worst_weights) != (None, None, False):
        raise BadInput("expected --witness alone, got it with a claim; the file contains its claim")


def _check_lengths(data: str | None, limit: int | None, context: int | None, tokens: int | None) -> None:
    """Refuse options that would be ignored."""
    if data is None and limit is not None:
        raise BadInput("expected --limit with --data, got it without, where inputs are random; use --starts, or name the data")
    if data is None and context is not None:
        raise BadInput("expected --context with --data, got it without; --tokens is the length of random sequences")
    if data is not None and tokens is not None:
        raise BadInput("expected --tokens without --data, got it with data, whose sequences have their own length; use --context")


def _safe(text: str) -> str:
    name = Path(text).stem if text.endswith(".safetensors") else text.rpartition(":")[2]
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)


def _show(model: str, result: Audit, files: list[Path], out: Out, how: str) -> None:
    """Print the JSON, the table and the conclusion; raise the error that gives the exit code."""
    out.json({"model": model, **result.to_json_dict(), "witness": str(files[0]), "files": [str(f) for f in files]})
    domain = "all inputs" if result.domain is None else f"tokens of ℓ2 norm ≤ {result.domain:.6g}"
    rows = [
        ("claimed", f"{result.claimed:.6g}  ({result.formula})"),
        ("found", f"{result.found:.6g}  (rounding subtracted: {result.rounding:.1e} of a change of {result.change:.3g}, {result.rounding_kind})"),
        ("ratio", f"{result.ratio:.4g}"),
        ("verdict", result.verdict),
        ("norm", result.norm),
        ("domain", domain),
        ("distance of the pair", f"{result.distance:.3g} (ℓ2)"),
        ("starts", f"{result.starts}, seed {result.seed}, {how} in {result.seconds:.1f} s" if result.seconds else f"{result.starts}, {how}"),
        ("witness", str(files[0])),
        ("weights", result.weights_sha256),
    ]
    out.table(f"{model}: claimed and found", ["", "Lipschitz constant to the logits"], rows)
    if result.worst:
        worst = [[w.layer, w.part, w.kept, w.units, f"{w.claimed:.5g}", f"{w.found:.5g}", f"{w.ratio:.4g}", w.verdict] for w in result.worst]
        headings = ["Layer", "Kind", "Kept", "Units", "Claimed", "Found", "Ratio", "Verdict"]
        out.table("Adversarial weights with the same shapes and norms", headings, worst, left=4)
    if not result.violated:
        out.say("The claim is not refuted. A search cannot prove it.")
        return
    top = max(result.worst, key=lambda w: w.ratio, default=None)
    if result.verdict == "violated":
        out.say(f"VIOLATED: two inputs inside the domain change the output by {result.ratio:.4g} times what {result.formula} allows. {result.why}")
    elif top is not None:
        out.say(
            f"VIOLATED as a formula: these weights pass, but with other weights of the same norms in {top.layer} its output changes by "
            f"{top.ratio:.4g} times what {result.formula} allows. {result.why}"
        )
    if result.formula == "ours":
        raise CertificateViolation(f"expected the proved bound {result.claimed:.9g} to hold, found {result.found:.9g}; report this with {files[0]}")
    raise typer.Exit(3)
