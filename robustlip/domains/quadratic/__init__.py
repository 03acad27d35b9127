"""Quadratic constraints of activations, and what follows from them for multilayer perceptrons.

Lipschitz constants: 'lipsdp' (per pair of logits) and 'eclipse' (closed form). Read constraints.py (what is true of an activation), program.py and
reach.py (why a matrix inequality gives a constant), robustlip.numerics.enclosures (how it is proved in floating point); newton.py and conic.py
only guess. Margins of one sample: 'sdp', the Lagrange dual of the exact ReLU network (lagrangian.py), its multipliers guessed (multipliers.py).
"""

from robustlip.domains.quadratic.constants import Constants, product_of_norms
from robustlip.domains.quadratic.eclipse import eclipse_constants, eclipse_radii, eclipse_why_not
from robustlip.domains.quadratic.layers import Network, network_of
from robustlip.domains.quadratic.lipsdp import lipsdp_constants, lipsdp_radii, lipsdp_why_not
from robustlip.domains.quadratic.multipliers import sdp_radii, sdp_why_not

__all__ = [
    "Constants",
    "Network",
    "eclipse_why_not",
    "eclipse_constants",
    "eclipse_radii",
    "lipsdp_why_not",
    "lipsdp_constants",
    "lipsdp_radii",
    "network_of",
    "product_of_norms",
    "sdp_why_not",
    "sdp_radii",
]
