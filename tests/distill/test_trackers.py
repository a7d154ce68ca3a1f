"""Trackers: the real libraries with what they wrote read back, and libraries that fail in every way they can (F20)."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from distill.config import RunConfig
from distill.rundir import RunDir
from distill.trackers import OVERVIEW, TrackerName, eval_values_of, values_of
from distill.watch import AlarmStop, Watch

ROOT = Path(__file__).resolve().parents[2]
NAMES: tuple[TrackerName, ...] = get_args(TrackerName)


def line(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "teacher_kl": 1.0 / step,
        "teacher_kl/p99": 3.0 / step,
        "entropy": None,
        "rollout/truncated": 0.0,
        "lr": 1e-5,
        "alarms": 0,
    }


def config_of(path: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"env": "e", "student": {"model": "s"}, "teacher": {"model": "t"}, "output_dir": str(path), **sections}
    )


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    opened = RunDir.create(tmp_path / "runs" / "one", config_of(tmp_path).model_dump(mode="json"))
    yield opened
    opened.close("finished")


@pytest.fixture
def canary() -> Iterator[list[bytes]]:
    """What anybody sends to the proxy of `environment`; nobody should."""
    server = socket.create_server(("127.0.0.1", 0))
    heard: list[bytes] = []

    def listen() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                heard.append(connection.recv(1000))

    os.environ["CANARY_PORT"] = str(server.getsockname()[1])
    thread = threading.Thread(target=listen)
    thread.start()
    yield heard
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()
    del os.environ["CANARY_PORT"]


def environment(path: Path) -> dict[str, str]:
    """Nothing but loopback: what dials out goes to the canary's port."""
    proxy = f"http://127.0.0.1:{os.environ.get('CANARY_PORT', '9')}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_", "HF_"))}
    return clean | {
        "PYTHONPATH": str(ROOT),
        "TRACKIO_DIR": str(path / "trackio"),
        "HOME": str(path),
        "HTTP_PROXY": proxy,
        "HTTPS_PROXY": proxy,
        "ALL_PROXY": proxy,
    }


def track(run: RunDir, to: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distill.track", str(run.path), "--to", to, "--offline", *flags]
    home = run.path.parent.parent
    return subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=120)


def read_back(run: RunDir, name: str) -> dict[str, list[tuple[int, float]]]:
    """What the tracker holds: by metric, (step, value) in the order of the steps."""
    found: dict[str, list[tuple[int, float]]] = {}
    if name == "trackio":
        with sqlite3.connect(run.path.parent.parent / "trackio" / "distill-gym.db") as database:
            for step, values in database.execute("SELECT step, metrics FROM metrics WHERE run_name = 'one'"):
                for metric, value in json.loads(values).items():
                    found.setdefault(metric, []).append((step, value))
        return {metric: sorted(values) for metric, values in found.items()}
    # In a process of its own: both libraries warn at import, and warnings are errors here.
    reader = {"tensorboard": READ_EVENTS, "wandb": READ_WANDB}[name]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(reader), str(run.path)],
        capture_output=True, text=True, timeout=60, env=environment(run.path.parent.parent),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for metric, step, value in json.loads(done.stdout):
        found.setdefault(metric, []).append((step, value))
    return {metric: sorted(values) for metric, values in found.items()}


READ_EVENTS = """
    import json, sys
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(sys.argv[1] + "/tensorboard", size_guidance={"scalars": 0}).Reload()
    print(json.dumps([(n, e.step, e.value) for n in events.Tags()["scalars"] for e in events.Scalars(n)]))
"""
READ_WANDB = """
    import glob, json, struct, sys
    from wandb.proto.wandb_internal_pb2 import Record

    def records(path):  # LevelDB's log format after a header of 7 bytes: blocks of 32 KiB, records in up to 3 parts
        data, offset, parts = open(path, "rb").read(), 7, b""
        while offset + 7 <= len(data):
            if 32768 - offset % 32768 < 7:
                offset += 32768 - offset % 32768
            _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
            parts += data[offset + 7 : offset + 7 + length]
            offset += 7 + length
            if kind in (1, 4):
                yield parts
                parts = b""

    found = []
    for path in sorted(glob.glob(sys.argv[1] + "/wandb/offline-run-*/*.wandb")):
        for data in records(path):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                step = record.history.step.num
                found += [(n, step, v) for n, v in values.items() if not n.startswith("_")]
    print(json.dumps(found))
"""


