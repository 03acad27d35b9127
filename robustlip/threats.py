"""Threats: what a perturbation may change, in which norm, by how much.

A certifier proves a lower bound of the robust radius for a threat; an attack finds an upper bound for the same object. Radii are in raw input units
for `InputBall`, in units of the embedding for `EmbeddingBall`, and in units of a weight matrix (or fractions of its spectral norm) for `WeightBall`.

`radius=None` asks for the largest radius; a number asks whether that radius holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Union

from robustlip.errors import BadInput

# The p of ‖·‖_p for each name.
ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
INPUT_NORMS = tuple(ORDERS)
WEIGHT_NORMS = ("spectral", "frobenius")


def order_of(norm: str) -> float:
    """p of the norm ‖·‖_p: 1, 2 or infinity."""
    return ORDERS[norm]


def dual_order_of(norm: str) -> float:
    """q of the dual norm: the largest ⟨g, δ⟩ over ‖δ‖_p ≤ 1 is ‖g‖_q, 1/p + 1/q = 1."""
    return {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[ORDERS[norm]]


def l2_factor(norm: str, numbers: int) -> float:
    """‖δ‖₂ ≤ this·‖δ‖ for δ with that many entries, rounded up: √n in ℓ∞, 1 in ℓ2 and ℓ1."""
    return math.sqrt(numbers) * (1 + 1e-15) if ORDERS[norm] == math.inf else 1.0


def _check_radius(radius: float | None) -> None:
    if radius is None:
        return
    if isinstance(radius, bool) or not isinstance(radius, (int, float)):
        raise BadInput(f"expected a threat radius that is a number, got {radius!r}; give a positive number")
    if not (math.isfinite(radius) and radius > 0):
        raise BadInput(f"expected a threat radius above 0 and finite, got {radius}; give a positive number")


@dataclass(frozen=True)
class InputBall:
    """Every input x' with ‖x' − x‖ ≤ radius, over all coordinates of one sample together.

    norm: 'l1', 'l2' or 'linf'. radius: raw input units (an image in [0, 1] keeps that unit).
    clip: None for the whole ball, or (low, high) when inputs outside that box cannot occur; a certificate of
    the whole ball covers the clipped one, an attack has to respect it.
    Raises BadInput for an unknown norm, a radius ≤ 0 or an empty box.
    """

    place: ClassVar = "input"  # what is changed
    norm: Literal["l1", "l2", "linf"] = "l2"
    radius: float | None = None
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.norm not in INPUT_NORMS:
            raise BadInput(f"expected an input norm among {', '.join(INPUT_NORMS)}, got {self.norm!r}; name one of them")
        _check_radius(self.radius)
        if self.clip is not None and not (math.isfinite(self.clip[0]) and math.isfinite(self.clip[1]) and self.clip[0] < self.clip[1]):
            raise BadInput(f"expected clip=(low, high) with low < high, both finite, got {self.clip}; order the two numbers")

    @property
    def name(self) -> str:
        return self.norm

    @property
    def space(self) -> str:
        """The norm that bounds the change before the first layer."""
        return self.norm

    @property
    def box(self) -> tuple[float, float] | None:
        """The box that perturbed inputs stay in, None without one."""
        return self.clip

    @property
    def units(self) -> str:
        return f"{self.norm} distance in raw input units"


@dataclass(frozen=True)
class EmbeddingBall:
    """Every embedding sequence X' with ‖x'_t − x_t‖₂ ≤ radius for the named tokens and x'_t = x_t elsewhere.

    tokens: None for all positions, or positions (negative ones count from the end).
    joint: False bounds each token by the radius; True bounds the Frobenius norm of the whole change.
    """

    place: ClassVar = "embedding"  # what is changed
    space: ClassVar = "l2"  # as of InputBall
    box: ClassVar = None
    radius: float | None = None
    tokens: tuple[int, ...] | None = None
    joint: bool = False

    def __post_init__(self) -> None:
        _check_radius(self.radius)
        if self.tokens is not None and (len(self.tokens) == 0 or len(set(self.tokens)) != len(self.tokens)):
            raise BadInput(f"expected tokens=None or distinct positions, got {self.tokens}; name each position once")

    @property
    def norm(self) -> str:
        return "fro" if self.joint else "l2"

    @property
    def name(self) -> str:
        base = "embedding-fro" if self.joint else "embedding-l2"
        return base if self.tokens is None else f"{base}@{','.join(map(str, self.tokens))}"

    @property
    def units(self) -> str:
        return "Frobenius norm of the embedding change" if self.joint else "l2 norm of each token's embedding change"

    def positions(self, length: int) -> list[int]:
        """The perturbed positions of a sequence of `length` tokens. Raises BadInput when one does not exist."""
        if self.tokens is None:
            return list(range(length))
        for t in self.tokens:
            if not -length <= t < length:
                raise BadInput(f"expected token positions in [{-length}, {length - 1}], got {t}; the sequence has {length} tokens")
        positions = [t % length for t in self.tokens]
        if len(set(positions)) != len(positions):
            raise BadInput(f"expected distinct token positions, got {self.tokens} in a sequence of {length}; name each position once")
        return positions


@dataclass(frozen=True)
class WeightBall:
    """Every model whose weight matrices are W + E with ‖E‖ ≤ radius, each matrix on its own.

    norm: 'spectral' or 'frobenius'. relative=True measures the radius in units of σ(W) of that matrix.
    Matrices are those of Linear, Embedding, Conv2d and attention layers; biases and gains stay as they are.
    """

    place: ClassVar = "weights"  # what is changed
    space: ClassVar = "l2"  # as of InputBall
    box: ClassVar = None
    norm: Literal["spectral", "frobenius"] = "spectral"
    radius: float | None = None
    relative: bool = True

    def __post_init__(self) -> None:
        if self.norm not in WEIGHT_NORMS:
            raise BadInput(f"expected a weight norm among {', '.join(WEIGHT_NORMS)}, got {self.norm!r}; name one of them")
        _check_radius(self.radius)

    @property
    def name(self) -> str:
        return f"weights-{self.norm}" if self.relative else f"weights-{self.norm}-absolute"

    @property
    def units(self) -> str:
        of = "fraction of each matrix's spectral norm" if self.relative else "absolute"
        return f"{self.norm} norm of each matrix's change, {of}"


Threat = Union[InputBall, EmbeddingBall, WeightBall]


def with_radius(threat: Threat, radius: float | None) -> Threat:
    """The same threat at another radius."""
    return replace(threat, radius=radius)


def units_and_box(threat: Threat) -> str:
    """The units of the threat and, of an input threat, the box that perturbed inputs stay in: what tables and terminals show."""
    if threat.place != "input":
        return threat.units
    return f"{threat.units}, {'no box' if threat.box is None else f'inputs within [{threat.box[0]:g}, {threat.box[1]:g}]'}"


def parse_clip(text: str | None, threat: str) -> tuple[float, float] | None:
    """'LOW,HIGH' → the box of an input threat, None or 'none' → no box. Raises BadInput for anything else, and for a box of another threat."""
    if text is None or text == "none":
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"expected --clip LOW,HIGH or none, got {text!r}; write e.g. --clip 0,1") from None
    clip = (low, high)
    parse_threat(threat, None, clip)
    return clip


def parse_threat(text: str, radius: float | None = None, clip: tuple[float, float] | None = None) -> Threat:
    """The threat that a name stands for: the inverse of `.name`.

    Names: l1, l2, linf; embedding-l2, embedding-fro, either with @positions (embedding-l2@-1);
    weights-spectral, weights-frobenius, either with -absolute. Raises BadInput for any other.
    """
    if text in INPUT_NORMS:
        return InputBall(text, radius, clip)  # type: ignore[arg-type]
    if clip is not None:
        raise BadInput(f"expected clip with an input threat (l1, l2, linf), got it with {text!r}; leave clip out")
    base, _, at = text.partition("@")
    if base in ("embedding-l2", "embedding-fro"):
        tokens = None
        if at:
            try:
                tokens = tuple(int(part) for part in at.split(","))
            except ValueError:
                raise BadInput(f"expected token positions as integers after '@', got {at!r}; write e.g. embedding-l2@-1") from None
        return EmbeddingBall(radius, tokens, joint=base == "embedding-fro")
    stem, absolute = (text.removesuffix("-absolute"), text.endswith("-absolute"))
    if stem in ("weights-spectral", "weights-frobenius"):
        return WeightBall(stem.removeprefix("weights-"), radius, relative=not absolute)  # type: ignore[arg-type]
    raise BadInput(
        f"expected a threat among l1, l2, linf, embedding-l2[@positions], embedding-fro[@positions], "
        f"weights-spectral[-absolute], weights-frobenius[-absolute], got {text!r}; name one of them"
    )
