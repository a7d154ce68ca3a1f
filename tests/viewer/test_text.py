"""The terminal reader: everything is shown, nothing that was read can steer the terminal."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from agent_loop.conversation import TokenActor
from agent_loop.episodes import EpisodeWriter
from agent_loop.policy import ScriptedPolicy
from agent_loop.renderer import Renderer, load_renderer
from agent_loop.rollout import EpisodeJob, run_episode
from agent_loop.types import Episode, EpisodeError
from agent_loop.view.text import main, visible
from envs.tool_env import ToolEnv
from envs.types import AssistantMessage, Message, StopReason, Task
from tools.tool import Tool, tool
from tools.types import ToolCall

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202eevil\u200b\ud800"
CALL = '<tool_call>{"name": "read", "arguments": {}}</tool_call>'


@tool
def read() -> str:
    """Read."""
    return "page text"


class Reading(ToolEnv):
    def tools(self) -> list[Tool]:
        return [read]

    def on_no_call(self, action: AssistantMessage) -> Message:
        return {"role": "user", "content": "Go on."}


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer: Path) -> Renderer:
    return load_renderer(tiny_tokenizer)


async def play(renderer: Renderer, name: str) -> Episode:
    """Two turns: a call, an answer; scored by a teacher who dislikes the last token."""
    policy = ScriptedPolicy(
        [[*renderer.encode(text), renderer.close_id] for text in (CALL, "it is 5")],
        stop_token_ids=renderer.stop_token_ids,
    )
    task = Task(id=name, messages=({"role": "user", "content": "what is on the page?"},))
    episode = await run_episode(EpisodeJob(task=task, step=12), Reading(), TokenActor(renderer, policy))
    [trace] = episode.traces
    trace.teacher_logprobs = [-1.5 if trained else None for trained in trace.loss_mask]
    trace.teacher_logprobs[-1] = -4.0
    return episode


@pytest.fixture
async def run(tmp_path: Path, tiny: Renderer) -> Path:
    """A run directory with two episodes, a line of something else between them, and a failed one."""
    folder = tmp_path / "run"
    first, second = await play(tiny, "a"), await play(tiny, "b")
    failed = Episode(
        id="13/c/0",
        env_id="e",
        task=Task(id="c", messages=({"role": "user", "content": HOSTILE},)),
        turns=[],
        traces=[],
        stop_reason=StopReason.ERROR,
        error=EpisodeError(boundary="env", kind="RuntimeError", message=f"a bug {HOSTILE}"),
    )
    writer = EpisodeWriter(folder / "episodes" / "step_000012.jsonl")
    writer.append(first)
    writer.close()
    with writer.path.open("a") as file:
        file.write(json.dumps({"schema_version": 99, "id": HOSTILE}) + "\n")
    for file_name, episode in (("step_000012.jsonl", second), ("step_000013.jsonl", failed)):
        writer = EpisodeWriter(folder / "episodes" / file_name)
        writer.append(episode)
        writer.close()
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def assert_harmless(text: str) -> None:
    assert all(c == "\n" or c.isprintable() for c in text)


def test_the_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["1", "12/a/0"], ["3", "12/b/0"], ["4", "13/c/0"]]
    assert lines[1].split()[-1] == "last_tool"
    assert lines[3].endswith("error (env: RuntimeError)")
    assert "step_000012.jsonl:2: not an episode: schema_version 99" in printed.err
    assert_harmless(printed.out + printed.err)


@pytest.mark.parametrize("name", ["1", "12/a/0"])
def test_an_episode(run: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main([str(run), name]) == 0
    text = capsys.readouterr().out
    parts = ["[user]\nwhat is on the page?", "[assistant, turn 0: ", CALL, "[tool read, ", "page text", "it is 5"]
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)
    assert ", kl 0.500 a token]" in text
    assert "stopped: last_tool; reward: -" in text


def test_one_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--step", "13"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_failed_episode_and_hostile_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "13/c/0"]) == 0
    text = capsys.readouterr().out
    assert_harmless(text)
    assert "\\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\u202eevil\\u200b\\ud800" in text
    assert "error at env: RuntimeError: a bug" in text


def test_every_token(run: Path, tiny: Renderer, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "1", "--tokens"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main([str(run), "1", "--tokenizer", str(tiny_tokenizer)]) == 0
    texts = capsys.readouterr().out.splitlines()
    assert len(lines) == len(texts)
    first, last = lines[2].split(), lines[-1].split()
    assert first[2:] == [".", "-", "-", "-", "prompt", "-1"]
    assert last[1:] == [str(tiny.close_id), "#", "-1.0000", "-4.0000", "3.0000"]
    assert texts[-1].endswith("'<|im_end|>'")
    assert sum(line.split()[2] == "#" for line in lines[2:]) == int(lines[0].split()[4])


def test_on_a_terminal_tokens_are_coloured(run: Path) -> None:
    controller, terminal = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    with subprocess.Popen(
        [sys.executable, "-m", "agent_loop.view", "--text", str(run), "1", "--tokens"],
        cwd=ROOT, stdout=terminal, stderr=subprocess.DEVNULL, env=environment,
    ) as process:  # fmt: skip
        os.close(terminal)
        text = b""
        while chunk := _read(controller):
            text += chunk
    os.close(controller)
    assert process.returncode == 0
    lines = text.decode().splitlines()[2:]
    assert lines[0].startswith("\x1b[2m")
    assert lines[-1].startswith("\x1b[31m")
    assert sum(line.startswith("\x1b[33m") for line in lines) > 5
    assert all(line.endswith("\x1b[0m") for line in lines)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that the other side has closed
        return b""


def test_a_message_api_s_calls_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from agent_loop.types import Turn

    call = ToolCall(id="call_0_0", name="read", arguments={}, raw="read({})")
    turn = Turn(
        index=0,
        message=AssistantMessage(content="", tool_calls=(call,)),
        text="",
        observation=({"role": "user", "content": "Go on."},),
    )
    task = Task(id="a", messages=({"role": "user", "content": "x"},))
    episode = Episode(
        id="0/a/0", env_id="e", task=task, turns=[turn], traces=[], stop_reason=StopReason.MAX_TURNS, reward=0.0
    )
    writer = EpisodeWriter(tmp_path / "episodes.jsonl")
    writer.append(episode)
    writer.append(dataclasses.replace(episode, id="0/a/1"))
    writer.close()
    assert main([str(tmp_path), "2"]) == 0
    text = capsys.readouterr().out
    assert "tokens not known" in text
    assert "call: read({})" in text
    assert "[user]\nGo on." in text
    assert "reward: 0.0" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/none"], "none: wanted is a run's folder"),
        (["{run}", "--step", "7"], "no episode files (*_000007.jsonl)"),
        (["{run}", "9/z/9"], "no episode '9/z/9'"),
        (["{run}", "2"], "no episode '2'"),
        (["{run}", "1", "--tokenizer", "{run}"], "no tokenizer can be loaded"),
    ],
)
def test_what_is_not_there(run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main([text.format(run=run) for text in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_reader_that_stops_reading(run: Path) -> None:
    command = f"{sys.executable} -m agent_loop.view --text {run} 1 --tokens | (exec 0<&-; sleep 1)"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_visible_leaves_text_alone() -> None:
    assert visible("Ünï 漢字 🙂\nline") == "Ünï 漢字 🙂\nline"
    assert visible("a\tb\r\x00\U000e0041") == "a\\x09b\\x0d\\x00\\U000e0041"
