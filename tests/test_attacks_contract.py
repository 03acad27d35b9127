"""The contract that every attack inherits, and exact radii where the smallest one is known in closed form."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from robustlip.attacks import PGD, Attack, MinimumRadius, WeightAttack, by_name, observed_sensitivity
from robustlip.attacks.weight_space import matrices_of, polar
from robustlip.errors import BadInput, RobustlipError, UnsupportedLayer
from robustlip.layers import AddPositions, Attention, Chain, MeanTokens, Patchify, Residual, ScaledGELU
from robustlip.threats import EmbeddingBall, InputBall, Threat, WeightBall, with_radius

torch.set_num_threads(1)
N, CLASSES = 8, 5


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, CLASSES)).to(dtype)


def transformer(dtype: torch.dtype = torch.float32) -> Chain:
    torch.manual_seed(0)
    block = [Residual.convex(Attention(8, 2, causal=False), 0.5), Residual(nn.Sequential(nn.Linear(8, 16), ScaledGELU(), nn.Linear(16, 8)))]
    model = Chain(Patchify(2), nn.Linear(4, 8), AddPositions(4, 8), *block, MeanTokens(), nn.Linear(8, CLASSES))
    model.embedding_depth = 3
    return model.to(dtype)


def samples(model: nn.Module, dtype: torch.dtype = torch.float32, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [0, 1]; the label is the prediction, but for sample 1, which is misclassified."""
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(dtype)
    training = model.training
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    model.train(training)
    y[1] = (y[1] + 1) % CLASSES
    return x, y


def numpy_norm(threat: Threat, model: nn.Module, change: object, group: np.ndarray) -> np.ndarray:
    """The norm of a change, by numpy alone."""
    if isinstance(threat, WeightBall):
        assert isinstance(change, dict)
        worst = np.zeros(len(group))
        for name, parameter in matrices_of(model).items():
            weight = parameter.detach().double().numpy().reshape(len(parameter), -1)
            size = np.array([np.linalg.norm(e.reshape(weight.shape), 2 if threat.norm == "spectral" else "fro") for e in change[name].numpy()])
            worst = np.maximum(worst, (size / np.linalg.norm(weight, 2) if threat.relative else size)[group])
        return worst
    assert isinstance(change, np.ndarray)
    if isinstance(threat, EmbeddingBall):
        kept = threat.positions(change.shape[1])
        assert not np.delete(change, kept, axis=1).any()
        tokens = np.sqrt((change**2).sum(-1))
        return np.sqrt((tokens**2).sum(1)) if threat.joint else tokens.max(1)
    flat = change.reshape(len(change), -1)
    return np.linalg.norm(flat, {"l1": 1, "l2": 2, "linf": np.inf}[threat.norm], axis=1)


