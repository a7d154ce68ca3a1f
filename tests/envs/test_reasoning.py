"""Single-turn prompts, GSM8K, and reward functions."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import envs
from envs.reasoning import answer_of, grade_answer
from envs.rewards import RewardArgs, RewardError, grader_of, reward
from envs.types import AssistantMessage, StopReason, Task
from tools.types import ToolCall


def task(answer: Any, **more: Any) -> Task:
    return Task(id="t", messages=({"role": "user", "content": "?"},), metadata={"answer": answer}, **more)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48 / 2 = 24, so 72.\n#### 72", 72),
        ("#### 1\nno: #### 1,234.50", 1234.5),
        (r"so \boxed{18} and not 3", 18),
        ("She makes $18.", 18),
        ("It takes 3 apples", 3),
        ("#### -7 dollars", -7),
        ("#### five", None),
        ("no number", None),
    ],
)
def test_the_answer_of_a_text(text: str, answer: float | None) -> None:
    assert answer_of(text) == answer


@pytest.mark.parametrize(
    ("gold", "said", "right"),
    [
        ("72", "#### 72.0", 1),
        ("72", "#### 73", 0),
        ("1800", "so $1,800", 1),
        ("Paris", "It is paris.", 1),
        ("Paris", "Lyon", 0),
    ],
)
def test_grading(gold: str, said: str, right: float) -> None:
    assert grade_answer(task(gold), {}, [{"role": "assistant", "content": said}]) == {"success": right}
    assert grade_answer(task(gold), {}, []) == {"success": 0}


def test_an_answer_that_is_not_known_is_not_graded() -> None:
    assert grade_answer(task(None), {}, [{"role": "assistant", "content": "5"}]) == {}


def test_reasoning_is_one_turn() -> None:
    env = envs.make("reasoning", tasks=[task("5")], skip_verification=False)

    async def play() -> dict[str, float]:
        await env.areset()
        outcome = await env.astep(AssistantMessage(content="2 + 3 is 5"))
        assert outcome.info["stop_reason"] is StopReason.LAST_TOOL
        return await env.verify()

    assert asyncio.run(play()) == {"success": 1.0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, number in (("train", 3), ("test", 2)):
        rows = [{"question": f"What is {i} + 1?", "answer": f"<<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_gsm8k_with_a_calculator(data: Path) -> None:
    env = envs.make("gsm8k", data=str(data), calculator=True, skip_verification=False)
    assert [len(env.default_tasks(split)) for split in ("train", "eval", "test")] == [3, 2, 2]
    assert len(env.default_tasks("train", 1)) == 1
    assert env.default_tasks("train")[0].messages[0]["role"] == "system"
    assert [spec.name for spec in env.tool_specs] == ["calculator"]

    async def play() -> dict[str, float]:
        await env.areset(options={"task": env.default_tasks("train")[2]})
        call = ToolCall(id="1", name="calculator", arguments={"expression": "2 + 1"}, raw="")
        outcome = await env.astep(AssistantMessage(content="", tool_calls=(call,)))
        assert outcome.observation[0]["content"] == "3"
        outcome = await env.astep(AssistantMessage(content="#### 3"))
        assert outcome.info["stop_reason"] is StopReason.LAST_TOOL
        return await env.verify()

    assert asyncio.run(play()) == {"success": 1.0}
    assert envs.make("gsm8k", data=str(data)).tool_specs == ()
    assert envs.make("gsm8k", data=str(data), system="").default_tasks("train")[0].messages[0]["role"] == "user"
    with pytest.raises(envs.registry.RegistryError, match="must be a folder"):
        envs.make("gsm8k", data=str(data / "train.jsonl"))


# Reward functions


@reward
def short(messages: Any) -> float:
    return float(len(messages[-1]["content"]) < 10)


@reward(precondition=True)
async def polite(args: RewardArgs, messages: Any) -> float:
    return float(args.metadata["word"] in messages[-1]["content"])


def grade(rewards: Any, given: Task, said: str) -> dict[str, float]:
    return asyncio.run(grader_of(rewards)(given, {}, [{"role": "assistant", "content": said}]))  # type: ignore[arg-type]


def test_rewards_by_name_and_their_headline() -> None:
    given = Task(id="t", messages=({"role": "user", "content": "?"},), metadata={"word": "please"})
    assert grade([short, polite], given, "please") == {"short": 1.0, "polite": 1.0, "success": 1.0}
    assert grade([short, polite], given, "no") == {"short": 1.0, "polite": 0.0, "success": 0.0}
    assert grade([short, polite], given, "please, if it may be") == {"short": 0.0, "polite": 1.0, "success": 0.5}
    only = Task(id="t", messages=given.messages, metadata=given.metadata, rewards=("short",))
    assert grade([short, polite], only, "no") == {"short": 1.0, "success": 1.0}
    other = Task(id="t", messages=given.messages, rewards=("long",))
    with pytest.raises(RewardError, match="'long'; there are short, polite"):
        grade([short, polite], other, "no")


def test_a_parameter_that_there_is_not() -> None:
    with pytest.raises(RewardError, match="wants 'episode'"):

        @reward
        def bad(episode: Any) -> float:
            return 0.0


def test_rewards_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    (folder / "rewards.py").write_text(
        "from envs.rewards import reward\n@reward\ndef loud(messages): return float('!' in messages[-1]['content'])\n"
    )
    env = envs.make(str(folder), skip_verification=False)

    async def play() -> dict[str, float]:
        await env.areset(options={"task": env.default_tasks()[0]})
        await env.astep(AssistantMessage(content="yes!"))
        return await env.verify()

    assert asyncio.run(play()) == {"loud": 1.0, "success": 1.0}
    (folder / "rewards.py").write_text("x = 1\n")
    with pytest.raises(envs.registry.RegistryError, match="declares no reward"):
        asyncio.run(grade_of(envs.make(str(folder), skip_verification=False)))


async def grade_of(env: Any) -> dict[str, float]:
    await env.areset(options={"task": env.default_tasks()[0]})
    await env.astep(AssistantMessage(content="yes!"))
    found: dict[str, float] = await env.verify()
    return found
