"""Captured transformers: the same outputs bit by bit, recognised heads and tokens, radii of the model written as a Chain, attacks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustlip import capture
from robustlip.attacks import MinimumRadius
from robustlip.certifiers import certify
from robustlip.errors import UnsupportedLayer
from robustlip.graph import program
from robustlip.layers import Attention, Chain, Lookup, NextTokenChain, PrependToken, Residual, SelectToken, TokenChain, TokenLabelChain, Tokens
from robustlip.models import build
from robustlip.threats import InputBall, parse_threat

T, D, H, V = 5, 12, 3, 11


def ids(n: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (n, T), generator=torch.Generator().manual_seed(seed))


class Mixing(nn.Module):
    """Attention as people write it. form: which variant."""

    def __init__(self, form: str, causal: bool, bias: bool = True) -> None:
        super().__init__()
        self.form, self.causal = form, causal
        keys = 1 if form == "grouped" else H
        d = D // H
        self.d, self.keys = d, keys
        if form in ("joined", "timm"):
            self.qkv = nn.Linear(D, 3 * D, bias)
        elif form == "addmm":
            self.weight, self.start = nn.Parameter(0.3 * torch.randn(D, 3 * D)), nn.Parameter(0.3 * torch.randn(3 * D))
        else:
            self.q, self.k, self.v = nn.Linear(D, D, bias), nn.Linear(D, keys * d, bias), nn.Linear(D, keys * d, bias)
        self.out = nn.Linear(D, D, bias)
        self.register_buffer("mask", torch.tril(torch.ones(T, T)).bool())
        angle = torch.arange(T)[:, None] * (10.0 ** (-torch.arange(d // 2) / d))
        self.register_buffer("cos", torch.cat([angle, angle], -1).cos())
        self.register_buffer("sin", torch.cat([angle, angle], -1).sin())

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        half = self.d // 2
        return x * self.cos + torch.cat([-x[..., half:], x[..., :half]], -1) * self.sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        if self.form == "timm":
            q, k, v = self.qkv(x).reshape(n, t, 3, H, self.d).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.form == "joined":
            q, k, v = (part.view(n, t, H, self.d).transpose(1, 2) for part in self.qkv(x).split(D, dim=2))
        elif self.form == "addmm":
            both = torch.addmm(self.start, x.view(-1, D), self.weight).view(n, t, 3 * D)
            q, k, v = (part.view(n, t, H, self.d).transpose(1, 2) for part in both.split(D, dim=2))
        else:
            q, k, v = (f(x).view(n, t, -1, self.d).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.form == "turned":
            q, k = self.turned(q), self.turned(k)
        if self.form == "grouped":
            k, v = (y[:, :, None].expand(n, self.keys, H, t, self.d).reshape(n, H, t, self.d) for y in (k, v))
        if self.form == "logits":
            a = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(self.d))
            a = a.masked_fill(~self.mask[None, None, :t, :t], float("-inf")) if self.causal else a
            y = F.dropout(F.softmax(a, dim=-1), 0.1, self.training) @ v
        elif self.form == "divide":
            a = torch.matmul(q, k.mT) / math.sqrt(self.d)
            a = a + torch.zeros(t, t).masked_fill(~self.mask[:t, :t], torch.finfo(torch.float32).min) if self.causal else a
            y = torch.matmul(a.softmax(-1), v)
        elif self.form == "masked":
            rows = torch.arange(n)[:, None, None, None] * 0 + torch.arange(t)[None, None, :, None]
            seen = rows >= torch.arange(t)[None, None, None, :]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen if self.causal else None)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(n, t, D))


FORMS = ("plain", "joined", "timm", "addmm", "turned", "grouped", "logits", "divide", "masked")


class Block(nn.Module):
    def __init__(self, form: str, causal: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(D), Mixing(form, causal)
        self.norm2, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Writer(nn.Module):
    """A model of the next token."""

    def __init__(self, form: str = "joined") -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(V, D), nn.Embedding(T + 3, D)
        self.block, self.last, self.head = Block(form, True), nn.LayerNorm(D), nn.Linear(D, V, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.last(self.block(h)))


class Judge(nn.Module):
    """A classifier of sequences, by a token; its positions may depend on which tokens are padding."""

    def __init__(self, by_ids: bool) -> None:
        super().__init__()
        self.by_ids = by_ids
        self.words, self.kinds, self.places = nn.Embedding(V, D), nn.Embedding(2, D), nn.Embedding(T + 3, D)
        self.norm, self.block, self.pool, self.head = nn.LayerNorm(D), Block("plain", False), nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = x.ne(1).int()
        at = ((torch.cumsum(seen, dim=1).type_as(seen)) * seen).long() + 1 if self.by_ids else torch.arange(x.size(1))[None]
        h = self.words(x) + self.kinds(torch.zeros(x.size(0), x.size(1), dtype=torch.long)) + self.places(at)
        return self.head(torch.tanh(self.pool(self.block(self.norm(h))[:, 0])))


class Seer(nn.Module):
    """A classifier of images by patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(1, D, 3, 3), nn.Parameter(torch.randn(1, 1, D))
        self.places = nn.Parameter(0.1 * torch.randn(1, 5, D))
        self.block, self.last, self.head = Block("timm", False), nn.LayerNorm(D), nn.Linear(D, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.first.expand(x.shape[0], -1, -1), h], dim=1) + self.places
        return self.head(self.last(self.block(h))[:, 0])


