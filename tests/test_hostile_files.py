"""Files with unexpected contents on the command line: an error and exit code 2; nothing is overwritten or accepted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import robustlip.certifiers
import robustlip.cli.smooth
from robustlip.attacks import PGD
from robustlip.attacks.audit import audit, save_witness
from robustlip.attacks.formulas import stated
from robustlip.certificate_file import read
from robustlip.certifiers import smoothing
from robustlip.checkpoints import FORMAT, load_tensors, save_model, save_tensors
from robustlip.cli import main
from robustlip.errors import BadInput, RobustlipError
from robustlip.files import write_text
from robustlip.models import build
from robustlip.models.zoo import load
from robustlip.toml import toml_text

MODEL = "m.safetensors"
POLICY = {
    "data": "digits:test", "limit": 3, "dtype": "float32", "min_samples": 1, "min_clean_accuracy": 0.0,
    "threat": [{"name": "l2", "radius": 1e-6, "min_certified_accuracy": 0.0, "method": "global"}],
}  # fmt: skip
SUITE = {
    "name": "tiny",
    "pair": [{"name": "p", "data": "digits:test", "limit": 3, "lipschitz": MODEL, "threat": [
        {"name": "l2", "radii": [0.01], "method": "global", "attacks": [{"name": "min", "options": {"steps": 2, "descent": 5}}]}
    ]}],
}  # fmt: skip
RECIPE = {
    "name": "r", "model": {"kind": "mlp", "widths": [64, 4, 10]}, "data": {"name": "digits"}, "optimizer": {"name": "adamw", "lr": 0.01},
    "run": {"steps": 2, "batch": 4},
}  # fmt: skip
GRID = {"name": "g", "base": "recipe.toml", "grid": {"optimizer": {"lr": [0.01]}}}
EXITS = "import sys\ndef model():\n    sys.exit(0)\n"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    save_model(tmp_path / MODEL, build({"kind": "mlp", "widths": [64, 8, 10]}))
    for name, content in (("policy", POLICY), ("suite", SUITE), ("recipe", RECIPE), ("grid", GRID)):
        (tmp_path / f"{name}.toml").write_text(toml_text(content))
    return tmp_path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code or 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("robustlip: ") and "Traceback" not in "\n".join(lines)
    return lines[-1]


CERTIFY = ("certify", MODEL, "--data", "digits:test", "--limit", 3, "--method", "global")
# The verb that reads each kind of file.
READERS = {
    "policy": lambda path: ("gate", MODEL, "--policy", path),
    "suite": lambda path: ("eval", path, "--out", "e"),
    "recipe": lambda path: ("train", path, "--out", "t"),
    "grid": lambda path: ("sweep", path, "--out", "s"),
    "certificate": lambda path: ("verify", path, "--model", MODEL),
}


def test_the_files_of_this_test_are_good(capsys: pytest.CaptureFixture[str]) -> None:
    """So that the refusals below are for the intended reason."""
    assert run(*CERTIFY, "--json", "certificate.json") == 0
    for kind, verb in READERS.items():
        assert run(*verb(f"{kind}.json" if kind == "certificate" else f"{kind}.toml")) == 0, (kind, capsys.readouterr().err)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    ("name", "content"),
    [("digits", "a = " + "9" * 5000), ("nested", "a = " + "[" * 5000), ("bytes", b"\xff\xfe\x00"), ("endless", None), ("x" * 300, None)],
)
def test_files_that_do_not_parse(capsys: pytest.CaptureFixture[str], kind: str, name: str, content: str | bytes | None) -> None:
    """Numbers of thousands of digits, tables without end, bytes, a device without end, a name that no file can have."""
    path = Path("/dev/zero") if name == "endless" else Path(name)
    if name == "endless" and not path.exists():
        pytest.skip("needs /dev/zero")
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "expected" in refused(capsys, *READERS[kind](path))


@pytest.mark.parametrize("verb", ["certify", "gate", "verify", "audit"])
@pytest.mark.parametrize("code", [EXITS, "import sys\nsys.exit(0)\n"])
def test_a_model_that_ends_the_process_is_no_pass(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch, verb: str, code: str
) -> None:
    (place / "exits_for_hostile.py").write_text(code)
    monkeypatch.delitem(sys.modules, "exits_for_hostile", raising=False)
    assert run(*CERTIFY, "--json", "c.json") == 0
    model = "exits_for_hostile:model"
    more = {"certify": (model, "--data", "digits:test"), "gate": (model, "--policy", "policy.toml"), "verify": ("c.json", "--model", model)}
    refused(capsys, verb, *more.get(verb, (model,)))


def test_a_small_file_cannot_ask_for_more_memory_than_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    """296 bytes that name layers of 10⁹ rows: sizes are looked at before anything is made."""
    header = json.dumps({"format": FORMAT, "config": {"kind": "mlp", "widths": [64, 10**9, 10]}, "weights_sha256": "0" * 64})
    save_file({}, "bomb.safetensors", metadata={"robustlip": header})
    assert "widths of at most" in refused(capsys, "certify", "bomb.safetensors", "--data", "digits:test")


@pytest.mark.parametrize("header", ['{"format": ' + "[" * 20000, '{"format": "' + FORMAT + '", "a": ' + "9" * 5000 + "}"])
def test_headers_of_models_that_do_not_parse(capsys: pytest.CaptureFixture[str], header: str) -> None:
    save_file({}, "bad.safetensors", metadata={"robustlip": header})
    assert "header" in refused(capsys, "certify", "bad.safetensors", "--data", "digits:test")


def test_weights_of_eight_bits_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    tensors, header = load_tensors(Path(MODEL))
    cast = {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}
    save_tensors(Path("f8.safetensors"), cast, {"config": header["config"], "weights_sha256": "0"})
    assert "float8" in refused(capsys, "certify", "f8.safetensors", "--data", "digits:test")


# ---- what is written, and where


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ((*CERTIFY, "--json", MODEL), MODEL),
        (("verify", "c.json", "--model", MODEL, "--json", "c.json"), "c.json"),
        (("gate", MODEL, "--policy", "policy.toml", "--json", "policy.toml"), "policy.toml"),
        (("train", "recipe.toml", "--out", "t", "--json", "recipe.toml"), "recipe.toml"),
        (("sweep", "grid.toml", "--out", "s", "--json", "./grid.toml"), "grid.toml"),
        (("eval", "suite.toml", "--out", "e", "--json", "suite.toml"), "suite.toml"),
        (("audit", MODEL, "--json", MODEL), MODEL),
    ],
)
def test_results_do_not_replace_what_was_read(capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], kept: str) -> None:
    assert run(*CERTIFY, "--json", "c.json") == 0
    before = Path(kept).read_bytes()
    assert "which this command reads" in refused(capsys, *arguments)
    assert Path(kept).read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_pipes_are_written_to_and_links_stay_links(place: Path) -> None:
    os.mkfifo("pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(Path("pipe").read_text()), daemon=True)
    reader.start()
    write_text(Path("pipe"), "through")
    reader.join(10)
    assert got == ["through"] and not Path("pipe").is_file()
    (place / "real").write_text("old")
    os.symlink("real", "link")
    write_text(Path("link"), "new")
    assert Path("link").is_symlink() and Path("real").read_text() == "new"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(KeyboardInterrupt(), 130, "interrupted after 2 of 3"), (BadInput("no more"), 2, "no more"), (RobustlipError("it failed"), 1, "it failed")],
)
@pytest.mark.parametrize("verb", ["certify", "attack", "smooth"])
def test_what_was_found_before_the_end_is_kept(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb, error, code, words) -> None:
    """Stopped in the third batch, by a person or by an error: two samples are shown and written, marked partial, and the exit code is the error's."""
    module, name = {"certify": (robustlip.certifiers, "certify"), "attack": (PGD, "__call__"), "smooth": (smoothing, "certify_smoothed")}[verb]
    real, calls = getattr(module, name), []

    def stopping(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, stopping)
    monkeypatch.setattr(robustlip.cli.smooth, "_CHUNK", 1)
    wanted = {
        "certify": ("--batch-size", 1, "--method", "global"), "attack": ("--batch-size", 1, "--attack", "pgd", "--radius", 0.1),
        "smooth": ("--sigma", 0.1, "--samples", 50),
    }[verb]  # fmt: skip
    assert run(verb, MODEL, "--data", "digits:test", "--limit", 3, *wanted, "--json", "part.json") == code
    said = capsys.readouterr()
    assert "2 of 3 samples" in said.err and words in said.err and "samples" in said.out
    made = json.loads(Path("part.json").read_text())
    assert made["partial"] and len(made["smoothed_samples" if verb == "smooth" else "samples"]) == 2
    if verb == "certify":
        assert read("part.json").partial


