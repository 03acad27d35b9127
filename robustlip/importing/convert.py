"""Converts options and weights of the published code to a model of ours; the conventions that were checked, and those that are assumed.

Checked in the code of arXiv 2507.13338 (modula/*.py, data/*.py, run_checkpoint.py), and by running it:
- Composition lists weights in the order of application. Each new block is composed before the others, so the block named last is applied first.
  Transformer: embedding (width, vocabulary); then for each block, the last named first: value, key and query as V, Q, K, output W, MLP in, MLP
  out; then the unembedding (vocabulary, width). All matrices (fan_out, fan_in), applied as x Wᵀ, no bias; heads are consecutive rows.
- Rotary positions: half-split, angles t·10000^(−2i/d). The code exchanges sines and cosines: halves (a, b) become
  (a cos + b sin, a sin − b cos), where ours become (a cos − b sin, a sin + b cos). For (b, a) ours gives (b cos − a sin, b sin + a cos), which are
  the same two up to order and one sign, for queries and keys alike. So with the halves of each head's rows of Q and K swapped, every q·k is the same.
- Attention: logits softmax_scale·q·k/d, d the head width, causal, the attention output divided by 3. GELU in its tanh form, divided by 1.1289.
- Residuals: (1 − α)x + α·branch(x), α = residual_scale/(2·num_blocks). A substitute for LayerNorm precedes each branch.
- Logits are final_scale times the unembedding's output; the unembedding is not tied. use_unembed and max_embed_inflation_factor
  (of the embedding's gradient) change training, not the model.
- MLP: flatten (height, width, channel), then matrices with ReLU between, no bias, times final_scale; inputs are pixels/255. Its columns are
  permuted to our order (channel, height, width).
Assumed, and stated in the card: the 65 characters of tiny_shakespeare, sorted (the file does not contain them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from robustlip.data.text import CHARACTERS
from robustlip.errors import BadInput
from robustlip.importing.checkpoint import Checkpoint
from robustlip.importing.logs import Log, count, real
from robustlip.layers import Chain

CIFAR = (3, 32, 32)  # the only images for which the code trains MLPs
NORMS = ("none", "tanh", "rmsnorm", "layernorm")
AGREEMENT = 1e-3  # relative difference between a logged norm (float32) and the norm of the weight
MAX_WIDTH = 2**20

# Options of the code that do not affect its model.
_TRAINING = {
    "optimizer", "lr", "beta1", "beta2", "wd", "wd_lr_power", "spectral_wd", "w_max", "steps", "batch_size", "accum_steps", "epochs", "schedule",
    "seed", "seq_len", "val_iters", "val_interval", "log_interval", "num_checkpoints", "save_weights", "output_dir", "job_idx", "timestamp",
    "randomize_labels", "pre_dualize", "post_dualize", "project", "model_dtype", "project_dtype", "zero_init", "sensitive_to_wmax", "blocks_mass",
    "max_embed_inflation_factor", "use_unembed", "model", "data", "input_dim", "output_dim", "code",
}  # fmt: skip
_MODEL = {"vocab_size", "num_heads", "d_embed", "num_blocks", "softmax_scale", "final_scale", "residual_scale", "scales_learnable"}
_MODEL |= {"layernorm_substitute"}


@dataclass(frozen=True)
class Converted:
    """A model of ours, in eval mode, with notes for its card. confirmed: the result of comparing the file's log with the weights."""

    model: Chain
    notes: tuple[str, ...]
    confirmed: str


def convert(checkpoint: Checkpoint, vocabulary: str | None = None) -> Converted:
    """The model of a checkpoint. vocabulary: the characters of token ids 0, 1, …, for text other than tiny_shakespeare.

    Raises BadInput if shapes do not match the options, for options with an unknown effect on the model, and if the norms that the
    run logged for these weights differ from their norms.
    """
    options = checkpoint.log.parameters
    notes = []
    strange = sorted(key for key in options if key not in _TRAINING | _MODEL)
    if strange:
        notes.append(f"unknown options, assumed to concern training only: {', '.join(map(repr, strange[:10]))}")
    if options.get("scales_learnable"):
        raise BadInput("expected fixed scales, got scales_learnable, which the published code does not implement; the file comes from other code")
    if options.get("data") == "cifar":
        names = mlp_names(count(options, "num_blocks"))
        model, more = _mlp(options, checkpoint.weights)
    elif "vocab_size" in options:
        names = gpt_names(count(options, "num_blocks"))
        model, more = _gpt(options, checkpoint.weights, vocabulary)
    else:
        raise BadInput("expected a transformer (vocab_size) or a CIFAR-10 MLP, got options of neither; the published code makes no other model")
    return Converted(model.eval(), (*notes, *more), _confirm(checkpoint, names))


