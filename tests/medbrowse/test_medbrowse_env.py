"""The environment, through its own tools, and the expert that plays it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import envs
from envs.medbrowse.demos import demonstration
from envs.medbrowse.env import MedBrowseEnv
from envs.medbrowse.expert import ScriptedExpert
from envs.medbrowse.tasks import QUESTION_TYPES, QuestionType, make_tasks
from envs.tool_env import ToolEnv
from envs.types import AssistantMessage, Limits, Message, StopReason, Task
from tools.pages import Page, write_pages
from tools.types import ToolCall


async def play(env: ToolEnv, task: Task, expert: ScriptedExpert) -> StopReason:
    observation, _ = await env.areset(options={"task": task})
    while True:
        outcome = await env.astep(expert.act(observation))
        observation = outcome.observation
        if outcome.terminated or outcome.truncated:
            return StopReason(outcome.info["stop_reason"])


def call(name: str, **arguments: Any) -> AssistantMessage:
    return AssistantMessage(content="", tool_calls=(ToolCall(id="c", name=name, arguments=arguments, raw=""),))


def without_ids(messages: Sequence[Message]) -> list[tuple[Any, ...]]:
    return [(m["role"], m["content"], [c["function"] for c in m.get("tool_calls", ())]) for m in messages]


@pytest.mark.parametrize("kind", QUESTION_TYPES, ids=lambda kind: kind.name)
async def test_the_expert_solves_every_task_and_demonstrations_are_its_transcripts(kind: QuestionType) -> None:
    env = envs.make("medbrowse", skip_verification=False)
    tasks = make_tasks(1, 150, split="test", kinds=[kind]) + make_tasks(2, 50, kinds=[kind], num_chains=6)
    for task in tasks:
        assert await play(env, task, ScriptedExpert(task.messages)) is StopReason.ANSWERED
        assert await env.verify() == {"success": 1.0, "answered": 1.0}
        told = demonstration(task)
        assert without_ids(told) == without_ids(env.messages[: len(told)])


async def test_a_faulty_expert_fails_often_and_its_demonstrations_are_its_transcripts() -> None:
    env = envs.make("medbrowse", skip_verification=False, limits=Limits(max_turns=8))
    successes = 0.0
    for number, task in enumerate(make_tasks(4, 150)):
        await play(env, task, ScriptedExpert(task.messages, error_rate=0.3, rng=random.Random(number)))
        successes += (await env.verify())["success"]
        told = demonstration(task, error_rate=0.3, rng=random.Random(number))
        assert without_ids(told) == without_ids(env.messages[: len(told)])
    assert 0.05 < successes / 150 < 0.6


async def test_pages_are_found_by_name_and_read_in_parts_of_the_text() -> None:
    env = MedBrowseEnv(skip_verification=False)
    task = make_tasks(0, 1)[0]
    await env.areset(options={"task": task})
    hits = (await env.astep(call("search", query=task.metadata["trial"]))).observation[0]["content"].splitlines()
    assert hits[0].startswith(f"{task.metadata['trial']} /p")
    assert hits[1].startswith("News on ")
    page = (await env.astep(call("browse", url=hits[0].split()[-1]))).observation[0]["content"]
    assert f"- more effective: {task.metadata['answer']}" in page
    found = (await env.astep(call("find", text="less"))).observation[0]["content"]
    assert found.splitlines()[0].startswith("- less effective: ")
    missing = (await env.astep(call("browse", url="/nowhere"))).observation[0]["content"]
    assert missing.startswith("not_found")
    last = await env.astep(call("submit_answer", answer="wrong"))
    assert last.terminated
    assert (await env.verify())["success"] == 0.0


async def test_an_episode_without_an_answer_fails_and_nothing_is_graded_unasked() -> None:
    task = make_tasks(0, 1)[0]
    env = MedBrowseEnv(skip_verification=False, limits=Limits(max_turns=1))
    await env.areset(options={"task": task})
    assert (await env.astep(call("search", query="x"))).info["stop_reason"] is StopReason.MAX_TURNS
    assert await env.verify() == {"success": 0.0, "answered": 0.0}
    unverified = MedBrowseEnv()
    await unverified.areset(options={"task": task})
    with pytest.raises(RuntimeError, match="skip_verification"):
        await unverified.verify()


async def test_stored_pages_serve_any_tasks(tmp_path: Path) -> None:
    html = (
        "<html><head><title>Does it help?</title></head><body><nav>Menu</nav>"
        "<main><h1>Does it help?</h1><p>{}</p></main></body></html>"
    )
    pages = [
        Page(url="https://papers.example/1/", body=html.format("It did.")),
        Page(url="https://papers.example/2/", body=html.replace("Does it help", "Is it safe").format("Nobody knows.")),
    ]
    write_pages(tmp_path / "pages.jsonl", pages)
    metadata = {"question_type": "pubmedqa", "answer": "yes"}
    task = Task(id="a", messages=({"role": "user", "content": "Does it help?"},), metadata=metadata)
    env = envs.make("medbrowse", pages=str(tmp_path / "pages.jsonl"), skip_verification=False)
    assert env.default_tasks(split="train", num_tasks=3) == ()
    await env.areset(options={"task": task})
    hits = (await env.astep(call("search", query="does it help"))).observation[0]["content"]
    assert hits.splitlines()[0] == "Does it help? /1/"
    assert "It did." in (await env.astep(call("browse", url="/1/"))).observation[0]["content"]
    await env.astep(call("submit_answer", answer="Yes"))
    assert (await env.verify())["success"] == 1.0


async def test_a_foreign_task_is_refused_with_the_remedy() -> None:
    task = Task(id="foreign", messages=({"role": "user", "content": "Hello"},))
    with pytest.raises(ValueError, match=r"foreign.*env_args\.pages"):
        await MedBrowseEnv().areset(options={"task": task})
    with pytest.raises(ValueError, match="not a question"):
        ScriptedExpert(task.messages)


@pytest.mark.parametrize("options", [{"split": "dev"}, {"max_hops": 6}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="medbrowse: "):
        MedBrowseEnv(**options)


def test_own_tasks_of_the_two_splits_differ() -> None:
    env = MedBrowseEnv()
    train, held_out = env.default_tasks(split="train", num_tasks=5), env.default_tasks(split="eval", num_tasks=5)
    assert {task.metadata["registry"]["split"] for task in train} == {"train"}
    assert {task.metadata["registry"]["split"] for task in held_out} == {"test"}
    assert not {task.id for task in train} & {task.id for task in held_out}