class Breaking(nn.Module):
    """Raises on its n-th call."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.calls = after, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        torch.rand(3), np.random.rand(), random.random()
        if self.calls > self.after:
            raise RuntimeError("the forward pass broke")
        return x


def state_of(model: nn.Module) -> tuple[object, ...]:
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        [t.detach().numpy().tobytes() for t in [*model.parameters(), *model.buffers()]],
        torch.get_rng_state().numpy().tobytes(),
        np.random.get_state()[1].tobytes(),
        random.getstate(),
    )


class AttackContract:
    """Inherit from this class, set `threat` (with a radius), and construct the attack and its model."""

    threat: Threat = InputBall("l2", 0.3)

    def attack(self) -> Attack:
        raise NotImplementedError

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return transformer(dtype) if isinstance(self.threat, EmbeddingBall) else mlp(dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_every_point_is_inside_and_judged_again(self, dtype: torch.dtype) -> None:
        model = self.model(dtype)
        x, y = samples(model, dtype)
        seen = self.attack()(model, x, y, self.threat)
        assert seen.dtype == str(dtype).removeprefix("torch.")
        model.eval()
        points = seen.adversarial
        if isinstance(points, dict):
            norms = numpy_norm(self.threat, model, points, seen.group)
            found = []
            weights = {n: p.detach() for n, p in model.named_parameters()}
            for i, g in enumerate(seen.group):
                changed = {n: (weights[n].double() + points[n][g]).to(dtype) for n in points}
                found.append(int(torch.func.functional_call(model, {**weights, **changed}, (x[i : i + 1],)).argmax()))
        else:
            embedded = isinstance(self.threat, EmbeddingBall)
            clean = model.embed(x) if embedded else x
            assert points.dtype == dtype and points.shape == clean.shape
            norms = numpy_norm(self.threat, model, (points.double() - clean.double()).detach().numpy(), seen.group)
            if isinstance(self.threat, InputBall) and self.threat.clip is not None:
                assert points.min() >= self.threat.clip[0] and points.max() <= self.threat.clip[1]
            found = (model.scores_from_embeddings(points) if embedded else model(points)).argmax(1).tolist()
        assert (norms <= self.threat.radius * (1 + 1e-12)).all()
        assert (seen.distance <= self.threat.radius).all()
        np.testing.assert_allclose(seen.distance, norms, rtol=1e-9, atol=1e-12)
        assert seen.adversarial_prediction.tolist() == found
        assert (seen.success == (np.array(found) != y.numpy())).all()
        assert (seen.radius[seen.success] == seen.distance[seen.success]).all() and np.isinf(seen.radius[~seen.success]).all()
        assert seen.success.sum() > 1, "the contract's model is meant to be broken at this radius"

    def test_a_misclassified_sample_has_radius_zero(self) -> None:
        model = self.model()
        seen = self.attack()(model, *samples(model), self.threat, index=np.arange(N) + 100, weights_sha256="ab")
        assert seen.success[1] and seen.radius[1] == 0 and seen.distance[1] == 0 and seen.status[1] == "misclassified"
        record = json.loads(json.dumps(seen.to_json_dict(), allow_nan=False))
        assert record["samples"][1]["status"] == "misclassified" and record["samples"][0]["index"] == 100
        assert {s["status"] for s in record["samples"]} <= {"broken", "withstood", "misclassified"}
        assert all((s["radius"] is None) == (s["status"] == "withstood") for s in record["samples"])
        assert record["weights_sha256"] == "ab" and record["threat"] == self.threat.name

    @pytest.mark.parametrize("after", [None, 0, 1, 3])
    def test_everything_comes_back_also_after_an_error(self, after: int | None) -> None:
        model = self.model()
        x, y = samples(model)
        model.train()
        next(model.children()).eval()  # a mixed state, as fine-tuning has it
        model.append(Breaking(10**9 if after is None else after))
        next(model.parameters()).requires_grad_(False)
        before = state_of(model)
        if after is None:
            self.attack()(model, x, y, self.threat)
        else:
            # At its first input: a model that does not take the data.
            with pytest.raises(BadInput if after == 0 else RuntimeError, match="broke"):
                self.attack()(model, x, y, self.threat)
        assert state_of(model) == before

    def test_the_generator_decides(self) -> None:
        model = self.model()
        x, y = samples(model)
        first, second = (self.attack()(model, x, y, self.threat, generator=torch.Generator().manual_seed(7)) for _ in range(2))
        assert first.seed == 7 and (first.distance == second.distance).all() and (first.success == second.success).all()

    def test_one_by_one_is_the_same_contract(self) -> None:
        model = self.model()
        x, y = samples(model)
        batch = self.attack()(model, x, y, self.threat)
        for i in range(3):
            one = self.attack()(model, x[i : i + 1], y[i : i + 1], self.threat)
            assert one.prediction[0] == batch.prediction[i] and one.distance[0] <= self.threat.radius
            assert one.success[0] == batch.success[i]

    def test_bad_input_is_refused_in_whole_sentences(self) -> None:
        model, attack = self.model(), self.attack()
        x, y = samples(model)
        with pytest.raises(BadInput, match=r"expected labels in \[0, 4\], got 5"):
            attack(model, x, torch.full_like(y, CLASSES), self.threat)
        with pytest.raises(BadInput, match="expected labels as an integer tensor"):
            attack(model, x, y.float(), self.threat)
        bad = x.clone()
        bad[2, 0, 0, 0] = torch.nan
        with pytest.raises(BadInput, match="expected finite inputs, got NaN or infinity in sample 2"):
            attack(model, bad, y, self.threat)
        if attack.needs_radius:
            with pytest.raises(BadInput, match="expected a threat with a radius"):
                attack(model, x, y, with_radius(self.threat, None))
        for radius in (0.0, -1.0, float("nan")):
            with pytest.raises(BadInput, match="radius above 0"):
                attack(model, x, y, with_radius(self.threat, radius))
        with torch.no_grad():
            next(model.parameters())[0] = torch.nan
        with pytest.raises(BadInput, match="expected finite weights, got NaN or infinity in"):
            attack(model, x, y, self.threat)


class TestPGDl2(AttackContract):
    threat = InputBall("l2", 0.6)

    def attack(self) -> Attack:
        return PGD(steps=10)


class TestPGDlinf(TestPGDl2):
    threat = InputBall("linf", 0.1, clip=(0.0, 1.0))


class TestPGDl1(TestPGDl2):
    threat = InputBall("l1", 1.5, clip=(0.0, 1.0))


class TestPGDEmbedding(TestPGDl2):
    threat = EmbeddingBall(3.0)


class TestPGDOneToken(TestPGDl2):
    threat = EmbeddingBall(6.0, tokens=(-1, 0))


class TestPGDJoint(TestPGDl2):
    threat = EmbeddingBall(6.0, joint=True)

    def attack(self) -> Attack:
        return PGD(steps=10, momentum=0.5, schedule="linear")


class TestPGDWeights(TestPGDl2):
    threat = WeightBall("spectral", 0.1)


class TestMinimum(AttackContract):
    threat = InputBall("l2", 0.6)

    def attack(self) -> Attack:
        return MinimumRadius(attack=PGD(steps=8, restarts=1), steps=2, descent=20)


class TestMinimumClipped(TestMinimum):
    threat = InputBall("l1", 2.0, clip=(0.0, 1.0))


class TestMinimumEmbedding(TestMinimum):
    threat = EmbeddingBall(4.0)


class TestMinimumWeights(TestMinimum):
    threat = WeightBall("frobenius", 0.2)


class TestWeights(AttackContract):
    threat = WeightBall("spectral", 0.1)

    def attack(self) -> Attack:
        return WeightAttack(steps=10)


class TestSharedWeights(TestWeights):
    threat = WeightBall("frobenius", 0.4, relative=False)

    def attack(self) -> Attack:
        return WeightAttack(steps=10, groups=3)

    def test_one_by_one_is_the_same_contract(self) -> None:
        pytest.skip("a shared change is weaker than one of a sample's own, by design")


class TestSharedMinimumWeights(TestSharedWeights):
    def attack(self) -> Attack:
        return MinimumRadius(attack=PGD(steps=8), groups=2)


class TorchattacksContract(AttackContract):
    name, options = "", {}

    def attack(self) -> Attack:
        pytest.importorskip("torchattacks")
        return by_name(self.name, **self.options)


class TestTorchattacksPGD(TorchattacksContract):
    threat, name, options = InputBall("linf", 0.15, clip=(0.0, 1.0)), "torchattacks-pgd", {"steps": 10}


class TestTorchattacksPGDL2(TorchattacksContract):
    threat, name, options = InputBall("l2", 0.6, clip=(0.0, 1.0)), "torchattacks-pgdl2", {"steps": 10}


class TestAutoAttack(TorchattacksContract):
    threat, name, options = InputBall("linf", 0.15, clip=(0.0, 1.0)), "autoattack", {"version": "rand"}


# ---- whatever an attack returns


class Liar(Attack):
    name = "liar"

    def __init__(self, propose: object) -> None:
        self.propose = propose

    def _run(self, space, labels, radius, generator):  # type: ignore[no-untyped-def]
        for parameter in space.model.module.parameters():
            parameter.data.mul_(2)
            parameter.requires_grad_(True)
        space.model.module.train()
        torch.manual_seed(3)
        delta = self.propose(space)  # type: ignore[operator]
        for parameter in space.model.module.parameters():
            parameter.data.div_(2)
        space.model.module.eval()
        return delta


@pytest.mark.parametrize("threat", [InputBall(n, 1e-3) for n in ("l1", "l2", "linf")] + [WeightBall("spectral", 1e-6)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_far_point_is_brought_inside(threat: Threat, offset: float) -> None:
    # At 1000, an ulp of float32 is a sixteenth of the radius: rounding to nearest would leave the ball.
    model = mlp()
    x, _ = samples(model)
    x = x + offset
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    seen = Liar(lambda space: torch.randn(space.clean.shape) * 1e6)(model, x, y, threat)
    change = seen.adversarial if isinstance(seen.adversarial, dict) else (seen.adversarial.double() - x.double()).numpy()
    norms = numpy_norm(threat, model, change, seen.group)
    assert (norms <= threat.radius).all() and (seen.distance <= threat.radius).all()
    np.testing.assert_allclose(seen.distance, norms, rtol=1e-9, atol=1e-15)
    if offset == 0 or isinstance(threat, WeightBall):
        assert (norms > 0.5 * threat.radius).all(), "brought to the border, not to the centre"


def test_a_perturbation_that_is_not_finite_is_the_failure_of_its_sample() -> None:
    model = mlp()
    x, y = samples(model)

    def broken(space):  # type: ignore[no-untyped-def]
        delta = torch.full_like(space.clean, 0.6)
        delta[3] = torch.inf
        return delta

    before = state_of(model)
    seen = Liar(broken)(model, x, y, InputBall("l2", 2.4))
    assert state_of(model) == before
    # Sample 1 is misclassified and never reaches the attack.
    assert [i for i, why in enumerate(seen.failure) if why] == [4] and "finite perturbation from the attack 'liar'" in seen.failure[4]
    assert seen.status[4] == "not finite" and not seen.success[4] and np.isinf(seen.radius[4]) and seen.distance[4] == 0
    others = Liar(lambda space: torch.full_like(space.clean, 0.6))(model, x, y, InputBall("l2", 2.4))
    rest = np.arange(N) != 4
    assert (seen.success == others.success)[rest].all() and (seen.radius == others.radius)[rest].all()


class Overflow(nn.Module):
    """NaN for the samples that were moved far out of the box [0, 1]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where((x - x.detach().clamp(0, 1)).abs().sum(1, keepdim=True) > 0.1, torch.nan, x)


