"""The files of a run: its state, which is replaced atomically, and the protection against overwriting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustlip.checkpoints import load_header, load_tensors, save_tensors
from robustlip.errors import BadInput, RobustlipError
from robustlip.hashing import tensors_sha256
from robustlip.training.recipe import Recipe, identity


class TrainingStopped(RobustlipError, RuntimeError):
    """A run that cannot continue: a loss or weights that are not finite, or a state that cannot be written. The last good state is kept."""


def state_file(out: Path, name: str) -> Path:
    return out / f"{name}.state.safetensors"


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"expected a folder for the run, got {out} ({error.strerror}); name another with --out") from None


def remove_leftovers(out: Path, name: str) -> None:
    """Remove temporary files of a run that was killed while it wrote them."""
    for kind in ("state.safetensors", "safetensors", "toml"):
        for path in out.glob(f".{name}.{kind}.*"):
            path.unlink(missing_ok=True)


def refuse_to_replace(recipe: Recipe, out: Path, *, resume: bool) -> None:
    """Raises BadInput if the run would overwrite weights of another recipe; without `resume` a recipe starts again, but only over its own files.

    A state that cannot be read is not a reason to refuse, because starting again is the remedy. `load_state` checks a state to resume from.
    """
    state, model = state_file(out, recipe.name), out / f"{recipe.name}.safetensors"
    if not state.exists():
        if model.exists():
            raise BadInput(
                f"expected no model at the path of the new one, got {model} without a state to resume from; choose another folder, or remove it"
            )
    elif not resume:
        try:
            header = load_header(state)
        except BadInput:
            return
        _check_recipe(recipe, header, state)


def _check_recipe(recipe: Recipe, header: dict[str, Any], path: Path) -> None:
    if header.get("recipe_sha256") != identity(recipe):
        raise BadInput(f"expected a state of recipe {recipe.name}, got one of another recipe in {path}; choose another folder")


def load_state(recipe: Recipe, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a state to resume from. Raises BadInput for a state of another recipe, a damaged one, or one with an invalid header."""
    tensors, header = load_tensors(path)
    _check_recipe(recipe, header, path)
    step = header.get("step")
    history, seconds = header.get("history"), header.get("seconds")
    whole = isinstance(history, list) and all(isinstance(line, dict) and type(line.get("step")) is int for line in history)
    if not whole or isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise BadInput(f"expected a state with its history and seconds, got another header in {path}; remove it, or choose another folder")
    if not (type(step) is int and 0 <= step <= recipe.run.steps):
        raise BadInput(f"expected a state of at most {recipe.run.steps} steps, got step {step!r} in {path}; remove it, or choose another folder")
    # States of the first versions have no hash.
    if header.get("tensors_sha256", "") not in ("", tensors_sha256(tensors)):
        raise BadInput(f"expected the tensors that were written to {path}, got others by their SHA-256: the file is damaged; remove it or restore it")
    return tensors, header


def kept(path: Path) -> str:
    """The part of an error message that says which state is kept."""
    return f"the last state is kept in {path}" if path.is_file() else "there is no state yet"


def save_state(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Replace the state by that of step header['step']. Raises TrainingStopped, and keeps the last one, for NaN, infinity or a full disk."""
    step = header["step"]
    if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise TrainingStopped(
            f"expected finite weights after step {step}, got NaN or infinity in {broken[0]}; {kept(path)}: lower the learning rate"
        )
    write(lambda: save_tensors(path, tensors, {**header, "tensors_sha256": tensors_sha256(tensors)}), path, step)


def write(writing: Callable[[], None], path: Path, step: int) -> None:
    """Run `writing`, which replaces a file atomically. Raises TrainingStopped if the disk is full or the path cannot be written."""
    from safetensors import SafetensorError

    try:
        writing()
    except (OSError, SafetensorError) as error:
        raise TrainingStopped(
            f"expected to write {path} at step {step}, got an error ({error}); free some space and run again, which resumes from the last state"
        ) from error
