"""Execution as one more perturbation: what each stage is off by, number by number, and that every method of matrices and curves takes it all off."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_mlp_certifiers import METHODS, MODELS, context_of, make
from torch import Tensor, nn

from robustlip.domains.lines.crown import Ball, Boxes, backward, interval_boxes, interval_margins, linear_boxes, linear_margins
from robustlip.domains.lines.dense import Network, _errors_of, network_of
from robustlip.domains.lines.secants import executed_losses, gains, lipschitz_margins
from robustlip.domains.norms import Context, state
from robustlip.domains.norms.linear import LinearRule
from robustlip.layers import Normalize, Product, Residual, Scale, Shift, Sum, as_chain
from robustlip.numerics.arithmetic import Arithmetic
from robustlip.ops import maps
from robustlip.ops.executed import errors_of, product_errors, sum_errors
from robustlip.ops.maps import LinearMap, map_of
from robustlip.threats import InputBall

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_executed_logits_lie_within_the_bounds_at_a_point(name: str, dtype: torch.dtype) -> None:
    """On a ball of radius 0 the bounds are of rounding alone."""
    model, x, _, _ = make(name)
    model, x = copy.deepcopy(model).to(dtype), (8 * x).to(dtype)
    network = network_of(model, tuple(x.shape[1:]), context_of(model, dtype))
    ball = Ball(x.double().flatten(1), torch.zeros(len(x), dtype=torch.float64), "l2")
    if name == "volumes" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("torch has no means of volumes in half precision on a CPU")
    with torch.no_grad():
        executed = model(x).double()
        boxes = linear_boxes(network, ball, context_of(model, dtype))
        eye = torch.eye(executed.shape[1], dtype=torch.float64)[None]
        low, high = (sign * backward(network, ball, boxes, len(network.stages) - 1, sign * eye) for sign in (1, -1))
    assert bool(((low <= executed) & (executed <= high)).all())
    if dtype in (torch.float64, torch.float32):  # of float64 CROWN's own rounding is more
        share = 3e4 if dtype == torch.float32 else 1e8
        assert bool((high - low < share * torch.finfo(dtype).eps * (1 + executed.abs())).all())


JOINS = {
    "sum": lambda: Sum(nn.Identity(), nn.Identity(), nn.ReLU(), weights=(0.3, -5.1, 1.0)),
    "residual": lambda: Residual(nn.Identity(), skip=0.7, weight=0.4),
    "product": lambda: Product(nn.Identity(), nn.ReLU()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", JOINS)
def test_joins_alone_lie_within_the_bounds_at_a_point(name: str, dtype: torch.dtype) -> None:
    """No other layer rounds, so the error of this one cannot be hidden by others."""
    torch.manual_seed(0)
    model, x = as_chain(nn.Sequential(JOINS[name]())), torch.randn(400, 5).to(dtype)
    model.register_parameter("device", nn.Parameter(torch.zeros(1)))  # says where the model is
    context = Context(dtype, {})
    network = network_of(model, (5,), context)
    ball = Ball(x.double(), torch.zeros(len(x), dtype=torch.float64), "l2")
    boxes, eye = linear_boxes(network, ball, context), torch.eye(5, dtype=torch.float64)[None]
    low, high = (sign * backward(network, ball, boxes, len(network.stages) - 1, sign * eye) for sign in (1, -1))
    executed = model(x).double()
    assert bool(((low <= executed) & (executed <= high)).all())
    assert float(((executed - (low + high) / 2).abs() / (high - low)).amax()) > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_off_what_the_dtype_may_lose(method: str) -> None:
    """The same model, covered in float16 and in float64."""
    model, x, y, logits = make("relu", 1, 6)
    wide, narrow = (METHODS[method](model, x, y, logits, InputBall("l2"), context_of(model, dtype))[0] for dtype in (torch.float64, torch.float16))
    assert bool((wide > 0).all()) and bool((narrow < wide * 0.9995).all())


def injected(network: Network, x: Tensor, errors: list[Tensor]) -> Tensor:
    """Logits of the network whose pre-activations are off by the errors."""
    h = x
    for stage, error in zip(network.stages, errors, strict=True):
        z = stage.forward(h) + error
        h = z if stage.activation is None else torch.where(stage.linear, z, stage.activation.value(z))
    return h


def worst(network: Network, ball: Ball, boxes: Boxes, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(margins without errors at one point of each ball, margins (N, C) there with the errors that ascent finds for one rival each)."""
    step = torch.randn(ball.x.shape, dtype=torch.float64, generator=generator)
    reach = {"l2": step.norm(dim=-1, keepdim=True), "linf": step.abs().amax(-1, keepdim=True), "l1": step.abs().sum(-1, keepdim=True)}[ball.norm]
    x = ball.x + ball.radius[:, None] * step / reach
    clean = injected(network, x, [torch.zeros_like(e) for e in boxes.error])
    clean = clean.gather(1, y[:, None]) - clean
    found = []
    for rival in range(clean.shape[1]):
        errors = [torch.zeros_like(e) for e in boxes.error]
        for _ in range(4):
            for e in errors:
                e.requires_grad_(True)
            logits = injected(network, x, errors)
            margin = logits.gather(1, y[:, None])[:, 0] - logits[:, rival]
            slopes = torch.autograd.grad(margin.sum(), errors)
            errors = [-size * slope.sign() for size, slope in zip(boxes.error, slopes, strict=True)]
        logits = injected(network, x, errors)
        found.append(logits.gather(1, y[:, None])[:, 0] - logits[:, rival])
    return clean, torch.stack(found, -1)


