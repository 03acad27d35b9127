"""Branches that cancel: constants of whole blocks against all slopes that their activation can have, on weights built and optimised to break them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from robustlip.certifiers import certify
from robustlip.domains.norms import Context, State, rule_for
from robustlip.domains.norms.joins import SumRule
from robustlip.layers import MaxMin, Residual, Scale, ScaledGELU, Shift, Sum
from robustlip.ops import elementwise_of
from robustlip.ops.convolution import Convolution
from robustlip.ops.residual import together
from robustlip.threats import InputBall

ONE = torch.ones(1, dtype=torch.float64)


def sll(size: int, inner: int, seed: int = 0, convolution: bool = False) -> Sum:
    """x − 2W T⁻¹ relu(Wᵀx + b), Araujo et al. 2023, as their code runs it; of images with convolutions of 3×3."""
    g = torch.Generator().manual_seed(seed)
    if not convolution:
        w, q = torch.randn(size, inner, generator=g), torch.randn(inner, generator=g).exp()
        t = ((w.T @ w).abs() * q / q[:, None]).sum(1)
        first, last = nn.Linear(size, inner), nn.Linear(inner, size, bias=False)
        first.weight.data, last.weight.data = w.T.contiguous(), w
        scale = Scale(t, divide=True)
    else:
        k = torch.randn(inner, size, 3, 3, generator=g)
        t = torch.nn.functional.conv2d(k, k, padding=2).abs().sum((1, 2, 3))
        first, last = nn.Conv2d(size, inner, 3, padding=1), nn.ConvTranspose2d(inner, size, 3, padding=1, bias=False)
        first.weight.data, last.weight.data = k, k
        scale = Scale(1 / t)
    return Sum(nn.Identity(), nn.Sequential(first, nn.ReLU(), scale, last, Scale(2.0)), weights=(1.0, -1.0))


def matrix(layers: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The matrix of affine layers on samples of that shape."""
    n = math.prod(shape)
    with torch.no_grad():
        zero = layers(torch.zeros(1, *shape, dtype=torch.float64))
        return (layers(torch.eye(n, dtype=torch.float64).view(n, *shape)) - zero).flatten(1).T


