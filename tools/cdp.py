"""The Chrome DevTools Protocol over a pipe: what `tools.browser` drives Chromium with.

Messages are JSON, each ended by a NUL byte, on the browser's descriptors 3 and 4 (`--remote-debugging-pipe`). No port
is open, so nobody else on the machine can drive the browser, and the browser ends by itself when this process does.
Protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

MAX_MESSAGE_BYTES = 64 * 2**20
"""A browser that says more at once is broken."""

Handler = Callable[[str, dict[str, Any]], None]
"""Gets an event's name and its parameters. Must not block, and must not raise."""


class BrowserGone(Exception):
    """The browser ended or closed its pipe; no more calls can be made."""


class CallFailed(Exception):
    """The browser answered a call with an error, such as that a page is no longer there."""


class Connection:
    """Calls and events of one browser. `to_browser` and `from_browser` are descriptors of pipes, which it closes."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.handlers: dict[str, Handler] = {}
        """Who hears the events of a session; "" for those of the browser itself."""
        self._fds = (to_browser, from_browser)
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last_id = 0
        self._gone = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        to_browser, from_browser = self._fds
        self._reader = asyncio.StreamReader(limit=MAX_MESSAGE_BYTES)
        read_pipe = os.fdopen(from_browser, "rb", buffering=0)
        self._read_transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._reader), read_pipe
        )
        write_pipe = os.fdopen(to_browser, "wb", buffering=0)
        self._write_transport, _ = await loop.connect_write_pipe(asyncio.Protocol, write_pipe)
        self._task = asyncio.create_task(self._read())

    @property
    def gone(self) -> bool:
        return self._gone

    def send(self, method: str, session: str = "", **params: Any) -> asyncio.Future[dict[str, Any]]:
        """Sends a call at once. The future may be dropped; it never warns of an error that nobody asked for.

        Raises:
            BrowserGone: the browser ended before.
        """
        if self._gone:
            raise BrowserGone("the browser has ended")
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_seen)
        self._calls[self._last_id] = future
        self._write_transport.write(json.dumps(message).encode() + b"\0")
        return future

    async def call(self, method: str, session: str = "", *, timeout_s: float, **params: Any) -> dict[str, Any]:
        """Sends a call and waits for its result.

        Raises:
            TimeoutError: no answer within `timeout_s`.
            CallFailed: the browser says that it cannot.
            BrowserGone: the browser ended before or meanwhile.
        """
        return await asyncio.wait_for(self.send(method, session, **params), timeout_s)

    async def create(
        self, method: str, undo: Callable[[dict[str, Any]], None], *, timeout_s: float, **params: Any
    ) -> dict[str, Any]:
        """As `call`, for what must be removed again: if the caller is cancelled or out of time before the answer is
        there, `undo` gets the result as soon as it comes."""
        future = self.send(method, **params)
        try:
            return await asyncio.wait_for(asyncio.shield(future), timeout_s)
        except (TimeoutError, asyncio.CancelledError):
            future.add_done_callback(lambda done: None if done.cancelled() or done.exception() else undo(done.result()))
            raise

    async def _read(self) -> None:
        try:
            while True:
                message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
                number = message.get("id")
                if number is None:
                    handler = self.handlers.get(message.get("sessionId", ""))
                    if handler is not None:
                        handler(message["method"], message["params"])
                    continue
                future = self._calls.pop(number, None)
                if future is None or future.done():
                    continue
                if "error" in message:
                    future.set_exception(CallFailed(str(message["error"].get("message", message["error"]))))
                else:
                    future.set_result(message["result"])
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, ValueError):
            pass  # it ended, or talks nonsense: either way it is of no more use
        finally:
            self._end()

    def _end(self) -> None:
        self._gone = True
        for future in self._calls.values():
            if not future.done():
                future.set_exception(BrowserGone("the browser has ended"))
        self._calls.clear()
        for handler in list(self.handlers.values()):
            handler("Inspector.detached", {})
        for transport in (self._write_transport, self._read_transport):
            if not transport.is_closing():
                transport.close()

    async def aclose(self) -> None:
        """Closes the pipes, upon which the browser ends."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None


def _seen(future: asyncio.Future[dict[str, Any]]) -> None:
    if not future.cancelled():
        future.exception()
