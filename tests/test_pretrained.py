"""Folders of Hugging Face and timm: loaded as data, certified, attacked; hostile ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import run
from hugging_face import KINDS, TEXT, saved
from safetensors.torch import load_file, save_file
from torch import nn

from robustlip.attacks import MinimumRadius
from robustlip.certifiers import certify
from robustlip.data import load_data
from robustlip.errors import BadInput
from robustlip.models.zoo import load
from robustlip.pretrained import Pretrained
from robustlip.threats import parse_threat

pytest.importorskip("transformers", reason="needs transformers: pip install 'robustlip[hf]'")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: saved(kind, root / kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_is_loaded_certified_and_attacked(kind, folders) -> None:
    model = load(f"hf:{folders[kind]}")
    assert type(model) is Pretrained and not model.training
    g = torch.Generator().manual_seed(1)
    images = kind == "vit"
    x = torch.rand(2, 3, 8, 8, generator=g) if images else torch.randint(3, 40, (2, 6), generator=g)
    with torch.no_grad():
        logits = model(x)
        y = (logits[:, -1] if logits.dim() == 3 else logits).argmax(-1)
    threat = parse_threat("l2" if images else "embedding-l2@-1" if logits.dim() == 3 else "embedding-l2@0")
    certificate = certify(model, x, y, threat, "dual")
    assert (certificate.radius > 0).all(), certificate.reason
    # The module itself is attacked, by its own embeddings.
    assert (certificate.radius <= MinimumRadius(steps=2, descent=10)(model, x, y, threat).radius).all()
    if images:
        assert torch.equal(model.normalize.mean, torch.tensor([0.5, 0.4, 0.3]))


def test_text_goes_through_the_folders_tokenizer_and_the_command_line(folders, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    model = load(f"hf:{folders['gpt2']}")
    data = load_data(str(text), context=8, vocabulary=model.vocabulary, limit=3)
    assert model.vocabulary.decode(model.vocabulary.encode("the cat")).strip() == "the cat"
    assert data.x.shape == (3, 8) and data.classes == len(model.vocabulary)
    asked = (f"hf:{folders['gpt2']}", "--data", text, "--context", "8", "--limit", "3", "--threat", "embedding-l2@-1", "--device", "cpu")
    assert run("certify", *asked, "--method", "dual") == 0
    assert run("attack", *asked, "--radius", "0.1") == 0


def change(folder: Path, **options) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **options}))


def without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.0.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def of_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


HOSTILE = {
    "no folder": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "expected JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "a table"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "expected JSON"),
    "code": (lambda f: change(f, auto_map={"AutoModelForCausalLM": "evil.Model"}), "auto_map"),
    "quantised": (lambda f: change(f, quantization_config={"quant_method": "bitsandbytes"}), "quantization_config"),
    "no head": (lambda f: change(f, architectures=["GPT2Model"]), "a model with a head"),
    "unknown": (lambda f: change(f, model_type="nothing"), "transformers can load"),
    "layers": (lambda f: change(f, n_layer=10**7), "n_layer"),
    "vocabulary": (lambda f: change(f, vocab_size=2**40), "vocab_size"),
    "larger than its files": (lambda f: change(f, vocab_size=2**25), "config.json is of another model"),
    "pickles": (of_pickles, "pytorch_model.bin"),
    "cut": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "transformers can load"),
    "a missing weight": (without_a_weight, "c_fc"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "a tokenizer of bytes": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe"), "tokenizer.json"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_ends_in_one_sentence(case, tmp_path) -> None:
    folder = saved("gpt2", tmp_path / "model")
    spoil, message = HOSTILE[case]
    spoil(folder)
    with pytest.raises(BadInput, match=message):
        load(f"hf:{folder}")


def test_a_timm_folder(tmp_path) -> None:
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'robustlip[timm]'")
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=3, **options).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": options, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(f"timm:{tmp_path}")
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(x), model((x - 0.5) / 0.5))
        y = loaded(x).argmax(-1)
    assert (certify(loaded, x, y, "l2", "dual").radius > 0).all()
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "hf_hub:evil/model"}))
    with pytest.raises(BadInput, match="the name of a timm architecture"):
        load(f"timm:{tmp_path}")
