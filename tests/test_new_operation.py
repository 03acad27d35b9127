"""Another package adds an elementwise operation with its facts in one call, and every method covers it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import robustlip
from robustlip.attacks import MinimumRadius
from robustlip.errors import BadInput
from robustlip.ops import Elementwise, elementwise, register_elementwise
from robustlip.ops.elementwise import ulps
from robustlip.threats import InputBall


class Atan(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.atan(x)


# Slope 1/(1 + x²), second derivative −2x/(1 + x²)², largest at 1/√3.
ATAN = Elementwise(value=torch.atan, derivative=lambda z: (1 + z * z).reciprocal(), slope=(0.0, 1.0), curvature=0.6495191, executed=ulps(64))


@pytest.fixture
def atan(monkeypatch):
    monkeypatch.setattr(elementwise, "_FACTS", dict(elementwise._FACTS))
    register_elementwise(Atan, lambda layer: ATAN)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), Atan(), nn.Linear(12, 8), Atan(), nn.Linear(8, 3)).eval()


def test_without_facts_it_is_refused() -> None:
    with pytest.raises(BadInput, match="Atan"):
        robustlip.certify(mlp(), torch.zeros(1, 6), torch.zeros(1, dtype=torch.int64), InputBall("l2"))


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("method", ["global", "local", "dual", "ibp", "crown", "local-lipschitz", "eclipse", "best"])
def test_every_method_covers_a_registered_operation(atan, method, norm) -> None:
    model, ball = mlp(), InputBall(norm)
    x = 2 * torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(-1)
    radius = robustlip.certify(model, x, y, ball, method).radius
    broken = MinimumRadius()(model, x, y, ball).radius
    assert (radius > 0).mean() > 0.9
    assert (radius <= broken).all()
    assert (radius / broken).max() > {"global": 0.05, "ibp": 0.05, "eclipse": 0.05}.get(method, 0.1)


def test_a_tenth_of_its_slope_would_be_false(atan) -> None:
    """The test above can fail: with a tenth of the slope, `global` proves .06 and more where the boundary is .05 away."""
    elementwise._FACTS[Atan] = lambda layer: replace(ATAN, slope=(0.0, 0.1))
    model = nn.Sequential(nn.Linear(1, 1), Atan(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[0].weight.fill_(1.0)
        model[2].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    x = torch.full((1, 1), 0.05)
    assert robustlip.certify(model, x, torch.zeros(1, dtype=torch.int64), InputBall("l2"), "global").radius[0] > 0.06


PACKAGE = {
    "atan.py": """
import torch
from torch import nn
class Atan(nn.Module):
    def forward(self, x):
        return torch.atan(x)
""",
    "arcs.py": """
import torch
from atan import Atan
from robustlip.ops import Elementwise, register_elementwise
from robustlip.ops.elementwise import ulps


def register():
    register_elementwise(Atan, lambda layer: Elementwise(
        value=torch.atan, derivative=lambda z: (1 + z * z).reciprocal(), slope=(0.0, 1.0), curvature=0.6495191, executed=ulps(64)))
""",
    "arcs-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: arcs\nVersion: 1.0\n",
    "arcs-1.0.dist-info/entry_points.txt": "[robustlip.ops]\natan = arcs:register\n",
}
CERTIFIES = """
import torch, robustlip
from atan import Atan
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 12), Atan(), nn.Linear(12, 3)).eval()
x = torch.randn(4, 6)
proved = robustlip.certify(model, x, model(x).argmax(-1), robustlip.InputBall("l2"), "dual")
print((proved.radius > 0).all(), proved.versions.get("arcs"))
"""


def run_with(folder, code: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own that finds the package in the folder, as an installed one."""
    path = os.pathsep.join([str(folder), str(Path(robustlip.__file__).parents[1])])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_an_installed_package_adds_an_operation_by_an_entry_point(tmp_path, broken) -> None:
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace("def register", "raise OSError('no disk')\ndef register") if broken else text, encoding="utf-8")
    done = run_with(tmp_path, CERTIFIES)
    if broken:
        assert "expected the entry point 'atan' of robustlip.ops in arcs to load, got OSError: no disk" in done.stderr
    else:
        assert done.stdout.strip() == "True 1.0", done.stderr
