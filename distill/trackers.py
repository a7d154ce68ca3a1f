"""Experiment trackers behind one small interface: W&B, TensorBoard, trackio.

They run in a process of their own (`python -m distill.track`), never in the trainer's. Libraries are imported where a
tracker is opened. Only numbers are sent; what is `null` in `metrics.jsonl` is left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

TrackerName = Literal["wandb", "tensorboard", "trackio"]

OVERVIEW = (
    "teacher_kl",
    "teacher_kl/above_5",
    "entropy",
    "reward",
    "rollout/num_turns",
    "rollout/truncated",
    "tool/error_rate",
    "mismatch_kl",
    "ratio/clipped",
    "grad_norm",
    "tokens_per_s/rollout",
    "time/step",
)
"""The twelve numbers to look at first: does it learn, does it stay healthy, are the numbers right, how fast is it."""

OVERVIEW_GROUP = "Overview"
"""With a capital: dashboards sort groups by their bytes, and all other names begin with a small letter."""

QUIET = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Environment of a tracker's process, where the user's own does not say otherwise: no reports about itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a tracker is told of a run when it is opened."""

    run_dir: Path
    id: str
    """The same for each attempt at a run, and no other run's."""
    name: str
    """For people."""
    project: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    """The resolved configuration; it holds no keys."""
    resumed: int
    """The step after which this attempt goes on; 0: this is the first."""
    recorded: int
    """The last step that an earlier attempt recorded, and so sent; those after `resumed` are made again. 0: none."""
    offline: bool


class Tracker(Protocol):
    """An opened tracker. Any method may raise anything, or never return."""

    where: str
    """Where to look, in words for the log."""
    has: int
    """The last step that it has already; it wants those after it."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step; steps never go back, but one may come twice with other names."""

    def finish(self, status: str) -> None:
        """Send what is left. `status`: `finished`, `interrupted`, `failed` or `crashed`."""


def values_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of `metrics.jsonl`, the overview's under `Overview/` too and first."""
    numbers = _numbers(line)
    overview = {f"{OVERVIEW_GROUP}/{n.replace('/', '_')}": numbers[n] for n in OVERVIEW if n in numbers}
    return overview | numbers


def eval_values_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of `evals.jsonl`, under `eval/<student or teacher>/`."""
    return {f"eval/{line['name']}/{name}": value for name, value in _numbers(line["metrics"]).items()}


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def open_tracker(name: TrackerName, session: Session) -> Tracker:
    """Import the library and open or resume its run.

    Raises:
        Exception: whatever the library raises; `ImportError` where it is not installed.
    """
    kinds: dict[TrackerName, type[Wandb | TensorBoard | Trackio]] = {
        "wandb": Wandb,
        "tensorboard": TensorBoard,
        "trackio": Trackio,
    }
    return kinds[name](session)


class Wandb:
    """W&B. Its own step is ours: it refuses one that it has already."""

    def __init__(self, session: Session) -> None:
        import wandb

        self._run = wandb.init(
            project=session.project,
            name=session.name,
            id=session.id,
            tags=session.tags,
            config=dict(session.config),
            dir=session.run_dir,
            mode="offline" if session.offline else "online",
            resume="allow",
            # The code, the machine and the console are nobody's business but the user's.
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        self.has = session.recorded
        self.where = f"wandb sync {self._run.dir.removesuffix('/files')}" if session.offline else str(self._run.url)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class TensorBoard:
    """Event files in the run's folder, without torch or TensorFlow."""

    def __init__(self, session: Session) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        folder = session.run_dir / "tensorboard"
        self.where = f"tensorboard --logdir {folder}"
        self.has = session.resumed
        self._writer = EventFileWriter(str(folder))
        if session.recorded > session.resumed:
            # Readers drop what earlier files have from this step on.
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=session.resumed + 1, session_log=start))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        numbers = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=numbers)))
        self._writer.flush()

    def finish(self, status: str) -> None:
        self._writer.close()


class Trackio:
    """trackio's local database, or what its environment variables name (TRACKIO_SPACE_ID, TRACKIO_SERVER_URL)."""

    def __init__(self, session: Session) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(
            project=session.project,
            name=session.name,
            config=dict(session.config),
            resume="allow" if session.recorded else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.has = session.recorded
        self.where = f"trackio show --project {session.project}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def finish(self, status: str) -> None:
        self._trackio.finish()
