"""The one mask builder: ids, mask, log-probabilities and segments of an episode grow through one private call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from agent_loop.types import Completion, Segment, SegmentSource, TokenTrace, TopK

T = TypeVar("T")


class TraceBuilder:
    """Grows the traces of one episode.

    Example:
        builder = TraceBuilder(prompt_ids)
        builder.add_completion(completion, turn=0)     # sampled ids, verbatim, mask True
        builder.extend(glue_ids, tool_ids, turn=0)     # what follows, mask False
        builder.prompt_ids                             # the next request's prompt
        builder.traces()                               # checked TokenTraces

    For every turn `prompt_ids + completion.token_ids` is a prefix of a trace: there is no call that changes what is
    already there.
    """

    _answered: bool
    """The present prompt has its completion, and waits for what follows."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        """
        Raises:
            ValueError: an empty prompt.
        """
        self._closed: list[TokenTrace] = []
        self._open(prompt_ids)

    @property
    def prompt_ids(self) -> list[int]:
        """Everything so far in the present trace: the prompt of the next request. Do not change it."""
        return self._ids

    @property
    def index(self) -> int:
        """Index of the present trace."""
        return len(self._closed)

    def __len__(self) -> int:
        return len(self._ids)

    def add_completion(self, completion: Completion, *, turn: int, trainable: bool = True) -> tuple[int, int]:
        """Append what was sampled, id for id.

        Returns:
            Its first position and the one after its last.

        Raises:
            ValueError: nothing was appended since the last completion; it was no answer to this prompt.
        """
        if self._answered:
            raise ValueError(f"TraceBuilder: turn {turn} was sampled from a prompt that is answered already")
        self._answered = True
        start = len(self._ids)
        self._grow(completion.token_ids, SegmentSource.ASSISTANT, turn, trainable, completion.logprobs)
        versions = completion.token_versions or (completion.policy_version,) * len(completion.token_ids)
        self._versions.extend(versions)
        self._topk.extend(completion.topk or [None] * len(completion.token_ids))
        return start, len(self._ids)

    def add_written(self, token_ids: Sequence[int], *, turn: int, trained: bool = False) -> tuple[int, int]:
        """Append a turn that nobody sampled here (an edited one of a fork, a demonstration): without log-probabilities.

        Args:
            trained: for supervised training alone, and only where no turn of the trace was sampled.

        Returns:
            As `add_completion`.

        Raises:
            ValueError: as `add_completion`.
        """
        if self._answered:
            raise ValueError(f"TraceBuilder: turn {turn} was written behind a prompt that is answered already")
        self._answered = True
        start = len(self._ids)
        self._grow(token_ids, SegmentSource.ASSISTANT, turn, trained)
        self._versions.extend([None] * len(token_ids))
        self._topk.extend([None] * len(token_ids))
        return start, len(self._ids)

    def extend(self, glue_ids: Sequence[int], tool_ids: Sequence[int], *, turn: int) -> None:
        """Append template tokens and the environment's answer after turn `turn`; never trained on.

        Raises:
            ValueError: there is no completion that this could follow.
        """
        if not self._answered:
            raise ValueError(f"TraceBuilder: nothing was sampled that the extension of turn {turn} could follow")
        self._answered = False
        self._grow(glue_ids, SegmentSource.GLUE, turn)
        self._grow(tool_ids, SegmentSource.TOOL, turn)

    def fork(self, prompt_ids: Sequence[int]) -> None:
        """Begin a new trace, because the next prompt is no extension of the present one."""
        self._closed.append(self._present())
        self._open(prompt_ids)

    def traces(self) -> list[TokenTrace]:
        """All traces, checked.

        Raises:
            ValueError: an invariant of `TokenTrace` is broken, by a log-probability above 0 for instance.
        """
        return [*self._closed, self._present()]

    def mask_turn(self, turn: int) -> None:
        """Take one turn's tokens out of the loss (a malformed call under `on_parse_error = "mask"`)."""
        for segment in self._segments:
            if segment.source is SegmentSource.ASSISTANT and segment.turn == turn:
                self._mask[segment.start : segment.end] = [False] * (segment.end - segment.start)

    def _open(self, prompt_ids: Sequence[int]) -> None:
        if not prompt_ids:
            raise ValueError("TraceBuilder: the prompt is empty")
        self._ids: list[int] = []
        self._mask: list[bool] = []
        self._logprobs: list[float | None] = []
        self._segments: list[Segment] = []
        self._versions: list[int | None] = []
        self._topk: list[tuple[tuple[int, float], ...] | None] = []
        self._answered = False
        self._grow(prompt_ids, SegmentSource.PROMPT, -1)

    def _present(self) -> TokenTrace:
        trace = TokenTrace(
            token_ids=self._ids, loss_mask=self._mask, sampling_logprobs=self._logprobs, segments=self._segments
        )
        sampled = [i for s in self._segments if s.source is SegmentSource.ASSISTANT for i in range(s.start, s.end)]
        if any(version is not None for version in self._versions):
            trace.policy_versions = _spread(sampled, self._versions, len(trace))
        if any(row is not None for row in self._topk):
            trace.sampling_topk = TopK(
                token_ids=_spread(sampled, [[i for i, _ in row] if row else None for row in self._topk], len(trace)),
                logprobs=_spread(
                    sampled, [[value for _, value in row] if row else None for row in self._topk], len(trace)
                ),
            )
        trace.check()
        return trace

    def _grow(
        self,
        ids: Sequence[int],
        source: SegmentSource,
        turn: int,
        trained: bool = False,
        logprobs: Sequence[float] | None = None,
    ) -> None:
        if not ids:
            return
        start = len(self._ids)
        self._ids.extend(ids)
        self._mask.extend([trained] * len(ids))
        self._logprobs.extend(logprobs if logprobs is not None else [None] * len(ids))
        self._segments.append(Segment(start=start, end=len(self._ids), source=source, turn=turn))


def _spread(positions: Sequence[int], values: Sequence[T | None], length: int) -> list[T | None]:
    """[length] the values at their positions, None elsewhere."""
    found: list[T | None] = [None] * length
    for position, value in zip(positions, values, strict=True):
        found[position] = value
    return found
