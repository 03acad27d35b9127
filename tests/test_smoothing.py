"""Randomized smoothing compared with exact results: binomials, and linear classifiers, whose smoothed probabilities have a closed form."""

from __future__ import annotations

import copy
import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from robustlip.certificates import Certificate
from robustlip.certifiers import smoothing
from robustlip.certifiers.smoothing import NO_CLASS, SMOOTHED, SmoothedCertificate, certify_smoothed, clopper_pearson_lower, predict_smoothed
from robustlip.errors import BadInput
from robustlip.layers import Chain, Normalize
from robustlip.models import LipschitzMLP
from robustlip.target import Target
from robustlip.threats import InputBall


def at_distance(distance: float, dims: int = 2, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """A linear model of two classes, and a sample of class 0 that far from the boundary: P(class 0) = Φ(distance/σ), g's radius = distance."""
    layer = nn.Linear(dims, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([torch.full((1, dims), 3.0), torch.full((1, dims), -2.0)]))
        layer.bias.zero_()
    x = torch.full((1, dims), distance / dims**0.5, dtype=torch.float64)
    return nn.Sequential(layer.to(dtype)).eval(), x, torch.tensor([0])


# ---- Clopper-Pearson


def tail(successes: int, draws: int, p: float) -> Fraction:
    """P(Binomial(draws, p) ≥ successes), exactly."""
    q = Fraction(p)
    return sum((math.comb(draws, k) * q**k * (1 - q) ** (draws - k) for k in range(successes, draws + 1)), Fraction(0))


@pytest.mark.parametrize("draws", [1, 2, 7, 40])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.5])
def test_clopper_pearson_is_the_largest_p_that_exact_binomials_allow(draws, alpha) -> None:
    for successes in range(draws + 1):
        p = clopper_pearson_lower(successes, draws, alpha)
        assert 0 <= p <= successes / draws
        if successes:
            assert tail(successes, draws, p) <= Fraction(alpha)
            assert tail(successes, draws, p * (1 + 1e-9)) > Fraction(alpha)


@pytest.mark.parametrize(("successes", "draws"), [(990, 1000), (99_999, 100_000), (100_000, 100_000), (50_300, 100_000), (1, 100_000)])
def test_clopper_pearson_agrees_with_scipy(successes, draws) -> None:
    for alpha in (0.001, 0.01, 0.2):
        interval = stats.binomtest(successes, draws, alternative="greater").proportion_ci(1 - alpha, "exact")
        p = clopper_pearson_lower(successes, draws, alpha)
        assert p == pytest.approx(interval.low, rel=1e-6)
    assert clopper_pearson_lower(draws, draws, 0.01) == pytest.approx(0.01 ** (1 / draws), rel=1e-9)


def test_a_quantile_that_is_too_large_is_not_believed(monkeypatch) -> None:
    """The bound rests on the tail that is computed anew, not on scipy's inverse of it."""
    quantile = stats.beta.ppf
    for lie in (1.0001, 1.005, 1.2):
        monkeypatch.setattr(stats.beta, "ppf", lambda *args, lie=lie: min(1.0, lie * quantile(*args)))
        for successes in (1, 20, 35, 40):
            assert tail(successes, 40, clopper_pearson_lower(successes, 40, 0.01)) <= Fraction(0.01)


@pytest.mark.parametrize(("successes", "draws", "alpha"), [(3, 2, 0.1), (-1, 2, 0.1), (0, 0, 0.1), (1, 2, 0.0), (1, 2, 1.0)])
def test_counts_that_cannot_be_are_refused(successes, draws, alpha) -> None:
    with pytest.raises(BadInput, match="successes"):
        clopper_pearson_lower(successes, draws, alpha)


# ---- the linear model, where everything is known


@pytest.mark.parametrize("sigma", [0.25, 1.0])
@pytest.mark.parametrize("kind", ["plain", "normalized", "float64"])
def test_radii_approach_the_distance_to_the_boundary(sigma, kind) -> None:
    """σ is in raw input units, before any normalisation: the closed form holds for a normalised model with the same boundary."""
    model, x, y = at_distance(0.6 * sigma, dims=3, dtype=torch.float64 if kind == "float64" else torch.float32)
    if kind == "normalized":
        shifted = copy.deepcopy(model[0])
        with torch.no_grad():
            shifted.bias.copy_(0.5 / 0.1 * shifted.weight.sum(1))  # undoes the mean: the boundary stays where it was
        model = nn.Sequential(Normalize(0.5, 0.1), shifted)
    certificate = certify_smoothed(model.eval(), x, y, sigma=sigma, n=40_000, alpha=0.001)
    assert 0.56 * sigma < certificate.smoothed_radius[0] < 0.6 * sigma
    assert certificate.status == (SMOOTHED,) and certificate.prediction[0] == 0
    p = stats.norm.cdf(0.6)
    assert certificate.probability[0] == pytest.approx(p - 3.09 * (p * (1 - p) / 40_000) ** 0.5, abs=4 * (p * (1 - p) / 40_000) ** 0.5)
    # The radius is that of the stated probability.
    assert certificate.smoothed_radius[0] == pytest.approx(sigma * stats.norm.ppf(certificate.probability[0]), rel=1e-9)