# ------------------------------------------------------------------------------------------------ order and shapes


def gpt_names(blocks: int) -> list[str]:
    """The code's names of a transformer's weights, in its order: the last block first."""
    body = [f"{name}{i}" for i in reversed(range(blocks)) for name in ("v", "q", "k", "w", "mlp_in", "mlp_out")]
    return ["embed", *body, "out"]


def mlp_names(blocks: int) -> list[str]:
    """The code's names of an MLP's weights, in order; num_blocks counts matrices, and there are at least two."""
    return ["mlp_in", *(f"mlp_{i}" for i in reversed(range(max(0, blocks - 2)))), "mlp_out"]


def _check(weights: Sequence[np.ndarray], names: list[str], shapes: Sequence[tuple[int, int]]) -> None:
    if len(weights) != len(names):
        raise BadInput(f"expected {len(names)} weights for these options, got {len(weights)}; the file's options do not belong to its weights")
    for matrix, name, shape in zip(weights, names, shapes, strict=True):
        if matrix.shape != shape:
            raise BadInput(f"expected {name} of shape {shape}, got {matrix.shape}; the file's options do not belong to its weights")


def _tensors(weights: Sequence[np.ndarray]) -> tuple[list[torch.Tensor], list[str]]:
    """As float32, in which the code runs its checkpoints, if all numbers are exact in it, else as float64."""
    with np.errstate(over="ignore"):
        exact = all(np.array_equal(w.astype(np.float32).astype(np.float64), w) for w in weights)
    notes = [] if exact else ["some weights are not exact in float32: the model is in float64"]
    return [torch.from_numpy(w.astype(np.float32 if exact else np.float64)) for w in weights], notes


def _fill(model: Chain, tensors: Mapping[str, torch.Tensor]) -> Chain:
    model.to(next(iter(tensors.values())).dtype)
    model.load_state_dict(dict(tensors), strict=True)
    return model


# ------------------------------------------------------------------------------------------------ the two models


def _gpt(options: Mapping[str, object], weights: Sequence[np.ndarray], vocabulary: str | None) -> tuple[Chain, list[str]]:
    from robustlip.models.gpt import LipschitzGPT

    blocks, width, heads = count(options, "num_blocks"), count(options, "d_embed", MAX_WIDTH), count(options, "num_heads")
    size = count(options, "vocab_size", MAX_WIDTH)
    scale, final, residual = (real(options, key) for key in ("softmax_scale", "final_scale", "residual_scale"))
    norm = options.get("layernorm_substitute", "none")
    if norm not in NORMS:
        raise BadInput(f"expected layernorm_substitute among {', '.join(NORMS)}, got {str(norm)[:40]!r}; the published code has no other")
    one = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    names = gpt_names(blocks)
    _check(weights, names, [(width, size), *one * blocks, (size, width)])

    notes = []
    if vocabulary is None:
        if options.get("data") != "shakespeare" or size != len(CHARACTERS):
            raise BadInput(f"expected the characters of {size} token ids for {str(options.get('data'))[:40]!r}, got none; give --vocabulary FILE")
        vocabulary = CHARACTERS
        notes.append("the characters are those of tiny_shakespeare, sorted: the file does not contain them")
    if len(vocabulary) != size or len(set(vocabulary)) != size:
        raise BadInput(
            f"expected {size} distinct characters, got {len(vocabulary)} with {len(set(vocabulary))} different; list one for each token id"
        )
    if str(options.get("model_dtype", "float32")) != "float32":
        notes.append(f"trained in {str(options['model_dtype'])[:20]}; the published code runs its checkpoints in float32, and so does this model")

    # α only if it differs from our default, so that the configuration is that of a model trained here.
    alpha = None if residual == 1 else residual / (2 * blocks)
    model = LipschitzGPT(
        vocabulary, width, heads, blocks, attention_scale=scale, alpha=alpha, gelu="tanh", norm=str(norm), final_scale=final
    )  # fmt: skip
    tensors, more = _tensors(weights)
    named = dict(zip(names, tensors, strict=True))
    attention, inside = ("branch", "branch") if norm == "none" else ("branch.attention", "branch")
    state = {"embed_tokens.weight": named["embed"].T.contiguous(), "head.weight": named["out"]}
    for place, i in enumerate(reversed(range(blocks))):
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "w")):
            matrix = named[f"{theirs}{i}"]
            state[f"attn{place}.{attention}.{ours}.weight"] = _halves_swapped(matrix, heads) if theirs in ("q", "k") else matrix
        state[f"mlp{place}.{inside}.up.weight"] = named[f"mlp_in{i}"]
        state[f"mlp{place}.{inside}.down.weight"] = named[f"mlp_out{i}"]
    return _fill(model, state), notes + more


