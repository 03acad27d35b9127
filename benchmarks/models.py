"""Unmodified models of many kinds: whether they can be captured, which methods certify them, and an attack. The table of docs/models.md.

    python benchmarks/models.py [--only PART] [--markdown docs/models.md]

Weights are random, after one forward pass in train mode where a parametrization needs one: what is asked here is what gets in, how long it takes, and
that no attack succeeds inside a radius. Samples: 4 random images a model. Libraries that are not installed are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reporting import finish, machine
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import robustlip
from robustlip.attacks import MinimumRadius
from robustlip.errors import BadInput
from robustlip.files import write_text

SAMPLES = 4


class MLP(nn.Module):
    """A forward of its own."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> None:
        super().__init__()
        self.a, self.b, self.c = wrap(nn.Linear(784, 64)), wrap(nn.Linear(64, 64)), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x.flatten(1))))))


class LeNet(nn.Module):
    """LeCun et al. 1998, with ReLU and max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.f1, self.f2, self.f3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.f3(F.relu(self.f2(F.relu(self.f1(x)))))


class Inception(nn.Module):
    """Parallel branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 5, padding=2)
        self.down, self.head = nn.Conv2d(24, 16, 4, 4), nn.Linear(1024, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.a(x)), F.relu(self.b(x)), F.relu(self.c(x))], dim=1)
        return self.head(F.relu(self.down(x)).reshape(len(x), -1))


class Block(nn.Module):
    """He et al. 2016: two convolutions, and a shortcut that is added in place."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.c2, self.n2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu, self.short = nn.ReLU(inplace=True), None
        if stride != 1 or channels != out:
            self.short = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.n2(self.c2(self.relu(self.n1(self.c1(x)))))
        out += x if self.short is None else self.short(x)
        return self.relu(out)


class ResNet(nn.Module):
    """Stages of two blocks."""

    def __init__(self, widths: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))
        layers, channels = [], widths[0]
        for i, width in enumerate(widths):
            for j in range(blocks):
                layers.append(Block(channels, width, 2 if i and not j else 1))
                channels = width
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.layers(self.stem(x)), 1)
        return self.head(torch.flatten(x, 1))


class Normalized(nn.Module):
    """A wrapper that normalises pixels first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x - self.mean) / self.std)


class Cayley(nn.Module):
    """Trockman & Kolter 2021, dense: W = (I + A)⁻¹(I − A) of a skew A."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size, size) / size**0.5), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        skew = self.weight - self.weight.T
        eye = torch.eye(len(skew), dtype=x.dtype, device=x.device)
        return F.linear(x, torch.linalg.solve(eye + skew, eye - skew), self.bias)


class AOL(nn.Module):
    """Prach & Lampert 2022: columns divided by the root of Σ|WᵀW|."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size, size) / size**0.5), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (self.weight.T @ self.weight).abs().sum(1).rsqrt(), self.bias)


class SLL(nn.Module):
    """Araujo et al. 2023: x − 2W T⁻¹ relu(Wᵀx + b)."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size, inner) / size**0.5), nn.Parameter(torch.zeros(inner))
        self.q = nn.Parameter(torch.zeros(inner))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q.exp()
        t = ((self.weight.T @ self.weight).abs() * q / q[:, None]).sum(1)
        return x - 2 * F.linear(F.relu(F.linear(x, self.weight.T, self.bias)) / t, self.weight)


class LiBlock(nn.Module):
    """Hu et al. 2023, LiResNet: a linear residual convolution, then MaxMin."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = (x + self.conv(x)).chunk(2, dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