def test_radii_above_the_truth_are_as_rare_as_alpha_says() -> None:
    """400 independent runs with α = 0.1: the true radius is exceeded in at most a tenth of them, up to four standard errors, and not never."""
    distance, alpha, runs = 0.8, 0.1, 400
    model, x, y = at_distance(distance)
    many = x.expand(runs, -1)
    certificate = certify_smoothed(model, many, y.expand(runs), sigma=1.0, n0=50, n=300, alpha=alpha)
    exceeded = float((certificate.smoothed_radius > distance).mean())
    assert 0.02 < exceeded <= alpha + 4 * (alpha * (1 - alpha) / runs) ** 0.5
    # With the usual α, none of these does.
    assert (certify_smoothed(model, many[:100], y.expand(100), sigma=1.0, n=300, alpha=1e-5).smoothed_radius <= distance).all()


def test_abstains_on_the_boundary_and_never_for_long_beyond_it() -> None:
    model, x, y = at_distance(0.0)
    many = x.expand(100, -1)
    certificate = certify_smoothed(model, many, y.expand(100), sigma=0.5, n=500, alpha=0.01)
    assert certificate.status.count("abstained") >= 95
    abstained = np.array([s == "abstained" for s in certificate.status])
    assert (certificate.smoothed_radius[abstained] == 0).all() and (certificate.prediction[abstained] == NO_CLASS).all()
    assert (predict_smoothed(model, many, sigma=0.5, n=300, alpha=0.01) == NO_CLASS).sum() >= 95


def test_predict_finds_the_smoothed_class_and_certify_the_wrong_label() -> None:
    model, x, _ = at_distance(1.0)
    assert predict_smoothed(model, torch.cat([x, -x]), sigma=0.5, n=200).tolist() == [0, 1]
    certificate = certify_smoothed(model, torch.cat([x, -x]), torch.tensor([1, 1]), sigma=0.5, n=200)
    assert certificate.status == ("misclassified", SMOOTHED) and certificate.smoothed_radius[0] == 0
    assert certificate.prediction.tolist() == [0, 1]
    assert certificate.smoothed_accuracy(0.0) == 0.5 and certificate.smoothed_accuracy(10.0) == 0.0


def test_no_number_of_draws_certifies_more_than_all_of_them_agreeing() -> None:
    model, x, y = at_distance(100.0)
    certificate = certify_smoothed(model, x, y, sigma=0.5, n=1500, alpha=0.001)
    assert certificate.smoothed_radius[0] == pytest.approx(0.5 * stats.norm.ppf(0.001 ** (1 / 1500)), rel=1e-6)
    asked = certify_smoothed(model, x, y, sigma=0.5, n=1500, threat=InputBall("l2", 5.0))
    assert asked.status == ("abstained",) and 0 < asked.smoothed_radius[0] < 5


def test_logits_that_are_not_finite_vote_for_no_class() -> None:
    layer = nn.Linear(2, 2).half()
    with torch.no_grad():
        layer.weight.fill_(3e4)
        layer.bias.zero_()
    certificate = certify_smoothed(nn.Sequential(layer), torch.full((1, 2), 50.0), torch.tensor([0]), sigma=0.1, n=200)
    assert certificate.status == ("abstained",) and certificate.probability[0] == 0
    assert predict_smoothed(nn.Sequential(layer), torch.full((1, 2), 50.0), sigma=0.1, n=200).tolist() == [NO_CLASS]


# ---- draws


def test_draws_depend_on_seed_and_sample_number_alone() -> None:
    model, x = LipschitzMLP([6, 16, 4], "relu").eval(), torch.rand(5, 6)
    y = model(x).argmax(-1)
    whole = certify_smoothed(model, x, y, sigma=0.3, n=700, seed=3)
    again = certify_smoothed(model, x, y, sigma=0.3, n=700, seed=3)
    part = certify_smoothed(model, x[[4, 1]], y[[4, 1]], sigma=0.3, n=700, seed=3, index=np.array([4, 1]))
    other = certify_smoothed(model, x, y, sigma=0.3, n=700, seed=4)
    np.testing.assert_array_equal(whole.probability, again.probability)
    np.testing.assert_array_equal(whole.probability[[4, 1]], part.probability)
    assert (whole.probability != other.probability).any()


