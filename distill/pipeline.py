"""Scored steps in order, played ahead of the trainer as far as `rollout.max_staleness` allows.

    version of the weights   0         1         2         3
    trainer                    train 1   train 2   train 3          step n makes version n of version n - 1
    max_staleness 0          play 1    play 2    play 3             in turns: 2 is played by version 1
    max_staleness 1          play 1 2    play 3    play 4           2 is played by version 0 or 1, trained on 1

Rollouts of step n begin once version n - 1 - max_staleness is served by every server, and what is served never goes
back. So every token of step n is at most `max_staleness` updates older than version n - 1, on which it is trained.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from agent_loop.types import Episode
from distill.build import Parts
from distill.metrics import Metrics
from distill.rundir import RunDir
from distill.step import ScoredStep, collect, jobs_for, read_back
from distill.tasks import TaskMixture
from envs.types import Task


@dataclass(slots=True)
class _Play:
    """A step whose episodes are being played and scored, or are waiting for the trainer."""

    task: asyncio.Task[ScoredStep]
    num_left: int
    """Episodes that have not ended."""
    played_at: float | None = None
    """When the last one ended, by `time.monotonic`; from then on only scores are missing."""
    num_scored: int = 0
    on_episode: Callable[[], None] = lambda: None


class Pipeline:
    """Makes the episodes of training steps; `next` hands them out.

    Args:
        source: where the tasks of the next step come from.
        version: of the weights that are served, which is the number of steps made.
        pending: later steps whose episodes an earlier attempt finished (`Checkpoint.pending`); they are read back.
        say: told of what could not be read back.
    """

    def __init__(
        self,
        parts: Parts,
        run: RunDir,
        source: TaskMixture,
        *,
        version: int,
        pending: Collection[int] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        self._parts = parts
        self._run = run
        self._source = source
        self._recorded = frozenset(pending)
        self._say = say
        self._max_staleness = parts.config.rollout.max_staleness
        self._version = version
        self._begun = version
        """The last step that was begun."""
        self._plays: dict[int, _Play] = {}
        self._changed = asyncio.Event()
        self._closed = False

    async def next(self, step: int, on_episode: Callable[[], None] = lambda: None) -> ScoredStep:
        """The scored episodes of a step; steps are asked for in order, each after the one before it was published.

        Args:
            on_episode: called for each scored episode of the step, those of before too.

        Raises:
            Exception: what the rollouts of this step or of a later one raised.
        """
        asked_at = time.monotonic()
        self._begin_what_may()
        play = self._plays[step]
        for _ in range(play.num_scored):
            on_episode()
        play.on_episode = on_episode
        while True:
            self._raise_failure()
            if play.task.done():
                break
            self._changed.clear()
            await self._changed.wait()
        del self._plays[step]
        scored = play.task.result()
        if play.played_at is not None:
            scored.metrics["idle/trainer_for_scores"] = time.monotonic() - max(play.played_at, asked_at)
        scored.metrics |= staleness_metrics(scored.trainable, step - 1)
        if (found := scored.metrics["staleness/max"]) is not None and found > self._max_staleness:
            raise AssertionError(f"step {step} has a token that is {found} updates old: rollouts began too early")
        return scored

    def published(self, version: int) -> None:
        """Every server samples from these weights now: later steps may begin."""
        self._version = version
        if self._max_staleness:  # else in turns: evaluation and checkpoint come first
            self._begin_what_may()

    @property
    def pending(self) -> list[int]:
        """Steps whose episodes are all scored and recorded, and not yet handed out."""
        return sorted(step for step, play in self._plays.items() if play.task.done() and not _failure(play.task))

    async def aclose(self) -> None:
        """Cancel what is being played; nothing is left running."""
        self._closed = True
        tasks = [play.task for play in self._plays.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin_what_may(self) -> None:
        """Begin the steps that the served weights are new enough for, one after the other: a step begins when all
        episodes of the one before it have, so that its first ones take the slots that the last ones leave."""
        newest = min(self._parts.config.steps, self._version + 1 + self._max_staleness)
        while not self._closed and self._begun < newest and self._all_begun():
            self._begun += 1
            self._begin(self._begun)

    def _all_begun(self) -> bool:
        """Whoever played an episode took the next one at once: those that are left are in play when they are no more
        than the slots."""
        play = self._plays.get(self._begun)
        return play is None or play.task.done() or play.num_left <= self._parts.config.rollout.max_concurrent

    def _begin(self, step: int) -> None:
        rollout = self._parts.config.rollout
        tasks = self._source.take(rollout.batch_size)
        cursor, epochs = self._source.cursor, self._source.epochs()

        async def make() -> ScoredStep:
            scored = self._read_back(step, tasks) or await self._collect(step, tasks)
            scored.cursor = cursor
            scored.metrics |= epochs
            return scored

        task = asyncio.ensure_future(make())
        self._plays[step] = _Play(task, num_left=len(tasks) * rollout.group_size)
        task.add_done_callback(self._ended)

    async def _collect(self, step: int, tasks: Sequence[Task]) -> ScoredStep:
        play = self._plays[step]

        def played() -> None:
            play.num_left -= 1
            if not play.num_left:
                play.played_at = time.monotonic()
            self._begin_what_may()

        def scored() -> None:
            play.num_scored += 1
            play.on_episode()

        return await collect(self._parts, self._run, tasks, step, on_played=played, on_episode=scored)

    def _read_back(self, step: int, tasks: Sequence[Task]) -> ScoredStep | None:
        """What an earlier attempt made of the step; None where it made nothing that can be used."""
        if step not in self._recorded:
            return None
        path, config = self._run.episodes_file(step), self._parts.config
        jobs = jobs_for(tasks, group_size=config.rollout.group_size, step=step, seed=config.seed)
        try:
            scored = read_back(path, jobs, config)
            oldest = max(staleness(scored.trainable, step - 1), default=0)
            if oldest > self._max_staleness:
                raise ValueError(f"has a token that is {oldest} updates old")
        except (OSError, ValueError) as error:
            self._say(f"{path}: {error}; step {step} is played again")
            path.unlink(missing_ok=True)
            return None
        return scored

    def _ended(self, task: asyncio.Task[ScoredStep]) -> None:
        self._changed.set()
        if not _failure(task):
            self._begin_what_may()

    def _raise_failure(self) -> None:
        for play in self._plays.values():
            if play.task.done() and (error := _failure(play.task)) is not None:
                raise error


def _failure(task: asyncio.Task[ScoredStep]) -> BaseException | None:
    """Of a task that is done."""
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def staleness(episodes: Sequence[Episode], version: int) -> Counter[int]:
    """Trained tokens by the number of updates between the weights that sampled them and `version`, on which they are
    trained. Tokens whose version nobody said are not in it."""
    counts: Counter[int] = Counter()
    for episode in episodes:
        for trace in episode.traces:
            pairs = zip(trace.policy_versions or (), trace.loss_mask, strict=False)
            counts.update(version - sampled for sampled, trained in pairs if trained and sampled is not None)
    return counts


def staleness_metrics(episodes: Sequence[Episode], version: int) -> Metrics:
    """Mean and largest staleness of a trained token, in updates."""
    counts = staleness(episodes, version)
    if not counts:
        return {"staleness/mean": None, "staleness/max": None}
    return {
        "staleness/mean": sum(age * count for age, count in counts.items()) / counts.total(),
        "staleness/max": max(counts),
    }
