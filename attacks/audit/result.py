"""Results of an audit, for the whole model and for single layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

VIOLATED, HOLDS = "violated", "not refuted"


class _Compared:
    """A constant that was found, and the claimed one."""

    claimed: float
    found: float

    @property
    def ratio(self) -> float:
        """found/claimed; the claim is false above 1."""
        return self.found / self.claimed if self.claimed > 0 else math.inf if self.found > 0 else 0.0

    @property
    def verdict(self) -> str:
        return VIOLATED if self.found > self.claimed else HOLDS


@dataclass(frozen=True)
class Audit(_Compared):
    """The pair of inputs with the largest ratio of found to claimed constant.

    claimed, found: Lipschitz constants in `units`; found is a lower bound of the true one, with rounding subtracted. domain: largest token norm
    (ℓ2) of the claim, None for all inputs. x, x_prime: float64, embeddings (T, D) or one raw input. distance, change: ‖x' − x‖ and
    ‖f(x') − f(x)‖ in ℓ2. rounding: subtracted from `change`; 'proved' if all layers have rules, else 'estimated' from float32.
    layers: (name, the claim's constant for that layer). why: one sentence about the formula's mistake, empty if the claim was not refuted.
    """

    formula: str
    claimed: float
    found: float
    units: str
    domain: float | None
    space: str
    x: Tensor
    x_prime: Tensor
    distance: float
    change: float
    rounding: float
    rounding_kind: str
    starts: int
    seed: int
    weights_sha256: str
    architecture_sha256: str
    seconds: float = 0.0
    layers: tuple[tuple[str, float], ...] = ()
    why: str = ""
    worst: tuple[WorstLayer, ...] = field(default=())

    @property
    def violated(self) -> bool:
        """Whether these weights, or the worst weights with the same norms, refute the formula."""
        return self.verdict == VIOLATED or any(w.verdict == VIOLATED for w in self.worst)

    @property
    def norm(self) -> str:
        tokens = self.space == "embedding"
        if self.units == "rms":
            return "∞-RMS (largest token RMS) in and out" if tokens else "RMS in and out"
        return "largest token ℓ2 norm in and out" if tokens else "ℓ2 in and out"

    def to_json_dict(self) -> dict[str, Any]:
        """Everything except the inputs, which are in the witness file."""
        hidden = ("x", "x_prime", "worst", "layers")
        plain = {k: v for k, v in self.__dict__.items() if k not in hidden}
        plain |= {"ratio": self.ratio, "verdict": self.verdict, "norm": self.norm, "layers": [{"layer": n, "constant": c} for n, c in self.layers]}
        return plain | {"worst_weights": [w.to_json_dict() for w in self.worst]}


@dataclass(frozen=True)
class WorstLayer(_Compared):
    """One layer with adversarial weights under the layer's own norms (kept: which norms), and the claim of the same formula."""

    formula: str
    layer: str
    part: str
    kept: str
    claimed: float
    found: float
    units: str
    domain: float | None
    tokens: bool
    module: nn.Sequential
    x: Tensor
    x_prime: Tensor

    def to_json_dict(self) -> dict[str, Any]:
        plain = {k: v for k, v in self.__dict__.items() if k not in ("module", "tokens", "x", "x_prime")}
        return plain | {"ratio": self.ratio, "verdict": self.verdict}
