"""Compares character GPTs by quantities that scaling the logits does not change: accuracy, loss, and certified radii; and their bounds.

    ROBUSTLIP_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/frontier.py MODEL … [--windows 100] [--context 64] [--cache runs/frontier] [--json FILE]

MODEL: names of the zoo or files of `robustlip train`. Accuracy and loss are for the whole test split at context 256. Radii are for the same windows
for all models, for the prediction at the last token, the largest of the deterministic methods: for one token (the last) and for all tokens. Medians
are over windows that the model predicts correctly; `all` counts a wrong prediction as 0. `relative` divides by the embedding's largest norm, because
scaling the table scales radii. `first order` is the relative distance at which the linearised margin to the nearest of four classes
vanishes: not a bound, but approximately an optimal certificate. Results are cached in --cache by the hash of the weights, so a run can be resumed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from reporting import finish

from robustlip.attacks.formulas import newhouse2025
from robustlip.certifiers import RULES_VERSION, certify, lipschitz_bound
from robustlip.certifiers.samples import batches
from robustlip.data import load_data, load_tokens
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.files import write_text
from robustlip.hashing import weights_sha256
from robustlip.models import zoo
from robustlip.threats import EmbeddingBall

THREATS = {"one": EmbeddingBall(tokens=(-1,)), "all": EmbeddingBall()}
METHODS = ("global", "local", "dual")  # the deterministic methods that support attention


@torch.no_grad()
def predicted(model: Any, context: int) -> dict[str, float]:
    """Next-character accuracy and cross entropy of the test split, in consecutive windows."""
    tokens = load_tokens("tiny_shakespeare:test", vocabulary=model.vocabulary)[0]
    windows = tokens[: (len(tokens) - 1) // context * context + 1]
    x, y = windows[:-1].view(-1, context), windows[1:].view(-1, context)
    right = loss = 0.0
    for part in batches(len(x), 16):
        logits = model(x[part])
        right += float((logits.argmax(-1) == y[part]).sum())
        loss += float(F.cross_entropy(logits.flatten(0, 1), y[part].flatten(), reduction="sum"))
    return {"accuracy": right / y.numel(), "loss": loss / y.numel()}


def radii(model: Any, threat: EmbeddingBall, windows: int, context: int, kept: Path) -> tuple[np.ndarray, np.ndarray]:
    """(largest certified radius (N,), whether the prediction is right (N,)), a few windows at a time, kept in a file."""
    data = load_data("tiny_shakespeare:test", limit=windows, context=context, vocabulary=model.vocabulary)
    done: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {"radius": [], "right": []}
    for part in batches(windows, 10):
        if part.stop <= len(done["radius"]):
            continue
        found = [certify(model, data.x[part], data.y[part], threat, method) for method in METHODS]
        done["radius"] = done["radius"][: part.start] + np.max([f.radius for f in found], 0).tolist()
        done["right"] = done["right"][: part.start] + (np.asarray(found[0].prediction) == data.y[part].numpy()).tolist()
        write_text(kept, json.dumps(done))
        print(f"  {kept.name}: {len(done['radius'])} of {windows}", flush=True)
    return np.array(done["radius"][:windows]), np.array(done["right"][:windows], dtype=bool)


def first_order(model: Any, windows: int, context: int) -> dict[str, float]:
    """Medians over correct predictions of the smallest margin/‖gradient‖ of four classes: for the last token, and summed over all tokens."""
    data = load_data("tiny_shakespeare:test", limit=windows, context=context, vocabulary=model.vocabulary)
    embeddings = model.embed(data.x).detach().requires_grad_()
    logits = model.scores_from_embeddings(embeddings)
    own = logits.gather(1, data.y[:, None])
    margins = own - logits.scatter(1, data.y[:, None], -torch.inf).topk(4).values
    found: dict[str, list[torch.Tensor]] = {"one": [], "all": []}
    for margin in margins.unbind(1):
        (gradient,) = torch.autograd.grad(margin.sum(), embeddings, retain_graph=True)
        norms = gradient.norm(dim=-1)
        found["one"].append(margin.detach() / norms[:, -1])
        found["all"].append(margin.detach() / norms.sum(-1))
    right = (margins > 0).all(1)
    return {label: float(torch.stack(each).amin(0)[right].median()) for label, each in found.items()}


def measured(name: str, windows: int, context: int, cache: Path) -> dict[str, Any]:
    model = zoo.load(name)
    try:
        published: float | None = newhouse2025(model).value
    except (BadInput, UnsupportedLayer):
        published = None  # the formula applies to the paper's blocks only
    bound = lipschitz_bound(model)
    row: dict[str, Any] = {"model": Path(name).stem, **predicted(model, 256), "published": published}
    row |= {"bound_rms": bound["rms"], "bound_l2": bound["l2"]}
    steep = first_order(model, windows, context)
    largest = float(torch.linalg.vector_norm(model.embed_tokens.weight.detach().double(), dim=-1).amax())
    for label, threat in THREATS.items():
        kept = cache / f"{weights_sha256(model)[:16]}.{RULES_VERSION}.{threat.name}.{context}.json"
        radius, right = radii(model, threat, windows, context, kept)
        row |= {
            f"{label}_median": float(np.median(radius[right])), f"{label}_relative": float(np.median(radius[right])) / largest,
            f"{label}_all": float(np.median(np.where(right, radius, 0.0))), f"{label}_right": int(right.sum()),
            f"{label}_first_order": steep[label] / largest,
        }  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--cache", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--json")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    rows = [measured(name, arguments.windows, arguments.context, arguments.cache) for name in arguments.models]
    radius = "one token | relative | first order | all tokens | relative | first order"
    print(f"| model | accuracy | loss | sound bound, ∞-RMS | l2 | published formula | {radius} |")
    print("|---" + "|---:" * 11 + "|")
    for r in sorted(rows, key=lambda row: row["accuracy"]):
        published = "–" if r["published"] is None else f"{r['published']:.3g}"
        medians = " | ".join(f"{r[k + '_median']:.3g} | {r[k + '_relative']:.4f} | {r[k + '_first_order']:.3f}" for k in THREATS)
        print(f"| {r['model']} | {r['accuracy']:.3f} | {r['loss']:.3f} | {r['bound_rms']:.3g} | {r['bound_l2']:.3g} | {published} | {medians} |")
    finish(rows, arguments.json, windows=arguments.windows, context=arguments.context)


if __name__ == "__main__":
    main()
