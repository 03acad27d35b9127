"""Breaks one line of the rules at a time and reports which test notices. Every mutation must be caught.

    python benchmarks/mutations.py [--only TEXT] [--jobs 1] [--markdown FILE]

Each mutation is one replacement in one file, asserted to apply exactly once, in a temporary copy of the tree; the tests named with it run there
until the first failure. Nothing in the checkout changes. Exit code 0: all caught. 1: at least one survived.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RULES, CERTIFY, INDEPENDENT, HOSTILE, MINE, LOCAL, CONSTRAINTS, SUBNORMALS, OVERFLOW = (
    f"tests/test_{name}.py"
    for name in ("rules_contract", "certify", "independent", "hostile", "soundness_mutations", "local", "constraints", "subnormals", "overflow")
)


class Mutation(NamedTuple):
    what: str
    file: str
    old: str
    new: str
    tests: str  # pytest's arguments: files, and -k for the fast subset


LIPSCHITZ, ATTENTION, LINEAR = "robustlip/certifiers/lipschitz.py", "robustlip/rules/attention.py", "robustlip/rules/linear.py"
ELEMENTWISE, STRUCTURE, BASE = "robustlip/rules/elementwise.py", "robustlip/rules/structure.py", "robustlip/rules/base.py"
SEARCH, SPECTRAL, ENTRY = "robustlip/certifiers/search.py", "robustlip/spectral.py", "robustlip/certifiers/__init__.py"
CONSTANTS, NORMALIZATION = "robustlip/certifiers/constants.py", "robustlip/rules/normalization.py"
AT_ATTENTION, AT_LINEAR, AT_ELEMENTWISE, AT_NORMALIZATION, AT_STRUCTURE, AT_JACOBIAN = (
    f"robustlip/local/{name}.py" for name in ("attention", "linear", "elementwise", "normalization", "structure", "jacobian")
)
AT_BASE, AT_CROSSING, AT_SORTING = (f"robustlip/local/{name}.py" for name in ("base", "crossing", "sorting"))
BY_LOCAL, BY_DUAL = "robustlip/certifiers/local.py", "robustlip/certifiers/dual.py"

MUTATIONS = [
    Mutation("the difference in front of a division not seen to overflow", ELEMENTWISE,
             "context.finite(behind, reach)", "context.finite(behind)", f"{OVERFLOW} -k 'way_is_seen and normalize'"),
    Mutation("the difference in front of a division not seen to overflow (local)", AT_STRUCTURE,
             "torch.maximum(size, reach)", "size", f"{OVERFLOW} -k 'way_is_seen and normalize'"),
    Mutation("outputs of LayerNorm not seen to overflow (local)", AT_NORMALIZATION,
             ".square().clamp_min(norm)", ".square()", f"{OVERFLOW} -k 'way_is_seen and norm'"),
    Mutation("GELU divided by less than 1 not seen to overflow (local)", AT_ELEMENTWISE,
             "torch.maximum(cube, norm / abs(divisor))", "cube", f"{OVERFLOW} -k 'way_is_seen and gelu'"),
    Mutation("attention's output scale not seen to overflow (local)", AT_ATTENTION,
             " * max(1.0, abs(self.factor)),", ",", f"{OVERFLOW} -k 'way_is_seen and factor'"),
    Mutation("sums over keys not seen to overflow", ATTENTION,
             "torch.maximum(turned, tokens * value)", "torch.maximum(turned, value)", f"{OVERFLOW} -k 'way_is_seen and values'"),
    Mutation("queries times the root of the scale not seen to overflow", ATTENTION,
             "max(2.0, math.sqrt(scale)) * projected", "2.0 * projected", f"{OVERFLOW} -k 'way_is_seen and scale'"),
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
    Mutation("subnormal inputs of the head not counted (local)", BY_LOCAL,
             "math.sqrt(width) * (row + reach) * context.flushed", "math.sqrt(width) * reach * context.flushed",
             f"{CERTIFY} -k 'subnormal_operands and local and input'"),
    Mutation("subnormal weights of the head not counted (local)", BY_LOCAL,
             "math.sqrt(width) * (row + reach) * context.flushed", "math.sqrt(width) * row * context.flushed",
             f"{CERTIFY} -k 'subnormal_operands and local and weight'"),
    Mutation("subnormal tokens not counted in attention (local)", AT_ATTENTION,
             "(frobenius + math.sqrt(d) * norm) * self.scope.flushed", "math.sqrt(d) * norm * self.scope.flushed",
             f"{CERTIFY} -k 'subnormal_tokens and local'"),
    Mutation("subnormal weights of a matrix not counted", LINEAR,
             "norm * context.flushed", "0 * context.flushed", f"{SUBNORMALS} -k 'rules and linear-weight'"),
    Mutation("a subnormal factor of attention not counted", ATTENTION,
             "+ join_heads(output_columns, whole, value_norm)) * context.flushed", ") * context.flushed",
             f"{SUBNORMALS} -k 'rules and attention-factor'"),
    Mutation("an attention scale that counts for zero", ATTENTION,
             "return context.divided(context.finite(behind, torch.stack([largest_logit, held, mixed_sums]).amax(0)), scale)",
             "return context.finite(behind, torch.stack([largest_logit, held, mixed_sums]).amax(0))",
             f"{SUBNORMALS} -k 'rules and attention-scale'"),
    Mutation("a subnormal scalar of a residual not counted", STRUCTURE,
             "(root * (skip + weight) + state.norm + branch.norm) * context.flushed", "root * (skip + weight) * context.flushed",
             f"{SUBNORMALS} -k 'rules and residual'"),
    Mutation("a subnormal scalar of a residual not counted (local)", AT_STRUCTURE,
             "(root * (skip + weight) + (self.norm + radius) + (self.branch_norm + inner)) * self.scope.flushed",
             "root * (skip + weight) * self.scope.flushed", f"{SUBNORMALS} -k 'expansions and residual'"),
    Mutation("LayerNorm's squares that vanish not counted", NORMALIZATION,
             "(1 + state.norm / (2 * math.sqrt(width * eps))) + 2 * TINY[torch.float32] / eps", "(1 + state.norm / (2 * math.sqrt(width * eps)))",
             f"{SUBNORMALS} -k 'rules and layernorm'"),
    Mutation("a divisor that counts for zero", ELEMENTWISE,
             "context.divided(context.finite(behind, cube), divisor)", "context.finite(behind, cube)", f"{SUBNORMALS} -k 'rules and gelu'"),
    Mutation("subnormal tokens of LayerNorm and RMSNorm not counted", NORMALIZATION,
             "2 * math.sqrt(width) * (gain + state.norm / math.sqrt(eps)) * context.flushed", "0", f"{SUBNORMALS} -k 'rules and rmsnorm'"),
    Mutation("a subnormal scale of batch norm not counted", NORMALIZATION,
             "math.sqrt(state.width) * (state.norm + mean) / math.sqrt(variance) * context.flushed", "0", f"{SUBNORMALS} -k 'rules and batchnorm'"),
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
    Mutation("bias left out of the last layer's rounding", LIPSCHITZ,
             "size = (rows + perturbed) * state.norm + bias", "size = (rows + perturbed) * state.norm", f"{CERTIFY} {MINE} -k 'rounding'"),
    Mutation("a zero margin counts as correct, and NaN too", LIPSCHITZ,
             "correct = margin.amin(-1) > 0", "correct = ~(margin.amin(-1) < 0)", f"{CERTIFY} {MINE} -k ties"),
    Mutation("dual norm of ℓ∞ taken for ℓ2", LIPSCHITZ,
             '{"l2": 2.0, "linf": 1.0, "l1": float("inf")}[space]', '{"l2": 2.0, "linf": 2.0, "l1": 2.0}[space]', f"{CERTIFY} -k exact_radius"),
    Mutation("power iteration instead of the guaranteed norm (Linear)", LINEAR,
             "from robustlip.spectral import infinity_to_two_bound, one_to_two_bound, spectral_norm_bound",
             "from robustlip.spectral import infinity_to_two_bound, one_to_two_bound, spectral_norm_estimate as spectral_norm_bound",
             f"{MINE} -k power"),
    Mutation("power iteration instead of the guaranteed norm (Attention)", ATTENTION,
             "from robustlip.spectral import spectral_norm_bound", "from robustlip.spectral import spectral_norm_estimate as spectral_norm_bound",
             f"{MINE} -k power"),
    Mutation("ℓ∞ gain replaced by σ(W)", LINEAR,
             'gain = context.constant(layer, "linf", lambda: float(infinity_to_two_bound(layer.weight)))', "gain = matrix.sigma",
             f"{RULES} -k infinity_and_one_balls_through_the"),
    Mutation("ℓ∞ to ℓ2 without √n", BASE,
             'factor = math.sqrt(self.width) * (1 + 1e-15) if self.space == "linf" else 1.0', "factor = 1.0", f"{MINE} -k 'infinity or domain'"),
    Mutation("bias left out of Linear's norm", LINEAR,
             "norm = (matrix.sigma + perturbed) * state.norm + bias", "norm = (matrix.sigma + perturbed) * state.norm",
             f"{RULES} {MINE} -k 'norm_and_rounding and linear or biases'"),
    Mutation("mean left out of Normalize's norm", ELEMENTWISE,
             "reach = state.norm + shift * state.width**0.5 * state.tokens**0.5", "reach = state.norm",
             f"{RULES} {MINE} -k 'norm_and_rounding and normalize or means'"),
    Mutation("GELU's slope 1.0", ELEMENTWISE, 'GELU_SLOPE = {"none": 1.1289042, "tanh": 1.1289932}', 'GELU_SLOPE = {"none": 1.0, "tanh": 1.0}',
             f"{RULES} -k gelu"),
    Mutation("GELU's slope 1.1289, as published", ELEMENTWISE,
             'GELU_SLOPE = {"none": 1.1289042, "tanh": 1.1289932}', 'GELU_SLOPE = {"none": 1.1289, "tanh": 1.1289}', f"{RULES} -k gelu"),
    Mutation("MLP constant divided by 1.1289 twice", ELEMENTWISE,
             "slope = GELU_SLOPE[layer.approximate] / divisor", "slope = GELU_SLOPE[layer.approximate] / divisor**2", f"{MINE} {RULES} -k gelu"),
    Mutation("LayerNorm's eps dropped from its constant", NORMALIZATION,
             "gain = scale / math.sqrt(eps) * (1 + 1e-15)\n        norm = state.norm * 0", "gain = scale\n        norm = state.norm * 0",
             f"{RULES} -k layernorm"),
    Mutation("√T dropped in Flatten", STRUCTURE,
             "root = math.sqrt(state.tokens) * (1 + 1e-15)", "root = 1.0", f"{RULES} -k 'flatten or tokens'"),
    Mutation("sign of the residual weight kept", STRUCTURE,
             "skip, weight = abs(layer.skip), abs(layer.weight)", "skip, weight = layer.skip, layer.weight", f"{RULES} -k residual"),
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
             "c.rounding(norm, perturbed, context)) + perturbed * norm", "c.rounding(norm, perturbed, context))",
             f"{LOCAL} -k 'no_attack and weights'"),
    Mutation("local: rounding of Linear dropped", AT_LINEAR,
             "fresh = self.scope.both(lambda context: c.rounding(norm, perturbed, context)) + perturbed * norm",
             "fresh = 0 * norm + perturbed * norm", f"{LOCAL} -k 'rounding_as_executed and linear'"),
    Mutation("local: neurons under ℓ∞ measured in ℓ2", AT_LINEAR,
             "return up(rows.abs().sum(-1) * (1 + 1e-12))", "return norm_up(rows)", f"{LOCAL} -k 'promises and linf'"),
    Mutation("local: neurons that may cross 0 keep slope 0", AT_ELEMENTWISE,
             "slope = ((self.f.slope > 0) | (each >= self.distance)).to(each.dtype)", "slope = (self.f.slope > 0).to(each.dtype)",
             f"{LOCAL} -k 'promises and relu'"),
    Mutation("local: ReLU's remainder weighted by the wrong sign", AT_ELEMENTWISE,
             "[(size if two_sided else (-g).clamp_min(0.0)).flatten(-2), *tail]", "[(size if two_sided else g.clamp_min(0.0)).flatten(-2), *tail]",
             f"{LOCAL} -k 'promises and relu'"),
    Mutation("local: slopes at the clean point for the whole interval", AT_ELEMENTWISE,
             "slope = (self.slope + self.f.curvature * each).clamp_max(self.f.steepest)", "slope = self.slope + 0 * each",
             f"{LOCAL} -k 'promises and gelu'"),
    Mutation("local: half of the curvature's weight", AT_BASE,
             "return 0.5 * (1 + 1e-12) * found.sum(-1)", "return 0.25 * (1 + 1e-12) * found.sum(-1)",
             f"{LOCAL} -k 'promises and (tanh or gelu)'"),
    Mutation("local: tanh's curvature of GELU", AT_ELEMENTWISE, "1 - value * value, 1.0, 0.7698004,", "1 - value * value, 1.0, 0.7598004,",
             f"{LOCAL} -k 'curvatures'"),
    Mutation("local: GELU's lowest point of curvature forgotten", AT_ELEMENTWISE,
             "torch.where(far < 2, -at(far), torch.full_like(far, 0.107982))", "-at(far)", f"{LOCAL} -k 'where_a_neuron'"),
    Mutation("local: a quarter of the third derivative for a third", AT_ELEMENTWISE,
             "_GELU_THIRD / 3 * reach", "_GELU_THIRD / 4 * reach", f"{LOCAL} -k 'where_a_neuron'"),
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
    Mutation("local: the divisor does not enlarge underflow", AT_ELEMENTWISE,
             'lost = lost * (1 + 1 / getattr(self.layer, "divisor", 1.0))', "lost = lost * 1.0", f"{LOCAL} -k divisors"),
    Mutation("local: LayerNorm's curvature 1 instead of 2/√3", AT_NORMALIZATION, "CURVATURE = 1.15471", "CURVATURE = 1.0",
             f"{LOCAL} -k 'normalisation_is'"),
    Mutation("local: LayerNorm bent by its centre, not its ball", AT_NORMALIZATION,
             "gain * inverse * radius.square()", "self.at_centre**2 * radius.square() * 0.3", f"{LOCAL} -k 'promises and (layernorm or rmsnorm)'"),
    Mutation("local: LayerNorm's gain at the centre", AT_NORMALIZATION,
             "gain = local_lipschitz(self.layer, self.input, radius)  #", "gain = local_lipschitz(self.layer, self.input, 0 * radius)  #",
             f"{LOCAL} -k 'promises and (layernorm or rmsnorm)'"),
    Mutation("local: sign of the residual weight kept", AT_STRUCTURE,
             "return up(skip * radius + weight * inner) + fresh,", "return up(skip * radius + self.weight * inner) + fresh,",
             f"{LOCAL} -k 'promises and residual'"),
    Mutation("local: rounding of the residual's sum dropped", AT_STRUCTURE,
             "fresh = 4 * self.scope.unit * norm + 3 * root", "fresh = 0 * self.scope.unit * norm + 3 * root",
             f"{LOCAL} -k 'rounding_as_executed and residual or rounding_as_executed and blocks'"),
    Mutation("local: √n of ℓ∞ to ℓ2 dropped", AT_STRUCTURE,
             "self.factor = math.sqrt(clean.shape[-1]) * (1 + 1e-15) if space == \"linf\" else 1.0", "self.factor = 1.0",
             f"{LOCAL} -k 'promises and linf'"),
    Mutation("local: flattened tokens move as the largest of them", AT_STRUCTURE,
             'order = {"l2": 2.0, "l1": 1.0,', 'order = {"l2": torch.inf, "l1": 1.0,', f"{LOCAL} -k 'promises and flatten'"),
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
             "bounded(question[0] * first[:, 0], question[1], bounds[begin:], first[:, 0])", "question[0] * first[:, 0]",
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
             "own = 2**0.5 * (1 + 1e-15) * reference.head_change()", "own = 0 * reference.head_change()",
             f"{LOCAL} {MINE} -k 'weights or sensitivity'"),
    Mutation("local: rounding of the head dropped", BY_LOCAL,
             "return up(reference.pairs * hidden.unsqueeze(-1) + own.unsqueeze(-1)) + 2 * reference.single(hidden).unsqueeze(-1)",
             "return up(reference.pairs * hidden.unsqueeze(-1) + own.unsqueeze(-1))", f"{LOCAL} -k rounding_attacks"),
    Mutation("dual: rounding of the head dropped", BY_DUAL,
             "2 * reference.largest_row * hidden + 2 * reference.single(hidden)", "2 * reference.largest_row * hidden",
             f"{LOCAL} -k rounding_attacks"),
    Mutation("dual: ℓ2 norm of the gradient for every threat", BY_DUAL,
             '{"l2": 2.0, "linf": 1.0, "l1": torch.inf}[threat.norm]', "2.0", f"{LOCAL} -k 'first_order'"),
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
]  # fmt: skip


def copy_tree(target: Path) -> None:
    """The checkout without its history, caches and environments; links stay links."""
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "build", "dist", ".demo", "shared")
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignored, dirs_exist_ok=True)


def caught_by(mutation: Mutation | None, tests: str = "") -> tuple[str, float, str]:
    """(the first test that fails, or '', seconds, the tail of the output) of the mutated tree; of the tree as it is for None."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        if mutation is not None:
            path = tree / mutation.file
            text = path.read_text(encoding="utf-8")
            if text.count(mutation.old) != 1:
                raise SystemExit(f"expected {mutation.old!r} once in {mutation.file}, found it {text.count(mutation.old)} times; adapt the mutation")
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            tests = mutation.tests
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        where = subprocess.run(
            [sys.executable, "-c", "import importlib.util as i; print(i.find_spec('robustlip').origin)"],
            cwd=tree, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert Path(where.stdout.strip()).resolve().is_relative_to(tree.resolve()), "expected the copy to be imported"
        arguments = [a.strip("'") for a in re.findall(r"'[^']*'|\S+", tests)]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=tree, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or (done.returncode == 1 and not failed):
        raise SystemExit(f"expected tests to run, got exit code {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    return (failed[0] if failed else ""), time.perf_counter() - start, done.stdout[-1500:]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="mutations whose description contains this")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if args.only in m.what]
    lines = ["| mutation | caught by |", "|---|---|"]
    survivors = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutation, (test, seconds, _) in zip(chosen, pool.map(caught_by, chosen), strict=True):
            survivors += not test
            print(f"{'caught  ' if test else 'SURVIVED'} {seconds:5.0f} s  {mutation.what}: {test or mutation.tests}", flush=True)
            lines.append(f"| {mutation.what} | {f'`{test}`' if test else '**survived**'} |")
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(survivors > 0)


if __name__ == "__main__":
    raise SystemExit(main())
