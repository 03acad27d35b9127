"""What every certifier needs first: checked inputs, and margins over all rivals. MATH.md section 5."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from robustlip.errors import BadInput
from robustlip.layers import Chain


def check_model(model: Chain) -> torch.dtype:
    """The one dtype of the weights. Raises BadInput when they are mixed or not floating point."""
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise BadInput(f"expected weights of one floating dtype, got {sorted(map(str, dtypes))}; cast the model with .to(dtype)")
    return dtypes.pop()


def check_samples(model: Chain, x: Tensor, y: Tensor) -> None:
    """Raises BadInput for inputs and labels that do not fit together or are not finite."""
    if x.shape[0] == 0:
        raise BadInput("expected at least one sample, got none; check the data's limit")
    if y.dim() != 1 or y.shape[0] != x.shape[0]:
        raise BadInput(f"expected one label for each of {x.shape[0]} samples, got labels of shape {tuple(y.shape)}; match them")
    if y.dtype.is_floating_point or y.dtype == torch.bool:
        raise BadInput(f"expected integer labels, got {y.dtype}; convert them to class numbers")
    model.check_inputs(x)


def check_labels(y: Tensor, classes: int) -> None:
    if classes < 2:
        raise BadInput(f"expected a model with at least 2 classes, got {classes}; a prediction needs a rival")
    if bool(((y < 0) | (y >= classes)).any()):
        raise BadInput(f"expected labels in [0, {classes - 1}], got {int(y.min())} to {int(y.max())}; use the model's own classes")


def batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def head_of(model: Chain) -> nn.Linear | None:
    """The last layer when it is Linear, so that rivals can be compared pair by pair."""
    last = model[len(model) - 1]
    return last if type(last) is nn.Linear else None


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """m[i, j] = logits[i, y_i] − logits[i, j] in float64 (N, C), exact for float32 logits and rounded once for float64; m[i, y_i] = +inf."""
    logits = logits.to(torch.float64)
    m = logits.gather(1, y[:, None]) - logits
    return m.scatter(1, y[:, None], torch.inf)
