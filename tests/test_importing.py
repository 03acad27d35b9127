"""Published checkpoints become the same models here; hostile files are refused, and nothing that they name is run."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import tomllib
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from robustlip.certifiers import lipschitz_bound
from robustlip.cli import main
from robustlip.errors import BadInput
from robustlip.importing import FORMULAS, convert, read_checkpoint, read_log
from robustlip.importing.archive import members, read_object
from robustlip.importing.convert import gpt_names, logged_norm, mlp_names
from robustlip.importing.logs import explained
from robustlip.importing.measure import measure
from robustlip.importing.pickles import load, scan
from robustlip.models import LipschitzGPT
from robustlip.models.build import build
from robustlip.models.zoo import load as load_model

GPT = {
    "d_embed": 16, "num_heads": 2, "num_blocks": 2, "vocab_size": 65, "softmax_scale": 1, "final_scale": 1, "residual_scale": 1,
    "scales_learnable": False, "layernorm_substitute": "none", "use_unembed": False, "max_embed_inflation_factor": 16, "model_dtype": "float32",
    "project": {"default": "soft_cap"}, "data": "shakespeare", "seq_len": 8, "steps": 10, "log_interval": 5, "w_max": 6, "num_checkpoints": 1,
}  # fmt: skip
MLP = {"d_embed": 12, "num_blocks": 3, "data": "cifar", "final_scale": 1, "steps": 10, "log_interval": 5, "project": {"default": "none"}}


# ------------------------------------------------------------------------------------------------ files in the published format


def gpt_weights(options: dict, seed: int = 0) -> list[np.ndarray]:
    """Random weights in the order of the published code, float32: embedding, blocks with V, Q, K, W, MLP in, MLP out, unembedding."""
    rng, d, v = np.random.default_rng(seed), options["d_embed"], options["vocab_size"]
    shapes = [(d, v), *[(d, d), (d, d), (d, d), (d, d), (4 * d, d), (d, 4 * d)] * options["num_blocks"], (v, d)]
    return [(rng.standard_normal(shape) / shape[1] ** 0.5).astype(np.float32) for shape in shapes]


def mlp_weights(options: dict, seed: int = 0) -> list[np.ndarray]:
    rng, d, n = np.random.default_rng(seed), options["d_embed"], options["num_blocks"]
    shapes = [(d, 3072), *[(d, d)] * (n - 2), (10, d)]
    return [(rng.standard_normal(shape) / shape[1] ** 0.5).astype(np.float32) for shape in shapes]


def log_results(options: dict, weights: list[np.ndarray], claimed: float | None = None) -> dict:
    """What the published logger keeps: norms by name over the steps, losses, accuracies."""
    names = mlp_names(options["num_blocks"]) if options["data"] == "cifar" else gpt_names(options["num_blocks"])
    results: dict = {
        name: {"weight_norm": [1.0, logged_norm(name, w.astype(float), options)]} for name, w in zip(names, weights, strict=True)
    }  # fmt: skip
    results |= {"losses": [4.0, 3.0], "val_losses": [3.5], "accuracies": [0.25], "train_accuracies": [0.2], "total_time": 1.5}
    return results | ({} if claimed is None else {"lipschitz_constant": claimed})


def write(path: Path, options: dict, checkpoints: list[list[np.ndarray]], results: dict | None = None, flag: bool = True) -> Path:
    """As the published code does: dictionaries of nested lists, each in an object array of shape (), with the flag that old numpy saves."""
    arrays: dict = {"args": np.array(options, dtype=object)}
    if results is not None:
        arrays["results"] = np.array(results, dtype=object)
    for i, weights in enumerate(checkpoints):
        arrays[f"weights_checkpoint_{i}"] = np.array({k: w.tolist() for k, w in enumerate(weights)}, dtype=object)
    if flag:
        arrays["allow_pickle"] = np.array(True)
    np.savez_compressed(path, **arrays)
    return path


def gpt_file(tmp_path: Path, **changes) -> Path:
    options = GPT | changes
    weights = gpt_weights(options)
    return write(tmp_path / "gpt.npz", options, [weights], log_results(options, weights))


# ------------------------------------------------------------------------------------------------ the published model, in numpy


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 1.1289


def normed(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "none":
        return x
    if kind == "tanh":
        return np.tanh(x)
    x = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def published_gpt(ids: np.ndarray, options: dict, weights: list[np.ndarray]) -> np.ndarray:
    """Logits (N, T, V) in float64, token by token and head by head, with the sines and cosines exchanged as in the published code."""
    w = [m.astype(float) for m in weights]
    x, heads, kind = w[0].T[ids], options["num_heads"], options["layernorm_substitute"]
    d = options["d_embed"] // heads
    alpha = options["residual_scale"] / (2 * options["num_blocks"])
    time = np.arange(ids.shape[1])[:, None] * 10000.0 ** (-np.arange(d // 2) / (d // 2))
    cos, sin = np.sin(time), np.cos(time)  # the code unpacks (sin, cos) as cos, sin

    def turn(z: np.ndarray) -> np.ndarray:
        late, early = z[:, d // 2 :], z[:, : d // 2]
        return np.concatenate([cos * late + sin * early, -sin * late + cos * early], 1)

    for b in range(options["num_blocks"]):
        v, q, k, o, up, down = w[1 + 6 * b : 7 + 6 * b]
        mixed = np.zeros_like(x)
        for n in range(len(ids)):
            seen = normed(x[n], kind)
            for h in range(heads):
                rows = slice(h * d, (h + 1) * d)
                score = options["softmax_scale"] * turn(seen @ q[rows].T) @ turn(seen @ k[rows].T).T / d
                score[np.triu_indices(len(score), 1)] = -np.inf
                p = np.exp(score - score.max(1, keepdims=True))
                mixed[n, :, rows] = p / p.sum(1, keepdims=True) @ (seen @ v[rows].T) / 3
        x = (1 - alpha) * x + alpha * mixed @ o.T
        x = (1 - alpha) * x + alpha * gelu(normed(x, kind) @ up.T) @ down.T
    return options["final_scale"] * x @ w[-1].T


def published_mlp(images: np.ndarray, options: dict, weights: list[np.ndarray]) -> np.ndarray:
    """Images (N, height, width, channel) → logits (N, 10)."""
    x = images.reshape(len(images), -1)
    for i, m in enumerate(weights):
        x = (np.maximum(x, 0) if i else x) @ m.T.astype(float)
    return options["final_scale"] * x


# ------------------------------------------------------------------------------------------------ conversion


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"softmax_scale": 2.5, "num_heads": 4},
        {"final_scale": 3.0, "residual_scale": 1.5},
        {"num_blocks": 3, "use_unembed": True, "max_embed_inflation_factor": 256},
        {"layernorm_substitute": "tanh"},
        {"layernorm_substitute": "rmsnorm"},
        {"layernorm_substitute": "layernorm"},
    ],
)
def test_the_model_is_the_published_one(changes, tmp_path) -> None:
    options = GPT | changes
    weights = gpt_weights(options)
    for w in weights[1:-1]:
        w *= 2  # away from the almost linear model that small weights make
    made = convert(read_checkpoint(write(tmp_path / "m.npz", options, [weights], log_results(options, weights))))
    ids = np.random.default_rng(1).integers(0, 65, (3, 9))
    with torch.no_grad():
        ours = made.model(torch.from_numpy(ids)).double().numpy()
    want = published_gpt(ids, options, weights)
    assert np.abs(ours - want).max() < 3e-5 * np.abs(want).max()
    # The comparison would notice: other blocks first, positions turned the other way, the erf form.
    assert np.abs(published_gpt(ids, options, [weights[0], *weights[7:-1], *weights[1:7], weights[-1]]) - want).max() > 1e-2 * np.abs(want).max()
    assert "those of the weights" in made.confirmed and made.model.vocabulary is not None and len(made.model.vocabulary) == 65
    assert lipschitz_bound(made.model)["rms"] > 0


def test_the_halves_of_queries_and_keys_matter(tmp_path) -> None:
    options = GPT | {"num_blocks": 1}
    weights = gpt_weights(options)
    for w in weights[1:5]:
        w *= 6
    model = convert(read_checkpoint(write(tmp_path / "m.npz", options, [weights]))).model
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 65, (3, 9)))
    right = published_gpt(ids.numpy(), options, weights)
    with torch.no_grad():
        assert np.abs(model(ids).numpy() - right).max() < 3e-5 * np.abs(right).max()
        model[1].branch.query.weight.copy_(torch.from_numpy(weights[2]))
        model[1].branch.key.weight.copy_(torch.from_numpy(weights[3]))
        assert np.abs(model(ids).numpy() - right).max() > 1e-2 * np.abs(right).max()


@pytest.mark.parametrize("changes", [{}, {"num_blocks": 2}, {"num_blocks": 5, "final_scale": 3}])
def test_the_mlp_is_the_published_one_in_our_order_of_pixels(changes, tmp_path) -> None:
    options = MLP | changes
    weights = mlp_weights(options)
    made = convert(read_checkpoint(write(tmp_path / "m.npz", options, [weights], log_results(options, weights))))
    images = np.random.default_rng(2).random((5, 32, 32, 3))
    ours = made.model(torch.from_numpy(images).float().permute(0, 3, 1, 2)).detach().numpy()
    want = published_mlp(images, options, weights)
    assert np.abs(ours - want).max() < 1e-5 * np.abs(want).max()
    scale = float(options["final_scale"])
    product = scale * np.prod([np.linalg.norm(w.astype(float), 2) for w in weights])
    assert product * (1 - 1e-6) <= lipschitz_bound(made.model)["l2"] <= product * 1.01


def test_options_left_alone_leave_configurations_alone() -> None:
    """Cards, recipes and hashes of models that were made before the options existed must not change."""
    config = {"kind": "lipschitz-gpt", "vocabulary": "abc", "width": 8, "heads": 2, "blocks": 1, "attention_scale": 1.0, "distance_bias": 0}
    model = LipschitzGPT("abc", 8, 2, 1)
    assert model.config == config and list(dict(model.named_children())) == ["embed_tokens", "attn0", "mlp0", "head"]
    chosen = LipschitzGPT("abc", 8, 2, 1, gelu="tanh", norm="tanh", final_scale=2.0)
    assert chosen.config == config | {"gelu": "tanh", "norm": "tanh", "final_scale": 2.0}
    again = build(chosen.config)
    assert repr(again) == repr(chosen) and again.load_state_dict(chosen.state_dict()) is not None
    for wrong in ({"gelu": "none"}, {"norm": "batchnorm"}, {"final_scale": 0.0}, {"final_scale": float("inf")}):
        with pytest.raises(BadInput, match="expected"):
            LipschitzGPT("abc", 8, 2, 1, **wrong)


@pytest.mark.parametrize("options", [{"gelu": "tanh"}, {"norm": "tanh"}, {"norm": "rmsnorm"}, {"norm": "layernorm"}, {"final_scale": 5.0}])
def test_the_options_are_inside_the_bound(options) -> None:
    """The slope of any output token by any one input token, at many places of the domain, stays below the bound."""
    torch.manual_seed(0)
    model = LipschitzGPT("abcdef", 8, 2, 2, **options).double().eval().requires_grad_(False)
    for layer in list(model)[1:-1]:
        for p in layer.parameters():
            p.mul_(2)
    bound = float(lipschitz_bound(model)["l2"])
    domain = float(model[0].weight.norm(dim=-1).max())
    seen = 0.0
    for _ in range(20):
        x = torch.randn(1, 3, 8, dtype=torch.float64)
        x = x / x.norm(dim=-1, keepdim=True) * domain * torch.rand(1, 3, 1)
        jacobian = torch.autograd.functional.jacobian(model.from_embeddings, x)[0, :, :, 0].transpose(1, 2)  # (3, 3, 6, 8)
        seen = max(seen, float(torch.linalg.matrix_norm(jacobian, 2).max()))
    assert 0 < seen <= bound
    if "final_scale" in options:
        plain = LipschitzGPT("abcdef", 8, 2, 2).double()
        plain.load_state_dict(model.state_dict())
        assert bound == pytest.approx(5 * float(lipschitz_bound(plain)["l2"]), rel=1e-9)
        ids = torch.tensor([[0, 3, 5]])
        torch.testing.assert_close(model(ids), 5 * plain(ids))


def test_loss_and_accuracy_are_measured_as_the_code_does(tmp_path) -> None:
    """Windows that start at 0, 1, 2, … of the held-out tenth, every position predicted."""
    options = GPT | {"seq_len": 6, "batch_size": 2, "val_iters": 4}
    weights = gpt_weights(options)
    model = convert(read_checkpoint(write(tmp_path / "m.npz", options, [weights]))).model
    text = "The quality of mercy is not strained. " * 20
    (tmp_path / "t.txt").write_text(text)
    held = text[int(len(text) * 0.9) :]
    ids = np.array([[model.vocabulary.index(c) for c in held[i : i + 7]] for i in range(8)])
    logits = published_gpt(ids[:, :-1], options, weights)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    got = measure(model, f"{tmp_path / 't.txt'}:test", options)
    assert got.loss == pytest.approx(-np.take_along_axis(log_p, ids[:, 1:, None], -1).mean(), rel=1e-5)
    assert got.accuracy == pytest.approx((logits.argmax(-1) == ids[:, 1:]).mean()) and "8 windows of 6" in got.of
    with pytest.raises(BadInput, match="more than"):
        measure(model, f"{tmp_path / 't.txt'}:test", options | {"seq_len": 5000})


def test_weights_are_kept_exactly(tmp_path) -> None:
    weights = gpt_weights(GPT)
    model = convert(read_checkpoint(write(tmp_path / "m.npz", GPT, [weights]))).model
    state = model.state_dict()
    assert torch.equal(state["embed_tokens.weight"], torch.from_numpy(weights[0].T.copy()))
    # The first block that is applied is the last that the code names, and comes first in the file.
    assert torch.equal(state["attn0.branch.value.weight"], torch.from_numpy(weights[1]))
    assert torch.equal(state["mlp1.branch.down.weight"], torch.from_numpy(weights[12]))
    assert state["head.weight"].dtype == torch.float32
    wide = [w.astype(float) + 1e-12 for w in weights]
    made = convert(read_checkpoint(write(tmp_path / "w.npz", GPT, [wide])))
    assert next(made.model.parameters()).dtype == torch.float64 and any("float64" in note for note in made.notes)


def test_several_checkpoints_and_the_last_by_default(tmp_path) -> None:
    first, last = gpt_weights(GPT, 1), gpt_weights(GPT, 2)
    path = write(tmp_path / "m.npz", GPT | {"num_checkpoints": 2}, [first, last], log_results(GPT, last), flag=False)
    assert "logged at another step" in convert(read_checkpoint(path, 0)).confirmed
    chosen = read_checkpoint(path)
    assert (chosen.number, chosen.count) == (1, 2) and np.array_equal(chosen.weights[3], last[3].astype(float))
    with pytest.raises(BadInput, match="among"):
        read_checkpoint(path, 2)


def test_weights_in_another_order_are_noticed(tmp_path) -> None:
    """Queries and values have the same shape; the logged norms tell them apart."""
    weights = gpt_weights(GPT)
    weights[1] *= 2
    results = log_results(GPT, weights)
    path = write(tmp_path / "m.npz", GPT, [[weights[0], weights[2], weights[1], *weights[3:]]], results)
    with pytest.raises(BadInput, match=r"norm of [vq]1 in the log is off"):
        convert(read_checkpoint(path))


@pytest.mark.parametrize(
    ("changes", "drop", "sentence"),
    [
        ({"num_blocks": 3}, 0, "expected 20 weights"),
        ({}, 1, "expected 14 weights"),
        ({"d_embed": 8}, 0, "shape"),
        ({"num_heads": 3}, 0, "divisible"),
        ({"num_heads": 16}, 0, "even head width"),
        ({"vocab_size": 66}, 0, "of shape"),
        ({"num_blocks": True}, 0, "num_blocks between"),
        ({"num_blocks": 10**9}, 0, "num_blocks between"),
        ({"softmax_scale": float("nan")}, 0, "softmax_scale above 0"),
        ({"final_scale": -1}, 0, "final_scale above 0"),
        ({"layernorm_substitute": "batchnorm"}, 0, "layernorm_substitute"),
        ({"scales_learnable": True}, 0, "scales_learnable"),
        ({"data": "fineweb"}, 0, "vocabulary"),
    ],
)
def test_options_that_are_not_of_the_weights_are_refused(changes, drop, sentence, tmp_path) -> None:
    weights = gpt_weights(GPT)
    path = write(tmp_path / "m.npz", GPT | changes, [weights[: len(weights) - drop]])
    with pytest.raises(BadInput, match=sentence):
        convert(read_checkpoint(path))


def test_unknown_options_are_named_and_another_vocabulary_can_be_given(tmp_path) -> None:
    options = GPT | {"data": "fineweb", "vocab_size": 4, "novelty": 3}
    made = convert(read_checkpoint(write(tmp_path / "m.npz", options, [gpt_weights(options)])), "abcd")
    assert made.model.vocabulary == "abcd" and "'novelty'" in made.notes[0]
    with pytest.raises(BadInput, match="different"):
        convert(read_checkpoint(tmp_path / "m.npz"), "abca")
    with pytest.raises(BadInput, match="neither"):
        convert(read_checkpoint(write(tmp_path / "n.npz", {"num_blocks": 2}, [gpt_weights(GPT)])))


def test_the_older_form_without_scales_is_refused(tmp_path) -> None:
    path = tmp_path / "old.npz"
    np.savez_compressed(path, args=np.array(GPT, dtype=object), weights=np.array({0: [[1.0]]}, dtype=object))
    with pytest.raises(BadInput, match="ignored every scale"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "weights",
    [
        {0: [["1.0"]]}, {0: [[1.0], [1.0, 2.0]]}, {0: [[float("nan")]]}, {0: [[10**400]]}, {0: []}, {0: [[]]}, {0: 3.0}, {0: [[True]]},
        {0: [[[1.0]]]}, {1: [[1.0]]}, {"0": [[1.0]]}, [[[1.0]]], {}, {0: [[None]]},
    ],
)  # fmt: skip
def test_weights_that_are_no_matrices_are_refused(weights, tmp_path) -> None:
    path = tmp_path / "m.npz"
    np.savez_compressed(path, args=np.array(GPT, dtype=object), weights_checkpoint_0=np.array(weights, dtype=object))
    with pytest.raises(BadInput):
        read_checkpoint(path)


# ------------------------------------------------------------------------------------------------ formulas


def one_block_log(norm: float, **parameters) -> dict:
    names = ("embed", "q0", "k0", "v0", "w0", "mlp_in0", "mlp_out0", "out")
    options = {"data": "shakespeare", "num_blocks": 1, "softmax_scale": 1} | parameters
    return {"parameters": options, "results": {name: {"weight_norm": [9.0, norm]} for name in names}}


def write_log(path: Path, document: dict) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_the_published_formulas_by_hand(tmp_path) -> None:
    log = read_log(write_log(tmp_path / "l.json", one_block_log(1.0)))
    # α = 1/2, Λ_att = (1 + 2)/3 = 1, Λ_mlp = 1/1.1289.
    assert FORMULAS["published"](log) == pytest.approx(0.5 + 0.5 / 1.1289)
    assert FORMULAS["published before June 2025"](log) == pytest.approx(1.0)
    doubled = read_log(write_log(tmp_path / "l.json", one_block_log(2.0, softmax_scale=3)))
    # The domain is 1 in front of attention: Λ_att = 2·2(1 + 2·1·4)/3·3 = 36; Λ_mlp = 4/1.1289; embedding and unembedding 2 each.
    assert FORMULAS["published"](doubled) == pytest.approx(2 * (0.5 + 18) * (0.5 + 2 / 1.1289) * 2)
    # L = 2 → (2 + 16)/2 = 9 → (9 + 4)/2 = 6.5 → 13.
    assert FORMULAS["published before June 2025"](doubled) == pytest.approx(13.0)


def test_the_formula_agrees_with_that_of_the_audit_when_blocks_agree(tmp_path) -> None:
    """One block has no order; the published value starts with the embedding's norm, the audit's with 1."""
    from robustlip.attacks.formulas import newhouse2025

    options = GPT | {"num_blocks": 1, "softmax_scale": 1.5}
    weights = gpt_weights(options)
    read = read_checkpoint(write(tmp_path / "m.npz", options, [weights], log_results(options, weights)))
    said = FORMULAS["published"](read.log)
    assert said / read.log.norms["embed"] == pytest.approx(newhouse2025(convert(read).model).value, rel=1e-6)


@pytest.mark.parametrize("name", list(FORMULAS))
def test_a_log_says_which_formula_its_constant_is(name, tmp_path) -> None:
    document = one_block_log(1.7)
    value = FORMULAS[name](read_log(write_log(tmp_path / "l.json", document)))
    document["results"]["lipschitz_constant"] = value * (1 + 1e-6)
    assert explained(read_log(write_log(tmp_path / "l.json", document))) == name
    document["results"]["lipschitz_constant"] = value * 1.01
    assert explained(read_log(write_log(tmp_path / "l.json", document))) is None


def test_a_log_of_a_run_that_diverged_keeps_its_norms(tmp_path) -> None:
    document = one_block_log(1.0)
    document["results"] |= {"val_losses": [3.0, float("nan")], "accuracies": []}
    log = read_log(write_log(tmp_path / "l.json", document))
    assert log.loss is None and log.accuracy is None and log.norms["q0"] == 1.0


def test_logs_of_mlps(tmp_path) -> None:
    results = {name: {"weight_norm": [norm]} for name, norm in (("mlp_in", 2.0), ("mlp_0", 3.0), ("mlp_out", 5.0))}
    log = read_log(write_log(tmp_path / "l.json", {"parameters": {"data": "cifar"}, "results": results}))
    assert all(formula(log) == 30.0 for formula in FORMULAS.values())


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"parameters": {}}', '{"parameters": [], "results": {}}', "[" * 200_000,
        '{"parameters": {}, "results": {"q0": {"weight_norm": []}}}',
        '{"parameters": {}, "results": {"q0": {"weight_norm": [NaN]}}}', '{"parameters": {}, "results": {"q0": {"weight_norm": [1e999]}}}',
        '{"parameters": {}, "results": {"q0": {"weight_norm": ["1"]}}}', '{"parameters": {}, "results": {"q0": {"weight_norm": [-1]}}}',
        '{"parameters": {}, "results": {"lipschitz_constant": true}}', '{"parameters": {}, "results": {"accuracies": 3}}', "1" * 5000, "\xff",
    ],
)  # fmt: skip
def test_logs_from_outside_get_a_sentence(text, tmp_path) -> None:
    path = tmp_path / "l.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match=r"^expected "):
        read_log(path)


# ------------------------------------------------------------------------------------------------ hostile pickles

RAN = "ROBUSTLIP_TEST_RAN"


class Call:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function, *arguments, state=None) -> None:
        self.told = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self):
        return self.told


def object_array(value) -> np.ndarray:
    array = np.empty((), dtype=object)
    array[()] = value
    return array


def npy_object(value, protocol: int = 4) -> bytes:
    return pickle.dumps(object_array(value), protocol=protocol)


def run_me() -> Call:
    return Call(os.putenv, RAN, "1")


SHELL = Call(os.system, f"touch {RAN}")
NUMBER_TYPE = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8K\x00K\x01tR(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
OBJECT_TYPE = NUMBER_TYPE.replace(b"f8", b"O8").replace(b"<N", b"|N").replace(b"K\x00tb", b"K?tb")
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"


def holding(body: bytes) -> bytes:
    """A pickle (protocol 2 and 3 instructions) of an object array of shape () around what `body` pushes."""
    return b"\x80\x03" + ARRAY + b"(K\x01)" + OBJECT_TYPE + b"\x89](" + body + b"etb."


def array_of(shape: bytes, kind: bytes, data: bytes, order: bytes = b"\x89") -> bytes:
    return ARRAY + b"(K\x01" + shape + kind + order + data + b"tb"


def test_what_the_writers_here_make_is_read() -> None:
    """The hostile bytes below differ from these in one thing each."""
    plain = {"a": [1.0, 2], "b": (True, None, "x"), 3: -5, "c": {}, "d": (), "big": 2**40, "é": [[0.5], []]}
    for protocol in (3, 4, 5):
        assert load(npy_object(plain, protocol), "f") == plain
    made = load(npy_object({"x": np.arange(6.0).reshape(2, 3).T, "n": np.float32(1.5), "i": np.int64(7)}, 3), "f")
    assert np.array_equal(made["x"], np.arange(6.0).reshape(2, 3).T) and made["n"] == 1.5 and made["i"] == 7 and type(made["i"]) is int
    eight = b"C\x10" + struct.pack("<2d", 1.0, 2.0)
    assert load(holding(array_of(b"K\x02\x85", NUMBER_TYPE, eight)), "f").tolist() == [1.0, 2.0]
    both = npy_object({"x": 1.0}, 3)
    old, new = (both.replace(b"numpy._core", name).replace(b"numpy.core", name) for name in (b"numpy.core", b"numpy._core"))
    assert load(old, "f") == load(new, "f") == {"x": 1.0} and old != new


HOSTILE_OBJECTS = {
    "os.system": SHELL,
    "putenv": run_me(),
    "in a dictionary": {"d_embed": 3, "deep": [{"er": (run_me(),)}]},
    "eval": Call(eval, f"__import__('os').putenv('{RAN}', '1')"),
    "exec": Call(exec, "import os"),
    "import": Call(__import__, "os"),
    "getattr": Call(getattr, "x", "upper"),
    "a method": Call(print, "x"),
    "numpy beyond the four": Call(np.fromfile, "/etc/hostname"),
    "numpy.load": Call(np.load, "x.npy"),
    "np.ndarray called": Call(np.ndarray, (3,)),
    "complex": 1j,
    "a set": {1, 2},
    "bytes": b"abc",
    "bytearray": bytearray(b"x"),
    "a class": dict,
    "a huge integer": 2**80,
    "a path": Path("x"),
    "a subclass with state": Call(dict, state={"a": 1}),
    "an object array inside": {"x": np.array([1, "a"], dtype=object)},
    "an array of text": np.array(["a"]),
    "an array of bytes": np.array([b"a"]),
    "complex numbers": np.array([1j]),
    "dates": np.array(["2020"], dtype="datetime64[Y]"),
    "a structured array": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    "a record scalar": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "O")])[0],
    "a dtype": np.dtype("f8"),
    "a dtype with metadata": np.array([1.0], dtype=np.dtype("f8", metadata={"a": 1})),
    "a recarray": np.rec.array([(1,)], dtype=[("a", "i4")]),
    "a masked array": np.ma.array([1.0]),
    "long double": np.longdouble(1),
}


@pytest.mark.parametrize("name", list(HOSTILE_OBJECTS))
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_objects_that_are_not_plain_are_refused_and_nothing_runs(name, protocol, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = npy_object({"x": HOSTILE_OBJECTS[name]}, protocol)
    called = []
    monkeypatch.setattr("builtins.__import__", lambda *a, _real=__import__, **k: called.append(a[0]) or _real(*a, **k))
    with pytest.raises(BadInput, match=r"^expected "):
        load(data, "f")
    monkeypatch.undo()
    assert not (tmp_path / RAN).exists() and RAN not in os.environ
    assert {"os", "posix", "nt", "subprocess"}.isdisjoint(called)


def test_the_callable_objects_are_refused_by_each_wall_alone(monkeypatch) -> None:
    """The scan refuses them before anything is built, and the unpickler refuses them without the scan."""
    import robustlip.importing.pickles as pickles

    for name in ("os.system", "eval", "in a dictionary", "numpy beyond the four", "a class"):
        data = npy_object({"x": HOSTILE_OBJECTS[name]})
        with pytest.raises(BadInput, match="name"):
            scan(data, "f")
        monkeypatch.setattr(pickles, "scan", lambda *_: None)
        with pytest.raises(BadInput, match="name"):
            load(data, "f")
        monkeypatch.undo()


ZERO = b"C\x08" + bytes(8)
HOSTILE_BYTES = {
    "empty": b"",
    "no end": holding(b"K\x01")[:-1],
    "cut in a number": npy_object([1.0, 2.0])[:-7],
    "something behind the end": holding(b"K\x01") + b"\x80\x04.",
    "a second pickle": holding(b"K\x01") * 2,
    "no array": pickle.dumps({"a": 1}),
    "text protocol": pickle.dumps(object_array(1.0), protocol=0),
    "GLOBAL os system": holding(b"cos\nsystem\n"),
    "GLOBAL posix with REDUCE": holding(b"cposix\nsystem\n(X\x04\x00\x00\x00truetR"),
    "GLOBAL builtins eval": holding(b"cbuiltins\neval\n(X\x01\x00\x00\x001tR"),
    "GLOBAL with a dotted name": holding(b"cnumpy\ndtype.__class__.__base__\n"),
    "STACK_GLOBAL of a submodule": holding(b"\x8c\x05numpy\x8c\x0edtype.__init__\x93"),
    "STACK_GLOBAL whose name is computed": holding(b"\x8c\x05numpy(K\x01t\x93"),
    "STACK_GLOBAL with operands from the memo": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93.",
    "INST": holding(b"(ios\nsystem\n"),
    "OBJ": holding(b"(cnumpy\ndtype\nX\x02\x00\x00\x00f8o"),
    "NEWOBJ": holding(b"cnumpy\nndarray\n(K\x01t\x81"),
    "NEWOBJ_EX": holding(b"cnumpy\nndarray\n)}\x92"),
    "EXT1": holding(b"\x82\x01"),
    "EXT2": holding(b"\x83\x01\x00"),
    "EXT4": holding(b"\x84\x01\x00\x00\x00"),
    "PERSID": holding(b"Pfile\n"),
    "BINPERSID": holding(b"K\x01Q"),
    "BUILD of a dictionary": holding(b"}}b"),
    "BUILD of a name": holding(b"cnumpy\nndarray\n(K\x01tb"),
    "BUILD of a name with slots": holding(b"cnumpy\ndtype\nN}(X\x01\x00\x00\x00aK\x01u\x86b"),
    "BUILD twice": holding(NUMBER_TYPE + b"(K\x01tb"),
    "REDUCE of text": holding(b"X\x01\x00\x00\x00a)R"),
    "REDUCE of ndarray": holding(b"cnumpy\nndarray\n(K\x03\x85tR"),
    "REDUCE with a list for arguments": holding(b"cnumpy\ndtype\n](X\x02\x00\x00\x00f8K\x00K\x01eR"),
    "an unfinished array": holding(ARRAY),
    "an unfinished type": holding(b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8K\x00K\x01tR"),
    "another class than ndarray": holding(
        ARRAY.replace(b"ndarray", b"dtype") + b"(K\x01K\x01\x85" + NUMBER_TYPE + b"\x89" + ZERO + b"tb"
    ),
    "a huge shape, little data": holding(array_of(b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft", NUMBER_TYPE, ZERO)),
    "a shape whose product is 2**64": holding(array_of(b"(" + b"J\x00\x00\x01\x00" * 4 + b"t", NUMBER_TYPE, b"C\x00")),
    "a shape below 0": holding(array_of(b"(J\xff\xff\xff\xfft", NUMBER_TYPE, ZERO)),
    "a shape of numbers that are not whole": holding(array_of(b"(G\x3f\xf0\x00\x00\x00\x00\x00\x00t", NUMBER_TYPE, ZERO)),
    "a shape of 99 axes": holding(array_of(b"(" + b"K\x01" * 99 + b"t", NUMBER_TYPE, ZERO)),
    "data one byte short": holding(array_of(b"K\x01\x85", NUMBER_TYPE, b"C\x07" + bytes(7))),
    "data as a list": holding(array_of(b"K\x01\x85", NUMBER_TYPE, b"](K\x01e")),
    "a type with fields": holding(array_of(b"K\x01\x85", NUMBER_TYPE.replace(b"NNN", b"N}N"), ZERO)),
    "a type with names": holding(array_of(b"K\x01\x85", NUMBER_TYPE.replace(b"NNN", b"NX\x01\x00\x00\x00aN"), ZERO)),
    "a type with a subarray": holding(array_of(b"K\x01\x85", NUMBER_TYPE.replace(b"NNN", b")NN"), ZERO)),
    "a type with flags": holding(array_of(b"K\x01\x85", NUMBER_TYPE.replace(b"K\x00tb", b"K\x3ftb"), ZERO)),
    "a type of void": holding(array_of(b"K\x01\x85", NUMBER_TYPE.replace(b"f8", b"V8"), ZERO)),
    "numbers taken for objects": holding(array_of(b"K\x01\x85", OBJECT_TYPE, ZERO)),
    "objects in numbers' array": holding(array_of(b")", OBJECT_TYPE, b"](K\x01e")),
    "two objects for one": b"\x80\x03" + ARRAY + b"(K\x01)" + OBJECT_TYPE + b"\x89](K\x01K\x02etb.",
    "a list that contains itself": holding(b"]q\x00h\x00a"),
    "a dictionary that contains itself": holding(b"}q\x00K\x01h\x00s"),
    "a list used twice": holding(b"]q\x00(h\x00h\x00t"),
    "laughs": holding(b"]q\x00" + b"".join(b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60))),
    "a memo at 2**31": holding(b"]r\xff\xff\xff\x7f"),
    "a memo out of order": holding(b"]q\x05"),
    "a memo that was never filled": holding(b"h\x07"),
    "a deep list": holding(b"]" * 40 + b"a" * 39),
    "a very deep list": holding(b"]" * 9000 + b"a" * 8999),
    "many lists": holding(b"](" + b"]" * 9999 + b"e"),
    "text longer than the file": holding(b"X\xff\xff\xff\x7fabc"),
    "text of 2**63": holding(b"\x8d" + struct.pack("<Q", 2**63 - 1) + b"abc"),
    "bytes longer than the file": holding(b"\x8e" + struct.pack("<Q", 2**40) + b"abc"),
    "a frame longer than the file": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + holding(b"K\x01")[2:],
    "text that is no UTF-8": holding(b"X\x01\x00\x00\x00\xff"),
    "a long of 2 GB": holding(b"\x8b\xff\xff\xff\x7f\x01"),
    "a key that cannot be hashed": holding(b"}]K\x01s"),
    "a key that is an array": holding(b"}" + array_of(b"K\x01\x85", NUMBER_TYPE, ZERO) + b"K\x01s"),
    "an odd number of keys": holding(b"}(K\x01u"),
    "POP below the stack": holding(b"0" * 99),
    "an end of a list that never began": b"\x80\x03ttt.",
    "out-of-band buffers": holding(b"\x97"),
    "a bytearray": holding(b"\x96" + struct.pack("<Q", 1) + b"a"),
    "an unknown instruction": holding(b"\xfe"),
    "an unknown protocol": b"\x80\x63" + holding(b"K\x01")[2:],
}  # fmt: skip


@pytest.mark.parametrize("name", list(HOSTILE_BYTES))
def test_hostile_bytes_are_refused_in_a_sentence(name) -> None:
    with pytest.raises(BadInput, match=r"^expected .*; ") as caught:
        load(HOSTILE_BYTES[name], "f")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("seed", range(6))
def test_files_with_bytes_changed_never_do_anything_but_load_or_refuse(seed) -> None:
    rng = np.random.default_rng(seed)
    whole = npy_object({"a": [[1.0, 2.0], [3.0]], "b": {"c": np.arange(3.0)}, "n": np.float64(2.0), "t": ("x", 1)}, 3 + seed % 2)
    for _ in range(400):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(0, 256)
        try:
            load(bytes(data), "f")
        except BadInput as error:
            assert str(error).startswith("expected ")


WATCHED = """
import importlib.util, sys, warnings
import numpy as np
warnings.simplefilter("ignore")
spec = importlib.util.spec_from_file_location("hostile", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
files = list(tests.HOSTILE_BYTES.values()) + [tests.npy_object({"x": v}, p) for v in tests.HOSTILE_OBJECTS.values() for p in (3, 4, 5)]
rng = np.random.default_rng(0)
for whole in files[: len(tests.HOSTILE_BYTES)] + [tests.npy_object({"a": [1.0], "b": np.arange(3.0)}, p) for p in (3, 4)]:
    for _ in range(20 if whole else 0):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 2):
            data[at] = rng.integers(0, 256)
        files.append(bytes(data))
