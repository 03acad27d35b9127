"""Audit: try to refute a claimed Lipschitz constant, and keep the pair of inputs with the largest ratio.

    audit(model, newhouse2025(model)).verdict        # 'violated' or 'not refuted'

Everything is computed in float64 on a float64 copy of the model, in the norm of the claim: the largest token norm of inputs and outputs (one token
for models without tokens). The reported value is never a derivative: it is ‖f(x') − f(x)‖/‖x' − x‖ for two inputs in the domain,
minus a bound of the rounding error.
"""

from robustlip.attacks.audit.result import HOLDS, VIOLATED, Audit, WorstLayer
from robustlip.attacks.audit.run import audit
from robustlip.attacks.audit.witness import recheck, recheck_worst, save_witness, save_worst

__all__ = ["HOLDS", "VIOLATED", "Audit", "WorstLayer", "audit", "recheck", "recheck_worst", "save_witness", "save_worst"]
