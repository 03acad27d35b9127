"""Convolutional networks with the methods of expansions: exact radii of linear ones, attacks, and a comparison with method global."""

from __future__ import annotations

import functools
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustlip
from robustlip.attacks import MinimumRadius
from robustlip.certifiers.constants import constants_of
from robustlip.domains.expansion import Ball, ChainExpansion, Scope, expand
from robustlip.domains.expansion.dual import Rivals
from robustlip.domains.expansion.linear import AffineStep
from robustlip.domains.expansion.local import reference_of
from robustlip.domains.expansion.sorting import pairs_of
from robustlip.domains.norms import Context
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import (
    Chain,
    Channels,
    Concatenate,
    GroupSort,
    Householder,
    MaxMin,
    Normalize,
    PrependToken,
    Residual,
    Scale,
    SelectToken,
    Shift,
    Sum,
    Tokens,
    as_chain,
)
from robustlip.threats import InputBall, WeightBall

DUAL = {"l2": 2.0, "linf": 1.0, "l1": torch.inf}
SHAPE = (2, 6, 5)


def drawn(model: nn.Module, seed: int = 0, scale: float = 1.0) -> Chain:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.2))
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                m.running_mean.copy_(0.3 * torch.randn(m.num_features, generator=g))
                m.running_var.copy_(0.3 + torch.rand(m.num_features, generator=g))
                m.weight.copy_(0.5 + torch.rand(m.num_features, generator=g))
    return as_chain(model.eval().requires_grad_(False))


def points(count: int = 16, *shape: int) -> Tensor:
    return torch.randn(count, *(shape or SHAPE), generator=torch.Generator().manual_seed(1))


def headed(*layers: nn.Module, shape: tuple[int, ...] = SHAPE) -> nn.Sequential:
    """The layers, Flatten and a head for 4 classes."""
    body = nn.Sequential(*layers, nn.Flatten()).eval()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(body(torch.zeros(1, *shape)).shape[1], 4))


def spread(*shape: int) -> Tensor:
    """Constants that are all different."""
    return torch.linspace(-1, 1.5, int(np.prod(shape))).view(shape)


LINEAR = {
    "conv": lambda: headed(nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 3, 2)),
    "stride": lambda: headed(nn.Conv2d(2, 4, (3, 2), stride=(2, 3), padding=(1, 0)), nn.Conv2d(4, 4, 2, dilation=(2, 1))),
    "same": lambda: headed(nn.Conv2d(2, 4, (2, 4), padding="same", dilation=(1, 2))),
    "groups": lambda: headed(nn.Conv2d(2, 6, 3, padding=2, groups=2, bias=False)),
    "circular": lambda: headed(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 3, 3, padding=2, padding_mode="reflect")),
    "replicate": lambda: headed(nn.Conv2d(2, 4, 3, padding=(3, 1), stride=2, padding_mode="replicate")),
    "norm": lambda: headed(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)),
    "average": lambda: headed(Normalize([0.2, 0.1], [0.5, 2.0]), nn.AvgPool2d(3, 2, 1), nn.Conv2d(2, 4, 2)),
    "mean": lambda: headed(nn.Conv2d(2, 7, 3), nn.AdaptiveAvgPool2d(1)),
    "joins": lambda: headed(
        Sum(nn.Conv2d(2, 4, 3, padding=1), nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)), weights=(0.7, -1.3)),
        Concatenate(Channels(1, 3), nn.Conv2d(4, 2, 3, padding=1)), Residual(nn.Conv2d(4, 4, 3, padding=1), skip=0.5, weight=-1.0),
    ),
    "vectors": lambda: nn.Sequential(*headed(nn.Conv2d(2, 4, 3))[:-1], nn.Linear(48, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)),
    "transposed": lambda: headed(nn.Conv2d(2, 3, 2), nn.ConvTranspose2d(3, 4, (3, 2), (2, 1), 1, (1, 0)), nn.ConvTranspose2d(4, 2, 2, dilation=2)),
    "resampled": lambda: headed(
        nn.Upsample(scale_factor=(1.5, 2.0), mode="bilinear"), nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d((4, 5)), nn.Upsample(scale_factor=2)
    ),
    "tokens": lambda: headed(nn.Conv2d(2, 3, 2), Tokens(), Shift(spread(20, 3)), PrependToken(spread(2, 3)), Scale(spread(22, 1))),
    "one token": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), Shift(spread(4, 4, 3), subtract=True), Tokens(), SelectToken(-2), nn.Linear(4, 4)),
}  # fmt: skip


