"""Intervals, CROWN, local slopes and the quadratic dual compared with attacks, dense grids, high precision and exhaustive search."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from functools import cache
from itertools import pairwise

import mpmath
import pytest
import torch
from curves import ACTIVATIONS, CURVES, DIGITS
from torch import nn

from robustlip.attacks import by_name
from robustlip.certifiers.constants import constants_of
from robustlip.domains.lines import crown_radii, ibp_radii, linear_why_not, local_lipschitz_radii
from robustlip.domains.lines import dense as network_module
from robustlip.domains.lines.crown import (
    Ball,
    backward,
    first_box,
    interval_boxes,
    interval_margins,
    linear_boxes,
    linear_margins,
    norms_from_boxes,
    rival_rows,
)
from robustlip.domains.lines.dense import network_of
from robustlip.domains.lines.relaxations import RELU, PiecewiseLinear, Relu, Smooth, activation_of
from robustlip.domains.lines.secants import gains, lipschitz_margins
from robustlip.domains.norms import Context
from robustlip.domains.norms.bound import GlobalBound, global_radii
from robustlip.domains.quadratic import multipliers as dual_module
from robustlip.domains.quadratic import sdp_radii, sdp_why_not
from robustlip.domains.quadratic.lagrangian import Dual, Layer, Multipliers, form_of, minimum_on_relu, proved_offset
from robustlip.domains.quadratic.multipliers import Search, clean_gradients
from robustlip.errors import BadInput
from robustlip.layers import (
    Abs,
    Chain,
    Channels,
    Clamp,
    Concatenate,
    GroupSort,
    Householder,
    Maximum,
    MaxMin,
    Minimum,
    Normalize,
    Product,
    Residual,
    Scale,
    ScaledGELU,
    Shift,
    Sum,
    as_chain,
)
from robustlip.models import LipschitzGPT, LipschitzMLP
from robustlip.ops import elementwise_of
from robustlip.ops.maps import mapped_layers
from robustlip.threats import EmbeddingBall, InputBall

METHODS = {"ibp": ibp_radii, "crown": crown_radii, "local-lipschitz": local_lipschitz_radii, "sdp": sdp_radii}
APPLIES = {"ibp": linear_why_not, "crown": linear_why_not, "local-lipschitz": linear_why_not, "sdp": sdp_why_not}
ORDER = {"l2": 2.0, "linf": math.inf, "l1": 1.0}
NORMS = tuple(ORDER)


def scaled(model: nn.Sequential, gain: float) -> Chain:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(gain)
    return as_chain(model.eval().requires_grad_(False))


def batch_normed() -> nn.Sequential:
    norm = nn.BatchNorm1d(16)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Linear(6, 16), norm, nn.ReLU(), nn.Linear(16, 4))


def mixed() -> nn.Sequential:
    conv = [nn.Conv2d(1, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2, stride=1), nn.Flatten(), nn.Linear(16, 4)]
    return nn.Sequential(Normalize([0.4], [0.3]), *conv)


# name → (model, shape of one input, gain of its weights); weights are large enough for many units to cross 0 within the radius.
MODELS = {
    "relu": (lambda: nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4)), (6,), 2.0),
    "relu-one": (lambda: nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 4)), (6,), 3.0),
    "relu-deep": (lambda: nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(8, 8), nn.ReLU())], nn.Linear(8, 4)), (8,), 2.0),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4)), (6,), 1.0),
    "gelu": (lambda: nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 4)), (6,), 3.0),
    "gelu-tanh": (lambda: nn.Sequential(nn.Linear(6, 20), nn.GELU(approximate="tanh"), nn.Linear(20, 4)), (6,), 3.0),
    "scaled-gelu": (lambda: LipschitzMLP([6, 16, 16, 4], "scaled-gelu", mean=0.4, std=0.3), (6,), 1.5),
    "tanh": (lambda: nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4)), (6,), 3.0),
    "sigmoid": (lambda: nn.Sequential(nn.Linear(6, 20), nn.Sigmoid(), nn.Linear(20, 4)), (6,), 4.0),
    "silu": (lambda: nn.Sequential(nn.Linear(6, 20), nn.SiLU(), nn.Linear(20, 12), nn.SiLU(), nn.Linear(12, 4)), (6,), 3.0),
    "leaky": (lambda: nn.Sequential(nn.Linear(6, 20), nn.LeakyReLU(-0.3), nn.Linear(20, 12), nn.LeakyReLU(0.05), nn.Linear(12, 4)), (6,), 2.0),
    "clamps": (lambda: nn.Sequential(nn.Linear(6, 16), nn.Hardtanh(), nn.Linear(16, 12), Clamp(-0.2, 0.9), nn.Linear(12, 4)), (6,), 2.0),
    "pieces": (lambda: nn.Sequential(nn.Linear(6, 16), Abs(), nn.Linear(16, 12), nn.Softshrink(0.3), nn.Linear(12, 4)), (6,), 1.5),
    "elu": (lambda: nn.Sequential(nn.Linear(6, 20), nn.ELU(2.0), nn.Linear(20, 12), nn.SELU(), nn.Linear(12, 4)), (6,), 2.0),
    "softplus": (lambda: nn.Sequential(nn.Linear(6, 20), nn.Softplus(3.0), nn.Linear(20, 12), nn.Mish(), nn.Linear(12, 4)), (6,), 2.0),
    "hardswish": (lambda: nn.Sequential(nn.Linear(6, 20), nn.Hardswish(), nn.Linear(20, 12), nn.Softsign(), nn.Linear(12, 4)), (6,), 3.0),
    "maxmin": (lambda: nn.Sequential(nn.Linear(6, 16), MaxMin(), nn.Linear(16, 12), GroupSort(2), nn.Linear(12, 4)), (6,), 2.0),
    "residual": (
        lambda: nn.Sequential(nn.Linear(6, 9), Residual.convex(nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 9)), 0.4), nn.Linear(9, 4)),
        (6,),
        2.0,
    ),
    "sum": (
        lambda: nn.Sequential(
            nn.Linear(6, 9),
            Sum(nn.Sequential(nn.ReLU(), nn.Linear(9, 7)), nn.Linear(9, 7), nn.Sequential(Channels(1, 8), nn.ReLU()), weights=(0.5, -1, 1)),
            nn.ReLU(), nn.Linear(7, 4),
        ), (6,), 2.0,
    ),
    "concatenate": (
        lambda: nn.Sequential(Concatenate(nn.Sequential(nn.Linear(6, 9), nn.ReLU()), nn.Linear(6, 4)), nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 4)),
        (6,), 2.0,
    ),
    "batchnorm": (batch_normed, (6,), 1.0),
    "signals": (
        lambda: nn.Sequential(
            nn.Conv1d(1, 3, 3), nn.ReLU(), nn.AvgPool1d(2), nn.ConvTranspose1d(3, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool1d(3), nn.Flatten(),
            nn.Linear(6, 4),
        ), (1, 8), 1.5,
    ),
    "volumes": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.ReLU(), nn.ConvTranspose3d(2, 2, 2), nn.AvgPool3d(2, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
            nn.Linear(2, 4),
        ), (1, 3, 3, 3), 1.5,
    ),
    "resampled": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(1, 2, 2), nn.ReLU(), nn.UpsamplingNearest2d(scale_factor=2), nn.Conv2d(2, 2, 3, 2), nn.ReLU(),
            nn.UpsamplingBilinear2d(scale_factor=2), nn.Upsample(scale_factor=2), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(18, 4),
        ), (1, 3, 3), 1.5,
    ),
    "gates": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), Product(nn.ReLU(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.Sigmoid())), nn.Flatten(),
            Product(nn.Sequential(nn.Linear(27, 6), nn.SiLU()), nn.Linear(27, 6)),
            Maximum(nn.Linear(6, 5), nn.Sequential(nn.Linear(6, 5), nn.Tanh())), Minimum(nn.Linear(5, 4), nn.Linear(5, 4)),
        ), (1, 5, 5), 1.5,
    ),
    "constants": (
        lambda: nn.Sequential(
            Shift(0.5, subtract=True), nn.ZeroPad2d((1, 0, 0, 1)), nn.Conv2d(1, 3, 3), Scale([0.5, -2.0, 1.0]), nn.ReLU(), nn.Flatten(),
            nn.Linear(27, 4),
        ), (1, 4, 4), 1.5,
    ),
    "conv": (mixed, (1, 6, 6), 1.5),
    "conv-mean": (lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)), (1, 5, 5), 3.0),
    "nothing": (
        lambda: nn.Sequential(
            nn.Identity(), nn.Conv2d(1, 3, 3), nn.Dropout2d(0.5), nn.Dropout3d(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(27, 12), nn.Dropout(0.5),
            nn.ReLU(), nn.Dropout1d(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5), nn.Sequential(nn.Linear(12, 4)),
        ),
        (1, 5, 5),
        2.0,
    ),
}  # fmt: skip


def test_every_layer_of_the_networks_has_a_model() -> None:
    covered = {type(m) for build, _, _ in MODELS.values() for m in build().modules()}
    named = {*network_module._STEPS, *mapped_layers()}
    assert {kind.__name__ for kind in named - covered} == set()


# In every norm each time: the usual kinds. The others in l2 alone; `make test-all` has all of them.
CORE = ("relu", "gelu", "leaky", "maxmin", "residual", "batchnorm")
EVERY = [
    pytest.param(name, norm, id=f"{norm}-{name}", marks=() if norm == "l2" or name in CORE else pytest.mark.slow) for norm in NORMS for name in MODELS
]


def make(name: str, seed: int = 0, count: int = 12) -> tuple[Chain, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(model, inputs, labels as predicted, logits)."""
    build, shape, gain = MODELS[name]
    torch.manual_seed(seed)
    model = scaled(build(), gain)
    x = torch.rand(count, *shape)
    logits = model.scores(x)
    return model, x, logits.argmax(-1), logits


