"""F22 and F23: what may be different when a run goes on, and what may not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs import children
from tests.runs.conftest import Workplace


def record_of(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "run.json").read_text())
    return record


@pytest.fixture
def run(workplace: Workplace) -> Path:
    """One step of a run, saved."""
    assert children.run(workplace.path, "--run-id", "one", "--steps", "1") == 0, children.said(workplace.path)
    (workplace.path / "stderr.txt").unlink()
    return workplace.path / "runs" / "one"


def contents(run: Path) -> dict[str, bytes]:
    """Every file but `run.json`, which counts attempts."""
    files = [p for p in run.rglob("*") if p.is_file() and p.name != "run.json"]
    return {str(p.relative_to(run)): p.read_bytes() for p in files}


@pytest.mark.slow
def test_f22_a_changed_configuration_is_refused_key_by_key_or_recorded(workplace: Workplace, run: Path) -> None:
    before = contents(run)
    changed = ("--steps", "2", "--optim.lr", "0.002", "--loss.rho", "3.0")
    assert children.run(workplace.path, "--resume", str(run), *changed) == 2
    said = children.said(workplace.path)
    assert "--optim.lr: optim.lr: 0.001 -> 0.002" in said
    assert "--loss.rho: loss.rho: 2.0 -> 3.0" in said
    assert "--allow-change optim.lr,loss.rho" in said or "--allow-change loss.rho,optim.lr" in said
    assert "steps" not in said
    assert contents(run) == before

    assert children.run(workplace.path, "--resume", str(run), *changed, "--allow-change", "optim,loss.rho") == 0
    changes = {c["key"]: (c["attempt"], c["old"], c["new"]) for c in record_of(run)["changes"]}
    assert changes == {"steps": (2, 1, 2), "optim.lr": (2, 1e-3, 2e-3), "loss.rho": (2, 2.0, 3.0)}
    assert [line["lr"] for line in workplace.lines("one")] == [1e-3, 2e-3]
    assert json.loads((run / "config.json").read_text())["optim"]["lr"] == 2e-3  # the next resume goes on with it
    assert children.run(workplace.path, "--resume", str(run), "--steps", "3") == 0
    assert [line["lr"] for line in workplace.lines("one")] == [1e-3, 2e-3, 2e-3]


def test_f22_a_change_is_allowed_only_of_a_run_that_is_continued(workplace: Workplace) -> None:
    assert children.run(workplace.path, "--run-id", "one", "--allow-change", "optim.lr") == 2
    assert "needs --resume" in children.said(workplace.path)


@pytest.mark.slow
def test_f22_other_versions_device_and_ranks_are_said_and_work(workplace: Workplace, run: Path) -> None:
    """The record says that two ranks with an older torch on a GPU made it."""
    record = record_of(run)
    (run / "run.json").write_text(json.dumps(record | {"torch": "2.4.0", "device": "cuda", "ranks": 2}))
    assert children.run(workplace.path, "--resume", str(run), "--steps", "2") == 0
    said = children.said(workplace.path)
    assert f"torch 2.4.0 -> {record['torch']}, device cuda -> cpu, ranks 2 -> 1" in said
    assert [line["step"] for line in workplace.lines("one")] == [1, 2]
    assert record_of(run)["torch"] == record["torch"]


def shorten(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[:6])


def reorder(text: str) -> str:
    return "".join(reversed(text.splitlines(keepends=True)))


def replace_one(text: str) -> str:
    return text.replace("add the numbers 4 and 7", "add the numbers 4 and 8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shorten, "has 6 tasks, it had 10"),
        (reorder, "has the same 10 tasks in another order"),
        (replace_one, "has 10 tasks as before, but other ones"),
    ],
)
def test_f23_other_tasks_are_refused_with_the_difference(
    workplace: Workplace, run: Path, damage: Callable[[str], str], words: str
) -> None:
    file = workplace.path / "adding" / "train.jsonl"
    text = file.read_text()
    file.write_text(damage(text))
    before = contents(run)
    assert children.run(workplace.path, "--resume", str(run), "--steps", "2") == 4
    said = children.said(workplace.path)
    assert f"tasks.train: {file} {words}" in said
    assert "--allow-change tasks.train" in said
    assert contents(run) == before

    allowed = ("--allow-change", "tasks.train")
    assert children.run(workplace.path, "--resume", str(run), "--steps", "2", *allowed) == 0
    assert [c["key"] for c in record_of(run)["changes"]] == ["steps", "tasks.train"]
    assert children.run(workplace.path, "--resume", str(run), "--steps", "3") == 0  # these are its tasks now


@pytest.mark.slow
def test_f23_the_same_tasks_in_a_file_of_another_time_are_the_same(workplace: Workplace, run: Path) -> None:
    os.utime(workplace.path / "adding" / "train.jsonl", (1, 1))
    assert children.run(workplace.path, "--resume", str(run), "--steps", "2") == 0
    assert [c["key"] for c in record_of(run)["changes"]] == ["steps"]


@pytest.mark.slow
def test_f23_a_file_that_changes_under_a_run_is_said_once(workplace: Workplace) -> None:
    """The run itself goes on with what it read."""
    run, file = workplace.path / "runs" / "one", workplace.path / "adding" / "train.jsonl"
    process = children.start(
        workplace.path,
        *("--run-id", "one"),
        prepare=children.shorten_when_opened,
        arguments=(run / "metrics.jsonl", 2, file),
    )
    process.join(120)
    assert process.exitcode == 0, children.said(workplace.path)
    said = children.said(workplace.path)
    assert said.count(f"warning: {file} (tasks.train) has changed since it was read") == 1
    assert [line["step"] for line in workplace.lines("one")] == [1, 2, 3]
    assert children.run(workplace.path, "--resume", str(run)) == 4
