"""Two processes train the same weights as one, with DDP and FSDP2; errors stop both; states can be resumed with another number of processes.

torchrun starts two_processes.py once for all of it; gloo, over the loopback interface.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from robustlip.checkpoints import load_into, load_tensors
from robustlip.constraints import METHODS
from robustlip.errors import BadInput
from robustlip.models.build import build
from robustlip.parallel import ALONE, World, joined, launched
from robustlip.toml import toml_text
from robustlip.training import Recipe, train

ROOT = Path(__file__).parent.parent
MODES = ("ddp", "fsdp")
NEEDS_GLOO = pytest.mark.skipif(not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo")


def processes(test: Any) -> Any:
    """Of a test that looks at what two processes trained, which takes minutes."""
    return pytest.mark.slow(NEEDS_GLOO(test))


MLP: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "model": {"kind": "mlp", "widths": [64, 33, 10], "activation": "gelu"},  # 33 rows: the shards of two processes differ
    "data": {"name": "digits"},
    "optimizer": {"name": "muon", "lr": 0.05, "adamw_lr": 0.01, "clip_gradient": 0.5},
    "constraint": {"method": "soft-cap", "w_max": 1.0, "overrides": {"linear1.weight": 0.5}},
    "loss": {"logit_scale": 10.0, "input_noise": 0.01},
    "run": {"steps": 4, "batch": 8, "evaluate_every": 3, "checkpoint_every": 3},
}
GPT: dict[str, Any] = {
    **MLP,
    "model": {"kind": "lipschitz-gpt", "width": 16, "heads": 2, "blocks": 2, "distance_bias": 4},
    "optimizer": {"name": "muon", "lr": 0.05, "earlier_layers": 0.5, "embedding_inflation": 16.0, "warmup": 3, "clip_gradient": 0.5},
    "constraint": {"method": "hard-cap", "w_max": 1.0, "rows": ["head.weight"]},
    "loss": {"logit_scale": 10.0},
}
ADAMW: dict[str, Any] = {
    **GPT,
    "model": {"kind": "lipschitz-gpt", "width": 8, "heads": 1, "blocks": 1, "distance_bias": 4},  # one head: one row, which one process has
    "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "clip_gradient": 0.1},
    "constraint": {"method": "spectral-normalize", "w_max": 0.8},
}
SIGMA = {**MLP, "constraint": {"method": "none"}, "reparametrization": "sigma-reparam", "optimizer": {"name": "adamw", "lr": 0.01}}
# tanh and l2: rounding cannot choose between two slopes, as it does where |w| or a ReLU has its kink.
INTERVALS = {
    **MLP,
    "model": {"kind": "mlp", "widths": [64, 16, 10], "activation": "tanh"},
    "constraint": {"method": "none"},
    "loss": {"kind": "ibp", "epsilon": 0.3, "norm": "l2", "regularizer": 0.0},
}
ADVERSARIAL = {**GPT, "loss": {"kind": "adversarial", "norm": "l2", "epsilon": 0.2}}
# tanh, for its slopes have no jumps.
MARGIN = {
    **MLP,
    "model": {"kind": "mlp", "widths": [64, 16, 10], "activation": "tanh"},
    "loss": {"kind": "margin", "norm": "l2", "epsilon": 0.3, "logit_scale": 10.0},
}
STREAMED = {**GPT, "model": {**GPT["model"], "vocabulary_size": 257}}
# Which of them run how: each costs half a second.
RUNS: dict[str, tuple[str, ...]] = {
    "mlp": MODES, "gpt": MODES, "adamw": ("fsdp",), "sigma": ("ddp",), "intervals": ("fsdp",), "adversarial": MODES, "margin": MODES,
    "streamed": MODES,
}  # fmt: skip
# torch.compile makes C++ on a CPU. Under fsdp each block is a graph of its own, whose weights come and go; one process compiles the model whole.
if shutil.which(os.environ.get("CXX", "g++")):
    RUNS["compiled"] = ("fsdp",)
# What two processes refuse: (changes of the MLP, mode, words of the sentence).
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "batch": ({"run": {"steps": 1, "batch": 7}}, "ddp", "2 processes can divide equally, got 7"),
    "mode": ({}, "tensor", "among ddp, fsdp"),
    "ibp": ({"loss": {"kind": "ibp", "epsilon": 0.05}, "constraint": {"method": "none"}}, "ddp", "regularizer = 0"),
    "scalars": ({"reparametrization": "sigma-reparam", "constraint": {"method": "none"}}, "fsdp", "use ddp"),
}


@dataclass(frozen=True)
class Both:
    """What two processes saw, by rank; the folder of their runs; the recipes."""

    seen: tuple[dict[str, Any], dict[str, Any]]
    out: Path
    recipes: dict[str, Recipe]

    def same(self, name: str) -> Any:
        assert self.seen[0][name] == self.seen[1][name]
        return self.seen[0][name]


def environment() -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return {**plain, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("both")
    text = out / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60, encoding="utf-8")
    data = {"name": str(text), "context": 12}
    specs = {"mlp": MLP, "gpt": {**GPT, "data": data}, "adamw": {**ADAMW, "data": data}, "sigma": SIGMA, "intervals": INTERVALS}
    specs["adversarial"] = {**ADVERSARIAL, "data": data}
    specs["margin"] = MARGIN
    lines = out / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": f"line {i}: " + "to be or not " * (i % 5)}) + "\n" for i in range(60)), encoding="utf-8")
    specs["streamed"] = {**STREAMED, "data": {"name": str(lines), "streaming": True, "tokenizer": "bytes", "context": 12, "held_out": 4}}
    if "compiled" in RUNS:
        specs["compiled"] = {**GPT, "data": data, "run": {**GPT["run"], "compile": True}}
    recipes = {name: Recipe.model_validate(spec) for name, spec in specs.items()}
    for name, recipe in recipes.items():
        train(recipe, out / name)
    for mode in MODES:

        def stop(step: int, steps: int, figures: dict[str, float]) -> None:
            if step == 3:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            train(recipes["gpt"], out / f"one-to-{mode}", progress=stop)
    recipe = out / "mlp.toml"
    recipe.write_text(toml_text(MLP), encoding="utf-8")
    refused = [[name, changes, mode] for name, (changes, mode, _) in REFUSED.items()]
    job = {"out": str(out), "recipe": str(recipe), "recipes": specs, "modes": RUNS, "refused": refused}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    script = str(Path(__file__).with_name("two_processes.py"))
    done = subprocess.run([sys.executable, *torchrun, script, json.dumps(job)], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = tuple(json.loads((out / f"{rank}.json").read_text()) for rank in range(2))
    return Both((seen[0], seen[1]), out, recipes)


def states(path: Path) -> dict[str, torch.Tensor]:
    return load_tensors(path / "tiny.state.safetensors")[0]


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two states, each tensor's over its own largest entry."""
    assert list(a) == list(b) and all(a[name].shape == b[name].shape and a[name].dtype == b[name].dtype for name in a)
    return max(float((a[name] - b[name]).abs().max() / a[name].abs().max().clamp_min(1e-3)) for name in a)


