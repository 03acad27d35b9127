"""Margins over all rival classes, and the last Linear layer (head) of a model. docs/theory.md, section 4."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustlip.geometry import dual_length
from robustlip.layers import Chain
from robustlip.numerics.rounding import chunk_numbers, norm_up, up

# The largest number of distances cached for one head (128 MiB).
_REMEMBERED = 2**24


# The two-row head of each layer with one logit. Constants are cached by the identity of a layer, so the same head is returned while its weights stay.
_HEADS: weakref.WeakKeyDictionary[nn.Linear, nn.Linear] = weakref.WeakKeyDictionary()


def head_of(model: Chain) -> nn.Linear | None:
    """The last layer if it is Linear, else None. For a single logit z, the Linear layer of the two logits (0, z), with a row of zeros."""
    last = model[len(model) - 1]
    if type(last) is not nn.Linear or last.out_features > 1:
        return last if type(last) is nn.Linear else None
    head, known = two_rows(last), _HEADS.get(last)
    if known is not None and all(torch.equal(a, b) for a, b in zip(known.parameters(), head.parameters(), strict=True)):
        return known
    _HEADS[last] = head
    return head


def two_rows(last: nn.Linear) -> nn.Linear:
    """The Linear layer with outputs (0, z) for a Linear layer with the single output z."""
    head = nn.Linear(last.in_features, 2, last.bias is not None, device="meta")
    for name, own in last.named_parameters():
        head.register_parameter(name, nn.Parameter(torch.cat([torch.zeros_like(own), own.detach()]), requires_grad=False))
    return head


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """The margins m[i, j] = logits[i, y_i] − logits[i, j] in float64 (N, C), with m[i, y_i] = +inf.

    Exact for float32 logits, rounded once for float64.
    """
    logits = logits.to(torch.float64)
    m = logits.gather(1, y[:, None]) - logits
    return m.scatter(1, y[:, None], torch.inf)


@dataclass(frozen=True)
class Distances:
    """c[y, j] ≥ the dual norm of u_y − u_j for rows u (C, D) of a head: the largest change of the margin of y over j per unit change of the head's
    input.

    rows: (C, D). space: the norm of the input's change. A row c[y] (C,) is computed when label y is first used, a few rows at a time, so that C² and
    C²·D entries are never stored.
    """

    rows: Tensor
    space: str
    _known: dict[int, Tensor] = field(default_factory=dict)

    def of(self, y: Tensor) -> Tensor:
        """c[y] (N, C) float64 for labels y (N,), on the device of the rows."""
        labels, at = y.to(self.rows.device).unique(return_inverse=True)
        known = {label: row for label in labels.tolist() if (row := self._known.get(label)) is not None}
        missing = [label for label in labels.tolist() if label not in known]
        if missing:
            known.update(zip(missing, self._made(torch.tensor(missing, device=self.rows.device)), strict=True))
            if len(self.rows) * (len(self._known) + len(missing)) > _REMEMBERED:
                self._known.clear()
            if len(self.rows) * len(missing) <= _REMEMBERED:
                self._known.update((label, known[label]) for label in missing)
        return torch.stack([known[label] for label in labels.tolist()])[at]

    def _made(self, labels: Tensor) -> Tensor:
        count, limit = len(self.rows), chunk_numbers(self.rows)
        found = torch.empty(len(labels), count, dtype=torch.float64, device=self.rows.device)
        of_labels = max(1, limit // self.rows.numel())
        of_rivals = max(1, limit // (of_labels * self.rows.shape[1]))
        for i in range(0, len(labels), of_labels):
            mine = self.rows[labels[i : i + of_labels]].double()
            for j in range(0, count, of_rivals):
                found[i : i + of_labels, j : j + of_rivals] = self._norms(mine[:, None] - self.rows[j : j + of_rivals].double())
        return found

    def _norms(self, difference: Tensor) -> Tensor:
        # u_y − u_j rounds once per entry, the norm a few times per entry; gamma of the width covers both.
        if self.space == "l2":
            return up(norm_up(difference))  # scaled, so that squares of tiny rows do not underflow
        return up(dual_length(difference, self.space, 2) * (1 + 1e-12 * difference.shape[-1] ** 0.5))
