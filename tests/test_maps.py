"""Linear layers as maps: A, its adjoint, |A|, norms of rows, and float64 rounding, compared with the matrix of the layer."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Normalize, Scale, Shift
from robustlip.ops.convolution import CONVOLUTIONS, MEANS, TRANSPOSED
from robustlip.ops.maps import LinearMap, map_of, mapped_layers, unmapped
from robustlip.ops.normalization import BATCH_NORMS
from robustlip.ops.resampling import UPSAMPLES


def drawn(layer: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
        if isinstance(layer, BATCH_NORMS):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.1, 3)
    return layer.double().eval().requires_grad_(False)


def dense(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(A (m, n), b (m,)) of a layer, from its values at unit vectors."""
    n = math.prod(shape)
    zero = layer(torch.zeros(1, *shape, dtype=torch.float64))
    return (layer(torch.eye(n, dtype=torch.float64).view(n, *shape)) - zero).flatten(1).mT, zero.flatten()


def check(layer: nn.Module, shape: tuple[int, ...], exact_size: bool = True) -> LinearMap:
    """The map against the layer. exact_size: whether |A| has to be exactly that."""
    matrix, bias = dense(layer, shape)
    found = map_of(layer, shape)
    assert (found.outputs, found.inputs) == tuple(matrix.shape)
    assert tuple(layer(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:]) == found.out
    eye = torch.eye(found.inputs, dtype=torch.float64)
    torch.testing.assert_close(found.apply(eye).mT, matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.adjoint(torch.eye(found.outputs, dtype=torch.float64)), matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.zeros_like(bias) if found.bias is None else found.bias, bias, rtol=1e-12, atol=1e-12)
    size, back = found.apply(eye, absolute=True).mT, found.adjoint(torch.eye(found.outputs, dtype=torch.float64), absolute=True)
    torch.testing.assert_close(size, back, rtol=1e-12, atol=1e-12)
    assert bool((size >= matrix.abs() * (1 - 1e-12) - 1e-12).all())
    if exact_size:
        torch.testing.assert_close(size, matrix.abs(), rtol=1e-12, atol=1e-12)
    # ⟨Ax, g⟩ = ⟨x, Aᵀg⟩, with leading dimensions.
    x, g = torch.randn(2, 3, found.inputs, dtype=torch.float64), torch.randn(2, 3, found.outputs, dtype=torch.float64)
    torch.testing.assert_close((found.apply(x) * g).sum(-1), (x * found.adjoint(g)).sum(-1), rtol=1e-9, atol=1e-9)
    for norm, order in (("l2", 2.0), ("l1", math.inf), ("linf", 1.0)):
        truth = torch.linalg.vector_norm(matrix, ord=order, dim=-1)
        assert bool((found.row_norms(norm) >= truth * (1 - 1e-13)).all())
        if exact_size and norm != "l1" and type(layer) is nn.Conv2d:
            torch.testing.assert_close(found.row_norms(norm), truth, rtol=1e-9, atol=1e-12)
    # Summands: no number is made of more than is said.
    counted = (matrix != 0).to(torch.int64)
    assert found.terms >= int(counted.sum(1).max()) and found.adjoint_terms >= int(counted.sum(0).max())
    return found


@given(
    seed=st.integers(0, 10**6), size=st.tuples(st.integers(1, 7), st.integers(1, 7)), kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 4), st.integers(0, 4))), groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "zeros", "zeros", "circular", "reflect", "replicate"]), bias=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_convolutions_with_every_option(seed, size, kernel, stride, dilation, padding, groups, mode, bias) -> None:
    assume(padding != "same" or stride == (1, 1))
    layer = nn.Conv2d(2, 4, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=mode, bias=bias)
    layer = drawn(layer, seed)
    try:
        layer(torch.zeros(1, 2, *size, dtype=torch.float64))
    except RuntimeError:  # no window fits, or torch refuses the padding
        assume(False)
    check(layer, (2, *size), exact_size=mode == "zeros")