files.append(None)  # the watch itself, watched
bad, on = [], [False]
tests.load(tests.npy_object({"a": 1.0}), "warm")  # whatever numpy and pickle import on first use

def watch(event, arguments):
    if on[0] and event.partition(".")[0] in {"os", "subprocess", "exec", "compile", "import", "open", "pickle", "ctypes", "socket", "shutil"}:
        bad.append((event, str(arguments)[:100]))

sys.addaudithook(watch)
for data in files:
    on[0], bad[:] = True, []
    try:
        tests.load(data, "f") if data is not None else __import__("pickle").loads(tests.npy_object({"x": tests.HOSTILE_OBJECTS["eval"]}))
    except tests.BadInput:
        pass
    on[0] = False
    assert bool(bad) == (data is None), (data, bad)
print(len(files))
"""


def test_python_itself_sees_no_import_file_or_call(tmp_path) -> None:
    """Every hostile file here and 1,500 changed ones, under the interpreter's own audit events; one pickle.loads shows that they would come."""
    command = [sys.executable, "-c", WATCHED, __file__]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 1500


# ------------------------------------------------------------------------------------------------ hostile archives

HEADER = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"


def zipped(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED, comment: bytes = b"") -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")
        for name, data in entries.items():
            archive.writestr(name, data)
        archive.comment = comment
    return path