# Float32: sums over a batch in two parts round otherwise, and Muon magnifies what is small. One step moves weights more than a hundred times further.
ROUNDING = 5e-5


@processes
@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, modes in RUNS.items() for mode in modes])
def test_two_processes_end_with_the_weights_of_one(both: Both, name: str, mode: str) -> None:
    """Weights, momenta and the values on the card; one state file of whole tensors, one model, one card, nothing else."""
    path, one = Path(both.same(f"{name}-{mode}")), both.out / name
    assert sorted(p.name for p in path.parent.iterdir() if p.name != ".lock") == ["tiny.safetensors", "tiny.state.safetensors", "tiny.toml"]
    assert furthest(states(one), states(path.parent)) < ROUNDING
    trained, alone = load_into(path, build).state_dict(), load_into(one / "tiny.safetensors", build).state_dict()
    assert furthest(alone, trained) < ROUNDING
    cards = [tomllib.loads((folder / "tiny.toml").read_text(encoding="utf-8")) for folder in (one, path.parent)]
    assert cards[0]["val_accuracy"] == pytest.approx(cards[1]["val_accuracy"], abs=0.003)
    assert cards[0]["val_loss"] == pytest.approx(cards[1]["val_loss"], rel=1e-4)
    assert cards[0]["bound"]["l2"] == pytest.approx(cards[1]["bound"]["l2"], rel=1e-4)
    assert cards[0]["guarantee"] == cards[1]["guarantee"] and cards[0].get("update_norm_rms") == cards[1].get("update_norm_rms")
    assert cards[1].get("constrained_norms_rms", {}) == pytest.approx(cards[0].get("constrained_norms_rms", {}), rel=1e-4)
    assert cards[1]["history"].get("norm_over_cap", []) == pytest.approx(cards[0]["history"].get("norm_over_cap", []), rel=1e-4)


