"""Episode files: append-only JSONL, one episode a line (docs/episodes.md, agent_loop/episode.schema.json).

A line is complete or it is no episode: what a crash tore is told apart from what was written whole. `null` is "not
computed" and comes back as None.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from agent_loop.types import (
    SCHEMA_VERSION,
    ClassSpan,
    Episode,
    EpisodeError,
    Segment,
    SegmentSource,
    TokenClass,
    TokenTrace,
    TopK,
    Turn,
)
from envs.types import AssistantMessage, Message, StopReason, Task
from tools.types import ToolCall, ToolError, ToolErrorKind, ToolResult

Record = TypeVar("Record")

_LOG = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")
FIELDS: dict[type, dict[str, tuple[type, ...]]] = {
    Episode: {
        **dict.fromkeys(("id", "env_id"), (str,)),
        **dict.fromkeys(("policy_version", "seed"), (int, NoneType)),
        **dict.fromkeys(("rewards", "timing", "metadata"), (dict,)),
        "reward": (float, int, NoneType),
    },
    Task: {"id": (str,), "metadata": (dict,), "source": (str,)},
    EpisodeError: dict.fromkeys(("boundary", "kind", "message"), (str,)),
    AssistantMessage: {"content": (str,), "reasoning": (str, NoneType), "finished": (bool,)},
    ToolCall: {
        **dict.fromkeys(("id", "name", "raw"), (str,)),
        "arguments": (dict, NoneType),
        "parse_error": (str, NoneType),
    },
    ToolError: {"message": (str,)},
    ToolResult: {
        **dict.fromkeys(("call_id", "name", "content"), (str,)),
        "ends_episode": (bool,),
        "truncated_chars": (int,),
        "duration_s": (float, int),
        "metadata": (dict,),
    },
    Turn: {
        **dict.fromkeys(("index", "num_parse_errors"), (int,)),
        **dict.fromkeys(("text", "finish_reason"), (str,)),
        **dict.fromkeys(("trace", "start", "end", "policy_version"), (int, NoneType)),
        **dict.fromkeys(("sample_s", "env_s"), (float, int)),
    },
    ClassSpan: dict.fromkeys(("start", "end"), (int,)),
    Segment: dict.fromkeys(("start", "end", "turn"), (int,)),
}
"""Types of the plain fields, as JSON can tell them apart."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no episode of this version."""

    line_number: int
    reason: str