class Flat(nn.Module):
    """Layers after a flatten."""

    def __init__(self, *layers: nn.Module, size: int = 784) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(size, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ViT(nn.Module):
    """Patches, a class token, an encoder of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 64, 8, 8), nn.Parameter(torch.zeros(1, 1, 64))
        self.positions = nn.Parameter(torch.randn(1, 17, 64) * 0.02)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True), 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.encoder(x)[:, 0])


def torchlip(vanilla: bool) -> nn.Module:
    library = importlib.import_module("deel.torchlip")
    model = library.Sequential(
        library.SpectralConv2d(1, 16, 3, padding=1), library.GroupSort2(), library.ScaledAvgPool2d((4, 4)), nn.Flatten(),
        library.SpectralLinear(784, 64), library.GroupSort2(), library.FrobeniusLinear(64, 10),
    )  # fmt: skip
    model.train()(torch.rand(2, 1, 28, 28))
    return model.eval().vanilla_export() if vanilla else model


def orthogonium(frozen: bool) -> nn.Module:
    layers = importlib.import_module("orthogonium.layers")
    model = nn.Sequential(
        layers.AdaptiveOrthoConv2d(1, 16, 4, stride=2, padding=1, padding_mode="circular"), layers.MaxMin(), nn.AvgPool2d(2), nn.Flatten(),
        layers.OrthoLinear(784, 10),
    )  # fmt: skip
    model.train()(torch.rand(2, 1, 28, 28))
    if frozen:
        for layer in (model[0], model[-1]):
            for name in list(layer.parametrizations):
                torch.nn.utils.parametrize.remove_parametrizations(layer, name)
    return model.eval()


class NanoGPT(nn.Module):
    """Attention in plain operations, as in nanoGPT; a model of the next token."""

    def __init__(self, width: int = 64, heads: int = 4, words: int = 65, context: int = 16) -> None:
        super().__init__()
        self.words, self.places, self.heads = nn.Embedding(words, width), nn.Embedding(context, width), heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(context, context)).view(1, 1, context, context))

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape
        h = self.words(x) + self.places(torch.arange(t, device=x.device))
        q, k, v = (part.view(n, t, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm(h)).split(h.shape[-1], dim=2))
        a = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        a = F.softmax(a.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf")), dim=-1)
        h = h + self.out((a @ v).transpose(1, 2).contiguous().view(n, t, -1))
        return self.head(self.last(h + self.down(F.gelu(self.up(self.norm2(h))))))


WORDS, TEXT = 65, 16
TOKENS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": WORDS}
PATCHES = {key: value for key, value in TOKENS.items() if key != "vocab_size"} | {"image_size": 32, "patch_size": 8, "num_labels": 10}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, "n_positions": 32}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**TOKENS, "num_key_value_heads": 2}),
    "BERT": ("BertForSequenceClassification", "BertConfig", {**TOKENS, "num_labels": 3}),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", {**TOKENS, "num_labels": 3, "max_position_embeddings": 40}),
    "DistilBERT": (
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "vocab_size": WORDS, "num_labels": 3},
    ),
    "ViT": ("ViTForImageClassification", "ViTConfig", PATCHES),
}  # fmt: skip


def hugging_face(name: str) -> nn.Module:
    library = importlib.import_module("transformers")
    made, config, options = FAMILIES[name]
    model: nn.Module = getattr(library, made)(getattr(library, config)(**options))
    model.config.use_cache = False
    return model


def of_timm() -> nn.Module:
    library = importlib.import_module("timm")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    model: nn.Module = library.create_model("vit_tiny_patch16_224", num_classes=10, **options)
    return model


GREY, COLOUR = (1, 28, 28), (3, 32, 32)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP, a class of its own": (MLP, GREY),
    "LeNet, max pooling": (LeNet, GREY),
    "convnet with branches concatenated": (Inception, COLOUR),
    "small ResNet": (lambda: ResNet((8, 16), 1), COLOUR),
    "Normalize wrapper around a ResNet": (lambda: Normalized(ResNet((8, 16), 1)), COLOUR),
    "spectral_norm": (lambda: MLP(parametrizations.spectral_norm), GREY),
    "spectral_norm, the old hook": (lambda: MLP(nn.utils.spectral_norm), GREY),
    "orthogonal": (lambda: MLP(parametrizations.orthogonal), GREY),
    "weight_norm": (lambda: MLP(parametrizations.weight_norm), GREY),
    "Cayley": (lambda: Flat(Cayley(784), nn.ReLU(), Cayley(784), nn.ReLU()), GREY),
    "AOL": (lambda: Flat(AOL(784), nn.ReLU(), AOL(784), nn.ReLU()), GREY),
    "SLL": (lambda: Flat(SLL(784, 256), SLL(784, 256)), GREY),
    "LiResNet": (lambda: nn.Sequential(nn.Conv2d(3, 16, 4, 4), LiBlock(16), LiBlock(16), nn.Flatten(), nn.Linear(1024, 10)), COLOUR),
    "deel-torchlip": (lambda: torchlip(False), GREY),
    "deel-torchlip, vanilla_export": (lambda: torchlip(True), GREY),
    "orthogonium": (lambda: orthogonium(False), GREY),
    "orthogonium, parametrizations removed": (lambda: orthogonium(True), GREY),
    "ViT of torch's TransformerEncoder": (ViT, COLOUR),
    "ViT of timm": (of_timm, COLOUR),
    "nanoGPT, attention written out": (NanoGPT, (TEXT,)),
    **{f"{name} of transformers": (lambda name=name: hugging_face(name), COLOUR if name == "ViT" else (TEXT,)) for name in FAMILIES},
    "ResNet-18": (lambda: ResNet((64, 128, 256, 512), 2), COLOUR),  # last: its attack takes minutes
}


def libraries() -> dict[str, str]:
    """{library: version} of those that are installed."""
    found = {}
    for name in ("deel-torchlip", "orthogonium", "transformers", "timm"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def row(name: str) -> dict[str, Any]:
    """The result for one model: time of its capture, number of layers, medians of certified and attacked radii, or why it cannot be captured."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    try:
        model = build().eval()
    except ImportError as error:
        return {"model": name, "result": f"not tried: {error.name} is not installed"}
    tokens = shape == (TEXT,)
    x = torch.randint(3, WORDS, (SAMPLES, TEXT)) if tokens else torch.rand(SAMPLES, *shape)
    with torch.no_grad():
        answer = model(x)
        logits = answer if isinstance(answer, Tensor) else answer.logits
        y = (logits[:, -1] if logits.dim() == 3 else logits).argmax(-1)
    threat = robustlip.parse_threat("embedding-l2@-1" if logits.dim() == 3 else "embedding-l2@0" if tokens else "l2")
    attacked = robustlip.capture(model, x) if tokens and not hasattr(model, "get_input_embeddings") else model
    broken = torch.as_tensor(MinimumRadius()(attacked, x, y, threat).radius)
    found: dict[str, Any] = {"model": name, "parameters": sum(p.numel() for p in model.parameters()), "attack": float(broken.median())}
    started = time.perf_counter()
    try:
        chain = robustlip.capture(model, x)
        found |= {"seconds": time.perf_counter() - started, "layers": sum(not list(part.children()) for part in chain.modules())}
        for method in ("global", "dual") if found["parameters"] <= 10**6 else ("global",):
            started = time.perf_counter()
            try:
                radius = torch.as_tensor(robustlip.certify(model, x, y, threat, method).radius)
            except BadInput:
                continue
            assert bool((radius <= broken).all()), f"{name}: {method} proves {radius.tolist()}, an attack found {broken.tolist()}"
            found |= {method: float(radius.median()), f"{method} seconds": time.perf_counter() - started}
        found["result"] = "certified" if found.get("global", 0.0) > 0 or found.get("dual", 0.0) > 0 else "captured, certified at 0"
    except BadInput as error:
        found["result"] = f"attacked only: {str(error).split(', got ', 1)[-1].split(';')[0]}"
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | parameters | capture (s) | layers | global | dual | attack | |", "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        numbers = [f"{r['parameters']:,}" if "parameters" in r else "", f"{r['seconds']:.1f}" if "seconds" in r else "", str(r.get("layers", ""))]
        radii = [f"{r[key]:.3g}" if key in r else "–" for key in ("global", "dual", "attack")]
        lines.append(f"| {r['model']} | " + " | ".join([*numbers, *radii]) + f" | {r['result']} |")
    return "\n".join(lines)


HEAD = """# Models of other kinds

What `robustlip.capture` ([theory, section 13](theory.md)) does with unmodified models of many kinds. This table was made by
`python benchmarks/models.py --markdown docs/models.md`. Weights are random; ordinary training makes norms of weights larger. Radii are
medians over four random images in ℓ2, or over four random texts of 16 tokens for the embedding of one token (the last token in models of the next
token, the first in classifiers). *attack* is the smallest perturbation that the attack `min` found; no certified radius exceeds the radius
that the attack found for the same sample. A model marked "attacked only" has no certificate; the last column names the operation that is
not supported. `dual` was run for models with at most a million parameters. torch's own encoder runs without its fast path.
ONNX files: [onnx.md](onnx.md).

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only models whose name contains this text")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.backends.mha.set_fastpath_enabled(False)
    rows = []
    for name in MODELS:
        if asked.only in name:
            rows.append(row(name))
            print(rows[-1], flush=True)
            if asked.markdown:  # after every row, so that a stopped run keeps its rows
                in_words = ", ".join(f"{key} {value}" for key, value in machine(**libraries()).items())
                missing = "" if len(rows) == len(MODELS) else f" {len(rows)} of {len(MODELS)} models."
                write_text(asked.markdown, f"{HEAD}{table(rows)}\n\nMachine: {in_words}.{missing}\n")
    finish(rows, asked.json)


if __name__ == "__main__":
    main()
