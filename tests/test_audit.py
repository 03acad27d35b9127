"""The audit refutes false claims and does not refute true ones."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from robustlip.attacks import formulas
from robustlip.attacks.audit import audit, recheck, recheck_worst, save_witness, save_worst
from robustlip.attacks.formulas import layer_claim, newhouse2025, ours, product, stated
from robustlip.attacks.worst_weights import newhouse_counterexample, worst_attention_like, worst_mlp
from robustlip.checkpoints import load_tensors, save_tensors
from robustlip.cli import main
from robustlip.errors import BadInput
from robustlip.layers import Attention, Chain, NextTokenChain, Residual, ScaledGELU
from robustlip.models import BaselineGPT, LipschitzGPT, LipschitzMLP, LipschitzTransformer

COUNTEREXAMPLE = "robustlip.attacks.worst_weights:newhouse_counterexample"
QUICK = {"starts": 8, "power_steps": 10, "ascent_steps": 20}


@pytest.fixture(scope="module")
def broken() -> Chain:
    return newhouse_counterexample()


@pytest.fixture(scope="module")
def violation(broken):
    return audit(broken, newhouse2025(broken), **QUICK)


def linear(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(30, 10))


def transformer(layer: nn.Module, width: int, table: torch.Tensor | None = None) -> NextTokenChain:
    """Embedding → layer → orthogonal head."""
    embedding, head = nn.Embedding(width, width), nn.Linear(width, width, bias=False)
    with torch.no_grad():
        embedding.weight.copy_(torch.randn(width, width) if table is None else table)
        embedding.weight.mul_(0.999 * width**0.5 / embedding.weight.norm(dim=-1, keepdim=True))
        head.weight.copy_(torch.eye(width))
    return NextTokenChain(OrderedDict(embed_tokens=embedding, block=layer, head=head)).eval()


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


# ------------------------------------------------------------------------------------------------ the published formula


def test_published_formula_is_violated_more_than_two_and_a_half_times_on_the_counterexample(broken, violation) -> None:
    assert violation.claimed == pytest.approx(1.0, rel=1e-6)
    assert violation.verdict == "violated" and violation.violated
    assert violation.ratio >= 2.5
    assert violation.units == "rms" and violation.domain == 4.0 and violation.rounding_kind == "proved"
    assert violation.why.startswith("Mistake 1 ")
    # Measured once more, by nothing of the audit: two inputs inside the domain, one forward pass each.
    double = copy.deepcopy(broken).double().requires_grad_(False)
    x, y = violation.x[None], violation.x_prime[None]
    assert float(torch.maximum(x.norm(dim=-1), y.norm(dim=-1)).max()) <= 4.0
    moved = (double.from_embeddings(y) - double.from_embeddings(x)).norm(dim=-1).max()
    assert float(moved / (y - x).norm(dim=-1).max()) == pytest.approx(violation.found, rel=1e-6)


def test_our_bound_holds_on_the_counterexample_and_is_near(broken) -> None:
    found = audit(broken, ours(broken), **QUICK)
    assert found.verdict == "not refuted"
    assert found.ratio > 0.7


def test_the_counterexample_is_what_it_says(broken) -> None:
    layer = broken[1].branch
    for name in ("query", "key", "value", "output"):
        assert float(torch.linalg.matrix_norm(getattr(layer, name).weight.detach().double(), 2)) == pytest.approx(1.0, rel=1e-6)
    assert float(broken[0].weight.norm(dim=-1).max()) <= 4.0
    assert all(torch.equal(a, b) for a, b in zip(broken.parameters(), newhouse_counterexample().parameters(), strict=True))


def test_a_larger_divisor_hides_in_the_mlp_constant() -> None:
    """Mistake 2 alone: an MLP of the paper whose neuron sits where GELU is steepest is 1.1289 times as sensitive as published."""
    mlp = nn.Sequential(nn.Linear(8, 16, bias=False), ScaledGELU(), nn.Linear(16, 8, bias=False))
    worst, x = worst_mlp(mlp, 8**0.5)
    table = torch.randn(8, 8)
    table[0] = x.float()
    model = transformer(worst.float(), 8)
    with torch.no_grad():
        model[0].weight[0] = x.float()  # ‖x‖ = √2/σ, inside the domain
    assert float(x.norm()) < 8**0.5
    found = audit(model, newhouse2025(model), tokens=2, **QUICK)
    assert found.ratio == pytest.approx(1.1289, rel=1e-3)
    assert found.why.startswith("Mistake 2 ")
    assert newhouse2025(model, {2}).value == pytest.approx(1.1289 * newhouse2025(model).value)
    assert audit(model, ours(model), tokens=2, **QUICK).verdict == "not refuted"


def test_a_scale_below_one_must_not_multiply_the_value_term() -> None:
    """Only mistake 4: one head, keys and queries 0, identity values. The layer is σ_o σ_v/3-Lipschitz; the formula claims s times that."""
    layer = Attention(8, 1, scale=0.25)
    with torch.no_grad():
        for matrix in (layer.query, layer.key):
            matrix.weight.zero_()
        for matrix in (layer.value, layer.output):
            matrix.weight.copy_(torch.linalg.qr(torch.randn(8, 8))[0])
    model = transformer(Residual.convex(layer, 1.0), 8)
    assert newhouse2025(model).value == pytest.approx(0.25 / 3, rel=1e-5)
    found = audit(model, newhouse2025(model), tokens=2, **QUICK)
    assert found.found == pytest.approx(1 / 3, rel=1e-4) and found.ratio == pytest.approx(4, rel=1e-4)
    assert found.why.startswith("Mistake 4 ")
    assert newhouse2025(model, {4}).value == pytest.approx(1 / 3, rel=1e-5)
    assert audit(model, ours(model), tokens=2, **QUICK).verdict == "not refuted"
    # Above 1 the same mistake only wastes: the value is larger than without it.
    layer.scale = 4.0
    assert newhouse2025(model).value == pytest.approx(4 * newhouse2025(model, {4}).value)


def test_published_constants_of_a_whole_model_follow_the_residuals() -> None:
    """One block by hand: L ← L((1−α) + αΛ), norms ← norms((1−α) + α·growth), then the head in RMS."""
    model = LipschitzGPT("abcdefgh", width=16, heads=2, blocks=1, attention_scale=2.0)
    sigma = {n: float(torch.linalg.matrix_norm(p.double(), 2)) for n, p in model.named_parameters() if p.dim() == 2}
    q, k, v, o = (sigma[f"attn0.branch.{n}.weight"] for n in ("query", "key", "value", "output"))
    mlp = sigma["mlp0.branch.up.weight"] * sigma["mlp0.branch.down.weight"]
    attention = 0.5 + 0.5 * (o * v * (1 + 2 * q * k) / 3 * 2)
    expected = attention * (0.5 + 0.5 * mlp / 1.1289) * sigma["head.weight"] * math.sqrt(16 / 8)
    claim = newhouse2025(model)
    assert claim.value == pytest.approx(expected, rel=1e-6) and claim.units == "rms" and claim.domain == 4.0
    assert [name for name, _ in claim.layers] == ["attn0", "mlp0", "head"]
    assert claim.in_units("l2").value == pytest.approx(expected / math.sqrt(16 / 8))


# ------------------------------------------------------------------------------------------------ claims on models whose constant is known


def test_a_claim_just_below_a_linear_model_is_broken_and_one_just_above_is_not() -> None:
    for seed in range(3):
        model = linear(seed)
        sigma = float(torch.linalg.matrix_norm(model[1].weight.double(), 2))
        low = audit(model, stated(model, 0.99 * sigma), seed=seed, **QUICK)
        assert low.verdict == "violated" and low.ratio == pytest.approx(1 / 0.99, rel=1e-4)
        assert audit(model, stated(model, 1.0000001 * sigma), seed=seed, **QUICK).verdict == "not refuted"
        for claim in (ours(model), product(model)):
            close = audit(model, claim, seed=seed, **QUICK)
            assert close.verdict == "not refuted" and close.ratio > 0.999


def test_rounding_does_not_refute_an_exact_claim() -> None:
    """The identity moves by exactly what its input moves; without an allowance half of all finite differences would be above 1."""
    model = nn.Sequential(nn.Linear(12, 12, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(12))
    for seed in range(5):
        found = audit(model, stated(model, 1.0), seed=seed, **QUICK)
        assert found.verdict == "not refuted" and found.found == pytest.approx(1.0, rel=1e-9)


def test_units_are_converted() -> None:
    model = linear()
    sigma = float(torch.linalg.matrix_norm(model[1].weight.double(), 2))
    rms = sigma * math.sqrt(30 / 10)
    assert product(model).in_units("rms").value == pytest.approx(rms)
    assert audit(model, stated(model, 0.99 * rms, "rms"), **QUICK).verdict == "violated"
    assert audit(model, stated(model, 1.01 * rms, "rms"), **QUICK).verdict == "not refuted"


def test_inputs_stay_in_the_box() -> None:
    """A ReLU that opens only above 1 is never seen from [0, 1]."""
    model = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-5.0)
    free = audit(model, product(model), **QUICK)
    boxed = audit(model, product(model), box=(0.0, 1.0), **QUICK)
    assert free.ratio == pytest.approx(1.0, rel=1e-4) and boxed.found == 0.0
    assert 0.0 <= float(boxed.x.min()) and float(boxed.x_prime.max()) <= 1.0


@pytest.mark.parametrize("activation", ["relu", "gelu", "scaled-gelu", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_mlps_reach_our_bound_with_worst_weights_and_never_pass_it(activation: str, bias: bool) -> None:
    model = LipschitzMLP([12, 16, 16, 5], activation, bias=bias)
    found = audit(model, ours(model), worst_weights=True, **QUICK)
    assert not found.violated
    (worst,) = found.worst
    assert worst.ratio <= 1
    if bias or "gelu" not in activation:
        assert worst.ratio > 0.999  # the bound cannot be improved for these norms


def test_product_formula_is_wrong_for_gelu_mlps_only_through_the_slope() -> None:
    model = LipschitzMLP([12, 16, 16, 5], "gelu")
    found = audit(model, product(model), worst_weights=True, **QUICK)
    assert found.verdict == "not refuted" and found.violated  # random weights pass; the formula does not
    assert found.worst[0].ratio == pytest.approx(1.1289**2, rel=1e-3)
    assert "GELU" in found.why
    relu = LipschitzMLP([12, 16, 16, 5], "relu")
    assert not audit(relu, product(relu), worst_weights=True, **QUICK).violated


@pytest.mark.parametrize("seed", range(2))
def test_our_bound_holds_on_random_transformers(seed: int) -> None:
    torch.manual_seed(seed)
    gpt = LipschitzGPT("abcdef", width=16, heads=4, blocks=2, attention_scale=[1.0, 4.0][seed])
    patches = LipschitzTransformer((1, 8, 8), 4, 10, width=16, heads=2, blocks=1)
    with torch.no_grad():
        for p in gpt.parameters():
            p.mul_(3.0)
    for model in (gpt, patches):
        found = audit(model, ours(model), seed=seed, tokens=4, **QUICK)
        assert found.verdict == "not refuted" and found.found > 0


def test_starting_from_samples_uses_them() -> None:
    patches = LipschitzTransformer((1, 8, 8), 4, 10, width=16, heads=2, blocks=1)
    found = audit(patches, ours(patches), torch.rand(3, 1, 8, 8), **QUICK)
    assert found.x.shape == (4, 16) and found.verdict == "not refuted"
    mlp = LipschitzMLP([64, 16, 10])
    found = audit(mlp, ours(mlp), torch.rand(3, 1, 8, 8), **QUICK)
    assert found.x.shape == (1, 8, 8) and found.verdict == "not refuted"


def test_the_model_is_left_as_it_was() -> None:
    model = LipschitzMLP([12, 8, 3]).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    audit(model, ours(model), worst_weights=True, **QUICK)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) and v.dtype == torch.float32 for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------ worst weights, layer by layer


def test_worst_weights_break_the_published_formula_and_not_ours(tmp_path: Path) -> None:
    model = LipschitzGPT("abcdef", width=16, heads=4, blocks=1)
    with torch.no_grad():  # the paper's cap: every matrix at RMS norm 1
        for p in model.parameters():
            p.div_(torch.linalg.matrix_norm(p, 2) * math.sqrt(p.shape[1] / p.shape[0]))
        model[0].weight.mul_(4 / model[0].weight.norm(dim=-1).max())
    published = audit(model, newhouse2025(model), worst_weights=True, tokens=4, **QUICK)
    ratio = {w.part: w.ratio for w in published.worst}
    assert published.verdict == "not refuted" and published.violated
    assert ratio["attention"] >= 2.5 and ratio["mlp"] == pytest.approx(1.1289, rel=1e-3)
    proved = audit(model, ours(model), worst_weights=True, tokens=4, **QUICK)
    assert not proved.violated
    assert sorted(w.kept for w in proved.worst if w.part == "attention") == ["every head's spectral norm", "every matrix's spectral norm"]
    assert all(0.5 < w.ratio <= 1 for w in proved.worst)
    path = tmp_path / "worst.safetensors"
    for w in (*published.worst, *proved.worst):
        save_worst(path, w)
        assert recheck_worst(path).found == pytest.approx(w.found) and recheck_worst(path).verdict == w.verdict
    tensors, header = load_tensors(path)
    save_tensors(path, {**tensors, "x": tensors["x"] * 0.5}, header)
    with pytest.raises(BadInput, match="altered"):
        recheck_worst(path)


def test_worst_weights_keep_the_norms_they_were_given() -> None:
    layer = Attention(16, 4, scale=2.0)
    for per_head in (False, True):
        found = worst_attention_like(layer, domain=3.0, per_head=per_head, steps=30)
        for name in ("query", "key", "value", "output"):
            before, after = (getattr(m, name).weight.detach().double() for m in (layer, found.layer))
            if per_head and name != "output":
                before, after = before.unflatten(0, (4, 4)), after.unflatten(0, (4, 4))
            torch.testing.assert_close(torch.linalg.matrix_norm(after, 2), torch.linalg.matrix_norm(before, 2))
        assert float(found.x.norm(dim=-1).max()) <= 3.0 + 1e-9
        assert found.sensitivity <= layer_claim(found.layer, "ours", 3.0).value


# ------------------------------------------------------------------------------------------------ witnesses


@pytest.mark.slow
def test_a_witness_measures_the_same_in_a_fresh_process(violation, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_witness(path, violation)
    verb = ["audit", COUNTEREXAMPLE, "--witness", str(path), "--device", "cpu", "--json", "-"]
    done = subprocess.run([sys.executable, "-c", f"from robustlip.cli import main; main({verb!r})"], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    again = json.loads(done.stdout)
    assert again["verdict"] == "violated" and again["found"] == pytest.approx(violation.found, rel=1e-9)


def test_a_tampered_witness_is_refused(broken, violation, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_witness(path, violation)
    assert recheck(path, broken).found == pytest.approx(violation.found)
    tensors, header = load_tensors(path)
    pair = tensors["x_prime"] - tensors["x"]
    cases = [
        ({**tensors, "x_prime": tensors["x"] + 0.5 * pair.flip(0)}, header, "altered"),
        ({**tensors, "x": tensors["x"] * 10, "x_prime": tensors["x_prime"] * 10}, header, "domain"),
        ({**tensors, "x": tensors["x"] * float("nan")}, header, "domain"),
        (tensors, {**header, "found": 2 * header["found"]}, "altered"),
        (tensors, {**header, "claimed": 0.5}, "altered"),
        (tensors, {**header, "domain": 40.0}, "altered"),
        (tensors, {**header, "formula": "ours"}, "altered"),
        (tensors, {**header, "weights_sha256": "0" * 64}, "weights"),
        (tensors, {**header, "kind": "model"}, "other contents"),
        (tensors, {k: v for k, v in header.items() if k != "found"}, "complete witness"),
        ({"x": tensors["x"]}, header, "other contents"),
    ]
    for changed, said, expected in cases:
        save_tensors(path, changed, said)
        with pytest.raises(BadInput, match=expected):
            recheck(path, broken)
    path.write_bytes(b"not a witness")
    with pytest.raises(BadInput, match="safetensors"):
        recheck(path, broken)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_exits_with_3_on_the_published_formula_and_0_on_ours(tmp_path: Path, capsys) -> None:
    folder, report = tmp_path / "out", tmp_path / "r.json"
    common = ("--device", "cpu", "--out", folder, "--starts", "6", "--steps", "15")
    assert run("audit", COUNTEREXAMPLE, "--formula", "newhouse2025", "--json", report, *common) == 3
    text = capsys.readouterr().out
    assert "VIOLATED" in text and "Mistake 1" in text and "∞-RMS" in text and "witness" in text
    result = json.loads(report.read_text())
    assert result["ratio"] >= 2.5 and Path(result["witness"]).is_file()
    assert run("audit", COUNTEREXAMPLE, "--witness", result["witness"], "--device", "cpu") == 3
    assert run("audit", COUNTEREXAMPLE, "--formula", "ours", *common) == 0
    assert "A search cannot prove it" in capsys.readouterr().out
    kept = Path(result["witness"]).read_bytes()
    assert run("audit", COUNTEREXAMPLE, "--formula", "newhouse2025", "--seed", "1", *common) == 3
    assert run("audit", COUNTEREXAMPLE, "--claim", "0.1", *common) == 3
    assert run("audit", COUNTEREXAMPLE, "--claim", "0.2", *common) == 3
    assert Path(result["witness"]).read_bytes() == kept and len(list(folder.iterdir())) == 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("digits-mlp-lipschitz", "--formula", "newhouse2025"), "embedding"),
        (("digits-transformer-baseline", "--formula", "newhouse2025"), "newhouse2025"),
        (("digits-mlp-lipschitz", "--formula", "nonsense"), "formula among"),
        (("digits-mlp-lipschitz", "--formula", "ours", "--claim", "3"), "got both"),
        (("digits-mlp-lipschitz", "--limit", "3"), "--limit with --data"),
        (("shakespeare-gpt-lipschitz", "--context", "8"), "--context with --data"),
        (("shakespeare-gpt-lipschitz", "--data", "page", "--tokens", "8"), "--tokens without --data"),
        (("digits-mlp-lipschitz", "--claim", "nan"), "finite"),
        (("digits-mlp-lipschitz", "--claim", "-1"), "at least 0"),
        (("digits-mlp-lipschitz", "--claim", "3", "--units", "miles"), "units"),
        (("digits-mlp-lipschitz", "--domain", "3"), "--claim"),
        (("digits-mlp-lipschitz", "--claim", "3", "--worst-weights"), "formula"),
        (("digits-mlp-lipschitz", "--witness", "nowhere.safetensors"), "does not exist"),
        (("nonsense",), "zoo model"),
    ],
)
def test_bad_input_is_one_sentence(arguments: tuple[str, ...], sentence: str, capsys) -> None:
    assert run("audit", *arguments, "--device", "cpu") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("robustlip: expected ") and sentence in lines[0]


def test_formulas_refuse_models_that_they_do_not_speak_of() -> None:
    with pytest.raises(BadInput, match="embedding"):
        newhouse2025(LipschitzMLP([4, 3]))
    with pytest.raises(BadInput, match="paper"):
        newhouse2025(BaselineGPT("abcd", width=8, heads=2, blocks=1))
    with pytest.raises(BadInput, match=r"1\.1289"):
        newhouse2025(transformer(nn.Sequential(nn.Linear(4, 4), ScaledGELU(2.0), nn.Linear(4, 4)), 4))
    with pytest.raises(BadInput, match="RReLU"):
        product(nn.Sequential(nn.Linear(4, 4), nn.RReLU(), nn.Linear(4, 2)))
    with pytest.raises(BadInput, match="units"):
        stated(linear(), 1.0, "furlongs")
    model = linear()
    with pytest.raises(BadInput, match="starts"):
        audit(model, ours(model), starts=0)
    with pytest.raises(BadInput, match="shape"):
        audit(model, ours(model), torch.rand(2, 7), **QUICK)
    with pytest.raises(BadInput, match="box"):
        audit(model, ours(model), box=(1.0, 0.0), **QUICK)
    with pytest.raises(BadInput, match="holds for these weights only"):
        audit(model, stated(model, 1.0), worst_weights=True, **QUICK)
    assert set(formulas.FORMULAS) == {"newhouse2025", "product", "ours"}
