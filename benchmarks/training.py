"""A constrained training step compared with the same step without a constraint, for the paper's character GPT (2.4 million parameters).

    OMP_NUM_THREADS=1 python benchmarks/training.py [--json FILE] [--batch 8] [--repeats 9] [--methods soft-cap,…]
    python benchmarks/training.py --recipe recipes/newhouse-145m.toml --batch 16        # the model, optimisers, dtype and compilation of a recipe

Forward, backward and optimisers on random tokens (times do not depend on the tokens); without --recipe, Muon on 3 blocks × 256, 4 heads, context 256.
The methods run in turns, so that other load affects all of them. On a CPU processor time is used, which other processes affect less than elapsed
time; both ratios are printed. Medians, and the median of the ratios within a turn. Target: at most 1.10 on a CPU, 1.05 at 145M on a GPU.
Memory is the peak of a separate process for each method.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from reporting import finish

from robustlip.constraints import METHODS
from robustlip.errors import BadInput
from robustlip.models.build import build
from robustlip.training import Recipe, load_recipe
from robustlip.training.compute import Forward
from robustlip.training.objective import cross_entropy
from robustlip.training.optimizers import make_constraint, make_optimizers

CHARACTER_GPT = Recipe.model_validate({
    "name": "character-gpt",
    "model": {"kind": "lipschitz-gpt", "vocabulary_size": 65, "width": 256, "heads": 4, "blocks": 3, "distance_bias": 64},
    "data": {"name": "tiny_shakespeare", "context": 256},
    "optimizer": {"name": "muon", "lr": 0.05, "adamw_lr": 0.001},
    "constraint": {"method": "soft-cap", "w_max": 1.0, "overrides": {"mlp*": 2.0, "head.weight": 30.0}},
    "run": {"steps": 1, "batch": 8},
})  # fmt: skip


def recipe_of(path: str | None) -> Recipe:
    recipe = CHARACTER_GPT if path is None else load_recipe(path)
    if "gpt" not in str(recipe.model.get("kind")) or recipe.loss.kind != "cross-entropy" or recipe.data.context is None:
        raise BadInput(f"expected the recipe of a gpt with the plain loss and a context, got {recipe.name}; name another")
    return recipe


def stepper(recipe: Recipe, method: str, batch: int, device: str) -> Callable[[], tuple[float, float, float]]:
    """A function that runs one training step and returns the times of all of it, of optimiser and constraint, and elapsed."""
    torch.manual_seed(0)
    # Options of the recipe's own method may not exist for another one.
    of_method = {"strength": None, "polynomial": None} if method != recipe.constraint.method else {}
    recipe = recipe.model_copy(update={"constraint": recipe.constraint.model_copy(update={"method": method} | of_method)})
    vocabulary = recipe.model.get("vocabulary_size", 65)
    model = build({"vocabulary_size": vocabulary} | recipe.model).to(device).train()
    assert recipe.data.context is not None
    tokens = torch.randint(vocabulary, (batch, recipe.data.context + 1), device=device)
    forward = Forward(recipe, model, tokens[:, :-1])
    optimizers = make_optimizers(recipe, model)
    constraint = make_constraint(recipe, model)
    constraint.project()
    constraint.attach(*optimizers)

    def now() -> tuple[float, float]:
        if device == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter()
        return (wall if device == "cuda" else time.process_time()), wall

    def step() -> tuple[float, float, float]:
        start = now()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        cross_entropy(forward(tokens[:, :-1]), tokens[:, 1:], recipe.loss).backward()
        between = now()
        for optimizer in optimizers:
            optimizer.step()
        end = now()
        return end[0] - start[0], end[0] - between[0], end[1] - start[1]

    return step


def peak_megabytes(path: str | None, method: str, batch: int, device: str) -> float:
    """Peak memory of a process that takes three steps: resident on a CPU, allocated on a GPU."""
    command = [sys.executable, __file__, "--peak", method, "--batch", str(batch), "--device", device, *(("--recipe", path) if path else ())]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--recipe", help="a recipe of a gpt, instead of the character GPT")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--methods", default=",".join(m for m in METHODS if m != "none"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        recipe = recipe_of(arguments.recipe)
    except BadInput as error:
        parser.error(str(error))
    if arguments.peak:
        step = stepper(recipe, arguments.peak, arguments.batch, arguments.device)
        for _ in range(3):
            step()
        print(torch.cuda.max_memory_allocated() / 2**20 if arguments.device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        return
    methods = ["none", *arguments.methods.split(",")]
    steps = {method: stepper(recipe, method, arguments.batch, arguments.device) for method in methods}
    for step in steps.values():  # warm up
        step()
    turns = [{method: step() for method, step in steps.items()} for _ in range(arguments.repeats)]
    plain_peak = peak_megabytes(arguments.recipe, "none", arguments.batch, arguments.device)
    rows = []
    for method in methods:
        peak = plain_peak if method == "none" else peak_megabytes(arguments.recipe, method, arguments.batch, arguments.device)
        rows.append({
            "method": method,
            "step_s": statistics.median(turn[method][0] for turn in turns),
            "optimizer_s": statistics.median(turn[method][1] for turn in turns),
            "ratio": statistics.median(turn[method][0] / turn["none"][0] for turn in turns),
            "wall_ratio": statistics.median(turn[method][2] / turn["none"][2] for turn in turns),
            "peak_mb": peak,
            "extra_mb": peak - plain_peak,
        })  # fmt: skip
    print("| method | step, ms | of which optimiser and constraint, ms | step / unconstrained | the same by the clock | peak memory above, MB |")
    print("|---|---:|---:|---:|---:|---:|")
    for r in rows:
        times = f"{r['step_s'] * 1e3:.0f} | {r['optimizer_s'] * 1e3:.0f} | {r['ratio']:.3f} | {r['wall_ratio']:.3f}"
        print(f"| {r['method']} | {times} | {r['extra_mb']:.0f} of {plain_peak:.0f} |")
    finish(rows, arguments.json, recipe=recipe.name, device=arguments.device, batch=arguments.batch, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
