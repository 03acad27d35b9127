"""Interval bounds, linear bounds (CROWN) and local Lipschitz bounds of chains of affine maps and activations, under input balls."""

from robustlip.domains.lines.radii import crown_radii, ibp_radii, linear_why_not, local_lipschitz_radii

__all__ = ["crown_radii", "ibp_radii", "linear_why_not", "local_lipschitz_radii"]
