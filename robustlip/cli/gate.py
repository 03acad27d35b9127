"""`robustlip gate`: decide by a policy whether a model passes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from robustlip.cli.batches import end_interrupted
from robustlip.cli.options import DataDir, Device, FileBatchSize, Json, Model
from robustlip.errors import CertificateViolation, RobustlipError


def gate(
    model: Model,
    policy: Annotated[Path, typer.Option("--policy", help="the policy file (TOML)")],
    certificate: Annotated[Optional[list[Path]], typer.Option("--certificate", help="certificate file; repeatable  [default: certify now]")] = None,
    json: Json = None, device: Device = None, batch_size: FileBatchSize = None, data_dir: DataDir = None,
) -> None:  # fmt: skip
    """Decide by a policy whether a model passes. Exit code 0 pass, 1 fail or no usable certificate, 2 bad input, 3 a false certificate,
    130 interrupted (finished measurements are shown)."""
    from robustlip import certificate_file
    from robustlip.attacks import by_name
    from robustlip.cli.console import Out, Progress, choose_device
    from robustlip.figures import figure
    from robustlip.gate import gate as hold
    from robustlip.gate import load_policy, policy_rows
    from robustlip.models.zoo import load

    out = Out(json, policy, model, *(certificate or ()))
    wanted = load_policy(policy)
    files = [(path.name, certificate_file.read(path)) for path in certificate] if certificate else None
    chain = load(model, device=choose_device(device, out))
    rows = policy_rows(wanted, data_dir, getattr(chain, "vocabulary", None))
    attack = by_name(wanted.attack) if wanted.require_attack else None
    with Progress() as progress:
        report = hold(
            wanted, chain, rows, files, attack=attack, batch_size=batch_size,
            advance=lambda done, total: progress(f"{model} · {policy.name}", done, total),
        )  # fmt: skip
    out.json({"model": model, "policy": policy.name, **report.to_json_dict()})

    table = [
        (r.what + (f" ({r.remark})" if r.remark else ""), "pass" if r.passed else "FAIL", *(figure(x, 6) for x in (r.required, r.got, r.lower)))
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
    end_interrupted(report.interrupted, f"{model} does not pass {policy.name}: {report.sentence()}")
    if report.exit_code:
        raise RobustlipError(f"{model} does not pass {policy.name}: {report.sentence()}")
