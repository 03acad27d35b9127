"""Small folders of Hugging Face with random weights, as `save_pretrained` writes them."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40}
KINDS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 32}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 1}),
    "bert": ("BertForSequenceClassification", "BertConfig", {**SMALL, "num_labels": 3}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**SMALL, "num_labels": 3, "max_position_embeddings": 20}),
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig", {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "vocab_size": 40},
    ),
    "vit": (
        "ViTForImageClassification", "ViTConfig",
        {**{k: v for k, v in SMALL.items() if k != "vocab_size"}, "image_size": 8, "patch_size": 4, "num_labels": 3},
    ),
}  # fmt: skip
# Loaded by the same function; their labels are others than those of KINDS.
OTHERS = {
    "gpt2-classifier": ("GPT2ForSequenceClassification", "GPT2Config", {**KINDS["gpt2"][2], "num_labels": 3}),
    "llama-classifier": ("LlamaForSequenceClassification", "LlamaConfig", {**KINDS["llama"][2], "num_labels": 3, "pad_token_id": 1}),
    "bert-tokens": ("BertForTokenClassification", "BertConfig", {**SMALL, "num_labels": 3}),
}
TEXT = "the cat sat on the mat and the dog sat on the cat. " * 30


def saved(kind: str, folder: Path, marks: bool = False) -> Path:
    """A small model with random weights as `save_pretrained` writes it, and its tokenizer; marks: one that marks beginning and end, cuts and pads."""
    transformers = import_module("transformers")
    name, config, options = (KINDS | OTHERS)[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():  # random weights of 0.02 say nothing
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)
    model.save_pretrained(folder)
    if kind == "vit":
        said = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.5]}
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
    else:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<s>", "<pad>", "</s>"] if marks else []
        tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=40, show_progress=False, special_tokens=special))
        if marks:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
            tokenizer.enable_truncation(5)
            tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=9)
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder
