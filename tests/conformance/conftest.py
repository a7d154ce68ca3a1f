"""`server`: the same requests against every engine. A new engine is one more parameter here."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.serving.embedded import EmbeddedEngine
from distill.serving.vllm import Server as VllmServer
from tests.conformance.models import VOCAB_SIZE, save, tiny_llama, tiny_qwen3
from tests.vllm.conftest import serving


@dataclass(frozen=True)
class Reply:
    status: int
    body: Any


@dataclass(frozen=True)
class Server:
    """An engine under test and what is known of it."""

    request: Callable[[str, str, Any], Awaitable[Reply]]
    model: str
    reference: PreTrainedModel
    """The same weights in plain `transformers`."""
    max_model_len: int
    max_logprobs: int = 20
    vocab_size: int = VOCAB_SIZE
    tolerance: float = 1e-4
    """Of a log-probability, in nats."""

    async def get(self, path: str) -> Reply:
        return await self.request("GET", path, None)

    async def complete(self, **payload: Any) -> Any:
        """The body of a completion that must succeed."""
        reply = await self.request("POST", "/v1/completions", {"model": self.model, **payload})
        assert reply.status == 200, reply.body
        return reply.body

    async def refuse(self, **payload: Any) -> Reply:
        """A completion that must not succeed."""
        reply = await self.request("POST", "/v1/completions", {"model": self.model, **payload})
        assert reply.status >= 400, reply.body
        return reply


def in_process(app: Any) -> Callable[[str, str, Any], Awaitable[Reply]]:
    """Call an ASGI application without a port."""

    async def request(method: str, path: str, payload: Any) -> Reply:
        body = b"" if payload is None else json.dumps(payload).encode()
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await app({"type": "http", "method": method, "path": path, "headers": [], "client": None}, receive, send)
        return Reply(sent[0]["status"], json.loads(sent[1]["body"] or b"null"))

    return request


def over_http(base_url: str, session: aiohttp.ClientSession) -> Callable[[str, str, Any], Awaitable[Reply]]:
    async def request(method: str, path: str, payload: Any) -> Reply:
        async with session.request(method, base_url + path, json=payload) as response:
            text = await response.text()
            return Reply(response.status, json.loads(text) if text else None)

    return request


class Serving:
    """uvicorn on a free loopback port, in a thread."""

    def __init__(self, app: Any) -> None:
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert self._thread.is_alive(), "uvicorn ended before it served"
            assert time.monotonic() < deadline, "uvicorn did not start within 30 s"
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=30)


@pytest.fixture(scope="session", params=["qwen3", "llama"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = {"qwen3": tiny_qwen3, "llama": tiny_llama}[request.param]()
    return save(model, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def embedded(model_dir: Path) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine.from_pretrained(model_dir, name="tiny", max_model_len=256)
    yield engine
    asyncio.run(engine.aclose())


@pytest.fixture(scope="session")
def embedded_url(embedded: EmbeddedEngine) -> Iterator[str]:
    with Serving(embedded.app) as url:
        yield url


@pytest.fixture(scope="session")
def vllm(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    with serving(model_dir, tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(
    params=[
        "embedded",
        "embedded over HTTP",
        pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(900)]),
    ]
)
async def server(request: pytest.FixtureRequest, model_dir: Path) -> AsyncIterator[Server]:
    reference = AutoModelForCausalLM.from_pretrained(model_dir)
    known: dict[str, Any] = {"model": "tiny", "reference": reference, "max_model_len": 256}
    if request.param == "vllm":
        known |= {"model": "student", "tolerance": 1e-3}  # other kernels than those of `transformers`
        vllm: VllmServer = request.getfixturevalue("vllm")
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {vllm.api_key}"}) as session:
            yield Server(over_http(vllm.base_url.removesuffix("/v1"), session), **known)
    elif request.param == "embedded":
        yield Server(in_process(request.getfixturevalue("embedded").app), **known)
    else:
        async with aiohttp.ClientSession() as session:
            yield Server(over_http(request.getfixturevalue("embedded_url"), session), **known)
