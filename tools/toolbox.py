"""Runs the tool calls of one assistant message: one result a call, in the order of the calls."""

from __future__ import annotations

import asyncio
import contextvars
import difflib
import json
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import PurePath
from types import TracebackType
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from tools.clean import clean_text
from tools.redact import redact, scrub_paths, secret_values
from tools.tool import Tool, ToolContractError, ToolOutput
from tools.types import ToolCall, ToolError, ToolErrorKind, ToolFailure, ToolResult, ToolSpec

logger = logging.getLogger(__name__)

MAX_ERROR_CHARS = 500
CANCEL_GRACE_S = 1.0
"""How long a cancelled tool may take to clean up; after that it is left behind."""
MAX_CLEANED_CHARS = 1_000_000
"""Of a longer output only the beginning is cleaned before it is cut to the limit."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a tool's function ended: with a value or with an exception."""

    value: Any = None
    error: BaseException | None = None


class Toolbox:
    """The tools of one environment and the rules of calling them.

    A call never raises for what a model or a tool did wrong: that is a `ToolResult` with an `error`. A tool that
    breaks its contract (returns a set, NaN, None without saying so) raises `ToolContractError` out of `run`.
    """

    def __init__(self, tools: Sequence[Tool], *, max_output_chars: int = 8000, redact: Sequence[str] = ()) -> None:
        """
        Args:
            tools: in the order in which the model is told of them.
            max_output_chars: characters of one result that the model sees, footer included.
            redact: secret values to take out of all output; values of environment variables named like secrets
                are taken out anyway.

        Raises:
            ToolContractError: something that is no tool, an unbound method, two tools of one name.
        """
        if max_output_chars < 1:
            raise ValueError(f"max_output_chars must be at least 1, got {max_output_chars}")
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            if not isinstance(tool, Tool):
                raise ToolContractError(f"{tool!r} is no tool; declare it with @tool")
            if tool.needs_self:
                raise ToolContractError(f"tool {tool.name!r} is a method; pass it from an instance, not from the class")
            if tool.name in self._tools:
                raise ToolContractError(f"two tools are called {tool.name!r}")
            self._tools[tool.name] = tool
        self.max_output_chars = max_output_chars
        self._secrets = secret_values(redact)

    @property
    def tools(self) -> tuple[Tool, ...]:
        return tuple(self._tools.values())

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        return tuple(tool.spec for tool in self._tools.values())

    async def run(
        self, calls: Sequence[ToolCall], *, metadata: dict[str, Any], state: dict[str, Any]
    ) -> list[ToolResult]:
        """Runs the calls of one message.

        Neighbouring calls of `parallel_safe` tools run at the same time, all others one after another. After a
        successful call that ends the episode the rest is not run (`cancelled`). If this coroutine is cancelled, so
        are the tools that run.

        Args:
            metadata: the task's, for tools that ask for `Metadata`.
            state: the episode's, for tools that ask for `State`; tools change it in place.

        Raises:
            ToolContractError: a tool returned what it must not.
        """
        results: list[ToolResult] = []
        ended = False
        while len(results) < len(calls):
            group = self._next_group(calls[len(results) :])
            if ended:
                results += [self._cancelled(call) for call in group]
            elif len(group) == 1:
                results.append(await self._run_one(group[0], metadata, state))
            else:
                results += await _gather([self._run_one(call, metadata, state) for call in group])
            ended = ended or any(result.ends_episode for result in results)
        return results

    def _next_group(self, calls: Sequence[ToolCall]) -> Sequence[ToolCall]:
        """The calls at the front that may run together; one call if it is not parallel-safe."""
        size = 0
        while size < len(calls):
            tool = self._tools.get(calls[size].name)
            if tool is None or not tool.parallel_safe or tool.ends_episode:
                break
            size += 1
        return calls[: max(size, 1)]

    async def _run_one(self, call: ToolCall, metadata: dict[str, Any], state: dict[str, Any]) -> ToolResult:
        started = time.perf_counter()
        if call.arguments is None:
            return self._failed(call, ToolErrorKind.MALFORMED_CALL, call.parse_error or "the call cannot be read")
        tool = self._tools.get(call.name)
        if tool is None:
            return self._failed(call, ToolErrorKind.UNKNOWN_TOOL, self._unknown(call.name))
        try:
            arguments = tool.arguments.validate(call.arguments)
        except ToolFailure as failure:
            return self._failed(call, failure.kind, str(failure))
        for name, source in tool.injected.items():
            arguments[name] = metadata if source == "metadata" else state
        outcome = await _call(tool, arguments)
        duration_s = time.perf_counter() - started
        if outcome is None:
            message = f"{tool.name} took longer than {tool.timeout_s:g} s and was stopped"
            return self._failed(call, ToolErrorKind.TIMEOUT, message, duration_s)
        if isinstance(outcome.error, ToolContractError):
            raise outcome.error
        if isinstance(outcome.error, ToolFailure):
            return self._failed(call, outcome.error.kind, str(outcome.error), duration_s)
        if outcome.error is not None:
            name = type(outcome.error).__name__
            logger.debug("tool %s raised", tool.name, exc_info=outcome.error)
            details = {"exception": name, "where": _where(outcome.error.__traceback__)}
            return self._failed(call, ToolErrorKind.EXECUTION, f"{tool.name} failed: {name}", duration_s, details)
        return self._succeeded(call, tool, outcome.value, duration_s)

    def _succeeded(self, call: ToolCall, tool: Tool, value: Any, duration_s: float) -> ToolResult:
        output = value if isinstance(value, ToolOutput) else ToolOutput(content=_text_of(tool, value))
        if not isinstance(output.content, str):
            found = type(output.content).__name__
            raise ToolContractError(f"tool {tool.name!r}: ToolOutput.content must be text, found {found}")
        metadata = self._checked_metadata(tool, output.metadata)
        content, truncated_chars = self._cut(output.content)
        return ToolResult(
            call_id=call.id,
            name=call.name,
            content=content,
            ends_episode=tool.ends_episode if output.ends_episode is None else output.ends_episode,
            truncated_chars=truncated_chars,
            duration_s=duration_s,
            metadata=metadata,
        )

    def _checked_metadata(self, tool: Tool, metadata: dict[str, Any]) -> dict[str, Any]:
        """The metadata, which go to the episode file, without secrets."""
        if not metadata:
            return {}
        try:
            text = json.dumps(metadata, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ToolContractError(f"tool {tool.name!r}: ToolOutput.metadata is not JSON: {error}") from error
        redacted: dict[str, Any] = json.loads(redact(text, self._secrets))
        return redacted

    def _cut(self, text: str) -> tuple[str, int]:
        """Text within the limit, and how many characters are not in it. Pages are counted by what one page holds."""
        unread = max(0, len(text) - MAX_CLEANED_CHARS - self.max_output_chars)
        # Cleaned first: a zero-width character inside a secret would hide it. Cut last: half a secret is not found.
        text = redact(clean_text(text[: len(text) - unread] if unread else text), self._secrets)
        total = len(text) + unread
        if total <= self.max_output_chars:
            return text, 0
        room = self.max_output_chars - len(_footer(total, total))
        if room < self.max_output_chars // 2:  # a limit so small that the footer would be most of the page
            return text[: self.max_output_chars], total - min(self.max_output_chars, len(text))
        kept = text[:room]
        return kept + _footer(-(-total // room), total - len(kept)), total - len(kept)

    def _failed(
        self,
        call: ToolCall,
        kind: ToolErrorKind,
        message: str,
        duration_s: float = 0.0,
        metadata: dict[str, Any] | None = None,
    ) -> ToolResult:
        message = message.partition("Traceback (most recent call last)")[0]
        message = " ".join(scrub_paths(redact(clean_text(message), self._secrets)).split()) or "no reason given"
        if len(message) > MAX_ERROR_CHARS:
            message = message[: MAX_ERROR_CHARS - 3] + "..."
        # The prefix is not counted: the error in words stays readable under a small output limit.
        return ToolResult(
            call_id=call.id,
            name=call.name,
            content=f"{kind.value}: {message}",
            error=ToolError(kind=kind, message=message),
            duration_s=duration_s,
            metadata=metadata or {},
        )

    def _cancelled(self, call: ToolCall) -> ToolResult:
        return self._failed(call, ToolErrorKind.CANCELLED, "the episode ended before this call")

    def _unknown(self, name: str) -> str:
        shown = name if len(name) <= 64 else name[:61] + "..."
        close = difflib.get_close_matches(shown, self._tools, n=1)
        guess = f', did you mean "{close[0]}"?' if close else "."
        return f'no tool "{shown}"{guess} Tools: {", ".join(self._tools) or "none"}'


def _footer(num_pages: int, num_cut: int) -> str:
    return f"\n[page 1/{num_pages}, {num_cut} characters cut]"


async def _gather(coroutines: Sequence[Coroutine[Any, Any, ToolResult]]) -> list[ToolResult]:
    """All results in order; if one raises, or this is cancelled, the others are cancelled and waited for."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _call(tool: Tool, arguments: dict[str, Any]) -> _Outcome | None:
    """Calls the function; None if its deadline passed. It is waited for at most `CANCEL_GRACE_S` after that, even
    if it swallows the cancellation."""
    if not tool.is_async:
        return await _call_in_thread(tool, arguments)
    task = asyncio.ensure_future(_guarded(tool.function, arguments))
    try:
        await asyncio.wait({task}, timeout=tool.timeout_s)
    except asyncio.CancelledError:
        await _stop(task, tool.name)
        raise
    if not task.done():
        await _stop(task, tool.name)
        return None
    if task.cancelled():  # the tool cancelled itself: nobody else did
        return _Outcome(error=asyncio.CancelledError())
    return task.result()


async def _guarded(function: Callable[..., Any], arguments: dict[str, Any]) -> _Outcome:
    try:
        return _Outcome(value=await function(**arguments))
    except (Exception, SystemExit) as error:  # SystemExit would end the event loop
        return _Outcome(error=error)


async def _stop(task: asyncio.Task[_Outcome], name: str) -> None:
    task.cancel()
    await asyncio.wait({task}, timeout=CANCEL_GRACE_S)
    if not task.done():
        logger.warning("tool %s ignores its cancellation and was left behind", name)
        _left_behind.add(task)
        task.add_done_callback(_left_behind.discard)


_left_behind: set[asyncio.Task[_Outcome]] = set()
"""The loop itself keeps only weak references to tasks."""


async def _call_in_thread(tool: Tool, arguments: dict[str, Any]) -> _Outcome | None:
    """A daemon thread a call: a pool would fill up with threads that hang, and would be waited for at exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Outcome] = loop.create_future()
    context = contextvars.copy_context()

    def settle(outcome: _Outcome) -> None:
        if not future.done():
            future.set_result(outcome)

    def work() -> None:
        try:
            outcome = _Outcome(value=context.run(tool.function, **arguments))
        except BaseException as error:
            outcome = _Outcome(error=error)
        try:
            loop.call_soon_threadsafe(settle, outcome)
        except RuntimeError:
            logger.debug("tool %s ended after its event loop", tool.name)

    threading.Thread(target=work, name=f"tool-{tool.name}", daemon=True).start()
    await asyncio.wait({future}, timeout=tool.timeout_s)
    if not future.done():
        future.cancel()
        return None
    return future.result()


def _text_of(tool: Tool, value: Any) -> str:
    """Text as it is, any other value as JSON.

    Raises:
        ToolContractError: the value is no JSON value, or None where the return hint has no None.
    """
    if isinstance(value, str):
        return value
    if value is None and not tool.accepts_none:
        raise ToolContractError(f"tool {tool.name!r} returned None; is a return missing? Say `| None` if it is meant")
    if isinstance(value, bytes | bytearray | memoryview):
        raise ToolContractError(f"tool {tool.name!r} returned bytes; decode them to text")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_jsonable)
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolContractError(f"tool {tool.name!r} returned what is no JSON value: {error}") from error


def _jsonable(value: Any) -> Any:
    if isinstance(value, BaseModel) or (is_dataclass(value) and not isinstance(value, type)):
        return to_jsonable_python(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _where(trace: TracebackType | None) -> str:
    """File name and line of the innermost frame: `tools.py:31`, no folders."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{PurePath(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else ""
