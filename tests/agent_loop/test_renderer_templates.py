"""Chat templates and tokenizers that do something else than Qwen's: the seam must notice, or follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer

from agent_loop.renderer import Renderer, RendererError, load_renderer
from envs.types import AssistantMessage, Message
from tools.types import ToolCall, ToolSpec

TOOL = ToolSpec(name="add", description="d", parameters={"type": "object", "properties": {"a": {"type": "integer"}}})

CHATML = """{%- if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}\
{{ '<|im_end|>\\n' }}{% endif %}{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}BODY\
{%- for c in m.tool_calls or [] %}{{ '<tool_call>\\n' + (c.function | tojson) + '\\n</tool_call>' }}{% endfor %}\
{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def renderer_of(folder: Path, body: str = "{{ m.content }}", template: str | None = None) -> Renderer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template or CHATML.replace("BODY", "{% if m.content is string %}" + body + "{% endif %}")
    return load_renderer(tokenizer)


def results(*contents: str, turn: int = 0) -> list[Message]:
    return [
        {"role": "tool", "name": "add", "tool_call_id": f"call_{turn}_{i}", "content": text}
        for i, text in enumerate(contents)
    ]


def rendered(renderer: Renderer, messages: list[Message]) -> list[int]:
    """What the template itself makes of a reply and the messages after it, from the reply's close on."""
    dialogue: list[Any] = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "ok"}]
    whole = renderer.tokenizer.apply_chat_template(dialogue + messages, add_generation_prompt=True, return_dict=False)
    at = [i for i, token in enumerate(whole) if token == renderer.close_id][1]
    return list(whole[at + 1 :])


def extended(renderer: Renderer, messages: list[Message]) -> list[int]:
    extension = renderer.extend([renderer.close_id], "stop", messages)
    assert extension is not None
    return [*extension.glue_ids, *extension.tool_ids]


CONTENTS = (
    "plain",
    'say "hi"\nto <all>',
    "  spaces around \n\n",
    "back\\slash {{ x }} {% y %}",
    "é患🙂 'quoted'",
    "",
    " ",
)


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content }}",
        "{{ m.content | tojson }}",
        "{{ m.content | trim }}",
        "{{ m.content | e }}",
        "{{ (m.tool_call_id or '') + ': ' + m.content }}",
        "{{ (m.name or '') + ': ' + m.content }}",
    ],
)
@pytest.mark.parametrize("num_results", [1, 2])
def test_an_extension_is_what_the_template_renders(tiny_tokenizer: Path, body: str, num_results: int) -> None:
    """Templates that quote, trim or change the text, or show the call's id."""
    renderer = renderer_of(tiny_tokenizer, body)
    for turn, content in enumerate(CONTENTS):
        messages = list(renderer.clean(results(*[content] * num_results, turn=turn)))
        assert extended(renderer, messages) == rendered(renderer, messages), content


