"""Every next-token prediction of a sequence certified in one go: T positions from one clean pass. docs/theory.md, sections 7 and 8.

Position t predicts token t + 1 from tokens 0 … t; a causal model computes all of these at once, and its clean activations serve all of them.
Two threats of each prefix have proofs that positions can share:

- its last token (EmbeddingBall(tokens=(-1,))), by method 'dual': T networks of single tokens, as in certifiers.dual but without the exact Jacobians
  and the quadratic forms (they cost more than all else);
- all of its tokens, each or jointly (EmbeddingBall()), by method 'local': tokens behind t do not reach t, so one propagation of a radius ε through
  the whole sequence bounds what every position sees, and all positions try the same radii.

The dual method for all tokens needs an adjoint for every position, rival and token: certify() does that window by window, and proves more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from robustlip.certifiers.constants import constants_of
from robustlip.certifiers.samples import check_arithmetic, check_entry, check_labels, check_model, train_mode_reason
from robustlip.domains.expansion import Ball
from robustlip.domains.expansion.dual import alone, at_positions, dual_applies, is_causal
from robustlip.domains.expansion.local import Reference, distances_of, double_copy, reference_of
from robustlip.domains.margins import head_of, margins
from robustlip.domains.norms import Context
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.execution import proving
from robustlip.layers import as_chain
from robustlip.modes import evaluated
from robustlip.numerics.rounding import norm_up, up
from robustlip.threats import EmbeddingBall

LAST = EmbeddingBall(tokens=(-1,))
# Radii that all positions try: halvings of the largest token's norm first, then between the best of each and the next.
HALVINGS, STEPS_BETWEEN = 24, 6
# Radii propagated at once: (…, H, T, T) numbers each.
_AT_ONCE = 4


@torch.no_grad()
def sequence_radii(model: nn.Module, tokens: Tensor, threat: EmbeddingBall = LAST) -> tuple[Tensor, Tensor]:
    """(radius (T − 1,) float64, prediction (T − 1,)) of the predictions of tokens[1:] from tokens (T,), as executed in the model's dtype.

    threat: of each prefix, its last token (the default) or all its tokens, in units of the embedding's ℓ2 norm. A radius is 0 where the
    prediction is not the next token or nothing is proved. Raises BadInput or UnsupportedLayer.
    """
    chain = as_chain(model)
    dtype = check_model(chain)
    if not is_causal(chain):
        raise UnsupportedLayer("expected a causal next-token model, got another; certify its samples one by one")
    if tokens.dim() != 1 or len(tokens) < 2:
        raise BadInput(f"expected token ids of shape (T,), T >= 2, got {tuple(tokens.shape)}; pass one sequence")
    if threat.tokens not in (None, (-1,)):
        raise BadInput(f"expected a threat of the last token or of all tokens, got {threat.name}; certify() takes others, window by window")
    if reason := train_mode_reason(chain) or dual_applies(chain, threat):
        raise UnsupportedLayer(f"expected a model that the method covers, got one where {reason}; mend that first")
    if head_of(chain) is None:
        raise UnsupportedLayer(f"expected a Linear layer at the end, got {type(chain[len(chain) - 1]).__name__}; certify() covers such models")
    check_entry(chain, tokens[None], threat)
    check_arithmetic(chain, dtype)
    device = next(chain.parameters()).device
    with proving(device.type), evaluated(chain):
        x, y = tokens[None, :-1].to(device, copy=True), tokens[1:].to(device).long()
        _, store = constants_of(chain)
        context = Context(dtype=dtype, store=store)
        logits = chain(x)[0]
        check_labels(y, logits.shape[-1])
        right = (logits.argmax(-1) == y) & torch.isfinite(logits).all(-1)
        radius = torch.zeros(len(y), dtype=torch.float64, device=device)
        at = right.nonzero()[:, 0]
        if len(at):
            whole = reference_of(chain, x, y[:1], EmbeddingBall(), context)
            hidden = whole.body.clean[0, at]
            head = head_of(double_copy(chain, context))
            assert head is not None
            margin = margins(head(hidden), y[at])
            prove = _last_token if threat.tokens else _every_token
            pairs = distances_of(chain, context).of(y[at]).to(device)
            found = prove(replace(whole, margin=margin, pairs=pairs, hidden_norm=norm_up(hidden)), y[at], at)
            radius[at] = torch.where((margin > 0).all(-1), found, 0.0)
    return radius.cpu(), logits.argmax(-1).cpu()


def _last_token(whole: Reference, y: Tensor, at: Tensor) -> Tensor:
    """Radii of the positions `at` (M,) of one sequence, labels y (M,); margin, pairs and hidden_norm of `whole` are theirs already."""
    one = replace(whole, margin=whole.margin[:1], pairs=whole.pairs[:1], hidden_norm=whole.hidden_norm[:1])

    def single(which: Tensor) -> Reference:
        part = at_positions(one, torch.zeros_like(which), at[which], jacobians=False)
        return replace(part, margin=whole.margin[which], pairs=whole.pairs[which], hidden_norm=whole.hidden_norm[which])

    return alone(single(torch.arange(len(at), device=at.device)), single, y, sharpen=False)


def _every_token(whole: Reference, y: Tensor, at: Tensor) -> Tensor:
    """As `_last_token`, for all tokens of each prefix: the largest of the tried radii at which every rival's margin outlasts what can be lost."""
    length = whole.start.shape[1]

    def held(epsilon: Tensor) -> Tensor:
        """(E,) → (E, M): which positions are proved at which radius."""
        first = epsilon[:, None, None].expand(-1, 1, length)
        radius = whole.body.advance(Ball.of(first), remainder=False).radius[:, 0, at]
        lost = up(whole.pairs * radius.unsqueeze(-1)) + 2 * whole.single(radius, epsilon[:, None]).unsqueeze(-1)
        return (lost < whole.margin).all(-1)

    best = torch.zeros(len(at), dtype=torch.float64, device=at.device)
    tried = norm_up(whole.start).amax() * 0.5 ** torch.arange(HALVINGS, dtype=torch.float64, device=at.device)
    between = 2 ** (torch.arange(1, STEPS_BETWEEN + 1, dtype=torch.float64, device=at.device) / (STEPS_BETWEEN + 1))
    for finer in (False, True):
        if finer:
            tried = (best[best > 0].unique()[:, None] * between).flatten()
        for start in range(0, len(tried), _AT_ONCE):  # none where no position has a radius
            part = tried[start : start + _AT_ONCE]
            best = torch.maximum(best, torch.where(held(part), part[:, None], 0.0).amax(0))
    return best
