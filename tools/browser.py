"""The browser of a process: one supervised Chromium that many episodes share, a context of its own for each.

    browser = Browser(BrowserSettings(executable=find_chromium(), proxy=proxy.url, user_agent="..."))
    context = browser.context()
    async with browser.tab(context) as tab:
        rendered = await tab.render(document, ...)
    await context.aclose()
    await browser.aclose()

Whatever happens to a caller (a deadline, a cancellation, a bug), the page it opened is closed by a task of its own. A
Chromium that crashed, has served its pages or holds too much memory is replaced: new pages open in a new one, and the
old one is ended when its last page is closed.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.cdp import BrowserGone, CallFailed
from tools.chromium import Census, Chromium, descriptors, private_mb
from tools.tab import CALL_TIMEOUT_S, Tab, TabFailed

logger = logging.getLogger(__name__)
WATCH_S = 0.5
CLOSE_TRIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BrowserSettings:
    executable: Path
    proxy: str
    """`http://127.0.0.1:PORT`: the way out of all that a page loads."""
    user_agent: str
    max_tabs: int = 8
    """Pages open at once; further ones wait."""
    max_pages: int = 1000
    """Pages after which a Chromium is replaced: what it leaks is bounded, whatever it is."""
    max_memory_mb: int = 3000
    """Private memory of all its processes at which a Chromium is replaced."""
    max_page_mb: int = 1000
    """Private memory at which one of its children is killed: a page that hoards."""


class _Generation:
    """One Chromium and what is known of its use."""

    def __init__(self, chromium: Chromium) -> None:
        self.chromium = chromium
        self.opened = 0
        self.open = 0
        self.retired = False
        self.ending: dict[str, asyncio.Future[None]] = {}
        """Targets that are being closed."""

    def ended(self, target: str) -> asyncio.Future[None]:
        """Done when the target is gone, or the browser."""
        return self.ending.setdefault(target, asyncio.get_running_loop().create_future())

    @property
    def fit(self) -> bool:
        return self.chromium.alive and not self.retired


class BrowserContext:
    """Cookies and storage of one episode. Exists in a Chromium from its first page on; after a replacement of that
    Chromium it starts empty in the next one."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._generation: _Generation | None = None
        self._id = ""
        self._lock = asyncio.Lock()
        self._closed = False
        self.idle: Tab | None = None
        """A tab that the next page may use: a new one costs a process, which takes far longer than most pages."""

    def keep(self, generation: _Generation, tab: Tab) -> bool:
        """Whether the tab is this context's idle one from now on."""
        if self._closed or self._generation is not generation or self.idle is not None:
            return False
        self.idle = tab
        return True

    async def _id_in(self, generation: _Generation) -> str:
        async with self._lock:
            if self._closed:
                raise RuntimeError("this browser context is closed")
            if self._generation is not generation:
                # The old one ends with its last page, which may be read even now.
                self.idle = None
                self._browser.forget(self)
                call = generation.chromium.connection
                created = await call.create(
                    "Target.createBrowserContext",
                    lambda late: _send(generation, "Target.disposeBrowserContext", **late),
                    timeout_s=CALL_TIMEOUT_S,
                    disposeOnDetach=True,
                )
                self._id = created["browserContextId"]
                self._generation = generation
                # Answers are not waited for: the calls are carried out in order.
                _send(generation, "Browser.setDownloadBehavior", behavior="deny", browserContextId=self._id)
                _send(generation, "Browser.grantPermissions", permissions=[], browserContextId=self._id)
            return self._id

    def _dispose(self) -> None:
        generation, self._generation = self._generation, None
        self.idle = None  # it goes with the context
        self._browser.forget(self)
        if generation is not None:
            self._browser.chore(self._browser.disposed(generation, self._id))

    async def aclose(self) -> None:
        """Removes it with its pages, cookies and storage. Idempotent; never raises for a browser that is gone."""
        self._closed = True
        self._dispose()


