"""The loop: step, evaluate, save, and stop with the last good state kept when anything goes wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip.checkpoints import load_tensors, save_model, save_tensors, toml_text
from robustlip.constraints import Constraint, make_method, targets_of
from robustlip.errors import BadInput, RobustlipError
from robustlip.files import write_text
from robustlip.hashing import weights_sha256
from robustlip.layers import Chain
from robustlip.training.compute import Forward
from robustlip.training.ibp import ibp_initialize, ibp_loss, verified_accuracy
from robustlip.training.optimizers import make_optimizers, restore, schedule, state_tensors
from robustlip.training.recipe import Recipe, identity, load_recipe
from robustlip.training.reparametrize import fold, reparametrize
from robustlip.training.source import Source

Figures = dict[str, float]


class TrainingStopped(RobustlipError, RuntimeError):
    """A run that cannot go on: a loss or weights that are not finite, or a state that cannot be written. The last good state is kept."""


def _constraint_of(recipe: Recipe, model: nn.Module) -> Constraint:
    part = recipe.constraint
    if part.method == "none":
        return Constraint([], "none")
    targets = targets_of(model, part.w_max, per_head=part.per_head, overrides=dict(part.overrides), rows=part.rows)
    method = make_method(part.method, strength=part.strength, polynomial=part.polynomial)
    assert method is not None
    return Constraint(targets, method)


@torch.no_grad()
def _evaluate(recipe: Recipe, model: Chain, source: Source, constraint: Constraint, limit: int | None = None) -> Figures:
    """accuracy and mean cross entropy of the plain logits on the test split; the constrained norms, measured, as a fraction of their caps.

    Raises ConstraintViolation when the method guarantees something that does not hold.
    """
    model.eval()
    right = loss = verified = count = 0.0
    device = next(model.parameters()).device
    for x, y in source.evaluation(limit):
        logits = model(x.to(device)).flatten(0, -2)
        target = y.to(device).flatten()
        right += float((logits.argmax(-1) == target).sum())
        loss += float(F.cross_entropy(logits, target, reduction="sum"))
        count += target.numel()
        if recipe.loss.kind == "ibp":
            verified += float(verified_accuracy(model, x.to(device), target, recipe.loss).sum())
    model.train()
    figures = {"accuracy": right / count, "loss": loss / count}
    if recipe.loss.kind == "ibp":
        figures["interval_accuracy"] = verified / count
    if constraint.targets:
        measured = constraint.check()
        figures["norm_over_cap"] = max(measured[t.name] / t.w_max for t in constraint.targets)
    return figures


def _loss(recipe: Recipe, model: Chain, forward: Forward, x: Tensor, y: Tensor, step: int) -> Tensor:
    if recipe.loss.kind == "ibp":
        return ibp_loss(model, x, y.flatten(), recipe.loss, step)
    logits = forward(x).flatten(0, -2)
    return F.cross_entropy(recipe.loss.logit_scale * logits, y.flatten(), label_smoothing=recipe.loss.label_smoothing)


def _remove_leftovers(out: Path, name: str) -> None:
    """Temporary files of a run that was killed while it wrote."""
    for kind in ("state.safetensors", "safetensors", "toml"):
        for path in out.glob(f".{name}.{kind}.*"):
            path.unlink(missing_ok=True)


def train(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    device: str = "cpu",
    data_dir: str | None = None,
    progress: Callable[[int, int, Figures], None] | None = None,
    resume: bool = True,
) -> Path:
    """Train a recipe in the folder `out`; returns the model file out/NAME.safetensors, with its card out/NAME.toml beside it.

    Interrupted runs, killed ones included, continue from out/NAME.state.safetensors when `resume`, and end with the same weights on the same machine;
    a state of another recipe is refused. One run at a time in a folder.
    progress(step, steps, figures) is called after every step; figures hold the evaluation's at those steps that have one.
    Raises BadInput for a bad recipe or a state that does not fit; TrainingStopped when the loss or the weights are not finite or a file cannot
    be written; ConstraintViolation when a guaranteed cap does not hold. The last good state is kept in each case.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    out = Path(out)
    source = Source(recipe, data_dir)
    torch.manual_seed(recipe.seed)
    from robustlip.models.build import build

    config = dict(recipe.model)
    if source.text:
        config.setdefault("vocabulary", source.vocabulary)
    model = build(config)
    if recipe.loss.kind == "ibp":
        ibp_initialize(model)
    reparametrize(model, recipe.reparametrization)
    model = model.to(device).train()
    optimizers = make_optimizers(recipe, model)
    constraint = _constraint_of(recipe, model)
    constraint.project()
    for optimizer in optimizers:
        constraint.attach(optimizer)
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    state_path = out / f"{recipe.name}.state.safetensors"
    _remove_leftovers(out, recipe.name)
    first, seconds, history = 0, 0.0, []
    if resume and state_path.exists():
        tensors, header = load_tensors(state_path)
        if header.get("recipe_sha256") != identity(recipe):
            raise BadInput(f"expected a state of recipe {recipe.name}, got one of another recipe in {state_path}; choose another folder")
        restore(model, optimizers, tensors)
        first, seconds, history = header["step"], header["seconds"], header["history"]
        source.restore(header.get("data"))

    def save_state(step: int) -> None:
        tensors = state_tensors(model, optimizers)
        if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
            raise TrainingStopped(
                f"expected finite weights after step {step}, got NaN or infinity in {broken[0]}; the last state is kept in {state_path}: "
                f"lower the learning rate"
            )
        header = {"recipe_sha256": identity(recipe), "step": step, "seconds": seconds, "history": history, "data": source.state(step)}
        _write(lambda: save_tensors(state_path, tensors, header), state_path, step)

    forward = Forward(recipe, model, source.batch(first)[0].to(device))
    for step in range(first, recipe.run.steps):
        started = time.perf_counter()
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(recipe, step)
        x, y = (t.to(device) for t in source.batch(step))
        loss = _loss(recipe, model, forward, x, y, step)
        if not math.isfinite(loss.item()):
            raise TrainingStopped(
                f"expected a finite loss, got {loss.item()} at step {step}; the last state is kept in {state_path}: lower the learning rate"
            )
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.optimizer.clip_gradient is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_gradient)
        for optimizer in optimizers:
            optimizer.step()
        seconds += time.perf_counter() - started
        figures = {"train_loss": loss.item(), "seconds": seconds}
        if (step + 1) % recipe.run.evaluate_every == 0 and step + 1 < recipe.run.steps:
            figures |= _evaluate(recipe, model, source, constraint, limit=64)
            history.append({"step": step + 1, **figures})
        if (step + 1) % recipe.run.checkpoint_every == 0 and step + 1 < recipe.run.steps:
            save_state(step + 1)
        if progress is not None:
            progress(step + 1, recipe.run.steps, figures)

    # A run that was killed after its last state has its last line already.
    history = [line for line in history if line["step"] < recipe.run.steps]
    history.append({"step": recipe.run.steps, **_evaluate(recipe, model, source, constraint), "seconds": seconds})
    save_state(recipe.run.steps)
    fold(model)
    path = out / f"{recipe.name}.safetensors"
    _write(lambda: save_model(path, model.eval().cpu()), path, recipe.run.steps)
    muon = next((o for o in optimizers if hasattr(o, "update_norm")), None)
    card = _card(recipe, model, source, constraint, history)
    if muon is not None:
        card["update_norm_rms"] = muon.update_norm(recipe.optimizer.lr)  # type: ignore[operator]
    write_text(path.with_suffix(".toml"), toml_text(card))
    return path


def _write(write: Callable[[], None], path: Path, step: int) -> None:
    """Run `write`, which replaces a file whole or not at all. Raises TrainingStopped when the place is full or cannot be written."""
    from safetensors import SafetensorError

    try:
        write()
    except (OSError, SafetensorError) as error:
        raise TrainingStopped(
            f"expected room to write {path} at step {step}, got an error ({error}); the last state is kept: make room and start again, it goes on"
        ) from error


def _card(recipe: Recipe, model: Chain, source: Source, constraint: Constraint, history: list[Figures]) -> dict[str, Any]:
    from robustlip import __version__
    from robustlip.certifiers import lipschitz_bound

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
