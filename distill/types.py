"""Records of the trainer. Read first.

Suffixes of tensor names: B sequences, T positions, N trained tokens (rows of the loss), K teacher candidates,
V vocabulary. The trainer is blind to text: it sees ids, masks and numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from agent_loop.types import Episode, TopK

LossType = Literal["sampled", "topk", "full"]
"""`sampled`: REINFORCE with the sampled token's log-ratio (default). `topk`: exact head over the teacher's K ids and
REINFORCE on the tail. `full`: the exact sum over the vocabulary, where the teacher runs in process."""


@dataclass(slots=True, kw_only=True)
class TeacherScore:
    """Teacher log-probabilities of one trace."""

    logprobs: list[float | None]
    """[L] of the trace's own tokens; None outside the loss mask or where the teacher's answer was unusable."""
    topk: TopK | None = None


class TeacherError(Exception):
    """The teacher gave no usable score. `kind` says why; nothing is trained on it."""

    def __init__(
        self,
        message: str,
        kind: Literal["unavailable", "protocol", "rejected", "context_overflow", "not_finite"],
    ) -> None:
        super().__init__(message)
        self.kind = kind


class TeacherScorer(Protocol):
    """A model that scores: token ids in, log-probabilities out."""

    async def score(
        self, episode: Episode, *, on_sent: Callable[[int], None] = lambda _: None
    ) -> Sequence[TeacherScore]:
        """One score a trace of the episode, in order.

        Args:
            on_sent: told the tokens of each request as it is sent.

        Raises:
            TeacherError: after retries; the episode is then dropped from the step and counted.
        """
        ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Traces, and the rows of them whose prediction is wanted: end to end in one sequence (packed), or each a
    sequence of its own (padded).

    Row n predicts token `targets_N[n]` from position `pos_N[n]` of sequence `seq_N[n]`: of the same trace, the token
    that follows.
    """

    input_ids_BT: torch.Tensor
    """[B, T] int64; the last token of a trace is never an input. Packed: B = 1, nothing between traces. Padded: with 0
    on the right."""
    boundaries: torch.Tensor | None = None
    """[S + 1] int64, on the CPU: trace s is [boundaries[s], boundaries[s + 1]) of the one sequence. None: padded."""
    seq_N: torch.Tensor
    """[N] int64"""
    pos_N: torch.Tensor
    """[N] int64"""
    targets_N: torch.Tensor
    """[N] int64 ids that were sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Inputs):
    """Traces of one micro-batch and the loss' rows of them. `collate` alone makes it: it is the only place that shifts
    by one."""

    lengths_B: torch.Tensor
    """[S] int64, inputs of each trace, in order; B of them where they are padded."""
    sampling_logprobs_N: torch.Tensor
    """[N] float32"""
    teacher_logprobs_N: torch.Tensor
    """[N] float32"""
    advantages_N: torch.Tensor
    """[N] float32; zeros (assigned, no signal) in pure distillation."""
    weights_N: torch.Tensor
    """[N] float32 weight of the row in the loss; their sum over the step is the number of trained tokens."""
    turns_N: torch.Tensor
    """[N] int64 turn index, for metrics."""
    classes_N: torch.Tensor
    """[N] int64 index into `tuple(TokenClass)`, for metrics."""
    episodes_N: torch.Tensor
    """[N] int64 index of the episode in the step, for metrics."""
    topk_ids_NK: torch.Tensor | None = None
    """[N, K] int64"""
    topk_logprobs_NK: torch.Tensor | None = None
    """[N, K] float32"""

    @property
    def num_trained(self) -> int:
        return int(self.targets_N.numel())

    def rows(self, start: int, end: int, device: torch.device | None = None) -> Batch:
        """Rows [start, end) of all that is said by row; the inputs stay.

        Args:
            device: where these rows are to lie.
        """
        if start == 0 and end >= self.num_trained and device in (None, self.targets_N.device):
            return self
        changes = {
            f.name: value[start:end].to(device=device)
            for f in dataclasses.fields(self)
            if f.name.endswith(("_N", "_NK")) and (value := getattr(self, f.name)) is not None
        }
        return dataclasses.replace(self, **changes)


@dataclass(slots=True, kw_only=True)
class LossOutput:
    loss: torch.Tensor
    """Scalar with gradient: the sum over rows divided by the trained tokens of the whole step."""
    metrics_N: dict[str, torch.Tensor] = field(default_factory=dict)
    """Per-row numbers without gradient, to be reduced once a step: `teacher_kl`, `entropy`, `ratio` ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One line of `metrics.jsonl`."""

    step: int
    metrics: dict[str, float | int | None]
    """Flat names (`teacher_kl`, `teacher_kl/turn_0`, `rollout/truncated`); None where not computed."""
