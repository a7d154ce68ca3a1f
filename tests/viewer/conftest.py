"""A run with every kind of line, and a real server on loopback."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pytest

import envs
from agent_loop.conversation import TokenActor
from agent_loop.episodes import EpisodeWriter, episode_from_json
from agent_loop.policy import ScriptedPolicy
from agent_loop.renderer import Renderer, load_renderer
from agent_loop.rollout import EpisodeJob, run_episode
from agent_loop.types import Episode
from bench.viewer import episode_line
from envs.types import Limits, Task
from tests.runs.conftest import save_tokenizer
from tools.pages import Page, write_pages

ROOT = Path(__file__).resolve().parents[2]

HOSTILE = (
    "<script>window.owned=1</script></script><img src=x onerror=window.owned=1><svg onload=window.owned=1>"
    "<a href='javascript:window.owned=1'>x</a><style>body{display:none}</style>__proto__ \x1b[31m\x1b]8;;http://127.0.0.1:1/\x07"
    "\u202eevil\u2066\u200b\u2028\u2029<!-- $\\alpha$ -->"
)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


def line(number: int, change: Callable[[dict[str, Any]], None] | None = None, **options: Any) -> bytes:
    value = json.loads(episode_line(number, **{"tokens": 300, **options}))
    if change is not None:
        change(value)
    return json.dumps(value).encode() + b"\n"


def hostile(value: dict[str, Any]) -> None:
    """Hostile text in every field that takes any."""
    value["id"], value["env_id"] = f"7/{HOSTILE}/0", HOSTILE
    value["task"] |= {"id": HOSTILE, "metadata": {"__proto__": HOSTILE}}
    value["task"]["messages"] = [{"role": "user", "content": HOSTILE}, {"role": "system", "content": HOSTILE}]
    value["error"] = {"boundary": "tool", "kind": HOSTILE, "message": HOSTILE}
    value["metadata"] = {"__proto__": {"polluted": 1}, "constructor": HOSTILE}
    for turn in value["turns"]:
        turn["text"] = HOSTILE
        turn["message"] |= {"content": HOSTILE, "reasoning": HOSTILE}
        turn["message"]["tool_calls"][0] |= {
            "name": HOSTILE,
            "raw": HOSTILE,
            "arguments": {"__proto__": HOSTILE, HOSTILE: 1},
        }
        turn["tool_results"][0] |= {
            "name": HOSTILE, "content": HOSTILE, "metadata": {"__proto__": HOSTILE},
            "error": {"kind": "timeout", "message": HOSTILE},
        }  # fmt: skip
        turn["observation"] = [{"role": "user", "content": HOSTILE}]


def marks(value: dict[str, Any]) -> None:
    """A trained token without a score, one with vLLM's stand-in for impossible, one with a large gap."""
    trace = value["traces"][0]
    first, second, third = [i for i, trained in enumerate(trace["loss_mask"]) if trained][:3]
    trace["teacher_logprobs"][first] = None
    trace["teacher_logprobs"][second] = -9999.0
    trace["sampling_logprobs"][third], trace["teacher_logprobs"][third] = -0.5, -30.5


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Step 1: six episodes; step 2: task t0 again, marks, and hostile ones; metrics with a torn line."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    (folder / "episodes").mkdir(parents=True)
    (folder / "checkpoints" / "step_000001").mkdir(parents=True)
    (folder / "checkpoints" / "step_000001" / "model").symlink_to(tiny_tokenizer)
    (folder / "episodes" / "step_000001.jsonl").write_bytes(b"".join(line(i) for i in range(6)))

    def found(value: dict[str, Any]) -> None:
        value["turns"][1]["tool_results"][0]["content"] = "the Zebrafish answer: Ünï 漢字"

    parts = [
        line(0, seed=9, step=2, task="t0"),
        line(11, marks, step=2),
        line(12, hostile, step=2),
        line(13, found, step=2),
    ]
    (folder / "episodes" / "step_000002.jsonl").write_bytes(b"".join(parts))
    metrics = [
        json.dumps({"step": i, "teacher_kl": 1 / i, "entropy": 0.3, HOSTILE: 1, "time/step": 2.0}) for i in range(1, 6)
    ]
    for i in (1, 2, 4):
        metrics[i] = json.dumps(json.loads(metrics[i]) | {"alarms": 1, "alarm/truncated": 1})
    (folder / "metrics.jsonl").write_text("\n".join([*metrics, '{"step": 6, "teach']))
    return folder


