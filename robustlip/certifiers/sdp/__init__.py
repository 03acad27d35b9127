"""Lipschitz constants of multilayer perceptrons by semidefinite programming: 'lipsdp' (per pair of logits) and 'eclipse' (closed form).

Read quadratic.py (what is true of an activation), program.py and reach.py (why a matrix inequality gives a constant), verify.py (how it is
proved in floating point); newton.py and conic.py only guess.
"""

from robustlip.certifiers.sdp.constants import Constants, product_of_norms
from robustlip.certifiers.sdp.eclipse import eclipse_applies, eclipse_constants, eclipse_radii
from robustlip.certifiers.sdp.lipsdp import lipsdp_applies, lipsdp_constants, lipsdp_radii
from robustlip.certifiers.sdp.network import Network, network_of

__all__ = [
    "Constants", "Network", "eclipse_applies", "eclipse_constants", "eclipse_radii", "lipsdp_applies", "lipsdp_constants", "lipsdp_radii",
    "network_of", "product_of_norms",
]  # fmt: skip