def context_of(model: Chain, dtype: torch.dtype = torch.float32) -> Context:
    return Context(dtype, constants_of(model)[1])


def radii(method: str, model: Chain, x: torch.Tensor, y: torch.Tensor, norm: str, dtype: torch.dtype = torch.float32, **options) -> torch.Tensor:
    with torch.no_grad():
        radius, bound = METHODS[method](model, x, y, model.scores(x), InputBall(norm), context_of(model, dtype), **options)
    assert radius.dtype == torch.float64 and radius.shape == bound.shape == (len(x),) and radius.device.type == "cpu"
    return radius


@cache
def proved(name: str, norm: str) -> dict[str, torch.Tensor]:
    """The radii of every method that applies to `make(name, NORMS.index(norm))`: for the attack, and for the comparison of the methods."""
    model, x, y, _ = make(name, NORMS.index(norm))
    return {m: radii(m, model, x, y, norm) for m in METHODS if not APPLIES[m](model, InputBall(norm))}


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_no_attack_succeeds_inside_the_radius(name, norm) -> None:
    """One attack, which knows no method, is compared with all; each norm has weights of its own."""
    model, x, y, _ = make(name, NORMS.index(norm))
    found = torch.as_tensor(by_name("min")(model, x, y, InputBall(norm)).radius)
    assert set(proved(name, norm)) >= {"ibp", "crown", "local-lipschitz"}
    for method, radius in proved(name, norm).items():
        assert bool((radius <= found).all()), method
        assert float((radius > 0).double().mean()) > 0.7, method
        assert float((radius / found).median()) > 0.02, method  # a bound that nothing comes near would hide a broken attack


