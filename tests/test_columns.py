"""Options for columns and configurations: every verb that takes data has them, and results record them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import run
from PIL import Image

import robustlip
from robustlip.certificate_file import read
from robustlip.data import load_data

MODEL = "digits-mlp-lipschitz"
COLUMNS = ("--image-column", "right", "--label-column", "digit")
KEYS = 'image_column = "right"\nlabel_column = "digit"\n'


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """x.parquet: digits in the column 'right', blank images in 'image', their labels in 'digit', zeros in 'label'; sets/mine the same as 'b'."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROBUSTLIP_DATA", str(tmp_path / "sets"))
    data = load_data("digits:test", limit=4)

    def cell(array: np.ndarray) -> dict[str, bytes]:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        return {"bytes": buffer.getvalue()}

    right = [cell((x[0].numpy() * 255).round().astype(np.uint8)) for x in data.x]
    table = pa.table({"image": [cell(np.zeros((8, 8), np.uint8))] * 4, "right": right, "label": [0] * 4, "digit": data.y.tolist()})
    for path in ("x.parquet", "sets/mine/a/test.parquet", "sets/mine/b/test.parquet", "sets/mine/b/train.parquet"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table if "/a/" not in path else table.slice(0, 2), path)
    return tmp_path


def accuracy(path: str) -> float:
    samples = json.loads(Path(path).read_text())["samples"]
    return float(np.mean([s["label"] == s["prediction"] for s in samples]))


@pytest.mark.parametrize("verb", [
    ("certify", "--method", "global"), ("certify", "--method", "all"), ("attack", "--attack", "pgd", "--radius", 0.1),
    ("smooth", "--sigma", 0.1, "--samples", 20),
    ("audit", "--starts", 2, "--steps", 2),
])  # fmt: skip
def test_verbs_take_columns(capsys: pytest.CaptureFixture[str], verb: tuple[object, ...]) -> None:
    name, *rest = verb
    assert run(name, MODEL, "--data", "x.parquet", *rest, "--json", "out.json") == 2
    said = capsys.readouterr().err
    assert ("--image-column" in said and "image, right" in said) or "--label-column" in said
    assert run(name, MODEL, "--data", "x.parquet", *rest, *COLUMNS, "--json", "out.json") == 0, capsys.readouterr().err
    if (rest[:1] == ["--method"] and rest[1] == "global") or name == "attack":
        assert accuracy("out.json") == 1.0  # the blank images of 'image' are not what was read
    assert run(name, MODEL, "--data", "mine:test", *rest, *COLUMNS) == 2 and "--subset" in capsys.readouterr().err
    assert run(name, MODEL, "--data", "mine:test", *rest, *COLUMNS, "--subset", "b") == 0


def test_audit_takes_columns_of_data_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("audit", MODEL, *COLUMNS) == 2 and "with --data" in capsys.readouterr().err


def test_a_certificate_names_its_columns_and_is_verified_by_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("certify", MODEL, "--data", "mine:test", *COLUMNS, "--subset", "b", "--method", "global", "--json", "c.json") == 0
    source = read("c.json").data
    assert (source.subset, source.image_column, source.label_column, source.text_column) == ("b", "right", "digit", None)
    assert run("verify", "c.json", "--model", MODEL) == 0, capsys.readouterr().err
    changed = json.loads(Path("c.json").read_text())
    changed["data"]["image_column"] = "image"
    Path("d.json").write_text(json.dumps(changed))
    assert run("verify", "d.json", "--model", MODEL) != 0
    assert run("certify", MODEL, "--data", "digits:test", "--limit", 2, "--method", "global", "--json", "e.json") == 0
    assert read("e.json").data.image_column is None


def test_a_certificate_without_the_keys_is_still_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("certify", MODEL, "--data", "digits:test", "--limit", 2, "--method", "global", "--json", "c.json") == 0
    old = json.loads(Path("c.json").read_text())
    for key in ("subset", "image_column", "label_column", "text_column"):
        del old["data"][key]
    Path("c.json").write_text(json.dumps(old))
    assert run("verify", "c.json", "--model", MODEL) == 0, capsys.readouterr().err