class Browser:
    """Starts, watches and replaces Chromium. Belongs to the event loop in which it is first used."""

    def __init__(self, settings: BrowserSettings) -> None:
        self.settings = settings
        self.starts = 0
        """Chromium processes started so far."""
        self._generation: _Generation | None = None
        self._others: set[_Generation] = set()
        self._idle: dict[BrowserContext, None] = {}
        """Contexts with an idle tab, the one that has been idle for longest first."""
        self._starting: asyncio.Task[_Generation] | None = None
        self._tabs = asyncio.Semaphore(settings.max_tabs)
        self._chores: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._closed = False

    def context(self) -> BrowserContext:
        return BrowserContext(self)

    @asynccontextmanager
    async def tab(self, context: BrowserContext) -> AsyncIterator[Tab]:
        """A new page, closed when the block is left, in whatever way.

        Raises:
            BrowserFailed: Chromium could not be started. BrowserGone, TabFailed: it could not open a page.
        """
        async with self._tabs:
            generation = await self._fit_generation()
            generation.open += 1
            generation.opened += 1
            target = ""
            tab: Tab | None = None
            try:
                context_id = await context._id_in(generation)
                connection = generation.chromium.connection
                tab = self._take_idle(context, generation)
                if tab is not None:
                    target = tab.target
                    yield tab
                    return
                created = await connection.create(
                    "Target.createTarget",
                    lambda late: _send(generation, "Target.closeTarget", **late),
                    timeout_s=CALL_TIMEOUT_S,
                    url="about:blank",
                    browserContextId=context_id,
                )
                target = created["targetId"]
                attached = await connection.call(
                    "Target.attachToTarget", targetId=target, flatten=True, timeout_s=CALL_TIMEOUT_S
                )
                tab = Tab(connection, target, attached["sessionId"])
                await tab.prepare()
                yield tab
            except (TimeoutError, CallFailed) as error:
                logger.warning("the browser opened no page (%r); it is replaced", error)
                self._retire(generation)
                raise TabFailed("the browser opened no page") from None
            finally:
                await asyncio.shield(self.chore(self._leave_tab(generation, context, target, tab)))

    async def _leave_tab(self, generation: _Generation, context: BrowserContext, target: str, tab: Tab | None) -> None:
        """Keeps the tab for the context's next page if all went well, else closes it."""
        if tab is not None and tab.reusable and generation.fit:
            with suppress(TimeoutError, CallFailed, BrowserGone, TabFailed):
                await tab.blank()
                if context.keep(generation, tab):
                    self._idle[context] = None
                    if len(self._idle) > self.settings.max_tabs:
                        self._close_idle(next(iter(self._idle)), generation)
                    self._done_with_page(generation)
                    return
        await self._close_tab(generation, target, tab)

    def _take_idle(self, context: BrowserContext, generation: _Generation) -> Tab | None:
        if context.idle is not None and not context.idle.crashed:
            tab, context.idle = context.idle, None
            del self._idle[context]
            return tab
        self._close_idle(context, generation)
        return None

    def _close_idle(self, context: BrowserContext, generation: _Generation) -> None:
        tab, context.idle = context.idle, None
        self._idle.pop(context, None)
        if tab is not None:
            generation.open += 1  # while it is being closed
            self.chore(self._close_tab(generation, tab.target, tab))

    async def _close_tab(self, generation: _Generation, target: str, tab: Tab | None) -> None:
        try:
            if tab is not None:
                tab.detach()
            if target:
                # The answer comes before the page is gone, and for a page that is stuck it never goes.
                connection, ended = generation.chromium.connection, generation.ended(target)
                for _ in range(CLOSE_TRIES):  # a navigation that commits meanwhile makes Chromium forget the first
                    await connection.call("Target.closeTarget", targetId=target, timeout_s=CALL_TIMEOUT_S)
                    await asyncio.wait({ended}, timeout=CALL_TIMEOUT_S / CLOSE_TRIES)
                    if ended.done():
                        break
                else:
                    raise TimeoutError
        except (CallFailed, BrowserGone):
            pass  # it is not there any more
        except TimeoutError:
            logger.warning("a page could not be closed; its browser is replaced")
            self._retire(generation)
        finally:
            generation.ending.pop(target, None)
            self._done_with_page(generation)

    def _done_with_page(self, generation: _Generation) -> None:
        generation.open -= 1
        self._end_if_done(generation)

    def forget(self, context: BrowserContext) -> None:
        """Its idle tab is gone."""
        self._idle.pop(context, None)

    async def disposed(self, generation: _Generation, context_id: str) -> None:
        """Removes a context."""
        with suppress(CallFailed, BrowserGone, TimeoutError):
            await generation.chromium.connection.call(
                "Target.disposeBrowserContext", browserContextId=context_id, timeout_s=CALL_TIMEOUT_S
            )

    async def _fit_generation(self) -> _Generation:
        current = self._generation
        if current is not None and current.opened >= self.settings.max_pages:
            self._retire(current)
        if current is not None and current.fit:
            return current
        if self._closed:
            raise RuntimeError("this browser is closed")
        if self._starting is None:
            # A task of its own: a caller that is cancelled meanwhile leaves a browser for the next one.
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(self._started)
        return await asyncio.shield(self._starting)

    async def _start(self) -> _Generation:
        if self._generation is not None:
            self._retire(self._generation)
        settings = self.settings
        chromium = Chromium(settings.executable, settings.proxy, settings.user_agent)
        self.starts += 1
        await chromium.start()
        generation = _Generation(chromium)
        chromium.connection.handlers[""] = lambda method, params: _on_event(generation, method, params)
        _send(generation, "Target.setDiscoverTargets", discover=True)
        _send(generation, "Browser.setDownloadBehavior", behavior="deny")
        if self._closed:
            await chromium.aclose()
            raise BrowserGone("the browser was closed while it started")
        self._generation = generation
        if self._watch is None:
            self._watch = asyncio.create_task(self._watch_memory())
        return generation

    def _started(self, task: asyncio.Task[_Generation]) -> None:
        self._starting = None
        if not task.cancelled():
            task.exception()  # whoever waits hears of it

    def _retire(self, generation: _Generation) -> None:
        """No new pages; ended with its last one, or at once if it is dead."""
        if not generation.retired:
            generation.retired = True
            self._others.add(generation)
            if self._generation is generation:
                self._generation = None
            self._end_if_done(generation)

    def _end_if_done(self, generation: _Generation) -> None:
        if generation in self._others and (generation.open == 0 or not generation.chromium.alive):
            self._others.discard(generation)
            self.chore(generation.chromium.aclose())

    async def _watch_memory(self) -> None:
        """Kills a child that holds more than `max_page_mb`, replaces a Chromium that holds more than `max_memory_mb` or
        that ended."""
        while True:
            await asyncio.sleep(WATCH_S)
            for generation in [*self._others, *([self._generation] if self._generation else [])]:
                if not generation.chromium.alive:
                    self._retire(generation)
                elif generation.open:
                    self._check_memory(generation)

    def _check_memory(self, generation: _Generation) -> None:
        total = 0.0
        for number, pid in enumerate(generation.chromium.processes()):
            held = private_mb(pid)
            total += held
            if held > self.settings.max_page_mb:
                logger.warning("a page held %.0f MB and was ended", held)
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
                if number < 2:  # the keeper or the browser itself
                    self._retire(generation)
        if total > self.settings.max_memory_mb:
            logger.warning("the browser held %.0f MB and is replaced", total)
            self._retire(generation)

    def chore(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs to its end whatever becomes of the caller; `aclose` waits for it."""
        task = asyncio.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)
        return task

    async def census(self) -> Census:
        """Of the Chromium that takes new pages, once no page is being closed; zeros if none runs."""
        while self._chores:
            await asyncio.wait(self._chores)
        if self._generation is None or not self._generation.chromium.alive:
            return Census(processes=0, targets=0, contexts=0, descriptors=descriptors(), private_mb=0.0)
        return await self._generation.chromium.census()

    async def aclose(self) -> None:
        """Ends every process of it. Idempotent."""
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._starting is not None:
            await asyncio.wait({self._starting})
        generations = {*self._others, *([self._generation] if self._generation else [])}
        self._others.clear()
        self._generation = None
        for generation in generations:
            self.chore(generation.chromium.aclose())
        while self._chores:
            await asyncio.wait(self._chores)


def _on_event(generation: _Generation, method: str, params: dict[str, Any]) -> None:
    if method == "Target.targetCreated":
        target = params["targetInfo"]
        # A window that a page opened, and what outlives a page: nobody reads them.
        if target.get("openerId") or target["type"] in ("service_worker", "shared_worker"):
            _send(generation, "Target.closeTarget", targetId=target["targetId"])
    elif method in ("Target.targetDestroyed", "Inspector.detached"):
        gone = [params["targetId"]] if params else list(generation.ending)
        for name in gone:
            if (ended := generation.ending.get(name)) is not None and not ended.done():
                ended.set_result(None)


def _send(generation: _Generation, method: str, **params: Any) -> None:
    with suppress(BrowserGone):
        generation.chromium.connection.send(method, **params)
