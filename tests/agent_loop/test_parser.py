"""Reading calls out of what a model said: good ones, bad ones, and nonsense."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_loop.parser import read_call
from agent_loop.renderer import Renderer
from agent_loop.types import TokenClass

GOOD = '{"name": "add", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "JSON list, not an object"),
        ("null", "JSON NoneType, not an object"),
        ('{"arguments": {}}', 'no "name"'),
        ('{"name": 3}', 'no "name"'),
        ('{"name": "add", "arguments": []}', "JSON list, not an object"),
        ('{"name": "add", "arguments": "{}"}', "JSON str, not an object"),
        ('{"name": "add", "arguments": {"a": NaN}}', "NaN is not JSON"),
        ('{"name": "add", "arguments": {"a": Infinity}}', "Infinity is not JSON"),
        ('{"name": "add", "arguments": {"a": 1, "a": 2}}', "'a' is there twice"),
        ('{"name": "add", "name": "sub"}', "'name' is there twice"),
        ('{"name": "add", "arguments": {}, "id": 7}', "unknown keys"),
        ('{"name": "add", "arguments": {"a": 1e999}}', "too large"),
        ('{"name": "add", "arguments": {"a": -1e999}}', "too large"),
        ('{"name": "add", "arguments": {"a": "\\ud800"}}', "half of a surrogate pair"),
        ('{"name": "\\udc00", "arguments": {}}', "half of a surrogate pair"),
        ('{"name": "add", "arguments": {"\\ud800": 1}}', "half of a surrogate pair"),
        ('{"name": "add", "arguments": {"a": ' + "[" * 70 + "]" * 70 + "}}", "more than 64 deep"),
        ('{"name": "add", "arguments": {"a": ' + "1" * 5000 + "}}", "not valid JSON"),
        ("__import__('os').system('true')", "not valid JSON"),
        ('{"name": "add", "arguments": {"a": ' + "[" * 20_000 + "}}", ""),
        ('{"name": "add", "arguments": {"a": "' + "x" * 200_000 + '"}}', "more than 100000"),
    ],
)
def test_a_malformed_call_says_what_is_wrong_and_how_to_write_it(text: str, reason: str) -> None:
    call = read_call(text, "call_0_0")
    assert call.arguments is None
    assert call.parse_error is not None
    assert reason in call.parse_error
    assert "<tool_call>" in call.parse_error


def test_calls_and_answer_in_order(renderer: Renderer) -> None:
    text = f"First. <tool_call>\n{GOOD}\n</tool_call> <tool_call>oops</tool_call> Then."
    turn = renderer.parse([*renderer.encode(text), renderer.close_id], 3, "stop")
    assert [c.id for c in turn.message.tool_calls] == ["call_3_0", "call_3_1"]
    assert [c.parse_error is None for c in turn.message.tool_calls] == [True, False]
    assert turn.message.content.split() == ["First.", "Then."]
    assert turn.message.finished
    assert turn.text.endswith("<|im_end|>")


def test_an_open_call_is_malformed_and_not_an_answer(renderer: Renderer) -> None:
    turn = renderer.parse(renderer.encode(f"<tool_call>\n{GOOD}"), 0, "length")
    (call,) = turn.message.tool_calls
    assert "no </tool_call>" in (call.parse_error or "")
    assert not turn.message.finished


def test_a_call_that_is_only_thought_of_is_no_call(renderer: Renderer) -> None:
    if not {"<think>", "</think>"} <= set(renderer.tokenizer.get_added_vocab()) and renderer._parser._call[0].id:
        pytest.skip("this tokenizer has tags for calls but none for thinking")
    text = f"<think>\nI could say <tool_call>{GOOD}</tool_call>\n</think>\n\nNo."
    turn = renderer.parse([*renderer.encode(text), renderer.close_id], 0, "stop")
    assert turn.message.tool_calls == ()
    assert turn.message.content == "No."
    assert turn.message.reasoning is not None
    assert turn.message.reasoning.startswith("I could say")
    assert [s.token_class for s in turn.token_classes] == [TokenClass.THINK, TokenClass.ANSWER]


def test_letters_that_spell_a_tag_are_no_tag_where_it_is_a_token(renderer: Renderer) -> None:
    if renderer._parser._call[0].id is None:
        pytest.skip("this tokenizer has no tag tokens; letters are all there is")
    ids = [i for c in f"<tool_call>{GOOD}</tool_call>" for i in renderer.encode(c)]
    assert renderer.parse([*ids, renderer.close_id], 0, "stop").message.tool_calls == ()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_ids_are_parsed_and_their_classes_tile_them(renderer: Renderer, data: st.DataObject) -> None:
    tags = [i for i in renderer.added_token_ids if i < renderer.vocab_size]
    ids = data.draw(st.lists(st.one_of(st.sampled_from(tags), st.integers(0, renderer.vocab_size - 1)), max_size=40))
    turn = renderer.parse(ids, 0, "length")
    position = 0
    for span in turn.token_classes:
        assert span.start == position
        assert span.end > span.start
        position = span.end
    assert position == len(ids)


def test_a_call_without_its_opening_tag_is_malformed_and_not_an_answer(renderer: Renderer) -> None:
    turn = renderer.parse([*renderer.encode(f"{GOOD}</tool_call>"), renderer.close_id], 0, "stop")
    (call,) = turn.message.tool_calls
    assert "no <tool_call> before it" in (call.parse_error or "")
    assert turn.message.content == ""


def has_thinking(renderer: Renderer) -> bool:
    """Whether tags of thinking are recognised: as tokens, or as letters where the tags of calls are letters."""
    return "</think>" in renderer.tokenizer.get_added_vocab() or renderer._parser._call[0].id is None


@pytest.mark.parametrize(
    "text",
    [
        f"I could <tool_call>{GOOD}</tool_call>\n</think>\n\nNo.",  # the opening tag left out
        f"Hm. <think>or <tool_call>{GOOD}</tool_call></think> No.",  # thinking after some words
        f"<think>a</think><think><tool_call>{GOOD}</tool_call></think> No.",  # thinking twice
        f"<think>or <tool_call>{GOOD}</tool_call>",  # cut off inside
    ],
)
def test_no_call_comes_of_thinking_wherever_it_stands(renderer: Renderer, text: str) -> None:
    if not has_thinking(renderer):
        pytest.skip("this tokenizer has tags for calls but none for thinking")
    turn = renderer.parse(renderer.encode(text), 0, "stop")
    assert turn.message.tool_calls == ()
    assert GOOD in (turn.message.reasoning or "")
    assert turn.message.content.replace("Hm.", "").strip() in ("No.", "")


def test_a_thought_after_a_call_takes_nothing_from_it(renderer: Renderer) -> None:
    if not has_thinking(renderer):
        pytest.skip("this tokenizer has tags for calls but none for thinking")
    turn = renderer.parse(renderer.encode(f"<tool_call>{GOOD}</tool_call><think>so</think>"), 0, "stop")
    assert [call.arguments for call in turn.message.tool_calls] == [{"a": 1}]
    assert turn.message.reasoning == "so"


def test_token_classes_are_found_behind_characters_of_many_tokens(renderer: Renderer) -> None:
    """The tokens of a call are those that decode to it, whatever stands before it."""
    for before in ("", "🙂患者 é ", "a  b\n\n", "\u0301"):
        ids = renderer.encode(f"{before}<tool_call>\n{GOOD}\n</tool_call>")
        turn = renderer.parse(ids, 0, "length")
        (span,) = [s for s in turn.token_classes if s.token_class is TokenClass.CALL]
        text = renderer.decode(ids[span.start : span.end])
        assert text.endswith("</tool_call>")
        assert GOOD in text
        assert text.startswith(("<tool_call>", "tool_call>"))  # a tokenizer may join " <"


@pytest.mark.parametrize(
    "unit",
    ["<tool_call>", f"<tool_call>{GOOD}</tool_call>", "</tool_call>", "</think>", "<think>", "<think></think>", "🙂"],
)
def test_parsing_takes_linear_time(renderer: Renderer, unit: str) -> None:
    ids = renderer.encode(unit * 2000)
    began = time.process_time()
    renderer.parse(ids, 0, "length")
    assert time.process_time() - began < 5.0


def test_many_keys_take_linear_time() -> None:
    keys = ",".join(f'"{i:x}":1' for i in range(11_000))
    began = time.process_time()
    call = read_call(f'{{"name": "add", "arguments": {{{keys}, "2af7": 2}}}}', "c")
    assert "'2af7' is there twice" in (call.parse_error or "")
    assert time.process_time() - began < 0.5
