"""Writes a small environment that works, to be changed into one's own: `python -m envs new NAME`."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")

TOOLS = '''"""The tools of this environment. Of a tool, a model reads its name, its docstring and its type hints."""

from typing import Any

from tools.tool import State, tool
from tools.types import ToolErrorKind, ToolFailure

PRICES = {"apple": 3, "bread": 4, "cheese": 9, "milk": 2, "pear": 5}


@tool(parallel_safe=True, idempotent=True)
async def price(item: str) -> int:
    """Look up the price of one item.

    Args:
        item: name of the item, such as apple.
    """
    if item not in PRICES:
        raise ToolFailure(f"no item {item!r}; there are {', '.join(PRICES)}", ToolErrorKind.NOT_FOUND)
    return PRICES[item]


@tool(ends_episode=True)
async def submit_answer(answer: str, *, state: State) -> str:
    """Submit the answer. This ends the task."""
    state["answer"] = answer
    return "submitted"


def grade(task: Any, state: dict[str, Any], messages: Any) -> dict[str, float]:
    """Called after an episode, and only where skip_verification is off (evaluation)."""
    return {"success": float(state.get("answer", "").strip() == task.metadata["answer"])}
'''

TEST = '''"""Plays an episode and checks the contract: `python -m pytest FOLDER`."""

from pathlib import Path

import envs
from envs.check import check_environment
from envs.types import AssistantMessage, StopReason
from tools.types import ToolCall

FOLDER = str(Path(__file__).resolve().parents[1])


def call(name: str, **arguments: str) -> AssistantMessage:
    return AssistantMessage(content="", tool_calls=(ToolCall(id="c0", name=name, arguments=arguments, raw=""),))


def test_an_episode() -> None:
    env = envs.make(FOLDER, skip_verification=False)
    task = env.default_tasks()[0]
    env.reset(seed=0, options={"task": task})
    observation, *_ = env.step(call("price", item="apple"))
    assert observation[0]["content"] == "3"
    *_, terminated, _, info = env.step(call("submit_answer", answer=task.metadata["answer"]))
    assert terminated
    assert info["stop_reason"] is StopReason.ANSWERED
    assert env.grader()(task, env.state, env.messages) == {"success": 1.0}


def test_the_contract() -> None:
    assert check_environment(FOLDER).findings == []
'''

PRICES = {"apple": 3, "bread": 4, "cheese": 9, "milk": 2, "pear": 5}
"""As in TOOLS."""
NUM_EVAL = 10


class NewError(Exception):
    """The folder cannot be written; the message says why."""


def write_environment(name: str, parent: Path) -> Path:
    """Write `parent/name` with tools.py, train.jsonl, eval.jsonl and tests/. All of it appears at once, or nothing.

    Raises:
        NewError: a bad name, or something is there already.
    """
    if not NAME.fullmatch(name):
        raise NewError(f"bad name {name!r}: a letter, then letters, digits, '_' and '-', at most 64 in all")
    folder = parent / name
    if folder.exists():
        raise NewError(f"{folder} exists already; nothing was written")
    parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent))
    try:
        rows = list(_rows())
        _write(building / "tools.py", TOOLS)
        _write(building / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows[:-NUM_EVAL]))
        _write(building / "eval.jsonl", "".join(json.dumps(row) + "\n" for row in rows[-NUM_EVAL:]))
        # Not beside tools.py: pytest puts the folder of a test on the path, and our package `tools` would be hidden.
        _write(building / "tests" / f"test_{name.replace('-', '_')}.py", TEST)
        building.chmod(0o755)
        os.rename(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return folder


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="\n")


def _rows() -> Iterator[dict[str, Any]]:
    """Task rows (docs/formats.md): every pair of items in two amounts, in an order that mixes them."""
    items = sorted(PRICES)
    pairs = [(a, b) for a in items for b in items if a < b]
    for first_count, second_count in ((1, 2), (3, 1), (2, 4), (5, 3)):
        for first, second in pairs:
            question = f"What is the price of {first_count} x {first} and {second_count} x {second} together?"
            total = first_count * PRICES[first] + second_count * PRICES[second]
            yield {
                "messages": [
                    {"role": "system", "content": "Look up prices with the tool price, then call submit_answer once."},
                    {"role": "user", "content": question},
                ],
                "metadata": {"answer": str(total)},
                "id": f"{first}-{first_count}-{second}-{second_count}",
            }
