"""What goes along with a run: alarms over its metrics, and its trackers. Neither changes what is learnt."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.alarms import Alarm, alarms_of, lookback
from distill.config import RunConfig
from distill.metrics import Metrics
from distill.rundir import read_jsonl
from distill.track import MARK

GRACE_S = 2.0
"""Seconds that a tracker's process has beyond its own deadline."""


class AlarmStop(Exception):
    """An alarm of `alarms.stop` is on; the last step is saved."""


class Watch:
    """Raises alarms and minds the trackers of one attempt at a run.

    Args:
        run_dir: its `metrics.jsonl` as it is continued.
        resumed: the step after which this attempt goes on; 0: from the start.
        recorded: the last step that an earlier attempt wrote, whether or not it was rewound since; 0: there was none.
        say: gets lines for the user.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, say: Callable[[str], None], *, resumed: int = 0, recorded: int = 0
    ) -> None:
        self._limits, self._say = config.alarms, say
        path = run_dir / "metrics.jsonl"
        self._lines = deque[Mapping[str, Any]](read_jsonl(path) if path.exists() else (), lookback(self._limits))
        self._alarms: list[Alarm] = []
        self._trackers: list[Follower] = []
        for name in config.tracking.to:
            try:
                self._trackers.append(Follower.start(name, config, run_dir, resumed, recorded))
            except OSError as error:  # no process, no log file: that ends no run
                say(f"{name}: cannot be started: {error}")

    def alarms(self, line: Mapping[str, Any]) -> Metrics:
        """The alarms of a step, for its line in `metrics.jsonl`: how many are on, and 1 for each of them."""
        self._alarms = alarms_of([*self._lines, line], self._limits)
        metrics: Metrics = {"alarms": len(self._alarms), **{f"alarm/{alarm.name}": 1 for alarm in self._alarms}}
        self._lines.append({**line, **metrics})
        return metrics

    def speak(self) -> None:
        """Say which alarms are new at the last step, which have been off for a window, and which trackers ended.

        Raises:
            AlarmStop: an alarm of `alarms.stop` is on.
        """
        *before, now = list(self._lines)[-self._limits.window - 1 :]
        for alarm in self._alarms:
            if not any(f"alarm/{alarm.name}" in line for line in before):
                self._say(str(alarm))
        if len(before) == self._limits.window:
            for name in before[0]:
                if name.startswith("alarm/") and not any(name in line for line in (*before[1:], now)):
                    self._say(f"alarm {name.removeprefix('alarm/')} is off")
        for tracker in self._trackers:
            tracker.complain(self._say)
        if stops := [alarm for alarm in self._alarms if alarm.stops]:
            raise AlarmStop("alarms.stop ends the run:\n" + "\n".join(map(str, stops)))

    def close(self, status: str, seconds: float) -> None:
        """Let the trackers finish, together, for so many seconds at most; then end them."""
        for tracker in self._trackers:
            tracker.tell(status)
        end = time.monotonic() + (seconds + GRACE_S if seconds else 0.0)
        for tracker in self._trackers:
            tracker.end(end, self._say)


@dataclass(slots=True)
class Follower:
    """A tracker's process: it reads the run's files, and hears of the end on its stdin."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    rerun: str
    """What the user can do to send what is missing."""
    has_complained: bool = False

    @classmethod
    def start(cls, name: str, config: RunConfig, run_dir: Path, resumed: int, recorded: int) -> Follower:
        tracking = config.tracking
        command = [sys.executable, "-m", "distill.track", str(run_dir), "--to", name, "--project", tracking.project]
        flags = ["--name", tracking.name] if tracking.name else []
        flags += [part for tag in tracking.tags for part in ("--tag", tag)] + ["--offline"] * tracking.offline
        log = run_dir / "logs" / f"tracker_{name}.log"
        with log.open("a") as out:
            process = subprocess.Popen(  # noqa: S603  (our own module)
                [
                    *command,
                    *flags,
                    "--resumed",
                    str(resumed),
                    "--recorded",
                    str(recorded),
                    "--follow",
                    str(tracking.finish_timeout_s),
                ],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # Ctrl-C is for the run; it tells its trackers
            )
        return cls(name, process, log, " ".join(["python", *command[1:]]))

    def last_line(self) -> str:
        """What the process said last; what a library printed, only where it died without a word."""
        try:
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError as error:
            return f"its log cannot be read: {error}"
        ours = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
        return (ours or lines or ["it said nothing"])[-1][:300]

    def complain(self, say: Callable[[str], None]) -> None:
        """Say, once, that the process ended before the run."""
        if not self.has_complained and self.process.poll() is not None:
            self.has_complained = True
            say(f"{self.name}: {self.last_line()}. The run goes on without it; send later: {self.rerun}")

    def tell(self, status: str) -> None:
        """Say how the run ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{status}\n")
        with contextlib.suppress(OSError):  # it has ended
            self.process.stdin.close()

    def end(self, deadline: float, say: Callable[[str], None]) -> None:
        """Wait for the process until `deadline` (`time.monotonic`), then kill it and what it started."""
        try:
            code: int | None = self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if code == 0:
            say(f"{self.name}: {self.last_line()}")
        elif not self.has_complained:
            said = "did not finish in time" if code is None else self.last_line()
            say(f"{self.name}: {said}. Send again: {self.rerun}")
