"""A user's module that cannot be imported, built or run is bad input: exit code 2 and a message with file and line, for every verb."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import robustlip.certifiers
from robustlip.cli import main
from robustlip.errors import BadInput
from robustlip.user_errors import errors_of

POLICY = """data = "digits:test"
limit = 3
dtype = "float32"
min_samples = 1
min_clean_accuracy = 0.0
[[threat]]
name = "l2"
radius = 1e-6
min_certified_accuracy = 0.0
method = "global"
"""
SUITE = """name = "tiny"
[[pair]]
name = "p"
data = "digits:test"
limit = 3
lipschitz = "their_model:f"
[[pair.threat]]
name = "l2"
radii = [0.01]
method = "global"
"""
HEAD = "from torch import nn\nimport torch\n"
# What the file says, and the line of it that the sentence names.
IMPORTS = {
    "undefined": ("x = undefined_name\n", 1),
    "syntax": ("def f(:\n    pass\n", 1),
    "indentation": ("\n\ndef f():\nreturn 1\n", 4),
    "divides": (HEAD + "1 / 0\n", 3),
    "type": (HEAD + "\nlen(3)\n", 4),
    "asserts": ("assert False\n", 1),
    "own base exception": ("class Odd(BaseException): pass\nraise Odd()\n", 2),
    "generator exit": ("raise GeneratorExit\n", 1),
    "end of input": ("raise EOFError\n", 1),
    "exits": ("import sys\nsys.exit(0)\n", 2),
    "recursion": ("def g(): return g()\ng()\n", 1),
    "another module": ("import not_there_for_this_test\n", 1),
    "os error": ("open('not there')\n", 1),
    "NUL": ("x = '\0'\n", None),
    "latin-1": (b"x = '\xe9'\n", None),
}
BUILDS = {
    "undefined": (HEAD + "def f(): return undefined_name\n", 3),
    "torch": (HEAD + "def f():\n    return nn.Linear(-1, 3)\n", 4),
    "key": (HEAD + "def f():\n    return {}['a']\n", 4),
    "exits": (HEAD + "def f():\n    raise SystemExit(0)\n", 4),
    "own base exception": (HEAD + "class Odd(BaseException): pass\ndef f():\n    raise Odd\n", 5),
    "two lines": (HEAD + "def f():\n    raise ValueError('one\\ntwo')\n", 4),
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "policy.toml").write_text(POLICY)
    (tmp_path / "suite.toml").write_text(SUITE)
    for name in [name for name in sys.modules if name.startswith("their_")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def write(text: str | bytes) -> None:
    Path("their_model.py").write_bytes(text if isinstance(text, bytes) else text.encode())


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and "Traceback" not in "".join(lines), lines
    assert sum(line.startswith("robustlip: ") for line in lines) == 1 and lines[-1].startswith("robustlip: expected ")
    return lines[-1]


VERBS = {
    "certify": ("certify", "their_model:f", "--data", "digits:test", "--limit", 2, "--method", "global"),
    "attack": ("attack", "their_model:f", "--data", "digits:test", "--limit", 2, "--radius", 0.1, "--attack", "pgd"),
    "smooth": ("smooth", "their_model:f", "--data", "digits:test", "--limit", 2, "--sigma", 0.1, "--samples", 50),
    "audit": ("audit", "their_model:f"),
    "gate": ("gate", "their_model:f", "--policy", "policy.toml"),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_a_file_that_cannot_be_imported(capsys: pytest.CaptureFixture[str], name: str) -> None:
    text, line = IMPORTS[name]
    write(text)
    said = refused(capsys, *VERBS["certify"])
    assert "their_model" in said and (line is None or f"their_model.py, line {line}" in said)


@pytest.mark.parametrize("name", BUILDS)
def test_a_model_that_cannot_be_built(capsys: pytest.CaptureFixture[str], name: str) -> None:
    text, line = BUILDS[name]
    write(text)
    assert f"their_model.py, line {line}" in refused(capsys, *VERBS["certify"])


@pytest.mark.parametrize("verb", VERBS)
def test_for_every_verb(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    write("x = undefined_name\n")
    assert "their_model.py, line 1" in refused(capsys, *VERBS[verb])


def test_a_file_beside_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    write("from their_layers import f\n")
    Path("their_layers.py").write_text("\n\nx = undefined_name\n")
    assert "their_layers.py, line 3" in refused(capsys, *VERBS["certify"])


def test_a_name_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    write("f = 1\n")
    assert "their_model:g" in refused(capsys, "certify", "their_model:g", "--data", "digits:test")
    refused(capsys, "certify", "their_model:f", "--data", "digits:test")
    refused(capsys, "certify", "no_such_module_here:f", "--data", "digits:test")


@pytest.mark.parametrize("raised", ["raise SystemExit(0)", "return undefined_name", "assert False", "raise KeyError('a')", "raise Odd"])
def test_a_forward_that_fails_passes_no_gate(capsys: pytest.CaptureFixture[str], raised: str) -> None:
    """Exit code 0 of a model that ends the process inside its forward would be a pass."""
    write(
        f"{HEAD}class Odd(BaseException): pass\nclass Theirs(nn.Flatten):\n    def forward(self, x):\n        {raised}\n"
        "def f(): return nn.Sequential(Theirs(), nn.Linear(64, 10))\n"
    )
    for verb in ("certify", "attack", "gate"):
        refused(capsys, *VERBS[verb])


def test_errors_in_the_forward_name_file_and_line() -> None:
    """In every part of a command: the traceback shows whether the error is in the user's module."""
    write(f"{HEAD}def f():\n    raise KeyError('a')\n")
    import their_model

    with pytest.raises(BadInput, match=r"KeyError.*their_model\.py, line 4"), errors_of("certify", "their_model:f"):
        their_model.f()


