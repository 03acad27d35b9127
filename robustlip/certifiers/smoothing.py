"""Randomized smoothing: certified radii of the SMOOTHED classifier, each correct with a stated probability. Cohen, Rosenfeld & Kolter 2019.

For a base classifier F and σ > 0, the smoothed classifier g(x) is the class that F predicts most often at x + σε, ε standard normal. If F predicts
class A at x + σε with probability at least p > ½, then g predicts A everywhere within ℓ2 distance σ·Φ⁻¹(p) of x (Neyman-Pearson; theorem 1 of the
paper). n₀ draws choose A; n other draws give a lower bound of p (Clopper & Pearson 1934; CERTIFY in the paper). Each radius is wrong with probability
at most α.

The result holds for g and not for F, and it is probabilistic. It therefore has its own type, `SmoothedCertificate`, which no function for a
`Certificate` accepts. It names its radii differently and states its confidence, σ, the number of draws and the seed.

Arithmetic. F is the executed program: the noise and the sum x + σε are computed in float64, the sum is rounded to the dtype of the weights, and the
model is executed. Theorem 1 holds for any F, rounding included, if the draws are normal. This last condition is not proved: draws come from a
pseudo-random generator, they are float64 numbers (so they have finite support), and x + σε is rounded to float64. Jin et al. 2022 break certificates
whose noise is added in float32, with inputs x that the rounding of the sum reveals. Here the sum has 29 more bits than a float32 model reads. Such an
attack can only use draws whose float32 value depends on the last of these bits, about one in 10⁸ for each coordinate. A float64 model does not have
this protection. A model whose output depends on the batch size is not one function F; therefore all batches have the same size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from robustlip.certificates import ABSTAINED, MISCLASSIFIED
from robustlip.certifiers.samples import check_labels, train_mode_reason
from robustlip.checks import check_finite_weights, check_fit
from robustlip.errors import BadInput
from robustlip.execution import covered_kernels, lower_precision
from robustlip.hashing import architecture_sha256, weights_sha256
from robustlip.layers import chain_or_module
from robustlip.modes import in_eval_mode, random_state_kept
from robustlip.numerics.rounding import NAMES
from robustlip.samples import as_request, as_samples
from robustlip.target import Target
from robustlip.threats import InputBall

SMOOTHED = "certified-smoothed"

# The prediction where the smoothed classifier abstains.
NO_CLASS = -1

# Number of draws in one batch.
_BATCH = 1024


@dataclass(frozen=True)
class SmoothedCertificate:
    """For each sample, a radius within which the smoothed classifier keeps its prediction; each is wrong with probability at most 1 − confidence.

    smoothed_radius: float64 (N,), ℓ2 in raw input units, 0 where nothing is certified. prediction: int64 (N,), the smoothed classifier's class, −1
    where it abstains. probability: float64 (N,), the lower bound of the predicted class's probability. status: N strings among
    certified-smoothed, abstained, misclassified. confidence: for each sample by itself; `joint_confidence` is for all samples together.
    sigma: standard deviation of the noise, raw input units. selection, samples: number of draws per sample that choose the class and that bound its
    probability. seed: determines the draws, together with `index`.
    Source: Cohen, Rosenfeld & Kolter 2019. The module's docstring says what is not proved about the arithmetic.
    """

    threat: InputBall
    confidence: float
    sigma: float
    selection: int
    samples: int
    seed: int
    dtype: str
    weights_sha256: str
    architecture_sha256: str
    index: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    probability: np.ndarray
    smoothed_radius: np.ndarray
    status: tuple[str, ...]
    versions: dict[str, str] = field(default_factory=dict)
    guarantee: Literal["probabilistic"] = "probabilistic"
    method: Literal["smoothing"] = "smoothing"

    def __post_init__(self) -> None:
        if self.guarantee != "probabilistic" or self.method != "smoothing":
            raise BadInput(f"expected guarantee 'probabilistic' of method 'smoothing', got {self.guarantee!r} of {self.method!r}; leave both out")

    def __len__(self) -> int:
        return len(self.index)

    @property
    def joint_confidence(self) -> float:
        """A lower bound of the probability that all N statements hold: 1 − N(1 − confidence), at least 0 (Bonferroni)."""
        return max(0.0, 1 - len(self) * (1 - self.confidence))

    def smoothed_accuracy(self, radius: float) -> float:
        """The fraction of samples whose smoothed prediction is the label and is certified at `radius`, each with the stated confidence."""
        kept = np.array([s == SMOOTHED for s in self.status]) & (self.smoothed_radius >= radius)
        return float(np.mean(kept)) if len(self) else float("nan")

    def to_json_dict(self) -> dict[str, Any]:
        """The certificate in JSON types. The samples use other keys than those of a deterministic certificate: the radius is `smoothed_radius`."""
        columns = zip(self.index, self.label, self.prediction, self.probability, self.smoothed_radius, self.status, strict=True)
        rows = [
            {"index": int(i), "label": int(y), "prediction": int(p), "probability": float(q), "smoothed_radius": float(r), "status": s}
            for i, y, p, q, r, s in columns
        ]
        return {
            "guarantee": self.guarantee, "method": self.method, "threat": self.threat.name, "requested_radius": self.threat.radius,
            "confidence": self.confidence, "joint_confidence": self.joint_confidence, "sigma": self.sigma, "selection": self.selection,
            "draws": self.samples, "seed": self.seed, "dtype": self.dtype, "weights_sha256": self.weights_sha256,
            "architecture_sha256": self.architecture_sha256, "versions": self.versions, "smoothed_samples": rows,
        }  # fmt: skip


def clopper_pearson_lower(successes: int, draws: int, alpha: float) -> float:
    """A lower confidence bound p of a probability: P(Binomial(draws, p) ≥ successes) ≤ alpha, nearly the largest such p.

    scipy gives the beta quantile. It is lowered until the binomial tail at p, computed separately, is below alpha minus the error of that tail.
    Raises BadInput for counts that are impossible and for alpha outside (0, 1).
    """
    if not 0 <= successes <= draws or draws < 1 or not 0 < alpha < 1:
        raise BadInput(f"expected 0 ≤ successes ≤ draws and alpha in (0, 1), got {successes} of {draws} at {alpha}; check the counts")
    if successes == 0:
        return 0.0
    p = float(stats.beta.ppf(alpha, successes, draws - successes + 1))
    for lowered in (1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2):
        q = p * (1 - lowered)
        if float(stats.binom.sf(successes - 1, draws, q)) <= alpha * (1 - 1e-12):
            return q
    return 0.0


def _check(model: nn.Module, x: Tensor, sigma: float, alpha: float, seed: int, counts: dict[str, int]) -> tuple[Target, torch.dtype]:
    target = Target(model)
    check_finite_weights(model)
    dtype = target.dtype(x)
    if not x.is_floating_point() or target.next_token:
        raise BadInput("expected a classifier of images or vectors with floating-point inputs, got token ids; noise cannot be added to them")
    if dtype not in NAMES.values():
        raise BadInput(f"expected weights in {', '.join(NAMES)}, got {dtype}; cast the model with .to(dtype)")
    if not bool(torch.isfinite(x).all()):
        raise BadInput("expected finite inputs, got NaN or infinity; clean the data")
    if lower := lower_precision(target.device(x).type, dtype):
        raise BadInput(
            f"expected {str(dtype).removeprefix('torch.')} products in {str(dtype).removeprefix('torch.')}, got {lower}; turn it off, and cast the "
            f"model for a lower dtype"
        )
    training = train_mode_reason(model)
    if training:
        raise BadInput(f"expected a model in eval mode, got: {training}")
    if not (math.isfinite(sigma) and sigma > 0):
        raise BadInput(f"expected sigma above 0, got {sigma}; give the noise's standard deviation in raw input units, e.g. 0.25")
    if not 0 < alpha < 1:
        raise BadInput(f"expected alpha in (0, 1), got {alpha}; 0.001 is usual")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise BadInput(f"expected a seed of at least 0, got {seed!r}; give an integer, and another one for independent draws")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise BadInput(f"expected {name} of at least 1, got {count!r}; the paper uses n0 = 100 and n = 100000")
    with _executed(target, x):
        check_fit(model, x)
        target.compare_batches(x[:8].to(target.device(x), dtype))
    if target.sample_by_sample:
        raise BadInput(
            "expected a model whose output for a sample does not depend on the other samples of the batch, got one where it does; "
            "use running statistics in batch norm"
        )
    return target, dtype


@contextmanager
def _executed(target: Target, x: Tensor) -> Iterator[None]:
    """The program that is certified: eval mode and the kernels of `execution_of`; the state of the random generators is restored afterwards."""
    with random_state_kept(), covered_kernels(target.device(x).type), in_eval_mode(target.module):
        yield


def _votes(target: Target, x: Tensor, dtype: torch.dtype, sigma: float, draws: int, key: tuple[int, int, int]) -> Tensor:
    """How often F predicts each class at x + σε: int64 (C + 1,), last for logits that are not finite. x: one sample. key: seed of the draws.

    Every batch has _BATCH draws; surplus draws are not counted.
    """
    # Independent streams for every seed, sample and stage, independent of the order and of the batches of the samples.
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    device = target.device(x)
    centre = x.detach().double().cpu()
    total: Tensor | None = None
    left = draws
    while left > 0:
        noise = torch.from_numpy(generator.standard_normal((_BATCH, *centre.shape)))
        logits = target.scores((centre + sigma * noise).to(dtype).to(device))
        classes = logits.shape[-1]
        winner = torch.where(torch.isfinite(logits).all(-1), logits.argmax(-1), classes)[:left].cpu()
        votes = torch.bincount(winner, minlength=classes + 1)
        total = votes if total is None else total + votes
        left -= _BATCH
    assert total is not None
    return total


@torch.no_grad()
def predict_smoothed(
    model: nn.Module, x: Any, *, sigma: float, n: int = 1000, alpha: float = 0.001, seed: int = 0, index: np.ndarray | None = None
) -> np.ndarray:
    """The smoothed classifier's class (N,) int64, −1 where it abstains. Each class differs from that of g with probability at most alpha.

    x: inputs in any form that `robustlip.samples` accepts. sigma: standard deviation of the noise, raw input units. n: draws per sample.
    seed, index: determine the draws of each sample. Raises BadInput.
    Source: PREDICT of Cohen et al. 2019: an exact two-sided binomial test at ½ of the two most frequent classes.
    """
    x = as_samples(x)[0]
    target, dtype = _check(model, x, sigma, alpha, seed, {"n": n})
    numbers = _numbers(index, len(x))
    out = np.full(len(x), NO_CLASS, dtype=np.int64)
    with _executed(target, x):
        for i in range(len(x)):
            votes = _votes(target, x[i], dtype, sigma, n, (seed, int(numbers[i]), 0))
            counts, classes = votes.sort(descending=True)
            first, second = int(counts[0]), int(counts[1])
            sure = float(stats.binomtest(first, first + second, 0.5).pvalue) <= alpha
            if sure and int(classes[0]) < len(votes) - 1:
                out[i] = int(classes[0])
    return out


@torch.no_grad()
def certify_smoothed(
    model: nn.Module,
    x: Any,
    y: Any = None,
    *,
    sigma: float,
    threat: InputBall | str | None = None,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    seed: int = 0,
    index: np.ndarray | None = None,
) -> SmoothedCertificate:
    """Radii of the smoothed classifier (module's docstring), each with confidence 1 − alpha. For all N together choose alpha/N (Bonferroni).

    model: any nn.Module that classifies (see `robustlip.target`). x: raw inputs (N, …), floating point. y: labels (N,). `robustlip.samples` lists the
    accepted forms of both. sigma: standard deviation of the noise, raw input units.
    threat: InputBall('l2'); if it has a radius, samples with a smaller certified radius are abstained. n0, n: draws that choose the class and that
    bound its probability. seed, index: determine the draws of each sample.
    Raises BadInput. Source: Cohen, Rosenfeld & Kolter 2019.
    """
    x, y, ball = as_request(x, y, threat or InputBall("l2"))
    if not isinstance(ball, InputBall) or ball.norm != "l2":
        raise BadInput(f"expected the threat l2, which normal noise certifies, got {ball.name}; use InputBall('l2')")
    target, dtype = _check(model, x, sigma, alpha, seed, {"n0": n0, "n": n})
    numbers = _numbers(index, len(x))
    prediction = np.full(len(x), NO_CLASS, dtype=np.int64)
    probability, radius = np.zeros(len(x)), np.zeros(len(x))
    status = [ABSTAINED] * len(x)
    with _executed(target, x):
        for i in range(len(x)):
            seen = _votes(target, x[i], dtype, sigma, n0, (seed, int(numbers[i]), 1))
            check_labels(y[i : i + 1].cpu(), len(seen) - 1)
            chosen = int(seen[:-1].argmax())
            counted = _votes(target, x[i], dtype, sigma, n, (seed, int(numbers[i]), 2))
            probability[i] = clopper_pearson_lower(int(counted[chosen]), n, alpha)
            if probability[i] <= 0.5:
                continue
            prediction[i] = chosen
            if chosen != int(y[i]):
                status[i] = MISCLASSIFIED
                continue
            # The error of the quantile is a few units in the last place.
            proved = sigma * float(stats.norm.ppf(probability[i])) * (1 - 1e-12)
            radius[i] = proved
            if proved > 0 and proved >= (ball.radius or 0.0):
                status[i] = SMOOTHED
    from robustlip import __version__

    named = chain_or_module(model)
    return SmoothedCertificate(
        threat=ball,
        confidence=1 - alpha,
        sigma=float(sigma),
        selection=n0,
        samples=n,
        seed=seed,
        dtype=next(name for name, value in NAMES.items() if value == dtype),
        weights_sha256=weights_sha256(named),
        architecture_sha256=architecture_sha256(named),
        index=numbers,
        label=y.cpu().numpy().astype(np.int64),
        prediction=prediction,
        probability=probability,
        smoothed_radius=radius,
        status=tuple(status),
        versions={"robustlip": __version__, "torch": torch.__version__, "numpy": np.__version__},
    )


def _numbers(index: np.ndarray | None, count: int) -> np.ndarray:
    """The sample numbers (count,) int64: `index`, or 0, 1, …. Raises BadInput for a wrong shape and for negative numbers."""
    numbers = np.arange(count) if index is None else np.asarray(index, dtype=np.int64)
    if numbers.shape != (count,) or bool((numbers < 0).any()):
        raise BadInput(f"expected {count} sample numbers of at least 0, got shape {numbers.shape}; leave index out to count from 0")
    return numbers
