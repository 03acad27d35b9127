"""Suites, records, runner, tables and report, with tiny models; some tests replace certification and attacks."""

from __future__ import annotations

import base64
import html.parser
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from robustlip.certificates import Certificate
from robustlip.errors import BadInput, CertificateViolation
from robustlip.eval import results, runner, tables
from robustlip.eval.report import page, write_report
from robustlip.eval.results import Record, check_soundness, from_frame, read_records, to_frame, write_records
from robustlip.eval.runner import Settings, read_run, run_suite
from robustlip.eval.suite import bundled, load_suite, parse_suite
from robustlip.files import atomic, json_text
from robustlip.hashing import weights_sha256
from robustlip.layers import as_chain

INF = math.inf


def suite_table(**changes):
    table = {
        "name": "tiny",
        "title": "A <b>tiny</b> suite",
        "pair": [
            {
                "name": "p", "data": "digits:test", "limit": 6, "lipschitz": "good", "baseline": "other",
                "threat": [{"name": "l2", "radii": [0.1, 0.5]}, {"name": "weights-spectral", "sensitivity_radius": 0.01}],
            }
        ],
    }  # fmt: skip
    table.update(changes)
    return table


def record(**changes) -> Record:
    plain = Record(
        suite="tiny", model="good", pair="p", role="lipschitz", data="digits", data_note="", split="test", index=0, label=1, prediction=1,
        threat="l2", norm="l2", units="l2 distance in raw input units", certified_radius=0.2, status="certified", attacked_radius=0.4, attack="min",
    )  # fmt: skip
    return replace(plain, **changes)


# ---- suites


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.update(colour="red"), ["'colour'", "remove"]),
        (lambda t: t["pair"][0].update(limitt=3), ["'limitt'", "pair[0].limitt"]),
        (lambda t: t["pair"][0]["threat"][0].update(radii=[0.1, -0.5]), ["above 0", "-0.5"]),
        (lambda t: t["pair"][0]["threat"][0].update(radii=[0.5, 0.1]), ["ascending"]),
        (lambda t: t["pair"][0]["threat"][0].update(radii=[]), ["at least one table radius"]),
        (lambda t: t["pair"][0]["threat"][0].update(radii=["wide"]), ["radii", "'wide'"]),
        (lambda t: t["pair"][0]["threat"][0].update(name="l7"), ["threat", "'l7'"]),
        (lambda t: t["pair"][0]["threat"][0].update(attacks=[{"name": "hope"}]), ["attack", "'hope'"]),
        (lambda t: t["pair"][0]["threat"][0].update(attacks=[{"name": "pgd", "options": {"stepz": 3}}]), ["stepz"]),
        (lambda t: t["pair"][0]["threat"][1].pop("sensitivity_radius"), ["sensitivity_radius", "none"]),
        (lambda t: t["pair"][0].pop("data"), ["'data'", "add it"]),
        (lambda t: t["pair"][0].update(baseline="good"), ["each model once"]),
        (lambda t: t.pop("pair"), ["'pair'"]),
    ],
)
def test_a_bad_suite_is_refused_in_one_sentence(edit, words):
    table = suite_table()
    edit(table)
    with pytest.raises(BadInput) as caught:
        parse_suite(table, "my.toml")
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_suite_file_that_is_missing_or_broken(tmp_path):
    with pytest.raises(BadInput, match="demo"):
        load_suite("nowhere")
    (tmp_path / "broken.toml").write_text("name = [")
    with pytest.raises(BadInput, match=r"broken\.toml"):
        load_suite(tmp_path / "broken.toml")


def test_the_bundled_demo_has_three_pairs_and_two_radii_or_more():
    assert "demo" in bundled()
    demo = load_suite("demo")
    assert len(demo.pairs) == 3
    assert all(len(pair.members()) == 2 for pair in demo.pairs)
    assert all(len(threat.radii) >= 2 or threat.sensitivity_radius for pair in demo.pairs for threat in pair.threats)
    assert parse_suite(demo.to_json_dict()) == demo


# ---- records


def test_records_come_back_from_parquet_as_they_were(tmp_path):
    rows = [
        record(),
        record(index=1, certified_radius=0.0, attacked_radius=INF, attack_seed=7),
        record(index=2, certified_radius=None, attacked_radius=None),
    ]
    write_records(tmp_path / "a.parquet", rows, {"key": [1]})
    assert read_records(tmp_path / "a.parquet") == rows
    assert results.read_metadata(tmp_path / "a.parquet") == {"key": [1]}
    assert from_frame(to_frame(rows)) == rows
    assert list(tmp_path.iterdir()) == [tmp_path / "a.parquet"]


