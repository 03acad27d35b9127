"""Many classes and large vocabularies: no tensor with C² entries is created, and classes are excluded correctly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from robustlip.certifiers import certify
from robustlip.certifiers.sequence import sequence_radii
from robustlip.domains import margins as of_margins
from robustlip.domains.expansion import dual
from robustlip.domains.expansion.dual import RivalFilter, single_token_reference
from robustlip.domains.expansion.local import reference_of
from robustlip.domains.lines import crown
from robustlip.domains.margins import Distances
from robustlip.domains.norms import Context
from robustlip.geometry import dual_length
from robustlip.layers import Chain
from robustlip.models import LipschitzGPT, LipschitzMLP
from robustlip.numerics.rounding import norm_up, up
from robustlip.threats import EmbeddingBall, InputBall

# (C, C, D) numbers of it are 51 GB.
CLASSES, HIDDEN = 20_000, 16


def large(seed: int = 0, classes: int = CLASSES) -> tuple[Chain, Chain]:
    """(the model, the same with only its first 12 classes): all other classes have logits too low to matter."""
    torch.manual_seed(seed)
    small = Chain(nn.Linear(6, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 12)).double().requires_grad_(False)
    whole = copy.deepcopy(small)
    head = nn.Linear(HIDDEN, classes).double().requires_grad_(False)
    head.weight[:12], head.bias[:12], head.bias[12:] = small[2].weight, small[2].bias, -1e3
    whole[2] = head
    return whole, small


@pytest.mark.parametrize("space", ["l2", "linf", "l1"])
def test_distances_are_those_of_the_whole_table_to_the_bit(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 3, 40)[:, None]
    rows[5] = rows[6]
    difference = rows.double()[:, None] - rows.double()[None]
    if space == "l2":
        table = up(norm_up(difference))
    else:
        table = up(dual_length(difference, space, 2) * (1 + 1e-12 * 7**0.5))
    y = torch.tensor([3, 39, 3, 0, 5])
    for room in (10**6, 300, 70, 1):
        monkeypatch.setattr(of_margins, "chunk_numbers", lambda like, room=room: room)
        found = Distances(rows, space)
        for _ in range(2):
            assert torch.equal(found.of(y), table[y]) and torch.equal(found.of(torch.tensor([6])), table[[6]])
    monkeypatch.setattr(of_margins, "_REMEMBERED", 100)  # two labels' worth
    for _ in range(2):
        assert torch.equal(found.of(y), table[y])
        assert 40 * len(found._known) <= 200


@pytest.mark.parametrize("method", ["global", "local", "dual", "ibp", "crown", "local-lipschitz"])
def test_classes_too_many_for_a_table_are_certified_as_few(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crown, "RIVAL_ENTRIES", 2**18)
    # Rows of lines are C² numbers a sample, a few at a time: that is time, not memory.
    whole, small = large(classes=CLASSES if method in ("global", "local", "dual") else 600)
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = small(x).argmax(-1)
    assert torch.equal(whole(x).argmax(-1), y)
    found, few = certify(whole, x, y, InputBall("l2"), method).radius, certify(small, x, y, InputBall("l2"), method).radius
    # The largest number of the head enters the rounding of every logit: some of a margin is lost to it.
    assert (found <= few * (1 + 1e-3)).all() and (found >= 0.97 * few).all() and (few > 0).all()


def test_pairs_of_logits_are_refused_where_they_are_too_many() -> None:
    whole, _ = large(classes=1000)
    x, y = torch.zeros(1, 6, dtype=torch.float64), torch.tensor([0])
    for method in ("eclipse", "lipsdp"):
        with pytest.raises(Exception, match="pair by pair"):
            certify(whole, x, y, InputBall("l2"), method)


def test_rivals_in_parts_have_the_bounds_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    model = LipschitzMLP([5, 8, 8, 12], "relu").requires_grad_(False)
    x = torch.randn(3, 5)
    y = model(x).argmax(-1)
    for method in ("ibp", "crown", "local-lipschitz"):
        whole = certify(model, x, y, InputBall("linf"), method).radius
        assert (whole > 0).all()
        for room in (12 * 12 * 2, 12 * 5):
            monkeypatch.setattr(crown, "RIVAL_ENTRIES", room)
            assert certify(model, x, y, InputBall("linf"), method).radius == pytest.approx(whole, rel=1e-9), (method, room)
        monkeypatch.undo()


def tokens(seed: int = 3, width: int = 16) -> tuple[LipschitzGPT, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = LipschitzGPT(vocabulary_size=40, width=width, heads=2, blocks=2).double().requires_grad_(False)
    x = torch.randint(40, (6, 5))
    return model, x, model.scores(x).argmax(-1)


@pytest.mark.parametrize("threat", [EmbeddingBall(tokens=(-1,)), EmbeddingBall()])
def test_few_rivals_at_a_time_prove_what_all_do(threat: EmbeddingBall, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where the rest is judged by norms, within a smaller ball: no rival may be left out of it."""
    model, x, y = tokens()
    monkeypatch.setattr(dual, "RIVALS", 64)
    every = certify(model, x, y, threat, "dual").radius
    local = certify(model, x, y, threat, "local").radius
    monkeypatch.setattr(dual, "ALL_RIVALS", 3)
    monkeypatch.setattr(dual, "RIVALS", 2)
    monkeypatch.setattr(dual, "STORED_NUMBERS", 1)
    few = certify(model, x, y, threat, "dual").radius
    assert (few <= every * 1.02).all() and (few >= 0.9 * every).all()
    monkeypatch.setattr(dual, "MOST_RIVALS", 2)
    monkeypatch.setattr(dual, "MOST_SINGLE_TOKEN_RIVALS", 2)
    fewest = certify(model, x, y, threat, "dual").radius
    assert (fewest <= few * 1.01).all() and (fewest >= local * 0.99).all()
    if threat.tokens is None:
        assert (fewest < 0.9 * few).any()  # somebody else was near