def test_the_header_here_is_numpys(tmp_path) -> None:
    np.save(tmp_path / "x.npy", np.array({"a": 1}, dtype=object), allow_pickle=True)
    data = (tmp_path / "x.npy").read_bytes()
    assert data.startswith(HEADER)
    assert read_object(zipped(tmp_path / "x.npz", {"args.npy": data}), "args") == {"a": 1}


@pytest.mark.parametrize(
    "entries",
    [
        {"../args.npy": HEADER}, {"/args.npy": HEADER}, {"a/args.npy": HEADER}, {"args": HEADER}, {"..npy": HEADER},
        {"C:args.npy": HEADER}, {"ärgs.npy": HEADER}, {f"w{i}.npy": b"" for i in range(300)},
    ],
)  # fmt: skip
def test_names_that_numpy_would_not_write_are_refused(entries, tmp_path) -> None:
    with pytest.raises(BadInput, match="members"):
        members(zipped(tmp_path / "x.npz", entries))


def test_members_of_the_same_name_are_refused(tmp_path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("args.npy", HEADER + npy_object({}))
        archive.writestr("args.npy", HEADER + npy_object({"a": 1}))
    with pytest.raises(BadInput, match="distinct names"):
        members(tmp_path / "x.npz")


@pytest.mark.parametrize(("mode", "sentence"), [(0o120777, "link"), (0o040755, "link"), (0o060600, "device")])
def test_links_and_devices_are_refused(mode, sentence, tmp_path) -> None:
    info = zipfile.ZipInfo("args.npy")
    info.external_attr = mode << 16
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(BadInput, match=sentence):
        members(tmp_path / "x.npz")


def patched(path: Path, *changes: tuple[bytes, int, bytes]) -> Path:
    """The file with bytes replaced at an offset after the last occurrence of a signature."""
    data = bytearray(path.read_bytes())
    for signature, offset, new in changes:
        at = data.rindex(signature) + offset
        data[at : at + len(new)] = new
    path.write_bytes(bytes(data))
    return path


CENTRAL, END, LOCAL = b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ([(CENTRAL, 8, b"\x01\x00")], "encrypted"),
        ([(CENTRAL, 8, b"\x40\x00")], "encrypted"),
        ([(CENTRAL, 10, b"\x0c\x00")], "compression"),
        ([(CENTRAL, 10, b"\x63\x00")], "compression"),
        ([(CENTRAL, 24, b"\xff\xff\xff\x7f")], "bytes"),
        ([(CENTRAL, 24, b"\x05\x00\x00\x00")], "damaged|others"),
        ([(CENTRAL, 24, b"\x00\x10\x00\x00")], "damaged|others|header"),
        ([(CENTRAL, 16, b"\x00\x00\x00\x00")], "damaged"),
        ([(LOCAL, 30, b"evil")], "damaged"),
        ([(CENTRAL, 42, b"\xff\xff\xff\x0f")], "damaged|zip"),
        ([(END, 12, b"\xff\xff\xff\x00")], "zip"),
        ([(END, 10, b"\xff\xff")], "zip|damaged|header|data|different"),
        ([(END, 16, b"\xff\xff\xff\xff")], "zip|damaged"),
        ([(END, 0, b"PK\x05\x07")], "zip"),
    ],
)
def test_zips_that_say_one_thing_and_hold_another_are_refused(changes, sentence, tmp_path) -> None:
    path = patched(zipped(tmp_path / "x.npz", {"args.npy": HEADER + npy_object({"a": [1.0] * 50})}), *changes)
    if changes[0][1:] == (10, b"\xff\xff") and changes[0][0] == END:
        assert read_object(path, "args") == {"a": [1.0] * 50}  # the count of entries is told twice; only the size of the table is used
        return
    with pytest.raises(BadInput, match=sentence):
        read_object(path, "args")


