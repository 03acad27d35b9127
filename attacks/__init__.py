"""Attacks. Each returns an Observation whose points were projected, measured again and classified again."""

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
from robustlip.plugins import added

_TABLE: dict[str, Callable[..., Attack]] = {
    "pgd": PGD,
    "min": MinimumRadius,
    "weights": WeightAttack,
    "torchattacks-pgd": lambda **options: TorchAttack("PGD", **options),
    "torchattacks-pgdl2": lambda **options: TorchAttack("PGDL2", **options),
    "autoattack": lambda **options: TorchAttack("AutoAttack", **options),
}
NAMES = tuple(_TABLE)


def attacks() -> dict[str, Callable[..., Attack]]:
    """The constructors of attacks by name: our own, and those of other packages (`robustlip.plugins`)."""
    return {**_TABLE, **added("robustlip.attacks", _TABLE, callable, "a callable that returns an Attack")}


def by_name(name: str, **options: Any) -> Attack:
    """The attack of that name with its options. 'pgd' and 'min' accept every threat; 'weights' accepts only weight threats.

    Raises BadInput for an unknown name or option.
    """
    table = attacks()
    if name not in table:
        raise BadInput(f"expected an attack among {', '.join(table)}, got {name!r}; name one of them")
    try:
        attack = table[name](**options)
    except TypeError as error:
        raise BadInput(f"expected options that the attack {name!r} has, got {options}; see its docstring ({error})") from None
    if not isinstance(attack, Attack):  # its __call__ projects, measures and classifies again
        raise BadInput(f"expected the entry point {name!r} to return a robustlip.attacks.base.Attack, got {type(attack).__name__}; correct it")
    return attack


__all__ = [
    "NAMES",
    "PGD",
    "Attack",
    "MinimumRadius",
    "Observation",
    "Sensitivity",
    "TorchAttack",
    "WeightAttack",
    "attacks",
    "by_name",
    "observed_sensitivity",
]