@pytest.mark.parametrize("arguments", [("zoo", "list"), ("zoo", "show", "digits-mlp-lipschitz", "--json")])
def test_a_full_output_is_one_sentence(arguments: tuple[str, ...]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "robustlip", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("robustlip: expected to write all output, got") and done.stderr.count("\n") == 1


# ---- values that are not what they look like


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("suite", {"name": "../../escaped"}, "name"),
        ("suite", {"name": "a\u0000b"}, "visible characters"),
        ("suite", {"seed": True}, "seed"),
        ("suite", {"seed": "3"}, "seed"),
        ("recipe", {"run": {"steps": True, "batch": 4}}, "steps"),
        ("recipe", {"run": {"steps": "6", "batch": 4}}, "steps"),
        ("recipe", {"name": "n" * 300}, "name"),
        ("recipe", {"constraint": {"w_max": 0.1}}, "without a constraint method"),
        ("recipe", {"model": {"kind": "mlp", "widths": [64, 4, 10], "bias": "no"}}, "true or false"),
        ("policy", {"attack": "pgd"}, "require_attack"),
        ("policy", {"limit": True}, "limit"),
    ],
)
def test_settings_of_another_kind(capsys: pytest.CaptureFixture[str], kind: str, change: dict[str, object], words: str) -> None:
    good = {"suite": SUITE, "recipe": RECIPE, "policy": POLICY}[kind]
    Path("bad.toml").write_text(toml_text({**good, **change}))
    assert words in refused(capsys, *READERS[kind]("bad.toml"))


