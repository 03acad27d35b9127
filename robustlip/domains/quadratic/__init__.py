"""Quadratic constraints of activations, and bounds that follow from them for multilayer perceptrons.

Lipschitz constants: 'lipsdp' (for each pair of logits) and 'eclipse' (closed form). constraints.py has the constraints of activations, program.py and
propagation.py the matrix inequalities that give a constant, and robustlip.numerics.enclosures proves these in floating point. newton.py and conic.py
search for multipliers, which are not trusted. Margins of one sample: 'sdp', the Lagrange dual of the exact ReLU network (lagrangian.py), with
multipliers found by multipliers.py.
"""

from robustlip.domains.quadratic.constants import Constants, product_of_norms
from robustlip.domains.quadratic.eclipse import eclipse_constants, eclipse_radii, eclipse_why_not
from robustlip.domains.quadratic.layers import ConstraintNetwork, network_of
from robustlip.domains.quadratic.lipsdp import lipsdp_constants, lipsdp_radii, lipsdp_why_not
from robustlip.domains.quadratic.multipliers import sdp_radii, sdp_why_not

__all__ = [
    "Constants",
    "ConstraintNetwork",
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
