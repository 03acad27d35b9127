"""The training loop: step, evaluate, save; after an error it stops and the last good state is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.checkpoints import planned, save_model
from robustlip.constraints import Constraint
from robustlip.errors import BadInput
from robustlip.files import write_text
from robustlip.hashing import weights_sha256
from robustlip.layers import Chain, Residual
from robustlip.locks import sole_writer
from robustlip.parallel import ALONE, World, joined
from robustlip.toml import toml_text
from robustlip.training.adversarial import adversarial_loss
from robustlip.training.compute import Forward
from robustlip.training.ibp import ibp_initialize, ibp_loss, verified_accuracy
from robustlip.training.losses import margin_loss
from robustlip.training.objective import cross_entropy
from robustlip.training.optimizers import make_constraint, make_optimizers, restore, schedule, state_tensors
from robustlip.training.recipe import Recipe, identity, load_recipe
from robustlip.training.reparametrize import fold, reparametrize
from robustlip.training.source import Source
from robustlip.training.start import start_from
from robustlip.training.state import (
    TrainingStopped,
    kept,
    load_state,
    make_folder,
    refuse_to_replace,
    remove_leftovers,
    save_state,
    state_file,
    write,
)

Figures = dict[str, float]


def _loss(recipe: Recipe, model: Chain, forward: Forward, x: Tensor, y: Tensor, step: int) -> Tensor:
    if recipe.loss.kind == "ibp":
        return ibp_loss(model, x, y.flatten(), recipe.loss, step)
    if recipe.loss.kind == "margin":
        return margin_loss(model, x, y.flatten(), recipe.loss, step)
    if recipe.loss.kind == "adversarial":
        return adversarial_loss(model, x, y, recipe.loss, step)
    return cross_entropy(forward(x), y, recipe.loss)


@torch.no_grad()
def _sums(recipe: Recipe, model: Chain, x: Tensor, y: Tensor) -> Tensor:
    """Sums over the predictions for x: number correct, cross entropy of the plain logits, number verified by intervals, count. (4,) float64."""
    logits, target = model(x).flatten(0, -2), y.flatten()
    right, loss = (logits.argmax(-1) == target).sum(), F.cross_entropy(logits, target, reduction="sum")
    verified = verified_accuracy(model, x, target, recipe.loss).sum() if recipe.loss.kind == "ibp" else torch.zeros_like(right)
    return torch.stack([right.double(), loss.double(), verified.double(), torch.full_like(loss, target.numel(), dtype=torch.float64)])


class _Pass(nn.Module):
    """All uses of the model as one module, because gathering weights and averaging gradients over processes happens when a module is called.

    A batch and its step → the loss; a batch and None → the sums of an evaluation.
    """

    def __init__(self, recipe: Recipe, model: Chain, training: Forward) -> None:
        super().__init__()
        self.recipe, self.model, self.run = recipe, model, training

    def forward(self, x: Tensor, y: Tensor, step: int | None) -> Tensor:
        if step is None:
            return _sums(self.recipe, self.model, x, y)
        return _loss(self.recipe, self.model, self.run, x, y, step)


@torch.no_grad()
def _evaluate(run: nn.Module, source: Source, constraint: Constraint, world: World, limit: int | None = None) -> Figures:
    """Accuracy and mean cross entropy of the plain logits on the test split; and the measured constrained norms, as fractions of their caps.

    run: a _Pass. Each process evaluates its rows of every batch. Raises ConstraintViolation if a guarantee of the method does not hold.
    """
    run.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    for x, y in source.evaluation(limit):
        rows = world.rows(len(x))
        # A forward pass is collective: a process without rows runs one whose result is not used.
        counts = rows.start < rows.stop
        part = run(*(t[rows if counts else slice(1)].to(world.device) for t in (x, y)), None)
        sums += part if counts else torch.zeros_like(part)
    run.train()
    right, loss, verified, count = world.total(sums).tolist()
    figures = {"accuracy": right / count, "loss": loss / count}
    if source.recipe.loss.kind == "ibp":
        figures["interval_accuracy"] = verified / count
    if constraint.targets:
        measured = constraint.check()
        figures["norm_over_cap"] = max(measured[t.name] / t.w_max for t in constraint.targets)
    return figures


def _check_parallel(recipe: Recipe, world: World) -> None:
    """Raises BadInput for a recipe whose result would depend on the number of processes."""
    if recipe.run.batch % world.size:
        raise BadInput(
            f"expected a batch that {world.size} processes can divide equally, got {recipe.run.batch}; change one of them"
        )
    if world.size > 1 and recipe.loss.kind == "ibp" and recipe.loss.regularizer > 0:
        raise BadInput(
            f"expected one process for a loss of kind 'ibp', got {world.size}: its regularisers are ratios of means over the whole batch; "
            f"start one process, or set loss.regularizer = 0"
        )
    if world.size > 1 and world.sharded and recipe.reparametrization != "none":
        raise BadInput(
            f"expected weights without a reparametrization under fsdp, got {recipe.reparametrization!r}, whose scalars cannot be sharded; use ddp"
        )


def train(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    device: str = "cpu",
    data_dir: str | None = None,
    progress: Callable[[int, int, Figures], None] | None = None,
    resume: bool = True,
    parallel: str = "ddp",
) -> Path:
    """Train a recipe in the folder `out`; returns the model file out/NAME.safetensors, with its card out/NAME.toml in the same folder.

    With `resume`, interrupted or killed runs continue from out/NAME.state.safetensors, and end with the same weights on the same machine.
    A state of another recipe is refused, and so is overwriting it, or overwriting a model without a state. Only one run at a time may use a folder.
    Under torchrun all processes train one model: each computes its rows of every batch, matrix operations are distributed, rank 0 writes. parallel:
    'ddp', whole weights in each process, or 'fsdp', shards (robustlip.parallel). Weights are those of one process up to rounding, and states can be
    resumed with another number of processes; all of them must have access to `out`.
    progress(step, steps, figures) is called after every step; figures contain evaluation results at the steps that have an evaluation.
    Raises BadInput for an invalid recipe or state; TrainingStopped if the loss or the weights are not finite or a file cannot
    be written; ConstraintViolation if a guaranteed cap does not hold. The last good state is kept in each case.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    with joined(device, parallel) as world:
        _check_parallel(recipe, world)
        with ExitStack() as held:
            return _run(recipe, Path(out), world, data_dir, progress, resume, held)


