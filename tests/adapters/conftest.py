"""Environments of verifiers in this process, OpenEnv servers in processes of their own, and a scripted model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_loop.conversation import TokenActor
from agent_loop.policy import ScriptedPolicy
from agent_loop.renderer import Renderer, load_renderer
from agent_loop.rollout import EpisodeJob, run_episode
from agent_loop.types import Episode
from envs.tool_env import ToolEnv
from envs.types import Task
from tests.runs.conftest import save_tokenizer

PACKAGES = Path(__file__).parent / "packages"
SERVERS = Path(__file__).parent / "openenv_servers.py"
START_TIMEOUT_S = 600.0
"""The package imports much: two seconds, on a busy machine minutes."""


@pytest.fixture(scope="session")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return load_renderer(path)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environments of `tests/adapters/packages`, importable as installed ones are."""
    pytest.importorskip("verifiers.v1", reason="verifiers is not installed: make test-adapters")
    monkeypatch.syspath_prepend(str(PACKAGES))


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


async def play(renderer: Renderer, env: ToolEnv, task: Task, *texts: str) -> Episode:
    """One episode through the agent loop, in which the model says these texts, a turn each."""
    ids = [[*renderer.encode(text), renderer.close_id] for text in texts]
    policy = ScriptedPolicy(ids, stop_token_ids=renderer.stop_token_ids)
    actor = TokenActor(renderer, policy)
    return await run_episode(EpisodeJob(task=task), env, actor)


async def play_well(renderer: Renderer, env: ToolEnv, task: Task, *texts: str) -> Episode:
    """`play`, of an episode in which nothing fails."""
    episode = await play(renderer, env, task, *texts)
    assert episode.error is None, episode.error
    return episode


def said(episode: Episode) -> list[str]:
    """What the environment answered, turn by turn."""
    return [message["content"] for turn in episode.turns for message in turn.observation]


@pytest.fixture(scope="session")
def openenv_python() -> str:
    """An interpreter that has OpenEnv: `make test-adapters` names it, as OpenEnv does not go with verifiers."""
    named = os.environ.get("OPENENV_PYTHON")
    python = named or sys.executable
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('openenv') is None)"
    missing = subprocess.run([python, "-c", look], check=False).returncode != 0
    if missing and named is None:
        pytest.skip("openenv is not installed: make test-adapters")
    assert not missing, f"OPENENV_PYTHON={named} has no openenv"
    return python


@pytest.fixture(scope="session")
def openenv_server(
    openenv_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., tuple[str, subprocess.Popen[bytes]]]]:
    """Starts a server of `openenv_servers.py`; gives its URL and its process."""
    started: list[subprocess.Popen[bytes]] = []

    def start(kind: str, most: int = 8) -> tuple[str, subprocess.Popen[bytes]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [openenv_python, str(SERVERS), kind, str(port), str(most)]
        log = tmp_path_factory.mktemp("openenv") / "log"  # a pipe that nobody reads would fill up and stop the server
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out)
        started.append(process)
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {log.read_text()[-2000:]}")
            try:
                httpx.get(f"{url}/health", trust_env=False).raise_for_status()
                return url, process
            except httpx.HTTPError:
                time.sleep(0.2)
        raise RuntimeError(f"{url} did not start in {START_TIMEOUT_S:g} s")

    yield start
    for process in started:
        process.terminate()
    for process in started:
        process.wait(timeout=30)