def overflowing() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), Overflow(), nn.Linear(16, CLASSES))


def test_logits_that_are_not_finite_are_no_success_and_not_the_end_of_the_batch() -> None:
    model = overflowing()
    x, y = samples(model)

    def some(space):  # type: ignore[no-untyped-def]
        delta = torch.full_like(space.clean, 5.0)
        delta[::2] = 0.0
        return delta

    seen = Liar(some)(model, x, y, InputBall("linf", 5.0))
    assert seen.status == ("withstood", "misclassified", *["not finite", "withstood"] * 3)
    assert not seen.success[seen.failed].any() and np.isinf(seen.radius[seen.failed]).all() and (seen.adversarial_prediction[seen.failed] == -1).all()
    assert seen.robust_accuracy() == 4 / N, "what is not finite is not robust"
    rows = json.loads(json.dumps(seen.to_json_dict(), allow_nan=False))["samples"]
    assert "at distance 5" in rows[2]["failure"] and rows[2]["status"] == "not finite" and "failure" not in rows[0]


@pytest.mark.parametrize("name", ["pgd", "min"])
def test_a_clean_point_without_finite_logits_is_one_failure_and_the_others_are_attacked(name: str) -> None:
    model = overflowing()
    x, y = samples(model)
    threat = InputBall("l2", 0.5, None)
    wrong = y.clone()
    wrong[2] = (y[2] + 1) % CLASSES  # not attacked, as a point without logits
    alone = by_name(name)(model, x, wrong, threat)
    bad = x.clone()
    bad[2] += 3
    seen = by_name(name)(model, bad, y, threat)
    assert seen.status[2] == "not finite" and seen.prediction[2] == -1 and "clean point" in seen.failure[2] and np.isinf(seen.radius[2])
    rest = np.arange(N) != 2
    assert (seen.success == alone.success)[rest].all() and seen.success[rest].sum() > 1
    with pytest.raises(RobustlipError, match="finite logits at the clean points, got NaN or infinity for all"):
        by_name(name)(model, x + 3, y, threat)


