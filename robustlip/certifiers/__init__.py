"""Certifiers: proved lower bounds on robust radii, behind one signature.

    certificate = certify(model, x, y, InputBall("l2"))
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustlip import plugins
from robustlip.certificates import ABSTAINED, CERTIFIED, MISCLASSIFIED, Certificate, concatenate, reordered
from robustlip.certifiers.bounds import bound_of_chain, lipschitz_bound, weight_sensitivity_bound
from robustlip.certifiers.chains import architecture_of, cast, chain_of, check_weights_of
from robustlip.certifiers.constants import constants_of
from robustlip.certifiers.methods import METHODS, check_method, methods, radii_of_method
from robustlip.certifiers.samples import (
    batches,
    check_arithmetic,
    check_entry,
    check_in_place,
    check_labels,
    check_model,
    check_samples,
    device_type,
    outside_range,
    train_mode_reason,
)  # fmt: skip
from robustlip.certifiers.trace import scores_and_norms
from robustlip.checks import check_is_logit, check_logits
from robustlip.data.lengths import NO_LABEL, by_length, counted, labels_of
from robustlip.domains.norms import Context
from robustlip.errors import BadInput
from robustlip.execution import EXACT, execution_of, proving
from robustlip.geometry import length
from robustlip.graph.capturing import check_outputs
from robustlip.graph.final import lost
from robustlip.layers import Chain
from robustlip.modes import evaluated
from robustlip.numerics.rounding import NAMES, down, evaluated_in, up
from robustlip.samples import as_request
from robustlip.threats import InputBall, Threat

__all__ = ["METHODS", "certify", "lipschitz_bound", "methods", "weight_sensitivity_bound"]

RULES_VERSION = "10"


@torch.no_grad()
def certify(
    model: nn.Module,
    x: Any,
    y: Any = None,
    threat: Threat | str | None = None,
    method: str = "best",
    *,
    dtype: str | None = None,
    index: Tensor | np.ndarray | None = None,
    batch_size: int | None = None,
) -> Certificate:
    """The largest radius proved for each sample under `threat`, rounded down; 0, with the reason, where nothing is proved.

    model: a Chain, an nn.Sequential of supported layers, or any module that `robustlip.capture` supports.
    x: raw inputs: images (N, C, H, W), vectors (N, n) or token ids (N, T). Texts of different lengths (see `robustlip.samples`) are certified as they
    are run: all texts of one length together, without padding, with the program for that length.
    y: labels (N,); for next-token models, the token after the window. For classifiers of tokens (N, T), −100 where a token has none: the radius is
    one within which no labelled token's prediction changes, and `label` and `prediction` count the labels and the right predictions of a text.
    `robustlip.samples` lists the accepted forms of x, y and threat: tensors, arrays, columns, lists, a data loader instead of x and y, the name of a
    threat.
    method: a key of `methods()`, or 'best'. 'best' takes, for each sample, the largest radius of all applicable methods and records which method
    proved it. If threat.radius is set, the more expensive methods run only on the samples for which this radius is not proved yet.
    dtype: None certifies the model as executed in the dtype of its weights, rounding errors included. 'real' certifies exact arithmetic
    (evaluated in float64). Another dtype name certifies the model cast to that dtype; the hash is then that of the cast weights.
    Inputs are cast to the certified dtype; an input radius is still measured from the original point.
    index: sample numbers (N,), default 0, 1, …. batch_size: samples per batch; by default chosen from the memory they need.
    If threat.radius is set, samples with a smaller proved radius are 'abstained'. Samples outside the model's input_range are abstained. All samples
    are abstained if the model is in train mode and train mode changes its outputs.
    Raises BadInput or UnsupportedLayer. Source: docs/theory.md, sections 1, 2, 3, 4, 7 and 8; Tsuzuku et al. 2018 for radii from Lipschitz bounds.
    """
    check_method(method)
    x, y, threat = as_request(x, y, threat)
    if len(groups := by_length(x)) > 1:
        return _by_length(model, groups, y, threat, method, dtype, index, batch_size)
    x, y = groups[0][1], labels_of(y, *groups[0]) if y.dim() == 2 and len(y) == len(x) else y
    chain, source = chain_of(model, x)
    subject = model
    own = check_model(chain)
    device = next(chain.parameters()).device
    with proving(device.type):
        check_samples(chain, x, y)
        check_entry(chain, x, threat)
        covers = own if dtype is None else evaluated_in(dtype)
        if covers != own and source is None:
            chain = cast(chain, covers)  # type: ignore[assignment]
        elif covers != own:  # a captured module may compute with its weights, in their dtype: cast the module and capture it again
            subject = cast(model, covers)
            chain, source = chain_of(subject, x)
        if source is not None and threat.place == "weights":
            check_weights_of(chain, subject)
        check_arithmetic(chain, covers)
        with chain.reading(chain.position if y.dim() == 1 else 0):
            check_in_place(chain, x)
        training = train_mode_reason(chain)
        with evaluated(chain), chain.reading(chain.position if y.dim() == 1 else 0):
            return _certify(chain, x, y, threat, method, covers, dtype == "real", index, batch_size, training, source, subject)


def _by_length(
    model: nn.Module, groups: list[tuple[Tensor, Tensor]], y: Tensor, threat: Threat, method: str, dtype: str | None,
    index: Tensor | np.ndarray | None, batch_size: int | None,
) -> Certificate:  # fmt: skip
    """The certificate of texts of several lengths, in their own order."""
    rows = torch.cat([of for of, _ in groups]).cpu()
    if len(y) != len(rows):
        raise BadInput(f"expected one label for each of {len(rows)} samples, got labels of shape {tuple(y.shape)}; match them")
    numbers = np.arange(len(rows)) if index is None else np.asarray(index, dtype=np.int64)
    parts = [
        certify(model, part, labels_of(y, of, part), threat, method, dtype=dtype, index=numbers[of.cpu().numpy()], batch_size=batch_size)
        for of, part in groups
    ]  # fmt: skip
    return reordered(concatenate(parts), rows.argsort().numpy())


def _certify(
    chain: Chain, x: Tensor, y: Tensor, threat: Threat, method: str, covers: torch.dtype, real: bool, index: Tensor | np.ndarray | None,
    batch_size: int | None, training: str | None, source: str | None,
    subject: nn.Module,
) -> Certificate:  # fmt: skip
    """The certificate of checked samples. The chain is in the certified dtype, in eval mode and without in-place layers.

    training: None, or why train mode excludes every sample. source: as returned by `chain_of`. subject: the module that was captured.
    """
    outside = outside_range(chain, x)
    refused: list[str] = []
    if training or bool(outside.any()):
        refused = [training or (f"the input is outside {chain.input_range}, the range of the model" if out else "") for out in outside.tolist()]
    sha, store = constants_of(chain)
    architecture = architecture_of(chain, source)
    context = Context(dtype=covers, store=store, relative=getattr(threat, "relative", True))
    device = next(chain.parameters()).device
    parts, winners = [], []
    for part in batches(len(x), batch_size or _batch_size(chain, x, method)):
        # Copies: the caller's tensors stay unchanged, and tensors made under inference mode become differentiable.
        xb, yb = x[part].to(device, copy=True), y[part].to(device).long()
        original = xb
        xb = xb.to(covers) if xb.is_floating_point() else xb
        if source is not None:
            check_outputs(chain, subject, xb)  # the certified chain computes what the caller's module computes
        if yb.dim() == 2:
            *found, winner = _of_tokens(chain, xb, yb, threat, method, context)
            winners += winner
            parts.append(tuple(found))
            continue
        logits, clean = scores_and_norms(chain, xb)
        if type(chain[len(chain) - 1]) is not nn.Linear and chain(xb[:1]).shape[-1] == 1:
            check_is_logit(logits[:, 1])
        check_labels(yb, logits.shape[-1])
        check_logits(logits, len(xb))
        final_error = 0.0 if real else lost(chain.final, logits.shape[1], covers, device_type(chain))
        radii, bounds, winner = radii_of_method(method, chain, xb, yb, logits, threat, replace(context, clean=clean, final_error=final_error))
        winners += winner
        radii = _minus_cast_error(original, xb, threat, radii)
        parts.append((radii, bounds, logits.argmax(-1).cpu(), torch.isfinite(logits).all(-1).cpu()))
    radius, bound, prediction, finite = (torch.cat(column) for column in zip(*parts, strict=True))
    radius = torch.where(finite & ~outside & (training is None), radius, torch.zeros_like(radius)).nan_to_num(0.0)
    name = "real" if real else _name(covers)
    return _assemble(
        chain, context, counted(y).cpu(), threat, method, name, source or sha, architecture, index, radius, bound, prediction, finite,
        refused, winners, {} if x.is_floating_point() or x.dim() != 2 else {x.shape[1]: architecture},
    )  # fmt: skip


def _of_tokens(
    chain: Chain, x: Tensor, y: Tensor, threat: Threat, method: str, context: Context
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """(radius, bound, how many labelled tokens are predicted right, whether all logits are finite, method), each (N,), of labels y (N, T).

    The radius of a text is the smallest of its labelled tokens': each is certified as the token that is read (docs/theory.md, section 4).
    """
    asked = y != NO_LABEL
    whole = chain(x)
    finite = torch.isfinite(whole).flatten(1).all(1)
    right = torch.zeros_like(asked)
    for position in asked.any(0).nonzero()[:, 0].tolist():
        with chain.reading(position):
            logits = chain.decide(whole)
        check_labels(y[asked[:, position], position], logits.shape[-1])
        right[:, position] = asked[:, position] & (logits.argmax(-1) == y[:, position])
    radius = torch.full((len(x),), torch.inf, dtype=torch.float64)
    bound, winners = torch.full_like(radius, torch.nan), [""] * len(x)
    todo = (right == asked).all(1) & finite
    for position in asked.any(0).nonzero()[:, 0].tolist():
        rows = (asked[:, position] & todo).nonzero()[:, 0]
        if not len(rows):
            continue
        with chain.reading(position):
            logits, clean = scores_and_norms(chain, x[rows])
            check_logits(logits, len(rows))
            found, bounds, names = radii_of_method(method, chain, x[rows], y[rows, position], logits, threat, replace(context, clean=clean))
        at = rows.cpu()
        for row, name, nearer in zip(at.tolist(), names, (found < radius[at]).tolist(), strict=True):
            winners[row] = name if nearer else winners[row]
        radius[at], bound[at] = torch.minimum(radius[at], found), torch.fmax(bound[at], bounds)
    return torch.where(todo.cpu(), radius, 0.0), bound, right.sum(1).cpu(), finite.cpu(), winners


def _batch_size(chain: Chain, x: Tensor, method: str) -> int:
    """Samples per batch, at most 4096: the widest activation of a batch has at most 2²⁵ entries, 2²² where the method stores adjoints."""
    widest = max(max(p.shape) for p in chain.parameters())
    tokens = x.shape[1:].numel() if chain.embedding_depth else 1
    most = 2**22 if tokens > 1 and method in ("dual", "best") else 2**25
    return max(1, min(4096, most // (widest * tokens)))


def _minus_cast_error(original: Tensor, cast: Tensor, threat: Threat, radii: Tensor) -> Tensor:
    """Radii around the original inputs: the distance between `original` and its cast to the model's dtype is subtracted."""
    if not isinstance(threat, InputBall) or original.dtype == cast.dtype:
        return radii
    moved = length(original.double() - cast.double(), threat.norm).cpu()
    return down(radii - up(moved) * (1 + 1e-9)).clamp_min(0.0)


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in NAMES.items() if value == dtype)


