"""The HTTP client of the tools: every request passes the guard, every answer has its limits.

async with HttpClient(Guard(), user_agent=user_agent("you@example.org")) as client:
    answer = await client.get("https://example.org/")
"""

from __future__ import annotations

import asyncio
import json
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urljoin, urlsplit

from tools.guard import Guard, Target
from tools.rate import HostRate, retry_after
from tools.robots import MAX_BYTES as ROBOTS_BYTES
from tools.robots import Robots
from tools.types import ToolErrorKind, ToolFailure

if TYPE_CHECKING:
    import aiohttp

AGENT = "distill-gym"
"""The name by which robots.txt may address us."""
REDIRECTS = (301, 302, 303, 307, 308)
MAX_WAIT_S = 10.0
"""A host that asks for more patience than this gets its 429 shown to the model."""
TEXT_TYPES = ("text/", "application/json", "application/xml", "application/xhtml+xml", "application/pdf",
              "application/rss+xml", "application/atom+xml", "application/ld+json")  # fmt: skip
SIZE_CHUNK = 65_536
_URL_CHARS = "".join(chr(code) for code in range(0x80) if code != 0x20)
"""What stays as it is in a `Location`; the rest is escaped, as browsers do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """One answer, after redirects."""

    url: str
    """What was asked for."""
    final_url: str
    status: int
    headers: Mapping[str, str]
    """Names in lower case; of repeated ones the last."""
    body: bytes
    """Decompressed."""
    content_type: str
    """Lower case, without parameters; "" if none was sent."""
    charset: str | None
    """As the header names it."""
    hops: tuple[str, ...] = ()
    """URLs that redirects led through, the last one included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    timeout_s: float = 20.0
    """For everything: waiting for the host's turn, robots.txt, redirects, the last byte."""
    max_bytes: int = 5_000_000
    """Of one answer, after decompression."""
    cut: bool = False
    """A longer answer is cut there, not refused."""
    max_redirects: int = 5
    content_types: tuple[str, ...] = TEXT_TYPES
    """Types, or their beginnings, that are read. An answer without a type is."""


def user_agent(contact: str = "") -> str:
    """What sites see."""
    return f"{AGENT}/0.1 (research; {contact})" if contact else f"{AGENT}/0.1 (research)"


class HttpClient:
    """Belongs to one event loop. Sends no cookies, no credentials, and obeys no proxy of the environment."""

    def __init__(
        self,
        guard: Guard,
        *,
        user_agent: str,
        limits: FetchLimits = FetchLimits(),
        robots: bool = True,
        rate: HostRate | None = None,
    ) -> None:
        self.guard = guard
        self.limits = limits
        self.rate = rate if rate is not None else HostRate()
        self._user_agent = user_agent
        self._robots = Robots(self._robots_txt, self.rate, AGENT) if robots else None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def get(self, url: str, *, headers: Mapping[str, str] | None = None) -> Fetched:
        """
        Args:
            headers: sent to the host of `url` only, not to hosts that it redirects to.

        Raises:
            ToolFailure: `invalid_arguments` (no web URL), `blocked` (guard, robots.txt, content type), `timeout`,
                `not_found` (no such host), `execution` (too large, broken). Any status is an answer.
        """
        async with self._deadline(url):
            return await self._get(url, dict(headers or {}), self._robots, self.limits)

    async def post_json(self, url: str, payload: Any, *, headers: Mapping[str, str] | None = None) -> Fetched:
        """Sends JSON; follows no redirect and asks no robots.txt: this is for interfaces, not for pages.

        Raises:
            ToolFailure: as in `get`.
        """
        sent = {"Content-Type": "application/json", **(headers or {})}
        async with self._deadline(url):
            target = self.guard.check_url(url)
            return await self._turn("POST", target, sent, self.limits, json.dumps(payload).encode())

    def _deadline(self, url: str) -> _Deadline:
        return _Deadline(url, self.limits.timeout_s)

    async def _get(self, url: str, headers: dict[str, str], robots: Robots | None, limits: FetchLimits) -> Fetched:
        target = self.guard.check_url(url)
        first, hops = target, list[str]()
        while True:
            if robots is not None:
                await robots.check(target.url)
            answer = await self._turn("GET", target, headers, limits)
            location = answer.headers.get("location")
            if answer.status not in REDIRECTS or not location:
                return replace(answer, url=first.url, hops=tuple(hops))
            if len(hops) >= limits.max_redirects:
                raise ToolFailure(f"the page redirects more than {limits.max_redirects} times")
            try:
                joined = urljoin(target.url, quote(location, safe=_URL_CHARS))
            except ValueError:
                raise ToolFailure("the page redirects to what is no URL") from None
            onward = self.guard.check_url(joined)
            if (onward.scheme, onward.host, onward.port) != (target.scheme, target.host, target.port):
                headers = {}  # they may hold a key
            target = onward
            hops.append(target.url)

    async def _turn(
        self, method: str, target: Target, headers: Mapping[str, str], limits: FetchLimits, body: bytes | None = None
    ) -> Fetched:
        """One request when it is the host's turn; once more if the host asks for a little patience."""
        for last in (False, True):
            await self.rate.turn(target.host)
            answer = await self._send(method, target, headers, limits, body)
            wait = retry_after(answer.headers.get("retry-after")) if answer.status in (429, 503) else None
            if wait is not None:
                self.rate.hold(target.host, wait)
            if wait is None or wait > MAX_WAIT_S or last:
                break
        return answer

    async def _send(
        self, method: str, target: Target, headers: Mapping[str, str], limits: FetchLimits, body: bytes | None
    ) -> Fetched:
        import aiohttp

        # An address in the URL is dialled without asking the resolver; names are checked where they are dialled.
        if _is_address(target.host):
            await self.guard.resolve(target)
        try:
            async with self._opened().request(
                method, target.url, headers={"Accept-Encoding": "gzip, deflate", **headers}, data=body,
                allow_redirects=False,
            ) as response:  # fmt: skip
                kind = response.content_type.lower() if "Content-Type" in response.headers else ""
                if response.status in REDIRECTS and "Location" in response.headers:
                    content = b""
                else:
                    _check_type(kind, limits)
                    content = await _read(response, limits)
                return Fetched(
                    url=target.url,
                    final_url=target.url,
                    status=response.status,
                    headers={_unicode(name.lower()): _unicode(value) for name, value in response.headers.items()},
                    body=content,
                    content_type=kind,
                    charset=response.charset,
                )
        except aiohttp.ClientError as error:
            if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, _Refused):
                raise error.os_error.failure from None
            raise ToolFailure(f"{target.host}: {_in_words(error)}") from None
        except ValueError:  # what aiohttp makes of a broken header
            raise ToolFailure(f"{target.host} answered with what is no HTTP") from None

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            import aiohttp

            connector = aiohttp.TCPConnector(
                resolver=_checked_resolver(self.guard), use_dns_cache=False, limit=64, limit_per_host=8
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": self._user_agent},
                auto_decompress=False,
                trust_env=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0),
            )
        return self._session

    async def _robots_txt(self, url: str) -> tuple[int, bytes]:
        limits = replace(self.limits, max_bytes=ROBOTS_BYTES, cut=True, content_types=("",))
        answer = await self._get(url, {}, None, limits)
        return answer.status, answer.body


