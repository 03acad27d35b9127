"""Records: one row per sample × threat × model, certificate and observation side by side. Tables are views of records."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustlip.errors import BadInput, CertificateViolation, first_line
from robustlip.files import atomic

if TYPE_CHECKING:
    import pandas as pd


_METADATA = b"robustlip"
_ROWS = b"robustlip_rows_sha256"


@dataclass(frozen=True)
class Record:
    """The certificate and the observation for one sample of one model under one threat.

    certified_radius: proved lower bound of the robust radius (0: nothing proved), attacked_radius: distance of the nearest
    misclassified point found (inf: none found, 0: misclassified without a perturbation), both in the units of the threat; None
    if that stage was not requested. Weight threats only: certified_sensitivity, the bound of ‖f_{W+E}(x) − f_W(x)‖₂ over
    ‖E‖ ≤ sensitivity_radius, divided by that radius; observed_sensitivity, the largest ‖f_{W+E}(x) − f_W(x)‖₂/‖E‖ found within it;
    observed_change, its numerator, and certified_change, the bound at that ‖E‖: these two are compared, because the quotient of a bound
    that saturates decreases with the radius. status: certified, abstained, misclassified, or '' without a certificate.
    attack: the attack that found attacked_radius, or all attacks that were run. failure: one sentence if an attack met logits that are not finite and
    no attack broke the sample: it does not count as robust. partial: the suite requests more samples than were run.
    adversarial: file of the adversarial point, relative to the run, if it contradicts the certificate; else ''.
    seconds: time for this sample, as its share of the batch. versions: JSON of package versions.
    """

    suite: str
    model: str
    pair: str
    role: str
    data: str
    data_note: str
    split: str
    index: int
    label: int
    prediction: int
    threat: str
    norm: str
    units: str
    certified_radius: float | None = None
    status: str = ""
    reason: str = ""
    method: str = ""
    dtype: str = ""
    attacked_radius: float | None = None
    attack: str = ""
    attack_seed: int | None = None
    failure: str = ""
    certified_sensitivity: float | None = None
    observed_sensitivity: float | None = None
    sensitivity_radius: float | None = None
    certified_change: float | None = None
    observed_change: float | None = None
    weights_sha256: str = ""
    versions: str = "{}"
    seed: int = 0
    partial: bool = False
    adversarial: str = ""
    seconds: float = 0.0

    def contradiction(self) -> str:
        """The contradiction between certificate and observation, as a sentence; '' if they agree."""
        found = ""
        # Written as `not <=`, so that a NaN counts as a contradiction rather than as agreement.
        if self.certified_radius is not None and self.attacked_radius is not None and not self.certified_radius <= self.attacked_radius:
            found = f"certified radius {self.certified_radius!r} but an attack ({self.attack}) succeeded at distance {self.attacked_radius!r}"
        elif self.certified_change is not None and self.observed_change is not None and not self.observed_change <= self.certified_change:
            found = f"certified change of the logits {self.certified_change!r} under a weight change that changed them by {self.observed_change!r}"
        return found and f"{self.model}, threat {self.threat}, sample {self.index}: {found}"


_FLOATS = (
    "certified_radius",
    "attacked_radius",
    "certified_sensitivity",
    "observed_sensitivity",
    "sensitivity_radius",
    "certified_change",
    "observed_change",
    "seconds",
)
_INTS = ("index", "label", "prediction", "attack_seed", "seed")


def check_soundness(records: Iterable[Record], folder: Path | None = None) -> None:
    """Raise CertificateViolation if a certificate is contradicted on any sample. This exception must not be caught.

    There is no tolerance: certified radii are rounded down, and attacks measure their distance in float64.
    """
    wrong = [record for record in records if record.contradiction()]
    if not wrong:
        return
    # The worst first: the message shows one.
    worst = max(wrong, key=lambda r: (r.certified_radius or 0.0) - (r.attacked_radius or 0.0) if r.attacked_radius is not None else 0.0)
    saved = f"the adversarial point is in {(folder / worst.adversarial) if folder else worst.adversarial}" if worst.adversarial else ""
    others = f"{len(wrong) - 1} other samples are contradicted too" if len(wrong) > 1 else ""
    remark = "; ".join(part for part in (saved, others, "this is a soundness bug: please report it with the run folder") if part)
    raise CertificateViolation(f"expected every certificate to hold, got {worst.contradiction()}; {remark}")


def to_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Records → DataFrame, one column per field; None becomes a missing value."""
    import pandas as pd

    frame = pd.DataFrame([asdict(record) for record in records], columns=[f.name for f in fields(Record)])
    for name in _FLOATS:
        frame[name] = frame[name].astype("float64")
    for name in _INTS:
        frame[name] = frame[name].astype("Int64" if name == "attack_seed" else "int64")
    return frame


def from_frame(frame: pd.DataFrame) -> list[Record]:
    """The inverse of `to_frame`. Raises BadInput if a column is missing or unknown."""
    import pandas as pd

    expected = {f.name for f in fields(Record)}
    if set(frame.columns) != expected:
        odd = ", ".join(sorted(set(frame.columns) ^ expected))
        raise BadInput(f"expected the columns of a robustlip run, got a difference in: {odd}; run the suite again with this version")

    def plain(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        return None if value is pd.NA or (isinstance(value, float) and math.isnan(value)) else value

    return [Record(**{str(k): plain(v) for k, v in row.items()}) for row in frame.to_dict("records")]


def write_records(path: Path, records: Sequence[Record], metadata: dict[str, Any]) -> None:
    """Write one parquet part atomically. metadata: plain JSON types, stored in the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for record in records:
        for name in _FLOATS:
            value = getattr(record, name)
            if value is not None and math.isnan(value):
                # A missing value means "not measured"; a NaN must never become one.
                where = f"sample {record.index} ({record.model}, {record.threat})"
                raise CertificateViolation(f"expected numbers in every record, got NaN as {name} of {where}; this is a bug, please report it")
    frame = to_frame(records)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    rows = _digest(from_frame(frame)).encode()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _METADATA: json.dumps(metadata).encode(), _ROWS: rows})
    with atomic(path) as temporary:
        pq.write_table(table, temporary)


def _digest(records: Sequence[Record]) -> str:
    """SHA-256 of all fields of records. It reveals accidental changes, not forgery."""
    return hashlib.sha256(json.dumps([asdict(record) for record in records], default=str).encode()).hexdigest()


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The metadata of a part, or None if the file is missing, broken or not ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = (pq.read_schema(path).metadata or {}).get(_METADATA)
        return None if found is None else json.loads(found)
    except (OSError, pa.ArrowException, ValueError):
        return None


def read_records(path: Path) -> list[Record]:
    """The records of one part. Raises BadInput if the file is not a complete part of ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        frame = table.to_pandas()
        records = from_frame(frame)
    except (OSError, pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise BadInput(f"expected a part of a robustlip run, got {path} ({first_line(error)}); delete that file and run the suite again") from error
    if (table.schema.metadata or {}).get(_ROWS) != _digest(records).encode():
        raise BadInput(f"expected the rows that were written to {path}, got others: it was changed; delete that file and run the suite again")
    return records