@pytest.mark.parametrize("norm", NORMS)
def test_hundreds_of_samples_survive_pgd_at_their_radius(norm) -> None:
    """All methods in one batch: 300 samples at the radius of the first method, the same 300 at that of the second, …"""
    model, x, y, _ = make("relu", 3, 300)
    radius = torch.cat([radii(method, model, x, y, norm) for method in METHODS])
    model64, points, y = copy.deepcopy(model).double(), x.double().repeat(len(METHODS), 1), y.repeat(len(METHODS))
    # Steepest ascent of every rival in turn, at exactly the radius of each sample.
    for rival in range(4):
        delta = torch.zeros_like(points)
        for _ in range(30):
            moved = (points + delta).requires_grad_()
            logits = model64(moved)
            gap = logits[:, rival] - logits.gather(1, y[:, None])[:, 0]
            g = torch.autograd.grad(gap.sum(), moved)[0]
            step = {
                "l2": g / g.norm(dim=-1, keepdim=True).clamp_min(1e-30),
                "linf": g.sign(),
                "l1": torch.zeros_like(g).scatter(1, g.abs().argmax(-1, keepdim=True), 1.0) * g.sign(),
            }[norm]
            delta = radius[:, None] * step if norm != "l2" else 0.5 * delta + 0.5 * radius[:, None] * step
            assert bool((model64(points + delta).argmax(-1) == y).all())
            assert bool((torch.linalg.vector_norm(delta, ord=ORDER[norm], dim=-1) <= radius * (1 + 1e-12)).all())


# ---- bounds of margins at a given radius, against many points of the ball


def points_in(ball: Ball, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, N, n): on the border of the ball, and its extreme points among them."""
    n, d = ball.x.shape
    raw = torch.randn(count, n, d, generator=generator, dtype=torch.float64)
    if ball.norm == "linf":
        raw = torch.where(torch.rand(count, 1, 1, generator=generator, dtype=torch.float64) < 0.7, raw.sign(), raw)
    if ball.norm == "l1":
        corner = torch.zeros_like(raw).scatter(2, raw.abs().argmax(-1, keepdim=True), 1.0) * raw.sign()
        raw = torch.where(torch.rand(count, 1, 1, generator=generator, dtype=torch.float64) < 0.7, corner, raw)
    size = torch.linalg.vector_norm(raw, ord=ORDER[ball.norm], dim=-1, keepdim=True)
    return ball.x + raw / size * ball.radius[:, None] * (1 - 1e-14)


def least_margins(network, ball: Ball, y: torch.Tensor, steps: int = 16) -> torch.Tensor:
    """The smallest margin (N, C) seen in the ball: random and extreme points, then descent for each rival from the best of them."""
    generator = torch.Generator().manual_seed(5)
    cloud = points_in(ball, 400, generator)
    count, n = cloud.shape[:2]
    logits = network.forward(cloud.flatten(0, 1))[-1].view(count, n, -1)
    margin = logits.gather(2, y.expand(count, n)[..., None]) - logits
    least, where = margin.min(0)
    for rival in range(logits.shape[-1]):
        point = cloud[where[:, rival], torch.arange(n)]
        for step in range(steps):
            point = point.detach().requires_grad_()
            out = network.forward(point)[-1]
            gap = out.gather(1, y[:, None])[:, 0] - out[:, rival]
            least[:, rival] = torch.minimum(least[:, rival], gap.detach())
            (g,) = torch.autograd.grad(gap.sum(), point)
            move = {"l2": g, "linf": g.sign(), "l1": torch.zeros_like(g).scatter(1, g.abs().argmax(-1, keepdim=True), 1.0) * g.sign()}[ball.norm]
            move = move / torch.linalg.vector_norm(move, ord=ORDER[ball.norm], dim=-1, keepdim=True).clamp_min(1e-30)
            share = 1.0 if step % 2 == 0 else 0.3
            delta = (1 - share) * (point.detach() - ball.x) - share * ball.radius[:, None] * move
            point = ball.x + delta
    return least


def lower_bounds(network, ball: Ball, y: torch.Tensor, model: Chain) -> dict[str, torch.Tensor]:
    boxes = linear_boxes(network, ball)
    plain = interval_boxes(network, ball)
    found = {
        "ibp": interval_margins(network, ball, plain, y),
        "crown": linear_margins(network, ball, boxes, y),
        "local": lipschitz_margins(network, ball, boxes, y, gains(network, ball.norm, context_of(model), model))[0],
    }
    if not sdp_why_not(model, InputBall(ball.norm)):
        found["sdp"] = dual_margins(network, ball, boxes, y)
    return found


def dual_margins(network, ball: Ball, boxes, y: torch.Tensor, steps: int = 20, noise: float = 0.0) -> torch.Tensor:
    """Lower bounds (N, C) by the dual, of every rival, −inf where the multipliers make no definite form; with random multipliers by `noise`."""
    logits = network.forward(ball.x)[-1]
    margin = (logits.gather(1, y[:, None]) - logits).scatter(1, y[:, None], torch.inf)
    form = form_of(network, ball, boxes, y)
    floor = torch.zeros_like(margin).scatter(1, y[:, None], torch.inf)
    search = Search(form, ball, margin.abs().clamp_min(1e-3), floor)
    search.begin(None)
    search.ascend(steps, 0.1)
    pairs = torch.arange(len(search.sample))
    known = [t.double() for t in search.multipliers]
    known = [t * (1 + noise * torch.randn_like(t)) + noise * torch.randn_like(t) for t in known]
    scales = search.scales.take(pairs)
    scales = dual_module.Scales(scales.last.double(), [t.double() for t in scales.inner], scales.gradient.double())
    multipliers = Multipliers.of(known)
    if noise:
        multipliers = dual_module.strengthen(dual_module.strengthen(multipliers))
    made = Dual(search.instances(pairs, form), multipliers, scales)
    radius = ball.radius[search.sample]
    bound = proved_offset(made) - made.split_cost() * radius - made.total_lambda() * radius.square()
    out = torch.full_like(margin, -torch.inf)
    out[search.sample, search.rival] = bound
    return out.scatter(1, y[:, None], 0.0)


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_every_rivals_bound_is_below_every_margin_in_the_ball(name, norm) -> None:
    """Random weights, radii from tiny to so large that nearly every unit crosses 0; each rival on its own, the label's own row 0."""
    for seed, radius in ((0, 0.02), (1, 0.2), (2, 1.0)):
        model, x, y, _ = make(name, seed, 6)
        network = network_of(model, tuple(x.shape[1:]), context_of(model))
        ball = Ball(x.double().flatten(1), torch.full((6,), radius, dtype=torch.float64), norm)
        seen = least_margins(network, ball, y)
        bounds = lower_bounds(network, ball, y, model)
        for method, bound in bounds.items():
            assert bool((bound <= seen + 1e-12).all()), (method, seed)
            assert method == "sdp" or bool(bound.isfinite().all())
        if radius == 0.02:
            assert bool((bounds["crown"] > seen - 0.3 * (1 + seen.abs())).all())


