"""Pages of the web, read as a person's browser would show them: `Session.fetch(url)` gives a `Page`.

    session = Session(CrawlSettings(guard=Guard(), user_agent="distill-gym/0.1 (+you@example.org)"))
    page = await session.fetch("https://clinicaltrials.gov/study/NCT02294461")
    await session.aclose()

Each document is got by `tools.fetch`, with the guard, robots.txt, rates and limits. HTML that was answered with success
is then run in Chromium (`tools.browser`), whose further requests go through `tools.proxy`, which has the same guard;
the document as it then stands is turned into text by crawl4ai (`tools.text`). With engine `http` no browser is started
and HTML is read as it was sent. A refusal (403, 429, 503) is respected: no browser is sent after it.

Browser, proxy and converter are shared by the sessions of an event loop that have equal settings, and end when no
session has used them for `IDLE_S`. A session has cookies and storage of its own.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal
from weakref import WeakKeyDictionary

from tools.browser import Browser, BrowserContext, BrowserSettings
from tools.cdp import BrowserGone
from tools.chromium import BrowserFailed, BrowserMissing, Census, find_chromium
from tools.fetch import Fetched, FetchLimits, HttpClient
from tools.guard import Guard
from tools.pages import KEPT_HEADERS, Page
from tools.proxy import Proxy
from tools.rate import HostRate
from tools.tab import Document, Rendered, TabFailed, TabStuck
from tools.text import HTML_TYPES, PDF_TYPES, Converter, decode, is_text
from tools.types import ToolErrorKind, ToolFailure

logger = logging.getLogger(__name__)
Engine = Literal["auto", "browser", "http"]
IDLE_S = 20.0
PASSED_HEADERS = ("content-type", "content-language", "content-security-policy", "last-modified", "refresh")
"""What of a document's headers the browser gets; the others have done their work (encoding, length, caching)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrawlSettings:
    guard: Guard
    user_agent: str
    """Who asks, with a way to reach them."""
    engine: Engine = "auto"
    """`auto`: the browser if one is installed."""
    executable: str | None = None
    """The browser's program; None: found."""
    limits: FetchLimits = field(default_factory=FetchLimits)
    robots: bool = True
    rate: HostRate | None = None
    timeout_s: float = 45.0
    """Of a whole fetch: waiting for the host's turn and for a free tab, loading, running and reading."""
    settle_s: float = 5.0
    """How long a page may go on loading before it is read as it stands."""
    max_tabs: int = 8
    max_chars: int = 5_000_000
    """Of a document after its scripts have run."""


class Crawler:
    """What sessions share. `Session` makes it; a program that is about to end calls `close_all`."""

    def __init__(self, settings: CrawlSettings) -> None:
        """
        Raises:
            BrowserMissing: engine `browser`, and there is none.
            tools.text.ConverterMissing: the extra `browse` is not installed.
        """
        self.settings = settings
        self.sessions = 0
        self.converter = Converter()
        self.client = HttpClient(
            settings.guard,
            user_agent=settings.user_agent,
            limits=settings.limits,
            robots=settings.robots,
            rate=settings.rate,
        )
        self.browser: Browser | None = None
        self.proxy: Proxy | None = None
        self._executable = None
        if settings.engine != "http":
            try:
                self._executable = find_chromium(settings.executable)
            except BrowserMissing as missing:
                if settings.engine == "browser" or settings.executable is not None:
                    raise
                logger.warning("pages are read without running their scripts: %s", missing)
        self._ready: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None

    async def ready(self) -> None:
        """Starts the proxy, once. The browser itself starts with the first page."""
        if self._executable is None:
            return
        if self._ready is None:
            self._ready = asyncio.create_task(self._start())
        await asyncio.shield(self._ready)

    async def _start(self) -> None:
        assert self._executable is not None
        self.proxy = Proxy(self.settings.guard)
        await self.proxy.start()
        self.browser = Browser(
            BrowserSettings(
                executable=self._executable,
                proxy=self.proxy.url,
                user_agent=self.settings.user_agent,
                max_tabs=self.settings.max_tabs,
            )
        )

    async def census(self) -> Census | None:
        """Of the browser; None without one."""
        return None if self.browser is None else await self.browser.census()

    def release(self) -> None:
        """One session less. With the last one, the end comes after `IDLE_S` without another."""
        self.sessions -= 1
        if self.sessions == 0:
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(IDLE_S, lambda: loop.create_task(self._end_if_idle()))

    async def _end_if_idle(self) -> None:
        if self.sessions == 0:
            await self.aclose()

    async def aclose(self) -> None:
        """Ends the browser, the proxy and the converter. Idempotent."""
        if self._idle is not None:
            self._idle.cancel()
        shared = _crawlers.get(asyncio.get_running_loop(), {})
        if shared.get(self.settings) is self:
            del shared[self.settings]
        if self._ready is not None:
            await asyncio.wait({self._ready})
        if self.browser is not None:
            await self.browser.aclose()
        if self.proxy is not None:
            await self.proxy.aclose()
        await self.client.aclose()
        await self.converter.aclose()


