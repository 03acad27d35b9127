"""Training on certified margins: the bound in the loss is the certifier's bound, its gradient is right, invalid recipes are refused."""

from __future__ import annotations

import math
import tomllib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from robustlip.certifiers import certify
from robustlip.checkpoints import load_into
from robustlip.data import load_data
from robustlip.errors import BadInput
from robustlip.layers import Chain
from robustlip.models import LipschitzMLP
from robustlip.models.build import build
from robustlip.threats import InputBall
from robustlip.training import Recipe, identity, train
from robustlip.training.losses import lipschitz_margins, margin_loss
from robustlip.training.recipe import LossPart

LOSS = {"kind": "margin", "norm": "l2", "epsilon": 0.3, "logit_scale": 10.0}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "model": {"kind": "mlp", "widths": [64, 32, 10], "activation": "maxmin"},
    "data": {"name": "digits"},
    "optimizer": {"name": "muon", "lr": 0.05, "adamw_lr": 0.01},
    "constraint": {"method": "stiefel", "overrides": {"linear1.weight": (64 / 32) ** 0.5}},
    "loss": LOSS,
    "run": {"steps": 150, "batch": 64, "evaluate_every": 150, "checkpoint_every": 150},
}


def model_of(activation: str = "maxmin", **options: Any) -> Chain:
    torch.manual_seed(0)
    return LipschitzMLP([6, 16, 16, 4], activation, **options).double()


@pytest.mark.parametrize("activation", ["relu", "tanh", "maxmin", "groupsort"])
def test_margins_reach_zero_at_the_certified_radius(activation) -> None:
    """The radius at which the loss's worst margin vanishes is what method 'global' proves in exact arithmetic: two ways to the same number."""
    model = model_of(activation, mean=0.2, std=0.5)
    x = torch.rand(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(-1)
    with torch.no_grad():
        plain = lipschitz_margins(model, x, y, 1e-12)
        lost = plain - lipschitz_margins(model, x, y, 1.0)
    rivals = torch.ones_like(plain, dtype=torch.bool).scatter(1, y[:, None], False)
    radius = (plain / lost.clamp_min(1e-300)).masked_fill(~rivals, torch.inf).amin(1)
    proved = torch.as_tensor(certify(model, x, y, InputBall("l2"), "global", dtype="real").radius)
    assert bool((proved > 0).all()) and torch.allclose(radius, proved, rtol=1e-3, atol=0)


def test_a_tiny_radius_is_plain_cross_entropy_and_a_larger_one_costs_more() -> None:
    model = model_of()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(4, (20,))
    plain = F.cross_entropy(10 * model(x), y)
    losses = [margin_loss(model, x, y, LossPart.model_validate({**LOSS, "epsilon": e}), 0).item() for e in (1e-9, 0.1, 0.2, 0.4)]
    assert losses[0] == pytest.approx(plain.item(), abs=1e-6)
    assert losses == sorted(losses) and losses[1] > losses[0] + 1e-3


def test_the_gradient_flows_through_the_norms() -> None:
    """Finite differences along a random direction of all weights, the spectral norms' share included."""
    model = model_of()
    part = LossPart.model_validate({**LOSS, "logit_scale": 2.0})
    x, y = torch.randn(10, 6, dtype=torch.float64), torch.randint(4, (10,))
    # A clear largest singular value, so that power iteration has converged.
    with torch.no_grad():
        for linear in (m for m in model if isinstance(m, nn.Linear)):
            linear.weight += 2.0 * torch.outer(F.normalize(torch.randn(linear.out_features).double(), dim=0), torch.ones(linear.in_features).double())
    weights = [p for p in model.parameters() if p.dim() == 2]
    directions = [torch.randn_like(p) for p in weights]
    grads = torch.autograd.grad(margin_loss(model, x, y, part, 0), weights)
    slope = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True))

    def moved(by: float) -> float:
        with torch.no_grad():
            for p, d in zip(weights, directions, strict=True):
                p += by * d
            value = float(margin_loss(model, x, y, part, 0))
            for p, d in zip(weights, directions, strict=True):
                p -= by * d
        return value

    h = 1e-6
    assert slope == pytest.approx((moved(h) - moved(-h)) / (2 * h), rel=1e-4)
    assert all(bool(torch.isfinite(g).all()) for g in grads)


def test_the_gradient_is_finite_where_two_rows_are_equal() -> None:
    model = model_of()
    with torch.no_grad():
        model[-1].weight[1] = model[-1].weight[0]
    margin_loss(model, torch.randn(8, 6, dtype=torch.float64), torch.randint(4, (8,)), LossPart.model_validate(LOSS), 0).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_the_radius_grows_over_the_ramp() -> None:
    model, y = model_of(), torch.randint(4, (12,))
    x = torch.randn(12, 6, dtype=torch.float64)
    part = LossPart.model_validate({**LOSS, "start": 2, "ramp": 10})
    losses = [margin_loss(model, x, y, part, step).item() for step in range(14)]
    assert losses == sorted(losses) and losses[0] < losses[6] < losses[12] == losses[13]


def test_layers_without_a_constant_are_refused() -> None:
    y = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(BadInput, match="GELU"):
        lipschitz_margins(LipschitzMLP([6, 8, 4], "gelu"), torch.randn(3, 6), y, 0.1)
    with pytest.raises(BadInput, match="ends with a Linear"):
        lipschitz_margins(Chain(nn.Linear(6, 4), nn.ReLU()), torch.randn(3, 6), y, 0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epsilon": None}, "need an epsilon"),
        ({"norm": "linf"}, "norm = 'l2'"),
        ({"kind": "cross-entropy"}, "need an epsilon"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(change, said) -> None:
    with pytest.raises(ValidationError, match=said):
        Recipe.model_validate({**RECIPE, "loss": {**LOSS, **change}})


def test_only_mlps_are_trained_on_margins() -> None:
    with pytest.raises(ValidationError, match="'margin' is for models of kind 'mlp'"):
        Recipe.model_validate({**RECIPE, "model": {"kind": "gpt", "width": 16}})


def test_margins_are_trained_in_float32() -> None:
    with pytest.raises(ValidationError, match="'margin' trains in float32"):
        Recipe.model_validate({**RECIPE, "run": {**RECIPE["run"], "dtype": "bfloat16"}})


def test_the_kind_counts_in_a_recipe_s_identity() -> None:
    plain = {**RECIPE, "loss": {"logit_scale": 10.0}}
    assert identity(Recipe.model_validate(RECIPE)) != identity(Recipe.model_validate(plain))


def test_margins_train_what_they_promise(tmp_path) -> None:
    """With the same constraint, scale, steps and data, more is certified than after plain cross entropy; the caps hold."""
    data = load_data("digits:test")
    certified = {}
    for name, loss in (("margin", {**LOSS, "logit_scale": 30.0}), ("plain", {"logit_scale": 30.0})):
        path = train(Recipe.model_validate({**RECIPE, "loss": loss}), tmp_path / name)
        card = tomllib.loads(path.with_suffix(".toml").read_text())
        assert card["val_accuracy"] > 0.85 and card["largest_constrained_norm_rms"] <= math.sqrt(2) * (1 + 1e-4)
        certified[name] = certify(load_into(path, build), data.x, data.y, InputBall("l2"), "global").certified_accuracy(0.3)
    assert certified["margin"] > certified["plain"] + 0.02 > 0.3
