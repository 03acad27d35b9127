"""Any nn.Module can be attacked: scripted, compiled, wrapped, hooked, with outputs of other libraries. Models that cannot be certified get a row."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from robustlip.attacks import PGD, MinimumRadius, TorchAttack, WeightAttack, observed_sensitivity
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import NextTokenChain
from robustlip.target import Target, inner, logits_of
from robustlip.threats import EmbeddingBall, InputBall, WeightBall

N, CLASSES = 6, 4
QUICK = PGD(steps=10, restarts=2)
L2 = InputBall("l2", 1.2)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, CLASSES)).eval()


class Own(nn.Module):
    """A forward of its own, and an answer of another kind."""

    def __init__(self, answer=lambda z, x: z) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.body, self.answer = plain(), answer

    def forward(self, x: torch.Tensor) -> object:
        return self.answer(self.body(x * 1.0), x)


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return 0.5 * x

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return 0.5 * grad


class Custom(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * Half.apply(x)


class Bare(nn.Module):
    """No parameter, no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [p.detach() for p in plain().parameters()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, b, v, c = (p.to(x.dtype) for p in self.weights)
        return torch.relu(x.flatten(1) @ w.T + b) @ v.T + c


def hooked() -> nn.Module:
    model = plain()
    model[1].register_forward_hook(lambda module, args, output: output * 1.0)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 0.0,))
    return model


def compiled_in_place() -> nn.Module:
    model = plain()
    model.compile(backend="eager")
    return model


def parametrized() -> nn.Module:
    model = plain()
    parametrizations.weight_norm(model[1])
    return model


def instance_forward() -> nn.Module:
    model = plain()
    original = model.forward
    model.forward = lambda x: original(x)  # type: ignore[method-assign]
    return model


