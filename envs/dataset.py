"""Task files: one JSON object a line (docs/formats.md), read and written strictly.

A reader names file, line and column of whatever is wrong. `on_bad_row="skip"` goes on with the next line and reports
each bad one; faults of the file as a whole (missing, compressed, empty) always raise.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from envs.jsonl import TaskError, atomic_file, iter_json_lines, parse_json
from envs.types import Message, Task

__all__ = [
    "OnBadRow",
    "TaskError",
    "UniqueIds",
    "content_id",
    "convert",
    "dialogue_from_row",
    "iter_tasks",
    "message_of",
    "read_tasks",
    "task_from_row",
    "task_to_row",
    "write_tasks",
]

OnBadRow = Literal["fail", "skip"]
MAX_DEPTH = 50
"""Objects and arrays inside one another in a row."""
_ROW_KEYS = ("messages", "metadata", "rewards", "tools", "id")
_MESSAGE_KEYS = {
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "reasoning_content", "tool_calls"),
    "tool": ("role", "content", "tool_call_id", "name"),
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_log = logging.getLogger(__name__)


def raise_error(error: TaskError) -> None:
    """The default of every `on_bad_row` callback: the first bad row is the last."""
    raise error


# Reading


def iter_tasks(
    path: str | Path, *, limit: int | None = None, on_bad_row: Callable[[TaskError], None] = raise_error
) -> Iterator[Task]:
    """Tasks of a JSONL file, one at a time, in constant memory.

    Blank lines, CRLF line ends and a UTF-8 byte-order mark are accepted. Rows without an `id` get a hash of their
    content as one; a second row of equal content gets `<hash>-2`.

    Args:
        limit: stop after that many tasks.
        on_bad_row: gets each row that is not a task; returns to skip it, or raises.

    Raises:
        TaskError: the file is missing, a directory, empty or of another format; or a bad row.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    ids = UniqueIds()
    count = 0
    for line, row in iter_json_lines(path):
        where = f"{path}:{line}"
        try:
            if isinstance(row, TaskError):
                raise row
            task = ids.claim(task_from_row(row, where), where)
        except TaskError as error:
            on_bad_row(error)
            continue
        yield task
        count += 1
        if count == limit:
            return


def read_tasks(path: str | Path, *, limit: int | None = None, on_bad_row: OnBadRow = "fail") -> list[Task]:
    """All tasks of a JSONL file. With `on_bad_row="skip"`, bad rows are counted in one log line.

    Raises:
        TaskError: as `iter_tasks`; also if no row is left.
    """
    bad: list[TaskError] = []
    tasks = list(iter_tasks(path, limit=limit, on_bad_row=raise_error if on_bad_row == "fail" else bad.append))
    if bad:
        _log.warning("%s: skipped %d bad rows, kept %d; the first: %s", path, len(bad), len(tasks), bad[0])
    if not tasks:
        reason = f"all {len(bad)} rows are bad; the first: {bad[0].message}" if bad else "there are only blank lines"
        raise TaskError(str(path), f"no tasks: {reason}")
    return tasks


# One row


def task_from_row(row: Any, where: str) -> Task:
    """Check a row and make a `Task` of it. Nothing is coerced.

    Args:
        where: the row's place, for error messages: `tasks.jsonl:12`.

    Raises:
        TaskError: the first thing that is wrong, with the key.
    """
    if not isinstance(row, dict):
        raise TaskError(where, f"a row must be an object, found {kind_of(row)}")
    for key in row:
        if key not in _ROW_KEYS:
            raise TaskError(where, f"unknown key {key!r}{suggest(key, _ROW_KEYS)}; a row has {', '.join(_ROW_KEYS)}")
    _check_values(row, where, "")
    messages = _expect(row.get("messages"), list, "messages", where)
    if not messages:
        raise TaskError(where, "messages is empty; a task needs at least a user message")
    parsed = tuple(message_of(m, f"messages[{i}]", where) for i, m in enumerate(messages))
    if parsed[-1]["role"] != "user":
        raise TaskError(where, f"the last message must be the user's, found role {parsed[-1]['role']!r}")
    tools = row.get("tools")
    task = Task(
        messages=parsed,
        metadata=_expect(row.get("metadata", {}), dict, "metadata", where),
        rewards=_names(row.get("rewards", []), "rewards", where),
        tools=None if tools is None else _names(tools, "tools", where),
    )
    identity = row["id"] if "id" in row else content_id(task)
    if not isinstance(identity, str) or not 0 < len(identity) <= 200 or not identity.isprintable():
        raise TaskError(where, f"id must be a string of 1 to 200 printable characters, found {kind_of(identity)}")
    return replace(task, id=identity)


