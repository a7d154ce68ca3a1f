"""The files of one run. Local files first; nothing here is ever unpickled.

runs/<id>/
  config.json            the resolved configuration
  run.json               id, versions, attempt, task sets, what a resume changed, how it ended
  LOCK                   held by the process at work
  metrics.jsonl          one line a step
  evals.jsonl            one line an evaluation
  episodes/step_*.jsonl  every episode of a step, failed ones too
  episodes/eval_*.jsonl
  checkpoints/step_*/    safetensors + JSON, MANIFEST.json written last
  logs/
  tensorboard/, wandb/   of trackers (`tracking.to`)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESUMABLE = "run.json"
SUPERVISED = "sft"
"""The `kind` in the `run.json` of `distill.sft`; runs of `distill.run` have none."""


class RunDirError(Exception):
    """The run directory cannot be used as asked: taken, locked, missing or of another configuration."""


@dataclass(slots=True)
class RunDir:
    """An opened, locked run directory."""

    path: Path
    attempt: int
    """1 for the first start, one more for every resume."""
    _lock_file: int = field(default=-1, repr=False)
    """Descriptor of `LOCK`, locked as long as it is open: the kernel lets go of it when the process dies."""

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> RunDir:
        """Make a new run directory.

        Raises:
            RunDirError: if the directory already holds a run.
        """
        if (path / RESUMABLE).exists():
            raise RunDirError(
                f"{path} already holds a run. Continue it with --resume {path}, or choose another --run-id."
            )
        (path / "episodes").mkdir(parents=True, exist_ok=True)
        (path / "checkpoints").mkdir(exist_ok=True)
        (path / "logs").mkdir(exist_ok=True)
        run = cls(path, attempt=1)
        run._lock()
        write_json(path / "config.json", config)
        run.note(status="started")
        return run

    @classmethod
    def resume(cls, path: Path) -> RunDir:
        """Open the directory of an earlier attempt.

        Raises:
            RunDirError: if there is no run in it, or another process is at work in it.
        """
        if not (path / RESUMABLE).is_file():
            raise RunDirError(f"{path} holds no run (no {RESUMABLE}). See the folders under runs/.")
        run = cls(path, attempt=1)
        if run.record().get("kind") == SUPERVISED:
            raise RunDirError(
                f"{path} is a run of distill.sft, which is not resumed. Start another, or a distill.run, from what it "
                f"made: --student.model {path}/checkpoints/step_.../model"
            )
        run._lock()
        run.attempt = int(run.record().get("attempt", 1)) + 1
        run.note(status="resumed")
        return run

    def record(self) -> dict[str, Any]:
        """What `run.json` says; {} if it is not there yet.

        Raises:
            RunDirError: it is no JSON object.
        """
        file = self.path / RESUMABLE
        if not file.exists():
            return {}
        try:
            known = json.loads(file.read_text())
        except ValueError as error:
            raise RunDirError(f"{file} is not JSON: {error}") from None
        if not isinstance(known, dict):
            raise RunDirError(f"{file} is no JSON object")
        return known

    def change(self, config: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]) -> None:
        """Go on with another configuration: `config.json` is replaced, the changes are added to `run.json`."""
        if changes:
            made = [{"attempt": self.attempt, **change} for change in changes]
            self.note(changes=[*self.record().get("changes", ()), *made])
            write_json(self.path / "config.json", config)

    def check(self) -> None:
        """
        Raises:
            RunDirError: the directory was deleted or replaced since it was opened. Writing on would leave half a run.
        """
        try:
            here = os.path.samestat(os.fstat(self._lock_file), os.stat(self.path / "LOCK"))
        except FileNotFoundError:
            here = False
        if not here:
            raise RunDirError(
                f"{self.path} was deleted or replaced while the run was at work; nothing is written there"
            )

    def note(self, **values: Any) -> None:
        """Merge values into `run.json`."""
        file = self.path / RESUMABLE
        known = self.record() or {"id": self.path.name, "created": time.time()}
        known |= {"attempt": self.attempt, "python": platform.python_version(), "updated": time.time(), **values}
        write_json(file, known)

    def append_metrics(self, line: Mapping[str, Any], file: str = "metrics.jsonl") -> None:
        """Append one JSON line and make it durable.

        Raises:
            RunDirError: the directory is gone.
            OSError: the disk refused. A torn line is left out by `read_jsonl` and by `rewind`.
        """
        self.check()
        with (self.path / file).open("a", encoding="utf-8") as out:
            out.write(json.dumps(line, allow_nan=False) + "\n")
            out.flush()
            os.fsync(out.fileno())

    def last_step(self) -> int:
        """Of `metrics.jsonl`; 0: no step was recorded."""
        path = self.path / "metrics.jsonl"
        return max((int(line["step"]) for line in read_jsonl(path)), default=0) if path.exists() else 0

    def rewind(self, step: int, pending: Collection[int] = ()) -> None:
        """Forget what an interrupted attempt wrote after the checkpoint of `step` steps: its metric lines and its
        episodes, but those of the `pending` steps, which are still to be trained on, and those of an evaluation without
        a line in `evals.jsonl`. They are made again, the same."""
        for file in ("metrics.jsonl", "evals.jsonl"):
            path = self.path / file
            if path.exists():
                kept = [line for line in read_jsonl(path) if int(line["step"]) <= step]
                write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        evaluated = {self.episodes_file(int(e["step"]), eval_kind(e["name"])).name for e in evaluations(self.path)}
        kept_files = {self.episodes_file(n).name for n in pending}
        for path in (self.path / "episodes").glob("*.jsonl"):
            found = re.fullmatch(r"(step|eval|eval_\w+?)_(\d+)\.jsonl", path.name)
            if found is None or path.name in kept_files:
                continue
            if int(found[2]) > step or (found[1] != "step" and path.name not in evaluated):
                path.unlink()

    def episodes_file(self, step: int, kind: str = "step") -> Path:
        """
        Raises:
            RunDirError: the directory is gone; whoever writes there would make it again.
        """
        self.check()
        return self.path / "episodes" / f"{kind}_{step:06d}.jsonl"

    def close(self, status: str) -> None:
        """Say how the run ended and let others in; nothing is written to a directory that is gone."""
        with contextlib.suppress(RunDirError):
            self.check()
            self.note(status=status)
            (self.path / "LOCK").unlink()
        os.close(self._lock_file)

    def _lock(self) -> None:
        """Take the lock: the kernel's on this machine, the file's text for processes of another machine on a shared
        file system, where the kernel's may not be seen."""
        lock = self.path / "LOCK"
        while True:
            file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
                if os.path.samestat(os.fstat(file), os.stat(lock)):
                    break
            except FileNotFoundError:
                pass
            except BlockingIOError:
                free = False
                break
            os.close(file)  # whoever held it has just ended and removed it
        try:
            holder = json.loads(os.read(file, 4096) or b"{}")
        except ValueError:
            holder = {}
        host = socket.gethostname()
        if not free or holder.get("host", host) != host:
            os.close(file)
            raise RunDirError(
                f"{self.path} is in use by process {holder.get('pid')} on {holder.get('host')}. "
                f"If that process is gone, delete {lock}."
            )
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps({"pid": os.getpid(), "host": host}).encode(), 0)
        self._lock_file = file


