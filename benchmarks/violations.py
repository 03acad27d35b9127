"""A search for violations: perturbations inside a certified radius for which the executed model predicts another class. There must be none.

    python benchmarks/violations.py [--samples 1000000] [--seed 0] [--minutes 30] [--json FILE] [--state FILE] [--unit N]
        [--families gpt,gpt-aligned]
    python benchmarks/violations.py --methods all --minutes 8      # each certifier by name: benchmarks/violation_methods.py

The search consists of units, each drawn from (seed, number): a model of one family with random, optimised, huge or tiny weights, one dtype, a few
thousand samples and every threat that applies, certified by method global. A sample with a radius above 0 is attacked at 1.0 times that radius and
inside it, by gradients, by random points, at vertices, and by points that differ in single roundings.
A plain forward pass in the dtype decides; a changed prediction counts if the distance of
the stored point, computed again as an exact fraction, is at most the radius.

It counts attacked samples, (sample, threat, dtype) with a radius above 0 whose perturbations were tried, and separately the perturbations.
Weight threats change the weights for a whole group of samples of nearly equal radius by the smallest of their radii.
--state FILE: counts so far, written after every unit; run the command again to resume. --unit N: only that unit, to reproduce a finding.
Exit code 0: no violation. 3: a violation, printed with everything that is needed to reproduce it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import platform
import sys
import time
from collections import OrderedDict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlip import __version__
from robustlip.attacks.worst_weights import newhouse_counterexample
from robustlip.certifiers import RULES_VERSION, certify
from robustlip.data import load_data
from robustlip.layers import (
    AddPositions,
    Chain,
    Channels,
    Concatenate,
    GroupSort,
    Householder,
    Maximum,
    MaxMin,
    Minimum,
    Product,
    Residual,
    ScaledGELU,
    Sum,
)
from robustlip.models import LipschitzGPT, LipschitzMLP, LipschitzTransformer, zoo
from robustlip.numerics.spectral import spectral_norm_bound
from robustlip.threats import EmbeddingBall, InputBall, Threat, WeightBall

FAMILIES = ("mlp", "mlp-residual", "mlp-tight", "gpt", "gpt-worst", "transformer", "conv", "zoo")
MORE = ("gpt-aligned", "gpt-maxmin", "joined", "convnet")  # only if named with --families
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Draw = torch.Generator


# ---- models


def number(g: Draw, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=g))


def pick(g: Draw, options: Any) -> Any:
    return options[int(torch.randint(len(options), (), generator=g))]


def gain(g: Draw) -> float:
    """Mostly near 1, with probability 1/8 between 1e-6 and 1e4."""
    return 10 ** number(g, -6, 4) if number(g, 0, 1) < 0.125 else 2 ** number(g, -2, 2)


def randomised(model: nn.Module, g: Draw) -> nn.Module:
    """Draws every parameter again, with the scale of its initialisation, and multiplies each matrix by a gain."""
    overall = gain(g)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
            p.copy_(torch.randn(p.shape, generator=g) * spread * (overall if p.dim() > 1 else 1.0) * 2 ** number(g, -0.5, 0.5))
            if name.endswith("norm.weight"):
                p.abs_().add_(0.5)
    return model


def vectors(g: Draw, count: int, *shape: int) -> Tensor:
    size = pick(g, (1.0, 1.0, 1.0, 1e-3, 50.0))
    return size * (torch.rand(count, *shape, generator=g) if number(g, 0, 1) < 0.5 else torch.randn(count, *shape, generator=g))


def mlp(g: Draw) -> tuple[Chain, Tensor]:
    widths = [pick(g, (2, 5, 12, 24)), *(pick(g, (4, 16, 40)) for _ in range(pick(g, (0, 1, 2, 3)))), pick(g, (2, 3, 10))]
    options = {} if number(g, 0, 1) < 0.5 else {"mean": 0.4, "std": 0.25}
    model = randomised(LipschitzMLP(widths, pick(g, ("relu", "gelu", "scaled-gelu", "tanh")), **options), g)
    return model, vectors(g, 1536, widths[0])


ACTIVATIONS = (
    nn.ReLU, ScaledGELU, MaxMin, nn.SiLU, nn.Sigmoid, lambda: GroupSort(4), lambda: Householder(24), lambda: nn.GELU(approximate="tanh"),
)  # fmt: skip


def mlp_residual(g: Draw) -> tuple[Chain, Tensor]:
    n, width = pick(g, (4, 12)), pick(g, (8, 16))
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten(), first=nn.Linear(n, width))
    for i in range(pick(g, (1, 2, 3))):
        act = pick(g, ACTIVATIONS)()
        parts = [nn.Linear(width, 24), act, nn.Linear(24, width)]
        if number(g, 0, 1) < 0.3:
            parts.insert(0, pick(g, (nn.LayerNorm, nn.RMSNorm))(width, eps=1e-2))
        layers[f"block{i}"] = Residual(nn.Sequential(*parts), skip=pick(g, (1.0, 0.5, 0.9)), weight=pick(g, (1.0, 0.5, -0.3)))
    layers["head"] = nn.Linear(width, pick(g, (2, 6)))
    return randomised(Chain(layers), g), vectors(g, 1536, n)


def _branch(g: Draw, before: int, after: int, depth: int) -> nn.Module:
    """A random graph of layers from `before` numbers to `after`: series, sums, concatenations, products and maxima of branches, slices."""
    kind = pick(g, ("series", "series", "sum", "concatenate", "slice", "pair", "pair")) if depth else "series"
    if kind == "sum":
        parts = [_branch(g, before, after, depth - 1) for _ in range(pick(g, (2, 2, 3)))]
        parts += [nn.Identity()] if before == after and number(g, 0, 1) < 0.5 else []
        return Sum(*parts, weights=[pick(g, (1.0, 0.5, -0.7)) for _ in parts])
    if kind == "concatenate" and after >= 2:
        first = 1 + pick(g, range(after - 1))
        return Concatenate(_branch(g, before, first, depth - 1), _branch(g, before, after - first, depth - 1))
    if kind == "pair":
        parts = [_branch(g, before, after, depth - 1) for _ in range(2)]
        parts[1] = nn.Sequential(parts[1], pick(g, (nn.Identity, nn.Sigmoid, nn.Tanh))())
        square = before == after and number(g, 0, 1) < 0.2
        return Product(nn.Identity(), nn.Identity()) if square else pick(g, (Product, Product, Maximum, Minimum))(*parts)
    if kind == "slice" and before >= 2:
        start = pick(g, range(before - 1))
        stop = start + 1 + pick(g, range(before - start))
        return nn.Sequential(Channels(start, stop), _branch(g, stop - start, after, depth - 1))
    width = pick(g, (6, 10))
    return nn.Sequential(nn.Linear(before, width), pick(g, (nn.ReLU, nn.GELU, nn.Tanh, MaxMin, nn.SiLU))(), nn.Linear(width, after))


def joined(g: Draw) -> tuple[Chain, Tensor]:
    n, width = pick(g, (3, 8)), pick(g, (4, 8))
    layers = [_branch(g, n, width, 2), pick(g, (nn.ReLU, nn.Identity))(), _branch(g, width, width, pick(g, (0, 1, 2)))]
    layers.append(nn.Linear(width, pick(g, (2, 5))))
    return randomised(Chain(*layers), g), vectors(g, 1024, n)


def mlp_tight(g: Draw) -> tuple[Chain, Tensor]:
    """Positive rank-one weights with matching singular vectors, so that the product of norms is attained and only rounding remains."""
    n, width, depth = pick(g, (3, 16, 64)), pick(g, (4, 32)), pick(g, (1, 2, 3))
    model = LipschitzMLP([n, *[width] * depth, 2], "relu")
    left = torch.rand(n, generator=g) + 0.1
    factor = gain(g)
    with torch.no_grad():
        for i in range(1, depth + 1):
            right = left / left.norm()
            left = torch.rand(width, generator=g) + 0.1
            layer = model.get_submodule(f"linear{i}")
            layer.weight.copy_(factor * torch.outer(left / left.norm(), right))
            layer.bias.zero_()
        head = model.get_submodule(f"linear{depth + 1}")
        row = left / left.norm()
        head.weight.copy_(factor * torch.stack([row, -row]))
        x = torch.rand(1536, n, generator=g) + 0.2
        # Logits far larger than their differences: the mean of the scores is added to the bias.
        logits = model(x).mean(0)
        head.bias.copy_(-logits + logits.abs().amax() * pick(g, (0.0, 1.0, 30.0)))
    return model, x


def gpt(g: Draw, **options: Any) -> tuple[Chain, Tensor]:
    width, heads = pick(g, ((8, 1), (8, 2), (16, 4)))
    scale, bias, alpha = pick(g, (0.3, 1.0, 4.0)), pick(g, (0, 3)), pick(g, (None, 0.9, 0.05))
    letters = "".join(map(chr, range(64, 128)))
    model = LipschitzGPT(letters, width, heads, pick(g, (1, 2)), attention_scale=scale, distance_bias=bias, alpha=alpha, **options)
    model = randomised(model, g)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(width**0.5)
        if alpha == 0.05:  # tied to the table, so that margins exceed rounding in half precision
            model.embed_tokens.weight.div_(model.embed_tokens.weight.norm(dim=-1, keepdim=True))
            model.head.weight.copy_(model.embed_tokens.weight)
            for name, p in model.named_parameters():
                if "query" in name or "key" in name:
                    p.mul_(0.1)
    return model, torch.randint(64, (1024, pick(g, (2, 3, 6))), generator=g).unique(dim=0)


def gpt_maxmin(g: Draw) -> tuple[Chain, Tensor]:
    return gpt(g, activation="maxmin", mlp_alpha=pick(g, (1.0, 0.5)))


@functools.cache
def counterexample(seed: int, heads: int) -> Chain:
    return newhouse_counterexample(width=16, heads=heads, steps=80, seed=seed)


def gpt_worst(g: Draw) -> tuple[Chain, Tensor]:
    """Attention weights optimised for sensitivity, with the corresponding tokens, before random heads."""
    model = copy.deepcopy(counterexample(pick(g, (0, 1)), pick(g, (1, 4))))
    factor = gain(g) if number(g, 0, 1) < 0.3 else 1.0
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(16, 16, generator=g))
        model.attn0.branch.query.weight.mul_(factor)
    # The optimised tokens are ids 0, 1, 2; no sequence occurs twice.
    return model, torch.randint(16, (1024, 3), generator=g).unique(dim=0)


def gpt_aligned(g: Draw) -> tuple[Chain, Tensor]:
    """As gpt_worst, with all tokens near the optimised ones and two classes that differ along the most sensitive output direction."""
    model = copy.deepcopy(counterexample(pick(g, (0, 1)), 4)).double()
    body = list(model)[1:-1]

    def hidden(tokens: Tensor) -> Tensor:
        for layer in body:
            tokens = layer(tokens)
        return tokens[0, -1]

    near = model.embed_tokens.weight[:3].detach().clone()
    u = torch.randn(16, generator=g, dtype=torch.float64)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        for _ in range(20):
            x = near[None].clone().requires_grad_()
            delta = torch.autograd.grad(hidden(x) @ (u / u.norm()), x)[0]
            delta = delta / delta.norm(dim=-1, keepdim=True).clamp_min(1e-300)
            u = torch.autograd.functional.jvp(hidden, near[None], delta)[1].detach()
    u = u / u.norm()
    with torch.no_grad():
        noise = torch.randn(16, 16, generator=g, dtype=torch.float64) * pick(g, (1e-4, 1e-3, 1e-2))
        model.embed_tokens.weight.copy_(near[torch.arange(16) % 3] + noise)
        model.head = nn.Linear(16, 2).double()
        model.head.weight.copy_(torch.stack([u, -u]))
        offset = float(hidden(near[None]) @ u) - pick(g, (-1, 1)) * 10 ** number(g, -3, -0.5)
        model.head.bias.copy_(torch.tensor([-offset, offset]))
    ids = torch.cartesian_prod(torch.arange(0, 16, 3), torch.arange(1, 16, 3), torch.arange(2, 16, 3))
    return model.float(), ids


def transformer(g: Draw) -> tuple[Chain, Tensor]:
    image = pick(g, ((1, 4, 4), (3, 4, 4)))
    model = randomised(LipschitzTransformer(image, 2, pick(g, (2, 5)), 8, pick(g, (1, 2)), pick(g, (1, 2)), attention_scale=pick(g, (0.5, 2.0))), g)
    return model, torch.rand(1024, *image, generator=g)


def conv(g: Draw) -> tuple[Chain, Tensor]:
    pad, stride = pick(g, (0, 1)), pick(g, (1, 2))
    size = (6 + 2 * pad - 3) // stride + 1
    layers: list[nn.Module] = [nn.Conv2d(2, 4, 3, padding=pad, stride=stride, bias=pick(g, (True, False))), pick(g, (nn.ReLU, nn.Tanh, MaxMin))()]
    if size % 2 == 0 and number(g, 0, 1) < 0.5:
        layers.append(pick(g, (nn.AvgPool2d, nn.MaxPool2d))(2))
        size //= 2
    model = Chain(*layers, nn.Flatten(), nn.Linear(4 * size * size, pick(g, (2, 4))))
    return randomised(model, g), vectors(g, 1024, 2, 6, 6)


def convnet(g: Draw) -> tuple[Chain, Tensor]:
    """Convolutions with all their options, batch norm, pooling and joins of images; some layers large enough to be maps in crown and ibp."""
    options: dict[str, Any] = pick(
        g, ({"padding": 1}, {"padding": "same"}, {"padding": 2, "stride": 2}, {"groups": 2, "padding": 1}, {"dilation": 2}, {"padding": (2, 1)})
    )
    mode = pick(g, ("zeros", "zeros", "circular", "replicate", "reflect")) if "padding" in options else "zeros"
    layers: list[nn.Module] = [nn.Conv2d(2, 8, pick(g, (2, 3, 4)), padding_mode=mode, bias=pick(g, (True, False)), **options)]

    def act() -> nn.Module:
        return pick(g, (nn.ReLU, nn.ReLU, nn.Tanh, nn.GELU, MaxMin, nn.SiLU, lambda: GroupSort(2)))()

    def branch() -> nn.Module:
        parts = [nn.Conv2d(8, 8, 3, padding=1), *([nn.BatchNorm2d(8)] if number(g, 0, 1) < 0.5 else []), act(), nn.Conv2d(8, 8, 1)]
        return nn.Sequential(*parts[: pick(g, (1, len(parts)))])

    layers += [nn.BatchNorm2d(8)] if number(g, 0, 1) < 0.4 else []
    layers.append(act())
    for _ in range(pick(g, (0, 1, 1))):
        joins = (
            lambda: Sum(branch(), branch(), weights=(pick(g, (1.0, -0.7)), 0.5)), lambda: Residual(branch(), skip=pick(g, (1.0, 0.5))),
            lambda: Concatenate(nn.Sequential(branch(), Channels(1, 5)), Channels(4, 8)), branch,
            lambda: Product(branch(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())), lambda: Maximum(branch(), branch()),
        )  # fmt: skip
        layers += [pick(g, joins)(), act()]
    layers += pick(g, ([], [nn.AvgPool2d(2)], [nn.MaxPool2d(2)], [nn.MaxPool2d(3, 1, 1)], [nn.AvgPool2d(3, 2, 1)], [nn.AdaptiveAvgPool2d(1)]))
    with torch.no_grad():
        for layer in (m for part in layers for m in part.modules() if isinstance(m, nn.BatchNorm2d)):
            layer.running_mean.copy_(torch.randn(8, generator=g))
            layer.running_var.copy_(0.05 + 3 * torch.rand(8, generator=g))
        after = nn.Sequential(*layers).eval()(torch.zeros(1, 2, 9, 8))
    layers += [nn.Flatten(), nn.Linear(after.numel(), pick(g, (2, 4)))]
    return randomised(Chain(*layers), g), vectors(g, 512, 2, 9, 8)


@functools.cache
def digits() -> Tensor:
    return load_data("digits").x


def from_zoo(g: Draw, name: str | None = None) -> tuple[Chain, Tensor]:
    name = name or pick(g, zoo.names())
    model = zoo.load(name)
    if model.task == "next-token":
        return model, torch.randint(len(model.vocabulary or ""), (16, 12), generator=g)
    x = digits()
    rows = torch.randint(len(x), (1024 if "mlp" in name else 96,), generator=g)
    # Digits resized to the model's input: the data sets of the zoo may be missing, and soundness does not depend on the images.
    shape = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}.get(name.split("-")[0], tuple(x.shape[1:]))
    image = torch.nn.functional.interpolate(x[rows], shape[1:]).expand(-1, *shape)
    return model, (image + 0.02 * torch.rand(image.shape, generator=g)).clamp(0, 1)


BUILD = dict(zip(
    FAMILIES + MORE,
    (mlp, mlp_residual, mlp_tight, gpt, gpt_worst, transformer, conv, from_zoo, gpt_aligned, gpt_maxmin, joined, convnet),
    strict=True,
))


def threats_for(model: Chain, x: Tensor, g: Draw) -> list[Threat]:
    found: list[Threat] = []
    if x.is_floating_point():
        found += [InputBall("l2"), InputBall("linf"), InputBall("l1")]
    if model.embedding_depth:
        length = x.shape[1] if x.dim() == 2 else model.embed(x[:1].to(next(model.parameters()).dtype)).shape[1]
        named = tuple(torch.randperm(length, generator=g)[: max(1, length // 2)].tolist())
        found += [EmbeddingBall(), EmbeddingBall(tokens=named), EmbeddingBall(joint=True)]
    return [*found, WeightBall(pick(g, ("spectral", "frobenius")), relative=pick(g, (True, False)))]


# ---- balls of inputs and embeddings: everything in float64, (N, …), radii (N,)


def across(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def allowed(threat: Threat, like: Tensor) -> Tensor:
    """1 where the threat may change a number, 0 elsewhere."""
    mask = torch.ones_like(like[:1])
    if isinstance(threat, EmbeddingBall):
        mask.zero_()[:, threat.positions(like.shape[1])] = 1
    return mask


def measure(threat: Threat, delta: Tensor) -> Tensor:
    if isinstance(threat, EmbeddingBall) and not threat.joint:
        return torch.linalg.vector_norm(delta, dim=-1).amax(-1)
    order = {"l1": 1.0, "linf": torch.inf}.get(threat.norm, 2.0)
    return torch.linalg.vector_norm(delta.flatten(1), ord=order, dim=-1)


def steepest(threat: Threat, grad: Tensor) -> Tensor:
    """The change of norm 1 with the largest inner product with the gradient."""
    grad = grad * allowed(threat, grad)
    if threat.norm == "linf":
        return grad.sign()
    if threat.norm == "l1":
        flat = grad.flatten(1)
        top = flat.abs().argmax(-1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign()).view_as(grad)
    if isinstance(threat, EmbeddingBall) and not threat.joint:
        return grad / grad.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    return grad / across(measure(threat, grad).clamp_min(1e-300), grad)


def scaled(threat: Threat, delta: Tensor, radius: Tensor) -> Tensor:
    """delta scaled to the norm `radius`."""
    return delta * across(radius / measure(threat, delta).clamp_min(1e-300), delta)


def inward(point: Tensor, clean: Tensor) -> Tensor:
    """The neighbour of `point` in the direction of `clean`, in any dtype."""
    if point.dtype in (torch.float32, torch.float64):
        return torch.nextafter(point, clean)
    bits = point.view(torch.int16)
    away_from_zero = torch.where(point >= 0, clean > point, clean < point)
    moved = torch.where(away_from_zero, bits + 1, bits - 1).view(point.dtype)
    return torch.where(point == clean, point, torch.where(point == 0, clean.sign() * torch.finfo(point.dtype).smallest_normal, moved))


def into_ball(threat: Threat, clean: Tensor, delta: Tensor, radius: Tensor, toward: bool) -> Tensor:
    """A point in the model's dtype within the ball: rounded to nearest if that is inside, else (or for `toward`) toward the clean point."""
    base = clean.double()
    nearest = (base + delta).to(clean.dtype)
    inner = torch.where((nearest.double() - base).abs() > delta.abs(), inward(nearest, clean), nearest)
    point = inner if toward else torch.where(across(measure(threat, nearest.double() - base) <= radius, clean), nearest, inner)
    return torch.where(across(measure(threat, point.double() - base) <= radius, clean), point, clean)