def test_sequences_of_large_vocabularies_prove_what_those_of_small_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = tokens()
    x = x[0]
    for _ in range(6):
        x = torch.cat([x, model(x[None])[0, -1:].argmax(-1)])
    whole = sequence_radii(model, x)[0]
    monkeypatch.setattr(dual, "ALL_RIVALS", 3)
    monkeypatch.setattr(dual, "STORED_NUMBERS", 1)
    few = sequence_radii(model, x)[0]
    assert (whole > 0).any() and torch.allclose(few, whole, rtol=2e-2)


def test_what_sets_rivals_aside_is_never_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst first-order direction of each class, and random ones, at every radius, in float64; the bound is sharper than norms."""
    monkeypatch.setattr(dual, "ALL_RIVALS", 3)
    model, x, y = tokens(4)
    for parameter in model.parameters():
        parameter.mul_(1.6)
    reference = reference_of(model, x, y, EmbeddingBall(tokens=(-1,)), Context(torch.float64, {}))
    every = torch.arange(len(x))
    single = single_token_reference(reference, every, torch.full_like(every, x.shape[1] - 1))
    y = reference.margin.argmax(-1)
    aside = RivalFilter.of(single, y)
    assert aside.linear is not None
    whole, _ = single.body.end_to_end()
    rows = model[len(model) - 1].weight
    sharper, bent = 0.0, 0.0
    for size in (1e-4, 0.01, 0.1, 0.5):
        epsilon = torch.full((len(x),), size, dtype=torch.float64)
        lost = aside.decreases(epsilon)
        sharper = max(sharper, float((single.by_norms(single.hidden(epsilon), epsilon) / lost).median()))
        for n in range(len(x)):
            start = model.embed(x[n : n + 1])
            clean = model.scores_from_embeddings(start)[0]
            worst = (rows - rows[y[n]]) @ whole[n]
            moves = torch.cat([worst, torch.randn(20, worst.shape[1], dtype=torch.float64)])
            moves = size * moves / moves.norm(dim=-1, keepdim=True).clamp_min(1e-300)
            moved = start.repeat(len(moves), 1, 1)
            moved[:, -1] += moves
            logits = model.scores_from_embeddings(moved)
            fell = (clean[y[n]] - clean) - (logits[:, y[n], None] - logits)  # (moves, C)
            assert bool((fell.amax(0) <= lost[n] * (1 + 1e-9)).all())
            bent = max(bent, float((fell.diagonal() - aside.linear[n] * size).max() / (aside.linear[n] * size).mean()))
    assert sharper > 1.2 and bent > 1e-3  # without what is not linear the bound would fail here
