"""Certificates compared with exact radii of linear models and with attacks on other models, and inputs that must not be certified."""

from __future__ import annotations

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processors import flushed
from torch import nn

from robustlip.attacks import by_name
from robustlip.certifiers import METHODS, certify, lipschitz_bound, weight_sensitivity_bound
from robustlip.domains.expansion import Ball, ChainExpansion, Scope
from robustlip.domains.norms import Context, State, rule_for
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Attention, NextTokenChain, as_chain
from robustlip.models import BaselineGPT, LipschitzGPT, LipschitzMLP, LipschitzTransformer
from robustlip.models.build import build
from robustlip.threats import EmbeddingBall, InputBall, WeightBall, parse_threat

DUAL = {"l2": 2, "linf": 1, "l1": float("inf")}


def linear_truth(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, norm: str) -> torch.Tensor:
    """min over all rivals of margin / dual norm of the difference of rows: exact for one linear layer."""
    layer = model[-1]
    w, b = layer.weight.detach().double(), layer.bias.detach().double()
    logits = x.flatten(1).double() @ w.T + b
    rows = w[y][:, None] - w[None]
    ratio = (logits.gather(1, y[:, None]) - logits) / torch.linalg.vector_norm(rows, ord=DUAL[norm], dim=-1)
    return ratio.scatter(1, y[:, None], torch.inf).amin(1)


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_models_have_their_exact_radius(norm, dtype) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).to(dtype)
    x = torch.randn(200, 3, 4).to(dtype)
    y = model(x).argmax(-1)
    truth = linear_truth(model, x, y, norm)
    radius = torch.from_numpy(certify(model, x, y, InputBall(norm), dtype="real" if dtype == torch.float64 else None).radius)
    assert bool((radius <= truth).all())
    typical = truth > 0.05
    assert bool((radius[typical] >= truth[typical] * (1 - 1e-3)).all())


def test_the_binding_rival_need_not_be_the_runner_up() -> None:
    """The logit of class 1 is lower by 1, with similar weights; that of class 2 by 1.5, with distant weights: class 2 decides."""
    layer = nn.Linear(2, 3, bias=True).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 10.0]]))
        layer.bias.copy_(torch.tensor([0.0, -1.0, -1.5]))
    certificate = certify(nn.Sequential(layer), torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]), InputBall("l2"))
    assert certificate.radius[0] == pytest.approx(0.15, rel=1e-3)
    assert certificate.radius[0] <= 0.15


