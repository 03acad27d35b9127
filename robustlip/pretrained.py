"""Models in folders of Hugging Face and timm: a config.json and weights as safetensors. Nothing is downloaded, and no code in a folder is run.

    load("hf:FOLDER")      GPT-2, Llama, BERT, RoBERTa, DistilBERT, ViT and other families with a class in the package transformers
    load("timm:FOLDER")    image classifiers as timm saves them for the hub

The inputs of an image model are images in [0, 1]: the mean and standard deviation in the folder become its first layer. A text model has its
tokenizer as `vocabulary`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.data.lengths import NO_TOKEN
from robustlip.data.subwords import Subwords
from robustlip.errors import BadInput, first_line
from robustlip.files import is_folder, read_json, read_limited
from robustlip.layers import Normalize

MAX_JSON = 2**22  # bytes of a config
MAX_TOKENIZER = 2**27
MAX_NUMBER = 2**26  # largest number in a config, e.g. a width, a vocabulary, a number of layers
MAX_LAYERS = 1_000
# A model may request at most this many times the size of its files in memory; other weights would be initialised, not loaded.
TIMES_FILES = 8
_HEADS = {
    "ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM", "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification", "ForImageClassification": "AutoModelForImageClassification",
}  # fmt: skip


class Pretrained(nn.Module):
    """A model after the normalisation of its images; returns only logits. task and vocabulary: as in a Chain."""

    def __init__(self, model: nn.Module, normalize: Normalize | None, task: str, vocabulary: Subwords | None) -> None:
        super().__init__()
        self.normalize = normalize
        self.model = model
        self.task, self.vocabulary = task, vocabulary
        self.input_range = (0.0, 1.0) if normalize is not None else None

    def get_input_embeddings(self) -> nn.Module | None:
        """The embedding table of a text model, which attacks on embeddings need; None for images."""
        get = getattr(self.model, "get_input_embeddings", None)
        return get() if callable(get) and self.normalize is None else None

    def forward(self, x: Tensor | None = None, *, inputs_embeds: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) or token ids (N, T), or embeddings (N, T, D) in their place → logits."""
        if inputs_embeds is not None:
            answer = self.model(inputs_embeds=inputs_embeds)
        elif x is not None and self.normalize is None:
            most = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
            if isinstance(most, int) and x.dim() == 2 and x.shape[1] > most:
                raise BadInput(f"expected texts of at most {most} tokens, the model's positions, got {x.shape[1]}; cut them with --context {most}")
            answer = self.model(x)
        else:
            answer = self.model(x if self.normalize is None else self.normalize(x))
        logits: Tensor = getattr(answer, "logits", answer)
        return logits


def read_hugging_face(folder: Path) -> Pretrained:
    """The model in a folder written by `save_pretrained`, in eval mode on the CPU, in the dtype of its files.

    Raises BadInput for a folder without config.json and safetensors; for a model with its own code, a quantised model, an unsupported head;
    for weights that do not fit, sizes above the limits of this file, and without the package transformers.
    """
    config = _config(folder)
    if any(key in config for key in ("auto_map", "quantization_config", "custom_pipelines")):
        raise BadInput(f"expected a model class of transformers without quantisation, got {str(folder)!r} with auto_map or quantization_config")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    head = next((made for end, made in _HEADS.items() if name.endswith(end)), None)
    if head is None:
        raise BadInput(f"expected a model with a head ({', '.join(_HEADS)}), got architectures = {names!r} in {str(folder)!r}; save that model")
    weights = _weights(folder)
    try:
        import transformers
    except ImportError as error:
        raise BadInput("expected the package transformers to read hf: folders, got none; pip install 'robustlip[hf]'") from error
    maker = getattr(transformers, head)
    try:
        with torch.device("meta"):
            shapes = maker.from_config(transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
        _check_size(shapes, weights, folder)
        model, report = maker.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, attn_implementation="sdpa", output_loading_info=True
        )
    except (BadInput, KeyboardInterrupt):
        raise
    except Exception as error:  # the library may raise anything for a user's files
        raise BadInput(f"expected a folder that transformers can load, got {type(error).__name__}: {first_line(error)[:300]}") from error
    wrong = [*report["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"])]
    if wrong:
        raise BadInput(f"expected weights for all of {name}, got none that fit {sorted(map(str, wrong))[0]} in {str(folder)!r}; save the whole model")
    model.config.use_cache = False
    normalize = _normalize(folder) if head.endswith("ImageClassification") else None
    task = {"AutoModelForCausalLM": "next-token", "AutoModelForTokenClassification": "token-classification"}.get(head, "classification")
    classes = _classes(model.config) if task != "next-token" else None
    if head.endswith("SequenceClassification") and model.config.pad_token_id is None:
        model.config.pad_token_id = NO_TOKEN  # no text contains it, so the last token is the last one of the text
    return Pretrained(model, normalize, task, None if head.endswith("ImageClassification") else _tokenizer(folder, classes)).eval()


