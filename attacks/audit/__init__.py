"""Audit: try to break a claimed Lipschitz constant, and keep the pair of inputs that comes closest.

    audit(model, newhouse2025(model)).verdict        # 'violated', or 'not refuted': nothing found that contradicts the claim

Everything is computed in float64 on a float64 copy of the model, in the norm of the claim: the largest token norm in and out (one token
for models without tokens). What is reported is never a derivative: it is ‖f(x') − f(x)‖/‖x' − x‖ of an actual pair inside the domain,
less what rounding can have added.
"""

from robustlip.attacks.audit.result import HOLDS, VIOLATED, Audit, WorstLayer
from robustlip.attacks.audit.run import audit
from robustlip.attacks.audit.witness import recheck, recheck_worst, save_witness, save_worst

__all__ = ["HOLDS", "VIOLATED", "Audit", "WorstLayer", "audit", "recheck", "recheck_worst", "save_witness", "save_worst"]
