"""JSON over HTTP to a model server, or to an ASGI application in this process.

Retries what may pass (no connection, 408, 425, 429, 5xx, a time-out) with full jitter until a deadline, and nothing
else. aiohttp because a turn costs a tenth of the CPU that it costs through the openai client (bench/README.md).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

TransportErrorKind = Literal["unavailable", "rejected", "protocol", "context_overflow"]

RETRIED = frozenset({408, 425, 429})
MAX_BODY_BYTES = 256 << 20
LARGE_BODY_BYTES = 1 << 20
"""Parsed in a thread: 24 MB hold up the event loop for 352 ms in place, 158 ms so, since Python's lock is shared
(bench/README.md, "Scoring"). What is smaller is not worth the hop."""
OVERFLOW_WORDS = ("maximum context length", "context length is only", "longer than the maximum model length")
"""How vLLM says that a prompt is too long; there is no code for it."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
KEEPALIVE_S = 4.0
"""vLLM's uvicorn closes a connection that was idle for 5 s; one that it is closing would look like a crash."""
CONNECT_S = 10.0
"""For a connection to be made; a host that drops packets must not cost the time that a long completion may take."""


class TransportError(Exception):
    """No usable reply. The message names the address."""

    def __init__(self, message: str, kind: TransportErrorKind, status: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status


class Transport(Protocol):
    """Where requests go. Paths begin at the server's root: `/v1/completions`."""

    async def post_json(
        self, path: str, payload: Mapping[str, Any], *, timeout_s: float, key: str = ""
    ) -> dict[str, Any]:
        """
        Args:
            key: requests of one key go to one server, where there are several.
            timeout_s: of the whole call, retries included.

        Raises:
            TransportError: no JSON object came back in time.
        """
        ...

    async def get_json(self, path: str, *, timeout_s: float) -> dict[str, Any]: ...

    async def aclose(self) -> None: ...


class HttpTransport:
    """
    Args:
        base_url: of an OpenAI-compatible server, with its `/v1`.
        api_key: sent as a bearer token.
        retry_deadline_s: no retry begins later than this after the first try.
        max_body_bytes: a longer reply is refused while it comes in.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        retry_deadline_s: float = 60.0,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._root = self.base_url.removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._retry_deadline_s = retry_deadline_s
        self._max_body_bytes = max_body_bytes
        self._session: Any = None
        self._closed = False

    async def post_json(
        self, path: str, payload: Mapping[str, Any], *, timeout_s: float, key: str = ""
    ) -> dict[str, Any]:
        body = json.dumps(payload, separators=(",", ":")).encode()
        return await self._request("POST", path, body, timeout_s)

    async def get_json(self, path: str, *, timeout_s: float) -> dict[str, Any]:
        return await self._request("GET", path, None, timeout_s)

    async def aclose(self) -> None:
        self._closed = True
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _request(self, method: str, path: str, body: bytes | None, timeout_s: float) -> dict[str, Any]:
        url = self._root + path
        deadline = time.monotonic() + min(timeout_s, self._retry_deadline_s)
        end = time.monotonic() + timeout_s
        pause = FIRST_PAUSE_S
        while True:
            try:
                return await self._once(method, url, body, max(0.001, end - time.monotonic()))
            except _Retryable as error:
                wait = random.uniform(0, pause) if error.retry_after is None else error.retry_after
                if time.monotonic() + wait >= deadline:
                    raise TransportError(str(error), "unavailable", error.status) from error
                await asyncio.sleep(wait)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _once(self, method: str, url: str, body: bytes | None, timeout_s: float) -> dict[str, Any]:
        import aiohttp

        if self._closed:
            raise TransportError(f"{self._root} is not talked to any more", "unavailable")
        if self._session is None:
            # trust_env stays off: proxies of the environment have no business with a model server of one's own.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S), headers=self._headers
            )
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            async with self._session.request(
                method,
                url,
                data=body,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S),
            ) as response:
                content = await self._bounded(response, url)
                status, retry_after = response.status, response.headers.get("Retry-After")
        except aiohttp.ConnectionTimeoutError as error:
            raise _Retryable(f"{url} cannot be reached within {CONNECT_S:g} s") from error
        except TimeoutError as error:
            raise _Retryable(f"{url} did not answer within {timeout_s:.1f} s") from error
        except aiohttp.ClientPayloadError as error:
            raise _Retryable(f"{url} broke off its reply: {error}") from error
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise _Retryable(f"{url} cannot be reached: {error}") from error
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise TransportError(f"{url} is not a URL that begins with http:// or https://", "rejected") from error
        except aiohttp.ClientError as error:
            raise TransportError(f"{url} does not speak HTTP as it should: {error}", "protocol") from error
        if status in RETRIED or status >= 500:
            raise _Retryable(f"{url} answered {status}: {_excerpt(content)}", status, _seconds(retry_after))
        if len(content) > LARGE_BODY_BYTES:
            return await asyncio.to_thread(read_reply, url, status, content)
        return read_reply(url, status, content)

    async def _bounded(self, response: Any, url: str) -> bytes:
        chunks, size = [], 0
        async for chunk in response.content.iter_any():
            size += len(chunk)
            if size > self._max_body_bytes:
                text = f"{url} sent more than {self._max_body_bytes:,} bytes"
                raise TransportError(text, "protocol", response.status)
            chunks.append(chunk)
        return b"".join(chunks)


class _Retryable(Exception):
    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


def read_reply(url: str, status: int, content: bytes) -> dict[str, Any]:
    """The JSON object of a final reply.

    Raises:
        TransportError: an error status, or a body that is no JSON object.
    """
    if status >= 400:
        text = _excerpt(content)
        overflow = status == 400 and any(words in text for words in OVERFLOW_WORDS)
        raise TransportError(f"{url} answered {status}: {text}", "context_overflow" if overflow else "rejected", status)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TransportError(
            f"{url} answered with something that is no JSON: {_excerpt(content)}", "protocol", status
        ) from error
    if not isinstance(value, dict):
        raise TransportError(f"{url} answered with a JSON {type(value).__name__}, not an object", "protocol", status)
    return value


def _excerpt(content: bytes) -> str:
    text = content[:2000].decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    text = " ".join(text.split())
    return text if len(text) <= 500 else text[:497] + "..."


def _seconds(retry_after: str | None) -> float | None:
    """A `Retry-After` in seconds, within bounds; dates are left to the jitter."""
    try:
        return min(max(float(retry_after or ""), 0.0), 60.0)
    except ValueError:
        return None


App = Callable[[Mapping[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


class AsgiTransport:
    """Calls an ASGI application in this process: no port, no socket, the same wire format."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def post_json(
        self, path: str, payload: Mapping[str, Any], *, timeout_s: float, key: str = ""
    ) -> dict[str, Any]:
        return await self._call("POST", path, json.dumps(payload, separators=(",", ":")).encode(), timeout_s)

    async def get_json(self, path: str, *, timeout_s: float) -> dict[str, Any]:
        return await self._call("GET", path, b"", timeout_s)

    async def aclose(self) -> None:
        """Nothing is open."""

    async def _call(self, method: str, path: str, body: bytes, timeout_s: float) -> dict[str, Any]:
        parts = urlsplit(path)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": parts.path,
            "raw_path": parts.path.encode(),
            "query_string": parts.query.encode(),
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": None,
            "server": None,
        }
        status = 500
        chunks: list[bytes] = []

        async def receive() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                chunks.append(message.get("body", b""))

        try:
            async with asyncio.timeout(timeout_s):
                await self._app(scope, receive, send)
        except TimeoutError as error:
            raise TransportError(
                f"{path} in this process did not answer within {timeout_s:g} s", "unavailable"
            ) from error
        content = b"".join(chunks)
        if status >= 500:
            raise TransportError(
                f"{path} in this process answered {status}: {_excerpt(content)}", "unavailable", status
            )
        return read_reply(f"{path} in this process", status, content or b"{}")
