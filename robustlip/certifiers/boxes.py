"""Properties of a model's executed outputs, proved on a box of inputs: the checks that `certify` makes, then `robustlip.domains.lines.outputs`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from robustlip.certifiers.chains import chain_of
from robustlip.certifiers.constants import constants_of
from robustlip.certifiers.samples import check_arithmetic, check_in_place, check_model, device_type
from robustlip.certifiers.trace import scores_and_norms
from robustlip.domains.lines.crown import InputBox
from robustlip.domains.lines.outputs import ExecutedNetwork, crown_lower_bounds, holds, input_box
from robustlip.domains.norms import Context
from robustlip.execution import proving
from robustlip.graph.capturing import check_outputs
from robustlip.modes import evaluated
from robustlip.numerics.rounding import TINY, U64, UNIT

# Boxes of at most this many inputs are split in half; for more inputs, activations are split instead.
MOST_HALVED = 16
# Boxes bounded at once, and the most boxes that may be left to bound.
BATCH, MOST_BOXES = 256, 200_000


def widened_by_rounding(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The box (float64) enlarged by the error of rounding a point to float64 and then to `dtype`: it contains every input that the model receives."""
    moved = (UNIT[dtype] * (1 + 2.0**-20) + 4 * U64) * torch.maximum(low.abs(), high.abs()) + 2 * TINY[dtype]
    return low - moved, high + moved


@torch.no_grad()
def outputs_hold(
    model: nn.Module, low: Tensor, high: Tensor, groups: list[tuple[Tensor, Tensor]], shape: tuple[int, ...], until: float
) -> tuple[bool, bool]:
    """(whether the property is proved, whether the search stopped at its limit of time or of boxes).

    The property: at every point of the box, every group has at least one row with row·logits > offset.
    low, high: the box (n,), float64; its points are rounded to the model's dtype before the model runs. groups: pairs of rows (r, C) and
    offsets (r,), float64. shape: of one sample. until: deadline on the clock of time.monotonic().
    Raises BadInput or UnsupportedLayer where the model is not supported. Source: docs/theory.md, section 9.
    """
    chain, source = chain_of(model, torch.zeros(2, *shape))
    dtype = check_model(chain)
    with proving(device_type(chain)), evaluated(chain):
        check_arithmetic(chain, dtype)
        low, high = widened_by_rounding(low, high, dtype)
        store = constants_of(chain)[1]

        def executed(box: InputBox) -> ExecutedNetwork:
            points = box.x.to(dtype).reshape(len(box.x), *shape)
            check_in_place(chain, points)
            _, clean = scores_and_norms(chain, points)
            if source is not None:
                check_outputs(chain, model, points)
            return ExecutedNetwork.of(chain, shape, replace(Context(dtype=dtype, store=store), clean=clean))

        if len(low) <= MOST_HALVED and time.monotonic() < until:
            return _halve(executed, low, high, groups, until)
        box = input_box(low[None], high[None])
        program = executed(box)
        single = [g for g in groups if len(g[0]) == 1]
        if single:
            rows, offsets = (torch.cat(parts) for parts in zip(*single, strict=True))
            proved, ended = holds(program, box, rows, offsets, until)
            if not bool(proved.all()):
                return False, ended
        for rows, offsets in (g for g in groups if len(g[0]) > 1):
            order = (crown_lower_bounds(program, box, rows[None])[0] - offsets).argsort(descending=True).tolist()
            done = ended = False
            for r in order:  # one proved row is enough
                proved, ended = holds(program, box, rows[r : r + 1], offsets[r : r + 1], until)
                if done := bool(proved.all()):
                    break
            if not done:
                return False, ended
    return True, False


def _halve(
    executed: Callable[[InputBox], ExecutedNetwork], low: Tensor, high: Tensor, groups: list[tuple[Tensor, Tensor]], until: float
) -> tuple[bool, bool]:
    """As `outputs_hold`: CROWN bounds on the box, and on its two halves where the bounds on the box are too weak."""
    rows, offsets = (torch.cat(parts) for parts in zip(*groups, strict=True))
    sizes = [len(g[0]) for g in groups]
    width = (high - low).clamp_min(1e-300)
    all_lows, all_highs = low[None], high[None]
    while len(all_lows):
        if time.monotonic() > until or len(all_lows) > MOST_BOXES:
            return False, True
        lows, highs = all_lows[-BATCH:], all_highs[-BATCH:]
        all_lows, all_highs = all_lows[:-BATCH], all_highs[:-BATCH]
        here = input_box(lows, highs)
        program = executed(here)
        enough = crown_lower_bounds(program, here, rows[None]) > offsets + 2.0**-45 * offsets.abs()
        proved = torch.stack([part.any(-1) for part in enough.split(sizes, dim=-1)], -1).all(-1)
        lows, highs = lows[~proved], highs[~proved]
        if not len(lows):
            continue
        at = ((highs - lows) / width).argmax(-1, keepdim=True)
        middle = (lows / 2 + highs / 2).gather(1, at)
        if bool(((middle <= lows.gather(1, at)) | (middle >= highs.gather(1, at))).any()):
            return False, False  # float64 has no number between the two ends
        all_lows = torch.cat([all_lows, lows, lows.scatter(1, at, middle)])
        all_highs = torch.cat([all_highs, highs.scatter(1, at, middle), highs])
    return True, False