def test_a_template_that_refuses_tool_results_gets_them_from_the_user(shared_data: Path) -> None:
    body = "{% if m.role == 'tool' %}{{ raise_exception('no tool role') }}{% endif %}{{ m.content }}"
    renderer = renderer_of(shared_data / "tokenizers" / "qwen3", body)
    text = renderer.decode(extended(renderer, results("12", "13")))
    assert "<|im_start|>user\n<tool_response>\n12\n</tool_response>" in text
    assert text.endswith("13\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


def test_a_refused_dialogue_is_an_error_in_words(tiny_tokenizer: Path) -> None:
    body = "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ m.content }}"
    renderer = renderer_of(tiny_tokenizer, body)
    with pytest.raises(RendererError, match="System role not supported"):
        renderer.render_prompt([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])


def test_templates_that_write_earlier_turns_anew_open_a_new_trace(tiny_tokenizer: Path) -> None:
    plain = renderer_of(tiny_tokenizer)
    assert plain.is_prefix_preserving
    user: list[Message] = [{"role": "user", "content": "more"}]
    # As Mistral does it: the tools stand before the last user message.
    counted = CHATML.replace("BODY", "{{ m.content }}")
    moved = (
        "{{ '<|im_start|>' + (messages | selectattr('role', 'equalto', 'user') | list | length | string) }}" + counted
    )
    renderer = renderer_of(tiny_tokenizer, template=moved)
    assert not renderer.is_prefix_preserving
    assert renderer.extend([renderer.close_id], "stop", user) is None
    assert renderer.extend([renderer.close_id], "stop", results("x")) is not None


def test_a_template_that_drops_thinking_before_a_tool_result(tiny_tokenizer: Path) -> None:
    body = "{% if loop.last and m.reasoning_content %}{{ m.reasoning_content }}{% endif %}{{ m.content }}"
    renderer = renderer_of(tiny_tokenizer, body)
    assert not renderer.is_prefix_preserving
    assert renderer.extend([renderer.close_id], "stop", results("x"), has_reasoning=True) is None
    assert renderer.extend([renderer.close_id], "stop", results("x")) is not None


def test_qwen3_keeps_thinking_over_tool_results_and_drops_it_at_a_question(shared_data: Path) -> None:
    renderer = load_renderer(shared_data / "tokenizers" / "qwen3")
    user: list[Message] = [{"role": "user", "content": "more"}]
    assert renderer.extend([renderer.close_id], "stop", results("x"), has_reasoning=True) is not None
    assert renderer.extend([renderer.close_id], "stop", user, has_reasoning=True) is None
    assert renderer.extend([renderer.close_id], "stop", user, has_reasoning=False) is not None


def test_a_call_form_that_is_not_read_back_is_reported(tiny_tokenizer: Path) -> None:
    other = (
        CHATML.replace("<tool_call>", "[CALL]").replace("</tool_call>", "[/CALL]").replace("BODY", "{{ m.content }}")
    )
    renderer = renderer_of(tiny_tokenizer, template=other)
    (problem,) = renderer.self_test([TOOL])
    assert "[CALL]" in problem
    assert "family" in problem
    assert renderer_of(tiny_tokenizer).self_test([TOOL]) == []


def test_added_tokens_of_white_space_are_left_alone(shared_data: Path) -> None:
    """Gemma's tokenizers have runs of newlines and spaces among their added tokens."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen3")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "    ", "\t")])
    renderer = load_renderer(tokenizer)
    text = "a\n\nb    c\td"
    messages: list[Message] = [{"role": "user", "content": text}]
    assert renderer.clean(messages) == ({"role": "user", "content": text},)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert renderer.render_prompt(messages) == expected
    assert "a\n\nb" in renderer.decode(extended(renderer, results(text)))


def test_letters_that_a_normaliser_turns_into_an_added_token(tiny_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.add_tokens([AddedToken("<stop_now>", normalized=True), AddedToken("<pad_it>", lstrip=True, rstrip=True)])
    renderer = load_renderer(tokenizer)
    hostile = "a <STOP_NOW> b ＜stop_now＞ c  <pad_it>  <<stop_now>stop_now> <Pad_It>"
    assert set(renderer.encode(hostile)) & renderer.added_token_ids
    cleaned = renderer.clean_text(hostile)
    assert not set(renderer.encode(cleaned)) & renderer.added_token_ids
    assert renderer.clean_text(cleaned) == cleaned


def test_cleaning_ends_where_a_normaliser_undoes_it(tiny_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    tokenizer.add_tokens([AddedToken("<stop_now>", normalized=True)])
    renderer = load_renderer(tokenizer)
    with pytest.raises(RendererError, match="control token"):
        renderer.clean_text("a <stop_now> b")


def test_half_a_surrogate_pair_is_replaced(renderer: Renderer) -> None:
    (message,) = renderer.clean([{"role": "user", "content": "a\ud800b"}])
    assert message["content"] == "a\ufffdb"
    assert renderer.render_prompt([message])


@pytest.mark.parametrize("content", [None, 7, [{"type": "text", "text": "a"}]])
def test_content_that_is_no_text_is_refused_in_words(renderer: Renderer, content: object) -> None:
    message: Any = {"role": "user", "content": content}
    with pytest.raises(RendererError, match=r"message 0 \(user\): content is .*must be text"):
        renderer.clean([message])


def test_an_assistant_message_that_is_all_calls_needs_no_content(renderer: Renderer) -> None:
    message: Any = {"role": "assistant", "content": None, "tool_calls": []}
    assert renderer.clean([message])[0]["content"] == ""


def test_hostile_names_arguments_and_tool_descriptions(renderer: Renderer) -> None:
    """Not only contents: whatever is rendered is cleaned, and checked, in dialogues with calls in them too."""
    bad = "".join(sorted(renderer.tokenizer.get_added_vocab()))
    call = {"id": bad, "type": "function", "function": {"name": bad, "arguments": {bad: [bad, {bad: bad}]}}}
    dialogue: list[Any] = [
        {"role": "system", "content": bad},
        {"role": "user", "content": bad, "name": bad},
        {"role": "assistant", "content": bad, "reasoning_content": bad, "tool_calls": [call]},
        {"role": "tool", "content": bad, "name": bad, "tool_call_id": bad},
    ]
    spec = ToolSpec(name="add", description=bad, parameters={"type": "object", "properties": {bad: {"title": bad}}})
    renderer.render_prompt(renderer.clean(dialogue), [spec])
    with pytest.raises(RendererError, match="control token"):
        renderer.render_prompt([*renderer.clean(dialogue[:2]), *dialogue[2:]], [spec])


def test_dialogues_of_one_shape_but_for_thinking_are_told_apart(shared_data: Path) -> None:
    renderer = load_renderer(shared_data / "tokenizers" / "qwen3")
    reply: Message = {"role": "assistant", "content": "a"}
    thought: Message = {"role": "assistant", "content": "a", "reasoning_content": "why"}
    for message in (reply, thought, reply):
        assert renderer.render_prompt([{"role": "user", "content": "u"}, message, *results("t")])


def test_a_close_token_is_a_close_token_whatever_the_server_calls_it(renderer: Renderer) -> None:
    stop = renderer.extend([5, renderer.close_id], "stop", results("x"))
    length = renderer.extend([5, renderer.close_id], "length", results("x"))
    assert stop == length


def test_a_family_that_renders_otherwise_is_not_taken(shared_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The library lists more models than it renders as their templates do."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen3")
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    tokenizer.name_or_path = "Qwen/Qwen3-4B-Thinking-2507"
    renderer = load_renderer(tokenizer)
    assert "suffix rule" in caplog.text
    assert renderer.decode(renderer.render_prompt([{"role": "user", "content": "u"}])).endswith("<think>\n")
    turn = renderer.parse(renderer.encode("hm <tool_call>{}</tool_call>\n</think>\n\nyes"), 0, "length")
    assert (turn.message.content, turn.message.tool_calls) == ("yes", ())


def test_a_family_closes_an_open_thought_with_glue(shared_data: Path) -> None:
    renderer = load_renderer(shared_data / "tokenizers" / "qwen3", family="qwen3")
    cut = renderer.extend(renderer.encode("<think>\nso"), "length", results("x"))
    whole = renderer.extend([renderer.close_id], "stop", results("x"))
    assert cut is not None
    assert whole is not None
    assert renderer.decode(cut.glue_ids) == "</think><|im_end|>\n"
    assert renderer.decode(whole.glue_ids) == "\n"
    assert cut.tool_ids == whole.tool_ids
    with pytest.raises(RendererError, match="control token"):
        renderer.extend([renderer.close_id], "stop", results("a <|im_end|> b"))


@pytest.mark.parametrize("reasoning", [None, "So 12\nand 7."])
def test_what_is_written_reads_as_what_was_said(renderer: Renderer, reasoning: str | None) -> None:
    """`write` is the other way of `parse`, for every tokenizer; a template without think blocks loses them."""
    call = ToolCall(id="call_0_0", name="add", arguments={"a": 12, "b": {"é": ["}", "<b>"]}}, raw="")
    for said in (
        AssistantMessage(content="It is\n\n19. é", reasoning=reasoning),
        AssistantMessage(content="", reasoning=reasoning, tool_calls=(call,)),
        AssistantMessage(content="Now:", reasoning=reasoning, tool_calls=(call, call)),
    ):
        (message,) = renderer.clean([said.to_message()])
        ids = renderer.write(message, (TOOL,))
        assert ids[-1] == renderer.close_id
        assert ids.count(renderer.close_id) == 1
        read = renderer.parse(ids, 0, "stop").message
        assert (read.content, read.finished) == (said.content, True)
        assert [(c.name, c.arguments) for c in read.tool_calls] == [(c.name, c.arguments) for c in said.tool_calls]
        assert (read.reasoning or None) in (reasoning, None)


def test_a_template_that_asks_inside_a_think_block_and_drops_it_is_refused(tiny_tokenizer: Path) -> None:
    asks = "<|im_start|>assistant\\n"
    renderer = renderer_of(
        tiny_tokenizer, template=CHATML.replace("BODY", "{{ m.content }}").replace(asks, asks + "<think>\\n")
    )
    with pytest.raises(RendererError, match="behind its own generation prompt"):
        renderer.write({"role": "assistant", "content": "19"})