@given(
    seed=st.integers(0, 10**6), size=st.tuples(st.integers(2, 8), st.integers(2, 8)), kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), padding=st.integers(0, 2),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_means_of_windows(seed, size, kernel, stride, padding) -> None:
    assume(2 * padding <= min(kernel) and all(s + 2 * padding >= k for s, k in zip(size, kernel, strict=True)))
    check(nn.AvgPool2d(kernel, stride, padding).double(), (3, *size))
    check(nn.AdaptiveAvgPool2d(1).double(), (3, *size))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3), (5,)), (nn.Linear(5, 3, bias=False), (5,)), (nn.BatchNorm1d(5), (5,)), (nn.BatchNorm2d(3), (3, 2, 4)),
        (nn.BatchNorm1d(5, affine=False), (5,)), (Normalize([0.3, 0.1], [0.5, 2.0]), (2, 3, 3)), (Normalize([0.3], [0.5]), (6,)),
        (Normalize([0.3, 0.1], [0.5]), (2, 3, 3)), (Scale([0.3, -2.0]), (2, 3, 3)), (Scale(0.7, divide=True), (6,)), (Shift([1.0, 2.0]), (2, 3, 3)),
        (Shift(0.5, subtract=True), (6,)), (nn.ZeroPad2d((1, 0, 2, 3)), (2, 3, 4)), (nn.Conv2d(4, 4, 3, padding=2, groups=4), (4, 3, 3)),
        (nn.Conv1d(4, 6, 3, 2, 2, 2, 2), (4, 6)), (nn.Conv3d(2, 4, (3, 1, 2), (1, 2, 1), 1, groups=2), (2, 3, 3, 2)), (nn.AvgPool1d(3, 2, 1), (2, 7)),
        (nn.AvgPool3d(2, 1), (2, 3, 2, 3)), (nn.AdaptiveAvgPool1d(1), (2, 5)), (nn.AdaptiveAvgPool3d(1), (2, 2, 3, 2)),
        (nn.ConvTranspose1d(4, 6, 5, 2, 1, 1, 2), (4, 5)), (nn.ConvTranspose2d(2, 3, (3, 2), (2, 3), 1, (1, 0)), (2, 3, 4)),
        (nn.ConvTranspose2d(2, 2, 3, 1, 1, 1, dilation=2), (2, 3, 2)), (nn.ConvTranspose3d(2, 3, 2, 2), (2, 2, 1, 2)),
        (nn.AdaptiveAvgPool2d((3, 2)), (2, 5, 3)),
        (nn.Upsample(scale_factor=2), (2, 3, 2)), (nn.Upsample((5, 4), mode="bilinear"), (2, 3, 6)), (nn.UpsamplingBilinear2d((5, 7)), (1, 3, 4)),
        (nn.Upsample(5, mode="nearest-exact"), (2, 10)), (nn.Upsample(scale_factor=2, mode="trilinear"), (1, 2, 3, 2)),
        (nn.BatchNorm1d(3), (3, 4)), (nn.BatchNorm3d(2), (2, 2, 1, 3)),
        (Scale(torch.randn(3, 1)), (2, 3, 4)), (Shift(torch.randn(3, 4)), (2, 3, 4)),
    ],
)  # fmt: skip
def test_maps_of_other_layers(layer, shape) -> None:
    check(drawn(layer, 1), shape)


MORE = (Scale, Shift, nn.ZeroPad2d)


def test_every_map_is_checked() -> None:
    assert set(mapped_layers()) == {nn.Linear, *CONVOLUTIONS, *TRANSPOSED, *MEANS, *UPSAMPLES, Normalize, *BATCH_NORMS, *MORE}


@pytest.mark.parametrize(
    ("layer", "shape", "word"),
    [
        (nn.AvgPool2d(2, ceil_mode=True), (1, 3, 3), "ceil_mode=True"), (nn.Upsample(scale_factor=2, mode="bicubic"), (1, 3, 3), "bicubic"),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), (1, 4, 4), "AvgPool2d"), (nn.AvgPool2d(2, divisor_override=3), (1, 4, 4), "AvgPool2d"),
        (nn.MaxPool2d(2), (1, 4, 4), "MaxPool2d"), (nn.Conv2d(2, 2, 1), (3, 4, 4), "2 channels"), (nn.Conv2d(2, 2, 1), (32,), "images"),
        (nn.Linear(4, 2), (5,), "vectors of 4"), (nn.BatchNorm2d(3).eval(), (2, 4, 4), "by channel"), (nn.AvgPool2d(2), (16,), "images"),
    ],
)  # fmt: skip
def test_what_has_no_map_is_refused(layer, shape, word) -> None:
    with pytest.raises(UnsupportedLayer, match=word):
        map_of(layer, shape)
    assert (unmapped(layer) != "") == (type(layer) in (nn.MaxPool2d, nn.Upsample) or (type(layer) is nn.AvgPool2d and shape != (16,)))


def test_batch_norm_in_train_mode_is_refused() -> None:
    with pytest.raises(BadInput, match="eval mode"):
        map_of(nn.BatchNorm2d(3).train(), (3, 2, 2))
    with pytest.raises(BadInput, match="larger images"):
        map_of(nn.Conv2d(1, 1, 5), (1, 4, 4))


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e150])
def test_norms_of_rows_of_every_scale(scale) -> None:
    layer = drawn(nn.Conv2d(2, 3, 3, padding=1), 4)
    rows = map_of(layer, (2, 4, 4)).row_norms("l2")
    with torch.no_grad():
        layer.weight.mul_(scale)
    torch.testing.assert_close(map_of(layer, (2, 4, 4)).row_norms("l2") / scale, rows, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_what_float64_loses_of_a_convolution_and_of_its_adjoint(mode) -> None:
    """In fractions: numbers that nearly cancel, so that rounding is all that is left of most of them."""
    torch.manual_seed(0)
    layer = drawn(nn.Conv2d(3, 2, 3, padding=1, stride=2, bias=False, padding_mode=mode), 5)
    found = map_of(layer, (3, 5, 5))
    matrix = [[Fraction(float(v)) for v in row] for row in found.apply(torch.eye(75, dtype=torch.float64)).mT]
    lost = 0
    for function, rows, n, size, loss in (
        (found.apply, matrix, 75, found.apply, found.loss),
        (found.adjoint, list(zip(*matrix, strict=True)), found.outputs, found.adjoint, found.adjoint_loss),
    ):
        v = torch.randn(n, dtype=torch.float64)
        exact = [sum((a * Fraction(float(b)) for a, b in zip(row, v, strict=True)), Fraction(0)) for row in rows]
        allowed = (size(v.abs(), absolute=True) * loss).tolist()
        off = [abs(Fraction(float(got)) - true) for got, true in zip(function(v), exact, strict=True)]
        assert all(o <= Fraction(a) for o, a in zip(off, allowed, strict=True))
        lost += sum(o > 0 for o in off)
    assert lost > 10
