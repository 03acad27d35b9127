"""From the plain dictionary in a recipe or card to a model, and nothing else: no code travels with weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from robustlip.errors import BadInput, first_line
from robustlip.layers import Chain
from robustlip.models.baselines import BaselineGPT, BaselineTransformer
from robustlip.models.classifier import LipschitzTransformer
from robustlip.models.gpt import LipschitzGPT
from robustlip.models.mlp import LipschitzMLP


def _mlp(widths: list[int], activation: str = "relu", **options: Any) -> LipschitzMLP:
    return LipschitzMLP(widths, activation, **options)


KINDS: dict[str, Callable[..., Chain]] = {
    "mlp": _mlp,
    "lipschitz-gpt": LipschitzGPT,
    "baseline-gpt": BaselineGPT,
    "lipschitz-transformer": LipschitzTransformer,
    "baseline-transformer": BaselineTransformer,
}


def build(config: dict[str, Any]) -> Chain:
    """The untrained model of a configuration {'kind': …, options}. Raises BadInput for an unknown kind or option."""
    options = dict(config)
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise BadInput(f"expected a model kind among {', '.join(KINDS)}, got {kind!r}; name one of them in the recipe")
    try:
        return KINDS[kind](**options)
    except TypeError as error:
        raise BadInput(f"expected only options that a model of kind {kind!r} has, got {sorted(options)} ({error}); check the recipe") from None
    except (ValueError, RuntimeError, ArithmeticError) as error:  # of torch, for sizes that no layer has
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"expected sizes that a model of kind {kind!r} can have, got {options} ({first_line(error)}); check the recipe") from None