def _assemble(
    chain: Chain, context: Context, y: Tensor, threat: Threat, method: str, dtype: str, sha: str, architecture: str,
    index: Tensor | np.ndarray | None,
    radius: Tensor, bound: Tensor, prediction: Tensor, finite: Tensor, refused: list[str], winners: list[str],
    programs: dict[int, str],
) -> Certificate:  # fmt: skip
    from robustlip import __version__

    wrong = (prediction != y) & finite
    short = radius < (threat.radius or 0.0)
    radius = torch.where(wrong, torch.zeros_like(radius), radius)
    proved = (radius > 0) & ~short
    if any(refused):
        wrong = wrong & ~torch.tensor([bool(why) for why in refused])
    status = np.where(wrong.numpy(), MISCLASSIFIED, np.where(proved.numpy(), CERTIFIED, ABSTAINED)).tolist()
    reason = [""] * len(y)
    unproved = (~proved).nonzero()[:, 0]
    # Lists, because reading single numbers from tensors would take longer than the proof.
    rows = (column[unproved].tolist() for column in (wrong, finite, radius))
    for i, is_wrong, is_finite, r in zip(unproved.tolist(), *rows, strict=True):
        reason[i] = (
            refused[i] if refused and refused[i]
            else "the prediction is not the label" if is_wrong
            else "logits are not finite" if not is_finite
            else f"proved for a radius of {r:.6g} only" if r > 0
            else f"the margin does not exceed the error bound of {'' if dtype == 'real' else f'{dtype} '}rounding"
        )  # fmt: skip
    largest = bound[torch.isfinite(bound)]
    constants: dict[str, float | str] = {"lipschitz_to_last_hidden": float(largest.max())} if len(largest) else {}
    with suppress(BadInput):  # some chains have no bound that is independent of the samples; their radii do not need it
        whole = context.constant(chain, "lipschitz-bound", lambda: bound_of_chain(chain, replace(context, weight_radius=None)))
        constants |= {f"model_{key}": value for key, value in whole.items()}
    if chain.final:
        constants["read_in_front_of"] = chain.final
    return Certificate(
        threat=threat,
        method=method,
        dtype=dtype,
        weights_sha256=sha,
        architecture_sha256=architecture,
        index=np.arange(len(y)) if index is None else np.asarray(index, dtype=np.int64),
        label=y.numpy().astype(np.int64),
        prediction=prediction.numpy().astype(np.int64),
        radius=radius.numpy(),
        status=tuple(status),
        reason=tuple(reason),
        methods=tuple(name if r > 0 else "" for name, r in zip(winners, radius.tolist(), strict=True)),
        bound=constants,
        versions={**plugins.versions(), "robustlip": __version__, "rules": RULES_VERSION, "torch": torch.__version__},
        execution=EXACT if dtype == "real" else execution_of(device_type(chain)),
        programs=programs,
    )
