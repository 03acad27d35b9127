"""Captured modules: the same outputs bit by bit, the same radii as the network written as a Chain, and an error for what cannot be captured."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from robustlip import capture
from robustlip.attacks import MinimumRadius
from robustlip.certifiers import certify
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.graph import operations
from robustlip.hashing import weights_sha256
from robustlip.layers import (
    Channels,
    Concatenate,
    Flip,
    GroupSort,
    MaxMin,
    Permute,
    PrependToken,
    Residual,
    Scale,
    Select,
    SelectToken,
    Shift,
    Slice,
    Sum,
    Tokens,
    View,
)
from robustlip.threats import InputBall, WeightBall


def data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Written(nn.Module):
    """A module whose forward is a function of it and the input."""

    def __init__(self, forward, **parts: nn.Module | torch.Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        self.written = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.written(self, x)


def varied(layer: nn.Module) -> nn.Module:
    """A normalisation with gains, shifts and statistics of its own."""
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.uniform_(-1, 1)
        if getattr(layer, "running_mean", None) is not None:
            layer.running_mean.uniform_(-0.3, 0.3)
            layer.running_var.uniform_(0.5, 2)
    return layer


def as_batch_norm(layer: nn.InstanceNorm1d) -> nn.BatchNorm1d:
    made = nn.BatchNorm1d(layer.num_features, layer.eps).eval()
    made.load_state_dict(layer.state_dict())
    return made


def sll(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Araujo et al. 2023, as their code runs it."""
    t = 1 / (layer.weight @ layer.weight.T).abs().sum(1)
    return x - 2 * F.linear(t * F.relu(layer(x)), layer.weight.T)


def sll_by_hand(layer: nn.Linear) -> nn.Module:
    t = 1 / (layer.weight @ layer.weight.T).abs().sum(1)
    last = nn.Linear(layer.out_features, layer.in_features, bias=False)
    last.weight = nn.Parameter(layer.weight.T.detach())
    return Sum(nn.Identity(), nn.Sequential(layer, nn.ReLU(), Scale(t.detach()), last, Scale(2.0)), weights=(1.0, -1.0))


def sll_of_images(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    t = 1 / F.conv2d(layer.weight, layer.weight, padding=2).abs().sum((1, 2, 3))
    h = t.reshape(1, -1, 1, 1) * F.relu(F.conv2d(x, layer.weight, padding=1) + layer.bias[:, None, None])
    return x - 2 * F.conv_transpose2d(h, layer.weight, padding=1)


def sll_of_images_by_hand(layer: nn.Conv2d) -> nn.Module:
    t = 1 / F.conv2d(layer.weight, layer.weight, padding=2).abs().sum((1, 2, 3))
    first, last = nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.ConvTranspose2d(5, 2, 3, padding=1, bias=False)
    first.weight = last.weight = layer.weight
    inner = nn.Sequential(first, Shift(layer.bias.detach()), nn.ReLU(), Scale(t.detach()), last, Scale(2.0))
    return Sum(nn.Identity(), inner, weights=(1.0, -1.0))


def block(channels: int, out: int, stride: int) -> dict[str, nn.Module]:
    return {
        "c1": nn.Conv2d(channels, out, 3, stride, 1, bias=False), "n1": nn.BatchNorm2d(out), "c2": nn.Conv2d(out, out, 3, 1, 1, bias=False),
        "n2": nn.BatchNorm2d(out), "short": nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)),
    }  # fmt: skip


