"""`robustlip smooth`: randomized smoothing, kept separate from certificates of the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from robustlip.cli.batches import batches, end, gather, open_samples
from robustlip.cli.options import DataDir, DataSpec, Device, ImageColumn, Json, LabelColumn, Limit, Model, Seed, Subset
from robustlip.errors import BadInput

if TYPE_CHECKING:
    from robustlip.certifiers.smoothing import SmoothedCertificate

# Samples per update of the progress bar; the noisy copies of one sample fill batches of their own.
_CHUNK = 4
STATEMENT = (
    "Probabilistic, and for the smoothed classifier, whose prediction is the model's most frequent prediction under noise. "
    "These radii do not hold for the model itself and are not comparable with deterministic ones."
)


def smooth(
    model: Model, data: DataSpec,
    sigma: Annotated[float, typer.Option("--sigma", help="standard deviation of the noise, in raw input units")],
    samples: Annotated[int, typer.Option("--samples", min=1, help="noisy copies of each sample to bound the probability of its class")] = 10_000,
    selection: Annotated[int, typer.Option("--selection", min=1, help="noisy copies of each sample to choose its class")] = 100,
    confidence: Annotated[float, typer.Option("--confidence", help="confidence of each single radius")] = 0.999,
    radius: Annotated[Optional[float], typer.Option("--radius", help="report the certified accuracy at this l2 radius")] = None,
    json: Json = None, device: Device = None, limit: Limit = None, seed: Seed = 0, data_dir: DataDir = None,
    subset: Subset = None, image_column: ImageColumn = None, label_column: LabelColumn = None,
) -> None:  # fmt: skip
    """Radii (l2) of the smoothed classifier that hold with a stated probability (Cohen et al. 2019). They do not hold for the model itself."""
    import numpy as np
    import torch

    from robustlip.certificates import ABSTAINED, MISCLASSIFIED
    from robustlip.certifiers.smoothing import NO_CLASS, SMOOTHED, certify_smoothed
    from robustlip.cli.console import Out, Progress, choose_device, radius_summary
    from robustlip.threats import InputBall

    if not 0 < confidence < 1:
        raise BadInput(f"expected a confidence between 0 and 1, got {confidence}; 0.999 is usual")
    out = Out(json, model, data)
    where = choose_device(device, out)
    chain, rows = open_samples(model, data, where, None, data_dir, limit, seed, (subset, image_column, label_column, None))
    if not torch.as_tensor(rows.x).is_floating_point():
        raise BadInput(f"expected images or vectors, got token ids from {data}; noise cannot be added to them")
    ball = InputBall("l2", radius)
    with Progress() as progress:
        parts, stopped = gather(
            certify_smoothed(chain, x, y, sigma=sigma, threat=ball, n0=selection, n=samples, alpha=1 - confidence, seed=seed, index=np.asarray(index))
            for x, y, index in batches(rows, _CHUNK, where, progress, f"{model} · smoothing")
        )
    done = _joined(parts)
    about = {"model": model, "data": rows.name, "split": rows.split, "data_note": rows.note, "certificate": False, "statement": STATEMENT}
    about["partial"] = stopped is not None
    out.json({**about, **done.to_json_dict()})
    count = len(done)
    right = done.prediction == done.label

    def share(wanted: np.ndarray) -> str:
        return f"{100 * np.mean(wanted):.1f}"

    status = np.array(done.status)
    rows_shown = [("samples", str(count)), ("smoothed accuracy (%)", share(right)), ("no class found (%)", share(done.prediction == NO_CLASS))]
    rows_shown += [(f"{SMOOTHED} (%)", f"{share(status == SMOOTHED)} at radius {radius:g}")] if radius else []
    rows_shown += [(name.replace(" ", " smoothed "), value) for name, value in radius_summary(done.smoothed_radius, np.asarray(right))]
    rows_shown += [
        ("units", ball.units),
        ("largest possible", f"{sigma * _largest(samples, confidence):.4g} with {samples} draws"),
        ("sigma, draws", f"{sigma:g}, {selection} draws to choose the class, {samples} to bound its probability, seed {seed}"),
        ("confidence", f"{done.confidence:g} for each single radius; {done.joint_confidence:.4g} for all {count} together (Bonferroni)"),
        ("statuses", ", ".join(f"{np.sum(status == s)} {s}" for s in (SMOOTHED, ABSTAINED, MISCLASSIFIED))),
        ("weights", done.weights_sha256),
    ]
    rows_shown += [("data", rows.note)] if rows.note else []
    out.table(f"{model}: SMOOTHED classifier, probabilistic radii", ["", "radii: over samples whose smoothed class is the label"], rows_shown)
    out.console().print(STATEMENT, markup=False)
    end(stopped, count, len(rows.index))


def _largest(draws: int, confidence: float) -> float:
    """The radius in units of σ if all draws give the same class."""
    from scipy.stats import norm

    from robustlip.certifiers.smoothing import clopper_pearson_lower

    return max(0.0, float(norm.ppf(clopper_pearson_lower(draws, draws, 1 - confidence))))


def _joined(parts: Sequence[SmoothedCertificate]) -> SmoothedCertificate:
    """Concatenate results of consecutive samples. The draws of a sample depend only on the seed and the sample number."""
    from dataclasses import replace

    import numpy as np

    names = ("index", "label", "prediction", "probability", "smoothed_radius")
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], **columns, status=tuple(s for part in parts for s in part.status))
