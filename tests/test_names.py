"""Names from files that are shown to users: invisible characters are refused everywhere."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from robustlip.certificate_file import Line
from robustlip.errors import BadInput
from robustlip.eval.suite import load_suite, parse_suite
from robustlip.files import read_toml
from robustlip.gate import load_policy
from robustlip.names import invisible_in, is_invisible, shown
from robustlip.sweep import load_grid
from robustlip.training import load_recipe

INVISIBLE = {
    "zero width space": "\u200b", "zero width joiner": "\u200d", "word joiner": "\u2060", "byte-order mark": "\ufeff", "soft hyphen": "\u00ad",
    "right to left": "\u202e", "isolate": "\u2066", "mark": "\u200f", "line separator": "\u2028", "paragraph separator": "\u2029",
    "variation selector": "\ufe0f", "variation selector 17": "\U000e0100", "tag": "\U000e0041", "private use": "\ue000", "unassigned": "\u0378",
    "noncharacter": "\uffff", "escape": "\x1b", "delete": "\x7f", "C1": "\x9b", "Hangul filler": "\u3164", "blank Braille": "\u2800",
    "grapheme joiner": "\u034f", "Mongolian": "\u180b", "interlinear": "\ufff9", "Arabic letter mark": "\u061c",
}  # fmt: skip
SEEN = ["digits", "Größe 3", "模型", "ℓ∞ → 0.1 · ‖x‖₂", "नमस्ते", "🙂", "a b"]


@pytest.mark.parametrize("name", INVISIBLE)
def test_one_function_sees_them_all(name: str) -> None:
    text = f"a{INVISIBLE[name]}b"
    assert is_invisible(INVISIBLE[name]) and invisible_in(text) == f"U+{ord(INVISIBLE[name]):04X}"
    assert INVISIBLE[name] not in shown(text) and shown(text).isascii()
    with pytest.raises(ValidationError):
        TypeAdapter(Line).validate_python(text)


@pytest.mark.parametrize("text", SEEN)
def test_what_is_seen_is_kept(text: str) -> None:
    assert invisible_in(text) == "" and shown(text) == text and TypeAdapter(Line).validate_python(text) == text
    assert all(unicodedata.category(c) not in ("Cc", "Cf") for c in text)


@pytest.mark.parametrize("name", ["zero width space", "tag", "variation selector", "private use", "soft hyphen", "line separator"])
@pytest.mark.parametrize("reader", [load_recipe, load_suite, load_policy, load_grid])
@pytest.mark.parametrize("place", ["key", "value", "list", "table"])
def test_every_file_of_settings(tmp_path: Path, name: str, reader, place: str) -> None:
    odd = INVISIBLE[name]
    text = {"key": f'"na{odd}me" = 1', "value": f'name = "a{odd}b"', "list": f'a = [["x", "{odd}"]]', "table": f'[a."b{odd}"]\nc = 1'}[place]
    path = tmp_path / "settings.toml"
    path.write_text(text + "\n", encoding="utf-8")
    with pytest.raises(BadInput, match=rf"visible characters in .*settings\.toml.*U\+{ord(odd):04X}"):
        reader(path)


def test_the_suite_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"U\+200B"):
        parse_suite({"name": "a\u200b", "pair": []}, "manifest.json")


def test_texts_may_have_lines_and_a_vocabulary_any_character(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('description = """one\n\ttwo"""\n[model]\nvocabulary = "a\\u200b"\n', encoding="utf-8")
    assert read_toml(path, "a recipe")["model"]["vocabulary"] == "a\u200b"