def read_timm(folder: Path) -> Pretrained:
    """The classifier in a folder written by `timm.models.save_for_hf` (config.json, model.safetensors). Errors as in `read_hugging_face`."""
    config = _config(folder)
    name, cfg = config.get("architecture"), config.get("pretrained_cfg", {})
    if not isinstance(name, str) or not isinstance(cfg, dict) or "/" in name or ":" in name:
        raise BadInput(f"expected the name of a timm architecture in {str(folder)!r}, got {name!r}; save the model with timm.models.save_for_hf")
    weights = _weights(folder)
    try:
        import timm
    except ImportError as error:
        raise BadInput("expected the package timm to read timm: folders, got none; pip install 'robustlip[timm]'") from error
    from safetensors.torch import load_file

    options = config.get("model_args", {})
    if not isinstance(options, dict) or "num_classes" in options:
        raise BadInput(f"expected model_args as a table without num_classes in {str(folder)!r}, got {options!r}; correct config.json")
    options |= {"num_classes": config.get("num_classes", cfg.get("num_classes"))}
    try:
        with torch.device("meta"):
            shapes = timm.create_model(name, pretrained=False, **options)
        _check_size(shapes, weights, folder)
        model = timm.create_model(name, pretrained=False, **options)
        model.load_state_dict({key: value for path in weights for key, value in load_file(path).items()})
    except (BadInput, KeyboardInterrupt):
        raise
    except Exception as error:
        raise BadInput(f"expected a folder that timm can load, got {type(error).__name__}: {first_line(error)[:300]}") from error
    mean, std = cfg.get("mean", (0.0,) * 3), cfg.get("std", (1.0,) * 3)
    return Pretrained(model, _normalized(mean, std, folder), "classification", None).eval()


def _config(folder: Path) -> dict[str, Any]:
    if not is_folder(folder) or not (folder / "config.json").is_file():
        raise BadInput(f"expected a folder with config.json, got {str(folder)!r}; give the folder that the model was saved in")
    return _table(folder / "config.json")


def _table(path: Path) -> dict[str, Any]:
    found = read_json(path, "JSON", MAX_JSON, "it is not a model description")
    if not isinstance(found, dict):
        raise BadInput(f"expected a table in {str(path)!r}, got {type(found).__name__}; save the model again")
    for key, value in _numbers(found):
        most = MAX_LAYERS if ("layer" in key and "norm" not in key) or key == "depth" else MAX_NUMBER
        if abs(value) > most:
            raise BadInput(f"expected {key} of at most {most} in {str(path)!r}, got {value}; this model cannot be loaded")
    return found


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _numbers(part, str(name))
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


def _weights(folder: Path) -> list[Path]:
    """The safetensors files: regular files in the folder itself."""
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not found:
        others = ", ".join(sorted(p.name for p in folder.glob("*.bin"))[:2])
        raise BadInput(f"expected weights as .safetensors in {str(folder)!r}, got {others or 'none'}; save with safe_serialization=True")
    return found


def _check_size(model: nn.Module, weights: list[Path], folder: Path) -> None:
    """Raises BadInput for a model with more weights than its files can hold; the other weights would be initialised, not loaded."""
    numbers = sum(p.numel() for p in model.parameters())
    held = sum(path.stat().st_size for path in weights)
    if numbers > TIMES_FILES * held:
        raise BadInput(f"expected weights for {numbers} numbers, got files of {held} bytes in {str(folder)!r}; config.json is of another model")


def _normalize(folder: Path) -> Normalize:
    """The normalisation of the folder's image processor, for images in [0, 1] of the right size."""
    path = folder / "preprocessor_config.json"
    config = _table(path) if path.is_file() else {}
    if not config.get("do_normalize", bool(config)):
        return Normalize()
    return _normalized(config.get("image_mean", (0.0,) * 3), config.get("image_std", (1.0,) * 3), folder)


def _normalized(mean: Any, std: Any, folder: Path) -> Normalize:
    try:
        return Normalize([float(v) for v in mean], [float(v) for v in std])
    except (TypeError, ValueError) as error:
        raise BadInput(f"expected a mean and a deviation per channel in {str(folder)!r}, got {mean!r} and {std!r}; correct them") from error


def _classes(config: Any) -> tuple[str, ...] | None:
    """The names of classes 0, 1, … in a config, if every class has one."""
    names = getattr(config, "id2label", None) or {}
    found = tuple(str(names[i]) for i in range(len(names)) if i in names)
    return found if found and len(found) == len(set(found)) == config.num_labels else None


def _tokenizer(folder: Path, classes: tuple[str, ...] | None) -> Subwords | None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    return Subwords(read_limited(path, "a tokenizer", MAX_TOKENIZER, "use a smaller one"), classes)
