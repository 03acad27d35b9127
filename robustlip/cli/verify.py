"""`robustlip verify`: recompute a certificate file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from robustlip.cli.batches import end_interrupted
from robustlip.cli.options import MODEL_HELP, DataDir, Device, FileBatchSize, Json
from robustlip.errors import BadInput, CertificateViolation, RobustlipError
from robustlip.limits import VERIFIED_ROWS, VERIFIED_SECONDS


def verify(
    certificate: Annotated[Optional[Path], typer.Argument(metavar="CERTIFICATE", help="a file written by `robustlip certify --json`")] = None,
    model: Annotated[Optional[str], typer.Option("--model", help=MODEL_HELP)] = None,
    data: Annotated[Optional[str], typer.Option("--data", help="the data, if it is not where the certificate says  [checked by hash]")] = None,
    methods: Annotated[Optional[list[str]], typer.Option("--allow", help="recompute this method; repeatable  [default: the fast ones]")] = None,
    max_samples: Annotated[int, typer.Option("--max-samples", min=1, help="refuse certificates with more samples")] = VERIFIED_ROWS,
    max_seconds: Annotated[float, typer.Option("--max-seconds", help="refuse certificates that would take longer to recompute")] = VERIFIED_SECONDS,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of certificate files and stop")] = False,
    json: Json = None, device: Device = None, batch_size: FileBatchSize = None, data_dir: DataDir = None,
) -> None:  # fmt: skip
    """Recompute a certificate. Exit code 0 verified, 1 not verified (with the differences), 2 bad input, 3 the certificate claims more than can be
    proved, 130 interrupted (with what was done)."""
    from robustlip import certificate_file
    from robustlip.cli.console import Out, Progress, choose_device, print_json
    from robustlip.models.zoo import load
    from robustlip.verification import FAST_METHODS, Budget, load_rows
    from robustlip.verification import verify as recompute

    if schema:
        print_json(certificate_file.json_schema())
        return
    if certificate is None or model is None:
        raise BadInput("expected a certificate file and --model, got only one of them; write robustlip verify cert.json --model MODEL")
    out = Out(json, certificate, model, data)
    if not max_seconds > 0:
        raise BadInput(f"expected --max-seconds above 0, got {max_seconds}; give a number of seconds")
    file = certificate_file.read(certificate)
    budget = Budget(tuple(methods) if methods else FAST_METHODS, max_samples, max_seconds, batch_size)
    if refusal := budget.refusal(file):  # before its rows are loaded
        raise RobustlipError(f"{certificate.name} is not verified: {refusal}")
    chain = load(model, device=choose_device(device, out))
    rows = load_rows(file.data, data_dir, getattr(chain, "vocabulary", None), spec=data)
    with Progress() as progress:
        result = recompute(
            file, chain, rows, budget=budget, advance=lambda done, total: progress(f"{certificate.name} · {file.threat}", done, total)
        )
    out.json({"certificate": certificate.name, "model": model, **result.to_json_dict()})
    counts = ", ".join(f"{sum(s.status == status for s in file.samples)} {status}" for status in ("certified", "abstained", "misclassified"))
    rows_shown = [
        ("verdict", result.verdict.upper()),
        ("certificate of", f"{file.model} against {file.threat}, covers {file.dtype}, method {file.method}, {file.created}"),
        ("certified weights", file.weights_sha256),
        ("rows", f"{len(file.samples)} of {file.data.spec}: {counts}"),
        *((finding.kind, finding.sentence) for finding in result.findings[:20]),
        *([("and", f"{len(result.findings) - 20} more differences (all with --json)")] if len(result.findings) > 20 else []),
        *(("note", note) for note in result.notes),
    ]
    out.table(f"{certificate.name}: checked against {model}", ["", ""], rows_shown)
    if result.exit_code == 3:
        raise CertificateViolation(f"{certificate.name} is unsound: {result.sentence()}")
    end_interrupted(result.interrupted, f"{certificate.name} is not verified: {result.sentence()}")
    if result.exit_code:
        raise RobustlipError(f"{certificate.name} is not verified: {result.sentence()}")
