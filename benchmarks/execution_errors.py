"""The execution error of a network's margins, bounded entry by entry and bounded by norms.

    python benchmarks/execution_errors.py MODEL --data mnist:test [--samples 20] [--radius 0.2] [--threat l2] [--dtype float32]

MODEL: a zoo name, a file or a folder, as for `robustlip certify`; a network of matrices and activations. Prints the median over the samples of the
largest error of a margin on the ball: as `crown` and `sdp` carry it (docs/theory.md, section 9) and as `global` multiplies it from layer to layer.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from reporting import machine

import robustlip
from robustlip.certifiers.chains import chain_of
from robustlip.certifiers.constants import constants_of
from robustlip.data import load_data
from robustlip.domains.lines.crown import Ball, linear_boxes
from robustlip.domains.lines.dense import network_of
from robustlip.domains.lines.secants import executed_losses
from robustlip.domains.norms import Context
from robustlip.domains.norms.bound import GlobalBound, layers_after_threat
from robustlip.numerics.rounding import dtype_of
from robustlip.threats import InputBall


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--radius", type=float, default=0.2)
    parser.add_argument("--threat", default="l2", choices=["l1", "l2", "linf"])
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    threat, model = InputBall(options.threat), robustlip.load(options.model)
    x = torch.as_tensor(np.asarray(load_data(options.data, limit=options.samples).x)).to(dtype_of(options.dtype))
    chain, _ = chain_of(model, x)
    context = Context(dtype_of(options.dtype), constants_of(chain)[1])
    y, radius = chain.scores(x).argmax(-1), torch.full((len(x),), options.radius, dtype=torch.float64)
    network = network_of(chain, tuple(x.shape[1:]), context, dense=True)
    ball = Ball(x.double().flatten(1), radius, threat.norm)
    by_entry = executed_losses(network, ball, linear_boxes(network, ball, context), y).amax(1).median()
    layers, inside, norm = layers_after_threat(chain, x, threat)
    bound = GlobalBound(chain, layers, inside, norm, threat, y, context)
    state, _, single = bound.at(radius)
    by_norm = (bound.pairs("l2") * state.rounding[:, None] + 2 * single[:, None]).amax(1).median()
    print(f"{options.model}, {threat.name} {options.radius}, {options.dtype}: {float(by_entry):.2g} entry by entry, {float(by_norm):.2g} by norms")
    print(machine())


if __name__ == "__main__":
    main()