def largest_slope(block: Sum, shape: tuple[int, ...], every: bool = False) -> float:
    """sup of ‖βI + αGSH‖ over slopes S of the activation, which are the ends of their interval: all of them, or many."""
    weights = dict(zip(("skip", "bent"), block.weights, strict=True))
    layers = list(block.branches[1])
    at = next(i for i, layer in enumerate(layers) if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | Scale | Shift))
    h = matrix(nn.Sequential(*layers[:at]).double(), shape)
    inside = tuple(nn.Sequential(*layers[:at])(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
    g = matrix(nn.Sequential(*layers[at + 1 :]).double(), inside)
    facts = elementwise_of(layers[at])
    low, high = (slope / facts.divisor for slope in facts.slope)
    if every:
        ends = torch.tensor(list(itertools.product((low, high), repeat=len(h))), dtype=torch.float64)
    else:
        draw = torch.rand(300, len(h), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        ends = torch.where(draw < torch.linspace(-0.05, 1.05, 300, dtype=torch.float64)[:, None], low, high)
    jacobians = weights["skip"] * torch.eye(h.shape[1], dtype=torch.float64) + weights["bent"] * (g * ends[:, None]) @ h
    return float(torch.linalg.matrix_norm(jacobians, 2).max())


def block(h: Tensor, g: Tensor, f: nn.Module, skip: float = 1.0, weight: float = 1.0) -> Residual:
    first, last = nn.Linear(h.shape[1], h.shape[0]).double(), nn.Linear(g.shape[1], g.shape[0]).double()
    first.weight.data, last.weight.data = h.clone(), g.clone()
    return Residual(nn.Sequential(first, f, last), skip=skip, weight=weight)


FUNCTIONS = {"relu": nn.ReLU(), "falls": nn.LeakyReLU(-0.5), "steep": nn.LeakyReLU(1.7), "tanh": nn.Tanh(), "gelu": ScaledGELU()}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("skip", "weight"), [(1.0, 1.0), (0.6, -0.7), (-1.0, 2.0)])
def test_constants_hold_for_every_slope(name, skip, weight) -> None:
    """From exact cancellation (where κ is below and above 1, and of both signs) to none."""
    g = torch.Generator().manual_seed(5)
    said = 0
    for trial in range(24):
        h = torch.randn(5, 4, generator=g, dtype=torch.float64) * (0.2, 0.5, 1.0)[trial % 3]
        fit, sign = torch.randn(2, 5, 1, generator=g, dtype=torch.float64)
        fit = fit.abs() if trial % 4 else fit.abs() * sign.sign()
        noise = torch.randn(4, 5, generator=g, dtype=torch.float64) * (0.0, 0.01, 0.1)[trial % 3]
        made = block(h, -(fit * h).T + noise, FUNCTIONS[name], skip, weight)
        bound, true = together(made, None, 4), largest_slope(made, (4,), every=True)
        assert true <= bound
        said += bound < math.inf
    assert said > 12


@pytest.mark.parametrize("seed", range(3))
def test_optimised_weights_do_not_break_the_rule(seed) -> None:
    """Gradient ascent on H and G for what slopes make of it, over the rule's own statement: never above 1, and near it."""
    g = torch.Generator().manual_seed(seed)
    h, fit = (torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for shape in ((4, 3), (4, 1)))
    rest = (0.1 * torch.randn(3, 4, generator=g, dtype=torch.float64)).requires_grad_()
    ends = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64)
    optimizer = torch.optim.Adam([h, fit, rest], lr=0.03)
    best = 0.0
    for _ in range(120):
        out = -(fit * h).T + rest
        jacobians = torch.eye(3, dtype=torch.float64) + (out * ends[:, None]) @ h
        true = torch.linalg.matrix_norm(jacobians, 2).max()
        lam = -(h * out.T).sum(1, keepdim=True) / h.square().sum(1, keepdim=True)
        left = torch.linalg.matrix_norm(out.T + lam * h, 2) * torch.linalg.matrix_norm(h, 2)
        up, down = (torch.linalg.matrix_norm(part.clamp_min(1e-12).sqrt() * h, 2) ** 2 for part in (lam, -lam))
        stated = torch.maximum((1 - up).abs(), 1 + down) + left
        bound = together(block(h.detach(), out.detach(), nn.ReLU()), None, 3)
        assert float(true.detach()) <= bound
        if bound < math.inf:
            assert bound == pytest.approx(float(stated.detach()), rel=1e-5, abs=1e-5)
            best = max(best, float(true.detach()) / bound)
        optimizer.zero_grad()
        (-(true / stated) - 0.02 * left.neg().clamp_min(-1)).backward()
        optimizer.step()
    assert best > 0.97


def test_blocks_of_the_field_have_constant_one() -> None:
    for made, shape in ((sll(12, 20), (12,)), (sll(20, 8, 1), (20,)), (sll(3, 5, 2, convolution=True), (3, 6, 5))):
        whole = shape if len(shape) > 1 else None
        bound = together(made, whole, shape[0])
        assert 1.0 <= bound <= 1 + 1e-5
        assert largest_slope(made.double(), shape) <= bound
    # Convex potential layers, Meunier et al. 2022: x − (2/‖W‖²)·Wᵀrelu(Wx + b), of signals, the adjoint written as a convolution turned round.
    k = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, last = nn.Conv1d(2, 4, 3, padding=1).double(), nn.Conv1d(4, 2, 3, padding=1, bias=False).double()
    first.weight.data, last.weight.data = k, k.flip(2).transpose(0, 1).contiguous()
    sigma = float(torch.linalg.matrix_norm(torch.fft.fft(k, 64, dim=2).permute(2, 0, 1), 2).max())
    for factor, constant in ((2.0, 1.0), (3.0, 2.0), (1.0, 1.0)):
        made = Residual(nn.Sequential(first, nn.ReLU(), last), weight=-factor / sigma**2)
        assert together(made, (2, 7), 7) == pytest.approx(constant, rel=0.02)
        assert largest_slope(made, (2, 7)) <= together(made, (2, 7), 7)


GEOMETRIES = {
    "dilated": (nn.Conv2d(2, 4, 3, padding=2, dilation=2), nn.ConvTranspose2d(4, 2, 3, padding=2, dilation=2)),
    "groups": (nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ConvTranspose2d(4, 2, 3, padding=1, groups=2)),
    "oblong": (nn.Conv2d(2, 4, (1, 3), padding=(0, 1)), nn.ConvTranspose2d(4, 2, (1, 3), padding=(0, 1))),
    "wider": (nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 3, padding=1)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolutions_of_every_geometry(name) -> None:
    first, last = (layer.double().requires_grad_(False) for layer in GEOMETRIES[name])
    torch.manual_seed(0)
    nn.init.normal_(first.weight)
    first.weight /= Convolution.of(first, (2, 4, 5)).gain
    if name == "wider":
        nn.init.normal_(last.weight, std=0.01)
        last.weight[:, :, 1, 1] -= first.weight[:, :, 0, 0].T
    else:
        last.weight.copy_(-first.weight)
    scale = Scale(torch.linspace(0.5, 1.5, 4, dtype=torch.float64).view(4, 1, 1))
    made = Residual(nn.Sequential(first, Shift(torch.randn(4, dtype=torch.float64)), nn.ReLU(), scale, last))
    bound, true = together(made, (2, 4, 5), 40), largest_slope(made, (2, 4, 5))
    assert true <= bound <= (1.3 if name == "wider" else 1 + 1e-9)


def test_linear_residuals_have_the_norm_of_their_sum() -> None:
    torch.manual_seed(2)
    conv, wide = nn.Conv2d(3, 3, 3, padding=1).double(), nn.Conv2d(3, 3, 5, padding=2).double()
    with torch.no_grad():
        conv.weight[range(3), range(3), 1, 1] -= 1.0  # x + conv(x) has less than x
    cases = [
        (Residual(conv), (3, 6, 6)), (Sum(nn.Identity(), conv, nn.Sequential(Scale(0.5), wide), weights=(1.0, 1.0, -2.0)), (3, 6, 6)),
        (Sum(nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 3), Scale(torch.tensor([1.0, 2.0, 3.0])))), (5,)),
        (Sum(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.Conv1d(2, 3, 3, stride=2, padding=1)), (2, 8)),
    ]
    for made, shape in cases:
        made = made.double()
        true = float(torch.linalg.matrix_norm(matrix(made, shape), 2))
        bound = together(made, shape if len(shape) > 1 else None, shape[-1])
        assert true <= bound <= 1.6 * true
    minus = nn.Linear(4, 4, bias=False).double()
    minus.weight.data = -torch.eye(4, dtype=torch.float64)
    assert together(Residual(minus), None, 4) <= 1e-12


