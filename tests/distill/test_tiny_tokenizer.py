"""The tiny tokenizer, and that the renderer of all models renders it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_loop.renderer import load_renderer
from distill.tiny.pretrain import Phase, examples, render
from distill.tiny.recipes import tool_schemas
from distill.tiny.tokenizer import CONTROL_TOKENS, MARKUP_TOKENS, build_tokenizer
from envs.medbrowse.demos import demonstrations
from envs.medbrowse.env import MedBrowseEnv
from envs.medbrowse.expert import ScriptedExpert
from envs.medbrowse.tasks import make_tasks

TOKENIZER: Any = build_tokenizer()


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=400))
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.unk_token_id not in ids


def test_a_long_line_is_cut_in_linear_time_and_comes_back() -> None:
    text = "Batimab costs 46.72 " * 20_000
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


def test_it_is_small_and_loads_like_any_other(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert 512 <= len(TOKENIZER) <= 1024
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.chat_template == TOKENIZER.chat_template
    assert set(loaded.get_added_vocab()) == {*CONTROL_TOKENS, *MARKUP_TOKENS}
    text = "<|im_start|>user\nFor clinical trial NCT12345678<|im_end|>"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert build_tokenizer().get_vocab() == TOKENIZER.get_vocab()


def test_demonstrations_are_short() -> None:
    names = [schema["function"]["name"] for schema in tool_schemas()]  # type: ignore[index]
    texts = [render(messages, names) for messages in itertools.islice(demonstrations(0), 200)]
    lengths = [len(ids) for ids in TOKENIZER(texts)["input_ids"]]
    assert sum(lengths) / len(lengths) < 160
    assert max(lengths) < 220


@pytest.mark.parametrize("error_rate", [0.0, 0.3])
async def test_training_ids_are_the_renderers_own(error_rate: float) -> None:
    """Prompt, sampled text and extensions, joined as in a rollout, are the ids that the model was trained on."""
    import random

    renderer = load_renderer(TOKENIZER)
    assert renderer.is_prefix_preserving
    phase = Phase(name="x", data_seed="x", num_steps=1, num_episodes=1)
    env = MedBrowseEnv()
    names = [spec.name for spec in env.tool_specs]
    for number, task in enumerate(make_tasks(0, 25)):
        observation, _ = await env.areset(options={"task": task})
        expert = ScriptedExpert(observation, error_rate=error_rate, rng=random.Random(number))
        ids = renderer.render_prompt(observation, env.tool_specs)
        while True:
            action = expert.act(observation)
            calls = "".join(f"<tool_call>{call.raw}</tool_call>" for call in action.tool_calls)
            sampled = TOKENIZER.encode(f"{calls}<|im_end|>", add_special_tokens=False)
            parsed = renderer.parse(sampled, 0, "stop")
            assert [(c.name, c.arguments) for c in parsed.message.tool_calls] == [
                (c.name, c.arguments) for c in action.tool_calls
            ]
            ids += sampled
            outcome = await env.astep(action)
            observation = outcome.observation
            if outcome.terminated or outcome.truncated:
                break
            extension = renderer.extend(sampled, "stop", observation)
            assert extension is not None
            ids += extension.glue_ids + extension.tool_ids
        dialogue = env.messages[:-1] if env.messages[-1]["role"] == "tool" else env.messages
        assert ids == TOKENIZER.encode(render(dialogue, names), add_special_tokens=False)
        if number == 0:
            example = examples(phase, TOKENIZER, tool_schemas(), seed=0)[0]
            assert max(example.trained) == len(example.ids) - 1