class TwoFaced(nn.Module):
    """A model whose prediction differs while gradients are enabled, so that a search and a forward pass disagree."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x if x.requires_grad else x


def test_success_is_what_a_clean_forward_pass_says() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES), TwoFaced())
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
        model[1].bias.copy_(torch.arange(CLASSES))
    x, _ = samples(model)
    y = torch.full((N,), CLASSES - 1)
    assert not PGD(steps=4)(model, x, y, InputBall("l2", 0.1)).success.any()
    assert not MinimumRadius(steps=1, descent=4)(model, x, y, InputBall("l2", 0.1)).success.any()


def test_call_is_final() -> None:
    with pytest.raises(TypeError, match="final"):
        type("Sly", (PGD,), {"__call__": lambda self: None})


# ---- ground truth: linear models


def linear(dtype: torch.dtype, dims: int = 20, classes: int = 7) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """Model, x, y, margins (N, C) and weight differences (N, C, d); labels are predictions, margins clear of rounding."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(dims, classes)).to(dtype)
    x = torch.rand(60, dims).to(dtype)
    y = model(x).argmax(1)
    weight, bias = (p.detach().double().numpy() for p in model[0].parameters())
    logits = x.double().numpy() @ weight.T + bias
    margins = logits[np.arange(60), y.numpy()][:, None] - logits
    margins[np.arange(60), y.numpy()] = np.inf
    clear = margins.min(1) > 2e-3
    return model, x[clear], y[clear], margins[clear], (weight[y.numpy()][:, None] - weight[None])[clear]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("norm", "dual", "within"), [("l2", 2, 1.01), ("linf", 1, 1.01), ("l1", np.inf, 1.03)])
