"""Pages fetched through the guard, the proxy, Chromium and crawl4ai, from a site that means no good."""

from __future__ import annotations

import asyncio
import gzip
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
from aiohttp import web

from tools.crawl import CrawlSettings, Session, close_all, shared_crawler
from tools.guard import Guard
from tools.rate import HostRate
from tools.types import ToolErrorKind, ToolFailure

pytestmark = pytest.mark.browser
CANARY_PORT = web.AppKey("canary_port", int)


class Canary:
    """Listens on loopback, IPv4 and IPv6, and counts who comes."""

    def __init__(self) -> None:
        self.hits: list[str] = []
        self.port = 0

    async def start(self) -> None:
        self._servers = [await asyncio.start_server(self._hit, "127.0.0.1", 0)]
        self.port = self._servers[0].sockets[0].getsockname()[1]
        with suppress(OSError):  # a machine without IPv6
            self._servers.append(await asyncio.start_server(self._hit, "::1", self.port))
        loop = asyncio.get_running_loop()
        self._udp, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self.hits), ("127.0.0.1", self.port))

    async def _hit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hits.append(repr(await reader.read(100)))
        writer.close()

    def stop(self) -> None:
        self._udp.close()
        for server in self._servers:
            server.close()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, hits: list[str]) -> None:
        self._hits = hits

    def datagram_received(self, data: bytes, addr: object) -> None:
        self._hits.append(f"UDP {data[:20]!r}")


async def resolver(host: str) -> Sequence[str]:
    """Names of the test; no other exists. Nothing here leads off the machine."""
    names = {"inside.example.com": ["127.0.0.1"], "mixed.example.com": ["93.184.216.34", "127.0.0.1"],
             "meta.example.com": ["169.254.169.254"], "six.example.com": ["::1"]}  # fmt: skip
    if host not in names:
        raise OSError("no such name")
    return names[host]


@pytest.fixture
async def canary() -> AsyncIterator[Canary]:
    made = Canary()
    await made.start()
    yield made
    made.stop()


@pytest.fixture
async def site(canary: Canary) -> AsyncIterator[str]:
    app = web.Application()
    app[CANARY_PORT] = canary.port
    for path, answer in ANSWERS.items():
        app.router.add_route("*", path, answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def settings(site: str, canary: Canary) -> AsyncIterator[Callable[..., CrawlSettings]]:
    rate = HostRate(default_per_minute=math.inf)

    def made(**given: Any) -> CrawlSettings:
        guard = Guard(ports=(80, 443, canary.port), open_addresses=(site.removeprefix("http://"),), resolver=resolver)
        return CrawlSettings(
            **{"guard": guard, "user_agent": "distill-gym-test/1", "robots": False, "rate": rate} | given
        )

    yield made
    await close_all()


def html(text: str) -> web.Response:
    return web.Response(text=text, content_type="text/html")


async def rendered_page(request: web.Request) -> web.Response:
    return html("<title>Trial</title><h1>Trial</h1><p id=x>waiting</p><a href=/next?q=(1)>next</a><script>"
                "fetch('/data').then(r => r.json()).then(d => { x.textContent = d.sponsor })</script>")  # fmt: skip


async def data(request: web.Request) -> web.Response:
    return web.json_response({"sponsor": "Acme Pharma", "agent": request.headers["User-Agent"]})


def attacks(port: int) -> str:
    """Every way of a page to reach out, at every name of this machine."""
    hosts = ("127.0.0.1", "localhost", "[::1]", "127.1", "0.0.0.0", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]",
             "inside.example.com", "mixed.example.com", "six.example.com", "a.localhost", "127.0.0.1.")  # fmt: skip
    form = (
        f"<form id=f action=http://127.0.0.1:{port}/form method=post target=_blank></form><script>f.submit()</script>"
    )
    return "<p>the text</p>" + "".join(ATTACK.replace("AT", f"{host}:{port}") for host in hosts) + form


