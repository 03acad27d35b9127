"""Every next-token prediction of a sequence certified in one go: T positions from one clean pass. MATH.md section 7.

Position t predicts token t + 1 from tokens 0 … t; a causal model computes all of these at once, and its clean activations serve all of them.
The threat is of one token, the last of each prefix: T networks of single tokens, as in certifiers.dual without the exact Jacobians (they buy a few
percent here and cost more than all else). All tokens of a prefix need an adjoint for every position and token; certify() does them window by window.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from robustlip.certifiers.constants import constants_of
from robustlip.certifiers.dual import alone, at_positions, dual_applies
from robustlip.certifiers.local import double_copy, reference_of
from robustlip.certifiers.samples import check_arithmetic, check_entry, check_labels, check_model, evaluated, head_of, margins, train_mode_reason
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Attention, Chain, as_chain
from robustlip.rounding import norm_up
from robustlip.rules import Context
from robustlip.threats import EmbeddingBall


@torch.no_grad()
def sequence_radii(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(radius (T − 1,) float64, prediction (T − 1,)) of the predictions of tokens[1:] from tokens (T,), as executed in the model's dtype.

    The threat is EmbeddingBall(tokens=(-1,)) of each prefix. A radius is 0 where the prediction is not the next token or nothing is proved.
    Raises BadInput or UnsupportedLayer.
    """
    chain = as_chain(model)
    dtype = check_model(chain)
    if chain.task != "next-token" or not all(m.causal for m in chain.modules() if isinstance(m, Attention)):
        raise UnsupportedLayer("expected a causal next-token model, got another; certify its samples one by one")
    if tokens.dim() != 1 or len(tokens) < 2:
        raise BadInput(f"expected token ids of shape (T,), T >= 2, got {tuple(tokens.shape)}; pass one sequence")
    threat = EmbeddingBall(tokens=(-1,))
    if reason := train_mode_reason(chain) or dual_applies(chain, threat):
        raise UnsupportedLayer(f"expected a model that the method covers, got one where {reason}; mend that first")
    if head_of(chain) is None:
        raise UnsupportedLayer(f"expected a Linear layer at the end, got {type(chain[len(chain) - 1]).__name__}; certify() covers such models")
    check_entry(chain, tokens[None], threat)
    check_arithmetic(chain, dtype)
    device = next(chain.parameters()).device
    x, y = tokens[None, :-1].to(device), tokens[1:].to(device).long()
    with evaluated(chain):
        _, store = constants_of(chain)
        context = Context(dtype=dtype, store=store)
        logits = chain(x)[0]
        check_labels(y, logits.shape[-1])
        right = (logits.argmax(-1) == y) & torch.isfinite(logits).all(-1)
        radius = torch.zeros(len(y), dtype=torch.float64, device=device)
        at = right.nonzero()[:, 0]
        if len(at):
            radius[at] = _one_token(chain, x, y[at], at, context)
    return radius.cpu(), logits.argmax(-1).cpu()


def _one_token(chain: Chain, x: Tensor, y: Tensor, at: Tensor, context: Context) -> Tensor:
    """Radii of the positions `at` (M,) of one sequence (1, T), labels y (M,)."""
    whole = reference_of(chain, x, y[:1], EmbeddingBall(), context)
    single = at_positions(whole, torch.zeros_like(at), at, jacobians=False)
    hidden = whole.body.clean[0, at]
    head = head_of(double_copy(chain, context))
    assert head is not None
    single = replace(single, margin=margins(head(hidden), y), hidden_norm=norm_up(hidden))
    return torch.where((single.margin > 0).all(-1), alone(single, y), 0.0)
