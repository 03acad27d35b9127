"""Attacks: what is observed. Every one returns an Observation whose points were projected, measured and judged again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from robustlip.attacks.base import Attack, Observation
from robustlip.attacks.minnorm import MinimumRadius
from robustlip.attacks.pgd import PGD
from robustlip.attacks.sensitivity import Sensitivity, observed_sensitivity
from robustlip.attacks.torchattacks_adapter import TorchAttack
from robustlip.attacks.weights import WeightAttack
from robustlip.errors import BadInput

_TABLE: dict[str, Callable[..., Attack]] = {
    "pgd": PGD,
    "min": MinimumRadius,
    "weights": WeightAttack,
    "torchattacks-pgd": lambda **options: TorchAttack("PGD", **options),
    "torchattacks-pgdl2": lambda **options: TorchAttack("PGDL2", **options),
    "autoattack": lambda **options: TorchAttack("AutoAttack", **options),
}
NAMES = tuple(_TABLE)


def by_name(name: str, **options: Any) -> Attack:
    """The attack of that name with its options. 'pgd' and 'min' take every threat; 'weights' only weight threats.

    Raises BadInput for an unknown name or option.
    """
    if name not in _TABLE:
        raise BadInput(f"expected an attack among {', '.join(NAMES)}, got {name!r}; name one of them")
    try:
        return _TABLE[name](**options)
    except TypeError as error:
        raise BadInput(f"expected options that the attack {name!r} has, got {options}; see its docstring ({error})") from None


__all__ = [
    "NAMES",
    "PGD",
    "Attack",
    "MinimumRadius",
    "Observation",
    "Sensitivity",
    "TorchAttack",
    "WeightAttack",
    "by_name",
    "observed_sensitivity",
]
