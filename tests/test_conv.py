"""Convolution and pooling compared with their exact operator norms: the linear map as a matrix, for every option of the layers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from robustlip.attacks import by_name
from robustlip.certifiers import certify
from robustlip.domains.norms import Context, State, rule_for
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Chain, GroupSort, Householder, MaxMin, Residual
from robustlip.numerics.spectral import symbol_bound
from robustlip.ops.convolution import Convolution
from robustlip.threats import InputBall, WeightBall, parse_threat


def dense(layer: nn.Module, shape: tuple[int, int, int]) -> torch.Tensor:
    """The matrix (outputs, inputs) of a linear layer on images of that shape, float64."""
    n = math.prod(shape)
    zero = layer(torch.zeros(1, *shape, dtype=torch.float64))
    return (layer(torch.eye(n, dtype=torch.float64).view(n, *shape)) - zero).flatten(1).T.detach()


def start(shape: tuple[int, int, int], space: str = "l2", norm: float = 1.0) -> State:
    one = torch.ones(1, dtype=torch.float64)
    return State(norm * one, one, 0 * one, space, 1, math.prod(shape), shape)


def change(layer: nn.Module, shape: tuple[int, int, int], space: str = "l2") -> float:
    return float(rule_for(layer).step(layer, start(shape, space), Context(torch.float64, {})).change)


@given(
    seed=st.integers(0, 10**6), size=st.tuples(st.integers(1, 7), st.integers(1, 7)), kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 5), st.integers(0, 5))), groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]), equal=st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_gain_is_above_the_true_norm_for_every_option(seed, size, kernel, stride, dilation, padding, groups, mode, equal) -> None:
    torch.manual_seed(seed)
    assume(padding != "same" or stride == (1, 1))
    layer = nn.Conv2d(2, 4, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=mode, bias=False).double()
    if equal:  # a positive kernel is the worst case for overlaps and for copies made by padding
        nn.init.constant_(layer.weight, 1.0)
    shape = (2, *size)
    try:
        matrix = dense(layer, shape)
    except RuntimeError:  # no window fits, or torch refuses the padding
        assume(False)
    constants = Convolution.of(layer, shape)
    assert math.prod(constants.out) == matrix.shape[0]
    truth = float(torch.linalg.matrix_norm(matrix, 2))
    assert truth <= constants.gain * (1 + 1e-12)
    assert truth <= float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) * constants.window_gain * (1 + 1e-12)
    assert float(matrix.norm(dim=0).max()) <= constants.from_l1 * (1 + 1e-12)
    signs = torch.where(torch.randn(64, matrix.shape[1], dtype=torch.float64) > 0, 1.0, -1.0).double()
    cube = (torch.cat([signs, matrix.sign()]) @ matrix.T).norm(dim=-1).max()
    assert float(cube) <= constants.from_linf * (1 + 1e-12)
    # Rounding: |W| as a convolution, in ℓ2.
    with torch.no_grad():
        layer.weight.abs_()
    assert float(torch.linalg.matrix_norm(dense(layer, shape), 2)) <= constants.window_gain * constants.frobenius * (1 + 1e-12)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_gain_is_near_the_true_norm(mode) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3, padding=1, padding_mode=mode, bias=False).double()
    truth = float(torch.linalg.matrix_norm(dense(layer, (3, 12, 12)), 2))
    gain = change(layer, (3, 12, 12))
    assert truth <= gain <= truth * (1.001 if mode == "circular" else 1.1)
    assert gain < Convolution.of(layer, (3, 12, 12)).window_gain * float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2))


def test_a_matrix_norm_alone_is_no_bound() -> None:
    """The norm of a convolution's reshaped kernel is too small, by up to the number of overlapping windows."""
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    nn.init.constant_(layer.weight, 1 / 3)
    assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1.0)
    assert change(layer, (1, 20, 20)) >= float(torch.linalg.matrix_norm(dense(layer, (1, 20, 20)), 2)) > 2.9


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e200])
def test_symbols_of_kernels_of_every_scale(scale) -> None:
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    one = float(symbol_bound(kernel, (8, 9)))
    assert float(symbol_bound(kernel * scale, (8, 9))) == pytest.approx(one * scale, rel=1e-6)
    assert float(symbol_bound(kernel * 0, (8, 9))) == 0.0 or float(symbol_bound(kernel * 0, (8, 9))) < 1e-300
    # Frequency by frequency, by torch's own FFT.
    symbols = torch.fft.fft2(kernel, s=(8, 9)).movedim((0, 1), (2, 3))
    truth = float(torch.linalg.matrix_norm(symbols, 2).max())
    assert truth * (1 - 1e-13) <= one <= truth * 1.001


