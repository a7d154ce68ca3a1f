"""The run directory, the task order, the report's arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.report import Evaluation, before_after
from distill.rundir import RunDir, RunDirError, read_jsonl
from distill.tasks import TaskSource
from envs.types import Task


def task(name: str) -> Task:
    return Task(id=name, messages=({"role": "user", "content": name},))


def test_every_task_once_an_epoch_in_an_order_that_the_seed_fixes() -> None:
    tasks = [task(str(i)) for i in range(7)]
    source = TaskSource(tasks, seed=3)
    first, second = source.take(7), source.take(7)
    assert sorted(t.id for t in first) == sorted(t.id for t in second) == [str(i) for i in range(7)]
    assert [t.id for t in first] != [t.id for t in second]
    assert [t.id for t in TaskSource(tasks, seed=3).take(14)] == [t.id for t in first + second]


def test_the_cursor_is_the_whole_state() -> None:
    tasks = [task(str(i)) for i in range(5)]
    whole = TaskSource(tasks, seed=0)
    taken = [whole.take(3) for _ in range(6)]
    for k in range(6):
        resumed = TaskSource(tasks, seed=0, cursor=3 * k)
        assert resumed.take(3) == taken[k]
    assert whole.cursor == 18
    assert whole.epoch == pytest.approx(3.6)


def test_no_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="no tasks"):
        TaskSource([], seed=0)


def test_a_used_directory_is_refused_and_says_how_to_go_on(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "run", {"steps": 1}).close("finished")
    with pytest.raises(RunDirError, match="--resume"):
        RunDir.create(tmp_path / "run", {})
    with pytest.raises(RunDirError, match="holds no run"):
        RunDir.resume(tmp_path / "nothing")


def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", {})
    lock = tmp_path / "run" / "LOCK"
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    held = json.loads(lock.read_text())
    lock.write_text(json.dumps(held | {"pid": other.pid}))
    with pytest.raises(RunDirError, match=f"in use by process {other.pid}"):
        RunDir.resume(tmp_path / "run")
    other.communicate()
    again = RunDir.resume(tmp_path / "run")
    assert again.attempt == run.attempt + 1
    assert json.loads(lock.read_text())["pid"] == os.getpid()
    again.close("finished")
    assert not lock.exists()


def test_rewinding_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", {})
    for step in range(1, 5):
        run.append_metrics({"step": step, "teacher_kl": 1.0 / step})
        run.episodes_file(step).write_text("{}\n")
    run.append_metrics({"step": 0, "name": "student"}, file="evals.jsonl")
    with (run.path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 5, "teach')  # killed in mid-write
    run.rewind(2)
    assert [line["step"] for line in read_jsonl(run.path / "metrics.jsonl")] == [1, 2]
    assert [line["step"] for line in read_jsonl(run.path / "evals.jsonl")] == [0]
    assert sorted(p.name for p in (run.path / "episodes").iterdir()) == ["step_000001.jsonl", "step_000002.jsonl"]


def test_a_number_that_is_not_finite_never_reaches_the_metrics(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", {})
    with pytest.raises(ValueError, match="JSON compliant"):
        run.append_metrics({"step": 1, "loss": float("nan")})


def test_the_closing_table() -> None:
    def evaluation(name: str, step: int, success: float) -> Evaluation:
        return Evaluation(
            name=name, step=step, episodes=500, metrics={"reward/success": success, "rollout/num_turns": 4.0}
        )

    lines = [{"step": i, "teacher_kl": kl} for i, kl in enumerate([2.0] * 5 + [0.9] + [0.2] * 5)]
    text = before_after(
        [evaluation("teacher", 0, 0.98), evaluation("student", 0, 0.2), evaluation("student", 30, 0.96)], lines
    )
    assert text.splitlines()[0].split() == ["before", "after", "teacher"]
    assert text.splitlines()[1].split() == ["success", "20.0%", "96.0%", "98.0%"]
    assert "2.0000 -> 0.2000 nats a token, 10.0x down" in text
