"""Certificate files: reading returns what was written, and every manipulation is found, with its exit code."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import robustlip.certifiers as certifiers
from robustlip import certificate_file, verification
from robustlip.certificate_file import CertificateFile, from_certificate, json_schema, parse, read, row_hashes, rows_sha256, write
from robustlip.checkpoints import save_model
from robustlip.cli import main
from robustlip.data import Dataset, load_data
from robustlip.errors import BadInput
from robustlip.files import json_text
from robustlip.hashing import architecture_sha256, printed
from robustlip.models import build
from robustlip.threats import EmbeddingBall, InputBall, WeightBall, parse_threat
from robustlip.verification import ROUNDING, cast, load_rows, verify

LIMIT = 12
SPEC = "digits:test"


def tiny() -> nn.Module:
    """A linear classifier of digits that is right on most of them: the class means as weights."""
    model = build({"kind": "mlp", "widths": [64, 10]})
    train = load_data("digits:train")
    x = train.x.flatten(1)
    means = torch.stack([x[train.y == c].mean(0) for c in range(10)])
    with torch.no_grad():
        # Centred, which changes no prediction and leaves float16 a margin above its rounding.
        model[-1].weight.copy_(means - means.mean(0))
        bias = -means.square().sum(1) / 2
        model[-1].bias.copy_(bias - bias.mean())
    return model.eval()


def certified(
    model: nn.Module, threat="l2", *, dtype=None, limit=LIMIT, radius=None, rows: slice = slice(None), method="best"
) -> CertificateFile:
    data = load_data(SPEC, limit=limit)
    ball = threat if not isinstance(threat, str) else parse_threat(threat, radius)
    proof = certifiers.certify(model, data.x[rows], data.y[rows], ball, method, dtype=dtype, index=data.index[rows])
    return from_certificate(proof, data, spec="digits", model="tiny.safetensors", limit=limit)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.set_num_threads(1)
    return tiny()


@pytest.fixture(scope="module")
def file(model) -> CertificateFile:
    return certified(model)


@pytest.fixture
def place(tmp_path, monkeypatch, model, file):
    """A folder with the model and its certificate, and the current one."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "m.safetensors", model)
    write(tmp_path / "c.json", file)
    return tmp_path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code or 0


def checked(capsys, place: Path, *more: object) -> tuple[int, str]:
    """(exit code, last line on stderr) of `robustlip verify`."""
    code = run("verify", place / "c.json", "--model", place / "m.safetensors", "--device", "cpu", *more)
    lines = capsys.readouterr().err.strip().splitlines()
    return code, lines[-1] if lines else ""


def tampered(place: Path, change) -> None:
    """Edit c.json as plain JSON, keeping the hash over the rows right."""
    raw = json.loads((place / "c.json").read_text())
    change(SimpleNamespace(raw=raw, samples=raw["samples"], first=next(s for s in raw["samples"] if s["status"] == "certified")))
    if all("row_sha256" in s for s in raw["samples"]):
        raw["data"]["sha256"] = rows_sha256([s["row_sha256"] for s in raw["samples"]])
    (place / "c.json").write_text(json.dumps(raw))


# ---- round trip


def test_what_is_written_reads_back_exactly(place, file):
    again = read(place / "c.json")
    assert again == file
    assert [s.radius.hex() for s in again.samples] == [s.radius.hex() for s in file.samples]
    assert {"threat", "norm", "dtype", "weights_sha256", "samples", "schema"} <= json.loads((place / "c.json").read_text()).keys()
    text = (place / "c.json").read_text()
    assert "NaN" not in text and "Infinity" not in text and "1e999" not in text and str(place) not in text


@given(st.lists(st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=True), min_size=1, max_size=20))
def test_every_float64_survives(radii):
    n = len(radii)
    data = Dataset("d", "test", "image", torch.zeros(n, 1), torch.zeros(n, dtype=torch.int64), torch.arange(n), 2)
    proof = certifiers.Certificate(
        threat=InputBall("l2"), method="best", dtype="float32", weights_sha256="0" * 64, architecture_sha256="1" * 64, index=np.arange(n),
        label=np.zeros(n, dtype=np.int64), prediction=np.zeros(n, dtype=np.int64), radius=np.array(radii), status=("certified",) * n,
        reason=("",) * n, bound={"free": math.inf}, versions={"robustlip": "0", "rules": "1", "torch": "2"},
    )  # fmt: skip
    made = from_certificate(proof, data, spec="digits:test", model="m")
    again = parse(json_text(made.document()).encode())
    assert [s.radius for s in again.samples] == [min(r, sys.float_info.max) for r in radii]
    assert again.bound == {"free": "infinite"}