Answer = namedtuple("Answer", "logits features")
SAME = {  # all answer as plain() does
    "own forward": Own,
    "output with logits": lambda: Own(lambda z, x: SimpleNamespace(logits=z, loss=None)),
    "dictionary": lambda: Own(lambda z, x: {"logits": z, "features": z * 0}),
    "tuple": lambda: Own(lambda z, x: (z, x, None)),
    "list": lambda: Own(lambda z, x: [z]),
    "named tuple": lambda: Own(lambda z, x: Answer(z, z * 0)),
    "DataParallel": lambda: nn.DataParallel(plain()),
    "torch.compile": lambda: torch.compile(plain(), backend="eager"),
    "Module.compile": compiled_in_place,
    "scripted": lambda: torch.jit.script(plain()),
    "traced": lambda: torch.jit.trace(plain(), torch.rand(2, 1, 3, 3)),
    "frozen script": lambda: torch.jit.freeze(torch.jit.script(plain())),
    "hooks": hooked,
    "parametrization": parametrized,
    "forward of the object": instance_forward,
    "custom autograd": lambda: nn.Sequential(Custom(), *plain()).eval(),
    "no parameters": Bare,
    "frozen weights": lambda: plain().requires_grad_(False),
    "in place": lambda: nn.Sequential(nn.Flatten(), nn.Hardtanh(-9, 9, inplace=True), *plain()[1:]).eval(),
}


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(N, 1, 3, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    with torch.no_grad():
        return x, plain()(x).argmax(1)


@pytest.mark.parametrize("kind", SAME)
def test_the_same_program_in_any_form_is_attacked_in_the_same_way(kind: str) -> None:
    model = SAME[kind]()
    x, y = samples()
    expected, seen = QUICK(plain(), x, y, L2), QUICK(model, x, y, L2)
    assert expected.success.any()
    assert seen.success.tolist() == expected.success.tolist() and seen.prediction.tolist() == expected.prediction.tolist()
    np.testing.assert_allclose(seen.distance, expected.distance, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        found = Target(model).scores(seen.adversarial).argmax(1)
    assert found.tolist() == seen.adversarial_prediction.tolist()


@pytest.mark.parametrize("kind", SAME)
def test_the_smallest_radius_and_the_sensitivity_of_any_module(kind: str) -> None:
    model = SAME[kind]()
    x, y = samples()
    quick = MinimumRadius(PGD(steps=5, restarts=1), steps=3, descent=20)
    np.testing.assert_allclose(quick(model, x[:3], y[:3], InputBall("l2")).radius, quick(plain(), x[:3], y[:3], InputBall("l2")).radius, rtol=0.05)
    expected = observed_sensitivity(plain(), x[:3], InputBall("l2"), starts=1, power_steps=5).ratio
    if kind in ("parametrization", "frozen script", "forward of the object"):  # not all of these can be copied or cast
        try:
            got = observed_sensitivity(model, x[:3], InputBall("l2"), starts=1, power_steps=5).ratio
        except BadInput:
            return
    else:
        got = observed_sensitivity(model, x[:3], InputBall("l2"), starts=1, power_steps=5).ratio
    np.testing.assert_allclose(got, expected, rtol=1e-3)


@pytest.mark.parametrize("kind", [k for k in SAME if k not in ("scripted", "traced", "frozen script", "parametrization", "no parameters")])
def test_weights_of_any_module(kind: str) -> None:
    x, y = samples()
    threat = WeightBall(radius=0.3)
    seen, expected = WeightAttack(steps=10)(SAME[kind](), x, y, threat), WeightAttack(steps=10)(plain(), x, y, threat)
    assert expected.success.any() and seen.success.tolist() == expected.success.tolist()
    names = dict(SAME[kind]().named_parameters())
    assert set(seen.adversarial) <= set(names) and len(seen.adversarial) == 2


@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_weights_that_cannot_be_exchanged_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedLayer, match="scripted or traced"):
        WeightAttack()(SAME[kind](), *samples(), WeightBall(radius=0.1))


def test_torchattacks_takes_any_module() -> None:
    pytest.importorskip("torchattacks")
    x = torch.rand(N, 1, 3, 3)
    with torch.no_grad():
        y = plain()(x).argmax(1)
    seen, expected = (TorchAttack("PGD", steps=5)(m, x, y, InputBall("linf", 0.7, (0.0, 1.0))) for m in (Own(lambda z, x: {"logits": z}), plain()))
    assert seen.distance.tolist() == expected.distance.tolist() and (seen.distance > 0).all()


def test_a_forward_that_looks_at_values_is_run_row_by_row() -> None:
    class Looks(Own):
        def forward(self, x: torch.Tensor) -> object:
            return super().forward(x if float(x.sum()) > 0 else -x)

    x, y = samples()
    assert WeightAttack(steps=10)(Looks(), x, y, WeightBall(radius=0.3)).success.any()


# ---- answers that are none


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda z, x: (z, z), "tuple with 2 matrices"),
        (lambda z, x: {"scores": z}, "a dictionary of scores"),
        (lambda z, x: "logits", "got str"),
        (lambda z, x: z.argmax(1), "floating-point numbers"),
        (lambda z, x: z[:, 0].sigmoid(), "may be probabilities"),
        (lambda z, x: z[:, :1].sigmoid(), "may be probabilities"),
        (lambda z, x: z[:, None].expand(-1, 3, -1), "scores per token"),
        (lambda z, x: z[:1], r"expected logits \(6, C\)"),
        (lambda z, x: z.detach(), "gradient"),
    ],
)
def test_answers_without_plain_logits_are_refused(answer, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadInput, match=message):
        QUICK(Own(answer), *samples(), L2)


def test_what_is_no_module_or_has_no_values_is_refused() -> None:
    x, y = samples()
    with pytest.raises(BadInput, match=r"nn\.Module, got function"):
        QUICK(lambda x: x, x, y, L2)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="meta device"):
        QUICK(plain().to("meta"), x, y, L2)
    with pytest.raises(BadInput, match="lazy"):
        QUICK(nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES)), x, y, L2)
    with torch.inference_mode():
        made = plain()
    with pytest.raises(BadInput, match="inference_mode"):
        QUICK(made, x, y, L2)