ATTACK = """
<img src=http://AT/img><iframe src=http://AT/frame></iframe><link rel=stylesheet href=http://AT/css>
<script src=http://AT/script async></script><link rel=preconnect href=http://AT><video src=http://AT/v></video>
<link rel=prefetch href=http://AT/pre><link rel=dns-prefetch href=//AT><object data=http://AT/o></object>
<embed src=http://AT/e><iframe src='view-source:http://AT/'></iframe><link rel=icon href=http://AT/i><script>
fetch('http://AT/fetch', {mode: 'no-cors'}).catch(() => 0);
fetch('http://AT/post', {mode: 'no-cors', method: 'POST', body: 'x'}).catch(() => 0);
new EventSource('http://AT/events'); navigator.sendBeacon('http://AT/beacon', 'x');
new Image().src = 'http://AT/image'; window.open('http://AT/window');
new Worker(URL.createObjectURL(new Blob(["fetch('http://AT/worker', {mode: 'no-cors'}).catch(() => 0)"])));
try { new WebSocket('ws://AT/ws') } catch (e) {}
try { new WebTransport('https://AT/wt') } catch (e) {}
try {
  const servers = [{urls: 'stun:AT'}, {urls: 'turn:AT?transport=tcp', username: 'u', credential: 'c'}];
  const p = new RTCPeerConnection({iceServers: servers});
  p.createDataChannel('x'); p.createOffer().then(o => p.setLocalDescription(o))
} catch (e) {}
</script>"""


async def attack(request: web.Request) -> web.Response:
    return html(attacks(request.app[CANARY_PORT]))


async def redirect(request: web.Request) -> web.Response:
    raise web.HTTPFound(f"http://inside.example.com:{request.app[CANARY_PORT]}/redirected")


async def script_redirect(request: web.Request) -> web.Response:
    return html(f"<p>the text</p><script>location = 'http://inside.example.com:{request.app[CANARY_PORT]}/'</script>")


async def refresh(request: web.Request) -> web.Response:
    return html(
        f"<meta http-equiv=refresh content='0; url=http://127.0.0.1:{request.app[CANARY_PORT]}/'><p>the text</p>"
    )


async def to_page(request: web.Request) -> web.Response:
    return html("<script>location.replace('/page')</script>")


async def to_pdf(request: web.Request) -> web.Response:
    return html("<p>wait</p><script>location = '/pdf'</script>")


def pdf_of(text: str) -> bytes:
    """The smallest PDF with a line of text."""
    stream = f"BT /F1 24 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    body, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    return body + b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        size, table, size, len(body)
    )  # fmt: skip


async def pdf(request: web.Request) -> web.Response:
    return web.Response(body=pdf_of("Exclusivity ends 2031"), content_type="application/pdf")


async def missing(request: web.Request) -> web.Response:
    return web.Response(
        status=404, text="<p>not here</p><script>document.body.append('ran')</script>", content_type="text/html"
    )


async def hang(request: web.Request) -> web.Response:
    await asyncio.sleep(60)
    return html("late")


async def waits(request: web.Request) -> web.Response:
    return html("<p>the text</p><script src=/hang></script><p>the rest</p>")


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/html"})
    await response.prepare(request)
    with suppress(ConnectionError):
        for _ in range(16_000):
            await response.write(b"<p>x</p>" * 8192)
    return response


BOMB = gzip.compress(b"\0" * 100_000_000, 6) * 40


async def bomb(request: web.Request) -> web.Response:
    return web.Response(body=BOMB, headers={"Content-Type": "text/html", "Content-Encoding": "gzip"})


async def takes_bombs(request: web.Request) -> web.Response:
    fetches = "for (const place of ['/bomb', '/stream']) fetch(place).then(r => r.text())"
    more = "<script src=/bomb async></script><iframe src=/stream></iframe>"
    return html(f"<p>the text</p><script>{fetches}</script>{more}")


ANSWERS: dict[str, Any] = {
    "/page": rendered_page, "/data": data, "/attack": attack, "/redirect": redirect, "/refresh": refresh,
    "/script_redirect": script_redirect, "/to_page": to_page, "/to_pdf": to_pdf, "/pdf": pdf, "/missing": missing,
    "/hang": hang, "/waits": waits, "/stream": stream, "/bomb": bomb, "/takes_bombs": takes_bombs,
}  # fmt: skip
Made = Callable[..., CrawlSettings]


async def kind_of(session: Session, url: str) -> tuple[ToolErrorKind, str]:
    with pytest.raises(ToolFailure) as caught:
        await session.fetch(url)
    return caught.value.kind, str(caught.value)


async def test_a_page_becomes_markdown_after_its_scripts_have_run(site: str, settings: Made) -> None:
    session = Session(settings())
    page = await session.fetch(f"{site}/page")
    assert page.text == f"# Trial\nAcme Pharma\n[next]({site}/next?q=%281%29)"
    assert (page.title, page.status, page.final_url, page.hops) == ("Trial", 200, f"{site}/page", ())
    assert "Acme Pharma" in page.body
    assert page.headers == {"content-type": "text/html; charset=utf-8"}
    await session.aclose()


