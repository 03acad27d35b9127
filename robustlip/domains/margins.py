"""Margins over all rivals, and the head that they are read from. docs/theory.md, section 4."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustlip.geometry import dual_length
from robustlip.layers import Chain
from robustlip.numerics.rounding import chunk_numbers, norm_up, up

# Numbers of distances that are remembered for one head (128 MiB).
_REMEMBERED = 2**24


# By the layer of one logit: the head of its two. Its constants are remembered by its identity, so it lives as long as the weights stay the same.
_HEADS: weakref.WeakKeyDictionary[nn.Linear, nn.Linear] = weakref.WeakKeyDictionary()


def head_of(model: Chain) -> nn.Linear | None:
    """The last layer when it is Linear, so that rivals can be compared pair by pair; of one logit z that of (0, z), with a row of zeros."""
    last = model[len(model) - 1]
    if type(last) is not nn.Linear or last.out_features > 1:
        return last if type(last) is nn.Linear else None
    head, known = two_rows(last), _HEADS.get(last)
    if known is not None and all(torch.equal(a, b) for a, b in zip(known.parameters(), head.parameters(), strict=True)):
        return known
    _HEADS[last] = head
    return head


def two_rows(last: nn.Linear) -> nn.Linear:
    """Linear of one output z → Linear of (0, z)."""
    head = nn.Linear(last.in_features, 2, last.bias is not None, device="meta")
    for name, own in last.named_parameters():
        head.register_parameter(name, nn.Parameter(torch.cat([torch.zeros_like(own), own.detach()]), requires_grad=False))
    return head


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """m[i, j] = logits[i, y_i] − logits[i, j] in float64 (N, C), exact for float32 logits and rounded once for float64; m[i, y_i] = +inf."""
    logits = logits.to(torch.float64)
    m = logits.gather(1, y[:, None]) - logits
    return m.scatter(1, y[:, None], torch.inf)


@dataclass(frozen=True)
class Distances:
    """c[y, j] ≥ the dual norm of u_y − u_j, rows u (C, D) of a head: how far the margin of y over j moves per unit of what is before it.

    A row of them (C,) is made when its label is first asked for, from differences of a few rows at a time: C² and C²·D numbers are never held.
    """

    rows: Tensor
    space: str
    _known: dict[int, Tensor] = field(default_factory=dict)

    def of(self, y: Tensor) -> Tensor:
        """(N, C) float64 for labels y (N,), on the device of the rows."""
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
        count, room = len(self.rows), chunk_numbers(self.rows)
        found = torch.empty(len(labels), count, dtype=torch.float64, device=self.rows.device)
        of_labels = max(1, room // self.rows.numel())
        of_rivals = max(1, room // (of_labels * self.rows.shape[1]))
        for i in range(0, len(labels), of_labels):
            mine = self.rows[labels[i : i + of_labels]].double()
            for j in range(0, count, of_rivals):
                found[i : i + of_labels, j : j + of_rivals] = self._norms(mine[:, None] - self.rows[j : j + of_rivals].double())
        return found

    def _norms(self, difference: Tensor) -> Tensor:
        # u_y − u_j rounds once per entry, the norm a few times per entry; gamma of the width covers both.
        if self.space == "l2":
            return up(norm_up(difference))  # scaled: squares of tiny rows do not vanish
        return up(dual_length(difference, self.space, 2) * (1 + 1e-12 * difference.shape[-1] ** 0.5))
