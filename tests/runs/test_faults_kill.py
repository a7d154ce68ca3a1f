"""F1 and F2: a run that is killed or stopped, and continued, is the run that was not."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs import children
from tests.runs.conftest import make_workplace

TIMED = ("time/", "tokens_per_s/", "idle/", "cost/")
"""Metrics that say how long something took."""
ALONE = {"rollout.max_concurrent": "1", "teacher.max_tokens_in_flight": "1"}
"""One request a forward pass: which requests share one depends on timing, and float32 sums depend on that."""
STEPS = 4
FLAGS = ("--steps", str(STEPS), "--checkpoint.every", "2", "--eval.every", "2", "--eval.at_end", "true")
NUM_EVENTS_POINTS = 16


def final_state(run: Path) -> dict[str, Any]:
    """All that a run leaves behind, but how long things took."""
    last = run / "checkpoints" / f"step_{STEPS:06d}"
    files = [p for p in last.rglob("*") if p.is_file() and p.name != "MANIFEST.json"]
    return {
        "checkpoints": sorted(p.name for p in (run / "checkpoints").iterdir()),
        "files": {str(p.relative_to(last)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
        "metrics": [
            {k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines(run / "metrics.jsonl")
        ],
        "evals": lines(run / "evals.jsonl"),
        "episodes": {p.name: [untimed(e) for e in lines(p)] for p in (run / "episodes").iterdir()},
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(value: Any) -> Any:
    """Without the keys that hold seconds."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in ("timing", "sample_s", "env_s", "duration_s")}
    return [untimed(v) for v in value] if isinstance(value, list) else value


class Baseline:
    """An uninterrupted run, and the file operations that it made."""

    def __init__(self, path: Path, models: Path) -> None:
        self.workplace = make_workplace(path, models, **ALONE)
        with (path / "adding" / "eval.jsonl").open("w") as out:
            for i in range(3):
                row = {"id": f"e{i}", "messages": [{"role": "user", "content": f"add {i} and 2"}], "metadata": {}}
                out.write(json.dumps(row) + "\n")
        run, log = path / "runs" / "whole", path / "events.txt"
        code = children.run(path, "--run-id", "whole", *FLAGS, prepare=children.record_events, arguments=(run, log))
        assert code == 0, children.said(path)
        self.events = log.read_text().splitlines()
        self.state = final_state(run)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Baseline:
    return Baseline(tmp_path_factory.mktemp("killed"), models)


def killed(baseline: Baseline, name: str, prepare: Callable[..., None], *arguments: Any) -> Path:
    """A run that `prepare` ended by a signal."""
    code = children.run(baseline.workplace.path, "--run-id", name, *FLAGS, prepare=prepare, arguments=arguments)
    assert code in (-signal.SIGKILL, -signal.SIGXFSZ), children.said(baseline.workplace.path)
    return baseline.workplace.path / "runs" / name


def resume_and_compare(baseline: Baseline, run: Path) -> None:
    folder = baseline.workplace.path
    if not (run / "run.json").exists():  # killed before there was a run: its name is still free
        assert children.run(folder, "--run-id", run.name, *FLAGS) == 0, children.said(folder)
    else:
        assert children.run(folder, "--resume", str(run)) == 0, children.said(folder)
    assert final_state(run) == baseline.state
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert not (run / "LOCK").exists()


def test_f01_two_uninterrupted_runs_are_equal_to_the_last_bit(baseline: Baseline) -> None:
    """Otherwise the others would prove nothing."""
    run = baseline.workplace.path / "runs" / "again"
    assert children.run(baseline.workplace.path, "--run-id", "again", *FLAGS) == 0
    assert final_state(run) == baseline.state
    assert len(baseline.state["metrics"]) == STEPS
    assert set(baseline.state["episodes"]) == {f"step_{n:06d}.jsonl" for n in range(1, 5)} | {
        "eval_000002.jsonl",
        "eval_000004.jsonl",
    }
    operations = {line.split()[0] for line in baseline.events}
    assert operations >= {"open", "os.rename", "os.mkdir"}
    assert len(baseline.events) > 4 * NUM_EVENTS_POINTS


@pytest.mark.slow
@pytest.mark.parametrize("point", range(NUM_EVENTS_POINTS))
def test_f01_kill_nine_at_a_file_operation(baseline: Baseline, point: int) -> None:
    """Points spread over all operations on the run's files, from its first to its last: before, inside and after
    saves, before and after appends and renames. Every fourth one is killed again when it is resumed."""
    number = 2 + point * (len(baseline.events) - 2) // NUM_EVENTS_POINTS
    run = baseline.workplace.path / "runs" / f"point{point}"
    killed(baseline, run.name, children.kill_at_event, run, number)
    if point % 4 == 3:
        code = children.run(
            baseline.workplace.path, "--resume", str(run), prepare=children.kill_at_event, arguments=(run, 20 + point)
        )
        assert code == -signal.SIGKILL
    resume_and_compare(baseline, run)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "opening"), [("metrics.jsonl", 3), ("episodes/step_000003.jsonl", 1)])
def test_f01_killed_in_the_middle_of_an_append(baseline: Baseline, file: str, opening: int) -> None:
    """The kernel ends the process in mid-write: the last line is torn."""
    run = baseline.workplace.path / "runs" / f"torn-{Path(file).stem}"
    killed(baseline, run.name, children.kill_in_append, run / file, opening)
    assert not (run / file).read_bytes().endswith(b"\n")
    resume_and_compare(baseline, run)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "where"), [(2, "before"), (3, "after")])
def test_f01_killed_in_the_middle_of_an_update(baseline: Baseline, step: int, where: str) -> None:
    run = baseline.workplace.path / "runs" / f"update-{where}"
    killed(baseline, run.name, children.kill_in_optimizer, step, where)
    assert len(lines(run / "metrics.jsonl")) == step - 1
    resume_and_compare(baseline, run)