def test_a_name_that_ends_early_is_refused(tmp_path) -> None:
    path = zipped(tmp_path / "x.npz", {"args.npy?.txt": HEADER})
    path.write_bytes(path.read_bytes().replace(b"npy?", b"npy\0"))
    with pytest.raises(BadInput, match="members"):
        members(path)


def test_a_zip_bomb_is_not_unpacked(tmp_path) -> None:
    path = zipped(tmp_path / "x.npz", {"args.npy": bytes(161 * 2**20)})
    assert path.stat().st_size < 2**20
    with pytest.raises(BadInput, match="bytes"):
        read_object(path, "args")
    many = zipped(tmp_path / "y.npz", {f"w{i}.npy": HEADER for i in range(11)}, zipfile.ZIP_STORED)
    # The decompressed size follows a compressed size, which is the same here.
    size = struct.pack("<I", len(HEADER))
    many.write_bytes(many.read_bytes().replace(size + size + b"\x06\x00", size + struct.pack("<I", 150 * 2**20) + b"\x06\x00"))
    with pytest.raises(BadInput, match="decompressed bytes"):
        members(many)


def test_a_table_of_contents_of_millions_is_not_read(tmp_path) -> None:
    path = patched(zipped(tmp_path / "x.npz", {"args.npy": HEADER}), (END, 12, struct.pack("<I", 2**18)))
    with pytest.raises(BadInput, match="central directory"):
        members(path)


