"""Breaks one line of the rules at a time and reports which test notices. Every mutation must be caught.

    python benchmarks/mutations.py [--only PATTERN] [--jobs 1] [--markdown FILE]

Each mutation is one replacement in one file, asserted to apply exactly once, in a temporary copy of the tree; the tests named with it run there
until the first failure. Nothing in the checkout changes. `--only` takes a regular expression that is looked for in the description, the file and the
tests of each (`--only domains/lines`). Exit code 0: all caught. 1: at least one survived.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RULES, CERTIFY, INDEPENDENT, HOSTILE, MINE, LOCAL, CONSTRAINTS, SUBNORMALS, OVERFLOW = (
    f"tests/test_{name}.py"
    for name in ("rules_contract", "certify", "independent", "hostile", "soundness_mutations", "local", "constraints", "subnormals", "overflow")
)
EXACT, WALKS, OF_MLP, OF_SDP, CONVS, SEQUENCES, GATES, FILES = (
    f"tests/test_{name}.py" for name in ("exact", "walks", "mlp_certifiers", "lipsdp", "conv", "sequence", "gate", "certificate_file")
)


class Mutation(NamedTuple):
    what: str
    file: str
    old: str
    new: str
    tests: str  # pytest's arguments: files, and -k for the fast subset


LIPSCHITZ, ATTENTION, LINEAR = "robustlip/domains/norms/bound.py", "robustlip/domains/norms/attention.py", "robustlip/domains/norms/linear.py"
ELEMENTWISE, STRUCTURE, BASE = "robustlip/domains/norms/elementwise.py", "robustlip/domains/norms/structure.py", "robustlip/domains/norms/state.py"
SEARCH, SPECTRAL, ENTRY = "robustlip/domains/search.py", "robustlip/numerics/spectral.py", "robustlip/certifiers/__init__.py"
CONSTANTS, NORMALIZATION = "robustlip/certifiers/constants.py", "robustlip/domains/norms/normalization.py"
AT_ATTENTION, AT_LINEAR, AT_ELEMENTWISE, AT_NORMALIZATION, AT_STRUCTURE, AT_JACOBIAN = (
    f"robustlip/domains/expansion/{name}.py" for name in ("attention", "linear", "elementwise", "normalization", "structure", "jacobian")
)
OPS_ELEMENTWISE, OPS_AFFINE, OPS_ATTENTION, OPS_NORMALIZATION, OPS_JOINS, OPS_PIECEWISE, OPS_SMOOTH = (
    f"robustlip/ops/{name}.py" for name in ("elementwise", "affine", "attention", "normalization", "joins", "piecewise", "smooth")
)
AT_BASE, AT_CROSSING, AT_SORTING, AT_CONVOLUTION, AT_NEURONS = (
    f"robustlip/domains/expansion/{name}.py" for name in ("base", "crossing", "sorting", "convolution", "neurons")
)
BY_LOCAL, BY_DUAL = "robustlip/domains/expansion/local.py", "robustlip/domains/expansion/dual.py"
MLP_NETWORK, MLP_LINEAR, MLP_CURVES, MLP_DUAL, MLP_RADII, MLP_QUADRATIC, MLP_LOCAL = (
    f"robustlip/domains/{name}.py"
    for name in ("lines/dense", "lines/crown", "lines/relaxations", "quadratic/multipliers", "lines/radii", "quadratic/lagrangian", "lines/secants")
)
SDP_PROGRAM, SDP_VERIFY, SDP_CONSTANTS, SDP_REACH, SDP_QUADRATIC, SDP_ECLIPSE, SDP_NETWORK = (
    f"robustlip/{name}.py"
    for name in (
        "domains/quadratic/program", "numerics/enclosures", "domains/quadratic/constants", "domains/quadratic/reach", "domains/quadratic/constraints",
        "domains/quadratic/eclipse", "domains/quadratic/layers",
    )
)
CONVOLUTION, SEQUENCE = "robustlip/domains/norms/convolution.py", "robustlip/certifiers/sequence.py"
OPS_CONVOLUTION, OPS_MAPS = "robustlip/ops/convolution.py", "robustlip/ops/maps.py"
VERIFICATION, CERTIFICATE_FILE, GATE = "robustlip/verification.py", "robustlip/certificate_file.py", "robustlip/gate.py"

NORMS_JOINS, AT_JOINS, LAYERS_JOINS, EXECUTION = (
    "robustlip/domains/norms/joins.py", "robustlip/domains/expansion/joins.py", "robustlip/layers/joins.py", "robustlip/execution.py",
)
STAGES = "robustlip/domains/lines/stages.py"
JOINS, IN_PLACE, MAPS, NETS, MAPPED, OPS = (
    "tests/test_joins.py", "tests/test_execution.py", "tests/test_maps.py", "tests/test_convnets.py",
    "tests/test_mapped.py", "tests/test_ops.py",
)

OPS_CONSTANTS, NORMS_CONSTANTS, AT_CONSTANTS = (f"robustlip/{room}/constants.py" for room in ("ops", "domains/norms", "domains/expansion"))
PROGRAM, LOWER, CAPTURING, CHAINS = (
    *(f"robustlip/graph/{name}.py" for name in ("program", "lower", "capturing")), "robustlip/certifiers/chains.py",
)
CAPTURE = "tests/test_capture.py"

MUTATIONS = [
    # ---- constants by channel
    Mutation("constants: a divisor counted as a factor", OPS_CONSTANTS, "return 1 / smallest * (1 + 1e-15), smallest", "return smallest, smallest",
             f"{RULES} -k 'change and scale'"),
    Mutation("constants: the smallest factor for the largest", OPS_CONSTANTS, "return float(size.amax()), math.inf",
             "return float(size.amin()), math.inf", f"{RULES} -k 'change and scale'"),
    Mutation("constants: a shift leaves the norm", OPS_CONSTANTS, "reach = norm + size * math.sqrt(width) * (1 + 1e-15)", "reach = norm",
             f"{RULES} -k shift"),
    Mutation("constants: rounding of a product dropped", OPS_CONSTANTS, "return 2 * arithmetic.unit * gain * norm + root", "return 0 * norm + root",
             f"{RULES} -k scale"),
    Mutation("constants: what rounded in front of a factor keeps its size", NORMS_CONSTANTS, "rounding=gain * state.rounding + fresh",
             "rounding=state.rounding + fresh", f"{RULES} -k carries"),
    Mutation("constants: maps divide where layers multiply", OPS_MAPS, "1 / value if layer.divide else value", "value if layer.divide else 1 / value",
             f"{LOCAL} -k scale"),
    Mutation("constants: maps add what layers subtract", OPS_MAPS, "bias=-value if layer.subtract else value", "bias=value",
             f"{CAPTURE} -k 'by_hand or inside'"),
    # ---- captures
    Mutation("capture: samples may stand anywhere", PROGRAM, "        if not apart:", "        if False:", f"{CAPTURE} -k refused"),
    Mutation("capture: what is written over may be read again", PROGRAM, "stale[value] = node", "pass",
             f"{CAPTURE} -k refused"),
    Mutation("capture: buffers may change", PROGRAM, "if signature.buffers_to_mutate:", "if False:", f"{CAPTURE} -k refused"),
    Mutation("capture: the number of samples is a number like any other", PROGRAM, "(shapes and (a, b) == _SIZES)", "(a, b) == _SIZES",
             f"{CAPTURE} -k refused"),
    Mutation("capture: outputs are not compared", CAPTURING, "        check_same(chain, module, example)\n",
             "        pass\n", f"{CAPTURE} -k wrong_layer"),
    Mutation("capture: a join begins at the first value it reads", LOWER, "above = read if above is None else self._common(above, read)",
             "above = read if above is None else above", f"{CAPTURE} -k 'bits or random'"),
    Mutation("capture: a capture is kept whatever changes", CHAINS, "check_same(known[1], model, example)", "pass", f"{CAPTURE} -k not_of_weights"),
    Mutation("capture: a certificate does not name what was computed of the weights", CHAINS,
             'printed if source is None else hashlib', 'printed if True else hashlib', f"{CAPTURE} -k not_of_weights"),
    Mutation("capture: a subtraction is a sum", LOWER, 'sign = 1.0 if node.op == "add" else -1.0', "sign = 1.0", f"{CAPTURE} -k random"),
    # ---- joins
    Mutation("sums: weights of branches counted as 1", NORMS_JOINS, "sizes = [abs(w) for w in layer.weights]", "sizes = [1.0 for w in layer.weights]",
             f"{JOINS} -k attain"),
    Mutation("sums: the sign of a weight lets bounds cancel", NORMS_JOINS, "sizes = [abs(w) for w in layer.weights]", "sizes = list(layer.weights)",
             f"{RULES} -k 'change and sum'"),
    Mutation("concatenations: the largest branch for all", NORMS_JOINS, "change=root_of_squares([s.change for s in behind])",
             "change=torch.stack([s.change for s in behind]).amax(0)", f"{JOINS} -k attain"),
    Mutation("sums: what branches rounded is forgotten", NORMS_JOINS, "rounding=rounding + fresh", "rounding=fresh",
             f"{JOINS} -k 'rounded_arrives'"),
    Mutation("local: a sum moves as its last branch", AT_JOINS, "Behind(total(radii) + fresh,",
             "Behind(total(radii[-1:] * len(radii)) + fresh,", f"{JOINS} -k 'however_small and local'"),
    Mutation("local: errors of a sum's branches dropped", AT_JOINS, "total(errors) + fresh, bounds)",
             "fresh, bounds)",
             f"{LOCAL} -k 'promises and sum'"),
    Mutation("local: adjoints of branches without their weight", AT_JOINS, "branch.adjoint(w * g, two_sided)", "branch.adjoint(g, two_sided)",
             f"{LOCAL} -k sum"),
    Mutation("local: one branch of a concatenation for all", AT_JOINS, "Behind(root_of_squares(radii),",
             "Behind(radii[0],", f"{LOCAL} -k 'promises and concatenate'"),
    Mutation("dense: weights of a sum dropped", MLP_NETWORK, "factor[h:] = weight",
             "factor[h:] = 1.0", f"{JOINS} -k 'exact_radius and crown'"),
    Mutation("dense: the last branch of a sum left out", MLP_NETWORK, "enumerate(zip(layer.weights, outs, strict=True))",
             "enumerate(zip(layer.weights[:-1], outs[:-1], strict=True))", f"{JOINS} -k 'exact_radius and crown'"),
    Mutation("dense: a slice begins one channel early", MLP_NETWORK, "self._numbers(h + layer.start * inner, h + layer.stop * inner)",
             "self._numbers(h + max(0, layer.start - 1) * inner, h + max(1, layer.stop - 1) * inner)", f"{JOINS} -k 'split and crown'"),
    Mutation("branches that work in place are evaluated", LAYERS_JOINS,
             "if any(getattr(module, \"inplace\", False) is True for module in self.modules()):", "if False:", f"{IN_PLACE} -k read_again"),
    # ---- the program that runs
    Mutation("hooks for all modules are not seen", EXECUTION, "if globally._global_forward_hooks or globally._global_forward_pre_hooks:", "if False:",
             f"{IN_PLACE} -k hooks_for_all"),
    Mutation("a compiled call is not seen", EXECUTION, "if own.get(\"_compiled_call_impl\") is not None:", "if False:", f"{IN_PLACE} -k compiled"),
    Mutation("a weight hidden by an attribute is not seen", EXECUTION,
             "if value is not None and getattr(module, key, None) is not value:", "if False:",
             f"{IN_PLACE} -k property"),
    Mutation("weights of another class are not seen", EXECUTION, "if type(value) not in (Tensor, nn.Parameter, nn.Buffer):", "if False:",
             f"{IN_PLACE} -k _subclass"),
    Mutation("modes of torch functions are not seen", EXECUTION,
             "foreign = [type(mode).__name__ for mode in functions if type(mode) is not DeviceContext]",
             "foreign = []", f"{IN_PLACE} -k rewrite_operations"),
    Mutation("the difference in front of a division not seen to overflow", ELEMENTWISE,
             "context.finite(behind, reach)", "context.finite(behind)", f"{OVERFLOW} -k 'way_is_seen and normalize'"),
    Mutation("the difference in front of a division not seen to overflow (local)", AT_STRUCTURE,
             "torch.maximum(size, reach)", "size", f"{OVERFLOW} -k 'way_is_seen and normalize'"),
    Mutation("outputs of LayerNorm not seen to overflow (local)", AT_NORMALIZATION,
             ".square().clamp_min(norm)", ".square()", f"{OVERFLOW} -k 'way_is_seen and norm'"),
    Mutation("GELU divided by less than 1 not seen to overflow (local)", OPS_ELEMENTWISE,
             "torch.maximum(self.on_the_way(norm), self.size(norm, root) / self.divisor)",
             "self.on_the_way(norm)", f"{OVERFLOW} -k 'way_is_seen and gelu'"),
    Mutation("attention's output scale not seen to overflow (local)", AT_ATTENTION,
             " * max(1.0, abs(self.factor)),", ",", f"{OVERFLOW} -k 'way_is_seen and factor'"),
    Mutation("sums over keys not seen to overflow", OPS_ATTENTION,
             "torch.maximum(turned, tokens * value)",
             "torch.maximum(turned, value)", f"{OVERFLOW} -k 'way_is_seen and values'"),
    Mutation("queries times the root of the scale not seen to overflow", OPS_ATTENTION,
             "max(2.0, math.sqrt(scale)) * projected",
             "2.0 * projected", f"{OVERFLOW} -k 'way_is_seen and scale'"),
    Mutation("what crosses a kink counted once, not twice", AT_CROSSING,
             "return 2 * (1 + 1e-12) * (self.each", "return (1 + 1e-12) * (self.each", f"{LOCAL} -k 'never_exceeded and linear-maxmin'"),
    Mutation("kinks together counted once, not twice", AT_CROSSING,
             "together = 2 * bound.share", "together = bound.share", f"{LOCAL} -k 'forms_of_kinks'"),
    Mutation("forms of kinks without their constants", AT_CROSSING,
             ".square() + self.forms.constant", ".square()", f"{LOCAL} -k 'forms_of_kinks'"),
    Mutation("forms of kinks without what is not linear in the change", AT_CROSSING,
             "+ self.forms.peak.sqrt() * bound.fresh)", ")", f"{LOCAL} -k 'forms_of_kinks'"),
    Mutation("forms of kinks with τ below twice the distance", AT_CROSSING,
             "torch.maximum(2 * near, radius", "torch.maximum(near, radius", f"{LOCAL} -k 'forms_of_kinks'"),
    Mutation("kinks against the wrong sign of the margin", AT_SORTING,
             "else (size - omega) / 2", "else (size + omega) / 2", f"{LOCAL} -k 'never_exceeded and maxmin'"),
    Mutation("kinks with one sign where both count", AT_SORTING,
             "size if two_sided else", "(size - omega) / 2 if two_sided else", f"{LOCAL} -k 'both_signs and maxmin or know_of'"),
    Mutation("forms of kinks of numbers that vanish", AT_CROSSING,
             "& ((c >= SEEN) | (weight == 0)).all(-1) & ((squares >= SEEN) | (w == 0).all(-1)).all()", "", f"{LOCAL} -k 'kinks_of_any_size'"),
    Mutation("kinks of equal pairs of subnormals counted once", AT_SORTING,
             "torch.zeros_like(norm) + 2 * root * context.flushed", "torch.zeros_like(norm) + root * context.flushed",
             f"{SUBNORMALS} -k 'expansions and groupsort'"),
    Mutation("subnormal inputs of the head not counted (local)", OPS_AFFINE,
             "math.sqrt(width) * (row + norm) * arithmetic.flushed",
             "math.sqrt(width) * norm * arithmetic.flushed", f"{CERTIFY} -k 'subnormal_operands and local and input'"),
    Mutation("subnormal weights of the head not counted (local)", OPS_AFFINE,
             "math.sqrt(width) * (row + norm) * arithmetic.flushed",
             "math.sqrt(width) * row * arithmetic.flushed", f"{CERTIFY} -k 'subnormal_operands and local and weight'"),
    Mutation("subnormal tokens not counted in attention (local)", OPS_ATTENTION,
             "(frobenius + root * norm) * arithmetic.flushed",
             "root * norm * arithmetic.flushed", f"{CERTIFY} -k 'subnormal_tokens and local'"),
    Mutation("subnormal weights of a matrix not counted", OPS_AFFINE,
             "math.sqrt(self.fan_in * self.fan_out) * norm * arithmetic.flushed",
             "0 * norm * arithmetic.flushed", f"{SUBNORMALS} -k 'rules and linear-weight'"),
    Mutation("a subnormal factor of attention not counted", OPS_ATTENTION,
             "(by * root + norm) * arithmetic.flushed",
             "by * root * arithmetic.flushed", f"{SUBNORMALS} -k 'rules and attention-factor'"),
    Mutation("an attention scale that counts for zero", ATTENTION,
             "return context.divided(context.finite(behind, torch.stack([largest_logit, held, mixed_sums]).amax(0)), scale)",
             "return context.finite(behind, torch.stack([largest_logit, held, mixed_sums]).amax(0))",
             f"{SUBNORMALS} -k 'rules and attention-scale'"),
    Mutation("a subnormal scalar of a residual not counted", OPS_JOINS,
             "(root * a + n) * arithmetic.flushed",
             "root * a * arithmetic.flushed", f"{SUBNORMALS} -k 'rules and residual'"),
    Mutation("a subnormal scalar of a residual not counted (local)", OPS_JOINS,
             "(root * a + n) * arithmetic.flushed",
             "0 * n", f"{SUBNORMALS} -k 'expansions and residual'"),
    Mutation("LayerNorm's squares that vanish not counted", OPS_NORMALIZATION,
             "relative = g + 2 * TINY[torch.float32] / eps + 0 * norm",
             "relative = g + 0 * norm", f"{SUBNORMALS} -k 'rules and layernorm'"),
    Mutation("a divisor that counts for zero", ELEMENTWISE,
             "context.divided(context.finite(behind, facts.on_the_way(state.norm)), by)",
             "context.finite(behind, facts.on_the_way(state.norm))", f"{SUBNORMALS} -k 'rules and gelu'"),
    Mutation("subnormal tokens of LayerNorm and RMSNorm not counted", OPS_NORMALIZATION,
             "2 * root * (gain + (1 + norm) / math.sqrt(eps)) * arithmetic.flushed",
             "0", f"{SUBNORMALS} -k 'rules and rmsnorm'"),
    Mutation("a subnormal scale of batch norm not counted", OPS_NORMALIZATION,
             "math.sqrt(width) * (norm + self.mean) / math.sqrt(self.variance) * arithmetic.flushed", "0", f"{SUBNORMALS} -k 'rules and batchnorm'"),
    Mutation("heads share the whole matrix's norm evenly (published formula, √H)", ATTENTION,
             "sigma = {n: spectral_norm_bound(w).cpu() for n, w in slices.items()}",
             "sigma = {n: spectral_norm_bound(w.flatten(0, 1)).cpu().expand(h) / h**0.5 for n, w in slices.items()}",
             f"{RULES} -k optimised_heads"),
    Mutation("heads joined by the largest instead of the root of squares", ATTENTION,
             "whole * norm_up(per_head)", "whole * per_head.amax(-1)", f"{INDEPENDENT} -k rederived"),
    Mutation("factor 2 of the attention logits dropped", ATTENTION,
             "scale * (2 * s_q * s_k * a * r", "scale * (1 * s_q * s_k * a * r",
             f"{RULES} -k 'change_is_never_exceeded and attention or nearly_attained'"),
    Mutation("softmax's value term dropped", ATTENTION,
             "s_v * r + e_v * a + value_norm * logits.clamp_max(2.0)", "s_v * r + e_v * a",
             f"{RULES} -k 'change_is_never_exceeded and attention'"),
    Mutation("attention scale left out of the logits", ATTENTION,
             "scale, d, factor = abs(layer.scale) / layer.head_width,", "scale, d, factor = 1 / layer.head_width,",
             f"{RULES} -k 'change_is_never_exceeded and attention or nearly_attained'"),
    Mutation("perturbation of the output matrix dropped", ATTENTION,
             "head_change(r, e_q, e_k, e_v)) + e_o * mixed", "head_change(r, e_q, e_k, e_v))", f"{MINE} -k output_matrix"),
    Mutation("perturbation of the logits by the weights dropped", ATTENTION,
             "+ (e_q * s_k + s_q * e_k) * a * a)", ")", f"{RULES} -k 'weight_perturbations and attention'"),
    Mutation("domain not enlarged by the threat", LIPSCHITZ,
             "norm=up(norm + state.in_l2().change)", "norm=up(norm)", f"{INDEPENDENT} {MINE} -k 'rederived or domain'"),
    Mutation("domain tightened without the change", BASE,
             "up(seen[1] + state.in_l2().change + 2 * state.rounding)", "up(seen[1] + 2 * state.rounding)",
             f"{INDEPENDENT} {MINE} -k 'rederived or tighten'"),
    Mutation("domain tightened without the rounding", BASE,
             "up(seen[1] + state.in_l2().change + 2 * state.rounding)", "up(seen[1] + state.in_l2().change)",
             f"{CERTIFY} {MINE} -k 'rounding or tighten'"),
    Mutation("last rival left out", LIPSCHITZ,
             "return (margin / factor).amin(-1),", "return (margin / factor)[:, :-1].amin(-1),", f"{CERTIFY} -k 'binding or exact_radius'"),
    Mutation("only the runner-up compared", LIPSCHITZ,
             "return (margin / factor).amin(-1),", "return (margin / factor).gather(-1, margin.argmin(-1, keepdim=True))[:, 0],",
             f"{CERTIFY} -k 'binding or exact_radius'"),
    Mutation("rounding allowance dropped", LIPSCHITZ,
             "quotient * (1 - 1e-12) - up(lost)", "quotient * (1 - 1e-12)", f"{CERTIFY} {MINE} -k 'rounding'"),
    Mutation("rounding of the hidden layers dropped", LIPSCHITZ,
             "lost = 2 * l2_per_unit * state.rounding + 4 * single / smallest", "lost = 4 * single / smallest", f"{CERTIFY} {MINE} -k 'rounding'"),
    Mutation("rounding of the last layer dropped", LIPSCHITZ,
             "lost = 2 * l2_per_unit * state.rounding + 4 * single / smallest", "lost = 2 * l2_per_unit * state.rounding",
             f"{CERTIFY} {MINE} -k 'rounding'"),
    Mutation("rounding counted for the clean pass only", LIPSCHITZ,
             "lost = 2 * l2_per_unit * state.rounding + 4 * single / smallest", "lost = l2_per_unit * state.rounding + 2 * single / smallest",
             f"{CERTIFY} {MINE} -k 'rounding'"),
    Mutation("√2 of the last layer's weight perturbation dropped", LIPSCHITZ,
             "extra = 2**0.5 * (1 + 1e-15) * perturbed", "extra = perturbed", f"{MINE} -k weight_balls"),
    Mutation("bias left out of the last layer's rounding", OPS_AFFINE,
             "size = row * norm + bias",
             "size = row * norm", f"{CERTIFY} {MINE} -k 'rounding'"),
    Mutation("a zero margin counts as correct, and NaN too", LIPSCHITZ,
             "correct = margin.amin(-1) > 0", "correct = ~(margin.amin(-1) < 0)", f"{CERTIFY} {MINE} -k ties"),
    Mutation("dual norm of ℓ∞ taken for ℓ2", LIPSCHITZ,
             "dual_length(difference, space, 2)", "dual_length(difference, 'l2', 2)", f"{CERTIFY} -k exact_radius"),
    Mutation("power iteration instead of the guaranteed norm (Linear)", OPS_AFFINE,
             "from robustlip.numerics.spectral import spectral_norm_bound",
             "from robustlip.numerics.spectral import spectral_norm_estimate as spectral_norm_bound", f"{MINE} -k power"),
    Mutation("power iteration instead of the guaranteed norm (Attention)", ATTENTION,
             "from robustlip.numerics.spectral import spectral_norm_bound",
             "from robustlip.numerics.spectral import spectral_norm_estimate as spectral_norm_bound", f"{MINE} -k power"),
    Mutation("ℓ∞ gain replaced by σ(W)", LINEAR,
             'gain = context.constant(layer, "linf", lambda: float(infinity_to_two_bound(layer.weight)))', "gain = matrix.sigma",
             f"{RULES} -k infinity_and_one_balls_through_the"),
    Mutation("ℓ∞ to ℓ2 without √n", BASE,
             "self.change * l2_factor(self.space, self.width)", "self.change", f"{MINE} -k 'infinity or domain'"),
    Mutation("bias left out of Linear's norm", LINEAR,
             "norm = (matrix.sigma + perturbed) * state.norm + bias", "norm = (matrix.sigma + perturbed) * state.norm",
             f"{RULES} {MINE} -k 'norm_and_rounding and linear or biases'"),
    Mutation("mean left out of Normalize's norm", ELEMENTWISE,
             "reach = state.norm + shift * state.width**0.5 * state.tokens**0.5", "reach = state.norm",
             f"{RULES} {MINE} -k 'norm_and_rounding and normalize or means'"),
    Mutation("GELU's slope 1.0", OPS_ELEMENTWISE,
             'GELU_SLOPE = {"none": 1.1289042, "tanh": 1.1289932}',
             'GELU_SLOPE = {"none": 1.01, "tanh": 1.01}', f"{RULES} -k gelu"),
    Mutation("GELU's slope 1.1289, as published", OPS_ELEMENTWISE,
             'GELU_SLOPE = {"none": 1.1289042, "tanh": 1.1289932}',
             'GELU_SLOPE = {"none": 1.1289, "tanh": 1.1289}', f"{RULES} -k gelu"),
    Mutation("MLP constant divided by 1.1289 twice", ELEMENTWISE,
             "slope = facts.steepest / by",
             "slope = facts.steepest / by**2", f"{MINE} {RULES} -k gelu"),
    Mutation("LayerNorm's eps dropped from its constant", NORMALIZATION,
             "gain = scale / math.sqrt(eps) * (1 + 1e-15)\n        norm = torch", "gain = scale\n        norm = torch",
             f"{RULES} -k layernorm"),
    Mutation("LayerNorm's β dropped from its size", NORMALIZATION, "(1 + 1e-15)) + shift", "(1 + 1e-15))",
             f"{RULES} -k sizes_behind"),
    Mutation("LayerNorm taken to be 0 at 0, as RMSNorm is", NORMALIZATION, "if isinstance(layer, nn.RMSNorm):", "if True:",
             f"{RULES} -k sizes_behind"),
    Mutation("RMSNorm's size without its gain", NORMALIZATION, "torch.minimum(gain * state.norm, norm)", "torch.minimum(state.norm, norm)",
             f"{RULES} -k sizes_behind"),
    Mutation("√D dropped behind normalisation", NORMALIZATION, "scale * math.sqrt(width) * (1 + 1e-15)) + shift", "scale) + shift",
             f"{RULES} -k sizes_behind"),
    Mutation("√T dropped in Flatten", STRUCTURE,
             "root = math.sqrt(state.tokens) * (1 + 1e-15)", "root = 1.0", f"{RULES} -k 'flatten or tokens'"),
    Mutation("constants remembered by the model's identity alone", CONSTANTS,
             "if known is None or known[0] != state:", "if known is None:", f"{CERTIFY} -k constants"),
    Mutation("radius from the infeasible side of the bracket", SEARCH,
             "return low, low_change", "return high, low_change", f"{MINE} -k search"),
    Mutation("NaN counts as feasible", SEARCH,
             "feasible = live & (change < room)", "feasible = live & ~(change >= room)", f"{CERTIFY} {MINE} -k 'ties or feasible'"),
    Mutation("samples with logits that are not finite keep their radius", ENTRY,
             "torch.where(finite & ~outside & (training is None), radius,", "torch.where(~outside & (training is None), radius,",
             f"{CERTIFY} {MINE} -k 'ties or finite'"),
    Mutation("the cast of the input not taken off the radius", ENTRY,
             "return down(radii - up(moved) * (1 + 1e-9)).clamp_min(0.0)", "return radii", f"{HOSTILE} {MINE} -k 'cast or given'"),
    Mutation("Gram eigenvalue without its residual", SPECTRAL,
             "total = top * (1 + defect) + residual + gram_error", "total = top", f"{MINE} -k eigensolver"),
    Mutation("local: the layer's own weight change dropped", AT_LINEAR,
             "norm, perturbed, arithmetic)) + perturbed * norm",
             "norm, perturbed, arithmetic))", f"{LOCAL} -k 'no_attack and weights'"),
    Mutation("local: rounding of Linear dropped", AT_LINEAR,
             "fresh = self.scope.both(lambda arithmetic: c.matrix.error(bias, norm, perturbed, arithmetic)) + perturbed * norm",
             "fresh = 0 * norm + perturbed * norm", f"{LOCAL} -k 'rounding_as_executed and linear'"),
    Mutation("local: neurons under ℓ∞ measured in ℓ2", OPS_MAPS,
             "return up(rows.abs().sum(-1) * (1 + 1e-12))", "return norm_up(rows)", f"{LOCAL} -k 'promises and linf'"),
    Mutation("local: neurons that may cross a kink keep their slope", AT_ELEMENTWISE,
             "torch.where(each >= self._away(kink), slope.clamp_min(kink.steepest / self.facts.divisor), slope)", "slope",
             f"{LOCAL} -k 'promises and relu'"),
    Mutation("local: what a kink adds weighted by the wrong sign", AT_ELEMENTWISE,
             "(-g if jump > 0 else g).clamp_min(0.0)", "(g if jump > 0 else -g).clamp_min(0.0)", f"{LOCAL} -k 'promises and relu'"),
    Mutation("local: every kink bends up as ReLU's does", AT_ELEMENTWISE,
             "(-g if jump > 0 else g).clamp_min(0.0)", "(-g).clamp_min(0.0)", f"{LOCAL} -k 'promises and hardtanh'"),
    Mutation("local: kinks jump by 1", AT_ELEMENTWISE,
             "(-g if jump > 0 else g).clamp_min(0.0), abs(jump))", "(-g if jump > 0 else g).clamp_min(0.0), 1.0)",
             f"{LOCAL} -k 'promises and (falls or abs)'"),
    Mutation("local: every kink at 0", AT_ELEMENTWISE,
             "self.distance if kink.place == 0 else (self.at - kink.place).abs() * (1 - 2.0**-50)", "self.distance",
             f"{LOCAL} -k 'promises and clamp'"),
    Mutation("local: a kink's remainder left out beside the curvature", AT_ELEMENTWISE,
             "curved + bent if self.kinks else curved", "curved", f"{LOCAL} -k 'promises and selu'"),
    Mutation("local: only one kink of two", AT_ELEMENTWISE,
             "norm_up(sums[0] if len(sums) == 1 else torch.maximum(*sums))", "norm_up(sums[0])",
             f"{LOCAL} -k 'promises and softshrink or promises and clamp or promises and hardtanh'"),
    # ---- facts of elementwise functions
    Mutation("facts: half of LeakyReLU's slope", OPS_PIECEWISE, "torch.full_like(z, slope)", "torch.full_like(z, slope / 2)",
             f"{OPS} -k leaky"),
    Mutation("facts: LeakyReLU grows as x", OPS_PIECEWISE, "growth=size,", "growth=1.0,", f"{OPS} -k 'growth and leaky'"),
    Mutation("facts: rounding of LeakyReLU's slope dropped", OPS_PIECEWISE, "own = (3.1 * arithmetic.unit * abs(slope) + arithmetic.tiny) * norm",
             "own = 0.1 * arithmetic.unit * norm", f"{OPS} -k 'executed and leaky'"),
    Mutation("facts: rounding of a clamp's bounds dropped", OPS_PIECEWISE,
             "0.0 if rounded == value else 1.01 * arithmetic.unit * abs(value) + arithmetic.tiny",
             "0.0", f"{OPS} -k 'rounded_parameters or executed'"),
    Mutation("facts: a clamp without its value at 0", OPS_PIECEWISE, "at_zero=min(max(0.0, low), high),", "at_zero=0.0,",
             f"{OPS} -k 'growth and (clamp or above)'"),
    Mutation("facts: one slope of PReLU for all", OPS_PIECEWISE, "if len(slopes) != 1:", "if False:", f"{OPS} -k 'prelu_of_different'"),
    Mutation("facts: Hardshrink taken for continuous", OPS_PIECEWISE, "    if size > 0:\n        raise", "    if False:\n        raise",
             f"{OPS} -k refused"),
    Mutation("facts: ELU without its kink", OPS_SMOOTH, "kinks=kinks((0.0, alpha, 1.0))", "kinks=()", f"{OPS} -k 'beyond and elu'"),
    Mutation("facts: half of ELU's curvature", OPS_SMOOTH, "curvature=abs(alpha)", "curvature=abs(alpha) / 2",
             f"{OPS} -k 'elu and (curvature or beyond)'"),
    Mutation("facts: CELU bends as ELU", OPS_SMOOTH, "curvature=math.nextafter(1 / alpha, math.inf)", "curvature=1.0", f"{OPS} -k 'celu'"),
    Mutation("facts: half of Softplus' curvature", OPS_SMOOTH, "math.nextafter(beta / 4, math.inf)", "math.nextafter(beta / 8, math.inf)",
             f"{OPS} -k softplus"),
    Mutation("facts: the jump of Softplus dropped", OPS_SMOOTH, "lost = own + (reach >= early).to(own.dtype) * (root * jump)", "lost = own",
             f"{OPS} -k 'jump_of_softplus'"),
    Mutation("facts: one neuron's jump of Softplus for all", OPS_SMOOTH, "(root * jump)", "jump", f"{OPS} -k 'jump_of_softplus'"),
    Mutation("facts: the overflow of Softplus not seen", OPS_SMOOTH, "torch.where(overflows, torch.full_like(lost, math.inf), lost)", "lost",
             f"{OPS} -k 'exponential_overflows'"),
    Mutation("facts: half of Softsign's curvature", OPS_SMOOTH, "slope=(0.0, 1.0), curvature=2.0", "slope=(0.0, 1.0), curvature=1.0",
             f"{OPS} -k softsign"),
    Mutation("facts: half of LogSigmoid's curvature", OPS_SMOOTH, "curvature=0.25", "curvature=0.125", f"{OPS} -k logsigmoid"),
    Mutation("facts: Mish's slope 1", OPS_SMOOTH, "MISH_SLOPE = (-0.1125262, 1.0884982)", "MISH_SLOPE = (-0.1125262, 1.0)", f"{OPS} -k mish"),
    Mutation("facts: Mish's curvature a little less", OPS_SMOOTH, "MISH_CURVATURE = 0.6442047", "MISH_CURVATURE = 0.6432047", f"{OPS} -k mish"),
    Mutation("facts: Hardswish without its kink at 3", OPS_SMOOTH, "kinks((-3.0, 0.0, -0.5), (3.0, 1.5, 1.0))", "kinks((-3.0, 0.0, -0.5))",
             f"{OPS} -k 'beyond and hardswish'"),
    Mutation("facts: 6x of Hardswish not seen to overflow", OPS_SMOOTH, "largest=lambda norm: 6 * norm", "largest=None",
             f"{OPS} -k overflow_and_divisors"),
    Mutation("facts: Hardsigmoid's kink as steep as a clamp's", OPS_PIECEWISE, "slope=(0.0, math.nextafter(sixth, 1.0))", "slope=(0.0, 1.0)",
             f"{OPS} -k hardsigmoid"),
    Mutation("local: slopes at the clean point for the whole interval", AT_ELEMENTWISE,
             "slope = (slope + self.curvature * each).clamp_max(self.steepest)",
             "slope = slope + 0 * each", f"{LOCAL} -k 'promises and gelu'"),
    Mutation("local: half of the curvature's weight", AT_BASE,
             "return 0.5 * (1 + 1e-12) * found.sum(-1)", "return 0.25 * (1 + 1e-12) * found.sum(-1)",
             f"{LOCAL} -k 'promises and (tanh or gelu)'"),
    Mutation("local: tanh's curvature of GELU", OPS_ELEMENTWISE,
             "curvature=0.7698004",
             "curvature=0.7598004", f"{LOCAL} -k 'curvatures'"),
    Mutation("local: GELU's lowest point of curvature forgotten", OPS_ELEMENTWISE,
             "torch.where(far < 2, -at(far), torch.full_like(far, GELU_CONCAVE))",
             "-at(far)", f"{LOCAL} -k 'where_a_neuron'"),
    Mutation("local: a quarter of the third derivative for a third", OPS_ELEMENTWISE,
             "GELU_THIRD / 3 * reach",
             "GELU_THIRD / 4 * reach", f"{LOCAL} -k 'where_a_neuron'"),
    Mutation("local: curvature in favour of the margin taken for the one against", AT_ELEMENTWISE,
             "Curved((size - g) / 2, (size + g) / 2)", "Curved((size + g) / 2, (size - g) / 2)", f"{LOCAL} -k 'bend_one_way'"),
    Mutation("local: quadratic forms without what rounds in front of the neurons", AT_BASE,
             "f.largest.sqrt() * bound.moved[:, at] + f.peak.sqrt() * bound.fresh[:, at]", "f.largest.sqrt() * bound.moved[:, at]",
             f"{LOCAL} -k 'forms'"),
    Mutation("local: quadratic forms for curvatures larger than theirs", AT_BASE,
             "torch.where(held, torch.fmin(found[..., at], formed), found[..., at])", "torch.fmin(found[..., at], formed)", f"{LOCAL} -k 'forms'"),
    Mutation("local: quadratic forms of one token for all", AT_BASE,
             "found[..., at] = torch.where(held, torch.fmin(found[..., at], formed), found[..., at])",
             "found[...] = torch.where(held[:, None], torch.fmin(found, formed.unsqueeze(-1)), found)", f"{LOCAL} -k 'forms'"),
    Mutation("local: quadratic forms kept by the next adjoint", AT_BASE,
             "torch.inf).scatter(0, chosen, found)", "torch.inf).scatter(0, (chosen + 1) % len(self.convex), found)", f"{LOCAL} -k 'forms'"),
    Mutation("an eigenvalue without what its factor leaves over", SPECTRAL,
             "found = up((t + left + rounded) * (1 + 1e-13))", "found = up((t + rounded) * (1 + 1e-13))", "tests/test_spectral.py -k eigenvalue"),
    Mutation("dual: one of the rivals that may win set aside", BY_DUAL,
             "most = max(1, int((~(spare > 0)).sum(-1).max()))", "most = max(1, int((~(spare > 0)).sum(-1).max()) - 1)", f"{LOCAL} -k 'set_aside'"),
    Mutation("dual: a reach that ends nowhere", BY_DUAL,
             "torch.where((epsilon <= limit)[:, None],", "torch.where((epsilon <= epsilon)[:, None],", f"{LOCAL} -k 'set_aside'"),
    Mutation("local: squares of neurons without their mean", SPECTRAL,
             "norm_up(size, 0) / a.shape[1] + top", "top", "tests/test_spectral.py -k quartic"),
    Mutation("local: the divisor does not enlarge underflow", OPS_ELEMENTWISE,
             "lost / self.divisor + root * arithmetic.tiny",
             "lost + root * arithmetic.tiny", f"{LOCAL} -k divisors"),
    Mutation("local: LayerNorm's curvature 1 instead of 2/√3", OPS_NORMALIZATION,
             "CURVATURE = 1.15471",
             "CURVATURE = 1.0", f"{LOCAL} -k 'normalisation_is'"),
    Mutation("local: LayerNorm bent by its centre, not its ball", AT_NORMALIZATION,
             "gain * inverse * radius.square()", "self.at_centre**2 * radius.square() * 0.3", f"{LOCAL} -k 'promises and (layernorm or rmsnorm)'"),
    Mutation("local: LayerNorm's gain at the centre", AT_NORMALIZATION,
             "gain = local_lipschitz(self.layer, self.input, radius)  #", "gain = local_lipschitz(self.layer, self.input, 0 * radius)  #",
             f"{LOCAL} -k 'promises and (layernorm or rmsnorm)'"),
    Mutation("local: sign of the residual weight kept", AT_STRUCTURE,
             "return Behind(up(skip * radius + weight * inner) + fresh,", "return Behind(up(skip * radius + self.weight * inner) + fresh,",
             f"{LOCAL} -k 'promises and residual'"),
    Mutation("local: rounding of the residual's sum dropped", OPS_JOINS,
             "fresh = (terms + 2) * arithmetic.unit * norm",
             "fresh = 0 * arithmetic.unit * norm", f"{LOCAL} -k 'rounding_as_executed and residual or rounding_as_executed and blocks'"),
    Mutation("local: √n of ℓ∞ to ℓ2 dropped", AT_STRUCTURE,
             "self.factor = l2_factor(space, clean.shape[-1])", "self.factor = 1.0",
             f"{LOCAL} -k 'promises and linf'"),
    Mutation("local: flattened tokens move as the largest of them", AT_STRUCTURE,
             "vector_norm(ball.radius, ord=order_of(self.space)", "vector_norm(ball.radius, ord=torch.inf", f"{LOCAL} -k 'promises and flatten'"),
    Mutation("local: Patchify's adjoint with rows and columns swapped", AT_STRUCTURE,
             "order = (*range(k - 5), k - 3, k - 5, k - 2, k - 4, k - 1)", "order = (*range(k - 5), k - 3, k - 4, k - 2, k - 5, k - 1)",
             f"{LOCAL} -k 'adjoints and patches'"),
    Mutation("local: Normalize keeps the size of the wrong token", AT_STRUCTURE,
             'by_token = ("clean", "reach")', 'by_token = ("clean",)', f"{LOCAL} -k through_normalize"),
    Mutation("local: a query's change does not move logits", AT_ATTENTION,
             "return self.s * moved.unsqueeze(-1) * self.key_distance", "return 0 * moved.unsqueeze(-1) * self.key_distance",
             f"{LOCAL} -k 'promises and attention'"),
    Mutation("local: a key's change does not move logits", AT_ATTENTION,
             "return self.s * self.nq.unsqueeze(-1) * moved.unsqueeze(-2)", "return 0 * self.nq.unsqueeze(-1) * moved.unsqueeze(-2)",
             f"{LOCAL} -k 'promises and attention'"),
    Mutation("local: values move by their mean only", AT_ATTENTION,
             "head = up((dev * self.value_distance).sum(-1) * (1 + 1e-12) + mixed * (1 + 1e-12)) + after",
             "head = up(mixed * (1 + 1e-12)) + after", f"{LOCAL} -k 'promises and attention'"),
    Mutation("local: what key and value do together dropped", AT_ATTENTION,
             "crossed = (dev * r_k.unsqueeze(-2)).sum(-1)", "crossed = 0 * (dev * r_k.unsqueeze(-2)).sum(-1)",
             f"{LOCAL} -k 'promises and attention or survive'"),
    Mutation("local: softmax's curvature dropped", AT_ATTENTION,
             "return spread * (1 + 1e-8), drawn * (1 + 1e-8)", "return 0 * spread, drawn * (1 + 1e-8)",
             f"{LOCAL} -k 'promises and attention or worst_attention or evolved or softmax_ball'"),
    Mutation("local: the mean of the logits' change stays where it was", AT_ATTENTION,
             "speed = (reach * square).sum(-1, keepdim=True)", "speed = 0 * (reach * square).sum(-1, keepdim=True)", f"{LOCAL} -k key_by_key"),
    Mutation("local: softmax's variance dropped", AT_ATTENTION,
             "return spread * (1 + 1e-8), drawn * (1 + 1e-8)", "return spread * (1 + 1e-8), 0 * drawn", f"{LOCAL} -k key_by_key"),
    Mutation("local: rows whose logits may do anything treated as the others", AT_ATTENTION,
             "spread = torch.where(self.lost, plain, torch.minimum(spread, plain))", "spread = torch.minimum(spread, plain)",
             f"{LOCAL} -k 'rounding_as_executed and peaked or key_by_key'"),
    Mutation("local: softmax's second order weighted by the wrong sign", AT_ATTENTION,
             "against = (lost.unsqueeze(-1) - omega)", "against = (lost.unsqueeze(-1) + omega)", f"{LOCAL} -k 'against_the_margin'"),
    Mutation("local: functionals bounded on one side", AT_JACOBIAN,
             "part.adjoint(g, two_sided=True)", "part.adjoint(g)", f"{LOCAL} -k 'layers_in_front'"),
    Mutation("local: functionals without what the layers in front add", AT_JACOBIAN,
             "bounded(norms * first[:, 0], weights, bounds, first[:, 0])", "norms * first[:, 0]",
             f"{LOCAL} -k 'layers_in_front'"),
    Mutation("local: the largest weight taken off the sum of all", AT_ATTENTION,
             "lower = low / (low + others(high) + 1e-300)",
             "lower = low / (low + (high.sum(-1, keepdim=True) - high).clamp_min(0.0) + 1e-300)", f"{LOCAL} -k survive"),
    Mutation("local: keys that overflow spoil their own query only", AT_ATTENTION,
             "return (sizes if by_query else self._top(sizes)).amax(-2)", "return sizes.amax(-2)", f"{LOCAL} -k overflows"),
    Mutation("local: radii through Jacobians without remainders", AT_JACOBIAN,
             "up(self.norms[l][0].unsqueeze(-1) * first + beyond)", "up(self.norms[l][0].unsqueeze(-1) * first)", f"{LOCAL} -k 'layers_in_front'"),
    Mutation("local: radii through Jacobians of the wrong layer", AT_JACOBIAN,
             "self.norms[l][k + 1].unsqueeze(-1) * remainders[k]", "0 * remainders[k]", f"{LOCAL} -k 'all_layers_behind'"),
    Mutation("local: the head's own weight change dropped", BY_LOCAL,
             "own = 2**0.5 * (1 + 1e-15) * reference.head_change(epsilon)", "own = 0 * reference.head_change(epsilon)",
             f"{LOCAL} {MINE} -k 'weights or sensitivity'"),
    Mutation("local: rounding of the head dropped", BY_LOCAL,
             "return up(reference.pairs * hidden.unsqueeze(-1) + own.unsqueeze(-1)) + 2 * reference.single(hidden, epsilon).unsqueeze(-1)",
             "return up(reference.pairs * hidden.unsqueeze(-1) + own.unsqueeze(-1))", f"{LOCAL} -k rounding_attacks"),
    Mutation("dual: rounding of the head dropped", BY_DUAL,
             "2 * reference.largest_row * hidden + 2 * reference.single(hidden, epsilon)", "2 * reference.largest_row * hidden",
             f"{LOCAL} -k rounding_attacks"),
    Mutation("dual: ℓ2 norm of the gradient for every threat", BY_DUAL,
             "ord=dual_order_of(threat.norm)", "ord=2.0", f"{LOCAL} -k 'first_order'"),
    Mutation("dual: tokens moved on their own, joined by root of squares", BY_DUAL,
             "return up(torch.linalg.vector_norm(chosen, dim=-1).sum(-1) * (1 + 1e-12))",
             "return up(torch.linalg.vector_norm(chosen, dim=-1).square().sum(-1).sqrt() * (1 + 1e-12))", f"{LOCAL} -k 'first_order'"),
    Mutation("dual: rivals beyond the first few never looked at", BY_DUAL,
             "if not bool(open_.any()):", "if True:", f"{LOCAL} -k all_rivals"),
    Mutation("a change that vanishes between tiny weights counts as none", BASE,
             "behind.change + VANISHED", "behind.change", f"{CERTIFY} {HOSTILE} -k 'tiny_weights'"),
    Mutation("a Lipschitz bound that overflowed is not infinite", "robustlip/certifiers/bounds.py",
             "step).nan_to_num(torch.inf, torch.inf)", "step).nan_to_num(0.0, torch.inf)", f"{CERTIFY} -k 'bound_that_overflows'"),
    Mutation("a sensitivity to weights that overflowed is not infinite", "robustlip/certifiers/bounds.py",
             "change).nan_to_num(torch.inf, torch.inf)", "change).nan_to_num(0.0, torch.inf)", f"{CERTIFY} -k 'sensitivity'"),
    Mutation("soft cap: decay beyond 1 taken as shrinking below 0", "robustlip/constraints/softcap.py",
             "k = w_max * abs(1 - decay) + update_norm", "k = w_max * (1 - decay) + update_norm", f"{CONSTRAINTS} -k 'turns_the_weights_round'"),
    Mutation("Muon in 16 bits states the step of exact arithmetic", "robustlip/muon.py",
             "POLYNOMIALS[self.polynomial].peak * self._slack", "POLYNOMIALS[self.polynomial].peak", f"{CONSTRAINTS} -k 'bfloat16_are_as_large'"),
    # ---- domains/lines, and the Lagrange dual of domains/quadratic
    Mutation("dense: a layer that nobody named is the identity", MLP_NETWORK,
             "elif type(layer) in _STEPS:", "elif _STEPS.setdefault(type(layer), _Builder.nothing):", f"{WALKS} -k 'does_not_name and dense'"),
    Mutation("dense: a sorting layer that nobody named is GroupSort(2)", MLP_NETWORK,
             "if type(layer) not in (MaxMin, GroupSort) or (isinstance(layer, GroupSort) and layer.group != 2):", "if False:",
             f"{WALKS} -k 'named_layers'"),
    Mutation("dense: drift without the errors of the matrices", MLP_NETWORK,
             "fresh = stage.weight_error * before + stage.bias_error", "fresh = stage.bias_error + 0 * before", f"{EXACT} -k drift"),
    Mutation("dense: drift without the errors of the biases", MLP_NETWORK,
             "fresh = stage.weight_error * before + stage.bias_error", "fresh = stage.weight_error * before", f"{EXACT} -k drift"),
    Mutation("dense: rounding of the float64 pass dropped", MLP_NETWORK,
             "fresh = gamma(stage.terms + 2, unit) * (stage.magnitude * before + stage.shift)", "fresh = 0 * before",
             f"{EXACT} -k 'forward_errors or margins_at_a_point'"),
    Mutation("dense: what activations are at 0 left out of the sizes", MLP_NETWORK,
             "before = previous.slope * before + abs(previous.curve.at_zero) * math.sqrt(len(previous.bias))", "before = previous.slope * before",
             f"{EXACT} -k sizes"),
    Mutation("dense: biases left out of the sizes", MLP_NETWORK,
             "* before + stage.shift + stage.bias_error))", "* before + stage.bias_error))", f"{EXACT} -k sizes"),
    Mutation("dense: joined matrices state no error", STAGES,
             "made_error = torch.zeros_like(made) if plain else through(", "made_error = torch.zeros_like(made) if True else through(",
             f"{OF_MLP} -k joined_matrices"),
    Mutation("dense: the minimum where the maximum goes", MLP_NETWORK, "high, low = b, a", "high, low = a, b", f"{OF_MLP} -k networks_are"),
    Mutation("dense: a residual without its skip", MLP_NETWORK,
             "own[h:], other[h:] = layer.skip, layer.weight", "own[h:], other[h:] = 0.0, layer.weight", f"{OF_MLP} -k networks_are"),
    Mutation("intervals: rounding of a step dropped", MLP_LINEAR,
             "stage.absolute(half + 4 * loss * size)", "stage.absolute(half)", f"{EXACT} -k interval_steps"),
    Mutation("intervals: rounding at the size of the bias dropped", MLP_LINEAR,
             " * (1 + loss) + 4 * loss * stage.bias.abs()", " * (1 + loss)", f"{EXACT} -k interval_steps"),
    Mutation("intervals: weights of either sign spread with their sign", STAGES,
             "return h @ self.weight.abs().mT", "return h @ self.weight.mT", f"{EXACT} -k interval_steps"),
    Mutation("intervals: rounding of the first box dropped", MLP_LINEAR,
             "* reach * (1 + 8 * U64) + slack", "* reach * (1 + 8 * U64)", f"{EXACT} -k first_boxes"),
    Mutation("intervals: a neuron that passes by the activation bent by it", MLP_LINEAR,
             "torch.where(stage.linear, low, below)", "below", f"{EXACT} -k 'pass_by'"),
    Mutation("intervals: the head's rounding dropped", MLP_LINEAR,
             'torch.einsum("ncm,nm->nc", weight.abs(), half) - slack', 'torch.einsum("ncm,nm->nc", weight.abs(), half)',
             f"{EXACT} -k boxes_of_points"),
    Mutation("intervals: the head's row spread with its sign", MLP_LINEAR,
             '- torch.einsum("ncm,nm->nc", weight.abs(), half)', '- torch.einsum("ncm,nm->nc", weight, half)',
             f"{EXACT} -k 'extreme_points and interval'"),
    Mutation("balls: the dual norm of ℓ∞ taken for ℓ2", MLP_LINEAR,
             "ord=dual_order_of(self.norm)", "ord=2.0 if self.norm == 'linf' else dual_order_of(self.norm)",
             f"{EXACT} -k 'dual_norms'"),
    Mutation("balls: √n of ℓ∞ to ℓ2 dropped", MLP_LINEAR,
             "up(self.radius * l2_factor(self.norm, self.x.shape[-1]))", "up(self.radius)", f"{EXACT} -k 'dual_norms'"),
    Mutation("balls: rounding of the dual norm dropped", MLP_LINEAR,
             "* (1 + gamma(rows.shape[-1] + 8, U64)) + 1e-140", "", f"{EXACT} -k 'dual_norms'"),
    Mutation("crown: intercepts of the wrong line", MLP_LINEAR,
             "(rows.clamp_min(0.0) @ below[..., None] + rows.clamp_max(0.0) @ above[..., None])",
             "(rows.clamp_min(0.0) @ above[..., None] + rows.clamp_max(0.0) @ below[..., None])", f"{EXACT} -k 'extreme_points and crown'"),
    Mutation("crown: slopes of the wrong line", MLP_LINEAR,
             "torch.where(rows >= 0, lower[:, None], upper[:, None])", "torch.where(rows >= 0, upper[:, None], lower[:, None])",
             f"{EXACT} -k 'extreme_points and crown'"),
    Mutation("crown: rounding dropped", MLP_LINEAR,
             "ball.dual(rows) * (1 + 8 * U64) - slack", "ball.dual(rows) * (1 + 8 * U64)", f"{EXACT} -k 'margins_at_a_point and crown'"),
    Mutation("crown: the ball left out", MLP_LINEAR,
             "return value - ball.radius[:, None] * ball.dual(rows) * (1 + 8 * U64) - slack", "return value - slack",
             f"{EXACT} -k 'extreme_points and crown'"),
    Mutation("crown: upper ends by rows of the wrong sign", MLP_LINEAR,
             "-backward(network, ball, boxes, i, -eye)", "backward(network, ball, boxes, i, eye)", f"{EXACT} -k 'extreme_points and crown'"),
    Mutation("curves: slack of the slopes divided by 4", MLP_CURVES,
             "slack = self.curvature * width / 2 + 1e-12", "slack = self.curvature * width / 8 + 1e-12", f"{EXACT} -k 'between_the_points'"),
    Mutation("curves: slack of the lines divided by 4", MLP_CURVES,
             "self.curvature * width.square() / 8", "self.curvature * width.square() / 32", f"{EXACT} -k 'between_the_points'"),
    Mutation("curves: lines without what lies between points", MLP_CURVES,
             "low, high) + sag\n", "low, high)\n", f"{EXACT} -k 'between_the_points'"),
    Mutation("curves: the global minimum forgotten", MLP_CURVES,
             "least = torch.where(holds, torch.full_like(least, value), least)", "least = torch.where(holds, least, least)",
             f"{EXACT} -k 'between_the_points'"),
    Mutation("curves: rounding of bands dropped", MLP_CURVES,
             "return least - slack, torch.maximum(a, b) + slack", "return least, torch.maximum(a, b)", f"{EXACT} -k 'forty_digits'"),
    Mutation("curves: rounding of relu's chord dropped", MLP_CURVES,
             "torch.maximum(-chord * low, high - chord * high) + 4 * U64 * (high - low)", "torch.maximum(-chord * low, high - chord * high)",
             f"{EXACT} -k chords"),
    Mutation("curves: relu's chord as its lower line", MLP_CURVES,
             "return below * one, zero, chord, top", "return chord, top, chord, top", f"{EXACT} -k chords"),
    Mutation("curves: secants of relu from one centre for all", MLP_CURVES,
             "(high - last).clamp_min(1e-300)", "(high - first).clamp_min(1e-300)", f"{EXACT} -k secants_of_relu"),
    Mutation("curves: secants of relu to the left from one centre for all", MLP_CURVES,
             "(first / (first - low).clamp_min(1e-300))", "(last / (last - low).clamp_min(1e-300))", f"{EXACT} -k secants_of_relu"),
    Mutation("curves: corners of pieces left out of lines", MLP_CURVES,
             "[low, *(low.clamp_min(place).minimum(high) for place in self.places), high]", "[low, high]",
             f"{OF_MLP} -k 'forty_digits and (leaky or clamp)'"),
    Mutation("curves: intercepts of pieces by the ends alone", MLP_CURVES,
             "rest = values - slopes.unsqueeze(1) * corners", "rest = (values - slopes.unsqueeze(1) * corners)[:, [0, -1]]",
             f"{OF_MLP} -k 'forty_digits and (leaky or clamp)'"),
    Mutation("curves: kinks left out of a smooth curve's slopes", MLP_CURVES,
             "inside = (grid[-POINTS] <= place) & (grid[-1] >= place)", "inside = torch.zeros_like(grid[-1], dtype=torch.bool)",
             f"{EXACT} -k 'between_the_points and (selu or hardswish or elu)'"),
    Mutation("curves: kinks left out of a smooth curve's grid", MLP_CURVES,
             "grid = torch.cat([torch.minimum(torch.maximum(places, low), high), grid])",
             "pass",
             f"{EXACT} -k 'between_the_points and (selu or hardswish or elu)'"),
    Mutation("curves: a divided curve bends as if divided twice", MLP_CURVES,
             "lambda z: facts.derivative(z) / by",
             "lambda z: facts.derivative(z) / by**2", f"{EXACT} -k 'divided_curve'"),
    Mutation("curves: tanh's curvature too small", OPS_ELEMENTWISE,
             "curvature=0.7698004",
             "curvature=0.7598004", f"{OF_MLP} -k 'curvature_and_minimum and tanh'"),
    Mutation("local slopes: rounding of the clean margin dropped", MLP_LOCAL,
             "return margin - total - 2 * errors[-1][:, None] - 4 * U64 * margin.abs(), total", "return margin - total, total",
             f"{EXACT} -k 'margins_at_a_point and local'"),
    Mutation("local slopes: intervals of slopes half as wide", MLP_LOCAL,
             "halves.append((b - a).clamp_min(0.0) / 2 +", "halves.append((b - a).clamp_min(0.0) / 4 +",
             f"{EXACT} {OF_MLP} -k 'extreme_points and local or on_a_line'"),
    Mutation("local slopes: the reach of the wrong layer", MLP_LOCAL,
             "steepest[-1] * gain[i + 1] if", "steepest[-1] * gain[i] if", f"{EXACT} -k 'extreme_points and local'"),
    Mutation("local slopes: gain of ℓ∞ replaced by σ(W)", MLP_LOCAL,
             '"linf": infinity_to_two_bound', '"linf": spectral_norm_bound', f"{EXACT} -k 'extreme_points and local or plain_bounds and linf'"),
    Mutation("radii: the drift of the matrices not lost", MLP_RADII,
             " + 2**0.5 * (1 + 1e-15) * drift[:, None])", ")", f"{OF_MLP} -k what_rounding_takes"),
    Mutation("radii: one logit rounds, not two", MLP_RADII,
             "2 * single[:, None] + 2**0.5", "single[:, None] + 2**0.5", f"{OF_MLP} -k what_rounding_takes"),
    Mutation("radii: rounding of the hidden state dropped", MLP_RADII,
             "return up(factor * state.rounding[:, None] + 2", "return up(0 * state.rounding[:, None] + 2", f"{OF_MLP} -k what_rounding_takes"),
    Mutation("radii: what rounding takes not taken off the bound", MLP_RADII,
             "feasible = ((value - lost).scatter(", "feasible = ((value - 0 * lost).scatter(", f"{EXACT} -k 'nothing_that_rounding'"),
    Mutation("radii: the last radius tried, feasible or not", MLP_RADII,
             "best = torch.where(feasible, torch.maximum(best, trial), best)", "best = torch.where(live, trial, best)",
             f"{OF_MLP} -k 'linear_models'"),
    Mutation("quadratic: all rounding dropped", MLP_QUADRATIC,
             "- length.square() - slack * (1 + 1e-9)", "- length.square()", f"{EXACT} -k offsets_hold_at"),
    Mutation("quadratic: what the factor leaves over dropped", MLP_QUADRATIC,
             " + defect * it.reach.square()", "", f"{EXACT} -k offsets_hold_whatever"),
    Mutation("quadratic: what the solution leaves over dropped", MLP_QUADRATIC,
             " + 2 * rest * it.reach", "", f"{EXACT} -k offsets_hold_whatever"),
    Mutation("quadratic: the minimum over v left out", MLP_QUADRATIC,
             "constant - length.square() - slack", "constant - slack", f"{EXACT} -k offsets_hold_whatever"),
    Mutation("quadratic: minima at the ends only", MLP_QUADRATIC,
             "inside = (square > 0) & (vertex > low) & (vertex < high)", "inside = (square > 0) & (vertex > high)", f"{OF_MLP} -k minima_on"),
    Mutation("quadratic: a domain without the activations", MLP_QUADRATIC,
             "reach2 = reach2 + (high.clamp_min(0.0) * crossing).square().sum(-1)", "reach2 = reach2 + 0 * high.sum(-1)",
             f"{EXACT} -k domain_of_the_form"),
    Mutation("quadratic: another curve taken for relu", MLP_QUADRATIC, "if not network.piecewise_linear:", "if False:", f"{WALKS} -k quadratic_dual"),
    Mutation("dual of relu: the gain of the first layer left out", MLP_DUAL,
             "math.prod(gain[:-1])", "math.prod(gain[1:-1])", f"{EXACT} -k plain_bounds"),
    Mutation("dual of relu: what rounding takes not taken off constants", MLP_DUAL,
             "- error - error.gather(1, own) - lost", "- error - error.gather(1, own)", f"{EXACT} -k 'nothing_that_rounding'"),
    Mutation("dual of relu: what rounding takes not taken off lines", MLP_DUAL,
             "held = linear_margins(network, ball, boxes, y) - lost > 0", "held = linear_margins(network, ball, boxes, y) > 0",
             f"{EXACT} -k 'nothing_that_rounding'"),
    Mutation("dual of relu: what rounding takes not taken off multipliers", MLP_DUAL,
             "parts = proved_offset(dual) - plain.lost[at],", "parts = proved_offset(dual),", f"{EXACT} -k 'nothing_that_rounding'"),
    # ---- domains/quadratic
    Mutation("sdp: rounding of products dropped", SDP_VERIFY,
             "rad = gamma(k + 2, U64) * (size_a @ size_b)", "rad = 0 * (size_a @ size_b)", f"{OF_SDP} -k products_of_balls"),
    Mutation("sdp: the second factor's radius dropped", SDP_VERIFY,
             "rad = rad + size_a @ b.rad", "rad = rad + 0 * (size_a @ b.rad)", f"{OF_SDP} -k 'products_of_balls or not_forgotten'"),
    Mutation("sdp: differences forget what is subtracted", SDP_VERIFY,
             "Ball(mid, (self.radius() + other.radius() + mid.abs()", "Ball(mid, (self.radius() + mid.abs()",
             f"{EXACT} -k rows_of_pairs"),
    Mutation("sdp: errors of coefficients dropped", SDP_VERIFY,
             "if bool((self.error > 0).any()):", "if False:", f"{EXACT} -k errors_of_coefficients"),
    Mutation("sdp: a dominating matrix that is not raised", SDP_VERIFY,
             "return mid.diagonal_scatter(raised)", "return mid", f"{OF_SDP} -k dominating"),
    Mutation("sdp: positive whatever the radius of the ball", SDP_VERIFY,
             "shift = spread_norm + 8 * n * gamma(n + 8, U64)", "spread_norm, shift = 0.0, 8 * n * gamma(n + 8, U64)",
             f"{OF_SDP} -k 'not_forgotten'"),
    Mutation("sdp: a Cholesky factor believed", SDP_VERIFY,
             "return norm + spread_norm < shift", "return spread_norm < shift", f"{OF_SDP} -k 'cholesky_factor'"),
    Mutation("sdp: a program proved by its multipliers' signs alone", SDP_PROGRAM,
             "return proved_positive(at_zero.plus(Ball(torch.diag(diagonal))))", "return True", f"{OF_SDP} -k 'nothing_below'"),
    Mutation("sdp: the solver's guess believed", SDP_PROGRAM,
             "if holds(program, rho, guesses[k], enclosed):", "if True:", f"{OF_SDP} -k 'too_small_is_not_believed'"),
    Mutation("sdp: half of ρ proved", SDP_PROGRAM,
             "diagonal[: program.rows] = rho", "diagonal[: program.rows] = 2 * rho", f"{OF_SDP} -k 'nothing_below'"),
    Mutation("sdp: what rounding made of Q forgotten", SDP_PROGRAM,
             "total = Ball(-self.q.mid, self.q.radius())", "total = Ball(-self.q.mid)", f"{EXACT} -k radii_of_programs"),
    Mutation("sdp: a step believed that was not proved", SDP_REACH,
             "if _holds(front, cross, base, x):", "if True:", f"{OF_SDP} -k 'too_small_is_not_believed or smallest_and_never'"),
    Mutation("sdp: rounding of rows dropped", SDP_REACH,
             "square = total + lost *", "square = total + 0 * lost *", f"{EXACT} -k rows_that_cancel"),
    Mutation("sdp: constants where nothing was proved", SDP_CONSTANTS, "if not proved:", "if False:", f"{EXACT} -k not_proved"),
    Mutation("eclipse: a failed step counts as proved", SDP_ECLIPSE,
             "        x = through_activation(constraint, g, found[-1])\n        if x is None:\n            return found, None, False",
             "        x = through_activation(constraint, g, found[-1])\n        if x is None:\n            return found, None, True",
             f"{EXACT} -k not_proved"),
    Mutation("sdp: a pair of logits moves no more than all", SDP_CONSTANTS,
             "whole * math.sqrt(2) * (1 + 1e-15)", "whole * (1 + 1e-15)", f"{EXACT} -k root_two"),
    Mutation("sdp: √n of ℓ∞ to ℓ2 dropped", SDP_CONSTANTS,
             "growth = l2_factor(threat.norm, size)", "growth = 1.0", f"{OF_SDP} -k 'radii_are_margins and linf'"),
    Mutation("sdp: rounding of the hidden state counted for one pass only", SDP_CONSTANTS,
             "2 * heads * state.rounding[:, None] + 4", "heads * state.rounding[:, None] + 4", f"{EXACT} -k 'clean_pass_rounds and eclipse'"),
    Mutation("sdp: rounding of the head counted for one pass only", SDP_CONSTANTS,
             "+ 4 * single[:, None])", "+ 2 * single[:, None])", f"{EXACT} -k 'clean_pass_rounds and eclipse'"),
    Mutation("sdp: GELU's slopes taken for ReLU's", SDP_QUADRATIC,
             "(Fraction(s) / Fraction(facts.divisor) for s in facts.slope)",
             "(Fraction(s) / Fraction(facts.divisor) for s in (0.0, 1.0))", f"{OF_SDP} -k 'constraints_hold and gelu'"),
    Mutation("sdp: half the difference of a pair", SDP_QUADRATIC,
             "read = _rows(both, torch.tensor([1.0, -1.0]), width)", "read = _rows(both, torch.tensor([0.5, -0.5]), width)",
             f"{OF_SDP} -k 'constraints_hold and maxmin'"),
    Mutation("sdp: a sort that nobody named is GroupSort", SDP_QUADRATIC, "if type(layer) is not GroupSort:", "if False:",
             f"{WALKS} -k 'named_layers'"),
    Mutation("sdp: Normalize by its mean std", SDP_NETWORK,
             "gain = gain / float(layer.std.double().abs().min())", "gain = gain / float(layer.std.double().abs().mean())",
             f"{EXACT} -k numbers_are_divided"),
    Mutation("sdp: pairs without the second row's radius", SDP_NETWORK,
             ".minus(Ball(head.mid[second], radius[second]))", ".minus(Ball(head.mid[second]))", f"{EXACT} -k rows_of_pairs"),
    # ---- certifiers/sequence.py
    Mutation("sequence: one logit rounds, not two", SEQUENCE,
             "2 * whole.single(radius, epsilon[:, None])", "whole.single(radius, epsilon[:, None])", f"{EXACT} -k 'two_logits and all'"),
    Mutation("sequence: any rival that loses is enough", SEQUENCE,
             "return (lost < whole.margin).all(-1)", "return (lost < whole.margin)[:, :, :].isfinite().all(-1) & (lost < whole.margin).any(-1)",
             f"{EXACT} -k 'two_logits and all'"),
    Mutation("sequence: only the first token moves", SEQUENCE,
             "first = epsilon[:, None, None].expand(-1, 1, length)", "first = epsilon[:, None, None] * (torch.arange(length) == 0)",
             f"{SEQUENCES} -k 'as_their_windows'"),
    Mutation("sequence: tokens behind the next reach a prediction", SEQUENCE, "if not is_causal(chain):", "if False:",
             f"{SEQUENCES} {WALKS} -k 'no_sequence or nobody_named_may'"),
    Mutation("dual: tokens of unnamed layers do not move", BY_DUAL,
             "m.causal if type(m) is Attention else type(m) in _BY_TOKEN", "m.causal if type(m) is Attention else True",
             f"{WALKS} -k 'nobody_named_may'"),
    Mutation("local: one logit rounds, not two", BY_LOCAL,
             "2 * reference.single(hidden, epsilon)", "reference.single(hidden, epsilon)", f"{EXACT} -k 'methods_of_expansions and local'"),
    Mutation("dual: one logit rounds, not two", BY_DUAL,
             "hidden + 2 * reference.single(hidden, epsilon)", "hidden + reference.single(hidden, epsilon)",
             f"{EXACT} -k 'methods_of_expansions and dual'"),
    # ---- rules/convolution.py
    Mutation("convolution: windows counted along one dimension", OPS_CONVOLUTION,
             "reach = math.sqrt(rows.reads * columns.reads) * (1 + 1e-15)", "reach = math.sqrt(rows.reads) * (1 + 1e-15)", f"{CONVS} -k 'true_norm'"),
    Mutation("convolution: copies by padding not counted", OPS_CONVOLUTION,
             "dilation)) * math.sqrt(copies) for w in grouped]", "dilation)) for w in grouped]",
             f"{RULES} -k 'replicate and change_is'"),
    Mutation("convolution: circular padding more than once round counted once", OPS_CONVOLUTION,
             "padded - d * (k - 1) <= size", "True", f"{RULES} -k 'circular-twice and change_is'"),
    Mutation("convolution: ℓ∞ without the positions", OPS_CONVOLUTION,
             "by_rows = float(sums) * math.sqrt(positions) * (1 + 1e-12)", "by_rows = float(sums) * (1 + 1e-12)",
             f"{RULES} -k 'infinity_and_one and conv'"),
    Mutation("convolution: ℓ1 without the copies", OPS_CONVOLUTION, ".amax()) * copies", ".amax())",
             f"{RULES} {CONVS} -k 'infinity_and_one and replicate or true_norm_for'"),
    Mutation("convolution: a bias added at one position", OPS_CONVOLUTION,
             "float(norm_up(layer.bias.detach(), 0)) * math.sqrt(positions) * (1 + 1e-15)", "float(norm_up(layer.bias.detach(), 0))",
             f"{EXACT} -k 'bias_of_a_convolution'"),
    Mutation("convolution: rounding that arrives is lost", CONVOLUTION,
             "rounding=(c.gain + perturbed) * state.rounding + fresh", "rounding=fresh", f"{EXACT} -k 'arrives_at_a_convolution'"),
    Mutation("convolution: products of the perturbation do not round", OPS_CONVOLUTION,
             "return self.reach * self.frobenius + self.rank * change", "return self.reach * self.frobenius + 0 * change",
             f"{EXACT} -k 'perturbed_convolution'"),
    Mutation("convolution: its own weight change dropped", CONVOLUTION,
             "change=c.gain_from(state.space) * state.change + perturbed * state.norm,", "change=c.gain_from(state.space) * state.change,",
             f"{RULES} -k 'weight_perturbations and conv'"),
    Mutation("convolution: sums not seen to overflow", CONVOLUTION,
             "return context.finite(behind, c.largest(state.norm, perturbed))", "return behind", f"{EXACT} -k 'partial_sums'"),
    Mutation("pooling: overlapping windows counted once", OPS_CONVOLUTION,
             "return math.sqrt(self.reads / self.size) * (1 + 1e-15)", "return math.sqrt(1 / self.size) * (1 + 1e-15)",
             f"{RULES} -k 'avgpool-overlap and change_is'"),
    Mutation("convolution: a subnormal bias not counted", OPS_CONVOLUTION,
             "fresh) + math.sqrt(width) * arithmetic.flushed", "fresh)", f"{SUBNORMALS} -k 'rules and conv-bias'"),
    Mutation("maps: the adjoint drops as much in front as behind", OPS_MAPS,
             "padded = padded.narrow(dim, before, size)", "padded = padded.narrow(dim, behind, size)", f"{MAPS} -k convolutions"),
    Mutation("maps: copies of padding do not come back", OPS_MAPS,
             "padded = padded.new_zeros(shape).index_add(dim, source, padded)", "padded = padded.narrow(dim, before, size)",
             f"{MAPS} -k convolutions"),
    Mutation("maps: |A| with the signs of A", OPS_MAPS,
             "return self._convolved(images, self.weight.abs() if absolute else self.weight)", "return self._convolved(images, self.weight)",
             f"{MAPS} -k convolutions"),
    Mutation("maps: rows without the copies of padding", OPS_MAPS, "self.copies * squares", "squares", f"{MAPS} -k convolutions"),
    Mutation("maps: squares of small weights vanish", OPS_MAPS,
             "scale = torch.where(largest > 0, largest, torch.ones_like(largest))", "scale = torch.ones_like(largest)", f"{MAPS} -k every_scale"),
    Mutation("maps: means at the border divided by what is there", OPS_MAPS,
             "self.kernel, self.stride, self.padding).reshape(*x", "self.kernel, self.stride, self.padding, count_include_pad=False).reshape(*x",
             f"{MAPS} -k means"),
    Mutation("maps: the adjoint's sums counted as one product", OPS_MAPS,
             "shape, out, weight[0].numel(), weight.shape[0] // layer.groups * reads", "shape, out, weight[0].numel(), 1", f"{MAPS} -k convolutions"),
    Mutation("local: a convolution without its bias", OPS_MAPS,
             "return y if self.bias is None else y + self.bias", "return y", f"{LOCAL} -k 'promises and conv-linf'"),
    Mutation("local: rounding of a map dropped", AT_CONVOLUTION,
             "return up(self.gain * ball.radius), self.scope.fits(up(fresh * spread), largest)", "return up(self.gain * ball.radius), 0 * fresh",
             f"{LOCAL} -k 'as_executed and conv'"),
    Mutation("local: what rounds of a map not at its place", AT_LINEAR, "[fresh, ball.radius.amax(-1, keepdim=True)] if remainder",
             "[0 * fresh, ball.radius.amax(-1, keepdim=True)] if remainder", f"{LOCAL} -k 'as_executed and conv'"),
    Mutation("local: changes of a convolution's weights dropped", AT_CONVOLUTION, ") + perturbed * norm, c.largest", "), c.largest",
             f"{LOCAL} {NETS} -k 'weight'"),
    Mutation("local: convolutions by the norm of another space", AT_CONVOLUTION, "c.gain, c.gain_from(scope.space),", "c.gain, c.gain,",
             f"{LOCAL} -k 'promises and conv-linf'"),
    Mutation("local: filters of pairs without what they read", AT_CONVOLUTION,
             "mixed = by[:, :1, None, None] * m.weight[channels_a] + by[:, 1:, None, None] * m.weight[channels_b]",
             "mixed = by[:, :1, None, None] * m.weight[channels_a] + 0 * m.weight[channels_b]", f"{LOCAL} -k 'promises and conv-maxmin'"),
    Mutation("local: pairs of two groups taken for one filter", AT_CONVOLUTION,
             "if bool((channels_a // together != channels_b // together).any()):", "if False:", f"{NETS} -k rows_of_pairs"),
    Mutation("local: gains of batch norm behind a convolution dropped from rows", AT_LINEAR,
             "self.rows = up(second.rows * first.rows)", "self.rows = first.rows", f"{LOCAL} -k 'promises and conv-norm'"),
    Mutation("local: what a convolution rounds in front of batch norm is lost", AT_LINEAR,
             "up(self.second.sigma * fresh) + self.second.parts(", "self.second.parts(",
             f"{NETS} -k composed"),
    Mutation("local: what batch norm rounds behind a convolution is lost", AT_LINEAR,
             "+ self.second.parts(replace(ball, radius=moved + fresh))[1]", "",
             f"{NETS} -k composed"),
    Mutation("kinks of images: no place where they begin", AT_CROSSING,
             "return torch.minimum(norm_up(self.crossing), up(self.height * self.share.amax(-1) * self.whole))",
             "return torch.minimum(norm_up(self.crossing), up(self.height * self.share.amin(-1) * self.whole))",
             f"{LOCAL} -k 'promises and conv-relu'"),
    Mutation("kinks of images: together by the mean share", AT_CROSSING,
             "norm_up(falling * share) * together", "norm_up(falling) * share.mean(-1) * together",
             f"{LOCAL} -k 'promises and (conv or maxima or image)'"),
    Mutation("kinks of images: sorting counted once, not twice", AT_SORTING, "Kinks(None, near, each, whole, height=2.0)",
             "Kinks(None, near, each, whole)",
             f"{LOCAL} -k 'promises and image-maxmin'"),
    Mutation("maxima: overlapping windows move as one", AT_CONVOLUTION,
             "self.whole, self.root = out, math.sqrt(reads) * (1 + 1e-15)", "self.whole, self.root = out, 1.0",
             f"{LOCAL} -k 'promises and maxima-overlap'"),
    Mutation("maxima: two numbers that part counted as one", AT_CONVOLUTION, "each = (math.sqrt(2) * (1 + 1e-15) * radius)",
             "each = (0.7 * radius)", f"{LOCAL} -k 'promises and maxima'"),
    Mutation("maxima: as far from the next as from all", AT_CONVOLUTION, "gap = two[:, 0] - two[:, 1]", "gap = patches.amax(1) - patches.mean(1)",
             f"{LOCAL} -k 'promises and maxima'"),
    Mutation("maxima: subnormals that count for zero are lost", AT_CONVOLUTION,
             "fresh = torch.full_like(radius, self.scope_error())", "fresh = 0 * radius", f"{SUBNORMALS} -k 'expansions and maxpool'"),
    Mutation("local: slices of images by number, not by channel", AT_JOINS, "self.start = layer.start * each", "self.start = layer.start",
             f"{LOCAL} -k 'promises and image-channels'"),
    Mutation("local: branches that torch would broadcast are added", AT_STRUCTURE,
             "return part.whole or tuple(part.clean.shape[1:])", "return tuple(part.clean.shape[1:])", f"{NETS} -k other_shapes"),
    Mutation("local: float64 loses nothing of a map's adjoint", AT_CONVOLUTION,
             "return (self.map.adjoint_loss * self.frobenius * self.factor + 32 * U64 * self.gain) * (1 + 1e-9)", "return 0.0",
             f"{NETS} -k adjoints_lose"),
    Mutation("maps: upper bounds by the rows of lower ones", MLP_LINEAR, "i, -unit, -pulled)[0])", "i, -unit, pulled)[0])", f"{MAPPED} -k boxes"),
    Mutation("maps: the first bias alone", STAGES, "moved, off = _moved(op, vector[h:], error[h:], op.loss, True)",
             "moved, off = _moved(op, 0 * vector[h:], error[h:], op.loss, True)", f"{MAPPED} -k are_the_model"),
    Mutation("maps: sizes of rows with their signs", STAGES, "(self.rows(every).abs() + off)", "(self.rows(every) + off)",
             f"{MAPPED} -k are_the_model"),
    Mutation("maps: held numbers do not come back", OPS_MAPS, "return torch.cat([g[..., : self.held], self.inner.adjoint(",
             "return torch.cat([0 * g[..., : self.held], self.inner.adjoint(", f"{MAPPED} -k adjoints"),
    Mutation("maps: factors that are rounded count as exact", STAGES, "vector, magnitude * steps.relative * (1 + 1e-9), ", "vector, 0.0, ",
             f"{MAPPED} -k are_the_model"),
    Mutation("maps: what a bias was off by is lost on its way", STAGES, "steps.relative * (1 + 1e-9), float(norm_up(error, 0))",
             "steps.relative * (1 + 1e-9), 0.0", f"{MAPPED} -k are_the_model"),
    Mutation("maps: sizes by rows alone, not by columns", OPS_MAPS, "rows.amax() * columns.amax()", "rows.amax() * columns.amin()",
             f"{MAPPED} -k 'are_the_model or adjoints'"),
    Mutation("maps: sums of a mixture counted once", OPS_MAPS, "index.shape[1], int(used.amax()) if len(used) else 1,", "index.shape[1], 1,",
             f"{MAPPED} -k adjoints"),
    Mutation("maps: the largest number of roundings, not their sum", OPS_MAPS, "return sum(n + 2 for n in counts)", "return max(counts)",
             f"{MAPPED} -k adjoints"),
    Mutation("pooling: overlapping maxima counted once", CONVOLUTION,
             "root = math.sqrt(reads) * (1 + 1e-15)", "root = 1.0", f"{RULES} -k 'maxpool-overlap and change_is'"),
    Mutation("pooling: windows that see only padding", OPS_CONVOLUTION,
             "if dilation != (1, 1) and padding != (0, 0):", "if False:", f"{CONVS} -k 'not_proved_is_refused'"),
    Mutation("pooling: rounding of means dropped", CONVOLUTION,
             "rounding=average.gain * state.rounding + fresh", "rounding=average.gain * state.rounding", f"{RULES} -k 'norm_and_rounding and pool'"),
    # ---- verification, certificate files and the gate
    Mutation("verify: other weights are no difference", VERIFICATION,
             "if got != file.weights_sha256:", "if False:", f"{FILES} -k one_bit_of_a_weight"),
    Mutation("verify: another architecture is no difference", VERIFICATION,
             "if architecture != file.architecture_sha256:", "if False:", f"{FILES} -k another_architecture"),
    Mutation("verify: other rules are no difference", VERIFICATION, 'if file.versions["rules"] != rules:', "if False:", f"{FILES} -k other_rules"),
    Mutation("verify: a changed row is no difference", VERIFICATION, "if sha != sample.row_sha256:", "if False:",
             f"{FILES} -k 'changed_row or another_hash'"),
    Mutation("verify: a changed label is no difference", VERIFICATION, "elif label != sample.label:", "elif False:", f"{FILES} -k changed_label"),
    Mutation("verify: a part passes for the whole", VERIFICATION, "    if file.partial:\n", "    if False:\n", f"{FILES} -k partial_file"),
    Mutation("verify: NaN counts as reproduced", VERIFICATION,
             "beyond = ~(claims <= radius * (1 + ROUNDING))", "beyond = claims > radius * (1 + ROUNDING)", f"{FILES} -k 'nan_radius'"),
    Mutation("verify: claims compared with twice what is proved", VERIFICATION,
             "beyond = ~(claims <= radius * (1 + ROUNDING))", "beyond = ~(claims <= 2 * radius * (1 + ROUNDING))",
             f"{FILES} -k raised_by_one_percent"),
    Mutation("verify: a changed prediction is no difference", VERIFICATION, "elif p != sample.prediction:", "elif False:",
             f"{FILES} -k changed_prediction"),
    Mutation("verify: rounding excuses any claim", VERIFICATION,
             "excusable[beyond] = claims[beyond] <= ideal * (1 + ARITHMETIC)", "excusable[beyond] = True", f"{FILES} -k excused_only"),
    Mutation("verify: a sample's own word that its radius was searched", VERIFICATION,
             'np.array([file.method in (*SEARCHED, "best") and sample.method in SEARCHED for sample in file.samples])',
             "np.array([sample.method in SEARCHED for sample in file.samples])", f"{FILES} -k does_not_excuse"),
    Mutation("verify: smaller constants than the model's are no difference", VERIFICATION, "        if not fits:\n", "        if False:\n",
             f"{FILES} -k smaller_lipschitz"),
    Mutation("verify: what is unsound is only not verified", VERIFICATION,
             "return 3 if any(f.unsound for f in self.findings) else 130 if self.interrupted else 1 if self.findings else 0",
             "return 1 if self.findings else 0",
             f"{FILES} -k raised_by_one_percent"),
    Mutation("files: samples that contradict themselves", CERTIFICATE_FILE,
             "        if wrong:\n            raise ValueError(f\"sample", "        if False:\n            raise ValueError(f\"sample",
             f"{FILES} -k 'label and alone'"),
    Mutation("files: a misclassified sample with a radius", CERTIFICATE_FILE,
             "elif self.radius > 0 and (self.status == MISCLASSIFIED or not right):", "elif False:", f"{FILES} -k 'hostile and misclassified'"),
    Mutation("files: a sample twice", CERTIFICATE_FILE, "if sample.index in seen:", "if False:", f"{FILES} -k 'hostile and twice'"),
    Mutation("files: a key twice", CERTIFICATE_FILE, "if len(found) != len(pairs):", "if False:", f"{FILES} -k 'broken_text or hostile'"),
    Mutation("files: infinite radii", CERTIFICATE_FILE,
             "strict=True, allow_inf_nan=False)", "strict=True)", f"{FILES} -k 'infinite and radius'"),
    Mutation("files: another hash over the rows", CERTIFICATE_FILE,
             "if self.data.sha256 != rows_sha256([sample.row_sha256 for sample in self.samples]):", "if False:", f"{FILES} -k 'another and rows'"),
    Mutation("files: proved for less than was requested", CERTIFICATE_FILE,
             "if self.requested_radius is not None and (sample.radius >= self.requested_radius) != (sample.status == CERTIFIED):", "if False:",
             f"{FILES} -k 'hostile and requested'"),
    Mutation("files: row hashes do not see the label", CERTIFICATE_FILE, 'f"{head}{label}\\0".encode()', 'f"{head}".encode()',
             f"{FILES} -k row_hashes"),
    Mutation("gate: a certificate that is refused beside a good one", GATE,
             "all(r.passed for r in self.requirements) and not self.refusals", "all(r.passed for r in self.requirements)",
             f"{GATES} -k cannot_be_trusted"),
    Mutation("gate: a violation is a mere failure", GATE, "        if self.violations:\n            return 3\n", "", f"{GATES} -k nan_radii"),
    Mutation("gate: the claim counts, not what is proved", GATE, "np.minimum(claimed, checked.radius)", "claimed", f"{GATES} -k smaller_of_claim"),
    Mutation("gate: what is proved counts, not the claim", GATE, "np.minimum(claimed, checked.radius)", "checked.radius",
             f"{GATES} -k smaller_of_claim"),
    Mutation("gate: wrong predictions count as certified", GATE, "right & (radius >= wanted.radius)", "radius >= wanted.radius",
             f"{GATES} -k wrong_predictions"),
    Mutation("gate: radii above the required one only", GATE, "right & (radius >= wanted.radius)", "right & (radius > wanted.radius)",
             f"{GATES} -k exactly_at_least"),
    Mutation("gate: an accuracy a little below is enough", GATE, "got >= required, wilson_lower", "got >= required - 1e-6, wilson_lower",
             f"{GATES} -k exactly_at_least"),
    Mutation("gate: a certificate of another threat", GATE, "same = file.threat == wanted.name and", "same =", f"{GATES} -k missing_threat"),
    Mutation("gate: a certificate of another method", GATE,
             "return same and wanted.method in (None, file.method)", "return same", f"{GATES} -k method_and_a_clip"),
    Mutation("gate: a certificate of another arithmetic", GATE, "if file.dtype != policy.dtype:", "if False:", f"{GATES} -k cannot_be_trusted"),
    Mutation("gate: NaN is no contradiction", GATE, "~(radius <= observed.radius + moved)", "radius > observed.radius + moved",
             f"{GATES} -k nan_radii"),
    Mutation("gate: no certificate passes where none is needed", GATE,
             'None, False, remark="no usable certificate of this threat"', 'None, True, remark="no usable certificate of this threat"',
             f"{GATES} -k 'missing_threat or empty_list'"),
    Mutation("gate: the number of samples does not count", GATE,
             "len(data), len(data) >= policy.min_samples)", "len(data), True)", f"{GATES} -k pass_and_fail"),
]  # fmt: skip


def copy_tree(target: Path) -> None:
    """The checkout without its history, caches and environments; links stay links."""
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "build", "dist", ".demo", "shared")
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignored, dirs_exist_ok=True)


# What the tests import that is not ours: loaded once, before the tests of a mutation run in a process that begins with it.
_WARM = ("torch", "torch.func", "numpy", "scipy.linalg", "mpmath", "pandas", "hypothesis", "pydantic", "safetensors.torch", "typer", "rich")


def _run_tests(tree: Path, tests: str) -> tuple[int, str]:
    """(exit code, output) of the tests in the tree, in a process of its own, forked where that is possible."""
    arguments = ["-x", "-q", "-p", "no:cacheprovider", *(a.strip("'") for a in re.findall(r"'[^']*'|\S+", tests))]
    environment = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    here = "import sys, pytest, robustlip; from pathlib import Path; code = pytest.main(sys.argv[2:]); "
    here += "sys.exit(code if Path(robustlip.__file__).resolve().is_relative_to(Path(sys.argv[1]).resolve()) else 98)"
    if not hasattr(os, "fork") or "torch" not in sys.modules:
        done = subprocess.run(
            [sys.executable, "-c", here, str(tree), *arguments], cwd=tree, env=os.environ | environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr
    assert "robustlip" not in sys.modules, "expected a process that has not imported what is mutated"
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            code = 97
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os.chdir(tree)
                os.environ.update(environment)
                sys.path.insert(0, str(tree))
                sys.dont_write_bytecode = True
                sys.argv = ["-c", str(tree), *arguments]
                exec(here, {"__name__": "__main__"})
            except SystemExit as ended:
                code = int(ended.code or 0)
            finally:
                sys.stdout.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read().decode(errors="replace")


def caught_by(mutation: Mutation | None, tests: str = "", tree: Path | None = None) -> tuple[str, float, str]:
    """(the first test that fails, or '', seconds, the tail of the output) of the mutated tree; of the tree as it is for None.

    tree: a copy that is as it was again afterwards; one for this mutation alone unless given.
    """
    if tree is None:
        with tempfile.TemporaryDirectory() as folder:
            copy_tree(Path(folder))
            return caught_by(mutation, tests, Path(folder))
    start = time.perf_counter()
    tests = tests if mutation is None else mutation.tests
    path = tree / (mutation.file if mutation else "pyproject.toml")
    text = path.read_text(encoding="utf-8")
    if mutation is not None:
        if text.count(mutation.old) != 1:
            raise SystemExit(f"expected {mutation.old!r} once in {mutation.file}, found it {text.count(mutation.old)} times; adapt the mutation")
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code, output = _run_tests(tree, tests)
    finally:
        path.write_text(text, encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if code not in (0, 1) or (code == 1 and not failed):
        raise SystemExit(f"expected tests to run, got exit code {code}:\n{output[-5000:]}")
    return (failed[0] if failed else ""), time.perf_counter() - start, output[-1500:]


def all_of(chosen: list[Mutation], jobs: int) -> Iterator[tuple[str, float, str]]:
    """What `caught_by` says of each. One job: in one copy of the tree, and in processes that begin with what the tests import."""
    if jobs > 1:
        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(caught_by, chosen)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded
    for name in _WARM:
        with suppress(ImportError):  # what is missing is the tests' to skip
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        for mutation in chosen:
            yield caught_by(mutation, tree=Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="mutations in whose description, file or tests this regular expression is found")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if re.search(args.only, f"{m.what}\n{m.file}\n{m.tests}")]
    if not chosen:
        parser.error(f"expected mutations that {args.only!r} is found in, got none; give a part of a description or of a file's name")
    lines = ["| mutation | caught by |", "|---|---|"]
    survivors = 0
    for mutation, (test, seconds, _) in zip(chosen, all_of(chosen, args.jobs), strict=True):
        survivors += not test
        print(f"{'caught  ' if test else 'SURVIVED'} {seconds:5.0f} s  {mutation.what}: {test or mutation.tests}", flush=True)
        lines.append(f"| {mutation.what} | {f'`{test}`' if test else '**survived**'} |")
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(survivors > 0)


if __name__ == "__main__":
    raise SystemExit(main())