def test_a_random_model_is_refused() -> None:
    with pytest.raises(BadInput, match="same logits for the same inputs"):
        QUICK(Own(lambda z, x: nn.functional.dropout(z, 0.5, training=True)), *samples(), L2)


# ---- language models


class Causal(nn.Module):
    """What a causal language model of Hugging Face looks like from outside."""

    def __init__(self, honest: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.honest, self.config = honest, SimpleNamespace(pad_token_id=0)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None) -> object:
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.table(input_ids) * (1.0 if self.honest else 2.0)
        return SimpleNamespace(logits=self.head(torch.tanh(inputs_embeds.cumsum(1))))


class TinyForCausalLM(Causal):
    pass


class Stated(Causal):
    task = "next-token"


@pytest.mark.parametrize("kind", [TinyForCausalLM, Stated])
@pytest.mark.parametrize("threat", [EmbeddingBall(2.0), EmbeddingBall(2.0, (-1,)), WeightBall(radius=0.5)], ids=lambda t: t.name)
def test_causal_models_by_their_last_position(kind, threat) -> None:  # type: ignore[no-untyped-def]
    model, x = kind(), torch.randint(1, 11, (N, 5))
    with torch.no_grad():
        y = model(x).logits[:, -1].argmax(1)
    seen = QUICK(model, x, y, threat)
    assert (seen.prediction == y.numpy()).all() and seen.success.any()
    if isinstance(threat, EmbeddingBall):
        with torch.no_grad():
            judged = model(inputs_embeds=seen.adversarial).logits[:, -1].argmax(1)
        assert judged.tolist() == seen.adversarial_prediction.tolist()


def test_padding_other_tasks_and_embeddings_that_are_not_the_models_are_refused() -> None:
    x = torch.randint(1, 11, (N, 5))
    y = torch.zeros(N, dtype=torch.int64)
    with pytest.raises(BadInput, match="scores per token"):
        QUICK(Causal(), x, y, EmbeddingBall(0.1))
    with pytest.raises(BadInput, match="without padding"):
        QUICK(Stated(), x * 0, y, EmbeddingBall(0.1))
    with pytest.raises(BadInput, match="computes the same logits from its embeddings"):
        QUICK(Stated(honest=False), x, y, EmbeddingBall(0.1))
    with pytest.raises(BadInput, match="model with an embedding"):
        QUICK(Own(), *samples(), EmbeddingBall(0.1))


def test_a_chain_whose_hook_comes_between_its_embedding_and_the_rest_is_not_attacked_there() -> None:
    torch.manual_seed(0)
    model = NextTokenChain(nn.Embedding(11, 8), nn.Linear(8, 11))
    model.register_forward_hook(lambda module, args, output: output.flip(-1))
    x = torch.randint(11, (N, 5))
    with pytest.raises(BadInput, match="computes the same logits from its embeddings"):
        QUICK(model, x, torch.zeros(N, dtype=torch.int64), EmbeddingBall(0.1))


def test_wrappers_are_looked_through() -> None:
    model = plain()
    assert inner(torch.compile(nn.DataParallel(model), backend="eager")) is model
    z = torch.zeros(3, 2)
    assert logits_of((z, torch.zeros(5)), 3) is z


# ---- samples that change each other


