"""A browser whose proxy is the whole web: it answers each request itself, whatever its host is, and notes it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from tools.browser import Browser, BrowserContext, BrowserSettings
from tools.chromium import find_chromium
from tools.tab import Document, Rendered

Answer = Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]


@dataclass
class Web:
    """Everything that a page can reach."""

    url: str = ""
    answers: dict[str, Answer] = field(default_factory=dict)
    """By path; others are answered with 404."""
    hits: list[str] = field(default_factory=list)
    """METHOD HOST PATH of each request, CONNECT included."""
    agents: set[str] = field(default_factory=set)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.hits.append(f"{request.method} {request.host} {request.path}")
        self.agents.add(request.headers.get("User-Agent", ""))
        found = self.answers.get(request.path)
        return await found(request) if found else web.Response(status=404)


@pytest.fixture
async def world() -> AsyncIterator[Web]:
    site = Web()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", site.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    site.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield site
    await runner.cleanup()


Start = Callable[..., Browser]


@pytest.fixture
async def start(world: Web) -> AsyncIterator[Start]:
    """Makes browsers, and ends them after the test."""
    browsers: list[Browser] = []

    def made(**settings: Any) -> Browser:
        given = {"executable": find_chromium(), "proxy": world.url, "user_agent": "distill-gym-test/1"} | settings
        browsers.append(Browser(BrowserSettings(**given)))
        return browsers[-1]

    yield made
    for browser in browsers:
        await browser.aclose()


async def rendered(
    browser: Browser,
    context: BrowserContext,
    html: str,
    *,
    settle_s: float = 3.0,
    url: str = "http://site.example.com/p",
) -> Rendered:
    """A document run in a tab of its own."""
    document = Document(
        url=url, status=200, headers={"content-type": "text/html; charset=utf-8"}, body=html.encode("utf-8", "replace")
    )

    async def allowed(url: str) -> bool:
        return "forbidden" not in url

    async with browser.tab(context) as tab:
        return await tab.render(document, allowed=allowed, settle_s=settle_s, max_chars=1_000_000)
