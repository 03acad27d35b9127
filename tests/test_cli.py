"""The command line: its output, what it refuses, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from robustlip.cli import console, main
from robustlip.hashing import weights_sha256
from robustlip.models import zoo

TINY = """
import torch
from torch import nn

def good():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

def other():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

def nan():
    model = good()
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    return model

def unknown_layer():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.RReLU(), nn.BatchNorm1d(16), nn.Linear(16, 10))
"""
SUITE = """
name = "tiny"
[[pair]]
name = "p"
data = "digits:test"
limit = 5
lipschitz = "tinymodels_for_cli:good"
baseline = "tinymodels_for_cli:{baseline}"
[[pair.threat]]
name = "l2"
radii = [0.01, 0.1]
attacks = [{{ name = "min", options = {{ steps = 2, descent = 5 }} }}]
[[pair.threat]]
name = "weights-spectral"
sensitivity_radius = 0.01
search = {{ starts = 1, power_steps = 2, ascent_steps = 2 }}
{more}
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    (tmp_path / "tinymodels_for_cli.py").write_text(TINY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tinymodels_for_cli", raising=False)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    sys.modules.pop("tinymodels_for_cli", None)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code or 0


def refused(capsys, *arguments: str) -> str:
    """The one sentence of bad input."""
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if line.startswith("robustlip: ")]
    assert len(lines) == 1, lines
    return lines[0]


def suite_file(place: Path, baseline: str = "other", more: str = "") -> Path:
    path = place / "suite.toml"
    path.write_text(SUITE.format(baseline=baseline, more=more))
    return path


def parquet(place: Path, labels: list[int]) -> Path:
    import datasets
    from PIL import Image

    images = [Image.fromarray(np.full((8, 8), 20 * i, dtype=np.uint8)) for i in range(len(labels))]
    path = place / "my.parquet"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(str(path))
    return path


GOOD = "tinymodels_for_cli:good"


# ---- what is refused


def test_bad_input_is_one_sentence_and_exit_code_2(place, capsys):
    def certify(model=GOOD, data="digits:test", *more):
        return refused(capsys, "certify", model, "--data", data, "--limit", "3", *more)

    assert "no-such-model" in certify("no-such-model")
    assert "no_such_data" in certify(GOOD, "no_such_data")
    assert "no_such_split" in certify(GOOD, "digits:no_such_split")
    assert "NaN" in certify("tinymodels_for_cli:nan")
    assert "RReLU" in certify("tinymodels_for_cli:unknown_layer") or "BatchNorm1d" in certify("tinymodels_for_cli:unknown_layer")
    assert "tinymodels_for_cli" in certify("tinymodels_for_cli:no_such_function")
    assert "-1" in certify(GOOD, "digits:test", "--radius", "-1")
    assert "above 0" in certify(GOOD, "digits:test", "--radius", "0")
    assert "'l7'" in certify(GOOD, "digits:test", "--threat", "l7")
    assert "'hope'" in certify(GOOD, "digits:test", "--method", "hope")
    assert "embedding" in certify(GOOD, "digits:test", "--threat", "embedding-l2")
    assert "nowhere" in certify(GOOD, "digits:test", "--device", "nowhere")
    assert "folder" in certify(GOOD, "digits:test", "--json", str(place))


def test_labels_out_of_range(place, capsys):
    assert "12" in refused(capsys, "certify", GOOD, "--data", parquet(place, [0, 12, 1]))
    assert "12" in refused(capsys, "attack", GOOD, "--data", parquet(place, [0, 12, 1]))
    assert "-1" in refused(capsys, "certify", GOOD, "--data", parquet(place, [0, -1, 1]))


def test_a_truncated_model_file(place, capsys):
    from robustlip.checkpoints import save_model
    from robustlip.models import build

    path = place / "m.safetensors"
    save_model(path, build({"kind": "mlp", "widths": [64, 16, 10]}))
    assert run("certify", path, "--data", "digits:test", "--limit", "3") == 0
    capsys.readouterr()
    path.write_bytes(path.read_bytes()[:-100])
    assert "m.safetensors" in refused(capsys, "certify", path, "--data", "digits:test")
    path.write_bytes(path.read_bytes()[:5])
    assert "m.safetensors" in refused(capsys, "attack", path, "--data", "digits:test")