def tiny(kind: str, seed: int, gain: float = 2.0):
    """A small random model with weights large enough for attention to be far from uniform, and samples it predicts."""
    torch.manual_seed(seed)
    if kind == "mlp":
        model, x = LipschitzMLP([6, 16, 16, 4], "relu"), torch.rand(8, 6)
    elif kind == "mlp-gelu":
        model, x = LipschitzMLP([6, 16, 4], "scaled-gelu", mean=0.5, std=0.25), torch.rand(8, 6)
    elif kind == "gpt":
        model, x = LipschitzGPT("abcdefg", 8, 2, 1, attention_scale=2.0, distance_bias=3), torch.randint(7, (6, 5))
    elif kind == "gpt-baseline":
        model, x = BaselineGPT("abcdefg", 8, 2, 1), torch.randint(7, (6, 5))
    else:
        model, x = LipschitzTransformer((1, 4, 4), 2, 4, 8, 2, 1), torch.rand(6, 1, 4, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(gain)
    model.eval()
    return model, x, model.scores(x).argmax(-1)


ATTACKED = [
    ("mlp", "l2"), ("mlp", "linf"), ("mlp", "l1"), ("mlp", "weights-spectral"), ("mlp", "weights-frobenius-absolute"), ("mlp-gelu", "linf"),
    ("gpt", "embedding-l2"), ("gpt", "embedding-l2@-1"), ("gpt", "embedding-fro"), ("gpt", "weights-spectral"),
    ("transformer", "l2"), ("transformer", "linf"), ("transformer", "embedding-l2@0,3"), ("transformer", "weights-frobenius"),
    ("gpt-baseline", "embedding-l2"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), ATTACKED)
def test_no_attack_succeeds_inside_a_certified_radius(kind, name) -> None:
    for seed in (0, 1):
        model, x, y = tiny(kind, seed)
        certificate = certify(model, x, y, parse_threat(name), dtype="real" if kind == "gpt-baseline" else None)
        attacked = by_name("min")(model, x, y, parse_threat(name)).radius
        assert bool((certificate.radius <= attacked).all())
        if kind != "gpt-baseline":
            assert (certificate.radius > 0).mean() > 0.5


@given(seed=st.integers(0, 10**6), gain=st.floats(0.2, 4.0))
@settings(max_examples=25, deadline=None)
def test_random_perturbations_inside_the_radius_change_nothing(seed, gain) -> None:
    model, x, y = tiny("mlp", seed, gain)
    radius = certify(model, x, y, InputBall("l2")).radius
    direction = torch.randn(200, *x.shape)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    moved = x + direction * torch.from_numpy(radius).float()[:, None] * 0.9999
    assert bool((model(moved.flatten(0, 1)).argmax(-1).view(200, -1) == y).all())


@pytest.mark.parametrize("kind", ["mlp", "gpt", "transformer"])
def test_weight_sensitivity_is_above_what_is_observed(kind) -> None:
    from robustlip.attacks import observed_sensitivity

    model, x, _ = tiny(kind, 3)
    threat = WeightBall("spectral", 0.02)
    bound = weight_sensitivity_bound(model, x, threat)
    seen = observed_sensitivity(model, x, threat, starts=1, power_steps=5, ascent_steps=5).change
    assert bool((seen <= bound).all()) and bool((seen > 0).all())


def test_a_sensitivity_that_overflows_is_infinite() -> None:
    """∞ means that there is no bound; NaN must not count as one. float64 ends at 10³⁰⁸."""
    model = BaselineGPT("abcd", 16, 2, 40)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1e3
    x = torch.zeros(3, 4, dtype=torch.int64)
    for size in (1e-6, 0.01):
        assert (weight_sensitivity_bound(model, x, WeightBall("spectral", size)) == np.inf).all()


def test_constants_follow_the_weights_however_they_are_changed() -> None:
    """A write through .data does not change the version counter; cached constants would give a false certificate."""
    model, x, y = tiny("mlp", 0)
    before = certify(model, x, y, InputBall("l2"))
    for p in model.parameters():
        p.data.mul_(3.0)
    again = certify(model, x, model(x).argmax(-1), InputBall("l2"))
    fresh = build(model.config)
    fresh.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(again.radius, certify(fresh, x, model(x).argmax(-1), InputBall("l2")).radius)
    assert before.weights_sha256 != again.weights_sha256


def test_a_sequential_keeps_its_constants_and_sees_new_layers() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.rand(5, 6)
    y = model(x).argmax(-1)
    assert as_chain(model) is as_chain(model)
    first = certify(model, x, y, InputBall("l2"))
    model[2] = nn.Linear(8, 4)
    second = certify(model, x, model(x).argmax(-1), InputBall("l2"))
    fresh = certify(nn.Sequential(*model), x, model(x).argmax(-1), InputBall("l2"))
    np.testing.assert_array_equal(second.radius, fresh.radius)
    assert first.weights_sha256 != second.weights_sha256


def test_batching_and_mode_change_nothing() -> None:
    model, x, y = tiny("gpt", 0)
    model.train()
    whole = certify(model, x, y, EmbeddingBall())
    parts = certify(model, x, y, EmbeddingBall(), batch_size=2)
    np.testing.assert_allclose(whole.radius, parts.radius, rtol=1e-4)
    assert model.training


def test_requested_radius_and_statuses() -> None:
    model, x, y = tiny("mlp", 0)
    free = certify(model, x, y, InputBall("l2"))
    middle = float(np.median(free.radius))
    wrong = y.clone()
    wrong[0] = (wrong[0] + 1) % 4
    asked = certify(model, x, wrong, InputBall("l2", middle))
    assert asked.status[0] == "misclassified" and asked.radius[0] == 0
    for status, radius in zip(asked.status[1:], asked.radius[1:], strict=True):
        assert status == ("certified" if radius >= middle else "abstained")
    assert asked.certified_accuracy(middle) == pytest.approx(np.mean(asked.radius >= middle))


def test_ties_and_overflow_are_not_certified() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer.bias.zero_()
    tied = certify(nn.Sequential(layer), torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([0, 0]), InputBall("l2"))
    assert (tied.radius == 0).all() and tied.status == ("abstained", "abstained")
    huge = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
    with torch.no_grad():
        for p in huge.parameters():
            p.fill_(300.0)
    assert (certify(huge, torch.ones(1, 2).half() * 300, torch.tensor([0]), InputBall("l2")).radius == 0).all()


@pytest.mark.parametrize("operand", ["input", "weight"])
@pytest.mark.parametrize("method", ["global", "local", "dual", "best"])
def test_subnormal_operands_may_count_for_nothing(method: str, operand: str) -> None:
    """A margin that a subnormal input, or a subnormal weight, alone makes: on a processor that takes it for zero the prediction is another."""
    small, large = 1e-39, 2.0**126
    model, depth = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    with torch.no_grad():
        depth[0].weight.copy_(torch.eye(2))
        for layer in (model[0], depth[1]):
            layer.weight.copy_(torch.tensor([[large if operand == "input" else small, 0.0], [0.0, 0.0]]))
            layer.bias.copy_(torch.tensor([0.0, 0.05]))
    x, y = torch.tensor([[small if operand == "input" else large, 0.0]]), torch.tensor([0])
    for chain in (model, depth):
        assert int(chain(x).argmax()) == 0 and int(flushed(chain, x).argmax()) == 1
        assert certify(chain, x, y, InputBall("l2"), method).radius[0] == 0


@pytest.mark.parametrize("method", ["global", "local", "dual"])
def test_subnormal_tokens_may_count_for_nothing_in_attention(method: str) -> None:
    attention = Attention(4, 1, output_scale=1.0, rope=False)
    layers = OrderedDict(embed_tokens=nn.Embedding(2, 4), attention=attention, head=nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in (p for layer in layers.values() for p in layer.parameters()):
            parameter.zero_()
        layers["embed_tokens"].weight[0, 0], layers["embed_tokens"].weight[1, 1] = 1e-39, 1.0
        attention.value.weight.copy_(torch.eye(4) * 2.0**100)
        attention.output.weight.copy_(torch.eye(4) * 2.0**30)
        layers["head"].weight[0, 0], layers["head"].bias[1] = 1.0, 0.5
    model = NextTokenChain(layers).eval()
    x, y = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    assert int(model(x)[0, -1].argmax()) == 0 and int(flushed(model, x)[0, -1].argmax()) == 1
    assert certify(model, x, y, EmbeddingBall(), method).radius[0] == 0


def test_one_overflowing_sample_leaves_dual_to_the_others() -> None:
    torch.manual_seed(0)
    model = LipschitzGPT(vocabulary_size=3, width=4, heads=1, blocks=2, alpha=0.5).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
        model[0].weight[2] *= 1e160
    x = torch.tensor([[0, 1, 0], [0, 1, 2]])
    y = model(x)[:, -1].argmax(-1)
    assert not bool(torch.isfinite(model(x)[1, -1]).all())
    alone = certify(model, x[:1], y[:1], EmbeddingBall(tokens=(-1,)), "dual").radius
    both = certify(model, x, y, EmbeddingBall(tokens=(-1,)), "dual")
    assert alone[0] > 0 and both.radius.tolist() == [pytest.approx(alone[0], rel=1e-9), 0.0]


def test_a_model_that_ignores_its_input_is_robust_everywhere() -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([1.0, 0.0]))
    radius = certify(nn.Sequential(layer), torch.rand(2, 3), torch.tensor([0, 0]), InputBall("l2")).radius
    assert np.isfinite(radius).all() and (radius > 1e6).all()


def active_mlp() -> nn.Sequential:
    """An MLP whose global bound is attained: the first layer copies positive inputs, so every ReLU is active and rounding alone decides."""
    model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.ReLU(), nn.Linear(48, 2))
    nn.init.eye_(model[0].weight)
    return model