@pytest.mark.parametrize(
    "threat",
    [InputBall("linf", None, (0.0, 1.0)), InputBall("l1", 0.01), WeightBall("spectral"), WeightBall("frobenius", 0.1, relative=False)],
    ids=lambda t: t.name,
)
def test_every_threat_comes_back(model, threat):
    made = certified(model, threat, limit=3)
    assert parse(json_text(made.document()).encode()).ball() == threat
    assert verify(made, model, load_rows(made.data)).exit_code == 0


def test_text_and_its_context():
    words = "".join(sorted(set(load_data("page").vocabulary)))
    gpt = build({"kind": "lipschitz-gpt", "vocabulary": words, "width": 8, "heads": 2, "blocks": 1}).eval()
    data = load_data("page", limit=4, context=6, vocabulary=words)
    proof = certifiers.certify(gpt, data.x, data.y, EmbeddingBall(tokens=(-1,)), index=data.index)
    made = from_certificate(proof, data, spec="page", model="gpt", limit=4, context=6)
    assert (made.threat, made.data.spec, made.data.context) == ("embedding-l2@-1", "page:test", 6)
    rows = load_rows(made.data, vocabulary=gpt.vocabulary)
    assert verify(made, gpt, rows).exit_code == 0
    other = rows.x.clone()
    other[2, 0] = (other[2, 0] + 1) % len(words)
    assert [f.sample for f in verify(made, gpt, replace(rows, x=other)).findings] == [int(rows.index[2])]


def test_a_file_of_rows_is_named_without_its_folder(place, model):
    (place / "inner").mkdir()
    (place / "inner" / "words.txt").write_text("to be or not to be " * 20)
    spec = str(place / "inner" / "words.txt")
    data = load_data(spec, limit=2, context=4)
    gpt = build({"kind": "lipschitz-gpt", "vocabulary": data.vocabulary, "width": 8, "heads": 2, "blocks": 1}).eval()
    proof = certifiers.certify(gpt, data.x, data.y, EmbeddingBall(), index=data.index)
    made = from_certificate(proof, data, spec=spec, model=str(place / "g.safetensors"), limit=2, context=4)
    assert (made.data.spec, made.model) == ("words.txt:test", "g.safetensors")
    with pytest.raises(BadInput, match=r"words\.txt"):
        load_rows(made.data, vocabulary=gpt.vocabulary)
    for found in (load_rows(made.data, place / "inner", gpt.vocabulary), load_rows(made.data, vocabulary=gpt.vocabulary, spec=spec)):
        assert verify(made, gpt, found).exit_code == 0


def test_row_hashes_see_bytes_shape_dtype_and_label():
    x, y = torch.zeros(1, 2, 2), torch.tensor([1])
    variants = [(x, y), (x + torch.tensor(1e-30), y), (-x, y), (x.reshape(1, 4), y), (x.double(), y), (x, y + 1)]
    assert len({row_hashes(a, b)[0] for a, b in variants}) == len(variants)
    assert row_hashes(x.repeat(2, 1, 1), y.repeat(2)) == 2 * row_hashes(x, y)
    assert row_hashes(x.transpose(1, 2), y) == row_hashes(x, y)


def test_the_published_schema_is_current(capsys):
    published = json.loads((Path(__file__).parents[1] / "docs" / "certificate.schema.json").read_text(encoding="utf-8"))
    assert published == json_schema(), "write it again: robustlip verify --schema > docs/certificate.schema.json"
    main_code = run("verify", "--schema")
    assert main_code == 0 and json.loads(capsys.readouterr().out) == published


# ---- verified


def test_certify_and_verify_from_the_command_line(place, capsys):
    assert run("certify", "m.safetensors", "--data", "digits", "--limit", LIMIT, "--json", "c.json", "--device", "cpu") == 0
    assert checked(capsys, place) == (0, "")
    assert checked(capsys, place, "--batch-size", 5, "--json", "v.json")[0] == 0
    assert json.loads((place / "v.json").read_text())["verdict"] == "verified"
    assert read(place / "c.json").data.spec == "digits:test"


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16", "real"])
def test_every_dtype_verifies(model, dtype):
    made = certified(model, dtype=dtype, limit=4)
    assert made.dtype == dtype
    assert verify(made, model, load_rows(made.data)).exit_code == 0
    # A model that is in that dtype already gives the same hash, so the same certificate.
    assert verify(made, cast(model, dtype), load_rows(made.data)).exit_code == 0


