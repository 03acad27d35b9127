"""Bounds that hold for a whole model: its Lipschitz constant, and the change of its logits under a change of its weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustlip.certifiers.chains import chain_of, check_weights_of
from robustlip.certifiers.constants import constants_of
from robustlip.certifiers.samples import batches, check_entry, check_model, device_type
from robustlip.domains.norms import Context, State, run_rules
from robustlip.domains.norms.bound import first_state, layers_after_threat
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.execution import proving
from robustlip.layers import Attention, Chain, Patchify, Scale, Shift, as_chain
from robustlip.modes import evaluated
from robustlip.numerics.rounding import norm_up, up
from robustlip.samples import as_samples
from robustlip.threats import WeightBall


@torch.no_grad()
def lipschitz_bound(model: nn.Module) -> dict[str, float | str]:
    """A guaranteed Lipschitz constant of the logits: with respect to the input in ℓ2, or to the embeddings in the largest token norm.

    Returns a dictionary. 'l2': ‖f(x') − f(x)‖₂ ≤ l2·‖x' − x‖₂ (for transformers per output token, with max_t‖x'_t − x_t‖₂ on the right).
    'rms': the same constant in RMS units (∞-RMS of the input, RMS of the output). 'domain': the largest token norm ‖x_t‖₂ for which the constant
    holds, or 'all'. For a threat of radius ε a certificate uses the domain enlarged by ε, so its own constant is slightly larger.
    Raises BadInput or UnsupportedLayer. Source: docs/theory.md, section 3.
    """
    chain = as_chain(model)
    dtype = check_model(chain)
    with proving(device_type(chain)):
        return bound_of_chain(chain, Context(dtype=dtype, store=constants_of(chain)[1]))


def bound_of_chain(chain: Chain, context: Context) -> dict[str, float | str]:
    # The constant is that of exact arithmetic. float64 keeps the norms finite where float16 would overflow.
    context = replace(context, dtype=torch.float64)
    embedding, layers = list(chain)[: chain.embedding_depth], list(chain)[chain.embedding_depth :]
    if embedding:
        norm, width = _embedding_norm(embedding, context)
    else:
        norm, width = torch.ones(1, dtype=torch.float64), _first_linear(layers).in_features
    # Output change per unit of a very small input change: some rules saturate for large changes and would underestimate the constant of near pairs.
    step = torch.full((1,), 1e-100, dtype=torch.float64)
    state = State(norm, step, torch.zeros(1, dtype=torch.float64), "l2", _tokens_of(layers) if embedding else 1, width)
    if not embedding and type(layers[0]) is nn.Flatten:
        layers = layers[1:]  # the input is bounded as one vector already
    if any(type(m) in (nn.Flatten, Patchify) for layer in layers for m in layer.modules()):
        raise BadInput("expected a model whose bound does not depend on the number of tokens, got one that flattens them; certify samples instead")
    start, state = state, run_rules(layers, state, context)
    # NaN compares false: a bound that overflows for large inputs also depends on their size.
    if not embedding and not bool(run_rules(layers, replace(start, norm=start.norm * 1e6), context).change <= state.change):
        raise BadInput("expected a model whose bound holds for all inputs, got one whose bound grows with their size (attention); certify samples")
    # NaN means that an intermediate bound overflowed: no bound.
    value = float(up(state.change / step).nan_to_num(torch.inf, torch.inf))
    return {"l2": value, "rms": value * math.sqrt(width / state.width) * (1 + 1e-15), "domain": float(norm) if embedding else "all"}


def _first_linear(layers: list[nn.Module]) -> nn.Linear:
    found = next((m for layer in layers for m in layer.modules() if type(m) is nn.Linear), None)
    if found is None:
        raise BadInput("expected a model with at least one Linear layer, got none; there is nothing to bound")
    return found


def _tokens_of(layers: list[nn.Module]) -> int:
    """The number of tokens that tables of positions, masks or angles of a capture fix; 1 where any number has the same bound."""
    for part in (m for layer in layers for m in layer.modules()):
        if isinstance(part, Shift | Scale) and part.value.dim() > 1 and part.value.shape[-2] > 1:
            return int(part.value.shape[-2])
        if isinstance(part, Attention) and part.mask is not None:
            return int(part.mask.shape[-1])
        if isinstance(part, Attention) and part.cos is not None:
            return len(part.cos)
    return 1


def _embedding_norm(embedding: list[nn.Module], context: Context) -> tuple[Tensor, int]:
    """(largest ‖x_t‖₂ of any embedded token (1,), width). Tokens are rows of a table, or patches of n pixels in [0, 1], whose norm is at most √n."""
    if isinstance(embedding[0], nn.Embedding):
        return norm_up(embedding[0].weight.detach()).amax().cpu().reshape(1), embedding[0].embedding_dim
    if type(embedding[0]) is not Patchify:
        raise UnsupportedLayer(f"expected an embedding that begins with Embedding or Patchify, got {type(embedding[0]).__name__}; certify samples")
    linear = _first_linear(embedding)
    zero = torch.zeros(1, dtype=torch.float64)
    start = State(zero + math.sqrt(linear.in_features) * (1 + 1e-15), zero, zero, "l2", 1, linear.in_features)
    return run_rules(embedding[1:], start, context).norm, linear.out_features


@torch.no_grad()
def weight_sensitivity_bound(model: nn.Module, x: Any, threat: WeightBall, batch_size: int = 256) -> np.ndarray:
    """Upper bounds (N,) of ‖f_{W+E}(x) − f_W(x)‖₂ over all E in the weight ball, in exact arithmetic; f are the logits of the prediction.

    x: in any form that `robustlip.samples` accepts; inputs are rounded to the dtype of the weights, and the bound holds at the rounded input.
    threat.radius must be set. A Frobenius ball lies inside the spectral ball of the same radius, so the same bound holds for both.
    Raises BadInput or UnsupportedLayer. Source: docs/theory.md, section 3.
    """
    if not isinstance(threat, WeightBall) or threat.radius is None:
        got = "none" if isinstance(threat, WeightBall) else f"{threat!r}"
        raise BadInput(f"expected a weight threat with a radius, got {got}; give one, e.g. WeightBall('spectral', 0.01)")
    x = as_samples(x)[0]
    chain, source = chain_of(model, x)
    if source is not None:
        check_weights_of(chain, model)
    dtype = check_model(chain)
    check_entry(chain, x, threat)
    device = next(chain.parameters()).device
    out = []
    with proving(device.type), evaluated(chain):
        _, store = constants_of(chain)
        for part in batches(len(x), batch_size):
            xb = x[part].to(device, copy=True)
            layers, inside, norm = layers_after_threat(chain, xb.to(dtype) if xb.is_floating_point() else xb, threat)
            radius = torch.full_like(norm, threat.radius)
            context = Context(dtype=dtype, store=store, weight_radius=radius, relative=threat.relative)
            state = run_rules(layers, first_state(inside, norm, threat, radius), context)
            # As in bound_of_chain, NaN means that an intermediate bound overflowed: no bound.
            out.append(up(state.change).nan_to_num(torch.inf, torch.inf))
    return torch.cat(out).numpy()