@given(
    seed=st.integers(0, 10**6), size=st.tuples(st.integers(2, 7), st.integers(2, 7)), kernel=st.integers(1, 4), stride=st.integers(1, 3),
    padding=st.integers(0, 2),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_pooling_against_the_true_norms(seed, size, kernel, stride, padding) -> None:
    torch.manual_seed(seed)
    assume(2 * padding <= kernel and min(size) + 2 * padding >= kernel)
    shape = (2, *size)
    mean = nn.AvgPool2d(kernel, stride, padding)
    matrix = dense(mean, shape)
    for space, order in (("l2", 2), ("l1", 1), ("linf", torch.inf)):
        assert float(torch.linalg.matrix_norm(matrix, order)) <= change(mean, shape, space) * (1 + 1e-12)
    largest = nn.MaxPool2d(kernel, stride, padding)
    x = torch.randn(300, *shape, dtype=torch.float64)
    delta = torch.randn(300, *shape, dtype=torch.float64) * torch.rand(300, *shape, dtype=torch.float64) ** 8
    other = x + 5 * delta
    moved, distance = (largest(other) - largest(x)).flatten(1), (other - x).flatten(1)  # what the sum rounded to, not what was added
    for space, order in (("l2", 2), ("l1", 1), ("linf", torch.inf)):
        length = torch.linalg.vector_norm(distance, ord=order, dim=-1)
        assert bool((torch.linalg.vector_norm(moved, ord=order, dim=-1) <= length * change(largest, shape, space) * (1 + 1e-12)).all())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.AvgPool2d(2, ceil_mode=True), "ceil_mode"),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), "divisor"),
        (nn.AvgPool2d(2, divisor_override=1), "divisor"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), "bicubic"),
        (nn.Upsample(scale_factor=1.3), "whole sizes"),
        (nn.MaxPool2d(2, return_indices=True), "return_indices"),
        (nn.MaxPool2d(2, padding=1, dilation=3), "dilation"),
        (nn.FractionalMaxPool2d(2, output_size=2), "FractionalMaxPool2d"),
        (nn.BatchNorm2d(4, track_running_stats=False).eval(), "running statistics"),
    ],
)
def test_what_is_not_proved_is_refused(layer, message) -> None:
    with pytest.raises(UnsupportedLayer, match=message):
        rule_for(layer).step(layer, start((4, 6, 6)), Context(torch.float64, {}))


def test_tokens_and_vectors_are_refused() -> None:
    for layer in (nn.Conv2d(4, 4, 3), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4).eval()):
        with pytest.raises(BadInput, match="images"):
            rule_for(layer).step(layer, State(*torch.ones(3, 1, dtype=torch.float64), "l2", 3, 8), Context(torch.float64, {}))


def network(dtype: torch.dtype = torch.float32) -> Chain:
    model = Chain(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), MaxMin(), Residual(nn.Conv2d(4, 4, 3, padding=1), skip=0.7, weight=0.3), Householder(4),
        nn.Conv2d(4, 6, 2, stride=2), GroupSort(3), nn.AvgPool2d(2), nn.Dropout(0.3), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", ["l2", "linf", "l1", "weights-spectral", "weights-frobenius-absolute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_attack_succeeds_inside_a_certified_radius_of_a_convolutional_network(name, dtype) -> None:
    torch.manual_seed(2)
    model = network(dtype)
    x = torch.rand(6, 1, 4, 4, dtype=dtype)
    y = model(x).argmax(-1)
    certificate = certify(model, x, y, parse_threat(name))
    if dtype != torch.bfloat16:
        assert (certificate.radius > 0).all()
        attacked = by_name("min")(model, x, y, parse_threat(name)).radius
        assert bool((certificate.radius <= attacked).all())
    direction = torch.randn(50, *x.shape, dtype=torch.float64)
    if name == "l2":
        step = direction / direction.flatten(2).norm(dim=-1)[..., None, None, None] * torch.from_numpy(certificate.radius)[:, None, None, None] * 0.99
        moved = (x.double() + step).to(dtype)
        inside = (moved.double() - x.double()).flatten(2).norm(dim=-1) <= torch.from_numpy(certificate.radius)
        assert bool(((model(moved.flatten(0, 1)).argmax(-1).view(50, -1) == y) | ~inside).all())


def test_constants_follow_the_size_of_the_images_and_the_options() -> None:
    """One layer on images of two sizes, and with a changed attribute: cached constants must not be confused."""
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 2, 3, padding=1, bias=False).double()
    context = Context(torch.float64, {})
    for shape in ((1, 3, 3), (1, 9, 9)):
        got = float(rule_for(layer).step(layer, start(shape), context).change)
        assert got == change(layer, shape) >= float(torch.linalg.matrix_norm(dense(layer, shape), 2))
    layer.padding = (4, 4)
    assert rule_for(layer).step(layer, start((1, 9, 9)), context).whole == (2, 15, 15)


def test_radii_of_a_linear_convolution_are_those_of_its_matrix() -> None:
    """A circular convolution that is orthogonal (a shift) loses nothing: the radius is that of the head alone."""
    shift = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular", bias=False).double()
    with torch.no_grad():
        shift.weight.zero_()
        shift.weight[0, 1, 0, 0] = shift.weight[1, 0, 2, 1] = 1.0
    head = nn.Linear(32, 3).double()
    x = torch.rand(5, 2, 4, 4, dtype=torch.float64)
    whole, alone = nn.Sequential(shift, nn.Flatten(), head), nn.Sequential(nn.Flatten(), head)
    y = whole(x).argmax(-1)
    a = torch.from_numpy(certify(whole, x, y, InputBall("l2")).radius)
    b = torch.from_numpy(certify(alone, shift(x).detach(), y, InputBall("l2")).radius)
    assert bool((a <= b * (1 + 1e-9)).all()) and bool((a >= b * 0.998).all())
    assert (certify(whole, x, y, WeightBall("spectral")).radius > 0).all()