def test_a_requested_radius_leaves_smaller_proofs_abstained(model):
    median = float(np.median([s.radius for s in certified(model).samples]))
    made = certified(model, radius=median)
    assert {s.status for s in made.samples} >= {"certified", "abstained"} and made.requested_radius == median
    assert verify(made, model, load_rows(made.data)).exit_code == 0


def test_a_smaller_claim_is_fine(place, capsys):
    tampered(place, lambda t: t.first.update(radius=t.first["radius"] * 0.5))
    assert checked(capsys, place)[0] == 0


def test_a_claim_within_rounding_passes_and_is_said(place, model, file):
    tampered(place, lambda t: t.first.update(radius=t.first["radius"] * (1 + ROUNDING / 2)))
    result = verify(read(place / "c.json"), model, load_rows(file.data))
    assert result.exit_code == 0 and "within rounding" in result.notes[0]


# ---- tampered with: of something else (1)


def test_one_bit_of_a_weight(place, model, capsys):
    save_model(place / "m.safetensors", tiny())
    other = tiny()
    with torch.no_grad():
        other[-1].weight.view(torch.int32)[3, 7] ^= 1
    save_model(place / "m.safetensors", other)
    code, said = checked(capsys, place)
    assert code == 1 and "other weights" in said and "SHA-256" in said


def test_another_architecture_with_the_same_weights():
    relu, tanh = (build({"kind": "mlp", "widths": [64, 8, 10], "activation": name}).eval() for name in ("relu", "tanh"))
    tanh.load_state_dict(relu.state_dict())
    made = certified(relu, limit=3)
    assert [f.kind for f in verify(made, tanh, load_rows(made.data)).findings] == ["architecture"]


def test_a_changed_row(place, file, model):
    rows = load_rows(file.data)
    x, y = rows.x.clone(), rows.y.clone()
    x[4, 0, 0, 0] += 0.25
    result = verify(file, model, replace(rows, x=x))
    assert result.exit_code == 1 and [(f.kind, f.sample) for f in result.findings] == [("row", int(rows.index[4]))]
    y[2] = (y[2] + 1) % 10
    assert [(f.kind, f.sample) for f in verify(file, model, replace(rows, y=y)).findings] == [("row", int(rows.index[2]))]


def test_another_hash_of_a_row(place, capsys):
    tampered(place, lambda t: t.first.update(row_sha256="0" * 64))
    code, said = checked(capsys, place)
    assert code == 1 and "row" in said and "changed" in said


def test_another_dtype(place, capsys):
    tampered(place, lambda t: t.raw.update(dtype="float64"))
    code, said = checked(capsys, place)
    assert code == 1 and "dtype" in said and "float32" in said and "float64" in said


def test_other_rules(place, capsys, monkeypatch):
    monkeypatch.setattr(certifiers, "RULES_VERSION", "next")
    code, said = checked(capsys, place)
    assert code == 1 and "rules" in said and "next" in said


def test_another_source_limit_or_seed(place, capsys):
    for change in ({"seed": 1}, {"spec": "digits:train"}, {"limit": 13}):
        before = (place / "c.json").read_text()
        tampered(place, lambda t, change=change: t.raw["data"].update(change))
        code, said = checked(capsys, place)
        assert code == 1 and ("row" in said), said
        (place / "c.json").write_text(before)


def test_a_changed_label(place, capsys):
    """Label and prediction together, so that the sample stays consistent with itself."""
    tampered(place, lambda t: t.first.update(label=(t.first["label"] + 1) % 10, prediction=(t.first["label"] + 1) % 10))
    code, said = checked(capsys, place)
    assert code == 1 and "label" in said and str(read(place / "c.json").samples[0].index) in said


