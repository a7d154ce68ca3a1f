"""The HTTP client against servers on loopback that do what no server should."""

from __future__ import annotations

import asyncio
import gzip
import resource
import shutil
import ssl
import subprocess
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fakes.raw_site import RawSite, raw_site, reply
from tools.fetch import Fetched, FetchLimits, HttpClient, user_agent
from tools.guard import Guard
from tools.rate import HostRate
from tools.types import ToolErrorKind, ToolFailure

LIMITS = FetchLimits(timeout_s=3.0, max_bytes=100_000)


def client_of(
    *sites: RawSite, limits: FetchLimits = LIMITS, robots: bool = False, guard: Guard | None = None
) -> HttpClient:
    guard = guard if guard is not None else Guard(open_addresses=tuple(site.address for site in sites))
    rate = HostRate(default_per_minute=float("inf"))
    return HttpClient(guard, user_agent=user_agent("a@example.org"), limits=limits, robots=robots, rate=rate)


async def got(url: str, *sites: RawSite, limits: FetchLimits = LIMITS) -> Fetched:
    async with client_of(*sites, limits=limits) as client:
        return await client.get(url)


async def failed(url: str, *sites: RawSite, limits: FetchLimits = LIMITS) -> ToolFailure:
    with pytest.raises(ToolFailure) as raised:
        await got(url, *sites, limits=limits)
    return raised.value


async def test_an_answer() -> None:
    body = "<p>\u00e9</p>".encode("latin-1")
    async with raw_site({"/a": reply(body=body, content_type="Text/HTML; charset=latin-1", x_more="1")}) as site:
        answer = await got(site.url("/a?q=1"), site)
    assert (answer.url, answer.final_url, answer.status) == (site.url("/a?q=1"), site.url("/a?q=1"), 200)
    assert (answer.content_type, answer.charset, answer.body, answer.hops) == ("text/html", "latin-1", body, ())
    assert answer.headers["x-more"] == "1"
    (head,) = site.heads
    assert "User-Agent: distill-gym/0.1 (research; a@example.org)" in head
    assert "Accept-Encoding: gzip, deflate\r\n" in head
    assert "Cookie" not in head


async def test_statuses_are_answers() -> None:
    async with raw_site({"/gone": reply("404 Not Found", b"no"), "/ill": reply("500 Oh", b"ill")}) as site:
        assert [(await got(site.url(path), site)).status for path in ("/gone", "/ill")] == [404, 500]


async def test_no_cookie_comes_back() -> None:
    async with raw_site({"/a": reply(set_cookie="id=1")}) as site, client_of(site) as client:
        await client.get(site.url("/a"))
        await client.get(site.url("/a"))
    assert "cookie" not in site.heads[1].lower()


async def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with raw_site() as site, raw_site() as canary:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, canary.url())
        await got(site.url(), site)
    assert (site.num_connections, canary.num_connections) == (1, 0)


# Addresses


async def test_what_the_guard_refuses_is_not_dialled() -> None:
    async with raw_site() as site, raw_site() as canary:
        for url in (canary.url(), f"http://[::ffff:127.0.0.1]:{canary.port}/", f"http://localhost:{canary.port}/"):
            await failed(url, site)
    assert canary.num_connections == 0


async def test_a_name_is_resolved_once_and_dialled_where_it_was_checked() -> None:
    async with raw_site() as site, raw_site() as canary:
        asked = []

        async def rebinding(host: str) -> Sequence[str]:
            asked.append(host)
            return ("127.0.0.1",) if len(asked) == 1 else ("127.0.0.2",)

        guard = Guard(open_addresses=(site.address,), resolver=rebinding)
        async with client_of(guard=guard) as client:
            await client.get(f"http://rebinding.example:{site.port}/a")
            with pytest.raises(ToolFailure, match="not on the public web") as raised:
                await client.get(f"http://rebinding.example:{site.port}/b")
    assert raised.value.kind is ToolErrorKind.BLOCKED
    assert (asked, canary.num_connections) == (["rebinding.example"] * 2, 0)
    assert f"Host: rebinding.example:{site.port}" in site.heads[0]


async def test_a_name_with_one_inner_address_is_refused() -> None:
    async with raw_site() as site:

        async def mixed(host: str) -> Sequence[str]:
            return ("8.8.8.8", "127.0.0.1")

        async with client_of(guard=Guard(resolver=mixed)) as client:
            with pytest.raises(ToolFailure, match="not on the public web"):
                await client.get("http://mixed.example/")
    assert site.num_connections == 0


# Redirects


