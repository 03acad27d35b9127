"""The violation search for each certifier by name.

    python benchmarks/violations.py --methods all --minutes 8 [--seed 0] [--state FILE] [--json FILE] [--unit N]

A unit draws a model (random weights, attention and rank-one weights optimised to be sensitive, the zoo, or weights optimised to bring a certificate
as close to the attack as possible), one dtype and a few samples. Under every threat that applies, each method that applies certifies. Samples with
a radius are attacked at 1.0 and at 1.02 times that radius by
- the attack `min` (direct minimum-norm descent, PGD at bisected radii, nearest classes as targets), run once for all methods: its distance d counts
  as a violation of a method whose radius is at least d, as a near miss below 1.02 times the radius;
- projected ascent at each method's own radius, from the result of `min`, from the gradient and from random points;
- the perturbations of violations.py (vertices, points that differ in single roundings); under weight threats its groups.
A plain forward pass in the dtype decides; distances within 1.0 are compared as exact fractions. Near misses show that the attack is strong enough to
find small errors; the largest certified / attacked radius shows how small.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from violations import (
    BUILD,
    Draw,
    Finding,
    across,
    allowed,
    attack_points,
    attack_weights,
    exactly_inside,
    favour_one_class,
    from_zoo,
    into_ball,
    measure,
    number,
    pick,
    randomised,
    scaled,
    steepest,
    threats_for,
    worst_margin,
)  # fmt: skip

from robustlip import __version__
from robustlip.attacks import MinimumRadius
from robustlip.certifiers import METHODS, RULES_VERSION, certify
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Chain
from robustlip.models import LipschitzGPT, LipschitzMLP, zoo
from robustlip.threats import EmbeddingBall, InputBall, Threat, WeightBall

NEAR = 1.02
FAMILIES = ("mlp", "climbed-mlp", "gpt", "mlp-tight", "climbed-gpt", "conv", "joined", "zoo", "transformer", "mlp-residual", "gpt-worst")
MORE = ("gpt-maxmin", "climbed-gpt-maxmin", "convnet")  # only if named with --families
# In half precision most small margins have radius 0, so it is drawn rarely.
DTYPES = (torch.float32, torch.float64, torch.float32, torch.float16, torch.float32, torch.bfloat16)
# Samples of one unit for each method; the cost per sample differs by a factor of a thousand.
SAMPLES = {"sdp": 12}
MOST = 32
ZOO_TOKENS = 6  # tokens for the zoo's transformers
# One semidefinite program per pair of logits takes minutes on the zoo's networks, so it runs only if named.
DEAR_ON_THE_ZOO = ("lipsdp",)


def climbed(g: Draw, kind: str, method: str) -> tuple[Chain, Tensor, Threat]:
    """A small model whose weights were changed by random steps that brought `method`'s radius closer to the attack's."""
    if kind.startswith("gpt"):
        options: dict[str, Any] = {"activation": "maxmin", "mlp_alpha": 1.0} if kind == "gpt-maxmin" else {}
        model: Chain = randomised(LipschitzGPT("abcdefgh", 8, pick(g, (1, 2)), pick(g, (1, 2)), attention_scale=pick(g, (0.5, 2.0)), **options), g)
        x = torch.randint(8, (8, 3), generator=g).unique(dim=0)
        threat: Threat = pick(g, (EmbeddingBall(), EmbeddingBall(tokens=(-1,)), EmbeddingBall(joint=True)))
    else:
        model = randomised(LipschitzMLP([3, 6, *([6] if number(g, 0, 1) < 0.5 else []), 3], pick(g, ("relu", "relu", "gelu", "tanh"))), g)
        x = torch.randn(8, 3, generator=g)
        threat = InputBall(pick(g, ("l2", "linf", "l1")))
    model.eval().requires_grad_(False)
    search = MinimumRadius(steps=3, descent=25)

    def nearness(candidate: Chain) -> float:
        y = candidate.scores(x).argmax(-1)
        proved = torch.from_numpy(certify(candidate, x, y, threat, method).radius)
        found = torch.from_numpy(search(candidate, x, y, threat).radius)
        return float((proved / found).nan_to_num(0.0).topk(min(3, len(x))).values.mean())

    best = nearness(model)
    for _ in range(10):
        other, step = copy.deepcopy(model), 10 ** number(g, -2, -0.3)
        for p in other.parameters():
            p.add_(step * p.std(correction=0) * torch.randn(p.shape, generator=g))
        if (value := nearness(other)) > best:
            best, model = value, other
    return model, x, threat


def project(threat: Threat, delta: Tensor, edge: Tensor) -> Tensor:
    """Projection onto the ball: by coordinate for l∞, by token for balls of each token, otherwise by scaling."""
    if threat.norm == "linf":
        limit = across(edge, delta)
        return delta.clamp(-limit, limit)
    if isinstance(threat, EmbeddingBall) and not threat.joint:
        size = delta.norm(dim=-1, keepdim=True)
        return delta * (across(edge, delta) / size.clamp_min(1e-300)).clamp_max(1.0)
    return delta * across((edge / measure(threat, delta).clamp_min(1e-300)).clamp_max(1.0), delta)


def ascend(exact: Chain, base: Tensor, y: Tensor, threat: Threat, edge: Tensor, start: Tensor, g: Draw, steps: int = 16) -> list[Tensor]:
    """Changes within `edge` after projected ascent of the margin: the best and the last one from every start."""
    run = exact.scores_from_embeddings if isinstance(threat, EmbeddingBall) else exact.scores
    noise = torch.randn(base.shape, generator=g, dtype=torch.float64) * allowed(threat, base)
    starts = [scaled(threat, start, edge), 0 * base, scaled(threat, noise, edge * 0.5)]
    count = len(starts)
    delta, points = torch.cat(starts), base.repeat(count, *[1] * (base.dim() - 1))
    edges, labels = edge.repeat(count), y.repeat(count)
    best, highest = delta, torch.full_like(edges, -torch.inf)
    for k in range(steps + 1):
        at = (points + delta).requires_grad_()
        with torch.enable_grad():
            value = worst_margin(run(at), labels)
            grad = torch.nan_to_num(torch.autograd.grad(value.sum(), at)[0])
        better = value.detach() > highest
        best, highest = torch.where(across(better, delta), delta, best), torch.where(better, value.detach(), highest)
        if k < steps:
            size = 0.02 + 0.5 * (1 + math.cos(math.pi * k / steps))
            delta = project(threat, delta + across(edges * size, delta) * steepest(threat, grad), edges)
    return [*best.chunk(count), *delta.chunk(count)]


class Tally:
    """Counts of one method in one cell, and its findings."""

    def __init__(self, counts: dict[str, dict[str, Any]], findings: list[str]) -> None:
        self.counts, self.findings = counts, findings

    def add(self, key: str, **numbers: float) -> None:
        cell = self.counts.setdefault(key, {"samples": 0, "perturbations": 0, "violations": 0, "near": 0, "closest": 0.0, "seconds": 0.0})
        for name, value in numbers.items():
            cell[name] = max(cell[name], value) if name == "closest" else round(cell[name] + value, 3)


def attack_method(
    model: Chain, exact: Chain, clean: Tensor, y: Tensor, radius: Tensor, threat: Threat, found: tuple[Tensor, Tensor] | None, g: Draw
) -> tuple[int, Tensor, Tensor, list[str]]:
    """(perturbations, violated (N,), near misses (N,), descriptions of violations) for inputs or embeddings `clean` that all have a radius."""
    run = model.scores_from_embeddings if isinstance(threat, EmbeddingBall) else model.scores
    base = clean.double()
    violated, near, messages, judged = torch.zeros(len(y), dtype=torch.bool), torch.zeros(len(y), dtype=torch.bool), [], 0

    def judge(point: Tensor) -> None:
        nonlocal judged
        judged += len(point)
        size = measure(threat, point.double() - base)
        for i in ((run(point).argmax(-1) != y) & (size <= radius * NEAR)).nonzero()[:, 0].tolist():
            if not exactly_inside(threat, clean[i], point[i], float(radius[i])):
                near[i] = True
                continue
            violated[i] = True
            if len(messages) < 3:
                messages.append(f"radius {float(radius[i])!r}, label {int(y[i])}\nclean {clean[i].tolist()}\npoint {point[i].tolist()}")

    toward = torch.randn(base.shape, generator=g, dtype=torch.float64) * allowed(threat, base)
    if found is not None:
        nearest, distance = found
        judge(torch.where(across(torch.isfinite(distance), clean), nearest, clean))
        toward = torch.where(across(torch.isfinite(distance), clean), nearest.double() - base, toward)
    for factor in (1.0, NEAR):
        limit = radius * factor
        for delta in ascend(exact, base, y, threat, limit * (1 - 1e-12), toward, g):
            judge(into_ball(threat, clean, delta, limit, False))
    try:
        judged += attack_points(model, exact, clean, y, radius, threat, g)
    except Finding as finding:
        violated[int(str(finding).split(",")[0].removeprefix("sample "))] = True
        messages.append(str(finding))
    return judged, violated, near, messages


def draw(family: str, turn: int, method: str, dtype: torch.dtype, g: Draw) -> tuple[Chain, Tensor, list[Threat]]:
    """turn: how many times the family was drawn before; it selects the model of the zoo."""
    if family.startswith("climbed"):
        model, x, threat = climbed(g, family.removeprefix("climbed-"), method)
        return model, x, [threat]
    model, x = from_zoo(g, zoo.names()[turn % len(zoo.names())]) if family == "zoo" else BUILD[family](g)
    model.eval()
    most = ZOO_TOKENS if family == "zoo" and model.embedding_depth else MOST
    x = x[torch.randperm(len(x), generator=g)[:most]]
    if dtype in (torch.float16, torch.bfloat16) and family != "zoo":
        favour_one_class(model, x, g)
    return model, x, threats_for(model, x, g)


@torch.no_grad()
def unit(seed: int, at: int, names: tuple[str, ...], named: bool, tally: Tally, families: tuple[str, ...] = FAMILIES) -> None:
    """Runs one unit and adds to the counts."""
    family, turn = families[at % len(families)], at // len(families)
    dtype = torch.float32 if family == "zoo" else DTYPES[turn % len(DTYPES)]
    g = torch.Generator().manual_seed(seed * 1_000_003 + at)
    torch.manual_seed(seed * 1_000_003 + at)
    able = [n for n in names if n in ("global", "local", "dual")] if family.startswith("climbed-gpt") else list(names)
    if not able:
        return
    model, x, threats = draw(family, turn, able[turn % len(able)], dtype, g)
    model = model.to(dtype).requires_grad_(False)
    x = x.to(dtype) if x.is_floating_point() else x
    exact = copy.deepcopy(model).double()
    logits = model.scores(x)
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        return
    y = logits.argmax(-1)
    for threat in threats:
        inner = model.embed(x) if isinstance(threat, EmbeddingBall) else x
        found: tuple[Tensor, Tensor] | None = None
        for name in names:
            if METHODS[name].why_not(model, threat) or (family == "zoo" and name in DEAR_ON_THE_ZOO and not named):
                continue
            begun = time.perf_counter()
            few = SAMPLES.get(name, MOST)
            try:
                radius = torch.from_numpy(certify(model, x[:few], y[:few], threat, name).radius)
            except (BadInput, UnsupportedLayer):
                continue  # a size that the method refuses
            rows = ((radius > 0) & (radius < float(torch.finfo(dtype).max) / 4)).nonzero()[:, 0]
            kind = replace(threat, tokens=None).name + "@named" if isinstance(threat, EmbeddingBall) and threat.tokens else threat.name
            key = f"{name} | {family} | {kind} | {str(dtype).removeprefix('torch.')}"
            about = f"VIOLATION of {name}: unit {at}, seed {seed}, {family}, {dtype}, {threat}\n{model}\n"
            if len(rows) and isinstance(threat, WeightBall):
                flips: list[int] = []
                judged = attack_weights(model, exact, x[rows], y[rows], radius[rows], threat, flips)
                closer: list[int] = []
                judged += attack_weights(model, exact, x[rows], y[rows], radius[rows] * NEAR, threat, closer)
                if flips:
                    tally.findings.append(f"{about}samples {sorted(set(flips))} of {rows.tolist()}")
                tally.add(key, samples=len(rows), perturbations=judged, violations=len(set(flips)), near=len(set(closer) - set(flips)))
            elif len(rows):
                if found is None and dtype in (torch.float32, torch.float64):
                    nearest = MinimumRadius(steps=6, descent=60)(model, x, y, threat, generator=g)
                    assert isinstance(nearest.adversarial, Tensor)
                    found = nearest.adversarial, torch.from_numpy(nearest.radius)
                here = None if found is None else (found[0][rows], found[1][rows])
                judged, violated, near, messages = attack_method(model, exact, inner[rows], y[rows], radius[rows], threat, here, g)
                closest = 0.0 if here is None else float((radius[rows] / here[1]).max())
                tally.findings += [f"{about}row {rows.tolist()} {text}" for text in messages]
                tally.add(
                    key, samples=len(rows), perturbations=judged, violations=int(violated.sum()), near=int((near & ~violated).sum()), closest=closest
                )
            tally.add(key, seconds=time.perf_counter() - begun)


def table(counts: dict[str, dict[str, Any]]) -> str:
    """A Markdown table by method."""
    heads = ("method", "attacked samples", "perturbations", "violations (1.0)", f"near misses ({NEAR})", "largest certified / attacked")
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * 5]
    for name in [n for n in METHODS if any(key.startswith(f"{n} |") for key in counts)]:
        cells = [cell for key, cell in counts.items() if key.startswith(f"{name} |")]
        samples, tried, bad, near = (int(sum(c[k] for c in cells)) for k in ("samples", "perturbations", "violations", "near"))
        lines.append(f"| {name} | {samples:,} | {tried:,} | {bad} | {near} | {max(c['closest'] for c in cells):.4f} |")
    return "\n".join(lines)


def search(
    names: str,
    seed: int,
    minutes: float,
    at: int | None,
    state_file: Path | None,
    json_file: Path | None,
    refuse: Callable[[str], Any],
    families: str | None = None,
) -> int:
    """Runs units until the time is over, prints the table, returns exit code 0 or 3. at: run only that unit."""
    chosen = tuple(METHODS) if names == "all" else tuple(names.split(","))
    if not set(chosen) <= set(METHODS):
        refuse(f"expected methods among all, {', '.join(METHODS)}, got {names}")
    if at is None and not math.isfinite(minutes):
        refuse("expected --minutes with --methods, got none; say how long, e.g. --minutes 8")
    drawn = FAMILIES if families is None else tuple(families.split(","))
    if not set(drawn) <= set(FAMILIES + MORE):
        refuse(f"expected families among {', '.join(FAMILIES + MORE)} with --methods, got {families}")
    identity = {"methods": names, "seed": seed, "rules": RULES_VERSION} | ({} if families is None else {"families": families})
    state: dict[str, Any] = {**identity, "next": 0, "seconds": 0.0, "counts": {}, "findings": []}
    if state_file and state_file.exists():
        state = json.loads(state_file.read_text(encoding="utf-8"))
        if {key: state.get(key) for key in identity} != identity:
            refuse(f"expected a state of {identity}, got one of {[state.get(key) for key in identity]}; name another file")
    tally = Tally(state["counts"], state["findings"])
    before, start = state["seconds"], time.monotonic()
    if at is not None:
        unit(seed, at, chosen, names != "all", tally, drawn)
    while at is None and state["seconds"] < 60 * minutes:
        unit(seed, state["next"], chosen, names != "all", tally, drawn)
        state["next"] += 1
        state["seconds"] = round(before + time.monotonic() - start, 1)
        if state_file:
            scratch = state_file.with_suffix(".tmp")
            scratch.write_text(json.dumps(state), encoding="utf-8")
            os.replace(scratch, state_file)
        if state["next"] % 10 == 0:
            print(f"{state['next']} units, {state['seconds']:.0f} s, {len(state['findings'])} violations", file=sys.stderr, flush=True)
    versions = {"robustlip": __version__, "rules": RULES_VERSION, "torch": torch.__version__, "python": platform.python_version()}
    among = "" if families is None else f" --families {families}"
    until = f"--minutes {minutes:g}" if at is None else f"--unit {at}"
    command = f"python benchmarks/violations.py --methods {names}{among} --seed {seed} {until}"
    result = {"command": command, "units": state["next"], "seconds": state["seconds"], "versions": versions, "counts": tally.counts}
    print(table(tally.counts))
    print("\n".join(f"{key}: {value}" for key, value in result.items() if key != "counts"))
    if json_file:
        json_file.write_text(json.dumps({**result, "findings": tally.findings}, indent=1) + "\n", encoding="utf-8")
    print("\n\n".join(tally.findings))
    return 3 if tally.findings else 0