def exactly_inside(threat: Threat, clean: Tensor, point: Tensor, radius: float) -> bool:
    """Whether the distance of one sample's stored point is at most the radius, in fractions."""
    pairs = zip(*(t.double().view(-1, t.shape[-1]).tolist() for t in (clean, point)), strict=True)
    rows = [[Fraction(b) - Fraction(a) for a, b in zip(p, q, strict=True)] for p, q in pairs]
    flat, r = [v for row in rows for v in row], Fraction(radius)
    if threat.norm == "linf":
        return max(map(abs, flat)) <= r
    if threat.norm == "l1":
        return sum(map(abs, flat)) <= r
    if isinstance(threat, EmbeddingBall) and not threat.joint:
        return all(sum(v * v for v in row) <= r * r for row in rows)
    return sum(v * v for v in flat) <= r * r


def worst_margin(logits: Tensor, y: Tensor) -> Tensor:
    rivals = logits.scatter(1, y[:, None], -torch.inf)
    return rivals.amax(1) - logits.gather(1, y[:, None])[:, 0]


class Finding(Exception):
    """A violation, with everything that is needed to reproduce it."""


def attack_points(model: Chain, exact: Chain, clean: Tensor, y: Tensor, radius: Tensor, threat: Threat, g: Draw) -> int:
    """Perturbs inputs or embeddings of samples that all have a radius. Returns the number of perturbations; raises Finding."""
    inside = isinstance(threat, EmbeddingBall)
    run, run_exact = (m.scores_from_embeddings if inside else m.scores for m in (model, exact))
    base = clean.double()
    edge = radius * (1 - 1e-12)
    mask = allowed(threat, base)

    def gradient(delta: Tensor) -> Tensor:
        point = (base + delta).requires_grad_()
        with torch.enable_grad():
            return torch.nan_to_num(torch.autograd.grad(worst_margin(run_exact(point), y).sum(), point)[0])

    def noise() -> Tensor:
        return torch.randn(base.shape, generator=g, dtype=torch.float64) * mask

    deltas = [scaled(threat, steepest(threat, gradient(0 * base)), edge)]
    step = scaled(threat, noise(), edge / 2)
    for _ in range(3):
        step = step + across(edge, base) * steepest(threat, gradient(step)) * 0.7
        size = measure(threat, step)
        step = step * across((edge / size.clamp_min(1e-300)).clamp_max(1.0), step)
    deltas.append(scaled(threat, step, edge))
    deltas.append(scaled(threat, deltas[1] + 0.2 * scaled(threat, noise(), edge), edge))
    deltas.append(scaled(threat, noise(), edge))
    deltas.append(scaled(threat, noise(), edge * torch.rand(edge.shape, generator=g, dtype=torch.float64)))
    deltas.append(across(edge, base) * steepest(threat, noise()))
    points = [into_ball(threat, clean, d, radius, False) for d in deltas] + [into_ball(threat, clean, d, radius, True) for d in deltas[:2]]
    # Points that differ from the best ones in single roundings.
    for d in deltas[:2]:
        points.append(into_ball(threat, clean, d * (1 + 0.1 * (torch.rand(base.shape, generator=g, dtype=torch.float64) - 1)), radius, False))
    with torch.no_grad():
        for point in points:
            flipped = (run(point).argmax(-1) != y).nonzero()[:, 0].tolist()
            for i in flipped:
                if exactly_inside(threat, clean[i], point[i], float(radius[i])):
                    raise Finding(f"sample {i}, radius {float(radius[i])!r}, label {int(y[i])}\nclean {clean[i].tolist()}\npoint {point[i].tolist()}")
    return len(points) * len(clean)


