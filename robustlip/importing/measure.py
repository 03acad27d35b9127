"""Checks an imported model: its loss and accuracy on the data with which the published code evaluates it.

The code's validation text is the last tenth of the text, and its batches are windows that start at 0, 1, 2, …: with its defaults (20 batches of
64, windows of 256) the published figures of the Shakespeare models are over the first 1,535 characters of the held-out text, each counted
up to 256 times. Source: data/shakespeare.py, trainer.py of the code of arXiv 2507.13338.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from robustlip.data import load_data, load_tokens
from robustlip.errors import BadInput
from robustlip.layers import Chain

WINDOWS = 64  # of the code's 1,280, evenly spaced, because neighbours differ by one character
BATCH = 16


@dataclass(frozen=True)
class Measured:
    """accuracy in [0, 1], loss in nats. of: a description of the data."""

    accuracy: float
    loss: float
    of: str


@torch.no_grad()
def measure(
    model: Chain, data: str, options: Mapping[str, Any], *, data_dir: str | None = None, limit: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Measured:  # fmt: skip
    """Loss and accuracy of an imported model on a data specification, e.g. tiny_shakespeare:test. limit: number of samples or windows.

    options: of the run; they determine the windows of text, as in the published code. columns: as in load_data and load_tokens.
    Raises BadInput for data that the model does not accept.
    """
    device = next(model.parameters()).device
    columns = columns or {}
    if model.task == "next-token":
        if pictures := [option for option in ("image_column", "label_column") if option in columns]:
            raise BadInput(f"expected no {pictures[0]} for a model of text, got {columns[pictures[0]]!r}; leave it out")
        tokens, _, note = load_tokens(data, data_dir=data_dir, vocabulary=model.vocabulary, **columns)
        length, starts = (_option(options, key, default) for key, default in (("seq_len", 256), ("batch_size", 64)))
        starts = min(starts * _option(options, "val_iters", 20), len(tokens) - length)
        if starts < 1:
            raise BadInput(f"expected text of more than {length} characters, got {len(tokens)}; name another text")
        kept = torch.arange(0, starts, max(1, starts // (limit or WINDOWS)))
        windows = tokens[kept[:, None] + torch.arange(length + 1)]
        parts = [(part[:, :-1], part[:, 1:]) for part in windows.split(BATCH)]
        of = f"{len(kept)} windows of {length} characters, starting in the first {starts} of {data}"
    else:
        samples = load_data(
            data, data_dir=data_dir, limit=limit, subset=columns.get("subset"), image_column=columns.get("image_column"),
            label_column=columns.get("label_column"), text_column=columns.get("text_column"),
        )  # fmt: skip
        parts = list(zip(samples.x.split(1000), samples.y.split(1000), strict=True))
        note, of = samples.note, f"{len(samples.y)} samples of {data}"
    right = loss = count = 0.0
    dtype = next(model.parameters()).dtype
    for x, y in parts:
        logits = model(x.to(device, dtype if x.is_floating_point() else None)).flatten(0, -2)
        target = y.to(device).flatten()
        right += float((logits.argmax(-1) == target).sum())
        loss += float(F.cross_entropy(logits, target, reduction="sum"))
        count += target.numel()
    return Measured(right / count, loss / count, of + (f" ({note})" if note else ""))


def _option(options: Mapping[str, Any], key: str, default: int) -> int:
    value = options.get(key, default)
    return value if type(value) is int and 0 < value < 2**20 else default
