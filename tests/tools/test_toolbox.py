"""Calling tools: one result a call, in order, whatever a tool or a model does."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest

from tools.tool import Metadata, State, Tool, ToolContractError, ToolOutput, tool
from tools.toolbox import CANCEL_GRACE_S, MAX_ERROR_CHARS, Toolbox
from tools.types import ToolCall, ToolErrorKind, ToolFailure, ToolResult

SECRET = "hunter2-hunter2"


def call(name: str, /, **arguments: Any) -> ToolCall:
    return ToolCall(id=f"call_{name}", name=name, arguments=arguments, raw="")


async def run(
    tools: list[Tool], *calls: ToolCall, state: dict[str, Any] | None = None, limit: int = 8000
) -> list[ToolResult]:
    box = Toolbox(tools, max_output_chars=limit, redact=[SECRET])
    return await box.run(calls, metadata={"answer": 42}, state={} if state is None else state)


async def run_one(one: Tool, limit: int = 8000, **arguments: Any) -> ToolResult:
    (result,) = await run([one], call(one.name, **arguments), limit=limit)
    return result


@tool
async def echo(text: str) -> str:
    """Echo."""
    return text


@tool
def note(text: str, *, state: State, metadata: Metadata) -> str:
    """Note."""
    state.setdefault("notes", []).append(text)
    return f"{len(state['notes'])} {metadata['answer']}"


@tool(ends_episode=True)
async def submit(answer: str) -> str:
    """Submit."""
    if answer == "?":
        raise ToolFailure("an answer is needed")
    return "done"


async def test_results_are_in_the_order_of_the_calls() -> None:
    state: dict[str, Any] = {}
    results = await run(
        [echo, note], call("note", text="a"), call("echo", text="b"), call("note", text="c"), state=state
    )
    assert [result.content for result in results] == ["1 42", "b", "2 42"]
    assert [result.call_id for result in results] == ["call_note", "call_echo", "call_note"]
    assert state == {"notes": ["a", "c"]}
    assert all(result.error is None and result.duration_s > 0 for result in results)


async def test_no_calls_no_results() -> None:
    assert await run([echo]) == []


async def test_parallel_safe_calls_run_at_the_same_time_others_do_not() -> None:
    running: list[int] = [0, 0]  # now, most
    barrier = asyncio.Barrier(3)

    async def enter() -> None:
        running[0] += 1
        running[1] = max(running)
        await asyncio.sleep(0.005)
        running[0] -= 1

    @tool(parallel_safe=True, timeout_s=5)
    async def together(x: int) -> int:
        """Together."""
        await barrier.wait()
        await asyncio.sleep(0.003 * (3 - x))
        return x

    @tool
    async def alone(x: int) -> int:
        """Alone."""
        await enter()
        return x

    results = await run(
        [together, alone], *(call("together", x=i) for i in range(3)), *(call("alone", x=i) for i in range(3))
    )
    assert [result.content for result in results] == ["0", "1", "2", "0", "1", "2"]
    assert running[1] == 1


async def test_a_malformed_call_and_an_unknown_tool() -> None:
    broken = ToolCall(id="x", name="", arguments=None, raw="{", parse_error="no JSON: line 1")
    malformed, unknown, strange = await run([echo, note], broken, call("ecko"), call("q" * 300))
    assert malformed.error is not None
    assert malformed.content == "malformed_call: no JSON: line 1"
    assert unknown.content == 'unknown_tool: no tool "ecko", did you mean "echo"? Tools: echo, note'
    assert strange.error is not None
    assert strange.error.kind is ToolErrorKind.UNKNOWN_TOOL
    assert len(strange.content) < 150


async def test_wrong_arguments() -> None:
    result = await run_one(echo, text=5)
    assert result.content == 'invalid_arguments: argument "text": wanted a string, found an integer (5)'


# --- the end of an episode


async def test_the_rest_is_cancelled_after_an_answer() -> None:
    state: dict[str, Any] = {}
    calls = [
        call("submit", answer="?"),
        call("submit", answer="x"),
        call("note", text="late"),
        call("echo", text="late"),
    ]
    results = await run([submit, note, echo], *calls, state=state)
    assert [result.ends_episode for result in results] == [False, True, False, False]
    assert results[0].error is not None
    assert [result.error.kind for result in results[2:] if result.error] == [ToolErrorKind.CANCELLED] * 2
    assert state == {}


@pytest.mark.parametrize(("declared", "said", "ends"), [(True, False, False), (False, True, True), (True, None, True)])
async def test_an_output_may_overrule_the_declaration(declared: bool, said: bool | None, ends: bool) -> None:
    @tool(ends_episode=declared)
    async def answer() -> ToolOutput:
        """Answer."""
        return ToolOutput(content="x", ends_episode=said)

    assert (await run_one(answer)).ends_episode is ends


# --- deadlines and cancellation


async def test_an_async_tool_is_cancelled_at_its_deadline() -> None:
    cancelled: list[bool] = []

    @tool(timeout_s=0.02)
    async def slow() -> str:
        """Slow."""
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return ""

    results = await run([slow, echo], call("slow"), call("echo", text="on"))
    assert results[0].content == "timeout: slow took longer than 0.02 s and was stopped"
    assert results[1].content == "on"
    assert cancelled == [True]


async def test_a_tool_that_swallows_its_cancellation_holds_nobody_up() -> None:
    release = asyncio.Event()

    @tool(timeout_s=0.02)
    async def stubborn() -> str:
        """Stubborn."""
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return "late"

    started = time.perf_counter()
    result = await run_one(stubborn)
    assert time.perf_counter() - started < CANCEL_GRACE_S + 1
    assert result.error is not None
    assert result.error.kind is ToolErrorKind.TIMEOUT
    release.set()
    await asyncio.sleep(0.01)


async def test_a_sync_tool_is_left_behind_at_its_deadline() -> None:
    release = threading.Event()

    @tool(timeout_s=0.02)
    def stuck() -> str:
        """Stuck."""
        release.wait(30)
        return "late"

    results = await run([stuck, note], call("stuck"), call("note", text="on"))
    assert results[0].error is not None
    assert results[0].error.kind is ToolErrorKind.TIMEOUT
    assert results[1].content == "1 42"
    release.set()


async def test_more_hanging_sync_tools_than_any_thread_pool_has() -> None:
    release = threading.Event()

    @tool(timeout_s=0.05, parallel_safe=True)
    def stuck() -> str:
        """Stuck."""
        release.wait(30)
        return ""

    calls = [call("stuck")] * 40 + [call("note", text="on")]
    results = await run([stuck, note], *calls)
    assert results[-1].content == "1 42"
    release.set()


@pytest.mark.parametrize("num_calls", [1, 3])
async def test_cancelling_the_run_cancels_the_tools(num_calls: int) -> None:
    running: set[object] = set()
    all_run = asyncio.Event()

    @tool(parallel_safe=True)
    async def wait() -> str:
        """Wait."""
        me = object()
        running.add(me)
        if len(running) == num_calls:
            all_run.set()
        try:
            await asyncio.sleep(60)
        finally:
            running.discard(me)
        return ""

    task = asyncio.ensure_future(run([wait], *[call("wait")] * num_calls))
    await all_run.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not running
    assert len(asyncio.all_tasks()) == 1


# --- tools that fail


class CustomError(Exception):
    pass


@pytest.mark.parametrize("error", [CustomError, ValueError, TimeoutError, SystemExit, asyncio.CancelledError])
@pytest.mark.parametrize("is_async", [True, False])
async def test_an_exception_is_its_class_name(error: type[BaseException], is_async: bool) -> None:
    @tool
    async def fails() -> str:
        """Fails."""
        raise error("/home/me/secret.py says " + SECRET)

    @tool(name="fails")
    def fails_in_thread() -> str:
        """Fails."""
        raise error("/home/me/secret.py says " + SECRET)

    result = await run_one(fails if is_async else fails_in_thread)
    assert result.content == f"execution: fails failed: {error.__name__}"
    if error is not asyncio.CancelledError:
        assert result.metadata["exception"] == error.__name__
        assert result.metadata["where"].startswith("test_toolbox.py:")
    assert "home" not in json.dumps(result.metadata)


async def test_a_failure_keeps_its_words_but_no_secret_path_or_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEATHER_API_KEY", "env-secret-value")
    prefix = sys.prefix

    @tool
    async def fails(text: str) -> str:
        """Fails."""
        raise ToolFailure(text, ToolErrorKind.NOT_FOUND)

    async def words(text: str) -> str:
        return (await run_one(fails, text=text)).content

    assert await words("no page at /trial/NCT1") == "not_found: no page at /trial/NCT1"
    assert await words("see https://host/home/x") == "not_found: see https://host/home/x"
    assert await words(f"key {SECRET} and env-secret-value") == "not_found: key [redacted] and [redacted]"
    assert await words(f"in {prefix}/lib/x.py, line 3") == "not_found: in [path], line 3"
    assert await words("open '/home/me/a.txt' or C:\\me\\b") == "not_found: open '[path]' or [path]"
    assert await words("file:///etc/passwd") == "not_found: [path]"
    assert await words("bad\nTraceback (most recent call last):\n  File x") == "not_found: bad"
    assert await words("") == "not_found: no reason given"
    assert await words(SECRET[:4] + "\u200b" + SECRET[4:]) == "not_found: [redacted]"
    long = await run_one(fails, text="y" * 490 + SECRET + "x" * 10_000)
    assert long.error is not None
    assert len(long.error.message) == MAX_ERROR_CHARS
    assert "hunter" not in long.content


# --- what comes back


@dataclass
class Point:
    x: int


async def test_values_are_dumped_as_json() -> None:
    @tool
    async def give(kind: str) -> Any:
        """Give."""
        return {"dict": {"ä": [1, None, True]}, "list": [Point(1)], "none": None, "number": 1.5, "text": "ä"}[kind]

    assert (await run_one(give, kind="dict")).content == '{"ä": [1, null, true]}'
    assert (await run_one(give, kind="list")).content == '[{"x": 1}]'
    assert (await run_one(give, kind="none")).content == "null"
    assert (await run_one(give, kind="number")).content == "1.5"
    assert (await run_one(give, kind="text")).content == "ä"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1, 2}, "no JSON value: set"),
        (b"x", "bytes"),
        (float("nan"), "no JSON value"),
        ({"a": {"b": object()}}, "no JSON value: object"),
        (ToolOutput(content=b"x"), "must be text"),  # type: ignore[arg-type]
        (ToolOutput(content="x", metadata={"a": {1}}), "metadata is not JSON"),
    ],
    ids=str,
)
@pytest.mark.parametrize("parallel", [True, False])
async def test_a_broken_return_is_the_authors_bug(value: Any, words: str, parallel: bool) -> None:
    @tool(parallel_safe=parallel)
    async def give() -> Any:
        """Give."""
        return value

    with pytest.raises(ToolContractError, match=words):
        await run([give], call("give"), call("give"))


async def test_none_where_the_hint_has_none_of_it() -> None:
    @tool
    async def forgets() -> str:
        """Forgets."""
        return None  # type: ignore[return-value]

    with pytest.raises(ToolContractError, match="returned None"):
        await run_one(forgets)


async def test_hostile_characters_are_cleaned_and_secrets_taken_out() -> None:
    text = f"a\x00b\u200b\u202ec\x1b[31m\ud800{SECRET[:5]}\u2060{SECRET[5:]}\r\nd"
    result = await run_one(echo, text="x")
    assert result.content == "x"

    @tool
    async def hostile() -> ToolOutput:
        """Hostile."""
        return ToolOutput(content=text, metadata={"header": f"Bearer {SECRET}"})

    result = await run_one(hostile)
    assert result.content == "abc[31m[redacted]\nd"
    assert result.metadata == {"header": "Bearer [redacted]"}


@pytest.mark.parametrize("length", [99, 100, 101, 250, 10_000])
async def test_long_output_is_cut_with_a_footer(length: int) -> None:
    text = "x" * length
    result = await run_one(echo, text=text, limit=100)
    if length <= 100:
        assert (result.content, result.truncated_chars) == (text, 0)
        return
    body, _, footer = result.content.partition("\n")
    assert len(result.content) <= 100
    assert len(body) + result.truncated_chars == length
    assert footer.startswith("[page 1/")
    assert footer.endswith(f", {result.truncated_chars} characters cut]")


async def test_a_tiny_limit_has_no_footer() -> None:
    result = await run_one(echo, text="0123456789", limit=4)
    assert (result.content, result.truncated_chars) == ("0123", 6)


async def test_fifty_megabytes() -> None:
    @tool
    async def flood() -> str:
        """Flood."""
        return "ab\x00" * 17_000_000

    started = time.perf_counter()
    result = await run_one(flood)
    assert time.perf_counter() - started < 5
    assert len(result.content) <= 8000
    assert result.truncated_chars > 40_000_000


# --- building one


def test_a_toolbox_refuses_what_is_no_set_of_tools() -> None:
    class World:
        @tool
        def look(self) -> str:
            """Look."""
            return ""

    with pytest.raises(ToolContractError, match="two tools are called 'echo'"):
        Toolbox([echo, echo])
    with pytest.raises(ToolContractError, match="pass it from an instance"):
        Toolbox([World.look])
    with pytest.raises(ToolContractError, match="is no tool"):
        Toolbox([print])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="max_output_chars"):
        Toolbox([echo], max_output_chars=0)
    assert [spec.name for spec in Toolbox([World().look, echo]).specs] == ["look", "echo"]