def test_cut_files_and_other_files_are_refused(tmp_path) -> None:
    whole = gpt_file(tmp_path).read_bytes()
    path = tmp_path / "cut.npz"
    for length in (0, 1, 30, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput):
            read_checkpoint(path)
    for text in (b"PK", b"PK\x05\x06" + bytes(18), b"not a zip"):
        path.write_bytes(text)
        with pytest.raises(BadInput):
            read_checkpoint(path)
    zipped(path, {"args.npy": HEADER + npy_object({})}, comment=b"x" * 40)
    with pytest.raises(BadInput, match="comment"):
        members(path)
    with pytest.raises(BadInput, match="does not exist"):
        members(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", b"{'descr': '<f8', 'fortran_order': False, 'shape': (), }",
        b"{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (), }", b"__import__('os').putenv('ROBUSTLIP_TEST_RAN', '1') or {'descr': '|O'}",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (), 'more': 1}", b"(" * 500,
    ],
)  # fmt: skip
def test_other_headers_are_refused_unread(header, tmp_path) -> None:
    body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + npy_object({})
    with pytest.raises(BadInput, match="header"):
        read_object(zipped(tmp_path / "x.npz", {"args.npy": body}), "args")
    for start in (b"", b"\x93NUMPY", b"\x93NUMPY\x09\x00\x10\x00", b"\x93NUMPY\x02\x00\xff\xff\xff\xff", b"\x93NUMPZ\x01\x00\x76\x00"):
        with pytest.raises(BadInput, match="header"):
            read_object(zipped(tmp_path / "x.npz", {"args.npy": start + header}), "args")


