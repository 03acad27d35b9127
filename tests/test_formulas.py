"""Functions written in plain operations: which are recognised, that no others are, and that captured models run and bound them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from formulas import ELEMENTWISE, NORMS, WRITTEN
from torch import Tensor, nn

from robustlip import capture
from robustlip.attacks import MinimumRadius
from robustlip.certifiers import certify
from robustlip.domains.expansion import Scope, expand
from robustlip.domains.expansion.dual import is_causal
from robustlip.domains.norms import Context
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Attention, Formula, NextTokenChain, Residual, Scale, Shift, WrittenNorm
from robustlip.layers.formulas import WEIGHT, X, layer_norm, rms_norm
from robustlip.numerics.arithmetic import Arithmetic
from robustlip.ops import elementwise_of
from robustlip.ops.formulas import facts_of, norm_of
from robustlip.ops.normalization import CURVATURE_OUTSIDE, Groups, divided_by, least_size, normalization_error, normalized
from robustlip.threats import EmbeddingBall, InputBall

EPS = 1e-3


class Model(nn.Module):
    """b(f(a(x))), f with a gain and a shift at hand."""

    def __init__(self, function, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 3)
        self.gain, self.shift = nn.Parameter(torch.linspace(-1.5, 2, width)), nn.Parameter(torch.linspace(-1, 1, width))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self, self.a(x)))


def llama(m: Model, x: Tensor) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + EPS)
    return m.gain * x.to(dtype)


def layer(m: Model, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return m.gain * ((x - mean) / torch.sqrt(variance + EPS)) + m.shift


def annotated(m: Model, x: Tensor) -> Tensor:
    return m.gain * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS) + m.shift


def by_var(m: Model, x: Tensor) -> Tensor:
    return (x - x.mean(dim=-1, keepdim=True)) * (x.var(dim=-1, unbiased=False, keepdim=True) + EPS) ** -0.5 * m.gain


def summed(m: Model, x: Tensor) -> Tensor:
    return x * (1.0 / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS)) * m.gain


# By name: (as a model writes it, what torch has of it in float64)
NORMALISED = {
    "llama": (llama, lambda m, x: nn.functional.rms_norm(x, (8,), m.gain, EPS)),
    "layer": (layer, lambda m, x: nn.functional.layer_norm(x, (8,), m.gain, m.shift, EPS)),
    "annotated": (annotated, None),
    "by-var": (by_var, lambda m, x: nn.functional.layer_norm(x, (8,), m.gain, None, EPS)),
    "summed": (summed, lambda m, x: nn.functional.rms_norm(x, (8,), m.gain, EPS)),
}


def made(function) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model(function).eval(), torch.randn(5, 6)


def check_radii(module: nn.Module, x: Tensor, methods: tuple[str, ...]) -> None:
    y = module(x).argmax(-1)
    broken = MinimumRadius()(module, x, y, InputBall("l2")).radius
    for method in methods:
        radius = certify(module, x, y, InputBall("l2"), method).radius
        assert (radius <= broken).all()
        if method in ("dual", "crown"):
            assert (radius > 0.3 * broken).all()


@pytest.mark.parametrize("name", WRITTEN)
def test_written_activations_are_one_layer(name) -> None:
    function, same = WRITTEN[name]
    module, x = made(lambda m, x: function(x))
    chain = capture(module, x)
    assert [type(part) for part in chain] == [nn.Linear, Formula, nn.Linear]
    assert torch.equal(chain(7 * x), module(7 * x))
    assert chain[1](x.double()).sub(same(x.double())).abs().max() < 1e-15
    check_radii(module, x, ("global", "local", "dual", "ibp", "crown", "local-lipschitz"))


@pytest.mark.parametrize("name", NORMALISED)
def test_written_normalisations_are_one_layer_and_its_gain_and_shift(name) -> None:
    function, same = NORMALISED[name]
    module, x = made(function)
    chain = capture(module, x)
    assert {type(part) for part in chain[1:-1]} - {Scale, Shift} == {WrittenNorm}
    assert torch.equal(chain(7 * x), module(7 * x))
    if same is not None:
        h = torch.randn(4, 8)
        assert chain[1:-1](h).sub(same(module, h)).abs().max() < 1e-5
    check_radii(module, x, ("global", "local", "dual"))


def test_a_cast_that_casts_is_refused() -> None:
    module, x = made(llama)
    with pytest.raises(UnsupportedLayer, match=r"in torch\.float32; cast the model"):
        capture(module.double(), x.double())


# One thing of each changed, so that it is another function, or none that is proved.
STRANGERS = [
    ("mul", ("mul", 0.5, X), ("add", 1.0, ("tanh", ("mul", 0.7978845608, ("add", X, ("mul", 0.0447, ("pow", X, 3.0))))))),
    ("mul", ("mul", 0.5, X), ("add", 1.0, ("tanh", ("mul", 0.79788, ("add", X, ("mul", 0.044715, ("pow", X, 3.0))))))),
    ("mul", ("mul", 0.5, X), ("add", 1.0, ("tanh", ("mul", 0.7978845608, ("add", X, ("mul", 0.044715, ("pow", X, 2.0))))))),
    ("mul", ("mul", 0.5, X), ("sub", 1.0, ("tanh", ("mul", 0.7978845608, ("add", X, ("mul", 0.044715, ("pow", X, 3.0))))))),
    ("mul", ("mul", 0.5, X), ("add", 1.0, ("erf", X))), ("mul", X, ("add", 1.0, ("erf", ("div", X, math.sqrt(2))))),
    ("mul", ("mul", 0.5, X), ("add", 1.0, ("erf", ("div", X, -math.sqrt(2))))), ("mul", ("pow", X, 2), ("sigmoid", X)),
    ("mul", X, ("sigmoid", ("mul", -1.0, X))), ("mul", X, ("sigmoid", ("mul", 50.0, X))), ("mul", X, ("sigmoid", ("add", X, 1.0))),
    ("mul", 1.5, ("mul", X, ("sigmoid", X))), ("div", ("mul", X, ("relu6", ("add", X, 2.0))), 6), ("div", ("mul", X, ("relu6", ("add", X, 3))), 5),
    ("div", ("mul", X, ("clamp", ("add", X, 3), 0, 7)), 6), ("mul", ("mul", ("mul", 1e30, X), ("sigmoid", X)), 1e-30),
]  # fmt: skip


@pytest.mark.parametrize("expression", STRANGERS, ids=str)
def test_other_functions_have_no_facts(expression) -> None:
    assert facts_of(expression) is None
    with pytest.raises(UnsupportedLayer, match="GELU, SiLU or Hardswish written out, got"):
        elementwise_of(Formula(expression))


MEAN = ("sub", X, ("mean", X))
STRANGE_NORMS = [
    ("mul", X, ("rsqrt", ("add", ("mean", ("pow", X, 3)), EPS))), ("mul", X, ("rsqrt", ("add", ("mean", X), EPS))),
    ("mul", MEAN, ("rsqrt", ("add", ("mean", ("pow", X, 2)), EPS))), ("mul", X, ("rsqrt", ("add", ("var", X, 0), EPS))),
    ("mul", X, ("rsqrt", ("add", ("mean", ("pow", MEAN, 2)), EPS))), ("div", MEAN, ("add", ("var", X, 0), EPS)),
    ("div", ("add", X, ("mean", X)), ("sqrt", ("add", ("var", X, 0), EPS))), ("mul", X, ("sqrt", ("add", ("mean", ("pow", X, 2)), EPS))),
    ("div", X, ("rsqrt", ("add", ("mean", ("pow", X, 2)), EPS))), ("mul", X, ("rsqrt", ("add", ("div", ("sum", ("pow", X, 2)), 5.0), EPS))),
    ("div", ("mul", 2.0, X), ("sqrt", ("add", ("mean", ("pow", X, 2)), EPS))),
]  # fmt: skip


@pytest.mark.parametrize("expression", STRANGE_NORMS, ids=str)
def test_other_expressions_are_no_normalisation(expression) -> None:
    assert norm_of(expression, 8) is None
    with pytest.raises(UnsupportedLayer, match="RMSNorm or LayerNorm written out, got"):
        normalized(WrittenNorm(8, expression), None, 1, 8)


@pytest.mark.parametrize("eps", [0.0, -1e-6])
def test_a_normalisation_without_eps_is_not_lipschitz(eps) -> None:
    with pytest.raises(UnsupportedLayer, match="not Lipschitz without"):
        normalized(rms_norm(8, eps), None, 1, 8)


WRONG = [("exec", X), ("add", X, math.inf), ("add", X, "y"), X, 3.0, ("mean", X), ("mul", WEIGHT, X), ("add", X, True)]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_is_no_expression_is_refused(wrong) -> None:
    with pytest.raises(BadInput, match="expected an expression"):
        Formula(wrong)
    long = X
    for _ in range(200):
        long = ("add", long, 1.0)
    with pytest.raises(BadInput, match="at most"):
        Formula(long)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NORMS)
def test_executed_errors_of_written_normalisations(name, dtype) -> None:
    """Tokens whose numbers nearly cancel, tiny, large and far from 0, compared with float64: the rule's bound for tokens of that size."""
    width, eps = 6, 1e-2
    written = NORMS[name](width, eps).to(dtype)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4000, width, generator=g, dtype=torch.float64) * 10 ** (4 * torch.rand(4000, 1, generator=g, dtype=torch.float64) - 3)
    x[::3] += 10 ** (2 * torch.rand(1334, 1, generator=g, dtype=torch.float64) - 1)
    x = x.to(dtype)
    exact = WrittenNorm(width, written.expression, None if written.weight is None else written.weight.double())
    truth = exact(x.double())
    groups = normalized(written, None, 1, width)
    count, outside = divided_by(written, groups)
    c = x.double() - x.double().mean(-1, keepdim=True) * (name not in ("written-rms", "written-rms-outside"))
    spread = c.square().sum(-1) / count
    size = spread.sqrt() + eps if outside else (spread + eps).sqrt()
    error = (written(x).double() - truth).norm(dim=-1)
    bound = normalization_error(written, groups, x.double().norm(dim=-1), truth.norm(dim=-1), 1 / size, Arithmetic(dtype))
    assert bool((error <= bound).all())
    known = torch.isfinite(bound)
    assert float(known.double().mean()) > (0.5 if dtype == torch.float32 else 0.05)
    assert float((error / bound)[known].max()) > 1e-3  # a bound that says nothing would be seen


