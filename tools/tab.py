"""One page in a browser, from its opening to its end: a document that was fetched is run, and read when it is quiet.

The document itself does not come over the browser's network: `tools.fetch` got it, with all checks and limits, and the
tab answers the browser's first request with it. What the page then loads goes through the proxy.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tools.cdp import BrowserGone, CallFailed, Connection

CALL_TIMEOUT_S = 5.0
"""Of a call that a healthy browser answers at once."""
QUIET_S = 0.1
"""A page with no request under way for so long is finished."""
MAX_NAVIGATIONS = 5
"""A page may send the reader elsewhere by scripts and refreshes so often."""
AWAITED = frozenset({"Script", "XHR", "Fetch", "Stylesheet"})
"""What may change the text of a page. Frames, pings, streams and sockets are not waited for."""

UNREAD = ("Font", "Image", "Media", "Other")
"""Kinds of requests that no text comes from (`Other`: icons, prefetching): they are not let out."""
CRASHED = "the page crashed, or took more memory than a page may have"

_READ = """(() => {
  const html = document.documentElement ? document.documentElement.outerHTML : "";
  return {html: html.slice(0, LIMIT), chars: html.length, title: document.title.slice(0, 1000), url: document.URL,
          type: document.contentType};
})()"""


class TabFailed(Exception):
    """The page crashed, was closed or could not be read; in words for the model."""


class TabStuck(TabFailed):
    """The page does not answer: a script that never ends, or a renderer that is stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What the browser gets for its first request."""

    url: str
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A page as it stood when it was quiet."""

    html: str
    """Serialised document, at most `max_chars`."""
    title: str
    url: str
    """Of the document by now."""
    status: int
    hops: tuple[str, ...]
    """URLs to which scripts and refreshes sent the reader, first to last."""
    elsewhere: str | None
    """A URL to which the page sent the reader and at which there is no HTML but a file; not loaded."""
    quiet: bool
    """False if the page was still loading when its time was up."""
    whole: bool
    """False if the browser did not parse the document to its end: a script that it waited for did not come, or a
    script sent the reader to a place that is not allowed."""


Allowed = Callable[[str], Awaitable[bool]]
"""Whether the browser may open a URL as a document."""


@dataclass(slots=True)
class _State:
    """What the events have told so far."""

    frame: str = ""
    committed: bool = False
    parsed: bool = False
    refused: bool = False
    """The page was not let go elsewhere. Chromium stops parsing a page that wanted to."""
    running: set[str] = field(default_factory=set)
    last_change: float = field(default_factory=time.monotonic)
    navigations: list[str] = field(default_factory=list)
    status: int = 200
    elsewhere: str | None = None
    unreachable: bool = False


