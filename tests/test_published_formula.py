"""The published formula for models with options of the published code that it ignores: final_scale and substitutes for LayerNorm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from robustlip.attacks.audit import audit
from robustlip.attacks.formulas import newhouse2025, newhouse_layer, ours
from robustlip.errors import BadInput
from robustlip.layers import ScaledGELU
from robustlip.models import BaselineGPT, LipschitzGPT

QUICK = {"starts": 8, "power_steps": 10, "ascent_steps": 20}
SIZES = {"width": 8, "heads": 2, "blocks": 2}


def model(**options: object) -> LipschitzGPT:
    torch.manual_seed(0)
    return LipschitzGPT("abcdef", **SIZES, **options).eval()


@pytest.mark.parametrize("options", [{"final_scale": 5.0}, {"norm": "tanh"}, {"norm": "rmsnorm"}, {"norm": "layernorm", "final_scale": 0.5}])
def test_the_published_value_does_not_see_the_options(options: dict) -> None:
    """As its code is (see importing/logs.py): the value is that of the same weights without them, and the claim's layers are named."""
    plain, other = model(), model(**options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    assert newhouse2025(other).value == pytest.approx(newhouse2025(plain).value, rel=1e-12)
    assert [name for name, _ in newhouse2025(other).layers] == [name for name, _ in list(other.named_children())[1:]]


def test_the_seventh_mistake_repaired_by_hand() -> None:
    scaled = model(final_scale=5.0)
    assert newhouse2025(scaled, {7}).value == pytest.approx(5 * newhouse2025(scaled).value, rel=1e-12)
    sigma = {n: float(torch.linalg.matrix_norm(p.double(), 2)) for n, p in model().named_parameters() if p.dim() == 2}
    for norm, constant, behind in (("tanh", 1.0, 1.0), ("rmsnorm", 1e-5**-0.5, 1.0), ("layernorm", 1e-5**-0.5, 1.0)):
        attention, mlp = model(norm=norm)[1].branch, model(norm=norm)[2].branch
        q, k, v, o = (sigma[f"attn0.branch.{n}.weight"] for n in ("query", "key", "value", "output"))
        for size in (1.0, 3.0):
            value, growth = newhouse_layer(attention, size, {7})
            assert value == pytest.approx(constant * o * v * (1 + 2 * q * k * behind**2) / 3, rel=1e-6)
            assert growth == pytest.approx(o * v / 3 * behind / size, rel=1e-6)
            value, growth = newhouse_layer(mlp, size, {7})
            product = sigma["mlp0.branch.up.weight"] * sigma["mlp0.branch.down.weight"] / 1.1289
            assert value == pytest.approx(constant * product, rel=1e-6) and growth == pytest.approx(product * behind / size, rel=1e-6)
    # Tokens smaller than 1 are no larger behind tanh, and grow by no more than 1/√eps behind the others.
    assert newhouse_layer(model(norm="tanh")[2].branch, 0.25, {7})[1] == pytest.approx(product, rel=1e-6)


def test_an_audit_breaks_a_claim_that_leaves_out_the_factor() -> None:
    """A factor of 50 on the logits that the formula does not see: refuted, with the reason, where the same weights without it are not."""
    scaled = model(final_scale=50.0)
    found = audit(scaled, newhouse2025(scaled), tokens=3, **QUICK)
    assert found.verdict == "violated" and found.why.startswith("Mistake 7 ") and "final_scale" in found.why
    assert audit(model(), newhouse2025(model()), tokens=3, **QUICK).verdict == "not refuted"
    assert audit(scaled, ours(scaled), tokens=3, **QUICK).verdict == "not refuted"


def test_an_audit_breaks_a_claim_that_leaves_out_the_division() -> None:
    """Tokens near 0 after RMSNorm: 1/√eps more sensitive than published."""
    small = model(norm="rmsnorm")
    with torch.no_grad():
        small[0].weight.mul_(1e-3)
    found = audit(small, newhouse2025(small), tokens=3, **QUICK)
    assert found.verdict == "violated" and found.why.startswith("Mistake 7 ") and found.ratio > 10
    assert audit(small, ours(small), tokens=3, **QUICK).verdict == "not refuted"


def test_learned_norms_and_others_are_still_refused() -> None:
    with pytest.raises(BadInput, match="paper"):
        newhouse2025(BaselineGPT("abcd", width=8, heads=2, blocks=1))
    for front in (nn.LayerNorm(4), nn.RMSNorm(4), nn.RMSNorm(4, elementwise_affine=False), nn.ReLU(), nn.Softplus()):
        mlp = nn.Sequential(front, nn.Linear(4, 8, bias=False), ScaledGELU(), nn.Linear(8, 4, bias=False))
        with pytest.raises(BadInput, match="paper"):
            newhouse_layer(mlp, 1.0)
    assert math.isfinite(newhouse_layer(nn.Sequential(nn.Tanh(), nn.Linear(4, 8), ScaledGELU(), nn.Linear(8, 4)), 1.0)[0])