@pytest.mark.parametrize(
    "kind",
    [
        nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, lambda: nn.LeakyReLU(-0.4), lambda: nn.LeakyReLU(1.8), nn.Hardtanh, nn.Softshrink, Abs, nn.ELU, nn.SELU,
        nn.Softplus, nn.Hardswish, nn.Mish, nn.Softsign,
    ],
)  # fmt: skip
def test_bounds_on_a_line_are_below_every_point_of_it(kind) -> None:
    """One input and few neurons: 2001 points are the whole ball. CROWN alone, without the interval's bound that could hide its faults."""
    tight = []
    for seed in range(16):
        torch.manual_seed(seed)
        hidden = [nn.Linear(1, 3), kind()] if seed % 2 else [nn.Linear(1, 2), kind(), nn.Linear(2, 3), kind()]
        model = scaled(nn.Sequential(*hidden, nn.Linear(3, 2)), 2.5)
        x = torch.randn(4, 1)
        y = model(x).argmax(-1)
        network = network_of(model, (1,), context_of(model))
        ball = Ball(x.double(), torch.tensor([0.3, 0.7, 1.5, 3.0], dtype=torch.float64), "l2")
        line = ball.x[None] + ball.radius[:, None] * torch.linspace(-1, 1, 2001, dtype=torch.float64).view(-1, 1, 1)
        out = network.forward(line.flatten(0, 1))[-1].view(2001, 4, 2)
        truth = (out.gather(2, y.expand(2001, 4)[..., None]) - out).amin(0)
        boxes = linear_boxes(network, ball)
        found = lower_bounds(network, ball, y, model) | {"lines": backward(network, ball, boxes, len(network.stages) - 1, rival_rows(y, 2))}
        for method, bound in found.items():
            assert bool((bound <= truth + 1e-12).all()), (method, seed)
        tight.append((found["lines"] > truth - 0.05 * (1 + truth.abs())).double().mean())
    assert float(torch.stack(tight).mean()) > 0.5


