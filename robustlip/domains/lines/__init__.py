"""Interval bounds, linear bounds (CROWN) and local Lipschitz bounds of chains of affine maps and activations, under input balls."""

from robustlip.domains.lines.complete import complete_radii, complete_why_not
from robustlip.domains.lines.radii import crown_radii, ibp_radii, linear_why_not, local_lipschitz_radii

__all__ = ["complete_radii", "complete_why_not", "crown_radii", "ibp_radii", "linear_why_not", "local_lipschitz_radii"]