class Server:
    """`python -m agent_loop.view` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agent_loop.view", *arguments, "--port", "0"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        self.opens = self.said.split()[-1]
        """The address that was printed; of a server with --what-if it holds the token."""
        self.url, _, fragment = self.opens.partition("/#")
        self.url = self.url.rstrip("/")
        self.token = fragment.rpartition("/")[2]
        self.port = int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=20)


@pytest.fixture(scope="session")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(str(run), "--cache", str(tmp_path_factory.mktemp("cache")))
    yield found
    found.stop()


# A run whose episodes were played on a recording, so that they can be played again

SITE = "https://registry.test"
LIMITS = {"max_turns": 5, "max_turn_tokens": 400, "max_tool_output_chars": 2000}


def call(name: str, **arguments: Any) -> str:
    return "<tool_call>" + json.dumps({"name": name, "arguments": arguments}) + "</tool_call>"


TURNS = (
    call("browse", url=f"{SITE}/"),
    call("browse", url="1"),
    call("find", text="Acme"),
    call("submit_answer", answer="Acme"),
)


@dataclass(frozen=True)
class Played:
    """A run of one played episode, `1/t/0`: two pages, a search in the second, the answer."""

    path: Path
    tokenizer: Path

    @property
    def file(self) -> Path:
        return self.path / "episodes" / "step_000001.jsonl"

    @property
    def forks(self) -> Path:
        return self.path / "episodes" / "forks.jsonl"

    @property
    def store(self) -> Path:
        return self.path / "pages.jsonl"

    def episode(self) -> Episode:
        return episode_from_json(json.loads(self.file.read_bytes().splitlines()[0]))

    def configure(self, **changes: Any) -> None:
        browse = {"mode": "record", "store": str(self.store), "tools": [], "engine": "http"}
        config = {"env": "medbrowse", "env_args": {"browse": browse}, "rollout": LIMITS, "skip_verification": False}
        (self.path / "config.json").write_text(json.dumps(config | changes))


def write_store(path: Path, maker: str = "Acme") -> None:
    write_pages(
        path,
        [
            Page(url=f"{SITE}/", body="", text="[The drug](/drug) is here", title="Home"),
            Page(url=f"{SITE}/drug", body=f"<main><h1>Abc</h1><p>Made by {maker}</p><p>{escape(HOSTILE)}</p></main>"),
        ],
    )


def script(renderer: Renderer, *texts: str) -> ScriptedPolicy:
    ids = [[*renderer.encode(text), renderer.close_id] for text in texts]
    return ScriptedPolicy(ids, stop_token_ids=renderer.stop_token_ids)


@pytest.fixture
def played(tmp_path: Path, tiny_tokenizer: Path) -> Played:
    found = Played(tmp_path / "played", tiny_tokenizer)
    (found.path / "episodes").mkdir(parents=True)
    model = found.path / "checkpoints" / "step_000001" / "model"
    model.parent.mkdir(parents=True)
    model.symlink_to(tiny_tokenizer)
    write_store(found.store)
    found.configure()
    renderer = load_renderer(tiny_tokenizer)
    browse = {"mode": "replay", "store": str(found.store), "tools": []}
    env = envs.make("medbrowse", limits=Limits(**LIMITS), browse=browse, skip_verification=False)
    question = {"role": "user", "content": f"Who makes Abc? Start at {SITE}/"}
    task = Task(id="t", messages=(question,), metadata={"answer": "Acme", "question_type": "Ingredient"})
    job = EpisodeJob(task=task, step=1, seed=7)
    playing = run_episode(job, env, TokenActor(renderer, script(renderer, *TURNS)))
    with ThreadPoolExecutor() as thread:  # Playwright has an event loop in this one
        episode = thread.submit(asyncio.run, playing).result()
    assert episode.rewards == {"success": 1.0, "answered": 1.0}
    [trace] = episode.traces
    trace.teacher_logprobs = [-0.5 if trained else None for trained in trace.loss_mask]
    writer = EpisodeWriter(found.file)
    writer.append(episode)
    writer.close()
    return found
