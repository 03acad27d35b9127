"""Certifiers by name, the best of them per sample, and the verbs that use them: certify --method, smooth."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from robustlip.certifiers import METHODS, certify
from robustlip.certifiers.methods import SLOW
from robustlip.certifiers.smoothing import certify_smoothed
from robustlip.cli import main
from robustlip.comparison import Comparison, compare
from robustlip.data import load_data
from robustlip.errors import BadInput, CertificateViolation, UnsupportedLayer
from robustlip.layers import Chain, as_chain
from robustlip.models import LipschitzGPT
from robustlip.threats import EmbeddingBall, InputBall, Threat, WeightBall

# What searches of radii leave open.
TOLERANCE = 1e-3


def relu_net() -> tuple[Chain, torch.Tensor, Threat]:
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3))
    return as_chain(model.eval().requires_grad_(False)), torch.randn(24, 6), InputBall("l2")


def gelu_net() -> tuple[Chain, torch.Tensor, Threat]:
    return as_chain(nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 3)).eval().requires_grad_(False)), torch.randn(24, 6), InputBall("linf")


def gpt() -> tuple[Chain, torch.Tensor, Threat]:
    model = LipschitzGPT("abcdefgh", 8, 2, 1).eval().requires_grad_(False)
    return model, torch.randint(8, (12, 4)), EmbeddingBall()


MODELS = {"relu": relu_net, "gelu": gelu_net, "gpt": gpt}


def able(model: Chain, threat: Threat) -> list[str]:
    return [name for name, method in METHODS.items() if not method.why_not(model, threat)]


@pytest.fixture
def mlp() -> tuple[Chain, torch.Tensor, torch.Tensor, Threat]:
    """The network of 'relu', its samples, labels that are predicted for all but the first three."""
    model, x, threat = relu_net()
    y = model.scores(x).argmax(-1)
    y[:3] = (y[:3] + 1) % 3
    return model, x, y, threat


# ---- best


@pytest.mark.parametrize("kind", MODELS)
def test_best_is_the_largest_radius_sample_by_sample_and_names_its_method(kind):
    model, x, threat = MODELS[kind]()
    y = model.scores(x).argmax(-1)
    best = certify(model, x, y, threat)
    tried = [name for name in able(model, threat) if METHODS[name].in_best]
    assert len(tried) >= 3
    each = {name: certify(model, x, y, threat, name).radius for name in tried}
    largest = np.maximum.reduce(list(each.values()))
    assert (best.radius > 0).any()
    assert np.allclose(best.radius, largest, rtol=TOLERANCE, atol=0)
    for r, name, i in zip(best.radius, best.methods, range(len(y)), strict=True):
        assert (name in tried) if r > 0 else name == ""
        if r > 0:
            assert each[name][i] == pytest.approx(r, rel=TOLERANCE)
    single = certify(model, x, y, threat, tried[-1])
    assert set(single.methods) <= {tried[-1], ""}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_no_method_beats_best_that_best_leaves_out_as_dominated(kind):
    model, x, threat = MODELS[kind]()
    y = model.scores(x).argmax(-1)
    best = certify(model, x, y, threat).radius
    for name in able(model, threat):
        if name not in SLOW:  # left out for their cost, not because they are dominated
            assert (certify(model, x, y, threat, name).radius <= best * (1 + TOLERANCE)).all(), name


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("kind", ["relu", "gelu"])
def test_crown_is_never_below_intervals(kind, norm):
    model, x, _ = MODELS[kind]()
    y = model.scores(x).argmax(-1)
    crown, ibp = (certify(model, x, y, InputBall(norm), name).radius for name in ("crown", "ibp"))
    assert (ibp > 0).any()
    assert (crown >= ibp * (1 - TOLERANCE)).all()
    assert (crown > ibp * 1.01).any()


def patched(monkeypatch, name, radii) -> None:
    monkeypatch.setitem(METHODS, name, replace(METHODS[name], radii=radii))


def test_the_winner_is_named_sample_by_sample(mlp, monkeypatch):
    model, x, y, threat = mlp

    def known(model, x, y, logits, threat, context):
        radius = torch.where(x[:, 0] > 0, 1e6, 1e-30).double()
        return radius, torch.full_like(radius, torch.nan)

    patched(monkeypatch, "crown", known)
    certificate = certify(model, x, y, threat)
    right = (certificate.prediction == certificate.label) & (certificate.radius > 0)
    chosen = np.array(certificate.methods) == "crown"
    assert right.sum() > 10 and 0 < chosen.sum() < right.sum()
    assert (chosen == (right & (x[:, 0] > 0).numpy())).all()
    assert (certificate.radius[chosen] == 1e6).all()
    assert (np.array(certificate.methods)[:3] == "").all() and (certificate.radius[:3] == 0).all()


@pytest.mark.slow
def test_nan_of_a_method_loses_no_proof(mlp, monkeypatch):
    model, x, y, threat = mlp
    before = certify(model, x, y, threat)
    patched(monkeypatch, "ibp", METHODS["ibp"].radii)
    patched(monkeypatch, "dual", lambda m, x, y, l, t, c: (torch.full((len(y),), torch.nan).double(), torch.full((len(y),), torch.nan).double()))
    after = certify(model, x, y, threat)
    assert np.isfinite(after.radius).all() and "dual" not in after.methods
    kept = np.array([name != "dual" for name in before.methods])
    assert np.allclose(after.radius[kept], before.radius[kept], rtol=TOLERANCE, atol=0)


class Recorder:
    """The radii of a method, and the inputs for which it was called."""

    def __init__(self, radii) -> None:
        self.radii, self.seen = radii, []

    def __call__(self, model, x, y, logits, threat, context):
        self.seen += [tuple(row) for row in x.tolist()]
        return self.radii(model, x, y, logits, threat, context)


def test_dear_methods_see_only_what_is_not_yet_proved(mlp, monkeypatch):
    model, x, y, threat = mlp
    order = [name for name in able(model, threat) if METHODS[name].in_best]
    recorders = {name: Recorder(METHODS[name].radii) for name in order}
    alone = {name: certify(model, x, y, threat, name).radius for name in order}
    for name, recorder in recorders.items():
        patched(monkeypatch, name, recorder)
    wanted = float(np.quantile(alone[order[0]][3:], 0.5))
    certificate = certify(model, x, y, replace(threat, radius=wanted))
    right, reached = certificate.prediction == certificate.label, np.zeros(len(y))
    assert not right[:3].any() and right[3:].all()
    for name in order:
        asked = x if name == order[0] else x[torch.from_numpy(right & (reached < wanted))]
        expected = {tuple(row) for row in asked.tolist()}
        assert set(recorders[name].seen) == expected, name
        assert len(recorders[name].seen) == len(expected)
        reached = np.maximum(reached, np.where(right, alone[name], 0))
    assert 0 < len(recorders[order[1]].seen) < right.sum()
    assert (certificate.radius[3:] >= wanted).sum() == (reached[3:] >= wanted).sum()


def test_nothing_dear_is_asked_when_the_first_method_proves_all(mlp, monkeypatch):
    model, x, y, threat = mlp
    recorders = {name: Recorder(METHODS[name].radii) for name in ("local", "dual", "crown", "sdp", "lipsdp")}
    for name, recorder in recorders.items():
        patched(monkeypatch, name, recorder)
    least = float(certify(model, x[3:], y[3:], threat, "global").radius.min())
    assert least > 0
    certificate = certify(model, x[3:], y[3:], replace(threat, radius=least / 2))
    assert set(certificate.methods) == {"global"} and set(certificate.status) == {"certified"}
    assert not any(recorder.seen for recorder in recorders.values())
    certify(model, x[3:], y[3:], replace(threat, radius=1e9))
    assert recorders["sdp"].seen and not recorders["lipsdp"].seen


@pytest.mark.parametrize("error", [BadInput, UnsupportedLayer])
def test_a_size_that_one_method_refuses_loses_no_proof(mlp, monkeypatch, error):
    model, x, y, threat = mlp

    def refuse(*_):
        raise error("expected a smaller network, got a large one; use another method")

    reference = {name: certify(model, x, y, threat, name).radius for name in ("global", "local", "eclipse", "dual", "local-lipschitz", "sdp")}
    patched(monkeypatch, "crown", refuse)
    certificate = certify(model, x, y, threat)
    assert np.allclose(certificate.radius, np.maximum.reduce(list(reference.values())), rtol=TOLERANCE, atol=0)
    assert "crown" not in certificate.methods
    with pytest.raises(error):
        certify(model, x, y, threat, "crown")


def test_an_error_that_is_no_refusal_stays_one(mlp, monkeypatch):
    model, x, y, threat = mlp

    def broken(*_):
        raise RuntimeError("a bug")

    patched(monkeypatch, "crown", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        certify(model, x, y, threat)


def test_every_method_says_in_a_sentence_why_it_does_not_apply():
    model, x, _ = gpt()
    y = model.scores(x).argmax(-1)
    out = 0
    for threat in (EmbeddingBall(), WeightBall("spectral")):
        for name, method in METHODS.items():
            if reason := method.why_not(model, threat):
                out += 1
                assert "\n" not in reason and len(reason.split()) >= 4
                with pytest.raises(UnsupportedLayer) as caught:
                    certify(model, x, y, threat, name)
                assert name in str(caught.value) and "\n" not in str(caught.value) and "best" in str(caught.value)
    assert out > 8
    assert METHODS["global"].why_not(model, WeightBall("spectral")) == ""


# ---- the comparison


def hand_made(radius: Threat | None = None) -> Comparison:
    return Comparison(
        radius or InputBall("l2"), "float32", "0" * 64, np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 0, 0]),
        {"global": np.array([0.1, 0.2, 0.0, 0.3, 0.0]), "crown": np.array([0.1, 0.4, 0.0, 0.2, 0.0])}, {"global": 1.0, "crown": 2.0},
        {"sdp": "no"}, "min", np.array([0.2, 0.5, np.inf, 0.4, 0.0]), 3.0,
    )  # fmt: skip


def test_figures_of_a_comparison():
    done = hand_made()
    assert done.best.tolist() == [0.1, 0.4, 0.0, 0.3, 0.0]
    assert done.wins() == {"global": 2, "crown": 1}
    assert done.radii() == (0.075, 0.2, 0.33) or done.radii() == (0.075, 0.2, 0.32)
    assert done.fraction(done.radius["crown"]) == pytest.approx(0.5)  # 0.5, 0.8, 0.5
    assert done.median(done.radius["global"]) == pytest.approx(0.15)
    row = hand_made(InputBall("l2", 0.2)).row("crown", done.radius["crown"], 2.0)
    assert row["accuracy"] == {"0.2": 0.4} and row["seconds"] == 2.0
    json.dumps(done.to_json_dict(), allow_nan=False)


@pytest.mark.slow
def test_comparison_has_the_radii_of_each_method_on_its_own(mlp):
    model, x, y, threat = mlp
    parts = [(x[:8], y[:8], np.arange(8)), (x[8:], y[8:], np.arange(8, 24))]
    done = compare(model, lambda label: parts, threat)
    assert set(done.left_out) == set(SLOW) & set(able(model, threat)) and "--slow" in done.left_out["lipsdp"]
    assert set(done.radius) == set(able(model, threat)) - set(SLOW)
    for name, radius in done.radius.items():
        # The same batches: what 'sdp' proves of a sample depends on which others it searches with.
        assert np.array_equal(radius, np.concatenate([certify(model, xs, ys, threat, name).radius for xs, ys, _ in parts])), name
    assert done.attacked is None and done.fraction(done.best) is None


def test_bad_labels_are_no_reason_to_leave_a_method_out(mlp):
    model, x, y, threat = mlp
    with pytest.raises(BadInput, match="label"):
        compare(model, lambda label: [(x, y + 7, np.arange(24))], threat)


@pytest.mark.slow
def test_comparison_stops_at_a_radius_that_the_attack_refutes(mlp, monkeypatch):
    from robustlip.attacks import by_name

    model, x, y, threat = mlp
    patched(monkeypatch, "crown", lambda m, x, y, l, t, c: (torch.full((len(y),), 100.0).double(), torch.full((len(y),), torch.nan).double()))
    batches = [(x, y, np.arange(24))]
    with pytest.raises(CertificateViolation, match="'crown'"):
        compare(model, lambda label: batches, threat, attack=by_name("min", steps=2, descent=20))
    assert compare(model, lambda label: batches, threat).radius["crown"].max() == 100.0


# ---- the command line

TINY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
"""
NET = "tinymodels_for_methods:net"


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "tinymodels_for_methods.py").write_text(TINY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tinymodels_for_methods", raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("tinymodels_for_methods", None)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


def sentence(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("robustlip: ")]
    assert len(lines) == 1, lines
    return lines[0]


def test_all_methods_in_one_table_and_one_document(place, capsys):
    assert run("certify", "digits-mlp-lipschitz", "--data", "digits:test", "--limit", 12, "--method", "all", "--json", "all.json") == 0
    shown = capsys.readouterr().out
    document = json.loads((place / "all.json").read_text())
    assert document["certificate"] is False and "not a certificate" in document["note"]
    ran = {row["method"]: row for row in document["methods"]}
    assert set(ran) == set(METHODS) - set(SLOW) and set(document["left_out"]) == set(SLOW)
    for name in METHODS:
        assert name in shown
    assert "not a certificate" in shown and "lipsdp left out: takes minutes" in shown and "attack 'min'" in shown
    assert all(0 <= row["fraction_of_attack"] <= 1 and row["seconds"] > 0 for row in ran.values())
    assert ran["sdp"]["fraction_of_attack"] > ran["global"]["fraction_of_attack"] > 0
    assert document["best_of_these"]["median_radius"] >= max(row["median_radius"] for row in ran.values())
    assert document["attack"]["median_radius"] >= document["best_of_these"]["median_radius"]
    assert len(document["best_of_these"]["accuracy"]) == 3
    # No certificate, and what reads certificates says so.
    assert run("verify", "all.json", "--model", "digits-mlp-lipschitz") == 2


def test_all_methods_at_a_radius_without_attack(place, capsys):
    arguments = ("certify", NET, "--data", "digits:test", "--limit", 6, "--method", "all", "--threat", "weights-spectral", "--radius", 1e-4)
    assert run(*arguments, "--no-attack", "--json", "-") == 0
    streams = capsys.readouterr()
    document = json.loads(streams.out)
    assert document["attack"] is None and document["requested_radius"] == 1e-4
    assert [list(row["accuracy"]) for row in document["methods"]] == [["0.0001"]] * len(document["methods"])
    assert set(document["left_out"]) | {row["method"] for row in document["methods"]} == set(METHODS)
    assert {"global", "local"} <= {row["method"] for row in document["methods"]} and "crown" in document["left_out"]
    assert "crown left out: " in streams.err and "attacked" not in streams.err


def test_refusals_of_the_verb(place, capsys):
    start = ("certify", NET, "--data", "digits:test", "--limit", 3)
    assert run(*start, "--method", "smoothing") == 2 and "robustlip smooth" in sentence(capsys)
    assert run(*start, "--slow") == 2 and "--method all" in sentence(capsys)
    assert run(*start, "--threat", "weights-spectral", "--method", "crown") == 2 and "crown" in sentence(capsys)
    assert run("certify", "shakespeare-gpt-lipschitz", "--data", "page", "--threat", "embedding-l2", "--limit", 2, "--method", "sdp") == 2
    assert "'sdp'" in sentence(capsys)


def test_help_lists_the_methods(capsys):
    assert run("certify", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, method in METHODS.items():
        assert f"{name} {method.description}"[:60] in shown, name


def test_certificate_files_name_the_method_of_each_sample_and_verify(place, capsys):
    assert run("certify", "digits-mlp-lipschitz", "--data", "digits:test", "--limit", 10, "--json", "cert.json") == 0
    shown = capsys.readouterr().out
    samples = json.loads((place / "cert.json").read_text())["samples"]
    proved = [s for s in samples if s["radius"] > 0]
    assert len(proved) >= 8 and all(s["method"] in METHODS for s in proved) and all(not s["method"] for s in samples if s["radius"] == 0)
    assert "radii proved by" in shown
    for name in {s["method"] for s in proved}:
        assert f"{name} ({sum(s['method'] == name for s in proved)})" in shown
    assert run("verify", "cert.json", "--model", "digits-mlp-lipschitz") == 0


def test_smooth_is_a_table_of_its_own(place, capsys):
    arguments = ("smooth", "digits-mlp-lipschitz", "--data", "digits:test", "--limit", 6, "--sigma", 0.25, "--samples", 500, "--confidence", 0.99)
    assert run(*arguments, "--radius", 0.1, "--json", "smooth.json") == 0
    shown = capsys.readouterr().out
    document = json.loads((place / "smooth.json").read_text())
    assert document["guarantee"] == "probabilistic" and document["certificate"] is False and "smoothed" in document["statement"]
    assert "SMOOTHED" in shown and "Probabilistic" in shown and "certified-smoothed (%)" in shown
    assert document["confidence"] == pytest.approx(0.99) and document["draws"] == 500 and "samples" not in document
    data = load_data("digits:test", limit=6, seed=0)
    from robustlip.models import zoo

    expected = certify_smoothed(
        zoo.load("digits-mlp-lipschitz"), data.x, data.y, sigma=0.25, threat=InputBall("l2", 0.1), n=500, alpha=1 - 0.99, seed=0, index=data.index
    )
    assert [row["smoothed_radius"] for row in document["smoothed_samples"]] == expected.smoothed_radius.tolist()
    assert [row["index"] for row in document["smoothed_samples"]] == data.index.tolist()
    assert (expected.smoothed_radius > 0).sum() >= 3
    assert run("verify", "smooth.json", "--model", "digits-mlp-lipschitz") == 2


def test_refusals_of_smooth(place, capsys):
    start = ("smooth", NET, "--data", "digits:test", "--limit", 2, "--samples", 100)
    assert run(*start, "--sigma", 0) == 2 and "sigma above 0" in sentence(capsys)
    assert run(*start, "--sigma", 0.1, "--confidence", 1) == 2 and "confidence" in sentence(capsys)
    assert run("smooth", "shakespeare-gpt-lipschitz", "--data", "page", "--limit", 2, "--sigma", 0.1) == 2 and "token ids" in sentence(capsys)


@pytest.mark.slow
def test_a_certificate_verifies_whatever_batches_it_was_made_in(place):
    arguments = ("certify", "digits-mlp-baseline", "--data", "digits:test", "--limit", 16, "--method", "sdp")
    assert run(*arguments, "--batch-size", 4, "--json", "cert.json") == 0
    assert run("verify", "cert.json", "--model", "digits-mlp-baseline") == 0