@pytest.mark.parametrize("member", ["args", "results", "weights_checkpoint_0"])
def test_code_in_any_member_is_refused(member, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arrays = {"args": GPT, "results": log_results(GPT, gpt_weights(GPT)), "weights_checkpoint_0": {0: [[1.0]]}}
    arrays[member] = {"x": [SHELL], **arrays[member]} if member != "weights_checkpoint_0" else {0: SHELL}
    np.savez_compressed(tmp_path / "x.npz", **{name: object_array(value) for name, value in arrays.items()})
    with pytest.raises(BadInput, match="nothing of it was run"):
        convert(read_checkpoint(tmp_path / "x.npz"))
    assert not (tmp_path / RAN).exists()


def test_members_that_are_not_needed_are_not_read(tmp_path) -> None:
    weights = gpt_weights(GPT)
    np.savez_compressed(
        tmp_path / "x.npz", args=object_array(GPT), weights_checkpoint_0=object_array({i: w.tolist() for i, w in enumerate(weights)}),
        code=object_array(SHELL), allow_pickle=object_array(SHELL),
    )  # fmt: skip
    read = read_checkpoint(tmp_path / "x.npz")
    assert read.left_out == ("code",) and len(read.weights) == 14


# ------------------------------------------------------------------------------------------------ the command


def run(*arguments) -> int:
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_saves_a_model_that_loads_and_a_card(tmp_path, capsys) -> None:
    weights = gpt_weights(GPT)
    claimed = FORMULAS["published"](read_checkpoint(write(tmp_path / "gpt.npz", GPT, [weights], log_results(GPT, weights))).log)
    path = write(tmp_path / "gpt.npz", GPT, [weights], log_results(GPT, weights, claimed))
    (tmp_path / "held.txt").write_text("To be, or not to be: that is the question. " * 40)
    report = tmp_path / "r.json"
    assert run("import", path, "--out", tmp_path / "o", "--name", "mine", "--json", report, "--data", f"{tmp_path / 'held.txt'}:test") == 0
    assert "proved over claimed" in capsys.readouterr().out
    model, card = load_model(tmp_path / "o" / "mine.safetensors"), tomllib.loads((tmp_path / "o" / "mine.toml").read_text())
    said = json.loads(report.read_text())["card"]
    assert card["weights_sha256"] == said["weights_sha256"] and card["bound"]["rms"] == lipschitz_bound(model)["rms"]
    assert card["claim"]["explained"].endswith("published") and card["claim"]["claimed"] == pytest.approx(claimed)
    from robustlip.importing import read_checkpoint as again

    log = again(path).log
    assert card["claim"]["proved_over_claimed"] == pytest.approx(card["bound"]["rms"] / (claimed / log.norms["embed"]))
    assert card["claim"]["formula_of_weights"] > 0 and "sorted" in card["caveats"] and card["measured"]["loss"] > 0
    ids = torch.randint(0, 65, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).double().numpy(), published_gpt(ids.numpy(), GPT, weights), rtol=1e-4, atol=1e-4)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"words": ["To be, or not to be: that is the question. "] * 40, "text": ["?"] * 40}), tmp_path / "held.parquet")
    named = ("import", path, "--out", tmp_path / "p", "--json", report, "--data", tmp_path / "held.parquet")
    assert run(*named, "--text-column", "words") == 0
    assert json.loads(report.read_text())["card"]["measured"]["loss"] == pytest.approx(card["measured"]["loss"])
    for more in (("--text-column", "nothing"), ("--text-column", "words", "--subset", "s"), ("--text-column", "words", "--image-column", "words")):
        assert run(*named, *more) == 2