# Signals and volumes: (network, shape of a sample).
OTHERS = {
    "signal": (lambda: headed(
        nn.Conv1d(2, 4, 3, 2, 1), nn.BatchNorm1d(4), Residual(nn.Conv1d(4, 4, 3, padding=1)), nn.ConvTranspose1d(4, 2, 2, 2), nn.AvgPool1d(2),
        shape=(2, 9)), (2, 9)),
    "volume": (lambda: headed(
        nn.Conv3d(2, 3, 2, padding=1), nn.BatchNorm3d(3), nn.AvgPool3d(2, 1), Sum(nn.Conv3d(3, 2, 1), nn.Conv3d(3, 2, 3, padding=1)),
        nn.ConvTranspose3d(2, 2, 2, padding=1), shape=(2, 3, 4, 2)), (2, 3, 4, 2)),
}  # fmt: skip


def exact_radii(model: nn.Module, x: Tensor, y: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """(radius to each rival (N, C), inf for the label; the dual norms ‖∂(margin)‖ (N, C)) of a linear model."""
    logits, rows = model(x), torch.func.jacrev(model)(x[:1])[0, :, 0].flatten(1)
    size = torch.linalg.vector_norm(rows[y][:, None] - rows[None], ord=DUAL[norm], dim=-1)
    return torch.where(size > 0, (logits.gather(1, y[:, None]) - logits) / size, torch.inf), size


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("name", [*LINEAR, *OTHERS])
def test_linear_convnets_have_their_exact_radius(name, norm) -> None:
    """margin/‖difference of rows‖ to a millionth: a dropped bias, a wrong adjoint or a padding that is off would all show."""
    build, shape = OTHERS.get(name, (LINEAR.get(name), SHAPE))
    model, x = drawn(build()).double(), points(16, *shape).double()
    y = model(x).argmax(-1)
    exact, _ = exact_radii(model, x, y, norm)
    reference = reference_of(model, x, y, InputBall(norm), Context(torch.float64, constants_of(model)[1]))
    rivals = Rivals.of(reference, y, exact.argsort(-1)[:, :3].T)
    for factor, held in ((1 - 1e-6, True), (1 + 1e-6, False)):
        assert bool(((rivals.decreases(reference, exact.amin(-1) * factor) < rivals.margin).all(-1) == held).all())
    radius = robustlip.certify(model, x, y, InputBall(norm), "dual").radius
    assert (radius <= exact.amin(-1).numpy()).all() and (radius >= exact.amin(-1).numpy() * (1 - 2e-3)).all()
    for method in ("local", "crown"):
        assert (robustlip.certify(model, x, y, InputBall(norm), method).radius <= exact.amin(-1).numpy() * (1 + 1e-12)).all()


BENT = {
    "relu": lambda: headed(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, stride=2), nn.ReLU()),
    "gelu-norm": lambda: headed(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.GELU(), nn.AvgPool2d(2), nn.Conv2d(5, 4, 1), nn.SiLU()),
    "maxmin": lambda: headed(nn.Conv2d(2, 6, 3, padding=1), MaxMin(), nn.Conv2d(6, 6, 2, stride=2), GroupSort(2), nn.AdaptiveAvgPool2d(1)),
    "householder": lambda: headed(nn.Conv2d(2, 6, 3, padding=1, padding_mode="circular"), Householder(6), nn.Conv2d(6, 4, 2, groups=2)),
    "maxima": lambda: headed(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 2), nn.Tanh()),
    "maxima-first": lambda: headed(nn.MaxPool2d(3, 1, 1), nn.Conv2d(2, 4, 3), nn.ReLU()),
    "resnet": lambda: headed(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(),
        Sum(nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1)), nn.Conv2d(4, 4, 1), weights=(1.0, -0.7)),
        nn.ReLU(), Residual(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))),
    ),
    "concatenate": lambda: headed(
        Concatenate(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()), Channels(0, 1)), nn.Conv2d(4, 3, 2), nn.GELU()
    ),
    "vectors": lambda: nn.Sequential(*headed(nn.Conv2d(2, 4, 3), nn.ReLU())[:-1], nn.Linear(48, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4)),
}  # fmt: skip