def through_block(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = F.relu(m.n1(m.c1(x)), inplace=True)
    out = m.n2(m.c2(out))
    out += m.short(x)
    return F.relu(out, inplace=True)


def pool_and_flatten(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.head(F.adaptive_avg_pool2d(through_block(m, x), 1).view(x.size(0), -1))


def block_by_hand(m: nn.Module) -> nn.Module:
    inner = nn.Sequential(m.c1, m.n1, nn.ReLU(), m.c2, m.n2)
    return nn.Sequential(Sum(inner, m.short), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), m.head)


def maxmin(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    a, b = m.a(x).chunk(2, dim=-1)
    return m.b(torch.cat([torch.max(a, b), torch.min(a, b)], dim=-1))


def cat_of_images(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = torch.cat([F.relu(m.a(x)), torch.tanh(m.b(x)), x], dim=1)
    return m.head(h.reshape(len(x), -1))  # the number of samples as a plain number


def sorted_in_pairs(x: torch.Tensor) -> torch.Tensor:
    pairs = x.view(-1, 4, 2)
    return torch.cat([pairs.min(2, keepdim=True)[0], pairs.max(2, keepdim=True)[0]], dim=2).view(x.shape)


def signal(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = F.avg_pool1d(m.b(F.max_pool1d(F.relu(m.gain * m.n(m.a(x))), 3, 2)), 2)
    return m.head(F.adaptive_avg_pool1d(h, 1).flatten(1))


def moved(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = F.relu(m.a(F.pad(x.permute(0, 3, 1, 2).flip(-1), (1, 0, 2, 1), mode="reflect")))
    h = F.pad(h, (0, 1), value=0.3)[:, :, :4:2].flatten(1, 2)[:, 1:3]  # (N, 2, 5)
    return m.head(h.select(2, 3))


def tokens(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x).flatten(2).transpose(1, 2)
    h = torch.cat([m.first.expand(x.shape[0], -1, -1), h], dim=1) + m.places
    return m.head(F.gelu(m.b(h))[:, 0])


MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.2]).view(1, 3, 1, 1)

# name → (module, shape of a sample, the same network by hand)
MODELS = {
    "mlp": (
        lambda: Written(lambda m, x: m.b(torch.relu(m.a(x.flatten(1)))), a=nn.Linear(48, 16), b=nn.Linear(16, 5)), (3, 4, 4),
        lambda m: nn.Sequential(nn.Flatten(), m.a, nn.ReLU(), m.b),
    ),
    "lenet": (
        lambda: Written(
            lambda m, x: m.b(F.relu(m.a(torch.flatten(F.max_pool2d(F.relu(m.c(x)), 2), 1)))),
            c=nn.Conv2d(1, 4, 3), a=nn.Linear(36, 8), b=nn.Linear(8, 4)
        ), (1, 8, 8),
        lambda m: nn.Sequential(m.c, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), m.a, nn.ReLU(), m.b),
    ),
    "resnet": (lambda: Written(pool_and_flatten, **block(3, 6, 2), head=nn.Linear(6, 4)), (3, 8, 8), block_by_hand),
    "normalized": (
        lambda: Written(lambda m, x: m.a(((x - m.mean) / m.std).flatten(1)), a=nn.Linear(48, 4), mean=MEAN, std=STD), (3, 4, 4),
        lambda m: nn.Sequential(Shift(m.mean.flatten(), subtract=True), Scale(m.std.flatten(), divide=True), nn.Flatten(), m.a),
    ),
    "maxmin": (
        lambda: Written(maxmin, a=nn.Linear(6, 8), b=nn.Linear(8, 3)), (6,), lambda m: nn.Sequential(m.a, MaxMin(), m.b),
    ),
    "concatenated": (
        lambda: Written(cat_of_images, a=nn.Conv2d(3, 2, 3, padding=1), b=nn.Conv2d(3, 2, 1), head=nn.Linear(7 * 16, 4)), (3, 4, 4),
        lambda m: nn.Sequential(
            Concatenate(nn.Sequential(m.a, nn.ReLU()), nn.Sequential(m.b, nn.Tanh()), nn.Identity()), nn.Flatten(), m.head
        ),
    ),
    "residual": (
        lambda: Written(lambda m, x: m.head(x + m.a(F.gelu(m.b(x)))), a=nn.Linear(8, 6), b=nn.Linear(6, 8), head=nn.Linear(6, 3)), (6,),
        lambda m: nn.Sequential(Residual(nn.Sequential(m.b, nn.GELU(), m.a)), m.head),
    ),
    "scaled": (
        lambda: Written(lambda m, x: 1.0 - 0.5 * m.a(2 * x - 1) / 3, a=nn.Linear(6, 3)), (6,),
        lambda m: nn.Sequential(
            Scale(2.0), Shift(1.0, subtract=True), m.a, Scale(0.5), Scale(3.0, divide=True), Scale(-1.0), Shift(1.0)
        ),
    ),
    "sorted": (
        lambda: Written(
            lambda m, x: m.b(sorted_in_pairs(m.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 3)
        ), (6,),
        lambda m: nn.Sequential(m.a, GroupSort(2), m.b),
    ),
    "sorted images": (
        lambda: Written(
            lambda m, x: m.b(m.a(x).reshape(-1, 2, 3, 4, 4).sort(2)[0].reshape(-1, 6, 4, 4).flatten(1)), a=nn.Conv2d(3, 6, 1), b=nn.Linear(96, 3)
        ), (3, 4, 4),
        lambda m: nn.Sequential(m.a, GroupSort(3), nn.Flatten(), m.b),
    ),
    "padded in a circle": (
        lambda: Written(lambda m, x: m.b(m.a(x).flatten(1)), a=nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), b=nn.Linear(32, 3)), (3, 4, 4),
        lambda m: nn.Sequential(m.a, nn.Flatten(), m.b),
    ),
    "padded by zeros": (
        lambda: Written(lambda m, x: m.b(m.a(F.pad(x, (1, 0, 0, 2))).flatten(1)), a=nn.Conv2d(3, 2, 3), b=nn.Linear(24, 3)), (3, 4, 4),
        lambda m: nn.Sequential(nn.ZeroPad2d((1, 0, 0, 2)), m.a, nn.Flatten(), m.b),
    ),
    "signal": (
        lambda: Written(
            signal, a=nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"), n=nn.BatchNorm1d(4), b=nn.ConvTranspose1d(4, 3, 4, 2, 1),
            head=nn.Linear(3, 3), gain=torch.rand(4, 1) + 0.5,
        ), (2, 8),
        lambda m: nn.Sequential(
            m.a, m.n, Scale(m.gain), nn.ReLU(), nn.MaxPool1d(3, 2), m.b, nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), m.head
        ),
    ),
    "volume": (
        lambda: Written(
            lambda m, x: m.head(F.max_pool3d(F.relu(m.n(m.a(x))), 2, 1).mean((2, 3, 4))), a=nn.Conv3d(2, 3, 2, padding=1), n=nn.BatchNorm3d(3),
            head=nn.Linear(3, 3),
        ), (2, 3, 2, 3),
        lambda m: nn.Sequential(m.a, m.n, nn.ReLU(), nn.MaxPool3d(2, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), m.head),
    ),
    "decoder": (
        lambda: Written(
            lambda m, x: m.head(F.relu(m.b(F.pixel_shuffle(F.relu(m.a(x)), 2))).flatten(1)), a=nn.Conv2d(1, 8, 2),
            b=nn.ConvTranspose2d(2, 2, 3, 2, 1, 1), head=nn.Linear(288, 3),
        ), (1, 4, 4),
        lambda m: nn.Sequential(m.a, nn.ReLU(), nn.PixelShuffle(2), m.b, nn.ReLU(), nn.Flatten(), m.head),
    ),
    "moved": (
        lambda: Written(moved, a=nn.Conv2d(3, 2, 3), head=nn.Linear(2, 3)), (4, 5, 3),
        lambda m: nn.Sequential(
            Permute(0, 3, 1, 2), Flip(3), nn.ReflectionPad2d((1, 0, 2, 1)), m.a, nn.ReLU(), nn.ConstantPad2d((0, 1, 0, 0), 0.3), Slice(2, 0, 4, 2),
            View(4, 5), Slice(1, 1, 3), Select(2, 3), m.head,
        ),
    ),
    "resampled": (
        lambda: Written(
            lambda m, x: m.head(F.adaptive_avg_pool2d(F.relu(F.interpolate(m.a(F.interpolate(x, scale_factor=2)), (5, 6), mode="bilinear")), (2, 4))
                                .flatten(1)), a=nn.Conv2d(1, 2, 3), head=nn.Linear(16, 3),
        ), (1, 4, 4),
        lambda m: nn.Sequential(
            nn.Upsample(scale_factor=2), m.a, nn.Upsample((5, 6), mode="bilinear"), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 4)), nn.Flatten(), m.head
        ),
    ),
    "tokens": (
        lambda: Written(tokens, a=nn.Conv2d(2, 4, 2, 2), first=nn.Parameter(torch.randn(1, 1, 4)), places=nn.Parameter(torch.randn(1, 5, 4)),
                        n=nn.LayerNorm(4, eps=1e-2), b=nn.Linear(4, 6), head=nn.Linear(6, 3)), (2, 4, 4),
        lambda m: nn.Sequential(
            m.a, Tokens(), PrependToken(m.first), Shift(m.places), m.b, nn.GELU(), SelectToken(0), m.head
        ),
    ),
    "groups of channels": (
        lambda: Written(
            lambda m, x: m.head(F.relu(m.i(m.b(F.gelu(m.g(m.a(x)))))).flatten(1)), a=nn.Conv2d(2, 4, 3), g=varied(nn.GroupNorm(2, 4, 0.5)),
            b=nn.Conv2d(4, 3, 2), i=nn.InstanceNorm2d(3, 0.5), head=nn.Linear(12, 3),
        ), (2, 5, 5),
        lambda m: nn.Sequential(m.a, m.g, nn.GELU(), m.b, m.i, nn.ReLU(), nn.Flatten(), m.head),
    ),
    "instances by running statistics": (
        lambda: Written(
            lambda m, x: m.head(F.relu(m.i(m.a(x))).flatten(1)), a=nn.Conv1d(2, 4, 3), i=varied(nn.InstanceNorm1d(4, 0.1, affine=True,
            track_running_stats=True)), head=nn.Linear(12, 3),
        ), (2, 5),
        lambda m: nn.Sequential(m.a, as_batch_norm(m.i), nn.ReLU(), nn.Flatten(), m.head),
    ),
    "channels last": (
        lambda: Written(
            lambda m, x: m.head(F.layer_norm(m.n(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), (4, 3, 3), eps=0.3).flatten(1)),
            a=nn.Conv2d(2, 4, 2), n=varied(nn.LayerNorm(4, 0.5)), head=nn.Linear(36, 3),
        ), (2, 4, 4),
        lambda m: nn.Sequential(
            m.a, Permute(0, 2, 3, 1), m.n, Permute(0, 3, 1, 2), nn.LayerNorm((4, 3, 3), 0.3, elementwise_affine=False), nn.Flatten(), m.head
        ),
    ),
    "SLL": (
        lambda: Written(lambda m, x: m.head(sll(m.b, sll(m.a, x))), a=nn.Linear(6, 9), b=nn.Linear(6, 5), head=nn.Linear(6, 3)), (6,),
        lambda m: nn.Sequential(sll_by_hand(m.a), sll_by_hand(m.b), m.head),
    ),
    "SLL of images": (
        lambda: Written(lambda m, x: m.head(sll_of_images(m.a, x).flatten(1)), a=nn.Conv2d(2, 5, 3, padding=1), head=nn.Linear(40, 3)), (2, 4, 5),
        lambda m: nn.Sequential(sll_of_images_by_hand(m.a), nn.Flatten(), m.head),
    ),
    "LiResNet": (
        lambda: Written(lambda m, x: m.head(torch.tanh(x + m.a(x)).flatten(1)), a=nn.Conv2d(2, 2, 3, padding=1), head=nn.Linear(40, 3)), (2, 4, 5),
        lambda m: nn.Sequential(Residual(m.a), nn.Tanh(), nn.Flatten(), m.head),
    ),
    "slices": (
        lambda: Written(lambda m, x: m.b(torch.cat([m.a(x)[:, 2:5], x[:, :2]], dim=1))[:, :3], a=nn.Linear(6, 8), b=nn.Linear(5, 4)), (6,),
        lambda m: nn.Sequential(Concatenate(nn.Sequential(m.a, Channels(2, 5)), Channels(0, 2)), m.b, Channels(0, 3)),
    ),
}  # fmt: skip


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    build, shape, _ = MODELS[name]
    module = build()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            part.running_mean.uniform_(-0.3, 0.3)
            part.running_var.uniform_(0.5, 2)
    return module.eval().to(dtype), data(5, *shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_capture_gives_the_modules_bits(name, dtype) -> None:
    module, x = made(name, dtype)
    chain = capture(module, x)
    for batch in (x, x[:1], torch.cat([x, -3 * x, 100 * x])):
        assert torch.equal(chain(batch.clone()), module(batch.clone()))


@pytest.mark.parametrize("method", ["global", "best"])
@pytest.mark.parametrize("name", MODELS)
def test_radii_are_those_of_the_network_written_by_hand(name, method) -> None:
    module, x = made(name)
    by_hand = MODELS[name][2](module).eval()
    y = module(x).argmax(-1)
    ours, theirs = certify(module, x, y, InputBall("l2"), method), certify(by_hand, x, y, InputBall("l2"), method)
    assert (ours.radius > 0).any()
    assert ours.radius.tolist() == theirs.radius.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_no_attack_succeeds_inside_the_radius_of_a_module(name) -> None:
    module, x = made(name)
    y = module(x).argmax(-1)
    for threat in (InputBall("l2"), InputBall("linf")):
        radius, broken = certify(module, x, y, threat).radius, MinimumRadius()(module, x, y, threat).radius
        assert (radius <= broken).all()


TABLE = torch.linspace(-0.5, 0.6, 8)
ELEMENTWISE = {
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1), "elu": F.elu, "celu": lambda x: F.celu(x, 0.5), "selu": F.selu, "softplus": F.softplus,
    "softsign": F.softsign, "tanhshrink": F.tanhshrink, "hardtanh": lambda x: F.hardtanh(x, -0.5, 2), "relu6": F.relu6, "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid, "mish": F.mish, "logsigmoid": F.logsigmoid, "silu": F.silu, "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "clamp": lambda x: x.clamp(-0.3, 0.4), "clamp_min": lambda x: x.clamp(min=0), "abs": torch.abs, "neg": torch.neg, "sigmoid": torch.sigmoid,
    "softshrink": lambda x: F.softshrink(x, 0.1), "inplace": lambda x: F.leaky_relu(x * 1.5, 0.2, inplace=True),
    "minimum with a constant": lambda x: torch.clamp(x, max=0.7), "maximum with a tensor": lambda x: torch.maximum(x, torch.full((), -0.3)),
    "min with a tensor": lambda x: torch.min(x, torch.full((1,), 0.4)),
    "max with a table": lambda x: torch.maximum(TABLE, x), "min with a table": lambda x: torch.fmin(x, TABLE[None]),
    "clamp by tables": lambda x: x.clamp(TABLE - 0.2, TABLE + 0.1),
    "clamp by a table and a number": lambda x: torch.clamp(x, max=TABLE).clamp_min(-0.3),
    "where": lambda x: torch.where(TABLE > 0.1, x, TABLE), "masked fill": lambda x: x.masked_fill(TABLE < -0.2, 0.7),
    "a mask": lambda x: x * (TABLE > 0) + torch.add(TABLE, x, alpha=2),
    "alpha": lambda x: torch.sub(x, TABLE, alpha=0.5) + torch.rsub(x, TABLE, alpha=4),
    "a constant beside": lambda x: torch.cat([x[:, :4], TABLE[None, :4].expand(x.shape[0], -1)], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_functions(name) -> None:
    torch.manual_seed(4)
    module = Written(lambda m, x: m.b(ELEMENTWISE[name](m.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 3)).eval()
    x = 4 * data(6, 6) - 2
    chain = capture(module, x)
    assert torch.equal(chain(3 * x), module(3 * x))
    y = module(x).argmax(-1)
    radius, broken = certify(module, x, y, InputBall("l2")).radius, MinimumRadius()(module, x, y, InputBall("l2")).radius
    assert (radius > 0).any() and (radius <= broken).all()


def test_weights_are_shared_and_a_weight_ball_is_of_the_modules_matrices() -> None:
    module, x = made("resnet")
    chain = capture(module, x)
    assert any(p is module.c1.weight for p in chain.parameters())
    with torch.no_grad():
        module.head.weight.mul_(2)
    assert torch.equal(chain(x), module(x))
    assert (certify(module, x, module(x).argmax(-1), WeightBall("spectral")).radius > 0).any()


@pytest.mark.parametrize("kind", ["spectral_norm", "orthogonal", "weight_norm", "old spectral_norm", "old weight_norm"])
@pytest.mark.parametrize("sequential", [False, True])
def test_weights_that_are_computed_from_others_are_folded(kind, sequential) -> None:
    torch.manual_seed(2)
    old = {"old spectral_norm": nn.utils.spectral_norm, "old weight_norm": nn.utils.weight_norm}
    wrap = old.get(kind) or getattr(nn.utils.parametrizations, kind)
    inner = wrap(nn.Linear(6, 6))
    module = nn.Sequential(inner, nn.ReLU(), nn.Linear(6, 3)) if sequential else Written(lambda m, x: m.b(F.relu(m.a(x))), a=inner, b=nn.Linear(6, 3))
    module.train()(data(4, 6))  # a step of power iteration
    module.eval()
    x = data(5, 6)
    chain = capture(module, x)
    assert [type(layer) for layer in chain] == [nn.Linear, nn.ReLU, nn.Linear]
    plain = nn.Sequential(copy.deepcopy(chain[0]), nn.ReLU(), copy.deepcopy(chain[2])).eval()
    y = module(x).argmax(-1)
    assert certify(module, x, y, InputBall("l2")).radius.tolist() == certify(plain, x, y, InputBall("l2")).radius.tolist()


def test_a_certificate_names_the_modules_weights_and_sees_any_change() -> None:
    module, x = made("residual")
    y = module(x).argmax(-1)
    first, again = certify(module, x, y, InputBall("l2")), certify(module, x, y, InputBall("l2"))
    assert (first.weights_sha256, first.architecture_sha256) == (again.weights_sha256, again.architecture_sha256)
    assert first.weights_sha256 == weights_sha256(module)
    with torch.no_grad():
        module.head.weight.mul_(2)
    other = certify(module, x, y, InputBall("l2"))
    assert other.weights_sha256 != first.weights_sha256


def test_a_change_that_is_not_of_weights_is_seen_too() -> None:
    module = Written(lambda m, x: m.a(x * m.factor), a=nn.Linear(6, 3)).eval()
    module.factor = 2.0  # not 1, which is no layer
    x = data(5, 6)
    y = module(x).argmax(-1)
    before = certify(module, x, y, InputBall("l2"))
    module.factor = 10.0
    y = module(x).argmax(-1)
    after = certify(module, x, y, InputBall("l2"))
    assert (after.radius <= MinimumRadius()(module, x, y, InputBall("l2")).radius).all()
    assert after.architecture_sha256 != before.architecture_sha256


def test_real_arithmetic_and_other_dtypes_cast_the_module_before_it_computes_weights() -> None:
    torch.manual_seed(3)
    module = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))).eval()
    x = data(4, 6)
    y = module(x).argmax(-1)
    wide = certify(copy.deepcopy(module).double(), x.double(), y, InputBall("l2"))
    assert certify(module, x, y, InputBall("l2"), dtype="float64").weights_sha256 == wide.weights_sha256
    assert (certify(module, x, y, InputBall("l2"), dtype="real").radius >= certify(module, x, y, InputBall("l2")).radius).all()


