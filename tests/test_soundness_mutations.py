"""Tests for single lines of the rules that no other test covers; benchmarks/mutations.py breaks these lines one by one."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import robustlip
from robustlip import certifiers
from robustlip.certifiers import certify
from robustlip.domains.norms import Context, State, rule_for
from robustlip.domains.norms import bound as lipschitz
from robustlip.domains.norms import state as rules
from robustlip.domains.norms.attention import Heads
from robustlip.domains.search import largest_radius
from robustlip.layers import Attention, Normalize, ScaledGELU
from robustlip.models import LipschitzGPT
from robustlip.numerics.spectral import spectral_norm_bound
from robustlip.threats import EmbeddingBall, InputBall, WeightBall

ONE = torch.ones(1, dtype=torch.float64)


def state(norm: float, change: float, tokens: int, width: int, rounding: float = 0.0) -> State:
    return State(norm * ONE, change * ONE, rounding * ONE, "l2", tokens, width)


def hostile(n: int, m: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(W, a, b): σ(W) = 1.02 along a bᵀ, where b is orthogonal to the vector that power iteration starts from; the rest of W has norm 1."""
    m = m or n
    start = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right, _ = torch.linalg.qr(torch.cat([start, torch.randn(n, n - 1, dtype=torch.float64)], 1))
    left, _ = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))
    k = min(m, n)
    sizes = torch.ones(k, dtype=torch.float64)
    sizes[k - 1] = 1.02
    return (left[:, :k] * sizes) @ right[:, :k].T, left[:, k - 1], right[:, k - 1]


def test_power_iteration_would_be_fooled_and_linear_layers_are_not() -> None:
    w, a, b = hostile(6)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(w)
        model[1].weight.copy_(torch.stack([a, -a]))
        model[1].bias.copy_(torch.tensor([1.0, 0.0]))
    x = torch.zeros(1, 6, dtype=torch.float64)
    radius = float(certify(model, x, torch.tensor([0]), InputBall("l2"), dtype="real").radius[0])
    truth = 1.0 / (2 * 1.02)
    assert 0.999 * truth <= radius <= truth
    assert int(model(x - b * 1.001 * truth).argmax()) == 1