def eval_kind(name: str) -> str:
    """Kind of the episode files of an evaluation of `name` (`student`, `teacher`)."""
    return "eval" if name == "student" else f"eval_{name}"


def episode_files(path: Path) -> list[Path]:
    """The episode files that a path means, in order: itself; of a folder of `distill.collect` or `agent_loop.rollout`
    its `episodes.jsonl`, not the failed ones beside it; the training steps of a run; of any other folder, its
    `*.jsonl`. Empty where there is none."""
    if path.is_file():
        return [path]
    if (path / "episodes.jsonl").is_file():
        return [path / "episodes.jsonl"]
    if (path / "episodes").is_dir():
        return sorted((path / "episodes").glob("step_*.jsonl"))
    return sorted(path.glob("step_*.jsonl")) or sorted(path.glob("*.jsonl"))


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `evals.jsonl`; none where nothing was evaluated."""
    file = run / "evals.jsonl"
    return read_jsonl(file) if file.exists() else []


def best_step(run: Path) -> int | None:
    """The step whose evaluation of the student had the highest success, the earliest of several; None if there was none
    that was graded. Evaluations before the first step do not count."""
    graded = {
        int(line["step"]): float(line["metrics"]["reward/success"])
        for line in evaluations(run)
        if line["name"] == "student" and line["step"] > 0 and line["metrics"].get("reward/success") is not None
    }
    return max(graded, key=lambda step: (graded[step], -step), default=None)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; a torn last line (a crash in mid-write) is left out."""
    lines = []
    for raw in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(raw))
        except ValueError:
            continue
    return lines


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