def _halves_swapped(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of each head with its second half first, for rotary positions as above. Norms do not change."""
    return matrix.unflatten(0, (heads, 2, -1)).flip(1).flatten(0, 2).contiguous()


def _mlp(options: Mapping[str, object], weights: Sequence[np.ndarray]) -> tuple[Chain, list[str]]:
    from robustlip.models.mlp import LipschitzMLP

    blocks, width, final = count(options, "num_blocks"), count(options, "d_embed", MAX_WIDTH), real(options, "final_scale")
    channels, height, across = CIFAR
    fan_in, classes = channels * height * across, 10
    names = mlp_names(blocks)
    _check(weights, names, [(width, fan_in), *[(width, width)] * (len(names) - 2), (classes, width)])
    first = weights[0].reshape(width, height, across, channels).transpose(0, 3, 1, 2).reshape(width, fan_in)
    notes = ["inputs in the order (channel, height, width), pixels in [0, 1]"]
    last = weights[-1]
    if final != 1:
        last = (final * last).astype(np.float32).astype(np.float64)
        notes.append(f"the final scale {final:g} is included in the last weights, rounded to float32")
    tensors, more = _tensors([first, *weights[1:-1], last])
    model = LipschitzMLP([fan_in, *[width] * (len(names) - 1), classes], "relu", bias=False)
    return _fill(model, {f"linear{i + 1}.weight": tensor.contiguous() for i, tensor in enumerate(tensors)}), notes + more


# ------------------------------------------------------------------------------------------------ the order, confirmed


def logged_norm(name: str, matrix: np.ndarray, options: Mapping[str, object]) -> float:
    """The norm that the code logs for a weight of that name, computed from the weight up to rounding."""
    fan_out, fan_in = matrix.shape
    if name == "embed":
        return float(np.linalg.norm(matrix, axis=0).max() / np.sqrt(fan_out))
    if name == "out" and "vocab_size" in options and options.get("use_unembed", True):
        return float(np.linalg.norm(matrix, axis=1).max() / np.sqrt(fan_in))
    return float(np.sqrt(fan_in / fan_out) * np.linalg.norm(matrix, 2))


def _confirm(checkpoint: Checkpoint, names: list[str]) -> str:
    """Compares the norms that the run logged last with those of the weights, by name, which checks their order better than shapes do."""
    log = checkpoint.log
    shared = [(name, w) for name, w in zip(names, checkpoint.weights, strict=True) if name in log.norms]
    if not shared:
        return "the file logs no norms, so the order of the weights is known from the code only"
    off = {name: abs(logged_norm(name, w, log.parameters) / log.norms[name] - 1) if log.norms[name] else np.inf for name, w in shared}
    for name, w in shared:
        if not log.norms[name] and not w.any():
            off[name] = 0.0
    worst = max(off, key=lambda name: off[name])
    if off[worst] <= AGREEMENT:
        return f"the {len(shared)} norms in the log agree with those of the weights, by name, to {off[worst]:.1e}"
    difference = f"the norm of {worst} in the log is off by {100 * min(off[worst], 9.99):.1f} %"
    if not _same_step(log, checkpoint):
        return f"{difference}: it was logged at another step than these weights were saved, so it does not confirm their order"
    raise BadInput(f"expected weights with the norms that the file logs for them, but {difference}; the file was altered, or comes from other code")


def _same_step(log: Log, checkpoint: Checkpoint) -> bool:
    """Whether the last logged step is the one at which these weights were saved: yes for the last checkpoint if all intervals divide each other."""
    steps, every = log.parameters.get("steps"), log.parameters.get("log_interval")
    if type(steps) is not int or type(every) is not int or steps < 1 or every < 1 or checkpoint.number != checkpoint.count - 1:
        return False
    return steps % every == 0 and steps % max(1, steps // checkpoint.count) == 0
