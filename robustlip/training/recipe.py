"""The recipe file. Unknown keys are errors; defaults never change the meaning of an older recipe."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from robustlip.constraints import make_method
from robustlip.data.tokenizers import TOKENIZERS
from robustlip.errors import BadInput
from robustlip.files import read_toml, strictly
from robustlip.limits import BATCH, CONTEXT, ROWS, STEPS

# Keys added after the first release: they are not part of a recipe's identity while they have their default, so old states stay valid.
_LATER: Any = {"later": True}


Steps = Annotated[int, Field(gt=0, le=STEPS)]
Some = Annotated[int, Field(ge=0, le=STEPS)]
# Numbers that torch accepts: larger ones overflow.
Beta = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1e30)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataPart(_Strict):
    """name: as in load_data, without a split. context: tokens of a training window (text only). subset: the hub's configuration, or
    a subfolder; text_column, image_column, label_column: as in load_data.

    streaming: text that is read while it is needed (robustlip.data.stream): a hub name, a folder or file of .parquet or .jsonl documents, or
    the name of a folder in --data-dir or ROBUSTLIP_DATA. Then also: split; held_out, the number of documents at its start that are kept for
    evaluation; tokenizer, 'bytes' or 'gpt2'; and
    tokenizer_file, its vocabulary if it should not be downloaded (see robustlip.data.tokenizers). The model needs a vocabulary_size.
    """

    name: str
    context: int = Field(256, gt=0, le=CONTEXT)
    streaming: bool = Field(default=False, json_schema_extra=_LATER)
    subset: str | None = Field(default=None, json_schema_extra=_LATER)
    split: str = Field(default="train", json_schema_extra=_LATER)
    text_column: str = Field(default="text", json_schema_extra=_LATER)
    image_column: str | None = Field(default=None, json_schema_extra=_LATER)
    label_column: str | None = Field(default=None, json_schema_extra=_LATER)
    held_out: int = Field(default=256, gt=0, le=ROWS, json_schema_extra=_LATER)
    tokenizer: Literal["bytes", "gpt2"] | None = Field(default=None, json_schema_extra=_LATER)
    tokenizer_file: str | None = Field(default=None, json_schema_extra=_LATER)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.streaming and self.tokenizer is None:
            raise ValueError("streaming needs a tokenizer, 'bytes' or 'gpt2'")
        if self.streaming and (self.image_column is not None or self.label_column is not None):
            raise ValueError("image_column and label_column are only for data that is not streamed")
        given = [key for key in ("split", "held_out", "tokenizer", "tokenizer_file") if key in self.model_fields_set]
        if not self.streaming and any(getattr(self, key) != type(self).model_fields[key].default for key in given):
            raise ValueError(f"{', '.join(given)} need streaming = true")
        if self.tokenizer_file is not None and self.tokenizer != "gpt2":
            raise ValueError("tokenizer_file needs tokenizer = 'gpt2'")
        return self


class OptimizerPart(_Strict):
    """muon: matrices by Muon, everything else by AdamW at adamw_lr; adamw: everything by AdamW at lr. All rates decay linearly to final·rate.

    lr of Muon is the RMS→RMS norm of an update (times the peak of its polynomial). warmup: steps of linear increase. clip_gradient:
    largest ℓ2 norm of the whole gradient. polynomial: for Muon, a key of robustlip.muon.POLYNOMIALS.
    momentum, adamw_lr: for muon only, ignored by adamw, so that a grid can use both with the same base recipe.
    earlier_layers: factor of the learning rate inside a residual layer per residual layer after it; the paper halves it (0.5).
    embedding_inflation: embeddings by robustlip.muon.RowMomentum at embedding_lr (default lr); the paper uses a factor of at most 16.
    unembedding_inflation, unembedding_lr: the same for the last Linear layer, as the paper does by default; constraint.rows caps its rows.
    """

    name: Literal["muon", "adamw"] = "adamw"
    lr: Rate
    adamw_lr: Rate = 1e-3
    momentum: float = Field(0.9, ge=0, lt=1)
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    warmup: Some = 0
    final: float = Field(0.0, ge=0, le=1)
    clip_gradient: PositiveFloat | None = None
    polynomial: Literal["six-step", "torch", "145m-script"] = Field(default="six-step", json_schema_extra=_LATER)
    earlier_layers: float = Field(default=1.0, gt=0, le=1, json_schema_extra=_LATER)
    embedding_inflation: PositiveFloat | None = Field(default=None, json_schema_extra=_LATER)
    embedding_lr: Rate | None = Field(default=None, json_schema_extra=_LATER)
    unembedding_inflation: PositiveFloat | None = Field(default=None, json_schema_extra=_LATER)
    unembedding_lr: Rate | None = Field(default=None, json_schema_extra=_LATER)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        tables = {"embedding": (self.embedding_inflation, self.embedding_lr), "unembedding": (self.unembedding_inflation, self.unembedding_lr)}
        if self.name == "adamw" and (self.polynomial != "six-step" or any(inflation is not None for inflation, _ in tables.values())):
            raise ValueError("polynomial, embedding_inflation and unembedding_inflation need muon")
        for name, (inflation, lr) in tables.items():
            if lr is not None and inflation is None:
                raise ValueError(f"{name}_lr needs {name}_inflation")
        return self


class ConstraintPart(_Strict):
    """See robustlip.constraints: method, cap in RMS units, per head or per matrix, caps of single weights by pattern.

    rows: patterns of matrices whose rows are capped instead (an unembedding). strength: λ of the two decays. polynomial: for stiefel.
    """

    method: Literal[
        "none", "weight-decay", "spectral-weight-decay", "spectral-normalize", "stiefel", "spectral-hammer", "soft-cap", "hard-cap", "hard-cap-msign"
    ] = "none"  # fmt: skip
    w_max: Rate = 1.0
    per_head: bool = True
    overrides: dict[str, Rate] = Field(default_factory=dict)
    rows: tuple[str, ...] = Field(default=(), json_schema_extra=_LATER)
    strength: PositiveFloat | None = Field(default=None, json_schema_extra=_LATER)
    polynomial: Literal["six-step", "torch", "145m-script"] | None = Field(default=None, json_schema_extra=_LATER)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        make_method(self.method, strength=self.strength, polynomial=self.polynomial)
        if self.model_fields_set and "method" not in self.model_fields_set:
            raise ValueError(f"{', '.join(sorted(self.model_fields_set))} without a constraint method, which would train without caps: name one")
        return self


class LossPart(_Strict):
    """Cross entropy of logit_scale·logits: a model with bounded weights cannot scale its logits, so the loss has to.

    kind 'ibp': cross entropy of the worst logits by interval bounds in the ball of radius epsilon (raw input units) of `norm`, for MLPs
    (Gowal et al. 2018), trained as in Shi et al. 2021: their initialisation, epsilon grown over `ramp` steps after `start` steps near 0,
    their two regularisers with weight `regularizer` until then. See robustlip.training.ibp.
    kind 'adversarial': cross entropy at embeddings after one gradient step, for gpts; epsilon is a fraction of the largest norm of the
    embedding table, norm = "l2", for every token. See robustlip.training.adversarial.
    kind 'margin': cross entropy of the worst margins by the layers' Lipschitz constants in the l2 ball of radius epsilon, for MLPs; norm
    = "l2", start and ramp as for 'ibp'. See robustlip.training.losses.
    """

    logit_scale: PositiveFloat = 1.0
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    input_noise: float = Field(default=0.0, ge=0)
    kind: Literal["cross-entropy", "ibp", "margin", "adversarial"] = Field(default="cross-entropy", json_schema_extra=_LATER)
    epsilon: PositiveFloat | None = Field(default=None, json_schema_extra=_LATER)
    norm: Literal["linf", "l2"] = Field(default="linf", json_schema_extra=_LATER)
    start: Some = Field(default=0, json_schema_extra=_LATER)
    ramp: Some = Field(default=0, json_schema_extra=_LATER)
    regularizer: float = Field(default=0.5, ge=0, json_schema_extra=_LATER)
    tolerance: float = Field(default=0.5, gt=0, le=1, json_schema_extra=_LATER)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.kind != "cross-entropy") != (self.epsilon is not None):
            raise ValueError("kinds 'ibp', 'margin' and 'adversarial' need an epsilon, and nothing else has one")
        if self.kind == "cross-entropy" and (self.start or self.ramp):
            raise ValueError("start and ramp need kind 'ibp', 'margin' or 'adversarial'")
        if self.kind != "ibp" and (self.regularizer, self.tolerance) != (0.5, 0.5):
            raise ValueError("regularizer and tolerance need kind 'ibp'")
        if self.kind in ("margin", "adversarial") and self.norm != "l2":
            raise ValueError(f"kind '{self.kind}' needs norm = 'l2'")
        return self


class RunPart(_Strict):
    """batch: of one step, over all machines. dtype: of the matrix products of the training forward pass; weights stay float32. compile: compile that
    pass with torch.compile. Neither changes evaluation and certificates. See robustlip.training.compute.

    start_from: the zoo model or .safetensors file whose weights the run starts from; momenta and learning rates start from the beginning.
    start_sha256: the required hash of these weights. The card records it in any case.
    """

    steps: Steps
    batch: int = Field(gt=0, le=BATCH)
    evaluate_every: Steps = 200
    checkpoint_every: Steps = 100
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", json_schema_extra=_LATER)
    compile: bool = Field(default=False, json_schema_extra=_LATER)
    start_from: str | None = Field(default=None, json_schema_extra=_LATER)
    start_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", json_schema_extra=_LATER)

    @model_validator(mode="after")
    def _starts(self) -> Self:
        if self.start_sha256 is not None and self.start_from is None:
            raise ValueError("start_sha256 needs start_from")
        return self


class Recipe(_Strict):
    """A recipe file. Unknown keys are errors.

    reparametrization: 'spectral-norm' (Miyato et al. 2018) or 'sigma-reparam' (Zhai et al. 2023) of every Linear layer, folded into plain
    weights at the end; not together with a constraint.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=100)
    description: str = ""
    paper: str = ""
    caveats: str = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    reparametrization: Literal["none", "spectral-norm", "sigma-reparam"] = Field(default="none", json_schema_extra=_LATER)
    model: dict[str, Any]
    data: DataPart
    optimizer: OptimizerPart
    constraint: ConstraintPart = ConstraintPart()
    loss: LossPart = LossPart()
    run: RunPart

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.reparametrization != "none" and self.constraint.method != "none":
            raise ValueError("a reparametrization and a constraint exclude each other")
        text = "gpt" in str(self.model.get("kind"))
        if self.loss.start >= self.run.steps:
            raise ValueError(f"loss.start is the step at which epsilon begins to grow, but there are only {self.run.steps} steps")
        if text and self.loss.input_noise:
            raise ValueError("input_noise is for models whose inputs are numbers, not token ids")
        if self.loss.kind in ("ibp", "margin") and self.model.get("kind") != "mlp":
            raise ValueError(f"loss kind '{self.loss.kind}' is for models of kind 'mlp'")
        if self.loss.kind == "adversarial" and not text:
            raise ValueError("loss kind 'adversarial' is for gpts, whose embeddings it perturbs")
        if self.loss.kind != "cross-entropy" and (self.run.compile or self.run.dtype != "float32"):
            raise ValueError(f"loss kind '{self.loss.kind}' trains in float32 and is not compiled")
        if self.run.start_from is not None and self.loss.kind == "ibp":
            raise ValueError("loss kind 'ibp' has its own initialisation and cannot be used with start_from")
        if self.reparametrization != "none" and self.run.compile:
            raise ValueError("a reparametrization has its own state and cannot be compiled")
        if self.data.tokenizer is not None:
            least, size = TOKENIZERS[self.data.tokenizer], self.model.get("vocabulary_size")
            if not text or type(size) is not int or size < least:
                raise ValueError(f"tokenizer {self.data.tokenizer!r} needs a gpt with vocabulary_size of at least {least}")
        return self


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe. Raises BadInput with the file, the key and the remedy."""
    path = Path(path)
    try:
        return strictly(Recipe, read_toml(path, "a recipe"))
    except ValidationError as error:
        # Unknown keys first: a missing key is often a misspelt one.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        where = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"expected a valid recipe in {path.name}, got '{where}': {first['msg']}; correct or remove that key") from None


def identity(recipe: Recipe) -> str:
    """SHA-256 of the contents of a recipe. Keys that older versions did not have count only if they differ from their default."""

    def plain(part: BaseModel, dumped: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, field in type(part).model_fields.items():
            value = getattr(part, name)
            if field.json_schema_extra == _LATER and value == field.get_default(call_default_factory=True):
                continue
            out[name] = plain(value, dumped[name]) if isinstance(value, BaseModel) else dumped[name]
        return out

    contents = plain(recipe, recipe.model_dump(mode="json"))
    overrides = list(recipe.constraint.overrides)
    if overrides != sorted(overrides):
        contents["order"] = overrides  # the last pattern that matches wins
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
