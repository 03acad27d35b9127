"""The certificate file: JSON with a certificate and everything that is needed to recompute it.

    from robustlip.certificate_file import from_certificate, read, write
    write(path, from_certificate(certificate, data, spec="digits:test", model="digits-mlp-lipschitz"))
    file = read(path)                                   # BadInput unless it is complete, of a known version and consistent

Files are not trusted. `read` limits the size, refuses NaN, infinity, unknown keys and repeated keys, and refuses
claims that contradict each other (a radius on a misclassified sample). Whether the claims are true is checked by
`robustlip.verification.verify`, which recomputes them. The model named in a file is never loaded (the caller provides one). The data is loaded as
`--data` would load it: a data set by its name, or a file by its name without folders, in the caller's folder.

Published as docs/certificate.schema.json; `robustlip verify --schema` prints it.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from robustlip.certificates import ABSTAINED, CERTIFIED, MISCLASSIFIED, Certificate
from robustlip.certifiers import methods
from robustlip.data import Dataset
from robustlip.data.lengths import by_length, labels_of
from robustlip.data.load import FILES, parse_spec
from robustlip.errors import BadInput
from robustlip.files import json_text, read_limited, write_text
from robustlip.names import check_line, shown
from robustlip.threats import Threat, parse_threat

SCHEMA = "robustlip-certificate-1"
SIZE_LIMIT = 128 * 2**20  # bytes: about 400 000 samples
REMEDY = "make it again with `robustlip certify --json`"

# Texts of a file are shown in terminals: one line, without invisible characters. The pattern is the part that a JSON schema can express.
Line = Annotated[str, Field(max_length=300, pattern=r"^[^\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]*$"), AfterValidator(check_line)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256, 64 hexadecimal digits")]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Radius = Annotated[float, Field(ge=0)]


class Strict(BaseModel):
    """Unknown keys, strings for numbers, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataSource(Strict):
    """The rows of the samples, with all arguments that `robustlip.data.load_data` needs."""

    spec: Line = Field(description="name:split; for a file its name without folders")
    note: Line = Field(description="what tables have to show about the source, e.g. 'subset'")
    limit: Annotated[int, Field(ge=1)] | None = Field(description="maximum number of rows, drawn with seed; null for all")
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    context: Annotated[int, Field(ge=1)] | None = Field(description="tokens per window of text; null for the default and for images")
    subset: Line | None = Field(default=None, description="the configuration of the data set; null if none was chosen")
    image_column: Line | None = Field(default=None, description="the name of the column; null if none was given; likewise below")
    label_column: Line | None = None
    text_column: Line | None = None
    requested: Annotated[int, Field(ge=1, le=2**63 - 1)] = Field(description="number of rows that spec and limit select")
    sha256: Sha256 = Field(description="SHA-256 over the row_sha256 of all samples (as ASCII), in the order of the file")

    @field_validator("spec")
    @classmethod
    def _no_folder(cls, spec: str) -> str:
        if spec.startswith(("/", ".", "~")) or "\\" in spec or spec.count("/") > 1:
            raise ValueError(f"expected a data name or the name of a file without folders, got {spec!r}; {REMEDY}")
        return spec


class Sample(Strict):
    """The claim about one row."""

    index: Count = Field(description="row in the split, or offset of the window in the split's token stream")
    label: Count
    prediction: Count
    radius: Radius = Field(description="proved: no perturbation of the threat up to this radius changes the prediction; 0 if nothing is proved")
    status: Literal["certified", "abstained", "misclassified"]
    reason: Line = Field(description="why it is not certified; empty if it is certified")
    method: Line = Field(default="", description="the method that proved this radius; empty if none did")
    row_sha256: Sha256 = Field(description="SHA-256 of dtype NUL shape NUL label NUL and the row's bytes: raw inputs or token ids, little endian")

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method and method not in methods():
            raise ValueError(f"expected a method among {', '.join(methods())}, got {method!r}; {REMEDY}")
        return method

    @model_validator(mode="after")
    def _consistent(self) -> Sample:
        right = self.prediction == self.label
        wrong = ""
        if self.status == CERTIFIED and not right:
            wrong = f"a certified prediction equal to the label, got prediction {self.prediction} and label {self.label}"
        elif self.status == CERTIFIED and self.radius == 0:
            wrong = "a radius above 0 if the status is certified, got 0"
        elif self.status == CERTIFIED and self.reason:
            wrong = f"no reason if the status is certified, got {self.reason!r}"
        elif self.status == MISCLASSIFIED and right:
            wrong = f"a misclassified prediction that is not the label, got {self.label} for both"
        elif self.radius > 0 and (self.status == MISCLASSIFIED or not right):
            wrong = f"radius 0 if the prediction is not the label or the status is misclassified, got {self.radius}"
        if wrong:
            raise ValueError(f"sample {self.index}: expected {wrong}; {REMEDY}")
        return self