@pytest.mark.parametrize("heads", [1, 2])
def test_power_iteration_would_be_fooled_and_attention_is_not(heads) -> None:
    layer = Attention(8, heads).double()
    with torch.no_grad():
        for name in ("query", "key", "value"):
            getattr(layer, name).weight.copy_(torch.cat([hostile(8, 8 // heads)[0] for _ in range(heads)]))
        layer.output.weight.copy_(hostile(8)[0])
    norms = Heads.of(layer)
    for name in ("query", "key", "value"):
        assert float(getattr(norms, name).min()) >= 1.02 * (1 - 1e-12)
    assert norms.whole >= 1.02 * (1 - 1e-12) and norms.output_matrix.sigma >= 1.02 * (1 - 1e-12)


def test_nothing_that_certifies_names_power_iteration() -> None:
    folder = Path(robustlip.__file__).parent
    folders = ("domains", "certifiers", "ops")
    files = [*(file for name in folders for file in (folder / name).rglob("*.py")), folder / "verification.py", folder / "gate.py"]
    assert len(files) > 50
    for file in files:
        assert "spectral_norm_estimate" not in file.read_text(encoding="utf-8"), file.name


@pytest.mark.parametrize(
    "threat", [InputBall("l2"), InputBall("linf"), InputBall("l1"), EmbeddingBall(), EmbeddingBall(joint=True)], ids=lambda t: t.name
)
def test_domain_contains_the_perturbed_points(threat) -> None:
    """x moved along itself to the edge of its ball has the norm ‖x‖₂ + the ball's ℓ2 radius at that point: the first state must hold it."""
    embedding = isinstance(threat, EmbeddingBall)
    inside = torch.ones(1, 1, 4, dtype=torch.float64) if embedding else torch.ones(1, 4, dtype=torch.float64)
    radius = 3 * ONE
    step = {"linf": torch.full_like(inside, 3.0), "l1": torch.tensor([3.0, 0, 0, 0], dtype=torch.float64).expand_as(inside)}
    moved = inside + step.get(threat.norm, 1.5 * inside)
    first = lipschitz.first_state(inside, 2 * ONE, threat, radius)
    assert float(first.norm) >= float(moved.norm())


def test_domain_of_attention_is_enlarged_in_certificates(monkeypatch) -> None:
    """Every state before an attention layer contains, during certification, the clean norm and the tested radius."""
    seen = []
    rule = rule_for(Attention(4, 1))
    plain = type(rule).step

    def step(self, layer, before, context):
        seen.append((before.norm.clone(), before.change.clone()))
        return plain(self, layer, before, context)

    monkeypatch.setattr(type(rule), "step", step)
    model = LipschitzGPT("abcd", 4, 1, 1).eval()
    ids = torch.tensor([[0, 1], [2, 3]])
    certify(model, ids, model.scores(ids).argmax(-1), EmbeddingBall())
    clean = model.embed(ids).detach().double().norm(dim=-1).amax(-1)
    per_sample = [(norm, change) for norm, change in seen if len(norm) == 2]
    assert len(per_sample) >= 2
    for norm, change in per_sample:
        assert bool((norm >= clean + change).all())


def test_tightened_norms_keep_change_and_two_roundings() -> None:
    """Executed and perturbed, a token is off from the executed clean one by the change and a rounding on either side."""
    layer = nn.Identity()
    context = Context(torch.float32, {}, clean={id(layer): (True, 3 * ONE)})
    assert float(context.tighten(layer, state(100.0, 1.0, 2, 4, rounding=0.5)).norm) >= 3 + 1 + 2 * 0.5
    assert float(context.tighten(layer, state(100.0, 1.0, 2, 4)).norm) < 4.1
    assert float(context.tighten(layer, state(2.0, 1.0, 2, 4)).norm) == 2.0


class Noisy(nn.Module):
    """Rounds by the full bound of its rule: in favour of the label at the clean point, against it everywhere else."""

    clean, amount = 3.0, 0.5

    def forward(self, x):
        return x + torch.where(x == self.clean, self.amount, -self.amount)


class NoisyRule(rules.Rule):
    def step(self, layer, before, context):
        return State(before.norm + 0.5, before.change, before.rounding + 0.5, before.space, before.tokens, before.width, before.whole)


def test_rounding_counts_at_the_clean_point_and_at_the_perturbed_one(monkeypatch) -> None:
    monkeypatch.setitem(rules._RULES, Noisy, NoisyRule())
    model = nn.Sequential(nn.Linear(1, 1, bias=False), Noisy(), nn.Linear(1, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    x = torch.full((1, 1), 3.0, dtype=torch.float64)
    radius = float(certify(model, x, torch.tensor([0]), InputBall("l2")).radius[0])
    assert 2.49 < radius <= 2.5
    assert int(model(x - 2.51).argmax()) == 1


def test_rounding_happens_at_the_size_of_the_last_bias() -> None:
    """float16: at logits near 1024 the margin of 5.5 is rounding for the most part, and moving x to 0 makes a tie."""
    layer = nn.Linear(1, 2).half()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        layer.bias.fill_(1024.0)
    x = torch.full((1, 1), 2.6).half()
    assert int(layer(x).argmax()) == 1 and int(layer(0 * x).argmax()) == 0
    assert float(certify(nn.Sequential(layer), x, torch.tensor([1]), InputBall("l2")).radius[0]) < float(x)


def test_rounding_and_norm_of_biases_and_means_are_carried() -> None:
    linear = nn.Linear(1, 1)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.bias.fill_(5.0)
    assert float(rule_for(linear).step(linear, state(1.0, 0.0, 1, 1), Context(torch.float32, {})).norm) >= 6.0
    shift = Normalize(-5.0, 1.0)
    assert float(rule_for(shift).step(shift, state(1.0, 0.0, 1, 1), Context(torch.float32, {})).norm) >= 6.0


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_weight_balls_of_one_linear_layer_have_their_exact_radius(norm) -> None:
    """E = −ε (e_y − e_j) xᵀ/(√2‖x‖) has both norms ε and moves the margin by √2·ε‖x‖: no E moves it more."""
    torch.manual_seed(1)
    layer = nn.Linear(5, 2).double().requires_grad_(False)
    x = torch.randn(20, 5, dtype=torch.float64)
    logits = layer(x)
    y = logits.argmax(-1)
    margin = logits.gather(1, y[:, None])[:, 0] - logits.gather(1, 1 - y[:, None])[:, 0]
    truth = margin / (2**0.5 * x.norm(dim=-1))
    radius = torch.from_numpy(certify(nn.Sequential(layer), x, y, WeightBall(norm, relative=False), dtype="real").radius)
    assert bool((radius <= truth).all() and (radius >= 0.999 * truth).all())
    sign = torch.zeros(2, dtype=torch.float64)
    sign[y[0]], sign[1 - y[0]] = 1.0, -1.0
    layer.weight -= 1.001 * truth[0] * torch.outer(sign, x[0]) / (2**0.5 * x[0].norm())
    assert int(layer(x[:1]).argmax()) != int(y[0])


def test_perturbations_of_values_and_of_the_output_matrix_add_up() -> None:
    """One token, so no softmax: (1 + ε)·(1 + ε)·x is attained by E = εI in both matrices, and the bound must be that much exactly."""
    layer = Attention(2, 1, rope=False, output_scale=1.0).double().requires_grad_(False)
    for part in ("value", "output"):
        getattr(layer, part).weight.copy_(torch.eye(2))
    for part in ("query", "key"):
        getattr(layer, part).weight.zero_()
    context = Context(torch.float64, {}, weight_radius=0.5 * ONE, relative=True)
    change = float(rule_for(layer).step(layer, state(1.0, 0.0, 1, 2), context).change)
    assert 1.5**2 - 1 <= change <= (1.5**2 - 1) * (1 + 1e-9)


def test_scaled_gelu_is_divided_once() -> None:
    """At √2, where gelu' is largest, the layer's own slope is 1.1289042/1.1289: the bound must not be below it."""
    layer = ScaledGELU()
    x = torch.full((1,), 2**0.5, dtype=torch.float64)
    slope = float(layer(x + 1e-6) - layer(x - 1e-6)) / 2e-6
    assert slope > 1.0000030
    assert float(rule_for(layer).step(layer, state(9.0, 1.0, 1, 1), Context(torch.float64, {})).change) >= slope


def test_infinity_norm_of_a_change_is_not_its_l2_norm() -> None:
    before = State(9 * ONE, ONE, 0 * ONE, "linf", 1, 16)
    assert float(before.in_l2().change) >= 4.0


# ---- guards that stand behind each other, each tested alone


def test_nan_is_not_feasible() -> None:
    def evaluate(radius):
        return radius, torch.where(radius < 0.5, torch.ones_like(radius), torch.full_like(radius, torch.nan))

    radius, _ = largest_radius(evaluate, 1e-9 * ONE)
    assert float(radius) < 0.5
    radius, _ = largest_radius(lambda r: (r, torch.full_like(r, torch.nan)), 1e-9 * ONE)
    assert float(radius) == 0.0


def test_ties_and_nan_margins_get_no_radius_whatever_the_search_says(monkeypatch) -> None:
    monkeypatch.setattr(lipschitz, "largest_radius", lambda evaluate, start: (torch.ones_like(start), torch.ones_like(start)))
    layer = nn.Linear(2, 2).double()
    chain = robustlip.layers.Chain(layer)
    logits = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, torch.nan]], dtype=torch.float64)
    x, y = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    radius, _ = lipschitz.global_radii(chain, x, y, logits, InputBall("l2"), Context(torch.float64, {}))
    assert radius.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_logits_that_are_not_finite_get_no_radius_whatever_the_method_says(monkeypatch) -> None:
    ones = lambda chain, x, *rest: (torch.ones(len(x), dtype=torch.float64),) * 2  # noqa: E731
    monkeypatch.setitem(certifiers.METHODS, "global", replace(certifiers.METHODS["global"], radii=ones))
    layer = nn.Linear(1, 2, bias=False).half()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[30000.0], [1.0]]))
    x = torch.tensor([[1.0], [30.0]]).half()
    assert certify(nn.Sequential(layer), x, torch.tensor([0, 0]), InputBall("l2")).radius.tolist() == [1.0, 0.0]


