"""OpenEnv servers of the real package, as processes on a loopback port, played by our loop."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Iterator

import pytest

import envs
from agent_loop.renderer import Renderer
from envs.__main__ import main
from envs.tool_env import ToolEnv
from envs.types import Limits, StopReason, Task
from tests.adapters.conftest import call, play, play_well, said

pytestmark = [pytest.mark.adapters, pytest.mark.timeout(900)]

Start = Callable[..., tuple[str, "subprocess.Popen[bytes]"]]


@pytest.fixture(scope="module")
def typed(openenv_server: Start) -> str:
    return openenv_server("typed")[0]


@pytest.fixture(scope="module")
def mcp(openenv_server: Start) -> str:
    return openenv_server("mcp")[0]


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., ToolEnv]]:
    made: list[ToolEnv] = []

    def make(url: str, **kwargs: object) -> ToolEnv:
        made.append(envs.make(f"openenv:{url}", **kwargs))
        return made[-1]

    yield make
    for env in made:
        assert getattr(env, "_session", None) is None, "a session was left open"


async def test_typed_actions(typed: str, make: Callable[..., ToolEnv], renderer: Renderer) -> None:
    env = make(typed, skip_verification=False, system="Think.")
    [spec] = env.tool_specs
    assert (spec.name, spec.description) == ("guess", "Guess the hidden number.")
    assert set(spec.parameters["properties"]) == {"number", "note"}
    assert spec.parameters["properties"]["number"]["maximum"] == 9
    assert spec.parameters["required"] == ["number"]
    task = env.default_tasks("train", 8)[7]
    episode = await play_well(
        renderer,
        env,
        task,
        call("guess", number=3),
        call("guess", number=12),
        call("guess", numer=1),
        call("guess", number=3, note="raise"),
        call("guess", number=7),
    )
    await env.aclose()
    assert [m["content"] for m in episode.task.messages] == ["Think.", 'Numbers environment\n\n{"clue": "It is odd."}']
    assert said(episode) == [
        '{"clue": "Higher."}',
        "invalid_arguments: number: Input should be less than or equal to 9",
        'invalid_arguments: unknown argument "numer", did you mean "number"? (the tool takes: number, note)',
        "execution: the environment stumbled",
        '{"clue": "Right."}',
    ]
    assert episode.stop_reason is StopReason.ANSWERED
    assert episode.rewards == {"reward": 0.75, "success": 0.75}
    assert [r.metadata.get("reward") for t in episode.turns for r in t.tool_results] == [-0.25, None, None, None, 1.0]


async def test_tasks_differ_by_the_server_s_seed(typed: str, make: Callable[..., ToolEnv]) -> None:
    env = make(typed)
    train, held_out = env.default_tasks("train", 3), env.default_tasks("eval", 3)
    assert not {task.metadata["reset"]["seed"] for task in train} & {t.metadata["reset"]["seed"] for t in held_out}
    seen = []
    for task in (train[0], train[1], Task(messages=({"role": "user", "content": "Go."},))):
        messages, _ = await env.areset(options={"task": task})
        seen.append(messages[-1]["content"].split("\n\n")[-1])
        assert task.messages[-1]["content"] in ("Numbers environment", "Go.")  # the task itself stays what it was
    await env.aclose()
    assert seen == ['{"clue": "It is even."}', '{"clue": "It is odd."}', '{"clue": "It is even."}']


async def test_mcp_tools(mcp: str, make: Callable[..., ToolEnv], renderer: Renderer) -> None:
    env = make(mcp, prompt="Add 2 and 3.", skip_verification=False)
    assert [(s.name, s.description) for s in env.tool_specs] == [("add", "Add two numbers."), ("fail", "Always fails.")]
    [task] = env.default_tasks("train", 1)
    episode = await play_well(renderer, env, task, call("add", a=2, b=3), call("fail", kind="soft"), "It is 5.")
    await env.aclose()
    assert episode.task.messages == ({"role": "user", "content": "Add 2 and 3."},)
    assert said(episode)[0] == "5"
    assert said(episode)[1].startswith("execution: ")
    assert "soft failure" in said(episode)[1]
    assert episode.stop_reason is StopReason.LAST_TOOL
    assert episode.rewards == {"reward": 0.0, "success": 0.0}


async def test_episodes_at_once_have_a_session_each(
    typed: str, make: Callable[..., ToolEnv], renderer: Renderer
) -> None:
    instances = [make(typed, skip_verification=False) for _ in range(4)]
    tasks = instances[0].default_tasks("train", 4)
    episodes = await asyncio.gather(
        *(
            play(renderer, env, task, call("guess", number=9), call("guess", number=index))
            for index, (env, task) in enumerate(zip(instances, tasks, strict=True))
        )
    )
    for env in instances:
        await env.aclose()
    assert [episode.rewards["reward"] for episode in episodes] == [0.75] * 4


async def test_a_server_that_is_full_and_one_that_is_gone(
    openenv_server: Start, make: Callable[..., ToolEnv], renderer: Renderer
) -> None:
    url, process = openenv_server("typed", most=1)
    first, second = make(url), make(url)
    [task] = first.default_tasks("train", 1)
    await first.areset(options={"task": task})
    full = await play(renderer, second, task)
    await first.aclose()
    assert full.error is not None
    assert full.error.boundary == "env"
    assert "CAPACITY_REACHED" in full.error.message
    assert "max_concurrent_envs above rollout.max_concurrent" in full.error.message
    process.kill()
    process.wait()
    gone = await play(renderer, second, task)
    await second.aclose()
    assert gone.error is not None
    assert f"openenv:{url}: no session" in gone.error.message


async def test_a_step_that_takes_too_long(typed: str, make: Callable[..., ToolEnv], renderer: Renderer) -> None:
    env = make(typed, timeout_s=1e-6)
    [task] = env.default_tasks("train", 1)
    episode = await play(renderer, env, task, call("guess", number=1), call("guess", number=0))
    await env.aclose()
    assert said(episode)[0].startswith("timeout: ")
    assert episode.error is not None
    assert "a step was given up" in episode.error.message  # its late answer is never taken for another's


async def test_budgets_are_ours(typed: str, make: Callable[..., ToolEnv], renderer: Renderer) -> None:
    env = make(typed, limits=Limits(max_turns=1))
    episode = await play_well(renderer, env, env.default_tasks("train", 1)[0], call("guess", number=5))
    await env.aclose()
    assert episode.stop_reason is StopReason.MAX_TURNS


def test_the_contract_holds(typed: str, mcp: str, capsys: pytest.CaptureFixture[str]) -> None:
    for url in (typed, mcp):
        assert main(["check", f"openenv:{url}", "--episodes", "20"]) == 0, capsys.readouterr().out
