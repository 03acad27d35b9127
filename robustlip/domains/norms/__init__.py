"""Norm bounds, one rule for each kind of layer: method 'global'. Importing this package registers all rules."""

from robustlip.domains.norms import attention, constants, convolution, elementwise, joins, linear, moves, normalization, products, sorting, structure  # noqa: F401  (each registers its rules)
from robustlip.domains.norms.state import Context, Rule, State, register, rule_for, run_rules

__all__ = ["Context", "Rule", "State", "register", "rule_for", "run_rules"]
