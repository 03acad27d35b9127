"""The gate: it decides by the policy only, refuses untrusted certificates, and returns the right exit code."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import robustlip.certifiers as certifiers
from robustlip.attacks import by_name
from robustlip.certificate_file import from_certificate, rows_sha256, write
from robustlip.checkpoints import save_model
from robustlip.cli import main
from robustlip.data import load_data
from robustlip.errors import BadInput
from robustlip.gate import Policy, gate, load_policy, policy_rows, wilson_lower
from robustlip.models import build, zoo
from robustlip.threats import parse_threat

LIMIT = 20
POLICY = """
data = "digits:test"
limit = {limit}
dtype = "{dtype}"
min_samples = {samples}
min_clean_accuracy = {clean}
{more}
[[threat]]
name = "l2"
radius = {radius}
min_certified_accuracy = {certified}
{end}
"""
EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "policy-digits.toml"


def tiny():
    """The class means as a linear classifier of digits: right on most, with honest margins."""
    model = build({"kind": "mlp", "widths": [64, 10]})
    train = load_data("digits:train")
    means = torch.stack([train.x.flatten(1)[train.y == c].mean(0) for c in range(10)])
    with torch.no_grad():
        model[-1].weight.copy_(means)
        model[-1].bias.copy_(-means.square().sum(1) / 2)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return tiny()


@pytest.fixture
def place(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "m.safetensors", model)
    policy_file(tmp_path)
    return tmp_path


def policy_file(
    place: Path, *, limit=LIMIT, dtype="float32", samples=LIMIT, clean=0.5, radius=0.01, certified=0.5, more="", end="", name="p.toml"
) -> Path:
    text = POLICY.format(limit=limit, dtype=dtype, samples=samples, clean=clean, radius=radius, certified=certified, more=more, end=end)
    (place / name).write_text(text)
    return place / name


def certificate(place: Path, model, *, threat="l2", dtype=None, limit=LIMIT, rows=slice(None), name="c.json", change=None) -> Path:
    data = load_data("digits:test", limit=limit)
    proof = certifiers.certify(model, data.x[rows], data.y[rows], parse_threat(threat), dtype=dtype, index=data.index[rows])
    write(place / name, from_certificate(proof, data, spec="digits:test", model="m.safetensors", limit=limit))
    if change is not None:
        raw = json.loads((place / name).read_text())
        change(SimpleNamespace(raw=raw, first=next(s for s in raw["samples"] if s["status"] == "certified")))
        raw["data"]["sha256"] = rows_sha256([s["row_sha256"] for s in raw["samples"]])
        (place / name).write_text(json.dumps(raw))
    return place / name


def run(capsys, *arguments: object, policy: object = "p.toml", model: object = "m.safetensors") -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `robustlip gate`."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in ("gate", model, "--policy", policy, "--device", "cpu", *arguments)])
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


# ---- pass and fail


def test_pass_and_fail(place, capsys):
    code, shown, _ = run(capsys, "--json", "g.json")
    written = json.loads((place / "g.json").read_text())
    assert code == 0 and "PASS" in shown and "FAIL" not in shown
    assert written["verdict"] == "pass" and [r["what"] for r in written["requirements"]] == [
        "samples", "clean accuracy", "certified accuracy against l2 at 0.01",
    ]  # fmt: skip
    policy_file(place, radius=5.0)
    code, shown, said = run(capsys)
    assert code == 1 and "FAIL" in shown and "certified accuracy against l2 at 5" in said and "got 0" in said
    policy_file(place, clean=1.0, radius=5.0)
    assert "1 more is not met" in run(capsys)[2]
    policy_file(place, samples=LIMIT + 1)
    code, _, said = run(capsys)
    assert code == 1 and "samples" in said and str(LIMIT + 1) in said


def test_the_rule_is_exactly_at_least(model):
    """Met at the accuracy itself, missed at the next float64 above it."""
    base = {"data": "digits:test", "limit": LIMIT, "dtype": "float32", "min_samples": 1, "min_clean_accuracy": 0.0}
    rows = load_data("digits:test", limit=LIMIT)
    proof = certifiers.certify(model, rows.x, rows.y, parse_threat("l2"))
    radius = float(np.sort(proof.radius)[LIMIT // 2])
    share, right = float(np.mean(proof.radius >= radius)), float(np.mean(proof.prediction == proof.label))
    for clean, certified, code in (
        (right, share, 0), (math.nextafter(right, 2), share, 1), (right, math.nextafter(share, 2), 1), (0, 0, 0),
    ):  # fmt: skip
        policy = Policy.model_validate(
            base | {"min_clean_accuracy": clean, "threat": [{"name": "l2", "radius": radius, "min_certified_accuracy": certified}]}
        )
        report = gate(policy, model, policy_rows(policy))
        assert (report.exit_code, report.requirements[2].got, report.requirements[1].got) == (code, share, right)


def test_an_accuracy_in_decimals_is_met_by_that_count():
    assert all((k / n) >= float(f"{k / n:.2f}") for n in (20, 50, 100) for k in range(n + 1))


def test_wilson():
    assert wilson_lower(0, 10) == 0.0 and 0.78 < wilson_lower(10, 10) < 0.79 and wilson_lower(950, 1000) < 0.95
    assert abs(wilson_lower(8, 10, 1.96) - 0.4902) < 1e-3  # the two-sided 95 % interval of 8 in 10 is [0.490, 0.943]
    for count, total, z in ((0, 7, 1.6449), (1, 1, 1.6449), (342, 360, 1.6449), (3, 2000, 1.0), (999, 1000, 2.5)):
        share, spread = count / total, z * math.sqrt(count * (total - count) / total**3 + z * z / (4 * total * total))
        formula = (share + z * z / (2 * total) - spread) / (1 + z * z / total)
        assert wilson_lower(count, total, z) == pytest.approx(max(0.0, formula), rel=1e-12, abs=1e-15)


@pytest.mark.slow
def test_the_example_policy_tells_the_constrained_model_from_its_baseline(capsys):
    if not {"digits-mlp-lipschitz", "digits-mlp-baseline"} <= set(zoo.names()):
        pytest.skip("needs the digits models of the zoo")
    policy = load_policy(EXAMPLE).model_copy(update={"require_attack": False})
    rows = policy_rows(policy)
    assert gate(policy, zoo.load("digits-mlp-lipschitz"), rows).exit_code == 0
    report = gate(policy, zoo.load("digits-mlp-baseline"), rows)
    assert report.exit_code == 1 and report.worst is not None and "certified" in report.worst.what


def test_every_dtype_of_a_policy(place, capsys):
    for dtype, code in (("float64", 0), ("real", 0), ("bfloat16", 1)):
        policy_file(place, dtype=dtype)
        assert run(capsys)[0] == code, dtype


# ---- certificates


def test_a_verified_certificate_counts(place, model, capsys):
    path = certificate(place, model)
    with_file = run(capsys, "--certificate", path, "--json", "a.json")
    without = run(capsys, "--json", "b.json")
    assert with_file[0] == without[0] == 0
    a, b = (json.loads((place / name).read_text())["requirements"] for name in ("a.json", "b.json"))
    assert a == b


def test_the_smaller_of_claim_and_recomputation_counts(place, model, capsys):
    radius = min(s["radius"] for s in json.loads(certificate(place, model).read_text())["samples"] if s["status"] == "certified")
    proof = json.loads((place / "c.json").read_text())["samples"]
    everyone = sum(s["radius"] >= radius for s in proof) / LIMIT
    policy_file(place, radius=radius, certified=everyone)
    assert run(capsys, "--certificate", place / "c.json")[0] == 0

    def lower(t):
        next(s for s in t.raw["samples"] if s["radius"] == radius)["radius"] = radius * 0.99

    path = certificate(place, model, change=lower)
    assert run(capsys, "--certificate", path)[0] == 1
    policy_file(place, radius=radius * 1.0001, certified=everyone)

    def raise_within_rounding(t):
        next(s for s in t.raw["samples"] if s["radius"] == radius)["radius"] = radius * 1.0002

    path = certificate(place, model, change=raise_within_rounding)
    code, shown, _ = run(capsys, "--certificate", path)
    assert code == 1 and "within rounding" in shown


def test_a_missing_threat_does_not_pass(place, model, capsys):
    path = certificate(place, model, threat="linf")
    code, _, said = run(capsys, "--certificate", path)
    assert code == 1 and "l2" in said and "no usable certificate" in said
    both = ("--certificate", path, "--certificate", certificate(place, model, name="d.json"))
    assert run(capsys, *both)[0] == 0


REFUSED = {
    "partial": ({"rows": slice(0, 15)}, None, 1, "partial"),
    "fewer rows": ({"limit": 15}, None, 1, "15"),
    "another dtype": ({"dtype": "float64"}, None, 1, "float32"),
    "dtype edited": ({}, lambda t: t.raw.update(dtype="float64"), 1, "float32"),
    "other weights": ({}, lambda t: t.raw.update(weights_sha256="0" * 64), 1, "weights"),
    "other architecture": ({}, lambda t: t.raw.update(architecture_sha256="0" * 64), 1, "architecture"),
    "a changed row": ({}, lambda t: t.first.update(row_sha256="0" * 64), 1, "row"),
    "other rules": ({}, lambda t: t.raw["versions"].update(rules="0"), 1, "rules"),
    "an unknown key": ({}, lambda t: t.raw.update(colour="red"), 2, "colour"),
    "a flipped status": ({}, lambda t: t.first.update(status="abstained"), 2, "abstained"),
    "an unknown method": ({}, lambda t: t.raw.update(method="hope"), 2, "hope"),
    "a radius raised by 1 %": ({}, lambda t: t.first.update(radius=t.first["radius"] * 1.01), 3, "unsound"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trusted_never_passes(place, model, capsys, name):
    options, change, expected, word = REFUSED[name]
    path = certificate(place, model, change=change, name="bad.json", **options)
    good = certificate(place, model, name="good.json")
    for files in (("--certificate", path), ("--certificate", good, "--certificate", path)):
        code, shown, said = run(capsys, *files)
        assert code == expected and word in (said + shown).lower() and "bad.json" in said, said


def test_a_truncated_or_missing_certificate(place, model, capsys):
    path = certificate(place, model)
    path.write_bytes(path.read_bytes()[:-200])
    assert run(capsys, "--certificate", path)[0] == 2
    assert run(capsys, "--certificate", "nowhere.json")[0] == 2


def test_an_empty_list_of_certificates_is_no_certificate(model):
    policy = Policy.model_validate(
        {"data": "digits", "limit": 3, "dtype": "float32", "min_samples": 1, "min_clean_accuracy": 0.0,
         "threat": [{"name": "l2", "radius": 0.01, "min_certified_accuracy": 0.0}]}
    )  # fmt: skip
    assert gate(policy, model, policy_rows(policy), []).exit_code == 1


def test_a_method_and_a_clip_that_the_policy_names(place, model, capsys):
    path = certificate(place, model)
    policy_file(place, end='method = "global"')
    assert run(capsys)[0] == 0
    assert run(capsys, "--certificate", path)[0] == 1  # it was certified by 'best'
    policy_file(place, end="clip = [0, 1]")
    assert run(capsys, "--certificate", path)[0] == 0  # the whole ball covers the clipped one


# ---- attacks


def test_the_required_attack_runs(place, capsys):
    for attack in ("min", "pgd"):
        policy_file(place, limit=6, samples=6, more=f'require_attack = true\nattack = "{attack}"')
        code, shown, _ = run(capsys)
        assert code == 0 and f"withstands {attack}" in shown


def exaggerate(monkeypatch, factor: float) -> None:
    """A certifier that claims `factor` times the proved radius."""
    honest = certifiers.certify

    def lying(model, x, y, threat, *more, **options):
        return replace(proof := honest(model, x, y, replace(threat, radius=None), *more, **options), radius=proof.radius * factor)

    monkeypatch.setattr(certifiers, "certify", lying)


def test_wrong_predictions_are_never_certified(model, monkeypatch):
    """For every claim about a sample whose prediction differs from its label."""
    honest = certifiers.certify

    def lying(*given, **options):
        proof = honest(*given, **options)
        return replace(proof, radius=np.full(len(proof.radius), 7.0))

    monkeypatch.setattr(certifiers, "certify", lying)
    policy = Policy.model_validate(
        {"data": "digits:test", "dtype": "float32", "min_samples": 1, "min_clean_accuracy": 0.0,
         "threat": [{"name": "l2", "radius": 1.0, "min_certified_accuracy": 0.0}]}
    )  # fmt: skip
    report = gate(policy, model, policy_rows(policy))
    assert report.requirements[2].got == report.requirements[1].got < 1


def test_a_violation_is_exit_code_3(place, model, capsys, monkeypatch):
    exaggerate(monkeypatch, 20)
    policy_file(place, limit=6, samples=6, radius=1.0, more="require_attack = true")
    code, shown, said = run(capsys, "--json", "g.json")
    assert code == 3 and "UNSOUND" in shown and "inside the certified radius" in said
    assert json.loads((place / "g.json").read_text())["verdict"] == "unsound"
    # Certificates of the same liar verify by its own arithmetic; the attack still tells.
    monkeypatch.undo()
    monkeypatch.chdir(place)
    exaggerate(monkeypatch, 20)
    assert run(capsys, "--certificate", certificate(place, model, limit=6))[0] == 3


def test_a_violation_counts_even_where_nothing_else_passes(place, capsys, monkeypatch):
    exaggerate(monkeypatch, 20)
    policy_file(place, limit=6, samples=600, clean=1.0, radius=1.0, certified=1.0, more="require_attack = true")
    assert run(capsys)[0] == 3


def test_nan_radii_are_violations(model, monkeypatch):
    exaggerate(monkeypatch, float("nan"))
    policy = Policy.model_validate(
        {"data": "digits", "limit": 3, "dtype": "float32", "min_samples": 1, "min_clean_accuracy": 0.0, "require_attack": True,
         "threat": [{"name": "l2", "radius": 0.01, "min_certified_accuracy": 0.0}]}
    )  # fmt: skip
    assert gate(policy, model, policy_rows(policy), attack=by_name("min")).exit_code == 3
    with pytest.raises(BadInput, match="attack"):
        gate(policy, model, policy_rows(policy))


# ---- bad policies

BAD = {
    "an unknown key": ({"more": "colour = 3"}, "colour"),
    "an unknown key of a threat": ({"end": "colour = 3"}, "colour"),
    "a share above 1": ({"clean": 95}, "less than or equal to 1"),
    "a radius of 0": ({"radius": 0}, "greater than 0"),
    "a radius that is NaN": ({"radius": "nan"}, "finite"),
    "a radius as text": ({"radius": '"0.2"'}, "number"),
    "an unknown dtype": ({"dtype": "float8"}, "float8"),
    "no samples": ({"samples": 0}, "min_samples"),
    "an unknown attack": ({"more": 'attack = "hope"'}, "hope"),
    "an unknown method": ({"end": 'method = "hope"'}, "hope"),
    "an unknown threat": ({"end": '[[threat]]\nname = "l7"\nradius = 1\nmin_certified_accuracy = 0.1'}, "l7"),
    "the same threat twice": ({"end": '[[threat]]\nname = "l2"\nradius = 0.01\nmin_certified_accuracy = 0.1'}, "twice"),
    "broken TOML": ({"more": "= 3"}, "parse"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_policy_is_refused_in_one_sentence(place, capsys, name):
    options, word = BAD[name]
    policy_file(place, **options)
    code, _, said = run(capsys)
    lines = said.strip().splitlines()
    assert code == 2 and len(lines) == 1 and word in lines[0] and "expected" in lines[0], lines


def test_a_policy_without_threats_or_without_a_file(place, capsys):
    (place / "p.toml").write_text('data = "digits"\ndtype = "float32"\nmin_samples = 1\nmin_clean_accuracy = 0.5\n')
    assert run(capsys)[0] == 2
    assert run(capsys, policy="nowhere.toml")[0] == 2
    assert run(capsys, policy=place)[0] == 2
    policy_file(place)
    assert run(capsys, model="no-such-model")[0] == 2
