"""A server of raw bytes on loopback: what a handler writes is what goes out, however broken.

async with raw_site({"/bomb": bomb}) as site: ... site.url("/bomb"), site.heads
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

Handler = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class RawSite:
    port: int = 0
    host: str = "127.0.0.1"
    heads: list[str] = field(default_factory=list)
    """Of the requests that came, bodies of a few bytes included."""
    num_connections: int = 0

    def url(self, path: str = "/") -> str:
        return f"http://{self.host}:{self.port}{path}"

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def reply(status: str = "200 OK", body: bytes = b"", **headers: str) -> Handler:
    """A whole answer; `content_type="text/html"` becomes a header."""
    sent = {"Content-Length": str(len(body)), "Content-Type": "text/html", "Connection": "close"}
    sent |= {name.replace("_", "-").title(): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in sent.items() if value)

    async def handle(writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body)

    return handle


@asynccontextmanager
async def raw_site(pages: Mapping[str, Handler] | None = None) -> AsyncIterator[RawSite]:
    """Every request is one connection. Paths that are not in `pages` answer `200` with nothing."""
    site = RawSite()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        site.num_connections += 1
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.02):
                        head += (await reader.read(1000)).decode()
                site.heads.append(head)
                path = head.split(" ")[1].split("?")[0]
                await (pages or {}).get(path, reply())(writer)
                await writer.drain()
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, site.host, 0)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
