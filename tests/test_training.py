"""Training: constraints hold after every step, resumed runs end like uninterrupted ones, and manipulated files are refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from robustlip.checkpoints import load_into, load_tensors, save_model, save_tensors
from robustlip.constraints import Constraint, Target, fast_norm_bound, soft_cap, soft_cap_coupling, targets_of
from robustlip.errors import BadInput
from robustlip.hashing import weights_sha256
from robustlip.models import LipschitzGPT, LipschitzMLP
from robustlip.models.build import build
from robustlip.muon import POLYNOMIALS, Muon, orthogonalize
from robustlip.numerics.spectral import spectral_norm_bound
from robustlip.toml import toml_text
from robustlip.training import Recipe, TrainingStopped, identity, load_recipe, train
from robustlip.training.ibp import ibp_initialize, interval_margins
from robustlip.training.objective import radius_at
from robustlip.training.optimizers import make_optimizers
from robustlip.training.reparametrize import SigmaReparam, fold, reparametrize

RECIPE = {
    "name": "tiny",
    "seed": 3,
    "model": {"kind": "mlp", "widths": [64, 16, 10]},
    "data": {"name": "digits"},
    "optimizer": {"name": "muon", "lr": 0.05, "adamw_lr": 0.01},
    "constraint": {"method": "soft-cap", "w_max": 1.0, "overrides": {"linear1.weight": 0.5}},
    "loss": {"logit_scale": 10.0, "input_noise": 0.01},
    "run": {"steps": 40, "batch": 32, "evaluate_every": 20, "checkpoint_every": 10},
}


def recipe(**changes) -> Recipe:
    return Recipe.model_validate({**RECIPE, **changes})


@pytest.mark.parametrize(("w_max", "update", "strength"), [(6, 0.2, 0.0028525), (6, 0.1, 0.0020655), (2, 0.1, 0.0306098), (1, 0.05, 0.1224393)])
def test_soft_cap_coupling_and_what_it_promises(w_max, update, strength) -> None:
    """The vectors of docs/theory.md, section 12; and the map sends all of [0, w_max + update] into [0, w_max]."""
    a = soft_cap_coupling(w_max, update)
    assert a == pytest.approx(strength, rel=1e-4)
    values = torch.linspace(0, w_max + update, 2001, dtype=torch.float64)
    mapped = soft_cap(torch.diag(values), a).diagonal()
    assert float(mapped.max()) <= w_max * (1 + 1e-9) and float(mapped.min()) >= -1e-12
    assert soft_cap_coupling(w_max, 0.0) == 0.0


def test_soft_cap_refuses_an_update_it_cannot_absorb() -> None:
    with pytest.raises(BadInput, match="lower the learning rate"):
        soft_cap_coupling(1.0, 50.0)


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_orthogonalisation_stays_under_its_stated_peak(name) -> None:
    x = torch.linspace(0, 1, 10**6 + 1, dtype=torch.float64)[1:]
    for a, b, c in POLYNOMIALS[name].steps:
        x = a * x + b * x**3 + c * x**5
    assert POLYNOMIALS[name].peak - 2e-4 < float(x.max()) <= POLYNOMIALS[name].peak
    for shape in ((20, 30), (30, 20), (4, 12, 12)):
        out = orthogonalize(torch.randn(*shape, dtype=torch.float64), name)
        assert out.shape == shape and bool((torch.linalg.matrix_norm(out, 2) <= POLYNOMIALS[name].peak).all())
    assert float(orthogonalize(torch.zeros(3, 4), name).abs().max()) == 0.0


def test_muon_moves_by_no_more_than_it_states() -> None:
    layer = nn.Linear(12, 30, bias=False)
    optimizer = Muon(layer.parameters(), lr=0.3, polynomial="torch")
    for _ in range(5):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        layer(torch.randn(8, 12)).square().sum().backward()
        optimizer.step()
        step = torch.linalg.matrix_norm(layer.weight.detach() - before, 2) * (12 / 30) ** 0.5
        assert 0 < float(step) <= optimizer.update_norm(0.3) * (1 + 1e-5)


@pytest.mark.parametrize("method", ["spectral-normalize", "soft-cap"])
def test_constraints_hold_after_every_step_and_by_head(method) -> None:
    """Steps far larger than the weights, on adversarial gradients: no head's slice leaves its cap, measured with the guaranteed bound."""
    model = LipschitzGPT("abcdef", 16, 4, 1)
    rate = 0.3 if method == "spectral-normalize" else 0.05
    constraint = Constraint(targets_of(model, 1.0, overrides={"head.weight": 3.0, "mlp*": 2.0}), method)
    constraint.project()
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [Muon(matrices, lr=rate), torch.optim.AdamW(rest, lr=1.0)]
    constraint.attach(*optimizers)
    heads = model[1].branch.query.weight
    for _ in range(30):
        for optimizer in optimizers:
            optimizer.zero_grad()
        tokens = torch.randint(6, (4, 8))
        (-model(tokens).square().sum() - 1e4 * heads[:4].sum()).backward()  # pushes the first head alone
        for optimizer in optimizers:
            optimizer.step()
        for target in constraint.targets:
            assert target.measured() <= target.w_max * (1 + 1e-4), target.name
    slices = spectral_norm_bound(heads.detach().unflatten(0, (4, 4))) * 2.0  # sqrt(16/4): RMS units
    assert float(slices.max()) <= 1 + 1e-4
    assert float(model[0].weight.detach().norm(dim=-1).max()) <= 4 * (1 + 1e-4)


