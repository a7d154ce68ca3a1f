"""JSON over HTTP: what is retried, what is not, and how failures are named."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from agent_loop.transport import AsgiTransport, HttpTransport, TransportError
from tests.fakes.fake_vllm import FakeVllm

REQUEST = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 2}


@pytest.fixture
def server() -> Any:
    with FakeVllm("m", 64) as server:
        yield server


@pytest.fixture
async def transport(server: FakeVllm) -> AsyncIterator[HttpTransport]:
    transport = HttpTransport(server.base_url, api_key="k", retry_deadline_s=5.0)
    yield transport
    await transport.aclose()


@pytest.mark.parametrize("ending", ["/v1", "/v1/", ""])
async def test_base_url_with_and_without_v1(server: FakeVllm, ending: str) -> None:
    transport = HttpTransport(server.base_url.removesuffix("/v1") + ending)
    assert (await transport.get_json("/v1/models", timeout_s=5.0))["data"][0]["id"] == "m"
    await transport.aclose()


async def test_the_key_is_sent_and_an_absent_one_is_not(server: FakeVllm, transport: HttpTransport) -> None:
    await transport.post_json("/v1/completions", REQUEST, timeout_s=5.0)
    without = HttpTransport(server.base_url)
    await without.post_json("/v1/completions", REQUEST, timeout_s=5.0)
    await without.aclose()
    assert [r.authorization for r in server.received] == ["Bearer k", None]
    assert server.received[0].payload == REQUEST


@pytest.mark.parametrize("fault", ["http_500", "http_429"])
async def test_what_may_pass_is_retried(server: FakeVllm, transport: HttpTransport, fault: str) -> None:
    server.fault_after(0, fault, times=2)
    reply = await transport.post_json("/v1/completions", REQUEST, timeout_s=20.0)
    assert reply["model"] == "m"
    assert len(server.received) == 3


async def test_retries_end_at_the_deadline(server: FakeVllm) -> None:
    server.fault_after(0, "http_500")
    transport = HttpTransport(server.base_url, retry_deadline_s=0.5)
    began = time.monotonic()
    with pytest.raises(TransportError, match=r"127\.0\.0\.1:\d+/v1/completions answered 500: EngineCore") as caught:
        await transport.post_json("/v1/completions", REQUEST, timeout_s=60.0)
    await transport.aclose()
    assert (caught.value.kind, caught.value.status) == ("unavailable", 500)
    assert time.monotonic() - began < 5


async def test_a_refusal_is_not_retried(server: FakeVllm, transport: HttpTransport) -> None:
    with pytest.raises(TransportError, match="answered 404: The model `x` does not exist") as caught:
        await transport.post_json("/v1/completions", {**REQUEST, "model": "x"}, timeout_s=5.0)
    assert (caught.value.kind, caught.value.status) == ("rejected", 404)
    assert len(server.received) == 1


async def test_a_prompt_that_is_too_long_has_a_kind_of_its_own(transport: HttpTransport) -> None:
    with pytest.raises(TransportError, match="maximum context length is 4096") as caught:
        await transport.post_json("/v1/completions", {**REQUEST, "prompt": [1] * 4095}, timeout_s=5.0)
    assert caught.value.kind == "context_overflow"


@pytest.mark.parametrize(("fault", "excerpt"), [("truncated_json", "no JSON"), ("html", "Sign in to the proxy")])
async def test_a_reply_that_is_no_json(server: FakeVllm, transport: HttpTransport, fault: str, excerpt: str) -> None:
    server.fault_after(0, fault)
    with pytest.raises(TransportError, match=excerpt) as caught:
        await transport.post_json("/v1/completions", REQUEST, timeout_s=5.0)
    assert caught.value.kind == "protocol"
    assert len(server.received) == 1


async def test_a_server_that_never_answers(server: FakeVllm, transport: HttpTransport) -> None:
    server.fault_after(0, "stall")
    with pytest.raises(TransportError, match=r"did not answer within 0\.3 s") as caught:
        await transport.post_json("/v1/completions", REQUEST, timeout_s=0.3)
    assert caught.value.kind == "unavailable"


async def test_nobody_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    transport = HttpTransport(f"http://127.0.0.1:{port}/v1", retry_deadline_s=0.3)
    with pytest.raises(TransportError, match=f"127.0.0.1:{port}.* cannot be reached") as caught:
        await transport.get_json("/v1/models", timeout_s=5.0)
    assert (caught.value.kind, caught.value.status) == ("unavailable", None)
    await transport.aclose()


async def test_an_address_that_is_no_url() -> None:
    transport = HttpTransport("localhost:8000/v1")
    with pytest.raises(TransportError, match="localhost:8000/v1/models is not a URL"):
        await transport.get_json("/v1/models", timeout_s=5.0)
    await transport.aclose()


GZIP = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n"


@asynccontextmanager
async def raw_server(reply: bytes, *, drip_s: float | None = None) -> AsyncIterator[str]:
    """Sends the same bytes to whoever connects, at once or one after another."""

    answers: list[asyncio.Task[Any]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        answers.append(task)
        with suppress(ConnectionError):
            await reader.read(10)
            for piece in [reply] if drip_s is None else (reply[i : i + 1] for i in range(len(reply))):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(drip_s or 0)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
        async with asyncio.timeout(10):
            await asyncio.gather(*answers)


async def test_a_reply_that_never_ends_is_cut_off() -> None:
    endless = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 5_000_000
    async with raw_server(endless) as base_url:
        transport = HttpTransport(base_url, max_body_bytes=1_000_000)
        with pytest.raises(TransportError, match="sent more than 1,000,000 bytes") as caught:
            await transport.get_json("/v1/models", timeout_s=5.0)
        await transport.aclose()
    assert caught.value.kind == "protocol"


async def test_what_unpacks_to_too_much_is_cut_off() -> None:
    body = gzip.compress(b" " * 20_000_000)
    async with raw_server(GZIP + f"Content-Length: {len(body)}\r\n\r\n".encode() + body) as base_url:
        transport = HttpTransport(base_url, max_body_bytes=1_000_000)
        with pytest.raises(TransportError, match="sent more than 1,000,000 bytes"):
            await transport.get_json("/v1/models", timeout_s=5.0)
        await transport.aclose()


async def test_a_reply_that_cannot_be_unpacked() -> None:
    async with raw_server(GZIP + b"Content-Length: 9\r\n\r\nnot gzip!") as base_url:
        transport = HttpTransport(base_url, retry_deadline_s=0.3)
        with pytest.raises(TransportError, match=r"127\.0\.0\.1"):
            await transport.get_json("/v1/models", timeout_s=5.0)
        await transport.aclose()


async def test_a_reply_that_drips_is_left_in_time() -> None:
    slow = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b" " * 5000
    async with raw_server(slow, drip_s=0.01) as base_url:
        transport = HttpTransport(base_url)
        began = time.monotonic()
        with pytest.raises(TransportError, match="did not answer within") as caught:
            await transport.get_json("/v1/models", timeout_s=0.5)
        await transport.aclose()
    assert caught.value.kind == "unavailable"
    assert time.monotonic() - began < 3


async def test_proxies_of_the_environment_are_not_asked(
    transport: HttpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (await transport.get_json("/v1/models", timeout_s=5.0))["data"][0]["id"]


@pytest.mark.parametrize("reply", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", b""])
async def test_what_listens_is_no_model_server(reply: bytes) -> None:
    async with raw_server(reply) as base_url:
        transport = HttpTransport(base_url, retry_deadline_s=0.3)
        with pytest.raises(TransportError, match=r"127\.0\.0\.1"):
            await transport.get_json("/v1/models", timeout_s=5.0)
        await transport.aclose()


async def test_many_requests_at_once(server: FakeVllm, transport: HttpTransport) -> None:
    replies = await asyncio.gather(
        *(transport.post_json("/v1/completions", {**REQUEST, "seed": n}, timeout_s=30.0) for n in range(200))
    )
    assert all(reply["usage"]["completion_tokens"] == 2 for reply in replies)


def application(status: int, body: Any, seen: list[Any]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, await receive()))
        await send({"type": "http.response.start", "status": status, "headers": []})
        content = json.dumps(body).encode()
        await send({"type": "http.response.body", "body": content[:5], "more_body": True})
        await send({"type": "http.response.body", "body": content[5:]})

    return app


async def test_an_application_in_this_process() -> None:
    seen: list[Any] = []
    transport = AsgiTransport(application(200, {"ok": True}, seen))
    assert await transport.post_json("/v1/completions?a=1", {"prompt": [1]}, timeout_s=1.0) == {"ok": True}
    [(scope, event)] = seen
    assert (scope["method"], scope["path"], scope["query_string"]) == ("POST", "/v1/completions", b"a=1")
    assert scope["client"] is None
    assert json.loads(event["body"]) == {"prompt": [1]}


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (400, "maximum context length is 5", "context_overflow"),
        (400, "unknown key 'x'", "rejected"),
        (503, "the engine's thread is not running", "unavailable"),
    ],
)
async def test_failures_of_an_application_are_named_alike(status: int, message: str, kind: str) -> None:
    transport = AsgiTransport(application(status, {"error": {"message": message}}, []))
    with pytest.raises(TransportError, match=f"answered {status}: {message}") as caught:
        await transport.get_json("/v1/models", timeout_s=1.0)
    assert (caught.value.kind, caught.value.status) == (kind, status)


async def test_an_application_that_never_answers() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    with pytest.raises(TransportError, match=r"did not answer within 0\.1 s"):
        await AsgiTransport(app).get_json("/health", timeout_s=0.1)