def test_smallest_input_radius_of_a_linear_model(norm: str, dual: float, within: float, dtype: torch.dtype) -> None:
    model, x, y, margins, rows = linear(dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        truth = np.nanmin(margins / np.linalg.norm(rows, dual, axis=2), axis=1)
    seen = by_name("min")(model, x, y, InputBall(norm))  # type: ignore[arg-type]
    assert seen.success.all()
    assert (seen.radius >= truth * (1 - 1e-5)).all() and (seen.radius <= truth * within).all()
    radius = float(np.median(truth)) * 1.001
    assert (PGD()(model, x, y, InputBall(norm, radius)).success == (truth <= radius)).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("threat", [EmbeddingBall(), EmbeddingBall(tokens=(1, -1)), EmbeddingBall(joint=True)], ids=lambda t: t.name)
def test_smallest_embedding_radius_of_a_linear_model(threat: EmbeddingBall) -> None:
    torch.manual_seed(3)
    model = Chain(Patchify(2), nn.Linear(4, 6), nn.Flatten(), nn.Linear(24, CLASSES)).double()
    model.embedding_depth = 2
    x = torch.rand(20, 1, 4, 4, dtype=torch.float64)
    logits = model(x).detach()
    y = logits.argmax(1)
    rows = (model[3].weight[y][:, None] - model[3].weight[None]).detach().unflatten(-1, (4, 6))[:, :, threat.positions(4)]
    tokens = rows.norm(dim=-1)
    gain = tokens.square().sum(-1).sqrt() if threat.joint else tokens.sum(-1)
    margins = (logits.gather(1, y[:, None]) - logits).scatter(1, y[:, None], torch.inf)
    truth = (margins / gain.clamp_min(1e-30)).amin(1).numpy()
    radius = by_name("min")(model, x, y, threat).radius
    assert (radius >= truth * (1 - 1e-9)).all() and (radius <= truth * 1.01).all()


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
@pytest.mark.parametrize("relative", [True, False])
def test_smallest_weight_radius_of_a_linear_model(norm: str, relative: bool) -> None:
    # The margin changes by (e_y − e_j)ᵀ E x, at most √2·‖x‖·‖E‖, and E of rank one attains it in both norms.
    model, x, y, margins, _ = linear(torch.float32)
    sigma = np.linalg.norm(model[0].weight.detach().double().numpy(), 2) if relative else 1.0
    truth = margins.min(1) / (np.sqrt(2) * x.double().norm(dim=1).numpy() * sigma)
    radius = by_name("min")(model, x, y, WeightBall(norm, relative=relative)).radius  # type: ignore[arg-type]
    assert (radius >= truth * (1 - 1e-4)).all() and (radius <= truth * 1.01).all()


def test_a_radius_limits_the_search() -> None:
    model, x, y, margins, rows = linear(torch.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        truth = np.nanmin(margins / np.linalg.norm(rows, 2, axis=2), axis=1)
    limit = float(np.median(truth)) * 1.001
    seen = MinimumRadius()(model, x, y, InputBall("l2", limit))
    assert (seen.success == (truth <= limit)).all() and (seen.distance <= limit).all()


def test_scaling_the_logits_changes_nothing() -> None:
    model = mlp()
    x, y = samples(model)
    small = by_name("min")(model, x, y, InputBall("l2"))
    with torch.no_grad():
        model[-1].weight.mul_(1024), model[-1].bias.mul_(1024)  # type: ignore[operator]
    np.testing.assert_allclose(by_name("min")(model, x, y, InputBall("l2")).radius, small.radius, rtol=0.02)


def test_polar_of_low_and_full_rank() -> None:
    torch.manual_seed(0)
    for rank in (1, 5, 40):
        grad = torch.randn(3, 50, rank, dtype=torch.float64) @ torch.randn(3, rank, 40, dtype=torch.float64)
        step = polar(grad)
        assert torch.linalg.matrix_norm(step, 2).max() <= 1 + 1e-9
        torch.testing.assert_close((grad * step).sum((-2, -1)), torch.linalg.matrix_norm(grad, "nuc"), rtol=1e-6, atol=0)
    assert not polar(torch.zeros(2, 50, 40)).any()


# ---- observed sensitivity


@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("l1", 1)])
def test_sensitivity_of_a_linear_model(norm: str, order: int) -> None:
    model = linear(torch.float32)[0]
    weight = model[0].weight.detach().double().numpy()
    truth = np.linalg.norm(weight, 2) if norm == "l2" else np.linalg.norm(weight, axis=0).max()
    seen = observed_sensitivity(model, torch.rand(5, 20), InputBall(norm, 0.5), power_steps=40)  # type: ignore[arg-type]
    assert truth * 0.97 <= seen.largest <= truth * (1 + 1e-9)
    np.testing.assert_allclose(seen.change, seen.ratio * seen.distance)