class EpisodeWriter:
    """Appends episodes to one file. Writing an id that is there already does nothing.

    Args:
        path: made if it is not there; a line that a crash tore is closed off first.
        fsync: make every episode durable at once, for a disk's worth of time each.
    """

    def __init__(self, path: Path, *, fsync: bool = False) -> None:
        self.path = path
        self._fsync = fsync
        self._ids = {item.id for item in read_episodes(path) if isinstance(item, Episode)} if path.exists() else set()
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and path.stat().st_size > 0 and not _ends_in_newline(path)
        self._file = path.open("a", encoding="utf-8")
        if torn:
            _LOG.warning("%s: the last line has no end, a crash tore it; it is closed off", path)
            self._file.write("\n")

    def append(self, episode: Episode) -> None:
        """Write one line, whole.

        Raises:
            ValueError: it holds what JSON cannot (NaN, an object of Python's), naming the episode; nothing is written.
        """
        if episode.id in self._ids:
            return
        try:
            line = json.dumps(episode_to_json(episode), allow_nan=False, separators=(",", ":"))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path}: episode {episode.id!r} cannot be written: {error}") from error
        self._file.write(line + "\n")
        self._file.flush()
        self._ids.add(episode.id)
        if self._fsync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_episodes(path: Path) -> Iterator[Episode | BadLine]:
    """All lines of a file, in order: an episode, or why it is none."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield read_line(raw, number)


def read_line(raw: bytes, number: int) -> Episode | BadLine:
    """One line of a file, which is not empty: an episode, or why it is none.

    Args:
        raw: with its newline.
        number: from 1.
    """
    try:
        return episode_from_json(json.loads(raw, parse_constant=_refuse))
    except RecursionError:
        return BadLine(number, "nested too deeply")
    except ValueError as error:
        torn = "" if raw.endswith(b"\n") else "torn: "
        return BadLine(number, f"{torn}{error}"[:500])


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def episode_to_json(episode: Episode) -> dict[str, Any]:
    """The JSON object of an episode. Arrays of numbers stay lists of their own, not objects a token."""
    return {
        "schema_version": episode.schema_version,
        "id": episode.id,
        "env_id": episode.env_id,
        "stop_reason": episode.stop_reason.value,
        "reward": episode.reward,
        "rewards": episode.rewards,
        "error": asdict(episode.error) if episode.error else None,
        "policy_version": episode.policy_version,
        "seed": episode.seed,
        "timing": episode.timing,
        "metadata": episode.metadata,
        "task": task_to_json(episode.task),
        "turns": [_turn_to_json(turn) for turn in episode.turns],
        "traces": [_trace_to_json(trace) for trace in episode.traces],
    }


def task_to_json(task: Task) -> dict[str, Any]:
    """The JSON object of a task inside an episode."""
    return {
        "id": task.id,
        "messages": list(task.messages),
        "metadata": task.metadata,
        "rewards": list(task.rewards),
        "tools": None if task.tools is None else list(task.tools),
        **({"source": task.source} if task.source else {}),
    }


def task_from_json(value: dict[str, Any]) -> Task:
    """Read `task_to_json`'s object back.

    Raises:
        KeyError, TypeError: it is not one.
    """
    return _typed(
        Task(
            id=value["id"],
            messages=_messages(value["messages"]),
            metadata=value["metadata"],
            rewards=_all((str,), _list(value["rewards"])),
            tools=None if value["tools"] is None else _all((str,), _list(value["tools"])),
            source=value.get("source", ""),
        )
    )


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    return {
        "index": turn.index,
        "message": {
            "content": turn.message.content,
            "reasoning": turn.message.reasoning,
            "tool_calls": [asdict(call) for call in turn.message.tool_calls],
            "finished": turn.message.finished,
        },
        "text": turn.text,
        "observation": list(turn.observation),
        "tool_results": [asdict(result) for result in turn.tool_results],
        "trace": turn.trace,
        "start": turn.start,
        "end": turn.end,
        "finish_reason": turn.finish_reason,
        "policy_version": turn.policy_version,
        "token_classes": [[span.token_class.value, span.start, span.end] for span in turn.token_classes],
        "num_parse_errors": turn.num_parse_errors,
        "sample_s": turn.sample_s,
        "env_s": turn.env_s,
    }


def _trace_to_json(trace: TokenTrace) -> dict[str, Any]:
    return {
        "token_ids": trace.token_ids,
        "loss_mask": [int(trained) for trained in trace.loss_mask],
        "sampling_logprobs": trace.sampling_logprobs,
        "teacher_logprobs": trace.teacher_logprobs,
        "teacher_topk": _topk_to_json(trace.teacher_topk),
        "policy_versions": trace.policy_versions,
        "sampling_topk": _topk_to_json(trace.sampling_topk),
        "segments": [[s.source.value, s.turn, s.start, s.end] for s in trace.segments],
    }


def _topk_to_json(topk: TopK | None) -> dict[str, Any] | None:
    return {"token_ids": topk.token_ids, "logprobs": topk.logprobs} if topk is not None else None


def episode_from_json(value: Any) -> Episode:
    """Read one line's object back.

    Raises:
        ValueError: another schema version, a missing key, a wrong type, or a trace that breaks an invariant.
    """
    if not isinstance(value, dict) or "schema_version" not in value:
        raise ValueError("no episode: it has no schema_version")
    if value["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version {value['schema_version']!r}; this version reads {SCHEMA_VERSION}")
    try:
        return _episode_from_json(value)
    except KeyError as error:
        raise ValueError(f"no episode: {error} is missing") from error
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"no episode: {error}") from error


def _episode_from_json(value: dict[str, Any]) -> Episode:
    error = value["error"]
    episode = Episode(
        id=value["id"],
        env_id=value["env_id"],
        task=task_from_json(value["task"]),
        turns=[_turn_from_json(turn) for turn in _list(value["turns"])],
        traces=[_trace_from_json(trace) for trace in _list(value["traces"])],
        stop_reason=StopReason(value["stop_reason"]),
        reward=value["reward"],
        rewards=value["rewards"],
        error=None if error is None else _typed(EpisodeError(**error)),
        policy_version=value["policy_version"],
        seed=value["seed"],
        timing=value["timing"],
        metadata=value["metadata"],
    )
    _typed(episode)
    _all((int, float), episode.rewards.values())
    _all((int, float), episode.timing.values())
    return episode


def _turn_from_json(value: dict[str, Any]) -> Turn:
    message = value["message"]
    return _typed(
        Turn(
            index=value["index"],
            message=_typed(
                AssistantMessage(
                    content=message["content"],
                    reasoning=message["reasoning"],
                    tool_calls=tuple(_typed(ToolCall(**call)) for call in _list(message["tool_calls"])),
                    finished=message["finished"],
                )
            ),
            text=value["text"],
            observation=_messages(value["observation"]),
            tool_results=tuple(_result_from_json(result) for result in _list(value["tool_results"])),
            trace=value["trace"],
            start=value["start"],
            end=value["end"],
            finish_reason=value["finish_reason"],
            policy_version=value["policy_version"],
            token_classes=tuple(
                _typed(ClassSpan(token_class=TokenClass(name), start=start, end=end))
                for name, start, end in _list(value["token_classes"])
            ),
            num_parse_errors=value["num_parse_errors"],
            sample_s=value["sample_s"],
            env_s=value["env_s"],
        )
    )


def _result_from_json(value: dict[str, Any]) -> ToolResult:
    error = value["error"]
    found = (
        _typed(ToolError(kind=ToolErrorKind(error["kind"]), message=error["message"])) if error is not None else None
    )
    return _typed(ToolResult(**{**value, "error": found}))


def _trace_from_json(value: dict[str, Any]) -> TokenTrace:
    _all((int,), value["token_ids"])
    _all((int,), value["loss_mask"])
    for name in ("sampling_logprobs", "teacher_logprobs"):
        _all((float, int, NoneType), value[name] or ())
    if min(value["token_ids"], default=0) < 0 or not set(value["loss_mask"]) <= {0, 1}:
        raise TypeError("a token id is below 0, or an entry of loss_mask is neither 0 nor 1")
    versions = value.get("policy_versions")  # absent in files of before these were recorded
    _all((int, NoneType), versions or ())
    return TokenTrace(
        token_ids=value["token_ids"],
        loss_mask=[bool(trained) for trained in value["loss_mask"]],
        sampling_logprobs=value["sampling_logprobs"],
        segments=[
            _typed(Segment(source=SegmentSource(source), turn=turn, start=start, end=end))
            for source, turn, start, end in value["segments"]
        ],
        teacher_logprobs=value["teacher_logprobs"],
        teacher_topk=_topk_from_json(value["teacher_topk"]),
        policy_versions=versions,
        sampling_topk=_topk_from_json(value.get("sampling_topk")),
    )


def _topk_from_json(value: dict[str, Any] | None) -> TopK | None:
    if value is None:
        return None
    for name, kinds in (("token_ids", (int,)), ("logprobs", (float, int))):
        for row in value[name]:
            _all(kinds, () if row is None else _list(row))
    return TopK(**value)


def _messages(value: Any) -> tuple[Message, ...]:
    for message in _list(value):
        _all((str,), (part for name, part in message.items() if name != "tool_calls"))
        if message["role"] not in ROLES or "content" not in message:
            raise TypeError(f"a message needs a content and a role of {', '.join(ROLES)}")
    return tuple(value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"wanted an array, found {type(value).__name__}")
    return value


def _all(kinds: tuple[type, ...], values: Iterable[Any]) -> tuple[Any, ...]:
    values = tuple(values)
    wrong = set(map(type, values)) - set(kinds)
    if wrong:
        names = ", ".join(sorted(kind.__name__ for kind in wrong))
        raise TypeError(f"wanted {' or '.join(kind.__name__ for kind in kinds)}, found {names}")
    return values


def _typed(record: Record) -> Record:
    """The record, its plain fields checked: a file may come from anywhere, and what reads it trusts the types."""
    for name, kinds in FIELDS[type(record)].items():
        found = type(getattr(record, name))
        if found not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{name} of {type(record).__name__} is {found.__name__}, not {wanted}")
    return record
