"""Rows to look at: text of tokens that share a character, what is not seen, marks, and the page for a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from launcher.data.page import page
from launcher.data.preview import lines, pieces, texts, visible
from launcher.data.tokenizer import TokenizerSpec, load_tokenizer
from tests.data.make import tiny_tokenizer


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return load_tokenizer(TokenizerSpec(str(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))))


def token(text: str, weight: float = 0.0, *, number: int = 5, special: bool = False) -> dict[str, Any]:
    return {"id": number, "text": text, "trained": weight > 0, "weight": weight, "special": special}


def document(tokens: list[dict[str, Any]], *, side: str = "plain", record: int = 3) -> dict[str, Any]:
    return {"source": "/d/a.jsonl", "record": record, "side": side, "tokens": tokens}


def shown(*documents: dict[str, Any]) -> dict[str, Any]:
    stats = {
        "rows": 1, "documents": 2, "tokens": 10, "trained_tokens": 4, "packing_efficiency": 0.5, "seq_len": 20,
        "formats": ["a.jsonl: recognised as <b>"], "dropped": {"no trained token": 3}, "changed": {}, "warnings": [],
        "groups": {"plain": 2, "pairs": 0, "labelled": 0},
    }  # fmt: skip
    return {"rows": [{"row": 7, "source": "a", "documents": list(documents)}], "stats": stats}


class _Read(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.told: list[str] = []
        self.data: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.told += [value or "" for name, value in attrs if name == "data-t"]

    def handle_data(self, data: str) -> None:
        self.data.append(data)


def read(text: str) -> _Read:
    reader = _Read()
    reader.feed(text)
    return reader


@pytest.mark.parametrize(
    "text", ["plain words", "h\xe9llo \u4f60\u597d w\xf6rld", "\U0001f469\u200d\U0001f467!<|im_end|>\n", "\ufffdx"]
)
def test_the_texts_of_tokens_are_the_text(words, text):
    ids = words(text, add_special_tokens=False)["input_ids"]
    found = texts(ids, words)
    assert len(found) == len(ids)
    assert "".join(found) == text


def test_a_character_of_several_tokens_stands_with_the_first(words):
    ids = words("\u4f60", add_special_tokens=False)["input_ids"]
    assert texts(ids, words) == ["\u4f60", "", ""]
    assert texts(ids[:-1], words) == ["\ufffd", "\ufffd"]  # the rest was cut away: each is what it is, broken


def test_tokens_that_share_a_character_are_one_piece():
    tokens = [token("a"), token("\u4f60"), token(""), token(""), token("b")]
    assert [len(piece) for piece in pieces(tokens)] == [1, 3, 1]


@pytest.mark.parametrize(
    ("text", "seen"),
    [("\x1b[2J", "<U+001B>[2J"), ("\u202eab", "<U+202E>ab"), ("\u200b", "<U+200B>"), ("a\nb\t", "a\nb\t")],
)
def test_what_a_reader_would_not_see_or_would_turn_the_line_is_spelled_out(text, seen):
    assert visible(text) == seen


def test_a_joiner_inside_a_piece_stays():
    assert visible("\U0001f469\u200d\U0001f467") == "\U0001f469\u200d\U0001f467"


def test_the_console_marks_runs_of_a_weight_and_names_sides():
    tokens = [token("a"), token("b", 1.0), token("c", 1.0), token("d", 0.5), token("e", 2.0)]
    said = list(lines(shown(document(tokens, side="chosen"), document(tokens[:2], side="rejected")), colour=False))
    assert said[1] == "--- /d/a.jsonl record 3, chosen: 5 tokens, 4 trained"
    assert said[2] == "a|[[b|c]]|[[d]]x0.5|[[e]]x2"
    assert "rejected" in said[3]


def test_the_page_holds_every_token_and_escapes_every_text():
    evil = "<script>alert('\"')</script>"
    tokens = [
        token(evil),
        token("\u4f60", 1.0),
        token("", 1.0),
        token("\n", 0.5),
        token("<|im_end|>", 1.0, special=True),
    ]
    text = page(shown(document(tokens)), name="r<i>")
    found = read(text)
    assert not {"script", "img", "link", "iframe"} & set(found.tags)
    assert evil in found.data
    assert len(found.told) == 4
    assert "ids 5 5   '\u4f60'   trained, weight 1" in found.told
    assert any("not trained" in told and evil in told for told in found.told)
    assert "no trained token" in text
    assert "a.jsonl: recognised as <b>" in found.data


def test_the_page_asks_the_network_for_nothing():
    text = page(shown(document([token("a")])), name="r")
    assert not re.search(r"(https?:)?//|url\(|@import|<script", text.replace("/d/a.jsonl", ""))
    assert "default-src 'none'" in text


def test_the_page_labels_pairs_and_shows_each_weight_in_its_legend():
    pair = [
        document([token("a"), token("b", 2.0)], side="chosen"),
        document([token("a"), token("c", 0.5)], side="rejected"),
    ]
    text = page(shown(*pair), name="r")
    assert '<span class="side chosen">chosen</span>' in text
    assert '<span class="side rejected">rejected</span>' in text
    assert "x0.5" in text
    assert "x2" in text
    assert 'style="--w:0.25"' in text  # against the heaviest, 2
