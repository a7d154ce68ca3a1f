"""Pages in real Chromium: what is read, what is not let through, what is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from aiohttp import web

from tests.browser.conftest import Start, Web, rendered
from tools.cdp import BrowserGone
from tools.chromium import BrowserFailed, BrowserMissing, family, find_chromium
from tools.tab import TabFailed, TabStuck

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]
FETCHES = """<title>A page</title><p id=x>waiting</p><script>
fetch('/data').then(r => r.json()).then(d => { x.textContent = d.answer })</script>"""


async def data(request: web.Request) -> web.Response:
    return web.json_response({"answer": "forty-two"})


async def never(request: web.Request) -> web.Response:
    await asyncio.sleep(60)
    return web.Response()


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


async def gone(pids: list[int], within_s: float = 5.0) -> list[int]:
    """Those that still live when the time is up."""
    for _ in range(round(within_s / 0.05)):
        if not any(map(family, pids)):
            return []
        await asyncio.sleep(0.05)
    return [pid for pid in pids if family(pid)]


async def test_a_page_is_read_after_its_scripts_have_run(start: Start, world: Web) -> None:
    world.answers["/data"] = data
    browser = start()
    page = await rendered(browser, browser.context(), FETCHES + "<img src=/i.png><link rel=icon href=/icon.png>é")
    assert '<p id="x">forty-two</p>' in page.html
    assert "é" in page.html
    assert (page.title, page.url, page.status, page.hops, page.quiet) == (
        "A page",
        "http://site.example.com/p",
        200,
        (),
        True,
    )
    assert world.hits == ["GET site.example.com /data"], "neither pictures nor icons, nor anything of the browser's own"
    assert world.agents == {"distill-gym-test/1"}


async def test_contexts_share_no_cookies(start: Start) -> None:
    browser = start()
    first, second = browser.context(), browser.context()
    write = "<p id=x></p><script>document.cookie='a=1; max-age=1000'; x.textContent=document.cookie</script>"
    read = "<p id=x></p><script>x.textContent='[' + document.cookie + ']'</script>"
    assert '<p id="x">a=1</p>' in (await rendered(browser, first, write)).html
    assert "[a=1]</p>" in (await rendered(browser, first, read)).html
    assert "[]</p>" in (await rendered(browser, second, read)).html
    await first.aclose()
    await second.aclose()
    assert (await browser.census()).contexts == 0


NUISANCES = {
    "alert": "<p>text</p><script>alert(1); confirm(2); prompt(3)</script>",
    "print": "<p>text</p><script>print()</script>",
    "timers": "<p>text</p><script>setInterval(() => document.body.append('x'), 1)</script>",
    "scroll": "<p>text</p><script>onscroll = () => document.body.append('x'); setInterval(scrollBy, 5, 0, 9)</script>",
    "windows": "<p>text</p><script>for (let i = 0; i < 5; i++) window.open('/popup' + i)</script>",
    "download": "<p>text</p><a id=a download=f href='data:text/x,x'>text</a><script>a.click()</script>",
    "leaving": "<p>text</p><script>onbeforeunload = e => { e.preventDefault(); return 'stay' }</script>",
    "nested": "<p>text</p>" + "<div>" * 100_000,
    "vector": "<p>text</p><svg>" + "<path d='M0 0L1 1'/>" * 20_000 + "</svg>",
    "unfinished": "<p>text<script>",
    "own functions": "<p>text</p><script>Object.defineProperty(Element.prototype, 'outerHTML', {get: () => 'forged'});"
    "JSON.stringify = () => 'forged'</script>",
    "workers": "<p>text</p><script>new SharedWorker('/w.js'); navigator.serviceWorker?.register('/w.js')</script>",
    "permissions": "<p>text</p><script>navigator.geolocation.getCurrentPosition(() => 0);"
    "Notification.requestPermission()</script>",
    "fullscreen": "<p>text</p><script>document.documentElement.requestFullscreen()</script>",
}


async def test_pages_that_are_a_nuisance_are_read_and_closed(start: Start) -> None:
    browser = start()
    context = browser.context()
    for name, html in NUISANCES.items():
        page = await rendered(browser, context, html, settle_s=2.0)
        assert "<p>text" in page.html, name
        assert "forged" not in page.html.replace("'forged'", ""), name
    await context.aclose()
    await asyncio.sleep(0.3)  # windows that were opened late are closed late
    census = await browser.census()
    assert (census.targets, census.contexts, browser.starts) == (0, 0, 1)


async def test_a_page_sends_the_reader_elsewhere_so_often_and_not_everywhere(start: Start, world: Web) -> None:
    async def again(request: web.Request) -> web.Response:
        return web.Response(
            text="<p>again</p><script>location = '/again?' + Math.random()</script>", content_type="text/html"
        )

    async def there(request: web.Request) -> web.Response:
        return web.Response(text="<p>there</p>", content_type="text/html")

    async def file(request: web.Request) -> web.Response:
        return web.Response(body=b"%PDF-1.4", content_type="application/pdf")

    world.answers |= {"/again": again, "/there": there, "/f.pdf": file}
    browser = start()
    context = browser.context()
    page = await rendered(browser, context, "<meta http-equiv=refresh content='0;url=/there'>here")
    assert ("there" in page.html, page.url, page.hops) == (
        True,
        "http://site.example.com/there",
        ("http://site.example.com/there",),
    )
    page = await rendered(browser, context, "<script>location = 'http://forbidden.example.com/'</script><p>here</p>")
    assert (page.whole, page.status, page.hops, page.url) == (False, 200, (), "http://site.example.com/p")
    page = await rendered(browser, context, "<p>here</p><script>location = '/again'</script>")
    assert ("again" in page.html, len(page.hops)) == (True, 5)
    page = await rendered(browser, context, "<p>here</p><script>location = '/f.pdf'</script>")
    assert page.elsewhere == "http://site.example.com/f.pdf"
    for place in ("file:///etc/passwd", "chrome://version", "data:text/html,there", "about:blank"):
        page = await rendered(browser, context, f"<p>here</p><script>onload = () => location = '{place}'</script>")
        assert "here" in page.html or page.url == "about:blank", place
    assert not any("forbidden" in hit for hit in world.hits)


async def test_a_tab_is_used_again_and_nothing_of_the_last_page_goes_on(start: Start, world: Web) -> None:
    browser = start()
    context = browser.context()
    ticking = "<p>one</p><script>window.mark = 1; setInterval(() => fetch('/tick'), 20)</script>"
    await rendered(browser, context, "<p>warm</p><script>window.mark = 1; onunload = () => fetch('/unload')</script>")
    assert context.idle is not None
    used = context.idle.target
    page = await rendered(browser, context, "<p id=x></p><script>x.textContent = String(window.mark)</script>")
    assert ("undefined</p>" in page.html, context.idle.target) == (True, used)
    await rendered(browser, context, ticking, settle_s=1.0)
    await asyncio.sleep(0.3)
    ticks = len(world.hits)
    await asyncio.sleep(0.3)
    assert len(world.hits) == ticks
    many = [browser.context() for _ in range(browser.settings.max_tabs + 3)]
    for other in many:
        await rendered(browser, other, "x")
    assert (await browser.census()).targets <= browser.settings.max_tabs


async def test_a_script_without_an_end_costs_its_page_alone(start: Start) -> None:
    browser = start()
    context = browser.context()
    began = time.monotonic()
    with pytest.raises(TabStuck, match="never end"):
        await rendered(browser, context, "text<script>while (true);</script>", settle_s=0.5)
    assert time.monotonic() - began < 12
    assert "fine" in (await rendered(browser, context, "fine")).html
    assert (await browser.census()).targets == 1, "the one that the context's next page uses"


async def test_a_page_that_hoards_memory_is_ended(start: Start, world: Web) -> None:
    world.answers["/never"] = never
    browser = start(max_page_mb=300)
    hoard = """text<script>const held = []; fetch('/never');
    setInterval(() => held.push(new Array(2e6).fill(1.5)), 20)</script>"""
    with pytest.raises(TabFailed, match="memory"):
        await rendered(browser, browser.context(), hoard, settle_s=20.0)
    assert "fine" in (await rendered(browser, browser.context(), "fine")).html


async def test_a_browser_that_has_served_its_pages_is_replaced(start: Start) -> None:
    browser = start(max_pages=5)
    context = browser.context()
    pages = await asyncio.gather(*(rendered(browser, context, f"page {number}") for number in range(12)))
    assert [f"page {number}" in page.html for number, page in enumerate(pages)] == [True] * 12
    assert browser.starts == 2
    await context.aclose()
    assert (await browser.census()).targets == 0


async def test_a_killed_browser_costs_the_pages_that_were_open(start: Start, world: Web) -> None:
    world.answers["/never"] = never
    browser = start()
    context = browser.context()
    await rendered(browser, context, "warm")
    for number in range(1, 4):
        assert browser._generation is not None
        pids = browser._generation.chromium.processes()
        reading = asyncio.create_task(rendered(browser, context, "x<script src=/never></script>", settle_s=30.0))
        await asyncio.sleep(0.5)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises((BrowserGone, TabFailed)):
            await asyncio.wait_for(reading, 10)
        assert "fine" in (await rendered(browser, context, "fine")).html
        assert browser.starts == number + 1, "one start a fault"
        assert await gone(pids) == []


async def test_a_stopped_renderer_is_got_rid_of(start: Start, world: Web) -> None:
    world.answers["/never"] = never
    browser = start()
    context = browser.context()
    await rendered(browser, context, "warm")
    assert browser._generation is not None
    before = set(browser._generation.chromium.processes())

    async def stop_new_ones() -> None:
        await asyncio.sleep(0.4)
        assert browser._generation is not None
        for pid in browser._generation.chromium.processes():
            if "--type=renderer" in command(pid):
                os.kill(pid, signal.SIGSTOP)

    stopping = asyncio.create_task(stop_new_ones())
    with pytest.raises((TabStuck, TabFailed)):
        await rendered(browser, context, "x<script>fetch('/never')</script>", settle_s=2.0)
    await stopping
    with suppress(TabFailed):  # the renderer that Chromium keeps in reserve was stopped as well
        await rendered(browser, context, "fine")
    assert "fine" in (await rendered(browser, context, "fine")).html
    assert browser.starts <= 2
    await browser.aclose()
    assert await gone(list(before)) == []


async def test_without_descriptors_there_is_an_error_and_later_a_browser(start: Start) -> None:
    browser = start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 2, hard))
    try:
        with pytest.raises(BrowserFailed, match="Too many open files"):
            await rendered(browser, browser.context(), "x")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "fine" in (await rendered(browser, browser.context(), "fine")).html


async def test_two_hundred_calls_cancelled_at_random_leave_nothing(start: Start, world: Web) -> None:
    world.answers["/data"] = data
    browser = start()
    context = browser.context()
    await asyncio.gather(*(rendered(browser, context, FETCHES) for _ in range(8)))
    before = await browser.census()
    rng = random.Random(1)
    contexts = [browser.context() for _ in range(8)]

    async def one(number: int) -> str:
        await asyncio.sleep(rng.random() * 0.02)
        try:
            await asyncio.wait_for(rendered(browser, contexts[number % 8], FETCHES), rng.random() * 0.6)
        except TimeoutError:
            return "cancelled"
        return "read"

    outcomes: list[str] = []
    for begin in range(0, 200, 20):
        outcomes += await asyncio.gather(*(one(begin + number) for number in range(20)))
    for used in contexts:
        await used.aclose()
    for _ in range(50):  # renderers take a moment to end
        after = await browser.census()
        if after.processes <= before.processes:
            break
        await asyncio.sleep(0.1)
    assert outcomes.count("cancelled") >= 100, "it is cancellation that is tested"
    assert (after.targets, after.contexts, browser.starts) == (1, before.contexts, 1)
    assert after.processes <= before.processes
    assert after.descriptors <= before.descriptors + 8, "connections of the test's own proxy"
    assert after.private_mb < before.private_mb + 50
    pids = browser._generation.chromium.processes() if browser._generation else []
    assert "forty-two" in (await rendered(browser, context, FETCHES)).html
    await browser.aclose()
    assert await gone(pids) == []


OWNER = """
import asyncio, sys
from tools.browser import Browser, BrowserSettings
from tools.chromium import find_chromium

async def main():
    browser = Browser(BrowserSettings(executable=find_chromium(), proxy="http://127.0.0.1:9", user_agent="x"))
    async with browser.tab(browser.context()):
        print(*browser._generation.chromium.processes(), flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_nothing_outlives_a_run_that_is_killed() -> None:
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as owner:
        assert owner.stdout is not None
        line = await asyncio.to_thread(owner.stdout.readline)
        pids = [int(pid) for pid in line.split()]
        assert len(pids) >= 4
        folder = command(pids[0]).partition("--remove=")[2].partition("\0")[0]
        assert os.listdir(folder)
        owner.kill()
    assert await gone(pids) == []
    with pytest.raises(FileNotFoundError):
        os.listdir(folder)


async def test_a_browser_that_cannot_start_says_so(start: Start, tmp_path: Path) -> None:
    broken = tmp_path / "chromium"
    broken.write_text("#!/bin/sh\necho no display and no luck >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(BrowserFailed, match="no luck"):
        await rendered(start(executable=broken), start(executable=broken).context(), "x")


def test_a_browser_that_is_not_there_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BrowserMissing, match=r"browse\.executable"):
        find_chromium(tmp_path / "nothing")
    assert find_chromium(sys.executable) == Path(sys.executable)
