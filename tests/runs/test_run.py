"""`python -m distill.run`, end to end, as its user meets it."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.runs.conftest import Workplace


def test_three_steps_leave_a_complete_run_directory(workplace: Workplace) -> None:
    done = workplace.run("--run-id", "one", check=True)
    run = workplace.path / "runs" / "one"
    lines = workplace.lines("one")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["teacher_kl"] > 0
        assert line["teacher/coverage"] == 1.0
        assert line["train/tokens"] == line["rollout/sampled_tokens"]
        assert line["grad_norm"] > 0
        assert abs(line["mismatch_kl"]) < 1e-6
        assert "reward" not in line  # skip_verification: nothing was graded
    episodes = [json.loads(text) for text in (run / "episodes" / "step_000002.jsonl").read_text().splitlines()]
    assert [e["id"] for e in episodes] == [f"2/{e['task']['id']}/{i % 2}" for i, e in enumerate(episodes)]
    assert all(e["reward"] is None for e in episodes)
    assert all(t["teacher_logprobs"] is not None for e in episodes for t in e["traces"])
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert not (run / "LOCK").exists()
    assert "step 3/3" in done.stderr
    assert "python -m agent_loop.view" in done.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(workplace: Workplace) -> None:
    done = workplace.run("--dry-run", check=True)
    assert "3 tasks x 2 = 6 episodes" in done.stdout
    assert not (workplace.path / "runs").exists()


def test_a_wrong_key_and_a_wrong_flag_name_the_line_and_the_right_one(workplace: Workplace) -> None:
    with (workplace.path / "run.toml").open("a") as out:
        out.write("loss.teacher_taw = 1.0\n")
    line = len((workplace.path / "run.toml").read_text().splitlines())
    done = workplace.run("--optim.learning_rat", "0.1")
    assert done.returncode == 2
    assert f"run.toml:{line}" in done.stderr
    assert "teacher_tau" in done.stderr
    assert "learning_rat" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_used_run_directory_is_refused(workplace: Workplace) -> None:
    workplace.run("--run-id", "one", "--steps", "1", check=True)
    again = workplace.run("--run-id", "one", "--steps", "1")
    assert again.returncode == 7
    assert "--resume" in again.stderr


def test_an_empty_task_file_is_named(workplace: Workplace) -> None:
    (workplace.path / "empty.jsonl").write_text("")
    done = workplace.run("--tasks.train", "empty.jsonl")
    assert done.returncode == 4
    assert "empty.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_finishes_the_step_and_saves(workplace: Workplace) -> None:
    process = workplace.start("--run-id", "one", "--steps", "500")
    metrics = workplace.path / "runs" / "one" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process_of=workplace)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    saved = sorted((workplace.path / "runs" / "one" / "checkpoints").glob("step_*"))
    assert saved[-1].name == f"step_{len(workplace.lines('one')):06d}"


def wait_for(condition, *, process_of: Workplace, timeout: float = 90.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, (process_of.path / "stderr.txt").read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.02, 0.4])
def test_kill_nine_and_resume_end_as_if_nothing_had_happened(workplace: Workplace, delay: float) -> None:
    """Killed at a random moment with many requests at once; weights and metrics are those of the uninterrupted run. Not
    to the last bit (test_faults_kill.py has that): which requests share a forward pass depends on timing, and float32
    sums depend on that. AdamW turns such noise in a gradient near zero into up to a learning rate's worth of
    difference."""
    from safetensors.numpy import load_file

    flags = ("--steps", "6", "--checkpoint.every", "2", "--optim.lr", "1e-4")
    workplace.run("--run-id", "whole", *flags, check=True)
    process = workplace.start("--run-id", "killed", *flags)
    killed = workplace.path / "runs" / "killed"
    wait_for(
        lambda: (killed / "metrics.jsonl").exists() and (killed / "metrics.jsonl").read_text().count("\n") >= 3,
        process_of=workplace,
    )
    time.sleep(delay)
    process.kill()
    process.wait()
    workplace.run("--resume", str(killed), *flags, check=True)

    timings = ("time/", "tokens_per_s/", "idle/")
    for ours, theirs in zip(workplace.lines("killed"), workplace.lines("whole"), strict=True):
        for name, value in theirs.items():
            if not name.startswith(timings):
                same = ours[name] is None if value is None else ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5)
                assert same, (name, ours[name], value)
    last = "checkpoints/step_000006"
    for file in (workplace.path / "runs" / "whole" / last).rglob("*.safetensors"):
        expected = load_file(file)
        found = load_file(killed / last / file.relative_to(workplace.path / "runs" / "whole" / last))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert found[name] == pytest.approx(tensor, abs=1e-4), (file.name, name)


def test_nothing_of_a_run_is_a_pickle(workplace: Workplace) -> None:
    workplace.run("--run-id", "one", "--steps", "1", check=True)
    allowed = {".json", ".jsonl", ".safetensors", ".png", ".jinja", ".txt", ".md", ".log"}
    files = [p for p in (workplace.path / "runs").rglob("*") if p.is_file()]
    assert files
    assert {p.suffix for p in files} <= allowed, sorted({str(Path(p.name)) for p in files if p.suffix not in allowed})


@pytest.mark.slow
def test_the_best_evaluation_is_kept_beside_the_last_step(workplace: Workplace) -> None:
    """Nobody succeeds here: the best is the first, and only a rise would be a better one."""
    flags = ["--checkpoint.every", "4", "--checkpoint.keep_last", "1", "--checkpoint.keep_best", "true"]
    tasks = (
        (workplace.path / "adding" / "train.jsonl")
        .read_text()
        .replace('"metadata": {}', '"metadata": {"answer": "no"}')
    )
    (workplace.path / "held_out.jsonl").write_text(tasks)
    flags += ["--tasks.eval", str(workplace.path / "held_out.jsonl"), "--eval.every", "1"]
    workplace.run("--run-id", "one", "--steps", "4", *flags, check=True)
    assert [line["metrics"]["reward/success"] for line in workplace.lines("one", "evals.jsonl")] == [0.0] * 3
    kept = sorted(path.name for path in (workplace.path / "runs" / "one" / "checkpoints").iterdir())
    assert kept == ["step_000001", "step_000004"]