def test_the_command_reads_logs(tmp_path, capsys) -> None:
    path = write_log(tmp_path / "log.json", one_block_log(1.0))
    assert run("import", path, "--json", "-") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["formulas"]["published"] == pytest.approx(0.5 + 0.5 / 1.1289) and said["proved"] is None


@pytest.mark.parametrize(
    ("name", "content", "more", "sentence"),
    [
        ("nowhere.npz", None, (), "does not exist"),
        ("x.npz", b"PK\x03\x04 nothing", (), "zip"),
        ("x.bin", b"\x00\x01\x02\x03", (), "neither"),
        ("x.pkl", pickle.dumps(SHELL), (), "neither"),
        ("x.json", b"{}", (), "parameters"),
        ("x.json", b'{"parameters": {}, "results": {}}', ("--data", "digits"), "leave them out"),
        ("x.json", b'{"parameters": {}, "results": {}}', ("--limit", "3"), "--limit with --data"),
        ("x.json", b'{"parameters": {}, "results": {}}', ("--image-column", "i", "--subset", "s"), "--subset, --image-column with --data"),
    ],
)
def test_bad_input_is_one_sentence(name, content, more, sentence, tmp_path, capsys) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run("import", tmp_path / name, *more) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("robustlip: expected ") and sentence in lines[0]