def test_a_changed_prediction(model, file):
    sample = next(s for s in certified(model, limit=None).samples if s.status == "misclassified")
    wrong = next(c for c in range(10) if c not in (sample.label, sample.prediction))
    raw = certified(model, limit=None).document()
    next(s for s in raw["samples"] if s["index"] == sample.index)["prediction"] = wrong
    altered = parse(json.dumps(raw).encode())
    assert [(f.kind, f.sample) for f in verify(altered, model, load_rows(altered.data)).findings] == [("prediction", sample.index)]


def test_a_partial_file(place, model, capsys):
    made = certified(model, rows=slice(0, 5))
    assert made.partial and len(made.samples) == 5 and made.data.requested == LIMIT
    write(place / "c.json", made)
    code, said = checked(capsys, place)
    assert code == 1 and "partial" in said
    # Saying that fewer were asked for does not help: the data has more.
    tampered(place, lambda t: (t.raw.update(partial=False), t.raw["data"].update(requested=5)))
    code, said = checked(capsys, place)
    assert code == 1 and "12" in said and "5" in said


# ---- tampered with: claims more than is proved (3)


def test_a_radius_raised_by_one_percent(place, capsys):
    tampered(place, lambda t: t.first.update(radius=t.first["radius"] * 1.01))
    code, said = checked(capsys, place, "--json", "v.json")
    assert code == 3 and "unsound" in said and str(read(place / "c.json").samples[0].index) in said
    written = json.loads((place / "v.json").read_text())
    assert written["exit_code"] == 3 and [f["kind"] for f in written["findings"]] == ["radius"]


def test_a_misclassified_sample_passed_off_as_certified(model):
    made = certified(model, limit=None)
    raw = made.document()
    sample = next(s for s in raw["samples"] if s["status"] == "misclassified")
    sample.update(prediction=sample["label"], status="certified", radius=0.1, reason="")
    altered = parse(json.dumps(raw).encode())
    result = verify(altered, model, load_rows(altered.data))
    assert result.exit_code == 3 and [f.sample for f in result.findings] == [sample["index"]]


def test_another_build_is_excused_only_up_to_real_arithmetic(model):
    """float16 radii carry a large allowance: a twentieth of it any processor's rounding may explain, all of it another build's."""
    made, real = (certified(model, dtype=name, limit=None) for name in ("float16", "real"))
    at = next(i for i, s in enumerate(made.samples) if s.status == "certified")
    assert made.samples[at].radius * 1.01 < real.samples[at].radius
    raw = made.document()
    gap = real.samples[at].radius - made.samples[at].radius
    for torch_version, radius, code in (
        (made.versions["torch"], made.samples[at].radius + 0.04 * gap, 0),
        (made.versions["torch"], made.samples[at].radius + 0.5 * gap, 3),
        ("1.0", made.samples[at].radius + 0.5 * gap, 1),
        ("1.0", real.samples[at].radius * 1.01, 3),
    ):
        raw["versions"]["torch"], raw["samples"][at]["radius"] = torch_version, radius
        altered = parse(json.dumps(raw).encode())
        assert verify(altered, model, load_rows(altered.data)).exit_code == code


def test_no_claim_is_verified_where_nothing_is_proved_here(model):
    """In bfloat16 the rounding allowance makes the radius 0: a twentieth of the real radius may hold elsewhere, but is not verified here."""
    made = certified(model, dtype="bfloat16", limit=None)
    real = {s.index: s.radius for s in certified(model, dtype="real", limit=None).samples}
    raw = made.document()
    sample = next(s for s in raw["samples"] if s["status"] == "abstained" and real[s["index"]] > 0)
    sample.update(status="certified", radius=0.04 * real[sample["index"]], reason="", method="global")
    altered = parse(json.dumps(raw).encode())
    result = verify(altered, model, load_rows(altered.data))
    assert result.exit_code == 1 and [f.sample for f in result.findings] == [sample["index"]]
    assert "rounding on the machine that made it" in result.sentence()


@pytest.mark.parametrize(
    ("name", "stated", "words"),
    [("model_l2", 1e-9, "bound model_l2"), ("model_domain", "none", "bound model_domain"), ("model_extra", 1.0, "to be absent")],
)
def test_a_smaller_lipschitz_constant_than_the_models(place, capsys, name, stated, words):
    tampered(place, lambda t: t.raw["bound"].update({name: stated}))
    code, said = checked(capsys, place)
    assert code == 1 and words in said


