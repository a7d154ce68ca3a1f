"""A model server of a few lines, as a program: `python small_server.py PORT [--broken | --never-ready] [--child]`.

Answers /health, /v1/models, and with the key that it was started with /v1/completions: its process id and the payload.
A payload with `die` ends it as a crash does; after one with `sick` /health answers 503, as vLLM's with a dead engine.
"""

from __future__ import annotations

import os
import subprocess
import sys

from aiohttp import web

KEY = os.environ.get("VLLM_API_KEY", "")
SICK: list[bool] = []


async def models(request: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "m"}]})


async def health(request: web.Request) -> web.Response:
    return web.Response(status=503 if SICK else 200)


async def complete(request: web.Request) -> web.Response:
    if request.headers.get("Authorization") != f"Bearer {KEY}":
        return web.json_response({"error": {"message": "wrong key"}}, status=401)
    payload = await request.json()
    if payload.get("die"):
        os._exit(9)
    if payload.get("sick"):
        SICK.append(True)
    return web.json_response({"pid": os.getpid(), "payload": payload})


def main() -> None:
    port, *flags = sys.argv[1:]
    if "--broken" in flags:
        print("loading weights", flush=True)
        raise RuntimeError("no weights in that folder")
    if "--child" in flags:  # as vLLM's engine: a process of its own, in a session of its own
        code = "import time; time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    app = web.Application()
    if "--never-ready" not in flags:
        app.router.add_get("/v1/models", models)
    else:
        app.router.add_get("/v1/models", lambda _: web.Response(status=503))
    app.router.add_get("/health", health)
    app.router.add_post("/v1/completions", complete)
    web.run_app(app, host="127.0.0.1", port=int(port), print=None)


if __name__ == "__main__":
    main()
