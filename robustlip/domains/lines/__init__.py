"""Bounds of multilayer perceptrons and small convolutional networks under input balls by intervals, lines and local slopes."""

from robustlip.domains.lines.radii import crown_radii, ibp_radii, linear_why_not, local_lipschitz_radii

__all__ = ["crown_radii", "ibp_radii", "linear_why_not", "local_lipschitz_radii"]
