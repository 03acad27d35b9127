"""The optimisers and the constraint of a recipe, learning rates per layer, and the state of optimisers as tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.constraints import Constraint, make_method, targets_of
from robustlip.errors import BadInput, RobustlipError, first_line
from robustlip.layers import Residual
from robustlip.muon import Muon, RowMomentum
from robustlip.parallel import ALONE, World
from robustlip.training.recipe import Recipe
from robustlip.training.reparametrize import trained_weight


def _groups(parameters: Iterable[Tensor], lr: float, model: nn.Module, factor: float) -> list[dict[str, Any]]:
    """One parameter group, or one per learning rate if `factor` scales the rates of earlier residual layers."""
    residuals = [m for m in model.modules() if isinstance(m, Residual)]
    later = {id(p): len(residuals) - 1 - i for i, m in enumerate(residuals) for p in m.parameters()}
    by_rate: dict[float, list[Tensor]] = {}
    for p in parameters:
        by_rate.setdefault(lr * factor ** later.get(id(p), 0), []).append(p)
    return [{"params": members, "lr": rate} for rate, members in by_rate.items()]


def make_optimizers(recipe: Recipe, model: nn.Module, world: World = ALONE) -> list[torch.optim.Optimizer]:
    """Muon for matrices, RowMomentum for embedding tables if the recipe inflates their gradients, AdamW for the rest or for everything."""
    spec = recipe.optimizer

    def groups(parameters: Iterable[Tensor], lr: float) -> list[dict[str, Any]]:
        return _groups(parameters, lr, model, spec.earlier_layers)

    if spec.name == "adamw":
        return [torch.optim.AdamW(groups(model.parameters(), spec.lr), lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    matrices = {id(w): w for m in linears for w in [trained_weight(m)]}
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    unembedding = [trained_weight(m) for m in linears[-1:]]
    by_rows = [
        (rows, inflation, lr or spec.lr)
        for rows, inflation, lr in (
            (embeddings, spec.embedding_inflation, spec.embedding_lr),
            (unembedding, spec.unembedding_inflation, spec.unembedding_lr),
        )
        if rows and inflation is not None
    ]
    tables = {id(w) for rows, *_ in by_rows for w in rows}
    made: list[torch.optim.Optimizer] = []
    if hidden := [w for i, w in matrices.items() if i not in tables]:
        muon = Muon(
            groups(hidden, spec.lr),
            lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, polynomial=spec.polynomial, world=world,
        )  # fmt: skip
        made.append(muon)
    made += [RowMomentum(rows, lr=lr, momentum=spec.momentum, inflation=inflation) for rows, inflation, lr in by_rows]
    rest = [p for p in model.parameters() if id(p) not in matrices and id(p) not in tables]
    if rest:
        made.append(torch.optim.AdamW(groups(rest, spec.adamw_lr), lr=spec.adamw_lr, betas=spec.betas, weight_decay=0.0))
    return made


def make_constraint(recipe: Recipe, model: nn.Module, world: World = ALONE) -> Constraint:
    """The recipe's constraint and its weights; neither projected nor attached yet."""
    part = recipe.constraint
    if part.method == "none":
        return Constraint([], "none", world)
    targets = targets_of(model, part.w_max, per_head=part.per_head, overrides=dict(part.overrides), rows=part.rows)
    method = make_method(part.method, strength=part.strength, polynomial=part.polynomial)
    assert method is not None
    return Constraint(targets, method, world)


def schedule(recipe: Recipe, step: int) -> float:
    """The factor of all learning rates at a step: linear warm-up, then linear decay to `final`."""
    spec, steps = recipe.optimizer, recipe.run.steps
    warm = min(1.0, (step + 1) / spec.warmup) if spec.warmup else 1.0
    return warm * (1 - (1 - spec.final) * step / steps)


def state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything that a run keeps from step to step, as named tensors; those of a sharded model are DTensors (`World.gathered`)."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for o, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{o}.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    return tensors


def restore(model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor], world: World = ALONE) -> None:
    """The inverse of `state_tensors`, from whole tensors, which every process has. Raises BadInput if they do not belong to this model."""
    try:
        _restore(model, optimizers, tensors, world)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        if isinstance(error, RobustlipError):
            raise
        raise BadInput(f"expected the tensors of a training state of this recipe, got others ({first_line(error)}); choose another folder") from None


def _restore(model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor], world: World) -> None:
    weights = model.state_dict()
    named = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict({k: world.shard_like(v, weights[k]) if k in weights else v for k, v in named.items()})
    for o, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        whole = optimizer.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{o}."):
                _, _, i, key = name.split(".", 3)
                # Momenta have the layout of their weights; step counts are equal everywhere.
                like = parameters[int(i)]
                if tensor.dim() and tensor.shape != like.shape:
                    raise ValueError(f"{name} of shape {tuple(tensor.shape)} for a weight of {tuple(like.shape)}")
                state.setdefault(int(i), {})[key] = world.shard_like(tensor, like) if tensor.shape == like.shape else tensor
        whole["state"] = state
        optimizer.load_state_dict(whole)
