"""A run with every kind of line, and a real server on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.viewer import episode_line
from tests.runs.conftest import save_tokenizer

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
        self.url = self.said.split()[-1].rstrip("/")
        self.port = int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=20)


@pytest.fixture(scope="session")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(str(run), "--cache", str(tmp_path_factory.mktemp("cache")))
    yield found
    found.stop()