ROUNDED = {"linear": lambda: nn.Sequential(nn.Linear(64, 2)), "mlp": active_mlp}


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ROUNDED)
def test_rounding_attack_breaks_the_real_certificate_and_not_the_executed_one(kind, dtype) -> None:
    """Jin et al. 2022: inside the radius that exact arithmetic proves, the program executed in 16 bits answers otherwise.

    The attack walks along the gradient of the margin and rounds to points that the dtype has; distances are those of the rounded points.
    """
    generator = torch.Generator().manual_seed(0)
    broken = 0
    for _ in range(40 if kind == "linear" else 12):  # of an MLP, all methods are tried
        model = ROUNDED[kind]().to(dtype).requires_grad_(False)
        exact = copy.deepcopy(model).double()
        x = torch.rand(128, 64, generator=generator).to(dtype)
        # Put the samples near the boundary, where rounding decides: shift the bias to the median margin.
        logits = exact(x.double())
        model[-1].bias[0] -= (logits[:, 0] - logits[:, 1]).median().to(dtype)
        exact = copy.deepcopy(model).double()
        y = model(x).argmax(-1)
        real, executed = (torch.from_numpy(certify(model, x, y, InputBall("l2"), dtype=d).radius) for d in ("real", None))
        point = x.double().requires_grad_()
        logits = exact(point)
        (gradient,) = torch.autograd.grad((logits.gather(1, y[:, None]) * 2 - logits.sum(1, keepdim=True)).sum(), point)
        away = -gradient / gradient.norm(dim=-1, keepdim=True)
        for fraction in torch.linspace(0.3, 1.0, 15, dtype=torch.float64):
            moved = (x.double() + away * real[:, None] * fraction).to(dtype)
            distance = (moved.double() - x.double()).norm(dim=-1)
            flipped = model(moved).argmax(-1) != y
            broken += int((flipped & (distance <= real)).sum())
            assert not bool((flipped & (distance <= executed)).any())
    assert broken > 0  # the certificate about real numbers is false of the program