class CertificateFile(Strict):
    """A robustlip certificate: for each sample a radius within which the named model's prediction cannot change."""

    schema_version: Literal["robustlip-certificate-1"] = Field(alias="schema", description="version of this format")
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")] = Field(description="UTC")
    model: Line = Field(description="as the user named it: zoo name, file name without folders, or package.module:callable")
    weights_sha256: Sha256 = Field(description="hash of the weights cast to the covered dtype; see robustlip.hashing")
    architecture_sha256: Sha256
    threat: Line = Field(description="name, e.g. l2, linf, embedding-l2@-1, weights-spectral; positions and 'absolute' are part of it")
    norm: Line
    units: Line = Field(description="units of every radius in this file")
    clip: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        description="[low, high]: valid range of inputs; null for the whole ball"
    )
    requested_radius: Annotated[float, Field(gt=0)] | None = Field(
        description="null: the largest radius was computed; a number: samples proved for a smaller radius are abstained"
    )
    method: Line
    dtype: Literal["float64", "float32", "bfloat16", "float16", "real"] = Field(
        description="the arithmetic that is covered; 'real' means exact arithmetic only"
    )
    device: Line = Field(description="type of device that computed it: cpu, cuda")
    versions: Annotated[dict[Line, Line], Field(max_length=20)] = Field(description="versions of robustlip, its rules and torch")
    execution: Line | None = Field(default=None, description="the kernels that are covered; null in older files")
    bound: Annotated[dict[Line, float | Line], Field(max_length=50)] = Field(
        description="Lipschitz constants; radii do not depend on them, and verification refuses constants smaller than those it computes"
    )
    batch_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="samples per batch; rounding and the radii of searches depend on it slightly; null if unknown"
    )
    data: DataSource
    partial: bool = Field(description="true if there are fewer samples than data.requested")
    samples: Annotated[list[Sample], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> CertificateFile:
        missing = {"robustlip", "rules", "torch"} - self.versions.keys()
        if missing:
            raise ValueError(f"expected the versions of robustlip, rules and torch, got none of {', '.join(sorted(missing))}; {REMEDY}")
        try:
            threat = self.ball()
        except BadInput as error:
            raise ValueError(str(error)) from None
        if (threat.norm, threat.units) != (self.norm, self.units):
            raise ValueError(
                f"expected norm {threat.norm!r} and units {threat.units!r} of {self.threat}, got {self.norm!r} and {self.units!r}; {REMEDY}"
            )
        seen: set[int] = set()
        for sample in self.samples:
            if sample.index in seen:
                raise ValueError(f"expected each sample once, got index {sample.index} twice; {REMEDY}")
            seen.add(sample.index)
            if self.requested_radius is None and sample.status == ABSTAINED and sample.radius > 0:
                raise ValueError(f"sample {sample.index}: expected radius 0 if the status is abstained, got {sample.radius}; {REMEDY}")
            if self.requested_radius is not None and (sample.radius >= self.requested_radius) != (sample.status == CERTIFIED):
                raise ValueError(
                    f"sample {sample.index}: expected the status certified exactly for a radius of at least the requested {self.requested_radius}, "
                    f"got {sample.status} at {sample.radius}; {REMEDY}"
                )
        count = len(self.samples)
        if count > self.data.requested:
            raise ValueError(f"expected at most the {self.data.requested} requested samples, got {count}; {REMEDY}")
        if self.partial != (count < self.data.requested):
            raise ValueError(
                f"expected partial to be true exactly if samples are missing, got {self.partial} with {count} of {self.data.requested}; {REMEDY}"
            )
        if self.data.sha256 != rows_sha256([sample.row_sha256 for sample in self.samples]):
            raise ValueError(f"expected data.sha256 to be the hash over the samples' row_sha256, got another; {REMEDY}")
        return self

    def ball(self) -> Threat:
        """The threat that was certified."""
        return parse_threat(self.threat, self.requested_radius, None if self.clip is None else (self.clip[0], self.clip[1]))

    def document(self) -> dict[str, Any]:
        """The file's JSON as plain types."""
        return self.model_dump(mode="json", by_alias=True)


def from_certificate(
    certificate: Certificate,
    data: Dataset,
    *,
    spec: str,
    model: str,
    limit: int | None = None,
    seed: int = 0,
    context: int | None = None,
    device: str = "cpu",
    batch_size: int | None = None,
) -> CertificateFile:
    """The file for a certificate of rows of `data`.

    data: the result of load_data(spec, limit=limit, seed=seed, context=context). certificate.index contains rows of it, not necessarily all:
    a file with fewer rows is marked partial. model: as the user named it; folders are removed. batch_size: of the calls of certify, if given.
    Radii are stored exactly (the JSON of a float64 reads back as the same float64), an infinite one as the largest float64.
    Raises BadInput if the certificate is not of these rows.
    """
    position = {int(i): at for at, i in enumerate(data.index.tolist())}
    unknown = [int(i) for i in certificate.index if int(i) not in position]
    if unknown:
        raise BadInput(f"expected certified samples among the rows of {spec}, got index {unknown[0]}; certify the rows that load_data returns")
    at = [position[int(i)] for i in certificate.index]
    hashes = row_hashes(data.x[at], data.y[at])
    threat = certificate.threat
    clip = None if threat.box is None else list(threat.box)
    columns = zip(
        certificate.index, certificate.label, certificate.prediction, certificate.radius, certificate.status, certificate.reason,
        certificate.methods or [""] * len(certificate), hashes, strict=True,
    )  # fmt: skip
    document = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model": Path(model).name if model.endswith(".safetensors") else model,
        "weights_sha256": certificate.weights_sha256,
        "architecture_sha256": certificate.architecture_sha256,
        "threat": threat.name,
        "norm": threat.norm,
        "units": threat.units,
        "clip": None if clip is None else [float(c) for c in clip],
        "requested_radius": None if threat.radius is None else float(threat.radius),
        "method": certificate.method,
        "dtype": certificate.dtype,
        "device": device,
        "versions": {key: str(value) for key, value in certificate.versions.items()},
        "execution": certificate.execution or None,
        "bound": {key: _finite(value) for key, value in certificate.bound.items()},
        "batch_size": batch_size,
        "data": {
            "spec": _portable(spec, data.split),
            "note": data.note,
            "limit": limit,
            "seed": seed,
            "context": context,
            **data.options,
            "requested": len(data),
            "sha256": rows_sha256(hashes),
        },
        "partial": len(at) < len(data),
        "samples": [
            {
                "index": int(i), "label": int(y), "prediction": int(p), "radius": min(float(r), sys.float_info.max), "status": s,
                "reason": why[:300], "method": how, "row_sha256": sha,
            }
            for i, y, p, r, s, why, how, sha in columns
        ],
    }  # fmt: skip
    file = _validated(document, "the certificate")
    if file.ball() != threat:
        raise BadInput(f"expected a threat that is determined by its name, radius and clip, got {threat}; use one from parse_threat")
    return file


