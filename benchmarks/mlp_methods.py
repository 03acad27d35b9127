"""Certified radii of the MLP methods against the smallest successful attack, the global method, and auto_LiRPA where it is installed.

    python benchmarks/mlp_methods.py [--models a,b] [--norms l2,linf] [--samples 240] [--lirpa-samples 20] [--json FILE]

One run, one process, the same samples: those that the model gets right. Ratios are certified radius / radius of the package's strongest attack,
per sample. auto_LiRPA (not a dependency) bounds exact arithmetic in float32 without a proof of its rounding; its radius is found by bisection
with backward CROWN, and with α-CROWN, over all rivals.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from reporting import finish
from torch import nn

from robustlip.attacks import by_name
from robustlip.certifiers.constants import constants_of
from robustlip.data import load_data
from robustlip.domains.lines import crown_radii, ibp_radii, local_lipschitz_radii, sdp_radii, sdp_why_not
from robustlip.domains.norms import Context
from robustlip.domains.norms.bound import global_radii
from robustlip.layers import Chain
from robustlip.models.zoo import load
from robustlip.threats import InputBall

METHODS = {"global": global_radii, "ibp": ibp_radii, "crown": crown_radii, "local-lipschitz": local_lipschitz_radii, "sdp": sdp_radii}


def lirpa_radii(model: Chain, x: torch.Tensor, y: torch.Tensor, norm: str, method: str, upper: np.ndarray, steps: int = 9) -> np.ndarray:
    """The largest radius (N,) that auto_LiRPA's bounds of all margins leave positive, by bisection below `upper`, the attack's radius (N,)."""
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm  # type: ignore[import-not-found]

    layers = nn.Sequential(*model)
    bounded = BoundedModule(layers, x[:1], bound_opts={"optimize_bound_args": {"iteration": 20}}, device="cpu")
    classes = model(x[:1]).shape[-1]
    eye = torch.eye(classes)
    rows = eye[y][:, None] - eye
    rows = rows[torch.arange(classes) != y[:, None]].view(len(x), classes - 1, classes)
    low, high = np.zeros(len(x)), np.array(upper)
    for _ in range(steps):
        middle = (low + high) / 2
        feasible = np.zeros(len(x), dtype=bool)
        order = {"l2": 2, "linf": np.inf, "l1": 1}[norm]
        for i in range(len(x)):
            point = BoundedTensor(x[i : i + 1], PerturbationLpNorm(norm=order, eps=float(middle[i])))
            lower, _ = bounded.compute_bounds(x=(point,), C=rows[i : i + 1], method=method, bound_upper=False)
            feasible[i] = bool((lower > 0).all())
        low, high = np.where(feasible, middle, low), np.where(feasible, high, middle)
    return low


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    out = run()
    return out, time.perf_counter() - start


def summary(radius: np.ndarray, attacked: np.ndarray, seconds: float, **names: object) -> dict[str, object]:
    ratio = radius / attacked
    return names | {
        "samples": len(radius), "median": float(np.median(ratio)), "p10": float(np.quantile(ratio, 0.1)), "p90": float(np.quantile(ratio, 0.9)),
        "largest": float(ratio.max()), "median_radius": float(np.median(radius)), "ms_per_sample": 1e3 * seconds / len(radius),
    }  # fmt: skip


def measure(name: str, norm: str, samples: int, lirpa: int) -> list[dict[str, object]]:
    model, data = load(name), load_data("digits:test")
    x, y = data.x[:samples], data.y[:samples]
    with torch.no_grad():
        right = model.scores(x).argmax(-1) == y
    x, y = x[right], y[right]
    threat = InputBall(norm)  # type: ignore[arg-type]
    attacked, seconds = timed(lambda: np.asarray(by_name("min")(model, x, y, threat).radius))
    rows = []
    context = Context(torch.float32, constants_of(model)[1])
    for method, run in METHODS.items():
        if method == "sdp" and sdp_why_not(model, threat):
            continue
        with torch.no_grad():
            (radius, _), seconds = timed(lambda run=run: run(model, x, y, model.scores(x), threat, context))  # type: ignore[misc]
        rows.append(summary(radius.numpy(), attacked, seconds, model=name, norm=norm, method=method))
    try:
        import auto_LiRPA  # type: ignore[import-not-found]
    except ImportError as error:
        print(f"auto_LiRPA left out: {error}")
        return rows
    for method in ("CROWN", "CROWN-Optimized"):
        count = min(lirpa, len(x))
        radius, seconds = timed(lambda m=method, c=count: lirpa_radii(model, x[:c], y[:c], norm, m, attacked[:c]))  # type: ignore[misc]
        label = f"auto_LiRPA {getattr(auto_LiRPA, '__version__', '')} {method}"
        rows.append(summary(radius, attacked[:count], seconds, model=name, norm=norm, method=label))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="digits-mlp-lipschitz,digits-mlp-baseline")
    parser.add_argument("--norms", default="l2")
    parser.add_argument("--samples", type=int, default=240)
    parser.add_argument("--lirpa-samples", type=int, default=20)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models.split(","):
        for norm in arguments.norms.split(","):
            for row in measure(name, norm, arguments.samples, arguments.lirpa_samples):
                rows.append(row)
                shares = f"median {row['median']:.3f}  p10 {row['p10']:.3f}  p90 {row['p90']:.3f}  largest {row['largest']:.3f}"
                print(f"{row['model']:<22} {row['norm']:<5} {row['method']:<32} {row['samples']:>4}  {shares}  {row['ms_per_sample']:8.2f} ms")
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