def made(kind: type[nn.Module], *arguments) -> nn.Module:
    torch.manual_seed(0)
    return kind(*arguments).eval()


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_attention_are_one_layer_with_the_modules_bits(form) -> None:
    model = made(Writer, form)
    chain = capture(model, ids())
    assert type(chain) is NextTokenChain and chain.embedding_depth == 1
    found = [m for m in chain.modules() if type(m) is Attention]
    assert len(found) == 1 and found[0].heads == H and found[0].output is not None
    assert (found[0].key_heads, found[0].joined) == (1 if form == "grouped" else H, form in ("joined", "timm", "addmm"))
    x = ids(40, 1)
    assert torch.equal(chain(x), model(x))


def test_a_captured_gpt_has_the_radii_of_ours() -> None:
    config = {"kind": "baseline-gpt", "vocabulary_size": V, "width": D, "heads": H, "blocks": 1}
    torch.manual_seed(0)
    ours = build(config).eval()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ours

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inner[0](x)
            for layer in list(self.inner)[1:]:
                h = layer(h)
            return h

    x = ids()
    y = ours(x)[:, -1].argmax(-1)
    for method in ("global", "local", "dual"):
        first, second = (certify(m, x, y, "embedding-l2@-1", method).radius for m in (ours, Wrapped().eval()))
        # Rotations by tables are bounded with the rounding of the tables: a little less.
        assert (second <= first * (1 + 1e-5)).all() and (second >= 0.9 * first).all(), method


@pytest.mark.parametrize("model", [Writer("turned"), Judge(True), Judge(False), Seer()], ids=["writer", "judge-by-ids", "judge", "seer"])
def test_no_attack_succeeds_inside_the_radius(model) -> None:
    model = model.eval()
    x = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)) if isinstance(model, Seer) else ids()
    chain = capture(model, x)
    y = chain.scores(x).argmax(-1)
    x = x[:2]
    y = chain.scores(x).argmax(-1)
    threats = ["embedding-l2", "l2"] if isinstance(model, Seer) else ["embedding-l2@0"]
    for name in threats:
        threat = parse_threat(name)
        radius = certify(model, x, y, threat, "dual").radius
        assert (radius > 0).all(), name
        broken = MinimumRadius(steps=2, descent=15)(chain, x, y, threat).radius
        assert (radius <= broken).all(), name


def test_what_a_chain_of_tokens_is() -> None:
    by_ids, plain, seer = capture(made(Judge, True), ids()), capture(made(Judge, False), ids()), capture(made(Seer), torch.rand(2, 1, 6, 6))
    assert type(by_ids) is TokenChain and type(by_ids[0]) is Lookup and type(plain[0]) is nn.Embedding
    assert any(type(layer) is SelectToken for layer in plain)
    assert [type(layer) for layer in list(seer)[:3]] == [nn.Conv2d, Tokens, PrependToken] and seer.embedding_depth == 4
    assert any(type(layer) is Residual for layer in seer) and type(seer) is Chain
    # Another word table, or another program of places, is another model.
    other = capture(made(Judge, True), ids())
    other[0].steps.reverse()
    assert str(other) != str(by_ids)


