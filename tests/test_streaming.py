"""Streamed text: the same tokens for every starting position, and runs that resume after being killed."""

from __future__ import annotations

import base64
import json
import random
import tomllib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import robustlip
from robustlip.certifiers import lipschitz_bound
from robustlip.checkpoints import load_into, load_tensors, save_model
from robustlip.cli import main
from robustlip.data import hub
from robustlip.data import tokenizers as module
from robustlip.data.stream import Documents, TokenStream, local_files
from robustlip.data.tokenizers import GPT2_RANKS, Bytes, make_tokenizer
from robustlip.errors import BadInput, DataUnavailable
from robustlip.hashing import weights_sha256
from robustlip.models import BaselineGPT, LipschitzGPT
from robustlip.models.build import build
from robustlip.training import Recipe, train
from robustlip.training.source import Source

HELD_OUT = 4


def texts(count: int = 90, seed: int = 0) -> list[str]:
    """Documents of 0 to 60 characters, some of them of more than one byte."""
    draw = random.Random(seed)
    return ["".join(draw.choice("abcdefgh é𝔘\n") for _ in range(draw.randint(0, 60))) for _ in range(count)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three parquet files of 30 documents in row groups of 7, with a column that is no text."""
    folder = tmp_path / "corpus" / "sample"
    folder.mkdir(parents=True)
    for i in range(3):
        part = texts()[30 * i : 30 * i + 30]
        pq.write_table(pa.table({"id": list(range(30)), "text": part}), folder / f"{i:03}_00000.parquet", row_group_size=7)
    return tmp_path / "corpus"


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()), encoding="utf-8")
    return path


@pytest.fixture(params=["parquet", "jsonl"])
def source(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue({"parquet": "shards", "jsonl": "lines"}[request.param]))


def whole(epochs: int = 4) -> np.ndarray:
    """The stream by definition: every document but those held out, in order, 256 after each, again and again."""
    one = [i for text in texts()[HELD_OUT:] for i in [*text.encode(), 256]]
    return np.array(one * epochs)


def stream(name: str) -> TokenStream:
    return TokenStream(lambda: Documents(name), Bytes(), HELD_OUT)


# ------------------------------------------------------------------------------------------------ the stream


def test_windows_are_the_documents_in_order(source: str) -> None:
    made, wanted = stream(source), whole()
    assert made.held_out_tokens().tolist() == [i for text in texts()[:HELD_OUT] for i in [*text.encode(), 256]]
    for start in range(0, len(wanted) - 101, 100):
        assert np.array_equal(made.window(start, 101), wanted[start : start + 101]), start
    # Far ahead, and back: the same tokens.
    for start in (5000, 17, 0, 2900):
        assert np.array_equal(made.window(start, 33), wanted[start : start + 33]), start


def test_reading_goes_on_from_any_position(source: str) -> None:
    """Saved as JSON after every window, over the ends of documents, files and the whole: the same tokens follow."""
    made, wanted = stream(source), whole()
    states = []
    for start in range(0, len(wanted) - 401, 100):
        made.window(start, 101)
        states.append((start + 100, json.loads(json.dumps(made.state_at(start + 100)))))
    assert {state["epoch"] for _, state in states} == {0, 1, 2, 3} and any(state["offset"] == 0 for _, state in states)
    for start, state in states[::3]:
        again = stream(source)
        again.restore(state)
        assert state["token"] + state["offset"] == start
        for later in (start, start + 100, start + 150):
            assert np.array_equal(again.window(later, 101), wanted[later : later + 101]), (start, later)


def test_a_position_of_other_data_is_refused(source: str, tmp_path: Path) -> None:
    made = stream(source)
    made.window(700, 50)
    state = made.state_at(750)
    with pytest.raises(BadInput, match=rf"document {state['document']} of .* got another"):
        stream(source).restore({**state, "begins": [1, 2, 3]})
    with pytest.raises(BadInput, match="another version of robustlip"):
        stream(source).restore({**state, "reader": {"epoch": 0}})
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(seed=1)), encoding="utf-8")
    with pytest.raises(BadInput):
        stream(str(other)).restore(state)


def test_only_the_text_is_read(shards: Path) -> None:
    """And the documents before a position are not: that is what the state of a reader is for."""
    documents = Documents(str(shards))
    for _ in range(65):
        documents.next()
    state = documents.state()
    for early in sorted(shards.rglob("*.parquet"))[:2]:
        pq.write_table(pa.table({"id": [0] * 30, "text": ["other"] * 30}), early, row_group_size=7)
    again = Documents(str(shards))
    again.seek(state)
    assert [again.next() for _ in range(3)] == texts()[65:68]


def test_where_files_are_looked_for(shards: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(shards.rglob("*.parquet"))
    assert local_files(str(shards), None, None) == (files, "") == local_files(str(shards), "sample", None)
    assert local_files("corpus", None, tmp_path) == (files, "") == local_files("owner/corpus", "sample", tmp_path)
    assert local_files(str(lines), None, None) == ([lines], "")
    assert local_files("owner/corpus", "another", tmp_path) is None
    (tmp_path / "part_subset").mkdir()
    (tmp_path / "part_subset" / "a.jsonl").write_bytes(lines.read_bytes())
    monkeypatch.setenv("ROBUSTLIP_DATA", str(tmp_path))
    assert local_files("owner/part", None, None) == ([tmp_path / "part_subset" / "a.jsonl"], "subset")
    for name, subset, message in ((str(shards / "no.parquet"), None, "none there"), (str(shards), "no", "none; name a folder")):
        with pytest.raises(BadInput, match=message):
            local_files(name, subset, None)
    (shards / "sample" / "more.jsonl").write_bytes(lines.read_bytes())
    with pytest.raises(BadInput, match="got both"):
        local_files(str(shards), None, None)


def test_documents_that_cannot_be_used(tmp_path: Path, lines: Path) -> None:
    with pytest.raises(BadInput, match=r"column 'content' in .* got text"):
        Documents(str(lines), column="content")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": null}\n')
    documents = Documents(str(bad))
    assert documents.next() == "a"
    with pytest.raises(BadInput, match="got NoneType"):
        documents.next()
    bad.write_text('{"text": "a"}\n{"text"')
    with pytest.raises((BadInput, DataUnavailable)):
        documents = Documents(str(bad))
        while documents.next() is not None:
            pass
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "a"}\n' * HELD_OUT)
    for ask in (lambda made: made.held_out_tokens(), lambda made: made.window(0, 5)):
        with pytest.raises(BadInput, match="more than 4 documents"):
            ask(stream(str(few)))


def test_the_hub_is_asked_by_name_and_configuration(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A substitute for load_dataset, because tests have no network."""
    import datasets

    real, asked = datasets.load_dataset, []

    def load(path, name=None, **options):
        asked.append((path, name, options))
        return real("json", data_files={"rows": [str(lines)]}, split="rows", streaming=True)

    monkeypatch.delenv("ROBUSTLIP_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    documents = Documents("HuggingFaceFW/fineweb", "sample-10BT", split="train")
    assert asked == [("HuggingFaceFW/fineweb", "sample-10BT", {"split": "train", "streaming": True})]
    assert [documents.next() for _ in range(3)] == texts()[:3] and documents.note == ""

    def fails(error: Exception):
        def load(*_, **__):
            raise error

        return load

    monkeypatch.setattr(datasets, "load_dataset", fails(ValueError("BuilderConfig 'x' not found")))
    with pytest.raises(BadInput, match=r"'x' and 'train'.*BuilderConfig"):
        Documents("HuggingFaceFW/fineweb", "x")
    monkeypatch.setattr(datasets, "load_dataset", fails(ConnectionError("no")))
    with pytest.raises(DataUnavailable, match="--data-dir"):
        Documents("HuggingFaceFW/fineweb", "sample-10BT")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_within", fails(TimeoutError()))
    with pytest.raises(DataUnavailable, match="TimeoutError"):
        Documents("HuggingFaceFW/fineweb", "sample-10BT")


def every(documents: Documents) -> list[str]:
    return list(iter(documents.next, None))  # type: ignore[arg-type]


@pytest.mark.parametrize("odd", ["run [12]", "a*", "b?", "{x,y}", "a::b", "__special__", ".hidden"])
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_paths_are_literal_in_streams_too(tmp_path: Path, odd: str, form: str) -> None:
    def put(folder: str, text: str) -> Path:
        path = tmp_path / folder / f"x.{form}"
        path.parent.mkdir()
        if form == "parquet":
            pq.write_table(pa.table({"text": [text]}), path)
        else:
            path.write_text(json.dumps({"text": text}))
        return path

    for decoy in ("run 1", "aa", "bx", "x", "y"):
        put(decoy, "another")
    path = put(odd, "mine")
    assert every(Documents(str(path))) == every(Documents(str(path.parent))) == ["mine"]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_folder_of_splits_gives_one_of_them_whole(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()

    def put(name: str) -> None:
        if form == "parquet":
            pq.write_table(pa.table({"text": [name]}), folder / f"{name}.parquet")
        else:
            (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")

    for name in ("train-00000-of-00002", "test-00000-of-00001", "train-old"):
        put(name)
    with pytest.raises(BadInput, match="copy the missing"):
        Documents(str(folder))
    put("train-00001-of-00002")
    assert every(Documents(str(folder))) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert every(Documents(str(folder), split="test")) == ["test-00000-of-00001"]
    with pytest.raises(BadInput, match="among test, train"):
        Documents(str(folder), split="validation")


def test_lines_that_are_none_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\n{"text": "b"}')
    assert every(Documents(str(path))) == ["a", "b"]
    for line in (b"[1]", b"[" * 5000, b'{"text": "\xff"}', b'{"a": ' + b"9" * 5000 + b"}", b'{"text": 3}', b"\0"):
        path.write_bytes(b'{"text": "a"}\n' + line)
        documents = Documents(str(path))
        assert documents.next() == "a"
        with pytest.raises(BadInput):
            documents.next()
    monkeypatch.setattr("robustlip.data.stream.MAX_LINE", 100)
    path.write_bytes(b'{"text": "' + b"a" * 200 + b'"}')
    with pytest.raises(BadInput, match="at most 100 bytes"):
        Documents(str(path))
    (tmp_path / "x.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(BadInput, match="check the file"):
        Documents(str(tmp_path / "x.jsonl.gz"))
    (tmp_path / "x.parquet").mkdir()
    with pytest.raises(BadInput, match="none there"):
        Documents(str(tmp_path / "x.parquet"))


# ------------------------------------------------------------------------------------------------ tokenizers


def test_bytes_are_bytes() -> None:
    rows = make_tokenizer("bytes").encode(["aé", "", "𝔘"])
    assert [row.tolist() for row in rows] == [[97, 0xC3, 0xA9, 256], [256], [*"𝔘".encode(), 256]]
    assert all(row.dtype == np.int32 and row.max() < Bytes.size for row in rows)


def ranks(path: Path, count: int = GPT2_RANKS) -> Path:
    """A vocabulary of GPT-2's size: all bytes, then pairs of bytes."""
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    sequences = [bytes([i]) for i in range(256)] + pairs
    path.write_bytes(b"".join(base64.b64encode(s) + f" {rank}\n".encode() for rank, s in enumerate(sequences[:count])))
    return path


def test_gpt2_from_a_file(tmp_path: Path) -> None:
    """Works without a network; the ids are those of the file, a special string in a text is text, and the end has an id of its own."""
    pytest.importorskip("tiktoken", reason="the extra robustlip[text] is not installed")
    tokenizer = make_tokenizer("gpt2", ranks(tmp_path / "r50k_base.tiktoken"))
    assert tokenizer.size == 50_257
    first, second = (row.tolist() for row in tokenizer.encode(["ab", "<|endoftext|>"]))
    assert first == [256 + 256 * ord("a") + ord("b"), 50_256]
    assert second.count(50_256) == 1 and len(second) > 2
    text = "Nothing will come of nothing: speak again. é 123"
    decoded = b"".join(bytes([i]) if i < 256 else bytes(divmod(i - 256, 256)) for i in tokenizer.encode([text])[0].tolist()[:-1])
    assert decoded.decode() == text


def test_a_vocabulary_file_that_is_another_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken", reason="the extra robustlip[text] is not installed")
    for path, message in (
        (tmp_path / "none.tiktoken", "cannot be read"),
        (ranks(tmp_path / "short.tiktoken", 50_000), "got 50000"),
        (Path(module.__file__), "base64"),
    ):
        with pytest.raises(BadInput, match=message):
            make_tokenizer("gpt2", path)


def test_gpt2_without_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package: install it. A package and neither a network nor a cache: name the file."""
    import sys
    from types import ModuleType

    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(BadInput, match=r"install robustlip\[text\]"):
        make_tokenizer("gpt2")
    fake, public = ModuleType("tiktoken"), ModuleType("tiktoken_ext.openai_public")

    def get_encoding(name: str) -> None:
        raise ConnectionError(name)

    fake.get_encoding, public.r50k_pat_str = get_encoding, ""  # type: ignore[attr-defined]
    for name, made in (("tiktoken", fake), ("tiktoken_ext", ModuleType("tiktoken_ext")), ("tiktoken_ext.openai_public", public)):
        monkeypatch.setitem(sys.modules, name, made)
    with pytest.raises(DataUnavailable, match="TIKTOKEN_CACHE_DIR"):
        make_tokenizer("gpt2")
    with pytest.raises(BadInput, match="among bytes, gpt2"):
        make_tokenizer("words")
    with pytest.raises(BadInput, match="no vocabulary file"):
        make_tokenizer("bytes", "x.tiktoken")


# ------------------------------------------------------------------------------------------------ training


def recipe(name: str, **changes: object) -> Recipe:
    base = {
        "name": "streamed",
        "model": {"kind": "lipschitz-gpt", "vocabulary_size": 260, "width": 16, "heads": 2, "blocks": 1},
        "data": {"name": name, "streaming": True, "tokenizer": "bytes", "context": 16, "held_out": HELD_OUT},
        "optimizer": {"name": "muon", "lr": 0.1, "adamw_lr": 0.02},
        "constraint": {"method": "soft-cap", "w_max": 1.0, "overrides": {"head.weight": 8.0}},
        "run": {"steps": 30, "batch": 8, "evaluate_every": 20, "checkpoint_every": 7},
    }
    return Recipe.model_validate(base | changes)


def test_a_batch_is_a_function_of_the_step(source: str) -> None:
    """Independent of earlier calls: rows are consecutive windows, targets are the next tokens, and machines can share the rows of a step."""
    spec = recipe(source)
    made, wanted = Source(spec, None), whole()
    for step in (0, 1, 5, 2, 40):
        x, y = made.batch(step)
        assert x.shape == y.shape == (8, 16) and x.dtype == y.dtype == torch.int64
        start = step * 8 * 16
        assert np.array_equal(x.flatten().numpy(), wanted[start : start + 128])
        assert np.array_equal(y.flatten().numpy(), wanted[start + 1 : start + 129])
        assert torch.equal(torch.cat([x[rank::4] for rank in range(4)]).sort(0).values, x.sort(0).values)
    # A state taken while the next step is read ahead is that step's, and a source that was used can be sent elsewhere.
    resumed, state = Source(spec, None), made.state(41)
    resumed.batch(7)
    resumed.restore(state)
    assert torch.equal(resumed.batch(41)[0], made.batch(41)[0]) and torch.equal(resumed.batch(42)[1], made.batch(42)[1])
    held = torch.cat([x.flatten() for x, _ in made.evaluation(None)])
    assert torch.equal(held, made.test[: len(held)]) and not set(map(int, made.test)) - set(range(257))


class Stop(Exception):
    pass


def test_a_killed_run_goes_on_at_its_place_in_the_data(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as without the kill, and without reading again what was read."""
    spec = recipe(source)

    def kill(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 17:
            raise Stop

    with pytest.raises(Stop):
        train(spec, tmp_path / "parts", progress=kill)
    header = load_tensors(tmp_path / "parts" / "streamed.state.safetensors")[1]
    assert header["step"] == 14 and header["data"]["token"] + header["data"]["offset"] == 14 * 8 * 16
    read: list[int] = []
    real = TokenStream.restore

    def restore(self: TokenStream, state: dict) -> None:
        real(self, state)
        read.append(self._tokenised[0].document)

    monkeypatch.setattr(TokenStream, "restore", restore)
    resumed, uninterrupted = train(spec, tmp_path / "parts"), train(spec, tmp_path / "whole")
    assert read == [header["data"]["document"]] and read[0] > HELD_OUT
    assert weights_sha256(load_into(resumed, build)) == weights_sha256(load_into(uninterrupted, build))
    cards = [tomllib.loads(path.with_suffix(".toml").read_text()) for path in (resumed, uninterrupted)]
    assert cards[0]["val_loss"] == cards[1]["val_loss"] < 5.0  # ln 260 = 5.56
    losses = cards[1]["history"]["loss"]
    assert all(a > b for a, b in pairwise(losses))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"name": "x/y", "streaming": True}}, "needs a tokenizer"),
        ({"data": {"name": "x/y", "tokenizer": "bytes"}}, "need streaming"),
        ({"data": {"name": "x/y", "split": "z"}}, "need streaming"),
        ({"data": {"name": "x/y", "streaming": True, "tokenizer": "bytes", "tokenizer_file": "f"}}, "tokenizer_file"),
        ({"data": {"name": "x/y", "streaming": True, "tokenizer": "gpt2"}}, "at least 50257"),
        ({"model": {"kind": "lipschitz-gpt", "vocabulary": "abc"}}, "at least 257"),
        ({"model": {"kind": "mlp", "widths": [2, 3]}}, "needs a gpt"),
    ],
)
def test_recipes_that_cannot_stream(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe("x/y", **change)


def test_an_error_of_reading_ahead_is_raised_at_its_step(tmp_path: Path) -> None:
    """The documents up to there are trained on; the broken one ends the run with its sentence."""
    path = tmp_path / "broken.jsonl"
    good = "".join(json.dumps({"text": "x" * 40}) + "\n" for _ in range(200))
    path.write_text(good + '{"text": null}\n')
    made = Source(recipe(str(path)), None)
    # 64 documents are tokenised at once: three times 64 of 41 tokens are 61 steps of 128, and the broken one is in the fourth.
    for step in range(61):
        made.batch(step)
    with pytest.raises(BadInput, match="got NoneType"):
        made.batch(61)


def test_too_little_to_evaluate_on(lines: Path) -> None:
    with pytest.raises(BadInput, match=r"raise data\.held_out"):
        Source(recipe(str(lines), data={"name": str(lines), "streaming": True, "tokenizer": "bytes", "context": 900, "held_out": 4}), None)


# ------------------------------------------------------------------------------------------------ models of subwords


@pytest.mark.parametrize("kind", [LipschitzGPT, BaselineGPT])
def test_models_of_subwords(kind: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Saved, loaded, certified on token ids; text is refused in one sentence wherever it would have to be encoded."""
    model = kind(vocabulary_size=300, width=16, heads=2, blocks=1)
    save_model(tmp_path / "m.safetensors", model)
    again = load_into(tmp_path / "m.safetensors", build)
    assert again.config == model.config and again.config["vocabulary_size"] == 300 and "vocabulary" not in again.config
    assert weights_sha256(again) == weights_sha256(model) and repr(again) == repr(model)
    x, y = torch.randint(300, (4, 6)), torch.randint(300, (4,))
    result = robustlip.certify(again, x, y, robustlip.EmbeddingBall())
    assert len(result.radius) == 4 and lipschitz_bound(again)["l2"] > 0
    with pytest.raises(BadInput, match="300 subword tokens; encode text"):
        _ = again.vocabulary
    with pytest.raises(SystemExit) as end:
        main(["certify", str(tmp_path / "m.safetensors"), "--data", "page", "--threat", "embedding-l2", "--device", "cpu"])
    told = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and "subword tokens" in told[-1]
    for wrong in ({}, {"vocabulary": "ab", "vocabulary_size": 2}, {"vocabulary_size": 1}, {"vocabulary_size": 3.0}):
        with pytest.raises(BadInput, match="vocabulary"):
            kind(width=16, heads=2, blocks=1, **wrong)
    assert kind("abc", width=16, heads=2, blocks=1).vocabulary == "abc"


@pytest.mark.parametrize("kind", ["empty.jsonl", "fake.parquet", "cut.jsonl.gz", "broken.jsonl"])
def test_files_that_are_not_what_they_claim_are_one_sentence(tmp_path: Path, kind: str) -> None:
    import gzip

    whole = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts()).encode())
    made = {"empty.jsonl": b"", "fake.parquet": b"PAR1 and no more", "cut.jsonl.gz": whole[: len(whole) // 2], "broken.jsonl": b'{"text": "a'}
    (tmp_path / kind).write_bytes(made[kind])
    with pytest.raises((BadInput, DataUnavailable), match="expected"):
        train(recipe(str(tmp_path / kind)), tmp_path / "run")
