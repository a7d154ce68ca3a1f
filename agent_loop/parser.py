"""Reads an assistant message out of sampled tokens: thinking, tool calls, answer.

The hermes form: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them, after the think
block. Where the tokenizer has these tags as added tokens, only those tokens are tags: letters that spell one are text.
Where it has not, the letters are the tags. A call that cannot be read is a `ToolCall` with a `parse_error`, never an
exception and never "no call". Nothing here evaluates anything; time is linear in the length.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from agent_loop.types import ClassSpan, TokenClass
from envs.types import AssistantMessage
from tools.types import ToolCall

MAX_CALL_CHARS = 100_000
"""A longer call is malformed; no tool takes arguments of that size."""

MAX_TOKENS_A_CHARACTER = 8

MAX_CALL_DEPTH = 64
"""Nested objects and lists of a call; deeper ones only serve to exhaust somebody's stack."""

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
    """Tokens [start, end) of one class. `body` is the text without tags; `opened` and `closed` are False without a
    start or an end tag."""

    token_class: TokenClass
    start: int
    end: int
    body: str
    closed: bool = True
    opened: bool = True


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
                calls.append(
                    read_call(region.body, f"call_{turn}_{len(calls)}", opened=region.opened, closed=region.closed)
                )
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
        ahead: dict[str, tuple[int, int] | None] = {}

        def next_of(tag: Tag) -> tuple[int, int] | None:
            # What was found ahead stays true until it is passed: each tag is searched for once over the whole text.
            found = ahead.get(tag.text, (-1, -1))
            if found is not None and found[0] < position:
                found = ahead[tag.text] = finder.find(tag, position)
            return found

        def answer(end: int) -> None:
            if end > position:
                regions.append(finder.region(TokenClass.ANSWER, position, end, position, end))

        position = 0
        opened, closed = next_of(self._think[0]), next_of(self._think[1])
        # Thinking may have been begun by the prompt; some models leave out the opening tag.
        thinking = self._starts_thinking or (closed is not None and (opened is None or closed < opened))
        begin = 0
        if thinking and opened is not None and (closed is None or opened < closed):
            begin = opened[1] if not finder.text(0, opened[0]).strip() else 0
        while True:
            if thinking:
                closed = next_of(self._think[1])
                end, after = closed or (finder.end, finder.end)
                regions.append(finder.region(TokenClass.THINK, position, after, begin, end, closed=closed is not None))
                position, thinking = after, False
                continue
            opened, start, end_tag = next_of(self._think[0]), next_of(self._call[0]), next_of(self._call[1])
            found = min((at for at in (opened, start, end_tag) if at is not None), default=None)
            if found is None:
                answer(finder.end)
                return regions
            if found == end_tag:  # a call of which only the end is tagged: malformed, not an answer
                regions.append(finder.region(TokenClass.CALL, position, found[1], position, found[0], opened=False))
                position = found[1]
                continue
            answer(found[0])
            position = found[0]
            if found == opened:
                thinking, begin = True, found[1]
                continue
            close = next_of(self._call[1])
            end, after = close or (finder.end, finder.end)
            regions.append(finder.region(TokenClass.CALL, position, after, found[1], end, closed=close is not None))
            position = after


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
        self,
        token_class: TokenClass,
        start: int,
        end: int,
        begin: int,
        stop: int,
        *,
        closed: bool = True,
        opened: bool = True,
    ) -> Region:
        return Region(token_class, start, end, self.text(begin, stop), closed, opened)


class _TextFinder:
    """Positions are characters of the decoded text; a tag is its letters."""

    def __init__(self, ids: list[int], decode: Callable[[Sequence[int]], str]) -> None:
        self._ids = ids
        self._decode = decode
        self._text = decode(ids)
        self._starts: list[int] = []
        self.end = len(self._text)

    def find(self, tag: Tag, start: int) -> tuple[int, int] | None:
        at = self._text.find(tag.text, start)
        return None if at < 0 else (at, at + len(tag.text))

    def text(self, start: int, end: int) -> str:
        return self._text[start:end]

    def region(
        self,
        token_class: TokenClass,
        start: int,
        end: int,
        begin: int,
        stop: int,
        *,
        closed: bool = True,
        opened: bool = True,
    ) -> Region:
        return Region(token_class, self._token(start), self._token(end), self._text[begin:stop], closed, opened)

    def _token(self, character: int) -> int:
        """The first token that begins at or after a character."""
        if character <= 0 or character >= self.end:
            return 0 if character <= 0 else len(self._ids)
        if not self._starts:
            self._starts = _character_starts(self._ids, self._decode)
        return min(bisect_left(self._starts, character), len(self._ids))


def _character_starts(ids: list[int], decode: Callable[[Sequence[int]], str]) -> list[int]:
    """The character at which each token begins, in linear time.

    Tokens are decoded behind the few before them, as a streaming server does: some tokenizers write a space only
    between words, and one character may be spread over several tokens, which then all begin where it does.
    """
    starts: list[int] = []
    character, context, done = 0, 0, 0
    known = ""  # text of ids[context:done]
    for index in range(len(ids)):
        starts.append(character)
        text = decode(ids[context : index + 1])
        if text.endswith("\ufffd") and index - done < MAX_TOKENS_A_CHARACTER:
            continue
        character += len(text) - len(known)
        context, done = done, index + 1
        known = decode(ids[context:done])
    return starts


def read_call(text: str, call_id: str, *, closed: bool = True, opened: bool = True) -> ToolCall:
    """One call from the text between its tags.

    Strict: `arguments` is an object (not a string that holds one), every number finite, no key twice, no lone
    surrogate, at most `MAX_CALL_DEPTH` deep. Whatever is not so is a `ToolCall` with a `parse_error`.
    """
    raw = text.strip()

    def malformed(reason: str, name: str = "") -> ToolCall:
        return ToolCall(id=call_id, name=name, arguments=None, raw=text, parse_error=f"{reason}; {WANTED}")

    if not opened:
        return malformed("the call has no <tool_call> before it")
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
        return malformed(f"the call has unknown keys {', '.join(map(_shown, extra[:5]))}", name)
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return malformed(f'"arguments" is a JSON {type(arguments).__name__}, not an object', name)
    problem = _problem(value)
    if problem:
        return malformed(problem, "" if _is_torn(name) else name)
    return ToolCall(id=call_id, name=name, arguments=arguments, raw=text)


def _problem(value: Any) -> str | None:
    """What JSON allows and no tool, file or template can take; the walk keeps its own stack."""
    todo: list[tuple[Any, int]] = [(value, 1)]
    while todo:
        item, depth = todo.pop()
        if depth > MAX_CALL_DEPTH + 1:
            return f"the call is nested more than {MAX_CALL_DEPTH} deep"
        if isinstance(item, float) and not math.isfinite(item):
            return "a number of the call is too large"
        if isinstance(item, str) and _is_torn(item):
            return "a text of the call has half of a surrogate pair"
        if isinstance(item, dict):
            todo.extend((key, depth + 1) for key in item)
            todo.extend((part, depth + 1) for part in item.values())
        elif isinstance(item, list):
            todo.extend((part, depth + 1) for part in item)
    return None


def _is_torn(text: str) -> bool:
    """True if the text has a lone surrogate, which no encoding can write."""
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


def _shown(key: str) -> str:
    return repr(key if len(key) <= 40 else key[:40] + "…")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {_shown(name)} is there twice")
            seen.add(name)
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
