"""A forward proxy on loopback through which the browser reaches the web: the guard decides about every connection.

    async with Proxy(Guard()) as proxy:
        flags = [f"--proxy-server={proxy.url}"]

The browser resolves no names: it sends host names, the proxy resolves and dials what the guard has checked.
Sub-resources, frames, workers, WebSockets and redirects are connections like any other.

One request a connection: with `Connection: close` forced on both sides there is no second request that could be
smuggled to a host that was checked for the first.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Self
from urllib.parse import urlsplit

from tools.guard import Guard, Target
from tools.types import ToolErrorKind, ToolFailure

MAX_HEAD_BYTES = 65_536
CHUNK = 65_536
METHODS = ("GET", "HEAD", "OPTIONS", "POST")
GUARD_HEADER = "x-distill-gym-guard"
"""Of an answer that the proxy gives itself, in place of the site: what was wrong."""
STATUS_OF = {ToolErrorKind.TIMEOUT: 504, ToolErrorKind.NOT_FOUND: 502, ToolErrorKind.INVALID_ARGUMENTS: 400}
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authorization proxy-authenticate te trailer upgrade".split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyLimits:
    max_connections: int = 256
    dial_s: float = 10.0
    idle_s: float = 30.0
    """Without a byte from the site."""
    life_s: float = 180.0
    """Of one connection."""
    max_bytes: int = 50_000_000
    """Of one connection, from the site."""
    max_sent_bytes: int = 2_000_000
    """Of one connection, to the site."""


class _Bad(Exception):
    """What came is not a request that we forward."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Proxy:
    """Belongs to one event loop. Nothing that a client sends can raise out of it."""

    def __init__(self, guard: Guard, limits: ProxyLimits = ProxyLimits()) -> None:
        self.guard = guard
        self.limits = limits
        self.refused: Counter[str] = Counter()
        """How often a `host:port` was refused by the guard."""
        self.num_connections = 0
        """To sites, in all."""
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        assert self._server is not None, "start it first"
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=MAX_HEAD_BYTES)

    async def aclose(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if len(self._clients) > self.limits.max_connections:
                raise _Bad(503, "too many connections")
            async with asyncio.timeout(self.limits.life_s):
                await self._forward(reader, writer)
        except _Bad as bad:
            await _say(writer, bad.status, str(bad))
        except ToolFailure as failure:
            await _say(writer, STATUS_OF.get(failure.kind, 403), failure.kind.value)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(self.limits.idle_s):
            head = await reader.readuntil(b"\r\n\r\n")
        method, where, headers = _read_request(head)
        if method == "CONNECT":
            target = self._checked(f"https://{where}/", "CONNECT")
            site_reader, site_writer = await self._dial(target)
            try:
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                await self._tunnel((reader, writer), (site_reader, site_writer))
            finally:
                site_writer.close()
            return
        if method not in METHODS:
            raise _Bad(405, "this method is not forwarded")
        target = self._checked(where, method)
        length = _content_length(headers, self.limits.max_sent_bytes)
        body = await reader.readexactly(length) if length else b""
        site_reader, site_writer = await self._dial(target)
        try:
            site_writer.write(_request_head(method, target, headers) + body)
            await site_writer.drain()
            await self._answer(method, site_reader, writer)
        finally:
            site_writer.close()

    def _checked(self, url: str, method: str) -> Target:
        """
        Raises:
            ToolFailure: by the guard.
            _Bad: not an absolute http URL, or more than host and port after CONNECT.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise _Bad(400, "this is no URL") from None
        if method == "CONNECT" and (parts.path != "/" or parts.query or parts.fragment or port is None):
            raise _Bad(400, "CONNECT wants host:port")
        if method != "CONNECT" and parts.scheme != "http":
            raise _Bad(400, "only absolute http URLs are forwarded")
        try:
            return self.guard.check_url(url)
        except ToolFailure:
            self._count(parts.hostname or "?", port or 80)
            raise

    def _count(self, host: str, port: int) -> None:
        if len(self.refused) < 10_000:  # a page may make names up without end
            self.refused[f"{host[:253]}:{port}"] += 1

    async def _dial(self, target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to one of the checked addresses.

        Raises:
            ToolFailure: by the guard.
            _Bad: none of them answers.
        """
        try:
            addresses = await self.guard.resolve(target)
        except ToolFailure:
            self._count(target.host, target.port)
            raise
        for address in addresses:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(self.limits.dial_s):
                    pair = await asyncio.open_connection(address, target.port, limit=MAX_HEAD_BYTES)
                self.num_connections += 1
                return pair
        raise _Bad(502, "nothing answers there")

    async def _tunnel(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        site: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """Bytes both ways until either side ends or has sent too much, or the site is idle for too long: a client that
        receives has nothing to say meanwhile."""
        sending = asyncio.ensure_future(self._copy(client[0], site[1], self.limits.max_sent_bytes, idle_s=None))
        receiving = asyncio.ensure_future(
            self._copy(site[0], client[1], self.limits.max_bytes, idle_s=self.limits.idle_s)
        )
        try:
            # The site's end is the end. A client may stop sending and still listen; a broken limit ends both.
            await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done() and sending.result():
                await receiving
        finally:
            sending.cancel()
            receiving.cancel()
            await asyncio.gather(sending, receiving, return_exceptions=True)

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_bytes: int, *, idle_s: float | None
    ) -> bool:
        """True if the sender ended by itself."""
        total = 0
        try:
            while total <= max_bytes:
                async with asyncio.timeout(idle_s):
                    chunk = await reader.read(CHUNK)
                if not chunk:
                    with suppress(OSError, RuntimeError):
                        writer.write_eof()
                    return True
                total += len(chunk)
                writer.write(chunk)
                async with asyncio.timeout(self.limits.idle_s):
                    await writer.drain()
        except (OSError, TimeoutError):
            pass
        return False

    async def _answer(self, method: str, site: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The site's answer, told to be the last on this connection."""
        while True:
            async with asyncio.timeout(self.limits.idle_s):
                head = await site.readuntil(b"\r\n\r\n")
            first, *lines = re.split(rb"\r?\n", head[:-4])  # a bare newline ends a line for browsers too
            status = re.fullmatch(rb"HTTP/1\.[01] (\d{3})(?: .*)?", first)
            if status is None:
                raise _Bad(502, "the answer is no HTTP")
            if status[1] == b"101":
                raise _Bad(502, "the site switches protocols")
            kept = [line for line in lines if _name(line) not in _HOP_BY_HOP and _name(line) != GUARD_HEADER.encode()]
            if status[1][:1] == b"1":
                continue  # of no interest to a reader of pages
            writer.write(b"\r\n".join([first, *kept, b"Connection: close", b"", b""]))
            break
        if method != "HEAD" and status[1] not in (b"204", b"304"):
            await self._copy(site, writer, self.limits.max_bytes, idle_s=self.limits.idle_s)


def _read_request(head: bytes) -> tuple[str, str, list[tuple[bytes, bytes]]]:
    """Method, target and headers.

    Raises:
        _Bad: no HTTP/1.1 as it should be.
    """
    first, *lines = head[:-4].split(b"\r\n")
    match = re.fullmatch(rb"([A-Z]{3,10}) ([\x21-\x7e]{1,8000}) HTTP/1\.[01]", first)
    if match is None:
        raise _Bad(400, "this is no request")
    headers = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(name) or b"\n" in value or b"\r" in value or b"\0" in value:
            raise _Bad(400, "a header is broken")
        headers.append((name, value.strip()))
    return match[1].decode(), match[2].decode(), headers


def _content_length(headers: list[tuple[bytes, bytes]], most: int) -> int:
    """
    Raises:
        _Bad: not exactly told, or more than `most`.
    """
    if any(name.lower() == b"transfer-encoding" for name, _ in headers):
        raise _Bad(411, "a length is needed")
    lengths = {value for name, value in headers if name.lower() == b"content-length"}
    if not lengths:
        return 0
    if len(lengths) > 1 or not (text := lengths.pop()).isdigit() or len(text) > 12:
        raise _Bad(400, "the length is broken")
    if int(text) > most:
        raise _Bad(413, "too much is sent")
    return int(text)


def _request_head(method: str, target: Target, headers: list[tuple[bytes, bytes]]) -> bytes:
    """In origin form, with the host that was checked, whatever the client's Host header said."""
    parts = urlsplit(target.url)
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    kept = [b"%s: %s" % (name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP | {b"host"}]
    lines = [f"{method} {path} HTTP/1.1".encode(), f"Host: {parts.netloc}".encode(), *kept, b"Connection: close"]
    return b"\r\n".join([*lines, b"", b""])


def _name(line: bytes) -> bytes:
    return line.partition(b":")[0].strip().lower()


async def _say(writer: asyncio.StreamWriter, status: int, reason: str) -> None:
    lines = (f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"{GUARD_HEADER}: {reason}", "Content-Length: 0")
    with suppress(OSError, TimeoutError):
        writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode())
        await asyncio.wait_for(writer.drain(), 5)
