"""Reads an assistant message out of sampled tokens: thinking, tool calls, answer.

The hermes form: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them, after the think
block. Where the tokenizer has these tags as added tokens, only those tokens are tags: letters that spell one are text.
Where it has not, the letters are the tags. A call that cannot be read is a `ToolCall` with a `parse_error`, never an
exception and never "no call". Nothing here evaluates anything; time is linear in the length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from agent_loop.types import ClassSpan, TokenClass
from envs.types import AssistantMessage
from tools.types import ToolCall

MAX_CALL_CHARS = 100_000
"""A longer call is malformed; no tool takes arguments of that size."""

WANTED = 'write <tool_call>{"name": <tool>, "arguments": {<arguments>}}</tool_call>'


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """One of the markers, as text and, where the tokenizer has it as an added token, as id."""

    text: str
    id: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTurn:
    message: AssistantMessage
    token_classes: tuple[ClassSpan, ...]
    """Tile the completion's tokens in order."""
    text: str
    """The completion decoded, special tokens visible."""


@dataclass(frozen=True, slots=True)
class Region:
    """Tokens [start, end) of one class. `body` is the text without tags; `closed` is False without an end tag."""

    token_class: TokenClass
    start: int
    end: int
    body: str
    closed: bool = True


class HermesParser:
    """
    Args:
        decode: ids to text, special tokens visible.
        stop_ids: ids that end a turn; they are no part of the text.
        tags: open and close of thinking, open and close of a call.
        starts_thinking: the generation prompt ends inside a think block.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        stop_ids: frozenset[int],
        think: tuple[Tag, Tag],
        call: tuple[Tag, Tag],
        starts_thinking: bool = False,
    ) -> None:
        self._decode = decode
        self._stop_ids = stop_ids
        self._think = think
        self._call = call
        self._starts_thinking = starts_thinking

    def parse(self, token_ids: Sequence[int], turn: int, *, finished: bool) -> ParsedTurn:
        """Parse one completion. Call ids are `call_<turn>_<index>`."""
        ids = list(token_ids)
        length = len(ids)
        body = ids[:-1] if ids and ids[-1] in self._stop_ids else ids
        regions = self._regions(body)
        calls: list[ToolCall] = []
        answer: list[str] = []
        reasoning: list[str] = []
        for region in regions:
            if region.token_class is TokenClass.CALL:
                calls.append(read_call(region.body, f"call_{turn}_{len(calls)}", closed=region.closed))
            elif region.token_class is TokenClass.THINK:
                reasoning.append(region.body)
            else:
                answer.append(region.body)
        message = AssistantMessage(
            content="".join(answer).strip(),
            reasoning="".join(reasoning).strip() if reasoning else None,
            tool_calls=tuple(calls),
            finished=finished,
        )
        spans = [(r.token_class, r.start, r.end) for r in regions if r.end > r.start]
        if length > len(body):  # the stop token belongs to what it closes
            kind = spans[-1][0] if spans else TokenClass.ANSWER
            spans.append((kind, len(body), length))
        classes = tuple(ClassSpan(token_class=kind, start=start, end=end) for kind, start, end in _merged(spans))
        return ParsedTurn(message=message, token_classes=classes, text=self._decode(ids))

    def _regions(self, ids: list[int]) -> list[Region]:
        finder = _IdFinder(ids, self._decode) if self._call[0].id is not None else _TextFinder(ids, self._decode)
        regions: list[Region] = []
        position = 0
        opened = finder.find(self._think[0], 0)
        thinking = self._starts_thinking or (opened is not None and not finder.text(0, opened[0]).strip())
        if thinking:
            begin = opened[1] if opened is not None and not self._starts_thinking else 0
            closed = finder.find(self._think[1], begin)
            if closed is None:
                return [finder.region(TokenClass.THINK, 0, finder.end, begin, finder.end, closed=False)]
            regions.append(finder.region(TokenClass.THINK, 0, closed[1], begin, closed[0]))
            position = closed[1]
        while True:
            start = finder.find(self._call[0], position)
            if start is None:
                break
            if start[0] > position:
                regions.append(finder.region(TokenClass.ANSWER, position, start[0], position, start[0]))
            end = finder.find(self._call[1], start[1])
            if end is None:
                regions.append(finder.region(TokenClass.CALL, start[0], finder.end, start[1], finder.end, closed=False))
                return regions
            regions.append(finder.region(TokenClass.CALL, start[0], end[1], start[1], end[0]))
            position = end[1]
        if position < finder.end:
            regions.append(finder.region(TokenClass.ANSWER, position, finder.end, position, finder.end))
        return regions


class _IdFinder:
    """Positions are token indices; a tag is one id."""

    def __init__(self, ids: list[int], decode: Callable[[Sequence[int]], str]) -> None:
        self._ids = ids
        self._decode = decode
        self.end = len(ids)

    def find(self, tag: Tag, start: int) -> tuple[int, int] | None:
        if tag.id is None:
            return None
        try:
            at = self._ids.index(tag.id, start)
        except ValueError:
            return None
        return at, at + 1

    def text(self, start: int, end: int) -> str:
        return self._decode(self._ids[start:end])

    def region(
        self, token_class: TokenClass, start: int, end: int, begin: int, stop: int, *, closed: bool = True
    ) -> Region:
        return Region(token_class, start, end, self.text(begin, stop), closed)


class _TextFinder:
    """Positions are characters of the decoded text; a tag is its letters. Token indices are found by bisection."""

    def __init__(self, ids: list[int], decode: Callable[[Sequence[int]], str]) -> None:
        self._ids = ids
        self._decode = decode
        self._text = decode(ids)
        self.end = len(self._text)

    def find(self, tag: Tag, start: int) -> tuple[int, int] | None:
        at = self._text.find(tag.text, start)
        return None if at < 0 else (at, at + len(tag.text))

    def text(self, start: int, end: int) -> str:
        return self._text[start:end]

    def region(
        self, token_class: TokenClass, start: int, end: int, begin: int, stop: int, *, closed: bool = True
    ) -> Region:
        return Region(token_class, self._token(start), self._token(end), self._text[begin:stop], closed)

    def _token(self, character: int) -> int:
        """The first token that begins at or after a character."""
        if character >= self.end:
            return len(self._ids)
        low, high = 0, len(self._ids)
        while low < high:
            middle = (low + high) // 2
            if len(self._decode(self._ids[:middle])) < character:
                low = middle + 1
            else:
                high = middle
        return low


def read_call(text: str, call_id: str, *, closed: bool = True) -> ToolCall:
    """One call from the text between its tags."""
    raw = text.strip()

    def malformed(reason: str, name: str = "") -> ToolCall:
        return ToolCall(id=call_id, name=name, arguments=None, raw=text, parse_error=f"{reason}; {WANTED}")

    if not closed:
        return malformed("the call has no </tool_call>")
    if len(raw) > MAX_CALL_CHARS:
        return malformed(f"the call has {len(raw)} characters, more than {MAX_CALL_CHARS}")
    try:
        value = json.loads(raw, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        return malformed("the call is nested too deeply")
    except ValueError as error:
        return malformed(f"the call is not valid JSON ({error})")
    if not isinstance(value, dict):
        return malformed(f"the call is a JSON {type(value).__name__}, not an object")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return malformed('the call has no "name"')
    extra = sorted(set(value) - {"name", "arguments"})
    if extra:
        return malformed(f"the call has unknown keys {extra}", name)
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return malformed(f'"arguments" is a JSON {type(arguments).__name__}, not an object', name)
    return ToolCall(id=call_id, name=name, arguments=arguments, raw=text)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _merged(spans: list[tuple[TokenClass, int, int]]) -> list[tuple[TokenClass, int, int]]:
    """Neighbours of one class become one span; two bodies that share a token give it to the first."""
    merged: list[tuple[TokenClass, int, int]] = []
    for kind, start, end in spans:
        if merged and merged[-1][0] is kind:
            merged[-1] = (kind, merged[-1][1], end)
        elif end > (merged[-1][2] if merged else 0):
            merged.append((kind, merged[-1][2] if merged else start, end))
    return merged