def test_what_is_no_such_block_says_nothing() -> None:
    h = torch.randn(6, 4, dtype=torch.float64)
    fitting = block(h, -0.1 * h.T, nn.ReLU())
    assert together(fitting, None, 4) < math.inf
    strange = [
        Residual(nn.Sequential(nn.Linear(4, 4), MaxMin(), nn.Linear(4, 4))), Residual(nn.LayerNorm(4)),
        Residual(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU())),
        Sum(nn.Identity(), nn.Linear(4, 4), fitting.branch), Sum(fitting.branch, fitting.branch),
    ]
    assert [together(made, None, 4) for made in strange] == [math.inf] * len(strange)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounding_does_not_grow_with_the_triangle_inequality(dtype) -> None:
    """Ten blocks of constant 1: what was rounded in front is carried once, and what each block rounds is counted."""
    blocks = nn.Sequential(*(sll(8, 12, seed) for seed in range(10))).to(dtype).requires_grad_(False)
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x / (1.01 * x.double().norm(dim=-1, keepdim=True).clamp_min(1.0)).to(dtype)
    state = apart = State(ONE, 0.1 * ONE, 0 * ONE, "l2", 1, 8)
    for i, layer in enumerate(blocks):
        behind = rule_for(layer).step(layer, state, Context(dtype, {}))
        carried = rule_for(layer).step(layer, replace(state, rounding=state.rounding + 0.5), Context(dtype, {}))
        if i == 0:
            assert float(carried.rounding) == pytest.approx(float(behind.rounding) + 0.5, rel=1e-2)
        state, apart = behind, SumRule()._apart(layer, apart, Context(dtype, {}))
    exact = x.double()
    for layer in blocks:
        exact = layer.double()(exact)
    error = float((blocks.to(dtype)(x).double() - exact).norm(dim=-1).max())
    assert error <= float(state.rounding) <= 1e-4 * float(apart.rounding)
    assert 0.1 <= float(state.change) <= 0.101 < 0.01 * float(apart.change)
    assert float(exact.norm(dim=-1).max()) <= float(state.norm) <= 0.01 * float(apart.norm)


def test_certificates_of_deep_networks_of_blocks_are_those_of_their_head() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(sll(6, 9, seed) for seed in range(8)), nn.Linear(6, 3)).eval()
    x = torch.randn(20, 6)
    y = model(x).argmax(-1)
    head = model[-1].weight.detach().double()
    logits = model(x).detach().double()
    pairs = (head[y][:, None] - head).norm(dim=-1)
    margins = (logits.gather(1, y[:, None]) - logits) / pairs.clamp_min(1e-300)
    expected = torch.where(pairs > 0, margins, math.inf).amin(-1)
    radius = torch.from_numpy(certify(model, x, y, InputBall("l2"), "global").radius)
    assert bool((radius <= expected * (1 + 1e-9)).all()) and bool((radius >= 0.99 * expected - 1e-3).all())
    local = torch.from_numpy(certify(model, x, y, InputBall("l2"), "local").radius)
    assert bool((local >= 0.98 * radius).all())
