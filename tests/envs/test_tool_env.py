"""`ToolEnv`: budgets, endings, malformed calls, verification, order of calls, late results."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gymnasium.error import ResetNeeded

from envs.dataset import write_tasks
from envs.tool_env import EnvSetupError, Grader, ToolEnv
from envs.types import AssistantMessage, Limits, Message, StepOutcome, StopReason, Task
from tools.tool import Metadata, State, Tool, ToolContractError, tool
from tools.types import ToolCall, ToolErrorKind

TASK = Task(id="t", messages=({"role": "user", "content": "Begin."},), metadata={"answer": "5"})
OTHER = Task(id="u", messages=({"role": "user", "content": "Again."},), metadata={"answer": "6"})


class Sample(ToolEnv):
    """Adds numbers, and waits where it is told to."""

    def tools(self) -> Sequence[Tool]:
        return (self.add, self.note, self.wait, self.lost, self.submit)

    def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
        return (TASK, OTHER)[:num_tasks]

    async def on_reset(self, task: Task) -> None:
        self.opened = asyncio.Event()
        self.state["drawn"] = int(self.np_random.integers(1000))

    @tool
    async def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    @tool
    async def note(self, text: str, *, state: State, metadata: Metadata) -> str:
        """Remember a text."""
        state.setdefault("notes", []).append(text)
        return str(metadata["answer"])

    @tool
    async def wait(self, *, state: State) -> str:
        """Wait for the test."""
        await self.opened.wait()
        state["late"] = True
        return "waited"

    @tool
    async def lost(self) -> list[Any]:
        """Break the contract."""
        return [object()]

    @tool(ends_episode=True)
    async def submit(self, answer: str, *, state: State) -> str:
        """Submit the answer."""
        state["answer"] = answer
        return "submitted"

    def grader(self) -> Grader:
        return lambda task, state, messages: {"success": float(state.get("answer") == task.metadata["answer"])}


class Ungradable(Sample):
    def grader(self) -> Grader:
        raise AssertionError("a grader was built")


def call(name: str, index: int = 0, **arguments: Any) -> ToolCall:
    return ToolCall(id=f"c{index}", name=name, arguments=arguments, raw="")


def bad(index: int = 0, why: str = "no JSON") -> ToolCall:
    return ToolCall(id=f"c{index}", name="", arguments=None, raw="{", parse_error=why)


def says(*calls: ToolCall, content: str = "") -> AssistantMessage:
    return AssistantMessage(content=content, tool_calls=calls)


ADD = says(call("add", a=2, b=3))
TALK = says(content="Well.")


async def begun(task: Task = TASK, kind: type[ToolEnv] = Sample, **limits: Any) -> ToolEnv:
    env = kind(limits=Limits(**limits))
    await env.areset(seed=0, options={"task": task})
    return env


async def play(env: ToolEnv, *actions: AssistantMessage) -> StepOutcome:
    outcome = None
    for action in actions:
        outcome = await env.astep(action)
    assert outcome is not None
    return outcome


# Budgets


async def test_turns() -> None:
    env = await begun(max_turns=2)
    first = await env.astep(ADD)
    assert first.info["stop_reason"] is None
    assert first.info["budget"] == {"turns": 1, "tool_calls": None, "parse_errors": 3}
    second = await env.astep(ADD)
    assert second.info["stop_reason"] is StopReason.MAX_TURNS
    assert (second.terminated, second.truncated) == (False, True)
    assert second.observation[0]["content"] == "5"  # the last call ran


async def test_calls() -> None:
    env = await begun(max_tool_calls=2)
    assert (await env.astep(ADD)).info["budget"]["tool_calls"] == 1
    outcome = await env.astep(says(call("add", 0, a=1, b=1), call("add", 1, a=2, b=2)))
    assert outcome.info["stop_reason"] is StopReason.MAX_TOOL_CALLS
    ran, refused = outcome.info["tool_results"]
    assert ran.content == "2"
    assert refused.error.kind is ToolErrorKind.BUDGET
    assert refused.call_id == "c1"


async def test_calls_of_one_tool() -> None:
    env = await begun(max_calls_per_tool={"add": 1})
    went_on = (await play(env, ADD, says(call("note", text="x")))).info
    assert went_on["stop_reason"] is None
    assert went_on["budget"]["tool_calls[add]"] == 0
    outcome = await env.astep(ADD)
    assert outcome.info["stop_reason"] is StopReason.TOOL_BUDGET
    assert outcome.observation[0]["content"] == "budget: no calls left (tool_budget)"


async def test_wrong_calls_are_counted() -> None:
    env = await begun(max_tool_calls=2)
    wrong = says(call("add", a="two"))
    unknown = says(call("no_such_tool"))
    assert (await play(env, wrong, unknown, ADD)).info["stop_reason"] is StopReason.MAX_TOOL_CALLS


async def test_calls_of_a_tool_outside_the_task_are_counted() -> None:
    env = await begun(Task(id="x", messages=TASK.messages, tools=("add",)), max_tool_calls=1)
    note = says(call("note", text="x"))
    assert (await play(env, note, note)).info["stop_reason"] is StopReason.MAX_TOOL_CALLS


async def test_an_answer_goes_before_a_spent_budget() -> None:
    env = await begun(max_turns=1, max_tool_calls=1)
    outcome = await env.astep(says(call("submit", 0, answer="5"), call("add", 1, a=1, b=1)))
    assert outcome.info["stop_reason"] is StopReason.ANSWERED
    assert outcome.terminated


async def test_nothing_runs_with_no_budget_at_all() -> None:
    env = await begun(max_tool_calls=0)
    outcome = await env.astep(says(call("note", text="x")))
    assert outcome.info["stop_reason"] is StopReason.MAX_TOOL_CALLS
    assert "notes" not in env.state


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_turns": 0},
        {"max_tool_calls": -1},
        {"max_calls_per_tool": {"add": -1}},
        {"max_parse_errors": -1},
        {"timeout_s": 0.0},
        {"timeout_s": float("nan")},
        {"max_episode_tokens": 0},
        {"termination_policy": "never"},
        {"on_parse_error": "ignore"},
    ],
)
def test_wrong_limits(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"Limits\.{next(iter(wrong))}"):
        Limits(**wrong)


def test_a_budget_for_an_unknown_tool() -> None:
    with pytest.raises(EnvSetupError, match="'ad', which Sample does not have; did you mean 'add'"):
        Sample(limits=Limits(max_calls_per_tool={"ad": 3}))
    with pytest.raises(EnvSetupError, match="its tools: none"):
        ToolEnv(limits=Limits(max_calls_per_tool={"add": 3}))


# Endings


async def test_an_ending_tool() -> None:
    env = await begun()
    outcome = await env.astep(says(call("submit", 0, answer="5"), call("note", 1, text="x")))
    assert (outcome.terminated, outcome.truncated) == (True, False)
    assert outcome.info["stop_reason"] is StopReason.ANSWERED
    assert [result.error and result.error.kind for result in outcome.info["tool_results"]] == [
        None,
        ToolErrorKind.CANCELLED,
    ]
    assert "notes" not in env.state


async def test_an_ending_tool_that_fails_ends_nothing() -> None:
    env = await begun()
    outcome = await env.astep(says(call("submit", answer=5)))
    assert outcome.info["stop_reason"] is None
    assert "answer" in outcome.observation[0]["content"]


async def test_last_tool() -> None:
    outcome = await play(await begun(), ADD, TALK)
    assert outcome.info["stop_reason"] is StopReason.LAST_TOOL
    assert outcome.terminated
    assert outcome.observation == ()


async def test_max_turns_policy_asks_on() -> None:
    env = await begun(termination_policy="max_turns", max_turns=3)
    outcome = await env.astep(TALK)
    assert outcome.info["stop_reason"] is None
    assert outcome.observation == ({"role": "user", "content": "Go on. Call a tool."},)
    assert (await play(env, ADD, TALK)).info["stop_reason"] is StopReason.MAX_TURNS


@pytest.mark.parametrize("task", [TASK, Task(messages=TASK.messages, tools=())])
async def test_without_tools_an_answer_is_the_last(task: Task) -> None:
    env = await begun(task, kind=ToolEnv if task is TASK else Sample, termination_policy="max_turns")
    assert (await env.astep(TALK)).info["stop_reason"] is StopReason.LAST_TOOL


async def test_own_words_to_a_message_without_a_call() -> None:
    class Asking(Sample):
        def on_no_call(self, action: AssistantMessage) -> Message:
            return {"role": "user", "content": f"You said {action.content}"}

    outcome = await (await begun(kind=Asking, termination_policy="max_turns")).astep(TALK)
    assert outcome.observation[0]["content"] == "You said Well."


# Malformed calls


async def test_a_malformed_call_is_answered_and_counted() -> None:
    env = await begun()
    outcome = await env.astep(says(bad(0, "line 1: expected a comma"), call("add", 1, a=2, b=3)))
    assert [message["content"] for message in outcome.observation] == ["malformed_call: line 1: expected a comma", "5"]
    assert outcome.info["num_parse_errors"] == 1
    assert outcome.info["stop_reason"] is None  # and not "no call"
    assert outcome.info["budget"]["parse_errors"] == 2


async def test_a_malformed_call_alone_is_not_no_call() -> None:
    assert (await (await begun()).astep(says(bad()))).info["stop_reason"] is None


async def test_more_malformed_calls_than_allowed() -> None:
    env = await begun(max_parse_errors=2)
    assert (await play(env, says(bad()), says(bad()))).info["stop_reason"] is None
    outcome = await env.astep(says(bad()))
    assert outcome.info["stop_reason"] is StopReason.PARSE_ERROR
    assert outcome.truncated


async def test_the_stop_policy() -> None:
    outcome = await (await begun(on_parse_error="stop")).astep(says(bad()))
    assert outcome.info["stop_reason"] is StopReason.PARSE_ERROR
    assert outcome.observation[0]["content"].startswith("malformed_call")


@pytest.mark.parametrize("policy", ["mask", "train"])
async def test_the_other_policies_go_on(policy: Any) -> None:
    assert (await (await begun(on_parse_error=policy)).astep(says(bad()))).info["stop_reason"] is None


# Tools of the task, state, order


async def test_tools_of_the_task() -> None:
    env = await begun(Task(id="x", messages=TASK.messages, tools=("add", "submit")))
    assert [spec.name for spec in env.tool_specs] == ["add", "submit"]
    outcome = await env.astep(says(call("note", 0, text="x"), call("add", 1, a=2, b=3)))
    assert [message["content"] for message in outcome.observation] == [
        "unknown_tool: note cannot be used in this task",
        "5",
    ]
    await env.areset(options={"task": TASK})
    assert len(env.tool_specs) == 5


async def test_a_task_with_unknown_tools() -> None:
    with pytest.raises(ValueError, match=r"task 'x' names tools that .* has not: \['fly'\]"):
        await begun(Task(id="x", messages=TASK.messages, tools=("add", "fly")))


async def test_one_result_a_call_in_order() -> None:
    env = await begun(max_calls_per_tool={"add": 1})
    calls = (bad(0), call("add", 1, a=1, b=1), call("nope", 2), call("add", 3, a=1, b=1), call("note", 4, text="x"))
    outcome = await env.astep(says(*calls))
    assert [message["tool_call_id"] for message in outcome.observation] == ["c0", "c1", "c2", "c3", "c4"]
    words = [message["content"].split(":")[0] for message in outcome.observation]
    assert words == ["malformed_call", "2", "unknown_tool", "budget", "5"]


async def test_state_is_of_the_episode() -> None:
    env = await begun()
    await env.astep(says(call("note", text="x")))
    assert env.state["notes"] == ["x"]
    await env.areset(options={"task": TASK})
    assert "notes" not in env.state


async def test_messages_are_the_dialogue() -> None:
    env = await begun()
    await play(env, AssistantMessage(content="", reasoning="2 + 3", tool_calls=ADD.tool_calls), TALK)
    assert [message["role"] for message in env.messages] == ["user", "assistant", "tool", "assistant"]
    assert env.messages[1]["reasoning_content"] == "2 + 3"


async def test_what_was_observed_is_a_copy() -> None:
    env = Sample()
    observation, _ = await env.areset(options={"task": TASK})
    observation[0]["content"] = "changed"
    assert TASK.messages[0]["content"] == "Begin."
    assert env.messages[0]["content"] == "Begin."


# Resets


async def test_step_before_reset() -> None:
    env = Sample()
    with pytest.raises(ResetNeeded, match="before reset"):
        await env.astep(TALK)
    with pytest.raises(ResetNeeded, match="call reset first"):
        _ = env.task


async def test_an_instance_is_used_again_after_the_end() -> None:
    env = await begun(max_tool_calls=1, max_turns=2)
    await play(env, ADD, TALK)
    with pytest.raises(ResetNeeded, match="has ended"):
        await env.astep(TALK)
    await env.areset(options={"task": OTHER})
    assert env.task is OTHER
    outcome = await env.astep(ADD)
    assert outcome.info["budget"] == {"turns": 1, "tool_calls": 0, "parse_errors": 3}


async def test_seeds() -> None:
    async def draws(seed: int) -> list[Any]:
        env = Sample()
        drawn = []
        await env.areset(seed=seed)
        for _ in range(8):
            drawn.append((env.task.id, env.state["drawn"]))
            await env.areset()
        return drawn

    assert await draws(1) == await draws(1)
    assert await draws(1) != await draws(2)
    assert {task for task, _ in await draws(1)} == {"t", "u"}


async def test_tasks_given(tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks.jsonl", [OTHER])
    for tasks in (tmp_path / "tasks.jsonl", str(tmp_path / "tasks.jsonl"), [OTHER]):
        _, info = await Sample(tasks=tasks).areset(seed=0)
        assert info["task_id"] == "u"


async def test_no_tasks_at_all() -> None:
    with pytest.raises(ValueError, match=r"'ToolEnv' has no tasks of its own"):
        await ToolEnv().areset(seed=0)
    with pytest.raises(TypeError, match=r"must be an envs\.types\.Task, found dict"):
        await ToolEnv().areset(options={"task": {"messages": []}})


async def test_a_reset_that_failed_leaves_nothing_to_step() -> None:
    class Failing(Sample):
        async def on_reset(self, task: Task) -> None:
            raise OSError("no page store")

    env = Failing()
    with pytest.raises(OSError, match="no page store"):
        await env.areset(seed=0)
    with pytest.raises(ResetNeeded):
        await env.astep(TALK)


async def test_late_results_reach_no_later_episode() -> None:
    env = await begun()
    assert isinstance(env, Sample)
    opened = env.opened
    waiting = asyncio.create_task(env.astep(says(call("wait"))))
    await asyncio.sleep(0.01)
    with pytest.raises(ResetNeeded, match="still running"):
        await env.astep(TALK)
    await env.areset(options={"task": OTHER})
    opened.set()
    env.opened.set()
    with pytest.raises(ResetNeeded, match="reset while this step ran"):
        await waiting
    assert "late" not in env.state
    assert env.messages == list(OTHER.messages)
    assert (await env.astep(ADD)).info["budget"]["turns"] == 9


async def test_what_is_no_action_changes_nothing() -> None:
    env = await begun()
    for wrong in ("hello", {"content": "hello"}, None):
        with pytest.raises(TypeError, match=rf"AssistantMessage, found {type(wrong).__name__}"):
            await env.astep(wrong)  # type: ignore[arg-type]
    outcome = await env.astep(ADD)
    assert outcome.info["budget"]["turns"] == 9
    assert len(env.messages) == len(TASK.messages) + 2


async def test_a_tool_that_writes_into_the_metadata_leaves_the_task_alone() -> None:
    @tool
    async def bump(*, metadata: Metadata) -> int:
        """Count."""
        metadata["seen"].append(1)
        return len(metadata["seen"])

    task = Task(id="m", messages=TASK.messages, metadata={"seen": []})

    class Writing(ToolEnv):
        def tools(self) -> Sequence[Tool]:
            return (bump,)

    env = Writing()
    for _ in range(2):  # the same seed and task: the same episode
        await env.areset(seed=1, options={"task": task})
        counted = [(await env.astep(says(call("bump")))).observation[0]["content"] for _ in range(2)]
        assert counted == ["1", "2"]
    assert task.metadata == {"seen": []}


async def test_a_reset_within_a_reset_is_refused_to_the_first() -> None:
    class Slow(Sample):
        number = 0

        async def on_reset(self, task: Task) -> None:
            self.number += 1
            await asyncio.sleep(0.05 if self.number == 1 else 0)
            await super().on_reset(task)

    env = Slow()
    first = asyncio.create_task(env.areset(options={"task": TASK}))
    await asyncio.sleep(0)
    await env.areset(options={"task": OTHER})
    with pytest.raises(ResetNeeded, match="reset again while this reset ran"):
        await first
    assert env.task is OTHER
    assert (await env.astep(ADD)).info["stop_reason"] is None


async def test_a_cancelled_step_ends_the_episode() -> None:
    env = await begun()
    waiting = asyncio.create_task(env.astep(says(call("wait"))))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(ResetNeeded, match="has ended"):
        await env.astep(TALK)
    await env.areset(options={"task": TASK})
    assert (await env.astep(ADD)).info["stop_reason"] is None


async def test_a_broken_tool_is_a_bug() -> None:
    with pytest.raises(ToolContractError, match="'lost'"):
        await (await begun()).astep(says(call("lost")))


async def test_episodes_of_two_instances_do_not_meet() -> None:
    one, other = await begun(), await begun(OTHER)
    await asyncio.gather(one.astep(says(call("note", text="1"))), other.astep(says(call("note", text="2"))))
    assert one.state["notes"] == ["1"]
    assert other.state["notes"] == ["2"]
    assert other.messages[-1]["content"] == "6"


# Verification


async def test_skip_verification_builds_no_grader() -> None:
    env = await begun(kind=Ungradable)
    await env.astep(says(call("submit", answer="5")))
    with pytest.raises(RuntimeError, match="skip_verification"):
        await env.verify()


async def test_verification() -> None:
    env = Sample(skip_verification=False)
    for answer, success in (("5", 1.0), ("7", 0.0)):
        await env.areset(options={"task": TASK})
        outcome = await env.astep(says(call("submit", answer=answer)))
        assert outcome.reward == 0.0
        assert await env.verify() == {"success": success}


async def test_no_grader_to_build() -> None:
    env = ToolEnv(skip_verification=False)
    await env.areset(options={"task": TASK})
    with pytest.raises(NotImplementedError, match="skip_verification = true"):
        await env.verify()


# Environments that talk, and that know when it is enough


class Talking(Sample):
    """Completes its opening, answers two replies and has enough of the third; three sums are enough, too."""

    converses = True

    async def on_reset(self, task: Task) -> None:
        self.messages[-1] = {"role": "user", "content": f"{task.messages[-1]['content']} Think."}

    async def on_no_call(self, action: AssistantMessage) -> Message | None:  # type: ignore[override]
        said = sum(message["role"] == "assistant" for message in self.messages)
        return {"role": "user", "content": f"And {said}?"} if said < 3 else None

    async def is_over(self) -> bool:
        return sum(message["role"] == "tool" for message in self.messages) >= 3


async def test_an_opening_that_is_known_after_the_reset_only() -> None:
    env = Talking()
    observation, _ = await env.areset(options={"task": TASK})
    assert observation == ({"role": "user", "content": "Begin. Think."},)
    assert TASK.messages == ({"role": "user", "content": "Begin."},)
    observation[0]["content"] = "changed"
    assert env.messages[0]["content"] == "Begin. Think."


@pytest.mark.parametrize("policy", ["last_tool", "max_turns"])
async def test_an_environment_that_answers_replies(policy: Any) -> None:
    env = await begun(kind=Talking, termination_policy=policy)
    first = await env.astep(TALK)
    assert (first.observation, first.info["stop_reason"]) == (({"role": "user", "content": "And 1?"},), None)
    last = await play(env, TALK, TALK)
    assert (last.observation, last.info["stop_reason"]) == ((), StopReason.LAST_TOOL)


async def test_what_it_says_in_the_last_turn() -> None:
    cut = await begun(kind=Talking, max_turns=2)
    outcome = await play(cut, TALK, TALK)
    assert (outcome.observation, outcome.info["stop_reason"]) == ((), StopReason.MAX_TURNS)
    assert cut.messages[-1]["role"] == "assistant"  # nobody would answer a question more
    done = await begun(kind=Talking, max_turns=3)
    assert (await play(done, TALK, TALK, TALK)).info["stop_reason"] is StopReason.LAST_TOOL


async def test_a_rule_of_the_environment_s_own_ends_the_episode() -> None:
    env = await begun(kind=Talking)
    outcome = await play(env, ADD, ADD, ADD)
    assert (outcome.terminated, outcome.info["stop_reason"]) == (True, StopReason.ANSWERED)
    assert outcome.observation[0]["content"] == "5"
    budget = await begun(kind=Talking, max_turns=3)
    assert (await play(budget, ADD, ADD, ADD)).info["stop_reason"] is StopReason.MAX_TURNS  # a budget goes first