def test_sensitivity_to_weights_of_a_linear_model_is_the_length_of_the_input() -> None:
    model, x, *_ = linear(torch.float32)
    seen = observed_sensitivity(model, x[:5], WeightBall("spectral", 0.1, relative=False))
    np.testing.assert_allclose(seen.ratio, x[:5].double().norm(dim=1).numpy(), rtol=1e-3)


@pytest.mark.parametrize("radius", [None, 0.3])
def test_sensitivity_of_a_transformer_is_measured_inside_its_ball_and_changes_nothing(radius: float | None) -> None:
    model, threat = transformer(), EmbeddingBall(radius, tokens=(2,))
    before = state_of(model)
    x, _ = samples(model)
    seen = observed_sensitivity(model, x, threat)
    assert state_of(model) == before and (seen.ratio > 0).all()
    np.testing.assert_allclose(numpy_norm(threat, model, seen.witness.numpy(), np.arange(N)), seen.distance, rtol=1e-9)
    assert radius is None or seen.distance.max() <= radius


# ---- names and refusals


def test_names() -> None:
    assert isinstance(by_name("pgd", steps=3), PGD) and isinstance(by_name("min"), MinimumRadius)
    with pytest.raises(BadInput, match="expected an attack among pgd, min, weights"):
        by_name("fgsm")
    with pytest.raises(BadInput, match="options"):
        by_name("pgd", step=3)
    with pytest.raises(BadInput, match="schedule"):
        replace(PGD(), schedule="square")


