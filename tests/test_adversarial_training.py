"""Adversarial training in embedding space: the step maximises the linearised loss at the stated length, gradients are right, margins grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from robustlip.checkpoints import load_into
from robustlip.hashing import weights_sha256
from robustlip.layers import Chain
from robustlip.models.build import build
from robustlip.training import Recipe, train
from robustlip.training.adversarial import adversarial_loss, worst_embeddings
from robustlip.training.recipe import LossPart

LOSS = {"kind": "adversarial", "norm": "l2", "epsilon": 0.2}
MODEL = {"kind": "lipschitz-gpt", "width": 16, "heads": 2, "blocks": 1, "distance_bias": 4}


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "seed": 3,
            "model": MODEL,
            "data": {"name": "text", "context": 16},
            "optimizer": {"name": "muon", "lr": 0.05, "adamw_lr": 0.01},
            "constraint": {"method": "soft-cap", "w_max": 1.0, "overrides": {"head.weight": 8.0}},
            "loss": LOSS,
            "run": {"steps": 80, "batch": 8, "checkpoint_every": 10},
        }
        | changes
    )


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question. " * 60, encoding="utf-8")
    return str(path)


def model_of() -> Chain:
    torch.manual_seed(0)
    return build(MODEL | {"vocabulary": "abcdefgh"}).double()


def drawn(model: Chain) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(8, (6, 12), generator=generator) for _ in range(2))
    return x, y, model.embed(x).detach()


def test_the_step_has_its_length_and_no_other_step_is_worse_to_first_order() -> None:
    model = model_of()
    _, y, embeddings = drawn(model)
    part = LossPart.model_validate(LOSS | {"logit_scale": 3.0, "label_smoothing": 0.1})

    def loss(e: torch.Tensor) -> float:
        return F.cross_entropy(3.0 * model.from_embeddings(e).flatten(0, 1), y.flatten(), label_smoothing=0.1).item()

    radius = 1e-4
    moved = worst_embeddings(model, embeddings, y, radius, part)
    assert torch.allclose((moved - embeddings).norm(dim=-1), torch.full((6, 12), radius).double(), rtol=1e-9)
    gained = loss(moved) - loss(embeddings)
    # The gain of the dual norm: Σ over tokens of radius·‖gradient‖, by differences along each coordinate of three tokens and by the whole.
    point = embeddings.clone().requires_grad_()
    F.cross_entropy(3.0 * model.from_embeddings(point).flatten(0, 1), y.flatten(), label_smoothing=0.1).backward()
    assert gained == pytest.approx(radius * point.grad.norm(dim=-1).sum().item(), rel=1e-3)
    for _ in range(50):
        step = radius * F.normalize(torch.randn_like(embeddings), dim=-1)
        assert loss(embeddings + step) - loss(embeddings) < gained


def test_the_radius_is_a_part_of_the_largest_row_and_grows_over_the_ramp() -> None:
    """Compared with the loss after a step computed by hand. Doubling the head and halving the radius shows that radii are relative to the table."""
    model = model_of()
    x, y, embeddings = drawn(model)
    with torch.no_grad():
        model.embed_tokens.weight[3] *= 5.0
    embeddings = model.embed(x).detach()
    largest = model.embed_tokens.weight.detach().norm(dim=-1).max()
    part = LossPart.model_validate(LOSS | {"start": 2, "ramp": 10})
    moved = worst_embeddings(model, embeddings, y, 0.2 * largest, part)
    expected = F.cross_entropy(model.from_embeddings(moved).flatten(0, 1), y.flatten()).item()
    losses = [adversarial_loss(model, x, y, part, step).item() for step in range(14)]
    assert losses[12] == losses[13] == pytest.approx(expected, rel=1e-12)
    assert losses == sorted(losses) and losses[1] < losses[6] < losses[12]
    assert losses[0] == losses[1] == F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() < losses[2]


def test_gradients_are_those_of_the_loss_at_the_moved_point() -> None:
    """Gradients of every weight, the table included: the step counts as a constant, and its computation leaves no gradients."""
    model = model_of()
    x, y, embeddings = drawn(model)
    part = LossPart.model_validate(LOSS)
    step = worst_embeddings(model, embeddings, y, 0.2 * model.embed_tokens.weight.detach().norm(dim=-1).max(), part) - embeddings
    assert all(p.grad is None for p in model.parameters())
    weights = list(model.parameters())
    found = torch.autograd.grad(adversarial_loss(model, x, y, part, 0), weights, allow_unused=True)
    moved = F.cross_entropy(model.from_embeddings(model.embed(x) + step).flatten(0, 1), y.flatten())
    for got, expected in zip(found, torch.autograd.grad(moved, weights, allow_unused=True), strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_a_token_without_a_gradient_stays() -> None:
    model = model_of()
    with torch.no_grad():
        model.head.weight.zero_()
    _, y, embeddings = drawn(model)
    assert torch.equal(worst_embeddings(model, embeddings, y, 0.5, LossPart.model_validate(LOSS)), embeddings)


@pytest.mark.parametrize("size", [1e-20, 1e-30, 1e-40])
def test_gradients_whose_squares_vanish_move_tokens_by_the_radius(monkeypatch, size) -> None:
    """A softmax that is nearly sure leaves such gradients: the step has its length all the same, and 0 where float32 has nothing left."""
    model = model_of().float()
    _, y, embeddings = drawn(model)
    tiny = torch.full_like(embeddings, size)
    tiny[0, 0] = 0.0
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: (tiny,))
    moved = (worst_embeddings(model, embeddings, y, 0.5, LossPart.model_validate(LOSS)) - embeddings).norm(dim=-1)
    assert moved[0, 0] == 0.0 and torch.allclose(moved.flatten()[1:], torch.tensor(0.5), rtol=1e-3)


def test_a_run_ends_with_a_smaller_gradient_and_resumes(text, tmp_path) -> None:
    """Same recipe but for the loss: margins are more gradients away. Interrupted, the run ends with the same weights."""

    class Stop(Exception):
        pass

    def interrupt(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 25:
            raise Stop

    spec = recipe(data={"name": text, "context": 16}, loss=LOSS | {"ramp": 10})
    model = load_into(train(spec, tmp_path / "whole"), build)
    with pytest.raises(Stop):
        train(spec, tmp_path / "parts", progress=interrupt)
    assert weights_sha256(load_into(train(spec, tmp_path / "parts"), build)) == weights_sha256(model)

    plain = load_into(train(recipe(data={"name": text, "context": 16}, loss={}), tmp_path / "plain"), build)

    def distance(chain: Chain) -> float:
        """Median over right predictions of margin over gradient norm, in parts of the table's largest row."""
        tokens = torch.tensor([[chain.vocabulary.index(c) for c in Path(text).read_text()[i : i + 17]] for i in range(40)])
        e = chain.embed(tokens[:, :-1]).detach().requires_grad_()
        top = chain.scores_from_embeddings(e).topk(2)
        margin = top.values[:, 0] - top.values[:, 1]
        (g,) = torch.autograd.grad(margin.sum(), e)
        right = top.indices[:, 0] == tokens[:, -1]
        assert int(right.sum()) >= 20
        return float((margin.detach() / g[:, -1].norm(dim=-1))[right].median() / chain.embed_tokens.weight.detach().norm(dim=-1).max())

    assert distance(model) > 1.2 * distance(plain)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": LOSS | {"epsilon": None}}, "need an epsilon"),
        ({"loss": LOSS | {"norm": "linf"}}, "'adversarial' needs norm = 'l2'"),
        ({"model": {"kind": "mlp", "widths": [4, 8, 3]}}, "'adversarial' is for gpts"),
        ({"run": {"steps": 4, "batch": 4, "compile": True}}, "trains in float32"),
        ({"run": {"steps": 4, "batch": 4, "dtype": "bfloat16"}}, "trains in float32"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(changes, said) -> None:
    with pytest.raises(ValidationError, match=said):
        recipe(**changes)


