"""Run by torchrun for tests/test_parallel.py: two processes execute a job together; each writes its results to OUT/RANK.json.

The job, JSON: out, a folder; recipe, a recipe file; recipes {name: recipe}; modes {name: [mode, …]}; refused [[name, changes, mode], …].
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import robustlip.muon
import robustlip.training.loop as loop
import robustlip.training.state as state
from robustlip import cli
from robustlip.constraints import METHODS, Constraint, HardCap, SoftCap, Target
from robustlip.errors import BadInput
from robustlip.layers import Residual
from robustlip.models.build import build
from robustlip.muon import Muon, RowMomentum
from robustlip.parallel import ALONE, World
from robustlip.training import Recipe, train

Seen = dict[str, Any]
MODES = ("ddp", "fsdp")
SHAPES = [(6, 5), (5, 6), (6, 5), (1, 4), (7, 3), (6, 5)]


class Stop(Exception):
    pass


def attempt(seen: Seen, name: str, work: Callable[[], Any]) -> None:
    """The value that this process got, or the kind and the words of its error."""
    try:
        seen[name] = str(work())
    except Exception as error:
        seen[name] = [type(error).__name__, str(error)]


def training(job: dict[str, Any], seen: Seen) -> None:
    def stop(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 3:
            raise Stop

    def run(name: str, mode: str, folder: str, **options: Any) -> Path:
        return train(Recipe.model_validate(job["recipes"][name]), Path(job["out"]) / folder, parallel=mode, **options)

    for mode in MODES:
        for name in job["recipes"]:
            if mode in job["modes"][name]:
                attempt(seen, f"{name}-{mode}", lambda: run(name, mode, f"{name}-{mode}"))  # noqa: B023
        attempt(seen, f"stopped-{mode}", lambda: run("gpt", mode, f"stopped-{mode}", progress=stop))  # noqa: B023
        attempt(seen, f"resumed-{mode}", lambda: run("gpt", mode, f"one-to-{mode}"))  # noqa: B023


def sharing(job: dict[str, Any], seen: Seen) -> None:
    """How many matrices each process orthogonalises, caps and measures in one step."""
    for mode in MODES:
        world = World(dist.get_rank(), 2, mode == "fsdp")
        model = build({"kind": "lipschitz-gpt", "vocabulary": "abc", "width": 8, "heads": 2, "blocks": 2})
        run = world.wrap(model, [m for m in model.modules() if isinstance(m, Residual)])
        matrices = {n: p for n, p in model.named_parameters() if "embed" not in n}
        optimizer = Muon(matrices.values(), lr=0.1, world=world)
        constraint = Constraint([Target(n, p, 1.0) for n, p in matrices.items()], "hard-cap", world)
        constraint.project()
        constraint.attach(optimizer)
        run(torch.randint(3, (2, 5), generator=torch.Generator().manual_seed(dist.get_rank()))).square().sum().backward()
        counts = dict.fromkeys(("muon", "caps", "norms"), 0)

        def counted(kind: str, function: Callable[..., Tensor], *arguments: Any) -> Any:
            counts[kind] += len(next(a for a in arguments if isinstance(a, Tensor)))  # noqa: B023
            return function(*arguments)

        orthogonalize, cap, bound = robustlip.muon.orthogonalize, HardCap.__call__, robustlip.constraints.targets.spectral_norm_bound
        with (
            patch("robustlip.muon.orthogonalize", lambda *a: counted("muon", orthogonalize, *a)),  # noqa: B023
            patch.object(HardCap, "__call__", lambda *a: counted("caps", cap, *a)),  # noqa: B023
            patch("robustlip.constraints.targets.spectral_norm_bound", lambda *a: counted("norms", bound, *a)),  # noqa: B023
        ):
            optimizer.step()
            constraint.check()
        seen[f"sharing-{mode}"] = {**counts, "all": len(matrices)}


def pieces(job: dict[str, Any], seen: Seen) -> None:
    """Muon, row momentum and every method in float64, where rounding hides nothing: the largest difference from one process, weights and norms."""
    mesh = init_device_mesh("cpu", (2,))

    def place(whole: Tensor, world: World) -> Tensor:
        return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None) if world.sharded else whole.clone()

    def final(method: str, world: World) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)

        def drawn(shape: tuple[int, ...]) -> Tensor:
            return place(torch.randn(shape, generator=generator, dtype=torch.float64), world)

        weights = [nn.Parameter(drawn(shape)) for shape in SHAPES]
        heads = {0: (2, 0), 1: (3, 1), 5: (2, 0)}  # (slices, axis)
        targets = [Target(str(i), w, 0.9 + 0.1 * i, *heads.get(i, (1, 0)), rows=i == 4) for i, w in enumerate(weights)]
        constraint = Constraint(targets, method, world)
        constraint.project()
        muon = Muon([{"params": weights[:2], "lr": 0.02}, {"params": [*weights[2:4], weights[5]], "lr": 0.03}], weight_decay=0.1, world=world)
        rows = RowMomentum([weights[4]], lr=0.5)
        constraint.attach(muon, rows)
        for _ in range(2):
            for w in weights:
                w.grad = drawn(tuple(w.shape))
            muon.step()
            rows.step()
        ended: list[Any] = [w.detach() for w in weights]
        return [*(w.full_tensor() if world.sharded else w for w in ended), torch.tensor(list(constraint.measured().values()))]

    for method in METHODS:
        alone = final(method, ALONE)
        for mode in MODES:
            pairs = zip(alone, final(method, World(dist.get_rank(), 2, mode == "fsdp")), strict=True)
            seen[f"pieces-{method}-{mode}"] = max(float((a - b).abs().max()) for a, b in pairs)


def wrong(job: dict[str, Any], seen: Seen) -> None:
    """Something is wrong in one process only."""
    rank = dist.get_rank()
    loss, batch, cap = loop._loss, loop.Source.batch, SoftCap.__call__

    def not_finite(*arguments: Any) -> Tensor:
        return loss(*arguments) * (float("nan") if rank == 1 and arguments[-1] == 3 else 1.0)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    def grown(*arguments: Any) -> Tensor:
        return cap(*arguments) * (1.5 if rank == 1 else 1.0)

    def failing(error: Exception) -> Callable[[loop.Source, int], tuple[Tensor, Tensor]]:
        def drawn(source: loop.Source, step: int) -> tuple[Tensor, Tensor]:
            if rank == 1 and step == 1:
                raise error
            return batch(source, step)

        return drawn

    changes = {
        "loss": lambda: patch.object(loop, "_loss", not_finite),
        "write": lambda: patch.object(state, "save_tensors", full),  # called by the first alone
        "violation": lambda: patch.object(SoftCap, "__call__", grown),
        "data": lambda: patch.object(loop.Source, "batch", failing(BadInput("expected data, got none; bring some"))),
        "bug": lambda: patch.object(loop.Source, "batch", failing(KeyError("no such thing"))),
    }
    spec = Recipe.model_validate(job["recipes"]["mlp"])
    for mode in MODES:
        for name, change in changes.items():
            with change():
                attempt(seen, f"{name}-{mode}", lambda: train(spec, Path(job["out"]) / f"{name}-{mode}", parallel=mode))  # noqa: B023


def refused(job: dict[str, Any], seen: Seen) -> None:
    for name, changes, mode in job["refused"]:
        spec = Recipe.model_validate({**job["recipes"]["mlp"], **changes})
        attempt(seen, name, lambda: train(spec, Path(job["out"]) / "refused", parallel=mode))  # noqa: B023


def command_line(job: dict[str, Any], seen: Seen) -> None:
    """`robustlip train RECIPE`, which joins the processes by itself; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        cli.main(["train", job["recipe"], "--out", f"{job['out']}/command", "--device", "cpu"])
    seen["command"] = printed.getvalue()


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    seen: Seen = {}
    command_line(job, seen)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{job['out']}/store", rank=rank, world_size=2)
    for part in (training, sharing, pieces, wrong, refused):
        part(job, seen)
    (Path(job["out"]) / f"{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as robustlip.__main__ does: gloo's threads outlive the interpreter


if __name__ == "__main__":
    main()