def test_interrupts_stay_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    write("raise KeyboardInterrupt\n")
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in VERBS["certify"]])
    assert caught.value.code == 130


def test_errors_of_ours_are_not_blamed_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    write(f"{HEAD}def f(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n")

    def fails(*_: object, **__: object) -> None:
        raise KeyError("of ours")

    monkeypatch.setattr(robustlip.certifiers, "certify", fails)
    with pytest.raises(KeyError, match="of ours"):
        main([str(a) for a in VERBS["certify"]])


def test_a_suite_names_file_and_line(capsys: pytest.CaptureFixture[str]) -> None:
    write("x = undefined_name\n")
    assert "their_model.py, line 1" in refused(capsys, "eval", "suite.toml", "--out", "e")


def test_a_model_without_weights_is_attacked_and_not_certified(capsys: pytest.CaptureFixture[str]) -> None:
    write(f"{HEAD}def f(): return nn.Flatten()\n")
    # The policy asks for no certified sample.
    for verb, codes in {"certify": (2,), "attack": (0,), "gate": (0,)}.items():
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in VERBS[verb]])
        assert caught.value.code in codes, verb


@pytest.mark.parametrize(
    "model",
    [
        "nn.Sequential(nn.Flatten(), nn.LazyLinear(10))",
        "nn.Sequential(nn.Flatten(), nn.Linear(64, 10, device='meta'))",
        "nn.Sequential(nn.Flatten(), torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(64, 10)), dtype=torch.qint8))",
        "nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(torch.complex64)",
        "nn.Sequential()",
        "nn.Sequential(nn.Flatten(), nn.Linear(3, 10))",
        "nn.Linear(8, 10)",
        "torch.zeros(3)",
        "nn.Linear",
        "nn.ModuleList([nn.Linear(64, 10)])",
    ],
)
@pytest.mark.parametrize("verb", ["certify", "attack", "gate"])
@pytest.mark.filterwarnings("ignore")
def test_models_without_usable_weights(capsys: pytest.CaptureFixture[str], verb: str, model: str) -> None:
    write(f"{HEAD}def f(): return {model}\n")
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in VERBS[verb]])
    lines = capsys.readouterr().err.strip().splitlines()
    # A gate may also answer: it does not pass, because nothing can be proved.
    assert caught.value.code in ((1, 2) if verb == "gate" else (2,)) and lines[-1].startswith("robustlip: "), lines
    assert torch.is_grad_enabled()
