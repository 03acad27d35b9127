"""All positions of a sequence at once: the same radii as window by window, and no successful attack."""

from __future__ import annotations

import pytest
import torch

from robustlip.attacks import by_name
from robustlip.certifiers import certify
from robustlip.certifiers.sequence import sequence_radii
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.models import BaselineGPT, LipschitzGPT, LipschitzTransformer
from robustlip.threats import EmbeddingBall


def made(kind: str, gain: float = 1.5):
    torch.manual_seed(1)
    model = (LipschitzGPT if kind == "lipschitz" else BaselineGPT)("abcdefg", 16, 2, 2, **({"distance_bias": 3} if kind == "lipschitz" else {}))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(gain)
    model.eval()
    ids = torch.randint(7, (12,))
    predicted = model(ids[None])[0].argmax(-1)
    # Labels are the tokens that follow, so the sequence is one that the model continues itself where it can.
    for i in range(11):
        ids[i + 1] = model(ids[None, : i + 1])[0, -1].argmax() if i % 4 else ids[i + 1]
    return model, ids, predicted


@pytest.mark.parametrize("kind", ["lipschitz", pytest.param("baseline", marks=pytest.mark.slow)])
def test_positions_are_certified_as_their_windows_are(kind) -> None:
    model, ids, _ = made(kind)
    radius, prediction = sequence_radii(model, ids)
    assert radius.shape == prediction.shape == (11,)
    assert int((radius > 0).sum()) >= 4
    for t in range(11):
        window, label = ids[None, : t + 1], ids[t + 1 : t + 2]
        one = certify(model, window, label, EmbeddingBall(tokens=(-1,)), "dual")
        assert one.prediction[0] == prediction[t]
        # The window's method adds exact Jacobians for the radii between layers: it can only prove more, but for the search's tolerance.
        assert float(radius[t]) <= one.radius[0] * (1 + 2e-3)
        # Behind a LayerNorm the exact Jacobians can be worth a factor of a hundred; without one, little.
        assert kind == "baseline" or float(radius[t]) >= 0.5 * one.radius[0]


@pytest.mark.parametrize("joint", [False, True])
def test_all_tokens_of_every_prefix_are_certified_as_their_windows_are(joint) -> None:
    model, ids, _ = made("lipschitz")
    threat = EmbeddingBall(joint=joint)
    radius, prediction = sequence_radii(model, ids, threat)
    assert int((radius > 0).sum()) >= 4
    for t in range(11):
        one = certify(model, ids[None, : t + 1], ids[t + 1 : t + 2], threat, "local")
        assert one.prediction[0] == prediction[t]
        # The same proof at radii a tenth apart.
        assert 0.88 * one.radius[0] <= float(radius[t]) <= one.radius[0] * (1 + 2e-3)


def test_no_attack_succeeds_inside_an_all_token_radius() -> None:
    model, ids, _ = made("lipschitz")
    radius, _ = sequence_radii(model, ids, EmbeddingBall())
    for t in (radius > 0).nonzero()[:, 0].tolist():
        found = by_name("pgd")(model, ids[None, : t + 1], ids[t + 1 : t + 2], EmbeddingBall(radius=float(radius[t])))
        assert not found.success.any()


@pytest.mark.parametrize("threat", [EmbeddingBall(), EmbeddingBall(tokens=(-1,))])
def test_where_nothing_is_proved_radii_are_0(threat) -> None:
    model, ids, _ = made("lipschitz", gain=6.0)
    radius, prediction = sequence_radii(model.bfloat16(), ids, threat)
    assert radius.shape == prediction.shape and bool((radius == 0).all())


@pytest.mark.parametrize("kind", ["lipschitz", pytest.param("baseline", marks=pytest.mark.slow)])
def test_no_attack_succeeds_inside_a_position_s_radius(kind) -> None:
    model, ids, _ = made(kind)
    radius, _ = sequence_radii(model, ids)
    for t in (radius > 0).nonzero()[:, 0].tolist():
        ball = EmbeddingBall(radius=float(radius[t]), tokens=(-1,))
        found = by_name("pgd")(model, ids[None, : t + 1], ids[t + 1 : t + 2], ball)
        assert not found.success.any()


def test_wrong_predictions_have_no_radius() -> None:
    model, ids, _ = made("lipschitz")
    radius, prediction = sequence_radii(model, ids)
    assert bool((radius[prediction != ids[1:]] == 0).all())


def test_what_is_no_sequence_is_refused() -> None:
    model, ids, _ = made("lipschitz")
    with pytest.raises(BadInput, match=r"shape \(T,\)"):
        sequence_radii(model, ids[None])
    with pytest.raises(BadInput):
        sequence_radii(model, ids[:1])
    with pytest.raises(BadInput, match="last token or of all"):
        sequence_radii(model, ids, EmbeddingBall(tokens=(0, -1)))
    with pytest.raises(UnsupportedLayer, match="causal"):
        sequence_radii(LipschitzTransformer((1, 4, 4), 2, 4, 8, 2, 1).eval(), ids)
