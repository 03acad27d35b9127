"""Operations that move numbers, and samples that are neither vectors nor images: indices, refusals, no attack inside a radius."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import robustlip
from robustlip.attacks import MinimumRadius
from robustlip.domains.norms import Context, State, rule_for
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Channels, Concatenate, Flip, GroupSort, MaxMin, Permute, PrependToken, Select, SelectToken, Slice, Tokens, View
from robustlip.ops.moves import Moves, moves_of, moving_layers, register_move
from robustlip.threats import InputBall

VOLUME, SIGNAL = (2, 4, 3, 2), (2, 6)
# What a layer does depends on the rank of what it sees: these act on the last dimension of anything but images, as torch runs them.
NETWORKS = {
    "views side by side": (lambda: [Concatenate(View(4, 9), View(4, 9))], (1, 6, 6)),
    "sorted volumes": (lambda: [MaxMin()], VOLUME),
    "sorted behind a convolution": (lambda: [nn.Conv3d(2, 2, 1), GroupSort(2)], VOLUME),
    "channels of volumes": (lambda: [Channels(0, 1)], VOLUME),
    "volumes side by side": (lambda: [Concatenate(nn.ReLU(), nn.Tanh())], VOLUME),
    "sorted signals": (lambda: [nn.Conv1d(2, 4, 1), MaxMin()], SIGNAL),
    "signals as tokens": (lambda: [nn.Conv1d(2, 4, 1), nn.Linear(6, 5)], SIGNAL),
    "tokens as signals": (lambda: [nn.Conv1d(2, 4, 1), nn.Linear(6, 5), nn.Conv1d(4, 2, 1)], SIGNAL),
}  # fmt: skip


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", NETWORKS)
def test_samples_of_every_rank_are_bounded_or_refused(name, norm) -> None:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    body = nn.Sequential(*build(), nn.Flatten())
    model = nn.Sequential(*body, nn.Linear(body(torch.zeros(1, *shape)).shape[1], 3)).eval()
    x = torch.randn(6, *shape)
    y, asked = model(x).argmax(-1), []
    broken = MinimumRadius(steps=4, descent=40)(model, x, y, InputBall(norm)).radius
    for method in ("global", "local", "dual", "ibp", "crown"):
        try:
            radius = robustlip.certify(model, x, y, InputBall(norm), method).radius
        except BadInput:
            continue
        asked.append(method)
        assert (radius <= broken).all() and (radius > 0).any(), method
    assert asked or name in ("channels of volumes", "volumes side by side", "tokens as signals")


@pytest.mark.parametrize(
    ("layer", "shape", "out"),
    [
        (Tokens(), (3, 2, 4), (8, 3)), (View(4, 6), (3, 2, 4), (4, 6)), (Permute(0, 3, 1, 2), (3, 2, 4), (4, 3, 2)),
        (Select(2, -1), (3, 2, 4), (3, 4)),
        (Slice(3, 1, 4, 2), (3, 2, 4), (3, 2, 2)), (Flip(1, 3), (3, 2, 4), (3, 2, 4)), (SelectToken(1), (3, 2), (2,)),
        (PrependToken(torch.tensor([[7.0, 8.0]])), (3, 2), (4, 2)), (nn.CircularPad2d(2), (3, 2, 4), (3, 6, 8)),
        (nn.ConstantPad1d((1, -2), 0.3), (3, 5), (3, 4)),
    ],
)  # fmt: skip
def test_where_numbers_go(layer, shape, out) -> None:
    x = torch.randn(5, *shape, dtype=torch.float64)
    found = Moves.of(layer, shape)
    flat = x.flatten(1)
    moved = torch.where(found.source >= 0, flat[:, found.source.clamp_min(0)], found.fixed)
    assert found.out == out and torch.equal(moved, layer.double()(x).flatten(1))
    counts = torch.bincount(found.source[found.source >= 0])
    assert found.copies == int(counts.max())


@pytest.mark.parametrize(
    ("layer", "whole", "tokens", "width", "word"),
    [
        (SelectToken(3), None, 3, 4, "index 3"), (SelectToken(), (3, 2, 4), 1, 24, "not for samples"), (View(5), None, 3, 4, "shape"),
        (Slice(1, 0, 1), None, 1, 4, "may be either"), (Slice(1, 0, 9), None, 3, 4, "9 places"), (Permute(0, 2, 1), (3, 2, 4), 1, 24, "3 dimensions"),
        (Select(0, 1), None, 3, 4, "leave samples apart"), (nn.PixelShuffle(2), (3, 2, 4), 1, 24, "pixel_shuffle"),
    ],
)  # fmt: skip
def test_what_a_move_is_not_for_is_refused(layer, whole, tokens, width, word) -> None:
    with pytest.raises(BadInput, match=word):
        moves_of(layer, whole, tokens, width)


@pytest.mark.parametrize(
    "make", [lambda: View(), lambda: View(3, 0), lambda: Permute(1, 0), lambda: Slice(1, 2, 2), lambda: PrependToken(torch.ones(2, 3, 4))]
)
def test_moves_that_make_no_sense_are_refused(make) -> None:
    with pytest.raises(BadInput, match=r"expected .* got"):
        make()


class Doubles(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Swaps(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, -1)


def test_one_line_adds_a_move_and_what_computes_is_found_out(monkeypatch) -> None:
    monkeypatch.setattr("robustlip.ops.moves._MOVES", {})
    register_move(Doubles, Swaps)
    assert set(moving_layers()) == {Doubles, Swaps}
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(UnsupportedLayer, match="one that computes"):
        rule_for(Doubles()).step(Doubles(), State(one, one, 0 * one, "l2", 1, 6, (6,)), Context(torch.float32, {}))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Swaps(), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(8, 4)
    y = model(x).argmax(-1)
    broken = MinimumRadius()(model, x, y, InputBall("l2")).radius
    for method in ("global", "local", "dual", "ibp", "crown"):
        radius = robustlip.certify(model, x, y, InputBall("l2"), method).radius
        assert (radius > 0).any() and (radius <= broken).all()


def test_tokens_that_are_mixed_are_bounded_together() -> None:
    """(T, D) transposed: each resulting row has a number of every token, so √T times the change of one token."""
    one = torch.ones(1, dtype=torch.float64)
    before = State(one, one, 0 * one, "l2", 9, 4)
    behind = rule_for(Permute(0, 2, 1)).step(Permute(0, 2, 1), before, Context(torch.float64, {}))
    assert behind.whole == (4, 9) and float(behind.change) == pytest.approx(3.0)
    kept = rule_for(Slice(1, 2, 6)).step(Slice(1, 2, 6), before, Context(torch.float64, {}))
    assert (kept.tokens, kept.width, kept.whole) == (4, 4, None) and float(kept.change) == 1.0
    few = rule_for(Slice(1, 0, 4)).step(Slice(1, 0, 4), before, Context(torch.float64, {}))
    assert float(rule_for(Permute(0, 2, 1)).step(Permute(0, 2, 1), few, Context(torch.float64, {})).change) == pytest.approx(2.0)


def test_what_is_joined_is_the_last_dimension_of_anything_but_images() -> None:
    one = torch.ones(1, dtype=torch.float64)
    layer = Concatenate(View(4, 9), View(4, 9))
    behind = rule_for(layer).step(layer, State(one, one, 0 * one, "l2", 1, 36, (1, 6, 6)), Context(torch.float64, {}))
    assert layer(torch.zeros(1, 1, 6, 6)).shape[1:] == (behind.tokens, behind.width) == (4, 18)