def test_policies_and_suites_take_columns(capsys: pytest.CaptureFixture[str]) -> None:
    policy = 'data = "x.parquet"\n%sdtype = "float32"\nmin_samples = 4\nmin_clean_accuracy = 1.0\n'
    policy += '[[threat]]\nname = "l2"\nradius = 0.001\nmin_certified_accuracy = 0.5\n'
    Path("p.toml").write_text(policy % "")
    assert run("gate", MODEL, "--policy", "p.toml") == 2 and "column" in capsys.readouterr().err
    Path("p.toml").write_text(policy % KEYS)
    assert run("gate", MODEL, "--policy", "p.toml") == 0, capsys.readouterr()
    suite = f'name = "s"\n[[pair]]\nname = "p"\ndata = "mine:test"\nlimit = 4\nsubset = "b"\n{KEYS}lipschitz = "{MODEL}"\n'
    suite += '[[pair.threat]]\nname = "l2"\nradii = [0.1]\nmethod = "global"\nattacks = [{name = "pgd"}]\n'
    Path("s.toml").write_text(suite)
    assert run("eval", "s.toml", "--out", "e") == 0, capsys.readouterr()


def test_a_run_that_goes_on_sees_that_its_data_changed(capsys: pytest.CaptureFixture[str]) -> None:
    suite = f'name = "s"\n[[pair]]\nname = "p"\ndata = "x.parquet"\nlimit = 4\n{KEYS}lipschitz = "{MODEL}"\n'
    suite += '[[pair.threat]]\nname = "l2"\nradii = [0.1]\nmethod = "global"\nattacks = [{name = "pgd"}]\n'
    Path("s.toml").write_text(suite)
    assert run("eval", "s.toml", "--out", "e") == 0
    capsys.readouterr()
    assert run("eval", "s.toml", "--out", "e") == 0 and "kept from an earlier run" in "".join(capsys.readouterr())
    table = pq.read_table("x.parquet")
    pq.write_table(table.set_column(1, "right", table.column("right").take([3, 2, 1, 0])), "x.parquet")
    assert run("eval", "s.toml", "--out", "e") == 0 and "kept from an earlier run" not in "".join(capsys.readouterr())


def test_recipes_take_columns(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = 'name = "r"\n[data]\nname = "mine"\nsubset = "b"\n%s[model]\nkind = "mlp"\nwidths = [64, 4, 10]\n'
    recipe += "[optimizer]\nlr = 0.01\n[run]\nsteps = 1\nbatch = 4\n"
    Path("r.toml").write_text(recipe % "")
    assert run("train", "r.toml", "--out", "t") == 2 and "column" in capsys.readouterr().err
    Path("r.toml").write_text(recipe % KEYS)
    assert run("train", "r.toml", "--out", "t") == 0, capsys.readouterr().err


def test_training_refuses_classes_that_are_numbered_differently(capsys: pytest.CaptureFixture[str]) -> None:
    table = pq.read_table("x.parquet").select(["right"])
    info = b'{"info": {"features": {"digit": {"_type": "ClassLabel", "names": %s}}}}'
    for split, names in (("train", b'["b", "a"]'), ("test", b'["a", "b"]')):
        Path("sets/other").mkdir(exist_ok=True)
        made = table.append_column("digit", pa.array([0, 1, 0, 1])).replace_schema_metadata({b"huggingface": info % names})
        pq.write_table(made, f"sets/other/{split}.parquet")
    Path("r.toml").write_text(
        'name = "r"\n[data]\nname = "other"\n[model]\nkind = "mlp"\nwidths = [64, 4, 10]\n[optimizer]\nlr = 0.01\n[run]\nsteps = 1\nbatch = 4\n'
    )
    assert run("train", "r.toml", "--out", "t") == 2 and "names in both splits" in capsys.readouterr().err


def test_text_columns_of_models_of_characters(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(robustlip.__file__).with_name("page.txt").read_text(encoding="utf-8")
    pq.write_table(pa.table({"line": [page], "text": [page[::-1]]}), "words.parquet")
    model = "shakespeare-gpt-lipschitz"
    arguments = (model, "--data", "words.parquet", "--text-column", "line", "--limit", 1, "--context", 8)
    arguments += ("--threat", "embedding-l2", "--method", "global")
    assert run("certify", *arguments, "--json", "c.json") == 0, capsys.readouterr().err
    assert read("c.json").data.text_column == "line"
    assert run("verify", "c.json", "--model", model) == 0, capsys.readouterr().err