def test_choice_and_count_use_different_draws(monkeypatch) -> None:
    """With the same draws, the count would be biased towards the class they chose."""
    keys = []
    votes = smoothing._votes

    def spy(chain, x, dtype, sigma, draws, key):
        keys.append((draws, key))
        return votes(chain, x, dtype, sigma, draws, key)

    monkeypatch.setattr(smoothing, "_votes", spy)
    model, x, y = at_distance(0.5)
    certify_smoothed(model, x.expand(3, -1), y.expand(3), sigma=1.0, n0=11, n=13, seed=5)
    predict_smoothed(model, x, sigma=1.0, n=17, seed=5)
    assert [draws for draws, _ in keys] == [11, 13] * 3 + [17]
    assert len({key for _, key in keys}) == len(keys)


def test_noise_is_normal_and_exactly_as_many_draws_are_counted() -> None:
    seen = []
    model = Chain(nn.Linear(4, 2).double())
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    votes = smoothing._votes(Target(model), torch.full((4,), 7.0), torch.float64, 2.0, 2500, (0, 0, 0))
    assert int(votes.sum()) == 2500
    draws = (torch.cat(seen) - 7.0) / 2.0
    assert {len(batch) for batch in seen} == {smoothing._BATCH}  # one size, so that the program is one function
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-4
    assert len(torch.unique(draws)) == draws.numel()
    correlation = torch.corrcoef(draws.mT) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 0.1


# ---- a result that cannot be taken for a proof


def test_the_result_says_that_it_is_probabilistic_and_is_no_certificate() -> None:
    model, x, y = at_distance(1.0)
    certificate = certify_smoothed(model, x.expand(2, -1), y.expand(2), sigma=0.5, n=200, alpha=0.01, seed=9)
    assert not isinstance(certificate, Certificate)
    # Neither the name of the radii nor that of the status nor that of the accuracy is the one of a deterministic certificate.
    assert not hasattr(certificate, "radius") and not hasattr(certificate, "certified_accuracy") and "certified" not in certificate.status
    assert certificate.guarantee == "probabilistic" and certificate.confidence == pytest.approx(0.99)
    assert certificate.joint_confidence == pytest.approx(0.98)
    data = certificate.to_json_dict()
    assert data["guarantee"] == "probabilistic" and "samples" not in data and "radius" not in data["smoothed_samples"][0]
    assert (data["sigma"], data["selection"], data["draws"], data["seed"]) == (0.5, 100, 200, 9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        certificate.guarantee = "deterministic"  # type: ignore[misc]
    with pytest.raises(BadInput, match="probabilistic"):
        dataclasses.replace(certificate, guarantee="deterministic")  # type: ignore[arg-type]
    assert {f.name for f in dataclasses.fields(SmoothedCertificate)} >= {"confidence", "sigma", "samples", "guarantee", "seed"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma"), ({"sigma": float("nan")}, "sigma"), ({"alpha": 0.0}, "alpha"), ({"alpha": 1.0}, "alpha"), ({"n": 0}, "n of"),
        ({"n0": 0}, "n0"), ({"n": 1.5}, "n of"), ({"seed": -1}, "seed"), ({"threat": InputBall("linf")}, "l2"),
        ({"index": np.arange(3)}, "sample numbers"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(change, message) -> None:
    model, x, y = at_distance(1.0)
    with pytest.raises(BadInput, match=message):
        certify_smoothed(model, x, y, **({"sigma": 0.5, "n": 10} | change))


def test_models_that_are_no_function_of_one_sample_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    with pytest.raises(BadInput, match="eval"):
        certify_smoothed(model, torch.rand(1, 2), torch.tensor([0]), sigma=0.5, n=10)
    with pytest.raises(BadInput, match="labels"):
        certify_smoothed(model.eval(), torch.rand(1, 2), torch.tensor([2]), sigma=0.5, n=10)
    from robustlip.models import LipschitzGPT

    with pytest.raises(BadInput, match="floating-point"):
        certify_smoothed(LipschitzGPT("abc", 8, 2, 1).eval(), torch.randint(3, (1, 4)), torch.tensor([0]), sigma=0.5, n=10)