def _run(
    recipe: Recipe, out: Path, world: World, data_dir: str | None, progress: Callable[[int, int, Figures], None] | None, resume: bool, held: ExitStack
) -> Path:  # fmt: skip
    source = world.on_all(lambda: Source(recipe, data_dir))
    world.on_all(lambda: make_folder(out))
    world.on_first(lambda: held.enter_context(sole_writer(out, "training")))  # held by the process that writes, until the run ends
    world.on_all(lambda: refuse_to_replace(recipe, out, resume=resume))
    torch.manual_seed(recipe.seed)
    from robustlip.models.build import build

    config = dict(recipe.model)
    if source.text:
        config.setdefault("vocabulary", source.vocabulary)
    planned(build, config)  # raises BadInput before memory is allocated for a model that is too large
    model = build(config)
    world.on_all(lambda: source.check(model))
    if recipe.loss.kind == "ibp":
        ibp_initialize(model)

    state_path = state_file(out, recipe.name)
    if world.first:
        remove_leftovers(out, recipe.name)
    first, seconds, history, saved, start = 0, 0.0, [], None, recipe.run.start_from
    started_from: str | None = None
    if resume and world.broadcast(state_path.exists()):
        saved, header = world.on_all(lambda: load_state(recipe, state_path))
        first, seconds, history, started_from = header["step"], header["seconds"], header["history"], header.get("start_weights_sha256")
        world.on_all(lambda: source.restore(header.get("data")))
    elif start is not None:
        started_from = world.on_all(lambda: start_from(model, start, recipe.run.start_sha256))
    reparametrize(model, recipe.reparametrization)
    model = model.to(world.device).train()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        x, y = (t[world.rows(recipe.run.batch)].to(world.device) for t in source.batch(step))
        return x, y

    # Other losses read weights outside of the layers' forward passes; for them the only block is the whole model.
    blocks = [] if recipe.loss.kind != "cross-entropy" else [m for m in model.modules() if isinstance(m, Residual)]
    # Compiled before the hooks of processes are added, and before the optimisers get its parameters.
    forward = world.on_all(lambda: Forward(recipe, model, batch(first)[0], blocks if world.sharded else ()))
    run = world.wrap(_Pass(recipe, model, forward), blocks)
    optimizers = make_optimizers(recipe, model, world)
    constraint = make_constraint(recipe, model, world)
    constraint.project()
    constraint.attach(*optimizers)
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    if saved is not None:
        restore(model, optimizers, saved, world)
        saved = None  # free memory: it is as large as all trained tensors

    def save(step: int) -> None:
        tensors = world.gathered(state_tensors(model, optimizers))
        header = {"recipe_sha256": identity(recipe), "step": step, "seconds": seconds, "history": history, "data": source.state(step)}
        if started_from is not None:
            header["start_weights_sha256"] = started_from
        world.on_first(lambda: save_state(state_path, tensors, header))

    for step in range(first, recipe.run.steps):
        started = time.perf_counter()
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(recipe, step)
        x, y = world.on_all(partial(batch, step))
        loss = run(x, y, step)
        train_loss = world.total(loss.detach()).item() / world.size
        if not math.isfinite(train_loss):
            raise TrainingStopped(
                f"expected a finite loss, got {train_loss} at step {step}; {kept(state_path)}: lower the learning rate"
            )
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.optimizer.clip_gradient is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_gradient)
        for optimizer in optimizers:
            optimizer.step()
        seconds += time.perf_counter() - started
        figures = {"train_loss": train_loss, "seconds": seconds}
        if (step + 1) % recipe.run.evaluate_every == 0 and step + 1 < recipe.run.steps:
            figures |= _evaluate(run, source, constraint, world, limit=64)
            history.append({"step": step + 1, **figures})
        if (step + 1) % recipe.run.checkpoint_every == 0 and step + 1 < recipe.run.steps:
            save(step + 1)
        if progress is not None:
            progress(step + 1, recipe.run.steps, figures)

    # A run that was killed after its last state already has this line.
    history = [line for line in history if line["step"] < recipe.run.steps]
    history.append({"step": recipe.run.steps, **_evaluate(run, source, constraint, world), "seconds": seconds})
    save(recipe.run.steps)
    path = out / f"{recipe.name}.safetensors"
    if world.sharded:
        weights, model = world.gathered(model.state_dict()), build(config)
        if world.first:
            model.load_state_dict(weights)
    muon = next((o for o in optimizers if hasattr(o, "update_norm")), None)
    update_norm = None if muon is None else muon.update_norm(recipe.optimizer.lr)  # type: ignore[operator]

    def write_model() -> None:
        fold(model)
        write(lambda: save_model(path, model.eval().cpu()), path, recipe.run.steps)
        card = _card(recipe, model, source, history)
        if started_from is not None:
            card["start_weights_sha256"] = started_from
        if update_norm is not None:
            card["update_norm_rms"] = update_norm
        write_text(path.with_suffix(".toml"), toml_text(card))

    world.on_first(write_model)
    return path


