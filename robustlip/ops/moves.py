"""Operations that rearrange entries: each output entry is an input entry or a constant. docs/theory.md, section 3.

Each layer class has one entry in a table (`register_move`); `moves_of` runs the layer on the indices of the entries. If an entry is read at most c
times, norms grow by at most √c in ℓ2, by c in ℓ1, and not at all in ℓ∞. Copies are exact in every dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Constant, Flip, Permute, PrependToken, Select, SelectToken, Slice, Tokens, View
from robustlip.numerics.arithmetic import RoundingModel
from robustlip.numerics.rounding import norm_up

Sample = tuple[int, ...]
# The most entries of a sample before and after: their indices are stored.
LARGEST = 2**26


@dataclass(frozen=True)
class Moves:
    """y_i = x[source_i], or fixed_i where source_i is −1; samples have `shape` before and `out` after the layer.

    source: (m,) int64; fixed: (m,) float64, 0 at moved entries. copies: how often one entry is read at most; size: ‖fixed‖₂, rounded up.
    token_size: the largest norm of a row of fixed as `out` (T, D). by_token: whether one vector before becomes tokens after the layer.
    rounds: whether the constants are rounded to the dtype.
    """

    shape: Sample
    out: Sample
    source: Tensor
    fixed: Tensor
    copies: int
    size: float
    token_size: float
    by_token: bool
    rounds: bool

    @classmethod
    def of(cls, layer: nn.Module, shape: Sample) -> Moves:
        """Raises the layer's own errors for other shapes, and BadInput or UnsupportedLayer where it is too large or does more than rearrange."""
        entry, count = _MOVES[type(layer)], math.prod(shape)
        if count > LARGEST:
            raise BadInput(f"expected samples of at most {LARGEST} numbers before {type(layer).__name__}, got {count}; use smaller ones")
        if why := entry.refuses(layer):
            raise UnsupportedLayer(f"expected {type(layer).__name__} that moves numbers alone, got {why}; replace it")
        device = next((t.device for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
        places = torch.arange(1, count + 1, dtype=torch.float64, device=device).reshape(1, *shape)
        with torch.no_grad():
            fixed, found = (layer(x).double().cpu()[0] for x in (torch.zeros_like(places), places))
        if found.numel() > LARGEST:
            raise BadInput(f"expected samples of at most {LARGEST} numbers after {type(layer).__name__}, got {found.numel()}; use smaller ones")
        out = tuple(found.shape)
        fixed, found = fixed.flatten(), found.flatten()
        # A moved entry is 0 in the first run and its index in the second; a constant is the same in both.
        moved = found != fixed
        source = torch.where(moved, found, 0.0).long() - 1
        if bool((fixed[moved] != 0).any()) or bool((source[moved] != found[moved] - 1).any()) or not bool(((source >= -1) & (source < count)).all()):
            raise UnsupportedLayer(f"expected {type(layer).__name__} to move numbers alone, got one that computes; give it a rule of its own")
        copies = int(torch.bincount(source[moved], minlength=1).amax()) if bool(moved.any()) else 0
        rows = fixed.reshape(-1, out[-1]) if len(out) == 2 else fixed.reshape(1, -1)
        size = 0.0 if not bool(fixed.any()) else float(norm_up(fixed, 0))
        token_size = 0.0 if not size else float(norm_up(rows).amax())
        return cls(tuple(shape), out, source, fixed, copies, size, token_size, entry.by_token, entry.rounds)

    @property
    def outputs(self) -> int:
        return len(self.source)

    def growth(self, space: str) -> float:
        """‖after‖ ≤ this·‖before‖, both in the norm of the space: 'l1', 'l2' or 'linf'."""
        return growth(self.copies, space)

    def rounding_error(self, size: float, count: int, arithmetic: RoundingModel) -> float:
        """The rounding error of `count` constants of norm `size`."""
        return arithmetic.unit * size + math.sqrt(count) * (arithmetic.tiny + arithmetic.flushed) if self.rounds and size else 0.0

    @functools.cached_property
    def tokens(self) -> ByToken | None:
        """How tokens (T, D) become tokens (T', D') if each output token is made of one input token; None where tokens are mixed."""
        if len(self.shape) != 2 or len(self.out) not in (1, 2):
            return None
        source = self.source.reshape(-1, self.out[-1])
        owner = torch.where(source < 0, -1, source // self.shape[1])
        first = owner.amax(-1)
        if bool(((owner != first[:, None]) & (owner >= 0)).any()):
            return None
        places = torch.where(source < 0, -1, source)
        # How often an entry occurs in one row: runs of equal indices, after sorting.
        ordered = places.sort(-1).values
        longest, run = min(1, self.copies), torch.ones(len(ordered), dtype=torch.long)
        if self.copies > 1:
            for j in range(1, ordered.shape[1]):
                run = torch.where((ordered[:, j] == ordered[:, j - 1]) & (ordered[:, j] >= 0), run + 1, 1)
                longest = max(longest, int(run.amax()))
        pure = bool(((owner < 0).all(-1) | (owner >= 0).all(-1)).all())
        return ByToken(first, longest, pure)

    @functools.cached_property
    def read(self) -> Tensor:
        """The tokens (T, D) that are read at all (k,)."""
        return torch.unique(self.source[self.source >= 0] // self.shape[-1])


@dataclass(frozen=True)
class ByToken:
    """How output tokens are made of input tokens.

    owner: (T',) the input token of each output token, −1 for a constant one; copies: how often an entry occurs in one output token at most.
    apart: whether every output token is either constant or without constants.
    """

    owner: Tensor
    copies: int
    apart: bool


def growth(copies: int, space: str) -> float:
    """The growth of a norm if each entry is copied at most so often."""
    return {"l2": math.sqrt(copies) * (1 + 1e-15) if copies > 1 else float(copies), "l1": float(copies), "linf": float(min(1, copies))}[space]


# ---- the table


@dataclass(frozen=True)
class MoveEntry:
    """An entry of the table. rank: number of dimensions of the samples, None for any; by_token, rounds: as in `Moves`; refuses: '' or what is
    unsupported."""

    rank: int | None
    by_token: bool
    rounds: bool
    refuses: Callable[[Any], str]


_MOVES: dict[type, MoveEntry] = {}


def register_move(
    *layers: type, rank: int | None = None, by_token: bool = False, rounds: bool = False, refuses: Callable[[Any], str] = lambda layer: ""
) -> None:
    """Registers layer classes that only rearrange entries, in eval mode and for every number of samples. See `MoveEntry`."""
    for layer in layers:
        _MOVES[layer] = MoveEntry(rank, by_token, rounds, refuses)


def moving_layers() -> tuple[type, ...]:
    """The layer classes in the table."""
    return tuple(_MOVES)


def is_move(layer: nn.Module) -> bool:
    """Whether the class of the layer is in the table."""
    return type(layer) in _MOVES


def moves_of(layer: nn.Module, whole: Sample | None, tokens: int, width: int) -> Moves:
    """The layer on samples of shape `whole`, or (tokens, width) if that is None; a single token may also be a vector (width,).

    Raises BadInput where the layer does not accept such samples, or treats vectors and single tokens differently.
    """
    rank = _MOVES[type(layer)].rank
    if whole is not None:
        shapes: list[Sample] = [whole]
    elif tokens > 1 or rank == 2:
        shapes = [(tokens, width)]
    else:
        shapes = [(width,), (1, width)]
    if rank is not None:
        shapes = [shape for shape in shapes if len(shape) == rank]
    found, why = [], f"{type(layer).__name__} is not for samples of shape {whole or (tokens, width)}"
    for shape in shapes:
        try:
            found.append(Moves.of(layer, shape))
        except UnsupportedLayer:
            raise
        except (BadInput, RuntimeError, IndexError, ValueError) as error:
            why = str(error).splitlines()[0][:200] if str(error) else why
    if not found:
        got = whole or ((tokens, width) if tokens > 1 else (width,))
        raise BadInput(f"expected samples that {type(layer).__name__} is for, got {got}: {why}; change the shape before it")
    if len(found) > 1 and (math.prod(found[0].out) != math.prod(found[1].out) or not torch.equal(found[0].source, found[1].source)):
        name = type(layer).__name__
        raise BadInput(f"expected vectors or several tokens before {name}, got one of {width} numbers, which may be either; flatten it")
    return found[0]


register_move(SelectToken, PrependToken, rank=2)
register_move(Tokens, by_token=True)
register_move(Constant, View, Permute, Select, Slice, Flip, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
_COPYING = ("Reflection", "Replication", "Circular")
_PADS = {f"{mode}Pad{n}d": getattr(nn, f"{mode}Pad{n}d") for mode in (*_COPYING, "Constant", "Zero") for n in (1, 2, 3)}
for _name, _pad in _PADS.items():
    if _pad is not nn.ZeroPad2d:  # it has its own linear map
        register_move(_pad, rank=int(_name[-2]) + 1, rounds=_name.startswith("Constant"))