def test_ids_that_no_table_bounds_are_refused() -> None:
    class Next(Judge):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.relu(self.words(x.clamp(max=V - 2) + 1)).mean(1))

    with pytest.raises(UnsupportedLayer, match="the number of ids is unknown"):
        capture(made(Next, False), ids())


def test_a_lookup_takes_no_weight_threat() -> None:
    class Tables(Judge):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.relu(self.words(x) + self.words((x - 1).clamp(min=0))).mean(1))

    model = made(Tables, False)
    for part in ("kinds", "places", "norm", "block", "pool"):
        delattr(model, part)  # every matrix is one of a layer
    with pytest.raises(UnsupportedLayer, match="weight threat"):
        certify(model, ids(), torch.zeros(4, dtype=torch.int64), "weights-spectral")
    model = made(Judge, True)
    with pytest.raises(UnsupportedLayer):
        certify(model, ids(), torch.zeros(4, dtype=torch.int64), "weights-spectral")


class Tagger(nn.Module):
    """A class for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(V, D), nn.Linear(D, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.words(x)))


def test_a_classifier_of_tokens_is_no_model_of_the_next_one() -> None:
    model = made(Tagger)
    assert type(capture(model, ids())) is TokenLabelChain
    model.task = "next-token"
    assert type(capture(model, ids())) is NextTokenChain


class Torchs(nn.Module):
    """torch's own encoder: samples and tokens change places inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(V, D), nn.Linear(D, 3)
        layer = nn.TransformerEncoderLayer(D, H, 2 * D, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.words(x)).mean(1))


