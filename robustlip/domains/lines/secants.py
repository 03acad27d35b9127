"""method='local-lipschitz': bounds of the change of each margin on a ball from local slopes of the activations (after Huang et al. 2021).

On the ball h_l(x') − h_l(x) = S_l Δz_l exactly, where S_l is diagonal and its entries are secant slopes of the activation from the clean point. Boxes
give bounds [a, b] of these slopes: 0 for a ReLU that stays inactive, 1 for one that stays active. With the midpoints C_l and half-widths H_l,

    Δm_j = ⟨g_j, δ⟩ + Σ_l ⟨a_{l,j}, E_l Δz_l⟩,   |E_l| ≤ H_l,

where g_j is the gradient of the network with slopes C, and a_{l,j} is its derivative with respect to h_l. This is an identity, because the recursion
of the error is linear. If z_l(x') is executed with an error e_l, then ⟨C_l a_{l,j}, e_l⟩ is added for each stage, and ‖e_l‖ to D_l.
Hence |Δm_j| ≤ ε‖g_j‖_* + Σ_l ‖H_l a_{l,j}‖₂ D_l with D_l ≥ ‖Δz_l‖₂ on the ball: D_1 = ‖W_1‖_{p→2}ε and D_{l+1} = σ(W_{l+1})
max|slope| D_l. A second bound is |Δm_j| ≤ ‖u_y − u_j‖₂ max|slope| D_L; the smaller of the two is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustlip.domains.lines.crown import Ball, Boxes, by_rivals, norms_from_boxes, rival_rows
from robustlip.domains.lines.dense import Network
from robustlip.domains.lines.relaxations import PartnerLines, Products
from robustlip.domains.norms import Context
from robustlip.numerics.rounding import U64, gamma, norm_up, up
from robustlip.numerics.spectral import gram_iteration_bound, infinity_to_two_bound, one_to_two_bound, spectral_norm_bound


def gains(network: Network, norm: str, context: Context, owner: torch.nn.Module) -> list[float]:
    """[‖W_1‖ from the threat's norm to ℓ2, σ(W_2), …], rounded up and cached."""

    def compute() -> list[float]:
        entry = {"l2": spectral_norm_bound, "linf": infinity_to_two_bound, "l1": one_to_two_bound}[norm]
        sigma = spectral_norm_bound if network.stages[0].weight.shape[0] <= 1024 else gram_iteration_bound
        return [float((entry if i == 0 else sigma)(s.weight.cpu())) for i, s in enumerate(network.stages)]

    return context.constant(owner, f"gains-{norm}-{tuple(network.stages[0].weight.shape)}", compute)


def lipschitz_margins(network: Network, ball: Ball, boxes: Boxes, y: Tensor, gain: list[float]) -> tuple[Tensor, Tensor]:
    """(lower bounds (N, C) of all margins on the ball, upper bounds (N, C) of the change of each margin)."""
    found = by_rivals(network, ball, boxes, y, lambda *part: torch.stack(_margins(network, gain, *part), -1))
    return found[..., 0], found[..., 1]


def _margins(network: Network, gain: list[float], ball: Ball, boxes: Boxes, y: Tensor, which: Tensor | None) -> tuple[Tensor, Tensor]:
    clean = network.forward(ball.x)
    errors = network.forward_errors(ball.l2_norm, norms_from_boxes(network, boxes))
    rows = rival_rows(y, clean[-1].shape[-1], which) @ network.stages[-1].weight
    reach = ball.radius * gain[0]
    reaches, halves, centres, steepest = [], [], [], []
    crosses: list[tuple[Tensor, PartnerLines] | None] = []
    for i, stage in enumerate(network.hidden):
        assert stage.activation is not None
        off = errors[i][:, None]
        a, b = stage.activation.secant_slopes((clean[i] - off, clean[i] + off), boxes.low[i], boxes.high[i])
        one = torch.ones_like(a)
        a, b = torch.where(stage.linear, one, a), torch.where(stage.linear, one, b)
        centres.append((a + b) / 2)
        halves.append((b - a).clamp_min(0.0) / 2 + 8 * U64 * (a.abs() + b.abs()))
        steepest.append(torch.maximum(a.abs(), b.abs()).amax(-1))
        across = stage.activation.partner_slopes((clean[i] - off, clean[i] + off), boxes.low[i], boxes.high[i])
        crosses.append(None)
        if isinstance(stage.activation, Products) and across is not None:
            c, d = (torch.where(stage.linear, 0.0, t) for t in across)
            crosses[-1] = (d - c).clamp_min(0.0) / 2 + 8 * U64 * (c.abs() + d.abs()), PartnerLines((c + d) / 2, stage.activation.partner)
            steepest[-1] = steepest[-1] + torch.maximum(c.abs(), d.abs()).amax(-1)
        reach = reach if not boxes.error else up(reach + norm_up(boxes.error[i]))
        reaches.append(reach)
        reach = reach * steepest[-1] * gain[i + 1] if i + 1 < len(network.hidden) else reach
    moved = torch.full_like(rows[..., 0], torch.inf)
    if network.hidden:
        moved = norm_up(rows) * (steepest[-1] * reaches[-1])[:, None]
    total = torch.zeros_like(moved)
    # The error of a product of rows is at most γ‖row‖₂‖W‖_F times the norm of its other factor, which is ‖Δh‖₂ ≤ largest slope·‖Δz‖₂.
    for i in range(len(network.hidden) - 1, -1, -1):
        stage = network.stages[i]
        loss = 4 * gamma(stage.roundings + 32, U64)
        total = total + (norm_up(rows * halves[i][:, None]) + loss * norm_up(rows) * (1 + steepest[i])[:, None]) * reaches[i][:, None]
        cross = crosses[i]
        if cross is not None:
            total = total + norm_up(rows * cross[0][:, None]) * reaches[i][:, None]
        added = 0.0 if cross is None else cross[1].backward(rows, stage.linear)
        rows = rows * centres[i][:, None] + added
        if boxes.error:
            total = total + (rows.abs() @ boxes.error[i][..., None])[..., 0] * (1 + 1e-9)
        before = ball.l2_radius if i == 0 else steepest[i - 1] * reaches[i - 1]
        total = total + loss * norm_up(rows) * stage.magnitude * before[:, None]
        rows = rows @ stage.weight
    total = up(total + ball.radius[:, None] * ball.dual(rows))
    # Rows of the head are differences that were rounded once.
    head = network.stages[-1]
    last = ball.l2_radius if not network.hidden else steepest[-1] * reaches[-1]
    total = torch.minimum(total, moved) + (4 * U64 * 2 * head.magnitude * last)[:, None]
    margin = clean[-1].gather(1, y[:, None]) - (clean[-1] if which is None else clean[-1][:, which])
    lower = margin - total - 2 * errors[-1][:, None] - 4 * U64 * margin.abs()
    if not boxes.error:
        return lower, total
    error = boxes.error[-1] * (1 + 1e-9)
    return lower - error.gather(1, y[:, None]) - (error if which is None else error[:, which]), total


def executed_losses(network: Network, ball: Ball, boxes: Boxes, y: Tensor) -> Tensor:
    """(N, C): how far the margins of the executed network can be below those of these matrices, at one point of the ball.

    Both pass through the boxes, which have to bound what is executed (`Boxes.error`). Their difference is Σ_l ⟨C_l a_l, e_l⟩ as above, with secants
    of the activations anywhere in their boxes for C: |C_l a_l| is bounded number by number, by intervals carried back from the margin. Networks
    of matrices, and without products of numbers.
    """
    return by_rivals(network, ball, boxes, y, lambda *part: _losses(network, *part))


def _losses(network: Network, ball: Ball, boxes: Boxes, y: Tensor, which: Tensor | None) -> Tensor:
    error = boxes.error[-1]
    total = error.gather(1, y[:, None]) + (error if which is None else error[:, which])
    rows = rival_rows(y, error.shape[-1], which)
    off = 8 * U64 * rows.abs()
    for i in range(len(network.stages) - 1, 0, -1):
        stage, before = network.stages[i], network.stages[i - 1]
        loss = gamma(stage.roundings + 32, U64)
        rows, off = rows @ stage.weight, ((off + loss * rows.abs()) @ stage.weight.abs()) * (1 + 1e-9)
        assert before.activation is not None
        box = boxes.low[i - 1], boxes.high[i - 1]
        a, b = before.activation.secant_slopes(box, *box)
        one = torch.ones_like(a)
        a, b = torch.where(before.linear, one, a), torch.where(before.linear, one, b)
        centre, half = (a + b) / 2, (b - a).clamp_min(0.0) / 2 + 8 * U64 * (a.abs() + b.abs())
        off = (off * (centre.abs() + half)[:, None] + rows.abs() * half[:, None]) * (1 + 1e-9)
        rows = rows * centre[:, None]
        total = total + ((rows.abs() + off) @ boxes.error[i - 1][..., None])[..., 0] * (1 + 1e-9)
    return total