def _card(recipe: Recipe, model: Chain, source: Source, history: list[Figures]) -> dict[str, Any]:
    """The card of the saved model, computed by one process."""
    from robustlip import __version__
    from robustlip.certifiers import lipschitz_bound

    constraint = make_constraint(recipe, model, ALONE)
    measured = constraint.measured()
    last = history[-1]
    card: dict[str, Any] = {
        "name": recipe.name,
        "description": recipe.description,
        "paper": recipe.paper,
        "caveats": recipe.caveats,
        "data": recipe.data.name,
        "data_note": source.note,
        "seed": recipe.seed,
        "val_accuracy": last["accuracy"],
        "val_loss": last["loss"],
        "interval_accuracy": last.get("interval_accuracy"),
        "steps": recipe.run.steps,
        "train_seconds": round(last["seconds"], 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_sha256": weights_sha256(model),
        "versions": {"robustlip": __version__, "torch": torch.__version__},
        "guarantee": f"{recipe.constraint.method}: {constraint.guarantee}",
        "largest_constrained_norm_rms": max(measured.values()) if measured else None,
        "constrained_norms_rms": measured,
        "recipe": recipe.model_dump(mode="json", exclude_none=True, exclude={"name", "description", "paper", "caveats", "seed"}),
    }
    columns = [key for key in ("step", "accuracy", "loss", "interval_accuracy", "norm_over_cap", "seconds") if key in last]
    card["history"] = {key: [line.get(key, math.nan) for line in history] for key in columns}
    card["bound"] = lipschitz_bound(model)
    return card
