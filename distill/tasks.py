"""The order in which tasks are trained on: every task once an epoch, in a shuffle that a seed and the epoch fix; of
several sources each in its own order, mixed by their shares."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from envs.types import Task

T = TypeVar("T")


class TaskSource(Generic[T]):
    """An endless source of tasks, or of stored episodes, whose whole state is one number.

    Example:
        source = TaskSource(tasks, seed=0)
        batch = source.take(16)
        source.cursor          # 16: goes into the checkpoint
        TaskSource(tasks, seed=0, cursor=16).take(16)   # what comes next
    """

    def __init__(self, tasks: Sequence[T], *, seed: int | str, cursor: int = 0) -> None:
        """
        Raises:
            ValueError: if there is no task.
        """
        if not tasks:
            raise ValueError("TaskSource: there are no tasks to train on")
        self._tasks = tuple(tasks)
        self._seed = seed
        self.cursor = cursor
        """Tasks taken since the start of the run, over all epochs."""

    @property
    def epoch(self) -> float:
        """Epochs begun and the share of the present one."""
        return self.cursor / len(self._tasks)

    def take(self, count: int) -> list[T]:
        """The next `count` tasks; runs over into the next epoch."""
        taken = []
        for position in range(self.cursor, self.cursor + count):
            epoch, index = divmod(position, len(self._tasks))
            taken.append(self._tasks[self._order(epoch)[index]])
        self.cursor += count
        return taken

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._shuffled = list(range(len(self._tasks)))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._shuffled)  # a string seed is hashed with sha512
        return self._shuffled


class TaskMixture:
    """An endless source of the tasks of one source or more, whose whole state is one number.

    Each task comes from the source that is furthest behind its share of the tasks so far, this one included (the first
    one of those that are equal): every stretch of a run has all sources in it, and where each began follows from the
    number of tasks alone.

    Args:
        tasks: by the name of the source; not empty where its share is above 0.
        shares: by the name of the source, relative to one another.
        cursor: tasks taken since the start of the run.
    """

    def __init__(
        self, tasks: Mapping[str, Sequence[Task]], shares: Mapping[str, float], *, seed: int, cursor: int = 0
    ) -> None:
        """
        Raises:
            ValueError: a share above 0 without tasks, or none above 0.
        """
        total = sum(shares.values())
        if total <= 0:
            raise ValueError("TaskMixture: there is no share above 0")
        self._shares = {name: share / total for name, share in shares.items() if share > 0}
        self._taken = dict.fromkeys(self._shares, 0)
        self.cursor = 0
        for _ in range(cursor):
            self._next()
        self._sources = {
            # A run without [sources] has one source, of no name.
            name: TaskSource(tasks[name], seed=f"{seed}/{name}" if name else seed, cursor=taken)
            for name, taken in self._taken.items()
        }

    def take(self, count: int) -> list[Task]:
        """The next `count` tasks."""
        return [task for name in [self._next() for _ in range(count)] for task in self._sources[name].take(1)]

    def epochs(self) -> dict[str, float]:
        """Epochs begun and the share of the present one, as metrics: `epoch`, or one for each source."""
        return {f"epoch/{name}" if name else "epoch": source.epoch for name, source in self._sources.items()}

    def _next(self) -> str:
        """The source of the next task."""
        self.cursor += 1
        name = max(self._shares, key=lambda name: self._shares[name] * self.cursor - self._taken[name])
        self._taken[name] += 1
        return name
