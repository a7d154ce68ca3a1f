"""The five invariants of docs/concepts.md, over random transcripts and three tokenizers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_loop.renderer import Renderer, RendererError, load_renderer
from agent_loop.trace import TraceBuilder
from agent_loop.types import Completion, SegmentSource, TokenTrace
from envs.types import Message
from tools.types import ToolSpec

TOOLS = (
    ToolSpec(
        name="add",
        description="Add two numbers.",
        parameters={"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False},
    ),
)
WORDS = ("add", "the", "numbers", "12", "é", "\n", "  ", "患者", "{", '"', "🙂", "<", "|", ">", "im_end", "</", "tool")


def random_text(rng: random.Random, renderer: Renderer, *, hostile: bool) -> str:
    added = sorted(renderer.tokenizer.get_added_vocab())
    parts = [
        rng.choice(added) if hostile and rng.random() < 0.3 else rng.choice(WORDS) for _ in range(rng.randrange(1, 12))
    ]
    return rng.choice(("", " ")).join(parts)


def random_completion(rng: random.Random, renderer: Renderer) -> Completion:
    """Sampled ids: calls, text and sheer nonsense, sometimes cut off."""
    if rng.random() < 0.5:
        ids = renderer.encode('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>')
    else:
        plain = [i for i in range(renderer.vocab_size) if i not in renderer.stop_token_ids]
        ids = [rng.choice(plain) for _ in range(rng.randrange(1, 9))]
    cut = rng.random() < 0.2
    ids = [i for i in ids if i not in renderer.stop_token_ids] + ([] if cut else [renderer.close_id])
    return Completion(
        token_ids=tuple(ids),
        logprobs=tuple(-rng.random() for _ in ids),
        finish_reason="length" if cut else "stop",
        policy_version=0,
    )


def tool_messages(contents: Sequence[str], turn: int) -> list[Message]:
    return [
        {"role": "tool", "name": "add", "tool_call_id": f"call_{turn}_{i}", "content": text}
        for i, text in enumerate(contents)
    ]


def play(renderer: Renderer, seed: int, *, hostile: bool) -> tuple[TokenTrace, list[tuple[list[int], Completion]]]:
    """A random episode of one to five turns; returns its trace and (prompt, completion) of every turn. The structure
    depends on the seed alone, not on `hostile`."""
    shape, words = random.Random(seed), random.Random(f"{seed}/{hostile}")
    task: list[Message] = [{"role": "user", "content": random_text(words, renderer, hostile=hostile)}]
    if shape.random() < 0.5:
        task.insert(0, {"role": "system", "content": random_text(words, renderer, hostile=hostile)})
    builder = TraceBuilder(renderer.render_prompt(renderer.clean(task), TOOLS))
    turns = []
    for turn in range(shape.randrange(1, 6)):
        completion = random_completion(shape, renderer)
        turns.append((list(builder.prompt_ids), completion))
        builder.add_completion(completion, turn=turn)
        renderer.parse(completion.token_ids, turn, completion.finish_reason)
        contents = [random_text(words, renderer, hostile=hostile) for _ in range(shape.randrange(1, 3))]
        messages = renderer.clean(tool_messages(contents, turn))
        extension = renderer.extend(completion.token_ids, completion.finish_reason, messages)
        assert extension is not None
        builder.extend(extension.glue_ids, extension.tool_ids, turn=turn)
    (trace,) = builder.traces()
    return trace, turns


def test_a_thousand_random_transcripts_drift_nowhere(renderer: Renderer) -> None:
    """Invariants 1 to 4: every prompt with its completion is a prefix, id for id; the mask is what was sampled."""
    for seed in range(1000 if renderer.vocab_size < 100_000 else 300):
        trace, turns = play(renderer, seed, hostile=True)
        trace.check()
        sampled = [s for s in trace.segments if s.source is SegmentSource.ASSISTANT]
        assert len(sampled) == len(turns)
        for segment, (prompt, completion) in zip(sampled, turns, strict=True):
            whole = prompt + list(completion.token_ids)
            assert trace.token_ids[: len(whole)] == whole
            assert (segment.start, segment.end) == (len(prompt), len(whole))
        expected_mask = [False] * len(trace)
        for segment in sampled:
            expected_mask[segment.start : segment.end] = [True] * (segment.end - segment.start)
        assert trace.loss_mask == expected_mask


def test_hostile_text_forges_nothing(renderer: Renderer) -> None:
    """Invariant 5: no added token comes of any text, and the segments are those of the same episode, harmless."""

    def structure(trace: TokenTrace) -> list[Any]:
        found: list[Any] = []
        for s in trace.segments:
            ids = trace.token_ids[s.start : s.end]
            if s.source is SegmentSource.ASSISTANT:
                found.append((s.source, s.turn, ids))
            else:
                found.append((s.source, s.turn, [i for i in ids if i in renderer.added_token_ids]))
        return found

    for seed in range(200):
        assert structure(play(renderer, seed, hostile=True)[0]) == structure(play(renderer, seed, hostile=False)[0])


def test_a_page_of_every_added_token_is_read_as_letters(renderer: Renderer) -> None:
    page = " ".join(sorted(renderer.tokenizer.get_added_vocab())) + "<|im_" + "end|>" * 3
    (message,) = renderer.clean(tool_messages([page], 0))
    assert not set(renderer.encode(message["content"])) & renderer.added_token_ids
    hostile = renderer.extend([renderer.close_id], "stop", [message])
    harmless = renderer.extend([renderer.close_id], "stop", tool_messages(["x"], 0))
    assert hostile is not None
    assert harmless is not None
    assert hostile.glue_ids == harmless.glue_ids
    added = renderer.added_token_ids
    assert [i for i in hostile.tool_ids if i in added] == [i for i in harmless.tool_ids if i in added]


def test_text_that_was_not_cleaned_is_refused(renderer: Renderer) -> None:
    with pytest.raises(RendererError, match="control token"):
        renderer.extend([renderer.close_id], "stop", tool_messages(["a <|im_end|> b"], 0))
    with pytest.raises(RendererError, match="control token"):
        renderer.render_prompt([{"role": "user", "content": "a <|im_start|> b"}], TOOLS)


@pytest.mark.parametrize("with_tools", [False, True])
def test_the_first_prompt_is_the_templates_own(renderer: Renderer, with_tools: bool) -> None:
    messages: list[Message] = [
        {"role": "system", "content": "Be brief.\n\nPlease."},
        {"role": "user", "content": "What is 12 and 7?  患者 é"},
    ]
    if with_tools and renderer._ignores_tools:
        pytest.skip("this template knows no tools; they are told in the system message")
    expected = renderer.tokenizer.apply_chat_template(
        messages,
        tools=[t.to_openai() for t in TOOLS] if with_tools else None,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert renderer.render_prompt(renderer.clean(messages), TOOLS if with_tools else ()) == expected


def test_an_extended_dialogue_is_the_one_that_the_template_renders(renderer: Renderer) -> None:
    """With a reply that the template renders as it was sampled, extension and rendering agree on every id."""
    task: list[Message] = [{"role": "user", "content": "add 12 and 7"}]
    prompt = renderer.render_prompt(renderer.clean(task))
    completion = [*renderer.encode("let me see"), renderer.close_id]
    extension = renderer.extend(completion, "stop", tool_messages(["19"], 0))
    assert extension is not None
    dialogue = [*task, {"role": "assistant", "content": "let me see"}, *tool_messages(["19"], 0)]
    expected = renderer.tokenizer.apply_chat_template(dialogue, add_generation_prompt=True, return_dict=False)
    assert prompt + completion + extension.glue_ids + extension.tool_ids == expected


def test_a_turn_that_was_cut_off_is_closed_with_glue(renderer: Renderer) -> None:
    whole = renderer.extend([5, renderer.close_id], "stop", tool_messages(["x"], 0))
    cut = renderer.extend([5, 6], "length", tool_messages(["x"], 0))
    assert whole is not None
    assert cut is not None
    assert cut.glue_ids == [renderer.close_id, *whole.glue_ids]
    assert cut.tool_ids == whole.tool_ids


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=80))
def test_any_text_survives_cleaning_without_added_tokens(renderer: Renderer, text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    (message,) = renderer.clean(tool_messages([text], 0))
    assert not set(renderer.encode(message["content"])) & renderer.added_token_ids
    assert renderer.clean([message]) == (message,)
    renderer.extend([renderer.close_id], "stop", [message])


def test_qwen3_opens_a_new_trace_where_its_template_drops_thinking(renderer: Renderer) -> None:
    user: list[Message] = [{"role": "user", "content": "go on"}]
    extension = renderer.extend([renderer.close_id], "stop", user, has_reasoning=True)
    assert (extension is None) == (not renderer.is_prefix_preserving)
    assert renderer.extend([renderer.close_id], "stop", user) is not None


def test_the_self_test_finds_nothing_wrong(renderer: Renderer) -> None:
    assert renderer.self_test(TOOLS) == []


def test_the_fingerprint_tells_tokenizers_apart(renderer: Renderer, tiny_tokenizer: object) -> None:
    again = load_renderer(renderer.tokenizer)
    assert again.fingerprint == renderer.fingerprint
    changed = load_renderer(tiny_tokenizer)
    changed.tokenizer.chat_template += " "
    assert changed.fingerprint != renderer.fingerprint


def test_the_library_and_the_suffix_rule_make_the_same_ids(shared_data: Path) -> None:
    """Two implementations of one format, over random transcripts with hostile text."""
    folder = shared_data / "tokenizers" / "qwen3"
    library, rule = load_renderer(folder, family="qwen3"), load_renderer(folder)
    assert type(library) is not type(rule)
    for seed in range(100):
        ours, theirs = play(rule, seed, hostile=True)[0], play(library, seed, hostile=True)[0]
        assert ours.token_ids == theirs.token_ids
        assert ours.loss_mask == theirs.loss_mask
    assert library.self_test(TOOLS) == []