@pytest.mark.parametrize("norm", NORMS)
def test_weights_trained_against_the_bounds_do_not_break_them(norm) -> None:
    """Gradient descent on the weights makes the margin at a fixed far point of the ball as small as it can against the clean one, with many
    units crossing on the way: what a linearisation at the clean point knows least about."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    x = torch.rand(5, 4, dtype=torch.float64)
    y = model(x).argmax(-1)
    ball = Ball(x, torch.full((5,), 1.5, dtype=torch.float64), norm)
    far = points_in(ball, 1, torch.Generator().manual_seed(2))[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(60):
        here, there = model(x), model(far)
        bent = there - here - torch.autograd.functional.jvp(model, x, far - x, create_graph=True)[1]
        loss = (bent.gather(1, y[:, None])[:, 0] - bent.mean(-1)).sum() / sum(p.square().sum() for p in model.parameters()).sqrt()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            chain = as_chain(copy.deepcopy(model).requires_grad_(False))
            network = network_of(chain, (4,), context_of(chain, torch.float64))
            seen = least_margins(network, ball, y)
            out = network.forward(far)[-1]
            seen = torch.minimum(seen, out.gather(1, y[:, None]) - out)
            for method, bound in lower_bounds(network, ball, y, chain).items():
                assert bool((bound <= seen + 1e-12).all()), (method, step)
    assert float(loss.detach()) < -1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_any_multipliers_are_sound(norm) -> None:
    """Random multipliers of either sign prove less, never too much; most of them give a definite form once they are stiff."""
    proved = 0
    for seed in range(4):
        for name in ("relu", "relu-deep", "maxmin", "residual"):
            model, x, y, _ = make(name, seed, 6)
            network = network_of(model, tuple(x.shape[1:]), context_of(model))
            ball = Ball(x.double().flatten(1), torch.full((6,), 0.3, dtype=torch.float64), norm)
            bound = dual_margins(network, ball, linear_boxes(network, ball), y, steps=3, noise=(0.0, 0.05, 0.2, 0.5)[seed])
            assert bool((bound <= least_margins(network, ball, y) + 1e-12).all())
            proved += int(bound.isfinite().sum())
    assert proved > 150


@pytest.mark.slow
def test_the_dual_is_nearly_exact_with_two_inputs() -> None:
    """Rays in 360 directions find the true radius, from above, to within their spacing."""
    for seed in (2,):
        torch.manual_seed(seed)
        model = scaled(nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), 2.0)
        x = torch.rand(10, 2)
        y = model(x).argmax(-1)
        network = network_of(model, (2,), context_of(model))
        angle = torch.linspace(0, 2 * math.pi, 361, dtype=torch.float64)
        length = torch.linspace(0, 2, 801, dtype=torch.float64)
        cloud = torch.stack([angle.cos(), angle.sin()], -1)[:, None] * length[:, None]
        truth = []
        for point, label in zip(x.double(), y, strict=True):
            broken = network.forward((point + cloud).flatten(0, 1))[-1].argmax(-1).view(361, 801) != label
            truth.append(float(length[broken.any(0)].min()) if bool(broken.any()) else math.inf)
        exact = torch.tensor(truth, dtype=torch.float64)
        radius = radii("sdp", model, x, y, "l2", rounds=9)
        near = exact.isfinite()
        assert bool((radius <= exact).all()) and int(near.sum()) > 5
        assert float((radius / exact)[near].median()) > 0.8 and float((radius / exact)[near].max()) > 0.97


# ---- pieces


@pytest.mark.parametrize("name", MODELS)
def test_networks_are_the_models(name) -> None:
    model, x, _, _ = make(name)
    network = network_of(model, tuple(x.shape[1:]), context_of(model))
    exact = copy.deepcopy(model).double()(x.double())
    size = x.double().flatten(1).norm(dim=-1)
    # Sizes that know of no boxes are squared at each product.
    point = Ball(x.double().flatten(1), torch.zeros(len(x), dtype=torch.float64), "l2")
    known = norms_from_boxes(network, interval_boxes(network, point))
    gap = (network.forward(x.double().flatten(1))[-1] - exact).norm(dim=-1)
    assert bool((gap <= 1e-12 * (1 + exact.norm(dim=-1))).all())
    executed = interval_boxes(network, point, context_of(model, torch.float64)).error[-1].norm(dim=-1)
    assert bool((gap <= executed + 2 * network.forward_errors(size, known)[-1]).all())


def test_joined_matrices_state_their_own_error() -> None:
    """Normalize, two Linear layers in a row: the joined matrix in 60 digits is within weight_error and bias_error, which are not 0."""
    torch.manual_seed(0)
    layers = nn.Sequential(Normalize([0.1, 0.2, 0.3, 0.7], [0.3, 0.7, 0.9, 0.11]), nn.Linear(4, 30), nn.Linear(30, 5))
    model = as_chain(layers.requires_grad_(False))
    (stage,) = network_of(model, (4,), context_of(model)).stages
    with mpmath.workdps(60):
        def matrix(t: torch.Tensor) -> mpmath.matrix:
            return mpmath.matrix(t.double().tolist())

        std, mean = matrix(model[0].std), matrix(model[0].mean)
        gain = mpmath.diag([1 / s for s in std])
        first, second = matrix(model[1].weight), matrix(model[2].weight)
        weight = second * first * gain
        bias = second * (first * (-gain * mean) + matrix(model[1].bias)) + matrix(model[2].bias)
        wrong = mpmath.norm(mpmath.matrix([abs(v) for v in weight - matrix(stage.weight)]), 2)
        off = mpmath.norm(bias - matrix(stage.bias), 2)
    assert 0 < float(wrong) <= stage.weight_error < 1e-12 and 0 < float(off) <= stage.bias_error < 1e-12
    deep = scaled(mixed(), 1.0)
    assert network_of(deep, (1, 6, 6), context_of(deep)).stages[0].weight_error > 0


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_boxes_hold_every_activation_of_the_ball(name, norm) -> None:
    model, x, _, _ = make(name, 1, 5)
    network = network_of(model, tuple(x.shape[1:]), context_of(model))
    for radius in (0.05, 0.6):
        ball = Ball(x.double().flatten(1), torch.full((5,), radius, dtype=torch.float64), norm)
        cloud = points_in(ball, 500, torch.Generator().manual_seed(1))
        layers = [z.view(500, 5, -1) for z in network.forward(cloud.flatten(0, 1))[:-1]]
        for boxes in (interval_boxes(network, ball), linear_boxes(network, ball)):
            for z, low, high in zip(layers, boxes.low, boxes.high, strict=True):
                assert bool(((z >= low) & (z <= high)).all())
    if network.hidden:  # the first box is attained: by the gradient's own extreme point of the ball
        w = network.stages[0].weight
        extreme = {"l2": w / w.norm(dim=-1, keepdim=True).clamp_min(1e-30), "linf": w.sign(),
                   "l1": torch.zeros_like(w).scatter(1, w.abs().argmax(-1, keepdim=True), 1.0) * w.sign()}[norm]  # fmt: skip
        top = ((ball.x[:, None] + ball.radius[:, None, None] * extreme) * w).sum(-1) + network.stages[0].bias
        high = first_box(network.stages[0], ball)[1]
        assert bool((top <= high).all()) and bool((top >= high - 1e-9 * (1 + high.abs())).all())


def in_digits(name: str, z: float) -> mpmath.mpf:
    return DIGITS[name](mpmath.mpf(z))


INTERVALS = [
    (-0.3, 0.4), (-3.0, 2.0), (0.1, 0.2), (-1.5, -1.2), (-9.0, 11.0), (-0.7517, -0.7516), (1.0, 1.0), (-2.0, -0.5), (-40.0, 0.01), (-3.4, -2.9),
    (2.8, 3.1), (-0.9, 2.2),
]  # fmt: skip


@pytest.mark.parametrize("name", CURVES)
def test_lines_bands_and_slopes_hold_in_forty_digits(name) -> None:
    curve = CURVES[name]
    flat, steep = elementwise_of(ACTIVATIONS[name][0]).slope
    with mpmath.workdps(40):
        for a, b in INTERVALS:
            low, high = (torch.tensor([v], dtype=torch.float64) for v in (a, b))
            s, t, upper, above = (float(v) for v in curve.lines(low, high))
            below, top = (float(v) for v in curve.value_range(low, high))
            centres = [torch.tensor([share * a + (1 - share) * b], dtype=torch.float64) for share in (0.7, 0.2)]
            secants = [[float(v) for v in curve.secant_slopes((centre, centre), low, high)] for centre in centres]
            slack = 0.0
            for i in range(301):
                z = a + (b - a) * i / 300 if i < 300 else b
                value = in_digits(name, z)
                assert mpmath.mpf(s) * mpmath.mpf(z) + mpmath.mpf(t) <= value <= mpmath.mpf(upper) * mpmath.mpf(z) + mpmath.mpf(above), (a, b, z)
                assert below <= value <= top, (a, b, z)
                for centre, (least, most) in zip(centres, secants, strict=True):
                    if abs(z - float(centre)) > 1e-3:
                        secant = (value - in_digits(name, float(centre))) / (mpmath.mpf(z) - mpmath.mpf(float(centre)))
                        assert least <= secant <= most, (a, b, z)
                slack = max(slack, float(mpmath.mpf(upper) * mpmath.mpf(z) + mpmath.mpf(above) - value))
            if b - a < 1:
                share = 0.45 if isinstance(curve, PiecewiseLinear) else 0.3
                assert slack < share * max(1.0, steep - flat) * (b - a) + 1e-9  # lines that say nothing would pass


def test_slopes_from_an_uncertain_centre_hold_from_all_of_it() -> None:
    curve = RELU
    first, last = torch.tensor([-0.1], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    low, high = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    a, b = (float(v) for v in curve.secant_slopes((first, last), low, high))
    for centre in (-0.1, 0.0, 0.1, 0.2):
        for z in torch.linspace(-1, 1, 41).tolist():
            if abs(z - centre) > 1e-6:
                assert a <= (max(z, 0) - max(centre, 0)) / (z - centre) <= b
    assert (a, b) == (0.0, 1.0)


@pytest.mark.parametrize("name", [n for n in CURVES if isinstance(CURVES[n], Smooth)])
def test_curvature_and_minimum_are_those_of_forty_digits(name) -> None:
    curve = CURVES[name]
    assert isinstance(curve, Smooth)
    with mpmath.workdps(40):
        second = lambda z: mpmath.diff(lambda t: in_digits(name, t), z, 2)  # noqa: E731
        first = lambda z: mpmath.diff(lambda t: in_digits(name, t), z)  # noqa: E731
        grid = [mpmath.mpf(i) / 40 for i in range(-320, 321)]
        kinks = [0.0, *[place for place, _, _ in curve.kinks]]  # at 0 some second derivatives jump, or are largest
        grid = [z for z in grid if all(abs(z - k) > 1e-9 for k in kinks)] + [mpmath.mpf(k + side * 1e-6) for k in kinks for side in (-1, 1)]
        top = max(abs(second(z)) for z in grid)
        assert top <= curve.curvature <= float(top) * 1.01
        assert max(abs(first(z)) for z in grid) <= curve.lipschitz
        if curve.lowest is not None:
            place = curve.lowest[0] if curve.lowest[0] in kinks else mpmath.findroot(first, curve.lowest[0])
            assert abs(place - curve.lowest[0]) < 1e-4 and curve.lowest[1] <= in_digits(name, place) <= curve.lowest[1] + 1e-5
            grid.sort()
            before, after = ([in_digits(name, z) for z in part] for part in ([z for z in grid if z <= place], [z for z in grid if z >= place]))
            assert all(a >= b for a, b in pairwise(before)) and all(a <= b for a, b in pairwise(after))
        for z in (-3.1, -0.4, 1e-4, 0.9, 5.0):
            assert abs(float(curve.derivative(torch.tensor(z, dtype=torch.float64))) - float(first(z))) < 1e-12


@pytest.mark.parametrize("name", [n for n in CURVES if isinstance(CURVES[n], PiecewiseLinear)])
def test_piecewise_linear_curves_have_the_best_lines_and_slopes(name) -> None:
    """In the middle of the interval no line above φ is lower than the concave envelope there, and theirs is no higher; slopes are attained."""
    curve = CURVES[name]
    g = torch.Generator().manual_seed(0)
    ends = 3 * torch.randn(2, 300, dtype=torch.float64, generator=g)
    low, high = ends.amin(0), ends.amax(0) + 0.05
    z = low + (high - low) * torch.linspace(0, 1, 102, dtype=torch.float64)[:, None]  # an even number of points, none in the middle
    z = torch.cat([z, *(low.clamp_min(k).minimum(high)[None] for k in curve.breakpoints)])
    value, middle = curve.value(z), (low + high) / 2
    left, right = z < middle, z > middle
    share = (middle - z[:, None]) / (z - z[:, None] + 1e-300)  # of the right point, (points, points, intervals)
    height = torch.where(left[:, None] & right, value[:, None] + share * (value - value[:, None]), torch.nan)
    s, t, upper, above = curve.lines(low, high)
    top = torch.maximum(height.nan_to_num(-torch.inf).amax((0, 1)), curve.value(middle))
    bottom = torch.minimum(height.nan_to_num(torch.inf).amin((0, 1)), curve.value(middle))
    assert bool(((upper * middle + above - top).abs() < 1e-9).all()) and bool(((s * middle + t - bottom).abs() < 1e-9).all())
    for centre in (low + 0.3 * (high - low), low, high, torch.zeros_like(low)):
        first, last = centre - 1e-3, centre + 2e-3
        a, b = curve.secant_slopes((first, last), low, high)
        starts = torch.stack([first, centre, last, *(first.clamp_min(k).minimum(last) for k in curve.breakpoints)])
        apart = (z[:, None] - starts).abs()
        secant = (value[:, None] - curve.value(starts)) / (z[:, None] - starts)
        seen = torch.where(apart > 1e-7, secant, torch.nan)
        found = seen.nan_to_num(torch.inf).amin((0, 1)), seen.nan_to_num(-torch.inf).amax((0, 1))
        assert bool((found[0] >= a - 1e-8).all()) and bool((found[1] <= b + 1e-8).all())
        assert float(torch.stack([(found[0] - a).abs() < 1e-6, (found[1] - b).abs() < 1e-6]).double().mean()) > 0.97


@pytest.mark.parametrize("slope", [0.01, -0.5, 2.0, 0.1])
def test_lines_of_two_slopes_hold_in_exact_arithmetic(slope) -> None:
    curve, g = activation_of(nn.LeakyReLU(slope)), torch.Generator().manual_seed(1)
    low, high = (sign * 10 ** (8 * torch.rand(2000, dtype=torch.float64, generator=g) - 4) for sign in (-1, 1))
    for a, b, *line in zip(*(v.tolist() for v in (low, high, *curve.lines(low, high))), strict=True):
        lower, bottom, upper, top = map(Fraction, line)
        for z in (Fraction(a), Fraction(0), Fraction(b)):
            value = z if z > 0 else Fraction(slope) * z
            assert lower * z + bottom <= value <= upper * z + top


def test_scaled_gelu_divides_everything() -> None:
    curve = activation_of(ScaledGELU(2.0))
    z = torch.linspace(-4, 4, 81, dtype=torch.float64)
    low, high = torch.full_like(z, -4.0), torch.full_like(z, 4.0)
    s, t, upper, above = curve.lines(low, high)
    value = ScaledGELU(2.0)(z)
    assert bool((s * z + t <= value).all()) and bool((value <= upper * z + above).all())
    assert float(curve.value_range(low, high)[0].amin()) <= float(value.min()) and curve.lipschitz < 0.5646


def test_minima_on_the_graph_of_relu() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(200, 5, 7, generator=generator, dtype=torch.float64)
    low, high = (sign * torch.rand(200, 7, generator=generator, dtype=torch.float64) * 3 for sign in (-1, 1))
    one = torch.ones_like(low)
    layer = Layer(one.long(), one, one[..., None], one, low, high, one, one, slice(0, 0))
    z = low + (high - low) * torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None, None]
    h = z.clamp_min(0.0)
    a, b, zz, hh, zh = q.unbind(1)
    grid = (a * z + b * h + zz * z * z + hh * h * h + zh * z * h).amin(0)
    found = minimum_on_relu(q, layer)
    assert bool((found <= grid + 1e-12).all()) and bool((found >= grid - 2e-2).all())


# ---- rounding


@pytest.mark.parametrize("method", METHODS)
def test_low_precision_shortens_radii_and_they_hold_as_executed(method) -> None:
    model, x, _, _ = make("relu-one", 0, 10)
    exact = radii(method, copy.deepcopy(model).double(), x.double(), model.scores(x).argmax(-1), "l2", torch.float64)
    low = copy.deepcopy(model).half()
    inputs = x.half()
    y = low.scores(inputs).argmax(-1)
    radius = radii(method, low, inputs, y, "l2", torch.float16)
    both = (exact > 0) & (model.scores(x).argmax(-1) == y)
    assert bool((radius[both] < exact[both] + 0.05).all()) and bool((radius > 0).any())
    assert float(radius[both].sum()) < float(exact[both].sum())
    found = torch.as_tensor(by_name("min")(low, inputs, y, InputBall("l2")).radius)
    assert bool((radius <= found).all())


def test_no_more_than_the_margin_can_be_lost_to_rounding() -> None:
    """A margin that bfloat16's own rounding could close is not certified by any method."""
    model = as_chain(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 2)).requires_grad_(False).bfloat16())
    with torch.no_grad():
        model[2].weight[1] = model[2].weight[0]
        model[2].weight[1, 0] += 0.5
        model[2].bias.copy_(torch.tensor([0.0, 0.0]))
    x = torch.rand(30, 64).bfloat16()
    logits = model.scores(x)
    for method in METHODS:
        radius = METHODS[method](model, x, logits.argmax(-1), logits, InputBall("l2"), context_of(model, torch.bfloat16))[0]
        margin = (logits[:, 0] - logits[:, 1]).double().abs()
        norm = x.double().norm(dim=-1)
        bound = GlobalBound(model, list(model), x, norm, InputBall("l2"), logits.argmax(-1), context_of(model, torch.bfloat16))
        single = bound.at(torch.zeros(30, dtype=torch.float64))[2]
        assert bool((radius[margin < single] == 0).all())


