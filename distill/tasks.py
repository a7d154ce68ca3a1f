"""The order in which tasks are trained on: every task once an epoch, in a shuffle that a seed and the epoch fix."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class TaskSource(Generic[T]):
    """An endless source of tasks, or of stored episodes, whose whole state is one number.

    Example:
        source = TaskSource(tasks, seed=0)
        batch = source.take(16)
        source.cursor          # 16: goes into the checkpoint
        TaskSource(tasks, seed=0, cursor=16).take(16)   # what comes next
    """

    def __init__(self, tasks: Sequence[T], *, seed: int, cursor: int = 0) -> None:
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
