"""One file per kind of layer; importing this package registers them all."""

from robustlip.domains.norms import attention, constants, convolution, elementwise, joins, linear, moves, normalization, products, sorting, structure  # noqa: F401  (each registers its rules)
from robustlip.domains.norms.state import Context, Rule, State, register, rule_for, run_rules

__all__ = ["Context", "Rule", "State", "register", "rule_for", "run_rules"]
