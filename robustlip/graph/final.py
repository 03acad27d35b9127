"""The last operation of a module, if it keeps the order of the logits: softmax, log_softmax, the sigmoid of one logit, views of one number.

The Chain ends with the logits before that operation. The executed operation may round different logits to equal probabilities. `lost` is the
difference of logits above which their order is kept; certificates require margins above it. docs/theory.md, section 13.
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
    """(the program up to its logits, (C,) per sample; the name of the operation that was left out, or '')."""
    node, final = program.output, ""
    while (source := source_of(node)) is not None and source is not program.input:
        one = math.prod(node.shape) == 1 == math.prod(source.shape)
        over_classes = len(node.shape) == 1 and node.arguments.get("dim") in (1, -1) and node.arguments.get("dtype") is None
        if not (one and node.op in (*VIEWS, "select")):
            if final or not ((node.op in ("softmax", "log_softmax") and over_classes) or (node.op == "sigmoid" and one)):
                break
            final = node.op
        node = source
    if len(node.shape) != 1:  # a number that a view makes a vector
        return program, ""
    return Program(program.input, node, needed(node), program.computes_weights), final


def finished(final: str, logits: Tensor) -> Tensor:
    """The module's output if the Chain returns these logits (N, C)."""
    if final in ("", "sigmoid"):
        return logits.sigmoid() if final else logits
    return logits.softmax(-1) if final == "softmax" else logits.log_softmax(-1)


def lost(final: str, classes: int, dtype: torch.dtype, kind: str) -> float:
    """The difference of logits above which the executed function keeps their order. kind: of device. Raises UnsupportedLayer.

    softmax: e_y = 1 up to the error of exp, e_j ≤ e^−d times that, and the same sum divides both: a few roundings each, and p_y ≥ 1/C.
    sigmoid: |p − ½| is nearly a quarter of |z|. log_softmax: (z_j − max) − log Σ has a rounding error of the size of log Σ ≤ log C, in the
    order in which CPUs compute it.
    """
    if not final:
        return 0.0
    unit = UNIT[dtype] + (classes * 2.0**-24 if dtype == torch.float16 else 0.0)  # float16 probabilities may be subnormal
    if final == "log_softmax":
        if kind != "cpu":
            raise UnsupportedLayer(
                f"expected a model whose log_softmax runs on a CPU, got one on {kind}, where its rounding has the size of the logits; return logits"
            )
        return 16 * unit * (math.log(classes) + 1)
    return (4 * FUNCTION_ULPS + 32) * unit
