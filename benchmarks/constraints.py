"""Every constraint method with Muon and AdamW on one small task, compared with reparametrisations and interval training, in one table.

    OMP_NUM_THREADS=1 python benchmarks/constraints.py [--json FILE] [--seeds 3] [--only soft-cap] [--write FOLDER]

All recipes come from benchmarks/grids/constraints.toml; --write saves them as files for `robustlip train`. Columns: accuracy on the test split, the
sound ℓ2 Lipschitz bound of the logits, accuracy certified by that bound at two radii (scaling the logits changes bounds, not
these), the largest measured norm over its cap, and milliseconds per step. Means over seeds. Rows without a guarantee may exceed their cap.
Interval-trained rows also show the accuracy by interval bounds at the radius of their training, in training arithmetic.
"""

from __future__ import annotations

import argparse
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from reporting import finish

from robustlip.certifiers import certify
from robustlip.checkpoints import load_into
from robustlip.constraints import make_method
from robustlip.data import load_data
from robustlip.models.build import build
from robustlip.threats import InputBall
from robustlip.toml import toml_text
from robustlip.training import Recipe, train

GRID = Path(__file__).parent / "grids" / "constraints.toml"
RADII = (0.1, 0.3)


def merged(*tables: dict[str, Any]) -> dict[str, Any]:
    """Tables merged from left to right; an empty table replaces."""
    out: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            out[key] = merged(out.get(key, {}), value) if isinstance(value, dict) and value else value
    return out


def recipes_of(grid: dict[str, Any]) -> list[tuple[str, str, Recipe]]:
    """(method, optimiser, recipe) for each cell of a grid file."""
    rows = []
    for method, of_method in grid["axis"]["method"].items():
        for optimizer, of_optimizer in grid["axis"]["optimizer"].items():
            cell = grid.get("cell", {}).get(optimizer, {}).get(method, {})
            rows.append((method, optimizer, merged(grid["base"], of_optimizer, of_method, cell)))
    for method, variants in grid.get("extra", {}).items():
        rows += [(method, optimizer, merged(grid["base"], table)) for optimizer, table in variants.items()]
    return [(m, o, Recipe.model_validate({**table, "name": f"grid-{m}-{o}"})) for m, o, table in rows]


def measure(recipe: Recipe, folder: Path) -> dict[str, float]:
    """Train one recipe and certify its test split."""
    path = train(recipe, folder)
    card = tomllib.loads(path.with_suffix(".toml").read_text(encoding="utf-8"))
    data = load_data(f"{recipe.data.name}:test")
    certificate = certify(load_into(path, build), data.x, data.y, InputBall("l2"), "global")
    history = card["history"]
    return {
        "accuracy": card["val_accuracy"],
        "bound": card["bound"]["l2"],
        **{f"certified_{r}": certificate.certified_accuracy(r) for r in RADII},
        "norm_over_cap": history["norm_over_cap"][-1] if "norm_over_cap" in history else float("nan"),
        "interval_accuracy": card.get("interval_accuracy", float("nan")),
        "step_s": history["seconds"][-1] / recipe.run.steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="a method's name")
    parser.add_argument("--write", help="save the recipes in this folder and train nothing")
    arguments = parser.parse_args()
    cells = [c for c in recipes_of(tomllib.loads(GRID.read_text(encoding="utf-8"))) if arguments.only in ("", c[0])]
    if arguments.write:
        Path(arguments.write).mkdir(parents=True, exist_ok=True)
        for _, _, recipe in cells:
            text = toml_text(recipe.model_dump(mode="json", exclude_none=True))
            (Path(arguments.write) / f"{recipe.name}.toml").write_text(text, encoding="utf-8")
        return
    print("| method | optimiser | guarantee | accuracy, % | bound, ℓ2 | certified at 0.1, % | at 0.3, % | norm / cap | ms a step |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    rows = []
    for method, optimizer, recipe in cells:
        runs = []
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(measure(recipe.model_copy(update={"seed": seed}), Path(folder)))
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
        made = make_method(recipe.constraint.method, strength=recipe.constraint.strength, polynomial=recipe.constraint.polynomial)
        guarantee = "none" if made is None else str(made.guarantee)
        rows.append({"method": method, "optimizer": optimizer, "guarantee": guarantee, "seeds": arguments.seeds, **mean, "runs": runs})
        certified = " | ".join(f"{100 * mean[f'certified_{r}']:.1f}" for r in RADII)
        over = f"{mean['norm_over_cap']:.4f}" if mean["norm_over_cap"] == mean["norm_over_cap"] else "–"
        label = method
        if mean["interval_accuracy"] == mean["interval_accuracy"]:
            label += f" (by intervals: {100 * mean['interval_accuracy']:.1f} % at {recipe.loss.norm} {recipe.loss.epsilon})"
        print(
            f"| {label} | {optimizer} | {guarantee} | {100 * mean['accuracy']:.1f} | {mean['bound']:.3g} | {certified} | {over} "
            f"| {1e3 * mean['step_s']:.2f} |",
            flush=True,
        )
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