async def test_redirects_are_followed_and_told() -> None:
    pages = {
        "/a": reply("301 Moved", location="/b?x=1"),
        "/b": reply("302 Found", location="c"),
        "/c": reply(body=b"here"),
    }
    async with raw_site(pages) as site:
        answer = await got(site.url("/a"), site)
    assert answer.body == b"here"
    assert (answer.url, answer.final_url) == (site.url("/a"), site.url("/c"))
    assert answer.hops == (site.url("/b?x=1"), site.url("/c"))


@pytest.mark.parametrize("status", ["301 a", "302 a", "303 a", "307 a", "308 a"])
async def test_every_hop_is_checked(status: str) -> None:
    async with raw_site() as canary, raw_site({"/a": reply(status, location=canary.url())}) as site:
        failure = await failed(site.url("/a"), site)
    assert failure.kind is ToolErrorKind.BLOCKED
    assert canary.num_connections == 0


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "javascript:x", "data:text/html,x", "//[", "http://u:p@example.org/", "gopher://x.org/"],
)
async def test_redirects_to_what_is_no_page(location: str) -> None:
    async with raw_site({"/a": reply("302 Found", location=location)}) as site:
        assert (await failed(site.url("/a"), site)).kind in (ToolErrorKind.INVALID_ARGUMENTS, ToolErrorKind.EXECUTION)


async def test_redirects_without_end() -> None:
    async with raw_site({"/a": reply("302 Found", location="/a")}) as site:
        assert "redirects more than 5 times" in str(await failed(site.url("/a"), site))
    assert site.num_connections == 6


async def test_an_empty_location_is_an_answer() -> None:
    async with raw_site({"/a": reply("302 Found", body=b"x")}) as site:
        assert (await got(site.url("/a"), site)).status == 302


async def test_headers_stay_with_their_host() -> None:
    async with (
        raw_site() as other,
        raw_site({"/a": reply("302 Found", location=other.url())}) as site,
        client_of(site, other) as client,
    ):
        await client.get(site.url("/a"), headers={"X-Key": "secret"})
    assert "secret" in site.heads[0]
    assert "secret" not in other.heads[0]


# Bodies


async def test_compressed_bodies() -> None:
    plain = b"<p>hello</p>" * 100
    raw = zlib.compressobj(wbits=-15)
    pages = {
        "/gzip": reply(body=gzip.compress(plain), content_encoding="gzip"),
        "/zlib": reply(body=zlib.compress(plain), content_encoding="deflate"),
        "/raw": reply(body=raw.compress(plain) + raw.flush(), content_encoding="deflate"),
    }
    async with raw_site(pages) as site:
        for path in pages:
            assert (await got(site.url(path), site)).body == plain


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "x"])
async def test_no_other_packing_was_asked_for(coding: str) -> None:
    async with raw_site({"/a": reply(body=gzip.compress(b"x"), content_encoding=coding)}) as site:
        assert "which was not asked for" in str(await failed(site.url("/a"), site))


async def test_a_broken_packing() -> None:
    async with raw_site({"/a": reply(body=b"no gzip at all", content_encoding="gzip")}) as site:
        assert "packed in a broken way" in str(await failed(site.url("/a"), site))


