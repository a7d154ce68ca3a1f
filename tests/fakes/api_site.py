"""A site on loopback whose answers a test sets, and a client that reaches it and nothing else."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from tools.fetch import FetchLimits, HttpClient
from tools.guard import Guard
from tools.rate import HostRate


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer."""

    body: Any = None
    """Bytes or text as they are; anything else as JSON."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: str


@dataclass(slots=True)
class ApiSite:
    url: str
    guard: Guard
    client: HttpClient
    name: str = field(default_factory=lambda: uuid4().hex)
    """Of this site alone: ports come again."""
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    """By path: each is given once, the last one for ever."""
    asked: list[Asked] = field(default_factory=list)

    def says(self, path: str, *replies: Any) -> None:
        """Sets the answers of a path; what is no `Reply` is the body of one."""
        self.replies[path] = [reply if isinstance(reply, Reply) else Reply(body=reply) for reply in replies]

    async def answer(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.asked.append(Asked(request.method, request.path, dict(request.query), headers, await request.text()))
        replies = self.replies.get(request.path)
        if not replies:
            return web.json_response({"error": "no such thing"}, status=404)
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        await asyncio.sleep(reply.delay_s)
        raw = reply.body if isinstance(reply.body, str | bytes) else json.dumps(reply.body)
        body = raw.encode() if isinstance(raw, str) else raw
        return web.Response(
            body=body, status=reply.status, headers={"Content-Type": reply.content_type, **reply.headers}
        )


@asynccontextmanager
async def api_site() -> AsyncIterator[ApiSite]:
    app = web.Application()
    port = unused_port()
    server = TestServer(app, host="127.0.0.1", port=port)
    guard = Guard(open_addresses=(f"127.0.0.1:{port}",))
    limits = FetchLimits(max_bytes=50_000_000, content_types=("text/", "application/"))
    rate = HostRate(default_per_minute=math.inf)
    client = HttpClient(guard, user_agent="test", limits=limits, robots=False, rate=rate)
    site = ApiSite(f"http://127.0.0.1:{port}", guard, client)
    app.router.add_route("*", "/{path:.*}", site.answer)
    await server.start_server()
    try:
        yield site
    finally:
        await client.aclose()
        await server.close()


def bytes_of(folder: Path) -> bytes:
    """All that the files of a folder hold, unpacked."""
    data = (path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
    return b"\n".join(gzip.decompress(each) if each.startswith(b"\x1f\x8b") else each for each in data)
