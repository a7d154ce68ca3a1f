"""F3 to F6: damaged checkpoints, full disks, directories that go away, two processes in one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import children
from tests.runs.conftest import Workplace

TWO = ("--run-id", "one", "--steps", "2", "--checkpoint.every", "1")


def half_a_manifest(checkpoint: Path) -> None:
    file = checkpoint / "MANIFEST.json"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def truncated_tensors(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flipped_bit(checkpoint: Path) -> None:
    file = checkpoint / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (half_a_manifest, "MANIFEST.json: cannot be read"),
        (truncated_tensors, "optimizer.safetensors: has "),
        (flipped_bit, "model.safetensors: is not what was written"),
    ],
)
def test_f03_a_damaged_checkpoint_is_passed_over_with_its_reason_and_refused_by_name(
    workplace: Workplace, damage: Callable[[Path], None], reason: str
) -> None:
    assert children.run(workplace.path, *TWO) == 0, children.said(workplace.path)
    run = workplace.path / "runs" / "one"
    damaged = run / "checkpoints" / "step_000002"
    damage(damaged)
    lines = (run / "metrics.jsonl").read_bytes()

    assert children.run(workplace.path, "--resume", str(damaged)) == 7
    assert reason in children.said(workplace.path).splitlines()[-1]
    assert (run / "metrics.jsonl").read_bytes() == lines  # nothing was rewound

    assert children.run(workplace.path, "--resume", str(run), "--steps", "3") == 0
    said = children.said(workplace.path)
    assert f"passed over: {damaged}/" in said
    assert "resuming after step 1" in said
    assert [line["step"] for line in workplace.lines("one")] == [1, 2, 3]
    assert children.run(workplace.path, "--resume", str(damaged), "--steps", "3") == 0  # it was written again


@pytest.mark.slow
def test_f03_killed_between_the_whole_folder_and_its_name(workplace: Workplace) -> None:
    run, log = workplace.path / "runs" / "one", workplace.path / "events.txt"
    arguments = (workplace.path / "runs" / "whole", log)
    assert children.run(workplace.path, "--run-id", "whole", prepare=children.record_events, arguments=arguments) == 0
    events = log.read_text().splitlines()
    number = 1 + next(i for i, e in enumerate(events) if e.startswith("os.rename") and ".building_000002" in e)
    code = children.run(workplace.path, "--run-id", "one", prepare=children.kill_at_event, arguments=(run, number))
    assert code == -signal.SIGKILL
    left = run / "checkpoints" / ".building_000002"
    assert (left / "MANIFEST.json").exists()
    assert children.run(workplace.path, "--resume", str(run)) == 0
    assert "resuming after step 1" in children.said(workplace.path)
    assert not left.exists()
    assert [line["step"] for line in workplace.lines("one")] == [1, 2, 3]


@pytest.mark.slow
def test_f03_an_earlier_checkpoint_by_name_sets_the_later_ones_aside(workplace: Workplace) -> None:
    assert children.run(workplace.path, "--run-id", "one", "--checkpoint.keep_last", "3") == 0
    run = workplace.path / "runs" / "one"
    assert children.run(workplace.path, "--resume", str(run / "checkpoints" / "step_000001"), "--steps", "2") == 0
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "rewound_000002",
        "rewound_000003",
        "step_000001",
        "step_000002",
    ]
    assert [line["step"] for line in workplace.lines("one")] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "opening", "more", "words"),
    [
        ("checkpoints/.building_000002/model/config.json", 1, 9000, "step_000002: cannot be written"),
        ("metrics.jsonl", 2, 100, "File too large"),
        ("episodes/step_000002.jsonl", 1, 9000, "File too large"),
        ("episodes/step_000002.jsonl", 1, 10, ""),  # stderr, a file too, takes no more either
    ],
)
def test_f04_a_disk_that_takes_no_more_ends_the_run_and_leaves_the_checkpoint(
    workplace: Workplace, file: str, opening: int, more: int, words: str
) -> None:
    """A limit of the kernel on the size of files (RLIMIT_FSIZE) stands for the full disk: EFBIG from the same write."""
    run = workplace.path / "runs" / "one"
    code = children.run(
        workplace.path, "--run-id", "one", prepare=children.limit_when_opened, arguments=(run / file, opening, more)
    )
    said = children.said(workplace.path)
    assert code == 7, said
    assert words in said
    assert "Traceback" not in said
    if "checkpoints" in file:
        assert "a checkpoint needs about" in said
        assert "MiB are free there" in said
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000001"]
    assert children.run(workplace.path, "--resume", str(run)) == 0  # there is room again
    assert [line["step"] for line in workplace.lines("one")] == [1, 2, 3]


@pytest.mark.slow
def test_f04_a_file_system_that_is_full(workplace: Workplace) -> None:
    """The real thing, where this process may mount one: ENOSPC on a tmpfs that holds the first checkpoint alone."""
    small = workplace.path / "small"
    small.mkdir()
    options = ["-t", "tmpfs", "-o", "size=640k", "none", str(small)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("this process may not mount a tmpfs; RLIMIT_FSIZE has the same in the other tests of F4")
    try:
        flags = ("--run-id", "one", "--output_dir", str(small), "--steps", "20", "--checkpoint.keep_last", "9")
        assert children.run(workplace.path, *flags) == 7
        said = children.said(workplace.path)
        assert "cannot be written" in said
        assert "No space left on device" in said or "a checkpoint needs about" in said
        assert "Traceback" not in said
        run = small / "one"
        saved = sorted(p.name for p in (run / "checkpoints").iterdir())
        assert saved
        assert saved == [f"step_{n:06d}" for n in range(1, len(saved) + 1)]  # no half of one
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)  # there is room again
        assert children.run(workplace.path, "--resume", str(run), "--steps", str(len(saved) + 1)) == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
def test_f05_a_directory_that_may_not_be_written(workplace: Workplace) -> None:
    """Without the privilege of root, which writes everywhere."""
    prefix = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root writes everywhere, and there is no setpriv to take that away")
        prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    locked = workplace.path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    command = [*prefix, *workplace.command("--run-id", "one", "--output_dir", str(locked))]
    done = subprocess.run(
        command, cwd=workplace.path, env=workplace.environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 7, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "Permission denied" in errors[0]
    assert str(locked) in errors[0]
    assert "Traceback" not in done.stderr
    assert not list(locked.iterdir())


@pytest.mark.slow
def test_f05_a_run_directory_that_is_deleted_is_not_half_made_again(workplace: Workplace) -> None:
    run = workplace.path / "runs" / "one"
    process = children.start(workplace.path, "--run-id", "one", "--steps", "500", "--checkpoint.every", "500")
    end = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < end, children.said(workplace.path)
        time.sleep(0.02)
    run.rename(workplace.path / "taken-away")  # in one go, as a mount that vanishes
    process.join(60)
    said = children.said(workplace.path)
    assert process.exitcode == 7, said
    assert "was deleted or replaced while the run was at work" in said
    assert "Traceback" not in said
    assert not run.exists()


@pytest.mark.slow
def test_f06_a_second_process_is_refused_and_a_dead_one_is_no_hindrance(workplace: Workplace) -> None:
    run = workplace.path / "runs" / "one"
    first = children.start(workplace.path, "--run-id", "one", "--steps", "500")
    end = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < end, children.said(workplace.path)
        time.sleep(0.02)
    lines = workplace.lines("one")
    assert children.run(workplace.path, "--resume", str(run)) == 7
    assert f"in use by process {first.pid} on {socket.gethostname()}" in children.said(workplace.path)
    assert workplace.lines("one")[: len(lines)] == lines
    assert first.is_alive()
    first.kill()
    first.join()
    assert json.loads((run / "LOCK").read_text())["pid"] == first.pid  # nobody could remove it
    assert children.run(workplace.path, "--resume", str(run), "--steps", str(len(workplace.lines("one")))) == 0


@pytest.mark.slow
def test_f06_of_many_processes_at_once_one_gets_the_lock(tmp_path: Path) -> None:
    """All of them find the lock of a process that died."""
    text = (
        "import sys, time; from pathlib import Path; from distill.rundir import RunDir, RunDirError\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "try:\n    RunDir.resume(Path(sys.argv[1])); print('mine'); time.sleep(3)\n"
        "except RunDirError as error:\n    print('refused')\n"
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    (run / "LOCK").write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}))
    start = str(time.time() + 2)
    command = [sys.executable, "-c", text, str(run), start]
    several = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    assert sorted(p.communicate(timeout=60)[0].strip() for p in several) == ["mine"] + ["refused"] * 7
