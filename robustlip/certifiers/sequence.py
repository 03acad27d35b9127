"""Certified radii of all next-token predictions of a sequence, from one clean forward pass. docs/theory.md, sections 7 and 8.

Position t predicts token t + 1 from tokens 0 … t. A causal model computes all predictions in one pass, and all proofs use its clean activations.
Two threats to each prefix are supported:

- its last token (EmbeddingBall(tokens=(-1,))), by method 'dual': T networks of one token each, as in domains.expansion.dual, but without the exact
  Jacobians and the quadratic forms (they would take longer than all other steps);
- all of its tokens, each or jointly (EmbeddingBall()), by method 'local': tokens after t do not influence position t, so one propagation of a
  radius ε through the whole sequence bounds the change at every position. All positions try the same radii.

Method 'dual' for all tokens needs an adjoint for every position, rival class and token. certify() computes these for one window at a time, and proves
larger radii.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from robustlip.certifiers.constants import constants_of
from robustlip.certifiers.samples import check_arithmetic, check_entry, check_labels, check_model, train_mode_reason
from robustlip.domains.expansion import Ball
from robustlip.domains.expansion.dual import dual_why_not, is_causal, single_token_radii, single_token_reference
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
# Radii that all positions try: first the largest token norm halved again and again, then radii between each position's best and its double.
HALVINGS, STEPS_BETWEEN = 24, 6
# Radii propagated at once; each needs tensors of shape (…, H, T, T).
_RADII_AT_ONCE = 4


@torch.no_grad()
def sequence_radii(model: nn.Module, tokens: Tensor, threat: EmbeddingBall = LAST) -> tuple[Tensor, Tensor]:
    """(radius (T − 1,) float64, prediction (T − 1,)) of the predictions of tokens[1:] from tokens (T,), as executed in the model's dtype.

    threat: changes the last token of each prefix (the default) or all its tokens; radii are ℓ2 norms of the embedding's change. A radius is 0 where
    the prediction is not the next token or nothing is proved. Raises BadInput or UnsupportedLayer.
    """
    chain = as_chain(model)
    dtype = check_model(chain)
    if chain.task != "next-token" or not is_causal(chain):
        raise UnsupportedLayer("expected a causal next-token model, got another; certify its samples one by one")
    if tokens.dim() != 1 or len(tokens) < 2:
        raise BadInput(f"expected token ids of shape (T,), T >= 2, got {tuple(tokens.shape)}; pass one sequence")
    if threat.tokens not in (None, (-1,)):
        raise BadInput(f"expected a threat of the last token or of all tokens, got {threat.name}; certify() takes others, window by window")
    if reason := train_mode_reason(chain) or dual_why_not(chain, threat):
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
    """Radii (M,) of the positions `at` (M,) of one sequence, labels y (M,). margin, pairs and hidden_norm of `whole` are those of the positions."""
    one = replace(whole, margin=whole.margin[:1], pairs=whole.pairs[:1], hidden_norm=whole.hidden_norm[:1])

    def single(which: Tensor) -> Reference:
        part = single_token_reference(one, torch.zeros_like(which), at[which], jacobians=False)
        return replace(part, margin=whole.margin[which], pairs=whole.pairs[which], hidden_norm=whole.hidden_norm[which])

    return single_token_radii(single(torch.arange(len(at), device=at.device)), single, y, use_forms=False)


def _every_token(whole: Reference, y: Tensor, at: Tensor) -> Tensor:
    """As `_last_token`, for all tokens of each prefix: the largest tried radius at which every rival's margin exceeds the bound of its change."""
    length = whole.start.shape[1]

    def proved(epsilon: Tensor) -> Tensor:
        """(E,) → (E, M) bool: which positions are proved at which radius."""
        first = epsilon[:, None, None].expand(-1, 1, length)
        radius = whole.body.advance(Ball.of(first), remainder=False).radius[:, 0, at]
        change = up(whole.pairs * radius.unsqueeze(-1)) + 2 * whole.logit_error(radius, epsilon[:, None]).unsqueeze(-1)
        return (change < whole.margin).all(-1)

    best = torch.zeros(len(at), dtype=torch.float64, device=at.device)
    tried = norm_up(whole.start).amax() * 0.5 ** torch.arange(HALVINGS, dtype=torch.float64, device=at.device)
    between = 2 ** (torch.arange(1, STEPS_BETWEEN + 1, dtype=torch.float64, device=at.device) / (STEPS_BETWEEN + 1))
    for finer in (False, True):
        if finer:
            tried = (best[best > 0].unique()[:, None] * between).flatten()
        for start in range(0, len(tried), _RADII_AT_ONCE):  # `tried` is empty where no position has a radius
            part = tried[start : start + _RADII_AT_ONCE]
            best = torch.maximum(best, torch.where(proved(part), part[:, None], 0.0).amax(0))
    return best
