"""Filters, order and full-text search over the rows.

A query is words: `step:12`, `stop:timeout`, `kl>0.5`, `tools:search` look at the rows; `tool:timeout`,
`user:"two words"` and bare words look at the dialogue, by role. All must hold; `-` before a word turns it round (row
filters only).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import eq, ge, gt, le, lt
from typing import Any

from agent_loop.view.index import Index
from agent_loop.view.rows import Row

SORTABLE = (
    "step", "id", "task", "env", "stop", "reward", "turns", "calls", "tool_errors", "parse_errors", "sampled",
    "trained", "tokens", "kl", "kl_max", "unusable", "version", "seconds", "line",
)  # fmt: skip
NUMBERS = ("step", "reward", "turns", "calls", "tool_errors", "parse_errors", "sampled", "trained", "tokens", "kl",
           "kl_max", "unusable", "version", "seconds", "run", "line")  # fmt: skip
TEXTS = ("id", "task", "env", "stop", "error", "file")
FLAGS = ("truncated", "failed", "problem", "scored")
ROLES = ("system", "user", "assistant", "tool", "call", "think")

BUDGET_S = 2.5
"""Seconds of one text search; what is left then is said to be unsearched."""

_WORD = re.compile(r'(-?)(?:([a-z_]+)(:|>=|<=|>|<|=))?(?:"([^"]*)"|(\S+))')
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {":": eq, "=": eq, ">": gt, "<": lt, ">=": ge, "<=": le}


class BadQuery(ValueError):
    """Names the word that cannot be understood."""


@dataclass(frozen=True, slots=True)
class TextWord:
    """Text to find in the dialogue."""

    role: str | None
    """None: anywhere."""
    text: str
    """Case-folded."""


@dataclass(slots=True)
class Query:
    filters: list[Callable[[Row], bool]] = field(default_factory=list)
    words: list[TextWord] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Found:
    rows: list[Row]
    searched: int
    """Rows looked at; fewer than `candidates` when the time was up."""
    candidates: int


def parse_query(text: str) -> Query:
    """
    Raises:
        BadQuery: a field that is none, or a number that is none.
    """
    query = Query()
    for minus, name, operator, quoted, plain in _WORD.findall(text[:2000]):
        value = quoted or plain
        if not value:
            continue
        if not name or (name in ROLES and operator == ":"):
            if minus:
                raise BadQuery(f"-{value}: only row filters can be turned round")
            query.words.append(TextWord(name or None, value.casefold()))
            continue
        test = _filter(name, operator, value)
        query.filters.append(_not(test) if minus else test)
    return query


def _not(test: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: not test(row)


def _filter(name: str, operator: str, value: str) -> Callable[[Row], bool]:
    if name in NUMBERS:
        try:
            number = float(value)
        except ValueError:
            raise BadQuery(f"{name}{operator}{value}: {value!r} is no number") from None
        compare = _COMPARE[operator]
        return lambda row: (found := getattr(row, name)) is not None and compare(found, number)
    if name in TEXTS and operator in ":=":
        wanted = value.casefold()
        return lambda row: wanted in (getattr(row, name) or "").casefold()
    if name == "tools":
        return lambda row: value in row.tools
    if name in FLAGS or name == "is":
        flag = value if name == "is" else name
        tests: dict[str, Callable[[Row], bool]] = {
            "truncated": lambda row: row.truncated,
            "failed": lambda row: row.error is not None,
            "problem": lambda row: row.problem is not None,
            "scored": lambda row: row.scored > 0,
        }
        if flag in tests:
            return tests[flag]
    known = ", ".join([*NUMBERS, *TEXTS, "tools", "is", *ROLES])
    raise BadQuery(f"{name}{operator}{value}: there is no such field; fields: {known}; is:{', is:'.join(FLAGS)}")


def find(index: Index, text: str, *, sort: str = "", budget_s: float = BUDGET_S) -> Found:
    """The rows that a query is true of, in order; `-kl` sorts downwards. Rows without the value come last.

    Raises:
        BadQuery: the query or the order cannot be understood.
    """
    query = parse_query(text)
    rows = [row for row in index.rows() if all(test(row) for test in query.filters)]
    found = Found(rows, len(rows), len(rows))
    if query.words:
        found = _search(index, rows, query.words, budget_s)
    name, down = sort.lstrip("-"), sort.startswith("-")
    if not name:
        return found
    if name not in SORTABLE:
        raise BadQuery(f"cannot sort by {name!r}")
    there = [row for row in found.rows if getattr(row, name) is not None and not (name == "id" and row.problem)]
    keys = {id(row) for row in there}
    there.sort(key=lambda row: getattr(row, name), reverse=down)
    rest = [row for row in found.rows if id(row) not in keys]
    return Found([*there, *rest], found.searched, found.candidates)


def _search(index: Index, rows: list[Row], words: list[TextWord], budget_s: float) -> Found:
    end = time.monotonic() + budget_s
    hits: list[Row] = []
    needles = [_needles(word.text) for word in words]
    searched = 0
    for row, raw in _texts(index, rows):
        if time.monotonic() > end:
            break
        searched += 1
        lowered = raw.lower()
        if all(any(part in lowered for part in parts) for parts in needles) and _holds(raw, row, words):
            hits.append(row)
    return Found(hits, searched, len(rows))


def _texts(index: Index, rows: list[Row]) -> Iterator[tuple[Row, bytes]]:
    """Each row's line up to its arrays of tokens."""
    opened: tuple[int, str] | None = None
    file = None
    try:
        for row in sorted(rows, key=lambda row: (row.run, row.file, row.offset)):
            if opened != (row.run, row.file):
                if file is not None:
                    file.close()
                file, opened = index.path(row).open("rb", buffering=0), (row.run, row.file)
            if file is not None:
                file.seek(row.offset)
                yield row, file.read(row.text_length)
    finally:
        if file is not None:
            file.close()


def _needles(text: str) -> list[bytes]:
    """Bytes of which a line with this text holds one, whatever way JSON spells it; lower case."""
    plain = max(re.findall(r"[a-z0-9 _.,:;=()\[\]{}<>-]+", text), key=len, default="")
    return [plain.encode()] if plain else [b""]


def _holds(raw: bytes, row: Row, words: list[TextWord]) -> bool:
    try:
        value = json.loads(raw if row.text_length == row.length else raw + b"}")
        parts = [(role, text.casefold()) for role, text in spoken(value)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        parts = [("problem", raw.decode(errors="replace").casefold())]
    return all(any(word.role in (None, role) and word.text in text for role, text in parts) for word in words)


def spoken(value: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text of an episode with its role; `tool` takes in a tool's name, error kind and error."""
    for message in value["task"]["messages"]:
        yield message["role"], message["content"]
    for turn in value["turns"]:
        yield "assistant", f"{turn['text']}\n{turn['message']['content']}"
        if turn["message"]["reasoning"]:
            yield "think", turn["message"]["reasoning"]
        for call in turn["message"]["tool_calls"]:
            yield "call", f"{call['name']} {call['raw']}"
        for result in turn["tool_results"]:
            error = result["error"]
            yield "tool", f"{result['name']} {result['content']}"
            if error:
                yield "tool", f"{error['kind']} {error['message']}"
        for message in turn["observation"]:
            if message["role"] != "tool":
                yield message["role"], message["content"]