@processes
@pytest.mark.parametrize("mode", MODES)
def test_a_state_goes_on_with_another_number_of_processes(both: Both, mode: str) -> None:
    """Three steps by two processes and the rest by one, and the reverse: the same as one process without interruption."""
    assert both.same(f"stopped-{mode}") == ["Stop", ""]
    folder = both.out / f"stopped-{mode}"
    assert load_tensors(folder / "tiny.state.safetensors")[1]["step"] == 3 and not (folder / "tiny.safetensors").exists()
    assert furthest(states(both.out / "gpt"), states(folder)) > 100 * ROUNDING
    train(both.recipes["gpt"], folder)
    assert furthest(states(both.out / "gpt"), states(folder)) < ROUNDING
    back = Path(both.same(f"resumed-{mode}")).parent
    assert furthest(states(both.out / "gpt"), states(back)) < ROUNDING
    history = [tomllib.loads((f / "tiny.toml").read_text(encoding="utf-8"))["history"]["step"] for f in (both.out / "gpt", folder, back)]
    assert history[0] == history[1] == history[2] == [3, 4]


@processes
@pytest.mark.parametrize("mode", MODES)
def test_matrix_work_is_shared(both: Both, mode: str) -> None:
    """Of 13 matrices, each is orthogonalised, capped and measured by one process, and neither has more than its half."""
    counts = [seen[f"sharing-{mode}"] for seen in both.seen]
    for work in ("muon", "caps", "norms"):
        assert sorted(count[work] for count in counts) == [6, 7] and counts[0]["all"] == 13


@processes
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_by_two_processes_is_the_method(both: Both, method: str, mode: str) -> None:
    """In float64: whole matrices, heads by rows and by columns, capped rows, a matrix of one row, shards that differ."""
    assert both.same(f"pieces-{method}-{mode}") < 1e-12


@processes
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("loss", "TrainingStopped", "expected a finite loss, got nan at step 3"),
        ("write", "TrainingStopped", "No space left on device"),
        ("violation", "ConstraintViolation", "guarantee: hard"),
        ("data", "BadInput", "bring some"),
    ],
)
def test_what_is_wrong_in_one_process_stops_both(both: Both, what: str, kind: str, words: str, mode: str) -> None:
    """The same error, word for word; a state that was good stays."""
    got, sentence = both.same(f"{what}-{mode}")
    assert got == kind and words in sentence
    assert (both.out / f"{what}-{mode}" / "tiny.state.safetensors").exists() == (what == "loss")


@processes
@pytest.mark.parametrize("mode", MODES)
def test_an_error_that_is_none_of_ours_names_its_process(both: Both, mode: str) -> None:
    assert both.seen[1][f"bug-{mode}"] == ["KeyError", "'no such thing'"]
    assert both.seen[0][f"bug-{mode}"] == ["RobustlipError", "process 1 failed: KeyError: 'no such thing'"]


@processes
@pytest.mark.parametrize("name", REFUSED)
def test_what_two_processes_cannot_do_as_one_is_refused(both: Both, name: str) -> None:
    kind, sentence = both.same(name)
    assert kind == "BadInput" and REFUSED[name][2] in sentence


@processes
def test_the_command_line_under_torchrun(both: Both) -> None:
    """robustlip train RECIPE: only the first process prints, and the run is that of one process."""
    said = both.seen[0]["command"]
    assert both.seen[1]["command"] == "" and said.count("device: cpu") == said.count("model: ") == 1 and "2 processes (ddp)" in said
    assert furthest(states(both.out / "mlp"), states(both.out / "command")) < ROUNDING


def test_owners_share_the_cost() -> None:
    """Every matrix has one owner; no process has more than its fair share plus one matrix; one process owns all."""
    world = World(rank=0, size=3)
    batches = [[((4, 4), 64.0)] * 7, [((16, 4), 256.0)] * 4, [((8, 8), 512.0)]]
    assignments = world.assign(batches)
    load = [0.0] * 3
    for assignment, batch in zip(assignments, batches, strict=True):
        assert len(assignment.owners) == len(batch) and assignment.shapes == tuple(shape for shape, _ in batch)
        for owner, (_, cost) in zip(assignment.owners, batch, strict=True):
            load[owner] += cost
    assert max(load) - min(load) <= 64.0 and sum(load) == 7 * 64 + 4 * 256 + 512
    assert all(assignment.mine == list(range(len(batch))) for assignment, batch in zip(ALONE.assign(batches), batches, strict=True))
    assert [World(r, 3).rows(10) for r in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 10)]
    assert [[World(0, 3).shard(n, r) for r in range(3)] for n in (7, 3, 4, 1)] == [[3, 3, 1], [1, 1, 1], [2, 2, 0], [1, 0, 0]]


def test_the_environment_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    assert launched() == (0, 0, 1)
    with joined("cpu", "fsdp") as world:
        assert world == World(device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="start it by torchrun"):
        launched()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(BadInput, match="MASTER_ADDR"):
        launched()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert launched() == (1, 1, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(BadInput, match="as many processes as GPUs"), joined(device):
            pass
