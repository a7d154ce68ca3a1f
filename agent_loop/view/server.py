"""The server: pages and JSON on loopback, and one route that changes anything, if it was asked for.

Any page that a browser has open may send requests to loopback. So every request must carry exactly our Host, no foreign
Origin, and no cross-site mark; the pages may load nothing from elsewhere. Names in URLs are keys of the index, never
paths. Nothing here changes anything but `POST /api/what-if`, which is there with `--what-if` only and wants the token
that this process drew: a page has it from the fragment of the address that the command printed.
"""

from __future__ import annotations

import hmac
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from agent_loop.view import detail
from agent_loop.view.export import static_files, write_html
from agent_loop.view.fork import ForkError
from agent_loop.view.index import Index
from agent_loop.view.pages import page_of, stored_pages
from agent_loop.view.pieces import Pieces
from agent_loop.view.rows import Row
from agent_loop.view.search import BadQuery, find
from agent_loop.view.whatif import WhatIf, fork_row

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = [
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
LONGEST_URL = 8_000
"""Bytes of path and query."""
MOST_EXPORTED = 50
"""Episodes in one file."""
WHAT_IF = "/api/what-if"
LONGEST_BODY = 1_000_000
"""Bytes of an edited turn, as JSON."""
_KEY = re.compile(r"[0-9a-f]{16}")


class Guard:
    """Refuses what our own pages would not send.

    Args:
        port: the one that the Host header must name.
        token: what a POST to the what-if must bring; None: there is none.
    """

    def __init__(self, app: ASGIApp, port: int, token: str | None = None) -> None:
        self.app = app
        self.token = token
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        refusal = self.refusal(scope)
        await (refusal or self.app)(scope, receive, send_guarded)

    def refusal(self, scope: Scope) -> Response | None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        host = [value.decode("latin-1") for value in headers.get(b"host", [])]
        if len(host) != 1 or host[0] not in self.hosts:
            return PlainTextResponse("This server answers to its own name only.", 400)
        own = f"http://{host[0]}"
        origins = {value.decode("latin-1") for value in headers.get(b"origin", [])}
        site = set(headers.get(b"sec-fetch-site", []))
        if origins - {own} or site - {b"same-origin", b"none"}:
            return PlainTextResponse("Other sites may not read this.", 403)
        if scope["method"] == "POST" and scope["path"] == WHAT_IF and self.token is not None:
            if origins != {own}:  # a browser says where a POST comes from
                return PlainTextResponse("wanted the header Origin", 403)
            given = headers.get(b"x-what-if", [])
            if len(given) != 1 or not hmac.compare_digest(given[0], self.token.encode()):
                return PlainTextResponse("The page was not opened with the address that the command printed.", 403)
            if headers.get(b"content-type") != [b"application/json"]:
                return PlainTextResponse("wanted application/json", 415)
        elif scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("Nothing here can be changed.", 405, headers={"allow": "GET, HEAD"})
        if len(scope["raw_path"]) + len(scope["query_string"]) > LONGEST_URL:
            return PlainTextResponse("The address is too long.", 414)
        return None


def app_of(
    index: Index,
    runs: list[Path],
    pieces: list[Pieces | None],
    *,
    port: int,
    follow_s: float | None = None,
    what_ifs: list[WhatIf] | None = None,
    token: str | None = None,
) -> Guard:
    """The application.

    Args:
        pieces: a run's tokenizer each.
        follow_s: look for appended episodes when a page asks, at most this often; None: never.
        what_ifs: plays forks, one a run; None: there is no what-if.
        token: see `Guard`.
    """
    files = static_files()
    stores = [stored_pages(run) for run in runs]
    refreshing = threading.Lock()

    def follow() -> None:
        if follow_s is not None and refreshing.acquire(blocking=False):
            try:
                index.refresh()
            finally:
                refreshing.release()

    def static(request: Request) -> Response:
        found = files.get(request.path_params.get("name", "index.html"))
        return (
            PlainTextResponse("not found", 404) if found is None else Response(found.body, media_type=found.media_type)
        )

    def run(request: Request) -> Response:
        follow()
        model = what_ifs[0].model if what_ifs else None
        what_if = {"model": model.name if model else None} if what_ifs else None
        return _json(detail.run_page(index, runs) | {"follow": follow_s is not None, "what_if": what_if})

    def changes(request: Request) -> Response:
        follow()
        return _json({"version": index.version, "rows": len(index.rows())})

    def episodes(request: Request) -> Response:
        follow()
        try:
            found = find(index, request.query_params.get("q", ""), sort=request.query_params.get("sort", ""))
            offset = int(request.query_params.get("offset", "0"))
            limit = min(int(request.query_params.get("limit", "200")), 1000)
        except BadQuery as error:
            return _json({"error": str(error)}, 400)
        except ValueError:
            return _json({"error": "offset and limit are numbers"}, 400)
        if offset < 0 or limit < 0:
            return _json({"error": "offset and limit are at least 0"}, 400)
        return _json(
            {
                "version": index.version,
                "total": len(found.rows),
                "all": len(index.rows()),
                "searched": found.searched,
                "candidates": found.candidates,
                "rows": [detail.row_json(row) for row in found.rows[offset : offset + limit]],
            }
        )

    def of_row(answer: Callable[[Row, Request], Response]) -> Callable[[Request], Response]:
        def endpoint(request: Request) -> Response:
            key = request.path_params["key"]
            row = index.row(key) if _KEY.fullmatch(key) else None
            if row is None:
                return _json({"error": "there is no such episode"}, 404)
            try:
                return answer(row, request)
            except (FileNotFoundError, LookupError) as error:
                return _json({"error": str(error)}, 404)
            except (ValueError, RecursionError) as error:
                return _json({"error": f"the line is no episode: {error}"}, 422)

        return endpoint

    def episode(row: Row, request: Request) -> Response:
        return _json(detail.episode_page(index, row, pieces[row.run]) | {"pages": stores[row.run] is not None})

    def prompt(row: Row, request: Request) -> Response:
        turn = request.query_params.get("turn", "0")
        if not turn.isascii() or not turn.isdigit() or len(turn) > 9:
            return _json({"error": "turn is a number"}, 400)
        return _json(detail.prompt_page(index, row, pieces[row.run], int(turn)))

    def page(row: Row, request: Request) -> Response:
        return _json(page_of(stores[row.run], request.query_params.get("page", "")))

    def raw(row: Row, request: Request) -> Response:
        return Response(index.raw(row), media_type="text/plain; charset=utf-8")

    def export(request: Request) -> Response:
        keys = request.query_params.get("keys", "").split(",")
        rows = [index.row(key) if _KEY.fullmatch(key) else None for key in keys[: MOST_EXPORTED + 1]]
        found = [row for row in rows if row is not None]
        if len(found) != len(rows) or len(rows) > MOST_EXPORTED:
            return _json({"error": f"wanted the keys of 1 to {MOST_EXPORTED} episodes"}, 400)
        return Response(
            write_html(index, runs, pieces, found),
            media_type="text/html",
            headers={"content-disposition": 'attachment; filename="episodes.html"'},
        )

    forking = threading.Lock()

    def played(key: str, turn: int, text: str | None) -> Response:
        row = index.row(key) if _KEY.fullmatch(key) else None
        if row is None or what_ifs is None:
            return _json({"error": "there is no such episode"}, 404)
        if not forking.acquire(blocking=False):
            return _json({"error": "another fork is being played"}, 409)
        try:
            made = fork_row(index, row, what_ifs[row.run], turn, text)
        except (ForkError, FileNotFoundError) as error:
            return _json({"error": str(error)}, 422)
        except (ValueError, RecursionError) as error:
            return _json({"error": f"the line is no episode: {error}"}, 422)
        finally:
            forking.release()
        return _json({"key": made.key, "id": made.id})

    async def what_if(request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > LONGEST_BODY:
                return _json({"error": f"more than {LONGEST_BODY} bytes"}, 413)
        try:
            value = json.loads(bytes(body))
            key, turn, text = value["key"], value["turn"], value["text"]
            if type(key) is not str or type(turn) is not int or not isinstance(text, str | None):
                raise TypeError
            if text is not None:
                text.encode()  # a lone surrogate is no text
        except (ValueError, KeyError, TypeError, RecursionError):
            return _json({"error": "wanted key, turn and text"}, 400)
        return await run_in_threadpool(played, key, turn, text)

    routes = [
        Route("/", static),
        Route("/static/{name}", static),
        Route("/api/run", run),
        Route("/api/changes", changes),
        Route("/api/episodes", episodes),
        Route("/api/episode/{key}", of_row(episode)),
        Route("/api/prompt/{key}", of_row(prompt)),
        Route("/api/page/{key}", of_row(page)),
        Route("/api/raw/{key}", of_row(raw)),
        Route("/api/export", export),
    ]
    if what_ifs is not None:
        routes.append(Route(WHAT_IF, what_if, methods=["POST"]))
    return Guard(Starlette(routes=routes), port, token if what_ifs is not None else None)


def _json(value: Any, status: int = 200) -> Response:
    try:
        body = msgspec.json.encode(value)
    except (UnicodeEncodeError, TypeError):  # a lone surrogate: only an escape can write it
        body = json.dumps(value, allow_nan=False).encode()
    return Response(body, status, media_type="application/json")
