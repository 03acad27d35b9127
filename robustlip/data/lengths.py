"""Texts of several lengths as one tensor: token ids (N, T), filled with NO_TOKEN after the end of shorter texts.

NO_TOKEN is never passed to a model: callers run the texts of one length at a time (`by_length`), without padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustlip.errors import BadInput

NO_TOKEN = -1
# In labels (N, T), one for each token: a token without a label, as in libraries of token classifiers.
NO_LABEL = -100


def joined(texts: Sequence[Tensor]) -> Tensor:
    """Token ids int64 (T_i,) of each text → (N, T), T the largest length, filled with NO_TOKEN. Raises BadInput for a text without tokens."""
    empty = next((row for row, ids in enumerate(texts) if not len(ids)), None)
    if empty is not None:
        raise BadInput(f"expected at least one token in every text, got none in row {empty}; drop that row")
    return torch.nn.utils.rnn.pad_sequence([ids.long() for ids in texts], batch_first=True, padding_value=NO_TOKEN)


def lengths(x: Tensor) -> Tensor:
    """int64 (N,): the number of tokens of each text in x (N, T). Raises BadInput for NO_TOKEN before a token, and for a text without tokens."""
    there = x != NO_TOKEN
    count = there.sum(1)
    tokens_there = torch.arange(x.shape[1], device=x.device) < count[:, None]
    if not torch.equal(there, tokens_there) or not bool((count > 0).all()):
        row = int(((there != tokens_there).any(1) | (count == 0)).nonzero()[0])
        raise BadInput(f"expected {NO_TOKEN} only after the end of a text, and a token in each, got other ids in row {row}; encode that text again")
    return count


def by_length(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(rows int64 (M,), their token ids (M, L)) for each length L, the shortest first; without NO_TOKEN in x: all rows unchanged."""
    everything = [(torch.arange(len(x), device=x.device), x)]
    if x.is_floating_point() or x.dim() != 2 or not x.numel() or not bool((x == NO_TOKEN).any()):
        return everything
    count = lengths(x)
    groups = [((count == length).nonzero()[:, 0], length) for length in count.unique().tolist()]
    return [(rows, x[rows, :length]) for rows, length in groups]


def in_order(parts: Sequence[Tensor], groups: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Results (M, …) for each of the `groups` (`by_length`), in the order of the original rows."""
    if len(parts) == 1:
        return parts[0]
    rows = torch.cat([rows for rows, _ in groups]).to(parts[0].device)
    return torch.cat(list(parts))[rows.argsort()]


def labels_of(y: Tensor, rows: Tensor, part: Tensor) -> Tensor:
    """The labels of the texts `part` (M, L), which are `rows` of all: y (N,) → (M,), y (N, T) → (M, L). Raises BadInput for labels behind an end."""
    found = y[rows.to(y.device)]
    if y.dim() != 2:
        return found
    if bool((found[:, part.shape[1] :] != NO_LABEL).any()):
        raise BadInput(f"expected {NO_LABEL} as labels behind the end of a text, got others; give a label for each token alone")
    return found[:, : part.shape[1]]


def counted(y: Tensor) -> Tensor:
    """The labels (N,) as certificates and records have them: y itself, or of labels by token (N, T) how many a text has."""
    return (y != NO_LABEL).sum(1) if y.dim() == 2 else y