async def test_without_a_browser_a_page_is_read_as_it_was_sent(site: str, settings: Made) -> None:
    session = Session(settings(engine="http"))
    page = await session.fetch(f"{site}/page")
    assert page.text == f"# Trial\nwaiting\n[next]({site}/next?q=%281%29)"
    assert shared_crawler(session.settings).browser is None
    await session.aclose()


async def test_what_is_no_html_and_what_failed(site: str, settings: Made) -> None:
    session = Session(settings())
    page = await session.fetch(f"{site}/pdf")
    assert (page.text, page.body, page.content_type) == ("Exclusivity ends 2031", "", "application/pdf")
    page = await session.fetch(f"{site}/data")
    assert page.text == page.body == '{"sponsor": "Acme Pharma", "agent": "distill-gym-test/1"}'
    page = await session.fetch(f"{site}/missing")
    assert (page.status, page.text) == (404, "not here")
    page = await session.fetch(f"{site}/to_page")
    assert (page.final_url, page.hops) == (f"{site}/page", (f"{site}/page",))
    assert "Acme Pharma" in (page.text or "")
    page = await session.fetch(f"{site}/to_pdf")
    assert (page.final_url, page.text, page.content_type) == (f"{site}/pdf", "Exclusivity ends 2031", "application/pdf")
    page = await session.fetch(f"{site}/waits")
    assert page.text == "the text\nthe rest", "a script that does not come does not hide what follows it"
    await session.aclose()


async def test_no_page_reaches_what_the_guard_denies(site: str, settings: Made, canary: Canary) -> None:
    session = Session(settings())
    page = await session.fetch(f"{site}/attack")
    assert "the text" in (page.text or "")
    kind, said = await kind_of(session, f"{site}/redirect")
    assert kind is ToolErrorKind.BLOCKED
    assert "127.0.0.1" not in said, "what a name resolves to is not told"
    for path in ("/script_redirect", "/refresh"):
        page = await session.fetch(f"{site}{path}")
        assert (page.text, page.final_url) == ("the text", f"{site}{path}")
    for host in ("127.0.0.1", "localhost", "[::1]", "2130706433", "inside.example.com", "mixed.example.com"):
        await kind_of(session, f"http://{host}:{canary.port}/direct")
    proxy = shared_crawler(session.settings).proxy
    assert proxy is not None
    assert sum(proxy.refused.values()) > 20, "they were tried"
    await asyncio.sleep(0.5)
    assert canary.hits == []
    await session.aclose()


async def test_floods_are_cut_and_the_browser_stays_small(site: str, settings: Made) -> None:
    session = Session(settings())
    assert (await kind_of(session, f"{site}/stream"))[0] is ToolErrorKind.EXECUTION
    assert (await kind_of(session, f"{site}/bomb"))[0] is ToolErrorKind.EXECUTION
    with suppress(ToolFailure):  # the page may be ended for the memory that it takes
        assert (await session.fetch(f"{site}/takes_bombs")).text == "the text"
    crawler = shared_crawler(session.settings)
    assert "Acme Pharma" in ((await session.fetch(f"{site}/page")).text or "")
    census = await crawler.census()
    assert census is not None
    assert census.targets <= 1
    assert census.private_mb < 600
    await session.aclose()


async def test_a_page_that_never_comes_costs_its_time(site: str, settings: Made) -> None:
    session = Session(settings(timeout_s=1.5))
    assert await kind_of(session, f"{site}/hang") == (
        ToolErrorKind.TIMEOUT, "the page was not there within 1.5 seconds"
    )  # fmt: skip
    await session.aclose()


async def test_many_sessions_share_a_browser_and_lose_no_page(site: str, settings: Made) -> None:
    sessions = [Session(settings()) for _ in range(8)]
    pages = await asyncio.gather(*(session.fetch(f"{site}/page?{n}") for n in range(6) for session in sessions))
    assert ["Acme Pharma" in (page.text or "") for page in pages] == [True] * 48
    crawler = shared_crawler(sessions[0].settings)
    assert crawler.browser is not None
    assert crawler.browser.starts == 1
    for session in sessions:
        await session.reset()
    census = await crawler.census()
    assert census is not None
    assert (census.targets, census.contexts) == (0, 0)
    for session in sessions:
        await session.aclose()
    assert crawler.sessions == 0
