"""Whole runs with trackers and alarms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.rundir import RunDir
from tests.distill.test_trackers import broken_library, read_back
from tests.runs.conftest import Workplace


def test_a_resumed_run_is_one_curve_in_its_tracker(workplace: Workplace) -> None:
    flags = ("--tracking.to", "tensorboard", "--checkpoint.every", "2")
    done = workplace.run("--run-id", "one", *flags, check=True)
    run = workplace.path / "runs" / "one"
    assert "tensorboard: 3 steps sent; tensorboard --logdir " in done.stderr
    (newest,) = (run / "checkpoints").glob("step_000003")
    newest.rename(run / "lost")  # as if it had been killed after step 3, before its checkpoint
    workplace.run("--resume", str(run), "--steps", "5", *flags, check=True)
    held = read_back(RunDir(run, attempt=2), "tensorboard")
    lines = workplace.lines("one")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for name in ("teacher_kl", "grad_norm", "alarms"):
        assert [step for step, _ in held[name]] == [1, 2, 3, 4, 5]
    for line, (_, value) in zip(lines, held["teacher_kl"], strict=True):
        assert abs(value - line["teacher_kl"]) < 1e-3


def test_f20_a_tracker_that_hangs_changes_nothing(workplace: Workplace, monkeypatch: Any) -> None:
    """The run ends as it does without, and says what became of the tracker."""
    broken_library(workplace.path / "broken", "hang in log")
    pids = workplace.path / "pids"
    monkeypatch.setenv("PIDS", str(pids))
    environment = workplace.environment()
    with_library = f"{workplace.path / 'broken'}:{environment['PYTHONPATH']}"
    monkeypatch.setattr(Workplace, "environment", lambda self: environment | {"PYTHONPATH": with_library})
    done = workplace.run("--run-id", "one", "--tracking.to", "wandb", "--tracking.finish_timeout_s", "1.0", check=True)
    assert len(workplace.lines("one")) == 3
    assert "wandb: gave up 1 s after the end of the run" in done.stderr
    assert json.loads((workplace.path / "runs/one/run.json").read_text())["status"] == "finished"
    assert not Path(f"/proc/{pids.read_text().strip()}").exists()


def test_an_alarm_stops_the_run_saves_and_can_be_passed_by(make: Callable[..., Workplace]) -> None:
    """Random models never end an episode: each is cut short."""
    alarms = {"alarms.window": "2", "alarms.truncated": "0.0", "alarms.stop": '["truncated"]'}
    workplace = make(**alarms, **{"checkpoint.every": "100"})
    done = workplace.run("--run-id", "one")
    assert done.returncode == 6, done.stderr[-2000:]
    assert "error: alarms.stop ends the run:\nALARM truncated: rollout/truncated is " in done.stderr
    assert "Traceback" not in done.stderr
    first, second = workplace.lines("one")
    assert 0 <= first["rollout/repeated"] < 0.5
    assert (first["alarms"], second["alarm/truncated"]) == (0, 1)
    run = workplace.path / "runs" / "one"
    assert (run / "checkpoints" / "step_000002").is_dir()
    on = workplace.run("--resume", str(run), "--alarms.stop", "[]", check=True)
    assert [line["step"] for line in workplace.lines("one")] == [1, 2, 3]
    assert "ALARM truncated" not in on.stderr  # it was said by the first attempt
