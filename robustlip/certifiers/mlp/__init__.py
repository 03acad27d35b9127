"""Certifiers of multilayer perceptrons and small convolutional networks under input balls: intervals, lines, local slopes, duals."""

from __future__ import annotations

from robustlip.certifiers.mlp.dual import sdp_applies, sdp_radii
from robustlip.certifiers.mlp.radii import crown_radii, ibp_radii, linear_applies, local_lipschitz_radii

__all__ = ["crown_radii", "ibp_radii", "linear_applies", "local_lipschitz_radii", "sdp_applies", "sdp_radii"]
