"""The configuration for the web trains in a real Chromium, on a site of this machine whose pages it records."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from aiohttp import web

from envs.medbrowse.web_tasks import web_tasks
from envs.types import Message
from tests.browser.conftest import Web
from tests.runs.config_cases import CASES
from tests.runs.config_cases import train as train_case
from tools.store import PageStore

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

OPENING = "<|im_start|>assistant\n"
TOOLS = ["browse", "find", "submit_answer"]
SCRIPTED = (
    "<title>Products</title><p id=x>loading</p>"
    "<script>document.getElementById('x').textContent = 'Made by ' + 'Acme'</script>"
)


async def products(_: web.Request) -> web.Response:
    """A page whose text is there after its script has run."""
    return web.Response(text=SCRIPTED, content_type="text/html")


def teach_to_browse(model: Path, url: str) -> None:
    """A few steps on dialogues that open `url`, whatever the question is, so that the tiny model reaches the site."""
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from distill.tiny.pretrain import Example, Phase, render, train
    from distill.tiny.tokenizer import END, PAD

    def call(name: str, **arguments: str) -> Message:
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
        }

    def ids(messages: Sequence[Message], end: str = "") -> list[int]:
        encoded: list[int] = tokenizer.encode(render(messages, TOOLS) + end, add_special_tokens=False)
        return encoded

    torch.set_num_threads(1)
    tokenizer, student = AutoTokenizer.from_pretrained(model), Qwen3ForCausalLM.from_pretrained(model)
    seen: Message = {"role": "tool", "content": "Products\nMade by Acme"}
    lesson = Phase(name="browse", data_seed="", num_steps=100, num_episodes=64, batch_size=4)
    data = []
    for task in web_tasks(1, lesson.num_episodes):
        first = [*task.messages, call("browse", url=f"{url}/")]
        both = [*first, seen, call("submit_answer", answer="Acme")]
        turns = [(ids(both[:end], OPENING), ids(both[: end + 1])) for end in (len(first) - 1, len(both) - 1)]
        data.append(Example(ids(both), [i for asked, said in turns for i in range(len(asked), len(said))]))
    pad_id, _ = tokenizer.convert_tokens_to_ids([PAD, END])
    train(student, data, lesson, pad_id=pad_id, seed=0, progress=print)
    student.save_pretrained(model)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.suite == "browser"])
async def test_a_file_of_configs_trains_two_steps(name: str, world: Web, tmp_path: Path) -> None:
    world.answers["/"] = products
    address = world.url.removeprefix("http://")
    CASES[name].prepare(tmp_path)
    teach_to_browse(tmp_path / "student", world.url)
    lines = await asyncio.to_thread(train_case, name, tmp_path, timeout_s=850, address=address)
    assert all(line["tool/calls_per_episode"] > 0 for line in lines)
    assert world.hits.count(f"GET {address} /") == 1, "one visitor, who records"
    [page] = [page for page in PageStore(tmp_path / "pages") if page.url == f"{world.url}/"]
    assert "Made by Acme" in (page.text or page.body)