def test_a_method_of_one_sample_does_not_excuse_what_the_files_method_cannot_do(model):
    """Searches may end up to 5 % apart; `global` does not search, whatever a sample in the file states."""
    made = certified(model, method="global")
    raw = made.document()
    sample = next(s for s in raw["samples"] if s["status"] == "certified")
    sample.update(radius=sample["radius"] * 1.03, method="sdp")
    altered = parse(json.dumps(raw).encode())
    assert verify(altered, model, load_rows(altered.data)).exit_code == 3


def test_rows_are_proved_in_the_batches_of_the_file(place, model, file, monkeypatch):
    """What a searched radius is depends on the samples beside it."""
    sizes: list[int] = []
    real = certifiers.certify

    def counted(chain, x, *more, **options):
        sizes.append(len(x))
        return real(chain, x, *more, **options)

    assert run("certify", place / "m.safetensors", "--data", SPEC, "--limit", 7, "--method", "global", "--batch-size", 3, "--json", "b.json") == 0
    made = read(place / "b.json")
    assert made.batch_size == 3 and file.batch_size is None
    monkeypatch.setattr(certifiers, "certify", counted)
    for batch_size, expected in ((None, [3, 3, 1]), (5, [5, 2])):
        sizes.clear()
        assert verify(made, model, load_rows(made.data), batch_size=batch_size).exit_code == 0 and sizes == expected
    sizes.clear()
    assert verify(file, model, load_rows(file.data)).exit_code == 0 and sizes == [LIMIT]


# ---- hostile: refused in one sentence (2)

