"""`python -m distill.track RUN --to wandb`: copy a run's metrics into a tracker, afterwards or as they are written.

The run starts one such process for each tracker of `[tracking]`. It follows `metrics.jsonl` and `evals.jsonl`, so the
files are the queue: nothing is held in memory, nothing is dropped, and a tracker that is slow, hangs or dies takes
nothing from the trainer. What it could not send stands in the files and can be sent again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from distill.trackers import QUIET, Session, Tracker, TrackerName, eval_values_of, open_tracker, values_of

POLL_S = 0.5
"""Seconds between two looks at the files."""


class Tail:
    """The whole lines of a JSONL file that is being written, each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Lines since the last call; a line without its end waits for the next one."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                self._offset += len(raw)
                try:
                    line = json.loads(raw)
                except ValueError:
                    continue  # torn by a crash; the lines around it are whole
                if isinstance(line, dict):
                    yield line


class Copier:
    """Sends what is new in a run's files, and counts."""

    def __init__(self, tracker: Tracker, session: Session) -> None:
        self._tracker = tracker
        self._metrics, self._evals = (Tail(session.run_dir / name) for name in ("metrics.jsonl", "evals.jsonl"))
        self.sent = 0
        """Steps that the tracker took."""
        self.failed = 0
        """Steps and evaluations that it raised at."""

    def copy(self) -> None:
        """Everything new, in the order of the steps; an evaluation follows its step."""
        lines = [(int(line["step"]), 0, values_of(line)) for line in self._metrics.new()]
        lines += [(int(line["step"]), 1, eval_values_of(line)) for line in self._evals.new()]
        for step, kind, values in sorted(lines, key=lambda item: item[:2]):
            if step < self._tracker.has + (kind == 0):
                continue  # but the evaluation after the last step may be missing
            try:
                self._tracker.log(step, values)
            except Exception as error:  # whatever a library raises: the next step may be taken
                self.failed += 1
                if self.failed == 1:
                    say(f"step {step} was not taken: {type(error).__name__}: {error}")
            else:
                self.sent += kind == 0


MARK = "track: "
"""Begins the lines that are ours; libraries print between them."""


def say(text: str) -> None:
    """One line, at once: the process may be killed, and its last line is what the run says of it."""
    print(MARK + text, flush=True)


class Ending(threading.Thread):
    """Waits for the run to say on stdin how it ended, or to die; from then on this process has `seconds` to live,
    whatever its other threads hang in."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self._seconds = seconds
        self.said = threading.Event()
        self.status = "crashed"
        self.start()

    def run(self) -> None:
        self.status = sys.stdin.readline().strip() or self.status
        self.said.set()
        time.sleep(self._seconds)
        say(f"gave up {self._seconds:g} s after the end of the run")
        if os.getpgrp() == os.getpid():  # a group of its own, with what the library started in it
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


def follow(copier: Copier, ending: Ending) -> None:
    """Copy as the run writes, until it ends."""
    while not ending.said.wait(POLL_S):
        copier.copy()


def session_of(arguments: argparse.Namespace) -> Session:
    """What the run's files and the flags say."""
    run_dir: Path = arguments.run
    config = json.loads((run_dir / "config.json").read_text())
    about = json.loads((run_dir / "run.json").read_text())
    return Session(
        run_dir=run_dir,
        id=f"{about['id']}-{int(about['created'])}",
        name=arguments.name or about["id"],
        project=arguments.project,
        tags=tuple(arguments.tag),
        config=config,
        resumed=arguments.resumed,
        recorded=arguments.recorded,
        offline=arguments.offline,
    )


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 0 only if every step was taken."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.track", description="Copy the metrics of a run into an experiment tracker."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--to", required=True, choices=get_args(TrackerName))
    parser.add_argument("--project", default="distill-gym", help="project in W&B and trackio")
    parser.add_argument("--name", help="the run's name there; default: that of its folder")
    parser.add_argument("--tag", action="append", default=[], help="in W&B; repeatable")
    parser.add_argument("--resumed", type=int, default=0, metavar="STEP", help="the run was resumed after this step")
    parser.add_argument("--recorded", type=int, default=0, metavar="STEP", help="and had sent the steps up to this one")
    parser.add_argument("--offline", action="store_true", help="send nothing over the network")
    parser.add_argument(
        "--follow", type=float, metavar="SECONDS", help="go on until stdin ends, and this much longer (for distill.run)"
    )
    arguments = parser.parse_args(argv)
    if not (arguments.run / "run.json").is_file():
        parser.error(f"{arguments.run} holds no run (no run.json). See the folders under runs/.")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    session = session_of(arguments)
    if session.offline:
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            os.environ.pop(name, None)
    ending = Ending(arguments.follow) if arguments.follow is not None else None
    try:
        tracker = open_tracker(arguments.to, session)
    except ImportError as error:
        say(f"cannot be imported: {error}; install the extra `trackers`")
        return 1
    except Exception as error:
        say(f"cannot be opened: {type(error).__name__}: {error}")
        return 1
    copier = Copier(tracker, session)
    try:
        if ending is not None:
            follow(copier, ending)
        copier.copy()
        tracker.finish(ending.status if ending is not None else "finished")
    except Exception as error:
        say(f"{copier.sent} steps sent, then {type(error).__name__}: {error}")
        return 1
    say(f"{copier.sent} steps sent{f', {copier.failed} lines not taken' if copier.failed else ''}; {tracker.where}")
    return int(copier.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
