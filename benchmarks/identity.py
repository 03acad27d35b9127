"""Checks whether a change of the code changes a radius: random certificates and those of the zoo, compared number by number.

    python benchmarks/identity.py --record FILE [--certificates 2000] [--seed 0]     # for the present code
    python benchmarks/identity.py --compare FILE [--tolerance 0]                      # compare FILE with the present code
    python benchmarks/identity.py --against REV [--certificates 2000]                 # compare a git revision with the present code, in one run

A certificate here is one call of `certify` by one method: a model of a family of the violation search (MLPs, residual and tight ones, GPTs with
smooth and with sorting activations, patch transformers, convolutions, optimised attention, the zoo), one dtype, one threat, a few samples. Radii
depend on the kernels of processor and torch, which the record names: compare on one machine, or use --against. A file stores radii exactly.
Exit code 0: all radii are the same to the last bit (or within the relative --tolerance). 1: some differ; they are listed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from reporting import machine
from violation_methods import DTYPES, draw

from robustlip.certifiers import METHODS, RULES_VERSION, certify
from robustlip.errors import BadInput, UnsupportedLayer

FAMILIES = ("mlp", "gpt", "mlp-tight", "conv", "transformer", "mlp-residual", "gpt-worst", "gpt-maxmin", "zoo")
SAMPLES = {"sdp": 2, "lipsdp": 2}
MOST = 6
# One semidefinite program per pair of logits takes minutes on wide networks.
DEAR_ON = {"lipsdp": ("zoo", "mlp-residual")}


def unit(seed: int, at: int) -> dict[str, list[float]]:
    """{"unit family dtype threat method": radii} for one random small model. Method 'best' is not run, because it only chooses among the others."""
    family, turn = FAMILIES[at % len(FAMILIES)], at // len(FAMILIES)
    dtype = torch.float32 if family == "zoo" else DTYPES[turn % len(DTYPES)]
    g = torch.Generator().manual_seed(seed * 1_000_003 + at)
    torch.manual_seed(seed * 1_000_003 + at)
    model, x, threats = draw(family, turn, "global", dtype, g)
    model = copy.deepcopy(model).to(dtype).requires_grad_(False)
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        y = model.scores(x).argmax(-1)
    found: dict[str, list[float]] = {}
    for threat in threats:
        for name, method in METHODS.items():
            if method.why_not(model, threat) or family in DEAR_ON.get(name, ()):
                continue
            few = min(SAMPLES.get(name, MOST), MOST if family != "zoo" else 2)
            try:
                radius = certify(model, x[:few], y[:few], threat, name).radius
            except (BadInput, UnsupportedLayer):
                continue  # a size that the method refuses
            found[f"{at} {family} {str(dtype).removeprefix('torch.')} {threat.name} {name}"] = [float(r) for r in radius]
    return found


def drawn(certificates: int, seed: int) -> dict[str, list[float]]:
    torch.set_num_threads(1)  # the number of threads changes the order of sums
    found: dict[str, list[float]] = {}
    at = 0
    while len(found) < certificates:
        found |= unit(seed, at)
        at += 1
        if at % 20 == 0:
            print(f"{at} models, {len(found)} certificates", file=sys.stderr, flush=True)
    return found


def differences(before: dict[str, list[float]], after: dict[str, list[float]], tolerance: float) -> list[str]:
    """One line per certificate that is missing, new, or has a radius that changed by more than a relative `tolerance`."""
    lines = [f"{key}: no longer certified" for key in before.keys() - after.keys()]
    lines += [f"{key}: certified now" for key in after.keys() - before.keys()]
    for key in before.keys() & after.keys():
        pairs = list(zip(before[key], after[key], strict=True))
        worst = max((abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0 for a, b in pairs), default=0.0)
        if worst > tolerance:
            lines.append(f"{key}: moved by a relative {worst:.3g}, {next(p for p in pairs if p[0] != p[1])}")
    return sorted(lines, key=lambda line: int(line.split()[0]))


def of_revision(revision: str, certificates: int, seed: int) -> dict[str, list[float]]:
    """The record for the package at a revision of the repository, with the present benchmarks."""
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        tree, record = Path(folder) / "tree", Path(folder) / "record.json"
        subprocess.run(["git", "-C", str(root), "worktree", "add", "--detach", str(tree), revision], check=True, capture_output=True)
        try:
            here = tree / "benchmarks"
            for name in ("identity.py", "violation_methods.py", "violations.py", "reporting.py"):
                if not (here / name).exists():
                    (here / name).write_text((root / "benchmarks" / name).read_text(encoding="utf-8"), encoding="utf-8")
            command = [sys.executable, str(here / "identity.py"), "--record", str(record), "--certificates", str(certificates), "--seed", str(seed)]
            subprocess.run(command, check=True, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)})
            return dict(json.loads(record.read_text(encoding="utf-8"))["radii"])
        finally:
            subprocess.run(["git", "-C", str(root), "worktree", "remove", "--force", str(tree)], check=True, capture_output=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path)
    what.add_argument("--compare", type=Path)
    what.add_argument("--against")
    parser.add_argument("--certificates", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=0.0)
    asked = parser.parse_args()
    if asked.record:
        record: dict[str, Any] = {"seed": asked.seed, "certificates": asked.certificates, "rules": RULES_VERSION, "machine": machine()}
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(radii)}" for key, radii in drawn(asked.certificates, asked.seed).items())
        text = json.dumps(record)[:-1] + ', "radii": {\n' + lines + "\n}}\n"
        asked.record.write_text(text, encoding="utf-8")
        return 0
    if asked.compare:
        record = json.loads(asked.compare.read_text(encoding="utf-8"))
        before, (certificates, seed) = record["radii"], (record["certificates"], record["seed"])
        if record["machine"] != machine():
            print(f"recorded on {record['machine']}, compared on {machine()}: radii depend on both", file=sys.stderr)
    else:
        certificates, seed = asked.certificates, asked.seed
        before = of_revision(asked.against, certificates, seed)
    after = drawn(certificates, seed)
    changed = differences(before, after, asked.tolerance)
    print("\n".join(changed[:200]))
    print(f"{len(before)} certificates, {sum(map(len, before.values()))} radii: {len(changed)} certificates differ")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