def dialogue_from_row(row: Any, where: str) -> tuple[Message, ...]:
    """Check an object with `messages` alone, whoever speaks last. Nothing is coerced.

    Raises:
        TaskError: the first thing that is wrong, with the key.
    """
    if not isinstance(row, dict) or set(row) != {"messages"}:
        found = f"the keys {', '.join(map(repr, row))}" if isinstance(row, dict) else kind_of(row)
        raise TaskError(where, f'wanted an object {{"messages": [...]}}, found {found[:200]}')
    _check_values(row, where, "")
    messages = _expect(row["messages"], list, "messages", where)
    if not messages:
        raise TaskError(where, "messages is empty")
    return tuple(message_of(m, f"messages[{i}]", where) for i, m in enumerate(messages))


def task_to_row(task: Task) -> dict[str, Any]:
    """The JSON object of a task; what is empty is left out."""
    row: dict[str, Any] = {"messages": list(task.messages)}
    if task.metadata:
        row["metadata"] = task.metadata
    if task.rewards:
        row["rewards"] = list(task.rewards)
    if task.tools is not None:
        row["tools"] = list(task.tools)
    if task.id:
        row["id"] = task.id
    return row


def content_id(task: Task) -> str:
    """16 hexadecimal digits (64 bits) of a SHA-256 over the task's content without its id."""
    row = task_to_row(replace(task, id=""))
    return hashlib.sha256(json.dumps(row, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def message_of(value: Any, key: str, where: str) -> Message:
    """Check a message and copy it. Nothing is coerced but a null `content` beside calls, and arguments in a string.

    Args:
        key: its place in the row, for error messages: `messages[0]`.

    Raises:
        TaskError: the first thing that is wrong.
    """
    message = _expect(value, dict, key, where)
    role = message.get("role")
    if role not in _MESSAGE_KEYS:
        found = repr(role) if isinstance(role, str) else kind_of(role)
        raise TaskError(where, f"{key}.role must be one of {', '.join(_MESSAGE_KEYS)}, found {found}")
    for name in message:
        if name not in _MESSAGE_KEYS[role]:
            raise TaskError(
                where, f"{key}: unknown key {name!r} in a {role} message{suggest(name, _MESSAGE_KEYS[role])}"
            )
    calls = message.get("tool_calls")
    content = message.get("content")
    if content is None and calls:
        content = ""  # OpenAI's API gives null where a message only calls tools
    result: dict[str, Any] = {**message, "content": _expect(content, str, f"{key}.content", where)}
    for name in ("reasoning_content", "tool_call_id", "name"):
        if name in message:
            _expect(message[name], str, f"{key}.{name}", where)
    if role == "tool" and "tool_call_id" not in message:
        raise TaskError(where, f"{key}: a tool message needs the tool_call_id of the call that it answers")
    if calls is not None:
        listed = _expect(calls, list, f"{key}.tool_calls", where)
        result["tool_calls"] = [_tool_call(c, f"{key}.tool_calls[{i}]", where) for i, c in enumerate(listed)]
    return result  # type: ignore[return-value]  # checked above, key by key


def _tool_call(value: Any, key: str, where: str) -> dict[str, Any]:
    call = _expect(value, dict, key, where)
    function = _expect(call.get("function"), dict, f"{key}.function", where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # as OpenAI's API writes them
        try:
            arguments = parse_json(arguments)
        except (ValueError, RecursionError) as error:
            raise TaskError(where, f"{key}.function.arguments is a string, but not of JSON: {error}") from None
    return {
        "id": _expect(call.get("id"), str, f"{key}.id", where),
        "type": "function",
        "function": {
            "name": _expect(function.get("name"), str, f"{key}.function.name", where),
            "arguments": _expect(arguments, dict, f"{key}.function.arguments", where),
        },
    }


def _names(value: Any, key: str, where: str) -> tuple[str, ...]:
    names = _expect(value, list, key, where)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TaskError(where, f"{key} must be a list of names, found {kind_of(name)} in it")
    if len(set(names)) < len(names):
        raise TaskError(where, f"{key} has a name twice")
    return tuple(names)


def _expect(value: Any, kind: type[dict[str, Any]] | type[list[Any]] | type[str], key: str, where: str) -> Any:
    if not isinstance(value, kind):
        raise TaskError(where, f"{key} must be {_KINDS[kind]}, found {'nothing' if value is None else kind_of(value)}")
    return value


def _check_values(value: Any, where: str, key: str, depth: int = 0) -> None:
    """Every value inside a row can be written as JSON and read by a tokenizer."""
    if depth > MAX_DEPTH:
        raise TaskError(where, f"{key[:80]} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        if "\0" in value:
            raise TaskError(where, f"{key} holds a NUL character")
        if match := _SURROGATE.search(value):
            raise TaskError(
                where, f"{key} holds a lone surrogate (\\u{ord(match[0]):04x}): the text is not valid Unicode"
            )
    elif isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise TaskError(where, f"{key} has a key that is not a string: {name!r}")
            _check_values(name, where, f"a key of {key or 'the row'}")
            _check_values(item, where, f"{key}.{name}" if key else name, depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_values(item, where, f"{key}[{index}]", depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise TaskError(where, f"{key} is {value}, which JSON cannot hold; write null or a string")
    elif value is not None and not isinstance(value, bool | int):
        raise TaskError(where, f"{key} is a {type(value).__name__}, not a JSON value")


def kind_of(value: Any) -> str:
    """A value in words for an error message: its kind, and itself where it is short."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    name = names.get(type(value), f"a {type(value).__name__}")
    return f"{name} ({json.dumps(value)[:60]})" if isinstance(value, bool | int | float | str) else name


_KINDS = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array", dict: "an object"}


def suggest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


class UniqueIds:
    """Ids that were seen, at 16 bytes or so each: a hash table of 64-bit digests, for files of any length."""

    def __init__(self) -> None:
        self._table = array("Q", bytes(8 * 1024))
        self._count = 0

    def claim(self, task: Task, where: str) -> Task:
        """The task, with `-2`, `-3` ... after an id that is a content hash and was seen.

        Raises:
            TaskError: an id that the file names was seen.
        """
        if self._add(task.id):
            return task
        if task.id != content_id(task):
            raise TaskError(where, f"the id {task.id!r} was used by an earlier row; ids are unique in a file")
        number = 2
        while not self._add(f"{task.id}-{number}"):
            number += 1
        return replace(task, id=f"{task.id}-{number}")

    def _add(self, name: str) -> bool:
        digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") or 1
        if not self._insert(digest):
            return False
        self._count += 1
        if 2 * self._count > len(self._table):
            old, self._table = self._table, array("Q", bytes(32 * len(self._table)))
            for known in old:
                if known:
                    self._insert(known)
        return True

    def _insert(self, digest: int) -> bool:
        table, mask = self._table, len(self._table) - 1
        slot = digest & mask
        while table[slot]:
            if table[slot] == digest:
                return False
            slot = (slot + 1) & mask
        table[slot] = digest
        return True


# Writing


def write_tasks(path: str | Path, tasks: Iterable[Task]) -> int:
    """Write tasks as JSONL, all or nothing: a file of that name is replaced once the new one is on disk.

    Returns:
        How many tasks were written.

    Raises:
        TaskError: a task that the reader would refuse; an id twice.
        OSError: the disk's.
    """
    ids = UniqueIds()
    count = 0
    with atomic_file(path) as file:
        for count, task in enumerate(tasks, start=1):
            where = f"{path}: task {count}"
            file.write(task_line(ids.claim(task_from_row(task_to_row(task), where), where)))
    return count


def task_line(task: Task) -> bytes:
    """One line of a task file, with its line end."""
    return json.dumps(task_to_row(task), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def convert(source: str, **options: Any) -> Iterator[Task]:
    """Tasks of any table (CSV, TSV, JSON, JSONL, Parquet, Hub data set); see `envs.converters.table.convert`."""
    from envs.converters.table import convert as convert_table

    return convert_table(source, **options)