def test_the_overview_comes_first_and_what_is_not_computed_is_left_out() -> None:
    values = values_of(line(2) | {"tool/error_rate": 0.25, "text": "x"})
    assert list(values)[:3] == ["Overview/teacher_kl", "Overview/rollout_truncated", "Overview/tool_error_rate"]
    assert values["Overview/teacher_kl"] == values["teacher_kl"] == 0.5
    assert values["tool/error_rate"] == 0.25
    assert not {"entropy", "Overview/entropy", "step", "text"} & set(values)
    assert len(OVERVIEW) == len(set(OVERVIEW)) == 12
    assert eval_values_of({"name": "student", "step": 4, "metrics": {"reward": 0.5, "x": None}}) == {
        "eval/student/reward": 0.5
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_the_real_library_wrote_is_what_the_run_wrote(run: RunDir, name: str, canary: list[bytes]) -> None:
    run.append_metrics({"name": "student", "step": 0, "metrics": {"reward": 0.25}}, file="evals.jsonl")
    for step in (1, 2, 3):
        run.append_metrics(line(step))
    run.append_metrics({"name": "student", "step": 3, "metrics": {"reward": 0.75}}, file="evals.jsonl")
    done = track(run, name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "track: 3 steps sent; " in done.stdout
    found = read_back(run, name)
    assert found["teacher_kl"] == [(step, pytest.approx(1.0 / step)) for step in (1, 2, 3)]
    assert found["Overview/teacher_kl"] == found["teacher_kl"]
    assert found["teacher_kl/p99"][2] == (3, pytest.approx(1.0))
    assert found["eval/student/reward"] == [(0, 0.25), (3, 0.75)]
    assert not any("entropy" in metric for metric in found)
    assert canary == []


@pytest.mark.parametrize("name", NAMES)
def test_a_second_attempt_goes_on_after_the_last_step_of_the_first(run: RunDir, name: str) -> None:
    for step in (1, 2, 3):
        run.append_metrics(line(step))
    assert track(run, name).returncode == 0
    recorded = run.last_step()
    run.rewind(2)  # the checkpoint was older than the last line: step 3 is made again
    for step in (3, 4):
        run.append_metrics(line(step))
    done = track(run, name, "--resumed", "2", "--recorded", str(recorded))
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_back(run, name)["teacher_kl"] == [(step, pytest.approx(1.0 / step)) for step in (1, 2, 3, 4)]


def test_it_follows_a_run_that_is_being_written(run: RunDir) -> None:
    watch = Watch(config_of(run.path, tracking={"to": ["tensorboard"]}), run.path, [].append)
    for step in (1, 2):
        run.append_metrics(line(step))
    with (run.path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 3, "teach')
        out.flush()
        until(lambda: sum(f.read_bytes().count(b"kl/p99") for f in (run.path / "tensorboard").glob("*")) == 2)
        out.write('er_kl": 7.0}\n')
    watch.close("finished", 60.0)
    assert [step for step, _ in read_back(run, "tensorboard")["teacher_kl"]] == [1, 2, 3]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_run_that_was_killed_leaves_a_tracker_that_finishes(run: RunDir) -> None:
    run.append_metrics(line(1))
    command = [sys.executable, "-m", "distill.track", str(run.path), "--to", "tensorboard", "--follow", "60"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(run.path.parent.parent), text=True
    )
    out, _ = process.communicate(timeout=60)  # stdin ends without a word, as when its writer was killed
    assert process.returncode == 0
    assert "1 steps sent" in out


BROKEN = {
    "import": "raise ImportError('no such library')",
    "401": "class Settings:\n    def __init__(self, **k): pass\ndef init(**k): raise PermissionError('401: refused')",
    "exit": "import os\nos._exit(3)",
    "log": "raise OSError(28, 'No space left on device')",
    "hang in import": "hang()",
    "hang in init": "class Settings:\n    def __init__(self, **k): pass\ndef init(**k): hang()",
    "hang in log": "hang()",
    "hang in finish": "hang()",
}
SAYS = {
    "import": "cannot be imported: no such library",
    "401": "cannot be opened: PermissionError: 401: refused",
    "exit": "it said nothing",
    "log": "0 steps sent, 3 lines not taken",
    "hang in import": "gave up 1 s after the end of the run",
    "hang in init": "gave up 1 s after the end of the run",
    "hang in log": "gave up 1 s after the end of the run",
    "hang in finish": "gave up 1 s after the end of the run",
}


def broken_library(folder: Path, fault: str) -> None:
    """A `wandb` that fails as `fault` says, whose own thread and exit hook hang too."""
    folder.mkdir()
    body = BROKEN[fault]
    if fault in ("log", "hang in log", "hang in finish"):
        method = fault.split()[-1]
        body = textwrap.dedent(f"""
            class Run:
                dir = url = "x"
                def log(self, *a, **k): {body if method == "log" else "pass"}
                def finish(self, **k): {body if method == "finish" else "pass"}
            class Settings:
                def __init__(self, **k): pass
            def init(**k): return Run()
        """)
    hang = "import time, os\nopen(os.environ['PIDS'], 'a').write(f'{os.getpid()}\\n')\ndef hang(): time.sleep(1e6)\n"
    (folder / "wandb.py").write_text(hang + body)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_library_that_fails_is_said_once_and_takes_nothing_from_the_run(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    broken_library(tmp_path / "broken", fault)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'broken'}{os.pathsep}{ROOT}")
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    said: list[str] = []
    config = config_of(tmp_path, tracking={"to": ["wandb"], "finish_timeout_s": 1.0})
    watch = Watch(config, run.path, said.append)
    until((tmp_path / "pids").exists)
    for step in (1, 2, 3):
        run.append_metrics(line(step) | watch.alarms(line(step)))
        watch.speak()
    watch.close("finished", 1.0)
    (message,) = said
    assert message.startswith("wandb: ")
    assert SAYS[fault] in message
    assert f"python -m distill.track {run.path} --to wandb" in message
    for pid in (tmp_path / "pids").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_a_folder_that_cannot_be_written_is_said(run: RunDir) -> None:
    (run.path / "tensorboard").write_text("in the way")
    done = track(run, "tensorboard")
    assert done.returncode == 1
    assert "track: cannot be opened: " in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distill.track", str(tmp_path), "--to", "wandb"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert f"{tmp_path} holds no run" in done.stderr


def test_an_alarm_is_said_once_until_it_clears(run: RunDir) -> None:
    said: list[str] = []
    config = config_of(run.path, alarms={"window": 3})
    cut = [0.0, 0.5, 0.5, 0.5, 0.5, 0.1, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5]
    on = []
    watch = Watch(config, run.path, said.append)
    for step, share in enumerate(cut, start=1):
        if step == 8:  # a second attempt knows what the first one said: it stands in the lines
            watch = Watch(config, run.path, said.append, resumed=7, recorded=7)
        before = len(said)
        metrics = {"step": step, "rollout/truncated": share}
        alarms = watch.alarms(metrics)
        run.append_metrics(metrics | alarms)
        watch.speak()
        assert alarms == {"alarms": 1, "alarm/truncated": 1} or alarms == {"alarms": 0}
        on += [step] * int(alarms["alarms"] or 0)
        said[before:] = [f"{step}: {text}" for text in said[before:]]
    assert on == [4, 5, 9, 17]
    assert [text.partition(". ")[0] for text in said] == [
        "4: ALARM truncated: rollout/truncated is 50%, above 25% for 3 steps",
        "8: alarm truncated is off",
        "9: ALARM truncated: rollout/truncated is 50%, above 25% for 3 steps",
        "12: alarm truncated is off",
        "17: ALARM truncated: rollout/truncated is 50%, above 25% for 3 steps",
    ]


def test_an_alarm_may_stop_the_run(run: RunDir) -> None:
    said: list[str] = []
    watch = Watch(config_of(run.path, alarms={"stop": ["coverage"]}), run.path, said.append)
    assert watch.alarms({"step": 1, "teacher/coverage": 0.5}) == {"alarms": 1, "alarm/coverage": 1}
    with pytest.raises(AlarmStop, match=r"coverage is 50\.00%, below 99\.90%"):
        watch.speak()