def attack_weights(
    model: Chain, exact: Chain, x: Tensor, y: Tensor, radius: Tensor, threat: WeightBall, flips: list[int] | None = None
) -> int:
    """Perturbs the weights for groups of samples of nearly equal radius, by the smallest radius of each group.

    flips: collects the numbers of samples whose prediction changes; without it the first raises Finding.
    """
    skip = {f"{n}.positions" for n, m in model.named_modules() if isinstance(m, AddPositions)}
    skip |= {n for n, _ in model.named_parameters() if n.endswith("distance_bias")}
    stored = {n: p.detach() for n, p in model.named_parameters() if p.dim() in (2, 4) and n not in skip}
    weights = {n: p.double() for n, p in stored.items()}
    sigma = {n: float(torch.linalg.matrix_norm(w.flatten(1), 2)) * (1 - 1e-12) if threat.relative else 1.0 for n, w in weights.items()}
    order = radius.argsort()
    judged = 0
    for rows in order.chunk(max(1, len(order) // 16)):
        limit, xs, ys = float(radius[rows[0]]), x[rows], y[rows]
        inputs = xs.double() if xs.is_floating_point() else xs
        loose = {n: w.clone().requires_grad_() for n, w in weights.items()}
        with torch.enable_grad():
            violation = worst_margin(exact.decide(torch.func.functional_call(exact, loose, (inputs,))), ys)
            grads = torch.autograd.grad((violation / violation.detach().abs().clamp_min(1e-300)).sum(), list(loose.values()), allow_unused=True)
        for fraction in (1.0, 0.9):
            changed = {}
            for (name, w), grad in zip(weights.items(), grads, strict=True):
                flat = torch.zeros_like(w.flatten(1)) if grad is None else torch.nan_to_num(grad.flatten(1))
                if threat.norm == "spectral":
                    u, s, vh = torch.linalg.svd(flat, full_matrices=False)
                    unit = (u * (s > 1e-9 * s[0])) @ vh
                else:
                    unit = flat / flat.norm().clamp_min(1e-300)
                budget, size = limit * sigma[name], limit * sigma[name] * fraction * (1 - 1e-12)
                changed[name] = stored[name]
                for _ in range(4):
                    moved = (w + size * unit.view_as(w)).to(stored[name].dtype)
                    change = (moved.double() - w).flatten(1)
                    length = float(spectral_norm_bound(change) if threat.norm == "spectral" else change.norm() * (1 + 1e-12))
                    if length <= budget:
                        changed[name] = moved
                        break
                    size *= 0.999 * budget / length if math.isfinite(length) else 0.0
            with torch.no_grad():
                found = model.decide(torch.func.functional_call(model, changed, (xs,))).argmax(-1)
            judged += len(rows)
            bad = (found != ys).nonzero()[:, 0].tolist()
            if bad and flips is not None:
                flips += rows[bad].tolist()
            elif bad:
                answers = f"labels {ys[bad].tolist()}, answers {found[bad].tolist()}"
                raise Finding(f"samples {rows[bad].tolist()}, radius {limit!r}, {answers}, at {fraction} of the radius")
    return judged


# ---- units


def favour_one_class(model: Chain, x: Tensor, g: Draw) -> None:
    """In half precision most margins are smaller than the rounding error: half of the models get a last bias that favours one class."""
    head = model[len(model) - 1]
    if head.bias is not None and number(g, 0, 1) < 0.6:
        with torch.no_grad():
            head.bias[pick(g, range(len(head.bias)))] += model.scores(x).abs().amax() * pick(g, (0.5, 2.0, 8.0))


def attack_unit(seed: int, unit: int, counts: dict[str, dict[str, Any]], families: tuple[str, ...] = FAMILIES) -> int:
    """Runs one unit, adds to the counts, and returns how many samples were attacked. Raises Finding."""
    family, dtype = families[unit % len(families)], DTYPES[unit // len(families) % len(DTYPES)]
    g = torch.Generator().manual_seed(seed * 1_000_003 + unit)
    torch.manual_seed(seed * 1_000_003 + unit)
    model, x = BUILD[family](g)
    model.eval()
    if dtype in (torch.float16, torch.bfloat16) and family != "zoo":
        favour_one_class(model, x, g)
    model = model.to(dtype).requires_grad_(False)
    x = x.to(dtype) if x.is_floating_point() else x
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        logits = model.scores(x)
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        return 0
    y = logits.argmax(-1)
    attacked = 0
    for threat in threats_for(model, x, g):
        start = time.perf_counter()
        xs, ys = (x[:256], y[:256]) if isinstance(threat, WeightBall) else (x, y)
        radius = torch.from_numpy(certify(model, xs, ys, threat, "global").radius)
        # A radius too large for the dtype would only overflow.
        certified = (radius > 0) & (radius < float(torch.finfo(dtype).max) / 4)
        rows = certified.nonzero()[:, 0]
        judged = 0
        try:
            if len(rows) and isinstance(threat, WeightBall):
                judged = attack_weights(model, exact, xs[rows], ys[rows], radius[rows], threat)
            elif len(rows):
                with torch.no_grad():
                    clean = model.embed(xs[rows]) if isinstance(threat, EmbeddingBall) else xs[rows]
                judged = attack_points(model, exact, clean, ys[rows], radius[rows], threat, g)
        except Finding as finding:
            raise Finding(f"VIOLATION: unit {unit}, seed {seed}, {family}, {dtype}, {threat}\n{model}\n{finding}") from None
        name = replace(threat, tokens=None).name + "@named" if isinstance(threat, EmbeddingBall) and threat.tokens else threat.name
        key = f"{family} | {name} | {str(dtype).removeprefix('torch.')}"
        cell = counts.setdefault(key, {"samples": 0, "perturbations": 0, "abstained": 0, "seconds": 0.0})
        cell["samples"] += len(rows)
        cell["perturbations"] += judged
        cell["abstained"] += len(xs) - len(rows)
        cell["seconds"] = round(cell["seconds"] + time.perf_counter() - start, 3)
        attacked += len(rows)
    return attacked


def table(counts: dict[str, dict[str, Any]]) -> str:
    """Attacked samples by family and threat, one column per dtype (Markdown)."""
    names = [str(d).removeprefix("torch.") for d in DTYPES]
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for key, cell in counts.items():
        family, threat, dtype = key.split(" | ")
        rows.setdefault((family, threat), {})[dtype] = cell["samples"]
    ordered = sorted(rows.items(), key=lambda item: ((FAMILIES + MORE).index(item[0][0]), item[0][1]))
    lines = [f"| model | threat | {' | '.join(names)} |", f"|---|---|{'---:|' * len(names)}"]
    lines += [f"| {family} | {threat} | {' | '.join(f'{cells.get(n, 0):,}' for n in names)} |" for (family, threat), cells in ordered]
    sums = [sum(cells.get(n, 0) for _, cells in ordered) for n in names]
    return "\n".join([*lines, f"| all | | {' | '.join(f'{s:,}' for s in sums)} |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000, help="attacked samples to reach")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--unit", type=int)
    parser.add_argument(
        "--families", help=f"among {', '.join(FAMILIES + MORE)} (with --methods: those of violation_methods.py); units are numbered over those named"
    )
    parser.add_argument("--methods", help="'all' or names of certifiers, by commas: search each of them; needs --minutes or --unit")
    args = parser.parse_args()
    if args.methods:
        from violation_methods import search

        torch.set_num_threads(1)
        return search(args.methods, args.seed, args.minutes, args.unit, args.state, args.json, parser.error, args.families)
    families = FAMILIES if args.families is None else tuple(args.families.split(","))
    if not set(families) <= set(BUILD):
        parser.error(f"expected families among {', '.join(BUILD)}, got {args.families}")
    torch.set_num_threads(1)
    state: dict[str, Any] = {"seed": args.seed, "rules": RULES_VERSION, "next": 0, "samples": 0, "seconds": 0.0, "counts": {}}
    if args.state and args.state.exists():
        state = json.loads(args.state.read_text(encoding="utf-8"))
        if (state["seed"], state["rules"]) != (args.seed, RULES_VERSION):
            parser.error(f"expected a state of seed {args.seed} and rules {RULES_VERSION}, got {state['seed']}, {state['rules']}; name another file")
    before, start = state["seconds"], time.monotonic()
    violation = ""
    try:
        if args.unit is not None:
            state["samples"] += attack_unit(args.seed, args.unit, state["counts"], families)
        while args.unit is None and state["samples"] < args.samples and time.monotonic() - start < 60 * args.minutes:
            state["samples"] += attack_unit(args.seed, state["next"], state["counts"], families)
            state["next"] += 1
            state["seconds"] = round(before + time.monotonic() - start, 1)
            if args.state:
                scratch = args.state.with_suffix(".tmp")
                scratch.write_text(json.dumps(state), encoding="utf-8")
                os.replace(scratch, args.state)
            if state["next"] % 50 == 0:
                print(f"{state['next']} units, {state['samples']:,} samples, {state['seconds']:.0f} s", file=sys.stderr, flush=True)
    except Finding as finding:
        violation = str(finding)
    state["seconds"] = round(before + time.monotonic() - start, 1)
    result = {
        "command": f"python benchmarks/violations.py --samples {args.samples} --seed {args.seed}"
        + ("" if families == FAMILIES else f" --families {args.families}"),
        "attacked_samples": state["samples"],
        "perturbations": sum(cell["perturbations"] for cell in state["counts"].values()),
        "abstained": sum(cell["abstained"] for cell in state["counts"].values()),
        "violations": int(bool(violation)),
        "violation": violation,
        "units": state["next"],
        "seconds": state["seconds"],
        "versions": {"robustlip": __version__, "rules": RULES_VERSION, "torch": torch.__version__, "python": platform.python_version()},
        "counts": state["counts"],
    }
    print(table(state["counts"]))
    print("\n".join(f"{key}: {value}" for key, value in result.items() if key not in ("counts", "violation")))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if violation:
        print(violation)
        return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
