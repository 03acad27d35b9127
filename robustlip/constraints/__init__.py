"""Weight constraints that act after every optimiser step. docs/theory.md, section 12; Newhouse et al. 2025, section 3.

    constraint = Constraint(targets_of(model, 1.0), "soft-cap")
    constraint.project()
    constraint.attach(optimizer)

Each method maps the singular values of the RMS-scaled matrix M = W·sqrt(fan_in/fan_out). Attention heads are constrained
separately (`per_head`): under the published cap of the stacked matrix one head can have all of the norm (docs/theory.md, section 5).
The `guarantee` of a method says what holds in exact arithmetic; certificates never rely on it and measure the weights.
"""

from robustlip.constraints.constraint import METHODS, Constraint, ConstraintViolation, make_method
from robustlip.constraints.decay import SpectralWeightDecay, WeightDecay
from robustlip.constraints.hammer import SpectralHammer
from robustlip.constraints.hardcap import HardCap, HardCapMsign, hard_cap_msign, hard_cap_polynomial
from robustlip.constraints.method import Guarantee, Method, StepTaken
from robustlip.constraints.normalize import SpectralNormalize
from robustlip.constraints.norms import fast_norm_bound, top_singular
from robustlip.constraints.softcap import SoftCap, soft_cap, soft_cap_coupling
from robustlip.constraints.stiefel import Stiefel
from robustlip.constraints.targets import Target, targets_of

__all__ = [
    "METHODS", "Constraint", "ConstraintViolation", "Guarantee", "HardCap", "HardCapMsign", "Method", "SoftCap", "SpectralHammer",
    "SpectralNormalize", "SpectralWeightDecay", "StepTaken", "Stiefel", "Target", "WeightDecay", "fast_norm_bound", "hard_cap_msign",
    "hard_cap_polynomial", "make_method", "soft_cap", "soft_cap_coupling", "targets_of", "top_singular",
]  # fmt: skip