class Centred(nn.Module):
    """Takes half of the batch's mean off, without being a batch norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - 0.5 * x.mean(0, keepdim=True)


MIXING = {
    "BatchNorm2d": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES)
    ),
    "frozen script of it": lambda: torch.jit.script(MIXING["BatchNorm2d"]()),
    "a layer of one's own": lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, CLASSES), Centred()),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXING)
def test_answers_do_not_depend_on_the_batch(kind: str) -> None:
    torch.manual_seed(1)
    model = MIXING[kind]().eval()
    x, _ = samples()
    with torch.no_grad():
        alone = torch.cat([model(x[i : i + 1]) for i in range(N)]).argmax(1)
    seen = QUICK(model, x, alone, L2)
    assert seen.prediction.tolist() == alone.tolist()
    one = [QUICK(model, x[i : i + 1], alone[i : i + 1], L2) for i in range(N)]
    with torch.no_grad():
        for i in range(N):
            assert int(model(seen.adversarial[i : i + 1]).argmax(1)) == seen.adversarial_prediction[i]
            assert int(model(one[i].adversarial).argmax(1)) == one[i].adversarial_prediction[0]
    assert [bool(o.success[0]) for o in one] == seen.success.tolist()


def test_a_batch_norm_that_needs_a_batch_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, CLASSES), nn.BatchNorm1d(CLASSES, track_running_stats=False))
    with pytest.raises(BadInput, match="Expected more than 1 value per channel"):
        QUICK(model, *samples(), L2)


# ---- inputs that the model's dtype cannot hold


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_float64_inputs_of_a_float32_model_count_from_the_given_point(norm: str) -> None:
    x, y = samples()
    given = x.double() + 1e-9 * torch.rand(x.shape, dtype=torch.float64)
    radius = {"l1": 4.0, "l2": 1.2, "linf": 0.5}[norm]
    seen = QUICK(plain(), given, y, InputBall(norm, radius))
    order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
    change = np.linalg.norm((seen.adversarial.double() - given).flatten(1).numpy(), order, axis=1)
    broken = seen.success & (seen.prediction == y.numpy())
    assert broken.any() and seen.adversarial.dtype == torch.float32
    np.testing.assert_allclose(seen.distance[broken], change[broken], rtol=1e-12)
    assert (seen.distance <= radius).all()
    with pytest.raises(BadInput, match="far below the radius"):
        QUICK(plain().bfloat16(), x, y, InputBall(norm, 1e-3))


# ---- samples as users have them


def test_every_form_of_samples_is_the_same_attack_and_certificate() -> None:
    import pandas as pd
    from torch.utils.data import DataLoader, TensorDataset

    from robustlip import certify
    from robustlip.samples import as_samples

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(7, 4)
    y = model(x).argmax(1)
    pairs = TensorDataset(x, y)
    loader = DataLoader(pairs, batch_size=3)
    forms = {
        "numpy": (x.numpy(), y.numpy()), "lists": (x.tolist(), y.tolist()), "uint8 labels": (x, y.numpy().astype("uint8")),
        "pandas": (pd.DataFrame(x.numpy()), pd.Series(y.numpy())), "rows of arrays": (list(x.numpy()), tuple(y.tolist())),
        "column of rows": (pd.Series(list(x.numpy())), y), "list of tensors": (list(x), list(y)), "loader": (loader, None), "dataset": (pairs, None),
    }  # fmt: skip
    expected, radius = QUICK(model, x, y, L2), certify(model, x, y, InputBall("l2"), "global").radius
    for form, (inputs, labels) in forms.items():
        seen = QUICK(model, inputs, labels, L2)
        np.testing.assert_allclose(seen.distance, expected.distance, rtol=1e-6, err_msg=form)
        np.testing.assert_allclose(certify(model, inputs, labels, "l2", "global").radius, radius, rtol=1e-6, err_msg=form)
    assert certify(model, loader, "l2", method="global").radius.tolist() == radius.tolist()
    assert QUICK(model, loader, L2).distance.tolist() == expected.distance.tolist()

    generator = torch.Generator().manual_seed(5)
    shuffled = DataLoader(pairs, batch_size=3, shuffle=True, generator=generator)
    before, everywhere = generator.get_state(), torch.get_rng_state()
    first, _ = as_samples(shuffled)
    assert torch.equal(generator.get_state(), before) and torch.equal(torch.get_rng_state(), everywhere)
    assert torch.equal(first, torch.cat([batch for batch, _ in shuffled])) and not torch.equal(first, x)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((2, 4), "uint8"), [0, 1], "scale images"),
        (np.zeros((2, 4), bool), [0, 1], "got torch.bool"),
        (np.zeros((2, 4), complex), [0, 1], "complex128"),
        ([[0.0, 1.0], [0.0]], [0, 1], "rows of one shape"),
        (np.array([[0.0, "a"]] * 2, dtype=object), [0, 1], "rows of one shape|array of"),
        (["a text", "another"], [0, 1], "array of <U"),
        ("a text", [0, 1], "got str"),
        (np.ma.masked_array(np.zeros((2, 4)), np.eye(2, 4)), [0, 1], "masked"),
        (torch.zeros(2, 4).to_sparse(), [0, 1], "sparse"),
        (np.zeros(2), [0, 1], "add the batch dimension"),
        (np.zeros((0, 4)), [], "at least one sample"),
        ([torch.zeros(4), torch.zeros(3)], [0, 1], "one shape and dtype"),
        (np.zeros((2, 4)), [0.0, 1.0], "labels as an integer tensor"),
        (np.zeros((2, 4)), [True, False], "labels as an integer tensor"),
        (np.zeros((2, 4)), [[1, 0], [0, 1]], r"argmax\(1\)"),
        (np.zeros((2, 4)), ["cat", "dog"], "labels as an integer tensor"),
        (np.zeros((2, 4)), [0, 1, 2], "labels as an integer tensor"),
        (np.zeros((2, 4)), np.array([0, 2**63], "uint64"), "int64 can hold"),
        (np.zeros((2, 4)), None, "expected labels"),
    ],
)
def test_samples_that_could_mean_something_else_are_refused(x: object, y: object, message: str) -> None:
    from robustlip import certify

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    for call in (QUICK, certify):
        with pytest.raises(BadInput, match=message):
            call(model, x, y, L2)
    with pytest.raises(BadInput, match="or its name"):
        certify(model, torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), 0.3)  # type: ignore[arg-type]


# ---- rows of tables, gates and the command line


@pytest.fixture
def foreign(tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    """A module on the path: a class, a function and an instance."""
    (tmp_path / "foreign_models.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Scaled(nn.Module):\n    def __init__(self):\n        super().__init__()\n        torch.manual_seed(0)\n"
        "        self.body = nn.Linear(64, 10)\n\n    def forward(self, x):\n"
        "        return {'logits': self.body(x.flatten(1).cumsum(1))}\n\n\n"
        "def make():\n    return Scaled()\n\n\ninstance = Scaled()\nno_rule = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.RReLU())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["foreign_models:Scaled", "foreign_models:make", "foreign_models:instance"])
def test_a_callable_may_return_any_module_and_an_instance_is_one(name: str, foreign) -> None:  # type: ignore[no-untyped-def]
    from robustlip import load

    model = load(name)
    assert type(model).__name__ == "Scaled" and not model.training and model(torch.rand(2, 1, 8, 8))["logits"].shape == (2, 10)


SUITE = """
name = "foreign"
[[pair]]
name = "digits"
data = "digits:test"
limit = 12
lipschitz = "foreign_models:instance"
baseline = "foreign_models:no_rule"
[[pair.threat]]
name = "l2"
radii = [0.1, 0.5]
attacks = [{ name = "pgd", options = { steps = 5, restarts = 1 } }]
[[pair.threat]]
name = "weights-spectral"
sensitivity_radius = 0.01
"""


def test_what_cannot_be_certified_is_a_row_with_its_reason(foreign, capsys) -> None:  # type: ignore[no-untyped-def]
    import json

    from robustlip.cli import main

    (foreign / "suite.toml").write_text(SUITE)
    with pytest.raises(SystemExit) as ended:
        main(["eval", "suite.toml", "--out", "run", "--json", "out.json", "--device", "cpu"])
    assert ended.value.code == 0
    rows = {(row["model"], row["threat"]): row for row in json.loads((foreign / "out.json").read_text())["rows"]}
    assert len(rows) == 4
    for model, reason in (("foreign_models:instance", "cumsum"), ("foreign_models:no_rule", "RReLU")):
        row = rows[model, "l2"]
        assert row["certified_accuracy_1"] == 0 and 0 <= row["attacked_accuracy_2"] <= row["clean_accuracy"] and reason in row["not_certified"]
        assert row["median_attacked_radius"] is None or row["median_attacked_radius"] > 0
    for name in ("run/table.md", "run/report.html", "run/table.tex"):
        text = (foreign / name).read_text()
        assert "certified 0" in text and "RReLU" in text, name
    capsys.readouterr()


POLICY = """
data = "digits:test"
limit = 12
dtype = "float32"
min_samples = 12
min_clean_accuracy = 0.0
require_attack = true
attack = "pgd"
[[threat]]
name = "l2"
radius = 0.1
min_certified_accuracy = {share}
"""


@pytest.mark.parametrize(("share", "code"), [(0.5, 1), (0.0, 0)])
def test_a_gate_fails_with_the_reason(share: float, code: int, foreign, capsys) -> None:  # type: ignore[no-untyped-def]
    from robustlip.cli import main

    (foreign / "policy.toml").write_text(POLICY.format(share=share))
    with pytest.raises(SystemExit) as ended:
        main(["gate", "foreign_models:instance", "--policy", "policy.toml", "--device", "cpu"])
    assert ended.value.code == code
    if code:
        assert "cumsum" in capsys.readouterr().err


def test_verbs_that_need_a_forward_only_take_any_module(foreign, capsys) -> None:  # type: ignore[no-untyped-def]
    from robustlip.cli import main

    common = ["--data", "digits:test", "--limit", "4", "--device", "cpu"]
    for arguments in (
        ["attack", "foreign_models:make", *common, "--attack", "pgd", "--radius", "0.5"],
        ["smooth", "foreign_models:make", *common, "--sigma", "0.25", "--samples", "50", "--selection", "10"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0, arguments
    capsys.readouterr()
    for model in ("foreign_models:make", "foreign_models:no_rule"):
        with pytest.raises(SystemExit) as ended:
            main(["certify", model, *common])
        assert ended.value.code == 2
        assert "can still be attacked" in capsys.readouterr().err


def test_the_bound_of_weights_and_the_audit_take_samples_in_every_form() -> None:
    import pandas as pd
    from torch.utils.data import DataLoader, TensorDataset

    from robustlip.attacks.audit import audit
    from robustlip.attacks.formulas import stated
    from robustlip.certifiers import weight_sensitivity_bound

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(6, 4)
    threat, claim = WeightBall("spectral", 0.01), stated(model, 100.0)
    wanted = weight_sensitivity_bound(model, x, threat)
    found = audit(model, claim, x, starts=4, ascent_steps=2).found
    pairs = TensorDataset(x, torch.zeros(6, dtype=torch.int64))
    for form in (x.numpy(), x.tolist(), pd.DataFrame(x.numpy()), pairs, DataLoader(pairs, batch_size=4)):
        assert np.allclose(weight_sensitivity_bound(model, form, threat), wanted, rtol=1e-6)
        assert audit(model, claim, form, starts=4, ascent_steps=2).found == pytest.approx(found, rel=1e-6)
    for bad in (x.to(torch.uint8), [["a"]], torch.zeros(0, 4), torch.zeros(4)):
        with pytest.raises(BadInput, match="expected inputs"):
            weight_sensitivity_bound(model, bad, threat)
        with pytest.raises(BadInput, match="expected inputs"):
            audit(model, claim, bad)
    with pytest.raises(BadInput, match="expected a weight threat"):
        weight_sensitivity_bound(model, x, InputBall("l2", 0.1))  # type: ignore[arg-type]
