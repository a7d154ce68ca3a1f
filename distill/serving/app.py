"""The embedded engine's routes, as a plain ASGI application: a framework would cost more than the tiny models do."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from distill.serving.wire import WireError, completion_body, parse_completion

if TYPE_CHECKING:
    from distill.serving.embedded import EmbeddedEngine

VERSION = "distill-gym-embedded/0.1"
MAX_BODY_BYTES = 64 << 20

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Mapping[str, Any], Receive, Send], Awaitable[None]]


def make_app(engine: EmbeddedEngine, *, api_key: str | None) -> App:
    """
    Args:
        api_key: asked for on `/v1/` as a bearer token if given.
    """
    routes = _Routes(engine, api_key)

    # A plain function: uvicorn takes a bound method for ASGI 2.
    async def app(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        await routes.serve(scope, receive, send)

    return app


class _Routes:
    def __init__(self, engine: EmbeddedEngine, api_key: str | None) -> None:
        self._engine = engine
        self._api_key = api_key

    async def serve(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"the embedded engine speaks HTTP, not {scope['type']}")
        try:
            status, body = 200, await self._answer(scope, receive)
        except WireError as error:
            status, body = error.status, error.body()
        except _ClientGoneError:
            return
        try:
            content = json.dumps(body, allow_nan=False).encode() if body is not None else b""
        except ValueError:
            failure = WireError("a number of the reply is not finite", 500, "InternalServerError")
            status, content = failure.status, json.dumps(failure.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            event = (await receive())["type"]
            if event == "lifespan.startup":
                self._engine.start()
            else:
                await self._engine.aclose()
            await send({"type": f"{event}.complete"})
            if event == "lifespan.shutdown":
                return

    async def _answer(self, scope: Mapping[str, Any], receive: Receive) -> dict[str, Any] | None:
        route = (scope["method"], scope["path"])
        if scope["path"].startswith("/v1/"):
            self._authorise(scope)
        if route == ("POST", "/v1/completions"):
            return await self._completions(scope, receive)
        if route == ("GET", "/v1/models"):
            card = {
                "id": self._engine.name,
                "object": "model",
                "owned_by": "distill-gym",
                "root": self._engine.name,
                "parent": None,
            }
            return {"object": "list", "data": [{**card, "max_model_len": self._engine.limits.max_model_len}]}
        if route == ("GET", "/health"):
            self._engine.start()
            if not self._engine.alive:
                raise WireError("the engine's thread is not running", 503, "ServiceUnavailableError")
            return None
        if route == ("GET", "/version"):
            return {"version": VERSION}
        if route == ("GET", "/weight_info"):
            return {"weight_version": self._engine.weight_version}
        known = {"/v1/completions", "/v1/models", "/health", "/version", "/weight_info"}
        if scope["path"] in known:
            raise WireError("Method Not Allowed", 405, "MethodNotAllowedError")
        raise WireError(f"Not Found: the embedded engine has {', '.join(sorted(known))}", 404, "NotFoundError")

    def _authorise(self, scope: Mapping[str, Any]) -> None:
        if self._api_key is None:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {self._api_key}".encode()):
            raise WireError("Unauthorized", 401, "AuthenticationError")

    async def _completions(self, scope: Mapping[str, Any], receive: Receive) -> dict[str, Any]:
        try:
            payload = json.loads(await _read_body(receive))
        except ValueError as error:
            raise WireError(f"the body is not JSON: {error}") from None
        if isinstance(payload, dict) and payload.get("model") not in (None, self._engine.name):
            raise WireError(f"The model `{payload['model']}` does not exist.", 404, "NotFoundError")
        encode = None if self._engine.tokenizer is None else self._engine.tokenizer.encode
        requests = parse_completion(payload, self._engine.limits, encode)
        if scope.get("client") is None:
            # In process: a caller that no longer wants the answer cancels this coroutine.
            results = await self._engine.complete(requests)
        else:
            results = await _unless_gone(self._engine.complete(requests), receive)
        pairs = list(zip(requests, results, strict=True))
        return completion_body(pairs, payload=payload, model=self._engine.name, decode=self._engine.decode)


class _ClientGoneError(Exception):
    pass


async def _unless_gone(work: Awaitable[Any], receive: Receive) -> Any:
    """Await `work`, and cancel it if the client disconnects first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise WireError(f"the body is larger than {MAX_BODY_BYTES} bytes", 413)
        if not message.get("more_body", False):
            return b"".join(parts)
