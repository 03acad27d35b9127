"""Joins of branches: ResNet blocks with two computed branches, concatenations, splits; every bound compared with attacks and exact radii."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustlip
from robustlip.attacks import MinimumRadius
from robustlip.certifiers import lipschitz_bound
from robustlip.domains.norms import Context, State, rule_for
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Chain, Channels, Concatenate, MaxMin, NextTokenChain, Residual, Sum
from robustlip.layers.attention import Attention
from robustlip.threats import EmbeddingBall, InputBall, WeightBall

METHODS = ("global", "local", "dual", "ibp", "crown", "local-lipschitz")


def drawn(model: nn.Module, seed: int = 0, scale: float = 1.0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.2))
    return model.eval().requires_grad_(False)


def balanced(model: nn.Module, x: Tensor) -> nn.Module:
    """The same with logits that are 0 on average, so that boundaries are near."""
    with torch.no_grad():
        model[len(model) - 1].bias -= model(x).mean(0)
    return model


def block(act: nn.Module) -> nn.Module:
    """A ResNet block with a projection: both branches compute."""
    return Sum(nn.Sequential(nn.Linear(8, 12), act, nn.Linear(12, 6)), nn.Linear(8, 6), weights=(0.7, -1.2))


VECTORS = {
    "resnet-relu": lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), block(nn.ReLU()), nn.ReLU(), nn.Linear(6, 3)),
    "resnet-gelu": lambda: nn.Sequential(nn.Linear(5, 8), nn.GELU(), block(nn.GELU()), nn.Linear(6, 3)),
    "concatenation": lambda: nn.Sequential(
        Concatenate(nn.Sequential(nn.Linear(5, 6), nn.ReLU()), nn.Linear(5, 3), nn.Identity()), nn.Linear(14, 8), nn.Tanh(), nn.Linear(8, 3)
    ),
    "split": lambda: nn.Sequential(
        nn.Linear(5, 8),
        Concatenate(nn.Sequential(Channels(0, 3), nn.ReLU()), nn.Sequential(Channels(3, 8), nn.Linear(5, 5), nn.SiLU())), nn.Linear(8, 3),
    ),
    "nested": lambda: nn.Sequential(
        nn.Linear(5, 8), Sum(block(MaxMin()), nn.Sequential(nn.ReLU(), Concatenate(nn.Linear(8, 2), nn.Linear(8, 4)))), nn.ReLU(), nn.Linear(6, 3)
    ),
    "three": lambda: nn.Sequential(nn.Linear(5, 6), Sum(nn.Identity(), nn.ReLU(), nn.Linear(6, 6), weights=(1.0, 2.0, 0.5)), nn.Linear(6, 3)),
}  # fmt: skip


def points(count: int = 24, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(count, *(shape or (5,)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", VECTORS)
def test_every_method_covers_joins_and_no_attack_gets_inside(name, method, norm) -> None:
    x, ball = points(), InputBall(norm)
    model = balanced(drawn(VECTORS[name]()), x)
    y = model(x).argmax(-1)
    radius = robustlip.certify(model, x, y, ball, method).radius
    broken = MinimumRadius(steps=4, descent=60)(model, x, y, ball).radius
    assert (radius > 0).mean() > 0.5
    assert (radius <= broken).all()
    assert (radius / broken).max() > (0.1 if method in ("dual", "crown", "local-lipschitz") else 0.01)


def as_residual(model: nn.Module) -> nn.Module:
    def other(layer: nn.Module) -> nn.Module:
        return Residual(layer.branches[1], skip=layer.weights[0], weight=layer.weights[1]) if type(layer) is Sum else layer

    return nn.Sequential(*map(other, model))


@pytest.mark.parametrize("method", [*METHODS, "sdp"])
def test_a_sum_with_the_identity_is_a_residual(method) -> None:
    branch = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6))
    model = drawn(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), Sum(nn.Identity(), branch, weights=(0.8, 0.6)), nn.ReLU(), nn.Linear(6, 3)))
    x = points()
    y = model(x).argmax(-1)
    here, there = (robustlip.certify(m, x, y, InputBall("l2"), method).radius for m in (model, as_residual(model)))
    assert np.allclose(here, there, rtol=1e-2 if method == "sdp" else 1e-9, atol=0)
    assert (here > 0).any()


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("method", METHODS)
def test_linear_joins_have_their_exact_radius(method, norm) -> None:
    """A network that is linear in all: margin/‖difference of rows‖ by methods that do not multiply norms; a dropped branch or weight would show."""
    a, b, c = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(5, 2)
    model = drawn(nn.Sequential(Concatenate(Sum(a, b, weights=(0.7, -1.3)), c), nn.Linear(8, 3))).double()
    x = points().double()
    y = model(x).argmax(-1)
    rows = torch.func.jacrev(model)(x[0])
    difference = rows[y][:, None] - rows[None]
    size = torch.linalg.vector_norm(difference, ord={"l2": 2.0, "linf": 1.0, "l1": torch.inf}[norm], dim=-1)
    logits = model(x)
    margin = logits.gather(1, y[:, None]) - logits
    exact = torch.where(size > 0, margin / size, torch.inf).amin(-1).numpy()
    radius = robustlip.certify(model, x, y, InputBall(norm), method).radius
    assert (radius <= exact * (1 + 1e-9)).all()
    if method not in ("global", "local"):
        assert (radius >= exact * (1 - 5e-3)).all()


def test_global_sums_and_concatenations_attain_their_bounds() -> None:
    """One direction that all branches stretch: the sum of the norms, and the root of their squares."""
    u = torch.nn.functional.normalize(torch.tensor([1.0, 2.0, -1.0]), dim=0)
    layers = [nn.Linear(3, 3, bias=False) for _ in range(2)]
    with torch.no_grad():
        for layer, gain in zip(layers, (2.0, 3.0), strict=True):
            layer.weight.copy_(gain * torch.outer(u, u))
    bent = nn.Sequential(layers[0], nn.ReLU())
    assert lipschitz_bound(nn.Sequential(Sum(bent, layers[1], weights=(0.5, -1.0)), nn.Identity()))["l2"] == pytest.approx(4.0, rel=1e-6)
    # Of matrices it is the norm of their sum.
    assert lipschitz_bound(nn.Sequential(Sum(*layers, weights=(0.5, -1.0)), nn.Identity()))["l2"] == pytest.approx(2.0, rel=1e-6)
    assert lipschitz_bound(nn.Sequential(Concatenate(*layers), nn.Identity()))["l2"] == pytest.approx(13**0.5, rel=1e-6)


def test_what_branches_rounded_arrives_behind_a_sum() -> None:
    """The sum of twice and three times the same numbers: an error before it is five times as large after it."""
    one = torch.ones(1, dtype=torch.float64)
    front = State(one, 0 * one, 1e-3 * one, "l2", 1, 4)
    behind = rule_for(Sum(nn.Identity())).step(Sum(nn.Identity(), nn.Identity(), weights=(2.0, -3.0)), front, Context(torch.float64, {}))
    assert 5e-3 <= float(behind.rounding) <= 5e-3 * (1 + 1e-9)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_branch_counts_however_small_the_others_are(method, swapped) -> None:
    """One branch is 10⁻⁶ of the other: the exact radius is that of the larger one."""
    large, small = drawn(nn.Linear(5, 6), 1), drawn(nn.Linear(5, 6), 2, scale=1e-6)
    model = drawn(nn.Sequential(nn.Identity(), nn.Linear(6, 3)), 3)
    model[0] = Sum(small, large) if swapped else Sum(large, small)
    model, x = model.double(), points().double()
    y = model(x).argmax(-1)
    rows, logits = torch.func.jacrev(model)(x[0]), model(x)
    size = (rows[y][:, None] - rows[None]).norm(dim=-1)
    exact = torch.where(size > 0, (logits.gather(1, y[:, None]) - logits) / size, torch.inf).amin(-1).numpy()
    radius = robustlip.certify(model, x, y, InputBall("l2"), method).radius
    assert (radius <= exact * (1 + 1e-9)).all() and (radius >= 0.1 * exact).mean() > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_joins_of_images(method) -> None:
    model = drawn(
        nn.Sequential(
            Sum(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)), nn.Conv2d(2, 3, 1)), nn.ReLU(),
            Concatenate(Channels(0, 2), nn.Conv2d(3, 2, 3, padding=1)), nn.Flatten(), nn.Linear(64, 3),
        )
    )  # fmt: skip
    x = points(8, 2, 4, 4)
    y = model(x).argmax(-1)
    radius = robustlip.certify(model, x, y, InputBall("l2"), method).radius
    broken = MinimumRadius(steps=4, descent=60)(model, x, y, InputBall("l2")).radius
    assert (radius > 0).all() and (radius <= broken).all()


@pytest.mark.parametrize("tokens", [None, (-1,)])
@pytest.mark.parametrize("method", ["global", "local", "dual"])
def test_joins_of_tokens_and_attention(method, tokens) -> None:
    body = Sum(nn.Identity(), Attention(8, 2, scale=0.5), nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), weights=(1.0, 0.3, 0.4))
    wide = Concatenate(nn.Identity(), nn.Sequential(nn.Linear(8, 4), nn.Tanh()))
    model = NextTokenChain()
    for name, layer in {"table": nn.Embedding(9, 8), "body": body, "wide": wide, "head": nn.Linear(12, 9)}.items():
        model.add_module(name, layer)
    drawn(model, scale=1.5)
    x = torch.randint(9, (10, 4), generator=torch.Generator().manual_seed(3))
    y = model.scores(x).argmax(-1)
    ball = EmbeddingBall(tokens=tokens)
    radius = robustlip.certify(model, x, y, ball, method).radius
    broken = MinimumRadius(steps=4, descent=60)(model, x, y, ball).radius
    assert (radius > 0).all() and (radius <= broken).all()
    assert (radius / broken).max() > {"global": 0.005}.get(method, 0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_joins_in_half_precision_keep_what_is_proved(method, dtype) -> None:
    model = drawn(VECTORS["three"]()).to(dtype)
    x = points().to(dtype)
    y = model(x).argmax(-1)
    radius = robustlip.certify(model, x, y, InputBall("l2"), method).radius
    broken = MinimumRadius(steps=4, descent=60)(model, x, y, InputBall("l2")).radius
    assert (radius <= broken).all()


def test_weight_balls_reach_every_branch() -> None:
    model, x = drawn(VECTORS["resnet-gelu"]()), points()
    y = model(x).argmax(-1)
    for method in ("global", "local"):
        assert (robustlip.certify(model, x, y, WeightBall("spectral"), method).radius > 0).mean() > 0.5


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: Sum(nn.Linear(5, 3), nn.Linear(5, 1)), "one shape"), (lambda: Channels(2, 9), "at least 9 channels"),
        (lambda: Sum(nn.Linear(5, 3), nn.Linear(5, 3), weights=(1.0,)), "a weight for each"), (lambda: Channels(3, 3), "order them"),
        (lambda: Concatenate(), "at least one branch"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(layer, message) -> None:
    with pytest.raises(BadInput, match=message):
        model = nn.Sequential(layer(), nn.Linear(3, 3))
        robustlip.certify(model, points(2), torch.zeros(2, dtype=torch.int64), InputBall("l2"), "global")


def test_hooks_inside_of_branches_are_refused() -> None:
    model = drawn(VECTORS["resnet-relu"]())
    model[2].branches[1].register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(UnsupportedLayer, match="hooks"):
        robustlip.certify(model, points(2), torch.zeros(2, dtype=torch.int64), InputBall("l2"), "global")


def test_a_chain_of_joins_is_saved_in_its_architecture() -> None:
    a, b = (Chain(Sum(nn.Linear(2, 2), nn.Linear(2, 2), weights=(1.0, w))) for w in (1.0, 2.0))
    assert robustlip.hashing.architecture_sha256(a) != robustlip.hashing.architecture_sha256(b)
