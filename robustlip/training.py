"""Training from a recipe, resumable at any step: AdamW or Muon, a constraint attached to the optimiser, a model file and a card at the end.

The batch of step t is drawn by a generator seeded with (seed, t) and nothing else is random, so a resumed run takes the same steps.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from torch import Tensor, nn

from robustlip.checkpoints import load_tensors, save_model, save_tensors, toml_text
from robustlip.constraints import Constraint, targets_of
from robustlip.errors import BadInput
from robustlip.files import write_text
from robustlip.hashing import weights_sha256
from robustlip.layers import Chain
from robustlip.muon import Muon


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataPart(_Strict):
    """name: what load_data takes, without a split. context: tokens of a training window (text only)."""

    name: str
    context: PositiveInt = 256


class OptimizerPart(_Strict):
    """muon: matrices by Muon, all else by AdamW at adamw_lr; adamw: everything by AdamW at lr. Both rates decay linearly to final·rate.

    lr of Muon is the RMS→RMS norm of an update. warmup: steps of linear increase. clip_gradient: largest ℓ2 norm of the whole gradient.
    """

    name: Literal["muon", "adamw"] = "adamw"
    lr: PositiveFloat
    adamw_lr: PositiveFloat = 1e-3
    momentum: float = Field(0.9, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0)
    final: float = Field(0.0, ge=0, le=1)
    clip_gradient: PositiveFloat | None = None


class ConstraintPart(_Strict):
    """See robustlip.constraints: method, cap in RMS units, per head or whole, caps of single weights by pattern."""

    method: Literal["none", "spectral-normalize", "soft-cap"] = "none"
    w_max: PositiveFloat = 1.0
    per_head: bool = True
    overrides: dict[str, PositiveFloat] = Field(default_factory=dict)


class LossPart(_Strict):
    """Cross entropy of logit_scale·logits: a bounded model cannot grow its logits, so the loss has to say how sharp they should count."""

    logit_scale: PositiveFloat = 1.0
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    input_noise: float = Field(default=0.0, ge=0)


class RunPart(_Strict):
    steps: PositiveInt
    batch: PositiveInt
    evaluate_every: PositiveInt = 200
    checkpoint_every: PositiveInt = 100


class Recipe(_Strict):
    """A recipe file. Unknown keys are errors."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    description: str = ""
    paper: str = ""
    caveats: str = ""
    seed: int = 0
    model: dict[str, Any]
    data: DataPart
    optimizer: OptimizerPart
    constraint: ConstraintPart = ConstraintPart()
    loss: LossPart = LossPart()
    run: RunPart


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe. Raises BadInput with the file, the key and the remedy."""
    path = Path(path)
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError:
        raise BadInput(f"expected a recipe file, got {path}, which cannot be read; check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"expected a TOML recipe, got {path.name}, which is not TOML ({error}); correct that line") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"expected a valid recipe in {path.name}, got '{where}': {first['msg']}; correct or remove that key") from None


def _step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


class _Source:
    """Batches by step number, and a fixed evaluation set as an iterator of batches."""

    def __init__(self, recipe: Recipe, data_dir: str | None) -> None:
        from robustlip.data import load_data, load_tokens

        self.recipe = recipe
        self.text = "gpt" in str(recipe.model.get("kind"))
        self.context = recipe.data.context
        self.vocabulary: str | None = None
        self.note = ""
        if self.text:
            self.train, self.vocabulary, self.note = load_tokens(f"{recipe.data.name}:train", data_dir=data_dir)
            self.test, _, _ = load_tokens(f"{recipe.data.name}:test", data_dir=data_dir, vocabulary=self.vocabulary)
        else:
            train, test = (load_data(f"{recipe.data.name}:{split}", data_dir=data_dir) for split in ("train", "test"))
            self.x, self.y, self.test_x, self.test_y, self.note = train.x, train.y, test.x, test.y, train.note

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = _step_generator(self.recipe.seed, step)
        size = self.recipe.run.batch
        if self.text:
            start = torch.randint(len(self.train) - self.context - 1, (size,), generator=generator)
            window = self.train[start[:, None] + torch.arange(self.context + 1)]
            return window[:, :-1], window[:, 1:]
        pick = torch.randint(len(self.x), (size,), generator=generator)
        x = self.x[pick]
        if self.recipe.loss.input_noise:
            x = x + self.recipe.loss.input_noise * torch.randn(x.shape, generator=generator)
        return x, self.y[pick]

    def evaluation(self, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the test split: images all; text as consecutive windows, every position predicted. limit: windows."""
        if self.text:
            count = (len(self.test) - 1) // self.context
            kept = range(count) if limit is None else range(0, count, max(1, count // limit))
            starts = torch.tensor([i * self.context for i in kept])
            for part in starts.split(16):
                window = self.test[part[:, None] + torch.arange(self.context + 1)]
                yield window[:, :-1], window[:, 1:]
        else:
            yield from zip(self.test_x.split(1000), self.test_y.split(1000), strict=True)


def _make_optimizers(recipe: Recipe, model: nn.Module) -> list[torch.optim.Optimizer]:
    spec = recipe.optimizer
    if spec.name == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)]
    matrices = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    rest = [p for p in model.parameters() if id(p) not in matrices]
    muon = Muon(list(matrices.values()), lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
    return [muon] + ([torch.optim.AdamW(rest, lr=spec.adamw_lr, betas=spec.betas, weight_decay=0.0)] if rest else [])


def _schedule(recipe: Recipe, step: int) -> float:
    spec, steps = recipe.optimizer, recipe.run.steps
    warm = min(1.0, (step + 1) / spec.warmup) if spec.warmup else 1.0
    return warm * (1 - (1 - spec.final) * step / steps)


def _state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for o, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{o}.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    return tensors


def _restore(model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for o, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{o}."):
                _, _, i, key = name.split(".", 3)
                state.setdefault(int(i), {})[key] = tensor
        whole["state"] = state
        optimizer.load_state_dict(whole)


@torch.no_grad()
def _evaluate(model: Chain, source: _Source, limit: int | None = None) -> tuple[float, float]:
    """(accuracy, mean cross entropy of the plain logits) on the test split."""
    model.eval()
    right = loss = count = 0.0
    device = next(model.parameters()).device
    for x, y in source.evaluation(limit):
        logits = model(x.to(device)).flatten(0, -2)
        target = y.to(device).flatten()
        right += float((logits.argmax(-1) == target).sum())
        loss += float(F.cross_entropy(logits, target, reduction="sum"))
        count += target.numel()
    model.train()
    return right / count, loss / count


def train(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    device: str = "cpu",
    data_dir: str | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    resume: bool = True,
) -> Path:
    """Train a recipe in the folder `out`; returns the model file out/NAME.safetensors, with its card out/NAME.toml beside it.

    Interrupted runs continue from out/NAME.state.safetensors when `resume`; a state of another recipe is refused.
    progress(step, steps, figures) is called after evaluations and now and then between.
    Raises BadInput for a bad recipe or a state that does not fit, RuntimeError when the loss is not finite (the last state is kept).
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    out = Path(out)
    source = _Source(recipe, data_dir)
    torch.manual_seed(recipe.seed)
    from robustlip.models.build import build

    config = dict(recipe.model)
    if source.text:
        config.setdefault("vocabulary", source.vocabulary)
    model = build(config).to(device).train()
    optimizers = _make_optimizers(recipe, model)
    part = recipe.constraint
    constraint = Constraint(
        targets_of(model, part.w_max, per_head=part.per_head, overrides=dict(part.overrides)) if part.method != "none" else [], part.method
    )
    constraint.project()
    for optimizer in optimizers:
        constraint.attach(optimizer)
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    identity = hashlib.sha256(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
    state_path = out / f"{recipe.name}.state.safetensors"
    first, seconds, history = 0, 0.0, []
    if resume and state_path.exists():
        tensors, header = load_tensors(state_path)
        if header.get("recipe_sha256") != identity:
            raise BadInput(f"expected a state of recipe {recipe.name}, got one of another recipe in {state_path}; choose another folder")
        _restore(model, optimizers, tensors)
        first, seconds, history = header["step"], header["seconds"], header["history"]

    def save_state(step: int) -> None:
        header = {"recipe_sha256": identity, "step": step, "seconds": seconds, "history": history}
        save_tensors(state_path, _state_tensors(model, optimizers), header)

    for step in range(first, recipe.run.steps):
        started = time.perf_counter()
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _schedule(recipe, step)
        x, y = (t.to(device) for t in source.batch(step))
        logits = model(x).flatten(0, -2)
        loss = F.cross_entropy(recipe.loss.logit_scale * logits, y.flatten(), label_smoothing=recipe.loss.label_smoothing)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss became {loss.item()} at step {step}; the last state is kept in {state_path}: lower the learning rate")
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
            figures["accuracy"], figures["loss"] = _evaluate(model, source, limit=64)
            history.append({"step": step + 1, **figures})
        if (step + 1) % recipe.run.checkpoint_every == 0 and step + 1 < recipe.run.steps:
            save_state(step + 1)
        if progress is not None:
            progress(step + 1, recipe.run.steps, figures)

    accuracy, loss_value = _evaluate(model, source)
    history.append({"step": recipe.run.steps, "accuracy": accuracy, "loss": loss_value, "seconds": seconds})
    save_state(recipe.run.steps)
    return _finish(recipe, model.eval().cpu(), source, constraint, history, out)


def _finish(recipe: Recipe, model: Chain, source: _Source, constraint: Constraint, history: list[dict[str, float]], out: Path) -> Path:
    from robustlip import __version__
    from robustlip.certifiers import lipschitz_bound

    path = out / f"{recipe.name}.safetensors"
    save_model(path, model)
    measured = constraint.measured()
    card = {
        "name": recipe.name,
        "description": recipe.description,
        "paper": recipe.paper,
        "caveats": recipe.caveats,
        "data": recipe.data.name,
        "data_note": source.note,
        "seed": recipe.seed,
        "val_accuracy": history[-1]["accuracy"],
        "val_loss": history[-1]["loss"],
        "steps": recipe.run.steps,
        "train_seconds": round(history[-1]["seconds"], 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_sha256": weights_sha256(model),
        "versions": {"robustlip": __version__, "torch": torch.__version__},
        "largest_constrained_norm_rms": max(measured.values()) if measured else None,
        "recipe": recipe.model_dump(mode="json", exclude_none=True, exclude={"name", "description", "paper", "caveats", "seed"}),
    }
    card["bound"] = lipschitz_bound(model)
    write_text(path.with_suffix(".toml"), toml_text(card))
    return path