def test_nan_is_never_written_as_not_measured(tmp_path):
    with pytest.raises(CertificateViolation, match="NaN"):
        write_records(tmp_path / "a.parquet", [record(certified_radius=math.nan)], {})
    assert not list(tmp_path.iterdir())


def test_a_truncated_part_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    write_records(path, [record()], {})
    path.write_bytes(path.read_bytes()[:100])
    assert results.read_metadata(path) is None
    with pytest.raises(BadInput, match="delete"):
        read_records(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("certified", "attacked"), [(0.4, 0.4), (0.0, 0.0), (INF, INF), (0.1, INF), (None, 0.1), (0.3, None)])
def test_records_that_agree(certified, attacked):
    check_soundness([record(certified_radius=certified, attacked_radius=attacked)])


@pytest.mark.parametrize(("certified", "attacked"), [(np.nextafter(0.4, 1), 0.4), (1e-300, 0.0), (INF, 3.0), (math.nan, 0.1), (0.1, math.nan)])
def test_a_contradiction_however_small_is_raised(certified, attacked):
    bad = record(index=17, certified_radius=float(certified), attacked_radius=attacked, adversarial="contradictions/x.safetensors")
    with pytest.raises(CertificateViolation) as caught:
        check_soundness([record(), bad], Path("runs/a"))
    for word in ("sample 17", repr(float(certified)), repr(attacked), "runs/a/contradictions/x.safetensors"):
        assert word in str(caught.value)
    assert caught.value.exit_code == 3


def test_logits_that_moved_more_than_certified_are_a_contradiction():
    fine = record(certified_radius=None, attacked_radius=None, certified_change=2.0, observed_change=2.0)
    check_soundness([fine])
    with pytest.raises(CertificateViolation, match=r"2\.0000001"):
        check_soundness([replace(fine, observed_change=2.0000001)])


def test_json_is_valid_for_every_parser():
    text = json_text({"a": INF, "b": -INF, "c": math.nan, "d": np.float32(0.5), "e": "Infinity"})
    assert "Infinity" not in text.replace('"Infinity"', "")
    assert json.loads(text) == {"a": INF, "b": -INF, "c": None, "d": 0.5, "e": "Infinity"}


# ---- tables


def hand_made():
    """Five samples: one misclassified, one never broken, one without a certificate."""
    suite = parse_suite(suite_table(pair=[suite_table()["pair"][0] | {"baseline": None}]))
    radii = [(0.2, 0.4), (0.6, 0.8), (0.0, 0.05), (0.3, INF)]
    rows = [record(index=i, certified_radius=c, attacked_radius=a) for i, (c, a) in enumerate(radii)]
    rows.append(record(index=4, prediction=2, certified_radius=0.0, attacked_radius=0.0, status="misclassified"))
    rows += [
        record(
            index=i,
            threat="weights-spectral",
            certified_radius=None,
            attacked_radius=None,
            certified_sensitivity=10.0 * i,
            observed_sensitivity=1.0 * i,
        )
        for i in range(3)
    ]
    return suite, rows


def test_the_table_against_numbers_worked_out_by_hand():
    suite, rows = hand_made()
    summary = tables.summarise(rows, suite)
    assert list(summary["threat"]) == ["l2", "weights-spectral"]
    l2, weights = summary.to_dict("records")
    assert (l2["samples"], l2["correct"], l2["clean_accuracy"]) == (5, 4, 0.8)
    # radius 0.1: certified 0.2, 0.6, 0.3; broken at 0.05; radius 0.5: certified 0.6; not broken at or below: 0.8 and inf
    assert (l2["certified_accuracy_1"], l2["attacked_accuracy_1"]) == (0.6, 0.6)
    assert (l2["certified_accuracy_2"], l2["attacked_accuracy_2"]) == (0.2, 0.4)
    assert l2["median_certified_radius"] == pytest.approx(0.25)  # of 0, 0.2, 0.3, 0.6
    assert l2["median_attacked_radius"] == pytest.approx(0.6)  # of 0.05, 0.4, 0.8, inf
    assert l2["median_ratio"] == pytest.approx(0.5)  # of 0.2/0.4, 0.6/0.8, 0/0.05
    assert (weights["certified_sensitivity"], weights["observed_sensitivity"]) == (10.0, 1.0)
    (row,) = tables.compact(summary).to_dict("records")
    assert (row["threat"], row["median_ratio"], row["certified_sensitivity"]) == ("l2", l2["median_ratio"], 10.0)


