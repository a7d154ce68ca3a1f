"""The run directory, the task order, the report's arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.report import Evaluation, before_after
from distill.rundir import RunDir, RunDirError, episode_files, read_jsonl
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


HOLD = """
import sys, time
from pathlib import Path
from distill.rundir import RunDir
run = RunDir.create(Path(sys.argv[1]), {})
print("ready", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(RunDirError, match=f"in use by process {other.pid}"):
            RunDir.resume(tmp_path / "run")
        other.kill()
    lock = tmp_path / "run" / "LOCK"
    assert json.loads(lock.read_text())["pid"] == other.pid
    run = RunDir.resume(tmp_path / "run")
    assert run.attempt == 2
    assert json.loads(lock.read_text())["pid"] == os.getpid()
    run.close("finished")
    assert not lock.exists()


def test_a_process_of_another_machine_is_believed(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "run", {}).close("finished")
    (tmp_path / "run" / "LOCK").write_text('{"pid": 1, "host": "elsewhere"}')
    with pytest.raises(RunDirError, match=r"in use by process 1 on elsewhere\. If that process is gone, delete"):
        RunDir.resume(tmp_path / "run")


def test_a_directory_that_was_replaced_is_not_written_to(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", {})
    (tmp_path / "run").rename(tmp_path / "gone")
    RunDir.create(tmp_path / "run", {}).close("finished")
    with pytest.raises(RunDirError, match="was deleted or replaced"):
        run.append_metrics({"step": 1})
    run.close("finished")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert json.loads((tmp_path / "gone" / "run.json").read_text())["status"] == "started"


def test_rewinding_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", {})
    for step in range(1, 5):
        run.append_metrics({"step": step, "teacher_kl": 1.0 / step})
        run.episodes_file(step).write_text("{}\n")
    for name, step in (("student", 0), ("student", 4)):
        run.append_metrics({"step": step, "name": name}, file="evals.jsonl")
    for kind, step in (("eval", 0), ("eval_teacher", 0), ("eval", 4)):
        run.episodes_file(step, kind=kind).write_text("{}\n")
    with (run.path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 5, "teach')  # killed in mid-write
    run.rewind(2)
    assert [line["step"] for line in read_jsonl(run.path / "metrics.jsonl")] == [1, 2]
    assert [line["step"] for line in read_jsonl(run.path / "evals.jsonl")] == [0]
    left = sorted(p.name for p in (run.path / "episodes").iterdir())
    assert left == [
        "eval_000000.jsonl",
        "step_000001.jsonl",
        "step_000002.jsonl",
    ]  # the teacher's has no line: half made


def test_a_number_that_is_not_finite_never_reaches_the_metrics(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", {})
    with pytest.raises(ValueError, match="JSON compliant"):
        run.append_metrics({"step": 1, "loss": float("nan")})


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (["episodes.jsonl", "failed.jsonl"], ["episodes.jsonl"]),
        (
            ["metrics.jsonl", "episodes/step_000002.jsonl", "episodes/step_000001.jsonl", "episodes/eval_000001.jsonl"],
            ["episodes/step_000001.jsonl", "episodes/step_000002.jsonl"],
        ),
        (["step_000001.jsonl", "other.jsonl"], ["step_000001.jsonl"]),
        (["b.jsonl", "a.jsonl", "c.json"], ["a.jsonl", "b.jsonl"]),
        (["metrics.jsonl", "episodes/eval_000001.jsonl"], []),
    ],
)
def test_what_a_path_means_as_episodes(there: list[str], wanted: list[str], tmp_path: Path) -> None:
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(file.relative_to(tmp_path)) for file in episode_files(tmp_path)] == wanted
    assert episode_files(tmp_path / there[0]) == [tmp_path / there[0]]


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
