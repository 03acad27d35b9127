"""The layers of a model, each with adversarial weights of the same norms."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.attacks import formulas
from robustlip.attacks.audit.measure import Map
from robustlip.attacks.audit.result import WorstLayer
from robustlip.attacks.audit.search import Steps, find_pair
from robustlip.attacks.formulas import Claim
from robustlip.attacks.worst_weights import worst_attention_like, worst_mlp
from robustlip.errors import BadInput
from robustlip.layers import Attention, Chain, as_chain


def worst_layers(chain: Chain, claim: Claim, seed: int, steps: Steps) -> tuple[WorstLayer, ...]:
    """Every distinct attention and MLP layer of a transformer, or a whole MLP, with its worst weights."""
    if claim.formula not in formulas.FORMULAS:
        raise BadInput("expected a formula with --worst-weights, got a number, which holds for these weights only; give --formula")
    out: list[WorstLayer] = []
    if chain.embedding_depth == 0:
        module, x = worst_mlp(chain)
        model = as_chain(module)
        bound = formulas.claim_of(model, claim.formula).in_units(claim.units)
        out.append(_worst_layer("model", "mlp", "every matrix's spectral norm", model, bound, x[None, None], x.shape[0], seed, steps))
        return tuple(out)
    seen: set[tuple[Any, ...]] = set()
    for name, layer, domain in formulas.norms_in_front(chain, claim.formula):
        # Layers of the same shape with the same norms have the same worst weights.
        key = (repr(layer), *(round(float(torch.linalg.matrix_norm(p.detach().double(), 2)), 3) for p in layer.parameters() if p.dim() == 2))
        if key in seen:
            continue
        seen.add(key)
        steps.advance(f"worst weights of {name}", 0, 1)
        if isinstance(layer, Attention):
            for per_head in (False, True) if claim.formula == "ours" else (False,):
                found = worst_attention_like(layer, domain=domain, per_head=per_head, tokens=max(3, min(layer.heads, 8)), seed=seed)
                kept = "every head's spectral norm" if per_head else "every matrix's spectral norm"
                bound = formulas.layer_claim(found.layer, claim.formula, domain)
                module = nn.Sequential(found.layer)
                out.append(
                    _worst_layer(name, "attention", kept, module, bound, found.x, found.x.shape[1:], seed, steps, found.direction)
                )
        else:
            assert isinstance(layer, nn.Sequential)
            module, x = worst_mlp(layer, domain)
            bound = formulas.layer_claim(module, claim.formula, domain)
            out.append(
                _worst_layer(name, "mlp", "every matrix's spectral norm", module, bound, x[None, None], (1, len(x)), seed, steps)
            )
    if not out:
        raise BadInput("expected attention or MLP layers in the paper's form for --worst-weights, got none; audit the weights as they are")
    return tuple(out)


def _worst_layer(
    name: str, part: str, kept: str, module: nn.Sequential, bound: Claim, x: Tensor, shape: Any, seed: int, steps: Steps,
    direction: Tensor | None = None,
) -> WorstLayer:  # fmt: skip
    tokens = isinstance(shape, (tuple, torch.Size))
    f = Map(copy.deepcopy(module), tuple(shape) if tokens else (shape,), tokens=tokens, domain=bound.domain)
    generator = torch.Generator().manual_seed(seed)
    size = bound.domain if bound.domain is not None else 1.0
    if direction is None:
        direction = torch.zeros_like(x)
        direction[..., 0] = 1.0
    a, b, found, *_ = find_pair(f, x.double(), size, replace(steps, ascent=min(steps.ascent, 20)), generator, direction)
    return WorstLayer(bound.formula, name, part, kept, bound.value, found * bound.unit(), bound.units, bound.domain, tokens, module, a, b)
