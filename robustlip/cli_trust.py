"""The verbs that answer whether to trust: `verify` a certificate file, `gate` a model by a policy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from robustlip.cli import DataDir, Device, Json, Model, app
from robustlip.errors import BadInput, CertificateViolation, RobustlipError
from robustlip.limits import VERIFIED_ROWS, VERIFIED_SECONDS


def _end(interrupted: bool, sentence: str) -> None:
    """Exit code 130 and its sentence for what Ctrl-C ended, after all that was done has been shown."""
    if interrupted:
        print(f"robustlip: {sentence}", file=sys.stderr)
        raise typer.Exit(130)


FileBatchSize = Annotated[Optional[int], typer.Option("--batch-size", min=1, help="samples at once  [default: as the certificate says, or 256]")]


@app.command()
def verify(
    certificate: Annotated[Optional[Path], typer.Argument(metavar="CERTIFICATE", help="a file that `robustlip certify --json` wrote")] = None,
    model: Annotated[Optional[str], typer.Option("--model", help="a zoo name, a .safetensors file of ours, or package.module:callable")] = None,
    data: Annotated[Optional[str], typer.Option("--data", help="where the rows are, when not where the certificate says  [checked by hash]")] = None,
    methods: Annotated[Optional[list[str]], typer.Option("--allow", help="recompute this method; repeatable  [default: the quick ones]")] = None,
    max_samples: Annotated[int, typer.Option("--max-samples", min=1, help="refuse certificates of more")] = VERIFIED_ROWS,
    max_seconds: Annotated[float, typer.Option("--max-seconds", help="refuse certificates that would take longer")] = VERIFIED_SECONDS,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of certificate files and stop")] = False,
    json: Json = None, device: Device = None, batch_size: FileBatchSize = None, data_dir: DataDir = None,
) -> None:  # fmt: skip
    """Compute a certificate again. Exit code 0 verified, 1 not (and what differs), 2 bad input, 3 it claims more than can be proved,
    130 interrupted (and how far it came)."""
    from robustlip import certificate_file
    from robustlip.console import Out, Progress, choose_device, print_json
    from robustlip.eval.runner import load_model
    from robustlip.verification import CHEAP, Budget, load_rows
    from robustlip.verification import verify as recompute

    if schema:
        print_json(certificate_file.json_schema())
        return
    if certificate is None or model is None:
        raise BadInput("expected a certificate file and --model, got less; write robustlip verify cert.json --model MODEL")
    out = Out(json, certificate, model, data)
    if not max_seconds > 0:
        raise BadInput(f"expected --max-seconds above 0, got {max_seconds}; give a number of seconds")
    file = certificate_file.read(certificate)
    budget = Budget(tuple(methods) if methods else CHEAP, max_samples, max_seconds, batch_size)
    if refusal := budget.refusal(file):  # before its rows are loaded
        raise RobustlipError(f"{certificate.name} is not verified: {refusal}")
    chain = load_model(model, choose_device(device, out))
    rows = load_rows(file.data, data_dir, getattr(chain, "vocabulary", None), spec=data)
    with Progress() as progress:
        result = recompute(
            file, chain, rows, budget=budget, advance=lambda done, total: progress(f"{certificate.name} · {file.threat}", done, total)
        )
    out.json({"certificate": certificate.name, "model": model, **result.to_json_dict()})
    counts = ", ".join(f"{sum(s.status == status for s in file.samples)} {status}" for status in ("certified", "abstained", "misclassified"))
    told = [
        ("verdict", result.verdict.upper()),
        ("certificate of", f"{file.model} against {file.threat}, covers {file.dtype}, method {file.method}, {file.created}"),
        ("certified weights", file.weights_sha256),
        ("rows", f"{len(file.samples)} of {file.data.spec}: {counts}"),
        *((finding.kind, finding.sentence) for finding in result.findings[:20]),
        *([("and", f"{len(result.findings) - 20} more differences (all with --json)")] if len(result.findings) > 20 else []),
        *(("note", note) for note in result.notes),
    ]
    out.table(f"{certificate.name}: checked against {model}", ["", ""], told)
    if result.exit_code == 3:
        raise CertificateViolation(f"{certificate.name} is unsound: {result.sentence()}")
    _end(result.interrupted, f"{certificate.name} is not verified: {result.sentence()}")
    if result.exit_code:
        raise RobustlipError(f"{certificate.name} is not verified: {result.sentence()}")


@app.command()
def gate(
    model: Model,
    policy: Annotated[Path, typer.Option("--policy", help="what is required (TOML)")],
    certificate: Annotated[Optional[list[Path]], typer.Option("--certificate", help="count this file; repeatable  [default: certify now]")] = None,
    json: Json = None, device: Device = None, batch_size: FileBatchSize = None, data_dir: DataDir = None,
) -> None:  # fmt: skip
    """Yes or no by a policy. Exit code 0 pass, 1 below it or no usable certificate, 2 bad input, 3 a certificate that is not true, 130 interrupted,
    with what was measured until then."""
    from robustlip import certificate_file
    from robustlip.attacks import by_name
    from robustlip.console import Out, Progress, choose_device
    from robustlip.eval.runner import load_model
    from robustlip.gate import gate as hold
    from robustlip.gate import load_policy, policy_rows

    out = Out(json, policy, model, *(certificate or ()))
    wanted = load_policy(policy)
    files = [(path.name, certificate_file.read(path)) for path in certificate] if certificate else None
    chain = load_model(model, choose_device(device, out))
    rows = policy_rows(wanted, data_dir, getattr(chain, "vocabulary", None))
    attack = by_name(wanted.attack) if wanted.require_attack else None
    with Progress() as progress:
        report = hold(
            wanted, chain, rows, files, attack=attack, batch_size=batch_size,
            advance=lambda done, total: progress(f"{model} · {policy.name}", done, total),
        )  # fmt: skip
    out.json({"model": model, "policy": policy.name, **report.to_json_dict()})

    def figure(value: float | None) -> str:
        return "–" if value is None else f"{value:.6g}"

    table = [
        (r.what + (f" ({r.remark})" if r.remark else ""), "pass" if r.passed else "FAIL", figure(r.required), figure(r.got), figure(r.lower))
        for r in report.requirements
    ]
    source = "verified certificates" if files else "certificates computed now"
    out.table(
        f"{model} by {policy.name}, {wanted.data}, {wanted.dtype}, {source}", ["requirement", "verdict", "required", "got", "95 % at least"], table
    )
    for text in (*report.refusals, *report.violations, *report.notes):
        out.console().print(text, markup=False)
    out.say(f"{report.verdict.upper()}: {report.sentence()}")
    if report.exit_code == 3:
        raise CertificateViolation(report.sentence())
    _end(report.interrupted, f"{model} does not pass {policy.name}: {report.sentence()}")
    if report.exit_code:
        raise RobustlipError(f"{model} does not pass {policy.name}: {report.sentence()}")