def test_threats_that_do_not_fit_the_model_are_refused() -> None:
    model = mlp()
    x, y = samples(model)
    with pytest.raises(BadInput, match="embedding"):
        PGD()(model, x, y, EmbeddingBall(0.1))
    with pytest.raises(BadInput, match="'pgd' for it"):
        WeightAttack()(model, x, y, InputBall("l2", 0.1))
    with pytest.raises(BadInput, match="within clip"):
        PGD()(model, x * 2, y, InputBall("l2", 0.1, clip=(0.0, 1.0)))
    with pytest.raises(BadInput, match="hold exactly"):
        PGD()(model, x.double() + 1e-9, y, InputBall("l2", 1e-8))
    with pytest.raises(UnsupportedLayer, match="MultiheadAttention"):
        matrices_of(nn.MultiheadAttention(4, 1))
    tokens = Chain(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(18, CLASSES))
    with pytest.raises(BadInput, match="floating-point inputs"):
        PGD()(tokens, torch.randint(11, (N, 3)), y, InputBall("l2", 0.1))


def test_next_token_models_of_integers() -> None:
    torch.manual_seed(0)
    model = Chain(nn.Embedding(11, 8), Residual.convex(Attention(8, 2), 0.5), nn.Linear(8, 11))
    model.embedding_depth, model.task = 1, "next-token"
    x = torch.randint(11, (6, 4))
    y = model.scores(x).argmax(1)
    for threat in (EmbeddingBall(), EmbeddingBall(tokens=(-1,)), WeightBall()):
        seen = by_name("min")(model, x, y, threat)
        assert seen.success.all() and (seen.radius > 0).all()


def test_torchattacks_refusals() -> None:
    pytest.importorskip("torchattacks")
    model = mlp()
    x, y = samples(model)
    box = (0.0, 1.0)
    for clip in (None, (0.0, 2.0)):  # one box per command: it would quietly be another one
        with pytest.raises(BadInput, match=r"expected a threat with the box \[0, 1\] for '.*', whose points never leave it, got .*; give --clip 0,1"):
            by_name("autoattack")(model, x, y, InputBall("linf", 0.1, clip=clip))
    with pytest.raises(BadInput, match="within clip"):
        by_name("torchattacks-pgdl2")(model, x - 0.5, y, InputBall("l2", 0.1, box))
    with pytest.raises(BadInput, match="expected an input threat linf"):
        by_name("torchattacks-pgd")(model, x, y, InputBall("l2", 0.1, box))
    with pytest.raises(BadInput, match="5 × 5"):
        by_name("autoattack")(model, x, y, InputBall("l2", 0.1, box))
    with pytest.raises(BadInput, match="the threat and the model set them"):
        by_name("autoattack", eps=0.1)
    with pytest.raises(BadInput, match=r"options that torchattacks\.PGD has"):
        by_name("torchattacks-pgd", step=3)(model, x, y, InputBall("linf", 0.1, box))


def test_without_torchattacks_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchattacks", None)
    model = mlp()
    x, y = samples(model)
    with pytest.raises(BadInput, match=r"--no-deps torchattacks==3\.5\.1"):
        by_name("torchattacks-pgd")(model, x, y, InputBall("linf", 0.1, (0.0, 1.0)))