def test_cast_of_the_given_point_is_taken_off(monkeypatch) -> None:
    """In float16 0.3 is rounded to about 0.2998: the rounding of the given point is subtracted from the radius."""
    ones = lambda chain, x, *rest: (torch.ones(len(x), dtype=torch.float64),) * 2  # noqa: E731
    monkeypatch.setitem(certifiers.METHODS, "global", replace(certifiers.METHODS["global"], radii=ones))
    layer = nn.Linear(1, 2).half()
    x = torch.tensor([[0.3]], dtype=torch.float64)
    y = layer(x.half()).argmax(-1)
    moved = float((x - x.half().double()).abs())
    assert moved > 1e-5
    assert float(certify(nn.Sequential(layer), x, y, InputBall("l2")).radius[0]) <= 1 - moved


@pytest.mark.parametrize("change", [lambda r: r * r, lambda r: r * (1 + 50 * r), torch.expm1, lambda r: torch.where(r < 0.3, r, 9 * r)])
def test_search_returns_what_was_evaluated_as_feasible(change) -> None:
    radius, at = largest_radius(lambda r: (change(r), torch.full_like(r, 0.7)), 1e-9 * torch.ones(3, dtype=torch.float64))
    assert bool((change(radius) < 0.7).all() and (change(radius * 1.01) >= 0.7).all())
    torch.testing.assert_close(at, change(radius))


@pytest.mark.parametrize("spoil", [lambda v, q: (0.8 * v, q), lambda v, q: (v, q + 0.05), lambda v, q: (v.flip(-1), q), lambda v, q: (0 * v, 0 * q)])
def test_norms_hold_whatever_the_eigensolver_answers(spoil, monkeypatch) -> None:
    weight = torch.randn(5, 7, dtype=torch.float64)
    truth = float(torch.linalg.matrix_norm(weight, 2))
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: spoil(*eigh(gram)))
    assert float(spectral_norm_bound(weight)) >= truth * (1 - 1e-12)


def test_every_mutation_still_has_its_line() -> None:
    """A run of all mutations takes a quarter of an hour; this test finds a moved line at once."""
    root = Path(__file__).parent.parent
    found = runpy.run_path(str(root / "benchmarks" / "mutations.py"))["MUTATIONS"]
    assert len(found) > 100
    moved = [m.what for m in found if (root / m.file).read_text(encoding="utf-8").count(m.old) != 1 or m.old == m.new]
    assert not moved
