"""Whole training runs of `medbrowse` on real vLLM servers that the run starts: the files of `configs/` that have them
(full weights, LoRA, several copies), one server for both, and servers that are killed in the middle of a step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.runs.config_cases import CASES, STEPS, check_run, flags

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

COMMON = """
env = "medbrowse"
steps = 3
run_id = "run"

[tasks]
num_train = 500

[student]
model = "builtin:medbrowse-student"
dtype = "float32"
max_context = 1024

[student.server]
dtype = "float32"

[loss]
type = "topk"

[rollout]
batch_size = 16
group_size = 1
max_turns = 10
max_turn_tokens = 64

[optim]
lr = 1e-3

[checkpoint]
every = 1

[check]
max_self_difference = 1e-3
max_canary_difference = 1e-3
max_mismatch_kl = 1e-3
"""

TEACHER = """
[teacher]
model = "builtin:medbrowse-teacher"
top_k = 8

[teacher.server]
dtype = "float32"
max_context = 1024
"""

LORA = """
[student.lora]
rank = 8
alpha = 16
"""


@dataclass
class Run:
    """A run in a folder of its own."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def path(self) -> Path:
        return self.folder / "runs" / "run"

    def start(self, *flags: str) -> subprocess.Popen[bytes]:
        named = {"--config", "--resume"} & set(flags)
        config = [] if named else ["--config", str(self.folder / "run.toml")]
        with (self.folder / "stderr.txt").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "distill.run", *config, *flags],
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        return self.process

    def finish(self, code: int = 0, *, timeout_s: float = 600) -> str:
        """Wait for the end; returns what a person saw."""
        assert self.process is not None
        returned = self.process.wait(timeout_s)
        text = (self.folder / "stderr.txt").read_text()
        assert returned == code, text[-6000:]
        return text

    def wait_for(self, done: Callable[[], bool], *, timeout_s: float = 300) -> None:
        assert self.process is not None
        deadline = time.monotonic() + timeout_s
        while not done():
            assert self.process.poll() is None, (self.folder / "stderr.txt").read_text()[-6000:]
            assert time.monotonic() < deadline, (self.folder / "stderr.txt").read_text()[-6000:]
            time.sleep(0.05)

    def metrics(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def episodes(self, step: int) -> list[dict[str, Any]]:
        file = self.path / "episodes" / f"step_{step:06}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def processes(self, *words: str) -> list[int]:
        """Processes that carry this run's environment and have all words in their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                environment = (entry / "environ").read_bytes().decode(errors="replace")
                zombie = ") Z " in (entry / "stat").read_text()
            except OSError:
                continue
            if f"DISTILL_TEST={self.folder}" in environment and not zombie and all(word in line for word in words):
                found.append(int(entry.name))
        return found

    def server(self, name: str) -> int:
        """The API server that serves `name`: the process that vLLM's own start line names, not its keeper."""
        (pid,) = [
            pid
            for pid in self.processes("api_server", f"--served-model-name {name}")
            if b"keeper" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return pid


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setenv("DISTILL_TEST", str(tmp_path))
    run = Run(tmp_path)
    yield run
    if run.process is not None and run.process.poll() is None:
        run.process.kill()
        run.process.wait()


def check_steps(run: Run, count: int = 3) -> None:
    """Every step trained only tokens with a true score, from the weights of the step before, and published its own."""
    lines = run.metrics()
    assert [line["step"] for line in lines] == list(range(1, count + 1))
    for line in lines:
        assert line["publish/canary"] <= 1e-3, "float32 on both sides"
        assert abs(line["mismatch_kl"]) < 1e-5
        assert line["teacher_kl"] > 0
        assert line["teacher/coverage"] == 1.0
        assert line["grad_norm"] > 0
        for episode in run.episodes(line["step"]):
            for trace in episode["traces"]:
                for i, trained in enumerate(trace["loss_mask"]):
                    if trained:
                        assert trace["teacher_logprobs"][i] is not None
                        assert trace["policy_versions"][i] == line["step"] - 1


def no_process_is_left(run: Run) -> None:
    deadline = time.monotonic() + 20
    while left := run.processes():
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_text() for pid in left]
        time.sleep(0.1)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.suite == "vllm"])
def test_a_file_of_configs_trains_two_steps(run: Run, name: str) -> None:
    """Full weights and LoRA, each with a teacher on a server of its own, and copies of both."""
    CASES[name].prepare(run.folder)
    run.start(*flags(name))
    text = run.finish()
    check_run(run.path, name)
    check_steps(run, STEPS)
    assert "Traceback" not in text
    assert "warning" not in text
    no_process_is_left(run)


def test_one_server_for_both_the_base_model_teaches_its_adapter(run: Run) -> None:
    teacher = '[teacher]\ntop_k = 8\non_student_server = true\nsystem_prompt = "Answer at once."\n'
    (run.folder / "run.toml").write_text(COMMON + LORA + teacher)
    run.start()
    run.finish()
    check_steps(run)


def test_servers_killed_in_mid_step_come_back_and_the_run_goes_on(run: Run) -> None:
    """The student's in the second step, the teacher's in the third."""
    (run.folder / "run.toml").write_text(COMMON + TEACHER)
    run.start()
    for step, victim in ((2, "student"), (3, "teacher")):
        run.wait_for(lambda made=step - 1: len(run.metrics()) == made)  # the step has begun
        time.sleep(0.3)
        os.kill(run.server(victim), signal.SIGKILL)
    text = run.finish()
    check_steps(run)
    assert [line["servers/restarts"] for line in run.metrics()] == [0, 1, 2]
    assert run.metrics()[1]["servers/away_s"] > 1
    assert run.metrics()[2]["servers/away_s"] > run.metrics()[1]["servers/away_s"] + 1
    assert all(
        episode["stop_reason"] not in ("error", "timeout") for step in (1, 2, 3) for episode in run.episodes(step)
    )
    assert "student" in text
    assert "teacher" in text
    no_process_is_left(run)


def test_a_server_that_may_not_come_back_ends_the_run_which_resumes(run: Run) -> None:
    (run.folder / "run.toml").write_text(COMMON + TEACHER)
    run.start("--student.server.max_restarts", "0")
    run.wait_for(lambda: len(run.metrics()) == 1)
    os.kill(run.server("student"), signal.SIGKILL)
    text = run.finish(8)
    assert "--resume" in text
    assert "Traceback" not in text
    assert (run.path / "checkpoints" / "step_000001" / "MANIFEST.json").exists()
    no_process_is_left(run)
    run.start("--resume", str(run.path), "--steps", "2")
    run.finish()
    check_steps(run, 2)


def test_kill_9_of_the_run_leaves_no_server(run: Run) -> None:
    (run.folder / "run.toml").write_text(COMMON + TEACHER)
    process = run.start()
    run.wait_for(lambda: bool(run.processes("api_server", "teacher")))
    process.kill()
    process.wait()
    no_process_is_left(run)