class _Deadline:
    """`asyncio.timeout` that tells the model."""

    def __init__(self, url: str, seconds: float) -> None:
        self._url, self._seconds = url, seconds

    async def __aenter__(self) -> None:
        self._timeout = asyncio.timeout(self._seconds)
        await self._timeout.__aenter__()

    async def __aexit__(self, *raised: Any) -> None:
        try:
            await self._timeout.__aexit__(*raised)
        except TimeoutError:
            host = urlsplit(self._url).hostname if len(self._url) < 2000 else None
            raise ToolFailure(
                f"{host or 'the page'} took longer than {self._seconds:g} s", ToolErrorKind.TIMEOUT
            ) from None


class _Refused(OSError):
    """The guard's refusal on its way through aiohttp, which passes on an OSError of the resolver."""

    def __init__(self, failure: ToolFailure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def _checked_resolver(guard: Guard) -> aiohttp.abc.AbstractResolver:
    from aiohttp.abc import AbstractResolver, ResolveResult

    class CheckedResolver(AbstractResolver):
        """What it answers is dialled, and nothing else."""

        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            try:
                addresses = await guard.resolve(Target(url="", scheme="", host=host, port=port))
            except ToolFailure as failure:
                raise _Refused(failure) from None
            return [
                ResolveResult(
                    hostname=host,
                    host=address,
                    port=port,
                    family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                    proto=0,
                    flags=socket.AI_NUMERICHOST,
                )
                for address in addresses
            ]

        async def close(self) -> None:
            return None

    return CheckedResolver()


def _is_address(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()


def _check_type(kind: str, limits: FetchLimits) -> None:
    if kind and not kind.startswith(limits.content_types) and not kind.endswith(("+json", "+xml")):
        raise ToolFailure(f"this is {kind[:60]}, which cannot be read", ToolErrorKind.BLOCKED)


async def _read(response: aiohttp.ClientResponse, limits: FetchLimits) -> bytes:
    """The whole body, decompressed piece by piece, so that no more than the limit is ever in memory.

    Raises:
        ToolFailure: it is larger, or broken, or compressed in a way that was not asked for.
    """
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("identity", "", "gzip", "x-gzip", "deflate"):
        raise ToolFailure(f"the page is packed as {coding[:40]}, which was not asked for")
    inflate = _Inflate(coding) if coding not in ("identity", "") else None
    body = bytearray()
    num_packed = 0
    async for chunk in response.content.iter_chunked(SIZE_CHUNK):
        num_packed += len(chunk)
        body += chunk if inflate is None else inflate(chunk, limits.max_bytes + 1 - len(body))
        if len(body) > limits.max_bytes or num_packed > limits.max_bytes:
            if limits.cut:
                return bytes(body[: limits.max_bytes])
            raise ToolFailure(f"the page is larger than {limits.max_bytes / 1e6:g} MB")
    return bytes(body)


def _unicode(text: str) -> str:
    """A header without the surrogates that stand for bytes which are no UTF-8: no file could hold them."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class _Inflate:
    def __init__(self, coding: str) -> None:
        self._gzip = coding != "deflate"
        self._inflate: Any = None

    def __call__(self, chunk: bytes, room: int) -> bytes:
        try:
            if self._inflate is None:
                # Some servers send raw deflate (RFC 1951) for `deflate`, which means zlib's (RFC 9110, 8.4.1.2).
                wbits = 31 if self._gzip else 15 if chunk[:1] and chunk[0] & 0x0F == 8 else -15
                self._inflate = zlib.decompressobj(wbits)
            plain: bytes = self._inflate.decompress(chunk, room)
            return plain
        except zlib.error:
            raise ToolFailure("the page is packed in a broken way") from None


def _in_words(error: aiohttp.ClientError) -> str:
    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return "its certificate is not trusted"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "nothing answers there"
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError):
        return "the answer broke off"
    if isinstance(error, aiohttp.ClientResponseError):
        return "the answer is no HTTP"
    return f"the request failed ({type(error).__name__})"