@pytest.mark.parametrize(
    "arguments",
    [
        (*CERTIFY, "--device", "meta"),
        ("audit", MODEL, "--seed", 2**64),
        ("audit", MODEL, "--starts", 10**8),
        ("certify", MODEL, "--data", "x" * 400),
        (*CERTIFY, "--json", "x" * 400),
    ],
)
def test_arguments_that_no_run_can_have(capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...]) -> None:
    refused(capsys, *arguments)


def test_a_witness_cannot_write_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    chain = load(MODEL)
    found = audit(chain, stated(chain, 1e-6, "l2", None), starts=2, power_steps=2, ascent_steps=2)
    save_witness(Path("w.safetensors"), found)
    assert run("audit", MODEL, "--witness", "w.safetensors") == 3
    capsys.readouterr()
    tensors, header = load_tensors(Path("w.safetensors"))
    for change in ({"formula": "\x1b[31mEVIL\x1b[0m\n\n PASS"}, {"starts": float("inf")}):
        save_tensors(Path("w.safetensors"), tensors, {k: v for k, v in header.items() if k != "format"} | change)
        said = refused(capsys, "audit", MODEL, "--witness", "w.safetensors")
        assert "\x1b" not in said and "altered" in said


# ---- results that were changed since


def edit_part(path: Path, change: object) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    frame = change(table.to_pandas())  # type: ignore[operator]
    import pyarrow as pa

    pq.write_table(pa.Table.from_pandas(frame, schema=table.schema.remove_metadata(), preserve_index=False).replace_schema_metadata(
        table.schema.metadata), path)


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame.iloc[:1],
        lambda frame: frame.iloc[:0],
        lambda frame: frame.iloc[[0, 0, 0]],
        lambda frame: frame.assign(certified_radius=frame["certified_radius"] + 0.15),
    ],
)
def test_parts_of_a_run_that_were_changed(capsys: pytest.CaptureFixture[str], change: object) -> None:
    assert run("eval", "suite.toml", "--out", "e") == 0
    (part,) = Path("e").rglob("*.parquet")
    edit_part(part, change)
    assert "it was changed" in refused(capsys, "table", "e")
    assert "it was changed" in refused(capsys, "eval", "suite.toml", "--out", "e")


@pytest.mark.parametrize("change", [{"parts": [3]}, {"parts": ["../x"]}, {"cards": 3}, {"cards": {"x": 3}}, {"errors": [1]}])
def test_manifests_that_are_none(capsys: pytest.CaptureFixture[str], change: dict[str, object]) -> None:
    assert run("eval", "suite.toml", "--out", "e") == 0
    (manifest,) = (p for p in Path("e").glob("*.json") if "parts" in json.loads(p.read_text()))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    refused(capsys, "table", "e")


@pytest.mark.parametrize(
    "change",
    [
        {"bound_rms": 1e-9}, {"bound_l2": -1.0}, {"accuracy": "<b>"}, {"accuracy": 2.0}, {"weights_sha256": "0" * 64}, {"published": [1]},
        {"note": ["x"]},
    ],
)
def test_rows_of_a_sweep_that_were_changed(capsys: pytest.CaptureFixture[str], change: dict[str, object]) -> None:
    assert run("sweep", "grid.toml", "--out", "s") == 0
    (row,) = Path("s").rglob("row.json")
    row.write_text(json.dumps(json.loads(row.read_text()) | change))
    assert "remove that file" in refused(capsys, "sweep", "grid.toml", "--out", "s", "--limit", 0)


def test_interrupts_before_anything_is_proved_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(robustlip.certifiers, "certify", interrupted)
    assert run(*CERTIFY, "--json", "none.json") == 128 + signal.SIGINT
    assert not Path("none.json").exists()
