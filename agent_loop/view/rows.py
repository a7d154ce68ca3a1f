"""One line of an episode file -> one row of the list.

A row is read by types (msgspec), which skips what the list does not show: ten times faster than building the episode.
A line that cannot be read so goes through the exact reader of `agent_loop.episodes`, which has the last word and the
reason. What only the exact reader checks (a wrong type inside a turn's message) is said when the episode is opened.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from bisect import bisect_right
from itertools import compress
from typing import Annotated, Any

import msgspec

from agent_loop.episodes import episode_from_json, episode_to_json
from agent_loop.scoring import IMPOSSIBLE
from agent_loop.types import SCHEMA_VERSION

WORST = 8
"""Tokens of one episode that the run's worst-token table may show."""

EDGES = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Nats. The run's colour scale is the first of these that covers 99% of its trained tokens."""

FORKS = "forks.jsonl"
"""Of a folder of episodes: what the what-if played. No part of the run's figures."""

LONGEST = 300
"""Characters of a row's text: a list is no place for a megabyte."""


class Row(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the list knows of one line."""

    key: str
    """16 hex digits of (file, offset): the name in URLs. Files only grow, so it holds for good."""
    run: int
    """Index of the run among those that are shown."""
    file: str
    """Relative to the run."""
    line: int
    """From 1."""
    offset: int
    """Bytes."""
    length: int
    """Bytes, the newline included."""
    text_length: int = 0
    """Bytes before the arrays of tokens: the part that a search reads."""
    problem: str | None = None
    """Why the line is no episode; the fields below are then as they stand."""
    id: str = ""
    step: int | None = None
    task: str = ""
    env: str = ""
    stop: str = ""
    error: str | None = None
    """`boundary: kind`"""
    reward: float | None = None
    turns: int = 0
    calls: int = 0
    tool_errors: int = 0
    tools: list[str] = []
    """Names of the tools called, each once."""
    parse_errors: int = 0
    truncated: bool = False
    """A budget or a length limit ended it or one of its turns."""
    tokens: int = 0
    sampled: int = 0
    trained: int = 0
    scored: int = 0
    """Trained tokens with a usable number by the teacher."""
    unusable: int = 0
    """Trained tokens whose number cannot be one (-9999)."""
    kl: float | None = None
    """Nats a token: mean over the scored ones; None without any."""
    kl_max: float | None = None
    """Nats: the largest in size, with its sign."""
    spread: list[int] = []
    """Scored tokens with |gap| at most each of EDGES, and above the last."""
    worst: list[tuple[float, int, int, int]] = []
    """(gap, trace, position, token id) of the WORST largest in size."""
    version: int | None = None
    seconds: float | None = None


class _Call(msgspec.Struct):
    name: str
    parse_error: str | None


class _Message(msgspec.Struct):
    tool_calls: list[_Call]
    finished: bool


class _Result(msgspec.Struct):
    error: dict[str, Any] | None


class _Turn(msgspec.Struct):
    message: _Message
    tool_results: list[_Result]
    finish_reason: str
    num_parse_errors: int


class _Task(msgspec.Struct):
    id: str


class _Error(msgspec.Struct):
    boundary: str
    kind: str


class _Trace(msgspec.Struct):
    token_ids: list[Annotated[int, msgspec.Meta(ge=0)]]
    loss_mask: list[int]
    sampling_logprobs: list[float | None]
    teacher_logprobs: list[float | None] | None
    segments: list[tuple[str, int, int, int]]


class _Line(msgspec.Struct):
    schema_version: int
    id: str
    env_id: str
    stop_reason: str
    reward: float | None
    error: _Error | None
    policy_version: int | None
    timing: dict[str, float]
    task: _Task
    turns: list[_Turn]
    traces: list[_Trace]


_DECODER = msgspec.json.Decoder(_Line)


def key_of(run: str, file: str, offset: int) -> str:
    return hashlib.sha256(f"{run}\0{file}\0{offset}".encode()).hexdigest()[:16]


def read_row(raw: bytes, *, key: str, run: int, file: str, line: int, offset: int) -> Row:
    """The row of one line; never raises for what the line holds."""
    row = Row(key=key, run=run, file=file, line=line, offset=offset, length=len(raw))
    row.text_length = max(raw.rfind(b',"traces":['), 0) or len(raw)
    try:
        if not raw.endswith(b"\n"):
            raise ValueError("the line has no end: being written, or torn by a crash")
        try:
            _fill(row, _DECODER.decode(raw))
        except (msgspec.DecodeError, UnicodeDecodeError):
            value = exact(raw)
            _fill(row, msgspec.convert(value, _Line))
    except RecursionError:
        row.problem = "nested too deeply"
    except ValueError as error:
        row.problem = cut(str(error))
    return row


def exact(raw: bytes) -> dict[str, Any]:
    """The line's object, checked by the reader of episode files.

    Raises:
        ValueError: why it is no episode.
        RecursionError: it is nested too deeply.
    """
    return episode_to_json(episode_from_json(json.loads(raw, parse_constant=_refuse)))


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def _fill(row: Row, line: _Line) -> None:
    if line.schema_version != SCHEMA_VERSION:
        raise ValueError(f"schema_version {line.schema_version}; this version reads {SCHEMA_VERSION}")
    row.id, row.env, row.stop, row.task = cut(line.id), cut(line.env_id), cut(line.stop_reason), cut(line.task.id)
    step = line.id.partition("/")[0]
    row.step = int(step) if step.isascii() and step.isdigit() and len(step) < 16 else None
    row.error = cut(f"{line.error.boundary}: {line.error.kind}") if line.error else None
    row.reward, row.version = line.reward, line.policy_version
    row.seconds = line.timing.get("total")
    row.turns = len(line.turns)
    calls = [call for turn in line.turns for call in turn.message.tool_calls]
    row.calls = len(calls)
    row.tools = [cut(name) for name in dict.fromkeys(call.name for call in calls)][:32]
    row.tool_errors = sum(result.error is not None for turn in line.turns for result in turn.tool_results)
    row.parse_errors = sum(turn.num_parse_errors for turn in line.turns)
    ended = line.stop_reason.startswith("max_") or line.stop_reason in ("context_overflow", "tool_budget", "timeout")
    row.truncated = ended or any(turn.finish_reason == "length" for turn in line.turns)
    gaps: list[tuple[float, int, int, int]] = []
    for index, trace in enumerate(line.traces):
        _check(trace)
        row.tokens += len(trace.token_ids)
        row.sampled += sum(end - start for source, _, start, end in trace.segments if source == "assistant")
        row.trained += sum(trace.loss_mask)
        if trace.teacher_logprobs is None:
            continue
        columns = zip(
            trace.sampling_logprobs, trace.teacher_logprobs, range(len(trace.token_ids)), trace.token_ids, strict=True
        )
        for student, teacher, position, token in compress(columns, trace.loss_mask):
            if student is None or teacher is None:
                continue
            if teacher <= IMPOSSIBLE or student <= IMPOSSIBLE:
                row.unusable += 1
            else:
                gaps.append((student - teacher, index, position, token))
    _measure(row, gaps)


def _check(trace: _Trace) -> None:
    length = len(trace.token_ids)
    for name in ("loss_mask", "sampling_logprobs", "teacher_logprobs"):
        values = getattr(trace, name)
        if values is not None and len(values) != length:
            raise ValueError(f"TokenTrace: {name} has {len(values)} entries for {length} tokens")
    if not set(trace.loss_mask) <= {0, 1}:
        raise ValueError("an entry of loss_mask is neither 0 nor 1")


def _measure(row: Row, gaps: list[tuple[float, int, int, int]]) -> None:
    row.scored = len(gaps)
    if not gaps:
        return
    values = [gap[0] for gap in gaps]
    row.kl = sum(values) / len(values)
    row.worst = heapq.nlargest(WORST, gaps, key=lambda gap: abs(gap[0]))
    row.kl_max = row.worst[0][0]
    sizes = sorted(map(abs, values))
    row.spread = _histogram(sizes)


def _histogram(sizes: list[float]) -> list[int]:
    """How many of the sorted sizes lie in each band that EDGES cut."""
    cuts = [bisect_right(sizes, edge) for edge in EDGES]
    return [above - below for below, above in zip([0, *cuts], [*cuts, len(sizes)], strict=True)]


def scale_of(rows: list[Row]) -> float:
    """The run's colour scale in nats, the same on both sides of zero."""
    totals = [sum(row.spread[i] for row in rows if row.spread) for i in range(len(EDGES) + 1)]
    seen = 0
    for edge, count in zip(EDGES, totals, strict=False):
        seen += count
        if seen >= 0.99 * sum(totals) > 0:
            return edge
    return EDGES[-1] if sum(totals) else 2.0
