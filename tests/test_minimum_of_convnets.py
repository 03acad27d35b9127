"""On a small ReLU convnet the smallest radius found is as small as that of strong PGD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from robustlip.attacks import PGD, MinimumRadius, by_name
from robustlip.data import load_data
from robustlip.threats import InputBall

torch.set_num_threads(1)


@pytest.mark.slow
def test_strong_pgd_finds_next_to_nothing_one_percent_below() -> None:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )  # fmt: skip
    centres = torch.rand(10, 1, 8, 8, generator=g)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        y = torch.randint(10, (64,), generator=g)
        x = centres[y] + 0.25 * torch.randn(64, 1, 8, 8, generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    y = torch.arange(40) % 10
    x = centres[y] + 0.25 * torch.randn(40, 1, 8, 8, generator=g)
    rough, seen = by_name("min", polish=0)(model, x, y, InputBall("l2")), by_name("min")(model, x, y, InputBall("l2"))
    assert seen.success.all() and (seen.radius <= rough.radius * (1 + 1e-6)).all()
    correct = np.flatnonzero(seen.prediction == seen.label)
    below = 0
    for i in correct[:12].tolist():
        threat = InputBall("l2", 0.99 * float(seen.radius[i]))
        below += int(PGD(steps=100, restarts=5, size=0.5)(model, x[i : i + 1], y[i : i + 1], threat).success[0])
    assert below <= 1


def rugged() -> nn.Module:
    """A convnet trained on large l2 balls: near its boundary the loss has many local maxima, so attacks with few starts find too large radii."""
    train, g = load_data("digits:train"), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        rows = torch.randint(len(train.y), (64,), generator=g)
        x, y = train.x[rows], train.y[rows]
        delta = torch.zeros_like(x)
        for _ in range(3):
            delta.requires_grad_()
            (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(x + delta), y), delta)
            delta = (delta + 0.8 * grad / grad.flatten(1).norm(dim=1).clamp_min(1e-9)[:, None, None, None]).detach()
            delta = delta * (1.6 / delta.flatten(1).norm(dim=1).clamp_min(1e-9)).clamp(max=1)[:, None, None, None]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x + delta), y).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_the_last_attacks_shorten_what_few_starts_leave_too_long() -> None:
    model, data = rugged(), load_data("digits:test", limit=40)
    without, default = (MinimumRadius(**options)(model, data.x, data.y, InputBall("l2")).radius for options in ({"rounds": 0}, {}))
    found = np.isfinite(without) & (without > 0)
    assert (default[found] <= without[found] * (1 + 1e-6)).all()
    assert (default[found] < 0.99 * without[found]).mean() > 0.2