@pytest.mark.parametrize("name", ["relu", "relu-deep", "linear", "leaky", "gelu", "maxmin", "residual", "sum", "concatenate", "gates", "conv"])
def test_every_method_covers_the_worst_errors_of_execution(name: str) -> None:
    """Errors as large as those of bfloat16, in the directions that cost most: no lower bound of a margin is above what they leave."""
    model, x, y, _ = make(name, 2, 8)
    network = network_of(model, tuple(x.shape[1:]), context_of(model), dense=True)
    for radius, norm in ((0.0, "l2"), (0.05, "linf"), (0.3, "l2")):
        ball = Ball(x.double().flatten(1), torch.full((8,), radius, dtype=torch.float64), norm)
        boxes = linear_boxes(network, ball, context_of(model, torch.bfloat16))
        clean, least = worst(network, ball, boxes, y, torch.Generator().manual_seed(3))
        lower = {
            "crown": linear_margins(network, ball, boxes, y),
            "ibp": interval_margins(network, ball, interval_boxes(network, ball, context_of(model, torch.bfloat16)), y),
            "local-lipschitz": lipschitz_margins(network, ball, boxes, y, gains(network, norm, context_of(model), model))[0],
        }
        if not network.has_products:
            lower["losses"] = clean - executed_losses(network, ball, boxes, y)
        assert bool((least < clean - 1e-4).any()), "errors that move nothing"
        for method, bound in lower.items():
            others = torch.arange(bound.shape[1]) != y[:, None]
            assert bool((bound <= least + 1e-9)[others].all()), (method, radius)
        # Without what the activations or the rivals add, the losses are what the errors can do.
        if name == "linear":
            others = torch.arange(4) != y[:, None]
            assert torch.allclose(lower["losses"][others], least[others], rtol=0, atol=1e-6)


