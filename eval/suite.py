"""A suite: models, data and threats of an evaluation. Read from TOML, and checked before anything runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from robustlip.errors import BadInput
from robustlip.files import is_file, read_toml, strictly
from robustlip.limits import ATTACKS, CONTEXT, PAIRS, RADII, ROWS, SEARCH, THREATS, number
from robustlip.names import check_table
from robustlip.threats import Threat, WeightBall, parse_threat

BUNDLED = Path(__file__).resolve().parent / "suites"
LIPSCHITZ, BASELINE = "lipschitz", "baseline"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AttackSpec(_Strict):
    """One attack by its name in `robustlip.attacks`, and its options (steps, restarts, …)."""

    name: str
    options: dict[str, bool | int | float | str | tuple[str, ...]] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _possible(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name, value in options.items():
            if type(value) is int and value > SEARCH:
                raise ValueError(f"expected {name} of an attack of at most {SEARCH}, got {number(value)}; make it smaller")
        return options


class SearchSpec(_Strict):
    """The effort of `robustlip.attacks.observed_sensitivity`."""

    starts: int = Field(default=2, ge=1, le=SEARCH)
    power_steps: int = Field(default=10, ge=1, le=SEARCH)
    ascent_steps: int = Field(default=10, ge=0, le=SEARCH)


class ThreatSpec(_Strict):
    """One threat (see `robustlip.threats.parse_threat`) and how it is certified and attacked.

    radii: the radii of the table, in the units of the threat, ascending. clip: (low, high) of the inputs, None for the whole ball.
    sensitivity_radius: weight threats only; the radius at which certified and observed sensitivity are compared; search: its effort.
    limit: maximum number of samples for this threat. Weight threats may omit radii: then only the sensitivity is measured.
    """

    name: str
    radii: tuple[float, ...] = Field(default=(), max_length=RADII)
    clip: tuple[float, float] | None = None
    method: str = "best"
    dtype: str | None = None
    limit: int | None = Field(default=None, ge=1, le=ROWS)
    attacks: tuple[AttackSpec, ...] = Field(default=(AttackSpec(name="min"),), max_length=ATTACKS)
    sensitivity_radius: float | None = None
    search: SearchSpec = SearchSpec()

    @field_validator("radii")
    @classmethod
    def _positive(cls, radii: tuple[float, ...]) -> tuple[float, ...]:
        for radius in radii:
            _check_positive("table radii", radius)
        if list(radii) != sorted(set(radii)):
            raise ValueError(f"expected table radii in ascending order, each once, got {list(radii)}; order them")
        return radii

    @model_validator(mode="after")
    def _consistent(self) -> ThreatSpec:
        threat = self.threat()
        if isinstance(threat, WeightBall):
            if self.sensitivity_radius is None:
                raise ValueError(f"expected sensitivity_radius for the weight threat {self.name!r}, got none; give a positive number")
            _check_positive("sensitivity_radius", self.sensitivity_radius)
        else:
            if self.sensitivity_radius is not None:
                raise ValueError(f"expected sensitivity_radius only with a weight threat, got it with {self.name!r}; leave it out")
            if not self.radii:
                raise ValueError(f"expected at least one table radius for the threat {self.name!r}, got none; give radii = [...]")
        if self.radii and not self.attacks:
            raise ValueError(f"expected at least one attack for the threat {self.name!r}, got none; leave attacks out for 'min'")
        return self

    def threat(self, radius: float | None = None) -> Threat:
        """The threat object. Raises BadInput for an unknown name."""
        return parse_threat(self.name, radius, self.clip)


class PairSpec(_Strict):
    """A Lipschitz-constrained model and its baseline: same data, same threats, same radii.

    data: a data spec of `robustlip.data`; page_fallback: use the page of text in robustlip if that data is not found.
    limit: samples; context: tokens per sample of text; subset and the columns: as in load_data. One of the models may be omitted.
    """

    name: str
    title: str = ""
    data: str
    page_fallback: bool = False
    limit: int = Field(ge=1, le=ROWS)
    context: int | None = Field(default=None, ge=1, le=CONTEXT)
    subset: str | None = Field(default=None, min_length=1)
    image_column: str | None = Field(default=None, min_length=1)
    label_column: str | None = Field(default=None, min_length=1)
    text_column: str | None = Field(default=None, min_length=1)
    lipschitz: str | None = None
    baseline: str | None = None
    threats: tuple[ThreatSpec, ...] = Field(alias="threat", min_length=1, max_length=THREATS)

    @model_validator(mode="after")
    def _consistent(self) -> PairSpec:
        if not self.members():
            raise ValueError(f"expected a lipschitz or a baseline model in pair {self.name!r}, got neither; name at least one")
        names = [threat.name for threat in self.threats]
        if len(set(names)) != len(names):
            raise ValueError(f"expected each threat once in pair {self.name!r}, got {', '.join(names)}; merge the repeated one")
        return self

    def members(self) -> list[tuple[Literal["lipschitz", "baseline"], str]]:
        """(role, model) of the given models."""
        both: list[tuple[Any, str | None]] = [(LIPSCHITZ, self.lipschitz), (BASELINE, self.baseline)]
        return [(role, model) for role, model in both if model is not None]


class Suite(_Strict):
    """The evaluation. All randomness is drawn from `seed`. name: also of the folder of its runs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]*$", max_length=100)
    title: str = ""
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**32)
    pairs: tuple[PairSpec, ...] = Field(alias="pair", min_length=1, max_length=PAIRS)

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        for what, names in {
            "pair name": [pair.name for pair in self.pairs],
            "model": [model for pair in self.pairs for _, model in pair.members()],
        }.items():
            if len(set(names)) != len(names):
                raise ValueError(f"expected each {what} once in a suite, got {', '.join(names)}; rename or drop the repeated one")
        return self

    def threat(self, pair: str, threat: str) -> ThreatSpec:
        """The threat entry of that pair. Raises KeyError."""
        for p in self.pairs:
            for t in p.threats:
                if (p.name, t.name) == (pair, threat):
                    return t
        raise KeyError((pair, threat))

    def to_json_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the keys of the TOML file."""
        return self.model_dump(mode="json", by_alias=True)


def _check_positive(what: str, radius: float) -> None:
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"expected {what} above 0 and finite, got {radius}; give a positive number")


def bundled() -> list[str]:
    """The names of the suites that are part of robustlip."""
    return sorted(path.stem for path in BUNDLED.glob("*.toml"))


def load_suite(path_or_name: str | Path) -> Suite:
    """The suite of a TOML file, or a bundled one by its name.

    Raises BadInput for a missing file, invalid TOML, an unknown or missing key, an invalid radius, an unknown threat or attack.
    """
    path = Path(path_or_name)
    if not is_file(path):
        path = BUNDLED / f"{path_or_name}.toml"
    if not is_file(path):
        raise BadInput(f"expected a suite file or one of {', '.join(bundled())}, got {str(path_or_name)!r}; check the path")
    return parse_suite(read_toml(path, "a suite"), source=path.name)


def parse_suite(raw: dict[str, Any], source: str = "the suite") -> Suite:
    """The suite in a table of TOML (or JSON). Raises BadInput."""
    check_table(raw, source)
    try:
        suite = strictly(Suite, raw)
    except ValidationError as error:
        raise BadInput(explain(error, source)) from error
    _check_attacks(suite)
    return suite


def _check_attacks(suite: Suite) -> None:
    # Built here only to be checked, so that a misspelled option is not reported after ten minutes of evaluation.
    from robustlip.attacks import by_name

    for pair in suite.pairs:
        for threat in pair.threats:
            for attack in threat.attacks if threat.radii else ():
                by_name(attack.name, **attack.options).check_threat(threat.threat())


def explain(error: ValidationError, source: str) -> str:
    """The first error of pydantic as one message: key, expectation, value, remedy."""
    first = error.errors()[0]
    kind, got = first["type"], first.get("input")
    where, key = _place(first["loc"]), str(first["loc"][-1]) if first["loc"] else "top level"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, Exception):  # raised by our own validators: already a complete message
        return f"{source}{f', at {where}' if where else ''}: {cause}{more}"
    if kind == "extra_forbidden":
        return f"{source}: expected only known keys, got {key!r} at {where}; remove or correct that key{more}"
    if kind == "missing":
        return f"{source}: expected the key {key!r} at {where}, got none; add it{more}"
    return f"{source}: at {where}, {_lower(first['msg'])}, got {got!r}; correct that value{more}"


def _place(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