# ---- radii


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_linear_models_have_their_exact_radius(method, norm) -> None:
    model, x, y, logits = make("linear", 0, 50)
    weight = model[0].weight.double()
    rows = weight[y][:, None] - weight
    dual = torch.linalg.vector_norm(rows, ord={"l2": 2, "linf": 1, "l1": math.inf}[norm], dim=-1)
    logits = copy.deepcopy(model).double()(x.double())
    truth = ((logits.gather(1, y[:, None]) - logits) / dual).scatter(1, y[:, None], torch.inf).amin(1)
    radius = radii(method, model, x, y, norm)
    assert bool((radius <= truth).all())
    typical = truth > 0.05
    assert bool((radius[typical] >= 0.99 * truth[typical]).all())


@pytest.mark.parametrize("norm", NORMS)
def test_better_methods_prove_no_less(norm) -> None:
    for name in ("relu", "relu-deep", "maxmin"):
        model, x, y, logits = make(name, NORMS.index(norm))
        found = proved(name, norm)
        plain = global_radii(model, x, y, logits, InputBall(norm), context_of(model))[0]
        assert bool((found["crown"] >= 0.99 * found["ibp"]).all())
        # MaxMin is written as three rows a pair here, whose norms are larger than that of sorting.
        assert name == "maxmin" or bool((found["local-lipschitz"] >= 0.98 * plain).all())
        best = torch.maximum(found["sdp"], found["crown"])
        assert float((best / torch.maximum(found["crown"], found["local-lipschitz"])).median()) > 0.999
    if norm == "l2":
        assert float((found["sdp"] / found["local-lipschitz"]).median()) > 1.0


