"""Models with many classes and large vocabularies: time and peak memory of each method, each in its own process.

    python benchmarks/large.py [--models gpt2,classes] [--methods global,local,dual] [--threads 2] [--json FILE]

gpt2: a GPT of the size of the smallest GPT-2 (12 blocks of width 768, 12 heads, 1,024 learned positions, 50,257 tokens, an untied unembedding),
with random weights of GPT-2's initial scale, and one window of 128 tokens, labelled with the model's own prediction. classes: 1,000 classes
after an MLP 784-1024-1024, eight random images. Peak memory is that of the whole process, with torch and the model's own weights.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections import OrderedDict
from typing import Any

import torch
from reporting import finish
from torch import nn

from robustlip.certifiers import certify
from robustlip.layers import AddPositions, Chain, NextTokenChain
from robustlip.models.blocks import layernorm_blocks
from robustlip.models.mlp import LipschitzMLP
from robustlip.threats import EmbeddingBall, InputBall, Threat

WINDOW = 128


def gpt2(vocabulary: int = 50257, width: int = 768, heads: int = 12, blocks: int = 12, positions: int = 1024) -> NextTokenChain:
    """GPT-2 at initialisation: normal weights with deviation 0.02, divided by √(2·blocks) at the end of residual branches."""
    generator = torch.Generator().manual_seed(0)
    layers: OrderedDict[str, nn.Module] = OrderedDict(embed_tokens=nn.Embedding(vocabulary, width))
    layers["positions"] = AddPositions(positions, width)
    layers.update(layernorm_blocks(width, heads, blocks, causal=True))
    layers["head"] = nn.Linear(width, vocabulary, bias=False)
    model = NextTokenChain(layers).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            ends = name.endswith(("output.weight", "down.weight"))
            parameter.normal_(0.0, 0.02 / math.sqrt(2 * blocks) if ends else 0.02, generator=generator)
    return model


def case(name: str) -> tuple[Chain, torch.Tensor, dict[str, Threat]]:
    """(model, samples, threats by name)."""
    generator = torch.Generator().manual_seed(1)
    if name == "gpt2":
        threats: dict[str, Threat] = {"embedding-l2@-1": EmbeddingBall(tokens=(-1,)), "embedding-l2": EmbeddingBall()}
        return gpt2(), torch.randint(0, 50257, (1, WINDOW), generator=generator), threats
    torch.manual_seed(0)
    model: Chain = LipschitzMLP([784, 1024, 1024, 1000], "relu").requires_grad_(False).eval()
    return model, torch.rand(8, 784, generator=generator), {"l2": InputBall("l2")}


def measured(name: str, method: str, threat: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model, x, threats = case(name)
    with torch.no_grad():
        y = model.scores(x).argmax(-1)
    started, spent = time.perf_counter(), time.process_time()
    certificate = certify(model, x, y, threats[threat], method)
    seconds, process = time.perf_counter() - started, time.process_time() - spent
    started = time.perf_counter()
    again = certify(model, x, y, threats[threat], method)
    second = time.perf_counter() - started
    assert again.radius.tolist() == certificate.radius.tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    radius = float(torch.tensor(certificate.radius).median())
    return {
        "model": name, "method": method, "threat": threat, "seconds": seconds, "process_seconds": process, "again": second, "peak_gib": peak,
        "radius": radius,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt2,classes")
    parser.add_argument("--methods", default="")
    parser.add_argument("--threats", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "METHOD", "THREAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(*arguments.one, arguments.threads)))
        return
    rows = []
    print("| model | threat | method | s | s of the process | again, s | peak, GiB | radius |\n|---|---|---|---:|---:|---:|---:|---:|")
    for model in arguments.models.split(","):
        methods = ("global", "local", "dual") if model == "gpt2" else ("global", "local", "dual", "ibp", "crown", "local-lipschitz")
        for threat in ("embedding-l2@-1", "embedding-l2") if model == "gpt2" else ("l2",):
            for method in methods:
                asked = (method, arguments.methods), (threat, arguments.threats)
                if any(chosen and name not in chosen.split(",") for name, chosen in asked):
                    continue
                # A separate process, whose peak memory belongs to this method only.
                command = [sys.executable, __file__, "--threads", str(arguments.threads), "--one", model, method, threat]
                ran = subprocess.run(command, capture_output=True, text=True)
                if ran.returncode:
                    why = [*ran.stderr.strip().splitlines(), f"exit code {ran.returncode}"][-2 if ran.stderr.strip() else -1]
                    print(f"| {model} | {threat} | {method} | failed: {why[:150]} |", flush=True)
                    continue
                row = json.loads(ran.stdout.splitlines()[-1])
                rows.append(row)
                print(
                    f"| {model} | {threat} | {method} | {row['seconds']:.1f} | {row['process_seconds']:.1f} | {row['again']:.1f} "
                    f"| {row['peak_gib']:.2f} | {row['radius']:.3g} |", flush=True,
                )  # fmt: skip
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
