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


def test_a_number_beyond_all_bounds_is_refused_by_the_tool_not_by_a_crash() -> None:
    assert read_call('{"name": "add", "arguments": {"a": 1e999}}', "c").arguments == {"a": float("inf")}


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


def test_parsing_takes_linear_time(renderer: Renderer) -> None:
    ids = renderer.encode("<tool_call>" * 2000)
    began = time.monotonic()
    renderer.parse(ids, 0, "length")
    assert time.monotonic() - began < 5.0
