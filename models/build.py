"""Builds a model from the plain dictionary in a recipe or card. Files of weights contain no code."""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any

from robustlip import limits
from robustlip.errors import BadInput, first_line
from robustlip.layers import Chain
from robustlip.models.baselines import BaselineGPT, BaselineTransformer
from robustlip.models.classifier import LipschitzTransformer
from robustlip.models.gpt import LipschitzGPT
from robustlip.models.mlp import LipschitzMLP


def _mlp(widths: list[int], activation: str = "relu", bias: bool = True, mean: float = 0.0, std: float = 1.0) -> LipschitzMLP:
    return LipschitzMLP(widths, activation, bias=bias, mean=mean, std=std)


KINDS: dict[str, Callable[..., Chain]] = {
    "mlp": _mlp,
    "lipschitz-gpt": LipschitzGPT,
    "baseline-gpt": BaselineGPT,
    "lipschitz-transformer": LipschitzTransformer,
    "baseline-transformer": BaselineTransformer,
}


# pydantic and Python treat 1 and true as equal.
_EXACT: dict[object, tuple[type, str]] = {"int": (int, "an integer"), "bool": (bool, "true or false")}


def build(config: dict[str, Any]) -> Chain:
    """The untrained model of a configuration {'kind': …, options}. Raises BadInput for an unknown kind or option, or a size above limits.py."""
    options = dict(config)
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise BadInput(f"expected a model kind among {', '.join(KINDS)}, got {kind!r}; name one of them in the recipe")
    known = signature(KINDS[kind]).parameters
    if unknown := sorted(set(options) - set(known)):
        raise BadInput(f"expected options of a model of kind {kind!r} ({', '.join(known)}), got {', '.join(unknown)}; correct or remove it")
    for name, value in options.items():
        exact, words = _EXACT.get(known[name].annotation, (object, ""))
        if exact is not object and type(value) is not exact:
            raise BadInput(f"expected {words} as {name} of a model of kind {kind!r}, got {value!r}; check the recipe")
    _check_sizes(kind, options)
    try:
        return KINDS[kind](**options)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:  # raised by torch too, for impossible sizes
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"expected options that a model of kind {kind!r} can have, got {options} ({first_line(error)}); check the recipe") from None


def _check_sizes(kind: str, options: dict[str, Any]) -> None:
    """Raises BadInput for a size above the limits, before a layer is created."""

    def largest(name: str, value: Any, limit: int) -> None:
        if isinstance(value, int) and value > limit:
            raise BadInput(f"expected {name} of at most {limit} of a model of kind {kind!r}, got {limits.number(value)}; make it smaller")

    for name, value in options.items():
        largest(name, value, limits.MODEL.get(name, 2**63 - 1))
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"expected a finite {name} of a model of kind {kind!r}, got {value}; write a number")
        if isinstance(value, list | tuple | str | dict):
            longest = limits.MODEL["vocabulary_size"] if name == "vocabulary" else limits.LAYERS
            largest(f"a number of entries in {name}", len(value), longest)
        for entry in value if isinstance(value, list | tuple) else ():
            largest(name, entry, limits.SIDE if name == "image" else limits.WIDTH)
