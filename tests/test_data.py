"""Data sets: the meaning of specifications, the results, and one error message per kind of invalid input."""

from __future__ import annotations

import io
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from robustlip.data import CHARACTERS, Dataset, decode, encode, hub, load, load_data, load_text_or_page, load_tokens
from robustlip.data.dataset import choose_rows
from robustlip.data.text import SHAKESPEARE_LENGTH, page
from robustlip.errors import BadInput, DataUnavailable


@pytest.fixture(autouse=True)
def _no_folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_data" not in request.fixturenames:
        monkeypatch.delenv("ROBUSTLIP_DATA", raising=False)


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    image = Image.fromarray(array)
    if mode:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def grey(n: int, size: int = 28) -> list[bytes]:
    """Images whose every pixel is the row number."""
    return [png(np.full((size, size), i, dtype=np.uint8)) for i in range(n)]


def write(path: Path, images: list, labels: list, image: str = "image", label: str = "label") -> Path:
    """A parquet file in the layout of the hub, without its metadata (so classes come from the name or the labels)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: [{"bytes": content, "path": None} for content in images], label: labels}), path)
    return path


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message.startswith("expected ") and ", got " in message and "; " in message and "\n" not in message
    return message


# digits


def test_digits_split_is_fixed_and_disjoint() -> None:
    train, test = load_data("digits:train"), load_data("digits")
    assert (len(train), len(test)) == (1437, 360)
    assert train.x.shape == (1437, 1, 8, 8) and train.x.dtype == torch.float32
    assert 0 <= float(train.x.min()) and float(train.x.max()) == 1.0
    assert (test.name, test.split, test.kind, test.classes, test.vocabulary, test.note) == ("digits", "test", "image", 10, None, "")
    from sklearn.datasets import load_digits

    # Together they are the whole set, and neither is sorted by label.
    total = torch.cat([train.x, test.x]).sum().item() * 16
    assert total == pytest.approx(load_digits().images.sum(), rel=1e-5)
    # Pinned as measured once: another split would put training samples of the shipped models into the test.
    assert test.y[:8].tolist() == [1, 3, 4, 5, 8, 5, 5, 0]
    assert test.index.tolist() == list(range(360))


def test_limit_is_a_seeded_subset_in_order() -> None:
    whole, some, again, other = (load_data("digits", limit=n, seed=s) for n, s in ((None, 0), (50, 0), (50, 0), (50, 1)))
    assert torch.equal(some.index, again.index) and not torch.equal(some.index, other.index)
    assert torch.equal(some.index, some.index.sort().values) and len(some.index.unique()) == 50
    assert torch.equal(some.x, whole.x[some.index]) and torch.equal(some.y, whole.y[some.index])
    assert len(load_data("digits", limit=10_000)) == 360


@given(total=st.integers(1, 200), limit=st.integers(1, 250), seed=st.integers(0, 2**32 - 1))
def test_choose_rows_keeps_distinct_rows(total: int, limit: int, seed: int) -> None:
    rows = choose_rows(total, limit, seed)
    assert len(rows) == min(total, limit) == len(set(rows.tolist()))
    assert rows.tolist() == sorted(rows.tolist()) and rows[0] >= 0 and rows[-1] < total


@pytest.mark.parametrize("limit", [0, -1, 2.5, True])
def test_bad_limit(limit: object) -> None:
    with pytest.raises(BadInput) as error:
        load_data("digits", limit=limit)  # type: ignore[arg-type]
    one_sentence(error)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_bad_seed(seed: object) -> None:
    with pytest.raises(BadInput) as error:
        load_data("digits", seed=seed)  # type: ignore[arg-type]
    one_sentence(error)


def test_take() -> None:
    data = load_data("digits")
    assert data.take(None) is data and data.take(1000) is data
    assert len(data.take(3)) == 3 and torch.equal(data.take(3).x, data.x[:3])
    with pytest.raises(BadInput):
        data.take(0)


def test_dataset_refuses_what_does_not_fit() -> None:
    x, y, index = torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2]), torch.arange(3)
    with pytest.raises(BadInput, match=r"in \[0, 1\], got 2 in row 2"):
        Dataset("d", "test", "image", x, y, index, classes=2)
    with pytest.raises(BadInput) as error:
        Dataset("d", "test", "image", x, y[:2], index, classes=3)
    one_sentence(error)


# specifications


@pytest.mark.parametrize(
    "spec", ["", "  ", "digist", "digits:", "digits:dev", "page:train", "nowhere.parquet", "nowhere.txt:test", "./some/folder", "a/b/c", ":test", 3]
)
def test_bad_specification(spec: object) -> None:
    with pytest.raises(BadInput) as error:
        load_data(spec)  # type: ignore[arg-type]
    assert not isinstance(error.value, DataUnavailable)
    one_sentence(error)


def test_text_options_with_images_are_refused() -> None:
    for options in ({"context": 8}, {"vocabulary": "ab"}):
        with pytest.raises(BadInput) as error:
            load_data("digits", **options)
        one_sentence(error)


# image files


@pytest.mark.parametrize("layout", ["mnist/test.parquet", "mnist/mnist/test-00000-of-00001.parquet", "mnist/data/test-00000-of-00001.parquet"])
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_local_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, by: str) -> None:
    write(tmp_path / layout, grey(6), [0, 1, 2, 3, 9, 5])
    if by == "environment":
        monkeypatch.setenv("ROBUSTLIP_DATA", str(tmp_path))
    for spec in ("mnist", "mnist:test", "ylecun/mnist"):
        data = load_data(spec, data_dir=tmp_path if by == "argument" else None, limit=4)
        assert data.x.shape == (4, 1, 28, 28) and (data.name, data.classes, data.note) == ("mnist", 10, "")
        assert torch.allclose(data.x[:, 0, 0, 0] * 255, data.index.float())


def test_subset_folder_is_noted_and_comes_after_the_whole(tmp_path: Path) -> None:
    write(tmp_path / "mnist_subset" / "test.parquet", grey(3), [0, 1, 2])
    assert load_data("mnist", data_dir=tmp_path).note == "subset"
    write(tmp_path / "mnist" / "test.parquet", grey(5), [0, 1, 2, 3, 4])
    data = load_data("mnist", data_dir=tmp_path)
    assert data.note == "" and len(data) == 5


def test_shards_are_read_in_order_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    images = grey(4)
    second = write(tmp_path / "mnist/mnist/test-00001-of-00002.parquet", images[2:], [2, 3])
    with pytest.raises(BadInput, match="2 parquet files") as error:
        load_data("mnist", data_dir=tmp_path)
    one_sentence(error)
    write(second.with_name("test-00000-of-00002.parquet"), images[:2], [0, 1])
    assert load_data("mnist", data_dir=tmp_path).y.tolist() == [0, 1, 2, 3]


def test_two_configurations_are_not_mixed(tmp_path: Path) -> None:
    for configuration in ("clean", "noisy"):
        write(tmp_path / "set" / configuration / "test-00000-of-00001.parquet", grey(2), [0, 1])
    with pytest.raises(BadInput) as error:
        load_data("set", data_dir=tmp_path)
    one_sentence(error)


def test_colour_files_with_the_columns_of_cifar10(tmp_path: Path) -> None:
    array = np.zeros((32, 32, 3), dtype=np.uint8)
    array[1, 2] = (255, 0, 51)
    write(tmp_path / "cifar10/plain_text/test-00000-of-00001.parquet", [png(array)], [7], image="img")
    data = load_data("cifar10", data_dir=tmp_path)
    assert data.x.shape == (1, 3, 32, 32) and data.x[0, :, 1, 2].tolist() == pytest.approx([1.0, 0.0, 0.2])


def test_a_file_by_its_path(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.parquet", [png(np.zeros((5, 4), dtype=np.uint8))] * 3, [0, 2, 1])
    data = load_data(str(path))
    assert (data.name, data.split, data.classes, tuple(data.x.shape)) == ("mine", "all", 3, (3, 1, 5, 4))
    with pytest.raises(BadInput) as error:
        load_data(f"{path}:test")
    one_sentence(error)


def test_declared_classes_are_believed(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])})
    rows = {"image": [Image.fromarray(np.zeros((4, 4), dtype=np.uint8))] * 2, "label": [0, 1]}
    path = tmp_path / "named.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    assert load_data(str(path)).classes == 4


def test_palette_and_black_and_white_images_are_converted(tmp_path: Path) -> None:
    array = np.full((4, 4), 255, dtype=np.uint8)
    assert load_data(str(write(tmp_path / "one.parquet", [png(array, "1")], [0]))).x.unique().tolist() == [1.0]
    assert load_data(str(write(tmp_path / "palette.parquet", [png(array, "P")], [0]))).x.shape == (1, 3, 4, 4)


def test_what_can_be_wrong_with_an_image_file(tmp_path: Path) -> None:
    good = grey(2)
    cases = {
        "label above": (good, [0, 10], "label"),
        "label below": (good, [0, -1], "label"),
        "label float": (good, [0.0, 1.0], "label"),
        "label text": (good, ["3", "4"], "label"),
        "label missing": (good, [0, None], "label"),
        "label column": (good, [0, 1], "answer"),
        "size": ([good[0], grey(1, size=27)[0]], [0, 1], "label"),
        "colour": ([good[0], png(np.zeros((28, 28, 3), dtype=np.uint8))], [0, 1], "label"),
        "mode": ([png(np.zeros((28, 28, 4), dtype=np.uint8))] * 2, [0, 1], "label"),
        "truncated image": ([good[0], good[1][:40]], [0, 1], "label"),
        "no image": ([good[0], None], [0, 1], "label"),
        "no rows": ([], [], "label"),
    }
    for case, (images, labels, column) in cases.items():
        folder = tmp_path / case.replace(" ", "-")
        write(folder / "mnist" / "test.parquet", images, labels, label=column)
        with pytest.raises(BadInput) as error:
            load_data("mnist", data_dir=folder)
        one_sentence(error)


def test_numbers_in_the_image_column(tmp_path: Path) -> None:
    path = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"image": [[0.0, 1.0]], "label": [0]}), path)
    with pytest.raises(BadInput) as error:
        load_data(str(path))
    one_sentence(error)


def test_truncated_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "short.parquet", grey(9), list(range(9)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match="copy it again") as error:
        load_data(str(path))
    one_sentence(error)


def test_unknown_split_of_a_local_copy_names_those_present(tmp_path: Path) -> None:
    write(tmp_path / "mnist" / "train-00000-of-00001.parquet", grey(2), [0, 1])
    with pytest.raises(BadInput, match="among train, got 'test'"):
        load_data("mnist", data_dir=tmp_path)


def test_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="--data-dir") as error:
        load_data("mnist", data_dir=tmp_path / "no")
    one_sentence(error)
    monkeypatch.setenv("ROBUSTLIP_DATA", str(tmp_path / "no"))
    with pytest.raises(BadInput, match="ROBUSTLIP_DATA"):
        load_data("mnist")


# the hub


@pytest.mark.parametrize("failure", ["refused", "silent"])
@pytest.mark.parametrize("name", ["mnist", "tiny_shakespeare", "owner/set"])
def test_no_network_is_one_sentence_and_quick(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, failure: str, name: str) -> None:
    def dataset_info(*_: object, **__: object) -> None:
        if failure == "silent":
            time.sleep(3)
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    start = time.monotonic()
    with pytest.raises(DataUnavailable) as error:
        load_data(name)
    assert time.monotonic() - start < 2
    message = one_sentence(error)
    assert name in message and "network" in message and "ROBUSTLIP_DATA" in message and "--data-dir" in message
    assert error.value.exit_code == 2 and error.value.__cause__ is None and error.value.__suppress_context__
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a request in offline mode")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", never)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(DataUnavailable, match="offline") as error:
        load_data("mnist")
    one_sentence(error)


def test_a_name_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def dataset_info(*_: object, **__: object) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    with pytest.raises(BadInput) as error:
        load_data("owner/nothing")
    assert not isinstance(error.value, DataUnavailable)
    one_sentence(error)


def test_hub_copy_is_read_like_a_local_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def load_dataset(repository: str, split: str | None = None, revision: str | None = None) -> object:
        asked.append((repository, split, revision))
        if repository == "karpathy/tiny_shakespeare":
            if revision is None:
                raise RuntimeError("Dataset scripts are no longer supported, but found tiny_shakespeare.py")
            texts = {"train": "abcabcabc", "test": "c", "validation": "ab"}
            return {name: datasets.Dataset.from_dict({"text": [text]}) for name, text in texts.items()}
        return datasets.Dataset.from_dict({"image": [Image.fromarray(np.zeros((28, 28), dtype=np.uint8))] * 2, "label": [3, 4]})

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_data("mnist:train")
    assert asked == [("ylecun/mnist", "train", None)] and data.y.tolist() == [3, 4] and data.x.shape == (2, 1, 28, 28)
    ids, vocabulary, note = load_tokens("tiny_shakespeare")
    assert asked[-1] == ("karpathy/tiny_shakespeare", None, "refs/convert/parquet")
    # The hub's two halves of what is held out, in the order of the text.
    assert (decode(ids, vocabulary), vocabulary, note) == ("abc", "abc", f"12 of {SHAKESPEARE_LENGTH} characters")


# text


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("the cat sat on the mat. " * 50)
    return path


def test_windows_do_not_overlap_and_are_labelled_with_the_next_token(story: Path) -> None:
    data = load_data(f"{story}:train", context=16)
    ids, vocabulary, note = load_tokens(f"{story}:train")
    assert (data.kind, data.classes, data.vocabulary, data.note, data.name) == ("text", len(vocabulary), vocabulary, "", "story")
    assert len(ids) == 1080 and len(data) == (1080 - 1) // 16 and data.x.dtype == data.y.dtype == torch.int64 and note == ""
    for window, label, offset in zip(data.x, data.y, data.index, strict=True):
        assert offset % 16 == 0
        assert torch.equal(window, ids[offset : offset + 16]) and label == ids[offset + 16]
    some = load_data(f"{story}:train", context=16, limit=5, seed=3)
    assert len(some) == 5 and torch.equal(some.x, data.x[some.index // 16])


def test_split_of_a_text_is_nine_to_one(story: Path) -> None:
    text = story.read_text()
    parts = {split: load_tokens(f"{story}:{split}") for split in ("train", "validation", "test")}
    assert torch.equal(parts["validation"][0], parts["test"][0])
    assert decode(parts["train"][0], parts["train"][1]) + decode(parts["test"][0], parts["test"][1]) == text
    assert len(parts["train"][0]) == int(0.9 * len(text))
    # The vocabulary is that of the whole text, whichever split is asked for.
    assert parts["train"][1] == parts["test"][1] == "".join(sorted(set(text)))


def test_last_window_has_a_label(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("ab" * 90 + "abababababababababab")  # 20 characters held out
    assert len(load_data(str(path), context=19)) == 1
    with pytest.raises(BadInput, match="at least 21 characters") as error:
        load_data(str(path), context=20)
    one_sentence(error)


def test_character_outside_the_vocabulary(story: Path) -> None:
    with pytest.raises(BadInput, match="'c' at position 4") as error:
        load_tokens(f"{story}:train", vocabulary=" .abdefghimnost")
    one_sentence(error)


@given(st.text(alphabet=CHARACTERS + "αβ𝔘", max_size=80))
def test_encode_and_decode_are_inverse(text: str) -> None:
    vocabulary = CHARACTERS + "αβ𝔘"
    ids = encode(text, vocabulary)
    assert ids.shape == (len(text),) and decode(ids, vocabulary) == text


@pytest.mark.parametrize("vocabulary", ["", "aba"])
def test_bad_vocabulary(vocabulary: str) -> None:
    with pytest.raises(BadInput) as error:
        encode("a", vocabulary)
    one_sentence(error)


@pytest.mark.parametrize("content", [b"caf\xe9 au lait", b""])
def test_text_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(content)
    with pytest.raises(BadInput) as error:
        load_data(str(path))
    one_sentence(error)


def test_tokens_of_images_are_refused() -> None:
    with pytest.raises(BadInput) as error:
        load_tokens("digits")
    one_sentence(error)


@pytest.mark.parametrize("context", [0, -3, 1.5, True])
def test_bad_context(context: object) -> None:
    with pytest.raises(BadInput) as error:
        load_data("page", context=context)  # type: ignore[arg-type]
    one_sentence(error)


def test_local_shakespeare_in_parts(tmp_path: Path) -> None:
    folder = tmp_path / "tiny_shakespeare"
    folder.mkdir()
    (folder / "train.txt").write_text("abab" * 30)
    with pytest.raises(BadInput, match="test or validation"):
        load_data("tiny_shakespeare", data_dir=tmp_path)
    (folder / "test.txt").write_text("ba" * 10)
    ids, vocabulary, _ = load_tokens("tiny_shakespeare:validation", data_dir=tmp_path)
    assert decode(ids, vocabulary) == "ba" * 10


# the page


def test_page_is_written_in_the_65_characters() -> None:
    text = page().held_out
    assert len(CHARACTERS) == 65 and "".join(sorted(CHARACTERS)) == CHARACTERS
    assert set(text) <= set(CHARACTERS) and 6000 <= len(text) <= 8500
    data = load_data("page", context=32, limit=20)
    assert (data.vocabulary, data.classes, data.note, data.x.shape) == (CHARACTERS, 65, "shipped page", (20, 32))
    ids, vocabulary, note = load_tokens("page")
    assert decode(ids, vocabulary) == text and note == "shipped page"


def test_page_stands_in_where_the_text_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch, story: Path) -> None:
    def unavailable(*_: object) -> None:
        raise DataUnavailable("expected x, got y; do z")

    monkeypatch.setattr(load, "from_hub", unavailable)
    with pytest.raises(DataUnavailable):
        load_data("tiny_shakespeare")
    data = load_text_or_page("tiny_shakespeare", limit=7, context=16)
    assert (data.name, data.note, len(data)) == ("page", "shipped page", 7)
    assert load_text_or_page(str(story), limit=1).note == ""
    # A mistake is still a mistake.
    with pytest.raises(BadInput, match="split"):
        load_text_or_page(f"{story}:dev")


# real data


def test_real_images(real_data: Path) -> None:
    for name, shape in (("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))):
        for split in ("train", "test"):
            data = load_data(f"{name}:{split}", limit=64)
            assert data.x.shape == (64, *shape) and 0 <= float(data.x.min()) and 0.9 < float(data.x.max()) <= 1
            assert len(data.y.unique()) >= 8 and data.classes == 10


def test_real_text(real_data: Path) -> None:
    train, vocabulary, note = load_tokens("tiny_shakespeare:train")
    test, same, _ = load_tokens("tiny_shakespeare:test")
    assert vocabulary == same == CHARACTERS and note == ""
    assert (len(train), len(train) + len(test)) == (1_003_854, SHAKESPEARE_LENGTH)
    assert decode(train[:14], vocabulary) == "First Citizen:"