def test_a_bad_attack(capsys):
    assert "'hope'" in refused(capsys, "attack", GOOD, "--data", "digits:test", "--attack", "hope")
    assert "radius" in refused(capsys, "attack", GOOD, "--data", "digits:test", "--attack", "pgd", "--limit", "3")


def test_a_suite_or_recipe_with_an_unknown_key(place, capsys):
    assert "'colour'" in refused(capsys, "eval", suite_file(place, more="colour = 3"), "--out", place / "run")
    assert not (place / "run").exists()
    (place / "recipe.toml").write_text("name = 'r'\nspeed = 3\n")
    assert "recipe.toml" in refused(capsys, "train", place / "recipe.toml", "--out", place / "t")
    assert "nowhere" in refused(capsys, "train", place / "nowhere.toml")


def test_a_run_or_zoo_model_that_is_not_there(place, capsys):
    assert "manifest" in refused(capsys, "table", place)
    assert "manifest" in refused(capsys, "report", place / "nowhere")
    assert "no-such-model" in refused(capsys, "zoo", "show", "no-such-model")


def test_wrong_usage_is_exit_code_2_too(capsys):
    assert run("certify", GOOD) == 2
    assert run("certify", GOOD, "--data", "digits", "--limit", "0") == 2
    assert run("nonsense") == 2


def test_an_unexpected_exception_keeps_its_traceback(place, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("robustlip.certifiers.certify", broken)
    with pytest.raises(ZeroDivisionError):
        main(["certify", GOOD, "--data", "digits:test", "--limit", "3"])


# ---- what is written


def test_certify_and_attack_write_what_the_issue_says(place, capsys):
    import tinymodels_for_cli

    from robustlip.layers import as_chain

    assert run("certify", GOOD, "--data", "digits:test", "--limit", "7", "--batch-size", "3", "--json", place / "c.json") == 0
    assert "device:" in capsys.readouterr().out
    assert run("attack", GOOD, "--data", "digits:test", "--limit", "7", "--batch-size", "3", "--json", place / "a.json") == 0
    certificate, observation = (json.loads((place / name).read_text()) for name in ("c.json", "a.json"))
    for written in (certificate, observation):
        assert {"threat", "norm", "dtype", "weights_sha256", "samples"} <= written.keys()
        assert (written["threat"], written["norm"]) == ("l2", "l2")
        assert written["weights_sha256"] == weights_sha256(as_chain(tinymodels_for_cli.good()))
        assert len(written["samples"]) == 7
        assert all({"index", "label", "prediction", "radius", "status"} <= sample.keys() for sample in written["samples"])
    assert [s["index"] for s in certificate["samples"]] == [s["index"] for s in observation["samples"]]
    for proved, found in zip(certificate["samples"], observation["samples"], strict=True):
        assert found["radius"] is None or proved["radius"] <= found["radius"]


def test_a_model_of_a_subset_says_so_in_the_list(capsys) -> None:
    assert run("zoo", "list") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "-mlp-" in line}
    assert "mnist (subset)" in lines["mnist-mlp-lipschitz"] and "subset" not in lines["digits-mlp-lipschitz"]


