"""Runs an audit: starting points, search, result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.attacks import formulas
from robustlip.attacks.audit.measure import map_of
from robustlip.attacks.audit.result import Audit
from robustlip.attacks.audit.search import Steps, find_pair, unit_tokens
from robustlip.attacks.audit.worst import worst_layers
from robustlip.attacks.formulas import Claim
from robustlip.errors import BadInput
from robustlip.hashing import architecture_sha256, weights_sha256
from robustlip.layers import Chain, as_chain
from robustlip.samples import as_samples

MOST_STARTS = 2**20  # per batch


def audit(
    model: nn.Module,
    claim: Claim,
    x: Any = None,
    *,
    starts: int = 32,
    tokens: int = 8,
    power_steps: int = 20,
    ascent_steps: int = 60,
    box: tuple[float, float] | None = None,
    worst_weights: bool = False,
    seed: int = 0,
    advance: Callable[[str, int, int], None] | None = None,
) -> Audit:
    """Searches for two inputs in the claim's domain whose outputs are further apart than the claim allows.

    claim: from `robustlip.attacks.formulas`. x: raw inputs (N, …), in the forms of `robustlip.samples`, as additional starting points; without it
    sequences have `tokens` tokens.
    starts: number of starting points, searched in one batch. power_steps: steps of the iteration v ← steepest(Jᵀ steepest(J v)) by forward and
    reverse products. ascent_steps: steps of gradient ascent on the input, first of the Jacobian's norm and then of the finite difference.
    box: (low, high) for every coordinate of models without an embedding; None allows all inputs, as claims without a domain do.
    worst_weights: also test the formula on adversarial weights of the same shapes and norms, layer by layer.
    advance(what, done, total) reports progress. The model is copied. Raises BadInput.
    """
    began = time.perf_counter()
    if starts < 1 or tokens < 1 or power_steps < 1 or ascent_steps < 0:
        given = (starts, tokens, power_steps, ascent_steps)
        raise BadInput(f"expected starts, tokens and power_steps of at least 1 and ascent_steps of at least 0, got {given}; raise them")
    if starts > MOST_STARTS or not 0 <= seed < 2**63:
        raise BadInput(f"expected at most {MOST_STARTS} starts and a seed from 0 to 2^63 - 1, got {starts} and {seed}; choose others")
    x = None if x is None else as_samples(x)[0]
    chain = as_chain(model)
    if box is not None and (chain.embedding_depth or not box[0] < box[1]):
        raise BadInput(f"expected box=(low, high) with low < high and a model without an embedding, got {box}; leave it out")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        points, shape, size = _starts(chain, x, claim.domain, box, starts, tokens, generator)
    f = map_of(chain, claim.domain, shape, box)
    try:
        with torch.no_grad():
            f(f.project(points[:1]))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"expected inputs of the shape that the model takes, got {shape} ({reason}); give samples (--data)") from None
    steps = Steps(power_steps, ascent_steps, advance or (lambda what, done, total: None))
    a, b, found, change, distance, rounding, kind = find_pair(f, points, size, steps, generator)
    tokens_in = chain.embedding_depth > 0
    result = Audit(
        formula=claim.formula, claimed=claim.value, found=found * claim.unit(), units=claim.units, domain=claim.domain,
        space="embedding" if tokens_in else "input",
        x=a if tokens_in else a.reshape(shape), x_prime=b if tokens_in else b.reshape(shape),
        distance=distance, change=change, rounding=rounding, rounding_kind=kind, starts=len(points), seed=seed,
        weights_sha256=weights_sha256(chain), architecture_sha256=architecture_sha256(chain), layers=claim.layers,
    )  # fmt: skip
    if worst_weights:
        result = replace(result, worst=worst_layers(chain, claim, seed, steps))
    if result.violated:
        result = replace(result, why=formulas.explain(chain, claim))
    return replace(result, seconds=time.perf_counter() - began)


def _input_shape(chain: Chain, x: Tensor | None) -> tuple[int, ...]:
    if x is not None:
        return tuple(x.shape[1:])
    first = next((m for m in chain.modules() if type(m) is nn.Linear), None)
    if first is None:
        raise BadInput("expected a model with a Linear layer or samples x, got neither; give samples, which show the shape of an input")
    return (first.in_features,)


def _starts(
    chain: Chain, x: Tensor | None, domain: float | None, box: tuple[float, float] | None, starts: int, tokens: int, generator: torch.Generator
) -> tuple[Tensor, tuple[int, ...], float]:
    """(starting points (S, T, D) float64, shape of one input, size of an input). Half come from the model's own inputs, half are random."""
    device = next(chain.parameters()).device

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    if chain.embedding_depth:
        width = formulas.widths(chain)[0]
        first = chain[0]
        own: Tensor | None = None
        if x is not None:
            chain.check_inputs(x)
            own = chain.embed(x.to(device)).detach().double()
        elif isinstance(first, nn.Embedding):
            ids = torch.randint(first.num_embeddings, (starts, tokens), generator=generator)
            ids[0] = torch.arange(tokens) % first.num_embeddings
            own = first.weight.detach().double()[ids.to(device)]
        length = tokens if own is None else own.shape[1]
        size = domain if domain is not None else math.sqrt(width) if own is None else float(own.norm(dim=-1).max())
        random = unit_tokens(noise(starts, length, width)) * size
        random[1::3] *= 0.3
        points = random if own is None else torch.cat([own[: (starts + 1) // 2], random])[: max(starts, 1)]
        return points, (length, width), size
    shape = _input_shape(chain, x)
    numbers = math.prod(shape)
    if box is not None:
        points = box[0] + (box[1] - box[0]) * torch.rand(starts, numbers, generator=generator, dtype=torch.float64).to(device)
        points[1::2] = (points[1::2] - (box[0] + box[1]) / 2) * 0.2 + (box[0] + box[1]) / 2
        size = (box[1] - box[0]) * math.sqrt(numbers) / 2
    else:
        points = noise(starts, numbers)
        points[1::3] *= 0.1
        points[2::3] *= 10.0
        size = math.sqrt(numbers)
    if x is not None:
        chain.check_inputs(x)
        points = torch.cat([x.to(device).double().flatten(1)[: (starts + 1) // 2], points])[:starts]
    return points[:, None], shape, size
