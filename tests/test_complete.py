"""Branch and bound as a method of certificates: near the exact radius of small networks and never above it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from robustlip.attacks.minnorm import MinimumRadius
from robustlip.certifiers import certify
from robustlip.certifiers.constants import constants_of
from robustlip.domains.lines import complete_radii, complete_why_not
from robustlip.domains.norms import Context
from robustlip.layers import Chain, MaxMin, Residual, as_chain
from robustlip.threats import InputBall


def plane(seed: int, activation: nn.Module) -> Chain:
    """A classifier of points in the plane with bends all around."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(2, 10), activation, nn.Linear(10, 8), activation, nn.Linear(8, 3))
    with torch.no_grad():
        for p in layers.parameters():
            p.mul_(2.5)
        layers[-1].bias -= layers(torch.rand(2000, 2) * 2 - 1).median(0).values  # so that labels change nearby
    return as_chain(layers.requires_grad_(False))


def radii(model: Chain, x: Tensor, threat: InputBall, dtype: torch.dtype = torch.float32, **options) -> Tensor:
    logits = model.scores(x)
    return complete_radii(model, x, logits.argmax(-1), logits, threat, Context(dtype, constants_of(model)[1]), **options)[0]


def distance(model: Chain, x: Tensor, norm: str, reach: float, steps: int = 801) -> Tensor:
    """The smallest distance (N,) from x (N, 2) to a point of a fine grid with another label: at least the exact radius, and hardly more."""
    side = torch.linspace(-reach, reach, steps)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    length = grid.abs().amax(-1) if norm == "linf" else grid.norm(dim=-1) if norm == "l2" else grid.abs().sum(-1)
    found = []
    for point in x:
        other = model.scores(point + grid).argmax(-1) != model.scores(point[None]).argmax(-1)
        found.append(length[other].min() if bool(other.any()) else torch.tensor(math.inf))
    return torch.stack(found)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "activation"), [("linf", nn.ReLU()), ("l2", nn.ReLU()), ("l1", nn.ReLU()), ("linf", MaxMin())])
def test_radii_are_nearly_exact_in_the_plane_and_never_above(norm: str, activation: nn.Module) -> None:
    model, x = plane(1, activation), torch.rand(6, 2, generator=torch.Generator().manual_seed(2))[3:] * 2 - 1
    exact = distance(model, x, norm, 1.5)
    inside = exact.isfinite()
    found = radii(model, x, InputBall(norm), subproblems=40)
    crown = certify(model, x, model.scores(x).argmax(-1), InputBall(norm), "crown").radius
    assert bool((found[inside] <= exact[inside]).all()) and bool(inside.any())
    # The last two trials are within 2 percent of each other; the grid's step is .00375.
    assert float(found[inside].sum()) >= 0.85 * float(exact[inside].sum()) - 0.004
    assert bool((found >= torch.as_tensor(crown) * (1 - 1e-6)).all()) and float(found.sum()) > 1.005 * float(crown.sum())


@pytest.mark.slow
def test_a_radius_that_is_asked_for_is_decided() -> None:
    model, x = plane(1, nn.ReLU()), torch.rand(6, 2, generator=torch.Generator().manual_seed(2))[3:] * 2 - 1
    y, exact = model.scores(x).argmax(-1), distance(model, x, "linf", 1.5)
    crown = torch.as_tensor(certify(model, x, y, InputBall("linf"), "crown").radius)
    searched = radii(model, x, InputBall("linf"), subproblems=8)
    place = int((searched / crown).argmax())
    radius = float(searched[place] * crown[place]) ** 0.5
    assert radius > 1.01 * float(crown[place])
    found = radii(model, x, InputBall("linf", radius))
    assert bool(((found == radius) | (found == 0)).all()) and float(found[place]) == radius
    assert bool((found[exact <= radius] == 0).all())
    best = certify(model, x, y, InputBall("linf", radius))
    assert bool((torch.as_tensor(best.radius)[found == radius] >= radius).all())


def test_labels_that_are_wrong_and_what_execution_may_lose_have_no_radius() -> None:
    model, x = plane(1, nn.ReLU()), torch.rand(2, 2)
    y = model.scores(x).argmax(-1)
    wrong = certify(model, x, (y + 1) % 3, InputBall("linf", 1e-6), "complete")
    assert not bool((wrong.radius > 0).any())
    wide, narrow = (radii(model, x, InputBall("linf"), dtype, subproblems=2) for dtype in (torch.float64, torch.float16))
    assert bool((narrow < wide).all())
    # What a function of the logits may lose of a margin is kept.
    logits = model.scores(x)
    margin = (logits.gather(1, y[:, None]) - logits).scatter(1, y[:, None], math.inf).amin(-1)
    context = Context(torch.float32, constants_of(model)[1], final_error=float(margin.amax()) * 1.001)
    for threat in (InputBall("linf"), InputBall("linf", 1e-9)):
        assert not bool((complete_radii(model, x, y, logits, threat, context)[0] > 0).any())


@pytest.mark.slow
def test_no_attack_gets_inside_of_wider_networks() -> None:
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12))
    layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 12), Residual(branch), MaxMin(), nn.Linear(12, 4))
    model, x = as_chain(layers.requires_grad_(False)), torch.rand(6, 1, 6, 6)
    y = model.scores(x).argmax(-1)
    for norm in ("linf", "l2"):
        proved, crown = (torch.as_tensor(certify(model, x, y, InputBall(norm), method).radius) for method in ("complete", "crown"))
        found = torch.as_tensor(MinimumRadius(steps=40)(model, x, y, InputBall(norm)).radius)
        assert bool((proved < found).all()) and bool((proved >= crown * (1 - 1e-6)).all()) and float(proved.sum()) > 1.02 * float(crown.sum())


def test_other_activations_are_refused_in_one_sentence() -> None:
    model = as_chain(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))
    assert "Tanh" in complete_why_not(model, InputBall("l2"))
