"""`robustlip attack`: for each sample, the smallest perturbation found that changes the prediction."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from robustlip.cli.batches import batches, end, gather, open_samples
from robustlip.cli.options import (
    BatchSize,
    Clip,
    Context,
    DataDir,
    DataSpec,
    Device,
    ImageColumn,
    Json,
    LabelColumn,
    Limit,
    Model,
    Seed,
    Subset,
    TextColumn,
    ThreatName,
)


def attack(
    model: Model, data: DataSpec, threat: ThreatName = "l2",
    name: Annotated[str, typer.Option("--attack", help="pgd, min, weights, torchattacks-pgd, torchattacks-pgdl2, autoattack")] = "min",
    radius: Annotated[Optional[float], typer.Option("--radius", help="attack at this radius; without it 'min' finds the smallest")] = None,
    json: Json = None, device: Device = None, batch_size: BatchSize = 256, limit: Limit = None, seed: Seed = 0, data_dir: DataDir = None,
    context: Context = None, subset: Subset = None, image_column: ImageColumn = None, label_column: LabelColumn = None,
    text_column: TextColumn = None, clip: Clip = None,
) -> None:  # fmt: skip
    """Search for a perturbation of each sample that changes the prediction."""
    import numpy as np
    import torch

    from robustlip.attacks import by_name
    from robustlip.cli.console import Out, Progress, choose_device, radius_summary
    from robustlip.hashing import weights_sha256
    from robustlip.threats import parse_clip, parse_threat, units_and_box

    out = Out(json, model, data)
    ball, method = parse_threat(threat, radius, parse_clip(clip, threat)), by_name(name)
    where = choose_device(device, out)
    chain, samples = open_samples(model, data, where, context, data_dir, limit, seed, (subset, image_column, label_column, text_column))
    generator, weights = torch.Generator().manual_seed(seed), weights_sha256(chain)
    with Progress() as progress:
        observations, stopped = gather(
            method(chain, x, y, ball, generator=generator, index=index, weights_sha256=weights)
            for x, y, index in batches(samples, batch_size, where, progress, f"{model} · {ball.name} · {name}")
        )
    described = observations[0].to_json_dict()
    described["samples"] = [row for o in observations for row in o.to_json_dict()["samples"]]
    about = {"model": model, "data": samples.name, "split": samples.split, "data_note": samples.note, "requested_radius": radius}
    out.json({**about, "partial": stopped is not None, **described})
    label, prediction, found = (np.concatenate([getattr(o, field) for o in observations]) for field in ("label", "prediction", "radius"))
    correct, failed = prediction == label, np.concatenate([o.failed for o in observations])
    why = [text for o in observations for text in o.failure if text]
    broken = correct & np.isfinite(found)
    rows = [("samples", str(len(label))), ("clean accuracy (%)", f"{100 * correct.mean():.1f}")]
    limit_text = f"within radius {radius:g}" if radius else "at any distance tried"
    rows += [("broken (%)", f"{100 * np.mean(broken):.1f} {limit_text}"), *radius_summary(found, correct & ~failed)]
    rows += [("not finite", f"{failed.sum()} samples, neither broken nor robust: {why[0]}")] if failed.any() else []
    rows += [("units", units_and_box(ball)), ("attack", method.described)] + ([("data", samples.note)] if samples.note else [])
    out.table(f"{model}: {name} against {ball.name}", ["", "radii: over correctly classified samples"], rows)
    end(stopped, len(label), len(samples.index))
