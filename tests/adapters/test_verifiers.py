"""Environments of the real package verifiers, played by our loop."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

import envs
from agent_loop.renderer import Renderer
from envs.__main__ import main
from envs.dataset import read_tasks, write_tasks
from envs.registry import RegistryError
from envs.types import Limits, StopReason, Task
from tests.adapters.conftest import call, play_well, said

pytestmark = [pytest.mark.adapters, pytest.mark.usefixtures("packages")]


def log() -> list[str]:
    import vf_sums  # type: ignore[import-not-found]

    return vf_sums.LOG  # type: ignore[no-any-return]


async def test_tools_state_hooks_and_rewards(renderer: Renderer) -> None:
    env = envs.make("verifiers:vf_sums", skip_verification=False)
    assert [spec.name for spec in env.tool_specs] == ["counter_add", "counter_fail", "look_up"]
    add = env.tool_specs[0]
    assert add.description == "Add a number to the total, once or several times."
    assert add.parameters == {
        "type": "object",
        "properties": {"number": {"type": "integer"}, "times": {"default": 1, "type": "integer"}},
        "required": ["number"],
        "additionalProperties": False,
    }
    tasks = env.default_tasks()
    assert [task.id for task in tasks] == [f"sum-{i}" for i in range(6)]
    assert tasks[1].messages == (
        {"role": "system", "content": "Use the tools."},
        {"role": "user", "content": "What is 1 + 3 * 4?"},
    )
    assert tasks[1].metadata["answer"] == 13
    log().clear()
    episode = await play_well(
        renderer,
        env,
        tasks[1],
        call("counter_add", number=3, times=3) + call("counter_add", number=3),
        call("look_up", word="seven"),
        call("counter_fail", reason="on purpose"),
        call("counter_add", number="many"),
        call("counter_add", nmber=1),
        "It is 13.",
    )
    assert said(episode)[:2] == ["10", "13"]  # setup_task's start, and a state that two calls share
    assert '"number": 7' in said(episode)[2]
    assert said(episode)[3] == "execution: Error executing tool counter_fail: on purpose".replace(
        "counter_fail", "fail"
    )
    assert said(episode)[4].startswith("invalid_arguments: Error executing tool add: 1 validation error")
    assert said(episode)[5].startswith('invalid_arguments: unknown argument "nmber"')
    assert episode.stop_reason is StopReason.LAST_TOOL
    right = {"right": 1.0, "used_tools": 1.0, "reward": 1.0, "success": 1.0}
    assert episode.rewards == {**right, "turns": 6.0, "cut": 0.0}
    assert [entry for entry in log() if entry != "facts set up"] == ["setup", "finalize", "right"]
    wrong = await play_well(renderer, env, tasks[2], "I do not know.")
    assert wrong.rewards == {**dict.fromkeys(right, 0.0), "turns": 1.0, "cut": 0.0}
    await env.aclose()


async def test_without_verification_nothing_is_graded_and_nothing_is_left(renderer: Renderer) -> None:
    from verifiers.v1.utils.paths import CACHE_DIR

    boxes = CACHE_DIR / "runtimes" / "subprocess"
    before = set(boxes.iterdir()) if boxes.is_dir() else set()
    env = envs.make("verifiers:vf_sums")
    log().clear()
    episode = await play_well(renderer, env, env.default_tasks()[0], call("counter_add", number=1), "It is 12.")
    assert episode.stop_reason is StopReason.LAST_TOOL
    assert episode.rewards == {}
    assert "right" not in log()
    assert "finalize" not in log()
    await env.aclose()
    assert set(boxes.iterdir()) == before
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "verifiers-run"]


async def test_a_budget_ends_the_episode_and_it_is_graded(renderer: Renderer) -> None:
    env = envs.make("verifiers:vf_sums", skip_verification=False, limits=Limits(max_turns=2))
    calls = [call("counter_add", number=1)] * 2
    episode = await play_well(renderer, env, env.default_tasks()[0], *calls)
    assert episode.stop_reason is StopReason.MAX_TURNS
    assert episode.rewards == {
        "right": 0.0,
        "used_tools": 1.0,
        "reward": 0.25,
        "success": 0.25,
        "turns": 2.0,
        "cut": 1.0,
    }
    answered = await play_well(renderer, env, env.default_tasks()[0], calls[0], "It is 12.")
    assert answered.stop_reason is StopReason.LAST_TOOL  # an answer in the last turn is an answer
    await env.aclose()


async def test_the_environment_s_own_stop_rule(renderer: Renderer) -> None:
    env = envs.make("verifiers:vf_sums", skip_verification=False, task={"most_calls": 2})
    one = call("counter_add", number=1)
    episode = await play_well(renderer, env, env.default_tasks()[0], one, one)
    assert episode.stop_reason is StopReason.ANSWERED
    assert len(episode.turns) == 2
    assert episode.rewards["turns"] == 2.0
    await env.aclose()


async def test_episodes_at_once_share_nothing_but_the_task_set_s_tools(renderer: Renderer) -> None:
    instances = [envs.make("verifiers:vf_sums", skip_verification=False) for _ in range(4)]
    log().clear()
    tasks = instances[0].default_tasks()
    episodes = await asyncio.gather(
        *(
            play_well(
                renderer, env, tasks[i], call("counter_add", number=3, times=4), call("look_up", word="x"), f"{i + 12}"
            )
            for i, env in enumerate(instances)
        )
    )
    for env in instances:
        await env.aclose()
    assert [said(episode)[0] for episode in episodes] == ["12", "13", "14", "15"]
    assert all(episode.reward == 1.0 for episode in episodes)
    assert log().count("facts set up") == 1
    assert log().count("setup") == 4


async def test_an_environment_that_talks(renderer: Renderer) -> None:
    env = envs.make("verifiers:vf_guess", skip_verification=False)
    assert env.tool_specs == ()
    task = env.default_tasks("train", 6)[5]
    episode = await play_well(renderer, env, task, "3", "4", "5")
    assert episode.task.messages == (
        {"role": "system", "content": "Answer with a number."},
        {"role": "user", "content": "I hide a number below ten. Guess!"},
    )
    assert said(episode) == ["No, not 3. Again!", "No, not 4. Again!"]
    assert episode.stop_reason is StopReason.LAST_TOOL
    assert episode.rewards == {"right": 1.0, "turns": 3.0, "guesses": 3.0, "reward": 1.0, "success": 1.0}
    await env.aclose()
    short = envs.make("verifiers:vf_guess", skip_verification=False, limits=Limits(max_turns=2))
    cut = await play_well(renderer, short, task, "3", "4")
    assert cut.stop_reason is StopReason.MAX_TURNS
    assert cut.rewards == {"right": 0.0, "turns": 2.0, "guesses": 2.0, "reward": 0.0, "success": 0.0}
    await short.aclose()


def test_held_out_tasks_and_task_files(tmp_path: Path) -> None:
    env = envs.make("verifiers:vf_sums", num_eval=2, count=5)
    assert [task.id for task in env.default_tasks("eval")] == ["sum-0", "sum-1"]
    assert [task.id for task in env.default_tasks("train")] == ["sum-2", "sum-3", "sum-4"]
    assert [task.id for task in env.default_tasks("train", 1)] == ["sum-2"]
    assert [task.id for task in env.default_tasks("eval", 1)] == ["sum-0"]
    file = tmp_path / "tasks.jsonl"
    write_tasks(file, env.default_tasks("train"))
    again = envs.make("verifiers:vf_sums", tasks=file)
    observation, _ = again.reset(seed=0, options={"task": read_tasks(file)[0]})
    assert observation[-1]["content"] == "What is 2 + 3 * 4?"
    again.close()
    with pytest.raises(ValueError, match=r"has no metadata\.verifiers"):
        again.reset(options={"task": Task(id="x", messages=({"role": "user", "content": "Hi"},))})


HEAD = "import verifiers.v1 as vf\n"
ONE_TASK = """
class T(vf.Taskset[{task}, vf.TasksetConfig]):
    def load(self):
        yield {task}(vf.TaskData(prompt="Hi"{more}))
