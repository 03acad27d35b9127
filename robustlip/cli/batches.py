"""A model and its samples in batches, and the end of a verb that is stopped between two batches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from robustlip.errors import BadInput

if TYPE_CHECKING:
    from robustlip.data import Dataset

Part = TypeVar("Part")


def open_samples(
    model: str, data: str, device: str, context: int | None, data_dir: str | None, limit: int | None, seed: int, columns: Sequence[str | None]
) -> tuple[Any, Dataset]:  # fmt: skip
    """A model and its samples (see `samples_for`)."""
    from robustlip.models.zoo import load

    chain = load(model, device=device)
    return chain, samples_for(chain, data, context, data_dir, limit, seed, columns)


def samples_for(
    chain: Any, data: str, context: int | None, data_dir: str | None, limit: int | None, seed: int, columns: Sequence[str | None]
) -> Dataset:  # fmt: skip
    """The samples for a model; text is encoded with the model's vocabulary. columns: the values of robustlip.data.load.OPTIONS."""
    from robustlip.data import load_data
    from robustlip.data.load import OPTIONS

    words = getattr(chain, "vocabulary", None)
    options: Any = dict(zip(OPTIONS, columns, strict=True))
    return load_data(data, data_dir=data_dir, limit=limit, seed=seed, context=context, vocabulary=words, **options)


def batches(samples: Dataset, size: int, device: str, progress: Any, label: str) -> Any:
    """Yield (x, y, index) on the device, `size` samples at a time."""
    import torch

    total = len(samples.index)
    if total == 0:
        raise BadInput("expected at least one sample, got none; choose another split or a larger --limit")
    for start in range(0, total, size):
        progress(label, start, total)
        part = slice(start, start + size)
        yield torch.as_tensor(samples.x[part]).to(device), torch.as_tensor(samples.y[part]).to(device), samples.index[part]


def gather(results: Iterable[Part]) -> tuple[list[Part], BaseException | None]:
    """The results of all batches, and the exception that stopped them, if any; the finished part is shown in that case (see `end`)."""
    parts: list[Part] = []
    try:
        for part in results:
            parts.append(part)
    except (KeyboardInterrupt, Exception) as stopped:
        if not parts:
            raise
        return parts, stopped
    return parts, None


def end(stopped: BaseException | None, done: int, total: int, by: str = "") -> None:
    """End a command whose batches were stopped, after the finished part has been shown. by: the part that is finished, if several methods run."""
    if stopped is None:
        return
    cause = "interrupted" if isinstance(stopped, KeyboardInterrupt) else "stopped by an error"
    print(f"robustlip: {cause} after {done} of {total} samples{by}; their results are above", file=sys.stderr)
    if isinstance(stopped, KeyboardInterrupt):
        raise typer.Exit(130)
    raise stopped


def end_interrupted(interrupted: bool, sentence: str) -> None:
    """Raise exit code 130 with its message if Ctrl-C interrupted the command, after the finished part has been shown."""
    if interrupted:
        print(f"robustlip: {sentence}", file=sys.stderr)
        raise typer.Exit(130)
