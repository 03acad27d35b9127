"""`robustlip train`: train one recipe, in one process or under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustlip.cli.options import DataDir, Device, Json


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe file (TOML)")],
    out_folder: Annotated[Path, typer.Option("--out", help="folder of the model file, its card and its checkpoints")] = Path("runs/train"),
    resume: Annotated[bool, typer.Option(help="resume from the checkpoint in the folder")] = True,
    parallel: Annotated[str, typer.Option("--parallel", help="under torchrun: ddp, or fsdp, which shards the weights")] = "ddp",
    json: Json = None, device: Device = None, data_dir: DataDir = None,
) -> None:  # fmt: skip
    """Train a model from a recipe. Run it again to resume from its checkpoint. Under torchrun: in several processes."""
    import contextlib
    import io

    from robustlip.cli.console import Out, Progress, choose_device
    from robustlip.files import read_toml
    from robustlip.parallel import launched
    from robustlip.training import load_recipe
    from robustlip.training import train as run

    rank, _, processes = launched()
    if rank:
        with contextlib.redirect_stdout(io.StringIO()):  # only the first process prints
            where = choose_device(device, Out())
            run(recipe, out_folder, device=where, data_dir=data_dir, resume=resume, parallel=parallel)
        return
    out = Out(json, recipe)
    parsed = load_recipe(recipe)
    where = choose_device(device, out)
    if processes > 1:
        out.say(f"{processes} processes ({parallel})")
    with Progress() as progress:

        def advance(step: int, steps: int, figures: dict[str, float]) -> None:
            shown = " ".join(f"{key} {value:.4g}" for key, value in figures.items())
            progress(f"{parsed.name} {shown}", step, steps)

        path = run(parsed, out_folder, device=where, data_dir=data_dir, progress=advance, resume=resume, parallel=parallel)
    card = path.with_suffix(".toml")
    out.json({"model": str(path), "card": read_toml(card, "a card") if card.is_file() else None})
    out.say(f"model: {path}\ncard:  {card}")
