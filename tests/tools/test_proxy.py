"""The browser's proxy, spoken to in raw bytes as a browser that a page has taken over would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from tests.fakes.raw_site import RawSite, raw_site, reply
from tools.guard import Guard
from tools.proxy import Proxy, ProxyLimits

LIMITS = ProxyLimits()


@asynccontextmanager
async def proxy_of(site: RawSite, limits: ProxyLimits = LIMITS, guard: Guard | None = None) -> AsyncIterator[Proxy]:
    async with Proxy(guard or Guard(open_addresses=(site.address,)), limits) as proxy:
        yield proxy


async def said(proxy: Proxy, sent: bytes, *, then: bytes = b"", wait_s: float = 5.0) -> bytes:
    """All that comes back until the proxy closes the connection."""
    parts = urlsplit(proxy.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(sent)
        if then:
            await asyncio.sleep(0.1)
            writer.write(then)
        async with asyncio.timeout(wait_s):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def get(url: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {url} HTTP/1.1", "Host: whatever", *headers, "", ""]).encode()


async def test_a_page_comes_through() -> None:
    async with raw_site({"/a": reply(body=b"here", keep_alive="timeout=5")}) as site, proxy_of(site) as proxy:
        answer = await said(proxy, get(site.url("/a?b=1#c"), "Proxy-Connection: keep-alive", "X-Kept: yes"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\nConnection: close\r\n\r\nhere")
    assert b"Keep-Alive" not in answer
    (head,) = site.heads
    assert head.startswith("GET /a?b=1 HTTP/1.1\r\n")
    assert f"Host: {site.address}\r\n" in head
    assert "X-Kept: yes" in head
    assert "Proxy-Connection" not in head
    assert proxy.num_connections == 1


async def test_a_tunnel_comes_through() -> None:
    async with raw_site({"/a": reply(body=b"here")}) as site, proxy_of(site) as proxy:
        connect = f"CONNECT {site.address} HTTP/1.1\r\nHost: {site.address}\r\n\r\n".encode()
        answer = await said(proxy, connect, then=b"GET /a HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 Connection established\r\n\r\nHTTP/1.1 200 OK")
    assert answer.endswith(b"here")


async def test_a_form_is_posted() -> None:
    async with raw_site({"/form": reply(body=b"thanks")}) as site, proxy_of(site) as proxy:
        sent = f"POST {site.url('/form')} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\na=1".encode()
        assert (await said(proxy, sent)).endswith(b"thanks")
    assert site.heads[0].endswith("\r\n\r\na=1")


REFUSED = ("http://{0}/", "http://[::ffff:127.0.0.1]:{1}/", "http://2130706433:{1}/", "http://0x7f.1:{1}/", "http://127.1:{1}/",
           "http://localhost:{1}/", "http://a.org\\@{0}/", "http://u:p@{0}/", "http://169.254.169.254/latest/meta-data/",
           "http://[::1]:{1}/", "http://10.0.0.1/", "http://[fe80::1%25lo]:{1}/", "http://{0}./")  # fmt: skip


@pytest.mark.parametrize("url", REFUSED)
async def test_what_the_guard_refuses_is_not_dialled(url: str) -> None:
    async with raw_site() as canary, raw_site() as site, proxy_of(site) as proxy:
        url = url.format(canary.address, canary.port)
        for sent in (get(url), f"CONNECT {url.removeprefix('http://').rstrip('/')} HTTP/1.1\r\n\r\n".encode()):
            answer = await said(proxy, sent)
            assert answer.split(b" ")[1] in (b"400", b"403"), answer
            assert b"x-distill-gym-guard: " in answer
    assert (canary.num_connections, proxy.num_connections) == (0, 0)


async def test_refusals_are_counted_by_place() -> None:
    async with raw_site() as canary, raw_site() as site, proxy_of(site) as proxy:
        for _ in range(2):
            await said(proxy, get(canary.url()))
        assert proxy.refused == {canary.address: 2}


async def test_a_name_is_dialled_where_it_was_checked() -> None:
    async with raw_site() as site:
        answers = iter([("127.0.0.1",), ("127.0.0.2",), ("8.8.8.8", "127.0.0.3")])

        async def rebinding(host: str) -> Sequence[str]:
            return next(answers)

        guard = Guard(open_addresses=(site.address,), resolver=rebinding)
        async with proxy_of(site, guard=guard) as proxy:
            url = f"http://rebinding.example:{site.port}/"
            statuses = [(await said(proxy, get(url))).split(b" ")[1] for _ in range(3)]
    assert statuses == [b"200", b"403", b"403"]
    assert site.num_connections == 1


async def test_no_second_request_goes_to_the_host_that_was_checked_for_the_first() -> None:
    async with raw_site() as canary, raw_site({"/a": reply(body=b"here")}) as site, proxy_of(site) as proxy:
        answer = await said(proxy, get(site.url("/a")) + get(canary.url("/smuggled")))
        assert answer.count(b"HTTP/1.1") == 1
        answer = await said(proxy, get(site.url("/a")), then=get(site.url("/later")))
        assert answer.count(b"HTTP/1.1") == 1
    assert canary.num_connections == 0
    assert [head.split(" ")[1] for head in site.heads] == ["/a", "/a"]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: SITE\r\n\r\n", b"400"),
        (b"GET https://SITE/ HTTP/1.1\r\n\r\n", b"400"),
        (b"GET ftp://SITE/ HTTP/1.1\r\n\r\n", b"400"),
        (b"GET http://SITE/ HTTP/2.0\r\n\r\n", b"400"),
        (b"GET  http://SITE/ HTTP/1.1\r\n\r\n", b"400"),
        (b"\x16\x03\x01 hello\r\n\r\n", b"400"),
        (b"BREW http://SITE/ HTTP/1.1\r\n\r\n", b"405"),
        (b"TRACE http://SITE/ HTTP/1.1\r\n\r\n", b"405"),
        (b"CONNECT SITE/path HTTP/1.1\r\n\r\n", b"400"),
        (b"CONNECT 127.0.0.1 HTTP/1.1\r\n\r\n", b"400"),
        (b"GET http://SITE/ HTTP/1.1\r\nbad header: x\r\n\r\n", b"400"),
        (b"GET http://SITE/ HTTP/1.1\r\nno colon\r\n\r\n", b"400"),
        (b"GET http://SITE/ HTTP/1.1\r\nX: a\nY: b\r\n\r\n", b"400"),
        (b"GET http://SITE/ HTTP/1.1\r\nX: a\r\n continued\r\n\r\n", b"400"),
        (b"POST http://SITE/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
        (b"POST http://SITE/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", b"400"),
        (b"POST http://SITE/ HTTP/1.1\r\nContent-Length: +1\r\n\r\na", b"400"),
        (b"POST http://SITE/ HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\na", b"413"),
    ],
)
async def test_requests_that_are_none_reach_nobody(sent: bytes, status: bytes) -> None:
    async with raw_site() as site, proxy_of(site) as proxy:
        answer = await said(proxy, sent.replace(b"SITE", site.address.encode()))
    assert answer.split(b" ")[1] == status
    assert site.num_connections == 0


@pytest.mark.parametrize(
    "answer",
    [b"hello\r\n\r\n", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", b"HTTP/1.1 2xx\r\n\r\n"],
)
async def test_answers_that_are_none_do_not_get_through(answer: bytes) -> None:
    async def broken(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    async with raw_site({"/a": broken}) as site, proxy_of(site) as proxy:
        got = await said(proxy, get(site.url("/a")))
    assert got.startswith(b"HTTP/1.1 502 ")


async def test_a_site_cannot_pass_for_the_guard() -> None:
    async with raw_site({"/a": reply(x_distill_gym_guard="blocked", body=b"x")}) as site, proxy_of(site) as proxy:
        assert b"guard" not in (await said(proxy, get(site.url("/a")))).lower()


async def test_an_early_hint_is_passed_over() -> None:
    async def hinting(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n")
        await reply(body=b"here")(writer)

    async with raw_site({"/a": hinting}) as site, proxy_of(site) as proxy:
        answer = await said(proxy, get(site.url("/a")))
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b"here")


# Limits


async def flood(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(10_000):
        writer.write(bytes(100_000))
        await writer.drain()


async def hang(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


async def test_a_flood_is_cut() -> None:
    async with raw_site({"/a": flood}) as site, proxy_of(site, ProxyLimits(max_bytes=1_000_000)) as proxy:
        assert len(await said(proxy, get(site.url("/a")))) < 1_300_000
        connect = f"CONNECT {site.address} HTTP/1.1\r\n\r\n".encode()
        assert len(await said(proxy, connect, then=b"GET /a HTTP/1.1\r\n\r\n")) < 1_300_000


async def test_nobody_may_be_silent_for_long() -> None:
    async with raw_site({"/a": hang}) as site, proxy_of(site, ProxyLimits(idle_s=0.2)) as proxy:
        began = time.monotonic()
        await said(proxy, get(site.url("/a")))
        await said(proxy, b"GET http://")
        await said(proxy, f"CONNECT {site.address} HTTP/1.1\r\n\r\n".encode())
        assert time.monotonic() - began < 3.0


async def test_a_head_has_a_limit() -> None:
    async with raw_site() as site, proxy_of(site) as proxy:
        assert await said(proxy, b"GET http://x/ HTTP/1.1\r\nX: " + b"a" * 200_000) == b""


async def test_there_are_only_so_many_connections() -> None:
    limits = ProxyLimits(max_connections=3)
    async with raw_site({"/a": hang}) as site, proxy_of(site, limits) as proxy:
        waiting = [asyncio.ensure_future(said(proxy, get(site.url("/a")))) for _ in range(3)]
        await asyncio.sleep(0.2)
        assert (await said(proxy, get(site.url("/b")))).startswith(b"HTTP/1.1 503 ")
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_its_end_ends_what_it_carries() -> None:
    async with raw_site({"/a": hang}) as site:
        async with proxy_of(site) as proxy:
            waiting = asyncio.ensure_future(said(proxy, get(site.url("/a"))))
            await asyncio.sleep(0.1)
        assert await waiting == b""


async def test_a_client_that_only_receives_is_not_idle() -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(10):
            await asyncio.sleep(0.1)
            writer.write(b"x")
            await writer.drain()

    async with raw_site({"/a": slow}) as site, proxy_of(site, ProxyLimits(idle_s=0.4)) as proxy:
        connect = f"CONNECT {site.address} HTTP/1.1\r\n\r\n".encode()
        assert (await said(proxy, connect, then=b"GET /a HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n" + 10 * b"x")


async def test_a_bare_newline_smuggles_no_header_past_the_proxy() -> None:
    async def smuggling(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX: 1\nX-Distill-Gym-Guard: blocked\nConnection: keep-alive\r\n\r\nhere")

    async with raw_site({"/a": smuggling}) as site, proxy_of(site) as proxy:
        answer = await said(proxy, get(site.url("/a")))
    assert answer == b"HTTP/1.1 200 OK\r\nX: 1\r\nConnection: close\r\n\r\nhere"


async def test_what_is_counted_has_a_limit() -> None:
    async with raw_site() as site, proxy_of(site) as proxy:
        await said(proxy, get(f"http://{'a' * 5000}.test/"))
        assert [len(place) for place in proxy.refused] == [253 + len(":80")]
