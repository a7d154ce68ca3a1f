"""What `check_environment` finds: each broken environment here breaks one rule."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

import envs
from envs.check import Report, check_environment
from envs.tool_env import Grader, ToolEnv
from envs.types import AssistantMessage, Limits, Message, StepOutcome, Task
from tools.tool import State, Tool, tool

TASKS = tuple(Task(id=f"t{i}", messages=({"role": "user", "content": f"Task {i}"},)) for i in range(3))
_names = (f"check/env{number}" for number in itertools.count())


class Good(ToolEnv):
    def tools(self) -> Sequence[Tool]:
        return (self.echo, self.submit)

    def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
        return TASKS[:num_tasks]

    @tool
    async def echo(self, text: str, *, state: State) -> str:
        """Say it again."""
        state["said"] = text
        return text

    @tool(ends_episode=True)
    async def submit(self, answer: str) -> str:
        """Submit the answer."""
        return "submitted"

    def grader(self) -> Grader:
        return lambda task, state, messages: {"success": 1.0}


def checked(env_class: type[ToolEnv], **options: Any) -> Report:
    name = next(_names)
    envs.register(name, env_class)
    return check_environment(name, **{"num_episodes": 30, **options})


def found(report: Report, check: str) -> str:
    """The messages of the findings of one check; fails where others found something too."""
    assert {finding.check for finding in report.findings} == {check}, report.findings
    assert all(finding.remedy for finding in report.findings)
    return "\n".join(finding.message for finding in report.findings)


def test_a_good_one() -> None:
    report = checked(Good, num_episodes=100)
    assert report.findings == []
    assert report.num_episodes == 100
    assert sum(report.stop_reasons.values()) == 100
    assert {"answered", "last_tool"} <= report.stop_reasons.keys()
    assert report.tools == ["echo", "submit"]
    assert report.num_tasks == 3
    assert report.checks == ["make", "tasks", "schemas", "gymnasium", "determinism", "budgets", "graders", "fuzz"]


def test_the_same_seed_gives_the_same_report() -> None:
    one, other = checked(Good), checked(Good)
    assert one.stop_reasons == other.stop_reasons
    assert checked(Good, seed=1).stop_reasons != one.stop_reasons


def test_one_turn_without_tools() -> None:
    class Quiz(ToolEnv):
        def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
            return TASKS[:num_tasks]

    assert checked(Quiz).findings == []


def test_unknown() -> None:
    assert "no environment 'xyzzy'" in found(check_environment("xyzzy"), "make")


def test_a_constructor_that_raises() -> None:
    class Raising(Good):
        def __init__(self, **kwargs: Any) -> None:
            raise OSError("no such data base")

    assert "OSError: no such data base at test_check.py:" in found(checked(Raising), "make")


def test_a_constructor_without_limits() -> None:
    class Closed(Good):
        def __init__(self) -> None:
            super().__init__()

    assert "unexpected keyword argument 'limits'" in found(checked(Closed), "make")


def test_no_tasks(tmp_path: Path) -> None:
    class Empty(Good):
        def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
            return ()

    assert "no tasks" in found(checked(Empty), "tasks")
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    report = checked(Empty, tasks=file)
    assert report.findings == []
    assert report.num_tasks == 1
    file.write_text("{\n")
    assert "tasks.jsonl:1" in found(checked(Empty, tasks=file), "tasks")


@pytest.mark.parametrize(
    ("tasks", "wanted"),
    [
        ([Task(id="a", messages=({"role": "assistant", "content": "x"},))], "does not end with a user message"),
        ([Task(id="a", messages=TASKS[0].messages, metadata={"when": {1, 2}})], "metadata of task 'a'"),
        ([TASKS[0], TASKS[0]], "'t0' is there 2 times"),
    ],
)
def test_wrong_tasks(tasks: list[Task], wanted: str) -> None:
    class Wrong(Good):
        def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
            return tasks[:num_tasks]

    assert wanted in found(checked(Wrong), "tasks")


def test_tasks_with_unknown_tools() -> None:
    class Wrong(Good):
        def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
            return (Task(id="a", messages=TASKS[0].messages, tools=("fly",)),)

    report = checked(Wrong)
    assert "names unknown tools ['fly']" in report.findings[0].message


def test_num_tasks_is_ignored() -> None:
    class Wrong(Good):
        def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
            return TASKS

    assert "default_tasks('train', num_tasks=1) gave 3 tasks" in found(checked(Wrong), "tasks")


def test_a_schema_that_cannot_be_met() -> None:
    class Wrong(Good):
        def tools(self) -> Sequence[Tool]:
            return (self.look_up,)

        @tool
        async def look_up(self, code: Annotated[str, Field(pattern=r"^N\d{8}$")]) -> str:
            """Look up a code."""
            return code

    assert "tool 'look_up': arguments made from its schema are refused" in found(checked(Wrong), "schemas")


def test_chance_without_a_seed() -> None:
    numbers = itertools.count()

    class Wrong(Good):
        @tool
        async def echo(self, text: str) -> str:
            """Say it again."""
            return f"{next(numbers)}"

    report = checked(Wrong)
    assert "determinism" in {finding.check for finding in report.findings}
    assert "differs under the same seed and actions" in str(report.findings)
    assert "env.np_random" in str(report.findings)


def test_limits_that_are_not_passed_on() -> None:
    class Wrong(Good):
        def __init__(self, *, limits: Limits = Limits(), **kwargs: Any) -> None:  # noqa: B008
            super().__init__(**kwargs)

    messages = found(checked(Wrong), "budgets")
    assert "max_turns: the episode should have stopped with 'max_turns', it stopped with 'last_tool'" in messages
    assert "max_tool_calls: the episode should have stopped with 'max_tool_calls', it went on" in messages


def test_a_tool_that_breaks_its_contract() -> None:
    class Wrong(Good):
        @tool
        async def echo(self, text: str) -> list[Any]:
            """Say it again."""
            return [object()]

    report = checked(Wrong)
    assert "ToolContractError: tool 'echo' returned what is no JSON value" in str(report.findings)


def test_a_step_of_its_own() -> None:
    class Wrong(Good):
        async def astep(self, action: AssistantMessage) -> StepOutcome:
            outcome = await super().astep(action)
            return outcome._replace(observation=outcome.observation[:1], reward=1.0)

    report = checked(Wrong)
    assert "not one tool message a call" in str(report.findings)
    assert "rewards come from verify()" in str(report.findings)


def test_on_no_call_that_raises() -> None:
    class Wrong(Good):
        def on_no_call(self, action: AssistantMessage) -> Message:
            raise KeyError("words")

    assert "KeyError: 'words'" in found(checked(Wrong), "budgets")


@pytest.mark.parametrize(
    ("rewards", "wanted"),
    [(None, "returned None, no dict"), ({"success": 2.0}, "success = 2.0"), ({"score": float("nan")}, "no finite")],
)
def test_graders(rewards: Any, wanted: str) -> None:
    class Wrong(Good):
        def grader(self) -> Grader:
            return lambda task, state, messages: rewards

    assert wanted in found(checked(Wrong), "graders")


def test_a_grader_without_verification() -> None:
    class Wrong(Good):
        async def on_reset(self, task: Task) -> None:
            self._grader = self.grader()

    assert "a grader was built with skip_verification" in found(checked(Wrong), "fuzz")


def test_gymnasiums_warnings_are_findings() -> None:
    class Wrong(Good):
        async def areset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[tuple[Message, ...], dict[str, Any]]:
            return await super().areset(seed=None, options=options)

    assert "gymnasium" in {finding.check for finding in checked(Wrong).findings}