def test_allowances_leave_most_of_a_float32_radius() -> None:
    model, x, y = tiny("mlp", 0)
    real, executed = (certify(model, x, y, InputBall("l2"), "global", dtype=d).radius for d in ("real", None))
    assert (executed < real).all() and (executed > 0.99 * real).all()


def test_lipschitz_bound_is_above_sampled_slopes() -> None:
    from robustlip.attacks import observed_sensitivity

    model, x, _ = tiny("mlp", 1)
    assert observed_sensitivity(model, x, InputBall("l2"), starts=2).largest <= lipschitz_bound(model)["l2"]
    gpt, tokens, _ = tiny("gpt", 1)
    assert observed_sensitivity(gpt, tokens, EmbeddingBall(), starts=2).largest <= lipschitz_bound(gpt)["l2"]
    assert lipschitz_bound(tiny("gpt-baseline", 0)[0])["l2"] > 1e3  # LayerNorm's 1/√eps, honestly


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, x, y: (m, x, y - 10, {}), "labels in"),
        (lambda m, x, y: (m, x, y[:-1], {}), "labels as an integer tensor"),
        (lambda m, x, y: (m, x * torch.nan, y, {}), "finite inputs"),
        (lambda m, x, y: (m, x[:0], y[:0], {}), "at least one sample"),
        (lambda m, x, y: (m, x, y, {"method": "magic"}), "method"),
        (lambda m, x, y: (m, x, y, {"dtype": "int8"}), "dtype"),
        (lambda m, x, y: (nn.Sequential(m, nn.Softmax(-1)), x, y, {}), "Softmax|LipschitzMLP"),
    ],
)
def test_bad_input_is_one_sentence(change, message) -> None:
    model, x, y, options = change(*tiny("mlp", 0))
    with pytest.raises(BadInput, match=message):
        certify(model, x, y, InputBall("l2"), **options)


