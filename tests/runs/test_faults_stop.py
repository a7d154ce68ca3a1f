"""F2 and F21: a run that is asked to stop, and a clock that jumps."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distill.run import STOP_GRACE_S
from tests.fakes.fake_vllm import FakeVllm
from tests.runs import children
from tests.runs.conftest import Workplace
from tests.runs.test_faults import vocabulary_size

SKIP = ("--check.skip", '["vocabulary", "teacher_server"]')


def wait_for(condition: Callable[[], bool], workplace: Workplace, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, children.said(workplace.path)[-3000:]
        time.sleep(0.02)


def num_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def processes_with(mark: str) -> list[int]:
    """Pids of all processes that inherited the variable FAULT_MARK=`mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"FAULT_MARK={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def record_of(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "run.json").read_text())
    return record


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_f02_one_signal_saves_the_step_in_hand(workplace: Workplace, number: signal.Signals) -> None:
    run = workplace.path / "runs" / "one"
    process = children.start(workplace.path, "--run-id", "one", "--steps", "500", "--checkpoint.every", "100")
    wait_for(lambda: num_lines(run / "metrics.jsonl") >= 2, workplace)
    os.kill(process.pid or 0, number)
    process.join(30)
    assert process.exitcode == 130, children.said(workplace.path)
    made = num_lines(run / "metrics.jsonl")
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{made:06d}"]
    assert record_of(run)["status"] == "interrupted"
    assert not (run / "LOCK").exists()
    assert children.run(workplace.path, "--resume", str(run), "--steps", str(made + 1)) == 0
    assert num_lines(run / "metrics.jsonl") == made + 1


@contextmanager
def stalled(make: Callable[..., Workplace], models: Path) -> Iterator[tuple[Workplace, Path, Any]]:
    """A run whose teacher answers two steps and then holds every request: it stands in the middle of step 3."""
    with FakeVllm(model=str(models / "teacher"), vocab_size=vocabulary_size(models)) as server:
        workplace = make(**{"teacher.base_url": f'"{server.base_url}"', "checkpoint.every": "100"})
        run = workplace.path / "runs" / "one"
        process = children.start(workplace.path, "--run-id", "one", "--steps", "500", *SKIP)
        try:
            wait_for(lambda: num_lines(run / "metrics.jsonl") >= 2, workplace)
            server.fault_after(0, "stall")
            seen = len(server.received)
            wait_for(lambda: len(server.received) > seen, workplace)
            yield workplace, run, process
        finally:
            process.kill()
            process.join()


@pytest.mark.slow
def test_f02_a_step_that_does_not_end_is_given_up_within_thirty_seconds(
    make: Callable[..., Workplace], models: Path
) -> None:
    with stalled(make, models) as (workplace, run, process):
        began = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        process.join(30)
        assert process.exitcode == 130, children.said(workplace.path)
        assert time.monotonic() - began >= STOP_GRACE_S - 1  # the step had its time
        made = num_lines(run / "metrics.jsonl")
        assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{made:06d}"]
        assert "Traceback" not in children.said(workplace.path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_f02_the_second_signal_stops_at_once(
    make: Callable[..., Workplace], models: Path, number: signal.Signals
) -> None:
    with stalled(make, models) as (workplace, run, process):
        os.kill(process.pid, number)
        wait_for(lambda: "once more to stop now" in children.said(workplace.path), workplace)
        began = time.monotonic()
        os.kill(process.pid, number)
        process.join(10)
        assert process.exitcode == 130, children.said(workplace.path)
        assert time.monotonic() - began < 2
        assert not list((run / "checkpoints").iterdir())


@pytest.mark.slow
def test_f02_a_signal_before_the_first_step_leaves_nothing_running(
    make: Callable[..., Workplace], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks are waiting for a server; a process of its own, which would hand its mark on to its children."""
    monkeypatch.setenv("FAULT_MARK", "f02")
    with FakeVllm(model=str(models / "teacher"), vocab_size=vocabulary_size(models)) as server:
        server.fault_after(0, "stall")
        workplace = make(**{"teacher.base_url": f'"{server.base_url}"'})
        process = workplace.start("--run-id", "one", *SKIP)
        wait_for(lambda: any(r.path.endswith("completions") for r in server.received), workplace)
        assert processes_with("f02") == [process.pid]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 130, children.said(workplace.path)
    run = workplace.path / "runs" / "one"
    assert record_of(run)["status"] == "interrupted"
    assert not (run / "LOCK").exists()
    assert processes_with("f02") == []


@pytest.mark.slow
def test_f21_a_wall_clock_that_jumps_back_makes_no_duration_negative(workplace: Workplace) -> None:
    code = children.run(workplace.path, "--run-id", "one", "--checkpoint.every", "2", prepare=children.jumping_clock)
    assert code == 0, children.said(workplace.path)
    run = workplace.path / "runs" / "one"
    record = record_of(run)
    assert record["updated"] < record["created"] - 3000  # the clock did jump
    for line in workplace.lines("one"):
        seconds = {k: v for k, v in line.items() if k.startswith("time/")}
        assert len(seconds) >= 4
        assert all(0 <= v < 100 for v in seconds.values()), seconds
        assert all(v > 0 for k, v in line.items() if k.startswith("tokens_per_s/"))
    for file in (run / "episodes").iterdir():
        for text in file.read_text().splitlines():
            assert all(0 <= v < 100 for v in json.loads(text)["timing"].values())
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
