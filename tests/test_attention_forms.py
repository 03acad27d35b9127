"""Attention of other models: the layer computes the same bits, the bounds hold under attack, and unsupported forms are refused.

The contracts of rules and expansions (test_rules_contract.py, test_local.py) have these forms among their cases too.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_forms import ALL, FORMS, WIDTH, band, form, holes, tables
from processors import flushing
from test_local import attacked
from torch import Tensor, nn

from robustlip.attacks.audit.witness import _describe
from robustlip.attacks.formulas import layer_claim
from robustlip.attacks.minnorm import MinimumRadius
from robustlip.attacks.pgd import PGD
from robustlip.attacks.weight_space import matrices_of
from robustlip.attacks.worst_weights import worst_attention_like
from robustlip.certifiers import certify
from robustlip.checks import check_finite_weights
from robustlip.constraints.targets import targets_of
from robustlip.domains.expansion import Ball, ChainExpansion, Scope
from robustlip.domains.norms import Context, State, rule_for
from robustlip.errors import BadInput
from robustlip.layers import Attention, NextTokenChain, Residual, Shift
from robustlip.layers.attention import rotate_half
from robustlip.numerics.arithmetic import Arithmetic
from robustlip.numerics.spectral import spectral_norm_quick
from robustlip.ops.affine import offset_error
from robustlip.threats import EmbeddingBall

LENGTH = 5
TRIL = torch.ones(LENGTH, LENGTH).tril()


def state(norm: float, change: float, length: int = LENGTH, width: int = WIDTH) -> State:
    one = torch.ones(1, dtype=torch.float64)
    return State(norm * one, change * one, 0 * one, "l2", length, width)


def stepped(layer: Attention, before: State, dtype: torch.dtype = torch.float64, weight_radius: float | None = None) -> State:
    radius = None if weight_radius is None else torch.full((1,), weight_radius, dtype=torch.float64)
    return rule_for(layer).step(layer, before, Context(dtype, {}, weight_radius=radius))


# ---- the program


def heads_of(x: Tensor, d: int) -> Tensor:
    return x.view(*x.shape[:-1], -1, d).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().view(len(x), x.shape[2], -1)


def nanogpt(layer: Attention, x: Tensor) -> Tensor:
    """github.com/karpathy/nanoGPT, model.py, CausalSelfAttention without flash."""
    q, k, v = (heads_of(part, 4) for part in layer.projection(x).split(16, dim=2))
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(TRIL.view(1, 1, LENGTH, LENGTH) == 0, float("-inf"))
    return layer.output(merged(F.softmax(att, dim=-1) @ v))


def llama(layer: Attention, x: Tensor) -> Tensor:
    """transformers, modeling_llama.py: rotary tables, repeat_kv, sdpa."""
    cos, sin = (table.unsqueeze(1) for table in tables(LENGTH, 4))
    q, k, v = (heads_of(part(x), 4) for part in (layer.query, layer.key, layer.value))
    q, k = (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)
    k, v = (z[:, :, None].expand(len(x), 2, 2, LENGTH, 4).reshape(len(x), 4, LENGTH, 4) for z in (k, v))
    return layer.output(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=4**-0.5)))


def gpt2(layer: Attention, x: Tensor) -> Tensor:
    """transformers, modeling_gpt2.py, eager: divided by a tensor, the mask added."""
    q, k, v = (heads_of(part, 4) for part in layer.projection(x).split(16, dim=2))
    weights = torch.matmul(q, k.transpose(-1, -2))
    weights = weights / torch.full([], v.size(-1) ** 0.5, dtype=weights.dtype)
    hidden = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(TRIL == 0, torch.finfo(torch.float32).min)
    return layer.output(merged(torch.matmul(F.softmax(weights + hidden, dim=-1), v)))


def distilbert(layer: Attention, x: Tensor) -> Tensor:
    """transformers, modeling_distilbert.py, eager: queries divided, the mask filled with the least number."""
    q, k, v = (heads_of(part(x), 4) for part in (layer.query, layer.key, layer.value))
    scores = torch.matmul(q / math.sqrt(4), k.transpose(2, 3)).masked_fill(~holes(LENGTH), torch.finfo(torch.float32).min)
    return layer.output(merged(torch.matmul(F.softmax(scores, dim=-1), v)))


def vit(layer: Attention, x: Tensor) -> Tensor:
    """timm, vision_transformer.py, fused."""
    q, k, v = layer.projection(x).reshape(len(x), LENGTH, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return layer.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), LENGTH, 16))


def bert(layer: Attention, x: Tensor) -> Tensor:
    """transformers, modeling_bert.py, sdpa with a padding mask: the output projection is BertSelfOutput's."""
    q, k, v = (heads_of(part(x), 4) for part in (layer.query, layer.key, layer.value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=band(LENGTH)).transpose(1, 2).reshape(len(x), LENGTH, 16)


def multihead(layer: Attention, x: Tensor) -> Tensor:
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.in_proj_weight, theirs.in_proj_bias = layer.projection.weight, layer.projection.bias
    theirs.out_proj.weight, theirs.out_proj.bias = layer.output.weight, layer.output.bias
    return theirs(x, x, x, need_weights=False)[0]


NO_ROPE = {"rope": False, "output_scale": 1.0}
PROGRAMS: dict[str, tuple[Callable[[], Attention], Callable[[Attention, Tensor], Tensor]]] = {
    "nanogpt": (
        lambda: Attention(16, 4, joined=True, biases=ALL, explicit="logits", logit_scale=0.5, mask=TRIL.bool(), mask_fill=True, **NO_ROPE), nanogpt,
    ),
    "llama": (lambda: Attention(16, 4, key_heads=2, logit_scale=0.5, angles=tables(LENGTH, 4), output_scale=1.0), llama),
    "gpt2": (
        lambda: Attention(
            16, 4, joined=True, biases=ALL, explicit="divide", divisor=2.0, mask=torch.zeros(5, 5).masked_fill(TRIL == 0, -torch.inf), **NO_ROPE
        ), gpt2,
    ),
    "distilbert": (
        lambda: Attention(16, 4, biases=ALL, explicit="query", divisor=2.0, mask=holes(LENGTH), mask_fill=True, **NO_ROPE), distilbert,
    ),
    "vit": (lambda: Attention(16, 4, joined=True, biases=ALL, logit_scale=0.5, causal=False, **NO_ROPE), vit),
    "bert": (lambda: Attention(16, 4, biases=(*ALL[:3], False), logit_scale=0.5, mask=band(LENGTH), rope=False, output=False), bert),
    "multihead": (lambda: Attention(16, 4, joined=True, biases=ALL, logit_scale=0.5, causal=False, **NO_ROPE), multihead),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_is_theirs_to_the_bit(name) -> None:
    torch.manual_seed(0)
    build, theirs = PROGRAMS[name]
    layer = build().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(7, LENGTH, 16)
    assert torch.equal(layer(x), theirs(layer, x))


def test_the_papers_layer_prints_and_keeps_what_it_did() -> None:
    layer = Attention(16, 4, scale=2.0, distance_bias=3)
    printed = "width=16, heads=4, scale=2.0, causal=True, rope=True, output_scale=0.3333333333333333, distance_bias=3"
    assert layer.extra_repr() == printed and layer.is_papers
    assert list(layer.state_dict()) == ["distance_bias", "query.weight", "key.weight", "value.weight", "output.weight"]
    for name in FORMS:
        other = FORMS[name](LENGTH)
        assert not other.is_papers and other.extra_repr() != printed
        assert other.state_dict().keys() == copy.deepcopy(other).double().state_dict().keys()


# ---- single tokens


@pytest.mark.parametrize("name", FORMS)
def test_a_single_token_of_every_form_agrees_with_all_and_is_never_exceeded(name) -> None:
    torch.manual_seed(1)
    layer = form(name, LENGTH, 2.0, 2.0).double().requires_grad_(False)
    n, position = 30, 2  # two tokens on either side
    x = torch.randn(n, LENGTH, WIDTH, dtype=torch.float64)
    x[:10] *= 0.1
    full = ChainExpansion([layer], x, Scope(Context(torch.float64, {})))
    rows = full.at_rows(torch.arange(n), torch.full((n,), position), torch.zeros(n, LENGTH, dtype=torch.float64))
    torch.testing.assert_close(rows.clean, full.clean[:, position : position + 1])
    seen = rows.parts[0].seen.expand(n, layer.heads, 1, LENGTH)
    assert torch.equal(seen[:, :, 0], layer.seen(LENGTH)[..., position, :].expand(n, layer.heads, LENGTH))
    assert torch.equal(seen, rows.parts[0].p > 0)
    g = torch.randn(2, n, 1, layer.out_width, dtype=torch.float64)
    spread = torch.zeros(2, n, LENGTH, layer.out_width, dtype=torch.float64)
    spread[:, :, position : position + 1] = g
    torch.testing.assert_close(rows.adjoint(g)[0], full.adjoint(spread)[0][:, :, position : position + 1], rtol=1e-9, atol=1e-9)

    def function(v: Tensor) -> Tensor:
        return layer(torch.cat([x[:, :position], v, x[:, position + 1 :]], 1))[:, position : position + 1]

    result = attacked(rows, function, x[:, position : position + 1])
    assert result.largest() <= 1 + 1e-9, result
    assert float(result.radius.amax()) > 0.1


@pytest.mark.parametrize("name", FORMS)
def test_certified_radii_of_models_with_every_form_withstand_attacks(name) -> None:
    torch.manual_seed(5)
    layer = form(name, LENGTH, 1.0, 1.0)
    parts: dict[str, nn.Module] = {"rows": nn.Embedding(7, WIDTH), "block": Residual(layer) if layer.out_width == WIDTH else layer}
    model = NextTokenChain(OrderedDict(parts, head=nn.Linear(layer.out_width, 7)))
    model.vocabulary = "abcdefg"
    x = torch.randint(7, (6, LENGTH))
    y = model.scores(x).argmax(-1)
    threat = EmbeddingBall(tokens=(LENGTH - 1,)) if name in ("shared", "logits", "query") else EmbeddingBall()
    radii = {method: certify(model, x, y, threat, method).radius for method in ("global", "local", "dual")}
    assert (radii["dual"] > 0).all() and (radii["dual"] >= 0.9 * radii["local"]).all() and (radii["local"] > radii["global"]).any()
    broken = MinimumRadius(attack=PGD(steps=8, restarts=1, size=0.5), steps=3, descent=20)(model, x, y, threat).radius
    assert all((radius <= broken).all() for radius in radii.values())


# ---- biases, at their worst


def capped(matrix: Tensor, size: float) -> Tensor:
    return matrix * size / torch.linalg.matrix_norm(matrix, 2)


@pytest.mark.parametrize("which", ["key", "query"])
def test_biases_count_where_an_adversary_chooses_the_weights(which) -> None:
    """Rotary positions, one head; a matrix of norm 0.01 whose bias has norm 8, so that nearly all the bound allows comes from the bias."""
    layer = Attention(4, 1, causal=False, output_scale=1.0, scale=2.0, biases=(True, True, False, False)).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    sizes = {"query": 1.0, "key": 1.0, "value": 1.0, "output": 1.0, which: 0.01}
    raw, offsets, x, delta = {n: draw(4, 4) for n in sizes}, {n: draw(4) for n in ("query", "key")}, draw(8, 2, 4), draw(8, 2, 4)
    radius, domain, best = 1e-3, 1.0, 0.0
    optimizer = torch.optim.Adam([*raw.values(), *offsets.values(), x, delta], lr=0.05)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        for _ in range(250):
            weights = {f"{n}.weight": capped(w, sizes[n]) for n, w in raw.items()}
            weights |= {f"{n}.bias": b / b.norm() * (8.0 if n == which else 1e-3) for n, b in offsets.items()}
            clean = x * ((domain - radius) / x.norm(dim=-1, keepdim=True)).clamp_max(1.0)
            moved = clean + radius * F.normalize(delta, dim=-1)
            change = (torch.func.functional_call(layer, weights, (moved,)) - torch.func.functional_call(layer, weights, (clean,))).norm(dim=-1)
            if float(change.detach().max()) > best:
                best, kept = float(change.detach().max()), {n: w.detach().clone() for n, w in weights.items()}
            optimizer.zero_grad()
            (-change.amax(-1).sum()).backward()
            optimizer.step()
    layer.load_state_dict(kept)
    bound = float(stepped(layer, state(domain, radius, 2, 4)).change)
    without = copy.deepcopy(layer)
    without.get_parameter(f"{which}.bias").zero_()
    assert best <= bound < 3 * best
    assert best > 1.02 * float(stepped(without, state(domain, radius, 2, 4)).change)


def test_a_bias_of_keys_moves_nothing_without_rotations_and_a_bias_of_values_never() -> None:
    torch.manual_seed(0)
    layer = form("logits", LENGTH, 1.0, 1.0)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        layer.key.bias.mul_(1e6)
        layer.value.bias.mul_(1e6)
    before = state(1.0, 0.1)
    assert torch.equal(stepped(layer, before).change, stepped(plain, before).change)
    assert float(stepped(layer, before).norm) > 1e4 * float(stepped(plain, before).norm)


def test_sizes_with_biases_are_attained() -> None:
    """Nothing but biases, of values and of the output, in one direction; and a change of the output matrix meets the value's bias."""
    layer = Attention(4, 2, key_heads=1, rope=False, biases=ALL, output_scale=-2.0).double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.zero_()
    layer.value.bias[0] = 3.0
    layer.output.weight[:, 0] = torch.tensor([0.5, 0, 0, 0])
    layer.output.weight[:, 2] = torch.tensor([0.5, 0, 0, 0])
    layer.output.bias[0] = 7.0
    x = torch.randn(4, LENGTH, 4, dtype=torch.float64)
    size = float(layer(x).norm(dim=-1).max())
    assert size == pytest.approx(20.0)
    behind = stepped(layer, state(float(x.norm(dim=-1).max()), 0.0, width=4))
    assert size <= float(behind.norm) <= size * (1 + 1e-6) and float(behind.change) == 0
    sigma = float(torch.linalg.matrix_norm(layer.output.weight, 2))
    direction = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64) / math.sqrt(2)
    changed = copy.deepcopy(layer)
    changed.output.weight[1] += 0.1 * sigma * direction
    moved = float((changed(x) - layer(x)).norm(dim=-1).max())
    assert moved == pytest.approx(2 * 0.1 * sigma * 3 * math.sqrt(2))
    before = state(float(x.norm(dim=-1).max()), 0.0, width=4)
    assert moved <= float(stepped(layer, before, weight_radius=0.1).change) * (1 + 1e-9) < 1.01 * moved
    expansion = ChainExpansion([layer], x, Scope(Context(torch.float64, {})))
    ball = Ball.of(torch.zeros(4, LENGTH, dtype=torch.float64), torch.full((4,), 0.1, dtype=torch.float64))
    assert bool((expansion.advance(ball).radius >= moved * (1 - 1e-12)).all())


def test_a_joined_projection_changes_as_one_matrix() -> None:
    """A change of norm ε·σ(projection) may fall on the values alone, whose own matrix is far smaller."""
    torch.manual_seed(0)
    layer = Attention(WIDTH, 2, joined=True, output_scale=1.0).double().requires_grad_(False)
    layer.projection.weight[: 2 * WIDTH] *= 1e-6
    layer.projection.weight[: 2 * WIDTH, 0] += 5.0
    layer.projection.weight[2 * WIDTH :] *= 1e-3
    x = torch.randn(3, LENGTH, WIDTH, dtype=torch.float64)
    x[:, 1:] = x[:, :1]
    changed = copy.deepcopy(layer)
    sigma = float(torch.linalg.matrix_norm(layer.projection.weight, 2))
    vh = torch.linalg.svd(layer.output.weight).Vh
    changed.projection.weight[2 * WIDTH :] += 0.1 * sigma * torch.outer(vh[0], F.normalize(x[0, 0], dim=0))
    moved = (changed(x) - layer(x)).norm(dim=-1)[0]
    before = state(float(x[0, 0].norm()), 0.0)
    assert float(moved.max()) <= float(stepped(layer, before, weight_radius=0.1).change)
    assert float(moved.max()) > 0.5 * 0.1 * sigma * float(x[0, 0].norm()) * float(torch.linalg.matrix_norm(layer.output.weight, 2))
    expansion = ChainExpansion([layer], x, Scope(Context(torch.float64, {})))
    ball = Ball.of(torch.zeros(3, LENGTH, dtype=torch.float64), torch.full((3,), 0.1, dtype=torch.float64))
    assert bool((expansion.advance(ball).radius[0] >= moved).all())
    assert [tuple(w.shape) for w in matrices_of(layer).values()] == [(3 * WIDTH, WIDTH), (WIDTH, WIDTH)]


# ---- rounding

LOST = 0.49 * 2.0**-23  # what is added to 1 and rounds to 1 again
LONG = 8192


def begun_with_bias(linear: nn.Linear, x: Tensor) -> Tensor:
    """float32: the bias, and the products added to it one after the other."""
    total = linear.bias.expand(*x.shape[:-1], -1)
    for n in range(x.shape[-1]):
        total = total + linear.weight[:, n] * x[..., n : n + 1]
    return total


def long_sum(which: str) -> tuple[Attention, Tensor]:
    """A layer that adds 8192 products of LOST to a bias of 1 in that projection, and two tokens for which the rounding error is visible."""
    wide = which == "output"
    layer = Attention(2 if wide else LONG, 1, head_width=LONG if wide else 2, rope=False, causal=False, logit_scale=1.0, output_scale=1.0, biases=ALL)
    x = torch.full((1, 2, layer.width), LOST / 1e-4)
    x[0, 1] *= -1
    x[0, :, 0] = torch.tensor([1.0, -1.0])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        getattr(layer, which).bias.fill_(1.0)
        if wide:
            layer.value.bias.fill_(1e-4)
            layer.output.weight.fill_(LOST / 1e-4)
        else:
            getattr(layer, which).weight[:, 1:] = 1e-4
            layer.output.weight[:2] = torch.eye(2)
            if which != "value":
                layer.value.weight[:, 0] = 1.0
                getattr(layer, "key" if which == "query" else "query").weight[0, 0] = 1.0
    return layer.requires_grad_(False), x


@pytest.mark.parametrize("which", ["query", "key", "value", "output"])
def test_sums_that_begin_with_a_bias_are_covered(which) -> None:
    """The order of a sum depends on the kernel; if it starts with the bias, every partial sum rounds at its size. Everything else is exact here."""
    layer, x = long_sum(which)
    exact = copy.deepcopy(layer).double()

    class Begun(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            return begun_with_bias(self, z.float()).double()

    executed = copy.deepcopy(exact)
    projection = Begun(*reversed(getattr(layer, which).weight.shape))
    projection.load_state_dict(getattr(layer, which).state_dict())
    setattr(executed, which, projection)
    error = float((executed(x.double()) - exact(x.double())).detach().norm(dim=-1).max())
    assert error > 1000 * 2.0**-24
    behind = stepped(layer, state(float(x.norm(dim=-1).max()) * (1 + 1e-6), 0.0, 2, layer.width), torch.float32)
    assert error <= float(behind.rounding) < 100 * error
    expansion = ChainExpansion([exact], x.double(), Scope(Context(torch.float32, {})))
    assert error <= float(expansion.advance(Ball.of(torch.zeros(1, 2, dtype=torch.float64))).radius.max()) < 100 * error


def test_numbers_of_a_mask_round_the_logits() -> None:
    """±4096 added to logits near 1: float32 keeps them to 2⁻¹², and the bound has to include this error."""
    torch.manual_seed(0)
    mask = 4096 + torch.rand(LENGTH, LENGTH)
    layer = Attention(WIDTH, 1, rope=False, mask=mask, logit_scale=1.0, output_scale=1.0).requires_grad_(False)
    x = torch.randn(200, LENGTH, WIDTH)
    exact = copy.deepcopy(layer).double()
    error = float((layer(x).double() - exact(x.double())).norm(dim=-1).max())
    behind = stepped(layer, state(float(x.norm(dim=-1).max()), 0.0), torch.float32)
    assert 2e-5 < error <= float(behind.rounding)
    expansion = ChainExpansion([exact], x.double(), Scope(Context(torch.float32, {})))
    assert error <= float(expansion.advance(Ball.of(torch.zeros(200, LENGTH, dtype=torch.float64))).radius.max())


def test_what_a_mask_hides_by_a_number_is_hidden_from_small_logits_only() -> None:
    """−10³⁰ hides nothing from logits of that size: the second key, hidden from the first query, wins there."""
    mask = torch.tensor([[0.0, -1e30], [0.0, 0.0]])
    for depth, size in ((1e30, 1e15), (1e30, 1e14), (math.inf, 1e15)):
        hidden = mask.masked_fill(mask < 0, -depth)
        layer = Attention(2, 1, rope=False, mask=hidden, logit_scale=1.0, output_scale=1.0, biases=(True, True, False, False)).requires_grad_(False)
        for parameter in layer.parameters():
            parameter.zero_()
        layer.query.bias[0] = size
        layer.key.weight[0, 0] = 1.5 * size
        layer.value.weight.copy_(torch.eye(2))
        layer.output.weight.copy_(torch.eye(2))
        x = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        seen = float(layer(x)[0, 0, 0])
        behind = stepped(layer, state(1.0, 0.0, 2, 2), torch.float32)
        expansion = ChainExpansion([copy.deepcopy(layer).double()], x.double(), Scope(Context(torch.float32, {})))
        radius = expansion.advance(Ball.of(torch.zeros(1, 2, dtype=torch.float64))).radius
        assert float(behind.rounding) == torch.inf  # logits of that size are lost to rounding as a whole
        if size == 1e15 and depth == 1e30:
            assert seen == 1.0 and float(radius.amax()) == torch.inf
        else:
            assert seen == 0.0 and bool(torch.isfinite(radius).all())


def test_products_of_weights_and_values_that_vanish_are_counted() -> None:
    """Uniform weights 1/T times values just below T of the smallest normal numbers, where processors take subnormals for zero: all is lost."""
    length, width = 3000, 16
    for explicit in (None, "logits"):
        layer = Attention(width, 1, rope=False, causal=False, output_scale=1.0, explicit=explicit).requires_grad_(False)
        for parameter in layer.parameters():
            parameter.zero_()
        layer.value.weight.copy_(torch.eye(width))
        layer.output.weight.copy_(torch.eye(width))
        x = torch.full((1, length, width), 0.99 * length * 2.0**-126)
        truth = copy.deepcopy(layer).double()(x.double())
        with flushing(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            made = layer(x)
        error = float((made.double() - truth).norm(dim=-1).max())
        assert float(made.abs().max()) == 0 and error > 0
        assert error <= float(stepped(layer, state(float(x[0, 0].norm()), 0.0, length, width), torch.float32).rounding)


@pytest.mark.parametrize("explicit", [None, "query"])
def test_queries_that_vanish_are_counted(explicit) -> None:
    """Queries near the smallest normal number underflow before huge keys, if they are first multiplied by a scale of 2⁻²⁰."""
    layer = Attention(
        2, 1, rope=False, causal=False, explicit=explicit, logit_scale=2.0**-20, output_scale=1.0, biases=(True, False, False, False)
    ).requires_grad_(False)  # fmt: skip
    for parameter in layer.parameters():
        parameter.zero_()
    layer.query.bias[0] = 1.9 * 2.0**-107
    layer.key.weight[0, 0] = 2.0**122
    layer.value.weight.copy_(torch.eye(2))
    layer.output.weight.copy_(torch.eye(2))
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    truth = copy.deepcopy(layer).double()(x.double())
    with flushing():
        error = float((layer(x).double() - truth).norm(dim=-1).max())
    assert error <= float(stepped(layer, state(1.0, 0.0, 2, 2), torch.float32).rounding) < torch.inf
    assert error > 0.01 or explicit is None
    scope, still = Scope(Context(torch.float32, {})), torch.zeros(1, 2, dtype=torch.float64)
    assert error <= float(ChainExpansion([copy.deepcopy(layer).double()], x.double(), scope).advance(Ball.of(still)).radius.max()) < torch.inf


def test_a_bias_adds_no_more_than_said_in_any_order() -> None:
    """`offset_error` against float32 sums in 20 random orders, the bias at any place among the products."""
    torch.manual_seed(0)
    terms = torch.full((256, 9), LOST)
    for _ in range(20):
        order = torch.randperm(257)
        numbers = torch.cat([torch.ones(1, 9), terms])[order]
        total = numbers[0]
        for number in numbers[1:]:
            total = total + number
        error = float((total.double() - numbers.double().sum(0)).norm())
        assert error <= float(offset_error(3.0, torch.tensor(256 * LOST * 3, dtype=torch.float64), 256, 9, Arithmetic(torch.float32)))


# ---- one function, two forms


def test_forms_of_one_function_have_the_same_bounds() -> None:
    torch.manual_seed(0)
    old = Attention(16, 4, rope=False, scale=2.0, output_scale=1.0).double().requires_grad_(False)
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(TRIL == 0, -torch.inf)
    joined = Attention(16, 4, rope=False, joined=True, logit_scale=0.5, mask=mask, output_scale=1.0, head_width=4).double().requires_grad_(False)
    joined.projection.weight.copy_(torch.cat([old.query.weight, old.key.weight, old.value.weight]))
    joined.output.weight.copy_(old.output.weight)
    x = torch.randn(3, LENGTH, 16, dtype=torch.float64)
    before, context = state(3.0, 0.2, width=16), Context(torch.float32, {})
    a, b = stepped(old, before, torch.float32), stepped(joined, before, torch.float32)
    assert (a.norm, a.change, a.rounding) == (b.norm, b.change, b.rounding)
    for radius in (1e-3, 0.5):
        ball = Ball.of(torch.full((3, LENGTH), radius, dtype=torch.float64))
        one, two = (ChainExpansion([layer], x, Scope(Context(torch.float32, {}))).advance(ball) for layer in (old, joined))
        assert torch.equal(one.radius, two.radius) and torch.equal(one.error, two.error)
    # Shared heads, and the same heads written out; a table of angles, and the angles.
    shared = Attention(16, 4, key_heads=2, angles=tables(LENGTH, 4), output_scale=1.0).double().requires_grad_(False)
    written = Attention(16, 4, output_scale=1.0).double().requires_grad_(False)
    for name, matrix in shared.matrices().items():
        repeated = matrix.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1) if name in ("key", "value") else matrix
        written.get_parameter(f"{name}.weight").copy_(repeated)
    cos, sin = tables(LENGTH, 4)
    table = Attention(16, 4, angles=(cos, sin), output_scale=1.0).double().requires_grad_(False)
    table.load_state_dict(written.state_dict(), strict=False)
    for layers, close in (((shared, table), 0.0), ((table, written), 0.4)):  # base 100 against 10,000: norms agree, logits do not
        norms = [stepped(layer, before, torch.float32) for layer in layers]
        torch.testing.assert_close(norms[0].change, norms[1].change, rtol=1e-6, atol=0.0)
        radii = [ChainExpansion([layer], x, Scope(context)).advance(ball).radius for layer in layers]
        torch.testing.assert_close(radii[0], radii[1], rtol=1e-9 + close, atol=0.0)


# ---- refusals


REFUSED = {
    "heads": (dict(key_heads=3), "key_heads that divide"),
    "width": (dict(head_width=0), "head_width 0"),
    "biases": (dict(biases=(True, True)), "biases of query"),
    "joined-biases": (dict(joined=True, biases=(True, False, True, False)), "joined projection's the first"),
    "explicit": (dict(explicit="softmax"), "'logits', 'query', 'divide'"),
    "no-divisor": (dict(explicit="divide"), "expected a divisor"),
    "divisor": (dict(divisor=2.0), "expected a divisor"),
    "divisor-0": (dict(explicit="divide", divisor=0.0), "divisor between"),
    "scale-nan": (dict(logit_scale=math.nan), "logit_scale between"),
    "two-scales": (dict(logit_scale=1.0, scale=2.0), "one of scale"),
    "rope": (dict(rope=True, angles=tables(5, 2)), "in the place of rope"),
    "causal": (dict(causal=True, mask=holes(5)), "put it into the mask"),
    "causal-explicit": (dict(causal=True, explicit="logits"), "put it into the mask"),
    "distance": (dict(distance_bias=2, mask=holes(5)), "add it to the mask"),
    "fill": (dict(mask=holes(5), mask_fill=True), "explicit kernel"),
    "fill-numbers": (dict(mask=torch.rand(5, 5), mask_fill=True, explicit="logits"), "0 and −inf"),
    "output": (dict(output=False, output_scale=2.0), "without an output projection"),
    "output-bias": (dict(output=False, biases=ALL), "without an output projection"),
    "mask-shape": (dict(mask=torch.ones(3, 5, 5, dtype=torch.bool)), "broadcastable"),
    "mask-samples": (dict(mask=torch.ones(2, 1, 5, 5, dtype=torch.bool)), "the same for all samples"),
    "mask-integers": (dict(mask=torch.ones(5, 5, dtype=torch.int64)), "bools or of numbers"),
    "mask-nan": (dict(mask=torch.full((5, 5), math.nan)), "NaN or infinity"),
    "mask-infinite": (dict(mask=torch.full((5, 5), math.inf)), "NaN or infinity"),
    "mask-nothing": (dict(mask=torch.eye(5)[:4].bool().repeat(2, 1)[:5].logical_and(torch.arange(5) != 0)), "every token sees one"),
    "mask-least": (dict(mask=torch.full((5, 5), torch.finfo(torch.float32).min)), "every token sees one"),
    "angles-shape": (dict(angles=tables(5, 4)), "tables of angles"),
    "angles-large": (dict(angles=tables(5, 2, 1.1)), "not rotate|of the cosine and the sine"),
    "angles-halves": (dict(angles=(tables(5, 2)[0] * torch.tensor([1.0, -1.0]), tables(5, 2)[1])), "same in both halves"),
    "angles-mask": (dict(angles=tables(4, 2), mask=holes(5)), "one length"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_attention_is_refused(name) -> None:
    options, words = REFUSED[name]
    with pytest.raises(BadInput, match=words) as caught:
        Attention(WIDTH, 4, **options)
    assert "expected" in str(caught.value) and "got" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["shared", "joined"])
def test_other_lengths_than_a_mask_or_table_has_are_refused(name) -> None:
    layer = form(name, LENGTH, 1.0, 1.0)
    for length in (LENGTH - 1, LENGTH + 1):
        x = torch.randn(2, length, WIDTH, dtype=torch.float64)
        with pytest.raises(BadInput, match=f"expected {LENGTH} tokens"):
            layer(x.float())
        with pytest.raises(BadInput, match=f"expected {LENGTH} tokens"):
            stepped(layer, state(1.0, 0.1, length))
        with pytest.raises(BadInput, match=f"expected {LENGTH} tokens"):
            ChainExpansion([layer], x, Scope(Context(torch.float64, {})))


def test_masks_and_tables_that_were_changed_afterwards_are_looked_at_again() -> None:
    masked, turned = form("query", LENGTH, 1.0, 1.0), form("shared", LENGTH, 1.0, 1.0)
    masked.mask[2] = False
    with pytest.raises(BadInput, match="every token sees one"):
        stepped(masked, state(1.0, 0.1))
    turned.sin.mul_(2.0)
    with pytest.raises(BadInput, match="cosine"):
        stepped(turned, state(1.0, 0.1))


def test_who_sees_behind_itself_is_not_causal() -> None:
    seen = {name: form(name, LENGTH, 1.0, 1.0).looks_back for name in FORMS}
    assert seen == {"biases": True, "shared": True, "joined": False, "divide": False, "query": False, "logits": True}
    assert Attention(8, 2).looks_back and not Attention(8, 2, causal=False).looks_back


@pytest.mark.parametrize("name", FORMS)
def test_formulas_and_worst_weights_of_the_papers_form_refuse_others(name) -> None:
    layer = form(name, LENGTH, 1.0, 1.0)
    for ask in (
        lambda: layer_claim(layer, "newhouse2025", 1.0), lambda: layer_claim(layer, "product", 1.0), lambda: worst_attention_like(layer, domain=1.0),
        lambda: _describe(layer),
    ):  # fmt: skip
        with pytest.raises(BadInput, match="the paper's form"):
            ask()


def test_heads_are_capped_one_by_one_in_every_form() -> None:
    slices = {t.name: t.slices for t in targets_of(form("shared", LENGTH, 1.0, 1.0), 1.0)}
    assert slices == {"query.weight": 4, "key.weight": 2, "value.weight": 2, "output.weight": 1}
    slices = {t.name: t.slices for t in targets_of(form("divide", LENGTH, 1.0, 1.0), 1.0)}
    assert slices == {"projection.weight": 4, "output.weight": 1}


def test_tables_turn_by_no_more_than_they_should() -> None:
    """Tables 0.4 % too long: clean logits, and all that moves them, are ρ² too large, and one token's query and key turn together by that."""
    ones, zeros = torch.full((2, 4), 1.0 + 2.0**-8), torch.zeros(2, 4)
    layer = Attention(4, 1, angles=(ones, zeros), logit_scale=1e-3, causal=False, output_scale=1.0).double().requires_grad_(False)
    plain = Attention(4, 1, rope=False, logit_scale=1e-3 * (1 + 2.0**-8) ** 2, causal=False, output_scale=1.0).double().requires_grad_(False)
    plain.load_state_dict({n: w for n, w in layer.state_dict().items() if n not in ("cos", "sin")})
    assert torch.allclose(layer(torch.ones(1, 2, 4).double()), plain(torch.ones(1, 2, 4).double()), rtol=1e-6)
    before = state(30.0, 1e-3, 2, 4)
    assert float(stepped(layer, before).change) >= float(stepped(plain, before).change) * (1 - 1e-9)
    x = torch.randn(4, 2, 4, dtype=torch.float64)
    full = [ChainExpansion([one], x, Scope(Context(torch.float64, {}))) for one in (layer, plain)]
    every = torch.arange(4)
    rows = [f.at_rows(every, torch.ones_like(every), torch.zeros(4, 2, dtype=torch.float64)).parts[0] for f in full]
    assert bool((1e-3 * rows[0].own >= 1e-3 * (1 + 2.0**-8) ** 2 * rows[1].own * (1 - 1e-9)).all())
    for made, radii in ((full, torch.full((4, 2), 10.0)), (rows, torch.full((4, 1), 10.0))):
        one, two = (e.advance(Ball.of(radii.double())).radius for e in made)
        assert bool((one >= two * (1 - 1e-9)).all()) and bool((one <= two * 1.05).all())


def test_the_way_through_tables_is_as_long_as_they_are() -> None:
    """First-order gains of a single token's queries, keys and values: those of the matrices rotated by tables that are 0.4 % too long."""
    torch.manual_seed(0)
    layer = Attention(4, 1, angles=(torch.full((2, 4), 1.0 + 2.0**-8), torch.zeros(2, 4)), causal=False).double().requires_grad_(False)
    full = ChainExpansion([layer], torch.randn(1, 2, 4, dtype=torch.float64), Scope(Context(torch.float64, {})))
    one = torch.ones(1, dtype=torch.long)
    row = full.parts[0].at_rows(0 * one, one, torch.zeros(1, 2, dtype=torch.float64))
    m = torch.randn(1, 4, 4, dtype=torch.float64)
    way = row.with_input_map(m, torch.zeros(1, dtype=torch.float64)).input_map
    for name, factor in (("query", 1 + 2.0**-8), ("key", 1 + 2.0**-8), ("value", 1.0)):
        product = layer.matrices()[name] @ m[0]
        assert factor * float(torch.linalg.matrix_norm(product, 2)) <= float(way.gain[name])
        quick = factor * float(spectral_norm_quick(product))  # up to 2 % above the norm
        assert quick * (1 - 1e-9) <= float(way.gain[name]) <= quick * (1 + 1e-6)
    centred = (row.k - row.p @ row.k)[0, 0]
    rows = layer.logit_scale * (1 + 2.0**-8) * (centred @ layer.matrices()["query"] @ m[0]).norm(dim=-1)
    assert bool((rows * (1 - 1e-9) <= way.rows.flatten()).all()) and bool((way.rows.flatten() <= 1.01 * rows + 1e-9).all())


def test_the_largest_keys_are_those_that_a_mask_shows() -> None:
    """The first query attends only to the last key, which is large; its effect differs from that of the first key."""
    mask = torch.eye(3).flip(0).bool()
    layer = Attention(4, 1, rope=False, mask=mask, logit_scale=1.0, output_scale=1.0).double().requires_grad_(False)
    x = torch.randn(2, 3, 4, dtype=torch.float64) * torch.tensor([1.0, 1.0, 100.0], dtype=torch.float64)[:, None]
    expansion = ChainExpansion([layer], x, Scope(Context(torch.float64, {})))
    for top in (expansion.parts[0].top_value, expansion.parts[0]._top(expansion.parts[0].nk)):
        assert bool((top[..., 0] > 5 * top[..., 2]).all())
    assert torch.equal(expansion.parts[0].top_value, expansion.parts[0].nv.flip(-1))


def test_queries_that_overflow_before_they_meet_their_keys_are_seen() -> None:
    """float16: a query of 2,048 times a scale of 1,024 is infinite, though a key of 2⁻²⁰ would have made a small logit of it."""
    for explicit, fits in (("query", False), ("logits", True)):
        layer = Attention(2, 1, rope=False, explicit=explicit, logit_scale=1024.0, output_scale=1.0).requires_grad_(False)
        for parameter in layer.parameters():
            parameter.zero_()
        layer.query.weight[0, 0] = 2048.0
        layer.key.weight[0, 0] = 2.0**-20
        layer.half()
        x = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float16)
        assert bool(torch.isfinite(layer(x)).all()) is fits
        behind = stepped(layer, state(1.0, 0.0, 2, 2), torch.float16)
        radius = ChainExpansion([copy.deepcopy(layer).double()], x.double(), Scope(Context(torch.float16, {}))).advance(
            Ball.of(torch.zeros(1, 2, dtype=torch.float64))
        ).radius
        assert math.isfinite(float(behind.rounding)) is fits and bool(torch.isfinite(radius).all()) is fits


def test_masks_alone_may_hold_minus_infinity() -> None:
    layer = form("joined", LENGTH, 1.0, 1.0)
    check_finite_weights(layer)
    for value in (math.nan, math.inf):
        layer.mask[..., 0, 0] = value
        with pytest.raises(BadInput, match="NaN or infinity in mask"):
            check_finite_weights(layer)
    norm = nn.BatchNorm1d(3)
    norm.running_mean[0] = -math.inf
    shift = Shift([1.0, 2.0, 0.0])
    shift.value[1] = -math.inf
    weight = nn.Linear(2, 2)
    with torch.no_grad():
        weight.weight[0, 0] = -math.inf
    for other in (norm, shift, weight):
        with pytest.raises(BadInput, match="NaN or infinity"):
            check_finite_weights(nn.Sequential(other))
