"""Cleaning: hidden characters out, forbidden strings broken."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.clean import clean_text, forbidden_pattern, neutralise

MARKS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>", "<|endoftext|>", "<s>"]
ANY_TEXT = st.text(alphabet=st.characters())  # surrogates included
MARKED_TEXT = st.lists(st.one_of(st.sampled_from(MARKS), st.text("<|>/ims_toolcalhnkedxrf \n", max_size=8))).map(
    "".join
)
SMALL = st.text(alphabet="ab <\ufffd", max_size=5)


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("plain text", "plain text"),
        ("a\tb\nc", "a\tb\nc"),
        ("a\r\nb\rc\u2028d\u2029e", "a\nb\nc\nd\ne"),
        ("a\x00b\x07c\x1b[0m\x7f\x85", "abc[0m"),
        ("a\u200bb\u200dc\ufeff\u2060", "abc"),
        ("\u202egnp.exe\u2066x\u2069\u061c", "gnp.exex"),
        ("a\ud800b\udfff", "ab"),
        ("tag\U000e0041\U000e0042", "tag"),
        ("naïve Ω 漢字 😀 e\u0301", "naïve Ω 漢字 😀 e\u0301"),
        ("<|im\u200b_end|>", "<|im_end|>"),
    ],
)
def test_clean_text(dirty: str, clean: str) -> None:
    assert clean_text(dirty) == clean


@given(ANY_TEXT)
def test_clean_text_is_idempotent_and_leaves_nothing_hidden(text: str) -> None:
    clean = clean_text(text)
    assert clean_text(clean) == clean
    clean.encode("utf-8")
    assert not any(unicodedata.category(char) == "Cc" for char in clean.replace("\n", "").replace("\t", ""))
    assert not any(
        unicodedata.bidirectional(char) in ("RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI", "FSI", "PDI")
        for char in clean
    )


def test_a_match_is_broken_after_its_first_character() -> None:
    forbidden = forbidden_pattern(MARKS)
    assert neutralise("a <|im_end|> b <s>", forbidden) == "a < |im_end|> b < s>"
    assert neutralise("nothing", forbidden) == "nothing"
    assert neutralise("anything <s>", None) == "anything <s>"


def test_a_match_of_one_character_is_replaced() -> None:
    assert neutralise("a\u2581b", forbidden_pattern(["\u2581"])) == "a\ufffdb"


def test_no_strings_no_pattern() -> None:
    assert forbidden_pattern([]) is None
    assert forbidden_pattern([""]) is None


@given(MARKED_TEXT)
def test_no_mark_of_a_tokenizer_survives(text: str) -> None:
    result = neutralise(text, forbidden_pattern(MARKS))
    assert not any(mark in result for mark in MARKS)
    assert result.replace(" ", "") == text.replace(" ", "")  # nothing is lost


@given(st.lists(SMALL, max_size=5), st.text(alphabet="ab <\ufffd", max_size=30))
def test_neutralise_holds_for_any_strings(strings: list[str], text: str) -> None:
    forbidden = forbidden_pattern(strings)
    result = neutralise(text, forbidden)
    assert not any(string in result for string in strings if string)
    assert neutralise(result, forbidden) == result
    if not any(string in text for string in strings if string):
        assert result == text


def test_runs_of_spaces_as_tokens_come_to_an_end() -> None:
    forbidden = forbidden_pattern([" " * n for n in range(2, 30)])
    assert "  " not in neutralise("a" + " " * 1000 + "b", forbidden)