def test_hostile_checkpoints_end_with_2_in_a_process_of_their_own(tmp_path) -> None:
    np.savez_compressed(tmp_path / "x.npz", args=object_array({"d_embed": SHELL}), weights_checkpoint_0=object_array({0: [[1.0]]}))
    command = [sys.executable, "-c", "import sys; from robustlip.cli import main; main(sys.argv[1:])", "import", str(tmp_path / "x.npz")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "nothing of it was run" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / RAN).exists()


def test_names_that_leave_the_folder_are_refused(tmp_path, capsys) -> None:
    path = gpt_file(tmp_path)
    for name in ("../x", "a/b", ".hidden"):
        assert run("import", path, "--out", tmp_path / "o", "--name", name) == 2
    assert "--name" in capsys.readouterr().err and not (tmp_path / "x.safetensors").exists()


def test_a_log_of_the_wrong_scale_is_not_a_bound(tmp_path) -> None:
    """The proved bound comes from the weights, whatever the log claims."""
    weights = gpt_weights(GPT)
    honest = convert(read_checkpoint(write(tmp_path / "a.npz", GPT, [weights], log_results(GPT, weights, 1.0))))
    modest = convert(read_checkpoint(write(tmp_path / "b.npz", GPT, [weights], log_results(GPT, weights, 1e-9))))
    assert lipschitz_bound(honest.model) == lipschitz_bound(modest.model)


def test_an_import_does_not_replace_another_model(capsys, tmp_path, monkeypatch) -> None:
    """The same checkpoint again writes the same model; another one under its name is refused."""
    monkeypatch.chdir(tmp_path)
    first = gpt_file(tmp_path)
    for _ in range(2):
        with pytest.raises(SystemExit) as done:
            main(["import", str(first), "--out", "im", "--name", "same"])
        assert not done.value.code
    before = Path("im/same.safetensors").read_bytes()
    Path("im/same.toml").write_text(Path("im/same.toml").read_text().replace('source_sha256 = "', 'source_sha256 = "0'))
    for name, words in (("same", "another --name"), ("a\nb", "letters, digits")):
        with pytest.raises(SystemExit) as refused:
            main(["import", str(first), "--out", "im", "--name", name])
        assert refused.value.code == 2 and words in capsys.readouterr().err
    assert Path("im/same.safetensors").read_bytes() == before
