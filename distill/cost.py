"""What a run costs and what it waits for: seconds by stage, idle seconds, GPU-seconds, and the bottleneck in words.

Totals are sums over the lines of `metrics.jsonl`, so that they are right for a run that was resumed. Names and
meanings: docs/metrics.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.config import RunConfig, ServerConfig
from distill.metrics import Metrics

WORTH_A_WORD = 0.1
"""Share of a step from which on an idle stage is a bottleneck's doing."""


class BusyClock:
    """Seconds in which at least one piece of work went on: `with clock: ...`, as many at once as there are."""

    def __init__(self) -> None:
        self._at_work = 0
        self._since = 0.0
        self._busy_s = 0.0

    def __enter__(self) -> None:
        if not self._at_work:
            self._since = time.monotonic()
        self._at_work += 1

    def __exit__(self, *_: object) -> None:
        self._at_work -= 1
        if not self._at_work:
            self._busy_s += time.monotonic() - self._since

    @property
    def busy_s(self) -> float:
        """Until now."""
        return self._busy_s + (time.monotonic() - self._since if self._at_work else 0.0)


@dataclass(frozen=True, slots=True)
class Activity:
    """Who is at work beside the trainer."""

    rollout: BusyClock = field(default_factory=BusyClock)
    """An episode of a training step is in play."""
    teacher: BusyClock = field(default_factory=BusyClock)
    """An episode is being scored, or waits for its turn to be."""


class StepClock:
    """The seconds of one training step: `start`, then `lap` after each stage, then `metrics`.

    Args:
        gpus: of each role, from `gpus_of`.
    """

    def __init__(self, activity: Activity, gpus: Mapping[str, int | None]) -> None:
        self._activity = activity
        self._gpus = gpus
        self._last_end: float | None = None
        self.start()

    def start(self) -> None:
        self._began = self._lap_began = time.monotonic()
        self._busy = (self._activity.rollout.busy_s, self._activity.teacher.busy_s)
        self._laps: Metrics = {}

    def lap(self, name: str) -> None:
        """The seconds since the last lap, under a metric's name."""
        now = time.monotonic()
        self._laps[name] = now - self._lap_began
        self._lap_began = now

    def metrics(self, step: Mapping[str, float | int | None]) -> Metrics:
        """All of the step's seconds, and what it cost.

        Args:
            step: the step's other metrics.
        """
        now = time.monotonic()
        seconds = now - self._began
        # Evaluations and checkpoints before the step hold the GPUs too.
        held_s = now - (self._last_end if self._last_end is not None else self._began)
        self._last_end = now
        rollout_s, teacher_s = self._busy
        gpu_s = {name: None if count is None else count * held_s for name, count in self._gpus.items()}
        known = [value for value in gpu_s.values() if value is not None]
        sent, trained = step.get("teacher/tokens"), step.get("train/tokens")
        return {
            **self._laps,
            "time/step": seconds,
            "idle/rollout": max(0.0, seconds - (self._activity.rollout.busy_s - rollout_s)),
            "idle/teacher": max(0.0, seconds - (self._activity.teacher.busy_s - teacher_s)),
            "cost/teacher_tokens_per_trained": sent / trained if sent is not None and trained else None,
            "cost/trained_per_sampled": ratio(trained, step.get("rollout/sampled_tokens")),
            "cost/gpu_s": sum(known) if known and len(known) == len(gpu_s) else None,
            **{f"cost/gpu_s/{name}": value for name, value in gpu_s.items()},
        }


def ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def gpus_of(config: RunConfig, *, machine_has_gpu: bool, trainer_gpus: int) -> dict[str, int | None]:
    """GPUs that each role holds for as long as the run lasts; None: not known, or there are none. A model that is
    served in the trainer's process, or a teacher on the student's server, has none of its own and no entry.

    Args:
        machine_has_gpu: servers of the run are on GPUs.
        trainer_gpus: over all ranks; 0 on a CPU, whose seconds are not a GPU's.
    """
    gpus: dict[str, int | None] = {"trainer": trainer_gpus or None}
    student, teachers = config.student, config.places_of_teachers.values()
    if student.base_url is not None:
        gpus["student"] = config.cost.student_gpus
    elif student.server is not None:
        gpus["student"] = _launched(student.server) if machine_has_gpu else None
    given = [teacher for teacher in teachers if teacher.base_url is not None]
    started = [_launched(teacher.server) for teacher in teachers if teacher.server is not None]
    if given or started:  # `cost.teacher_gpus` counts those of all given servers
        parts = [config.cost.teacher_gpus] * bool(given) + [sum(started) if machine_has_gpu else None] * bool(started)
        known = [part for part in parts if part is not None]
        gpus["teacher"] = sum(known) if len(known) == len(parts) else None
    return gpus