class Tab:
    """A target of a browser context. `Browser.tab` makes and ends it."""

    def __init__(self, connection: Connection, target: str, session: str) -> None:
        self._connection = connection
        self.target = target
        self._session = session
        self._state = _State()
        self._changed = asyncio.Event()
        self._blank = asyncio.Event()
        self._document: Document | None = None
        self._allowed: Allowed | None = None
        self.reusable = False
        """The last page was read without any trouble, so that the tab may show another one."""
        self._answers: set[asyncio.Task[None]] = set()
        self._crash: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        connection.handlers[session] = self._on_event

    async def prepare(self) -> None:
        """Switches on what `render` listens to. All calls go out at once."""
        send, session = self._connection.send, self._session
        calls = [
            send("Inspector.enable", session),
            send("Page.enable", session),
            send("Network.enable", session, maxTotalBufferSize=0, maxResourceBufferSize=0),
            send("Network.setBypassServiceWorker", session, bypass=True),
            send("Fetch.enable", session, patterns=[{"resourceType": kind} for kind in ("Document", *UNREAD)]),
            send("Page.getFrameTree", session),
        ]
        results = await asyncio.wait_for(asyncio.gather(*calls), CALL_TIMEOUT_S)
        self._state.frame = results[-1]["frameTree"]["frame"]["id"]

    async def render(self, document: Document, *, allowed: Allowed, settle_s: float, max_chars: int) -> Rendered:
        """Runs a document, waits until it is quiet or `settle_s` have passed, and reads it.

        Raises:
            TabStuck: it does not answer. TabFailed: it crashed. BrowserGone: the whole browser did.
        """
        frame = self._state.frame
        self._state = _State(frame=frame)
        self._document, self._allowed = document, allowed
        self.reusable = False
        self._connection.send("Page.navigate", self._session, url=document.url)
        deadline = time.monotonic() + settle_s
        while True:
            quiet = await self._until_quiet(deadline)
            try:
                read = await self._read(max_chars)
            except CallFailed:  # it went elsewhere while it was read
                read = None
            late = time.monotonic() >= deadline
            if read is not None and (late or (quiet and self._is_quiet())):
                break
            if read is None and late:
                raise TabStuck("the page never stood still")
        state = self._state
        if state.unreachable and not state.elsewhere:
            raise TabFailed("the page sent the reader to a place that cannot be loaded")
        self.reusable = quiet and state.parsed and len(state.navigations) == 1
        return Rendered(
            html=str(read["html"]),
            title=str(read["title"]),
            url=str(read["url"]),
            status=state.status,
            hops=tuple(state.navigations[1:]),
            elsewhere=state.elsewhere,
            quiet=quiet,
            whole=state.parsed,
        )

    @property
    def crashed(self) -> bool:
        return self._crash.done()

    async def blank(self) -> None:
        """Leaves the page: nothing of it runs any more.

        Raises:
            TimeoutError, CallFailed, BrowserGone, TabFailed: it could not be left.
        """
        self._state = _State(frame=self._state.frame)
        self._blank.clear()
        await self._connection.call("Page.navigate", self._session, url="about:blank", timeout_s=CALL_TIMEOUT_S)
        await asyncio.wait_for(self._blank.wait(), CALL_TIMEOUT_S)
        if self._crash.done() or self._answers:
            raise TabFailed(CRASHED)

    def detach(self) -> None:
        """Hears and answers nothing any more; `Browser` closes the target."""
        self._connection.handlers.pop(self._session, None)
        for task in self._answers:
            task.cancel()
        # A request that waits for an answer would keep the page from being closed.
        self._answer("Page.stopLoading")
        self._answer("Target.detachFromTarget", sessionId=self._session)

    def _is_quiet(self) -> bool:
        return (self._state.parsed or self._state.refused) and not self._state.running

    async def _until_quiet(self, deadline: float) -> bool:
        """True once nothing has happened for `QUIET_S`; False at the deadline."""
        while True:
            now = time.monotonic()
            if now >= deadline:
                return False
            quiet_at = self._state.last_change + QUIET_S
            if self._is_quiet() and now >= quiet_at:
                return True
            self._changed.clear()
            wait_until = min(quiet_at, deadline) if self._is_quiet() else deadline
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.001, wait_until - now))
            if self._connection.gone:
                raise BrowserGone("the browser has ended")
            if self._crash.done():
                raise TabFailed(CRASHED)

    async def _read(self, max_chars: int) -> dict[str, Any]:
        # In a world of its own: a page cannot put its own functions in the place of those that are used here.
        world = await self._call("Page.createIsolatedWorld", frameId=self._state.frame)
        result = await self._call(
            "Runtime.evaluate",
            expression=_READ.replace("LIMIT", str(max_chars)),
            contextId=world["executionContextId"],
            returnByValue=True,
        )
        if "exceptionDetails" in result:
            raise TabFailed("the page could not be read")
        value: dict[str, Any] = result["result"]["value"]
        return value

    async def _call(self, method: str, **params: Any) -> dict[str, Any]:
        """A call that the page itself has to answer."""
        answer = self._connection.send(method, self._session, **params)
        either: set[asyncio.Future[Any]] = {answer, self._crash}
        await asyncio.wait(either, timeout=CALL_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if self._connection.gone:
            raise BrowserGone("the browser has ended")
        if self._crash.done():
            raise TabFailed(CRASHED)
        if not answer.done():
            self._connection.send("Runtime.terminateExecution", self._session)  # so that the page can be closed
            raise TabStuck("the page's scripts never end")
        return answer.result()

    # Events. Handlers only note what happened and send answers; nothing here waits.

    def _on_event(self, method: str, params: dict[str, Any]) -> None:
        handler = _HANDLERS.get(method)
        if handler is not None:
            handler(self, params)

    def _change(self) -> None:
        self._state.last_change = time.monotonic()
        self._changed.set()

    def _on_request(self, params: dict[str, Any]) -> None:
        kind = params.get("type")
        if kind in AWAITED or (kind == "Document" and params.get("frameId") == self._state.frame):
            self._state.running.add(params["requestId"])
            self._change()

    def _on_request_over(self, params: dict[str, Any]) -> None:
        if params["requestId"] in self._state.running:
            self._state.running.discard(params["requestId"])
            self._change()

    def _on_response(self, params: dict[str, Any]) -> None:
        if params.get("type") == "Document" and params.get("frameId") == self._state.frame:
            response = params["response"]
            if response["status"] == 204:  # a page that was not let go
                return
            self._state.status = int(response["status"])
            kind = str(response.get("mimeType", "")).lower()
            if kind not in ("text/html", "application/xhtml+xml", "") and len(self._state.navigations) > 1:
                self._state.elsewhere = response["url"]

    def _on_paused(self, params: dict[str, Any]) -> None:
        if params["resourceType"] != "Document":
            self._answer("Fetch.failRequest", requestId=params["requestId"], errorReason="BlockedByClient")
            return
        main = params["frameId"] == self._state.frame
        if main and self._document is not None:
            document, self._document = self._document, None
            self._state.navigations.append(document.url)
            headers = [{"name": name, "value": value} for name, value in document.headers.items()]
            self._answer(
                "Fetch.fulfillRequest",
                requestId=params["requestId"],
                responseCode=document.status,
                responseHeaders=headers,
                body=base64.b64encode(document.body).decode(),
            )
            return
        task = asyncio.create_task(self._decide(params["requestId"], params["request"], main=main))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _decide(self, request_id: str, request: dict[str, Any], *, main: bool) -> None:
        url = str(request["url"])
        assert self._allowed is not None
        allowed = not main or (request["method"] == "GET" and len(self._state.navigations) <= MAX_NAVIGATIONS)
        if allowed:
            try:
                allowed = await asyncio.wait_for(self._allowed(url), CALL_TIMEOUT_S)
            except TimeoutError:
                allowed = False
        if not allowed:  # "no content": the page stays where it is
            self._state.refused = self._state.refused or main
            self._change()
            self._answer("Fetch.fulfillRequest", requestId=request_id, responseCode=204)
            return
        if main:
            self._state.navigations.append(url)
        self._answer("Fetch.continueRequest", requestId=request_id)

    def _on_dialog(self, params: dict[str, Any]) -> None:
        # Leaving is agreed to, everything else is declined.
        self._answer("Page.handleJavaScriptDialog", accept=params.get("type") == "beforeunload")

    def _on_navigated(self, params: dict[str, Any]) -> None:
        frame = params["frame"]
        if frame["id"] == self._state.frame:
            if frame["url"] == "about:blank":  # the page before; or the page left, and there is nothing more to read
                self._state.refused = self._state.committed
                self._state.committed = self._state.parsed = False
                self._blank.set()
                self._change()
                return
            self._state.committed = True
            self._state.parsed = False
            self._state.running.clear()
            self._state.unreachable = bool(frame.get("unreachableUrl"))
            self._change()

    def _on_parsed(self, params: dict[str, Any]) -> None:
        if self._state.committed:
            self._state.parsed = True
            self._change()

    def _on_crash(self, params: dict[str, Any]) -> None:
        if not self._crash.done():
            self._crash.set_result(None)
        self._change()

    def _answer(self, method: str, **params: Any) -> None:
        session = "" if method.startswith("Target.") else self._session
        with suppress(BrowserGone):
            self._connection.send(method, session, **params)


_HANDLERS: dict[str, Callable[[Tab, dict[str, Any]], None]] = {
    "Fetch.requestPaused": Tab._on_paused,
    "Inspector.targetCrashed": Tab._on_crash,
    "Inspector.detached": Tab._on_crash,
    "Network.loadingFailed": Tab._on_request_over,
    "Network.loadingFinished": Tab._on_request_over,
    "Network.requestWillBeSent": Tab._on_request,
    "Network.responseReceived": Tab._on_response,
    "Page.domContentEventFired": Tab._on_parsed,
    "Page.frameNavigated": Tab._on_navigated,
    "Page.javascriptDialogOpening": Tab._on_dialog,
}
