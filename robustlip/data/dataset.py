"""The result of loading, and the rows that a limit selects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from robustlip.data.lengths import NO_LABEL
from robustlip.data.subwords import Subwords
from robustlip.errors import BadInput


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples of one split, in memory.

    name: 'digits', 'mnist', …, or the stem of a file name. split: the name of the split. kind: 'image' or 'text'.
    x: images float32 (N, C, H, W) in [0, 1], or token ids int64 (N, T). y: int64 (N,), the label, or the token that
    follows the window; of labels by token int64 (N, T), −100 where there is none. index: int64 (N,), the row in the split,
    or the window's offset in the split's token stream.
    classes: labels lie in [0, classes). vocabulary: the characters of ids 0, 1, …, or a tokenizer; None for images.
    note: what tables have to show about the source: '', 'subset', 'shipped page'. names: of classes 0, 1, …, if the source has names.
    options: the configuration and columns passed to load_data (`robustlip.data.load.OPTIONS`); they are needed to load the same rows.
    Raises BadInput for tensors whose shapes do not agree and for labels outside [0, classes).
    """

    name: str
    split: str
    kind: str
    x: Tensor
    y: Tensor
    index: Tensor
    classes: int
    vocabulary: str | Subwords | None = None
    note: str = ""
    names: tuple[str, ...] | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.x)
        by_token = self.y.dim() == 2 and self.y.shape == self.x.shape
        if (self.y.shape != (n,) and not by_token) or self.index.shape != (n,):
            raise BadInput(
                f"expected one label and one index for each of the {n} samples of {self.name}, got shapes "
                f"{tuple(self.y.shape)} and {tuple(self.index.shape)}; give tensors of shape ({n},)"
            )
        if self.names is not None and len(self.names) != self.classes:
            raise BadInput(f"expected {self.classes} names of classes of {self.name}, got {len(self.names)}; give one name per class")
        if by_token:
            check_labels(self.y.flatten(), self.classes, self.name, but=NO_LABEL)
        else:
            check_labels(self.y, self.classes, self.name)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, limit: int | None) -> Dataset:
        """The first `limit` samples, or all of them for None."""
        if limit is None or limit >= len(self):
            return self
        check_limit(limit)
        return replace(self, x=self.x[:limit], y=self.y[:limit], index=self.index[:limit])


def check_labels(y: Tensor, classes: int, name: str, but: int | None = None) -> None:
    """Raises BadInput, naming the first such row, unless every label of y (N,) lies in [0, classes). but: the number that stands for no label."""
    wrong = (y < 0) | (y >= classes)
    outside = (wrong if but is None else wrong & (y != but)).nonzero()
    if len(outside):
        row = int(outside[0, 0])
        raise BadInput(f"expected labels of {name} in [0, {classes - 1}], got {int(y[row])} in row {row}; correct or drop that row")


def check_limit(limit: int | None) -> None:
    """Raises BadInput unless limit is None or an integer ≥ 1."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise BadInput(f"expected a limit of at least 1 sample, got {limit!r}; give a positive integer or none")


def choose_rows(total: int, limit: int | None, seed: int) -> np.ndarray:
    """The rows that a limit selects: int64 (min(total, limit),), ascending.

    A random subset drawn with `seed`, not the first rows: many files are sorted by label or by time, so their first rows are not
    representative. RandomState, because numpy guarantees that its stream never changes.
    """
    check_limit(limit)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise BadInput(f"expected an integer seed from 0 to 2**32 - 1, got {seed!r}; give one")
    if limit is None or limit >= total:
        return np.arange(total, dtype=np.int64)
    return np.sort(np.random.RandomState(seed).permutation(total)[:limit]).astype(np.int64)


def as_index(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64))