__all__ = ["T"{names}]
"""
REFUSED = {
    "container": ("class K(vf.Task):\n    NEEDS_CONTAINER = True\n" + ONE_TASK, "need a container"),
    "intercept": (
        "class K(vf.Task):\n    @vf.intercept\n    async def clean(self, request: vf.Request): return None\n"
        + ONE_TASK,
        "@vf.intercept clean",
    ),
    "stop": (
        "class K(vf.Task):\n    @vf.stop\n    async def soon(self, r: vf.Response) -> bool: return False\n" + ONE_TASK,
        "@vf.stop soon wants a model request",
    ),
    "remote_tools": (
        "class S(vf.Toolset[vf.ToolsetConfig, vf.State]): pass\n"
        "class K(vf.Task):\n    @classmethod\n    def toolsets(cls, config):\n"
        "        return [S(vf.ToolsetConfig(url='http://127.0.0.1:9/mcp'))]\n" + ONE_TASK,
        "only toolsets of this process",
    ),
    "boxed_tools": (
        "class S(vf.Toolset[vf.ToolsetConfig, vf.State]): pass\n"
        "class K(vf.Task):\n    @classmethod\n    def toolsets(cls, config):\n"
        "        return [S(vf.ToolsetConfig(runtime=vf.DockerConfig()))]\n" + ONE_TASK,
        "'docker' runtime",
    ),
    "dumb_tool": (
        "class S(vf.Toolset[vf.ToolsetConfig, vf.State]):\n    @vf.tool\n    async def x(self) -> str: return ''\n"
        "class K(vf.Task):\n    @classmethod\n    def toolsets(cls, config): return [S(vf.ToolsetConfig())]\n"
        + ONE_TASK,
        "tool 's_x' has no description",
    ),
    "two_agents": (
        "class C(vf.EnvConfig):\n    one: vf.AgentConfig = vf.AgentConfig()\n"
        "    two: vf.AgentConfig = vf.AgentConfig()\n"
        "class E(vf.Env[C]):\n    async def run(self, task, agents): pass\nclass K(vf.Task): pass\n"
        + ONE_TASK.replace("{names}", ', "E"'),
        "has the agents one, two",
    ),
    "resources": (
        "class E(vf.SingleAgentEnv):\n    async def start(self): pass\nclass K(vf.Task): pass\n"
        + ONE_TASK.replace("{names}", ', "E"'),
        "E.start brings up resources",
    ),
    "legacy": ("def load_environment(**kwargs): ...\n", "is of verifiers before 0.4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_mapped_is_refused_with_the_reason(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, message = REFUSED[case]
    source = source.replace("{task}", "K").replace("{more}", "").replace("{names}", "")
    (tmp_path / f"vf_refused_{case}.py").write_text(HEAD + source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RegistryError, match=message):
        envs.make(f"verifiers:vf_refused_{case}")


@pytest.mark.parametrize(
    ("more", "message"),
    [(", image='python:3.12'", "asks for an image"), (", network_block=['a.com']", "asks for network rules")],
)
def test_a_row_that_cannot_be_played(
    more: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    name = f"vf_row_{abs(hash(more))}"
    source = "class K(vf.Task): pass\n" + ONE_TASK.replace("{task}", "K").replace("{more}", more).replace("{names}", "")
    (tmp_path / f"{name}.py").write_text(HEAD + source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        envs.make(f"verifiers:{name}").default_tasks()


def test_a_judge_without_its_key_is_refused_where_it_would_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = {"id": "reference", "base_url": "http://127.0.0.1:9/v1", "api_key_var": "NO_SUCH_KEY"}
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    envs.make("verifiers:vf_sums", task={"judges": [judge]})
    with pytest.raises(RegistryError, match=r"'reference' asks http://127.0.0.1:9/v1 with the key in NO_SUCH_KEY"):
        envs.make("verifiers:vf_sums", task={"judges": [judge]}, skip_verification=False)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"cuont": 3}, "cuont"), ({"count": "many"}, "taskset.count: Input should be a valid integer")],
)
def test_arguments_are_the_task_set_s(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        envs.make("verifiers:vf_sums", **kwargs)


def test_a_name_that_is_not_installed() -> None:
    with pytest.raises(RegistryError, match="no such environment is installed"):
        envs.make("verifiers:vf_nowhere")


def test_the_contract_holds(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("vf_sums", "vf_guess"):
        assert main(["check", f"verifiers:{name}", "--episodes", "20"]) == 0, capsys.readouterr().out
    assert "vf_sums" in sys.modules