# ---- what cannot be captured


def mixes(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.a(x - x.mean(0, keepdim=True))


def moves(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.a(x.flip(0))


def transposes(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.a((x @ x.T) @ x)


def reads_again(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    view = h[:, :2]
    h.relu_()
    return m.b(torch.cat([view, h], dim=1))


def writes_weights(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    m.count.add_(1)
    return m.a(x) * m.count


def branches(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.a(x) if x.sum() > 0 else -m.a(x)


def by_number(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.a(x) * len(x)


def twice(m: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return m.a(x), m.a(x)


def unknown(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.a(torch.fft.fft(x).real)


def random(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.a(F.dropout(x, 0.5, training=True))


REFUSED = {
    mixes: "first dimension|mean", moves: "flip", transposes: "first dimension", reads_again: "in-place operations on values that are not read again",
    writes_weights: "which writes into them", branches: "torch.export can record", by_number: "the same operations for any number of samples",
    twice: "unambiguous logits", unknown: "fft|real", random: "dropout",
}  # fmt: skip


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_what_is_not_a_known_program_is_refused_with_its_place(forward) -> None:
    module = Written(forward, a=nn.Linear(6, 3), b=nn.Linear(5, 3), c=nn.Linear(6, 6), count=torch.zeros(1)).eval()
    with pytest.raises(BadInput, match=REFUSED[forward]):
        capture(module, data(4, 6))


def test_a_buffer_that_is_assigned_is_refused() -> None:
    def counts(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        m.count = m.count + 1
        return m.a(x)

    with pytest.raises(UnsupportedLayer, match="does not change its own weights and buffers"):
        capture(Written(counts, a=nn.Linear(6, 3), count=torch.zeros(1)).eval(), data(4, 6))


def test_a_wrong_layer_would_be_seen(monkeypatch) -> None:
    """Only the comparison of outputs prevents a false certificate if an entry of the table is wrong."""
    monkeypatch.setitem(operations.LAYERS, "relu", lambda node: nn.LeakyReLU(1e-6))
    module, x = made("mlp")
    with pytest.raises(UnsupportedLayer, match="outputs bit by bit"):
        capture(module, x - 0.5)


def test_train_mode_and_bad_examples_are_refused() -> None:
    module, x = made("mlp")
    for wrong, says in ((x[0, 0, 0], "example of samples"), ("x", "example of samples"), (x.long(), "floating-point")):
        with pytest.raises(BadInput, match=says):
            capture(module, wrong)
    with pytest.raises(BadInput, match="eval mode"):
        capture(module.train(), x)


@pytest.mark.parametrize("wrap", [lambda z: {"logits": z}, lambda z: (z, None), lambda z: [z]])
def test_logits_are_found_in_what_a_model_answers(wrap) -> None:
    module = Written(lambda m, x: wrap(m.a(F.relu(x))), a=nn.Linear(6, 3)).eval()
    x = data(4, 6)
    chain = capture(module, x)
    assert torch.equal(chain(x), module.a(F.relu(x)))
    assert (certify(module, x, chain(x).argmax(-1), InputBall("l2")).radius > 0).any()


def test_one_sample_is_example_enough() -> None:
    module, x = made("lenet")
    assert torch.equal(capture(module, x[:1])(x), module(x))


# ---- random modules


def grown(draw: st.DrawFn, depth: int = 0) -> list[tuple]:
    """A program of random steps on vectors of 6 numbers."""
    steps: list[tuple] = []
    for _ in range(draw(st.integers(1, 4))):
        kinds = ["linear", "relu", "relu_", "tanh", "gelu", "scale", "shift", "maxmin", "slice", "view"]
        kind = draw(st.sampled_from(kinds + (["add", "sub", "cat", "iadd"] if depth < 2 else [])))
        steps.append((kind, *(grown(draw, depth + 1) for _ in range(2))) if kind in ("add", "sub", "cat", "iadd") else (kind,))
    return steps


class Random(nn.Module):
    """Runs such a program with weights of its own."""

    def __init__(self, steps: list[tuple], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.steps, self.weights = steps, nn.ModuleList()
        self.plan = self._plan(steps)
        self.head = nn.Linear(6, 3)

    def _plan(self, steps: list[tuple]) -> list[tuple]:
        plan = []
        for kind, *inner in steps:
            if kind in ("linear", "cat"):
                self.weights.append(nn.Linear(6 if kind == "linear" else 12, 6))
            elif kind == "slice":
                self.weights.append(nn.Linear(4, 6))
            plan.append((kind, len(self.weights) - 1, *map(self._plan, inner)))
        return plan

    def run(self, plan: list[tuple], x: torch.Tensor) -> torch.Tensor:
        for kind, at, *inner in plan:
            if kind == "linear":
                x = self.weights[at](x)
            elif kind == "relu_":
                x = (x * 2.0).relu_()
            elif kind == "scale":
                x = 0.7 * x
            elif kind == "shift":
                x = x - 0.3
            elif kind == "maxmin":
                a, b = x.split(3, dim=-1)
                x = torch.cat((torch.maximum(a, b), torch.minimum(b, a)), -1)
            elif kind == "slice":
                x = self.weights[at](x[:, 1:5])
            elif kind == "view":
                x = x.view(-1, 2, 3).flatten(1)
            elif kind in ("add", "sub", "cat", "iadd"):
                first, second = (self.run(branch, x) for branch in inner)
                if kind == "iadd":
                    x = first * 1.0
                    x += second
                else:
                    x = self.weights[at](torch.cat([first, second], 1)) if kind == "cat" else first + second if kind == "add" else first - second
            else:
                x = getattr(torch, kind, getattr(F, kind, None))(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.run(self.plan, x))


# No shrinking: an example takes a second.
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))
@given(st.data(), st.integers(0, 2**16))
def test_random_modules_are_captured_to_the_bit(given_data, seed) -> None:
    module = Random(grown(given_data.draw), seed).eval()
    x = data(4, 6, seed=seed) * 4 - 2
    chain = capture(module, x)
    fresh = data(7, 6, seed=seed + 1) * 40 - 20
    assert torch.equal(chain(fresh), module(fresh))
    y = module(x).argmax(-1)
    radius = torch.as_tensor(certify(chain, x, y, InputBall("l2"), "global").radius)
    noise = torch.randn(64, *x.shape, generator=torch.Generator().manual_seed(seed))
    inside = (x + noise / noise.norm(dim=-1, keepdim=True) * radius[:, None] * (1 - 1e-6)).float()
    held = (inside.double() - x.double()).norm(dim=-1) <= radius
    assert bool(((module(inside.flatten(0, 1)).argmax(-1).view(64, -1) == y) | ~held)[:, radius > 0].all())


# ---- what a comparison on a few small inputs would not see


class Two(nn.Module):
    """h = x, then a function of it, with matrices that weight threats speak of."""

    def __init__(self, function) -> None:
        super().__init__()
        self.l, self.g = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.register_buffer("t", torch.full((2,), 50.0))
        self.function = function
        with torch.no_grad():
            self.l.weight.copy_(torch.eye(2))
            self.g.weight.copy_(torch.eye(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def in_a_list(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.l(x)
    torch._foreach_clamp_max_([h], 100.0)
    return h * 1.5


def by_data(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.l(x)
    h.data = h.clamp(max=100.0)
    return h * 1.5


def as_bits(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.l(x).view(torch.int32).clamp(max=1120403456).view(torch.float32)


def unless_traced(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.l(x)
    return h if torch.compiler.is_compiling() or not bool((h > 100).any()) else h.clamp(max=100.0)


def by_grad(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.l(x) * (-1.0 if torch.is_grad_enabled() else 1.0)


def by_size(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.l(x) * (-1.0 if len(x) > 100 else 1.0)


def of_sizes(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.l(x) + F.relu(torch.ones(x.shape[0], 2).sum(0) - 100)


def other_elu(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch._C._nn.elu(m.l(x), 1.0, 1.0, 5.0)


def rows(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.slice(m.l(x), -2, -100)


def complex_constant(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (m.l(x) * 1j).real


def nested(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = h = m.l(x)
    for _ in range(150):
        y = F.relu(y) + h
    return y


def fails_alone(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.l(x) / (1.0 if len(x) > 1 else 0 / 0)


HIDDEN = (in_a_list, by_data, as_bits, unless_traced, by_grad, by_size, of_sizes, other_elu, rows, complex_constant, nested, fails_alone)


@pytest.mark.parametrize("function", HIDDEN, ids=lambda f: f.__name__)
def test_programs_that_show_their_difference_elsewhere_are_refused(function) -> None:
    with pytest.raises(UnsupportedLayer, match=r"^expected "):
        capture(Two(function).eval(), data(4, 2))


def test_another_dtype_on_the_way_is_named() -> None:
    with pytest.raises(UnsupportedLayer, match=r"computes in one dtype, torch.float32, got view of .* in torch.int32"):
        capture(Two(as_bits).eval(), data(4, 2))


def test_an_operation_of_another_library_with_torchs_name_is_not_torchs() -> None:
    @torch.library.custom_op("robustlip_test::abs", mutates_args=(), schema="(Tensor input) -> Tensor")
    def other(input):
        return input.abs().clamp(max=100.0)

    other.register_fake(lambda x: torch.empty_like(x))
    with pytest.raises(UnsupportedLayer, match="robustlip_test::abs"):
        capture(Two(lambda m, x: other(m.l(x))).eval(), data(4, 2))


FOLDS = {
    "added": lambda m, x: m.l(x) + m.g(m.t), "scaled": lambda m, x: F.linear(x, m.l.weight * 100) + m.g(x),
    "row": lambda m, x: m.l(x) * m.g.weight[0],
    "part": lambda m, x: F.linear(x, m.l.weight[:2]) + m.g(x), "both": lambda m, x: m.g(m.l(x)) + m.l.weight.sum(),
}  # fmt: skip


@pytest.mark.parametrize("fold", FOLDS)
def test_a_weight_threat_asks_for_the_modules_own_matrices(fold) -> None:
    module, x = Two(FOLDS[fold]).eval(), torch.tensor([[1.0, 3.0], [2.0, 1.0]])
    y = module(x).argmax(-1)
    assert (certify(module, x, y, InputBall("l2")).radius >= 0).all()
    with pytest.raises(UnsupportedLayer, match="use its own matrices as they are"):
        certify(module, x, y, WeightBall("frobenius"))


def test_a_layer_that_is_exchanged_is_seen() -> None:
    module = Written(lambda m, x: m.k(m.act(m.l(x)) + m.b), l=nn.Linear(2, 2), k=nn.Linear(2, 2), act=nn.ReLU(), b=torch.tensor([0.0, 7.0])).eval()
    with torch.no_grad():
        for part in (module.l, module.k):
            part.weight.copy_(torch.eye(2))
            part.bias.zero_()
    x, y = torch.tensor([[0.0, 0.0], [0.1, 0.2], [10.0, 0.0]]), torch.tensor([1, 1, 0])
    assert set(certify(module, x, y, InputBall("l2")).status) == {"certified"}
    module.act = nn.ReLU6().eval()
    assert certify(module, x, y, InputBall("l2")).status[2] == "misclassified"


def test_what_is_certified_is_compared() -> None:
    """Of seven samples, which capture does not try."""
    module, x = Two(lambda m, x: m.l(x) * (-1.0 if len(x) == 7 else 1.0)).eval(), data(7, 2)
    capture(module, x[:4])
    with pytest.raises(UnsupportedLayer, match="bit by bit"):
        certify(module, x, module(x).argmax(-1), InputBall("l2"))


def test_a_cache_that_a_first_call_fills_is_left_as_it_is() -> None:
    kept: dict[int, torch.Tensor] = {}

    def positions(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if 2 not in kept:
            kept[2] = torch.arange(2.0)
        return m.l(x) + kept[2]

    module = Two(positions).eval()
    chain = capture(module, data(4, 2))
    assert type(kept[2]) is torch.Tensor and torch.equal(chain(data(3, 2)), module(data(3, 2)))


# ---- matrices that a weight threat moves, read elsewhere too


def _added(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + m.w


def _scaled(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * m.w


def _a_row_added(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + m.w[:1]


def _a_column_copied(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + m.w[:, :1].contiguous()


def _a_row_in_front(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([m.w[:1][None].expand(x.shape[0], -1, -1), x], 1)[:, :4]


def _in_other_memory(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + m.shared


@pytest.mark.parametrize("use", [_added, _scaled, _a_row_added, _a_column_copied, _a_row_in_front, _in_other_memory], ids=lambda f: f.__name__)
def test_a_matrix_that_is_read_elsewhere_too_takes_no_weight_threat(use) -> None:
    """A change of it moves both."""
    torch.manual_seed(0)
    module = Written(lambda m, x: m.head(F.linear(use(m, x), m.w).flatten(1)), head=nn.Linear(16, 3)).eval()
    module.w = nn.Parameter(torch.randn(4, 4))
    module.register_buffer("shared", module.w.data[:1])
    x = data(5, 4, 4)
    y = module(x).argmax(-1)
    assert bool((certify(module, x, y, InputBall("l2")).radius > 0).any())
    with pytest.raises(UnsupportedLayer, match="weight threat"):
        certify(module, x, y, WeightBall("spectral"))


def test_a_tied_matrix_that_is_one_of_layers_alone_takes_a_weight_threat() -> None:
    torch.manual_seed(0)
    module = Written(lambda m, x: m.head(F.linear(torch.tanh(m.a(x)), m.a.weight)), a=nn.Linear(4, 4, bias=False), head=nn.Linear(4, 3)).eval()
    x = data(5, 4)
    y = module(x).argmax(-1)
    proved = certify(module, x, y, WeightBall("spectral")).radius
    assert bool((proved > 0).all())
    assert bool((proved <= MinimumRadius()(module, x, y, WeightBall("spectral")).radius).all())


def test_the_range_of_inputs_is_that_of_now() -> None:
    module = Written(lambda m, x: m.a(x), a=nn.Linear(4, 3)).eval()
    x = data(5, 4)
    y = module(x).argmax(-1)
    assert bool((certify(module, x, y, InputBall("l2")).radius > 0).all())
    module.input_range = (0.0, 1e-4)
    assert not bool((certify(module, x, y, InputBall("l2")).radius > 0).any())