def balanced(model: Chain, x: Tensor) -> Chain:
    """The same with logits that are 0 on average, so that boundaries are near."""
    with torch.no_grad():
        model[len(model) - 1].bias -= model(x).mean(0)
    return model


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("name", BENT)
def test_no_attack_gets_inside_a_radius(name, norm) -> None:
    x, ball = points(), InputBall(norm)
    model = balanced(drawn(BENT[name](), 3, 1.5), x)
    y = model(x).argmax(-1)
    broken = MinimumRadius(steps=4, descent=60)(model, x, y, ball).radius
    for method in ("local", "dual"):
        radius = robustlip.certify(model, x, y, ball, method).radius
        assert (radius > 0).mean() > 0.8
        assert (radius <= broken).all(), method
        assert (radius / broken).max() > {"local": 0.004, "dual": 0.02}[method], method


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["relu", "gelu-norm", "maxima"])
def test_radii_hold_as_executed(name, dtype) -> None:
    """Low precision: rounding errors are subtracted from the radius, and points at the radius keep their label as executed."""
    x = points().to(dtype)
    model = balanced(drawn(BENT[name](), 3), points()).to(dtype)
    y = model(x).argmax(-1)
    ball = InputBall("l2")
    broken = MinimumRadius(steps=4, descent=60)(model, x, y, ball).radius
    for method in ("local", "dual"):
        assert (robustlip.certify(model, x, y, ball, method).radius <= broken).all()


@functools.cache
def trained() -> tuple[Chain, Tensor, Tensor]:
    """(a convnet trained on digits, images that it was not trained on, their labels)."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 24))
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(24, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    with torch.enable_grad():
        for part in torch.cat([torch.randperm(1500) for _ in range(6)]).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return as_chain(model.eval().requires_grad_(False)), x[1500:1540], y[1500:1540]


@pytest.mark.parametrize("norm", DUAL)
def test_dual_proves_more_than_global_of_a_trained_convnet(norm) -> None:
    model, x, y = trained()
    found = {method: robustlip.certify(model, x, y, InputBall(norm), method).radius for method in ("global", "local", "dual")}
    right = (model(x).argmax(-1) == y).numpy()
    assert right.mean() > 0.8
    assert (found["dual"] >= found["global"])[right].mean() > 0.9
    assert np.median(found["dual"][right]) > 1.2 * np.median(found["global"][right])
    assert (found["local"] >= found["global"] * 0.99)[right].all()
    broken = MinimumRadius(steps=4, descent=60)(model, x, y, InputBall(norm)).radius
    assert (found["dual"] <= broken).all()


def test_weight_balls_reach_convolutions() -> None:
    model, x = drawn(BENT["resnet"](), 3), points()
    y = model(x).argmax(-1)
    ball = WeightBall("spectral")
    radius = robustlip.certify(model, x, y, ball, "local").radius
    assert (radius > 0).mean() > 0.8
    broken = MinimumRadius(steps=3, descent=30)(model, x, y, ball).radius
    assert (radius <= broken).all()


@pytest.mark.parametrize(
    ("layers", "message", "error"),
    [
        (lambda: (nn.Conv2d(2, 2, 1), Residual(nn.Conv2d(2, 3, 1)), nn.Flatten()), "branches that put out one shape", BadInput),
        (lambda: (nn.MaxPool2d(2, padding=1, dilation=2), nn.Flatten()), "only padding", UnsupportedLayer),
        (lambda: (nn.MaxPool2d(2, ceil_mode=True), nn.Flatten()), "ceil_mode", UnsupportedLayer),
        (lambda: (nn.Upsample(scale_factor=2, mode="bicubic"), nn.Flatten()), "bicubic", UnsupportedLayer),
        (lambda: (nn.Flatten(), nn.BatchNorm1d(61)), "60", BadInput), (lambda: (Channels(0, 3), nn.Flatten()), "at least 3 channels", BadInput),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(layers, message, error) -> None:
    with pytest.raises(error, match=message):
        ChainExpansion([m.double().eval() for m in layers()], points().double().flatten(1)[:, None], Scope(Context(torch.float64, {}), "l2", SHAPE))


def test_expansions_of_branches_of_other_shapes_are_refused() -> None:
    """torch would broadcast (C, H, W) with a flattened (C·H·W) of one number each; sizes agree, shapes do not."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(60, 60))
    for layer in (Residual(flat), Sum(nn.Identity(), flat), Concatenate(nn.Identity(), flat)):
        with pytest.raises(BadInput, match="expected"):
            ChainExpansion([layer.double()], points().double().flatten(1)[:, None], Scope(Context(torch.float64, {}), "l2", SHAPE))


def test_hooks_on_layers_that_are_expanded_together_are_refused() -> None:
    for i in (0, 1, 2):
        model = drawn(BENT["gelu-norm"]())
        model[i].register_forward_hook(lambda module, inputs, output: output * 2)
        with pytest.raises(UnsupportedLayer, match="hooks"):
            robustlip.certify(model, points(2), torch.zeros(2, dtype=torch.int64), InputBall("l2"), "dual")