def test_the_errors_of_the_matrices_are_errors_of_execution() -> None:
    """Matrices that are off by their stated errors in the worst direction, at the worst input."""
    from dataclasses import replace

    model = as_chain(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().requires_grad_(False))
    stage = network_of(model, (3,), context_of(model, torch.float64)).stages[0]
    x, e = torch.randn(5, 3, dtype=torch.float64), 0.01
    for wrong, off, moved in ((e, 0.0, e * x.norm(dim=-1)), (0.0, e, e + 0 * x[:, 0])):
        found = replace(stage, weight_error=wrong, bias_error=off).executed_errors(x.abs(), 0.0, context_of(model, torch.float64))
        assert bool((found >= moved[:, None]).all()) and bool((found <= moved[:, None] * (1 + 1e-6) + 1e-12).all())


# ---- layer by layer


def one_by_one(matrix: Tensor, bias: Tensor | None, x: Tensor, dtype: torch.dtype, divisor: int = 1) -> Tensor:
    """(Ax + b)/divisor summed product by product in the dtype, the bias first: an order that any kernel may choose."""
    total = torch.zeros(len(x), len(matrix), dtype=dtype) if bias is None else bias.to(dtype).expand(len(x), -1).clone()
    for column, number in zip(matrix.to(dtype).mT, x.to(dtype).mT, strict=True):
        total = total + (number[:, None] * column).to(dtype)
    return (total / divisor).double()


SUMS = {
    "linear": (lambda: nn.Linear(60, 5), (60,)),
    "linear without a bias": (lambda: nn.Linear(60, 5, bias=False), (60,)),
    "convolution": (lambda: nn.Conv2d(3, 2, 3, padding=1, stride=2), (3, 5, 5)),
    "circular": (lambda: nn.Conv1d(3, 2, 5, padding=2, padding_mode="circular"), (3, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3), (4, 3, 3)),
    "mean": (lambda: nn.AvgPool2d(4), (2, 8, 8)),
    "mean of all": (lambda: nn.AdaptiveAvgPool2d(1), (2, 6, 6)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SUMS)
def test_sums_in_any_order_are_off_by_no_more(name: str, dtype: torch.dtype) -> None:
    """Positive products before a large bias: each is rounded away at the size of the sum. The bound is at most a factor of 100 too large."""
    torch.manual_seed(0)
    build, shape = SUMS[name]
    layer = build().requires_grad_(False)
    if hasattr(layer, "weight"):
        layer.weight.copy_((0.2 + 0.8 * torch.rand_like(layer.weight)) / 16)
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias.fill_(64.0)
    layer = layer.to(dtype)
    op = map_of(layer, shape)
    x = (torch.rand(200, math.prod(shape)) / 4).to(dtype)
    size = 1
    if "mean" in name:
        size = 16 if name == "mean" else 36
        x[:, 0] = 1.0
    matrix = op.apply(torch.eye(math.prod(shape), dtype=torch.float64)).mT
    sequential = one_by_one(matrix * size, op.bias, x.double(), dtype, size)
    exact = op.affine(x.double())
    errors = errors_of(layer, op)(x.double().abs(), Arithmetic(dtype))
    off = (sequential - exact).abs()
    assert bool((off <= errors).all())
    assert float((off / errors).amax()) > 0.01
    with torch.no_grad():
        executed = layer(x.reshape(200, *shape)).double().flatten(1)
    assert bool(((executed - exact).abs() <= errors).all())


def batch(dimension: int) -> nn.Module:
    layer = (nn.BatchNorm1d, nn.BatchNorm2d)[dimension](3)
    layer.running_mean.copy_(torch.tensor([1000.0, -3.0, 0.1]))
    layer.running_var.copy_(torch.tensor([1.0, 1e-4, 9.0]))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 0.7, -300.0]))
        layer.bias.copy_(torch.tensor([0.3, 200.0, 0.0]))
    return layer.eval()