def write(path: Path, file: CertificateFile) -> None:
    """Write the file atomically. Raises BadInput if the path cannot be written."""
    write_text(path, json_text(file.document()))


def read(path: str | Path) -> CertificateFile:
    """The certificate in a file. Raises BadInput for anything else."""
    path = Path(path)
    text = read_limited(path, "a certificate file", SIZE_LIMIT, "certify fewer samples per file")
    return parse(text, path.name)


def parse(text: bytes, source: str = "the certificate") -> CertificateFile:
    """The certificate in a JSON text. source: its name for messages. Raises BadInput for anything else."""

    def constant(name: str) -> NoReturn:
        raise BadInput(f"{source}: expected numbers, got {name}; {REMEDY}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise BadInput(f"{source}: expected each key once, got {next(n for n in names if names.count(n) > 1)!r} twice; {REMEDY}")
        return found

    try:
        raw = json.loads(text.decode("utf-8-sig"), parse_constant=constant, object_pairs_hook=once)
    except BadInput:
        raise
    except RecursionError:
        raise BadInput(f"{source}: expected a certificate, got JSON that is nested too deeply; {REMEDY}") from None
    except ValueError as error:  # not JSON, not UTF-8, or an integer of thousands of digits
        raise BadInput(f"{source}: expected complete JSON in UTF-8, got others ({str(error)[:120]}); copy the file again, or {REMEDY}") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{source}: expected a JSON object, got {type(raw).__name__}; {REMEDY}")
    if raw.get("schema") != SCHEMA:
        raise BadInput(f"{source}: expected the schema {SCHEMA!r}, got {_shown(raw.get('schema'))}; {REMEDY} of this version")
    return _validated(raw, source)


def json_schema() -> dict[str, Any]:
    """The published schema of the file. Rules between fields (a misclassified sample has radius 0) are checked by `read` in addition."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **CertificateFile.model_json_schema(by_alias=True)}


def row_hashes(x: Tensor, y: Tensor) -> list[str]:
    """SHA-256 of each row (input and label): x (N, …) as loaded, before any cast; y (N,). Independent of the device and of the other rows."""
    groups = by_length(x)
    if len(groups) > 1:
        rows = torch.cat([rows for rows, _ in groups]).argsort().tolist()
        found = [sha for of, part in groups for sha in row_hashes(part, labels_of(y, of, part))]
        return [found[row] for row in rows]
    x, y = groups[0][1], labels_of(y, *groups[0])
    array = np.ascontiguousarray(x.detach().cpu().numpy())
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    head = f"{str(x.dtype).removeprefix('torch.')}\0{tuple(array.shape[1:])}\0"
    return [hashlib.sha256(f"{head}{label}\0".encode() + row.tobytes()).hexdigest() for row, label in zip(array, y.tolist(), strict=True)]


def rows_sha256(hashes: list[str]) -> str:
    """SHA-256 over row hashes, in order."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def explain(error: ValidationError, source: str, remedy: str) -> str:
    """The first error of pydantic as one message: the key, what was expected, what was received, the remedy."""
    first = error.errors()[0]
    where = shown(".".join(str(part) for part in first["loc"]), 100) or "top level"
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, Exception):  # raised by our own validators: already a complete message
        return f"{source}: {cause}"
    if first["type"] == "extra_forbidden":
        return f"{source}: expected only known keys, got {where!r}; remove or correct it"
    if first["type"] == "missing":
        return f"{source}: expected the key {where!r}, got none; {remedy}"
    expected = first["msg"].removeprefix("Input should be ")
    return f"{source}: expected at {where} {expected[:1].lower()}{expected[1:]}, got {_shown(first.get('input'))}; {remedy}"


def _validated(raw: dict[str, Any], source: str) -> CertificateFile:
    try:
        return CertificateFile.model_validate(raw)
    except ValidationError as error:
        raise BadInput(explain(error, source, REMEDY)) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _finite(value: float | str) -> float | str:
    return value if isinstance(value, str) or math.isfinite(value) else "infinite"


def _portable(spec: str, split: str) -> str:
    """The specification with its split and without folders of this machine."""
    name, _ = parse_spec(spec)
    if name.endswith(FILES):
        return Path(name).name
    return f"{Path(name).name if name.endswith('.txt') else name}:{split}"
