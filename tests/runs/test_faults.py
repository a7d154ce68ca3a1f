"""What is wrong before or while a run trains: nothing is trained on it, the message says what and how to mend it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.fake_vllm import FakeVllm
from tests.runs.conftest import Workplace


def vocabulary_size(models: Path) -> int:
    return int(json.loads((models / "teacher" / "config.json").read_text())["vocab_size"])


def test_a_teacher_with_another_vocabulary_is_refused_before_the_first_step(
    make: Callable[..., Workplace], models: Path
) -> None:
    done = make(**{"teacher.model": f'"{models / "stranger"}"'}).run("--run-id", "one")
    assert done.returncode == 3
    assert "ids mean another token to the teacher" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dead_teacher_is_named_before_the_first_step(make: Callable[..., Workplace]) -> None:
    workplace = make(**{"teacher.base_url": '"http://127.0.0.1:9/v1"', "teacher.timeout_s": "2.0"})
    done = workplace.run("--run-id", "one")
    assert done.returncode in (3, 5)
    assert "127.0.0.1:9" in done.stderr
    assert not (workplace.path / "runs" / "one" / "metrics.jsonl").exists()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("fault", ["minus_9999", "nan", "null", "short", "wrong_ids", "truncated_json"])
def test_a_teacher_that_answers_rubbish_is_never_trained_on(
    make: Callable[..., Workplace], models: Path, fault: str
) -> None:
    """F10-F12: the checks pass on good replies, then every scoring reply is damaged."""
    with FakeVllm(model=str(models / "teacher"), vocab_size=vocabulary_size(models)) as server:
        server.fault_after(requests=5, fault=fault, only_scoring=True)
        workplace = make(**{"teacher.base_url": f'"{server.base_url}"', "teacher.timeout_s": "5.0"})
        done = workplace.run("--run-id", "one", "--check.skip", '["vocabulary", "teacher_server"]')
    assert done.returncode in (3, 5), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    metrics = workplace.path / "runs" / "one" / "metrics.jsonl"
    assert not metrics.exists() or all(
        line["teacher/coverage"] == 1.0 or line["train/dropped"] > 0 for line in workplace.lines("one")
    )


def test_a_tool_that_crashes_is_recorded_and_leaves_the_run_alone(workplace: Workplace) -> None:
    tools = workplace.path / "adding" / "tools.py"
    tools.write_text(tools.read_text().replace("return a + b", 'raise RuntimeError("secret path /root/x")'))
    workplace.run("--run-id", "one", "--steps", "1", check=True)
    text = (workplace.path / "runs" / "one" / "episodes" / "step_000001.jsonl").read_text()
    assert "/root/x" not in text


def test_a_learning_rate_that_explodes_ends_with_its_own_code_or_finite_numbers(workplace: Workplace) -> None:
    done = workplace.run("--run-id", "one", "--optim.lr", "1.0", "--optim.max_grad_norm", "1000000.0", "--steps", "30")
    if done.returncode == 0:
        assert all(line["teacher_kl"] is not None for line in workplace.lines("one"))
    else:
        assert done.returncode in (3, 5, 6), done.stderr[-2000:]
        assert "Traceback" not in done.stderr