@pytest.mark.parametrize("layout", ["rows", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["group", "instance"])
def test_executed_errors_of_groups_of_channels(kind, dtype, layout) -> None:
    """Images far from 0, of all sizes, in both layouts: in channels-last ones torch takes the mean of squares, which loses more than Welford's."""
    layer = nn.GroupNorm(2, 4, eps=1e-3) if kind == "group" else nn.InstanceNorm2d(4, eps=1e-3, affine=True)
    torch.nn.init.uniform_(layer.weight, -2, 2)
    layer = layer.to(dtype).requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    size = 10 ** (3 * torch.rand(3000, 1, 1, 1, generator=g, dtype=torch.float64) - 2)
    far = 10 ** (5 * torch.rand(3000, 1, 1, 1, generator=g, dtype=torch.float64) - 3) * (torch.arange(3000) % 3 > 0)[:, None, None, None]
    x = (size * torch.randn(3000, 4, 2, 3, generator=g, dtype=torch.float64) + far).to(dtype)
    truth = copy.deepcopy(layer).double()(x.double())
    with torch.no_grad():
        executed = layer(x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else x)
    groups = normalized(layer, (4, 2, 3), 1, 24)
    before, behind, error = (v.double().reshape(3000, groups.count, groups.width) for v in (x, truth, executed.double() - truth))
    inverse = 1 / ((before - before.mean(-1, keepdim=True)).square().mean(-1) + layer.eps).sqrt()
    error, one = error.norm(dim=-1), Groups(1, groups.width, groups.eps)
    bound = normalization_error(layer, one, before.norm(dim=-1), behind.norm(dim=-1), inverse, Arithmetic(dtype))
    assert bool((error <= bound).all())
    known = torch.isfinite(bound)
    assert float(known.double().mean()) > (0.4 if dtype == torch.float32 else 0.02)
    assert float((error / bound)[known].max()) > 1e-4


def test_the_second_derivative_where_eps_stands_outside() -> None:
    """‖D²f[u, u]‖·√m·s² over tokens of all sizes and all directions: C = 2 holds, and is reached where c is small and u along it."""
    count, eps = 7, 0.3
    theta = torch.linspace(0, 1, 401, dtype=torch.float64)[:, None]
    along = torch.linspace(0, 1, 401, dtype=torch.float64)
    across = (1 - along.square()).clamp_min(0).sqrt()
    found = torch.sqrt((2 * (1 - theta) * along.square() + across.square()).square() + (2 * along * across).square())
    assert float(found.max()) <= CURVATURE_OUTSIDE == float(found.max())
    # And the formula is the second derivative: by finite differences of f at c with ‖c‖ = θ√m·s.
    for t in (0.05, 0.4, 0.9):
        size = eps * t / (1 - t) * math.sqrt(count)
        s = size / math.sqrt(count) + eps
        c = torch.zeros(3, dtype=torch.float64)
        c[0] = size
        for p in (0.0, 0.6, 1.0):
            u = torch.tensor([p, math.sqrt(1 - p * p), 0.0], dtype=torch.float64)
            f = [v / (v.norm() / math.sqrt(count) + eps) for v in (c - 1e-4 * size * u, c, c + 1e-4 * size * u)]
            second = (f[0] - 2 * f[1] + f[2]).norm() / (1e-4 * size) ** 2 * math.sqrt(count) * s * s
            expected = math.hypot(2 * (1 - t) * p * p + 1 - p * p, 2 * p * math.sqrt(1 - p * p))
            assert float(second) == pytest.approx(expected, rel=1e-4)


def test_a_mean_far_from_zero_is_counted_in_the_adjoint() -> None:
    """A token of 1e5 in every number but for 1e-9: what float64 makes of c is off by more than the adjoint's usual slack allows."""
    written = layer_norm(8, 1e-12)
    scope = Scope(Context(torch.float64, {}))
    x = 1e5 + 1e-9 * torch.randn(1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = torch.ones(1, 1, 1, 8, dtype=torch.float64)
    far, near = (float(expand(written, at, scope).adjoint(g)[1][-1]) for at in (x, x - 1e5))
    assert far > 4 * near
    assert least_size(written) == 1e-6


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_formulas_print_their_numbers_exactly(name) -> None:
    layer = ELEMENTWISE[name]
    text = layer.extra_repr()
    numbers = {word.strip("(),") for word in text.split()}
    for number in (0.5, 0.044715, 0.7978845608028654, 0.70710678, 1.702):
        if str(number) in str(layer.expression):
            assert any(repr(number) in word for word in numbers)


def test_a_last_token_that_moves_alone_goes_through_written_layers() -> None:
    """A causal model of the layers that a capture of GPT-2 or Llama has: single tokens, every rival, exact Jacobians."""
    torch.manual_seed(0)
    mlp = nn.Sequential(rms_norm(8, EPS), Scale(torch.linspace(0.5, 2, 8)), nn.Linear(8, 12), ELEMENTWISE["gelu-new"], nn.Linear(12, 8))
    attend = nn.Sequential(layer_norm(8, EPS), Attention(8, 2))
    model = NextTokenChain(nn.Embedding(11, 8), Residual(attend), Residual(mlp), nn.Linear(8, 11)).eval()
    assert is_causal(model)
    x = torch.randint(0, 11, (6, 5))
    y, threat = model(x)[:, -1].argmax(-1), EmbeddingBall(tokens=(-1,))
    broken = MinimumRadius()(model, x, y, threat).radius
    for method in ("global", "local", "dual"):
        radius = certify(model, x, y, threat, method).radius
        assert (radius <= broken).all() and (radius > 0).any()
    assert (radius > 0.2 * broken).mean() > 0.8