def _launched(server: ServerConfig) -> int:
    return server.tensor_parallel * server.data_parallel


def total(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Sum over the steps that have it; None where none has."""
    values = [line[name] for line in lines if line.get(name) is not None]
    return sum(values) if values else None


def cost_lines(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tokens, seconds and GPU-seconds of a whole run, in words."""

    def show(name: str, form: str = "{:,.0f}") -> str:
        value = total(lines, name)
        return form.format(value) if value is not None else "-"

    def shown_ratio(part: str, whole: str, form: str) -> str:
        value = ratio(total(lines, part), total(lines, whole))
        return form.format(value) if value is not None else "-"

    stages = {
        "rollouts": "time/rollout",
        "training": "time/train",
        "publishing": "time/publish",
        "the trainer waited": "idle/trainer",
        "for scores alone": "idle/trainer_for_scores",
    }
    roles = sorted({name for line in lines for name in line if name.startswith("cost/gpu_s/")})
    known = [f"{role.removeprefix('cost/gpu_s/')} {show(role)}" for role in roles if total(lines, role) is not None]
    unknown = [role.removeprefix("cost/gpu_s/") for role in roles if total(lines, role) is None]
    gpu_s = ", ".join(known) or "none"
    return [
        f"tokens: {show('rollout/sampled_tokens')} sampled, {show('train/tokens')} trained "
        f"({shown_ratio('train/tokens', 'rollout/sampled_tokens', '{:.0%}')}), {show('teacher/tokens')} sent to the "
        f"teacher ({shown_ratio('teacher/tokens', 'train/tokens', '{:.1f}')} a trained token)",
        f"seconds: {show('time/step', '{:,.1f}')} in {len(lines)} steps ("
        + ", ".join(f"{words} {show(name, '{:,.1f}')}" for words, name in stages.items())
        + ")",
        f"GPU-seconds: {gpu_s}" + (f"; not known: {', '.join(unknown)}" if known and unknown else ""),
    ]


def bottleneck(lines: Sequence[Mapping[str, Any]], max_staleness: int) -> str | None:
    """Which stage the others wait for, and what to do about it; None without a step to judge by.

    The first step is left out where there are others: it has nothing to overlap with, and much happens for the
    first time in it.
    """
    lines = lines[1:] if len(lines) > 1 else lines
    step_s = total(lines, "time/step")
    if not step_s:
        return None

    def share(name: str) -> float:
        return (total(lines, name) or 0.0) / step_s

    waits, trains = share("idle/trainer"), share("time/train") + share("time/publish")
    if not max_staleness:
        gain = (waits + trains) / max(waits, trains, 1e-9)
        slower = _slow_source(lines) if waits >= trains else TRAINER_SLOW
        overlap = f" rollout.max_staleness = 1 would overlap them: at best {gain:.1f}x." if gain > 1.1 else ""
        return (
            f"bottleneck: rollouts and scoring take {waits:.0%} of a step, training and publishing {trains:.0%}, one "
            f"after the other.{overlap} {slower}"
        )
    if waits > WORTH_A_WORD:
        return f"bottleneck: the trainer waits for episodes {waits:.0%} of the time. {_slow_source(lines)}"
    idle = share("idle/rollout")
    if idle > WORTH_A_WORD:
        return f"bottleneck: the trainer; rollouts wait for new weights {idle:.0%} of the time. {TRAINER_SLOW}"
    return f"bottleneck: none; the trainer waits {waits:.0%}, rollouts {idle:.0%} of the time."


TRAINER_SLOW = (
    "The trainer is the slower side: more GPUs for it, adapters (student.lora), or fewer for the student's servers."
)


def _slow_source(lines: Sequence[Mapping[str, Any]]) -> str:
    """Why episodes come late: tools, the student's servers or the teacher."""
    tail, waited = total(lines, "idle/trainer_for_scores") or 0.0, total(lines, "idle/trainer") or 0.0
    if waited and tail > waited / 2:
        return (
            "Scoring is the slower side: more teacher servers (teacher.server.data_parallel) or a larger "
            "teacher.max_tokens_in_flight."
        )
    tools, sampling = total(lines, "time/tools") or 0.0, total(lines, "time/sampling") or 0.0
    if tools > sampling:
        return (
            f"Episodes spend {tools / (tools + sampling):.0%} of their time in tools: faster tools, or a larger "
            "rollout.max_concurrent."
        )
    return (
        "Sampling is the slower side: more student servers (student.server.data_parallel), a larger "
        "rollout.max_concurrent, or shorter turns."
    )
