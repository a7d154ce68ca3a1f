"""A folder as an environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import envs
from envs.dataset import TaskError
from envs.folder import FolderEnv, FolderError, contains_answer
from envs.registry import RegistryError
from envs.types import AssistantMessage, Message, StopReason, Task
from tools.types import ToolCall

TOOLS = '''
from tools.tool import State, tool

@tool
def add(a: int, b: int, *, state: State) -> int:
    """Add two numbers."""
    state["sum"] = a + b
    return a + b

plus = add
'''
ROW: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "metadata": {"answer": "5"}}


def folder(path: Path, tools: str | None = TOOLS, **splits: list[dict[str, Any]]) -> Path:
    path.mkdir(exist_ok=True)
    if tools is not None:
        (path / "tools.py").write_text(tools)
    for split, rows in splits.items():
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(name: str, **arguments: Any) -> AssistantMessage:
    calls = (ToolCall(id="c0", name=name, arguments=arguments, raw=""),)
    return AssistantMessage(content="", tool_calls=calls)


async def test_tools_and_tasks(tmp_path: Path) -> None:
    env = envs.make(str(folder(tmp_path / "adding", train=[ROW, ROW], eval=[ROW])), skip_verification=False)
    assert env.env_id == "adding"
    assert [spec.name for spec in env.tool_specs] == ["add"]
    assert len(env.default_tasks()) == 2
    assert len(env.default_tasks(num_tasks=1)) == 1
    assert len(env.default_tasks("eval")) == 1
    observation, _ = await env.areset(seed=0)
    assert observation[0]["content"] == "What is 2 + 3?"
    outcome = await env.astep(call("add", a=2, b=3))
    assert outcome.observation[0]["content"] == "5"
    assert env.state == {"sum": 5}
    outcome = await env.astep(AssistantMessage(content="It is 5."))
    assert outcome.info["stop_reason"] is StopReason.LAST_TOOL
    assert await env.verify() == {"success": 1.0}


async def test_without_tools_an_episode_is_one_turn(tmp_path: Path) -> None:
    env = FolderEnv(folder(tmp_path / "quiz", tools=None, train=[ROW]))
    await env.areset(seed=0)
    outcome = await env.astep(AssistantMessage(content="5"))
    assert outcome.terminated
    assert outcome.observation == ()


def test_only_tools(tmp_path: Path) -> None:
    env = FolderEnv(folder(tmp_path / "bare"))
    assert env.default_tasks() == ()
    with pytest.raises(ValueError, match="'bare' has no tasks of its own"):
        env.reset(seed=0)


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = folder(tmp_path / "here", train=[ROW])
    monkeypatch.chdir(inside)
    assert envs.make(".").env_id == "here"
    monkeypatch.chdir(tmp_path)
    assert envs.make("./here").env_id == "here"
    with pytest.raises(RegistryError, match=r"write \./here"):
        envs.make("here")
    (tmp_path / "sub").mkdir()
    folder(tmp_path / "sub" / "deep", train=[ROW])
    assert envs.make("sub/deep").env_id == "deep"


async def test_own_grader(tmp_path: Path) -> None:
    tools = TOOLS + '\ndef grade(task, state, messages):\n    return {"success": float(state.get("sum") == 5)}\n'
    env = FolderEnv(folder(tmp_path / "graded", tools=tools, train=[ROW]), skip_verification=False)
    await env.areset(seed=0)
    await env.astep(call("add", a=2, b=3))
    assert await env.verify() == {"success": 1.0}


def test_two_folders_do_not_meet(tmp_path: Path) -> None:
    first = FolderEnv(folder(tmp_path / "a", train=[ROW]))
    second = FolderEnv(folder(tmp_path / "b", tools=TOOLS.replace("add", "sum_up"), train=[ROW]))
    assert [spec.name for spec in (*first.tool_specs, *second.tool_specs)] == ["add", "sum_up"]
    from tools.tool import Tool

    assert isinstance(first.toolbox.tools[0], Tool)


def test_changed_tools_are_read_again(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", train=[ROW])
    FolderEnv(path)
    folder(path, tools=TOOLS.replace("Add two", "Sum two"))  # of the same size, within the same second
    assert FolderEnv(path).tool_specs[0].description == "Sum two numbers."
    assert not (path / "__pycache__").exists()


@pytest.mark.parametrize(
    ("tools", "wanted"),
    [
        ("x = 1\ndef broken(:\n", r"tools\.py:2: SyntaxError"),
        ("x = 1\n\nx.nothing\n", r"tools\.py:3: AttributeError"),
        ("import no_such_module_here\n", r"tools\.py:1: ModuleNotFoundError.*install it"),
        ("raise SystemExit(3)\n", r"tools\.py:1: SystemExit"),
        (
            'from tools.tool import tool\n\n@tool\ndef f(x) -> str:\n    """F."""\n',
            r"tools\.py:3: ToolContractError.*'x' has no type hint",
        ),
        ("x = 1\n", r"tools\.py declares no tool.*from tools\.tool import tool"),
    ],
)
def test_broken_tools_are_located(tmp_path: Path, tools: str, wanted: str) -> None:
    path = folder(tmp_path / "broken", tools=tools, train=[ROW])
    with pytest.raises(FolderError, match=wanted):
        envs.make(str(path))


def test_broken_row_is_located(tmp_path: Path) -> None:
    path = folder(tmp_path / "rows", train=[ROW, {"messages": []}])
    with pytest.raises(TaskError, match=r"train\.jsonl:2"):
        FolderEnv(path).default_tasks()


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"there is nothing.*envs new nowhere"):
        envs.make(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="it is a file"):
        envs.make(str(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FolderError, match=r"needs tools\.py"):
        envs.make(str(tmp_path / "empty"))


def test_unknown_argument(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"'colour'.*takes: path, limits, tasks, skip_verification"):
        envs.make(str(folder(tmp_path / "a", train=[ROW])), colour="red")


@pytest.mark.parametrize(
    ("said", "success"),
    [
        ({"content": "It is 5."}, 1.0),
        ({"content": "It is 15."}, 0.0),
        ({"content": ""}, 0.0),
        ({"content": "", "tool_calls": [{"function": {"name": "submit", "arguments": {"answer": 5}}}]}, 1.0),
    ],
)
def test_contains_answer(said: Any, success: float) -> None:
    task = Task(messages=({"role": "user", "content": "?"},), metadata={"answer": 5})
    answered: Any = {"role": "assistant", **said}
    messages: list[Message] = [*task.messages, answered]
    assert contains_answer(task, {}, messages) == {"success": success}


def test_no_answer_no_grade() -> None:
    assert contains_answer(Task(messages=({"role": "user", "content": "?"},)), {}, []) == {}