def test_a_whole_matrix_cap_is_what_per_head_is_not() -> None:
    model = LipschitzGPT("abcdef", 16, 4, 1)
    whole = {t.name: t for t in targets_of(model, 1.0, per_head=False)}
    by_head = {t.name: t for t in targets_of(model, 1.0)}
    name = "attn0.branch.query.weight"
    assert (whole[name].slices, by_head[name].slices) == (1, 4)
    assert not any("distance_bias" in n for n in by_head)
    with pytest.raises(BadInput, match="match a weight"):
        targets_of(model, 1.0, overrides={"nothing*": 1.0})


def test_fast_norm_bound_is_above() -> None:
    for shape in ((64, 256), (256, 64), (3, 30, 30)):
        matrix = torch.randn(*shape)
        truth = torch.linalg.matrix_norm(matrix.double(), 2)
        assert bool((fast_norm_bound(matrix).double() >= truth).all() and (fast_norm_bound(matrix).double() <= 1.01 * truth).all())
    assert float(fast_norm_bound(torch.zeros(4, 4))) < 1e-6


def test_row_targets_cap_each_token() -> None:
    table = nn.Embedding(5, 8)
    with torch.no_grad():
        table.weight.mul_(100)
    target = Target("t", table.weight, 0.5, rows=True)
    Constraint([target], "soft-cap").apply(target)
    assert float((table.weight.detach().norm(dim=-1) / 8**0.5).max()) <= 0.5
    assert target.measured() == pytest.approx(0.5, rel=1e-4)


