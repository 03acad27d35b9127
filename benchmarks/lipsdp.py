"""Lipschitz constants of MLPs: the product of norms, ECLipsE-Fast and LipSDP, with the seconds that each took on this machine.

    python benchmarks/lipsdp.py [--json FILE] [--cvxpy] [--data-dir FOLDER] [--cases digits-mlp-lipschitz mnist ...]

All constants are proved upper bounds (ℓ2 in, ℓ2 out; or ℓ2 in, the margin of a pair of logits out); 'seen' is the largest ‖J‖ at samples of the
data, below the true constant. 'mnist' trains an MLP 784-256-10 (203,530 parameters) on the first images of MNIST: the shape for which the
README of LipDiff reports 9.309 for the product of norms and 4.822 for LipSDP in 47 s, with other weights. Certified radii are medians over the test
split.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from reporting import finish

from robustlip.certifiers import certify
from robustlip.data import load_data
from robustlip.domains.quadratic import Constants, eclipse_constants, lipsdp_constants, network_of, product_of_norms
from robustlip.domains.quadratic.eclipse import fast_multipliers
from robustlip.domains.quadratic.lipsdp import multipliers_for
from robustlip.domains.quadratic.program import least_proved, program_of
from robustlip.models import LipschitzMLP, zoo
from robustlip.threats import InputBall

CASES = ("digits-mlp-lipschitz", "digits-mlp-baseline", "mnist", "random 64-128-128-128-128-10")


def trained_on_mnist(data_dir: str | None, epochs: int = 10) -> LipschitzMLP:
    """784-256-10, ReLU, Adam with weight decay 1e-4 on the loss, plain cross-entropy, seed 0."""
    torch.manual_seed(0)
    data = load_data("mnist:train", data_dir=data_dir)
    model = LipschitzMLP([784, 256, 10])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    for _ in range(epochs):
        for part in torch.randperm(len(data)).split(128):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(data.x[part]), data.y[part]).backward()
            optimizer.step()
    return model.eval()


def case(name: str, data_dir: str | None) -> tuple[LipschitzMLP, torch.Tensor, torch.Tensor]:
    if name == "mnist":
        data = load_data("mnist:test", limit=1000, data_dir=data_dir)
        return trained_on_mnist(data_dir), data.x, data.y
    data = load_data("digits:test")
    if name.startswith("random"):
        torch.manual_seed(0)
        model = LipschitzMLP([int(w) for w in name.split()[1].split("-")])
        return model.eval(), data.x, model(data.x).argmax(-1)
    return zoo.load(name), data.x, data.y  # type: ignore[return-value]


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def measure(name: str, data_dir: str | None, with_cvxpy: bool) -> dict[str, Any]:
    model, x, y = case(name, data_dir)
    network, read = timed(lambda: network_of(model))
    rows: dict[str, Any] = {"case": name, "parameters": sum(p.numel() for p in model.parameters()), "read_s": read}
    upper = torch.triu_indices(len(network.head.mid), len(network.head.mid), 1)

    def add(method: str, constants: Constants, seconds: float) -> None:
        pairs = constants.pairs[upper[0], upper[1]]
        rows[method] = {"whole": constants.whole, "median_pair": float(pairs.median()), "seconds": seconds}

    add("product", *timed(lambda: product_of_norms(network)))
    add("eclipse", *timed(lambda: eclipse_constants(network)))
    add("lipsdp, all logits together", *timed(lambda: lipsdp_constants(network, pairwise=False)))
    add("lipsdp, and every pair", *timed(lambda: lipsdp_constants(network)))
    if with_cvxpy:
        program = program_of(network, network.head)
        start = program.join(fast_multipliers(network, 1.5)[0])
        try:
            rho, seconds = timed(lambda: least_proved(program, multipliers_for(program, start, "cvxpy")))
            rows["lipsdp by cvxpy, all logits together"] = {"whole": rho**0.5, "seconds": seconds}
        except ValueError as error:
            rows["lipsdp by cvxpy, all logits together"] = {"refused": str(error)}
    sample = x[:64].double()
    exact = model.double()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda p: exact(p[None])[0]))(sample).flatten(2).detach()
    rows["seen"] = float(torch.linalg.matrix_norm(jacobian, 2).max())
    model.float()
    # The constants are computed again inside, because certificates use no numbers from outside.
    rows["median_radius_l2"] = {m: float(np.median(certify(model, x, y, InputBall("l2"), m).radius)) for m in ("global", "eclipse", "lipsdp")}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--cvxpy", action="store_true")
    parser.add_argument("--data-dir")
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.cases:
        row = measure(name, arguments.data_dir, arguments.cvxpy)
        rows.append(row)
        print(f"{name}: {row['parameters']} parameters, largest ‖J‖ seen {row['seen']:.4g}")
        for method, values in row.items():
            if isinstance(values, dict) and "whole" in values:
                pair = f"  median pair {values['median_pair']:9.4f}" if "median_pair" in values else ""
                print(f"  {method:<38} whole {values['whole']:9.4f}{pair}  {values['seconds']:7.2f} s")
            elif isinstance(values, dict) and "refused" in values:
                print(f"  {method:<38} {values['refused']}")
        print("  median certified ℓ2 radius:", ", ".join(f"{m} {r:.4f}" for m, r in row["median_radius_l2"].items()), flush=True)
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
