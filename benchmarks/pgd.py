"""PGD compared with a minimal loop of forward, backward and step: the cost of restarts, keeping the best point, rounding and checking.

    python benchmarks/pgd.py [--threads 1] [--device cpu] [--steps 40] [--repeats 5] [--json FILE]

Ratios are of the medians of interleaved runs; the goal is 1.2. No sample is broken at this radius
(the label is the prediction, the radius tiny), so neither side stops early.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from robustlip.attacks import PGD
from robustlip.layers import Chain
from robustlip.threats import InputBall

RADIUS = 1e-6


def bare(model: nn.Module, x: torch.Tensor, y: torch.Tensor, norm: str, steps: int) -> torch.Tensor:
    """The minimum of a projected ascent: no checks, no best point, no decay."""
    delta = torch.zeros_like(x)
    shape = (-1, *[1] * (x.dim() - 1))
    for _ in range(steps):
        point = (x + delta).requires_grad_()
        logits = model(point)
        own = logits.gather(1, y[:, None])[:, 0]
        loss = (logits.scatter(1, y[:, None], -torch.inf).amax(1) - own).sum()
        grad = torch.autograd.grad(loss, point)[0]
        if norm == "linf":
            delta = (delta + RADIUS / 4 * grad.sign()).clamp(-RADIUS, RADIUS)
        else:
            delta = delta + RADIUS / 4 * grad / grad.flatten(1).norm(dim=1).clamp_min(1e-12).view(shape)
            delta = delta * (RADIUS / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp(max=1).view(shape)
    return x + delta


def mlp(width: int) -> Chain:
    return Chain(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def convnet() -> Chain:
    return Chain(nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows = []
    cases = {"mlp-256": lambda: mlp(256), "mlp-1024": lambda: mlp(1024), "convnet": convnet}
    for name, build in cases.items():
        torch.manual_seed(0)
        model = build().to(device).eval().requires_grad_(False)
        x = torch.rand(options.batch, 1, 28, 28, device=device)
        with torch.no_grad():
            y = model(x).argmax(1)
        for norm in ("l2", "linf"):
            attack, threat = PGD(steps=options.steps, restarts=1), InputBall(norm, RADIUS)  # type: ignore[arg-type]
            ours = lambda: attack(model, x, y, threat)  # noqa: B023, E731
            theirs = lambda: bare(model, x, y, norm, options.steps)  # noqa: B023, E731
            ours(), theirs()
            times = [(seconds(ours, device), seconds(theirs, device)) for _ in range(options.repeats)]
            mine, bare_loop = (statistics.median(column) for column in zip(*times, strict=True))
            row = {"model": name, "norm": norm, "pgd_s": mine, "bare_s": bare_loop, "ratio": mine / bare_loop}
            rows.append(row)
            print(f"{name:10s} {norm:5s} PGD {mine:.3f} s, bare loop {bare_loop:.3f} s, ratio {row['ratio']:.3f}")
    setting = {
        "batch": options.batch,
        "steps": options.steps,
        "threads": options.threads,
        "device": str(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"benchmark": "pgd", "setting": setting, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