HOSTILE = {
    "a method that is none": (lambda t: t.first.update(method="nonsense by god"), "among global"),
    "text that turns round": (lambda t: t.raw.update(model="GPT \u202e evil"), "model"),
    "status flipped to abstained": (lambda t: t.first.update(status="abstained"), "abstained"),
    "status flipped to misclassified": (lambda t: t.first.update(status="misclassified"), "misclassified"),
    "label alone": (lambda t: t.first.update(label=t.first["label"] + 1), "label"),
    "a misclassified sample with a radius": (
        lambda t: t.first.update(status="misclassified", prediction=(t.first["label"] + 1) % 10, reason="the prediction is not the label"),
        "radius 0",
    ),
    "certified at 0": (lambda t: t.first.update(radius=0.0), "above 0"),
    "a negative radius": (lambda t: t.first.update(radius=-0.5), "greater than or equal to 0"),
    "a radius as text": (lambda t: t.first.update(radius="0.5"), "valid number"),
    "a label as a float": (lambda t: t.first.update(label=1.0), "valid integer"),
    "a label as a boolean": (lambda t: t.first.update(label=True), "valid integer"),
    "an index beyond int64": (lambda t: t.first.update(index=2**70), "less than or equal"),
    "the same index twice": (lambda t: t.samples[1].update(index=t.samples[0]["index"]), "twice"),
    "an unknown key": (lambda t: t.raw.update(colour="red"), "colour"),
    "an unknown key of a sample": (lambda t: t.first.update(colour="red"), "colour"),
    "a missing key": (lambda t: t.raw.pop("method"), "method"),
    "an unknown schema": (lambda t: t.raw.update(schema="robustlip-certificate-9"), "robustlip-certificate-9"),
    "an unknown dtype": (lambda t: t.raw.update(dtype="float8"), "float8"),
    "an unknown threat": (lambda t: t.raw.update(threat="l7"), "l7"),
    "an unknown method": (lambda t: t.raw.update(method="hope"), "hope"),
    "a norm of another threat": (lambda t: t.raw.update(norm="linf"), "linf"),
    "a hash that is none": (lambda t: t.raw.update(weights_sha256="abc"), "weights_sha256"),
    "no samples": (lambda t: t.raw.update(samples=[]), "samples"),
    "more samples than requested": (lambda t: t.raw["data"].update(requested=3), "3"),
    "partial denied": (lambda t: t.samples.pop(), "partial"),
    "a radius below the requested one": (lambda t: t.raw.update(requested_radius=1e6), "requested"),
    "no versions": (lambda t: t.raw.update(versions={}), "versions"),
    "control characters": (lambda t: t.raw.update(model="\x1b[2J"), "model"),
    "control characters in a key": (lambda t: t.raw["versions"].update({"\x1b[2J": "1"}), "versions"),
    "a path": (lambda t: t.raw["data"].update(spec="../../etc/secret.txt:test"), "folders"),
    "an absolute path": (lambda t: t.raw["data"].update(spec="/etc/secret.txt"), "folders"),
    "no object": (lambda t: t.raw.update(bound=3), "bound"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_sentence(place, capsys, name):
    change, word = HOSTILE[name]
    tampered(place, change)
    assert run("verify", "c.json", "--model", "m.safetensors", "--device", "cpu") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and word in lines[0] and "expected" in lines[0] and ", got " in lines[0] and "\x1b" not in lines[0], lines


TEXTS = {
    "empty": lambda text: b"",
    "truncated": lambda text: text[: len(text) // 2],
    "NaN": lambda text: text.replace(b'"radius": 0', b'"radius": NaN, "x": 0', 1),
    "Infinity": lambda text: text.replace(b'"seed": 0', b'"seed": Infinity'),
    "an infinite radius": lambda text: re.sub(rb'"radius": 0[.][0-9]+', b'"radius": 1e999', text, count=1),
    "an overflowing number": lambda text: text.replace(b'"clip": null', b'"clip": [0, 1e999]'),
    "another hash over the rows": lambda text: re.sub(rb'("sha256": ")[0-9a-f]{8}', rb"\g<1>00000000", text),
    "a key twice": lambda text: text.replace(b'"dtype"', b'"dtype": "real", "dtype"'),
    "nested too deeply": lambda text: b"[" * 200_000,
    "a huge integer": lambda text: text.replace(b'"seed": 0', b'"seed": ' + b"9" * 10_000),
    "not UTF-8": lambda text: b"\xff\xfe" + text,
    "a lone surrogate": lambda text: text.replace(b'"method": "best"', b'"method": "\\ud800"'),
    "not an object": lambda text: b"[]",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_broken_text_is_refused_in_one_sentence(place, capsys, name):
    path = place / "c.json"
    before = path.read_bytes()
    path.write_bytes(TEXTS[name](before))
    assert path.read_bytes() != before
    assert run("verify", "c.json", "--model", "m.safetensors", "--device", "cpu") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "c.json" in lines[0] and "expected" in lines[0], lines


def test_an_overlong_or_missing_file(place, capsys, monkeypatch):
    assert run("verify", "nowhere.json", "--model", "m.safetensors") == 2
    assert "nowhere.json" in capsys.readouterr().err
    monkeypatch.setattr(certificate_file, "SIZE_LIMIT", 100)
    assert run("verify", "c.json", "--model", "m.safetensors") == 2
    assert "100 bytes" in capsys.readouterr().err
    assert run("verify", "c.json") == 2 and run("verify", place, "--model", "m.safetensors") == 2


def test_samples_that_are_not_of_the_data(model):
    data = load_data(SPEC, limit=3)
    proof = certifiers.certify(model, data.x, data.y, InputBall("l2"))  # indices 0, 1, 2 instead of the rows'
    with pytest.raises(BadInput, match="index 0"):
        from_certificate(proof, data, spec=SPEC, model="m", limit=3)


def test_the_architecture_is_hashed_alike_by_every_torch() -> None:
    """What torch prints of norms has changed once; the text that is hashed is that of 2.13, and of every other layer what torch prints."""
    plain = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Sequential(), nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 2)]))
    assert printed(plain) == repr(plain)
    last = nn.LayerNorm((2, 4), eps=1e-3, elementwise_affine=False)
    model = nn.Sequential(plain, nn.Sequential(nn.LayerNorm(4, bias=False), nn.BatchNorm1d(3), last))
    assert printed(model[1]).split("\n") == [
        "Sequential(",
        "  (0): LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=False)",
        "  (1): BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)",
        "  (2): LayerNorm((2, 4), eps=0.001, elementwise_affine=False, bias=False)",
        ")",
    ]
    assert printed(model[1]).replace("\n", "\n  ") in printed(model)
    other = nn.Sequential(plain, nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(3), last))
    assert architecture_sha256(other) != architecture_sha256(model)


def test_a_nan_radius_reproduces_nothing(model, file, monkeypatch):
    honest = verification.prove

    def broken(*given, **options):
        proof = honest(*given, **options)
        return replace(proof, radius=np.full(len(proof.radius), np.nan))

    monkeypatch.setattr(verification, "prove", broken)
    result = verify(file, model, load_rows(file.data))
    assert result.exit_code != 0 and {f.kind for f in result.findings} == {"radius"}
