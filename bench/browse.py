"""Pages a second, and CPU a page, of browsing with the guard on, beside plain crawl4ai on the same pages.

    python -m bench.browse [--pages 200] [--ways ours,http,plain,isolated,replay]

A site on loopback serves small pages, half of which fetch their content by JavaScript. `plain` is crawl4ai as its
documentation has it, over CDP on the same Chromium with the flags that crawl4ai itself would give it; `isolated` is the
same with a context of its own a call. CPU is that of the measuring process and all its children, without the site.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tools.chromium import family, find_chromium

AT_ONCE = (1, 8)
WARM_UP = 8
ROWS = "".join(f"<tr><td>Arm {n}</td><td>{n * 7} patients</td></tr>" for n in range(30))
TEXT = "".join(f"<p>Finding {n}: the response in arm {n % 5} was {n * 3 % 100} percent.</p>" for n in range(40))
Fetch = Callable[[str], Awaitable[str]]


def serve(port: int) -> None:
    """The site, in a process of its own."""
    from aiohttp import web

    async def page(request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        body = f"<h1>Trial {number}</h1><table>{ROWS}</table>{TEXT}<a href=/p/{number + 1}>next</a>"
        if number % 2:
            script = f"fetch('/d/{number}').then(r => r.json()).then(d => x.textContent = d.answer)"
            return web.Response(text=f"{body}<p id=x></p><script>{script}</script>", content_type="text/html")
        return web.Response(text=f"{body}<p>answer-{number}</p>", content_type="text/html")

    async def data(request: web.Request) -> web.Response:
        return web.json_response({"answer": f"answer-{request.match_info['number']}"})

    app = web.Application()
    app.router.add_get("/p/{number}", page)
    app.router.add_get("/d/{number}", data)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


@asynccontextmanager
async def ours(site: str, engine: str) -> AsyncIterator[Callable[[], Fetch]]:
    """A session a worker, as episodes have."""
    from tools.crawl import CrawlSettings, Session, close_all
    from tools.guard import Guard
    from tools.rate import HostRate

    guard = Guard(open_addresses=(site.removeprefix("http://"),))
    rate = HostRate(default_per_minute=math.inf)
    settings = CrawlSettings(guard=guard, user_agent="bench/1", engine=engine, robots=False, rate=rate)  # type: ignore[arg-type]

    def reader() -> Fetch:
        session = Session(settings)

        async def fetch(url: str) -> str:
            return (await session.fetch(url)).text or ""

        return fetch

    yield reader
    await close_all()


@asynccontextmanager
async def crawl4ai(site: str, isolated: bool) -> AsyncIterator[Callable[[], Fetch]]:
    from crawl4ai import AsyncWebCrawler, BrowserConfig, CacheMode, CrawlerRunConfig
    from crawl4ai.browser_manager import ManagedBrowser

    port = _free_port()
    folder = tempfile.TemporaryDirectory()
    flags = ManagedBrowser.build_browser_flags(BrowserConfig())
    command = [str(find_chromium()), *flags, f"--remote-debugging-port={port}", f"--user-data-dir={folder.name}"]
    command += ["--headless=new", "--no-sandbox", "--disable-component-update", "about:blank"]
    chromium = subprocess.Popen(  # noqa: ASYNC220
        command, stderr=subprocess.DEVNULL, start_new_session=True
    )
    cdp = f"http://127.0.0.1:{port}"
    for _ in range(200):
        with suppress(OSError):
            urllib.request.urlopen(f"{cdp}/json/version", timeout=1).read()  # noqa: ASYNC210
            break
        await asyncio.sleep(0.1)
    browser = BrowserConfig(cdp_url=cdp, verbose=False, create_isolated_context=isolated)
    run = CrawlerRunConfig(cache_mode=CacheMode.BYPASS, verbose=False, page_timeout=20_000)
    crawler = AsyncWebCrawler(config=browser)
    await crawler.start()

    async def fetch(url: str) -> str:
        return str((await crawler.arun(url, config=run)).markdown or "")

    yield lambda: fetch
    with suppress(Exception):
        await asyncio.wait_for(crawler.close(), 20)
    for pid in reversed(family(chromium.pid)):
        with suppress(ProcessLookupError):
            os.kill(pid, 9)
    chromium.wait()
    with suppress(OSError):
        folder.cleanup()


@asynccontextmanager
async def replay(site: str, pages: int) -> AsyncIterator[Callable[[], Fetch]]:
    """Pages of a store, as the tools read them."""
    from tools.pages import Page
    from tools.store import PageStore

    stored = [Page(url=f"{site}/p/{n}", body="", text=f"answer-{n}\n" + "text " * 2000) for n in range(pages + WARM_UP)]
    store = PageStore(stored, "replay")

    async def never(url: str) -> Page:
        raise RuntimeError("a replay fetches nothing")

    async def fetch(url: str) -> str:
        return (await store.get(url, never)).text or ""

    yield lambda: fetch


async def measure(reader: Callable[[], Fetch], site: str, pages: int, at_once: int) -> dict[str, Any]:
    """Reads the pages with `at_once` readers. A page is lost if its answer is not in its text, for whatever reason."""
    numbers = iter(range(pages))
    lost = 0

    async def read() -> None:
        nonlocal lost
        fetch = reader()
        for number in numbers:
            try:
                text = await asyncio.wait_for(fetch(f"{site}/p/{number}"), 60)
            except Exception as error:
                print(f"lost {number}: {str(error)[:200]!r}", file=sys.stderr)
                text = ""
            lost += f"answer-{number}" not in text

    fetch = reader()
    await asyncio.gather(*(fetch(f"{site}/p/{pages + n}") for n in range(WARM_UP)), return_exceptions=True)
    cpu, began = _cpu_s(), time.perf_counter()
    await asyncio.gather(*(read() for _ in range(at_once)))
    seconds = time.perf_counter() - began
    return {"pages_s": pages / seconds, "cpu_ms": (_cpu_s() - cpu) / pages * 1000, "lost": lost}


def _cpu_s() -> float:
    """Of this process and its descendants, those that ended included."""
    ticks = 0
    for pid in family(os.getpid()):
        if pid in _not_counted:
            continue
        with suppress(OSError):
            ticks += sum(int(part) for part in Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


_not_counted: set[int] = set()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def main(pages: int, ways: list[str]) -> None:
    port = _free_port()
    site = f"http://127.0.0.1:{port}"
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(port,), daemon=True)
    server.start()
    assert server.pid is not None
    _not_counted.add(server.pid)
    for _ in range(100):
        with suppress(OSError):
            urllib.request.urlopen(f"{site}/p/0", timeout=1).read()  # noqa: ASYNC210
            break
        await asyncio.sleep(0.1)
    made: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(site, "browser"),
        "http": lambda: ours(site, "http"),
        "plain": lambda: crawl4ai(site, isolated=False),
        "isolated": lambda: crawl4ai(site, isolated=True),
        "replay": lambda: replay(site, pages),
    }
    result: dict[str, Any] = {"pages": pages}
    print("| way | at once | pages/s | CPU ms a page | lost |\n|---|---|---|---|---|")
    for way in ways:
        for at_once in AT_ONCE:
            async with made[way]() as reader:
                row = result[f"{way}_{at_once}"] = await measure(reader, site, pages, at_once)
            print(f"| {way} | {at_once} | {row['pages_s']:.1f} | {row['cpu_ms']:.0f} | {row['lost']} |", flush=True)
    server.terminate()
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--ways", default="ours,http,plain,isolated,replay")
    given = parser.parse_args()
    asyncio.run(main(given.pages, given.ways.split(",")))