@pytest.mark.parametrize("space", DUAL)
def test_adjoints_lose_no_more_than_they_say(space) -> None:
    """⟨fl(Aᵀg) − Aᵀg, Δ⟩ in fractions, for Δ along the error, compared with its bound."""
    eye = torch.eye(60, dtype=torch.float64).view(60, *SHAPE)
    for padding, stride in ((1, 1), (2, 2)):
        layer = drawn(nn.Sequential(nn.Conv2d(2, 6, 3, padding=padding, stride=stride)), 5).double()[0]
        expansion = expand(layer, points(1).double().flatten(1)[:, None], Scope(Context(torch.float64, {}), space, SHAPE))
        exact = nn.functional.conv2d(eye, layer.weight, stride=stride, padding=padding).flatten(1)  # (n, m): one product a number
        g = torch.randn(1, 1, 1, exact.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        back, weights = expansion.adjoint(g)
        off = [
            Fraction(float(b)) - sum((Fraction(float(a)) * Fraction(float(v)) for a, v in zip(row, g.flatten(), strict=True)), Fraction(0))
            for b, row in zip(back.flatten(), exact, strict=True)
        ]
        size = float(torch.linalg.vector_norm(torch.tensor([float(v) for v in off]).double(), ord=DUAL[space]))
        slack = weights[1]
        assert isinstance(slack, Tensor)
        assert 0 < size <= float(slack.flatten()[0])


def true_rows(*layers: nn.Module) -> Tensor:
    """The matrix (m, n) of linear layers on images of SHAPE."""
    function = nn.Sequential(*layers)
    eye = torch.eye(60, dtype=torch.float64).view(60, *SHAPE)
    return (function(eye) - function(torch.zeros_like(eye))).flatten(1).mT


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"padding": 1, "stride": 2}, {"padding": 2, "padding_mode": "replicate"}], ids=str)
@pytest.mark.parametrize("kind", [MaxMin, GroupSort, lambda: Householder(8)], ids=["maxmin", "groupsort", "householder"])
def test_rows_of_pairs_are_those_of_mixed_filters(kind, options) -> None:
    """‖v₁·row_a + v₂·row_b‖ for the pairs that a layer reflects, those of channels that read other channels included."""
    conv, norm = drawn(nn.Sequential(nn.Conv2d(2, 8, 3, **options), nn.BatchNorm2d(8)), 7).double()
    plain, x = conv(torch.zeros(1, *SHAPE, dtype=torch.float64)), points(1).double().flatten(1)[:, None]
    a, b, v = pairs_of(drawn(nn.Sequential(kind()), 7).double()[0], 0, x, tuple(plain.shape[1:]))
    for space in DUAL:
        scope = Scope(Context(torch.float64, {}), space, SHAPE)
        for layers in ((conv,), (conv, norm)):
            step = ChainExpansion(layers, x, scope).parts[0]
            assert isinstance(step, AffineStep)
            matrix = true_rows(*layers)
            truth = torch.linalg.vector_norm(v[:, :1] * matrix[a] + v[:, 1:] * matrix[b], ord=DUAL[space], dim=-1)
            got = step.pair_rows(a, b, v)
            assert bool((got >= truth * (1 - 1e-12)).all())
            if options.get("padding_mode") is None and space == "l2" and (kind is GroupSort or not options.get("groups")):
                torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-12)
            single = torch.linalg.vector_norm(matrix, ord=DUAL[space], dim=-1)
            assert bool((step.rows >= single * (1 - 1e-12)).all()) and step.sigma >= float(torch.linalg.matrix_norm(matrix, 2)) * (1 - 1e-12)


def test_composed_steps_lose_what_both_lose() -> None:
    """A convolution and batch norm: rounding of the first is stretched by the second, that of the second is added."""
    conv, norm = drawn(nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)), 7).double()
    x, context = points(3).double().flatten(1)[:, None], Context(torch.float16, {})
    first = expand(conv, x, Scope(context, "l2", SHAPE))
    assert isinstance(first, AffineStep)
    second = expand(norm, first.clean, Scope(context, "l2", first.whole))
    both = ChainExpansion([conv, norm], x, Scope(context, "l2", SHAPE)).parts[0]
    assert isinstance(second, AffineStep) and isinstance(both, AffineStep)
    radius = torch.full((3, 1), 0.1, dtype=torch.float64)
    moved, lost = first.parts(Ball.of(radius))
    after, more = second.parts(Ball.of(moved + lost))
    whole, fresh = both.parts(Ball.of(radius))
    assert bool((fresh >= second.sigma * lost + more).all()) and bool((whole >= second.sigma * moved).all())
    assert bool((whole + fresh <= (after + more) * (1 + 1e-9)).all())
    g = torch.randn(2, 3, 1, both.clean.shape[-1], dtype=torch.float64)
    torch.testing.assert_close(both.back(g), g @ true_rows(conv, norm), rtol=1e-9, atol=1e-9)
