"""The files of one run. Local files first; nothing here is ever unpickled.

runs/<id>/
  config.json            the resolved configuration
  run.json               id, versions, attempt, how it ended
  metrics.jsonl          one line a step
  evals.jsonl            one line an evaluation
  episodes/step_*.jsonl  every episode of a step, failed ones too
  episodes/eval_*.jsonl
  checkpoints/step_*/    safetensors + JSON, MANIFEST.json written last
  logs/
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESUMABLE = "run.json"


class RunDirError(Exception):
    """The run directory cannot be used as asked: taken, locked, missing or of another configuration."""


@dataclass(slots=True)
class RunDir:
    """An opened, locked run directory."""

    path: Path
    attempt: int
    """1 for the first start, one more for every resume."""

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
        previous = json.loads((path / RESUMABLE).read_text())
        run = cls(path, attempt=int(previous.get("attempt", 1)) + 1)
        run._lock()
        run.note(status="resumed")
        return run

    def note(self, **values: Any) -> None:
        """Merge values into `run.json`."""
        file = self.path / RESUMABLE
        known = json.loads(file.read_text()) if file.exists() else {"id": self.path.name, "created": time.time()}
        known |= {"attempt": self.attempt, "python": platform.python_version(), "updated": time.time(), **values}
        write_json(file, known)

    def append_metrics(self, line: Mapping[str, Any], file: str = "metrics.jsonl") -> None:
        """Append one JSON line and make it durable."""
        with (self.path / file).open("a", encoding="utf-8") as out:
            out.write(json.dumps(line, allow_nan=False) + "\n")
            out.flush()
            os.fsync(out.fileno())

    def rewind(self, step: int, pending: Collection[int] = ()) -> None:
        """Forget what an interrupted attempt wrote after the checkpoint of `step` steps: its metric lines and its
        episodes, but those of the `pending` steps, which are still to be trained on. They are made again."""
        for file in ("metrics.jsonl", "evals.jsonl"):
            path = self.path / file
            if path.exists():
                kept = [line for line in read_jsonl(path) if int(line["step"]) <= step]
                write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        kept_files = {self.episodes_file(n).name for n in pending}
        for path in (self.path / "episodes").glob("*.jsonl"):
            found = re.fullmatch(r"(?:step|eval)_(\d+)\.jsonl", path.name)
            if found and int(found[1]) > step and path.name not in kept_files:
                path.unlink()

    def episodes_file(self, step: int, kind: str = "step") -> Path:
        return self.path / "episodes" / f"{kind}_{step:06d}.jsonl"

    def close(self, status: str) -> None:
        self.note(status=status)
        (self.path / "LOCK").unlink(missing_ok=True)

    def _lock(self) -> None:
        lock = self.path / "LOCK"
        me = {"pid": os.getpid(), "host": socket.gethostname()}
        try:
            with lock.open("x", encoding="utf-8") as out:
                json.dump(me, out)
            return
        except FileExistsError:
            pass
        try:
            holder = json.loads(lock.read_text())
        except ValueError:
            holder = {}
        if holder.get("host") == me["host"] and not _alive(holder.get("pid")):
            write_text(lock, json.dumps(me))  # the process that held it was killed
            return
        raise RunDirError(
            f"{self.path} is in use by process {holder.get('pid')} on {holder.get('host')}. "
            f"If that process is gone, delete {lock}."
        )


def _alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
