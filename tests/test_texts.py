"""Classifiers of texts of several lengths: what is read, what is certified, what is attacked, and the same program with padding."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from hugging_face import saved

from robustlip import capture
from robustlip.attacks import MinimumRadius, by_name
from robustlip.certificate_file import row_hashes
from robustlip.certificates import concatenate
from robustlip.certifiers import certify
from robustlip.certifiers.chains import identity_of
from robustlip.data import load_data
from robustlip.data.lengths import NO_LABEL, NO_TOKEN, by_length, joined, lengths
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import MeanTokens, NextTokenChain, OneTokenChain, TokenChain, TokenLabelChain
from robustlip.models.zoo import load
from robustlip.samples import as_samples
from robustlip.target import Target
from robustlip.threats import EmbeddingBall, WeightBall, parse_threat

pytest.importorskip("transformers", reason="needs transformers: pip install 'robustlip[hf]'")
CLASSIFIERS = ("bert", "roberta", "distilbert")
LINES = ("the cat sat on the mat and the dog\t0", "the dog\t2", "a cat\t1", "the dog sat on the mat\t1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: saved(kind, root / kind, marks=True) for kind in CLASSIFIERS}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "t.tsv"
    path.write_text("\n".join(("sentence\tlabel", *LINES)))
    return path


def small() -> TokenChain:
    """A classifier of 12 tokens by their mean."""
    torch.manual_seed(0)
    layers = (torch.nn.Embedding(12, 8), MeanTokens(), torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    return TokenChain(*layers).eval()


RAGGED = joined([torch.tensor(row) for row in ([1, 2, 3, 4], [5, 6], [7, 8, 9], [10, 11], [3, 1, 2, 5])])


def right(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return Target(model).scores(x).argmax(1)


# ---- what is read


def test_texts_are_encoded_whole_with_marks_and_without_padding(folders, table, tmp_path) -> None:
    words = load(f"hf:{folders['bert']}").vocabulary
    data = load_data(str(table), vocabulary=words)
    for text, ids, label in zip(LINES, data.x, data.y, strict=True):
        own = ids[ids != NO_TOKEN]
        assert own[0] == 0 and own[-1] == 2 and (own[1:-1] > 2).all() and own.tolist() == [0, *words.encode(text[:-2]).tolist(), 2]
        assert int(text[-1]) == label
    assert data.classes == 3 and len(set(lengths(data.x).tolist())) > 2 and int(lengths(data.x).max()) > 9 and data.names == words.classes
    cut = load_data(str(table), vocabulary=words, context=5)
    assert lengths(cut.x).max() == 5 and (cut.x.max(1).values >= 2).all() and cut.x[0].tolist() == [*data.x[0, :4].tolist(), 2]
    # The same rows of other files.
    quoted = tmp_path / "t.csv"
    quoted.write_text("id,text,label\n" + "\n".join(f'{i},"{line[:-2]}",LABEL_{line[-1]}' for i, line in enumerate(LINES)))
    assert torch.equal(load_data(str(quoted), vocabulary=words).x, data.x) and torch.equal(load_data(str(quoted), vocabulary=words).y, data.y)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"s": [line[:-2] for line in LINES], "k": [int(line[-1]) for line in LINES]}), tmp_path / "t.parquet")
    same = load_data(str(tmp_path / "t.parquet"), vocabulary=words, text_column="s", label_column="k", limit=2, seed=1)
    assert torch.equal(same.x, joined([data.x[i][data.x[i] != NO_TOKEN] for i in same.index.tolist()])) and torch.equal(same.y, data.y[same.index])


def test_a_file_of_text_is_read_to_its_end(folders) -> None:
    """A tokenizer.json may request truncation and padding."""
    words = load(f"hf:{folders['bert']}").vocabulary
    assert len(words.encode("the cat " * 20)) > 20 and 1 not in words.encode("the").tolist()


WRONG = {
    "sentence\tlabel\nthe cat\tgood": "among its 3 declared classes",
    "sentence\tlabel\nthe cat\t3": r"\[0, 2\]",
    "sentence\tlabel\nthe cat": "2 cells",
    "sentence\tsentence\nthe\tcat": "distinct column names",
    "sentence\tlabel\n": "at least one row",
    "words\tlabel\nthe cat\t0": "text column",
    "sentence\tclass\nthe cat\t0": "label column",
    "": "first line",
    "sentence\tlabel\n\xff\t1": "UTF-8",
}


@pytest.mark.parametrize("content", WRONG)
def test_a_table_of_something_else_ends_in_one_sentence(content, folders, tmp_path) -> None:
    path = tmp_path / "t.tsv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(BadInput, match=WRONG[content]):
        load_data(str(path), vocabulary=load(f"hf:{folders['bert']}").vocabulary)


def test_texts_that_no_model_can_read(folders, table, tmp_path) -> None:
    with pytest.raises(BadInput, match="a model with a tokenizer"):
        load_data(str(table))
    model = load(f"hf:{folders['roberta']}")
    long = torch.full((1, 21), 5)
    with pytest.raises(BadInput, match="--context 20"):
        certify(model, long, torch.zeros(1).long(), "embedding-l2")
    (tmp_path / "q.csv").write_text('text,label\n"the cat,0')
    with pytest.raises(BadInput, match="commas and quotes"):
        load_data(str(tmp_path / "q.csv"), vocabulary=model.vocabulary)
    with pytest.raises(BadInput, match="space for the special tokens"):
        load_data(str(table), vocabulary=model.vocabulary, context=1)


# ---- what is passed


def test_what_a_tokenizer_answers_is_taken_and_what_is_another_program_refused() -> None:
    padded, mask = RAGGED.masked_fill(RAGGED == NO_TOKEN, 0), (RAGGED != NO_TOKEN).long()
    forms = [
        {"input_ids": padded, "attention_mask": mask}, {"input_ids": padded.numpy(), "attention_mask": mask.numpy(), "token_type_ids": 0 * padded},
        {"input_ids": [row[row != NO_TOKEN].tolist() for row in RAGGED]}, [row[row != NO_TOKEN].tolist() for row in RAGGED],
        [row[row != NO_TOKEN] for row in RAGGED], [row[row != NO_TOKEN].numpy() for row in RAGGED],
    ]  # fmt: skip
    for form in forms:
        assert torch.equal(as_samples(form)[0], RAGGED)
    wrong = {
        "pad on the right": {"input_ids": padded.flip(1), "attention_mask": mask.flip(1)},
        "one part": {"input_ids": padded, "token_type_ids": mask}, "attention_mask of 0 and 1": {"input_ids": padded, "attention_mask": mask[:, :2]},
        "expected input_ids": {"input_ids": padded, "position_ids": padded}, "in row 1; drop": [[1, 2], []],
    }  # fmt: skip
    for message, form in wrong.items():
        with pytest.raises(BadInput, match=message):
            as_samples(form)
    for hole in ([[1, NO_TOKEN, 2], [1, 2, 3]], [[NO_TOKEN, NO_TOKEN, NO_TOKEN], [1, 2, 3]]):
        with pytest.raises(BadInput, match="only after the end"):
            by_length(torch.tensor(hole))


# ---- what is certified and attacked


@pytest.mark.parametrize("threat", [EmbeddingBall(), EmbeddingBall(tokens=(-1,)), WeightBall("spectral", relative=True)], ids=lambda t: t.name)
def test_a_text_has_the_radius_and_the_attack_that_it_has_alone(threat) -> None:
    model, numbers = small(), np.array([7, 3, 9, 1, 5])
    y = right(model, RAGGED)
    y[2] = (y[2] + 1) % 3
    whole = certify(model, RAGGED, y, threat, index=numbers)
    assert whole.index.tolist() == numbers.tolist() and (whole.radius > 0).tolist() == [True, True, False, True, True]
    assert whole.status[2] == "misclassified" and whole.programs.keys() == {2, 3, 4}
    for i, row in enumerate(RAGGED):
        alone = certify(model, row[row != NO_TOKEN][None], y[i : i + 1], threat)
        assert whole.radius[i] == pytest.approx(alone.radius[0], rel=1e-6) and whole.prediction[i] == alone.prediction[0]
    found = MinimumRadius(steps=2, descent=8)(model, RAGGED, y, threat, index=numbers)
    assert found.index.tolist() == numbers.tolist() and found.label.tolist() == y.tolist() and (whole.radius <= found.radius).all()
    assert np.isfinite(found.radius).sum() >= 4
    if isinstance(threat, EmbeddingBall):
        clean = torch.zeros(5, 4, 8)
        with torch.no_grad():
            for row, ids in enumerate(RAGGED):
                own = ids[ids != NO_TOKEN]
                clean[row, : len(own)] = model[0](own)
                point = found.adversarial[int(found.group[row])]
                assert bool((point[len(own) :] == 0).all())
                assert int(model.from_embeddings(point[None, : len(own)]).argmax()) == found.adversarial_prediction[row]
        moved = (found.adversarial - clean).norm(dim=-1).amax(1)
        assert np.allclose(moved.numpy(), found.distance, rtol=1e-5, atol=1e-7)
    else:
        assert {len(change) for change in found.adversarial.values()} == {len(set(found.group.tolist()) | {0, 1, 2})} or len(found.group) == 5


def test_a_batch_of_shorter_texts_is_of_their_length() -> None:
    model = small()
    y = right(model, RAGGED)
    part = certify(model, RAGGED[1:2], y[1:2], "embedding-l2")
    assert part.radius[0] > 0 and part.programs.keys() == {2}
    joint = concatenate([certify(model, RAGGED[:2], y[:2], "embedding-l2"), certify(model, RAGGED[2:], y[2:], "embedding-l2")])
    assert joint.architecture_sha256 == certify(model, RAGGED, y, "embedding-l2").architecture_sha256
    # A row is the same row whatever else is in its table.
    assert row_hashes(RAGGED, y)[1] == row_hashes(RAGGED[1:2, :2], y[1:2])[0] != row_hashes(RAGGED[3:4, :2], y[1:2])[0]


@pytest.mark.parametrize("kind", ["bert", *(pytest.param(kind, marks=pytest.mark.slow) for kind in CLASSIFIERS[1:])])
def test_a_family_of_classifiers_with_and_without_padding(kind, folders) -> None:
    """The certificate is of each text by itself; the same model, padded and masked, keeps the prediction inside the radius too."""
    model, ids = load(f"hf:{folders[kind]}"), joined([torch.tensor(row) for row in ([0, 5, 6, 7, 8, 2], [0, 9, 2])])
    y = right(model, ids)
    with torch.no_grad():
        assert torch.equal(Target(model).scores(ids)[1], model(ids[1:, :3])[0])
    threat = parse_threat("embedding-l2")
    found = certify(model, {"input_ids": ids.masked_fill(ids < 0, 1), "attention_mask": (ids >= 0).long()}, y, threat, "dual")
    assert (found.radius > 0).all() and found.programs.keys() == {3, 6}
    assert ("model_l2" in found.bound) == (kind != "roberta")
    assert identity_of(model, ids) == (found.weights_sha256, found.architecture_sha256)
    assert identity_of(model, ids[:1])[1] == found.programs[6]
    attack = by_name("pgd", steps=5, restarts=1)
    worst = attack(model, ids, y, parse_threat("embedding-l2", float(found.radius.min())))
    assert not worst.success.any() and (worst.distance > 0).all()
    if kind == "roberta":  # embeddings that are given to it have other positions than ids with padding
        return
    inside, mask = worst.adversarial.clone(), (ids >= 0).long()
    inside[1, 3:] = 40.0  # whatever stands in the padding
    with torch.no_grad():
        padded = model.model(inputs_embeds=inside, attention_mask=mask).logits
        alone = Target(model).scores_from_embeddings(worst.adversarial[1:, :3])
    assert padded.argmax(1).tolist() == y.tolist() and torch.allclose(padded[1], alone[0], atol=1e-5)


# ---- the command line


@pytest.mark.slow
def test_the_verbs_take_a_table_of_texts(folders, table, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = tmp_path / "short.tsv"
    model = load(f"hf:{folders['bert']}")
    kept = load_data(str(table), vocabulary=model.vocabulary, context=6)
    labels = right(model, kept.x).tolist()
    short.write_text("\n".join(["sentence\tlabel", *(f"{line[:-2]}\t{label}" for line, label in zip(LINES, labels, strict=True))]))
    name, other, base = f"hf:{folders['bert']}", f"hf:{folders['roberta']}", ("--data", short, "--context", "6", "--device", "cpu")
    assert run("certify", name, *base, "--threat", "embedding-l2@-1", "--method", "local", "--batch-size", "3", "--json", "c.json") == 0
    told = json.loads(Path("c.json").read_text())
    assert [s["status"] for s in told["samples"]] == ["certified"] * 4 and told["data"]["spec"] == "short.tsv"
    assert run("verify", "c.json", "--model", name, "--device", "cpu") == 0
    Path("policy.toml").write_text(
        'data = "short.tsv"\ncontext = 6\ndtype = "float32"\nmin_samples = 4\nmin_clean_accuracy = 1.0\nmethods = ["local"]\n'
        '[[threat]]\nname = "embedding-l2@-1"\nradius = 1e-6\nmin_certified_accuracy = 1.0\n'
    )
    assert run("gate", name, "--policy", "policy.toml", "--certificate", "c.json", "--device", "cpu") == 0
    assert run("attack", name, *base, "--threat", "embedding-l2@-1", "--attack", "pgd", "--radius", "0.01") == 0
    assert run("audit", name, "--data", short, "--context", "6", "--device", "cpu", "--starts", "2", "--steps", "2") == 0
    Path("suite.toml").write_text(
        f'name = "texts"\ntitle = "t"\n[[pair]]\nname = "p"\ntitle = "p"\nlipschitz = "{name}"\nbaseline = "{other}"\ndata = "short.tsv"\n'
        'context = 6\nlimit = 4\n[[pair.threat]]\nname = "embedding-l2@-1"\nradii = [1e-6]\nmethod = "local"\n'
        ''
    )
    assert run("eval", "suite.toml", "--out", "run", "--device", "cpu") == 0


# ---- a label for each token, and the token that is read


class Mixing(torch.nn.Module):
    """A residual block of self-attention."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8), causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Tagger(torch.nn.Module):
    """Labels of tokens, or of the text by the last token that is not `padding`."""

    def __init__(self, causal: bool = False, padding: int | None = None, read: str = "argmax") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words, self.mix, self.head = torch.nn.Embedding(12, 8), Mixing(causal), torch.nn.Linear(8, 3)
        self.padding, self.read = padding, read

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.words

    def forward(self, x: torch.Tensor | None = None, *, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.head(self.mix(self.words(x) if inputs_embeds is None else inputs_embeds))
        if self.padding is None:
            return logits
        rows = torch.arange(logits.shape[0])
        if x is None:
            return logits[rows, -1]
        places = torch.arange(x.shape[-1])
        if self.read == "argmax":
            return logits[rows, ((x != self.padding).int() * places).argmax(-1)]
        if self.read == "sum":
            return logits[rows, x.ne(self.padding).sum(-1) - 1]
        if self.read == "id":  # a place that depends on which words there are
            return logits[rows, x[:, 0].remainder(4)]
        if self.read == "other":
            return logits[rows, (x.gt(self.padding).int() * places).argmax(-1)]
        if self.read == "rows":
            return logits[rows.flip(0), -1]
        return logits[rows + 0, (x.ne(self.padding).int() * places).argmax(0)[:1]]


@pytest.mark.parametrize(("causal", "read"), [(True, "argmax"), (False, "sum")])
def test_the_last_token_that_is_no_padding_is_the_last(read, causal) -> None:
    model, x = Tagger(causal, 0, read).eval(), torch.randint(1, 12, (3, 5), generator=torch.Generator().manual_seed(0))
    chain = capture(model, x)
    assert type(chain) is OneTokenChain and chain.position == -1 and chain.without == {0}
    assert torch.equal(chain.scores(x), model(x))
    y = right(model, x)
    for name in ("embedding-l2", "embedding-l2@-1"):
        found = {method: certify(model, x, y, name, method) for method in ("local", "dual")}
        attacked = MinimumRadius(steps=2, descent=8)(model, x, y, name).radius
        assert all((certificate.radius > 0).all() and (certificate.radius <= attacked).all() for certificate in found.values())
        if causal and name == "embedding-l2@-1":  # one token moves alone: the same as the model of the next token
            twin = NextTokenChain(OrderedDict(chain.named_children()))
            assert np.array_equal(certify(twin, x, y, name, "dual").radius, found["dual"].radius)
    with pytest.raises(BadInput, match="without the token 0"):
        certify(model, x.masked_fill(x == x[0, 1], 0), y, "embedding-l2")
    ragged = x.clone()
    ragged[1, 3:] = NO_TOKEN
    assert (certify(model, ragged, right(model, ragged), "embedding-l2", "local").radius > 0).all()


@pytest.mark.parametrize("read", ["id", "other", "rows", "columns"])
def test_another_choice_of_a_token_is_refused(read) -> None:
    with pytest.raises(UnsupportedLayer):
        capture(Tagger(True, 0, read).eval(), torch.randint(1, 12, (3, 5), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("causal", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_classifier_of_tokens_keeps_every_label(causal) -> None:
    model, x = Tagger(causal).eval(), RAGGED[:2]
    with torch.no_grad():
        y = torch.full(x.shape, NO_LABEL)
        for row, ids in enumerate(x):
            own = ids[ids != NO_TOKEN]
            y[row, : len(own)] = model(own[None])[0].argmax(-1)
    y[0, 1] = NO_LABEL
    chain = capture(model, x[:1, :4])
    assert type(chain) is TokenLabelChain and torch.equal(chain(x[:1, :4]), model(x[:1, :4]))
    for threat in (EmbeddingBall(), EmbeddingBall(tokens=(0,))):
        found = certify(model, x, y, threat, "dual")
        assert (found.radius > 0).all() and found.label.tolist() == found.prediction.tolist() == [3, 2]
        # The smallest over its tokens, each read by itself.
        for row, ids in enumerate(x):
            own = ids[ids != NO_TOKEN][None]
            alone, program = [], capture(model, own)
            for t in range(own.shape[1]):
                if y[row, t] != NO_LABEL:
                    one = OneTokenChain(OrderedDict(program.named_children()), t)
                    alone.append(certify(one, own, y[row, t : t + 1], threat, "dual").radius[0])
            assert found.radius[row] == pytest.approx(min(alone), rel=1e-3) and len(set(alone)) > 1
        if threat.tokens:
            continue
        attacked = MinimumRadius(steps=2, descent=8)(model, x, y, threat)
        assert (found.radius <= attacked.radius).all() and np.isfinite(attacked.radius).all() and attacked.success.all()
        for row, ids in enumerate(x):  # a labelled token changes there
            own = len(ids[ids != NO_TOKEN])
            point = attacked.adversarial[row : row + 1, :own]
            with torch.no_grad():
                there, moved = model(inputs_embeds=point)[0].argmax(-1), (point - model.words(ids[:own])[None]).norm(dim=-1).max()
            wrong = (there != y[row, :own]) & (y[row, :own] != NO_LABEL)
            assert int((~wrong & (y[row, :own] != NO_LABEL)).sum()) == attacked.adversarial_prediction[row] < attacked.label[row]
            assert float(moved) == pytest.approx(attacked.distance[row], rel=1e-4)
    y[1, 1] = (y[1, 1] + 1) % 3
    found, attacked = certify(model, x, y, EmbeddingBall(), "local"), by_name("pgd", steps=2)(model, x, y, EmbeddingBall(1e-6))
    assert found.status == ("certified", "misclassified") and found.prediction[1] == 1 and found.radius[1] == 0
    assert attacked.status == ("withstood", "misclassified") and attacked.radius[1] == 0
    lists = [[1, 2, 3], [4, 5]]
    assert as_samples(lists, [[0, 1, 2], [1, NO_LABEL]])[1].tolist() == [[0, 1, 2], [1, NO_LABEL, NO_LABEL]]
    for labels in (torch.zeros(2).long(), torch.full(x.shape, NO_LABEL), y.masked_fill(y == NO_LABEL, 0), y.masked_fill(y == 1, 3)):
        with pytest.raises(BadInput):
            certify(model, x, labels, EmbeddingBall())
        with pytest.raises(BadInput):
            by_name("pgd", steps=1)(model, x, labels, EmbeddingBall(0.1))


def test_every_position_of_a_model_of_the_next_token() -> None:
    chain = NextTokenChain(OrderedDict(capture(Tagger(True).eval(), RAGGED[:1]).named_children()))
    x = RAGGED[:1]
    with torch.no_grad():
        y = chain(x).argmax(-1)
    found = certify(chain, x, y, EmbeddingBall(), "local")
    assert found.label[0] == 4 and 0 < found.radius[0] <= certify(chain, x, y[:, -1], EmbeddingBall(), "local").radius[0]
    assert chain.position == -1


WORDS = "-DOCSTART- -X- O O\n\nthe DT LABEL_0\ncat NN LABEL_1\n\nthe DT 0\ndog NN 2\nsat VB LABEL_0\non IN 1\nmat NN 1\n"


def test_words_and_their_labels_are_read(tmp_path, folders) -> None:
    path = tmp_path / "t.conll"
    path.write_text(WORDS)
    words = load(f"hf:{folders['bert']}").vocabulary
    data = load_data(str(path), vocabulary=words)
    assert data.y.shape == data.x.shape == (2, int(lengths(data.x).max())) and data.classes == 3
    for row, (text, tags) in enumerate(((("the", "cat"), (0, 1)), (("the", "dog", "sat", "on", "mat"), (0, 2, 0, 1, 1)))):
        ids, labels = [0], [NO_LABEL]
        for word, tag in zip(text, tags, strict=True):
            own = words.encode(word).tolist()
            ids, labels = ids + own, labels + [tag] + [NO_LABEL] * (len(own) - 1)
        rest = data.x.shape[1] - len(ids) - 1
        assert data.x[row].tolist() == [*ids, 2, *[NO_TOKEN] * rest] and data.y[row].tolist() == [*labels, NO_LABEL, *[NO_LABEL] * rest]
    assert (load_data(str(path), vocabulary=words, context=5).y != NO_LABEL).sum(1).min() >= 1
    assert row_hashes(data.x, data.y)[0] == row_hashes(data.x[:1, : lengths(data.x)[0]], data.y[:1, : lengths(data.x)[0]])[0]
    assert row_hashes(data.x, data.y)[0] != row_hashes(data.x, torch.where(data.y == 0, 2, data.y))[0]
    wrong = {"the LABEL_7": "among the model's classes", "the": "in line 1", "\n\n": "at least one sentence", "the 5": r"\[0, 2\]"}
    for content, message in wrong.items():
        path.write_text(content)
        with pytest.raises(BadInput, match=message):
            load_data(str(path), vocabulary=words)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2-classifier", "llama-classifier"])
def test_classifiers_by_the_last_token(kind, tmp_path) -> None:
    model, ids = load(f"hf:{saved(kind, tmp_path, marks=True)}"), joined([torch.tensor(row) for row in ([0, 5, 6, 7, 2], [9, 8, 2])])
    y = right(model, ids)
    for name in ("embedding-l2", "embedding-l2@-1"):
        found = certify(model, ids, y, name, "dual")
        assert (found.radius > 0).all() and (found.radius <= MinimumRadius(steps=2, descent=8)(model, ids, y, name).radius).all()


@pytest.mark.slow
def test_the_verbs_take_words_with_labels(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"hf:{saved('bert-tokens', tmp_path / 'model', marks=True)}"
    model, path = load(name), Path("t.conll")
    path.write_text(WORDS)
    data = load_data(str(path), vocabulary=model.vocabulary)
    lines: list[str] = []
    for row, (ids, labels) in enumerate(zip(data.x, data.y, strict=True)):
        own = ids[ids != NO_TOKEN]
        with torch.no_grad():
            found = model(own[None])[0].argmax(-1)[labels[: len(own)] != NO_LABEL].tolist()
        texts = ("the cat", "the dog sat on mat")[row].split()
        lines += [f"{word}\tLABEL_{tag}" for word, tag in zip(texts, found, strict=True)] + [""]
    path.write_text("\n".join(lines))
    base = ("--data", path, "--device", "cpu", "--threat", "embedding-l2@0")
    assert run("certify", name, *base, "--method", "local", "--json", "c.json") == 0
    told = json.loads(Path("c.json").read_text())["samples"]
    assert [(s["status"], s["label"], s["prediction"]) for s in told] == [("certified", 2, 2), ("certified", 5, 5)]
    assert run("verify", "c.json", "--model", name, "--device", "cpu") == 0
    Path("policy.toml").write_text(
        'data = "t.conll"\ndtype = "float32"\nmin_samples = 2\nmin_clean_accuracy = 1.0\nmethods = ["local"]\nrequire_attack = true\nattack = "pgd"\n'
        '[[threat]]\nname = "embedding-l2@0"\nradius = 1e-6\nmin_certified_accuracy = 1.0\nmethod = "local"\n'
    )
    assert run("gate", name, "--policy", "policy.toml", "--device", "cpu") == 0
    assert run("attack", name, *base, "--attack", "pgd", "--radius", "0.01") == 0