def test_an_attack_at_the_table_radius_counts_against_attacked_accuracy():
    suite, _ = hand_made()
    summary = tables.summarise([record(certified_radius=0.1, attacked_radius=0.1)], suite)
    assert (summary["certified_accuracy_1"][0], summary["attacked_accuracy_1"][0]) == (1.0, 0.0)


def test_a_sample_that_is_not_finite_is_not_counted_as_robust():
    suite, _ = hand_made()
    rows = [record(attacked_radius=INF), record(index=1, attacked_radius=INF, failure="expected finite logits at the point found, got NaN")]
    summary = tables.summarise(rows, suite)
    assert (summary["attacked_accuracy_1"][0], summary["not_finite"][0]) == (0.5, 1)
    assert any("not finite" in note for note in tables.notes(summary, False))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (INF, "∞"),
        (0.0, "0"),
        (3.21e-14, "3.2e-14"),
        (0.12345, "0.123"),
        (1.5, "1.50"),
        (123.4, "123"),
        (4321.0, "4321"),
        (1e19, "1.0e19"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_numbers_are_printed_sensibly(value, text):
    assert tables.number(value) == text


def test_every_format_shows_the_same_cells():
    suite, rows = hand_made()
    summary = tables.summarise(rows, suite)
    markdown, latex, csv, page_part = (tables.render(summary, form, title="T & U_v") for form in ("md", "latex", "csv", "html"))
    assert "| good | l2 | 5 | 80.0 | 0.1: 60.0 / 60.0 | 0.5: 20.0 / 40.0 | 0.250 | 0.600 | 0.500 | – |" in markdown
    assert r"\toprule" in latex and r"T \& U\_v" in latex and r"\%" in latex
    assert not re.search(r"(?<!\\)[&%$#_](?![^\n]*(\\\\|\\toprule))", latex.split(r"\bottomrule")[1].replace(r"$\leq$", "").replace("{!}{%", ""))
    assert csv.splitlines()[0].startswith("model,pair,role,threat") and ",0.25," in csv
    assert "T &amp; U_v" in page_part and "<td>0.250</td>" in page_part
    assert "PARTIAL" not in markdown and "PARTIAL" in tables.render(summary, "md", partial=True)
    assert max(map(len, tables.terminal(summary, "t").splitlines())) <= 120
    with pytest.raises(BadInput, match="'pdf'"):
        tables.render(summary, "pdf")


def test_latex_is_escaped():
    assert tables.escape_latex(r"a_b & 50% of {x} ~ #1 $ ^ \ <≤>") == (
        r"a\_b \& 50\% of \{x\} \textasciitilde{} \#1 \$ \textasciicircum{} \textbackslash{} \textless{}$\leq$\textgreater{}"
    )
    assert tables._latex_cell("3200 / 3.2e-14") == r"3200 / $3.2\times10^{-14}$"
    assert tables._latex_cell("e5-model_x") == r"e5-model\_x"


def test_a_model_name_cannot_break_the_tables():
    suite, rows = hand_made()
    rows = [replace(r, data_note="<script>alert(1)</script> | 50 %") for r in rows]
    summary = tables.summarise(rows, suite)
    assert "<script>" not in tables.render(summary, "html")
    assert r"50 \%" in tables.render(summary, "latex")


# ---- runs


def tiny(seed: int):
    torch.manual_seed(seed)
    return as_chain(nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval())


@pytest.fixture
def world(monkeypatch):
    """Models, data, certifier and attacks of a small environment; `world.calls` counts certificates, `world.radius` is the certified radius."""
    state = SimpleNamespace(calls=[], radius=0.1, attacked=0.5, models={"good": tiny(1), "other": tiny(2)}, before=lambda model, threat: None)
    x = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def load(name, *, device):
        if isinstance(state.models[name], Exception):
            raise state.models[name]
        return state.models[name]

    def load_data(spec, *, data_dir=None, limit=None, seed=0, context=None, vocabulary=None):
        n = min(limit or 6, 6)
        y = torch.zeros(n, dtype=torch.int64)
        return SimpleNamespace(
            name="tiny", split="test", kind="image", x=x[:n], y=y, index=np.arange(100, 100 + n), classes=3, vocabulary=None, note=""
        )

    def certify(model, x, y, threat, method="best", *, dtype=None, index=None):
        state.before(model, threat)
        state.calls.append(threat.name)
        n = len(x)
        return Certificate(
            threat, "global", "float32", weights_sha256(model), "", np.asarray(index), y.numpy(), y.numpy(), np.full(n, state.radius),
            ("certified",) * n, ("",) * n,
        )  # fmt: skip

    def attack(model, x, y, threat, *, generator, index, weights_sha256=""):
        n = len(x)
        radius = np.full(n, state.attacked)
        return SimpleNamespace(index=np.asarray(index), radius=radius, adversarial=x + 0.25, group=np.arange(n), failure=("",) * n)

    def sensitivity(n, radius):
        return SimpleNamespace(ratio=np.full(n, 2.0), change=np.full(n, 2.0 * radius), distance=np.full(n, radius), witness=torch.zeros(n, 3))

    attack.needs_radius, attack.described, attack.check_threat = False, "min", lambda threat: None
    monkeypatch.setattr("robustlip.models.zoo.load", load)
    monkeypatch.setattr(runner, "_cards", lambda suite: {})
    monkeypatch.setattr("robustlip.data.load_data", load_data)
    monkeypatch.setattr("robustlip.certifiers.certify", certify)
    monkeypatch.setattr("robustlip.certifiers.weight_sensitivity_bound", lambda model, x, threat: np.full(len(x), 5.0 * threat.radius))
    monkeypatch.setattr("robustlip.attacks.by_name", lambda name, **options: attack)
    monkeypatch.setattr("robustlip.attacks.observed_sensitivity", lambda model, x, threat, **options: sensitivity(len(x), threat.radius))
    return state


def test_a_run_is_written_read_again_and_not_repeated(world, tmp_path):
    suite = parse_suite(suite_table())
    run = run_suite(suite, tmp_path / "run")
    run.raise_errors()
    assert not run.partial and len(run.records) == 2 * 2 * 6
    assert world.calls == ["l2", "l2"]
    first = run.records[0]
    assert (first.index, first.certified_radius, first.attacked_radius, first.attack) == (100, 0.1, 0.5, "min")
    assert first.weights_sha256 == weights_sha256(world.models["good"])
    sensitivity = next(r for r in run.records if r.threat == "weights-spectral")
    assert (sensitivity.certified_sensitivity, sensitivity.observed_sensitivity) == (5.0, 2.0)

    again = run_suite(suite, tmp_path / "run")
    assert world.calls == ["l2", "l2"], "finished parts were computed again"
    assert again.records == run.records
    assert read_run(tmp_path / "run").records == run.records


def test_changed_weights_and_changed_settings_are_computed_again(world, tmp_path):
    suite = parse_suite(suite_table())
    run_suite(suite, tmp_path / "run")
    world.models["other"] = tiny(3)
    run = run_suite(suite, tmp_path / "run")
    assert world.calls == ["l2"] * 3
    assert {r.weights_sha256 for r in run.records if r.model == "other"} == {weights_sha256(world.models["other"])}
    run_suite(suite, tmp_path / "run", Settings(seed=5))
    assert world.calls == ["l2"] * 5


def test_a_smaller_limit_is_labelled_partial(world, tmp_path):
    run = run_suite(parse_suite(suite_table()), tmp_path / "run", Settings(limit=2))
    assert run.partial and all(r.partial for r in run.records) and len(run.records) == 2 * 2 * 2
    assert json.loads((tmp_path / "run/manifest.json").read_text())["partial"] is True


def test_a_smaller_limit_does_not_delete_what_is_there(world, tmp_path):
    suite = parse_suite(suite_table())
    run_suite(suite, tmp_path / "run")
    before = (tmp_path / "run/manifest.json").read_bytes()
    with pytest.raises(BadInput, match="expected at least the 6 samples"):
        run_suite(suite, tmp_path / "run", Settings(limit=2))
    assert (tmp_path / "run/manifest.json").read_bytes() == before
    assert len(read_run(tmp_path / "run").records) == 6 * 2 * 2
    calls = len(world.calls)
    run_suite(suite, tmp_path / "run")
    assert len(world.calls) == calls


def test_the_table_names_the_certifier(world, tmp_path):
    from robustlip.eval.tables import render, summarise

    suite = parse_suite(suite_table())
    run = run_suite(suite, tmp_path / "run")
    table = summarise(run.records, suite)
    for form in ("md", "html"):
        text = render(table, form)
        assert "certified by global (float32)" in text and "()" not in text


def test_batches_make_the_same_rows(world, tmp_path):
    suite = parse_suite(suite_table())
    whole, parts = (run_suite(suite, tmp_path / str(size), Settings(batch_size=size)) for size in (256, 4))
    key = [(r.model, r.threat, r.index, r.certified_radius, r.attacked_radius) for r in whole.records]
    assert key == [(r.model, r.threat, r.index, r.certified_radius, r.attacked_radius) for r in parts.records]


def test_a_bad_model_does_not_lose_the_others(world, tmp_path):
    world.models["good"] = BadInput("expected finite weights, got NaN; train again")
    run = run_suite(parse_suite(suite_table()), tmp_path / "run")
    assert {r.model for r in run.records} == {"other"} and run.partial
    assert "finite weights" in page(run, [])
    with pytest.raises(BadInput, match="finite weights"):
        run.raise_errors()


def test_an_interrupted_run_keeps_what_is_done_and_goes_on(world, tmp_path):
    suite = parse_suite(suite_table())

    def stop(model, threat):
        if model is world.models["other"]:
            raise KeyboardInterrupt

    world.before = stop
    run = run_suite(suite, tmp_path / "run")
    assert run.interrupted and run.partial and len(run.manifest["missing"]) == 2
    assert read_run(tmp_path / "run").partial
    world.before = lambda model, threat: None
    assert not run_suite(suite, tmp_path / "run").partial
    assert world.calls == ["l2", "l2"]


def test_a_contradiction_is_raised_after_its_point_and_everything_else_are_saved(world, tmp_path):
    from safetensors.torch import load_file

    world.radius = 1e6
    run = run_suite(parse_suite(suite_table()), tmp_path / "run")
    assert len(run.records) == 2 * 2 * 6, "the other parts were lost"
    with pytest.raises(CertificateViolation) as caught:
        run.raise_errors()
    message = str(caught.value)
    assert "1000000.0" in message and "0.5" in message and "sample 100" in message
    saved = re.search(r"is in (\S+\.safetensors)", message)
    assert saved and Path(saved[1]).is_file()
    point = load_file(saved[1])
    assert torch.allclose(point["adversarial"] - point["clean"], torch.tensor(0.25))
    # Reading it again, or going on with it, does not forget it.
    with pytest.raises(CertificateViolation):
        check_soundness(read_run(tmp_path / "run").records, tmp_path / "run")
    with pytest.raises(CertificateViolation):
        run_suite(parse_suite(suite_table()), tmp_path / "run").raise_errors()
    assert "CONTRADICTION" in page(run, [])


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(BadInput, match="manifest"):
        read_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="--out"):
        run_suite(parse_suite(suite_table()), tmp_path / "file" / "run")


# ---- the page


class Strict(html.parser.HTMLParser):
    """Complains about tags that do not match, and collects what a browser would load."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.images = [], [], 0

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "poster", "data"):
                self.loads.append(value)
        self.images += tag == "img"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"unexpected </{tag}>"


def test_the_report_is_one_valid_page_that_loads_nothing(world, tmp_path):
    run = run_suite(parse_suite(suite_table()), tmp_path / "run")
    text = write_report(run).read_text(encoding="utf-8")
    parser = Strict()
    parser.feed(text)
    assert parser.open == [] and parser.images == 1
    assert all(value.startswith("data:") for value in parser.loads), parser.loads
    assert not re.search(r"@import|url\(|<script", text)
    image = next(value for value in parser.loads if value.startswith("data:image/svg+xml;base64,"))
    assert b"<svg" in base64.b64decode(image.partition(",")[2])
    assert "A &lt;b&gt;tiny&lt;/b&gt; suite" in text, "the title is not escaped"
    assert run.records[0].weights_sha256 in text
    assert {p.suffix for p in (tmp_path / "run/plots").iterdir()} == {".png", ".svg"}
