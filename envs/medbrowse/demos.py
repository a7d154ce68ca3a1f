"""Demonstrations: the scripted expert's episodes as messages, many thousand a second.

The answers of the tools come straight from the registry here. A test holds the transcripts equal, character by
character, to those of the same expert in the real environment, whose tools parse HTML.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from urllib.parse import urljoin, urlsplit

from envs.medbrowse.expert import ScriptedExpert
from envs.medbrowse.registry import SITE, Registry, Split
from envs.medbrowse.tasks import MAX_HOPS, QUESTION_TYPES, make_task
from envs.types import Message, Task
from tools.types import ToolCall

MAX_TURNS = 8


def demonstration(
    task: Task, *, error_rate: float = 0.0, rng: random.Random | None = None, max_turns: int = MAX_TURNS
) -> list[Message]:
    """The whole dialogue of one episode, the expert's last call included."""
    registry = Registry.generate(**{"seed": task.metadata["registry"]["seed"], **_options(task)})
    messages: list[Message] = list(task.messages)
    expert = ScriptedExpert(task.messages, error_rate=error_rate, rng=rng)
    new = task.messages
    for _ in range(max_turns):
        action = expert.act(new)
        messages.append(action.to_message())
        call = action.tool_calls[0]
        if call.name == "submit_answer":
            break
        new = ({"role": "tool", "content": answer(registry, call), "tool_call_id": call.id, "name": call.name},)
        messages.extend(new)
    return messages


def demonstrations(
    seed: str | int, *, error_rate: float = 0.0, split: Split = "train", max_hops: int = MAX_HOPS, num_chains: int = 2
) -> Iterator[list[Message]]:
    """Endless; the same for the same arguments."""
    rng = random.Random(f"demonstrations/{seed}")
    number = 0
    while True:
        kind = QUESTION_TYPES[rng.randrange(max_hops)]
        task = make_task(f"demo-{seed}-{number}", kind=kind, split=split, num_chains=num_chains)
        yield demonstration(task, error_rate=error_rate, rng=rng)
        number += 1


def answer(registry: Registry, call: ToolCall) -> str:
    """What the environment's tools answer to a call of the expert."""
    arguments = call.arguments or {}
    if call.name == "browse":
        return registry.pages[urljoin(SITE, arguments["url"])].text
    hits = [
        f"{page.title} {urlsplit(page.url).path}"
        for trial in registry.trials
        if trial.nct_id == arguments["query"]
        for page in (registry.pages[SITE + trial.page], registry.pages[SITE + trial.news_page])
    ]
    return "\n".join(hits) if hits else NO_HITS


NO_HITS = "no results"


def _options(task: Task) -> dict[str, object]:
    return {k: v for k, v in task.metadata["registry"].items() if k != "seed"}
