"""Models and settings that were built to produce a false certificate: each is bounded correctly or refused with an error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from robustlip.certifiers import certify, lipschitz_bound
from robustlip.domains.norms import Context, State, rule_for
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import AddPositions, Attention, Chain, MeanTokens, Normalize, Residual, ScaledGELU, as_chain
from robustlip.numerics.spectral import infinity_to_two_bound, one_to_two_bound
from robustlip.threats import InputBall, WeightBall

ONE = torch.ones(1, dtype=torch.float64)


def state(norm: float, change: float, tokens: int, width: int, whole: tuple[int, ...] | None = None) -> State:
    return State(norm * ONE, change * ONE, 0 * ONE, "l2", tokens, width, whole)


def step(layer: nn.Module, before: State, dtype: torch.dtype = torch.float64) -> State:
    return rule_for(layer).step(layer, before, Context(dtype, {}))


def test_a_layer_used_twice_is_counted_twice() -> None:
    """nn.Sequential(a, act, b, act): a certificate of a chain without the second `act` would be one of another model."""
    torch.manual_seed(0)
    act, layer = nn.ReLU(), nn.Linear(4, 4)
    model = nn.Sequential(layer, act, nn.Sequential(layer, act), nn.Linear(4, 3))
    chain = as_chain(model)
    assert len(chain) == 5
    x = torch.randn(20, 4)
    torch.testing.assert_close(chain(x), model(x))
    flat = nn.Sequential(layer, act, layer, act, layer)
    assert len(as_chain(flat)) == 5
    torch.testing.assert_close(as_chain(flat)(x), flat(x))
    with torch.no_grad():
        layer.weight.copy_(3 * torch.eye(4))
    tripled = certify(model, x, model(x).argmax(-1), InputBall("l2"), dtype="real").bound["model_l2"]
    assert tripled >= 9 * float(torch.linalg.matrix_norm(model[-1].weight.detach(), 2)) * (1 - 1e-6)


@pytest.mark.parametrize("where", ["model", "head", "nested", "projection"])
def test_hooks_anywhere_are_refused(where) -> None:
    attention = Attention(4, 2)
    inner = nn.Sequential(nn.Linear(4, 4))
    model = nn.Sequential(inner, nn.Linear(4, 3))
    tokens = Chain(nn.Linear(4, 4), attention, MeanTokens(), nn.Linear(4, 3))
    target = {"model": model, "head": model[-1], "nested": inner, "projection": attention.value}[where]
    target.register_forward_hook(lambda m, i, o: -o)
    asked, x = (tokens, torch.rand(2, 3, 4)) if where == "projection" else (model, torch.rand(2, 4))
    with pytest.raises(UnsupportedLayer, match="hooks"):
        certify(asked, x, asked(x).argmax(-1), InputBall("l2"))


@pytest.mark.parametrize("change", ["bias", "sequential"])
def test_attention_with_other_projections_is_refused(change) -> None:
    layer = Attention(4, 2)
    layer.value = nn.Linear(4, 4) if change == "bias" else nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    with pytest.raises(UnsupportedLayer, match="without a bias"):
        step(layer, state(1.0, 0.1, 3, 4))


@pytest.mark.parametrize(
    ("layer", "before"),
    [
        (Residual(nn.Linear(8, 1)), state(1.0, 0.1, 3, 8)),  # (T, 8) + (T, 1)
        (Residual(MeanTokens()), state(1.0, 0.1, 3, 8)),  # (N, T, D) + (N, D)
        (Residual(nn.Conv2d(3, 1, 1)), state(1.0, 0.1, 1, 48, (3, 4, 4))),
        (Normalize([0.1, 0.2, 0.3], [1.0, 1.0, 1.0]), state(1.0, 0.1, 1, 16, (1, 4, 4))),  # one channel becomes three
        (AddPositions(3, 1), state(1.0, 0.1, 3, 8)),
    ],
)  # fmt: skip
def test_broadcasting_is_refused(layer, before) -> None:
    with pytest.raises(BadInput, match=r"match|as many"):
        step(layer, before)


def test_modes_of_shared_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model.train()
    model[1].eval()
    as_chain(model)
    assert model.training and model[0].training and not model[1].training


@pytest.mark.parametrize("layer", [Attention(4, 2), MeanTokens(), AddPositions(9, 4)])
def test_layers_of_tokens_refuse_vectors(layer) -> None:
    """On (N, D) they would take the batch for a sequence, and samples would change each other."""
    with pytest.raises(BadInput, match="tokens"):
        layer(torch.rand(3, 4))


def test_integer_inputs_have_no_input_ball() -> None:
    """A token id does not move by 0.1; the rule of Embedding would answer that nothing can change."""
    model = Chain(nn.Embedding(9, 4), MeanTokens(), nn.Linear(4, 3))
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(BadInput, match="floating-point"):
        certify(model, ids, torch.zeros(2, dtype=torch.long), InputBall("l2"))
    late = Chain(nn.Identity(), nn.Embedding(9, 4), MeanTokens(), nn.Linear(4, 3))
    with pytest.raises(BadInput, match="before an Embedding"):
        certify(late, ids, late(ids).argmax(-1), WeightBall())
    with pytest.raises(BadInput, match="floating-point"):
        images = torch.ones(2, 1, 2, 2, dtype=torch.uint8)
        certify(nn.Sequential(Normalize(0.0, 255.0), nn.Flatten(), nn.Linear(4, 3)), images, torch.zeros(2).long(), InputBall())


def test_signs_of_scales_make_no_bound_negative() -> None:
    """Loaded weights and attributes are not what the constructor checked: a negative std would shrink the change it multiplies."""
    layer = Normalize([0.0, 0.0], [1.0, 1.0])
    layer.load_state_dict({"mean": torch.zeros(2), "std": torch.tensor([-0.125, 1.0])})
    assert float(step(layer, state(1.0, 1.0, 1, 2)).change) >= 8
    layer.std[0] = 0.0
    with pytest.raises(BadInput, match="std"):
        step(layer, state(1.0, 1.0, 1, 2))
    gelu, attention = ScaledGELU(), Attention(4, 2)
    gelu.divisor, attention.scale = -1.1289, -4.0
    with pytest.raises(BadInput, match="divisor above 0"):
        step(gelu, state(1.0, 1.0, 3, 4))
    bound = float(step(attention, state(1.0, 1e-3, 3, 4)).change)
    attention.scale = 4.0
    assert bound == float(step(attention, state(1.0, 1e-3, 3, 4)).change) > 0


def test_embeddings_that_rewrite_themselves_are_refused() -> None:
    with pytest.raises(UnsupportedLayer, match="max_norm"):
        step(nn.Embedding(5, 4, max_norm=1.0), state(1.0, 0.0, 3, 1))


def test_overflow_of_a_projection_is_seen() -> None:
    """Queries that overflow float16 although the logits would be small: the executed program answers NaN inside the domain."""
    layer = Attention(4, 1, rope=False, causal=False).half().requires_grad_(False)
    for name, scale in (("query", 200.0), ("key", 1e-4), ("value", 1.0), ("output", 1.0)):
        getattr(layer, name).weight.copy_(scale * torch.eye(4))
    x = torch.zeros(1, 2, 4).half()
    x[..., 0] = 400.0
    assert not torch.isfinite(layer(x)).all()
    assert step(layer, state(400.0, 1.0, 2, 4), torch.float16).rounding == torch.inf
    values = copy.deepcopy(layer)
    values.query.weight.mul_(1e-5)
    values.value.weight.mul_(200.0)
    values.output.weight.mul_(1e-5)
    assert step(values, state(400.0, 1.0, 2, 4), torch.float16).rounding == torch.inf


def test_tiny_weights_do_not_vanish() -> None:
    tiny = torch.full((3, 4), 1e-200, dtype=torch.float64)
    assert float(infinity_to_two_bound(tiny)) >= 4e-200 * 3**0.5
    assert float(one_to_two_bound(tiny)) >= 1e-200 * 3**0.5
    layer = Attention(4, 2, rope=False, output_scale=1.0).double().requires_grad_(False)
    layer.value.weight.copy_(1e-100 * torch.eye(4, dtype=torch.float64))
    assert float(step(layer, state(1.0, 1e-100, 2, 4)).change) >= 0.5e-200 * float(torch.linalg.matrix_norm(layer.output.weight, 2))
    # Rows of the head whose squares vanish: the margin of the identity over its rivals is worth 1e-200 each.
    model = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(1e-200 * torch.eye(3, dtype=torch.float64))
    x = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64)
    radius = certify(model, x, torch.tensor([0]), InputBall("l2")).radius
    assert radius[0] <= 1 / 2**0.5


def test_attention_without_a_bounded_domain_has_no_bound_for_all_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Attention(4, 2), MeanTokens(), nn.Linear(4, 3))
    with pytest.raises(BadInput, match="size"):
        lipschitz_bound(model)
    x = torch.rand(2, 3, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.3)
    assert "model_l2" not in certify(model, x, model(x).argmax(-1), InputBall("l2")).bound


def test_bounds_of_wide_models_in_low_precision_are_numbers() -> None:
    """300 products in bfloat16 have no rounding bound, but the constant is of exact arithmetic."""
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 3)).to(torch.bfloat16)
    assert 0 < lipschitz_bound(model)["l2"] < 10


def test_constants_follow_scales_as_well() -> None:
    """A residual weight is no tensor: a constant remembered by the weights alone would be stale."""
    model = Chain(nn.Linear(4, 4), Residual(nn.Linear(4, 4), skip=1.0, weight=1.0), nn.Linear(4, 3))
    x = torch.rand(2, 4)
    before = certify(model, x, model(x).argmax(-1), InputBall("l2")).bound["model_l2"]
    model[1].weight = 50.0
    after = certify(model, x, model(x).argmax(-1), InputBall("l2")).bound["model_l2"]
    assert after > 5 * before
    assert after == lipschitz_bound(model)["l2"]


def test_autocast_and_lower_products_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.rand(2, 4)
    y = model(x).argmax(-1)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(BadInput, match="autocast"):
        certify(model, x, y, InputBall("l2"))
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(BadInput, match="highest"):
            certify(model, x, y, InputBall("l2"))
        assert (certify(model, x, y, InputBall("l2"), dtype="real").radius > 0).all()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (certify(model, x, y, InputBall("l2")).radius > 0).all()


@pytest.mark.parametrize("layer", [nn.LayerNorm(4, eps=0.0), nn.RMSNorm(4), nn.RMSNorm(4, eps=0.0)])
def test_normalisation_without_an_eps_is_refused(layer) -> None:
    with pytest.raises(UnsupportedLayer, match="eps"):
        step(layer, state(1.0, 0.1, 3, 4))


def test_train_mode_is_abstained_where_it_matters() -> None:
    torch.manual_seed(0)
    x = torch.rand(5, 4)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 3)).train()
    assert (certify(plain, x, plain(x).argmax(-1), InputBall("l2")).radius > 0).all() and plain.training
    for layer in (nn.Dropout(0.5), nn.BatchNorm1d(8), nn.AlphaDropout(0.1)):
        model = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3)).train()
        before = copy.deepcopy(model.state_dict())
        y = copy.deepcopy(model).eval()(x).argmax(-1)
        certificate = certify(model, x, y, InputBall("l2"))
        assert certificate.status == ("abstained",) * 5 and (certificate.radius == 0).all()
        assert set(certificate.reason) == {"the model is in train mode; call model.eval()"}
        assert model.training and layer.training
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name])
        assert (certify(model.eval(), x, y, InputBall("l2")).radius > 0).all()
        model.train()
        layer.eval()  # frozen: only the mode of the layers that behave otherwise counts, and it comes back as it was
        assert (certify(model, x, y, InputBall("l2")).radius > 0).all()
        assert model.training and not layer.training


def test_inputs_outside_the_stated_range_are_abstained() -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(4, 3))
    x = torch.rand(4, 4)
    x[1, 2], x[2, 0] = 1.5, -0.1
    y = model(x).argmax(-1)
    assert (certify(model, x, y, InputBall("l2")).radius > 0).all()
    model.input_range = (0.0, 1.0)
    certificate = certify(model, x, y, InputBall("l2"))
    assert certificate.status == ("certified", "abstained", "abstained", "certified")
    assert "(0.0, 1.0)" in certificate.reason[1] and certificate.reason[0] == ""


def test_weights_of_no_size_and_of_odd_dtypes_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3))
    with pytest.raises(BadInput, match="at least one output"):
        certify(model, torch.rand(1, 4), torch.tensor([0]), InputBall("l2"))
    with pytest.raises(BadInput, match="float8"):
        certify(nn.Sequential(nn.Linear(4, 3)).to(torch.float8_e4m3fn), torch.rand(1, 4), torch.tensor([0]), InputBall("l2"))


def test_degenerate_attention_is_bounded() -> None:
    """T = 1, heads of zero weights, a negative output scale, an empty domain."""
    for heads, scale in ((1, -2.0), (4, 1.0)):
        layer = Attention(8, heads, output_scale=scale).double().requires_grad_(False)
        layer.query.weight[:2] = 0
        layer.value.weight[2:4] = 0
        bound = float(step(layer, state(2.0, 0.5, 1, 8)).change)
        x, delta = torch.randn(200, 1, 8).double(), torch.randn(200, 1, 8).double()
        x, delta = 1.5 * x / x.norm(dim=-1, keepdim=True), 0.5 * delta / delta.norm(dim=-1, keepdim=True)
        assert float((layer(x + delta) - layer(x)).norm(dim=-1).max()) <= bound
        assert float(step(layer, state(0.0, 0.0, 1, 8)).change) == 0.0