@pytest.mark.parametrize(("name", "least"), [("digits-mlp-lipschitz", 0.8), ("digits-mlp-baseline", 0.85)])
def test_zoo_models_are_certified_near_to_where_attacks_succeed(name, least) -> None:
    from robustlip.data import load_data
    from robustlip.models.zoo import load

    model, data = load(name), load_data("digits:test")
    x, y = data.x[40:52], data.y[40:52]
    radius = radii("sdp", model, x, y, "l2")
    found = torch.as_tensor(by_name("min")(model, x, y, InputBall("l2")).radius)
    right = model.scores(x).argmax(-1) == y
    assert bool((radius <= found).all())
    assert float((radius / found)[right].median()) > least


@pytest.mark.parametrize("method", METHODS)
def test_wrong_and_tied_samples_have_radius_zero(method) -> None:
    model, x, y, _ = make("relu")
    wrong = (y + 1) % 4
    assert bool((radii(method, model, x, wrong, "l2") == 0).all())
    mixed_labels = torch.where(torch.arange(len(y)) % 2 == 0, y, wrong)
    radius = radii(method, model, x, mixed_labels, "l2")
    assert bool((radius[1::2] == 0).all()) and bool((radius[::2] > 0).any())
    with torch.no_grad():
        model[-1].weight.copy_(model[-1].weight[:1].expand_as(model[-1].weight))
        model[-1].bias.zero_()
    assert bool((radii(method, model, x, y, "l2") == 0).all())


