"""`reset` and `step` with and without a running event loop."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from envs.tool_env import ToolEnv
from envs.types import AssistantMessage, StopReason, Task
from tools.tool import Tool, tool

ROOT = Path(__file__).resolve().parents[2]


class Small(ToolEnv):
    def tools(self) -> Sequence[Tool]:
        return (self.where,)

    @tool
    async def where(self) -> str:
        """Name of the thread."""
        return threading.current_thread().name

    def default_tasks(self, split: str = "train", num_tasks: int | None = None) -> Sequence[Task]:
        return (Task(messages=({"role": "user", "content": "hello"},)),)


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_reset_and_step_without_a_loop() -> None:
    env = Small()
    observation, info = env.reset(seed=0)
    assert observation[0]["content"] == "hello"
    assert info["stop_reason"] is None
    _, reward, terminated, truncated, info = env.step(AssistantMessage(content="hi"))
    assert (reward, terminated, truncated) == (0.0, True, False)
    assert info["stop_reason"] is StopReason.LAST_TOOL
    env.close()


def test_all_environments_share_one_thread() -> None:
    before = threading.active_count()
    for _ in range(5):
        Small().reset(seed=0)
    assert threading.active_count() <= before + 1


async def test_a_running_loop_is_refused_with_the_way_out() -> None:
    env = Small()
    with pytest.raises(RuntimeError, match=r"await env\.areset\(\).*envs\.notebook\.enable\(\)"):
        env.reset(seed=0)
    await env.areset(seed=0)
    with pytest.raises(RuntimeError, match="running event loop"):
        env.step(AssistantMessage(content="hi"))
    assert (await env.astep(AssistantMessage(content="hi"))).terminated  # the refused step left no trace


async def test_the_tools_of_a_step_are_refused_it_too() -> None:
    class Inner(Small):
        async def on_reset(self, task: Task) -> None:
            self.step(AssistantMessage(content=""))

    with pytest.raises(RuntimeError, match="running event loop"):
        await Inner().areset(seed=0)


NOTEBOOK = """
import asyncio
import envs.notebook
from envs.tool_env import ToolEnv
from envs.types import AssistantMessage, Task

class Slow(ToolEnv):
    async def on_reset(self, task):
        await asyncio.sleep(0.3)

async def cell():
    envs.notebook.enable()
    ticks = 0
    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.02)
            ticks += 1
    ticking = asyncio.create_task(tick())
    env = Slow(tasks=[Task(messages=({"role": "user", "content": "hello"},))])
    observation, _ = env.reset(seed=0)
    assert observation[0]["content"] == "hello"
    assert ticks > 3, ticks   # the notebook's own loop went on
    assert env.step(AssistantMessage(content="hi"))[2]
    ticking.cancel()
    print("done")

asyncio.run(cell())
"""


def test_enabled_in_a_notebook() -> None:
    done = python(NOTEBOOK)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_enabling_without_a_loop_says_that_it_is_not_needed() -> None:
    code = """
import sys, envs.notebook
try:
    envs.notebook.enable()
except RuntimeError as error:
    print(error, 'nest_asyncio' in sys.modules, envs.notebook.enabled())
"""
    done = python(code)
    assert "no event loop runs here" in done.stdout, done.stderr
    assert done.stdout.endswith("False False\n")


def test_nothing_patches_asyncio_unasked() -> None:
    done = python(
        "import sys, envs, envs.tool_env, envs.background, envs.notebook; print('nest_asyncio' in sys.modules)"
    )
    assert done.stdout == "False\n", done.stderr


INTERRUPTED = """
import asyncio, os, signal, threading, time
from envs.tool_env import ToolEnv
from envs.types import Task

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored

class Hanging(ToolEnv):
    ended = ""
    async def on_reset(self, task):
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            Hanging.ended = "cancelled"
            raise

try:
    Hanging(tasks=[Task(messages=({"role": "user", "content": "hello"},))]).reset(seed=0)
except KeyboardInterrupt:
    time.sleep(0.2)
    print(Hanging.ended)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_stops_the_step() -> None:
    began = time.monotonic()
    done = python(INTERRUPTED)
    assert done.stdout == "cancelled\n", done.stderr
    assert time.monotonic() - began < 30


FORKED = """
import os
from envs.tool_env import ToolEnv
from envs.types import Task
env = ToolEnv(tasks=[Task(messages=({"role": "user", "content": "hello"},))])
env.reset(seed=0)
child = os.fork()
if child == 0:
    print(env.reset(seed=0)[0][0]["content"], flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_a_loop_of_its_own() -> None:
    done = python(FORKED)
    assert done.stdout == "hello\n", done.stderr