async def test_a_bomb_is_cut_where_the_limit_is() -> None:
    bomb = gzip.compress(bytes(1_000_000_000 // 8), compresslevel=9)

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n\r\n")
        for _ in range(80):  # 10 GB
            writer.write(bomb)
            await writer.drain()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with raw_site({"/a": endless}) as site:
        limits = FetchLimits(timeout_s=10.0, max_bytes=5_000_000)
        assert "larger than 5 MB" in str(await failed(site.url("/a"), site, limits=limits))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@pytest.mark.parametrize("length", ["Content-Length: 10000000000\r\n", "", "Transfer-Encoding: chunked\r\n"])
async def test_a_body_without_end(length: str) -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{length}\r\n".encode())
        piece = bytes(10_000)
        for _ in range(100_000):
            writer.write(b"2710\r\n" + piece + b"\r\n" if "chunked" in length else piece)
            await writer.drain()

    async with raw_site({"/a": endless}) as site:
        assert "larger than 0.1 MB" in str(await failed(site.url("/a"), site))


async def test_a_drip_ends_at_the_deadline() -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n")
        for _ in range(100):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    async def drip_head(writer: asyncio.StreamWriter) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 100:
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0.05)

    async with raw_site({"/a": drip, "/head": drip_head}) as site:
        for path in ("/a", "/head"):
            began = time.monotonic()
            failure = await failed(site.url(path), site, limits=FetchLimits(timeout_s=0.5))
            assert failure.kind is ToolErrorKind.TIMEOUT
            assert time.monotonic() - began < 2.0
            assert str(failure) == "127.0.0.1 took longer than 0.5 s"


async def test_a_cancelled_fetch_is_cancelled() -> None:
    async def hang(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async with raw_site({"/a": hang}) as site, client_of(site) as client:
        task = asyncio.ensure_future(client.get(site.url("/a")))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"hello\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 50\r\n\r\nshort", "broke off"),
        (b"", "broke off"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/html\r\n\r\nzz\r\n", ""),
    ],
)
async def test_broken_answers(answer: bytes, said: str) -> None:
    async def broken(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    async with raw_site({"/a": broken}) as site:
        failure = await failed(site.url("/a"), site)
    assert failure.kind is ToolErrorKind.EXECUTION
    assert said in str(failure)


@pytest.mark.parametrize("kind", ["video/mp4", "application/octet-stream", "application/zip", "image/png"])
async def test_what_is_no_text_is_not_read(kind: str) -> None:
    async with raw_site({"/a": reply(body=b"x" * 1000, content_type=kind)}) as site:
        failure = await failed(site.url("/a"), site)
    assert failure.kind is ToolErrorKind.BLOCKED
    assert kind in str(failure)


@pytest.mark.parametrize("kind", ["application/json", "application/pdf", "application/fhir+json", "text/plain", ""])
async def test_what_is_text_is_read(kind: str) -> None:
    async with raw_site({"/a": reply(body=b"x", content_type=kind)}) as site:
        assert (await got(site.url("/a"), site)).content_type == kind


async def test_nothing_listens() -> None:
    async with raw_site() as site:
        pass
    assert "nothing answers there" in str(await failed(site.url(), site))


# Manners


async def test_a_host_that_asks_for_patience_gets_it_once() -> None:
    answers = iter([reply("429 Slow", retry_after="0.2"), reply(body=b"here")])

    async def busy(writer: asyncio.StreamWriter) -> None:
        await next(answers)(writer)

    async with raw_site({"/a": busy}) as site:
        began = time.monotonic()
        assert (await got(site.url("/a"), site)).body == b"here"
        assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("value", ["3600", "-5e99", "nan", "soon", "Fri, 01 Jan 2100 00:00:00 GMT"])
async def test_a_host_that_asks_for_too_much_does_not(value: str) -> None:
    async with raw_site({"/a": reply("429 Slow", retry_after=value)}) as site:
        began = time.monotonic()
        assert (await got(site.url("/a"), site)).status == 429
        assert time.monotonic() - began < 2.0


async def test_json_is_posted_without_redirects() -> None:
    pages = {"/api": reply(body=b"{}", content_type="application/json"), "/moved": reply("307 Moved", location="/api")}
    async with raw_site(pages) as site, client_of(site, robots=True) as client:
        assert (await client.post_json(site.url("/api"), {"q": 1}, headers={"X-Key": "k"})).body == b"{}"
        assert (await client.post_json(site.url("/moved"), {})).status == 307
    assert site.heads[0].startswith("POST /api ")
    assert '{"q": 1}' in site.heads[0]
    assert site.num_connections == 2


async def test_headers_that_are_no_unicode() -> None:
    async def handle(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nETag: \xff\xfe\r\nContent-Type: text/html; charset=\xff\r\n\r\nx")

    async def onward(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: /\xc3\xa9\xff\r\n\r\n")

    async with raw_site({"/a": handle, "/b": onward}) as site:
        answer = await got(site.url("/a"), site)
        moved = await got(site.url("/b"), site)
    assert answer.headers["etag"] == "\ufffd\ufffd"
    assert "\ufffd" in answer.headers["content-type"]
    assert moved.final_url == site.url("/%C3%A9%EF%BF%BD")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate; it is not installed")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=site.example", "-days", "2")
    written = ("-keyout", str(key), "-out", str(certificate))
    subprocess.run([openssl, *made, *written], check=True, capture_output=True, timeout=60)
    return certificate, key


async def test_a_site_with_another_s_certificate_is_refused(certificate: tuple[Path, Path]) -> None:
    """The name is told and checked though an address is dialled."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.read(100))
        writer.close()

    async def resolver(host: str) -> Sequence[str]:
        return ("127.0.0.1",)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    guard = Guard(open_addresses=(f"127.0.0.1:{port}",), resolver=resolver)
    async with client_of(guard=guard) as client:
        with pytest.raises(ToolFailure, match="certificate is not trusted"):
            await client.get(f"https://site.example:{port}/")
    server.close()
    assert names == ["site.example"]
    assert heads == [], "not a byte of the request was sent"