def test_the_list_of_the_zoo_fits_the_terminal(capsys, monkeypatch) -> None:
    from robustlip.models import zoo

    for columns in (80, 100, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert run("zoo", "list") == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(len(line.rstrip()) for line in lines) <= columns
        rows = {line.split()[0]: line for line in lines if line.strip()}
        for name in zoo.names():  # each on one line, with its figures
            assert str(zoo.card(name)["parameters"]) in rows[name]
            assert (str(zoo.card(name)["weights_sha256"])[:12] in rows[name]) == (columns >= 100)


def test_json_without_a_file_is_stdout(capsys):
    """At the end, and before another option."""
    assert run("zoo", "show", "digits-mlp-lipschitz", "--json") == 0
    card = json.loads(capsys.readouterr().out)
    assert card["val_accuracy"] > 0.9 and card["sound_bound"]["l2"] > 0 and card["sound_bound"]["rms_inf"] > 0
    assert run("certify", GOOD, "--json", "--data", "digits:test", "--limit", "3") == 0
    assert len(json.loads(capsys.readouterr().out)["samples"]) == 3


@pytest.mark.parametrize("verb", ["certify", "attack", "smooth"])
def test_data_of_another_shape_is_one_sentence(capsys, verb, monkeypatch):
    """digits have 64 numbers, this model wants 784."""
    more = {"certify": (), "attack": ("--threat", "l2"), "smooth": ("--sigma", "0.1")}[verb]
    said = refused(capsys, verb, "mnist-mlp-lipschitz", "--data", "digits:test", "--limit", "2", *more)
    assert "samples of shape (1, 8, 8)" in said and "trained for" in said


def test_a_model_without_weights_can_be_attacked_and_errors_may_say_nothing():
    from robustlip.checks import check_fit
    from robustlip.errors import BadInput, first_line

    x = torch.rand(3, 1, 2, 2)
    assert check_fit(torch.nn.Flatten(), x).shape == (1, 4)

    class Silent(torch.nn.Module):
        def forward(self, x):
            raise ValueError

    with pytest.raises(BadInput, match=r"\(ValueError\)"):
        check_fit(Silent(), x)
    assert first_line(RuntimeError("a\nb")) == "a" and first_line(KeyError()) == "KeyError"


def test_a_callable_that_fails_is_one_sentence(place, capsys):
    (place / "broken_for_cli.py").write_text("def model():\n    raise KeyError('weights')\n")
    said = refused(capsys, "certify", "broken_for_cli:model", "--data", "digits:test", "--limit", "2")
    assert "KeyError" in said and "nn.Module" in said


def test_images_for_a_model_of_characters(capsys):
    said = refused(capsys, "certify", "shakespeare-gpt-lipschitz", "--data", "digits:test", "--threat", "embedding-l2")
    assert "got the images 'digits'" in said


def test_json_on_stdout_is_json_alone(capsys):
    assert run("certify", GOOD, "--data", "digits:test", "--limit", "3", "--json", "-") == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["samples"]) == 3
    assert "device:" in captured.err
    assert run("zoo", "list", "--json", "-") == 0
    assert isinstance(json.loads(capsys.readouterr().out)["models"], list)


def test_a_requested_radius(capsys):
    assert run("certify", GOOD, "--data", "digits:test", "--limit", "3", "--radius", "0.001") == 0
    assert "at radius 0.001" in capsys.readouterr().out
    assert run("attack", GOOD, "--data", "digits:test", "--limit", "3", "--attack", "pgd", "--radius", "3") == 0
    assert "within radius 3" in capsys.readouterr().out


def test_certify_says_why_nothing_is_proved_and_whose_weights(capsys) -> None:
    """The rounding error of bfloat16 exceeds every margin of a small MLP; the hash of the cast weights is shown next to that of the model."""
    digits = "digits-mlp-lipschitz"
    assert run("certify", digits, "--data", "digits:test", "--limit", "3", "--method", "global", "--dtype", "bfloat16", "--json", "c.json") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not certified because the margin does not exceed the error bound of bfloat16 rounding (3)" in shown
    model = zoo.load(digits)
    own, cast = weights_sha256(model), weights_sha256(model.to(torch.bfloat16))
    assert f"weights {own}" in shown and f"as bfloat16 {cast}" in shown and own != cast
    assert json.loads(Path("c.json").read_text())["weights_sha256"] == cast
    assert run("certify", digits, "--data", "digits:test", "--limit", "3", "--method", "global", "--radius", "5") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not certified because proved for a smaller radius only (3)" in shown and "as float32" not in shown