@pytest.mark.parametrize("method", METHODS)
def test_dead_units_and_constant_models_do_no_harm(method) -> None:
    model, x, y, _ = make("relu")
    with torch.no_grad():
        model[0].weight[:7] = 0.0
        model[2].weight[:, 3:9] = 0.0
        model[0].bias[:3] = 0.0
    y = model.scores(x).argmax(-1)
    radius = radii(method, model, x, y, "l2")
    assert bool(radius.isfinite().all()) and bool((radius > 0).any())
    assert bool((radius <= torch.as_tensor(by_name("min")(model, x, y, InputBall("l2")).radius)).all())
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    constant = radii(method, model, x, torch.zeros_like(y), "l2")
    assert bool(constant.isfinite().all()) and bool((constant > 10).all())


def test_gradients_at_the_clean_point_are_autograds() -> None:
    model, x, y, _ = make("maxmin", 2)
    network = network_of(model, (6,), context_of(model))
    points = x.double().requires_grad_()
    logits = copy.deepcopy(model).double()(points)
    found = clean_gradients(network, x.double(), y)
    for rival in range(4):
        (truth,) = torch.autograd.grad((logits.gather(1, y[:, None])[:, 0] - logits[:, rival]).sum(), points, retain_graph=True)
        torch.testing.assert_close(found[:, rival], truth)


# ---- what they do not apply to


@pytest.mark.parametrize(
    ("layer", "word"),
    [(Householder(8), "Householder"), (GroupSort(4), "GroupSort(4)"), (nn.LayerNorm(8), "LayerNorm"), (nn.MaxPool2d(2), "MaxPool2d")],
    ids=lambda v: str(v)[:12],
)
def test_layers_without_relaxation_are_named(layer, word) -> None:
    model = as_chain(nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3)))
    for method in METHODS:
        assert word in APPLIES[method](model, InputBall("l2"))
        assert word in APPLIES[method](as_chain(nn.Sequential(nn.Linear(6, 6), Residual(nn.Sequential(nn.Linear(6, 8), layer)))), InputBall("l2"))
    x = torch.rand(2, 6)
    with pytest.raises(BadInput, match=word.replace("(", r"\(").replace(")", r"\)")):
        crown_radii(model, x, torch.zeros(2).long(), torch.zeros(2, 3), InputBall("l2"), context_of(model))


def test_threats_and_curves_that_do_not_fit_are_named(monkeypatch) -> None:
    relu, x, y, logits = make("relu")
    smooth = make("scaled-gelu")[0]
    assert "embedding-l2" in linear_why_not(relu, EmbeddingBall())
    assert "tokens" in linear_why_not(LipschitzGPT("abcd", 4, 1, 1), InputBall("l2"))
    assert linear_why_not(smooth, InputBall("linf")) == "" and "ScaledGELU" in sdp_why_not(smooth, InputBall("linf"))
    assert "hidden layer" in sdp_why_not(make("linear")[0], InputBall("l2"))
    wide = as_chain(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bicubic"), nn.Flatten(), nn.Linear(4, 2)))
    assert "bicubic" in linear_why_not(wide, InputBall("l2"))
    with pytest.raises(BadInput, match="ScaledGELU"):
        radii("sdp", *make("scaled-gelu")[:3], "l2")
    monkeypatch.setattr(dual_module, "LARGEST_FORM", 10)
    with pytest.raises(BadInput, match="26 rows"):
        sdp_radii(relu, x, y, logits, InputBall("l2"), context_of(relu))


def test_relu_lines_touch_where_they_should() -> None:
    relu = RELU
    assert isinstance(relu, Relu)
    low, high = torch.tensor([-1.0, -3.0, 0.5], dtype=torch.float64), torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    s, t, upper, above = relu.lines(low, high)
    torch.testing.assert_close(s, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(upper * high + above, high, rtol=1e-12, atol=0)
    torch.testing.assert_close(upper * low + above, low.clamp_min(0), rtol=0, atol=1e-12)
    assert float(t.abs().max()) == 0
