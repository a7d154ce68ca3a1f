"""`python -m torch.distributed.run -m distill.run`, end to end on two processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs.conftest import Workplace

pytestmark = pytest.mark.slow

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(workplace: Workplace, *arguments: str, module: str = "distill.run") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LAUNCHER, "-m", module, "--config", str(workplace.path / "run.toml"), *arguments],
        cwd=workplace.path,
        env=workplace.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], timeout: float = 150.0) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def wait_for_step(workplace: Workplace, run_id: str, process: subprocess.Popen[str]) -> None:
    metrics = workplace.path / "runs" / run_id / "metrics.jsonl"
    limit = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n")):
        assert process.poll() is None, end(process)[2][-4000:]
        assert time.monotonic() < limit
        time.sleep(0.1)


def pid_of_rank(launcher: int, rank: int) -> int:
    """Of the launcher's children, the one with that rank in its environment."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            environment = (stat.parent / "environ").read_bytes()
        except OSError:
            continue
        if parent == launcher and f"\0RANK={rank}\0".encode() in environment:
            return int(stat.parent.name)
    raise AssertionError(f"{launcher} has no child of rank {rank}")


def test_a_run_on_two_ranks_is_the_run_on_one(workplace: Workplace) -> None:
    code, _, err = end(start(workplace, "--run-id", "two", "--steps", "2"))
    assert code == 0, err[-4000:]
    assert "split over 2 processes" in err
    assert err.count("step 2/2") == 1  # one of them speaks
    run = workplace.path / "runs" / "two"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    workplace.run("--run-id", "one", "--steps", "2", check=True)
    two, one = workplace.lines("two"), workplace.lines("one")
    assert [line["step"] for line in two] == [1, 2]
    for name in ("loss", "teacher_kl", "teacher_kl/p90", "entropy", "grad_norm", "train/tokens"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-5), name
    assert two[1]["publish/canary"] < 1e-4

    workplace.run("--resume", str(run), "--steps", "3", check=True)  # on one
    code, _, err = end(start(workplace, "--resume", str(run), "--steps", "4"))  # on two again
    assert code == 0, err[-4000:]
    assert [line["step"] for line in workplace.lines("two")] == [1, 2, 3, 4]


def test_the_checks_and_a_dry_run(workplace: Workplace) -> None:
    code, out, err = end(start(workplace, "--json", module="distill.check"))
    assert code == 0, err[-4000:]
    findings = {finding["name"]: finding["level"] for finding in json.loads(out)}
    assert findings["publish"] == findings["mismatch"] == "ok"
    code, out, err = end(start(workplace, "--dry-run"))
    assert code == 0, err[-4000:]
    assert out.count("3 tasks x 2 = 6 episodes") == 1


def test_sigterm_finishes_the_step_and_saves(workplace: Workplace) -> None:
    process = start(workplace, "--run-id", "long", "--steps", "500")
    wait_for_step(workplace, "long", process)
    process.send_signal(signal.SIGTERM)
    _, _, err = end(process)
    assert "continue with --resume" in err
    run = workplace.path / "runs" / "long"
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    last = workplace.lines("long")[-1]["step"]
    assert (run / "checkpoints" / f"step_{last:06d}" / "MANIFEST.json").exists()


def test_a_killed_rank_ends_the_run_by_name(workplace: Workplace) -> None:
    process = start(workplace, "--run-id", "hurt", "--steps", "500")
    wait_for_step(workplace, "hurt", process)
    os.kill(pid_of_rank(process.pid, 1), signal.SIGKILL)
    began = time.monotonic()
    code, _, err = end(process)
    assert time.monotonic() - began < 45
    assert code != 0
    assert "error: rank 1 of 2 failed: it died without a word" in err
    assert re.search(r"rank +: 0 \(local_rank: 0\)\n +exitcode +: 10 ", err), err[-3000:]
    assert json.loads((workplace.path / "runs" / "hurt" / "run.json").read_text())["status"] == "failed"


def test_a_failure_of_the_leader_is_the_only_message(workplace: Workplace) -> None:
    code, _, err = end(start(workplace, "--run-id", "x", "--student.lora.target_modules", '["nothing"]'))
    assert code != 0
    assert err.count("error: student:") == 1
    assert re.search(r"rank +: 0 \(local_rank: 0\)\n +exitcode +: 2 ", err), err[-3000:]