def test_nan_weights_and_overridden_forward_are_refused() -> None:
    model, x, y = tiny("mlp", 0)
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(BadInput, match="NaN"):
        certify(model, x, y, InputBall("l2"))

    class Louder(LipschitzMLP):
        def forward(self, x):
            return 10 * super().forward(x)

    with pytest.raises(UnsupportedLayer, match="forward"):
        certify(Louder([6, 4]), x, y, InputBall("l2"))
    with pytest.raises(BadInput, match="embedding or weight threat"):
        certify(*tiny("gpt", 0), InputBall("l2"))
    with pytest.raises(BadInput, match="with an embedding"):
        certify(*tiny("mlp", 0), EmbeddingBall())


@pytest.mark.parametrize("exponent", [-150, -222, -240, -300])
def test_the_bound_of_tiny_weights_does_not_vanish(exponent) -> None:
    """Products below 2⁻¹⁰⁷⁴ are 0 in float64, and a bound of 0 would be false."""
    torch.manual_seed(0)
    model = LipschitzGPT("abc", 8, 2, 1).double()
    plain = lipschitz_bound(model)["l2"]
    with torch.no_grad():
        model.head.weight.mul_(10.0**exponent)
    assert lipschitz_bound(model)["l2"] >= plain * 10.0**exponent * (1 - 1e-9)


def test_a_bound_that_overflows_is_infinite() -> None:
    model = LipschitzGPT("abc", 8, 2, 3).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1e60)
    assert lipschitz_bound(model)["l2"] == torch.inf


@pytest.mark.parametrize("method", METHODS)
def test_scores_by_token_are_refused(method) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(BadInput, match=r"^expected .*, got .*(2, 5, 3|5, 4).*;"):
        certify(model, torch.rand(2, 5, 4), torch.tensor([0, 1]), InputBall("l2"), method)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_sum_that_begins_with_its_bias_is_covered(kind) -> None:
    """torch's CPU kernel adds blocks of products to the bias: each sum may round at its size. What loses most are products that vanish beside it."""
    n, out, lost = 2048, 32, 0.49 * 2.0**-23
    layer = (nn.Linear(n, out) if kind == "linear" else nn.Conv2d(n, out, 1)).requires_grad_(False)
    layer.weight.fill_(1e-4)
    layer.bias.fill_(1.0)
    errors = []
    for block in (1, 192):
        x = torch.full((64, n, 1, 1) if kind == "conv" else (64, n), lost / block / 1e-4)
        truth = copy.deepcopy(layer).double()(x.double()).flatten(1)
        total = layer.bias.expand(len(x), -1)
        for i in range(0, n, block):  # a block's sum is exact to its own last digits
            total = total + (x[:, i : i + block].flatten(1).double() @ layer.weight.flatten(1)[:, i : i + block].double().T).float()
        for made in (total, layer(x).flatten(1)):
            error = float((made.double() - truth).norm(dim=-1).max())
            errors.append(error)
            size = torch.linalg.vector_norm(x[:1].double().flatten(1), dim=-1)
            before = State(size, 0 * size, 0 * size, "l2", 1, n, (n, 1, 1) if kind == "conv" else None)
            assert error <= float(rule_for(layer).step(layer, before, Context(torch.float32, {})).rounding)
            start = x[:1].double().flatten(1).unsqueeze(1)
            scope = Scope(Context(torch.float32, {}), whole=(n, 1, 1) if kind == "conv" else None)
            expansion = ChainExpansion([copy.deepcopy(layer).double()], start, scope)
            assert error <= float(expansion.advance(Ball.of(torch.zeros(1, 1, dtype=torch.float64))).radius.max())
    assert max(errors) > 1000 * 2.0**-24 * out**0.5
