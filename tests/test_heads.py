"""The end of a model: one logit with the threshold 0, and final functions that keep the order of logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustlip import certify
from robustlip.attacks import by_name
from robustlip.certifiers import METHODS
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.graph import capture
from robustlip.graph.final import lost
from robustlip.layers import Chain, Scale
from robustlip.target import Target
from robustlip.threats import InputBall, WeightBall

ALL = [name for name in METHODS if name != "lipsdp"]


def binary(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 1)).requires_grad_(False).eval()


def points(count: int = 8) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


class Ending(nn.Module):
    """A model that returns `end` of its logits."""

    def __init__(self, body: nn.Module, end: str) -> None:
        super().__init__()
        self.body, self.end = body, end

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        return {
            "flat": lambda: z.squeeze(-1), "first": lambda: z[:, 0], "sigmoid": lambda: torch.sigmoid(z),
            "flat sigmoid": lambda: torch.sigmoid(z.view(-1)), "hardsigmoid": lambda: nn.functional.hardsigmoid(z),
            "softmax": lambda: z.softmax(-1), "softmax 1": lambda: nn.functional.softmax(z, dim=1), "log_softmax": lambda: z.log_softmax(-1),
        }[self.end]()  # fmt: skip


@pytest.mark.parametrize("method", [name for name in ALL if name != "sdp"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_one_linear_logit_has_its_exact_radius(method: str, norm: str) -> None:
    """|z|/‖w‖ in the dual norm, for both classes: a wrong factor of √2 would be visible."""
    torch.manual_seed(0)
    model = Chain(nn.Linear(6, 1)).double().requires_grad_(False)
    x = points().double()
    z = model(x)[:, 0]
    exact = z.abs() / (model[0].weight.norm() if norm == "l2" else model[0].weight.abs().sum())
    found = certify(model, x, (z > 0).long(), InputBall(norm), method)
    assert set(found.label) == {0, 1} and set(found.status) == {"certified"}
    loosest = 6**-0.5 if norm == "linf" and method in ("eclipse", "local") else 1  # √6 from ℓ∞ to ℓ2
    assert (found.radius <= exact.numpy()).all() and (found.radius >= 0.99 * loosest * exact.numpy()).all()
    assert certify(model, x, (z <= 0).long(), InputBall(norm), method).status == ("misclassified",) * 8


@pytest.mark.parametrize("method", [*ALL, "best"])
def test_one_logit_is_certified_as_the_two_that_it_stands_for(method: str) -> None:
    one, x = binary(), points()
    two = nn.Sequential(one[0], one[1], nn.Linear(12, 2)).requires_grad_(False)
    two[2].weight.copy_(torch.cat([torch.zeros(1, 12), one[2].weight]))
    two[2].bias.copy_(torch.cat([torch.zeros(1), one[2].bias]))
    y = (one(x)[:, 0] > 0).long()
    assert 0 < int(y.sum()) < len(y)
    found, same = certify(one, x, y, InputBall("l2"), method), certify(two, x, y, InputBall("l2"), method)
    assert (found.radius > 0).all() and found.radius == pytest.approx(same.radius, rel=5e-3)
    attacked = by_name("min")(one, x, y, InputBall("l2"))
    assert (np.asarray(attacked.radius) >= found.radius).all() and np.isfinite(attacked.radius).all()


@pytest.mark.parametrize("method", ["global", "local", "dual", "crown"])
def test_one_logit_is_certified_where_the_model_ends_with_no_linear_layer(method: str) -> None:
    one, x = binary(), points()
    ends = Chain(*one, Scale(torch.tensor([-3.0]))).requires_grad_(False)
    y = (ends(x)[:, 0] > 0).long()
    found, plain = certify(ends, x, y, InputBall("l2"), method).radius, certify(one, x, 1 - y, InputBall("l2"), method).radius
    assert (found <= plain * 1.01).all() and (found >= 0.7 * plain).all() and (plain > 0).all()


def test_one_logit_under_weight_threats_and_at_its_threshold() -> None:
    one, x = binary(), points()
    y = (one(x)[:, 0] > 0).long()
    for method in ("global", "local"):
        assert (certify(one, x, y, WeightBall("spectral"), method).radius > 0).any()
    torch.nn.init.zeros_(one[2].weight)
    torch.nn.init.zeros_(one[2].bias)
    tied = certify(one, x, torch.zeros(8, dtype=torch.int64), InputBall("l2"))
    assert set(tied.status) == {"abstained"} and set(tied.prediction) == {0}
    with pytest.raises(BadInput, match=r"labels in \[0, 1\]"):
        certify(one, x, torch.full((8,), 2), InputBall("l2"))


@pytest.mark.parametrize("end", ["flat", "first", "sigmoid", "flat sigmoid"])
def test_modules_of_one_number_are_certified_by_their_logit(end: str) -> None:
    body, x = binary(), points()
    y = (body(x)[:, 0] > 0).long()
    model = Ending(body, end).eval()
    found = certify(model, x, y, InputBall("l2"), "local")
    plain = certify(body, x, y, InputBall("l2"), "local")
    assert found.prediction.tolist() == y.tolist()
    assert (found.radius <= plain.radius).all() and found.radius == pytest.approx(plain.radius, rel=0.02)
    assert found.bound.get("read_in_front_of") == ("sigmoid" if "sigmoid" in end else None)
    if "sigmoid" not in end:
        assert Target(model).scores(x).argmax(-1).tolist() == y.tolist()


@pytest.mark.parametrize("end", ["softmax", "softmax 1", "log_softmax"])
@pytest.mark.parametrize("method", ["global", "local", "dual", "crown", "eclipse"])
def test_functions_of_the_logits_are_left_out_and_cost_what_they_may_lose(end: str, method: str) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 3)).requires_grad_(False).eval()
    model, x = Ending(body, end).eval(), points(4)
    y = body(x).argmax(-1)
    found, plain = (certify(m, x, y, InputBall("l2"), method) for m in (model, body))
    name = end.split()[0]
    assert found.bound["read_in_front_of"] == name and capture(model, x).final == name
    assert (found.radius < plain.radius).all() and found.radius == pytest.approx(plain.radius, rel=1e-2)
    # A margin that the function may lose is no margin.
    margin = lost(name, 3, torch.float32, "cpu")
    for part, proved in ((0.5, False), (4.0, True)):
        body[0].weight.zero_()
        body[0].weight[0, 0] = 1e-3
        body[0].bias.copy_(torch.tensor([0.0, -part * margin, -0.5]))
        here = torch.zeros(1, 6)
        assert (certify(model, here, torch.tensor([0]), InputBall("l2"), method).radius[0] > 0) == proved
        assert certify(body, here, torch.tensor([0]), InputBall("l2"), method).radius[0] > 0
    assert certify(model, here, torch.tensor([0]), InputBall("l2"), method, dtype="real").radius[0] > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("final", ["softmax", "log_softmax", "sigmoid"])
def test_logits_further_apart_than_what_is_lost_keep_their_order(final: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 10, 1000, 50_000) if final != "sigmoid" else (2,):
        d = lost(final, classes, dtype, "cpu")
        for shift in (0.0, 3.0, -40.0) if final != "sigmoid" else (0.0,):
            z = torch.full((64, classes), shift, dtype=torch.float64) - 6 * d * torch.rand(64, classes, generator=generator, dtype=torch.float64)
            z[:, 0] = shift
            z = z.to(dtype)
            if final == "sigmoid":
                kept = torch.cat([z[:, 1] + d + 1e-3 * d, -z[:, 1] - d])
                apart, right = kept.double().abs() > d, (torch.sigmoid(kept) > 0.5) == (kept > 0)
            else:
                p = getattr(torch, final)(z, -1)
                apart, right = (z[:, :1].double() - z.double()) > d, p[:, :1] > p
            assert bool((right | ~apart).all()) and bool(apart.any()), (classes, shift)


def test_a_difference_of_one_rounding_is_lost_by_softmax() -> None:
    z = torch.tensor([[2.0**-30, 0.0]])
    assert z[0, 0] > z[0, 1] and z.softmax(-1)[0, 0] == z.softmax(-1)[0, 1]
    with pytest.raises(UnsupportedLayer, match="return logits"):
        lost("log_softmax", 10, torch.float32, "cuda")
    assert lost("", 10, torch.float32, "cuda") == 0.0 and math.isfinite(lost("softmax", 10, torch.float16, "cuda"))


def test_attacks_see_the_same_decision_at_a_half_or_at_zero() -> None:
    """A sigmoid at the end of an nn.Sequential is known; of another module, numbers in [0, 1] may be either, and are refused."""
    body, x = binary(), points()
    y = (body(x)[:, 0] > 0).long()
    ends = nn.Sequential(*body, nn.Sigmoid()).eval()
    assert Target(ends).scores(x).argmax(-1).tolist() == y.tolist()
    found = certify(ends, x, y, InputBall("l2"))
    for model in (body, ends, Ending(body, "first").eval()):
        attacked = by_name("min")(model, x, y, InputBall("l2"))
        assert attacked.prediction.tolist() == y.tolist() and (np.asarray(attacked.radius) >= found.radius).all()
        assert np.isfinite(attacked.radius).all()
    nested = nn.Sequential(body[0], body[1], nn.Sequential(body[2], nn.Sigmoid())).eval()
    assert certify(nested, x, y, InputBall("l2")).radius.tolist() == found.radius.tolist()
    assert Target(nested).scores(x).argmax(-1).tolist() == y.tolist()
    with pytest.raises(BadInput, match="after a Sigmoid"):
        certify(Chain(*ends), x, y, InputBall("l2"))
    with pytest.raises(BadInput, match="may be probabilities"):
        certify(Ending(body, "hardsigmoid").eval(), x, y, InputBall("l2"))
    with pytest.raises(BadInput, match="may be probabilities"):
        by_name("pgd")(Ending(body, "sigmoid").eval(), x, y, InputBall("l2", 0.1))


def test_functions_in_other_places_are_not_left_out() -> None:
    body, x = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False), points()
    for function in (lambda z: z.softmax(0), lambda z: z.softmax(-1, dtype=torch.float64), lambda z: torch.sigmoid(z).softmax(-1).softmax(-1)):

        class Other(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = body

            def forward(self, x: Tensor, function=function) -> Tensor:
                return function(self.body(x))

        with pytest.raises(UnsupportedLayer):
            capture(Other().eval(), x)
    assert capture(Ending(body, "sigmoid").eval(), x).final == ""  # of four numbers it may round two to one: it stays
