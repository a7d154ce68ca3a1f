"""The trainer on several processes (torchrun, FSDP2): rank 0 leads, the others obey.

Rank 0 runs all of `distill.run`. The others hold their share of the student and wait (`distill.follow`): what the
leader calls on its student, they call on theirs, so that every collective has all its partners. Calls travel as JSON in
byte tensors, weights and rows as tensors; nothing is pickled (`distill.fsdp`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from distill.batch import TrainItem, split_micro_batches
from distill.failures import EXIT_RANK
from distill.follow import world_size

if TYPE_CHECKING:
    from distill.rows import RowModel

T = TypeVar("T")
Share = tuple[list[TrainItem], bool]
"""A micro-batch, and whether it counts: False where it only keeps the collectives of a rank without work company."""


class RankError(Exception):
    """Another process of the trainer failed or died; the message names its rank.

    Args:
        code: the exit code that its failure stands for.
    """

    def __init__(self, message: str, code: int = EXIT_RANK) -> None:
        super().__init__(message)
        self.code = code


class Ranks:
    """One process: there is nobody to share with."""

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def shard(self, rows: RowModel) -> dict[str, torch.dtype]:
        """Split the weights over the ranks.

        Returns:
            By name in `rows.model`: what was a narrower number before, of weights that are now float32 masters.

        Raises:
            ValueError: the model cannot be split.
        """
        return {}

    def reshard(self, rows: RowModel) -> None:
        """Let go of gathered weights, after a forward pass that no backward pass followed."""

    def share(self, items: Sequence[TrainItem], max_tokens: int, *, packed: bool) -> list[Share]:
        """This rank's micro-batches: the same number on all ranks."""
        return [(group, True) for group in split_micro_batches(items, max_tokens, packed=packed)]

    def agree(self, problem: str | None) -> str | None:
        """The first rank's problem that has one: the same answer on all ranks."""
        return problem

    def total(self, value: float) -> float:
        """The sum over all ranks."""
        return value

    def largest(self, value: float) -> float:
        """The largest of all ranks."""
        return value

    def gather(self, table_MN: np.ndarray) -> np.ndarray:
        """[M, N] of each rank side by side: [M, sum of N] on the leader, what was given on the others."""
        return table_MN

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the state in one piece: on the leader, and on the CPU; the others get its shape alone."""
        return tensor

    def read(self, load: Callable[[], Mapping[str, torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        """What the leader reads; the others get shapes and types alone, and everyone the same error.

        Raises:
            ValueError: the leader could not read it.
        """
        return load()

    def place(self, tensor: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
        """A copy of a tensor of `read` where `like` is, in its number format and sharded as it is. None: on the CPU."""
        return tensor.clone() if like is None else tensor.to(like.device, like.dtype, copy=True)

    def each(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """The JSON values of all ranks, on the leader; on the others their own alone."""
        return [value]

    @contextlib.contextmanager
    def call(self, name: str, **arguments: Any) -> Iterator[None]:
        """What is done inside is done on all ranks, by calling `name` of the student there.

        Raises:
            RankError: a rank failed meanwhile.
        """
        yield

    async def while_whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` as long as all ranks live.

        Raises:
            RankError: one does not; `work` is cancelled.
        """
        return await work

    def close(self) -> None:
        """Send the other ranks home."""


def join() -> Ranks:
    """The process group that torchrun laid out for this process, or one process alone.

    Raises:
        RuntimeError: not all ranks came.
    """
    if world_size() == 1:
        return Ranks()
    from distill.fsdp import SeveralRanks

    return SeveralRanks()