_crawlers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[CrawlSettings, Crawler]] = WeakKeyDictionary()


def shared_crawler(settings: CrawlSettings) -> Crawler:
    """The one of this event loop with these settings."""
    crawlers = _crawlers.setdefault(asyncio.get_running_loop(), {})
    if settings not in crawlers:
        crawlers[settings] = Crawler(settings)
    return crawlers[settings]


async def close_all() -> None:
    """Ends every browser, proxy and converter of this event loop at once."""
    for crawler in list(_crawlers.get(asyncio.get_running_loop(), {}).values()):
        await crawler.aclose()


class Session:
    """One reader: an episode, with cookies and storage of its own. Pages may be fetched at once."""

    def __init__(self, settings: CrawlSettings) -> None:
        self.settings = settings
        self._crawler: Crawler | None = None
        self._context: BrowserContext | None = None

    async def fetch(self, url: str) -> Page:
        """The page at `url`, with its text.

        Raises:
            ToolFailure: it cannot be had, in words for the model: `blocked`, `timeout`, `not_found`, `execution` or
                `invalid_arguments`. Answers of 400 and more are no failures but pages.
            BrowserMissing, tools.text.ConverterMissing: what the settings ask for is not installed.
        """
        if self._crawler is None:
            self._crawler = shared_crawler(self.settings)
            self._crawler.sessions += 1
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                return await self._fetch(self._crawler, url)
        except TimeoutError:
            message = f"the page was not there within {self.settings.timeout_s:g} seconds"
            raise ToolFailure(message, ToolErrorKind.TIMEOUT) from None

    async def _fetch(self, crawler: Crawler, url: str) -> Page:
        await crawler.ready()
        fetched = await crawler.client.get(url)
        hops = fetched.hops
        body: bytes | str = fetched.body
        title, final_url, status = "", fetched.final_url, fetched.status
        if crawler.browser is not None and fetched.content_type in HTML_TYPES and fetched.status < 400:
            rendered = await self._render(crawler.browser, fetched)
            hops += rendered.hops
            if rendered.elsewhere is None and rendered.whole:
                body, title, final_url, status = rendered.html, rendered.title, rendered.url, rendered.status
            elif rendered.elsewhere is not None:
                fetched = await crawler.client.get(rendered.elsewhere)
                hops += fetched.hops
                body, final_url, status = fetched.body, fetched.final_url, fetched.status
        kind = fetched.content_type
        content = await crawler.converter.convert(body, kind, charset=fetched.charset, url=final_url)
        if isinstance(body, bytes):
            is_pdf = kind in PDF_TYPES or not is_text(kind)
            body = "" if is_pdf else decode(body, fetched.charset, html=kind in HTML_TYPES)
        return Page(
            url=url,
            body=body.encode("utf-8", "replace").decode(),
            status=status,
            final_url=final_url,
            content_type=kind,
            fetched_at=datetime.now(UTC).isoformat(timespec="seconds"),
            text=content.text,
            title=content.title or title,
            headers={name: value for name, value in fetched.headers.items() if name in KEPT_HEADERS},
            hops=hops,
        )

    async def _render(self, browser: Browser, fetched: Fetched) -> Rendered:
        if self._context is None:
            self._context = browser.context()
        document = Document(
            url=fetched.final_url,
            status=fetched.status,
            headers={name: value for name, value in fetched.headers.items() if name in PASSED_HEADERS},
            body=fetched.body,
        )
        settings = self.settings
        try:
            async with browser.tab(self._context) as tab:
                return await tab.render(
                    document, allowed=self._may_open, settle_s=settings.settle_s, max_chars=settings.max_chars
                )
        except TabStuck as error:
            raise ToolFailure(str(error), ToolErrorKind.TIMEOUT) from None
        except TabFailed as error:
            raise ToolFailure(str(error)) from None
        except BrowserGone:
            raise ToolFailure("the browser broke off while it read the page; another try may do") from None
        except BrowserFailed as error:
            logger.warning("%s", error)
            raise ToolFailure("the browser could not be started") from None

    async def _may_open(self, url: str) -> bool:
        """Whether a page may send the reader, or a frame of it, to `url`. The proxy asks again for each connection;
        what it cannot see is the path of an https URL, which a denied prefix may name."""
        try:
            await self.settings.guard.resolve(self.settings.guard.check_url(url))
        except ToolFailure:
            return False
        return True

    async def reset(self) -> None:
        """Forgets cookies and storage, and closes what is open: the next episode starts."""
        context, self._context = self._context, None
        if context is not None:
            await context.aclose()

    async def aclose(self) -> None:
        """Idempotent."""
        await self.reset()
        crawler, self._crawler = self._crawler, None
        if crawler is not None:
            crawler.release()