def test_torchs_encoder_without_its_fast_path() -> None:
    model, x = made(Torchs), ids()
    with pytest.raises(UnsupportedLayer, match="set_fastpath_enabled"):
        capture(model, x)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        chain = capture(model, x)
        assert any(type(m) is Attention and m.joined for m in chain.modules())
        assert torch.equal(chain(x), model(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# ---- programs that look like attention and are not


def across_samples(m: nn.Module, q, k, v):
    return F.scaled_dot_product_attention(q.transpose(0, 2), k.transpose(0, 2), v.transpose(0, 2)).transpose(0, 2)


def of_another_head(m: nn.Module, q, k, v):
    return F.scaled_dot_product_attention(q, k, v.flip(1))


def shifted_keys(m: nn.Module, q, k, v):
    return F.scaled_dot_product_attention(q, k.roll(1, 2), v)


def mask_of_the_input(m: nn.Module, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=q @ k.mT)


def one_half_turned(m: nn.Module, q, k, v):
    return F.scaled_dot_product_attention(q * 0.5 + torch.cat([q[..., 2:], q[..., :2]], -1) * 0.5, k, v)


def turned_across_heads(m: nn.Module, q, k, v):
    cos, sin = torch.full((4,), 0.6), torch.full((4,), 0.8)
    turn = lambda x: x * cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * sin  # noqa: E731
    return F.scaled_dot_product_attention(turn(q.flip(1)), turn(k), v)


def turned_by_another_sign(m: nn.Module, q, k, v):
    cos, sin = torch.full((4,), 0.6), torch.full((4,), 0.8)
    turn = lambda x: x * cos + torch.cat([x[..., 2:], x[..., :2]], -1) * sin  # noqa: E731
    return F.scaled_dot_product_attention(turn(q), turn(k), v)


def scaled_keys(m: nn.Module, q, k, v):
    return F.scaled_dot_product_attention(q, k * 2, v)


def rarely_dropped(m: nn.Module, q, k, v):
    return F.dropout(F.scaled_dot_product_attention(q, k, v), 1e-9, True)


def square(m: nn.Module, q, k, v):
    return F.softmax(q @ q.mT, -1) @ F.relu(v)


class Odd(nn.Module):
    def __init__(self, mix) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head, self.mix = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2), mix
        self.words = nn.Embedding(V, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.words(x)
        q, k, v = (f(x).unflatten(-1, (H, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.head(self.mix(self, q, k, v).transpose(1, 2).flatten(2)).mean(1)


ODD = (across_samples, of_another_head, shifted_keys, mask_of_the_input, one_half_turned, scaled_keys, square)
ODD += (rarely_dropped, turned_across_heads, turned_by_another_sign)


@pytest.mark.parametrize("mix", ODD, ids=lambda f: f.__name__)
def test_what_is_not_self_attention_is_refused(mix) -> None:
    with pytest.raises(UnsupportedLayer):
        capture(made(Odd, mix), ids())


class Merged(nn.Module):
    """Samples and tokens in one dimension, and something that is not row by row."""

    def __init__(self, act) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(24, 3), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x.reshape(-1, 6))
        return self.b(self.act(h).view(x.shape[0], -1))


def test_merged_samples_pass_row_by_row_alone() -> None:
    x = torch.rand(3, 4, 6)
    model = made(Merged, F.relu)
    assert torch.equal(capture(model, x)(x), model(x))
    for act in (lambda h: h.roll(1, 0), lambda h: h - h.mean(0), lambda h: h.cumsum(0), lambda h: F.batch_norm(h, torch.zeros(6), torch.ones(6))):
        with pytest.raises(UnsupportedLayer):
            capture(made(Merged, act), x)


class ByCount(nn.Module):
    """A constant that depends on the number of samples, or on which sample it is."""

    def __init__(self, constant) -> None:
        super().__init__()
        self.a, self.constant = nn.Linear(4, 3), constant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.constant(x.shape[0])


def _from_200_on(n: int) -> list:
    """Constants that are the same for every number of samples up to 200, and for none above."""
    table = torch.cat([torch.ones(200, 3), torch.zeros(100, 3)])
    return [
        lambda n: (torch.arange(n) >= 200).any().float(), lambda n: (torch.arange(n).clamp(min=200) - 200)[:, None].float(),
        lambda n: torch.ones(n, 3).sum(0).clamp(min=200), lambda n: table[torch.arange(n)], lambda n: table[:n],
        lambda n: torch.ones(torch.sym_max(n, 200) - 199, 3).sum(0), lambda n: torch.ones(n // 201 + 1, 3).sum(0), lambda n: float(n > 200),
        lambda n: 1.0 if n == 7 else 0.0, lambda n: float(int(n) > 200),
    ][n]  # fmt: skip


@pytest.mark.parametrize("which", range(10))
def test_constants_of_some_numbers_of_samples_alone_are_refused(which) -> None:
    with pytest.raises(UnsupportedLayer):
        capture(made(ByCount, _from_200_on(which)), torch.rand(3, 4))


def test_a_table_with_a_row_for_each_sample_is_no_lookup() -> None:
    class Rows(Judge):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.relu(self.words(x) + self.places(torch.gather(self.table, 1, x))).mean(1))

    model = made(Rows, False)
    model.register_buffer("table", torch.cat([torch.zeros(160, V), torch.ones(40, V)]).long())
    with pytest.raises(UnsupportedLayer):
        capture(model, ids())
    model.table = torch.arange(V)[None].remainder(T)  # one for all
    with pytest.raises(UnsupportedLayer):
        capture(model, ids())  # which gather cannot spread


def test_constants_by_sample_are_refused_and_repeated_ones_are_not() -> None:
    x = torch.rand(3, 4)
    model = made(ByCount, lambda n: torch.arange(3.0).expand(n, 3))
    assert torch.equal(capture(model, x)(x), model(x))
    for constant in (lambda n: torch.arange(n)[:, None].float(), lambda n: torch.ones(3) * n, lambda n: torch.eye(n, 3)):
        with pytest.raises(UnsupportedLayer):
            capture(made(ByCount, constant), x)


def test_no_operation_is_taken_for_row_by_row_that_is_none() -> None:
    """Each of these operations gives a row of merged samples the same result as that row alone."""
    x = torch.randn(6, 4)
    arguments = {"addmm": (torch.randn(3), x, torch.randn(4, 3)), "mm": (x, torch.randn(4, 3)), "linear": (x, torch.randn(3, 4))}
    for name in program._ROWWISE - {*program.VIEWS, "to", "contiguous", "clone", "dropout"}:
        run = getattr(torch.ops.aten, name)
        whole = run(*arguments.get(name, (x,)))
        for i in range(6):
            row = [a[i : i + 1] if a is x else a for a in arguments.get(name, (x,))]
            assert torch.allclose(run(*row)[0], whole[i], atol=1e-6), name


def test_an_input_ball_does_not_hold_token_ids() -> None:
    with pytest.raises(Exception, match="embedding"):
        certify(made(Judge, False), ids(), torch.zeros(4, dtype=torch.int64), InputBall("l2"))
