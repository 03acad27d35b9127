"""The geometry of a threat: lengths, dual norms, steepest directions, projections, boxes."""

from __future__ import annotations

import pytest
import torch

from robustlip.errors import BadInput
from robustlip.geometry import dual_length, largest, length, per_sample, project, steepest, within
from robustlip.threats import INPUT_NORMS, EmbeddingBall, InputBall, WeightBall


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("norm", INPUT_NORMS)
def test_the_steepest_direction_has_length_1_and_reaches_the_dual_norm(norm) -> None:
    g = draw(0, 30, 2, 5)
    delta = steepest(g, norm)
    assert torch.allclose(length(delta, norm), torch.ones(30).double())
    assert torch.allclose((g * delta).flatten(1).sum(1), dual_length(g, norm))
    assert torch.equal(steepest(torch.zeros(3, 4), norm), torch.zeros(3, 4))


@pytest.mark.parametrize("norm", INPUT_NORMS)
def test_no_direction_of_length_1_does_better(norm) -> None:
    g, delta = draw(1, 1, 6), draw(2, 4000, 6)
    delta = delta / length(delta, norm)[:, None]
    assert float((delta @ g[0]).max()) <= float(dual_length(g, norm)) * (1 + 1e-12)


@pytest.mark.parametrize("norm", INPUT_NORMS)
def test_the_projection_is_the_nearest_point_of_the_ball(norm) -> None:
    delta, radius = draw(3, 40, 7), draw(4, 40).abs()
    found = project(delta, radius, norm)
    assert (length(found, norm) <= radius * (1 + 1e-12)).all()
    inside = length(delta, norm) <= radius
    assert torch.equal(found[inside], delta[inside]) or norm == "l2"
    assert torch.allclose(found[inside], delta[inside], rtol=1e-12)
    # ⟨δ − p, q − p⟩ ≤ 0 for every q of the ball says that p is the nearest point.
    q = draw(5, 500, 40, 7)
    q = q / length(q, norm, 2)[..., None] * per_sample(radius, delta)
    assert float(((delta - found) * (q - found)).sum(-1).max()) < 1e-9


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("tokens", [None, (0, -1), (2,)])
def test_the_largest_change_of_a_linear_function_of_embeddings(tokens, joint) -> None:
    threat = EmbeddingBall(tokens=tokens, joint=joint)
    g = draw(6, 1, 4, 3)
    most = float(largest(g, threat))
    delta = draw(7, 5000, 4, 3)
    keep = torch.zeros(4, 1)
    keep[threat.positions(4)] = 1
    delta = delta * keep
    delta = delta / (length(delta, "l2") if threat.joint else torch.linalg.vector_norm(delta, dim=-1).amax(-1))[:, None, None]
    found = float((delta * g).flatten(1).sum(1).max())
    assert 0.5 * most < found <= most * (1 + 1e-12)
    best = g * keep
    best = best / (length(best, "l2")[:, None, None] if threat.joint else torch.linalg.vector_norm(best, dim=-1, keepdim=True).clamp_min(1e-300))
    assert float((best * g).sum()) == pytest.approx(most, rel=1e-12)


def test_weights_have_norms_of_their_own() -> None:
    with pytest.raises(BadInput, match="an input or embedding threat"):
        largest(draw(8, 1, 2, 2), WeightBall())


def test_the_box_in_terms_of_the_change() -> None:
    clean = torch.tensor([[0.0, 0.5, 1.0]]).double()
    assert within(draw(9, 1, 3), clean, None) is not None
    moved = within(torch.tensor([[-1.0, 2.0, 1.0]]).double(), clean, (0.0, 1.0))
    assert torch.equal(moved, torch.tensor([[0.0, 0.5, 0.0]]).double())


@pytest.mark.parametrize(
    ("threat", "place", "space", "box"),
    [
        (InputBall("linf", clip=(0.0, 1.0)), "input", "linf", (0.0, 1.0)), (InputBall("l1"), "input", "l1", None),
        (EmbeddingBall(joint=True), "embedding", "l2", None), (WeightBall("frobenius"), "weights", "l2", None),
    ],
)  # fmt: skip
def test_a_threat_says_what_it_changes_in_which_norm_and_box(threat, place, space, box) -> None:
    assert (threat.place, threat.space, threat.box) == (place, space, box)
