"""Options of the models that are built from a configuration."""

from __future__ import annotations

import pytest
import torch

from robustlip.certifiers import lipschitz_bound
from robustlip.errors import BadInput
from robustlip.layers import Attention
from robustlip.models import LipschitzGPT
from robustlip.models.build import build

SHORT = {"kind": "lipschitz-gpt", "vocabulary": "abcd", "width": 16, "heads": 4, "blocks": 2, "distance_bias": 8}


def test_heads_start_on_tokens_of_their_own() -> None:
    layer = Attention(16, 4, distance_bias=8, distance_peaks=2.0)
    weights = layer.logit_bias(8).detach().softmax(-1)
    for head in range(4):
        for token in range(head + 1, 8):
            assert int(weights[head, token].argmax()) == token - head - 1 and float(weights[head, token].max()) > 0.7
    slopes = Attention(16, 4, distance_bias=8).logit_bias(8)
    assert torch.equal(slopes[2, 7], -0.25 * torch.arange(7, -1, -1.0))


def test_orthogonal_mlps_with_maxmin_keep_norms() -> None:
    model = build(SHORT | {"activation": "maxmin", "mlp_alpha": 1.0, "distance_peaks": 2.0})
    gelu = build(SHORT)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *gelu.named_parameters()]:
            if name.startswith("mlp"):
                torch.nn.init.orthogonal_(parameter)
    mlp = model.get_submodule("mlp0")
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        inner = mlp.branch[1](mlp.branch[0](x))
        torch.testing.assert_close(inner.norm(dim=-1), x.norm(dim=-1))
        mlp.branch[2].weight.copy_(mlp.branch[0].weight.mT)
        assert (mlp(x).norm(dim=-1) <= x.norm(dim=-1) * (1 + 1e-6)).all()
        assert (gelu.get_submodule("mlp0").branch(x).norm(dim=-1) < 0.9 * x.norm(dim=-1)).all()
    assert lipschitz_bound(torch.nn.Sequential(*mlp.branch))["l2"] == pytest.approx(1.0, rel=1e-5)


def test_only_what_differs_is_written_down() -> None:
    changes = {"activation": "maxmin", "mlp_alpha": 1.0, "distance_peaks": 2.0, "mlp_hidden": 24}
    model = build(SHORT | changes)
    assert model.config == SHORT | {"attention_scale": 1.0} | changes
    assert build(model.config).config == model.config and model.get_submodule("mlp1").branch[2].weight.shape == (16, 24)
    assert build(SHORT).config == SHORT | {"attention_scale": 1.0}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"activation": "relu"}, "an activation among gelu, maxmin"),
        ({"distance_peaks": 2.0, "distance_bias": 0}, "with a distance_bias"),
        ({"distance_peaks": -1.0}, "at least 0"),
        ({"distance_peaks": float("nan")}, "at least 0|a finite distance_peaks"),
        ({"mlp_hidden": 0}, "an MLP width of at least 1"),
        ({"mlp_hidden": 16.0}, "an MLP width of at least 1"),
        ({"mlp_hidden": 15, "activation": "maxmin"}, "even for maxmin"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, told) -> None:
    with pytest.raises(BadInput, match=told):
        build(SHORT | options)
    with pytest.raises(BadInput, match=told):
        LipschitzGPT("abcd", 16, 4, 2, **({"distance_bias": 8} | options))