OF_NUMBERS = {
    "scale": (lambda: Scale([0.3, -700.0, 1e-3]), (3, 2, 2)),
    "division": (lambda: Scale([0.3, -700.0, 1e-3], divide=True), (3, 2, 2)),
    "shift": (lambda: Shift([0.3, -700.0, 1e-3]), (3, 2, 2)),
    "normalize": (lambda: Normalize([1000.0, 0.5, 0.1], [1.0, 0.01, 7.0]), (3, 2, 2)),
    "batch of vectors": (lambda: batch(0), (3,)),
    "batch of images": (lambda: batch(1), (3, 2, 2)),
    "lines": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (3, 4, 4)),
    "windows": (lambda: nn.AdaptiveAvgPool2d(3), (3, 4, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OF_NUMBERS)
def test_numbers_are_off_by_no_more(name: str, dtype: torch.dtype) -> None:
    """Means and biases that cancel count with their own sizes. In float32 some number has more than 1/200 of its bound."""
    torch.manual_seed(0)
    build, shape = OF_NUMBERS[name]
    layer = build().requires_grad_(False).to(dtype)
    op = map_of(layer, shape)
    x = torch.randn(300, *shape)
    for attribute in ("running_mean", "mean"):
        if isinstance(value := getattr(layer, attribute, None), Tensor):
            x = x + value.float().view(-1, *[1] * (len(shape) - 1))
    x = x.to(dtype)
    flat = x.double().flatten(1)
    off = (layer(x).double().flatten(1) - op.affine(flat)).abs()
    errors = errors_of(layer, op)(flat.abs(), Arithmetic(dtype))
    assert bool((off <= errors).all())
    if dtype == torch.float32 and name != "lines":
        assert float((off / errors).amax()) > 1 / 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_branches_and_products_are_off_by_no_more(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b, c = (torch.randn(4000).to(dtype) for _ in range(3))
    arithmetic, sizes = Arithmetic(dtype), [t.double().abs() for t in (a, b, c)]
    off = ((a * b).double() - a.double() * b.double()).abs()
    assert bool((off <= product_errors(sizes[0], sizes[1], arithmetic)).all())
    exact = 0.3 * a.double() - 5.0 * b.double() + c.double()
    off = ((0.3 * a - 5.0 * b + c).double() - exact).abs()
    bound = sum_errors([0.3, 5.0, 1.0], sizes, arithmetic)
    assert bool((off <= bound).all()) and float((off / bound).amax()) > 0.1


def test_what_may_overflow_or_divide_by_nothing_is_off_by_anything() -> None:
    half, single = Arithmetic(torch.float16), Arithmetic(torch.float32)
    one = torch.ones(1, 2, dtype=torch.float64)
    linear = nn.Linear(2, 2).requires_grad_(False)
    assert bool(errors_of(linear, map_of(linear, (2,)))(1e5 * one, half).isinf().any())
    divided = Scale([1e-39], divide=True)
    assert bool(errors_of(divided, map_of(divided, (2,)))(one, single).isinf().all())
    assert bool(product_errors(1e3 * one, 1e3 * one, half).isinf().all()) and bool(sum_errors([1.0], [1e5 * one], half).isinf().all())
    assert bool(torch.isfinite(errors_of(linear, map_of(linear, (2,)))(one, half)).all())


def test_a_layer_of_others_is_bounded_by_its_rule(monkeypatch) -> None:
    """A class that the tables of rules and maps have and the table of executed errors has not: every entry has at most the rule's norm."""

    class Doubled(nn.Linear):
        pass

    def matrix(layer: nn.Linear, shape: tuple[int, ...]) -> LinearMap:
        return map_of(nn.Linear(3, 4, bias=False), shape)

    monkeypatch.setitem(maps._MAPS, Doubled, (matrix, lambda layer: ""))
    monkeypatch.setitem(state._RULES, Doubled, LinearRule())
    layer = Doubled(3, 4).requires_grad_(False)
    model = as_chain(nn.Sequential(nn.Linear(3, 3)))
    errors = _errors_of(layer, map_of(layer, (3,)))(torch.ones(2, 3, dtype=torch.float64), context_of(model))
    assert errors.shape == (2, 4) and bool((errors > 0).all()) and bool(torch.isfinite(errors).all())