def test_a_narrow_terminal_gets_digests_in_one_piece(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, label = "0123456789abcdef" * 4, "clean accuracy (%)"
    for width, beside in ((80, False), (100, True)):
        monkeypatch.setattr(console, "WIDTH", width)
        console.Out().table("title", ["", "what"], [(label, "1"), ("weights", digest)])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width and any(digest in line for line in lines)
        assert (f"weights: {digest}" in lines) != beside


def test_eval_table_report(place, capsys):
    assert run("eval", suite_file(place), "--out", place / "run", "--json", place / "e.json") == 0
    shown = capsys.readouterr().out
    assert "tinymodels_for_cli:good" in shown and "tinymodels_for_cli:other" in shown and "report:" in shown
    assert max(len(line) for line in shown.splitlines()) <= 120 + len(str(place))
    written = json.loads((place / "e.json").read_text())
    assert len(written["rows"]) == 4 and not written["partial"]
    assert {"report.html", "table.md", "table.csv", "table.tex", "table.html", "manifest.json"} <= {p.name for p in (place / "run").iterdir()}
    for form, word in (("md", "| Model |"), ("csv", "clean_accuracy"), ("latex", r"\toprule"), ("html", "<table>")):
        assert run("table", place / "run", "--format", form) == 0
        assert word in capsys.readouterr().out
    assert run("table", place / "run", "--compact", "--json", "-") == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2
    assert "'pdf'" in refused(capsys, "table", place / "run", "--format", "pdf")
    assert run("report", place / "run", "--out", place / "page.html") == 0
    assert (place / "page.html").read_text().startswith("<!doctype html>")


def test_eval_keeps_the_good_model_when_the_other_is_bad(place, capsys):
    assert run("eval", suite_file(place, baseline="nan"), "--out", place / "run") == 2
    captured = capsys.readouterr()
    assert "PARTIAL" in captured.out and "tinymodels_for_cli:good" in captured.out
    assert "NaN" in captured.err
    assert run("table", place / "run") == 0
    assert "PARTIAL" in capsys.readouterr().out


def test_a_forced_contradiction_ends_in_exit_code_3(place, capsys, monkeypatch):
    from dataclasses import replace

    import robustlip.certifiers
    from robustlip.certifiers import certify

    def absurd(*arguments, **options):
        certificate = certify(*arguments, **options)
        right = certificate.prediction == certificate.label
        return replace(certificate, radius=np.where(right, 1e6, 0.0))

    monkeypatch.setattr(robustlip.certifiers, "certify", absurd)
    (place / "suite.toml").write_text(SUITE.format(baseline="other", more="").replace("limit = 5", "limit = 60"))
    assert run("eval", place / "suite.toml", "--out", place / "run") == 3
    captured = capsys.readouterr()
    (sentence,) = [line for line in captured.err.splitlines() if line.startswith("robustlip: ")]
    record = worst(place / "run")
    assert "1000000.0" in sentence and repr(record.attacked_radius) in sentence and f"sample {record.index}" in sentence
    point = place / "run" / record.adversarial
    assert point.is_file() and str(point) in sentence
    assert (place / "run/report.html").is_file() and "tinymodels_for_cli:good" in captured.out, "the results were lost"
    assert run("table", place / "run") == 3
    assert run("report", place / "run") == 3


def worst(folder: Path):
    from robustlip.eval.runner import read_run

    return max((r for r in read_run(folder).records if r.contradiction()), key=lambda r: r.certified_radius - r.attacked_radius)


# ---- how it starts


def test_help_and_version_do_not_wait_for_torch():
    def started(*command: str) -> str:
        root = Path(__file__).parents[1]
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, cwd=root).stdout

    code = "import sys; from robustlip.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    shown = started("-c", code + "assert not {'torch', 'pandas', 'matplotlib'} & set(sys.modules)")
    for verb in ("demo", "train", "certify", "attack", "eval", "table", "report", "zoo"):
        assert verb in shown
    assert started("-m", "robustlip", "--version").startswith("robustlip 0.")


@pytest.mark.parametrize(
    ("outcome", "code"),
    [(None, 0), (SystemExit(0), 0), (SystemExit(None), 0), (SystemExit(2), 2), (SystemExit("words"), 1), (RuntimeError("broken"), 70)],
)
def test_one_of_several_processes_ends_at_once_with_its_exit_code(monkeypatch, capfd, outcome, code) -> None:
    """Without the interpreter's clearing up, which gloo's threads would outlive; a traceback is printed first."""
    from robustlip import __main__

    class Exited(BaseException):
        pass

    def exit_(code: int) -> None:
        raise Exited(code)

    def main() -> None:
        print("said")
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(__main__, "main", main)
    monkeypatch.setattr(__main__.os, "_exit", exit_)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Exited) as ended:
        __main__.run()
    assert ended.value.args == (code,)
    printed = capfd.readouterr()
    assert printed.out == "said\n" and ("RuntimeError: broken" in printed.err) == isinstance(outcome, RuntimeError)
    monkeypatch.setenv("WORLD_SIZE", "1")
    if outcome is None:
        assert __main__.run() is None
