"""What a module does with its logits at the very end, which moves no decision: softmax, log_softmax, the sigmoid of one logit, views of one number.

A chain ends with the logits in front of it. The executed function may round logits that differ to probabilities that do not: `lost` is how far apart
logits have to be that it keeps their order, and a certificate asks for as much. docs/theory.md, section 13.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustlip.errors import UnsupportedLayer
from robustlip.graph.operations import VIEWS, source_of
from robustlip.graph.program import Program, needed
from robustlip.numerics.rounding import UNIT
from robustlip.ops.elementwise import FUNCTION_ULPS


def without_final(program: Program) -> tuple[Program, str]:
    """(the program up to its logits, (C,) a sample; the name of what was left out, or '')."""
    node, final = program.output, ""
    while (source := source_of(node)) is not None and source is not program.input:
        one = math.prod(node.shape) == 1 == math.prod(source.shape)
        over_classes = len(node.shape) == 1 and node.arguments.get("dim") in (1, -1) and node.arguments.get("dtype") is None
        if not (one and node.op in (*VIEWS, "select")):
            if final or not ((node.op in ("softmax", "log_softmax") and over_classes) or (node.op == "sigmoid" and one)):
                break
            final = node.op
        node = source
    if len(node.shape) != 1:  # one number that is no vector yet: the view makes it one
        return program, ""
    return Program(program.input, node, needed(node), program.computes_weights), final


def finished(final: str, logits: Tensor) -> Tensor:
    """What the module answers where the chain gives these logits (N, C)."""
    if final in ("", "sigmoid"):
        return logits.sigmoid() if final else logits
    return logits.softmax(-1) if final == "softmax" else logits.log_softmax(-1)


def lost(final: str, classes: int, dtype: torch.dtype, kind: str) -> float:
    """Logits further apart than this have function values in the same order, as executed. kind: of device. Raises UnsupportedLayer.

    softmax: e_y = 1 up to the error of exp, e_j ≤ e^−d times it, and the same sum divides both: a few roundings each, at p_y ≥ 1/C. sigmoid: p moves
    away from ½ by nearly a quarter of the logit. log_softmax: (z_j − max) − log Σ rounds at log Σ ≤ log C, in the order in which CPUs compute it.
    """
    if not final:
        return 0.0
    unit = UNIT[dtype] + (classes * 2.0**-24 if dtype == torch.float16 else 0.0)  # float16 probabilities may be subnormal
    if final == "log_softmax":
        if kind != "cpu":
            raise UnsupportedLayer(
                f"expected a model whose log_softmax runs on a CPU, got one on {kind}, where it rounds at the size of the logits; return the logits"
            )
        return 16 * unit * (math.log(classes) + 1)
    return (4 * FUNCTION_ULPS + 32) * unit