class Stop(Exception):
    pass


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path) -> None:
    whole = train(recipe(), tmp_path / "whole")

    def interrupt(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 27:
            raise Stop

    with pytest.raises(Stop):
        train(recipe(), tmp_path / "parts", progress=interrupt)
    state, header = load_tensors(tmp_path / "parts" / "tiny.state.safetensors")
    assert header["step"] == 20 and any(k.startswith("optimizer.") for k in state)
    resumed = train(recipe(), tmp_path / "parts")
    assert weights_sha256(load_into(whole, build)) == weights_sha256(load_into(resumed, build))
    card = tomllib.loads(resumed.with_suffix(".toml").read_text())
    assert card["weights_sha256"] == weights_sha256(load_into(resumed, build))
    assert card["val_accuracy"] > 0.5 and card["largest_constrained_norm_rms"] <= 1 + 1e-4
    assert card["bound"]["l2"] <= 0.5 * 2.0 * (10 / 16) ** 0.5 * 1.01  # the caps, undone from RMS units: 0.5·√(16/64)⁻¹ and √(10/16)

    with pytest.raises(BadInput, match="another recipe"):
        train(recipe(seed=4), tmp_path / "parts")


def test_a_run_replaces_no_other_runs_weights(tmp_path) -> None:
    short = {"steps": 3, "batch": 32, "evaluate_every": 50, "checkpoint_every": 50}
    path = train(recipe(run=short), tmp_path)
    state = tmp_path / "tiny.state.safetensors"
    before = path.read_bytes(), state.read_bytes()
    with pytest.raises(BadInput, match=r"one of another recipe.*another folder"):
        train(recipe(seed=4, run=short), tmp_path, resume=False)
    state.unlink()
    for resume in (True, False):
        with pytest.raises(BadInput, match="without a state to resume from"):
            train(recipe(run=short), tmp_path, resume=resume)
    assert path.read_bytes() == before[0]
    # Over its own it begins again, and over a state that nobody can read.
    for content in (before[1], before[1][:100]):
        state.write_bytes(content)
        train(recipe(run=short), tmp_path, resume=False)
        assert path.read_bytes() == before[0] and load_tensors(state)[1]["step"] == 3


# Runs in processes of their own that die at a chosen moment, as by kill -9, or that meet a full disk. One process imports torch and forks.
CHILD = """
import json, os, resource, signal, sys
from pathlib import Path
import safetensors.torch
import torch
from robustlip.training import Recipe, TrainingStopped, train

torch.set_num_threads(1)
replace, save_file, calls = os.replace, safetensors.torch.save_file, [0]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def run(mode, when, out, spec):
    def now():
        calls[0] += 1
        return calls[0] == when

    def half(tensors, path, metadata=None):   # half of the file is there
        save_file(tensors, path, metadata=metadata)
        if now():
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def before(a, b):                         # all of it, but not yet under its name
        die() if now() else replace(a, b)

    def after(a, b):
        replace(a, b)
        if now():
            die()

    def progress(step, steps, figures):
        if mode == "step" and step == when:
            die()
        if mode == "full" and step == when:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))

    if mode == "half":
        safetensors.torch.save_file = half
    if mode in ("before", "after"):
        os.replace = {"before": before, "after": after}[mode]
    try:
        train(Recipe.model_validate(spec), out, progress=progress)
    except TrainingStopped as error:
        os._exit(7 if "make room" in str(error) else 8)
    os._exit(0)

job = json.loads(sys.argv[1])
for mode, when, out in job["cases"]:
    pid = os.fork()
    if pid == 0:
        run(mode, when, out, job["recipe"])
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def children(cases: list[tuple[str, int, Path]]) -> list[int]:
    """Exit codes of runs of the tiny recipe, one a case: (how it ends, when, its folder). Minus a signal's number for a killed one."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    job = json.dumps({"recipe": recipe().model_dump(mode="json"), "cases": [(mode, when, str(out)) for mode, when, out in cases]})
    done = subprocess.run([sys.executable, "-c", CHILD, job], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def without_times(path: Path) -> dict[str, object]:
    card = tomllib.loads(path.with_suffix(".toml").read_text())
    card.pop("train_seconds")
    card["history"].pop("seconds")
    return card


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


# When a run is killed, and the step of the state that is left. Files in order: states after 10, 20 and 30 steps, the last state, the model, the card.
MOMENTS = [("step", 27, 20), ("half", 2, 10), ("half", 1, None), ("before", 4, 30), ("after", 4, 40), ("half", 5, 40), ("before", 6, 40)]


@forks
@pytest.mark.parametrize("moments", [MOMENTS[:2], pytest.param(MOMENTS[2:], marks=pytest.mark.slow)], ids=["few", "others"])
def test_a_killed_run_ends_like_one_that_was_not(moments, tmp_path) -> None:
    """kill -9 between steps, during a write, just before and after a file gets its name: the files are complete, and the result is the same."""
    folders = [tmp_path / f"{mode}-{when}" for mode, when, _ in moments]
    codes = children([(mode, when, out) for (mode, when, _), out in zip(moments, folders, strict=True)])
    assert codes == [-signal.SIGKILL] * len(moments)
    whole = train(recipe(), tmp_path / "whole")
    for (_, _, saved), out in zip(moments, folders, strict=True):
        state = out / "tiny.state.safetensors"
        assert (load_tensors(state)[1]["step"] if state.exists() else None) == saved, out
        resumed = train(recipe(), out)
        assert weights_sha256(load_into(resumed, build)) == weights_sha256(load_into(whole, build)), out
        assert without_times(resumed) == without_times(whole), out
        assert sorted(p.name for p in out.iterdir() if p.name != ".lock") == ["tiny.safetensors", "tiny.state.safetensors", "tiny.toml"]


@forks
@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_state(tmp_path) -> None:
    """Files of more than 3,000 bytes cannot be written after step 15: the state of step 10 stays, and the run goes on from it later."""
    assert children([("full", 15, tmp_path / "parts")]) == [7]
    assert load_tensors(tmp_path / "parts" / "tiny.state.safetensors")[1]["step"] == 10
    assert sorted(p.name for p in (tmp_path / "parts").iterdir() if p.name != ".lock") == ["tiny.state.safetensors"]
    whole, resumed = train(recipe(), tmp_path / "whole"), train(recipe(), tmp_path / "parts")
    assert weights_sha256(load_into(resumed, build)) == weights_sha256(load_into(whole, build))


def test_a_loss_that_is_not_finite_keeps_the_last_state(tmp_path) -> None:
    bad = recipe(optimizer={"name": "adamw", "lr": 1e30}, constraint={"method": "none"})
    with pytest.raises(RuntimeError, match="lower the learning rate"):
        train(bad, tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path) -> None:
    """A finite loss whose step makes NaN: the state is refused at the save, and the one before stays."""
    short = recipe(constraint={"method": "none"}, run={"steps": 40, "batch": 32, "evaluate_every": 50, "checkpoint_every": 5})
    import robustlip.training.loop as loop

    def poison(recipe, step):
        return math.nan if step == 9 else 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "schedule", poison)
        with pytest.raises(TrainingStopped, match="after step 10"):
            train(short, tmp_path)
    tensors, header = load_tensors(tmp_path / "tiny.state.safetensors")
    assert header["step"] == 5 and all(bool(torch.isfinite(t).all()) for t in tensors.values())


def test_what_a_guarantee_loses_ends_the_run(tmp_path, monkeypatch) -> None:
    """An evaluation measures with the guaranteed bound, whatever the check after each step saw."""
    from robustlip.constraints import Constraint, ConstraintViolation, SoftCap

    monkeypatch.setattr(Constraint, "_refuse_violations", lambda *_: None)
    monkeypatch.setattr(SoftCap, "__call__", lambda self, stack, cap, step: 1.01 * stack)
    with pytest.raises(ConstraintViolation, match="guarantee: hard"):
        train(recipe(), tmp_path)


def test_old_states_stay_valid_and_new_keys_count() -> None:
    """The identity of a recipe as the first release computed it; it changes with a new key only when that differs from its default."""
    assert identity(recipe()) == "c6167ebbe1cd3f2c24eb910a9c6cdbc5c0e0491e1c502716c32bc89ea710f1a3"
    assert identity(recipe(reparametrization="none")) == identity(recipe())
    assert identity(recipe(loss={"logit_scale": 10.0, "input_noise": 0.01, "norm": "linf"})) == identity(recipe())
    changed = recipe(constraint={**RECIPE["constraint"], "rows": ["linear2.weight"]})
    assert identity(changed) != identity(recipe()) != identity(recipe(seed=4))


def test_the_card_says_what_was_measured(tmp_path) -> None:
    card = tomllib.loads(train(recipe(), tmp_path).with_suffix(".toml").read_text())
    assert card["guarantee"] == "soft-cap: hard"
    assert card["update_norm_rms"] == pytest.approx(0.05 * POLYNOMIALS["six-step"].peak)
    assert set(card["constrained_norms_rms"]) == {"linear1.weight", "linear2.weight"}
    assert card["constrained_norms_rms"]["linear1.weight"] <= 0.5 * (1 + 2e-4)
    assert card["history"]["step"] == [20, 40] and all(0.3 < v <= 1 + 2e-4 for v in card["history"]["norm_over_cap"])
    free = recipe(constraint={"method": "spectral-hammer"})
    assert tomllib.loads(train(free, tmp_path / "free").with_suffix(".toml").read_text())["guarantee"] == "spectral-hammer: none"


@pytest.mark.parametrize("kind", ["spectral-norm", "sigma-reparam"])
def test_reparametrised_models_fold_into_plain_weights(tmp_path, kind) -> None:
    """Trained, interrupted, resumed, folded: a plain model of the same logits, that loads and has a bound."""
    spec = recipe(
        constraint={"method": "none"}, reparametrization=kind, optimizer={"name": "adamw", "lr": 0.01},
        run={"steps": 60, "batch": 32, "evaluate_every": 30, "checkpoint_every": 10},
    )  # fmt: skip
    whole = train(spec, tmp_path / "whole")

    def interrupt(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 27:
            raise Stop

    with pytest.raises(Stop):
        train(spec, tmp_path / "parts", progress=interrupt)
    resumed = train(spec, tmp_path / "parts")
    model = load_into(whole, build)
    assert weights_sha256(model) == weights_sha256(load_into(resumed, build))
    card = tomllib.loads(whole.with_suffix(".toml").read_text())
    assert card["val_accuracy"] > 0.8 and card["bound"]["l2"] > 0
    norms = [float(spectral_norm_bound(m.weight.detach())) for m in model if isinstance(m, nn.Linear)]
    # Miyato et al.: near 1, and above it, since the estimate that is divided by lies below. Zhai et al.: γ, which has moved from 1.
    assert all(0.99 < norm < 1.1 for norm in norms) if kind == "spectral-norm" else any(abs(norm - 1) > 0.05 for norm in norms)


@pytest.mark.parametrize("kind", ["spectral-norm", "sigma-reparam"])
def test_folding_keeps_the_function(kind) -> None:
    model = LipschitzMLP([6, 12, 4])
    reparametrize(model, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(20, 6)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    wanted = model.eval()(x)
    fold(model)
    assert torch.equal(model(x), wanted) and set(model.state_dict()) == set(LipschitzMLP([6, 12, 4]).state_dict())


def test_sigma_reparam_by_its_formula() -> None:
    weight = torch.randn(7, 5)
    made = SigmaReparam(weight, iterations=200)
    with torch.no_grad():
        made.gamma.fill_(1.7)
    assert float(torch.linalg.matrix_norm(made(weight).detach(), 2)) == pytest.approx(1.7, rel=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("widths", [[6, 3], [6, 9, 8, 3]])
def test_interval_margins_hold_inside_the_ball(norm, widths) -> None:
    """Random and gradient-guided points of the ball never fall below; at radius 0 the margins are the margins; std scales the ball."""
    model = LipschitzMLP(widths, std=0.5, mean=0.2)
    x, y, epsilon = torch.randn(5, 6), torch.randint(3, (5,)), 0.2
    lower, seen = interval_margins(model, x, y, epsilon, norm)
    assert len(seen) == len(widths) - 2

    def margins(points: torch.Tensor) -> torch.Tensor:
        logits = model(points)
        return logits.gather(1, y[:, None]) - logits

    near = torch.full_like(lower, torch.inf)
    for i in range(400):
        if i < 200:
            direction = torch.randn(5, 6)
        else:
            points = (x + 0.01 * torch.randn_like(x)).requires_grad_()
            (gradient,) = torch.autograd.grad(margins(points)[:, i % 3].sum(), points)
            direction = -gradient
        length = direction.abs().amax(1, keepdim=True) if norm == "linf" else direction.norm(dim=1, keepdim=True)
        step = epsilon * (direction.sign() if norm == "linf" else direction / length.clamp_min(1e-12))
        near = torch.minimum(near, margins(x + step).detach())
    assert bool((lower <= near + 1e-5).all())
    if seen:  # the worst points of each neuron of the first layer are known: intervals are exact there
        weight = model.linear1.weight.detach()
        worst = weight.sign() if norm == "linf" else weight / weight.norm(dim=1, keepdim=True)
        reached = ((model.normalize(x[:, None] + epsilon * worst) - model.normalize(x)[:, None]) * weight).sum(-1)
        assert torch.allclose(seen[0][1], reached, atol=1e-5)
    if len(widths) == 2:  # a linear model: intervals are exact
        assert torch.allclose(lower, near, atol=1e-3)
    exact, _ = interval_margins(model, x, y, 1e-9, norm)
    assert torch.allclose(exact, margins(x), atol=1e-5)
    assert bool((lower.gather(1, y[:, None]).abs() < 1e-6).all())


@pytest.mark.slow
def test_interval_training_beats_plain_training_at_its_radius(tmp_path) -> None:
    """Certified with the same intervals, at the radius that was trained for."""
    base = {"optimizer": {"name": "adamw", "lr": 0.01, "clip_gradient": 8.0}, "constraint": {"method": "none"}}
    base["model"] = {"kind": "mlp", "widths": [64, 32, 10]}
    run = {"steps": 250, "batch": 64, "evaluate_every": 125, "checkpoint_every": 100}
    for norm, epsilon in (("linf", 0.05), ("l2", 0.3)):
        loss = {"kind": "ibp", "epsilon": epsilon, "norm": norm, "ramp": 150}
        trained = train(recipe(**base, loss=loss, run=run), tmp_path / norm)
        card = tomllib.loads(trained.with_suffix(".toml").read_text())
        assert card["interval_accuracy"] > 0.5 and card["val_accuracy"] > card["interval_accuracy"]
        plain = load_into(train(recipe(**base, loss={}, run=run), tmp_path / f"plain-{norm}"), build)
        from robustlip.data import load_data

        data = load_data("digits:test")
        lower, _ = interval_margins(plain, data.x, data.y, epsilon, norm)
        others = lower.scatter(1, data.y[:, None], torch.inf)
        assert float((others.amin(1) > 0).float().mean()) < card["interval_accuracy"] - 0.1


def test_the_ramp_and_the_initialisation_of_interval_training() -> None:
    part = recipe(constraint={"method": "none"}, loss={"kind": "ibp", "epsilon": 0.1, "start": 10, "ramp": 100}).loss
    radii = [radius_at(part, step) for step in range(130)]
    assert radii[5] == pytest.approx(1e-5) and radii[110:] == [0.1] * 20
    assert all(a <= b for a, b in pairwise(radii)) and radii[34] < 0.01 < radii[60]
    model = LipschitzMLP([400, 300, 300, 10])
    ibp_initialize(model)
    x = torch.rand(4, 400)
    _, seen = interval_margins(model, x, torch.zeros(4, dtype=torch.int64), 0.1, "linf")
    # Shi et al. 2021: the mean radius neither grows nor shrinks: 2ε in front of every ReLU.
    assert all(0.15 < float(radius.detach().mean()) < 0.25 for _, radius in seen)
    with pytest.raises(BadInput, match="interval bounds"):
        interval_margins(LipschitzMLP([4, 5, 3], "gelu"), torch.rand(2, 4), torch.tensor([0, 1]), 0.1, "linf")


def test_learning_rates_by_layer_and_for_embeddings() -> None:
    """The paper's options: halved for each earlier residual layer, embeddings by rows with a bounded inflation."""
    model = LipschitzGPT("abcdef", 16, 2, 2)
    spec = recipe(
        model={"kind": "lipschitz-gpt", "width": 16, "heads": 2, "blocks": 2},
        optimizer={"name": "muon", "lr": 0.08, "earlier_layers": 0.5, "embedding_inflation": 16.0, "polynomial": "torch"},
        loss={"logit_scale": 10.0},
    )
    muon, rows = make_optimizers(spec, model)
    rates = {id(p): group["lr"] for group in muon.param_groups for p in group["params"]}
    named = {name: rates.get(id(p)) for name, p in model.named_parameters()}
    assert named["head.weight"] == named["mlp1.branch.up.weight"] == 0.08
    assert named["attn1.branch.query.weight"] == 0.04 and named["mlp0.branch.down.weight"] == 0.02 and named["attn0.branch.output.weight"] == 0.01
    assert type(rows).__name__ == "RowMomentum" and rows.param_groups[0]["params"] == [model[0].weight]
    assert muon.update_norm(1.0) == POLYNOMIALS["torch"].peak
    # The paper's default for the unembedding: by rows too, at a rate of its own if need be, and no longer Muon's.
    changed = spec.optimizer.model_copy(update={"embedding_inflation": None, "unembedding_inflation": 8.0, "unembedding_lr": 0.3})
    muon, rows, rest = make_optimizers(spec.model_copy(update={"optimizer": changed}), model)
    assert [p is model.head.weight for p in rows.param_groups[0]["params"]] == [True]
    assert rows.param_groups[0]["lr"] == 0.3 and rows.param_groups[0]["inflation"] == 8.0
    held = [id(p) for optimizer in (muon, rows, rest) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_text_models_train(tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60, encoding="utf-8")
    spec = recipe(
        model={"kind": "lipschitz-gpt", "width": 16, "heads": 2, "blocks": 1, "distance_bias": 4},
        data={"name": str(text), "context": 16},
        constraint={"method": "soft-cap", "w_max": 1.0, "overrides": {"head.weight": 8.0}},
        loss={"logit_scale": 10.0},
        run={"steps": 30, "batch": 8},
    )
    model = load_into(train(spec, tmp_path / "out"), build)
    assert model.vocabulary == "".join(sorted(set(text.read_text())))
    assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, len(model.vocabulary))


def test_a_run_with_rates_by_layer_resumes(tmp_path) -> None:
    """Four optimisers and several parameter groups come back as they were; the unembedding is held by rows."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60, encoding="utf-8")
    spec = recipe(
        model={"kind": "lipschitz-gpt", "width": 8, "heads": 2, "blocks": 2, "distance_bias": 4},
        data={"name": str(text), "context": 8},
        optimizer={"name": "muon", "lr": 0.05, "earlier_layers": 0.5, "embedding_inflation": 16.0, "embedding_lr": 0.1, "warmup": 5}
        | {"unembedding_inflation": 16.0},
        constraint={"method": "hard-cap", "w_max": 1.0, "rows": ["head.weight"]},
        loss={"logit_scale": 10.0},
        run={"steps": 12, "batch": 4, "evaluate_every": 6, "checkpoint_every": 4},
    )

    def interrupt(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 7:
            raise Stop

    whole = train(spec, tmp_path / "whole")
    with pytest.raises(Stop):
        train(spec, tmp_path / "parts", progress=interrupt)
    model = load_into(train(spec, tmp_path / "parts"), build)
    assert weights_sha256(model) == weights_sha256(load_into(whole, build))
    assert float(model.head.weight.detach().norm(dim=-1).max()) <= 8**0.5 * (1 + 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"run": {"steps": 0, "batch": 3}}, "run.steps"),
        ({"optimizer": {"name": "sgd", "lr": 1}}, "optimizer.name"),
        ({"constraint": {"method": "soft-cap", "w_max": -1}}, "constraint.w_max"),
        ({"constraint": {"method": "soft-cap", "strength": 0.1}}, "no strength"),
        ({"optimizer": {"name": "adamw", "lr": 0.1, "embedding_inflation": 16.0}}, "need muon"),
        ({"optimizer": {"name": "muon", "lr": 0.1, "embedding_lr": 0.1}}, "embedding_lr needs embedding_inflation"),
        ({"optimizer": {"name": "adamw", "lr": 0.1, "unembedding_inflation": 16.0}}, "need muon"),
        ({"optimizer": {"name": "muon", "lr": 0.1, "unembedding_lr": 0.1}}, "unembedding_lr needs unembedding_inflation"),
        ({"loss": {"kind": "ibp"}}, "epsilon"),
        ({"loss": {"epsilon": 0.1}}, "epsilon"),
        ({"reparametrization": "spectral-norm"}, "exclude each other"),
        ({"model": {"kind": "lipschitz-gpt"}, "loss": {"kind": "ibp", "epsilon": 0.1}}, "for models of kind 'mlp'"),
    ],
)
def test_bad_recipes_name_the_key(tmp_path, change, message) -> None:
    path = tmp_path / "r.toml"
    path.write_text(toml_text({**RECIPE, **change}), encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        load_recipe(path)


def test_recipes_of_the_repository_are_valid() -> None:
    folder = Path(__file__).parent.parent / "recipes"
    assert len([load_recipe(path) for path in folder.glob("*.toml")]) >= 6


def test_the_grid_of_constraint_methods_makes_valid_recipes(monkeypatch) -> None:
    """Every method under both optimisers, merged over one base; a cell's own settings win, and an empty table replaces."""
    import importlib.util

    from robustlip.constraints import METHODS

    source = Path(__file__).parent.parent / "benchmarks" / "constraints.py"
    spec = importlib.util.spec_from_file_location("constraints_benchmark", source)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(source.parent))  # as when it is run as a script
    spec.loader.exec_module(benchmark)
    cells = {(m, o): r for m, o, r in benchmark.recipes_of(tomllib.loads(benchmark.GRID.read_text(encoding="utf-8")))}
    assert {(m, o) for m in METHODS for o in ("muon", "adamw")} <= set(cells)
    assert all(r.constraint.method == m and r.optimizer.name == o for (m, o), r in cells.items() if m in METHODS)
    assert cells["weight-decay", "muon"].constraint.strength == 1.0 and cells["weight-decay", "adamw"].constraint.strength == 5.0
    assert cells["none", "muon"].constraint.overrides == {} and cells["soft-cap", "muon"].constraint.overrides
    assert cells["ibp-linf", "adamw"].loss.kind == "ibp"


def test_bad_model_configurations(tmp_path) -> None:
    for config, message in (({"kind": "rnn"}, "model kind"), ({"kind": "mlp", "widths": [3, 2], "depth": 9}, "options")):
        with pytest.raises(BadInput, match=message):
            build(config)


def test_model_files_round_trip_and_lies_are_refused(tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    model = LipschitzMLP([4, 6, 3], "scaled-gelu", mean=0.5, std=0.25)
    save_model(path, model)
    again = load_into(path, build)
    assert repr(again) == repr(model) and weights_sha256(again) == weights_sha256(model) and not again.training

    raw = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BadInput, match="cannot be read"):
        load_into(tmp_path / "cut.safetensors", build)
    flipped = bytearray(raw)
    flipped[-1] ^= 1
    (tmp_path / "flip.safetensors").write_bytes(flipped)
    with pytest.raises(BadInput, match="SHA-256"):
        load_into(tmp_path / "flip.safetensors", build)
    with pytest.raises(BadInput, match="does not exist"):
        load_into(tmp_path / "none.safetensors", build)

    tensors, header = load_tensors(path)
    save_tensors(tmp_path / "surplus.safetensors", {**tensors, "more": torch.zeros(2)}, header)
    with pytest.raises(BadInput, match="6 of them, got 7"):
        load_into(tmp_path / "surplus.safetensors", build)
    save_tensors(tmp_path / "nan.safetensors", {**tensors, "linear1.bias": torch.full((6,), torch.nan)}, header)
    with pytest.raises(BadInput, match="NaN"):
        load_into(tmp_path / "nan.safetensors", build)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "foreign.safetensors")
    with pytest.raises(BadInput, match="header"):
        load_into(tmp_path / "foreign.safetensors", build)


def test_toml_text_reads_back() -> None:
    data = {"a": 1, "b": 2.5, "c": True, "d": "quo\"te\n\x07", "e": [1, 2], "f": {"x*": 1.0, "g": {"h": "ü"}}, "i": float("inf"), "none": None}
    data |= {"k": [{"l": 1, "m": [{"n": {}}]}], "o": {"p": None, "q": {}}}
    wanted = {k: v for k, v in data.items() if v is not None} | {"o": {"q": {}}}
    assert tomllib.loads(toml_text(data)) == wanted
