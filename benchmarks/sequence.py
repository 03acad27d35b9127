"""Certificates of every next-token prediction of one sequence, compared with one plain forward pass.

    ROBUSTLIP_DATA=FOLDER python benchmarks/sequence.py [--model shakespeare-gpt-per-head] [--tokens 257] [--json FILE]

For each threat shared by all positions (robustlip.certifiers.sequence): elapsed and processor time, number of certified positions, and
the median radius. The second call is measured: constants of the weights are cached by the first.
"""

from __future__ import annotations

import argparse
import time

import torch
from reporting import finish

from robustlip.certifiers.sequence import sequence_radii
from robustlip.data import load_tokens
from robustlip.models import zoo
from robustlip.threats import EmbeddingBall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shakespeare-gpt-per-head")
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    model = zoo.load(arguments.model).to(arguments.device)
    tokens = load_tokens("tiny_shakespeare:test", vocabulary=model.vocabulary)[0][: arguments.tokens].to(arguments.device)
    with torch.no_grad():
        model(tokens[None, :-1])
        started = time.perf_counter()
        model(tokens[None, :-1]).cpu()
        forward = time.perf_counter() - started
    rows = []
    for threat in (EmbeddingBall(tokens=(-1,)), EmbeddingBall(), EmbeddingBall(joint=True)):
        sequence_radii(model, tokens, threat)
        started, spent = time.perf_counter(), time.process_time()
        radius, _ = sequence_radii(model, tokens, threat)
        seconds, process = time.perf_counter() - started, time.process_time() - spent
        proved = radius[radius > 0]
        rows.append({
            "model": arguments.model, "threat": threat.name, "positions": len(radius), "certified": len(proved), "median": float(proved.median()),
            "seconds": seconds, "process_seconds": process, "forward_passes": seconds / forward,
        })  # fmt: skip
        print(
            f"{threat.name:<18} {len(proved)} of {len(radius)} positions, median radius {proved.median():.3g}: "
            f"{seconds:.2f} s ({process:.2f} s of the process, {seconds / forward:.0f} forward passes)",
            flush=True,
        )
    finish(rows, arguments.json, device=arguments.device)


if __name__ == "__main__":
    main()
